"""What GRPO is, as properties of grpo.py, and agreement with numbers that published code produced (tests/golden).

Claimed of golden/grpo_losses: the 144 rows of the losses grpo, bnpo, dr_grpo and dapo (the 20 cispo rows are another loss), with
all their metrics, and of the 24 advantage rows the 9 of sum_then_normalize in which every sample has a score. In 9 more of them
some sample was scored by no function: grpo.py refuses these batches, and their complete groups agree under scale group and none.
The 6 rows of normalize_then_sum are another aggregation.
Claimed of golden/flow_steps: all 8 advantage rows.
"""

import doctest
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributions import Categorical, kl_divergence

import grpo
from grpo import (LOG_RATIO_BOUND, average, bounded_exp, clipped_surrogate, group_advantage,
    grpo_loss, importance_ratio, kl_k3, loss_stats, token_logp)

GOLDEN = Path(__file__).parent / "golden"
LOSSES = json.loads((GOLDEN / "grpo_losses" / "losses.json").read_text())
SCALES, STDS = ("group", "batch", "none"), ("population", "unbiased")
LEVELS, UNITS = ("token", "sequence"), ("sequence", "token", "constant")
seeds = st.integers(0, 2**31)
numbers = st.floats(-3, 3, allow_subnormal=False)


