"""FlowGRPO: the policy gradient for an image that a flow model draws.

A flow model draws by an ODE, which has one outcome and so no log-probability. Noise in a window of W of its K steps makes each
of these a Gaussian policy, close to the ODE's marginals; its log-density gives the ratio and the clip of PPO.

Sources: Flow-GRPO (arXiv 2505.05470): noisy step, log-density, KL; Flow-CPS (2509.05952), DanceGRPO (2505.07818): other noise;
MixGRPO (2507.21802): noise and gradient in a window, ODE elsewhere; GRPO-Guard (2510.22319): RatioNorm, 1/|dt| weights;
UniGRPO (2603.23500): the velocity penalty, and the loss as a whole. Steps agree with the code of the first three.
Left out: text, guidance and transformers, which live in the caller's `velocity`, any f(x, t) -> v; rewards and group advantage,
since the loss takes `adv`; process groups, since the caller counts `total`, so that gradients of micro-batches and ranks add up.

Notation: t is flow time, 1 = noise, 0 = data, dt = t_next - t < 0; x = (1-t)*data + t*noise, v = noise - data;
B prompts, G samples of each, N = B*G flattened prompt-major; K steps, W noisy ones, S of these replayed; "..." stands for the
latent's own dimensions, at least one; `_old` is the policy that sampled, `_ref` the frozen one.

Latents stay in fp32, or in float64 where the initial noise is: `velocity` gets them so, and what it returns is widened, whatever
the model computes in. With a transformer and a scheduler of diffusers (SD3's: sigmas are times, the prediction is noise - data):

    scheduler.set_timesteps(15)                                                   # .sigmas (16,) from 1 to 0
    def velocity(x, t):
        return transformer(x.to(transformer.dtype), timestep=1000 * t.expand(len(x)), encoder_hidden_states=prompts,
                           pooled_projections=pooled, return_dict=False)[0]       # prompts, pooled: (B*G, ...)
    old = rollout(velocity, torch.randn(B * G, 16, 64, 64), scheduler.sigmas, noise_level=0.7,
                  window=draw_window(3, 0, 7, seed=0, step=update), step_noise=torch.randn(3, B * G, 16, 64, 64))
    reward = score_of(old.data).view(B, G)                                        # what you like: (B*G,), the higher the better
    adv = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
    with torch.no_grad():
        reference = replay(velocity_of_the_frozen_one, old)
    loss, stats = flow_grpo_loss(replay(velocity, old), old, adv.flatten(), total=3 * B * G,    # W * N: the mean over steps
                                 low=1e-4, high=1e-4, mse_weight=0.01, reference=reference)
    loss.backward()

The clip range depends on the number of entries of a latent, the noise and the learning rate; only a measured ratio tells it. Take
as many updates per batch as the run will, with a range that never acts (low=1, high=1e9), and read stats["ratio/std"] of the last
one, over a few batches. A normal ratio of mean 1 is 1, 1.5 or 2 of these std beyond 1, on the side that its advantage favours, in
16, 7 or 2 of 100 cases. On the ring below, with two updates, ranges of that size clipped 10 to 15, 5 to 8 or 2 to 4 of 100 in the
first ten batches, "sde" and "cps", with RatioNorm and without; later fewer, as the spread falls: measure again after a while.

`python flow_grpo.py` teaches a small flow a ring in the plane, draws it to one side by reward, and saves a picture.
"""

import argparse
import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


def _wide(x: Tensor) -> Tensor:
    """fp32, or float64 as it is: bf16 keeps 3 digits, and a clip range of 1e-5 asks for the sixth digit of the ratio."""
    return x if x.dtype == torch.float64 else x.float()


