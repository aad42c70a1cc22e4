"""Refinement against drawing anew, as a table, or as a picture of one prompt's rounds.

    python -m studies.refinement --policy out/policy                     # truth by pictures drawn
    python -m studies.refinement "three red squares" --select judge      # draws, looks, draws again
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eval import mean_and_error, mean_of_groups
from policy import Policy
from referees.judge import load_judge
from rewards import Knowledge, Samples
from sample import SAMPLING, TOY, Read, Round, Write, images_of, plain_draw, refine, sample_plan
from support.checkpoint import load_policy
from support.disk import write_json
from support.pictures import save_grid
from support.tables import markdown_table
from support.terminal import Arguments, new_file, number, plain_text, the_device
from tasks import TASKS, WORDING
from toy import shapes
from toy.world import detect, drawn_truth


def refine_prompts(
    policy: Policy, prompts: list[str], rounds: int, select: str, value: Callable, seed: int
) -> list[Round]:
    """sample.refine with greedy diagnoses and the policy's own wording."""
    name = policy.config.scale
    scale = SAMPLING[name]
    wording = WORDING[name]
    draw = plain_draw(name, (scale["size"],) * 2)
    write = Write(scale["tokens"], temperature=0.0)
    return refine(
        policy, prompts, rounds, select, value, write, draw, look=wording.look, seed=seed,
        stop=wording.stop, guidance=(scale["guidance"], scale["edit"]),
        system=wording.system_prompt)


def judge_of(policy: Policy, prompts: list[str]) -> Callable[[Tensor], Tensor]:
    """What pictures (N, 3, H, W) of the prompts are worth, (N,).

    How surely a judge says yes to "is this <prompt> ?"; each scale has its judge.
    """
    knowledge = Knowledge(
        load_judge(SAMPLING[policy.config.scale]["judge"], device=policy.device))
    rows = [{}] * len(prompts)

    def judged(images: Tensor) -> Tensor:
        return knowledge(Samples(prompts, rows, images=images)).cpu()

    return judged


# ---- the table ----


def refinement_table(
    policy: Policy, rounds: int, samples: int = 4, seed: int = 1234
) -> dict[str, list]:
    """name -> pairs (mean, standard error) of the truth of 1, 2, ... rounds + 1 pictures.

    `refine, always|self|judge|oracle`: sample.refine with each way of selecting. `best,
    judge|oracle`: of as many pictures drawn anew, the one that the judge prefers, or any that is
    right. Held-out prompts, `samples` of each; the judge is asked one question about the whole
    prompt.
    """
    rows = [row for row in TASKS["draw"].held_out("test") for _ in range(samples)]
    prompts = [row.text for row in rows]
    metadata = [row.metadata for row in rows]
    judged = judge_of(policy, prompts)

    def truth(images: Tensor) -> Tensor:
        return drawn_truth(Samples(prompts, metadata, images=images), detect(images))

    def share(right: Tensor) -> tuple[float, float]:
        return mean_and_error(mean_of_groups(right, samples))

    table = {}
    for select in ("always", "self", "judge", "oracle"):
        value = judged if select == "judge" else truth
        done = refine_prompts(policy, prompts, rounds, select, value, seed)
        table[f"refine, {select}"] = [share(truth(each.kept)) for each in done]
    table["best, judge"] = []
    table["best, oracle"] = []
    draw = plain_draw(policy.config.scale, (shapes.SIZE, shapes.SIZE))
    right = []
    score = []
    for step in range(rounds + 1):
        rollout = sample_plan(
            policy, [Read(prompts), draw], seed=seed, step=step, index=range(len(prompts)), G=1)
        images = images_of(policy, rollout)
        right.append(truth(images))                                                        # (N,)
        score.append(judged(images))
        best = torch.stack(score).argmax(0, keepdim=True)                                  # (1, N)
        table["best, judge"].append(share(torch.stack(right).gather(0, best)))
        table["best, oracle"].append(share(torch.stack(right).amax(0)))
    return table


def print_refinement(table: dict[str, list]) -> str:
    """The table in markdown, a row per number of pictures drawn."""
    rows = []
    for n, cells in enumerate(zip(*table.values()), 1):
        rows.append([n, *(f"{mean:.3f} ± {error:.3f}" for mean, error in cells)])
    return markdown_table(["pictures drawn", *table], rows)


# ---- the command line ----


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.refinement",
                   description="Refinement: a picture of one prompt's rounds, or a table.")
    ap.add_argument("prompt", nargs="?", type=plain_text,
                    help="what to draw; without one: a table on held-out rows")
    ap.add_argument("--policy", default=str(TOY), help="a policy folder")
    ap.add_argument("--select", choices=["always", "judge", "self"],
                    default="always",
                    help="which picture is kept: the new one, the one that the judge prefers (the "
                         "toy's for the toy, PaliGemma 2 for BAGEL), or the new one unless the "
                         "policy says that nothing needs to change")
    ap.add_argument("--rounds", type=number(int, least=1), default=3, help="times it draws again")
    ap.add_argument("--n", type=number(int, least=1), default=4, help="samples of the prompt")
    ap.add_argument("--seed", type=number(int, least=0), default=1234, help="of noise and texts")
    ap.add_argument("--out", type=new_file, help="the file; default: refine.png, or refine.json")
    ap.run(run, argv)


def run(a) -> str:
    """Carry out a parsed command line; returns what to print."""
    policy = load_policy(a.policy, device=the_device())
    scale = SAMPLING[policy.config.scale]
    out = a.out or Path("refine.png" if a.prompt else "refine.json")
    if not a.prompt:
        if not policy.config.scale.startswith("toy"):
            raise ValueError("the table is of the toy's held-out prompts; give a prompt")
        table = refinement_table(policy, a.rounds, seed=a.seed)
        write_json(out, dict(policy=a.policy, seed=a.seed, table=table))
        return f"{print_refinement(table)}\nwritten to {out}"
    prompts = [a.prompt] * a.n
    value = judge_of(policy, prompts)
    rounds = refine_prompts(policy, prompts, a.rounds, a.select, value, a.seed)
    images = torch.stack([each.drawn for each in rounds], dim=1).flatten(0, 1)  # sample-major
    save_grid(images, out, columns=len(rounds), zoom=scale["zoom"])
    lines = [f"{out}: a row per sample, a column per round"]
    for k, each in enumerate(rounds):
        lines.append(f"round {k}: mean {each.value.mean():.3f}")
        for worth, text in zip(each.worth, each.texts or [""] * a.n):
            lines.append(f"  {worth:.2f}  {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
