"""The toy world: words mean what pictures show, splits do not leak, the detector is exact."""

import json
import re
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from referees.geneval import geneval_check
from toy import shapes
from toy.shapes import (
    CELLS, COLORS, HELD_OUT, LETTERS, SHAPES, SPLITS, TAGS, VOCABULARY, Object, Question, answers_of,
    components, count_of, critique, damage, degrade, describe, detect, discrete, diversity, explicit,
    implicit_prompts, judge_edit, layout, make_choice, make_edit, make_question, make_reflection, place,
    prompts, question_kinds, random_scene, read, render, sample_scene, satisfies, scene_split,
    shows_held_out, statement, wrong_answer, wrong_metadata, wrong_thought)

NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}
seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)


looks = st.sampled_from([(shape, color) for shape in SHAPES for color in COLORS])
scenes = st.dictionaries(st.sampled_from(CELLS), st.tuples(seeds, looks), min_size=1).map(
    lambda chosen: tuple(place(rng, *look, *cell) for cell, (rng, look) in chosen.items()))
explicit_prompts = st.sampled_from([m for split in SPLITS for m in prompts(split)])
riddles = st.sampled_from([m for split in SPLITS for m in implicit_prompts(split)])
everything = explicit_prompts | riddles


# ---- oracles: they read words and scenes as a person does, and know nothing of metadata ----


def is_placed(a, relation, b):
    return {"left of": a.col < b.col, "right of": a.col > b.col,
            "above": a.row < b.row, "below": a.row > b.row}[relation]


def is_true(prompt, scene):
    """Whether a scene shows what an explicit prompt says, and nothing more."""
    prompt = re.sub(r"^an? (photo|picture|drawing|image) of ", "", prompt)
    if found := re.fullmatch(r"an? (\w+) (left of|right of|above|below) an? (\w+)", prompt):
        firsts, seconds = ([o for o in scene if o.shape == found[i]] for i in (1, 3))
        return len(scene) == 2 and any(is_placed(a, found[2], b) for a in firsts for b in seconds)
    if found := re.fullmatch(r"(two|three|four) (\w+)s", prompt):
        return len(scene) == NUMBERS[found[1]] == count_of(scene, found[2])
    parts = prompt.split(" and ")
    for part in parts:
        *color, shape = re.fullmatch(r"an? (.+)", part)[1].split()
        if not any(o.shape == shape and color in ([], [o.color]) for o in scene):
            return False
    return len(scene) == len(parts)


def answer_to(question, scene):
    if found := re.fullmatch(r"how many (\w+)s \?", question):
        return list(NUMBERS)[count_of(scene, found[1])]
    if found := re.fullmatch(r"what .*?(color|shape).*? (\w+) (?:object )?\?", question):
        (named,) = [o for o in scene if found[2] in (o.shape, o.color)]
        return getattr(named, found[1])
    if found := re.fullmatch(r"is there an? (\w+) (\w+) \?", question):
        return "yes" if found.groups() in [(o.color, o.shape) for o in scene] else "no"
    found = re.fullmatch(r"is the (\w+) (left of|right of|above|below) the (\w+) \?", question)
    (a,), (b,) = ([o for o in scene if o.shape == found[i]] for i in (1, 3))
    return "yes" if is_placed(a, found[2], b) else "no"


# ---- the detector ----


def detect_one(image):
    (found,) = detect(image[None])
    return found


def picture(*parts):
    """An image from (color, y slice, x slice) patches on the ground."""
    image = np.full((32, 32, 3), 245, np.uint8)
    for color, rows, columns in parts:
        image[rows, columns] = color
    return image


@given(scenes)
def test_a_rendered_scene_is_read_back_exactly_and_surely(scene):
    found = detect_one(render(scene))
    assert read(found, 0.95) == read(found, 0.0) == discrete(scene)


@given(scenes)
def test_boxes_are_where_the_shapes_were_drawn(scene):
    boxes = sorted(thing["box"] for thing in detect_one(render(scene)))
    drawn = sorted([o.x - o.radius, o.y - o.radius, o.x + o.radius, o.y + o.radius] for o in scene)
    np.testing.assert_allclose(boxes, drawn, atol=1)


