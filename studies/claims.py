"""What the papers claim, put to the test on the toy: arms, three seeds each, a verdict by one rule.

    python -m studies.claims --list                             # the table of claims and their arms
    python -m studies.claims ins-teaches-space --seeds 3        # runs what is missing, then the table, the figure and the page

An arm is a run of train.py (or a merge, or an evaluation of an arm's policy) under out/claims/NAME-SEED; arms are shared by claims, and a
stopped call goes on where it was. Results are kept as JSON in docs/claims/, from which docs/claims.md is written.

The rule: a comparison `a > b` holds where the difference, paired by seed, is above two standard errors over the seeds, and fails where it
is below minus two; `a ~ b` (a loses nothing) holds where the difference less two errors is above -MARGIN, and fails where it plus two is
below. A claim holds where all its comparisons hold, does not hold where one fails, else it cannot be told at this size.
"""

import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.disk import write_atomic
from support.plots import save_figure
from support.run import read_log
from support.terminal import Arguments, one_line, say
from toy.shapes import TAGS

ROOT = Path(__file__).parent.parent
KEPT, PAGE = ROOT / "docs" / "claims", ROOT / "docs" / "claims.md"
MARGIN = 0.05                                                   # of truth, which "loses nothing" may lose
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot tell at this size"

PREAMBLE = f"""# Claims in miniature

What the papers say, run again on the toy: `python -m studies.claims NAME --seeds 3 --threads 1 --jobs 2`. The arms are shorter than the
recipes' runs. Nothing is tuned per arm; the recipes were tuned as they are.

**The rule.** `a > b in x` is the difference of x between two arms, paired by seed, ± its standard error over seeds. It holds above two
errors and fails below minus two. `a ~ b` says that a loses nothing: it holds where a loses less than {MARGIN}, errors included. A claim
holds where all its comparisons hold, does not hold where one fails, else it cannot be told at this size. Three seeds are few: where there
is no difference, a comparison still holds in 9% of cases and fails in 9%. The errors leave out the held-out prompts, which are the same for
all seeds, as is the base.

**What is measured** is held-out truth of a task (`draw`, `think`, `ask` and so on), or what the key says in
[the log](results.md#the-numbers-in-logjsonl), as the mean of five steps, at the end; behind it stand the seeds. `x at equal y` compares x
where both arms first reach the same y; `uneven` is the spread of a value over the noisy steps, over its mean.
"""

# Flags that several arms share. Arms are shorter than the recipes' runs.
DRAW = "--recipe lvrpo --think 0 --ask 0 --edit 0 --accuracy 0"
ASK = "--recipe lvrpo --draw 0 --think 0 --edit 0 --sem 0 --ins 0 --kn 0 --steps 60 --epochs 4"
UNI = "--recipe unigrpo --steps 60"
LONG = "--recipe unigrpo --draw 32 --think 0 --steps 150 --eval_every 50"
ALPHA = "--recipe alphagrpo --steps 60"
REFLECT = "--recipe alphagrpo_reflect --steps 60"
CORL = "--recipe corl --eval_every 50"

