"""What a policy is worth: tables on held-out rows, plots and pictures of runs, and the log that they read.

    python eval.py --policy out/policy                       # a table by task and tag, with standard errors
    python eval.py --policy out/policy --against toy/policy  # the change from another policy, row by row

Truth is the exact detector of toy/shapes.py through GenEval's checker; the recipes' reward "ins" is built on the same two, the others are
not. Standard errors are over rows (the samples of a prompt are not independent); the mean over tags weighs tags equally, as GenEval does;
the error of a change is paired row by row under --against, and takes the two evaluations as independent in a run's summary. Every number
comes from the seeds given here.
"""

import functools
import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import flow_grpo
from policy import Guidance, Policy
from rewards import Samples
from sample import TOY, Draw, Read, See, Write, images_of, sample_plan, texts_of
from support.checkpoint import gathered, load_policy
from support.disk import write_atomic
from support.memory import room_to_gather
from support.pictures import save_grid, to_bytes
from support.plots import save_figure
from support.rows import Row
from support.run import precision, read_log
from support.terminal import Arguments, one_line, the_device
from tasks import TASKS, Choices, Source, Task, choices_of, guidance_of, in_use, samples_of
from toy.world import detect, rendered, spaced
from toy import shapes

ODE_STEPS, SHIFT, SIZE = 10, 2.0, (32, 32)
ROWS_AT_ONCE = 500


def plain_choices() -> Choices:
    """Greedy text, ODE sampling."""
    draw = Draw(SIZE, flow_grpo.time_grid(ODE_STEPS, SHIFT))
    return Choices(Write(24, temperature=0.0), Write(4, temperature=0.0), draw, request=shapes.THINK)


def mean_and_error(values) -> tuple[float, float]:
    values = np.asarray(values, dtype=float)
    return values.mean().item(), (values.std(ddof=1) / math.sqrt(len(values))).item() if len(values) > 1 else float("nan")


def answered(policy: Policy, task: Task, rows: list[Row], seed: int, samples: int | None = None, guidance: float = 1.0) -> Samples:
    """What rewards and truth read of `samples` of every row, prompt-major; None: as many as the task's evaluation takes. A refinement
    has a first picture of its own for each sample. guidance: of text, where nothing is changed."""
    G, done = samples or task.samples, []
    if task.begin:
        rows, G = [row for row in rows for _ in range(G)], 1
    for i in range(0, len(rows), ROWS_AT_ONCE):
        some, choices = rows[i:i + ROWS_AT_ONCE], plain_choices()
        index = list(range(i, i + len(some)))
        if task.begin:
            some, _ = task.begin(policy, some, choices, seed=seed, step=0, index=index, n=1)
        guided = Guidance(guidance) if guidance > 1 and task.draws and not task.sees else None
        r = sample_plan(policy, task.plan(some, choices), seed=seed, step=0, prompts=index, G=G, guidance=guided)
        done.append(samples_of(policy, task, some, r))
    return joined(done)


def joined(some: list[Samples]) -> Samples:
    """Samples behind one another."""
    def column(name: str):
        held = [getattr(s, name) for s in some]
        if held[0] is None:
            return None
        return torch.cat(held) if isinstance(held[0], Tensor) else [x for each in held for x in each]
    return Samples(*(column(f.name) for f in fields(Samples)))


def right_share(policy: Policy, task: Task, rows: list[Row], seed: int, guidance: float, samples: int | None = None):
    """(share of true samples per row (B,), samples, detections)."""
    held = answered(policy, task, rows, seed, samples, guidance)
    found = detect(held.images) if task.draws else None
    return task.truth(held, found).double().view(len(rows), -1).mean(1).numpy(), held, found


def evaluate(policy: Policy, seed: int = 1234, guidance: float = 1.0) -> dict[str, tuple[float, float]]:
    """name -> (mean, standard error) of `evaluate_rows`."""
    return {name: mean_of(parts) for name, parts in evaluate_rows(policy, seed, guidance).items()}


