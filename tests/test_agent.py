"""The agent: targets, exploration, optimizer, network, one rollout's learning, devices."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MadeUpGames
from torch.nn.utils import parameters_to_vector

import pqn_breakout
from pqn_breakout import Args, QNetwork, RAdam, epsilon_greedy, linear_schedule, max_q, q_lambda_returns, train

ROOT = Path(pqn_breakout.__file__).parent


def returns_by_definition(rewards, next_values, terminated, truncated, gamma, q_lambda):
    """The lambda-return as what it stands for: the mix of all n-step returns that stay inside the episode."""
    num_steps, num_envs = rewards.shape
    returns = np.zeros((num_steps, num_envs))
    for i in range(num_envs):
        for t in range(num_steps):
            last = next(k for k in range(t, num_steps) if terminated[k, i] or truncated[k, i] or k == num_steps - 1)
            for k in range(t, last + 1):
                n_step = sum(gamma ** (j - t) * rewards[j, i] for j in range(t, k + 1))
                if not terminated[k, i]:
                    n_step += gamma ** (k + 1 - t) * next_values[k, i]
                weight = q_lambda ** (k - t) * (1 if k == last else 1 - q_lambda)
                returns[t, i] += weight * n_step
    return returns


def random_rollout(seed, num_steps=12, num_envs=50):
    rng = np.random.default_rng(seed)
    rewards, next_values = rng.normal(size=(2, num_steps, num_envs))
    ends = rng.random((num_steps, num_envs))
    return rewards, next_values, ends < 0.15, (ends >= 0.15) & (ends < 0.3)


@pytest.mark.parametrize("q_lambda", [0.0, 0.3, 0.65, 1.0])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_targets_are_the_mix_of_n_step_returns(q_lambda, as_tensors):
    arrays = random_rollout(seed=3)
    expected = returns_by_definition(*arrays, 0.97, q_lambda)
    given = [torch.from_numpy(array) for array in arrays] if as_tensors else arrays
    np.testing.assert_allclose(np.asarray(q_lambda_returns(*given, 0.97, q_lambda)), expected, atol=1e-12)


def test_lambda_zero_is_exactly_the_td0_target():
    rewards, next_values, terminated, truncated = random_rollout(seed=4)
    expected = rewards + 0.99 * (1 - terminated) * next_values
    np.testing.assert_array_equal(q_lambda_returns(rewards, next_values, terminated, truncated, 0.99, 0.0), expected)


def test_targets_leave_their_arguments_alone():
    arrays = random_rollout(seed=5)
    copies = [array.copy() for array in arrays]
    q_lambda_returns(*arrays, 0.99, 0.9)
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


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


@pytest.mark.parametrize("max_grad_norm", [1e-3, 1e3], ids=["clipped", "not clipped"])
def test_an_update_is_torch_radam_on_the_clipped_gradient_of_the_squared_error(max_grad_norm):
    torch.manual_seed(0)
    ours = QNetwork(3)
    theirs, start = deepcopy(ours), deepcopy(ours)
    optimizers = RAdam(ours.parameters(), 0.1), torch.optim.RAdam(theirs.parameters(), 0.1)
    optimizers[0].found_inf = torch.zeros(())
    for scale in (1.0, 100.0, 0.1, 10.0):  # gradients of different norms
        frames = torch.randint(0, 256, (4, 4, 84, 84), dtype=torch.uint8)
        actions, targets = torch.tensor([0, 2, 1, 2]), torch.randn(4) * scale
        q_values = theirs(frames)
        chosen = q_values[range(4), actions]
        loss = ((chosen - targets) ** 2).mean()
        optimizers[1].zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
        optimizers[1].step()
        values, means = pqn_breakout.update(ours, optimizers[0], frames, actions, targets, max_grad_norm)
        torch.testing.assert_close(values, q_values.max(1).values, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(means, torch.stack((loss, chosen.mean(), targets.mean())), rtol=1e-3, atol=1e-5)
    ours, theirs, start = (parameters_to_vector(network.parameters()) for network in (ours, theirs, start))
    assert (ours - theirs).norm() < 1e-3 * (theirs - start).norm()


def test_a_gradient_that_is_not_finite_never_reaches_the_weights():
    torch.manual_seed(0)
    network = QNetwork(3)
    optimizer = RAdam(network.parameters(), 1e-3)
    optimizer.found_inf = torch.zeros(())
    frames = torch.randint(0, 256, (4, 4, 84, 84), dtype=torch.uint8)
    actions, good = torch.zeros(4, dtype=torch.int64), torch.ones(4)
    pqn_breakout.update(network, optimizer, frames, actions, good, 10.0)
    before = [parameter.clone() for parameter in network.parameters()]
    pqn_breakout.update(network, optimizer, frames, actions, torch.tensor([1.0, 1.0, torch.nan, 1.0]), 10.0)
    pqn_breakout.update(network, optimizer, frames, actions, good, 10.0)  # and none after it
    assert optimizer.found_inf == 1
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_network_normalises_over_channels_at_each_position():
    torch.manual_seed(0)
    network = QNetwork(6)
    with torch.no_grad():  # biases and affine parts that do something, so that the test sees them
        for name, parameter in network.named_parameters():
            if name.startswith("ln") or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    frames = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
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
    q_values = network(frames)
    assert q_values.dtype == torch.float32 and q_values.shape == (3, 6)
    torch.testing.assert_close(q_values.double(), expected, rtol=1e-3, atol=1e-5)


def test_bfloat16_network_stays_close_to_float32():
    torch.manual_seed(0)
    network, frames = QNetwork(4), torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8)
    torch.nn.init.orthogonal_(network.fc2.weight)
    exact = network(frames)
    network.bf16 = True
    rounded = network(frames)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0, atol=0.03 * exact.abs().max().item())


def test_max_q_is_the_greatest_q_value_however_many_rows():
    torch.manual_seed(0)
    network, frames = QNetwork(5), torch.randint(0, 256, (150, 4, 84, 84), dtype=torch.uint8)
    expected = torch.cat([network(row[None]).max(1).values for row in frames[[0, 127, 128, 149]]])
    torch.testing.assert_close(max_q(network, frames)[[0, 127, 128, 149]], expected, rtol=1e-4, atol=1e-6)


def test_targets_of_an_epoch_come_from_the_q_values_last_seen(monkeypatch):
    """Rows by the networks that the updates of the epoch before had; what is no row, by the network at the start."""
    torch.manual_seed(0)
    args = Args(num_envs=3, num_steps=4, num_minibatches=3, update_epochs=3, gamma=0.9, q_lambda=0.5)
    network = QNetwork(4)
    optimizer = RAdam(network.parameters(), 1e-3)
    optimizer.found_inf = torch.zeros(())
    rollout = pqn_breakout.make_rollout(4, 3, pin_memory=False)
    rollout["frames"].random_(0, 256)
    rollout["rewards"].normal_()
    rollout["terminated"][1, 0] = rollout["truncated"][2, 1] = True
    frames = rollout["frames"].flatten(0, 1)
    rollout["values"][:] = max_q(network, frames).view(5, 3)
    final_frames = {(2, 1): np.full((4, 84, 84), 99, np.uint8)}

    real_update, calls = pqn_breakout.update, []

    def update(network, optimizer, chosen, actions, targets, max_grad_norm):
        rows = [next(i for i in range(12) if torch.equal(frames[i], frame)) for frame in chosen]
        calls.append((rows, targets, deepcopy(network)))
        return real_update(network, optimizer, chosen, actions, targets, max_grad_norm)

    monkeypatch.setattr(pqn_breakout, "update", update)
    batch = {name: tensor.clone() for name, tensor in rollout.items()}
    pqn_breakout.learn(network, optimizer, rollout, batch, final_frames, np.random.default_rng(0), args)

    assert len(calls) == 9
    values = rollout["values"].double().numpy()
    ends = rollout["terminated"].numpy(), rollout["truncated"].numpy()
    for epoch in range(3):
        of_epoch = calls[3 * epoch : 3 * epoch + 3]
        values[4] = max_q(of_epoch[0][2], frames[12:])
        next_values = values[1:].copy()
        next_values[2, 1] = max_q(of_epoch[0][2], torch.from_numpy(final_frames[2, 1])[None])
        expected = returns_by_definition(rollout["rewards"].numpy(), next_values, *ends, 0.9, 0.5).ravel()
        for rows, targets, snapshot in of_epoch:
            np.testing.assert_allclose(targets, expected[rows], atol=1e-4)
            values.ravel()[rows] = max_q(snapshot, frames[rows])
        assert sorted(row for rows, _, _ in of_epoch for row in rows) == list(range(12))


class Corridor(MadeUpGames):
    """Rooms 0, 1, 2 in a row. Action 1 walks on and is worth 1 behind the last room; action 0 leaves with 0.5; action 2
    leaves with nothing. Nearly every walk is cut short by a time limit on entering room 2.

    Walking is right only for who bootstraps from the next room, not across an end, and from the last observation of
    a truncated episode rather than from the next episode's first.
    """

    def __init__(self, num_envs):
        self.rooms, self.cut = np.zeros(num_envs, dtype=int), np.random.default_rng(0)
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
        infos = [{"TimeLimit.truncated": bool(cut)} for cut in truncated]
        for i in np.flatnonzero(dones):
            infos[i]["terminal_observation"] = self.pictures[min(rooms[i], 2)]
        self.rooms = np.where(dones, 0, rooms)
        # Three episodes in ten start in room 2, so that what it is worth can be learned.
        self.rooms[dones & (self.cut.random(self.num_envs) < 0.3)] = 2
        return self.pictures[self.rooms], rewards, dones, infos


CORRIDOR = {"num_envs": 16, "num_steps": 8, "num_minibatches": 4, "update_epochs": 2, "learning_rate": 1e-3}
CORRIDOR |= {"total_timesteps": 5120, "exploration_fraction": 0.6, "end_e": 0.3, "gamma": 0.9, "num_threads": 1}


def walks_the_corridor(monkeypatch, tmp_path, **changes):
    """Trains in the corridor and tells whether the best action is to walk on in every room."""
    monkeypatch.setattr(pqn_breakout, "make_env", lambda env_id, num_envs, *args, **kwargs: Corridor(num_envs))
    run_dir = train(Args(log_dir=str(tmp_path), **CORRIDOR | changes))
    network = QNetwork(3)
    network.load_state_dict(torch.load(run_dir / "checkpoint.pth", weights_only=True)["network"])
    with torch.no_grad():
        q_values = network(torch.from_numpy(Corridor(1).pictures))
    return q_values.argmax(1).tolist() == [1, 1, 1], q_values


@pytest.mark.parametrize("q_lambda", [0.0, 0.65])
def test_learns_what_only_right_targets_teach(monkeypatch, tmp_path, q_lambda):
    solved, q_values = walks_the_corridor(monkeypatch, tmp_path, q_lambda=q_lambda)
    assert solved, q_values
    assert q_values[2, 1] == pytest.approx(1.0, abs=0.15)  # what the last room is worth, to the eye
    assert q_values[0, 0] == pytest.approx(0.5, abs=0.15)


def without_bootstrap(rewards, next_values, terminated, truncated, gamma, q_lambda):
    return rewards.clone()


def across_terminations(rewards, next_values, terminated, truncated, gamma, q_lambda):
    return rewards + gamma * next_values


def not_across_truncations(rewards, next_values, terminated, truncated, gamma, q_lambda):
    return rewards + gamma * next_values * ~(terminated | truncated)


@pytest.mark.parametrize("broken_targets", [without_bootstrap, across_terminations, not_across_truncations])
def test_broken_targets_do_not_solve_the_corridor(monkeypatch, tmp_path, broken_targets):
    monkeypatch.setattr(pqn_breakout, "q_lambda_returns", broken_targets)
    solved, q_values = walks_the_corridor(monkeypatch, tmp_path)
    assert not solved, q_values


FAKE_ACCELERATOR = """
import numpy as np, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
import pqn_breakout

