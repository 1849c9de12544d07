"""Runs: their files, stopping and resuming them, what can go wrong on the way, what they show, what they refuse."""

import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MadeUpGames
from filelock import FileLock, Timeout
from stable_baselines3.common.vec_env import VecEnvWrapper
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

import pqn_breakout
from pqn_breakout import CHECKPOINT_KEYS, Args, QNetwork, UserError, linear_schedule, read_file, train, write_file

ROOT = Path(pqn_breakout.__file__).parent
BREAKOUT = gym.registry["BreakoutNoFrameskip-v4"]
CUT_BREAKOUT = "CutBreakout-v0"  # every game is truncated after 60 steps
gym.register(CUT_BREAKOUT, BREAKOUT.entry_point, kwargs={**BREAKOUT.kwargs, "max_num_frames_per_episode": 240})

ROLLOUT = 8
TINY = {"num_envs": 2, "num_steps": 4, "num_minibatches": 1, "update_epochs": 2, "total_timesteps": 5 * ROLLOUT}
TINY |= {"num_threads": 1, "bf16": "off", "device": "cpu", "checkpoint_minutes": 1e9}
OFTEN = {"checkpoint_minutes": 1e-9}  # after every rollout
ENVIRON = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")


def flags(**settings) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def checkpoint_of(run_dir) -> dict:
    return read_file(Path(run_dir, "checkpoint.pth"), CHECKPOINT_KEYS)


def events_of(run_dir) -> EventAccumulator:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def curve(run_dir, tag="losses/td_loss") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events_of(run_dir).Scalars(tag)]


def steps_of(run_dir) -> list[int]:
    return [step for step, _ in curve(run_dir)]


def same(a, b) -> bool:
    """Whether two contents of files are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def snapshot(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def no_signal_stays(monkeypatch):
    monkeypatch.setattr(pqn_breakout, "stop_signals", [])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Calls `main`; returns its exit code (for an error the line it ends with), stdout and stderr."""

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["pqn_breakout.py", *map(str, argv)])
        monkeypatch.setattr(pqn_breakout, "stop_signals", [])
        capsys.readouterr()
        code = 0
        try:
            pqn_breakout.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def on_step(monkeypatch):
    """`on_step(hook)`: from now on `hook(count, envs, rewards)` is called after each step of the games."""

    def install(hook):
        class Hooked(VecEnvWrapper):
            count = 0

            def reset(self):
                return self.venv.reset()

            def step_wait(self):
                observations, rewards, dones, infos = self.venv.step_wait()
                self.count += 1
                hook(self.count, self, rewards)
                return observations, rewards, dones, infos

        monkeypatch.setattr(pqn_breakout, "make_env", lambda *args, **kwargs: Hooked(make_env(*args, **kwargs)))

    make_env = pqn_breakout.make_env
    return install


class ScoredGames(MadeUpGames):
    """Games of one step each, which end with the scores they are given, one after the other."""

    def __init__(self, num_envs: int, scores):
        self.scores, self.rng = iter(scores), np.random.default_rng(0)
        super().__init__(num_envs, num_actions=4)

    def reset(self):
        return self.rng.integers(0, 256, (self.num_envs, 4, 84, 84), dtype=np.uint8)

    def step_async(self, actions):
        pass

    def step_wait(self):
        frames, ones = self.reset(), np.ones(self.num_envs, dtype=np.float32)
        infos = [{"episode": {"r": float(next(self.scores)), "l": 1, "t": 0.0}} for _ in ones]
        return frames, ones, ones.astype(bool), infos


@pytest.fixture
def scores(monkeypatch):
    """`scores(iterable)`: the games that are trained on from now on end with these scores."""

    def install(given):
        monkeypatch.setattr(pqn_breakout, "make_env", lambda _, num_envs, *rest, **more: ScoredGames(num_envs, given))

    return install


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """A run that has reached its end; not to be changed."""
    return train(Args(**TINY, log_dir=str(tmp_path_factory.mktemp("finished"))))


# --- Files ------------------------------------------------------------------------------------------------------------

