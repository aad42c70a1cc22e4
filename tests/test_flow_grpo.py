"""What the flow policy gradient is, as properties, and its agreement with published numbers (tests/golden/flow_steps)."""

import copy
import dataclasses
import inspect
import json
import math
import textwrap
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import flow_grpo
import grpo
from flow_grpo import (Replay, Trajectory, draw_window, flow_grpo_loss, gaussian_logp, log_ratio,
    normalised_log_ratio, replay, replay_of, rollout, select, shared_noise, step_sigma,
    step_weights, time_grid, transition, transition_kl, velocity_mse)
from grpo import LOG_RATIO_BOUND, bounded_exp, clipped_surrogate

GOLDEN = Path(__file__).parent / "golden" / "flow_steps"
CASES = json.loads((GOLDEN / "flow_steps.json").read_text())
STEPS = load_file(GOLDEN / "steps.safetensors")
POLICY = load_file(GOLDEN / "policy.safetensors")
OFFICIAL = {  # how the published code scores each kind
    "sde": dict(normaliser=True, scaled=True),
    "dance": dict(normaliser=True, scaled=True),
    "cps": dict(normaliser=False, scaled=False),
}
# Both sides are fp32 and order their operations differently, so a few units of the last place (6e-8) of the largest term are
# allowed, and no more: a dropped normaliser, a std without sqrt(-dt) or a wrong time is off by 1e-2 and above.
FP32 = dict(rtol=2e-6, atol=2e-6)
kinds = pytest.mark.parametrize("kind", ["sde", "cps", "dance"])
levels = st.floats(0.05, 0.95)
floats = st.floats(-3, 3)


def linear_velocity(weight, bias=0.0):
    return lambda x, t: (x.flatten(1) @ weight).view_as(x) * (1 + t) + bias


def sampled(kind="sde", *, N=6, W=3, dtype=torch.float32, noise_level=0.7, shape=(2, 2), K=8, start=1, **options):
    """A trajectory of a linear velocity, the velocity's weight, and another weight near it."""
    weight = 0.5 * torch.randn(math.prod(shape), math.prod(shape), dtype=dtype)
    noise, step_noise = torch.randn(N, *shape, dtype=dtype), torch.randn(W, N, *shape, dtype=dtype)
    old = rollout(linear_velocity(weight), noise, time_grid(K, 2.0), window=(start, start + W), noise_level=noise_level,
                  kind=kind, step_noise=step_noise, **options)
    return old, weight, weight + 0.05 * torch.randn_like(weight)


# Agreement with the published code


def test_time_grid_is_the_published_grid_bit_for_bit():
    covered = 0
    for schedule in CASES["schedules"]:
        if not schedule["name"].startswith("sd3"):  # that grid is the diffusers scheduler's own
            assert torch.equal(time_grid(schedule["K"], schedule["shift"]), STEPS[schedule["name"] + ".sigmas"])
            covered += 1
    assert covered == 6


@kinds
def test_steps_and_log_probs_are_the_published_ones_on_every_schedule_and_level(kind):
    covered, without_density, options = 0, 0, OFFICIAL[kind]
    for name, level in [(schedule["name"], level) for schedule in CASES["schedules"] for level in CASES["levels"]]:
        times, x, v, noise = (STEPS[f"{name}.{k}"] for k in ("sigmas", "x", "v", "noise"))
        means, stds, nexts, logps, elements = (
            STEPS[f"{name}.{kind}.a{level}.{k}"] for k in ("mean", "std", "next", "logp", "logp_elem"))
        for i in range(len(x)):
            covered += 1
            mean, std = transition(x[i], v[i], times[i], times[i + 1], noise_level=level, kind=kind)
            # DanceGRPO takes the score as a difference divided by t^2, which costs its fp32 digits near t = 0.
            lost = level**2 * (times[i] - times[i + 1]).item() / (2 * times[i].item() ** 2) if kind == "dance" else 0.0
            error = (3e-7 + 2e-7 * lost) * (x[i].abs().max() + v[i].abs().max()).item()
            torch.testing.assert_close(mean, means[i], rtol=0, atol=error)
            torch.testing.assert_close(std, stds[i], rtol=2e-7, atol=0)
            torch.testing.assert_close(mean + std * noise[i], nexts[i], rtol=0, atol=error + 5e-7 * nexts[i].abs().max().item())
            if std == 0:
                assert (kind, i) == ("cps", len(x) - 1)
                with pytest.raises(ValueError, match="no density"):
                    gaussian_logp(nexts[i], mean, std, **options)
                without_density += 1
                continue
            # Scored at the published mean: the rounding of next - mean reaches the log-density divided by std.
            error = 1e-6 + 3e-7 * means[i].abs().max().item() * (1 / std.item() if options["scaled"] else 1)
            torch.testing.assert_close(gaussian_logp(nexts[i], means[i], std, **options), logps[i], rtol=1e-6, atol=error)
            entries = gaussian_logp(nexts[i].reshape(-1, 1), means[i].reshape(-1, 1), std, reduce="sum", **options)
            torch.testing.assert_close(entries, elements[i].flatten(), rtol=1e-6, atol=error)
    assert covered == 3 * (2 * (10 + 15 + 25) + 10) and without_density == (21 if kind == "cps" else 0)


def test_log_probs_without_normaliser_are_those_of_the_bagel_file():
    covered = 0
    for schedule in CASES["schedules"]:
        for kind in ("sde", "cps"):
            for level in CASES["levels"]:
                key = f"{schedule['name']}.{kind}.a{level}"
                for i in range(schedule["K"] - (kind == "cps")):
                    x_next, mean, std = (STEPS[f"{key}.{k}"][i] for k in ("next", "mean", "std"))
                    logp = gaussian_logp(x_next, mean, std, normaliser=False, scaled=kind == "sde")
                    torch.testing.assert_close(logp, STEPS[f"{key}.bagel_logp"][i], rtol=1e-5, atol=1e-5)
                    covered += 1
    assert covered == 3 * (2 * (10 + 15 + 25) + 10) * 2 - 3 * 7


def policy_case(case):
    """The case as a trajectory of one noisy step with v_old, replayed with v_new (a leaf) and with v_ref."""
    P = {k.split(".", 1)[1]: v for k, v in POLICY.items() if k.startswith(case["case"] + ".")}
    times, step = STEPS[case["schedule"] + ".sigmas"], case["step"]
    _, std = transition(P["x"], P["v_old"], times[step], times[step + 1], noise_level=case["noise_level"], kind=case["kind"])
    latents, means = torch.stack([P["x"], P["next"]], 1), P["mean_old"][:, None]
    old = Trajectory(times, (step, step + 1), case["kind"], case["noise_level"], latents, means, std[None], P["logp_old"][:, None],
                     P["next"], **OFFICIAL[case["kind"]])
    v_new = P["v_new"].clone().requires_grad_()
    reference = replay(lambda x, t: P["v_ref"], old)
    adv = P["advantages"].clamp(-case["adv_clip_max"], case["adv_clip_max"])
    return P, old, v_new, replay(lambda x, t: v_new, old), reference, adv