def _reduce(x: Tensor, density: str, *, keep: int) -> Tensor:
    """Mean or sum over all dimensions but the first `keep`."""
    if density not in ("mean", "sum", "squared_error"):
        raise ValueError(f'density is "{density}", expected "mean", "sum" or "squared_error"')
    return x.flatten(keep).sum(-1) if density == "sum" else x.flatten(keep).mean(-1)


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Flow times from 1 to 0: t' = shift*t / (1 + (shift-1)*t) of an even grid, fp32.  -> (steps+1,)
    `steps` counts calls of the model; BAGEL's `num_timesteps` counts points, so its "50 timesteps" are 49 steps here.
    Errors: ValueError when steps < 1 or shift <= 0."""
    if steps < 1 or shift <= 0:
        raise ValueError(f"time_grid: steps is {steps}, shift is {shift}, expected steps >= 1 and shift > 0")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float32)
    t = shift * t / (1 + (shift - 1) * t)
    t[0] = 1.0  # rounding may leave 1 - 2e-7, as at shift 0.1, where sigma would be 2000 a
    return t


def step_sigma(t: Tensor | float, t_next: Tensor | float, noise_level: float) -> Tensor:
    """Diffusion coefficient of Flow-GRPO's SDE: sigma = a * sqrt(t / (1-t)) with a = noise_level.  -> 0-dim
    At t = 1 it has a pole; there 1-t takes t_next, the second grid entry, as in the published code. The drift follows whatever
    sigma is taken, and this one gives the first step the std a, since |dt| = 1 - t_next."""
    t = torch.as_tensor(t)
    return noise_level * torch.sqrt(t / (1 - torch.where(t == 1, t_next, t)))


def transition(
    x: Tensor, v: Tensor, t: Tensor | float, t_next: Tensor | float, *, noise_level: float, sampler: str = "sde"
) -> tuple[Tensor, Tensor]:
    """The Gaussian of one step, x_next ~ Normal(mean, std).  x, v (N, ...) -> mean (N, ...), std 0-dim
    "sde":   mean = x + (v + sigma^2/(2t) * noise_hat) dt, std = sigma * sqrt(-dt), sigma of step_sigma  [Flow-GRPO]
    "dance": the same with sigma = noise_level at every t  [DanceGRPO]
    "cps":   mean = (1-t_next) data_hat + sqrt(t_next^2 - std^2) noise_hat, std = t_next * sin(noise_level * pi/2)  [Flow-CPS]
    sigma^2/(2t) * noise_hat is -sigma^2/2 times the score and keeps the ODE's marginals as dt -> 0. "cps" keeps the coefficients
    of data and noise at any dt, but loses spread over very many steps. noise_level 0 is the ODE's Euler step, std 0, in any sampler.
    Errors: ValueError when sampler is unknown, noise_level is negative, or above 2 for "cps", whose sine is negative there.
    Differs: std is the transition's; the published "sde" returns sigma, without sqrt(-dt)."""
    if sampler not in ("sde", "dance", "cps"):
        raise ValueError(f'transition: sampler is "{sampler}", expected "sde", "dance" or "cps"')
    if noise_level < 0 or (sampler == "cps" and noise_level > 2):
        raise ValueError(f'transition: noise_level is {noise_level}, expected at least 0, and at most 2 for "cps"')
    x, v = _wide(x), _wide(v)
    t, t_next = (torch.as_tensor(s, dtype=x.dtype, device=x.device) for s in (t, t_next))
    dt = t_next - t
    noise_hat = x + (1 - t) * v                                                   # (N, ...)
    if sampler == "cps":
        data_hat = x - t * v                                                      # (N, ...)
        angle = noise_level * math.pi / 2
        # t_next * |cos| is sqrt(t_next^2 - std^2) without its cancellation.
        return (1 - t_next) * data_hat + t_next * abs(math.cos(angle)) * noise_hat, t_next * math.sin(angle)
    sigma = step_sigma(t, t_next, noise_level) if sampler == "sde" else torch.full_like(t, noise_level)
    return x + (v + sigma**2 / (2 * t) * noise_hat) * dt, sigma * torch.sqrt(-dt)


