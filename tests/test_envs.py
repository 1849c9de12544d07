"""The environments: Stable-Baselines3 `VecEnv`s that show the very games that the bare emulator plays."""

from collections import deque
from itertools import chain, combinations
from types import SimpleNamespace

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import MaxAndSkipEnv, WarpFrame
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecTransposeImage

from pqn_breakout import UserError, make_env

BREAKOUT, PACMAN = "BreakoutNoFrameskip-v4", "MsPacmanNoFrameskip-v4"


def register(env_id: str, base: str, **changes) -> str:
    """Another Atari id, with some of the arguments of `base` changed."""
    gym.register(env_id, entry_point="ale_py.env:AtariEnv", kwargs={**gym.registry[base].kwargs, **changes})
    return env_id


SHORT_BREAKOUT = register("ShortBreakout-v0", BREAKOUT, max_num_frames_per_episode=400)
SHORT_PACMAN = register("ShortMsPacman-v0", PACMAN, max_num_frames_per_episode=40)
SHORT_INVADERS = register("ShortSpaceInvaders-v0", "SpaceInvadersNoFrameskip-v4", max_num_frames_per_episode=300)
FROGGER = register("Frogger-v0", "ALE/Frogger-v5", repeat_action_probability=0.0, frameskip=3, full_action_space=True)


# --- The truth: the bare emulator ---
class Emulator:
    """One game on the bare `ALEInterface`, with Atari's preprocessing written out."""

    def __init__(self, env_id: str):
        kwargs = gym.registry[env_id].kwargs
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", kwargs["repeat_action_probability"])
        self.ale.setInt("max_num_frames_per_episode", kwargs["max_num_frames_per_episode"])
        self.ale.loadROM(ale_py.roms.get_rom_path(kwargs["game"]))
        full = kwargs["full_action_space"]
        self.actions = self.ale.getLegalActionSet() if full else self.ale.getMinimalActionSet()
        self.fire = self.actions.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in self.actions else None
        self.skip = 4 if kwargs["frameskip"] == 1 else kwargs["frameskip"]
        self.reset()

    def reset(self) -> None:
        self.ale.reset_game()
        self.screens = deque([self.ale.getScreenGrayscale()], maxlen=2 * self.skip)
        self.stack = deque([np.zeros((84, 84), np.uint8)] * 3 + [shrink(self.screens[0])], maxlen=4)
        self.first = np.stack(self.stack)

    def step(self, action: int) -> SimpleNamespace:
        """What one step shows; at the end of a game also what the next game begins with."""
        lives, reward = self.ale.lives(), 0
        for _ in range(self.skip):
            reward += self.ale.act(self.actions[action])
            self.screens.append(self.ale.getScreenGrayscale())
            if self.ale.game_over():
                break
        self.stack.append(shrink(np.maximum(self.screens[-1], self.screens[-2])))
        step = SimpleNamespace(
            reward=reward,
            frames=np.stack(self.stack),
            lives=self.ale.lives(),
            life_lost=0 < self.ale.lives() < lives,
            truncated=not self.ale.game_over(with_truncation=False) and self.ale.game_truncated(),
            over=self.ale.game_over(),
            frame=self.ale.getEpisodeFrameNumber(),
            next_frames=np.stack(self.stack),
        )
        if step.over:
            step.last_screens = list(self.screens)
            self.reset()
            step.next_frames = self.first
        return step


def shrink(screen: np.ndarray) -> np.ndarray:
    return cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA)


def play(env_id: str, num_steps: int, num_envs: int = 1) -> SimpleNamespace:
    """Random play: for each game pairs of what is seen of a step and the bare emulator's account of the action."""
    env = make_env(env_id, num_envs, seed=1, noop_max=0)
    first = env.reset().copy()
    rng = np.random.default_rng(0)
    emulators = [Emulator(env_id) for _ in range(num_envs)]
    games = [[] for _ in range(num_envs)]  # arrays as they came: a later step must not write into them
    for _ in range(num_steps):
        asked = rng.integers(env.action_space.n, size=num_envs)
        frames, rewards, dones, infos = env.step(asked)
        for i, info in enumerate(infos):
            seen = SimpleNamespace(frames=frames[i], reward=rewards[i], done=dones[i], info=info)
            games[i].append((seen, emulators[i].step(info.get("action", asked[i]))))
    return SimpleNamespace(first=first, games=games, emulators=emulators)


