"""evaluate.py: whole games with true scores, whatever else runs beside them, and clear mistakes."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path
from signal import SIG_IGN, SIGHUP, SIGINT, SIGTERM, getsignal, raise_signal, signal
from statistics import mean, median, pstdev

import ale_py
import imageio_ffmpeg
import numpy as np
import pygame
import pytest
import torch
from ale_py.env import AtariEnv
from test_envs import BREAKOUT, Emulator, short, shrink

import evaluate
import pqn_breakout
from evaluate import Game, Moment, Panel, Video, Window, play
from pqn_breakout import QNetwork, make_env, run_command, save

FRAMES = 34  # of a brief game: 8 steps and a half
BRIEF = short(BREAKOUT, FRAMES)
BRIEF_BOXING = short("Boxing-v4", 100)  # skips a random number of frames


class SmallNetwork(torch.nn.Linear):
    """Where games and pictures are tested and not learning, it is as good, and quick."""

    def __init__(self, actions):
        super().__init__(21 * 21, actions)

    def forward(self, frames):
        return super().forward(frames[:, -1, ::4, ::4].flatten(1) / 255)


torch.manual_seed(3)
NETWORK = SmallNetwork(4)


def write_model(path, env_id=BRIEF, network=NETWORK, mean_return=1.0):
    path = Path(path)
    os.makedirs(path.parent, exist_ok=True)
    model = {
        "env_id": env_id,
        "network": network.state_dict(),
        "global_step": 0,
        "mean_return": mean_return,
    }
    save(path, model)
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the program in a folder with one model, without a display.

    Returns what it exits with, stdout and stderr.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pqn_breakout.QNetwork", SmallNetwork)
    write_model("logs/run/best_model.pth")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)

    def run(options):
        monkeypatch.setattr("sys.argv", shlex.split(f"evaluate.py {options}"))
        code = 0
        try:
            run_command(evaluate.main)
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def display(run, monkeypatch):
    """A display after all, on which there is nothing to see."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def out_of(result):
    """What a run prints in which nothing goes wrong."""
    code, out, err = result
    assert (code, err) == (0, "")
    return out


def is_error(result, words):
    """Whether a run ends with a line with these words, and has printed nothing else.

    Python prints the line as it exits, and the exit code is 1.
    """
    line, *printed = result
    return printed == ["", ""] and words in line and re.fullmatch("evaluate.py: error: .+", line)


def read_video(path):
    frames = imageio_ffmpeg.read_frames(os.path.abspath(path))
    about = next(frames)
    width, height = about["size"]
    pictures = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames]
    return about, pictures


def moments_of(env_id, seed, epsilon=0.0):
    moments = []
    list(play(NETWORK, env_id, 1, epsilon, seed, watch=moments.append))
    return moments


def greedy_screens(seed):
    return [screen for moment in moments_of(BRIEF, seed) for screen in moment.screens]


def on_show(monkeypatch, viewer, number, act, *args):
    """From now on `act(*args)` is called after a Window or a Video has shown that many pictures.

    Returns a list, to which each picture comes with the time at which it was shown.
    """
    shown = []
    show = viewer.show

    def hooked(self, picture):
        show(self, picture)
        shown.append((picture, time.perf_counter()))
        if len(shown) == number:
            act(*args)

    monkeypatch.setattr(viewer, "show", hooked)
    return shown


# --- Games ---
def test_a_game_does_not_depend_on_the_games_beside_it(monkeypatch):
    times = Counter()
    step = Game.step

    def note(game, q_values, epsilon):
        times[game.number, game.steps, q_values.tobytes()] += 1
        return step(game, q_values, epsilon)

    monkeypatch.setattr(Game, "step", note)
    network = QNetwork(4)

    for watch in (None, [].append):  # side by side, then one after the other
        list(play(network, BRIEF, 2, 0.5, 7, watch))

    # Both times the 9 steps of the 2 games had the same Q-values.
    assert list(times.values()) == [2] * 2 * 9


def test_every_game_draws_its_own_random_actions():
    games = [Game(BRIEF, seed, number) for seed in (7, 8) for number in (0, 1)]

    assert len({game.rng.random() for game in games}) == 4


