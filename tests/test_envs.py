"""The environments: Stable-Baselines3 `VecEnv`s that show the very games that the bare emulator plays."""

from collections import deque
from itertools import chain, combinations
from types import SimpleNamespace

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
from ale_py.env import AtariEnv
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.atari_wrappers import ClipRewardEnv, MaxAndSkipEnv, WarpFrame
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from pqn_breakout import UserError, atari_spec, make_env

BREAKOUT = "BreakoutNoFrameskip-v4"
NOOP = 0


def register(env_id: str, base: str, **changes) -> str:
    """Another Atari id, with some of the arguments of `base` changed."""
    gym.register(env_id, entry_point="ale_py.env:AtariEnv", kwargs={**gym.registry[base].kwargs, **changes})
    return env_id


SHORT_BREAKOUT = register("ShortBreakout-v0", BREAKOUT, max_num_frames_per_episode=400)
SHORT_PACMAN = register("ShortMsPacman-v0", "MsPacmanNoFrameskip-v4", max_num_frames_per_episode=40)
SHORT_INVADERS = register("ShortSpaceInvaders-v0", "SpaceInvadersNoFrameskip-v4", max_num_frames_per_episode=600)
FROGGER = register("Frogger-v0", "ALE/Frogger-v5", repeat_action_probability=0.0)
SKIP_3_ALL_ACTIONS = register("PongSkip3-v0", "PongNoFrameskip-v4", frameskip=3, full_action_space=True)


# --- The truth: the bare emulator ---


class Emulator:
    """One game on the bare `ALEInterface`, with Atari's preprocessing written out."""

    def __init__(self, env_id: str):
        kwargs = gym.registry[env_id].kwargs
        self.ale = ale_py.ALEInterface()
        self.ale.setLoggerMode(ale_py.LoggerMode.Error)
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
    """Random play, and for each game the bare emulator's account of it, from the actions that were reported."""
    env = make_env(env_id, num_envs, seed=1, noop_max=0)
    first = env.reset().copy()
    rng = np.random.default_rng(0)
    emulators = [Emulator(env_id) for _ in range(num_envs)]
    steps = [[] for _ in range(num_envs)]  # arrays as they came: a later step must not write into them
    for _ in range(num_steps):
        requested = rng.integers(env.action_space.n, size=num_envs)
        frames, rewards, dones, infos = env.step(requested)
        for i, emulator in enumerate(emulators):
            taken = infos[i].get("action", requested[i])
            seen = SimpleNamespace(frames=frames[i], reward=rewards[i], done=dones[i], info=infos[i])
            steps[i].append((SimpleNamespace(requested=requested[i], taken=taken, **vars(seen)), emulator.step(taken)))
    env.close()
    return SimpleNamespace(first=first, games=steps, emulators=emulators)


PLAYED = [
    (BREAKOUT, 420, 2),
    (SHORT_BREAKOUT, 220),  # no game is lost: all are truncated
    ("PongNoFrameskip-v4", 950),  # has no lives, has negative rewards
    ("SpaceInvadersNoFrameskip-v4", 600),
    ("MsPacmanNoFrameskip-v4", 560),  # has no FIRE
    ("RoadRunnerNoFrameskip-v4", 460),  # all 18 actions
    (FROGGER, 320),  # skips 4 frames by itself, plays its last life as the zeroth
    (SKIP_3_ALL_ACTIONS, 1250),
]


@pytest.fixture(scope="module", params=PLAYED, ids=lambda played: played[0].split("NoFrameskip")[0])
def played(request):
    return play(*request.param)


@pytest.fixture
def steps(played):
    """Pairs of what the environment and the bare emulator say of a step, all games one after the other."""
    return [step for game in played.games for step in game]


def test_frames_are_the_emulators_and_a_new_game_starts_from_an_empty_stack(played):
    for first, emulator in zip(played.first, played.emulators, strict=True):
        np.testing.assert_array_equal(first, emulator.first)
        assert not first[:3].any() and first[3].any()
    for game in played.games:
        for t, (seen, true) in enumerate(game):
            np.testing.assert_array_equal(seen.frames, true.next_frames, err_msg=f"step {t}")


def test_rewards_are_signs_of_the_emulators_and_a_lost_life_is_an_end(steps):
    assert any(true.reward for _, true in steps)
    for seen, true in steps:
        assert seen.reward == np.sign(true.reward)
        assert seen.done == (true.life_lost or true.over)
        assert (seen.info["lives"], seen.info["TimeLimit.truncated"]) == (true.lives, true.truncated)


