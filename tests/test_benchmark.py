"""The benchmark measures what it says it measures."""

import benchmark
import pytest

SMALL = {"num_envs": 4, "num_steps": 4, "num_minibatches": 2, "num_threads": 1}


def test_the_shares_of_a_trainers_time_make_a_whole():
    result = benchmark.in_process(benchmark.trainer, SMALL, 64)
    shares = result["shares"]
    assert set(shares) == {"environments", "acting", "targets", "learning", "everything else"}
    assert all(0 < share < 1 for share in shares.values()) and sum(shares.values()) == pytest.approx(1)
    assert shares["learning"] > shares["acting"]  # epochs forth and back against one forth
    assert 10 < result["steps_per_second"] < 100_000 and 100 < result["memory"] < 1500


def test_all_kinds_of_environments_play_the_steps_they_are_given():
    for vec_env in ("native", "sb3"):
        assert 10 < benchmark.environments(vec_env, 2, 8, 1) < 100_000
    assert 10 < benchmark.emulate(2, 20, 0) < 100_000