def test_a_score_is_that_of_a_whole_game_played_by_hand():
    env_id = "AssaultNoFrameskip-v4"
    torch.manual_seed(3)
    network = SmallNetwork(7)
    env = make_env(env_id, 1, 4)
    frames = env.reset()
    info = {}
    while "episode" not in info:
        actions = network(torch.from_numpy(frames)).argmax(1).numpy()
        frames, *_, (info,) = env.step(actions)
    score = info["episode"]["r"]
    assert info["lives"] == 0 and score > 0

    played = list(play(network, env_id, 1, 0.0, 4))

    assert played == [(0, score, info["episode"]["l"])]


# Resetting the last two, ALE plays frames of its own, a random number of them in the very last. The
# second seed is one that ALE takes for 0.
GAMES = [
    (BREAKOUT, 11),
    ("ALE/Seaquest-v5", 2**31),
    ("BerzerkNoFrameskip-v4", 11),
    ("ALE/DoubleDunk-v5", 11),
]


@pytest.mark.parametrize("env_id, seed", GAMES)
def test_the_screens_are_what_the_network_sees(env_id, seed):
    moments = []
    game = Game(env_id, seed, 0, moments.append)
    taken_seed = seed % 2**31
    emulator = Emulator(env_id, taken_seed)
    actions = emulator.actions
    ale = emulator.ale  # goes on as far as the environment is after a reset
    _, infos = game.env.envs.reset(seed=taken_seed)
    while ale.getEpisodeFrameNumber() < infos["episode_frame_number"][0]:
        ale.act(ale_py.Action.NOOP)
    true_score = 0

    for _ in range(25):
        game.step(np.zeros(len(actions)), 1.0)

        screens = moments[-1].screens
        for screen in screens:
            true_score += ale.act(actions[moments[-1].action])
            assert np.array_equal(screen, ale.getScreenRGB())
        assert len(screens) == 4 and moments[-1].score == true_score
        gray = np.rint(np.array(screens[-2:]) @ [0.299, 0.587, 0.114])
        assert np.abs(shrink(gray.max(0)) - game.frames[0, -1]).max() <= 3


def test_a_score_on_show_is_true_where_random_numbers_of_frames_are_skipped(monkeypatch):
    rewards = []
    step = AtariEnv.step

    def noted(env, action):
        result = step(env, action)
        rewards.append(result[1])
        return result

    def compare(moment):
        assert moment.score == sum(rewards)

    monkeypatch.setattr(AtariEnv, "step", noted)
    game = Game("SpaceInvaders-v4", 1, 0, watch=compare)
    rewards.clear()
    for _ in range(200):
        assert game.step(np.zeros(6), 1.0) is None  # the game is not over

    assert sum(rewards) > np.count_nonzero(rewards) > 0  # clipping would have shown


def test_games_that_skip_random_numbers_of_frames_show_one_screen_a_step():
    moments = moments_of(short("Breakout-v4", 150), 11, epsilon=1.0)

    screens = [moment.screens for moment in moments]
    assert {len(each) for each in screens} == {1}
    assert not np.array_equal(screens[-3], screens[-2])
    assert np.array_equal(screens[-2], screens[-1])  # not the next game's first


# --- What is printed ---
OPTIONS = "--model boxing.pth --episodes 3 --seed 4 --epsilon 0.5"


@pytest.fixture
def boxing(run):
    write_model("boxing.pth", BRIEF_BOXING, SmallNetwork(18))


def test_json_has_the_statistics_of_the_games(run, boxing):
    about = json.loads(out_of(run(f"{OPTIONS} --json")))

    scores = about.pop("returns")
    lengths = about.pop("lengths")
    assert len(scores) == 3 and about == {
        "env_id": BRIEF_BOXING,
        "model": "boxing.pth",
        "episodes": 3,
        "epsilon": 0.5,
        "seed": 4,
        "different_games": len(set(zip(scores, lengths, strict=True))),
        "mean": pytest.approx(mean(scores)),
        "std": pytest.approx(pstdev(scores)),
        "median": median(scores),
        "min": min(scores),
        "max": max(scores),
    }


