"""What the policy promises beside the official numbers: padding, sharing, caching, adapters."""

import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo import token_logp
from policy import Guidance, LoRA, RMSNorm, adapters_off, add_lora, guided_velocity, own_attention
from sample import TOY
from support.checkpoint import load_policy

GOLDEN = Path(__file__).parent / "golden" / "bagel_tiny"
SIZE = (16, 24)                                                 # 2 x 3 latent tokens of 8 pixels
few = settings(max_examples=15)


@pytest.fixture(scope="module")
def policy():
    return load_policy(GOLDEN)


def words(generator, n, low=3, high=9, vocabulary=280):
    """A ragged batch of random token ids -> tokens (n, L), mask (n, L)."""
    lengths = torch.randint(low, high + 1, (n,), generator=generator)
    tokens = torch.randint(0, vocabulary, (n, int(lengths.max())), generator=generator)
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def noisy(generator, n):
    return torch.randn(n, 6, 16, generator=generator)


@few
@given(seed=st.integers(0, 10**6))
def test_padding_and_batch_neighbours_change_nothing(policy, seed):
    g = torch.Generator().manual_seed(seed)
    tokens, mask = words(g, 4)
    more, more_mask = words(g, 4, 1, 5)
    x = noisy(g, 4)
    with torch.no_grad():
        _, context = policy.append_text(policy.empty(4), torch.where(mask, tokens, 7), mask)
        logits, context = policy.append_text(context, more, more_mask)
        v = policy.velocity(context, x, 0.6, SIZE)
        for i in range(4):
            _, alone = policy.append_text(policy.empty(1), tokens[i:i + 1, mask[i]])
            own, alone = policy.append_text(alone, more[i:i + 1, more_mask[i]])
            assert torch.allclose(own[0], logits[i][more_mask[i]], atol=2e-5)
            assert torch.allclose(policy.velocity(alone, x[i:i + 1], 0.6, SIZE)[0], v[i], atol=2e-5)


def test_padded_positions_carry_no_gradient_to_their_content(policy):
    g = torch.Generator().manual_seed(1)
    tokens, mask = words(g, 3)
    grads = []
    for filler in (5, 200):
        policy.zero_grad()
        _, context = policy.append_text(policy.empty(3), torch.where(mask, tokens, filler), mask)
        policy.velocity(context, noisy(torch.Generator().manual_seed(2), 3), 0.5, SIZE).square().sum().backward()
        grads.append(policy.blocks[0].experts[0].k.weight.grad.clone())
    assert torch.allclose(*grads, atol=1e-6)


