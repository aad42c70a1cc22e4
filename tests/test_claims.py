"""Claims: two arms of two steps through the whole path, the rule of verdicts, what is damaged or died, and the page."""

import json
import re

import pytest
import torch

from studies import claims
import eval as evaluation
from recipes import check, parse
from support.run import Ranks

TWO = "--recipe lvrpo --think 0 --ask 0 --edit 0 --accuracy 0 --kn 0 --draw 2 --group_size 2 --steps 2"


@pytest.fixture
def small(monkeypatch):
    """One claim of two arms, and one that starts from another's policy."""
    monkeypatch.setattr(claims, "ARMS", {"a": TWO, "b": f"{TWO} --ins 0", "c": f"{TWO} --policy {{a}}"})
    claim = claims.Claim("nobody", "Rules help.", ("a", "b"), ("draw", "loss"), ("a > b : draw",), pictured=True)
    monkeypatch.setattr(claims, "CLAIMS", {"rules": claim})


def test_every_arm_is_a_command_that_parses_and_every_claim_names_arms_that_are():
    assert len(claims.CLAIMS) >= 14
    for claim in claims.CLAIMS.values():
        assert set(claim.arms) <= claims.ARMS.keys()
        for a, sign, b, first, second, by in map(claims.parts_of, claim.compares):
            assert {a, b} <= set(claim.arms) and sign in (">", "~") and {first, second, by or first} <= set(claim.measures)
    for arm in claims.ARMS:
        assert set(claims.needs_of(arm)) <= claims.ARMS.keys()
        for program, *flags in claims.commands(arm, 0, evaluation.Path("out/claims")):
            if program == "train.py":
                check(parse(flags), Ranks(0, 1, torch.device("cpu")))


def test_a_claim_is_added_in_two_places(monkeypatch):
    monkeypatch.setattr(claims, "ARMS", dict(claims.ARMS))
    monkeypatch.setattr(claims, "CLAIMS", dict(claims.CLAIMS))
    exec(re.search(r"^\*\*A claim\*\*.*?```python\n(.*?)```", (claims.ROOT / "docs" / "adding.md").read_text(encoding="utf-8"), re.M | re.S)[1],
         vars(claims))
    assert "kn-helps" in claims.listed() and "The judge alone is not enough." in claims.listed()
    (command,) = claims.commands("draw-kn", 0, evaluation.Path("out/claims"))
    check(parse(command[1:]), Ranks(0, 1, torch.device("cpu")))


def test_two_arms_run_to_a_verdict_a_figure_and_a_page_and_are_not_run_again(small, tmp_path, monkeypatch):
    out, kept = tmp_path / "runs", tmp_path / "kept"
    monkeypatch.setattr(claims, "KEPT", kept)
    told = claims.main(["rules"], 1, 1, 2, out, kept, write_page=False)
    assert told.startswith("rules: cannot tell") and "a > b in draw" in told and "± ?" in told and "died" not in told
    result = json.loads((kept / "rules.json").read_text())
    assert result["arms"]["a"]["command"].startswith("python train.py --recipe lvrpo") and len(result["arms"]["b"]["values"]["draw"]) == 1
    assert result["arms"]["a"]["steps"] == [0, 2] and len(result["arms"]["a"]["values"]["loss"][0]) == 2
    assert (kept / "rules.png").stat().st_size > 5000 and "## rules" in claims.page()
    monkeypatch.setattr(claims.subprocess, "run", None)         # a second call runs nothing
    assert claims.main(["rules"], 1, 1, 2, out, kept, write_page=False) == told
    with monkeypatch.context() as changed:                      # an arm that means something else is another arm
        changed.setitem(claims.ARMS, "a", TWO + " --seed 5")
        assert not claims.finished("a", 0, out.resolve()) and claims.finished("b", 0, out.resolve())
    (kept / "rules.json").write_text((kept / "rules.json").read_text().replace('"seeds": 1', '"seeds": 3'))
    with pytest.raises(ValueError, match="rules.json holds 3 seeds; give --seeds 3 or more, or delete it"):
        claims.main(["rules"], 1, 1, 2, out, kept, write_page=False)
    log = out / "a-0" / "log.jsonl"
    log.write_text("{}\n")
    with pytest.raises(ValueError, match="a-0 is damaged .* delete it, and it is run again"):
        claims.main(["rules"], 1, 1, 2, out, kept, write_page=False)


