"""What the papers claim, tested on the toy: arms of six or ten seeds, judged by one rule.

    python -m studies.claims --list                         # the claims, and what is missing
    python -m studies.claims ins-teaches-space --seeds 6    # runs what is missing, then judges

An arm is a run of train.py, a merge, or an evaluation of another arm's policy, in a folder
out/claims/ARM-SEED that claims share. A call that was stopped goes on with its arms. Results are
kept as JSON in docs/claims/, from which docs/claims.md and docs/claims.png are made.

A claim has one primary comparison, the paper's own sentence. Its verdict follows from the 95% t
interval of the difference, paired by seed: see `verdict_of`. The claims and the flags of the arms
are in claims.toml.
"""

import math
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

from eval import evaluate_rows, load_toy_policy, mean_and_error, mean_of_parts
from support.disk import read_json, write_json, write_text
from support.plots import pyplot, save_figure
from support.run import Owner, read_log
from support.tables import markdown_table
from support.terminal import Arguments, number, say
from tasks import TASKS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OUT = ROOT / "out/claims"                       # the folder of the arms
REACH = 0.8                                     # truth up to which the figure shows differences
MARGIN = 0.03                                   # of truth: what is no difference lies within it
LEAST = 6                                       # seeds of a claim
MOST = 10                                       # seeds that it gets if LEAST leave it open
HOLDS = "holds"
FAILS = "does not hold"
OPEN = "cannot tell"
NOT_RUN = "not run"
EQUAL = f"no difference beyond {MARGIN}"
# Student's t for so many seeds: what 95% and 90% lie within, on both sides.
T95 = {LEAST: 2.571, MOST: 2.262}
T90 = {LEAST: 2.015, MOST: 1.833}

PREAMBLE = """# Claims in miniature

What the papers say, run again on the toy: `python -m studies.claims NAME --jobs 2`.

![The primary comparison of each claim: difference, 95% interval, verdict](claims.png)

**The rule.** A claim has one primary comparison, the paper's own sentence, first in [its
table](#tables). The others are shown and not judged. `a > b in x` means: x of arm a minus x of arm
b, seed by seed, with the 95% t interval of the mean over the seeds. With six or ten seeds a claim
`holds` if the interval lies above 0, `does not hold` if it lies below, shows `no difference beyond
0.03` if the 90% interval lies within ±0.03 (two one-sided tests at 5%; truth is a share from 0 to
1), and else we `cannot tell`. A claim can hold by less than 0.03. A claim that six seeds leave open
gets ten, whatever the sign of its difference. That open claims get more seeds was set before any
was judged; that all of them get ten, once two were open.

**What it means, and what it leaves out.** If there is no true difference, a claim holds or fails in
at most 8% of cases, at the first or the second look, and in 5% with one look; of a true difference
of just 0.03, `no difference beyond 0.03` is said in at most 6.5% (simulated, with normal
differences). So one or two verdicts on this page are wrong, and they are not independent, since
claims share arms. This is exact only for seeds that nobody saw: of all that are judged, but for
those whose names end in -tokens, seeds 0 to 2 were seen first, on this tree or an earlier one (of
frozen-referee and soft-answers with other arms), and the recipes' settings were tuned on seed 0 and
on the same held-out prompts. The interval assumes normally distributed differences. It says what
other seeds of training would give: the prompts, the noise of an evaluation, the base's weights and
the settings of the runs stay the same. So there is a second interval, of other prompts too: the
variance over seeds and the variance over prompts, within each tag, of the mean difference are added
up, and the t quantile stays. For most claims it is too wide rather than too narrow, since the part
that depends on seed and prompt together is counted twice. It is printed if it changes the verdict;
velocity-penalty, no-guidance and refine-beats-best have none. A comparison that is not judged is a
hint, not a finding.

**What is measured.** Each measure is taken at the end of training. `draw`, `think`, `ask` and so on
are held-out truth of a task: the share of right samples. Other keys are explained in [the
log](results.md#the-numbers-in-logjsonl); what a step logs is a mean of the last five. The value of
each seed stands in brackets. `x at equal y` compares x when both arms first reach the same y; `sem`
is r_sem of held-out pictures by the toy's own frozen SigLIP; `refine, judge/curve` the mean of the
truth after two, three and four pictures.

The arms are shorter than the recipes' runs. Nothing is tuned per arm, but for the weights of the
two penalties of velocity-penalty, which were set together on seed 0. An arm with another image loss
takes the rates of the recipe that has it, or, if none has, those of the arm that it is compared
with. LVRPO's claim that larger policies learn faster (1.3B, 7B, 13B) is not run: the toy has
weights of one width. CoRL samples an image as VQ tokens: most of its claims stand twice, for flow
steps and, with a name in -tokens, for image tokens."""

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
    reading: str = ""                           # what we think is going on
    doubt: str = ""                             # what would change our mind

    @property
    def arms(self) -> list[str]:
        """Those that it compares, the primary comparison's first."""
        return list(dict.fromkeys(arm for text in self.compares for arm in arms_of(text)))

    @property
    def measures(self) -> list[str]:
        """Keys of an evaluation, or of the log."""
        compared = map(parse_comparison, self.compares)
        keys = [key for c in compared for key in (c.key_a, c.key_b)]
        return list(dict.fromkeys([*keys, *self.also]))


TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
ARMS = TABLES["arms"]                           # name -> flags
CLAIMS = {name: Claim(**entry) for name, entry in TABLES["claims"].items()}
UNKNOWN = 5.0                                   # minutes of an arm that nobody has run


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
    write_text(begun, meaning(arm))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    output = folder / "output.txt"
    for command in todo:
        with output.open("a", encoding="utf-8") as file:
            python = [sys.executable, *command]
            code = subprocess.run(python, cwd=ROOT, env=env, stdout=file, stderr=file).returncode
        if code:
            *_, last = ["no output", *output.read_text(errors="replace").strip().splitlines()]
            return f"{arm}, seed {seed}: {last[:200]} (exit {code}); see {output}"
    write_text(folder / "done.txt", meaning(arm))
    return ""


def with_parents(names: list[str]) -> list[str]:
    """The arms of some claims and those that they start from, the most often needed first."""
    arms = [arm for name in names for arm in CLAIMS[name].arms]
    for arm in arms:                            # grows while it is walked
        arms += parents_of(arm)
    return [arm for arm, _ in Counter(arms).most_common()]


def missing_runs(names: list[str], seeds: int) -> list[tuple[str, int]]:
    """The runs (arm, seed) of some claims that are not done."""
    runs = [(arm, seed) for arm in with_parents(names) for seed in range(seeds)]
    return [run for run in runs if not is_done(*run)]


def minutes_run(arm: str, seeds: int) -> list[float]:
    """Minutes of each run of an arm that is done here; an evaluation keeps none."""
    minutes = []
    for seed in range(seeds):
        log = folder_of(arm, seed) / "log.jsonl"
        if is_done(arm, seed) and log.exists():
            _, rows = read_log(log)
            minutes.append(round(rows[-1]["seconds"] / 60, 1))
    return minutes


def minutes_of(arm: str, seeds: int) -> float:
    """Minutes of an arm's fastest run, here or kept; UNKNOWN if there is none."""
    minutes = minutes_run(arm, seeds)
    for result in map(kept_result, CLAIMS):
        if arm in result["arms"]:
            minutes += result["arms"][arm]["minutes"]
    return min(minutes, default=UNKNOWN)


def minutes_missing(names: list[str], seeds: int) -> float:
    """Minutes of one process for the runs of some claims that are not done."""
    return sum(minutes_of(arm, seeds) for arm, _ in missing_runs(names, seeds))