def test_pictures_change_no_game(run, boxing, display, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)

    plain = run(f"{OPTIONS} --json")
    watched = run(f"{OPTIONS} --json --render human --show-q --video game.gif")

    assert out_of(watched) == out_of(plain)


HEAD_AND_STATISTICS = """\
{env_id}, epsilon {epsilon}, model {model}
{episodes} games, {different_games} of them different: mean {mean:.2f}, \
standard deviation {std:.2f}, median {median:g}, min {min:g}, max {max:g}"""


def test_without_json_each_game_and_the_statistics_are_a_line(run, boxing):
    about = json.loads(out_of(run(f"{OPTIONS} --json")))

    head, *games, last = out_of(run(OPTIONS)).splitlines()

    assert f"{head}\n{last}" == HEAD_AND_STATISTICS.format(**about)
    numbered = zip(count(1), about["returns"], about["lengths"])
    assert sorted(games) == [f"game {i}: score {r:g}, {n} steps" for i, r, n in numbered]


class Console(io.StringIO):
    """Takes text and nothing else, as the streams of IDLE and of a notebook do."""

    def isatty(self):
        return True


@pytest.mark.parametrize("stdout", [None, Console()])  # None where it is closed
@pytest.mark.parametrize("stderr", [None, Console()])
def test_it_does_not_matter_what_the_streams_are(run, monkeypatch, stdout, stderr):
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr("sys.stderr", stderr)

    assert out_of(run("--episodes 1")) == ""


def test_json_does_not_mix_with_what_a_closed_stderr_would_get(run, monkeypatch):
    on_show(monkeypatch, Video, FRAMES + 6, raise_signal, SIGTERM)
    monkeypatch.setattr("sys.stderr", None)

    code, out, _ = run("--video game.gif --json")

    assert code == 143 and json.loads(out)["episodes"] == 1


class BrokenPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("option", ["", "--json"])
def test_a_video_is_finished_and_an_error_told_when_nobody_reads(run, monkeypatch, option):
    monkeypatch.setattr("sys.stdout", BrokenPipe())

    result = run(f"--episodes 1 --video game.mp4 {option}")

    assert is_error(result, "stdout") and sorted(os.listdir()) == ["game.mp4", "logs"]


def handlers():
    return {number: getsignal(number) for number in pqn_breakout.SIGNALS}


def test_a_shared_process_is_left_as_it_was(run, display):
    def state():
        return sys.stdout, sys.stderr, handlers(), torch.get_num_threads()

    before = state()

    out_of(run("--episodes 1 --render human"))

    assert state() == before and not pygame.display.get_init()


# --- Models ---
def model_of(run, options=""):
    about = json.loads(out_of(run(f"--json --episodes 1 {options}")))
    return Path(about["model"])


def test_plays_the_newest_run(run):
    for seconds, name in enumerate(("old", "new", "reference"), int(2e9)):  # the last is no run
        os.utime(write_model(f"logs/{name}/best_model.pth"), (seconds, seconds))

    assert model_of(run) == Path("logs/new/best_model.pth")


def test_without_a_run_plays_the_breakout_reference_with_the_highest_mean(run, monkeypatch):
    os.rename("logs", "moved")
    models = "clone/logs/reference"
    write_model(f"{models}/pong/best_model.pth", "PongNoFrameskip-v4", mean_return=500.0)
    write_model(f"{models}/new/best_model.pth", mean_return=-np.inf)
    best = write_model(f"{models}/seed/best_model_2.pth", mean_return=300.0)
    write_model(f"{models}/weak/best_model.pth", mean_return=10.0)
    os.symlink("clone/evaluate.py", "link.py")

    for called in ("clone/evaluate.py", "link.py"):
        monkeypatch.setattr("evaluate.__file__", called)
        assert model_of(run) == best.absolute()


def test_without_any_model_it_says_what_to_do(run, monkeypatch):
    os.rename("logs", "moved")
    monkeypatch.setattr("evaluate.__file__", "evaluate.py")

    assert is_error(run(""), "train one with python pqn_breakout.py, or name one by --model")


