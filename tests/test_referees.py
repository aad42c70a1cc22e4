"""Models that rewards ask: published classes, tiny, loaded as releases are, against plain computations."""

import copy
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import recipes
import tiny_referees as tiny
import torch
import torch.nn.functional as F
import train
from hypothesis import given, settings
from hypothesis import strategies as st
from referees import build, captioner, detectors, judge, preferences, siglip
from referees.load import load_model, numbers_in
from rewards import REWARDS, Dense, Entry, Knowledge, Preference, Samples, Semantic, score, token_f1
from safetensors.torch import load_file, save_file
from sample import TOY
from tiny_runs import ALONE
from toy import shapes
from toy.world import render_pixels

TOYS = {name: str(TOY.parent / name) for name in ("siglip", "judge", "captioner")}
PROMPTS = ["a red circle", "a photo of a blue square and a red circle", "a red circle", "a green triangle"]
THE_JUDGE = judge.load_judge(TOYS["judge"])


def images(n, size=32):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(n))


def samples_of(prompts=PROMPTS, x=None):
    return Samples(list(prompts), [{}] * len(prompts), images=images(len(prompts)) if x is None else x)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.Folders(tmp_path_factory.mktemp("referees"))


# ---- embeddings ----


@pytest.fixture(scope="module")
def encoder():
    return siglip.load_siglip(TOYS["siglip"], batch_size=3)


def test_pixels_are_those_of_the_published_image_processor(encoder):
    smooth = F.interpolate(images(2, 7), size=57, mode="bilinear").mul(255).to(torch.uint8)
    theirs = encoder.image_processor(list(smooth), return_tensors="pt").pixel_values
    # It rounds to 8 bits where it resizes: 0.004 a pixel, 0.008 normalised.
    assert torch.allclose(encoder.pixels(smooth / 255.0), theirs, atol=0.012)


def test_siglips_cosine_is_that_of_the_plain_model_and_processor(encoder):
    from transformers import AutoModel, AutoProcessor

    model, processor = (auto.from_pretrained(TOYS["siglip"]) for auto in (AutoModel, AutoProcessor))
    x = images(4).mul(255).to(torch.uint8)
    given = processor(text=PROMPTS, images=list(x), padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=given.input_ids, pixel_values=given.pixel_values)
    plain = torch.cosine_similarity(out.image_embeds, out.text_embeds)
    assert torch.allclose(Semantic(encoder)(samples_of(x=x / 255.0)), plain, atol=1e-5)


def test_siglips_texts_are_in_lower_case_and_of_full_length(encoder):
    assert encoder.tokens(["A Red Circle", "red " * 99]).shape == (2, 24)
    assert torch.equal(encoder.tokens(["A Red Circle"]), encoder.tokens(["a red circle"]))


def test_a_patch_embedding_is_the_pooling_head_on_that_patch_alone(encoder):
    x = images(2)
    states = encoder.model.vision_model(pixel_values=encoder.pixels(x)).last_hidden_state
    embedded = encoder.embed_patches(x)
    assert embedded.shape == (2, 16, 64)
    for n, p in ((0, 0), (0, 7), (1, 15)):
        alone = encoder.model.vision_model.head(states[n:n + 1, p:p + 1])[0]
        assert torch.allclose(embedded[n, p], alone / alone.norm(), atol=1e-5)


def test_open_clips_cosine_is_that_of_the_plain_model_transform_and_tokenizer(folders):
    import open_clip
    from PIL import Image

    folder = f"local-dir:{folders['open_clip']}"
    model, transform = open_clip.create_model_from_pretrained(folder)
    x = images(4).mul(255).to(torch.uint8)
    pixels = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in x])
    with torch.no_grad():
        texts = model.encode_text(open_clip.get_tokenizer(folder)(PROMPTS))
        plain = torch.cosine_similarity(model.eval().encode_image(pixels), texts)
    ours = Semantic(siglip.load_open_clip(folders["open_clip"]))(samples_of(x=x / 255.0))
    assert torch.allclose(ours, plain, atol=1e-5)


