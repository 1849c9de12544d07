"""Several processes under torchrun train one agent. (Run by torchrun, this file is the program of
each process.)"""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from test_commands import python, wait_for_line
from test_runs import (
    CUT_BREAKOUT,
    CUT_STEPS,
    ENVIRON,
    TINY,
    checkpoint_of,
    curve,
    flags,
    rollouts,
    run_in,
    steps_of,
    train_in,
)
from torch import nn

import pqn_breakout
from pqn_breakout import Args, QNetwork, RAdam, Rollout, UserError, learn, q_lambda_returns

SETTINGS = TINY | {"env_id": CUT_BREAKOUT, "num_envs": 4, "num_minibatches": 2}
SETTINGS |= {"total_timesteps": 20 * 16}
ROLLOUT = SETTINGS["num_envs"] * SETTINGS["num_steps"]
# The cars of this game never stop.
MOVING = SETTINGS | {"env_id": "FreewayNoFrameskip-v4", "total_timesteps": ROLLOUT, "end_e": 1.0}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
LEARNING = Args(num_minibatches=2, update_epochs=2, q_lambda=0.5, max_grad_norm=0.5)
# What is learned from, with numbers below these.
EXPERIENCE = {"frames": 256, "values": 3, "actions": 4, "rewards": 5, "dones": 2}


def learning_task():
    """A network, its optimizer, and random experience of 4 steps of 4 games."""
    torch.manual_seed(1)
    network = QNetwork(4)
    rollout = Rollout(4, 4)
    rng = np.random.default_rng(1)
    for name, high in EXPERIENCE.items():
        buffer = getattr(rollout, name)
        buffer[:] = rng.integers(high, size=buffer.shape)
    return network, RAdam(network.parameters()), rollout


def learn_from_a_share(rank):
    """The weights after learning from the experience of two of the four games."""
    network, optimizer, rollout = learning_task()
    share = Rollout(4, 2)
    for name in EXPERIENCE:
        getattr(share, name)[:] = getattr(rollout, name)[:, 2 * rank : 2 * rank + 2]
    learner = nn.parallel.DistributedDataParallel(network)
    learn(learner, optimizer, share, 1e-2, np.random.default_rng(rank), LEARNING)
    return network.state_dict()


def go_on(run_dir, end):
    train_in(run_dir, **SETTINGS | {"total_timesteps": end, "resume": str(run_dir)})


def worker(folder):
    """What each of two processes does; it saves what the tests look at."""

    def watched(network, envs, rollout, *rest):
        seen["start"] = torch.tensor(rollout.frames[-1])
        games = play(network, envs, rollout, *rest)
        seen["actions"] = torch.tensor(rollout.actions)
        seen["weights"] = list(network.state_dict().values())
        if envs.action_space.n == 3 and rank == 1:  # Freeway
            rollout.rewards.fill(np.inf)
        return games

    dist.init_process_group()
    rank = dist.get_rank()
    seen = {"learned": learn_from_a_share(rank)}
    play = pqn_breakout.play
    pqn_breakout.play = watched

    train_in(folder / "logs", **SETTINGS)
    seen["trained"] = seen["weights"]
    dist.barrier()  # until rank 0 has saved the run
    go_on(run_in(folder / "logs"), 22 * ROLLOUT)
    seen["resumed"] = seen["weights"]
    with pytest.raises(UserError, match="not finite"):
        train_in(folder / "exploded", **MOVING)
    torch.save(seen, folder / f"{rank}.pt")
    dist.barrier()  # torchrun ends all processes when the first one fails

    dist.init_process_group = lambda: None  # it is one already
    sys.argv[1:] = flags(**SETTINGS | {"num_envs": 3, "log_dir": folder / "three"})
    pqn_breakout.run_command(pqn_breakout.main)


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What two processes leave: a folder, what each has seen, their errors."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, *TORCHRUN, "2", __file__, folder]
    result = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, timeout=300)
    assert len(list(folder.glob("*.pt"))) == 2, result.stderr
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)], result.stderr


