"""Which reward can be trusted: each reward of pictures against the truth.

    python -m studies.reward_truth --policy out/policy       # by that policy's pictures
"""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from eval import load_toy_policy, mean_and_error, mean_of_groups, sample_truth
from grpo import centre, variance_share
from policy import Policy
from recipes import parse
from referees.build import build_rewards
from referees.questions import Questions
from rewards import Samples, score
from sample import TOY
from support.disk import write_json
from support.tables import markdown_table
from support.terminal import Arguments, new_file
from tasks import TASKS, rewards_of, token_states
from toy import shapes
from toy.world import detect, render_pixels

SEED = 1234                                     # of held-out pictures and noise


def held_out_samples(policy: Policy) -> tuple[Samples, Tensor]:
    """Samples of held-out prompts, 8 of each, and their truth (N,).

    The real picture of each is one of the prompt."""
    rng = np.random.default_rng(SEED)
    task = TASKS["draw"]
    rows = []
    for row in task.held_out("test"):
        real = render_pixels([shapes.sample_scene(row.metadata, rng)])[0] * 0.5 + 0.5
        rows.append(replace(row, real=real))
    samples, _, right = sample_truth(policy, task, rows, SEED, task.samples)
    return samples, right.double()


def score_samples(policy: Policy, samples: Samples) -> dict[str, Tensor]:
    """name -> scores (N,) of every reward of pictures that the toy can ask.

    tim compares the states of the policy itself."""
    names = rewards_of(TASKS["pair_image"])
    flags = " ".join(f"--{name} 1" for name in names)
    cfg = parse(f"--pair_image 1 {flags}".split())
    rewards = build_rewards(
        cfg, policy.device, detector=detect, rows=[], questions=Questions(True),
        states=token_states(lambda: nullcontext(policy), nullcontext, 512))
    return score({name: rewards[name] for name in names}, samples)


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Pearson's correlation of two (N,); None if one of them does not vary."""
    value = torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()
    return value if math.isfinite(value) else None


def truth_table(scores: dict[str, Tensor], truth: Tensor, G: int) -> dict[str, dict]:
    """name -> how well a reward follows the truth.

    Its correlation with it over all samples ("overall") and within groups ("in_group"), and its
    share of the variance within groups if all rewards were added up."""
    share = variance_share(scores, dict.fromkeys(scores, 1.0), G)
    table = {}
    for name, values in scores.items():
        inside = correlation(centre(values.double(), G).flatten(), centre(truth, G).flatten())
        table[name] = dict(
            overall=correlation(values, truth), in_group=inside, share=share[name])
    return table


def print_rewards(table: dict[str, dict]) -> str:
    """Markdown, a row per reward."""
    rows = []
    for name, columns in table.items():
        cells = ["-" if x is None else f"{x:.3f}" for x in columns.values()]
        rows.append([f"`{name}`", *cells])
    return markdown_table(["reward", "overall", "in_group", "share"], rows)


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.reward_truth", description="Each reward against the truth.")
    ap.add_argument("--policy", default=str(TOY), help="the policy whose pictures are judged")
    ap.add_argument("--out", type=new_file, default="rewards.json", help="the table as JSON")
    ap.run(run, argv)


def run(a) -> str:
    """Carry out a parsed command line; returns what to print."""
    policy = load_toy_policy(a.policy)
    G = TASKS["draw"].samples
    samples, truth = held_out_samples(policy)
    scores = score_samples(policy, samples)
    table = truth_table(scores, truth, G)
    means = {name: mean_and_error(mean_of_groups(each, G)) for name, each in scores.items()}
    write_json(a.out, dict(policy=a.policy, means=means, table=table))
    return f"{print_rewards(table)}\nwritten to {a.out}"


if __name__ == "__main__":
    main()
