"""PQN on Atari Breakout in one script: Q-learning without a target network and without a replay buffer.

Parallelised Q-Network, from "Simplifying Deep Temporal Difference Learning" (Gallici et al., ICLR 2025,
https://arxiv.org/abs/2407.04811): LayerNorm in the network and many environments in parallel keep it stable.
Targets are TD(0) by default and Q(lambda) with --q-lambda.

    python pqn_breakout.py          train; --help lists every option
    python evaluate.py              play whole games with the best model
    tensorboard --logdir logs       watch the curves

Measured on an AMD EPYC, no GPU, 2,000,000 steps, mean true score of 100 greedy games, three seeds each: 291 with TD(0)
(67 to 78 minutes on one core), 307 with --q-lambda 0.3 --gamma 0.995 --update-epochs 2 (44 minutes on two cores, 62 on
one), 347 with --q-lambda 0.3 alone. README.md has more.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from filelock import FileLock, Timeout
from gymnasium.wrappers import TransformObservation
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv, NoopResetEnv, WarpFrame
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecTransposeImage,
)
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import nn
from torch.profiler import profile, record_function
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

VERSION = 1  # of the files a run writes; raised when their content changes


class UserError(Exception):
    """Something the user can mend, told in one line."""


# --- Arguments --------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    """Train PQN on an Atari game: TD(0) by default, Q(lambda) by --q-lambda 0.3 --gamma 0.995 --update-epochs 2."""

    env_id: str = "BreakoutNoFrameskip-v4"  # any Atari game that ale-py registers
    seed: int = 1  # of the network, the exploration, the minibatches and the games
    total_timesteps: int = 2_000_000  # environment steps to train for, all games together (a step is 4 frames)
    learning_rate: float = 2.5e-4  # step size of the optimizer, RAdam
    anneal_lr: bool = True  # lower the learning rate linearly to zero over the training
    num_envs: int = 32  # games played in parallel
    num_steps: int = 32  # steps of each game in a rollout
    num_minibatches: int = 32  # minibatches that a rollout is cut into
    update_epochs: int = 3  # passes over a rollout; the targets are computed afresh before each
    gamma: float = 0.99  # discount factor
    q_lambda: float = 0.0  # lambda of the returns: 0 is TD(0), recommended is 0.3 with gamma 0.995, 2 epochs
    start_e: float = 1.0  # epsilon at the start
    end_e: float = 0.01  # epsilon from the end of the exploration phase on
    exploration_fraction: float = 0.05  # share of total_timesteps in which epsilon falls from start_e to end_e
    max_grad_norm: float = 10.0  # gradients are clipped to this norm
    weight_decay: float = 0.0  # l2 regularisation of the weights; 0 is none
    device: str = "auto"  # cpu, cuda, cuda:1, mps...; auto takes a GPU where there is one
    bf16: Literal["auto", "on", "off"] = "auto"  # network in bfloat16; auto where the hardware has it
    num_threads: int = 0  # CPU threads of the network, and of the native environments; 0 is one a core
    compile: bool = False  # torch.compile the network, on CUDA with CUDA graphs; slower on the CPUs it was tried on
    vec_env: Literal["native", "dummy", "subproc"] = "native"  # ALE's own vector environment, or SB3's two
    log_dir: str = "logs"  # where the run's folder is made
    resume: str | None = None  # folder of a run to go on with, under that run's own arguments
    checkpoint_minutes: float = 5.0  # minutes between two checkpoints
    profile: str | None = None  # write a trace of the second rollout to this .json or .json.gz, for ui.perfetto.dev
    capture_video: bool = False  # every 20 minutes, record a game of the best model so far: videos/ and TensorBoard


# What may differ when a run is resumed: where and how long it runs, not what it learns.
RESUMABLE = {"total_timesteps", "device", "bf16", "num_threads", "compile", "resume", "checkpoint_minutes"}
RESUMABLE |= {"profile", "capture_video"}
CHECKPOINT_KEYS = {"args", "global_step", "network", "optimizer", "best", "recent", "rng"}


def parse(args_class, **options):
    """`tyro.cli`, with its framed error messages brought down to one line."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(args_class, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip("│ ") for line in message.getvalue().splitlines()[1:]]
        paragraphs = itertools.groupby(lines, lambda line: bool(line.strip("─╰╯-")))  # between rules
        text = " ".join(next(group for is_text, group in paragraphs if is_text))
        raise UserError(f"{text.rstrip('.')}; --help lists the options") from None


