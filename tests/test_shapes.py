"""The toy world: its words mean what its pictures show, its splits do not leak, its detector is exact and honest about junk."""
import json
import re
from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from toy import shapes
from referees.geneval import COLORS
from toy.shapes import (CAPTION, CELLS, FAILED, HELD_OUT, LETTERS, LOOK_AGAIN, SHAPES, TAGS,
    THINK, VOCABULARY, Object, answers_of, components, damaged, degrade, describe, discrete,
    diversity, implicit_prompts, layout, make_choice, make_edit, make_question, make_reflection,
    prompts, question_kinds, random_scene, read, render, sample_scene, satisfies, scene_split,
    stated, wrong_answer, wrong_metadata, wrong_thought)
from toy.world import detect

NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}
SPLITS = ("train", "eval")
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@st.composite
def placed_objects(draw, cell):
    radius = draw(st.integers(4, 6))
    jitter = st.integers(-min(2, 7 - radius), min(2, 7 - radius))
    return Object(draw(st.sampled_from(SHAPES)), draw(st.sampled_from(sorted(COLORS))), *cell, draw(jitter), draw(jitter), radius)


scenes = st.lists(st.sampled_from(CELLS), min_size=1, max_size=4, unique=True).flatmap(
    lambda cells: st.tuples(*[placed_objects(cell) for cell in cells]))
everything = st.sampled_from([m for split in SPLITS for m in prompts(split) + implicit_prompts(split)])


def beside(a, relation, b):
    return {"left of": a.col < b.col, "right of": a.col > b.col, "above": a.row < b.row, "below": a.row > b.row}[relation]


def english(prompt, scene):
    """Read an explicit prompt as a person would, nothing more in the picture than it says: an oracle that shares nothing with the
    metadata."""
    prompt = re.sub(r"^an? (photo|picture|drawing|image) of ", "", prompt)
    if found := re.fullmatch(r"an? (\w+) (left of|right of|above|below) an? (\w+)", prompt):
        return len(scene) == 2 and any(beside(a, found[2], b) for a in scene for b in scene if (a.shape, b.shape) == (found[1], found[3]))
    if found := re.fullmatch(r"(two|three|four) (\w+)s", prompt):
        return len(scene) == NUMBERS[found[1]] and all(o.shape == found[2] for o in scene)
    if len(scene) != 1 + prompt.count(" and "):
        return False
    for part in prompt.split(" and "):
        *color, shape = re.fullmatch(r"an? (.+)", part)[1].split()
        if not any(o.shape == shape and color in ([], [o.color]) for o in scene):
            return False
    return True


def answer_of(question, scene):
    """Answer a question from its words alone."""
    if found := re.fullmatch(r"how many (\w+)s \?", question):
        return {v: k for k, v in NUMBERS.items()}[sum(o.shape == found[1] for o in scene)]
    if found := re.fullmatch(r"what color is the (\w+) \?", question):
        (color,) = [o.color for o in scene if o.shape == found[1]]
        return color
    if found := re.fullmatch(r"what (?:shape is|is the shape of the) (\w+) (?:object )?\?", question):
        (shape,) = [o.shape for o in scene if o.color == found[1]]
        return shape
    if found := re.fullmatch(r"is there an? (\w+) (\w+) \?", question):
        return "yes" if any((o.color, o.shape) == found.groups() for o in scene) else "no"
    found = re.fullmatch(r"is the (\w+) (left of|right of|above|below) the (\w+) \?", question)
    (a,), (b,) = ([o for o in scene if o.shape == found[i]] for i in (1, 3))
    return "yes" if beside(a, found[2], b) else "no"


def picture(*parts):
    """An image from (color, y slice, x slice) patches on the ground."""
    image = np.full((32, 32, 3), 245, np.uint8)
    for color, rows, columns in parts:
        image[rows, columns] = COLORS[color] if isinstance(color, str) else color
    return image


# The detector


@given(scenes)
def test_a_rendered_scene_is_read_back_exactly_and_surely(scene):
    found = detect(render(scene))[0]
    assert read(found, 0.95) == read(found, 0.0) == discrete(scene)


@given(scenes)
def test_boxes_are_where_the_shapes_were_drawn(scene):
    boxes = sorted(thing["box"] for thing in detect(render(scene))[0])
    centres = [(8 + 16 * o.col + o.dx, 8 + 16 * o.row + o.dy, o.radius) for o in scene]
    np.testing.assert_allclose(boxes, sorted([x - r, y - r, x + r, y + r] for x, y, r in centres), atol=1)


