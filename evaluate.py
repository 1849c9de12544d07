"""Plays whole games with a trained model, reports their true scores, and shows or records them.

    python evaluate.py                                      the newest run's best model, or the one that comes along
    python evaluate.py --render human --show-q              watch it play, and what the network thinks
    python evaluate.py --episodes 1 --video game.mp4        record a game, every emulated frame of it
    python evaluate.py --episodes 30 --json                 scores for a program to read

A game's course depends on the model, --seed, --epsilon and its number alone: not on how many games are played beside
it, nor on whether it is shown.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ale_py
import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from pqn_breakout import (
    NativeAtariVecEnv,
    QNetwork,
    UserError,
    atari_spec,
    choose_device,
    epsilon_greedy,
    make_env,
    parse,
    read_file,
)


@dataclass
class Args:
    """Play whole Atari games with a trained model and report their scores."""

    model: str | None = None  # a best_model.pth; otherwise the newest logs/*/best_model.pth, or the reference model
    episodes: int = 10  # whole games to play
    epsilon: float = 0.0  # share of random actions; 0 is greedy
    seed: int = 1  # of the games and of the random actions
    device: str = "auto"  # cpu, cuda, cuda:1, mps...; auto takes a GPU where there is one
    json: bool = False  # print one JSON object, and nothing else, on stdout
    render: Literal["auto", "human", "none"] = "auto"  # a window; auto: where there is a display, no --json, no --video
    video: str | None = None  # record the games: .mp4 with every frame at 60 a second, .gif with every third at 20
    show_q: bool = False  # draw what the network thinks beside the picture


# --- Model ------------------------------------------------------------------------------------------------------------


def find_model() -> Path:
    """The newest run's best model under ./logs, or else the best Breakout player that comes with the program."""
    runs = [path for path in Path("logs").glob("*/best_model.pth") if path.parent.name != "reference"]
    if runs:
        return max(runs, key=lambda path: path.stat().st_mtime)
    ours = {}
    for path in sorted(Path(__file__).parent.glob("logs/reference/**/best_model*.pth")):
        about = read_file(path, {"env_id", "mean_return"})
        if "Breakout" in about["env_id"]:
            ours[path] = about["mean_return"]
    if not ours:
        raise UserError("no logs/*/best_model.pth here: train one with python pqn_breakout.py, or name one by --model")
    return max(ours, key=ours.get)


def load_model(path: Path, device: torch.device) -> tuple[QNetwork, str, list[str]]:
    """The network of a model file, its environment's id and the names of its actions."""
    content = read_file(path, {"env_id", "network"})
    try:
        atari_spec(content["env_id"])
    except UserError as error:
        raise UserError(f"{path}: a model for {str(error).removeprefix('--env-id ')}") from None
    env = make_env(content["env_id"], 1, 0, num_threads=1)
    actions = env.env_method("get_action_meanings", indices=0)[0]
    env.close()
    network = QNetwork(len(actions))  # float32: scores should not depend on what the hardware is fast at
    try:
        network.load_state_dict(content["network"])
    except Exception:  # whatever it trips over in a file that another program wrote
        wanted = f"this program's for {content['env_id']}, with {len(actions)} actions"
        raise UserError(f"{path}: holds another network than {wanted}") from None
    return network.to(device), content["env_id"], actions


# --- Games ------------------------------------------------------------------------------------------------------------

ROWS = 4  # of a batch, always: libraries choose other sums, and so other last digits, for batches of other sizes


class Replay:
    """Plays a native game once more, frame by frame, for its screens: the native environment does not show them.

    The same seed and actions make the same game; RuntimeError if ever they should not.
    """

    def __init__(self, env, seed: int):
        native, spec = env.unwrapped, env.unwrapped.spec
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", spec.kwargs["repeat_action_probability"])
        self.ale.setInt("random_seed", seed)
        self.ale.loadROM(ale_py.roms.get_rom_path(spec.kwargs["game"]))
        self.ale.reset_game()
        self.actions = native.envs.ale.get_action_set()
        self.frame_skip = native.frame_skip
        self.frames_left = spec.kwargs["max_num_frames_per_episode"]
        self.score = 0
        self.screens = []
        for _ in range(native.reset_infos[0]["episode_frame_number"]):
            self.ale.act(ale_py.Action.NOOP)
            self.screens.append(self.ale.getScreenRGB())

    def step(self, action: int, lives: int, episode: dict | None) -> list[np.ndarray]:
        """Screens, uint8 `(height, width, 3)`, of a step's frames (of the first step: of the no-ops before it too)."""
        for _ in range(self.frame_skip):
            self.score += self.ale.act(self.actions[action])
            self.screens.append(self.ale.getScreenRGB())
            self.frames_left -= 1
            over = self.ale.game_over() or self.frames_left == 0
            if over:
                break
        same = self.score == episode["r"] if episode else self.ale.lives() == lives
        if over != bool(episode) or not same:
            raise RuntimeError("the game on the screen is not the game that is scored")
        screens, self.screens = self.screens, []
        return screens