# {other} is the policy of another arm with the same seed. A line that starts with "merge" is support.merge's, with "eval"
# eval.py's, with "refine" studies.refinement's.
ARMS = {
    "base": "--recipe lvrpo --steps 0",
    "full": "--recipe lvrpo --steps 50",
    "generation-only": f"{DRAW} --steps 50 --kn 0",
    "draw-all": f"{DRAW} --steps 50",
    "draw-no-ins": f"{DRAW} --steps 50 --ins 0",
    "draw-each": f"{DRAW} --steps 50 --normalise each",
    "sem-frozen": f"{DRAW} --steps 200 --eval_every 50 --kn 0 --ins 0",
    "sem-trained": f"{DRAW} --steps 200 --eval_every 50 --kn 0 --ins 0 --train_referee 1e-4",
    "dapo": f"{ASK} --text_average token",
    "gspo": f"{ASK} --text_average sequence --text_ratio sequence",
    "grpo": f"{ASK} --text_average sequence",
    "dr-grpo": f"{ASK} --text_average constant --advantage none",
    "joint": UNI,
    "text-only": f"{UNI} --image_weight 0",
    "flow-only": f"{UNI} --text_weight 0",
    "velocity": LONG,
    "no-penalty": f"{LONG} --mse_weight 0",
    "latent-kl": f"{LONG} --mse_weight 0 --image_beta 0.003",
    "ratio-norm-off": f"{UNI} --no-ratio_norm",
    "guided": f"{UNI} --guidance 2",
    "plain-then-guided": "eval {joint} --guidance 2",
    "guided-then-guided": "eval {guided} --guidance 2",
    "dv-soft": ALPHA,
    "dv-binary": f"{ALPHA} --dv_by binary",
    "holistic": f"{ALPHA} --dv_by holistic",
    "rectify-group": REFLECT,
    "rectify-initial": f"{REFLECT} --rectify initial",
    "rectify-off": f"{REFLECT} --rectify off",
    "refined": "refine {rectify-group}",
    "unified": f"{CORL} --steps 50",
    "unified-longer": f"{CORL} --steps 100",
    "pair-sum": f"{CORL} --steps 50 --pair sum",
    "pair-none": f"{CORL} --steps 50 --pair none",
    "alternating": f"{CORL} --steps 100 --alternate",
    "corl-image": f"{CORL} --steps 50 --pair_text 0",
    "corl-text": f"{CORL} --steps 50 --pair_image 0",
    "merged": "merge {corl-image} {corl-text} --base toy/policy",
    "cycle": f"{CORL} --steps 50 --pair_text 0 --tim 0",
    "tim": f"{CORL} --steps 50 --pair_text 0 --recaption 0 --likeness 0",
    "refined-image": "--recipe corl_t2i --steps 50 --eval_every 50 --policy {unified}",
    "refined-choose": "--recipe corl_mc --steps 50 --eval_every 50 --policy {unified}",
    "refined-merged": "merge {refined-image} {refined-choose} --base {unified}",
    "image-alone": "--recipe corl_t2i --steps 100 --eval_every 50",
}


@dataclass(frozen=True)
class Claim:
    """One row of CLAIMS."""

    paper: str
    says: str                                                   # in a sentence
    arms: tuple[str, ...]
    measures: tuple[str, ...]                                   # keys of an evaluation, or of the log (mean of 5 steps)
    compares: tuple[str, ...]                                   # "a > b : key", "a ~ b : key"; "key at other": see at_equal
    reading: str = ""                                           # what the measures show beside the verdict
    pictured: bool = False                                      # whether its figure shows what the arms draw at last