def gaussian_logp(
    x: Tensor, mean: Tensor, std: Tensor | float, *, density: str = "mean"
) -> Tensor:
    """Log-density of x under Normal(mean, std), reduced over each sample's entries.  x, mean (N, ...), std 0-dim -> (N,)
    `density`: "sum" over entries is the density; "mean" raises ratios to the power 1/D for D entries, as the published clip ranges
    (1e-3 to 1e-6) presume; "squared_error" is the mean of -(x-mean)^2, Flow-CPS's published score, no density.
    Errors: ValueError when std is not positive, since an ODE step has no density, or density is unknown."""
    x, mean = _wide(x), _wide(mean)
    std = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
    if not std > 0:
        raise ValueError(f"gaussian_logp: std is {std.item():g}, and an ODE step (noise_level 0; cps at t_next 0) has no density; "
                         "expected std > 0")
    logp = -((x - mean) ** 2)                                                     # (N, ...)
    if density != "squared_error":
        logp = logp / (2 * std**2)
        logp = logp - std.log() - 0.5 * math.log(2 * math.pi)
    return _reduce(logp, density, keep=1)


def draw_window(size: int, low: int, high: int, *, seed: int, step: int) -> tuple[int, int]:
    """Window (start, stop) of `size` steps, start uniform in low..high-size, so that stop <= high [Flow-GRPO-Fast].
    A function of (seed, step) alone, so all ranks and samples share it, and the global generator stays where it is.
    UniGRPO's "size 3 in [0, 5]" is draw_window(3, 0, 5). Errors: ValueError when the window does not fit.
    Differs: the published code draws from the process's generator, which BAGEL's copy seeds anew with the rank at every call."""
    if size < 0 or low < 0 or low + size > high:
        raise ValueError(f"draw_window: size is {size}, expected a window that fits between low {low} and high {high}")
    start = random.Random(f"{seed}/{step}").randint(low, high - size)             # torch's generator reads 32 bits of a seed
    return start, start + size


def shared_noise(noise: Tensor, G: int) -> Tensor:
    """One initial noise for a prompt's G samples, which then differ by the window's noise alone.  (B, ...) -> (B*G, ...)"""
    return noise.repeat_interleave(G, dim=0)


@dataclass(frozen=True)
class Trajectory:
    """N samples and what it takes to score them again. fp32, or float64 if the initial noise was."""
    times: Tensor                     # (K+1,) from at most 1 to 0
    window: tuple[int, int]           # (start, stop) of the W noisy steps
    sampler: str                      # "sde", "cps" or "dance", see transition
    noise_level: float                # as in transition
    latents: Tensor                   # (N, W+1, ...) into every noisy step and out of the last
    means: Tensor                     # (N, W, ...) under the policy that sampled
    std: Tensor                       # (W,) transition std
    logp: Tensor                      # (N, W) under the policy that sampled
    data: Tensor                      # (N, ...) final sample
    density: str = "mean"             # how logp was scored, see gaussian_logp


@dataclass(frozen=True)
class Replay:
    """S steps of a trajectory's window under other weights."""
    steps: tuple[int, ...]            # (S,) counted from the window's start
    logp: Tensor                      # (N, S)
    mean: Tensor                      # (N, S, ...)
    v: Tensor                         # (N, S, ...)


