"""CoRL: pairs that share an advantage, cycle and token-matching rewards, answers with options, guidance outside the likelihood."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from referees import captions
from grpo import group_advantage
from policy import Guidance
from recipes import check, parse
from rewards import Samples
from sample import replay_gaps, replay_rollout, sample_plan, unguided
from studies.geneval import geneval
from support.run import Ranks
from support import pictures
from support import rows as files
import rewards as R
import tasks
import recipes
import train
from toy import shapes, tiny

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = ["--recipe", "corl", "--pair_image", "3", "--pair_text", "3", "--group_size", "4", "--steps", "1", "--eval_every", "0"]
NOUNS, ADJECTIVES = st.sampled_from(["circle", "dog", "box"]), st.sampled_from(["red", "big", "old"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train.begin(parse([*SMALL, "--out", str(tmp_path_factory.mktemp("corl"))]), ALONE)


def images_of(n, seed=0, size=32):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def drawn(prompts, images, reals=None):
    return Samples(prompts=list(prompts), metadata=[{}] * len(prompts), images=images, reals=reals)


# ---- answers ----


@pytest.mark.parametrize("said, score", [
    ("(b)", 1), ("B", 1), ("b.", 1), ("blue", 1), ("(b) blue", 1), ("b: blue", 1), ("<answer> (b) </answer>", 1), ("Blue.", 1),
    ("a", 0), ("(a)", 0), ("red", 0), ("(a) blue", 0), ("(b) red", 0), ("a blue one", 0), ("b or a", 0), ("<think> (b) </think>", 0), ("", 0)])
def test_multiple_choice_is_earned_by_letter_text_or_both_and_by_nothing_else(said, score):
    for right in ("(b)", "b", "Blue"):
        samples = Samples(prompts=["q"], metadata=[{}], texts=[said], answers=[right], options=[["red", "blue", "green"]])
        assert R.answer_accuracy(samples).item() == score


def test_an_option_that_is_spelled_like_another_letter_does_not_count_as_that_letter():
    samples = Samples(prompts=["q"] * 2, metadata=[{}] * 2, texts=["a", "(b) a"], answers=["(b)"] * 2, options=[["b", "a"]] * 2)
    assert R.answer_accuracy(samples).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("answer", ["d", "pink", "(a) blue", ""])
def test_an_answer_that_is_no_option_is_an_error(answer):
    with pytest.raises(ValueError, match="must be the letter or the text of one"):
        R.right_option(answer, ["red", "blue"])


@given(st.text(), st.text())
def test_graded_accuracy_is_1_for_equal_words_and_within_0_and_1(a, b):
    assert 0 <= R.soft_jaccard(a, b) <= 1 and R.soft_jaccard(a, a) == 1


@pytest.mark.parametrize("a, b, score", [
    ("red circle", "circle red", 1), ("red circle", "red", 1 / 2), ("a b", "c d", 0), ("", "", 1), ("", "a", 0),
    ("circles", "circle", (12 / 13) / (2 - 12 / 13)), ("the circles are red", "red circle", (1 + 12 / 13) / (6 - 1 - 12 / 13))])
def test_near_words_count_their_ratio(a, b, score):
    assert R.soft_jaccard(a, b) == pytest.approx(score)


def test_graded_answers_are_a_setting_of_open_questions_alone():
    samples = Samples(prompts=["q"] * 2, metadata=[{}] * 2, texts=["red circle", "red circle"], answers=["red", "a"], options=[None, ["red", "blue"]])
    assert R.answer_accuracy(samples, graded=True).tolist() == [0.5, 0.0] and R.answer_accuracy(samples).tolist() == [0.0, 0.0]


# ---- cycle: the text half ----


@pytest.mark.parametrize("caption, tuples", [
    ("a circle", {("circle",)}), ("A photo of a red circle.", {("circle",), ("circle", "red")}),
    ("two red circles and a square", {("circle",), ("circle", "red"), ("circle", "2"), ("square",)}),
    ("a red circle and a blue circle", {("circle",), ("circle", "red"), ("circle'",), ("circle'", "blue")}),
    ("a circle left of a square", {("circle",), ("square",), ("circle", "left of", "square")}),
    ("a square right of a circle", {("circle",), ("square",), ("circle", "left of", "square")}),
    ("a circle below a square", {("circle",), ("square",), ("square", "above", "circle")})])
def test_a_caption_is_taken_apart_by_rule(caption, tuples):
    assert captions.caption_tuples(caption) == tuples


@pytest.mark.parametrize("caption", ["dogs running", "circle", "", "red circles", "a circle left of a square above a triangle"])
def test_a_caption_that_no_rule_reads_is_refused(caption):
    with pytest.raises(ValueError, match="--recaption_by"):
        captions.caption_tuples(caption)


@given(st.lists(st.tuples(ADJECTIVES, NOUNS), min_size=1, max_size=4, unique_by=lambda pair: pair[1]), st.randoms())
def test_tuple_f1_is_1_in_any_order_symmetric_and_falls_when_an_object_is_left_out(things, random):
    say = lambda some: " and ".join(f"a {a} {n}" for a, n in some)
    mixed = random.sample(things, len(things))
    assert captions.tuple_f1(say(things), say(mixed)) == 1
    if len(things) > 1:
        less = captions.tuple_f1(say(things), say(things[1:]))
        assert 0 < less < 1 and less == captions.tuple_f1(say(things[1:]), say(things))


@pytest.mark.parametrize("caption, score", [
    ("a red circle", 1), ("circle orange circle and a red circle", 4 / 5), ("", 0), ("a red circle left of a square above a dog", 4 / 6)])
def test_what_no_rule_reads_in_a_captioners_caption_is_a_thing_that_the_prompt_does_not_say(caption, score):
    """A captioner stammers before a spoiled picture; that must neither stop a run nor help the picture."""
    assert captions.tuple_f1("a red circle", caption) == pytest.approx(score)
    with pytest.raises(ValueError, match="--recaption_by"):
        captions.tuple_f1("red circle", caption)


def test_every_caption_of_the_toy_can_be_held_against_every_prompt():
    rng = np.random.default_rng(0)
    for m in shapes.prompts("train")[::7]:
        scene = shapes.sample_scene(m, rng)
        assert 0 < captions.tuple_f1(m["prompt"], shapes.describe(scene)) <= 1
        assert captions.tuple_f1(m["prompt"], shapes.describe(shapes.sample_scene(shapes.wrong_metadata(m, rng), rng))) < 1


def test_the_rows_own_picture_earns_1_under_a_right_captioner_and_less_when_an_object_is_removed():
    scene = (shapes.Object("circle", "red", 0, 0), shapes.Object("square", "blue", 0, 1), shapes.Object("triangle", "green", 1, 0))
    prompt, right = shapes.describe(scene), lambda images: [shapes.describe(scene[:k]) for k in images]
    samples = SimpleNamespace(prompts=[prompt] * 2, need=lambda name: [3, 2])
    whole, less = R.Recaption(SimpleNamespace(captions=right))(samples).tolist()
    assert whole == 1 and less < 1
    pictures = [torch.from_numpy(shapes.render(s).copy()).permute(2, 0, 1)[None] / 255 for s in (scene, scene[:2])]
    for how in ("ssim", "psnr", "mse"):
        same, other = (R.Likeness(how)(drawn([prompt], each, pictures[0])).item() for each in pictures)
        assert same == pytest.approx(1) and other < same


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5))
def test_token_f1_is_that_of_loops_over_words(seed, n, m):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(1, 5, 6, generator=g), torch.randn(1, 7, 6, generator=g)
    a_mask, b_mask = torch.arange(5)[None] < n, torch.arange(7)[None] < m
    cosine = [[F.cosine_similarity(x, y, dim=0).item() for y in b[0, :m]] for x in a[0, :n]]
    recall = sum(map(max, cosine)) / n
    precision = sum(max(row[j] for row in cosine) for j in range(m)) / m
    want = 2 * recall * precision / max(recall + precision, 1e-6)
    assert R.token_f1(a, a_mask, b, b_mask).item() == pytest.approx(want, rel=1e-4, abs=1e-5)


# ---- cycle: the image half ----


def test_ssim_is_that_of_a_loop_over_windows():
    a, b = images_of(2, 1, 14), images_of(2, 2, 14)
    b = 0.7 * a + 0.3 * b
    at = np.arange(11) - 5.0
    w = np.exp(-at**2 / 4.5)
    w = np.outer(w, w) / w.sum() ** 2
    for got, x, y in zip(R.structural_similarity(a, b).tolist(), a.double().numpy(), b.double().numpy()):
        each = []
        for c in range(3):
            for i in range(4):
                for j in range(4):
                    p, q = x[c, i:i + 11, j:j + 11], y[c, i:i + 11, j:j + 11]
                    mp, mq = (w * p).sum(), (w * q).sum()
                    vp, vq, cov = (w * (p - mp)**2).sum(), (w * (q - mq)**2).sum(), (w * (p - mp) * (q - mq)).sum()
                    each.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        assert got == pytest.approx(np.mean(each), rel=1e-4)


@pytest.mark.parametrize("how", ["ssim", "psnr", "mse"])
def test_likeness_is_in_range_the_same_one_by_one_and_resizes_the_real_image(how):
    images, reals = images_of(4), images_of(4, 5)
    together = R.Likeness(how)(drawn("abcd", images, reals))
    alone = torch.cat([R.Likeness(how)(drawn("a", images[i:i + 1], reals[i:i + 1])) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-6) and (together >= 0).all() and (together <= 1).all()
    flat = torch.full((1, 3, 64, 64), 0.3)
    assert R.Likeness(how)(drawn("a", torch.full((1, 3, 32, 32), 0.3), flat)).item() == pytest.approx(1, abs=1e-3)


def test_lpips_is_asked_for_its_distance_and_says_what_is_missing(monkeypatch):
    assert R.Likeness("lpips", lambda a, b: torch.tensor([0.25, 3.0]))(drawn("ab", images_of(2), images_of(2))).tolist() == [0.75, 0.0]
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips; or use --likeness_by ssim"):
        captioner.load_lpips()


# ---- token matching ----


@given(st.integers(0, 10**6))
def test_tim_is_symmetric_in_range_and_blind_to_padding_and_to_the_order_of_patches(seed):
    g = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, 4, 8, generator=g), torch.randn(2, 6, 8, generator=g)
    seen, read = torch.ones(2, 4, dtype=torch.bool), torch.arange(6)[None] < torch.tensor([[6], [3]])
    score = lambda *states: R.TokenMatch(lambda images, prompts: states)(drawn("ab", images_of(2)))
    want = score(image, seen, text, read)
    assert (want >= 0).all() and (want <= 1).all()
    assert torch.allclose(score(text, read, image, seen), want, atol=1e-6)
    assert torch.allclose(score(image[:, torch.randperm(4, generator=g)], seen, text, read), want, atol=1e-6)
    other = torch.where(read[..., None], text, 9 * torch.randn(2, 6, 8, generator=g))
    wider = torch.cat([other, torch.randn(2, 3, 8, generator=g)], 1), torch.cat([read, torch.zeros(2, 3, dtype=torch.bool)], 1)
    assert torch.allclose(score(image, seen, *wider), want, atol=1e-6)
    one = score(image, seen, image.repeat(1, 2, 1), torch.ones(2, 8, dtype=torch.bool))
    assert torch.allclose(one, torch.ones(2), atol=1e-6)


def test_tim_takes_the_policys_states_of_the_image_and_of_the_prompts_words_behind_it(run):
    """Against one sample at a time, without padding, read by the policy's own calls."""
    policy, images, prompts = run.policy, images_of(3), ["a circle", "a photo of a red circle and a blue square", "three squares"]
    image, seen, text, read = tasks.token_states(lambda: nullcontext(policy), nullcontext, 2)(images, prompts)
    for i, prompt in enumerate(prompts):
        tokens, mask = policy.encode_text([prompt])
        states, one, context = policy.image_states(images[i:i + 1] * 2 - 1)
        same = policy.append_image(policy.empty(1), pixels=images[i:i + 1] * 2 - 1)
        assert all(torch.equal(a, b) for a, b in zip(context.keys, same.keys))
        words, _ = policy.append_text(context, tokens, mask, states=True)
        assert torch.allclose(policy.head(words), policy.append_text(context, tokens, mask)[0], atol=1e-6)
        assert read[i].sum() == len(prompt.split()) and torch.allclose(text[i][read[i]], words[0, 1:-1], atol=1e-5)
        assert seen[i].all() and torch.allclose(image[i], states[0], atol=1e-5) and one.all()


