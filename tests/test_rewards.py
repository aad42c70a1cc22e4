"""Rewards: GenEval's verdicts, text verifiers, frozen referees loaded as published ones are, and how scores are combined."""

import copy
import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from referees import captions
from studies.geneval import geneval
from toy.tiny import build_judge, build_siglip
import policy
import rewards
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import grpo
import rewards as R

CHECKS = json.loads((Path(__file__).parent / "golden" / "geneval_checks" / "checks.json").read_text())
WORDS = "a red blue green circle square triangle is this photo of and the answer how many circles 1 2 3 true".split()
PROMPTS = ["a red circle", "a photo of a blue square and a red circle", "a red circle", "green triangle"]


def detections(rows):
    return [{"class": row[0], "box": row[1:5], "score": row[5], "color": row[6] if len(row) > 6 else None} for row in rows]


def texts_of(*texts, answers=None, form="answer", options=None):
    return R.Samples(prompts=["p"] * len(texts), metadata=[{}] * len(texts), texts=list(texts), answers=answers,
                     formats=[form] * len(texts), options=options)


def drawn(prompts=PROMPTS, size=32, **fields):
    images = torch.rand(len(prompts), 3, size, size)
    return R.Samples(**{"prompts": list(prompts), "metadata": [{}] * len(prompts), "images": images, **fields})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(1)
    root = tmp_path_factory.mktemp("referees")
    build_siglip(root / "siglip", WORDS)
    build_judge(root / "judge", WORDS)
    return {"siglip": str(root / "siglip"), "judge": str(root / "judge")}


@pytest.fixture(scope="module")
def siglip(folders):
    return siglip.load_siglip(folders["siglip"], batch_size=3)


@pytest.fixture(scope="module")
def judge(folders):
    return judge.load_judge(folders["judge"], batch_size=3)


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    """A random two-tower model with CLIP's byte-pair tokenizer, which open_clip carries, saved as the hub stores one."""
    policy.declare_torchvision_ops()
    import open_clip
    folder = tmp_path_factory.mktemp("open_clip")
    tower = {"layers": 2, "width": 32}
    config = {"embed_dim": 32, "vision_cfg": {**tower, "image_size": 32, "patch_size": 8, "head_width": 16},
              "text_cfg": {**tower, "context_length": 16, "vocab_size": 49408, "heads": 2}}
    mean, std = [0.4, 0.5, 0.6], [0.3, 0.2, 0.25]
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(2)
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return str(folder)


def test_every_stored_verdict_and_reason_of_geneval_is_reproduced():
    assert len(CHECKS["cases"]) == 329 and sum(case["correct"] for case in CHECKS["cases"]) == 144
    for case in CHECKS["cases"]:
        assert geneval.geneval_check(case["meta"], detections(case["det"])) == (case["correct"], case["reason"]), case


def test_of_equal_scores_the_later_detection_comes_first():
    assert len(CHECKS["equal_score_cases"]) == 3
    for case in CHECKS["equal_score_cases"]:
        assert geneval.geneval_check(case["meta"], detections(case["det"])) == (case["correct"], case["reason"]), case


def test_every_stored_relation_of_two_boxes_is_reproduced():
    assert len(CHECKS["relative_position"]) == 100
    for a, b, relations in CHECKS["relative_position"]:
        assert sorted(geneval.relative_position(a, b)) == relations, (a, b)


def test_a_box_at_the_same_centre_has_no_relation():
    assert geneval.relative_position([0, 0, 10, 10], [2, 2, 8, 8]) == set()


CLASSES, COLORS = ["circle", "square"], ["red", "blue"]
BOXES = st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 12)] * 2).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
THINGS = st.fixed_dictionaries({"class": st.sampled_from(CLASSES), "box": BOXES, "color": st.sampled_from([*COLORS, None])})
SCENES = st.lists(THINGS, max_size=5).map(lambda things: [{**thing, "score": 0.95 - 0.01 * i} for i, thing in enumerate(things)])


