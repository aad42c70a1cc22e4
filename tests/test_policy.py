"""What the policy promises beside the official numbers: padding, sharing, caching, adapters, files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bench import release_on_meta
from checkpoint import load_policy, release_ae_name, release_name, save_adapters, save_policy, save_tensors
from policy import Guidance, LoRA, PolicyConfig, RMSNorm, adapters_off, add_lora, guided_velocity, own_attention
from sample import fit_size
from grpo import token_logp

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
        guided = guided_velocity(policy, x, 0.4, sizes, context, policy.empty(3), policy.empty(3), Guidance(3.0, 2.0, "global", 0.1, (0, 1)))
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
    parts = policy.parts()
    assert all(p.grad is None for p in parts["generation"])
    assert policy.blocks[0].experts[0].q.weight.grad is not None
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert sorted(map(id, parts["understanding"] + parts["generation"])) == sorted(map(id, trained))


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


def test_saving_merges_adapters_and_loading_gives_the_same_function(tmp_path):
    policy = add_lora(load_policy(GOLDEN), rank=2, alpha=4.0)
    for m in policy.modules():
        if isinstance(m, LoRA):
            torch.nn.init.normal_(m.B, std=0.1)
    save_policy(policy, tmp_path)
    again = load_policy(tmp_path)
    x = noisy(torch.Generator().manual_seed(9), 1)
    with torch.no_grad():
        for p in (policy, again):
            p.out = p.velocity(p.append_text(p.empty(1), torch.arange(5)[None])[1], x, 0.3, SIZE)
    assert torch.allclose(policy.out, again.out, atol=1e-5)


def test_a_saved_folder_has_the_released_layout_bit_for_bit(tmp_path):
    save_policy(load_policy(GOLDEN), tmp_path)
    for name in ("ema.safetensors", "ae.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(GOLDEN / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    for name in ("llm_config.json", "vit_config.json", "ae_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((GOLDEN / name).read_text())


def cut(folder, stem, into=("one", "two")):
    """stem.safetensors as two shards and their index."""
    tensors = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    names, where = sorted(tensors), {}
    for i, name in enumerate(into):
        save_file({k: tensors[k] for k in names[i::2]}, folder / f"{name}.safetensors")
        where |= {k: f"{name}.safetensors" for k in names[i::2]}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def test_sharded_folders_load(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "p")
    cut(tmp_path / "p", "ema")
    assert torch.equal(load_policy(tmp_path / "p").embed.weight, load_policy(GOLDEN).embed.weight)


def sharded_and_changed(tmp_path):
    """A folder whose ema and ae are shards, and its policy with other weights."""
    shutil.copytree(GOLDEN, tmp_path / "p")
    cut(tmp_path / "p", "ema")
    cut(tmp_path / "p", "ae", ("three", "four"))
    policy = load_policy(tmp_path / "p")
    with torch.no_grad():
        policy.embed.weight += 1
        policy.autoencoder.decoder.conv_in.bias += 1
    return policy


def test_a_save_over_a_sharded_folder_is_what_is_read_again(tmp_path):
    policy = sharded_and_changed(tmp_path)
    save_policy(policy, tmp_path / "p")
    again = load_policy(tmp_path / "p")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in policy.state_dict().items())


def test_a_save_over_shards_that_dies_behind_the_weights_keeps_the_weights(tmp_path, monkeypatch):
    policy, write = sharded_and_changed(tmp_path), save_tensors
    monkeypatch.setattr("checkpoint.save_tensors", lambda tensors, path: write(tensors, path) if path.name.startswith("ema") else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_policy(policy, tmp_path / "p")
    assert torch.equal(load_policy(tmp_path / "p").embed.weight, policy.embed.weight)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ""}}', "["])
def test_a_damaged_old_index_does_not_stop_a_save(tmp_path, content):
    policy = load_policy(GOLDEN)
    (tmp_path / "ema.safetensors.index.json").write_text(content)
    save_policy(policy, tmp_path)
    assert torch.equal(load_policy(tmp_path).embed.weight, policy.embed.weight)


def test_adapters_saved_over_shards_are_the_ones_that_load(tmp_path):
    policy = add_lora(load_policy(GOLDEN), 2, 4.0)
    save_adapters(policy, tmp_path)
    cut(tmp_path, "adapter_model")
    with torch.no_grad():
        policy.blocks[0].experts[0].q.B += 1
    save_adapters(policy, tmp_path)
    assert (load_policy(GOLDEN, adapter=tmp_path).blocks[0].experts[0].q.B == 1).all()


def test_a_tied_head_that_the_file_leaves_out_is_read_from_the_embedding_and_is_saved(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "p")
    edit(lambda t: t.pop("language_model.lm_head.weight"))(tmp_path / "p")
    with pytest.raises(ValueError, match="lm_head"):
        load_policy(tmp_path / "p")
    set_json(tmp_path / "p" / "llm_config.json", tie_word_embeddings=True)
    policy = load_policy(tmp_path / "p")
    save_policy(policy, tmp_path / "q")
    assert torch.equal(load_policy(tmp_path / "q").head.weight, policy.embed.weight)
    with torch.no_grad():
        policy.head.weight += 1
    save_policy(policy, tmp_path / "q")
    assert json.loads((tmp_path / "q" / "llm_config.json").read_text())["tie_word_embeddings"] is False


def test_a_file_of_two_dtypes_is_of_that_of_most_of_its_numbers(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "p")
    edit(lambda t: t.update({k: v.bfloat16() for k, v in t.items() if k != min(t)}))(tmp_path / "p")
    policy = load_policy(tmp_path / "p")
    assert policy.stored == policy.latent_positions.dtype == policy.embed.weight.dtype == torch.bfloat16
    policy.velocity(policy.empty(1), torch.zeros(1, 6, 16), 0.5, SIZE)


def set_json(path, **fields):
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("file, field, value, words", [
    ("llm", "hidden_size", -64, "hidden_size is -64"), ("llm", "num_attention_heads", 3, "multiple of num_attention_heads"),
    ("llm", "num_key_value_heads", 3, "multiple of num_key_value_heads"), ("llm", "num_attention_heads", 64, "even multiple"),
    ("llm", "rope_theta", 0, "rope_theta is 0"), ("llm", "rms_norm_eps", None, "rms_norm_eps is None"), ("llm", "hidden_act", "gelu", "only 'silu'"),
    ("llm", "rope_scaling", {"type": "linear"}, "rope_scaling"),
    ("llm", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}, "default rotation"), ("llm", "rope_parameters", [1], "default rotation"),
    ("llm", "use_sliding_window", True, "use_sliding_window"), ("llm", "max_position_embeddings", None, "max_position_embeddings is None"),
    ("llm", "rms_norm_eps", 10**400, "rms_norm_eps"), ("llm", "vocab_size", 2**62, "2^24"), ("ae", "norm_groups", 0, "norm_groups is 0"),
    ("ae", "num_res_blocks", 0, "num_res_blocks is 0"), ("bagel", "vae_resize", [16, 64, 8], "longest, shortest"),
    ("bagel", "vae_resize", [64, 32, 7], "multiple of a token"), ("bagel", "vit_resize", [50, 20, 10.0], "vit_resize[2] is 10.0"),
    ("llm", "vocab_size", 200, "vocab_size is 200"),
    ("vit", "num_attention_heads", 5, "multiple of num_attention_heads"), ("vit", "patch_size", 2.0, "patch_size is 2.0"),
    ("vit", "hidden_act", "relu", "only 'gelu_pytorch_tanh'"), ("vit", "num_channels", 1, "num_channels must be 3"),
    ("bagel", "connector_act", "gelu", "connector_act"), ("bagel", "interpolate_pos", True, "interpolate_pos"),
    ("bagel", "vae_resize", 5, "cannot be"), ("bagel", "vit_resize", [1, 2], "longest, shortest, stride"),
    ("ae", "scale_factor", 0, "scale_factor is 0"), ("ae", "shift_factor", "x", "shift_factor is 'x'"), ("ae", "ch_mult", [], r"ch_mult[0] is None"),
    ("ae", "ch_mult", [2, 1, 1], "must start with 1"), ("ae", "downsample", 8, "2 per level"), ("ae", "in_channels", 1, "must be 3")])
def test_a_config_that_no_policy_can_have_is_refused_with_what_would_be_right(tmp_path, file, field, value, words):
    assert words in broken(tmp_path, lambda f: set_json(f / f"{file}_config.json", **{field: value}))


def test_a_missing_config_is_named_beside_the_shape_that_does_not_fit(tmp_path):
    assert "bagel_config.json missing" in broken(tmp_path, lambda f: (f / "bagel_config.json").unlink())


def test_tokens_that_the_tokenizer_counts_otherwise_than_its_file_are_refused(tmp_path):
    def gap(folder):
        added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        set_json(folder / "tokenizer_config.json", added_tokens_decoder={str(int(k) + 3): v for k, v in added.items()})
        set_json(folder / "llm_config.json", vocab_size=300)
    assert "without a gap" in broken(tmp_path, gap)


@pytest.mark.parametrize("name, content, words", [
    ("vocab.json", "{}", "no ids"), ("vocab.json", '{"a": "b"}', "no ids"), ("vocab.json", '{"a": ', "is not JSON"),
    ("merges.txt", "", "no merges"), ("merges.txt", "#version: 0.2\nqq zz\n", "merges.txt:2: not a merge"),
    ("tokenizer.json", "{}", "no model"), ("tokenizer_config.json", "[]", "must hold a JSON object")])
def test_a_damaged_vocabulary_is_refused(tmp_path, name, content, words):
    assert words in broken(tmp_path, lambda f: ((f / name).unlink(missing_ok=True), (f / name).write_text(content)))


def test_whole_numbers_for_weights_are_refused(tmp_path):
    assert "llm2vae.bias has dtype I64" in broken(tmp_path, edit(lambda t: t.update({"llm2vae.bias": torch.zeros(16, dtype=torch.long)})))


def broken(tmp_path, change):
    folder = tmp_path / "p"
    shutil.copytree(GOLDEN, folder)
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_policy(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(change):
    def apply(folder):
        tensors = load_file(folder / "ema.safetensors")
        change(tensors)
        save_file(tensors, folder / "ema.safetensors")
    return apply


def test_bad_folders_are_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_policy(tmp_path / "nowhere")


def test_missing_and_extra_keys_are_named(tmp_path):
    said = broken(tmp_path, edit(lambda t: (t.pop("llm2vae.bias"), t.update(strange=torch.zeros(1)))))
    assert "llm2vae.bias" in said and "strange" in said


def test_a_wrong_shape_is_named(tmp_path):
    assert "llm2vae.bias" in broken(tmp_path, edit(lambda t: t.update({"llm2vae.bias": torch.zeros(3)})))


def test_pickled_weights_are_not_read(tmp_path):
    said = broken(tmp_path, lambda f: ((f / "ema.safetensors").unlink(), torch.save({}, f / "pytorch_model.bin")))
    assert "pickle" in said and "pytorch_model.bin" in said


def test_a_truncated_file_is_refused(tmp_path):
    assert "safetensors" in broken(tmp_path, lambda f: (f / "ema.safetensors").write_bytes((f / "ema.safetensors").read_bytes()[:5000]))


def test_a_tokenizer_without_the_markers_is_refused(tmp_path):
    def change(folder):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["added_tokens_decoder"] = {k: v for k, v in config["added_tokens_decoder"].items() if "vision" not in v["content"]}
        config["additional_special_tokens"] = []
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "<|vision_start|>" in broken(tmp_path, change)


@pytest.mark.parametrize("content", ["{", None])
def test_damaged_or_missing_tokenizer_files_are_said(tmp_path, content):
    def change(folder):
        for path in folder.glob("*token*"):
            path.unlink() if content is None else path.write_text(content)
        for name in ("vocab.json", "merges.txt"):
            (folder / name).unlink(missing_ok=True)
    assert ("tokenizer files of" if content is None else "is not JSON") in broken(tmp_path, change)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_tensors({"a": torch.ones(2)}, path)
    def full(tensors, target, metadata=None):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_tensors({"a": torch.zeros(2)}, path)
    assert torch.equal(load_file(path)["a"], torch.ones(2)) and list(tmp_path.iterdir()) == [path]


def test_the_release_has_the_published_keys_and_shapes():
    """The 7B configuration on the meta device: 1,223 tensors, 14,607,260,128 values, 244 of the autoencoder."""
    policy = release_on_meta(load_policy(GOLDEN).tokenizer)
    state = {release_name(k): tuple(v.shape) for k, v in policy.state_dict().items() if not k.startswith("autoencoder.")}
    D, kv, I, W = 3584, 512, 18944, 1152
    table = {"language_model.model.embed_tokens.weight": (152064, D), "language_model.lm_head.weight": (152064, D),
             "language_model.model.norm.weight": (D,), "language_model.model.norm_moe_gen.weight": (D,),
             "time_embedder.mlp.0.weight": (D, 256), "time_embedder.mlp.0.bias": (D,),
             "time_embedder.mlp.2.weight": (D, D), "time_embedder.mlp.2.bias": (D,),
             "vae2llm.weight": (D, 64), "vae2llm.bias": (D,), "llm2vae.weight": (64, D), "llm2vae.bias": (64,),
             "latent_pos_embed.pos_embed": (4096, D), "vit_pos_embed.pos_embed": (4900, D),
             "connector.fc1.weight": (D, W), "connector.fc1.bias": (D,), "connector.fc2.weight": (D, D), "connector.fc2.bias": (D,)}
    for n in range(28):
        for e in ("", "_moe_gen"):
            layer, attention = f"language_model.model.layers.{n}.", f"language_model.model.layers.{n}.self_attn."
            table |= {f"{layer}{norm}{e}.weight": (D,) for norm in ("input_layernorm", "post_attention_layernorm")}
            table |= {f"{attention}{p}_norm{e}.weight": (128,) for p in "qk"}
            table |= {f"{attention}{p}_proj{e}.weight": (rows, D) for p, rows in (("q", D), ("k", kv), ("v", kv), ("o", D))}
            table |= {f"{attention}{p}_proj{e}.bias": (rows,) for p, rows in (("q", D), ("k", kv), ("v", kv))}
            table |= {f"{layer}mlp{e}.{p}_proj.weight": shape for p, shape in (("gate", (I, D)), ("up", (I, D)), ("down", (D, I)))}
    vit = "vit_model.vision_model."
    table |= {vit + "embeddings.patch_embedding.weight": (W, 588), vit + "embeddings.patch_embedding.bias": (W,),
              vit + "embeddings.position_embedding.weight": (4900, W), vit + "post_layernorm.weight": (W,), vit + "post_layernorm.bias": (W,)}
    for n in range(26):
        layer = f"{vit}encoder.layers.{n}."
        table |= {f"{layer}layer_norm{i}.{p}": (W,) for i in (1, 2) for p in ("weight", "bias")}
        table |= {f"{layer}self_attn.{p}_proj.weight": (W, W) for p in ("q", "k", "v", "out")}
        table |= {f"{layer}self_attn.{p}_proj.bias": (W,) for p in ("q", "k", "v", "out")}
        table |= {layer + "mlp.fc1.weight": (4304, W), layer + "mlp.fc1.bias": (4304,),
                  layer + "mlp.fc2.weight": (W, 4304), layer + "mlp.fc2.bias": (W,)}
    assert state == table and len(table) == 1223
    assert sum(torch.Size(s).numel() for s in state.values()) == 14_607_260_128
    ae = {release_ae_name(k, 4) for k in policy.autoencoder.state_dict()}
    assert len(ae) == 244
    assert sum(v.numel() for v in policy.autoencoder.state_dict().values()) == pytest.approx(83.82e6, rel=1e-4)
    assert {"decoder.up.3.block.0.conv1.weight", "encoder.down.1.block.0.nin_shortcut.weight", "encoder.mid.attn_1.proj_out.bias"} <= ae


def test_a_save_that_fails_half_way_keeps_the_old_tokenizer(tmp_path, monkeypatch):
    policy = load_policy(GOLDEN)
    save_policy(policy, tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(folder):
        (Path(folder) / "vocab.json").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(policy.tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_policy(policy, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_an_index_that_lists_a_missing_shard_is_refused(tmp_path):
    def change(folder):
        (folder / "ema.safetensors").unlink()
        (folder / "ema.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "shard0.safetensors"}}))
    assert "shard0.safetensors" in broken(tmp_path, change)


def test_files_without_tensors_are_refused(tmp_path):
    assert "ema.safetensors holds no tensors" in broken(tmp_path, lambda f: save_file({}, f / "ema.safetensors"))

    def change(folder):
        (folder / "ema.safetensors").unlink()
        (folder / "ema.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    assert "index.json holds no tensors" in broken(tmp_path / "q", change)


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    def change(folder):
        config = json.loads((folder / "llm_config.json").read_text())
        (folder / "llm_config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    assert "the config says" in broken(tmp_path, change)
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


def test_an_image_of_too_many_pixels_shrinks_each_side_by_the_ratio_of_areas_as_the_official_rule_does():
    assert fit_size(610, 4594, 1024, 512, 16) == (128, 1024)    # 512 x 3856 by the first rule, above 14 * 14 * 9 * 1024


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
    parts = policy.parts()
    assert all(p.grad is not None for p in parts["understanding"]) and all(p.grad is None for p in parts["generation"])


def test_a_loaded_autoencoder_is_frozen(policy):
    assert not any(p.requires_grad for p in policy.autoencoder.parameters())


def test_a_text_must_leave_the_room_that_is_asked_for(policy):
    length = policy.encode_text(["a red cat"])[0].shape[1]
    limit = policy.config.llm["max_position_embeddings"]
    assert policy.encode_text(["a red cat"], room=limit - length)[0].shape[1] == length
    with pytest.raises(ValueError, match="longer than the context"):
        policy.encode_text(["a red cat"], room=limit - length + 1)


def test_fields_that_a_release_leaves_out_take_their_classes_defaults(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "p")
    for name, gone in (("llm_config.json", ("rms_norm_eps", "rope_theta", "tie_word_embeddings")),
                       ("vit_config.json", ("num_channels", "layer_norm_eps", "hidden_act"))):
        config = json.loads((tmp_path / "p" / name).read_text())
        config |= {"rope_parameters": {"rope_theta": config["rope_theta"]}} if "llm" in name else {}
        (tmp_path / "p" / name).chmod(0o644)
        (tmp_path / "p" / name).write_text(json.dumps({k: v for k, v in config.items() if k not in gone}))
    whole, short = load_policy(GOLDEN), load_policy(tmp_path / "p")
    tokens, pixels = torch.arange(5)[None], torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    for policy in (whole, short):
        policy.out = policy.append_text(policy.append_image(policy.empty(1), pixels=pixels), tokens)[0]
    assert torch.equal(whole.out, short.out)


def test_what_the_resize_rules_are_without_a_word_of_the_files():
    release = PolicyConfig(dict(hidden_size=8, num_attention_heads=1), dict(patch_size=14))
    assert (release.vae_resize, release.vit_resize) == ((1024, 512, 16), (980, 224, 14))


def test_a_default_rotation_may_be_named(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "p")
    set_json(tmp_path / "p" / "llm_config.json", rope_theta=None, rope_scaling={"rope_type": "default"},
             rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert load_policy(tmp_path / "p").config.rope_theta == 5e5