def test_tim_reads_the_frozen_reference_unless_the_moving_policy_is_named(tmp_path):
    samples = drawn(["a circle", "a red square"], images_of(2))
    for whose, moves in (("reference", False), ("policy", True)):
        run = train.begin(parse([*SMALL, "--tim_of", whose, "--out", str(tmp_path / whose)]), ALONE)
        before = run.rewards["tim"](samples)
        with torch.no_grad():
            for p in run.policy.trainable_by_expert()["understanding"]:
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        assert torch.equal(run.rewards["tim"](samples), before) != moves and (run.frozen is None) == moves


# ---- models behind rewards ----


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioner")
    torch.manual_seed(0)
    tiny.build_captioner(folder, shapes.VOCABULARY)
    return str(folder)


def test_captions_are_those_of_the_published_class_one_by_one(captioner):
    """A greedy loop by hand over the decoder, from the begin token to the separator."""
    ours, images = captioner.load_captioner(captioner, batch_size=2), images_of(3)
    model, text = ours.model, ours.model.config.text_config
    for caption, image in zip(ours.captions(images), images):
        vision = model.vision_model(pixel_values=(image[None] - 0.5) / 0.5)[0]
        ids = [text.bos_token_id]
        while len(ids) <= 50:
            logits = model.text_decoder(input_ids=torch.tensor([ids]), encoder_hidden_states=vision, is_decoder=True).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == text.sep_token_id:
                break
        assert caption == ours.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertModel
    folder, words = tmp_path_factory.mktemp("bert"), shapes.VOCABULARY
    tokenizer = tiny.word_tokenizer(words, append_eos=True, max_length=32)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                        max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_token_states_are_the_named_layers_without_special_tokens(bert, layer):
    ours, texts = captioner.load_text_encoder(bert, layer=layer, batch_size=2), ["a circle", "three red squares", "a"]
    states, mask = ours.states(texts)
    for state, seen, text in zip(states, mask, texts):
        ids = ours.tokenizer(text, return_tensors="pt").input_ids
        want = ours.model(input_ids=ids, output_hidden_states=True).hidden_states[layer][0, :-1]         # the last is <eos>
        assert torch.allclose(state[seen], want, atol=1e-5) and len(want) == len(text.split())


