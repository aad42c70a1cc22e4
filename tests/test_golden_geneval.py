"""GenEval's rules give every stored verdict of its own code."""

import json
from pathlib import Path

from referees.geneval import geneval_check, relative_position

CHECKS = json.loads((Path(__file__).parent / "golden" / "geneval_checks" / "checks.json").read_text())


def verdict(case):
    things = []
    for name, *box, score, color in (row if len(row) > 6 else [*row, None] for row in case["det"]):
        things.append({"class": name, "box": box, "score": score, "color": color})
    return geneval_check(case["meta"], things)[0]


def test_every_stored_verdict_is_reproduced():
    assert len(CHECKS["cases"]) == 329
    assert sum(case["correct"] for case in CHECKS["cases"]) == 144
    for case in CHECKS["cases"]:
        assert verdict(case) == case["correct"], case


def test_of_equal_scores_the_later_detection_comes_first():
    assert len(CHECKS["equal_score_cases"]) == 3
    for case in CHECKS["equal_score_cases"]:
        assert verdict(case) == case["correct"], case


def test_every_stored_relation_of_two_boxes_is_reproduced():
    assert len(CHECKS["relative_position"]) == 100
    for a, b, relations in CHECKS["relative_position"]:
        assert sorted(relative_position(a, b)) == relations, (a, b)
