"""How fast is the trainer, and where does its time go? Prints a table and writes it as JSON.

    python tests/benchmark.py                      environments, trainer, peers: 15 minutes
    python tests/benchmark.py --parts trainer      some of: environments trainer peers race games
    python tests/benchmark.py --quick              one repeat of few steps, to see that it works
    python tests/benchmark.py --parts trainer --other ../old      this checkout and another one
    python tests/benchmark.py --parts race --minutes 60           PQN, PPO and DQN, an hour each
    python tests/benchmark.py --parts games --games Pong Qbert    trains on these, one by one

Every measurement runs in a process of its own, leaves out its warm-up, and is repeated in turn
with the others of its part; the table shows medians (and the range). Nothing else should run on
the machine meanwhile. A race leaves the events of each contender in its folder, and the games
leave a run each, for tests/plot_runs.py. Begun again, a race goes on with the contenders that
are missing, and the games go on from their last checkpoint.
"""

import contextlib
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

from joblib import cpu_count

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

ENV_ID = "BreakoutNoFrameskip-v4"
CLEANRL = {
    "num_envs": 8,
    "num_steps": 128,
    "num_minibatches": 4,
    "update_epochs": 4,
    "q_lambda": 0.65,
}
PAPER = {
    "num_envs": 128,
    "num_steps": 32,
    "num_minibatches": 32,
    "update_epochs": 2,
    "q_lambda": 0.65,
}
RECOMMENDED = {"q_lambda": 0.3, "update_epochs": 2}
RECOMMENDED_FOR_BREAKOUT = RECOMMENDED | {"gamma": 0.997}
SETTINGS = {
    "PQN, CleanRL's settings": CLEANRL,
    "PQN, the paper's settings": PAPER,
    "PQN, the defaults": {},
}
GAMES = (
    "Breakout",
    "Pong",
    "SpaceInvaders",
    "BeamRider",
    "MsPacman",
    "Qbert",
    "Seaquest",
    "Enduro",
    "ALE/Breakout-v5",  # an action is repeated at random, with probability 0.25
)
WARM_UP_STEPS = 10  # of every environment
PEER_WARM_UP = 2048  # steps; at the end of a rollout of PPO, as the last ones


@dataclass
class Options:
    """Measure the speed of PQN and of its parts, or what it learns."""

    parts: tuple[str, ...] = ("environments", "trainer", "peers")  # and race, games
    repeats: int = 3  # of every measurement
    steps: int = 4096  # environment steps of a whole trainer, behind its warm-up
    quick: bool = False  # few steps and one repeat, to see that everything works
    other: Path | None = None  # folder with another pqn_breakout.py to measure the trainer of
    minutes: float = 60.0  # that each contender of a race has for its training
    race_dir: Path = ROOT / "logs" / "reference" / "race"  # where the contenders' events go
    games: tuple[str, ...] = GAMES  # Pong stands for PongNoFrameskip-v4; others are whole ids
    total_timesteps: int = 2_000_000  # of the training on each of the games
    games_dir: Path = ROOT / "logs" / "games"  # where each of the games has a folder
    json: Path | None = None  # where the figures go, too; by default into the temporary folder


# --- What is measured, each in a process of its own ---


def environments(vec_env: str, num_envs: int, steps: int, num_threads: int = 0) -> float:
    """Environment steps per second of random play."""
    import numpy as np

    import pqn_breakout

    envs = pqn_breakout.make_env(ENV_ID, num_envs, 1, vec_env, num_threads=num_threads)
    rng = np.random.default_rng(1)
    measured_steps = steps // num_envs
    actions = rng.integers(envs.action_space.n, size=(WARM_UP_STEPS + measured_steps, num_envs))
    envs.reset()
    for warm_up_actions in actions[:WARM_UP_STEPS]:
        envs.step(warm_up_actions)
    start = time.perf_counter()
    for measured_actions in actions[WARM_UP_STEPS:]:
        envs.step(measured_actions)
    seconds = time.perf_counter() - start
    envs.close()
    return measured_steps * num_envs / seconds


