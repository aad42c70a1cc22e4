"""How weights come and go: what is saved is what is read, and what cannot be computed with is refused in one line that names it."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config

from policy import LoRA, PolicyConfig, adapters, add_lora
from studies.bench import release_on_meta
from support.checkpoint import (load_adapters, load_policy, release_ae_name, release_name,
    save_adapters, save_policy, save_tensors)
from support.disk import read_json, write_atomic
from support.run import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "bagel_tiny"
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
    ("llm", "rope_theta", 0, "rope_theta is 0"), ("llm", "rms_norm_eps", None, "rms_norm_eps is None"),
    ("llm", "hidden_act", "gelu", "only 'silu'"),
    ("llm", "rope_scaling", {"type": "linear"}, "rope_scaling"),
    ("llm", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}, "default rotation"),
    ("llm", "rope_parameters", [1], "default rotation"),
    ("llm", "use_sliding_window", True, "use_sliding_window"),
    ("llm", "max_position_embeddings", None, "max_position_embeddings is None"),
    ("llm", "rms_norm_eps", 10**400, "rms_norm_eps"), ("llm", "vocab_size", 2**62, "2^24"), ("ae", "norm_groups", 0, "norm_groups is 0"),
    ("ae", "num_res_blocks", 0, "num_res_blocks is 0"), ("bagel", "vae_resize", [16, 64, 8], "longest, shortest"),
    ("bagel", "vae_resize", [64, 32, 7], "multiple of a token"), ("bagel", "vit_resize", [50, 20, 10.0], "vit_resize[2] is 10.0"),
    ("llm", "vocab_size", 200, "vocab_size is 200"),
    ("vit", "num_attention_heads", 5, "multiple of num_attention_heads"), ("vit", "patch_size", 2.0, "patch_size is 2.0"),
    ("vit", "hidden_act", "relu", "only 'gelu_pytorch_tanh'"), ("vit", "num_channels", 1, "num_channels 1 is not implemented, only 3"),
    ("bagel", "connector_act", "gelu", "connector_act"), ("bagel", "interpolate_pos", True, "interpolate_pos"),
    ("bagel", "vae_resize", 5, "cannot be"), ("bagel", "vit_resize", [1, 2], "longest, shortest, stride"),
    ("ae", "scale_factor", 0, "scale_factor is 0"), ("ae", "shift_factor", "x", "shift_factor is 'x'"),
    ("ae", "ch_mult", [], r"ch_mult[0] is None"),
    ("ae", "ch_mult", [2, 1, 1], "must start with 1"), ("ae", "downsample", 8, "2 per level"), ("ae", "in_channels", 1, "only 3"),
    ("llm", "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}, "they must agree"),
    ("llm", "rope_scaling", {"type": "default", "rope_theta": 5e5}, "they must agree"),
    ("llm", "rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}, "default rotation"),
    ("llm", "rope_scaling", {"type": "default", "mrope_section": [2, 3, 3]}, "default rotation"),
    ("llm", "partial_rotary_factor", 0.5, "only 1.0"), ("llm", "attention_bias", False, "only True"),
    ("llm", "qkv_bias", False, "only True"),
    ("llm", "head_dim", 32, "head_dim 32 is not implemented, only 16"), ("llm", "qk_norm", False, "only True"),
    ("llm", "layer_types", ["full_attention", "sliding_attention"], "sliding_attention"), ("llm", "use_mrope", True, "only False"),
    ("llm", "quantization_config", {"bits": 4}, "quantization_config"), ("llm", "model_type", "qwen3", "only 'qwen2'"),
    ("llm", "tie_word_embeddings", True, "differs from"), ("vit", "model_type", "clip_vision_model", "only 'siglip"),
    ("vit", "rope", True, "rope True"),
    ("vit", "patch_size", [10, 10], "patch_size is [10, 10]"), ("bagel", "visual_gen", False, "only True"),
    ("bagel", "vit_select_layer", -1, "only -2"),
    ("ae", "out_ch", 4, "only 3"), ("ae", "act_fn", "relu", "only 'silu'"),
    ("ae", "attn_resolutions", [16], "attn_resolutions"), ("ae", "use_quant_conv", True, "only False")])
def test_a_config_that_no_policy_can_have_is_refused_with_what_would_be_right(tmp_path, file, field, value, words):
    assert words in broken(tmp_path, lambda f: set_json(f / f"{file}_config.json", **{field: value}))


def test_more_numbers_than_can_be_counted_are_refused(tmp_path):
    def change(folder):
        set_json(folder / "bagel_config.json", max_latent_size=2**23, vae_resize=[48, 24, 8])
        set_json(folder / "llm_config.json", hidden_size=2**23)
    assert "cannot be" in broken(tmp_path, change)


def test_a_missing_config_is_named_beside_the_shape_that_does_not_fit(tmp_path):
    assert "bagel_config.json missing" in broken(tmp_path, lambda f: (f / "bagel_config.json").unlink())


def test_tokens_that_the_tokenizer_counts_otherwise_than_its_file_are_refused(tmp_path):
    def gap(folder):
        added = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        set_json(folder / "tokenizer_config.json", added_tokens_decoder={str(int(k) + 3): v for k, v in added.items()})
        set_json(folder / "llm_config.json", vocab_size=300)
    assert "without a gap" in broken(tmp_path, gap)


@pytest.mark.parametrize("name, content", [
    ("vocab.json", b"{}"), ("vocab.json", b'{"a": "b"}'), ("vocab.json", b'{"a": '), ("vocab.json", b'{"a": 99999999999999999999}'),
    ("merges.txt", b""), ("merges.txt", b"#version: 0.2\nqq zz\n"), ("merges.txt", b"\xff\xfe"), ("tokenizer.json", b"{}"),
    ("tokenizer.json", b"null"), ("tokenizer.json", b"[" * 100_000), ("tokenizer_config.json", b'{"eos_token": 3}'),
    ("tokenizer_config.json", b""),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 3}}'), ("config.json", b"{"), ("added_tokens.json", b""),
    ("chat_template.jinja", b"\xff")])
def test_damaged_tokenizer_files_are_refused_whatever_the_libraries_raise(tmp_path, name, content):
    """tokenizers raises Exception itself, json a RecursionError, transformers half a dozen kinds."""
    said = broken(tmp_path, lambda f: ((f / name).unlink(missing_ok=True), (f / name).write_bytes(content)))
    assert "tokenizer" in said and str(tmp_path) in said


def test_a_tokenizer_config_that_is_no_object_is_refused(tmp_path):
    assert "must hold a JSON object" in broken(tmp_path, lambda f: (f / "tokenizer_config.json").write_text("[]"))


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
              vit + "embeddings.position_embedding.weight": (4900, W),
              vit + "post_layernorm.weight": (W,), vit + "post_layernorm.bias": (W,)}
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
    old, write = {p.name: p.read_bytes() for p in tmp_path.iterdir()}, Path.write_bytes

    def full(path, content):
        write(path, content[:10])
        if path.name == "vocab.json":
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="vocab.json could not be written: .*No space left"):
        save_policy(policy, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def indexed(folder, change=lambda where, folder: None):
    """ema.safetensors as two shards, whose index is then changed."""
    cut(folder, "ema")
    index = folder / "ema.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    said = change(where, folder)
    index.write_text(json.dumps({"weight_map": where if said is None else said}))


def other_copy(where, folder):
    """A copy of a key, full of sevens, in the shard that the index does not name for it."""
    one, two = load_file(folder / "one.safetensors"), load_file(folder / "two.safetensors")
    save_file(two | {min(one): one[min(one)] * 0 + 7}, folder / "two.safetensors")
    save_file(one | {min(two): two[min(two)] * 0 + 7}, folder / "one.safetensors")


def test_a_key_is_read_from_the_shard_that_the_index_names(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "p")
    indexed(tmp_path / "p", other_copy)
    again, whole = load_policy(tmp_path / "p").state_dict(), load_policy(GOLDEN).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in whole.items())


def without(where, folder):
    del where["llm2vae.bias"]


def elsewhere(where, folder):
    where["llm2vae.bias"] = {"one.safetensors": "two.safetensors", "two.safetensors": "one.safetensors"}[where["llm2vae.bias"]]


def unlisted(where, folder):
    save_file(load_file(folder / "one.safetensors") | {"strange": torch.ones(1)}, folder / "one.safetensors")


@pytest.mark.parametrize("change, words", [
    (without, "llm2vae.bias"), (unlisted, "strange"), (elsewhere, "llm2vae.bias"),
    (lambda w, f: w.update({"llm2vae.bias": "shard0.safetensors"}), "shard0.safetensors"),
    (lambda w, f: w.update(strange="one.safetensors"), "strange"),
    (lambda w, f: w.update({"llm2vae.bias": "../p/one.safetensors"}), "beside it"),
    (lambda w, f: w.update({"llm2vae.bias": str(f / "one.safetensors")}), "beside it"),
    (lambda w, f: w.update({"llm2vae.bias": ".."}), "cannot be read"),
    (lambda w, f: w.update({"llm2vae.bias": ""}), "cannot be read"), (lambda w, f: w.update({"llm2vae.bias": 1}), "no weight_map"),
    (lambda w, f: list(w), "no weight_map"), (lambda w, f: {}, "holds no tensors")])
def test_shards_that_are_not_what_their_index_says_are_refused(tmp_path, change, words):
    assert words in broken(tmp_path, lambda f: indexed(f, change))


def test_files_without_tensors_are_refused(tmp_path):
    assert "ema.safetensors holds no tensors" in broken(tmp_path, lambda f: save_file({}, f / "ema.safetensors"))


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


def test_a_config_may_say_what_is_implemented_and_what_changes_nothing(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "p")
    set_json(tmp_path / "p" / "llm_config.json", head_dim=16, layer_types=["full_attention"] * 2, attention_dropout=0.1, sliding_window=7,
             attention_bias=True, rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, quantization_config=None)
    set_json(tmp_path / "p" / "vit_config.json", vision_use_head=False, attention_dropout=0.1, rope=False)
    set_json(tmp_path / "p" / "bagel_config.json", timestep_shift=3.0, vit_select_layer=-2)
    assert torch.equal(load_policy(tmp_path / "p").embed.weight, load_policy(GOLDEN).embed.weight)


@pytest.mark.parametrize("fields", [
    dict(rope_theta=3e4), dict(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 2e4}), dict(rope_theta=None),
    dict(rope_theta=2e4, rope_parameters={"rope_type": "default"}), dict(rope_theta=1e4, rope_parameters={"rope_theta": 2e4}),
    dict(rope_theta=1e4, rope_scaling={"type": "default"}), dict(rope_theta=None, rope_scaling={"type": "default", "rope_theta": 2e4})])
def test_the_rotation_that_is_not_refused_is_that_of_transformers(tmp_path, fields):
    shutil.copytree(GOLDEN, tmp_path / "p")
    path = tmp_path / "p" / "llm_config.json"
    path.write_text(json.dumps({k: v for k, v in (read_json(path) | fields).items() if v is not None}))
    theirs = Qwen2Config.from_dict(read_json(path)).rope_parameters["rope_theta"]
    try:
        assert load_policy(tmp_path / "p").config.rope_theta == theirs
    except ValueError as error:
        assert "must agree" in str(error) and len({theirs, fields["rope_theta"]}) == 2


# ---- numbers that are not finite ----


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("stem, key, dtype", [("ema", "llm2vae.bias", torch.float32),
("ema", "language_model.model.norm.weight", torch.bfloat16),
                                              ("ema", "vit_pos_embed.pos_embed", torch.float16),
                                              ("ae", "decoder.conv_out.bias", torch.float32)])
def test_weights_that_are_not_finite_are_refused_with_their_key(tmp_path, stem, key, dtype, number):
    def change(folder):
        tensors = {k: v.to(dtype) for k, v in load_file(folder / f"{stem}.safetensors").items()}
        tensors[key].view(-1)[-1] = number
        save_file(tensors, folder / f"{stem}.safetensors")
    said = broken(tmp_path, change)
    assert key in said and "not finite" in said and f"{stem}.safetensors" in said


def test_weights_that_overflow_the_dtype_that_is_asked_for_are_refused(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "p")
    edit(lambda t: t["llm2vae.bias"].fill_(1e5))(tmp_path / "p")
    load_policy(tmp_path / "p", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="llm2vae.bias holds numbers that are not finite in torch.float16"):
        load_policy(tmp_path / "p", dtype=torch.float16)


def test_adapters_that_are_not_finite_are_refused(tmp_path):
    save_adapters(add_lora(load_policy(GOLDEN), 2, 4.0), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[max(tensors)][0, 0] = float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="not finite") as error:
        load_policy(GOLDEN, adapter=tmp_path)
    assert max(tensors) in str(error.value)


# ---- adapters of peft ----


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder of adapters as peft writes one, with all that it writes beside."""
    folder = tmp_path_factory.mktemp("adapter")
    policy = add_lora(load_policy(GOLDEN), 4, 8.0)
    for m in adapters(policy).values():
        torch.nn.init.normal_(m.B, std=0.1)
    save_adapters(policy, folder)
    set_json(folder / "adapter_config.json", alora_invocation_tokens=None, alpha_pattern={}, auto_mapping=None,
             base_model_name_or_path="BAGEL", corda_config=None, eva_config=None, exclude_modules=None, inference_mode=True,
             init_lora_weights=True, layer_replication=None,
             layers_pattern=None, layers_to_transform=None, loftq_config={}, lora_bias=False, lora_dropout=0.05, megatron_config=None,
             megatron_core="megatron.core", modules_to_save=None, peft_version="0.18.0", qalora_group_size=16, rank_pattern={},
             revision=None, target_parameters=None, task_type="CAUSAL_LM", trainable_token_indices=None, use_dora=False,
             use_qalora=False, use_rslora=False)
    return folder


