"""What the papers claim, put to the test on the toy: arms, three seeds each, a verdict by one rule.

    python eval.py claims --list                             # the table of claims and their arms
    python eval.py claims ins-teaches-space --seeds 3        # runs what is missing, then the table, the figure and the page

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

from checkpoint import write_atomic
from run import read_log
from terminal import say

ROOT = Path(__file__).parent
KEPT, PAGE = ROOT / "docs" / "claims", ROOT / "docs" / "claims.md"
MARGIN = 0.05                                                   # of truth, which "loses nothing" may lose
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot tell at this size"

# Flags that several arms share. Arms are shorter than the recipes' runs.
DRAW = "--recipe lvrpo --think 0 --ask 0 --edit 0 --accuracy 0 --steps 50"
ASK = "--recipe lvrpo --draw 0 --think 0 --edit 0 --sem 0 --ins 0 --kn 0 --steps 60 --epochs 4"
UNI = "--recipe unigrpo --steps 60"
LONG = "--recipe unigrpo --draw 32 --think 0 --steps 150 --eval_every 50"
ALPHA = "--recipe alphagrpo --steps 60"
REFLECT = "--recipe alphagrpo_reflect --steps 60"
CORL = "--recipe corl --steps 50 --eval_every 50"

# {other} is the policy of another arm with the same seed. A line that starts with "merge" is checkpoint.py's, with "eval" or "refine"
# eval.py's.
ARMS = {
    "base": "--recipe lvrpo --steps 0",
    "full": "--recipe lvrpo --steps 50",
    "generation-only": f"{DRAW} --kn 0",
    "draw": DRAW,
    "draw-no-ins": f"{DRAW} --ins 0",
    "draw-each": f"{DRAW} --normalise each",
    "sem-frozen": f"{DRAW} --kn 0 --ins 0 --steps 100 --eval_every 100",
    "sem-trained": f"{DRAW} --kn 0 --ins 0 --steps 100 --train_referee 1e-4 --eval_every 100",
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
    "unified": CORL,
    "pair-sum": f"{CORL} --pair sum",
    "pair-none": f"{CORL} --pair none",
    "alternating": f"{CORL} --steps 100 --alternate",
    "corl-image": f"{CORL} --pair_text 0",
    "corl-text": f"{CORL} --pair_image 0",
    "merged": "merge {corl-image} {corl-text} --base toy/policy",
    "cycle": f"{CORL} --tim 0",
    "tim": f"{CORL} --recaption 0 --likeness 0",
    "refined-image": "--recipe corl_t2i --steps 50 --eval_every 50 --policy {unified}",
    "image-alone": "--recipe corl_t2i --steps 50 --eval_every 50",
}


@dataclass(frozen=True)
class Claim:
    """One row of CLAIMS."""

    paper: str
    says: str                                                   # in a sentence
    arms: tuple[str, ...]
    measures: tuple[str, ...]                                   # keys of an evaluation, or of the log (mean of 5 steps)
    compares: tuple[str, ...]                                   # "a > b : key", "a ~ b : key"; "key at other": see at_equal
    pictured: bool = False                                      # whether its figure shows what the arms draw at last


CLAIMS = {
    "frozen-referee": Claim(
        "LVRPO", "A referee that learns beside the policy is fooled; a frozen one is needed.", ("sem-frozen", "sem-trained"),
        ("draw", "draw/rewards/sem/mean", "pairwise_distance"),
        ("sem-frozen > sem-trained : draw", "sem-trained > sem-frozen : draw/rewards/sem/mean"), pictured=True),
    "full-rewards": Claim(
        "LVRPO", "Rewards of drawings alone cost understanding, the full set helps it.", ("base", "generation-only", "full"),
        ("ask", "choose", "captions", "draw"),
        ("base > generation-only : ask", "full > generation-only : ask", "full > generation-only : choose",
         "full > generation-only : captions")),
    "ins-teaches-space": Claim(
        "LVRPO", "Gains in space come from r_ins.", ("base", "draw-no-ins", "draw"), ("draw/position", "draw"),
        ("draw > draw-no-ins : draw/position",)),
    "summed-follows-noise": Claim(
        "counter-test of LVRPO", "Under a summed reward the advantage follows its noisiest part; normalising each is better.",
        ("draw", "draw-each"), ("draw", "draw/position", "draw/advantage_share/sem"), ("draw-each > draw : draw",)),
    "text-losses": Claim(
        "DAPO, GSPO, Dr. GRPO", "Token averages (DAPO), sequence ratios (GSPO) and no std (Dr. GRPO) beat GRPO's text loss.",
        ("grpo", "dapo", "gspo", "dr-grpo"), ("ask",), ("dapo > grpo : ask", "gspo > grpo : ask", "dr-grpo > grpo : ask")),
    "joint-beats-one": Claim(
        "UniGRPO", "Training thought and picture together beats each alone.", ("base", "text-only", "flow-only", "joint"),
        ("think", "draw"), ("joint > text-only : think", "joint > flow-only : think")),
    "velocity-penalty": Claim(
        "UniGRPO", "The velocity penalty holds variety where nothing or a latent KL does not.", ("velocity", "no-penalty", "latent-kl"),
        ("draw", "draw/position", "layout_entropy", "pairwise_distance"),
        ("velocity > no-penalty : layout_entropy at draw", "velocity > latent-kl : layout_entropy at draw"), pictured=True),
    "ratio-norm": Claim(
        "UniGRPO, GRPO-Guard", "RatioNorm evens the ratio's spread and gains truth.", ("joint", "ratio-norm-off"),
        ("think", "think/image/ratio/std", "think/image/clip_ratio/low_mean", "think/image/clip_ratio/high_mean"),
        ("joint > ratio-norm-off : think",)),
    "decomposed": Claim(
        "AlphaGRPO", "Decomposed questions beat one holistic question.", ("base", "holistic", "dv-soft"), ("think", "draw"),
        ("dv-soft > holistic : think",)),
    "soft-answers": Claim(
        "AlphaGRPO", "Soft answers to the questions beat binary ones.", ("base", "dv-binary", "dv-soft"), ("think", "draw"),
        ("dv-soft > dv-binary : think",)),
    "rectification": Claim(
        "AlphaGRPO", "Refinements need rectification.", ("base", "rectify-off", "rectify-group", "rectify-initial"),
        ("reflect", "reflect/repaired", "reflect/spoiled"),
        ("rectify-group > rectify-off : reflect", "rectify-initial > rectify-off : reflect")),
    "edits-for-free": Claim(
        "AlphaGRPO", "Edits improve without edit training.", ("base", "dv-soft", "rectify-group"), ("edit", "edit/kept"),
        ("dv-soft > base : edit", "rectify-group > base : edit")),
    "refine-beats-best": Claim(
        "AlphaGRPO", "Refinement at inference beats the best of as many new pictures.", ("refined",),
        ("refine, always", "refine, judge", "best, judge", "refine, oracle", "best, oracle"),
        ("refined > refined : refine, judge - best, judge",)),
    "shared-advantage": Claim(
        "counter-test of CoRL", "A shared advantage injects the other modality's noise.", ("unified", "pair-sum", "pair-none"),
        ("draw", "choose"), ("pair-none > unified : draw", "pair-none > unified : choose")),
    "unified-beats-apart": Claim(
        "CoRL", "Unified training beats alternating, separate, and separate then merged.",
        ("unified", "alternating", "corl-image", "corl-text", "merged"), ("draw", "choose"),
        ("unified > alternating : draw", "unified > corl-image : draw", "unified > corl-text : choose", "unified > merged : draw",
         "unified > merged : choose")),
    "cycle-and-tim": Claim(
        "CoRL", "Cycle and token matching add up.", ("corl-text", "cycle", "tim", "unified"), ("draw", "choose"),
        ("unified > cycle : draw", "unified > tim : draw", "cycle > corl-text : draw")),
    "two-stages": Claim(
        "CoRL", "Unified, then refined beats one stage.", ("unified", "image-alone", "refined-image"), ("draw",),
        ("refined-image > unified : draw", "refined-image > image-alone : draw")),
    "no-guidance": Claim(
        "UniGRPO", "Training without guidance loses nothing under guidance.", ("plain-then-guided", "guided-then-guided"),
        ("think", "draw"), ("plain-then-guided ~ guided-then-guided : think",)),
}
NOT_RUN = {"scale": ("LVRPO", "Larger policies learn faster (1.3B, 7B, 13B).", "the toy has weights of one width")}


# ---- running arms ----


def folder_of(arm: str, seed: int, out: Path) -> Path:
    return out / f"{arm}-{seed}"


def needs_of(arm: str) -> list[str]:
    """The arms whose policies an arm starts from."""
    return [part.strip("{}") for part in ARMS[arm].split() if part.startswith("{")]


def finished(arm: str, seed: int, out: Path) -> bool:
    """Whether an arm was run to its end, by the command that it has."""
    done = folder_of(arm, seed, out) / "done.txt"
    return done.exists() and done.read_text(encoding="utf-8") == ARMS[arm]


def commands(arm: str, seed: int, out: Path) -> list[list[str]]:
    """What makes an arm, one process after another."""
    folder, flags = folder_of(arm, seed, out), [
        str(folder_of(part.strip("{}"), seed, out) / "policy") if part.startswith("{") else part for part in ARMS[arm].split()]
    table = ["--out", str(folder / "table.json")]
    if flags[0] in ("eval", "refine"):
        return [["eval.py", *(["refine"] if flags[0] == "refine" else []), "--policy", *flags[1:], *table]]
    if flags[0] == "merge":
        return [["checkpoint.py", *flags, "--out", str(folder / "policy")], ["eval.py", "--policy", str(folder / "policy"), *table]]
    go_on = ["--resume"] if any((folder / name).exists() for name in ("checkpoint.safetensors", "checkpoint")) else []
    look = [] if "--eval_every" in flags else ["--eval_every", "25"]
    return [["train.py", *flags, *look, "--save_every", "25", "--seed", str(seed), "--out", str(folder), *go_on]]


def run_arm(arm: str, seed: int, out: Path, threads: int) -> str:
    """Make an arm; returns "" or, in one line, why it died."""
    folder = folder_of(arm, seed, out)
    folder.mkdir(parents=True, exist_ok=True)
    began, env = time.monotonic(), dict(os.environ, OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="passive")
    for command in commands(arm, seed, out):
        with open(folder / "output.txt", "a", encoding="utf-8") as told:
            code = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, stdout=told, stderr=told).returncode
        if code:
            last = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing was said"]
            return f"{arm}, seed {seed}: {last[-1][:200]} (exit {code}); see {folder / 'output.txt'}"
    write_atomic(folder / "minutes.txt", f"{(time.monotonic() - began) / 60:.1f}".encode())           # of what has no log
    write_atomic(folder / "done.txt", ARMS[arm].encode())
    return ""


def run_missing(names: list[str], seeds: int, out: Path, threads: int, jobs: int) -> list[str]:
    """Run the arms of the claims that are not there, those first that others start from; returns what died."""
    wanted = dict.fromkeys(arm for name in names for arm in CLAIMS[name].arms)
    wanted = dict.fromkeys([need for arm in wanted for need in needs_of(arm)] + list(wanted))
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
    near = [[row for row in steps if at - 5 < row["step"] <= at] or steps[:5] for at in held["steps"]]
    everywhere = set(steps[0]).intersection(*steps) if steps else set()
    logged = [k for k in everywhere if k not in held and isinstance(steps[0][k], (int, float))]
    return held | {k: [float(np.mean([row[k] for row in some])) for some in near] for k in logged}


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


def compared(values: dict[str, list[dict]], comparison: str) -> dict:
    """The difference of a comparison, paired by seed, its standard error, and whether it holds."""
    pair, key = (part.strip() for part in comparison.split(" : "))
    a, sign, b = pair.split()
    key, _, by = key.partition(" at ")
    first, _, second = key.partition(" - ")                     # two keys of one arm, or one key of two
    pairs = [at_equal(one, other, key, by) if by else (one[first][-1], other[second or first][-1])
             for one, other in zip(values[a], values[b])]
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


def result_of(name: str, seeds: int, out: Path) -> dict:
    """What a claim's arms gave, as it is kept."""
    claim = CLAIMS[name]
    values = {arm: [values_of(arm, seed, out) for seed in range(seeds)] for arm in claim.arms}
    if nowhere := [key for key in claim.measures if not any(key in runs[0] for runs in values.values())]:
        raise ValueError(f"{name}: no arm holds {nowhere[0]}; delete the arms' folders in {out}, and they are run again")
    told = {arm: {"command": " ".join(["python", *commands(arm, 0, Path("out/claims"))[-1]]).replace(" --resume", ""),
                  "minutes": [round(each["minutes"], 1) for each in runs], "steps": runs[0]["steps"],
                  "values": {key: [[round(x, 4) for x in each[key]] for each in runs] for key in claim.measures if key in runs[0]}}
            for arm, runs in values.items()}
    comparisons = [compared(values, each) for each in claim.compares]
    return {"claim": name, "paper": claim.paper, "says": claim.says, "seeds": seeds, "arms": told, "comparisons": comparisons,
            "verdict": verdict_of(comparisons)}


