"""Runs: what they leave and show, going on with them, what somebody made of their files, what can
go wrong on the way."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import timeit
from dataclasses import asdict, replace
from itertools import chain, cycle, repeat
from pathlib import Path
from unittest.mock import Mock

import gymnasium as gym
import joblib
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_agent import Table
from test_files import same

import pqn_breakout
from pqn_breakout import Args, BestModel, Checkpoint, QNetwork, UserError, load, save, train

PROGRAM = Path(pqn_breakout.__file__)
BREAKOUT = gym.registry["BreakoutNoFrameskip-v4"]
CUT_BREAKOUT = "CutBreakout-v0"  # every game is cut off after 240 frames
CUT_STEPS = 240 // 4
gym.register(
    CUT_BREAKOUT,
    BREAKOUT.entry_point,
    kwargs={**BREAKOUT.kwargs, "max_num_frames_per_episode": 240},
)
TINY = {
    "num_envs": 2,
    "num_steps": 4,
    "num_minibatches": 1,
    "update_epochs": 2,
    "total_timesteps": 40,
    "exploration_fraction": 0.5,
    "num_threads": 1,
    "bf16": "off",
    "device": "cpu",
    "checkpoint_minutes": 1e9,
}
ROLLOUT = TINY["num_envs"] * TINY["num_steps"]
OFTEN = {"checkpoint_minutes": 1e-9}  # after every rollout
ENVIRON = os.environ | {"PYTHONPATH": str(PROGRAM.parent)}
ENVIRON.pop("PYDANTIC_ERRORS_INCLUDE_URL", None)  # which the program sets for itself

pytestmark = [
    pytest.mark.usefixtures("small_network"),
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
]


def flags(**settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def train_in(folder, **settings):
    """Trains in little time, as TINY and the settings say."""
    return train(Args(**TINY | {"log_dir": str(folder)} | settings))


def run_in(folder):
    (run_dir,) = Path(folder).iterdir()
    return run_dir


def checkpoint_of(run_dir):
    return load(run_dir / "checkpoint.pth", Checkpoint)


def best_of(run_dir):
    return load(run_dir / "best_model.pth", BestModel)


def told_args_of(run_dir):
    return json.loads((run_dir / "args.json").read_text())


def args_of(run_dir):
    """Its arguments, of which both of its files tell the same if its threads were given."""
    args = checkpoint_of(run_dir).args
    assert told_args_of(run_dir) == vars(args)
    return args


def events_of(run_dir):
    return EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()


def curve(run_dir, tag="losses/td_loss"):
    return [(event.step, event.value) for event in events_of(run_dir).Scalars(tag)]


def steps_of(run_dir):
    return [step for step, _ in curve(run_dir)]


def rollouts(end, size=ROLLOUT):
    """The steps at which the rollouts of a whole run end."""
    return list(range(size, end + 1, size))


FIVE_ROLLOUTS = rollouts(40)


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def is_line(told, *words):
    """Whether an error is told as the program does, with these words."""
    line = re.fullmatch(r"pqn_breakout\.py: error: .{1,350}", told)
    return bool(line) and all(word in told for word in words)


def end_with(scores):
    """A hook: with each step every game is over, with the next of these scores."""

    def end(_, infos):
        for info in infos:
            info["episode"] = {"r": float(next(scores)), "l": 1}

    return end


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that has reached its end; not to be changed."""
    return train_in(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "copy" / finished.name)


@pytest.fixture
def resume(cli):
    """Goes on with a run, which nothing stops; returns what is printed."""

    def go_on(run_dir, **settings):
        code, out, _ = cli("--resume", run_dir, **settings)
        assert code == 0
        return out

    return go_on


@pytest.fixture
def refused(cli, run_dir):
    """Tries to go on with the run, in vain, and leaves it as it is; returns what is told."""

    def try_to_go_on(*argv):
        before = snapshot(run_dir)
        code, out, told = cli("--resume", run_dir, *argv, total_timesteps=48)
        assert code != 0 and out == ""
        assert snapshot(run_dir) == before
        return told

    return try_to_go_on


