"""Several processes under torchrun train one agent. (Run by torchrun, this file is the program of each process.)"""

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
from test_runs import CUT_BREAKOUT, ENVIRON, OFTEN, TINY, checkpoint_of, curve, flags, run_in, steps_of
from torch import nn

import pqn_breakout
from pqn_breakout import Args, QNetwork, RAdam, Rollout, UserError, learn, q_lambda_returns, train

SETTINGS = TINY | {"env_id": CUT_BREAKOUT, "num_envs": 4, "num_minibatches": 2, "total_timesteps": 20 * 16}
MOVING = SETTINGS | {"env_id": "FreewayNoFrameskip-v4", "total_timesteps": 16, "end_e": 1.0}  # its cars never stop
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
LEARNING = Args(num_minibatches=2, update_epochs=2, q_lambda=0.5, max_grad_norm=0.5)


def learning_task() -> tuple[QNetwork, RAdam, Rollout]:
    torch.manual_seed(1)
    network, rollout, rng = QNetwork(4), Rollout(4, 4), np.random.default_rng(1)
    for name, high in {"frames": 256, "values": 3, "actions": 4, "rewards": 5, "dones": 2}.items():
        buffer = getattr(rollout, name)
        buffer[:] = rng.integers(high, size=buffer.shape)
    return network, RAdam(network.parameters()), rollout


def worker(folder: Path) -> None:
    """What each of two processes does; it saves what the tests look at."""

    def watched(network, envs, rollout, *rest):
        seen["start"] = torch.tensor(rollout.frames[-1])
        games = play(network, envs, rollout, *rest)
        seen["actions"], seen["weights"] = torch.tensor(rollout.actions), list(network.state_dict().values())
        if envs.action_space.n == 3 and rank == 1:  # Freeway
            rollout.rewards.fill(np.inf)
        return games

    dist.init_process_group()
    rank, play = dist.get_rank(), pqn_breakout.play
    pqn_breakout.play = watched
    network, optimizer, rollout = learning_task()
    seen = {"learned": network.state_dict()}
    for name, buffer in vars(rollout).items():
        setattr(rollout, name, buffer[:, 2 * rank : 2 * rank + 2].copy())
    learner = nn.parallel.DistributedDataParallel(network)
    learn(learner, optimizer, rollout, 1e-2, np.random.default_rng(rank), LEARNING)
    train(Args(**SETTINGS, log_dir=str(folder / "logs")))
    seen["trained"] = seen["weights"]
    train(Args(**SETTINGS | {"total_timesteps": 22 * 16}, resume=str(run_in(folder / "logs"))))
    seen["resumed"] = seen["weights"]
    with pytest.raises(UserError, match="not finite"):
        train(Args(**MOVING, log_dir=str(folder / "exploded")))
    torch.save(seen, folder / f"{rank}.pt")
    dist.init_process_group = lambda: None  # it is one already
    sys.argv[1:] = flags(**SETTINGS | {"num_envs": 3, "log_dir": folder / "three"})
    pqn_breakout.run_command(pqn_breakout.main)


@pytest.fixture(scope="module")
def left(tmp_path_factory) -> tuple[Path, list[dict], str]:
    """What two processes leave: a folder, what each has seen, their errors."""
    folder = tmp_path_factory.mktemp("processes")
    result = subprocess.run(
        [*TORCHRUN, "2", __file__, folder], env=ENVIRON, capture_output=True, text=True, timeout=300
    )
    assert len(list(folder.glob("*.pt"))) == 2, result.stderr
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)], result.stderr


def test_two_processes_learn_what_one_learns_from_their_joint_minibatches(left):
    network, optimizer, rollout = learning_task()
    frames, values, _, actions, rewards, dones = map(torch.from_numpy, vars(rollout).values())
    frames = frames.permute(0, 1, 4, 2, 3)
    rngs = [np.random.default_rng(rank) for rank in (0, 1)]
    for _ in range(2):
        values[-1] = network(frames[-1]).detach().amax(1)
        targets = q_lambda_returns(rewards, values[1:], dones, LEARNING.gamma, 0.5)
        for rows in np.stack([rng.permutation(4 * 2).reshape(2, 4) for rng in rngs], axis=1):
            at = torch.from_numpy(rows // 2).flatten(), torch.from_numpy(rows % 2 + [[0], [2]]).flatten()
            q_values = network(frames[at])
            loss = (q_values[torch.arange(8), actions[at]] - targets[at]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            assert nn.utils.clip_grad_norm_(network.parameters(), 0.5) > 1
            optimizer.step(1e-2)
            values[at] = q_values.detach().amax(1)
    for seen in left[1]:
        torch.testing.assert_close(seen["learned"], network.state_dict(), rtol=1e-4, atol=1e-5)


def test_every_process_plays_its_share_of_the_games_and_has_the_same_weights(left, monkeypatch, tmp_path):
    starts, play, (ours, theirs) = [], pqn_breakout.play, left[1]
    monkeypatch.setattr(
        pqn_breakout, "play", lambda *args: (starts.append(torch.tensor(args[2].frames[-1])), play(*args))[1]
    )
    train(Args(**MOVING, log_dir=str(tmp_path)))
    assert torch.equal(torch.cat([ours["start"], theirs["start"]]), starts[0])
    assert not torch.equal(ours["start"], theirs["start"]) and not torch.equal(ours["actions"], theirs["actions"])
    for name in ("trained", "resumed"):
        assert all(map(torch.equal, ours[name], theirs[name])), name


def test_a_number_of_games_that_does_not_divide_is_told(left):
    assert "error: --num-envs 3" in left[2] and not (left[0] / "three").exists()


def interrupt(run_dir: Path, num_processes: int, end) -> str:
    """Resumes the run with so many processes, calls `end(torchrun, workers)` once they train; returns what they say."""
    before = checkpoint_of(run_dir)["global_step"]
    command = [*TORCHRUN, str(num_processes), __file__, "--resume", run_dir, *flags(**OFTEN, total_timesteps=10**6)]
    process = subprocess.Popen(command, env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while checkpoint_of(run_dir)["global_step"] == before:
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0]
    workers = psutil.Process(process.pid).children()
    end(process, workers)
    output, _ = process.communicate(timeout=60)
    assert len(workers) == num_processes and not any(worker.is_running() for worker in workers)
    return output


def test_a_run_goes_on_with_any_number_of_processes_on_one_curve_until_it_is_stopped_or_one_dies(left):
    run_dir = run_in(left[0] / "logs")
    assert curve(run_dir, "charts/episodic_length") == [(240, 60)] * 4  # those of both processes
    train(Args(**SETTINGS | {"total_timesteps": 24 * 16}, resume=str(run_dir)))
    output = interrupt(run_dir, 4, lambda torchrun, _: torchrun.send_signal(signal.SIGTERM))
    assert f"--resume {run_dir}" in output and "error:" not in output
    stopped = checkpoint_of(run_dir)["global_step"]
    assert steps_of(run_dir) == list(range(16, stopped + 1, 16))
    assert "lost another" in interrupt(run_dir, 2, lambda _, workers: workers[1].kill())
    assert checkpoint_of(run_dir)["global_step"] > stopped


if __name__ == "__main__":
    if sys.argv[1] == "--resume":
        pqn_breakout.run_command(pqn_breakout.main)
    worker(Path(sys.argv[1]))
