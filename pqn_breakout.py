"""PQN on Atari Breakout in one script: Q-learning without a target network and without a replay buffer.

Parallelised Q-Network, from "Simplifying Deep Temporal Difference Learning" (Gallici et al., ICLR 2025,
https://arxiv.org/abs/2407.04811): LayerNorm in the network and many environments in parallel keep it stable.
Targets are TD(0) by default and Q(lambda) with --q-lambda.

    python pqn_breakout.py          train; --help lists every option
    python evaluate.py              play whole games with the best model
    tensorboard --logdir logs       watch the curves
"""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ale_py  # noqa: F401  (registers the Atari games with gymnasium)
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
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

VERSION = 1  # of the files a run writes; raised when their content changes


class UserError(Exception):
    """Something the user can mend, told in one line."""


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    """Train PQN on an Atari game. The defaults are TD(0); --q-lambda 0.9 learns from longer returns."""

    env_id: str = "BreakoutNoFrameskip-v4"
    """an Atari game as ale-py registers it; sticky actions, frame skip and action set are the id's own"""
    seed: int = 1
    """seeds the network, the exploration, the minibatches and the games"""
    total_timesteps: int = 1_000_000
    """environment steps to train for, all games together (one step is 4 frames)"""
    learning_rate: float = 2.5e-4
    """step size of the optimizer, RAdam"""
    anneal_lr: bool = True
    """lower the learning rate linearly to zero over the training"""
    num_envs: int = 32
    """games played in parallel"""
    num_steps: int = 32
    """steps of each game in a rollout"""
    num_minibatches: int = 32
    """minibatches that a rollout is cut into"""
    update_epochs: int = 4
    """passes over a rollout; the targets are computed afresh before each"""
    gamma: float = 0.99
    """discount factor"""
    q_lambda: float = 0.0
    """lambda of the returns that are learned from; 0 is TD(0)"""
    start_e: float = 1.0
    """epsilon at the start"""
    end_e: float = 0.01
    """epsilon from the end of the exploration on"""
    exploration_fraction: float = 0.1
    """share of total_timesteps over which epsilon falls from start_e to end_e"""
    max_grad_norm: float = 10.0
    """norm that gradients are clipped to"""
    weight_decay: float = 0.0
    """l2 regularisation of the weights; 0 is none"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps...; auto takes a GPU where there is one"""
    bf16: Literal["auto", "on", "off"] = "auto"
    """compute the network in bfloat16; auto does where the hardware has it"""
    num_threads: int = 0
    """CPU threads of the network, and of the native environments; 0 is one a core"""
    vec_env: Literal["native", "dummy", "subproc"] = "native"
    """ALE's native vector environment, or Stable-Baselines3's pipeline in this process or in one process a game"""
    log_dir: str = "logs"
    """where the run's folder is made"""
    resume: str | None = None
    """folder of a run to continue, with that run's own arguments"""
    checkpoint_minutes: float = 5.0
    """minutes between two checkpoints"""


# What may differ when a run is resumed: where and how long it runs, not what it learns.
RESUMABLE = {"total_timesteps", "device", "bf16", "num_threads", "resume", "checkpoint_minutes"}


def parse(args_class, **tyro_options):
    """`tyro.cli`, with its framed error messages brought down to one line."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(args_class, **tyro_options)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip("│ ") for line in message.getvalue().splitlines()]
        text = " ".join(lines[1 : next((i for i, line in enumerate(lines) if line.startswith("──")), len(lines))])
        raise UserError(f"{text.rstrip('.')}; --help lists the options") from None


def check_args(args: Args) -> None:
    """Raises UserError for values that cannot be trained with, before anything is touched."""

    def require(condition: bool, name: str, wanted: str) -> None:
        if not condition:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {wanted}")

    for name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "total_timesteps"):
        require(getattr(args, name) > 0, name, "a positive whole number")
    for name in ("gamma", "q_lambda", "start_e", "end_e"):
        require(0 <= getattr(args, name) <= 1, name, "between 0 and 1")
    require(0 < args.exploration_fraction <= 1, "exploration_fraction", "above 0 and at most 1")
    for name in ("learning_rate", "max_grad_norm", "checkpoint_minutes"):
        require(0 < getattr(args, name) < math.inf, name, "a positive number")
    require(0 <= args.weight_decay < math.inf, "weight_decay", "0 or a positive number")
    require(0 <= args.seed < 2**31, "seed", "between 0 and 2147483647")
    require(args.num_threads >= 0, "num_threads", "0 (one a core) or a positive whole number")
    rollout = args.num_envs * args.num_steps
    require(
        rollout % args.num_minibatches == 0,
        "num_minibatches",
        f"a divisor of a rollout's --num-envs {args.num_envs} x --num-steps {args.num_steps} = {rollout} steps",
    )
    require(args.total_timesteps >= rollout, "total_timesteps", f"at least one rollout, {rollout} steps")
    atari_spec(args.env_id)
    choose_device(args.device)


def choose_device(name: str) -> torch.device:
    """The device called `name`, tried out; `auto` is the accelerator PyTorch finds, or the CPU."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: no such device on this machine; cpu and auto always work") from None


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 natively, rather than slowly emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)