# --- What a run leaves and shows ---
@pytest.fixture(scope="module")
def cut_run(tmp_path_factory):
    """A run of 80 steps in each of two games, which are cut off once."""
    folder = tmp_path_factory.mktemp("cut")
    return train_in(folder, env_id=CUT_BREAKOUT, total_timesteps=2 * 80)


def test_a_run_leaves_models_and_arguments(cut_run):
    assert re.fullmatch(r"CutBreakout-v0__pqn_breakout__1__\d+", cut_run.name)
    names = {path.name for path in cut_run.iterdir()}
    visible = {name for name in names if not name.startswith((".", "events."))}
    assert visible == {"best_model.pth", "checkpoint.pth", "args.json"}
    assert args_of(cut_run).env_id == CUT_BREAKOUT


def test_a_run_leaves_curves_of_every_rollout(cut_run):
    assert sorted(events_of(cut_run).Tags()["scalars"]) == [
        "charts/SPS",
        "charts/episodic_length",
        "charts/episodic_return",
        "charts/epsilon",
        "charts/learning_rate",
        "charts/sparse_reward_ratio",
        "losses/current_q",
        "losses/target_q",
        "losses/td_loss",
    ]
    assert steps_of(cut_run) == rollouts(160)


def test_tensorboard_shows_the_arguments_as_a_table(cut_run):
    (text,) = events_of(cut_run).Tensors("hyperparameters/text_summary")
    head, line, *rows = text.tensor_proto.string_val[0].decode().splitlines()

    assert (head, line) == ("|option|value|", "|-|-|")
    assert rows == [f"|{name}|{value}|" for name, value in vars(args_of(cut_run)).items()]


def test_the_sparse_reward_ratio_is_the_share_of_steps_without_a_reward(on_step, tmp_path):
    given = cycle([1, -1, 0, 0, 0])
    on_step(lambda rewards, _: rewards.put([0, 1], [next(given), next(given)]))
    run_dir = train_in(tmp_path)

    # A rollout has 8 rewards.
    ratios = [ratio for _, ratio in curve(run_dir, "charts/sparse_reward_ratio")]
    assert ratios[:2] == [0.5, 5 / 8]


def test_games_are_cut_off_when_breakout_goes_dead(monkeypatch, tmp_path):
    make_games = Mock(wraps=pqn_breakout.AtariVectorEnv)
    monkeypatch.setattr(pqn_breakout, "AtariVectorEnv", make_games)
    train_in(tmp_path)

    assert make_games.call_args.kwargs["max_num_frames_per_episode"] == 65_536


def test_of_fewer_than_100_games_the_last_network_is_the_best(monkeypatch, tmp_path):
    network = Table(4)
    monkeypatch.setattr(pqn_breakout, "QNetwork", lambda *_: network)
    run_dir = train_in(tmp_path)

    best = best_of(run_dir)
    assert (best.global_step, best.mean_return) == (40, -math.inf)
    assert same(best.network, network.state_dict())
    assert same(best.network, {"weight": checkpoint_of(run_dir).learned["weight"]})


@pytest.mark.parametrize("vec_env, unseen", [("native", 0), ("sb3", 30 / 4 + 3 * 3)])
def test_a_games_length_is_the_agents_steps_in_both_pipelines(tmp_path, vec_env, unseen):
    run_dir = train_in(tmp_path, env_id=CUT_BREAKOUT, total_timesteps=2 * 80, vec_env=vec_env)

    lengths = curve(run_dir, "charts/episodic_length")
    assert len(lengths) == 2
    for step, length in lengths:
        assert length == step / 2  # it is the first of two games that are played side by side
        # Among the 240 frames are those that SB3 plays unseen: no-ops, up to 30, as a game starts,
        # and three steps for each of up to three lives.
        assert CUT_STEPS - unseen <= length <= CUT_STEPS


