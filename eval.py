"""What a policy is worth: the truth of its pictures and answers on rows that training never shows.

    python eval.py --policy out/policy                       # a table by task and tag
    python eval.py --policy out/policy --against toy/policy  # the change from another policy

Truth is the exact detector of toy/shapes.py through GenEval's checker. The reward "ins" is built on
the same two; the other rewards are not. Standard errors are over rows, since the samples of a
prompt are not independent. The mean over tags weighs tags equally, as GenEval does. Under --against
the error of a change is paired row by row; a run's own summary takes its two evaluations as
independent. Every random number comes from --seed.

Legend: B rows, G samples of each, N = B*G prompt-major.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from policy import Guidance, Policy
from rewards import Samples
from sample import TOY, Read, See, Write, images_of, plain_draw, sample_plan, texts_of
from support.checkpoint import keep_gathered, load_policy
from support.disk import write_json
from support.memory import room_to_gather
from support.pictures import save_grid, to_bytes
from support.plots import plot, pyplot, save_figure
from support.rows import Row
from support.run import precision, read_log
from support.terminal import Arguments, new_file, number, the_device
from tasks import (
    TASKS, WORDING, Choices, Source, Task, choices_of, first_pictures, guidance_of, keep_first,
    random_place, samples_of)
from toy import shapes
from toy.world import detect, evenly_spaced, render_pixels

SIZE = (32, 32)

# name -> what each held-out row is worth, in parts that weigh equally: one array a tag, or one
RowValues = dict[str, list[np.ndarray]]
# name -> (mean, standard error); the error of a single number is nan
Table = dict[str, tuple[float, float]]


def plain_choices(scale: str) -> Choices:
    """Greedy text, and pictures without noisy steps, or of image tokens at temperature 1."""
    think = Write(24, temperature=0.0)
    answer = Write(4, temperature=0.0)
    return Choices(think, answer, plain_draw(scale, SIZE), WORDING[scale])


# ---- samples and their truth ----


def sample_task(
    policy: Policy, task: Task, rows: list[Row], seed: int, G: int, guidance: float = 1.0
) -> Samples:
    """Sample every row of a task -> what rewards and truth read of it, prompt-major.

    A refinement gets a first picture of its own for each sample. guidance: scale of text guidance
    in drawing from text; edits and refinements are drawn without.
    """
    choices = plain_choices(policy.config.scale)
    if task.refines:
        rows = [row for row in rows for _ in range(G)]
        index = range(len(rows))
        rows, _ = first_pictures(policy, rows, choices, seed=seed, step=0, index=index, n=1)
        G = 1
    scale = 1.0 if task.redraws else guidance
    rollout = sample_plan(
        policy, task.plan(rows, choices), seed=seed, step=0, index=range(len(rows)), G=G,
        guidance=Guidance(scale))
    return samples_of(policy, task, rows, rollout)


def evaluate_rows(
    policy: Policy, seed: int = 1234, guidance: float = 1.0, samples: int | None = None,
    split: str = "test", only: str = ""
) -> RowValues:
    """What each held-out row is worth to a policy.

    The names are <task>/<tag>, <task>, <task>/held_out (pairs of colour and shape that training
    never shows), what a task measures besides its truth, and captions. guidance: see `sample_task`.
    samples: of each row of a task that draws; None: as many as its evaluation takes. split: "test",
    or "validation", see toy/world.py. only: the one task to evaluate.
    """
    values = {}
    for place, task in enumerate(TASKS.values()):
        if task.held_out and can_do(policy, task) and only in ("", task.name):
            G = samples if samples and task.draws else task.samples
            values |= evaluate_task(policy, task, seed + place, guidance, G, split)
    if not only:
        values["captions"] = [captions_truth(policy, seed)]
    return values


def can_do(policy: Policy, task: Task) -> bool:
    """Whether a policy knows a task: only one that reads latents edits."""
    return task.file != "edits" or policy.reads_latents


def evaluate_task(
    policy: Policy, task: Task, seed: int, guidance: float, G: int, split: str = "test"
) -> RowValues:
    """One task's part of `evaluate_rows`."""
    name = task.name
    rows = task.held_out(split)
    samples, found, right = sample_truth(policy, task, rows, seed, G, guidance)
    right = mean_of_groups(right, G)                                                # (B,)
    tags = np.array([row.metadata["tag"] for row in rows])
    values = {f"{name}/{tag}": [right[tags == tag]] for tag in task.tags}
    values[name] = sum(values.values(), []) if task.mean_of_tags else [right]
    unseen = task.held_out("unseen") if split == "test" else []
    if unseen:
        _, _, others = sample_truth(policy, task, unseen, seed + 2, G, guidance)
        values[f"{name}/held_out"] = [mean_of_groups(others, G)]
    parts = task.parts(samples, found) if task.parts else {}
    if task.before:
        parts |= parts_of_stops(task, samples)
    for part, each in parts.items():
        values[f"{name}/{part}"] = [mean_of_groups(each, G)]
    if task.also:
        for key, value in task.also(rows, samples, found, G).items():
            values[key] = [np.array(value, dtype=float, ndmin=1)]
    return values


