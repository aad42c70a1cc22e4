"""How weights come and go: policy folders in the released layout, adapters, shards over ranks, and what a run keeps.

A policy folder has the layout of the released BAGEL-7B-MoT: llm_config.json, vit_config.json, ema.safetensors (or shards with an index),
ae.safetensors, tokenizer files; bagel_config.json and ae_config.json hold what the release hard-codes and are optional. What this project
writes loads in other BAGEL tools, adapters in peft. Only safetensors are read and written, and each file is replaced atomically.

    policy = load_policy("BAGEL-7B-MoT", device="cuda", adapter="out/adapter")
    save_policy(policy, "merged")
"""

import json
import math
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from policy import (GENERATION, RELEASE_AE, RELEASE_BAGEL, UNDERSTANDING, Policy, PolicyConfig, adapters, add_lora, declare_torchvision_ops)


# ---- files ----

def read_json(path: Path, default: dict | None = None) -> dict:
    """The JSON object in a file; `default` where the file is missing and there is one. Errors: ValueError, FileNotFoundError."""
    if not path.exists():
        if default is None:
            raise FileNotFoundError(f"{path} is missing; a policy folder has llm_config.json, vit_config.json, ema.safetensors, ae.safetensors, "
                                    "a folder of adapters adapter_config.json, adapter_model.safetensors")
        return dict(default)
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, must hold a JSON object")
    return content


