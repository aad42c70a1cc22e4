"""torch.compile of the two halves of a block that are no attention."""

import functools
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from policy import Policy


def compile_experts(policy: Policy, backend: str | Callable = "inductor") -> None:
    """Compile `project` and `finish` of every expert, in place, for any number of tokens.

    All blocks share their graphs: one each for acting and learning, with adapters and without, and
    for a single token; at most 8 of either function.
    """
    compile_one = functools.partial(torch.compile, dynamic=True, backend=backend)
    for block in policy.blocks:
        for expert in block.experts:
            expert.project = functools.partial(project_tokens, compile_one(expert.project))
            expert.finish = functools.partial(finish_tokens, compile_one(expert.finish))


def project_tokens(project: Callable, x: Tensor) -> tuple[Tensor, ...]:
    """Expert.project of (N, L, D), all tokens in one row."""
    parts = project(in_one_row(x))
    return tuple(rearrange(part, "1 h (n l) d -> n h l d", n=len(x)) for part in parts)


def finish_tokens(finish: Callable, x: Tensor, attended: Tensor) -> Tensor:
    """Expert.finish of (N, L, D), all tokens in one row."""
    return finish(in_one_row(x), in_one_row(attended)).view_as(x)


def in_one_row(x: Tensor) -> Tensor:
    """(N, L, D) -> (1, N*L, D), a copy: of a view a graph would know its base, and differ by it."""
    return x.reshape(1, -1, x.shape[-1]).clone()
