"""Weights in and out: policy folders in the released layouts, adapters, and shards over ranks.

A policy folder has the layout of the released BAGEL-7B-MoT: llm_config.json, vit_config.json,
ema.safetensors (or shards with an index), ae.safetensors and the tokenizer's files.
bagel_config.json and ae_config.json hold what the release hard-codes, and are optional. What is
written here loads in other BAGEL tools, adapters load in peft. A folder of Janus-Pro has
transformers' layout, or the original one, which is read but not written. Only safetensors are read
and written, and each file is replaced whole or not at all.

    policy = load_policy("BAGEL-7B-MoT", device="cuda", adapter="out/adapter")
    save_policy(policy, "merged")
"""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor

from janus import ORIGINAL_NAMES, Janus, build_model, convert_config
from policy import (
    EXPERTS, RELEASE_AE, RELEASE_BAGEL, Policy, PolicyConfig, declare_torchvision_ops)
from support.disk import one_line_error, read_json, replacing, write_atomic, write_text
from support.lora import adapters, add_lora


# ---- tensors of files ----


def open_tensors(folder: Path, stem: str) -> dict:
    """Open stem.safetensors, or the shards that stem.safetensors.index.json names: key -> file.

    No tensor is read yet. Errors: FileNotFoundError without such a file; ValueError or OSError for
    a damaged one, and for tensors that are no floats.
    """
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if single.exists():
        file = open_file(single)
        opened = {key: file for key in file.keys()}
    elif not index.exists():
        convert = CONVERT.replace("model.safetensors", single.name)
        raise FileNotFoundError(
            f"{folder} has no {single.name}; pickled weights are not read, convert them: {convert}")
    else:
        with one_line_error(f"{index} cannot be followed"):
            file_of = dict(read_json(index)["weight_map"])
            shards = {name: open_file(folder / name) for name in sorted(set(file_of.values()))}
        opened = {key: shards[name] for key, name in file_of.items()}
    for key, file in opened.items():
        with one_line_error(f"{folder}: {key} cannot be read, download its file again"):
            dtype = file.get_slice(key).get_dtype()
        if dtype not in FLOATS:
            raise ValueError(f"{single}: {key} has dtype {dtype}, not one of {FLOATS}")
    return opened


def open_file(path: Path):
    with one_line_error(f"{path} cannot be read as safetensors, download it again"):
        return safe_open(path, framework="pt")


FLOATS = ["F64", "F32", "F16", "BF16"]          # safetensors' names
CONVERT = (
    'python -c "import glob, torch, safetensors.torch as s; s.save_file({k: v.clone() for f in '
    "glob.glob('pytorch_model*.bin') for k, v in torch.load(f, weights_only=True).items()}, "
    "'model.safetensors')\"")


