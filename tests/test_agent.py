"""The agent: targets, exploration, optimizer, network, playing, learning, devices."""

from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import pqn_breakout
from pqn_breakout import Args, QNetwork, RAdam, Rollout, epsilon_greedy, learn, linear_schedule, play, train


# --- Targets, exploration, optimizer ---
def returns_by_definition(rewards, next_values, dones, gamma, q_lambda):
    """The lambda-return as what it stands for: the mix of all n-step returns that stay inside the episode."""
    num_steps, num_envs = rewards.shape
    returns = np.zeros((num_steps, num_envs))
    for i in range(num_envs):
        for t in range(num_steps):
            last = next(k for k in range(t, num_steps) if dones[k, i] or k == num_steps - 1)
            for k in range(t, last + 1):
                n_step = sum(gamma ** (j - t) * rewards[j, i] for j in range(t, k + 1))
                if not dones[k, i]:
                    n_step += gamma ** (k + 1 - t) * next_values[k, i]
                weight = q_lambda ** (k - t) * (1 if k == last else 1 - q_lambda)
                returns[t, i] += weight * n_step
    return returns


def random_experience(seed, num_steps=12, num_envs=50):
    rng = np.random.default_rng(seed)
    rewards, next_values = rng.normal(size=(2, num_steps, num_envs))
    return rewards, next_values, rng.random((num_steps, num_envs)) < 0.2


@pytest.mark.parametrize("q_lambda", [0.0, 0.3, 0.65, 1.0])
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_targets_are_the_mix_of_n_step_returns(q_lambda, kind):
    arrays = random_experience(seed=3)
    given = [kind(array) for array in arrays]
    returns = pqn_breakout.q_lambda_returns(*given, 0.97, q_lambda)
    np.testing.assert_allclose(np.asarray(returns), returns_by_definition(*arrays, 0.97, q_lambda), atol=1e-12)
    np.testing.assert_equal(list(map(np.asarray, given)), list(arrays))  # left as they were


def test_linear_schedule_goes_straight_and_stays_at_its_end():
    assert [linear_schedule(1.0, 0.2, 100, step) for step in (0, 50, 100, 1000)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_every_environment_explores_for_itself():
    rng = np.random.default_rng(0)
    q_values = np.tile([0.0, 1.0, 0.5, -1.0], (8, 1))
    actions = np.array([epsilon_greedy(q_values, 0.4, rng) for _ in range(5000)])
    assert actions.shape == (5000, 8) and actions.dtype == np.int64
    greedy = actions == 1
    # An environment is greedy with probability 0.6 + 0.4 / 4 and takes each other action with 0.1 ...
    np.testing.assert_allclose(greedy.mean(0), 0.7, atol=0.03)
    for action in (0, 2, 3):
        np.testing.assert_allclose((actions == action).mean(0), 0.1, atol=0.02)
    # ... whatever its neighbours do: their number of greedy steps is binomial, not all or nothing.
    assert greedy.sum(1).var() == pytest.approx(8 * 0.7 * 0.3, rel=0.1)


def test_radam_makes_the_steps_of_torch_radam():
    torch.manual_seed(0)
    start = torch.randn(40, 30)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer, reference = RAdam([ours]), torch.optim.RAdam([theirs])
    for step in range(300):
        ours.grad = torch.randn(40, 30) * (1 + step % 7)
        theirs.grad = ours.grad.clone()
        lr = reference.param_groups[0]["lr"] = 1e-2 * (1 - step / 400)
        optimizer.step(lr)
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
    assert (ours - start).abs().max() > 0.1


# --- Network ---
def random_frames(*shape):
    return torch.randint(0, 256, (*shape, 4, 84, 84), dtype=torch.uint8)


def test_network_normalises_over_channels_at_each_position_and_bfloat16_stays_close():
    torch.manual_seed(0)
    network, frames = QNetwork(6), random_frames(3)
    with torch.no_grad():  # biases and affine parts that do something, so that the test sees them
        for name, parameter in network.named_parameters():
            if name.startswith("ln") or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    weights = {name: weight.double() for name, weight in network.state_dict().items()}

    def normalise(x, ln):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return (x * weights[f"{ln}.weight"] + weights[f"{ln}.bias"]).relu()

    x = frames.double() / 255
    for i, stride in ((1, 4), (2, 2), (3, 1)):
        x = torch.nn.functional.conv2d(x, weights[f"conv{i}.weight"], weights[f"conv{i}.bias"], stride)
        x = normalise(x.permute(0, 2, 3, 1), f"ln{i}").permute(0, 3, 1, 2)
    x = x.permute(0, 2, 3, 1).flatten(1) @ weights["fc1.weight"].T + weights["fc1.bias"]
    expected = normalise(x, "ln_fc") @ weights["fc2.weight"].T + weights["fc2.bias"]
    q_values = network(frames)
    assert q_values.dtype == torch.float32
    torch.testing.assert_close(q_values.double(), expected, rtol=1e-3, atol=1e-5)
    channels_last_view = frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(network(channels_last_view), q_values)
    network.bf16 = True
    rounded = network(frames)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, q_values)
    torch.testing.assert_close(rounded, q_values, rtol=0, atol=0.03 * q_values.abs().max().item())


