"""flow_grpo.py gives the numbers of Flow-GRPO, Flow-CPS, DanceGRPO and GRPO-Guard (golden/flow_steps).

Both sides are fp32 and order their operations differently, so a few units of the last place (6e-8) of the
largest term are allowed, and no more: a dropped normaliser, a std without sqrt(-dt) or a wrong time is off by
1e-2.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flow_grpo import (
    Trajectory, clipped_surrogate, flow_grpo_loss, gaussian_logp, normalised_log_ratio, replay, step_weights,
    time_grid, transition, transition_kl)

GOLDEN = Path(__file__).parent / "golden" / "flow_steps"
CASES = json.loads((GOLDEN / "flow_steps.json").read_text())
STEPS = load_file(GOLDEN / "steps.safetensors")
POLICY = load_file(GOLDEN / "policy.safetensors")
DENSITY = {"sde": "mean", "dance": "mean", "cps": "squared_error"}    # how the published code scores them
CALLS = 3 * (2 * (10 + 15 + 25) + 10)                                 # levels times steps of all schedules


def steps_of(sampler):
    """Every published step: its tensors by name, its time and the next, the noise level."""
    for schedule in CASES["schedules"]:
        times = STEPS[schedule["name"] + ".sigmas"]
        for level in CASES["levels"]:
            key = f"{schedule['name']}.{sampler}.a{level}."
            tensors = {name.removeprefix(key): x for name, x in STEPS.items() if name.startswith(key)}
            tensors |= {name: STEPS[f"{schedule['name']}.{name}"] for name in ("x", "v", "noise")}
            for i, (t, t_next) in enumerate(zip(times, times[1:])):
                yield {name: x[i] for name, x in tensors.items() if i < len(x)}, t, t_next, level


def test_time_grids_are_the_published_ones():
    ours = [schedule for schedule in CASES["schedules"] if not schedule["name"].startswith("sd3")]
    assert len(ours) == 6                                             # SD3's grid is the scheduler's own
    for schedule in ours:
        times = time_grid(schedule["K"], schedule["shift"])
        torch.testing.assert_close(times, STEPS[schedule["name"] + ".sigmas"], rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("sampler", ["sde", "cps", "dance"])
def test_steps_are_the_published_ones_on_every_schedule_and_level(sampler):
    calls = 0
    for step, t, t_next, level in steps_of(sampler):
        mean, std = transition(step["x"], step["v"], t, t_next, noise_level=level, sampler=sampler)
        # DanceGRPO takes the score as a difference divided by t^2, which costs its fp32 digits near t = 0.
        lost = level**2 * (t - t_next) / (2 * t**2) if sampler == "dance" else 0.0
        error = (3e-7 + 2e-7 * lost) * (step["x"].abs().max() + step["v"].abs().max())
        torch.testing.assert_close(mean, step["mean"], rtol=0, atol=float(error))
        torch.testing.assert_close(std, step["std"], rtol=2e-7, atol=0)
        error += 5e-7 * step["next"].abs().max()
        torch.testing.assert_close(mean + std * step["noise"], step["next"], rtol=0, atol=float(error))
        calls += 1
    assert calls == CALLS


@pytest.mark.parametrize("sampler, without_density", [("sde", 0), ("cps", 21), ("dance", 0)])
def test_log_probs_are_the_published_ones_of_samples_of_entries_and_of_the_bagel_file(
    sampler, without_density
):
    calls, density = 0, DENSITY[sampler]
    for step, _, _, _ in steps_of(sampler):
        x, mean, std = step["next"], step["mean"], step["std"]
        if std > 0:                                                   # the last step of cps has no density
            # The rounding of x - mean reaches the log-density divided by std.
            unit = 1.0 if density == "squared_error" else std.item()
            error = 1e-6 + 3e-7 * mean.abs().max().item() / unit
            logp = gaussian_logp(x, mean, std, density=density)
            torch.testing.assert_close(logp, step["logp"], rtol=1e-6, atol=error)
            entries = gaussian_logp(x.reshape(-1, 1), mean.reshape(-1, 1), std, density=density)
            torch.testing.assert_close(entries, step["logp_elem"].flatten(), rtol=1e-6, atol=error)
            if sampler == "sde":                                      # BAGEL's leaves out the normaliser
                logp = logp + std.log() + math.log(2 * math.pi) / 2
            if sampler != "dance":
                torch.testing.assert_close(logp, step["bagel_logp"], rtol=1e-5, atol=1e-5)
            calls += 1
    assert calls == CALLS - without_density


def policy_tensors(name):
    return {key.removeprefix(name + "."): x for key, x in POLICY.items() if key.startswith(name + ".")}


def policy_case(case):
    """The case as a trajectory of one noisy step with v_old, replayed with v_new (a leaf) and with v_ref."""
    P, step, sampler = policy_tensors(case["case"]), case["step"], case["kind"]
    times, level = STEPS[case["schedule"] + ".sigmas"], case["noise_level"]
    _, std = transition(P["x"], P["v_old"], times[step], times[step + 1], noise_level=level, sampler=sampler)
    old = Trajectory(
        times, (step, step + 1), sampler, level, torch.stack([P["x"], P["next"]], 1), P["mean_old"][:, None],
        std[None], P["logp_old"][:, None], P["next"], density=DENSITY[sampler])
    v_new = P["v_new"].clone().requires_grad_()
    adv = P["advantages"].clamp(-case["adv_clip_max"], case["adv_clip_max"])
    return P, old, v_new, replay(lambda x, t: v_new, old), replay(lambda x, t: P["v_ref"], old), adv


def assert_gradient(loss, leaf, expected):
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient, expected, rtol=2e-5, atol=2e-6 * expected.abs().max().item())


def published_kl_factor(case):
    """The published KL of "sde" is |dt| times the true one, see transition_kl."""
    return case["sigma"] - case["sigma_next"] if case["kind"] == "sde" else 1.0


@pytest.mark.parametrize("sampler, cases", [("sde", 14), ("cps", 12)])
def test_loss_gradient_and_diagnostics_are_the_published_ones(sampler, cases):
    chosen = [case for case in CASES["policy_cases"] if case["kind"] == sampler]
    assert len(chosen) == cases
    for case in chosen:
        P, old, v_new, new, reference, adv = policy_case(case)
        scalars, factor = case["scalars"], published_kl_factor(case)
        # Log-densities of size 1 to 10 carry 1e-6 of rounding, and so does their difference, the log-ratio.
        torch.testing.assert_close(old.std, torch.tensor([scalars["std"]]), rtol=2e-6, atol=0)
        torch.testing.assert_close(new.logp[:, 0].detach(), P["logp_new"], rtol=2e-6, atol=2e-6)
        ratio = (new.logp - old.logp).exp()[:, 0].detach()
        torch.testing.assert_close(ratio, P["ppo.ratio"], rtol=0, atol=2e-6)
        loss, stats = flow_grpo_loss(
            new, old, adv, total=len(adv), low=case["clip_range"], high=case["clip_range"],
            kl_beta=case["beta"] * factor, reference=reference)
        assert loss.item() == pytest.approx(scalars["ppo.loss"], rel=5e-6, abs=5e-6)
        # A shift of 1e-4 between means of size 1 keeps three digits in fp32.
        assert stats["kl"].item() * factor == pytest.approx(scalars["kl.coded"], rel=2e-3)
        assert stats["approx_kl"].item() == pytest.approx(scalars["ppo.approx_kl"], rel=0.02, abs=1e-11)
        assert_gradient(loss, v_new, P["ppo.grad_v_new"])


def test_the_guarded_loss_and_gradient_are_the_papers_per_sample_values():
    for case in CASES["policy_cases"]:
        if case["kind"] == "sde":
            P, old, v_new, new, _, adv = policy_case(case)
            ratio = normalised_log_ratio(P["next"][:, None], new.mean, P["mean_old"][:, None], old.std).exp()
            torch.testing.assert_close(ratio[:, 0].detach(), P["guard_paper.ratio"], rtol=0, atol=2e-6)
            clip, weights = case["clip_range"], step_weights(old.times, old.window)
            loss, _ = flow_grpo_loss(
                new, old, adv, total=len(adv), low=clip, high=clip, ratio_norm=True, weights=weights)
            assert loss.item() == pytest.approx(case["scalars"]["guard_paper.loss"], rel=5e-6, abs=5e-5)
            assert_gradient(loss, v_new, P["guard_paper.grad_v_new"])


def test_the_kl_is_the_true_one_per_sample():
    for case in CASES["policy_cases"]:
        P = policy_tensors(case["case"])
        arguments = P["mean_new"][:, None], P["mean_ref"][:, None], torch.tensor([case["scalars"]["std"]])
        mean, total = (transition_kl(*arguments, density=density)[:, 0] for density in ("mean", "sum"))
        torch.testing.assert_close(mean, P["kl.true_mean"], rtol=1e-6, atol=0)
        torch.testing.assert_close(total, P["kl.true_sum"], rtol=1e-6, atol=0)
        torch.testing.assert_close(mean * published_kl_factor(case), P["kl.bagel_coded"], rtol=2e-3, atol=0)


def test_the_surrogate_with_two_clip_ranges_is_that_of_bagels_training_loop():
    P, ranges = policy_tensors("bagel_ppo"), CASES["bagel_ppo"]
    logp = P["logp_new"].clone().requires_grad_()
    ratio = (logp - P["logp_old"]).exp()
    low, high = ranges["clip_range_lt"], ranges["clip_range_gt"]
    loss = clipped_surrogate(ratio, P["advantages"], low=low, high=high)
    torch.testing.assert_close(ratio.detach(), P["ratio"], rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.detach(), P["policy_loss"], rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(gradient, P["grad_logp_new"], rtol=1e-6, atol=1e-7)
