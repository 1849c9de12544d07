"""The benchmark measures what it says it measures."""

from unittest.mock import Mock

import benchmark
import numpy as np
import plot_runs
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_runs import CUT_BREAKOUT

SMALL = {"num_envs": 4, "num_steps": 4, "num_minibatches": 2, "num_threads": 1}


def test_the_shares_of_a_trainers_time_make_a_whole():
    result = benchmark.in_process(benchmark.trainer, SMALL, 64)
    shares = result["shares"]
    assert set(shares) == {"environments", "acting", "targets", "learning", "everything else"}
    assert all(0 < share < 1 for share in shares.values()) and sum(shares.values()) == pytest.approx(1)
    assert shares["learning"] > shares["acting"]  # epochs forth and back against one forth
    assert 10 < result["steps_per_second"] < 100_000 and 100 < result["memory"] < 1500


def test_a_race_leaves_scores_and_goes_on_with_the_contender_that_is_missing(monkeypatch, tmp_path):
    train, timed = Mock(), lambda *_: {"steps_per_second": 6}
    contenders = {"pqn": (timed, benchmark.race_pqn, SMALL)}
    contenders["ppo"] = timed, benchmark.race_peer, "PPO on our environments"
    monkeypatch.setattr(benchmark, "ENV_ID", CUT_BREAKOUT)
    monkeypatch.setattr(benchmark, "CONTENDERS", contenders)
    monkeypatch.setattr(benchmark, "in_process", lambda function, *args: function(*args))
    benchmark.race(1, tmp_path, 64)
    for name in contenders:
        assert EventAccumulator(str(tmp_path / name)).Reload().Scalars("charts/episodic_return")
        contenders[name] = timed, train, name
    (tmp_path / "ppo" / "race.json").unlink()
    benchmark.race(1, tmp_path, 64)
    train.assert_called_once_with("ppo", 360, 1, tmp_path / "ppo")


def test_all_kinds_of_environments_play_the_steps_they_are_given():
    for vec_env in ("native", "sb3"):
        assert 10 < benchmark.environments(vec_env, 2, 8, 1) < 100_000


def test_a_row_of_the_table_tells_what_was_reached_when():
    games = np.arange(1, 201)  # four a minute; a score counts from the hundredth on
    row = plot_runs.table_row("PQN", [(600 * games, games / 4, 2.0 * games)] * 2)
    assert row == "| PQN | 40 | 120 | 240 | - | 25 | 25 | 38 |"