PLAYED = [
    (BREAKOUT, 420, 2),
    (SHORT_BREAKOUT, 220),  # no game is lost: all are truncated
    ("PongNoFrameskip-v4", 910),  # has no lives, has negative rewards
    (PACMAN, 530),  # has no FIRE
    ("RoadRunnerNoFrameskip-v4", 460),  # all 18 actions
    (FROGGER, 390),  # skips 3 frames by itself, has actions it does not need, plays its last life as the zeroth
]


@pytest.fixture(scope="module", params=PLAYED, ids=lambda played: played[0].split("NoFrameskip")[0])
def played(request):
    return play(*request.param)


def test_frames_are_the_emulators_and_a_new_game_starts_from_an_empty_stack(played):
    np.testing.assert_array_equal(played.first, [emulator.first for emulator in played.emulators])
    for game in played.games:
        for t, (seen, true) in enumerate(game):
            np.testing.assert_array_equal(seen.frames, true.next_frames, err_msg=f"step {t}")


def test_rewards_are_signs_of_the_emulators_and_a_lost_life_is_an_end(played):
    assert any(true.reward for _, true in chain(*played.games))
    for seen, true in chain(*played.games):
        assert seen.reward == np.sign(true.reward)
        assert seen.done == (true.life_lost or true.over)
        assert (seen.info["lives"], seen.info["TimeLimit.truncated"]) == (true.lives, true.truncated)


def test_terminal_observation_comes_with_done_only_and_is_the_games_own_last_stack(played):
    for seen, true in chain(*played.games):
        assert ("terminal_observation" in seen.info) == seen.done
        if true.over:
            *older, newest = seen.info["terminal_observation"]
            np.testing.assert_array_equal(older, true.frames[:3])
            # The step that ends a game stops short, and the frames pooled before stand in for those it lacks.
            pools = chain(combinations(true.last_screens, 2), combinations(true.last_screens, 3))
            assert any((newest == shrink(np.max(screens, 0))).all() for screens in pools)
        elif true.life_lost:  # where the game goes on
            np.testing.assert_array_equal(seen.info["terminal_observation"], seen.frames)


def test_a_whole_game_reports_its_true_score_and_length_at_its_end_only(played):
    for game in played.games:
        assert any(true.over for _, true in game)
        score = length = 0
        for seen, true in game:
            score, length = score + true.reward, length + 1
            assert ("episode" in seen.info) == true.over
            if true.over:
                assert (seen.info["episode"]["r"], seen.info["episode"]["l"]) == (score, length)
                score = length = 0


def test_fire_replaces_the_first_action_of_every_life_where_the_game_has_it(played):
    fire = played.emulators[0].fire
    for game in played.games:
        starts = [True] + [seen.done for seen, _ in game[:-1]]
        for start, (seen, _) in zip(starts, game, strict=True):
            assert seen.info.get("action") == (fire if start else None)


def test_breakouts_frames_without_no_ops_are_those_of_stable_baselines3():
    env, theirs = make_env(BREAKOUT, 1, 1, noop_max=0), WarpFrame(MaxAndSkipEnv(gym.make(BREAKOUT)))
    np.testing.assert_array_equal(env.reset()[0, 3], theirs.reset()[0][..., 0])
    for action in np.random.default_rng(0).integers(4, size=(240, 1)):
        frames, _, _, (info,) = env.step(action)
        frame, _, terminated, _, _ = theirs.step(info.get("action", action[0]))
        np.testing.assert_array_equal(frames[0, 3], (theirs.reset()[0] if terminated else frame)[..., 0])