def open_tensors(folder: Path, stem: str) -> dict:
    """Key -> open file of stem.safetensors, or else of the shards that stem.safetensors.index.json lists. Nothing is read yet."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
            raise ValueError(f"{index} has no weight_map of keys to files")
        files = [folder / f for f in sorted(set(listed.values()))]
    else:
        there = sorted(p.name for p in folder.iterdir() if p.suffix in (".pt", ".bin", ".pth", ".ckpt")) if folder.is_dir() else []
        found = f"; it holds {there}, and pickled weights are not read" if there else ""
        raise FileNotFoundError(f"{folder} has no {stem}.safetensors{found}; convert the weights to safetensors")
    opened = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{index} lists {file.name}, which is missing; download it again") from error
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file ({error}); download it again") from error
        opened |= {key: handle for key in handle.keys()}
    if not opened:
        raise ValueError(f"{single if single.exists() else index} holds no tensors")
    return opened


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def assign(module: nn.Module, folder: Path, stem: str, names: dict[str, str], dtype, device, masters=(), tied: dict[str, str] | None = None
           ) -> torch.dtype:
    """Give `module` the tensors of a file one by one, in `dtype` (None: the file's), and return the file's: that of most of its numbers.

    names: key in the file -> name in the module; masters: names that become fp32; tied: key -> the key that is read where the file lacks
    it. Raises with all that do not fit.
    """
    files, file = open_tensors(folder, stem), folder / f"{stem}.safetensors"
    source = {key: key if key in files else (tied or {}).get(key, key) for key in names}
    missing, extra = sorted(set(source.values()) - files.keys()), sorted(files.keys() - set(source.values()))
    if missing or extra:
        raise ValueError(f"{file}: {len(missing)} keys missing {missing[:8]}, {len(extra)} keys extra {extra[:8]}")
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
            raise ValueError(f"{file}: {key} has shape {tuple(value.shape)}, the config says {tuple(want[name].shape)}")
        state[name] = placed(value, want[name]).to(device=device, dtype=torch.float32 if name in masters else dtype or stored)
    module.load_state_dict(state, strict=False, assign=True)
    return stored


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file so that the path always holds a whole file: the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside it first, then in its place."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    ("mid_block.resnets.1", "mid.block_2"), ("mid_block.attentions.0", "mid.attn_1"), ("resnets", "block"), ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("conv_norm_out", "norm_out"))


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
    config = PolicyConfig(read_json(folder / "llm_config.json"), read_json(folder / "vit_config.json"),
                          {**RELEASE_BAGEL, **read_json(folder / "bagel_config.json", {})}, read_json(folder / "ae_config.json", RELEASE_AE))
    tokenizer = load_tokenizer(folder)
    try:
        check_config(config)
        with torch.device("meta"):                          # no memory until the file's own tensors are assigned
            policy = Policy(config, tokenizer)
    except KeyError as error:
        raise ValueError(f"a config file of {folder} lacks the field {error}") from error
    except TypeError as error:
        raise ValueError(f"a config file of {folder} holds a size that cannot be: {error}") from error
    policy.autoencoder.requires_grad_(False)
    if prepare:
        prepare(policy)
    names = {release_name(k): k for k in policy.state_dict() if not k.startswith("autoencoder.") and not k.endswith((".A", ".B"))}
    ae_names = {release_ae_name(k, len(config.ae["ch_mult"])): k for k in policy.autoencoder.state_dict()}
    masters = {k for k, p in policy.named_parameters() if p.requires_grad} if prepare else ()
    tied = {release_name("head.weight"): release_name("embed.weight")} if config.llm.get("tie_word_embeddings") else {}
    try:
        policy.stored = assign(policy, folder, "ema", names, dtype, device, masters, tied)
        assign(policy.autoencoder, folder, "ae", ae_names, None, device)
    except ValueError as error:
        absent = [n for n in ("bagel_config.json", "ae_config.json") if not (folder / n).exists()]
        raise ValueError(f"{error}" + (f" ({' and '.join(absent)} missing: the release's sizes are taken)" if absent else "")) from error
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
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        policy.tokenizer.save_pretrained(fresh)
        for file in Path(fresh).iterdir():
            os.replace(file, folder / file.name)


# What must be a whole number above 0, by file.
SIZES = {"llm": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"),
         "vit": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size"),
         "bagel": ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side"),
         "ae": ("ch", "z_channels", "downsample", "num_res_blocks")}


# Flags of which one value is implemented, the one that holds where a file does not say.
FLAGS = (("llm", "hidden_act", "silu"), ("llm", "use_sliding_window", False), ("vit", "hidden_act", "gelu_pytorch_tanh"),
         ("bagel", "connector_act", "gelu_pytorch_tanh"), ("bagel", "interpolate_pos", False))


def faults(c: PolicyConfig):
    """(whether it is so, what is said of it) of what no policy can have, one by one; a fault may presume that those above it are not there."""
    sizes = [(file, name, getattr(c, file)[name]) for file, names in SIZES.items() for name in names]
    sizes += [("ae", f"ch_mult[{i}]", m) for i, m in enumerate(c.ae["ch_mult"] or [None])]
    sizes += [("ae", "norm_groups", c.ae.get("norm_groups", 32)), ("llm", "max_position_embeddings", c.llm.get("max_position_embeddings", 32768))]
    sizes += [("bagel", f"{name}[{i}]", n) for name in ("vae_resize", "vit_resize") for i, n in enumerate(getattr(c, name))]
    for file, name, value in sizes:
        yield type(value) is not int or not 0 < value < 2**24, f"{file}_config.json: {name} is {value!r}, must be a whole number from 1 to 2^24"
    for name in ("rope_scaling", "rope_parameters"):
        how = c.llm.get(name) or {}
        yield (not isinstance(how, dict) or how.get("rope_type", how.get("type", "default")) != "default",
               f"llm_config.json: {name} {how!r} is not implemented, only the default rotation")
    for file, name, value, low in (("llm", "rms_norm_eps", c.rms_eps, 0.0), ("llm", "rope_theta", c.rope_theta, 1e-6),
                                   ("vit", "layer_norm_eps", c.vit.get("layer_norm_eps", 1e-6), 0.0),
                                   ("ae", "scale_factor", c.ae["scale_factor"], 1e-6), ("ae", "shift_factor", c.ae["shift_factor"], -1e30)):
        yield (type(value) not in (int, float) or not low <= value < 1e30,
               f"{file}_config.json: {name} is {value!r}, must be a finite number of at least {low:g}")
    D, H, levels = c.llm["hidden_size"], c.llm["num_attention_heads"], c.ae["ch_mult"]
    yield D % 4 or D % (2 * H), "llm_config.json: hidden_size must be a multiple of 4 and an even multiple of num_attention_heads"
    yield H % c.llm["num_key_value_heads"], "llm_config.json: num_attention_heads must be a multiple of num_key_value_heads"
    yield c.vit["hidden_size"] % c.vit["num_attention_heads"], "vit_config.json: hidden_size must be a multiple of num_attention_heads"
    yield c.vit.get("num_channels", 3) != 3, "vit_config.json: num_channels must be 3"
    yield not c.ae["in_channels"] == c.ae["out_ch"] == 3, "ae_config.json: in_channels and out_ch must be 3"
    yield levels[0] != 1, "ae_config.json: ch_mult must start with 1, as AutoencoderKL's first level does"
    yield c.ae["downsample"] != 2 ** (len(levels) - 1), "ae_config.json: downsample must be 2 per level of ch_mult but the last"
    for rule, token in ((c.vae_resize, c.stride), (c.vit_resize, c.vit["patch_size"])):
        yield (len(rule) != 3 or rule[1] > rule[0] or rule[2] % token,
               "bagel_config.json: vae_resize and vit_resize must be longest, shortest, stride; the stride a multiple of a token's pixels")
    for file, name, known in FLAGS:
        value = getattr(c, file).get(name, known)
        yield value != known, f"{file}_config.json: {name} {value!r} is not implemented, only {known!r}"


def check_config(c: PolicyConfig) -> None:
    """ValueError, in one line, for a configuration that no policy can have."""
    for wrong, why in faults(c):
        if wrong:
            raise ValueError(why)


def load_tokenizer(folder: Path):
    """transformers' tokenizer of a policy folder. ValueError, in one line, where files are missing or damaged, or token ids are others
    than tokenizer_config.json says."""
    declare_torchvision_ops()
    from transformers import AutoTokenizer
    check_vocabulary(folder)
    told = read_json(folder / "tokenizer_config.json", {}).get("added_tokens_decoder", {})
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"the tokenizer files of {folder} are missing or damaged: {str(error).splitlines()[0]}") from error
    for i, token in told.items():
        if (found := tokenizer.convert_tokens_to_ids(token["content"])) != int(i):
            raise ValueError(f"{folder}: the token {token['content']} is {i} in tokenizer_config.json, but {found} as the tokenizer counts; "
                             "added tokens must stand in vocab.json or follow it without a gap")
    return tokenizer


def check_vocabulary(folder: Path) -> None:
    """ValueError for what the tokenizers library would refuse with an Exception of no kind: files that are not JSON, merges that are
    none. Files that are not there are not checked."""
    whole_file, vocabulary, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    if not isinstance(read_json(whole_file, {"model": {}}).get("model"), dict):
        raise ValueError(f"{whole_file} holds no model; download it again")
    known = read_json(vocabulary, {})
    if vocabulary.exists() and not (known and all(type(i) is int for i in known.values())):
        raise ValueError(f"{vocabulary} holds no ids of tokens; download it again")
    if not (vocabulary.exists() and merges.exists()):
        return
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{merges} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    pairs = [(i, line.split(" ")) for i, line in enumerate(lines, 1) if line.strip() and not line.startswith("#version")]
    wrong = [i for i, pair in pairs if len(pair) != 2 or not {*pair, "".join(pair)} <= known.keys()]
    if not pairs or wrong:
        raise ValueError(f"{merges} holds no merges" if not pairs else f"{merges}:{wrong[0]}: not a merge of two tokens of {vocabulary.name}")


# ---- adapters ----

def reset_adapters(policy: Policy, device, seed: int = 0) -> None:
    """Fresh adapters in place of those without memory: A normal / rank from (seed, place), B zero, whatever the ranks."""
    for i, m in enumerate(adapters(policy).values()):
        A = torch.randn(m.A.shape, generator=torch.Generator().manual_seed(seed * 100_003 + i)) / m.rank
        for name, value in (("A", A), ("B", torch.zeros(m.B.shape))):
            setattr(m, name, nn.Parameter(placed(value, getattr(m, name)).to(device)))


def merged_state(policy: Policy):
    """(name, tensor) of the state dict one by one, whole, in the stored dtype, without adapters: each adapted weight becomes
    base + alpha/rank * B A."""
    held = {f"{n}.base.weight": m for n, m in adapters(policy).items()}
    for name, value in policy.state_dict().items():
        if name.endswith((".A", ".B")):
            continue
        value = whole(value)
        if m := held.get(name):
            value = value.float() + m.alpha / m.rank * whole(m.B.detach()) @ whole(m.A.detach())
        yield name.replace(".base.", "."), value.to(policy.stored or value.dtype)


def save_adapters(policy: Policy, folder: str | Path) -> None:
    """Write the adapters alone, as the peft library names and stores them: adapter_model.safetensors and adapter_config.json.
    Of a sharded policy all ranks call it, and rank 0 writes."""
    held = adapters(policy)
    if not held:
        raise ValueError("the policy has no adapters to save; it was trained whole")
    tensors = {f"base_model.model.{release_name(f'{n}.weight').removesuffix('.weight')}.lora_{k}.weight": whole(getattr(m, k)).cpu()
               for n, m in held.items() for k in "AB"}
    if policy.sharded and dist.get_rank():
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    some = next(iter(held.values()))
    config = dict(peft_type="LORA", r=some.rank, lora_alpha=some.alpha, lora_dropout=0.0, bias="none", fan_in_fan_out=False,
                  target_modules=sorted({".".join(k.split(".")[-4:-2]) for k in tensors}))      # such as self_attn.q_proj_moe_gen
    write_atomic(Path(folder) / "adapter_config.json", json.dumps(config, indent=2).encode())
    save_tensors(tensors, Path(folder) / "adapter_model.safetensors")


def load_adapters(policy: Policy, folder: str | Path) -> Policy:
    """Put the adapters of a folder of `save_adapters` on the policy, in place; their keys and shapes are checked."""
    config, files = read_json(Path(folder) / "adapter_config.json"), open_tensors(Path(folder), "adapter_model")
    if lacks := [k for k in ("r", "lora_alpha") if not isinstance(config.get(k), (int, float))]:
        raise ValueError(f"{Path(folder) / 'adapter_config.json'} lacks the numbers {lacks}")
    experts = tuple(e for e in (UNDERSTANDING, GENERATION) if any(("_moe_gen" in k) == e for k in files))
    add_lora(policy, config["r"], config["lora_alpha"], experts)
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
    for method in ("append_text", "append_image", "velocity"):
        register_fsdp_forward_method(policy, method)
    policy.sharded, size = True, dtype.itemsize if dtype else 4
    policy.gathered_bytes = sum(p.numel() * size for p in policy.parameters() if isinstance(p, DTensor))
    return policy


@contextmanager
def gathered(policy: Policy, room: float | None = None):
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


def whole(x: Tensor) -> Tensor:
    """The full tensor of a sharded one, gathered from all ranks; x itself otherwise."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def placed(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full tensor, sharded as `like` is; the value itself where it is not."""
    if not isinstance(like, DTensor):
        return value
    rows = -(-len(value) // like.device_mesh.size())            # fully_shard cuts dimension 0 as torch.chunk does
    start = min(rows * like.device_mesh.get_local_rank(), len(value))
    local = value[start:start + rows].clone()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


# ---- what a run keeps ----

def trainable(policy: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter of what the run trains."""
    return {n: p for n, p in policy.named_parameters() if p.requires_grad}


class Average:
    """Exponential moving average of the trainable weights, fp32; `swapped` puts it into the policy for a while."""

    def __init__(self, policy: nn.Module, decay: float):
        self.decay, self.weights = decay, {n: p.detach().float().clone() for n, p in trainable(policy).items()}

    @torch.no_grad()
    def update(self, policy: nn.Module) -> None:
        for n, p in trainable(policy).items():
            self.weights[n].lerp_(p.float(), 1 - self.decay)

    @contextmanager
    def swapped(self, policy: nn.Module):
        own = {n: p.detach().clone() for n, p in trainable(policy).items()}
        policy.load_state_dict(self.weights, strict=False)
        try:
            yield policy
        finally:
            policy.load_state_dict(own, strict=False)


def run_state(policy: nn.Module, average: Average, optimizer) -> dict[str, Tensor]:
    """The live tensors of a checkpoint but for the step: trainable weights, their average, AdamW's moments."""
    out = {}
    for n, p in trainable(policy).items():
        out |= {f"policy.{n}": p.detach(), f"average.{n}": average.weights[n]}
        out |= {f"adamw.{k}.{n}": v for k, v in optimizer.state[p].items()}
    return out


def save_checkpoint(out: Path, tensors: dict[str, Tensor], step: int, sharded: bool = False, rank: int = 0, writer: int = 0) -> None:
    """Replace out/checkpoint.safetensors atomically, from the rank `writer`, where ranks hold equal weights; of a sharded run the folder
    out/checkpoint, which all ranks write together (torch.distributed.checkpoint, in safetensors) and which any number of ranks reads."""
    tensors = tensors | {"step": torch.tensor(step)}
    single, folder, fresh, old = out / "checkpoint.safetensors", out / "checkpoint", out / "checkpoint.tmp", out / "checkpoint.old"
    if not sharded:
        if rank == writer:
            part = out / f"checkpoint.{writer}.safetensors"     # a file of its own, since several ranks may fail together
            save_tensors(tensors, part)
            os.replace(part, single)
            if folder.exists():
                folder.rename(fresh)                            # in one step, so that no half of a folder looks like a checkpoint
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return
    if rank == 0:
        shutil.rmtree(fresh, ignore_errors=True)
    dist.barrier()
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(fresh), save_distributed=True))
    except CheckpointException as error:                        # no Exception: it would pass every handler
        raise OSError(f"{fresh} could not be written: {next(iter(error.failures.values()))[0]}") from error
    dist.barrier()
    if rank == 0:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)                                    # a kill before this line leaves the old one, which is looked for too
        shutil.rmtree(old, ignore_errors=True)
        single.unlink(missing_ok=True)
    dist.barrier()


