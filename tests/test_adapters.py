"""Low-rank adapters: what they compute, where they sit, and the policy without them."""

import pytest
import torch

from sample import TOY
from support.checkpoint import load_policy
from support.lora import LoRA, adapters, adapters_off, add_lora

LEAVES = ("q", "k", "v", "o", "gate", "up", "down")


def test_an_adapter_adds_alpha_over_rank_of_its_product():
    base, x = torch.nn.Linear(5, 4), torch.randn(3, 5)
    adapter = LoRA(base, rank=2, alpha=6.0)
    torch.nn.init.normal_(adapter.B)
    torch.testing.assert_close(adapter(x), base(x) + 3 * x @ adapter.A.T @ adapter.B.T, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_adapters_start_as_the_policy_and_switch_off():
    policy = load_policy(TOY)

    def logits():
        return policy.append_text(policy.empty(1), torch.arange(5)[None])[0]

    base = logits()
    add_lora(policy, rank=2, alpha=4.0)
    assert torch.equal(logits(), base)
    for adapter in adapters(policy).values():
        torch.nn.init.normal_(adapter.B, std=0.1)
    with adapters_off(policy):
        assert torch.equal(logits(), base)
    assert (logits() - base).abs().max() > 1e-2


def test_adapters_are_switched_on_again_after_an_error():
    policy = add_lora(load_policy(TOY), rank=2, alpha=4.0)
    with pytest.raises(RuntimeError), adapters_off(policy):
        raise RuntimeError
    assert all(adapter.enabled for adapter in adapters(policy).values())


def test_adapters_sit_on_all_projections_of_the_named_experts_and_train_alone():
    policy = add_lora(load_policy(TOY), rank=2, alpha=4.0, experts=("generation",))
    names = {f"blocks.{n}.experts.1.{leaf}" for n in range(len(policy.blocks)) for leaf in LEAVES}
    assert adapters(policy).keys() == names
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{factor}" for name in names for factor in "AB"}