def mean_of(parts: list[np.ndarray]) -> tuple[float, float]:
    """The mean of the parts' means, and its standard error; the error of one number is nan."""
    means, errors = zip(*map(mean_and_error, parts))
    return float(np.mean(means)), math.hypot(*errors) / len(parts)


def paired_change(before: dict[str, list[np.ndarray]], after: dict[str, list[np.ndarray]]) -> dict[str, tuple[float, float]]:
    """name -> (mean, standard error) of the change from one policy's `evaluate_rows` to another's, row by row: both got the same prompts
    and noise, so that what makes a prompt hard cancels."""
    return {name: mean_of([new - old for old, new in zip(before[name], after[name])]) for name in after}


def evaluate_rows(policy: Policy, seed: int = 1234, guidance: float = 1.0, samples: int | None = None) -> dict[str, list[np.ndarray]]:
    """name -> what each held-out row is worth, in parts that weigh equally (tags, or one): <task>/<tag>, <task>, <task>/held_out (pairs
    that training never shows), and what the task measures beside its truth; captions. guidance: of text, in drawing from text.
    samples: of each row, where the task draws; None: as many as its evaluation takes."""
    table = {}
    for place, (name, task) in enumerate(TASKS.items()):
        if task.held_out is not None:
            table |= evaluate_task(policy, name, task, seed + place, guidance, (samples if task.draws else None) or task.samples)
    return table | {"captions": [captions_truth(policy, seed)]}


def captions_truth(policy: Policy, seed: int, per_prompt: int = 4) -> np.ndarray:
    """The share of right greedy captions, of `per_prompt` exact pictures of each held-out prompt. (prompts,)"""
    rng, rows = np.random.default_rng(seed), TASKS["draw"].held_out(False)
    scenes = [shapes.sample_scene(row.metadata, rng) for row in rows for _ in range(per_prompt)]
    plan = [See(rendered(scenes)), Read([shapes.CAPTION] * len(scenes)), plain_choices().think]
    said = texts_of(policy, sample_plan(policy, plan, seed=seed, step=0, prompts=list(range(len(scenes))), G=1))
    meaning = shapes.spelled()
    right = [text in meaning and shapes.satisfies(meaning[text], shapes.discrete(scene)) for text, scene in zip(said, scenes)]
    return np.array(right, dtype=float).reshape(-1, per_prompt).mean(1)


def evaluate_task(policy: Policy, name: str, task: Task, seed: int, guidance: float, samples: int) -> dict[str, list[np.ndarray]]:
    rows = task.held_out(False)
    right, held, found = right_share(policy, task, rows, seed, guidance, samples)
    table = {f"{name}/{tag}": [right[[row.metadata["tag"] == tag for row in rows]]] for tag in task.tags}
    table[name] = [part for parts in table.values() for part in parts] if task.mean_of_tags else [right]
    if unseen := task.held_out(True):
        table[f"{name}/held_out"] = [right_share(policy, task, unseen, seed + 2, guidance, samples)[0]]
    for part, values in (task.parts(held, found, detect) if task.parts else {}).items():
        table[f"{name}/{part}"] = [values.double().view(len(rows), -1).mean(1).numpy()]
    beside = task.also(rows, held, found, samples) if task.also else {}
    return table | {k: [np.atleast_1d(np.asarray(v, dtype=float))] for k, v in beside.items()}


def print_table(table: dict[str, tuple[float, float]]) -> str:
    """The table as text, one row a name."""
    told = lambda error: f" +- {error:.3f}" if math.isfinite(error) else ""
    return "\n".join(f"{name:<22} {mean:.3f}{told(error)}" for name, (mean, error) in table.items())


