"""How weights come and go: policy folders in the released layout, adapters, shards over ranks, and merging.

A policy folder has the layout of the released BAGEL-7B-MoT: llm_config.json, vit_config.json, ema.safetensors (or shards with an index),
ae.safetensors, tokenizer files; bagel_config.json and ae_config.json hold what the release hard-codes and are optional. What this project
writes loads in other BAGEL tools, adapters in peft. Only safetensors are read and written, and each file is replaced atomically.

    policy = load_policy("BAGEL-7B-MoT", device="cuda", adapter="out/adapter")
    save_policy(policy, "merged")
"""

import json
import math
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from policy import (GENERATION, RELEASE_AE, RELEASE_BAGEL, UNDERSTANDING, Policy, PolicyConfig,
    adapters, add_lora, declare_torchvision_ops)
from support.disk import one_line_error, read_json, replacing, write_atomic


# ---- files ----

def open_tensors(folder: Path, stem: str) -> dict:
    """Key -> open file: stem.safetensors, or else the shard that stem.safetensors.index.json names for the key. Nothing is read yet."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not single.exists() and not index.exists():
        pickled = sorted(p.name for p in folder.glob("*.*") if p.suffix in (".pt", ".bin", ".pth", ".ckpt"))
        found = f"; it holds {pickled}, and pickled weights are not read" if pickled else ""
        raise FileNotFoundError(f"{folder} has no {single.name}{found}; convert the weights to safetensors")
    shard = {} if single.exists() else read_json(index).get("weight_map")
    if not isinstance(shard, dict) or not all(isinstance(f, str) and f == Path(f).name for f in shard.values()):
        raise ValueError(f"{index} has no weight_map of keys to names of files beside it")
    opened = {}
    for file in [single] if single.exists() else [folder / f for f in sorted(set(shard.values()))]:
        with one_line_error(f"{file} cannot be read as safetensors, download it again", (SafetensorError, OSError)):
            handle = safe_open(file, framework="pt")
        held = set(handle.keys())
        own = held if single.exists() else {k for k, f in shard.items() if f == file.name}
        if wrong := sorted(own - held) or sorted(held - own - shard.keys()):
            raise ValueError(f"{file} does not hold what {index.name} says: {wrong[0]} is in only one of them; download both again")
        opened |= {key: handle for key in own}
    if not opened:
        raise ValueError(f"{single if single.exists() else index} holds no tensors")
    return opened


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def finite(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all numbers are finite, and stay so in dtype. Its extremes tell, without a copy of x; a NaN is one."""
    return not x.numel() or bool(torch.stack(x.aminmax()).to(dtype or x.dtype).isfinite().all())