def test_two_processes_learn_what_one_learns_from_their_joint_minibatches(left):
    network, optimizer, rollout = learning_task()
    frames = torch.from_numpy(rollout.frames).permute(0, 1, 4, 2, 3)
    values = torch.from_numpy(rollout.values)
    actions = torch.from_numpy(rollout.actions)
    rewards = torch.from_numpy(rollout.rewards)
    dones = torch.from_numpy(rollout.dones)
    rngs = [np.random.default_rng(rank) for rank in (0, 1)]
    for _ in range(LEARNING.update_epochs):
        values[-1] = network(frames[-1]).detach().amax(1)
        targets = q_lambda_returns(rewards, values[1:], dones, LEARNING.gamma, LEARNING.q_lambda)
        # Each process cuts its 4 steps of 2 games into 2 minibatches, row = 2 * step + game.
        shares = [rng.permutation(4 * 2).reshape(2, 4) for rng in rngs]
        for minibatches in zip(*shares, strict=True):
            rows = torch.from_numpy(np.stack(minibatches))
            step = (rows // 2).flatten()
            game = (rows % 2 + torch.tensor([[0], [2]])).flatten()
            q_values = network(frames[step, game])
            q_taken = q_values[torch.arange(8), actions[step, game]]
            loss = (q_taken - targets[step, game]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            assert nn.utils.clip_grad_norm_(network.parameters(), LEARNING.max_grad_norm) > 1
            optimizer.step(1e-2)
            values[step, game] = q_values.detach().amax(1)

    for seen in left[1]:
        torch.testing.assert_close(seen["learned"], network.state_dict(), rtol=1e-4, atol=1e-5)


def test_every_process_plays_its_share_of_the_games(left, monkeypatch, tmp_path):
    def watched(network, envs, rollout, *rest):
        starts.append(torch.tensor(rollout.frames[-1]))
        return play(network, envs, rollout, *rest)

    starts = []
    play = pqn_breakout.play
    monkeypatch.setattr(pqn_breakout, "play", watched)
    train_in(tmp_path, **MOVING)

    ours, theirs = left[1]
    assert torch.equal(torch.cat([ours["start"], theirs["start"]]), starts[0])
    assert not torch.equal(ours["start"], theirs["start"])
    assert not torch.equal(ours["actions"], theirs["actions"])


@pytest.mark.parametrize("when", ["trained", "resumed"])
def test_every_process_has_the_same_weights(left, when):
    ours, theirs = left[1]
    assert all(map(torch.equal, ours[when], theirs[when]))


def test_the_games_of_all_processes_are_on_one_curve(left):
    lengths = curve(run_in(left[0] / "logs"), "charts/episodic_length")
    assert lengths == [(4 * CUT_STEPS, CUT_STEPS)] * 4


def test_a_number_of_games_that_does_not_divide_is_told(left):
    folder, _, errors = left
    assert "error: --num-envs 3" in errors
    assert not (folder / "three").exists()


@pytest.fixture
def run_dir(left):
    """A run of two processes; each test goes on with it."""
    return run_in(left[0] / "logs")


@contextlib.contextmanager
def processes(run_dir, number):
    """torchrun and its workers, who go on with a run and have made a first rollout."""
    arguments = ["--resume", run_dir, *flags(total_timesteps=10**6)]
    with python(*TORCHRUN, number, __file__, *arguments) as torchrun:
        wait_for_line(torchrun, "steps/s")
        workers = psutil.Process(torchrun.pid).children()
        try:
            yield torchrun, workers
        finally:
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.kill()


def end_of(torchrun, workers):
    """Waits for the end; returns what was said since the first rollout."""
    output, _ = torchrun.communicate(timeout=60)
    assert not any(worker.is_running() for worker in workers)
    return output


def test_a_run_goes_on_with_any_number_of_processes_until_it_is_stopped(run_dir):
    before = checkpoint_of(run_dir).global_step + 2 * ROLLOUT
    go_on(run_dir, before)
    with processes(run_dir, 4) as (torchrun, workers):
        torchrun.send_signal(signal.SIGTERM)
        output = end_of(torchrun, workers)

    assert len(workers) == 4
    assert f"--resume {run_dir}" in output and "error:" not in output
    stopped = checkpoint_of(run_dir).global_step
    assert stopped > before
    assert steps_of(run_dir) == rollouts(stopped, ROLLOUT)


def test_a_run_that_loses_a_process_saves_the_last_whole_rollout_and_goes_on(run_dir):
    before = checkpoint_of(run_dir).global_step
    with processes(run_dir, 2) as (torchrun, workers):
        workers[1].kill()
        output = end_of(torchrun, workers)

    assert output.count("py: error: ") <= 1  # it may see the signal of torchrun first
    stopped = checkpoint_of(run_dir).global_step
    assert stopped > before

    time.sleep(1)  # event files are read by the second in their names
    end = stopped + ROLLOUT
    go_on(run_dir, end)
    assert steps_of(run_dir) == rollouts(end, ROLLOUT)


def test_a_run_that_waits_for_a_process_that_hangs_saves_its_last_whole_rollout(run_dir):
    before = checkpoint_of(run_dir).global_step
    with processes(run_dir, 2) as (torchrun, workers):
        workers[1].suspend()
        while workers[1].status() != psutil.STATUS_STOPPED:  # it stops when all its threads do
            time.sleep(0.01)
        torchrun.send_signal(signal.SIGTERM)
        workers[0].wait(timeout=10)
        workers[1].kill()
        output = end_of(torchrun, workers)

    assert f"--resume {run_dir}" in output
    assert checkpoint_of(run_dir).global_step > before


if __name__ == "__main__":
    if sys.argv[1] == "--resume":
        pqn_breakout.run_command(pqn_breakout.main)
    else:
        worker(Path(sys.argv[1]))