@st.composite
def specifications(draw):
    """Metadata with at most three include clauses (colours, relations to earlier clauses) and exclude clauses."""
    include = []
    for i in range(draw(st.integers(0, 3))):
        clause = {"class": draw(st.sampled_from(CLASSES)), "count": draw(st.integers(0, 2))}
        if draw(st.booleans()):
            clause["color"] = draw(st.sampled_from(COLORS))
        if i and draw(st.booleans()):
            clause["position"] = [draw(st.sampled_from(captions.RELATIONS)), draw(st.integers(0, i - 1))]
        include.append(clause)
    limits = st.fixed_dictionaries({"class": st.sampled_from(CLASSES), "count": st.integers(1, 3)})
    tag = draw(st.sampled_from(["counting", "position"]))
    return {"tag": tag, "include": include, "exclude": draw(st.lists(limits, max_size=1))}


@given(specifications(), SCENES)
@settings(max_examples=400)
def test_the_graded_instruction_reward_is_1_exactly_where_all_of_is_1_and_lies_between_0_and_1(metadata, scene):
    samples = R.Samples(prompts=["p"], metadata=[metadata], images=torch.rand(1, 3, 8, 8))
    strict = rewards.Instruction(lambda images, metadata: [scene], "all")(samples)
    graded = rewards.Instruction(lambda images, metadata: [scene])(samples)
    assert strict.item() == geneval.geneval_check(metadata, scene)[0]
    assert (graded.item() == 1.0) == (strict.item() == 1.0)
    assert 0.0 <= graded.item() <= 1.0


@given(specifications(), SCENES, st.randoms(use_true_random=False))
def test_the_order_of_detections_with_distinct_scores_does_not_matter(metadata, scene, rng):
    shuffled = rng.sample(scene, len(scene))
    assert geneval.geneval_clauses(metadata, shuffled) == geneval.geneval_clauses(metadata, scene)


def test_the_graded_reward_is_the_mean_over_clauses_of_the_fraction_of_right_objects():
    metadata = {"include": [{"class": "circle", "count": 4, "color": "red"}, {"class": "square", "count": 1}],
                "exclude": [{"class": "circle", "count": 5}]}
    rows = [["circle", 0, 0, 1, 1, 0.9, "red"], ["circle", 0, 0, 1, 1, 0.8, "blue"], ["circle", 0, 0, 1, 1, 0.7, "red"]]
    samples = R.Samples(prompts=["p"], metadata=[metadata], images=torch.rand(1, 3, 8, 8))
    graded = rewards.Instruction(lambda images, metadata: [detections(rows)])(samples)
    assert graded.item() == pytest.approx((2 / 4 + 0 + 1) / 3)


def test_an_object_counts_only_if_it_stands_right_to_every_target_and_only_if_there_is_a_target():
    metadata = {"include": [{"class": "circle", "count": 1}, {"class": "square", "count": 2, "position": ["left of", 0]}]}
    squares = [["square", 0, 0, 2, 2, 0.9], ["square", 40, 0, 42, 2, 0.8]]
    circle = ["circle", 20, 0, 22, 2, 0.7]
    assert [part for part, _ in geneval.geneval_clauses(metadata, detections([*squares, circle]))] == [1.0, 0.5]
    assert [part for part, _ in geneval.geneval_clauses(metadata, detections(squares))] == [0.0, 0.0]


def test_one_wrong_target_or_a_wrong_colour_is_not_forgiven_by_a_right_target():
    right = {"class": "square", "count": 1, "color": "red", "position": ["left of", 0]}
    metadata = {"include": [{"class": "circle", "count": 2}, right]}
    square = ["square", 20, 0, 22, 2, 0.9, "red"]
    sides = [["circle", 0, 0, 2, 2, 0.8], ["circle", 40, 0, 42, 2, 0.7]]
    assert geneval.geneval_clauses(metadata, detections([square, *sides]))[1][0] == 0.0
    beyond = [["circle", 40, 0, 42, 2, 0.8], ["circle", 60, 0, 62, 2, 0.7]]
    assert geneval.geneval_clauses(metadata, detections([square, *beyond]))[1] == (1.0, "")
    assert geneval.geneval_clauses(metadata, detections([[*square[:6], "blue"], *beyond]))[1][0] == 0.0