CONTENT = {"network": {"w": torch.arange(6.0), "b": torch.ones(3, dtype=torch.int64)}, "best": -math.inf, "recent": [2]}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program handles it."""


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("instant", ["before", "after"])
def test_a_process_killed_while_writing_leaves_a_whole_file(monkeypatch, tmp_path, function, instant):
    path = tmp_path / "checkpoint.pth"
    write_file(path, {"number": 1})
    original = getattr(os, function)

    def killed(*args):
        if instant == "after":
            original(*args)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, function, killed)
        write_file(path, {"number": 2})
    assert read_file(path, {"number"})["number"] == (2 if (function, instant) == ("replace", "after") else 1)
    write_file(path, {"number": 3})
    assert read_file(path, {"number"})["number"] == 3


def test_a_file_takes_its_name_only_once_all_of_it_is_on_disk(monkeypatch, tmp_path):
    on_disk = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), on_disk.append(os.fstat(fd).st_size)))
    monkeypatch.setattr(os, "replace", lambda a, b: (on_disk.append(os.stat(a).st_size), replace(a, b)))
    write_file(tmp_path / "file.pth", CONTENT)
    assert on_disk == 2 * [(tmp_path / "file.pth").stat().st_size]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_remains(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    write_file(tmp_path / "file.pth", CONTENT)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "file.pth", {"number": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]
    assert same(read_file(tmp_path / "file.pth", {"best"}), {"version": 1, **CONTENT})


def is_refused_in_one_line(path, keys, name) -> bool:
    try:
        read_file(path, keys)
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)
        return True
    return False


def flipped(path: Path, number: int, seed: int, only=lambda size: (0, size)):
    """Flips one bit of a file at a time, `number` times over."""
    choose, size = random.Random(seed), path.stat().st_size
    with open(path, "r+b") as file:
        for _ in range(number):
            at, bit = choose.randrange(*only(size)), 1 << choose.randrange(8)
            file.seek(at)
            (byte,) = file.read(1)
            for value in (byte ^ bit, byte):
                file.seek(at)
                file.write(bytes([value]))
                file.flush()
                if value != byte:
                    yield at


def test_a_flipped_bit_is_never_taken_for_content(tmp_path):
    path = tmp_path / "model.pth"
    write_file(path, CONTENT)
    undamaged = read_file(path, {"best"})
    refused = 0
    for at in flipped(path, 600, seed=1):
        if is_refused_in_one_line(path, {"best"}, "model.pth"):
            refused += 1
        else:
            assert same(read_file(path, {"best"}), undamaged), f"byte {at}"
    assert refused > 200
    assert same(read_file(path, {"best"}), undamaged)


def test_a_flipped_bit_in_a_checkpoint_is_refused(tmp_path, finished_run):
    path = tmp_path / "checkpoint.pth"
    path.write_bytes((finished_run / "checkpoint.pth").read_bytes())
    for at in flipped(path, 25, seed=2, only=lambda size: (size // 10, size - size // 10)):  # in the weights
        assert is_refused_in_one_line(path, CHECKPOINT_KEYS, "checkpoint.pth"), f"byte {at}"


def test_a_cut_off_file_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    write_file(path, CONTENT)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert is_refused_in_one_line(path, {"best"}, "model.pth"), length


def torch_bytes(content, **options) -> bytes:
    data = io.BytesIO()
    torch.save(content, data, **options)
    return data.getvalue()


FOREIGN = {
    "empty": b"",
    "text": b"import os\n",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "zeros": bytes(5000),
    "pickle": pickle.dumps({"version": 1, "best": 1}),
    "tensor": torch_bytes(torch.zeros(3)),
    "list": torch_bytes([1, 2]),
    "other dict": torch_bytes({"state_dict": {}}),
    "old torch": torch_bytes({"version": 1, "best": 1}, _use_new_zipfile_serialization=False)[:-9],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused(tmp_path, kind):
    path = tmp_path / "best_model.pth"
    path.write_bytes(FOREIGN[kind])
    assert is_refused_in_one_line(path, {"best"}, "best_model.pth")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert is_refused_in_one_line(tmp_path / "nothing.pth", {"best"}, "nothing.pth")
    assert is_refused_in_one_line(tmp_path, {"best"}, tmp_path.name)


@pytest.mark.parametrize("content", [{"best": 1}, {"best": 1, "version": None}, {"best": 1, "version": "one"}])
def test_a_file_whose_version_makes_no_sense_is_refused(tmp_path, content):
    write_file(tmp_path / "model.pth", content)
    if "version" not in content:  # as from another program
        (tmp_path / "model.pth").write_bytes(torch_bytes(content))
    assert is_refused_in_one_line(tmp_path / "model.pth", {"best"}, "model.pth")


def test_a_file_of_a_newer_version_is_refused_as_such(tmp_path):
    write_file(tmp_path / "model.pth", {**CONTENT, "version": pqn_breakout.VERSION + 1})
    with pytest.raises(UserError, match="newer version"):
        read_file(tmp_path / "model.pth", {"best"})


class Trap:
    """Once unpickled, leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_file_can_run_code(tmp_path):
    sprung, path = tmp_path / "sprung", tmp_path / "model.pth"
    content = {"version": 1, "best": 1, "network": Trap(sprung)}
    for data in (
        pickle.dumps(content),
        torch_bytes(content),
        torch_bytes(content, _use_new_zipfile_serialization=False),
    ):
        path.write_bytes(data)
        assert is_refused_in_one_line(path, {"best"}, "model.pth")
    write_file(path, content)  # whole in every other respect
    assert is_refused_in_one_line(path, {"best"}, "model.pth")
    assert not sprung.exists()
    with contextlib.suppress(TypeError):
        pickle.loads(pickle.dumps(Trap(sprung)))  # the trap is one
    assert sprung.exists()


def test_a_model_is_not_taken_for_a_checkpoint(finished_run):
    with pytest.raises(UserError, match="optimizer"):
        read_file(finished_run / "best_model.pth", CHECKPOINT_KEYS)


def test_two_runs_of_the_same_second_have_two_folders(monkeypatch, tmp_path):
    clock = itertools.chain([1000.1, 1000.2, 1000.3], itertools.repeat(1001.0))
    monkeypatch.setattr(pqn_breakout, "time", SimpleNamespace(time=lambda: next(clock), sleep=lambda _: None))
    first, second = (pqn_breakout.make_run_dir(Args(log_dir=str(tmp_path)), {"run": run}) for run in "ab")
    assert [path.name.rpartition("__")[2] for path in (first, second)] == ["1000", "1001"]
    assert [read_file(path / "checkpoint.pth", {"run"})["run"] for path in (first, second)] == ["a", "b"]
    assert sorted(tmp_path.iterdir()) == [first, second]


# --- What a run leaves and shows --------------------------------------------------------------------------------------


def test_a_run_leaves_curves_model_checkpoint_and_arguments(finished_run):
    names = {path.name for path in finished_run.iterdir() if not path.name.startswith((".", "events."))}
    assert names == {"best_model.pth", "checkpoint.pth", "args.json"}
    assert json.loads((finished_run / "args.json").read_text()) == checkpoint_of(finished_run)["args"]
    assert Args(**json.loads((finished_run / "args.json").read_text())).num_envs == TINY["num_envs"]
    assert re.fullmatch(r"BreakoutNoFrameskip-v4__pqn_breakout__1__\d+", finished_run.name)


