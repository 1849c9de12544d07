"""Plays whole games with a trained model, reports their true scores, and shows or records them.

    python evaluate.py --show-q                           watch the newest run's best model, and what it thinks
    python evaluate.py --episodes 100 --render none       score it; --json for a program to read
    python evaluate.py --episodes 1 --video game.mp4      record a game, every frame of it

A window is for watching: it shows one game after the other, at the speed of the console. A game depends on the model,
--seed, --epsilon and its number alone, not on how many games are played beside it, nor on whether it is shown.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import imageio_ffmpeg
import numpy as np
import torch
from ale_py.env import AtariEnv
from ale_py.vector_env import AtariVectorEnv
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import pqn_breakout as pqn
from pqn_breakout import UserError


@dataclass
class Args:
    """Play whole Atari games with a trained model and report their scores."""

    model: str | None = None  # a best_model.pth; otherwise the newest logs/*/best_model.pth, or the reference model
    episodes: Annotated[int, (1, 2**30)] = 10  # whole games to play
    epsilon: Annotated[float, (0, 1)] = 0.01  # share of random actions; 0 is greedy: many games are the same
    seed: Annotated[int, (0, 2**30)] = 1  # of the games and of the random actions
    device: str = "auto"  # cpu, cuda, cuda:1, mps...; auto takes an accelerator where there is one
    json: bool = False  # print one JSON object, and nothing else, on stdout
    render: Literal["auto", "human", "none"] = "auto"  # a window; auto: where there is a display, no --json, no --video
    video: str | None = None  # record the games: .mp4 with every frame at 60 a second, .gif with every third at 20
    show_q: bool = False  # draw what the network thinks beside the picture


# --- Models and games ---
def find_model() -> Path:
    """The newest run's best model under ./logs, or else the best Breakout player that comes with the program."""
    runs = [path for path in Path("logs").glob("*/best_model.pth") if path.parent.name != "reference"]
    if runs:
        return max(runs, key=lambda path: path.stat().st_mtime)
    paths = Path(__file__).parent.glob("logs/reference/**/best_model*.pth")
    models = [
        (content["mean_return"], path)
        for path in paths
        if "Breakout" in (content := pqn.load(path, pqn.MODEL))["env_id"]
    ]
    if not models:
        raise UserError("no logs/*/best_model.pth here: train one with python pqn_breakout.py, or name one by --model")
    return max(models)[1]


def load_model(path: Path, device: torch.device) -> tuple[pqn.QNetwork, str, list[str]]:
    """The network of a model file, its environment's id and the names of its actions."""
    env_id = pqn.load(path, pqn.MODEL)["env_id"]
    try:
        actions = make_env(env_id, 0).env_method("get_action_meanings")[0]
    except UserError as error:
        raise UserError(f"{path}: a model for {str(error).removeprefix('--env-id ')}") from None
    network = pqn.QNetwork(len(actions))  # float32: scores should not depend on what the hardware is fast at
    pqn.load(path, pqn.MODEL, network)
    return network.to(device), env_id, actions


ROWS = 4  # of a batch, always: libraries choose other sums, and so other last digits, for batches of other sizes


def make_env(env_id: str, seed: int):
    """One game; Stable-Baselines3 plays the ids that skip a random number of frames."""
    try:
        return pqn.make_env(env_id, 1, seed, num_threads=1)
    except UserError:
        return pqn.make_env(env_id, 1, seed, "sb3")


class Replay:
    """Plays a native game once more, frame by frame and in colour: the same seed and actions make the same game."""

    def __init__(self, env: pqn.AtariVecEnv, seed: int):
        options = env.spec.kwargs | {"frameskip": 1, "stack_num": 1, "maxpool": False, "grayscale": False}
        height, width, _ = AtariEnv(options["game"]).observation_space.shape
        options |= {"img_height": height, "img_width": width, "use_fire_reset": False, "reward_clipping": False}
        self.env = AtariVectorEnv(num_envs=1, num_threads=1, **options)
        self.env.reset(seed=seed)
        self.frame_skip, self.score = env.frame_skip, 0

    def step(self, action: int) -> list[np.ndarray]:
        """The screens, uint8 `(height, width, 3)`, of a step's frames."""
        screens = []
        for _ in range(self.frame_skip):
            screen, reward, terminated, truncated, _ = self.env.step(np.array([action]))
            self.score += int(reward[0])
            screens.append(screen[0, 0])
            if terminated[0] or truncated[0]:
                break
        return screens