# --- Playing and learning ---
class Corridor:
    """Rooms 0, 1, 2 in a row. Action 1 walks on and is worth 1 behind the last room; action 0 leaves with 0.5; action 2
    leaves with -0.5. Nearly every walk is cut short by a time limit on entering room 2. Game 0 always walks.

    Walking is right only for who bootstraps from the next room, not across an end, and from the last observation of
    a truncated episode rather than from the next episode's first.
    """

    action_space = gym.spaces.Discrete(3)
    pictures = np.zeros((3, 4, 84, 84), dtype=np.uint8)
    for room in range(3):
        pictures[room, :, 28 * room : 28 * room + 28] = 255

    def __init__(self):
        self.rooms, self.steps, self.random = np.zeros(16, dtype=int), [], np.random.default_rng(0).random

    def reset(self):
        return self.pictures[self.rooms]

    def step(self, requested):
        actions = np.array([1, *requested[1:]])
        walks = actions == 1
        rewards = np.where(walks, self.rooms == 2, 0.5 - 0.5 * actions).astype(np.float32)
        rooms = self.rooms + walks
        truncated = walks & (rooms == 2) & (self.random(16) < 0.9)
        dones = ~walks | (rooms == 3) | truncated
        infos = [{"TimeLimit.truncated": bool(cut)} for cut in truncated]
        if requested[0] != 1:
            infos[0]["action"] = 1
        for i in np.flatnonzero(dones):
            infos[i]["terminal_observation"] = self.pictures[min(rooms[i], 2)]
            infos[i]["episode"] = {"r": float(rewards[i]), "l": 7 + int(i)}
        # Three episodes in ten start in room 2, so that what it is worth can be learned.
        self.rooms = np.where(dones, 2 * (self.random(16) < 0.3), rooms)
        self.steps.append((actions, self.reset(), rewards.copy(), dones, truncated, infos))
        return self.reset(), rewards, dones, infos

    def seed(self, seed):
        pass

    def close(self):
        pass