def test_tensorboard_has_curves_hyperparameters_and_hparams(tmp_path):
    run_dir = train(Args(**{**TINY, "env_id": CUT_BREAKOUT, "total_timesteps": 160}, log_dir=str(tmp_path)))
    events = events_of(run_dir)
    charts = ["episodic_return", "episodic_length", "SPS", "epsilon", "learning_rate", "sparse_reward_ratio"]
    tags = {f"charts/{name}" for name in charts} | {"losses/td_loss", "losses/current_q", "losses/target_q"}
    assert tags <= set(events.Tags()["scalars"])
    assert steps_of(run_dir) == list(range(8, 161, 8))
    assert [event.value for event in events.Scalars("charts/episodic_length")] == [60, 60]
    assert {event.step for event in events.Scalars("charts/episodic_return")} == {120}
    (text,) = events.Tensors("hyperparameters/text_summary")
    assert b"|num_envs|2|" in text.tensor_proto.string_val[0]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.PluginTagToContent("hparams"))


def test_a_run_says_where_it_is_and_what_to_do_next(cli, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*flags(**TINY))
    (run_dir,) = Path("logs").iterdir()
    start, end, play, curves = out.splitlines()
    assert code == 0 and err == ""
    assert start == f"PQN, TD(0), on 2 games of BreakoutNoFrameskip-v4 (native) and cpu in float32: {run_dir}"
    assert end.startswith("step 40 after 0.0 minutes")
    assert play.endswith(f"python evaluate.py --model {run_dir}/best_model.pth")
    assert curves.endswith("tensorboard --logdir logs")


@pytest.fixture
def minutes_a_step(monkeypatch, on_step):
    """`minutes_a_step(x)`: by the program's clock each step of the games takes so long."""

    def install(minutes):
        clock = SimpleNamespace(monotonic=lambda: clock.now, time=time.time, sleep=time.sleep, now=0.0)

        def tick(count, envs, rewards):
            clock.now += 60 * minutes

        monkeypatch.setattr(pqn_breakout, "time", clock)
        on_step(tick)

    return install


def test_where_there_is_no_terminal_a_line_tells_the_progress_every_30_seconds(minutes_a_step, cli, tmp_path):
    minutes_a_step(3 / 60)  # 12 seconds a rollout
    code, out, err = cli(*flags(**TINY | {"total_timesteps": 80, "log_dir": tmp_path}))
    told = [line for line in out.splitlines() if re.match(r"step \d+: score nan, epsilon 0.010, 1 steps/s", line)]
    assert [line.split(":")[0] for line in told] == ["step 24", "step 48", "step 72"]
    assert err == ""


def test_checkpoints_are_written_every_checkpoint_minutes(minutes_a_step, monkeypatch, tmp_path):
    written = []
    minutes_a_step(0.25)  # a minute a rollout
    write = pqn_breakout.write_file
    monkeypatch.setattr(
        pqn_breakout, "write_file", lambda path, content: (written.append((path.name, content)), write(path, content))
    )
    train(Args(**TINY | {"total_timesteps": 80, "checkpoint_minutes": 2.5}, log_dir=str(tmp_path)))
    steps = [content["global_step"] for name, content in written if name == "checkpoint.pth"]
    assert steps == [0, 24, 48, 72, 80]  # at the start, every 3 minutes, at the end


def test_the_best_model_is_that_of_the_best_mean_of_100_games(scores, tmp_path):
    # 8 games a rollout: the mean of the last 100 rises until step 200, then falls.
    scores([*range(200), *itertools.repeat(0, 400)])
    run_dir = train(Args(**TINY | {"total_timesteps": 400}, log_dir=str(tmp_path)))
    model, checkpoint = read_file(run_dir / "best_model.pth", {"network"}), checkpoint_of(run_dir)
    assert model["global_step"] == 200
    assert model["mean_return"] == checkpoint["best"] == np.mean(range(100, 200))
    assert checkpoint["global_step"] == 400 and checkpoint["recent"] == [0.0] * 100
    assert not same(model["network"], checkpoint["network"])


def test_before_100_games_the_model_is_the_last_one(finished_run):
    model = read_file(finished_run / "best_model.pth", {"network"})
    assert model["global_step"] == TINY["total_timesteps"]
    assert same(model["network"], checkpoint_of(finished_run)["network"])


@pytest.mark.parametrize("name", ["best_model.pth", "checkpoint.pth"])
def test_a_network_from_a_file_has_the_q_values_it_had_in_training(monkeypatch, tmp_path, name):
    networks = []
    monkeypatch.setattr(pqn_breakout, "QNetwork", lambda *args: networks.append(QNetwork(*args)) or networks[-1])
    run_dir = train(Args(**TINY, log_dir=str(tmp_path)))
    frames = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    loaded = QNetwork(4)
    loaded.load_state_dict(read_file(run_dir / name, {"network"})["network"])
    assert torch.equal(loaded(frames), networks[0](frames))


def test_the_same_seed_gives_the_same_run_bit_for_bit(on_step, tmp_path):
    lost_lives = []

    def watch(count, envs, rewards):
        lost_lives.append(sum(envs.venv.new_life))

    on_step(watch)
    settings = TINY | {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 320}
    settings |= {"env_id": CUT_BREAKOUT, "learning_rate": 1e-3, "start_e": 0.5}
    settings |= {"update_epochs": 1}
    one, two, other = (
        train(Args(**settings, seed=seed, log_dir=str(tmp_path / str(i)))) for i, seed in enumerate((5, 5, 6))
    )
    games = len(curve(one, "charts/episodic_return"))
    assert games == 4 and sum(lost_lives) > 3 * (games + 1)  # both kinds of ends were there
    a, b, c = (checkpoint_of(run_dir) for run_dir in (one, two, other))
    assert all(same(a[key], b[key]) for key in ("network", "optimizer", "rng", "recent"))
    assert curve(one) == curve(two)
    assert not same(a["network"], c["network"])


def test_with_two_threads_too(tmp_path):
    one, two = (checkpoint_of(train(Args(**TINY | {"num_threads": 2}, log_dir=str(tmp_path)))) for _ in range(2))
    assert same(one["network"], two["network"])


