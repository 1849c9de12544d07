"""The program and what is around it: arguments, signals, streams, interpreters."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_files import LINUX
from test_runs import (
    ENVIRON,
    PROGRAM,
    ROLLOUT,
    TINY,
    checkpoint_of,
    flags,
    is_line,
    rollouts,
    run_in,
    steps_of,
    train_in,
)

import pqn_breakout
from pqn_breakout import QNetwork, UserError

pytestmark = pytest.mark.usefixtures("small_network")


# --- Arguments ---
WRONG_VALUES = {  # of each of these options
    "num-envs num-steps update-epochs num-minibatches": "0 -2 1.5 two",
    "gamma q-lambda start-e end-e": "-0.1 1.1 nan",
    "learning-rate max-grad-norm checkpoint-minutes": "0 -1 nan inf",
    "num-envs num-steps total-timesteps seed num-threads": "12345678901234567890",
    "exploration-fraction": "-0.1 1.5",
    "seed num-threads": "-1 1.5",
    "total-timesteps": "0 7",
    "bf16 vec-env": "maybe",
    "device": "warp cuda:99 meta hpu",
    "env-id": "CartPole-v1 Pnog",
    "log-dir": "file file/below /proc/logs",
}
WRONG = [
    *(
        f"--{name} {value}"
        for names, values in WRONG_VALUES.items()
        for name in names.split()
        for value in values.split()
    ),
    "--num-minibatches 3",
    "--num-envs 1000000000 --num-steps 1",
    "--num-steps 1000000000 --total-timesteps 1000000000000",
    "--num-envs 1000000 --num-steps 1000000 --total-timesteps 1000000000000",  # memory
    "--resume nowhere",
    "--gamma",
    "--weight-decay 1",
    "surplus",
]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_is_told_by_name_and_costs_nothing(cli, monkeypatch, tmp_path, wrong):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    code, out, told = cli(*wrong.split(), **TINY)

    assert code == 2 or is_line(told)
    name, *value = wrong.removeprefix("--").split()[:2]
    assert name in told or name.replace("-", "_") in told or value[0] in told
    assert "Traceback" not in told
    assert out == "" and run_in(".") == Path("file")


@pytest.mark.parametrize(
    "wrong, bound",
    [
        ("--num-envs 0", "greater than or equal to 1"),
        ("--gamma 1.1", "less than or equal to 1"),
        ("--seed -1", "greater than or equal to 0"),
    ],
)
def test_a_wrong_number_is_told_with_its_bound(cli, wrong, bound):
    code, _, told = cli(*wrong.split(), **TINY)
    assert code == 2
    assert bound in told and f"input_value={wrong.split()[1]}," in told


@pytest.mark.parametrize(
    "mistyped, nearest",
    [
        ("BreakoutNoFrameSkip-v4", "BreakoutNoFrameskip-v4"),
        ("Breakout", "ALE/Breakout-v5"),
        ("breakout", "ALE/Breakout-v5"),
        ("ALE/Breakout", "ALE/Breakout-v5"),
        ("PongNoFrameskip", "PongNoFrameskip-v4"),
    ],
)
def test_a_mistyped_game_is_answered_with_the_nearest(cli, mistyped, nearest):
    code, _, told = cli("--env-id", mistyped)
    assert code != 0
    assert f"--env-id {mistyped}:" in told and f"the nearest is {nearest}" in told


def test_a_game_that_skips_a_random_number_of_frames_is_told_as_such(cli):
    _, _, told = cli("--env-id", "Breakout-v0")
    assert is_line(told, "--env-id Breakout-v0: skips a random number of frames")


def test_an_empty_folder_to_resume_is_refused_anywhere(cli, monkeypatch, tmp_path):
    monkeypatch.chdir(train_in(tmp_path))  # with a checkpoint.pth in it
    before = os.listdir()
    code, out, told = cli("--resume", "")

    assert code == 2 and "resume" in told and out == ""
    assert os.listdir() == before


def test_a_launchers_variable_without_the_others_is_told(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    _, out, told = cli(**TINY, log_dir=tmp_path / "logs")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process of several lets go

    assert is_line(told, "WORLD_SIZE") and out == ""
    assert not (tmp_path / "logs").exists()


def test_an_error_keeps_its_traceback_where_python_runs_for_developers(cli, monkeypatch):
    monkeypatch.setattr(sys, "flags", SimpleNamespace(dev_mode=True))
    with pytest.raises(UserError, match="nowhere"):
        cli("--resume", "nowhere")


# --- The program that calls, and its settings ---
def test_train_and_the_program_leave_the_process_as_it_was(cli, tmp_path):
    def state():
        hooks = sys.excepthook, threading.excepthook, sys.unraisablehook, sys.stdout, sys.stderr
        threads = torch.get_num_threads(), threading.active_count()
        return hooks, threads, list(map(signal.getsignal, signal.valid_signals()))

    before = state()
    random_before = torch.get_rng_state()
    train_in(tmp_path)
    cli(**TINY, log_dir=tmp_path)
    for name in ("vec_env", "env_id", "device"):
        with pytest.raises(ValueError, match="nonsense"):
            train_in(tmp_path / "none", **{name: "nonsense"})

    assert state() == before
    assert torch.equal(torch.get_rng_state(), random_before)
    assert not (tmp_path / "none").exists()


@LINUX
def test_a_signal_that_the_parent_ignores_stays_ignored(cli, on_step, tmp_path):
    def hang_up(*_):
        os.kill(os.getpid(), signal.SIGHUP)

    on_step(hang_up)
    default = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    code, _, _ = cli(**TINY, log_dir=tmp_path)
    signal.signal(signal.SIGHUP, default)

    assert code == 0


# --- Signals ---
@contextlib.contextmanager
def python(*argv, env=ENVIRON):
    """A program in a process of its own."""
    command = [sys.executable, *map(str, argv)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=env, **streams) as process:
        alarm = threading.Timer(120, process.kill)  # so that no test waits for ever
        alarm.start()
        try:
            yield process
        finally:
            alarm.cancel()
            process.kill()


def wait_for_line(process, text):
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"{text} was not said")


class Stop:
    """Sends a signal and waits for the end: what the program says, and the seconds until then."""

    def __init__(self, process, number, run_dir):
        start = time.monotonic()
        process.send_signal(number)
        self.answer = process.stdout.readline()
        self.seconds_to_answer = time.monotonic() - start
        self.output = self.answer + process.stdout.read()
        self.code = process.wait()
        self.seconds = time.monotonic() - start
        self.number = number
        self.run_dir = run_dir
        self.step = checkpoint_of(run_dir).global_step


LARGE = {"num_envs": 4, "num_steps": 4000}  # a rollout takes long
SMALL = {name: TINY[name] for name in LARGE}


@pytest.fixture(scope="module")
def stops(tmp_path_factory):
    """A run that is stopped in its first rollout, by a second signal while it saves, as it learns,
    and as its games are played apart."""
    folder = tmp_path_factory.mktemp("run")
    stops = {}
    settings = TINY | LARGE | {"total_timesteps": 10**6, "log_dir": folder}
    with python(PROGRAM, *flags(**settings)) as process:
        wait_for_line(process, "PQN on")
        time.sleep(1)
        stops["first rollout"] = Stop(process, signal.SIGHUP, run_in(folder))

    run_dir = run_in(folder)
    fifo = run_dir / "best_model.pth.new"
    with python(PROGRAM, "--resume", run_dir, *flags(**SMALL)) as process:
        wait_for_line(process, "step ")
        os.mkfifo(fifo)  # whoever writes to it waits for ever
        process.send_signal(signal.SIGHUP)
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)  # of the same terminal, as it closes
        stops["second"] = Stop(process, signal.SIGINT, run_dir)
    fifo.unlink()

    with python(PROGRAM, "--resume", run_dir) as process:
        line = wait_for_line(process, "step ")
        stops["learning"] = Stop(process, signal.SIGINT, run_dir)
        stops["learning"].told = int(line.split()[1].replace(",", ""))

    with python(PROGRAM, "--resume", run_dir, *flags(**LARGE)) as process:
        wait_for_line(process, "apart")
        stops["apart"] = Stop(process, signal.SIGTERM, run_dir)
    return stops


FIRST = ["learning", "apart", "first rollout"]


@LINUX
@pytest.mark.parametrize("phase", FIRST)
def test_a_signal_is_answered_at_once_and_ends_the_program_soon(stops, phase):
    stop = stops[phase]
    assert stop.code == 128 + stop.number
    assert "second signal" in stop.answer and stop.seconds_to_answer < 5
    assert stop.seconds < 10


@LINUX
@pytest.mark.parametrize("phase", [*FIRST, "second"])
def test_a_program_that_is_stopped_says_how_to_go_on_and_nothing_of_errors(stops, phase):
    stop = stops[phase]
    assert f"--resume {stop.run_dir}" in stop.output.splitlines()[-1]
    assert "Traceback" not in stop.output and "rror" not in stop.output


@LINUX
def test_a_second_signal_ends_the_program_without_saving(stops):
    stop = stops["second"]
    assert stop.code == 128 + signal.SIGINT and stop.seconds < 2
    assert stop.step == stops["first rollout"].step


@LINUX
def test_a_signal_saves_the_last_whole_rollout(stops):
    stop = stops["learning"]
    assert stop.step >= stop.told and stop.step % ROLLOUT == 0


@LINUX
def test_games_played_apart_and_half_a_rollout_are_not_counted(stops):
    assert stops["apart"].step == stops["learning"].step
    assert stops["first rollout"].step == 0


@LINUX
def test_a_run_stopped_again_and_again_ends_with_one_whole_curve(stops, monkeypatch):
    monkeypatch.setattr(pqn_breakout, "QNetwork", QNetwork)  # that of the processes
    run_dir = stops["apart"].run_dir
    end = stops["apart"].step + 2 * ROLLOUT
    train_in(run_dir, resume=str(run_dir), total_timesteps=end)

    assert steps_of(run_dir) == rollouts(end)
    assert checkpoint_of(run_dir).updates == end // ROLLOUT * TINY["update_epochs"]


@LINUX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_waits_for_others_ends_soon_after_a_signal(number):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    first_of_two = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environ = ENVIRON | first_of_two | {"MASTER_PORT": str(address[1])}
    with python(PROGRAM, *flags(**TINY), env=environ) as process:
        while socket.socket().connect_ex(address):  # it does not yet listen
            time.sleep(0.1)
        time.sleep(0.5)
        process.send_signal(number)

        assert process.wait(10) != 0
        assert "Traceback" not in process.stdout.read()


# --- Streams and interpreters ---
@LINUX
def test_a_training_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    command = f'"{sys.executable}" "{PROGRAM}" {" ".join(flags(**TINY))} 2>&- | head -1'
    bash = ["bash", "-o", "pipefail", "-c", command]
    result = subprocess.run(bash, cwd=tmp_path, env=ENVIRON, capture_output=True)

    assert (result.returncode, result.stderr) == (0, b"")
    assert checkpoint_of(run_in(tmp_path / "logs")).global_step == 40


# Runs the program again and again in one interpreter, which goes on to be used.
INTERPRETER = """
import os, runpy, signal, sys
vars(signal).pop("SIGHUP", None)  # as on Windows
vars(os).pop("setpriority", None)
program, folder, *flags = sys.argv[1:]