def test_reset_gives_up_the_games_and_the_step_that_are_being_played(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 0.0)
    env = make_env(SHORT_INVADERS, 2, 1, noop_max=0)
    first = env.reset().copy()
    whole_games = [env.step([4, 4]) for _ in range(75)]
    assert sum(env.step([4, 4])[1] for _ in range(45)).all()  # both have scored
    env.step_async([4, 4])
    np.testing.assert_array_equal(env.reset(), first)
    again = [env.step([4, 4]) for _ in whole_games]
    np.testing.assert_equal(again, whole_games)
    assert all("episode" in info for info in whole_games[-1][3])


def test_a_game_over_at_the_frame_limit_is_not_a_truncation():
    emulator = Emulator(BREAKOUT)
    actions, true = [emulator.fire], emulator.step(emulator.fire)
    while not true.over:
        actions.append(emulator.fire if true.life_lost else 0)
        true = emulator.step(actions[-1])
    env = make_env(register("LimitBreakout-v0", BREAKOUT, max_num_frames_per_episode=true.frame), 1, 1, noop_max=0)
    env.reset()
    for action in actions:
        _, _, (done,), (info,) = env.step([action])
    assert done and "episode" in info and not info["TimeLimit.truncated"]


# --- Seeds and ids ---
@pytest.mark.parametrize("env_id, noop_max", [(SHORT_PACMAN, 30), ("ALE/Breakout-v5", 0)], ids=["no-ops", "sticky"])
def test_chance_in_game_i_is_that_of_seed_plus_i_and_goes_on_at_a_reset_and_in_the_next_game(env_id, noop_max):
    def trajectory(env):
        frames = [env.reset().copy()]
        return np.stack(frames + [env.step(np.full(env.num_envs, t % 4))[0] for t in range(30)], axis=1)

    env = make_env(env_id, 2, 5, noop_max=noop_max)
    first = trajectory(env)
    assert (first[0] != first[1]).any()
    assert (first != trajectory(env)).any()
    assert list(env.seed(6)) == [6, 7]
    np.testing.assert_array_equal(trajectory(env)[0], first[1])
    np.testing.assert_array_equal(trajectory(make_env(env_id, 1, 6, noop_max=noop_max))[0], first[1])


def test_any_seed_is_good_and_like_options_for_the_next_reset_only():
    env = make_env(SHORT_PACMAN, 2, 1)
    env.set_options({"option": 1})
    for seed in (0, 2**31 - 1, 2**32 - 1, None):
        env.seed(seed)
        env.reset()
        assert env._seeds == [None] * 2 and env._options == [{}] * 2


# Backgammon has no NOOP.
@pytest.mark.parametrize("env_id", ["ALE/Backgammon-v5", *[name for name in gym.registry if "ALE/" in name][4::15]])
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
    ("Breakout-v4", "native", "--vec-env native: must be native or sb3; .*needs sb3"),
    (BREAKOUT, "subproc", "--vec-env subproc: must be native,? or sb3"),
]


@pytest.mark.parametrize("env_id, vec_env, error", REFUSED)
def test_an_environment_that_cannot_be_made_is_the_users_error(env_id, vec_env, error):
    with pytest.raises(UserError, match=error):
        make_env(env_id, 1, 1, vec_env)


