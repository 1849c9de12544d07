"""What all tests share: their environment, and the program called without starting a process."""

import os
import signal
import sys
from itertools import count

# Small networks on shared machines: a second thread would wait more than it works. Subprocesses
# read the variable. The other one the program sets for itself.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYDANTIC_ERRORS_INCLUDE_URL"] = "0"

import pytest
import torch

import pqn_breakout

torch.set_num_threads(1)

# The programs leave signals ignored that they find so, as in the background of a script: tests may
# run there, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module")
def small_network():
    """Where files are tested and not learning, a small network is as good, and quick."""
    from test_agent import Table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pqn_breakout, "QNetwork", Table)
        yield


@pytest.fixture
def cli(monkeypatch, capsys):
    """Calls the program; returns its exit code, what it prints, and what it tells of an error."""
    from test_runs import flags

    def call(*argv, **settings):
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(sys, "argv", ["pqn_breakout.py", *flags(**settings), *map(str, argv)])
            pqn_breakout.run_command(pqn_breakout.main)
            sys.exit(0)
        out, err = capsys.readouterr()
        code = stop.value.code
        if isinstance(code, str):  # Python would print the line and exit with 1
            assert err == ""
            return 1, out, code
        return code, out, " ".join(err.replace("│", " ").split())  # the text of tyro's box

    return call


@pytest.fixture
def on_step(monkeypatch):
    """`on_step(hook)`: from now on `hook(rewards, infos)` is called after each step, or once, after
    the step with the number `at`."""
    step_wait = pqn_breakout.AtariVecEnv.step_wait

    def install(hook, at=None):
        def hooked(envs):
            observations, rewards, dones, infos = step_wait(envs)
            if at in (None, next(numbers)):
                hook(rewards, infos)
            return observations, rewards, dones, infos

        numbers = count(1)
        monkeypatch.setattr(pqn_breakout.AtariVecEnv, "step_wait", hooked)

    return install
