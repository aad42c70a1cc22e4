"""One policy of two that were trained from one base: the changes of both, merged, on the base.

    python -m support.merge A B --base BASE --out C
"""

import json
import math
import shutil
from pathlib import Path

import torch
from torch import Tensor
from support.checkpoint import FLOATS, check_adapter, finite, open_tensors
from support.disk import one_line_error, read_json, replacing
from support.terminal import Arguments, one_line


def gaussian_merge(first: Tensor, second: Tensor, bound: float = 2.0) -> Tensor:
    """The merged change of one tensor from two policies' changes of it. [CoRL's code, after arXiv:2501.10661]

    Changes look Gaussian, and what was learned sits in their outliers. Inside mean +- bound * std, with the mean of both means and the
    smaller of both (unbiased) stds, changes are averaged; outside each is added whole. A large bound is the average, bound 0 the sum, and
    two equal changes are averaged inside but doubled outside. Symmetric; scales with the changes. A tensor that one policy left as it was,
    or of one element, has no window: the sum.
    """
    mean, spread = (first.mean() + second.mean()) / 2, torch.minimum(first.std(), second.std()) if first.numel() > 1 else 0.0
    low, high = mean - bound * spread, mean + bound * spread
    part = lambda change: torch.where((low < change) & (change < high), 0.5, 1.0) * change
    return part(first) + part(second)


def average_merge(first: Tensor, second: Tensor, bound: float = 0.0) -> Tensor:
    return (first + second) / 2


def inverse_norm_merge(first: Tensor, second: Tensor, bound: float = 0.0) -> Tensor:
    """Changes weighed by the inverse of their norms [CoRL's code]; 0 where one of them is 0, which is the limit."""
    one, two = first.norm(), second.norm()
    return (two * first + one * second) / (one + two).clamp(min=torch.finfo(first.dtype).tiny)

MERGES = {"gaussian": gaussian_merge, "average": average_merge, "inverse_norm": inverse_norm_merge}


def changes_of(folder: Path, base: dict):
    """key -> fp32 change of that tensor of the base, of a policy folder, or of a folder of adapters, whose dense change is alpha/r B A.
    ValueError, naming the first, for tensors that the base does not have, or not in that shape."""
    shape = lambda files, key: tuple(files[key].get_slice(key).get_shape())
    if (folder / "adapter_config.json").exists():
        config, files = read_json(folder / "adapter_config.json"), open_tensors(folder, "adapter_model")
        stems = {k.removeprefix("base_model.model.").rpartition(".lora_")[0] for k in files}
        with one_line_error(f"{folder / 'adapter_config.json'}", (ValueError,)):
            check_adapter(config, stems)
        factor = lambda key, side: f"base_model.model.{key.removesuffix('.weight')}.lora_{side}.weight"
        has = {f"{stem}.weight": (shape(files, factor(stem, "B"))[0], shape(files, factor(stem, "A"))[1]) for stem in sorted(stems)}
        scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        read = lambda key, side: files[factor(key, side)].get_tensor(factor(key, side)).float()
        change = lambda key: scale * read(key, "B") @ read(key, "A") if key in has else torch.zeros(shape(base, key))
    else:
        files = open_tensors(folder, "ema")
        has = {key: shape(files, key) for key in sorted(files)}
        change = lambda key: files[key].get_tensor(key).float() - base[key].get_tensor(key).float()
        if missing := sorted(base.keys() - has.keys()):
            raise ValueError(f"{folder} has no {missing[0]}, which the base has")
    for key, held in has.items():
        if key not in base or held != shape(base, key):
            raise ValueError(f"{folder}: {key} has shape {held}, the base {shape(base, key) if key in base else 'has no such tensor'}")
    return change


def merge(first: Path, second: Path, base: Path, out: Path, how: str = "gaussian", bound: float = 2.0) -> None:
    """Write the policy folder `out`: the base and the merged changes of two policies, or adapters, that were trained from it. One tensor
    is in memory at a time, so that two 7B policies merge on any machine; what is not trained is the base's."""
    files = open_tensors(base, "ema")
    one, two = (changes_of(folder, files) for folder in (first, second))
    if not bound >= 0:
        raise ValueError(f"--bound {bound}: must be at least 0")
    if out.resolve() in (first.resolve(), second.resolve(), base.resolve()):
        raise ValueError(f"{out} is one of the folders that are merged; give another --out")
    out.mkdir(parents=True, exist_ok=True)

    def merged(key: str) -> Tensor:
        own = files[key].get_tensor(key)
        value = (own.float() + MERGES[how](one(key), two(key), bound)).to(own.dtype)
        if not finite(value):
            raise ValueError(f"{key} is not finite after merging; are {first} and {second} whole?")
        return value

    save_stream({key: files[key].get_slice(key) for key in sorted(files)}, merged, out / "ema.safetensors")
    for path in sorted(base.iterdir()):
        if path.suffix in (".json", ".txt") and not path.name.startswith("ema.") or path.name.startswith("ae."):
            with replacing(out / path.name) as part:
                shutil.copyfile(path, part)


def save_stream(slices: dict, value, path: Path) -> None:
    """Write a safetensors file tensor by tensor: the header from slices, key -> shape and dtype, then value(key) in that order."""
    header, at = {}, 0
    for key, held in slices.items():
        size = math.prod(held.get_shape()) * FLOATS[held.get_dtype()].itemsize
        header[key] = dict(dtype=held.get_dtype(), shape=held.get_shape(), data_offsets=[at, at + size])
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in slices:
            file.write(value(key).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="support.merge", description="merge two policies that were trained from one base", allow_abbrev=False)
    ap.add_argument("policies", nargs=2, type=Path, help="two policy folders, or folders of adapters")
    ap.add_argument("--base", type=Path, required=True, help="the policy folder that both were trained from")
    ap.add_argument("--out", type=Path, required=True, help="the policy folder to write")
    ap.add_argument("--how", choices=list(MERGES), default="gaussian")
    ap.add_argument("--bound", type=float, default=2.0, help="stds inside which gaussian averages")
    a = ap.parse_args(argv)
    with one_line("support.merge"):
        merge(*a.policies, a.base, a.out, a.how, a.bound)
        print(f"wrote {a.out}")


if __name__ == "__main__":
    main()