def test_a_detector_that_loses_an_image_is_refused():
    with pytest.raises(ValueError, match="detector returned 1"):
        rewards.Instruction(lambda images, metadata: [[]])(drawn(["a", "b"]))


def test_a_relation_to_no_required_object_holds():
    metadata = {"include": [{"class": "circle", "count": 0}, {"class": "square", "count": 1, "position": ["left of", 0]}]}
    assert geneval.geneval_clauses(metadata, detections([["square", 0, 0, 2, 2, 0.9]])) == [(1.0, ""), (1.0, "")]


@pytest.mark.parametrize("position", [["left of", 1], ["left of", -1], ["beside", 0]])
def test_a_relation_that_could_never_be_judged_is_refused(position):
    metadata = {"include": [{"class": "circle", "count": 1}, {"class": "square", "count": 1, "position": position}]}
    with pytest.raises(ValueError, match="position"):
        geneval.geneval_check(metadata, detections([["circle", 0, 0, 1, 1, 0.9], ["square", 9, 0, 10, 1, 0.9]]))


def as_thoughts(samples):
    return R.think_format(dataclasses.replace(samples, formats=["thought"] * len(samples.prompts)))


TEXT_REWARDS = {"accuracy": R.answer_accuracy, "format": R.think_format, "thought": as_thoughts}
PIECES = st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "3", "x"]), max_size=9).map("".join)
PLAIN = st.text(st.characters(exclude_characters="<>"), max_size=20)


@given(st.text() | PIECES, st.text())
def test_text_rewards_are_0_or_1_on_any_text(text, answer):
    for value in R.score(TEXT_REWARDS, texts_of(text, answers=[answer])).values():
        assert value.item() in (0.0, 1.0)


@given(PLAIN, PLAIN)
def test_the_right_answer_scores_1_bare_behind_a_thought_and_in_tags(thought, right):
    texts = [right, f"<think>{thought}</think>{right}", f"<think>{thought}</think><answer>{right}</answer>"]
    assert R.answer_accuracy(texts_of(*texts, answers=[right] * 3)).tolist() == [1.0] * 3
    assert R.think_format(texts_of(texts[2])).item() == 1.0


@given(PLAIN, PLAIN, st.sampled_from(["", " ", "\n", " \t\n "]))
def test_whitespace_around_blocks_and_answers_changes_nothing(thought, right, space):
    text = f"{space}<think>{space}{thought}</think>{space}<answer>{space}{right}{space}</answer>{space}"
    samples = texts_of(text, answers=[right])
    assert all(value.item() == 1.0 for value in R.score(TEXT_REWARDS, samples).values())


@pytest.mark.parametrize("text, right, score", [
    ("Three.", "3", 1), ("3 circles", "three  Circles", 1), ('"Red"', "red", 1), ("ten", "10", 1), ("(b)", "B", 1),
    ("-3", "3", 0), (".5", "5", 0), ("13", "3", 0), ("", "3", 0), ("3 or 4", "3", 0),
    ("<think><answer>3</answer></think><answer>4</answer>", "3", 0), ("<answer>4</answer><answer>3</answer>", "3", 0),
    ("<think>3</think>", "3", 0), ("<think>a</think>no, <answer>3</answer>, yes", "3", 1),
])
def test_answers_are_compared_by_meaning_and_only_the_first_behind_the_thought_counts(text, right, score):
    assert R.answer_accuracy(texts_of(text, answers=[right])).item() == score


@pytest.mark.parametrize("text, with_answer, before_image", [
    ("<think>a</think><answer>b</answer>", 1, 1), ("<think>a</think>", 0, 1), ("<think>a</think> a red circle", 0, 1),
    ("a<think>b</think>", 0, 0), ("<think>a", 0, 0), ("</think><think>", 0, 0), ("<think>a</think></think>", 0, 0),
    ("<think>a</think><answer>b</answer>c", 0, 1), ("<think>a</think>b<answer>c</answer>", 0, 1),
    ("<think><think>a</think><answer>b</answer>", 0, 0), ("<answer>b</answer><think>a</think>", 0, 0),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 0, 1), ("", 0, 0),
])
def test_the_format_reward_asks_each_tag_once_and_in_order(text, with_answer, before_image):
    assert R.think_format(texts_of(text)).item() == with_answer
    assert R.think_format(texts_of(text, form="thought")).item() == before_image