@given(scenes)
def test_objects_stay_inside_their_quadrant_with_ground_between_them(scene):
    ink = (render(scene) != 245).any(-1)
    assert not ink[[0, 15, 16, 31]].any() and not ink[:, [0, 15, 16, 31]].any()
    assert {(r, c) for r, c in CELLS if ink[16 * r:16 * r + 16, 16 * c:16 * c + 16].any()} == {(o.row, o.col) for o in scene}


@given(scenes, seeds)
def test_mild_blur_and_noise_change_nothing_that_is_read(scene, rng):
    assert read(detect(degrade(render(scene)[None], rng))[0]) == discrete(scene)


def test_confidence_stays_above_nine_tenths_under_mild_blur_and_noise():
    rng = np.random.default_rng(0)
    drawn = [random_scene(rng, split) for split in SPLITS for _ in range(500)]
    worn = detect(degrade(np.stack([render(scene) for scene in drawn]), rng))
    assert np.mean([read(found, 0.9) == discrete(scene) for found, scene in zip(worn, drawn)]) >= 0.998


def test_a_batch_is_read_as_its_images_are_one_by_one():
    rng = np.random.default_rng(1)
    images = degrade(np.stack([render(random_scene(rng)) for _ in range(40)] + [picture(), picture()]), rng)
    assert detect(images) == [detect(image)[0] for image in images]


def test_the_surest_object_comes_first():
    pale = np.rint(245 + 0.65 * (np.array(COLORS["blue"]) - 245))
    image = picture((pale, slice(3, 13), slice(3, 13)), ("red", slice(19, 29), slice(19, 29)))
    assert [thing["color"] for thing in detect(image)[0]] == ["red", "blue"]
    assert [thing["color"] for thing in detect(image[::-1, ::-1])[0]] == ["red", "blue"]


def test_no_image_gives_no_list_and_a_blank_one_an_empty_list():
    assert detect(np.zeros((0, 32, 32, 3), np.uint8)) == []
    assert detect(picture()) == [[]]


def smooth_noise(rng, width):
    """Random colour fields with a correlation length of about `width` pixels, full contrast."""
    waves = np.exp(-20 * width**2 * (np.fft.fftfreq(32)[:, None]**2 + np.fft.fftfreq(32)**2))[None, :, :, None]
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((200, 32, 32, 3)), axes=(1, 2)) * waves, axes=(1, 2)).real
    return np.clip(128 + 90 * field / field.std(), 0, 255).astype(np.uint8)


def ramps(colors):
    """Each colour (C, 3) fading into the ground from bottom to top: (C, 32, 32, 3)."""
    share = np.linspace(0, 1, 32)[None, :, None, None]
    return (share * np.array(colors)[:, None, None] + (1 - share) * 245).repeat(32, 2).astype(np.uint8)


everywhere, box, inner = slice(None), slice(3, 13), slice(5, 11)
JUNK = {
    "uniform noise": lambda rng: rng.integers(0, 256, (100, 32, 32, 3)).astype(np.uint8),
    "smooth noise": lambda rng: np.concatenate([smooth_noise(rng, width) for width in (0.5, 1, 2, 3)]),
    "fills": lambda rng: np.stack([picture((c, everywhere, everywhere)) for c in [*COLORS, (0, 0, 0), (128, 128, 128)]]),
    "ramps": lambda rng: ramps([*COLORS.values(), (0, 0, 0)]),
    "stripes": lambda rng: picture(*[("red", slice(y, y + 2), everywhere) for y in range(0, 32, 4)])[None],
    "specks": lambda rng: picture(*[("blue", slice(y, y + 3), slice(x, x + 3)) for y in (1, 9, 20) for x in (3, 9, 20)])[None],
    "crumb": lambda rng: picture(("red", slice(4, 8), slice(4, 8)))[None],
    "neither circle nor square": lambda rng: picture(("red", slice(4, 12), inner), ("red", inner, slice(4, 12)))[None],
    "upside-down triangle": lambda rng: render([Object("triangle", "red", 0, 0)])[None, 15::-1].repeat(2, 1),
    "flat ellipse": lambda rng: render([Object("circle", "red", 0, 0, radius=6)])[None, [*range(0, 16, 2), *[31] * 24]],
    "bar": lambda rng: picture(("green", slice(3, 7), slice(2, 14)))[None],
    "black square": lambda rng: picture(((10, 10, 10), box, box))[None],
    "grey square": lambda rng: picture(((110, 110, 110), box, box))[None],
    "square of two colours": lambda rng: picture(("red", slice(3, 8), box), ("blue", slice(8, 13), box))[None],
    "square between yellow and orange": lambda rng: picture(((245, 175, 20), box, box))[None],
    "square on a stained ground": lambda rng: picture(((245, 180, 180), everywhere, everywhere), ("red", box, box))[None],
    "square as large as the image": lambda rng: picture(("red", slice(2, 30), slice(2, 30)))[None],
    "ring": lambda rng: picture(("red", slice(2, 14), slice(2, 14)), ((245, 245, 245), slice(4, 12), slice(4, 12)))[None],
}


