"""Draws training curves from TensorBoard events: score against steps and against minutes.

    python tests/plot_runs.py sticky.png "PQN=logs/reference/breakout_sticky/*"
    python tests/plot_runs.py games_curves.png "PQN=logs/games/*/*" --panels steps

Each LABEL=PATTERN names the runs of one setting. Several runs of a game are drawn as their mean
and range, and a row of a table is printed. The score is the mean of the last 100 training games.
A panel is `steps` or `minutes`, or up to a limit as `steps:2` (million); then it leaves out the
settings that go on for longer. These draw the three pictures of the README:

    python tests/plot_runs.py logs/reference/curves.png --panels steps:2,steps \\
        "recommended=logs/reference/recommended/*" \\
        "without LayerNorm=logs/reference/no_layernorm/*" \\
        "TD(0)=logs/reference/td0/*" \\
        "long run=logs/reference/long/*"
    python tests/plot_runs.py logs/reference/race.png --log \\
        "ours: recommended=logs/reference/race/pqn_recommended" \\
        "ours: TD(0)=logs/reference/race/pqn_td0" \\
        "CleanRL PQN, paper's settings=logs/reference/race/cleanrl_paper" \\
        "SB3 DQN=logs/reference/race/dqn" \\
        "SB3 PPO=logs/reference/race/ppo" \\
        "SB3 PPO, our environments=logs/reference/race/ppo_on_our_environments" \\
        "CleanRL PQN, its settings=logs/reference/race/cleanrl_own"
    python tests/plot_runs.py logs/reference/games_curves.png --panels steps \\
        "PQN=logs/reference/games/*" \\
        "PQN, gamma 0.997=logs/reference/recommended/*" \\
        "PQN, sticky=logs/reference/breakout_sticky/*"
"""

import argparse
import glob
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.ticker import LogLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Horizontal lines. Random play and a human tester: Mnih et al. 2015, extended data table 2.
# CleanRL's PQN after 10,000,000 steps: its documentation.
LEVELS = {
    "Breakout": {"random": 1.7, "human": 31.8, "CleanRL 10M": 385},
    "Pong": {"random": -20.7, "human": 9.3, "CleanRL 10M": 20.5},
    "SpaceInvaders": {"random": 148, "human": 1652, "CleanRL 10M": 1325},
    "BeamRider": {"random": 363.9, "human": 5775, "CleanRL 10M": 5753},
    "MsPacman": {"random": 307.3, "human": 15693, "CleanRL 10M": 2299},
    "Qbert": {"random": 163.9, "human": 13455},
    "Seaquest": {"random": 68.4, "human": 20182},
    "Enduro": {"random": 0, "human": 309.6},
}
# Of Okabe and Ito, told apart by the colour-blind, too; yellow is too pale for a line on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.")
WIDTH = 8.3  # inches; as GitHub shows a README 830 pixels wide, an inch is 100 pixels there
FONT_SIZE = 8  # points, 11 of those pixels
LABEL_GAP = 6  # points between a panel and the labels beside it
UNITS = {"steps": "million steps (4 frames each)", "minutes": "minutes"}


@dataclass
class Setting:
    """The runs of one setting in one game: mean, lowest and highest score at each step."""

    label: str
    seeds: str
    color: str
    line_style: str
    x: dict[str, np.ndarray]  # for each kind of panel
    mean: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    last_score: float


