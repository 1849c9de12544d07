"""The agent: targets, exploration, optimizer, network, playing, learning, devices."""

from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from numpy.random import default_rng
from numpy.testing import assert_allclose, assert_array_equal
from torch.nn.functional import conv2d, layer_norm, linear
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pqn_breakout import (
    Args,
    QNetwork,
    RAdam,
    Rollout,
    epsilon_greedy,
    learn,
    linear_schedule,
    play,
    q_lambda_returns,
    train,
)


# --- Targets ---
def returns_by_definition(rewards, next_values, dones, gamma, q_lambda):
    """The lambda-return as what it stands for: a mix of the n-step returns inside the episode."""
    num_steps = len(rewards)
    returns = np.zeros(rewards.shape)
    for t, i in np.ndindex(rewards.shape):
        for k in range(t, num_steps):
            n_step = sum(gamma ** (j - t) * rewards[j, i] for j in range(t, k + 1))
            if not dones[k, i]:
                n_step += gamma ** (k + 1 - t) * next_values[k, i]
            # The longest return gets what the geometric weights of the others leave of 1.
            longest = dones[k, i] or k == num_steps - 1
            weight = q_lambda ** (k - t) * (1 if longest else 1 - q_lambda)
            returns[t, i] += weight * n_step
            if longest:
                break
    return returns


def random_experience():
    rng = default_rng(3)
    rewards, next_values = rng.normal(size=(2, 12, 50))
    # Episodes end at a fifth of the steps, so that some returns go through and others are cut.
    dones = rng.random((12, 50)) < 0.2
    return rewards, next_values, dones


of_either_kind = pytest.mark.parametrize("kind", [np.array, torch.tensor])


@of_either_kind
@pytest.mark.parametrize("q_lambda", [0.0, 0.3, 0.65, 1.0])
def test_targets_are_the_mix_of_n_step_returns(q_lambda, kind):
    experience = random_experience()
    expected = returns_by_definition(*experience, 0.97, q_lambda)

    returns = q_lambda_returns(*map(kind, experience), 0.97, q_lambda)

    assert_allclose(np.asarray(returns), expected, atol=1e-12)


@of_either_kind
def test_targets_leave_the_experience_as_it_was(kind):
    experience = random_experience()
    given = [kind(array) for array in experience]

    q_lambda_returns(*given, 0.97, 0.65)

    for array, before in zip(given, experience, strict=True):
        assert_array_equal(np.asarray(array), before)


# --- Schedules and exploration ---
def test_linear_schedule_goes_straight_and_stays_at_its_end():
    values = [linear_schedule(1.0, 0.2, 100, step) for step in (0, 50, 100, 1000)]

    assert values == pytest.approx([1.0, 0.6, 0.2, 0.2])


@pytest.fixture(scope="module")
def explored():
    """Actions of 5000 steps in 8 environments, with epsilon 0.4; action 1 of 4 is the best."""
    rng = default_rng(0)
    q_values = np.tile([0.0, 1.0, 0.5, -1.0], (8, 1))
    return np.array([epsilon_greedy(q_values, 0.4, rng) for _ in range(5000)])


def test_exploration_gives_every_environment_an_action_of_type_int64(explored):
    assert explored.shape == (5000, 8)
    assert explored.dtype == np.int64


def test_with_probability_epsilon_an_environment_takes_any_action(explored):
    any_action = 0.4 / 4

    assert_allclose((explored == 1).mean(0), 0.6 + any_action, atol=0.03)
    for action in (0, 2, 3):
        assert_allclose((explored == action).mean(0), any_action, atol=0.02)


def test_every_environment_explores_for_itself(explored):
    greedy = 0.6 + 0.4 / 4

    num_greedy = (explored == 1).sum(1)

    # Binomial: environments that explore together would be greedy all or none.
    assert num_greedy.var() == pytest.approx(8 * greedy * (1 - greedy), rel=0.1)


# --- Optimizer ---
def test_radam_makes_the_steps_of_torch_radam():
    torch.manual_seed(0)
    start = torch.randn(40, 30)
    ours = torch.nn.Parameter(start.clone())
    theirs = torch.nn.Parameter(start.clone())
    optimizer = RAdam([ours])
    reference = torch.optim.RAdam([theirs])

    # The first five steps are momentum's, then the rectified steps of Adam grow for long.
    for step in range(300):
        lr = 1e-2 * (1 - step / 400)
        ours.grad = torch.randn(40, 30) * (1 + step % 7)
        theirs.grad = ours.grad.clone()
        optimizer.step(lr)
        reference.param_groups[0]["lr"] = lr
        reference.step()

        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
    # They have moved: the agreement is not one of standing still.
    assert (ours - start).abs().max() > 0.1