@given(scenes, seeds)
def test_mild_blur_and_noise_change_nothing_that_is_read(scene, rng):
    assert read(detect(degrade(render(scene)[None], rng))[0]) == discrete(scene)


def test_a_batch_is_read_as_its_images_are_one_by_one_the_surest_object_first():
    rng = np.random.default_rng(1)
    drawn = [render(random_scene(rng)) for _ in range(40)]
    images = degrade(np.stack([*drawn, picture(), picture()]), rng)
    found = detect(images)
    assert found == [detect_one(image) for image in images]
    for things in found:
        assert things == sorted(things, key=lambda thing: -thing["score"])
    assert detect(images[:0]) == []


red, box, whole = COLORS["red"], slice(3, 13), slice(None)
JUNK = {
    "only colour": [(red, whole, whole)],
    "stripes": [(red, slice(y, y + 2), whole) for y in range(0, 32, 4)],
    "a crumb": [(red, slice(4, 8), slice(4, 8))],
    "a ring": [(red, box, box), (245, slice(5, 11), slice(5, 11))],
    "a grey square": [(110, box, box)],
    "a square between yellow and orange": [((245, 175, 20), box, box)],
    "a stained ground": [((245, 180, 180), whole, whole), (red, box, box)],
    "a square as large as the image": [(red, slice(2, 30), slice(2, 30))]}


