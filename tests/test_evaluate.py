"""evaluate.py: whole games with true scores, whatever else runs beside them, and one clear line for each mistake."""

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import statistics
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from evaluate import Game, Panel, Replay, Window, play
from pqn_breakout import QNetwork, make_env, write_file

BREAKOUT = "BreakoutNoFrameskip-v4"


def brief(env_id: str, frames: int) -> str:
    """The id of the same game, cut off after so many frames."""
    kwargs = gym.registry[env_id].kwargs | {"max_num_frames_per_episode": frames}
    name = f"Brief{env_id.rpartition('/')[2]}"
    gym.register(name, entry_point="ale_py.env:AtariEnv", kwargs=kwargs)
    return name


BRIEF = brief(BREAKOUT, 122)


def random_network(actions: int = 4) -> QNetwork:
    torch.manual_seed(3)
    network = QNetwork(actions)
    torch.nn.init.normal_(network.fc2.weight, std=0.05)
    return network


def write_model(path: Path, env_id: str = BRIEF, actions: int = 4, mean_return: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = random_network(actions).state_dict()
    about = {"env_id": env_id, "num_actions": actions, "global_step": 0, "mean_return": mean_return}
    write_file(path, about | {"network": state})
    return path


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model") / "best_model.pth"))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Calls `main` in an empty folder without a display; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            evaluate.main()
        code, (out, err) = stopped.value.code, capsys.readouterr()
        return (code, out, err) if isinstance(code, int) else (1, out, f"{err}{code}\n")

    yield run
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def read_mp4(path) -> tuple[dict, np.ndarray]:
    frames = imageio_ffmpeg.read_frames(str(path))
    about = next(frames)
    width, height = about["size"]
    return about, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames])


def read_gif(path) -> tuple[list[int], np.ndarray]:
    """Milliseconds and pictures of the frames."""
    with Image.open(path) as image:
        pictures, delays = [], []
        for i in range(image.n_frames):
            image.seek(i)
            delays.append(image.info["duration"])
            pictures.append(np.asarray(image.convert("RGB")))
    return delays, np.stack(pictures)


def screens_of(env_id: str, seed: int, network: QNetwork) -> tuple[list[np.ndarray], float, int]:
    """Every screen of a greedy game, its score and its steps."""
    screens = []
    ((_, score, steps),) = play(network, env_id, 1, 0.0, seed, [], watch=lambda new, *_: screens.extend(new))
    return screens, score, steps


# --- Games and scores -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_a_game_does_not_depend_on_the_games_beside_it(monkeypatch, epsilon):
    torch.set_num_threads(1)
    seen = {}
    send = Game.send

    def note(game, q, epsilon):
        seen.setdefault(game.number, []).append(q.tobytes())
        send(game, q, epsilon)

    monkeypatch.setattr(Game, "send", note)
    courses = []
    for options in ({"watch": lambda *_: None}, {"groups": 2}):  # one, or eight at a time
        seen.clear()
        games = sorted(play(random_network(), BRIEF, 6, epsilon, 7, [], **options))
        courses.append((games, dict(seen)))
    assert [number for number, _, _ in courses[0][0]] == [0, 1, 2, 3, 4, 5]
    assert courses[0] == courses[1]
    assert len({tuple(values) for values in courses[0][1].values()}) > 1


def test_scores_are_those_of_whole_games_played_by_hand():
    network, hand = random_network(), []
    for seed in (4, 5, 6):
        env, lost = make_env(BREAKOUT, 1, seed), 0
        frames, info = env.reset(), {}
        while "episode" not in info:
            with torch.no_grad():
                action = network(torch.from_numpy(frames)).numpy().argmax(1)
            frames, _, (done,), (info,) = env.step(action)
            lost += done
        env.close()
        assert lost == 5  # lives
        hand.append((seed - 4, info["episode"]["r"], info["episode"]["l"]))
    assert sorted(play(network, BREAKOUT, 3, 0.0, 4, [])) == hand