def test_terminal_observation_comes_with_done_only_and_is_the_games_own_last_stack(steps):
    for seen, true in steps:
        assert ("terminal_observation" in seen.info) == seen.done
        if true.over:
            *older, newest = seen.info["terminal_observation"]
            np.testing.assert_array_equal(older, true.frames[:3])
            # The step that ends a game stops short, and the frames pooled before stand in for those it lacks.
            pools = chain(combinations(true.last_screens, 2), combinations(true.last_screens, 3))
            assert any((newest == shrink(np.max(screens, 0))).all() for screens in pools)
            assert not (seen.info["terminal_observation"] == seen.frames).all()
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
                assert seen.info["episode"]["t"] > 0
                score = length = 0


def test_fire_replaces_the_first_action_of_every_life_where_the_game_has_it(played):
    fire = played.emulators[0].fire
    for game in played.games:
        starts = [True] + [seen.done for seen, _ in game[:-1]]
        for start, (seen, _) in zip(starts, game, strict=True):
            assert seen.taken == (fire if start and fire is not None else seen.requested)
            assert ("action" in seen.info) == (seen.taken != seen.requested)


def test_breakouts_frames_without_no_ops_are_those_of_stable_baselines3():
    env, theirs = make_env(BREAKOUT, 1, 1, noop_max=0), WarpFrame(MaxAndSkipEnv(gym.make(BREAKOUT)))
    np.testing.assert_array_equal(env.reset()[0, 3], theirs.reset()[0][..., 0])
    for requested in np.random.default_rng(0).integers(4, size=(200, 1)):
        frames, _, _, (info,) = env.step(requested)
        frame, _, terminated, _, _ = theirs.step(info.get("action", requested[0]))
        np.testing.assert_array_equal(frames[0, 3], (theirs.reset()[0] if terminated else frame)[..., 0])


# --- Lives and whole games ---


def test_reset_gives_up_the_games_and_the_step_that_are_being_played():
    env = make_env(SHORT_INVADERS, 2, 1, noop_max=0)
    first = env.reset().copy()
    assert sum(env.step([4, 4])[1] for _ in range(100)).all()  # both have scored
    env.step_async([4, 4])
    np.testing.assert_array_equal(env.reset(), first)
    emulators, scores = [Emulator(SHORT_INVADERS), Emulator(SHORT_INVADERS)], np.zeros(2)
    for t in range(150):
        frames, _, _, infos = env.step([4, 3])
        for i, emulator in enumerate(emulators):
            true = emulator.step(infos[i].get("action", [4, 3][i]))
            scores[i] += true.reward
            np.testing.assert_array_equal(frames[i], true.next_frames, err_msg=f"step {t}")
    assert [(info["episode"]["r"], info["episode"]["l"]) for info in infos] == [(score, 150) for score in scores]


def test_a_game_over_at_the_frame_limit_is_not_a_truncation():
    emulator = Emulator(BREAKOUT)
    actions, true = [emulator.fire], emulator.step(emulator.fire)
    while not true.over:
        actions.append(emulator.fire if true.life_lost else NOOP)
        true = emulator.step(actions[-1])
    env = make_env(register("LimitBreakout-v0", BREAKOUT, max_num_frames_per_episode=true.frame), 1, 1, noop_max=0)
    env.reset()
    for action in actions:
        _, _, (done,), (info,) = env.step([action])
    assert done and "episode" in info and not info["TimeLimit.truncated"]


# --- Seeds and starts ---


def starts(frames: np.ndarray) -> int:
    return len({game.tobytes() for game in frames})


def test_no_op_starts_differ_between_games_and_resets():
    env = make_env(SHORT_PACMAN, 6, 1)
    first, second = env.reset().copy(), env.reset()
    played = [env.step([NOOP] * 6) for _ in range(12)]
    next_games = [frames[i] for frames, _, _, infos in played for i in range(6) if "episode" in infos[i]]
    assert all(starts(frames) > 3 for frames in (first, second, next_games)) and (first != second).any()
    assert starts(make_env(SHORT_PACMAN, 2, 1, noop_max=0).reset()) == 1


