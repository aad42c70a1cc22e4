"""Referees of real pictures: published classes, tiny and random, through the public loading path, against independent computations."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from referees import detectors
from referees import judge
from referees import preferences
from referees import questions
from referees import siglip
import rewards
from studies.geneval import geneval
from support.run import Ranks
import sample
import recipes
import rewards as R
import tiny_referees as tiny
import train

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "geneval" / "evaluation_metadata.jsonl"
CAT = {"include": [{"class": "cat", "count": 1}]}
BOTH = {"include": [{"class": "dog", "count": 1, "color": "red"}, {"class": "computer mouse", "count": 2, "color": "blue"}]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    base = tmp_path_factory.mktemp("referees")
    for name in ("mask2former", "grounding_dino", "owlv2", "clip", "naflex", "qwen", "qwen3", "internvl"):
        getattr(tiny, f"build_{name}")(base / name)
    tiny.build_hpsv3(base / "hpsv3")
    return base


def images(n=4, size=(48, 40)):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(n))


def detector(folders, name):
    made = detectors.load_detector(str(folders / name), str(folders / "clip"))
    made.settings = {"threshold": 0.05, "counting_threshold": 0.05}
    return made


# ---- detectors ----


def test_mask2former_gives_what_transformers_own_post_processing_gives(folders):
    from transformers import Mask2FormerImageProcessor
    found = detector(folders, "mask2former").find
    x, processor = images(1, (48, 48))[0], Mask2FormerImageProcessor.from_pretrained(folders / "mask2former")
    read = found.model(**processor([x], do_rescale=False, return_tensors="pt"))
    ours = [thing for thing in found(x[None], [["cat", "dog", "computer mouse"]])[0]]
    theirs = processor.post_process_instance_segmentation(read, threshold=0.05, target_sizes=[(48, 48)], return_binary_maps=True)[0]
    assert {thing["class"] for thing in ours} <= {"cat", "dog", "computer mouse"}
    # Theirs resizes masks to 384 first and pads nothing away, ours follows mmdet: scores agree to a few hundredths, labels exactly.
    names = {0: "cat", 1: "dog", 2: "computer mouse"}
    best = sorted(((names[s["label_id"]], s["score"]) for s in theirs["segments_info"]), key=lambda each: -each[1])[:3]
    mine = sorted(((thing["class"], thing["score"]) for thing in ours), key=lambda each: -each[1])[:3]
    assert [score for _, score in best] == pytest.approx([score for _, score in mine], abs=0.05)


def test_masks_are_cut_to_what_was_read_and_come_back_at_the_images_size(folders):
    x = images(2, (30, 52))
    for things in detector(folders, "mask2former").find(x, [["cat"], ["dog"]]):
        for thing in things:
            assert thing["mask"].shape == (30, 52)
            rows, columns = thing["mask"].any(1).nonzero(), thing["mask"].any(0).nonzero()
            assert thing["box"] == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("name", ["grounding_dino", "owlv2"])
def test_a_zero_shot_detector_gives_its_own_processors_boxes(folders, name):
    found, x = detector(folders, name).find, images(1, (48, 48))
    processor, dino = found.processor, name == "grounding_dino"
    text = ["cat. dog."] if dino else [["a photo of a cat", "a photo of a dog"]]
    read = found.model(**processor(images=[x[0]], text=text, do_rescale=False, return_tensors="pt"))
    scores, boxes = found.scored(x, ["cat", "dog"])
    chances = read.logits.sigmoid()
    expected = chances[..., [1, 3]] if dino else chances        # [CLS] cat . dog . [SEP]
    assert torch.allclose(scores, expected, atol=1e-5) and torch.allclose(boxes, read.pred_boxes, atol=1e-5)
    theirs = processor.image_processor.post_process_object_detection(read, threshold=detectors.LEAST, target_sizes=[(48, 48)])[0]
    ours = found.things(scores[0], boxes[0], (48, 48), ("cat", "dog"))
    assert ours
    for thing in ours:
        same = [box for score, box in zip(theirs["scores"], theirs["boxes"]) if dino or abs(score - thing["score"]) < 1e-5]
        assert any(thing["box"] == pytest.approx(box.clamp(0, 48).tolist(), abs=1e-3) for box in same)


def test_the_words_of_a_class_are_found_in_grounding_dinos_text(folders):
    find = detector(folders, "grounding_dino").find
    text = "computer mouse. cat."
    spans = find.processor.tokenizer(text, return_offsets_mapping=True).offset_mapping
    said = lambda k: " ".join(text[slice(*spans[i])] for i in find.words(["computer mouse", "cat"], k, spans))  # noqa: E731
    assert said(0) == "computer mouse" and said(1) == "cat"


@pytest.mark.parametrize("name", ["mask2former", "grounding_dino", "owlv2"])
def test_detections_do_not_depend_on_neighbours_or_repetition(folders, name):
    made, x, metadata = detector(folders, name), images(4), [CAT, BOTH, {}, CAT]
    whole, again = made(x, metadata), made(x, metadata)
    told = lambda found: [[(t["class"], t.get("color"), *t["box"], t["score"]) for t in each] for each in found]  # noqa: E731
    assert told(whole) == told(again) and whole[2] == []
    for n in (1, 3):
        for ours, alone in zip(told(whole)[n], told(made(x[n:n + 1], metadata[n:n + 1]))[0], strict=True):
            assert ours[:2] == alone[:2] and ours[2:] == pytest.approx(alone[2:], abs=1e-5, rel=1e-5)
    assert {t["class"] for t in whole[1]} <= {"dog", "computer mouse"}
    assert not any(p.requires_grad for p in made.find.model.parameters())


def test_of_boxes_that_overlap_the_best_stays():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 5, 5]]).float()
    assert detectors.suppressed(boxes, torch.tensor([0.5, 0.9, 0.7, 0.8]), 0.5) == [1, 3, 2]
    assert detectors.intersection_over_union(boxes)[0].tolist() == pytest.approx([1, 0.9, 0, 0.25])


@given(st.lists(st.tuples(*[st.floats(0, 50)] * 4), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_suppression_keeps_the_best_and_no_two_that_overlap(corners, rng):
    boxes = torch.tensor([[min(a, c), min(b, d), max(a, c) + 1, max(b, d) + 1] for a, b, c, d in corners])
    scores = torch.tensor(rng.sample(range(100), len(boxes))).float()
    kept = detectors.suppressed(boxes, scores, 0.5)
    overlap = detectors.intersection_over_union(boxes)
    assert kept[0] == scores.argmax() and all(overlap[i, j] <= 0.5 for i in kept for j in kept if i != j)


def test_a_colour_is_clips_choice_on_the_crop_with_a_grey_ground(folders):
    made, x = detector(folders, "mask2former"), images(1)[0]
    mask = torch.zeros(48, 40, dtype=torch.bool)
    mask[10:30, 5:35] = True
    crop = detectors.crop_of(x, {"box": [5.0, 8.0, 35.0, 30.0], "mask": mask})
    assert crop.shape == (3, 22, 30) and (crop[:, :2] == detectors.GREY).all() and torch.equal(crop[:, 2:], x[:, 10:30, 5:35])
    clip = made.colors.clip
    texts = torch.stack([F.normalize(clip.embed_texts([f"a photo of a {c} dog", f"a photo of a {c}-colored dog", f"a photo of a {c} object"])
                                     .mean(0), dim=-1) for c in geneval.COLORS])
    right = (texts @ clip.embed_images(detectors.middle(crop, 16)[None])[0]).argmax()
    assert made.colors([crop], ["dog"]) == [geneval.COLORS[right]] and made.colors([], []) == []


def test_only_objects_that_a_clause_judges_get_a_colour(folders):
    made = detector(folders, "owlv2")
    found = made(images(2), [BOTH, CAT])
    for name, count in (("dog", 1), ("computer mouse", 2)):
        best = [t for t in geneval.ranked(BOTH, found[0], **made.settings).get(name, [])]
        assert all("color" in t for t in best[:count]) and not any("color" in t for t in best[count:])
    assert not any("color" in t for t in found[1])


def test_classes_that_a_detector_does_not_know_are_named(folders):
    made = detectors.load_detector(str(folders / "mask2former"), str(folders / "clip"))
    made.check([CAT, BOTH])
    with pytest.raises(ValueError, match="does not know giraffe, zebra; use one that reads class names"):
        made.check([CAT, {"include": [{"class": "zebra", "count": 1}], "exclude": [{"class": "giraffe", "count": 2}]}])
    with pytest.raises(ValueError, match="GenEval's colours are red.*not mauve"):
        made.check([{"include": [{"class": "cat", "count": 1, "color": "mauve"}]}])


def drawn_as_said(metadata):
    """Detections of a picture that shows exactly what metadata say."""
    boxes, found = [], []
    for clause in metadata["include"]:
        at = (100.0, 100.0)
        if "position" in clause:
            relation, target = clause["position"]
            dx, dy = {"left of": (-300, 0), "right of": (300, 0), "above": (0, -300), "below": (0, 300)}[relation]
            at = (boxes[target][0] + dx, boxes[target][1] + dy)
        boxes.append(at)
        found += [{"class": clause["class"], "score": 0.95, "box": [at[0], at[1], at[0] + 50, at[1] + 50],
                   **({"color": clause["color"]} if "color" in clause else {})}] * clause["count"]
    return found


@pytest.mark.skipif(not DATA.exists(), reason="GenEval's prompts are not here")
def test_a_detector_that_sees_what_each_of_genevals_prompts_says_passes_all():
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 553
    for how in ("all", "graded", "flow_grpo"):
        reward = rewards.Instruction(lambda images, metadata: [drawn_as_said(m) for m in metadata], how)
        samples = R.Samples([row["prompt"] for row in rows], rows, images=torch.zeros(553, 3, 1, 1))
        assert reward(samples).eq(1).all()


def test_flow_grpos_score_by_hand():
    thing = lambda name, x, color=None: {"class": name, "score": 0.9, "box": [x, 0, x + 10, 10], "color": color}  # noqa: E731
    score = geneval.flow_grpo_score
    two = {"include": [{"class": "cat", "count": 2, "color": "red"}]}
    assert score(two, [thing("cat", 0, "red"), thing("cat", 50, "red")]) == 1
    assert score(two, [thing("cat", 0, "red"), thing("cat", 50, "blue")]) == 0.75
    assert score(two, [thing("cat", 0, "red")]) == 0.25                                       # number 1/2, colour 0
    assert score({"include": [{"class": "cat", "count": 1}]}, [thing("cat", x) for x in (0, 20, 40)]) == -1
    beside = {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}
    assert score(beside, [thing("cat", 50), thing("dog", 0)]) == 1
    assert score(beside, [thing("cat", 0), thing("dog", 50)]) == 0.75                         # 1, 1, 0 and 1
    assert score(beside, [thing("dog", 50)]) == pytest.approx(1 / 3)                          # 0, 1, 0
    assert score({}, []) == 0


def test_a_mask2former_of_an_older_transformers_loads(folders, tmp_path):
    """It stored Swin's index of relative positions, and had no norm behind Swin's last stage."""
    import shutil
    shutil.copytree(folders / "mask2former", tmp_path / "old")
    stored = load_file(tmp_path / "old" / "model.safetensors")
    kept = {key: x for key, x in stored.items() if ".swin.layernorm." not in key}
    index = {key.replace("bias_table", "index"): torch.zeros(16, 16, dtype=torch.int64) for key in stored if key.endswith("bias_table")}
    assert len(kept) < len(stored) and index
    save_file(kept | index, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    old, new = (detectors.load_mask2former(str(folder)) for folder in (tmp_path / "old", folders / "mask2former"))
    a, b = (find(images(1), [["cat"]])[0] for find in (old, new))
    assert [t["score"] for t in a] == pytest.approx([t["score"] for t in b], abs=1e-6)
    save_file({key: x for key, x in kept.items() if "class_predictor" not in key}, tmp_path / "old" / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights are not those of its config.*class_predictor"):
        detectors.load_mask2former(str(tmp_path / "old"))


# ---- judges ----


@pytest.mark.parametrize("name", ["qwen", "qwen3", "internvl"])
def test_a_chat_judge_reads_what_its_own_processor_lays_out(folders, name):
    from transformers import AutoModelForImageTextToText, AutoProcessor
    judge, x = judge.load_judge(str(folders / name)), images(2)
    model, processor = (auto.from_pretrained(folders / name) for auto in (AutoModelForImageTextToText, AutoProcessor))
    words = processor.tokenizer
    for n, question in enumerate(("is there a cat ?", "is there a red dog in the image ?")):
        said = [{"type": "image"}, {"type": "text", "text": f"{question} Answer yes or no."}]
        text = processor.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True, tokenize=False)
        given = processor(images=[x[n]], text=[text], do_rescale=False, return_tensors="pt")
        with torch.no_grad():
            chances = model(**given).logits[0, -1].softmax(-1)
        yes, no = (chances[words.convert_tokens_to_ids(word)] for word in ("yes", "no"))
        assert judge.yes_probability(x[n:n + 1], [question]).item() == pytest.approx((yes / (yes + no)).item(), abs=1e-5)
        assert judge.answer_probability(x[n:n + 1], [question], ["yes"], [0]).item() == pytest.approx(yes.item(), abs=1e-6)


@pytest.mark.parametrize("name", ["qwen", "qwen3", "internvl"])
def test_a_chat_judges_answer_does_not_depend_on_longer_rows_beside_it(folders, name):
    judge, x = judge.load_judge(str(folders / name)), images(3)
    asked = ["no ?", "is there a red dog in the image of a computer mouse ?", "how many ?", "is there a cat ?"]
    whole = judge.yes_probability(x, asked, [0, 0, 2, 1])
    alone = [judge.yes_probability(x[n:n + 1], [question]).item() for n, question in zip((0, 0, 2, 1), asked)]
    assert whole.tolist() == pytest.approx(alone, abs=1e-5) and torch.equal(whole, judge.yes_probability(x, asked, [0, 0, 2, 1]))


def test_a_question_cannot_bring_the_judges_own_markers(folders):
    judge = judge.load_judge(str(folders / "qwen"))
    assert judge.row("a <|image_pad|> cat") == judge.row("a cat") and judge.row("a cat").count("<|image_pad|>") == 1


def test_a_judge_that_thinks_first_or_has_no_chat_template_is_refused(folders, tmp_path):
    torch.manual_seed(0)
    tiny.build_qwen(tmp_path / "thinks", template=tiny.CHAT + "{{ '<think>\n' }}")
    with pytest.raises(ValueError, match="made to think before it answers"):
        judge.load_judge(str(tmp_path / "thinks"))
    tiny.build_qwen(tmp_path / "bare", template=None)
    with pytest.raises(ValueError, match="has no chat template"):
        judge.load_judge(str(tmp_path / "bare"))


def test_a_chat_judge_is_told_how_to_answer_by_what_is_expected(folders, monkeypatch):
    judge, asked = judge.load_judge(str(folders / "qwen")), []
    real = judge.next_logits
    monkeypatch.setattr(judge, "next_logits", lambda seen, questions: asked.extend(questions) or real(seen, questions))
    judge.answer_probability(images(1), ["how many ?", "is there a cat ?"], ["two", "Yes"], [0, 0])
    assert asked == ["how many ? Answer in one word.", "is there a cat ? Answer yes or no."]
    monkeypatch.setattr(judge, "next_logits", lambda seen, questions: torch.eye(len(judge.tokenizer))[[0] * len(questions)] * 100)
    with pytest.raises(ValueError, match="of its probability on yes, no and numbers"):
        judge.answer_probability(images(1), ["how many ?"], ["two"], [0])


class Told:
    """A judge whose answers are known."""

    def __init__(self, chances):
        self.chances, self.asked = chances, []

    def answer_probability(self, images, questions, answers, of):
        self.asked += list(zip(of, questions, answers))
        return torch.tensor([self.chances[question] for question in questions])


def test_soft_tifa_is_the_mean_over_atoms_of_the_expected_answers():
    rows = [{"vqa_list": [["how many cats are there ?", "two"], ["is there a dog ?", "Yes"]]}, {"vqa_list": [["is there a dog ?", "Yes"]]}]
    samples = R.Samples(["two cats and a dog", "a dog"], rows, images=images(2))
    judge = Told({"how many cats are there ?": 0.25, "is there a dog ?": 1.0})
    assert R.SoftTifa(judge, None)(samples).tolist() == [0.625, 1.0]
    assert judge.asked == [(0, "how many cats are there ?", "two"), (0, "is there a dog ?", "Yes"), (1, "is there a dog ?", "Yes")]
    assert R.SoftTifa(judge, None, "geometric")(samples).tolist() == pytest.approx([0.5, 1.0])
    with pytest.raises(ValueError, match="no atoms"):
        R.SoftTifa(judge, lambda prompt, metadata: [])(replace(samples, metadata=[{}, {}]))


def test_a_count_is_expected_as_word_or_digit(folders):
    judge = judge.load_judge(str(folders / "qwen"))
    words = judge.tokenizer
    assert judge.spelled(words, "two") == [words.convert_tokens_to_ids("two")]             # this tokenizer has no digits
    with pytest.raises(ValueError, match="no token that says 'seven'"):
        judge.answer_probability(images(1), ["how many ?"], ["seven"], [0])


# ---- preference ----


@pytest.mark.parametrize("how", ["pickscore", "hpsv2"])
def test_a_clip_preference_is_the_scaled_cosine_of_the_plain_model(folders, how):
    from transformers import AutoTokenizer, CLIPModel
    made, x, prompts = preferences.load_preference(str(folders / "clip"), how), images(3, (16, 16)), ["a cat", "a red dog", "a cat"]
    model, words = CLIPModel.from_pretrained(folders / "clip"), AutoTokenizer.from_pretrained(folders / "clip")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))
    with torch.no_grad():
        given = words(prompts, padding=True, return_tensors="pt")
        out = model(input_ids=given.input_ids, attention_mask=given.attention_mask, pixel_values=(x - mean) / std)
    expected = out.logits_per_image.diagonal() / (26 if how == "pickscore" else model.logit_scale.exp().item())
    assert made.score(x, prompts).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_hpsv3_is_its_head_on_the_last_state_at_its_marker(folders):
    made, x = preferences.load_preference(str(folders / "hpsv3"), "hpsv3"), images(3)
    prompts = ["a cat", "a red dog in the image", "two <|Reward|> dog"]
    scores = made.score(x, prompts)
    marker = made.processor.tokenizer.convert_tokens_to_ids("<|Reward|>")
    stored = load_file(folders / "hpsv3" / "HPSv3.safetensors")
    for n, prompt in enumerate(prompts):
        given = preferences.chat(made.processor, x[n:n + 1], [made.ask.format(prompt=prompt.replace("<|Reward|>", " "))], made.model, "left")
        place = (given.input_ids[0] == marker).nonzero().item()
        with torch.no_grad():
            h = made.model.model(**given).last_hidden_state[0, place]
        for layer in (0, 3, 5):
            h = h @ stored[f"rm_head.{layer}.weight"].T + stored[f"rm_head.{layer}.bias"]
            h = h.relu() if layer < 5 else h
        assert scores[n].item() == pytest.approx(h[0].item(), abs=1e-5)
    (folders / "hpsv3" / "HPSv3.safetensors").rename(folders / "gone")
    with pytest.raises(OSError, match="no HPSv3.safetensors, the file of MizzenAI/HPSv3"):
        preferences.load_preference(str(folders / "hpsv3"), "hpsv3")
    (folders / "gone").rename(folders / "hpsv3" / "HPSv3.safetensors")


def test_hpsv3s_keys_are_renamed_and_a_missing_one_is_refused(folders, tmp_path):
    import shutil
    assert preferences.renamed("visual.blocks.0.norm1.weight") == "model.visual.blocks.0.norm1.weight"
    assert preferences.renamed("model.layers.0.mlp.up_proj.weight") == "model.language_model.layers.0.mlp.up_proj.weight"
    shutil.copytree(folders / "hpsv3", tmp_path / "h")
    stored = load_file(tmp_path / "h" / "HPSv3.safetensors")
    save_file({k: v for k, v in stored.items() if k != "model.norm.weight"}, tmp_path / "h" / "HPSv3.safetensors")
    with pytest.raises(ValueError, match="weights are not those of its config: {'missing_keys': .'model.language_model.norm.weight'"):
        preferences.load_preference(str(tmp_path / "h"), "hpsv3")


@pytest.mark.parametrize("text, score", [
    ("Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 3", 0.625), ("**Final Score: 5**", 1.0),
    ("Final Score: 1", 0.0)])
def test_written_scores_are_read(text, score):
    assert preferences.written_score(text, "a cat") == score


@pytest.mark.parametrize("text", ["", "a fine image", "Alignment Score: 4\nStyle Score: 3", "Final Score: 7", "Final Score: 0"])
def test_a_text_without_scores_is_an_error(text):
    with pytest.raises(ValueError, match="for 'a cat', expected three scores, or one final score"):
        preferences.written_score(text, "a cat")


def test_a_prompt_cannot_bring_markers_into_a_preference_model(folders):
    made = preferences.load_preference(str(folders / "hpsv3"), "hpsv3")
    assert torch.equal(made.score(images(1), ["a <|image_pad|> cat <|Reward|>"]), made.score(images(1), ["a cat"]))


def test_unified_reward_asks_the_chat_model_and_fails_on_what_it_cannot_parse(folders, monkeypatch):
    made = preferences.load_preference(str(folders / "qwen"), "unified", batch_size=2)
    made.longest = 3
    with pytest.raises(ValueError, match="the preference model wrote"):
        made.score(images(3), ["a cat"] * 3)
    monkeypatch.setattr(made.processor, "batch_decode", lambda tokens, **how: ["Final Score: 3"] * len(tokens))
    assert made.score(images(3), ["a cat"] * 3).tolist() == [0.5] * 3


def test_a_preference_needs_a_model_of_its_kind(folders):
    with pytest.raises(ValueError, match="--pref needs --pref_model"):
        preferences.load_preference("", "pickscore")
    with pytest.raises(ValueError, match="holds a qwen2_5_vl model, expected clip"):
        preferences.load_preference(str(folders / "qwen"), "pickscore")


# ---- SigLIP 2 of variable resolution, and a SigLIP that learns ----


def test_a_naflex_siglip_is_the_cosine_of_the_plain_model_and_processor(folders):
    from transformers import AutoModel, Siglip2ImageProcessor
    siglip, x = siglip.load_siglip(str(folders / "naflex")), images(2, (24, 48))
    model, processor = AutoModel.from_pretrained(folders / "naflex"), Siglip2ImageProcessor.from_pretrained(folders / "naflex")
    given = processor([x[0]], do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        plain = model.vision_model(**given).pooler_output[0]
    assert torch.allclose(siglip.embed_images(x)[0], F.normalize(plain, dim=-1), atol=1e-5)
    assert siglip.embed_patches(x).shape[1] == given.spatial_shapes[0].prod() <= 16
    samples = R.Samples(["a cat", "a red dog"], [CAT, {}], images=x)
    assert R.Semantic(siglip)(samples).abs().le(1).all() and R.Dense(siglip)(samples).shape == (2,)


def test_a_learning_siglip_comes_to_like_the_pictures_it_is_shown(folders):
    siglip, x, prompts = siglip.load_siglip(str(folders / "naflex")), images(4), ["a cat", "a red dog", "a cat", "two dog"]
    learner, samples = siglip.Learner(siglip, 1e-3), R.Samples(prompts, [{}] * 4, images=x)
    before, first = R.Semantic(siglip)(samples).mean(), {k: v.clone() for k, v in siglip.model.state_dict().items()}
    gradients = []
    for size in (4, 3):                                         # in parts the gradient is that of the whole
        siglip.batch_size = size
        learner.learn(x, prompts, lambda optimizer: gradients.append([p.grad.clone() for p in siglip.model.parameters()]), 1)
        siglip.model.load_state_dict(first)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))
    losses = [learner.learn(x, prompts, lambda optimizer: None, 1) for _ in range(20)]
    assert losses[-1] < losses[0] and R.Semantic(siglip)(samples).mean() > before
    assert {name.split(".")[0] for name in learner.state()} == {"referee"}


# ---- in a run ----

SMALL = ["--group_size", "2", "--steps", "2", "--eval_every", "0", "--save_every", "1", "--think", "0", "--ask", "0", "--edit", "0", "--draw", "2",
         "--accuracy", "0", "--kn", "0"]
ALONE = Ranks(0, 1, torch.device("cpu"))


def test_genevals_rules_reward_prompts_of_a_file_with_a_published_detector(folders, tmp_path, capsys):
    rows = [{"prompt": "a red circle", "tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]},
            {"prompt": "two squares", "tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = [*SMALL, "--sem", "0", "--ins", "1", "--prompts", str(tmp_path / "p.jsonl"), "--colors", str(folders / "clip"), "--out",
             str(tmp_path / "out")]
    run = train.begin(recipes.parse([*flags, "--detector", str(folders / "owlv2"), "--ins_by", "flow_grpo"]), ALONE)
    assert "ins: GenEval rules, detector" in capsys.readouterr().err
    stats = train.one_step(run, 0)
    assert stats["draw/rewards/ins/mean"] <= 1
    flags[-1] = str(tmp_path / "other")
    with pytest.raises(ValueError, match="--ins reads detections: name a --detector"):
        train.begin(recipes.parse(flags), ALONE)
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a red circle", "include": [{"class": "zebra", "count": 1}]}))
    with pytest.raises(ValueError, match="does not know zebra"):
        train.begin(recipes.parse([*flags, "--detector", str(folders / "mask2former")]), ALONE)


def test_a_referee_that_learns_is_kept_and_resumed_bit_for_bit(tmp_path):
    flags = [*SMALL, "--ins", "0", "--train_referee", "1e-3"]
    whole, parts = (["--out", str(tmp_path / name)] for name in ("whole", "parts"))
    train.train(recipes.parse([*flags, *whole]), ALONE)
    train.train(recipes.parse([*flags, *parts, "--steps", "1"]), ALONE)
    train.train(recipes.parse([*flags, *parts, "--resume"]), ALONE)
    a, b = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    first = load_file(Path(sample.TOY) / "siglip" / "model.safetensors")
    assert not torch.equal(a["referee.vision_model.head.probe"], first["vision_model.head.probe"])


@pytest.mark.parametrize("more, said", [
    (["--sem", "0", "--ins", "1", "--train_referee", "1e-4"], "--train_referee 0.0001 teaches the SigLIP, which no reward"),
    (["--train_referee", "1e-4", "--referee_bf16"], "--train_referee trains in fp32"),
    (["--referee_device", "gpu"], "--referee_device gpu: no such device here"),
    (["--referee_device", "cuda:99"], "--referee_device cuda:99: no such device here"),
    (["--pref", "1"], "--pref needs --pref_model")])
def test_referees_that_cannot_work_are_refused(tmp_path, more, said):
    with pytest.raises(ValueError, match=said):
        train.begin(recipes.parse([*SMALL, *more, "--out", str(tmp_path)]), ALONE)


def test_a_checkpoint_that_asks_for_code_of_its_own_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match="cannot be loaded"):
        judge.load_judge(str(tmp_path))


def test_a_score_that_is_not_finite_is_named_with_reward_prompt_and_sample():
    samples = R.Samples(["a cat", "a dog"], [{}, {}], images=images(2))
    with pytest.raises(R.RewardError, match="reward 'x' failed on prompt 'a dog': ValueError: it returned nan for sample 1"):
        R.score({"x": lambda samples: torch.tensor([0.5, float("nan")])}, samples)


# ---- what every reward that asks a model must keep ----


def asked(folders, name):
    """(a reward, the model that it asks) on the tiny models."""
    if name in ("qwen", "qwen3", "internvl"):
        judge = judge.load_judge(str(folders / name))
        return R.Knowledge(judge), judge.model
    if name == "tifa":
        judge = judge.load_judge(str(folders / "qwen"))
        return R.SoftTifa(judge, lambda prompt, metadata: [questions.Question(f"is there {prompt} ?", "Existence")]), judge.model
    if name == "naflex":
        siglip = siglip.load_siglip(str(folders / name))
        return R.Semantic(siglip), siglip.model
    made = preferences.load_preference(str(folders / ("hpsv3" if name == "hpsv3" else "clip")), name)
    return R.Preference(made), made.model if name == "hpsv3" else made.clip.model


@pytest.mark.parametrize("name", ["qwen", "qwen3", "internvl", "tifa", "naflex", "pickscore", "hpsv2", "hpsv3"])
def test_a_score_is_its_own_whatever_stands_beside_it(folders, name):
    reward, model = asked(folders, name)
    prompts, x = ["a cat", "a red dog in the image", "two dog", "a cat"], images(4)
    samples = R.Samples(prompts, [{}] * 4, images=x)
    whole = R.score({name: reward}, samples)[name]
    assert torch.equal(whole, R.score({name: reward}, samples)[name]) and not any(p.requires_grad for p in model.parameters())
    order = [2, 0, 3, 1]
    turned = R.score({name: reward}, R.Samples([prompts[i] for i in order], [{}] * 4, images=x[order]))[name]
    assert torch.allclose(turned, whole[order], atol=1e-5)
    alone = torch.cat([R.score({name: reward}, R.Samples(prompts[i:i + 1], [{}], images=x[i:i + 1]))[name] for i in range(4)])
    assert torch.allclose(alone, whole, atol=1e-5)
    if name not in ("pickscore", "hpsv3"):                      # those two have no bounds
        assert whole.abs().max() <= 1