@pytest.mark.parametrize("name", JUNK)
def test_junk_gives_no_object(name):
    images = JUNK[name](np.random.default_rng(0))
    assert [read(found) for found in detect(images)] == [()] * len(images)


@given(scenes)
def test_a_fading_shape_loses_confidence_steadily(scene):
    scores = []
    for strength in (1.0, 0.75, 0.65, 0.55, 0.3):
        found = detect(np.rint(245 + strength * (render(scene).astype(float) - 245)).astype(np.uint8))[0]
        scores.append(max([thing["score"] for thing in found], default=0.0))
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.95 and scores[3] < 0.3


def test_detect_refuses_images_that_are_not_bytes_of_the_right_size():
    for images in (np.zeros((2, 32, 32, 3)), np.zeros((2, 3, 32, 32), np.uint8), np.zeros((2, 16, 16, 3), np.uint8)):
        with pytest.raises(ValueError, match="detect"):
            detect(images)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.95))
def test_components_are_those_of_a_flood_fill(seed, density):
    mask = np.random.default_rng(seed).random((3, 7, 9)) < density
    filled, count = np.full(mask.shape, -1), 0
    for start in np.argwhere(mask):
        queue = deque([tuple(start)] if filled[tuple(start)] < 0 else [])
        count += len(queue)
        while queue:
            n, y, x = queue.popleft()
            if 0 <= y < 7 and 0 <= x < 9 and mask[n, y, x] and filled[n, y, x] < 0:
                filled[n, y, x] = count - 1
                queue.extend([(n, y + 1, x), (n, y - 1, x), (n, y, x + 1), (n, y, x - 1)])
    labels = components(mask)
    assert len(set(zip(labels.tolist(), filled[mask].tolist()))) == count
    assert sorted(set(labels.tolist())) == list(range(count))


# Prompts and scenes


@given(everything, scenes)
def test_metadata_means_what_its_words_say(metadata, scene):
    words = metadata["thought"].split(" </think> ")[1] if "implicit" in metadata else metadata["prompt"]
    assert satisfies(metadata, discrete(scene)) == english(words, scene)


@given(everything, seeds, st.booleans())
def test_sampled_scenes_satisfy_their_metadata_with_no_other_object(metadata, rng, training):
    scene = sample_scene(metadata, rng, training=training)
    assert satisfies(metadata, discrete(scene))
    assert Counter(o.shape for o in scene) == Counter({c["class"]: c["count"] for c in metadata["include"]})
    assert len({(o.row, o.col) for o in scene}) == len(scene)


@pytest.mark.parametrize("metadata", [m for m in prompts("train") if m["tag"] == "counting"], ids=lambda m: m["prompt"])
def test_a_counting_prompt_wants_neither_more_nor_fewer(metadata):
    wanted = metadata["include"][0]
    objects = [(wanted["class"], "red", *cell) for cell in CELLS]
    assert satisfies(metadata, objects[:wanted["count"]])
    assert not satisfies(metadata, objects[:wanted["count"]] + objects[:1])
    assert not satisfies(metadata, objects[:wanted["count"] - 1])


@given(st.sampled_from([m for m in prompts("train") if m["tag"] == "position"]), seeds)
def test_position_scenes_pass_genevals_rule_on_boxes(metadata, rng):
    anchor, named = metadata["include"]
    boxes = {thing["class"]: np.array(thing["box"]) for thing in detect(render(sample_scene(metadata, rng)))[0]}
    a, b = boxes[named["class"]], boxes[anchor["class"]]
    offset = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    beyond = np.abs(offset) - 0.1 * (a[2:] - a[:2] + b[2:] - b[:2])
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[named["position"][0]]
    assert sign * offset[axis] > 0 and beyond[axis] / np.linalg.norm(offset) > 0.5