@torch.no_grad()
def rollout(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, times: Tensor, *, window: tuple[int, int], noise_level: float,
    sampler: str = "sde", step_noise: Tensor | None = None, density: str = "mean"
) -> Trajectory:
    """Sample from `noise` (N, ...) at times[0] to data at times[-1] = 0, (K+1,): noisy steps in the window, ODE steps elsewhere.
    `velocity` is called once a step as f(x (N, ...), t 0-dim) -> (N, ...). `step_noise` (W, N, ...), standard normal, is the
    caller's, so that its seeds may derive from the sample's index. The empty window (0, 0) is pure ODE sampling and needs none.
    Errors: ValueError when times are no falling grid from at most 1 to 0, the window leaves the grid, step_noise has another shape,
    or a step in the window has std 0; FloatingPointError when the noise, or the latents after a step, are not finite."""
    (start, stop), W = window, window[1] - window[0]
    x = _wide(noise)                                                              # (N, ...)
    times = checked_times(times.to(x))                                            # (K+1,)
    if not 0 <= start <= stop < len(times):
        raise ValueError(f"rollout: window is {window}, expected 0 <= start <= stop <= {len(times) - 1}, the number of steps")
    if W and (step_noise is None or step_noise.shape != (W, *noise.shape)):
        raise ValueError(f"rollout: window is {window}, expected step_noise of shape {(W, *noise.shape)} with it")
    latents = x.unsqueeze(1).repeat_interleave(W + 1, dim=1)                      # (N, W+1, ...)
    means, std, logp = torch.empty_like(latents[:, 1:]), x.new_empty(W), x.new_empty(len(x), W)
    finite = [x.isfinite().all()]
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        v = velocity(x, t)                                                        # (N, ...)
        if start <= i < stop:
            w = i - start
            latents[:, w] = x
            mean, std[w] = transition(x, v, t, t_next, noise_level=noise_level, sampler=sampler)
            x = mean + std[w] * _wide(step_noise[w])
            means[:, w], latents[:, w + 1] = mean, x
            logp[:, w] = gaussian_logp(x, mean, std[w], density=density)
        else:
            x, _ = transition(x, v, t, t_next, noise_level=0.0, sampler=sampler)
        finite.append(x.isfinite().all())
    finite = torch.stack(finite).tolist()                                         # (K+1,) read once: reading waits for a GPU
    if not all(finite):
        i = finite.index(False)
        where = "the initial noise is not finite" if i == 0 else f"latents are not finite after step {i - 1} of 0..{len(times) - 2}"
        raise FloatingPointError(f"rollout: {where}, expected finite noise, step_noise and velocities")
    return Trajectory(times, (start, stop), sampler, noise_level, latents, means, std, logp, x, density)


def checked_times(times: Tensor) -> Tensor:
    """`times` (K+1,), which must fall strictly from at most 1 to exactly 0. A first time within 1e-5 of 1 is taken as 1: a scheduler's
    rounding leaves some beside it, above or below, and at 1 - 1e-6 the sigma of step_sigma would be 1000 noise levels.
    Errors: ValueError, which says what is wrong and what would be right."""
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"rollout: times is {tuple(times.shape)}, expected (K+1,), the times before and after each of K steps")
    grid = times.tolist()
    told = f"rollout: times go from {grid[0]:g} to {grid[-1]:g}"
    if faulty := [i for i, t in enumerate(grid) if not math.isfinite(t)]:
        raise ValueError(f"rollout: times {faulty} are {[grid[i] for i in faulty]}, expected finite numbers")
    if abs(grid[0] - 1) < 1e-5:
        times, grid[0] = torch.cat([torch.ones_like(times[:1]), times[1:]]), 1.0
    if grid[0] > 1:
        raise ValueError(f"{told}, expected from at most 1 to 0; take scheduler.sigmas, or its timesteps / 1000 with a 0 behind them")
    if grid[0] < grid[-1]:
        raise ValueError(f"{told}, expected from 1, noise, to 0, data; flip the grid")
    if grid[-1] != 0:
        raise ValueError(f"{told}, expected an end at exactly 0, the data, as scheduler.sigmas has it")
    for i, (t, t_next) in enumerate(zip(grid, grid[1:])):
        if not t_next < t:
            raise ValueError(f"{told} but from {t:g} to {t_next:g} at step {i}, expected a fall at every step")
    return times


def replay(
    velocity: Callable[[Tensor, Tensor], Tensor], trajectory: Trajectory, *, steps: tuple[int, ...] | None = None
) -> Replay:
    """Score the stored noisy steps under `velocity`, called once a step as in rollout, with gradient; the weights that sampled give
    trajectory.logp bit for bit. `steps` picks window steps, counted from its start (default: all). Replay and backward step by step,
    with the loss's `total` unchanged, add up to the same gradient and keep one step's graph in memory.
    Errors: ValueError when a step is outside the window or there is none, or a velocity has another shape than its latents."""
    steps, times = window_steps(trajectory, steps), trajectory.times[trajectory.window[0]:]
    v = torch.stack([velocity(trajectory.latents[:, w].contiguous(), times[w]) for w in steps], 1)                 # (N, S, ...)
    return replay_of(v, trajectory, steps=steps)