def test_epsilon_1_plays_at_random(run, tmp_path):
    model = write_model(tmp_path / "model.pth", BREAKOUT)
    (_, greedy, _), (_, first, _), (_, again, _) = (
        run("--model", model, "--json", "--episodes", 4, "--epsilon", epsilon) for epsilon in (0, 1, 1)
    )
    assert first == again
    assert json.loads(first)["lengths"] != json.loads(greedy)["lengths"]


def test_every_game_draws_actions_of_its_own():
    games, q = [Game(BRIEF, 1, number) for number in (0, 1)], np.zeros(4)
    drawn = [[], []]
    for _ in range(20):
        for game, actions in zip(games, drawn, strict=True):
            game.send(q, 1.0)
            game.wait()
            actions.append(int(game.action[0]))
    assert drawn[0] != drawn[1]


def test_prints_each_game_and_the_statistics(model, run):
    code, out, err = run("--model", model, "--episodes", 3, "--seed", 2, "--render", "none", "--epsilon", 0.5)
    _, blob, _ = run("--model", model, "--episodes", 3, "--seed", 2, "--json", "--epsilon", 0.5)
    about = json.loads(blob)
    assert code == 0 and err == ""
    head, *lines, last = out.splitlines()
    assert BRIEF in head and model in head and "0.5" in head
    pairs = zip(about["returns"], about["lengths"], strict=True)
    assert sorted(lines) == [f"game {i}: score {r:g}, {n} steps" for i, (r, n) in enumerate(pairs, start=1)]
    assert f"mean {about['mean']:.2f}" in last and f"standard deviation {about['std']:.2f}" in last
    assert f"median {about['median']:g}, min {about['min']:g}, max {about['max']:g}" in last


def test_a_terminal_counts_the_steps_below_the_finished_games(tmp_path):
    model = write_model(tmp_path / "model.pth", BREAKOUT)
    command = [sys.executable, evaluate.__file__, "--model", model, "--episodes", "1", "--epsilon", "0.3"]
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with subprocess.Popen([*command, "--render", "none"], stdin=writing, stdout=writing, stderr=writing):
        os.close(writing)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while True:
                shown += os.read(reading, 4096)
    os.close(reading)
    counts = [int(count) for count in re.findall(r"\r(\d+) steps \[", shown.decode())]
    (steps,) = re.findall(r"\rgame 1: score \d+, (\d+) steps\r\n", shown.decode())
    assert counts == sorted(counts) and 0 < counts[-1] <= int(steps)


def test_json_is_alone_on_stdout(tmp_path):
    model = str(write_model(tmp_path / "model.pth", BREAKOUT))
    hurry = "import evaluate, time; time.sleep = lambda _: None; evaluate.main()"
    command = [sys.executable, "-c", hurry, "--model", model, "--json", "--episodes", "2", "--epsilon", "0.3"]
    display = os.environ | {"SDL_VIDEODRIVER": "dummy", "PYTHONPATH": str(Path(evaluate.__file__).parent)}
    options = {"cwd": tmp_path, "env": display, "capture_output": True, "text": True, "check": True}
    done = subprocess.run([*command, "--render", "human", "--show-q"], **options)
    about = json.loads(done.stdout)
    assert about["env_id"] == BREAKOUT and about["model"] == model and about["episodes"] == 2
    assert about["epsilon"] == 0.3 and about["seed"] == 1
    assert len(about["returns"]) == len(about["lengths"]) == 2
    assert about["mean"] == pytest.approx(statistics.mean(about["returns"]))
    assert about["std"] == pytest.approx(statistics.pstdev(about["returns"]))


# --- Which model ------------------------------------------------------------------------------------------------------


def test_takes_the_newest_run_then_the_best_breakout_reference(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "clone" / "evaluate.py"))
    reference = tmp_path / "clone" / "logs" / "reference"
    write_model(reference / "pong" / "best_model.pth", "PongNoFrameskip-v4", 6, mean_return=500.0)
    write_model(reference / "weak" / "best_model.pth", mean_return=10.0)
    best = write_model(reference / "best_model_2.pth", mean_return=300.0)
    chosen = json.loads(run("--json", "--episodes", 1)[1])["model"]
    assert chosen == str(best)

    for age, name in enumerate(("new", "old", "reference")):
        path = write_model(tmp_path / "logs" / name / "best_model.pth")
        os.utime(path, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "logs" / "reference" / "best_model.pth")  # the newest of all, but not a run
    assert json.loads(run("--json", "--episodes", 1)[1])["model"] == str(Path("logs/new/best_model.pth"))


