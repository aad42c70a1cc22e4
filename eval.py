"""Evaluation: fixed held-out prompts and questions, ODE sampling, greedy text; plots of logs.

    python eval.py --policy out/policy                       # a table by GenEval tag and question kind, with standard errors
    python eval.py plot out/log.jsonl control/log.jsonl      # curves of one or several runs

Truth is the exact detector of shapes.py through GenEval's checker; the recipes' reward "ins" is built on the same two, the others are
not. Standard errors are over prompts (their samples are not independent); the mean over tags weighs tags equally, as GenEval does; the
error of a change treats the two evaluations as independent. Every number comes from the seeds given here.
"""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch

import flow_grpo
from checkpoint import load_policy, write_atomic
from policy import Policy
from rewards import geneval_check
from sample import TOY, Arguments, Draw, Read, See, Write, images_of, rollout, scale_of, texts_of, to_bytes
from toy import shapes

KINDS = ("count", "color", "shape", "exists", "relation")
PROMPTS_PER_TAG, SAMPLES, THOUGHTS, QUESTIONS, ODE_STEPS, SHIFT, SIZE = 32, 8, 96, 1000, 10, 2.0, (32, 32)


def rendered(scenes: list[shapes.Scene]) -> torch.Tensor:
    """Scenes as the policy reads their pictures: (N, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(np.stack([shapes.render(s) for s in scenes])).permute(0, 3, 1, 2) / 127.5 - 1


def detector(images: torch.Tensor) -> list[list[dict]]:
    """The toy's exact detector on (N, 3, 32, 32) in [0, 1]."""
    return shapes.detect(to_bytes(images))


def truth(metadata: list[dict], detections: list[list[dict]]) -> np.ndarray:
    """1.0 where GenEval's checker passes, per sample (N,)."""
    return np.array([float(geneval_check(m, found)[0]) for m, found in zip(metadata, detections)])


