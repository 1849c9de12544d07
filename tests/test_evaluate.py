"""evaluate.py: whole games with true scores, whatever else runs beside them, and clear mistakes."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import cache
from itertools import count
from pathlib import Path
from statistics import mean, median, pstdev

import ale_py
import cv2
import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pygame
import pytest
import torch
from ale_py.env import AtariEnv

import evaluate
import pqn_breakout
from evaluate import Game, Moment, Panel, Video, Window, play
from pqn_breakout import QNetwork, make_env, run_command, save

BREAKOUT = "BreakoutNoFrameskip-v4"
FRAMES = 34  # of a brief game: 8 steps and a half


def brief(env_id, frames=FRAMES):
    """The id of the same game, cut off after so many frames."""
    spec = gym.registry[env_id]
    options = spec.kwargs | {"max_num_frames_per_episode": frames}
    gym.register(f"Brief{env_id}", spec.entry_point, kwargs=options)
    return f"Brief{env_id}"


BRIEF = brief(BREAKOUT)
BRIEF_BOXING = brief("Boxing-v4", 100)  # skips a random number of frames


class SmallNetwork(torch.nn.Module):
    """Where games and pictures are tested and not learning, it is as good, and quick."""

    def __init__(self, actions):
        super().__init__()
        self.layer = torch.nn.Linear(21 * 21, actions)

    def forward(self, frames):
        return self.layer(frames[:, -1, ::4, ::4].flatten(1) / 255)


@cache
def random_network(actions=4, kind=SmallNetwork):
    torch.manual_seed(3)
    return kind(actions)


def write_model(path, env_id=BRIEF, network=None, mean_return=1.0):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = (network or random_network()).state_dict()
    content = {"env_id": env_id, "network": weights, "global_step": 0, "mean_return": mean_return}
    save(path, content)
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the program in a folder with one model, without a display.

    Returns its exit code, stdout and stderr.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pqn_breakout, "QNetwork", SmallNetwork)
    write_model("logs/run/best_model.pth")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)

    def run(*args):
        code = 0
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
        try:
            run_command(evaluate.main)
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # Python would print the line and exit with 1
            return 1, out, f"{err}{code}\n"
        return code, out, err

    return run


def is_error(result, words):
    code, out, err = result
    one_line = re.fullmatch("evaluate.py: error: .+\n", err)
    return code == 1 and out == "" and bool(one_line) and words in err


def read_video(path):
    frames = imageio_ffmpeg.read_frames(str(Path(path).absolute()))
    about = next(frames)
    width, height = about["size"]
    pictures = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames]
    return about, pictures


def moments_of(env_id, seed, epsilon=0.0):
    moments = []
    list(play(random_network(), env_id, 1, epsilon, seed, watch=moments.append))
    return moments


def greedy_screens(seed):
    return [screen for moment in moments_of(BRIEF, seed) for screen in moment.screens]


def on_show(monkeypatch, viewer, number, act, *args):
    """From now on `act(*args)` is called after a Window or a Video has shown that many pictures."""
    show = viewer.show
    numbers = count(1)

    def hooked(self, picture):
        show(self, picture)
        if next(numbers) == number:
            act(*args)

    monkeypatch.setattr(viewer, "show", hooked)


# --- Games ---
def q_values_of(monkeypatch, watch=None):
    """Those of all steps of two brief games, by the game's number."""
    courses = {}
    step = Game.step

    def note(game, q_values, epsilon):
        courses.setdefault(game.number, []).append(q_values.tobytes())
        return step(game, q_values, epsilon)

    with monkeypatch.context() as patch:
        patch.setattr(Game, "step", note)
        assert len(list(play(random_network(4, QNetwork), BRIEF, 2, 0.5, 7, watch))) == 2
    return courses


def test_a_game_does_not_depend_on_the_games_beside_it(monkeypatch):
    side_by_side = q_values_of(monkeypatch)
    alone = q_values_of(monkeypatch, watch=[].append)

    assert alone == side_by_side


def test_every_game_draws_its_own_random_actions():
    games = [Game(BRIEF, seed, number) for seed in (7, 8) for number in (0, 1)]

    assert len({game.rng.random() for game in games}) == 4


