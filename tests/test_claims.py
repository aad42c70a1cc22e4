"""Claims: their arms are commands that parse, the runner starts what is missing and no more, the
rule of verdicts, and the page.
"""

import json
import math
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from recipes import check, parse
from studies import claims
from studies.claims import EQUAL, FAILS, HOLDS, OPEN
from support.disk import read_json
from tasks import TASKS


def check_command(flags):
    check(parse(flags), 1)


def test_every_arm_is_a_command_that_parses():
    for arm in claims.ARMS:
        assert set(claims.parents_of(arm)) <= claims.ARMS.keys()
        for program, *flags in claims.commands(arm, 0):
            if program == "train.py":
                check_command(flags)


def test_every_claim_compares_arms_and_its_primary_comparison_is_of_truth():
    truths = {*TASKS, "draw/position", "refine, judge/curve", "reflect/self_spoiled"}
    for claim in claims.CLAIMS.values():
        assert set(claim.arms) <= claims.ARMS.keys()
        primary = claims.parse_comparison(claim.compares[0])
        assert primary.key_a in truths


def test_a_claim_is_added_in_two_places(monkeypatch):
    text = (claims.DOCS / "adding.md").read_text(encoding="utf-8")
    new = tomllib.loads(re.search(r"^\*\*A claim\*\*.*?```toml\n(.*?)```", text, re.M | re.S)[1])
    monkeypatch.setattr(claims, "ARMS", claims.ARMS | new["arms"])
    added = {name: claims.Claim(**entry) for name, entry in new["claims"].items()}
    monkeypatch.setattr(claims, "CLAIMS", added)
    assert "kn-helps" in claims.list_claims()
    ((program, *flags),) = claims.commands("draw-kn", 0)
    assert program == "train.py"
    check_command(flags)