def test_pixels_agree_with_the_published_image_processor_whether_resized_or_not(siglip):
    for size in (32, 57):
        images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
        if size != 32:  # a smooth one; the processor rounds to 8 bits, 0.004 a pixel and 0.008 normalised
            images = torch.nn.functional.interpolate(images[:, :, :7, :7].float(), size=size, mode="bilinear").to(torch.uint8)
        theirs = siglip.image_processor(list(images), return_tensors="pt").pixel_values
        torch.testing.assert_close(siglip.pixels(images / 255.0), theirs, atol=1e-5 if size == 32 else 0.012, rtol=0)


def test_the_semantic_reward_is_the_cosine_of_the_plain_model_and_processor(siglip, folders):
    from transformers import AutoModel, AutoProcessor
    model, processor = AutoModel.from_pretrained(folders["siglip"]), AutoProcessor.from_pretrained(folders["siglip"])
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    inputs = processor(text=PROMPTS, images=list(images), padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=inputs.input_ids, pixel_values=inputs.pixel_values)
    plain = torch.cosine_similarity(out.image_embeds, out.text_embeds)
    ours = R.Semantic(siglip)(drawn(images=images / 255.0))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)


def test_siglip_texts_reach_the_tokenizer_in_lower_case_and_leave_it_at_full_length(siglip):
    seen = []
    listen = lambda texts, **how: seen.extend(texts) or siglip.tokenizer(texts, **how)  # noqa: E731
    spy = siglip.Siglip(siglip.model, listen, siglip.image_processor)
    assert spy.tokens(["A Red Circle", "red " * 99]).shape == (2, 24)
    assert seen[0] == "a red circle"


def test_a_patch_embedding_is_the_pooling_head_on_that_patch_alone(siglip):
    images = torch.rand(2, 3, 32, 32)
    embedded = siglip.embed_patches(images)
    states = siglip.model.vision_model(pixel_values=siglip.pixels(images)).last_hidden_state
    assert embedded.shape == (2, 16, 64)
    for n in range(2):
        for p in range(16):
            alone = siglip.model.vision_model.head(states[n:n + 1, p:p + 1])[0]
            torch.testing.assert_close(embedded[n, p], alone / alone.norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_the_dense_reward_is_the_mean_over_phrases_of_the_reduction_over_patches(siglip, reduce):
    clauses = [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 2}]
    samples = drawn(metadata=[{"include": clauses}, {"include": clauses[:1]}, {}, {}])
    phrases = [["red circle", "square"], ["red circle"], ["red", "circle"], ["green", "triangle"]]
    expected = []
    for patches, each in zip(siglip.embed_patches(samples.images), phrases):
        cosines = [[torch.dot(patch, phrase).item() for patch in patches] for phrase in siglip.embed_texts(each)]
        expected.append(sum(max(c) if reduce == "max" else sum(c) / len(c) for c in cosines) / len(each))
    torch.testing.assert_close(R.Dense(siglip, reduce)(samples), torch.tensor(expected), atol=1e-5, rtol=0)


@given(st.text(max_size=30))
def test_every_prompt_has_a_key_phrase(prompt):
    assert R.key_phrases(prompt, {})


def test_an_unknown_reduction_is_refused(siglip):
    with pytest.raises(ValueError, match="reduce"):
        R.Dense(siglip, "sum")(drawn())


def test_the_judge_reads_a_question_as_the_published_processor_lays_it_out(judge, folders):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    model = AutoModelForImageTextToText.from_pretrained(folders["judge"])
    processor = AutoProcessor.from_pretrained(folders["judge"])
    images, question = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8), "is this a red circle ?"
    inputs = processor(text="<image>" + question, images=images[0], return_tensors="pt")
    assert judge.rows([question])[0].tolist() == inputs.input_ids.tolist()
    inputs.pop("labels", None)
    with torch.no_grad():
        last = model(**inputs).logits[0, -1]
    yes, no = (last[processor.tokenizer.convert_tokens_to_ids(word)].item() for word in ("yes", "no"))
    expected = math.exp(yes) / (math.exp(yes) + math.exp(no))
    assert judge.yes_probability(images / 255.0, [question]).item() == pytest.approx(expected, abs=1e-5)


