"""What the papers claim, put to the test on the toy: arms of six seeds, judged by one rule.

    python -m studies.claims --list                         # the claims, and what is missing
    python -m studies.claims ins-teaches-space --seeds 6    # runs what is missing, then judges

An arm is a run of train.py, a merge, or an evaluation of another arm's policy, in a folder
out/claims/ARM-SEED that claims share. A call that was stopped goes on with its arms. Results are
kept as JSON and a figure in docs/claims/, from which docs/claims.md is written.

A claim has one primary comparison, the paper's own sentence. Its verdict follows from the 95% t
interval of the difference, paired by seed: see `verdict_of`. The claims and the flags of the arms
are in claims.toml.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval import mean_and_error
from rewards import NUMBER_WORDS
from studies.tables import markdown_table, write_json
from support.disk import read_json, write_atomic
from support.plots import pyplot, save_figure
from support.run import Owner, read_log
from support.terminal import Arguments, number, say

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OUT = ROOT / "out/claims"                       # the folder of the arms
MARGIN = 0.03                                   # of truth: less than this counts as no difference
LEAST = 6                                       # seeds that a verdict needs
HOLDS = "holds"
FAILS = "does not hold"
OPEN = "cannot tell"
NOT_RUN = "not run"
EQUAL = f"no difference beyond {MARGIN}"
# Student's t: what 95% and 90% lie within, on both sides, for 1, 2, ... 9 degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
T90 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)

PREAMBLE = f"""# Claims in miniature

What the papers say, run again on the toy: `python -m studies.claims NAME --jobs 2`. The arms are
shorter than the recipes' runs. Nothing is tuned per arm; the recipes were tuned as they are, on
seed 0, and an arm with another image loss takes the rates of the recipe that has it.
LVRPO's claim that larger policies learn faster (1.3B, 7B, 13B) is not run: the toy has weights of
one width. CoRL samples an image as VQ tokens: its claims stand twice, of flow steps, and of image
tokens under names that end so.

**The rule.** A claim has one primary comparison, the paper's own sentence, first in its table. The
others are shown and not judged. `a > b in x` is the x of arm a less that of arm b, paired by seed,
with its 95% t interval over the seeds. From six seeds on, a claim `{HOLDS}` if the interval lies
above 0, `{FAILS}` if it lies below, shows `{EQUAL}` if the 90% interval lies
within ±{MARGIN} of truth (two one-sided tests at 5%), and else we `{OPEN}`. With fewer seeds
it is not judged: over three, the interval is 4.3 standard errors to each side. Whether more than
six are run is decided by the width of the interval, never by its sign.

**What it means, and what it leaves out.** If there were no difference, a claim would hold in 2.5%
of cases and fail in as many, so that about one of all claims on this page would be misjudged. The
interval takes the differences of seeds as normal. It is about other seeds of training, and nothing
else: the held-out prompts are the same for all seeds, as are the base's weights, and the rates,
lengths and sizes of the runs. A comparison that is not judged is a place to look, no finding.

