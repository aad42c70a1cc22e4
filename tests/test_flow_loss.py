"""How a flow policy learns: RatioNorm, weights of steps, penalties, the loss, a rising reward."""

import dataclasses
import doctest
import inspect
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

import flow_grpo
import grpo
from flow_grpo import (
    FORMS, Replay, flow_grpo_loss, matching_loss, normalised_log_ratio, renoise, replay, replay_of, rollout,
    step_weights, stratified_times, time_grid, transition, transition_kl, velocities_at, velocity_mse)
from policy import declare_torchvision_ops
from sample import map_rows
from velocities import linear_velocity, sample_linear

samplers = pytest.mark.parametrize("sampler", ["sde", "cps", "dance"])
densities = pytest.mark.parametrize("density", ["mean", "sum"])
either_ratio = pytest.mark.parametrize("ratio_norm", [False, True])
late = st.floats(0.1, 0.95)


def near(**options):
    """A trajectory, its replay under another weight (a leaf), the frozen policy's replay, advantages."""
    old, weight, other = sample_linear(**options)
    other.requires_grad_()
    adv = torch.randn(len(old.data), dtype=other.dtype)
    return old, other, replay(linear_velocity(other), old), replay(linear_velocity(weight), old), adv


# ---- ratio, weights, penalties ----


@densities
@samplers
def test_ratio_norm_is_the_papers_formula(sampler, density):
    old, _, new, _, _ = near(sampler=sampler, dtype=torch.float64, density=density)
    value = normalised_log_ratio(old.latents[:, 1:], new.mean, old.means, old.std, density=density)
    shift = (old.means - new.mean).square().flatten(2)
    shift = shift.mean(2) if density == "mean" else shift.sum(2)
    torch.testing.assert_close(value, old.std * (new.logp - old.logp + shift / (2 * old.std**2)))


@given(st.integers(4, 30), st.floats(0.5, 5), st.integers(0, 2), st.integers(1, 2))
def test_step_weights_undo_the_step_sizes_of_the_window(K, shift, start, W):
    times = time_grid(K, shift)
    window = (start, start + W)
    weights = step_weights(times, window)
    torch.testing.assert_close(-weights * times.diff()[start:start + W], torch.ones(W))
    normalised = step_weights(times, window, over=window)
    torch.testing.assert_close(normalised, weights / weights.mean())


@samplers
def test_flat_weights_give_the_gradient_on_the_velocity_one_size_at_every_step(sampler):
    old, weight, _ = sample_linear(N=4000, sampler=sampler, dtype=torch.float64)
    v = replay(linear_velocity(weight), old).v.requires_grad_()
    (gradient,) = torch.autograd.grad(replay_of(v, old).logp.sum(), v)
    options = dict(kind="flat", noise_level=0.7, sampler=sampler)
    sizes = gradient.flatten(2).norm(dim=(0, 2)) * step_weights(old.times, old.window, **options)
    torch.testing.assert_close(sizes / sizes.mean(), torch.ones_like(sizes), rtol=0.05, atol=0)
    one = step_weights(old.times, (1, 2), over=(0, 4), **options)         # a step among those that it may be
    assert one.item() == pytest.approx(step_weights(old.times, (0, 4), over=(0, 4), **options)[1].item())


@given(st.floats(0.05, 3), st.floats(0.05, 3))
def test_the_kl_is_that_of_two_normal_distributions(first, second):
    mean, mean_ref = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    std = torch.tensor([first, second], dtype=torch.float64)
    exact = kl_divergence(Normal(mean, std[:, None]), Normal(mean_ref, std[:, None]))
    torch.testing.assert_close(transition_kl(mean, mean_ref, std, density="sum"), exact.sum(2))
    torch.testing.assert_close(transition_kl(mean, mean_ref, std), exact.mean(2))


@given(t=late, part=late, a=late)
def test_the_sde_kl_in_velocities_has_the_weight_that_its_docstring_states(t, part, a):
    x, v, v_ref = torch.randn(3, 2, 1, 3, dtype=torch.float64)                        # (N, W, D)
    (mean, std), (mean_ref, _) = (transition(x, u, t, t * part, noise_level=a) for u in (v, v_ref))
    sigma = a * math.sqrt(t / (1 - t))
    dt = t * (1 - part)
    weight = dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2
    torch.testing.assert_close(transition_kl(mean, mean_ref, std[None]), weight * velocity_mse(v, v_ref))


