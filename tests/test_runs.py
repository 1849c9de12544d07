"""Runs: their files, what they leave and show, stopping and resuming them, what can go wrong, what they refuse."""

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MadeUpGames
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

import pqn_breakout
from pqn_breakout import CHECKPOINT, MODEL, Args, AtariVecEnv, QNetwork, RAdam, UserError, linear_schedule, load, train

ROOT = Path(pqn_breakout.__file__).parent
BREAKOUT = gym.registry["BreakoutNoFrameskip-v4"]
CUT_BREAKOUT = "CutBreakout-v0"  # every game is truncated after 60 steps
gym.register(CUT_BREAKOUT, BREAKOUT.entry_point, kwargs={**BREAKOUT.kwargs, "max_num_frames_per_episode": 240})

TINY = {"num_envs": 2, "num_steps": 4, "num_minibatches": 1, "update_epochs": 2, "total_timesteps": 40}
TINY |= {"num_threads": 1, "bf16": "off", "device": "cpu", "checkpoint_minutes": 1e9}
OFTEN = {"checkpoint_minutes": 1e-9}  # after every rollout
FIVE_ROLLOUTS = [8, 16, 24, 32, 40]
ENVIRON = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SIGNALS = {getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, /dev, or Linux's limits")


def flags(**settings) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def checkpoint_of(run_dir) -> dict:
    return load(Path(run_dir, "checkpoint.pth"), CHECKPOINT)


def model_of(run_dir) -> dict:
    return load(Path(run_dir, "best_model.pth"), MODEL)


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
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def snapshot(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def copy_of(run_dir: Path, folder: Path) -> Path:
    copy = folder / run_dir.name
    copy.mkdir(parents=True)
    for path in run_dir.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def is_error(code, *words: str) -> bool:
    return bool(re.fullmatch(r"pqn_breakout\.py: error: .{1,250}", code)) and all(word in code for word in words)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Calls the program; returns its exit code (for an error the line it ends with) and what it prints."""

    def call(*argv):
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
                patch.setattr(sys, "argv", ["pqn_breakout.py", *map(str, argv)])
                patch.setattr(sys, "stdout", sys.stdout)
                pqn_breakout.run_command(pqn_breakout.main)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        assert err == ""
        return stop.value.code, out

    return call


@pytest.fixture
def on_step(monkeypatch):
    """`on_step(hook)`: from now on `hook(count, rewards)` is called after each step of the games."""
    step_wait = AtariVecEnv.step_wait

    def install(hook):
        def hooked(envs):
            observations, rewards, dones, infos = step_wait(envs)
            hook(next(count), rewards)
            return observations, rewards, dones, infos

        count = itertools.count(1)
        monkeypatch.setattr(AtariVecEnv, "step_wait", hooked)

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
        infos = [{"episode": {"r": float(next(self.scores)), "l": 1, "t": 0.0}} for _ in range(self.num_envs)]
        return self.reset(), np.ones(self.num_envs, np.float32), np.ones(self.num_envs, bool), infos


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


# --- Files ---

CONTENT = {"number": 1, "network": {"w": torch.arange(6.0), "b": torch.ones(3, dtype=torch.int64)}, "recent": [2.0]}
KINDS = {"number": int, "network": dict}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program handles it."""


def kill(*_):
    raise Killed


def is_refused(path, kinds=KINDS, *objects) -> bool:
    """In one line that names it."""
    try:
        load(path, kinds, *objects)
    except UserError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return True
    return False


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("instant", ["before", "after"])
def test_a_process_killed_while_writing_leaves_a_whole_file(monkeypatch, tmp_path, function, instant):
    path, original = tmp_path / "model.pth", getattr(os, function)
    pqn_breakout.save(path, CONTENT)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, function, lambda *args: kill(instant == "after" and original(*args)))
        pqn_breakout.save(path, CONTENT | {"number": 2})
    assert load(path, KINDS)["number"] == (2 if (function, instant) == ("replace", "after") else 1)
    pqn_breakout.save(path, CONTENT | {"number": 3})
    assert load(path, KINDS)["number"] == 3


def test_a_file_takes_its_name_only_once_all_of_it_is_on_disk(monkeypatch, tmp_path):
    on_disk, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), on_disk.append(os.fstat(fd).st_size)))
    monkeypatch.setattr(os, "replace", lambda a, b: (on_disk.append(os.stat(a).st_size), replace(a, b)))
    pqn_breakout.save(tmp_path / "model.pth", CONTENT)
    assert on_disk == 2 * [(tmp_path / "model.pth").stat().st_size]