def put_on(folder, tmp_path, **fields):
    shutil.copytree(folder, tmp_path / "a")
    set_json(tmp_path / "a" / "adapter_config.json", **fields)
    return load_adapters(load_policy(GOLDEN), tmp_path / "a")


@pytest.mark.parametrize("fields, scale", [
    ({}, 2.0), ({"use_rslora": True}, 4.0), ({"use_rslora": True, "lora_alpha": 3}, 1.5), ({"use_rslora": None}, 2.0)])
def test_adapters_have_the_strength_that_peft_gives_them_and_keep_it(adapter, tmp_path, fields, scale):
    policy = put_on(adapter, tmp_path, **fields)
    assert {m.alpha / m.rank for m in adapters(policy).values()} == {scale}
    save_adapters(policy, tmp_path / "again")
    assert {m.alpha / m.rank for m in adapters(load_policy(GOLDEN, adapter=tmp_path / "again")).values()} == {scale}


@pytest.mark.parametrize("field, value", [
    ("rank_pattern", {"q_proj": 8}), ("alpha_pattern", {".*q_proj": 8}), ("use_dora", True), ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"), ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"), ("fan_in_fan_out", True), ("bias", "all"), ("bias", "lora_only"), ("modules_to_save", ["lm_head"]),
    ("layers_to_transform", [0]), ("layers_to_transform", 0), ("lora_bias", True), ("peft_type", "ADALORA"),
    ("trainable_token_indices", [1]),
    ("use_qalora", True), ("target_parameters", ["q.weight"]), ("layer_replication", [[0, 1]]), ("alora_invocation_tokens", [1]),
    ("megatron_config", {"a": 1}), ("use_bdlora", {"nblocks": 2}), ("kasa_config", {"beta": 1.0}), ("arrow_config", {"top_k": 3}),
    ("of_tomorrow", True), ("target_modules", ["q_proj"]), ("target_modules", ".*q_proj"), ("target_modules", []),
    ("target_modules", "("),
    ("target_modules", 3), ("exclude_modules", ["k_proj"]), ("exclude_modules", ".*layers.0.*"), ("r", 0), ("r", 4.0), ("r", True),
    ("r", None),
    ("r", 2**40), ("lora_alpha", None), ("lora_alpha", float("nan")), ("lora_alpha", "8")])