@pytest.mark.parametrize("env_id, noop_max", [("MsPacmanNoFrameskip-v4", 30), ("ALE/Breakout-v5", 0)])
def test_the_no_ops_and_sticky_actions_of_game_i_are_those_of_seed_plus_i(env_id, noop_max):
    def trajectory(env):
        frames = [env.reset().copy()]
        return np.stack(frames + [env.step(np.full(env.num_envs, t % 4))[0] for t in range(30)], axis=1)

    env = make_env(env_id, 2, 5, noop_max=noop_max)
    first, goes_on = trajectory(env), trajectory(env)
    assert starts(first) == 2 and not (first == goes_on).all()
    assert list(env.seed(6)) == [6, 7]
    np.testing.assert_array_equal(trajectory(env)[0], first[1])
    np.testing.assert_array_equal(trajectory(make_env(env_id, 1, 6, noop_max=noop_max)), first[1:])


def test_seeds_and_options_are_for_the_next_reset_and_any_seed_is_good():
    env = make_env("PongNoFrameskip-v4", 2, 1)
    env.set_options({"option": 1})
    for seed in (7, 0, 2**31 - 1, 2**32 - 1, None):
        seeds = env.seed(seed)
        assert seed is None or list(seeds) == [seed, seed + 1]
        env.reset()
        assert env._seeds == [None] * 2 and env._options == [{}] * 2


# --- Which ids, and what they stand for ---


@pytest.mark.parametrize("env_id", ["ALE/Backgammon-v5", *sorted(name for name in gym.registry if "ALE/" in name)[::9]])
def test_any_atari_game_can_be_played(env_id):
    env = make_env(env_id, 1, 1)
    assert env.reset().shape == (1, 4, 84, 84)
    assert env.action_space.n == len(Emulator(env_id).actions)
    for action in range(env.action_space.n):
        env.step([action])
    env.close()


NEAREST = {"BreakoutNoFrameskp-v4": BREAKOUT, "Breakout-v5": "ALE/Breakout-v5", "CartPole-v1": BREAKOUT, "": BREAKOUT}


@pytest.mark.parametrize("env_id, hint", NEAREST.items())
def test_any_other_id_is_the_users_error_with_the_nearest_ids_named(env_id, hint):
    for refuse in (atari_spec, lambda name: make_env(name, 1, 1)):
        with pytest.raises(UserError) as error:
            refuse(env_id)
        assert f"{env_id}: " in str(error.value) and hint in str(error.value)


# --- A VecEnv, and Stable-Baselines3 ---


@pytest.mark.parametrize("vec_env", ["native", "sb3"])
def test_shapes_and_types_are_those_of_a_vec_env(vec_env):
    env = make_env(BREAKOUT, 3, 1, vec_env)
    assert isinstance(env, VecEnv) and env.num_envs == 3
    assert env.observation_space == gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert env.action_space == gym.spaces.Discrete(4)
    frames = env.reset()
    assert isinstance(frames, np.ndarray) and (frames.shape, frames.dtype) == ((3, 4, 84, 84), np.uint8)
    for actions in (np.array([0, 1, 2]), np.array([3, 2, 1], dtype=np.int32), [0, 0, 0]):
        frames, rewards, dones, infos = env.step(actions)
        assert (frames.shape, frames.dtype) == ((3, 4, 84, 84), np.uint8)
        assert (rewards.shape, rewards.dtype) == ((3,), np.float32)
        assert (dones.shape, dones.dtype) == ((3,), bool)
        assert [info["lives"] for info in infos] == [5, 5, 5]
    env.close()
    env.close()


def test_attributes_and_methods_are_reached_as_documented():
    env = make_env(BREAKOUT, 3, 1)
    assert [spec.id for spec in env.get_attr("spec")] == [BREAKOUT] * 3
    assert [spec.id for spec in env.get_attr("spec", indices=1)] == [BREAKOUT]
    assert env.env_method("get_action_meanings") == [["NOOP", "FIRE", "RIGHT", "LEFT"]] * 3
    assert len(env.env_method("get_action_meanings", indices=[0, 2])) == 2
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(ClipRewardEnv, indices=[0]) == [False]
    env.set_attr("tag", "x")
    assert env.get_attr("tag") == ["x"] * 3
    assert env.has_attr("spec") and not env.has_attr("no_such_thing")
    with pytest.raises(AttributeError):
        env.env_method("no_such_thing")