def test_a_run_stands_for_its_best_model(run):
    assert model_of(run, "--model logs/run") == Path("logs/run/best_model.pth")


# --- Mistakes ---
WRONG = ["--episodes 0", "--epsilon 2", "--epsilon nan", "--seed -1", "--model ''", "--video ''"]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_option_is_told_by_name(run, wrong):
    name, _ = wrong.removeprefix("--").split()

    code, out, err = run(wrong)

    assert code == 2 and out == "" and name in err


MISTAKES = {
    "--show-q": "--show-q: needs a picture",
    "--device warp": "--device warp",
    "--video game.avi": "--video game.avi: must",
    "--video folder.mp4": "--video folder.mp4: must",
    "--video no/game.gif": "no/.game",
    "--render human": "no window can be opened",
    "--model no.pth": "no.pth: no such file",
    "--model folder.mp4": "folder.mp4/best_model.pth: no such file",
    "--model checkpoint.pth": "checkpoint.pth: no BestModel",
    "--model shape.pth": "shape.pth: damaged, or of another",
    "--model typo.pth": "BreakuotNoFrameskip-v4: no Atari game",
    "--model damaged.pth": "damaged.pth: damaged",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_before_anything_is_played(run, monkeypatch, mistake):
    os.mkdir("folder.mp4")
    save("checkpoint.pth", {"args": {}})
    write_model("shape.pth", BREAKOUT, SmallNetwork(6))
    write_model("typo.pth", "BreakuotNoFrameskip-v4")
    Path("damaged.pth").write_text("no model")
    monkeypatch.setenv("SDL_VIDEODRIVER", "none such")
    monkeypatch.setattr("evaluate.play", None)
    before = list(os.walk("."))

    result = run(f"--render none {mistake}")

    assert is_error(result, MISTAKES[mistake])
    assert list(os.walk(".")) == before


# --- Pictures ---
@pytest.mark.parametrize(
    "name, codec, pixels, every, scale",
    [("game.MP4", "h264", "yuv420p", 1, 4), ("a:%d/game%d.gif", "gif", "bgra", 3, 3)],
)
def test_a_video_has_the_frames_of_all_games(run, display, name, codec, pixels, every, scale):
    os.mkdir("a:%d")

    out = out_of(run(f"--episodes 2 --seed 3 --epsilon 0 --video {name}"))

    assert "game 2: " in out and not pygame.display.get_init()
    assert list(Path().rglob("*game*")) == [Path(name)]
    about, pictures = read_video(name)
    assert about["fps"] == 60 / every
    assert codec in about["codec"] and pixels in about["pix_fmt"]  # what every player takes
    screens = (greedy_screens(3) + greedy_screens(4))[::every]
    assert len(pictures) == len(screens) == -(-2 * FRAMES // every)
    lossy = codec == "h264"
    for picture, screen in zip(pictures[::9], screens[::9], strict=True):
        blocks = picture.reshape(210, scale, 160, scale, 3)
        assert np.abs(blocks.mean((1, 3)) - screen).mean() <= 2 * lossy
        assert blocks.std((1, 3)).mean() <= lossy  # crisp


@pytest.mark.parametrize(
    "env_id, height, actions", [("Adventure-v4", 250, 18), ("PooyanNoFrameskip-v4", 220, 6)]
)
def test_the_panel_stands_beside_a_screen_of_any_size(run, env_id, height, actions):
    write_model("model.pth", short(env_id, 20), SmallNetwork(actions))

    out_of(run("--model model.pth --episodes 1 --video game.mp4 --show-q"))

    about, pictures = read_video("game.mp4")
    assert about["size"] == ((160 + 124) * 4, height * 4)
    changes = pictures[0] != pictures[-1]
    assert changes[:, 160 * 4 :].any()


BLACK = np.zeros((210, 160, 3), np.uint8)


def test_bars_show_which_action_is_better_even_of_close_values():
    q_values = 5 + np.random.default_rng(0).permutation(18) / 1800
    moment = Moment([BLACK], q_values, action=1, score=42, lives=5, step=1)

    picture = Panel(BREAKOUT, ["DOWNRIGHTFIRE"] * 18, 4).draw(moment)

    rows = np.linspace(196, 612, 18, dtype=int)  # a row of pixels through each bar
    bars = picture[rows, 220:388]
    lengths = (bars != picture[0, 0]).any(2).sum(1)
    assert (lengths.argsort() == q_values.argsort()).all() and lengths.max() > 160
    golden = (bars == (255, 180, 84)).all(2).any(1)
    assert np.flatnonzero(golden).tolist() == [q_values.argmax()]


def test_the_window_shows_every_frame_at_60_a_second_until_it_is_closed(run, display, monkeypatch):
    close = pygame.event.Event(pygame.QUIT)
    shown = on_show(monkeypatch, Window, FRAMES + 20, pygame.event.post, close)

    out = out_of(run("--episodes 3 --seed 3 --epsilon 0"))

    assert "\n1 games" in out
    assert FRAMES + 20 <= len(shown) <= FRAMES + 24  # to the end of the step
    pictures, times = zip(*shown, strict=True)
    assert times[50] - times[5] > 44 / 60
    for picture, screen in zip(pictures[:FRAMES], greedy_screens(3), strict=True):
        assert np.array_equal(picture, screen.repeat(3, 0).repeat(3, 1))


def test_a_mouse_does_not_fill_the_queue_of_the_window(display):
    window = Window("a window")
    pygame.event.post(pygame.event.Event(pygame.MOUSEMOTION))

    window.show(BLACK)

    assert not pygame.event.peek()
    window.close()


def test_an_encoder_that_fails_is_one_clear_line(run, monkeypatch):
    Path("game.mp4").write_bytes(b"an older video")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")

    result = run("--video game.mp4 --json")

    assert is_error(result, "--video game.mp4: ffmpeg failed")
    assert [path.read_bytes() for path in Path().glob("*game*")] == [b"an older video"]


def test_a_video_that_cannot_take_its_place_is_kept_and_named(run, monkeypatch):
    on_show(monkeypatch, Video, 30, os.mkdir, "game.gif")

    result = run("--episodes 1 --video game.gif --json")

    (kept,) = Path().absolute().glob(".game*.gif")
    assert is_error(result, f"'{kept}'")
    assert len(read_video(kept)[1]) == -(-FRAMES // 3)


# --- Signals ---
@pytest.mark.parametrize("name, every, number", [("game.mp4", 1, SIGHUP), ("game.gif", 3, SIGTERM)])
def test_a_signal_keeps_what_was_recorded(run, monkeypatch, name, every, number):
    on_show(monkeypatch, Video, 30, raise_signal, number)

    code, _, err = run(f"--video {name}")

    assert code == 128 + number and sorted(os.listdir()) == [name, "logs"]
    answer, result = err.splitlines()
    assert "stops as soon as it can; a second signal ends" in answer
    assert "no game was finished" in result
    assert 30 <= every * len(read_video(name)[1]) <= 34  # to the end of the step


def test_a_second_signal_ends_the_program_at_once_and_keeps_no_half_of_a_video(run, monkeypatch):
    def stop():
        for number in (SIGINT, SIGHUP, SIGHUP, SIGTERM):
            seen.append(number)
            raise_signal(number)

    seen = []
    on_show(monkeypatch, Video, 3, stop)
    before = signal(SIGINT, SIG_IGN)  # as in the background of a shell's script

    code, out, _ = run("--video game.mp4")

    signal(SIGINT, before)
    assert code == 128 + SIGTERM and seen[-1] == SIGTERM
    assert os.listdir() == ["logs"]
    assert "mean" not in out


def test_ctrl_c_in_a_terminal_reaches_the_encoder_too_and_does_no_harm(tmp_path):
    write_model(tmp_path / "logs/run/best_model.pth", BREAKOUT, QNetwork(4))
    process = subprocess.Popen(
        [sys.executable, evaluate.__file__, "--epsilon=1", "--video=game.gif"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(2):  # the heading and the first game
        process.stdout.readline()

    os.killpg(process.pid, SIGINT)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert out.startswith("1 games, ") and err.count("\n") == 1
    assert len(read_video(tmp_path / "game.gif")[1]) > 400 / 3
