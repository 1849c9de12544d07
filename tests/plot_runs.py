"""Draws training curves from TensorBoard events: score against steps and against minutes.

    python tests/plot_runs.py logs/reference/curves.png "TD(0)=logs/reference/td0/*" "Q(0.3)=logs/reference/q_lambda/*"

Each LABEL=PATTERN names the runs of one setting; several runs are drawn as their mean and range. The score is the mean
of the last 100 training games, as `best_model.pth` is chosen by.
"""

import glob
import sys

import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RANDOM, HUMAN = 1.7, 31.8  # Breakout, Mnih et al. 2015, extended data table 2


def score_curve(run_dir: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, minutes of training (without those between a stop and a resumption), and mean of the last 100 games."""
    events = EventAccumulator(run_dir, size_guidance={"scalars": 0}).Reload()
    games = events.Scalars("charts/episodic_return")
    returns = np.array([game.value for game in games])
    sums = np.cumsum(np.insert(returns, 0, 0.0))
    ends = np.arange(1, len(returns) + 1)
    starts = np.maximum(ends - 100, 0)
    seconds = np.diff([events.FirstEventTimestamp(), *(game.wall_time for game in games)])
    minutes = np.where(seconds < 300, seconds, 0.0).cumsum() / 60
    return np.array([game.step for game in games]), minutes, (sums[ends] - sums[starts]) / (ends - starts)


def main() -> None:
    if len(sys.argv) < 3 or any("=" not in setting for setting in sys.argv[2:]):
        sys.exit("usage: python tests/plot_runs.py PICTURE.png LABEL=PATTERN...")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for color, setting in zip(plt.colormaps["tab10"].colors, sys.argv[2:], strict=False):
        label, pattern = setting.split("=", 1)
        curves = [score_curve(run_dir) for run_dir in sorted(glob.glob(pattern))]
        if not curves:
            sys.exit(f"{pattern}: no such runs")
        for axis, column, unit in ((axes[0], 0, 1e6), (axes[1], 1, 1)):
            x = np.linspace(0, min(curve[column][-1] for curve in curves), 400)
            scores = np.array([np.interp(x, curve[column], curve[2]) for curve in curves])
            axis.plot(x / unit, scores.mean(0), color=color, label=label)
            axis.fill_between(x / unit, scores.min(0), scores.max(0), color=color, alpha=0.2, linewidth=0)
    axes[0].set(xlabel="million steps (4 frames each)", ylabel="score, mean of the last 100 training games")
    axes[1].set(xlabel="minutes")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        for level, name in ((RANDOM, "random"), (HUMAN, "human")):
            axis.axhline(level, color="gray", linewidth=0.8, linestyle=":")
            axis.annotate(name, (1, level), xycoords=("axes fraction", "data"), color="gray", ha="right", va="bottom")
    axes[0].legend(frameon=False)
    figure.savefig(sys.argv[1], dpi=150)


if __name__ == "__main__":
    main()
