"""How fast is the trainer, and where does its time go? Prints a table and writes it as JSON.

    python tests/benchmark.py                      all but the race, a quarter of an hour on two cores
    python tests/benchmark.py --parts trainer      some of: environments trainer peers race
    python tests/benchmark.py --quick              one repeat of few steps, to see that it works
    python tests/benchmark.py --parts trainer --other ../old      this checkout and another one, in turn
    python tests/benchmark.py --parts race --minutes 60           five hours: PQN, PPO and DQN learn, an hour each

Every measurement runs in a process of its own, leaves out its warm-up, and is repeated in turn with the others of its
part; the table shows medians (and the range). Nothing else should run on the machine meanwhile. A race leaves the
events of each contender in its folder, for tests/plot_runs.py; begun again, it goes on with those that are missing.
"""

import contextlib
import itertools
import json
import platform
import re
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

from joblib import cpu_count

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

ENV_ID = "BreakoutNoFrameskip-v4"
CLEANRL = {"num_envs": 8, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "q_lambda": 0.65}
PAPER = {"num_envs": 128, "num_steps": 32, "num_minibatches": 32, "update_epochs": 2, "q_lambda": 0.65}
RECOMMENDED = {"q_lambda": 0.3, "gamma": 0.997, "update_epochs": 2}
SETTINGS = {"PQN, CleanRL's settings": CLEANRL, "PQN, the paper's settings": PAPER, "PQN, the defaults": {}}


@dataclass
class Options:
    """Measure the speed of PQN and of its parts."""

    parts: tuple[str, ...] = ("environments", "trainer", "peers")  # and race
    repeats: int = 3  # of every measurement
    steps: int = 4096  # environment steps of a whole trainer, behind its warm-up
    quick: bool = False  # few steps and one repeat, to see that everything works
    other: Path | None = None  # folder with another pqn_breakout.py, whose trainer is measured, too
    minutes: float = 60.0  # that each contender of a race has for its training
    race_dir: Path = ROOT / "logs" / "reference" / "race"  # where the contenders' events go
    json: Path | None = None  # where the figures go, too; a file in the temporary folder by default


# --- What is measured, each in a process of its own ---


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


