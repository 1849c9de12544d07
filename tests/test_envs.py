"""The environments: Stable-Baselines3 `VecEnv`s that show what the bare emulator plays."""

from collections import deque
from itertools import chain, combinations, count
from types import SimpleNamespace

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
from numpy.random import default_rng
from numpy.testing import assert_array_equal, assert_equal
from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv, WarpFrame
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecTransposeImage

from pqn_breakout import UserError, make_env

BREAKOUT = "BreakoutNoFrameskip-v4"
PACMAN = "MsPacmanNoFrameskip-v4"
INVADERS = "SpaceInvadersNoFrameskip-v4"
# The action RIGHTFIRE in two games of Space Invaders: it scores soon.
FIRE_RIGHT = [4, 4]


def register(env_id, base, **changes):
    """Another Atari id, with some of the arguments of `base` changed."""
    kwargs = gym.registry[base].kwargs | changes
    gym.register(env_id, "ale_py.env:AtariEnv", kwargs=kwargs)
    return env_id


def short(base, frames):
    """The id of a game that ends after so many frames, and not after half an hour."""
    return register(f"Short{frames}{base}", base, max_num_frames_per_episode=frames)


SHORT_BREAKOUT = short(BREAKOUT, 400)
SHORT_PACMAN = short(PACMAN, 40)
SHORT_INVADERS = short(INVADERS, 300)
FROGGER = register(
    "Frogger-v0",
    "ALE/Frogger-v5",
    repeat_action_probability=0.0,
    frameskip=3,
    full_action_space=True,
)


# --- The truth: the bare emulator ---
# It shares no code with the environments but the emulator itself and OpenCV's resizing.
class Emulator:
    """One game on the bare `ALEInterface`, with Atari's preprocessing written out."""

    def __init__(self, env_id, seed=0):
        kwargs = gym.registry[env_id].kwargs
        ale = ale_py.ALEInterface()
        ale.setInt("random_seed", seed)
        ale.setFloat("repeat_action_probability", kwargs["repeat_action_probability"])
        ale.setInt("max_num_frames_per_episode", kwargs["max_num_frames_per_episode"])
        ale.loadROM(ale_py.roms.get_rom_path(kwargs["game"]))
        full = kwargs["full_action_space"]
        self.ale = ale
        self.actions = ale.getLegalActionSet() if full else ale.getMinimalActionSet()
        fire = ale_py.Action.FIRE
        self.fire = self.actions.index(fire) if fire in self.actions else None
        self.skip = 4 if kwargs["frameskip"] == 1 else kwargs["frameskip"]
        self.reset()

    def reset(self):
        self.ale.reset_game()
        screen = self.ale.getScreenGrayscale()
        empty = np.zeros((84, 84), np.uint8)
        # Those of the last two steps: the pair that is pooled may begin in the step before.
        self.screens = deque([screen], maxlen=2 * self.skip)
        self.stack = deque([empty, empty, empty, shrink(screen)], maxlen=4)
        self.first = np.stack(self.stack)

    def step(self, action):
        """What one step shows; at the end of a game also what the next game begins with."""
        ale = self.ale
        lives = ale.lives()
        reward = 0
        for _ in range(self.skip):
            reward += ale.act(self.actions[action])
            self.screens.append(ale.getScreenGrayscale())
            if ale.game_over():
                break
        # The Atari draws some things in every other frame only.
        self.stack.append(shrink(np.maximum(self.screens[-1], self.screens[-2])))
        frames = np.stack(self.stack)

        step = SimpleNamespace(
            reward=reward,
            frames=frames,
            lives=ale.lives(),
            life_lost=0 < ale.lives() < lives,
            truncated=not ale.game_over(with_truncation=False) and ale.game_truncated(),
            over=ale.game_over(),
            frame=ale.getEpisodeFrameNumber(),
            next_frames=frames,
        )
        if step.over:
            # Environments reset themselves: what they return is the next game's first state.
            step.last_screens = list(self.screens)
            self.reset()
            step.next_frames = self.first
        return step


