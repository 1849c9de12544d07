"""Draws training curves from TensorBoard events: score against steps and against minutes.

    python tests/plot_runs.py logs/reference/curves.png "TD(0)=logs/reference/td0/*" "Q(0.3)=logs/reference/q_lambda/*"
    python tests/plot_runs.py games.png "TD(0)=logs/reference/td0_pong/*" "TD(0)=logs/reference/td0_space_invaders/*"

Each LABEL=PATTERN names the runs of one setting; several runs are drawn as their mean and range, over the minutes that
they took on average; a table is printed. Every game gets a row. The score is the mean of the last 100 training games.
"""

import glob
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Random play and a human tester: Mnih et al. 2015, extended data table 2.
LEVELS = {"Breakout": (1.7, 31.8), "Pong": (-20.7, 9.3), "SpaceInvaders": (148, 1652)}


def score_curve(run_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, minutes of training (without those between a stop and a resumption), and mean of the last 100 games."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    if "charts/episodic_return" not in events.Tags()["scalars"]:
        sys.exit(f"{run_dir}: no events of a game that is over")
    games = events.Scalars("charts/episodic_return")
    sums = np.cumsum([game.value for game in games])
    sums[100:] -= sums[:-100].copy()
    means = sums / np.minimum(np.arange(1, len(sums) + 1), 100)
    seconds = np.diff([events.FirstEventTimestamp(), *(game.wall_time for game in games)])
    minutes = np.where(seconds < 300, seconds, 0.0).cumsum() / 60
    return np.array([game.step for game in games]), minutes, means


def table_row(label: str, curves: list) -> str:
    """Means of the runs: steps per second, score after 15, 30 and 60 minutes, minutes to a score of 30, 100 and 300."""
    rows = []
    for steps, minutes, scores in curves:
        row = [steps[-1] / minutes[-1] / 60]
        row += [scores[minutes <= limit][-1] if minutes[-1] > 0.9 * limit else np.nan for limit in (15, 30, 60)]
        row += [next(iter(minutes[99:][scores[99:] >= goal]), np.nan) for goal in (30, 100, 300)]
        rows.append(row)
    return f"| {label} | {' | '.join(f'{cell:.0f}' for cell in np.mean(rows, axis=0))} |".replace("nan", "-")


def main() -> None:
    if len(sys.argv) < 3 or any("=" not in setting for setting in sys.argv[2:]):
        sys.exit("usage: python tests/plot_runs.py PICTURE.png LABEL=PATTERN...")
    games = {}
    for setting in sys.argv[2:]:
        label, pattern = setting.split("=", 1)
        run_dirs = sorted(Path(path).parent for path in glob.glob(f"{pattern}/args.json"))
        if not run_dirs:
            sys.exit(f"{pattern}: no such runs")
        env_id = json.loads((run_dirs[0] / "args.json").read_text())["env_id"]
        game = env_id.removeprefix("ALE/").split("NoFrameskip")[0].split("-")[0]
        label += f", {len(run_dirs)} seeds" * (len(run_dirs) > 1)
        games.setdefault(game, []).append((label, [score_curve(run_dir) for run_dir in run_dirs]))
        print(table_row(f"{game}, {label}", games[game][-1][1]))
    size = {"figsize": (12, 4 * len(games)), "sharey": "row", "squeeze": False, "layout": "constrained"}
    figure, rows = plt.subplots(len(games), 2, **size)
    for (game, settings), axes in zip(games.items(), rows, strict=True):
        for color, (label, curves) in zip(plt.colormaps["tab10"].colors, settings, strict=False):
            steps = np.linspace(0, min(curve[0][-1] for curve in curves), 400)
            minutes = np.mean([np.interp(steps, curve[0], curve[1]) for curve in curves], axis=0)
            scores = np.array([np.interp(steps, curve[0], curve[2]) for curve in curves])
            for axis, x in ((axes[0], steps / 1e6), (axes[1], minutes)):
                axis.plot(x, scores.mean(0), color=color, label=label)
                axis.fill_between(x, scores.min(0), scores.max(0), color=color, alpha=0.2, linewidth=0)
        axes[0].set(xlabel="million steps (4 frames each)", ylabel=f"{game}, mean of the last 100 training games")
        axes[1].set(xlabel="minutes")
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            for level, name in zip(LEVELS.get(game, ()), ("random", "human"), strict=False):
                axis.axhline(level, color="gray", linewidth=0.8, linestyle=":")
                axis.text(1, level, name, transform=axis.get_yaxis_transform(), ha="right", va="bottom", color="gray")
        axes[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(sys.argv[1], dpi=150)


if __name__ == "__main__":
    main()