# --- A VecEnv, and Stable-Baselines3 ---
@pytest.mark.parametrize("vec_env", ["native", "sb3"])
def test_it_is_a_vec_env_with_its_shapes_types_attributes_and_methods(vec_env):
    env = make_env(BREAKOUT, 3, 1, vec_env)
    assert isinstance(env, VecEnv) and env.num_envs == 3
    assert env.observation_space == gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert env.action_space == gym.spaces.Discrete(4)
    assert (env.reset().shape, env.reset().dtype) == ((3, 4, 84, 84), np.uint8)
    for actions in (np.array([3, 2, 1], dtype=np.int32), [0, 1, 2]):
        *arrays, infos = env.step(actions)
        assert [array.shape for array in arrays] == [(3, 4, 84, 84), (3,), (3,)]
        assert [array.dtype for array in arrays] == [np.uint8, np.float32, bool]
        assert [info["lives"] for info in infos] == [5, 5, 5]
    assert [spec.id for spec in env.get_attr("spec", indices=1)] == [BREAKOUT]
    assert env.env_method("get_action_meanings", indices=[0, 2]) == [["NOOP", "FIRE", "RIGHT", "LEFT"]] * 2
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(gym.wrappers.TimeLimit, indices=[0]) == [False]
    env.set_attr("tag", "x")
    assert env.get_attr("tag") == ["x"] * 3
    assert not env.has_attr("no_such_thing")
    with pytest.raises(AttributeError):
        env.env_method("no_such_thing")
    env.close()
    env.close()


def test_what_nobody_can_play_is_refused_and_play_goes_on():
    with pytest.raises(ValueError, match="at least 1"):
        make_env(BREAKOUT, 0, 1)
    env = make_env(BREAKOUT, 2, 1)
    env.reset()
    env.step([0, 0])
    for actions in ([0, -1], [0, 4], [0.5, 1.0], [1], [[1, 1]], 1, None):
        with pytest.raises(ValueError, match="must be 2 integers below 4"):
            env.step(actions)
    with pytest.raises(ValueError, match="must be 2 integers below 4"):
        env.step_wait()  # without step_async
    assert ["action" in info for info in env.step([2, 3])[3]] == [False, False]


def test_ppo_trains_on_it_and_logs_whole_games():
    env = make_env(SHORT_PACMAN, 2, 1, noop_max=0)
    model = PPO("CnnPolicy", env, n_steps=20, batch_size=40, n_epochs=1, device="cpu").learn(40)
    assert [game["l"] for game in model.ep_info_buffer] == [10] * 4


@pytest.mark.filterwarnings("error:.*Monitor")
def test_evaluate_policy_returns_true_scores_of_whole_games():
    emulator = Emulator(PACMAN)
    steps = [emulator.step(5)]
    while not steps[-1].over:
        steps.append(emulator.step(5))
    policy = SimpleNamespace(predict=lambda frames, **_: ([5] * len(frames), None))
    env = make_env(PACMAN, 1, 1, noop_max=0)
    scores, lengths = evaluate_policy(policy, env, n_eval_episodes=1, return_episode_rewards=True)
    assert (scores, lengths) == ([sum(step.reward for step in steps)], [len(steps)])


def test_sb3_is_stable_baselines3s_own_pipeline(monkeypatch):
    monkeypatch.setattr("time.time", lambda: 0.0)  # an episode's seconds
    env = make_env(SHORT_INVADERS, 2, 7, "sb3")
    theirs = VecTransposeImage(VecFrameStack(make_atari_env(SHORT_INVADERS, 2, seed=7), 4))
    np.testing.assert_array_equal(env.reset(), theirs.reset())
    rewards, ends = np.zeros(2), []
    for _ in range(72):
        step = env.step([4, 4])
        np.testing.assert_equal(step, theirs.step([4, 4]))
        rewards += step[1]
        ends += [info for info in step[3] if "episode" in info]
    assert list(rewards) == [2, 2]  # two invaders each, of 5 points apiece
    assert [(info["episode"]["r"], info["TimeLimit.truncated"]) for info in ends] == [(10, True)] * 2


@pytest.mark.parametrize("env_id, frames", [(BREAKOUT, {4}), (FROGGER, {3}), ("Breakout-v4", {2, 3, 4})])
def test_sb3_skips_the_frames_that_the_id_stands_for(env_id, frames):
    env = make_env(env_id, 1, 1, "sb3")
    env.reset()
    numbers = [env.step([0])[3][0]["episode_frame_number"] for _ in range(12)]
    assert set(np.diff(numbers)) == frames