def test_a_score_is_that_of_a_whole_game_played_by_hand():
    env_id = "AssaultNoFrameskip-v4"
    network = random_network(7)
    env = make_env(env_id, 1, 4)
    frames = env.reset()
    lost_lives = 0
    info = {}
    while "episode" not in info:
        with torch.inference_mode():
            action = network(torch.from_numpy(frames)).numpy().argmax(1)
        frames, _, dones, (info,) = env.step(action)
        lost_lives += int(dones[0])
    assert lost_lives == 4 and info["episode"]["r"] > 0

    played = list(play(network, env_id, 1, 0.0, 4))

    assert played == [(0, info["episode"]["r"], info["episode"]["l"])]


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
    rng = np.random.default_rng(0)
    game = Game(env_id, seed, 0, watch=moments.append)
    emulator = ale_py.ALEInterface()  # on its own, as far as the environment is after a reset
    sticky = game.env.spec.kwargs["repeat_action_probability"]
    emulator.setFloat("repeat_action_probability", sticky)
    emulator.setInt("random_seed", seed % 2**31)
    emulator.loadROM(ale_py.roms.get_rom_path(game.env.spec.kwargs["game"]))
    emulator.reset_game()
    _, infos = game.env.envs.reset(seed=np.array([seed % 2**31]))
    while emulator.getEpisodeFrameNumber() < infos["episode_frame_number"][0]:
        emulator.act(ale_py.Action.NOOP)
    actions = game.env.envs.ale.get_action_set()
    true_score = 0

    for _ in range(25):
        game.step(rng.random(len(actions)), 0.0)

        screens = moments[-1].screens
        for screen in screens:
            true_score += emulator.act(actions[moments[-1].action])
            assert np.array_equal(screen, emulator.getScreenRGB())
        assert len(screens) == 4 and moments[-1].score == true_score
        gray = [np.rint(screen @ [0.299, 0.587, 0.114]) for screen in screens[-2:]]
        small = cv2.resize(np.max(gray, axis=0), (84, 84), interpolation=cv2.INTER_AREA)
        assert np.abs(small - game.frames[0, -1]).max() <= 3


def test_a_score_on_show_is_true_where_random_numbers_of_frames_are_skipped(monkeypatch):
    rewards = []
    scores = []
    step = AtariEnv.step

    def noted(env, action):
        result = step(env, action)
        rewards.append(result[1])
        return result

    def watch(moment):
        scores.append((moment.score, sum(rewards)))

    monkeypatch.setattr(AtariEnv, "step", noted)
    rng = np.random.default_rng(0)
    game = Game("SpaceInvaders-v4", 1, 0, watch)
    rewards.clear()
    for _ in range(200):
        assert game.step(rng.random(6), 0.0) is None  # the game is not over

    shown, true = zip(*scores, strict=True)
    assert shown == true and shown[-1] > np.count_nonzero(rewards) > 0


def test_games_that_skip_random_numbers_of_frames_show_one_screen_a_step():
    moments = moments_of(brief("Breakout-v4", 150), 11, epsilon=1.0)

    screens = [moment.screens for moment in moments]
    assert {len(each) for each in screens} == {1}
    assert not np.array_equal(screens[-3], screens[-2])
    assert np.array_equal(screens[-2], screens[-1])  # not the next game's first


# --- What is printed ---
OPTIONS = ["--episodes", 3, "--seed", 4, "--epsilon", 0.5]