def test_a_run_that_dies_is_one_line_and_is_run_again_on_request(small, tmp_path, monkeypatch):
    monkeypatch.setitem(claims.ARMS, "b", f"{TWO} --group_size 1")
    monkeypatch.setattr(claims, "CLAIMS", {"rules": claims.Claim("nobody", "", ("b", "c"), ("draw",), ("b > c : draw",))})
    started = []
    real = claims.subprocess.run
    monkeypatch.setattr(claims.subprocess, "run", lambda command, **how: started.append(command[1:3]) or real(
        ["python3", "-c", "import sys; print('--group_size 1: a group needs 2'); sys.exit(1)"], **how))
    for _ in range(2):
        told = claims.main(["rules"], 1, 1, 1, tmp_path / "runs", tmp_path / "kept", write_page=False)
        assert "rules: not all arms are there" in told and "died: b, seed 0: --group_size 1: a group needs 2 (exit 1)" in told
        assert "died: c, seed 0: waits for what died" in told
    assert len(started) == 4                                    # a and b, twice


def test_a_run_goes_on_only_where_it_was_begun_with_the_same_flags(small, tmp_path, monkeypatch):
    """Its own, or those of the arms that it starts from."""
    for arm in "abc":
        (tmp_path / f"{arm}-0").mkdir()
        (tmp_path / f"{arm}-0" / "checkpoint.safetensors").touch()
        for name in ("begun.txt", "done.txt"):
            (tmp_path / f"{arm}-0" / name).write_text(claims.meaning(arm))
    goes_on = lambda: ["--resume" in claims.commands(arm, 0, tmp_path)[0] for arm in "abc"]  # noqa: E731
    assert goes_on() == [True] * 3 and all(claims.finished(arm, 0, tmp_path) for arm in "abc")
    monkeypatch.setitem(claims.ARMS, "a", f"{TWO} --kn 1")
    assert goes_on() == [claims.finished(arm, 0, tmp_path) for arm in "abc"] == [False, True, False]


def test_a_comparison_is_told_as_people_say_it():
    assert claims.told_comparison("a > b : draw") == "a > b in draw"
    assert claims.told_comparison("a > b : variety at draw") == "a > b in variety at equal draw"
    assert claims.told_comparison("a > a : refine, judge - best, judge") == "refine, judge > best, judge"


def test_numbers_that_cannot_work_are_refused(small, tmp_path):
    with pytest.raises(ValueError, match="--seeds 0: must be at least 1"):
        claims.main(["rules"], 0, 1, 1, tmp_path)


def test_an_unknown_claim_is_refused_and_the_list_names_all(capsys):
    with pytest.raises(SystemExit) as error:
        evaluation.main(["claims", "flat-earth"])
    assert "no claim is called flat-earth; the claims are frozen-referee" in str(error.value)
    evaluation.main(["claims", "--list"])
    said = capsys.readouterr().out
    assert all(name in said for name in claims.CLAIMS)


def runs(*values):
    return [{"draw": [0.0, value]} for value in values]


@pytest.mark.parametrize("a, b, sign, verdict", [
    ((0.5, 0.6, 0.55), (0.3, 0.35, 0.33), ">", claims.HOLDS), ((0.3, 0.35, 0.33), (0.5, 0.6, 0.55), ">", claims.FAILS),
    ((0.5, 0.3, 0.4), (0.4, 0.4, 0.38), ">", claims.OPEN), ((0.50, 0.51, 0.52), (0.51, 0.52, 0.53), "~", claims.HOLDS),
    ((0.3, 0.31, 0.32), (0.5, 0.52, 0.51), "~", claims.FAILS), ((0.3, 0.5, 0.4), (0.4, 0.4, 0.42), "~", claims.OPEN)])
def test_a_comparison_is_judged_by_two_standard_errors_of_paired_differences(a, b, sign, verdict):
    assert claims.compared({"x": runs(*a), "y": runs(*b)}, f"x {sign} y : draw")["verdict"] == verdict