def test_ppo_loss_gradient_and_diagnostics_are_the_published_ones():
    covered = {"sde": 0, "cps": 0}
    for case in CASES["policy_cases"]:
        P, old, v_new, new, reference, adv = policy_case(case)
        scalars = case["scalars"]
        # Log-densities of size 1 to 10 carry 1e-6 of rounding, and so does their difference, the log-ratio.
        torch.testing.assert_close(old.std, torch.tensor([scalars["std"]]), rtol=2e-6, atol=0)
        torch.testing.assert_close(new.logp[:, 0].detach(), P["logp_new"], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(log_ratio(new.logp, old.logp).exp()[:, 0].detach(), P["ppo.ratio"], rtol=0, atol=2e-6)
        # The published KL of "sde" is |dt| times the true one (see transition_kl), so its beta is scaled likewise.
        dt = case["sigma"] - case["sigma_next"] if case["kind"] == "sde" else 1.0
        loss, stats = flow_grpo_loss(new, old, adv, total=len(adv), low=case["clip_range"], high=case["clip_range"],
                                     kl_beta=case["beta"] * dt, reference=reference)
        torch.testing.assert_close(loss.item(), scalars["ppo.loss"], rtol=5e-6, atol=5e-6)
        # A shift of 1e-4 between means of size 1 keeps three digits in fp32.
        torch.testing.assert_close(stats["kl"].item() * dt, scalars["kl.coded"], rtol=2e-3, atol=0)
        torch.testing.assert_close(stats["approx_kl"].item(), scalars["ppo.approx_kl"], rtol=0.02, atol=1e-11)
        (gradient,) = torch.autograd.grad(loss, v_new)
        torch.testing.assert_close(gradient, P["ppo.grad_v_new"], rtol=2e-5, atol=2e-6 * P["ppo.grad_v_new"].abs().max().item())
        covered[case["kind"]] += 1
    assert covered == {"sde": 14, "cps": 12}


def test_the_guarded_loss_and_gradient_are_the_papers_per_sample_values():
    covered = 0
    for case in CASES["policy_cases"]:
        P, old, v_new, new, _, adv = policy_case(case)
        if case["kind"] == "sde":
            ratio = normalised_log_ratio(P["next"][:, None], new.mean, P["mean_old"][:, None], old.std).exp()[:, 0].detach()
            torch.testing.assert_close(ratio, P["guard_paper.ratio"], rtol=0, atol=2e-6)
            loss, _ = flow_grpo_loss(new, old, adv, total=len(adv), low=case["clip_range"], high=case["clip_range"],
                                     ratio_norm=True, weights=step_weights(old.times, old.window))
            torch.testing.assert_close(loss.item(), case["scalars"]["guard_paper.loss"], rtol=5e-6, atol=5e-5)
            (gradient,) = torch.autograd.grad(loss, v_new)
            expected = P["guard_paper.grad_v_new"]
            torch.testing.assert_close(gradient, expected, rtol=2e-5, atol=2e-6 * expected.abs().max().item())
            covered += 1
    assert covered == 14


def test_the_kl_is_the_true_one_per_sample():
    covered = 0
    for case in CASES["policy_cases"]:
        P = {k.split(".", 1)[1]: v for k, v in POLICY.items() if k.startswith(case["case"] + ".")}
        arguments = P["mean_new"][:, None], P["mean_ref"][:, None], torch.tensor([case["scalars"]["std"]])
        for reduce in ("mean", "sum"):
            kl = transition_kl(*arguments, reduce=reduce)[:, 0]
            torch.testing.assert_close(kl, P[f"kl.true_{reduce}"], rtol=1e-6, atol=0)  # of the stored fp32 means
        dt = case["sigma"] - case["sigma_next"] if case["kind"] == "sde" else 1.0
        torch.testing.assert_close(transition_kl(*arguments)[:, 0] * dt, P["kl.bagel_coded"], rtol=2e-3, atol=0)
        covered += 1
    assert covered == 26


def test_the_surrogate_with_two_clip_ranges_is_that_of_the_bagel_learn_loop():
    P = {k.split(".", 1)[1]: v for k, v in POLICY.items() if k.startswith("bagel_ppo.")}
    logp = P["logp_new"].clone().requires_grad_()
    ratio = log_ratio(logp, P["logp_old"]).exp()
    low, high = CASES["bagel_ppo"]["clip_range_lt"], CASES["bagel_ppo"]["clip_range_gt"]
    loss = clipped_surrogate(ratio, P["advantages"], low=low, high=high)
    torch.testing.assert_close(ratio.detach(), P["ratio"], rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.detach(), P["policy_loss"], rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(gradient, P["grad_logp_new"], rtol=1e-6, atol=1e-7)
    assert len(gradient) == 12 and low != high


# Times and windows


@given(st.integers(1, 60), st.floats(0.05, 20))
def test_a_time_grid_falls_from_exactly_one_to_exactly_zero(steps, shift):
    times = time_grid(steps, shift)
    assert times.dtype == torch.float32 and times.shape == (steps + 1,) and times[0] == 1 and times[-1] == 0
    assert (times[1:] < times[:-1]).all()


@given(st.integers(2, 40), st.floats(1.5, 10))
def test_a_shift_above_one_spends_more_steps_at_high_noise_and_its_inverse_shift_undoes_it(steps, shift):
    even, shifted = time_grid(steps)[1:-1], time_grid(steps, shift)[1:-1]
    assert (shifted > even).all()
    torch.testing.assert_close(shifted / (1 - shifted), shift * even / (1 - even), rtol=1e-4, atol=0)


@given(st.integers(0, 6), st.integers(0, 5), st.integers(0, 6), st.integers(0, 2**31), st.integers(0, 2**31))
def test_a_window_stays_in_its_range_and_leaves_the_global_generator_alone(size, low, room, seed, step):
    before = torch.get_rng_state()
    start, stop = draw_window(size, low, low + size + room, seed=seed, step=step)
    assert low <= start and stop == start + size and stop <= low + size + room
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(1)
    assert draw_window(size, low, low + size + room, seed=seed, step=step) == (start, stop)


def test_window_starts_are_uniform_over_steps_and_differ_between_seeds():
    starts = [[draw_window(3, 1, 8, seed=seed, step=step)[0] for step in range(600)] for seed in (0, 1)]
    for start in range(1, 6):  # 120 expected of 600, standard deviation 10
        assert 75 < starts[0].count(start) < 165
    agreement = sum(a == b for a, b in zip(*starts))
    assert set(starts[0]) == {1, 2, 3, 4, 5} and 75 < agreement < 165
    assert starts[0][1:200] != starts[1][:199]  # seed and step do not add up to one number


@pytest.mark.parametrize("size, low, high", [(4, 0, 3), (2, 3, 4), (-1, 0, 3), (1, -1, 3)])
def test_a_window_that_does_not_fit_is_an_error(size, low, high):
    with pytest.raises(ValueError, match="draw_window"):
        draw_window(size, low, high, seed=0, step=0)


@pytest.mark.parametrize("steps, shift", [(0, 1.0), (3, 0.0), (3, -1.0)])
def test_a_grid_without_steps_or_with_a_shift_not_above_zero_is_an_error(steps, shift):
    with pytest.raises(ValueError, match="time_grid"):
        time_grid(steps, shift)


# One step


@kinds
@given(t=st.floats(0.1, 1), part=st.floats(0, 0.9), x=floats, v=floats)
def test_at_noise_level_zero_a_step_is_the_euler_step_of_the_ode(kind, t, part, x, v):
    x, v, t_next = torch.tensor([[x]], dtype=torch.float64), torch.tensor([[v]], dtype=torch.float64), t * part
    mean, std = transition(x, v, t, t_next, noise_level=0.0, kind=kind)
    torch.testing.assert_close(mean, x + (t_next - t) * v)
    assert std == 0


@given(steps=st.integers(2, 50), shift=st.floats(0.5, 5), a=st.floats(0.1, 1.5))
def test_the_first_sde_step_has_std_a_and_keeps_one_minus_half_a_squared_of_the_noise(steps, shift, a):
    times = time_grid(steps, shift).double()
    x = torch.ones(1, 1, dtype=torch.float64)
    mean, std = transition(x, torch.zeros_like(x), times[0], times[1], noise_level=a)
    torch.testing.assert_close(std.item(), a)
    torch.testing.assert_close(mean.item(), 1 - a**2 / 2)


def test_the_first_step_at_bagels_default_level_overshoots_the_variance_and_cps_does_not():
    times = time_grid(15, 3.0).double()
    data, noise = torch.tensor([[0.0]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)
    variance = {}
    for kind in ("sde", "cps"):  # data 0, so the mean is the factor of the old noise
        mean, std = transition(noise, noise - data, times[0], times[1], noise_level=1.3, kind=kind)
        variance[kind] = (mean**2 + std**2).item()
    assert variance["sde"] > 1.7 and variance["cps"] == pytest.approx(times[1].item() ** 2)


@given(t=st.floats(0.2, 0.95), part=st.floats(0.1, 0.95), a=levels)
def test_the_sde_drift_is_velocity_minus_half_sigma_squared_times_the_score(t, part, a):
    data = Normal(torch.tensor(0.4, dtype=torch.float64), 0.5)
    x = torch.linspace(-2, 2, 7, dtype=torch.float64).requires_grad_()
    marginal = Normal((1 - t) * data.mean, math.sqrt(((1 - t) * 0.5) ** 2 + t**2))
    (score,) = torch.autograd.grad(marginal.log_prob(x).sum(), x)
    v, dt = exact_velocity(0.4, 0.5)(x.detach(), t), t * part - t
    for kind, sigma in (("sde", a * math.sqrt(t / (1 - t))), ("dance", a)):
        mean, std = transition(x.detach()[:, None], v[:, None], t, t * part, noise_level=a, kind=kind)
        torch.testing.assert_close((mean[:, 0] - x.detach()) / dt, v - sigma**2 / 2 * score)
        assert std.item() == pytest.approx(sigma * math.sqrt(-dt))
    assert step_sigma(t, t * part, a).item() == pytest.approx(a * math.sqrt(t / (1 - t)), rel=1e-5)


@given(t=st.floats(0.1, 1), part=st.floats(0, 1), a=st.floats(0, 2), data=floats, noise=floats)
def test_a_cps_step_keeps_the_coefficients_of_data_and_noise(t, part, a, data, noise):
    data, noise = torch.tensor([[data]], dtype=torch.float64), torch.tensor([[noise]], dtype=torch.float64)
    t_next = t * part
    mean, std = transition((1 - t) * data + t * noise, noise - data, t, t_next, noise_level=a, kind="cps")
    one = torch.ones_like(data)
    kept, _ = transition(t * one, one, t, t_next, noise_level=a, kind="cps")  # of noise 1 with data 0
    torch.testing.assert_close(mean, (1 - t_next) * data + kept * noise)
    torch.testing.assert_close((kept**2 + std**2).sqrt().item(), t_next, atol=1e-9, rtol=1e-9)
    assert std.item() == pytest.approx(t_next * math.sin(a * math.pi / 2), abs=1e-12) and kept >= 0


@kinds
def test_a_half_precision_step_is_computed_in_fp32_and_a_float64_step_in_float64(kind):
    x, v = torch.randn(2, 3), torch.randn(2, 3)
    mean, std = transition(x.bfloat16(), v.bfloat16(), 0.5, 0.25, noise_level=0.7, kind=kind)
    expected, _ = transition(x.bfloat16().double(), v.bfloat16().double(), 0.5, 0.25, noise_level=0.7, kind=kind)
    assert mean.dtype == std.dtype == torch.float32 and expected.dtype == torch.float64
    torch.testing.assert_close(mean, expected.float(), **FP32)
    assert gaussian_logp(x.bfloat16(), mean.bfloat16(), 0.3).dtype == torch.float32
    assert velocity_mse(x[:, None].bfloat16(), v[:, None].bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kind, level", [("ode", 0.5), ("sde", -0.1), ("cps", -0.1), ("cps", 2.1)])
def test_an_unknown_kind_or_an_impossible_noise_level_is_an_error(kind, level):
    with pytest.raises(ValueError, match="transition"):
        transition(torch.zeros(1, 1), torch.zeros(1, 1), 0.5, 0.4, noise_level=level, kind=kind)


# Log-density


@given(st.integers(1, 4), st.integers(1, 5), st.floats(0.01, 3))
def test_the_log_density_is_the_normal_distributions_summed_or_averaged_over_entries(N, D, std):
    x, mean = torch.randn(N, D, 2, dtype=torch.float64), torch.randn(N, D, 2, dtype=torch.float64)
    entries = Normal(mean, std).log_prob(x)
    torch.testing.assert_close(gaussian_logp(x, mean, std, reduce="sum"), entries.sum((1, 2)))
    torch.testing.assert_close(gaussian_logp(x, mean, std), entries.mean((1, 2)))
    peak = Normal(mean, std).log_prob(mean)
    torch.testing.assert_close(gaussian_logp(x, mean, std, normaliser=False), (entries - peak).mean((1, 2)))
    unit = Normal(mean, math.sqrt(0.5))  # whose exponent is -(x - mean)^2
    expected = (unit.log_prob(x) - unit.log_prob(mean)).sum((1, 2))
    torch.testing.assert_close(gaussian_logp(x, mean, std, reduce="sum", normaliser=False, scaled=False), expected)


@pytest.mark.parametrize("scaled", [True, False])
def test_an_ode_step_has_no_density(scaled):
    with pytest.raises(ValueError, match="ODE step"):
        gaussian_logp(torch.zeros(2, 3), torch.zeros(2, 3), 0.0, scaled=scaled)


def test_an_unknown_reduction_is_an_error():
    with pytest.raises(ValueError, match='"mean" or "sum"'):
        gaussian_logp(torch.zeros(2, 3), torch.zeros(2, 3), 1.0, reduce="none")


# Rollout and replay


def exact_velocity(mean, std):
    """Velocity of data Normal(mean, std): E[noise - data | x]."""
    def velocity(x, t):
        variance = ((1 - t) * std) ** 2 + t**2
        return (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean) - mean
    return velocity


@pytest.mark.parametrize("kind, level", [("sde", 0.3), ("sde", 0.7), ("dance", 0.7), ("sde", 0.0)])
def test_with_the_exact_velocity_the_samples_tend_to_the_data(kind, level):
    K, N = 400, 20_000
    window = (0, K) if level else (0, 0)
    step_noise = torch.randn(window[1], N, 1) if level else None
    data = rollout(exact_velocity(0.4, 0.5), torch.randn(N, 1), time_grid(K), window=window, noise_level=level, kind=kind,
                   step_noise=step_noise).data
    assert data.mean().item() == pytest.approx(0.4, abs=0.02)  # standard error 0.0035
    assert data.std().item() == pytest.approx(0.5, abs=0.02)  # standard error 0.0025, and the error of K steps


@kinds
def test_an_empty_window_is_a_plain_euler_loop_that_needs_no_noise(kind):
    weight, noise, times = 0.5 * torch.randn(4, 4), torch.randn(3, 2, 2), time_grid(7, 3.0)
    velocity = linear_velocity(weight)
    x = noise
    for i in range(7):
        x = x + velocity(x, times[i]) * (times[i + 1] - times[i])
    trajectory = rollout(velocity, noise, times, window=(0, 0), noise_level=0.7, kind=kind)
    torch.testing.assert_close(trajectory.data, x, **FP32)
    assert trajectory.logp.shape == (3, 0) and trajectory.means.shape == (3, 0, 2, 2)


@kinds
def test_a_trajectory_is_an_ode_before_the_window_noisy_in_it_and_an_ode_after_it(kind):
    weight, noise, step_noise, times = 0.5 * torch.randn(4, 4), torch.randn(3, 2, 2), torch.randn(2, 3, 2, 2), time_grid(6, 2.0)
    velocity = linear_velocity(weight.requires_grad_())
    old = rollout(velocity, noise, times, window=(2, 4), noise_level=0.6, kind=kind, step_noise=step_noise)
    x = noise
    for i in range(6):
        level = 0.6 if i in (2, 3) else 0.0
        mean, std = transition(x, velocity(x, times[i]), times[i], times[i + 1], noise_level=level, kind=kind)
        if i in (2, 3):
            torch.testing.assert_close(old.latents[:, i - 2], x, **FP32)
            torch.testing.assert_close(old.means[:, i - 2], mean, **FP32)
            torch.testing.assert_close(old.std[i - 2], std, **FP32)
            x = mean + std * step_noise[i - 2]
            torch.testing.assert_close(old.latents[:, i - 1], x, **FP32)
            torch.testing.assert_close(old.logp[:, i - 2], Normal(mean, std).log_prob(x).mean((1, 2)), rtol=1e-5, atol=1e-5)
        else:
            x = mean
    torch.testing.assert_close(old.data, x, **FP32)
    assert old.window == (2, 4) and old.kind == kind
    assert not any(value.requires_grad for value in (old.latents, old.means, old.std, old.logp, old.data))


def test_the_model_is_called_once_a_step_at_the_grids_times():
    seen = []
    rollout(lambda x, t: (seen.append(t), x)[1], torch.randn(2, 3), time_grid(5, 3.0), window=(1, 2), noise_level=0.5,
            step_noise=torch.randn(1, 2, 3))
    assert all(t.dim() == 0 for t in seen) and torch.equal(torch.stack(seen), time_grid(5, 3.0)[:-1])


@kinds
@pytest.mark.parametrize("options", [dict(), dict(reduce="sum"), dict(normaliser=False, scaled=False)])
def test_replay_with_unchanged_weights_gives_ratio_exactly_one(kind, options):
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.Tanh(), torch.nn.Linear(32, 12))
    velocity = lambda x, t: (net(x.flatten(1)) * (1 + t)).view_as(x)
    old = rollout(velocity, torch.randn(5, 3, 4), time_grid(6, 3.0), window=(0, 4), noise_level=0.8, kind=kind,
                  step_noise=torch.randn(4, 5, 3, 4), **options)
    new = replay(velocity, old)
    assert torch.equal(new.logp, old.logp) and torch.equal(new.mean, old.means) and new.logp.requires_grad
    for ratio_norm in (False, True):
        _, stats = flow_grpo_loss(new, old, torch.randn(5), total=20, low=1e-6, high=1e-6, ratio_norm=ratio_norm)
        assert stats["ratio/mean"] == 1 and stats["ratio/std"] == 0 and stats["approx_kl"] == 0


@kinds
def test_the_log_densitys_gradient_in_the_velocity_agrees_with_finite_differences(kind):
    old, _, _ = sampled(kind, N=2, W=2, dtype=torch.float64)
    v = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: replay(lambda x, t: v, old).logp, v)


@kinds
@pytest.mark.parametrize("ratio_norm", [False, True])
def test_the_losss_gradient_agrees_with_finite_differences(kind, ratio_norm):
    old, _, other = sampled(kind, N=3, W=2, dtype=torch.float64)
    reference, adv = replay(linear_velocity(0.9 * other), old), torch.randn(3, dtype=torch.float64)

    def loss(weight):
        return flow_grpo_loss(replay(linear_velocity(weight), old), old, adv, total=6, low=0.5, high=0.5, ratio_norm=ratio_norm,
                              weights=step_weights(old.times, old.window), reference=reference, kl_beta=0.3, mse_weight=0.2)[0]

    assert torch.autograd.gradcheck(loss, other.clone().requires_grad_())


@pytest.mark.parametrize("window, shape", [
    ((0, 6), (6, 2, 3)), ((-1, 1), (2, 2, 3)), ((3, 2), (0, 2, 3)), ((0, 2), (1, 2, 3)), ((0, 2), (2, 2, 4)), ((0, 2), None),
])
def test_a_window_outside_the_grid_or_without_its_noise_is_an_error(window, shape):
    with pytest.raises(ValueError, match="rollout"):
        rollout(lambda x, t: x, torch.zeros(2, 3), time_grid(5), window=window, noise_level=0.5,
                step_noise=None if shape is None else torch.zeros(shape))


@pytest.mark.parametrize("kind, level, window", [("cps", 0.5, (4, 5)), ("sde", 0.0, (1, 2)), ("cps", 0.0, (1, 2))])
def test_a_window_with_a_step_of_std_zero_is_an_error(kind, level, window):
    with pytest.raises(ValueError, match="no density"):
        rollout(lambda x, t: x, torch.zeros(2, 3), time_grid(5), window=window, noise_level=level, kind=kind,
                step_noise=torch.zeros(1, 2, 3))


@pytest.mark.parametrize("steps", [(), (3,), (-1,)])
def test_replaying_no_step_or_a_step_outside_the_window_is_an_error(steps):
    old, weight, _ = sampled()
    with pytest.raises(ValueError, match="window.s steps 0..2"):
        replay(linear_velocity(weight), old, steps=steps)


@kinds
@pytest.mark.parametrize("steps", [(0, 1, 2), (1,), (2, 0)])
def test_velocities_of_some_steps_score_as_those_steps_of_a_whole_replay(kind, steps):
    old, _, other = sampled(kind)
    whole = replay(linear_velocity(other), old)
    part = replay_of(whole.v[:, list(steps)], old, steps=steps)
    assert part.steps == steps
    for name in ("v", "mean", "logp"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[:, list(steps)]), name
    assert replay_of(whole.v.bfloat16(), old).v.dtype == torch.float32
    with pytest.raises(ValueError, match="replay_of: v is"):
        replay_of(whole.v[:, :, :1], old, steps=steps)


@given(st.integers(1, 4), st.integers(1, 4))
def test_shared_noise_repeats_each_prompts_noise_for_its_group_prompt_major(B, G):
    noise = torch.randn(B, 2, 3)
    assert torch.equal(shared_noise(noise, G), torch.stack([noise[b] for b in range(B) for _ in range(G)]))


# Ratio, weights, penalties


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@kinds
def test_ratio_norm_is_the_papers_formula_in_value_and_gradient(kind, reduce):
    old, _, other = sampled(kind, dtype=torch.float64, reduce=reduce)
    new = replay(linear_velocity(other.requires_grad_()), old)
    value = normalised_log_ratio(old.latents[:, 1:], new.mean, old.means, old.std, reduce=reduce)
    formula = []
    for w in range(3):
        shift = ((old.means[:, w] - new.mean[:, w]) ** 2).flatten(1)
        shift = shift.mean(1) if reduce == "mean" else shift.sum(1)
        formula.append(old.std[w] * (new.logp[:, w] - old.logp[:, w] + shift / (2 * old.std[w] ** 2)))
    formula = torch.stack(formula, 1)
    torch.testing.assert_close(value, formula)
    mixed = torch.randn(6, 3, dtype=torch.float64)
    gradients = [torch.autograd.grad((y * mixed).sum(), other, retain_graph=True)[0] for y in (value, formula)]
    torch.testing.assert_close(*gradients)


def test_ratio_norm_centres_the_log_ratio_and_evens_its_spread_over_steps():
    old, weight, _ = sampled(N=4000, W=5, K=6, start=0, shape=(4,), reduce="sum")
    shifted = replay(lambda x, t: linear_velocity(weight)(x, t) + 0.5, old)
    plain = log_ratio(shifted.logp, old.logp)
    shift = (shifted.mean - old.means).flatten(2).norm(dim=2).mean(0)                 # (W,)
    normed = normalised_log_ratio(old.latents[:, 1:], shifted.mean, old.means, old.std, reduce="sum") / shift
    torch.testing.assert_close(plain.mean(0), -((shift / old.std) ** 2) / 2, rtol=0, atol=0.06)
    torch.testing.assert_close(normed.mean(0), torch.zeros(5), rtol=0, atol=0.06)     # standard error 1 / sqrt(4000) = 0.016
    torch.testing.assert_close(normed.std(0), torch.ones(5), rtol=0, atol=0.06)


@given(st.integers(4, 30), st.floats(0.5, 5), st.integers(0, 2), st.integers(1, 2))
def test_step_weights_undo_the_step_sizes_of_the_window(K, shift, start, W):
    times = time_grid(K, shift)
    weights = step_weights(times, (start, start + W))
    for w in range(W):
        assert weights[w].item() * (times[start + w] - times[start + w + 1]).item() == pytest.approx(1, rel=1e-5)
    normalised = step_weights(times, (start, start + W), normalise=True)
    assert normalised.mean().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(normalised / normalised[0], weights / weights[0])


@given(st.floats(0.05, 3), st.floats(0.05, 3))
def test_the_kl_is_that_of_two_normal_distributions(std_first, std_second):
    mean, mean_ref = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    std = torch.tensor([std_first, std_second], dtype=torch.float64)
    exact = kl_divergence(Normal(mean, std[:, None]), Normal(mean_ref, std[:, None]))
    torch.testing.assert_close(transition_kl(mean, mean_ref, std, reduce="sum"), exact.sum(2))
    torch.testing.assert_close(transition_kl(mean, mean_ref, std), exact.mean(2))


@given(t=st.floats(0.1, 0.95), part=st.floats(0.1, 0.95), a=levels)
def test_the_sde_kl_in_velocities_has_the_weight_that_its_docstring_states(t, part, a):
    x, v, v_ref = (torch.randn(2, 3, dtype=torch.float64) for _ in range(3))
    (mean, std), (mean_ref, _) = (transition(x, u, t, t * part, noise_level=a) for u in (v, v_ref))
    sigma, dt = a * math.sqrt(t / (1 - t)), t * (1 - part)
    expected = dt / 2 * (sigma * (1 - t) / (2 * t) + 1 / sigma) ** 2 * velocity_mse(v[:, None], v_ref[:, None], reduce="sum")
    torch.testing.assert_close(transition_kl(mean[:, None], mean_ref[:, None], std, reduce="sum"), expected)


def test_the_velocity_mse_is_the_squared_distance_of_each_sample_and_step():
    v, v_ref = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for n in range(2):
        for w in range(3):
            square = sum((v[n, w, i, j] - v_ref[n, w, i, j]).item() ** 2 for i in range(4) for j in range(5))
            assert velocity_mse(v, v_ref, reduce="sum")[n, w].item() == pytest.approx(square, rel=1e-5)
            assert velocity_mse(v, v_ref)[n, w].item() == pytest.approx(square / 20, rel=1e-5)


# Loss


def test_the_surrogate_is_the_text_policys_to_the_letter():
    assert inspect.getsource(clipped_surrogate) == inspect.getsource(grpo.clipped_surrogate)


def test_the_loss_is_the_sum_over_samples_and_steps_of_surrogate_and_penalties_divided_by_total():
    old, weight, other = sampled()
    new, reference = replay(linear_velocity(other), old), replay(linear_velocity(weight), old)
    adv, weights = torch.randn(6), torch.tensor([0.5, 1.0, 3.0])
    expected, clipped = 0.0, 0
    for n in range(6):
        for w in range(3):
            ratio = math.exp(new.logp[n, w] - old.logp[n, w])
            bounded = min(max(ratio, 1 - 0.003), 1 + 0.005)
            clipped += ratio != bounded
            square = ((new.mean[n, w] - reference.mean[n, w]) ** 2).mean().item()
            expected -= weights[w].item() * min(ratio * adv[n].item(), bounded * adv[n].item())
            expected += 0.4 * square / (2 * old.std[w].item() ** 2)
            expected += 0.2 * ((new.v[n, w] - reference.v[n, w]) ** 2).sum().item()
    loss, _ = flow_grpo_loss(new, old, adv, total=11, low=0.003, high=0.005, weights=weights, reference=reference, kl_beta=0.4,
                             mse_weight=0.2, mse_reduce="sum")
    assert loss.item() == pytest.approx(expected / 11, rel=1e-4) and 0 < clipped < 18


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_kl_and_ratio_norm_follow_the_reduction_of_the_trajectory(reduce):
    old, weight, other = sampled(reduce=reduce)
    new, reference, adv = replay(linear_velocity(other), old), replay(linear_velocity(weight), old), torch.randn(6)
    common = dict(total=18, low=9.0, high=9.0)
    _, stats = flow_grpo_loss(new, old, adv, **common, reference=reference)
    torch.testing.assert_close(stats["kl"], transition_kl(new.mean, reference.mean, old.std, reduce=reduce).mean())
    loss, _ = flow_grpo_loss(new, old, adv, **common, ratio_norm=True)
    log = normalised_log_ratio(old.latents[:, 1:], new.mean, old.means, old.std, reduce=reduce)
    torch.testing.assert_close(loss, -(log.exp() * adv[:, None]).mean())


def test_before_any_update_the_gradient_is_that_of_the_advantage_weighted_log_density():
    old, weight, _ = sampled(dtype=torch.float64)
    weight.requires_grad_()
    adv = torch.randn(6, dtype=torch.float64)
    loss, _ = flow_grpo_loss(replay(linear_velocity(weight), old), old, adv, total=18, low=1e-4, high=1e-4)
    x, total = old.latents, 0.0
    for w in range(3):
        mean, std = transition(x[:, w], linear_velocity(weight)(x[:, w], old.times[1 + w]), old.times[1 + w], old.times[2 + w],
                               noise_level=0.7)
        total = total + (adv * Normal(mean, std).log_prob(x[:, w + 1]).mean((1, 2))).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(-total / 18, weight))


@pytest.mark.parametrize("ratio_norm", [False, True])
def test_the_gradient_is_exactly_zero_beyond_the_clip_on_the_side_that_the_advantage_favours(ratio_norm):
    old, weight, other = sampled(N=8, W=1)
    other.requires_grad_()
    for n in range(8):
        one = select(old, slice(n, n + 1))
        new = replay(linear_velocity(other), one)
        log = normalised_log_ratio(one.latents[:, 1:], new.mean, one.means, one.std) if ratio_norm else new.logp - one.logp
        favoured = 1.0 if log.item() > 0 else -1.0
        for adv, zero in ((favoured, True), (-favoured, False)):
            loss, stats = flow_grpo_loss(new, one, torch.tensor([adv]), total=1, low=1e-7, high=1e-7, ratio_norm=ratio_norm)
            (gradient,) = torch.autograd.grad(loss, other, retain_graph=True)
            assert (gradient == 0).all() == zero
            assert stats["clip_ratio/high_mean"] == (zero and adv > 0) and stats["clip_ratio/low_mean"] == (zero and adv < 0)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("ratio_norm", [False, True])
def test_splitting_into_micro_batches_and_steps_changes_neither_loss_nor_gradient(parts, by_step, ratio_norm):
    old, weight, other = sampled(dtype=torch.float64)
    other.requires_grad_()
    adv, weights = torch.randn(6, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.5
    options = dict(total=18, low=0.01, high=0.02, ratio_norm=ratio_norm, weights=weights, kl_beta=0.1, mse_weight=0.3)

    def loss_of(index, steps):
        part = select(old, index)
        with torch.no_grad():
            reference = replay(linear_velocity(weight), part, steps=steps)
        new = replay(linear_velocity(other), part, steps=steps)
        return flow_grpo_loss(new, part, adv[index], reference=reference, **options)[0]

    whole = loss_of(slice(None), None)
    pieces = sum(loss_of(index, steps) for index in torch.arange(6).chunk(parts)
                 for steps in ([(2,), (0,), (1,)] if by_step else [None]))
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(pieces, other), torch.autograd.grad(whole, other))


def test_the_stats_are_means_over_samples_and_steps_without_gradient():
    old, weight, other = sampled()
    new, reference = replay(linear_velocity(other.requires_grad_()), old), replay(linear_velocity(weight), old)
    adv = [1.0, -1.0, 2.0, -0.5, 0.0, 3.0]
    _, stats = flow_grpo_loss(new, old, torch.tensor(adv), total=5, low=0.002, high=0.004, reference=reference)
    ratio = [[math.exp(change) for change in row] for row in (new.logp - old.logp).tolist()]
    flat = [r for row in ratio for r in row]
    mean = sum(flat) / 18
    low = sum(ratio[n][w] < 1 - 0.002 and adv[n] < 0 for n in range(6) for w in range(3)) / 18
    high = sum(ratio[n][w] > 1 + 0.004 and adv[n] > 0 for n in range(6) for w in range(3)) / 18
    assert low > 0 and high > 0
    expected = {
        "clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "ratio/mean": mean,
        "ratio/std": math.sqrt(sum((r - mean) ** 2 for r in flat) / 18), "approx_kl": sum(math.log(r) ** 2 for r in flat) / 36,
        "kl": transition_kl(new.mean, reference.mean, old.std).mean().item(),
        "velocity_mse": velocity_mse(new.v, reference.v).mean().item(),
    }
    for name, value in expected.items():
        assert stats[name].item() == pytest.approx(value, rel=1e-3, abs=1e-7), name
    _, guarded = flow_grpo_loss(new, old, torch.tensor(adv), total=5, low=0.002, high=0.004, ratio_norm=True)
    assert guarded["approx_kl"] == stats["approx_kl"] and guarded["ratio/std"] != stats["ratio/std"]
    for w in range(3):
        column = [row[w] for row in ratio]
        assert stats["ratio/step_mean"][w].item() == pytest.approx(sum(column) / 6, rel=1e-5)
        spread = math.sqrt(sum((r - sum(column) / 6) ** 2 for r in column) / 6)
        assert stats["ratio/step_std"][w].item() == pytest.approx(spread, rel=1e-2)
    assert stats["clip_ratio/step_mean"].mean().item() == pytest.approx(low + high) and stats["clip_ratio/step_mean"].shape == (3,)
    assert set(stats) == {*expected, "ratio/step_mean", "ratio/step_std", "clip_ratio/step_mean"}
    assert not any(value.requires_grad for value in stats.values())


def test_neither_the_old_policy_nor_the_reference_nor_the_advantage_receives_gradient():
    old, weight, other = sampled()
    old = dataclasses.replace(old, logp=old.logp.requires_grad_(), means=old.means.requires_grad_())
    ref, adv = weight.clone().requires_grad_(), torch.randn(6, requires_grad=True)
    new = replay(linear_velocity(other.requires_grad_()), old)
    for ratio_norm in (False, True):
        loss, _ = flow_grpo_loss(new, old, adv, total=18, low=1.0, high=1.0, ratio_norm=ratio_norm,
                                 reference=replay(linear_velocity(ref), old), kl_beta=1.0, mse_weight=1.0)
        gradients = torch.autograd.grad(loss, [other, old.logp, old.means, ref, adv], retain_graph=True, allow_unused=True)
        assert gradients[0] is not None and all(g is None or (g == 0).all() for g in gradients[1:])


@pytest.mark.parametrize("change, message", [
    (dict(adv=torch.zeros(5)), "adv"), (dict(adv=torch.zeros(6, 1)), "adv"), (dict(weights=torch.ones(2)), "weights"),
    (dict(total=0), "total"), (dict(low=-0.1), "low"), (dict(high=-0.1), "high"), (dict(kl_beta=-1.0), "kl_beta"),
    (dict(mse_weight=-1.0), "mse_weight"), (dict(kl_beta=0.1), "reference"), (dict(mse_weight=0.1), "reference"),
    (dict(reference=Replay((0,), torch.zeros(6, 1), torch.zeros(6, 1, 2, 2), torch.zeros(6, 1, 2, 2))), "reference"),
])
def test_arguments_that_do_not_fit_are_errors(change, message):
    old, weight, _ = sampled()
    arguments = dict(adv=torch.zeros(6), total=18, low=0.1, high=0.1) | change
    with pytest.raises(ValueError, match=message):
        flow_grpo_loss(replay(linear_velocity(weight), old), old, **arguments)


def test_no_function_writes_into_its_arguments():
    weight, noise, step_noise, times = torch.randn(4, 4), torch.randn(3, 2, 2), torch.randn(2, 3, 2, 2), time_grid(6)
    adv, weights = torch.randn(3), torch.rand(2)
    inputs = [weight, noise, step_noise, times, adv, weights]
    before = [x.clone() for x in inputs]
    old = rollout(linear_velocity(weight), noise, times, window=(1, 3), noise_level=0.7, step_noise=step_noise)
    inputs += [old.times, old.latents, old.means, old.std, old.logp, old.data]
    before += [x.clone() for x in inputs[6:]]
    reference = replay(linear_velocity(0.9 * weight), old)
    new = replay(linear_velocity(1.1 * weight), old)
    inputs += [new.logp, new.mean, new.v, reference.mean, reference.v]
    before += [x.clone() for x in inputs[12:]]
    for ratio_norm in (False, True):
        flow_grpo_loss(new, old, adv, total=6, low=0.1, high=0.1, ratio_norm=ratio_norm, weights=weights, reference=reference,
                       kl_beta=0.1, mse_weight=0.1)
    step_weights(times, (1, 3), normalise=True)
    assert len(inputs) == 17 and all(torch.equal(a, b) for a, b in zip(inputs, before))


@kinds
def test_following_the_gradient_raises_the_reward(kind):
    shift = torch.zeros(2, requires_grad=True)
    velocity = lambda x, t: exact_velocity(0.0, 0.5)(x, t) + shift
    optimizer, B, G, rewards = torch.optim.Adam([shift], lr=0.03), 8, 16, []
    for step in range(30):
        window = draw_window(2, 0, 4, seed=0, step=step)
        old = rollout(velocity, shared_noise(torch.randn(B, 2), G), time_grid(5), window=window, noise_level=0.7, kind=kind,
                      step_noise=torch.randn(2, B * G, 2))
        reward = (old.data[:, 0] > 0.3).float().view(B, G)
        rewards.append(reward.mean().item())
        adv = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True, correction=0) + 1e-4)
        loss, _ = flow_grpo_loss(replay(velocity, old), old, adv.flatten(), total=2 * B * G, low=0.2, high=0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(rewards[:5]) / 5 < 0.45 and sum(rewards[-5:]) / 5 > 0.7
    assert shift[0] < -0.3  # data moves against v


# What a grid, a latent and a ratio may be


@pytest.mark.parametrize("times, words", [
    ([1000.0, 500.0, 0.0], "from 1000 to 0, expected from at most 1 to 0; take scheduler.sigmas, or its timesteps / 1000"),
    ([999.0, 500.0, 1.0], "from 999 to 1, .*take scheduler.sigmas"), ([1.0001, 0.5, 0.0], "from 1.0001 to 0, expected from at most 1"),
    ([0.0, 0.25, 0.5, 1.0], "from 0 to 1, .*flip the grid"), ([1.0, 0.5, 0.009], "from 1 to 0.009, expected an end at exactly 0"),
    ([1.0, 0.5, -0.1], "expected an end at exactly 0"), ([1.0, 0.5, 0.5, 0.0], "from 0.5 to 0.5 at step 1, expected a fall"),
    ([1.0, 0.2, 0.4, 0.0], "from 0.2 to 0.4 at step 1"), ([0.0, 0.0], "from 0 to 0 at step 0"),
    ([1.0, -0.5, 0.0], "from -0.5 to 0 at step 1"),
    ([1.0, math.nan, 0.0], r"times \[1\] are \[nan\], expected finite"), ([math.nan, 0.5, 0.0], r"times \[0\] are \[nan\]"),
    ([1.0, 0.5, math.nan], r"times \[2\] are \[nan\]"), ([math.inf, 0.5, 0.0], r"times \[0\] are \[inf\]"),
    ([0.5], r"times is \(1,\)"), ([], r"times is \(0,\)"), ([[1.0, 0.0], [1.0, 0.0]], r"times is \(2, 2\)")])
def test_times_that_are_no_falling_grid_from_at_most_one_to_zero_are_refused(times, words):
    with pytest.raises(ValueError, match="rollout: .*" + words) as error:
        rollout(lambda x, t: x, torch.zeros(2, 3), torch.tensor(times), window=(0, 0), noise_level=0.0)
    assert "\n" not in str(error.value)


@given(st.lists(st.floats(2**-10, 1, width=32), min_size=1, max_size=6, unique=True))
def test_every_falling_grid_to_zero_is_taken_wherever_it_starts(times):
    times = torch.tensor(sorted(times, reverse=True) + [0.0])
    assert torch.equal(rollout(lambda x, t: x, torch.zeros(2, 3), times, window=(0, 0), noise_level=0.0).times[1:], times[1:])


@pytest.mark.parametrize("first", [1.0000015497207642, 0.999997615814209])            # a scheduler's, at shift 0.15 and 0.1
def test_a_first_time_beside_one_by_rounding_is_one(first):
    times, noise, step_noise = torch.tensor([first, 0.6, 0.0]), torch.randn(2, 3), torch.randn(1, 2, 3)
    old, exact = (rollout(lambda x, t: x * t, noise, grid, window=(0, 1), noise_level=0.7, step_noise=step_noise)
                  for grid in (times, torch.tensor([1.0, 0.6, 0.0])))
    assert torch.equal(old.data, exact.data) and torch.equal(old.times, exact.times) and times[0] != 1
    assert old.std.item() == pytest.approx(0.7)


@pytest.mark.parametrize("where, words", [
    ("noise", "the initial noise is not finite"), ("step_noise", "latents are not finite after step 2 of 0..3"),
    ("velocity", "latents are not finite after step 1 of 0..3")])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_latents_that_are_not_finite_are_an_error_that_names_the_first_step(where, words, value):
    noise, step_noise, times = torch.randn(2, 3), torch.randn(1, 2, 3), time_grid(4)
    {"noise": noise, "step_noise": step_noise[0]}.get(where, torch.zeros(2, 3))[1, 2] = value

    def velocity(x, t):
        return x + (value if where == "velocity" and t == times[1] else 0.0)

    with pytest.raises(FloatingPointError, match=words) as error:
        rollout(velocity, noise, times, window=(2, 3), noise_level=0.5, step_noise=step_noise)
    assert "\n" not in str(error.value)


def shifted_loss(gaps, adv, **options):
    """Loss, gradient and stats where the plain log-ratio, or RatioNorm's with `ratio_norm`, is `gaps` (3, 2)."""
    torch.manual_seed(0)
    old, weight, _ = sampled(N=3, W=2, dtype=torch.float64)
    same, gaps = replay(linear_velocity(weight), old), torch.tensor(gaps, dtype=torch.float64).view(3, 2)
    logp, mean = (old.logp + gaps).requires_grad_(), same.mean
    if options["ratio_norm"]:                                                     # which is linear in the mean
        scale = normalised_log_ratio(old.latents[:, 1:], old.means + 1, old.means, old.std)
        mean = (old.means + (gaps / scale)[..., None, None]).requires_grad_()
    loss, stats = flow_grpo_loss(Replay(same.steps, logp, mean, same.v), old, torch.tensor(adv, dtype=torch.float64), total=5,
                                 reference=same, **options)
    leaf = mean if options["ratio_norm"] else logp
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], stats