def test_images_of_several_sizes_in_one_batch(policy):
    g = torch.Generator().manual_seed(3)
    sizes = [(16, 24), (8, 8), (32, 16)]
    pixels = [torch.rand(3, 20, 30, generator=g), torch.rand(3, 10, 10, generator=g), torch.rand(3, 50, 20, generator=g)]
    tokens = [torch.randn((h // 8) * (w // 8), 16, generator=g) for h, w in sizes]
    x = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    with torch.no_grad():
        context = policy.append_image(policy.empty(3), pixels=pixels, latents=x, size=sizes)
        v = policy.velocity(context, x, 0.4, sizes)
        guided = guided_velocity(policy, x, 0.4, sizes, context, policy.empty(3), policy.empty(3),
                                 Guidance(3.0, 2.0, "global", 0.1, (0, 1)))
        for i in range(3):
            alone = policy.append_image(policy.empty(1), pixels=pixels[i][None], latents=tokens[i][None], size=sizes[i])
            assert torch.allclose(policy.velocity(alone, tokens[i][None], 0.4, sizes[i])[0], v[i, :len(tokens[i])], atol=2e-5)
            one = guided_velocity(policy, tokens[i][None], 0.4, sizes[i], alone, policy.empty(1), policy.empty(1),
                                  Guidance(3.0, 2.0, "global", 0.1, (0, 1)))
            assert torch.allclose(one[0], guided[i, :len(tokens[i])], atol=5e-5)


def test_a_repeated_prompt_is_the_prompt_read_once_per_sample(policy):
    """Shared prefix against the plain path, values and gradients."""
    g = torch.Generator().manual_seed(4)
    tokens, mask = words(g, 2)
    G, x = 3, noisy(g, 6)

    def run(shared):
        policy.zero_grad()
        rows = slice(None) if shared else torch.arange(2).repeat_interleave(G)
        t, m = tokens[rows], mask[rows]
        _, context = policy.append_text(policy.empty(len(t)), t, m)
        v = policy.velocity(context.repeat(G) if shared else context, x, 0.7, SIZE)
        v.square().sum().backward()
        return v.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}

    (v, grads), (plain_v, plain_grads) = run(True), run(False)
    assert torch.allclose(v, plain_v, atol=1e-5)
    for n in plain_grads:
        assert (grads[n] - plain_grads[n]).norm() <= 1e-4 * plain_grads[n].norm() + 1e-6, n


def test_a_context_serves_several_images_as_if_each_had_its_own(policy):
    """The noisy steps of an image in one call against one call each, values and gradients; contexts of two lengths."""
    g = torch.Generator().manual_seed(21)
    (tokens, mask), x, t = words(g, 2), noisy(g, 6), torch.tensor([0.9, 0.7, 0.2])
    assert mask.sum(1)[0] != mask.sum(1)[1]

    def run(at_once):
        policy.zero_grad()
        _, context = policy.append_text(policy.empty(2), tokens, mask)
        v = policy.velocity(context, x, t.repeat(2), SIZE) if at_once else \
            torch.stack([policy.velocity(context, x[i::3], t[i], SIZE) for i in range(3)], 1).flatten(0, 1)
        (v * torch.arange(6)[:, None, None]).sum().backward()
        return v.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}

    (v, grads), (plain_v, plain_grads) = run(True), run(False)
    assert torch.allclose(v, plain_v, atol=1e-5)
    for n in plain_grads:
        assert (grads[n] - plain_grads[n]).norm() <= 1e-4 * plain_grads[n].norm() + 1e-5, n


@few
@given(seed=st.integers(0, 10**6), cut=st.integers(1, 6))


def test_text_in_two_pieces_is_text_in_one(policy, seed, cut):
    tokens = torch.randint(0, 280, (2, 8), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        whole, context = policy.append_text(policy.empty(2), tokens)
        first, half = policy.append_text(policy.empty(2), tokens[:, :cut])
        second, both = policy.append_text(half, tokens[:, cut:])
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=2e-5)
    assert torch.equal(both.position, context.position)


def test_later_text_cannot_change_earlier_logits_and_image_tokens_see_one_another(policy):
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 280, (1, 6), generator=g)
    changed = tokens.clone()
    changed[0, 4] += 1
    with torch.no_grad():
        a, context = policy.append_text(policy.empty(1), tokens)
        b, _ = policy.append_text(policy.empty(1), changed)
        assert torch.equal(a[:, :4], b[:, :4]) and not torch.equal(a[:, 4:], b[:, 4:])
        x = noisy(g, 1)
        y = x.clone()
        y[0, 5] += 1.0
        moved = (policy.velocity(context, x, 0.5, SIZE) - policy.velocity(context, y, 0.5, SIZE)).abs().amax(-1)[0]
    assert (moved > 0).all()


def test_velocity_leaves_the_context_alone(policy):
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        _, context = policy.append_text(policy.empty(1), tokens)
        held = [k.clone() for k in context.keys]
        policy.velocity(context, noisy(torch.Generator().manual_seed(6), 1), 0.5, SIZE)
    assert context.valid.shape[1] == 5 and all(torch.equal(a, b) for a, b in zip(held, context.keys))


def test_text_alone_gives_the_generation_expert_no_gradient(policy):
    policy.zero_grad()
    logits, _ = policy.append_text(policy.empty(1), torch.arange(6)[None])
    logits.square().sum().backward()
    of, trained = policy.trainable_by_expert(), [p for p in policy.parameters() if p.requires_grad]
    assert all(p.grad is None for p in of["generation"])
    assert policy.blocks[0].experts[0].q.weight.grad is not None
    assert sorted(map(id, of["understanding"] + of["generation"])) == sorted(map(id, trained))


def test_written_tokens_have_the_log_probs_of_the_distribution_sampled(policy):
    g = torch.Generator().manual_seed(7)
    tokens, mask = words(g, 3)
    _, context = policy.append_text(policy.empty(3), tokens, mask)
    written, alive, logp = policy.sample_text(context, torch.rand(3, 7, generator=g), temperature=0.8)
    fed = torch.cat([torch.full((3, 1), policy.start), written[:, :-1]], dim=1)
    logits, _ = policy.append_text(context, fed, alive)
    again = torch.where(alive, token_logp(logits, written, 0.8), 0.0)
    assert torch.allclose(again, logp, atol=2e-5)