def all_finite(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether all numbers are finite, and stay finite in dtype."""
    extremes = torch.stack(x.aminmax())         # they spare a copy of x; a NaN is both
    return bool(extremes.to(dtype or x.dtype).isfinite().all())


def assign(
    module: nn.Module, folder: Path, stem: str, names: dict[str, str], dtype, device, masters=(),
    opened: dict | None = None,
) -> torch.dtype:
    """Give `module` the tensors of a file one by one, and return the dtype of the file's first.

    names: key in the file -> name in the module. dtype: of the module; None keeps that first one's.
    masters: names that become fp32. opened: the file's tensors under other keys. Errors: ValueError
    for keys, shapes and dtypes that do not fit, and for numbers that are not finite.
    """
    file = folder / f"{stem}.safetensors"
    opened = opened or open_tensors(folder, stem)
    missing = sorted(names.keys() - opened.keys())
    extra = sorted(opened.keys() - names.keys())
    if missing or extra:
        counts = f"{len(missing)} keys missing {missing[:8]}, {len(extra)} keys extra {extra[:8]}"
        raise ValueError(f"{file}: {counts}")
    wanted = module.state_dict()
    state = {}
    stored = None
    for key, name in names.items():
        value = opened[key].get_tensor(key)
        place = wanted[name]
        stored = stored or value.dtype          # the embedding is first, and most of the numbers
        if value.shape[2:] == (1, 1) and place.ndim == 2:
            value = value.flatten(1)            # the autoencoder's 1x1 convolutions
        if value.shape != place.shape:
            shapes = f"{tuple(value.shape)}, the config says {tuple(place.shape)}"
            raise ValueError(f"{file}: {key} has shape {shapes}")
        target = torch.float32 if name in masters else dtype or stored
        if not all_finite(value, target):
            raise ValueError(f"{file}: {key} holds numbers that are not finite in {target}")
        state[name] = shard_like(value, place).to(device=device, dtype=target)
    module.load_state_dict(state, strict=False, assign=True)
    return stored


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; the path always holds a whole file, the old or the new one."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as file:
        save_file(tensors, file, metadata={"format": "pt"})


# ---- the released layout ----

# Our names -> the released keys, in this order. Experts are a list here, a suffix there: <0> is no
# suffix, <1> is _moe_gen.
RELEASE_NAMES = (
    (r"\.base\.", "."), (r"^model\.", ""), (r"^blocks", "language_model.model.layers"),
    (r"^norms\.(\d)", r"language_model.model.norm<\1>"),
    (r"experts\.(\d)\.norm_in", r"input_layernorm<\1>"),
    (r"experts\.(\d)\.norm_out", r"post_attention_layernorm<\1>"),
    (r"experts\.(\d)\.(gate|up|down)", r"mlp<\1>.\2_proj"),
    (r"experts\.(\d)\.([qk]_norm)", r"self_attn.\2<\1>"),
    (r"experts\.(\d)\.([qkvo])", r"self_attn.\2_proj<\1>"), ("<0>", ""), ("<1>", "_moe_gen"),
    (r"^embed\.", "language_model.model.embed_tokens."), (r"^head\.", "language_model.lm_head."),
    (r"^vit\.", "vit_model.vision_model."), (r"^latent_in\.", "vae2llm."),
    (r"^latent_out\.", "llm2vae."), (r"^(latent|vit)_positions", r"\1_pos_embed.pos_embed"))

# Names of diffusers' AutoencoderKL -> the released keys, which are Black Forest Labs'.
AE_NAMES = (
    ("down_blocks", "down"), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"),
    ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"), ("resnets", "block"),
    ("conv_shortcut", "nin_shortcut"), ("group_norm", "norm"), ("to_out.0", "proj_out"),
    ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("conv_norm_out", "norm_out"))


def release_name(name: str) -> str:
    """Our parameter name -> the released key."""
    for ours, theirs in RELEASE_NAMES:
        name = re.sub(ours, theirs, name)
    return name


def release_keys(policy: Policy) -> dict[str, str]:
    """Released key -> our name, of all tensors but adapters' and the autoencoder's."""
    names = {}
    for name in policy.state_dict():
        if not name.startswith("autoencoder.") and not name.endswith((".A", ".B")):
            names[release_name(name)] = name
    return names


def release_ae_name(name: str, levels: int) -> str:
    """AutoencoderKL's name -> the released key; the decoder's levels are counted from the end."""
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    for ours, theirs in AE_NAMES:
        name = name.replace(ours, theirs)
    return name


def load_policy(
    folder: str | Path, device="cpu", dtype: torch.dtype | None = None, prepare=None,
    adapter: str | Path = ""
) -> Policy:
    """Read a policy folder; every key and shape is checked, and missing or extra ones are named.

    A folder of Janus-Pro, by its config.json, gives a Janus. dtype: None is the file's, or fp32 for
    a Janus on a CPU; BAGEL's autoencoder always keeps its own. prepare(policy) sees the policy
    without memory (on the meta device), and may freeze it, add adapters or `shard` it. What it
    leaves trainable becomes fp32, and a sharded rank reads its own part alone. adapter: a folder of
    `save_adapters` to put on. Errors: OSError and ValueError, in one line that names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"policy folder {folder} does not exist")
    kind = read_json(folder / "config.json", {}).get("model_type")
    build = build_janus if kind in ("janus", "multi_modality") else build_bagel
    policy = build(folder)
    masters = ()
    if prepare:
        prepare(policy)
        masters = trainable(policy).keys()
    names = release_keys(policy)
    if isinstance(policy, Janus):
        if dtype is None and torch.device(device).type == "cpu":
            dtype = torch.float32
        opened = open_original(folder) if kind == "multi_modality" else None
        policy.stored = assign(policy, folder, "model", names, dtype, device, masters, opened)
        restore_buffers(policy, device)
    else:
        levels = len(policy.config.ae["ch_mult"])
        ae_names = {release_ae_name(name, levels): name for name in policy.autoencoder.state_dict()}
        policy.stored = assign(policy, folder, "ema", names, dtype, device, masters)
        assign(policy.autoencoder, folder, "ae", ae_names, None, device)
    reset_adapters(policy)
    if adapter:
        load_adapters(policy, Path(adapter))
    return policy.eval()