def run(log_dir, *argv, path=program, module=None):
    sys.argv = [program, *argv, *flags, "--log-dir", os.path.join(folder, log_dir)]
    try:
        if module:
            sys.argv.insert(0, module)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as stop:
        print("code", stop.code)

class Editor:  # IDLE's stream has little more
    encoding = "utf-8"
    def write(self, text):
        texts.append(text)
    def flush(self):
        pass

run("none", "--gamma", "2")
print("waits", os.environ["GOMP_SPINCOUNT"])
run("łóg")
run("profiled", module="cProfile")
texts = []
shell = sys.stdout, sys.stderr
sys.stdout = sys.stderr = Editor()
run("editor")
sys.stdout = sys.stderr = None
run("service")
sys.stdout, sys.stderr = shell
print("editor", any("PQN on 2 games" in text for text in texts))
"""


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    """What an interpreter prints that runs the program again and again, and its folder."""
    folder = tmp_path_factory.mktemp("interpreter")
    command = [sys.executable, "-c", INTERPRETER, PROGRAM, folder, *flags(**TINY)]
    environ = ENVIRON | {"PYTHONIOENCODING": "cp1252"}
    result = subprocess.run(command, env=environ, capture_output=True, encoding="cp1252")
    assert result.returncode == 0, result.stderr
    return result, folder


@pytest.mark.parametrize(
    "kind, printed",
    [
        ("łóg", r"\u0142ó"),  # without POSIX and without Unicode
        ("profiled", "function calls"),
        ("editor", "editor True\n"),  # with streams of another class
        ("service", ""),  # with none
    ],
)
def test_the_program_works_in_any_kind_of_interpreter(interpreter, kind, printed):
    result, folder = interpreter
    assert checkpoint_of(run_in(folder / kind)).global_step == 40
    assert printed in result.stdout


def test_a_wrong_argument_of_the_program_is_no_traceback_and_names_no_page(interpreter):
    result, folder = interpreter
    assert "code 2\n" in result.stdout and not (folder / "none").exists()
    assert "gamma" in result.stderr
    assert "Traceback" not in result.stderr and "pydantic.dev" not in result.stderr


def test_only_the_program_lets_threads_sleep_that_wait(interpreter):
    assert "waits 10000\n" in interpreter[0].stdout
    assert "GOMP_SPINCOUNT" not in os.environ
