"""Weights in and out: what is saved is what is read; what does not fit is refused in one line."""

import json
import os
import re
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

from policy import PolicyConfig
from studies.bench import release_on_meta
from support import checkpoint
from support.checkpoint import (
    load_adapters, load_policy, release_ae_name, release_name, save_adapters, save_policy,
    save_tensors)
from support.disk import one_line_error, read_json
from support.lora import adapters, add_lora
from support.run import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "bagel_tiny"
SIZE = (16, 24)                                 # 2 x 3 latent tokens of 8 pixels
BIAS = "llm2vae.bias"                           # a small tensor of the released layout


@pytest.fixture
def folder(tmp_path):
    """A policy folder that a test may change."""
    return shutil.copytree(GOLDEN, tmp_path / "p", copy_function=shutil.copyfile)


def set_json(path, **fields):
    path.write_text(json.dumps(read_json(path, {}) | fields))


def edit_tensors(folder, change, stem="ema"):
    """Apply change(tensors) to a safetensors file."""
    tensors = load_file(folder / f"{stem}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"{stem}.safetensors")


def cut(folder, stem, names=("one.safetensors", "two.safetensors")):
    """stem.safetensors as two shards and their index; returns key -> shard."""
    tensors, where = load_file(folder / f"{stem}.safetensors"), {}
    (folder / f"{stem}.safetensors").unlink()
    for i, name in enumerate(names):
        keys = sorted(tensors)[i::2]
        save_file({key: tensors[key] for key in keys}, folder / name)
        where |= {key: name for key in keys}
    set_json(folder / f"{stem}.safetensors.index.json", weight_map=where)
    return where


def refusal(folder):
    """The one line that names what is wrong with a policy folder."""
    with pytest.raises((ValueError, OSError)) as error:
        load_policy(folder)
    said = str(error.value)
    assert "\n" not in said
    assert str(folder) in said or "_config.json" in said
    return said


def same_weights(ours, theirs):
    theirs = theirs.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in ours.state_dict().items())


# ---- there and back ----


def test_a_saved_folder_has_the_released_layout_bit_for_bit(tmp_path):
    save_policy(load_policy(GOLDEN), tmp_path)
    for name in ("ema.safetensors", "ae.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(GOLDEN / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("llm_config.json", "vit_config.json", "ae_config.json"):
        assert read_json(tmp_path / name) == read_json(GOLDEN / name)


def test_saving_merges_adapters_and_loading_gives_the_same_function(tmp_path):
    policy = add_lora(load_policy(GOLDEN), rank=2, alpha=4.0)
    for module in adapters(policy).values():
        torch.nn.init.normal_(module.B, std=0.1)
    save_policy(policy, tmp_path)
    x, tokens = torch.randn(1, 6, 16), torch.arange(5)[None]
    with torch.no_grad():
        ours, theirs = (
            p.velocity(p.append_text(p.empty(1), tokens)[1], x, 0.3, SIZE)
            for p in (policy, load_policy(tmp_path))
        )
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_loaded_autoencoder_is_frozen():
    assert not any(p.requires_grad for p in load_policy(GOLDEN).autoencoder.parameters())


def test_a_file_of_two_dtypes_becomes_one_of_its_embedding(folder):
    edit_tensors(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items() if k != BIAS}))
    policy = load_policy(folder)
    assert policy.stored == policy.latent_out.bias.dtype == torch.bfloat16
    policy.velocity(policy.empty(1), torch.zeros(1, 6, 16), 0.5, SIZE)


def test_the_release_has_the_published_keys_and_shapes():
    """The 7B on the meta device: the keys that BAGEL's own code gave the golden folder, at its sizes."""
    policy = release_on_meta(load_policy(GOLDEN).tokenizer)
    state = {
        release_name(name): tuple(value.shape)
        for name, value in policy.state_dict().items()
        if not name.startswith("autoencoder.")
    }
    language = {64: 3584, 32: 512, 48: 18944, 16: 128, 293: 152064}     # size there -> size of the 7B
    others = {64: 3584, 32: 1152, 48: 4304, 16: 64, 256: 256, 300: 588, 25: 4900, 36: 4096}
    published = {}
    for key, value in load_file(GOLDEN / "ema.safetensors").items():
        sizes = language if key.startswith("language_model.") else others
        published[of_any_layer(key)] = tuple(sizes[n] for n in value.shape)
    assert {of_any_layer(key): shape for key, shape in state.items()} == published
    assert len(state) == 1223
    assert sum(torch.Size(shape).numel() for shape in state.values()) == 14_607_260_128
    ae = {release_ae_name(key, 4) for key in policy.autoencoder.state_dict()}
    assert len(ae) == 244
    assert {"decoder.up.3.block.0.conv1.weight", "encoder.down.1.block.0.nin_shortcut.weight"} <= ae
    assert "encoder.mid.attn_1.proj_out.bias" in ae


