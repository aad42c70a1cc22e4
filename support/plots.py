"""Curves of runs, from their logs, and the one way in which a figure is written."""

import math
import os
from pathlib import Path

import numpy as np

from support.disk import replacing
from support.run import FREE, read_log


def plot(paths: list[Path], out: Path, titles: dict[str, str]) -> None:
    """Plot held-out truth with two standard errors over minutes, a panel a task, a colour a run.

    Runs that differ in nothing but the seed are one line: their mean, with the error over seeds.
    titles: of the evaluated tasks, by key. What a log does not hold leaves a gap. Errors:
    ValueError for a log without an evaluation.
    """
    runs = [read_log(path) for path in paths]
    for path, (_, rows) in zip(paths, runs):
        if not any(row.get("eval") for row in rows):
            raise ValueError(f"{path} holds no evaluation to plot")
    known = {key for _, rows in runs for row in rows for key in row.get("eval", ())}
    keys = [key for key in titles if key in known]
    columns = -(-len(keys) // 2)
    figure, axes = pyplot().subplots(
        2, columns, figsize=(3.4 * columns, 6.8), layout="constrained", squeeze=False)
    for axis in axes.flat[len(keys):]:
        axis.set_axis_off()
    for axis, key in zip(axes.flat, keys):
        for group in by_settings(runs):
            minutes, mean, error = curve([rows for _, rows in group], key)
            seeds = ", ".join(str(head["config"]["seed"]) for head, _ in group)
            label = f"{group[0][0]['config']['recipe']}, seed {seeds}"
            axis.plot(minutes, mean, label=label, marker="o", markersize=3)
            axis.fill_between(minutes, mean - 2 * error, mean + 2 * error, alpha=0.15, linewidth=0)
        axis.set(title=titles[key], ylim=(0, 1), xlabel="minutes")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("held-out truth")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower right")
    save_figure(figure, out, dpi=110)


def by_settings(runs: list[tuple[dict, list[dict]]]) -> list[list[tuple[dict, list[dict]]]]:
    """Runs (head, rows of the log) in groups that differ in the seed alone.

    Settings that change nothing are passed over."""
    groups = {}
    for run in runs:
        settings = run[0]["config"] | dict.fromkeys(["seed", *FREE])
        groups.setdefault(str(settings), []).append(run)
    return list(groups.values())


def curve(runs: list[list[dict]], key: str) -> np.ndarray:
    """(3, evaluations) minutes, mean and standard error of a headline; NaN is a gap.

    Of one run's rows, whose error is over held-out rows; or of several, the mean and the error over
    them at the steps that all evaluate."""
    by_step = [{row["step"]: row for row in rows if "eval" in row} for rows in runs]
    points = []
    for step in sorted(set.intersection(*map(set, by_step))):
        values = []
        for looks in by_step:
            row = looks[step]
            values.append([row["seconds"] / 60, *row["eval"].get(key, (None, None))])
        values = np.array(values, dtype=float)  # None becomes NaN
        minutes, mean, error = values.mean(0)
        if len(runs) > 1:
            error = values[:, 1].std(ddof=1) / math.sqrt(len(runs))
        points.append((minutes, mean, error))
    return np.array(points).reshape(-1, 3).T


def pyplot():
    """matplotlib's pyplot, which writes files and opens no window.

    A notebook hands its own backend to the programs that it starts, where it may not be installed.
    """
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, out: Path, dpi: int) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    with replacing(out) as file:
        figure.savefig(file, dpi=dpi, format="png")
    pyplot().close(figure)
