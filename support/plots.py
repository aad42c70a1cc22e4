"""Curves of runs, from their logs, and how a figure is written."""

import io
import re
from pathlib import Path

import numpy as np
from support.disk import write_atomic
from support.run import read_log


def panels_of(looks: list[dict], titles: dict[str, str]) -> list[tuple[str, str]]:
    """(key, title) of the headlines that a run's evaluations hold: tasks, then what has no error."""
    keys = dict.fromkeys(k for row in looks for k, (_, error) in row["eval"].items() if k in titles or error is None)
    return [(k, titles[k] if k in titles else k.replace("_", " ")) for k in sorted(keys, key=lambda k: k not in titles)]


def plot(paths: list[Path], out: Path, titles: dict[str, str]) -> None:
    """Held-out truth with two standard errors, variety within groups, and the training reward, over minutes; one colour a run. What a log
    does not hold leaves a gap."""
    runs = [(path, *read_log(path)) for path in paths]
    looks = {path: [r for r in rows if "eval" in r] for path, _, rows in runs}
    if empty := [path for path in paths if not any(r["eval"] for r in looks[path])]:
        raise ValueError(f"{empty[0]} holds no evaluation to plot")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = panels_of([row for path in paths for row in looks[path]], titles)
    columns = -(-(len(panels) + 1) // (2 if len(panels) > 4 else 1))                        # two rows of many
    lines = -(-(len(panels) + 1) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 3.4 * lines), layout="constrained", squeeze=False)
    axes = axes.flatten()[:len(panels) + 1]
    for axis in figure.axes[len(axes):]:
        axis.set_axis_off()
    for n, (path, head, rows) in enumerate(runs):
        recipe = head["config"]["recipe"]
        style = dict(color=f"C{n}", label=f"{recipe}, seed {head['config']['seed']}", linestyle="--" if recipe == "control" else "-")
        minutes = np.array([r["seconds"] / 60 for r in looks[path]])
        for axis, (key, _) in zip(axes, panels):
            both = [r["eval"].get(key, (None, None)) for r in looks[path]]
            mean, error = np.array([[np.nan if x is None else x for x in pair] for pair in both], dtype=float).T
            axis.plot(minutes, mean, marker="o", markersize=3, **style)
            axis.fill_between(minutes, mean - 2 * error, mean + 2 * error, color=f"C{n}", alpha=0.15, linewidth=0)
        at, reward = rewards_over(rows)
        axes[-1].plot(at, reward, color=f"C{n}", linewidth=1)
    for axis, (key, title) in zip(axes, [*panels, ("", "training reward, start = 1")]):
        axis.set(title=title, xlabel="minutes", **(dict(ylim=(0, 1)) if key in titles else {}))
        if key and key not in titles:
            axis.set_ylim(0, axis.get_ylim()[1] * 1.1)          # from 0, with room above the highest line
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out truth")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    save_figure(figure, out, dpi=110)


def rewards_over(rows: list[dict]) -> tuple[list[float], np.ndarray]:
    """Minutes and the mean of the tasks' training rewards, each divided by its mean over the first five steps that have it."""
    keys = dict.fromkeys(k for r in rows for k in r if re.fullmatch(r"\w+/reward", k))
    steps = [r for r in rows if any(k in r for k in keys)]
    scale = {k: np.mean([r[k] for r in steps if k in r][:5]) for k in keys}
    return [r["seconds"] / 60 for r in steps], np.array([np.mean([r[k] / scale[k] for k in keys if k in r]) for r in steps])


def save_figure(figure, out: Path, dpi: int) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    import matplotlib.pyplot as plt
    held = io.BytesIO()
    figure.savefig(held, dpi=dpi, format="png")
    plt.close(figure)
    write_atomic(Path(out), held.getvalue())
