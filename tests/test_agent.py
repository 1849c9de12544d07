"""The agent: targets, exploration, optimizer, network, playing and learning, devices."""

from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from conftest import MadeUpGames
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import pqn_breakout
from pqn_breakout import Args, QNetwork, RAdam, epsilon_greedy, learn, linear_schedule, make_rollout, play, train

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
@pytest.mark.parametrize("as_tensors", [False, True])
def test_targets_are_the_mix_of_n_step_returns(q_lambda, as_tensors):
    arrays = random_experience(seed=3)
    given = [torch.from_numpy(array.copy()) if as_tensors else array.copy() for array in arrays]
    returns = pqn_breakout.q_lambda_returns(*given, 0.97, q_lambda)
    np.testing.assert_allclose(np.asarray(returns), returns_by_definition(*arrays, 0.97, q_lambda), atol=1e-12)
    for array, left in zip(arrays, given, strict=True):
        np.testing.assert_array_equal(left, array)


def test_lambda_zero_is_exactly_the_td0_target():
    rewards, next_values, dones = random_experience(seed=4)
    expected = rewards + 0.99 * (1 - dones) * next_values
    np.testing.assert_array_equal(pqn_breakout.q_lambda_returns(rewards, next_values, dones, 0.99, 0.0), expected)


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


def test_epsilon_bounds_are_all_random_and_all_greedy():
    rng = np.random.default_rng(0)
    q_values = np.tile([0.0, 1.0], (1000, 1))
    assert epsilon_greedy(q_values, 0.0, rng).all()
    assert 400 < epsilon_greedy(q_values, 1.0, rng).sum() < 600


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_radam_makes_the_steps_of_torch_radam(weight_decay):
    torch.manual_seed(0)
    start = torch.randn(40, 30)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = RAdam([ours], 1e-2, weight_decay), torch.optim.RAdam([theirs], 1e-2, weight_decay=weight_decay)
    for step in range(300):
        gradient = torch.randn(40, 30) * (1 + step % 7)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 400)
            parameter.grad = gradient.clone()
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
    assert (ours - start).abs().max() > 0.1


# --- Network ---


def random_frames(*shape):
    return torch.randint(0, 256, (*shape, 4, 84, 84), dtype=torch.uint8)


def test_network_normalises_over_channels_at_each_position():
    torch.manual_seed(0)
    network = QNetwork(6)
    with torch.no_grad():  # biases and affine parts that do something, so that the test sees them
        for name, parameter in network.named_parameters():
            if name.startswith("ln") or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    frames = random_frames(3)
    x = frames.double() / 255
    for conv, ln, stride in (("conv1", "ln1", 4), ("conv2", "ln2", 2), ("conv3", "ln3", 1)):
        conv, ln = getattr(network, conv), getattr(network, ln)
        x = torch.nn.functional.conv2d(x, conv.weight.double(), conv.bias.double(), stride)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        x = (x * ln.weight.double()[:, None, None] + ln.bias.double()[:, None, None]).relu()
    x = x.permute(0, 2, 3, 1).flatten(1) @ network.fc1.weight.double().T + network.fc1.bias.double()
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    x = (x * network.ln_fc.weight.double() + network.ln_fc.bias.double()).relu()
    expected = x @ network.fc2.weight.double().T + network.fc2.bias.double()
    channels_last_view = frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for view in (frames, channels_last_view):
        q_values = network(view)
        assert q_values.dtype == torch.float32 and q_values.shape == (3, 6)
        torch.testing.assert_close(q_values.double(), expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(network(frames), network(channels_last_view))


def test_bfloat16_network_stays_close_to_float32():
    torch.manual_seed(0)
    network, frames = QNetwork(4), random_frames(16)
    torch.nn.init.orthogonal_(network.fc2.weight)
    exact = network(frames)
    network.bf16 = True
    rounded = network(frames)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0, atol=0.03 * exact.abs().max().item())


# --- Playing ---


class CutGames(MadeUpGames):
    """Random frames and rewards; step t ends game 0 by itself and cuts the games `cuts[t]` short; game 1 plays 2."""

    def __init__(self, cuts):
        super().__init__(num_envs=3, num_actions=4)
        self.cuts, self.rng, self.steps = iter(cuts), np.random.default_rng(0), []

    def frames(self, count):
        return self.rng.integers(0, 256, (count, 4, 84, 84), dtype=np.uint8)

    def reset(self):
        return self.frames(3)

    def step_async(self, actions):
        self.actions = actions.copy()

    def step_wait(self):
        cuts, last = next(self.cuts), self.frames(3)
        rewards = self.rng.integers(-1, 2, 3).astype(np.float32)
        infos = [{"TimeLimit.truncated": i in cuts} for i in range(3)]
        infos[1]["action"] = 2
        for i in {0, *cuts}:
            infos[i]["terminal_observation"] = last[i]
            infos[i]["episode"] = {"r": 100.0 * len(self.steps) + i, "l": 7 + i, "t": 0.1}
        self.steps.append((self.actions, self.frames(3), rewards, np.array([i in {0, *cuts} for i in range(3)]), last))
        return *(array.copy() for array in self.steps[-1][1:4]), infos


