"""Edits: what is true of an edited picture, what its row holds, and how rows of files become
edits.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import ALONE, settings, write_rows

from rewards import Samples
from tasks import TASKS, Source, truth_and_variety
from toy import shapes, world
from toy.shapes import Thing, judge_edit

# ---- what is true of an edited picture ----


@given(st.integers(0, 10**6))
def test_an_edit_that_loses_or_brings_something_else_keeps_not_all(seed):
    edit = world.toy_edit(np.random.default_rng(seed)).metadata
    source, target = edit["source"], edit["target"]
    stranger = Thing("square", "purple", 9, 9)
    if others := sorted(set(source) & set(target)):
        lost = [thing for thing in target if thing != others[0]]
        assert judge_edit(source, target, lost) == (True, False)
    if stranger.shape not in edit["prompt"]:
        assert not judge_edit(source, target, [*target, stranger])[1]
    assert judge_edit(source, target, ()) == (edit["tag"] == "remove", not others)


def test_an_added_thing_may_stand_anywhere_free_but_only_once():
    circle, square = Thing("circle", "red", 0, 0), Thing("square", "blue", 0, 1)
    elsewhere = square._replace(row=1)
    source, target = (circle,), (circle, square)
    assert judge_edit(source, target, (circle, elsewhere)) == (True, True)
    assert judge_edit(source, target, (circle, elsewhere, square)) == (True, False)
    assert judge_edit(source, target, (circle, elsewhere._replace(color="red"))) == (False, False)


def test_the_truth_of_a_picture_is_that_it_changed_and_kept_the_rest():
    """Of the edited picture, of the one before, and of an empty one."""
    circle, square = shapes.Object("circle", "red", 0, 0), shapes.Object("square", "blue", 1, 1)
    edit = shapes.Edit("remove the square", (circle, square), (circle,), {"include": []})
    row = world.edit_row(edit)
    images = world.render_pixels([(circle,), (circle, square), ()]) * 0.5 + 0.5
    samples = Samples([row.text] * 3, [row.metadata] * 3, images=images)
    assert world.edit_truth(samples, world.detect(images)).tolist() == [1, 0, 0]
    logged = truth_and_variety(TASKS["edit"], samples, world.detect, 3)
    assert (logged["changed"], logged["kept"]) == pytest.approx((2 / 3, 2 / 3))


@given(st.integers(0, 10**6))
def test_the_toys_row_holds_the_picture_before_and_a_caption_of_the_picture_after(seed):
    row = world.toy_edit(np.random.default_rng(seed))
    assert shapes.read(world.detect(row.source[None])[0]) == row.metadata["source"]
    target = [shapes.Object(*thing) for thing in row.metadata["target"]]
    assert len(target) == 2 or row.wanted == shapes.describe(target)


# ---- edits of files ----


def source_of(policy, folder, row, *flags):
    path = write_rows(folder / "e.jsonl", {"instruction": "make the circle red"} | row)
    return Source(settings("--edit 2 --ins 0 --edits", path, *flags), policy)


def test_an_edit_of_a_file_is_of_a_square_and_its_truth_is_unknown(policy, tmp_path):
    include = [{"class": "circle"}]
    source = source_of(policy, tmp_path, {"caption": "a red circle", "include": include})
    (batch,) = source.batches(0, ALONE)
    assert batch.task is TASKS["edit"]
    for row in batch.rows:
        assert row.pixels.shape == row.full.shape == (3, 32, 32)
        assert (row.text, row.wanted) == ("make the circle red", "a red circle")
        assert row.metadata["include"] == [{"class": "circle", "count": 1}]
    assert source.detector is None


@pytest.mark.parametrize("row, flags, words", [
    (dict(image="gone.png"), "", "gone.png"),
    ({}, "--sem 1", "--sem compares an edited image with a caption of it"),
    ({}, "--kn 1 --sem 0", "--kn compares an edited image with a caption of it"),
    ({"caption": "a red circle"}, "--ins 1", "--ins reads GenEval's include and exclude")])
def test_an_edit_that_the_rewards_cannot_read_is_refused(policy, tmp_path, row, flags, words):
    with pytest.raises((ValueError, OSError), match=words) as error:
        source_of(policy, tmp_path, row, flags)
    assert "\n" not in str(error.value)