def page() -> str:
    """docs/claims.md from the kept results."""
    held = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(KEPT.glob("*.json"))}
    lines = ["# Claims in miniature", "",
             "What the papers say, run again on the toy: `python eval.py claims NAME --seeds 3 --threads 1 --jobs 2`. Each difference is",
             "paired by seed, its error is the standard error over seeds. A comparison holds above two errors and fails below minus two; a",
             "claim holds where all its comparisons do, and does not hold where one fails. The arms are shorter than the recipes' runs.",
             "Nothing is tuned per arm. What is measured is held-out truth, or what the key says; `x at y` compares x where both arms",
             "first reach the same y.", "", "| claim | paper | verdict |",
             "|---|---|---|"]
    lines += [f"| [{name}](#{name}): {claim.says} | {claim.paper} | {held[name]['verdict'] if name in held else 'not run'} |"
              for name, claim in CLAIMS.items()]
    lines += [f"| {name}: {says} | {paper} | not run: {why} |" for name, (paper, says, why) in NOT_RUN.items()]
    for name in CLAIMS:
        if name in held:
            lines += ["", *section(held[name])]
    return "\n".join(lines) + "\n"


def section(result: dict) -> list[str]:
    name, arms = result["claim"], result["arms"]
    keys = list(dict.fromkeys(key for arm in arms.values() for key in arm["values"]))

    def cell(arm: dict, key: str) -> str:
        last = [each[-1] for each in arm["values"].get(key, [])]
        return f"{np.mean(last):.3f} ({', '.join(f'{x:.3f}' for x in last)})" if last else "-"

    lines = [f"## {name}", "", f"{result['paper']}: {result['says']} **{result['verdict'].capitalize()}**, {result['seeds']} seeds.", "",
             "| comparison | difference | verdict |", "|---|---|---|"]
    lines += [f"| {each['comparison']} | {each['difference']:+.3f} ± {each['error'] or 0:.3f} | {each['verdict']} |"
              for each in result["comparisons"]]
    lines += ["", f"| arm | {' | '.join(keys)} | minutes | command |", "|---" * (len(keys) + 3) + "|"]
    lines += [f"| {arm} | {' | '.join(cell(held, key) for key in keys)} | {max(held['minutes']):.1f} | `{held['command']}` |"
              for arm, held in arms.items()]
    return lines + ["", f"![{name}](claims/{name}.png)"]