CUTS = [(), (2,), (), (1, 2), ()]


def test_play_fills_the_buffers_with_what_the_environments_said_and_bootstraps_truncated_games():
    torch.manual_seed(0)
    network, envs, rollout = QNetwork(4), CutGames(CUTS), make_rollout(5, 3)
    torch.nn.init.orthogonal_(network.fc2.weight)

    def q_values(frames):  # as the network takes them from its other callers
        return network(torch.from_numpy(np.ascontiguousarray(frames))).detach().numpy()

    before = random_frames(3)
    rollout.frames[-1] = before.permute(0, 2, 3, 1)  # where the rollout before ended
    games, sparse_reward_ratio = play(network, envs, rollout, [0.0, 0.0, 0.5, 1.0, 1.0], 0.9, np.random.default_rng(7))
    frames, values, actions, rewards, dones = (buffer.numpy() for buffer in rollout)
    observation, rng = before.numpy(), np.random.default_rng(7)
    for t, (acted, following, reward, done, last) in enumerate(envs.steps):
        q = q_values(observation)
        np.testing.assert_array_equal(frames[t], observation.transpose(0, 2, 3, 1))
        np.testing.assert_allclose(values[t], q.max(1), rtol=1e-5)
        np.testing.assert_array_equal(acted, epsilon_greedy(q, [0.0, 0.0, 0.5, 1.0, 1.0][t], rng))
        np.testing.assert_array_equal(actions[t], [acted[0], 2, acted[2]])
        np.testing.assert_array_equal(dones[t], done)
        for i in range(3):
            bootstrap = 0.9 * q_values(last)[i].max() if i in CUTS[t] else 0.0
            assert rewards[t, i] == pytest.approx(reward[i] + bootstrap, abs=1e-5)
        observation = following
    np.testing.assert_array_equal(frames[5], observation.transpose(0, 2, 3, 1))
    ends = [(t, i) for t, cuts in enumerate(CUTS) for i in (0, *cuts)]
    assert sorted(games) == [(t, 100.0 * t + i, 7 + i) for t, i in ends]
    assert sparse_reward_ratio == pytest.approx(np.mean([step[2] == 0 for step in envs.steps]))


# --- Learning ---


def random_rollout(args: Args, num_actions: int):
    torch.manual_seed(0)
    rollout = make_rollout(args.num_steps, args.num_envs)
    rollout.frames.random_(0, 256)
    rollout.actions.random_(0, num_actions)
    rollout.values.normal_()
    rollout.rewards.normal_()
    rollout.dones.random_(0, 2)
    return rollout, make_rollout(args.num_steps, args.num_envs)


SMALL = {"num_envs": 3, "num_steps": 4, "num_minibatches": 3, "update_epochs": 3}


