"""Refinement against drawing more, and what it looks like.

    python -m studies.refinement --policy out/policy         # rounds of refinement against the best of as many new pictures
    python -m studies.refinement "three red squares" --select judge      # one prompt: looks at what it drew and draws it again
"""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import flow_grpo

from toy import shapes
from eval import mean_and_error, plain_choices, policy_of
from policy import Policy
from referees.geneval import geneval_check
from referees.judge import load_judge
from rewards import Knowledge, Samples
from sample import SAMPLING, TOY, Draw, Read, Round, Write, images_of, refine, sample_plan
from support.checkpoint import load_policy
from support.disk import write_atomic
from support.plots import save_figure
from support.pictures import to_bytes
from support.terminal import Arguments, one_line, the_device, utf8
from tasks import LOOK, TASKS


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


def value_of(select: str, prompts: list[str], judge: str, device) -> Callable[[Tensor], Tensor]:
    """What `refine` selects by: the toy's truth for "oracle", else the judge's yes to "is this <prompt> ?"."""
    if select == "oracle":
        known = {m["prompt"]: m for split in ("train", "eval") for m in (*shapes.prompts(split), *shapes.implicit_prompts(split))}
        if strange := [prompt for prompt in prompts if prompt not in known]:
            raise ValueError("--select oracle asks the toy's exact detector, which knows the toy's prompts alone, not "
                             f"{strange[0][:60]!r}; use --select judge")
        return lambda images: torch.tensor([float(geneval_check(known[prompt], found)[0])
                                            for prompt, found in zip(prompts, shapes.detect(to_bytes(images)))])
    knowledge = Knowledge(load_judge(judge, device=device))
    return lambda images: knowledge(Samples(prompts, [{}] * len(prompts), images=images)).cpu()


def save_rounds(rounds: list[Round], select: str, path: str) -> None:
    """A PNG of every sample's rounds, a row each: what was drawn, what was written before it, its value, and whether it was kept."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    count = len(rounds[0].drawn)
    figure, axes = plt.subplots(count, len(rounds), figsize=(2.6 * len(rounds), 2.7 * count), squeeze=False, layout="constrained")
    for k, each in enumerate(rounds):
        for n, image in enumerate(to_bytes(each.drawn)):
            kept = torch.equal(each.drawn[n], each.kept[n])
            axis, told = axes[n, k], each.texts[n] if each.texts else ""
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_title("\n".join(textwrap.wrap(told, 36)[:4]), fontsize=7, parse_math=False)
            named = "right" if select == "oracle" else "judge"
            axis.set_xlabel(f"round {k}: {'kept' if kept else 'not kept'}, {named} {each.worth[n]:.2f}", fontsize=7)
    save_figure(figure, Path(path), dpi=120)


def table_of(a) -> str:
    """The table of a policy, written to a file and as text."""
    table, out = refinement(policy_of(a.policy, a.adapter), a.judge or SAMPLING["toy"]["judge"], a.rounds, seed=a.seed), Path(a.out or "refine.json")
    write_atomic(out, json.dumps({"policy": a.policy, "seed": a.seed, "table": table}, indent=1).encode())
    return f"{print_refinement(table)}\nwritten to {out}"


def picture_of(a) -> str:
    """n samples of one prompt, --rounds rounds each, as one picture."""
    policy, out = load_policy(a.policy, device=the_device(), adapter=a.adapter), a.out or "samples.png"
    scale = SAMPLING[policy.config.scale]
    write, draw = Write(scale["tokens"], 0.0), Draw((scale["size"],) * 2, flow_grpo.time_grid(scale["steps"], scale["shift"]))
    prompts, both = [utf8(a.prompt)] * a.n, [scale["guidance"], scale["edit"]]
    rounds = refine(policy, prompts, a.rounds, a.select, value_of(a.select, prompts, a.judge or scale["judge"], policy.device), [draw],
                    [write, draw], look=LOOK[policy.config.scale]["neutral"], seed=a.seed,
                    guidance=tuple(g if g.text_scale > 1 else None for g in both), system=scale["system_prompt"])
    save_rounds(rounds, a.select, out)
    told = [f"round {k}: mean {each.value.mean():.3f}" for k, each in enumerate(rounds)]
    return "\n".join([f"selected by {a.select}; {'truth' if a.select == 'oracle' else 'judge'}: " + ", ".join(told),
                      f"{a.n} samples in {out}"])


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.refinement", description="Refinement: a picture of one prompt's rounds, or a table.", allow_abbrev=False)
    ap.add_argument("prompt", nargs="?", help="what to draw; without one: the table on held-out prompts of the toy")
    ap.add_argument("--policy", default=str(TOY), help="a policy folder")
    ap.add_argument("--adapter", default="", help="a folder of adapters to put on")
    ap.add_argument("--judge", default="", help="yes/no judge: a folder or hub name (the toy's for the toy, PaliGemma 2 for BAGEL)")
    ap.add_argument("--select", choices=["always", "judge", "oracle"], default="always",
                    help="what is kept: the new picture, the better by --judge, the new one where the toy's truth says no")
    ap.add_argument("--rounds", type=int, default=3, help="how often what was drawn is looked at and drawn again")
    ap.add_argument("--n", type=int, default=4, help="samples of the prompt")
    ap.add_argument("--seed", type=int, default=1234, help="of noise and texts")
    ap.add_argument("--out", default="", help="samples.png, or refine.json")
    a = ap.parse_args(argv)
    with one_line("studies.refinement"):
        for name, least in (("rounds", 1), ("n", 1), ("seed", 0)):
            if getattr(a, name) < least:
                raise ValueError(f"--{name} {getattr(a, name)}: must be at least {least}")
        print(picture_of(a) if a.prompt else table_of(a))


if __name__ == "__main__":
    main()