def test_a_flipped_bit_or_a_missing_end_is_never_taken_for_content(tmp_path):
    path, choose, refused = tmp_path / "model.pth", random.Random(1), 0
    pqn_breakout.save(path, CONTENT)
    whole = path.read_bytes()
    for _ in range(300):
        damaged, at = bytearray(whole), choose.randrange(len(whole))
        damaged[at] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        if is_refused(path):
            refused += 1
        else:  # it was in what nobody reads, as a time stamp
            assert same(load(path, KINDS), CONTENT), f"byte {at}"
    assert refused > 100
    for length in [*range(0, len(whole), 197), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert is_refused(path), length


def torch_bytes(content, **options) -> bytes:
    data = io.BytesIO()
    torch.save(content, data, **options)
    return data.getvalue()


def test_a_file_of_something_else_is_refused(tmp_path, finished_run):
    path = tmp_path / "best_model.pth"
    weights = {"w": torch.tensor([1.0, math.nan])}
    contents = [torch.zeros(3), [1, 2], {"state_dict": {}}, CONTENT | {"number": "one"}, CONTENT | {"network": weights}]
    texts = [b"", b"import os\n", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), bytes(5000), pickle.dumps(CONTENT)]
    texts += [torch_bytes(CONTENT, _use_new_zipfile_serialization=False)[:-9], *map(torch_bytes, contents)]
    for text in texts:
        path.write_bytes(text)
        assert is_refused(path), text[:100]
    assert is_refused(finished_run / "best_model.pth", CHECKPOINT)
    assert is_refused(finished_run / "best_model.pth", MODEL, QNetwork(6))
    assert is_refused(tmp_path) and is_refused(tmp_path / "nothing.pth")