def test_sampling_inverts_the_cumulative_distribution(policy):
    """Evenly spaced uniforms reproduce the next-token distribution."""
    N = 2000
    _, context = policy.append_text(policy.empty(1), torch.arange(4)[None])
    logits, _ = policy.append_text(context, torch.tensor([[policy.start]]))
    uniforms = ((torch.arange(N) + 0.5) / N)[:, None]
    written, _, _ = policy.sample_text(context.repeat(N), uniforms)
    share = torch.bincount(written[:, 0], minlength=logits.shape[-1]) / N
    assert (share - logits[0, -1].softmax(-1)).abs().max() <= 1.5 / N


def test_writing_stops_at_the_end_token_and_masks_what_follows(policy):
    _, context = policy.append_text(policy.empty(40), torch.arange(4)[None].expand(40, 4))
    written, alive, logp = policy.sample_text(context, torch.rand(40, 30, generator=torch.Generator().manual_seed(8)), temperature=3.0)
    for row, m in zip(written, alive):
        ends = (row == policy.end).nonzero().flatten()
        assert m.sum() == (ends[0] + 1 if len(ends) else len(row))
    assert (logp[~alive] == 0).all()


def test_adapters_start_as_the_policy_and_switch_off():
    policy, plain = load_policy(GOLDEN), load_policy(GOLDEN)
    add_lora(policy, rank=2, alpha=4.0)
    tokens = torch.arange(5)[None]
    base = plain.append_text(plain.empty(1), tokens)[0]
    assert torch.equal(policy.append_text(policy.empty(1), tokens)[0], base)
    for m in policy.modules():
        if isinstance(m, LoRA):
            torch.nn.init.normal_(m.B, std=0.1)
    tuned = policy.append_text(policy.empty(1), tokens)[0]
    assert not torch.allclose(tuned, base, atol=1e-3)
    with adapters_off(policy):
        assert torch.equal(policy.append_text(policy.empty(1), tokens)[0], base)
    assert torch.equal(policy.append_text(policy.empty(1), tokens)[0], tuned)
    assert {n.split(".")[-1] for n, p in policy.named_parameters() if p.requires_grad} == {"A", "B"}


# ---- boundaries ----


def test_a_padded_query_sees_itself_so_that_no_row_is_empty():
    for causal in (True, False):
        assert torch.equal(own_attention(torch.zeros(1, 3, dtype=torch.bool), causal)[0, 0], torch.eye(3, dtype=torch.bool))


def test_norms_of_bfloat16_round_before_the_weight():
    g = torch.Generator().manual_seed(10)
    norm, x = RMSNorm(64, 1e-6).bfloat16(), torch.randn(50, 64, generator=g).bfloat16()
    torch.nn.init.normal_(norm.weight, generator=g)
    rounded = (x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()).bfloat16()
    assert torch.equal(norm(x), norm.weight * rounded)


def test_the_velocity_of_a_bfloat16_policy_is_float32():
    policy = load_policy(GOLDEN, dtype=torch.bfloat16)
    with torch.no_grad():
        assert policy.velocity(policy.empty(1), noisy(torch.Generator().manual_seed(11), 1), 0.5, SIZE).dtype == torch.float32


def test_images_of_several_sizes_encode_as_each_alone_and_padding_is_zero(policy):
    g = torch.Generator().manual_seed(12)
    pixels = [torch.rand(3, h, w, generator=g) * 2 - 1 for h, w in ((16, 24), (8, 8), (32, 16))]
    latents = policy.encode(pixels)
    assert latents.shape == (3, 8, 16)
    for z, p, count in zip(latents, pixels, (6, 1, 8)):
        assert torch.allclose(z[:count], policy.encode(p[None])[0], atol=1e-5) and (z[count:] == 0).all()


def test_a_uniform_of_zero_never_writes_a_token_of_probability_zero(policy):
    _, context = policy.append_text(policy.empty(1), torch.arange(4)[None])
    greedy, _, _ = policy.sample_text(context, torch.zeros(1, 1), temperature=0.0)
    assert greedy.item() != 0
    assert torch.equal(policy.sample_text(context, torch.zeros(1, 1), temperature=1e-5)[0], greedy)


def test_guidance_is_active_from_above_the_low_time_through_the_high_time(policy):
    x, guidance = noisy(torch.Generator().manual_seed(13), 1), Guidance(3.0, 1.0, "channel", 0.0, (0.25, 0.75))
    with torch.no_grad():
        _, context = policy.append_text(policy.empty(1), torch.arange(5)[None])
        for t, active in ((0.125, False), (0.25, False), (0.5, True), (0.75, True), (0.875, False)):
            v = guided_velocity(policy, x, t, SIZE, context, policy.empty(1), policy.empty(1), guidance)
            assert torch.equal(v, policy.velocity(context, x, t, SIZE)) != active


