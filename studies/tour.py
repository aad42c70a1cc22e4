"""One step of training with its numbers, as a page to read: docs/tour.md and its pictures.

python -m studies.tour                        # writes docs/tour.md and docs/tour_group.png
python -m studies.tour --after out/policy     # draws docs/tour_noise.png and docs/first.png too
"""

import inspect
import math
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import flow_grpo
import train
from eval import load_toy_policy, sample_task
from grpo import grpo_loss
from policy import Policy
from sample import TOY, images_of, replay_rollout, sample_plan
from support.disk import write_atomic
from support.pictures import to_bytes
from support.plots import save_figure
from support.run import Ranks
from support.terminal import Arguments, number, one_line
from tasks import TASKS
from toy.world import detect

DOCS = Path(__file__).parent.parent / "docs"
# One prompt of one task, so that the step has one thought and one image of each of eight samples.
STEP = (
    "--think 1 --draw 0 --ask 0 --edit 0 --accuracy 0 --group_size 8 --steps 1 --epochs 1 "
    "--eval_every 0"
)
SHOWN = (
    "a photo of a red square", "three circles",
    "a photo of a square left of a circle")     # in docs/first.png, and an edit
HAND = """ratio   = exp({logp:.5f} - {logp_old:.5f}) = {ratio:.5f}
clipped = clip(ratio, {low:g}, {high:g}) = {clipped:.5f}
loss    = -min(ratio * {adv:.4f}, clipped * {adv:.4f}) = {loss:.5f}"""
SAMPLE = 0                                      # the sample whose numbers are shown

PAGE = """# One step, with its numbers

`python -m studies.tour` makes this page from the toy's policy: one prompt, eight samples, one update.
It follows the six phases of `train.py`. This is the whole step:

```python
{one_step}```

The prompt is *{prompt}*. The policy writes a thought, then draws: the layout
`[text prompt] -> [text*] [image*]`, of which the starred segments are its own.

## 1. Act

```python
{act}```

`sample_plan` walks the layout without gradients and keeps, for each starred segment, what the update
needs. Of the thought of sample {sample} these are the tokens and their log-probs:

{tokens}

Of its image it keeps every noisy step. At the first, at t = {t:.3f} on the way to {t_next:.3f}, the
first four of {entries} latent entries are:

{noisy_step}

`x_next` was drawn from a Gaussian with this mean and this std, {std:.4f}. So the step has a
log-density, {logp:.4f} on average over the entries, and what was an ODE is a policy.

## 2. Reward

```python
{reward}```

![The group of eight pictures, best first](tour_group.png)

*The eight pictures, from the highest advantage to the lowest.*

{rewards}

## 3. Compare

```python
{compare}```

The advantage of a sample is its summed reward minus the mean of its group, divided by the group's
spread. There is no value network: the group is the baseline.

**What is a tied group?** One whose rewards are all equal. It says nothing about which sample was
better, and its advantages are exactly 0. If a yes-or-no reward comes true with probability p, a
group of G ties with probability p^G + (1-p)^G:

{ties}

So prompts that are far too easy or far too hard teach nothing, and `frac_reward_zero_std` in the log
is the number to look at.

## 4. Improve

```python
{improve}```

Replay walks the same segments with the same calls, and gradients.

**Why is the ratio 1 before the update?** Because nothing has changed yet: the policy that is scored
is the policy that acted. The largest gap of a log-prob between rollout and replay here is below {gap:.4f}.
The log's `self_check` holds this number for the first step of every run.

**Why is the loss about 0 at the first update?** With a ratio of 1 the loss is minus the mean
advantage, and advantages of a group add up to 0; only texts of different lengths leave something.
Here the text loss is {text_value} and the image loss {image_value}. The gradient is not 0: its norm is
{grad_norm:.2f}. Watch the reward, `grad_norm`, the clip ratio and the KL instead of the loss.

After one update the ratio of the first noisy step of sample {sample} is {step_ratio:.4f}, and the ratios
of its thought's tokens go from {low_ratio:.3f} to {high_ratio:.3f}.

**Why are the clip ranges of images so small?** The log-density of a step is a mean over entries, so
its ratio is the {entries}th root of the density's ratio. It moves by thousandths where a token's
moves by tenths. `image_clip` is {image_clip} here and 1e-6 for the 65,536 entries of a large image.

The loss of that step by hand, with the advantage {adv:.4f}:

```
{step_hand}
flow_grpo_loss returns {step_loss:.5f}
```

And of the token that was least certain:

```
{token_hand}
grpo_loss returns {token_loss:.5f}
```

## 5. Log, 6. keep

```python
{loop}```

A line of `out/log.jsonl` holds what the phases returned. A checkpoint holds the weights, their
average and AdamW's moments, and no generator: random numbers derive from the seed and their place.
{after}"""

AFTER = """
![The same noise before, after one update, and after a run](tour_noise.png)

*The same noise drawn by the base, after this one update, and after `torchrun train.py`.*
"""