def test_a_preference_is_the_scaled_cosine_of_the_plain_clip(folders):
    from transformers import AutoTokenizer, CLIPModel

    model, words = (auto.from_pretrained(folders["clip"]) for auto in (CLIPModel, AutoTokenizer))
    processor = siglip.load_clip(folders["clip"]).image_processor
    x = images(3, 16)
    prompts = ["a cat", "a red dog", "a cat"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    given = words(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(
            input_ids=given.input_ids, attention_mask=given.attention_mask, pixel_values=(x - mean) / std)
    expected = out.logits_per_image.diagonal() / 26
    scores = preferences.load_preference(folders["clip"]).score(x, prompts)
    assert torch.allclose(scores, expected, atol=1e-5)


def test_a_learning_siglip_comes_to_like_the_pictures_it_is_shown():
    encoder = siglip.load_siglip(TOYS["siglip"])
    x = images(4)
    learner = siglip.Learner(encoder, 1e-3)
    before = Semantic(encoder)(samples_of(x=x)).mean()
    first = copy.deepcopy(encoder.model.state_dict())
    gradients = []

    def keep(optimizer):
        gradients.append([p.grad.clone() for p in encoder.model.parameters()])

    keeping = SimpleNamespace(world=1, add_gradients=lambda optimizer, _: keep(optimizer))
    for encoder.batch_size in (4, 3):           # in parts the gradient is that of the whole
        learner.learn(x, PROMPTS, keeping)
        encoder.model.load_state_dict(first)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients))
    losses = [learner.learn(x, PROMPTS, ALONE) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert Semantic(encoder)(samples_of(x=x)).mean() > before
    assert {name.split(".")[0] for name in learner.state()} == {"referee"}


# ---- judges ----


def test_paligemma_reads_a_question_as_its_published_processor_lays_it_out():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = (
        auto.from_pretrained(TOYS["judge"]) for auto in (AutoModelForImageTextToText, AutoProcessor))
    asked = judge.load_judge(TOYS["judge"])
    x = images(1).mul(255).to(torch.uint8)
    given = processor(text="<image>is this a red circle ?", images=x[0], return_tensors="pt")
    assert asked.rows(["is this a red circle ?"])[0].tolist() == given.input_ids.tolist()
    given.pop("labels", None)
    with torch.no_grad():
        last = model(**given).logits[0, -1]
    yes, no = (last[processor.tokenizer.convert_tokens_to_ids(word)] for word in ("yes", "no"))
    expected = torch.stack([yes, no]).softmax(0)[0].item()
    assert asked.yes_probability(x / 255.0, ["is this a red circle ?"]).item() == pytest.approx(
        expected, abs=1e-5)


CHATS = ["qwen", "qwen3", "internvl"]


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_judge_reads_what_its_own_processor_lays_out(folders, name):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    asked = judge.load_judge(folders[name])
    x = images(1)
    question = "is there a red dog in the image ?"
    model, processor = (
        auto.from_pretrained(folders[name]) for auto in (AutoModelForImageTextToText, AutoProcessor))
    content = [{"type": "image"}, {"type": "text", "text": f"{question} Answer yes or no."}]
    turns = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    with torch.no_grad():
        logits = model(**processor(images=[x[0]], text=[text], do_rescale=False, return_tensors="pt")).logits[
            0, -1]
    ids = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    assert asked.yes_probability(x, [question]).item() == pytest.approx(
        logits[ids].softmax(0)[0].item(), abs=1e-5)


@pytest.mark.parametrize("name", ["paligemma", *CHATS])
def test_questions_are_answered_as_one_by_one_and_an_image_is_encoded_once(folders, name, monkeypatch):
    asked = judge.load_judge(TOYS["judge"] if name == "paligemma" else folders[name], batch_size=3)
    x = images(3)
    about = [0, 0, 2, 1]
    encoded = []
    questions = ["no ?", "is there a red circle in the image of a dog ?", "how many ?", "is there a cat ?"]
    alone = [asked.yes_probability(x[n:n + 1], [question]).item() for n, question in zip(about, questions)]
    features = asked.features
    monkeypatch.setattr(asked, "features", lambda x: encoded.append(len(x)) or features(x))
    together = asked.yes_probability(x, questions, about)
    assert encoded == [3]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert ((together >= 0) & (together <= 1)).all()


@given(st.text(max_size=40))
@settings(max_examples=20)
def test_a_judge_answers_any_written_text_with_a_probability(text):
    text += "<image>\n<bos>" + text
    samples = Samples(["how many"], [{}], texts=[text], sources=images(1))
    assert 0 <= score({"kn": Knowledge(THE_JUDGE)}, samples)["kn"].item() <= 1


def test_a_question_is_cut_so_that_it_fits_and_brings_no_markers(folders):
    ids, mask = THE_JUDGE.rows(["red " * 5000, "red"])
    longest = 16 + 1 + THE_JUDGE.max_question + 1
    assert ids.shape == (2, longest)
    assert mask.sum(1).tolist() == [longest, 16 + 1 + 1 + 1]
    chat = judge.load_judge(folders["qwen"])
    assert chat.row("a <|image_pad|> cat") == chat.row("a cat")
    assert chat.row("a cat").count("<|image_pad|>") == 1


def test_spellings_of_yes_are_found_in_the_tokenizer_and_counted_once():
    words = {"yes": 3, "Yes": 4, " yes": 5, " Yes": 4, "no": 0}

    def tokenizer(texts, add_special_tokens):
        return SimpleNamespace(input_ids=[[words[text]] if text in words else [8, 9] for text in texts])

    tokenizer.unk_token_id = 0
    assert judge.spellings(tokenizer, "yes") == [3, 5, 4]
    assert judge.spellings(tokenizer, "no") == []
    with pytest.raises(ValueError, match="reads yes and no as the tokens"):
        judge.Judge(None, tokenizer, None)


def test_a_judge_that_cannot_answer_is_refused(folders, tmp_path, monkeypatch):
    tiny.build_qwen(tmp_path / "thinks", template=tiny.CHAT + "{{ '<think>\n' }}")
    with pytest.raises(ValueError, match="made to think before it answers"):
        judge.load_judge(str(tmp_path / "thinks"))
    tiny.build_qwen(tmp_path / "bare", template=None)
    with pytest.raises(ValueError, match="has no chat template"):
        judge.load_judge(str(tmp_path / "bare"))
    other = torch.zeros(1, 50).index_fill(1, torch.tensor([40]), 30.0)
    monkeypatch.setattr(judge.Judge, "next_logits", lambda self, features, questions: other)
    with pytest.raises(ValueError, match="the judge puts .* of its probability on yes and no"):
        THE_JUDGE.yes_probability(images(1), ["is there a circle ?"])


def test_pretraining_reaches_every_weight_of_a_judge_through_its_features_and_next_logits():
    asked = judge.load_judge(TOYS["judge"])
    asked.model.requires_grad_(True)
    asked.next_logits(asked.features(images(2)), ["is this red ?"] * 2).square().sum().backward()
    assert all(p.grad is not None for p in asked.model.parameters())


# ---- what CoRL's cycle reward asks ----


def test_captions_are_those_of_a_greedy_loop_over_the_decoder():
    ours = captioner.load_captioner(TOYS["captioner"], batch_size=2)
    rng = np.random.default_rng(0)
    x = render_pixels([shapes.random_scene(rng) for _ in range(3)]) * 0.5 + 0.5
    model = ours.model
    text = ours.model.config.text_config
    for caption, image in zip(ours.captions(x), x):
        vision = model.vision_model(pixel_values=(image[None] - 0.5) / 0.5)[0]
        ids = [text.bos_token_id]
        while len(ids) <= 50 and ids[-1] != text.sep_token_id:
            out = model.text_decoder(
                input_ids=torch.tensor([ids]), encoder_hidden_states=vision, is_decoder=True)
            ids.append(int(out.logits[0, -1].argmax()))
        assert caption == ours.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_token_states_are_the_last_layers_without_special_tokens(folders):
    ours = captioner.load_text_encoder(folders["bert"], batch_size=2)
    texts = ["a cat", "how many red dog", "a"]
    for state, mask, text in zip(*ours.states(texts), texts):
        ids = ours.tokenizer(text, return_tensors="pt").input_ids
        plain = ours.model(input_ids=ids).last_hidden_state[0, :-1]     # the last is <eos>
        assert torch.allclose(state[mask], plain, atol=1e-5)
        assert len(plain) == len(text.split())


def test_bertscore_is_1_for_equal_texts_and_that_of_each_pair_alone(folders):
    ours = captioner.load_text_encoder(folders["bert"])
    prompts = ["a red cat", "a cat in the image", "how many dog"]
    captions = ["a red cat", "a dog", "yes"]
    together = ours.similarity(prompts, captions)
    alone = [
        token_f1(*ours.states([a]), *ours.states([b])).clamp(0, 1).item() for a, b in zip(prompts, captions)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert together[0].item() == pytest.approx(1, abs=1e-5)


def test_a_bert_is_read_without_the_heads_of_its_pretraining(folders, tmp_path):
    """As google-bert/bert-base-uncased is published."""
    from transformers import BertForPreTraining
    shutil.copytree(folders["bert"], tmp_path / "bert")
    whole = BertForPreTraining.from_pretrained(folders["bert"])
    whole.save_pretrained(tmp_path / "bert")
    states, mask = captioner.load_text_encoder(str(tmp_path / "bert")).states(["a cat"])
    expected, _ = captioner.load_text_encoder(folders["bert"]).states(["a cat"])
    assert torch.allclose(states, expected, atol=1e-5)


def test_lpips_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips; or set --likeness 0"):
        captioner.load_lpips()


# ---- what is refused ----


LOADERS = {"siglip": siglip.load_siglip, "judge": judge.load_judge, "open_clip": siglip.load_open_clip}


@pytest.fixture
def say(folders, tmp_path):
    """(kind of model, change of its folder) -> the one line that is said of it."""

    def refuse(kind, change):
        folder = tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}"
        shutil.copytree(TOYS.get(kind) or folders[kind], folder)
        change(folder)
        with pytest.raises(
            (ValueError, OSError), match="cannot be loaded, must be a folder or hub name with") as error:
            LOADERS[kind](str(folder))
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)
        return str(error.value)

    return refuse