def assign(module: nn.Module, folder: Path, stem: str, names: dict[str, str], dtype, device, masters=(), tied=None) -> torch.dtype:
    """Give `module` the tensors of a file one by one, in `dtype` (None: the file's), and return the file's: that of most of its numbers.

    names: key in the file -> name in the module; masters: names that become fp32; tied: key -> the key that is read where the file lacks
    it, and that it must equal where not. ValueError for all that does not fit, and for numbers that are not finite.
    """
    files, file = open_tensors(folder, stem), folder / f"{stem}.safetensors"
    source = {key: key if key in files else (tied or {}).get(key, key) for key in names}
    missing, extra = sorted(set(source.values()) - files.keys()), sorted(files.keys() - set(source.values()))
    if missing or extra:
        raise ValueError(f"{file}: {len(missing)} keys missing {missing[:8]}, {len(extra)} keys extra {extra[:8]}")
    for key, other in (tied or {}).items():
        if source[key] == key and not torch.equal(files[key].get_tensor(key), files[other].get_tensor(other)):
            raise ValueError(f"{file}: {key} differs from {other}, but tie_word_embeddings says that they are one; set it to false")
    want, state, numbers = module.state_dict(), {}, {}
    for key in files:
        held = files[key].get_slice(key)
        if held.get_dtype() not in FLOATS:
            raise ValueError(f"{file}: {key} has dtype {held.get_dtype()}, must be one of {list(FLOATS)}")
        numbers[held.get_dtype()] = numbers.get(held.get_dtype(), 0) + math.prod(held.get_shape())
    stored = FLOATS[max(numbers, key=numbers.get)]
    for key, name in names.items():
        value = files[source[key]].get_tensor(source[key])
        value = value if source[key] == key else value.clone()  # tied weights become two
        if value.shape[2:] == (1, 1) and want[name].ndim == 2:
            value = value[:, :, 0, 0]                           # the autoencoder's 1x1 convolutions
        if value.shape != want[name].shape:
            absent = [n for n in ("bagel_config.json", "ae_config.json") if stem != "adapter_model" and not (folder / n).exists()]
            raise ValueError(f"{file}: {key} has shape {tuple(value.shape)}, the config says {tuple(want[name].shape)}"
                             + (f" ({' and '.join(absent)} missing: the release's sizes are taken)" if absent else ""))
        kind = torch.float32 if name in masters else dtype or stored
        if not finite(value, kind):
            raise ValueError(f"{file}: {key} holds numbers that are not finite in {kind}")
        state[name] = shard_like(value, want[name]).to(device=device, dtype=kind)
    module.load_state_dict(state, strict=False, assign=True)
    return stored


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file so that the path always holds a whole file: the old one or the new one."""
    with replacing(path) as file:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, file, metadata={"format": "pt"})


# ---- the released layout ----

# Our names -> the released keys, in order. Experts are a list here and a suffix there: <0> is none, <1> is _moe_gen.
RELEASE_NAMES = (
    (r"\.base\.", "."), (r"^blocks", "language_model.model.layers"), (r"^norms\.(\d)", r"language_model.model.norm<\1>"),
    (r"experts\.(\d)\.norm_in", r"input_layernorm<\1>"), (r"experts\.(\d)\.norm_out", r"post_attention_layernorm<\1>"),
    (r"experts\.(\d)\.(gate|up|down)", r"mlp<\1>.\2_proj"), (r"experts\.(\d)\.([qk]_norm)", r"self_attn.\2<\1>"),
    (r"experts\.(\d)\.([qkvo])", r"self_attn.\2_proj<\1>"), ("<0>", ""), ("<1>", "_moe_gen"),
    (r"^embed\.", "language_model.model.embed_tokens."), (r"^head\.", "language_model.lm_head."), (r"^vit\.", "vit_model.vision_model."),
    (r"^latent_in\.", "vae2llm."), (r"^latent_out\.", "llm2vae."), (r"^(latent|vit)_positions", r"\1_pos_embed.pos_embed"))


# diffusers' AutoencoderKL -> the release's (BFL's) keys.
AE_NAMES = (
    ("down_blocks", "down"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"), ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0", "mid.attn_1"), ("resnets", "block"),
    ("conv_shortcut", "nin_shortcut"), ("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
    ("conv_norm_out", "norm_out"))


def release_name(name: str) -> str:
    """Our parameter name -> the released key."""
    for ours, theirs in RELEASE_NAMES:
        name = re.sub(ours, theirs, name)
    return name


def release_ae_name(name: str, levels: int) -> str:
    """AutoencoderKL's name -> the released key; the decoder counts its levels from the other end."""
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    for ours, theirs in AE_NAMES:
        name = name.replace(ours, theirs)
    return name