class Module(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

class FrameCopies(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        source = [a for a in args if isinstance(a, torch.Tensor)][-1:]
        moved = source and isinstance(out, torch.Tensor) and source[0].device != out.device
        self.count += bool(moved and "copy" in op.__name__ and out.dtype == torch.uint8)
        return out

_setup_privateuseone_for_python_backend("gpu", backend_module=Module())
args = pqn_breakout.Args(num_envs=4, num_steps=8, num_minibatches=4, update_epochs=3)
with FakeTensorMode(), FrameCopies() as copies:
    with torch.device("gpu"):
        network = pqn_breakout.QNetwork(4)
    optimizer = pqn_breakout.RAdam(network.parameters(), 1e-4)
    optimizer.found_inf = torch.zeros((), device="gpu")
    rollout = pqn_breakout.make_rollout(8, 4, pin_memory=False)
    batch = {name: torch.zeros(tensor.shape, dtype=tensor.dtype, device="gpu") for name, tensor in rollout.items()}
    for final_frames in ({}, {(1, 2): np.zeros((4, 84, 84), np.uint8)}):
        copies.count = 0
        rng = np.random.default_rng(0)
        statistics = pqn_breakout.learn(network, optimizer, rollout, batch, final_frames, rng, args)
        print(statistics.device.type, copies.count)
"""


def test_on_an_accelerator_every_tensor_is_there_and_the_frames_are_copied_once():
    """No kernel runs: PyTorch's fake tensors raise wherever tensors of two devices would meet."""
    result = subprocess.run([sys.executable, "-c", FAKE_ACCELERATOR], cwd=ROOT, capture_output=True, text=True)
    # The second rollout has the last observation of a truncated game to send, too.
    assert result.stdout.split() == ["gpu", "1", "gpu", "2"], result.stderr