def replay_of(v: Tensor, trajectory: Trajectory, *, steps: tuple[int, ...] | None = None) -> Replay:
    """What replay gives, from the velocities v (N, S, ...) at trajectory.latents[:, w] and their times, w in `steps`: for a model that
    computes several steps in one call. Errors: ValueError when steps are not the window's, or v is not of these samples and steps."""
    steps, times = window_steps(trajectory, steps), trajectory.times[trajectory.window[0]:]
    if v.shape != trajectory.means[:, list(steps)].shape:
        expected = tuple(trajectory.means[:, list(steps)].shape)
        raise ValueError(f"replay_of: v is {tuple(v.shape)}, expected {expected}, samples x steps x entries")
    v, means, logps = _wide(v), [], []
    for w, v_w in zip(steps, v.unbind(1)):
        # Contiguous as in the rollout: for another memory layout a kernel may round otherwise.
        x, x_next = trajectory.latents[:, w].contiguous(), trajectory.latents[:, w + 1]
        mean, std = transition(x, v_w.contiguous(), times[w], times[w + 1], noise_level=trajectory.noise_level,
                               sampler=trajectory.sampler)
        means.append(mean)                                                        # (N, ...)
        logps.append(gaussian_logp(x_next, mean, std, density=trajectory.density))  # (N,)
    return Replay(steps, torch.stack(logps, 1), torch.stack(means, 1), v)


def window_steps(trajectory: Trajectory, steps: tuple[int, ...] | None) -> tuple[int, ...]:
    """`steps` of the window, counted from its start, or all of them. Errors: ValueError when one is outside, or there is none."""
    W = trajectory.means.shape[1]
    steps = tuple(range(W)) if steps is None else tuple(steps)
    if not steps or not all(0 <= w < W for w in steps):
        raise ValueError(f"steps is {steps}, expected at least one of the window's steps 0..{W - 1}")
    return steps


def select(trajectory: Trajectory, index: Tensor | slice) -> Trajectory:
    """The samples at `index`, a slice or an index tensor over N: a micro-batch of the trajectory."""
    return replace(trajectory, **{name: getattr(trajectory, name)[index] for name in ("latents", "means", "logp", "data")})


LOG_RATIO_BOUND = 20.0                # nats: exp(20) is 4.9e8, beyond every published clip range and golden number


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio (nats), elementwise; above 20 nats it is exp(20) with gradient 0. Without a bound exp is inf from 89 nats on
    in fp32, and inf makes the loss of a tied sample and the gradient of a clipped one NaN. Below, exp falls to 0 by itself."""
    return log_ratio.clamp(max=LOG_RATIO_BOUND).exp()


def log_ratio(logp: Tensor, logp_old: Tensor) -> Tensor:
    """log of pi(x_next) / pi_old(x_next), elementwise; logp_old carries no gradient."""
    return logp - logp_old.detach()


def normalised_log_ratio(x_next: Tensor, mean: Tensor, mean_old: Tensor, std: Tensor, *, density: str = "mean") -> Tensor:
    """GRPO-Guard's RatioNorm of each sample and step.  x_next, mean, mean_old (N, W, ...), std (W,) -> (N, W)  [UniGRPO Eq. 5]
    std * (log_ratio + |dmu|^2 / (2 std^2)), dmu = mean_old - mean, both terms reduced alike. On samples of the old policy
    log_ratio has expectation -|dmu|^2 / (2 std^2), so the upper clip seldom acts, and spread |dmu| / std; this has expectation 0
    and spread |dmu|, which still grows with |dt| (see step_weights). Inserting the true density (whatever `density` is) leaves
    -dmu . (x_next - mean_old) / std, which has the same value and gradient without a difference of log-densities.
    Differs: GRPO-Guard's script takes |dmu|^2 over the whole batch, by a reduction over an empty list of dimensions."""
    x_next, mean, mean_old = _wide(x_next), _wide(mean), _wide(mean_old).detach()
    std = std.to(mean).view(-1, *[1] * (mean.dim() - 2))                          # (W, 1, ...)
    return _reduce((mean - mean_old) * (x_next - mean_old) / std, density, keep=2)


