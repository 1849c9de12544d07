"""evaluate.py: whole games with true scores, whatever else runs beside them, and one clear line for each mistake."""

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
from unittest.mock import Mock

import ale_py
import cv2
import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pygame
import pytest
import torch

import evaluate
import pqn_breakout
from evaluate import Game, Panel, Video, Window, play
from pqn_breakout import QNetwork, make_env, run_command, save

BREAKOUT = "BreakoutNoFrameskip-v4"


def brief(env_id: str, frames: int) -> str:
    """The id of the same game, cut off after so many frames."""
    spec = gym.registry[env_id]
    gym.register(f"Brief{env_id}", spec.entry_point, kwargs=spec.kwargs | {"max_num_frames_per_episode": frames})
    return f"Brief{env_id}"


FRAMES = 62  # 15 steps and a half
BRIEF = brief(BREAKOUT, FRAMES)


@cache
def random_network(actions: int = 4) -> QNetwork:
    torch.manual_seed(3)
    return QNetwork(actions)


def write_model(path: Path, env_id: str = BRIEF, actions: int = 4, mean_return: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, {"env_id": env_id, "mean_return": mean_return, "network": random_network(actions).state_dict()})
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the program in a folder with one model, without a display; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("logs/run/best_model.pth"))
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(*args) -> tuple[int, str, str]:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
            patch.setattr(sys, "stdout", sys.stdout)
            run_command(evaluate.main)
        code, (out, err) = stopped.value.code, capsys.readouterr()
        return (code, out, err) if isinstance(code, int) else (1, out, f"{err}{code}\n")

    yield run
    pygame.display.quit()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def is_error(result: tuple[int, str, str], words: str) -> bool:
    return result[:2] == (1, "") and re.fullmatch("evaluate.py: error: .+\n", result[2]) and words in result[2]


def read_video(path) -> tuple[dict, list[np.ndarray]]:
    frames = imageio_ffmpeg.read_frames(str(Path(path).absolute()))
    about = next(frames)
    width, height = about["size"]
    return about, [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames]


def greedy_screens(seed: int) -> list[np.ndarray]:
    screens = []
    list(play(random_network(), BRIEF, 1, 0.0, seed, watch=lambda new, *_: screens.extend(new)))
    return screens


def on_show(monkeypatch, viewer, hook) -> None:
    """From now on `hook(number, picture)` is called after each picture that a Window or Video shows."""
    show, numbers = viewer.show, count(1)
    monkeypatch.setattr(viewer, "show", lambda self, picture: (show(self, picture), hook(next(numbers), picture)))


def test_a_game_does_not_depend_on_the_games_beside_it(monkeypatch):
    courses, draws = [], []

    def draw(*args):
        draws.append(epsilon_greedy(*args))
        return draws[-1]

    def note(game, q, epsilon):
        episode = step(game, q, epsilon)
        courses[-1].setdefault(game.number, []).append((q.tobytes(), int(draws[-1][0])))
        return episode

    epsilon_greedy, step = pqn_breakout.epsilon_greedy, Game.step
    monkeypatch.setattr(pqn_breakout, "epsilon_greedy", draw)
    monkeypatch.setattr(Game, "step", note)
    for seed, options in ((7, {"watch": lambda *_: None}), (7, {}), (8, {})):
        courses.append({})
        list(play(random_network(), BRIEF, 3, 1.0, seed, **options))
    assert courses[0] == courses[1]  # alone, or side by side
    actions = [tuple(action for _, action in steps) for course in courses[1:] for steps in course.values()]
    assert len(set(actions)) == 6  # every game draws for itself