def score_curve(run_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every finished game: steps, minutes of training, and mean of the last 100 games."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    if "charts/episodic_return" not in tags:
        sys.exit(f"{run_dir}: no events of a game that is over")
    games = events.Scalars("charts/episodic_return")
    steps = np.array([game.step for game in games])
    sums = np.cumsum([game.value for game in games])
    sums[100:] -= sums[:-100].copy()
    means = sums / np.minimum(np.arange(1, len(sums) + 1), 100)

    # Long games may end minutes apart: where every rollout has an event, that is the clock.
    clock = events.Scalars("charts/SPS") if "charts/SPS" in tags else games
    times = [events.FirstEventTimestamp()]
    times += [event.wall_time for event in clock]
    seconds = np.diff(times)
    seconds[seconds >= 300] = 0  # the time between a stop and a resumption
    minutes = seconds.cumsum() / 60
    return steps, np.interp(steps, [event.step for event in clock], minutes), means


def table_row(label: str, curves: list) -> str:
    """Means: steps a second, scores after 15, 30, 60 minutes, minutes to 30, 100 and 300."""
    rows = []
    for steps, minutes, scores in curves:
        row = [steps[-1] / minutes[-1] / 60]
        for limit in (15, 30, 60):
            lasted = minutes[-1] > 0.9 * limit
            row.append(scores[minutes <= limit][-1] if lasted else np.nan)
        for goal in (30, 100, 300):
            # A mean counts from the hundredth game on.
            reached = minutes[99:][scores[99:] >= goal]
            row.append(reached[0] if len(reached) else np.nan)
        rows.append(row)
    cells = [f"{cell:.0f}" for cell in np.mean(rows, axis=0)]
    return f"| {label} | {' | '.join(cells)} |".replace("nan", "-")


def game_of(run_dir: Path) -> str:
    env_id = json.loads((run_dir / "args.json").read_text())["env_id"]
    return env_id.removeprefix("ALE/").split("NoFrameskip")[0].split("-")[0]


def read_settings(arguments: list[str]) -> dict[str, list[Setting]]:
    """The settings of each game, from LABEL=PATTERN; prints a row of the table for each."""
    games = {}
    for number, argument in enumerate(arguments):
        label, _, pattern = argument.partition("=")
        run_dirs = sorted(Path(path).parent for path in glob.glob(f"{pattern}/args.json"))
        if not run_dirs:
            sys.exit(f"{argument}: no such runs; they are named as LABEL=PATTERN")
        curves_of_games = {}
        for run_dir in run_dirs:
            curves_of_games.setdefault(game_of(run_dir), []).append(score_curve(run_dir))
        for game, curves in curves_of_games.items():
            setting = summarize(label, number, curves)
            games.setdefault(game, []).append(setting)
            print(table_row(f"{game}, {label}{setting.seeds}", curves))
    return games


def summarize(label: str, number: int, curves: list) -> Setting:
    """One curve of several runs, over the steps that all of them made and their mean minutes."""
    steps = np.linspace(0, min(curve[0][-1] for curve in curves), 400)
    minutes = [np.interp(steps, curve[0], curve[1]) for curve in curves]
    scores = [np.interp(steps, curve[0], curve[2]) for curve in curves]
    return Setting(
        label=label,
        seeds=f", {len(curves)} seeds" if len(curves) > 1 else "",
        color=COLORS[number % len(COLORS)],
        line_style=LINE_STYLES[number % len(LINE_STYLES)],
        x={"steps": steps / 1e6, "minutes": np.mean(minutes, axis=0)},
        mean=np.mean(scores, axis=0),
        lowest=np.min(scores, axis=0),
        highest=np.max(scores, axis=0),
        last_score=float(np.mean([curve[2][-1] for curve in curves])),
    )


def draw_panel(axis, unit: str, limit: float, settings: list[Setting]) -> list[Setting]:
    """Draws the settings that end within the limit; returns those that end at the right edge."""
    shown = [setting for setting in settings if setting.x[unit][-1] <= limit]
    right = max((setting.x[unit][-1] for setting in shown), default=1.0)
    for setting in reversed(shown):  # the first one named lies on top
        x = setting.x[unit]
        color = setting.color
        axis.plot(x, setting.mean, color=color, linestyle=setting.line_style, linewidth=1.6)
        axis.plot(x[-1], setting.mean[-1], color=color, marker="o", markersize=4)
        axis.fill_between(x, setting.lowest, setting.highest, color=color, alpha=0.15, linewidth=0)
    axis.set_xlim(0, 1.02 * right)
    axis.spines[["top", "right"]].set_visible(False)
    return [setting for setting in shown if setting.x[unit][-1] > 0.85 * right]


def draw_levels(axes: list, game: str, space: str) -> list[tuple]:
    """Draws the levels of a game; returns their labels, for the last of its panels.

    A level far above the curves would flatten them: its label, below the title, only points to it.
    """
    labels = []
    bottom, top = axes[0].get_ylim()
    for name, level in LEVELS.get(game, {}).items():
        text = f"{name}{space}{level:,g}"
        if level > 1.3 * top:
            labels.append((axes[-1], bottom + 0.7 * (top - bottom), f"{text}↑", "gray"))
            continue
        labels.append((axes[-1], level, text, "gray"))
        for axis in axes:
            axis.axhline(level, color="gray", linewidth=0.8, linestyle=":", zorder=0)
    return labels


def spread(wanted: list[float], heights: list[float]) -> list[float]:
    """Centres of labels, as near to those wanted as none covers another."""
    centres = list(wanted)
    order = np.argsort(wanted, kind="stable")
    for _ in range(200):
        for low, high in zip(order, order[1:], strict=False):
            overlap = centres[low] + (heights[low] + heights[high]) / 2 - centres[high]
            if overlap > 0:
                centres[low] -= overlap / 2
                centres[high] += overlap / 2
    return centres


def write_labels(figure, labels: list[tuple]) -> None:
    """Writes each (axis, score, text, color) right of its axis, at the height of the score."""
    notes = {}
    for axis, score, text, color in labels:
        note = axis.annotate(
            text,
            (1, score),
            xycoords=axis.get_yaxis_transform(),
            xytext=(LABEL_GAP, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=[0.75 * part for part in to_rgb(color)],  # letters are thinner than lines
            annotation_clip=False,
        )
        notes.setdefault(axis, []).append(note)
    figure.draw_without_rendering()  # gives the panels their places
    for axis, axis_notes in notes.items():
        wanted = [axis.transData.transform((1, note.xy[1]))[1] for note in axis_notes]
        heights = [note.get_window_extent().height + 2 for note in axis_notes]
        centres = spread(wanted, heights)
        for note, old, new in zip(axis_notes, wanted, centres, strict=True):
            note.set_position((LABEL_GAP, (new - old) * 72 / figure.dpi))


def draw(games: dict[str, list[Setting]], panels: list[tuple[str, float]], log: bool):
    """A row of panels for each game; where a game has but one panel, four games in a row."""
    is_grid = len(panels) == 1
    columns = min(len(games), 4) if is_grid else len(panels)
    rows = math.ceil(len(games) * len(panels) / columns)
    space = "\n" if is_grid else " "  # a grid has no room for long labels
    plt.rcParams.update({"font.size": FONT_SIZE, "axes.titlesize": FONT_SIZE})
    height = 3.2 if rows == 1 else 2.3 * rows
    figure = plt.figure(figsize=(WIDTH, height), layout="constrained")
    labels = []
    for row, (game, settings) in enumerate(games.items()):
        axes = []
        label_of = {}
        for column, (unit, limit) in enumerate(panels):
            place = row * len(panels) + column + 1
            axis = figure.add_subplot(rows, columns, place, sharey=axes[0] if axes else None)
            axes.append(axis)
            if not is_grid:
                axis.set_xlabel(UNITS[unit])
            # A setting has one label: where its curve ends beside it, in the last such panel.
            for setting in draw_panel(axis, unit, limit, settings):
                text = f"{setting.label}{space}{setting.last_score:,.0f}{setting.seeds}"
                text = text.replace(", ", "\n")
                label_of[setting.label] = (axis, setting.mean[-1], text, setting.color)
        if log:
            axes[0].set(yscale="log", ylim=(1, None))
            axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes[0].yaxis.set_major_formatter("{x:,.0f}")
        axes[0].set_title(game, loc="left")
        labels += label_of.values()
        labels += draw_levels(axes, game, space)
    figure.supylabel("mean of the last 100 training games", fontsize=FONT_SIZE)
    if is_grid:
        figure.supxlabel(UNITS[panels[0][0]], fontsize=FONT_SIZE)
    write_labels(figure, labels)
    return figure


def panel_list(text: str) -> list[tuple[str, float]]:
    """Units and limits; ValueError for others than steps and minutes."""
    panels = []
    for panel in text.split(","):
        unit, _, limit = panel.partition(":")
        if unit not in UNITS:
            raise ValueError
        panels.append((unit, float(limit or "inf")))
    return panels


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws training curves from TensorBoard events.")
    parser.add_argument("picture", metavar="PICTURE.png")
    parser.add_argument("settings", metavar="LABEL=PATTERN", nargs="+")
    parser.add_argument("--panels", type=panel_list, default="steps,minutes")
    parser.add_argument("--log", action="store_true", help="scores on a logarithmic axis")
    options = parser.parse_args()
    games = read_settings(options.settings)
    figure = draw(games, options.panels, options.log)
    figure.savefig(options.picture, dpi=200)


if __name__ == "__main__":
    main()