# --- Resuming ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(on_step, cli, tmp_path):
    settings = TINY | {"env_id": CUT_BREAKOUT, "learning_rate": 1e-3, "exploration_fraction": 1.0, "seed": 3}
    settings |= {"total_timesteps": 320, "log_dir": tmp_path}
    on_step(lambda count, envs, rewards: count == 71 and os.kill(os.getpid(), signal.SIGINT))
    code, out, _ = cli(*flags(**settings))
    (run_dir,) = tmp_path.iterdir()
    stopped = checkpoint_of(run_dir)
    assert code == 130 and stopped["global_step"] == 144 and len(stopped["recent"]) == 2
    on_step(lambda count, envs, rewards: None)
    code, out, _ = cli("--resume", run_dir)
    assert code == 0
    assert "resumed at step 144" in out and f": {run_dir}\n" in out and "\nstep 320 after" in out
    assert list(tmp_path.iterdir()) == [run_dir]

    # One curve, and the schedules go down all the way.
    steps = list(range(8, 321, 8))
    assert steps_of(run_dir) == steps
    lrs = [linear_schedule(1e-3, 0, 320, step - 8) for step in steps]
    assert curve(run_dir, "charts/learning_rate") == list(zip(steps, map(pytest.approx, lrs), strict=True))
    epsilons = [linear_schedule(1.0, 0.01, 320, step) for step in steps]
    assert curve(run_dir, "charts/epsilon") == list(zip(steps, map(pytest.approx, epsilons), strict=True))

    # The same arguments, and all counts include what was before.
    finished = checkpoint_of(run_dir)
    assert finished["args"] == stopped["args"] | {"resume": str(run_dir)}
    assert finished["global_step"] == 320 and len(finished["recent"]) == 4
    assert finished["recent"][:2] == stopped["recent"]
    updates = 320 // 8 * settings["update_epochs"] * settings["num_minibatches"]
    assert finished["optimizer"]["param_groups"][0]["steps"] == updates
    assert {int(state["step"]) for state in finished["optimizer"]["state"].values()} == {updates}


def test_the_games_of_a_resumed_run_are_scattered_before_anything_is_learned_or_counted(on_step, cli, tmp_path):
    code, *_ = cli(*flags(**TINY | {"env_id": CUT_BREAKOUT, "log_dir": tmp_path}))
    (run_dir,) = tmp_path.iterdir()
    stopped, steps = checkpoint_of(run_dir), []
    on_step(lambda count, envs, rewards: steps.append(count))
    code, out, _ = cli("--resume", run_dir, "--total-timesteps", 48)
    assert code == 0 and steps == list(range(1, 64 + 4 + 1))  # 16 rollouts of 4 steps, and one that is learned from
    finished = checkpoint_of(run_dir)
    assert finished["global_step"] == 48 and finished["recent"] == stopped["recent"]  # games end after 60 steps
    assert steps_of(run_dir) == [8, 16, 24, 32, 40, 48]
    updates = 48 // 8 * TINY["update_epochs"]
    assert finished["optimizer"]["param_groups"][0]["steps"] == updates


def test_a_resumed_run_takes_up_network_optimizer_and_random_generator(finished_run, tmp_path, monkeypatch):
    """Of the three nothing is left to chance: the first thing that is saved again is what was loaded."""
    before, saved = checkpoint_of(finished_run), []
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "checkpoint.pth").write_bytes((finished_run / "checkpoint.pth").read_bytes())
    monkeypatch.setattr(pqn_breakout, "write_file", lambda path, content: saved.append(content))
    train(Args(**before["args"] | {"resume": str(copy)}))
    assert all(same(before[key], dict(saved[0])[key]) for key in CHECKPOINT_KEYS - {"args", "network"})
    assert same(before["network"], saved[0]["network"])


def copy_of(run_dir: Path, folder: Path) -> Path:
    copy = folder / run_dir.name
    copy.mkdir(parents=True)
    for path in run_dir.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_finished_run_that_is_resumed_only_says_so(finished_run, cli, tmp_path):
    run_dir = copy_of(finished_run, tmp_path)
    before, steps = checkpoint_of(run_dir), steps_of(run_dir)
    code, out, err = cli("--resume", run_dir)
    assert code == 0 and "step 40" in out and err == ""
    assert same(before["network"], checkpoint_of(run_dir)["network"])
    assert steps_of(run_dir) == steps


def test_a_finished_run_goes_on_to_a_higher_total(finished_run, cli, tmp_path):
    run_dir = copy_of(finished_run, tmp_path)
    code, *_ = cli("--resume", run_dir, "--total-timesteps", 64)
    assert code == 0 and checkpoint_of(run_dir)["global_step"] == 64
    assert steps_of(run_dir) == list(range(8, 65, 8))


def test_what_does_not_change_learning_may_be_given_anew(finished_run, cli, tmp_path):
    run_dir = copy_of(finished_run, tmp_path)
    anew = {"total_timesteps": 48, "device": "auto", "num_threads": 2, "bf16": "on", "checkpoint_minutes": 7.0}
    code, out, _ = cli("--resume", run_dir, *flags(**anew))
    assert code == 0 and "in bfloat16" in out
    assert anew.items() <= checkpoint_of(run_dir)["args"].items()


CHANGES = {"env_id": "PongNoFrameskip-v4", "seed": 2, "learning_rate": 0.1, "num_envs": 4, "num_steps": 8}
CHANGES |= {"num_minibatches": 2, "update_epochs": 1, "gamma": 0.5, "q_lambda": 0.5, "start_e": 0.5, "end_e": 0.5}
CHANGES |= {"exploration_fraction": 0.5, "max_grad_norm": 1.0, "weight_decay": 0.1, "vec_env": "dummy"}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_learning_is_refused(finished_run, cli, name):
    before = snapshot(finished_run)
    code, out, err = cli("--resume", finished_run, *flags(**{name: CHANGES[name]}))
    assert f"--{name.replace('_', '-')} {CHANGES[name]}: " in code and "\n" not in code
    assert out == err == ""
    assert snapshot(finished_run) == before