far = st.lists(st.one_of(st.floats(-1e4, 1e4), st.sampled_from([88.8, -88.8, LOG_RATIO_BOUND])), min_size=6, max_size=6)
near = st.lists(st.floats(-19.9, 19.9), min_size=6, max_size=6)
advantages = st.lists(st.one_of(st.floats(-5, 5), st.just(0.0)), min_size=3, max_size=3)
options = st.fixed_dictionaries(dict(
    ratio_norm=st.booleans(), low=st.floats(0, 1), high=st.floats(0, 10), kl_beta=st.sampled_from([0.0, 0.1]),
    weights=st.sampled_from([None, torch.tensor([0.5, 8.0])])))


@given(far, advantages, options)
def test_loss_gradient_and_stats_are_finite_at_any_log_ratio(gaps, adv, options):
    loss, gradient, stats = shifted_loss(gaps, adv, **options)
    assert loss.isfinite() and gradient.isfinite().all() and all(v.isfinite().all() for v in stats.values())


@pytest.mark.parametrize("adv", [1.0, 0.0, -1.0])
def test_a_sample_whose_log_density_fell_to_minus_infinity_has_ratio_and_gradient_zero(adv):
    loss, gradient, stats = shifted_loss([-math.inf] * 6, [adv] * 3, ratio_norm=False, low=0.2, high=0.2)
    assert loss.item() == pytest.approx(0.8 * 6 / 5 if adv < 0 else 0.0) and (gradient == 0).all()
    assert stats["ratio/mean"] == 0 and all(v.isfinite().all() for v in stats.values())