def run_missing(names: list[str], seeds: int, jobs: int) -> list[str]:
    """Run the arms of some claims that are not done, parents first -> what failed, a line each."""
    todo = missing_runs(names, seeds)
    failed = []
    if todo:
        hours = minutes_missing(names, seeds) / 60 / jobs
        say(
            f"{len(todo)} runs are missing, about {hours:.1f} hours with {jobs} at a time; a call "
            "that was stopped goes on with them")
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
    """Of an evaluation, of scores' means, or of refinement's table.

    Its steps are the numbers of pictures drawn: key/2 is the value at two, key/curve the mean from
    two on."""
    result = read_json(path)
    values = {}
    for key, cell in result.get("means", result["table"]).items():
        values[key] = np.atleast_2d(np.array(cell, dtype=float))[:, 0].tolist()
    longest = max(map(len, values.values()))
    if longest > 1:
        for key, by_count in list(values.items()):
            values[f"{key}/curve"] = [float(np.mean(by_count[1:]))]
            values |= {f"{key}/{n}": [x] for n, x in enumerate(by_count, 1)}
    return {"steps": list(range(1, 1 + longest))} | values


def values_of_log(path: Path) -> dict:
    """Of a run: each planned evaluation, and each logged number near it.

    The number is the mean of the five steps before (at the start, of the first five). A run that
    was stopped has evaluations besides the planned ones."""
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
    return values


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


def arms_of(text: str) -> tuple[str, str]:
    """The two arms of a comparison."""
    comparison = parse_comparison(text)
    return comparison.a, comparison.b


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


def t_interval(
    differences: list[float], quantiles: dict[int, float], other: float = 0.0
) -> tuple[float, float]:
    """What the mean of LEAST or MOST differences lies within.

    quantiles: T95 or T90. other: another standard error of the mean, independent of the one over
    the differences."""
    mean, error = mean_and_error(differences)
    reach = quantiles[len(differences)] * math.hypot(error, other)
    return mean - reach, mean + reach


def verdict_of(differences: list[float], other: float = 0.0) -> str:
    """The verdict of a primary comparison of truth, by its differences paired by seed.

    other: see `t_interval`."""
    low, high = t_interval(differences, T95, other)
    if low > 0:
        return HOLDS
    if high < 0:
        return FAILS
    low, high = t_interval(differences, T90, other)
    return EQUAL if -MARGIN < low and high < MARGIN else OPEN


def result_of(name: str, seeds: int) -> dict:
    """What the arms that are done gave and the verdict, as docs/claims keeps it."""
    claim = CLAIMS[name]
    arms = {}
    for arm in claim.arms:
        if not all(is_done(arm, seed) for seed in range(seeds)):
            continue
        runs = [values_of(arm, seed) for seed in range(seeds)]
        rounded = {}
        for key in claim.measures:
            if key in runs[0]:
                rounded[key] = [[float(f"{x:.4g}") for x in run[key]] for run in runs]
        arms[arm] = dict(
            command=command_of(arm), minutes=minutes_run(arm, seeds), steps=runs[0]["steps"],
            values=rounded)
    run = [text for text in claim.compares if arms.keys() >= {*arms_of(text)}]
    comparisons = [compare(arms, text) for text in run]
    return dict(
        claim=name, paper=claim.paper, says=claim.says, seeds=seeds, arms=arms,
        comparisons=comparisons, verdict=verdict_of(comparisons[0]["differences"]),
        prompts_error=prompts_error(claim.compares[0], seeds))


def prompts_error(text: str, seeds: int) -> float | None:
    """The standard error over held-out prompts, within each tag, of a comparison's mean difference.

    None for what is not the truth of a task at the end of two runs of train.py."""
    c = parse_comparison(text)
    trained = all(flags_of(arm)[0] not in PROGRAMS for arm in (c.a, c.b))
    if c.by or not trained or c.key_a.partition("/")[0] not in TASKS:
        return None
    differences = []                                    # for each seed and tag (rows,)
    for seed in range(seeds):
        both = rows_of(c.a, seed, c.key_a), rows_of(c.b, seed, c.key_b)
        differences.append([np.subtract(a, b) for a, b in zip(*both)])
    _, error = mean_of_parts([np.mean(by_seed, axis=0) for by_seed in zip(*differences)])
    return round(error, 4)