def test_an_adapter_config_that_changes_what_is_computed_is_refused(adapter, tmp_path, field, value):
    with pytest.raises(ValueError, match=field) as error:
        put_on(adapter, tmp_path, **{field: value})
    assert "adapter_config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field, value", [
    ("target_modules", "all-linear"), ("target_modules", r".*layers\.\d+\.(self_attn|mlp).*_proj.*"), ("init_lora_weights", "gaussian"),
    ("init_lora_weights", False), ("init_lora_weights", "eva"), ("lora_dropout", 0.5), ("exclude_modules", ["vision_model"]),
    ("of_tomorrow", None)])
def test_an_adapter_config_may_say_what_changes_nothing(adapter, tmp_path, field, value):
    plain, other = load_policy(GOLDEN, adapter=adapter), put_on(adapter, tmp_path, **{field: value})
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in plain.state_dict().items())


# ---- encodings, modes, disks ----


def test_a_byte_order_mark_before_json_is_no_fault(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "p")
    indexed(tmp_path / "p")
    for name in ("llm_config.json", "bagel_config.json", "ema.safetensors.index.json"):
        path = tmp_path / "p" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert torch.equal(load_policy(tmp_path / "p").embed.weight, load_policy(GOLDEN).embed.weight)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"9" * 5000, b"\xff\xfe{}", b"", b'{"a":'])