def test_a_time_on_the_border_of_the_interval_is_compared_in_float32_as_the_official_loop_does(policy):
    x = noisy(torch.Generator().manual_seed(13), 1)
    with torch.no_grad():
        _, context = policy.append_text(policy.empty(1), torch.arange(5)[None])
        for t, interval, active in ((0.8, (0.3, 0.8), True), (0.4, (0.4, 1.0), False)):
            t = torch.tensor(t)
            v = guided_velocity(policy, x, t, SIZE, context, policy.empty(1), policy.empty(1), Guidance(3.0, 1.0, "channel", 0.0, interval))
            assert torch.equal(v, policy.velocity(context, x, t, SIZE)) != active


def test_images_of_several_times_are_guided_each_as_its_own_time_says(policy):
    x, t = noisy(torch.Generator().manual_seed(21), 3), torch.tensor([0.9, 0.4, 0.5])
    with torch.no_grad():
        _, context = policy.append_text(policy.empty(1), torch.arange(5)[None])
        how = Guidance(3.0, 1.0, "channel", 0.0, (0.4, 0.8))
        guided = lambda x, t: guided_velocity(policy, x, t, SIZE, context, policy.empty(1), policy.empty(1), how)
        v, plain = guided(x, t), policy.velocity(context, x, t, SIZE)
        assert torch.allclose(v, torch.cat([guided(x[i:i + 1], t[i]) for i in range(3)]), atol=2e-5)
        assert torch.equal(v[:2], plain[:2]) and not torch.equal(v[2], plain[2])


@pytest.mark.parametrize("call, words", [
    (lambda p: p.append_image(p.empty(1), latents=torch.zeros(1, 6, 16)), "latents without size"),
    (lambda p: p.velocity(p.empty(1), torch.zeros(1, 5, 16), 0.5, SIZE), "latents have 5 tokens"),
    (lambda p: p.encode(torch.zeros(1, 3, 25, 32)), "25 x 32 pixels"), (lambda p: p.encode_text([]), "no text"),
    (lambda p: p.sample_text(p.empty(1), torch.zeros(1, 0)), "no column"),
    (lambda p: p.velocity(p.empty(2), torch.zeros(3, 6, 16), 0.5, SIZE), "3 rows behind 2 contexts"),
    (lambda p: p.append_image(p.empty(2), latents=torch.zeros(4, 6, 16), size=SIZE), "4 rows behind 2 contexts")])
def test_calls_that_cannot_be_say_what_would_be_right(policy, call, words):
    with pytest.raises(ValueError, match=words):
        call(policy)


def test_an_adapter_adds_alpha_over_rank_of_its_product():
    g = torch.Generator().manual_seed(14)
    base, x = torch.nn.Linear(5, 4), torch.randn(3, 5, generator=g)
    adapter = LoRA(base, rank=2, alpha=6.0)
    torch.nn.init.normal_(adapter.B, generator=g)
    assert torch.allclose(adapter(x), base(x) + 3 * x @ adapter.A.T @ adapter.B.T, atol=1e-5)


def test_adapters_sit_on_all_projections_of_the_named_experts_alone():
    policy = add_lora(load_policy(GOLDEN), rank=2, alpha=4.0, experts=(1,))
    names = {f"blocks.{n}.experts.1.{leaf}" for n in range(2) for leaf in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {n for n, m in policy.named_modules() if isinstance(m, LoRA)} == names


def test_text_and_pixels_reach_every_understanding_parameter_and_no_other(policy):
    policy.zero_grad()
    context = policy.append_image(policy.empty(1), pixels=torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(15)))
    policy.append_text(context, torch.arange(6)[None])[0].square().sum().backward()
    of = policy.trainable_by_expert()
    assert all(p.grad is not None for p in of["understanding"]) and all(p.grad is None for p in of["generation"])


def test_a_text_must_leave_the_room_that_is_asked_for(policy):
    length = policy.encode_text(["a red cat"])[0].shape[1]
    limit = policy.config.llm["max_position_embeddings"]
    assert policy.encode_text(["a red cat"], room=limit - length)[0].shape[1] == length
    with pytest.raises(ValueError, match="longer than the context"):
        policy.encode_text(["a red cat"], room=limit - length + 1)


