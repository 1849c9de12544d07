"""The environments: real Stable-Baselines3 VecEnvs that show the very games that the bare emulator plays."""

import os
import signal
from collections import deque
from itertools import chain, combinations, pairwise
from types import SimpleNamespace

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.atari_wrappers import ClipRewardEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

from pqn_breakout import UserError, atari_spec, make_env

BREAKOUT = "BreakoutNoFrameskip-v4"
NOOP = 0
in_process = pytest.mark.parametrize("vec_env", ["native", "dummy"])


def register(env_id: str, base: str, **changes) -> str:
    """Another Atari id, with some of the arguments of `base` changed."""
    gym.register(env_id, entry_point="ale_py.env:AtariEnv", kwargs={**gym.registry[base].kwargs, **changes})
    return env_id


SHORT_BREAKOUT = register("ShortBreakout-v0", BREAKOUT, max_num_frames_per_episode=400)
SHORT_STICKY_BREAKOUT = register("ShortStickyBreakout-v0", "ALE/Breakout-v5", max_num_frames_per_episode=400)
SHORT_PACMAN = register("ShortMsPacman-v0", "MsPacmanNoFrameskip-v4", max_num_frames_per_episode=40)
SHORT_INVADERS = register("ShortSpaceInvaders-v0", "SpaceInvadersNoFrameskip-v4", max_num_frames_per_episode=600)
FROGGER = register("Frogger-v0", "ALE/Frogger-v5", repeat_action_probability=0.0)
SKIP_3_ALL_ACTIONS = register("PongSkip3-v0", "PongNoFrameskip-v4", frameskip=3, full_action_space=True)


# --- The truth: the bare emulator -------------------------------------------------------------------------------------


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


def play(vec_env: str, env_id: str, num_steps: int, num_envs: int = 1) -> SimpleNamespace:
    """Random play, and for each game the bare emulator's account of it, from the actions that were reported."""
    env = make_env(env_id, num_envs, seed=1, vec_env=vec_env, noop_max=0)
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


PLAYED = [(vec_env, BREAKOUT, 420, 2) for vec_env in ("native", "dummy", "subproc")] + [
    (vec_env, *game)
    for game in [
        (SHORT_BREAKOUT, 220, 1),  # no game is lost: all are truncated
        ("PongNoFrameskip-v4", 950, 1),  # has no lives, has negative rewards
        ("SpaceInvadersNoFrameskip-v4", 600, 1),
        ("MsPacmanNoFrameskip-v4", 560, 1),  # has no FIRE
        ("RoadRunnerNoFrameskip-v4", 460, 1),  # all 18 actions
        (FROGGER, 320, 1),  # plays its last life as the zeroth
        (SKIP_3_ALL_ACTIONS, 1250, 1),
    ]
    for vec_env in ("native", "dummy")
]


@pytest.fixture(scope="module", params=PLAYED, ids=lambda played: f"{played[0]}-{played[1].split('NoFrameskip')[0]}")
def played(request):
    return play(*request.param)


@pytest.fixture
def steps(played):
    """Pairs of what the environment and the bare emulator say of a step, all games one after the other."""
    return [step for game in played.games for step in game]


def test_play_reaches_the_end_of_a_game(played):
    assert all(any(true.over for _, true in game) for game in played.games)


def test_frames_are_the_emulators_and_a_new_game_starts_from_an_empty_stack(played):
    for first, emulator in zip(played.first, played.emulators, strict=True):
        np.testing.assert_array_equal(first, emulator.first)
        assert not first[:3].any() and first[3].any()
    for game in played.games:
        for t, (seen, true) in enumerate(game):
            np.testing.assert_array_equal(seen.frames, true.next_frames, err_msg=f"step {t}")


def test_rewards_are_signs_of_the_emulators(steps):
    assert any(true.reward for _, true in steps)
    assert [seen.reward for seen, _ in steps] == [np.sign(true.reward) for _, true in steps]


def test_done_at_every_lost_life_and_at_the_end_of_a_game(steps):
    assert [seen.done for seen, _ in steps] == [true.life_lost or true.over for _, true in steps]


def test_lives_are_the_emulators(steps):
    assert [seen.info["lives"] for seen, _ in steps] == [true.lives for _, true in steps]


def test_only_the_frame_limit_truncates(steps):
    assert [seen.info["TimeLimit.truncated"] for seen, _ in steps] == [true.truncated for _, true in steps]