def weights_file(folder):
    return next(folder.glob("*.safetensors"))


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, k: t.pop(k), ".weight"), (lambda t, k: t.update(strange=torch.ones(1)), "strange"),
        (lambda t, k: t.update({k: t[k][:-1].clone()}), ".weight"),
        (lambda t, k: t[k].view(-1)[-1:].fill_(math.nan), "not_finite")],
)
def test_weights_that_are_not_exactly_the_configs_are_refused(say, kind, change, words):
    """transformers would draw missing ones at random, pass over those too many, and go on."""

    def damage(folder):
        tensors = load_file(weights_file(folder))
        change(tensors, sorted(k for k in tensors if k.endswith("weight"))[1])
        save_file(tensors, weights_file(folder), metadata={"format": "pt"})

    assert words in say(kind, damage)


FILES = {"siglip": "config.json", "judge": "tokenizer.json", "open_clip": "open_clip_config.json"}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("content", [b"", b"[]", b'{"a', b"\xff\xfe"])
def test_damaged_and_missing_files_are_named_in_one_line(say, kind, content):
    for name in (FILES[kind], None):            # a file of text, and that of the weights
        say(kind, lambda folder: (folder / name if name else weights_file(folder)).write_bytes(content))
    assert "safetensors" in say(kind, lambda folder: weights_file(folder).unlink())


