"""The benchmark measures what it says it measures."""

import time

import benchmark
import pytest


def test_the_shares_of_a_trainers_time_make_a_whole():
    settings = {"num_envs": 4, "num_steps": 4, "num_minibatches": 2, "num_threads": 1}
    result = benchmark.in_process(benchmark.trainer, settings, 64)
    assert set(result["shares"]) == {*benchmark.PARTS, "everything else"}
    assert all(0 < share < 1 for share in result["shares"].values())
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert result["shares"]["learning"] > result["shares"]["acting"]  # epochs forth and back against one forth
    assert 10 < result["steps_per_second"] < 100_000 and 100 < result["memory"] < 1500


def test_the_stopwatch_sums_up_blocks_and_calls(monkeypatch):
    monkeypatch.setattr(benchmark.Stopwatch, "seconds", benchmark.Counter())
    timed = benchmark.Stopwatch("call")(lambda seconds: time.sleep(seconds) or "result")
    for _ in range(2):
        with benchmark.Stopwatch("block"):
            time.sleep(0.02)
        assert timed(0.03) == "result"
    assert benchmark.Stopwatch.seconds["block"] == pytest.approx(0.04, abs=0.02)
    assert benchmark.Stopwatch.seconds["call"] == pytest.approx(0.06, abs=0.02)


def test_all_kinds_of_environments_play_the_steps_they_are_given():
    for vec_env in ("native", "dummy"):
        assert 10 < benchmark.environments(vec_env, 2, 8, 1) < 100_000
    assert 10 < benchmark.emulate(2, 20, 0) < 100_000