def source_lines(function, first: str, count: int) -> str:
    """`count` lines of a function's source from the one that starts with `first`, dedented."""
    lines = inspect.getsource(function).split("\n")
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    return textwrap.dedent("\n".join(lines[start:start + count])) + "\n"


def tidy(x, digits: int = 4) -> str:
    """A number as text, without a minus before a zero; other things as they are."""
    if not isinstance(x, float):
        return str(x).replace("|", "\\|")
    return f"{round(x, digits) + 0.0:.{digits}f}"


def table(header: list, rows: list[list], digits: int = 4) -> str:
    """A table in markdown."""
    lines = ["| --- " * len(header) + "|"]
    for row in [header, *rows]:
        lines.append("| " + " | ".join(tidy(x, digits) for x in row) + " |")
    lines[0], lines[1] = lines[1], lines[0]
    return "\n".join(lines)


@dataclass
class Step:
    """One update of one prompt: the run after it, its part, and what the policy said before and
    after.
    """

    run: train.Run
    part: train.Part
    before: list
    after: list
    stats: dict[str, float]


def one_update(seed: int, out: Path) -> Step:
    """Take one step, phase by phase."""
    cfg = train.parse([*STEP.split(), "--seed", str(seed), "--out", str(out)])
    run = train.begin(cfg, Ranks(0, 1, torch.device("cpu")))
    batch = run.source.batches(0, run.ranks)[0]
    part = train.reward(run, batch, train.act(run, batch))
    train.compare([part], cfg, run.ranks)
    with torch.no_grad():
        before = replay_rollout(run.policy, part.rollout)
    stats = train.improve(run, [part])
    with torch.no_grad():
        after = replay_rollout(run.policy, part.rollout)
    run.log.owner.close()
    return Step(run, part, before, after, stats)


def text_loss(scored, adv: Tensor, cfg, place=slice(None), rows=slice(None)) -> float:
    """The text's surrogate loss, of all tokens or of one."""
    text = scored.segment
    mask = text.chosen[rows, place]
    loss, _ = grpo_loss(
        scored.logp[rows, place], text.logp[rows, place], adv[rows], mask, total=mask.sum(),
        low=cfg.text_clip, high=cfg.text_clip)
    return loss.item()


def image_loss(scored, adv: Tensor, cfg, rows=slice(None), steps=None) -> float:
    """The image's surrogate loss, of all noisy steps or of some."""
    flow = flow_grpo.select(scored.segment.flow, rows)
    steps = tuple(range(flow.logp.shape[1])) if steps is None else steps
    replayed = flow_grpo.replay_of(scored.flow.v[rows][:, list(steps)], flow, steps=steps)
    loss, _ = flow_grpo.flow_grpo_loss(
        replayed, flow, adv[rows], total=replayed.logp.numel(), low=cfg.image_clip,
        high=cfg.image_clip)
    return loss.item()


def by_hand(logp: float, logp_old: float, adv: float, clip: float) -> str:
    """PPO's clipped loss of one action, a line per step."""
    ratio = math.exp(logp - logp_old)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    loss = -min(ratio * adv, clipped * adv)
    return HAND.format(**locals(), low=1 - clip, high=1 + clip)


def page(step: Step, after: bool) -> str:
    """The text of docs/tour.md."""
    run, part, cfg, i = step.run, step.part, step.run.cfg, SAMPLE
    text, flow = part.rollout.segments[1], part.rollout.segments[2].flow
    text_after, image_after = step.after[0].logp, step.after[1].flow.logp
    chosen, one = text.chosen[i], slice(i, i + 1)
    words = [run.policy.tokenizer.decode([token]) for token in text.tokens[i][chosen].tolist()]
    four = []
    for name, value in (
        ("x", flow.latents[i, 0]), ("v", step.before[1].flow.v[i, 0]), ("mean", flow.means[i, 0]),
        ("x_next", flow.latents[i, 1])):
        four.append([name, *value.flatten()[:4].tolist()])
    columns = part.rewards | {"sum": sum(part.rewards.values()), "advantage": part.adv}
    order = part.adv.argsort(descending=True, stable=True).tolist()
    scores = [[n, *(column[n].item() for column in columns.values())] for n in order]
    ties = [[str(p), *(p**G + (1 - p) ** G for G in (4, 8, 16, 24))] for p in (0.01, 0.1, 0.3, 0.5)]
    ratios = (text_after - text.logp)[i][chosen].exp()
    token, adv = int(text.logp[i].argmin()), part.adv[i].item()
    token_hand = by_hand(
        text_after[i, token].item(), text.logp[i, token].item(), adv, cfg.text_clip)
    step_hand = by_hand(image_after[i, 0].item(), flow.logp[i, 0].item(), adv, cfg.image_clip)
    gap = (step.before[1].flow.logp - flow.logp).abs().max().item()
    start = flow.window[0]
    show = {"sample": i, "prompt": part.batch.rows[0].text, "adv": adv}
    show["one_step"] = inspect.getsource(train.one_step)
    show["act"] = source_lines(train.act, "rollouts.append", 5)
    show["tokens"] = table(
        ["token", *(f"`{word}`" for word in words)], [["log-prob", *text.logp[i][chosen].tolist()]],
        2)
    show["noisy_step"] = table(["", "1", "2", "3", "4"], four)
    show["t"] = flow.times[start]
    show["t_next"] = flow.times[start + 1]
    show["std"] = flow.std[0]
    show["logp"] = flow.logp[i, 0]
    show["entries"] = flow.data[0].numel()
    show["reward"] = source_lines(train.reward, "task, samples", 2)
    show["rewards"] = table(["sample", *columns], scores, 3)
    show["compare"] = source_lines(train.compare, "for part in parts", 7)
    show["ties"] = table(["p", "G = 4", "8", "16", "24"], ties, 3)
    show["improve"] = source_lines(train.improve, "for piece in pieces", 2)
    show["gap"] = max(gap, 0.0001)
    show["text_value"] = tidy(text_loss(step.before[0], part.adv, cfg))
    show["image_value"] = tidy(image_loss(step.before[1], part.adv, cfg))
    show["grad_norm"] = step.stats["grad_norm"]
    show["step_ratio"] = math.exp(image_after[i, 0] - flow.logp[i, 0])
    show["low_ratio"] = ratios.min()
    show["high_ratio"] = ratios.max()
    show["image_clip"] = cfg.image_clip
    show["step_hand"] = step_hand
    show["step_loss"] = image_loss(step.after[1], part.adv, cfg, one, (0,))
    show["token_hand"] = token_hand
    show["token_loss"] = text_loss(step.after[0], part.adv, cfg, slice(token, token + 1), one)
    show["loop"] = source_lines(train.train, "stats = one_step", 4)
    show["after"] = AFTER if after else ""
    return PAGE.format(**show)


