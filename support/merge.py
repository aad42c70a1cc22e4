"""One policy of two that were trained from one base: the changes of both, merged, on the base.

    python -m support.merge A B --base BASE --out C
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from support.checkpoint import (
    IMPLEMENTED, TOKENIZER_FILES, adapter_key, all_finite, open_adapters, open_tensors,
    save_tensors)
from support.disk import read_json, write_atomic
from support.terminal import Arguments, number, one_line


def gaussian_merge(first: Tensor, second: Tensor, bound: float = 2.0) -> Tensor:
    """The merged change of one tensor, from two policies' changes. [CoRL, after arXiv:2501.10661]

    Changes look Gaussian, and what was learned sits in their outliers. Inside mean +- bound * std,
    with the mean of both means and the smaller of both (unbiased) stds, changes are averaged;
    outside, each is added whole. A large bound is the average, bound 0 the sum; two equal changes
    are averaged inside but doubled outside. Symmetric; scales with the changes. A tensor that one
    policy left as it was, or of one element, has no window: the sum.
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


def changes_of(folder: Path, base: dict) -> Callable[[str, Tensor], Tensor]:
    """A function (key, the base's tensor) -> its fp32 change, by a policy folder or by adapters.

    Errors: ValueError for tensors that the base does not have, or not in that shape, and for
    missing ones.
    """
    adapted = (folder / "adapter_config.json").exists()
    if adapted:
        rank, alpha, opened = open_adapters(folder)
        stems = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in opened}
        keys = {f"{stem}.weight" for stem in stems}
        factors = {adapter_key(key, factor) for key in keys for factor in ("A", "B")}
        differ = keys - base.keys() | opened.keys() ^ factors
    else:
        opened = open_tensors(folder, "ema")
        differ = opened.keys() ^ base.keys()
    if differ:
        raise ValueError(f"{folder} and the base do not fit: {min(differ)} is in only one of them")

    def read(key: str) -> Tensor:
        return opened[key].get_tensor(key).float()

    def change(key: str, own: Tensor) -> Tensor:
        if not adapted:
            value = read(key)
        elif key in keys:
            value = alpha / rank * read(adapter_key(key, "B")) @ read(adapter_key(key, "A"))
        else:
            return torch.zeros_like(own)
        if value.shape != own.shape:
            shapes = f"{tuple(value.shape)}, the base {tuple(own.shape)}"
            raise ValueError(f"{folder}: {key} has shape {shapes}")
        return value if adapted else value - own

    return change


def merge(
    first: Path, second: Path, base: Path, out: Path, how: str = "gaussian", bound: float = 2.0
) -> None:
    """Write the policy folder `out`: the base, with the merged changes of two policies or adapters.

    What is not trained is the base's. Only the merged policy is held in memory.
    Errors: ValueError for what does not fit, and for an `out` that holds files.
    """
    opened, ae = open_tensors(base, "ema"), open_tensors(base, "ae")
    for name in ("llm", "vit"):
        read_json(base / f"{name}_config.json")                 # no policy loads without them
    change_one, change_two = changes_of(first, opened), changes_of(second, opened)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files already; give another --out")
    merged = {}
    for key, file in opened.items():
        stored = file.get_tensor(key)
        own = stored.float()
        change = MERGES[how](change_one(key, own), change_two(key, own), bound)
        merged[key] = (own + change).to(stored.dtype)
        if not all_finite(merged[key]):
            raise ValueError(f"{key} is not finite after merging; are {first} and {second} whole?")
    out.mkdir(parents=True, exist_ok=True)
    save_tensors(merged, out / "ema.safetensors")
    save_tensors({key: file.get_tensor(key) for key, file in ae.items()}, out / "ae.safetensors")
    for name in (*TOKENIZER_FILES, *(f"{part}_config.json" for part in IMPLEMENTED)):
        if (base / name).is_file():
            write_atomic(out / name, (base / name).read_bytes())


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(
        prog="support.merge", description="merge two policies that were trained from one base")
    ap.add_argument(
        "policies", nargs=2, type=Path, help="two policy folders, or folders of adapters"
    )
    ap.add_argument(
        "--base", type=Path, required=True, help="the policy folder that both were trained from"
    )
    ap.add_argument("--out", type=Path, required=True, help="the policy folder to write")
    ap.add_argument("--how", choices=list(MERGES), default="gaussian")
    ap.add_argument(
        "--bound", type=number(float, least=0), default=2.0,
        help="stds inside which gaussian averages")
    a = ap.parse_args(argv)
    with one_line("support.merge"):
        merge(*a.policies, a.base, a.out, a.how, a.bound)
        print(f"wrote {a.out}")


if __name__ == "__main__":
    main()