def test_the_velocity_mse_is_the_mean_squared_distance_of_each_sample_and_step():
    v, v_ref = torch.randn(2, 2, 3, 4, 5)
    expected = torch.nn.functional.mse_loss(v, v_ref, reduction="none").mean((2, 3))
    torch.testing.assert_close(velocity_mse(v, v_ref), expected)
    assert velocity_mse(v.bfloat16(), v_ref.bfloat16()).dtype == torch.float32


# ---- the loss ----


def test_the_loss_and_every_diagnostic_follow_their_formulas():
    old, _, new, reference, _ = near()
    adv = torch.tensor([1.0, -1.0, 2.0, -0.5, 0.0, 3.0])
    weights = torch.tensor([0.5, 1.0, 3.0])
    loss, stats = flow_grpo_loss(
        new, old, adv, total=11, low=0.002, high=0.004, weights=weights, reference=reference, kl_beta=0.4,
        mse_weight=0.2)
    kl = transition_kl(new.mean, reference.mean, old.std)
    mse = velocity_mse(new.v, reference.v)
    log = (new.logp - old.logp).double()
    adv = adv[:, None]
    ratio = log.exp()
    surrogate = torch.minimum(ratio * adv, ratio.clamp(1 - 0.002, 1 + 0.004) * adv)
    expected = (0.4 * kl + 0.2 * mse - weights * surrogate).sum() / 11
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    low = ((ratio < 1 - 0.002) & (adv < 0)).double()
    high = ((ratio > 1 + 0.004) & (adv > 0)).double()
    assert low.any()
    assert high.any()
    expected = {
        "clip_ratio/low_mean": low.mean(), "clip_ratio/high_mean": high.mean(), "ratio/mean": ratio.mean(),
        "clip_ratio/step_mean": (low + high).mean(0), "ratio/std": ratio.std(correction=0),
        "ratio/step_mean": ratio.mean(0), "ratio/step_std": ratio.std(0, correction=0),
        "approx_kl": log.square().mean() / 2, "kl": kl.mean(), "velocity_mse": mse.mean()}
    assert set(stats) == set(expected)
    for name, value in stats.items():
        torch.testing.assert_close(value.double(), expected[name].detach().double(), rtol=1e-3, atol=1e-7)
        assert not value.requires_grad


@densities
def test_kl_and_ratio_norm_follow_the_density_of_the_trajectory(density):
    old, _, new, reference, adv = near(density=density)
    loss, stats = flow_grpo_loss(
        new, old, adv, total=18, low=9.0, high=9.0, ratio_norm=True, reference=reference)
    expected = transition_kl(new.mean, reference.mean, old.std, density=density).mean()
    torch.testing.assert_close(stats["kl"], expected)
    log = normalised_log_ratio(old.latents[:, 1:], new.mean, old.means, old.std, density=density)
    torch.testing.assert_close(loss, -(log.exp() * adv[:, None]).mean())


@samplers
@either_ratio
def test_the_losss_gradient_is_its_finite_difference(sampler, ratio_norm):
    old, other, _, reference, adv = near(sampler=sampler, N=3, W=2, dtype=torch.float64)
    reference = dataclasses.replace(reference, mean=reference.mean + 0.1, v=reference.v + 0.1)
    options = dict(
        total=6, low=0.5, high=0.5, ratio_norm=ratio_norm, weights=step_weights(old.times, old.window),
        reference=reference, kl_beta=0.3, mse_weight=0.2)

    def loss(weight):
        return flow_grpo_loss(replay(linear_velocity(weight), old), old, adv, **options)[0]

    assert torch.autograd.gradcheck(loss, other)


@either_ratio
def test_splitting_into_micro_batches_changes_neither_loss_nor_gradient(ratio_norm):
    old, weight, other = sample_linear(dtype=torch.float64)
    other.requires_grad_()
    adv = torch.randn(6, dtype=torch.float64)
    weights = torch.tensor([0.5, 1.0, 1.5])
    options = dict(
        total=18, low=0.01, high=0.02, ratio_norm=ratio_norm, weights=weights, kl_beta=0.1, mse_weight=0.3)

    def loss_of(index):
        part = map_rows(lambda rows: rows[index], old)
        reference = replay(linear_velocity(weight), part)
        new = replay(linear_velocity(other), part)
        return flow_grpo_loss(new, part, adv[index], reference=reference, **options)[0]

    whole = loss_of(slice(None))
    pieces = sum(loss_of(index) for index in torch.arange(6).chunk(4))
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(pieces, other), torch.autograd.grad(whole, other))


