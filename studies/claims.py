"""What the papers claim, put to the test on the toy: arms of three seeds, judged by one rule.

    python -m studies.claims --list                             # the claims and their arms
    python -m studies.claims ins-teaches-space --seeds 3  # runs what is missing, then judges

An arm is a run of train.py, a merge, or an evaluation of another arm's policy, in a folder
out/claims/ARM-SEED that claims share. A call that was stopped goes on with its arms. Results are
kept as JSON and a figure in docs/claims/, from which docs/claims.md is written.

The rule: `a > b` holds if the difference, paired by seed, is above two standard errors over the
seeds, and fails if it is below minus two. `a ~ b` (a loses nothing) holds if the difference less
two errors is above -MARGIN, and fails if the difference plus two errors is below. A claim holds if
all its comparisons hold, does not hold if one fails, and else cannot be told at this size.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval import mean_and_error
from studies.tables import markdown_table
from support.disk import read_json, write_atomic
from support.plots import pyplot, save_figure
from support.run import CHECKPOINTS, Owner, read_log
from support.terminal import Arguments, number, one_line, say

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MARGIN = 0.05                                   # the truth that "loses nothing" may lose
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot tell at this size"

PREAMBLE = f"""# Claims in miniature

What the papers say, run again on the toy: `python -m studies.claims NAME --seeds 3 --jobs 2`. The
arms are shorter than the recipes' runs. Nothing is tuned per arm; the recipes were tuned as they
are. LVRPO's claim that larger policies learn faster (1.3B, 7B, 13B) is not run: the toy has
weights of one width.

**The rule.** `a > b in x` is the difference of x between two arms, paired by seed, ± its standard
error over seeds. It holds above two errors and fails below minus two. `a ~ b` says that a loses
nothing: it holds if a loses less than {MARGIN}, errors included. A claim holds if all its
comparisons hold, does not hold if one fails, and else cannot be told at this size. Three seeds
are few: if there is no difference, a comparison still holds in 9% of cases and fails in 9%. The
errors leave out the held-out prompts, which are the same for all seeds, as is the base.

