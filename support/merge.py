"""One policy of two that were trained from one base: the changes of both, merged, on the base.

    python -m support.merge A B --base BASE --out C
"""

from pathlib import Path

import torch
from torch import Tensor

from support.checkpoint import (
    IMPLEMENTED, TOKENIZER_FILES, all_finite, open_tensors, save_tensors)
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


def open_trained(folder: Path, base: dict) -> dict:
    """Open the weights of a policy folder, as open_tensors does.

    Errors: ValueError for keys and shapes that are not the base's.
    """
    opened = open_tensors(folder, "ema")
    if differ := opened.keys() ^ base.keys():
        raise ValueError(f"{folder} and the base do not fit: {min(differ)} is in only one of them")
    for key, file in opened.items():
        shape, own = (each.get_slice(key).get_shape() for each in (file, base[key]))
        if shape != own:
            raise ValueError(f"{folder}: {key} has shape {shape}, the base {own}")
    return opened


def merge(first: Path, second: Path, base: Path, out: Path, bound: float = 2.0) -> None:
    """Write the policy folder `out`: the base, with the merged changes of two policies.

    What is not trained is the base's. Only the merged policy is held in memory.
    Errors: ValueError for what does not fit, and for an `out` that holds files.
    """
    opened, ae = open_tensors(base, "ema"), open_tensors(base, "ae")
    for name in ("llm", "vit"):
        read_json(base / f"{name}_config.json")                 # no policy loads without them
    trained = [open_trained(folder, opened) for folder in (first, second)]
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files already; give another --out")
    merged = {}
    for key, file in opened.items():
        stored = file.get_tensor(key)
        own = stored.float()
        changes = [tensors[key].get_tensor(key).float() - own for tensors in trained]
        merged[key] = (own + gaussian_merge(*changes, bound)).to(stored.dtype)
        if not all_finite(merged[key]):
            raise ValueError(f"{key} is not finite after merging; are {first} and {second} whole?")
    save_tensors(merged, out / "ema.safetensors")
    save_tensors({key: file.get_tensor(key) for key, file in ae.items()}, out / "ae.safetensors")
    for name in (*TOKENIZER_FILES, *(f"{part}_config.json" for part in IMPLEMENTED)):
        if (base / name).is_file():
            write_atomic(out / name, (base / name).read_bytes())


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(
        prog="support.merge", description="merge two policies that were trained from one base")
    ap.add_argument(
        "policies", nargs=2, type=Path, help="two policy folders"
    )
    ap.add_argument(
        "--base", type=Path, required=True, help="the policy folder that both were trained from"
    )
    ap.add_argument("--out", type=Path, required=True, help="the policy folder to write")
    ap.add_argument(
        "--bound", type=number(float, least=0), default=2.0,
        help="stds inside which changes are averaged")
    a = ap.parse_args(argv)
    with one_line("support.merge"):
        merge(*a.policies, a.base, a.out, a.bound)
        print(f"wrote {a.out}")


if __name__ == "__main__":
    main()