def test_the_judge_is_asked_about_the_drawn_image_or_about_the_written_answer_to_the_source(judge):
    reward, samples = R.Knowledge(judge, "is this {prompt} ?", "{prompt} the answer is {answer} ?"), drawn()
    asked = judge.yes_probability(samples.images, [f"is this {p} ?" for p in PROMPTS])
    torch.testing.assert_close(reward(samples), asked)
    written = R.Samples(["how many circles"] * 4, [{}] * 4, texts=["<think>a</think> 1", "2", "3", "<answer>3</answer>"],
                        sources=samples.images)
    asked = judge.yes_probability(samples.images, [f"how many circles the answer is {n} ?" for n in (1, 2, 3, 3)])
    torch.testing.assert_close(reward(written), asked)


@given(st.text(max_size=40))
@settings(max_examples=30)
def test_the_judge_answers_any_written_text_with_a_probability(judge, text):
    samples = R.Samples(["how many"], [{}], texts=[text + "<image>\n<bos>" + text], sources=torch.rand(1, 3, 32, 32))
    assert 0.0 <= R.score({"kn": R.Knowledge(judge)}, samples)["kn"].item() <= 1.0


def test_a_question_of_any_length_is_cut_so_that_it_fits(judge):
    ids, mask = judge.rows(["red " * 5000, "red"])
    assert ids.shape == mask.shape == (2, 16 + 1 + judge.max_question + 1)
    assert mask.sum(1).tolist() == [16 + 1 + judge.max_question + 1, 16 + 1 + 1 + 1]


def test_a_judge_whose_tokenizer_does_not_know_yes_and_no_is_refused(judge):
    tokenizer = copy.deepcopy(judge.tokenizer)
    spelled = functools.partial(lambda inner, text, **kw: inner(text if text.strip().lower() != "no" else "no yes", **kw), tokenizer)
    spelled.unk_token_id = tokenizer.unk_token_id
    with pytest.raises(ValueError, match="yes and no"):
        judge.Judge(judge.model, spelled, judge.image_processor)


def test_a_judge_can_be_trained_by_cross_entropy_on_its_yes_and_no_logits(folders):
    model = copy.deepcopy(judge.load_judge(folders["judge"]))
    model.model.requires_grad_(True)
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)])
    optimiser = torch.optim.Adam(model.model.parameters(), 3e-3)
    for _ in range(12):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model.logits(model.features(images), ["is this red ?"] * 2)[:, :2], torch.tensor([0, 1])).backward()
        optimiser.step()
    dark, bright = model.yes_probability(images, ["is this red ?"] * 2).tolist()
    assert dark > 0.8 and bright < 0.2


def model_rewards(siglip, judge, open_clip_folder):
    return {"sem": R.Semantic(siglip), "dense": R.Dense(siglip), "kn": R.Knowledge(judge),
            "clip": R.Semantic(siglip.load_open_clip(open_clip_folder, batch_size=3))}


def test_a_score_does_not_depend_on_the_neighbours_in_the_batch(siglip, judge, open_clip_folder):
    samples, rewards = drawn(), model_rewards(siglip, judge, open_clip_folder)
    whole = R.score(rewards, samples)
    for i in range(4):
        alone = R.score(rewards, drawn(PROMPTS[i:i + 1], images=samples.images[i:i + 1]))
        for name in rewards:
            assert alone[name].item() == pytest.approx(whole[name][i].item(), abs=1e-5), name


def test_model_rewards_keep_their_range_and_tell_images_apart(siglip, judge, open_clip_folder):
    for name, value in R.score(model_rewards(siglip, judge, open_clip_folder), drawn(["a red circle"] * 6)).items():
        assert (value >= (0 if name == "kn" else -1)).all() and (value <= 1).all()
        assert len(set(value.tolist())) > 1, name


