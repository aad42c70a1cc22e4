"""Low-rank adapters of a policy: what they compute, and how to add and to switch them off."""

import contextlib

import torch
from torch import Tensor, nn

from policy import EXPERTS, Policy


class LoRA(nn.Module):
    """base(x) + alpha/rank * x A^T B^T [arXiv:2106.09685].

    The base is frozen, A and B are fp32 masters, B starts at zero.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = alpha
        self.enabled = True
        like = dict(dtype=torch.float32, device=base.weight.device)
        self.A = nn.Parameter(torch.randn(rank, base.in_features, **like) / rank)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        narrow = x @ self.A.T * (self.alpha / self.rank)                          # (..., rank)
        return y + (narrow @ self.B.T).to(y.dtype)


def add_lora(
    policy: Policy, rank: int, alpha: float, experts: tuple[str, ...] = EXPERTS
) -> Policy:
    """Freeze the policy and put adapters on the linear layers of `experts`, in place."""
    policy.requires_grad_(False)
    for expert in experts:
        for parent, name in policy.linear_layers(expert):
            setattr(parent, name, LoRA(getattr(parent, name), rank, alpha))
    return policy


def adapters(policy: Policy) -> dict[str, LoRA]:
    """Return the adapters by name."""
    return {name: module for name, module in policy.named_modules() if isinstance(module, LoRA)}


@contextlib.contextmanager
def adapters_off(policy: Policy):
    """Inside this block the policy is its own frozen reference."""
    found = adapters(policy).values()
    for adapter in found:
        adapter.enabled = False
    try:
        yield policy
    finally:
        for adapter in found:
            adapter.enabled = True