def test_what_only_tokenizers_and_configs_raise_is_one_line_too(say):
    """tokenizers raises Exception itself, the check of a config's types an error of huggingface_hub's own."""

    def change(name, edit):
        def apply(folder):
            content = json.loads((folder / name).read_text())
            edit(content)
            (folder / name).write_text(json.dumps(content))

        return apply

    assert "lstrip" in say("siglip", change("tokenizer.json", lambda c: c["added_tokens"][0].pop("lstrip")))
    assert "hidden_size" in say(
        "judge", change("config.json", lambda c: c["text_config"].update(hidden_size="64"))
    )


def test_weights_that_overflow_their_dtype_are_refused(tmp_path):
    shutil.copytree(TOYS["siglip"], tmp_path / "s")
    tensors = load_file(weights_file(tmp_path / "s"))
    tensors["logit_bias"].fill_(1e5)
    save_file(tensors, weights_file(tmp_path / "s"), metadata={"format": "pt"})
    siglip.load_siglip(str(tmp_path / "s"))
    with pytest.raises(ValueError, match="not_finite"):
        load_model("AutoModel", "siglip", str(tmp_path / "s"), "cpu", torch.float16)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_pickle_checkpoint_is_refused(say, kind):
    def pickle(folder):
        name = "open_clip_pytorch_model.bin" if kind == "open_clip" else "pytorch_model.bin"
        torch.save(load_file(weights_file(folder)), folder / name)
        weights_file(folder).unlink()

    assert "safetensors" in say(kind, pickle)