def test_terminal_observation_after_a_lost_life_is_where_the_game_goes_on(steps):
    for seen, true in steps:
        if true.life_lost and not true.over:
            np.testing.assert_array_equal(seen.info["terminal_observation"], seen.frames)


def test_terminal_observation_of_a_game_is_its_own_last_stack(steps):
    for seen, true in steps:
        if true.over:
            *older, newest = seen.info["terminal_observation"]
            np.testing.assert_array_equal(older, true.frames[:3])
            # The step that ends a game stops short, and the frames pooled before stand in for those it lacks.
            pools = chain(combinations(true.last_screens, 2), combinations(true.last_screens, 3))
            assert any((newest == shrink(np.max(screens, 0))).all() for screens in pools)
            assert not (seen.info["terminal_observation"] == seen.frames).all()


def test_terminal_observation_comes_with_done_only(steps):
    assert [("terminal_observation" in seen.info) for seen, _ in steps] == [seen.done for seen, _ in steps]


def test_a_whole_game_reports_its_true_score_and_length_at_its_end_only(played):
    for game in played.games:
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


# --- Lives and whole games --------------------------------------------------------------------------------------------


@in_process
def test_a_caller_that_never_acts_loses_all_lives_of_breakout(vec_env):
    env = make_env(BREAKOUT, 1, 1, vec_env)
    env.reset()
    lives = []
    while len(lives) < 5:
        _, _, (done,), (info,) = env.step(np.array([NOOP]))
        if done:
            lives.append(info["lives"])
            assert ("episode" in info) == (len(lives) == 5)
    assert lives == [4, 3, 2, 1, 0]
    assert info["episode"]["l"] < 300


@in_process
def test_a_game_without_fire_is_left_to_its_caller(vec_env):
    env = make_env("FreewayNoFrameskip-v4", 2, 1, vec_env)
    assert "FIRE" not in env.env_method("get_action_meanings")[0]
    env.reset()
    assert not any("action" in info for _ in range(5) for info in env.step(np.array([1, 2]))[3])


@in_process
def test_reset_gives_up_the_games_that_are_being_played(vec_env):
    env = make_env(SHORT_INVADERS, 2, 1, vec_env, noop_max=0)
    first = env.reset().copy()
    assert sum(env.step(np.array([4, 4]))[1] for _ in range(100)).all()  # both have scored
    np.testing.assert_array_equal(env.reset(), first)
    emulators, scores = [Emulator(SHORT_INVADERS), Emulator(SHORT_INVADERS)], np.zeros(2)
    for _ in range(150):
        _, _, _, infos = env.step(np.array([4, 4]))
        actions = [info.get("action", 4) for info in infos]
        scores += [emulator.step(action).reward for emulator, action in zip(emulators, actions, strict=True)]
    assert [(info["episode"]["r"], info["episode"]["l"]) for info in infos] == [(score, 150) for score in scores]


@in_process
def test_a_game_over_at_the_frame_limit_is_not_a_truncation(vec_env):
    emulator = Emulator(BREAKOUT)
    actions, true = [emulator.fire], emulator.step(emulator.fire)
    while not true.over:
        actions.append(emulator.fire if true.life_lost else NOOP)
        true = emulator.step(actions[-1])
    limit = f"Limit{true.frame}Breakout-v0"
    if limit not in gym.registry:
        register(limit, BREAKOUT, max_num_frames_per_episode=true.frame)
    env = make_env(limit, 1, 1, vec_env, noop_max=0)
    env.reset()
    for action in actions:
        _, _, (done,), (info,) = env.step(np.array([action]))
    assert done and "episode" in info and not info["TimeLimit.truncated"]


# --- Seeds and starts -------------------------------------------------------------------------------------------------


def starts(frames: np.ndarray) -> int:
    return len({game.tobytes() for game in frames})


@in_process
def test_no_op_starts_differ_between_games_and_resets(vec_env):
    env = make_env("MsPacmanNoFrameskip-v4", 8, 1, vec_env)
    first = env.reset().copy()
    second = env.reset()
    assert starts(first) > 3 and starts(second) > 3
    assert not (first == second).all()


@in_process
def test_every_game_has_a_no_op_start_of_its_own(vec_env):
    env = make_env(SHORT_PACMAN, 1, 1, vec_env)
    env.reset()
    played = [env.step(np.array([NOOP])) for _ in range(100)]
    assert starts(np.stack([frames for frames, _, _, (info,) in played if "episode" in info])) > 3


@in_process
def test_without_no_ops_all_games_start_alike(vec_env):
    assert starts(make_env("MsPacmanNoFrameskip-v4", 8, 1, vec_env, noop_max=0).reset()) == 1


