"""Runs: their files, what they leave and show, stopping and resuming them, what can go wrong, what they refuse."""

import io
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
import threading
import time
import zipfile
from itertools import chain, count, repeat
from pathlib import Path
from unittest.mock import Mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_agent import Table

import pqn_breakout
from pqn_breakout import CHECKPOINT, MODEL, Args, AtariVecEnv, QNetwork, UserError, load, save, train

PROGRAM = Path(pqn_breakout.__file__)
BREAKOUT = gym.registry["BreakoutNoFrameskip-v4"]
CUT_BREAKOUT = "CutBreakout-v0"  # every game is truncated after 60 steps
gym.register(CUT_BREAKOUT, BREAKOUT.entry_point, kwargs={**BREAKOUT.kwargs, "max_num_frames_per_episode": 240})
TINY = {"num_envs": 2, "num_steps": 4, "num_minibatches": 1, "update_epochs": 2, "total_timesteps": 40}
TINY |= {"exploration_fraction": 0.5, "num_threads": 1, "bf16": "off", "device": "cpu", "checkpoint_minutes": 1e9}
OFTEN = {"checkpoint_minutes": 1e-9}  # after every rollout
FIVE_ROLLOUTS = [8, 16, 24, 32, 40]
ENVIRON = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parent)}
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's files and signals")


@pytest.fixture(scope="module", autouse=True)
def small_network():
    """Where files are tested and not learning, a small network is as good, and quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pqn_breakout, "QNetwork", Table)
        yield


def flags(**settings) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def run_in(folder) -> Path:
    (run_dir,) = Path(folder).iterdir()
    return run_dir


def checkpoint_of(run_dir) -> dict:
    return load(run_dir / "checkpoint.pth", CHECKPOINT)


def curve(run_dir, tag="losses/td_loss") -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def steps_of(run_dir) -> list[int]:
    return [step for step, _ in curve(run_dir)]


def same(a, b) -> bool:
    """Whether two contents of files are the same, bit for bit."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def snapshot(folder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def is_error(code, *words: str) -> bool:
    return bool(re.fullmatch(r"pqn_breakout\.py: error: .{1,250}", code)) and all(word in code for word in words)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Calls the program; returns its exit code (for an error the line it ends with) and what it prints."""

    def call(*argv):
        handlers = [signal.getsignal(number) for number in SIGNALS]
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", ["pqn_breakout.py", *map(str, argv)])
            patch.setattr(sys, "stdout", sys.stdout)
            pqn_breakout.run_command(pqn_breakout.main)
        list(map(signal.signal, SIGNALS, handlers))
        out, err = capsys.readouterr()
        assert err == ""
        return stop.value.code, out

    return call


@pytest.fixture
def on_step(monkeypatch):
    """`on_step(hook)`: from now on `hook(number, rewards, infos)` is called after each step of the games."""
    step_wait = AtariVecEnv.step_wait

    def install(hook):
        def hooked(envs):
            observations, rewards, dones, infos = step_wait(envs)
            hook(next(numbers), rewards, infos)
            return observations, rewards, dones, infos

        numbers = count(1)
        monkeypatch.setattr(AtariVecEnv, "step_wait", hooked)

    return install


def end_with(scores):
    """A hook: with each step every game is over, with the next of these scores."""
    return lambda number, rewards, infos: [info.update(episode={"r": float(next(scores)), "l": 1}) for info in infos]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that has reached its end; not to be changed."""
    return train(Args(**TINY, log_dir=str(tmp_path_factory.mktemp("finished"))))


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "copy" / finished.name))


# --- Files ---
CONTENT = {"number": 1, "network": {"w": torch.arange(6.0), "zeros": torch.zeros(9999)}, "recent": [2.0]}
KINDS = {"number": int, "network": dict}