def rows_of(arm: str, seed: int, key: str) -> list[list[float]]:
    """What each held-out row is worth to an arm's policy at the end, tag by tag; kept in a file.

    The policy is the exported one, whose weights are rounded."""
    task = key.partition("/")[0]
    folder = folder_of(arm, seed)
    path = folder / f"{task}_rows.json"
    if not path.exists():
        values = evaluate_rows(load_toy_policy(str(folder / "policy")), only=task)
        kept = {name: [part.tolist() for part in parts] for name, parts in values.items()}
        write_json(path, kept)
    return read_json(path)[key]


def command_of(arm: str) -> str:
    """What makes an arm of the first seed, as a command line."""
    lines = " && ".join(" ".join(["python", *line]) for line in commands(arm, 0))
    return lines.replace(f"{ROOT}/", "")


# ---- the page ----


def kept_result(name: str) -> dict:
    """A claim's kept result; without one, that of no arms."""
    empty = dict(claim=name, seeds=0, arms={}, verdict=NOT_RUN)
    return read_json(DOCS / "claims" / f"{name}.json", empty)


def page() -> str:
    """docs/claims.md from the kept results: a paragraph a claim, then tables, then commands."""
    results = [kept_result(name) for name in CLAIMS]
    paragraphs = []
    paper = ""
    for claim, result in zip(CLAIMS.values(), results):
        if claim.paper != paper:
            paper = claim.paper
            paragraphs.append(f"## {paper}")
        paragraphs.append(paragraph(result))
    tables = [tables_of(result) for result in results if result["arms"]]
    made = [[f"`{arm}`", f"`{command_of(arm)}`"] for arm in sorted(with_parents(list(CLAIMS)))]
    return "\n\n".join([
        PREAMBLE, *paragraphs, "## Tables", *tables, "## Commands", TABLES["designs"].strip(),
        markdown_table(["arm", "command of the first seed"], made)]) + "\n"


def paragraph(result: dict) -> str:
    """One claim in words: its sentence, the verdict, what we think, what would change our mind."""
    name = result["claim"]
    claim = CLAIMS[name]
    primary = str(parse_comparison(claim.compares[0]))
    lines = [f"### {name}", "", claim.says]
    if result["arms"]:
        first = result["comparisons"][0]
        primary += f" {first['mean']:+.3f} {print_numbers(first['interval'])}"
        primary += f", {result['seeds']} seeds ([numbers](#numbers-of-{name}))"
        if other := result["prompts_error"]:
            wider = verdict_of(first["differences"], other)
            if wider != result["verdict"]:
                ends = print_numbers(t_interval(first["differences"], T95, other))
                primary += f"; over prompts too {ends}, {wider}"
    lines.append(f"**{result['verdict'].capitalize()}**: {primary}.")
    if result["arms"]:
        lines += [claim.reading, f"What would change our mind: {claim.doubt}"]
    return "\n".join(lines)


def tables_of(result: dict) -> str:
    """The comparisons and measures of one claim."""
    name = result["claim"]
    arms = result["arms"]
    measures = []
    for key in CLAIMS[name].measures:
        measures.append([key, *(print_seeds(arm["values"].get(key)) for arm in arms.values())])
    heads = ["comparison", "difference", "95% interval", "of each seed"]
    return "\n\n".join([
        f"### Numbers of {name}", markdown_table(heads, print_comparisons(result)),
        markdown_table(["measure", *arms], measures)])


def print_comparisons(result: dict) -> list[list[str]]:
    """A row for each comparison of a claim, the primary one first.

    Its cells: words, difference, interval, and the difference of each seed."""
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