**What is measured** is held-out truth of a task (`draw`, `think`, `ask` and so on), the share of
right samples, or what the key says in [the log](results.md#the-numbers-in-logjsonl), as the mean of
five steps, at the end; the seeds follow in brackets. `x at equal y` compares x when both arms first
reach the same y; `uneven` is the spread of a value over the noisy steps, divided by its mean; `sem`
is r_sem of held-out pictures by the toy's own frozen SigLIP.

![The primary comparisons that were run](claims.png)"""

# ---- the claims ----

# Evaluations of another arm's policy: they take --policy and write a table to --out.
PROGRAMS = {
    "eval": "eval.py", "refine": "-m studies.refinement", "score": "-m studies.reward_truth"}


@dataclass(frozen=True)
class Claim:
    """One table [claims.NAME] of claims.toml."""

    paper: str
    says: str                                   # in a sentence
    compares: Sequence[str]                     # the first is judged; see parse_comparison
    also: Sequence[str] = ()                    # measures that are shown besides those compared
    reading: str = ""                           # what the measures show

    @property
    def arms(self) -> list[str]:
        """Those that it compares."""
        compared = map(parse_comparison, self.compares)
        return list(dict.fromkeys(arm for c in compared for arm in (c.a, c.b)))

    @property
    def measures(self) -> list[str]:
        """Keys of an evaluation, or of the log."""
        compared = map(parse_comparison, self.compares)
        keys = [key for c in compared for key in (c.key_a, c.key_b)]
        return list(dict.fromkeys([*keys, *self.also]))


TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
ARMS = TABLES["arms"]                           # name -> flags
CLAIMS = {name: Claim(**entry) for name, entry in TABLES["claims"].items()}


# ---- running arms ----

POLICY_OF = re.compile(r"\{([\w-]+)\}")         # another arm's policy, in an arm's flags


def folder_of(arm: str, seed: int) -> Path:
    return OUT / f"{arm}-{seed}"


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


def is_done(arm: str, seed: int) -> bool:
    return has_meaning(folder_of(arm, seed) / "done.txt", arm)


def commands(arm: str, seed: int) -> list[list[str]]:
    """What makes an arm: the arguments of python, one process after another."""
    folder = folder_of(arm, seed)

    def policy_of(found) -> str:
        return f"{folder_of(found[1], seed)}/policy"

    flags = [POLICY_OF.sub(policy_of, flag) for flag in flags_of(arm)]
    program, *rest = flags
    policy = f"{folder}/policy"
    table = f"{folder}/table.json"
    if program in PROGRAMS:
        return [[*PROGRAMS[program].split(), "--policy", *rest, "--out", table]]
    if program == "merge":
        return [
            ["-m", "support.merge", *rest, "--out", policy],
            ["eval.py", "--policy", policy, "--out", table]]
    if "--eval_every" not in flags:
        flags += ["--eval_every", "25"]
    return [["train.py", *flags, "--save_every", "25", "--seed", str(seed), "--out", str(folder)]]


def run_arm(arm: str, seed: int) -> str:
    """Make an arm -> "" or, in one line, why it failed.

    A run that was stopped goes on if it was begun with the same flags, else its folder is removed.
    """
    folder = folder_of(arm, seed)
    todo = commands(arm, seed)
    begun = folder / "begun.txt"
    if has_meaning(begun, arm) and (folder / "checkpoint.safetensors").exists():    # no shards
        todo[0].append("--resume")
    elif begun.exists():
        shutil.rmtree(folder)
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


def with_parents(names: list[str]) -> list[str]:
    """The arms of some claims, and those that they start from."""
    arms = [arm for name in names for arm in CLAIMS[name].arms]
    for arm in arms:                            # grows while it is walked
        arms += parents_of(arm)
    return list(dict.fromkeys(arms))


def missing_runs(names: list[str], seeds: int) -> list[tuple[str, int]]:
    """The runs (arm, seed) of some claims that are not done."""
    runs = [(arm, seed) for seed in range(seeds) for arm in with_parents(names)]
    return [run for run in runs if not is_done(*run)]


def run_missing(names: list[str], seeds: int, jobs: int) -> list[str]:
    """Run the arms of some claims that are not done, parents first -> what failed, a line each."""
    todo = missing_runs(names, seeds)
    failed = []
    if todo:
        say(
            f"{len(todo)} runs of 1 to 15 minutes are missing, {jobs} at a time; a call that was "
            "stopped goes on with them")
    while todo:
        ready = [
            (arm, seed)
            for arm, seed in todo
            if all(is_done(parent, seed) for parent in parents_of(arm))
        ]
        if not ready:
            return failed + [f"{arm}, seed {seed}: needs an arm that failed" for arm, seed in todo]
        with ThreadPoolExecutor(jobs) as pool:
            failed += filter(None, pool.map(run_arm, *zip(*ready)))
        todo = [run for run in todo if run not in ready]
    return failed


# ---- what an arm gave ----


def values_of(arm: str, seed: int) -> dict:
    """{"steps": [...], key: [...]}, with one value for each evaluation."""
    folder = folder_of(arm, seed)
    table = folder / "table.json"
    return values_of_table(table) if table.exists() else values_of_log(folder / "log.jsonl")


def values_of_table(path: Path) -> dict:
    """Of an evaluation, of scores' means, or of refinement's table, whose steps are the numbers of
    pictures drawn."""
    result = read_json(path)
    values = {}
    for key, cell in result.get("means", result["table"]).items():
        values[key] = np.atleast_2d(np.array(cell, dtype=float))[:, 0].tolist()
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
    if steps:
        everywhere = set.intersection(*map(set, steps))
        for key in everywhere - values.keys():
            values[key] = [np.mean([row[key] for row in some]) for some in near]
    for key in [key.removesuffix("/0") for key in values if key.endswith("/0")]:
        values[f"{key}/uneven"] = unevenness(values, key)
    return values


def unevenness(values: dict, key: str) -> list[float]:
    """The spread of key/0, key/1, ... (one for each noisy step) over their mean, per evaluation."""
    by_step = np.array([values[k] for k in values if k.rpartition("/")[0] == key])  # (W, looks)
    return (by_step.std(0) / np.maximum(by_step.mean(0), 1e-12)).tolist()


# ---- comparing arms ----


@dataclass(frozen=True)
class Comparison:
    """`key_a` of arm a compared with `key_b` of arm b."""

    a: str
    b: str
    key_a: str
    key_b: str
    by: str                                     # compared when this key is equal; "": at the end

    def __str__(self):
        if self.key_a != self.key_b:
            return f"{self.key_a} > {self.key_b}"
        level = f" at equal {self.by}" if self.by else ""
        return f"{self.a} > {self.b} in {self.key_a}{level}"


def parse_comparison(text: str) -> Comparison:
    """Read "a > b : key", "a > b : key at by", or "a > a : key - other", two keys of one arm."""
    arms, keys = text.split(" : ")
    keys, _, by = keys.partition(" at ")
    key_a, _, key_b = keys.partition(" - ")
    return Comparison(*arms.split(" > "), key_a, key_b or key_a, by)


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


def compare(arms: dict[str, dict], text: str) -> dict:
    """The differences of a comparison, paired by seed, their mean and its 95% t interval.

    arms: arm -> {"values": key -> for each seed, a value for each evaluation}.
    """
    c = parse_comparison(text)
    differences = []
    for one, other in zip(runs_of(arms[c.a]), runs_of(arms[c.b])):
        a = one[c.key_a][-1]
        b = other[c.key_b][-1]
        if c.by:
            a, b = values_when_equal(one, other, c.key_a, c.by)
        differences.append(round(a - b, 4))
    mean = round(float(np.mean(differences)), 4)
    interval = [round(x, 4) for x in t_interval(differences, T95)]
    return dict(comparison=text, differences=differences, mean=mean, interval=interval)


def runs_of(arm: dict) -> list[dict]:
    """An arm's kept values as one dict a seed, key -> a value for each evaluation."""
    return [dict(zip(arm["values"], runs)) for runs in zip(*arm["values"].values())]


def t_interval(differences: list[float], quantiles: tuple[float, ...]) -> tuple[float, float]:
    """What the mean of 2 to 10 differences lies within. quantiles: T95 or T90."""
    mean, error = mean_and_error(differences)
    reach = quantiles[len(differences) - 2] * error
    return mean - reach, mean + reach


def verdict_of(differences: list[float]) -> str:
    """The verdict of a primary comparison of truth, by its differences paired by seed."""
    seeds = len(differences)
    if seeds < LEAST:
        return f"not judged ({NUMBER_WORDS[seeds]} seeds)"
    low, high = t_interval(differences, T95)
    if low > 0:
        return HOLDS
    if high < 0:
        return FAILS
    low, high = t_interval(differences, T90)
    return EQUAL if -MARGIN < low and high < MARGIN else OPEN


def result_of(name: str, seeds: int) -> dict:
    """What a claim's arms gave and the verdict, as docs/claims keeps it."""
    claim = CLAIMS[name]
    arms = {}
    for arm in claim.arms:
        runs = [values_of(arm, seed) for seed in range(seeds)]
        rounded = {}
        for key in claim.measures:
            if key in runs[0]:
                rounded[key] = [[float(f"{x:.4g}") for x in run[key]] for run in runs]
        arms[arm] = dict(command=command_of(arm), steps=runs[0]["steps"], values=rounded)
    comparisons = [compare(arms, text) for text in claim.compares]
    return dict(
        claim=name, paper=claim.paper, says=claim.says, seeds=seeds, arms=arms,
        comparisons=comparisons, verdict=verdict_of(comparisons[0]["differences"]))


def command_of(arm: str) -> str:
    """What makes an arm of the first seed, as a command line."""
    lines = " && ".join(" ".join(["python", *line]) for line in commands(arm, 0))
    return lines.replace(f"{ROOT}/", "")


# ---- the page ----


def kept_result(name: str) -> dict:
    """A claim's kept result; without one, that of no arms."""
    empty = dict(claim=name, seeds=0, arms={}, comparisons=[], verdict=NOT_RUN)
    return read_json(DOCS / "claims" / f"{name}.json", empty)


def page() -> str:
    """docs/claims.md from the kept results."""
    rows = []
    sections = []
    for name, claim in CLAIMS.items():
        result = kept_result(name)
        primary = print_comparisons(result)[0][:3]
        rows.append([f"[{name}](#{name}): {claim.says}", claim.paper, *primary, result["verdict"]])
        sections.append(section(result))
    heads = ["claim", "paper", "primary comparison", "difference", "95% interval", "verdict"]
    return "\n\n".join([PREAMBLE, markdown_table(heads, rows), *sections]) + "\n"


def section(result: dict) -> str:
    """The text of one claim: verdict, comparisons, measures, commands."""
    name = result["claim"]
    claim = CLAIMS[name]
    arms = result["arms"]
    comparisons = print_comparisons(result)
    primary = comparisons[0][0]
    if arms:
        primary = f"{' '.join(comparisons[0][:3])}, {result['seeds']} seeds"
    heads = ["comparison", "difference", "95% interval", "of each seed"]
    parts = [
        f"## {name}",
        f"{claim.paper}: {claim.says}\n"
        f"**{result['verdict'].capitalize()}**: {primary}. {claim.reading}",
        markdown_table(heads, comparisons)]
    if arms:
        measures = []
        for key in claim.measures:
            measures.append([key, *(print_seeds(arm["values"].get(key)) for arm in arms.values())])
        parts.append(markdown_table(["measure", *arms], measures))
    made = [[arm, f"`{command_of(arm)}`"] for arm in with_parents([name])]
    return "\n\n".join([*parts, markdown_table(["arm", "command"], made)])


def print_comparisons(result: dict) -> list[list[str]]:
    """A row for each comparison of a claim, the primary one first: words, difference, interval,
    and the difference of each seed."""
    kept = {each["comparison"]: each for each in result["comparisons"]}
    rows = []
    for text in CLAIMS[result["claim"]].compares:
        row = [str(parse_comparison(text)), NOT_RUN, "-", "-"]
        if each := kept.get(text):
            row[1:] = (
                f"{each['mean']:+.3f}", print_numbers(each["interval"]),
                print_numbers(each["differences"]))
        rows.append(row)
    return rows


def print_numbers(values: list[float]) -> str:
    return f"[{', '.join(f'{x:+.3f}' for x in values)}]"


def print_seeds(runs: list[list[float]] | None) -> str:
    """The mean of the last values over seeds, and each of them; three digits."""
    if runs is None:
        return "-"
    last = [run[-1] for run in runs]
    return f"{np.mean(last):.3g} ({', '.join(f'{x:.3g}' for x in last)})"


def save_forest(out: Path) -> None:
    """A PNG of the primary comparisons that were run: a line each, its mean and 95% interval."""
    figure, axis = pyplot().subplots(figsize=(8, 8), layout="constrained")
    axis.axvspan(-MARGIN, MARGIN, color="0.9")
    axis.axvline(0, color="0.5", linewidth=0.8)
    labels = []
    for result in map(kept_result, CLAIMS):
        if result["comparisons"]:
            each = result["comparisons"][0]
            place = len(labels)
            axis.plot(each["interval"], [place] * 2, color="tab:grey")
            axis.plot(each["mean"], place, ".", color="tab:grey")
            labels.append(f"{result['paper']}: {result['claim']}\n{result['verdict']}")
    axis.set_yticks(range(len(labels)), labels, fontsize=6.5)
    axis.invert_yaxis()
    axis.set_xlabel("difference in held-out truth, 95% interval (band: up to 0.03)")
    save_figure(figure, out, dpi=100)


# ---- the command line ----


def run_claims(names: list[str], seeds: int, jobs: int) -> str:
    """Run what is missing, keep results and figures, write the page; returns what to print.

    Errors: ValueError for an unknown name, and for kept results of more seeds.
    """
    if unknown := [name for name in names if name not in CLAIMS]:
        raise ValueError(
            f"no claim is called {', '.join(unknown)}; the claims are {', '.join(CLAIMS)}")
    names = names or list(CLAIMS)
    kept = DOCS / "claims"
    for name in names:
        more = kept_result(name)["seeds"]
        if more > seeds:
            raise ValueError(
                f"{kept / name}.json holds {more} seeds; give --seeds {more} or more, or delete it")
    OUT.mkdir(parents=True, exist_ok=True)
    owner = Owner(OUT)                          # two calls would remove each other's runs
    failed = run_missing(names, seeds, jobs)
    lines = []
    for name in names:
        if missing_runs([name], seeds):
            lines.append(f"{name}: not all arms are there")
            continue
        result = result_of(name, seeds)
        write_json(kept / f"{name}.json", result)
        lines.append(section(result))
    owner.close()
    write_atomic(DOCS / "claims.md", page().encode())
    save_forest(DOCS / "claims.png")
    return "\n".join([*lines, *(f"failed: {why}" for why in failed)])


def list_claims() -> str:
    """The claims, the seeds that are kept, and the runs of six seeds that are not done."""
    lines = []
    for name, claim in CLAIMS.items():
        runs = Counter(arm for arm, _ in missing_runs([name], LEAST))
        missing = ", ".join(f"{arm} {count}" for arm, count in runs.items())
        lines += [
            f"{name:<22} {claim.paper}: {claim.says}",
            f"  {kept_result(name)['seeds']} of {LEAST} seeds kept; runs that are missing: "
            f"{missing or 'none'}",
        ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.claims", description="The papers' claims, tested on the toy.")
    ap.add_argument("names", nargs="*", help="claims to test, by name; all without one")
    ap.add_argument(
        "--list", action="store_true", help="print the claims and what they lack, run nothing"
    )
    ap.add_argument(
        "--seeds", type=int, choices=range(2, 2 + len(T95)), default=LEAST, help="seeds of each arm"
    )
    ap.add_argument("--jobs", type=number(int, least=1), default=2,
                    help="runs at the same time, a thread each")
    ap.run(run, argv)


def run(a) -> str:
    """Carry out a parsed command line; returns what to print."""
    return list_claims() if a.list else run_claims(a.names, a.seeds, a.jobs)


if __name__ == "__main__":
    main()