def peak_memory() -> float:
    """Of this process, in MB."""
    return getrusage(RUSAGE_SELF).ru_maxrss / 2**10


def trainer(settings: dict, steps: int, folder: Path = ROOT) -> dict:
    """The trainer in `folder` behind its first rollout: speed, memory, shares of its parts."""
    sys.path.insert(0, str(folder))
    import pqn_breakout

    seconds = Counter()
    learn_starts = []  # when each rollout was played, and `seconds` until then

    def measure_calls(owner, name: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            if name == "learn":
                learn_starts.append((start, Counter(seconds)))
            result = function(*args, **kwargs)
            seconds[name] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)

    measure_calls(pqn_breakout, "learn")
    # Another version of the trainer need not have the other functions.
    if folder == ROOT:
        measure_calls(pqn_breakout, "play")
        measure_calls(pqn_breakout, "q_lambda_returns")
        measure_calls(pqn_breakout.AtariVecEnv, "step")
    with tempfile.TemporaryDirectory() as log_dir, contextlib.redirect_stdout(None):
        args = pqn_breakout.Args(**settings, log_dir=log_dir)
        rollout = args.num_envs * args.num_steps
        measured_rollouts = max(2, math.ceil(steps / rollout))
        total_timesteps = (1 + measured_rollouts) * rollout
        pqn_breakout.train(replace(args, total_timesteps=total_timesteps))

    start, before = learn_starts[0]
    end, after = learn_starts[-1]
    shares = {}
    if folder == ROOT:
        share = {name: (after[name] - before[name]) / (end - start) for name in after}
        shares["environments"] = share["step"]
        shares["acting"] = share["play"] - share["step"]
        shares["targets"] = share["q_lambda_returns"]
        shares["learning"] = share["learn"] - share["q_lambda_returns"]
        shares["everything else"] = 1 - sum(shares.values())
    steps_per_second = measured_rollouts * rollout / (end - start)
    return {"steps_per_second": steps_per_second, "memory": peak_memory(), "shares": shares}


def make_peer(name: str, steps: int):
    """Stable-Baselines3's DQN or PPO with RL Zoo's Atari settings, on SB3's own pipeline.

    With a name that ends with "on our environments" it plays on ours.
    """
    import ale_py
    from stable_baselines3 import DQN, PPO
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    import pqn_breakout

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    num_envs = 1 if name == "DQN" else 8
    if name.endswith("on our environments"):
        envs = pqn_breakout.make_env(ENV_ID, num_envs, 1)
    else:
        envs = VecFrameStack(make_atari_env(ENV_ID, num_envs, seed=1), 4)
    if name == "DQN":
        return DQN(
            "CnnPolicy",
            envs,
            learning_rate=1e-4,
            batch_size=32,
            train_freq=4,
            target_update_interval=1000,
            exploration_fraction=0.1,
            exploration_final_eps=0.01,
            buffer_size=min(100_000, steps),
            # The Zoo's 10,000,000 steps begin with 100,000 without learning.
            learning_starts=steps // 100,
        )
    return PPO(
        "CnnPolicy",
        envs,
        learning_rate=lambda remaining: 2.5e-4 * remaining,
        clip_range=lambda remaining: 0.1 * remaining,
        n_steps=128,
        n_epochs=4,
        batch_size=256,
        vf_coef=0.5,
        ent_coef=0.01,
    )


def peer(name: str, steps: int) -> dict:
    """Such an algorithm behind its warm-up, as `trainer`."""
    total = PEER_WARM_UP + steps
    model = make_peer(name, total)
    times = []

    def record_time(*_) -> bool:
        if model.num_timesteps >= PEER_WARM_UP:
            times.append((model.num_timesteps, time.perf_counter()))
        return True

    model.learn(total, callback=record_time)
    first_step, start = times[0]
    last_step, end = times[-1]
    steps_per_second = (last_step - first_step) / (end - start)
    return {"steps_per_second": steps_per_second, "memory": peak_memory(), "shares": {}}


