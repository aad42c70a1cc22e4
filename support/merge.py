"""One policy of two that were trained from one base: the changes of both, merged, on the base.

    python -m support.merge A B --base BASE --out C
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from support.checkpoint import FLOATS, adapter_key, all_finite, open_adapters, open_tensors
from support.disk import replacing
from support.terminal import Arguments, one_line


def gaussian_merge(first: Tensor, second: Tensor, bound: float = 2.0) -> Tensor:
    """The merged change of one tensor from two policies' changes of it. [CoRL's code, after arXiv:2501.10661]

    Changes look Gaussian, and what was learned sits in their outliers. Inside mean +- bound * std, with the mean of
    both means and the smaller of both (unbiased) stds, changes are averaged; outside, each is added whole. A large
    bound is the average, bound 0 the sum; two equal changes are averaged inside but doubled outside. Symmetric;
    scales with the changes. A tensor that one policy left as it was, or of one element, has no window: the sum.
    """
    mean, spread = (first.mean() + second.mean()) / 2, 0.0
    if first.numel() > 1:
        spread = torch.minimum(first.std(), second.std())
    low, high = mean - bound * spread, mean + bound * spread
    merged = 0
    for change in (first, second):
        inside = (low < change) & (change < high)
        merged = merged + torch.where(inside, 0.5, 1.0) * change
    return merged


def average_merge(first: Tensor, second: Tensor, bound: float = 0.0) -> Tensor:
    return (first + second) / 2


MERGES = {"gaussian": gaussian_merge, "average": average_merge}


def changes_of(folder: Path, base: dict) -> Callable[[str], Tensor]:
    """A function key -> fp32 change of that tensor of the base, by a policy folder or a folder of adapters.

    Errors: ValueError, which names the first, for tensors that the base does not have, or not in that shape.
    """
    if (folder / "adapter_config.json").exists():
        shapes, change = adapter_changes(folder, base)
    else:
        shapes, change = policy_changes(folder, base)
    for key, shape in shapes.items():
        own = shape_of(base, key) if key in base else "no such tensor"
        if shape != own:
            raise ValueError(f"{folder}: {key} has shape {shape}, the base has {own}")
    return change


def shape_of(opened: dict, key: str) -> tuple[int, ...]:
    return tuple(opened[key].get_slice(key).get_shape())


def policy_changes(folder: Path, base: dict) -> tuple[dict, Callable[[str], Tensor]]:
    """(key -> shape, key -> change) of a policy folder."""
    opened = open_tensors(folder, "ema")
    for key in sorted(base.keys() - opened.keys()):
        raise ValueError(f"{folder} has no {key}, which the base has")

    def change(key: str) -> Tensor:
        return opened[key].get_tensor(key).float() - base[key].get_tensor(key).float()

    return {key: shape_of(opened, key) for key in sorted(opened)}, change


def adapter_changes(folder: Path, base: dict) -> tuple[dict, Callable[[str], Tensor]]:
    """(key -> shape, key -> change) of the weights that a folder of adapters changes; the change is alpha/rank B A."""
    rank, alpha, opened = open_adapters(folder)
    stems = sorted({key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in opened})
    shapes = {}
    for weight in (f"{stem}.weight" for stem in stems):
        rows, columns = shape_of(opened, adapter_key(weight, "B"))[0], shape_of(opened, adapter_key(weight, "A"))[1]
        shapes[weight] = (rows, columns)

    def change(key: str) -> Tensor:
        if key not in shapes:
            return torch.zeros(shape_of(base, key))
        A, B = (opened[name].get_tensor(name).float() for name in (adapter_key(key, "A"), adapter_key(key, "B")))
        return alpha / rank * B @ A

    return shapes, change


def merge(first: Path, second: Path, base: Path, out: Path, how: str = "gaussian", bound: float = 2.0) -> None:
    """Write the policy folder `out`: the base and the merged changes of two policies, or adapters, trained from it.

    One tensor is in memory at a time, so that two 7B policies merge on any machine. What is not trained is the base's.
    """
    opened = open_tensors(base, "ema")
    change_one, change_two = changes_of(first, opened), changes_of(second, opened)
    if not bound >= 0:
        raise ValueError(f"--bound {bound}: must be at least 0")
    if out.resolve() in (first.resolve(), second.resolve(), base.resolve()):
        raise ValueError(f"{out} is one of the folders that are merged; give another --out")
    out.mkdir(parents=True, exist_ok=True)

    def merge_tensor(key: str) -> Tensor:
        own = opened[key].get_tensor(key)
        change = MERGES[how](change_one(key), change_two(key), bound)
        value = (own.float() + change).to(own.dtype)
        if not all_finite(value):
            raise ValueError(f"{key} is not finite after merging; are {first} and {second} whole?")
        return value

    slices = {key: opened[key].get_slice(key) for key in sorted(opened)}
    save_stream(slices, merge_tensor, out / "ema.safetensors")
    for path in sorted(base.iterdir()):
        small = path.suffix in (".json", ".txt") and not path.name.startswith("ema.")
        if small or path.name.startswith("ae."):
            with replacing(out / path.name) as file:
                shutil.copyfile(path, file)


def save_stream(slices: dict, value: Callable[[str], Tensor], path: Path) -> None:
    """Write a safetensors file tensor by tensor: the header from key -> slice, then value(key) in that order."""
    header, start = {}, 0
    for key, tensor in slices.items():
        dtype, shape = tensor.get_dtype(), tensor.get_shape()
        end = start + math.prod(shape) * FLOATS[dtype].itemsize
        header[key] = dict(dtype=dtype, shape=shape, data_offsets=[start, end])
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in slices:
            file.write(value(key).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="support.merge", description="merge two policies that were trained from one base")
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