def parts_of_stops(task: Task, samples: Samples) -> dict[str, Tensor]:
    """What refinements are worth if the policy itself may keep the picture before: name -> (N,).

    It keeps it by a diagnosis that nothing needs to change; `self_kept` says how often.
    """
    kept, samples = keep_first(samples, task, WORDING["toy"])
    found = detect(samples.images)
    parts = task.parts(samples, found)
    return {
        "self_repaired": parts["repaired"], "self_spoiled": parts["spoiled"],
        "self_kept": kept.cpu(), "self": task.truth(samples, found)}


def sample_truth(
    policy: Policy, task: Task, rows: list[Row], seed: int, G: int, guidance: float = 1.0
) -> tuple[Samples, list | None, Tensor]:
    """(samples, the detector's findings in each picture if the task draws, (N,) what is right)."""
    samples = sample_task(policy, task, rows, seed, G, guidance)
    found = detect(samples.images) if task.draws else None
    return samples, found, task.truth(samples, found)


def mean_of_groups(values: Tensor, G: int) -> np.ndarray:
    """(N,) values of samples -> (B,) means over each row's samples."""
    return values.double().view(-1, G).mean(1).numpy()


def captions_truth(policy: Policy, seed: int, per_prompt: int = 4) -> np.ndarray:
    """(B,) the share of right greedy captions of `per_prompt` exact pictures of each prompt."""
    rng = np.random.default_rng(seed)
    scenes = []
    for row in TASKS["draw"].held_out("test"):
        scenes += [shapes.sample_scene(row.metadata, rng) for _ in range(per_prompt)]
    questions = Read([shapes.CAPTION] * len(scenes))
    think = plain_choices(policy.config.scale).think
    plan = [See(render_pixels(scenes)), questions, think]
    rollout = sample_plan(policy, plan, seed=seed, step=0, index=range(len(scenes)), G=1)
    meaning = shapes.captions_by_text()
    right = []
    for text, scene in zip(texts_of(policy, rollout), map(shapes.discrete, scenes)):
        right.append(text in meaning and shapes.satisfies(meaning[text], scene))
    return mean_of_groups(torch.tensor(right), per_prompt)


# ---- tables ----


def mean_and_error(values) -> tuple[float, float]:
    """The mean of some numbers and its standard error, which is nan for one number."""
    values = np.asarray(values, dtype=float)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def mean_of_parts(parts: list[np.ndarray]) -> tuple[float, float]:
    """The mean of the parts' means, and its standard error."""
    means, errors = zip(*map(mean_and_error, parts))
    return float(np.mean(means)), math.hypot(*errors) / len(parts)


def table_of(values: RowValues) -> Table:
    return {name: mean_of_parts(parts) for name, parts in values.items()}


def paired_change(before: RowValues, after: RowValues) -> Table:
    """The change from one policy's `evaluate_rows` to another's, row by row.

    Both got the same prompts and noise, so that what makes a prompt hard cancels.
    """
    return table_of({name: list(map(np.subtract, after[name], before[name])) for name in after})


def as_json(table: Table) -> dict[str, list[float | None]]:
    """A table as JSON can hold it: null for an error that is not known."""
    return {name: [None if math.isnan(x) else x for x in pair] for name, pair in table.items()}