@given(near, advantages, options)
def test_within_the_bound_loss_gradient_and_stats_are_those_without_it(gaps, adv, options):
    bounded = shifted_loss(gaps, adv, **options)
    with mock.patch.object(flow_grpo, "LOG_RATIO_BOUND", math.inf):
        free = shifted_loss(gaps, adv, **options)
    assert torch.equal(bounded[0], free[0]) and torch.equal(bounded[1], free[1])
    assert all(torch.equal(bounded[2][k], v) for k, v in free[2].items())
    if not options["ratio_norm"]:
        clip = lambda r: min(max(r, 1 - options["low"]), 1 + options["high"])
        weight = [1.0, 1.0] if options["weights"] is None else options["weights"].tolist()
        terms = [-weight[i % 2] * min(math.exp(g) * adv[i // 2], clip(math.exp(g)) * adv[i // 2]) for i, g in enumerate(gaps)]
        assert bounded[0].item() == pytest.approx(sum(terms) / 5, rel=1e-6, abs=1e-9)


def test_the_bound_of_a_ratio_is_that_of_the_text():
    assert inspect.getsource(bounded_exp) == inspect.getsource(grpo.bounded_exp) and LOG_RATIO_BOUND == grpo.LOG_RATIO_BOUND


# The lines of the docstring, with a transformer and a scheduler of diffusers


@pytest.fixture(scope="module")
def sd3():
    """A small SD3 transformer with random weights, and a scheduler of its kind."""
    from policy import declare_torchvision_ops
    declare_torchvision_ops()
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=64, patch_size=8, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=8)
    return transformer, FlowMatchEulerDiscreteScheduler(shift=3.0)


def docstring_lines():
    """The example of the module's docstring as source."""
    lines = flow_grpo.__doc__.split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("    scheduler.set_timesteps"))
    last = next(i for i, line in enumerate(lines) if line == "    loss.backward()")
    return textwrap.dedent("\n".join(lines[first:last + 1]))


def test_the_lines_of_the_docstring_train_a_transformer_of_diffusers(sd3):
    transformer, scheduler = sd3
    B, G = 2, 2
    frozen = copy.deepcopy(transformer)
    prompts, pooled = torch.randn(B, 4, 16).repeat_interleave(G, 0), torch.randn(B, 8).repeat_interleave(G, 0)
    names = {name: getattr(flow_grpo, name) for name in ("draw_window", "flow_grpo_loss", "replay", "rollout")} | dict(
        torch=torch, transformer=transformer, scheduler=scheduler, prompts=prompts, pooled=pooled, B=B, G=G, update=0,
        score_of=lambda data: data.mean((1, 2, 3)), velocity_of_the_frozen_one=lambda x, t: frozen(
            x, timestep=1000 * t.expand(len(x)), encoder_hidden_states=prompts, pooled_projections=pooled, return_dict=False)[0])
    exec(docstring_lines(), names)
    old, stats, adv = names["old"], names["stats"], names["adv"]
    assert scheduler.sigmas.shape == (16,) and scheduler.sigmas[0] == 1 and scheduler.sigmas[-1] == 0
    assert torch.equal(old.times, scheduler.sigmas) and adv.shape == (B, G) and old.logp.shape == (B * G, 3)
    torch.testing.assert_close(adv.flatten(), grpo.group_advantage(old.data.mean((1, 2, 3)), G, std="unbiased"))
    assert stats["ratio/mean"] == 1 and stats["ratio/std"] == 0 and stats["velocity_mse"] == stats["kl"] == 0
    grads = {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}
    assert all(g.isfinite().all() for g in grads.values()) and grads["proj_out.weight"].abs().max() > 0

    # At ratio 1, and with the frozen policy the policy itself, the loss has the gradient of -adv * logp, averaged over samples and steps.
    transformer.zero_grad()
    (-adv.view(B * G, 1) * replay(names["velocity"], old).logp).mean().backward()
    for name, p in transformer.named_parameters():
        if name in grads:
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-4 * p.grad.abs().max().item())


def test_without_noise_a_rollout_is_the_loop_of_the_scheduler(sd3):
    """So its sigmas are flow times, its timesteps are 1000 of them, and a prediction is noise - data."""
    transformer, scheduler = sd3
    prompts, pooled, x = torch.randn(2, 4, 16), torch.randn(2, 8), torch.randn(2, 16, 64, 64)

    @torch.no_grad()
    def predict(x, timestep):
        return transformer(x, timestep=timestep, encoder_hidden_states=prompts, pooled_projections=pooled, return_dict=False)[0]

    scheduler.set_timesteps(6)
    data = rollout(lambda x, t: predict(x, 1000 * t.expand(len(x))), x, scheduler.sigmas, window=(0, 0), noise_level=0.0).data
    start = x
    for timestep in scheduler.timesteps:
        x = scheduler.step(predict(x, timestep.expand(len(x))), timestep, x, return_dict=False)[0]
    torch.testing.assert_close(data, x, rtol=1e-5, atol=1e-5)
    assert (data - start).abs().max() > 0.1