# ---- pictures ----


def strip(images: Tensor, out: Path, titles: list[str], lines: list[str], right=None) -> None:
    """Images (N, 3, H, W) in [0, 1] as a PNG, len(lines) rows; right: which get a green frame, else
    red.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = len(images) // len(lines)
    size = (9, 9 / columns * len(lines) + 0.4)
    figure, axes = plt.subplots(
        len(lines), columns, figsize=size, layout="constrained", squeeze=False)
    for place, (axis, image) in enumerate(zip(axes.flat, to_bytes(images))):
        axis.imshow(image, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        if right is not None:
            axis.spines[:].set(color="tab:green" if right[place] else "tab:red", linewidth=2)
    for place, title in enumerate(titles):
        axes[0, place * columns // len(titles)].set_title(title, fontsize=8, loc="left")
    for axis, line in zip(axes[:, 0], lines):
        axis.set_ylabel(line, fontsize=8)
    save_figure(figure, out, dpi=100)


def redraw(policy: Policy, part: train.Part, seed: int) -> Tensor:
    """The step's samples as a policy draws them from the same noise."""
    plan = part.batch.task.plan(part.batch.rows, part.batch.choices)
    rollout = sample_plan(
        policy, plan, seed=seed, step=0, prompts=part.batch.index, G=part.rollout.G)
    return images_of(policy, rollout)


def first_picture(policies: list[Policy], out: Path, seed: int = 99) -> None:
    """Four held-out prompts before and after a run: a colour, a number, a place, an edit."""
    prompts = TASKS["draw"].held_out(False)
    asked = [
        (TASKS["draw"], next(row for row in prompts if row.metadata["prompt"] == prompt))
        for prompt in SHOWN
    ]
    asked.append((TASKS["edit"], TASKS["edit"].held_out(False)[1]))
    images, right = [], []
    for policy in policies:
        for task, row in asked:
            samples = sample_task(policy, task, [row], seed, 4)
            images.append(samples.images)
            right += task.truth(samples, detect(samples.images)).tolist()
    strip(torch.cat(images), out, [row.text for _, row in asked], ["before", "after"], right)


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.tour", description="One step of training, as a page.")
    ap.add_argument("--seed", type=number(int, least=0), default=0, help="seed of the step")
    ap.add_argument("--after", default="", help="a trained policy folder, for the last pictures")
    ap.add_argument("--docs", type=Path, default=DOCS, help="the folder to write to")
    a = ap.parse_args(argv)
    with one_line("studies.tour"), tempfile.TemporaryDirectory() as scratch:
        step = one_update(a.seed, Path(scratch))
        order = step.part.adv.argsort(descending=True, stable=True)
        titles = [f"{n}: {step.part.adv[n]:+.2f}" for n in order.tolist()]
        strip(step.part.samples.images[order], a.docs / "tour_group.png", titles, [""])
        if a.after:
            base, after = load_toy_policy(str(TOY)), load_toy_policy(a.after)
            drawn = [redraw(policy, step.part, a.seed) for policy in (base, step.run.policy, after)]
            strip(torch.cat(drawn), a.docs / "tour_noise.png", [], ["base", "one update", "a run"])
            first_picture([base, after], a.docs / "first.png")
        text = page(step, (a.docs / "tour_noise.png").exists())
        write_atomic(a.docs / "tour.md", text.encode())
        print(f"{a.docs / 'tour.md'} is written")


if __name__ == "__main__":
    main()