KEPT = sorted((claims.DOCS / "claims").glob("*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_kept_result_is_of_the_claim_and_the_commands_as_they_are(path):
    result, claim = read_json(path), claims.CLAIMS[path.stem]
    assert result["says"] == claim.says
    assert result["arms"].keys() <= set(claim.arms)
    for arm, kept in result["arms"].items():
        assert kept["command"] == claims.command_of(arm)
        assert kept["values"].keys() <= set(claim.measures)


# ---- the rule, in other words ----


def tail(t, degrees):
    """The share of Student's t above t: of the angles whose tangent it is, by their weight."""
    angles = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    weight = np.cos(angles) ** (degrees - 1)
    return weight[angles > math.atan(t / math.sqrt(degrees))].sum() / weight.sum()


def verdict_by_tests(differences, other=0.0):
    n, mean = len(differences), np.mean(differences)
    error = math.sqrt(np.var(differences, ddof=1) / n + other**2) + 1e-12
    if tail(mean / error, n - 1) < 0.025:
        return HOLDS
    if tail(-mean / error, n - 1) < 0.025:
        return FAILS
    within = max(tail((0.03 + mean) / error, n - 1), tail((0.03 - mean) / error, n - 1))
    return EQUAL if within < 0.05 else OPEN


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_kept_verdict_follows_from_the_kept_values_of_the_claims_first_comparison(path):
    result = read_json(path)
    first = result["comparisons"][0]
    arms, key = first["comparison"].split(" : ")
    a, b = (result["arms"][arm]["values"] for arm in arms.split(" > "))
    key_a, key_b = (key.split(" - ") * 2)[:2]
    if " at " not in key:
        ends = [x[-1] - y[-1] for x, y in zip(a[key_a], b[key_b])]
        assert first["differences"] == pytest.approx(ends, abs=1e-4)
    assert len(first["differences"]) == result["seeds"]
    assert sum(first["interval"]) / 2 == pytest.approx(np.mean(first["differences"]), abs=1e-4)
    assert first["comparison"] == claims.CLAIMS[path.stem].compares[0]
    assert result["verdict"] == verdict_by_tests(first["differences"])


@pytest.mark.parametrize("seeds", [6, 10])
def test_the_rule_gives_the_verdicts_of_t_tests(seeds):
    """Of the error over seeds, and of that over seeds and prompts."""
    rng = np.random.default_rng(seeds)
    found = set()
    for mean in np.linspace(-0.06, 0.06, 30):
        differences = rng.normal(mean, rng.choice([0.01, 0.05]), seeds).tolist()
        found.add(claims.verdict_of(differences))
        for other in (0.0, 0.01):
            assert claims.verdict_of(differences, other) == verdict_by_tests(differences, other)
    assert found == {HOLDS, FAILS, EQUAL, OPEN}


def test_quantiles_are_students():
    for seeds in (6, 10):
        assert tail(claims.T95[seeds], seeds - 1) == pytest.approx(0.025, abs=1e-4)
        assert tail(claims.T90[seeds], seeds - 1) == pytest.approx(0.05, abs=1e-4)


def test_the_page_is_what_the_kept_results_say():
    assert (claims.DOCS / "claims.md").read_text(encoding="utf-8") == claims.page()


# ---- running ----

LOG = [
    {"config": {"steps": 2, "eval_every": 25}},
    {"step": 0, "seconds": 0.0, "eval": {"draw": [0.25, 0.1]}},
    {"step": 0, "seconds": 1.0, "loss": 1.0, "ratio/0": 1.0},
    {"step": 1, "seconds": 2.0, "loss": 3.0, "ratio/0": 2.0},
    {"step": 1, "seconds": 2.5, "eval": {"draw": [0.9, 0.1]}},  # where it was stopped once
    {"step": 2, "seconds": 3.0, "eval": {"draw": [0.5, 0.1]}},
]


# What rows of two tags are worth to the policies of arms a and b.
ROWS = {"a": [np.array([0.5, 0.7]), np.array([1.0, 0.0])],
        "b": [np.array([0.5, 0.3]), np.array([0.5, 0.5])]}


def write_log(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, LOG)))


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Three small arms, of which c starts from a; the commands that are started in place of real
    runs, which end at once.
    """
    monkeypatch.setattr(claims, "DOCS", tmp_path)
    monkeypatch.setattr(claims, "OUT", tmp_path)
    monkeypatch.setattr(claims, "ARMS", {"a": "--steps 2", "b": "a --ins 0", "c": "--policy {a}"})
    rules = claims.Claim("nobody", "Rules help.", ("a > b : draw",), ("loss",))
    monkeypatch.setattr(claims, "CLAIMS", {"rules": rules})
    monkeypatch.setattr(claims, "load_toy_policy", lambda folder: Path(folder).parent.name)
    monkeypatch.setattr(claims, "evaluate_rows", lambda policy, only: {only: ROWS[policy[0]]})
    commands = []

    def run(command, **_):
        commands.append(command[1:])
        out = Path(command[command.index("--out") + 1])
        write_log(out)
        (out / "policy").mkdir(exist_ok=True)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(claims, "subprocess", SimpleNamespace(run=run))
    return commands


def run_rules():
    return claims.run_claims(["rules"], seeds=6, jobs=1)


def test_arms_run_to_a_verdict_a_figure_and_a_page_and_are_not_run_again(started, tmp_path):
    text = run_rules()
    assert "**No difference beyond 0.03**: a > b in draw +0.000 [+0.000, +0.000], 6 seeds (" in text
    assert len(started) == 12
    result = read_json(tmp_path / "claims" / "rules.json")
    assert result["arms"]["a"]["steps"] == [0, 2]
    assert result["arms"]["a"]["minutes"] == [0.1] * 6              # 3 seconds each
    # Differences (0, 0.4) and (0.5, -0.5), whose standard errors are 0.2 and 0.5.
    assert result["prompts_error"] == pytest.approx(math.hypot(0.2, 0.5) / 2, abs=1e-4)
    assert result["arms"]["a"]["values"] == {
        "draw": [[0.25, 0.5]] * 6, "loss": [[2.0, 2.0]] * 6}
    assert (tmp_path / "claims.png").stat().st_size > 5000
    assert "### rules" in (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert run_rules() == text
    assert len(started) == 12
    assert "6 seeds are kept, 0 minutes of runs are missing" in claims.list_claims()


def test_a_claim_that_six_seeds_leave_open_gets_ten(started, tmp_path):
    run_rules()
    path = tmp_path / "claims" / "rules.json"
    path.write_text(path.read_text().replace(EQUAL, OPEN))
    assert f"{OPEN}; 6 seeds are kept, 1 minutes of runs are missing" in claims.list_claims()


def test_kept_results_of_more_seeds_are_not_overwritten(started, tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "rules.json").write_text('{"seeds": 10}')
    with pytest.raises(ValueError, match="rules.json holds 10 seeds; give --seeds 10, or delete it"):
        run_rules()
    assert not started


def test_a_run_goes_on_if_it_was_begun_with_the_same_flags_and_else_begins_anew(
    started, tmp_path, monkeypatch
):
    """Flags are its own, and those of the arm that it starts from."""
    for arm in "ac":
        claims.run_arm(arm, 0)
        (tmp_path / f"{arm}-0" / "checkpoint.safetensors").touch()
    for arm in "ac":
        claims.run_arm(arm, 0)
    assert ["--resume" in command for command in started] == [False, False, True, True]
    monkeypatch.setitem(claims.ARMS, "a", "--steps 2 --kn 1")
    assert not claims.is_done("a", 0)
    assert not claims.is_done("c", 0)
    claims.run_arm("c", 0)
    assert "--resume" not in started[-1]
    assert not (tmp_path / "c-0" / "checkpoint.safetensors").exists()


def test_a_folder_that_is_not_the_runners_own_is_left_as_it_is(started, tmp_path):
    write_log(tmp_path / "a-0")
    (tmp_path / "a-0" / "mine.txt").touch()
    claims.run_arm("a", 0)
    assert (tmp_path / "a-0" / "mine.txt").exists()


def test_a_run_that_fails_is_one_line_and_holds_up_what_needs_it(started, tmp_path, monkeypatch):
    def fail(command, stdout, **_):
        stdout.write("a warning\n--group_size 1: a group needs 2\n\n")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(claims, "subprocess", SimpleNamespace(run=fail))
    monkeypatch.setitem(
        claims.CLAIMS, "rules", claims.Claim("nobody", "", ("c > c : draw",)))
    text = run_rules()
    assert "rules: not all arms of its primary comparison are there" in text
    assert "failed: a, seed 0: --group_size 1: a group needs 2 (exit 1)" in text
    assert "failed: c, seed 0: needs an arm that failed" in text


def test_an_unknown_claim_is_refused_and_the_list_names_all(capsys):
    with pytest.raises(
        SystemExit, match="no claim is called flat-earth; the claims are frozen-referee"):
        claims.main(["flat-earth"])
    claims.main(["--list"])
    assert claims.CLAIMS.keys() <= set(re.findall(r"^([\w-]+):", capsys.readouterr().out, re.M))


# ---- values ----


def kept(**runs):
    """Arms of one key x, or of several, as a result keeps them."""
    return {arm: {"values": values} for arm, values in runs.items()}


def test_a_table_of_refinement_is_read_over_the_pictures_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "OUT", tmp_path)
    table = {"refine, judge": [[0.3, 0.1], [0.6, 0.1]], "best, judge": [[0.3, 0.1], [0.5, 0.1]]}
    (tmp_path / "r-0").mkdir()
    (tmp_path / "r-0" / "table.json").write_text(json.dumps({"table": table}))
    values = claims.values_of("r", 0)
    assert values["refine, judge"] == [0.3, 0.6]
    assert values["refine, judge/curve"] == values["refine, judge/2"] == [0.6]


def test_variety_is_compared_when_both_arms_reach_the_same_truth():
    slow = {"truth": [0.2, 0.3, 0.4], "variety": [2.0, 1.9, 1.8]}
    fast = {"truth": [0.2, 0.6, 0.5], "variety": [2.0, 1.0, 0.5]}
    assert claims.values_when_equal(slow, fast, "variety", "truth") == pytest.approx(
        (1.8, 1.5))                             # both at 0.4
    falling = {"truth": [0.2, 0.1], "variety": [2.0, 0.1]}
    assert claims.values_when_equal(slow, falling, "variety", "truth") == (2.0, 2.0)
    x, y = ({key: [run[key]] * 6 for key in run} for run in (slow, fast))
    assert claims.compare(kept(x=x, y=y), "x > y : variety at truth")["mean"] == pytest.approx(0.3)