def test_a_score_is_that_of_a_whole_game_played_by_hand():
    env_id, network, lost, info = "AssaultNoFrameskip-v4", random_network(7), 0, {}
    env = make_env(env_id, 1, 4)
    frames = env.reset()
    while "episode" not in info:
        action = network(torch.from_numpy(frames)).detach().numpy().argmax(1)
        frames, _, (done,), (info,) = env.step(action)
        lost += done
    assert lost == 4  # lives
    hand = (0, info["episode"]["r"], info["episode"]["l"])
    assert list(play(network, env_id, 1, 0.0, 4)) == [hand] and hand[1] > 0


def test_prints_games_and_statistics_and_json_has_the_same_with_pictures(run, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    path = write_model(tmp_path / "model.pth", brief("Boxing-v4", 100), 18)  # skips random numbers of frames
    options = ("--model", path, "--episodes", 3, "--seed", 4, "--epsilon", 0.5)
    code, out, err = run(*options, "--render", "human", "--show-q")
    filmed = run(*options, "--json", "--show-q", "--video", "game.gif")
    assert run(*options, "--json") == filmed
    assert code == filmed[0] == 0 and err == filmed[2] == ""
    (head, *lines, last), about = out.splitlines(), json.loads(filmed[1])
    scores, games = about["returns"], list(zip(about["returns"], about["lengths"], strict=True))
    expected = {"env_id": "BriefBoxing-v4", "model": str(path), "episodes": 3, "epsilon": 0.5, "seed": 4}
    expected |= {"median": median(scores), "min": min(scores), "max": max(scores), "different_games": len(set(games))}
    expected |= {"mean": pytest.approx(mean(scores)), "std": pytest.approx(pstdev(scores))}
    assert about == about | expected and about["std"] > 0
    assert head == "{env_id}, epsilon {epsilon}, model {model}".format(**about)
    assert sorted(lines) == [f"game {i}: score {r:g}, {n} steps" for i, (r, n) in enumerate(games, start=1)]
    words = "{episodes} games, {different_games} of them different: mean {mean:.2f}, standard deviation {std:.2f}, "
    assert last == (words + "median {median:g}, min {min:g}, max {max:g}").format(**about)
    _, pictures = read_video("game.gif")
    assert not np.array_equal(pictures[0][:, 480:], pictures[-1][:, 480:])  # thoughts


def test_takes_the_newest_run_then_the_best_breakout_reference(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "clone" / "evaluate.py"))
    for seconds, name in enumerate(("old", "new", "reference")):  # the last is no run
        os.utime(write_model(Path("logs", name, "best_model.pth")), (2e9 + seconds, 2e9 + seconds))
    assert json.loads(run("--json", "--episodes", 1)[1])["model"] == str(Path("logs/new/best_model.pth"))
    os.rename("logs", "moved")
    assert is_error(run(), "train one with python pqn_breakout.py, or name one by --model")
    reference = tmp_path / "clone" / "logs" / "reference"
    write_model(reference / "pong" / "best_model.pth", "PongNoFrameskip-v4", 6, mean_return=500.0)
    write_model(reference / "weak" / "best_model.pth", mean_return=10.0)
    best = write_model(reference / "best_model_2.pth", mean_return=300.0)
    about = json.loads(run("--json", "--episodes", 1)[1])
    assert about["model"] == str(best) and about["epsilon"] == 0.01 and about["seed"] == 1


def test_a_mistake_is_one_clear_line_before_anything_is_played(run, monkeypatch):
    mistakes = ["--episodes 0", "--epsilon nan", "--seed -1", "--show-q", "--model ", "--video ", "--video game.avi"]
    mistakes += ["--video folder.mp4", "--video no/x.gif", "--model no.pth", "--model pong.pth", "--model typo.pth"]
    write_model(Path("pong.pth"), BREAKOUT, actions=6)
    write_model(Path("typo.pth"), "BreakuotNoFrameskip-v4")
    Path("folder.mp4").mkdir()
    monkeypatch.setattr(evaluate, "play", None)
    for mistake in mistakes:
        assert is_error(run(*mistake.split(" ")), mistake.partition("/")[0].split()[-1]), mistake
    assert sorted(os.listdir()) == ["folder.mp4", "logs", "pong.pth", "typo.pth"]


