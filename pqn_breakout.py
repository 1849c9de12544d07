"""PQN on Atari Breakout in one script: Q-learning without target network and replay buffer.

PQN is the Parallelised Q-Network of "Simplifying Deep Temporal Difference Learning" (Gallici et
al., ICLR 2025, https://arxiv.org/abs/2407.04811). It plays many games side by side. After each
rollout of `num_steps` steps it makes gradient steps on (Q(s_t, a_t) - R_t)^2 with the targets

    R_t = r_t + gamma * ((1 - lambda) * max_a Q(s_{t+1}, a) + lambda * R_{t+1}),
    R_t = r_t                                           where step t ends an episode,

and forgets the rollout. With lambda = 0 this is TD(0). LayerNorm in the network and the many games
keep it stable.

    python pqn_breakout.py    trains an agent; --help lists every option
    python evaluate.py        plays whole games with the best model

The record, as the mean of the last 100 training games of three seeds after 2,000,000 steps, is 375
points with --q-lambda 0.3 --gamma 0.997 --update-epochs 2: 48 minutes on one core of a Zen 5. A
human tester has 32. TD(0), the defaults, comes to 365 in 60 minutes.
"""

import os

if __name__ == "__main__":  # The libraries read these once, when they are loaded.
    # A thread that waits for another one soon sleeps. Otherwise it would spin for milliseconds, on
    # a core that another program may need.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")

import atexit
import contextlib
import difflib
import io
import json
import math
import signal
import sys
import threading
import time
import timeit
import zipfile
from collections import deque
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import ale_py
import gymnasium as gym
import joblib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from filelock import FileLock, SoftFileLock, Timeout
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
)
from pydantic.dataclasses import dataclass
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecTransposeImage
from torch import nn
from torch.utils.tensorboard import SummaryWriter

# Types and their bounds. A dataclass of them checks its values when it is made, from options as
# well as from a file.
CHECKED = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
Count = Annotated[StrictInt, Field(ge=1, le=10**6)]
Natural = Annotated[StrictInt, Field(ge=0, le=10**12)]
Fraction = Annotated[StrictFloat, Field(ge=0, le=1)]
Positive = Annotated[StrictFloat, Field(ge=1e-9, le=1e9)]
Score = Annotated[StrictFloat, Field(ge=-1e9, le=1e9)]
Mean = Annotated[StrictFloat, Field(le=1e9)]  # -infinity where there is none
Text = Annotated[str, Field(min_length=1)]
Game = Annotated[str, AfterValidator(lambda env_id: find_game(env_id).id)]
Tensors = dict[str, torch.Tensor]


@dataclass(config=CHECKED)
class Args:
    """Train PQN on an Atari game.

    Recommended: --q-lambda 0.3 --update-epochs 2, and on Breakout --gamma 0.997.
    """

    # tyro shows the comments behind the options as their help.
    env_id: Game = "BreakoutNoFrameskip-v4"  # any Atari game of ale-py
    seed: Natural = 1  # of network, exploration, minibatches and games
    total_timesteps: Natural = 2_000_000  # steps of all games together, 4 frames each
    learning_rate: Positive = 1e-3  # step size of RAdam at the start; it falls linearly to zero
    num_envs: Count = 32  # games in parallel, of all processes together
    num_steps: Count = 32  # steps of each game in a rollout
    num_minibatches: Count = 32  # minibatches that a rollout is cut into
    update_epochs: Count = 3  # passes over a rollout, each with new targets
    gamma: Fraction = 0.99  # discount factor
    q_lambda: Fraction = 0.0  # lambda of the returns; 0 is TD(0)
    start_e: Fraction = 1.0  # epsilon at the start
    end_e: Fraction = 0.01  # epsilon after the exploration phase
    exploration_fraction: Fraction = 0.05  # part of the training until epsilon is end_e
    max_grad_norm: Positive = 10.0  # gradients are clipped to this norm
    device: Text = "auto"  # cpu, cuda, cuda:1, mps...; auto is CUDA, or else the CPU
    bf16: Literal["auto", "on", "off"] = "auto"  # bfloat16; auto where the device has it
    num_threads: Natural = 0  # CPU threads of a process; 0: one or all cores, what is faster now
    # torch.compile, on CUDA with CUDA graphs; slower on a CPU; anew when the threads change
    compile: StrictBool = False
    vec_env: Literal["native", "sb3"] = "native"  # ALE's vector environment, or SB3's pipeline
    log_dir: Text = "logs"  # where the run's folder is made
    resume: Text | None = None  # folder of a run to go on with
    checkpoint_minutes: Positive = 5.0  # minutes between checkpoints


# --- The algorithm ---
FRAMES = 4  # the last ones that the agent sees, the newest last
SIDE = 84  # pixels, height and width of a frame
MAX_FRAMES = 65_536  # of a training game; from then on Breakout takes no input