def build_bagel(folder: Path) -> Policy:
    """The policy of a BAGEL folder on the meta device, without memory until tensors are assigned."""
    llm = read_json(folder / "llm_config.json")
    vit = read_json(folder / "vit_config.json")
    bagel = RELEASE_BAGEL | read_json(folder / "bagel_config.json", {})
    config = PolicyConfig(llm, vit, bagel, read_json(folder / "ae_config.json", RELEASE_AE))
    tokenizer = load_tokenizer(folder)
    with one_line_error(f"the config files of {folder} do not describe a policy"):
        check_config(config)
        with torch.device("meta"):
            policy = Policy(config, tokenizer)
    policy.autoencoder.requires_grad_(False)
    return policy


def build_janus(folder: Path) -> Janus:
    """The policy of a Janus-Pro folder on the meta device."""
    declare_torchvision_ops()
    from transformers import JanusConfig

    raw = read_json(folder / "config.json")
    with one_line_error(f"{folder / 'config.json'} does not describe a policy"):
        if raw["model_type"] == "multi_modality":
            config = convert_config(raw)
        else:
            # transformers ties the two tables of words unless the file says otherwise; the
            # published folders say nothing and hold two.
            config = JanusConfig.from_dict({"tie_word_embeddings": False} | raw)
        tokenizer = load_tokenizer(folder)
        with torch.device("meta"):
            return Janus(build_model(config), tokenizer)


@dataclass
class OriginalTensor:
    """A tensor of an original Janus file under a key of transformers, as `assign` reads it."""

    file: safe_open
    key: str
    part: int | None = None                     # of a matrix that holds three

    def get_tensor(self, _: str) -> Tensor:
        value = self.file.get_tensor(self.key)
        if self.key.endswith("pos_embed"):
            return value[0]
        return value if self.part is None else value.chunk(3)[self.part]


def open_original(folder: Path) -> dict[str, OriginalTensor]:
    """transformers' key -> tensor of an original Janus folder.

    Left out is what transformers leaves out: the vision encoder's pooling head and the VQ
    autoencoder's counters.
    """
    opened = {}
    for key, file in open_tensors(folder, "model").items():
        if ".attn_pool." in key or key.endswith("codebook_used"):
            continue
        name = key
        for theirs, ours in ORIGINAL_NAMES:
            name = re.sub(theirs, ours, name)
        if ".attn.qkv." not in name:
            opened[name] = OriginalTensor(file, key)
            continue
        for part, letter in enumerate("qkv"):   # one matrix in the file
            own = name.replace(".attn.qkv.", f".self_attn.{letter}_proj.")
            opened[own] = OriginalTensor(file, key, part)
    return opened


def restore_buffers(policy: Janus, device) -> None:
    """Give the buffers that no file holds their values."""
    core = policy.core
    language = core.language_model
    embeddings = core.vision_model.embeddings
    language.rotary_emb = type(language.rotary_emb)(core.config.text_config).to(device)
    M = policy.config.image_tokens
    embeddings.position_ids = torch.arange(M, device=device)[None]


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Write the released layout, in the dtype that was loaded, with adapters merged.

    Each file is replaced atomically. All ranks of a sharded policy call it, and rank 0 writes.
    """
    folder = Path(folder)
    tensors = {}
    writes = not policy.sharded or dist.get_rank() == 0
    for key, value in merged_state(policy):     # all ranks gather each tensor, one rank keeps it
        if writes:
            tensors[key] = value.cpu()
    if not writes:
        return
    if isinstance(policy, Janus):
        release = policy.config.release
        write_text(folder / "config.json", release.to_json_string())
        save_tensors(tensors, folder / "model.safetensors")
    else:
        save_bagel(policy, tensors, folder)
    save_tokenizer(policy.tokenizer, folder)


def save_bagel(policy: Policy, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the four configs and the two files of weights, of which `tensors` are the larger."""
    config = policy.config
    for name in ("llm", "vit", "bagel", "ae"):
        content = json.dumps(getattr(config, name), indent=2)
        write_text(folder / f"{name}_config.json", content)
    save_tensors(tensors, folder / "ema.safetensors")
    ae = {}
    for name, value in policy.autoencoder.state_dict().items():
        key = release_ae_name(name, len(config.ae["ch_mult"]))
        if ".attn_1." in key and value.ndim == 2:
            value = value[:, :, None, None]     # the release has 1x1 convolutions for these
        ae[key] = value
    save_tensors(ae, folder / "ae.safetensors")