def shrink(screen):
    return cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA)


def play(env_id, num_steps, num_envs=1):
    """Random play: for each game pairs of what is seen of a step and the emulator's account."""
    env = make_env(env_id, num_envs, seed=1, noop_max=0)
    first = env.reset().copy()
    emulators = [Emulator(env_id) for _ in range(num_envs)]
    games = [[] for _ in range(num_envs)]
    rng = default_rng(0)
    for _ in range(num_steps):
        asked = rng.integers(env.action_space.n, size=num_envs)
        # Arrays are kept as they came, for a later step must not write into them.
        frames, rewards, dones, infos = env.step(asked)
        for i, info in enumerate(infos):
            seen = SimpleNamespace(frames=frames[i], reward=rewards[i], done=dones[i], info=info)
            true = emulators[i].step(info.get("action", asked[i]))
            games[i].append((seen, true))
    return SimpleNamespace(first=first, games=games, steps=[*chain(*games)], emulators=emulators)


# Ids, and enough steps for at least one whole game of random play.
PLAYED = [
    (BREAKOUT, 420, 2),
    # No game is lost: all are truncated.
    (SHORT_BREAKOUT, 220),
    # Has no lives, has negative rewards.
    ("PongNoFrameskip-v4", 910),
    # Has no FIRE.
    (PACMAN, 530),
    # Has all 18 actions.
    ("RoadRunnerNoFrameskip-v4", 460),
    # Skips 3 frames by itself, has actions it does not need, plays its last life as the zeroth.
    (FROGGER, 390),
]


@pytest.fixture(scope="module", params=PLAYED, ids=lambda played: played[0])
def played(request):
    return play(*request.param)


def test_frames_are_the_emulators_and_a_new_game_starts_from_an_empty_stack(played):
    assert_array_equal(played.first, [emulator.first for emulator in played.emulators])
    for seen, true in played.steps:
        assert_array_equal(seen.frames, true.next_frames)


def test_rewards_are_signs_of_the_emulators(played):
    assert any(true.reward for _, true in played.steps)
    for seen, true in played.steps:
        assert seen.reward == np.sign(true.reward)


def test_a_lost_life_is_an_end(played):
    for seen, true in played.steps:
        assert seen.done == (true.life_lost or true.over)


def test_lives_and_truncations_are_the_emulators(played):
    for seen, true in played.steps:
        assert seen.info["lives"] == true.lives
        assert seen.info["TimeLimit.truncated"] == true.truncated


def test_terminal_observation_comes_with_done_only(played):
    for seen, _ in played.steps:
        assert ("terminal_observation" in seen.info) == seen.done


def test_terminal_observation_of_a_game_is_its_own_last_stack(played):
    for seen, true in played.steps:
        if true.over:
            *older, newest = seen.info["terminal_observation"]
            assert_array_equal(older, true.frames[:3])
            # The step that ends a game stops short, and the frames pooled before stand in for
            # those it lacks.
            screens = true.last_screens
            pools = chain(combinations(screens, 2), combinations(screens, 3))
            assert any((newest == shrink(np.max(pool, 0))).all() for pool in pools)


def test_terminal_observation_of_a_life_is_what_the_game_goes_on_with(played):
    for seen, true in played.steps:
        if true.life_lost and not true.over:
            assert_array_equal(seen.info["terminal_observation"], seen.frames)


def test_a_whole_game_reports_its_true_score_and_length_at_its_end_only(played):
    for game in played.games:
        assert any(true.over for _, true in game)
        score = length = 0
        for seen, true in game:
            score += true.reward
            length += 1
            assert ("episode" in seen.info) == true.over
            if true.over:
                assert seen.info["episode"] == {"r": score, "l": length}
                score = length = 0