def test_without_any_model_it_says_how_to_train_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "evaluate.py"))
    code, out, err = run()
    assert code == 1 and out == "" and err.count("\n") == 1
    assert "python pqn_breakout.py" in err and "--model" in err


# --- Mistakes ---------------------------------------------------------------------------------------------------------


class Malice:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def write_bad_models(folder: Path, good: str) -> None:
    whole = Path(good).read_bytes()
    (folder / "text.pth").write_text("no model")
    (folder / "empty.pth").write_bytes(b"")
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.save(random_network().state_dict(), folder / "weights.pth")
    torch.save({"version": 1, "env_id": Malice(), "network": {}}, folder / "malice.pth")
    write_model(folder / "pong.pth", actions=6)
    write_model(folder / "gone.pth", "BreakuotNoFrameskip-v4")
    write_file(folder / "other.pth", {"env_id": BRIEF, "network": {"weight": torch.zeros(3)}})


@pytest.mark.parametrize(
    "name, words",
    [
        ("missing", ["No such file"]),
        ("text", ["not a file of this program"]),
        ("empty", ["not a file of this program"]),
        ("cut", ["damaged"]),
        ("weights", ["not a file of this program"]),
        ("malice", ["not a file of this program"]),
        ("pong", ["another network", BRIEF, "4 actions"]),
        ("other", ["another network", BRIEF]),
        ("gone", ["BreakuotNoFrameskip-v4", "BreakoutNoFrameskip-v4"]),
    ],
)
def test_a_bad_model_is_one_clear_line(run, model, tmp_path, name, words):
    write_bad_models(tmp_path, model)
    before = sorted(tmp_path.iterdir())
    code, out, err = run("--model", f"{name}.pth", "--video", "game.mp4")
    assert code == 1 and out == "" and err.count("\n") == 1
    assert err.startswith(f"evaluate.py: error: {name}.pth: ")
    assert all(word in err for word in words)
    assert sorted(tmp_path.iterdir()) == before  # nothing written, and no code of the file executed


@pytest.mark.parametrize(
    "options, words",
    [
        (["--episodes", "0"], ["--episodes 0", "positive"]),
        (["--episodes", "many"], ["--episodes", "many"]),
        (["--epsilon", "1.5"], ["--epsilon 1.5", "between 0 and 1"]),
        (["--epsilon", "nan"], ["--epsilon nan", "between 0 and 1"]),
        (["--seed", "-1"], ["--seed -1", "between 0 and"]),
        (["--seed", str(2**31)], [f"--seed {2**31}", "between 0 and"]),
        (["--device", "abacus"], ["--device abacus", "cpu"]),
        (["--render", "loud"], ["--render", "human"]),
        (["--render", "human"], ["--render human", "no display"]),
        (["--show-q"], ["--show-q", "--video"]),
        (["--show-q", "--render", "none"], ["--show-q", "--video"]),
        (["--video", "game.avi"], ["--video game.avi", ".mp4 or .gif"]),
        (["--video", "game"], ["--video game", ".mp4 or .gif"]),
        (["--video", "folder.mp4"], ["--video folder.mp4", "folder"]),
        (["--video", "none/game.mp4"], ["--video none/game.mp4", "none", "No such file or directory"]),
        (["--video", "model.txt/game.gif"], ["--video model.txt/game.gif", "Not a directory"]),
        (["--loud"], ["--loud", "--help"]),
    ],
)
def test_a_bad_option_is_one_clear_line_before_anything_is_played(run, model, tmp_path, monkeypatch, options, words):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "model.txt").touch()
    monkeypatch.setattr(evaluate, "play", None)
    before = sorted(tmp_path.iterdir())
    code, out, err = run("--model", model, *options)
    *notes, error = err.splitlines()
    assert code == 1 and out == "" and error.startswith("evaluate.py: error: ")
    assert all("without a window" in note for note in notes)
    assert all(word in error for word in words)
    assert sorted(tmp_path.iterdir()) == before