def test_what_is_not_json_is_said_in_one_line(tmp_path, content):
    assert "llm_config.json is not JSON" in broken(tmp_path, lambda f: (f / "llm_config.json").write_bytes(content))


def test_files_are_utf8_whatever_the_locale(tmp_path):
    """vocab.json as Qwen publishes it, raw UTF-8, and a note in a config that is not ASCII, in and out."""
    shutil.copytree(GOLDEN, tmp_path / "p")
    for name, fields in (("vocab.json", {}), ("bagel_config.json", {"note": "Qualität"})):
        path = tmp_path / "p" / name
        path.write_text(json.dumps(read_json(path) | fields, ensure_ascii=False), encoding="utf-8")
    code = "import sys; from checkpoint import load_policy, save_policy; save_policy(load_policy(sys.argv[1]), sys.argv[2])"
    subprocess.run([sys.executable, "-c", code, tmp_path / "p", tmp_path / "q"], cwd=ROOT, check=True,
                   env=os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"))
    assert read_json(tmp_path / "q" / "bagel_config.json")["note"] == "Qualität"
    assert (tmp_path / "q" / "vocab.json").read_bytes() == (tmp_path / "p" / "vocab.json").read_bytes()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o007])
def test_all_files_have_the_mode_of_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        policy = add_lora(load_policy(GOLDEN), 2, 4.0)
        save_policy(policy, tmp_path / "policy")
        save_adapters(policy, tmp_path / "adapter")
        save_checkpoint(tmp_path, {"a": torch.ones(2)}, 3)
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(p.stat().st_mode) & ~0o111 if p.is_dir() else stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("error", [SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
                                   PermissionError(13, "Permission denied"), OSError(28, "No space left on device")])
