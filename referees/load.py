"""Loads the frozen models that rewards ask, and holds what they share.

A model is read from a local folder or hub name through transformers, from safetensors and without
remote code. Weights that are damaged, or not exactly those of the config, are refused.

Notation: N images (N, 3, H, W) in [0, 1].
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy import declare_torchvision_ops
from support.checkpoint import all_finite, open_file
from support.disk import one_line_error
from support.terminal import say


def loading_errors(path: str) -> one_line_error:
    """A context in which what libraries raise at the files of a model becomes one line."""
    from huggingface_hub.constants import HF_HUB_CACHE

    what = (
        f"{path} cannot be loaded, must be a folder or hub name with config, safetensors, "
        "tokenizer, preprocessor files")
    if not Path(path).is_dir():
        what += f" (no such folder; as a hub name it is looked for in {HF_HUB_CACHE} and online)"
    return one_line_error(what)


def freeze_model(model: nn.Module, device, **mismatches) -> nn.Module:
    """The model on its device, in eval mode, without gradients.

    mismatches: kind -> keys in which weights and config differ. Errors: ValueError if there are
    any, or a weight is not finite.
    """
    mismatches["not_finite"] = [
        name for name, x in model.state_dict().items() if not all_finite(x)]
    faults = {kind: sorted(map(str, keys))[:4] for kind, keys in mismatches.items() if keys}
    if faults:
        raise ValueError(f"its weights are not those of its config: {faults}")
    return model.to(device).eval().requires_grad_(False)


def kind_of(path: str) -> str:
    """The model_type of a local folder or hub name. Errors: as load_model's."""
    declare_torchvision_ops()
    import transformers

    with loading_errors(path):
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False).model_type


def load_model(
    auto_class: str, model_type: str, path: str, device, dtype=torch.float32,
    parts: tuple[str, ...] = ("AutoTokenizer", "AutoImageProcessor"), heads: tuple[str, ...] = ()
) -> list:
    """[frozen model, *parts] of a local folder or hub name, by transformers' auto classes.

    model_type: the one that is accepted, "" for any. heads: prefixes of keys that a release holds
    for another use, which are left out.
    Errors, in one line: OSError for missing files; ValueError for another kind of model, and for
    weights that are damaged or not exactly the config's, which transformers would draw at random.
    """
    kind = kind_of(path)
    import transformers

    transformers.utils.logging.disable_progress_bar()           # one bar per model says nothing
    with loading_errors(path):
        if model_type and kind != model_type:
            raise ValueError(f"it holds a {kind} model, expected {model_type}")
        model, mismatches = getattr(transformers, auto_class).from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, dtype=dtype,
            output_loading_info=True, ignore_mismatched_sizes=True)
        surplus = mismatches["unexpected_keys"]
        mismatches["unexpected_keys"] = [key for key in surplus if not key.startswith(heads)]
        out = [freeze_model(model, device, **mismatches)]
        for part in parts:
            out.append(getattr(transformers, part).from_pretrained(path, trust_remote_code=False))
    return out


def to_pixels(images: Tensor, size: tuple[int, int], mode: str, mean, std) -> Tensor:
    """Images as a vision tower reads them, (N, 3, *size): resized, not cropped, normalised."""
    x = images.float()
    if x.shape[-2:] != size:
        x = F.interpolate(x, size=size, mode=mode, antialias=True, align_corners=False)
        x = x.clamp(0, 1)
    mean, std = torch.tensor([mean, std], device=x.device)[..., None, None]         # (3, 1, 1) each
    return (x - mean) / std


@dataclass
class Viewer:
    """A model that sees, with its tokenizer and image processor."""

    model: nn.Module
    tokenizer: Callable
    image_processor: Callable
    batch_size: int = 128

    @property
    def side(self) -> int:
        return self.model.config.vision_config.image_size

    def pixels(self, images: Tensor) -> Tensor:
        """(N, 3, side, side): what the image processor would give, without its detour by 8 bits."""
        processor = self.image_processor
        mode = {2: "bilinear", 3: "bicubic"}[int(processor.resample)]
        pixels = to_pixels(
            images.to(self.model.device), (self.side, self.side), mode, processor.image_mean,
            processor.image_std)
        return pixels.to(self.model.dtype)


def in_batches(function: Callable, batch_size: int, *columns) -> Tensor:
    """function(*columns) on at most `batch_size` rows of all columns at once, concatenated."""
    out = []
    for i in range(0, len(columns[0]), batch_size):
        out.append(function(*(column[i:i + batch_size] for column in columns)))
    return torch.cat(out)


def warn_of_cut(reward: str, text_ids: Callable, texts: list[str]) -> None:
    """Say how many texts the model of a reward does not read to their end.

    text_ids: texts -> what the model reads. Of a text that is cut it stays the same with a word
    more. The longest texts are tried, down to the first that is read whole.
    """

    def is_cut(text: str) -> bool:
        return text_ids([text]) == text_ids([f"{text} more"])

    texts = sorted(set(texts), key=len, reverse=True)
    if cut := list(itertools.takewhile(is_cut, texts)):
        say(f"warning: the model of --{reward} reads too few tokens for {len(cut)} of {len(texts)} "
            f"texts, whose ends earn nothing, such as {cut[0][:60]!r}")


def folder_of(path: str) -> Path | None:
    """A local folder, or that of a hub name in the cache, which its commit names; else None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path.removeprefix("hf-hub:"), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def numbers_in(path: str) -> int:
    """How many numbers the safetensors of a folder hold, or of a hub name in the cache; else 0."""
    folder = folder_of(path)
    total = 0
    if folder is None:
        return 0
    for file in folder.glob("[!.]*.safetensors"):
        with loading_errors(path):
            tensors = open_file(file)
            for key in tensors.keys():
                total += math.prod(tensors.get_slice(key).get_shape())
    return total