@LINUX
def test_a_file_without_an_end_or_that_inflates_is_refused_before_it_is_read(tmp_path):
    resource = pytest.importorskip("resource")
    os.mkfifo(tmp_path / "fifo")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, kill)
    signal.alarm(20)
    assert is_refused(tmp_path / "fifo") and is_refused(Path("/dev/zero"))
    signal.alarm(0)
    pqn_breakout.save(tmp_path / "model.pth", CONTENT)
    with (
        zipfile.ZipFile(tmp_path / "model.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for entry in plain.infolist():
            with bomb.open(entry.filename, "w", force_zip64=True) as file:
                file.write(plain.read(entry))
                for _ in range(500 if entry.filename.endswith("data/0") else 0):
                    file.write(bytes(2**20))
    assert is_refused(tmp_path / "bomb.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


class Trap:
    """Once unpickled, leaves a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_file_can_run_code(tmp_path):
    sprung, path = tmp_path / "sprung", tmp_path / "model.pth"
    content = CONTENT | {"recent": Trap(sprung)}
    old = torch_bytes(content, _use_new_zipfile_serialization=False)
    for data in (pickle.dumps(content), torch_bytes(content), old):
        path.write_bytes(data)
        assert is_refused(path)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))  # the trap is one
    assert sprung.exists()


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_an_optimizer_state_of_other_shapes_than_the_network_is_refused(finished_run, tmp_path, key):
    content, network = checkpoint_of(finished_run), QNetwork(4)
    objects = network, RAdam(network.parameters(), 1e-3)
    assert not is_refused(finished_run / "checkpoint.pth", CHECKPOINT, *objects)
    state = content["optimizer"]["state"][8]
    state[key] = state[key][..., :-1].clone()
    pqn_breakout.save(tmp_path / "checkpoint.pth", content)
    assert is_refused(tmp_path / "checkpoint.pth", CHECKPOINT, *objects)


# --- What a run leaves and shows ---


def test_two_runs_never_share_a_folder(monkeypatch, finished_run, tmp_path):
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    run_dir = train(Args(**TINY, log_dir=str(tmp_path)))
    before = snapshot(tmp_path)
    with pytest.raises(OSError, match=run_dir.name):
        train(Args(**TINY, log_dir=str(tmp_path)))
    assert snapshot(tmp_path) == before


def test_a_run_leaves_curves_models_and_arguments(tmp_path):
    run_dir = train(Args(**TINY | {"env_id": CUT_BREAKOUT, "total_timesteps": 160}, log_dir=str(tmp_path)))
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith((".", "events."))}
    assert names == {"best_model.pth", "checkpoint.pth", "args.json"}
    assert re.fullmatch(r"CutBreakout-v0__pqn_breakout__1__\d+", run_dir.name)
    args = json.loads((run_dir / "args.json").read_text())
    assert args == checkpoint_of(run_dir)["args"] and Args(**args).num_envs == 2
    assert model_of(run_dir)["global_step"] == 160  # of fewer than 100 games, the last network
    assert same(model_of(run_dir)["network"], checkpoint_of(run_dir)["network"])
    events = events_of(run_dir)
    charts = ["episodic_return", "episodic_length", "SPS", "epsilon", "learning_rate", "sparse_reward_ratio"]
    tags = {f"charts/{name}" for name in charts} | {"losses/td_loss", "losses/current_q", "losses/target_q"}
    assert tags == set(events.Tags()["scalars"])
    assert steps_of(run_dir) == list(range(8, 161, 8))
    assert curve(run_dir, "charts/episodic_length") == [(120, 60), (120, 60)]
    (text,) = events.Tensors("hyperparameters/text_summary")
    assert b"|num_envs|2|" in text.tensor_proto.string_val[0]


def test_a_run_reports_every_30_seconds_and_saves_every_checkpoint_minutes(cli, monkeypatch, on_step, tmp_path):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, time=time.time, sleep=time.sleep)
    on_step(lambda *_: setattr(clock, "now", clock.now + 3))  # 12 seconds a rollout
    monkeypatch.setattr(pqn_breakout, "time", clock)
    monkeypatch.chdir(tmp_path)
    saved, save = [], pqn_breakout.save
    monkeypatch.setattr(
        pqn_breakout, "save", lambda path, c: (saved.append((path.name, c["global_step"])), save(path, c))
    )
    code, out = cli(*flags(**TINY | {"total_timesteps": 80, "checkpoint_minutes": 0.5}))
    (run_dir,) = Path("logs").iterdir()
    start, *progress, end, play = out.splitlines()
    assert code == 0 and str(run_dir) in start
    assert [line.split(":")[0] for line in progress] == ["step 24", "step 48", "step 72"]
    assert all("epsilon 0.010" in line and "steps/s" in line for line in progress)
    assert end.startswith("step 80")
    assert "python evaluate.py" in play
    assert [step for name, step in saved if name == "checkpoint.pth"] == [0, 24, 48, 72, 80]


def test_the_best_model_is_that_of_the_best_mean_of_100_games(scores, monkeypatch, tmp_path):
    # 8 games a rollout: the mean of the last 100 rises until step 200, then falls.
    scores([*range(200), *itertools.repeat(0, 400)])
    saved, save = [], pqn_breakout.save
    monkeypatch.setattr(pqn_breakout, "save", lambda path, content: (saved.append(path.name), save(path, content)))
    run_dir = train(Args(**TINY | {"total_timesteps": 400}, log_dir=str(tmp_path)))
    model, checkpoint = model_of(run_dir), checkpoint_of(run_dir)
    assert (model["global_step"], model["mean_return"]) == (200, np.mean(range(100, 200)))
    assert checkpoint["global_step"] == 400 and checkpoint["recent"] == [0.0] * 100
    assert not same(model["network"], checkpoint["network"])
    assert saved == ["checkpoint.pth", "best_model.pth", "checkpoint.pth"]  # not once for each of 13 best ones


def test_a_network_from_a_file_has_the_q_values_it_had_in_training(monkeypatch, tmp_path):
    networks = []
    monkeypatch.setattr(pqn_breakout, "QNetwork", lambda *args: networks.append(QNetwork(*args)) or networks[-1])
    run_dir = train(Args(**TINY, log_dir=str(tmp_path)))
    frames = torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    for name, kinds in (("best_model.pth", MODEL), ("checkpoint.pth", CHECKPOINT)):
        network = QNetwork(4)
        load(run_dir / name, kinds, network)
        assert torch.equal(network(frames), networks[0](frames))


def test_the_same_seed_gives_the_same_run_bit_for_bit(tmp_path):
    settings = TINY | {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 320}
    settings |= {"env_id": CUT_BREAKOUT, "learning_rate": 1e-3, "start_e": 0.5, "num_threads": 2}
    one, two, other = (train(Args(**settings, seed=seed, log_dir=str(tmp_path / str(seed)))) for seed in (5, 5, 6))
    a, b, c = (checkpoint_of(run_dir) for run_dir in (one, two, other))
    assert len(a["recent"]) == 4
    assert all(same(a[key], b[key]) for key in ("network", "optimizer", "recent"))
    assert curve(one) == curve(two)
    assert not same(a["network"], c["network"])


# --- Resuming ---


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(on_step, cli, tmp_path):
    settings = TINY | {"env_id": CUT_BREAKOUT, "learning_rate": 1e-3, "exploration_fraction": 1.0, "seed": 3}
    settings |= {"total_timesteps": 320, "log_dir": tmp_path}
    on_step(lambda count, _: count == 71 and os.kill(os.getpid(), signal.SIGINT))
    code, out = cli(*flags(**settings))
    (run_dir,) = tmp_path.iterdir()
    stopped = checkpoint_of(run_dir)
    assert code == 130 and out.splitlines()[-1].endswith(f"--resume {run_dir}")
    assert stopped["global_step"] == 144 and len(stopped["recent"]) == 2
    played = []
    on_step(lambda count, _: played.append(count))
    code, out = cli("--resume", run_dir)
    assert code == 0 and str(run_dir) in out and "step 320" in out
    assert list(tmp_path.iterdir()) == [run_dir]
    assert (
        len(played) == 16 * 4 + (320 - 144) // 2
    )  # 16 rollouts that scatter the games, learned from and counted never

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
    assert finished["optimizer"]["param_groups"][0]["steps"] == 320 // 8 * 2
    assert {int(state["step"]) for state in finished["optimizer"]["state"].values()} == {320 // 8 * 2}


def test_a_finished_run_that_is_resumed_changes_nothing_but_a_missing_best_model(finished_run, cli, tmp_path):
    run_dir = copy_of(finished_run, tmp_path / "logs")
    (run_dir / "best_model.pth").unlink()
    parent_before = run_dir.parent.stat().st_mtime_ns
    code, out = cli("--resume", run_dir)
    assert code == 0 and "step 40" in out
    before, after = checkpoint_of(finished_run), checkpoint_of(run_dir)
    assert all(same(before[key], after[key]) for key in ("network", "optimizer", "recent", "global_step"))
    assert same(model_of(run_dir)["network"], before["network"])
    assert steps_of(run_dir) == FIVE_ROLLOUTS
    assert run_dir.parent.stat().st_mtime_ns == parent_before  # as it may be read-only


FREE = {"total_timesteps": 48, "device": "auto", "num_threads": 2, "bf16": "on", "checkpoint_minutes": 7.0}
FIXED = {"env_id": "PongNoFrameskip-v4", "seed": 2, "learning_rate": 0.1, "num_envs": 4, "num_steps": 8}
FIXED |= {"num_minibatches": 2, "update_epochs": 1, "gamma": 0.5, "q_lambda": 0.5, "start_e": 0.5, "end_e": 0.5}
FIXED |= {"exploration_fraction": 0.5, "max_grad_norm": 1.0, "weight_decay": 0.1, "vec_env": "sb3", "log_dir": "other"}


def test_only_what_does_not_change_learning_may_be_given_anew(finished_run, cli, tmp_path):
    assert {*FREE, *FIXED, "anneal_lr", "compile", "resume"} == {field.name for field in dataclasses.fields(Args)}
    before = snapshot(finished_run)
    for name, value in FIXED.items():
        code, out = cli("--resume", finished_run, *flags(**{name: value}))
        assert is_error(code, str(value)) and name in code.replace("-", "_") and out == ""
    assert is_error(cli("--resume", finished_run, "--no-anneal-lr")[0], "anneal")
    assert snapshot(finished_run) == before
    run_dir = copy_of(finished_run, tmp_path)
    code, out = cli("--resume", run_dir, *flags(**FREE))
    assert code == 0 and "bfloat16" in out
    assert FREE.items() <= checkpoint_of(run_dir)["args"].items()
    assert steps_of(run_dir) == [*FIVE_ROLLOUTS, 48]


def test_a_longer_training_keeps_exploration_over(cli, tmp_path):
    settings = TINY | {"exploration_fraction": 0.5, "log_dir": tmp_path}
    assert cli(*flags(**settings))[0] == 0
    (run_dir,) = tmp_path.iterdir()
    for total in (80, 160):
        assert cli("--resume", run_dir, "--total-timesteps", total)[0] == 0
    epsilons = [linear_schedule(1.0, 0.01, 20, step) for step in range(8, 161, 8)]
    assert [value for _, value in curve(run_dir, "charts/epsilon")] == pytest.approx(epsilons)


def test_a_run_with_other_options_is_refused_and_one_with_fewer_is_taken(finished_run, cli, tmp_path):
    run_dir, content = copy_of(finished_run, tmp_path), checkpoint_of(finished_run)
    pqn_breakout.save(run_dir / "checkpoint.pth", content | {"args": content["args"] | {"momentum": 0.9}})
    before = snapshot(run_dir)
    assert is_error(cli("--resume", run_dir)[0], "version", "momentum")
    assert snapshot(run_dir) == before
    del content["args"]["compile"], content["args"]["weight_decay"]
    pqn_breakout.save(run_dir / "checkpoint.pth", content)
    assert cli("--resume", run_dir)[0] == 0


def test_a_folder_in_use_is_refused(on_step, tmp_path):
    def resume(count, _):
        if count == 6:
            (run_dir,) = tmp_path.iterdir()
            before = snapshot(run_dir)
            with pytest.raises(UserError, match="live run is using"):
                train(Args(**TINY, resume=str(run_dir)))
            assert snapshot(run_dir) == before

    on_step(resume)
    run_dir = train(Args(**TINY, log_dir=str(tmp_path)))
    assert steps_of(run_dir) == FIVE_ROLLOUTS
    FileLock(run_dir / ".lock").acquire(blocking=False).lock.release()


def test_where_locks_do_not_work_a_line_says_so_and_training_goes_on(monkeypatch, capsys, tmp_path):
    def acquire(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    run_dir = train(Args(**TINY, log_dir=str(tmp_path)))
    assert steps_of(run_dir) == FIVE_ROLLOUTS
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "No locks" in line]
    assert str(run_dir) in line and "resume" not in line


@pytest.mark.parametrize("name", ["checkpoint.pth", "best_model.pth"])
def test_a_damaged_run_is_not_resumed_over(finished_run, cli, tmp_path, name):
    run_dir = copy_of(finished_run, tmp_path)
    (run_dir / name).write_bytes(b"damaged")
    before = snapshot(run_dir)
    assert is_error(cli("--resume", run_dir, "--total-timesteps", 48)[0], name)
    assert snapshot(run_dir) == before


def test_a_best_model_younger_than_the_checkpoint_is_kept(scores, cli, tmp_path):
    scores(itertools.repeat(7))
    run_dir = train(Args(**TINY | {"total_timesteps": 160}, log_dir=str(tmp_path)))
    best = model_of(run_dir)
    pqn_breakout.save(run_dir / "checkpoint.pth", checkpoint_of(run_dir) | {"recent": [], "global_step": 8})
    scores(itertools.repeat(6))
    assert cli("--resume", run_dir)[0] == 0
    assert same(model_of(run_dir), best) and best["mean_return"] == 7


def test_a_lucky_first_game_does_not_keep_the_best_model_from_being_written(scores, cli, tmp_path):
    scores(itertools.repeat(300))
    run_dir = train(Args(**TINY, log_dir=str(tmp_path)))  # 40 games, too few for a best
    scores(itertools.repeat(6))
    assert cli("--resume", run_dir, "--total-timesteps", 240)[0] == 0
    model = model_of(run_dir)
    assert model["global_step"] == 104 and model["mean_return"] == pytest.approx(0.36 * 300 + 0.64 * 6)


def test_the_curve_on_disk_is_never_behind_the_checkpoint_and_no_step_is_in_it_twice(on_step, cli, tmp_path):
    checkpoints, steps = [], []

    def look(count, _):
        if count % 4 == 1 and count > 1:
            (run_dir,) = tmp_path.iterdir()
            checkpoints.append(checkpoint_of(run_dir))
            steps.append(steps_of(run_dir)[-1])

    on_step(look)
    run_dir = train(Args(**TINY | OFTEN, log_dir=str(tmp_path)))
    assert steps == [checkpoint["global_step"] for checkpoint in checkpoints] == FIVE_ROLLOUTS[:-1]
    on_step(lambda *_: None)
    pqn_breakout.save(run_dir / "checkpoint.pth", checkpoints[1])  # as if killed before the later ones
    assert cli("--resume", run_dir)[0] == 0
    assert steps_of(run_dir) == FIVE_ROLLOUTS


KILLED_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
from pathlib import Path
import pqn_breakout

def state():
    run_dir = next(Path(log_dir).iterdir(), None)
    checkpoint = run_dir and run_dir / "checkpoint.pth"
    return checkpoint and checkpoint.exists() and (run_dir, checkpoint.stat().st_mtime_ns)

log_dir, kills, *first = sys.argv[1:]
choose, last = random.Random(7), 0
for i in range(int(kills)):
    before = state()
    pid = os.fork()
    if pid == 0:
        sys.argv[1:] = ["--resume", str(before[0])] if before else first
        pqn_breakout.run_command(pqn_breakout.main)
    # Every other one gets as far as its second checkpoint, which is its first with something new.
    for _ in range(2 if i % 2 == 0 else 0):
        while state() == before:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        before = state()
    time.sleep(choose.uniform(0, 0.3))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    step = pqn_breakout.load(state()[0] / "checkpoint.pth", pqn_breakout.CHECKPOINT)["global_step"]
    assert step >= last + (8 if i % 2 == 0 else 0)
    last = step
"""


@LINUX
def test_a_run_killed_again_and_again_ends_with_one_whole_curve(cli, tmp_path):
    settings = TINY | OFTEN | {"total_timesteps": 10**6, "log_dir": tmp_path}
    command = [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, tmp_path, "8", *flags(**settings)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRON)
    assert (result.returncode, result.stderr) == (0, "")
    (run_dir,) = tmp_path.iterdir()
    reached = checkpoint_of(run_dir)["global_step"]
    assert cli("--resume", run_dir, "--total-timesteps", reached + 16)[0] == 0
    assert steps_of(run_dir) == list(range(8, reached + 17, 8))
    assert checkpoint_of(run_dir)["optimizer"]["param_groups"][0]["steps"] == (reached + 16) // 8 * 2


# --- Signals and the process around ---


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_the_rollout_with_a_checkpoint(on_step, cli, tmp_path, number):
    on_step(lambda count, _: count == 6 and os.kill(os.getpid(), number))
    code, out = cli(*flags(**TINY | {"log_dir": tmp_path}))
    (run_dir,) = tmp_path.iterdir()
    assert code == 128 + number and f"--resume {run_dir}" in out.splitlines()[-1]
    assert checkpoint_of(run_dir)["global_step"] == model_of(run_dir)["global_step"] == 16


SIGNALLED = """
import os, signal
import pqn_breakout

step, fsync, steps = pqn_breakout.AtariVecEnv.step_wait, os.fsync, []

def step_wait(self):
    steps.append(1)
    if len(steps) == 6:
        os.kill(os.getpid(), signal.SIGHUP)  # ignored by the parent
    if len(steps) == 14:
        os.kill(os.getpid(), signal.SIGINT)
    return step(self)

def second(fd):  # in the middle of the last checkpoint
    if len(steps) >= 16:
        os.kill(os.getpid(), signal.SIGINT)
    fsync(fd)

pqn_breakout.AtariVecEnv.step_wait, os.fsync = step_wait, second
pqn_breakout.run_command(pqn_breakout.main)
"""


@LINUX
def test_an_ignored_signal_stays_ignored_and_a_second_ctrl_c_ends_at_once_with_a_whole_checkpoint(tmp_path):
    command = ["nohup", sys.executable, "-c", SIGNALLED, *flags(**TINY | OFTEN | {"log_dir": tmp_path})]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRON)
    assert result.returncode == -signal.SIGINT, result.stderr
    (run_dir,) = tmp_path.iterdir()
    assert checkpoint_of(run_dir)["global_step"] == 24  # fsync of the rollout in which the first one came
    assert "--resume" not in result.stdout and "Traceback" not in result.stderr


@LINUX
def test_ctrl_c_while_the_program_loads_is_no_traceback(tmp_path):
    command = [sys.executable, ROOT / "pqn_breakout.py", "--log-dir", tmp_path]
    process = subprocess.Popen(command, env=ENVIRON, stderr=subprocess.PIPE, text=True)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == -signal.SIGINT


POOR = """
import os, runpy, signal, sys
for module, name in ((signal, "SIGHUP"), (os, "setpriority")):  # as on Windows
    if hasattr(module, name):
        delattr(module, name)
script, *argv = sys.argv[1:]
for argv in (["--help"], ["--num-envs", "\u0142"], argv):
    sys.argv = [script, *argv]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        print("CODE", stop.code)
"""


def test_without_posix_and_without_unicode_the_program_works(tmp_path):
    log_dir = tmp_path / "łóg"
    command = [sys.executable, "-c", POOR, ROOT / "pqn_breakout.py", *flags(**TINY, log_dir=log_dir)]
    environ = ENVIRON | {"PYTHONIOENCODING": "cp1252", "COLUMNS": "60"}
    result = subprocess.run(command, capture_output=True, encoding="cp1252", env=environ)
    codes = [line.removeprefix("CODE ") for line in result.stdout.splitlines() if line.startswith("CODE")]
    assert result.stderr == "" and (codes[0], codes[2]) == ("0", "0")
    assert is_error(codes[1], "--num-envs", "--help lists the options")
    assert "--q-lambda" in result.stdout and checkpoint_of(next(log_dir.iterdir()))["global_step"] == 40


@LINUX
@pytest.mark.parametrize("streams", [">&- 2>&-", "2>&- | head -1", "> /dev/full"])
def test_what_the_standard_streams_cannot_take_stops_no_training(tmp_path, streams):
    command = f'"{sys.executable}" "{ROOT}/pqn_breakout.py" {" ".join(flags(**TINY))} {streams}'
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, env=ENVIRON, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert checkpoint_of(next((tmp_path / "logs").iterdir()))["global_step"] == 40


def test_train_leaves_the_program_that_calls_it_as_it_was(tmp_path):
    def state():
        hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, sys.stdout, sys.stderr
        handlers = [signal.getsignal(number) for number in SIGNALS]
        return hooks, handlers, torch.get_num_threads(), threading.active_count(), os.getcwd(), dict(os.environ)

    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    torch.manual_seed(3)
    before, random_before = state(), torch.get_rng_state()
    stopped, whole = (train(Args(**TINY, log_dir=str(tmp_path)), stop) for stop in ([signal.SIGINT], []))
    assert [checkpoint_of(run_dir)["global_step"] for run_dir in (stopped, whole)] == [8, 40]
    assert state() == before and torch.equal(torch.get_rng_state(), random_before)
    assert child.poll() is None
    child.communicate(b"\n")
    assert child.returncode == 0


def test_more_threads_than_cores_start_within_seconds(tmp_path):
    start = time.monotonic()
    train(Args(**TINY | {"num_threads": 16, "total_timesteps": 8}, log_dir=str(tmp_path)))
    assert time.monotonic() - start < 30


# --- What goes wrong on the way ---


def test_a_gradient_that_is_not_finite_stops_training_and_keeps_the_last_checkpoint(on_step, cli, tmp_path):
    def explode(count, rewards):
        if count == 14:
            rewards[0] = np.inf

    good = train(Args(**TINY | {"total_timesteps": 24}, anneal_lr=False, log_dir=str(tmp_path / "good")))
    on_step(explode)
    code, _ = cli(*flags(**TINY | OFTEN | {"log_dir": tmp_path / "bad"}), "--no-anneal-lr")
    assert is_error(code, "32", "not finite")
    (run_dir,) = (tmp_path / "bad").iterdir()
    assert same(checkpoint_of(run_dir)["network"], checkpoint_of(good)["network"])
    on_step(lambda *_: None)
    assert cli("--resume", run_dir)[0] == 0
    assert steps_of(run_dir) == FIVE_ROLLOUTS


@pytest.fixture
def full_disk():
    """`full_disk(True)`: from now on no file can grow, of which the kernel tells as of a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(full: bool):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0 if full else soft, hard))

    yield fill
    fill(False)


def test_a_full_disk_is_told_and_checkpoints_and_curves_come_again_with_room(on_step, cli, full_disk, tmp_path):
    def hook(count, _):
        full_disk(10 <= count < 30)
        if count in (30, 35):
            (run_dir,) = tmp_path.iterdir()
            assert checkpoint_of(run_dir)["global_step"] == (16 if count == 30 else 64)
            assert not list(run_dir.glob("*.new"))

    on_step(hook)
    code, out = cli(*flags(**TINY | OFTEN | {"total_timesteps": 80, "log_dir": tmp_path}))
    (run_dir,) = tmp_path.iterdir()
    assert code == 0 and checkpoint_of(run_dir)["global_step"] == 80
    assert steps_of(run_dir) == list(range(8, 81, 8))
    assert sum("checkpoint.pth" in line or "best_model.pth" in line for line in out.splitlines()) == 5


def test_a_full_disk_at_the_start_or_the_end_is_an_error_in_one_line(on_step, cli, full_disk, finished_run, tmp_path):
    run_dir = copy_of(finished_run, tmp_path / "finished")
    before = {name: data for name, data in snapshot(run_dir).items() if "events" not in name}
    full_disk(True)
    assert is_error(cli(*flags(**TINY), "--log-dir", tmp_path / "logs")[0], str(tmp_path))
    assert is_error(cli("--resume", run_dir, "--total-timesteps", 48)[0], str(tmp_path))
    full_disk(False)
    assert not list(tmp_path.glob("logs/*")) and before.items() <= snapshot(run_dir).items()
    on_step(lambda count, _: full_disk(count >= 10))
    code, _ = cli(*flags(**TINY | OFTEN | {"log_dir": tmp_path / "logs"}))
    assert is_error(code, ".pth") and checkpoint_of(next(tmp_path.glob("logs/*")))["global_step"] == 16


# --- The command line ---

WRONG = [f"--{name} {value}" for name in ("num-envs", "num-steps", "update-epochs") for value in (0, -2, 1.5, "two")]
WRONG += [f"--{name} {value}" for name in ("gamma", "q-lambda", "start-e", "end-e") for value in (-0.1, 1.1, "nan")]
WRONG += [f"--{name} {value}" for name in ("learning-rate", "max-grad-norm") for value in (0, -1, "nan", "inf")]
WRONG += [f"--{name} 12345678901234567890" for name in ("num-envs", "num-steps", "total-timesteps", "seed")]
WRONG += ["--num-envs 1000000000 --num-steps 1", "--num-steps 100000000", "--num-threads 100000"]
WRONG += [
    "--num-envs 1000000000 --total-timesteps 1000000000000",
    "--num-steps 1000000000 --total-timesteps 10000000000",
]
WRONG += ["--num-minibatches 0", "--num-minibatches 3", "--total-timesteps 0", "--total-timesteps 7"]
WRONG += ["--exploration-fraction 0", "--exploration-fraction 1.5", "--checkpoint-minutes 0", "--weight-decay -1"]
WRONG += ["--seed -1", "--seed 2147483648", "--num-threads -1", "--bf16 maybe", "--vec-env none", "--gamma"]
WRONG += ["--device warp", "--device cuda:99", "--device meta", "--device hpu", "--env-id CartPole-v1", "--env-id Pnog"]
WRONG += [
    "--log-dir file",
    "--log-dir file/below",
    "--log-dir /proc/logs",
    "--frobnicate 3",
    "--resume nowhere",
    "surplus",
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_told_in_one_line_and_costs_nothing(cli, monkeypatch, tmp_path, wrong):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    code, out = cli(*flags(**TINY), *wrong.split())
    words = wrong.split()
    assert is_error(code) and "---" not in code and out == ""
    assert words[0] in code or words[1] in code
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["vec_env", "bf16", "env_id", "device"])
def test_a_program_that_calls_train_is_told_of_wrong_arguments_too(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nonsense"):
        train(Args(**TINY | {name: "nonsense"}))
    assert not list(tmp_path.iterdir())