# --- The race ---


def race_pqn(settings: dict, steps: int, minutes: float, folder: Path) -> None:
    import pqn_breakout

    # Training ends at a signal as the program does: it saves, and raises SystemExit.
    timer = threading.Timer(60 * minutes, os.kill, [os.getpid(), signal.SIGTERM])
    timer.start()
    args = pqn_breakout.Args(env_id=ENV_ID, **settings, total_timesteps=steps, log_dir=str(folder))
    with contextlib.suppress(SystemExit):
        pqn_breakout.train(args, pqn_breakout.exit_at_signals)
    timer.cancel()
    (run_dir,) = [path for path in folder.iterdir() if path.is_dir()]
    for path in (run_dir / "args.json", *run_dir.glob("events.*")):
        path.rename(folder / path.name)
    shutil.rmtree(run_dir)


def race_peer(name: str, steps: int, minutes: float, folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    def record_games(step_locals: dict, _) -> bool:
        for info in step_locals["infos"]:
            if "episode" in info:
                score = info["episode"]["r"]
                writer.add_scalar("charts/episodic_return", score, model.num_timesteps)
        return time.monotonic() - start < 60 * minutes

    model = make_peer(name, steps)
    start = time.monotonic()
    with SummaryWriter(folder) as writer:
        model.learn(steps, callback=record_games)
    (folder / "args.json").write_text(json.dumps({"env_id": ENV_ID}) + "\n")


# How each is timed, how it trains, and its settings.
CONTENDERS = {
    "pqn_td0": (trainer, race_pqn, {}),
    "pqn_recommended": (trainer, race_pqn, RECOMMENDED_FOR_BREAKOUT),
    "ppo": (peer, race_peer, "PPO"),
    "dqn": (peer, race_peer, "DQN"),
    "ppo_on_our_environments": (peer, race_peer, "PPO on our environments"),
}


def race(minutes: float, race_dir: Path, steps: int) -> None:
    """Each is timed for `steps` steps, then trains for as many as it makes in `minutes`."""
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


# --- The games ---


def steps_made(run_dir: Path) -> int:
    """By the last rollout among the events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir)).Reload()
    if "charts/SPS" not in events.Tags()["scalars"]:
        return 0
    return events.Scalars("charts/SPS")[-1].step


def train_game(game: str, total_timesteps: int, games_dir: Path, settings: dict) -> Path:
    """Trains on a game unless that was done, goes on with a run that was stopped; its folder."""
    import pqn_breakout

    folder = games_dir / game.replace("/", "-")
    args = pqn_breakout.Args(
        env_id=game if "-v" in game else f"{game}NoFrameskip-v4",
        total_timesteps=total_timesteps,
        log_dir=str(folder),
        **settings,
    )
    rollout = args.num_envs * args.num_steps
    for checkpoint in sorted(folder.glob("*/checkpoint.pth")):
        run_dir = checkpoint.parent
        steps = steps_made(run_dir)
        # The trainer makes whole rollouts only.
        if steps + rollout > total_timesteps:
            print(f"{game}: {steps:,} steps are done", flush=True)
            return run_dir
        args = replace(args, resume=str(run_dir))
    return pqn_breakout.train(args)


def result_of(run_dir: Path) -> dict:
    """Of a training on a game."""
    import plot_runs

    _, minutes, scores = plot_runs.score_curve(run_dir)
    return {"score": scores[-1], "steps": steps_made(run_dir), "minutes": minutes[-1]}


def games_table(results: dict[str, dict]) -> str:
    """In Markdown; a score is the mean of the last 100 training games."""
    rows = ["| game | score | steps | minutes |", "|---|---|---|---|"]
    for game, result in results.items():
        cells = f"{result['score']:,.1f} | {result['steps']:,} | {result['minutes']:.0f}"
        rows.append(f"| {game} | {cells} |")
    return "\n".join(rows)


# --- The table ---


def in_process(function, *args):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(cases: dict, repeats: int) -> dict[str, list]:
    """Results of `repeats` rounds of all cases: name to (function, *arguments)."""
    results = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            print(f"\r{name:79}", end="\r", file=sys.stderr, flush=True)
            results[name].append(in_process(*case))
    return results


def cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    return name[1] if name else platform.processor()


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Of the medians, and of each round."""
    middle = statistics.median(ours) / statistics.median(theirs)
    rounds = [our / their for our, their in zip(ours, theirs, strict=True)]
    return f"{middle:.2f}  ({min(rounds):.2f} to {max(rounds):.2f})"


def spread(figures: list[float], unit: str) -> str:
    middle = f"{statistics.median(figures):8,.0f} {unit}"
    if len(figures) == 1:
        return middle
    return f"{middle}  ({min(figures):,.0f} to {max(figures):,.0f})"


def measure_environments(steps: int, repeats: int) -> dict[str, list]:
    cases = {
        "native, 32 games": (environments, "native", 32, 4 * steps),
        "native, 128 games": (environments, "native", 128, 4 * steps),
        "SB3's own pipeline, 32 games": (environments, "sb3", 32, steps),
    }
    results = measure(cases, repeats)
    for name, speeds in results.items():
        print(f"{name:34}{spread(speeds, 'steps/s')}")
    print()
    return results


def measure_trainers(parts: tuple, steps: int, repeats: int, other: Path | None) -> dict:
    """PQN, that of another checkout, and its peers, as far as they are among `parts`."""
    cases = {}
    if "trainer" in parts:
        for name, settings in SETTINGS.items():
            cases[name] = trainer, settings, steps
            if other:
                cases[f"{name}, other"] = trainer, settings, steps, other
    if "peers" in parts:
        for name in ("PPO", "DQN"):
            cases[f"SB3 {name}, RL Zoo settings"] = peer, name, steps
    results = measure(cases, repeats)
    speeds = {}
    for name, rounds in results.items():
        speeds[name] = [result["steps_per_second"] for result in rounds]
        memory = max(result["memory"] for result in rounds)
        print(f"{name:34}{spread(speeds[name], 'steps/s')}, {memory:,.0f} MB")
        shares = []
        for part in rounds[0]["shares"]:
            share = statistics.median(result["shares"][part] for result in rounds)
            shares.append(f"{part} {share:.1%}")
        print(f"{'':4}{', '.join(shares)}")
    for ours in SETTINGS:
        for theirs in ("SB3 PPO, RL Zoo settings", f"{ours}, other"):
            if ours in results and theirs in results:
                print(f"{ours} / {theirs}: {ratio(speeds[ours], speeds[theirs])}")
    return results


def main() -> None:
    import torch
    import tyro

    options = tyro.cli(Options)
    steps = 2048 if options.quick else options.steps
    repeats = 1 if options.quick else options.repeats
    versions = {"python": platform.python_version()}
    for package in ("torch", "ale-py", "stable-baselines3", "gymnasium", "numpy"):
        versions[package] = version(package)
    figures = {
        "cpu": cpu(),
        "cores": cpu_count(),
        "capabilities": dict(torch.cpu.get_capabilities()),
        "versions": versions,
        "steps": steps,
        "repeats": repeats,
    }
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    print(f"{cpu()}, {cpu_count()} cores; {packages}\n")

    if "environments" in options.parts:
        figures["environments"] = measure_environments(steps, repeats)
    if "race" in options.parts:
        race(options.minutes, options.race_dir, steps)
    if "games" in options.parts:
        figures["games"] = {}
        for game in options.games:
            run_dir = train_game(game, options.total_timesteps, options.games_dir, RECOMMENDED)
            figures["games"][game] = result_of(run_dir)
        print(f"\n{games_table(figures['games'])}\n")
    figures["trainers"] = measure_trainers(options.parts, steps, repeats, options.other)

    path = options.json or Path(tempfile.gettempdir(), "pqn_benchmark.json")
    path.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