class Game:
    """A whole game in an environment of its own; `watch`, if given, sees every step of it (see `play`)."""

    def __init__(self, env_id: str, seed: int, number: int, watch=None):
        self.number, self.watch = number, watch
        self.env = make_env(env_id, seed + number)
        self.rng = np.random.default_rng([seed, number])
        self.frames = self.env.reset()
        self.steps, self.score, self.screens = 0, 0, []
        self.replay = Replay(self.env, seed + number) if watch and isinstance(self.env, pqn.AtariVecEnv) else None

    def step(self, q: np.ndarray, epsilon: float) -> dict | None:
        """Plays a step; returns the game's `r`, its true score, once it is over."""
        (action,) = actions = pqn.epsilon_greedy(q[None], epsilon, self.rng)
        self.frames, (reward,), _, (info,) = self.env.step(actions)
        self.steps += 1
        self.score += reward
        episode = info.get("episode")
        if self.watch:
            action = info.get("action", int(action))  # the environment presses FIRE itself to serve
            if self.replay:
                self.screens, self.score = self.replay.step(action), self.replay.score
            elif not episode:  # after its end the next game would be shown
                self.screens = self.env.get_images()
            self.watch(self.screens, q, action, self.score, info["lives"], self.steps)
        return episode


@torch.inference_mode()
def play(network, env_id: str, episodes: int, epsilon: float, seed: int, watch=None, stopped=bool):
    """Plays whole games, up to ROWS side by side; yields number, score and steps of each at its end.

    With `watch` there is one game at a time, and `watch(screens, q, action, score, lives, step)` is called each step.
    """
    device = next(network.parameters()).device
    numbers, games = deque(range(episodes)), []
    batch = np.zeros((ROWS, 4, 84, 84), dtype=np.uint8)
    with tqdm(unit=" steps", leave=False, disable=None) as steps:
        while (numbers or games) and not stopped():
            while numbers and len(games) < (1 if watch else ROWS):
                games.append(Game(env_id, seed, numbers.popleft(), watch))
            for row, game in zip(batch, games, strict=False):
                row[:] = game.frames[0]
            q = network(torch.from_numpy(batch).to(device)).cpu().numpy()
            for game, values in zip(games.copy(), q, strict=False):
                if episode := game.step(values, epsilon):
                    games.remove(game)
                    yield game.number, episode["r"], game.steps
            steps.update(len(games))