# --- Network ---
@pytest.fixture(scope="module")
def network():
    """A network whose biases and LayerNorms do something, so that a test would miss them."""
    torch.manual_seed(0)
    network = QNetwork(6).requires_grad_(False)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter += torch.randn_like(parameter) * 0.1
    return network


@pytest.fixture(scope="module")
def frames():
    torch.manual_seed(1)
    return torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8)


def test_network_normalises_over_channels_at_each_position(network, frames):
    # The network written out in double precision, with nothing of its own but the weights.
    weights = {name: weight.double() for name, weight in network.state_dict().items()}

    def of(layer):
        return weights[f"{layer}.weight"], weights[f"{layer}.bias"]

    x = frames.double() / 255
    for i, stride, channels in ((1, 4, 32), (2, 2, 64), (3, 1, 64)):
        x = conv2d(x, *of(f"conv{i}"), stride).permute(0, 2, 3, 1)
        x = layer_norm(x, [channels], *of(f"ln{i}"), 1e-5).relu().permute(0, 3, 1, 2)
    x = x.permute(0, 2, 3, 1).flatten(1)
    x = linear(x, *of("fc1"))
    x = layer_norm(x, [512], *of("ln_fc"), 1e-5).relu()
    expected = linear(x, *of("fc2"))

    q_values = network(frames)

    assert q_values.dtype == torch.float32
    torch.testing.assert_close(q_values.double(), expected, rtol=1e-3, atol=1e-5)


def test_network_takes_channels_last_frames_as_well(network, frames):
    channels_last_view = frames.contiguous(memory_format=torch.channels_last)

    assert torch.equal(network(channels_last_view), network(frames))


def test_bfloat16_stays_close(monkeypatch, network, frames):
    q_values = network(frames)

    monkeypatch.setattr(network, "bf16", True)
    rounded = network(frames)

    assert rounded.dtype == torch.float32
    # If they were equal, bfloat16 would not have been used.
    assert not torch.equal(rounded, q_values)
    torch.testing.assert_close(rounded, q_values, rtol=0, atol=0.03 * q_values.abs().max().item())


# --- Playing ---
class Corridor:
    """16 games of rooms 0, 1, 2 in a row.

    Action 1 walks on and is worth 1 behind the last room; action 0 leaves with 0.5, action 2 with
    -0.5. Nearly every walk is cut short by a time limit on entering room 2. Game 0 always walks.

    Walking is right only for an agent that bootstraps from the next room, not across an end, and
    from the last observation of a truncated episode rather than from the next episode's first.

    What it tells of a game's length is not in steps, as in Stable-Baselines3's pipeline.
    """

    num_envs = 16
    action_space = Discrete(3)
    # A room is shown by the third of the 84 rows that is bright.
    pictures = np.zeros((3, 4, 84, 84), np.uint8)
    for room in range(3):
        pictures[room, :, 28 * room : 28 * room + 28] = 255

    def __init__(self):
        self.rooms = np.zeros(16, int)
        self.steps = []
        self.random = default_rng(0).random

    def reset(self):
        return self.pictures[self.rooms]

    def step(self, requested):
        # What an environment plays instead of the action asked for is told in its info.
        actions = np.array([1, *requested[1:]])
        walks = actions == 1
        rooms = self.rooms + walks
        rewards = np.choose(actions, [0.5, rooms == 3, -0.5]).astype(np.float32)
        truncated = walks & (rooms == 2) & (self.random(16) < 0.9)
        dones = ~walks | (rooms == 3) | truncated

        infos = [{"TimeLimit.truncated": bool(cut)} for cut in truncated]
        if requested[0] != 1:
            infos[0]["action"] = 1
        for i in np.flatnonzero(dones):
            infos[i]["terminal_observation"] = self.pictures[min(rooms[i], 2)]
            infos[i]["episode"] = {"r": float(rewards[i]), "l": 999}

        # Three episodes in ten start in room 2, so that what it is worth can be learned.
        starts = np.where(self.random(16) < 0.3, 2, 0)
        self.rooms = np.where(dones, starts, rooms)
        # Copies, because the caller may write into what it gets.
        step = SimpleNamespace(
            actions=actions,
            observations=self.reset(),
            rewards=rewards.copy(),
            dones=dones.copy(),
            truncated=truncated,
            served=actions != requested,
        )
        self.steps.append(step)
        return self.reset(), rewards, dones, infos

    def recorded(self, name):
        return np.array([getattr(step, name) for step in self.steps])

    def seed(self, seed):
        pass

    def close(self):
        pass