@either_ratio
def test_neither_the_old_policy_nor_the_reference_nor_the_advantage_receives_gradient(ratio_norm):
    old, other, new, _, adv = near()
    old = dataclasses.replace(old, logp=old.logp.requires_grad_(), means=old.means.requires_grad_())
    frozen = other.detach().clone().requires_grad_()
    reference = replay(linear_velocity(frozen), old)
    leaves = [old.logp, old.means, frozen, adv.requires_grad_()]
    loss, _ = flow_grpo_loss(
        new, old, adv, total=18, low=1.0, high=1.0, ratio_norm=ratio_norm, reference=reference, kl_beta=1.0,
        mse_weight=1.0)
    gradient, *others = torch.autograd.grad(loss, [other, *leaves], allow_unused=True)
    assert (gradient != 0).any()
    assert all(g is None or (g == 0).all() for g in others)


@pytest.mark.parametrize("change, words", [
    (dict(adv=torch.zeros(6, 1)), "adv"), (dict(total=0), "total"),
    (dict(kl_beta=0.1), "reference"), (dict(mse_weight=0.1), "reference"),
    (dict(reference=Replay(None, None, torch.zeros(1, 3, 2, 2))), "are compared")])
def test_a_loss_that_makes_no_sense_is_refused(change, words):
    old, weight, _ = sample_linear()
    arguments = dict(adv=torch.zeros(6), total=18, low=0.1, high=0.1)
    new = replay(linear_velocity(weight), old)
    with pytest.raises(ValueError, match=words):
        flow_grpo_loss(new, old, **arguments | change)
    with pytest.raises(ValueError, match="are compared"):
        flow_grpo_loss(dataclasses.replace(new, v=new.v[:, :1]), old, **arguments)


# ---- any distance between policies ----


def shifted_loss(gaps, adv, **options):
    """(loss, gradient, *stats) if the plain log-ratio, or RatioNorm's with `ratio_norm`, is `gaps` (3, 2)."""
    torch.manual_seed(0)
    old, weight, _ = sample_linear(N=3, W=2, dtype=torch.float64)
    same = replay(linear_velocity(weight), old)
    gaps = torch.tensor(gaps, dtype=torch.float64).view(3, 2)
    logp = (old.logp + gaps).requires_grad_()
    mean = same.mean
    if options["ratio_norm"]:                             # which is linear in the mean
        scale = normalised_log_ratio(old.latents[:, 1:], old.means + 1, old.means, old.std)
        mean = (old.means + (gaps / scale)[..., None, None]).requires_grad_()
    new = Replay(logp, mean, same.v)
    adv = torch.tensor(adv, dtype=torch.float64)
    loss, stats = flow_grpo_loss(new, old, adv, total=5, reference=same, **options)
    (gradient,) = torch.autograd.grad(loss, mean if options["ratio_norm"] else logp)
    return [loss.detach(), gradient, *stats.values()]


def six(x):
    return st.lists(x, min_size=6, max_size=6)


far = st.one_of(st.floats(-1e4, 1e4), st.sampled_from([88.8, -88.8, grpo.LOG_RATIO_BOUND]))
advantages = st.lists(st.one_of(st.floats(-5, 5), st.just(0.0)), min_size=3, max_size=3)
options_of_a_loss = st.fixed_dictionaries(dict(
    ratio_norm=st.booleans(), low=st.floats(0, 1), high=st.floats(0, 10), kl_beta=st.sampled_from([0.0, 0.1]),
    weights=st.sampled_from([None, torch.tensor([0.5, 8.0])])))


@given(six(far), advantages, options_of_a_loss)
def test_loss_gradient_and_stats_are_finite_at_any_log_ratio(gaps, adv, options):
    for value in shifted_loss(gaps, adv, **options):
        assert value.isfinite().all()


@given(six(st.floats(-19.9, 19.9)), advantages, options_of_a_loss)
def test_within_20_nats_loss_gradient_and_stats_are_those_without_a_bound(gaps, adv, options):
    bounded = shifted_loss(gaps, adv, **options)
    with mock.patch.object(flow_grpo, "LOG_RATIO_BOUND", math.inf):
        free = shifted_loss(gaps, adv, **options)
    assert all(torch.equal(a, b) for a, b in zip(bounded, free, strict=True))


