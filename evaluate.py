"""Plays whole games with a trained model, reports their true scores, and shows or records them.

    python evaluate.py --show-q                       watch the newest run's best model think
    python evaluate.py --episodes 100 --render none   score it; --json for a program to read
    python evaluate.py --episodes 1 --video game.mp4  record a game, every frame of it

A window is for watching: it shows one game after the other, at the speed of the console. A game
depends on the model, --seed, --epsilon and its own number alone: not on how many games are played
beside it, nor on whether it is shown.
"""

import os

if __name__ == "__main__":  # pydantic reads it once, when it is loaded.
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Literal, NamedTuple

import imageio_ffmpeg
import numpy as np
import torch
import tyro
from ale_py.env import AtariEnv
from ale_py.vector_env import AtariVectorEnv
from PIL import Image, ImageDraw, ImageFont
from pydantic import StrictBool
from pydantic.dataclasses import dataclass
from tqdm import tqdm

import pqn_breakout as pqn
from pqn_breakout import UserError


@dataclass(config=pqn.CHECKED)
class Args:
    """Play whole Atari games with a trained model and report their scores."""

    # a best_model.pth, or a run's folder; otherwise the newest run in logs, or the reference model
    model: pqn.Text | None = None
    episodes: pqn.Count = 10  # whole games to play
    epsilon: pqn.Fraction = 0.01  # share of random actions; 0 is greedy: many games are the same
    seed: pqn.Natural = 1  # of the games and of the random actions
    device: pqn.Text = "auto"  # cpu, cuda, cuda:1, mps...; auto is CUDA, or else the CPU
    json: StrictBool = False  # print one JSON object, and nothing else, on stdout
    # a window; auto opens one where there is a display, and neither --json nor --video
    render: Literal["auto", "human", "none"] = "auto"
    # record the games: .mp4 with every frame at 60 a second, .gif with every third at 20
    video: pqn.Text | None = None
    show_q: StrictBool = False  # draw beside the picture what the network thinks


# --- Models ---
def find_model() -> Path:
    """The newest run's best model in ./logs, or else the best reference model for Breakout."""
    runs = [
        path for path in Path("logs").glob("*/best_model.pth") if path.parent.name != "reference"
    ]
    if runs:
        return max(runs, key=os.path.getmtime)
    # The script may have been called by a link to it. The models are where the script itself is.
    reference = Path(__file__).resolve().parent / "logs/reference"
    means = {}
    for path in reference.glob("**/best_model*.pth"):
        model = pqn.load(path, pqn.BestModel)
        if "Breakout" in model.env_id:
            means[path] = model.mean_return
    if not means:
        raise UserError(
            "no logs/*/best_model.pth here: train one with python pqn_breakout.py, "
            "or name one by --model"
        )
    return max(means, key=means.get)


def load_model(path: Path, device: torch.device):
    """The network of a model file, the id of its game and the names of its actions."""
    model = pqn.load(path, pqn.BestModel)
    env = make_env(model.env_id, seed=0)
    actions = env.env_method("get_action_meanings")[0]
    # In float32 on every machine: scores should not depend on what the hardware is fast at.
    network = pqn.QNetwork(len(actions))
    pqn.fill(network.state_dict(), model.network, path)
    return network.to(device), model.env_id, actions


# --- Games ---
def make_env(env_id: str, seed: int):
    """One game. Only Stable-Baselines3's pipeline plays ids that skip a random number of frames."""
    frame_skip = pqn.find_game(env_id).kwargs["frameskip"]
    vec_env = "native" if isinstance(frame_skip, int) else "sb3"
    return pqn.make_env(env_id, 1, seed, vec_env, num_threads=1)