def figure(result: dict, out: Path, pictures: dict[str, Path]) -> None:
    """A panel per measure: arms over steps, the mean over seeds as a line, each seed as a dot; what is known at the end alone as dots.
    Below, the pictures that are given, by arm."""
    import io

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    arms = result["arms"]
    keys = list(dict.fromkeys(key for arm in arms.values() for key in arm["values"]))
    panels = {key: [(name, arm, key) for name, arm in arms.items() if key in arm["values"]] for key in keys}
    if len(arms) == 1:                                          # then its measures are what is compared
        panels = {name: [(key, arm, key) for key in keys] for name, arm in arms.items()}
    lines, columns = (2 if pictures else 1), max(len(panels), len(pictures))
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 3.2 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, series) in zip(axes[0], panels.items()):
        for n, (label, arm, key) in enumerate(series):
            each = np.array(arm["values"][key])                                                # (seeds, evaluations)
            over_steps = each.shape[1] == len(arm["steps"]) > 1
            at = np.array(arm["steps"] if over_steps else [arm["steps"][-1] + 2 * n] * each.shape[1])
            axis.plot(at, each.mean(0), color=f"C{n}", label=label, marker="_", markersize=12)
            axis.plot(np.tile(at, (len(each), 1)).T, each.T, ".", color=f"C{n}", alpha=0.5)
        axis.set_axis_on()
        axis.set(title=title, xlabel="step" if len(arms) > 1 else "pictures drawn")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    for axis, (name, path) in zip(axes[-1], pictures.items()):
        axis.imshow(plt.imread(path))
        axis.set_title(f"{name}: drawn at the end", fontsize=9)
    held = io.BytesIO()
    figure.savefig(held, dpi=90, format="png")
    plt.close(figure)
    write_atomic(out, held.getvalue())