def test_a_run_reports_every_10_seconds_and_saves_every_checkpoint_minutes(
    cli, monkeypatch, on_step, tmp_path
):
    def tick(*step):
        end_game(*step)
        clock[0] += 1.5
        saved.add(checkpoint_of(run_in(tmp_path)).global_step)

    seconds_a_rollout = 1.5 * TINY["num_steps"]
    end_game = end_with(repeat(7))
    clock = [0]  # seconds, which only the test moves
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    saved = set()
    on_step(tick)
    settings = TINY | {"total_timesteps": 80, "checkpoint_minutes": 0.25}
    code, out, told = cli(**settings, log_dir=tmp_path)
    start, *progress, end = out.splitlines()

    assert (code, told) == (0, "")
    assert "2 games of BreakoutNoFrameskip-v4" in start and str(run_in(tmp_path)) in start
    assert "step 80" in end and f"evaluate.py --model {run_in(tmp_path)}" in end
    # At once, and then when more than 10 seconds have passed: two rollouts of 6.
    for step, line in zip([8, 24, 40, 56, 72], progress, strict=True):
        minutes = (80 - step) / ROLLOUT * seconds_a_rollout / 60
        assert line == (
            f"step {step} of 80 ({step / 80:.0%}): score 7.0, "
            f"{ROLLOUT / seconds_a_rollout:.0f} steps/s, threads: 1, {minutes:.0f} minutes left"
        )
    assert saved == {0, 24, 48, 72}
    assert checkpoint_of(run_in(tmp_path)).global_step == 80


def test_a_run_reports_before_a_game_is_over(cli, tmp_path):
    _, out, _ = cli(**TINY, log_dir=tmp_path)
    assert "step 8 of 40 (20%): no game is over yet" in out.splitlines()[1]


def assert_is_newest_within_two_standard_errors(best, last, highest):
    """Of the models after each rollout; `last(step)` are the 100 scores until then, and `highest`
    is the step with their highest mean."""

    def is_within(step):
        return np.mean(last(step)) >= best.highest_mean - 2 * np.std(last(step)) / math.sqrt(100)

    assert best.highest_mean == np.mean(last(highest))
    assert best.mean_return == np.mean(last(best.global_step))
    assert is_within(best.global_step)
    assert not is_within(best.global_step + ROLLOUT)


def test_the_best_model_is_the_newest_within_two_standard_errors_of_the_highest_mean(
    on_step, tmp_path
):
    scores = [*range(200), *repeat(0, 200)]
    on_step(end_with(iter(scores)))
    run_dir = train_in(tmp_path, total_timesteps=400)

    def last(step):
        return scores[step - 100 : step]  # each step of a game gives a score

    best = best_of(run_dir)
    assert best.global_step == 208
    assert_is_newest_within_two_standard_errors(best, last, highest=200)
    assert checkpoint_of(run_dir).scores == last(400)
    assert not same(best.network, {"weight": checkpoint_of(run_dir).learned["weight"]})


def test_a_new_best_model_is_written_with_the_next_checkpoint(on_step, tmp_path):
    def look(*_):
        assert best_of(run_in(tmp_path)).global_step == 0

    on_step(look)
    run_dir = train_in(tmp_path)
    assert best_of(run_dir).global_step == checkpoint_of(run_dir).best.global_step == 40


def test_the_same_seed_gives_the_same_run_bit_for_bit(monkeypatch, tmp_path):
    monkeypatch.setattr(pqn_breakout, "QNetwork", QNetwork)
    settings = {"env_id": CUT_BREAKOUT, "num_steps": 16, "num_minibatches": 2, "start_e": 0.5}
    runs = [train_in(tmp_path, **settings, total_timesteps=128, seed=seed) for seed in (5, 5, 6)]

    a, b, c = map(checkpoint_of, runs)
    assert len(a.scores) == 2 and a.scores == b.scores
    assert same(a.learned, b.learned)
    assert curve(runs[0]) == curve(runs[1])
    assert not same(a.learned, c.learned)


@pytest.fixture
def faster(monkeypatch):
    """A list whose last element is the number of threads that is faster, of two cores."""
    faster = [1]

    def seconds(*_, **__):
        return 1 if torch.get_num_threads() == faster[-1] else 2

    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    monkeypatch.setattr(timeit, "timeit", seconds)
    return faster