def test_json_has_the_statistics_of_the_games(run):
    path = write_model("model.pth", BRIEF_BOXING, random_network(18))

    code, out, err = run("--model", path, *OPTIONS, "--json")

    assert (code, err) == (0, "")
    about = json.loads(out)
    scores, lengths = about.pop("returns"), about.pop("lengths")
    assert len(scores) == 3 and about == {
        "env_id": BRIEF_BOXING,
        "model": "model.pth",
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


def test_pictures_change_no_game(run, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    options = ["--model", write_model("model.pth", BRIEF_BOXING, random_network(18)), *OPTIONS]

    plain = run(*options, "--json")
    watched = run(*options, "--json", "--render", "human", "--show-q", "--video", "game.gif")

    assert plain[0] == 0 and watched == plain


def test_without_json_each_game_and_the_statistics_are_a_line(run):
    about = json.loads(run(*OPTIONS, "--json")[1])

    code, out, err = run(*OPTIONS)

    assert (code, err) == (0, "")
    head, *games, last = out.splitlines()
    assert head == "{env_id}, epsilon {epsilon}, model {model}".format(**about)
    numbered = zip(count(1), about["returns"], about["lengths"])
    assert sorted(games) == [f"game {i}: score {r:g}, {n} steps" for i, r, n in numbered]
    statistics = (
        "{episodes} games, {different_games} of them different: mean {mean:.2f}, "
        "standard deviation {std:.2f}, median {median:g}, min {min:g}, max {max:g}"
    )
    assert last == statistics.format(**about)


class Console(io.StringIO):
    """Takes text and nothing else, as the streams of IDLE and of a notebook do."""

    def isatty(self):
        return True


STREAMS = {
    "both are closed": (None, None),
    "stdout is closed": (None, sys.stderr),
    "stderr is closed": (sys.stdout, None),
    "both are a console": (Console(), Console()),
}


@pytest.mark.parametrize("streams", STREAMS.values(), ids=STREAMS)
def test_it_does_not_matter_what_the_streams_are(run, monkeypatch, streams):
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])

    code, _, _ = run("--episodes", 1)

    assert code == 0


def test_json_does_not_mix_with_what_a_closed_stderr_would_get(run, monkeypatch):
    on_show(monkeypatch, Video, FRAMES + 6, signal.raise_signal, signal.SIGTERM)
    monkeypatch.setattr(sys, "stderr", None)

    code, out, _ = run("--video", "game.gif", "--json")

    assert code == 143 and json.loads(out)["episodes"] == 1


class BrokenPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_video_is_finished_and_an_error_told_when_nobody_reads(run, monkeypatch, options):
    monkeypatch.setattr(sys, "stdout", BrokenPipe())

    result = run("--episodes", 1, "--video", "game.mp4", *options)

    assert is_error(result, "stdout") and sorted(os.listdir()) == ["game.mp4", "logs"]


def test_a_shared_process_is_left_as_it_was(run, monkeypatch):
    def state():
        handlers = [signal.getsignal(number) for number in pqn_breakout.SIGNALS]
        return sys.stdout, sys.stderr, handlers, torch.get_num_threads()

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    before = state()

    code, _, _ = run("--episodes", 1, "--render", "human")

    assert code == 0 and state() == before and not pygame.display.get_init()


# --- Models ---
def model_of(result):
    return json.loads(result[1])["model"]


def test_plays_the_newest_run(run):
    for seconds, name in enumerate(("old", "new", "reference")):  # the last is no run
        os.utime(write_model(f"logs/{name}/best_model.pth"), (2e9 + seconds, 2e9 + seconds))

    assert model_of(run("--json", "--episodes", 1)) == str(Path("logs/new/best_model.pth"))


def test_without_a_run_plays_the_breakout_reference_with_the_highest_mean(run, monkeypatch):
    Path("logs").rename("moved")
    script = Path("clone/evaluate.py").absolute()
    reference = script.parent / "logs/reference"
    write_model(reference / "pong/best_model.pth", "PongNoFrameskip-v4", mean_return=500.0)
    write_model(reference / "new/best_model.pth", mean_return=-np.inf)
    best = write_model(reference / "seed/best_model_2.pth", mean_return=300.0)
    write_model(reference / "weak/best_model.pth", mean_return=10.0)
    script.touch()
    Path("link.py").symlink_to(script)

    for called in (script, Path("link.py").absolute()):
        monkeypatch.setattr(evaluate, "__file__", str(called))
        assert model_of(run("--json", "--episodes", 1)) == str(best)


def test_without_any_model_it_says_what_to_do(run, monkeypatch):
    Path("logs").rename("moved")
    monkeypatch.setattr(evaluate, "__file__", str(Path("evaluate.py").absolute()))

    assert is_error(run(), "train one with python pqn_breakout.py, or name one by --model")