def test_annealing_is_not_switched_off_on_the_way(finished_run, cli):
    code, *_ = cli("--resume", finished_run, "--no-anneal-lr")
    assert "anneal-lr" in code


def test_every_argument_is_either_taken_or_refused():
    refused = {field.name for field in dataclasses.fields(Args)} - pqn_breakout.RESUMABLE
    assert refused - {"log_dir"} == {*CHANGES, "anneal_lr"}


def test_a_run_of_a_version_with_other_options_is_refused_and_one_with_fewer_is_taken(finished_run, cli, tmp_path):
    for name, change in (("more", {"momentum": 0.9}), ("fewer", {})):
        copy, content = copy_of(finished_run, tmp_path / name), checkpoint_of(finished_run)
        content["args"] |= change
        if not change:
            del content["args"]["compile"], content["args"]["profile"]
        write_file(copy / "checkpoint.pth", content)
        before = snapshot(copy)
        code, out, err = cli("--resume", copy)
        if change:
            assert re.fullmatch(r"pqn_breakout\.py: error: --resume .+ version .+ momentum", code) and out == err == ""
            assert snapshot(copy) == before
        else:
            assert code == 0


def test_a_folder_in_use_is_not_resumed_into(finished_run, cli):
    lock = FileLock(finished_run / ".lock")
    with lock:
        before = snapshot(finished_run)
        code, out, err = cli("--resume", finished_run)
        assert "a live run is using this folder" in code and "\n" not in code
        assert snapshot(finished_run) == before


def test_a_run_holds_its_folder_while_it_lasts(on_step, tmp_path):
    def held(count, envs, rewards):
        (run_dir,) = tmp_path.iterdir()
        with pytest.raises(Timeout):
            FileLock(run_dir / ".lock").acquire(blocking=False)

    on_step(held)
    run_dir = train(Args(**TINY, log_dir=str(tmp_path)))
    FileLock(run_dir / ".lock").acquire(blocking=False).lock.release()


@pytest.mark.parametrize("wanted", ["nowhere", "", "text"])
def test_what_is_no_run_is_not_resumed(cli, tmp_path, monkeypatch, wanted):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    Path("text/checkpoint.pth").write_text("hello")
    code, out, err = cli("--resume", wanted, *flags(**TINY))
    assert str(code).startswith("pqn_breakout.py: error: ") and "\n" not in code
    assert wanted or "--resume" in code
    assert out == err == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["text", "checkpoint.pth"]


def test_a_run_with_a_damaged_best_model_is_not_resumed_over_it(finished_run, cli, tmp_path):
    run_dir = copy_of(finished_run, tmp_path)
    (run_dir / "best_model.pth").write_bytes(b"damaged")
    code, *_ = cli("--resume", run_dir, "--total-timesteps", 48)
    assert "best_model.pth" in code and "\n" not in code
    assert (run_dir / "best_model.pth").read_bytes() == b"damaged"


def test_a_best_model_younger_than_the_checkpoint_is_kept(scores, cli, tmp_path):
    scores(itertools.repeat(7))
    run_dir = train(Args(**TINY | {"total_timesteps": 160}, log_dir=str(tmp_path)))
    best = (run_dir / "best_model.pth").read_bytes()
    write_file(run_dir / "checkpoint.pth", checkpoint_of(run_dir) | {"best": -math.inf, "recent": [], "global_step": 8})
    scores(itertools.repeat(6))
    assert cli("--resume", run_dir)[0] == 0
    assert (run_dir / "best_model.pth").read_bytes() == best
    assert checkpoint_of(run_dir)["best"] == 7


def test_a_lucky_first_game_does_not_keep_the_best_model_from_being_written(scores, cli, tmp_path):
    scores(itertools.repeat(300))
    run_dir = train(Args(**TINY, log_dir=str(tmp_path)))  # 40 games, too few for a best
    scores(itertools.repeat(6))
    assert cli("--resume", run_dir, "--total-timesteps", 240)[0] == 0
    model = read_file(run_dir / "best_model.pth", {"mean_return"})
    assert model["global_step"] == 104 and model["mean_return"] == pytest.approx(0.36 * 300 + 0.64 * 6)


def test_the_curve_on_disk_is_never_behind_the_checkpoint(on_step, monkeypatch, tmp_path):
    seen, write = [], RecordWriter.write
    monkeypatch.setattr(RecordWriter, "write", lambda *args: (time.sleep(0.05), write(*args)))  # a slow disk

    def look(count, envs, rewards):
        if count % 4 == 1 and count > 1:
            (run_dir,) = tmp_path.iterdir()
            seen.append((checkpoint_of(run_dir)["global_step"], *steps_of(run_dir)[-1:]))

    on_step(look)
    train(Args(**TINY | OFTEN, log_dir=str(tmp_path)))
    assert seen == [(step, step) for step in (8, 16, 24, 32)]


def test_what_came_after_the_checkpoint_is_not_twice_in_the_curve(on_step, cli, tmp_path):
    older = []

    def keep(count, envs, rewards):
        if count == 9:
            older.append(checkpoint_of(next(tmp_path.iterdir())))

    on_step(keep)
    run_dir = train(Args(**TINY | OFTEN, log_dir=str(tmp_path)))
    write_file(run_dir / "checkpoint.pth", older[0])  # as if the rest had been killed before its checkpoint
    assert cli("--resume", run_dir)[0] == 0
    assert steps_of(run_dir) == [8, 16, 24, 32, 40]


KILLED_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from pathlib import Path
import pqn_breakout

def state():
    run_dir = next(Path(log_dir).glob("[!.]*"), None)
    return run_dir and (run_dir, (run_dir / "checkpoint.pth").stat().st_mtime_ns)