def test_recaptions_by_token_states_are_the_f1_of_prompt_and_caption(bert):
    encoder, said = captioner.load_text_encoder(bert), ["a red circle", "two squares", "a circle"]
    reward = R.Recaption(SimpleNamespace(captions=lambda images: said), "bertscore", encoder)
    scores = reward(drawn(["a red circle", "a circle and a square", "three triangles"], images_of(3)))
    alone = [R.token_f1(*encoder.states([a]), *encoder.states([b])).item() for a, b in
             zip(["a red circle", "a circle and a square", "three triangles"], said)]
    assert scores[0].item() == pytest.approx(1, abs=1e-5) and scores.tolist() == pytest.approx([max(x, 0) for x in alone], abs=1e-5)


def test_models_of_another_class_a_layer_too_many_and_names_that_are_not_there_are_one_line(captioner, bert, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load, path, words in ((captioner.load_captioner, bert, "holds a bert model, expected blip"),
                              (captioner.load_text_encoder, captioner, "holds a blip model, expected bert"),
                              (lambda path: captioner.load_text_encoder(path, layer=3), bert, "has layers 0 .the embeddings. to 2, not 3"),
                              (captioner.load_captioner, "out/captioner", "no such folder; as a hub name it is looked for in")):
        with pytest.raises((ValueError, OSError), match=words) as error:
            load(path)
        assert "\n" not in str(error.value)


# ---- pairs ----


def acted_of(cfg, seed=0, names=("pair_image", "pair_text")):
    g = torch.Generator().manual_seed(seed)
    n = cfg.rows["pair_image"] * cfg.group_size
    parts = {"pair_image": ("recaption", "likeness", "tim"), "pair_text": ("accuracy", "format")}
    return [(SimpleNamespace(task=name, initial=None), None, {k: torch.rand(n, generator=g) for k in parts[name]}, {}) for name in names]


@pytest.mark.parametrize("how", ["joint", "sum", "none"])
def test_halves_share_an_advantage_as_the_setting_says(how):
    cfg = parse([*SMALL, "--pair", how])
    acted = acted_of(cfg)
    (image, text), G = (adv for adv, _ in train.advantage_phase(acted, cfg, ALONE)), cfg.group_size
    r_image, r_text = (sum(each[2].values()) for each in acted)
    alone = [group_advantage(r, G, std="unbiased") for r in (r_image, r_text)]
    want = {"joint": [group_advantage(r_image + 0.8 * r_text, G, std="unbiased")] * 2, "sum": [alone[0] + 0.8 * alone[1]] * 2, "none": alone}
    assert torch.allclose(image, want[how][0], atol=1e-6) and torch.allclose(text, want[how][1], atol=1e-6)


@given(st.integers(0, 10**6), st.sampled_from(["joint", "sum", "none"]), st.sampled_from(["sum", "each"]))
def test_swapping_the_two_halves_changes_nothing(seed, how, normalise):
    cfg = parse([*SMALL, "--pair", how, "--normalise", normalise])
    acted = acted_of(cfg, seed)
    forth = [adv for adv, _ in train.advantage_phase(acted, cfg, ALONE)]
    back = [adv for adv, _ in train.advantage_phase(acted[::-1], cfg, ALONE)][::-1]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(forth, back))
    assert torch.equal(*forth) == (how != "none")