def test_a_run_stands_for_its_best_model(run):
    path = Path("logs/run/best_model.pth")

    assert model_of(run("--model", path.parent, "--json", "--episodes", 1)) == str(path)


# --- Mistakes ---
WRONG = ["--episodes 0", "--epsilon 2", "--epsilon nan", "--seed -1", "--model ", "--video "]


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_option_is_told_by_name(run, wrong):
    name, value = wrong.split(" ")

    code, out, err = run(name, value)

    assert code == 2 and out == "" and name.strip("-") in err


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
    Path("folder.mp4").mkdir()
    save(Path("checkpoint.pth"), {"args": {}, "best": {}, "global_step": 0})
    write_model("shape.pth", BREAKOUT, random_network(6))
    write_model("typo.pth", "BreakuotNoFrameskip-v4")
    data = bytearray(Path("shape.pth").read_bytes())
    data[len(data) // 2] ^= 1
    Path("damaged.pth").write_bytes(data)
    monkeypatch.setenv("SDL_VIDEODRIVER", "none such")
    monkeypatch.setattr(evaluate, "play", None)
    before = sorted(Path().rglob("*"))

    result = run("--render", "none", *mistake.split())

    assert is_error(result, MISTAKES[mistake])
    assert sorted(Path().rglob("*")) == before


# --- Pictures ---
@pytest.mark.parametrize(
    "name, codec, every, scale",
    [("game.MP4", "h264", 1, 4), ("a:%d/game%d.gif", "gif", 3, 3)],
)
def test_a_video_has_the_frames_of_all_games(run, monkeypatch, name, codec, every, scale):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # a display, on which there is nothing to show
    Path("a:%d").mkdir()

    code, out, err = run("--episodes", 2, "--seed", 3, "--epsilon", 0, "--video", name)

    assert (code, err) == (0, "") and "game 2: " in out and not pygame.display.get_init()
    assert list(Path().rglob("*game*")) == [Path(name)]
    about, pictures = read_video(name)
    assert about["fps"] == 60 / every and about["codec"].startswith(codec)
    lossy = codec == "h264" and "yuv420p" in about["pix_fmt"]  # what every player takes
    screens = (greedy_screens(3) + greedy_screens(4))[::every]
    assert len(pictures) == len(screens) == -(-2 * FRAMES // every)
    for picture, screen in zip(pictures[::9], screens[::9], strict=True):
        pixels = picture.reshape(210, scale, 160, scale, 3)
        assert np.abs(pixels.mean((1, 3)) - screen).mean() <= 2 * lossy
        assert pixels.std((1, 3)).mean() <= lossy  # crisp


@pytest.mark.parametrize(
    "env_id, height, actions", [("Adventure-v4", 250, 18), ("PooyanNoFrameskip-v4", 220, 6)]
)
def test_the_panel_stands_beside_a_screen_of_any_size(run, env_id, height, actions):
    write_model("model.pth", brief(env_id, 20), random_network(actions))

    code, _, err = run("--model", "model.pth", "--episodes", 1, "--video", "game.mp4", "--show-q")

    assert (code, err) == (0, "")
    about, pictures = read_video("game.mp4")
    assert about["size"] == ((160 + 124) * 4, height * 4)
    panels = [picture[:, 160 * 4 :] for picture in pictures]
    assert not np.array_equal(panels[0], panels[-1])


def test_bars_show_which_action_is_better_even_of_close_values():
    q_values = 5 + 0.01 * np.random.default_rng(0).permutation(18) / 18
    screen = np.zeros((210, 160, 3), np.uint8)
    moment = Moment([screen], q_values, action=1, score=42, lives=5, step=1)

    picture = Panel(BREAKOUT, ["DOWNRIGHTFIRE"] * 18, 4).draw(moment)

    rows = 184 + 440 * (2 * np.arange(18) + 1) // 36  # a row of pixels through each bar
    bars = picture[rows, 220:388]
    lengths = (bars != picture[0, 0]).any(2).sum(1)
    assert np.array_equal(np.argsort(lengths), np.argsort(q_values)) and lengths.max() > 160
    golden = (bars == (255, 180, 84)).all(2).any(1)
    assert np.flatnonzero(golden).tolist() == [q_values.argmax()]


def test_the_window_shows_every_frame_at_60_a_second_until_it_is_closed(run, monkeypatch):
    shown = []
    show = Window.show

    def noted(window, picture):
        show(window, picture)
        shown.append((picture, time.perf_counter()))

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(Window, "show", noted)
    close = pygame.event.Event(pygame.QUIT)
    on_show(monkeypatch, Window, FRAMES + 20, pygame.event.post, close)

    code, out, err = run("--episodes", 3, "--seed", 3, "--epsilon", 0)

    assert (code, err) == (0, "") and out.splitlines()[-1].startswith("1 games")
    assert FRAMES + 20 <= len(shown) <= FRAMES + 24  # to the end of the step
    assert shown[50][1] - shown[5][1] > 44 / 60
    for (picture, _), screen in list(zip(shown, greedy_screens(3), strict=False))[::20]:
        assert np.array_equal(picture, screen.repeat(3, 0).repeat(3, 1))


def test_a_mouse_does_not_fill_the_queue_of_the_window(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    window = Window("a window")
    pygame.event.post(pygame.event.Event(pygame.MOUSEMOTION))

    window.show(np.zeros((210, 160, 3), np.uint8))

    assert not pygame.event.peek()
    window.close()


def test_an_encoder_that_fails_is_one_clear_line(run, monkeypatch):
    Path("game.mp4").write_bytes(b"an older video")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")

    result = run("--video", "game.mp4", "--json")

    assert is_error(result, "--video game.mp4: ffmpeg failed")
    assert [path.read_bytes() for path in Path().glob("*game*")] == [b"an older video"]


def test_a_video_that_cannot_take_its_place_is_kept_and_named(run, monkeypatch):
    on_show(monkeypatch, Video, 30, Path("game.gif").mkdir)

    result = run("--episodes", 1, "--video", "game.gif", "--json")

    (kept,) = Path().absolute().glob(".game*.gif")
    assert is_error(result, f"'{kept}'")
    assert len(read_video(kept)[1]) == -(-FRAMES // 3)


# --- Signals ---
@pytest.mark.parametrize(
    "name, every, number", [("game.mp4", 1, signal.SIGHUP), ("game.gif", 3, signal.SIGTERM)]
)
def test_a_signal_keeps_what_was_recorded(run, monkeypatch, name, every, number):
    on_show(monkeypatch, Video, 30, signal.raise_signal, number)

    code, _, err = run("--video", name)

    assert code == 128 + number and sorted(os.listdir()) == [name, "logs"]
    answer, result = err.splitlines()
    assert "stops after this step; a second signal ends" in answer
    assert "no game was finished" in result
    assert 30 <= every * len(read_video(name)[1]) <= 34  # to the end of the step


def test_a_second_signal_ends_the_program_at_once_unless_it_is_ignored(run, monkeypatch):
    handlers = {}

    def stop():
        signal.raise_signal(signal.SIGTERM)
        for number in pqn_breakout.SIGNALS:
            handlers[number] = signal.getsignal(number)

    on_show(monkeypatch, Video, 3, stop)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup

    run("--video", "game.mp4")

    signal.signal(signal.SIGHUP, before)
    assert handlers.pop(signal.SIGHUP) == signal.SIG_IGN
    assert set(handlers.values()) == {signal.SIG_DFL}


def test_ctrl_c_in_a_terminal_reaches_the_encoder_too_and_does_no_harm(tmp_path):
    model = write_model(tmp_path / "model.pth", BREAKOUT, QNetwork(4))
    options = f"--model {model} --epsilon 1 --video game.gif"
    process = subprocess.Popen(
        [sys.executable, evaluate.__file__, *options.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    lines = [process.stdout.readline() for _ in range(2)]  # the heading and the first game

    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)

    assert process.returncode == 130 and lines[1].startswith("game 1")
    assert out.startswith("1 games, ") and len(err.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["game.gif", "model.pth"]
    assert len(read_video(tmp_path / "game.gif")[1]) > 400 / 3
