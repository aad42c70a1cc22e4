"""Claims: their arms are commands that parse, the runner starts what is missing and no more, the
rule of verdicts, and the page.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from recipes import check, parse
from studies import claims
from studies.claims import FAILS, HOLDS, OPEN
from support.disk import read_json


def check_command(flags):
    check(parse(flags), 1)


def test_every_arm_is_a_command_that_parses():
    for arm in claims.ARMS:
        assert set(claims.parents_of(arm)) <= claims.ARMS.keys()
        for program, *flags in claims.commands(arm, 0, Path("out/claims")):
            if program == "train.py":
                check_command(flags)


def test_every_claim_compares_arms_and_measures_that_it_has():
    for claim in claims.CLAIMS.values():
        assert set(claim.arms) <= claims.ARMS.keys()
        for comparison in map(claims.parse_comparison, claim.compares):
            assert comparison.sign in (">", "~")
            assert {comparison.a, comparison.b} <= set(claim.arms)
            assert {comparison.key_a, comparison.key_b, comparison.by} - {""} <= set(claim.measures)


def test_a_claim_is_added_in_two_places(monkeypatch):
    monkeypatch.setattr(claims, "ARMS", dict(claims.ARMS))
    monkeypatch.setattr(claims, "CLAIMS", dict(claims.CLAIMS))
    text = (claims.DOCS / "adding.md").read_text(encoding="utf-8")
    exec(re.search(r"^\*\*A claim\*\*.*?```python\n(.*?)```", text, re.M | re.S)[1], vars(claims))
    assert "kn-helps" in claims.list_claims()
    ((program, *flags),) = claims.commands("draw-kn", 0, Path("out/claims"))
    assert program == "train.py"
    check_command(flags)


def test_the_kept_results_are_of_the_claims_and_commands_as_they_are():
    paths = list((claims.DOCS / "claims").glob("*.json"))
    assert {path.stem for path in paths} <= claims.CLAIMS.keys()
    for result in map(read_json, paths):
        claim = claims.CLAIMS[result["claim"]]
        assert result["says"] == claim.says
        assert result["seeds"] >= 3
        assert tuple(result["arms"]) == claim.arms
        assert tuple(each["comparison"] for each in result["comparisons"]) == claim.compares
        assert result["verdict"] == claims.verdict_of(result["comparisons"])
        assert set(claims.measures_of(result)) == set(claim.measures)
        for arm, held in result["arms"].items():
            assert held["command"] == claims.command_of(arm)


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


def write_log(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, LOG)))


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Three small arms, of which c starts from a; the commands that are started in place of real
    runs, which end at once.
    """
    monkeypatch.setattr(claims, "DOCS", tmp_path)
    monkeypatch.setattr(claims, "ARMS", {"a": "--steps 2", "b": "a --ins 0", "c": "--policy {a}"})
    rules = claims.Claim("nobody", "Rules help.", ("a", "b"), ("draw", "loss"), ("a > b : draw",))
    monkeypatch.setattr(claims, "CLAIMS", {"rules": rules})
    commands = []

    def run(command, **_):
        commands.append(command[1:])
        out = Path(command[command.index("--out") + 1])
        write_log(out)
        (out / "policy").mkdir(exist_ok=True)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(claims.subprocess, "run", run)
    return commands


def run_rules(tmp_path):
    return claims.run_claims(["rules"], seeds=1, jobs=1, out=tmp_path / "runs")


