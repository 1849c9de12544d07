"""How fast is the trainer, and where does its time go? Prints a table and writes it as JSON.

    python tests/benchmark.py                      all but the scaling, a quarter of an hour on two cores
    python tests/benchmark.py --parts trainer      some of: environments network trainer peers scaling
    python tests/benchmark.py --quick              one repeat of few steps, to see that it works
    python tests/benchmark.py --parts trainer --other ../old      this checkout and another one, in turn

Every measurement runs in a process of its own, leaves out its warm-up, and is repeated in turn with the others of its
part; the table shows medians (and the range). Nothing else should run on the machine meanwhile.
"""

import contextlib
import itertools
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

ENV_ID = "BreakoutNoFrameskip-v4"
CLEANRL = {"num_envs": 8, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "q_lambda": 0.65}
PAPER = {"num_envs": 128, "num_steps": 32, "num_minibatches": 32, "update_epochs": 2, "q_lambda": 0.65}
SETTINGS = {"PQN, CleanRL's settings": CLEANRL, "PQN, the paper's settings": PAPER, "PQN, the defaults": {}}


@dataclass
class Options:
    """Measure the speed of PQN and of its parts."""

    parts: tuple[str, ...] = ("environments", "network", "trainer", "peers")  # and scaling
    repeats: int = 3  # of every measurement
    steps: int = 4096  # environment steps of a whole trainer, behind its warm-up
    quick: bool = False  # few steps and one repeat, to see that everything works
    other: Path | None = None  # folder with another pqn_breakout.py, whose trainer is measured, too
    json: Path | None = None  # where the figures go, too; a file in the temporary folder by default


# --- What is measured, each in a process of its own ---


