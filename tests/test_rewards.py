"""rewards.py: what a reward reads, what each one is worth, and how scores are combined."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import rewards as R
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from referees import captions
from referees.captions import caption_tuples, tuple_f1
from referees.questions import PHOTO_QUALITY, Question, Questions
from referees.siglip import load_siglip
from sample import TOY
from support.checkpoint import load_policy
from tasks import token_states
from toy import shapes
from toy.world import render_pixels


def images_of(n, seed=0, size=32):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def drawn(prompts, images=None, metadata=None, **fields):
    images = images_of(len(prompts)) if images is None else images
    return R.Samples(list(prompts), metadata or [{}] * len(prompts), images=images, **fields)


def written(*texts, form="answer", **fields):
    N = len(texts)
    return R.Samples(["p"] * N, [{}] * N, texts=list(texts), formats=[form] * N, **fields)


# ---- samples, scores, sums ----


def test_samples_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="texts has 1 entries for 2 prompts"):
        R.Samples(["a", "b"], [{}, {}], texts=["a"])


@pytest.mark.parametrize("value", [-0.5, 1.5, math.nan])
def test_pictures_that_are_not_between_0_and_1_are_refused(value):
    with pytest.raises(ValueError, match="not in .0, 1."):
        R.Samples(["a", "b"], [{}, {}], images=torch.full((2, 3, 4, 4), value))


def broken(samples):
    raise KeyError("count")


@pytest.mark.parametrize(
    "reward, what",
    [
        (broken, r"KeyError: 'count' \(test_rewards.py:\d+\)"),
        (lambda s: torch.tensor([0.0, math.nan]), "returned nan for sample 1"),
        (lambda s: torch.tensor([0.0, math.inf]), "returned inf for sample 1"),
        (lambda s: torch.zeros(3), r"\(3,\)"), (lambda s: torch.zeros(2, 1), r"\(2, 1\)"),
        (lambda s: torch.zeros(2).long(), "int64"), (lambda s: [0.0, 0.0], "list"),
        (R.answer_accuracy, "samples have no texts"),
        (lambda s: R.think_format(written("a", "b", form="r1")), 'a format is "r1"')],
)
def test_a_failed_reward_is_one_line_with_its_name_and_the_offending_prompt(reward, what):
    samples = R.Samples(["first prompt", "second\nprompt"], [{}, {}])
    with pytest.raises(R.RewardError, match=what) as error:
        R.score({"fine": lambda s: torch.ones(2), "odd one": reward}, samples)
    assert "\n" not in str(error.value)
    assert "'odd one'" in str(error.value)
    assert ("second" if "sample 1" in what else "first prompt") in str(error.value)


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_combining_is_the_weighted_sum(a, b):
    binary, cosine = torch.rand(2, 12)
    combined = R.combine({"binary": binary, "cosine": cosine}, {"binary": a, "cosine": b})
    torch.testing.assert_close(combined, a * binary + b * cosine)


@pytest.mark.parametrize("weights", [{}, {"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}])
def test_combining_refuses_unmatched_weights(weights):
    with pytest.raises(ValueError, match="each needs one"):
        R.combine({"a": torch.rand(4), "b": torch.rand(4)}, weights)


# ---- written answers ----


@pytest.mark.parametrize(
    "text, right, score",
    [
        ("Three.", "3", 1), ("3 circles", "three  Circles", 1), ('"Red"', "red", 1), ("ten", "10", 1),
        ("(b)", "B", 1), ("-3", "3", 0), (".5", "5", 0), ("13", "3", 0), ("", "3", 0), ("3 or 4", "3", 0),
        ("red", "<answer> red </answer>", 1), ("<think><answer>3</answer></think><answer>4</answer>", "3", 0),
        ("<answer>4</answer><answer>3</answer>", "3", 0), ("<think>3</think>", "3", 0),
        ("<think>a</think>no, <answer>3</answer>, yes", "3", 1),
        ("3", "\\boxed{3}", 1), ("\\(\\boxed{\\text{Red}}\\)", "red", 1), ("1/2", "$\\frac{1}{2}$", 1),
        ("1000", "1,000", 1), ("3", "3.0", 1), ("+3", "3", 1), ("0.5", ".50", 1), ("\u22123", "-3", 1),
        ("50%", "50 \\%", 1), ("3", "so 1 + 2 = 3\n#### 3", 1), ("\uff13", "3", 1), ("3.1", "31", 0),
        ("1,00", "100", 0), ("1.2.30", "1.2.3", 0)],
)
def test_answers_are_compared_by_meaning_and_only_the_first_after_the_thought_counts(text, right, score):
    assert R.answer_accuracy(written(text, answers=[right])).item() == score


@pytest.mark.parametrize(
    "text, score",
    [
        ("(b)", 1), ("B", 1), ("b.", 1), ("blue", 1), ("(b) blue", 1), ("b: blue", 1),
        ("<answer> (b) </answer>", 1), ("a", 0), ("red", 0), ("(a) blue", 0), ("(b) red", 0),
        ("a blue one", 0), ("b or a", 0), ("<think> (b) </think>", 0), ("", 0)],
)
def test_multiple_choice_is_earned_by_letter_text_or_both_and_by_nothing_else(text, score):
    for right in ("(b)", "b", "Blue"):
        samples = written(text, answers=[right], options=[["red", "blue", "green"]])
        assert R.answer_accuracy(samples).item() == score


def test_an_option_that_is_spelled_like_another_letter_does_not_count_as_that_letter():
    samples = written("a", "(b) a", answers=["(b)"] * 2, options=[["b", "a"]] * 2)
    assert R.answer_accuracy(samples).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("answer", ["d", "pink", "(a) blue", ""])
def test_an_answer_that_is_no_option_is_an_error(answer):
    with pytest.raises(ValueError, match="must be the letter or the text of one"):
        R.right_option(answer, ["red", "blue"])


@pytest.mark.parametrize(
    "text, with_answer, before_image",
    [
        ("<think>a</think><answer>b</answer>", 1, 1), ("<think>a</think>", 0, 1),
        ("<think>a</think> a red circle", 0, 1), ("a<think>b</think>", 0, 0), ("<think>a", 0, 0),
        ("</think><think>", 0, 0), ("<think>a</think></think>", 0, 0),
        ("<think>a</think><answer>b</answer>c", 0, 1), ("<think>a</think>b<answer>c</answer>", 0, 1),
        ("<think><think>a</think><answer>b</answer>", 0, 0), ("<answer>b</answer><think>a</think>", 0, 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0, 1), ("", 0, 0)],
)
def test_the_format_asks_each_tag_once_and_in_order(text, with_answer, before_image):
    assert R.think_format(written(text)).item() == with_answer
    assert R.think_format(written(text, form="thought")).item() == before_image


PIECE = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "3", "x"])
PIECES = st.lists(PIECE, max_size=9).map("".join)
PLAIN = st.text(st.characters(exclude_characters="<>"), max_size=20)


@given(st.text() | PIECES, st.text(), st.sampled_from(["answer", "thought"]))
def test_text_rewards_are_0_or_1_on_any_text(text, answer, form):
    samples = written(text, answers=[answer], form=form)
    for value in R.score({"accuracy": R.answer_accuracy, "format": R.think_format}, samples).values():
        assert value.item() in (0.0, 1.0)


@given(PLAIN, PLAIN, st.sampled_from(["", " ", "\n", " \t\n "]))
def test_the_right_answer_earns_1_bare_after_a_thought_or_in_tags_whatever_the_space(thought, right, space):
    full = f"{space}<think>{space}{thought}</think>{space}<answer>{space}{right}{space}</answer>{space}"
    samples = written(right, f"<think>{thought}</think>{space}{right}", full, answers=[right] * 3)
    assert R.answer_accuracy(samples).tolist() == [1.0] * 3
    assert R.think_format(samples)[2] == 1


# ---- LVRPO's rewards ----


class Told:
    """A judge whose answers are given, and who keeps what it was asked."""

    def __init__(self, **answers):
        self.answers, self.asked = (
            {text.replace("_", " ") + " ?": answer for text, answer in answers.items()}, [])

    def yes_probability(self, images, questions, about=None):
        self.asked += zip(questions, range(len(images)) if about is None else about)
        return torch.tensor([self.answers.get(question, 0.9) for question in questions])


def test_the_judge_is_asked_about_the_drawn_image_or_about_the_final_answer_to_the_source():
    judge = Told(is_this_a_cat=0.25)
    assert R.Knowledge(judge)(drawn(["a cat", "a dog"])).tolist() == pytest.approx([0.25, 0.9])
    R.Knowledge(judge)(written("<think>a</think> 1", "<answer>3</answer>", sources=images_of(2)))
    assert [question for question, _ in judge.asked[2:]] == ["p is the answer 1 ?", "p is the answer 3 ?"]


def test_the_dense_reward_is_the_mean_over_phrases_of_the_best_patch():
    siglip = load_siglip(str(TOY.parent / "siglip"))
    clauses = [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 2}]
    metadata = [{"include": clauses}, {"include": clauses[:1]}, {}]
    samples = drawn(["two things", "one thing", "a photo of a green triangle ."], metadata=metadata)
    phrases = [["red circle", "square"], ["red circle"], ["green", "triangle"]]
    for value, patches, own in zip(R.Dense(siglip)(samples), siglip.embed_patches(samples.images), phrases):
        best = [max((patches @ phrase).tolist()) for phrase in siglip.embed_texts(own)]
        assert value.item() == pytest.approx(sum(best) / len(best), abs=1e-5)


@given(st.text(max_size=30))
def test_every_prompt_has_a_key_phrase(prompt):
    assert R.key_phrases(prompt, {})


def test_the_instruction_reward_asks_its_rules_of_each_images_detections():
    def worth(metadata, things):
        return len(things) / metadata["most"]

    def detector(images, metadata):
        return [["thing"] * n for n in range(len(images))]

    samples = drawn(["a", "b"], metadata=[{"most": 2}, {"most": 4}])
    assert R.Instruction(detector, worth)(samples).tolist() == [0.0, 0.25]


# ---- decomposed questions ----


ANSWERS = st.lists(st.floats(0, 1), min_size=3, max_size=3)


@given(ANSWERS, ANSWERS, st.permutations(range(3)), st.floats(0, 1), st.sampled_from(["geometric", "binary"]))
def test_aggregation_is_in_range_monotone_and_blind_to_order(semantic, quality, order, higher, how):
    value = R.aggregate(semantic, quality, how)
    assert 0 <= value <= 1
    assert R.aggregate([semantic[i] for i in order], quality, how) == pytest.approx(value)
    assert R.aggregate(semantic, [max(quality[0], higher), *quality[1:]], how) >= value - 1e-9


def test_aggregation_by_hand_and_an_empty_half_is_an_error():
    assert R.aggregate([1.0, 0.5, 0.0], [0.81]) == pytest.approx((0.5 * 0.81) ** 0.5)
    assert R.aggregate([1.0, 0.5, 0.0], [0.81], "binary") == pytest.approx((1 / 3) ** 0.5)
    with pytest.raises(ValueError, match="2 semantic and 0 quality questions"):
        R.aggregate([1.0, 1.0], [])
    with pytest.raises(ValueError, match='how is "mean"'):
        R.aggregate([1.0], [1.0], "mean")


def test_an_attribute_of_an_absent_thing_scores_0_and_a_need_that_fell_takes_its_own_with_it():
    metadata = {
        "include": [{"class": "cup", "count": 1}, {"class": "cat", "count": 1, "position": ["above", 0]}],
        "exclude": [{"class": "dog", "count": 1}]}
    judge = Told(is_there_a_cup=0.2)
    value = R.Decomposed(judge, Questions(toy=True))(drawn(["p"] * 2, metadata=[metadata] * 2))
    # Of existence and number of both, the relation, and the dog, the cup's number and the relation fall.
    assert value.tolist() == pytest.approx([((0.2 + 0.0 + 0.9 + 0.9 + 0.0 + 0.9) / 6 * 0.9) ** 0.5] * 2)
    assert [image for _, image in judge.asked] == [0] * 8 + [1] * 8
    chain = [
        Question("a ?"), Question("b ?", needs=(0,)),
        Question("c ?", needs=(1,))]
    reward = R.Decomposed(Told(a=0.1), lambda prompt, metadata: [*chain, *PHOTO_QUALITY])
    assert reward(drawn(["p"])).tolist() == pytest.approx([(0.1 / 3 * 0.9) ** 0.5])


# ---- cycle consistency ----


@pytest.mark.parametrize(
    "caption, tuples",
    [
        ("a circle", {("circle",)}),
        ("A photo of a red circle.", {("circle",), ("circle", "red")}),
        ("two red circles and a square", {("circle",), ("circle", "red"), ("circle", "2"), ("square",)}),
        (
            "a red circle and a blue circle",
            {("circle",), ("circle", "red"), ("circle'",), ("circle'", "blue")}),
        ("a square right of a circle", {("circle",), ("square",), ("circle", "left of", "square")}),
        ("a circle below a square", {("circle",), ("square",), ("square", "above", "circle")}),
    ],
)
def test_a_caption_is_taken_apart_by_rule(caption, tuples):
    assert caption_tuples(caption) == tuples


@pytest.mark.parametrize(
    "caption", ["dogs running", "circle", "", "red circles", "a circle left of a square above a triangle"]
)
def test_a_prompt_that_no_rule_reads_is_refused(caption):
    with pytest.raises(ValueError, match="which no rule reads; use another --captioner"):
        tuple_f1(caption, "a red circle")


@pytest.mark.parametrize(
    "caption, score",
    [
        ("a red circle", 1), ("circle orange circle and a red circle", 4 / 5), ("", 0),
        ("a red circle left of a square above a dog", 4 / 6)],
)
def test_what_no_rule_reads_in_a_captioners_caption_is_a_thing_that_the_prompt_does_not_say(caption, score):
    """A captioner stammers before a spoiled picture; that must neither stop a run nor help the picture."""
    assert tuple_f1("a red circle", caption) == pytest.approx(score)


THINGS = st.tuples(st.sampled_from(["red", "big", "old"]), st.sampled_from(["circle", "dog", "box"]))


@given(st.lists(THINGS, min_size=2, max_size=4, unique_by=lambda thing: thing[1]), st.randoms())
def test_tuple_f1_is_1_in_any_order_symmetric_and_falls_when_an_object_is_left_out(things, random):
    whole, mixed, less = (
        " and ".join(f"a {adjective} {noun}" for adjective, noun in some)
        for some in (things, random.sample(things, len(things)), things[1:])
    )
    assert tuple_f1(whole, mixed) == 1
    assert 0 < tuple_f1(whole, less) < 1
    assert tuple_f1(whole, less) == tuple_f1(less, whole)


def test_every_caption_of_the_toy_can_be_compared_with_every_prompt():
    rng = np.random.default_rng(0)
    for metadata in shapes.prompts("train")[::11]:
        right = shapes.sample_scene(metadata, rng)
        wrong = shapes.sample_scene(shapes.wrong_metadata(metadata, rng), rng)
        assert 0 < tuple_f1(metadata["prompt"], shapes.describe(right)) <= 1
        assert tuple_f1(metadata["prompt"], shapes.describe(wrong)) < 1


def test_a_pictures_own_prompt_earns_1_and_less_when_an_object_is_removed():
    things = [("circle", "red", 0, 0), ("square", "blue", 0, 1), ("triangle", "green", 1, 0)]
    scene = tuple(shapes.Object(*thing) for thing in things)
    pictures, prompt = render_pixels([scene, scene[:2]]) * 0.5 + 0.5, shapes.describe(scene)
    captioner = SimpleNamespace(captions=lambda images: [shapes.describe(scene), shapes.describe(scene[:2])])
    samples = drawn([prompt] * 2, pictures, reals=pictures[:1].expand(2, -1, -1, -1))
    for reward in (R.Recaption(captioner, captions.tuple_similarity), R.Likeness()):
        whole, less = reward(samples).tolist()
        assert whole == pytest.approx(1)
        assert less < 0.95


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6))
def test_token_f1_and_tim_are_those_of_loops_over_tokens(seed, n, m):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(1, 5, 6, generator=g), torch.randn(1, 7, 6, generator=g)
    cosine = [[F.cosine_similarity(x, y, dim=0).item() for y in b[0, :m]] for x in a[0, :n]]
    recall = sum(map(max, cosine)) / n
    precision = sum(map(max, zip(*cosine))) / m
    f1 = 2 * recall * precision / max(recall + precision, 1e-6)
    states = a, torch.arange(5)[None] < n, b, torch.arange(7)[None] < m
    assert R.token_f1(*states).item() == pytest.approx(f1, rel=1e-4, abs=1e-4)
    match = R.TokenMatch(lambda images, prompts: states)
    assert match(drawn("p")).item() == pytest.approx((1 + (recall + precision) / 2) / 2, abs=1e-5)


def test_ssim_is_that_of_a_loop_over_windows():
    a = images_of(2, 1, 14)
    b = 0.7 * a + 0.3 * images_of(2, 2, 14)
    bell = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    weights = np.outer(bell, bell).flatten()
    for got, x, y in zip(R.structural_similarity(a, b).tolist(), a.double().numpy(), b.double().numpy()):
        each = []
        for c, i, j in np.ndindex(3, 4, 4):
            pair = [z[c, i:i + 11, j:j + 11].flatten() for z in (x, y)]
            p, q = np.average(pair, axis=1, weights=weights)
            (vp, cov), (_, vq) = np.cov(pair, aweights=weights, ddof=0)
            each.append((2 * p * q + 1e-4) * (2 * cov + 9e-4) / ((p**2 + q**2 + 1e-4) * (vp + vq + 9e-4)))
        assert got == pytest.approx(np.mean(each), rel=1e-4)


def test_likeness_is_in_range_and_resizes_the_real_image():
    x, reals = images_of(2), images_of(2, 5)
    found = R.Likeness()(drawn("ab", x, reals=reals))
    assert ((found >= 0) & (found <= 1)).all()
    flat = R.Likeness()(drawn("a", torch.full((1, 3, 32, 32), 0.3), reals=torch.full((1, 3, 64, 64), 0.3)))
    assert flat.item() == pytest.approx(1, abs=1e-3)
    by_distance = R.Likeness(lambda a, b: torch.tensor([0.25, 3.0]))
    assert by_distance(drawn("ab", x, reals=reals)).tolist() == [0.75, 0.0]


# ---- token matching ----


def test_tim_takes_the_policys_states_of_the_image_and_of_the_prompts_words_after_it():
    """Against one sample at a time, without padding, read by the policy's own calls."""
    policy, images = load_policy(TOY), images_of(3)
    prompts = ["a circle", "a photo of a red circle and a blue square", "three squares"]
    image, seen, text, read = token_states(lambda: nullcontext(policy), nullcontext, 2)(images, prompts)
    for i, prompt in enumerate(prompts):
        tokens, mask = policy.encode_text([prompt])
        with torch.no_grad():
            states, _, context = policy.image_states(images[i:i + 1] * 2 - 1)
            words, _ = policy.append_text(context, tokens, mask, logits=False)
        assert torch.allclose(image[i], states[0], atol=1e-4)
        assert seen[i].all()
        assert read[i].sum() == len(prompt.split())
        assert torch.allclose(text[i][read[i]], words[0, 1:-1], atol=1e-4)