def test_every_layout_that_a_prompt_allows_is_drawn():
    rng = np.random.default_rng(0)
    for tag, cells in {"single_object": 4, "two_object": 12, "colors": 4, "position": 4, "color_attr": 12}.items():
        metadata = next(m for m in prompts("train") if m["tag"] == tag)
        assert len({tuple((o.row, o.col) for o in sample_scene(metadata, rng)) for _ in range(400)}) == cells


def test_all_six_tags_are_in_both_splits_and_in_genevals_format():
    for split in SPLITS:
        assert {m["tag"] for m in prompts(split)} == set(TAGS)
        assert json.loads(json.dumps(prompts(split))) == prompts(split)
        for m in prompts(split):
            assert {"tag", "include", "prompt"} <= set(m) <= {"tag", "include", "exclude", "prompt", "held_out"}
            named = {s: sum(c["count"] for c in m["include"] if c["class"] == s) for s in SHAPES}
            assert {c["class"]: c["count"] - 1 for c in m["exclude"]} == named
            assert [c for c in m["include"] if "position" in c] == (m["include"][1:] if m["tag"] == "position" else [])


@pytest.mark.parametrize("make", [prompts, implicit_prompts])
def test_no_prompt_string_is_in_both_splits_nor_twice_in_one(make):
    strings = [m["prompt"] for split in SPLITS for m in make(split)]
    assert len(strings) == len(set(strings))


@pytest.mark.parametrize("make", [prompts, implicit_prompts])
def test_prompts_are_the_same_at_every_call_and_not_shared_between_calls(make):
    first = make("train")
    first[0]["include"][0]["class"] = first[1]["prompt"] = "scribbled"
    assert make("train") == make("train") != first
    assert "scribbled" not in json.dumps(make("train"))


def test_a_fact_meets_different_shapes_in_the_two_splits():
    met = {split: {(m["thought"].split(" </think>")[0], m["include"][0]["class"]) for m in implicit_prompts(split)}
           for split in SPLITS}
    assert not met["train"] & met["eval"]
    assert {fact for fact, _ in met["train"]} == {fact for fact, _ in met["eval"]}
    assert len(met["train"] | met["eval"]) == 3 * (len(shapes.COUNT_FACTS) + len(shapes.COLOR_FACTS))


def test_facts_cover_every_count_and_every_colour():
    assert {count for count, _, _ in shapes.COUNT_FACTS} == {2, 3, 4}
    assert {color for color, _ in shapes.COLOR_FACTS} == set(COLORS)


def test_position_and_colour_pairs_of_eval_include_compositions_that_train_never_says_in_either_order():
    for tag in ("position", "color_attr"):
        meaning = {split: {frozenset(words_of(m)) for m in prompts(split) if m["tag"] == tag and "held_out" not in m}
                   for split in SPLITS}
        assert meaning["eval"] - meaning["train"]


def words_of(metadata):
    """The meaning of a two-object prompt, whichever object is said first."""
    a, b = metadata["include"]
    if "position" in b:
        other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        return [(b["class"], b["position"][0], a["class"]), (a["class"], other[b["position"][0]], b["class"])]
    return [(c["color"], c["class"]) for c in (a, b)]


@pytest.mark.parametrize("call", [prompts, implicit_prompts, lambda split: random_scene(np.random.default_rng(0), split)])
def test_an_unknown_split_is_refused(call):
    with pytest.raises(ValueError, match="train"):
        call("test")


# Held-out pairs


def names_held_out(text):
    return any(f"{color} {shape}" in text for color, shape in HELD_OUT)


def holds_held_out(scene):
    return any((o.color, o.shape) in HELD_OUT for o in scene)


def test_held_out_pairs_are_said_in_eval_only_and_are_marked_there():
    for make in (prompts, implicit_prompts):
        assert not any(names_held_out(json.dumps(list(m.values()))) or "held_out" in m for m in make("train"))
        for m in make("eval"):
            assert m.get("held_out", False) == names_held_out(m.get("thought", m["prompt"]))
        assert {(c.get("color"), c["class"]) for m in make("eval") for c in m["include"]} >= set(HELD_OUT)