CLAIMS = {
    "frozen-referee": Claim(
        "LVRPO", "A referee that learns beside the policy is fooled; a frozen one is needed.", ("sem-frozen", "sem-trained"),
        ("draw", "draw/rewards/sem/mean", "layout_entropy", "pairwise_distance", "draw/saturation", "draw/roughness"),
        ("sem-frozen > sem-trained : draw", "sem-trained > sem-frozen : draw/rewards/sem/mean"),
        "With either referee mean truth stops rising after 100 steps while layouts become alike; with the one that learns, it falls in one "
        "seed of three. It learns by SigLIP's own contrastive loss, so its cosines have a level of their own.", pictured=True),
    "full-rewards": Claim(
        "LVRPO", "Rewards of drawings alone cost understanding, the full set helps it.", ("base", "generation-only", "draw-all", "full"),
        ("ask", "choose", "captions", "draw"),
        ("base > generation-only : ask", "base > generation-only : choose", "draw-all > generation-only : ask", "full > base : ask",
         "full > base : choose", "full > base : captions"),
        "generation-only draws for r_sem and r_ins; draw-all adds r_kn; full also answers, thinks and edits, for all rewards. Drawing "
        "alone costs a few answers of a thousand; of understanding, full gains in open questions, which it trains, and in nothing else."),
    "ins-teaches-space": Claim(
        "LVRPO", "Gains in space come from r_ins.", ("base", "draw-no-ins", "draw-all"), ("draw/position", "draw"),
        ("draw-all > draw-no-ins : draw/position",),
        "Position rises as much without r_ins, from r_sem and r_kn together."),
    "summed-follows-noise": Claim(
        "counter-test of LVRPO", "Under a summed reward the advantage follows the part that varies most; normalising each is better.",
        ("draw-all", "draw-each"),
        ("draw", *(f"draw/{tag}" for tag in TAGS), *(f"draw/advantage_share/{name}" for name in ("sem", "ins", "kn"))),
        ("draw-all > draw-each : draw/advantage_share/kn", "draw-each > draw-all : draw"),
        "The sum does follow r_kn, which varies most, but r_kn is no noise here: truth comes out the same."),
    "text-losses": Claim(
        "DAPO, GSPO, Dr. GRPO", "Token averages (DAPO), sequence ratios (GSPO) and no std (Dr. GRPO) beat GRPO's text loss.",
        ("grpo", "dapo", "gspo", "dr-grpo"), ("ask",), ("dapo > grpo : ask", "gspo > grpo : ask", "dr-grpo > grpo : ask"),
        "Answers have a few tokens, so the ways to average over tokens hardly differ; the base answers 0.701."),
    "joint-beats-one": Claim(
        "UniGRPO", "Training thought and picture together beats each alone.", ("base", "text-only", "flow-only", "joint"),
        ("think", "draw"), ("joint > text-only : think", "joint > flow-only : think")),
    "velocity-penalty": Claim(
        "UniGRPO", "The velocity penalty holds variety where nothing or a latent KL does not.", ("velocity", "no-penalty", "latent-kl"),
        ("draw", "draw/reward", "layout_entropy", "pairwise_distance", "draw/saturation", "draw/roughness"),
        tuple(f"velocity > {other} : {key} at draw/reward" for key in ("layout_entropy", "draw") for other in ("no-penalty", "latent-kl")),
        "Without a penalty layouts become alike and pixels rougher; between the latent KL, at lvrpo's weight, and the velocity penalty no "
        "difference can be told. UniGRPO's own ablation is about a hacked preference model; r_ins cannot be hacked that way, since the "
        "truth uses the same rules.", pictured=True),
    "ratio-norm": Claim(
        "UniGRPO, GRPO-Guard", "RatioNorm evens the ratio's spread over the noisy steps.", ("joint", "ratio-norm-off"),
        ("think", *(f"think/image/{name}/{n}" for name in ("ratio/step_mean", "ratio/step_std", "clip_ratio/step_mean") for n in range(3)),
         "think/image/ratio/step_std/uneven"),
        ("ratio-norm-off > joint : think/image/ratio/step_std/uneven",),
        "With RatioNorm the last noisy step, whose ratios vary most, is clipped less. Truth is higher, by less than two errors."),
    "decomposed": Claim(
        "AlphaGRPO", "Decomposed questions beat one holistic question.", ("base", "holistic", "dv-soft"),
        ("think", "draw", "think/rewards/dvreward/mean"), ("dv-soft > holistic : think",),
        "The judge's one holistic answer more than doubles while truth stays where it was: the policy games it. The decomposed reward also "
        "asks two questions about quality."),
    "soft-answers": Claim(
        "AlphaGRPO", "Soft answers to the questions beat binary ones.", ("base", "dv-binary", "dv-soft"),
        ("think", "draw", "think/rewards/dvreward/mean", "think/frac_reward_zero_std"), ("dv-soft > dv-binary : think",),
        "The toy's judge is nearly always sure, so that rounding its answers hardly changes the reward."),
    "rectification": Claim(
        "AlphaGRPO", "Rectification helps refinements: by the group's least reward (the paper's), by the first picture's (its code's).",
        ("base", "rectify-off", "rectify-group", "rectify-initial"), ("reflect", "reflect/repaired", "reflect/spoiled"),
        ("rectify-group > rectify-off : reflect", "rectify-initial > rectify-off : reflect"),
        "Both ways repair more wrong pictures than none; the first picture's reward also spoils the most right ones."),
    "edits-for-free": Claim(
        "AlphaGRPO", "Edits improve without edit training.", ("base", "dv-soft", "rectify-group", "draw-all"),
        ("edit", "edit/changed", "edit/kept"), ("dv-soft > base : edit", "rectify-group > base : edit"),
        "Under AlphaGRPO's recipes what should stay is kept less often. Under LVRPO's rewards of drawings (draw-all) edits do improve "
        "untrained."),
    "refine-beats-best": Claim(
        "AlphaGRPO", "Refinement at inference beats the best of as many new pictures.", ("refined",),
        ("refine, always", "refine, judge", "best, judge", "refine, oracle", "best, oracle"),
        ("refined > refined : refine, judge - best, judge",),
        "The table is at four pictures. Refinement leads at two; with an oracle to choose, new pictures are the better buy."),
    "shared-advantage": Claim(
        "counter-test of CoRL", "A shared advantage injects the other modality's noise.", ("unified", "pair-sum", "pair-none"),
        ("draw", "choose", *(f"pair_image/advantage_share/{name}" for name in ("pair_text.accuracy", "pair_text.format",
                                                                              "pair_image.recaption"))),
        ("pair-none > unified : draw", "pair-none > unified : choose"),
        "More than half of a pair's advantage is its answer's; drawing pays for that, answering does not."),
    "unified-beats-apart": Claim(
        "CoRL", "Unified training beats alternating, separate, and separate then merged.",
        ("unified", "alternating", "corl-image", "corl-text", "merged"), ("draw", "choose"),
        ("unified > alternating : draw", "unified > corl-image : draw", "unified > corl-text : choose", "unified > merged : draw",
         "unified > merged : choose"),
        "In drawing, the shared advantage explains the gap to drawing alone: without it, unified training (pair-none in shared-advantage) "
        "draws as well. alternating takes two updates for the rows of one, so that its averaged weights lag less behind."),
    "cycle-and-tim": Claim(
        "CoRL", "Cycle and token matching add up.", ("base", "cycle", "tim", "corl-image"),
        ("draw", *(f"pair_image/rewards/{name}/mean" for name in ("recaption", "likeness", "tim")), "pair_image/advantage_share/tim"),
        ("cycle > base : draw", "tim > base : draw", "corl-image > cycle : draw", "corl-image > tim : draw"),
        "Alone, token matching rises while truth falls to a third of the base's: it is gamed. Beside the cycle it has a small share of the "
        "advantage, and spoils a little."),
    "two-stages": Claim(
        "CoRL", "Unified, then refined beats one stage.",
        ("unified", "unified-longer", "image-alone", "refined-image", "refined-merged"), ("draw", "choose"),
        ("refined-image > unified-longer : draw", "refined-image > image-alone : draw", "refined-merged > unified-longer : draw",
         "refined-merged > unified-longer : choose"),
        "The second stage adds to the first, but one stage of as many steps (unified-longer, image-alone) draws no worse. "
        "refined-merged is made from 50 steps of multiple choice besides."),
    "no-guidance": Claim(
        "UniGRPO", "Training without guidance loses nothing under guidance.", ("plain-then-guided", "guided-then-guided"),
        ("think", "draw"), ("plain-then-guided ~ guided-then-guided : think", "plain-then-guided ~ guided-then-guided : draw")),
}
NOT_RUN = {"scale": ("LVRPO", "Larger policies learn faster (1.3B, 7B, 13B).", "the toy has weights of one width")}