def load_policy(folder: str | Path, device="cpu", dtype: torch.dtype | None = None, prepare=None, adapter: str | Path = "") -> Policy:
    """Read a policy folder; every key and shape is checked and the missing or extra ones are named.

    dtype None keeps the file's, and the autoencoder always does. prepare(policy) sees the policy without memory (meta device) and may
    freeze it, add adapters or `shard` it; then what it leaves trainable becomes fp32, and a sharded rank reads its shard alone.
    Tensors go from the file to their place one by one. adapter: a folder of `save_adapters` to put on.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"policy folder {folder} does not exist")
    read = lambda name, default=None: read_json(folder / f"{name}_config.json", default)
    config = PolicyConfig(read("llm"), read("vit"), RELEASE_BAGEL | read("bagel", {}), read("ae", RELEASE_AE))
    tokenizer = load_tokenizer(folder)
    with one_line_error(f"a config file of {folder} lacks a field or holds what cannot be", (KeyError, TypeError, RuntimeError)):
        for wrong, why in faults(config):
            if wrong:
                raise ValueError(why)
        with torch.device("meta"):                              # no memory until the file's own tensors are assigned
            policy = Policy(config, tokenizer)
    policy.autoencoder.requires_grad_(False)
    if prepare:
        prepare(policy)
    names = {release_name(k): k for k in policy.state_dict() if not k.startswith("autoencoder.") and not k.endswith((".A", ".B"))}
    ae_names = {release_ae_name(k, len(config.ae["ch_mult"])): k for k in policy.autoencoder.state_dict()}
    masters = {k for k, p in policy.named_parameters() if p.requires_grad} if prepare else ()
    tied = {release_name("head.weight"): release_name("embed.weight")} if config.llm.get("tie_word_embeddings") else {}
    policy.stored = assign(policy, folder, "ema", names, dtype, device, masters, tied)
    assign(policy.autoencoder, folder, "ae", ae_names, None, device)
    reset_adapters(policy, device)
    if adapter:
        load_adapters(policy, adapter)
    return policy.eval()


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Write the released layout (configs, ema.safetensors, ae.safetensors, tokenizer) in the dtype that was loaded; adapters are
    merged; each file is replaced atomically. Of a sharded policy all ranks call it, and rank 0 writes."""
    folder, c, levels = Path(folder), policy.config, len(policy.config.ae["ch_mult"])
    writes, own = not policy.sharded or dist.get_rank() == 0, {}
    for k, v in merged_state(policy):                         # gathered one by one by all ranks, kept by one
        if writes and not k.startswith("autoencoder."):
            own[release_name(k)] = v.cpu()
    if not writes:
        return
    folder.mkdir(parents=True, exist_ok=True)
    head, embedding = (own[release_name(f"{n}.weight")] for n in ("head", "embed"))
    untied = {"tie_word_embeddings": False} if c.llm.get("tie_word_embeddings") and not torch.equal(head, embedding) else {}
    for name, content in dict(llm=c.llm | untied, vit=c.vit, bagel=c.bagel, ae=c.ae).items():
        write_atomic(folder / f"{name}_config.json", json.dumps(content, indent=2).encode())
    save_tensors(own, folder / "ema.safetensors")
    ae = {release_ae_name(k, levels): v for k, v in policy.autoencoder.state_dict().items()}
    # The release stores the attention projections of the autoencoder as 1x1 convolutions.
    save_tensors({k: v[:, :, None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in ae.items()}, folder / "ae.safetensors")
    files = tokenizer_files(policy.tokenizer)
    for name in TOKENIZER_FILES:                                # a file of another tokenizer would be read beside these
        write_atomic(folder / name, files[name]) if name in files else (folder / name).unlink(missing_ok=True)


# What a field must be: a whole number above 0 (int), or the one value that is implemented, which also holds where a file does not say. A
# field that is neither here nor read below changes nothing that is computed: dropout, vision_use_head (BAGEL's ViT has none) and the like.
FIELDS = {
    "llm": dict(hidden_size=int, intermediate_size=int, num_hidden_layers=int, num_attention_heads=int, num_key_value_heads=int,
                vocab_size=int, model_type="qwen2", hidden_act="silu", attention_bias=True, qkv_bias=True, mlp_bias=False, qk_norm=True,
                is_causal=True, use_sliding_window=False, use_mrope=False, partial_rotary_factor=1.0, quantization_config=False),
    "vit": dict(hidden_size=int, intermediate_size=int, num_hidden_layers=int, num_attention_heads=int, patch_size=int, image_size=int,
                model_type="siglip_vision_model", hidden_act="gelu_pytorch_tanh", num_channels=3, rope=False, quantization_config=False),
    "bagel": dict(latent_patch_size=int, max_latent_size=int, vit_max_num_patch_per_side=int, connector_act="gelu_pytorch_tanh",
                  interpolate_pos=False, visual_gen=True, visual_und=True, vit_select_layer=-2, vit_rope=False),
    "ae": dict(ch=int, z_channels=int, downsample=int, num_res_blocks=int, in_channels=3, out_ch=3, act_fn="silu", double_z=True,
               attn_resolutions=[], mid_block_add_attention=True, tanh_out=False, use_quant_conv=False, use_post_quant_conv=False)}


def faults(c: PolicyConfig):
    """(whether it is so, what is said of it) of what no policy can have, one by one; a fault may presume that those above are not there."""
    sizes = [(file, name, getattr(c, file)[name]) for file, fields in FIELDS.items() for name, kind in fields.items() if kind is int]
    sizes += [(file, name, getattr(c, file).get(name, 1)) for file, name in (("llm", "max_position_embeddings"), ("ae", "norm_groups"))]
    sizes += [("ae", f"ch_mult[{i}]", m) for i, m in enumerate(c.ae["ch_mult"] or [None])]
    sizes += [("bagel", f"{name}[{i}]", n) for name in ("vae_resize", "vit_resize") for i, n in enumerate(getattr(c, name))]
    for file, name, value in sizes:
        whole = type(value) is int and 0 < value < 2**24
        yield not whole, f"{file}_config.json: {name} is {value!r}, must be a whole number from 1 to 2^24"
    llm = FIELDS["llm"] | dict(head_dim=c.head_dim, layer_types=["full_attention"] * c.llm["num_hidden_layers"])
    for file, fields in (FIELDS | {"llm": llm}).items():
        for name, one in fields.items():
            value = getattr(c, file).get(name)
            yield one is not int and value not in (None, one), f"{file}_config.json: {name} {value!r} is not implemented, only {one!r}"
    for name in ("rope_scaling", "rope_parameters"):
        how, plain = c.llm.get(name) or {}, dict(rope_type="default", type="default", partial_rotary_factor=1.0)
        yield (not isinstance(how, dict) or any(v is not None and v != plain.get(k) for k, v in how.items() if k != "rope_theta"),
               f"llm_config.json: {name} {how!r} is not implemented, only the default rotation")
        theta = how.get("rope_theta", c.rope_theta)             # transformers 4 and 5 read it from different places
        yield theta != c.rope_theta, f"llm_config.json: rope_theta is {c.rope_theta!r}, but {theta!r} in {name}; they must agree"
    for file, name, value, low in (("llm", "rms_norm_eps", c.rms_eps, 0.0), ("llm", "rope_theta", c.rope_theta, 1e-6),
                                   ("vit", "layer_norm_eps", c.vit.get("layer_norm_eps", 1e-6), 0.0),
                                   ("ae", "scale_factor", c.ae["scale_factor"], 1e-6), ("ae", "shift_factor", c.ae["shift_factor"], -1e30)):
        yield (type(value) not in (int, float) or not low <= value < 1e30,
               f"{file}_config.json: {name} is {value!r}, must be a finite number of at least {low:g}")
    D, H, levels = c.llm["hidden_size"], c.llm["num_attention_heads"], c.ae["ch_mult"]
    yield D % 4 or D % (2 * H), "llm_config.json: hidden_size must be a multiple of 4 and an even multiple of num_attention_heads"
    yield H % c.llm["num_key_value_heads"], "llm_config.json: num_attention_heads must be a multiple of num_key_value_heads"
    yield c.vit["hidden_size"] % c.vit["num_attention_heads"], "vit_config.json: hidden_size must be a multiple of num_attention_heads"
    yield levels[0] != 1, "ae_config.json: ch_mult must start with 1, as AutoencoderKL's first level does"
    yield c.ae["downsample"] != 2 ** (len(levels) - 1), "ae_config.json: downsample must be 2 per level of ch_mult but the last"
    for rule, token in ((c.vae_resize, c.stride), (c.vit_resize, c.vit["patch_size"])):
        yield (len(rule) != 3 or rule[1] > rule[0] or rule[2] % token,
               "bagel_config.json: vae_resize and vit_resize must be longest, shortest, stride; the stride a multiple of a token's pixels")


TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def load_tokenizer(folder: Path):
    """transformers' tokenizer of a policy folder. ValueError where files are missing, damaged, or count tokens in different ways."""
    declare_torchvision_ops()
    from transformers import AutoTokenizer
    told = read_json(folder / "tokenizer_config.json", {}).get("added_tokens_decoder", {})
    wanted = f"the tokenizer files of {folder} (tokenizer_config.json; vocab.json and merges.txt, or tokenizer.json) are missing or damaged"
    with one_line_error(wanted, (ValueError, OSError, AttributeError, TypeError, KeyError, IndexError, RecursionError, ImportError)):
        if empty := [n for n in TOKENIZER_FILES if (folder / n).is_file() and not (folder / n).stat().st_size]:
            raise ValueError(f"{empty[0]} is empty")            # merges.txt would be read as no merges
        tokenizer = AutoTokenizer.from_pretrained(folder.resolve())
        for i, token in told.items():
            if (found := tokenizer.convert_tokens_to_ids(token["content"])) != int(i):
                raise ValueError(f"the token {token['content']} is {i} in tokenizer_config.json, but {found} as the tokenizer counts; "
                                 "added tokens must stand in vocab.json or follow it without a gap")
    return tokenizer


def tokenizer_files(tokenizer) -> dict[str, bytes]:
    """Name -> content: the files of the folder it came from, since the official BAGEL code cannot read the tokenizer.json alone that
    transformers 5 would write; what transformers writes where there was no folder."""
    read = lambda folder: {n: (folder / n).read_bytes() for n in TOKENIZER_FILES if (folder / n).is_file()}
    if tokenizer.name_or_path and (own := read(Path(tokenizer.name_or_path))):
        return own
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return read(Path(folder))


# ---- adapters ----

def reset_adapters(policy: Policy, device, seed: int = 0) -> None:
    """Fresh adapters in place of those without memory: A normal / rank from (seed, place), B zero, whatever the ranks."""
    for i, m in enumerate(adapters(policy).values()):
        A = torch.randn(m.A.shape, generator=torch.Generator().manual_seed(seed * 100_003 + i)) / m.rank
        for name, value in (("A", A), ("B", torch.zeros(m.B.shape))):
            setattr(m, name, nn.Parameter(shard_like(value, getattr(m, name)).to(device)))


def merged_state(policy: Policy):
    """(name, tensor) of the state dict one by one, whole, in the stored dtype, without adapters: each adapted weight becomes
    base + alpha/rank * B A."""
    held = {f"{n}.base.weight": m for n, m in adapters(policy).items()}
    for name, value in policy.state_dict().items():
        if name.endswith((".A", ".B")):
            continue
        value = full_tensor(value)
        if m := held.get(name):
            value = value.float() + m.alpha / m.rank * full_tensor(m.B.detach()) @ full_tensor(m.A.detach())
        yield name.replace(".base.", "."), value.to(policy.stored or value.dtype)


def save_adapters(policy: Policy, folder: str | Path) -> None:
    """Write the adapters alone, as the peft library names and stores them: adapter_model.safetensors and adapter_config.json.
    Of a sharded policy all ranks call it, and rank 0 writes."""
    held = adapters(policy)
    if not held:
        raise ValueError("the policy has no adapters to save; it was trained whole")
    tensors = {f"base_model.model.{release_name(f'{n}.weight').removesuffix('.weight')}.lora_{k}.weight": full_tensor(getattr(m, k)).cpu()
               for n, m in held.items() for k in "AB"}
    if policy.sharded and dist.get_rank():
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    some = next(iter(held.values()))
    config = dict(peft_type="LORA", r=some.rank, lora_alpha=some.alpha, lora_dropout=0.0, bias="none", fan_in_fan_out=False,
                  target_modules=sorted({".".join(k.split(".")[-4:-2]) for k in tensors}))      # such as self_attn.q_proj_moe_gen
    write_atomic(Path(folder) / "adapter_config.json", json.dumps(config, indent=2).encode())
    save_tensors(tensors, Path(folder) / "adapter_model.safetensors")


# adapter_config.json: fields that are read or change nothing that is computed; values of others that mean plain LoRA, as null and empty do.
ADAPTER_FREE = {"r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "lora_dropout", "base_model_name_or_path", "revision",
                "task_type", "inference_mode", "peft_version", "auto_mapping", "megatron_core", "qalora_group_size", "eva_config"}
ADAPTER_PLAIN = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal", "eva"]}


def check_adapter(config: dict, modules: set[str]) -> None:
    """ValueError for a config of anything but plain LoRA on the modules of these names."""
    for name, value in config.items():
        plain = value is None or value is False or value in ("", [], {}) or value in ADAPTER_PLAIN.get(name, ())
        if name not in ADAPTER_FREE and not plain:
            raise ValueError(f"{name} {value!r} is not implemented, only plain LoRA")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or not 0 < r < 2**16 or type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise ValueError(f"it lacks the numbers r, a whole one above 0, and lora_alpha; they are {r!r} and {alpha!r}")
    for name, said in (("target_modules", config.get("target_modules")), ("exclude_modules", config.get("exclude_modules") or None)):
        if said not in (None, "all-linear"):
            with one_line_error(f"{name} {said!r}", (TypeError, re.error)):
                fits = lambda m: re.fullmatch(said, m) if isinstance(said, str) else any(f".{m}".endswith(f".{t}") for t in said)
                hit = set(filter(fits, modules))
            if wrong := sorted(modules - hit if name == "target_modules" else hit):
                raise ValueError(f"{name} {said!r} leaves out {wrong[0]}, of which there are weights")


def load_adapters(policy: Policy, folder: str | Path) -> Policy:
    """Put the adapters of a folder of `save_adapters`, or of peft, on the policy, in place; config, keys and shapes are checked."""
    path = Path(folder) / "adapter_config.json"
    config, files = read_json(path), open_tensors(Path(folder), "adapter_model")
    with one_line_error(f"{path}", (ValueError,)):
        check_adapter(config, {k.removeprefix("base_model.model.").rpartition(".lora_")[0] for k in files})
    experts = tuple(e for e in (UNDERSTANDING, GENERATION) if any(("_moe_gen" in k) == e for k in files))
    times = math.sqrt(config["r"]) if config.get("use_rslora") else 1.0     # peft then divides alpha by sqrt(r), LoRA always by r
    add_lora(policy, config["r"], config["lora_alpha"] * times, experts)
    names = {f"base_model.model.{release_name(f'{n}.weight').removesuffix('.weight')}.lora_{k}.weight": f"{n}.{k}"
             for n in adapters(policy) for k in "AB"}
    assign(policy, Path(folder), "adapter_model", names, torch.float32, policy.device)
    return policy


# ---- several GPUs ----

def shard(policy: Policy, dtype: torch.dtype | None = None) -> Policy:
    """FSDP2 over all ranks, in place: each block, the embedding and the head are cut in rows and gathered when they are called.

    dtype: of gathered parameters (bf16 beside fp32 masters); gradients are averaged over the ranks in fp32. What is small (norms, time
    and latent layers, connector, ViT embeddings, autoencoder) stays whole on every rank, and its gradients are the caller's to add up.
    """
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*policy.blocks, *policy.vit.encoder["layers"], policy.embed, policy.head):
        fully_shard(module, mp_policy=precision)
    # FSDP2's root would hold back gradients of parameters that several calls before one backward use, so the root holds none.
    fully_shard(policy, ignored_params={p for p in policy.parameters() if not isinstance(p, DTensor)})
    for method in ("append_text", "append_image", "image_states", "velocity"):
        register_fsdp_forward_method(policy, method)
    policy.sharded, size = True, dtype.itemsize if dtype else 4
    policy.gathered_bytes = sum(p.numel() * size for p in policy.parameters() if isinstance(p, DTensor))
    return policy