@pytest.mark.parametrize("adv", [1.0, 0.0, -1.0])
def test_a_sample_whose_log_density_fell_to_minus_infinity_has_ratio_and_gradient_zero(adv):
    loss, gradient, *stats = shifted_loss([-math.inf] * 6, [adv] * 3, ratio_norm=False, low=0.2, high=0.2)
    assert loss.item() == pytest.approx(0.8 * 6 / 5 if adv < 0 else 0.0)
    assert (gradient == 0).all()
    assert all(value.isfinite().all() for value in stats)


@pytest.mark.parametrize("name", ["clipped_surrogate", "bounded_exp"])
def test_what_both_policy_gradients_share_is_the_same_to_the_letter(name):
    assert inspect.getsource(getattr(flow_grpo, name)) == inspect.getsource(getattr(grpo, name))
    assert flow_grpo.LOG_RATIO_BOUND == grpo.LOG_RATIO_BOUND


# ---- matching losses ----


def matched(N=6, J=3, dtype=torch.float64):
    """Renoised samples, velocities near those of the old policy (a leaf), other velocities, advantages."""
    weight = torch.randn(4, 4, dtype=dtype)
    data = torch.randn(N, 2, 2, dtype=dtype)
    noise = torch.randn(J, N, 2, 2, dtype=dtype)
    drawn = renoise(data, stratified_times(J, seed=0, step=0), noise)
    drawn = dataclasses.replace(drawn, v=velocities_at(linear_velocity(weight), drawn))
    v = (drawn.v + 0.1 * torch.randn_like(drawn.v)).requires_grad_()
    return drawn, v, torch.randn_like(drawn.v), torch.rand(N, dtype=dtype) * 2 - 1


@given(st.integers(1, 9), st.integers(0, 99), st.integers(0, 99))
def test_the_times_of_a_picture_are_one_in_each_of_equal_parts(J, seed, step):
    times = stratified_times(J, seed=seed, step=step)
    parts = torch.arange(J - 1, -1, -1)
    assert ((parts / J <= times) & (times <= (parts + 1) / J)).all()
    assert torch.equal(times, stratified_times(J, seed=seed, step=step))
    assert not torch.equal(times, stratified_times(J, seed=seed, step=step + 1))


def test_renoised_samples_lie_on_the_straight_line_from_data_to_noise():
    drawn, _, _, _ = matched()
    t = drawn.times[None, :, None, None]
    torch.testing.assert_close(drawn.latents, drawn.data[:, None] + t * drawn.target)
    noise = (drawn.data[:, None] + drawn.target).flatten()
    assert noise.std().item() == pytest.approx(1, abs=0.3)


@given(st.integers(0, 10**6), st.floats(0.05, 1))
def test_nft_is_the_two_branches_of_diffusion_nft_without_their_weights(seed, b):
    torch.manual_seed(seed)
    drawn, v, _, adv = matched()
    loss, _ = matching_loss(v, drawn, adv, form="nft", total=1, trust=b)
    right = adv[:, None] / 2 + 0.5
    u = drawn.target
    better = b * v + (1 - b) * drawn.v
    worse = (1 + b) * drawn.v - b * v
    branches = right * velocity_mse(better, u) + (1 - right) * velocity_mse(worse, u)
    expected = ((branches - velocity_mse(drawn.v, u)) / b).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-7)
    (ours,) = torch.autograd.grad(loss, v)
    (theirs,) = torch.autograd.grad(expected, v)
    torch.testing.assert_close(ours, theirs)
    own = velocity_mse(drawn.v, u)
    parts = [(part - own) / (own + 1e-5) / b for part in (velocity_mse(better, u), velocity_mse(worse, u))]
    loss, _ = matching_loss(v, drawn, adv, form="nft", total=1, trust=b, relative=True)
    torch.testing.assert_close(loss, (right * parts[0] + (1 - right) * parts[1]).sum())


def test_awm_and_fpo_are_functions_of_the_change_in_the_flow_matching_error():
    drawn, v, _, adv = matched()
    rise = velocity_mse(v, drawn.target) - velocity_mse(drawn.v, drawn.target)
    loss, stats = matching_loss(v, drawn, adv, form="awm", total=7)
    torch.testing.assert_close(loss, (adv[:, None] * rise).sum() / 7)
    torch.testing.assert_close(stats["rise"], rise.mean())
    curved, _ = matching_loss(v, drawn, adv, form="nft", total=7, trust=adv[:, None])
    torch.testing.assert_close(loss, curved)                                # the identity, with c = A
    ratio = (-rise).clamp(-3, 3).exp()
    loss, _ = matching_loss(v, drawn, adv, form="fpo", total=7, clip=0.05)
    clipped = torch.minimum(ratio * adv[:, None], ratio.clamp(0.95, 1.05) * adv[:, None])
    torch.testing.assert_close(loss, -clipped.sum() / 7)