def test_scoring_never_changes_a_referee_nor_lets_a_gradient_into_it(siglip, judge, open_clip_folder):
    rewards = model_rewards(siglip, judge, open_clip_folder)
    models = [siglip.model, judge.model, rewards["clip"].encoder.model]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    samples = drawn()
    samples.images.requires_grad_(True)
    for reward in rewards.values():
        assert not reward(samples).requires_grad
    for model, state in zip(models, before):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


REFEREES = {"siglip": (siglip.load_siglip, "model.safetensors"), "judge": (judge.load_judge, "model.safetensors"),
            "open_clip": (siglip.load_open_clip, "open_clip_model.safetensors")}


@pytest.fixture
def refused(folders, open_clip_folder, tmp_path):
    """(kind of referee, change of its folder) -> what is said of it, in one line that names the folder."""
    def say(kind, change):
        load, _ = REFEREES[kind]
        folder = tmp_path / "referee"
        shutil.copytree(open_clip_folder if kind == "open_clip" else folders[kind], folder)
        change(folder)
        with pytest.raises((ValueError, OSError), match="cannot be loaded") as error:
            load(str(folder))
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
        return str(error.value)
    return say


def with_weights(kind, change):
    """A change of a folder that is a change of its weights, given with the name of one of them."""
    def apply(folder):
        tensors = load_file(folder / REFEREES[kind][1])
        change(tensors, sorted(k for k in tensors if k.endswith("weight"))[1])
        save_file(tensors, folder / REFEREES[kind][1], metadata={"format": "pt"})
    return apply


@pytest.mark.parametrize("kind", REFEREES)
@pytest.mark.parametrize("change, words", [
    (lambda t, k: t.pop(k), ".weight"), (lambda t, k: t.update(strange=torch.ones(1)), "strange"),
    (lambda t, k: t.update({k: t[k][:-1].clone()}), ".weight"), (lambda t, k: t[k].view(-1)[-1:].fill_(math.nan), "not_finite"),
    (lambda t, k: t.update({k: t[k].half() * math.inf}), "not_finite")])
def test_a_referee_whose_weights_are_not_exactly_those_of_its_config_is_refused(refused, kind, change, words):
    """transformers would draw missing ones at random, pass over those too many, and go on."""
    assert words in refused(kind, with_weights(kind, change))


