"""PQN on Atari Breakout in one script: Q-learning without a target network and without a replay buffer.

PQN, the Parallelised Q-Network of "Simplifying Deep Temporal Difference Learning" (Gallici et al., ICLR 2025,
https://arxiv.org/abs/2407.04811), plays many games side by side, learns from each rollout of `num_steps` steps

    R_t = r_t + gamma * ((1 - lambda) * max_a Q(s_{t+1}, a) + lambda * R_{t+1}),    R_t = r_t at the end of an episode,

by gradient steps on (Q(s_t, a_t) - R_t)^2, and forgets it; lambda = 0 is TD(0). LayerNorm and the games keep it stable.

    python pqn_breakout.py    train; --help lists every option
    python evaluate.py        play whole games with the best model

The record (2,000,000 steps, last 100 training games, three seeds): 351 with TD(0), the defaults, before serves were
ends, and 390 with the recommended --q-lambda 0.3 --gamma 0.997 --update-epochs 2, in 40 minutes on one Zen 5 core.
"""

import contextlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import ale_py
import gymnasium as gym
import joblib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from filelock import FileLock
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecTransposeImage
from torch import nn
from torch.utils.tensorboard import SummaryWriter

Count = Annotated[int, (1, 10**6)]  # a number and its bounds
Share = Annotated[float, (0, 1)]
Size = Annotated[float, (1e-9, 1e9)]


@dataclass
class Args:
    """Train PQN on an Atari game. Recommended: --q-lambda 0.3 --gamma 0.997 --update-epochs 2."""

    env_id: str = "BreakoutNoFrameskip-v4"  # any Atari game of ale-py
    seed: Annotated[int, (0, 2**31 - 1)] = 1  # of network, exploration, minibatches and games
    total_timesteps: Annotated[int, (1, 10**12)] = 2_000_000  # steps of all games, 4 frames each
    learning_rate: Size = 1e-3  # step size of RAdam
    anneal_lr: bool = True  # lower the learning rate linearly to zero
    num_envs: Count = 32  # games in parallel, of all processes together
    num_steps: Count = 32  # steps of each game in a rollout
    num_minibatches: Count = 32  # minibatches that a rollout is cut into
    update_epochs: Count = 3  # passes over a rollout, each with new targets
    gamma: Share = 0.99  # discount factor
    q_lambda: Share = 0.0  # lambda of the returns; 0 is TD(0)
    advantage_alpha: Share = 0.0  # alpha of advantage learning; 0 is none
    start_e: Share = 1.0  # epsilon at the start
    end_e: Share = 0.01  # epsilon after the exploration phase
    exploration_fraction: Annotated[float, (1e-9, 1)] = 0.05  # share of the training until epsilon is end_e
    max_grad_norm: Size = 10.0  # gradients are clipped to this norm
    device: str = "auto"  # cpu, cuda, cuda:1, mps...; auto finds an accelerator
    bf16: Literal["auto", "on", "off"] = "auto"  # bfloat16; auto where the hardware has it
    num_threads: Annotated[int, (0, 1024)] = 0  # CPU threads of a process; 0 is its share of the cores
    compile: bool = False  # torch.compile, on CUDA with CUDA graphs; slower on a CPU
    vec_env: Literal["native", "sb3"] = "native"  # ALE's vector environment, or SB3's pipeline
    log_dir: str = "logs"  # where the run's folder is made
    resume: str | None = None  # folder of a run to go on with
    checkpoint_minutes: Size = 5.0  # minutes between checkpoints