@given(st.sampled_from(prompts("train") + implicit_prompts("train")), seeds)
def test_nothing_made_for_training_shows_or_says_a_held_out_pair(metadata, rng):
    wrong = wrong_metadata(metadata, rng)
    drawn, scene = sample_scene(wrong, rng), random_scene(rng)
    reflection = make_reflection(metadata, drawn, rng)
    shown = [sample_scene(metadata, rng), drawn, scene, reflection["target"]]
    said = [wrong["prompt"], reflection["text"], make_question(scene, rng)["question"]]
    if "implicit" in metadata:
        said.append(wrong_thought(metadata, rng))
    if len(scene) < 4:
        edit = make_edit(scene, rng)
        shown, said = shown + [edit["target"]], said + [edit["instruction"]]
    assert not any(map(holds_held_out, shown))
    assert not any(map(names_held_out, said))


def test_eval_draws_do_reach_the_held_out_pairs():
    rng, circle = np.random.default_rng(0), prompts("train")[0]
    assert any(holds_held_out(sample_scene(circle, rng, training=False)) for _ in range(100))
    assert any(holds_held_out(random_scene(rng, "eval")) for _ in range(100))
    asked = [make_question(random_scene(rng, "eval"), rng, "exists", training=False) for _ in range(100)]
    assert any(names_held_out(question["question"]) for question in asked)
    edits = [make_edit((Object("circle", "red", 0, 0),), rng, training=False) for _ in range(200)]
    assert any(names_held_out(edit["instruction"]) for edit in edits) and any(holds_held_out(edit["target"]) for edit in edits)


@given(scenes, seeds)
def test_question_scenes_are_split_by_content_alone(scene, rng):
    again = [Object(o.shape, o.color, o.row, o.col) for o in scene[::-1]]
    assert scene_split(again) == scene_split(scene)
    assert scene_split(scene) == "eval" or not holds_held_out(scene)
    for split in SPLITS:
        assert scene_split(random_scene(rng, split)) == split


def test_one_seed_draws_one_scene_and_another_seed_another():
    draw = lambda seed: [sample_scene(m, np.random.default_rng(seed)) for m in prompts("train")]
    assert draw(0) == draw(0) != draw(1)


# Questions


@given(scenes, seeds)
def test_answers_are_those_of_someone_who_reads_the_question(scene, rng):
    for kind in question_kinds(scene):
        asked = make_question(scene, rng, kind)
        assert asked["kind"] == kind
        assert asked["answer"] == answer_of(asked["question"], scene)


@pytest.mark.parametrize("kind", ["exists", "relation"])
def test_yes_and_no_come_equally_often(kind):
    rng = np.random.default_rng(0)
    drawn = (random_scene(rng) for _ in range(4000))
    answers = [make_question(scene, rng, kind)["answer"] for scene in drawn if kind in question_kinds(scene)]
    assert len(answers) > 1000 and abs(answers.count("yes") / len(answers) - 0.5) < 0.04


def test_all_kinds_are_drawn_when_none_is_named():
    rng = np.random.default_rng(0)
    asked = Counter(make_question(random_scene(rng), rng)["kind"] for _ in range(1000))
    assert set(asked) == {"count", "color", "shape", "exists", "relation"} and min(asked.values()) > 50


def test_a_question_that_the_scene_cannot_answer_is_refused():
    twins = (Object("circle", "red", 0, 0), Object("circle", "red", 1, 1))
    for kind in ("color", "shape", "relation", "size"):
        with pytest.raises(ValueError, match=kind):
            make_question(twins, np.random.default_rng(0), kind)


@pytest.mark.parametrize("kind, answers", [
    ("count", list(NUMBERS)), ("color", list(COLORS)), ("shape", SHAPES), ("exists", ["yes", "no"]), ("relation", ["yes", "no"])])
def test_wrong_answers_are_a_fixed_shuffle_of_the_answers_that_leaves_none_in_place(kind, answers):
    wrong = [wrong_answer({"kind": kind, "question": "", "answer": answer}) for answer in answers]
    assert sorted(wrong) == sorted(answers)
    assert all(a != b for a, b in zip(answers, wrong))


def test_the_wrong_count_is_one_more():
    assert [wrong_answer({"kind": "count", "answer": word}) for word in NUMBERS] == ["one", "two", "three", "four", "zero"]