def test_variety_is_compared_where_both_arms_reach_the_same_truth():
    slow = {"truth": [0.2, 0.3, 0.4], "variety": [2.0, 1.9, 1.8]}
    fast = {"truth": [0.2, 0.6, 0.5], "variety": [2.0, 1.0, 0.5]}
    assert claims.at_equal(slow, fast, "variety", "truth") == pytest.approx((1.8, 1.5))        # both at 0.4
    assert claims.at_equal(slow, {"truth": [0.2, 0.1], "variety": [2.0, 0.1]}, "variety", "truth") == (2.0, 2.0)
    found = claims.compared({"x": [slow], "y": [fast]}, "x > y : variety at truth")
    assert found["difference"] == pytest.approx(0.3)


def test_an_evaluation_that_one_seed_alone_has_is_left_out():
    stopped = {"minutes": 2.0, "steps": [0, 37, 50], "draw": [0.1, 0.2, 0.3]}
    whole = {"minutes": 1.0, "steps": [0, 50], "draw": [0.1, 0.4]}
    assert claims.at_common_steps([stopped, whole]) == [{"minutes": 2.0, "steps": [0, 50], "draw": [0.1, 0.3]}, whole]


def test_unevenness_over_noisy_steps_is_their_spread_over_their_mean():
    held = {"std/0": [1.0, 2.0], "std/1": [3.0, 2.0], "std": [9.0, 9.0], "other/0": [5.0, 5.0]}
    assert claims.uneven(held, "std") == [0.5, 0.0]
    assert claims.uneven({"clipped/0": [0.0], "clipped/1": [0.0]}, "clipped") == [0.0]


def test_a_table_of_refinement_is_read_over_the_pictures_drawn(tmp_path, monkeypatch):
    (tmp_path / "r-0").mkdir()
    (tmp_path / "r-0" / "minutes.txt").write_text("1.5")
    held = {"refine, judge": [[0.3, 0.1], [0.6, 0.1]], "best, judge": [[0.3, 0.1], [0.5, 0.1]]}
    (tmp_path / "r-0" / "table.json").write_text(json.dumps({"table": held}))
    values = claims.values_of("r", 0, tmp_path)
    assert values["steps"] == [1, 2] and values["refine, judge"] == [0.3, 0.6]
    assert claims.compared({"r": [values]}, "r > r : refine, judge - best, judge")["difference"] == pytest.approx(0.1)
    (tmp_path / "r-0" / "table.json").write_text(json.dumps({"table": {"draw": [0.4, 0.02], "layout_entropy": [2.0, None]}}))
    assert claims.values_of("r", 0, tmp_path) == {"minutes": 1.5, "steps": [1], "draw": [0.4], "layout_entropy": [2.0]}


def test_a_claim_holds_where_all_comparisons_do_and_fails_where_one_does():
    each = lambda *verdicts: claims.verdict_of([{"verdict": v} for v in verdicts])  # noqa: E731
    assert each(claims.HOLDS, claims.HOLDS) == claims.HOLDS and each(claims.HOLDS, claims.OPEN) == claims.OPEN
    assert each(claims.HOLDS, claims.FAILS, claims.OPEN) == claims.FAILS


def test_the_page_is_what_the_kept_results_say():
    assert claims.PAGE.read_text(encoding="utf-8") == claims.page()
    assert claims.summary() in (claims.ROOT / "README.md").read_text(encoding="utf-8")
    for path in claims.KEPT.glob("*.json"):
        held = json.loads(path.read_text(encoding="utf-8"))
        claim = claims.CLAIMS[path.stem]
        assert held["claim"] == path.stem and tuple(held["arms"]) == claim.arms and held["says"] == claim.says and held["seeds"] >= 3
        assert held["verdict"] == claims.verdict_of(held["comparisons"])
        assert tuple(each["comparison"] for each in held["comparisons"]) == claim.compares
        assert {key for result in held["arms"].values() for key in result["values"]} == set(claim.measures)
        for arm, result in held["arms"].items():
            assert result["command"] == claims.command_of(arm), arm