def test_a_referee_that_overflows_its_dtype_is_refused(folders, tmp_path):
    shutil.copytree(folders["siglip"], tmp_path / "s")
    with_weights("siglip", lambda t, k: t[k].fill_(1e5))(tmp_path / "s")
    siglip.load_siglip(str(tmp_path / "s"))
    with pytest.raises(ValueError, match="not_finite"):
        siglip.load_siglip(str(tmp_path / "s"), dtype=torch.float16)


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in ("siglip", "judge") for name in (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")]
    + [("open_clip", "open_clip_config.json"), ("open_clip", "open_clip_model.safetensors")])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"a', b"\xff\xfe", b"[" * 100_000])
def test_damaged_files_of_a_referee_are_said_in_one_line(refused, kind, name, content):
    """The libraries raise ten kinds of errors at these."""
    if content == b"{}" and name in ("tokenizer_config.json", "preprocessor_config.json"):
        pytest.skip("it says nothing, which means the defaults")
    refused(kind, lambda folder: (folder / name).write_bytes(content))


def test_what_only_tokenizers_and_configs_raise_is_said_in_one_line(refused, tmp_path):
    """tokenizers raises Exception itself, the check of a config's types an error of huggingface_hub's own."""
    def change(folder, name, edit):
        content = json.loads((folder / name).read_text())
        edit(content)
        (folder / name).write_text(json.dumps(content))
    assert "lstrip" in refused("siglip", lambda f: change(f, "tokenizer.json", lambda c: c["added_tokens"][0].pop("lstrip")))
    shutil.rmtree(tmp_path / "referee")
    assert "hidden_size" in refused("judge", lambda f: change(f, "config.json", lambda c: c["text_config"].update(hidden_size="64")))


@pytest.mark.parametrize("kind, name", [
    ("siglip", "tokenizer.json"), ("judge", "preprocessor_config.json"), ("siglip", "model.safetensors"),
    ("open_clip", "open_clip_config.json"), ("open_clip", "open_clip_model.safetensors")])
def test_a_referee_that_lacks_a_file_is_refused(refused, kind, name):
    assert "safetensors" in refused(kind, lambda folder: (folder / name).unlink())


@pytest.mark.parametrize("load, _", REFEREES.values())
def test_a_referee_that_is_nowhere_is_named_with_what_is_wanted(load, _):
    with pytest.raises((ValueError, OSError), match="^/nowhere cannot be loaded, must be .*config.*safetensors.*tokenizer") as error:
        load("/nowhere")
    assert "\n" not in str(error.value)


def test_an_open_clip_config_of_another_size_is_refused(refused):
    def change(folder):
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["embed_dim"] = 24
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    refused("open_clip", change)


def test_an_open_clip_reward_is_the_cosine_of_the_plain_model_transform_and_tokenizer(open_clip_folder):
    import open_clip
    from PIL import Image
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{open_clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{open_clip_folder}")
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    pixels = torch.stack([transform(Image.fromarray(image.numpy())) for image in images])
    with torch.no_grad():
        plain = torch.cosine_similarity(model.eval().encode_image(pixels), model.encode_text(tokenizer(PROMPTS)))
    ours = R.Semantic(siglip.load_open_clip(open_clip_folder))(drawn(images=images.permute(0, 3, 1, 2) / 255.0))
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind, load", [("siglip", siglip.load_siglip), ("judge", judge.load_judge)])
def test_a_pickle_checkpoint_is_refused(folders, tmp_path, kind, load):
    for file in Path(folders[kind]).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load(folders[kind]).model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(str(tmp_path))


def test_an_open_clip_pickle_checkpoint_is_refused(open_clip_folder, tmp_path):
    config = Path(open_clip_folder, "open_clip_config.json")
    (tmp_path / config.name).write_bytes(config.read_bytes())
    torch.save(siglip.load_open_clip(open_clip_folder).model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        siglip.load_open_clip(str(tmp_path))


def test_a_folder_with_another_kind_of_model_is_refused(folders):
    with pytest.raises(ValueError, match="paligemma"):
        siglip.load_siglip(folders["judge"])


def broken(samples):
    raise KeyError("count")


@pytest.mark.parametrize("reward, what", [
    (broken, "count"), (lambda s: torch.tensor([0.0, math.nan]), "nan"), (lambda s: torch.tensor([0.0, math.inf]), "inf"),
    (lambda s: torch.zeros(3), r"\(3,\)"), (lambda s: torch.zeros(2, 1), r"\(2, 1\)"), (lambda s: torch.zeros(2).long(), "int64"),
    (lambda s: [0.0, 0.0], "list"), (R.answer_accuracy, "texts"),
])
def test_a_failed_reward_is_one_line_with_its_name_and_the_offending_prompt(reward, what):
    samples = R.Samples(prompts=["first prompt", "second prompt"], metadata=[{}, {}])
    with pytest.raises(RuntimeError, match=what) as caught:
        R.score({"fine": lambda s: torch.ones(2), "odd one": reward}, samples)
    offending = "second prompt" if what in ("nan", "inf") else "first prompt"
    assert "'odd one'" in str(caught.value) and offending in str(caught.value) and "\n" not in str(caught.value)


def test_samples_of_unequal_length_or_8_bit_images_are_refused():
    with pytest.raises(ValueError, match="texts has 1"):
        R.Samples(prompts=["a", "b"], metadata=[{}, {}], texts=["a"])
    with pytest.raises(ValueError, match="uint8"):
        R.Samples(prompts=["a"], metadata=[{}], images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def components(draw_seed, B=3, G=4):
    generator = torch.Generator().manual_seed(draw_seed)
    binary, cosine = torch.rand(2, B * G, generator=generator)
    return {"binary": binary.round(), "cosine": 0.6 + 0.03 * cosine}


@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(-3, 3), st.floats(-3, 3))
def test_combining_is_linear_in_the_weights(seed, a, b, factor):
    parts = components(seed)
    single = R.combine(parts, {"binary": 1.0, "cosine": 0.0}), R.combine(parts, {"binary": 0.0, "cosine": 1.0})
    mixed = R.combine(parts, {"binary": factor * a, "cosine": factor * b})
    torch.testing.assert_close(mixed, factor * (a * single[0] + b * single[1]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(R.combine(parts, {"binary": a, "cosine": b}), a * parts["binary"] + b * parts["cosine"])


@given(st.integers(0, 10**6))
def test_normalising_gives_every_component_mean_0_and_variance_1_in_its_group_and_a_tied_group_exactly_0(seed):
    for name, reward in components(seed).items():
        for group, raw in zip(grpo.normalised({name: 100 * reward}, 4)[name].view(3, 4), reward.view(3, 4)):
            assert group.mean().item() == pytest.approx(0.0, abs=1e-3)  # fp32 at 60
            if len(set(raw.tolist())) == 1:
                assert group.tolist() == [0.0] * 4
            elif raw.std() > 1e-3:
                assert group.var(correction=0).item() == pytest.approx(1.0, abs=3e-3)


@pytest.mark.parametrize("value", [0.01, 0.3, 1.2])
def test_a_constant_component_is_normalised_to_exactly_0(value):
    assert grpo.normalised({"a": torch.full((12,), value)}, 12)["a"].tolist() == [0.0] * 12
    assert grpo.variance_share({"a": torch.full((12,), value)}, {"a": 5.0}, 12) == {"a": 0.0}


@given(st.integers(0, 10**6), st.floats(0.1, 3), st.floats(0.1, 3))
def test_variance_shares_add_up_to_1_and_a_zero_weight_has_no_share(seed, a, b):
    parts = components(seed)
    assume(parts["binary"].view(3, 4).std(1).max() > 0)
    shares = grpo.variance_share(parts, {"binary": a, "cosine": b}, 4)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert grpo.variance_share(parts, {"binary": a, "cosine": 0.0}, 4) == pytest.approx({"binary": 1.0, "cosine": 0.0})


def test_under_a_plain_sum_the_all_or_nothing_reward_has_nearly_all_of_the_variance():
    parts = {"binary": torch.tensor([0.0, 1, 0, 1]), "cosine": torch.tensor([0.60, 0.60, 0.63, 0.63])}
    shares = grpo.variance_share(parts, {"binary": 1.0, "cosine": 1.0}, 4)
    assert shares["binary"] == pytest.approx(0.25 / (0.25 + 0.015**2), rel=1e-4)
    equal = grpo.normalised(parts, 4)
    assert sorted(round(x) for x in R.combine(equal, {"binary": 1.0, "cosine": 1.0}).tolist()) == [-2, 0, 0, 2]
    assert grpo.variance_share(equal, {"binary": 1.0, "cosine": 1.0}, 4) == pytest.approx({"binary": 0.5, "cosine": 0.5}, abs=0.01)


def test_a_level_that_differs_between_prompts_has_no_share_of_the_variance():
    parts = {"level": torch.tensor([0.0, 0, 9, 9]), "within": torch.tensor([0.0, 1, 0, 1])}
    assert grpo.variance_share(parts, {"level": 1.0, "within": 1.0}, 2) == pytest.approx({"level": 0.0, "within": 1.0})


@pytest.mark.parametrize("weights", [{}, {"a": 1.0}, {"a": 1.0, "b": 1.0, "c": 1.0}])
def test_combining_refuses_unmatched_weights(weights):
    with pytest.raises(ValueError, match="each needs one"):
        R.combine({"a": torch.rand(4), "b": torch.rand(4)}, weights)


@pytest.mark.parametrize("G", [0, 1, 3])
def test_normalising_refuses_groups_that_do_not_fit(G):
    with pytest.raises(ValueError, match="expected a divisor"):
        grpo.normalised({"a": torch.rand(4)}, G)