@contextmanager
def keep_gathered(policy: Policy, room: float | None = None):
    """Keep parameters whole once gathered, for the many calls of a rollout, if they need at most `room` bytes (None: any number) on
    every rank."""
    parts = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    keep = torch.tensor(int(room is None or policy.gathered_bytes <= room), device=policy.device)
    if policy.sharded:                                          # ranks that disagree would wait for one another's gathers
        dist.all_reduce(keep, dist.ReduceOp.MIN)
    keep = bool(keep)
    for m in parts:
        m.set_reshard_after_forward(not keep, recurse=False)
    try:
        yield policy
    finally:
        for m in parts:
            m.set_reshard_after_forward(True, recurse=False)
            m.reshard()


def full_tensor(x: Tensor) -> Tensor:
    """The full tensor of a sharded one, gathered from all ranks; x itself otherwise."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full tensor, sharded as `like` is; the value itself where it is not."""
    if not isinstance(like, DTensor):
        return value
    rows = -(-len(value) // like.device_mesh.size())            # fully_shard cuts dimension 0 as torch.chunk does
    start = min(rows * like.device_mesh.get_local_rank(), len(value))
    local = value[start:start + rows].clone()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


# ---- what is trained ----

EXPERTS = {"understanding": UNDERSTANDING, "generation": GENERATION}


def freeze(policy: Policy, experts: str, lora: int, checkpointing: bool) -> None:
    """Leave trainable adapters of rank `lora` or, at 0, all weights, of one expert or of "both"."""
    names = [*EXPERTS] if experts == "both" else [experts]
    if lora:
        add_lora(policy, lora, 2.0 * lora, tuple(EXPERTS[name] for name in names))
    for name, params in policy.trainable_by_expert().items():
        for p in params:
            p.requires_grad_(name in names)
    for block in policy.blocks:
        block.checkpointing = checkpointing


def trainable(policy: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter of what the run trains."""
    return {n: p for n, p in policy.named_parameters() if p.requires_grad}
