"""What a policy is worth: tables on held-out rows, plots and pictures of runs, and the log that they read.

    python eval.py --policy out/policy                       # a table by task and tag, with standard errors
    python eval.py --policy out/policy --against toy/policy  # the change from another policy, row by row
    python eval.py refine --policy out/policy                # rounds of refinement against the best of as many new pictures
    python eval.py plot out/log.jsonl out/control/log.jsonl  # curves of one or several runs
    python eval.py rewards --policy out/policy               # which reward can be trusted: each against the truth, base and policy
    python eval.py geneval --policy BAGEL-7B-MoT --metadata evaluation_metadata.jsonl --detector google/owlv2-base-patch16-ensemble

Truth is the exact detector of toy/shapes.py through GenEval's checker; the recipes' reward "ins" is built on the same two, the others are
not. Standard errors are over rows (the samples of a prompt are not independent); the mean over tags weighs tags equally, as GenEval does;
the error of a change is paired row by row under --against, and takes the two evaluations as independent in a run's summary. Every number
comes from the seeds given here.
"""

import functools
import hashlib
import io
import json
import math
import re
import time
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import claims
import flow_grpo
import rewards
from checkpoint import gathered, load_policy, read_json, write_atomic
from detectors import load_detector
from files import READERS
from geneval import geneval_check
from grpo import variance_share
from models import Models
from pictures import save_grid, to_bytes
from policy import Guidance, Policy
from questions import Questions
from recipes import parse
from rewards import Samples
from sample import SAMPLING, TOY, Draw, Read, See, Write, images_of, refine, sample_plan, scale_of, texts_of, value_of
from run import precision, read_log, room_to_gather
from tasks import (TASKS, Choices, Row, Source, Task, check_rules, choices_of, detect, guidance_of, in_use, rendered, samples_of, spaced,
                   token_states)
from terminal import Arguments, one_line, the_device
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


# ---- refinement against drawing more ----


def refinement(policy: Policy, judge: str, rounds: int = 3, samples: int = 4, seed: int = 1234) -> dict[str, list[tuple[float, float]]]:
    """Truth after 0..rounds rounds of refinement, and of the best of as many pictures drawn anew, name -> (mean, standard error) each.

    `refine, always|judge|oracle`: sample.refine with each way of selecting; `best, judge|oracle`: of the first 1..rounds + 1 pictures the
    one that the judge prefers, or any that is right. Held-out prompts, `samples` each, ODE, neutral instruction, greedy diagnoses. The
    judge is asked one question about the whole prompt."""
    rows, choices = TASKS["draw"].held_out(False), plain_choices()
    prompts = [row.text for row in rows for _ in range(samples)]
    truth, judged = (value_of(select, prompts, judge, policy.device) for select in ("oracle", "judge"))
    told = lambda right: mean_and_error(right.view(len(rows), samples).mean(1).numpy())
    table = {}
    for select in ("always", "judge", "oracle"):
        value = judged if select == "judge" else truth
        done = refine(policy, prompts, rounds, select, value, [choices.draw], [choices.think, choices.draw], look=choices.look, seed=seed)
        table[f"refine, {select}"] = [told(truth(each.kept) if select == "judge" else each.value) for each in done]
    walk = lambda k: sample_plan(policy, [Read(prompts), choices.draw], seed=seed, step=k, prompts=list(range(len(prompts))), G=1)
    drawn = [images_of(policy, walk(k)) for k in range(rounds + 1)]
    right, score = (torch.stack([value(images) for images in drawn]) for value in (truth, judged))             # (rounds+1, N)
    table["best, judge"] = [told(right[:k].gather(0, score[:k].argmax(0, keepdim=True))[0]) for k in range(1, rounds + 2)]
    table["best, oracle"] = [told(right[:k].amax(0)) for k in range(1, rounds + 2)]
    return table


def print_refinement(table: dict[str, list[tuple[float, float]]]) -> str:
    """The table in markdown, a row per number of pictures drawn."""
    lines = [f"| pictures drawn | {' | '.join(table)} |", "|---" * (len(table) + 1) + "|"]
    return "\n".join([*lines, *(f"| {k} | " + " | ".join(f"{m:.3f} ± {e:.3f}" for m, e in each) + " |"
                                for k, each in enumerate(zip(*table.values()), 1))])


