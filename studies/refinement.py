"""Refinement against drawing anew, as a table, or as a picture of one prompt's rounds.

    python -m studies.refinement --policy out/policy                     # truth by pictures drawn
    python -m studies.refinement "three red squares" --select judge      # draws, looks, draws again
"""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import flow_grpo
from eval import mean_and_error, mean_of_groups
from policy import Policy
from referees.geneval import geneval_check
from referees.judge import load_judge
from rewards import Knowledge, Samples
from sample import SAMPLING, TOY, Draw, Read, Round, Write, images_of, refine, sample_plan
from studies.tables import markdown_table
from support.checkpoint import load_policy
from support.disk import write_atomic
from support.pictures import to_bytes
from support.plots import save_figure
from support.terminal import Arguments, number, one_line, the_device
from tasks import TASKS, WORDING
from toy import shapes
from toy.world import detect


def plain_draw(policy: Policy) -> Draw:
    """How a person's samples are drawn at the policy's scale, without noisy steps."""
    scale = SAMPLING[policy.config.scale]
    return Draw((scale["size"],) * 2, flow_grpo.time_grid(scale["steps"], scale["shift"]))


def refine_prompts(
    policy: Policy, prompts: list[str], rounds: int, select: str, value: Callable, seed: int
) -> list[Round]:
    """sample.refine with greedy diagnoses and the policy's own wording."""
    scale, wording = SAMPLING[policy.config.scale], WORDING[policy.config.scale]
    draw, write = plain_draw(policy), Write(scale["tokens"], temperature=0.0)
    guidance = []
    for each in (scale["guidance"], scale["edit"]):
        guidance.append(each if each.text_scale > 1 else None)
    return refine(
        policy, prompts, rounds, select, value, [draw], [write, draw], look=wording.look, seed=seed,
        guidance=tuple(guidance), system=wording.system_prompt)


def value_of(select: str, prompts: list[str], judge: str, device) -> Callable[[Tensor], Tensor]:
    """What pictures (N, 3, H, W) of the prompts are worth, (N,): for "oracle" 1 if the toy's exact
    detector finds what is asked, else the judge's yes to "is this <prompt> ?".

    Errors: ValueError for a prompt that is not the toy's.
    """
    if select != "oracle":
        knowledge, rows = Knowledge(load_judge(judge, device=device)), [{}] * len(prompts)
        return lambda images: knowledge(Samples(prompts, rows, images=images)).cpu()
    known = {m["prompt"]: m for split in ("train", "eval")
             for m in (*shapes.prompts(split), *shapes.implicit_prompts(split))}
    if strange := [prompt for prompt in prompts if prompt not in known]:
        raise ValueError("--select oracle asks the toy's exact detector, which knows only the "
                         f"toy's prompts, not {strange[0][:60]!r}; use --select judge")

    def truth(images: Tensor) -> Tensor:
        verdicts = [geneval_check(known[p], found)[0] for p, found in zip(prompts, detect(images))]
        return torch.tensor(verdicts).float()
    return truth


# ---- the table ----


def refinement_table(
    policy: Policy, judge: str, rounds: int = 3, samples: int = 4, seed: int = 1234
) -> dict[str, list[tuple[float, float]]]:
    """Truth by the number of pictures drawn, 1..rounds + 1: name -> (mean, standard error) each.

    `refine, always|judge|oracle`: sample.refine with each way of selecting. `best, judge|oracle`:
    of as many pictures drawn anew, the one that the judge prefers, or any that is right. Held-out
    prompts, `samples` of each; the judge is asked one question about the whole prompt.
    """
    prompts = [row.text for row in TASKS["draw"].held_out(False) for _ in range(samples)]
    truth = value_of("oracle", prompts, judge, policy.device)
    judged = value_of("judge", prompts, judge, policy.device)

    def share(right: Tensor) -> tuple[float, float]:
        return mean_and_error(mean_of_groups(right, samples))

    table = {}
    for select in ("always", "judge", "oracle"):
        value = judged if select == "judge" else truth
        done = refine_prompts(policy, prompts, rounds, select, value, seed)
        table[f"refine, {select}"] = [share(truth(each.kept)) for each in done]
    table["best, judge"], table["best, oracle"] = [], []
    plan, index = [Read(prompts), plain_draw(policy)], list(range(len(prompts)))
    right, score = [], []
    for step in range(rounds + 1):
        rollout = sample_plan(policy, plan, seed=seed, step=step, prompts=index, G=1)
        images = images_of(policy, rollout)
        right.append(truth(images))                                                        # (N,)
        score.append(judged(images))
        best = torch.stack(score).argmax(0, keepdim=True)                                  # (1, N)
        table["best, judge"].append(share(torch.stack(right).gather(0, best)))
        table["best, oracle"].append(share(torch.stack(right).amax(0)))
    return table