def read_checkpoint(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, of a sharded one this rank's part, from a checkpoint of either kind."""
    try:
        if path.is_dir():
            alone = not any(isinstance(v, DTensor) for v in tensors.values())
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=alone)
            return
        with safe_open(path, framework="pt") as file:
            for key, value in tensors.items():
                value.copy_(placed(file.get_tensor(key).to(value.device), value))
    except CheckpointException as error:
        raise ValueError(f"{path} is not a whole checkpoint: {next(iter(error.failures.values()))[0]}") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors checkpoint ({error}); pickled checkpoints are not read") from error


def stored_step(path: Path) -> int:
    """The step of a checkpoint of either kind."""
    step = torch.tensor(0)
    read_checkpoint(path, {"step": step})
    return int(step)


def stored_shapes(path: Path) -> dict[str, tuple]:
    """Key -> shape of a checkpoint of either kind."""
    if path.is_dir():
        return {k: tuple(v.size) for k, v in dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata.items()}
    with safe_open(path, framework="pt") as file:
        return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}


def load_checkpoint(out: Path, tensors: dict[str, Tensor]) -> int:
    """Put the checkpoint in `out` into a run's tensors and return its step. All keys and shapes are checked before anything changes."""
    into = tensors | {"step": torch.tensor(0)}
    there = [p for p in (out / "checkpoint.safetensors", out / "checkpoint", out / "checkpoint.old") if p.exists()]
    if not there:
        raise FileNotFoundError(f"no checkpoint {out / 'checkpoint.safetensors'} to resume from")
    path = max(there, key=stored_step)                          # a kill may leave one of each kind
    want, has = {k: tuple(v.shape) for k, v in into.items()}, stored_shapes(path)
    missing, extra = sorted(want.keys() - has.keys()), sorted(has.keys() - want.keys())
    if missing or extra:
        raise ValueError(f"{path}: {len(missing)} keys missing {missing[:6]}, {len(extra)} keys extra {extra[:6]}; "
                         "was it written with another --policy, --lora or --experts?")
    for key, shape in want.items():
        if has[key] != shape:
            raise ValueError(f"{path}: {key} has shape {has[key]}, the policy {shape}")
    read_checkpoint(path, into)
    return int(into["step"])