class Replay:
    """Plays a native game once more, in colour and frame by frame.

    The native environment has gray pictures only, and not of every frame. But the same seed and the
    same actions make the same game.
    """

    def __init__(self, env: pqn.AtariVecEnv, seed: int):
        height, width, _ = AtariEnv(env.spec.kwargs["game"]).observation_space.shape
        options = env.spec.kwargs | {
            "frameskip": 1,
            "stack_num": 1,
            "maxpool": False,
            "grayscale": False,
            "img_height": height,
            "img_width": width,
            "use_fire_reset": False,
            "reward_clipping": False,
        }
        self.env = AtariVectorEnv(num_envs=1, num_threads=1, **options)
        # As AtariVecEnv does. ALE's own number of no-ops at the start is that of make_env, too.
        self.env.reset(seed=seed % 2**31)
        self.frame_skip = env.frame_skip
        self.score = 0  # true score so far

    def step(self, action: int) -> list[np.ndarray]:
        """The screens, uint8 `(height, width, 3)`, of a step's frames."""
        screens = []
        for _ in range(self.frame_skip):
            screen, reward, terminated, truncated, _ = self.env.step(np.array([action]))
            self.score += reward[0]
            screens.append(screen[0, 0])
            if terminated[0] or truncated[0]:
                break
        return screens


class Moment(NamedTuple):
    """What there is to see of one step of a game."""

    screens: list[np.ndarray]  # of its frames, uint8 `(height, width, 3)`
    q_values: np.ndarray  # of the state before it
    action: int
    score: float  # the true one, after it
    lives: int
    step: int  # its number


class Game:
    """A whole game in an environment of its own. `watch`, if given, gets a Moment of every step."""

    def __init__(self, env_id: str, seed: int, number: int, watch=None):
        self.number = number
        self.watch = watch
        self.env = make_env(env_id, seed + number)
        replayed = watch and isinstance(self.env, pqn.AtariVecEnv)
        self.replay = Replay(self.env, seed + number) if replayed else None
        self.rng = np.random.default_rng([seed, number])
        self.frames = self.env.reset()
        self.screens = []
        self.steps = 0

    def step(self, q_values: np.ndarray, epsilon: float) -> float | None:
        """Plays a step. Returns the game's true score once it is over."""
        actions = pqn.epsilon_greedy(q_values[None], epsilon, self.rng)
        self.frames, _, _, infos = self.env.step(actions)
        self.steps += 1
        info = infos[0]
        final_score = info["episode"]["r"] if "episode" in info else None
        if self.watch:
            # At a serve the environment pressed FIRE, whatever the action was.
            action = info.get("action", int(actions[0]))
            if self.replay:
                self.screens = self.replay.step(action)
                score = self.replay.score
            elif final_score is None:
                self.screens = self.env.get_images()
                # Stable-Baselines3's Monitor has a game's rewards as they were before clipping.
                score = sum(self.env.get_attr("rewards")[0])
            else:  # the environment shows, and counts, the next game
                score = final_score
            self.watch(Moment(self.screens, q_values, action, score, info["lives"], self.steps))
        return final_score


# The size of every batch, however many games there are. For batches of another size the libraries
# add in another order. Last digits, and so a game, would depend on the games beside it.
ROWS = 4


@torch.inference_mode()
def play(network, env_id, episodes, epsilon, seed, watch=None, should_stop=lambda: False):
    """Plays whole games, up to ROWS side by side; yields number, score and steps of each.

    With `watch` it plays one game at a time, and calls `watch` with a Moment of each step. When
    `should_stop()` becomes true, it ends after the step.
    """
    device = next(network.parameters()).device
    numbers = deque(range(episodes))
    games = []
    batch = np.zeros((ROWS, pqn.FRAMES, pqn.SIDE, pqn.SIDE), np.uint8)
    # None is "only in a terminal"; tqdm would fail where there is no stderr at all.
    with tqdm(unit=" steps", leave=False, disable=None if sys.stderr else True) as steps:
        while (numbers or games) and not should_stop():
            while numbers and len(games) < (1 if watch else ROWS):
                games.append(Game(env_id, seed, numbers.popleft(), watch))
            for row, game in enumerate(games):
                batch[row] = game.frames[0]
            q_values = network(torch.from_numpy(batch).to(device)).cpu().numpy()
            steps.update(len(games))
            for row, game in enumerate(games.copy()):
                score = game.step(q_values[row], epsilon)
                if score is not None:
                    games.remove(game)
                    yield game.number, score, game.steps


# --- Pictures ---
DIM = "#8a97a8"
BRIGHT = "#eef2f6"
ACCENT = "#ffb454"