def spaced(rows: list, n: int) -> list:
    """n rows evenly spaced in the list; all where it has fewer."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, n).round().astype(int))]


def held_out_prompts(pairs: bool = False) -> list[dict]:
    """Evaluation prompts, none of which is trained on: at most PROMPTS_PER_TAG of every tag whose (colour, shape) pairs occur in training
    (3, 6, 9, 15, 32, 32), or, pairs=True, as many of all tags together that name a pair that training never shows.

    Another phrasing of the same meaning is trained on, but for three in ten of position and nearly half of color_attr (`shapes.prompts`)."""
    pool = [m for m in shapes.prompts("eval") if ("held_out" in m) == pairs]
    if pairs:
        return spaced(pool, PROMPTS_PER_TAG)
    return [m for tag in shapes.TAGS for m in spaced([m for m in pool if m["tag"] == tag], PROMPTS_PER_TAG)]


def held_out_questions(pairs: bool = False, seed: int = 7):
    """(scenes, questions): QUESTIONS scenes that training never asks about, one question each, kinds in turn; with pairs=True half as
    many, each with a (colour, shape) pair that training never shows."""
    rng, scenes, questions = np.random.default_rng(seed), [], []
    while len(questions) < QUESTIONS // (1 + pairs):
        kind, scene = KINDS[len(questions) % len(KINDS)], shapes.random_scene(rng, "eval")
        if any((o.color, o.shape) in shapes.HELD_OUT for o in scene) == pairs and kind in shapes.question_kinds(scene):
            scenes.append(scene)
            questions.append(shapes.make_question(scene, rng, kind, training=False))
    return scenes, questions


def mean_and_error(values) -> tuple[float, float]:
    values = np.asarray(values, dtype=float)
    return values.mean().item(), (values.std(ddof=1) / math.sqrt(len(values))).item() if len(values) > 1 else float("nan")


def draw_eval(policy: Policy, metadata: list[dict], think: bool, seed: int, samples: int = SAMPLES):
    """Samples of every prompt, prompt-major: (images (N, 3, H, W) in [0, 1], texts or None)."""
    plan = [Read([m["prompt"] for m in metadata])] + [Write(24, temperature=0.0)] * think
    plan.append(Draw(SIZE, flow_grpo.time_grid(ODE_STEPS, SHIFT)))
    r = rollout(policy, plan, seed=seed, step=0, prompts=list(range(len(metadata))), G=samples)
    return images_of(policy, r), texts_of(policy, r)


def answer_eval(policy: Policy, scenes, questions, batch: int = 500) -> list[str]:
    """Greedy answers to the questions about the rendered scenes."""
    out = []
    for i in range(0, len(scenes), batch):
        pixels = rendered(scenes[i:i + batch])
        plan = [See(pixels), Read([q["question"] for q in questions[i:i + batch]]), Write(4, temperature=0.0)]
        out += texts_of(policy, rollout(policy, plan, seed=0, step=0, prompts=list(range(len(pixels))), G=1))
    return out


def drawn_truth(policy: Policy, metadata: list[dict], seed: int):
    """(share of true samples per prompt (B,), images, detections) of prompts drawn at once."""
    images, _ = draw_eval(policy, metadata, think=False, seed=seed)
    found = detector(images)
    return truth([m for m in metadata for _ in range(SAMPLES)], found).reshape(-1, SAMPLES).mean(1), images, found


def evaluate(policy: Policy, seed: int = 1234) -> dict[str, tuple[float, float]]:
    """name -> (mean, standard error): draw/<tag>, draw, think, thought, ask/<kind>, ask, the variety of draw within groups, and draw and
    ask on pairs that training never shows (held_out)."""
    table, metadata = {}, held_out_prompts()
    right, images, found = drawn_truth(policy, metadata, seed)
    for tag in shapes.TAGS:
        table[f"draw/{tag}"] = mean_and_error([r for r, m in zip(right, metadata) if m["tag"] == tag])
    parts = [table[f"draw/{tag}"] for tag in shapes.TAGS]
    table["draw"] = (float(np.mean([m for m, _ in parts])), math.sqrt(sum(e * e for _, e in parts)) / len(parts))
    table["draw/held_out"] = mean_and_error(drawn_truth(policy, held_out_prompts(pairs=True), seed + 2)[0])
    table |= {name: (value, float("nan")) for name, value in shapes.diversity(to_bytes(images), found, SAMPLES).items()}
    implicit = spaced([m for m in shapes.implicit_prompts("eval") if "held_out" not in m], THOUGHTS)
    images, texts = draw_eval(policy, implicit, think=True, seed=seed + 1, samples=4)
    table["think"] = mean_and_error(truth([m for m in implicit for _ in range(4)], detector(images)).reshape(-1, 4).mean(1))
    table["thought"] = mean_and_error([float(t == m["thought"]) for t, m in zip(texts[::4], implicit)])
    scenes, questions = held_out_questions()
    right = [float(a.strip() == q["answer"]) for a, q in zip(answer_eval(policy, scenes, questions), questions)]
    for kind in KINDS:
        table[f"ask/{kind}"] = mean_and_error([r for r, q in zip(right, questions) if q["kind"] == kind])
    table["ask"] = mean_and_error(right)
    scenes, questions = held_out_questions(pairs=True)
    table["ask/held_out"] = mean_and_error([a.strip() == q["answer"] for a, q in zip(answer_eval(policy, scenes, questions), questions)])
    return table


def print_table(table: dict[str, tuple[float, float]]) -> str:
    """The table as text, one row a name."""
    return "\n".join(f"{name:<22} {mean:.3f}" + (f" +- {error:.3f}" if math.isfinite(error) else "") for name, (mean, error) in table.items())


def markdown_row(name: str, table: dict[str, tuple[float, float]]) -> str:
    cell = lambda k: f"{table[k][0]:.3f} ± {table[k][1]:.3f}" if math.isfinite(table[k][1]) else f"{table[k][0]:.2f}"
    columns = ("draw", "think", "ask", "draw/held_out", "ask/held_out", "layout_entropy", "pairwise_distance")
    return f"| {name} | " + " | ".join(map(cell, columns)) + " |"


# ---- pictures ----


def read_log(path: Path) -> tuple[dict, list[dict]]:
    """A log's first record and the others. A torn last line, as a crash leaves it, is dropped."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not rows or not all(isinstance(row, dict) for row in rows) or "config" not in rows[0]:
        raise ValueError(f"{path} is not a log of train.py: its first line must hold the config")
    return rows[0], rows[1:]