def print_error(error: float) -> str:
    return "" if math.isnan(error) else f" +- {error:.3f}"


def print_table(table: Table) -> str:
    """The table as text, one row a name."""
    lines = [f"{name:<22} {mean:.3f}{print_error(error)}" for name, (mean, error) in table.items()]
    return "\n".join(lines)


def print_change(before: Table, after: Table, change: Table) -> str:
    """Two tables and the change between them as text, one row a name."""
    lines = [f"  {'':<26} {'before':>9} {'after':>9} {'change':>9}"]
    for name, (mean, error) in change.items():
        both = f"{before[name][0]:9.3f} {after[name][0]:9.3f}"
        lines.append(f"  {name:<26} {both} {mean:+9.3f}{print_error(error)}")
    return "\n".join(lines)


# ---- evaluation within a run ----


def evaluate_run(run, step: int) -> None:
    """Evaluate the averaged weights of a train.Run, if that is due.

    Logs the table if the rows have a known truth, and draws a few prompts into out/samples.
    """
    cfg = run.cfg
    policy = run.policy
    due = cfg.eval_every and run.ranks.rank == 0 and step not in run.log.evaluated
    if policy.sharded:                          # then the forwards need all ranks
        due = run.ranks.add(due)
    if not due:
        return
    room = room_to_gather(policy.device)
    with (
        run.average.in_place_of(policy), keep_gathered(policy, room),
        precision(cfg, policy.device)):
        if run.source.toy:
            table = table_of(evaluate_rows(policy))
            rounded = {name: (round(x, 5), round(error, 5)) for name, (x, error) in table.items()}
            run.log(step=step, eval=as_json(rounded))
        images = preview(policy, run.source, cfg)
    if images is not None and run.ranks.rank == 0:
        path = Path(cfg.out) / "samples" / f"{step:06d}.png"
        save_grid(images, path, columns=4)


def preview(policy: Policy, source: Source, cfg) -> Tensor | None:
    """Draw four prompts of step 0, four samples each, of the last task in use that draws.

    (16, 3, H, W) in [0, 1], or None if no task draws.
    """
    drawing = [task for task in source.tasks if task.draws]
    if not drawing:
        return None
    task = drawing[-1]
    index = range(4)
    draw = plain_draw(source.scale, (cfg.resolution, cfg.resolution), cfg.denoise_steps)
    choices = choices_of(cfg, source.scale, draw)
    rows = source.pools[task.name]((cfg.seed, 0, random_place(task)), 4, index)
    if task.refines:
        rows, _ = first_pictures(policy, rows, choices, seed=cfg.seed, step=0, index=index, n=1)
    rollout = sample_plan(
        policy, task.plan(rows, choices), seed=cfg.seed, step=0, index=index, G=4,
        guidance=guidance_of(cfg, task.redraws))
    return images_of(policy, rollout)


def picture_run(log: Path, before: str, device: torch.device) -> str:
    """Draw a run's curves and pictures next to its log; returns the summary."""
    out = log.parent
    titles = {name: task.title for name, task in TASKS.items()}
    policies = [load_policy(folder, device) for folder in (before, out / "policy")]
    before_after(*policies, gallery(policies[0]), out / "before_after.png", dpi=130)
    plot([log], out / "curves.png", titles)
    return summary(log)


def summary(path: Path) -> str:
    """A run's first and last evaluation as text, from its log."""
    _, rows = read_log(path)
    evaluations = [row for row in rows if "eval" in row]
    first = evaluations[0]["eval"]
    last = evaluations[-1]["eval"]
    change = {}
    for name in filter(first.get, last):
        old, new = np.array([first[name], last[name]], dtype=float)         # None becomes NaN
        change[name] = (new[0] - old[0], math.hypot(old[1], new[1]))
    minutes = evaluations[-1]["seconds"] / 60
    return f"held-out truth after {minutes:.1f} minutes\n{print_change(first, last, change)}"


# ---- pictures ----