def normalise(ln, x):
    """relu(ln(x)), over the channels of `(batch, channels, height, width)` at each position."""
    return F.relu(ln(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class QNetwork(nn.Module):
    """Nature CNN with LayerNorm.

    From uint8 frames `(batch, 4, 84, 84)` to float32 Q-values `(batch, num_actions)`.
    """

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        self.conv1 = nn.Conv2d(FRAMES, 32, 8, stride=4)
        self.ln1 = nn.LayerNorm(32)
        self.conv2 = nn.Conv2d(32, 64, 4, stride=2)
        self.ln2 = nn.LayerNorm(64)
        self.conv3 = nn.Conv2d(64, 64, 3)
        self.ln3 = nn.LayerNorm(64)
        self.fc1 = nn.Linear(64 * 7 * 7, 512)
        self.ln_fc = nn.LayerNorm(512)
        self.fc2 = nn.Linear(512, num_actions)
        for layer in (self.conv1, self.conv2, self.conv3, self.fc1, self.fc2):
            # The last layer starts near zero: there is less to unlearn before the first reward.
            nn.init.orthogonal_(layer.weight, 0.01 if layer is self.fc2 else math.sqrt(2))
            nn.init.zeros_(layer.bias)

    def forward(self, frames):
        x = frames.contiguous(memory_format=torch.channels_last)
        x = x.to(torch.bfloat16 if self.bf16 else torch.float32)
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            # Scaling the weights saves a pass over the frames. bfloat16 holds 0..255 exactly.
            x = F.conv2d(x, self.conv1.weight / 255, self.conv1.bias, self.conv1.stride)
            x = self.conv2(normalise(self.ln1, x))
            x = self.conv3(normalise(self.ln2, x))
            x = normalise(self.ln3, x).permute(0, 2, 3, 1).flatten(1)
            x = F.relu(self.ln_fc(self.fc1(x)))
        return self.fc2(x.float())  # Q-values of two actions differ by less than bfloat16 resolves


class RAdam(torch.optim.Adam):
    """Rectified Adam (Liu et al., ICLR 2020), as `torch.optim.RAdam`, on Adam's fused kernel."""

    def __init__(self, params):
        super().__init__(params, fused=True)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.steps = 0  # a number of Python's: reading the tensors "step" would wait for the device

    def go_on_from(self, steps):
        """Counts on from the steps that were made before a stop."""
        self.steps = steps

    def step(self, lr: float):
        """One update: Adam's with another learning rate, but at first without its division.

        torch's RAdam adds eps before it corrects the bias of the variance, and Adam adds it
        afterwards: hence the eps that is divided by the root of bias2.
        """
        group = self.param_groups[0]
        self.steps += 1
        beta2 = group["betas"][1]
        bias2 = 1 - beta2**self.steps
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * self.steps * (1 - bias2) / bias2
        if rho > 5:  # the variance is known well enough
            factor = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
            group["lr"] = lr * math.sqrt(factor)
            group["eps"] = 1e-8 / math.sqrt(bias2)
        else:
            # Momentum alone. Adam divides by sqrt(variance) + eps; with so large an eps the root
            # is nothing, and eps cancels against the learning rate.
            group["lr"] = lr * 1e8
            group["eps"] = 1e8
        super().step()


def linear_schedule(start, end, duration, step):
    """`start` at step 0, `end` from step `duration` on, a straight line between."""
    return start + (end - start) * min(step / max(duration, 1), 1.0)


def epsilon_greedy(q_values: np.ndarray, epsilon: float, rng):
    """Actions, int64 `(num_envs,)`, for Q-values `(num_envs, num_actions)`.

    Each game draws for itself whether it explores.
    """
    num_envs, num_actions = q_values.shape
    explore = rng.random(num_envs) < epsilon
    return np.where(explore, rng.integers(num_actions, size=num_envs), q_values.argmax(1))


def q_lambda_returns(rewards, next_values, dones, gamma, q_lambda):
    """The targets R_t above, Peng's Q(lambda), from arrays or tensors `(num_steps, num_envs)`.

    `next_values[t]` is max_a Q(s_{t+1}, a); it is not used where `dones[t]` (bool) says that step t
    ends an episode. The last step has no R_{t+1} and takes lambda = 0.
    """
    returns = rewards + gamma * next_values * ~dones
    for t in reversed(range(len(rewards) - 1)):
        returns[t] += gamma * q_lambda * (returns[t + 1] - next_values[t]) * ~dones[t]
    return returns


class Rollout:
    """What happened in `num_steps` steps of every game. `play` fills it, `learn` reads it.

    `frames` and `values` have one more row, for the states after the last step. The next rollout
    goes on from these frames; `learn` writes that row of `values`, anew in every epoch.
    Frames are stored channels last, as the convolutions want them: to permute them is no copy.
    """

    def __init__(self, num_steps: int, num_envs: int):
        self.frames = np.zeros((num_steps + 1, num_envs, SIDE, SIDE, FRAMES), np.uint8)
        self.actions = np.zeros((num_steps, num_envs), np.int64)
        self.rewards = np.zeros((num_steps, num_envs), np.float32)
        self.dones = np.zeros((num_steps, num_envs), bool)
        self.values = np.zeros((num_steps + 1, num_envs), np.float32)  # max_a Q(s, a)
        self.lengths = np.zeros(num_envs, int)  # steps so far of the games that are being played


def to_device(array, network):
    """A tensor where the network is.

    A GPU may still read the array afterwards. `play` and `learn` wait for the device before they
    end (`cpu`, `tolist`), so what is overwritten later has been read by then.
    """
    return torch.from_numpy(array).to(next(network.parameters()).device, non_blocking=True)


@torch.no_grad()
def play(network, envs: VecEnv, rollout: Rollout, epsilons, gamma, rng):
    """Fills `rollout`, starting where it ended before: for each of `epsilons` a step of every game.

    Returns the finished games as (t, true score, length in steps).
    """

    def q_values_of(frames):
        states = to_device(frames, network).permute(0, 3, 1, 2)
        return network(states).cpu().numpy()  # waits, so `frames` may be overwritten

    finished = []
    rollout.frames[0] = rollout.frames[-1]
    for t, epsilon in enumerate(epsilons):
        q_values = q_values_of(rollout.frames[t])
        actions = epsilon_greedy(q_values, epsilon, rng)
        observations, rewards, dones, infos = envs.step(actions)
        rollout.lengths += 1
        for i, info in enumerate(infos):
            if "action" in info:
                # The environment pressed FIRE instead, to serve. The frames before a serve look
                # like those after a lost ball: a paddle and no ball. If the episode went on here,
                # a lost ball would seem to be worth as much as the next one. So a serve ends it.
                actions[i] = info["action"]
                dones[i] = True
            if "episode" in info:
                # Its own length, as SB3's pipeline counts frames of the emulator.
                finished.append((t, info["episode"]["r"], rollout.lengths[i]))
                rollout.lengths[i] = 0

        rollout.actions[t] = actions
        rollout.rewards[t] = rewards
        rollout.dones[t] = dones
        rollout.values[t] = q_values.max(1)
        # torch transposes faster than NumPy.
        torch.from_numpy(rollout.frames[t + 1]).copy_(
            torch.from_numpy(observations).permute(0, 2, 3, 1)
        )

        # A truncated game would have gone on: gamma * max_a Q(its last observation) joins its last
        # reward, in the place of what was still to come.
        truncated = [i for i, info in enumerate(infos) if info.get("TimeLimit.truncated")]
        if truncated:
            last = rollout.frames[t + 1].copy()  # of all games: a compiled network knows one size
            for i in truncated:
                last[i] = infos[i]["terminal_observation"].transpose(1, 2, 0)
            rollout.rewards[t, truncated] += gamma * q_values_of(last).max(1)[truncated]
    return finished


def learn(network, optimizer: RAdam, rollout: Rollout, lr: float, rng, args: Args):
    """All updates from a rollout, whose `values` the CPU overwrites.

    Each epoch computes its targets anew from the newest Q-values. Those of a state that was played
    come from playing, or from the update that saw it in the epoch before, so they cost nothing.
    Only the states after the last step need a pass of the network.

    Returns the means of loss, Q-value, target, and gradient norm before clipping.
    """
    frames = to_device(rollout.frames, network)
    actions = to_device(rollout.actions, network).flatten()
    rewards = to_device(rollout.rewards, network)
    dones = to_device(rollout.dones, network)
    values = to_device(rollout.values, network)
    states = frames[:-1].flatten(0, 1)
    statistics = torch.zeros(4, device=frames.device)
    for _ in range(args.update_epochs):
        with torch.no_grad():
            values[-1] = network(frames[-1].permute(0, 3, 1, 2)).amax(1)
        targets = q_lambda_returns(rewards, values[1:], dones, args.gamma, args.q_lambda).flatten()
        for rows in to_device(rng.permutation(len(targets)), network).chunk(args.num_minibatches):
            q_values = network(states.index_select(0, rows).permute(0, 3, 1, 2))
            q_taken = q_values.gather(1, actions[rows].unsqueeze(1)).squeeze(1)
            loss = F.mse_loss(q_taken, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
            optimizer.step(lr)

            values.view(-1)[rows] = q_values.detach().amax(1)
            statistics += torch.stack((loss, q_taken.mean(), targets[rows].mean(), norm)).detach()
    return (statistics / (args.update_epochs * args.num_minibatches)).tolist()


# --- Training ---
def make_agent(args: Args, num_actions: int, device: torch.device):
    """A new network and its optimizer."""
    bf16 = args.bf16 == "on"
    if args.bf16 == "auto":  # where nobody has tried it, it is off
        if device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        elif device.type == "cpu":
            bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    with torch.random.fork_rng(devices=[]):  # leaves the random numbers of the caller alone
        torch.random.default_generator.manual_seed(args.seed)
        network = QNetwork(num_actions, bf16).to(device)
    if args.compile:
        network.compile(dynamic=False, mode="reduce-overhead")  # with CUDA graphs on CUDA
    return network, RAdam(network.parameters())


@dataclass(config=CHECKED)
class BestModel:
    """What best_model.pth holds: the network that evaluate.py plays with."""

    env_id: Game
    network: Tensors
    global_step: Natural  # when the network was kept
    mean_return: Mean = -math.inf  # of the last 100 training games then, once there were 100
    highest_mean: Mean = -math.inf  # of any network of this run; older files lack it


@dataclass(config=CHECKED)
class Checkpoint:
    """What checkpoint.pth holds: a run as it was after a whole rollout."""

    args: Args
    global_step: Natural
    scores: Annotated[list[Score], Field(max_length=100)]  # true scores of the last training games
    learned: Tensors  # weights, and moments of the optimizer
    updates: Natural  # that the optimizer has made
    best: BestModel


class Run:
    """A training that can stop and go on: its agent, how far it has come, and its best model.

    `save` writes the run as it was when `keep` was called last, which is after a whole rollout. So
    it may be called at any moment, also when an update was cut off.
    """

    def __init__(self, args: Args, network, optimizer):
        self.args = args
        self.network = network
        self.optimizer = optimizer
        self.global_step = 0
        self.ending = False
        self.scores = deque(maxlen=100)  # true scores of the games that were finished last
        self.best = BestModel(args.env_id, deepcopy(network.state_dict()), 0)
        self.learned = network.state_dict()
        for name, parameter in network.named_parameters():
            for key, tensor in optimizer.state[parameter].items():
                self.learned[f"{name}.{key}"] = tensor
        self.keep()

    def keep(self):
        """Copies the run as it is now into what `save` writes."""
        checkpoint = Checkpoint(
            self.args,
            self.global_step,
            list(self.scores),
            self.learned,
            self.optimizer.steps,
            self.best,
        )
        self.kept = asdict(checkpoint)  # with copies of the tensors, which the next update changes

    def save(self, folder):
        """Writes checkpoint.pth and best_model.pth into `folder`. Raises UserError."""
        save(folder / "best_model.pth", self.kept["best"])
        save(folder / "checkpoint.pth", self.kept)

    def resume(self, folder):
        """Goes on from the checkpoint in `folder`. Raises UserError unless it is of this game."""
        path = folder / "checkpoint.pth"
        checkpoint = load(path, Checkpoint)
        for env_id in (checkpoint.args.env_id, checkpoint.best.env_id):
            if env_id != self.args.env_id:
                raise UserError(f"--env-id {self.args.env_id}: {path} is of another game, {env_id}")
        fill(self.learned, checkpoint.learned, path)
        fill(self.best.network, checkpoint.best.network, path)  # only to check it
        self.optimizer.go_on_from(checkpoint.updates)
        self.global_step = checkpoint.global_step
        self.scores.extend(checkpoint.scores)
        self.best = checkpoint.best
        self.keep()

    def update_best(self):
        """Makes the network the best model if its mean is within two standard errors of the best.

        The highest of many noisy means is biased upwards: it belongs to a lucky network. So of
        networks that are about as good the newest is taken. Before 100 games the last one is.
        """
        enough = len(self.scores) == 100
        mean = float(np.mean(self.scores)) if enough else -math.inf
        margin = 2 * np.std(self.scores) / 10 if enough else 0.0  # standard error: std / sqrt(100)
        highest = max(mean, self.best.highest_mean)
        if mean >= highest - margin:
            weights = deepcopy(self.network.state_dict())
            self.best = BestModel(self.args.env_id, weights, self.global_step, mean, highest)

    def progress(self):
        """What is kept so far, in words."""
        step = self.kept["global_step"]
        total = self.args.total_timesteps
        scores = self.kept["scores"]
        score = f"score {np.mean(scores):.1f}" if scores else "no game is over yet"
        return f"step {step:,} of {total:,} ({step / total:.0%}): {score}"

    def end(self, folder):
        """Saves the run and says how to go on."""
        self.ending = True
        self.save(folder)
        say(
            f"{self.progress()}; next: python evaluate.py --model {folder}, "
            f"or: python pqn_breakout.py --resume {folder}"
        )


def repeatable(num_threads, cleanup):
    """Lets PyTorch compute results that can be repeated, on so many threads, until `cleanup`."""
    cleanup.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(num_threads)
    cleanup.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True))


def open_folder(args: Args, cleanup):
    """The run's folder, where from now on no other process may write. Raises UserError, OSError."""
    name = f"{args.env_id.replace('/', '-')}__pqn_breakout__{args.seed}__{time.time_ns() // 10**6}"
    folder = Path(args.resume or Path(args.log_dir, name))
    folder.mkdir(parents=True, exist_ok=bool(args.resume))
    try:
        try:
            cleanup.enter_context(FileLock(folder / ".lock", timeout=0))
        except (Timeout, PermissionError):  # are OSErrors, too
            raise
        except OSError:
            # Some network drives have no locks. There a file with the number of the process stands
            # in for one.
            cleanup.enter_context(SoftFileLock(folder / ".lock_file", timeout=0))
    except Timeout:
        raise UserError(f"{folder}: another process trains this run") from None
    return folder


def train(args: Args, at_start=None):
    """Trains as `args` say; returns the run's folder.

    In a process group each process plays its share of the games; rank 0 alone writes and reports.
    Also when an exception ends training, the run is saved as it was after the last whole rollout.
    `at_start` gets the run, its folder, and a stack for what must be undone. Raises UserError.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    check_sizes(args, world_size)
    device = choose_device(args.device)
    num_envs = args.num_envs // world_size
    batch_size = args.num_envs * args.num_steps
    last_start = args.total_timesteps - batch_size  # a later rollout would go beyond the total
    exploration = args.exploration_fraction * args.total_timesteps
    epsilon_at = partial(linear_schedule, args.start_e, args.end_e, exploration)
    rollout = Rollout(args.num_steps, num_envs)
    parent = os.getppid()
    with contextlib.ExitStack() as cleanup:
        # 1. Make the agent, or load it, and start the games.
        repeatable(1, cleanup)  # remembers the caller's threads before some are tried
        threads = set_threads(args.num_threads)
        if args.num_threads > threads:
            say(f"--num-threads {args.num_threads}: lowered to the {threads} cores that are there")
        envs = make_env(args.env_id, num_envs, args.seed, args.vec_env, 30, threads, MAX_FRAMES)
        cleanup.callback(envs.close)
        network, optimizer = make_agent(args, envs.action_space.n, device)
        run = Run(args, network, optimizer)
        folder = open_folder(args, cleanup) if rank == 0 else None
        if args.resume:
            run.resume(Path(args.resume))
        # Game i has the same seed whatever process plays it. A resumed run starts other games.
        rng = np.random.default_rng([args.seed, run.global_step])
        envs.seed(int(rng.integers(2**31)) + rank * num_envs)
        rollout.frames[-1] = envs.reset().transpose(0, 2, 3, 1)
        learner = network
        if world_size > 1:
            # Averages gradients. It waits until all have read the run, so rank 0 may write it then.
            learner = nn.parallel.DistributedDataParallel(network)
        if rank == 0:
            run.save(folder)
            settings = vars(args) | {"num_threads": threads}
            write_file(folder / "args.json", json.dumps(settings, indent=2).encode())
            if at_start:
                at_start(run, folder, cleanup)
            cleanup.callback(run.end, folder)
            # TensorBoard hides what a killed run wrote after its checkpoint.
            writer = SummaryWriter(folder, purge_step=run.global_step + 1)
            cleanup.callback(writer.close)
            rows = "\n".join(f"|{name}|{value}|" for name, value in settings.items())
            writer.add_text("hyperparameters", f"|option|value|\n|-|-|\n{rows}")
            say(
                f"PQN on {args.num_envs} games of {args.env_id}, {world_size} x {device} in "
                f"{'bfloat16' if network.bf16 else 'float32'}, threads: {threads}, {folder}"
            )

        # 2. Go on from a checkpoint.
        if 0 < run.global_step <= last_start:
            # These games are all at their first ball, and to learn from such alone would set the
            # run back. So it first plays, without learning, until they are at different stages.
            epsilons = [epsilon_at(run.global_step)] * args.num_steps
            rng = np.random.default_rng(rank)
            for k in range(16):
                if rank == 0 and k % 4 == 0:
                    say(f"plays the new games apart, without learning: rollout {k + 1} of 16")
                play(network, envs, rollout, epsilons, args.gamma, rng)
        first_step = run.global_step
        start = checkpointed = time.monotonic()
        reported = -math.inf
        while run.global_step <= last_start:
            # 3. Play num_steps of every game. A new generator each time: none has to be saved.
            rng = np.random.default_rng([args.seed, run.global_step, rank])
            steps = run.global_step + args.num_envs * np.arange(1, args.num_steps + 1)
            epsilons = [epsilon_at(step) for step in steps]
            games = play(network, envs, rollout, epsilons, args.gamma, rng)

            # 4. Learn from them.
            lr = linear_schedule(args.learning_rate, 0.0, args.total_timesteps, run.global_step)
            means = learn(learner, optimizer, rollout, lr, rng, args)
            run.global_step += batch_size

            # 5. Hear what all processes have to say.
            reports = [(games, [*means, np.mean(rollout.rewards == 0)])] * world_size
            if world_size > 1:
                dist.all_gather_object(reports, reports[rank])
            loss, current_q, target_q, norm, sparse_reward_ratio = np.mean(
                [theirs for _, theirs in reports], axis=0
            )
            if not math.isfinite(loss + norm):
                raise UserError(f"step {run.global_step:,}: not finite; --resume with --bf16 off")
            if os.getppid() != parent and world_size > 1:  # or it would train on for ever
                raise UserError("torchrun has gone")
            if rank > 0:
                continue  # the rest is for the process that writes

            # 6. Write the curves, keep the run as it is now, and report.
            now = time.monotonic()
            sps = (run.global_step - first_step) / (now - start)
            curves = {
                "charts/SPS": sps,
                "charts/epsilon": epsilons[-1],
                "charts/learning_rate": lr,
                "charts/sparse_reward_ratio": sparse_reward_ratio,
                "losses/td_loss": loss,
                "losses/current_q": current_q,
                "losses/target_q": target_q,
            }
            try:
                for finished, _ in reports:
                    for t, score, length in finished:
                        run.scores.append(score)
                        writer.add_scalar("charts/episodic_return", score, steps[t])
                        writer.add_scalar("charts/episodic_length", length, steps[t])
                for tag, value in curves.items():
                    writer.add_scalar(tag, value, run.global_step)
                run.update_best()
                run.keep()
                if now - checkpointed > 60 * args.checkpoint_minutes:
                    writer.flush()  # the curves of a killed run reach to its checkpoint
                    run.save(folder)
                    checkpointed = now
            except OSError as error:  # of the writer, which does not name its file
                raise UserError(f"{folder}: curves cannot be written: {error.strerror}") from error
            if now - reported > 10:
                threads = set_threads(args.num_threads)  # as other programs come and go
                say(
                    f"{run.progress()}, {sps:.0f} steps/s, threads: {threads}, "
                    f"{(args.total_timesteps - run.global_step) / sps / 60:.0f} minutes left"
                )
                reported = now
    return folder


# --- Environments ---
class AtariVecEnv(VecEnv):
    """ALE's native vector environment as a Stable-Baselines3 `VecEnv`.

    - Observations are uint8 `(num_envs, 4, 84, 84)`: grayscale, each the brighter of two frames,
      the newest last.
    - A lost life is a termination (`done`, with `terminal_observation`), but the game goes on.
    - Where a game has FIRE, that is the first action of every life, whatever was asked for, as it
      serves the ball in Breakout. `infos[i]["action"]` tells of it.
    - Rewards are clipped to their sign. `infos[i]["episode"]` has a game's true score `r` and its
      length `l` in steps, once it is over.
    """

    def __init__(self, spec, num_envs, frame_skip, noop_max, num_threads, max_frames):
        if num_envs < 1:
            raise ValueError(f"num_envs {num_envs}: must be at least 1")
        options = spec.kwargs | {
            "frameskip": frame_skip,
            "noop_max": noop_max,
            "num_threads": num_threads,
            "max_num_frames_per_episode": max_frames,
            "use_fire_reset": False,
            "reward_clipping": False,
            "autoreset_mode": "SameStep",
        }
        self.envs = AtariVectorEnv(num_envs=num_envs, **options)
        self.spec = spec
        self.frame_skip = frame_skip
        self.render_mode = None  # VecEnv asks for it
        self.requested = None
        meanings = self.get_action_meanings()
        self.fire = meanings.index("FIRE") if "FIRE" in meanings else None
        super().__init__(
            num_envs, self.envs.single_observation_space, self.envs.single_action_space
        )

    def get_action_meanings(self):
        return [ale_py.Action(action).name for action in self.envs.ale.get_action_set()]

    def reset(self):
        # ALE takes -1 for "as you are": the random numbers go on.
        seeds = [-1 if seed is None else seed % 2**31 for seed in self._seeds]
        observations, details = self.envs.reset(seed=np.array(seeds))
        self._reset_seeds()
        self._reset_options()
        self.lives = details["lives"]
        self.new_life = np.ones(self.num_envs, bool)
        self.returns = np.zeros(self.num_envs)
        self.lengths = np.zeros(self.num_envs, int)
        return observations

    def step_async(self, actions):
        self.requested = actions

    def step_wait(self):
        actions = np.array(self.requested)
        self.requested = None
        playable = np.isin(actions, range(self.action_space.n))
        if actions.shape != (self.num_envs,) or not playable.all():
            raise ValueError(
                f"actions {actions}: must be {self.num_envs} integers below {self.action_space.n}"
            )
        actions = actions.astype(np.int64)
        if self.fire is not None:
            actions[self.new_life] = self.fire
        observations, rewards, terminated, truncated, details = self.envs.step(actions)
        lives_before = self.lives
        self.lives = details["lives"]
        over = terminated | truncated
        done = over | ((self.lives > 0) & (self.lives < lives_before))
        self.returns += rewards
        self.lengths += 1
        infos = []
        for i in range(self.num_envs):
            info = {"lives": int(self.lives[i]), "TimeLimit.truncated": bool(truncated[i])}
            if self.fire is not None and self.new_life[i]:
                info["action"] = self.fire
            if done[i]:
                info["terminal_observation"] = observations[i]
            if over[i]:  # `observations` and `lives` are those of the next game already
                info["terminal_observation"] = details["final_obs"][i]
                info["lives"] = int(lives_before[i]) if truncated[i] else 0
                info["episode"] = {"r": float(self.returns[i]), "l": int(self.lengths[i])}
            infos.append(info)
        self.new_life = done.copy()  # as the caller may write into `done`
        self.returns[over] = 0
        self.lengths[over] = 0
        return observations, np.sign(rewards).astype(np.float32), done, infos

    def close(self):
        self.envs.close()

    def get_attr(self, attr_name, indices=None):
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name, value, indices=None):
        setattr(self, attr_name, value)  # all games share their attributes

    def env_method(self, method_name, *method_args, indices=None, **method_kwargs):
        method = getattr(self, method_name)
        return [method(*method_args, **method_kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class, indices=None):
        # `infos` carry what a Monitor would report.
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]


def find_game(env_id: str):
    """Gymnasium's spec of an Atari game. Raises UserError, which names the nearest id."""
    games = {
        name: spec
        for name, spec in gym.registry.items()
        if spec.entry_point == "ale_py.env:AtariEnv"
    }
    if env_id not in games:
        # These ids have a fixed frame skip; each game has both.
        ids = [name for name in games if name.endswith(("NoFrameskip-v4", "-v5"))]
        nearest = difflib.get_close_matches(env_id, ids, n=1, cutoff=0)
        raise UserError(f"--env-id {env_id}: no Atari game; the nearest is {nearest[0]}")
    return games[env_id]


def make_env(
    env_id: str,
    num_envs: int,
    seed: int,
    vec_env="native",
    noop_max=30,
    num_threads=0,
    max_frames=108_000,
) -> VecEnv:
    """A Stable-Baselines3 `VecEnv`, uint8 `(num_envs, 4, 84, 84)`; game i starts from `seed + i`.

    `native` is ALE's vector environment. `sb3` is SB3's own pipeline, which plays frames that the
    agent never sees: FIRE at a reset, and a no-op after a lost life. A game is truncated after
    `max_frames`, or the fewer of its id. Raises UserError.
    """
    spec = find_game(env_id)
    limit = min(max_frames, spec.kwargs["max_num_frames_per_episode"])
    frame_skip = spec.kwargs["frameskip"]
    if frame_skip == 1:  # a "NoFrameskip" id leaves it to the preprocessing
        frame_skip = 4
    random_skip = not isinstance(frame_skip, int)  # as (2, 5): the emulator draws it
    if vec_env == "sb3":
        try:
            venv = make_atari_env(
                env_id,
                num_envs,
                wrapper_kwargs={
                    "frame_skip": 1 if random_skip else frame_skip,
                    "noop_max": noop_max,
                },
                env_kwargs={
                    "frameskip": frame_skip if random_skip else 1,
                    "max_num_frames_per_episode": limit,
                },
            )
        except AssertionError:
            raise UserError(f"--vec-env sb3: cannot start {env_id}; native can") from None
        venv = VecTransposeImage(VecFrameStack(venv, FRAMES))
    elif vec_env != "native":
        raise UserError(f"--vec-env {vec_env}: must be native or sb3")
    elif random_skip:
        raise UserError(
            f"--env-id {env_id}: skips a random number of frames, which only --vec-env sb3 plays; "
            "ids with NoFrameskip-v4 skip none"
        )
    else:
        venv = AtariVecEnv(spec, num_envs, frame_skip, noop_max, num_threads, limit)
    venv.seed(seed)
    return venv


# --- Files and command line ---
class UserError(ValueError):
    """Something the user can mend, told in one line."""


def write_file(path, data: bytes):
    """Writes beside `path` and renames: a whole file is there at every instant.

    Raises UserError.
    """
    new = Path(f"{path}.new")
    try:
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        new.unlink(missing_ok=True)  # after an error; it may fill the disk


def save(path, content: dict):
    """Writes what `load` reads. Raises UserError."""
    data = io.BytesIO()  # PyTorch would raise a RuntimeError for a full disk
    torch.save(content, data)
    write_file(path, data.getvalue())


def load(path, kind):
    """A Checkpoint or a BestModel (`kind`) from a file, read as data, never executed.

    Raises UserError unless the file is whole and holds what `kind` says: names, types and bounds.
    """
    if not path.is_file():  # reading a pipe or a device might never end
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as file:
            # PyTorch would take a flipped bit for content, and inflate an entry to any size.
            if any(entry.compress_type for entry in file.infolist()) or file.testzip():
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
        return kind(**content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path}: no {kind.__name__}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception:  # unpickling garbage can raise anything
        raise UserError(f"{path}: damaged, or not a file of this program") from None


def fill(own: Tensors, loaded: Tensors, path):
    """Copies the tensors that were loaded from `path` into the program's own.

    Raises UserError, before any is copied, unless they have the same names, shapes and types, and
    hold finite numbers.
    """

    def kinds(tensors):
        return {
            name: (tensor.shape, tensor.dtype, tensor.layout, tensor.is_meta)
            for name, tensor in tensors.items()
        }

    if kinds(own) != kinds(loaded) or not all(t.isfinite().all() for t in loaded.values()):
        raise UserError(f"{path}: damaged, or of another network, or a game with other actions")
    for name, tensor in own.items():
        tensor.copy_(loaded[name])


def say(line):
    """Prints a line. Training goes on when nobody can read it (`| head`, a full disk)."""
    try:
        print(line, flush=True)
    except (OSError, RuntimeError):  # the latter, where a signal came as a line was being printed
        sys.stdout = None  # otherwise Python fails on what is left in its buffer, as it exits


def choose_device(name):
    """The device `name`, tried out; `auto` is CUDA, or else the CPU. Raises UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cpu" and "LOCAL_RANK" in os.environ:  # set by torchrun: one per process
            device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device).tolist()  # the meta device takes tensors but holds no numbers
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name}: no such device here; cpu always works") from None
    return device


def set_threads(requested):
    """Sets the CPU threads of PyTorch; returns their number.

    It is `requested`, but at most one for each core that this process has. For 0 it is one for each
    core, or one alone where they would hardly be faster now.
    """
    # torchrun tells how many processes share this machine.
    cores = joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) or 1
    numbers = torch.zeros(200_000)

    def seconds(threads):
        torch.set_num_threads(threads)
        return timeit.timeit(numbers.exp, number=300)

    # Threads wait for each other after every small operation. Beside another busy program that
    # takes far longer than the operation itself, and one thread alone is faster.
    threads = min(requested, cores) or (cores if 1.3 * seconds(cores) < seconds(1) else 1)
    torch.set_num_threads(threads)
    return threads


def check_sizes(args: Args, world_size):
    """Raises UserError where numbers that are good by themselves do not go together."""
    rollout = args.num_envs * args.num_steps
    size = f"--num-envs {args.num_envs} x --num-steps {args.num_steps}"
    if args.num_envs % world_size or rollout // world_size % args.num_minibatches:
        raise UserError(
            f"{size}: must divide into {world_size} processes "
            f"x --num-minibatches {args.num_minibatches}"
        )
    if args.total_timesteps < rollout:
        raise UserError(f"--total-timesteps {args.total_timesteps}: less than one rollout, {size}")


# Windows has no SIGHUP.
SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


def exit_at_signals(run, folder, cleanup):
    """Until `cleanup`, the first of SIGNALS raises SystemExit, another ends the process."""
    received = []

    def handle(number, _):
        if not received:
            received.append(number)
            say("stops and saves the last whole rollout; a second signal ends without saving")
            if not run.ending:  # it must not cut off the save at the end
                sys.exit(128 + number)
        # A terminal that closes may send SIGHUP, 1, twice; torchrun may forward any signal twice.
        elif number > 1 and "RANK" not in os.environ:
            say(f"not saved again; go on with: python pqn_breakout.py --resume {folder}")
            os._exit(128 + number)

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            cleanup.callback(signal.signal, number, signal.signal(number, handle))
    if "RANK" in os.environ:
        # While PyTorch waits for another process no handler of Python's can run. But this thread
        # can, and hears of a signal through the pipe. The last curves may be missing then.
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)

        def save_after_all():
            os.read(read_end, 1)
            time.sleep(5)
            if not run.ending:
                try:
                    run.end(folder)
                finally:
                    os._exit(1)

        threading.Thread(target=save_after_all, daemon=True).start()


def one_line(error):
    """What the user needs of an error. PyTorch's have a page of C++ behind the first line."""
    line = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError) or "memory" in line:
        line += "; fewer --num-envs or --num-steps need less memory"
    return line


def run_command(command):
    """Calls `command()`. An error ends the program with one line."""
    if hasattr(sys.stdout, "reconfigure"):  # in a notebook it is of another class
        sys.stdout.reconfigure(errors="backslashreplace")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banners
    hook = threading.excepthook
    # What TensorBoard's thread raises, its writer raises again.
    threading.excepthook = lambda _: None
    try:
        command()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if sys.flags.dev_mode:  # python -X dev, for those who change this script
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {one_line(error)}")
    finally:
        threading.excepthook = hook


def main():
    """Trains as the command line says. A resumed run keeps its arguments but for those given."""
    args = tyro.cli(Args)
    if args.resume:
        args = tyro.cli(Args, default=load(Path(args.resume, "checkpoint.pth"), Checkpoint).args)
    if "RANK" in os.environ:  # set by torchrun
        # Until rank 0 has something to save, Ctrl-C ends a process at once. A handler of Python's
        # could not run while PyTorch waits for the other processes.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
    train(args, at_start=exit_at_signals)


if __name__ == "__main__":
    run_command(main)