@pytest.mark.parametrize("max_grad_norm", [0.1, 1e3], ids=["clipped", "not clipped"])
def test_learn_is_torch_radam_on_targets_from_the_q_values_last_seen(max_grad_norm):
    """Targets are refreshed before each epoch: rows by the networks of the updates before, the last states by the
    network at the epoch's start; minibatches are those of the same permutations."""
    args = Args(**SMALL, gamma=0.9, q_lambda=0.5, max_grad_norm=max_grad_norm)
    rollout, batch = random_rollout(args, num_actions=4)
    ours = QNetwork(4)
    theirs, start = deepcopy(ours), deepcopy(ours)
    means = learn(ours, RAdam(ours.parameters(), 0.01), rollout, batch, np.random.default_rng(5), args)

    optimizer, rng = torch.optim.RAdam(theirs.parameters(), 0.01), np.random.default_rng(5)
    frames, statistics = rollout.frames.permute(0, 1, 4, 2, 3).flatten(0, 1).contiguous(), []
    values, actions = rollout.values.clone(), rollout.actions.flatten()
    for _ in range(3):
        with torch.no_grad():
            values[4] = theirs(frames[12:]).max(1).values
        experience = rollout.rewards.numpy(), values[1:].numpy(), rollout.dones.numpy()
        targets = torch.tensor(returns_by_definition(*experience, 0.9, 0.5).ravel(), dtype=torch.float32)
        for rows in np.split(rng.permutation(12), 3):
            q_values = theirs(frames[rows])
            chosen = q_values[range(4), actions[rows]]
            loss = ((chosen - targets[rows]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
            optimizer.step()
            values.view(-1)[rows] = q_values.detach().max(1).values
            statistics.append([loss.item(), chosen.mean().item(), targets[rows].mean().item(), norm.item()])
    assert means == pytest.approx(np.mean(statistics, axis=0), rel=1e-3)
    ours, theirs, start = (parameters_to_vector(network.parameters()) for network in (ours, theirs, start))
    assert (ours - theirs).norm() < 1e-3 * (theirs - start).norm()


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_single_loss_or_gradient_that_is_not_finite_shows_in_what_learn_returns(broken):
    args = Args(**SMALL)
    rollout, batch = random_rollout(args, num_actions=4)
    network = QNetwork(4)
    factors = iter([1.0] * 8 + [np.inf])  # the last update of all
    if broken == "loss":
        rollout.rewards[3, 2] = 1e30  # its square is too much for float32
    else:
        network.fc2.bias.register_hook(lambda gradient: gradient * next(factors))
    loss, *_, norm = learn(network, RAdam(network.parameters(), 1e-9), rollout, batch, np.random.default_rng(0), args)
    assert not np.isfinite(norm) and np.isfinite(loss) == (broken == "gradient")


class Corridor(MadeUpGames):
    """Rooms 0, 1, 2 in a row. Action 1 walks on and is worth 1 behind the last room; action 0 leaves with 0.5; action 2
    leaves with nothing. Nearly every walk is cut short by a time limit on entering room 2.

    Walking is right only for who bootstraps from the next room, not across an end, and from the last observation of
    a truncated episode rather than from the next episode's first.
    """

    def __init__(self, num_envs, tells_truncations):
        self.rooms, self.cut, self.tells = np.zeros(num_envs, dtype=int), np.random.default_rng(0), tells_truncations
        self.pictures = np.zeros((3, 4, 84, 84), dtype=np.uint8)
        for room in range(3):
            self.pictures[room, :, 28 * room : 28 * room + 28] = 255
        super().__init__(num_envs, num_actions=3)

    def reset(self):
        self.rooms[:] = 0
        return self.pictures[self.rooms]

    def step_async(self, actions):
        self.actions = actions.copy()

    def step_wait(self):
        walks = self.actions == 1
        rewards = np.where(walks, self.rooms == 2, np.where(self.actions == 0, 0.5, 0.0)).astype(np.float32)
        rooms = self.rooms + walks
        truncated = walks & (rooms == 2) & (self.cut.random(self.num_envs) < 0.9)
        dones = ~walks | (rooms == 3) | truncated
        infos = [{"TimeLimit.truncated": bool(cut) and self.tells} for cut in truncated]
        for i in np.flatnonzero(dones):
            infos[i]["terminal_observation"] = self.pictures[min(rooms[i], 2)]
        self.rooms = np.where(dones, 0, rooms)
        # Three episodes in ten start in room 2, so that what it is worth can be learned.
        self.rooms[dones & (self.cut.random(self.num_envs) < 0.3)] = 2
        return self.pictures[self.rooms], rewards, dones, infos


CORRIDOR = {"num_envs": 16, "num_steps": 8, "num_minibatches": 4, "update_epochs": 2, "learning_rate": 1e-3}
CORRIDOR |= {"total_timesteps": 5120, "exploration_fraction": 0.6, "end_e": 0.3, "gamma": 0.9, "num_threads": 1}


def walks_the_corridor(monkeypatch, tmp_path, tells_truncations=True, **changes):
    """Trains in the corridor and tells whether the best action is to walk on in every room."""
    envs = Corridor(CORRIDOR["num_envs"], tells_truncations)
    monkeypatch.setattr(pqn_breakout, "make_env", lambda *args, **kwargs: envs)
    run_dir = train(Args(log_dir=str(tmp_path), **CORRIDOR | changes))
    network = QNetwork(3)
    network.load_state_dict(torch.load(run_dir / "checkpoint.pth", weights_only=True)["network"])
    with torch.no_grad():
        q_values = network(torch.from_numpy(envs.pictures))
    return q_values.argmax(1).tolist() == [1, 1, 1], q_values


@pytest.mark.parametrize("q_lambda", [0.0, 0.65])
def test_learns_what_only_right_targets_teach(monkeypatch, tmp_path, q_lambda):
    solved, q_values = walks_the_corridor(monkeypatch, tmp_path, q_lambda=q_lambda)
    assert solved, q_values
    assert q_values[2, 1] == pytest.approx(1.0, abs=0.15)  # what the last room is worth, to the eye
    assert q_values[0, 0] == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("broken", ["without bootstrap", "across terminations", "truncation as termination"])
def test_broken_targets_do_not_solve_the_corridor(monkeypatch, tmp_path, broken):
    if broken != "truncation as termination":
        bootstrap = float(broken == "across terminations")
        targets = lambda rewards, next_values, dones, gamma, _: rewards + bootstrap * gamma * next_values  # noqa: E731
        monkeypatch.setattr(pqn_breakout, "q_lambda_returns", targets)
    solved, q_values = walks_the_corridor(monkeypatch, tmp_path, broken != "truncation as termination")
    assert not solved, q_values


# --- Devices ---


class StandIn(TorchDispatchMode):
    """A device without kernels: its tensors are PyTorch's fake ones, of a shape and a type but without numbers.

    They raise where they meet a tensor of the host and where the host asks for their numbers. The host's own tensors
    are real; what is copied from the device arrives as zeros. No kernel runs, and no number is checked.
    """

    def __init__(self):
        super().__init__()
        _setup_privateuseone_for_python_backend("standin", backend_module=_DummyBackendModule())
        self.fake, self.received, self.waits = FakeTensorMode(), [], 0
        FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()  # one copy, as of real tensors

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not on_device and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            return op(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, self.to_fake, (args, kwargs))
        with self.fake:
            out = op(*args, **kwargs)
        if "copy" in op.__name__ and tensors[-1].device != out.device:
            non_blocking = kwargs.get("non_blocking", args[-1] is True)
            self.waits += out.device.type == "cpu" or not non_blocking
            if out.device.type != "cpu":
                self.received.append((str(out.dtype), *out.shape))
        return tree_map_only(FakeTensor, self.to_host, out)

    def to_fake(self, tensor):
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def to_host(self, tensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.device.type == "cpu" else tensor


def play_and_learn_on_a_stand_in():
    """What `play` and `learn` sent to a device, and how often they waited for it."""
    args = Args(num_envs=3, num_steps=5, num_minibatches=5, update_epochs=2)
    envs, rollout, rng = CutGames(CUTS), make_rollout(5, 3), np.random.default_rng(0)
    with StandIn() as device:
        with torch.device("standin"):
            network = QNetwork(4)
        optimizer, batch = RAdam(network.parameters(), 1e-4), make_rollout(5, 3, device="standin")
        play(network, envs, rollout, [0.1] * 5, 0.9, rng)
        played = device.received, device.waits
        device.received, device.waits = [], 0
        learn(network, optimizer, rollout, batch, rng, args)
    return *played, device.received, device.waits


def test_on_an_accelerator_every_buffer_is_copied_there_once_and_nothing_waits_but_acting_and_the_last_line():
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a device is registered once and for all
        sent_playing, waits_playing, sent_learning, waits_learning = pool.submit(play_and_learn_on_a_stand_in).result()
    passes = 5 + 2  # five steps, and two with truncated games
    assert sent_playing == [("torch.uint8", 3, 84, 84, 4)] * passes and waits_playing == passes
    buffers = [("torch.uint8", 6, 3, 84, 84, 4), ("torch.float32", 6, 3), ("torch.int64", 5, 3)]
    buffers += [("torch.float32", 5, 3), ("torch.bool", 5, 3)]
    permutations = [("torch.int64", 15)] * 2
    assert sent_learning == buffers + permutations and waits_learning == 1


def test_a_compiled_network_is_not_compiled_anew_however_many_games_are_truncated():
    torch._dynamo.reset()
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    network = QNetwork(4)
    network.compile(backend=backend, dynamic=False)
    args = Args(num_envs=3, num_steps=1, num_minibatches=1, update_epochs=1)
    envs, rollout, batch = CutGames([(1,), (), (2,), (0, 1), (0, 1, 2)]), make_rollout(1, 3), make_rollout(1, 3)
    optimizer, counts = RAdam(network.parameters(), 1e-4), []
    for _ in range(5):
        play(network, envs, rollout, [0.1], 0.9, np.random.default_rng(0))
        learn(network, optimizer, rollout, batch, np.random.default_rng(0), args)
        counts.append(len(compiled))
    assert counts[0] > 0 and counts == [counts[0]] * 5