@pytest.mark.parametrize("actions", [[0, -1], [0, 4], [0.5, 1.0], [True, False], [1], [[1, 1]], 1, None], ids=str)
def test_actions_other_than_a_whole_number_for_each_game_are_refused_and_play_goes_on(actions):
    env = make_env(BREAKOUT, 2, 1)
    env.reset()
    env.step([NOOP, NOOP])
    with pytest.raises(ValueError, match="must be 2 integers below 4"):
        env.step_async(actions)
    assert env.step([NOOP, NOOP])[3][0]["lives"] == 5


def test_no_games_and_a_step_that_nobody_asked_for_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        make_env(BREAKOUT, 0, 1)
    env = make_env(BREAKOUT, 2, 1)
    env.reset()
    with pytest.raises(ValueError, match="must follow step_async"):
        env.step_wait()


@pytest.mark.parametrize(
    "algorithm, policy, options",
    [(PPO, "CnnPolicy", {"n_steps": 105, "n_epochs": 1}), (DQN, "MlpPolicy", {"buffer_size": 200})],
)
def test_algorithms_train_on_it_and_log_whole_games(algorithm, policy, options):
    options = {"policy_kwargs": {"net_arch": [8]}, "device": "cpu", "seed": 3} | options
    model = algorithm(policy, make_env(SHORT_BREAKOUT, 2, 1, noop_max=0), **options)
    model.learn(210)
    assert [game["l"] for game in model.ep_info_buffer] == [100] * 2
    assert model.predict(model.env.reset())[0].shape == (2,)


def test_evaluate_policy_returns_true_scores_of_whole_games(recwarn):
    class Random:
        rng = np.random.default_rng(2)

        def predict(self, frames, **_):
            return self.rng.integers(6, size=len(frames)), None

    emulator, rewards, ends = Emulator("QbertNoFrameskip-v4"), [], []

    def replay(local, _):
        true = emulator.step(local["info"].get("action", local["actions"][0]))
        rewards.append(true.reward)
        ends.append(true.over)

    env = make_env("QbertNoFrameskip-v4", 1, 1, noop_max=0)
    scores, lengths = evaluate_policy(Random(), env, n_eval_episodes=1, callback=replay, return_episode_rewards=True)
    assert (scores, lengths) == ([sum(rewards)], [len(rewards)])
    assert ends.index(True) == len(ends) - 1
    assert not any("Monitor" in str(warning.message) for warning in recwarn)


def test_vec_monitor_wraps_it(tmp_path):
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        env = VecMonitor(make_env(SHORT_PACMAN, 2, 1, noop_max=0), str(tmp_path / "log"))
    env.reset()
    for _ in range(10):
        _, _, dones, infos = env.step([NOOP, NOOP])
    env.close()
    assert dones.all() and [info["episode"]["l"] for info in infos] == [10, 10]
    assert len((tmp_path / "log.monitor.csv").read_text().splitlines()) == 4


# --- vec_env sb3 ---


def test_stable_baselines3s_own_pipeline_clips_rewards_and_reports_true_scores_and_truncations(monkeypatch):
    real_step, frames = AtariEnv.step, []  # every frame's reward

    def step(self, action):
        result = real_step(self, action)
        frames.append(result[1])
        return result

    monkeypatch.setattr(AtariEnv, "step", step)
    env = make_env(SHORT_INVADERS, 1, 1, "sb3", noop_max=0)
    env.reset()
    rewards, episodes = [], []
    while not episodes:
        before = sum(frames)
        _, (reward,), (done,), (info,) = env.step([4])
        rewards.append(reward)
        episodes += [info["episode"]] if "episode" in info else []
        assert reward == np.sign(sum(frames) - before)
        assert ("terminal_observation" in info) == done
    assert done and info["TimeLimit.truncated"] and info["terminal_observation"].shape == (4, 84, 84)
    assert episodes[0]["r"] == sum(frames) > sum(rewards) > 0 and episodes[0]["l"] == 600


def test_ids_that_skip_a_random_number_of_frames_need_sb3_and_no_other_kind_is_known():
    env = make_env("Breakout-v4", 1, 1, "sb3")
    env.reset()
    frames = [env.step([NOOP])[3][0]["episode_frame_number"] for _ in range(15)]
    assert set(np.diff(frames)) == {2, 3, 4}
    with pytest.raises(UserError, match="--vec-env .*sb3"):
        make_env("Breakout-v4", 1, 1)
    with pytest.raises(UserError, match="--vec-env subproc: .*native.* sb3"):
        make_env(BREAKOUT, 1, 1, "subproc")