def test_arms_run_to_a_verdict_a_figure_and_a_page_and_are_not_run_again(started, tmp_path):
    text = run_rules(tmp_path)
    assert "| a > b in draw | +0.000 ± ? | cannot tell at this size |" in text
    assert len(started) == 2
    result = read_json(tmp_path / "claims" / "rules.json")
    assert result["arms"]["a"]["steps"] == [0, 2]
    assert result["arms"]["a"]["values"] == {"draw": [[0.25, 0.5]], "loss": [[2.0, 2.0]]}
    assert (tmp_path / "claims" / "rules.png").stat().st_size > 5000
    assert "## rules" in (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert run_rules(tmp_path) == text
    assert len(started) == 2


def test_kept_results_of_more_seeds_are_not_overwritten(started, tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "rules.json").write_text('{"seeds": 3}')
    with pytest.raises(
        ValueError, match="rules.json holds 3 seeds; give --seeds 3 or more, or delete it"):
        run_rules(tmp_path)
    assert not started


def test_a_run_goes_on_if_it_was_begun_with_the_same_flags_and_else_begins_anew(
    started, tmp_path, monkeypatch
):
    """Flags are its own, and those of the arm that it starts from."""
    for arm in "ac":
        claims.run_arm(arm, 0, tmp_path)
        (tmp_path / f"{arm}-0" / "checkpoint.safetensors").touch()
    for arm in "ac":
        claims.run_arm(arm, 0, tmp_path)
    assert ["--resume" in command for command in started] == [False, False, True, True]
    monkeypatch.setitem(claims.ARMS, "a", "--steps 2 --kn 1")
    assert not claims.is_done("a", 0, tmp_path)
    assert not claims.is_done("c", 0, tmp_path)
    claims.run_arm("c", 0, tmp_path)
    assert "--resume" not in started[-1]
    assert not (tmp_path / "c-0" / "checkpoint.safetensors").exists()


def test_a_folder_that_is_not_the_runners_own_is_left_as_it_is(started, tmp_path):
    write_log(tmp_path / "a-0")
    (tmp_path / "a-0" / "mine.txt").touch()
    claims.run_arm("a", 0, tmp_path)
    assert (tmp_path / "a-0" / "mine.txt").exists()


def test_a_run_that_was_stopped_is_not_done(started, tmp_path, monkeypatch):
    """train.py ends with status 130 after Ctrl-C."""
    monkeypatch.setattr(
        claims.subprocess, "run", lambda command, **_: SimpleNamespace(returncode=130))
    assert "(exit 130)" in claims.run_arm("a", 0, tmp_path)
    assert not claims.is_done("a", 0, tmp_path)


def test_a_run_that_fails_is_one_line_and_holds_up_what_needs_it(started, tmp_path, monkeypatch):
    def fail(command, stdout, **_):
        stdout.write("a warning\n--group_size 1: a group needs 2\n\n")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(claims.subprocess, "run", fail)
    monkeypatch.setitem(
        claims.CLAIMS, "rules", claims.Claim("nobody", "", ("c",), ("draw",), ("c > c : draw",)))
    text = run_rules(tmp_path)
    assert "rules: not all arms are there" in text
    assert "failed: a, seed 0: --group_size 1: a group needs 2 (exit 1)" in text
    assert "failed: c, seed 0: needs an arm that failed" in text


def test_an_unknown_claim_is_refused_and_the_list_names_all(capsys):
    with pytest.raises(
        SystemExit, match="no claim is called flat-earth; the claims are frozen-referee"):
        claims.main(["flat-earth"])
    claims.main(["--list"])
    assert set(claims.CLAIMS) <= set(capsys.readouterr().out.split())


# ---- values and verdicts ----


def test_a_table_of_refinement_is_read_over_the_pictures_drawn(tmp_path):
    table = {"refine, judge": [[0.3, 0.1], [0.6, 0.1]], "best, judge": [[0.3, 0.1], [0.5, 0.1]]}
    (tmp_path / "r-0").mkdir()
    (tmp_path / "r-0" / "table.json").write_text(json.dumps({"table": table}))
    values = claims.values_of("r", 0, tmp_path)
    assert values["steps"] == [1, 2]
    compared = claims.compare({"r": [values]}, "r > r : refine, judge - best, judge")
    assert compared["difference"] == pytest.approx(0.1)


def test_unevenness_over_noisy_steps_is_their_spread_over_their_mean():
    values = {"std/0": [1.0, 2.0], "std/1": [3.0, 2.0], "std": [9.0, 9.0], "other/0": [5.0, 5.0]}
    assert claims.unevenness(values, "std") == [0.5, 0.0]
    assert claims.unevenness({"clipped/0": [0.0], "clipped/1": [0.0]}, "clipped") == [0.0]


@pytest.mark.parametrize("differences, sign, verdict", [
    ((0.20, 0.25, 0.22), ">", HOLDS), ((-0.20, -0.25, -0.22), ">", FAILS),
    ((0.10, -0.10, 0.02), ">", OPEN), ((-0.01, -0.01, -0.01), "~", HOLDS),
    ((-0.20, -0.21, -0.19), "~", FAILS), ((-0.10, 0.10, -0.02), "~", OPEN)])
def test_a_comparison_is_judged_by_two_standard_errors_of_paired_differences(
    differences, sign, verdict
):
    values = {"a": [{"x": [x]} for x in differences], "b": [{"x": [0.0]}] * 3}
    assert claims.compare(values, f"a {sign} b : x")["verdict"] == verdict


def test_variety_is_compared_when_both_arms_reach_the_same_truth():
    slow = {"truth": [0.2, 0.3, 0.4], "variety": [2.0, 1.9, 1.8]}
    fast = {"truth": [0.2, 0.6, 0.5], "variety": [2.0, 1.0, 0.5]}
    assert claims.values_when_equal(slow, fast, "variety", "truth") == pytest.approx(
        (1.8, 1.5))                             # both at 0.4
    falling = {"truth": [0.2, 0.1], "variety": [2.0, 0.1]}
    assert claims.values_when_equal(slow, falling, "variety", "truth") == (2.0, 2.0)
    assert claims.compare({"x": [slow], "y": [fast]}, "x > y : variety at truth")[
        "difference"
    ] == pytest.approx(0.3)


@pytest.mark.parametrize(
    "verdicts, verdict",
    [((HOLDS, HOLDS), HOLDS), ((HOLDS, OPEN), OPEN), ((HOLDS, FAILS, OPEN), FAILS)])
def test_a_claim_holds_if_all_comparisons_do_and_fails_if_one_does(verdicts, verdict):
    assert claims.verdict_of([{"verdict": each} for each in verdicts]) == verdict


@pytest.mark.parametrize(
    "text, words",
    [
        ("a > b : draw", "a > b in draw"),
        ("a > b : variety at draw", "a > b in variety at equal draw"),
        ("a > a : refine, judge - best, judge", "refine, judge > best, judge")],
)
def test_a_comparison_is_told_as_people_say_it(text, words):
    assert str(claims.parse_comparison(text)) == words