**What is measured** is held-out truth of a task (`draw`, `think`, `ask` and so on), or what the
key says in [the log](results.md#the-numbers-in-logjsonl), as the mean of five steps, at the end;
the seeds follow in brackets. `x at equal y` compares x when both arms first reach the same y;
`uneven` is the spread of a value over the noisy steps, divided by its mean.
"""

# ---- the claims ----

# Arm -> its flags, shorter than the recipes' runs. A line that starts with another arm's name adds
# to its flags; {other} is the policy of another arm with the same seed. A line that starts with
# "merge" is for support.merge, with "eval" for eval.py, with "refine" for studies.refinement.
ARMS = {
    "base": "--recipe lvrpo --steps 0",
    "full": "--recipe lvrpo --steps 50",
    "draw-all": "--recipe lvrpo --think 0 --ask 0 --edit 0 --accuracy 0 --steps 50",
    "draw-each": "draw-all --normalise each",
    "draw-no-ins": "draw-all --ins 0",
    "generation-only": "draw-all --kn 0",
    "sem-frozen": "--recipe lvrpo --think 0 --ask 0 --edit 0 --accuracy 0 --steps 200 "
                  "--eval_every 50 --kn 0 --ins 0",
    "sem-trained": "sem-frozen --train_referee 1e-4",
    "ask-alone": "--recipe lvrpo --draw 0 --think 0 --edit 0 --sem 0 --ins 0 --kn 0 --steps 60 "
                 "--epochs 4",
    "grpo": "ask-alone --text_average sequence",
    "gspo": "grpo --text_ratio sequence",
    "dapo": "ask-alone --text_average token",
    "dr-grpo": "ask-alone --text_average constant --advantage none",
    "joint": "--recipe unigrpo --steps 60",
    "text-only": "joint --image_weight 0",
    "flow-only": "joint --text_weight 0",
    "ratio-norm-off": "joint --no-ratio_norm",
    "guided": "joint --guidance 2",
    "plain-then-guided": "eval {joint} --guidance 2",
    "guided-then-guided": "eval {guided} --guidance 2",
    "velocity": "--recipe unigrpo --draw 32 --think 0 --steps 150 --eval_every 50",
    "no-penalty": "velocity --mse_weight 0",
    "latent-kl": "no-penalty --image_beta 0.003",
    "dv-soft": "--recipe alphagrpo --steps 60",
    "dv-binary": "dv-soft --dv_by binary",
    "holistic": "dv-soft --dv_by holistic",
    "rectify-group": "--recipe alphagrpo_reflect --steps 60",
    "rectify-initial": "rectify-group --rectify initial",
    "rectify-off": "rectify-group --rectify off",
    "refined": "refine {rectify-group}",
    "unified": "--recipe corl --eval_every 50 --steps 50",
    "pair-sum": "unified --pair sum",
    "pair-none": "unified --pair none",
    "corl-image": "unified --pair_text 0",
    "corl-text": "unified --pair_image 0",
    "merged": "merge {corl-image} {corl-text} --base toy/policy",
    "cycle": "corl-image --tim 0",
    "tim": "corl-image --recaption 0 --likeness 0",
    "unified-longer": "--recipe corl --eval_every 50 --steps 100",
    "alternating": "unified-longer --alternate",
    "refined-image": "--recipe corl_t2i --steps 50 --eval_every 50 --policy {unified}",
    "refined-choose": "--recipe corl_mc --steps 50 --eval_every 50 --policy {unified}",
    "refined-merged": "merge {refined-image} {refined-choose} --base {unified}",
    "image-alone": "--recipe corl_t2i --steps 100 --eval_every 50",
}


@dataclass(frozen=True)
class Claim:
    """One entry of CLAIMS."""

    paper: str
    says: str                                                   # in a sentence
    arms: tuple[str, ...]
    measures: tuple[str, ...]                   # keys of an evaluation or of the log
    compares: tuple[str, ...]                                   # see parse_comparison
    reading: str = ""                                           # what the measures show besides


VARIETY = ("layout_entropy", "pairwise_distance", "draw/saturation", "draw/roughness")

CLAIMS = {
    "frozen-referee": Claim(
        paper="LVRPO",
        says="A referee that learns along with the policy is fooled; a frozen one is needed.",
        arms=("sem-frozen", "sem-trained"),
        measures=("draw", "draw/rewards/sem/mean", *VARIETY),
        compares=("sem-frozen > sem-trained : draw",
                  "sem-trained > sem-frozen : draw/rewards/sem/mean"),
        reading="With either referee mean truth stops rising after 100 steps while layouts become "
                "alike; with the one that learns, it falls in one seed of three. It learns by "
                "SigLIP's own contrastive loss, so its cosines have a level of their own."),
    "full-rewards": Claim(
        paper="LVRPO",
        says="Rewards of drawings alone cost understanding, the full set helps it.",
        arms=("base", "generation-only", "draw-all", "full"),
        measures=("ask", "choose", "captions", "draw"),
        compares=("base > generation-only : ask", "base > generation-only : choose",
                  "draw-all > generation-only : ask", "full > base : ask", "full > base : choose",
                  "full > base : captions"),
        reading="generation-only draws for r_sem and r_ins; draw-all adds r_kn; full also answers, "
                "thinks and edits, for all rewards. Drawing alone costs a few answers of a "
                "thousand; of understanding, full gains in open questions, which it trains, and in "
                "nothing else."),
    "ins-teaches-space": Claim(
        paper="LVRPO",
        says="Gains in space come from r_ins.",
        arms=("base", "draw-no-ins", "draw-all"),
        measures=("draw/position", "draw"),
        compares=("draw-all > draw-no-ins : draw/position",),
        reading="Position rises as much without r_ins, from r_sem and r_kn together."),
    "summed-follows-noise": Claim(
        paper="counter-test of LVRPO",
        says="Under a summed reward the advantage follows the part that varies most; normalising "
             "each is better.",
        arms=("draw-all", "draw-each"),
        measures=("draw", "draw/single_object", "draw/two_object", "draw/counting", "draw/colors",
                  "draw/position", "draw/color_attr", "draw/advantage_share/sem",
                  "draw/advantage_share/ins", "draw/advantage_share/kn"),
        compares=("draw-all > draw-each : draw/advantage_share/kn", "draw-each > draw-all : draw"),
        reading="The sum does follow r_kn, which varies most, but r_kn is no noise here: truth "
                "comes out the same."),
    "text-losses": Claim(
        paper="DAPO, GSPO, Dr. GRPO",
        says="Token averages (DAPO), sequence ratios (GSPO) and no std (Dr. GRPO) beat GRPO's text "
             "loss.",
        arms=("grpo", "dapo", "gspo", "dr-grpo"),
        measures=("ask",),
        compares=("dapo > grpo : ask", "gspo > grpo : ask", "dr-grpo > grpo : ask"),
        reading="Answers have a few tokens, so the ways to average over tokens hardly differ; the "
                "base answers 0.701."),
    "joint-beats-one": Claim(
        paper="UniGRPO",
        says="Training thought and picture together beats each alone.",
        arms=("base", "text-only", "flow-only", "joint"),
        measures=("think", "draw"),
        compares=("joint > text-only : think", "joint > flow-only : think")),
    "velocity-penalty": Claim(
        paper="UniGRPO",
        says="The velocity penalty holds variety; nothing or a latent KL does not.",
        arms=("velocity", "no-penalty", "latent-kl"),
        measures=("draw", "draw/reward", *VARIETY),
        compares=("velocity > no-penalty : layout_entropy at draw/reward",
                  "velocity > latent-kl : layout_entropy at draw/reward",
                  "velocity > no-penalty : draw at draw/reward",
                  "velocity > latent-kl : draw at draw/reward"),
        reading="Without a penalty layouts become alike and pixels rougher; between the latent KL, "
                "at lvrpo's weight, and the velocity penalty no difference can be told. UniGRPO's "
                "own ablation is about a hacked preference model; r_ins cannot be hacked that way, "
                "since the truth uses the same rules."),
    "ratio-norm": Claim(
        paper="UniGRPO, GRPO-Guard",
        says="RatioNorm evens the ratio's spread over the noisy steps.",
        arms=("joint", "ratio-norm-off"),
        measures=("think", "think/image/ratio/step_mean/0", "think/image/ratio/step_mean/1",
                  "think/image/ratio/step_mean/2", "think/image/ratio/step_std/0",
                  "think/image/ratio/step_std/1", "think/image/ratio/step_std/2",
                  "think/image/clip_ratio/step_mean/0", "think/image/clip_ratio/step_mean/1",
                  "think/image/clip_ratio/step_mean/2", "think/image/ratio/step_std/uneven"),
        compares=("ratio-norm-off > joint : think/image/ratio/step_std/uneven",),
        reading="With RatioNorm the last noisy step, whose ratios vary most, is clipped less. "
                "Truth is higher, by less than two errors."),
    "decomposed": Claim(
        paper="AlphaGRPO",
        says="Decomposed questions beat one holistic question.",
        arms=("base", "holistic", "dv-soft"),
        measures=("think", "draw", "think/rewards/dvreward/mean"),
        compares=("dv-soft > holistic : think",),
        reading="The judge's one holistic answer more than doubles while truth stays as it was: "
                "the policy games it. The decomposed reward also asks two questions about "
                "quality."),
    "soft-answers": Claim(
        paper="AlphaGRPO",
        says="Soft answers to the questions beat binary ones.",
        arms=("base", "dv-binary", "dv-soft"),
        measures=("think", "draw", "think/rewards/dvreward/mean", "think/frac_reward_zero_std"),
        compares=("dv-soft > dv-binary : think",),
        reading="The toy's judge is nearly always sure, so that rounding its answers hardly "
                "changes the reward."),
    "rectification": Claim(
        paper="AlphaGRPO",
        says="Rectification helps refinements: by the group's least reward (the paper's), by the "
             "first picture's (its code's).",
        arms=("base", "rectify-off", "rectify-group", "rectify-initial"),
        measures=("reflect", "reflect/repaired", "reflect/spoiled"),
        compares=("rectify-group > rectify-off : reflect",
                  "rectify-initial > rectify-off : reflect"),
        reading="Both ways repair more wrong pictures than none; the first picture's reward also "
                "spoils the most right ones."),
    "edits-for-free": Claim(
        paper="AlphaGRPO",
        says="Edits improve without edit training.",
        arms=("base", "dv-soft", "rectify-group", "draw-all"),
        measures=("edit", "edit/changed", "edit/kept"),
        compares=("dv-soft > base : edit", "rectify-group > base : edit"),
        reading="Under AlphaGRPO's recipes what should stay is kept less often. Under LVRPO's "
                "rewards of drawings (draw-all) edits do improve untrained."),
    "refine-beats-best": Claim(
        paper="AlphaGRPO",
        says="Refinement at inference beats the best of as many new pictures.",
        arms=("refined",),
        measures=("refine, always", "refine, judge", "best, judge", "refine, oracle",
                  "best, oracle"),
        compares=("refined > refined : refine, judge - best, judge",),
        reading="The table is at four pictures. Refinement leads at two; with an oracle to choose, "
                "new pictures are the better buy."),
    "shared-advantage": Claim(
        paper="counter-test of CoRL",
        says="A shared advantage injects the other modality's noise.",
        arms=("unified", "pair-sum", "pair-none"),
        measures=("draw", "choose", "pair_image/advantage_share/pair_text.accuracy",
                  "pair_image/advantage_share/pair_text.format",
                  "pair_image/advantage_share/pair_image.recaption"),
        compares=("pair-none > unified : draw", "pair-none > unified : choose"),
        reading="More than half of a pair's advantage is its answer's; drawing pays for that, "
                "answering does not."),
    "unified-beats-apart": Claim(
        paper="CoRL",
        says="Unified training beats alternating, separate, and separate then merged.",
        arms=("unified", "alternating", "corl-image", "corl-text", "merged"),
        measures=("draw", "choose"),
        compares=("unified > alternating : draw", "unified > corl-image : draw",
                  "unified > corl-text : choose", "unified > merged : draw",
                  "unified > merged : choose"),
        reading="In drawing, the shared advantage explains the gap to drawing alone: without it, "
                "unified training (pair-none in shared-advantage) draws as well. alternating takes "
                "two updates for the rows of one, so that its averaged weights trail less."),
    "cycle-and-tim": Claim(
        paper="CoRL",
        says="Cycle and token matching add up.",
        arms=("base", "cycle", "tim", "corl-image"),
        measures=("draw", "pair_image/rewards/recaption/mean", "pair_image/rewards/likeness/mean",
                  "pair_image/rewards/tim/mean", "pair_image/advantage_share/tim"),
        compares=("cycle > base : draw", "tim > base : draw", "corl-image > cycle : draw",
                  "corl-image > tim : draw"),
        reading="Alone, token matching rises while truth falls to a third of the base's: it is "
                "gamed. Added to the cycle it has a small share of the advantage, and spoils a "
                "little."),
    "two-stages": Claim(
        paper="CoRL",
        says="Unified, then refined beats one stage.",
        arms=("unified", "unified-longer", "image-alone", "refined-image", "refined-merged"),
        measures=("draw", "choose"),
        compares=("refined-image > unified-longer : draw", "refined-image > image-alone : draw",
                  "refined-merged > unified-longer : draw",
                  "refined-merged > unified-longer : choose"),
        reading="The second stage adds to the first, but one stage of as many steps "
                "(unified-longer, image-alone) draws no worse. refined-merged is made from 50 "
                "steps of multiple choice besides."),
    "no-guidance": Claim(
        paper="UniGRPO",
        says="Training without guidance loses nothing under guidance.",
        arms=("plain-then-guided", "guided-then-guided"),
        measures=("think", "draw"),
        compares=("plain-then-guided ~ guided-then-guided : think",
                  "plain-then-guided ~ guided-then-guided : draw")),
}


# ---- running arms ----

POLICY_OF = re.compile(r"\{([\w-]+)\}")         # another arm's policy, in an arm's flags


def folder_of(arm: str, seed: int, out: Path) -> Path:
    return out / f"{arm}-{seed}"


def flags_of(arm: str) -> list[str]:
    """An arm's flags, with those that it adds to."""
    first, *more = ARMS[arm].split()
    return flags_of(first) + more if first in ARMS else [first, *more]


def parents_of(arm: str) -> list[str]:
    """The arms whose policies an arm starts from."""
    return POLICY_OF.findall(" ".join(flags_of(arm)))


def meaning(arm: str) -> str:
    """An arm's flags, with the flags of its parents in place of their names."""
    return POLICY_OF.sub(lambda found: f"{{{meaning(found[1])}}}", " ".join(flags_of(arm)))


def has_meaning(path: Path, arm: str) -> bool:
    """Whether a file says that it is of the flags that an arm and its parents have now."""
    return path.exists() and path.read_text(encoding="utf-8") == meaning(arm)


def is_done(arm: str, seed: int, out: Path) -> bool:
    return has_meaning(folder_of(arm, seed, out) / "done.txt", arm)


def commands(arm: str, seed: int, out: Path) -> list[list[str]]:
    """What makes an arm: the arguments of python, one process after another."""
    folder = folder_of(arm, seed, out)

    def policy_of(found) -> str:
        return str(folder_of(found[1], seed, out) / "policy")

    program, *rest = flags = [POLICY_OF.sub(policy_of, flag) for flag in flags_of(arm)]
    policy, table = str(folder / "policy"), str(folder / "table.json")
    if program == "eval":
        return [["eval.py", "--policy", *rest, "--out", table]]
    if program == "refine":
        return [["-m", "studies.refinement", "--policy", *rest, "--out", table]]
    if program == "merge":
        return [["-m", "support.merge", *rest, "--out", policy],
                ["eval.py", "--policy", policy, "--out", table]]
    if "--eval_every" not in flags:
        flags += ["--eval_every", "25"]
    return [["train.py", *flags, "--save_every", "25", "--seed", str(seed), "--out", str(folder)]]


def run_arm(arm: str, seed: int, out: Path) -> str:
    """Make an arm -> "" or, in one line, why it failed.

    A run that was stopped goes on if it was begun with the same flags, else its folder is removed.
    """
    folder, todo = folder_of(arm, seed, out), commands(arm, seed, out)
    begun = folder / "begun.txt"
    if has_meaning(begun, arm) and any((folder / name).exists() for name in CHECKPOINTS):
        todo[0].append("--resume")
    elif begun.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(begun, meaning(arm).encode())
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    output = folder / "output.txt"
    for command in todo:
        with output.open("a", encoding="utf-8") as file:
            python = [sys.executable, *command]
            code = subprocess.run(python, cwd=ROOT, env=env, stdout=file, stderr=file).returncode
        if code:
            *_, last = ["no output", *output.read_text(errors="replace").strip().splitlines()]
            return f"{arm}, seed {seed}: {last[:200]} (exit {code}); see {output}"
    write_atomic(folder / "done.txt", meaning(arm).encode())
    return ""


def run_missing(names: list[str], seeds: int, out: Path, jobs: int) -> list[str]:
    """Run the arms of some claims that are not done, parents first -> what failed, a line each."""
    arms = [arm for name in names for arm in CLAIMS[name].arms]
    for arm in arms:                                            # grows while it is walked
        arms += parents_of(arm)
    runs = [(arm, seed) for seed in range(seeds) for arm in dict.fromkeys(arms)]
    todo, failed = [run for run in runs if not is_done(*run, out)], []
    if todo:
        say(f"{len(todo)} runs of 1 to 15 minutes are missing, {jobs} at a time; "
            "a call that was stopped goes on with them")
    while todo:
        ready = [(arm, seed) for arm, seed in todo
                 if all(is_done(parent, seed, out) for parent in parents_of(arm))]
        if not ready:
            return failed + [f"{arm}, seed {seed}: needs an arm that failed" for arm, seed in todo]
        with ThreadPoolExecutor(jobs) as pool:
            failed += filter(None, pool.map(lambda run: run_arm(*run, out), ready))
        todo = [run for run in todo if run not in ready]
    return failed


# ---- what an arm gave ----


def values_of(arm: str, seed: int, out: Path) -> dict:
    """{"steps": [...], key: [...]}, with one value for each evaluation."""
    folder = folder_of(arm, seed, out)
    table = folder / "table.json"
    return values_of_table(table) if table.exists() else values_of_log(folder / "log.jsonl")


def values_of_table(path: Path) -> dict:
    """Of an evaluation, or of refinement's table, whose steps are the numbers of pictures drawn."""
    values = {}
    for key, cell in read_json(path)["table"].items():
        pairs = cell if isinstance(cell[0], list) else [cell]
        values[key] = [mean for mean, _ in pairs]
    longest = max(map(len, values.values()))
    return {"steps": list(range(1, 1 + longest))} | values


def values_of_log(path: Path) -> dict:
    """Of a run: each planned evaluation, and the mean of each logged number over the five steps
    before it (at the start, over the first five). A run that was stopped has others."""
    head, rows = read_log(path)
    end = head["config"]["steps"]
    planned = {*range(0, end, head["config"]["eval_every"]), end}
    evaluations = [row for row in rows if row.get("eval") and row["step"] in planned]
    steps = [row for row in rows if "loss" in row]
    values = {"steps": [row["step"] for row in evaluations]}
    for key in evaluations[0]["eval"]:
        values[key] = [row["eval"][key][0] for row in evaluations]
    near = []
    for at in values["steps"]:
        near.append([row for row in steps if at - 5 <= row["step"] < at] or steps[:5])
    everywhere = set.intersection(*map(set, steps)) if steps else set()
    for key in everywhere - values.keys():
        if isinstance(steps[0][key], int | float):
            values[key] = [float(np.mean([row[key] for row in some])) for some in near]
    for key in [key.removesuffix("/0") for key in values if key.endswith("/0")]:
        values[f"{key}/uneven"] = unevenness(values, key)
    return values


def unevenness(values: dict, key: str) -> list[float]:
    """The spread of key/0, key/1, ... (one for each noisy step) over their mean, per evaluation."""
    by_step = np.array([values[k] for k in values if k.rpartition("/")[0] == key])   # (W, looks)
    return (by_step.std(0) / np.maximum(by_step.mean(0), 1e-12)).tolist()


# ---- comparing arms ----


@dataclass(frozen=True)
class Comparison:
    """`key_a` of arm a compared with `key_b` of arm b."""

    a: str
    sign: str                                   # ">": is more; "~": loses nothing
    b: str
    key_a: str
    key_b: str
    by: str                                     # compared when this key is equal; "": at the end

    def __str__(self):
        if self.key_a != self.key_b:
            return f"{self.key_a} {self.sign} {self.key_b}"
        level = f" at equal {self.by}" if self.by else ""
        return f"{self.a} {self.sign} {self.b} in {self.key_a}{level}"


def parse_comparison(text: str) -> Comparison:
    """Read "a > b : key", "a > b : key at by", or "a > a : key - other", two keys of one arm."""
    arms, keys = text.split(" : ")
    keys, _, by = keys.partition(" at ")
    key_a, _, key_b = keys.partition(" - ")
    return Comparison(*arms.split(), key_a, key_b or key_a, by)


def values_when_equal(one: dict, other: dict, key: str, by: str) -> tuple[float, float]:
    """`key` of two runs when each first reaches, in `by`, what both reach.

    Straight lines between evaluations. So a run that learned less does not look more careful.
    """
    level = min(max(one[by]), max(other[by]))

    def when_reached(run: dict) -> float:
        place = next(i for i, x in enumerate(run[by]) if x >= level)
        line = slice(max(place - 1, 0), place + 1)
        return float(np.interp(level, run[by][line], run[key][line]))

    return when_reached(one), when_reached(other)


def compare(values: dict[str, list[dict]], text: str) -> dict:
    """The difference of a comparison, paired by seed, its standard error, and the verdict.

    values: arm -> what `values_of` gives for each seed.
    """
    c, differences = parse_comparison(text), []
    for one, other in zip(values[c.a], values[c.b]):
        a, b = one[c.key_a][-1], other[c.key_b][-1]
        if c.by:
            a, b = values_when_equal(one, other, c.key_a, c.by)
        differences.append(a - b)
    mean, error = mean_and_error(differences)   # one seed has no error, and no verdict
    bound, verdict = 0.0 if c.sign == ">" else -MARGIN, OPEN
    if mean - 2 * error > bound:
        verdict = HOLDS
    elif mean + 2 * error < bound:
        verdict = FAILS
    return {"comparison": text, "difference": round(mean, 4),
            "error": None if math.isnan(error) else round(error, 4), "verdict": verdict}


def verdict_of(comparisons: list[dict]) -> str:
    verdicts = {comparison["verdict"] for comparison in comparisons}
    if FAILS in verdicts:
        return FAILS
    return OPEN if OPEN in verdicts else HOLDS


def result_of(name: str, seeds: int, out: Path) -> dict:
    """What a claim's arms gave and the verdict, as docs/claims keeps it."""
    claim, values, arms = CLAIMS[name], {}, {}
    for arm in claim.arms:
        values[arm] = [values_of(arm, seed, out) for seed in range(seeds)]
    for arm, runs in values.items():
        first, rounded = first_step(arm, values), {}
        for key in claim.measures:
            if key in runs[0]:
                rounded[key] = [[float(f"{x:.4g}") for x in run[key]] for run in runs]
        steps = [first + step for step in runs[0]["steps"]]
        arms[arm] = {"command": command_of(arm), "steps": steps, "values": rounded}
    comparisons = [compare(values, text) for text in claim.compares]
    return {"claim": name, "paper": claim.paper, "says": claim.says, "seeds": seeds, "arms": arms,
            "comparisons": comparisons, "verdict": verdict_of(comparisons)}


def command_of(arm: str) -> str:
    """What makes an arm of the first seed, as a command line."""
    lines = commands(arm, 0, Path("out/claims"))
    return " && ".join(" ".join(["python", *line]) for line in lines)


def first_step(arm: str, values: dict[str, list[dict]]) -> int:
    """The steps that an arm's starting policy was trained for, if that is an arm of the claim."""
    if "--policy" not in flags_of(arm):
        return 0
    return sum(values[parent][0]["steps"][-1] for parent in parents_of(arm) if parent in values)


# ---- the page ----


def page() -> str:
    """docs/claims.md from the kept results."""
    rows, sections = [], []
    for name, claim in CLAIMS.items():
        path, verdict = DOCS / "claims" / f"{name}.json", "not run"
        if path.exists():
            result = read_json(path)
            verdict = result["verdict"]
            sections += ["", *section(result)]
        rows.append([f"[{name}](#{name}): {claim.says}", claim.paper, verdict])
    lines = [PREAMBLE, *markdown_table(["claim", "paper", "verdict"], rows), *sections]
    return "\n".join(lines) + "\n"


def section(result: dict) -> list[str]:
    """The lines of one claim: comparisons, measures, commands, and its figure."""
    name, arms = result["claim"], result["arms"]
    verdict = f"**{result['verdict'].capitalize()}**, {result['seeds']} seeds."
    lines = [f"## {name}", "", f"{result['paper']}: {result['says']} {verdict}"]
    if CLAIMS[name].reading:
        lines.append(CLAIMS[name].reading)
    comparisons = []
    for each in result["comparisons"]:
        comparison = str(parse_comparison(each["comparison"]))
        comparisons.append([comparison, print_difference(each), each["verdict"]])
    lines += ["", *markdown_table(["comparison", "difference", "verdict"], comparisons)]
    measures = []
    for key in measures_of(result):
        measures.append([key, *(print_seeds(arm["values"].get(key)) for arm in arms.values())])
    lines += ["", *markdown_table(["measure", *arms], measures)]
    made = [[arm, f"`{each['command']}`"] for arm, each in arms.items()]
    for parent in dict.fromkeys(parent for arm in arms for parent in parents_of(arm)):
        if parent not in arms:
            made.append([f"{parent}, started from", f"`{command_of(parent)}`"])
    lines += ["", *markdown_table(["arm", "command"], made)]
    return lines + ["", f"![{name}](claims/{name}.png)"]


def measures_of(result: dict) -> list[str]:
    """The keys that any arm holds, in order."""
    return list(dict.fromkeys(key for arm in result["arms"].values() for key in arm["values"]))


def print_difference(comparison: dict) -> str:
    error = comparison["error"]
    return f"{comparison['difference']:+.3f} ± {'?' if error is None else format(error, '.3f')}"


def print_seeds(runs: list[list[float]] | None) -> str:
    """The mean of the last values over seeds, and each of them; three digits."""
    if runs is None:
        return "-"
    last = [run[-1] for run in runs]
    return f"{np.mean(last):.3g} ({', '.join(f'{x:.3g}' for x in last)})"


def save_claim_figure(result: dict, out: Path) -> None:
    """A PNG with a panel per measure: each arm over steps, the mean over seeds as a line, each seed
    as a dot. An arm that is known only at the end is a dot, the base a level."""
    arms, keys = result["arms"], measures_of(result)
    panels = {key: [(arm, each, key) for arm, each in arms.items()] for key in keys}
    if len(arms) == 1:                          # then its measures are compared
        panels = {arm: [(key, each, key) for key in keys] for arm, each in arms.items()}
    columns = min(len(panels), 4)
    lines = math.ceil(len(panels) / columns)
    figure, axes = pyplot().subplots(lines, columns, figsize=(3.6 * columns, 3.2 * lines),
                                     layout="constrained", squeeze=False)
    end = max(step for arm in arms.values() for step in arm["steps"])
    for axis, (title, series) in zip(axes.flat, panels.items()):
        axis.set_title(title, fontsize=8)
        axis.set_xlabel("pictures drawn" if len(arms) == 1 else "step")
        for n, (label, arm, key) in enumerate(series):
            if key in arm["values"]:
                plot_series(axis, arm["steps"], np.array(arm["values"][key]), end + 2 * n,
                            color=f"C{n}", label=label)
    for axis in axes.flat[len(panels):]:
        axis.set_axis_off()
    axes[0][0].legend(frameon=False, fontsize=8)
    save_figure(figure, out, dpi=90)


def plot_series(axis, steps: list[int], values: np.ndarray, end: int, **style) -> None:
    """values (seeds, evaluations) over steps; a level for the base, dots at `end` for one value."""
    if steps == [0]:
        axis.axhline(values.mean(), linestyle="--", linewidth=1, **style)
        return
    at = steps if len(steps) > 1 else [end]
    axis.plot(at, values.mean(0), marker="_", markersize=12, **style)
    axis.plot(at, values.T, ".", color=style["color"], alpha=0.5)


# ---- the command line ----


def run_claims(names: list[str], seeds: int, jobs: int, out: Path) -> str:
    """Run what is missing, keep results and figures, write the page; returns what to print.

    Errors: ValueError for an unknown name, and for kept results of more seeds.
    """
    if unknown := [name for name in names if name not in CLAIMS]:
        raise ValueError(f"no claim is called {', '.join(unknown)}; "
                         f"the claims are {', '.join(CLAIMS)}")
    names, out, kept = names or list(CLAIMS), out.resolve(), DOCS / "claims"    # runs start in ROOT
    for name in names:
        more = read_json(kept / f"{name}.json", {"seeds": 0})["seeds"]
        if more > seeds:
            raise ValueError(f"{kept / name}.json holds {more} seeds; give --seeds {more} or more, "
                             "or delete it")
    out.mkdir(parents=True, exist_ok=True)
    kept.mkdir(parents=True, exist_ok=True)
    owner = Owner(out)                          # two calls would remove each other's runs
    failed, lines = run_missing(names, seeds, out, jobs), []
    for name in names:
        if not all(is_done(arm, seed, out) for arm in CLAIMS[name].arms for seed in range(seeds)):
            lines.append(f"{name}: not all arms are there")
            continue
        result = result_of(name, seeds, out)
        write_atomic(kept / f"{name}.json", json.dumps(result, indent=1).encode())
        save_claim_figure(result, kept / f"{name}.png")
        lines += section(result)
    owner.close()
    write_atomic(DOCS / "claims.md", page().encode())
    return "\n".join([*lines, *(f"failed: {why}" for why in failed)])


def list_claims() -> str:
    lines = []
    for name, claim in CLAIMS.items():
        lines.append(f"{name:<22} {claim.paper}: {claim.says} ({', '.join(claim.arms)})")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.claims", description="The papers' claims, tested on the toy.")
    count = number(int, least=1)
    ap.add_argument("names", nargs="*", help="claims to test, by name; all without one")
    ap.add_argument("--list", action="store_true", help="print the claims, run nothing")
    ap.add_argument("--seeds", type=count, default=3, help="seeds of each arm")
    ap.add_argument("--jobs", type=count, default=2, help="runs at the same time, a thread each")
    ap.add_argument("--out", type=Path, default=Path("out/claims"), help="the folder of the arms")
    a = ap.parse_args(argv)
    with one_line("studies.claims"):
        if a.list:
            print(list_claims())
        else:
            print(run_claims(a.names, a.seeds, a.jobs, a.out))


if __name__ == "__main__":
    main()