def channels_last(frames):
    return np.moveaxis(frames, -3, -1)


# Greedy steps, half greedy ones, then random ones, which end episodes in every way.
EPSILONS = [0.0, 0.5] * 2 + [1.0] * 12


@pytest.fixture(scope="module")
def played(frames):
    """A rollout of 16 steps, with all states that were met and their Q-values."""
    torch.manual_seed(0)
    network = QNetwork(3).requires_grad_(False)
    # Q-values are as far apart as after some training.
    torch.nn.init.orthogonal_(network.fc2.weight)
    envs = Corridor()
    rollout = Rollout(16, 16)
    before = frames.numpy()
    rollout.frames[-1] = channels_last(before)

    # It starts from `before`, where the rollout before ended.
    games = play(network, envs, rollout, EPSILONS, 0.9, default_rng(7))

    states = np.array([before, *envs.recorded("observations")])
    last_room = network(torch.from_numpy(envs.pictures[2:]))
    return SimpleNamespace(
        envs=envs,
        rollout=rollout,
        games=games,
        states=states,
        q_values=np.array([network(torch.from_numpy(frames)).numpy() for frames in states[:-1]]),
        value_of_last_room=last_room.max().item(),
    )


def test_play_fills_the_buffers_with_what_the_environments_said(played):
    # A serve ends an episode, too.
    ends = played.envs.recorded("dones") | played.envs.recorded("served")

    assert_array_equal(played.rollout.frames, channels_last(played.states))
    assert_array_equal(played.rollout.actions, played.envs.recorded("actions"))
    assert_array_equal(played.rollout.dones, ends)


def test_play_acts_epsilon_greedily(played):
    rng = default_rng(7)
    expected = [
        epsilon_greedy(q_values, epsilon, rng)
        for q_values, epsilon in zip(played.q_values, EPSILONS, strict=True)
    ]

    # Game 0 walks, whatever it is asked for.
    assert_array_equal(played.rollout.actions[:, 1:], np.array(expected)[:, 1:])


def test_play_stores_the_values_of_the_states(played):
    assert_allclose(played.rollout.values[:-1], played.q_values.max(2), rtol=1e-4)


def test_play_bootstraps_truncated_games(played):
    truncated = played.envs.recorded("truncated")
    # There are steps in which no game, one game and two games are truncated.
    assert set(truncated.sum(1)) >= {0, 1, 2}

    expected = played.envs.recorded("rewards") + 0.9 * truncated * played.value_of_last_room

    assert_allclose(played.rollout.rewards, expected, rtol=1e-4)


def test_play_returns_step_score_and_length_of_each_finished_game(played):
    expected = []
    starts = np.zeros(16, int)
    for t, step in enumerate(played.envs.steps):
        for i in np.flatnonzero(step.dones):
            expected.append((t, step.rewards[i], t + 1 - starts[i]))
            starts[i] = t + 1

    assert played.games == expected


# --- Learning ---
NINE_UPDATES = {"num_minibatches": 3, "update_epochs": 3}


def random_rollout():
    rng = default_rng(0)
    rollout = Rollout(4, 3)
    for buffer in vars(rollout).values():
        buffer[:] = rng.integers(4, size=buffer.shape)
    # Numbers from 0 to 3 are actions of four. From black to white:
    rollout.frames *= 85
    rollout.rewards -= 1.5
    rollout.dones[:] = rng.random((4, 3)) < 0.5
    return rollout