# --- Pictures: the very games that are scored -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id, pooled",
    [
        (BREAKOUT, 2),
        ("ALE/Breakout-v5", 2),
        ("SeaquestNoFrameskip-v0", 2),
        (BRIEF, 2),
        ("Breakout-v4", 1),
    ],
)
def test_the_screens_are_what_the_network_sees(env_id, pooled):
    screens, shown = [], []
    rng = np.random.default_rng(0)
    game = Game(env_id, 11, 0, watch=lambda new, *_: (screens.extend(new), shown.append(len(new))))
    actions = game.env.action_space.n
    start, episode = game.env.unwrapped.reset_infos[0]["episode_frame_number"], None
    while not episode:
        game.send(rng.random(actions).astype(np.float32), 0.0)
        episode = game.wait()
        if not episode:
            # 0.299 R + 0.587 G + 0.114 B, pooled and resized: the environment's own picture, but for rounding.
            gray = np.max([screen @ [0.299, 0.587, 0.114] for screen in screens[-pooled:]], axis=0)
            rows, columns = (np.linspace(0, size, 85) for size in gray.shape)
            sums = np.pad(gray, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
            sums = interpolate(interpolate(sums, rows).T, columns).T
            area = np.outer(np.diff(rows), np.diff(columns))
            mine = np.diff(np.diff(sums, axis=0), axis=1) / area
            assert np.abs(mine - game.frames[0, -1]).max() < 3
    game.env.close()
    assert 1 <= shown[-1] <= 4
    if pooled == 2:
        assert shown[0] == start + 4 and set(shown[1:-1]) == {4}
    else:
        assert shown[0] in (start + 2, start + 3, start + 4) and set(shown[1:-1]) == {2, 3, 4}


def interpolate(table: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Rows of `table` at the fractional places `at`."""
    below = np.minimum(at.astype(int), len(table) - 2)
    part = (at - below)[:, None]
    return (1 - part) * table[below] + part * table[below + 1]


def test_another_game_on_the_screen_would_be_noticed():
    game = Game("ALE/SpaceInvaders-v5", 5, 0, watch=lambda *_: None)
    game.screens = Replay(game.env, 6)  # other sticky actions
    rng = np.random.default_rng(0)
    with pytest.raises(RuntimeError, match="not the game that is scored"):
        while True:
            game.send(rng.random(6), 0.0)
            assert not game.wait()
    game.env.close()


def test_mp4_has_every_frame_at_60_a_second_with_crisp_pixels(model, run):
    code, out, err = run("--model", model, "--episodes", 1, "--seed", 3, "--video", "game.MP4", "--json")
    screens, score, steps = screens_of(BRIEF, 3, random_network())
    about = json.loads(out)
    assert code == 0 and about["returns"] == [score] and about["lengths"] == [steps]
    video, frames = read_mp4("game.MP4")
    assert video["fps"] == 60 and video["codec"] == "h264" and "yuv420p" in video["pix_fmt"]
    assert frames.shape == (len(screens), 840, 640, 3)
    blocks = frames.reshape(-1, 210, 4, 160, 4, 3)
    for i in (0, 50, len(screens) - 1):
        assert np.abs(blocks[i].mean((1, 3)) - screens[i]).mean() < 2  # the picture, colours included
        assert blocks[i].std((1, 3)).mean() < 1
    assert os.listdir() == ["game.MP4"]


def test_gif_has_every_third_frame_at_20_a_second_exactly(model, run):
    code, _, _ = run("--model", model, "--episodes", 2, "--seed", 3, "--video", "game.gif")
    both = [screen for seed in (3, 4) for screen in screens_of(BRIEF, seed, random_network())[0]]
    delays, frames = read_gif("game.gif")
    assert code == 0 and set(delays) == {50} and len(delays) == -(-len(both) // 3)
    for frame, screen in zip(frames, both[::3], strict=True):
        assert np.array_equal(frame, screen.repeat(3, 0).repeat(3, 1))
    assert os.listdir() == ["game.gif"]


@pytest.mark.parametrize("env_id", [brief("ALE/SpaceInvaders-v5", 300), brief("SpaceInvaders-v4", 300)])
def test_scores_are_the_same_with_and_without_pictures(run, tmp_path, monkeypatch, env_id):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    path = write_model(tmp_path / "model.pth", env_id, 6)
    options = ("--model", path, "--episodes", 2, "--epsilon", 0.5, "--json")
    _, plain, _ = run(*options)
    _, filmed, _ = run(*options, "--video", "game.gif", "--show-q")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    _, shown, _ = run(*options, "--render", "human", "--show-q")
    assert plain == filmed == shown and json.loads(plain)["max"] > 0


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_show_q_draws_beside_the_picture(model, run, ending):
    run("--model", model, "--episodes", 1, "--video", f"plain.{ending}")
    run("--model", model, "--episodes", 1, "--video", f"thoughts.{ending}", "--show-q")
    read = read_mp4 if ending == "mp4" else read_gif
    (_, plain), (_, thoughts) = read(f"plain.{ending}"), read(f"thoughts.{ending}")
    assert len(plain) == len(thoughts) and thoughts.shape[2] > plain.shape[2]
    assert np.abs(thoughts[::20, :, : plain.shape[2]].astype(int) - plain[::20]).mean() < 1
    side = thoughts[:, :, plain.shape[2] :]
    assert side[0].std() > 5 and not np.array_equal(side[0], side[-1])


@pytest.mark.parametrize("unit", [3, 4])
@pytest.mark.parametrize("names", [["NOOP", "FIRE", "RIGHT", "LEFT"], ["DOWNRIGHTFIRE"] * 18])
def test_bars_show_which_action_is_better_even_of_close_values(unit, names):
    panel = Panel(BREAKOUT, names, unit)
    rng = np.random.default_rng(0)
    q = (5 + 0.01 * rng.permutation(len(names)) / len(names)).astype(np.float32)
    picture = panel.draw(210 * unit, q, 1, 42, 5, 1)
    assert picture.shape == (210 * unit, 124 * unit, 3) and picture.dtype == np.uint8
    row = min(11 * unit, 110 * unit // len(names))
    lengths = []
    background, accent = (picture == picture[0, 0]).all(2), (picture == (255, 180, 84)).all(2)
    for i in range(len(names)):
        middle = 52 * unit + i * row + row // 2
        lengths.append((~background[middle, 55 * unit : 97 * unit]).sum())
        assert accent[middle, 55 * unit : 97 * unit].any() == (i == q.argmax())
        assert background[52 * unit + i * row : 52 * unit + (i + 1) * row, 54 * unit].all()  # between name and bar
    assert np.array_equal(np.argsort(lengths), np.argsort(q))
    assert max(lengths) > 40 * unit


# --- Window -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dummy_window(monkeypatch):
    """A display without a screen, at any speed; the list has the pictures that were shown."""
    pygame = pytest.importorskip("pygame")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    shown, show = [], Window.show

    def note(window, picture):
        shown.append(picture)
        return show(window, picture)

    monkeypatch.setattr(Window, "show", note)
    yield shown
    pygame.display.quit()


def test_the_window_shows_every_frame(model, run, monkeypatch, dummy_window):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    code, out, err = run("--model", model, "--episodes", 1, "--seed", 3)
    screens, score, _ = screens_of(BRIEF, 3, random_network())
    assert code == 0 and err == "" and f"game 1: score {score:g}" in out
    assert len(dummy_window) == len(screens)
    for picture, screen in zip(dummy_window[::20], screens[::20], strict=True):
        scale = len(picture) // 210  # smaller on a small display
        assert scale in (3, 4) and np.array_equal(picture, screen.repeat(scale, 0).repeat(scale, 1))


def test_closing_the_window_ends_it_with_the_scores_so_far(model, run, monkeypatch, dummy_window):
    import pygame

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    first = len(screens_of(BRIEF, 1, random_network())[0])
    flip = pygame.display.flip

    def close_in_the_second_game():
        flip()
        if len(dummy_window) == first + 50:
            pygame.event.post(pygame.event.Event(pygame.QUIT))

    monkeypatch.setattr(pygame.display, "flip", close_in_the_second_game)
    code, out, _ = run("--model", model, "--episodes", 3, "--render", "human")
    assert code == 0 and len(dummy_window) == first + 50
    assert out.splitlines()[-1].startswith("1 of 3 games: mean")


def test_the_window_keeps_to_60_frames_a_second(monkeypatch):
    pygame = pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    window, picture = Window("speed"), np.zeros((840, 640, 3), np.uint8)
    window.show(picture)
    start = time.perf_counter()
    for _ in range(30):
        assert window.show(picture)
    pygame.display.quit()
    assert 0.45 < time.perf_counter() - start < 0.9


def test_auto_goes_on_without_a_display_and_says_so(model, run):
    code, out, err = run("--model", model, "--episodes", 1)
    assert code == 0 and "1 of 1 games" in out
    assert err.count("\n") == 1 and "without a window" in err and "DISPLAY" in err


@pytest.mark.parametrize("options", [["--json"], ["--video", "game.gif"], ["--render", "none"]])
def test_auto_opens_no_window_where_none_is_wanted(model, run, monkeypatch, options):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(evaluate, "Window", None)
    assert run("--model", model, "--episodes", 1, *options)[0] == 0


# --- Interrupted recordings -------------------------------------------------------------------------------------------


@pytest.fixture
def interrupt(monkeypatch):
    """Sends this process a signal at the 100th picture of a recording."""

    def interrupt(signum):
        add = evaluate.Video.add

        def add_and_interrupt(video, picture):
            add(video, picture)
            if video.frames == 100:
                signal.raise_signal(signum)

        monkeypatch.setattr(evaluate.Video, "add", add_and_interrupt)

    return interrupt


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_ctrl_c_keeps_what_was_recorded(model, run, interrupt, ending):
    interrupt(signal.SIGINT)
    code, _, err = run("--model", model, "--video", f"game.{ending}")
    assert code == 130 and "no game was finished" in err
    assert os.listdir() == [f"game.{ending}"]
    frames = len(read_mp4("game.mp4")[1]) if ending == "mp4" else 3 * len(read_gif("game.gif")[1])
    assert 100 <= frames <= 106  # to the end of the step


@pytest.mark.parametrize("old", [None, b"an older video"])
def test_sigterm_leaves_no_half_video(model, run, interrupt, old):
    if old:
        Path("game.gif").write_bytes(old)
    interrupt(signal.SIGTERM)
    assert run("--model", model, "--video", "game.gif")[0] == 143
    assert [path.read_bytes() for path in Path().iterdir()] == [old] * bool(old)


def test_an_encoder_that_fails_is_one_clear_line(model, run, monkeypatch):
    Path("game.mp4").write_bytes(b"an older video")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    code, _, err = run("--model", model, "--video", "game.mp4", "--json")
    assert code == 1 and err.count("\n") == 1 and "--video game.mp4: cannot be written" in err
    assert [path.read_bytes() for path in Path().iterdir()] == [b"an older video"]


def test_ctrl_c_in_a_terminal_reaches_the_encoder_too_and_does_no_harm(tmp_path):
    model = write_model(tmp_path / "model.pth", BREAKOUT)
    command = [sys.executable, evaluate.__file__, "--model", model, "--episodes", "999", "--video", "game.mp4"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
    lines = [process.stdout.readline() for _ in range(2)]  # the heading and the first game
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and lines[1].startswith("game 1")
    assert "of 999 games: mean" in out
    assert sorted(os.listdir(tmp_path)) == ["game.mp4", "model.pth"]
    assert len(read_mp4(tmp_path / "game.mp4")[1]) > 500