def test_whatever_a_failed_write_raises_is_an_oserror_that_names_the_file(tmp_path, monkeypatch, error):
    def fail(tensors, target, metadata=None):
        raise error
    monkeypatch.setattr("checkpoint.save_file", fail)
    with pytest.raises(OSError, match="w.safetensors could not be written: .*(No space|denied)"):
        save_tensors({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "w.safetensors" / "full").mkdir(parents=True)
    for path in (tmp_path / "file" / "w.safetensors", tmp_path / "nowhere" / "w.safetensors", tmp_path / "w.safetensors"):
        for write in (lambda: save_tensors({"a": torch.ones(2)}, path), lambda: write_atomic(path, b"a")):
            with pytest.raises(OSError, match="could not be written") as error:
                write()
            assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_save_clears_away_what_a_killed_one_left(tmp_path):
    code = ("import os, sys, checkpoint, torch\nfrom pathlib import Path\n"
            "os.replace = lambda *a: os._exit(9)\ncheckpoint.save_tensors({'a': torch.ones(3)}, Path(sys.argv[1]))")
    path = tmp_path / "w.safetensors"
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT).returncode == 9
    assert [p.name for p in tmp_path.iterdir()] != []
    save_tensors({"a": torch.zeros(3)}, path)
    assert list(tmp_path.iterdir()) == [path] and not load_file(path)["a"].any()
    (tmp_path / "w.safetensors.tmp").write_bytes(b"half")      # as another version of this project left it
    save_tensors({"a": torch.ones(3)}, path)
    assert list(tmp_path.iterdir()) == [path] and load_file(path)["a"].all()


