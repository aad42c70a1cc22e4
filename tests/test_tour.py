"""docs/tour.md is what studies.tour writes: its words exactly, its numbers up to rounding."""

import re
from pathlib import Path

import pytest

from studies import tour

NUMBER = r"-?\d+\.\d+"


def test_the_tour_is_what_its_command_writes(tmp_path):
    page = (Path(tour.__file__).parent.parent / "docs" / "tour.md").read_text(encoding="utf-8")
    ours = tour.page(tour.one_update(0, tmp_path))
    assert re.sub(NUMBER, "#", ours) == re.sub(NUMBER, "#", page)
    numbers = [[float(x) for x in re.findall(NUMBER, text)] for text in (ours, page)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.02)


def test_the_loss_by_hand_is_the_loss(tmp_path):
    page = tour.page(tour.one_update(1, tmp_path))
    by_hand = re.findall(rf"loss    = .* = ({NUMBER})", page)
    returned = re.findall(rf"loss returns ({NUMBER})", page)
    assert by_hand == returned and len(returned) == 2