def plot(paths: list[Path], out: Path) -> None:
    """Held-out truth with two standard errors, within-group variety, and the training reward, over minutes; one colour a run."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = (("draw", "text to image"), ("think", "think, then draw"), ("ask", "questions"), ("layout_entropy", "layout entropy, bits"))
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(17, 3.4), layout="constrained")
    for n, path in enumerate(paths):
        head, rows = read_log(path)
        looks = [r for r in rows if "eval" in r]
        if not looks or any(key not in r["eval"] for r in looks for key, _ in panels):
            raise ValueError(f"{path} holds no evaluation to plot")
        minutes = [r["seconds"] / 60 for r in looks]
        name = f"{head['config']['recipe']}, seed {head['config']['seed']}"
        for axis, (key, title) in zip(axes, panels):
            mean, error = np.array([[np.nan if x is None else x for x in r["eval"][key]] for r in looks], dtype=float).T
            axis.plot(minutes, mean, marker="o", markersize=3, color=f"C{n}", label=name,
                      linestyle="--" if head["config"]["recipe"] == "control" else "-")
            if np.isfinite(error).all():
                axis.fill_between(minutes, mean - 2 * error, mean + 2 * error, color=f"C{n}", alpha=0.15, linewidth=0)
            axis.set(title=title, xlabel="minutes")
            axis.spines[["top", "right"]].set_visible(False)
        steps = [r for r in rows if "eval" not in r]
        keys = [k for k in (steps[0] if steps else {}) if re.fullmatch(r"\w+/reward", k)]
        if keys:
            reward = np.array([[r[k] for k in keys] for r in steps]).mean(1)
            axes[-1].plot([r["seconds"] / 60 for r in steps], reward / reward[:5].mean(), color=f"C{n}", linewidth=1)
    axes[-1].set(title="training reward, start = 1", xlabel="minutes")
    axes[-1].spines[["top", "right"]].set_visible(False)
    for axis in axes[:3]:
        axis.set_ylim(0, 1)
    axes[0].set_ylabel("held-out truth")
    axes[3].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def before_after(before: Policy, after: Policy, out: Path, per_prompt: int = 6, seed: int = 99) -> None:
    """The same held-out prompts and seeds drawn by two policies side by side; a green bar marks what the detector finds true."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plain = [spaced([m for m in held_out_prompts() if m["tag"] == tag], 3)[1] for tag in shapes.TAGS]
    implicit = spaced([m for m in shapes.implicit_prompts("eval") if "held_out" not in m], 4)[1:3]
    grids = []
    for policy in (before, after):
        drawn, _ = draw_eval(policy, plain, False, seed, per_prompt)
        thought, texts = draw_eval(policy, implicit, True, seed, per_prompt)
        images, metadata = torch.cat([drawn, thought]), [m for m in plain + implicit for _ in range(per_prompt)]
        grids.append((to_bytes(images), truth(metadata, detector(images)), texts[::per_prompt]))
    rows = len(plain) + len(implicit)
    figure, axes = plt.subplots(rows, 2 * per_prompt + 1, figsize=(11, 0.92 * rows), width_ratios=[1] * per_prompt + [0.35] + [1] * per_prompt)
    for axis in axes.flat:
        axis.set_axis_off()
    for side, (images, right, texts) in enumerate(grids):
        for i, (image, ok) in enumerate(zip(images, right)):
            row, column = divmod(i, per_prompt)
            axis = axes[row, column + side * (per_prompt + 1)]
            axis.imshow(image, interpolation="nearest")
            axis.plot([0, 31], [32.6, 32.6], color="tab:green" if ok else "tab:red", linewidth=3, clip_on=False)
        for row, m in enumerate(plain + implicit):
            title = m["prompt"] if row < len(plain) else f"{m['prompt']}   ->   {texts[row - len(plain)]}"
            axes[row, side * (per_prompt + 1)].set_title(title, fontsize=6.5, loc="left", pad=2.5)
        axes[0, side * (per_prompt + 1)].annotate(("before", "after")[side], (0, 1.5), xycoords="axes fraction", fontsize=11, weight="bold")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.93, wspace=0.06, hspace=0.42)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def summary(path: Path) -> str:
    """A run's first and last evaluation beside each other."""
    _, rows = read_log(path)
    looks = [r for r in rows if "eval" in r]
    if not looks:
        return f"{path} holds no evaluation"
    (first, last), minutes = (looks[0]["eval"], looks[-1]["eval"]), looks[-1]["seconds"] / 60
    lines = [f"held-out truth after {minutes:.1f} minutes    before     after    change"]
    for name in last:
        (a, ea), (b, eb) = first[name], last[name]
        error = "" if ea is None else f" +- {math.hypot(ea, eb):.3f}"
        lines.append(f"  {name:<26} {a:9.3f} {b:9.3f} {b - a:+9.3f}{error}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(description="Evaluate a policy on the toy; plot logs.", allow_abbrev=False)
    ap.add_argument("what", nargs="?", default="table", choices=["table", "plot"])
    ap.add_argument("logs", nargs="*", type=Path, help="log.jsonl files to plot")
    ap.add_argument("--policy", default=str(TOY), help="a policy folder")
    ap.add_argument("--adapter", default="", help="a folder of adapters to put on")
    ap.add_argument("--seed", type=int, default=1234)
    ap.add_argument("--out", type=Path, help="where to write: eval.json, or curves.png")
    a = ap.parse_args(argv)
    try:
        if a.what == "plot":
            if not a.logs:
                raise ValueError("plot needs at least one log.jsonl")
            plot(a.logs, a.out or Path("curves.png"))
            print(f"curves in {a.out or 'curves.png'}")
        else:
            policy = load_policy(a.policy, device="cuda" if torch.cuda.is_available() else "cpu", adapter=a.adapter)
            if scale_of(policy.config.llm["hidden_size"]) != "toy":
                raise ValueError("the table is of the toy world; a large policy is measured by its own benchmarks on images that sample.py draws")
            table = evaluate(policy, a.seed)
            out = a.out or Path("eval.json")
            print(f"{print_table(table)}\n\n{markdown_row(a.policy, table)}\n", flush=True)
            write_atomic(out, json.dumps({"policy": a.policy, "seed": a.seed, "table": table}, indent=1).replace("NaN", "null").encode())
            print(f"written to {out}")
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