# ---- running arms ----


def folder_of(arm: str, seed: int, out: Path) -> Path:
    return out / f"{arm}-{seed}"


def needs_of(arm: str) -> list[str]:
    """The arms whose policies an arm starts from."""
    return [part.strip("{}") for part in ARMS[arm].split() if part.startswith("{")]


def meaning(arm: str) -> str:
    """An arm's flags, with those of the arms that it starts from in place of their names."""
    return " ".join(f"{{{meaning(part.strip('{}'))}}}" if part.startswith("{") else part for part in ARMS[arm].split())


def says_so(path: Path, arm: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == meaning(arm)


def finished(arm: str, seed: int, out: Path) -> bool:
    """Whether an arm was run to its end, by the flags that it and its parents have."""
    return says_so(folder_of(arm, seed, out) / "done.txt", arm)


def commands(arm: str, seed: int, out: Path) -> list[list[str]]:
    """What makes an arm, one process after another; a run that was begun with the same flags goes on."""
    folder, flags = folder_of(arm, seed, out), [
        str(folder_of(part.strip("{}"), seed, out) / "policy") if part.startswith("{") else part for part in ARMS[arm].split()]
    table = ["--out", str(folder / "table.json")]
    if flags[0] in ("eval", "refine"):
        return [[*(["-m", "studies.refinement"] if flags[0] == "refine" else ["eval.py"]), "--policy", *flags[1:], *table]]
    if flags[0] == "merge":
        return [["-m", "support.merge", *flags[1:], "--out", str(folder / "policy")], ["eval.py", "--policy", str(folder / "policy"), *table]]
    stopped = any((folder / name).exists() for name in ("checkpoint.safetensors", "checkpoint"))
    go_on = ["--resume"] if stopped and says_so(folder / "begun.txt", arm) else []
    look = [] if "--eval_every" in flags else ["--eval_every", "25"]
    return [["train.py", *flags, *look, "--save_every", "25", "--seed", str(seed), "--out", str(folder), *go_on]]


def run_arm(arm: str, seed: int, out: Path, threads: int) -> str:
    """Make an arm; returns "" or, in one line, why it died."""
    folder = folder_of(arm, seed, out)
    folder.mkdir(parents=True, exist_ok=True)
    began, env = time.monotonic(), dict(os.environ, OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="passive")
    todo = commands(arm, seed, out)
    write_atomic(folder / "begun.txt", meaning(arm).encode())
    for command in todo:
        with open(folder / "output.txt", "a", encoding="utf-8") as told:
            code = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, stdout=told, stderr=told).returncode
        if code:
            last = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing was said"]
            return f"{arm}, seed {seed}: {last[-1][:200]} (exit {code}); see {folder / 'output.txt'}"
    write_atomic(folder / "minutes.txt", f"{(time.monotonic() - began) / 60:.1f}".encode())           # of what has no log
    write_atomic(folder / "done.txt", meaning(arm).encode())
    return ""