def before_after(
    before: Policy, after: Policy, shown: list[tuple[Task, list[Row]]], out: Path, dpi: int
) -> None:
    """Write a PNG of the same rows of tasks, drawn by two policies from the same noise, six times.

    A green bar marks what the detector finds true, a red one what it does not. The picture that an
    edit starts from stands first, with a grey bar.
    """
    count = sum(len(rows) for _, rows in shown)
    widths = [1] * 6 + [0.35] + [1] * 6
    figure, axes = pyplot().subplots(
        count, len(widths), figsize=(11, 0.92 * count), width_ratios=widths)
    for axis in axes.flat:
        axis.set_axis_off()
    for side, policy, half in ("before", before, axes[:, :6]), ("after", after, axes[:, -6:]):
        half[0, 0].annotate(side, (0, 1.5), xycoords="axes fraction", fontsize=11, weight="bold")
        for task, rows in shown:
            show_samples(half[:len(rows)], policy, task, rows)
            half = half[len(rows):]
    top = 1 - 0.6 / count                       # room for the two headings
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=top, wspace=0.06, hspace=0.42)
    save_figure(figure, out, dpi=dpi)


def gallery(policy: Policy) -> list[tuple[Task, list[Row]]]:
    """Four held-out rows of each task that draws once."""
    shown = []
    for task in TASKS.values():
        once = task.draws and task.held_out and not task.before
        if once and can_do(policy, task):
            shown.append((task, evenly_spaced(task.held_out("test"), 4)))
    return shown


def show_samples(axes: np.ndarray, policy: Policy, task: Task, rows: list[Row]) -> None:
    """Fill axes (rows, G) with samples of each row."""
    G = axes.shape[1]
    samples, _, right = sample_truth(policy, task, rows, 99, G)
    images = to_bytes(samples.images)
    for n, axis in enumerate(axes.flat):
        row = rows[n // G]
        image = images[n]
        bar = "tab:green" if right[n] else "tab:red"
        if n % G == 0:
            thought = f"   ->   {samples.texts[n]}" if samples.texts else ""
            axis.set_title(row.text + thought, fontsize=6.5, loc="left", pad=2.5)
            if row.source is not None:
                image = to_bytes(row.source[None])[0]
                bar = "silver"
        axis.imshow(image, interpolation="nearest")
        axis.plot([0, 31], [32.6, 32.6], color=bar, linewidth=3, clip_on=False)


# ---- the command line ----


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="eval.py", description="Truth of a policy on the toy's held-out rows.")
    ap.add_argument("--policy", default=str(TOY), help="a policy folder")
    ap.add_argument(
        "--guidance", type=number(float, least=1), default=1.0, help="text guidance scale; 1: none"
    )
    ap.add_argument("--against", default="", help="a policy folder: show the change from it")
    ap.add_argument(
        "--samples", type=number(int, least=2),
        help="pictures of each prompt, whose variety is measured; default: by task")
    ap.add_argument(
        "--split", choices=["test", "validation"], default="test",
        help="the rows that are reported, or prompts of training and other scenes")
    ap.add_argument(
        "--seed", type=number(int, least=0), default=1234, help="of held-out pictures and noise"
    )
    ap.add_argument("--out", type=new_file, default="eval.json", help="the table as JSON")
    ap.run(run, argv)


def run(a) -> str:
    """Carry out a parsed command line; returns what to print."""
    policy = load_toy_policy(a.policy)
    other = load_toy_policy(a.against) if a.against else None
    asked = dict(seed=a.seed, guidance=a.guidance, samples=a.samples, split=a.split)
    values = evaluate_rows(policy, **asked)
    table = table_of(values)
    text = print_table(table)
    result = dict(policy=a.policy, **asked, table=as_json(table))
    if other:
        before = evaluate_rows(other, **asked)
        change = paired_change(before, values)
        result |= dict(against=a.against, change=as_json(change))
        text = f"from {a.against} to {a.policy}\n{print_change(table_of(before), table, change)}"
    write_json(a.out, result)
    return f"{text}\n\nwritten to {a.out}"


def load_toy_policy(folder: str) -> Policy:
    """A policy that can be measured on the toy. Errors: ValueError for a larger one."""
    policy = load_policy(folder, device=the_device())
    if not policy.config.scale.startswith("toy"):
        raise ValueError(
            f"{folder} is too large for the toy world; measure it with python -m studies.geneval")
    return policy


if __name__ == "__main__":
    main()