# verdict -> the marker and the colour of its line in the figure
MARKS = {
    HOLDS: ("^", "tab:blue"), FAILS: ("v", "tab:red"), EQUAL: ("s", "black"), OPEN: ("o", "0.45")}


def save_forest(out: Path) -> None:
    """A PNG of the primary comparisons that were run, under each paper its claims.

    A line each: its mean, its 95% interval and its verdict."""
    figure, axis = pyplot().subplots(figsize=(8, 10), layout="constrained")
    axis.axvspan(-MARGIN, MARGIN, color="0.9")
    axis.axvline(0, color="0.5")
    labels = []
    for name, claim in CLAIMS.items():
        result = kept_result(name)
        if not result["arms"]:
            continue
        if f"{claim.paper}:" not in labels:
            labels.append(f"{claim.paper}:")
        first = result["comparisons"][0]
        place = len(labels)
        verdict = result["verdict"]
        marker, color = MARKS[verdict]
        low, high = np.clip(first["interval"], -REACH, REACH)
        axis.plot([low, high], [place] * 2, color=color)
        axis.plot(first["mean"], place, marker, color=color)
        axis.text(1.1 * REACH, place, verdict, va="center", fontsize=9)
        labels.append(f"{name} ({result['seeds']})")
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    for label in axis.get_yticklabels():
        if label.get_text().endswith(":"):
            label.set_weight("bold")
    axis.invert_yaxis()
    axis.set_xscale("symlog", linthresh=0.1)                    # most differences are below 0.1
    ticks = (-0.5, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xlim(-REACH, REACH)
    axis.set_xlabel(
        f"difference, mostly of held-out truth; 95% interval (band: ±{MARGIN})\n"
        "logarithmic beyond ±0.1; seeds in brackets")
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
                f"{kept / name}.json holds {more} seeds; give --seeds {more}, or delete it")
    OUT.mkdir(parents=True, exist_ok=True)
    owner = Owner(OUT)                          # two calls would remove each other's runs
    failed = run_missing(names, seeds, jobs)
    lines = []
    for name in names:
        primary = arms_of(CLAIMS[name].compares[0])
        if not all(is_done(arm, seed) for arm in primary for seed in range(seeds)):
            lines.append(f"{name}: not all arms of its primary comparison are there")
            continue
        result = result_of(name, seeds)
        write_json(kept / f"{name}.json", result)
        lines += [paragraph(result), tables_of(result)]
    owner.close()
    write_text(DOCS / "claims.md", page())
    save_forest(DOCS / "claims.png")
    return "\n".join([*lines, *(f"failed: {why}" for why in failed)])


def list_claims() -> str:
    """The claims, the seeds that are kept, and the minutes of the runs that are missing here."""
    lines = []
    for name, claim in CLAIMS.items():
        result = kept_result(name)
        wanted = MOST if result["verdict"] == OPEN else LEAST
        minutes = minutes_missing([name], wanted) if result["seeds"] < wanted else 0
        lines += [
            f"{name}: {claim.says} ({claim.paper})",
            f"  {result['verdict']}; {result['seeds']} seeds are kept, {minutes:.0f} minutes of "
            "runs are missing",
        ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.claims", description="The papers' claims, tested on the toy.")
    ap.add_argument("names", nargs="*", help="claims to test, by name; all without one")
    ap.add_argument(
        "--list", action="store_true", help="print the claims and what they lack, run nothing"
    )
    ap.add_argument(
        "--seeds", type=int, choices=[LEAST, MOST], default=LEAST, help="seeds of each arm")
    ap.add_argument("--jobs", type=number(int, least=1), default=2,
                    help="runs at the same time, a thread each")
    ap.run(run, argv)


def run(a) -> str:
    """Carry out a parsed command line; returns what to print."""
    return list_claims() if a.list else run_claims(a.names, a.seeds, a.jobs)


if __name__ == "__main__":
    main()