def last_pictures(claim: Claim, out: Path) -> dict[str, Path]:
    """What the first seed of each arm drew at last, where the claim's figure shows it."""
    return {arm: sorted((folder_of(arm, 0, out) / "samples").glob("*.png"))[-1] for arm in claim.arms} if claim.pictured else {}


def told(result: dict) -> str:
    """A claim in the README's table: its sentence, and its differences."""
    moved = [f"{each['comparison'].replace(' : ', ' in ')}: {each['difference']:+.3f} ± {each['error'] or 0:.3f}"
             for each in result["comparisons"]]
    return f"{result['says']} ({'; '.join([result['paper'], *moved])})"


def summary() -> str:
    """The README's table: a row per verdict with its claims, and those that were not run."""
    held = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(KEPT.glob("*.json"))]
    by_verdict = {verdict: [told(result) for result in held if result["verdict"] == verdict] for verdict in (HOLDS, FAILS, OPEN)}
    ran = {result["claim"] for result in held}
    by_verdict["not run"] = [f"{claim.says} ({claim.paper})" for name, claim in CLAIMS.items() if name not in ran]
    by_verdict["not run"] += [f"{says} ({paper}; {why})" for paper, says, why in NOT_RUN.values()]
    rows = [f"| {verdict} | {'<br>'.join(some)} |" for verdict, some in by_verdict.items() if some]
    return "\n".join(["| verdict | claims, with their comparisons |", "|---|---|", *rows])


def listed() -> str:
    """The table of claims and their arms."""
    lines = [f"{name:<22} {claim.paper}: {claim.says}\n{'':<22} arms: {', '.join(claim.arms)}; {'; '.join(claim.compares)}"
             for name, claim in CLAIMS.items()]
    return "\n".join([*lines, *(f"{name:<22} {paper}: {says} Not run: {why}." for name, (paper, says, why) in NOT_RUN.items())])


def main(names: list[str], seeds: int, threads: int, jobs: int, out: Path, kept: Path = KEPT, write_page: bool = True) -> str:
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
        write_atomic(kept / f"{name}.json", json.dumps(result, indent=1).replace("NaN", "null").encode())
        figure(result, kept / f"{name}.png", last_pictures(CLAIMS[name], out))
        told.append(f"{name}: {result['verdict']}")
        told += [f"  {each['comparison']}: {each['difference']:+.3f} +- {each['error'] or 0:.3f}, {each['verdict']}"
                 for each in result["comparisons"]]
    if write_page:
        write_atomic(PAGE, page().encode())
    return "\n".join([*told, *(f"died: {why}" for why in died)])