# Wrong supervision


def leaves(metadata):
    return [clause.get(key) for clause in metadata["include"] for key in ("class", "count", "color", "position")]


@given(everything, seeds)
def test_wrong_metadata_contradicts_exactly_one_attribute_and_keeps_tag_and_prefix(metadata, rng):
    before = json.dumps(metadata)
    wrong = wrong_metadata(metadata, rng)
    assert json.dumps(metadata) == before
    assert wrong["tag"] == metadata["tag"]
    assert sum(a != b for a, b in zip(leaves(metadata), leaves(wrong), strict=True)) == 1
    assert len({clause["class"] for clause in wrong["include"]}) == len(wrong["include"])
    if "implicit" not in metadata:
        opening = r"^(an? (photo|picture|drawing|image) of )?"
        assert re.match(opening, wrong["prompt"])[0] == re.match(opening, metadata["prompt"])[0]
    assert not {"implicit", "thought"} & set(wrong)


@given(everything, seeds)
def test_a_scene_of_wrong_metadata_fails_the_right_one_and_shows_the_wrong_words(metadata, rng):
    wrong = wrong_metadata(metadata, rng)
    scene = sample_scene(wrong, rng)
    assert not satisfies(metadata, discrete(scene))
    assert english(wrong["prompt"], scene)


@given(st.sampled_from([m for split in SPLITS for m in implicit_prompts(split)]), seeds)
def test_a_thought_ends_in_the_explicit_prompt_of_its_metadata_and_a_wrong_thought_in_another(metadata, rng):
    thought, wrong = metadata["thought"], wrong_thought(metadata, rng)
    clause = metadata["include"][0]
    shape = clause["class"]
    for text, right in ((thought, True), (wrong, False)):
        fact, prompt = re.fullmatch(r"<think> (.+) </think> (.+)", text).groups()
        value = [word for word in fact.split() if word in COLORS or word in NUMBERS]
        assert len(value) == 1 and value[0] in prompt.split()                  # the prompt follows from the thought
        assert shape in prompt
        said = value[0] if metadata["tag"] == "colors" else NUMBERS[value[0]]
        assert (said == (clause["color"] if metadata["tag"] == "colors" else clause["count"])) == right
    right, other = (text.split(" </think>")[0].split() for text in (thought, wrong))
    assert sum(a != b for a, b in zip(right, other, strict=True)) == 1


# Edits and reflections


@given(scenes, seeds)
def test_an_edit_changes_what_its_instruction_says_and_nothing_else(scene, rng):
    assume(len(scene) < 4)
    edit = make_edit(scene, rng, training=False)
    gone, new = set(scene) - set(edit["target"]), set(edit["target"]) - set(scene)
    if found := re.fullmatch(r"make the (\w+) (\w+)", edit["instruction"]):
        (old,), (o,) = gone, new
        assert (old.shape, o.shape, o.color) == (found[1], found[1], found[2]) and old.color != o.color
        assert (old.row, old.col, old.dx, old.dy, old.radius) == (o.row, o.col, o.dx, o.dy, o.radius)
        assert [p.shape for p in scene].count(old.shape) == 1
    elif found := re.fullmatch(r"remove the (\w+)", edit["instruction"]):
        assert not new and [o.shape for o in gone] == [found[1]]
        assert [p.shape for p in scene].count(found[1]) == 1
    else:
        found = re.fullmatch(r"add an? (\w+) (\w+)", edit["instruction"])
        (o,) = new
        assert not gone and (o.color, o.shape) == found.groups()
        assert (o.row, o.col) not in {(p.row, p.col) for p in scene}
    assert edit["source"] == scene and len(edit["target"]) == len(scene) - len(gone) + len(new) > 0


@given(scenes, seeds)
def test_the_metadata_of_an_edit_accepts_the_target_and_rejects_the_source(scene, rng):
    assume(len(scene) < 4)
    edit = make_edit(scene, rng, training=False)
    assert satisfies(edit["metadata"], discrete(edit["target"]))
    assert not satisfies(edit["metadata"], discrete(scene))


def test_an_edit_of_four_objects_without_a_unique_shape_is_refused():
    with pytest.raises(ValueError, match="make_edit"):
        make_edit(tuple(Object("circle", "red", *cell) for cell in CELLS), np.random.default_rng(0))


