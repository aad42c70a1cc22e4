"""One step of training with its numbers, as a page to read: docs/tour.md and its pictures.

python -m studies.tour                        # writes docs/tour.md and docs/tour_group.png
python -m studies.tour --after out/policy     # draws docs/tour_noise.png and docs/first.png too
"""

import inspect
import math
import tempfile
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import flow_grpo
import train
from eval import before_after, load_toy_policy
from grpo import grpo_loss
from policy import Policy
from sample import TOY, images_of, replay_rollout
from support.disk import write_text
from support.pictures import save_grid
from support.run import Ranks
from support.tables import markdown_table
from support.terminal import Arguments
from tasks import TASKS

DOCS = Path(__file__).parent.parent / "docs"
# One prompt of one task, so that the step has one thought and one image of each of eight samples.
STEP = (
    "--think 1 --draw 0 --ask 0 --edit 0 --accuracy 0 --ins 1 --group_size 8 --steps 1 --epochs 1 "
    "--eval_every 0 --image_loss grpo --image_weight 300 --image_beta 0.003 --step_weights dt "
    "--lr_generation 5e-4")
SHOWN = (
    "a photo of a red square", "a drawing of two squares",
    "a photo of a square left of a circle")     # in docs/first.png, and an edit
HAND = """ratio   = exp({logp:.5f} - {logp_old:.5f}) = {ratio:.5f}
clipped = clip(ratio, {low:g}, {high:g}) = {clipped:.5f}
loss    = -min(ratio * {adv:.4f}, clipped * {adv:.4f}) = {loss:.5f}"""


PAGE = """# One step, with its numbers

`python -m studies.tour` makes this page from the toy's policy: one prompt, eight samples, one
update by FlowGRPO. It follows the six phases of `train.py`, of which this function runs four:

```python
{code[0]}```

The prompt is *{part.samples.prompts[0]}*. The policy writes a thought, then draws: the layout
`[text prompt] -> [text*] [image*]`, of which the starred segments are its own.

## 1. Act

```python
{code[1]}```

`sample_plan` walks the layout without gradients and keeps, for each starred segment, what the
update needs. Of the thought of sample {i} these are the tokens and their log-probs:

{tokens}

Of its image it keeps every noisy step. At the first, from t = {flow.times[0]:.3f} to
{flow.times[1]:.3f}, the first four of {size} latent entries are:

{noisy_step}

`x_next` was drawn from a Gaussian with this mean and this std, {flow.std[0]:.4f}. So the step has a
log-density, {flow.logp[0][0]:.4f} on average over the entries, and what was an ODE is a policy.

## 2. Reward

```python
{code[2]}```

![The group of eight pictures, best first](tour_group.png)

*The eight pictures, from the highest advantage to the lowest, in the order of the table.*

{rewards}

## 3. Compare

```python
{code[3]}```

The advantage of a sample is its summed reward minus the mean of its group, divided by the group's
spread. There is no value network: the group is the baseline.

**What is a tied group?** One whose rewards are all equal. It says nothing about which sample was
better, and its advantages are exactly 0. If a yes-or-no reward comes true with probability p, a
group of G ties with probability p^G + (1-p)^G:

| p | G = 4 | 8 | 16 | 24 |
| --- | --- | --- | --- | --- |
| 0.01 | 0.961 | 0.923 | 0.851 | 0.786 |
| 0.1 | 0.656 | 0.430 | 0.185 | 0.080 |
| 0.3 | 0.248 | 0.058 | 0.003 | 0.000 |
| 0.5 | 0.125 | 0.008 | 0.000 | 0.000 |

So prompts that are far too easy or far too hard teach nothing, and `frac_reward_zero_std` in the
log is the number to look at.

## 4. Improve

```python
{code[4]}```

Replay walks the same segments with the same calls, and gradients.

**Why is the ratio 1 before the update?** Because nothing has changed yet: the policy that is scored
is the policy that acted. Rollout and replay differ by rounding alone: the log's `self_check` says
by how much in the first step of every run.

**Why is the loss about 0 at the first update?** With a ratio of 1 the loss is minus the mean
advantage, and advantages of a group add up to 0; only texts of different lengths leave something.
Here the text loss is {start[0]:z.4f} and the image loss {start[1]:z.4f}. The gradient is not 0: its
norm is {step.stats[grad_norm]:.2f}. Watch the reward, `grad_norm`, the clip ratio and the KL
instead of the loss.

After one update the ratio of the first noisy step of sample {i} is {step_ratio:.4f}, and the
ratios of its thought's tokens go from {ratios[0]:.3f} to {ratios[1]:.3f}.

**Why are the clip ranges of images so small?** The log-density of a step is a mean over entries, so
its ratio is the {size}th root of the density's ratio. It moves by thousandths where a token's
moves by tenths. `image_clip` is {cfg.image_clip} here and 1e-6 for the 65,536 entries of a large
image.

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
{code[5]}```

A line of `out/log.jsonl` holds what the phases returned. A checkpoint holds the weights, their
average and AdamW's moments, and no generator: random numbers derive from the seed and their place.

![The same noise before, after one update, and after a run](tour_noise.png)

*The same noise, a column each: drawn by the base, after this one update, and after
`torchrun train.py`.*
"""


def source_lines(function, first: str, count: int) -> str:
    """`count` lines of a function's source from the one that starts with `first`, dedented."""
    lines = inspect.getsource(function).split("\n")
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    return textwrap.dedent("\n".join(lines[start:start + count])).rstrip() + "\n"


def print_numbers(values: Tensor, digits: int = 4) -> list[str]:
    """Numbers as text, without a minus before a zero."""
    return [f"{value:z.{digits}f}" for value in values.tolist()]