def of_any_layer(key):
    return re.sub(r"layers\.\d+", "layers.n", key)


def test_fields_that_a_release_leaves_out_take_their_classes_defaults(folder):
    llm, vit = read_json(folder / "llm_config.json"), read_json(folder / "vit_config.json")
    llm["rope_parameters"] = {"rope_theta": llm.pop("rope_theta")}
    del (
        llm["rms_norm_eps"], llm["tie_word_embeddings"], vit["num_channels"], vit["layer_norm_eps"],
        vit["hidden_act"])
    (folder / "llm_config.json").write_text(json.dumps(llm))
    (folder / "vit_config.json").write_text(json.dumps(vit))
    pixels, logits = torch.rand(1, 3, 20, 30), []
    for policy in (load_policy(GOLDEN), load_policy(folder)):
        context = policy.append_image(policy.empty(1), pixels=pixels)
        logits.append(policy.append_text(context, torch.arange(5)[None])[0])
    assert torch.equal(*logits)


def test_the_resize_rules_of_the_release_need_no_field():
    release = PolicyConfig(dict(hidden_size=8, num_attention_heads=1), dict(patch_size=14))
    assert release.vae_resize == (1024, 512, 16)
    assert release.vit_resize == (980, 224, 14)


# ---- shards of files ----


def test_a_save_over_a_sharded_folder_is_what_is_read_again(folder):
    cut(folder, "ema")
    cut(folder, "ae", ("three.safetensors", "four.safetensors"))
    policy = load_policy(folder)
    assert same_weights(policy, load_policy(GOLDEN))
    with torch.no_grad():
        policy.embed.weight += 1
        policy.autoencoder.decoder.conv_in.bias += 1
    save_policy(policy, folder)
    assert same_weights(policy, load_policy(folder))


def test_a_damaged_old_index_does_not_stop_a_save(tmp_path):
    (tmp_path / "ema.safetensors.index.json").write_text("[")
    policy = load_policy(GOLDEN)
    save_policy(policy, tmp_path)
    assert same_weights(policy, load_policy(tmp_path))


def test_a_key_is_read_from_the_shard_that_the_index_names(folder):
    """A stale copy in another shard is passed over."""
    where = cut(folder, "ema")
    other = load_file(folder / "two.safetensors")
    stale = {key: torch.ones(3) for key, name in where.items() if name == "one.safetensors"}
    save_file(other | stale, folder / "two.safetensors")
    assert same_weights(load_policy(folder), load_policy(GOLDEN))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda where: where.pop(BIAS), BIAS),
        (lambda where: where.update(strange="one.safetensors"), "strange"),
        (
            lambda where: where.update({BIAS: "three.safetensors"}),
            "three.safetensors cannot be read"),
        (lambda where: where.update({BIAS: 1}), "cannot be followed"),
        (lambda where: where.clear(), "keys missing"),
    ],
)
def test_shards_that_are_not_what_their_index_says_are_refused(folder, change, words):
    where = cut(folder, "ema")
    change(where)
    set_json(folder / "ema.safetensors.index.json", weight_map=where)
    assert words in refusal(folder)


