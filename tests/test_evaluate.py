"""evaluate.py: whole games with true scores, whatever else runs beside them, and one clear line for each mistake."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import ale_py
import cv2
import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pygame
import pytest
import torch
from PIL import Image

import evaluate
from evaluate import Game, Panel, Video, Window, play
from pqn_breakout import QNetwork, make_env, run_command, save

BREAKOUT = "BreakoutNoFrameskip-v4"


def brief(env_id: str, frames: int) -> str:
    """The id of the same game, cut off after so many frames."""
    kwargs = gym.registry[env_id].kwargs | {"max_num_frames_per_episode": frames}
    gym.register(f"Brief{env_id}", entry_point="ale_py.env:AtariEnv", kwargs=kwargs)
    return f"Brief{env_id}"


BRIEF = brief(BREAKOUT, 90)


def random_network(actions: int = 4) -> QNetwork:
    torch.manual_seed(3)
    network = QNetwork(actions)
    torch.nn.init.normal_(network.fc2.weight, std=0.05)
    return network


def write_model(path: Path, env_id: str = BRIEF, actions: int = 4, mean_return: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, {"env_id": env_id, "mean_return": mean_return, "network": random_network(actions).state_dict()})
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "best_model.pth"))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the program in an empty folder without a display; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
        stdout = sys.stdout
        with pytest.raises(SystemExit) as stopped:
            run_command(evaluate.main)
        sys.stdout = stdout
        code, (out, err) = stopped.value.code, capsys.readouterr()
        return (code, out, err) if isinstance(code, int) else (1, out, f"{err}{code}\n")

    yield run
    pygame.display.quit()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read_mp4(path) -> tuple[dict, np.ndarray]:
    frames = imageio_ffmpeg.read_frames(str(path))
    about = next(frames)
    width, height = about["size"]
    return about, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames])


def read_gif(path) -> tuple[set[int], np.ndarray]:
    """Milliseconds of the frames, and their pictures."""
    with Image.open(path) as image:
        frames = [
            (image.seek(i), image.info["duration"], np.asarray(image.convert("RGB"))) for i in range(image.n_frames)
        ]
    return {delay for _, delay, _ in frames}, np.stack([picture for *_, picture in frames])


def screens_of(env_id: str, seed: int, network: QNetwork) -> tuple[list[np.ndarray], float, int]:
    screens = []
    ((_, score, steps),) = play(network, env_id, 1, 0.0, seed, watch=lambda new, *_: screens.extend(new))
    return screens, score, steps


def test_a_game_does_not_depend_on_the_games_beside_it(monkeypatch):
    seen, send = {}, Game.send

    def note(game, q, epsilon):
        send(game, q, epsilon)
        seen.setdefault(game.number, []).append((q.tobytes(), int(game.action[0])))

    monkeypatch.setattr(Game, "send", note)
    courses = []
    for options in ({"watch": lambda *_: None}, {"groups": 1}):  # one, or four at a time
        seen.clear()
        games = sorted(play(random_network(), BRIEF, 6, 0.2, 7, **options))
        courses.append((games, dict(seen)))
    assert [number for number, _, _ in courses[0][0]] == list(range(6))
    assert courses[0] == courses[1]
    assert len({tuple(values) for values in courses[0][1].values()}) == 6  # every game draws for itself


def test_scores_are_those_of_whole_games_played_by_hand():
    network, hand = random_network(), []
    for seed in (4, 5):
        env, lost = make_env(BREAKOUT, 1, seed), 0
        frames, info = env.reset(), {}
        while "episode" not in info:
            with torch.no_grad():
                action = network(torch.from_numpy(frames)).numpy().argmax(1)
            frames, _, (done,), (info,) = env.step(action)
            lost += done
        assert lost == 5  # lives
        hand.append((seed - 4, info["episode"]["r"], info["episode"]["l"]))
    assert sorted(play(network, BREAKOUT, 2, 0.0, 4)) == hand


def test_prints_each_game_and_the_statistics(run, tmp_path):
    model = write_model(tmp_path / "model.pth", brief("SpaceInvadersNoFrameskip-v4", 400), 6)
    options = ("--model", model, "--episodes", 4, "--seed", 2, "--epsilon")
    code, out, err = run(*options, 0.5)
    about = json.loads(run(*options, 0.5, "--json")[1])
    assert code == 0 and err == ""
    head, *lines, last = out.splitlines()
    assert about["env_id"] in head and str(model) in head and "0.5" in head
    pairs = list(zip(about["returns"], about["lengths"], strict=True))
    assert sorted(lines) == [f"game {i}: score {r:g}, {n} steps" for i, (r, n) in enumerate(pairs, start=1)]
    assert about["mean"] == pytest.approx(statistics.mean(about["returns"])) and f"mean {about['mean']:.2f}" in last
    assert about["std"] == pytest.approx(statistics.pstdev(about["returns"])) and f"{about['std']:.2f}" in last
    assert f"median {about['median']:g}, min {about['min']:g}, max {about['max']:g}" in last
    assert about["different_games"] == len(set(pairs)) and f"{len(set(pairs))} of them different" in last


def test_a_full_device_is_one_clear_line(tmp_path):
    command = [sys.executable, evaluate.__file__, "--model", write_model(tmp_path / "model.pth", BREAKOUT)]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--render", "none"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


def test_takes_the_newest_run_then_the_best_breakout_reference(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "clone" / "evaluate.py"))
    code, out, err = run()
    assert code == 1 and out == "" and err.count("\n") == 1 and "python pqn_breakout.py" in err and "--model" in err
    reference = tmp_path / "clone" / "logs" / "reference"
    write_model(reference / "pong" / "best_model.pth", "PongNoFrameskip-v4", 6, mean_return=500.0)
    write_model(reference / "weak" / "best_model.pth", mean_return=10.0)
    best = write_model(reference / "best_model_2.pth", mean_return=300.0)
    about = json.loads(run("--json", "--episodes", 1)[1])
    assert about["model"] == str(best) and about["epsilon"] == 0.01 and about["seed"] == 1

    for age, name in enumerate(("new", "old", "reference")):
        path = write_model(tmp_path / "logs" / name / "best_model.pth")
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "logs" / "reference" / "best_model.pth")  # the newest of all, but not a run
    assert json.loads(run("--json", "--episodes", 1)[1])["model"] == str(Path("logs/new/best_model.pth"))


@pytest.mark.parametrize("kind", ["missing", "device", "of Pong", "of no game", "not finite"])
def test_a_bad_model_is_one_clear_line(run, tmp_path, kind):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "bad.pth"
    if kind == "of Pong":
        write_model(path, BREAKOUT, actions=6)
    elif kind == "of no game":
        write_model(path, "BreakuotNoFrameskip-v4")
    elif kind == "not finite":
        state = random_network().state_dict()
        state["fc2.bias"][1] = torch.nan
        save(path, {"env_id": BRIEF, "mean_return": 1.0, "network": state})
    code, out, err = run("--model", path, "--video", "game.mp4")
    assert code == 1 and out == "" and err.count("\n") == 1 and err.startswith(f"evaluate.py: error: {path}: ")
    assert kind != "of no game" or "BreakoutNoFrameskip-v4" in err
    assert set(os.listdir()) <= {"bad.pth"}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--episodes", "0"], ["--episodes 0", "from 1"]),
        (["--epsilon", "nan"], ["--epsilon nan", "from 0 to 1"]),
        (["--show-q"], ["--show-q", "--video"]),
        (["--model", ""], ["--model", "empty"]),
        (["--video", ""], ["--video", "empty"]),
        (["--video", "game.avi"], ["--video game.avi", ".mp4 or .gif"]),
        (["--video", "folder.mp4"], ["--video folder.mp4", "file"]),
        (["--video", "none/game.mp4"], ["none", "No such file or directory"]),
        (["--video", "model.txt/game.gif"], ["model.txt", "Not a directory"]),
        (["--video", "x" * 300 + ".gif"], ["xxx", "File name too long"]),
        (["--loud"], ["--loud", "--help"]),
    ],
)
def test_a_bad_option_is_one_clear_line_before_anything_is_played(run, model, tmp_path, monkeypatch, options, words):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "model.txt").touch()
    monkeypatch.setattr(evaluate, "play", None)
    before = sorted(tmp_path.iterdir())
    code, out, err = run(*(() if "--model" in options else ("--model", model)), *options)
    assert code == 1 and out == "" and err.count("\n") == 1 and err.startswith("evaluate.py: error: ")
    assert all(word in err for word in words)
    assert sorted(tmp_path.iterdir()) == before


# Resetting the last three, ALE plays frames of its own, a random number of them in the very last.
GAMES = "ALE/Seaquest-v5", "NameThisGameNoFrameskip-v4", "BerzerkNoFrameskip-v4", "ALE/DoubleDunk-v5"


@pytest.mark.parametrize("env_id", [BRIEF, *GAMES])
def test_the_screens_are_what_the_network_sees(env_id):
    screens, scores = [], []
    rng = np.random.default_rng(0)
    game = Game(env_id, 11, 0, watch=lambda new, q, action, score, *_: (screens.append(new), scores.append(score)))
    kwargs = game.env.spec.kwargs
    emulator = ale_py.ALEInterface()  # on its own, as far as the environment is after a reset
    emulator.setFloat("repeat_action_probability", kwargs["repeat_action_probability"])
    emulator.setInt("random_seed", 11)
    emulator.loadROM(ale_py.roms.get_rom_path(kwargs["game"]))
    emulator.reset_game()
    first = game.env.envs.reset(seed=np.array([11]))[1]["episode_frame_number"][0]
    while emulator.getEpisodeFrameNumber() < first:
        emulator.act(ale_py.Action.NOOP)
    score, episode = 0, None
    for _ in range(25):
        game.send(rng.random(game.env.action_space.n).astype(np.float32), 0.0)
        episode = game.wait()
        if episode:
            break
        for screen in screens[-1]:
            score += emulator.act(game.env.envs.ale.get_action_set()[game.env.actions[0]])
            assert np.array_equal(screen, emulator.getScreenRGB())
        gray = np.max([np.rint(screen @ [0.299, 0.587, 0.114]) for screen in screens[-1][-2:]], axis=0)
        mine = cv2.resize(gray.astype(np.uint8), (84, 84), interpolation=cv2.INTER_AREA)
        assert np.abs(mine.astype(int) - game.frames[0, -1]).max() <= 3 and scores[-1] == score
    assert {len(new) for new in screens[:-1]} == {4}
    assert (env_id == BRIEF) == bool(episode) and len(screens[-1]) == (2 if episode else 4)


def test_games_that_skip_random_numbers_of_frames_show_one_screen_a_step():
    screens, episode = [], None
    game = Game("Breakout-v4", 11, 0, watch=lambda new, *_: screens.append(new))
    while not episode:
        game.send(np.zeros(4, dtype=np.float32), 1.0)
        episode = game.wait()
        if not episode:
            gray = cv2.resize(cv2.cvtColor(screens[-1][0], cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)
            assert np.abs(gray.astype(int) - game.frames[0, -1]).max() <= 3
    assert len(screens) == game.steps and {len(new) for new in screens} == {1}
    assert np.array_equal(screens[-1], screens[-2])


def test_mp4_has_every_frame_at_60_a_second_with_crisp_pixels(model, run, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")  # a display, on which there is nothing to show
    code, out, err = run("--model", model, "--episodes", 1, "--seed", 3, "--video", "game.MP4", "--epsilon", 0)
    screens, score, steps = screens_of(BRIEF, 3, random_network())
    assert code == 0 and err == "" and f"game 1: score {score:g}, {steps} steps" in out
    assert not pygame.display.get_init()
    video, frames = read_mp4("game.MP4")
    assert video["fps"] == 60 and video["codec"] == "h264" and "yuv420p" in video["pix_fmt"]
    assert frames.shape == (len(screens), 840, 640, 3) and len(screens) == 90
    blocks = frames.reshape(-1, 210, 4, 160, 4, 3)
    for i in (0, 50, 89):
        assert np.abs(blocks[i].mean((1, 3)) - screens[i]).mean() < 2  # the picture, colours included
        assert blocks[i].std((1, 3)).mean() < 1
    assert os.listdir() == ["game.MP4"]


def test_gif_has_every_third_frame_at_20_a_second_exactly_in_a_folder_of_any_name(model, run):
    Path("a:%d").mkdir()
    run("--model", model, "--episodes", 2, "--seed", 3, "--video", "a:%d/game%d.gif", "--epsilon", 0)
    both = [screen for seed in (3, 4) for screen in screens_of(BRIEF, seed, random_network())[0]]
    delays, frames = read_gif("a:%d/game%d.gif")
    assert delays == {50} and len(frames) == -(-len(both) // 3)
    for frame, screen in zip(frames, both[::3], strict=True):
        assert np.array_equal(frame, screen.repeat(3, 0).repeat(3, 1))
    assert os.listdir("a:%d") == ["game%d.gif"]


def test_json_is_alone_on_stdout_and_the_same_with_and_without_pictures(run, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    path = write_model(tmp_path / "model.pth", brief("Boxing-v4", 200), 18)
    options = ("--model", path, "--episodes", 2, "--epsilon", 0.5, "--json")
    _, plain, _ = run(*options)
    _, filmed, _ = run(*options, "--video", "game.gif", "--show-q")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    _, shown, _ = run(*options, "--render", "human", "--show-q")
    assert plain == filmed == shown and json.loads(plain)["max"] > 0
    _, thoughts = read_gif("game.gif")
    assert thoughts.shape[2] > 480 and not np.array_equal(thoughts[0, :, 480:], thoughts[-1, :, 480:])


def test_bars_show_which_action_is_better_even_of_close_values():
    q = (5 + 0.01 * np.random.default_rng(0).permutation(18) / 18).astype(np.float32)
    picture = Panel(BREAKOUT, ["DOWNRIGHTFIRE"] * 18, 4).draw(840, q, 1, 42, 5, 1)
    middles = (46 * 4 + (np.arange(18) + 0.5) * 4 * 110 / 18).astype(int)
    bars = picture[middles, 220:388]
    lengths = (bars != picture[0, 0]).any(2).sum(1)
    assert np.array_equal(np.argsort(lengths), np.argsort(q)) and lengths.max() > 160
    assert np.flatnonzero((bars == (255, 180, 84)).all(2).any(1)).tolist() == [q.argmax()]  # the greedy action's color
    assert (picture[middles[0] : middles[-1], 216] == picture[0, 0]).all()  # between names and bars


def test_the_window_shows_every_frame_at_60_a_second_until_it_is_closed(model, run, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    screens, score, _ = screens_of(BRIEF, 3, random_network())
    show, shown, times = Window.show, [], []

    def note_and_close_in_the_second_game(window, picture):
        shown.append(picture)
        times.append(time.perf_counter())
        if len(shown) == len(screens) + 50:
            pygame.event.post(pygame.event.Event(pygame.QUIT))
        show(window, picture)

    monkeypatch.setattr(Window, "show", note_and_close_in_the_second_game)
    code, out, err = run("--model", model, "--episodes", 3, "--seed", 3, "--epsilon", 0)
    assert code == 0 and err == "" and f"game 1: score {score:g}" in out
    assert out.splitlines()[-1].startswith("1 games") and len(screens) + 50 <= len(shown) < len(screens) + 54
    assert times[80] - times[5] > 74 / 60
    for picture, screen in zip(shown[:90:20], screens[::20], strict=True):
        assert np.array_equal(picture, screen.repeat(3, 0).repeat(3, 1))


def at_picture_50(monkeypatch, action) -> None:
    show = Video.show
    monkeypatch.setattr(Video, "show", lambda video, new: (show(video, new), video.frames == 50 and action()))


@pytest.mark.parametrize("ending, number", [("mp4", signal.SIGHUP), ("gif", signal.SIGTERM)])
def test_a_signal_keeps_what_was_recorded(model, run, monkeypatch, ending, number):
    at_picture_50(monkeypatch, lambda: signal.raise_signal(number))
    code, _, err = run("--model", model, "--video", f"game.{ending}")
    assert code == 128 + number and "no game was finished" in err
    assert os.listdir() == [f"game.{ending}"]
    frames = len(read_mp4("game.mp4")[1]) if ending == "mp4" else 3 * len(read_gif("game.gif")[1])
    assert 50 <= frames <= 54  # to the end of the step


def test_an_encoder_that_fails_is_one_clear_line(model, run, monkeypatch):
    Path("game.mp4").write_bytes(b"an older video")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    code, _, err = run("--model", model, "--video", "game.mp4", "--json")
    assert code == 1 and err.count("\n") == 1 and "--video game.mp4: ffmpeg failed" in err
    assert [path.read_bytes() for path in Path().iterdir()] == [b"an older video"]


def test_a_video_that_cannot_take_its_place_is_kept_and_named(model, run, monkeypatch):
    at_picture_50(monkeypatch, Path("game.gif").mkdir)
    code, _, err = run("--model", model, "--episodes", 1, "--video", "game.gif")
    (kept,) = Path().absolute().glob(".game*.gif")
    assert code == 1 and err.count("\n") == 1 and f"'{kept}'" in err and len(read_gif(kept)[1]) == 30


def test_ctrl_c_in_a_terminal_reaches_the_encoder_too_and_does_no_harm(tmp_path):
    model = write_model(tmp_path / "model.pth", BREAKOUT)
    command = [sys.executable, evaluate.__file__, "--model", model, "--episodes", "999", "--video", "game.mp4"]
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([*command, "--epsilon", "1"], **options)
    lines = [process.stdout.readline() for _ in range(2)]  # the heading and the first game
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and lines[1].startswith("game 1") and "1 games, 1 of them different" in out
    assert sorted(os.listdir(tmp_path)) == ["game.mp4", "model.pth"]
    assert len(read_mp4(tmp_path / "game.mp4")[1]) > 400