def run_missing(names: list[str], seeds: int, out: Path, threads: int, jobs: int) -> list[str]:
    """Run the arms of the claims that are not there, those first that others start from; returns what died."""
    wanted = dict.fromkeys(arm for name in names for arm in CLAIMS[name].arms)
    while more := {need for arm in wanted for need in needs_of(arm)} - wanted.keys():
        wanted = dict.fromkeys([*sorted(more), *wanted])
    todo, died = [(arm, seed) for seed in range(seeds) for arm in wanted if not finished(arm, seed, out)], []
    if todo:
        say(f"{len(todo)} runs of 1 to 15 minutes are missing, {jobs} at a time; a stopped call goes on where it was")
    while todo:
        ready = [(arm, seed) for arm, seed in todo if all(finished(need, seed, out) for need in needs_of(arm))]
        if not ready:
            return died + [f"{arm}, seed {seed}: waits for what died" for arm, seed in todo]
        with ThreadPoolExecutor(jobs) as pool:
            died += [why for why in pool.map(lambda pair: run_arm(*pair, out, threads), ready) if why]
        todo = [pair for pair in todo if pair not in ready]
    return died


# ---- what came out ----


def values_of(arm: str, seed: int, out: Path) -> dict:
    """An arm's values: {"minutes": ., "steps": [...], key: one per evaluation}, of the evaluations and of the five steps of the log
    before each (at the start, the first five); ValueError for a damaged result."""
    folder = folder_of(arm, seed, out)
    try:
        if (folder / "table.json").exists():
            table = json.loads((folder / "table.json").read_text(encoding="utf-8"))["table"]
            over = {k: [mean for mean, _ in v] for k, v in table.items() if isinstance(v[0], list)}           # pictures drawn, of refine
            pictures = list(range(1, 1 + len(next(iter(over.values()), [0]))))
            minutes = float((folder / "minutes.txt").read_text(encoding="utf-8"))
            return {"minutes": minutes, "steps": pictures} | (over or {k: [v[0]] for k, v in table.items()})
        _, rows = read_log(folder / "log.jsonl")
        looks = [row for row in rows if row.get("eval")]
        held = {"minutes": rows[-1]["seconds"] / 60, "steps": [row["step"] for row in looks]}
        held |= {k: [row["eval"][k][0] for row in looks] for k in looks[0]["eval"]}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{folder} is damaged ({type(error).__name__}: {error}); delete it, and it is run again") from error
    steps = [row for row in rows if "loss" in row]
    near = [[row for row in steps if at - 5 <= row["step"] < at] or steps[:5] for at in held["steps"]]        # steps count from 0
    everywhere = set(steps[0]).intersection(*steps) if steps else set()
    logged = [k for k in everywhere if k not in held and isinstance(steps[0][k], (int, float))]
    held |= {k: [float(np.mean([row[k] for row in some])) for some in near] for k in logged}
    return held | {f"{k}/uneven": uneven(held, k) for k in [k.removesuffix("/0") for k in logged if k.endswith("/0")]}


def at_common_steps(runs: list[dict]) -> list[dict]:
    """The runs of one arm without the evaluations that not all of them have: a run that was stopped has one where it stopped."""
    common = set(runs[0]["steps"]).intersection(*(run["steps"] for run in runs))
    kept = [[i for i, step in enumerate(run["steps"]) if step in common] for run in runs]
    return [{k: v if k == "minutes" else [v[i] for i in places] for k, v in run.items()} for run, places in zip(runs, kept)]


def uneven(held: dict, key: str) -> list[float]:
    """How much a value differs from one noisy step to the next, per evaluation: the spread of key/0, key/1, ... over their mean."""
    each = np.array([held[k] for k in held if k.rpartition("/")[0] == key])                                    # (noisy steps, evaluations)
    return (each.std(0) / np.maximum(each.mean(0), 1e-12)).tolist()