def emulator(num_envs: int, steps: int, num_threads: int) -> float:
    """Environment steps per second of ALE alone: frames are emulated, but never looked at.

    One process a thread, each with its share of the games, played in turn, at random and with no-op starts.
    """
    with ProcessPoolExecutor(num_threads, get_context("spawn")) as pool:
        games, share = [num_envs // num_threads] * num_threads, [steps // num_threads] * num_threads
        return sum(pool.map(emulate, games, share, range(num_threads)))


def emulate(num_games: int, steps: int, seed: int) -> float:
    import ale_py
    import numpy as np

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    games = [ale_py.ALEInterface() for _ in range(num_games)]
    for game in games:
        game.setFloat("repeat_action_probability", 0.0)
        game.loadROM(ale_py.roms.get_rom_path("breakout"))
    actions = games[0].getMinimalActionSet()
    rng = np.random.default_rng(seed)
    choices = rng.integers(len(actions), size=(steps // num_games, num_games)).tolist()
    start = time.perf_counter()
    for chosen in choices:
        for game, choice in zip(games, chosen, strict=True):
            for _ in range(4):
                game.act(actions[choice])
            if game.game_over():
                game.reset_game()
                for _ in range(rng.integers(1, 31)):
                    game.act(ale_py.Action.NOOP)
    return num_games * len(choices) / (time.perf_counter() - start)


def environments(vec_env: str, num_envs: int, steps: int, num_threads: int = 0) -> float:
    """Environment steps per second of random play."""
    import numpy as np

    import pqn_breakout

    envs = pqn_breakout.make_env(ENV_ID, num_envs, 1, vec_env, num_threads=num_threads)
    envs.reset()
    actions = np.random.default_rng(1).integers(envs.action_space.n, size=(10 + steps // num_envs, num_envs))
    for t, chosen in enumerate(actions):
        if t == 10:
            start = time.perf_counter()
        envs.step(chosen)
    seconds = time.perf_counter() - start
    envs.close()
    return (len(actions) - 10) * num_envs / seconds


def network(rows: int, bf16: bool, training: bool) -> float:
    """Samples per second: a forward pass, or a whole gradient step with its optimizer."""
    import torch

    import pqn_breakout

    net = pqn_breakout.QNetwork(4, bf16)
    optimizer = pqn_breakout.RAdam(net.parameters())
    frames = torch.randint(0, 256, (rows, 84, 84, 4), dtype=torch.uint8).permute(0, 3, 1, 2)
    actions, targets = torch.randint(0, 4, (rows, 1)), torch.randn(rows, 1)
    seconds = []
    for _ in range(60):
        start = time.perf_counter()
        with torch.set_grad_enabled(training):
            q_values = net(frames)
        if training:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(q_values.gather(1, actions), targets).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 10.0)
            optimizer.step(1e-6)
        seconds.append(time.perf_counter() - start)
    return rows / statistics.median(seconds[10:])


def trainer(settings: dict, steps: int, folder: Path = ROOT) -> dict:
    """The trainer in `folder` behind its first rollout: steps per second, peak memory in MB, shares of its parts."""
    sys.path.insert(0, str(folder))
    import pqn_breakout

    seconds, ends = Counter(), []

    def measure_calls(owner, name: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            if name == "learn":
                ends.append((start, Counter(seconds)))
            result = function(*args, **kwargs)
            seconds[name] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)

    measure_calls(pqn_breakout, "learn")
    if folder == ROOT:
        measure_calls(pqn_breakout, "play")
        measure_calls(pqn_breakout, "q_lambda_returns")
        measure_calls(pqn_breakout.AtariVecEnv, "step")
    with tempfile.TemporaryDirectory() as log_dir, contextlib.redirect_stdout(None):
        args = pqn_breakout.Args(**settings, log_dir=log_dir)
        rollout = args.num_envs * args.num_steps
        args.total_timesteps = (1 + max(2, -(-steps // rollout))) * rollout
        pqn_breakout.train(args)
    (start, before), (end, after) = ends[0], ends[-1]
    speed, memory, parts = (len(ends) - 1) * rollout / (end - start), getrusage(RUSAGE_SELF).ru_maxrss / 2**10, {}
    if folder == ROOT:
        share = {name: (after[name] - before[name]) / (end - start) for name in after}
        parts = {"environments": share["step"], "acting": share["play"] - share["step"]}
        parts |= {"targets": share["q_lambda_returns"], "learning": share["learn"] - share["q_lambda_returns"]}
        parts["everything else"] = 1 - sum(parts.values())
    return {"steps_per_second": speed, "memory": memory, "shares": parts}


def peer(name: str, steps: int) -> dict:
    """The same of a Stable-Baselines3 algorithm with RL Zoo's Atari settings, on SB3's own pipeline."""
    import ale_py
    from stable_baselines3 import DQN, PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)

    class Clock(BaseCallback):
        start = None

        def _on_step(self) -> bool:
            if self.start is None and self.num_timesteps >= 2048:
                self.start, self.first = time.perf_counter(), self.num_timesteps
            return True

    envs = VecFrameStack(make_atari_env(ENV_ID, n_envs=8 if name == "PPO" else 1, seed=1), 4)
    if name == "PPO":
        sizes = {"n_steps": 128, "n_epochs": 4, "batch_size": 256}
        model = PPO("CnnPolicy", envs, learning_rate=2.5e-4, clip_range=0.1, vf_coef=0.5, ent_coef=0.01, **sizes)
    else:  # learning from the start on and with a small buffer: neither matters to a step's time
        sizes = {"buffer_size": 10_000, "learning_starts": 1_000, "batch_size": 32, "train_freq": 4}
        model = DQN("CnnPolicy", envs, learning_rate=1e-4, target_update_interval=1000, **sizes)
    clock = Clock()
    model.learn(2048 + steps, callback=clock)
    speed = (model.num_timesteps - clock.first) / (time.perf_counter() - clock.start)
    return {"steps_per_second": speed, "shares": {}, "memory": getrusage(RUSAGE_SELF).ru_maxrss / 2**10}


# --- The table ---


def in_process(function, *args):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(cases: dict, repeats: int) -> dict[str, list]:
    """Results of `repeats` rounds of all cases: name to (function, *arguments)."""
    results = {name: [] for name in cases}
    for _, (name, case) in itertools.product(range(repeats), cases.items()):
        print(f"\r{name:79}", end="\r", file=sys.stderr, flush=True)
        results[name].append(in_process(*case))
    return results


def cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return name[1] if name else platform.processor()


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Of the medians, and of each round."""
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ours) / statistics.median(theirs):.2f}  ({min(rounds):.2f} to {max(rounds):.2f})"


def spread(figures: list[float], unit: str) -> str:
    low, middle, high = min(figures), statistics.median(figures), max(figures)
    return f"{middle:8,.0f} {unit}" + (f"  ({low:,.0f} to {high:,.0f})" if len(figures) > 1 else "")


def main() -> None:
    import torch
    import tyro

    options = tyro.cli(Options)
    steps, repeats = (2048, 1) if options.quick else (options.steps, options.repeats)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ("torch", "ale-py", "stable-baselines3", "gymnasium", "numpy")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    figures = {"cpu": cpu(), "cores": cores, "capabilities": dict(torch.cpu.get_capabilities())}
    figures |= {"versions": versions, "steps": steps, "repeats": repeats}
    print(f"{cpu()}, {cores} cores; {', '.join(f'{name} {number}' for name, number in versions.items())}\n")

    if "environments" in options.parts:
        cases = {}
        for n in (32, 128):
            cases[f"emulator alone, {n} games"] = (emulator, n, 4 * steps, cores)
            cases[f"native, {n} games"] = (environments, "native", n, 4 * steps)
        cases["SB3's own pipeline, 32 games"] = (environments, "sb3", 32, steps)
        results = figures["environments"] = measure(cases, repeats)
        for name, values in results.items():
            print(f"{name:34}{spread(values, 'steps/s')}")
        for n in (32, 128):
            pair = results[f"native, {n} games"], results[f"emulator alone, {n} games"]
            print(f"native / emulator, {n} games: {ratio(*pair)}")
        print()

    if "network" in options.parts:
        cases = {}
        for rows, training, bf16 in itertools.product((32, 128), (False, True), (False, True)):
            what = "forward + backward + optimizer" if training else "forward"
            cases[f"{what}, {rows} rows, {'bf16' if bf16 else 'float32'}"] = (network, rows, bf16, training)
        figures["network"] = measure(cases, repeats)
        for name, values in figures["network"].items():
            print(f"{name:52}{spread(values, 'samples/s')}")
        print()

    cases = {}
    for name, settings in SETTINGS.items() if "trainer" in options.parts else ():
        cases[name] = trainer, settings, steps
        cases |= {f"{name}, other": (trainer, settings, steps, options.other)} if options.other else {}
    if "peers" in options.parts:
        cases |= {f"SB3 {name}, RL Zoo settings": (peer, name, steps) for name in ("PPO", "DQN")}
    if "scaling" in options.parts:
        # The paper's rollouts of 32 steps, learned from twice in minibatches of 128, whatever the number of games.
        for n, threads in itertools.product((8, 32, 128, 512), sorted({1, cores})):
            settings = PAPER | {"num_envs": n, "num_minibatches": n * 32 // 128, "num_threads": threads}
            cases[f"{n} games, {threads} threads"] = trainer, settings, steps
    results = figures["trainers"] = measure(cases, repeats)
    speeds = {name: [value["steps_per_second"] for value in values] for name, values in results.items()}
    for name, values in results.items():
        print(f"{name:34}{spread(speeds[name], 'steps/s')}, {max(v['memory'] for v in values):,.0f} MB")
        parts = {part: statistics.median(v["shares"][part] for v in values) for part in values[0]["shares"]}
        print(f"{'':4}" + ", ".join(f"{part} {share:.1%}" for part, share in parts.items()))
    for name in SETTINGS:
        for other in ("SB3 PPO, RL Zoo settings", f"{name}, other"):
            if {name, other} <= set(results):
                print(f"{name} / {other}: {ratio(speeds[name], speeds[other])}")

    path = options.json or Path(tempfile.gettempdir(), "pqn_benchmark.json")
    path.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
