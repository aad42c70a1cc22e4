"""What the policy promises at any weights: padding, sharing, caching, guidance, writing."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from policy import Guidance, Policy, RMSNorm, guided_velocity, own_attention
from sample import TOY
from support.checkpoint import load_policy, trainable_by_expert

SIZE = (32, 48)                                                 # 2 x 3 latent tokens of 16 pixels


@pytest.fixture(scope="module")
def toy():
    return load_policy(TOY)


@pytest.fixture(scope="module")
def policy(toy):
    torch.manual_seed(0)
    return Policy(replace(toy.config, bagel=toy.config.bagel | dict(max_latent_size=4)), toy.tokenizer)


def words(n, low=3, high=9):
    """A ragged batch of random token ids -> tokens (n, L), mask (n, L)."""
    lengths = torch.randint(low, high + 1, (n,))
    tokens = torch.randint(0, 99, (n, int(lengths.max())))
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def noisy(n):
    return torch.randn(n, 6, 16)


def tensors_of(context):
    return [*context.keys, *context.values, context.valid, context.position]


def assert_near(ours, plain):
    torch.testing.assert_close(ours, plain, atol=2e-5, rtol=0)


# ---- one batch, one context ----


@torch.no_grad()
@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_images_of_several_sizes_in_one_batch_are_guided_as_each_alone(policy, renorm):
    """That they are read and drawn so is in test_sizes.py."""
    sizes = [(32, 48), (16, 16), (64, 32)]
    shapes = [(16, 24), (8, 8), (32, 16)]
    latents = [torch.randn(h * w // 256, 16) for h, w in sizes]
    pixels = [torch.rand(3, *shape) for shape in shapes]
    how = Guidance(3.0, 2.0, renorm, 0.1, (0, 1))

    def guide(x, size, context):
        return guided_velocity(policy, x, 0.4, size, context, *[policy.empty(len(x))] * 2, how)

    x = torch.nn.utils.rnn.pad_sequence(latents, batch_first=True)
    guided = guide(x, sizes, policy.append_image(policy.empty(3), pixels=pixels, latents=x, size=sizes))
    for i, (z, size) in enumerate(zip(latents, sizes)):
        alone = policy.append_image(policy.empty(1), pixels=pixels[i][None], latents=z[None], size=size)
        one = guide(z[None], size, alone)
        torch.testing.assert_close(one[0], guided[i, :len(z)], atol=5e-5, rtol=0)


def test_a_padded_query_of_a_text_sees_itself_so_that_no_row_is_empty():
    allowed = own_attention(torch.zeros(1, 3, dtype=torch.bool), causal=True)
    assert torch.equal(allowed[0, 0], torch.eye(3, dtype=torch.bool))


@torch.no_grad()
def test_the_mask_of_an_image_has_one_row_that_serves_all_its_tokens(policy, monkeypatch):
    """Other masks would need memory for every pair of tokens."""
    sizes = [(32, 48), (16, 16), (64, 32)]
    attend = F.scaled_dot_product_attention
    rows = []

    def watch(q, k, v, attn_mask):
        rows.append(attn_mask.shape[2])
        return attend(q, k, v, attn_mask=attn_mask)

    _, context = policy.append_text(policy.empty(3), *words(3))
    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    x = torch.randn(3, 8, 16)
    context = policy.append_image(context, pixels=[torch.ones(3, 16, 24)] * 3, latents=x, size=sizes)
    policy.velocity(context, x, 0.4, sizes)
    assert set(rows) == {1}


@torch.no_grad()
def test_drawing_and_writing_leave_the_context_as_it_was(policy):
    _, context = policy.append_text(policy.empty(3), *words(3))
    before = [x.clone() for x in tensors_of(context)]
    uniforms = torch.rand(3, 6)
    policy.velocity(context, noisy(3), 0.5, SIZE)
    first, second = (policy.sample_text(context, uniforms) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(context)))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


# ---- experts and precision ----


def test_text_and_pixels_reach_every_understanding_parameter_and_no_other(policy):
    policy.zero_grad()
    context = policy.append_image(policy.empty(1), pixels=torch.rand(1, 3, 16, 16))
    logits, _ = policy.append_text(context, torch.arange(6)[None])
    logits.square().sum().backward()
    groups = trainable_by_expert(policy)
    assert all(p.grad is not None for p in groups["understanding"])
    assert all(p.grad is None for p in groups["generation"])
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert {id(p) for group in groups.values() for p in group} == {id(p) for p in trained}


def test_norms_of_bfloat16_round_before_the_weight():
    norm = RMSNorm(64, 1e-6).bfloat16()
    x = torch.randn(50, 64).bfloat16()
    torch.nn.init.normal_(norm.weight)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected = norm.weight * exact.bfloat16()
    assert (norm(x) == expected).float().mean() > 0.99      # rounded after the weight, a third would differ


@torch.no_grad()
def test_the_velocity_is_float32_and_the_cache_follows_autocast():
    policy = load_policy(TOY, dtype=torch.bfloat16)
    assert policy.velocity(policy.empty(1), torch.randn(1, 2, 16), 0.5, (32, 16)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        _, context = load_policy(TOY).append_text(policy.empty(1), torch.arange(4)[None])
    assert {x.dtype for x in (*context.keys, *context.values)} == {torch.bfloat16}


def test_the_autoencoder_keeps_its_precision_under_autocast(policy):
    """So that a picture drawn in a rollout is the picture that a reward sees."""
    pixels = torch.rand(2, 3, *SIZE) * 2 - 1
    latents = policy.encode(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(policy.encode(pixels), latents)
        inside = policy.decode(latents, SIZE)
    assert torch.equal(inside, policy.decode(latents, SIZE))


def test_images_of_several_sizes_encode_as_each_alone_and_padding_is_zero(policy):
    pixels = [torch.rand(3, h, w) * 2 - 1 for h, w in ((32, 48), (16, 16), (64, 32))]
    latents = policy.encode(pixels)
    assert latents.shape == (3, 8, 16)
    for z, image, count in zip(latents, pixels, (6, 1, 8)):
        torch.testing.assert_close(z[:count], policy.encode(image[None])[0], atol=1e-5, rtol=1e-5)
        assert (z[count:] == 0).all()


def test_pixels_and_latents_that_are_not_finite_go_no_further(policy):
    latents = torch.zeros(2, 6, 16)
    pixels = torch.zeros(2, 3, *SIZE)
    latents[1, 3, 2] = float("nan")
    pixels[1, 0, 0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="made pixels that are not finite"):
        policy.decode(latents, SIZE)
    for given_as in (pixels, list(pixels)):
        with pytest.raises(FloatingPointError, match="made latents that are not finite"):
            policy.encode(given_as)


# ---- guidance ----


@torch.no_grad()
def test_each_image_is_guided_if_its_time_is_above_the_low_one_and_at_most_the_high_one(policy):
    x = noisy(5)
    times = [0.1, 0.3, 0.5, 0.8, 0.9]           # in fp32 0.3 and 0.8 lie above themselves
    t = torch.tensor(times)
    how = Guidance(3.0, 1.0, "channel", 0.0, (0.3, 0.8))
    _, context = policy.append_text(policy.empty(1), torch.arange(5)[None])

    def guide(x, t):
        return guided_velocity(policy, x, t, SIZE, context, policy.empty(1), policy.empty(1), how)

    v = guide(x, t)
    plain = policy.velocity(context, x, t, SIZE)
    assert_near(v, torch.cat([guide(x[i:i + 1], time) for i, time in enumerate(times)]))
    gap = (v - plain).abs().amax((1, 2))
    active = torch.tensor([False, False, True, True, False])
    assert torch.equal(gap > 1e-3, active)
    assert torch.equal(gap == 0, ~active)


# ---- texts in and out ----


@pytest.mark.parametrize("marker", ["<|im_end|>", "<|vision_start|>", "<pad>"])
def test_a_marker_inside_a_text_is_no_marker(toy, marker):
    """A prompt or a question that names one does not end itself."""
    tokens, mask = toy.encode_text([f"a red circle {marker} a blue square"])
    ids = tokens[mask].tolist()
    assert (ids[0], ids[-1]) == (toy.start, toy.end)
    assert not set(ids[1:-1]) & toy.reserved


def test_words_that_the_tokenizer_does_not_know_are_no_markers(toy):
    tokens, _ = toy.encode_text(["a zebra <unk> <think> a circle </think>"])
    assert (tokens == toy.tokenizer.unk_token_id).sum() == 2
    assert tokens.shape[1] == 9


def test_texts_are_padded_right_and_have_the_ids_of_each_alone(toy):
    texts = ["a red circle", "", "two blue squares above a circle"]
    tokens, mask = toy.encode_text(texts)
    for text, row, read in zip(texts, tokens, mask):
        assert row[read].tolist() == toy.token_ids([text])[0]
        assert (row[~read] == toy.end).all()
    assert toy.decode_text(tokens, mask) == texts


def test_a_text_must_leave_the_room_that_is_asked_for(toy):
    limit = toy.config.llm["max_position_embeddings"]
    (ids,) = toy.token_ids(["a red cat"])
    assert toy.token_ids(["a red cat"], room=limit - len(ids)) == [ids]
    with pytest.raises(ValueError, match="text of 202 tokens is longer than .* room for 118: 'red"):
        toy.token_ids(["a"] * 300 + ["red " * 200], room=10)


# ---- writing ----


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
def test_a_written_text_is_drawn_from_the_logits_that_reading_it_gives(toy, temperature):
    """By trained weights: their texts end, at different lengths."""
    _, context = toy.append_text(toy.empty(12), *toy.encode_text(["what is in the image ?"] * 12))
    uniforms = torch.rand(12, 9)
    tokens, mask, logp = toy.sample_text(context, uniforms, temperature)
    fed = F.pad(tokens[:, :-1], (1, 0), value=toy.start)
    logits, _ = toy.append_text(context, fed)
    every = (logits / (temperature or 1.0)).log_softmax(-1)
    share = every.double().exp().cumsum(-1)
    threshold = uniforms[:, :tokens.shape[1], None] * share[..., -1:]
    drawn = (share <= threshold).sum(-1) if temperature else every.argmax(-1)
    going = (fed != toy.end).cumprod(1).bool()                  # until the end token has been written
    assert torch.equal(mask, going)
    assert mask[:, -1].any()
    assert torch.equal(tokens, torch.where(going, drawn, toy.end))
    scored = every.gather(2, tokens[..., None])[..., 0].where(going, 0.0)
    torch.testing.assert_close(logp, scored, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_written_token_is_appended_without_a_copy_of_the_others(policy, monkeypatch):
    read = policy.append_text
    places = set()

    def watch(context, *new):
        places.add(context.keys[1].data_ptr())
        return read(context, *new)

    _, context = policy.append_text(policy.empty(2), torch.arange(6).view(2, 3))
    monkeypatch.setattr(policy, "append_text", watch)
    policy.sample_text(context, torch.zeros(2, 5))
    assert len(places) == 1


@torch.no_grad()
def test_room_that_is_too_small_changes_nothing(policy):
    _, context = policy.append_text(policy.empty(2), torch.arange(6).view(2, 3))
    tokens = torch.arange(4).expand(2, 4)
    plain, _ = policy.append_text(context, tokens)
    roomy, _ = policy.append_text(context.with_room(3), tokens)
    torch.testing.assert_close(roomy, plain)


def change_logits(policy, monkeypatch, change):
    """Let `change` alter the logits (N, L, V) of the i-th call of append_text, in place."""
    read = policy.append_text
    calls = iter(range(10**6))

    def alter(context, tokens, mask):
        logits, longer = read(context, tokens, mask)
        change(next(calls), logits)
        return logits, longer

    monkeypatch.setattr(policy, "append_text", alter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_write_no_text(policy, monkeypatch, value, temperature):
    def poison(i, logits):
        logits[:, -1, policy.end] = -float("inf")               # what nothing writes may have no probability
        if i == 2:
            logits[1, -1, 5] = value

    change_logits(policy, monkeypatch, poison)
    with pytest.raises(FloatingPointError, match="text logits are not finite at token 2;"):
        policy.sample_text(policy.empty(3), torch.rand(3, 5), temperature)


def test_logits_after_the_end_of_a_text_may_be_anything(policy, monkeypatch):
    def change(i, logits):
        logits[1, -1] = float("nan") if i else 0.0
        logits[1, -1, policy.end] += 0.0 if i else 1e4

    change_logits(policy, monkeypatch, change)
    _, mask, logp = policy.sample_text(policy.empty(3), torch.rand(3, 4))
    assert mask[1].tolist() == [True, False, False, False]
    assert logp.isfinite().all()