def print_refinement(table: dict[str, list[tuple[float, float]]]) -> str:
    """The table in markdown, a row per number of pictures drawn."""
    rows = []
    for drawn, cells in enumerate(zip(*table.values()), start=1):
        rows.append([f"{drawn}", *(f"{mean:.3f} ± {error:.3f}" for mean, error in cells)])
    return "\n".join(markdown_table(["pictures drawn", *table], rows))


# ---- the picture ----


def save_rounds(rounds: list[Round], select: str, out: Path) -> None:
    """A PNG with a row per sample: what each round drew, what was written before it, its value, and
    whether it was kept."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    count, name = len(rounds[0].drawn), "right" if select == "oracle" else "judge"
    figure, axes = plt.subplots(
        count, len(rounds), figsize=(2.6 * len(rounds), 2.7 * count), squeeze=False,
        layout="constrained")
    for k, each in enumerate(rounds):
        for n, image in enumerate(to_bytes(each.drawn)):
            axis, text = axes[n, k], each.texts[n] if each.texts else ""
            kept = "kept" if torch.equal(each.drawn[n], each.kept[n]) else "not kept"
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            lines = textwrap.wrap(text, 36)[:4]
            axis.set_title("\n".join(lines), fontsize=7, parse_math=False)
            axis.set_xlabel(f"round {k}: {kept}, {name} {each.worth[n]:.2f}", fontsize=7)
    save_figure(figure, out, dpi=120)


# ---- the command line ----


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.refinement",
                   description="Refinement: a picture of one prompt's rounds, or a table.")
    ap.add_argument("prompt", nargs="?", help="what to draw; without one: a table on held-out rows")
    ap.add_argument("--policy", default=str(TOY), help="a policy folder")
    ap.add_argument("--adapter", default="", help="a folder of adapters to put on")
    ap.add_argument("--judge", default="", help="yes/no judge: a folder or hub name; default: the "
                    "toy's for the toy, PaliGemma 2 for BAGEL")
    ap.add_argument("--select", choices=["always", "judge", "oracle"], default="always",
                    help="which picture is kept: the new one, the one that the judge prefers, or "
                         "the new one if the old one is wrong by the toy's truth")
    ap.add_argument("--rounds", type=number(int, least=1), default=3, help="times it draws again")
    ap.add_argument("--n", type=number(int, least=1), default=4, help="samples of the prompt")
    ap.add_argument("--seed", type=number(int, least=0), default=1234, help="of noise and texts")
    ap.add_argument("--out", type=Path, help="the file; default: refine.png, or refine.json")
    a = ap.parse_args(argv)
    with one_line("studies.refinement"):
        print(run(a))


def run(a) -> str:
    """Carry out a parsed command line; returns what to print."""
    policy = load_policy(a.policy, device=the_device(), adapter=a.adapter)
    out = a.out or Path("refine.png" if a.prompt else "refine.json")
    judge = a.judge or SAMPLING[policy.config.scale]["judge"]
    if not a.prompt:
        if policy.config.scale != "toy":
            raise ValueError("the table is of the toy's held-out prompts; give a prompt")
        table = refinement_table(policy, judge, a.rounds, seed=a.seed)
        result = {"policy": a.policy, "seed": a.seed, "table": table}
        write_atomic(out, json.dumps(result, indent=1).encode())
        return f"{print_refinement(table)}\nwritten to {out}"
    prompts = [a.prompt] * a.n
    value = value_of(a.select, prompts, judge, policy.device)
    rounds = refine_prompts(policy, prompts, a.rounds, a.select, value, a.seed)
    save_rounds(rounds, a.select, out)
    means = [f"round {k}: mean {each.value.mean():.3f}" for k, each in enumerate(rounds)]
    return f"{', '.join(means)}; {a.n} samples in {out}"


if __name__ == "__main__":
    main()