@pytest.mark.parametrize("requested, fast, kept", [(0, 1, 1), (0, 2, 2), (2, 1, 2), (5, 1, 2)])
def test_the_number_of_threads_is_told_and_a_given_one_is_kept(
    cli, faster, on_step, tmp_path, requested, fast, kept
):
    def look(*_):
        assert torch.get_num_threads() == kept

    faster.append(fast)
    on_step(look)
    code, out, _ = cli(**TINY | {"num_threads": requested}, log_dir=tmp_path)

    assert code == 0
    assert out.count("--num-threads 5: lowered to the 2") == (requested == 5)
    assert f"float32, threads: {kept}" in out
    assert told_args_of(run_in(tmp_path))["num_threads"] == kept
    assert checkpoint_of(run_in(tmp_path)).args.num_threads == requested


@pytest.mark.parametrize("requested", [0, 2])
def test_threads_change_as_other_programs_come_and_go_unless_their_number_is_given(
    cli, faster, monkeypatch, on_step, tmp_path, requested
):
    def tick(*_):
        clock[0] += 4  # a rollout takes 16 seconds
        used.append(torch.get_num_threads())
        faster.append(2 if clock[0] < 40 else 1)

    clock = [0]
    used = []
    faster.append(2)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    on_step(tick)
    _, out, _ = cli(**TINY | {"num_threads": requested}, log_dir=tmp_path)

    # It notices at the end of the third rollout.
    assert used == [2] * 12 + ([2] * 8 if requested else [1] * 8)
    assert ("threads: 1" in out) == (not requested)
    assert told_args_of(run_in(tmp_path))["num_threads"] == 2


# --- Going on ---
def stop(*_):
    raise KeyboardInterrupt


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(on_step, cli, resume, tmp_path):
    on_step(stop, at=71)  # in the 18th rollout, and each of the two games is cut off after 60
    settings = TINY | {"env_id": CUT_BREAKOUT, "learning_rate": 1e-3, "exploration_fraction": 1.0}
    assert cli(**settings | {"total_timesteps": 320}, log_dir=tmp_path)[0] == 130
    run_dir = run_in(tmp_path)
    stopped = checkpoint_of(run_dir)
    assert (stopped.global_step, len(stopped.scores)) == (17 * ROLLOUT, 2)

    resume(run_dir)

    steps = rollouts(320)
    assert run_in(tmp_path) == run_dir and steps_of(run_dir) == steps
    rates = [1e-3 * (1 - (step - ROLLOUT) / 320) for step in steps]
    assert [rate for _, rate in curve(run_dir, "charts/learning_rate")] == pytest.approx(rates)
    epsilons = [1 - 0.99 * step / 320 for step in steps]
    assert [epsilon for _, epsilon in curve(run_dir, "charts/epsilon")] == pytest.approx(epsilons)
    finished = checkpoint_of(run_dir)
    assert finished.args == replace(stopped.args, resume=str(run_dir))
    assert len(finished.scores) == 4 and finished.scores[:2] == stopped.scores
    assert finished.updates == len(steps) * TINY["update_epochs"]


def test_a_resumed_run_first_plays_its_games_apart(monkeypatch, resume, tmp_path):
    def watched_play(network, envs, rollout, epsilons, *rest):
        done.append(epsilons)
        return play(network, envs, rollout, epsilons, *rest)

    def watched_learn(*args):
        done.append("learns")
        return learn(*args)

    run_dir = train_in(tmp_path, exploration_fraction=1.0)
    done = []
    play, learn = pqn_breakout.play, pqn_breakout.learn
    monkeypatch.setattr(pqn_breakout, "play", watched_play)
    monkeypatch.setattr(pqn_breakout, "learn", watched_learn)
    out = resume(run_dir, total_timesteps=48)

    epsilon = 1 - 0.99 * 40 / 48  # of the schedule
    assert done[:16] == [[pytest.approx(epsilon)] * TINY["num_steps"]] * 16
    assert done[17:] == ["learns"]
    told = [line for line in out.splitlines() if "apart, without learning" in line]
    assert len(told) > 1