def print_change(before: dict, after: dict, change: dict[str, tuple[float, float]]) -> str:
    """Two tables and the change between them as text, one row a name."""
    lines = [f"  {'':<26} {'before':>9} {'after':>9} {'change':>9}"]
    for name, (moved, error) in change.items():
        told = f" +- {error:.3f}" if math.isfinite(error) else ""
        lines.append(f"  {name:<26} {before[name][0]:9.3f} {after[name][0]:9.3f} {moved:+9.3f}{told}")
    return "\n".join(lines)


def markdown_row(name: str, table: dict[str, tuple[float, float]]) -> str:
    """The headlines of a table: tasks, unseen pairs, and what has no error."""
    def cell(key: str) -> str:
        mean, error = table[key]
        return f"{mean:.3f} ± {error:.3f}" if math.isfinite(error) else f"{mean:.2f}"
    plain = [k for k in table if not math.isfinite(table[k][1])]
    keys = [k for k in table if k in TASKS] + [k for k in table if k.endswith("/held_out")] + plain
    return f"| {name} | " + " | ".join(map(cell, keys)) + " |"


# ---- evaluation within a run ----


def evaluate_run(run, step: int) -> None:
    """The averaged weights of a train.Run on held-out rows, logged where their truth is known, and a few prompts drawn into out/samples."""
    cfg, policy = run.cfg, run.policy
    due = cfg.eval_every and run.ranks.rank == 0 and step not in run.log.evaluated
    if policy.sharded:                                          # then all ranks' forwards are needed
        due = run.ranks.total(torch.tensor(int(due), device=run.ranks.device)).item()
    if not due:
        return
    with run.average.swapped(policy), gathered(policy, room_to_gather(policy.device)), precision(cfg, policy.device):
        if run.source.evaluated:
            table = evaluate(policy)
            run.log(step=step, eval={k: [round(x, 5) if math.isfinite(x) else None for x in v] for k, v in table.items()})
        images = preview(policy, run.source, cfg)
    if images is not None and run.ranks.rank == 0:
        path = Path(cfg.out) / "samples" / f"{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(images, str(path), columns=4)


def preview(policy: Policy, source: Source, cfg) -> Tensor | None:
    """(16, 3, H, W) four prompts of step 0 with four samples each, of the last task in use that draws; None where none does."""
    drawing = [name for name in in_use(cfg) if TASKS[name].draws]
    if not drawing:
        return None
    name, choices = drawing[-1], choices_of(cfg, source.look, (0, 0))
    choices = replace(choices, draw=replace(choices.draw, shared_noise=False), again=None)     # equal starts would give equal pictures
    rows = source.pools[name]((cfg.seed, 0, list(TASKS).index(name)), 4, range(4))
    if TASKS[name].begin:
        rows, _ = TASKS[name].begin(policy, rows, choices, seed=cfg.seed, step=0, index=list(range(4)), n=1)
    plan, guidance = TASKS[name].plan(rows, choices), guidance_of(cfg, TASKS[name].sees)
    return images_of(policy, sample_plan(policy, plan, seed=cfg.seed, step=0, prompts=list(range(4)), G=4, guidance=guidance))


# ---- pictures ----


def gallery(task: Task) -> list[Row]:
    """A few held-out rows of a task: one per tag, or two."""
    rows = task.held_out(False)
    return [spaced([row for row in rows if row.metadata["tag"] == tag], 3)[1] for tag in task.tags] or spaced(rows, 4)[1:3]


