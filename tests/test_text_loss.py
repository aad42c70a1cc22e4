"""What the text policy gradient is: log-probability, KL, ratio, clip, average, and the loss they make.

The loss of whole batches, its gradient and its metrics are TRL's: test_golden_grpo.py.
"""

import doctest
import math
import re
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

import grpo
from grpo import bounded_exp, clipped_surrogate, grpo_loss, importance_ratio, kl_k3, token_logp

LEVELS = ("token", "sequence")
UNITS = ("sequence", "token", "constant")
seeds = st.integers(0, 2**31)
levels = st.sampled_from(LEVELS)
units = st.sampled_from(UNITS)
numbers = st.floats(-3, 3, allow_subnormal=False)


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def batch(seed, N=8, L=6):
    """Random logp, logp_old, logp_ref, adv, mask in float64; ragged, the second sequence masked."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(N, L, generator=g, dtype=torch.float64) * 4
    logp_old, logp_ref = logp + torch.randn(2, N, L, generator=g, dtype=torch.float64) * 0.4
    adv = torch.randn(N, generator=g, dtype=torch.float64)
    length = torch.randint(1, L + 1, (N, 1), generator=g)
    length[1] = 0
    return logp, logp_old, logp_ref, adv, torch.arange(L) < length


def loss_and_gradient(logp, *args, **options):
    """(loss, gradient, *stats) of grpo_loss."""
    logp = logp.clone().requires_grad_()
    loss, stats = grpo_loss(logp, *args, **options)
    (gradient,) = torch.autograd.grad(loss, logp)
    return [loss.detach(), gradient, *stats.values()]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


# ---- log-probability and KL ----


@given(seeds, st.floats(0.1, 5))
def test_token_logp_is_the_log_probability_of_a_categorical_at_that_temperature(seed, temperature):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, 7, generator=g, dtype=torch.float64) * 3
    tokens = torch.randint(7, (3, 4), generator=g)
    expected = Categorical(logits=logits / temperature).log_prob(tokens)
    torch.testing.assert_close(token_logp(logits, tokens, temperature), expected)


def test_token_logp_of_low_precision_logits_has_fp32_precision():
    logits = torch.randn(2, 3, 50).bfloat16()
    tokens = torch.randint(50, (2, 3))
    expected = token_logp(logits.double(), tokens, 0.7)
    torch.testing.assert_close(token_logp(logits, tokens, 0.7), expected.float())


@pytest.mark.parametrize("logits, temperature, words", [
    ((1, 2, 3), 0.0, "temperature"), ((1, 2, 3), math.nan, "temperature"),
    ((1, 3, 3), 1.0, r"expected \(N, L, V\)")])
def test_token_logp_refuses_a_temperature_without_density_and_other_shapes(logits, temperature, words):
    with pytest.raises(ValueError, match=words):
        token_logp(torch.zeros(logits), torch.zeros(1, 2, dtype=torch.long), temperature)


@given(numbers, numbers)
def test_k3_is_never_negative_and_zero_only_if_policies_agree(a, b):
    k3 = kl_k3(double(a), double(b))
    assert k3 > 0 or (k3 == 0 and abs(a - b) < 1e-6)
    assert kl_k3(double(a), double(a)) == 0


@given(st.floats(2**-10, 1, width=32) | st.floats(-1, -(2**-10), width=32))
def test_k3_of_nearly_equal_policies_keeps_its_digits_in_fp32(gap):
    k3 = kl_k3(torch.tensor(0.0), torch.tensor(gap))
    assert k3.item() == pytest.approx(math.expm1(gap) - gap, rel=1e-3)


@given(seeds)
def test_with_bias_correction_the_expected_penalty_off_policy_and_its_gradient_are_those_of_the_kl(seed):
    """Over the nine tokens of an old policy that samples them equally often."""
    logits, ref = torch.randn(2, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits.requires_grad_()
    logp = logits.log_softmax(0)[:, None]
    logp_ref = ref.log_softmax(0)[:, None]
    old = torch.full_like(logp, -math.log(9))
    adv = torch.zeros_like(ref)
    options = dict(total=9, logp_ref=logp_ref, beta=1.0, bias_correction_kl=True)
    expectation, _ = grpo_loss(logp, old, adv, torch.ones(9, 1), **options)
    kl = kl_divergence(Categorical(logits=logits), Categorical(logits=ref))
    torch.testing.assert_close(expectation, kl)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (expectation, kl)))


# ---- ratio and clip ----


@given(seeds)
def test_a_ratio_is_the_quotient_of_probabilities_per_token_or_their_geometric_mean_per_sequence(seed):
    logp, logp_old, _, _, mask = batch(seed)
    token, sequence = (importance_ratio(logp, logp_old, mask, level=level) for level in LEVELS)
    quotient = logp.exp() / logp_old.exp()
    torch.testing.assert_close(token, torch.where(mask, quotient, 1.0))
    for ratio, row, active in zip(sequence, quotient, mask):
        expected = statistics.geometric_mean(row[active].tolist()) if active.any() else 1.0
        assert ratio.item() == pytest.approx(expected)


@pytest.mark.parametrize("ratio, adv, value, gradient", [
    (1.29, 1.0, -1.28, 0.0),     # gone too far up: a good token stops
    (1.27, 1.0, -1.27, -1.0),
    (0.79, -1.0, 0.80, 0.0),     # gone too far down: a bad token stops
    (0.81, -1.0, 0.81, 1.0),
    (1.29, -1.0, 1.29, 1.0),     # on the wrong side the gradient stays
    (0.79, 1.0, -0.79, -1.0)])
def test_the_gradient_is_zero_beyond_the_clip_on_the_side_that_adv_favours(ratio, adv, value, gradient):
    ratio = double(ratio).requires_grad_()
    loss = clipped_surrogate(ratio, double(adv), low=0.2, high=0.28)
    assert loss.item() == pytest.approx(value)
    assert torch.autograd.grad(loss, ratio)[0].item() == gradient


@given(st.floats(0, 9), numbers, st.floats(1.2, 3))
def test_delta_bounds_the_loss_of_a_bad_token_and_nothing_else(ratio, adv, delta):
    pair = (double(ratio), double(adv))
    options = dict(low=0.2, high=0.2)
    plain = clipped_surrogate(*pair, **options).item()
    bounded = clipped_surrogate(*pair, **options, delta=delta).item()
    assert bounded == pytest.approx(min(plain, delta * -adv) if adv < 0 else plain)


# ---- the loss ----


@given(seeds, levels)
def test_the_diagnostics_of_the_ratio_are_over_active_tokens_or_over_sequences(seed, level):
    logp, old, _, adv, mask = batch(seed)
    _, stats = grpo_loss(logp, old, adv, mask, total=1, level=level)
    ratio = importance_ratio(logp, old, mask, level=level)
    ratios = (ratio[mask] if level == "token" else ratio).flatten().tolist()
    expected = {
        "ratio/mean": statistics.mean(ratios),
        "ratio/min": min(ratios),
        "ratio/max": max(ratios),
        "approx_kl": statistics.mean(log**2 / 2 for log in (logp - old)[mask].tolist()),
    }
    assert {name: stats[name].item() for name in expected} == pytest.approx(expected)


def test_the_defaults_are_the_token_level_surrogate_with_a_symmetric_clip_of_a_fifth():
    logp, old, _, adv, mask = batch(3)
    options = dict(per="token", level="token", low=0.2, high=0.2, delta=None, beta=0.0)
    expected = loss_and_gradient(logp, old, adv, mask, total=9, **options)
    assert_same(loss_and_gradient(logp, old, adv, mask, total=9), expected)


@given(seeds, levels, units, st.booleans(), st.booleans())
def test_padding_affects_neither_loss_nor_gradient_nor_stats(seed, level, per, given, corrected):
    """Whatever it holds."""
    *clean, adv, mask = batch(seed)
    junk = torch.tensor([math.nan, math.inf, -math.inf, 1e30])[torch.randint(4, mask.shape)].double()
    soiled = (torch.where(mask, x, junk) for x in clean)
    options = dict(total=13, level=level, per=per, beta=0.1, bias_correction_kl=corrected)
    results = []
    for logp, old, ref in (clean, soiled):
        old = old if given else None
        results.append(loss_and_gradient(logp, old, adv, mask, logp_ref=ref, **options))
    assert_same(*results)
    assert (results[1][1][~mask] == 0).all()


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("per", UNITS)
@pytest.mark.parametrize("level", LEVELS)
def test_splitting_a_batch_into_micro_batches_changes_neither_loss_nor_gradient(size, per, level):
    whole = batch(5)
    options = dict(total=13, per=per, level=level, beta=0.1)

    def loss_of(logp, old, ref, adv, mask):
        return loss_and_gradient(logp, old, adv, mask, logp_ref=ref, **options)[:2]

    losses, gradients = zip(*(loss_of(*part) for part in zip(*(x.split(size) for x in whole))))
    expected = loss_of(*whole)
    torch.testing.assert_close(sum(losses), expected[0])
    torch.testing.assert_close(torch.cat(gradients), expected[1])


@pytest.mark.parametrize("per", UNITS)
def test_a_micro_batch_without_active_tokens_has_loss_and_gradient_zero_and_neutral_diagnostics(per):
    logp, old, ref, adv, mask = batch(0)
    logp.requires_grad_()
    loss, stats = grpo_loss(logp, old, adv, mask & False, total=5, per=per, logp_ref=ref, beta=1.0)
    assert loss == 0
    assert (torch.autograd.grad(loss, logp)[0] == 0).all()
    neutral = {"clip_ratio/low_min": math.inf, "clip_ratio/high_max": -math.inf,
               "ratio/min": math.inf, "ratio/max": -math.inf}
    assert {name: value.item() for name, value in stats.items()} == dict.fromkeys(stats, 0.0) | neutral


def test_only_the_policys_log_probs_carry_gradient_and_the_stats_none():
    logp, old, ref, adv, mask = batch(0)
    leaves = [x.requires_grad_() for x in (logp, old, ref, adv)]
    loss, stats = grpo_loss(logp, old, adv, mask, total=1, logp_ref=ref, beta=0.1)
    loss.backward()
    assert [x.grad is not None for x in leaves] == [True, False, False, False]
    assert not any(value.ndim or value.requires_grad for value in stats.values())


def test_a_reference_without_beta_is_reported_and_does_not_enter_the_loss():
    logp, old, ref, adv, mask = batch(0)
    ref[0, 0] = 1e4                                           # k3 is as large as it can be here
    without = loss_and_gradient(logp, old, adv, mask, total=1)
    *same, kl = loss_and_gradient(logp, old, adv, mask, total=1, logp_ref=ref)
    assert_same(without, same)
    assert kl > 0


# ---- any distance between policies ----

far = st.one_of(st.floats(-1e4, 1e4), st.sampled_from([88.8, -88.8, grpo.LOG_RATIO_BOUND]))
options_of_a_loss = st.fixed_dictionaries(dict(
    per=units, level=levels, low=st.floats(0, 1), high=st.floats(0, 10), delta=st.sampled_from([None, 12.0]),
    beta=st.sampled_from([0.0, 0.02]), bias_correction_kl=st.booleans()))
advantages = st.lists(st.one_of(st.floats(-5, 5), st.just(0.0)), min_size=2, max_size=2)


def six(x):
    return st.lists(x, min_size=6, max_size=6)


def distant(log_ratios, ref_ratios, adv, dtype, options):
    """Loss, gradient, stats for logp - logp_old = log_ratios (6,), logp_ref - logp_old = ref_ratios (6,)."""
    logp, ref = (torch.tensor(x, dtype=dtype).view(2, 3) for x in (log_ratios, ref_ratios))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    adv = torch.tensor(adv, dtype=dtype)
    return loss_and_gradient(logp, torch.zeros_like(logp), adv, mask, total=5, logp_ref=ref, **options)


@given(six(st.one_of(far, st.just(-math.inf))), six(far), advantages, options_of_a_loss,
       st.sampled_from([torch.bfloat16, torch.float32]))
def test_loss_gradient_and_stats_are_finite_at_any_log_ratio(log_ratios, ref_ratios, adv, options, dtype):
    """Also for tokens whose probability fell to zero; exp of an unbounded log-ratio is inf from 89 nats."""
    for value in distant(log_ratios, ref_ratios, adv, dtype, options):
        assert value.isfinite().all()


@given(st.floats(-60, 60))
def test_the_bound_changes_nothing_below_20_nats_and_has_gradient_zero_above(log_ratio):
    x = double(log_ratio).requires_grad_()
    bounded = min(log_ratio, 20)
    ratio = bounded_exp(x)
    ratio.backward()
    assert ratio.item() == pytest.approx(math.exp(bounded))
    assert x.grad.item() == (pytest.approx(math.exp(log_ratio)) if log_ratio <= 20 else 0.0)
    assert kl_k3(double(0.0), x).item() == pytest.approx(math.expm1(bounded) - bounded)


never = torch.tensor([[-math.inf, -1.0]])
sometimes = torch.tensor([[0.0, -1.0]])


@pytest.mark.parametrize("logp, old, ref", [
    (sometimes, never, None), (never, None, None), (sometimes, sometimes, never)])
def test_a_token_that_the_old_policy_or_the_reference_cannot_sample_is_refused_unless_masked(logp, old, ref):
    options = dict(total=1, logp_ref=ref)
    with pytest.raises(FloatingPointError, match="-inf under the old policy or the reference"):
        grpo_loss(logp, old, torch.ones(1), torch.ones(1, 2), **options)
    assert grpo_loss(logp, old, torch.ones(1), torch.tensor([[0, 1]]), **options)[0].isfinite()


# ---- what is refused ----


@pytest.mark.parametrize("change, words", [
    (dict(logp=torch.zeros(6)), r"expected \(N, L\)"),
    (dict(logp_ref=torch.zeros(2, 1)), r"\(2, 1\)"),
    (dict(mask=torch.ones(3)), r"\(3,\)"),
    (dict(adv=torch.zeros(2, 1)), r"adv \(2, 1\)"),
    (dict(beta=0.1), "without logp_ref"),
    (dict(total=math.nan), "total is nan"),
    (dict(per="prompt"), "prompt"),
    (dict(level="segment"), "segment")])
def test_a_loss_that_makes_no_sense_is_refused_in_one_line(change, words):
    mask = torch.ones(2, 3)
    arguments = dict(logp=-mask, logp_old=None, adv=torch.zeros(2), mask=mask, total=6)
    grpo_loss(**arguments)
    with pytest.raises(ValueError, match=words) as error:
        grpo_loss(**arguments | change)
    assert "\n" not in str(error.value)


# ---- the file by itself ----


def test_the_example_in_the_docstring_is_true():
    results = doctest.testmod(grpo)
    assert results.attempted > 0
    assert results.failed == 0


def test_the_toy_learns_from_chance_with_the_clip_at_work_and_leaves_the_global_generator_alone(capsys):
    before = torch.random.get_rng_state()
    grpo.learn_string("a toy string", 25)
    printed = capsys.readouterr().out
    rewards = re.findall(r"reward (\d\.\d+)", printed)
    assert float(rewards[0]) < 0.1
    assert float(rewards[-1]) > 0.9
    assert any("clipped 0.000" not in line for line in printed.splitlines())
    assert torch.equal(torch.random.get_rng_state(), before)