@pytest.mark.parametrize("folder, marker", [(TOY, "<|im_end|>"), (TOY, "<|vision_start|>"), (TOY, "<pad>"), (GOLDEN, "<|im_end|>"),
                                            (GOLDEN, "<|im_start|>"), (GOLDEN, "<|vision_end|>"), (GOLDEN, "<|endoftext|>")])
def test_a_marker_inside_a_text_is_no_marker(folder, marker):
    """A prompt or a question that names one does not end itself; other texts are tokenised as they always were."""
    policy = load_policy(folder)
    tokens, mask = policy.encode_text([f"a red circle {marker} a blue square", "a red circle a blue square"])
    for row, seen in zip(tokens, mask):
        inside = row[seen].tolist()[1:-1]
        assert row[0] == policy.start and row[seen][-1] == policy.end and not {*inside} & policy.reserved
    plain = policy.tokenizer("a red circle a blue square", add_special_tokens=False).input_ids
    assert tokens[1][mask[1]].tolist()[1:-1] == plain


def test_texts_are_checked_as_they_are_encoded():
    policy = load_policy(TOY)
    policy.check_text(["a red circle"] * 600)
    for method in (policy.check_text, policy.encode_text):
        with pytest.raises(ValueError, match="text of 202 tokens is longer than the context, which has room for 118: 'red red"):
            method(["a"] * 300 + ["red " * 200], room=10)


# ---- text ----


def read_again(policy, context, uniforms, temperature):
    """sample_text without a cache: for every token all before it are read again."""
    fed = torch.full((len(uniforms), 1), policy.start)
    alive, written, mask, logps = torch.ones(len(uniforms), dtype=torch.bool), [], [], []
    for u in uniforms.T:
        logp = (policy.append_text(context, fed)[0][:, -1].float() / (temperature or 1.0)).log_softmax(-1)
        share = logp.double().exp().cumsum(-1)
        token = (share <= u[:, None] * share[:, -1:]).sum(-1) if temperature else logp.argmax(-1)
        written.append(torch.where(alive, token, policy.end)), mask.append(alive)
        logps.append(torch.where(alive, logp.gather(1, token[:, None])[:, 0], 0.0))
        alive, fed = alive & (token != policy.end), torch.cat([fed, token[:, None]], dim=1)
        if not alive.any():
            break
    return [torch.stack(z, 1) for z in (written, mask, logps)]


@pytest.mark.parametrize("kind", ["plain", "adapters", "autocast", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.0, 0.8, 3.0])
@torch.no_grad()
def test_text_is_written_as_if_all_were_read_again_for_every_token(kind, temperature):
    policy = load_policy(GOLDEN, dtype=torch.bfloat16 if kind == "bfloat16" else None)
    if kind == "adapters":
        for m in add_lora(policy, rank=2, alpha=4.0).modules():
            if isinstance(m, LoRA):
                torch.nn.init.normal_(m.B, std=0.05)
    policy.head.weight[policy.end] *= 4                         # so that some rows end early
    g, exact = torch.Generator().manual_seed(7), kind in ("plain", "adapters")
    (tokens, mask), uniforms = words(g, 12), torch.rand(12, 9, generator=g)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        _, context = policy.append_text(policy.empty(12), tokens, mask)
        ours, plain = policy.sample_text(context, uniforms, temperature), read_again(policy, context, uniforms, temperature)
    same = (ours[0] == plain[0]).all(1)                         # in bfloat16 a token on an edge may fall to either side of it
    assert same.all() if exact else same.sum() >= 8
    assert (ours[1] == plain[1])[same].all() and (ours[2] - plain[2])[same].abs().max() <= (1e-5 if exact else 0.1)
    assert temperature < 3 or 0 < (ours[0] == policy.end).any(1).sum() < 12


@torch.no_grad()
def test_writing_leaves_the_context_as_it_was(policy):
    g = torch.Generator().manual_seed(22)
    tokens, mask = words(g, 3)
    _, context = policy.append_text(policy.empty(3), tokens, mask)
    held, uniforms = [z.clone() for z in (*context.keys, *context.values, context.valid, context.position)], torch.rand(3, 6, generator=g)
    first = policy.sample_text(context, uniforms)
    assert all(torch.equal(a, b) for a, b in zip(held, (*context.keys, *context.values, context.valid, context.position)))
    assert all(torch.equal(a, b) for a, b in zip(first, policy.sample_text(context, uniforms)))


