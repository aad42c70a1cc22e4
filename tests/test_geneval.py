"""GenEval's rules, and the published detectors that they are asked of (referees/geneval.py, detectors.py)."""

import pytest
import tiny_referees
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from referees import detectors
from referees.geneval import (
    COLORS, best_by_class, fraction_kept, geneval_check, relative_position)
from support.rows import RELATIONS
from torchvision.ops import box_convert

CAT = {"include": [{"class": "cat", "count": 1}]}
BOTH = {
    "include": [
        {"class": "dog", "count": 1, "color": "red"},
        {"class": "computer mouse", "count": 2, "color": "blue"}]
}
CLASSES = ["circle", "square"]


def thing(name, x=0, color=None, score=0.9, size=2):
    return {"class": name, "box": [x, 0, x + size, size], "score": score, "color": color}


def beside(circles, squares, position=("left of", 0)):
    """Metadata of circles, and of squares in a relation to them."""
    return {
        "include": [
            {"class": "circle", "count": circles},
            {"class": "square", "count": squares, "position": position}]
    }


def fractions(metadata, detections):
    return geneval_check(metadata, detections)[1]


# ---- rules ----


CORNERS = st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 12)] * 2)
BOXES = CORNERS.map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
COLORED = st.sampled_from(["red", "blue", None])
THINGS = st.fixed_dictionaries({"class": st.sampled_from(CLASSES), "box": BOXES, "color": COLORED})
SCENES = st.lists(THINGS, max_size=5).map(
    lambda things: [{**thing, "score": 0.95 - 0.01 * i} for i, thing in enumerate(things)])


@st.composite
def specifications(draw):
    """Metadata with at most three include clauses, with colours and relations, and an exclude clause."""
    include = []
    for i in range(draw(st.integers(0, 3))):
        clause = {"class": draw(st.sampled_from(CLASSES)), "count": draw(st.integers(1, 2))}
        if color := draw(COLORED):
            clause["color"] = color
        if i and draw(st.booleans()):
            clause["position"] = [draw(st.sampled_from(RELATIONS)), draw(st.integers(0, i - 1))]
        include.append(clause)
    limits = st.fixed_dictionaries({"class": st.sampled_from(CLASSES), "count": st.integers(1, 3)})
    tag = draw(st.sampled_from(["counting", "position"]))
    return {"tag": tag, "include": include, "exclude": draw(st.lists(limits, max_size=1))}


@given(specifications(), SCENES, st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_all_is_kept_exactly_if_the_verdict_is_right_whatever_the_order_of_detections(metadata, scene, rng):
    kept = fraction_kept(metadata, scene)
    assert 0 <= kept <= 1
    assert (kept == 1) == geneval_check(metadata, scene)[0]
    assert fractions(metadata, rng.sample(scene, len(scene))) == fractions(metadata, scene)


def test_the_fraction_is_the_mean_over_clauses_of_the_share_of_right_objects():
    metadata = {
        "include": [{"class": "circle", "count": 4, "color": "red"}, {"class": "square", "count": 1}],
        "exclude": [{"class": "circle", "count": 5}]}
    found = [thing("circle", color=color) for color in ("red", "blue", "red")]
    assert fraction_kept(metadata, found) == pytest.approx((2 / 4 + 0 + 1) / 3)
    assert fraction_kept({}, found) == 1


def test_an_object_must_stand_right_to_every_target_and_there_must_be_a_target():
    metadata, squares = beside(1, 2), [thing("square", 0), thing("square", 40, score=0.8)]
    assert fractions(metadata, [*squares, thing("circle", 20)]) == [1.0, 0.5]
    assert fractions(metadata, squares) == [0.0, 0.0]
    for first, kept in ((0, 0.0), (60, 1.0)):
        assert (
            fractions(beside(2, 1), [thing("square", 20), thing("circle", first), thing("circle", 40)])[1]
            == kept
        )


def test_a_right_place_does_not_forgive_a_wrong_colour():
    right = {"class": "square", "count": 1, "color": "red", "position": ["left of", 0]}
    metadata = {"include": [{"class": "circle", "count": 1}, right]}
    assert fractions(metadata, [thing("circle", 40), thing("square", 0, "red")]) == [1.0, 1.0]
    assert fractions(metadata, [thing("circle", 40), thing("square", 0, "blue")]) == [1.0, 0.0]


def test_a_box_at_the_same_centre_has_no_relation():
    assert relative_position([0, 0, 10, 10], [2, 2, 8, 8]) == set()


# ---- detectors ----


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny_referees.Folders(tmp_path_factory.mktemp("detectors"))


@pytest.fixture(scope="module")
def detector(folders):
    return detectors.load_detector(folders["owlv2"], folders["clip"])


def images(n, size=(48, 40)):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(n))