log_dir, kills, *first = sys.argv[1:]
choose, last = random.Random(7), 0
for i in range(int(kills)):
    before = state()
    pid = os.fork()
    if pid == 0:
        sys.argv[1:] = ["--resume", str(before[0])] if before else first
        pqn_breakout.main()
        os._exit(1)
    # Every other one gets as far as its next checkpoint.
    while i % 2 == 0 and state() == before:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.001)
    time.sleep(choose.uniform(0, 0.3))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    step = pqn_breakout.read_file(state()[0] / "checkpoint.pth", pqn_breakout.CHECKPOINT_KEYS)["global_step"]
    assert step >= last + (8 if i % 2 == 0 and i > 0 else 0)
    last = step
"""


@LINUX
def test_a_run_killed_again_and_again_ends_with_one_whole_curve(cli, tmp_path):
    settings = TINY | OFTEN | {"total_timesteps": 10**6, "log_dir": tmp_path}
    command = [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, tmp_path, "14", *flags(**settings)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRON)
    assert (result.returncode, result.stderr) == (0, "")
    run_dir, *others = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    reached = checkpoint_of(run_dir)["global_step"]
    assert reached >= 8 * 6 and not others
    assert cli("--resume", run_dir, "--total-timesteps", reached + 16)[0] == 0
    assert steps_of(run_dir) == list(range(8, reached + 17, 8))
    updates = (reached + 16) // 8 * TINY["update_epochs"]
    assert checkpoint_of(run_dir)["optimizer"]["param_groups"][0]["steps"] == updates


# --- Signals and processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_rollout_with_a_checkpoint(on_step, cli, tmp_path, number, code):
    on_step(lambda count, envs, rewards: count == 6 and os.kill(os.getpid(), number))
    settings = TINY | {"total_timesteps": 10**6, "log_dir": tmp_path}
    ended, out, err = cli(*flags(**settings))
    (run_dir,) = tmp_path.iterdir()
    assert ended == code and err == ""
    assert out.splitlines()[-1] == f"stopped; to go on: python pqn_breakout.py --resume {run_dir}"
    assert checkpoint_of(run_dir)["global_step"] == 16
    assert (run_dir / "best_model.pth").exists()


SECOND_CTRL_C = """
import os, signal
import pqn_breakout

step, fsync, steps = pqn_breakout.EpisodicLife.step_wait, os.fsync, []

def step_wait(self):
    steps.append(1)
    if len(steps) == 10:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self)

def second(fd):  # in the middle of the last checkpoint
    if pqn_breakout.stop_signals:
        os.kill(os.getpid(), signal.SIGINT)
    fsync(fd)

pqn_breakout.EpisodicLife.step_wait, os.fsync = step_wait, second
pqn_breakout.main()
"""


def test_a_second_ctrl_c_ends_at_once_and_leaves_the_last_checkpoint_whole(tmp_path):
    command = [sys.executable, "-c", SECOND_CTRL_C, *flags(**TINY | OFTEN | {"log_dir": tmp_path})]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRON)
    assert result.returncode == -signal.SIGINT, result.stderr
    (run_dir,) = tmp_path.iterdir()
    assert checkpoint_of(run_dir)["global_step"] == 16
    assert "stopped" not in result.stdout


def processes_of(session: int) -> dict[int, int]:
    """The live processes of a session: pid to parent's pid."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found[int(stat.parent.name)] = int(parent)
    return found


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@contextlib.contextmanager
def real_run(tmp_path, *argv):
    """A training process in a session of its own."""
    settings = TINY | OFTEN | {"total_timesteps": 10**9, "log_dir": tmp_path}
    command = [sys.executable, ROOT / "pqn_breakout.py", *flags(**settings), *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=ENVIRON, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def has_trained(process, tmp_path) -> bool:
    assert process.poll() is None, process.communicate()
    return any(checkpoint_of(run_dir)["global_step"] for run_dir in tmp_path.glob("[!.]*"))


def workers_of(process) -> list[int]:
    """They are the trainer's grandchildren: its child starts them."""
    return [pid for pid, parent in processes_of(process.pid).items() if process.pid not in (pid, parent)]


@LINUX
def test_a_killed_worker_ends_the_run_with_a_checkpoint_and_a_line(tmp_path):
    with real_run(tmp_path, "--vec-env", "subproc", "--checkpoint-minutes", "0.01") as process:
        wait_for(lambda: has_trained(process, tmp_path))
        (run_dir,) = tmp_path.glob("[!.]*")
        workers = workers_of(process)
        assert len(workers) == 2
        before = checkpoint_of(run_dir)["global_step"]
        os.kill(workers[0], signal.SIGKILL)
        out, err = process.communicate(timeout=30)
        line = f"pqn_breakout.py: error: environment process {workers[0]} died; go on with --resume {run_dir}\n"
        assert (process.returncode, err) == (1, line)
        assert checkpoint_of(run_dir)["global_step"] > before
        wait_for(lambda: not processes_of(process.pid), 10)


@LINUX
def test_ctrl_c_to_the_whole_process_group_stops_trainer_and_workers(tmp_path):
    with real_run(tmp_path, "--vec-env", "subproc") as process:
        wait_for(lambda: has_trained(process, tmp_path))
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (130, "")
        assert "--resume" in out.splitlines()[-1]
        wait_for(lambda: not processes_of(process.pid), 10)


@LINUX
def test_no_worker_outlives_a_killed_trainer(tmp_path):
    with real_run(tmp_path, "--vec-env", "subproc") as process:
        wait_for(lambda: has_trained(process, tmp_path))
        assert len(workers_of(process)) == 2
        process.kill()
        wait_for(lambda: not processes_of(process.pid), 20)


@LINUX
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_process_group_while_workers_start_ends_without_a_traceback(tmp_path, number, code):
    with real_run(tmp_path, "--vec-env", "subproc") as process:
        wait_for(lambda: len(processes_of(process.pid)) > 2)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=30)
        assert process.returncode == code
        assert "pqn_breakout.py" not in err  # no traceback of ours
        wait_for(lambda: not processes_of(process.pid), 10)