# The one implemented value of each field that would change what is computed. A field that a file
# leaves out has that value.
IMPLEMENTED = dict(
    llm=dict(
        model_type="qwen2", hidden_act="silu", attention_bias=True, qkv_bias=True, mlp_bias=False,
        qk_norm=True, is_causal=True, tie_word_embeddings=False, use_sliding_window=False,
        use_mrope=False, partial_rotary_factor=1.0, quantization_config=None),
    vit=dict(
        model_type="siglip_vision_model", hidden_act="gelu_pytorch_tanh", rope=False,
        quantization_config=None),
    bagel=dict(
        connector_act="gelu_pytorch_tanh", interpolate_pos=False, vit_select_layer=-2,
        vit_rope=False),
    ae=dict(act_fn="silu"))


def check_config(config: PolicyConfig) -> None:
    """ValueError for a field that would change what is computed and is not implemented."""
    for file, fields in IMPLEMENTED.items():
        for name, only in fields.items():
            value = getattr(config, file).get(name)
            if value not in (None, only):
                raise ValueError(
                    f"{file}_config.json: {name} {value!r} is not implemented, only {only!r}")
    rotation = dict(
        rope_type="default", type="default", partial_rotary_factor=1.0,
        rope_theta=config.rope_theta)
    for home in ("rope_scaling", "rope_parameters"):            # of transformers 4, and of 5
        for name, value in (config.llm.get(home) or {}).items():
            if value not in (None, rotation.get(name)):
                raise ValueError(
                    f"llm_config.json: {name} {value!r} in {home} is not implemented, only the "
                    f"default rotation with rope_theta {config.rope_theta!r}")


TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "generation_config.json", "preprocessor_config.json", "processor_config.json")


def load_tokenizer(folder: Path):
    """transformers' tokenizer of a policy folder.

    Errors: ValueError or OSError for files that are missing or damaged.
    """
    declare_torchvision_ops()
    from transformers import AutoTokenizer

    wanted = "tokenizer_config.json; vocab.json and merges.txt, or tokenizer.json"
    with one_line_error(f"the tokenizer files of {folder} ({wanted}) are missing or damaged"):
        return AutoTokenizer.from_pretrained(folder.resolve())


def save_tokenizer(tokenizer, folder: Path) -> None:
    """Copy the files that a tokenizer was loaded from, or write those of one that came from none.

    They are copied because the official BAGEL code cannot read the single tokenizer.json that
    transformers 5 would write.
    """
    if not tokenizer.name_or_path:
        tokenizer.save_pretrained(folder)
        return
    for name in TOKENIZER_FILES:
        path = Path(tokenizer.name_or_path, name)
        if path.exists():
            write_atomic(folder / name, path.read_bytes())
        else:                                   # a file of another tokenizer would be read too
            (folder / name).unlink(missing_ok=True)


# ---- adapters ----


def reset_adapters(policy: Policy, seed: int = 0) -> None:
    """Put fresh adapters in place of those without memory: A normal / rank, B zero.

    A comes from (seed, place), whatever the number of ranks.
    """
    for i, module in enumerate(adapters(policy).values()):
        generator = torch.Generator().manual_seed(seed * 100_003 + i)
        A = torch.randn(module.A.shape, generator=generator) / module.rank
        B = torch.zeros(module.B.shape)
        module.A = nn.Parameter(shard_like(A, module.A).to(policy.device))
        module.B = nn.Parameter(shard_like(B, module.B).to(policy.device))


def merged_state(policy: Policy):
    """Yield (released key, tensor) of a policy, each whole and in the stored dtype.

    Adapters and the autoencoder are left out. An adapted weight becomes base + alpha/rank * B A.
    """
    state = policy.state_dict()
    modules = adapters(policy)
    for key, name in release_keys(policy).items():
        value = full_tensor(state[name])
        if module := modules.get(name.removesuffix(".base.weight")):
            A = full_tensor(module.A.detach())
            B = full_tensor(module.B.detach())
            value = value.float() + module.alpha / module.rank * B @ A
        yield key, value.to(policy.stored or value.dtype)


def adapter_keys(policy: Policy) -> dict[str, str]:
    """peft's key -> our name, of both factors of all adapters."""
    keys = {}
    for name in adapters(policy):
        layer = release_name(f"{name}.weight").removesuffix(".weight")
        for factor in ("A", "B"):
            keys[f"base_model.model.{layer}.lora_{factor}.weight"] = f"{name}.{factor}"
    return keys


def save_adapters(policy: Policy, folder: Path) -> None:
    """Write the adapters alone, as the peft library names and stores them.

    All ranks of a sharded policy call it, and rank 0 writes.
    """
    modules = list(adapters(policy).values())
    state = policy.state_dict()
    tensors = {key: full_tensor(state[name]).cpu() for key, name in adapter_keys(policy).items()}
    if policy.sharded and dist.get_rank():
        return
    targets = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors}
    config = dict(
        peft_type="LORA", r=modules[0].rank, lora_alpha=modules[0].alpha, lora_dropout=0.0,
        bias="none", fan_in_fan_out=False, target_modules=sorted(targets))
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2))
    save_tensors(tensors, folder / "adapter_model.safetensors")