@given(st.sampled_from(prompts("train")), scenes, seeds)
def test_a_reflection_repairs_any_scene(metadata, scene, rng):
    reflection = make_reflection(metadata, scene, rng)
    said, prompt = re.fullmatch(r"<think> (.+) </think> (.+)", reflection["text"]).groups()
    right = satisfies(metadata, discrete(scene))
    assert satisfies(metadata, discrete(reflection["target"]))
    assert (said == "it is as it should be") == right == (reflection["target"] == scene)
    assert metadata["prompt"].endswith(prompt)
    if not right:
        assert Counter(o.shape for o in reflection["target"]) == Counter({c["class"]: c["count"] for c in metadata["include"]})
        assert read(detect(render(reflection["target"]))[0]) == discrete(reflection["target"])


@given(st.sampled_from(prompts("train")), seeds)
def test_a_reflection_says_what_is_wrong_and_changes_no_more_than_that(metadata, rng):
    scene = sample_scene(wrong_metadata(metadata, rng), rng)
    reflection = make_reflection(metadata, scene, rng)
    said, before, after = reflection["text"], set(discrete(scene)), set(discrete(reflection["target"]))
    if found := re.search(r"there (?:is|are) (\w+) (\w+?)s? , there should be (\w+)", said):
        have, want = (sum(o[0] == found[2] for o in objects) for objects in (before, after))
        assert (NUMBERS[found[1]], NUMBERS[found[3]]) == (have, want) and have != want
        assert len(before ^ after) == (abs(have - want) if metadata["tag"] == "counting" else 2)
    elif found := re.search(r"the (\w+) is (\w+) , it should be (\w+)", said):
        assert {o[:2] for o in before - after} == {(found[1], found[2])}
        assert {o[:2] for o in after - before} == {(found[1], found[3])}
    else:
        found = re.search(r"the (\w+) should be (left of|right of|above|below) the (\w+)", said)
        a, b = ([o for o in reflection["target"] if o.shape == found[i]][0] for i in (1, 3))
        assert beside(a, found[2], b) and {o[:2] for o in before} == {o[:2] for o in after}


# Vocabulary


@given(seeds)
def test_options_hold_the_right_answer_once_and_no_other_kind(rng):
    question = make_question(random_scene(rng), rng)
    choice = make_choice(question, rng)
    place = LETTERS.index(choice["answer"])
    assert choice["options"][place] == question["answer"] and len(set(choice["options"])) == len(choice["options"]) <= 4
    assert set(choice["options"]) <= set(answers_of(question["kind"]))
    assert choice["question"].startswith(question["question"]) and choice["question"].count("(") == len(choice["options"])


def test_the_right_option_stands_in_every_place():
    rng = np.random.default_rng(0)
    scene = (Object("circle", "red", 0, 0),)
    places = Counter(make_choice(make_question(scene, rng, "color"), rng)["answer"] for _ in range(400))
    assert set(places) == set(LETTERS) and min(places.values()) > 60


@pytest.mark.parametrize("kind, question, answer, sentence", [
    ("count", "how many circles ?", "three", "there are three circles"), ("count", "how many circles ?", "one", "there is one circle"),
    ("color", "what color is the square ?", "red", "the square is red"), ("shape", "what shape is red ?", "square", "the square is red"),
    ("shape", "what is the shape of the red object ?", "square", "the square is red"),
    ("exists", "is there an orange circle ?", "yes", "there is an orange circle"),
    ("exists", "is there an orange circle ?", "no", "there is no orange circle"),
    ("relation", "is the circle left of the square ?", "yes", "the circle is left of the square"),
    ("relation", "is the circle above the square ?", "no", "the circle is not above the square")])
def test_a_question_and_its_answer_make_a_sentence(kind, question, answer, sentence):
    assert stated({"kind": kind, "question": question}, answer) == sentence


@pytest.mark.parametrize("scene, caption", [
    ((Object("square", "red", 0, 0),), "a red square"), ((Object("square", "red", 0, 0), Object("square", "blue", 0, 1)), "two squares"),
    ((Object("square", "red", 0, 0), Object("circle", "orange", 0, 1)), "an orange circle right of a red square"),
    ((Object("square", "red", 0, 0), Object("circle", "blue", 1, 0)), "a blue circle below a red square"),
    ((Object("square", "red", 1, 1, dy=1), Object("circle", "blue", 0, 0)), "a blue circle above a red square"),
    ((Object("triangle", "red", 1, 1), Object("circle", "blue", 0, 0), Object("circle", "blue", 0, 1)), "two circles and a red triangle")])