@pytest.mark.parametrize("form", FORMS)
def test_at_the_old_velocities_every_form_has_the_gradient_of_weighted_flow_matching(form):
    drawn, _, _, adv = matched()
    adv[0] = 0.0
    v = drawn.v.clone().requires_grad_()
    loss, _ = matching_loss(v, drawn, adv, form=form, total=1)
    (gradient,) = torch.autograd.grad(loss, v)
    (expected,) = torch.autograd.grad((adv[:, None] * velocity_mse(v, drawn.target)).sum(), v)
    torch.testing.assert_close(gradient, expected)
    assert (gradient[0] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_matching_losses_of_micro_batches_add_up_and_a_penalty_holds_to_the_reference(form):
    drawn, v, v_ref, adv = matched()
    options = dict(form=form, total=18)
    whole, _ = matching_loss(v, drawn, adv, v_ref=v_ref, mse_weight=0.3, **options)
    plain, _ = matching_loss(v, drawn, adv, **options)
    torch.testing.assert_close(whole - plain, 0.3 * velocity_mse(v, v_ref).sum() / 18)
    parts = 0.0
    for rows in (slice(0, 2), slice(2, 6)):
        part = map_rows(lambda column: column[rows], drawn)
        loss, _ = matching_loss(v[rows], part, adv[rows], v_ref=v_ref[rows], mse_weight=0.3, **options)
        parts = parts + loss
    torch.testing.assert_close(parts, whole)


def test_a_follower_takes_the_place_of_the_policy_that_sampled():
    drawn, v, follower, adv = matched()
    loss, _ = matching_loss(v, drawn, adv, form="nft", total=1, v_old=follower)
    same, _ = matching_loss(v, dataclasses.replace(drawn, v=follower), adv, form="nft", total=1)
    assert loss == same


def test_what_a_matching_loss_cannot_use_is_refused():
    drawn, v, _, adv = matched()
    with pytest.raises(ValueError, match='form is "dpo"'):
        matching_loss(v, drawn, adv, form="dpo", total=1)
    with pytest.raises(ValueError, match="total is 0"):
        matching_loss(v, drawn, adv, form="nft", total=0)
    with pytest.raises(ValueError, match=r"adv is \(6, 1\)"):
        matching_loss(v, drawn, adv[:, None], form="nft", total=1)
    with pytest.raises(ValueError, match="mse_weight needs v_ref"):
        matching_loss(v, drawn, adv, form="nft", total=1, mse_weight=0.1)
    part = v[:, :1]
    for one, others in (part, dict(v_old=part)), (v, dict(v_old=part)), (v, dict(v_ref=part)):
        with pytest.raises(ValueError, match="are compared"):
            matching_loss(one, drawn, adv, form="nft", total=1, **others)
    with pytest.raises(ValueError, match="needs v_old"):
        matching_loss(v, dataclasses.replace(drawn, v=None), adv, form="nft", total=1)


# ---- learning ----


def test_the_example_in_the_docstring_is_true():
    results = doctest.testmod(flow_grpo)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("form", ["grpo", *FORMS])
def test_following_the_gradient_raises_the_reward(form):
    """Of a flow in the plane, which earns 1 on one side of a line."""
    rewards = flow_grpo.improve(flow_grpo.learn_ring(100), updates=40, form=form)
    assert rewards[0] < 0.65
    assert rewards[-1] > rewards[0] + 0.15


def test_without_noise_a_rollout_is_the_loop_of_diffusers_scheduler():
    """So its sigmas are flow times, its timesteps are 1000 of them, and a prediction is noise - data."""
    declare_torchvision_ops()
    from diffusers import FlowMatchEulerDiscreteScheduler
    velocity = linear_velocity(torch.randn(4, 4) / 2)
    x = torch.randn(4, 4)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    data = rollout(velocity, x, scheduler.sigmas, window=(0, 0), noise_level=0.0).data
    assert (data - x).abs().max() > 0.1
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x, timestep / 1000), timestep, x, return_dict=False)[0]
    torch.testing.assert_close(data, x, rtol=1e-5, atol=1e-5)
