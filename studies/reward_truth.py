"""Which reward can be trusted: each against the truth.

    python -m studies.reward_truth --policy out/policy       # base and policy
"""

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from toy import shapes
from eval import answered, policy_of
from grpo import variance_share
from policy import Policy
from recipes import parse
from referees.build import BUILD, Models
from referees.questions import Questions
from rewards import REWARDS, Samples, score
from sample import TOY
from support.disk import write_atomic
from support.pictures import to_bytes
from support.plots import save_figure
from support.terminal import Arguments, one_line
from tasks import TASKS, token_states
from toy.world import detect, rendered


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
    for name, entry in REWARDS.items():
        if name == "pref" or not any(set(read) <= {"images", "reals"} for read in entry.reads):     # no preference model knows the toy
            continue
        reward = BUILD[name](models)
        score({name: reward}, samples_at(samples, slice(0, G)))                       # loads, and warms up
        start = time.perf_counter()
        scores[name] = score({name: reward}, samples)[name]                           # (N,)
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


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.reward_truth", description="Each reward against the truth.", allow_abbrev=False)
    ap.add_argument("--policy", default=str(TOY), help="a policy folder")
    ap.add_argument("--seed", type=int, default=1234, help="of held-out pictures and noise")
    ap.add_argument("--out", type=Path, default=Path("rewards.json"), help="the tables as JSON; the picture stands beside it")
    a = ap.parse_args(argv)
    with one_line("studies.reward_truth"):
        studies = {}
        for name, folder in {"base": str(TOY), "policy": a.policy}.items():
            if name == "base" or folder != str(TOY):
                studies[name], *last = reward_study(policy_of(folder), a.seed)
        best_and_worst(*last, a.out.with_suffix(".png"))
        write_atomic(a.out, json.dumps({"policy": a.policy, "seed": a.seed, "tables": studies}, indent=1).replace("NaN", "null").encode())
        print(f"{print_rewards(studies)}\nwritten to {a.out}, best and worst pictures to {a.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