def test_play_fills_the_buffers_with_what_the_environments_said_and_bootstraps_truncated_games():
    torch.manual_seed(0)
    network, envs, rollout = QNetwork(3), Corridor(), Rollout(16, 16)
    torch.nn.init.orthogonal_(network.fc2.weight)
    epsilons, games = [0.0, 0.5] * 2 + [1.0] * 12, []
    observations = random_frames(16).numpy()  # where the rollout before ended
    rollout.frames[-1] = observations.transpose(0, 2, 3, 1)
    played, sparse_reward_ratio = play(network, envs, rollout, epsilons, 0.9, np.random.default_rng(7))
    rng = np.random.default_rng(7)
    last_room = network(torch.from_numpy(envs.pictures[2:])).max().item()
    for t, (acted, following, reward, done, truncated, infos) in enumerate(envs.steps):
        q_values = network(torch.from_numpy(observations)).detach().numpy()
        np.testing.assert_array_equal(rollout.frames[t], observations.transpose(0, 2, 3, 1))
        best = q_values.max(1)
        np.testing.assert_allclose(rollout.values[t], best, rtol=1e-4)
        np.testing.assert_array_equal(rollout.actions[t], acted)
        np.testing.assert_allclose(rollout.advantages[t], q_values[range(16), acted] - best, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(acted[1:], epsilon_greedy(q_values, epsilons[t], rng)[1:])
        np.testing.assert_array_equal(rollout.dones[t], done | ["action" in info for info in infos])
        np.testing.assert_allclose(rollout.rewards[t], reward + 0.9 * truncated * last_room, rtol=1e-4)
        games += [(t, info["episode"]["r"], info["episode"]["l"]) for info in infos if "episode" in info]
        observations = following
    np.testing.assert_array_equal(rollout.frames[16], observations.transpose(0, 2, 3, 1))
    assert played == games and {step[4].sum() for step in envs.steps} >= {0, 1, 2}, envs.steps
    assert sparse_reward_ratio == pytest.approx(np.mean([step[2] == 0 for step in envs.steps]))


SMALL = {"num_envs": 3, "num_steps": 4, "num_minibatches": 3, "update_epochs": 3}


def random_rollout() -> Rollout:
    torch.manual_seed(0)
    rollout, rng = Rollout(4, 3), np.random.default_rng(0)
    bounds = {"frames": (0, 256), "values": (-3, 4), "advantages": (-3, 1), "actions": (0, 4)}
    bounds |= {"rewards": (-3, 4), "dones": (0, 2)}
    for name, (low, high) in bounds.items():
        buffer = getattr(rollout, name)
        buffer[:] = rng.integers(low, high, buffer.shape)
    return rollout


@pytest.mark.parametrize("max_grad_norm", [0.1, 1e3], ids=["clipped", "not clipped"])
def test_learn_is_torch_radam_on_targets_from_the_q_values_last_seen(max_grad_norm):
    """Targets are refreshed before each epoch: rows by the networks of the updates before, the last states by the
    network at the epoch's start; minibatches are those of the same permutations."""
    args = Args(**SMALL, gamma=0.9, q_lambda=0.5, advantage_alpha=0.7, max_grad_norm=max_grad_norm)
    rollout, ours = random_rollout(), QNetwork(4)
    theirs, start = deepcopy(ours), deepcopy(ours)
    frames = torch.from_numpy(rollout.frames.transpose(0, 1, 4, 2, 3).reshape(15, 4, 84, 84))
    values, actions = torch.from_numpy(rollout.values.copy()), torch.from_numpy(rollout.actions.flatten())
    advantages = rollout.advantages.flatten()
    means = learn(ours, RAdam(ours.parameters()), rollout, 0.01, np.random.default_rng(5), args)

    optimizer, rng, statistics = torch.optim.RAdam(theirs.parameters(), 0.01), np.random.default_rng(5), []
    for _ in range(3):
        with torch.no_grad():
            values[4] = theirs(frames[12:]).max(1).values
        targets = returns_by_definition(rollout.rewards, values[1:].numpy(), rollout.dones, 0.9, 0.5)
        targets = torch.tensor(targets.ravel() + 0.7 * np.maximum(advantages, -1), dtype=torch.float32)
        for rows in np.split(rng.permutation(12), 3):
            q_values = theirs(frames[rows])
            chosen = q_values[range(4), actions[rows]]
            loss = ((chosen - targets[rows]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
            optimizer.step()
            values.view(-1)[rows] = q_values.detach().max(1).values
            advantages[rows] = (chosen - q_values.max(1).values).detach()
            statistics.append([loss.item(), chosen.mean().item(), targets[rows].mean().item(), norm.item()])
    assert means == pytest.approx(np.mean(statistics, axis=0), rel=1e-3)
    ours, theirs, start = (parameters_to_vector(network.parameters()) for network in (ours, theirs, start))
    assert (ours - theirs).norm() < 1e-3 * (theirs - start).norm()


def test_a_single_gradient_that_is_not_finite_shows_in_what_learn_returns():
    network, factors = QNetwork(4), iter([1.0] * 8 + [np.inf])
    network.fc2.bias.register_hook(lambda gradient: gradient * next(factors))  # in the last update
    optimizer, rng = RAdam(network.parameters()), np.random.default_rng(0)
    loss, *_, norm = learn(network, optimizer, random_rollout(), 1e-9, rng, Args(**SMALL))
    assert np.isfinite(loss) and not np.isfinite(norm)


class Table(torch.nn.Linear):
    """A Q-value for each room and action, in the place of the network: quick, and learns what its targets say."""

    bf16 = False

    def __init__(self, num_actions, bf16=False):
        super().__init__(3, num_actions, bias=False)

    def forward(self, frames):
        return super().forward(frames[:, 0, ::28, 0] / 255)


@pytest.mark.parametrize("q_lambda, tolerance", [(0.0, 0.1), (0.65, 0.4)])  # the latter also follows exploration
def test_training_learns_what_the_corridor_is_worth(monkeypatch, tmp_path, q_lambda, tolerance):
    monkeypatch.setattr(pqn_breakout, "QNetwork", Table)
    monkeypatch.setattr(pqn_breakout, "make_env", lambda *args, **kwargs: Corridor())
    sizes = {"num_envs": 16, "num_steps": 8, "num_minibatches": 4, "update_epochs": 2, "num_threads": 1}
    learning = {"total_timesteps": 5120, "learning_rate": 0.1, "gamma": 0.9, "q_lambda": q_lambda}
    exploration = {"end_e": 0.5, "exploration_fraction": 0.6}
    run_dir = train(Args(**sizes, **learning, **exploration, log_dir=str(tmp_path)))
    trained = Table(3)
    trained.load_state_dict(torch.load(run_dir / "checkpoint.pth", weights_only=True)["network"])
    q_values = trained(torch.from_numpy(Corridor.pictures)).detach()
    truth = torch.tensor([[0.5, 0.81, -0.5], [0.5, 0.9, -0.5], [0.5, 1.0, -0.5]])
    torch.testing.assert_close(q_values, truth, rtol=0, atol=tolerance)
    assert q_values.argmax(1).tolist() == [1, 1, 1]


# --- Devices ---
class StandIn(TorchDispatchMode):
    """A device without kernels: its tensors are PyTorch's fake ones, of a shape and a type but without numbers.

    They raise where they meet a tensor of the host and where the host asks for their numbers. The host's own tensors
    are real; what is copied from the device arrives as zeros. No kernel runs, and no number is checked.
    """

    def __init__(self):
        super().__init__()
        backend = _DummyBackendModule()
        backend.get_amp_supported_dtype = lambda: [torch.bfloat16]
        _setup_privateuseone_for_python_backend("standin", backend_module=backend)
        self.fake, self.received, self.waits = FakeTensorMode(), [], 0
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device=...) makes it here and sends it there
        FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()  # one copy, as of real tensors

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not on_device and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return op(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, self.to_fake, (args, kwargs))
        if op is torch.ops.aten._fused_adam_.tensor_lr and kwargs["lr"].device == tensors[0].device:
            op, kwargs["lr"] = torch.ops.aten._fused_adam_.default, 0.1  # the other has no fake kernel
        with self.fake:
            out = op(*args, **kwargs)
        if "copy" in op.__name__ and tensors[-1].device != out.device:
            non_blocking = kwargs.get("non_blocking", args[-1] is True)
            self.waits += out.device.type == "cpu" or not non_blocking
            if out.device.type != "cpu":
                self.received.append((str(out.dtype), *out.shape))
        return tree_map_only(FakeTensor, self.to_host, out)

    def counted(self):
        """What was sent and how often was waited since the last call."""
        counts, self.received, self.waits = (self.received, self.waits), [], 0
        return counts

    def to_fake(self, tensor):
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def to_host(self, tensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.device.type == "cpu" else tensor


def play_and_learn_on_a_stand_in():
    """What `play` and `learn` sent to a device, and how often they waited for it."""
    args = Args(num_envs=16, num_steps=5, num_minibatches=5, update_epochs=2)
    envs, rollout, rng = Corridor(), Rollout(5, 16), np.random.default_rng(0)
    with StandIn() as device:
        with torch.device("standin"):
            network = QNetwork(3)
        optimizer = RAdam(network.parameters())
        device.counted()
        play(network, envs, rollout, [1.0] * 5, 0.9, rng)
        acting = device.counted()
        learn(network, optimizer, rollout, 1e-4, rng, args)
    return *acting, sum(step[4].any() for step in envs.steps), *device.counted()


def test_an_accelerator_gets_every_buffer_once_and_is_waited_for_when_acting_and_once_a_rollout():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a device is registered once and for all
        result = pool.submit(play_and_learn_on_a_stand_in).result()
    sent_acting, waits_acting, cut_steps, sent_learning, waits_learning = result
    assert 0 < cut_steps < 5 and waits_acting == 5 + cut_steps
    assert sent_acting == [("torch.uint8", 16, 84, 84, 4)] * (5 + cut_steps)
    buffers = [("torch.uint8", 6, 16, 84, 84, 4), ("torch.float32", 6, 16)]
    buffers += [("torch.float32", 5, 16), ("torch.int64", 5, 16), ("torch.float32", 5, 16), ("torch.bool", 5, 16)]
    permutations = [("torch.int64", 80)] * 2
    assert sent_learning == buffers + permutations and waits_learning == 1


def test_a_compiled_network_is_not_compiled_anew_however_many_games_are_truncated():
    compiled, counts = [], []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    network, args = QNetwork(3), Args(num_envs=16, num_steps=1, num_minibatches=2, update_epochs=1)
    network.compile(backend=backend, dynamic=False)
    envs, rollout = Corridor(), Rollout(1, 16)
    optimizer, rng = RAdam(network.parameters()), np.random.default_rng(0)
    for _ in range(12):
        play(network, envs, rollout, [1.0], 0.9, rng)
        learn(network, optimizer, rollout, 1e-4, rng, args)
        counts.append(len(compiled))
    assert counts == [counts[0]] * 12 and counts[0] > 0
    cut = [step[4].sum() for step in envs.steps]
    assert cut[0] == 0 and len(set(cut)) > 2
