"""grpo.py gives the numbers of TRL and of Flow-GRPO (golden/grpo_losses, golden/flow_steps).

Claimed of TRL: the 144 rows of the losses grpo, bnpo, dr_grpo and dapo with all their metrics (the 20 rows
of cispo are another loss), and the 9 rows of sum_then_normalize in which every sample has a score. In 9 more
rows some sample was scored by no function: grpo.py refuses such a batch. The 6 rows of normalize_then_sum are
another aggregation.
Claimed of Flow-GRPO: all 8 advantages.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo import group_advantage, grpo_loss

GOLDEN = Path(__file__).parent / "golden"
TRL = json.loads((GOLDEN / "grpo_losses" / "losses.json").read_text())
ROWS = [dict(zip(TRL["columns"], row)) for row in TRL["rows"]]


@pytest.fixture(scope="module")
def tensors():
    return load_file(GOLDEN / "grpo_losses" / "losses.safetensors")


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_loss_gradient_and_metrics_agree_with_trl(loss_type, tensors):
    rows = [row for row in ROWS if row["loss_type"] == loss_type]
    assert len(rows) == 36
    for row in rows:
        names = ("logps", "old", "ref", "mask", "advantages", "grads")
        logp, old, ref, mask, adv, gradients = (tensors[f"ds{row['dataset']}.{name}"] for name in names)
        parts = row["accum"]
        per, total = {
            "grpo": ("sequence", len(mask) * parts),
            "bnpo": ("token", mask.sum() * parts),
            "dr_grpo": ("constant", len(mask) * row["max_completion_length"] * parts),
            "dapo": ("token", row["num_items_in_batch"]),
        }[loss_type]
        logp = logp.clone().requires_grad_()
        loss, stats = grpo_loss(
            logp, old if row["old_given"] else None, adv, mask, total=total, per=per, level=row["level"],
            low=row["epsilon_low"], high=row["epsilon_high"], delta=row["delta"], beta=row["beta"],
            logp_ref=ref if row["beta"] else None, bias_correction_kl=row["bias_correction_kl"])
        assert loss.item() == pytest.approx(row["loss"], rel=2e-6, abs=1e-7), row
        (gradient,) = torch.autograd.grad(loss, logp)
        torch.testing.assert_close(gradient, gradients[row["grad_index"]], rtol=1e-5, atol=1e-7)
        metrics = dict(zip(TRL["metric_names"], row["metrics"]))
        assert metrics.pop("cispo_clip_ratio") is None
        metrics = {name: value for name, value in metrics.items() if value is not None}
        ours = {name: stats[name].item() for name in metrics}
        assert ours == pytest.approx(metrics, rel=1e-5, abs=1e-7), row


def test_the_other_rows_of_trl_are_those_of_cispo():
    assert [row["loss_type"] for row in ROWS].count("cispo") == len(ROWS) - 4 * 36


def test_advantages_agree_with_trl_if_every_sample_has_a_score():
    complete = 0
    for row in TRL["advantages"]:
        if row["aggregation"] != "sum_then_normalize":
            continue
        rows = row["rewards_per_func"]
        scores = torch.tensor([[math.nan if x is None else x for x in rewards] for rewards in rows])
        reward = (scores * torch.tensor(row["reward_weights"])).nansum(1)
        reward = reward.masked_fill(scores.isnan().all(1), math.nan)
        G, options = row["num_generations"], dict(scale=row["scale_rewards"], std="unbiased")
        if reward.isnan().any():
            with pytest.raises(ValueError, match="finite"):
                group_advantage(reward, G, **options)
        else:
            complete += 1
            expected = torch.tensor(row["advantages"])
            adv = group_advantage(reward, G, **options)
            torch.testing.assert_close(adv, expected, rtol=1e-5, atol=1e-6)
    assert complete == 9


def test_advantages_agree_with_flow_grpo():
    rows = json.loads((GOLDEN / "flow_steps" / "flow_steps.json").read_text())["advantages"]
    assert [row["global_std"] for row in rows] == [False, True] * 4
    for row in rows:
        order = sorted(range(len(row["prompts"])), key=lambda i: row["prompts"][i])
        reward = torch.tensor(row["rewards"], dtype=torch.float64)[order]
        expected = torch.tensor(row["advantages"], dtype=torch.float64)[order]
        scale = "batch" if row["global_std"] else "group"
        adv = group_advantage(reward, row["prompts"].count("p0"), scale=scale)
        torch.testing.assert_close(adv, expected, rtol=1e-9, atol=1e-12)
