"""How a flow policy acts: times and windows, the Gaussian of a step, its density, rollout and replay."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

from flow_grpo import (
    draw_window, gaussian_logp, replay, replay_of, rollout, time_grid, transition)
from velocities import exact_velocity, linear_velocity, sample_linear

samplers = pytest.mark.parametrize("sampler", ["sde", "cps", "dance"])
numbers = st.floats(-3, 3)
late = st.floats(0.1, 0.95)
FP32 = dict(rtol=2e-6, atol=2e-6)


def double(x):
    return torch.tensor([[x]], dtype=torch.float64)


# ---- times and windows ----


@given(st.integers(1, 60), st.floats(0.05, 20))
def test_a_time_grid_falls_from_exactly_one_to_exactly_zero(steps, shift):
    times = time_grid(steps, shift)
    assert times.dtype == torch.float32
    assert times.shape == (steps + 1,)
    assert (times[0], times[-1]) == (1, 0)
    assert (times.diff() < 0).all()


@given(st.integers(2, 40), st.floats(1.5, 10))
def test_a_shift_above_one_spends_more_steps_at_high_noise_and_multiplies_the_odds(steps, shift):
    even = time_grid(steps)[1:-1]
    shifted = time_grid(steps, shift)[1:-1]
    assert (shifted > even).all()
    torch.testing.assert_close(shifted / (1 - shifted), shift * even / (1 - even), rtol=1e-4, atol=0)


@given(st.integers(0, 6), st.integers(0, 5), st.integers(0, 6), st.integers(0, 2**31), st.integers(0, 2**31))
def test_a_window_stays_in_its_range_and_depends_on_seed_and_step_alone(size, low, room, seed, step):
    before = torch.get_rng_state()
    high = low + size + room
    start, stop = draw_window(size, low, high, seed=seed, step=step)
    assert low <= start <= start + size == stop <= high
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(1)
    assert draw_window(size, low, high, seed=seed, step=step) == (start, stop)


def test_window_starts_are_uniform_over_steps_and_differ_between_seeds():
    starts = {seed: [draw_window(3, 1, 8, seed=seed, step=step)[0] for step in range(600)] for seed in (0, 1)}
    first, second = starts.values()
    for start in range(1, 6):                                 # 120 expected of 600, standard deviation 10
        assert 75 < first.count(start) < 165
    assert 75 < sum(a == b for a, b in zip(first, second)) < 165
    assert first[1:200] != second[:199]                       # seed and step do not add up to one number


@pytest.mark.parametrize("size, low, high", [(4, 0, 3), (2, 3, 4), (-1, 0, 3)])
def test_a_window_that_does_not_fit_is_refused(size, low, high):
    with pytest.raises(ValueError, match="does not fit"):
        draw_window(size, low, high, seed=0, step=0)


# ---- one step ----


@samplers
@given(t=st.floats(0.1, 1), part=st.floats(0, 0.9), x=numbers, v=numbers)
def test_at_noise_level_zero_a_step_is_the_euler_step_of_the_ode(sampler, t, part, x, v):
    mean, std = transition(double(x), double(v), t, t * part, noise_level=0.0, sampler=sampler)
    torch.testing.assert_close(mean, double(x) + (t * part - t) * double(v))
    assert std == 0


@given(t=late, part=late, a=late)
def test_the_sde_drift_is_velocity_minus_half_sigma_squared_times_the_score(t, part, a):
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)[:, None].requires_grad_()
    marginal = Normal((1 - t) * 0.4, math.sqrt(((1 - t) * 0.5) ** 2 + t**2))
    (score,) = torch.autograd.grad(marginal.log_prob(x).sum(), x)
    x = x.detach()
    dt = t * part - t
    v = exact_velocity(0.4, 0.5)(x, t)
    for sampler, sigma in (("sde", a * math.sqrt(t / (1 - t))), ("dance", a)):
        mean, std = transition(x, v, t, t * part, noise_level=a, sampler=sampler)
        torch.testing.assert_close((mean - x) / dt, v - sigma**2 / 2 * score)
        assert std.item() == pytest.approx(sigma * math.sqrt(-dt))


@given(t=st.floats(0.1, 1), part=st.floats(0, 1), a=st.floats(0, 2), data=numbers, noise=numbers)
def test_a_cps_step_keeps_the_coefficients_of_data_and_noise(t, part, a, data, noise):
    t_next = t * part
    options = dict(noise_level=a, sampler="cps")
    x = (1 - t) * data + t * noise
    v = noise - data
    mean, std = transition(double(x), double(v), t, t_next, **options)
    kept, _ = transition(double(t), double(1.0), t, t_next, **options)    # of noise 1 with data 0
    torch.testing.assert_close(mean, (1 - t_next) * data + kept * noise)
    assert (kept**2 + std**2).sqrt().item() == pytest.approx(t_next, rel=1e-9, abs=1e-9)
    assert kept >= 0


@samplers
def test_a_step_is_computed_in_fp32_at_least(sampler):
    x, v = torch.randn(2, 2, 3).bfloat16()
    options = dict(noise_level=0.7, sampler=sampler)
    mean, std = transition(x, v, 0.5, 0.25, **options)
    expected, _ = transition(x.double(), v.double(), 0.5, 0.25, **options)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, expected.float(), **FP32)
    assert gaussian_logp(x, mean.bfloat16(), 0.3).dtype == torch.float32


def test_an_unknown_sampler_or_density_is_refused():
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match='sampler is "ode"'):
        transition(x, x, 0.5, 0.4, noise_level=0.5, sampler="ode")
    with pytest.raises(ValueError, match='density is "none"'):
        gaussian_logp(x, x, 1.0, density="none")


@given(st.integers(1, 4), st.integers(1, 5), st.floats(0.01, 3))
def test_the_log_density_is_the_normal_distributions_summed_or_averaged_over_entries(N, D, std):
    x, mean = torch.randn(2, N, D, 2, dtype=torch.float64)
    entries = Normal(mean, std).log_prob(x)
    torch.testing.assert_close(gaussian_logp(x, mean, std, density="sum"), entries.sum((1, 2)))
    torch.testing.assert_close(gaussian_logp(x, mean, std), entries.mean((1, 2)))


# ---- rollout ----


@pytest.mark.parametrize("sampler, level", [("sde", 0.3), ("sde", 0.7), ("dance", 0.7), ("sde", 0.0)])
def test_with_the_exact_velocity_the_samples_tend_to_the_data(sampler, level):
    K = 400
    N = 20_000
    W = K if level else 0
    data = rollout(
        exact_velocity(0.4, 0.5), torch.randn(N, 1), time_grid(K), window=(0, W), noise_level=level,
        sampler=sampler, step_noise=torch.randn(W, N, 1)).data
    assert data.mean().item() == pytest.approx(0.4, abs=0.02)             # standard error 0.0035
    assert data.std().item() == pytest.approx(0.5, abs=0.02)              # and the error of K steps


@samplers
def test_a_trajectory_is_an_ode_before_the_window_noisy_in_it_and_an_ode_after_it(sampler):
    noise = torch.randn(3, 2, 2)
    step_noise = torch.randn(2, 3, 2, 2)
    times = time_grid(6, 2.0)
    calls = []
    plain = linear_velocity(0.5 * torch.randn(4, 4))

    def velocity(x, t):
        calls.append(t)
        return plain(x, t)

    old = rollout(
        velocity, noise, times, window=(2, 4), noise_level=0.6, sampler=sampler, step_noise=step_noise)
    states = [noise]
    stds = []
    for i, (t, t_next) in enumerate(zip(times, times[1:])):
        x = states[-1]
        level = 0.6 if i in (2, 3) else 0.0
        mean, std = transition(x, plain(x, t), t, t_next, noise_level=level, sampler=sampler)
        states.append(mean + std * step_noise[i % 2])
        stds.append(std)
    torch.testing.assert_close(old.latents, torch.stack(states[2:5], 1), **FP32)
    torch.testing.assert_close(old.std, torch.stack(stds[2:4]), **FP32)
    torch.testing.assert_close(old.data, states[-1], **FP32)
    assert torch.equal(torch.stack(calls), times[:-1])        # one call a step


def stand_still(x, t):
    return torch.zeros_like(x)


@pytest.mark.parametrize("change, words", [
    (dict(window=(0, 6), step_noise=torch.zeros(6, 2, 3)), "window"),
    (dict(window=(-1, 1), step_noise=torch.zeros(2, 2, 3)), "window"),
    (dict(window=(0, 2)), "window"), (dict(step_noise=None), "window"),
    (dict(sampler="cps", window=(4, 5)), "no density"), (dict(noise_level=0.0), "no density"),
    (dict(sampler="cps", noise_level=2.1), "no density")])
def test_a_window_outside_the_grid_without_its_noise_or_without_density_is_refused(change, words):
    options = dict(window=(1, 2), noise_level=0.5, step_noise=torch.zeros(1, 2, 3)) | change
    with pytest.raises(ValueError, match=words):
        rollout(stand_still, torch.zeros(2, 3), time_grid(5), **options)


@pytest.mark.parametrize("times", [
    [1000.0, 500.0, 0.0], [1.0, 0.5, 0.009], [1.0, 0.5, 0.5, 0.0], [1.0, 0.2, 0.4, 0.0],
    [math.nan, 0.5, 0.0], [0.5], [[1.0, 0.0]]])
def test_times_that_do_not_fall_from_at_most_one_to_zero_are_refused(times):
    with pytest.raises(ValueError, match="expected a fall from at most 1") as error:
        rollout(stand_still, torch.zeros(2, 3), torch.tensor(times), window=(0, 0), noise_level=0.0)
    assert "\n" not in str(error.value)


@given(st.lists(st.floats(2**-10, 1, width=32), min_size=1, max_size=6, unique=True))
def test_every_falling_grid_to_zero_is_taken_from_any_start(times):
    times = torch.tensor(sorted(times, reverse=True) + [0.0])
    taken = rollout(stand_still, torch.zeros(2, 3), times, window=(0, 0), noise_level=0.0).times
    assert torch.equal(taken[1:], times[1:])


@pytest.mark.parametrize("first", [1.0000015497207642, 0.999997615814209])    # as a scheduler's
def test_a_first_time_that_misses_one_by_rounding_is_one(first):
    times = torch.tensor([first, 0.6, 0.0])
    noise = torch.zeros(2, 3)
    old = rollout(stand_still, noise, times, window=(0, 1), noise_level=0.7, step_noise=noise[None])
    assert old.times[0] == 1
    assert old.std.item() == pytest.approx(0.7)
    assert times[0] != 1                                      # the caller's grid stays


@pytest.mark.parametrize("noise, step_noise, v, steps", [
    (math.nan, 0.0, 0.0, 0), (0.0, math.inf, 0.0, 3), (0.0, 0.0, math.nan, 2)])
def test_latents_that_are_not_finite_are_an_error_that_names_the_first_step(noise, step_noise, v, steps):
    noise = torch.full((2, 3), noise)
    step_noise = torch.full((1, 2, 3), step_noise)
    times = time_grid(4)

    def velocity(x, t):
        return x + (v if t == times[1] else 0.0)

    with pytest.raises(FloatingPointError, match=f"not finite after {steps} of 4 steps"):
        rollout(velocity, noise, times, window=(2, 3), noise_level=0.5, step_noise=step_noise)


# ---- replay ----


@samplers
@pytest.mark.parametrize("density", ["mean", "sum", "squared_error"])
def test_replay_with_the_weights_that_sampled_gives_the_same_log_probs_with_gradient(sampler, density):
    old, weight, _ = sample_linear(sampler, density=density)
    new = replay(linear_velocity(weight.requires_grad_()), old)
    assert torch.equal(new.logp, old.logp)
    assert torch.equal(new.mean, old.means)
    assert new.logp.requires_grad


def test_a_rollout_carries_no_gradient():
    weight = torch.randn(3, 3, requires_grad=True)
    noise = torch.randn(1, 2, 3)
    old = rollout(
        linear_velocity(weight), noise[0], time_grid(2), window=(0, 1), noise_level=0.5, step_noise=noise)
    assert not (old.logp.requires_grad or old.data.requires_grad)


def test_velocities_and_log_probs_of_another_shape_are_refused():
    old, _, _ = sample_linear()
    with pytest.raises(ValueError, match=r"v is \(6, 3, 1, 2\) and logp \(6, 3\), expected .*\(6, 3, 2, 2\)"):
        replay_of(torch.zeros(6, 3, 1, 2), old)
    with pytest.raises(ValueError, match=r"logp \(1, 3\)"):
        replay_of(old.means, dataclasses.replace(old, logp=old.logp[:1]))
    plain = rollout(stand_still, torch.zeros(2, 3), time_grid(5), window=(0, 0), noise_level=0.0)
    with pytest.raises(ValueError, match="no noisy step"):
        replay(stand_still, plain)