def batch(seed, N=8, L=6):
    """Random logp, logp_old, logp_ref, adv, mask in float64; ragged, the second sequence fully masked; many ratios clip."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(N, L, generator=g, dtype=torch.float64) * 4
    logp_old, logp_ref = (logp + torch.randn(N, L, generator=g, dtype=torch.float64) * 0.4 for _ in range(2))
    adv = torch.randn(N, generator=g, dtype=torch.float64)
    length = torch.randint(1, L + 1, (N, 1), generator=g)
    length[1] = 0
    return logp, logp_old, logp_ref, adv, torch.arange(L) < length


def loss_and_gradient(logp, *args, **kwargs):
    logp = logp.clone().requires_grad_()
    loss, stats = grpo_loss(logp, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], stats


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# Golden


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_loss_gradient_and_metrics_agree_with_trl(loss_type):
    tensors = load_file(GOLDEN / "grpo_losses" / "losses.safetensors")
    rows = [dict(zip(LOSSES["columns"], row)) for row in LOSSES["rows"]]
    rows = [row for row in rows if row["loss_type"] == loss_type]
    assert len(rows) == 36
    for row in rows:
        logp, old, ref, mask, adv, grads = (
            tensors[f"ds{row['dataset']}.{name}"] for name in ("logps", "old", "ref", "mask", "advantages", "grads")
        )
        per, total = {
            "grpo": ("sequence", len(mask) * row["accum"]),
            "bnpo": ("token", mask.sum() * row["accum"]),
            "dr_grpo": ("constant", len(mask) * row["max_completion_length"] * row["accum"]),
            "dapo": ("token", row["num_items_in_batch"]),
        }[loss_type]
        loss, grad, stats = loss_and_gradient(
            logp, old if row["old_given"] else None, adv, mask, total=total, per=per, level=row["level"],
            low=row["epsilon_low"], high=row["epsilon_high"], delta=row["delta"], beta=row["beta"],
            logp_ref=ref if row["beta"] else None, bias_correction_kl=row["bias_correction_kl"],
        )
        assert loss.item() == pytest.approx(row["loss"], rel=2e-6, abs=1e-7), row
        torch.testing.assert_close(grad, grads[row["grad_index"]], rtol=1e-5, atol=1e-7)
        claimed = dict(zip(LOSSES["metric_names"], row["metrics"]))
        assert claimed.pop("cispo_clip_ratio") is None
        for name, value in claimed.items():
            assert (name in stats) == (value is not None), name
            assert value is None or stats[name].item() == pytest.approx(value, rel=1e-5, abs=1e-7), (name, row)


def test_the_rows_of_trl_that_are_not_claimed_are_the_cispo_rows():
    loss_types = [row[LOSSES["columns"].index("loss_type")] for row in LOSSES["rows"]]
    assert loss_types.count("cispo") == len(loss_types) - 4 * 36 == 20


def test_advantages_agree_with_trl():
    complete = partial = 0
    for row in LOSSES["advantages"]:
        if row["aggregation"] != "sum_then_normalize":
            continue
        G, scale = row["num_generations"], row["scale_rewards"]
        scores = torch.tensor([[math.nan if x is None else x for x in r] for r in row["rewards_per_func"]])
        reward = (scores * torch.tensor(row["reward_weights"])).nansum(1)
        reward = reward.masked_fill(scores.isnan().all(1), math.nan)
        expected = torch.tensor(row["advantages"])
        if reward.isfinite().all():
            complete += 1
            torch.testing.assert_close(group_advantage(reward, G, scale=scale, std="unbiased"), expected, rtol=1e-5, atol=1e-6)
            continue
        partial += 1
        with pytest.raises(ValueError, match="finite"):
            group_advantage(reward, G, scale=scale, std="unbiased")
        for r, a in zip(reward.view(-1, G), expected.view(-1, G)):
            if scale != "batch" and r.isfinite().all():
                torch.testing.assert_close(group_advantage(r, G, scale=scale, std="unbiased"), a, rtol=1e-5, atol=1e-6)
    assert (complete, partial, len(LOSSES["advantages"])) == (9, 9, 24)


def test_advantages_agree_with_flow_grpo():
    rows = json.loads((GOLDEN / "flow_steps" / "flow_steps.json").read_text())["advantages"]
    assert [row["global_std"] for row in rows] == [False, True] * 4
    for row in rows:
        order = sorted(range(len(row["prompts"])), key=lambda i: row["prompts"][i])
        G = row["prompts"].count("p0")
        reward, expected = (torch.tensor(row[key], dtype=torch.float64)[order] for key in ("rewards", "advantages"))
        adv = group_advantage(reward, G, scale="batch" if row["global_std"] else "group")
        torch.testing.assert_close(adv, expected, rtol=1e-9, atol=1e-12)


# Advantage

groups = st.integers(2, 6).flatmap(
    lambda G: st.lists(st.lists(numbers, min_size=G, max_size=G, unique=True), min_size=1, max_size=4)
)


@given(groups, st.sampled_from(SCALES), st.sampled_from(STDS))
def test_advantages_of_a_group_sum_to_zero(rewards, scale, std):
    adv = group_advantage(torch.tensor(rewards, dtype=torch.float64).flatten(), len(rewards[0]), scale=scale, std=std)
    assert adv.view(len(rewards), -1).sum(1).abs().max() < 1e-8


@given(groups, st.sampled_from(SCALES), st.sampled_from(STDS), st.sampled_from([1e-4, 0.5]))
def test_advantage_is_the_distance_from_the_group_mean_in_units_of_the_chosen_spread(rewards, scale, std, eps):
    spread = statistics.pstdev if std == "population" else statistics.stdev
    expected = []
    for group in rewards:
        everything = [r for other in rewards for r in other]
        unit = {"group": spread(group) + eps, "batch": spread(everything) + eps, "none": 1.0}[scale]
        expected += [(r - statistics.mean(group)) / unit for r in group]
    adv = group_advantage(torch.tensor(rewards, dtype=torch.float64).flatten(), len(rewards[0]), scale=scale, std=std, eps=eps)
    torch.testing.assert_close(adv, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


@given(seeds, st.integers(2, 6))
def test_advantages_of_a_group_have_population_variance_one_by_default(seed, G):
    reward = torch.rand(3 * G, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    variance = group_advantage(reward, G, eps=0).view(3, G).var(1, correction=0)
    torch.testing.assert_close(variance, torch.ones(3, dtype=torch.float64))


@given(seeds, st.sampled_from(SCALES), numbers)
def test_a_constant_added_to_all_rewards_changes_no_advantage(seed, scale, shift):
    reward = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(group_advantage(reward + shift, 4, scale=scale), group_advantage(reward, 4, scale=scale))


@given(seeds, st.sampled_from(["group", "batch"]), st.floats(0.01, 100))
def test_without_eps_the_scale_of_the_reward_does_not_matter(seed, scale, factor):
    reward = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    adv = group_advantage(reward, 4, scale=scale, eps=0)
    torch.testing.assert_close(group_advantage(reward * factor, 4, scale=scale, eps=0), adv)


@given(seeds, st.sampled_from(SCALES), st.permutations(range(4)))
def test_permuting_a_group_permutes_its_advantages(seed, scale, order):
    reward = torch.rand(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    adv = group_advantage(reward.flatten(), 4, scale=scale).view(2, 4)
    torch.testing.assert_close(group_advantage(reward[:, order].flatten(), 4, scale=scale).view(2, 4), adv[:, order])


@given(seeds, st.sampled_from(["group", "none"]))
def test_other_groups_are_irrelevant_unless_the_spread_is_the_batch_s(seed, scale):
    reward = torch.rand(8, generator=torch.Generator().manual_seed(seed))
    same(group_advantage(reward, 4, scale=scale)[4:], group_advantage(reward[4:], 4, scale=scale))


@given(
    st.floats(-1e6, 1e6, width=32), st.integers(2, 33), st.sampled_from(SCALES), st.sampled_from(STDS),
    st.sampled_from([0.0, 1e-8, 1e-4]),
)
def test_a_tied_group_gets_exactly_zero_at_every_constant_and_size(constant, G, scale, std, eps):
    reward = torch.full((2 * G,), constant, dtype=torch.float32)
    same(group_advantage(reward, G, scale=scale, std=std, eps=eps), torch.zeros(2 * G))
    reward[0] += 1 + abs(constant)
    adv = group_advantage(reward, G, scale=scale, std=std, eps=eps)
    same(adv[G:], torch.zeros(G))
    assert adv[0] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("scale", SCALES)
def test_every_dtype_is_computed_in_fp32_at_least_and_ties_stay_zero(dtype, scale):
    reward = torch.tensor([1, 0, 0, 1, 1, 1]).to(dtype)
    adv = group_advantage(reward, 3, scale=scale)
    assert adv.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(adv, group_advantage(reward.double(), 3, scale=scale).to(adv.dtype))
    assert (adv[3:] == 0).all() and (adv[:3] != 0).all()


def test_clamp_bounds_the_advantage_on_both_sides_and_leaves_the_rest():
    reward = torch.tensor([0.0] * 15 + [1.0] + [1.0] * 15 + [0.0] + [0.0, 1.0] * 8)
    adv, clamped = group_advantage(reward, 16), group_advantage(reward, 16, clamp=2.0)
    assert clamped[15] == 2 and clamped[31] == -2 and adv[15] > 2 and adv[31] < -2
    inside = adv.abs() <= 2
    same(clamped[inside], adv[inside])


@pytest.mark.parametrize(
    "reward, G, kwargs, message",
    [
        ([1.0, 2.0], 1, {}, "at least 2"),
        ([1.0, 2.0, 3.0], 2, {}, "multiple of G"),
        ([], 2, {}, "multiple of G"),
        ([[1.0, 2.0]], 2, {}, r"\(1, 2\)"),
        ([1.0, math.nan], 2, {}, r"\[1\] is not finite"),
        ([-math.inf, 1.0], 2, {}, r"\[0\] is not finite"),
        ([1.0, 2.0], 2, {"scale": "rank"}, "rank"),
        ([1.0, 2.0], 2, {"std": "sample"}, "sample"),
        ([1.0, 2.0], 2, {"eps": -1.0}, "eps"),
        ([1.0, 2.0], 2, {"clamp": 0.0}, "clamp"),
    ],
)
def test_an_impossible_group_is_refused(reward, G, kwargs, message):
    with pytest.raises(ValueError, match=message) as error:
        group_advantage(torch.tensor(reward), G, **kwargs)
    assert "\n" not in str(error.value)


# Log-probability and KL


@given(seeds, st.floats(0.1, 5))
def test_token_logp_is_the_log_probability_of_a_categorical_at_that_temperature(seed, temperature):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, 7, generator=g, dtype=torch.float64) * 3
    tokens = torch.randint(7, (3, 4), generator=g)
    expected = Categorical(logits=logits / temperature).log_prob(tokens)
    torch.testing.assert_close(token_logp(logits, tokens, temperature), expected)
    torch.testing.assert_close(token_logp(logits, tokens), Categorical(logits=logits).log_prob(tokens))


def test_token_logp_of_low_precision_logits_has_fp32_precision():
    logits, tokens = torch.randn(2, 3, 50).bfloat16(), torch.randint(50, (2, 3))
    logp = token_logp(logits, tokens, 0.7)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, token_logp(logits.double(), tokens, 0.7).float())


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_token_logp_refuses_a_temperature_without_density(temperature):
    with pytest.raises(ValueError, match="temperature"):
        token_logp(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), temperature)


@pytest.mark.parametrize("logits, tokens", [((1, 2, 3), (1, 3)), ((2, 3), (2,)), ((1, 3, 3), (1, 1))])
def test_token_logp_refuses_shapes_that_do_not_fit(logits, tokens):
    with pytest.raises(ValueError, match="expected"):
        token_logp(torch.zeros(logits), torch.zeros(tokens, dtype=torch.long))


@given(numbers, numbers)
def test_k3_is_never_negative_and_zero_only_where_policies_agree(a, b):
    k3 = kl_k3(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    assert k3 > 0 or (k3 == 0 and abs(a - b) < 1e-6)
    assert kl_k3(torch.tensor(a), torch.tensor(a)) == 0


@given(st.floats(1e-3, 1), st.sampled_from([-1, 1]))
def test_k3_of_nearly_equal_policies_keeps_its_digits_in_fp32(gap, sign):
    d = torch.tensor(sign * gap, dtype=torch.float32)
    expected = d.item() ** 2 * sum(d.item() ** n / math.factorial(n + 2) for n in range(20))
    assert kl_k3(torch.tensor(0.0), d).item() == pytest.approx(expected, rel=1e-3)


@given(seeds)
def test_the_exact_expectation_of_k3_is_the_kl_divergence(seed):
    logp, logp_ref = torch.randn(2, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)
    expectation = (logp.exp() * kl_k3(logp, logp_ref)).sum()
    torch.testing.assert_close(expectation, kl_divergence(Categorical(logits=logp), Categorical(logits=logp_ref)))


@given(seeds)
def test_with_bias_correction_the_expected_penalty_off_policy_and_its_gradient_are_those_of_the_kl(seed):
    logits, old, ref = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits.requires_grad_()
    adv, mask = torch.zeros(1, dtype=torch.float64), torch.ones(1, 1)
    expectation = 0.0
    for i, p in enumerate(old.softmax(-1)):
        logp, logp_old, logp_ref = (token_logp(x[None, None], torch.tensor([[i]])) for x in (logits, old, ref))
        settings = dict(total=1, logp_ref=logp_ref, beta=1.0, bias_correction_kl=True)
        expectation = expectation + p * grpo_loss(logp, logp_old, adv, mask, **settings)[0]
    kl = kl_divergence(Categorical(logits=logits), Categorical(logits=ref))
    torch.testing.assert_close(expectation, kl)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (expectation, kl)))


# Ratio and surrogate


@given(seeds)
def test_ratios_are_the_slow_ones(seed):
    logp, logp_old, _, _, mask = batch(seed)
    token, sequence = (importance_ratio(logp, logp_old, mask, level=level) for level in LEVELS)
    assert token.shape == mask.shape and sequence.shape == (len(mask), 1)
    for n, row in enumerate(mask.tolist()):
        active = [i for i, m in enumerate(row) if m]
        quotients = [math.exp(logp[n, i]) / math.exp(logp_old[n, i]) for i in active]
        assert token[n, active].tolist() == pytest.approx(quotients)
        assert (token[n, len(active):] == 1).all()
        assert sequence[n].item() == pytest.approx(statistics.geometric_mean(quotients) if active else 1.0)


@pytest.mark.parametrize("level", LEVELS)
def test_an_unchanged_policy_has_ratio_exactly_one(level):
    logp, _, _, _, mask = batch(0)
    assert (importance_ratio(logp, logp.clone(), mask, level=level) == 1).all()


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="segment"):
        importance_ratio(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), level="segment")


@given(numbers)
def test_at_ratio_one_the_loss_is_minus_the_advantage_and_its_gradient_reinforce_s(adv):
    logp = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    loss = clipped_surrogate((logp - logp.detach()).exp(), torch.tensor(adv, dtype=torch.float64), low=0.2, high=0.2)
    assert loss.item() == -adv
    assert torch.autograd.grad(loss, logp)[0].item() == pytest.approx(-adv)


ratios = st.floats(0, 4, allow_subnormal=False)


@given(ratios, numbers, st.floats(0, 0.9), st.floats(0, 0.9))
def test_the_clipped_objective_is_never_above_the_unclipped(ratio, adv, low, high):
    ratio, adv = torch.tensor(ratio), torch.tensor(adv)
    assert (-clipped_surrogate(ratio, adv, low=low, high=high) <= ratio * adv).all()


@pytest.mark.parametrize(
    "ratio, adv, value, gradient",
    [
        (1.29, 1.0, -1.28, 0.0),     # gone too far up: a good token stops
        (1.27, 1.0, -1.27, -1.0),
        (0.79, -1.0, 0.80, 0.0),     # gone too far down: a bad token stops
        (0.81, -1.0, 0.81, 1.0),
        (1.29, -1.0, 1.29, 1.0),     # on the wrong side the gradient stays
        (0.79, 1.0, -0.79, -1.0),
        (9.00, -2.0, 18.0, 2.0),
    ],
)
def test_the_gradient_is_exactly_zero_beyond_the_asymmetric_clip_on_the_favoured_side_only(ratio, adv, value, gradient):
    ratio = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    loss = clipped_surrogate(ratio, torch.tensor(adv, dtype=torch.float64), low=0.2, high=0.28)
    assert loss.item() == pytest.approx(value)
    assert torch.autograd.grad(loss, ratio)[0].item() == gradient


def test_delta_bounds_the_loss_of_a_bad_token_and_nothing_else():
    ratio = torch.tensor([0.5, 1.0, 1.4, 1.6, 9.0], dtype=torch.float64)
    bad = clipped_surrogate(ratio, torch.tensor(-1.0), low=0.2, high=0.2, delta=1.5)
    assert bad.tolist() == pytest.approx([0.8, 1.0, 1.4, 1.5, 1.5])
    good = torch.tensor(1.0)
    same(clipped_surrogate(ratio, good, low=0.2, high=0.2, delta=1.5), clipped_surrogate(ratio, good, low=0.2, high=0.2))
    within = clipped_surrogate(ratio, torch.tensor(-1.0), low=0.2, high=0.2, delta=1.1)      # the clip itself knows no delta
    assert within.tolist() == pytest.approx([0.8, 1.0, 1.2, 1.2, 1.2])


# Averages and the whole loss


@given(seeds)
def test_averages_are_the_slow_ones(seed):
    x, _, _, _, mask = batch(seed)
    active = [[x[n, i].item() for i in range(x.shape[1]) if mask[n, i]] for n in range(len(x))]
    per_sequence = sum(statistics.mean(row) if row else 0.0 for row in active)
    per_token = sum(value for row in active for value in row)
    assert average(x, mask, per="sequence", total=3).item() == pytest.approx(per_sequence / 3)
    assert average(x, mask, per="token", total=torch.tensor(5)).item() == pytest.approx(per_token / 5)
    assert average(x, mask, per="constant", total=7.0).item() == pytest.approx(per_token / 7)
    assert average(x, mask, total=3) == average(x, mask, per="sequence", total=3)


def test_one_value_per_sequence_counts_for_each_of_its_tokens():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    x = torch.tensor([[2.0], [5.0], [7.0]])
    assert average(x, mask, per="token", total=1) == 3 * 2 + 5
    assert average(x, mask, per="sequence", total=1) == 2 + 5


def slow_loss(logp, old, ref, adv, mask, *, total, per, level, low, high, delta, beta):
    """The loss and its diagnostics, number by number."""
    loss, units, tokens, worst = 0.0, [], [], []
    for n in range(len(logp)):
        active = [i for i in range(logp.shape[1]) if mask[n, i]]
        logs = [(logp[n, i] - old[n, i]).item() for i in active]
        mean = sum(logs) / len(logs) if logs else 0.0
        terms, A = [], adv[n].item()
        for i, log in zip(active, logs):
            r = math.exp(log if level == "token" else mean)
            terms.append(-min(min(r, delta) * A, max(1 - low, min(r, 1 + high)) * A))
            q = (ref[n, i] - logp[n, i]).item()
            terms[-1] += beta * (math.exp(q) - q - 1)
            tokens.append((log, math.exp(q) - q - 1))
        loss += sum(terms) / (max(1, len(terms)) if per == "sequence" else 1)
        mine = [math.exp(log) for log in logs] if level == "token" else [math.exp(mean)]
        units += [(r, r < 1 - low and A < 0, r > 1 + high and A > 0) for r in mine]
        if mine:
            below, above = sum(r < 1 - low and A < 0 for r in mine), sum(r > 1 + high and A > 0 for r in mine)
            worst.append((below / len(mine), above / len(mine)))
    ratio, below, above = zip(*units)
    return loss / total, {
        "clip_ratio/low_mean": sum(below) / len(units),
        "clip_ratio/high_mean": sum(above) / len(units),
        "clip_ratio/region_mean": (sum(below) + sum(above)) / len(units),
        "clip_ratio/low_min": min(w[0] for w in worst),
        "clip_ratio/high_max": max(w[1] for w in worst),
        "ratio/mean": sum(ratio) / len(units),
        "ratio/min": min(ratio),
        "ratio/max": max(ratio),
        "approx_kl": sum(log**2 for log, _ in tokens) / len(tokens) / 2,
        "kl": sum(k3 for _, k3 in tokens) / len(tokens),
    }


@given(
    seeds, st.sampled_from(UNITS), st.sampled_from(LEVELS), st.sampled_from([math.inf, 1.7]),
    st.sampled_from([torch.bool, torch.int64]),
)
def test_the_loss_and_every_diagnostic_are_the_slow_ones(seed, per, level, delta, dtype):
    logp, old, ref, adv, mask = batch(seed)
    settings = dict(total=11, per=per, level=level, low=0.1, high=0.3, delta=delta, beta=0.3)
    loss, stats = grpo_loss(logp, old, adv, mask.to(dtype), logp_ref=ref, **settings)
    expected_loss, expected_stats = slow_loss(logp, old, ref, adv, mask, **settings)
    assert loss.item() == pytest.approx(expected_loss)
    assert {name: float(value) for name, value in stats.items()} == pytest.approx(expected_stats)


def test_the_defaults_are_the_token_level_surrogate_with_a_symmetric_clip_of_a_fifth():
    logp, old, ref, adv, mask = batch(3)
    expected, _ = slow_loss(
        logp, old, ref, adv, mask, total=9, per="token", level="token", low=0.2, high=0.2, delta=math.inf, beta=0
    )
    assert grpo_loss(logp, old, adv, mask, total=9)[0].item() == pytest.approx(expected)


@given(seeds, st.sampled_from(LEVELS))
def test_the_gradient_of_the_loss_is_its_finite_difference(seed, level):
    logp, old, ref, adv, mask = batch(seed, N=4, L=3)
    adv[0] = 0.0                                              # the k3 term stands alone in the first sequence

    def loss(x):
        return grpo_loss(x, old, adv, mask, total=4, level=level, per="sequence", logp_ref=ref, beta=0.5, low=0.9, high=9.0)[0]

    assert torch.autograd.gradcheck(loss, logp.clone().requires_grad_())


@given(seeds, st.sampled_from(LEVELS), st.sampled_from(UNITS), st.booleans(), st.booleans())
def test_padding_affects_neither_loss_nor_gradient_nor_diagnostics_whatever_it_holds(seed, level, per, old_given, corrected):
    logp, old, ref, adv, mask = batch(seed)
    junk = torch.tensor([math.nan, math.inf, -math.inf, 1e30])[torch.randint(4, mask.shape)].double()
    settings = dict(total=13, level=level, per=per, beta=0.1, bias_correction_kl=corrected)
    clean = loss_and_gradient(logp, old if old_given else None, adv, mask, logp_ref=ref, **settings)
    logp, old, ref = (torch.where(mask, x, junk) for x in (logp, old, ref))
    soiled = loss_and_gradient(logp, old if old_given else None, adv, mask, logp_ref=ref, **settings)
    for a, b in zip(clean, soiled):
        same(a, b)
    assert (soiled[1][~mask] == 0).all()


@given(seeds)
def test_ratio_and_average_by_themselves_ignore_padding_too(seed):
    logp, old, _, _, mask = batch(seed)
    soiled = torch.where(mask, logp, math.nan)
    for level in LEVELS:
        same(importance_ratio(soiled, old, mask, level=level), importance_ratio(logp, old, mask, level=level))
    for per in UNITS:
        same(average(soiled, mask, per=per, total=3), average(logp, mask, per=per, total=3))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("per", UNITS)
@pytest.mark.parametrize("level", LEVELS)
def test_splitting_a_batch_into_micro_batches_changes_neither_loss_nor_gradient(size, per, level):
    logp, old, ref, adv, mask = batch(5)
    total = {"sequence": len(mask), "token": mask.sum(), "constant": mask.numel()}[per]
    settings = dict(total=total, per=per, level=level, beta=0.1)
    whole, gradient, _ = loss_and_gradient(logp, old, adv, mask, logp_ref=ref, **settings)
    parts = [
        loss_and_gradient(logp[s], old[s], adv[s], mask[s], logp_ref=ref[s], **settings)
        for s in (slice(i, i + size) for i in range(0, len(logp), size))
    ]
    torch.testing.assert_close(sum(loss for loss, _, _ in parts), whole)
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in parts]), gradient)


@pytest.mark.parametrize("per", UNITS)
@pytest.mark.parametrize("level", LEVELS)
def test_a_micro_batch_without_active_tokens_has_loss_and_gradient_zero_and_neutral_diagnostics(per, level):
    logp, old, ref, adv, mask = batch(0)
    loss, gradient, stats = loss_and_gradient(logp, old, adv, mask & False, total=5, per=per, level=level, logp_ref=ref, beta=1.0)
    assert loss == 0 and (gradient == 0).all()
    assert not any(value.isnan() for value in stats.values())
    assert stats["kl"] == stats["approx_kl"] == stats["clip_ratio/region_mean"] == 0
    assert level == "sequence" or (stats["ratio/min"], stats["ratio/max"]) == (math.inf, -math.inf)


@given(seeds, st.sampled_from(LEVELS))
def test_without_old_log_probs_the_policy_is_its_own_old_one(seed, level):
    logp, _, _, adv, mask = batch(seed)
    absent = loss_and_gradient(logp, None, adv, mask, total=mask.sum(), level=level)
    for a, b in zip(absent, loss_and_gradient(logp, logp.clone(), adv, mask, total=mask.sum(), level=level)):
        same(a, b)
    tokens = mask.sum(1)
    torch.testing.assert_close(absent[0], -(adv * tokens).sum() / mask.sum())
    torch.testing.assert_close(absent[1], -(adv[:, None] * mask) / mask.sum())
    assert absent[2]["ratio/min"] == absent[2]["ratio/max"] == 1


def test_only_the_policy_s_log_probs_carry_gradient_and_the_stats_none():
    logp, old, ref, adv, mask = batch(0)
    leaves = [x.clone().requires_grad_() for x in (logp, old, ref, adv)]
    loss, stats = grpo_loss(leaves[0], leaves[1], leaves[3], mask, total=1, logp_ref=leaves[2], beta=0.1)
    loss.backward()
    assert leaves[0].grad is not None and all(x.grad is None for x in leaves[1:])
    assert all(value.ndim == 0 and not value.requires_grad for value in stats.values())


def test_a_reference_without_beta_is_reported_and_does_not_enter_the_loss():
    logp, old, ref, adv, mask = batch(0)
    ref[0, 0] = 1e4                                           # k3 is as large as it can be here
    loss, gradient, stats = loss_and_gradient(logp, old, adv, mask, total=1)
    with_ref, with_ref_gradient, with_ref_stats = loss_and_gradient(logp, old, adv, mask, total=1, logp_ref=ref)
    same((loss, gradient), (with_ref, with_ref_gradient))
    assert with_ref_stats.keys() - stats.keys() == {"kl"} and with_ref_stats["kl"] > 0


far = st.one_of(st.floats(-1e4, 1e4), st.sampled_from([88.8, -88.8, LOG_RATIO_BOUND]))
rows = lambda x: st.lists(x, min_size=6, max_size=6)
settings = st.fixed_dictionaries(dict(
    per=st.sampled_from(UNITS), level=st.sampled_from(LEVELS), low=st.floats(0, 1), high=st.floats(0, 10),
    delta=st.sampled_from([None, 12.0]), beta=st.sampled_from([0.0, 0.02]), bias_correction_kl=st.booleans()))
advantages = st.lists(st.one_of(st.floats(-5, 5), st.just(0.0)), min_size=2, max_size=2)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def distant(log_ratios, ref_ratios, adv, dtype=torch.float32, **settings):
    """Loss, gradient and stats where logp - logp_old is log_ratios (6,) and logp_ref - logp_old is ref_ratios (6,)."""
    logp, ref = (torch.tensor(x, dtype=dtype).view(2, 3) for x in (log_ratios, ref_ratios))
    return loss_and_gradient(logp, torch.zeros_like(logp), torch.tensor(adv, dtype=dtype), MASK, total=5, logp_ref=ref, **settings)


@given(rows(st.one_of(far, st.just(-math.inf))), rows(far), advantages, settings, st.sampled_from([torch.bfloat16, torch.float32]))
def test_loss_gradient_and_diagnostics_are_finite_at_any_log_ratio(log_ratios, ref_ratios, adv, settings, dtype):
    """Tokens whose probability fell to zero included; exp of an unbounded log-ratio is inf from 89 nats on."""
    loss, gradient, stats = distant(log_ratios, ref_ratios, adv, dtype, **settings)
    assert loss.isfinite() and loss.dtype == torch.float32 and gradient.isfinite().all() and all(v.isfinite() for v in stats.values())


@given(rows(st.floats(-9.9, 9.9)), rows(st.floats(-9.9, 9.9)), advantages, settings)
def test_within_the_bound_loss_gradient_and_diagnostics_are_those_without_it(log_ratios, ref_ratios, adv, settings):
    """No difference of two of these leaves 20 nats."""
    bounded = distant(log_ratios, ref_ratios, adv, torch.float64, **settings)
    with mock.patch.object(grpo, "LOG_RATIO_BOUND", math.inf):
        free = distant(log_ratios, ref_ratios, adv, torch.float64, **settings)
    for a, b in zip(bounded[:2] + tuple(bounded[2].values()), free[:2] + tuple(free[2].values())):
        same(a, b)
    if not settings["bias_correction_kl"]:
        logp, ref = (torch.tensor(x, dtype=torch.float64).view(2, 3) for x in (log_ratios, ref_ratios))
        slow = {k: v for k, v in settings.items() if k != "bias_correction_kl"} | dict(delta=settings["delta"] or math.inf, total=5)
        assert bounded[0].item() == pytest.approx(slow_loss(logp, 0 * logp, ref, torch.tensor(adv), MASK, **slow)[0], rel=1e-5)


@given(st.floats(-60, 60))
def test_the_bound_of_the_log_ratio_changes_nothing_below_it_and_has_gradient_zero_above(log_ratio):
    x = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    ratio = bounded_exp(x)
    ratio.backward()
    below = log_ratio <= 20
    assert ratio.item() == pytest.approx(math.exp(min(log_ratio, 20)))
    assert x.grad.item() == (pytest.approx(math.exp(log_ratio)) if below else 0.0)
    assert kl_k3(torch.zeros(()).double(), x.detach()).item() == pytest.approx(math.expm1(min(log_ratio, 20)) - min(log_ratio, 20))


def test_far_below_the_reference_s_bound_k3_stays_a_line_of_gradient_one():
    logp = torch.tensor([0.0, 0.0], dtype=torch.float64, requires_grad=True)
    k3 = kl_k3(logp, torch.tensor([-1e4, -25.0], dtype=torch.float64))
    k3.sum().backward()
    assert k3.tolist() == pytest.approx([9999.0, 24.0]) and logp.grad.tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("logp, old, ref, who", [
    (0.0, -math.inf, None, "old policy"), (-math.inf, None, None, "old policy"), (-math.inf, -math.inf, None, "old policy"),
    (0.0, 0.0, -math.inf, "reference"), (-math.inf, 0.0, -math.inf, "reference")])
def test_a_token_that_the_old_policy_or_the_reference_cannot_sample_is_refused_unless_it_is_masked(logp, old, ref, who):
    logp, old, ref = (x if x is None else torch.tensor([[x, -1.0]]) for x in (logp, old, ref))
    with pytest.raises(FloatingPointError, match=f"-inf under the {who}") as error:
        grpo_loss(logp, old, torch.ones(1), torch.ones(1, 2), total=1, logp_ref=ref, beta=0.1 if ref is not None else 0.0)
    assert "\n" not in str(error.value)
    assert grpo_loss(logp, old, torch.ones(1), torch.tensor([[0, 1]]), total=1, logp_ref=ref)[0].isfinite()


def test_no_function_writes_into_its_arguments():
    logp, old, ref, adv, mask = (x.clone() for x in batch(0))
    reward, logits, tokens = torch.rand(8), torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    logp = torch.where(mask, logp, math.nan)
    ratio = (ref - old).exp()
    arguments = [logp, old, ref, adv, mask, reward, logits, tokens, ratio]
    before = [x.clone() for x in arguments]
    for scale in SCALES:
        group_advantage(reward, 4, scale=scale, clamp=0.1)
    token_logp(logits, tokens, 0.5)
    kl_k3(old, ref)
    clipped_surrogate(ratio, adv[:, None], low=0.1, high=0.1, delta=1.2)
    loss_stats(ratio, ref - old, adv[:, None], mask, low=0.1, high=0.1)
    for level in LEVELS:
        importance_ratio(logp, old, mask, level=level)
        for per in UNITS:
            average(logp, mask, per=per, total=2)
            grpo_loss(
                logp, old, adv, mask, total=2, per=per, level=level, delta=1.5, logp_ref=ref, beta=0.1, bias_correction_kl=True
            )
    for a, b in zip(arguments, before):
        same(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logp=torch.zeros(6)), "expected \\(N, L\\)"),
        (dict(logp_old=torch.zeros(2, 4)), "logp_old has shape \\(2, 4\\), expected \\(2, 3\\)"),
        (dict(logp_ref=torch.zeros(2, 1)), "logp_ref has shape \\(2, 1\\), expected \\(2, 3\\)"),
        (dict(mask=torch.ones(3)), "mask has shape \\(3,\\), expected \\(2, 3\\)"),
        (dict(adv=torch.zeros(2, 1)), "adv has shape \\(2, 1\\), expected \\(2,\\)"),
        (dict(adv=torch.zeros(3)), "adv has shape \\(3,\\), expected \\(2,\\)"),
        (dict(beta=0.1), "without logp_ref"),
        (dict(beta=-0.1), "negative"),
        (dict(low=-0.1), "negative"),
        (dict(high=-0.1), "negative"),
        (dict(delta=0.9), "delta"),
        (dict(total=0), "total is 0"),
        (dict(total=-1), "total is -1"),
        (dict(total=math.nan), "total is nan"),
        (dict(per="prompt"), "prompt"),
        (dict(level="segment"), "segment"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused_in_one_line(change, message):
    arguments = dict(logp=torch.zeros(2, 3), logp_old=torch.zeros(2, 3), adv=torch.zeros(2), mask=torch.ones(2, 3), total=6)
    grpo_loss(**arguments)
    with pytest.raises(ValueError, match=message) as error:
        grpo_loss(**{**arguments, **change})
    assert "\n" not in str(error.value)


# The file by itself


def test_the_example_in_the_docstring_is_true():
    results = doctest.testmod(grpo)
    assert results.attempted > 0 and results.failed == 0


def test_copied_alone_to_an_empty_folder_it_runs_and_learns(tmp_path):
    shutil.copy(grpo.__file__, tmp_path)
    command = [sys.executable, "-I", "grpo.py", "--assert-reward", "0.9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6


def test_a_reward_below_the_asserted_one_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grpo.py", "--target", "toy", "--steps", "2", "--assert-reward", "0.9"])
    with pytest.raises(SystemExit) as stop:
        grpo.main()
    assert "expected at least 0.9" in str(stop.value.code)


def test_the_toy_learns_from_chance_with_the_clip_at_work_and_repeats_itself(capsys):
    before = torch.random.get_rng_state()
    rewards = grpo.learn_string("a toy string", 25)
    assert rewards[0] < 0.1 and rewards[-1] > 0.9
    assert any("clipped 0.000" not in line for line in capsys.readouterr().out.splitlines())
    assert grpo.learn_string("a toy string", 25) == rewards
    same(torch.random.get_rng_state(), before)