# ---- which reward can be trusted ----


def reward_study(policy: Policy, seed: int = 1234) -> tuple[dict[str, dict[str, float]], dict[str, Tensor], Samples, Tensor]:
    """Each reward of drawn images on held-out prompts (8 samples each, with a picture of the prompt as the real one): name -> its
    correlation with the exact truth over all samples (`overall`) and within the groups of a prompt, which is all that a group advantage
    sees (`in_group`); its share of the summed reward's variance within groups, all weights 1 (`share`); milliseconds per image. Beside
    the table the scores, the samples and their truth. tim compares the states of the policy itself."""
    rng, task = np.random.default_rng(seed), TASKS["draw"]
    rows = [replace(row, real=rendered([shapes.sample_scene(row.metadata, rng)])[0] * 0.5 + 0.5) for row in task.held_out(False)]
    samples = answered(policy, task, rows, seed)
    truth, G = task.truth(samples, detect(samples.images)).double(), task.samples
    cfg = parse(["--recipe", "lvrpo"])
    states = token_states(lambda: nullcontext(policy), nullcontext, cfg.referee_batch)
    models = Models(cfg, policy.device, detect, (), states, Questions("", True))
    table, scores = {}, {}
    for name, entry in rewards.REWARDS.items():
        if name == "pref" or not any(set(read) <= {"images", "reals"} for read in entry.reads):     # no preference model knows the toy
            continue
        reward = entry.build(models)
        rewards.score({name: reward}, samples_at(samples, slice(0, G)))                       # loads, and warms up
        start = time.perf_counter()
        scores[name] = rewards.score({name: reward}, samples)[name]                           # (N,)
        table[name] = {"ms": (time.perf_counter() - start) / len(truth) * 1000}
    share = variance_share(scores, {name: 1.0 for name in scores}, G)
    for name, value in scores.items():
        inside = lambda x: (x.double().view(-1, G) - x.double().view(-1, G).mean(1, keepdim=True)).flatten()  # noqa: E731
        table[name] |= {"overall": correlation(value.double(), truth), "in_group": correlation(inside(value), inside(truth)),
                        "share": share[name]}
    return table, scores, samples, truth


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of two (N,); nan where one does not vary."""
    a, b = a - a.mean(), b - b.mean()
    size = (a.norm() * b.norm()).item()
    return (a @ b).item() / size if size else float("nan")


def samples_at(samples: Samples, rows: slice) -> Samples:
    """Some rows of samples."""
    return Samples(*(None if column is None else column[rows] for column in vars(samples).values()))


def print_rewards(studies: dict[str, dict]) -> str:
    """Markdown: a row per reward, the columns of each policy beside each other."""
    columns = ["overall", "in_group", "share", "ms"]
    head = "| reward | " + " | ".join(f"{policy}: {column}" for policy in studies for column in columns) + " |"
    line = lambda name: " | ".join(f"{table[name][column]:.3f}" for table in studies.values() for column in columns)  # noqa: E731
    names = list(next(iter(studies.values())))
    return "\n".join([head, "|---" * (1 + len(columns) * len(studies)) + "|", *(f"| `{name}` | {line(name)} |" for name in names)])


def best_and_worst(scores: dict[str, Tensor], samples: Samples, truth: Tensor, out: Path, count: int = 8) -> None:
    """A row per reward: the pictures that it likes most, left, and least, right; a green bar marks what is true. Rewards differ in level
    between prompts, so each score is taken from its group's mean."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    G, images = TASKS["draw"].samples, to_bytes(samples.images)
    widths = [1] * count + [0.4] + [1] * count
    figure, axes = plt.subplots(len(scores), len(widths), figsize=(12, 0.95 * len(scores)), width_ratios=widths, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for line, (name, value) in enumerate(scores.items()):
        order = (value.view(-1, G) - value.view(-1, G).mean(1, keepdim=True)).flatten().argsort(descending=True, stable=True).tolist()
        axes[line, 0].set_title(name, fontsize=8, loc="left", pad=2)
        for place, n in [*enumerate(order[:count]), *enumerate(order[-count:], count + 1)]:
            axes[line, place].imshow(images[n], interpolation="nearest")
            axes[line, place].plot([0, 31], [32.6, 32.6], color="tab:green" if truth[n] else "tab:red", linewidth=3, clip_on=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.96, wspace=0.06, hspace=0.35)
    save_figure(figure, out, dpi=110)


# ---- GenEval's rules on pictures of any policy ----


def geneval(policy: Policy, metadata: Path, detector, name: str, out: Path, samples: int = 4, size: int = 0, steps: int = 0,
            seed: int = 0, text_scale: float | None = None) -> dict[str, tuple[float, float]]:
    """Draw `samples` images of every prompt of a GenEval file into `out`, in GenEval's own folders (00000/metadata.jsonl, 00000/samples/
    0000.png, ...), so that the official script can be run on them elsewhere, and judge them by its rules over `detector`: tag -> (share
    of images that pass, standard error over prompts), and the mean of the tags, "overall". Goes on where it stopped.

    Errors: ValueError where `out` holds pictures of other settings."""
    rows = READERS["prompts"](str(metadata))
    scale = SAMPLING[scale_of(policy.config.llm["hidden_size"])]
    size, steps = size or scale["size"], steps or scale["steps"]
    guidance = scale["guidance"] if text_scale is None else replace(scale["guidance"], text_scale=text_scale)
    prompts = hashlib.sha256(metadata.read_bytes()).hexdigest()[:16]
    begin_folder(out, dict(policy=name, prompts=prompts, samples=samples, size=size, steps=steps, guidance=guidance.text_scale, seed=seed))
    draw = Draw((size, size), flow_grpo.time_grid(steps, scale["shift"]))
    for i, row in enumerate(tqdm(rows, desc="drawing")):
        paths = [out / f"{i:05}" / "samples" / f"{j:04}.png" for j in range(samples)]
        if all(path.exists() for path in paths):
            continue
        r = sample_plan(policy, [Read([row["prompt"]]), draw], seed=seed, step=0, prompts=[i], G=samples,
                        guidance=guidance if guidance.text_scale > 1 else None)
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        write_atomic(paths[0].parents[1] / "metadata.jsonl", json.dumps(row, ensure_ascii=False).encode())
        for path, image in zip(paths, to_bytes(images_of(policy, r))):
            write_atomic(path, png(image))
    results = []
    for i, row in enumerate(tqdm(rows, desc="judging")):
        images = torch.stack([read_bytes(out / f"{i:05}" / "samples" / f"{j:04}.png") for j in range(samples)])
        for j, found in enumerate(detector(images, [row] * samples)):
            right, reason = geneval_check(row, found, **getattr(detector, "settings", {}))
            results.append({"filename": f"{i:05}/samples/{j:04}.png", "tag": row.get("tag", ""), "prompt": row["prompt"], "correct": right,
                            "reason": reason})
    write_atomic(out / "results.jsonl", "\n".join(json.dumps(each, ensure_ascii=False) for each in results).encode())
    right = np.array([each["correct"] for each in results], dtype=float).reshape(len(rows), samples).mean(1)
    tags = dict.fromkeys(row.get("tag", "") for row in rows)
    table = {tag: mean_and_error([x for x, row in zip(right, rows) if row.get("tag", "") == tag]) for tag in tags}
    table["overall"] = (float(np.mean([m for m, _ in table.values()])), math.sqrt(sum(e * e for _, e in table.values())) / len(table))
    return table


def identity(*folders: str) -> str:
    """Folders with a hash of their weight files' names, sizes and times, so that a policy that was trained again is another."""
    files = sorted(file for folder in folders if folder for file in Path(folder).glob("*.safetensors"))
    stamp = json.dumps([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files])
    return f"{' '.join(filter(None, folders))} {hashlib.sha256(stamp.encode()).hexdigest()[:16]}"


def begin_folder(out: Path, settings: dict) -> None:
    """Make a folder of pictures, or check that the one that is there is of the same settings."""
    path = out / "settings.json"
    if path.exists() and (held := read_json(path)) != settings:
        other = [f"{k} {held.get(k)!r}, not {v!r}" for k, v in settings.items() if held.get(k) != v]
        raise ValueError(f"{out} holds pictures of {', '.join(other)}; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(settings, indent=1).encode())


def png(image: np.ndarray) -> bytes:
    from PIL import Image
    held = io.BytesIO()
    Image.fromarray(image).save(held, format="png")
    return held.getvalue()


def read_bytes(path: Path) -> Tensor:
    """(3, H, W) in [0, 1]."""
    from PIL import Image
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


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


def panels_of(looks: list[dict]) -> list[tuple[str, str]]:
    """(key, title) of the headlines that a run's evaluations hold: tasks, then what has no error."""
    keys = dict.fromkeys(k for row in looks for k, (_, error) in row["eval"].items() if k in TASKS or error is None)
    return [(k, TASKS[k].title if k in TASKS else k.replace("_", " ")) for k in sorted(keys, key=lambda k: k not in TASKS)]


def plot(paths: list[Path], out: Path) -> None:
    """Held-out truth with two standard errors, variety within groups, and the training reward, over minutes; one colour a run. What a log
    does not hold leaves a gap."""
    runs = [(path, *read_log(path)) for path in paths]
    looks = {path: [r for r in rows if "eval" in r] for path, _, rows in runs}
    if empty := [path for path in paths if not any(r["eval"] for r in looks[path])]:
        raise ValueError(f"{empty[0]} holds no evaluation to plot")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = panels_of([row for path in paths for row in looks[path]])
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
        axis.set(title=title, xlabel="minutes", **(dict(ylim=(0, 1)) if key in TASKS else {}))
        if key and key not in TASKS:
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


def save_figure(figure, out: Path, dpi: int) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    import matplotlib.pyplot as plt
    held = io.BytesIO()
    figure.savefig(held, dpi=dpi, format="png")
    plt.close(figure)
    write_atomic(Path(out), held.getvalue())


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
    ap = Arguments(description="Evaluate a policy on the toy or by GenEval's rules; plot logs.", allow_abbrev=False)
    ap.add_argument("what", nargs="?", default="table", choices=["table", "plot", "refine", "rewards", "geneval", "claims"],
                    help="truth of a policy on held-out rows; curves of logs; refinement against drawing more; each reward against the "
                         "truth; GenEval's rules; the papers' claims")
    ap.add_argument("names", nargs="*", help="log.jsonl files to plot; claims to test, by name (all without one)")
    ap.add_argument("--policy", default=str(TOY), help="a policy folder")
    ap.add_argument("--adapter", default="", help="a folder of adapters to put on")
    ap.add_argument("--judge", default=str(TOY.parent / "judge"), help="yes/no judge of refine: a folder or hub name")
    ap.add_argument("--guidance", type=float, help="text guidance scale of the table (1, none) and of geneval (4 for BAGEL)")
    ap.add_argument("--rounds", type=int, default=3, help="rounds of refine")
    ap.add_argument("--metadata", type=Path, help="prompts of geneval in GenEval's format, such as its evaluation_metadata.jsonl")
    ap.add_argument("--detector", default="", help="of geneval: a Mask2Former, Grounding DINO or OWLv2; the toy has its own")
    ap.add_argument("--colors", default="openai/clip-vit-large-patch14", help="CLIP that names colours for geneval: a folder or hub name")
    ap.add_argument("--against", default="", help="a policy folder: the table shows the change from it, paired row by row")
    ap.add_argument("--samples", type=int, help="images of each prompt, of the table (by task) and of geneval (4)")
    ap.add_argument("--size", type=int, default=0, help="pixels per side of geneval (32 for the toy, 1024 for BAGEL)")
    ap.add_argument("--steps", type=int, default=0, help="denoising steps of geneval (10 for the toy, 49 for BAGEL)")
    ap.add_argument("--list", action="store_true", help="print the claims, run nothing")
    ap.add_argument("--seeds", type=int, default=3, help="of each arm of a claim")
    ap.add_argument("--threads", type=int, default=1, help="of each run of claims")
    ap.add_argument("--jobs", type=int, default=2, help="runs of claims beside one another")
    ap.add_argument("--seed", type=int, default=1234, help="of held-out pictures and noise")
    ap.add_argument("--out", type=Path, help="where to write: a .json (table, refine, rewards), curves.png, a folder (geneval, claims)")
    a = ap.parse_args(argv)
    with one_line("eval.py"):
        print({"table": run_table, "plot": run_plot, "refine": run_refine, "rewards": run_rewards, "geneval": run_geneval,
               "claims": run_claims}[a.what](a))


def policy_of(a, toy: bool = True) -> Policy:
    """The policy that the command line names; ValueError where the toy's tables are asked of another."""
    policy = load_policy(a.policy, device=the_device(), adapter=a.adapter)
    if toy and scale_of(policy.config.llm["hidden_size"]) != "toy":
        raise ValueError("the table is of the toy world; measure a large policy with eval.py geneval, or on images that sample.py draws")
    return policy


def run_plot(a) -> str:
    if not a.names:
        raise ValueError("plot needs at least one log.jsonl")
    plot([Path(name) for name in a.names], a.out or Path("curves.png"))
    return f"curves in {a.out or 'curves.png'}"


def run_table(a) -> str:
    if a.samples is not None and a.samples < 1:
        raise ValueError(f"--samples {a.samples}: must be at least 1")
    look = functools.partial(evaluate_rows, seed=a.seed, guidance=a.guidance or 1.0, samples=a.samples)
    rows, out = look(policy_of(a)), a.out or Path("eval.json")
    table = {name: mean_of(parts) for name, parts in rows.items()}
    kept = {"policy": a.policy, "seed": a.seed, "guidance": a.guidance or 1.0, "samples": a.samples, "table": table}
    told = f"{print_table(table)}\n\n{markdown_row(a.policy, table)}"
    if a.against:
        before = look(load_policy(a.against, device=the_device()))
        kept |= {"against": a.against, "change": paired_change(before, rows)}
        told = f"from {a.against} to {a.policy}\n{print_change({k: mean_of(v) for k, v in before.items()}, table, kept['change'])}"
    write_atomic(out, json.dumps(kept, indent=1).replace("NaN", "null").encode())
    return f"{told}\n\nwritten to {out}"


def run_refine(a) -> str:
    if a.rounds < 0:
        raise ValueError(f"--rounds {a.rounds}: must be at least 0")
    table, out = refinement(policy_of(a), a.judge, a.rounds, seed=a.seed), a.out or Path("refine.json")
    write_atomic(out, json.dumps({"policy": a.policy, "seed": a.seed, "table": table}, indent=1).encode())
    return f"{print_refinement(table)}\nwritten to {out}"


def run_rewards(a) -> str:
    out, studies = a.out or Path("rewards.json"), {}
    policies = {"base": load_policy(TOY, device=the_device())} | ({"policy": policy_of(a)} if a.policy != str(TOY) else {})
    for name, policy in policies.items():
        studies[name], *last = reward_study(policy, a.seed)
    best_and_worst(*last, out.with_suffix(".png"))
    write_atomic(out, json.dumps({"policy": a.policy, "seed": a.seed, "tables": studies}, indent=1).replace("NaN", "null").encode())
    return f"{print_rewards(studies)}\nwritten to {out}, best and worst pictures to {out.with_suffix('.png')}"


def run_claims(a) -> str:
    if a.list:
        return claims.listed()
    return claims.main(a.names, a.seeds, a.threads, a.jobs, a.out or Path("out") / "claims")


def run_geneval(a) -> str:
    if a.metadata is None:
        raise ValueError("geneval needs --metadata, such as GenEval's evaluation_metadata.jsonl")
    samples = 4 if a.samples is None else a.samples
    if samples < 1:
        raise ValueError(f"--samples {samples}: must be at least 1")
    check_rules(READERS["prompts"](str(a.metadata)), str(a.metadata), "prompts")
    policy, out = policy_of(a, toy=False), a.out or Path("geneval")
    toy = scale_of(policy.config.llm["hidden_size"]) == "toy"
    if not toy and not a.detector:
        raise ValueError("geneval needs --detector, such as google/owlv2-base-patch16-ensemble")
    detector = load_detector(a.detector, a.colors, device=policy.device) if a.detector else lambda images, metadata: detect(images)
    if a.detector:
        detector.check(READERS["prompts"](str(a.metadata)))
    table = geneval(policy, a.metadata, detector, identity(a.policy, a.adapter), out, samples, a.size, a.steps, a.seed,
                    a.guidance)
    return f"GenEval rules, detector {a.detector or 'the exact one of the toy'}\n{print_table(table)}\npictures and results in {out}"


if __name__ == "__main__":
    main()