def is_refused(path, kinds=KINDS, *objects) -> bool:
    try:
        load(path, kinds, *objects)
    except UserError as error:
        return path.name in str(error) and "\n" not in str(error)
    return False


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SystemExit()])  # the latter as if killed
def test_a_write_that_fails_or_is_killed_leaves_the_old_file(monkeypatch, tmp_path, function, error):
    save(tmp_path / "model.pth", CONTENT)
    with monkeypatch.context() as patch, pytest.raises(type(error)) as raised:
        patch.setattr(os, function, Mock(side_effect=error))
        save(tmp_path / "model.pth", CONTENT | {"number": 2})
    assert load(tmp_path / "model.pth", KINDS)["number"] == 1
    if isinstance(error, OSError):
        assert "model.pth" in str(raised.value) and os.listdir(tmp_path) == ["model.pth"]
    on_disk, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), on_disk.append(os.fstat(file).st_size)))
    save(tmp_path / "model.pth", CONTENT | {"number": 3})
    assert load(tmp_path / "model.pth", KINDS)["number"] == 3
    assert on_disk == [(tmp_path / "model.pth").stat().st_size]


def test_a_flipped_bit_or_a_missing_end_is_never_taken_for_content(tmp_path):
    path, choose, refused = tmp_path / "model.pth", random.Random(1), 0
    save(path, CONTENT | {"network": {"w": torch.arange(99.0)}})
    whole, content = path.read_bytes(), load(path, KINDS)
    for at in choose.sample(range(len(whole)), 300):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << choose.randrange(8)]) + whole[at + 1 :])
        refused += is_refused(path)
        assert is_refused(path) or same(load(path, KINDS), content)  # it was in what nobody reads, as a time stamp
    assert refused > 100
    for length in [*range(0, len(whole), 197), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert is_refused(path), length


class Trap:
    """Once unpickled, leaves a folder."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_files_of_something_else_are_refused_and_never_run(monkeypatch, tmp_path, finished):
    monkeypatch.chdir(tmp_path)
    path, not_a_number = tmp_path / "best_model.pth", {"network": {"w": torch.tensor([1.0, math.nan])}}
    contents = [torch.zeros(3), [1, 2], {"state_dict": {}}, CONTENT | {"number": "one"}, CONTENT | not_a_number]
    texts = [b"", b"import os\n", b"\x89PNG\r\n\x1a\n" + bytes(256), bytes(5000), pickle.dumps(CONTENT | {"x": Trap()})]
    for content in [*contents, CONTENT | {"recent": Trap()}]:
        for zipped in (True, False):
            torch.save(content, data := io.BytesIO(), _use_new_zipfile_serialization=zipped)
            texts.append(data.getvalue())
    for text in texts:
        path.write_bytes(text)
        assert is_refused(path), text[:100]
    assert not Path("sprung").exists() and pickle.loads(pickle.dumps(Trap())) is None and Path("sprung").exists()
    assert is_refused(finished / "best_model.pth", CHECKPOINT)
    assert is_refused(finished / "best_model.pth", MODEL, Table(6))
    assert is_refused(tmp_path) and is_refused(tmp_path / "nothing.pth")


@LINUX
def test_files_without_an_end_or_that_inflate_are_refused_before_they_are_read(monkeypatch, tmp_path):
    save(tmp_path / "model.pth", CONTENT)
    with zipfile.ZipFile(tmp_path / "model.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    assert torch.load(tmp_path / "bomb.pth")["number"] == 1
    os.mkfifo(tmp_path / "fifo")  # whoever reads it waits for ever
    assert all(map(is_refused, (tmp_path / "bomb.pth", tmp_path / "fifo", Path("/dev/zero"))))


# --- What a run leaves and shows ---
def test_a_run_leaves_curves_models_and_arguments(monkeypatch, tmp_path):
    networks, frames = [], torch.randint(0, 256, (5, 4, 84, 84), dtype=torch.uint8)
    monkeypatch.setattr(pqn_breakout, "QNetwork", lambda *args: networks.append(Table(*args)) or networks[-1])
    run_dir = train(Args(**TINY | {"env_id": CUT_BREAKOUT, "total_timesteps": 160}, log_dir=str(tmp_path)))
    assert re.fullmatch(r"CutBreakout-v0__pqn_breakout__1__\d+", run_dir.name)
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith((".", "events."))}
    assert names == {"best_model.pth", "checkpoint.pth", "args.json"}
    assert json.loads((run_dir / "args.json").read_text()) == checkpoint_of(run_dir)["args"]
    for name in ("best_model.pth", "checkpoint.pth"):  # of fewer than 100 games, the last network is the best
        content = load(run_dir / name, {"global_step": int}, network := Table(4))
        assert content["global_step"] == 160 and torch.equal(network(frames), networks[0](frames))
    charts = ["episodic_return", "episodic_length", "SPS", "epsilon", "learning_rate", "sparse_reward_ratio"]
    tags = {*(f"charts/{name}" for name in charts), "losses/td_loss", "losses/current_q", "losses/target_q"}
    assert tags == set(EventAccumulator(str(run_dir)).Reload().Tags()["scalars"])
    assert steps_of(run_dir) == list(range(8, 161, 8))
    assert curve(run_dir, "charts/episodic_length") == [(120, 60), (120, 60)]


def test_a_run_reports_every_30_seconds_and_saves_every_checkpoint_minutes(cli, monkeypatch, on_step, tmp_path):
    clock, saved = [0.0], {80}

    def tick(*step):
        end_game(*step)
        clock[0] += 3  # 12 seconds a rollout
        saved.add(checkpoint_of(run_in(tmp_path))["global_step"])

    end_game = end_with(repeat(7))
    on_step(tick)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    code, out = cli(*flags(**TINY | {"total_timesteps": 80, "checkpoint_minutes": 0.5, "log_dir": tmp_path}))
    start, *progress, end = out.splitlines()
    assert code == 0 and str(run_in(tmp_path)) in start and "step 80" in end and "evaluate.py --model" in end
    lines = [re.match("step ([0-9]+) of 80: score 7.0, epsilon 0.[0-9]+", line) for line in progress]
    assert [line[1] for line in lines] == ["8", "32", "56", "80"]
    assert saved == {0, 24, 48, 72, checkpoint_of(run_in(tmp_path))["global_step"]}


def test_the_best_model_is_the_newest_within_two_standard_errors_of_the_best_mean_of_100_games(on_step, tmp_path):
    def hook(*step):
        end_game(*step)
        if step[0] == 190:
            assert load(run_in(tmp_path) / "best_model.pth", MODEL)["global_step"] == 0

    # The mean rises until step 200; 8 zeros take 8.3 from it (two standard errors are 9.8), 16 take 17.2 (12.4).
    end_game = end_with(chain(range(200), repeat(0)))
    on_step(hook)
    run_dir = train(Args(**TINY | {"total_timesteps": 400}, log_dir=str(tmp_path)))
    model, checkpoint = load(run_dir / "best_model.pth", MODEL), checkpoint_of(run_dir)
    assert (model["global_step"], model["mean_return"]) == (208, np.mean(range(100, 200)))
    assert checkpoint["global_step"] == 400 and checkpoint["recent"] == [0.0] * 100
    assert not same(model["network"], checkpoint["network"])


def test_the_same_seed_gives_the_same_run_bit_for_bit(monkeypatch, tmp_path):
    monkeypatch.setattr(pqn_breakout, "QNetwork", QNetwork)
    settings = TINY | {"env_id": CUT_BREAKOUT, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 128}
    runs = [train(Args(**settings | {"start_e": 0.5, "seed": seed}, log_dir=str(tmp_path))) for seed in (5, 5, 6)]
    a, b, c = map(checkpoint_of, runs)
    assert len(a["recent"]) == 2 and all(same(a[key], b[key]) for key in ("network", "optimizer", "recent"))
    assert curve(runs[0]) == curve(runs[1]) and not same(a["network"], c["network"])


# --- Resuming ---
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(on_step, cli, tmp_path):
    settings = TINY | {"env_id": CUT_BREAKOUT, "learning_rate": 1e-3, "exploration_fraction": 1.0}
    on_step(lambda number, *_: number == 71 and os.kill(os.getpid(), signal.SIGINT))
    code, out = cli(*flags(**settings | {"total_timesteps": 320, "log_dir": tmp_path}))
    run_dir, numbers = run_in(tmp_path), []
    stopped = checkpoint_of(run_dir)
    assert (code, stopped["global_step"], len(stopped["recent"])) == (130, 144, 2)
    on_step(lambda number, *_: numbers.append(number))
    assert cli("--resume", run_dir)[0] == 0
    assert len(numbers) == 16 * 4 + (320 - 144) // 2  # 16 rollouts scatter the games: not learned from, not counted

    steps = list(range(8, 321, 8))
    assert run_in(tmp_path) == run_dir and steps_of(run_dir) == steps
    rates = [1e-3 * (1 - (step - 8) / 320) for step in steps]
    assert [rate for _, rate in curve(run_dir, "charts/learning_rate")] == pytest.approx(rates)
    epsilons = [1 - 0.99 * step / 320 for step in steps]
    assert [epsilon for _, epsilon in curve(run_dir, "charts/epsilon")] == pytest.approx(epsilons)
    finished = checkpoint_of(run_dir)
    assert finished["args"] == stopped["args"] | {"resume": str(run_dir)}
    assert len(finished["recent"]) == 4 and finished["recent"][:2] == stopped["recent"]
    assert {int(state["step"]) for state in finished["optimizer"]["state"].values()} == {320 // 8 * 2}


def test_a_finished_run_that_is_resumed_changes_nothing_but_a_missing_best_model(finished, run_dir, cli):
    (run_dir / "best_model.pth").unlink()
    code, out = cli("--resume", run_dir)
    assert code == 0 and "step 40" in out
    before, after = checkpoint_of(finished), checkpoint_of(run_dir)
    assert all(same(before[key], after[key]) for key in ("network", "optimizer", "recent", "global_step"))
    assert same(load(run_dir / "best_model.pth", MODEL)["network"], before["network"])
    assert steps_of(run_dir) == FIVE_ROLLOUTS


def test_a_resumed_run_keeps_its_arguments_but_for_those_given_anew(run_dir, cli):
    own = checkpoint_of(run_dir)["args"]
    save(run_dir / "checkpoint.pth", checkpoint_of(run_dir) | {"args": own | {"weight_decay": 0.1}})  # an older option
    given = {"total_timesteps": 56, "num_threads": 2, "bf16": "on", "learning_rate": 0.1, "checkpoint_minutes": 7.0}
    code, _ = cli("--resume", run_dir, *flags(**given), "--log-dir", "nowhere")
    expected = own | given | {"resume": str(run_dir), "log_dir": "nowhere"}
    assert code == 0 and checkpoint_of(run_dir)["args"] == expected
    assert json.loads((run_dir / "args.json").read_text()) == expected
    assert steps_of(run_dir) == list(range(8, 57, 8))
    before = snapshot(run_dir)
    assert is_error(cli("--resume", run_dir, "--gamma", 2)[0], "--gamma")
    assert is_error(cli("--resume", run_dir, "--env-id", "PongNoFrameskip-v4")[0], "another network")
    assert snapshot(run_dir) == before


@pytest.mark.parametrize("name", ["checkpoint.pth", "best_model.pth"])
def test_a_damaged_run_is_not_resumed_over(run_dir, cli, name):
    (run_dir / name).write_bytes(b"damaged")
    before = snapshot(run_dir)
    assert is_error(cli("--resume", run_dir, "--total-timesteps", 48)[0], name)
    assert snapshot(run_dir) == before


def test_a_folder_in_use_is_refused(on_step, monkeypatch, tmp_path):
    def start_another(number, *_):
        if number == 6:
            (run_in(tmp_path) / "checkpoint.pth").write_bytes(b"half of another's")  # only to be read under the lock
            before = snapshot(tmp_path)
            with pytest.raises(OSError, match=r"\.lock"):
                train(Args(**TINY, resume=str(run_in(tmp_path))))
            with pytest.raises(OSError, match=run_in(tmp_path).name):
                train(Args(**TINY, log_dir=str(tmp_path)))
            assert snapshot(tmp_path) == before

    on_step(start_another)
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)  # all start in the same instant
    run_dir = train(Args(**TINY, log_dir=str(tmp_path)))
    assert steps_of(run_dir) == FIVE_ROLLOUTS
    FileLock(run_dir / ".lock").acquire(blocking=False).lock.release()


def test_a_worse_mean_of_100_games_replaces_no_best_model(on_step, cli, tmp_path):
    on_step(end_with(repeat(300)))
    run_dir = train(Args(**TINY, log_dir=str(tmp_path)))  # 40 games, too few for a best: they would be it for ever
    on_step(end_with(chain(repeat(0, 16 * 8), repeat(6))))  # those that scatter the games count for nothing
    assert cli("--resume", run_dir, "--total-timesteps", 160)[0] == 0
    best = load(run_dir / "best_model.pth", MODEL)
    assert best["global_step"] == 112 and best["mean_return"] == pytest.approx(0.36 * 300 + 0.64 * 6)
    # As if killed after it was written, and before its checkpoint was.
    save(run_dir / "checkpoint.pth", checkpoint_of(run_dir) | {"recent": [], "global_step": 8})
    assert cli("--resume", run_dir)[0] == 0
    assert same(load(run_dir / "best_model.pth", MODEL), best)


# --- Signals and the process around ---
def test_a_run_killed_again_and_again_ends_with_one_whole_curve(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(pqn_breakout, "QNetwork", QNetwork)  # that of the processes
    settings = TINY | {"total_timesteps": 10**6, "checkpoint_minutes": 0.001, "log_dir": tmp_path}
    argv, step = flags(**settings), 0
    for _ in range(2):
        with subprocess.Popen([sys.executable, PROGRAM, *argv], env=ENVIRON) as process:
            while not list(tmp_path.glob("*/checkpoint.pth")) or checkpoint_of(run_in(tmp_path))["global_step"] <= step:
                time.sleep(0.05)
                assert process.poll() is None
            process.kill()
        time.sleep(1)  # as starting Python takes longer: event files are read by the second in their names
        step, argv = checkpoint_of(run_in(tmp_path))["global_step"], ["--resume", run_in(tmp_path)]
    run_dir, end = run_in(tmp_path), step + 16
    assert end > 16 and cli("--resume", run_dir, "--total-timesteps", end)[0] == 0
    assert steps_of(run_dir) == list(range(8, end + 1, 8))
    assert checkpoint_of(run_dir)["optimizer"]["param_groups"][0]["steps"] == end // 8 * 2


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_the_rollout_with_a_checkpoint_and_a_second_one_at_once(
    on_step, cli, tmp_path, number
):
    def hook(step, *_):
        if step == 6:
            os.kill(os.getpid(), number)
        assert (signal.getsignal(number) == signal.SIG_DFL) == (step >= 6)

    on_step(hook)
    code, out = cli(*flags(**TINY | {"log_dir": tmp_path}))
    assert code == 128 + number and f"--resume {run_in(tmp_path)}" in out.splitlines()[-1]
    assert checkpoint_of(run_in(tmp_path))["global_step"] == 16


@LINUX
def test_a_signal_that_the_parent_ignores_stays_ignored(on_step, cli, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    on_step(lambda step, *_: step == 6 and os.kill(os.getpid(), signal.SIGHUP))
    assert cli(*flags(**TINY | {"log_dir": tmp_path}))[0] == 0
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


AS_ON_WINDOWS = """
import os, runpy, signal, sys
vars(signal).pop("SIGHUP", None)
vars(os).pop("setpriority", None)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_posix_and_without_unicode_the_program_works(tmp_path):
    command = [sys.executable, "-c", "import sys; sys.argv.pop(0)" + AS_ON_WINDOWS, PROGRAM]
    environ = ENVIRON | {"PYTHONIOENCODING": "cp1252"}
    command += flags(**TINY, log_dir=tmp_path / "łóg")
    trained = subprocess.run(command, capture_output=True, env=environ)
    assert (trained.returncode, trained.stderr) == (0, b"")
    assert checkpoint_of(run_in(tmp_path / "łóg"))["global_step"] == 40


@LINUX
def test_a_training_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    command = f'"{sys.executable}" "{PROGRAM}" {" ".join(flags(**TINY))} | head -1'
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, env=ENVIRON, capture_output=True)
    assert (result.returncode, result.stderr) == (0, b"")
    assert checkpoint_of(run_in(tmp_path / "logs"))["global_step"] == 40