def test_other_models_code_of_their_own_and_names_that_are_nowhere_are_refused(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('it ran')")
    for load, path, words in (
        (siglip.load_siglip, TOYS["judge"], "holds a paligemma model, expected siglip"),
        (captioner.load_captioner, folders["bert"], "holds a bert model, expected blip"),
        (captioner.load_text_encoder, TOYS["captioner"], "holds a blip model, expected bert"),
        (preferences.load_preference, folders["qwen"], "holds a qwen2_5_vl model, expected clip"),
        (judge.load_judge, str(tmp_path), "cannot be loaded"),
        (siglip.load_open_clip, "out/nowhere", "no such folder; as a hub name it is looked for in")):
        with pytest.raises((ValueError, OSError), match=words) as error:
            load(path)
        assert "\n" not in str(error.value)


# ---- what every reward that asks a model must keep ----


def reward_of(folders, name):
    """(a reward, the model that it asks)"""
    if name == "judge":
        return Knowledge(THE_JUDGE), THE_JUDGE.model
    if name == "pref":
        asked = preferences.load_preference(folders["clip"])
        return Preference(asked), asked.clip.model
    if name == "open_clip":
        asked = siglip.load_open_clip(folders[name], batch_size=3)
    else:
        asked = siglip.load_siglip(TOYS["siglip"], batch_size=3)
    return (Dense if name == "dense" else Semantic)(asked), asked.model


@pytest.mark.parametrize("name", ["sem", "dense", "open_clip", "judge", "pref"])
def test_a_score_is_its_own_whatever_stands_next_to_it_and_no_gradient_reaches_the_model(folders, name):
    reward, model = reward_of(folders, name)
    x = images(4)
    whole = score({name: reward}, samples_of(x=x))[name]
    alone = [score({name: reward}, samples_of(PROMPTS[i:i + 1], x[i:i + 1]))[name].item() for i in range(4)]
    assert whole.tolist() == pytest.approx(alone, abs=1e-5)
    if name != "pref":                          # which has no bounds
        assert whole.abs().max() <= 1
    assert not reward(samples_of(x=x.clone().requires_grad_())).requires_grad
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


# ---- the rewards of a run ----


def built(*flags, **given):
    cfg = recipes.parse(["--recipe", "lvrpo", *flags])
    given = dict(detector=lambda images: [[]] * len(images), rows=[], states=None, questions=None) | given
    return build.build_rewards(cfg, "cpu", **given)


def test_rewards_with_a_weight_are_built_and_a_model_that_two_ask_is_loaded_once():
    rewards = built("--dense", "0.5", "--dvreward", "1", "--ins", "0", "--accuracy", "0")
    assert rewards.keys() == {"sem", "dense", "kn", "dvreward"}
    assert rewards["sem"].encoder is rewards["dense"].encoder
    assert rewards["kn"].judge is rewards["dvreward"].judge
    assert isinstance(built("--dvreward", "1", "--dv_by", "holistic")["dvreward"], Knowledge)


def test_a_reward_of_any_name_has_a_flag_and_without_a_line_that_builds_it_is_refused(monkeypatch):
    monkeypatch.setitem(REWARDS, "clip-score", Entry("a score", (("images",),)))
    with pytest.raises(ValueError, match="no line of referees/build.py builds the reward clip-score"):
        built("--clip-score", "0.5", "--sem", "0", "--kn", "0", "--accuracy", "0")


def test_a_model_from_the_hub_is_logged_with_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--maker--encoder"
    (model / "snapshots" / ("a" * 40)).mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    cfg = recipes.parse(["--siglip", "maker/encoder"])
    assert build.hub_commits(cfg) == {"maker/encoder": "a" * 40}


def test_models_are_counted_where_they_lie(folders):
    cfg = recipes.parse(["--recipe", "lvrpo"])
    assert build.models_asked(cfg) == {TOYS["siglip"], TOYS["judge"]}
    numbers = sum(p.numel() for p in THE_JUDGE.model.parameters())
    assert numbers_in(TOYS["judge"]) == pytest.approx(numbers, rel=0.1)
    assert numbers_in("nobody/nothing") == 0
    siglip = numbers_in(TOYS["siglip"])
    judge = numbers_in(TOYS["judge"])
    assert build.referee_bytes(cfg) == 4 * siglip + 4 * judge
    assert build.referee_bytes(replace(cfg, bf16=True)) == 4 * siglip + 2 * judge


def test_a_reward_without_its_model_is_refused():
    with pytest.raises(ValueError, match="--ins reads detections: name a --detector"):
        built("--ins", "1", detector=None)


@pytest.mark.parametrize("reward", ["sem", "kn", "pref", "open_clip"])
def test_texts_that_a_model_does_not_read_to_their_end_are_said_before_a_run(folders, reward, capsys):
    flags = {
        "sem": ["--kn", "0"], "kn": ["--sem", "0"],
        "pref": ["--pref", "1", "--pref_model", folders["clip"], "--sem", "0", "--kn", "0"],
        "open_clip": ["--siglip", folders["open_clip"], "--kn", "0"]}[reward]
    built(*flags, "--accuracy", "0", texts=lambda name: ["a cat", "a red cat " * 60])
    said = capsys.readouterr().err.strip().splitlines()
    assert said == [said[0]] and "too few tokens for 1 of 2 texts" in said[0]


def test_dense_needs_a_model_that_gives_patches(folders):
    with pytest.raises(ValueError, match="--dense reads patches"):
        built("--dense", "1", "--siglip", folders["open_clip"])


SMALL = (
    "--group_size 2 --steps 2 --eval_every 0 --save_every 1 --draw 2 --think 0 --ask 0 --edit 0 "
    "--accuracy 0 --kn 0"
).split()


def test_a_published_detector_rewards_prompts_of_a_file_by_genevals_rules(
    folders, tmp_path, monkeypatch, capsys
):
    real = detectors.load_detector
    monkeypatch.setattr(build, "load_detector", lambda path, **how: real(path, folders["clip"], **how))
    include = [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 2}]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "a red circle", "include": include}))
    flags = [*SMALL, "--sem", "0", "--ins", "1", "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    run = train.begin(recipes.parse([*flags, "--detector", folders["owlv2"]]), ALONE)
    assert "ins: GenEval rules, detector" in capsys.readouterr().err
    assert 0 <= train.one_step(run, 0)["draw/rewards/ins/mean"] <= 1


def test_token_matching_reads_the_frozen_reference(tmp_path):
    """The policy that learns could move its own states towards any picture."""
    flags = ["--recipe", "corl", "--pair_image", "2", "--pair_text", "0", "--out", str(tmp_path)]
    run = train.begin(recipes.parse(flags), ALONE)
    before = run.rewards["tim"](samples_of())
    with torch.no_grad():
        for p in run.policy.parameters():
            p += 0.05
    assert torch.equal(run.rewards["tim"](samples_of()), before)


def test_a_referee_that_learns_is_kept_and_resumed(tmp_path):
    flags = [*SMALL, "--ins", "0", "--train_referee", "1e-3"]
    whole, parts = (["--out", str(tmp_path / name)] for name in ("whole", "parts"))
    train.train(recipes.parse([*flags, *whole]), ALONE)
    train.train(recipes.parse([*flags, *parts, "--steps", "1"]), ALONE)
    train.train(recipes.parse([*flags, *parts, "--resume"]), ALONE)
    a, b = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    first = load_file(Path(TOYS["siglip"]) / "model.safetensors")
    assert not torch.equal(a["referee.vision_model.head.probe"], first["vision_model.head.probe"])