def test_a_folder_whose_name_is_not_utf8_is_read_or_refused_in_one_line(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/p\xff"))
    shutil.copytree(GOLDEN, folder)
    with pytest.raises((ValueError, OSError)) as error:
        load_policy(folder)
    assert "\n" not in str(error.value)


# ---- the tokenizer of an export ----


@pytest.mark.parametrize("again", [False, True])
def test_an_export_keeps_the_tokenizer_files_of_its_source_byte_for_byte(tmp_path, again):
    shutil.copytree(GOLDEN, tmp_path / "p")
    (tmp_path / "p" / "special_tokens_map.json").write_text('{"eos_token":   "<|im_end|>"}')
    names = ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
    old = {n: (tmp_path / "p" / n).read_bytes() for n in names}
    target = tmp_path / ("p" if again else "q")
    save_policy(load_policy(tmp_path / "p"), target)
    assert {n: (target / n).read_bytes() for n in names} == old and not (target / "tokenizer.json").exists()
    assert not [p for p in target.iterdir() if p.is_dir() or ".tmp" in p.name]


def test_an_export_over_a_folder_with_another_tokenizer_leaves_none_of_it(tmp_path):
    shutil.copytree(ROOT / "toy" / "policy", tmp_path / "p")
    save_policy(load_policy(GOLDEN), tmp_path / "p")
    assert not (tmp_path / "p" / "tokenizer.json").exists()
    assert load_policy(tmp_path / "p").tokenizer.get_vocab() == load_policy(GOLDEN).tokenizer.get_vocab()


def test_a_policy_that_came_from_no_folder_writes_its_tokenizer(tmp_path):
    policy = load_policy(ROOT / "toy" / "policy")
    policy.tokenizer.name_or_path = ""
    save_policy(policy, tmp_path)
    assert load_policy(tmp_path).tokenizer.get_vocab() == policy.tokenizer.get_vocab()


# ---- what a run keeps ----


def kept():
    return {"policy.a": torch.ones(2, 3), "average.a": torch.ones(2, 3), "adamw.step.a": torch.tensor(1.0)}


def written(out, tensors, kind):
    """A run's checkpoint of either kind in the folder `out`."""
    out.mkdir(exist_ok=True)
    if kind == "file":
        save_tensors(tensors, out / "checkpoint.safetensors")
    else:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(out / "checkpoint")), no_dist=True)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_comes_back(tmp_path, kind):
    tensors = {k: v * 2 for k, v in kept().items()}
    written(tmp_path, tensors | {"step": torch.tensor(7)}, kind)
    into = kept()
    assert load_checkpoint(tmp_path, into) == 7 and all(torch.equal(v, tensors[k]) for k, v in into.items())


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("change, words", [
    ({"policy.a": torch.ones(2, 3).bfloat16()}, "policy.a has shape .*bfloat16"), ({"policy.a": torch.ones(2, 3).double()}, "float64"),
    ({"adamw.step.a": torch.tensor(1)}, "adamw.step.a has shape"), ({"average.a": torch.ones(3, 2)}, r"average.a has shape \(\(3, 2\)"),
    ({"step": torch.tensor(-1)}, "step is -1"), ({"step": torch.tensor(2.5)}, "step has shape"),
    ({"step": torch.tensor([1, 2])}, "step has shape"),
    ({"step": torch.tensor(1, dtype=torch.int32)}, "step has shape"), ({"step": torch.tensor(True)}, "step has shape")])