# ---- what is refused ----


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_policy(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "file, field, value",
    [
        ("llm", "rope_scaling", {"type": "linear"}),
        ("llm", "rope_scaling", {"type": "default", "mrope_section": [2, 3, 3]}),
        ("llm", "rope_parameters", [1]),
        ("llm", "rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}),
        ("llm", "tie_word_embeddings", True), ("llm", "attention_bias", False),
        ("llm", "mlp_bias", True), ("llm", "hidden_act", "gelu"), ("vit", "hidden_act", "relu"),
        ("bagel", "connector_act", "gelu"), ("llm", "quantization_config", {"bits": 4}),
        ("llm", "num_attention_heads", 3), ("llm", "num_key_value_heads", 3),
        ("llm", "use_sliding_window", True),
        ("llm", "model_type", "qwen3"), ("vit", "rope", True), ("bagel", "vit_select_layer", -1),
        ("llm", "num_attention_heads", 0), ("llm", "hidden_size", "wide"),
        ("llm", "vocab_size", 200), ("ae", "ch_mult", [])],
)
def test_a_config_that_changes_what_is_computed_is_refused(folder, file, field, value):
    set_json(folder / f"{file}_config.json", **{field: value})
    assert "config" in refusal(folder)


def test_a_config_may_say_what_is_implemented_and_what_changes_nothing(folder):
    set_json(
        folder / "llm_config.json", head_dim=16, layer_types=["full_attention"] * 2,
        attention_dropout=0.1, attention_bias=True, sliding_window=7, rope_scaling=None,
        quantization_config=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    set_json(folder / "vit_config.json", vision_use_head=False, attention_dropout=0.1, rope=False)
    set_json(folder / "bagel_config.json", timestep_shift=3.0, vit_select_layer=-2)
    assert same_weights(load_policy(folder), load_policy(GOLDEN))


@pytest.mark.parametrize(
    "fields",
    [
        dict(rope_theta=3e4), dict(rope_theta=None),
        dict(rope_theta=2e4, rope_parameters={"rope_type": "default"}),
        dict(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 2e4}),
        dict(rope_theta=1e4, rope_parameters={"rope_theta": 2e4}),
        dict(rope_theta=1e4, rope_scaling={"type": "default"}),
        dict(rope_theta=None, rope_scaling={"type": "default", "rope_theta": 2e4})],
)
def test_a_rotation_is_that_of_transformers_or_is_refused(folder, fields):
    path = folder / "llm_config.json"
    path.write_text(
        json.dumps({k: v for k, v in (read_json(path) | fields).items() if v is not None}))
    theirs = Qwen2Config.from_dict(read_json(path)).rope_parameters["rope_theta"]
    try:
        assert load_policy(folder).config.rope_theta == theirs
    except ValueError as error:
        assert "only the default rotation" in str(error)
        assert theirs != fields["rope_theta"]


def without_config(folder):
    (folder / "bagel_config.json").unlink()


def pickle_weights(folder):
    (folder / "ema.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder):
    path = folder / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    "change, words",
    [
        (without_config, "the config says"),
        (pickle_weights, "pickled weights are not read"),
        (truncate, "download it again"),
        (lambda folder: save_file({}, folder / "ema.safetensors"), "keys missing"),
        (lambda folder: edit_tensors(folder, lambda t: t.pop(BIAS)), BIAS),
        (
            lambda folder: edit_tensors(folder, lambda t: t.update(strange=torch.zeros(1))),
            "strange"),
        (lambda folder: edit_tensors(folder, lambda t: t.update({BIAS: torch.zeros(3)})), BIAS),
        (
            lambda folder: edit_tensors(
                folder, lambda t: t.update({BIAS: torch.zeros(16, dtype=torch.long)})),
            "dtype",
        ),
    ],
)
def test_weights_that_are_not_the_configs_are_refused_by_name(folder, change, words):
    change(folder)
    assert words in refusal(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "stem, key, dtype",
    [
        ("ema", BIAS, torch.float32), ("ema", "language_model.model.norm.weight", torch.bfloat16),
        ("ae", "decoder.conv_out.bias", torch.float16)],
)
def test_weights_that_are_not_finite_are_refused_with_their_key(folder, stem, key, dtype, number):
    def spoil(tensors):
        tensors |= {name: value.to(dtype) for name, value in tensors.items()}
        tensors[key].view(-1)[-1] = number

    edit_tensors(folder, spoil, stem)
    assert f"{stem}.safetensors: {key} holds numbers that are not finite" in refusal(folder)


def test_weights_that_overflow_the_dtype_that_is_asked_for_are_refused(folder):
    edit_tensors(folder, lambda tensors: tensors[BIAS].fill_(1e5))
    load_policy(folder, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=f"{BIAS} holds numbers that are not finite in torch.float16"):
        load_policy(folder, dtype=torch.float16)


# ---- the tokenizer ----


@pytest.mark.parametrize(
    "name, content",
    [
        ("vocab.json", b'{"a": "b"}'),
        ("vocab.json", b'{"a": '),
        ("merges.txt", b"\xff\xfe"),
        ("merges.txt", b"#version: 0.2\nqq zz\n"),
        ("tokenizer.json", b"null"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"eos_token": 3}'),
        ("tokenizer_config.json", b""),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 3}}'),
    ],
)
def test_damaged_tokenizer_files_are_refused_whatever_the_libraries_raise(folder, name, content):
    """tokenizers raises Exception itself, transformers half a dozen kinds."""
    (folder / name).write_bytes(content)
    assert "tokenizer" in refusal(folder)