def test_a_caption_names_everything_once(scene, caption):
    assert describe(scene) == caption


@given(seeds, st.sampled_from(["ground", "shape"]))
def test_damage_shows(rng, what):
    """Specks and haze lie on the ground; a bar leaves the detector fewer whole objects, or a wrong one."""
    scene = random_scene(rng)
    clean, spoiled = render(scene), damaged(scene, rng, what)
    changed = (clean != spoiled).any(-1)
    assert spoiled.dtype == np.uint8 and changed.sum() >= 6
    bare = (clean == 245).all(-1)
    assert (changed & bare).any() if what == "ground" else not (changed & bare).any()


def test_the_vocabulary_is_closed_and_every_word_of_it_is_used():
    rng, texts = np.random.default_rng(0), []
    for split in SPLITS:
        for m in prompts(split) + implicit_prompts(split):
            wrong = wrong_metadata(m, rng)
            texts += [m["prompt"], wrong["prompt"], make_reflection(m, sample_scene(wrong, rng), rng)["text"]]
            texts += [m["thought"], wrong_thought(m, rng)] if "thought" in m else []
        for _ in range(1000):
            scene = random_scene(rng, split)
            asked = make_question(scene, rng, training=False)
            texts += [asked["question"], asked["answer"], wrong_answer(asked), make_reflection(m, scene, rng)["text"]]
            texts += [make_edit(scene, rng, training=False)["instruction"]] if len(scene) < 4 else []
            texts += [make_choice(asked, rng)["question"], stated(asked, asked["answer"]), describe(scene), CAPTION, THINK, LOOK_AGAIN, FAILED]
    used = {word for text in texts for word in text.split(" ")}
    assert used | {"<answer>", "</answer>"} == set(VOCABULARY)
    assert len(VOCABULARY) == len(set(VOCABULARY)) < 130
    assert all(text == text.lower() for text in texts)


# Variety


def quadrant_images(bits):
    return np.stack([render([Object("square", "red", *cell) for i, cell in enumerate(CELLS) if b >> i & 1]) for b in bits])


@given(st.lists(st.integers(0, 15), min_size=4, max_size=4))
def test_the_layout_names_the_occupied_quadrants(bits):
    assert [layout(found) for found in detect(quadrant_images(bits))] == bits


def test_identical_images_have_no_variety_and_unlike_ones_all_of_it():
    same, unlike = quadrant_images([9] * 8), quadrant_images([1, 2, 4, 8, 3, 5, 6, 12])
    assert diversity(same, detect(same), 4) == {"layout_entropy": 0.0, "pairwise_distance": 0.0}
    assert diversity(unlike, detect(unlike), 4)["layout_entropy"] == pytest.approx(2.0)
    assert diversity(unlike, detect(unlike), 8)["layout_entropy"] == pytest.approx(3.0)
    halves = quadrant_images([1, 1, 1, 1, 2, 2, 2, 2])
    assert diversity(halves, detect(halves), 4)["layout_entropy"] == 0.0                        # groups are prompt-major
    assert diversity(halves, detect(halves), 8)["layout_entropy"] == pytest.approx(1.0)


def test_black_against_white_is_the_distance_one():
    images = np.stack([np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)])
    assert diversity(images, [[], []], 2)["pairwise_distance"] == pytest.approx(1.0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(2, 4))
def test_pairwise_distance_is_the_mean_over_pairs_of_a_group(seed, B, G):
    images = np.random.default_rng(seed).integers(0, 256, (B * G, 32, 32, 3)).astype(np.uint8)
    apart = [np.linalg.norm(images[b * G + i].astype(float) - images[b * G + j]) / np.sqrt(32 * 32 * 3) / 255
             for b in range(B) for i in range(G) for j in range(G) if i < j]
    assert diversity(images, [[]] * (B * G), G)["pairwise_distance"] == pytest.approx(np.mean(apart))


def test_diversity_refuses_images_that_do_not_fill_their_groups():
    images = quadrant_images([1, 2, 3])
    for G, found in ((2, [[]] * 3), (1, [[]] * 3), (3, [[]] * 2)):
        with pytest.raises(ValueError, match="multiple of G"):
            diversity(images, found, G)