# --- The algorithm ---
class QNetwork(nn.Module):
    """Nature CNN with LayerNorm over channels: uint8 `(batch, 4, 84, 84)` to float32 Q-values `(batch, actions)`."""

    def __init__(self, num_actions: int, bf16: bool = False):
        super().__init__()
        self.bf16 = bf16
        self.conv1, self.ln1 = nn.Conv2d(4, 32, 8, stride=4), nn.LayerNorm(32)
        self.conv2, self.ln2 = nn.Conv2d(32, 64, 4, stride=2), nn.LayerNorm(64)
        self.conv3, self.ln3 = nn.Conv2d(64, 64, 3, stride=1), nn.LayerNorm(64)
        self.fc1, self.ln_fc = nn.Linear(7 * 7 * 64, 512), nn.LayerNorm(512)
        self.fc2 = nn.Linear(512, num_actions)
        for layer in (self.conv1, self.conv2, self.conv3, self.fc1, self.fc2):
            nn.init.orthogonal_(layer.weight, 0.01 if layer is self.fc2 else math.sqrt(2))  # 0.01: less to unlearn
            nn.init.zeros_(layer.bias)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = frames.contiguous(memory_format=torch.channels_last).to(torch.bfloat16 if self.bf16 else torch.float32)
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            # Scaling the weights saves a pass over the frames; bfloat16 holds 0..255 exactly.
            x = F.conv2d(x, self.conv1.weight / 255, self.conv1.bias, stride=4).permute(0, 2, 3, 1)
            for ln, conv in ((self.ln1, self.conv2), (self.ln2, self.conv3)):
                x = conv(F.relu(ln(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = F.relu(self.ln_fc(self.fc1(F.relu(self.ln3(x)).flatten(1))))
        return self.fc2(x.float())  # actions differ by less than bfloat16 resolves


class RAdam(torch.optim.Adam):
    """Rectified Adam (Liu et al., ICLR 2020), as `torch.optim.RAdam`, on Adam's fused kernel."""

    def __init__(self, params):
        super().__init__(params, fused=True)
        group = self.param_groups[0]
        group["lr"] = torch.tensor(0.0, device=group["params"][0].device)  # no constant of a captured graph

    def step(self, lr: float) -> None:
        group = self.param_groups[0]
        t = group["steps"] = group.get("steps", 0) + 1
        beta2 = group["betas"][1]
        bias2 = 1 - beta2**t
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * (1 - bias2) / bias2
        factor, group["eps"] = 1e8, 1e8  # sqrt(v) + 1e8 is 1e8: at first plain momentum
        if rho > 5:
            factor = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            group["eps"] = 1e-8 / math.sqrt(bias2)
        group["lr"].fill_(lr * factor)
        super().step()


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """`start` at step 0, `end` from step `duration` on, a straight line between."""
    return start + (end - start) * min(step / duration, 1.0)


def epsilon_greedy(q_values: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """Actions, int64 `(num_envs,)`, for Q-values `(num_envs, num_actions)`; each environment draws for itself."""
    num_envs, num_actions = q_values.shape
    explore = rng.random(num_envs) < epsilon
    return np.where(explore, rng.integers(num_actions, size=num_envs), q_values.argmax(1))


def q_lambda_returns(rewards, next_values, dones, gamma: float, q_lambda: float):
    """The targets R_t above, Peng's Q(lambda), of arrays or tensors `(num_steps, num_envs)`.

    `next_values[t]` is max_a Q(s_{t+1}, a), not used where step t ends an episode.
    """
    returns = rewards + gamma * next_values * (dones == 0)
    for t in range(len(rewards) - 2, -1, -1):
        returns[t] += gamma * q_lambda * (returns[t + 1] - next_values[t]) * (dones[t] == 0)
    return returns


class Rollout:
    """Buffers; `frames` and `values` have the states after the last step, too."""

    def __init__(self, num_steps: int, num_envs: int):
        self.frames = np.zeros((num_steps + 1, num_envs, 84, 84, 4), np.uint8)  # channels last
        self.values = np.zeros((num_steps + 1, num_envs), np.float32)  # max_a Q(s, a)
        self.advantages = np.zeros((num_steps, num_envs), np.float32)  # Q(s, a) - max_a Q(s, a)
        self.actions = np.zeros((num_steps, num_envs), np.int64)
        self.rewards = np.zeros((num_steps, num_envs), np.float32)
        self.dones = np.zeros((num_steps, num_envs), bool)  # ends of episodes, and serves


@torch.no_grad()
def play(network: nn.Module, envs: VecEnv, rollout: Rollout, epsilons: list[float], gamma: float, rng):
    """Fills `rollout`, from where it ended before: a step of every game for each of `epsilons`.

    A truncated game is over, and gamma * max_a Q(last observation) joins its last reward.
    Returns the finished games as (t, true score, length) and the share of steps without reward.
    """
    device = next(network.parameters()).device
    frames, rewards, games, num_rewards = rollout.frames, rollout.rewards, [], 0

    def q_values(states: np.ndarray) -> np.ndarray:
        states = torch.from_numpy(states).to(device, non_blocking=True)
        return network(states.permute(0, 3, 1, 2)).cpu().numpy()  # waits: the next step overwrites the states

    frames[0] = frames[-1]
    for t, epsilon in enumerate(epsilons):
        q = q_values(frames[t])
        rollout.values[t] = q.max(1)
        actions = epsilon_greedy(q, epsilon, rng)
        observations, rewards[t], rollout.dones[t], infos = envs.step(actions)
        torch.from_numpy(frames[t + 1]).copy_(torch.from_numpy(observations).permute(0, 2, 3, 1))  # numpy is slower
        num_rewards += np.count_nonzero(rewards[t])
        truncated = [i for i, info in enumerate(infos) if info.get("TimeLimit.truncated")]
        if truncated:  # all games, as a compiled network knows one batch size
            last = frames[t + 1].copy()
            last[truncated] = [infos[i]["terminal_observation"].transpose(1, 2, 0) for i in truncated]
            rewards[t, truncated] += gamma * q_values(last).max(1)[truncated]
        rollout.actions[t] = [info.get("action", actions[i]) for i, info in enumerate(infos)]  # what was played
        rollout.dones[t] |= ["action" in info for info in infos]  # waiting for a ball looks like having lost it
        rollout.advantages[t] = q[range(len(q)), rollout.actions[t]] - rollout.values[t]
        games += [(t, info["episode"]["r"], info["episode"]["l"]) for info in infos if "episode" in info]
    return games, 1 - num_rewards / rewards.size


def learn(network: nn.Module, optimizer: RAdam, rollout: Rollout, lr: float, rng, args: Args) -> list[float]:
    """All updates of a rollout; its `values` and `advantages` are used up.

    Each epoch has new targets, from Q-values of acting or the epoch before: only the last states take a pass.
    Advantage learning (Bellemare et al., AAAI 2016) lowers those of worse actions, bounded as in Munchausen RL.
    Returns means of loss, Q, target and gradient norm before clipping.
    """
    device = next(network.parameters()).device
    buffers = map(torch.from_numpy, vars(rollout).values())
    frames, values, advantages, actions, rewards, dones = (buffer.to(device, non_blocking=True) for buffer in buffers)
    states, statistics = frames[:-1].flatten(0, 1), torch.zeros(4, device=device)
    for _ in range(args.update_epochs):
        with torch.no_grad():
            values[-1] = network(frames[-1].permute(0, 3, 1, 2)).amax(1)
        targets = q_lambda_returns(rewards, values[1:], dones, args.gamma, args.q_lambda).flatten()
        targets += args.advantage_alpha * advantages.flatten().clamp(min=-1)
        shuffled = torch.from_numpy(rng.permutation(len(targets))).to(device, non_blocking=True)
        for rows in shuffled.chunk(args.num_minibatches):
            q_values = network(states.index_select(0, rows).permute(0, 3, 1, 2))
            chosen = q_values.gather(1, actions.view(-1, 1)[rows]).squeeze(1)
            loss = F.mse_loss(chosen, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
            optimizer.step(lr)
            values.view(-1)[rows] = best = q_values.detach().amax(1)
            advantages.view(-1)[rows] = chosen.detach() - best
            statistics += torch.stack((loss, chosen.mean(), targets[rows].mean(), norm)).detach()
    return (statistics / (args.update_epochs * args.num_minibatches)).tolist()


# --- Training ---
def make_agent(args: Args, num_actions: int, device: torch.device) -> tuple[QNetwork, RAdam]:
    """A new network and its optimizer."""
    on_cuda = device.type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(False) if on_cuda else torch.cpu.get_capabilities().get("avx512_bf16")
    bf16 = args.bf16 == "on" or (args.bf16 == "auto" and bool(has_bf16))
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(args.seed)
        network = QNetwork(num_actions, bf16).to(device)
    if args.compile:
        network.compile(dynamic=False, mode="reduce-overhead" if on_cuda else "default")
    return network, RAdam(network.parameters())


def train(args: Args, stop: list | tuple = ()) -> Path | None:
    """Trains as `args` say, until `stop` holds something; returns the run's folder. Raises UserError, OSError.

    In a process group every process calls this and plays its share of the games; rank 0 writes and reports.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    check_args(args, world_size)
    num_envs = args.num_envs // world_size
    batch_size = args.num_envs * args.num_steps
    exploration_steps = args.exploration_fraction * args.total_timesteps
    final_lr = 0.0 if args.anneal_lr else args.learning_rate
    cores = max(1, joblib.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    num_threads = min(args.num_threads or cores, cores)  # more would be a hundred times slower
    device, parent = choose_device(args.device), os.getppid()
    rollout = Rollout(args.num_steps, num_envs)

    def save_run() -> None:
        save(run_dir / "best_model.pth", {"env_id": args.env_id, "global_step": global_step} | best)
        learned = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        save(run_dir / "checkpoint.pth", {"args": vars(args), "global_step": global_step, "recent": recent} | learned)

    with contextlib.ExitStack() as stack:
        envs = make_env(args.env_id, num_envs, args.seed, args.vec_env, num_threads=num_threads)
        stack.callback(envs.close)
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(num_threads)
        network, optimizer = make_agent(args, int(envs.action_space.n), device)
        if rank == 0:
            name = f"{args.env_id.replace('/', '-')}__pqn_breakout__{args.seed}__{time.time_ns() // 10**6}"
            run_dir = Path(args.resume or Path(args.log_dir, name))
            run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
            stack.enter_context(FileLock(run_dir / ".lock", timeout=0))  # one process writes
        global_step, recent, best = 0, [], {"mean_return": -math.inf, "network": network.state_dict()}
        if args.resume:
            checkpoint = load(Path(args.resume, "checkpoint.pth"), CHECKPOINT, network, optimizer)
            global_step, recent = checkpoint["global_step"], checkpoint["recent"]
            if Path(args.resume, "best_model.pth").exists():
                best = load(Path(args.resume, "best_model.pth"), MODEL)
        learner = nn.parallel.DistributedDataParallel(network) if world_size > 1 else network  # averages gradients
        if rank == 0:
            save_run()
            writer = SummaryWriter(run_dir, purge_step=global_step + 1)  # takes back what came later
            stack.callback(writer.close)
            (run_dir / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
            where = f"{world_size} x {device} in {'bfloat16' if network.bf16 else 'float32'}"
            say(f"PQN on {args.num_envs} games of {args.env_id} from step {global_step:,}, {where}: {run_dir}")

        # Game i has the same seed in whatever process; a resumed run starts other games.
        rng = np.random.default_rng([args.seed, global_step])
        envs.seed(int(rng.integers(2**31)) + rank * num_envs)
        rollout.frames[-1] = envs.reset().transpose(0, 2, 3, 1)
        # Scatter these over all stages: learning from first balls would set the run back.
        for _ in range(16 if 0 < global_step <= args.total_timesteps - batch_size else 0):
            play(network, envs, rollout, [args.end_e] * args.num_steps, args.gamma, rng)

        first_step, start, stopped = global_step, time.monotonic(), False
        reported, checkpointed = -math.inf, start
        while global_step + batch_size <= args.total_timesteps and not stopped:
            # 1. Play num_steps of every game, epsilon-greedily.
            rng = np.random.default_rng([args.seed, global_step, rank])
            steps = range(global_step + args.num_envs, global_step + batch_size + 1, args.num_envs)
            epsilons = [linear_schedule(args.start_e, args.end_e, exploration_steps, step) for step in steps]
            games, sparse_reward_ratio = play(network, envs, rollout, epsilons, args.gamma, rng)

            # 2. Learn from them.
            lr = linear_schedule(args.learning_rate, final_lr, args.total_timesteps, global_step)
            means = learn(learner, optimizer, rollout, lr, rng, args)
            global_step += batch_size

            # 3. Report and save.
            orphaned = world_size > 1 and os.getppid() != parent  # torchrun was killed
            reports = [(bool(stop) or orphaned, games, [*means, sparse_reward_ratio])] * world_size
            if world_size > 1:
                dist.all_gather_object(reports, reports[rank])
            stops, games, means = zip(*reports, strict=True)
            stopped = any(stops)
            loss, current_q, target_q, norm, sparse_reward_ratio = np.mean(means, axis=0).tolist()
            if not math.isfinite(loss + norm):
                raise UserError(f"step {global_step:,}: not finite; --resume with --bf16 off, or lower --learning-rate")
            if rank > 0:
                continue
            for t, score, length in sum(games, []):
                recent = [*recent[-99:], score]
                writer.add_scalar("charts/episodic_return", score, steps[t])
                writer.add_scalar("charts/episodic_length", length, steps[t])
            score, now = float(np.mean(recent or math.nan)), time.monotonic()
            sps = (global_step - first_step) / (now - start)
            scalars = {"charts/SPS": sps, "charts/epsilon": epsilons[-1], "charts/learning_rate": lr}
            scalars |= {"charts/sparse_reward_ratio": sparse_reward_ratio}
            scalars |= {"losses/td_loss": loss, "losses/current_q": current_q, "losses/target_q": target_q}
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, global_step)
            mean_return = score if len(recent) == 100 else -math.inf  # until then the last is best
            highest = max(mean_return, best["mean_return"])
            if mean_return >= highest - np.std(recent or 0) / 5:  # within two standard errors the newer is better
                weights = {name: weight.clone() for name, weight in network.state_dict().items()}
                best = {"global_step": global_step, "mean_return": highest, "network": weights}
            if recent and now - reported > 30:
                progress = f"step {global_step:,} of {args.total_timesteps:,}: score {score:.1f}"
                say(f"{progress}, epsilon {epsilons[-1]:.3f}, {sps:.0f} steps/s")
                reported = now
            if now - checkpointed > 60 * args.checkpoint_minutes:
                writer.flush()  # the curves of a killed run reach to its checkpoint
                save_run()
                checkpointed = now

        if rank > 0:
            return None
        save_run()
        score = f"score {np.mean(recent):.1f}" if recent else "no game is over yet"
        hint = f"pqn_breakout.py --resume {run_dir}" if stopped else f"evaluate.py --model {run_dir / 'best_model.pth'}"
        say(f"step {global_step:,} after {(time.monotonic() - start) / 60:.1f} minutes: {score}; next: python {hint}")
        return run_dir


# --- Environments ---
class AtariVecEnv(VecEnv):
    """ALE's native vector environment as a Stable-Baselines3 `VecEnv`.

    - Observations are uint8 `(num_envs, 4, 84, 84)`: grayscale, pooled over two frames, the newest last.
    - A lost life is a termination (`done`, with `terminal_observation`), but the game goes on.
    - FIRE, which serves a ball, is the first action of every life; `infos[i]["action"]` tells of it.
    - Rewards are clipped to their sign; `infos[i]["episode"]` has a game's true score `r` and steps `l`.
    """

    def __init__(self, spec, num_envs: int, frame_skip: int, noop_max: int, num_threads: int):
        if num_envs < 1:
            raise ValueError(f"num_envs {num_envs}: must be at least 1")
        options = spec.kwargs | {"frameskip": frame_skip, "noop_max": noop_max, "num_threads": num_threads}
        options |= {"use_fire_reset": False, "reward_clipping": False, "autoreset_mode": "SameStep"}
        self.envs = AtariVectorEnv(num_envs=num_envs, **options)
        self.spec, self.frame_skip, self.render_mode, self.requested = spec, frame_skip, None, None
        meanings = self.get_action_meanings()
        self.fire = meanings.index("FIRE") if "FIRE" in meanings else None
        super().__init__(num_envs, self.envs.single_observation_space, self.envs.single_action_space)

    def get_action_meanings(self) -> list[str]:
        return [ale_py.Action(action).name for action in self.envs.ale.get_action_set()]

    def reset(self) -> np.ndarray:
        seeds = [-1 if seed is None else seed % 2**31 for seed in self._seeds]  # -1 keeps the generator
        observations, info = self.envs.reset(seed=np.array(seeds))
        self._reset_seeds()
        self._reset_options()
        self.lives, self.new_life = info["lives"], np.ones(self.num_envs, dtype=bool)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        self.requested = actions

    def step_wait(self):
        requested, self.requested = self.requested, None
        if np.shape(requested) != (self.num_envs,) or not np.isin(requested, range(self.action_space.n)).all():
            raise ValueError(f"actions {requested}: must be {self.num_envs} integers below {self.action_space.n}")
        actions = np.array(requested, dtype=np.int64)
        if self.fire is not None:
            actions[self.new_life] = self.fire
        observations, rewards, terminated, truncated, details = self.envs.step(actions)
        lives_before, self.lives = self.lives, details["lives"]
        over = terminated | truncated
        done = over | ((self.lives > 0) & (self.lives < lives_before))
        self.returns += rewards
        self.lengths += 1
        infos = [{"lives": int(n), "TimeLimit.truncated": bool(t)} for n, t in zip(self.lives, truncated, strict=True)]
        for i, info in enumerate(infos):
            if self.fire is not None and self.new_life[i]:
                info["action"] = self.fire
            if done[i]:
                info["terminal_observation"] = details["final_obs"][i] if over[i] else observations[i]
            if over[i]:  # `observations` and `lives` are the next game's
                info["lives"] = int(lives_before[i]) if truncated[i] else 0
                info["episode"] = {"r": float(self.returns[i]), "l": int(self.lengths[i])}
        self.new_life, self.returns[over], self.lengths[over] = done.copy(), 0, 0
        return observations, np.sign(rewards).astype(np.float32), done, infos

    def close(self) -> None:
        self.envs.close()

    def get_attr(self, attr_name: str, indices=None) -> list:
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value, indices=None) -> None:
        setattr(self, attr_name, value)  # all games share their attributes

    def env_method(self, method_name: str, *method_args, indices=None, **method_kwargs) -> list:
        return [getattr(self, method_name)(*method_args, **method_kwargs) for _ in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class, indices=None) -> list[bool]:
        return [wrapper_class is Monitor for _ in self._get_indices(indices)]  # `infos` carry what it reports


def make_env(env_id: str, num_envs: int, seed: int, vec_env="native", noop_max=30, num_threads=0) -> VecEnv:
    """A Stable-Baselines3 `VecEnv`, uint8 `(num_envs, 4, 84, 84)`; game i starts from `seed + i`. Raises UserError.

    The pipeline `sb3` plays frames that the agent never sees: FIRE at a reset, a no-op after a lost life.
    """
    spec = gym.registry.get(env_id)
    if spec is None or spec.entry_point != "ale_py.env:AtariEnv":
        raise UserError(f"--env-id {env_id}: no Atari game, as BreakoutNoFrameskip-v4 is")
    skip = spec.kwargs["frameskip"]  # 1, of "NoFrameskip", leaves it to the preprocessing: 4
    inner, outer = (1, 4 if skip == 1 else skip) if isinstance(skip, int) else (skip, 1)
    if vec_env == "native" and inner == 1:
        venv = AtariVecEnv(spec, num_envs, outer, noop_max, num_threads)
    elif vec_env == "sb3":
        options = {"wrapper_kwargs": {"frame_skip": outer, "noop_max": noop_max}, "env_kwargs": {"frameskip": inner}}
        venv = VecTransposeImage(VecFrameStack(make_atari_env(env_id, num_envs, **options), 4))
    else:
        raise UserError(f"--vec-env {vec_env}: must be native or sb3; a random frame skip needs sb3")
    venv.seed(seed)
    return venv


# --- Files and command line ---
class UserError(Exception):
    """Something the user can mend, told in one line."""


CHECKPOINT = {"args": dict, "global_step": int, "recent": list, "network": dict, "optimizer": dict}
MODEL = {"env_id": str, "mean_return": float, "network": dict}


def save(path: Path, content: dict) -> None:
    """Writes beside `path` and renames over it: at every instant a whole file is there. Raises OSError."""
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def load(path: Path, kinds: dict[str, type], network=None, optimizer=None) -> dict:
    """What `save` wrote, read as data, never executed; its weights go into network and optimizer.

    UserError unless the file is whole, holds what `kinds` say, and fits network and optimizer.
    """
    try:
        with zipfile.ZipFile(path if path.is_file() else "") as file:  # a device would never end
            damaged = any(entry.compress_type for entry in file.infolist()) or file.testzip()  # torch.load asks neither
        content = {} if damaged else torch.load(path, map_location="cpu", weights_only=True)
        fits = isinstance(content, dict) and all(isinstance(content[name], kind) for name, kind in kinds.items())
        if not fits or not all(weight.isfinite().all() for weight in content["network"].values()):
            raise ValueError
        if network:
            network.load_state_dict(content["network"])
        if optimizer:
            optimizer.load_state_dict(content["optimizer"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception:  # whatever an unpickler makes of such bytes
        raise UserError(f"{path}: damaged, not a file of this program, or of another network") from None
    return content


def say(line: str) -> None:
    """Prints a line; training goes on when nobody reads it (`| head`, a closed terminal)."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def choose_device(name: str) -> torch.device:
    """The device `name`, tried out; `auto` is the accelerator of PyTorch, or the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        device = torch.device(accelerator if name == "auto" else name)
        if device.type != "cpu" and "LOCAL_RANK" in os.environ:  # of torchrun: one for every process
            device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device).tolist()  # some only pretend to hold data
    except (RuntimeError, AssertionError, ImportError):
        raise UserError(f"--device {name}: no such device here; cpu always works") from None
    return device


def parse(args_class, **options):
    """`tyro.cli`, but errors are one line instead of a frame."""
    frame = io.StringIO()
    try:
        with contextlib.redirect_stderr(frame):
            return tyro.cli(args_class, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        words = re.sub("[│╭╮╰╯]", " ", re.split("[-─]{4,}", frame.getvalue())[1]).split()
        raise UserError(f"{' '.join(words).rstrip('.')}; --help lists the options") from None


def check_bounds(args) -> None:
    """UserError for a number out of the bounds of its annotation."""
    for name, annotation in get_type_hints(type(args), include_extras=True).items():
        for low, high in getattr(annotation, "__metadata__", ()):
            if not low <= getattr(args, name) <= high:
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be from {low} to {high}")


def check_args(args: Args, world_size: int) -> None:
    """UserError for what cannot be trained with."""
    check_bounds(args)
    rollout = args.num_envs * args.num_steps
    size = f"--num-envs {args.num_envs} x --num-steps {args.num_steps}"
    if args.num_envs % world_size or rollout // world_size % args.num_minibatches:
        raise UserError(f"{size}: must divide into {world_size} processes x --num-minibatches {args.num_minibatches}")
    if args.total_timesteps < rollout:
        raise UserError(f"--total-timesteps {args.total_timesteps}: must be at least one rollout, {size}")


def run_command(command) -> None:
    """Calls `command(stop)` and exits; a first signal joins the list `stop`, a second one ends the process."""
    stop = []

    def request_stop(number: int, _) -> None:
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:  # Windows has no SIGHUP
        if signal.getsignal(number) is not signal.SIG_IGN:  # as of nohup, or of &
            signal.signal(number, request_stop)
    if sys.stdout:  # None if closed
        sys.stdout.reconfigure(errors="backslashreplace")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banners
    try:
        command(stop)
        sys.exit(128 + stop[0] if stop else 0)
    except (UserError, OSError, MemoryError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    finally:
        sys.stdout = None  # nothing is flushed again


def main(stop: list[int]) -> None:
    """Trains as the command line says; a resumed run keeps its arguments, but for those given anew."""
    args = parse(Args)
    if args.resume is not None:
        own = load(Path(args.resume, "checkpoint.pth"), CHECKPOINT)["args"]
        own |= {"resume": args.resume, "log_dir": str(Path(args.resume).parent)}  # it may have been moved
        args = parse(Args, default=Args(**{key: own[key] for key in own if hasattr(args, key)}))  # drops old options
    if "RANK" not in os.environ:
        train(args, stop)
        return
    dist.init_process_group()  # of torchrun
    try:
        train(args, stop)
    except RuntimeError as error:
        sys.exit(f"process {dist.get_rank()} lost another one, or failed: {str(error).splitlines()[0]}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