def test_a_tokenizer_that_is_missing_is_refused(folder):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "tokenizer files of" in refusal(folder)


def test_a_tokenizer_without_the_markers_is_refused(folder):
    added = read_json(folder / "tokenizer_config.json")["added_tokens_decoder"]
    kept = {place: token for place, token in added.items() if "vision" not in token["content"]}
    set_json(
        folder / "tokenizer_config.json", added_tokens_decoder=kept, additional_special_tokens=[])
    assert "<|vision_start|>" in refusal(folder)


def test_an_export_keeps_the_tokenizer_files_of_its_source_byte_for_byte(folder, tmp_path):
    (folder / "special_tokens_map.json").write_text('{"eos_token":   "<|im_end|>"}')
    names = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"}
    old = {name: (folder / name).read_bytes() for name in names}
    for target in (tmp_path / "q", folder):
        save_policy(load_policy(folder), target)
        assert {name: (target / name).read_bytes() for name in names} == old
        assert not (target / "tokenizer.json").exists()


def test_an_export_over_a_folder_with_another_tokenizer_leaves_none_of_it(tmp_path):
    shutil.copytree(ROOT / "toy" / "policy", tmp_path / "p")
    save_policy(load_policy(GOLDEN), tmp_path / "p")
    assert not (tmp_path / "p" / "tokenizer.json").exists()
    assert (
        load_policy(tmp_path / "p").tokenizer.get_vocab()
        == load_policy(GOLDEN).tokenizer.get_vocab()
    )


def test_a_policy_that_came_from_no_folder_writes_its_tokenizer(tmp_path):
    policy = load_policy(ROOT / "toy" / "policy")
    policy.tokenizer.name_or_path = ""
    save_policy(policy, tmp_path)
    assert load_policy(tmp_path).tokenizer.get_vocab() == policy.tokenizer.get_vocab()