# --- What goes wrong on the way ---------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_stops_training_and_keeps_the_last_checkpoint(on_step, cli, tmp_path):
    def explode(count, envs, rewards):
        if count == 14:
            rewards[0] = np.inf

    good = train(Args(**TINY | {"total_timesteps": 24}, anneal_lr=False, log_dir=str(tmp_path / "good")))
    on_step(explode)
    code, out, err = cli(*flags(**TINY | OFTEN | {"log_dir": tmp_path / "bad"}), "--no-anneal-lr")
    (run_dir,) = (tmp_path / "bad").iterdir()
    assert "step 24: a gradient is not finite" in code and f"--resume {run_dir}" in code and "\n" not in code
    assert same(checkpoint_of(run_dir)["network"], checkpoint_of(good)["network"])
    assert checkpoint_of(run_dir)["global_step"] == 24
    on_step(lambda *_: None)
    assert cli("--resume", run_dir)[0] == 0
    assert steps_of(run_dir) == [8, 16, 24, 32, 40]


def test_a_game_of_the_best_model_is_recorded_and_shown_in_tensorboard(tmp_path):
    torch.manual_seed(0)
    args = Args(log_dir=str(tmp_path))
    run = pqn_breakout.RunDir(pqn_breakout.make_run_dir(args, {}))
    run.open_events(args, resumed_at=None)
    about = {"env_id": args.env_id, "num_actions": 4, "global_step": 0, "mean_return": 0.0}
    run.save("best_model.pth", about | {"network": QNetwork(4).state_dict()})
    run.capture_video(1000, epsilon=1.0)
    assert run.recorder.wait(timeout=120) == 0
    run.capture_video(2000, epsilon=1.0)  # too early for another one, time to show the first
    run.close()
    assert [path.name for path in (run.path / "videos").iterdir()] == ["1000.gif"]
    (shown,) = events_of(run.path).Images("best_model")
    gif = (run.path / "videos" / "1000.gif").read_bytes()
    assert shown.step == 1000 and shown.encoded_image_string == gif and gif.startswith(b"GIF89a")


def test_a_video_that_cannot_be_recorded_is_told_and_training_goes_on(capsys, tmp_path):
    args = Args(log_dir=str(tmp_path))
    run = pqn_breakout.RunDir(pqn_breakout.make_run_dir(args, {}))
    run.open_events(args, resumed_at=None)
    (run.path / "videos").write_text("in the way")
    run.capture_video(1000, epsilon=1.0)
    run.close()
    (told,) = capsys.readouterr().out.splitlines()
    assert "1000.gif: not recorded" in told and "training goes on" in told


def test_a_failing_tensorboard_writer_is_told_once_and_training_goes_on(monkeypatch, capsys, tmp_path):
    def fail(*args, **kwargs):
        raise OSError("the writer is gone")

    monkeypatch.setattr(pqn_breakout.SummaryWriter, "add_scalar", fail)
    run_dir = train(Args(**TINY, log_dir=str(tmp_path)))
    told = [line for line in capsys.readouterr().out.splitlines() if "the writer is gone" in line]
    assert len(told) == 1 and "training goes on" in told[0]
    assert checkpoint_of(run_dir)["global_step"] == 40


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_profile_holds_the_parts_of_the_second_rollout(name, capsys, tmp_path):
    settings = TINY | {"num_envs": 3, "num_minibatches": 2, "total_timesteps": 36, "profile": str(tmp_path / name)}
    train(Args(**settings, log_dir=str(tmp_path)))
    data = (tmp_path / name).read_bytes()
    events = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)["traceEvents"]
    counts = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    assert counts["environments"] == counts["acting"] == 4  # num_steps
    assert counts["learning"] == 4  # update_epochs x num_minibatches
    assert counts["targets"] == 2  # each epoch
    assert sum(name in line and "perfetto" in line for line in capsys.readouterr().out.splitlines()) == 1


def test_a_profile_does_not_change_what_is_learned(finished_run, tmp_path):
    run_dir = train(Args(**TINY, profile=str(tmp_path / "trace.json"), log_dir=str(tmp_path)))
    assert same(checkpoint_of(run_dir)["network"], checkpoint_of(finished_run)["network"])