class Panel:
    """Draws what the network thinks: how good each action is, and the state's value so far.

    Everything is measured in units, which are pixels of the game. A panel is 124 wide and as high
    as the screen, 210 or more. Its text runs from x = 7 to 117. From top to bottom: the game at
    y = 9, score, lives and step from 17 to 34, the actions from 46 to at most 156, and the curve.
    """

    def __init__(self, env_id: str, actions: list[str], unit: int):
        self.env_id = env_id
        self.actions = actions
        self.unit = unit
        self.small = ImageFont.load_default(5 * unit)
        self.large = ImageFont.load_default(11 * unit)
        self.recent = deque(maxlen=150)  # Q-values of the last steps

    def draw(self, moment: Moment) -> np.ndarray:
        """The panel beside the screens of a Moment, uint8 `(height, width, 3)`."""
        self.recent.append(moment.q_values)
        height = len(moment.screens[0])
        image = Image.new("RGB", (124 * self.unit, height * self.unit), "#10141b")
        self.pen = ImageDraw.Draw(image)
        self.write(7, 9, self.env_id)
        for x, label, number in (
            (7, "SCORE", moment.score),
            (52, "LIVES", moment.lives),
            (80, "STEP", moment.step),
        ):
            self.write(x, 20, label)
            self.write(x, 29, f"{number:.0f}", BRIGHT, font=self.large)
        row_height = min(11, 110 / len(self.actions))
        self.draw_actions(moment, row_height)
        self.draw_curve(58 + row_height * len(self.actions), height - 8)
        return np.asarray(image)

    def write(self, x, y, text: str, color=DIM, anchor="lm", font=None):
        """Writes from `x` on, or with the anchor "rm" up to `x`."""
        self.pen.text((x * self.unit, y * self.unit), text, color, font or self.small, anchor)

    def draw_actions(self, moment: Moment, row_height):
        """A row for each action, with a bar that shows how much better it is than the worst."""
        q_values = moment.q_values
        # The scale is that of the last second, so that close values can be told apart.
        last_second = list(self.recent)[-15:]
        spread = max(np.ptp(last_second, axis=1).max(), 1e-9)
        for i, name in enumerate(self.actions):
            y = 46 + (i + 0.5) * row_height
            color = ACCENT if i == q_values.argmax() else DIM
            if i == moment.action:
                self.write(2, y, ">", BRIGHT)
            self.write(7, y, name, color)
            self.write(117, y, f"{q_values[i]:.3f}", color, "rm")
            right = 55.5 + 41 * (q_values[i] - q_values.min()) / spread
            corners = 55, y - row_height / 2 + 1, right, y + row_height / 2 - 1
            self.pen.rectangle([self.unit * corner for corner in corners], color)

    def draw_curve(self, top, bottom):
        """The values of the last states: of each that of its best action."""
        values = np.max(self.recent, axis=1)
        self.write(7, top, f"MAX Q, LAST {self.recent.maxlen} STEPS")
        self.write(117, top, f"{values[-1]:.3f}", ACCENT, "rm")
        x = np.linspace(7, 117, self.recent.maxlen)[-len(values) :]
        y = bottom - (bottom - top - 6) * (values - values.min()) / max(np.ptp(values), 1e-9)
        points = np.stack((x, y), axis=1) * self.unit
        self.pen.line(points.flatten().tolist(), ACCENT, width=self.unit // 2)


class Window:
    """Shows pictures at 60 a second, the speed of the console."""

    def __init__(self, title: str):
        import pygame  # imported only where a window is opened

        self.pygame = pygame
        self.screen = None
        self.due = 0.0  # when the next picture is to be shown
        self.closed = False  # by the user
        try:
            pygame.display.init()
            # SDL falls back to this driver, which shows nothing, where the display does not answer.
            if pygame.display.get_driver() == "offscreen":
                raise pygame.error("no display can be reached")
        except pygame.error as error:
            raise UserError(
                f"no window can be opened: {error}; --video records, --render none only scores"
            ) from None
        pygame.display.set_caption(title)

    def show(self, picture: np.ndarray):
        """Waits until it is time for `picture` and shows it."""
        size = picture.shape[1::-1]
        if self.screen is None:
            self.screen = self.pygame.display.set_mode(size)
        time.sleep(max(0.0, self.due - time.perf_counter()))
        # After a delay the pictures go on at the same speed. They do not hurry to make up for it.
        self.due = max(self.due, time.perf_counter() - 1 / 60) + 1 / 60
        self.screen.blit(self.pygame.image.frombuffer(picture.tobytes(), size, "RGB"), (0, 0))
        self.pygame.display.flip()
        # Takes all events, though only one matters: a queue that is full would drop it.
        for event in self.pygame.event.get():
            if event.type == self.pygame.QUIT:
                self.closed = True

    def close(self):
        self.pygame.display.quit()


class Video:
    """Records pictures in a hidden file, which takes the place of `path` once it is whole."""

    def __init__(self, path: Path):
        suffix = path.suffix.lower()
        if suffix not in (".mp4", ".gif") or path.is_dir():
            raise UserError(f"--video {path}: must be a file, and end in .mp4 or .gif")
        self.path = path
        self.gif = suffix == ".gif"
        # Absolute, because ffmpeg would take the "a" of "a:b.mp4" for a protocol.
        self.recorded = path.absolute().with_name(f".{path.stem}.{os.getpid()}.mp4")
        self.finished = self.recorded.with_suffix(suffix)
        self.num_pictures = 0
        self.ffmpeg = None

    def __enter__(self):
        self.recorded.touch()  # raises an OSError before any game is played
        return self

    def start_ffmpeg(self, *options):
        # `imageio_ffmpeg.write_frames` would do, too. But it lets ffmpeg write to the terminal, and
        # takes no notice when ffmpeg fails.
        self.ffmpeg = subprocess.Popen(
            [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *options],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A Ctrl-C in the terminal goes to a whole group of processes. In a group of its own, on
            # Unix or on Windows, ffmpeg lives on and can finish the video.
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )

    def finish_ffmpeg(self):
        _, stderr = self.ffmpeg.communicate()
        if self.ffmpeg.returncode:
            message = " ".join(stderr.decode(errors="replace").split())
            raise UserError(f"--video {self.path}: ffmpeg failed: {message}")

    def start_recording(self, height: int, width: int):
        source = f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {20 if self.gif else 60} -i -"
        if self.gif:  # lossless, because the GIF is still to be made of it
            codec = "-c:v libx264rgb -preset ultrafast -qp 0"
        else:  # what every player takes, in the colours of the screen
            codec = (
                "-c:v libx264 -preset veryfast -crf 18 -pix_fmt yuv420p -movflags faststart "
                "-vf scale=out_color_matrix=bt709:flags=neighbor "
                "-colorspace bt709 -color_primaries bt709 -color_trc bt709"
            )
        self.start_ffmpeg(*source.split(), *codec.split(), self.recorded)

    def make_gif(self):
        # ffmpeg reads the file twice: for its palette, then for its pictures. In one pass it would
        # keep all pictures in memory until the palette is known.
        inputs = ["-i", self.recorded] * 2
        palette = "[0]palettegen[palette];[1][palette]paletteuse=dither=none:diff_mode=rectangle"
        self.start_ffmpeg(*inputs, "-lavfi", palette, self.finished)
        self.finish_ffmpeg()

    def show(self, picture: np.ndarray):
        self.num_pictures += 1
        # A GIF counts time in hundredths of a second: it can show 20 pictures in one, but not 60.
        # With every third picture it has the sprites, too, that a game draws on every other frame.
        if self.gif and self.num_pictures % 3 != 1:
            return
        if self.ffmpeg is None:
            self.start_recording(*picture.shape[:2])
        try:
            self.ffmpeg.stdin.write(picture.tobytes())
        except OSError:  # ffmpeg has ended, and says why
            self.finish_ffmpeg()

    def __exit__(self, kind, *_):
        leftovers = {self.recorded, self.finished}
        try:
            if kind is None and self.ffmpeg:
                self.finish_ffmpeg()
                if self.gif:
                    self.make_gif()
                # If the video cannot take its place, it is kept. The OSError says where.
                leftovers.remove(self.finished)
                os.replace(self.finished, self.path)
        finally:
            if self.ffmpeg:
                self.ffmpeg.kill()
                self.ffmpeg.wait()
            for path in leftovers:
                path.unlink(missing_ok=True)


# --- Main ---
def say_aside(line: str):
    """Prints a line on stderr, if there is one. With --json stdout is for the result alone."""
    with tqdm.external_write_mode(), contextlib.redirect_stdout(sys.stderr):
        pqn.say(f"evaluate.py: {line}")


def answer_signals(cleanup: contextlib.ExitStack) -> list[int]:
    """A list that will hold the first of pqn.SIGNALS to come. A second ends the program at once."""
    received = []

    def handle(number: int, _):
        if not received:
            received.append(number)
            say_aside("stops as soon as it can; a second signal ends the program at once")
        elif number > 1:  # a terminal that closes may send SIGHUP, 1, twice
            sys.exit(128 + number)

    for number in pqn.SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            cleanup.callback(signal.signal, number, signal.signal(number, handle))
    return received


def report(args: Args, env_id: str, path: Path, games: dict):
    """Prints the statistics of `games`, which has a score and a length for each game's number."""
    in_order = [games[number] for number in sorted(games)]
    scores, lengths = zip(*in_order, strict=True)
    result = {
        "env_id": env_id,
        "model": str(path),
        "episodes": len(games),
        "epsilon": args.epsilon,
        "seed": args.seed,
        "returns": scores,
        "lengths": lengths,
        "different_games": len(set(in_order)),
        "mean": float(np.mean(scores)),
        "std": float(np.std(scores)),
        "median": float(np.median(scores)),
        "min": min(scores),
        "max": max(scores),
    }
    text = (
        f"{len(games)} games, {result['different_games']} of them different: "
        f"mean {result['mean']:.2f}, standard deviation {result['std']:.2f}, "
        f"median {result['median']:g}, min {result['min']:g}, max {result['max']:g}"
    )
    pqn.say(json.dumps(result) if args.json else text)


def main():
    """Plays and reports as the command line says."""
    args = tyro.cli(Args)
    stdout = sys.stdout
    games = {}
    with contextlib.ExitStack() as cleanup:
        signals = answer_signals(cleanup)
        # One thread: a batch of four gains nothing by more, and a training may be at work, too.
        pqn.repeatable(1, cleanup)
        path = Path(args.model) if args.model else find_model()
        if path.is_dir():
            path /= "best_model.pth"
        network, env_id, actions = load_model(path, pqn.choose_device(args.device))

        viewers = []
        scale = 3
        if args.video:
            video = cleanup.enter_context(Video(Path(args.video)))
            viewers.append(video)
            if not video.gif:
                scale = 4  # H.264 halves the resolution of colours, which blurs odd scales
        window = None
        displays = os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"}
        can_show = displays or sys.platform != "linux"
        automatic = can_show and not args.json and not args.video
        if args.render == "human" or (args.render == "auto" and automatic):
            window = Window(f"{env_id}, {path}")
            cleanup.callback(window.close)
            viewers.append(window)
        if args.show_q and not viewers:
            raise UserError(
                "--show-q: needs a picture to draw beside: a window (--render human) "
                "or --video PATH"
            )
        panel = Panel(env_id, actions, scale)

        def watch(moment: Moment):
            beside = [panel.draw(moment)] if args.show_q else []
            for screen in moment.screens:
                enlarged = screen.repeat(scale, axis=0).repeat(scale, axis=1)
                picture = np.hstack([enlarged, *beside])
                for viewer in viewers:
                    viewer.show(picture)

        def should_stop() -> bool:
            return bool(signals or (window and window.closed))

        if not args.json:
            pqn.say(f"{env_id}, epsilon {args.epsilon:g}, model {path}")
        watcher = watch if viewers else None
        played = play(network, env_id, args.episodes, args.epsilon, args.seed, watcher, should_stop)
        for number, score, steps in played:
            games[number] = score, steps
            if not args.json:
                with tqdm.external_write_mode():  # above the count of steps
                    pqn.say(f"game {number + 1}: score {score:g}, {steps} steps")

    if games:
        report(args, env_id, path, games)
    else:
        say_aside("no game was finished")
    if sys.stdout is not stdout:  # `pqn.say` gave it up
        raise UserError("not every line could be written to stdout")
    if signals:
        sys.exit(128 + signals[0])


if __name__ == "__main__":
    pqn.run_command(main)