# ---- adapters of peft ----


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder of adapters as peft writes one, with all the fields that it writes."""
    folder = tmp_path_factory.mktemp("adapter")
    policy = add_lora(load_policy(GOLDEN), 4, 8.0)
    for module in adapters(policy).values():
        torch.nn.init.normal_(module.B, std=0.1)
    save_adapters(policy, folder)
    empty = (
        "alora_invocation_tokens auto_mapping corda_config eva_config exclude_modules "
        "layer_replication layers_pattern "
        "layers_to_transform megatron_config modules_to_save revision target_parameters "
        "trainable_token_indices"
    ).split()
    set_json(
        folder / "adapter_config.json", **dict.fromkeys(empty), alpha_pattern={}, rank_pattern={},
        loftq_config={}, base_model_name_or_path="BAGEL", inference_mode=True,
        init_lora_weights=True, lora_bias=False, lora_dropout=0.05, megatron_core="megatron.core",
        peft_version="0.18.0", qalora_group_size=16, task_type="CAUSAL_LM", use_dora=False,
        use_qalora=False, use_rslora=False)
    return folder


def put_on(adapter, tmp_path, **fields):
    shutil.copytree(adapter, tmp_path / "a")
    set_json(tmp_path / "a" / "adapter_config.json", **fields)
    return load_adapters(load_policy(GOLDEN), tmp_path / "a")


@pytest.mark.parametrize(
    "fields, scale",
    [({}, 2.0), ({"lora_alpha": 3}, 0.75), ({"use_rslora": None}, 2.0)],
)
def test_adapters_have_the_strength_that_peft_gives_them_and_keep_it(
    adapter, tmp_path, fields, scale
):
    policy = put_on(adapter, tmp_path, **fields)
    save_adapters(policy, tmp_path / "again")
    for each in (policy, load_policy(GOLDEN, adapter=tmp_path / "again")):
        assert {module.alpha / module.rank for module in adapters(each).values()} == {scale}


@pytest.mark.parametrize(
    "field, value",
    [
        ("rank_pattern", {"q_proj": 8}), ("use_dora", True), ("use_rslora", True),
        ("init_lora_weights", "pissa_niter_4"),
        ("fan_in_fan_out", True), ("bias", "all"), ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]), ("peft_type", "ADALORA"), ("of_tomorrow", True), ("r", None),
        ("lora_alpha", None)],
)
def test_an_adapter_config_that_changes_what_is_computed_is_refused(
    adapter, tmp_path, field, value
):
    with pytest.raises(ValueError, match="adapter_config.json is not of plain LoRA: ") as error:
        put_on(adapter, tmp_path, **{field: value})
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_rank_than_its_config_is_refused(adapter, tmp_path):
    with pytest.raises(ValueError, match="has shape"):
        put_on(adapter, tmp_path, r=8)


def test_an_adapter_config_may_say_what_changes_nothing(adapter, tmp_path):
    changed = put_on(
        adapter, tmp_path, target_modules="all-linear", init_lora_weights="gaussian",
        lora_dropout=0.5, exclude_modules=["vision_model"], of_tomorrow=None)
    assert same_weights(changed, load_policy(GOLDEN, adapter=adapter))


def test_adapters_that_are_not_finite_are_refused(tmp_path):
    save_adapters(add_lora(load_policy(GOLDEN), 2, 4.0), tmp_path)
    edit_tensors(
        tmp_path, lambda tensors: tensors[max(tensors)].fill_(float("nan")), "adapter_model")
    with pytest.raises(ValueError, match="_proj.*not finite"):
        load_policy(GOLDEN, adapter=tmp_path)


# ---- encodings, modes, disks ----


def test_a_byte_order_mark_before_json_is_no_fault(folder):
    cut(folder, "ema")
    for name in ("llm_config.json", "bagel_config.json", "ema.safetensors.index.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert same_weights(load_policy(folder), load_policy(GOLDEN))


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe{}", b"", b'{"a":'])
def test_what_is_not_json_is_refused_in_one_line(folder, content):
    (folder / "llm_config.json").write_bytes(content)
    assert "llm_config.json is not JSON" in refusal(folder)


def test_an_error_that_is_no_librarys_keeps_its_kind():
    for error in (torch.OutOfMemoryError("full"), KeyboardInterrupt(), NameError("x")):
        with pytest.raises(type(error)), one_line_error("a file"):
            raise error


@pytest.mark.skipif(
    not torch.__file__.isascii(), reason="PyTorch cannot be imported from its own folder under LC_ALL=C")
def test_files_are_utf8_whatever_the_locale(folder, tmp_path):
    """vocab.json as Qwen publishes it, a note in a config, and a tag of a prompt."""
    for name, fields in (("vocab.json", {}), ("bagel_config.json", {"note": "Qualität"})):
        text = json.dumps(read_json(folder / name) | fields, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a red circle", "tag": "größe"}\n', encoding="utf-8")
    code = (
        "import sys; from support.checkpoint import load_policy, save_policy; from "
        "support.rows import read_prompts; "
        "save_policy(load_policy(sys.argv[1]), sys.argv[2]); "
        "sys.exit(len(read_prompts(sys.argv[3])[0]['tag']) != 5)"
    )
    subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path / "q", prompts], cwd=ROOT, check=True,
        env=os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"))
    assert read_json(tmp_path / "q" / "bagel_config.json")["note"] == "Qualität"
    assert (tmp_path / "q" / "vocab.json").read_bytes() == (folder / "vocab.json").read_bytes()


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_all_files_have_the_mode_of_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        policy = add_lora(load_policy(GOLDEN), 2, 4.0)
        save_policy(policy, tmp_path / "policy")
        save_adapters(policy, tmp_path / "adapter")
        save_checkpoint(tmp_path, {"a": torch.ones(2)}, 3)
    finally:
        os.umask(old)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        OSError(28, "No space left on device"),
    ],
)
def test_a_failed_write_is_an_oserror_that_names_the_file_and_keeps_the_old_one(
    tmp_path, monkeypatch, error
):
    path = tmp_path / "w.safetensors"
    save_tensors({"a": torch.ones(2)}, path)

    def full(tensors, target, metadata=None):
        Path(target).write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="w.safetensors could not be written: .*No space"):
        save_tensors({"a": torch.zeros(2)}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert load_file(path)["a"].all()


def test_an_export_that_fails_half_way_keeps_what_it_has_not_replaced(folder, monkeypatch):
    """Weights go first, the tokenizer last: after any failure the folder loads."""
    policy, write, old = load_policy(folder), Path.write_bytes, (folder / "vocab.json").read_bytes()

    def full(path, content):
        write(path, content[:10])
        if path.name == "vocab.json":
            raise OSError(28, "No space left on device")
        return write(path, content)

    with torch.no_grad():
        policy.embed.weight += 1
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="vocab.json could not be written: .*No space left"):
        save_policy(policy, folder)
    assert (folder / "vocab.json").read_bytes() == old
    assert same_weights(policy, load_policy(folder))


def test_a_save_clears_away_what_a_killed_one_left(tmp_path):
    path = tmp_path / "w.safetensors"
    code = (
        "import os, sys, torch\nfrom pathlib import Path\nfrom support.checkpoint import "
        "save_tensors\n"
        "os.replace = lambda *a: os._exit(9)\nsave_tensors({'a': torch.ones(3)}, "
        "Path(sys.argv[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, path], cwd=ROOT).returncode == 9
    assert list(tmp_path.iterdir()) != []
    save_tensors({"a": torch.zeros(3)}, path)
    assert list(tmp_path.iterdir()) == [path]
    assert not load_file(path)["a"].any()


# ---- what a run keeps ----


def run_tensors(scale=1.0):
    return {
        "policy.a": scale * torch.ones(2, 3), "average.a": scale * torch.ones(2, 3),
        "adamw.step.a": torch.tensor(scale)}


def write_checkpoint(out, tensors, kind):
    """A run's checkpoint: one file, or the folder that sharded ranks write."""
    out.mkdir(exist_ok=True)
    tensors = {"step": torch.tensor(7)} | tensors
    if kind == "file":
        save_tensors(tensors, out / "checkpoint.safetensors")
    else:
        dcp.save(
            tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(out / "checkpoint")),
            no_dist=True)


