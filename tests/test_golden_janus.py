"""The policy computes what the official Janus code computes, every case of golden/janus_tiny, and
answers as transformers does.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import janus
from grpo import token_logp
from policy import Guidance, declare_torchvision_ops, pad_right
from rewards import Samples, TokenMatch
from sample import Draw, Read, See, Write, sample_plan
from support.checkpoint import load_policy, save_policy
from support.disk import read_json
from support.pictures import read_picture

GOLDEN = Path(__file__).parent / "golden" / "janus_tiny"
CASES = read_json(GOLDEN / "cases.json")
LAYOUT = read_json(GOLDEN / "original_layout.json")
GRADIENTS = CASES["cases"]
M = CASES["image_tokens"]
SIZE = (8, 8)
SINGLE = 5e-5                                   # absolute
GUIDED = 2e-4                                   # absolute


@pytest.fixture
def policy():
    """With all weights trained, as the golden gradients have it."""
    return load_policy(GOLDEN).requires_grad_(True)


@pytest.fixture(scope="module")
def tensors():
    """Of whole numbers int64."""
    found = load_file(GOLDEN / "cases.safetensors")
    return {key: x.long() if x.dtype == torch.int32 else x for key, x in found.items()}


@pytest.fixture(scope="module")
def theirs():
    return transformers_janus(GOLDEN)


def transformers_janus(folder):
    declare_torchvision_ops()
    from transformers import JanusForConditionalGeneration

    return JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def close(ours, theirs, tolerance=SINGLE):
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), atol=tolerance, rtol=0)


def templates(group):
    """(ids, the words of each turn, without pictures) of the templates of a group."""
    for case in CASES["templates"]:
        if case["group"] == group:
            ids = case["ids_with_begin_of_image"] or case["ids"]
            yield ids, [turn["content"].rpartition("\n")[2] for turn in case["conversation"]]


def words_of(group):
    return [text for _, (text, _) in templates(group)]


# ---- prompts and pixels ----


def test_prompts_have_the_ids_of_the_processor(policy):
    patches = [policy.tokenizer.convert_tokens_to_ids("<image_placeholder>")] * M
    before = [*policy.opening, policy.image_start, *patches, policy.image_end]
    for ids, (text, _) in templates("draw"):
        assert [*policy.token_ids([text])[0], policy.start, policy.image_start] == ids
    for ids, (text, _) in templates("question"):
        assert [*before, *policy.token_ids([text], after="image")[0], policy.start] == ids


def test_a_second_turn_has_the_ids_of_the_processor(policy):
    """Up to its picture, which stands before its words in a turn of ours."""
    ids, (first, answer, *_) = list(templates("multi"))[1]
    tokens, mask = policy.encode_written([answer])
    head = policy.token_ids(["x"], after="turn")[0][:3]         # which ends the turn before it
    ours = [*policy.token_ids([first])[0], *tokens[mask][:-1].tolist(), *head]
    assert ours == ids[:len(ours)]
    assert ids[len(ours) + 1] == policy.image_start


@torch.no_grad()
def test_pictures_are_read_as_the_processor_and_the_vision_encoder_read_them(
    policy, tensors, tmp_path
):
    """The last one is not square."""
    pixels = []
    for picture in (*tensors["images.u8"], tensors["resize.u8"]):
        Image.fromarray(picture.numpy()).save(tmp_path / "i.png")
        pixels.append(read_picture(str(tmp_path / "i.png"), policy)[0])
    close(torch.stack(pixels[:4]), tensors["images.pixels"], 1e-6)
    close(pixels[4], tensors["resize.pixels"], 1e-6)
    close(policy.embed_pixels(tensors["images.pixels"]), tensors["vision.features"])


# ---- texts ----


def greedy(policy, plan, guidance=None):
    rollout = sample_plan(
        policy, plan, seed=0, step=0, index=range(3), G=1, guidance=guidance)
    return rollout.segments[-1]


def check_gradients(policy, value, case):
    """The norms of the gradients of a value are those of a case, and no other weight has one."""
    value.backward()
    wanted = GRADIENTS[case]["grad_norms"]
    norms = {}
    for name, p in policy.named_parameters():
        if p.grad is not None:
            norms[name.removeprefix("model.")] = p.grad.norm().item()
    assert norms == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_ragged_questions_and_answers_have_the_official_states_log_probs_and_gradients(
    policy, tensors
):
    patches, _, context = policy.image_states(tensors["question.pixel_values"][:, 0])
    tokens, mask = policy.encode_text(words_of("question"), after="image")
    words, context = policy.append_text(context, tokens, mask, logits=False)
    states = tensors["question.states"]
    seen = tensors["question.images_seq_mask"].bool()
    follows = F.pad(seen.cumsum(1) == M, (2, -2))       # the patches and their end
    follows[:, -1] = False                              # a colon, which opens the answer
    close(patches.flatten(0, 1), states[seen])
    close(words[mask], states[follows])
    tokens = tensors["answer.tokens"]
    mask = tensors["answer.mask"].bool()
    text = F.pad(tokens, (1, 0), value=policy.start)
    read = F.pad(mask, (1, 0), value=True)
    logits, _ = policy.append_text(context, text, read)
    logp = token_logp(logits[:, :-1], tokens).where(mask, 0.0)
    close(logits[:, 0], tensors["question.logits"][:, -1])
    close(logp, tensors["answer.logp"])
    check_gradients(policy, logp.sum(), "answer")


def test_greedy_answers_are_the_official_ones_and_those_of_transformers(policy, tensors, theirs):
    pixels = tensors["question.pixel_values"][:, 0]
    ids = tensors["question.input_ids"]
    plan = [See(pixels), Read(words_of("question")), Write(10, 0.0)]
    answers = greedy(policy, plan).tokens[:, 1:-1]
    assert torch.equal(answers, tensors["question.greedy"])
    written = theirs.generate(
        ids, tensors["question.attention_mask"], pixel_values=pixels, do_sample=False,
        max_new_tokens=10)
    assert torch.equal(written[:, ids.shape[1]:], answers)


# ---- images ----


@torch.no_grad()
def test_images_and_their_tokens_are_the_official_ones(policy, tensors):
    tokens = policy.encode(tensors["images.pixels"])
    given = tensors["vq.given"]
    assert torch.equal(tokens, tensors["vq.tokens"])
    close(policy.decode(tokens, SIZE), tensors["vq.reconstructed"])
    close(policy.decode(given, SIZE), tensors["vq.decoded"])
    close(policy._embed_codes(given, None), tensors["generation.embedded"])


@pytest.mark.parametrize("scale", CASES["scales"])
def test_greedy_images_are_the_official_ones(policy, tensors, scale):
    plan = [Read(words_of("draw")), Draw(SIZE, temperature=0.0)]
    tokens = greedy(policy, plan, Guidance(scale)).drawn.data
    assert torch.equal(tokens, tensors[f"greedy_cfg{scale:g}.tokens"])
    if scale == 5:
        close(policy.decode(tokens, SIZE), tensors["greedy_cfg5.pixels"], GUIDED)


def score(policy, tokens, scale=1.0, temperature=1.0):
    """Log-probs of image tokens (4, L): behind three ragged prompts, and behind a thought."""
    out = []
    for some, lead in ((slice(3), 2), (slice(3, 4), 1)):        # a colon, and begin of image
        text, mask = pad_right([torch.tensor(ids[:-lead]) for ids in CASES["score_rows"][some]])
        full, without = (
            policy.append_text(policy.empty(len(text)), each, mask)[1]
            for each in (text, policy.blank(text)))
        out.append(
            policy.score_image(
                full, tokens[some], temperature, started=lead == 1, scale=scale,
                without=without if scale > 1 else None))
    return torch.cat(out)


@pytest.mark.parametrize("case", [name for name in GRADIENTS if name != "answer"])
def test_log_probs_of_images_and_their_gradients_are_the_official_ones(policy, tensors, case):
    scale = GRADIENTS[case]["scale"]
    temperature = GRADIENTS[case]["temperature"]
    logp = score(policy, tensors["score.tokens"], scale, temperature)
    close(logp, tensors[f"{case}.logp"], SINGLE if scale == 1 else GUIDED)
    check_gradients(policy, (logp * tensors["score.weight"]).sum(), case)


@torch.no_grad()
def test_the_released_score_of_corl_is_of_a_state_that_has_read_the_token(policy, tensors):
    """It is what a token would have if it came again right after itself."""
    tokens = tensors["score.tokens"]
    released = tensors["corl_released.logp"]
    assert (score(policy, tokens) - released).abs().max() > 1
    for i in range(M):
        again = torch.cat([tokens[:, :i + 1], tokens[:, i:i + 1]], 1)
        close(score(policy, again)[:, -1], released[:, i])


@torch.no_grad()
def test_matching_of_tokens_is_the_released_one_on_all_that_follows_the_picture(policy, tensors):
    """The released code leaves it in [-1, 1]."""
    pixels = tensors["tim.pixel_values"][:, 0]
    captions = CASES["tim_captions"]
    patches, seen, context = policy.image_states(pixels)
    ids = policy.token_ids(captions, after="image")
    tokens, mask = pad_right([torch.tensor([*row, policy.start]) for row in ids])
    words, _ = policy.append_text(context, tokens, mask, logits=False)
    match = TokenMatch(lambda *_: (patches, seen, words, mask))
    images = pixels / 2 + 0.5
    close(2 * match(Samples(captions, captions, images=images)) - 1, tensors["tim.similarity"])


# ---- folders ----


@pytest.fixture
def original(tmp_path, monkeypatch):
    """The same weights as the original code would write them."""
    folder = tmp_path / "original"
    sizes = read_json(GOLDEN / "config.json")
    monkeypatch.setitem(janus.VISION, "siglip_tiny", sizes["vision_config"])
    monkeypatch.setitem(janus.VQ, "VQ-tiny", sizes["vq_config"])
    ours = load_file(GOLDEN / "model.safetensors")
    tensors = {"gen_vision_model.quantize.codebook_used": torch.randn(9)}   # in published files
    for key, entry in LAYOUT["keys"].items():
        parts = [ours[name] for name in entry["to"]] or [torch.randn(entry["shape"])]
        tensors[key] = torch.cat(parts).view(entry["shape"])
    shutil.copytree(GOLDEN, folder, copy_function=shutil.copyfile)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LAYOUT["config"]))
    return folder


EMBEDDING = "model.language_model.embed_tokens.weight"


def assert_same(policy, other):
    torch.testing.assert_close(policy.state_dict(), other.state_dict(), atol=0, rtol=0)


def test_a_folder_of_the_original_layout_is_the_same_policy(policy, tensors, original):
    """Whose row of padding does not learn either."""
    other = load_policy(original)
    assert_same(other, policy)
    logp = score(other, tensors["score.tokens"], 5.0)
    close(logp, tensors["score_cfg5.logp"], GUIDED)
    (logp * tensors["score.weight"]).sum().backward()
    norm = other.core.language_model.embed_tokens.weight.grad.norm().item()
    assert norm == pytest.approx(GRADIENTS["score_cfg5"]["grad_norms"][EMBEDDING], rel=1e-4)


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_what_is_saved_is_what_is_loaded_here_and_by_transformers(
    policy, original, tmp_path, layout
):
    save_policy(policy if layout == "transformers" else load_policy(original), tmp_path / "again")
    assert_same(load_policy(tmp_path / "again"), policy)
    theirs = transformers_janus(tmp_path / "again")
    assert_same(theirs, policy.model)
    assert theirs.lm_head.weight is not theirs.get_input_embeddings().weight