def test_fire_replaces_the_first_action_of_every_life_where_the_game_has_it(played):
    fire = played.emulators[0].fire
    for game in played.games:
        starts = True
        for seen, _ in game:
            assert seen.info.get("action") == (fire if starts else None)
            starts = seen.done


def test_breakouts_frames_without_no_ops_are_those_of_stable_baselines3():
    env = make_env(BREAKOUT, 1, 1, noop_max=0)
    theirs = WarpFrame(MaxAndSkipEnv(gym.make(BREAKOUT)))

    assert_array_equal(env.reset()[0, 3], theirs.reset()[0][..., 0])
    for action in default_rng(0).integers(4, size=240):
        frames, _, _, (info,) = env.step([action])
        frame, _, terminated, _, _ = theirs.step(info.get("action", action))
        # Stable-Baselines3's wrappers leave it to the caller to begin the next game.
        if terminated:
            frame, _ = theirs.reset()
        assert_array_equal(frames[0, 3], frame[..., 0])


def test_reset_gives_up_the_games_and_the_step_that_are_being_played():
    env = make_env(SHORT_INVADERS, 2, 1, noop_max=0)
    first = env.reset().copy()
    whole_games = [env.step(FIRE_RIGHT) for _ in range(300 // 4)]
    assert all("episode" in info for info in whole_games[-1][3])
    # Both games score before they are given up: their scores must not join those of the next.
    given_up = [env.step(FIRE_RIGHT) for _ in range(45)]
    assert sum(rewards for _, rewards, _, _ in given_up).all()

    env.step_async(FIRE_RIGHT)
    assert_array_equal(env.reset(), first)
    again = [env.step(FIRE_RIGHT) for _ in whole_games]

    assert_equal(again, whole_games)


def test_a_game_over_at_the_frame_limit_is_not_a_truncation():
    ends = [true for _, true in play(BREAKOUT, 420).steps if true.over]
    limited = short(BREAKOUT, ends[0].frame)

    games = [seen for seen, true in play(limited, 420).steps if true.over]

    assert games[0].done
    assert "episode" in games[0].info
    assert not games[0].info["TimeLimit.truncated"]


@pytest.mark.parametrize("vec_env", ["native", "sb3"])
def test_a_game_is_cut_off_after_so_many_frames(vec_env):
    env = make_env(BREAKOUT, 1, 1, vec_env, 0, max_frames=80)
    env.reset()
    steps = next(t for t in count(1) if "episode" in env.step([2])[3][0])

    # Among the frames are three steps that SB3's pipeline plays unseen.
    assert 80 / 4 - 3 <= steps <= 80 / 4


# --- Seeds and ids ---
def trajectory(env):
    """The states of each game from a reset through 30 steps."""
    states = [env.reset().copy()]
    for t in range(30):
        observations, *_ = env.step(np.full(env.num_envs, t % 4))
        states.append(observations)
    return np.stack(states, axis=1)


@pytest.fixture(
    scope="module",
    params=[(SHORT_PACMAN, 30), ("ALE/Breakout-v5", 0)],  # no-ops, sticky actions
)
def chance(request):
    """Games that differ by chance only: two of seeds 5 and 6, twice, and one of seed 6."""
    env_id, noop_max = request.param
    env = make_env(env_id, 2, 5, noop_max=noop_max)
    return SimpleNamespace(
        env=env,
        first=trajectory(env),
        again=trajectory(env),
        of_6=trajectory(make_env(env_id, 1, 6, noop_max=noop_max)),
    )


def test_chance_in_game_i_is_that_of_seed_plus_i(chance):
    assert_array_equal(chance.first[1], chance.of_6[0])
    assert (chance.first[0] != chance.first[1]).any()


def test_chance_goes_on_at_a_reset(chance):
    assert (chance.first != chance.again).any()


def test_chance_starts_anew_from_a_seed_that_is_given_later(chance):
    assert list(chance.env.seed(6)) == [6, 7]

    assert_array_equal(trajectory(chance.env)[0], chance.first[1])


def test_chance_goes_on_in_the_next_game():
    env = make_env(SHORT_PACMAN, 1, 1)
    first = env.reset().copy()

    # A game of 40 frames, of which a step takes 4. The next begins after other no-ops.
    for _ in range(40 // 4):
        start_of_the_next, *_, infos = env.step([0])

    assert "episode" in infos[0]
    assert (start_of_the_next != first).any()


def test_any_seed_is_good_and_like_options_for_the_next_reset_only():
    env = make_env(SHORT_PACMAN, 2, 1)
    env.set_options({"option": 1})

    for seed in (0, 2**31 - 1, 2**32 - 1, None):
        env.seed(seed)
        env.reset()

        # Here every VecEnv keeps what its next reset is to use.
        assert env._seeds == [None, None]
        assert env._options == [{}, {}]


# One in fifteen, and Backgammon, which has no NOOP.
SOME_GAMES = [env_id for env_id in gym.registry if "ALE/" in env_id][4::15]


@pytest.mark.parametrize("env_id", ["ALE/Backgammon-v5", *SOME_GAMES])
def test_any_atari_game_can_be_played(env_id):
    env = make_env(env_id, 1, 1)

    assert env.reset().shape == (1, 4, 84, 84)
    assert env.action_space.n == len(Emulator(env_id).actions)
    for action in range(env.action_space.n):
        env.step([action])


REFUSED = [
    ("BreakoutNoFrameskp-v4", "sb3", f"--env-id BreakoutNoFrameskp-v4: no Atari game.* {BREAKOUT}"),
    ("CartPole-v1", "native", "--env-id CartPole-v1: no Atari game"),
    ("", "native", "--env-id : no Atari game"),
    ("Breakout-v4", "native", "--env-id Breakout-v4: skips a random .* --vec-env sb3 plays; ids"),
    (BREAKOUT, "subproc", "--vec-env subproc: must be native or sb3"),
]


@pytest.mark.parametrize("env_id, vec_env, error", REFUSED)
def test_an_environment_that_cannot_be_made_is_the_users_error(env_id, vec_env, error):
    with pytest.raises(UserError, match=error):
        make_env(env_id, 1, 1, vec_env)


# --- A VecEnv, and Stable-Baselines3 ---
@pytest.fixture(scope="module", params=["native", "sb3"])
def env(request):
    """Three games of Breakout of either pipeline; no test plays so long that a ball is lost."""
    env = make_env(BREAKOUT, 3, 1, request.param)
    env.reset()
    return env


def test_it_is_a_vec_env_with_its_spaces(env):
    assert isinstance(env, VecEnv)
    assert env.num_envs == 3
    assert env.observation_space == gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert env.action_space == gym.spaces.Discrete(4)


@pytest.mark.parametrize("actions", [np.array([3, 2, 1], np.int32), [0, 1, 2]])
def test_a_step_returns_arrays_and_infos_of_a_vec_env(env, actions):
    *arrays, infos = env.step(actions)

    assert [array.shape for array in arrays] == [(3, 4, 84, 84), (3,), (3,)]
    assert [array.dtype for array in arrays] == [np.uint8, np.float32, bool]
    assert [info["lives"] for info in infos] == [5, 5, 5]


def test_attributes_and_methods_are_those_of_the_games_asked_for(env):
    meanings = ["NOOP", "FIRE", "RIGHT", "LEFT"]

    assert [spec.id for spec in env.get_attr("spec", indices=1)] == [BREAKOUT]
    assert env.env_method("get_action_meanings", indices=[0, 2]) == [meanings, meanings]


def test_an_attribute_can_be_set(env):
    env.set_attr("tag", "x")

    assert env.get_attr("tag") == ["x"] * 3


def test_what_a_game_does_not_have_is_said_to_be_missing(env):
    assert not env.has_attr("no_such_thing")
    with pytest.raises(AttributeError):
        env.env_method("no_such_thing")


def test_games_are_wrapped_in_a_monitor_only(env):
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, indices=[0]) == [False]


def test_no_games_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        make_env(BREAKOUT, 0, 1)


def test_actions_that_nobody_can_play_are_refused_and_play_goes_on():
    env = make_env(BREAKOUT, 2, 1)
    env.reset()
    env.step([0, 0])

    # Without step_async there are no actions.
    with pytest.raises(ValueError, match="must be 2 integers below 4"):
        env.step_wait()
    for actions in ([0, -1], [0, 4], [0.5, 1.0], [1], [[1, 1]], 1, None):
        with pytest.raises(ValueError, match="must be 2 integers below 4"):
            env.step(actions)

    # No serve is due: what was refused began no life.
    *_, infos = env.step([2, 3])
    assert all("action" not in info for info in infos)


def test_ppo_trains_on_it_and_logs_whole_games():
    env = make_env(SHORT_PACMAN, 2, 1, noop_max=0)

    model = PPO("CnnPolicy", env, n_steps=20, batch_size=40, n_epochs=1, device="cpu").learn(40)

    lengths = [game["l"] for game in model.ep_info_buffer]
    # Its limit is 40 frames, of which a step takes 4: of 40 steps a game takes 10.
    assert lengths == [40 // 4] * 4


# Stable-Baselines3 warns where it doubts that scores are those of whole games.
@pytest.mark.filterwarnings("error:.*Monitor")
def test_evaluate_policy_returns_true_scores_of_whole_games():
    # UPRIGHT, which is worth some points.
    always = 5
    emulator = Emulator(PACMAN)
    steps = [emulator.step(always)]
    while not steps[-1].over:
        steps.append(emulator.step(always))

    def predict(frames, **_):
        return [always], None

    env = make_env(PACMAN, 1, 1, noop_max=0)
    policy = SimpleNamespace(predict=predict)
    scores, lengths = evaluate_policy(policy, env, 1, return_episode_rewards=True)

    assert scores == [sum(step.reward for step in steps)]
    assert lengths == [len(steps)]


@pytest.fixture(scope="module")
def sb3_steps():
    """What `sb3` and Stable-Baselines3's own pipeline return in two whole games."""
    with pytest.MonkeyPatch.context() as patch:
        # The info of an episode holds the seconds that it took.
        patch.setattr("time.time", lambda: 0.0)
        env = make_env(SHORT_INVADERS, 2, 7, "sb3")
        reference = VecTransposeImage(VecFrameStack(make_atari_env(SHORT_INVADERS, 2, seed=7), 4))
        assert_array_equal(env.reset(), reference.reset())
        ours = [env.step(FIRE_RIGHT) for _ in range(72)]
        theirs = [reference.step(FIRE_RIGHT) for _ in range(72)]
    return ours, theirs


def test_sb3_is_stable_baselines3s_own_pipeline(sb3_steps):
    ours, theirs = sb3_steps

    assert_equal(ours, theirs)


def test_sb3_clips_rewards_but_reports_true_scores_and_truncations(sb3_steps):
    ours, _ = sb3_steps
    rewards = sum(rewards for _, rewards, _, _ in ours)
    ends = [info for *_, infos in ours for info in infos if "episode" in info]

    # Each game shot two invaders, of 5 points apiece.
    assert list(rewards) == [2, 2]
    assert [info["episode"]["r"] for info in ends] == [2 * 5] * 2
    assert [info["TimeLimit.truncated"] for info in ends] == [True, True]


@pytest.mark.parametrize(
    "env_id, skips", [(BREAKOUT, {4}), (FROGGER, {3}), ("Breakout-v4", {2, 3, 4})]
)
def test_sb3_skips_the_frames_that_the_id_stands_for(env_id, skips):
    env = make_env(env_id, 1, 1, "sb3")
    env.reset()

    numbers = []
    for _ in range(12):
        *_, (info,) = env.step([0])
        numbers.append(info["episode_frame_number"])

    assert set(np.diff(numbers)) == skips