class Tap:
    """Stands in for the emulator of one of Stable-Baselines3's games and keeps the screen of every frame."""

    def __init__(self, ale: ale_py.ALEInterface):
        self.ale, self.games, self.screens = ale, 0, []

    def __getattr__(self, name: str):
        return getattr(self.ale, name)

    def reset_game(self) -> None:
        self.games += 1  # the second is begun by the environment, at the end of the one to show
        self.ale.reset_game()

    def act(self, *action) -> int:
        goes_on = self.games == 1 and not self.ale.game_over()
        reward = self.ale.act(*action)
        if goes_on:
            self.screens.append(self.ale.getScreenRGB())
        return reward

    def step(self, *_) -> list[np.ndarray]:
        screens, self.screens = self.screens, []
        return screens


class Game:
    """A whole game in an environment of its own; `watch`, if given, sees every step of it (see `play`)."""

    def __init__(self, env_id: str, seed: int, number: int, watch=None):
        self.number, self.watch = number, watch
        self.env = make_env(env_id, 1, seed + number, num_threads=1)
        self.rng = np.random.default_rng([seed, number])
        native = isinstance(self.env.unwrapped, NativeAtariVecEnv)
        if watch and not native:
            atari = self.env.unwrapped.envs[0].unwrapped
            atari.ale = self.screens = Tap(atari.ale)
        self.frames = self.env.reset()
        if watch and native:
            self.screens = Replay(self.env, seed + number)
        self.action = None

    def send(self, q: np.ndarray, epsilon: float) -> None:
        self.q, self.action = q, epsilon_greedy(q[None], epsilon, self.rng)
        self.env.step_async(self.action)

    def wait(self) -> dict | None:
        """Ends the step that was sent, if one was; returns `r` and `l` of the game once it is over."""
        if self.action is None:
            return None
        self.frames, _, _, (info,) = self.env.step_wait()
        episode = info.get("episode")
        if self.watch:
            action = info.get("action", int(self.action[0]))  # the environment presses FIRE itself to serve
            screens = self.screens.step(action, info["lives"], episode)
            score, step = self.env.returns[0], self.env.lengths[0]
            if episode:
                score, step = episode["r"], episode["l"]
            self.watch(screens, self.q, action, score, info["lives"], step)
        return episode


@torch.inference_mode()
def play(network, env_id: str, episodes: int, epsilon: float, seed: int, stop: list, groups: int = 4, watch=None):
    """Plays whole games, up to `groups * ROWS` side by side; yields number, score and steps of each at its end.

    While the network chooses the actions of one group, the emulators work on those of the others. With `watch` there
    is one game at a time, and `watch(screens, q, action, score, lives, step)` is called after each of its steps. Ends
    early once `stop` is not empty. In a terminal a line counts the steps: games of 27,000 take minutes.
    """
    device = next(network.parameters()).device
    numbers = iter(range(episodes))
    tables = [[None] * (1 if watch else ROWS) for _ in range(1 if watch else groups)]
    batch = np.zeros((ROWS, 4, 84, 84), dtype=np.uint8)
    bar = tqdm(unit=" steps", leave=False, disable=not (sys.stdout.isatty() and sys.stderr.isatty()))
    try:
        while not stop:
            for table in tables:
                for row, game in enumerate(table):
                    episode = game and game.wait()
                    if episode:
                        game.env.close()
                        table[row] = None
                        yield game.number, episode["r"], episode["l"]
                    if table[row] is None and (number := next(numbers, None)) is not None:
                        table[row] = Game(env_id, seed, number, watch)
                    if table[row]:
                        batch[row] = table[row].frames[0]
                if any(table):
                    q = network(torch.from_numpy(batch).to(device)).cpu().numpy()
                    for row, game in enumerate(table):
                        if game:
                            game.send(q[row], epsilon)
                            bar.update()
            if not any(map(any, tables)):
                return
    finally:
        bar.close()
        for game in filter(None, sum(tables, [])):
            game.env.close()