def test_a_finished_run_that_is_resumed_changes_nothing(finished, run_dir, resume):
    assert "step 40" in resume(run_dir)

    before = checkpoint_of(finished)
    after = checkpoint_of(run_dir)
    assert same(asdict(after), asdict(before) | {"args": asdict(after.args)})
    assert steps_of(run_dir) == FIVE_ROLLOUTS


def test_what_a_killed_run_wrote_after_its_checkpoint_is_hidden(on_step, resume, tmp_path):
    def copy(*_):
        shutil.copy(run_in(tmp_path) / "checkpoint.pth", tmp_path)

    on_step(copy, at=10)
    run_dir = train_in(tmp_path, **OFTEN)
    shutil.copy(tmp_path / "checkpoint.pth", run_dir)
    assert checkpoint_of(run_dir).global_step == 2 * ROLLOUT
    time.sleep(1)  # event files are read by the second in their names

    resume(run_dir)
    assert steps_of(run_dir) == FIVE_ROLLOUTS


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_the_best_model_is_written_anew_from_the_checkpoint(finished, run_dir, resume, content):
    path = run_dir / "best_model.pth"
    path.unlink()
    if content:
        path.write_bytes(content)

    resume(run_dir)
    assert same(asdict(best_of(run_dir)), asdict(checkpoint_of(finished).best))