def test_a_resumed_run_writes_a_profile_only_when_asked_anew(cli, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    run_dir = train(Args(**TINY, profile=str(first), log_dir=str(tmp_path)))
    first.unlink()
    for total, asked in ((80, []), (120, ["--profile", second])):
        code, *_ = cli("--resume", run_dir, "--total-timesteps", total, *asked)
        assert code == 0
    assert second.exists() and not first.exists()


def test_a_profile_that_cannot_be_written_is_told_and_training_goes_on(on_step, capsys, tmp_path):
    (tmp_path / "gone").mkdir()
    on_step(lambda count, envs, rewards: count == 1 and (tmp_path / "gone").rmdir())
    run_dir = train(Args(**TINY, profile=str(tmp_path / "gone" / "trace.json"), log_dir=str(tmp_path)))
    assert checkpoint_of(run_dir)["global_step"] == 40
    assert sum("not written" in line and "goes on" in line for line in capsys.readouterr().out.splitlines()) == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_network_learns_what_the_plain_one_learns(finished_run, tmp_path):
    run_dir = train(Args(**TINY, compile=True, log_dir=str(tmp_path)))
    compiled, plain = checkpoint_of(run_dir)["network"], checkpoint_of(finished_run)["network"]
    assert list(compiled) == list(plain)
    for name, weights in plain.items():
        torch.testing.assert_close(compiled[name], weights, rtol=1e-3, atol=1e-4)


def test_without_a_compiler_compile_is_refused_in_one_line(tmp_path):
    environ = ENVIRON | {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, ROOT / "pqn_breakout.py", *flags(**TINY, log_dir=tmp_path / "logs"), "--compile"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    (line,) = done.stderr.splitlines()
    assert line.startswith("pqn_breakout.py: error: --compile: ") and "compiler" in line
    assert done.returncode == 1 and not list(tmp_path.glob("logs/*"))


def test_training_goes_on_when_nobody_reads_what_it_says(monkeypatch, minutes_a_step, tmp_path):
    class ClosedPipe(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    minutes_a_step(1)
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    run_dir = train(Args(**TINY, log_dir=str(tmp_path)))
    assert checkpoint_of(run_dir)["global_step"] == 40


@contextlib.contextmanager
def file_size_limit(folder):
    """No file can become larger than this; the kernel tells as it does when a disk is full."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))

    def make_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    try:
        yield fill, make_room
    finally:
        make_room()


@contextlib.contextmanager
def small_disk(folder):
    """A disk of its own that can be filled to the last byte."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("may not mount a disk here")
    except OSError:
        pytest.skip("has no command to mount a disk")

    def fill():
        with contextlib.suppress(OSError), open(folder / ".filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    try:
        yield fill, (folder / ".filler").unlink
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("disk", [file_size_limit, small_disk])
def test_a_full_disk_is_told_once_and_checkpoints_and_curves_come_again_with_room(on_step, capsys, tmp_path, disk):
    seen = []

    def hook(count, envs, rewards):
        if count == 10:
            fill()
        if count == 30:
            (run_dir,) = tmp_path.glob("[!.]*")
            seen.append(checkpoint_of(run_dir)["global_step"])
            make_room()
        if count == 35:
            seen.append(checkpoint_of(run_dir := next(tmp_path.glob("[!.]*")))["global_step"])
            assert not list(run_dir.glob("*.new"))

    with disk(tmp_path) as (fill, make_room):
        on_step(hook)
        run_dir = train(Args(**TINY | OFTEN | {"total_timesteps": 80}, log_dir=str(tmp_path)))
        assert seen == [16, 64]
        assert checkpoint_of(run_dir)["global_step"] == 80
        lines = capsys.readouterr().out.splitlines()
        assert sum("checkpoint.pth: cannot be written" in line for line in lines) == 1
        assert len(lines) <= 4 + 2  # the usual ones, this one and perhaps one about the curves
        assert {8, 72, 80} <= set(steps_of(run_dir))


@pytest.mark.parametrize("disk", [file_size_limit, small_disk])
def test_a_run_on_a_full_disk_does_not_start_and_leaves_nothing(cli, tmp_path, disk):
    with disk(tmp_path) as (fill, make_room):
        fill()
        code, out, err = cli(*flags(**TINY | {"log_dir": tmp_path / "logs"}))
        assert str(code).startswith("pqn_breakout.py: error: ") and "\n" not in code and "log" in code
        assert out == err == ""
        assert not list(tmp_path.glob("logs/*"))


@pytest.mark.parametrize("disk", [file_size_limit, small_disk])
def test_a_checkpoint_that_could_not_be_written_at_the_end_is_an_error(on_step, cli, tmp_path, disk):
    with disk(tmp_path) as (fill, make_room):
        on_step(lambda count, envs, rewards: count == 10 and fill())
        code, out, err = cli(*flags(**TINY | OFTEN | {"log_dir": tmp_path / "logs"}))
        assert str(code).startswith("pqn_breakout.py: error: ") and "checkpoint.pth" in code and "\n" not in code
        assert checkpoint_of(next(tmp_path.glob("logs/*")))["global_step"] == 16


# --- The command line -------------------------------------------------------------------------------------------------

WRONG = [f"--{name} {value}" for name in ("num-envs", "num-steps", "update-epochs") for value in (0, -2, 1.5, "two")]
WRONG += [f"--{name} {value}" for name in ("gamma", "q-lambda", "start-e", "end-e") for value in (-0.1, 1.1, "nan")]
WRONG += [f"--{name} {value}" for name in ("learning-rate", "max-grad-norm") for value in (0, -1, "nan", "inf")]
WRONG += ["--num-minibatches 0", "--num-minibatches 3", "--total-timesteps 0", "--total-timesteps 7"]
WRONG += ["--exploration-fraction 0", "--exploration-fraction 1.5", "--checkpoint-minutes 0", "--weight-decay -1"]
WRONG += ["--seed -1", "--seed 2147483648", "--num-threads -1", "--bf16 maybe", "--vec-env none", "--gamma"]
WRONG += ["--device warp", "--device cuda:99", "--device meta", "--device hpu", "--env-id CartPole-v1", "--env-id Pnog"]
WRONG += ["--log-dir file", "--log-dir file/below", "--frobnicate 3", "--resume nowhere", "surplus"]
WRONG += ["--profile trace.txt", "--profile nowhere/trace.json"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_told_in_one_line(cli, monkeypatch, tmp_path, wrong):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    code, out, err = cli(*flags(**TINY), *wrong.split())
    assert re.fullmatch(r"pqn_breakout\.py: error: .+", code), code
    assert wrong.split()[0].removeprefix("--resume ") in code or "nowhere/" in code
    assert len(code) < 250 and "---" not in code
    assert out == err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_log_dir_that_cannot_be_written_is_told(cli, tmp_path):
    if os.access("/proc", os.W_OK) and os.geteuid():
        pytest.skip("no folder here that cannot be written")
    code, *_ = cli(*flags(**TINY), "--log-dir", "/proc/logs")
    assert re.fullmatch(r"pqn_breakout\.py: error: --log-dir /proc/logs: .+", code)


def test_a_wrong_argument_costs_no_folder_and_exit_code_1(tmp_path):
    command = [sys.executable, ROOT / "pqn_breakout.py", "--num-envs", "many"]
    ascii_only = ENVIRON | {"PYTHONIOENCODING": "ascii", "COLUMNS": "60"}
    result = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(
        r"pqn_breakout\.py: error: Error parsing --num-envs: [^-]+--help lists the options\n", result.stderr
    )
    assert not list(tmp_path.iterdir())