def check_args(args: Args) -> None:
    """Raises UserError for values that nothing can be trained with, before any work is done."""
    bounds = {
        "num_envs num_steps num_minibatches update_epochs total_timesteps": (1, math.inf, "a positive whole number"),
        "gamma q_lambda start_e end_e": (0, 1, "between 0 and 1"),
        "exploration_fraction": (1e-9, 1, "above 0 and at most 1"),
        "learning_rate max_grad_norm checkpoint_minutes": (1e-12, 1e12, "a positive number"),
        "weight_decay": (0, 1e12, "0 or a positive number"),
        "seed num_threads": (0, 2**31 - 1, "0 or a positive whole number below 2147483648"),
    }
    for names, (low, high, wanted) in bounds.items():
        for name in names.split():
            if not low <= getattr(args, name) <= high:
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {wanted}")
    rollout = args.num_envs * args.num_steps
    steps = f"--num-envs {args.num_envs} x --num-steps {args.num_steps} = {rollout} steps"
    if rollout % args.num_minibatches:
        raise UserError(f"--num-minibatches {args.num_minibatches}: must divide a rollout's {steps}")
    if args.total_timesteps < rollout:
        raise UserError(f"--total-timesteps {args.total_timesteps}: must be at least one rollout, {steps}")
    atari_spec(args.env_id)
    device = choose_device(args.device)
    if args.profile is not None:
        path = Path(args.profile)
        if not path.name.endswith((".json", ".json.gz")) or path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"--profile {args.profile}: must be a .json or .json.gz file in a folder to write in")
        if args.total_timesteps < 2 * rollout:
            raise UserError(f"--profile: --total-timesteps must be at least two rollouts, 2 x {rollout} steps")
    if args.compile:
        try:
            torch.compile(torch.sin)(torch.zeros(8, device=device))
        except Exception as error:  # of dynamo, of inductor, of whatever compiler they find
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--compile: needs a C++ compiler (on CUDA also Triton) here: {reason}") from None
    try:
        Path(args.log_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.log_dir).close()
    except OSError as error:
        raise UserError(f"--log-dir {args.log_dir}: must be a folder to write in: {error.strerror}") from None


def choose_device(name: str) -> torch.device:
    """The device called `name`, tried out; `auto` is the accelerator PyTorch finds, or the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.zeros(1, device=name).tolist()  # some devices only pretend to hold data
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise UserError(f"--device {name}: no such device on this machine; cpu and auto always work") from None


# --- Environments -----------------------------------------------------------------------------------------------------


def atari_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """The gymnasium spec of an Atari game; UserError names the nearest ids for any other id."""
    games = {name: spec for name, spec in gym.registry.items() if spec.entry_point == "ale_py.env:AtariEnv"}
    if env_id in games:
        return games[env_id]
    nearest = difflib.get_close_matches(env_id, games, n=3) or ["BreakoutNoFrameskip-v4"]
    raise UserError(f"--env-id {env_id}: no Atari game of ale-py; ids like it: {', '.join(nearest)}")


class NativeAtariVecEnv(VecEnv):
    """ALE's native vector environment as a Stable-Baselines3 `VecEnv`: whole games, true rewards, no-op starts.

    Observations are uint8 `(num_envs, 4, 84, 84)`: grayscale, pooled over the last two frames, newest last.
    """

    def __init__(self, spec, num_envs: int, frame_skip: int, noop_max: int, num_threads: int):
        self.spec, self.frame_skip = spec, frame_skip
        self.envs = AtariVectorEnv(
            **{**spec.kwargs, "frameskip": frame_skip},
            num_envs=num_envs,
            noop_max=noop_max,
            num_threads=num_threads,
            use_fire_reset=False,
            reward_clipping=False,
            autoreset_mode="SameStep",
        )
        self.render_mode = None
        super().__init__(num_envs, self.envs.single_observation_space, self.envs.single_action_space)

    def get_action_meanings(self) -> list[str]:
        return [ale_py.Action(action).name for action in self.envs.ale.get_action_set()]

    def reset(self) -> np.ndarray:
        seeds = np.array([-1 if seed is None else seed % 2**31 for seed in self._seeds])  # -1 keeps the generator
        observations, info = self.envs.reset(seed=seeds)
        self._reset_seeds()
        self._reset_options()
        self.lives = info["lives"].tolist()
        played = zip(self.lives, info["episode_frame_number"].tolist(), strict=True)
        self.reset_infos = [{"lives": lives, "episode_frame_number": frame} for lives, frame in played]
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        actions = np.asarray(actions, dtype=np.int64)
        if not 0 <= actions.min() <= actions.max() < self.action_space.n:  # ALE would never answer
            raise ValueError(f"actions {actions}: must be from 0 to {self.action_space.n - 1}")
        self.envs.send(actions)

    def step_wait(self):
        observations, rewards, terminated, truncated, info = self.envs.recv()
        lives_before, self.lives = self.lives, info["lives"].tolist()
        pairs = zip(self.lives, truncated.tolist(), strict=True)
        infos = [{"lives": lives, "TimeLimit.truncated": cut} for lives, cut in pairs]
        for i in np.flatnonzero(terminated | truncated):
            # ALE has already begun the next game: these are its first observation and its lives.
            self.reset_infos[i] = {"lives": self.lives[i]}
            infos[i]["lives"] = lives_before[i] if truncated[i] else 0
            infos[i]["terminal_observation"] = info["final_obs"][i]
        return observations, rewards.astype(np.float32), terminated | truncated, infos

    def close(self) -> None:
        self.envs.close()

    def get_attr(self, attr_name: str, indices=None) -> list:
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value, indices=None) -> None:
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError("the native environments share their attributes: set them for all or for none")
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *method_args, indices=None, **method_kwargs) -> list:
        method = getattr(self, method_name)
        return [method(*method_args, **method_kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class, indices=None) -> list[bool]:
        # `infos` carry what Monitor would report; SB3's evaluate_policy asks this before it relies on that.
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]


class EpisodicLife(VecEnvWrapper):
    """What learning needs on top of whole games, the same for every pipeline.

    - A lost life is a termination (`done`, with `terminal_observation`), but the game goes on.
    - FIRE is pressed, where the game has it, on the first step of a game and of every life: Breakout serves no ball
      without it. `infos[i]["action"]` tells when that was not the caller's action.
    - Rewards are clipped to their sign; `infos[i]["episode"]` has the true score `r`, the steps `l` and the seconds
      `t` of a whole game at its end.
    """

    def __init__(self, venv: VecEnv):
        super().__init__(venv)
        meanings = venv.env_method("get_action_meanings", indices=0)[0]
        self.fire = meanings.index("FIRE") if "FIRE" in meanings else None

    def reset(self) -> np.ndarray:
        observations = self.venv.reset()
        self.reset_infos = self.unwrapped.reset_infos
        self.lives = [info["lives"] for info in self.reset_infos]
        self.new_life = np.ones(self.num_envs, dtype=bool)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
        self.game_starts = np.full(self.num_envs, time.time())
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self.requested = self.actions = np.asarray(actions)
        if self.fire is not None:
            self.actions = np.where(self.new_life, self.fire, self.requested)
        self.venv.step_async(self.actions)

    def step_wait(self):
        observations, rewards, dones, infos = self.venv.step_wait()
        self.returns += rewards
        self.lengths += 1
        for i in np.flatnonzero(self.actions != self.requested):
            infos[i]["action"] = int(self.actions[i])
        for i, info in enumerate(infos):
            lives = info["lives"]
            if dones[i]:
                seconds = time.time() - self.game_starts[i]
                info["episode"] = {"r": float(self.returns[i]), "l": int(self.lengths[i]), "t": round(seconds, 6)}
                self.returns[i], self.lengths[i], self.game_starts[i] = 0, 0, time.time()
                lives = self.unwrapped.reset_infos[i]["lives"]
            elif 0 < lives < self.lives[i]:
                dones[i] = True
                info["terminal_observation"] = observations[i]
            self.lives[i] = lives
        self.new_life = dones.copy()
        return observations, np.sign(rewards), dones, infos


def quiet_game(**kwargs) -> gym.Env:
    """`gym.make`, in an environment process too, without ALE's banner and deaf to Ctrl-C."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the trainer, which ends its workers itself
    return gym.make(**kwargs)