def learn_by_the_book(network, rollout, lr, rng, args):
    """What `learn` does, with torch's RAdam and with targets by definition.

    Targets are refreshed before each epoch: rows by the networks of the updates before, the last
    states by the network at the epoch's start.
    """
    frames = torch.from_numpy(np.moveaxis(rollout.frames, -1, 2)).flatten(0, 1)
    actions = torch.from_numpy(rollout.actions.flatten())
    values = torch.from_numpy(rollout.values)
    num_states = len(actions)
    optimizer = torch.optim.RAdam(network.parameters(), lr)
    statistics = []
    for _ in range(args.update_epochs):
        with torch.no_grad():
            values[-1] = network(frames[num_states:]).amax(1)
        targets = returns_by_definition(
            rollout.rewards, values[1:].numpy(), rollout.dones, args.gamma, args.q_lambda
        )
        targets = torch.tensor(targets.flatten(), dtype=torch.float32)
        for rows in np.split(rng.permutation(num_states), args.num_minibatches):
            q_values = network(frames[rows])
            chosen = q_values[range(len(rows)), actions[rows]]
            loss = ((chosen - targets[rows]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), args.max_grad_norm)
            optimizer.step()
            values.view(-1)[rows] = q_values.detach().amax(1)
            statistics.append(torch.stack((loss, chosen.mean(), targets[rows].mean(), norm)))
    return torch.stack(statistics).mean(0).tolist()


@pytest.fixture(scope="module", params=[0.1, 1e3], ids=["clipped", "not clipped"])
def learned(request):
    """Weights and statistics of `learn` and of the book, from one rollout and one network."""
    args = Args(**NINE_UPDATES, gamma=0.9, q_lambda=0.5, max_grad_norm=request.param)
    torch.manual_seed(0)
    ours = QNetwork(4)
    theirs = deepcopy(ours)
    start = deepcopy(ours)
    rollout = random_rollout()

    optimizer = RAdam(ours.parameters())
    # `learn` may overwrite values: it gets a rollout of its own.
    means = learn(ours, optimizer, deepcopy(rollout), 0.01, default_rng(5), args)
    expected = learn_by_the_book(theirs, rollout, 0.01, default_rng(5), args)

    weights = [parameters_to_vector(network.parameters()) for network in (start, ours, theirs)]
    return SimpleNamespace(means=means, expected_means=expected, weights=weights)


def test_learn_is_torch_radam_on_targets_from_the_q_values_last_seen(learned):
    start, ours, theirs = learned.weights

    assert (ours - theirs).norm() < 1e-3 * (theirs - start).norm()


def test_learn_returns_the_means_of_loss_q_target_and_unclipped_gradient_norm(learned):
    assert learned.means == pytest.approx(learned.expected_means, rel=1e-3)


def test_a_single_gradient_that_is_not_finite_shows_in_what_learn_returns():
    def overflow_in_the_last_update(gradient):
        return gradient * np.inf if optimizer.steps == 8 else gradient

    torch.manual_seed(0)
    network = QNetwork(4)
    network.fc2.bias.register_hook(overflow_in_the_last_update)
    optimizer = RAdam(network.parameters())
    rng = default_rng(0)

    # No loss follows the last update, so that only the norm can tell.
    loss, *_, norm = learn(network, optimizer, random_rollout(), 1e-9, rng, Args(**NINE_UPDATES))

    assert np.isfinite(loss)
    assert not np.isfinite(norm)


class Table(torch.nn.Linear):
    """A Q-value for each room and action in the place of the network: quick, and it learns."""

    bf16 = False

    def __init__(self, num_actions, bf16=False):
        super().__init__(3, num_actions, bias=False)

    def forward(self, frames):
        return super().forward(frames[:, 0, ::28, 0] / 255)