def is_unchanged(tensors):
    return all(torch.equal(value, tensors[key]) for key, value in run_tensors().items())


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize(
    "change, words",
    [
        ({"policy.a": torch.ones(2, 3).bfloat16()}, "policy.a has shape .*bfloat16"),
        ({"average.a": torch.ones(3, 2)}, r"average.a has shape \(\(3, 2\)"),
        ({"adamw.step.a": torch.tensor(1)}, "adamw.step.a has shape"),
        ({"step": torch.tensor(2.5)}, "step has shape"),
        ({"more": torch.ones(1)}, r"more has shape \(\(1,\), torch.float32\), the policy None"),
    ],
)
def test_a_checkpoint_that_is_not_of_the_run_is_refused_before_anything_changes(
    tmp_path, kind, change, words
):
    write_checkpoint(tmp_path, run_tensors(2.0) | change, kind)
    into = run_tensors()
    with pytest.raises(ValueError, match=words) as error:
        load_checkpoint(tmp_path, into)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert is_unchanged(into)


@pytest.mark.parametrize("end", [0, 40, -1])
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path, end):
    write_checkpoint(tmp_path, run_tensors(), "file")
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(
        ValueError, match="checkpoint.safetensors is not a whole checkpoint") as error:
        load_checkpoint(tmp_path, run_tensors())
    assert "\n" not in str(error.value)


def test_a_folder_that_lacks_a_part_of_a_tensor_is_refused(tmp_path):
    """As if the file of one of three ranks was not copied."""
    (tmp_path / "checkpoint").mkdir()
    for i in (0, 2):
        tensors = {"policy.a": torch.full((1, 3), float(i))}
        about = {"DCP_SHARDING_INFO": json.dumps({"policy.a": {"saved_offsets": [i, 0]}})}
        save_file(tensors, tmp_path / "checkpoint" / f"shard-{i}.safetensors", metadata=about)
    with pytest.raises(ValueError, match="parts of policy.a are missing"):
        load_checkpoint(tmp_path, {"policy.a": torch.zeros(3, 3)})


def test_of_an_old_and_a_new_folder_the_old_one_may_be_half_deleted(tmp_path):
    write_checkpoint(tmp_path, run_tensors(), "folder")
    (tmp_path / "checkpoint.old").mkdir()
    assert load_checkpoint(tmp_path, run_tensors()) == 7