@pytest.mark.parametrize("parts", JUNK.values(), ids=JUNK)
def test_junk_gives_no_object(parts):
    assert not read(detect_one(picture(*parts)))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_patches_of_random_colours_give_no_object(size):
    patches = np.random.default_rng(0).integers(0, 256, (100, 32 // size, 32 // size, 3))
    images = patches.repeat(size, 1).repeat(size, 2).astype(np.uint8)
    assert not any(map(read, detect(images)))


def test_a_triangle_upside_down_is_no_object():
    assert not read(detect_one(render([Object("triangle", "red", 0, 0)])[::-1]))


@given(scenes)
def test_a_fading_shape_loses_confidence_steadily(scene):
    scores = []
    for strength in (1.0, 0.75, 0.65, 0.55, 0.3):
        pale = 245 + strength * (render(scene).astype(float) - 245)
        found = detect_one(np.rint(pale).astype(np.uint8))
        scores.append(max([thing["score"] for thing in found], default=0.0))
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0.95
    assert scores[3] < 0.3


@pytest.mark.parametrize("images", [np.zeros((2, 32, 32, 3)), np.zeros((2, 3, 32, 32), np.uint8)])
def test_detect_refuses_images_that_are_not_bytes_of_the_right_size(images):
    with pytest.raises(ValueError, match="detect"):
        detect(images)


@given(seeds, st.floats(0.1, 0.95))
def test_pixels_share_a_component_if_a_path_of_neighbours_joins_them(rng, density):
    mask = rng.random((2, 6, 7)) < density
    pixels = np.argwhere(mask) * [9, 1, 1]                      # those of two images are far apart
    near = abs(pixels[:, None] - pixels).sum(-1) <= 1
    paths = np.linalg.matrix_power(near.astype(float), 42) > 0
    labels = components(mask)
    np.testing.assert_array_equal(labels[:, None] == labels, paths)
    assert sorted(set(labels)) == list(range(len(set(labels))))


@given(scenes, seeds, st.sampled_from(["ground", "shape"]))
def test_damage_of_the_ground_and_of_a_shape_shows_there(scene, rng, what):
    clean = render(scene)
    changed = (clean != damage(scene, rng, what)).any(-1)
    bare = (clean == 245).all(-1)
    assert changed.sum() >= 6
    assert (changed & bare).any() == (what == "ground")


# ---- prompts and scenes ----


@given(everything, scenes)
def test_metadata_means_what_its_words_say(metadata, scene):
    words = metadata.get("thought", metadata["prompt"]).split(" </think> ")[-1]
    assert satisfies(metadata, discrete(scene)) == is_true(words, scene)


@given(everything, seeds, st.booleans())
def test_sampled_scenes_show_their_metadata_and_pass_genevals_rule_on_boxes(metadata, rng, training):
    scene = sample_scene(metadata, rng, training=training)
    assert is_true(explicit(metadata), scene)
    assert len({(o.row, o.col) for o in scene}) == len(scene)
    assert geneval_check(metadata, detect_one(render(scene)))[0]


def test_every_layout_that_a_prompt_allows_is_drawn():
    rng = np.random.default_rng(0)
    for tag, layouts in {"single_object": 4, "two_object": 12, "position": 4}.items():
        metadata = next(m for m in prompts("train") if m["tag"] == tag)
        drawn = [sample_scene(metadata, rng) for _ in range(400)]
        assert len({tuple((o.row, o.col) for o in scene) for scene in drawn}) == layouts


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_have_genevals_format_and_all_six_tags(split):
    assert json.loads(json.dumps(prompts(split))) == prompts(split)
    assert {m["tag"] for m in prompts(split)} == set(TAGS)
    for m in prompts(split):
        assert set(m) - {"held_out"} == {"tag", "include", "exclude", "prompt"}
        assert {c["class"] for c in m["exclude"]} == set(SHAPES)


@pytest.mark.parametrize("make", [prompts, implicit_prompts, lambda split: random_scene(None, split)])
def test_a_split_that_is_not_there_is_refused(make):
    with pytest.raises(ValueError, match='split is "test"'):
        make("test")


@pytest.mark.parametrize("make", [prompts, implicit_prompts])
def test_prompt_strings_are_unique_over_both_splits_and_the_lists_are_not_shared(make):
    strings = [m["prompt"] for split in SPLITS for m in make(split)]
    assert len(strings) == len(set(strings))
    make("train")[0]["include"][0]["class"] = "scribbled"
    assert "scribbled" not in json.dumps(make("train"))


def test_a_fact_meets_different_shapes_in_the_two_splits():
    train, evaluation = (
        {(m["thought"].split(" </think>")[0], m["include"][0]["class"]) for m in implicit_prompts(split)}
        for split in SPLITS)
    assert not train & evaluation
    assert {fact for fact, _ in train} == {fact for fact, _ in evaluation}


@pytest.mark.parametrize("tag", ["position", "color_attr"])
def test_eval_has_compositions_that_train_never_says_in_either_order(tag):
    rng = np.random.default_rng(0)
    train = [m for m in prompts("train") if m["tag"] == tag]
    unlike = [m for m in prompts("eval")[::3] if m["tag"] == tag and "held_out" not in m]
    shown = [discrete(sample_scene(m, rng)) for m in unlike]
    assert any(not any(satisfies(m, things) for m in train) for things in shown)


# ---- held-out pairs ----


def names_held_out(text):
    return any(f"{color} {shape}" in text for color, shape in HELD_OUT)


@pytest.mark.parametrize("make", [prompts, implicit_prompts])
def test_held_out_pairs_are_said_in_eval_only_and_are_marked_there(make):
    for m in make("train"):
        assert "held_out" not in m
        assert not names_held_out(json.dumps(list(m.values())))
    for m in make("eval"):
        assert m.get("held_out", False) == names_held_out(m.get("thought", m["prompt"]))
    assert {(c.get("color"), c["class"]) for m in make("eval") for c in m["include"]} >= set(HELD_OUT)


def make_everything(metadata, scene, rng, training):
    """(scenes, texts): all that the toy makes of a prompt and a scene."""
    wrong, question = wrong_metadata(metadata, rng), make_question(scene, rng, training=training)
    drawn = [sample_scene(m, rng, training=training) for m in (metadata, wrong)]
    reflection, repaired = make_reflection(metadata, drawn[1], rng)
    texts = [metadata["prompt"], wrong["prompt"], reflection, question.text, describe(scene)]
    texts += [make_choice(question, rng).text, statement(question, question.answer), wrong_answer(question)]
    if "thought" in metadata:
        texts += [metadata["thought"], wrong_thought(metadata, rng)]
    edits = [make_edit(scene, rng)] if len(scene) < 4 else []
    scenes = [*drawn, scene, repaired, *(edit.target for edit in edits)]
    return scenes, texts + [edit.instruction for edit in edits]


@given(st.sampled_from(prompts("train") + implicit_prompts("train")), seeds)
def test_nothing_made_for_training_shows_or_says_a_held_out_pair(metadata, rng):
    shown, texts = make_everything(metadata, random_scene(rng), rng, training=True)
    assert not any(map(shows_held_out, shown))
    assert not any(map(names_held_out, texts))


def test_eval_draws_reach_the_held_out_pairs_among_others():
    rng, circle = np.random.default_rng(0), prompts("train")[0]
    shown = [random_scene(rng, "eval") for _ in range(200)]
    assert any(shows_held_out(sample_scene(circle, rng, training=False)) for _ in range(100))
    assert any(map(shows_held_out, shown))
    assert not all(map(shows_held_out, shown))
    assert any(names_held_out(make_question(scene, rng, "exists", training=False).text) for scene in shown)


@given(scenes, seeds, st.sampled_from(SPLITS))
def test_scenes_are_split_by_content_alone(scene, rng, split):
    again = [Object(o.shape, o.color, o.row, o.col) for o in scene[::-1]]
    assert scene_split(again) == scene_split(scene)
    assert scene_split(scene) == "eval" or not shows_held_out(scene)
    assert scene_split(random_scene(rng, split)) == split


# ---- questions, options, captions ----


@given(scenes, seeds)
def test_answers_are_those_of_someone_who_reads_the_question(scene, rng):
    for kind in question_kinds(scene):
        question = make_question(scene, rng, kind)
        assert question.kind == kind
        assert question.answer == answer_to(question.text, scene)


def test_all_kinds_are_drawn_and_yes_and_no_come_equally_often():
    rng = np.random.default_rng(0)
    questions = [make_question(random_scene(rng), rng) for _ in range(6000)]
    drawn = Counter((question.kind, question.answer) for question in questions)
    for kind in ("exists", "relation"):
        yes, no = drawn[kind, "yes"], drawn[kind, "no"]
        assert abs(yes / (yes + no) - 0.5) < 0.06
    assert {kind for kind, _ in drawn} == {"count", "color", "shape", "exists", "relation"}


@pytest.mark.parametrize("kind", ["count", "color", "shape", "exists"])
def test_wrong_answers_are_a_fixed_shuffle_of_the_answers_that_leaves_none_in_place(kind):
    wrong = {answer: wrong_answer(Question(kind, "", answer, ())) for answer in answers_of(kind)}
    assert sorted(wrong.values()) == sorted(wrong)
    assert all(right != other for right, other in wrong.items())


@given(scenes, seeds)
def test_options_hold_the_right_answer_once_and_others_of_its_kind(scene, rng):
    question = make_question(scene, rng)
    choice = make_choice(question, rng)
    lettered = dict(zip(LETTERS, choice.options))
    assert lettered[choice.answer] == question.answer
    assert len(set(choice.options)) == len(choice.options)
    assert set(choice.options) <= set(answers_of(question.kind))
    assert choice.text == " ".join([question.text, *map(" ".join, lettered.items())])


def test_the_right_option_stands_in_every_place():
    rng = np.random.default_rng(0)
    question = make_question((Object("circle", "red", 0, 0),), rng, "color")
    places = Counter(make_choice(question, rng).answer for _ in range(400))
    assert min(places[letter] for letter in LETTERS) > 60


@pytest.mark.parametrize("kind, about, answer, sentence", [
    ("count", ["circle"], "three", "there are three circles"),
    ("count", ["circle"], "one", "there is one circle"),
    ("color", ["square"], "red", "the square is red"), ("shape", ["red"], "square", "the square is red"),
    ("exists", ["orange", "circle"], "yes", "there is an orange circle"),
    ("exists", ["orange", "circle"], "no", "there is no orange circle"),
    ("relation", ["circle", "left of", "square"], "yes", "the circle is left of the square"),
    ("relation", ["circle", "above", "square"], "no", "the circle is not above the square")])
def test_a_question_and_its_answer_make_a_sentence(kind, about, answer, sentence):
    assert statement(Question(kind, "", answer, about), answer) == sentence


@pytest.mark.parametrize("objects, caption", [
    ([("square", "red", 0, 0)], "a red square"),
    ([("square", "red", 0, 0), ("circle", "orange", 0, 1)], "an orange circle right of a red square"),
    ([("square", "red", 1, 1, 0, 1), ("circle", "blue", 0, 0)], "a blue circle above a red square"),
    ([("triangle", "red", 1, 1), ("circle", "red", 0, 0), ("circle", "blue", 0, 1)],
     "two circles and a red triangle")])
def test_a_caption_names_everything_once(objects, caption):
    assert describe(tuple(Object(*each) for each in objects)) == caption


# ---- wrong supervision ----


@given(everything, seeds)
def test_wrong_metadata_contradicts_exactly_one_attribute_and_keeps_tag_and_prefix(metadata, rng):
    before = json.dumps(metadata)
    wrong = wrong_metadata(metadata, rng)
    assert json.dumps(metadata) == before
    assert wrong["tag"] == metadata["tag"]
    differ = [key for old, new in zip(metadata["include"], wrong["include"], strict=True)
              for key in ("class", "count", "color", "position") if old.get(key) != new.get(key)]
    assert len(differ) == 1
    if "thought" not in metadata:
        prefix = wrong["prompt"].removesuffix(explicit(wrong))
        assert metadata["prompt"] == prefix + explicit(metadata)
    assert "thought" not in wrong


@given(everything, seeds)
def test_a_scene_of_wrong_metadata_fails_the_right_one_and_shows_the_wrong_words(metadata, rng):
    wrong = wrong_metadata(metadata, rng)
    scene = sample_scene(wrong, rng)
    assert not satisfies(metadata, discrete(scene))
    assert is_true(wrong["prompt"], scene)


@given(riddles, seeds)
def test_a_thought_leads_to_its_explicit_prompt_and_a_wrong_thought_to_another(metadata, rng):
    thoughts = metadata["thought"], wrong_thought(metadata, rng)
    values = []
    for thought in thoughts:
        fact, prompt = re.fullmatch(r"<think> (.+) </think> (.+)", thought).groups()
        (value,) = [word for word in fact.split() if word in COLORS or word in NUMBERS]
        assert value in prompt.split()                          # the prompt follows from the thought
        values.append((value, fact.replace(value, ""), prompt))
    (right, fact, prompt), (wrong, same_fact, other) = values
    assert right != wrong
    assert fact == same_fact
    assert prompt == explicit(metadata) != other


# ---- edits and reflections ----


@given(scenes, seeds)
def test_an_edit_changes_what_its_instruction_says_and_nothing_else(scene, rng):
    assume(len(scene) < 4)
    edit = make_edit(scene, rng)
    gone, new = set(scene) - set(edit.target), set(edit.target) - set(scene)
    verb, *_, named, last = edit.instruction.split()
    if verb == "make":
        (old,), (made,) = gone, new
        assert made == old._replace(color=last)
        assert old.shape == named
        assert count_of(scene, named) == 1
    elif verb == "remove":
        (old,) = gone
        assert (old.shape, new) == (last, set())
        assert count_of(scene, last) == 1
    else:
        (made,) = new
        assert (made.color, made.shape, gone) == (named, last, set())
        assert (made.row, made.col) not in {(o.row, o.col) for o in scene}
    assert edit.source == scene


@given(scenes, seeds)
def test_the_target_of_an_edit_is_right_and_its_source_is_wrong(scene, rng):
    assume(len(scene) < 4)
    edit = make_edit(scene, rng)
    source, target = discrete(scene), discrete(edit.target)
    assert satisfies(edit.metadata, target)
    assert not satisfies(edit.metadata, source)
    assert judge_edit(source, target, target) == (True, True)
    assert judge_edit(source, target, source) == (False, True)


def test_an_edit_of_four_objects_without_a_unique_shape_is_refused():
    with pytest.raises(ValueError, match="make_edit"):
        make_edit(tuple(Object("circle", "red", *cell) for cell in CELLS), np.random.default_rng(0))


@given(st.sampled_from(prompts("train")), scenes, seeds)
def test_a_reflection_repairs_any_scene_and_leaves_a_right_one(metadata, scene, rng):
    reflection, repaired = make_reflection(metadata, scene, rng)
    right = satisfies(metadata, discrete(scene))
    diagnosis, prompt = re.fullmatch(r"<think> (.+) </think> (.+)", reflection).groups()
    assert (diagnosis == shapes.RIGHT) == right == (repaired == scene)
    assert prompt == explicit(metadata)
    assert satisfies(metadata, discrete(repaired))


@given(st.sampled_from(prompts("train")), seeds)
def test_a_diagnosis_is_true_of_the_picture(metadata, rng):
    things = discrete(sample_scene(wrong_metadata(metadata, rng), rng))
    diagnosis = critique(metadata, things)
    if found := re.fullmatch(r"there (?:is|are) (\w+) (\w+?)s? , there should be (\w+)", diagnosis):
        wanted = shapes.wanted_count(metadata["include"], found[2])
        assert NUMBERS[found[1]] == count_of(things, found[2]) != wanted == NUMBERS[found[3]]
    elif found := re.fullmatch(r"the (\w+) is (\w+) , it should be (\w+)", diagnosis):
        assert found.groups()[1::-1] in [(thing.color, thing.shape) for thing in things]
        assert f"{found[3]} {found[1]}" in metadata["prompt"]
    else:
        found = re.fullmatch(r"the (\w+) should be (left of|right of|above|below) the (\w+)", diagnosis)
        (a,), (b,) = ([thing for thing in things if thing.shape == found[i]] for i in (1, 3))
        assert not is_placed(a, found[2], b)


def test_the_vocabulary_is_closed_and_every_word_of_it_is_used():
    rng = np.random.default_rng(0)
    texts = [shapes.CAPTION, shapes.THINK, shapes.LOOK_AGAIN, "<answer> </answer>"]
    texts.append("this is wrong")                               # of pretraining alone
    for split in SPLITS:
        for m in prompts(split) + implicit_prompts(split):
            texts += make_everything(m, random_scene(rng, split), rng, training=False)[1]
    assert {word for text in texts for word in text.split(" ")} == set(VOCABULARY)
    assert len(VOCABULARY) == len(set(VOCABULARY))


# ---- variety ----


def quadrant_images(bits):
    squares = [Object("square", "red", *cell) for cell in CELLS]
    scenes = [[square for i, square in enumerate(squares) if b >> i & 1] for b in bits]
    return np.stack([render(scene) for scene in scenes])


def test_the_layout_names_the_occupied_quadrants():
    assert [layout(found) for found in detect(quadrant_images(range(16)))] == list(range(16))


@pytest.mark.parametrize("bits, G, entropy", [
    ([1, 2, 4, 8, 3, 5, 6, 12], 8, 3.0), ([1] * 4 + [2] * 4, 4, 0.0), ([1] * 4 + [2] * 4, 8, 1.0)])
def test_layout_entropy_counts_the_layouts_of_each_group(bits, G, entropy):
    images = quadrant_images(bits)
    assert diversity(images, detect(images), G)["layout_entropy"] == pytest.approx(entropy)


@given(seeds, st.integers(1, 3), st.integers(2, 4))
def test_pairwise_distance_is_the_mean_over_pairs_of_a_group(rng, B, G):
    images = rng.integers(0, 256, (B * G, 32, 32, 3)).astype(np.uint8)
    groups = images.reshape(B, G, -1) / 255
    apart = [np.linalg.norm(a - b) for group in groups for a, b in permutations(group, 2)]
    measured = diversity(images, [[]] * len(images), G)["pairwise_distance"]
    assert measured == pytest.approx(np.mean(apart) / 3072**0.5)