# Fields of adapter_config.json that are read here, or do not change what the weights compute.
ADAPTER_FREE = {
    "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout",
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "auto_mapping", "megatron_core", "qalora_group_size", "eva_config"}
# Values of other fields that mean plain LoRA; so does all that is false or empty.
ADAPTER_PLAIN = dict(
    peft_type=["LORA"], bias=["none"], init_lora_weights=[True, "gaussian", "orthogonal", "eva"])


def load_adapters(policy: Policy, folder: Path) -> Policy:
    """Put the adapters of a folder of `save_adapters`, or of peft, on the policy, in place.

    Errors: ValueError for anything but plain LoRA.
    """
    path = folder / "adapter_config.json"
    config = read_json(path)
    with one_line_error(f"{path} is not of plain LoRA"):
        for name, value in config.items():
            if value and name not in ADAPTER_FREE and value not in ADAPTER_PLAIN.get(name, []):
                raise ValueError(f"{name} {value!r} is not implemented")
        rank = int(config["r"])
        alpha = float(config["lora_alpha"])
    keys = open_tensors(folder, "adapter_model")
    experts = {re.search("_moe_gen|generation_", key) is not None for key in keys}
    add_lora(policy, rank, alpha, tuple(EXPERTS[generates] for generates in sorted(experts)))
    assign(
        policy, folder, "adapter_model", adapter_keys(policy), torch.float32, policy.device)
    return policy


# ---- several GPUs ----

FORWARDS = (
    "append_text", "append_image", "image_states", "velocity", "sample_image", "score_image")


def shard(policy: Policy, dtype: torch.dtype | None = None) -> Policy:
    """Shard a policy over all ranks, in place, by FSDP2.

    Each block, the embedding and the head are cut in rows, and gathered when they are called.
    dtype: of gathered parameters, such as bf16 next to fp32 masters. Gradients are averaged over
    the ranks in fp32. What is small (norms, time and latent layers, connector, ViT embeddings,
    autoencoder) stays whole on every rank, and the caller sums its gradients.
    """
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in policy.parts:
        fully_shard(module, mp_policy=precision)
    # The root must hold no parameters: FSDP2 would withhold the gradients of those that several
    # calls use before one backward.
    small = {p for p in policy.parameters() if not isinstance(p, DTensor)}
    fully_shard(policy, ignored_params=small)
    for method in FORWARDS:
        if hasattr(policy, method):
            register_fsdp_forward_method(policy, method)
    numbers = sum(p.numel() for p in policy.parameters() if isinstance(p, DTensor))
    policy.sharded = True
    policy.gathered_bytes = numbers * (dtype.itemsize if dtype else 4)
    return policy


@contextmanager
def keep_gathered(policy: Policy, room: float | None = None):
    """Keep parameters whole once they are gathered, for the many calls of a rollout.

    This needs `room` for them on all ranks, in bytes; None is any number.
    """
    parts = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    keep = torch.tensor(int(room is None or policy.gathered_bytes <= room), device=policy.device)
    if policy.sharded:                          # ranks that disagree would wait for each other
        dist.all_reduce(keep, dist.ReduceOp.MIN)
    for module in parts:
        module.set_reshard_after_forward(not keep, recurse=False)
    try:
        yield
    finally:
        for module in parts:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def full_tensor(x: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks; any other as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full tensor, sharded as `like` is, if it is."""
    if not isinstance(like, DTensor):
        return value
    part = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return part.clone()                         # a view would keep the whole tensor in memory


# ---- what is trained ----


def freeze(policy: Policy, trained: tuple[str, ...], lora: int, checkpointing: bool) -> None:
    """Leave only the named experts trainable: adapters of rank `lora`, or at 0 all weights."""
    if lora:
        add_lora(policy, lora, 2.0 * lora, trained)
    for name, params in trainable_by_expert(policy).items():
        for p in params:
            p.requires_grad_(name in trained)
    for block in policy.blocks:
        block.checkpointing = checkpointing


def trainable_by_expert(policy: Policy) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters by expert."""
    groups = {name: [] for name in EXPERTS}
    for name, p in trainable(policy).items():
        groups[policy.expert_of(name)].append(p)
    return groups


def trainable(policy: nn.Module) -> dict[str, nn.Parameter]:
    """name -> parameter of what the run trains."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}