def at_equal(one: dict, other: dict, key: str, by: str) -> tuple[float, float]:
    """`key` of two runs where each first reaches, in `by`, what both reach; straight lines between evaluations. So a run that learned less
    does not look more careful."""
    level = min(max(one[by]), max(other[by]))

    def reached(run: dict) -> float:
        place = next(i for i, x in enumerate(run[by]) if x >= level)
        before = max(place - 1, 0)
        span = run[by][place] - run[by][before]
        share = (level - run[by][before]) / span if span else 1.0
        return run[key][before] + share * (run[key][place] - run[key][before])

    return reached(one), reached(other)


def parts_of(comparison: str) -> tuple[str, str, str, str, str, str]:
    """(a, sign, b, key of a, key of b, by) of "a > b : key", of "a > b : key - other" (two keys of one arm, or one key of two), and of
    "a > b : key at by", where by is the key at whose equal value they are compared, else ""."""
    pair, key = (part.strip() for part in comparison.split(" : "))
    key, _, by = key.partition(" at ")
    first, _, second = key.partition(" - ")
    return *pair.split(), first, second or first, by


def compared(values: dict[str, list[dict]], comparison: str) -> dict:
    """The difference of a comparison, paired by seed, its standard error, and whether it holds."""
    a, sign, b, first, second, by = parts_of(comparison)
    pairs = [at_equal(one, other, first, by) if by else (one[first][-1], other[second][-1]) for one, other in zip(values[a], values[b])]
    differences = [one - other for one, other in pairs]
    mean = float(np.mean(differences))
    error = float(np.std(differences, ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else float("nan")
    bound = 0.0 if sign == ">" else -MARGIN
    verdict = HOLDS if mean - 2 * error > bound else FAILS if mean + 2 * error < bound else OPEN
    return {"comparison": comparison, "difference": round(mean, 4), "error": round(error, 4) if math.isfinite(error) else None,
            "verdict": verdict}


def verdict_of(comparisons: list[dict]) -> str:
    verdicts = [each["verdict"] for each in comparisons]
    return FAILS if FAILS in verdicts else HOLDS if set(verdicts) == {HOLDS} else OPEN


def command_of(arm: str) -> str:
    """What makes an arm, of the first seed, as it is told."""
    told = " && ".join(" ".join(["python", *command]) for command in commands(arm, 0, Path("out/claims")))
    return told.replace(" --resume", "")


def begun_at(arm: str, values: dict[str, list[dict]]) -> int:
    """The steps that an arm's starting policy was trained for, where it is another arm of the claim."""
    if "--policy" not in ARMS[arm].split():
        return 0
    return sum(values[need][0]["steps"][-1] for need in needs_of(arm) if need in values)


def told_difference(each: dict) -> str:
    return f"{each['difference']:+.3f} ± {'?' if each['error'] is None else format(each['error'], '.3f')}"


def told_comparison(comparison: str) -> str:
    """A comparison as people read it."""
    a, sign, b, first, second, by = parts_of(comparison)
    if first != second:
        return f"{first} {sign} {second}"
    return f"{a} {sign} {b} in {first}" + (f" at equal {by}" if by else "")


def result_of(name: str, seeds: int, out: Path) -> dict:
    """What a claim's arms gave, as it is kept."""
    claim = CLAIMS[name]
    values = {arm: at_common_steps([values_of(arm, seed, out) for seed in range(seeds)]) for arm in claim.arms}
    wanted = [(claim.arms, key) for key in claim.measures]
    for a, _, b, first, second, by in map(parts_of, claim.compares):
        wanted += [((a,), first), ((b,), second), ((a,), by or first), ((b,), by or second)]
    if nowhere := [key for arms, key in wanted if not any(key in values[arm][0] for arm in arms)]:
        raise ValueError(f"{name}: no arm holds {nowhere[0]}; delete the arms' folders in {out}, and they are run again")
    told = {arm: {"command": command_of(arm), "minutes": [round(each["minutes"], 1) for each in runs],
                  "steps": [begun_at(arm, values) + step for step in runs[0]["steps"]],
                  "values": {key: [[float(f"{x:.4g}") for x in each[key]] for each in runs] for key in claim.measures if key in runs[0]}}
            for arm, runs in values.items()}
    comparisons = [compared(values, each) for each in claim.compares]
    return {"claim": name, "paper": claim.paper, "says": claim.says, "seeds": seeds, "arms": told, "comparisons": comparisons,
            "verdict": verdict_of(comparisons)}


def page() -> str:
    """docs/claims.md from the kept results."""
    held = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(KEPT.glob("*.json"))}
    lines = [PREAMBLE, "| claim | paper | verdict |", "|---|---|---|"]
    lines += [f"| [{name}](#{name}): {claim.says} | {claim.paper} | {held[name]['verdict'] if name in held else 'not run'} |"
              for name, claim in CLAIMS.items()]
    lines += [f"| {name}: {says} | {paper} | not run: {why} |" for name, (paper, says, why) in NOT_RUN.items()]
    for name in CLAIMS:
        if name in held:
            lines += ["", *section(held[name])]
    return "\n".join(lines) + "\n"


def short(x: float) -> str:
    """Three decimals, or two digits of what is below a hundredth."""
    return f"{x:.3f}" if abs(x) >= 0.01 or x == 0 else f"{x:.2g}"


def section(result: dict) -> list[str]:
    name, arms = result["claim"], result["arms"]
    keys = list(dict.fromkeys(key for arm in arms.values() for key in arm["values"]))

    def cell(arm: dict, key: str) -> str:
        last = [each[-1] for each in arm["values"].get(key, [])]
        return f"{short(np.mean(last))} ({', '.join(map(short, last))})" if last else "-"

    lines = [f"## {name}", "", f"{result['paper']}: {result['says']} **{result['verdict'].capitalize()}**, {result['seeds']} seeds.",
             *([CLAIMS[name].reading] if CLAIMS[name].reading else []), "",
             "| comparison | difference | verdict |", "|---|---|---|"]
    lines += [f"| {told_comparison(each['comparison'])} | {told_difference(each)} | {each['verdict']} |" for each in result["comparisons"]]
    lines += ["", f"| measure | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    lines += [f"| {key} | {' | '.join(cell(held, key) for held in arms.values())} |" for key in keys]
    lines += ["", "| arm | minutes | command |", "|---|---|---|"]
    lines += [f"| {arm} | {max(held['minutes']):.1f} | `{held['command']}` |" for arm, held in arms.items()]
    others = dict.fromkeys(need for arm in arms for need in needs_of(arm) if need not in arms)
    lines += [f"| {arm}, started from | - | `{command_of(arm)}` |" for arm in others]
    return lines + ["", f"![{name}](claims/{name}.png)"]


def figure(result: dict, out: Path, pictures: dict[str, Path]) -> None:
    """A panel per measure: arms over steps, the mean over seeds as a line, each seed as a dot; what is known at the end alone as dots.
    Below, the pictures that are given, by arm."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    arms = result["arms"]
    keys = list(dict.fromkeys(key for arm in arms.values() for key in arm["values"]))
    panels = {key: [(n, name, arm, key) for n, (name, arm) in enumerate(arms.items()) if key in arm["values"]] for key in keys}
    if len(arms) == 1:                                          # then its measures are what is compared
        panels = {name: [(n, key, arm, key) for n, key in enumerate(keys)] for name, arm in arms.items()}
    end = max(step for arm in arms.values() for step in arm["steps"])
    lines = math.ceil(len(panels) / 5)
    columns, lines = max(math.ceil(len(panels) / lines), len(pictures)), lines + (1 if pictures else 0)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 3.2 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, series) in zip(axes.flat, panels.items()):
        for n, label, arm, key in series:
            each = np.array(arm["values"][key])                                                # (seeds, evaluations)
            if arm["steps"] == [0]:                             # the base
                axis.axhline(each.mean(), color=f"C{n}", label=label, linestyle="--", linewidth=1)
                continue
            trained = len(arm["steps"]) > 1                                                    # else merged, or an evaluation
            at = np.array(arm["steps"] if trained else [end + 2 * n])
            axis.plot(at, each.mean(0), color=f"C{n}", label=label, marker="_", markersize=12)
            axis.plot(np.tile(at, (len(each), 1)).T, each.T, ".", color=f"C{n}", alpha=0.5)
        axis.set_axis_on()
        axis.set_title(title if len(title) < 30 else "/\n".join(title.rsplit("/", 1)), fontsize=10)
        axis.set_xlabel("pictures drawn" if len(arms) == 1 else "step" if end > 1 else "")
        if len(arms) > 1 and end <= 1:                          # no arm is a training
            axis.set_xticks([])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    for axis, (name, path) in zip(axes[-1], pictures.items()):
        axis.imshow(plt.imread(path))
        axis.set_title(f"{name}: drawn at the end", fontsize=9)
    save_figure(figure, out, dpi=90)


def last_pictures(claim: Claim, out: Path) -> dict[str, Path]:
    """What the first seed of each arm drew at last, where the claim's figure shows it."""
    return {arm: sorted((folder_of(arm, 0, out) / "samples").glob("*.png"))[-1] for arm in claim.arms} if claim.pictured else {}


def told(result: dict) -> str:
    """A claim in the README's table: its sentence, and where it does not hold, what its measures show."""
    why = CLAIMS[result["claim"]].reading if result["verdict"] == FAILS else ""
    return f"[{result['paper']}](docs/claims.md#{result['claim']}): {result['says']}" + (f" *{why}*" if why else "")


def summary() -> str:
    """The README's table: a row per verdict with its claims, and those that were not run."""
    held = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(KEPT.glob("*.json"))]
    by_verdict = {verdict: [told(result) for result in held if result["verdict"] == verdict] for verdict in (HOLDS, FAILS, OPEN)}
    ran = {result["claim"] for result in held}
    by_verdict["not run"] = [f"{claim.paper}: {claim.says}" for name, claim in CLAIMS.items() if name not in ran]
    by_verdict["not run"] += [f"{paper}: {says} *{why[0].upper()}{why[1:]}.*" for paper, says, why in NOT_RUN.values()]
    rows = [f"| {verdict} | {'<br>'.join(some)} |" for verdict, some in by_verdict.items() if some]
    return "\n".join(["| verdict | claims |", "|---|---|", *rows])


def listed() -> str:
    """The table of claims and their arms."""
    lines = []
    for name, claim in CLAIMS.items():
        comparisons = "; ".join(map(told_comparison, claim.compares))
        lines.append(f"{name:<22} {claim.paper}: {claim.says}\n{'':<22} arms: {', '.join(claim.arms)}; {comparisons}")
    return "\n".join([*lines, *(f"{name:<22} {paper}: {says} Not run: {why}." for name, (paper, says, why) in NOT_RUN.items())])


def test_claims(names: list[str], seeds: int, threads: int, jobs: int, out: Path, kept: Path = KEPT, write_page: bool = True) -> str:
    """Run what is missing, keep results and figures, write the page; returns what to print. ValueError for an unknown name."""
    if unknown := [name for name in names if name not in CLAIMS]:
        raise ValueError(f"no claim is called {', '.join(unknown)}; the claims are {', '.join(CLAIMS)}")
    for name, number in (("seeds", seeds), ("threads", threads), ("jobs", jobs)):
        if number < 1:
            raise ValueError(f"--{name} {number}: must be at least 1")
    names, out = names or list(CLAIMS), out.resolve()           # the runs start in the repository's folder
    died, told = run_missing(names, seeds, out, threads, jobs), []
    kept.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not all(finished(arm, seed, out) for arm in CLAIMS[name].arms for seed in range(seeds)):
            told.append(f"{name}: not all arms are there")
            continue
        result = result_of(name, seeds, out)
        if (kept / f"{name}.json").exists() and (more := json.loads((kept / f"{name}.json").read_text(encoding="utf-8"))["seeds"]) > seeds:
            raise ValueError(f"{kept / name}.json holds {more} seeds; give --seeds {more} or more, or delete it")
        write_atomic(kept / f"{name}.json", json.dumps(result, indent=1).replace("NaN", "null").encode())
        figure(result, kept / f"{name}.png", last_pictures(CLAIMS[name], out))
        told.append(f"{name}: {result['verdict']}")
        told += [f"  {told_comparison(each['comparison'])}: {told_difference(each)}, {each['verdict']}" for each in result["comparisons"]]
        told += [f"  {CLAIMS[name].reading}"] if CLAIMS[name].reading else []
    if write_page:
        write_atomic(PAGE, page().encode())
    return "\n".join([*told, *(f"died: {why}" for why in died)])


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.claims", description="The papers' claims, tested on the toy.", allow_abbrev=False)
    ap.add_argument("names", nargs="*", help="claims to test, by name; all without one")
    ap.add_argument("--list", action="store_true", help="print the claims, run nothing")
    ap.add_argument("--seeds", type=int, default=3, help="of each arm")
    ap.add_argument("--threads", type=int, default=1, help="of each run")
    ap.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    ap.add_argument("--out", type=Path, default=Path("out/claims"), help="the folder of the arms")
    a = ap.parse_args(argv)
    with one_line("studies.claims"):
        print(listed() if a.list else test_claims(a.names, a.seeds, a.threads, a.jobs, a.out))


if __name__ == "__main__":
    main()