def test_a_half_by_itself_is_compared_by_itself():
    cfg = parse([*SMALL, "--pair_text", "0"])
    ((adv, _),) = train.advantage_phase(acted_of(cfg, names=("pair_image",)), cfg, ALONE)
    assert torch.allclose(adv, group_advantage(sum(acted_of(cfg, names=("pair_image",))[0][2].values()), 4, std="unbiased"), atol=1e-6)


def test_the_halves_of_a_row_are_about_one_picture(run):
    image, text = run.source.batches(3, ALONE)
    assert (image.task, text.task) == ("pair_image", "pair_text") and len(image.rows) == len(text.rows) == 3
    for a, b in zip(image.rows, text.rows):
        assert torch.equal(a.real, b.source) and a.text == a.metadata["prompt"] and b.answer and a.pixels is None
        assert geneval.geneval_check(a.metadata, shapes.detect(pictures.to_bytes(a.real[None]))[0])[0]
    assert not set(image.index) & set(text.index)


def test_alternating_gives_one_task_a_step_in_turns(tmp_path):
    run = train.begin(parse([*SMALL, "--alternate", "--out", str(tmp_path)]), ALONE)
    assert [[b.task for b in run.source.batches(step, ALONE)] for step in range(3)] == [["pair_image"], ["pair_text"], ["pair_image"]]