# ---------------------------------------------------------------------------------------------------------------------
# Environments
# ---------------------------------------------------------------------------------------------------------------------


def atari_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """The gymnasium spec of an Atari game; UserError names the nearest ids for any other id."""
    games = {name: spec for name, spec in gym.registry.items() if spec.entry_point == "ale_py.env:AtariEnv"}
    if env_id in games:
        return games[env_id]
    nearest = difflib.get_close_matches(env_id, games, n=3, cutoff=0.6)
    hint = "did you mean " + " or ".join(nearest) if nearest else "BreakoutNoFrameskip-v4 is one"
    raise UserError(f"--env-id {env_id}: not an Atari game that ale-py has; {hint}?".replace("is one?", "is one"))


class NativeAtariVecEnv(VecEnv):
    """ALE's native vector environment as a Stable-Baselines3 `VecEnv`: whole games, true rewards, no-op starts.

    Observations are uint8 `(num_envs, 4, 84, 84)`: grayscale, pooled over the last two frames, newest last.
    """

    def __init__(self, spec, num_envs: int, frame_skip: int, noop_max: int, num_threads: int):
        self.spec = spec
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
        self.reset_infos = [{"lives": lives} for lives in info["lives"].tolist()]
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self.envs.send(np.asarray(actions, dtype=np.int64))

    def step_wait(self):
        observations, rewards, terminated, truncated, info = self.envs.recv()
        infos = [
            {"lives": lives, "TimeLimit.truncated": cut}
            for lives, cut in zip(info["lives"].tolist(), truncated.tolist(), strict=True)
        ]
        for i in np.flatnonzero(terminated | truncated):
            # ALE has already begun the next game: these are its first observation and its lives.
            self.reset_infos[i] = {"lives": infos[i]["lives"]}
            infos[i]["lives"] = 0
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


def sb3_preprocessing(env: gym.Env, frame_skip: int, noop_max: int) -> gym.Env:
    """The parts of SB3's `AtariWrapper` that show the game the native environment shows.

    The parts left out play frames that the agent never sees (FIRE at a reset, a no-op after a lost life); what they
    are for, `EpisodicLife` does. Luminance is taken before the frames are pooled, as ALE's native environment does.
    """
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer; it ends its workers itself
    shape = (*env.observation_space.shape, 3)
    env = TransformObservation(env, lambda gray: np.broadcast_to(gray[..., None], shape), gym.spaces.Box(0, 255, shape, np.uint8))
    if noop_max > 0:
        env = NoopResetEnv(env, noop_max)
    if frame_skip > 1:
        env = MaxAndSkipEnv(env, frame_skip)
    return WarpFrame(env)


def make_env(
    env_id: str, num_envs: int, seed: int, vec_env: str = "native", noop_max: int = 30, num_threads: int = 0
) -> VecEnv:
    """A Stable-Baselines3 `VecEnv` of `num_envs` games with Atari's usual preprocessing.

    `reset()` gives uint8 `(num_envs, 4, 84, 84)`; `step()` adds float32 rewards in {-1, 0, 1}, `dones` at every lost
    life and game over, and infos with `lives`, `terminal_observation`, `TimeLimit.truncated`, `episode` (see
    `EpisodicLife`). Game i starts from `seed + i` with up to `noop_max` frames without action. Every `vec_env` shows
    the same frames; ids with a random frame skip (`Breakout-v4`) need SB3's pipeline and get it.
    Raises UserError for an id that is not an Atari game.
    """
    spec = atari_spec(env_id)
    frame_skip = spec.kwargs["frameskip"]
    if frame_skip == 1:  # "NoFrameskip": the skipping is left to the preprocessing, 4 by convention
        frame_skip = 4
    if vec_env == "native" and isinstance(frame_skip, int):
        venv = NativeAtariVecEnv(spec, num_envs, frame_skip, noop_max, num_threads)
    else:
        random_skip = not isinstance(frame_skip, int)
        venv = make_vec_env(
            env_id,
            num_envs,
            wrapper_class=sb3_preprocessing,
            wrapper_kwargs={"frame_skip": 1 if random_skip else frame_skip, "noop_max": noop_max},
            env_kwargs={"obs_type": "grayscale", "frameskip": frame_skip if random_skip else 1},
            vec_env_cls=SubprocVecEnv if vec_env == "subproc" else DummyVecEnv,
        )
        venv = VecFrameStack(VecTransposeImage(venv), 4, channels_order="first")
    venv = EpisodicLife(venv)
    venv.seed(seed)
    return venv