def test_a_resumed_run_keeps_its_arguments_but_for_those_given_anew(run_dir, resume, monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    own = checkpoint_of(run_dir).args
    given = {"total_timesteps": 56, "num_threads": 2, "bf16": "on", "learning_rate": 0.1}
    given |= {"checkpoint_minutes": 7.0, "log_dir": "nowhere"}
    resume(run_dir, **given)

    assert args_of(run_dir) == replace(own, **given, resume=str(run_dir))
    assert steps_of(run_dir) == rollouts(56)


@pytest.mark.parametrize(
    "wrong, names",
    [
        ("--gamma 2", "gamma"),
        ("--env-id PongNoFrameskip-v4", "another game, BreakoutNoFrameskip-v4"),
        (f"--env-id {CUT_BREAKOUT}", "another game, BreakoutNoFrameskip-v4"),
    ],
)
def test_a_resumed_run_is_of_one_game_and_its_arguments_are_checked(refused, wrong, names):
    assert names in refused(*wrong.split())


def test_a_resumed_run_writes_no_file_in_place(run_dir, resume):
    os.link(run_dir / "args.json", run_dir / "another.json")  # could be of another owner
    before = (run_dir / "another.json").read_bytes()

    resume(run_dir, total_timesteps=48)
    assert (run_dir / "args.json").read_bytes() != before
    assert (run_dir / "another.json").read_bytes() == before


@pytest.fixture(params=["flock", "no flock"])
def file_system(request, monkeypatch):
    """One that has locks, and one that has none, as some network drives."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if request.param == "no flock":
        monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)


def test_a_folder_in_use_is_refused(file_system, on_step, tmp_path):
    def start_another(*_):
        run_dir = run_in(tmp_path)
        time.sleep(1)  # TensorBoard's thread writes its first event
        # Only to be read under the lock.
        (run_dir / "checkpoint.pth").write_bytes(b"half of another's")
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match=f"{run_dir.name}: another process"):
            train_in(tmp_path, resume=str(run_dir))
        assert snapshot(tmp_path) == before

    on_step(start_another, at=6)
    run_dir = train_in(tmp_path)

    assert steps_of(run_dir) == FIVE_ROLLOUTS
    train_in(tmp_path, resume=str(run_dir))  # it is free again


def test_runs_that_start_in_the_same_instant_do_not_share_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    run_dir = train_in(tmp_path)
    before = snapshot(tmp_path)

    with pytest.raises(OSError, match=run_dir.name):
        train_in(tmp_path)
    assert snapshot(tmp_path) == before


HOLD = """
import os, sys
from filelock import SoftFileLock
lock = SoftFileLock(sys.argv[1]).acquire()
os._exit(9)
"""


@pytest.mark.parametrize("file_system", ["no flock"], indirect=True)
def test_without_locks_the_mark_of_a_killed_process_does_not_matter(file_system, run_dir, resume):
    subprocess.run([sys.executable, "-c", HOLD, run_dir / ".lock_file"])
    assert (run_dir / ".lock_file").exists()

    resume(run_dir)
    assert not (run_dir / ".lock_file").exists()


def test_a_worse_mean_of_100_games_replaces_no_best_model(on_step, resume, tmp_path):
    on_step(end_with(repeat(300)))
    run_dir = train_in(tmp_path)  # 40 games, too few for a best
    # Those that are played apart count for nothing.
    on_step(end_with(chain(repeat(0, 16 * ROLLOUT), repeat(6))))
    resume(run_dir, total_timesteps=160)

    def last(step):
        old = 140 - step
        return old * [300] + (100 - old) * [6]

    best = best_of(run_dir)
    assert best.global_step == 112
    # After step 104 there are 100 games for the first time.
    assert_is_newest_within_two_standard_errors(best, last, highest=104)

    resume(run_dir, total_timesteps=200)
    assert same(asdict(best_of(run_dir)), asdict(best))


# --- What somebody made of a run's files ---
MISSING = object()
WEIGHT = torch.ones(4, 3)  # as those of Table
RESHAPED = WEIGHT.T.contiguous()
WITH_NAN = WEIGHT.index_fill(0, torch.tensor([1]), math.nan)
EMPTY = WEIGHT[:0]
KINDS = [WEIGHT.half(), WEIGHT.double(), WEIGHT.to_sparse(), WEIGHT.to("meta"), ["0.5"] * 12]
# Where in a checkpoint, and what may stand there.
CRAFTED = {
    "args": [MISSING, []],
    "args/seed": [2.5, -1],
    "args/num_envs": [10**7, 0],
    "args/gamma": [2.0, "0.9"],
    "args/compile": [1],
    "args/learning_rate": [math.nan],
    "args/env_id": [7, "Nonsense-v0", "PongNoFrameskip-v4"],
    "args/weight_decay": [1e9],
    "global_step": [MISSING, -100, 10**18, 8.0],
    "updates": [-5, "8"],
    "scores": [["seven"], [math.nan], [math.inf], [-math.inf], [1.0] * 101],
    "surplus": [1],
    "learned": [MISSING],
    "learned/weight": [MISSING, RESHAPED, WITH_NAN, EMPTY, *KINDS],
    "learned/weight.exp_avg": [MISSING, EMPTY],
    "learned/weight.exp_avg_sq": [WITH_NAN],
    "learned/renamed": [WEIGHT],
    "best": [MISSING],
    "best/env_id": ["PongNoFrameskip-v4"],
    "best/mean_return": [math.inf],
    "best/highest_mean": [math.nan],
    "best/network/weight": [RESHAPED, WITH_NAN],
    "best/network/renamed": [WEIGHT],
}


def craft(content, where, value):
    *parents, key = where.split("/")
    for parent in parents:
        content = content[parent]
    if value is MISSING:
        del content[key]
    else:
        content[key] = value


@pytest.mark.parametrize(
    "where, value", [(where, value) for where, values in CRAFTED.items() for value in values]
)
def test_a_checkpoint_that_somebody_made_is_refused_in_one_line(run_dir, refused, where, value):
    content = asdict(checkpoint_of(run_dir))
    craft(content, where, value)
    save(run_dir / "checkpoint.pth", content)

    assert is_line(refused(), "checkpoint.pth")


def test_a_damaged_checkpoint_is_not_resumed_over(run_dir, refused):
    (run_dir / "checkpoint.pth").write_bytes(b"damaged")

    assert is_line(refused(), "checkpoint.pth: damaged")


def test_tensors_are_copied_into_memory_of_the_program(run_dir, resume):
    content = asdict(checkpoint_of(run_dir))
    for name, tensor in content["learned"].items():
        content["learned"][name] = torch.tensor(0.5).expand(tensor.shape)  # of one place in memory
    save(run_dir / "checkpoint.pth", content)

    resume(run_dir, total_timesteps=48)
    learned = checkpoint_of(run_dir).learned
    assert all(tensor.is_contiguous() for tensor in learned.values())
    assert not same(learned["weight"], torch.full((4, 3), 0.5))


# --- What goes wrong on the way ---
def test_an_error_of_pytorch_ends_a_run_in_one_line_and_saves_the_last_whole_rollout(
    on_step, cli, tmp_path
):
    def fail(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nframe #0: in C++\n")

    on_step(fail, at=14)
    _, _, told = cli(**TINY, log_dir=tmp_path)

    assert is_line(told, "out of memory", "--num-envs", "--num-steps")
    assert checkpoint_of(run_in(tmp_path)).global_step == 3 * ROLLOUT


def test_a_gradient_that_is_not_finite_stops_training_and_keeps_the_last_checkpoint(
    on_step, cli, resume, tmp_path
):
    def explode(rewards, _):
        rewards.fill(np.inf)

    on_step(stop, at=14)  # in the fourth rollout
    cli(**TINY, log_dir=tmp_path / "good")
    on_step(explode, at=14)
    _, _, told = cli(**TINY, log_dir=tmp_path / "bad")
    run_dir = run_in(tmp_path / "bad")
    assert is_line(told, f"step {4 * ROLLOUT}: not finite")
    assert same(checkpoint_of(run_dir).learned, checkpoint_of(run_in(tmp_path / "good")).learned)

    resume(run_dir)
    assert steps_of(run_dir) == FIVE_ROLLOUTS


@pytest.fixture
def full_disk():
    """`full_disk(size)`: no file grows above it, of which the kernel tells as of a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(size=soft):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield fill
    fill()


def test_a_full_disk_ends_a_run_before_it_starts_in_one_line(full_disk, cli, refused, tmp_path):
    full_disk(0)
    _, _, new = cli(**TINY, log_dir=tmp_path / "logs")
    resumed = refused()
    full_disk()  # before pytest itself writes a word

    assert is_line(new, "best_model.pth", "too large")
    assert is_line(resumed, "best_model.pth", "too large")


def test_a_disk_that_fills_in_the_middle_of_a_checkpoint_leaves_the_old_one(
    full_disk, on_step, cli, run_dir
):
    before = snapshot(run_dir)
    *others, size = sorted(map(len, before.values()))
    assert max(others) < size - 200
    full_disk(size - 100)
    _, _, told = cli("--resume", run_dir, total_timesteps=48)
    full_disk()

    assert is_line(told, "checkpoint.pth", "too large")
    assert not list(run_dir.glob("*.new"))
    assert (run_dir / "checkpoint.pth").read_bytes() == before[run_dir / "checkpoint.pth"]


def test_a_disk_that_fills_under_the_curves_ends_a_run_and_with_room_it_goes_on(
    full_disk, on_step, cli, resume, tmp_path
):
    def fill(*_):
        full_disk(0)

    on_step(fill, at=10)
    _, _, told = cli(**TINY | OFTEN, log_dir=tmp_path)
    full_disk()
    run_dir = run_in(tmp_path)
    assert is_line(told, str(run_dir), "too large")
    assert not list(run_dir.glob("*.new"))
    assert checkpoint_of(run_dir).global_step == 2 * ROLLOUT

    resume(run_dir)
    assert steps_of(run_dir) == FIVE_ROLLOUTS


def test_a_folder_that_is_moved_away_ends_a_run_in_one_line(on_step, cli, tmp_path):
    def move(*_):
        run_in(tmp_path / "logs").rename(tmp_path / "moved")

    on_step(move, at=10)
    _, _, told = cli(**TINY | OFTEN, log_dir=tmp_path / "logs")

    assert is_line(told, str(tmp_path / "logs"))
    assert checkpoint_of(tmp_path / "moved").global_step == 2 * ROLLOUT