def step_weights(times: Tensor, window: tuple[int, int], *, normalise: bool = False) -> Tensor:
    """1/|dt| of the window's steps, to weigh gradients that RatioNorm leaves proportional to |dt| [GRPO-Guard].  -> (W,)
    Without RatioNorm the SDE's gradients grow as sqrt(|dt|), and these weights favour short steps.
    `normalise` divides by their mean, so that the size of the update stays as it was."""
    weights = 1 / (times[:-1] - times[1:])[slice(*window)]                        # (W,)
    return weights / weights.mean() if normalise else weights


def transition_kl(mean: Tensor, mean_ref: Tensor, std: Tensor, *, density: str = "mean") -> Tensor:
    """KL of Normal(mean, std) from Normal(mean_ref, std), |mean - mean_ref|^2 / (2 std^2).  (N, W, ...), std (W,) -> (N, W)
    "sum" is the KL, "mean" divides it by the number of entries; "sde": |dt|/2 * (sigma (1-t)/(2t) + 1/sigma)^2 * |v - v_ref|^2.
    Differs: Flow-GRPO's code divides by 2 sigma^2 without |dt|, which is this KL times |dt|."""
    mean = _wide(mean)                                                            # (N, W, ...)
    std = std.to(mean).view(-1, *[1] * (mean.dim() - 2))                          # (W, 1, ...)
    return _reduce((mean - _wide(mean_ref)) ** 2 / (2 * std**2), density, keep=2)


def velocity_mse(v: Tensor, v_ref: Tensor) -> Tensor:
    """Mean of (v - v_ref)^2 over entries [UniGRPO Eq. 8].  (N, W, ...) -> (N, W)
    Differs: UniGRPO does not say how it reduces |v - v_ref|^2; its weight of 1.5e-5 suggests the sum."""
    return _reduce((_wide(v) - _wide(v_ref)) ** 2, "mean", keep=2)


def clipped_surrogate(ratio: Tensor, adv: Tensor, *, low: float, high: float, delta: float | None = None) -> Tensor:
    """PPO's clipped objective as a loss, elementwise: -min(ratio * adv, clip(ratio, 1 - low, 1 + high) * adv).

    `low` and `high` may differ (DAPO, arXiv 2503.14476, section 3.1). `delta` caps the unclipped ratio from above and so bounds
    the loss of a token with negative advantage (two-sided clipping, INTELLECT-2, arXiv 2505.07291; TRL's `delta`).
    `adv` broadcasts against `ratio`. The loss is in units of `adv`.
    """
    clipped = ratio.clamp(1 - low, 1 + high)
    unclipped = ratio if delta is None else ratio.clamp(max=delta)
    return -(unclipped * adv).minimum(clipped * adv)