# --- Pictures ---
class Panel:
    """Draws what the network thinks: the value of the state over the last steps, and a bar for each action: how much
    better than the worst one it is, on the scale of the last second, so that close values can be told apart."""

    DIM, TEXT, ACCENT = "#8a97a8", "#eef2f6", "#ffb454"

    def __init__(self, env_id: str, actions: list[str], unit: int):
        self.env_id, self.actions, self.unit = env_id, actions, unit
        self.small, self.large = ImageFont.load_default(5 * unit), ImageFont.load_default(11 * unit)
        self.recent = deque(maxlen=150)

    def draw(self, height: int, q: np.ndarray, action: int, score: float, lives: int, step: int) -> np.ndarray:
        """A picture of the state before a step and of the score after it, 124 of an Atari pixel's `unit` wide."""
        self.recent.append(q)
        values, spread = np.max(self.recent, axis=1), np.ptp(list(self.recent)[-15:], axis=1).max()
        image = Image.new("RGB", (124 * self.unit, height), "#10141b")
        draw = ImageDraw.Draw(image)

        def text(x, y, words, color=self.DIM, anchor="lm", font=self.small):
            draw.text((x * self.unit, y * self.unit), words, color, font, anchor)

        text(7, 9, self.env_id)
        for x, label, value in ((7, "SCORE", score), (52, "LIVES", lives), (80, "STEP", step)):
            text(x, 20, label)
            text(x, 29, f"{value:.0f}", self.TEXT, font=self.large)
        row = min(11, 110 / len(q))
        for i, (name, value) in enumerate(zip(self.actions, q, strict=True)):
            y = 46 + (i + 0.5) * row
            color = self.ACCENT if i == q.argmax() else self.DIM
            text(2, y, ">" if i == action else "", self.TEXT)
            text(7, y, name, color)
            text(117, y, f"{value:.3f}", color, "rm")
            right = 55.5 + 41 * (value - q.min()) / max(spread, 1e-9)
            draw.rectangle([self.unit * edge for edge in (55, y - row / 2 + 1, right, y + row / 2 - 1)], color)
        top, bottom = 58 + row * len(q), height / self.unit - 8
        text(7, top, f"MAX Q, LAST {self.recent.maxlen} STEPS")
        text(117, top, f"{values[-1]:.3f}", self.ACCENT, "rm")
        xs = np.linspace(117, 7, self.recent.maxlen)[: len(values)][::-1]
        ys = bottom - (bottom - top - 6) * (values - values.min()) / max(np.ptp(values), 1e-9)
        draw.line((np.stack((xs, ys), axis=1) * self.unit).flatten().tolist(), self.ACCENT, width=self.unit // 2)
        return np.asarray(image)


class Window:
    """Shows pictures at 60 a second, the speed of the console."""

    def __init__(self, title: str):
        import pygame  # here, for it takes its time

        self.pygame, self.screen, self.due, self.closed = pygame, None, 0.0, False
        try:
            pygame.display.init()
            if pygame.display.get_driver() == "offscreen":  # what SDL comes to when the display does not answer
                raise pygame.error("no display can be reached")
        except pygame.error as error:
            raise UserError(f"no window can be opened: {error}; --video records, --render none only scores") from None
        pygame.display.set_caption(title)

    def show(self, picture: np.ndarray) -> None:
        """Waits until it is time for `picture` and shows it."""
        size = picture.shape[1::-1]
        self.screen = self.screen or self.pygame.display.set_mode(size)
        time.sleep(max(0.0, self.due - time.perf_counter()))
        self.due = max(self.due, time.perf_counter() - 1 / 60) + 1 / 60
        self.screen.blit(self.pygame.image.frombuffer(picture.tobytes(), size, "RGB"), (0, 0))
        self.pygame.display.flip()
        self.closed |= bool(self.pygame.event.get(self.pygame.QUIT))


class Video:
    """Records pictures in a hidden file, which takes the place of `path` once the whole video is there."""

    def __init__(self, path: Path):
        self.path, self.gif, self.frames, self.ffmpeg = path, path.suffix.lower() == ".gif", 0, None
        if path.suffix.lower() not in (".mp4", ".gif") or path.is_dir():
            raise UserError(f"--video {path}: must be a file, and end in .mp4 or .gif")
        self.recorded = path.absolute().with_name(f".{path.stem}.{os.getpid()}.mp4")  # "a:b" is a protocol to ffmpeg
        self.finished = self.recorded.with_suffix(path.suffix.lower())
        self.recorded.touch()  # raises OSError before any game is played

    def start_ffmpeg(self, *options) -> None:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *options]
        # Ctrl-C in the terminal is kept from it: the video is to be finished then, too.
        apart = {"start_new_session": True, "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        self.ffmpeg = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, **apart)

    def finish_ffmpeg(self) -> None:
        _, words = self.ffmpeg.communicate()
        if self.ffmpeg.returncode:
            raise UserError(f"--video {self.path}: ffmpeg failed: {' '.join(words.decode(errors='replace').split())}")

    def show(self, picture: np.ndarray) -> None:
        self.frames += 1
        # A GIF counts hundredths of a second; an odd step keeps sprites that are drawn on every other frame.
        if self.gif and self.frames % 3 != 1:
            return
        if self.ffmpeg is None:
            source = f"-f rawvideo -pix_fmt rgb24 -s {picture.shape[1]}x{picture.shape[0]} -i -".split()
            codec = "-c:v libx264rgb -preset ultrafast -qp 0"  # lossless: the GIF is made from it
            if not self.gif:
                codec = "-c:v libx264 -preset veryfast -crf 18 -pix_fmt yuv420p -movflags faststart -colorspace bt709"
                codec += " -color_primaries bt709 -color_trc bt709 -vf scale=out_color_matrix=bt709:flags=neighbor"
            self.start_ffmpeg("-r", "20" if self.gif else "60", *source, *codec.split(), self.recorded)
        try:
            self.ffmpeg.stdin.write(picture.tobytes())
        except OSError:
            self.finish_ffmpeg()

    def __exit__(self, kind, *_) -> None:
        hidden = {self.recorded, self.finished}
        try:
            if kind is None and self.ffmpeg:
                self.finish_ffmpeg()
                if self.gif:  # from two inputs, or one would be held in memory until the palette is known
                    palette = "[0]palettegen[palette];[1][palette]paletteuse=dither=none:diff_mode=rectangle"
                    self.start_ffmpeg("-i", self.recorded, "-i", self.recorded, "-lavfi", palette, self.finished)
                    self.finish_ffmpeg()
                hidden.remove(self.finished)
                os.replace(self.finished, self.path)  # its error names both
        finally:
            if self.ffmpeg:
                self.ffmpeg.kill()
                self.ffmpeg.wait()
            for path in hidden:
                path.unlink(missing_ok=True)


# --- Main ---
def report(args: Args, env_id: str, path: Path, games: dict[int, tuple[float, int]]) -> None:
    returns, lengths = zip(*(games[number] for number in sorted(games)), strict=True)
    about = {"env_id": env_id, "model": str(path), "episodes": len(games), "epsilon": args.epsilon, "seed": args.seed}
    about |= {"returns": returns, "lengths": lengths, "different_games": len(set(games.values()))}
    about |= {name: float(getattr(np, name)(returns)) for name in ("mean", "std", "median", "min", "max")}
    text = "{episodes} games, {different_games} of them different: mean {mean:.2f}, standard deviation {std:.2f}, "
    text += "median {median:g}, min {min:g}, max {max:g}"
    print(json.dumps(about) if args.json else text.format(**about), flush=True)


def main(stop: list[int]) -> None:
    """Plays and reports as the command line says, until `stop` holds something."""
    args = pqn.parse(Args)
    pqn.check_bounds(args)
    if "" in (args.model, args.video):
        raise UserError("--model and --video: must not be empty")
    # The network gets one thread: the emulators use the other cores, and a trainer may be at work on them.
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    path = Path(args.model) if args.model else find_model()
    network, env_id, actions = load_model(path, pqn.choose_device(args.device))
    window, games = None, {}
    with contextlib.ExitStack() as stack:
        video = stack.push(Video(Path(args.video))) if args.video else None
        display = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"} & os.environ.keys()
        if args.render == "human" or (args.render == "auto" and display and not args.json and not video):
            window = Window(f"{env_id}, {path}")
        viewers = list(filter(None, (video, window)))
        if args.show_q and not viewers:
            raise UserError("--show-q: needs a picture to draw beside: a window (--render human) or --video PATH")
        scale = 4 if video and not video.gif else 3  # H.264 halves the resolution of colours: odd scales would blur
        panel = Panel(env_id, actions, scale)

        def watch(screens, *thoughts) -> None:
            side = [panel.draw(scale * len(screens[0]), *thoughts)] if args.show_q else []
            for screen in screens:
                picture = np.hstack([screen.repeat(scale, axis=0).repeat(scale, axis=1), *side])
                for viewer in viewers:
                    viewer.show(picture)

        if not args.json:
            print(f"{env_id}, epsilon {args.epsilon:g}, model {path}", flush=True)
        options = (args.episodes, args.epsilon, args.seed, watch if viewers else None)
        for number, score, steps in play(network, env_id, *options, lambda: stop or (window and window.closed)):
            games[number] = score, steps
            if not args.json:
                with tqdm.external_write_mode():  # above the count of steps
                    pqn.say(f"game {number + 1}: score {score:g}, {steps} steps")
    if games:
        report(args, env_id, path, games)
    else:
        print("evaluate.py: no game was finished", file=sys.stderr)


if __name__ == "__main__":
    pqn.run_command(main)