@in_process
def test_a_seed_decides_on_the_start_and_on_sticky_actions(vec_env):
    def trajectory(env):
        frames = [env.reset().copy()]
        return np.stack(frames + [env.step(np.array([t % 9, t % 7]))[0] for t in range(20)])

    env = make_env("ALE/MsPacman-v5", 2, 5, vec_env)
    first, goes_on = trajectory(env), trajectory(env)
    again = trajectory(make_env("ALE/MsPacman-v5", 2, 5, vec_env))
    shifted = trajectory(make_env("ALE/MsPacman-v5", 2, 6, vec_env))
    np.testing.assert_array_equal(first, again)
    assert not (first == goes_on).all()
    assert not (first == shifted).all()
    env.reset()
    assert list(env.seed(6)) == [6, 7]
    np.testing.assert_array_equal(trajectory(env), shifted)


@in_process
def test_any_seed_that_stable_baselines3_gives_is_good(vec_env):
    env = make_env(BREAKOUT, 2, 0, vec_env)
    for seed in (0, 2**31 - 1, 2**32 - 1, None):
        env.seed(seed)
        env.reset()


# --- Which ids, and what they stand for -------------------------------------------------------------------------------


@in_process
@pytest.mark.parametrize("env_id, sticky", [("ALE/Breakout-v5", True), (BREAKOUT, False)])
def test_actions_are_sticky_where_the_id_says_so(vec_env, env_id, sticky):
    env = make_env(env_id, 2, 1, vec_env, noop_max=0)
    frames = [env.reset()] + [env.step(np.full(2, 2 + t // 5 % 2))[0] for t in range(30)]
    assert any((left != right).any() for left, right in frames) == sticky


@in_process
@pytest.mark.parametrize("env_id", [SHORT_BREAKOUT, SHORT_STICKY_BREAKOUT])
def test_a_step_is_four_frames_whether_the_id_skips_frames_itself_or_leaves_it_to_the_preprocessing(vec_env, env_id):
    env = make_env(env_id, 1, 1, vec_env, noop_max=0)
    env.reset()
    cut = [env.step(np.array([NOOP]))[3][0]["TimeLimit.truncated"] for _ in range(100)]
    assert cut.index(True) == 99


def test_an_id_with_a_random_frame_skip_plays_from_two_to_four_frames_a_step():
    env = make_env("Breakout-v4", 1, 1)
    env.reset()
    frames = [env.step(np.array([NOOP]))[3][0]["episode_frame_number"] for _ in range(40)]
    assert {after - before for before, after in pairwise(frames)} == {2, 3, 4}


@pytest.mark.parametrize("env_id", sorted(name for name in gym.registry if name.startswith("ALE/"))[::8])
def test_any_atari_game_can_be_played(env_id):
    env = make_env(env_id, 1, 1)
    assert env.reset().shape == (1, 4, 84, 84)
    assert env.action_space.n == len(Emulator(env_id).actions)
    for action in range(env.action_space.n):
        env.step(np.array([action]))
    env.close()


@in_process
def test_a_game_whose_actions_lack_noop_can_be_played(vec_env):
    env = make_env("ALE/Backgammon-v5", 1, 1, vec_env)
    assert "NOOP" not in env.env_method("get_action_meanings")[0]
    env.reset()
    env.step(np.array([1]))


def test_the_action_set_is_the_ids():
    assert make_env(SKIP_3_ALL_ACTIONS, 1, 1).action_space.n == 18
    assert make_env("PongNoFrameskip-v4", 1, 1).action_space.n == 6


@pytest.mark.parametrize(
    "env_id, hint",
    [
        ("BreakoutNoFrameskp-v4", BREAKOUT),
        ("Breakout-v5", "ALE/Breakout-v5"),
        ("breakout", "Breakout-v4"),
        ("CartPole-v1", BREAKOUT),
        ("", BREAKOUT),
    ],
)
def test_any_other_id_is_the_users_error_with_the_nearest_ids_named(env_id, hint):
    for refuse in (atari_spec, lambda name: make_env(name, 1, 1)):
        with pytest.raises(UserError) as error:
            refuse(env_id)
        message = str(error.value)
        assert env_id in message and hint in message and "\n" not in message


# --- Stable-Baselines3 ------------------------------------------------------------------------------------------------


@in_process
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


@in_process
def test_attributes_and_methods_are_reached_as_documented(vec_env):
    env = make_env(BREAKOUT, 3, 1, vec_env)
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
        env.get_attr("no_such_thing")
    with pytest.raises(AttributeError):
        env.env_method("no_such_thing")


@in_process
def test_seeds_and_options_are_for_the_next_reset(vec_env):
    env = make_env(BREAKOUT, 3, 1, vec_env)
    env.set_options({"option": 1})
    assert list(env.seed(7)) == [7, 8, 9]
    assert env.unwrapped._seeds == [7, 8, 9] and env.unwrapped._options == [{"option": 1}] * 3
    env.reset()
    assert env.unwrapped._seeds == [None] * 3 and env.unwrapped._options == [{}] * 3


@pytest.mark.parametrize("action", [-1, 4])
def test_an_action_out_of_range_is_refused_rather_than_waited_for(action):
    env = make_env(BREAKOUT, 1, 1, "native")
    env.reset()
    env.step(np.array([NOOP]))  # FIRE, whatever is asked for
    with pytest.raises(ValueError):
        env.step_async(np.array([action]))


@in_process
def test_close_can_be_called_twice(vec_env):
    env = make_env(BREAKOUT, 2, 1, vec_env)
    env.reset()
    env.close()
    env.close()


@pytest.fixture
def one_thread():
    """Torch on one thread: waiting for a second costs a small network more than it gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@in_process
@pytest.mark.parametrize(
    "algorithm, options",
    [(PPO, {"n_steps": 70, "batch_size": 70, "n_epochs": 1}), (DQN, {"buffer_size": 400, "train_freq": 10})],
)
def test_algorithms_train_on_it_and_log_whole_games(vec_env, algorithm, options, one_thread):
    env = make_env(SHORT_BREAKOUT, 2, 1, vec_env, noop_max=0)
    model = algorithm("MlpPolicy", env, policy_kwargs={"net_arch": [8]}, device="cpu", seed=3, **options)
    model.learn(420)
    assert [game["l"] for game in model.ep_info_buffer] == [100] * 4


def test_cnn_policy_takes_the_frames(one_thread):
    model = PPO("CnnPolicy", make_env(BREAKOUT, 2, 1), n_steps=4, batch_size=8, n_epochs=1, device="cpu")
    model.learn(8)
    assert model.predict(model.env.reset())[0].shape == (2,)


@in_process
def test_evaluate_policy_returns_true_scores_of_whole_games(vec_env, recwarn):
    class Random:
        rng = np.random.default_rng(2)

        def predict(self, frames, **_):
            return self.rng.integers(6, size=len(frames)), None

    emulator, rewards, ends = Emulator("QbertNoFrameskip-v4"), [], []

    def replay(local, _):
        true = emulator.step(local["info"].get("action", local["actions"][0]))
        rewards.append(true.reward)
        ends.append(true.over)

    env = make_env("QbertNoFrameskip-v4", 1, 1, vec_env, noop_max=0)
    scores, lengths = evaluate_policy(Random(), env, n_eval_episodes=1, callback=replay, return_episode_rewards=True)
    assert (scores, lengths) == ([sum(rewards)], [len(rewards)])
    assert ends.index(True) == len(ends) - 1
    assert not any("Monitor" in str(warning.message) for warning in recwarn)


@in_process
def test_vec_monitor_wraps_it(vec_env, tmp_path):
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        env = VecMonitor(make_env(SHORT_PACMAN, 2, 1, vec_env, noop_max=0), str(tmp_path / "log"))
    env.reset()
    for _ in range(10):
        _, _, dones, infos = env.step(np.array([NOOP, NOOP]))
    env.close()
    assert dones.all() and [info["episode"]["l"] for info in infos] == [10, 10]
    assert len((tmp_path / "log.monitor.csv").read_text().splitlines()) == 4


def test_subproc_workers_are_processes_that_outlive_ctrl_c_and_end_with_close():
    env = make_env(BREAKOUT, 2, 1, "subproc")
    workers = env.unwrapped.processes
    env.reset()
    assert len({os.getpid(), *(worker.pid for worker in workers)}) == 3
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    for _ in range(3):
        env.step(np.array([NOOP, NOOP]))
    assert all(worker.is_alive() for worker in workers)
    assert env.env_is_wrapped(Monitor) == [True, True] and list(env.seed(3)) == [3, 4]
    assert env.env_method("get_action_meanings", indices=1) == [["NOOP", "FIRE", "RIGHT", "LEFT"]]
    env.close()
    assert not any(worker.is_alive() for worker in workers)