# --- Pictures ---------------------------------------------------------------------------------------------------------


class Panel:
    """Draws what the network thinks: a bar for each action, and the value of the state over the last steps.

    An action's bar is how much better it is than the worst one, on the scale of the last second: close values can be
    told apart, and bars shrink when the choice stops to matter.
    """

    STEPS = 150  # about ten seconds
    BACKGROUND, LINE, BAR, DIM, TEXT, ACCENT = "#10141b", "#262e3a", "#465366", "#8a97a8", "#eef2f6", "#ffb454"

    def __init__(self, env_id: str, actions: list[str], unit: int):
        """`unit` is the size of an Atari pixel on the picture, which everything here is measured in."""
        self.env_id, self.actions, self.unit = env_id, actions, unit
        self.small, self.normal, self.large = (ImageFont.load_default(size * unit) for size in (5, 5.5, 11))
        self.values, self.spreads = deque(maxlen=self.STEPS), deque(maxlen=15)

    def draw(self, height: int, q: np.ndarray, action: int, score: float, lives: int, step: int) -> np.ndarray:
        """A picture of the state before a step and of the score after it, uint8 `(height, 124 * unit, 3)`."""
        u, greedy = self.unit, int(q.argmax())
        if step == 1:
            self.values.clear()
            self.spreads.clear()
        self.values.append(float(q.max()))
        self.spreads.append(float(q.max() - q.min()))
        image = Image.new("RGB", (124 * u, height), self.BACKGROUND)
        draw = ImageDraw.Draw(image)
        left, right, thin = 7 * u, 117 * u, (u + 1) // 2

        def text(x, y, words, font, fill, anchor="ls"):
            draw.text((x, y), words, font=font, fill=fill, anchor=anchor)

        text(left, 11 * u, self.env_id, self.small, self.DIM)
        for x, label, value in ((7, "SCORE", score), (52, "LIVES", lives), (80, "STEP", step)):
            text(x * u, 22 * u, label, self.small, self.DIM)
            text(x * u, 33 * u, f"{value:.0f}", self.large, self.TEXT)

        draw.line((left, 40 * u, right, 40 * u), self.LINE, width=thin)
        text(left, 48 * u, "Q-VALUES", self.small, self.DIM)
        text(right, 48 * u, "pressed", self.small, self.DIM, "rs")
        pressed = right - 21 * u
        draw.polygon([(pressed - 3 * u, 44 * u), (pressed - 3 * u, 48 * u), (pressed, 46 * u)], fill=self.TEXT)
        row = min(11 * u, 110 * u // len(q))
        digits = 3 if np.abs(q).max() < 100 else 1
        bar_left, bar_right = 55 * u, 96 * u
        for i, (name, value) in enumerate(zip(self.actions, q, strict=True)):
            top = 52 * u + i * row
            middle, color = top + row // 2, self.ACCENT if i == greedy else self.DIM
            if i == action:
                draw.polygon([(2 * u, middle - 2 * u), (2 * u, middle + 2 * u), (5 * u, middle)], fill=self.TEXT)
            text(left, middle, name, self.normal, color, "lm")
            text(right, middle, f"{value:.{digits}f}", self.normal, color, "rm")
            length = (value - q.min()) / max(*self.spreads, 1e-9) * (bar_right - bar_left)
            bar = self.ACCENT if i == greedy else self.BAR
            draw.rectangle((bar_left, top + u, bar_left + max(u // 2, length), top + row - u - 1), fill=bar)

        top = 52 * u + len(q) * row + 5 * u
        draw.line((left, top, right, top), self.LINE, width=thin)
        text(left, top + 8 * u, f"MAX Q, LAST {self.STEPS} STEPS", self.small, self.DIM)
        text(right, top + 8 * u, f"{self.values[-1]:.{digits}f}", self.normal, self.ACCENT, "rs")
        low, high = min(self.values), max(self.values)
        plot_top, plot_bottom, plot_right = top + 14 * u, height - 8 * u, 96 * u
        for y, value in ((plot_top, high), (plot_bottom, low)):
            draw.line((left, y, plot_right, y), self.LINE, width=thin)
            text(right, y, f"{value:.{digits}f}", self.small, self.DIM, "rm")
        xs = np.linspace(plot_right, left, self.STEPS)[: len(self.values)][::-1]
        ys = plot_bottom - (np.array(self.values) - low) / max(high - low, 1e-9) * (plot_bottom - plot_top)
        draw.line(list(zip(xs.tolist(), ys.tolist(), strict=True)), self.ACCENT, width=thin, joint="curve")
        return np.asarray(image)


class Window:
    """Shows pictures at 60 a second, the speed of the console."""

    def __init__(self, title: str):
        if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"} & os.environ.keys():
            raise UserError("there is no display (neither DISPLAY nor WAYLAND_DISPLAY is set)")
        import pygame  # here, for it takes its time

        self.pygame, self.screen = pygame, None
        try:
            pygame.display.init()
        except pygame.error as error:
            raise UserError(f"no window can be opened: {error}") from None
        if pygame.display.get_driver() == "offscreen":  # what SDL comes to when the display does not answer
            raise UserError("the display cannot be reached")
        pygame.display.set_caption(title)
        self.small = pygame.display.get_desktop_sizes()[0][1] < 920

    def show(self, picture: np.ndarray) -> bool:
        """Waits until it is time for `picture` and shows it; returns False once the window was closed."""
        size = picture.shape[1::-1]
        if self.screen is None:
            self.screen, self.due = self.pygame.display.set_mode(size), time.perf_counter()
        time.sleep(max(0.0, self.due - time.perf_counter()))
        self.due = max(self.due, time.perf_counter() - 0.1) + 1 / 60
        self.screen.blit(self.pygame.image.frombuffer(picture.tobytes(), size, "RGB"), (0, 0))
        self.pygame.display.flip()
        return not self.pygame.event.get(self.pygame.QUIT)


class Video:
    """Records pictures; `path` is replaced when the whole video is there, and left as it is after an error."""

    def __init__(self, path: Path):
        self.path, self.gif, self.frames, self.ffmpeg = path, path.suffix.lower() == ".gif", 0, None
        if path.suffix.lower() not in (".mp4", ".gif"):
            raise UserError(f"--video {path}: must end in .mp4 or .gif")
        if path.is_dir():
            raise UserError(f"--video {path}: must be a file, and is a folder")
        try:
            self.folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
        except OSError as error:
            raise UserError(f"--video {path}: {path.parent} cannot be written to: {error.strerror}") from None
        self.recorded = Path(self.folder.name, "recorded.mkv" if self.gif else "recorded.mp4")

    def run_ffmpeg(self, *options) -> subprocess.Popen:
        # A session of its own keeps Ctrl-C from it: the video is to be finished then, too.
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *map(str, options)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def finish_ffmpeg(self) -> None:
        _, words = self.ffmpeg.communicate()
        if self.ffmpeg.returncode:
            reason = words.decode(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"--video {self.path}: cannot be written: {''.join(reason) or 'ffmpeg failed'}")

    def add(self, picture: np.ndarray) -> None:
        self.frames += 1
        # A GIF shows every third frame, as its delays are hundredths of a second; an odd step keeps sprites that
        # games draw on every other frame.
        if self.gif and self.frames % 3 != 1:
            return
        if self.ffmpeg is None:
            size = f"{picture.shape[1]}x{picture.shape[0]}"
            codec = ["-c:v", "libx264rgb", "-preset", "ultrafast", "-qp", 0]  # lossless: the GIF is made from it
            if not self.gif:
                codec = ["-vf", "scale=out_color_matrix=bt709:flags=neighbor", "-pix_fmt", "yuv420p"]
                codec += ["-c:v", "libx264", "-preset", "veryfast", "-crf", 18, "-movflags", "faststart"]
                codec += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
            source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", 20 if self.gif else 60, "-i", "-"]
            self.ffmpeg = self.run_ffmpeg(*source, *codec, self.recorded)
        try:
            self.ffmpeg.stdin.write(picture.tobytes())
        except BrokenPipeError:
            self.finish_ffmpeg()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None and self.ffmpeg:
                self.finish_ffmpeg()
                if self.gif:
                    palette, source = self.recorded.with_name("palette.png"), self.recorded
                    self.recorded = self.recorded.with_name("recorded.gif")
                    self.ffmpeg = self.run_ffmpeg("-i", source, "-vf", "palettegen", palette)
                    self.finish_ffmpeg()
                    use = "paletteuse=dither=none:diff_mode=rectangle"
                    self.ffmpeg = self.run_ffmpeg("-i", source, "-i", palette, "-lavfi", use, self.recorded)
                    self.finish_ffmpeg()
                os.replace(self.recorded, self.path)
        finally:
            if self.ffmpeg:
                self.ffmpeg.kill()
                self.ffmpeg.wait()
            self.folder.cleanup()


# --- Main -------------------------------------------------------------------------------------------------------------


def open_window(args: Args, title: str) -> Window | None:
    if args.render == "none" or (args.render == "auto" and (args.json or args.video)):
        return None
    try:
        return Window(title)
    except UserError as error:
        if args.render == "human":
            raise UserError(f"--render human: {error}; --video PATH records the games instead") from None
        print(f"evaluate.py: playing without a window: {error}", file=sys.stderr)
        return None


def evaluate(args: Args, stop: list[int]) -> None:
    """Plays and reports as `args` say, until `stop` holds an exit code."""
    if args.episodes < 1:
        raise UserError(f"--episodes {args.episodes}: must be a positive whole number")
    if not 0 <= args.epsilon <= 1:
        raise UserError(f"--epsilon {args.epsilon}: must be between 0 and 1")
    if not 0 <= args.seed <= 2**31 - args.episodes:
        raise UserError(f"--seed {args.seed}: must be between 0 and {2**31 - args.episodes}")
    device = choose_device(args.device)
    path = Path(args.model) if args.model else find_model()
    network, env_id, actions = load_model(path, device)
    # The network gets one thread: the emulators use the other cores, and a trainer may be at work on them.
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    window = open_window(args, f"{env_id}, {path}")
    if args.show_q and not (window or args.video):
        raise UserError("--show-q: needs a picture to draw beside: a window (--render human) or --video PATH")
    games = {}
    with Video(Path(args.video)) if args.video else contextlib.nullcontext() as video:
        # H.264 halves the resolution of colours: to stay crisp it needs an even scale.
        scale = 3 if (video.gif if video else window and window.small) else 4
        panel = Panel(env_id, actions, scale)

        def watch(screens, *thoughts) -> None:
            if args.show_q:
                side = panel.draw(scale * screens[0].shape[0], *thoughts)
            for screen in screens:
                picture = screen.repeat(scale, axis=0).repeat(scale, axis=1)
                if args.show_q:
                    picture = np.hstack((picture, side))
                if video:
                    video.add(picture)
                if window and not window.show(picture):
                    stop.append(0)
                    return

        if not args.json:
            print(f"{env_id}, epsilon {args.epsilon:g}, model {path}")
        watched = watch if window or video else None
        for number, score, steps in play(network, env_id, args.episodes, args.epsilon, args.seed, stop, watch=watched):
            games[number] = score, steps
            if not args.json:
                tqdm.write(f"game {number + 1}: score {score:g}, {steps} steps")  # above the count of steps
    report(args, env_id, path, games)


def report(args: Args, env_id: str, path: Path, games: dict[int, tuple[float, int]]) -> None:
    if not games:
        print("evaluate.py: no game was finished", file=sys.stderr)
        return
    returns, lengths = zip(*(games[number] for number in sorted(games)), strict=True)
    names = ("mean", "std", "median", "min", "max")
    statistics = {name: float(getattr(np, name)(returns)) for name in names}
    if args.json:
        about = {"env_id": env_id, "model": str(path), "episodes": len(games), "epsilon": args.epsilon}
        print(json.dumps(about | {"seed": args.seed, "returns": returns, "lengths": lengths} | statistics))
        return
    mean, std, median, low, high = statistics.values()
    print(
        f"{len(games)} of {args.episodes} games: mean {mean:.2f}, standard deviation {std:.2f}, "
        f"median {median:g}, min {low:g}, max {high:g}"
    )


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    stop = []

    def interrupt(*_) -> None:
        """Ends the games under way, so that what was recorded can be kept; the second time, everything."""
        stop.append(128 + signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        evaluate(parse(Args), stop)
    except UserError as error:
        sys.exit(f"evaluate.py: error: {error}")
    except KeyboardInterrupt:
        stop.append(128 + signal.SIGINT)
    sys.exit(stop[0] if stop else 0)


if __name__ == "__main__":
    main()
