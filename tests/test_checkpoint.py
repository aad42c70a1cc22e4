"""How weights come and go: what is saved is what is read, and what cannot be computed with is refused in one line that names it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import release_on_meta
from checkpoint import load_policy, release_ae_name, release_name, save_adapters, save_policy, save_tensors
from policy import LoRA, PolicyConfig, add_lora

GOLDEN = Path(__file__).parent / "golden" / "bagel_tiny"
SIZE = (16, 24)                                                 # 2 x 3 latent tokens of 8 pixels


@pytest.fixture(scope="module")
def policy():
    return load_policy(GOLDEN)


def test_saving_merges_adapters_and_loading_gives_the_same_function(tmp_path):
    policy = add_lora(load_policy(GOLDEN), rank=2, alpha=4.0)
    for m in policy.modules():
        if isinstance(m, LoRA):
            torch.nn.init.normal_(m.B, std=0.1)
    save_policy(policy, tmp_path)
    again = load_policy(tmp_path)
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(9))
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


def test_a_loaded_autoencoder_is_frozen(policy):
    assert not any(p.requires_grad for p in policy.autoencoder.parameters())


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