def make_peer(name: str, steps: int):
    """Stable-Baselines3's PPO or DQN with RL Zoo's Atari settings, on SB3's own pipeline or "on our environments"."""
    import ale_py
    from stable_baselines3 import DQN, PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    import pqn_breakout

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    n = 1 if name == "DQN" else 8
    ours = name.endswith("on our environments")
    envs = pqn_breakout.make_env(ENV_ID, n, 1) if ours else VecFrameStack(make_atari_env(ENV_ID, n, seed=1), 4)
    if name != "DQN":
        falling = {"learning_rate": lambda left: 2.5e-4 * left, "clip_range": lambda left: 0.1 * left}
        return PPO("CnnPolicy", envs, n_steps=128, n_epochs=4, batch_size=256, vf_coef=0.5, ent_coef=0.01, **falling)
    # The Zoo's 10,000,000 steps begin with 100,000 without learning, and its buffer is as large.
    sizes = {"buffer_size": min(100_000, steps), "learning_starts": steps // 100, "batch_size": 32, "train_freq": 4}
    exploration = {"exploration_fraction": 0.1, "exploration_final_eps": 0.01}
    return DQN("CnnPolicy", envs, learning_rate=1e-4, target_update_interval=1000, **sizes, **exploration)


def peer(name: str, steps: int) -> dict:
    """Steps per second and peak memory in MB of such an algorithm, behind its first 2,048 steps."""
    model, times = make_peer(name, 2048 + steps), []
    model.learn(2048 + steps, callback=lambda *_: not times.append((model.num_timesteps, time.perf_counter())))
    # PPO learns behind both of these.
    (first, start), (last, end) = next(entry for entry in times if entry[0] >= 2048), times[-1]
    speed = (last - first) / (end - start)
    return {"steps_per_second": speed, "shares": {}, "memory": getrusage(RUSAGE_SELF).ru_maxrss / 2**10}


# --- The race ---


def race_pqn(settings: dict, steps: int, minutes: float, folder: Path) -> None:
    import pqn_breakout

    stop = []
    timer = threading.Timer(60 * minutes, stop.append, [True])
    timer.start()
    args = pqn_breakout.Args(env_id=ENV_ID, **settings, total_timesteps=steps, log_dir=str(folder))
    run_dir = pqn_breakout.train(args, stop)
    timer.cancel()
    for path in (run_dir / "args.json", *run_dir.glob("events.*")):
        path.rename(folder / path.name)
    shutil.rmtree(run_dir)


def race_peer(name: str, steps: int, minutes: float, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def record(step_locals: dict, _) -> bool:
        for info in step_locals["infos"]:
            if "episode" in info:
                writer.add_scalar("charts/episodic_return", info["episode"]["r"], model.num_timesteps)
        return time.monotonic() - start < 60 * minutes

    model, start = make_peer(name, steps), time.monotonic()
    with SummaryWriter(folder) as writer:
        model.learn(steps, callback=record)
    (folder / "args.json").write_text(json.dumps({"env_id": ENV_ID}) + "\n")


# How each is timed, how it trains, and its settings.
CONTENDERS = {
    "pqn_td0": (trainer, race_pqn, {}),
    "pqn_recommended": (trainer, race_pqn, RECOMMENDED),
    "ppo": (peer, race_peer, "PPO"),
    "dqn": (peer, race_peer, "DQN"),
    "ppo_on_our_environments": (peer, race_peer, "PPO on our environments"),
}


def race(minutes: float, race_dir: Path, steps: int) -> None:
    """One after the other: each is timed for `steps` steps, then trains for as many as it makes in `minutes`."""
    for name, (timed, trained, settings) in CONTENDERS.items():
        folder = race_dir / name
        if (folder / "race.json").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        speed = in_process(timed, settings, steps)["steps_per_second"]
        total = int(60 * minutes * speed)
        print(f"{name}: {speed:,.0f} steps/s, {total:,} steps in {minutes:g} minutes", flush=True)
        in_process(trained, settings, total, minutes, folder)
        about = {"minutes": minutes, "steps": total, "cpu": cpu(), "cores": cpu_count()}
        about |= {package: version(package) for package in ("torch", "stable-baselines3")}
        (folder / "race.json").write_text(json.dumps(about, indent=1) + "\n")


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
    packages = ("torch", "ale-py", "stable-baselines3", "gymnasium", "numpy")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    figures = {"cpu": cpu(), "cores": cpu_count(), "capabilities": dict(torch.cpu.get_capabilities())}
    figures |= {"versions": versions, "steps": steps, "repeats": repeats}
    print(f"{cpu()}, {cpu_count()} cores; {', '.join(f'{name} {number}' for name, number in versions.items())}\n")

    if "environments" in options.parts:
        cases = {f"native, {n} games": (environments, "native", n, 4 * steps) for n in (32, 128)}
        cases["SB3's own pipeline, 32 games"] = environments, "sb3", 32, steps
        figures["environments"] = measure(cases, repeats)
        for name, values in figures["environments"].items():
            print(f"{name:34}{spread(values, 'steps/s')}")
        print()

    if "race" in options.parts:
        race(options.minutes, options.race_dir, steps)
    cases = {}
    for name, settings in SETTINGS.items() if "trainer" in options.parts else ():
        cases[name] = trainer, settings, steps
        cases |= {f"{name}, other": (trainer, settings, steps, options.other)} if options.other else {}
    if "peers" in options.parts:
        cases |= {f"SB3 {name}, RL Zoo settings": (peer, name, steps) for name in ("PPO", "DQN")}
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
