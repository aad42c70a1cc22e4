"""Curves of runs, from their logs, and the one way in which a figure is written."""

import io
import os
import re
from pathlib import Path

import numpy as np

from support.disk import write_atomic
from support.run import read_log


def plot(paths: list[Path], out: Path, titles: dict[str, str]) -> None:
    """Plot held-out truth with two standard errors, and the training reward, over minutes.

    Each run has a colour. titles: of the evaluated tasks, by key. What a log does not hold leaves a
    gap. Errors: ValueError for a log without an evaluation.
    """
    runs = [(path, *read_log(path)) for path in paths]
    for path, _, rows in runs:
        if not any(row.get("eval") for row in rows):
            raise ValueError(f"{path} holds no evaluation to plot")
    keys = evaluated_keys([row for _, _, rows in runs for row in rows if "eval" in row], titles)
    lines = 2 if len(keys) > 4 else 1
    columns = -(-(len(keys) + 1) // lines)
    size = (3.4 * columns, 3.4 * lines)
    figure, axes = pyplot().subplots(
        lines, columns, figsize=size, layout="constrained", squeeze=False)
    *panels, last = axes.flatten()[:len(keys) + 1]
    for axis in axes.flatten()[len(keys) + 1:]:
        axis.set_axis_off()
    for number, (_, head, rows) in enumerate(runs):
        color, config = f"C{number}", head["config"]
        label = f"{config['recipe']}, seed {config['seed']}"
        dashes = "--" if config["recipe"] == "control" else "-"
        for axis, key in zip(panels, keys):
            minutes, mean, error = curve(rows, key)
            low, high = mean - 2 * error, mean + 2 * error
            axis.plot(minutes, mean, dashes, color=color, label=label, marker="o", markersize=3)
            axis.fill_between(minutes, low, high, color=color, alpha=0.15, linewidth=0)
        last.plot(*reward_curve(rows), color=color, linewidth=1)
    for axis, key in zip(panels, keys):
        axis.set_title(titles.get(key, key.replace("_", " ")))
        axis.set_ylim(0, 1 if key in titles else axis.get_ylim()[1] * 1.1)
    last.set_title("training reward, start = 1")
    for axis in (*panels, last):
        axis.set_xlabel("minutes")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("held-out truth")
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    save_figure(figure, out, dpi=110)


def evaluated_keys(rows: list[dict], titles: dict[str, str]) -> list[str]:
    """The headlines that evaluations hold: tasks first, then numbers that have no error."""
    keys = {}
    for row in rows:
        for key, (_, error) in row["eval"].items():
            if key in titles or error is None:
                keys[key] = key not in titles
    return sorted(keys, key=keys.get)


def curve(rows: list[dict], key: str) -> np.ndarray:
    """(3, evaluations) minutes, mean and standard error of a headline; NaN is a gap."""
    points = []
    for row in rows:
        if "eval" in row:
            mean, error = row["eval"].get(key, (None, None))
            points.append([row["seconds"] / 60, mean, error])
    return np.array(points, dtype=float).T      # None becomes NaN


def reward_curve(rows: list[dict]) -> tuple[list[float], list[float]]:
    """Minutes, and the mean of the tasks' rewards, each divided by the mean of its first five."""
    minutes, means, first = [], [], {}
    for row in rows:
        rewards = {key: value for key, value in row.items() if re.fullmatch("[^/]+/reward", key)}
        for key, value in rewards.items():
            first.setdefault(key, []).append(value)
        if rewards:
            minutes.append(row["seconds"] / 60)
            means.append(rewards)
    scale = {key: np.mean(values[:5]) for key, values in first.items()}
    return minutes, [np.mean([value / scale[key] for key, value in step.items()]) for step in means]


def pyplot():
    """matplotlib's pyplot, which writes files and opens no window.

    A notebook hands its own backend to the programs that it starts, where it may not be installed.
    """
    os.environ["MPLBACKEND"] = "Agg"
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, out: Path, dpi: int) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    png = io.BytesIO()
    figure.savefig(png, dpi=dpi, format="png")
    pyplot().close(figure)
    write_atomic(Path(out), png.getvalue())