def test_replay_equals_rollout_for_both_halves(run):
    for batch in run.source.batches(0, ALONE):
        r = train.act(run.policy, batch, run.cfg)
        assert max(gap for _, gap in replay_gaps(run.policy, r)) < 1e-4


def test_a_step_of_pairs_moves_both_experts_and_logs_each_half(tmp_path):
    train.train(parse([*SMALL, "--out", str(tmp_path)]), ALONE)
    row = next(r for r in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if "loss" in r)
    for half, parts in (("pair_image", ("recaption", "likeness", "tim")), ("pair_text", ("accuracy", "format"))):
        assert all(0 <= row[f"{half}/rewards/{k}/mean"] <= 1 for k in parts)
    assert sum(v for k, v in row.items() if k.startswith("pair_image/advantage_share/")) == pytest.approx(1, abs=1e-4)
    assert row["grad_norm"] > 0 and row["pair_image/image/ratio/mean"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("more, words", [
    (["--pair_text", "4"], "--pair_image 3 and --pair_text 4 are halves of the same rows"),
    (["--guidance", "3", "--guidance_in", "sampling", "--ratio_norm"], "--ratio_norm compares means"),
    (["--pairs", "none.jsonl"], "none.jsonl does not exist")])
def test_pairs_that_cannot_work_are_refused(tmp_path, more, words):
    with pytest.raises((ValueError, OSError), match=words):
        train.begin(parse([*SMALL, *more, "--out", str(tmp_path)]), ALONE)


def pairs_file(folder, **changes):
    from PIL import Image
    Image.fromarray(shapes.render((shapes.Object("circle", "red", 0, 0),))).save(folder / "a.png")
    row = {"image": "a.png", "caption": "a red circle", "question": "what color is it ?", "answer": "(b)", "options": ["blue", "red"]} | changes
    (folder / "pairs.jsonl").write_text(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n")
    return str(folder / "pairs.jsonl")


def test_pairs_of_a_file_become_both_halves(tmp_path):
    run = train.begin(parse([*SMALL, "--pair_image", "1", "--pair_text", "1", "--pairs", pairs_file(tmp_path), "--out", str(tmp_path)]), ALONE)
    image, text = (batch.rows[0] for batch in run.source.batches(0, ALONE))
    assert image.text == "a red circle" and torch.equal(image.real, text.source)
    assert text.text == "what color is it ? (a) blue (b) red" and text.options == ["blue", "red"] and text.answer == "(b)"


def test_captions_that_no_rule_reads_are_refused_before_the_run(tmp_path):
    more = ["--pair_image", "1", "--pair_text", "1", "--pairs", pairs_file(tmp_path, caption="dogs running"), "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="dogs running.*--recaption_by jaccard"):
        train.begin(parse([*SMALL, *more]), ALONE)
    assert train.begin(parse([*SMALL, *more, "--recaption_by", "jaccard"]), ALONE)


@pytest.mark.parametrize("changes, words", [
    ({"caption": None}, "lacks .'caption'."), ({"image": "b.png"}, "images do not exist"), ({"answer": "green"}, "must be the letter or the text"),
    ({"options": "ab"}, "options must be a list"), ({"options": ["a", ""]}, "options must be a list")])
def test_rows_of_pairs_that_cannot_work_are_refused_by_file_and_question(tmp_path, changes, words):
    with pytest.raises((ValueError, OSError), match=words) as error:
        files.read_pairs(pairs_file(tmp_path, **changes))
    assert "pairs.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_multiple_choice_needs_options_and_open_questions_take_the_options_text(tmp_path):
    path = pairs_file(tmp_path)
    start = lambda *more: train.begin(parse(["--recipe", "corl_mc", "--choose", "0", *more, "--out", str(tmp_path / more[0])]), ALONE)
    run = start("--ask", "2", "--questions", path)
    assert [row.answer for row in run.source.batches(0, ALONE)[0].rows] == ["red", "red"]
    with pytest.raises(ValueError, match="--choose needs options in every row"):
        start("--choose", "2", "--questions", pairs_file(tmp_path, options=None, answer="red"))


# ---- guidance outside the likelihood ----


def test_guidance_that_the_likelihood_leaves_out_is_scored_without_it_and_said(tmp_path, capsys):
    more = ["--guidance", "4", "--out", str(tmp_path)]
    run = train.begin(parse([*SMALL, *more, "--guidance_in", "sampling"]), ALONE)
    batch = run.source.batches(0, ALONE)[0]
    r = train.act(run.policy, batch, run.cfg)
    plan = tasks.TASKS[batch.task].plan(batch.rows, batch.choices)
    guided = sample_plan(run.policy, plan, seed=run.cfg.seed, step=0, prompts=batch.index, G=4, guidance=Guidance(text_scale=4.0))
    flow, behaviour = r.segments[-1].flow, guided.segments[-1].flow
    assert r.guidance is None and torch.equal(flow.latents, behaviour.latents) and not torch.allclose(flow.logp, behaviour.logp)
    assert max(gap for _, gap in replay_gaps(run.policy, r)) < 1e-4
    assert torch.allclose(flow.means, replay_rollout(run.policy, replace(guided, guidance=None))[-1].flow.mean, atol=1e-5)
    stats = train.self_check(run.policy, [(batch, r, None)], run.cfg)
    assert stats["pair_image/guidance"] > 1e-3 and "what is trained is not what draws" in capsys.readouterr().err
    both = parse([*SMALL, *more])
    r = train.act(run.policy, batch, both)
    assert r.guidance == tasks.guidance_of(both, False) and max(gap for _, gap in replay_gaps(run.policy, r)) < 1e-4
    assert unguided(run.policy, r).guidance is None and tasks.guidance_of(parse(SMALL), False) is None


def test_the_checks_of_a_run_pass_for_every_recipe():
    for recipe in recipes.RECIPES:
        check(parse(["--recipe", recipe]), ALONE)
