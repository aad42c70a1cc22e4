"""Low-rank adapters of a policy: what they compute, and how to add and to switch them off."""

import contextlib

import torch
from torch import Tensor, nn

from policy import GENERATION, UNDERSTANDING, Policy


class LoRA(nn.Module):
    """base(x) + alpha/rank * x A^T B^T [arXiv:2106.09685].

    The base is frozen, A and B are fp32 masters, B starts at zero.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.rank, self.alpha = base.requires_grad_(False), rank, alpha
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
    policy: Policy, rank: int, alpha: float,
    experts: tuple[int, ...] = (UNDERSTANDING, GENERATION),
) -> Policy:
    """Freeze the policy and put adapters on q, k, v, o and the MLP of `experts`, in place."""
    policy.requires_grad_(False)
    for block in policy.blocks:
        for e in experts:
            expert = block.experts[e]
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                adapter = LoRA(getattr(expert, name), rank, alpha)
                setattr(expert, name, adapter)
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