# Resetting the last two, ALE plays frames of its own, a random number of them in the very last.
@pytest.mark.parametrize("env_id", [BREAKOUT, "ALE/Seaquest-v5", "BerzerkNoFrameskip-v4", "ALE/DoubleDunk-v5"])
def test_the_screens_are_what_the_network_sees(env_id):
    seen, rng, total = [], np.random.default_rng(0), 0
    game = Game(env_id, 11, 0, watch=lambda screens, _, action, score, *__: seen.append((screens, action, score)))
    emulator = ale_py.ALEInterface()  # on its own, as far as the environment is after a reset
    emulator.setFloat("repeat_action_probability", game.env.spec.kwargs["repeat_action_probability"])
    emulator.setInt("random_seed", 11)
    emulator.loadROM(ale_py.roms.get_rom_path(game.env.spec.kwargs["game"]))
    emulator.reset_game()
    first = game.env.envs.reset(seed=np.array([11]))[1]["episode_frame_number"][0]
    while emulator.getEpisodeFrameNumber() < first:
        emulator.act(ale_py.Action.NOOP)
    for _ in range(25):
        game.step(rng.random(game.env.action_space.n), 0.0)
        screens, action, score = seen[-1]
        for screen in screens:
            total += emulator.act(game.env.envs.ale.get_action_set()[action])
            assert np.array_equal(screen, emulator.getScreenRGB())
        assert len(screens) == 4 and score == total
        gray = np.max([np.rint(screen @ [0.299, 0.587, 0.114]) for screen in screens[-2:]], axis=0)
        assert np.abs(cv2.resize(gray, (84, 84), interpolation=cv2.INTER_AREA) - game.frames[0, -1]).max() <= 3


def test_games_that_skip_random_numbers_of_frames_show_one_screen_a_step():
    screens, watch = [], lambda new, *_: screens.append(*new)
    ((_, _, steps),) = play(random_network(), brief("Breakout-v4", 150), 1, 1.0, 11, watch=watch)
    assert len(screens) == steps and not np.array_equal(screens[-3], screens[-2])
    assert np.array_equal(screens[-2], screens[-1])  # not the next game