def sb3_preprocessing(env: gym.Env, frame_skip: int, noop_max: int) -> gym.Env:
    """The parts of SB3's `AtariWrapper` that show the game the native environment shows.

    The parts left out play frames that the agent never sees (FIRE at a reset, a no-op after a lost life); what they
    are for, `EpisodicLife` does. Luminance is taken before the frames are pooled, as ALE's native environment does.
    """
    shape = (*env.observation_space.shape, 3)
    rgb = gym.spaces.Box(0, 255, shape, np.uint8)
    env = TransformObservation(env, lambda gray: np.broadcast_to(gray[..., None], shape), rgb)
    if noop_max > 0 and "NOOP" in env.unwrapped.get_action_meanings():  # two games have no such action
        env = NoopResetEnv(env, noop_max)
    if frame_skip > 1:
        env = MaxAndSkipEnv(env, frame_skip)
    return WarpFrame(env)


def make_env(env_id: str, num_envs: int, seed: int, vec_env="native", noop_max=30, num_threads=0) -> VecEnv:
    """A Stable-Baselines3 `VecEnv` of `num_envs` games with Atari's usual preprocessing.

    `reset()` gives uint8 `(num_envs, 4, 84, 84)`; `step()` adds float32 rewards in {-1, 0, 1}, `dones` at every lost
    life and game over, and infos with `lives`, `terminal_observation`, `TimeLimit.truncated`, `episode` (see
    `EpisodicLife`). Game i starts from `seed + i` with up to `noop_max` frames without action. Every `vec_env` shows
    the same frames, but for the very last of a truncated game; ids with a random frame skip (`Breakout-v4`) need SB3's
    pipeline and get it.
    Raises UserError for an id that is not an Atari game.
    """
    spec = atari_spec(env_id)
    frame_skip = spec.kwargs["frameskip"]
    random_skip = not isinstance(frame_skip, int)
    if frame_skip == 1:  # "NoFrameskip" leaves the skipping to the preprocessing: 4, by convention
        frame_skip = 4
    if vec_env == "native" and not random_skip:
        venv = NativeAtariVecEnv(spec, num_envs, frame_skip, noop_max, num_threads)
    else:
        wrapper_kwargs = {"frame_skip": 1 if random_skip else frame_skip, "noop_max": noop_max}
        env_kwargs = {"id": env_id, "render_mode": "rgb_array", "obs_type": "grayscale"}
        env_kwargs["frameskip"] = frame_skip if random_skip else 1
        vec_env_cls = SubprocVecEnv if vec_env == "subproc" else DummyVecEnv
        kinds = {"wrapper_class": sb3_preprocessing, "vec_env_cls": vec_env_cls}
        venv = make_vec_env(quiet_game, num_envs, wrapper_kwargs=wrapper_kwargs, env_kwargs=env_kwargs, **kinds)
        venv = VecFrameStack(VecTransposeImage(venv), 4, channels_order="first")
    venv = EpisodicLife(venv)
    venv.seed(seed)
    return venv


