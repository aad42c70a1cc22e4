"""One policy of two that were trained from one base: the changes of both, merged, on the base.

    python -m support.merge A B --base BASE --out C
"""

from pathlib import Path

import torch
from torch import Tensor

from support.checkpoint import all_finite, load_policy, open_tensors, release_keys, save_policy
from support.terminal import Arguments


def gaussian_merge(first: Tensor, second: Tensor, bound: float = 2.0) -> Tensor:
    """The merged change of one tensor, from two policies' changes. [CoRL, after arXiv:2501.10661]

    Changes look Gaussian, and what was learned sits in their outliers. Inside mean +- bound * std,
    with the mean of both means and the smaller of both (unbiased) stds, changes are averaged;
    outside, each is added whole. A large bound is the average, bound 0 the sum; two equal changes
    are averaged inside but doubled outside. Symmetric; scales with the changes. A tensor that one
    policy left as it was has no window: the sum.
    """
    mean = (first.mean() + second.mean()) / 2
    spread = torch.minimum(first.std(), second.std())
    merged = 0
    for change in (first, second):
        inside = (change - mean).abs() < bound * spread
        merged = merged + torch.where(inside, 0.5, 1.0) * change
    return merged


def open_trained(folder: Path, stem: str, base: dict[str, Tensor]) -> dict:
    """Open the weights of a policy folder, as open_tensors does.

    Errors: ValueError for keys and shapes that are not the base's.
    """
    opened = open_tensors(folder, stem)
    if differ := opened.keys() ^ base.keys():
        raise ValueError(f"{folder} and the base do not fit: {min(differ)} is in only one of them")
    for key, file in opened.items():
        shape = file.get_slice(key).get_shape()
        own = list(base[key].shape)
        if shape != own:
            raise ValueError(f"{folder}: {key} has shape {shape}, the base {own}")
    return opened


def merge(first: Path, second: Path, base: Path, out: Path) -> None:
    """Write the policy folder `out`: the base, with the merged changes of two policies.

    What is not trained is the base's. Only the merged policy is held in memory.
    Errors: ValueError for what does not fit, and for an `out` that holds files.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files already; give another --out")
    policy = load_policy(base)
    state = policy.state_dict()
    weights = {key: state[name] for key, name in release_keys(policy).items()}
    trained = [open_trained(folder, policy.stem, weights) for folder in (first, second)]
    for key, x in weights.items():
        changes = [tensors[key].get_tensor(key).float() - x.float() for tensors in trained]
        x += gaussian_merge(*changes)
        if not all_finite(x):
            raise ValueError(f"{key} is not finite after merging; are {first} and {second} whole?")
    save_policy(policy, out)


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(
        prog="support.merge", description="merge two policies that were trained from one base")
    ap.add_argument("policies", nargs=2, type=Path, help="two policy folders")
    ap.add_argument(
        "--base", type=Path, required=True, help="the policy folder that both were trained from")
    ap.add_argument("--out", type=Path, required=True, help="the policy folder to write")
    ap.run(run, argv)


def run(a) -> str:
    """Carry out a parsed command line; returns what to print."""
    merge(*a.policies, a.base, a.out)
    return f"wrote {a.out}"


if __name__ == "__main__":
    main()