@pytest.mark.parametrize("name, codec, every, scale", [("game.MP4", "h264", 1, 4), ("a:%d/game%d.gif", "gif", 3, 3)])
def test_a_video_has_the_frames_of_all_games(run, monkeypatch, name, codec, every, scale):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # a display, on which there is nothing to show
    Path("a:%d").mkdir()
    code, out, err = run("--episodes", 2, "--seed", 3, "--epsilon", 0, "--video", name)
    assert code == 0 and err == "" and "game 2: " in out and not pygame.display.get_init()
    assert list(Path().rglob("*game*")) == [Path(name)]
    about, pictures = read_video(name)
    assert about["fps"] == 60 / every and about["codec"].startswith(codec)
    lossy = codec == "h264" and "yuv420p" in about["pix_fmt"]  # what every player takes
    screens = (greedy_screens(3) + greedy_screens(4))[::every]
    assert len(screens) == -(-2 * FRAMES // every)
    for picture, screen in list(zip(pictures, screens, strict=True))[::5]:
        pixels = picture.reshape(210, scale, 160, scale, 3)
        assert np.abs(pixels.mean((1, 3)) - screen).mean() <= 2 * lossy
        assert pixels.std((1, 3)).mean() <= lossy  # crisp


def test_bars_show_which_action_is_better_even_of_close_values():
    q = (5 + 0.01 * np.random.default_rng(0).permutation(18) / 18).astype(np.float32)
    picture = Panel(BREAKOUT, ["DOWNRIGHTFIRE"] * 18, 4).draw(840, q, 1, 42, 5, 1)
    bars = picture[184 + 440 * (2 * np.arange(18) + 1) // 36, 220:388]  # a row of pixels through each
    lengths = (bars != picture[0, 0]).any(2).sum(1)
    assert np.array_equal(np.argsort(lengths), np.argsort(q)) and lengths.max() > 160
    assert np.flatnonzero((bars == (255, 180, 84)).all(2).any(1)).tolist() == [q.argmax()]  # the greedy action's color


def test_the_window_shows_every_frame_at_60_a_second_until_it_is_closed(run, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    shown, close = [], pygame.event.Event(pygame.QUIT)
    on_show(monkeypatch, Window, lambda _, picture: shown.append((picture, time.perf_counter())))
    on_show(monkeypatch, Window, lambda number, _: number == FRAMES + 20 and pygame.event.post(close))
    code, out, err = run("--episodes", 3, "--seed", 3, "--epsilon", 0)
    assert code == 0 and err == "" and out.splitlines()[-1].startswith("1 games")
    assert FRAMES + 20 <= len(shown) <= FRAMES + 24  # to the end of the step
    assert shown[60][1] - shown[5][1] > 54 / 60
    for (picture, _), screen in list(zip(shown, greedy_screens(3), strict=False))[::20]:
        assert np.array_equal(picture, screen.repeat(3, 0).repeat(3, 1))


@pytest.mark.parametrize("name, every, number", [("game.mp4", 1, signal.SIGHUP), ("game.gif", 3, signal.SIGTERM)])
def test_a_signal_keeps_what_was_recorded(run, monkeypatch, name, every, number):
    on_show(monkeypatch, Video, lambda pictures, _: pictures == 30 and signal.raise_signal(number))
    code, _, err = run("--video", name)
    assert code == 128 + number and "no game was finished" in err and sorted(os.listdir()) == [name, "logs"]
    assert 30 <= every * len(read_video(name)[1]) <= 34  # to the end of the step


def test_an_encoder_that_fails_is_one_clear_line(run, monkeypatch):
    Path("game.mp4").write_bytes(b"an older video")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    assert is_error(run("--video", "game.mp4", "--json"), "--video game.mp4: ffmpeg failed")
    assert [path.read_bytes() for path in Path().glob("*game*")] == [b"an older video"]


def test_a_video_that_cannot_take_its_place_is_kept_and_named(run, monkeypatch):
    on_show(monkeypatch, Video, lambda pictures, _: pictures == 30 and Path("game.gif").mkdir())
    result = run("--episodes", 1, "--video", "game.gif", "--json")
    (kept,) = Path().absolute().glob(".game*.gif")
    assert is_error(result, f"'{kept}'") and len(read_video(kept)[1]) == 21


def test_a_video_is_finished_when_nobody_reads(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Mock(**{"flush.side_effect": [None] + [OSError("nobody reads")] * 9}))
    assert is_error(run("--episodes", 1, "--video", "broken.mp4"), "nobody reads")
    monkeypatch.setattr(sys, "stdout", None)  # closed
    assert run("--episodes", 1, "--video", "closed.mp4")[0] == 0
    assert sorted(os.listdir()) == ["broken.mp4", "closed.mp4", "logs"]


def test_ctrl_c_in_a_terminal_reaches_the_encoder_too_and_does_no_harm(tmp_path):
    model = write_model(tmp_path / "model.pth", BREAKOUT)
    command = [sys.executable, evaluate.__file__, *f"--model {model} --epsilon 1 --video game.gif".split()]
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONUNBUFFERED": ""}, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **options, start_new_session=True)
    lines = [process.stdout.readline() for _ in range(2)]  # the heading and the first game
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and lines[1].startswith("game 1") and out.startswith("1 games, ")
    assert sorted(os.listdir(tmp_path)) == ["game.gif", "model.pth"]
    assert len(read_video(tmp_path / "game.gif")[1]) > 400 / 3