def flow_grpo_loss(
    replayed: Replay, trajectory: Trajectory, adv: Tensor, *, total: float | Tensor, low: float, high: float,
    ratio_norm: bool = False, weights: Tensor | None = None, reference: Replay | None = None, kl_beta: float = 0.0,
    mse_weight: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """FlowGRPO's loss of a micro-batch and its diagnostics: sum of clipped surrogates and penalties, divided by total.
    adv (N,) holds at all steps of its sample. `total` is counted over the whole optimisation step, all micro-batches, subsets of
    steps and ranks: samples x steps for the mean over steps (UniGRPO Eq. 6), samples for the sum over steps (AlphaGRPO).
    `low`, `high`: see clipped_surrogate. `ratio_norm`: normalised_log_ratio in place of log_ratio. `weights` (W,): of the
    surrogate, see step_weights. `reference`: the same steps under the frozen policy, for kl_beta * transition_kl, reduced as logp
    is, and mse_weight * velocity_mse; their means enter the stats as "kl" and "velocity_mse".
    A ratio is at most exp(20), see bounded_exp: no log-ratio, -inf included, makes loss, gradient or stats infinite or NaN.
    Errors: ValueError when shapes do not fit, total is not positive, a number is negative, or a penalty lacks its reference."""
    steps = list(replayed.steps)
    if not adv.shape == replayed.logp.shape[:1] == trajectory.logp.shape[:1]:
        raise ValueError(f"flow_grpo_loss: adv is {tuple(adv.shape)}, expected a number for each sample of trajectory and replay")
    if weights is not None and weights.shape != trajectory.std.shape:
        raise ValueError(f"flow_grpo_loss: weights is {tuple(weights.shape)}, expected {tuple(trajectory.std.shape)}")
    if not total > 0 or min(low, high, kl_beta, mse_weight) < 0:
        raise ValueError(f"flow_grpo_loss: total {total} must be positive, {low=} {high=} {kl_beta=} {mse_weight=} not negative")
    if (kl_beta > 0 or mse_weight > 0) and reference is None:
        raise ValueError(f"flow_grpo_loss: {kl_beta=} {mse_weight=} without reference, expected a replay of the frozen policy")
    if reference is not None and (reference.steps, reference.v.shape) != (replayed.steps, replayed.v.shape):
        raise ValueError(f"flow_grpo_loss: reference has steps {reference.steps}, expected {replayed.steps} of the same samples")
    means, std, adv = trajectory.means[:, steps], trajectory.std[steps], adv.detach()[:, None]
    x_next = trajectory.latents[:, 1:][:, steps]                                  # (N, S, ...)
    plain = log_ratio(replayed.logp, trajectory.logp[:, steps])                   # (N, S)
    scored = normalised_log_ratio(x_next, replayed.mean, means, std, density=trajectory.density) if ratio_norm else plain
    ratio = bounded_exp(scored)                                                   # (N, S)
    loss = clipped_surrogate(ratio, adv, low=low, high=high)                      # (N, S)
    loss = loss if weights is None else loss * weights.to(loss)[steps]
    stats = flow_loss_stats(ratio, plain, adv, low=low, high=high)
    if reference is not None:
        kl = transition_kl(replayed.mean, reference.mean.detach(), std, density=trajectory.density)
        mse = velocity_mse(replayed.v, reference.v.detach())
        loss = loss + kl_beta * kl + mse_weight * mse                             # (N, S)
        stats |= {"kl": kl.detach().mean(), "velocity_mse": mse.detach().mean()}
    return loss.sum() / total, stats


@torch.no_grad()
def flow_loss_stats(ratio: Tensor, log_ratio: Tensor, adv: Tensor, *, low: float, high: float) -> dict[str, Tensor]:
    """Diagnostics over samples and steps, detached, TRL's names where it has one.  ratio, log_ratio (N, S), adv (N, 1)
    "clip_ratio/{low,high}_mean": fraction whose gradient the clip removes, on the side that adv favours; "ratio/{mean,std}", std
    with divisor N*S; "ratio/step_{mean,std}", "clip_ratio/step_mean" (S,): per step; "approx_kl": mean log_ratio^2 / 2 of the plain
    ratio, within 20 nats."""
    below, above = (ratio < 1 - low) & (adv < 0), (ratio > 1 + high) & (adv > 0)  # (N, S)
    return {
        "clip_ratio/low_mean": below.float().mean(),
        "clip_ratio/high_mean": above.float().mean(),
        "clip_ratio/step_mean": (below | above).float().mean(0),
        "ratio/mean": ratio.mean(),
        "ratio/std": ratio.std(correction=0),
        "ratio/step_mean": ratio.mean(0),
        "ratio/step_std": ratio.std(0, correction=0),
        "approx_kl": log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).square().mean() / 2,
    }