def test_a_checkpoint_that_is_not_of_the_run_is_refused_before_anything_changes(tmp_path, kind, change, words):
    written(tmp_path, {k: v * 2 for k, v in kept().items()} | {"step": torch.tensor(7)} | change, kind)
    into = kept()
    with pytest.raises(ValueError, match=words) as error:
        load_checkpoint(tmp_path, into)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert all(torch.equal(v, into[k]) for k, v in kept().items())


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("key", ["policy.a", "average.a", "adamw.step.a"])
def test_a_checkpoint_that_is_not_finite_is_refused(tmp_path, kind, key):
    tensors = {k: v * 2 for k, v in kept().items()}
    tensors[key].view(-1)[-1] = float("nan")
    written(tmp_path, tensors | {"step": torch.tensor(7)}, kind)
    into = kept()
    with pytest.raises(ValueError, match=f"{key} holds numbers that are not finite"):
        load_checkpoint(tmp_path, into)
    assert kind == "folder" or all(torch.equal(v, into[k]) for k, v in kept().items())


def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path):
    written(tmp_path, kept() | {"step": torch.tensor(7)}, "file")
    whole = (tmp_path / "checkpoint.safetensors").read_bytes()
    for content in (b"", b"junk", whole[:40], whole[:-1]):
        (tmp_path / "checkpoint.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint.safetensors is not a whole checkpoint") as error:
            load_checkpoint(tmp_path, kept())
        assert "\n" not in str(error.value)


def test_a_folder_that_lacks_a_part_of_a_tensor_is_refused(tmp_path):
    """As where the file of one of three ranks was not copied; nothing else says so, and the run's own numbers would stay in the hole."""
    (tmp_path / "checkpoint").mkdir()
    for i in (0, 2):
        tensors = {"policy.a": torch.full((1, 3), float(i))} | ({"step": torch.tensor(7)} if not i else {})
        about = {k: {"saved_offsets": [i, 0] if v.ndim else []} for k, v in tensors.items()}
        save_file(tensors, tmp_path / "checkpoint" / f"shard-{i}.safetensors", metadata={"DCP_SHARDING_INFO": json.dumps(about)})
    with pytest.raises(ValueError, match="parts of policy.a are missing"):
        load_checkpoint(tmp_path, {"policy.a": torch.zeros(3, 3)})


def test_of_an_old_and_a_new_folder_the_old_one_may_be_half_deleted(tmp_path):
    for name, step in (("old", 1), ("checkpoint", 7)):
        written(tmp_path / name, kept() | {"step": torch.tensor(step)}, "folder")
    shutil.copytree(tmp_path / "checkpoint" / "checkpoint", tmp_path / "run" / "checkpoint")
    shutil.copytree(tmp_path / "old" / "checkpoint", tmp_path / "run" / "checkpoint.old")
    for file in (tmp_path / "run" / "checkpoint.old").iterdir():
        file.unlink()
    assert load_checkpoint(tmp_path / "run", kept()) == 7