# --- Network and agent ------------------------------------------------------------------------------------------------


class QNetwork(nn.Module):
    """Nature CNN with LayerNorm over the channels at each position, as in the paper's code.

    Maps uint8 frames `(batch, 4, 84, 84)` to float32 Q-values `(batch, num_actions)`.
    """

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        self.conv1, self.ln1 = nn.Conv2d(4, 32, 8, stride=4), nn.LayerNorm(32)
        self.conv2, self.ln2 = nn.Conv2d(32, 64, 4, stride=2), nn.LayerNorm(64)
        self.conv3, self.ln3 = nn.Conv2d(64, 64, 3, stride=1), nn.LayerNorm(64)
        self.fc1, self.ln_fc = nn.Linear(7 * 7 * 64, 512), nn.LayerNorm(512)
        self.fc2 = nn.Linear(512, num_actions)
        for layer in (self.conv1, self.conv2, self.conv3, self.fc1, self.fc2):
            # Q-values start near zero: whatever they start at has to be unlearned before rewards show.
            nn.init.orthogonal_(layer.weight, 0.01 if layer is self.fc2 else math.sqrt(2))
            nn.init.zeros_(layer.bias)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = frames.contiguous(memory_format=torch.channels_last).to(torch.bfloat16 if self.bf16 else torch.float32)
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            # The first weights scale the frames to 0..1: a pass less over them, and bfloat16 holds 0..255 exactly.
            x = F.conv2d(x, self.conv1.weight / 255, self.conv1.bias, self.conv1.stride).permute(0, 2, 3, 1)
            for ln, conv in ((self.ln1, self.conv2), (self.ln2, self.conv3)):
                x = conv(F.relu(ln(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = F.relu(self.ln_fc(self.fc1(F.relu(self.ln3(x)).flatten(1))))
        with torch.autocast(frames.device.type, enabled=False):
            return self.fc2(x.float())  # actions differ by less than bfloat16 resolves


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """`start` at step 0, `end` from step `duration` on, a straight line between."""
    return start + (end - start) * min(step / duration, 1.0)


def epsilon_greedy(q_values: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """Actions, int64 `(num_envs,)`, for Q-values `(num_envs, num_actions)`; every environment draws for itself."""
    num_envs, num_actions = q_values.shape
    explore = rng.random(num_envs) < epsilon
    return np.where(explore, rng.integers(num_actions, size=num_envs), q_values.argmax(1))


def q_lambda_returns(rewards, next_values, terminated, truncated, gamma: float, q_lambda: float):
    """Targets Q(lambda), all arrays or tensors `(num_steps, num_envs)`; `q_lambda=0` is TD(0).

    `next_values[t]` is max_a Q(s, a) of the true successor of step t: at a truncation that of the last observation,
    at a termination it is not used. The recursion, Peng's Q(lambda) as in the paper's PQN, stops at both:
    R_t = r_t + gamma * (lambda * R_{t+1} + (1 - lambda) * max_a Q(s_{t+1}, a)).
    """
    returns = rewards + gamma * next_values * (terminated == 0)
    for t in range(len(rewards) - 2, -1, -1):
        goes_on = (terminated[t] == 0) & (truncated[t] == 0)
        returns[t] += gamma * q_lambda * (returns[t + 1] - next_values[t]) * goes_on
    return returns


@torch.no_grad()
def max_q(network: QNetwork, frames: torch.Tensor) -> torch.Tensor:
    """max_a Q(s, a), float32 `(rows,)`, of uint8 frames `(rows, 4, 84, 84)`; in pieces that fit into caches."""
    return torch.cat([network(piece).amax(1) for piece in frames.split(128)])


class RAdam(torch.optim.Adam):
    """Rectified Adam (Liu et al., ICLR 2020), as `torch.optim.RAdam`, on PyTorch's fused Adam kernel.

    RAdam is Adam with a factor on its step size that depends on the step count alone, and without the division by
    the second moment in the first five steps. Passing both through Adam's `lr` and `eps` makes a step on a CPU about
    five times cheaper.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0):
        super().__init__(params, lr, weight_decay=weight_decay, fused=True)
        self.param_groups[0]["steps"] = 0

    def step(self) -> None:
        (group,) = self.param_groups
        group["steps"] += 1
        lr, eps, beta2 = group["lr"], group["eps"], group["betas"][1]
        bias2 = 1 - beta2 ** group["steps"]
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * group["steps"] * (1 - bias2) / bias2
        if rho > 5:
            group["lr"] = lr * math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            group["eps"] = eps / math.sqrt(bias2)
        else:
            group["lr"] = lr * 1e8  # sqrt(v) + 1e8 is 1e8: the division by it leaves plain momentum
            group["eps"] = 1e8
        super().step()
        group["lr"], group["eps"] = lr, eps


@record_function("learning")
def update(network: QNetwork, optimizer: RAdam, frames, actions, targets, max_grad_norm: float):
    """One gradient step on the squared TD error of a minibatch.

    Returns max_a Q(s, a) of its rows as they were before the step, and its loss, mean Q and mean target.
    """
    q_values = network(frames)
    chosen = q_values.gather(1, actions[:, None]).squeeze(1)
    loss = F.mse_loss(chosen, targets)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.get_total_norm([weight.grad for weight in network.parameters()])
    # The fused kernel divides the gradient by the first, which clips its norm, and leaves the weights as they are once
    # the second is not zero, without waiting for the device to say so.
    optimizer.grad_scale = (norm / max_grad_norm).clamp(min=1)
    optimizer.found_inf = torch.maximum(optimizer.found_inf, (~torch.isfinite(norm)).float())
    optimizer.step()
    return q_values.detach().amax(1), torch.stack((loss, chosen.mean(), targets.mean())).detach()


def make_rollout(num_steps: int, num_envs: int, pin_memory: bool) -> dict[str, torch.Tensor]:
    """The host's buffers of a rollout, reused for all of them; `frames` and `values` have the last successors, too."""
    steps, observations = (num_steps, num_envs), (num_steps + 1, num_envs)
    kinds = {
        "frames": ((*observations, 4, 84, 84), torch.uint8),
        "values": (observations, torch.float32),
        "actions": (steps, torch.int64),
        "rewards": (steps, torch.float32),
        "terminated": (steps, torch.bool),
        "truncated": (steps, torch.bool),
    }
    return {name: torch.zeros(size, dtype=kind, pin_memory=pin_memory) for name, (size, kind) in kinds.items()}


def learn(network, optimizer, rollout: dict, batch: dict, final_frames: dict, rng, args: Args) -> torch.Tensor:
    """All updates of one rollout: the second half of the paper's PQN algorithm.

    `rollout` holds host tensors, `batch` their twins on the network's device, frames channels last: uint8
    `frames (num_steps + 1, num_envs, 4, 84, 84)`, their `values (num_steps + 1, num_envs)`, max_a Q(s, a), and,
    `(num_steps, num_envs)` each, `actions`, `rewards`, `terminated`, `truncated`; `final_frames[t, i]` is the last
    observation of a game truncated there. Targets are computed before every epoch from the values that acting or the
    updates of the epoch before have just found; only the last observations take a pass through the network.
    Returns means of loss, Q and target over the updates, and whether a gradient was not finite.
    """
    for name, tensor in rollout.items():
        batch[name].copy_(tensor, non_blocking=True)
    device = batch["frames"].device
    frames, actions = batch["frames"].flatten(0, 1), batch["actions"].flatten()
    if final_frames:
        where_truncated = tuple(torch.tensor(list(final_frames)).T)
        last_observations = torch.from_numpy(np.stack(list(final_frames.values()))).to(device)
    values, next_values = batch["values"], batch["values"][1:]
    statistics = torch.zeros(3, device=device)
    for _ in range(args.update_epochs):
        with record_function("targets"):
            values[-1] = max_q(network, frames[-args.num_envs :])  # neither acting nor updates pass over these
            if final_frames:  # their place is that of the next game's first observation, which nothing else needs
                next_values[where_truncated] = max_q(network, last_observations)
            ends = batch["terminated"], batch["truncated"]
            targets = q_lambda_returns(batch["rewards"], next_values, *ends, args.gamma, args.q_lambda).flatten()
        shuffled = torch.from_numpy(rng.permutation(len(actions))).to(device)
        for rows in shuffled.chunk(args.num_minibatches):
            # Whole rows of memory: `frames[rows]` would take twenty times as long.
            chosen = frames.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
            found = update(network, optimizer, chosen, actions[rows], targets[rows], args.max_grad_norm)
            values.view(-1)[rows], means = found
            statistics += means
    return torch.cat((statistics / (args.update_epochs * args.num_minibatches), optimizer.found_inf[None]))


# --- Files ------------------------------------------------------------------------------------------------------------


def write_file(path: Path, content: dict) -> None:
    """Writes beside `path` and renames over it: at every instant a whole file is there. Raises OSError.

    Behind what `torch.save` makes stands its SHA-256, as `torch.load` checks no sum; it reads the file nevertheless.
    """
    data = io.BytesIO()
    torch.save({"version": VERSION, **content}, data)
    data.write(hashlib.sha256(data.getbuffer()).digest())
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            file.write(data.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def read_file(path: Path, keys: set[str]) -> dict:
    """The content of a file of `write_file`, read as data and never executed; UserError for anything else."""
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise ValueError
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception:  # whatever an unpickler makes of bytes that are not ours
        raise UserError(f"{path}: damaged, or not a file of this program") from None
    if not (isinstance(content, dict) and isinstance(content.get("version"), int) and keys <= content.keys()):
        raise UserError(f"{path}: not a file of this program (it should hold {', '.join(sorted(keys))})")
    if content["version"] > VERSION:
        raise UserError(f"{path}: of a newer version of this program (format {content['version']}, not {VERSION})")
    return content


def say(line: str) -> None:
    """Prints above the progress bar. Training goes on when nobody reads any more (`| head`, a closed terminal)."""
    with contextlib.suppress(OSError):
        tqdm.write(line)


def make_run_dir(args: Args, checkpoint: dict) -> Path:
    """A new folder for a run; it appears with its first checkpoint in it, under a name that no other run has."""
    beside = Path(tempfile.mkdtemp(prefix=".", dir=args.log_dir))
    try:
        beside.chmod(0o755)
        (beside / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2) + "\n")
        write_file(beside / "checkpoint.pth", checkpoint)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise UserError(f"--log-dir {args.log_dir}: a run cannot be written there: {error.strerror}") from None
    while True:
        name = f"{args.env_id.replace('/', '-')}__pqn_breakout__{args.seed}__{int(time.time())}"
        try:
            return beside.rename(Path(args.log_dir, name))
        except OSError:
            if not Path(args.log_dir, name).exists():
                raise
            time.sleep(0.1)  # of two runs that start in the same second, one waits for the next


class RunDir:
    """A run's folder, kept for this process alone. Nothing that cannot be written into it stops training."""

    def __init__(self, path: Path):
        self.path, self.unwritten, self.recorder, self.recorded = path, set(), None, -math.inf
        self.lock = FileLock(path / ".lock")  # the system lifts it with the process, however that ends
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            raise UserError(f"--resume {path}: a live run is using this folder") from None
        except OSError as error:
            raise UserError(f"--resume {path}: cannot be written to: {error.strerror}") from None

    def save(self, name: str, content: dict) -> None:
        try:
            write_file(self.path / name, content)
            self.unwritten.discard(name)
        except OSError as error:
            if name not in self.unwritten:
                say(f"{self.path / name}: cannot be written: {error.strerror}; training goes on and tries again")
            self.unwritten.add(name)

    def open_events(self, args: Args, resumed_at: int | None) -> None:
        """TensorBoard's events; of a resumed run, those behind its checkpoint are taken back."""
        threading.excepthook = lambda failure: None  # of the writer's thread; `log` tells about it in one line
        self.writer = SummaryWriter(self.path, purge_step=None if resumed_at is None else resumed_at + 1)
        if resumed_at is None:
            settings = {name: value for name, value in dataclasses.asdict(args).items() if value is not None}
            rows = "\n".join(f"|{name}|{value}|" for name, value in settings.items())
            self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
            for summary in hparams(settings, {"charts/episodic_return": 0}):
                self.writer.file_writer.add_summary(summary)

    def log(self, step: int, **groups: dict) -> None:
        """Scalars by group and name: `charts={"SPS": 500}` is `charts/SPS`.

        Without any, writes out those before; where that has failed, goes on in a new file.
        """
        known = self.writer is None
        try:
            if not self.writer and not groups:
                self.writer = SummaryWriter(self.path)
            for group, scalars in groups.items():
                for name, value in scalars.items():
                    if self.writer:
                        self.writer.add_scalar(f"{group}/{name}", value, step)
            if self.writer and not groups:
                self.writer.flush()
        except Exception as error:  # whatever stopped the writer's thread
            if not known:
                say(f"{self.path}: no TensorBoard events: {error}; training goes on and tries again")
            self.writer = None

    def capture_video(self, step: int, epsilon: float) -> None:
        """Every 20 minutes, has evaluate.py record a game; shows it in TensorBoard when it is done."""
        try:
            if self.recorder and self.recorder.poll() == 0 and self.writer:
                gif, self.recorder = self.video.read_bytes(), None
                width, height = struct.unpack("<HH", gif[6:10])
                image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=gif)
                summary = Summary(value=[Summary.Value(tag="best_model", image=image)])
                self.writer.file_writer.add_summary(summary, int(self.video.stem))
            if time.monotonic() - self.recorded > 1200:
                self.recorded, self.video = time.monotonic(), self.path / "videos" / f"{step}.gif"
                self.video.parent.mkdir(exist_ok=True)
                command = [sys.executable, Path(__file__).with_name("evaluate.py"), "--model"]
                command += [self.path / "best_model.pth", "--episodes", "1", "--device", "cpu", "--show-q"]
                command += ["--video", self.video, "--epsilon", str(epsilon)]  # an epsilon, to end endless rallies
                self.recorder = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
                os.setpriority(os.PRIO_PROCESS, self.recorder.pid, 19)  # it gets what training leaves
        except Exception as error:  # a full disk, a failed writer
            say(f"{self.video}: not recorded: {error}; training goes on")

    def write_profile(self, profiler: profile, path: str) -> None:
        profiler.stop()
        try:
            profiler.export_chrome_trace(path)
            size = Path(path).stat().st_size / 2**20  # an error where there is no file: the line above only logs it
            say(f"{path}: the second rollout's trace, {size:.1f} MB; open it at https://ui.perfetto.dev")
        except Exception as error:  # a full disk
            say(f"{path}: not written: {error}; training goes on")

    def close(self) -> None:
        if self.recorder:
            self.recorder.terminate()  # it leaves a whole video or none
        with contextlib.suppress(Exception):
            self.writer.close()
        self.lock.release()


# --- Training ---------------------------------------------------------------------------------------------------------

stop_signals: list[int] = []  # SIGINT, SIGTERM or SIGHUP, once one came


def train(args: Args) -> Path:
    """Trains as `args` say; returns the run's folder: TensorBoard events, best_model.pth, checkpoint.pth, args.json."""
    check_args(args)
    device = choose_device(args.device)
    bf16 = args.bf16 == "on"
    if args.bf16 == "auto":  # only where the hardware does not emulate it, slowly
        cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = cuda or (device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False))
    torch.backends.cudnn.deterministic = True
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    global_step, best, recent, saved = 0, -math.inf, deque(maxlen=100), None
    if args.resume:
        run = RunDir(Path(args.resume))
        saved = read_file(run.path / "checkpoint.pth", CHECKPOINT_KEYS)
        global_step, best = saved["global_step"], saved["best"]
        if (run.path / "best_model.pth").exists():  # it may be younger than the checkpoint
            best = max(best, read_file(run.path / "best_model.pth", {"mean_return"})["mean_return"])
        recent.extend(saved["recent"])
        rng.bit_generator.state = json.loads(saved["rng"])

    # The games of a resumed run start anew, from seeds of their own: not its first games once more.
    envs_seed = (args.seed + global_step) % 2**31
    try:
        envs = make_env(args.env_id, args.num_envs, envs_seed, args.vec_env, num_threads=args.num_threads)
    except (EOFError, ConnectionError):
        if stop_signals:  # the environment processes had it too
            sys.exit(128 + stop_signals[0])
        raise UserError(f"--vec-env {args.vec_env}: an environment process died at its start") from None
    network = QNetwork(int(envs.action_space.n), bf16).to(device)
    if args.compile:
        network.compile(dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default")
    optimizer = RAdam(network.parameters(), args.learning_rate, args.weight_decay)
    optimizer.found_inf = torch.zeros((), device=device)
    if saved:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])

    def checkpoint() -> dict:
        learned = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        progress = {"args": dataclasses.asdict(args), "global_step": global_step, "best": best, "recent": list(recent)}
        return {**learned, **progress, "rng": json.dumps(rng.bit_generator.state)}

    def model() -> dict:
        about = {"env_id": args.env_id, "num_actions": network.fc2.out_features, "global_step": global_step}
        mean = score if len(recent) == recent.maxlen else -math.inf
        return {**about, "mean_return": mean, "network": network.state_dict()}

    if not saved:
        run = RunDir(make_run_dir(args, checkpoint()))
    run.open_events(args, global_step if saved else None)

    # One set of buffers for all rollouts: numpy views of the host's tensors, and their twins on the device.
    batch_size, exploration_steps = args.num_envs * args.num_steps, args.exploration_fraction * args.total_timesteps
    rollout = make_rollout(args.num_steps, args.num_envs, pin_memory=device.type == "cuda")
    batch = {name: torch.empty_like(tensor, device=device) for name, tensor in rollout.items()}
    channels_last = torch.empty(args.num_steps + 1, args.num_envs, 84, 84, 4, dtype=torch.uint8, device=device)
    batch["frames"] = channels_last.permute(0, 1, 4, 2, 3)  # as the network takes them, laid out once for all passes
    frames, values, actions, rewards, terminated, truncated = (tensor.numpy() for tensor in rollout.values())

    what = f"Q({args.q_lambda:g})" if args.q_lambda else "TD(0)"
    where = f"{device} in {'bfloat16' if bf16 else 'float32'}"
    say(f"PQN, {what}, on {args.num_envs} games of {args.env_id} ({args.vec_env}) and {where}: {run.path}")
    if saved:
        at_end = global_step + batch_size > args.total_timesteps
        hint = "a higher --total-timesteps goes on" if at_end else "the games start anew"
        say(f"resumed at step {global_step:,}; {hint}")
    first_step, score, start = global_step, float(np.mean(recent)) if recent else math.nan, time.monotonic()
    told, checkpointed = start, start
    profiler = profile() if args.profile else None
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", disable=not sys.stderr.isatty())
    try:
        frames[0] = envs.reset()
        if saved and not at_end:
            # Scatter the games over all their stages again: learning from 32 first balls at once would set it back.
            epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, global_step)
            games_rng = np.random.default_rng(envs_seed)
            for _ in range(16 * args.num_steps):
                if stop_signals:
                    break
                with torch.no_grad():
                    q_values = network(rollout["frames"][0].to(device)).cpu().numpy()
                frames[0] = envs.step(epsilon_greedy(q_values, epsilon, games_rng))[0]
            start = time.monotonic()  # of the steps per second
        while global_step + batch_size <= args.total_timesteps and not stop_signals:
            # Play num_steps of every game, epsilon-greedily.
            final_frames = {}
            for t in range(args.num_steps):
                step = global_step + (t + 1) * args.num_envs
                epsilon = linear_schedule(args.start_e, args.end_e, exploration_steps, step)
                with torch.no_grad(), record_function("acting"):
                    q_values = network(rollout["frames"][t].to(device, non_blocking=True)).cpu().numpy()
                values[t] = q_values.max(1)
                actions[t] = epsilon_greedy(q_values, epsilon, rng)
                with record_function("environments"):
                    frames[t + 1], rewards[t], dones, infos = envs.step(actions[t])
                for i, info in enumerate(infos):
                    actions[t, i] = info.get("action", actions[t, i])
                    truncated[t, i] = info.get("TimeLimit.truncated", False)
                    if truncated[t, i]:
                        final_frames[t, i] = info["terminal_observation"]
                    if "episode" in info:
                        recent.append(info["episode"]["r"])
                        game = {"episodic_return": info["episode"]["r"], "episodic_length": info["episode"]["l"]}
                        run.log(step, charts=game)
                terminated[t] = dones & ~truncated[t]

            # Learn from them.
            if args.anneal_lr:
                lr = linear_schedule(args.learning_rate, 0.0, args.total_timesteps, global_step)
                optimizer.param_groups[0]["lr"] = lr
            statistics = learn(network, optimizer, rollout, batch, final_frames, rng, args)
            loss, current_q, target_q, not_finite = statistics.tolist()
            if not_finite:
                raise UserError(
                    f"step {global_step:,}: a gradient is not finite; the weights were left as they are. "
                    f"Try --resume {run.path} with --bf16 off, or a new run with a lower --learning-rate"
                )
            frames[0] = frames[-1]
            global_step += batch_size

            # Report and save.
            if profiler and global_step == first_step + batch_size:
                profiler.start()  # the first rollout was its warm-up
            elif profiler and global_step == first_step + 2 * batch_size:
                run.write_profile(profiler, args.profile)
            now = time.monotonic()
            sps = (global_step - first_step) / (now - start)
            score = float(np.mean(recent)) if recent else math.nan
            charts = {"SPS": sps, "epsilon": epsilon, "learning_rate": optimizer.param_groups[0]["lr"]}
            charts["sparse_reward_ratio"] = float((rewards == 0).mean())
            losses = {"td_loss": loss, "current_q": current_q, "target_q": target_q}
            run.log(global_step, charts=charts, losses=losses)
            if len(recent) == recent.maxlen and score > best:
                run.save("best_model.pth", model())
                best = best if "best_model.pth" in run.unwritten else score
            if args.capture_video and best > -math.inf:
                run.capture_video(global_step, args.end_e)
            if now - checkpointed > 60 * args.checkpoint_minutes:
                run.log(global_step)
                run.save("checkpoint.pth", checkpoint())
                checkpointed = now
            progress = f"score {score:.1f}, epsilon {epsilon:.3f}, {sps:.0f} steps/s"
            bar.set_postfix_str(progress, refresh=False)
            bar.update(batch_size)
            if bar.disable and now - told > 30:
                say(f"step {global_step:,}: {progress}")
                told = now
        run.save("checkpoint.pth", checkpoint())
    except (EOFError, ConnectionError):  # SB3's pipes say so when the process at their other end is gone
        run.save("checkpoint.pth", checkpoint())
        dead = " ".join(str(process.pid) for process in envs.unwrapped.processes if not process.is_alive())
        if not stop_signals:  # else they had the same signal
            raise UserError(f"environment process {dead} died; go on with --resume {run.path}") from None
    finally:
        bar.close()
        with contextlib.suppress(EOFError, OSError):
            envs.close()
        for process in multiprocessing.active_children():
            process.terminate()
        run.close()
    if best == -math.inf:  # fewer than 100 games so far
        run.save("best_model.pth", model())
    if run.unwritten:
        raise UserError(
            f"{run.path}: {' and '.join(sorted(run.unwritten))} could not be written; those there are older"
        )
    minutes = (time.monotonic() - start) / 60
    mean = f"mean of the last {len(recent)} games {score:.1f}" if recent else "no game is over yet"
    say(f"step {global_step:,} after {minutes:.1f} minutes: {mean}")
    if stop_signals:
        say(f"stopped; to go on: python pqn_breakout.py --resume {run.path}")
        sys.exit(128 + stop_signals[0])
    say(f"to watch it play: python evaluate.py --model {run.path / 'best_model.pth'}")
    say(f"to see the curves: tensorboard --logdir {args.log_dir}")
    return run.path


def request_stop(signum: int, _) -> None:
    """Ends training after the rollout under way; the second signal ends the process at once."""
    stop_signals.append(signum)
    signal.signal(signum, signal.SIG_DFL)


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGHUP, request_stop)  # a closed terminal
    try:
        args = parse(Args)
        if args.resume == "":
            raise UserError("--resume: must name the folder of a run")
        if args.resume:
            own = read_file(Path(args.resume, "checkpoint.pth"), CHECKPOINT_KEYS)["args"]
            if unknown := own.keys() - {field.name for field in dataclasses.fields(Args)}:
                options = ", ".join(sorted(unknown))
                raise UserError(f"--resume {args.resume}: of a version of this program that had options {options}")
            own["log_dir"] = str(Path(args.resume).parent)  # a run's folder may have been moved
            own["profile"] = None  # one trace is enough
            args = parse(Args, default=Args(**own))
            for name, value in own.items():
                if getattr(args, name) != value and name not in RESUMABLE:
                    raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: this run learns with {value}")
        train(args)
    except UserError as error:
        sys.exit(f"pqn_breakout.py: error: {error}")


if __name__ == "__main__":
    main()