# With the larger lambda the values also follow what exploration costs.
@pytest.fixture(scope="module", params=[(0.0, 0.1), (0.65, 0.4)])
def trained(request, tmp_path_factory):
    """Q-values of the three rooms after a training, and how far from the truth they may be."""
    q_lambda, tolerance = request.param
    args = Args(
        # 40 rollouts
        total_timesteps=40 * 16 * 8,
        learning_rate=0.1,
        num_envs=16,
        num_steps=8,
        num_minibatches=4,
        update_epochs=2,
        gamma=0.9,
        q_lambda=q_lambda,
        end_e=0.5,
        exploration_fraction=0.6,
        num_threads=1,
        log_dir=str(tmp_path_factory.mktemp("logs")),
    )

    torch.manual_seed(0)
    table = Table(3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pqn_breakout.QNetwork", lambda *args: table)
        patch.setattr("pqn_breakout.make_env", lambda *args, **kwargs: Corridor())
        train(args)

    q_values = table(torch.from_numpy(Corridor.pictures)).detach()
    return q_values, tolerance


def test_training_learns_what_the_corridor_is_worth(trained):
    q_values, tolerance = trained
    # The reward of 1 is discounted for each room that still lies between.
    walking = [0.9 * 0.9, 0.9, 1.0]
    truth = torch.tensor([[0.5, value, -0.5] for value in walking])

    torch.testing.assert_close(q_values, truth, rtol=0, atol=tolerance)


def test_training_learns_to_walk_through_the_corridor(trained):
    q_values, _ = trained

    assert q_values.argmax(1).tolist() == [1, 1, 1]


# --- Devices ---
WAIT = ("the host waits",)


class StandIn(TorchDispatchMode):
    """Makes torch's device "meta" stand in for an accelerator, and notes what passes to and fro.

    Its tensors have no numbers. An operation raises where it needs them, or where it takes tensors
    of both the device and the host. What the host gets of them is zeros.
    """

    def __init__(self):
        super().__init__()
        self.events = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device for tensor in tensors}
        if op is torch.ops.aten._to_copy.default:
            devices.add(kwargs.get("device", tensors[0].device))
            if len(devices) == 2:
                return self.pass_on(tensors[0], kwargs.get("non_blocking"))
        assert len(devices) < 2, f"{op} mixes tensors of the device and of the host"
        return op(*args, **kwargs)

    def pass_on(self, tensor, non_blocking):
        if tensor.is_meta:
            self.events.append(WAIT)
            return torch.zeros_like(tensor, device="cpu")
        self.events.append((str(tensor.dtype), *tensor.shape))
        if not non_blocking:
            self.events.append(WAIT)
        return torch.empty_like(tensor, device="meta")


@pytest.fixture
def traffic(monkeypatch):
    """What was sent to a device and where the host waited for it, in acting and in learning.

    The third entry tells in how many of the 5 steps games were truncated.
    """
    # On this device there is none, and float32 does without.
    monkeypatch.setattr("torch.autocast", lambda *args, **kwargs: nullcontext())
    args = Args(num_minibatches=5, update_epochs=2)
    envs = Corridor()
    rollout = Rollout(5, 16)
    rng = default_rng(0)

    with StandIn() as device:
        network = QNetwork(3).to("meta")
        optimizer = RAdam(network.parameters())
        acting = device.events = []
        play(network, envs, rollout, [1.0] * 5, 0.9, rng)
        learning = device.events = []
        learn(network, optimizer, rollout, 1e-4, rng, args)

    return acting, learning, envs.recorded("truncated").any(1).sum()


def test_an_accelerator_gets_the_frames_and_is_waited_for_at_each_step_when_acting(traffic):
    acting, _, steps_with_truncations = traffic
    assert 0 < steps_with_truncations < 5

    # A step asks for the Q-values of all games, and once more for those of last observations.
    frames = ("torch.uint8", 16, 84, 84, 4)
    assert acting == [frames, WAIT] * (5 + steps_with_truncations)


def test_an_accelerator_gets_every_buffer_once_and_is_waited_for_once_a_rollout(traffic):
    _, learning, _ = traffic
    buffers = [
        ("torch.uint8", 6, 16, 84, 84, 4),  # frames
        ("torch.float32", 6, 16),  # values
        ("torch.int64", 5, 16),  # actions
        ("torch.float32", 5, 16),  # rewards
        ("torch.bool", 5, 16),  # dones
    ]
    permutation = ("torch.int64", 5 * 16)

    assert sorted(learning) == sorted([*buffers, permutation, permutation, WAIT])


def test_a_compiled_network_is_not_compiled_anew_however_many_games_are_truncated():
    graphs = []

    def compile_by_counting(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    network = QNetwork(3)
    network.compile(backend=compile_by_counting, dynamic=False)
    args = Args(num_minibatches=2, update_epochs=1)
    envs = Corridor()
    rollout = Rollout(1, 16)
    optimizer = RAdam(network.parameters())
    rng = default_rng(0)

    num_graphs = []
    for _ in range(12):
        play(network, envs, rollout, [1.0], 0.9, rng)
        learn(network, optimizer, rollout, 1e-4, rng, args)
        num_graphs.append(len(graphs))

    # The first round, in which everything is compiled, knows of no truncation.
    num_truncated = envs.recorded("truncated").sum(1)
    assert num_truncated[0] == 0
    assert len(set(num_truncated)) > 2
    assert min(num_graphs) == max(num_graphs) > 0