# ---------------------------------------------------------------------------------------------------------------------
# Network and agent
# ---------------------------------------------------------------------------------------------------------------------


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
        x = frames.contiguous(memory_format=torch.channels_last)
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            x = x.to(torch.bfloat16 if self.bf16 else torch.float32) / 255
            for conv, ln in ((self.conv1, self.ln1), (self.conv2, self.ln2), (self.conv3, self.ln3)):
                x = F.relu(ln(conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            x = F.relu(self.ln_fc(self.fc1(x.permute(0, 2, 3, 1).flatten(1))))
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
    at a termination it is not used. The recursion (paper, section 4, equation 13) stops at both:
    R_t = r_t + gamma * (lambda * R_{t+1} + (1 - lambda) * max_a Q(s_{t+1}, a)).
    """
    returns = rewards + gamma * (terminated == 0) * next_values
    for t in range(len(rewards) - 2, -1, -1):
        goes_on = (terminated[t] == 0) & (truncated[t] == 0)
        returns[t] += gamma * q_lambda * goes_on * (returns[t + 1] - next_values[t])
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


def update(network: QNetwork, optimizer: RAdam, frames, actions, targets, max_grad_norm: float) -> torch.Tensor:
    """One gradient step on the squared TD error of a minibatch; returns its loss, mean Q and mean target."""
    q_values = network(frames).gather(1, actions[:, None]).squeeze(1)
    loss = F.mse_loss(q_values, targets)
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
    # The fused kernel leaves the weights as they are once this is not zero, without waiting for the device to say so.
    optimizer.found_inf = torch.maximum(optimizer.found_inf, (~torch.isfinite(norm)).float())
    optimizer.step()
    return torch.stack((loss, q_values.mean(), targets.mean())).detach()


def learn(network, optimizer, rollout: dict, batch: dict, final_frames: list, rng, args: Args) -> torch.Tensor:
    """All updates of one rollout (paper, algorithm 1).

    `rollout` holds host tensors, `batch` their twins on the network's device (on a CPU the same tensors): uint8
    `frames (num_steps + 1, num_envs, 4, 84, 84)` and, `(num_steps, num_envs)` each, `actions`, `rewards`,
    `next_values`, `terminated`, `truncated`; `final_frames` are the last observations of truncated games, in order.
    Returns means of loss, Q and target over the updates, and whether a gradient was not finite.
    """
    for name, tensor in rollout.items():
        if batch[name] is not tensor:
            batch[name].copy_(tensor, non_blocking=True)
    device = batch["frames"].device
    frames, actions = batch["frames"].flatten(0, 1), batch["actions"].flatten()
    if final_frames:
        where_truncated = batch["truncated"].nonzero(as_tuple=True)
        final_frames = torch.from_numpy(np.stack(final_frames)).to(device)
    next_values = batch["next_values"]  # acting has just computed them: good for the first epoch
    statistics = torch.zeros(3, device=device)
    for epoch in range(args.update_epochs):
        if epoch > 0:
            next_values = max_q(network, frames[args.num_envs :]).view(args.num_steps, args.num_envs)
        if len(final_frames):
            next_values[where_truncated] = max_q(network, final_frames)
        targets = q_lambda_returns(
            batch["rewards"], next_values, batch["terminated"], batch["truncated"], args.gamma, args.q_lambda
        ).flatten()
        shuffled = torch.from_numpy(rng.permutation(len(actions))).to(device)
        for rows in shuffled.chunk(args.num_minibatches):
            statistics += update(network, optimizer, frames[rows], actions[rows], targets[rows], args.max_grad_norm)
    return torch.cat((statistics / (args.update_epochs * args.num_minibatches), optimizer.found_inf[None]))


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write_file(path: Path, content: dict) -> None:
    """Writes beside `path` and renames over it, so that at every instant a whole file is there."""
    data = io.BytesIO()
    torch.save({"version": VERSION, **content}, data)
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
    """The content of a file of `write_file`, read as data only; UserError for anything else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception:  # whatever the unpickler makes of bytes that are not ours
        raise UserError(f"{path}: not a file of this program, or a damaged one") from None
    if not isinstance(content, dict) or not keys <= content.keys() or not isinstance(content.get("version"), int):
        raise UserError(f"{path}: not a file of this program: it lacks {', '.join(sorted(keys))} or version")
    if content["version"] > VERSION:
        raise UserError(f"{path}: written by a newer version of this program ({content['version']}; this is {VERSION})")
    return content


def make_run_dir(args: Args) -> Path:
    """A new folder for a run; two runs that start in the same second get one each."""
    while True:
        run_dir = Path(args.log_dir) / f"{args.env_id.replace('/', '-')}__pqn_breakout__{args.seed}__{int(time.time())}"
        try:
            run_dir.mkdir(parents=True)
            (run_dir / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2) + "\n")
            return run_dir
        except FileExistsError:
            if not run_dir.is_dir():
                raise UserError(f"--log-dir {args.log_dir}: is a file, not a folder") from None
            time.sleep(0.2)
        except OSError as error:
            raise UserError(f"--log-dir {args.log_dir}: cannot be written: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(args: Args) -> Path:
    """Trains as `args` say and returns the run's folder."""
    check_args(args)
    device = choose_device(args.device)
    run_dir = make_run_dir(args)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = True
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    rng = np.random.default_rng(args.seed)
    envs = make_env(args.env_id, args.num_envs, args.seed, args.vec_env, num_threads=args.num_threads)
    bf16 = args.bf16 == "on" or args.bf16 == "auto" and computes_in_bf16(device)
    network = QNetwork(int(envs.action_space.n), bf16).to(device)
    optimizer = RAdam(network.parameters(), args.learning_rate, args.weight_decay)
    optimizer.found_inf = torch.zeros((), device=device)

    shape = (args.num_steps, args.num_envs)
    pin = device.type == "cuda"
    rollout = {
        "frames": torch.zeros((args.num_steps + 1, args.num_envs, 4, 84, 84), dtype=torch.uint8, pin_memory=pin),
        "actions": torch.zeros(shape, dtype=torch.int64, pin_memory=pin),
        "rewards": torch.zeros(shape, pin_memory=pin),
        "next_values": torch.zeros(shape, pin_memory=pin),
        "terminated": torch.zeros(shape, dtype=torch.bool, pin_memory=pin),
        "truncated": torch.zeros(shape, dtype=torch.bool, pin_memory=pin),
    }
    batch = rollout if device.type == "cpu" else {k: torch.empty_like(v, device=device) for k, v in rollout.items()}
    frames, actions, rewards, next_values, terminated, truncated = (tensor.numpy() for tensor in rollout.values())

    writer = SummaryWriter(run_dir)
    best = -math.inf
    recent = deque(maxlen=100)
    global_step = 0
    start = time.time(); last=start
    frames[0] = envs.reset()
    while global_step + args.num_envs*args.num_steps <= args.total_timesteps:
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = linear_schedule(args.learning_rate, 0.0, args.total_timesteps, global_step)
        final_frames = []
        n_games = len(recent)
        for t in range(args.num_steps):
            with torch.no_grad():
                q = network(rollout["frames"][t].to(device)).cpu().numpy()
            if t > 0: next_values[t-1] = q.max(1)
            epsilon = linear_schedule(args.start_e, args.end_e, args.exploration_fraction * args.total_timesteps, global_step)
            actions[t] = epsilon_greedy(q, epsilon, rng)
            frames[t+1], rewards[t], dones, infos = envs.step(actions[t])
            global_step += args.num_envs
            for i, info in enumerate(infos):
                actions[t, i] = info.get("action", actions[t, i])
                truncated[t, i] = info.get("TimeLimit.truncated", False)
                if truncated[t, i]: final_frames.append(info["terminal_observation"])
                if "episode" in info:
                    recent.append(info["episode"]["r"])
                    writer.add_scalar("charts/episodic_return", info["episode"]["r"], global_step)
                    writer.add_scalar("charts/episodic_length", info["episode"]["l"], global_step)
            terminated[t] = dones & ~truncated[t]
        next_values[-1] = max_q(network, rollout["frames"][-1].to(device)).cpu().numpy()
        loss, q, target, bad = learn(network, optimizer, rollout, batch, final_frames, rng, args).tolist()
        frames[0] = frames[-1]
        writer.add_scalar("losses/td_loss", loss, global_step)
        writer.add_scalar("losses/current_q", q, global_step)
        writer.add_scalar("losses/target_q", target, global_step)
        score = np.mean(recent) if recent else math.nan
        if len(recent) == 100 and score > best:
            best = score
            write_file(run_dir / "best_model.pth", {"env_id": args.env_id, "num_actions": network.fc2.out_features, "network": network.state_dict(), "global_step": global_step, "mean_return": best})
        if time.time() - last > 30:
            last = time.time()
            print(f"{global_step:,} steps, {last-start:.0f} s, score {score:.2f}, {global_step / (time.time() - start):.0f} SPS, eps {epsilon:.3f} q {q:.3f} target {target:.3f} loss {loss:.4f} bad {bad}", flush=True)
    print(f"END {global_step:,} steps, {time.time()-start:.0f} s, score {score:.2f} best {best:.2f}")
    writer.close()
    envs.close()
    return run_dir


def main() -> None:
    try:
        args = parse(Args)
        train(args)
    except UserError as error:
        sys.exit(f"pqn_breakout.py: error: {error}")


if __name__ == "__main__":
    main()