def before_after(before: Policy, after: Policy, out: Path, per_prompt: int = 6, seed: int = 99) -> None:
    """The same held-out prompts and seeds drawn by two policies side by side; a green bar marks what the detector finds true. The first
    picture of an edit is the one that is changed, with a grey bar."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    once = [task for task in TASKS.values() if task.draws and task.held_out and not task.begin and task.rounds == 1]
    shown = [(task, gallery(task)) for task in once]
    count = sum(len(rows) for _, rows in shown)
    widths = [1] * per_prompt + [0.35] + [1] * per_prompt
    figure, axes = plt.subplots(count, len(widths), figsize=(11, 0.92 * count), width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    for side, policy in enumerate((before, after)):
        line, first = 0, side * (per_prompt + 1)
        for task, rows in shown:
            samples = answered(policy, task, rows, seed, per_prompt)
            right, images = task.truth(samples, detect(samples.images)), to_bytes(samples.images)
            for i, row in enumerate(rows):
                thought = f"   ->   {samples.texts[i * per_prompt]}" if samples.texts else ""
                axes[line, first].set_title(row.text + thought, fontsize=6.5, loc="left", pad=2.5)
                for g in range(per_prompt):
                    axis, n, given = axes[line, first + g], i * per_prompt + g, g == 0 and row.source is not None
                    bar = "silver" if given else "tab:green" if right[n] else "tab:red"
                    axis.imshow(to_bytes(row.source[None])[0] if given else images[n], interpolation="nearest")
                    axis.plot([0, 31], [32.6, 32.6], color=bar, linewidth=3, clip_on=False)
                line += 1
        axes[0, first].annotate(("before", "after")[side], (0, 1.5), xycoords="axes fraction", fontsize=11, weight="bold")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.93, wspace=0.06, hspace=0.42)
    save_figure(figure, out, dpi=130)


def summary(path: Path) -> str:
    """A run's first and last evaluation beside each other."""
    _, rows = read_log(path)
    looks = [r for r in rows if "eval" in r]
    if not looks:
        return f"{path} holds no evaluation"
    first, last = looks[0]["eval"], looks[-1]["eval"]
    change = {k: (b - first[k][0], math.nan if error is None else math.hypot(first[k][1], error))
              for k, (b, error) in last.items() if k in first}
    return f"held-out truth after {looks[-1]['seconds'] / 60:.1f} minutes\n{print_change(first, last, change)}"


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(description="Truth of a policy on the toy's held-out rows.", allow_abbrev=False)
    ap.add_argument("--policy", default=str(TOY), help="a policy folder")
    ap.add_argument("--adapter", default="", help="a folder of adapters to put on")
    ap.add_argument("--guidance", type=float, default=1.0, help="text guidance scale; 1: none")
    ap.add_argument("--against", default="", help="a policy folder: the table shows the change from it, paired row by row")
    ap.add_argument("--samples", type=int, help="images of each prompt; default: by task")
    ap.add_argument("--seed", type=int, default=1234, help="of held-out pictures and noise")
    ap.add_argument("--out", type=Path, default=Path("eval.json"), help="the table as JSON")
    a = ap.parse_args(argv)
    with one_line("eval.py"):
        print(run_table(a))


def policy_of(folder: str, adapter: str = "") -> Policy:
    """A policy that can be measured on the toy; ValueError for another."""
    policy = load_policy(folder, device=the_device(), adapter=adapter)
    if policy.config.scale != "toy":
        raise ValueError("the table is of the toy world; measure a large policy with python -m studies.geneval, or on images that "
                         "sample.py draws")
    return policy


def run_table(a) -> str:
    if a.samples is not None and a.samples < 1:
        raise ValueError(f"--samples {a.samples}: must be at least 1")
    look = functools.partial(evaluate_rows, seed=a.seed, guidance=a.guidance, samples=a.samples)
    rows, out = look(policy_of(a.policy, a.adapter)), a.out
    table = {name: mean_of(parts) for name, parts in rows.items()}
    kept = {"policy": a.policy, "seed": a.seed, "guidance": a.guidance, "samples": a.samples, "table": table}
    told = f"{print_table(table)}\n\n{markdown_row(a.policy, table)}"
    if a.against:
        before = look(load_policy(a.against, device=the_device()))
        kept |= {"against": a.against, "change": paired_change(before, rows)}
        told = f"from {a.against} to {a.policy}\n{print_change({k: mean_of(v) for k, v in before.items()}, table, kept['change'])}"
    write_atomic(out, json.dumps(kept, indent=1).replace("NaN", "null").encode())
    return f"{told}\n\nwritten to {out}"


if __name__ == "__main__":
    main()