@torch.no_grad()
def test_a_written_token_is_put_behind_the_others_without_a_copy_of_them(policy, monkeypatch):
    read, places = policy.append_text, set()
    monkeypatch.setattr(policy, "append_text", lambda context, *new: places.add(context.keys[1].data_ptr()) or read(context, *new))
    policy.sample_text(policy.append_text(policy.empty(2), torch.arange(6).view(2, 3))[1], torch.zeros(2, 5))
    assert len(places) == 2                                     # of the empty context, and of all that sample_text read


def with_logits(policy, monkeypatch, change):
    """Let `change` alter the logits (N, L, V) of the i-th call of append_text, in place."""
    read, calls = policy.append_text, iter(range(10**6))

    def altered(context, tokens, mask):
        logits, longer = read(context, tokens, mask)
        change(next(calls), logits)
        return logits, longer

    monkeypatch.setattr(policy, "append_text", altered)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_write_no_text(policy, monkeypatch, value, temperature):
    def poison(i, logits):
        logits[:, -1, policy.end] = -float("inf")               # what nothing writes may have no probability
        if i == 2:
            logits[1, -1, 5] = value

    uniforms = torch.rand(3, 5, generator=torch.Generator().manual_seed(23))
    with monkeypatch.context() as patch:
        with_logits(policy, patch, poison)
        assert policy.sample_text(policy.empty(3), uniforms[:, :2], temperature)[0].shape == (3, 2)
    with_logits(policy, monkeypatch, poison)
    told = "^text logits are not finite at token 2; the policy's weights or its precision are at fault$"
    with pytest.raises(FloatingPointError, match=told):
        policy.sample_text(policy.empty(3), uniforms, temperature)


def test_logits_behind_the_end_of_a_text_may_be_anything(policy, monkeypatch):
    def change(i, logits):
        logits[1, -1] = float("nan") if i else 0.0
        logits[1, -1, policy.end] += 0.0 if i else 1e4

    with_logits(policy, monkeypatch, change)
    _, mask, logp = policy.sample_text(policy.empty(3), torch.rand(3, 4, generator=torch.Generator().manual_seed(24)))
    assert mask[1].tolist() == [True, False, False, False] and logp.isfinite().all()


def test_pixels_and_latents_that_are_not_finite_go_no_further(policy):
    bad = torch.zeros(2, 6, 16)
    bad[1, 3, 2] = float("nan")
    with pytest.raises(FloatingPointError, match="the autoencoder drew pixels that are not finite"):
        policy.decode(bad, SIZE)
    pixels = torch.zeros(2, 3, *SIZE)
    pixels[1, 0, 0, 0] = float("inf")
    for given in (pixels, list(pixels)):
        with pytest.raises(FloatingPointError, match="the autoencoder made latents that are not finite"):
            policy.encode(given)


def test_words_that_the_tokenizer_does_not_know_are_no_markers():
    toy = load_policy(TOY)
    tokens, mask = toy.encode_text(["a zebra <unk> <think> a circle </think>"])
    assert mask.all() and (tokens == toy.tokenizer.unk_token_id).sum() == 2 and tokens.shape[1] == 9


@pytest.mark.parametrize("texts, room", [([], 0), (["a red cat", "a red cat " * 2000], 0), (["a red cat"], 10**6)])
def test_checking_texts_raises_what_encoding_them_raises(policy, monkeypatch, texts, room):
    with pytest.raises(ValueError) as encoding:
        policy.encode_text(texts, room)
    with pytest.raises(ValueError) as checking:
        policy.check_text(texts, room)
    assert str(encoding.value) == str(checking.value)


def test_checking_many_texts_takes_the_memory_of_few(policy):
    texts = ["a red cat"] * 20_000 + ["a red cat " * 50]
    tracemalloc.start()
    policy.check_text(texts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e6                                           # their ids alone are 20,000 lists of at least 100 bytes


def test_many_texts_have_the_ids_of_each_alone(policy):
    g = torch.Generator().manual_seed(25)
    known = ["a", "red", "cat", "on the box,", "Ünïcode ✓", "\n\n", "12", "it's"]
    texts = [" ".join(known[i] for i in torch.randint(len(known), (n,), generator=g)) for n in torch.randint(0, 6, (600,), generator=g)]
    tokens, mask = policy.encode_text(texts)
    for text, row, read in zip(texts, tokens, mask):
        assert row[read].tolist() == [policy.start, *policy.tokenizer(text, add_special_tokens=False).input_ids, policy.end]
        assert (row[~read] == policy.end).all()