def test_train_leaves_the_program_that_calls_it_as_it_was(tmp_path):
    def state():
        hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, sys.stdout, sys.stderr
        return hooks, list(map(signal.getsignal, SIGNALS)), torch.get_num_threads(), threading.active_count()

    before, random_before, start = state(), torch.get_rng_state(), time.monotonic()
    for name in ("vec_env", "env_id", "device"):
        with pytest.raises(UserError, match="nonsense"):
            train(Args(**TINY | {name: "nonsense"}, log_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())
    stopped = train(Args(**TINY | {"num_threads": 16}, log_dir=str(tmp_path)), [signal.SIGINT])
    assert time.monotonic() - start < 60  # more threads than cores made it minutes
    whole = train(Args(**TINY, log_dir=str(tmp_path)))
    assert [checkpoint_of(run_dir)["global_step"] for run_dir in (stopped, whole)] == [8, 40]
    assert state() == before and torch.equal(torch.get_rng_state(), random_before)


# --- What goes wrong on the way ---
def test_a_gradient_that_is_not_finite_stops_training_and_keeps_the_last_checkpoint(on_step, cli, tmp_path):
    settings = TINY | {"total_timesteps": 24, "exploration_fraction": 20 / 24, "anneal_lr": False}
    good = train(Args(**settings, log_dir=str(tmp_path / "good")))
    on_step(lambda number, rewards, _: number == 14 and rewards.fill(np.inf))
    code, _ = cli(*flags(**TINY | OFTEN | {"log_dir": tmp_path / "bad"}), "--no-anneal-lr")
    assert is_error(code, "32", "not finite")
    run_dir = run_in(tmp_path / "bad")
    assert same(checkpoint_of(run_dir)["network"], checkpoint_of(good)["network"])
    on_step(lambda *_: None)
    assert cli("--resume", run_dir)[0] == 0 and steps_of(run_dir) == FIVE_ROLLOUTS


@pytest.fixture
def full_disk():
    """`full_disk(True)`: from now on no file can grow, of which the kernel tells as of a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (0 if full else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
def test_a_full_disk_ends_a_run_in_one_line_and_with_room_it_goes_on_from_its_checkpoint(
    on_step, cli, full_disk, run_dir, tmp_path
):
    before = {path: data for path, data in snapshot(run_dir).items() if path.suffix in (".pth", ".json")}
    full_disk(True)
    codes = cli(*flags(**TINY), "--log-dir", tmp_path / "logs")[0], cli("--resume", run_dir, "--total-timesteps", 48)[0]
    full_disk(False)  # before pytest itself writes a word
    assert all(is_error(code, "best_model.pth", "too large") for code in codes)
    assert before.items() <= snapshot(run_dir).items()
    on_step(lambda number, *_: full_disk(number >= 10))
    code, _ = cli(*flags(**TINY | OFTEN | {"log_dir": tmp_path / "others"}))
    full_disk(False)
    assert is_error(code, "too large") and not list(tmp_path.glob("others/*/*.new"))
    assert checkpoint_of(run_in(tmp_path / "others"))["global_step"] == 16
    on_step(lambda *_: None)
    assert cli("--resume", run_in(tmp_path / "others"))[0] == 0
    assert steps_of(run_in(tmp_path / "others")) == FIVE_ROLLOUTS


# --- The command line ---
WRONG = [f"--{name} {value}" for name in ("num-envs", "num-steps", "update-epochs") for value in (0, -2, 1.5, "two")]
WRONG += [f"--{name} {value}" for name in ("gamma", "q-lambda", "start-e", "end-e") for value in (-0.1, 1.1, "nan")]
WRONG += [f"--{name} {value}" for name in ("learning-rate", "max-grad-norm") for value in (0, -1, "nan", "inf")]
WRONG += [f"--{name} 12345678901234567890" for name in ("num-envs", "num-steps", "total-timesteps", "seed")]
WRONG += ["--num-envs 1000000000 --total-timesteps 1000000000000", "--num-envs 1000000000 --num-steps 1"]
WRONG += ["--num-steps 1000000000 --total-timesteps 1000000000000", "--num-steps 100000000", "--num-threads 100000"]
WRONG += ["--num-minibatches 0", "--num-minibatches 3", "--total-timesteps 0", "--total-timesteps 7", "surplus"]
WRONG += ["--exploration-fraction 0", "--exploration-fraction 1.5", "--checkpoint-minutes 0", "--weight-decay 1"]
WRONG += ["--seed -1", "--seed 2147483648", "--num-threads -1", "--bf16 maybe", "--vec-env none", "--gamma"]
WRONG += ["--device warp", "--device cuda:99", "--device meta", "--device hpu", "--env-id CartPole-v1", "--env-id Pnog"]
WRONG += ["--log-dir file", "--log-dir file/below", "--log-dir /proc/logs", "--resume nowhere", "--frobnicate 3"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_told_in_one_line_and_costs_nothing(cli, monkeypatch, tmp_path, wrong):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    code, out = cli(*flags(**TINY), *wrong.split())
    assert is_error(code) and "---" not in code and out == ""
    assert any(word in code for word in wrong.split()[:2])
    assert run_in(".") == Path("file")