def in_plane(net: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A network of (x, t, sin(pi t)) as a velocity in the plane: x (N, 2), t 0-dim or (N, 1) -> (N, 2)."""
    return lambda x, t: net(torch.cat([x, t.expand(len(x), 1), torch.sin(math.pi * t).expand(len(x), 1)], 1))


def learn_ring(steps: int, N: int = 512) -> nn.Module:
    """Flow matching (arXiv 2210.02747) on eight spots around a circle of radius 2."""
    hidden = [layer for _ in range(2) for layer in (nn.Linear(128, 128), nn.SiLU())]
    net = nn.Sequential(nn.Linear(4, 128), nn.SiLU(), *hidden, nn.Linear(128, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(steps):
        angle = (torch.randint(8, (N, 1)) + 0.5) * math.pi / 4                    # (N, 1)
        data = 2 * torch.cat([angle.cos(), angle.sin()], 1) + 0.12 * torch.randn(N, 2)
        noise, t = torch.randn(N, 2), torch.rand(N, 1)
        loss = (in_plane(net)((1 - t) * data + t * noise, t) - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def improve(net: nn.Module, frozen: nn.Module, updates: int, B: int = 32, G: int = 16) -> list[float]:
    """FlowGRPO, two passes per batch: reward 1 above the line y = -x, 0 below. Returns the mean reward of each batch.
    The clip is idle: the second pass has ratio/std 0.0015."""
    optimizer, times, rewards = torch.optim.Adam(net.parameters(), lr=2e-4), time_grid(10), []
    for update in range(updates):
        window, noise, step_noise = draw_window(3, 0, 6, seed=0, step=update), torch.randn(B, 2), torch.randn(3, B * G, 2)
        old = rollout(in_plane(net), shared_noise(noise, G), times, window=window, noise_level=0.7, step_noise=step_noise)
        reward = (old.data.sum(1) > 0).float().view(B, G)                         # (B, G)
        rewards.append(reward.mean().item())
        adv = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, correction=0, keepdim=True) + 1e-4)
        with torch.no_grad():
            reference = replay(in_plane(frozen), old)
        for _ in range(2):
            loss, stats = flow_grpo_loss(
                replay(in_plane(net), old), old, adv.flatten(), total=3 * B * G, low=0.02, high=0.02, ratio_norm=True,
                weights=step_weights(times, window, normalise=True), reference=reference, mse_weight=0.02)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if update % max(1, updates // 8) == 0 or update == updates - 1:
            print(f"update {update:3d}  reward {rewards[-1]:.3f}  velocity mse {stats['velocity_mse']:.3f}")
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description="FlowGRPO draws a flow in the plane to one side.", allow_abbrev=False)
    parser.add_argument("--out", default="before_after.png", help="the picture")
    parser.add_argument("--assert-reward", type=float, nargs="?", const=0.8, help="fail if the last rewards average below this")
    args = parser.parse_args()
    import matplotlib.pyplot as plt
    torch.manual_seed(0)
    noise, times, frozen = torch.randn(600, 2), time_grid(40), learn_ring(1800)
    net = copy.deepcopy(frozen)
    rewards = improve(net, frozen, updates=150)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for ax, policy, name in zip(axes, (frozen, net), ("before", "after")):
        path, velocity = [], in_plane(policy)                                     # 41 of (N, 2)
        path.append(rollout(lambda x, t: (path.append(x), velocity(x, t))[1], noise, times, window=(0, 0), noise_level=0.0).data)
        won = path[-1].sum(1) > 0                                                 # (N,)
        ax.fill_between([-3, 3], [3, -3], 3, color="#e6f2ea", lw=0)
        ax.plot(*torch.stack(path)[:, :200].unbind(-1), color="#8a8f98", alpha=0.3, lw=0.5)
        ax.scatter(*path[-1].T, c=["#1b7f4b" if w else "#c4553b" for w in won], s=7, zorder=2)
        ax.set(title=f"{name}: {won.float().mean():.0%} rewarded", xlim=(-3, 3), ylim=(-3, 3), aspect=1, xticks=[], yticks=[])
    axes[2].plot(rewards, color="#1b7f4b")
    axes[2].set(title="mean reward of each batch", xlabel="update", ylim=(0, 1))
    figure.savefig(args.out, dpi=150)
    if args.assert_reward is not None and (last := sum(rewards[-10:]) / 10) < args.assert_reward:
        raise SystemExit(f"the last ten rewards average {last:.3f}, expected at least {args.assert_reward}")


if __name__ == "__main__":
    main()
