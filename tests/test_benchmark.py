"""The benchmark measures what it says it measures, and the pictures show what was measured."""

import shutil
import time
from unittest.mock import Mock

import benchmark
import numpy as np
import plot_runs
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runs import CUT_BREAKOUT
from torch.utils.tensorboard import SummaryWriter

import pqn_breakout

SMALL = {"num_envs": 4, "num_steps": 4, "num_minibatches": 2, "num_threads": 1}
ROLLOUT = 4 * 4


def scores_in(folder) -> list[float]:
    events = EventAccumulator(str(folder)).Reload()
    return [event.value for event in events.Scalars("charts/episodic_return")]


# --- Speed ---


@pytest.fixture(scope="module")
def measured() -> dict:
    return benchmark.in_process(benchmark.trainer, SMALL, 64)


def test_the_shares_of_a_trainers_time_make_a_whole(measured):
    shares = measured["shares"]

    parts = {"environments", "acting", "targets", "learning", "everything else"}
    assert set(shares) == parts
    assert all(0 < share < 1 for share in shares.values())
    assert sum(shares.values()) == pytest.approx(1)


def test_learning_takes_longer_than_acting(measured):
    shares = measured["shares"]

    assert shares["learning"] > shares["acting"]  # epochs forth and back against one forth


def test_speed_and_memory_are_those_of_a_trainer(measured):
    assert 10 < measured["steps_per_second"] < 100_000
    assert 100 < measured["memory"] < 1500


@pytest.mark.parametrize("vec_env", ["native", "sb3"])
def test_all_kinds_of_environments_play_the_steps_they_are_given(vec_env):
    assert 10 < benchmark.environments(vec_env, 2, 8, 1) < 100_000


# --- The race ---


@pytest.fixture
def contenders(monkeypatch) -> dict:
    """Two, that are said to make 360 steps in a minute."""

    def timed(settings, steps):
        return {"steps_per_second": 6}

    def in_this_process(function, *args):
        return function(*args)

    contenders = {
        "pqn": (timed, benchmark.race_pqn, SMALL),
        "ppo": (timed, benchmark.race_peer, "PPO on our environments"),
    }
    monkeypatch.setattr(benchmark, "ENV_ID", CUT_BREAKOUT)
    monkeypatch.setattr(benchmark, "CONTENDERS", contenders)
    monkeypatch.setattr(benchmark, "in_process", in_this_process)
    return contenders


def test_a_race_leaves_scores_of_every_contender(contenders, tmp_path):
    benchmark.race(1, tmp_path, 64)

    assert all(scores_in(tmp_path / name) for name in contenders)


def test_a_race_goes_on_with_the_contender_that_is_missing(contenders, tmp_path):
    train = Mock()
    for name, (timed, _, _) in contenders.items():
        contenders[name] = (timed, train, name)
    (tmp_path / "pqn").mkdir()
    (tmp_path / "pqn" / "race.json").touch()

    benchmark.race(1, tmp_path, 64)

    train.assert_called_once_with("ppo", 360, 1, tmp_path / "ppo")


# --- The games ---


def train_games(folder, steps: int) -> list:
    games = (CUT_BREAKOUT, "Pong")
    return [benchmark.train_game(game, steps, folder, SMALL) for game in games]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of two games; not to be changed."""
    folder = tmp_path_factory.mktemp("games")
    train_games(folder, 16 * ROLLOUT)
    return folder


@pytest.fixture
def games_dir(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "games")


def test_only_the_game_that_is_missing_is_trained(games_dir, monkeypatch):
    shutil.rmtree(games_dir / "Pong")
    train = Mock()
    monkeypatch.setattr(pqn_breakout, "train", train)

    train_games(games_dir, 16 * ROLLOUT)

    ((args,),) = [call.args for call in train.call_args_list]
    assert (args.env_id, args.resume) == ("PongNoFrameskip-v4", None)


def test_a_game_that_was_stopped_goes_on_in_its_folder(games_dir):
    before = sorted(games_dir.glob("*/*"))

    after = train_games(games_dir, 20 * ROLLOUT)

    assert sorted(after) == before
    assert [benchmark.steps_made(run_dir) for run_dir in after] == [20 * ROLLOUT] * 2


def test_the_result_of_a_game_is_that_of_its_events(trained):
    (run_dir,) = (trained / CUT_BREAKOUT).iterdir()

    result = benchmark.result_of(run_dir)

    assert result["score"] == pytest.approx(np.mean(scores_in(run_dir)))
    assert result["steps"] == 16 * ROLLOUT
    assert 0 < result["minutes"] < 5


def test_the_table_of_the_games_has_a_row_for_each():
    results = {"Qbert": {"score": 12345.67, "steps": 1_999_872, "minutes": 41.6}}

    table = benchmark.games_table(results)

    assert table.splitlines()[2:] == ["| Qbert | 12,345.7 | 1,999,872 | 42 |"]


# --- The pictures ---


def test_a_row_of_the_table_tells_what_was_reached_when():
    games = np.arange(1, 201)
    games_a_minute = 4
    curve = (600 * games, games / games_a_minute, 2.0 * games)

    row = plot_runs.table_row("PQN", [curve, curve])

    # A score counts from the hundredth game on, which ends after 25 minutes.
    assert row == "| PQN | 40 | 120 | 240 | - | 25 | 25 | 38 |"


def test_minutes_are_those_of_training_however_long_a_game_lasts(tmp_path):
    now = time.time()
    with SummaryWriter(tmp_path) as writer:
        for minute in range(1, 13):
            # A day lies between the sixth minute and the rest.
            then = now + 60 * minute + (86400 if minute > 6 else 0)
            writer.add_scalar("charts/SPS", 10, 600 * minute, then)
        writer.add_scalar("charts/episodic_return", 5, 7200, then)

    _, minutes, _ = plot_runs.score_curve(tmp_path)

    assert minutes == pytest.approx([11], abs=0.1)  # the minute of the resumption is not known


def test_labels_that_would_cover_each_other_are_moved_apart():
    wanted = [50.0, 0.0, 51.0, 52.0]

    centres = plot_runs.spread(wanted, [10.0] * 4)

    # About their mean, 51, as far apart as they are high.
    assert centres == pytest.approx([41, 0, 51, 61], abs=0.1)