@dataclass
class Step:
    """One update of one prompt: the run, its part, and what the policy said before and after."""

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


def text_loss(scored, adv: Tensor, cfg, mask: Tensor) -> float:
    """The text's surrogate loss, a mean over the tokens of a mask (n, L)."""
    loss, _ = grpo_loss(
        scored.logp, scored.segment.logp, adv, mask, total=mask.sum(), low=cfg.text_clip,
        high=cfg.text_clip)
    return loss.item()


def image_loss(scored, adv: Tensor, cfg, weights: Tensor) -> float:
    """The image's surrogate loss, a mean over the noisy steps by their weights (n, W)."""
    loss, _ = flow_grpo.flow_grpo_loss(
        scored.flow, scored.segment.drawn, adv, total=weights.sum(), weights=weights,
        low=cfg.image_clip, high=cfg.image_clip)
    return loss.item()


def by_hand(logp: float, logp_old: float, adv: float, clip: float) -> str:
    """PPO's clipped loss of one action, a line per step."""
    ratio = math.exp(logp - logp_old)
    low = 1 - clip
    high = 1 + clip
    clipped = min(max(ratio, low), high)
    loss = -min(ratio * adv, clipped * adv)
    return HAND.format(**locals())


CODE = (
    (train.one_step, "def one_step", 99), (train.act, "rollouts.append", 5),
    (train.reward, "scores = rewards.score", 1), (train.advantages, "adv = group_advantage", 1),
    (train.improve, "loss, stats = piece_loss", 1), (train.train, "run.log(step", 1))


def page(step: Step) -> str:
    """The text of docs/tour.md."""
    part = step.part
    cfg = step.run.cfg
    i = 0                                               # the sample whose numbers are shown
    _, text, image = part.rollout.segments
    flow = image.drawn
    text_before, image_before = step.before
    text_after, image_after = step.after
    chosen = text.chosen[i]
    logp = text.logp[i]
    words = step.run.policy.tokenizer.batch_decode(text.tokens[i][chosen][:, None])
    head = ["token", *(f"`{word}`".replace("|", "\\|") for word in words)]
    tokens = markdown_table(head, [["log-prob", *print_numbers(logp[chosen], 2)]])
    entries = {"x": flow.latents[i, 0], "mean": flow.means[i, 0], "x_next": flow.latents[i, 1],
               "v": image_before.flow.v[i, 0]}
    four = [[name, *print_numbers(value.flatten()[:4])] for name, value in entries.items()]
    noisy_step = markdown_table(["", "1", "2", "3", "4"], four)
    columns = part.rewards | {"sum": sum(part.rewards.values()), "advantage": part.adv}
    values = torch.stack([*columns.values()], 1)                                        # (n, R + 2)
    scores = [[n, *print_numbers(values[n], 3)] for n in best_first(part)]
    rewards = markdown_table(["sample", *columns], scores)
    token = int(logp.argmin())
    adv = part.adv[i].item()
    ratios = (text_after.logp[i] - logp)[chosen].exp().aminmax()
    step_ratio = (image_after.flow.logp - flow.logp)[i, 0].exp()
    every_step = torch.ones_like(flow.logp)
    start = (text_loss(text_before, part.adv, cfg, text.chosen),
             image_loss(image_before, part.adv, cfg, every_step))
    one_token = torch.zeros_like(text.logp)
    one_token[i, token] = 1
    token_loss = text_loss(text_after, part.adv, cfg, one_token)
    one_step = torch.zeros_like(flow.logp)
    one_step[i, 0] = 1
    step_loss = image_loss(image_after, part.adv, cfg, one_step)
    step_hand = by_hand(image_after.flow.logp[i, 0], flow.logp[i, 0], adv, cfg.image_clip)
    token_hand = by_hand(text_after.logp[i, token], logp[token], adv, cfg.text_clip)
    code = [source_lines(*place) for place in CODE]
    return PAGE.format(**locals(), size=flow.data[0].numel())


# ---- pictures ----


def redraw(policy: Policy, step: Step) -> Tensor:
    """The step's samples as a policy draws them from the same noise."""
    rollout = train.act(replace(step.run, policy=policy), step.part.batch)
    return images_of(policy, rollout)


def best_first(part: train.Part) -> list[int]:
    return part.adv.argsort(descending=True, stable=True).tolist()


def first_rows() -> list:
    """Four held-out rows: a colour, a number, a place, an edit."""
    draw = TASKS["draw"]
    edit = TASKS["edit"]
    rows = [row for row in draw.held_out("test") if row.text in SHOWN]
    return [(draw, rows), (edit, edit.held_out("test")[1:2])]


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.tour", description="One step of training, as a page.")
    ap.add_argument("--after", default="", help="a trained policy folder, for the last pictures")
    ap.run(run, argv)


def run(a) -> str:
    """Carry out a parsed command line; returns what to print."""
    with tempfile.TemporaryDirectory() as scratch:
        step = one_update(0, Path(scratch))
        images = step.part.samples.images[best_first(step.part)]
        save_grid(images, DOCS / "tour_group.png", columns=len(images), zoom=3)
        if a.after:
            base = load_toy_policy(str(TOY))
            after = load_toy_policy(a.after)
            drawn = [redraw(policy, step) for policy in (base, step.run.policy, after)]
            save_grid(torch.cat(drawn), DOCS / "tour_noise.png", columns=len(images), zoom=3)
            before_after(base, after, first_rows(), DOCS / "first.png", dpi=82)
        write_text(DOCS / "tour.md", page(step))
        return f"{DOCS / 'tour.md'} is written"


if __name__ == "__main__":
    main()
