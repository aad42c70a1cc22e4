"""Frozen models that rewards ask: SigLIP, open_clip, a yes/no judge, a captioner; and the language model that writes questions.

`load_*` reads a model from a local folder or hub name through transformers or open_clip, from safetensors and without remote code, and
refuses weights that are damaged or not exactly the config's. No file of ours is imported here: this one can be copied beside rewards.py,
or alone.

Notation: N images (N, 3, H, W) in [0, 1], P patches, D embedding width.
"""

import contextlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from policy import declare_torchvision_ops


@dataclass
class Reading(contextlib.AbstractContextManager):
    """A context in which what the libraries raise at missing, damaged or other files is one line: an OSError where it was one, else a
    ValueError. tokenizers raises Exception itself, which an except clause could catch only together with all others."""
    path: str

    def __exit__(self, kind, error, trace):
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.errors import StrictDataclassError as Strict
        from safetensors import SafetensorError
        known = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, ImportError, SafetensorError, Strict)
        if isinstance(error, torch.OutOfMemoryError):
            return
        if kind is Exception or isinstance(error, known):
            where = "" if Path(self.path).is_dir() else f" (no such folder; as a hub name it is looked for in {HF_HUB_CACHE} and online)"
            files = "config, safetensors, tokenizer, preprocessor files"
            what = f"{self.path} cannot be loaded, must be a folder or hub name with {files}{where}: "
            raise (OSError if isinstance(error, OSError) else ValueError)(what + " ".join(str(error).split())[:300]) from error


def frozen(model: torch.nn.Module, device, **faulty) -> torch.nn.Module:
    faulty["not_finite"] = [n for n, x in model.state_dict().items() if x.numel() and not torch.stack(x.aminmax()).isfinite().all()]
    if wrong := {what: sorted(map(str, keys))[:4] for what, keys in faulty.items() if keys}:
        raise ValueError(f"its weights are not those of its config: {wrong}")
    return model.to(device).eval().requires_grad_(False)


def kind_of(path: str) -> str:
    """The model_type of a local folder or hub name. Errors: as load_model's."""
    declare_torchvision_ops()
    import transformers
    with Reading(path):
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False).model_type


def load_model(auto_class: str, model_types: tuple[str, ...], path: str, device, dtype=torch.float32,
               parts: tuple[str, ...] = ("AutoTokenizer", "AutoImageProcessor"), harmless: str = "$."):
    """(frozen model, *parts) of a local folder or hub name by transformers' auto classes, without remote code. No model_types: any.
    harmless: a pattern of keys that an older transformers stored, or does not store, and that no output depends on.
    Errors: OSError for missing files, ValueError for another kind of model and for weights that are damaged or not exactly the config's:
    transformers would draw some."""
    declare_torchvision_ops()
    import transformers
    transformers.utils.logging.disable_progress_bar()           # of the loading of weights, a bar per referee
    read = lambda auto: auto.from_pretrained(path, trust_remote_code=False)  # noqa: E731
    with Reading(path):
        found = read(transformers.AutoConfig).model_type
        if model_types and found not in model_types:
            raise ValueError(f"it holds a {found} model, expected {' or '.join(model_types)}")
        model, info = getattr(transformers, auto_class).from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
        info = {what: [key for key in keys if not re.search(harmless, str(key))] for what, keys in info.items()}
        return frozen(model, device, **info), *(read(getattr(transformers, part)) for part in parts)


def to_pixels(images: Tensor, size: tuple[int, int], mode: str, mean, std) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> (N, 3, *size) as a vision tower reads it: antialiased resize, no crop, then (x - mean) / std."""
    x = images.float()
    if x.shape[-2:] != tuple(size):
        x = F.interpolate(x, size=tuple(size), mode=mode, antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (mean, std))
    return (x - mean) / std


def processor_pixels(images: Tensor, model, processor) -> Tensor:
    """What transformers' image processor would hand to the model, without its detour through 8 bits."""
    size, mode = (processor.size["height"], processor.size["width"]), {2: "bilinear", 3: "bicubic"}[int(processor.resample)]
    return to_pixels(images.to(model.device), size, mode, processor.image_mean, processor.image_std).to(model.dtype)


def _batched(function, batch_size: int, *columns) -> Tensor:
    """`function` on slices of at most `batch_size` rows of all columns, joined again."""
    starts = range(0, len(columns[0]), batch_size)
    return torch.cat([function(*(column[i:i + batch_size] for column in columns)) for i in starts])


def load_language_model(path: str, *, device="cpu"):
    """(frozen model, tokenizer) of any causal language model of transformers, in bf16 where there is a GPU. Errors: see load_model."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return load_model("AutoModelForCausalLM", (), path, device, dtype, ("AutoTokenizer",))


def numbers_in(path: str) -> int:
    """How many numbers the safetensors of a folder, or of a hub name that was fetched before, hold; 0 where none lies here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    from safetensors import safe_open
    try:
        folder = path if Path(path).is_dir() else snapshot_download(path.removeprefix("hf-hub:"), local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return 0
    total = 0
    for file in Path(folder).glob("*.safetensors"):
        with Reading(path), safe_open(file, framework="pt") as held:
            total += sum(math.prod(held.get_slice(key).get_shape()) for key in held.keys())
    return total