def is_among(seen, other):
    """Whether all that is seen clearly is among the others, with its score and box."""
    for score, box in zip(seen["scores"], seen["boxes"]):
        same = (other["scores"] - score).abs() < 1e-4
        same &= (other["boxes"] - box).abs().amax(-1) < 1e-2
        if score > detectors.LEAST + 1e-3 and not same.any():
            return False
    return True


def test_boxes_are_in_pixels_of_the_square_to_which_the_longer_side_is_padded(detector):
    find, x = detector.find, images(1)
    text = [["a photo of a cat", "a photo of a dog"]]
    with torch.no_grad():
        read = find.model(**find.processor(images=[x[0]], text=text, do_rescale=False, return_tensors="pt"))
        (seen,) = find.find_boxes(x, ["cat", "dog"])
    theirs = {"scores": read.logits[0].sigmoid().amax(-1), "boxes": 48 * box_convert(
        read.pred_boxes[0], "cxcywh", "xyxy")}
    assert len(seen["scores"])
    assert is_among(seen, theirs)
    assert all(0 <= min(found["box"]) and found["box"][2] <= 40 for found in find(x, [["cat", "dog"]])[0])


def test_a_score_does_not_depend_on_neighbours_and_a_picture_is_asked_for_its_own_classes(detector):
    x = images(3)
    with torch.no_grad():
        together = detector.find.find_boxes(x, ["cat", "dog"])
        for n in range(3):
            (alone,) = detector.find.find_boxes(x[n:n + 1], ["cat", "dog"])
            assert is_among(together[n], alone)
            assert is_among(alone, together[n])
    cat, both, _ = detector(x, [CAT, BOTH, BOTH])
    assert {found["class"] for found in cat} <= {"cat"}
    assert {found["class"] for found in both} <= {"dog", "computer mouse"}


def test_of_boxes_that_overlap_the_best_stays():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 5, 5]]).float()
    scores = torch.tensor([0.5, 0.9, 0.7, 0.8])
    assert detectors.suppress(boxes, scores, torch.zeros(4)) == [1, 3, 2]
    assert detectors.suppress(boxes, scores, torch.tensor([7, 0, 0, 0])) == [1, 3, 2, 0]
    assert detectors.suppress(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0)) == []


RGB = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}


class ClipOfColours:
    """A CLIP that embeds a picture as its mean colour, and a text as the colour that it names."""

    side = 8

    def embed_images(self, images):
        return images.mean((2, 3))

    def embed_texts(self, texts):
        named = [next((RGB[c] for c in RGB if c in text.replace("colored", "")), (0, 0, 0)) for text in texts]
        return torch.tensor(named, dtype=torch.float32)


def test_an_objects_colour_is_that_of_the_square_in_the_middle_of_its_box():
    picture = torch.zeros(3, 20, 40)
    picture[1] = 1                              # a green ground
    picture[:, 5:15, 10:20] = torch.tensor(RGB["red"])[:, None, None]
    crop = detectors.crop_of(picture, {"box": [10.0, 5.0, 20.0, 15.0]})
    assert crop.shape == (3, 10, 10)
    name_colors = detectors.Detector(None, ClipOfColours()).name_colors
    assert name_colors([crop, picture[:, :, 22:]], ["dog", "cat"]) == ["red", "green"]
    assert name_colors([], []) == []
    assert detectors.crop_of(picture, {"box": [40.0, 20.0, 40.0, 20.0]}).shape == (3, 1, 1)


def test_only_objects_that_a_clause_judges_get_a_colour(detector):
    found = detector(images(2), [BOTH, CAT])
    for name, count in (("dog", 1), ("computer mouse", 2)):
        best = best_by_class(BOTH, found[0], **detector.thresholds).get(name, [])
        assert all("color" in each for each in best[:count])
        assert not any("color" in each for each in best[count:])
    assert not any("color" in each for each in found[1])


def test_a_class_of_more_tokens_than_the_detector_reads_is_refused_before_a_run(detector):
    with pytest.raises(ValueError, match=r"the detector reads \d+ tokens, and .* has \d+; give"):
        detector.check([{"include": [{"class": "cat dog " * 200, "count": 1}]}])


def test_a_colour_that_geneval_does_not_know_and_a_model_of_another_kind_are_refused(detector, folders):
    detector.check([CAT, BOTH])
    with pytest.raises(ValueError, match=f"GenEval's colours are {', '.join(COLORS)}, not mauve"):
        detector.check([{"include": [{"class": "cat", "count": 1, "color": "mauve"}]}])
    with pytest.raises(ValueError, match="holds a clip model, expected owlv2"):
        detectors.load_detector(folders["clip"], folders["clip"])
