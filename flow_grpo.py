"""Policy gradients for an image that a flow model draws: FlowGRPO, and matching losses.

A flow model draws by an ODE, which has one outcome and so no log-probability. Noise in a window of
W of its K steps makes each of these a Gaussian policy that stays close to the ODE's marginals; its
log-density gives the ratio and the clip of PPO. A matching loss needs no noisy step: a drawn image
gets fresh noise, and the policy learns from the velocity to it, weighed by the advantage.

Sources: Flow-GRPO (arXiv 2505.05470): noisy step, log-density, KL; Flow-CPS (2509.05952) and
DanceGRPO (2505.07818): other noise; MixGRPO (2507.21802): noise and gradient in a window, ODE
elsewhere; GRPO-Guard (2510.22319): RatioNorm, 1/|dt| weights; UniGRPO (2603.23500): the velocity
penalty, and the loss as a whole. Steps agree with the code of the first three. Matching losses:
DiffusionNFT (2509.16117), AWM (2509.25050), FPO (2507.21053); flat weights: Flash-GRPO.
Left out: text, guidance and transformers live in the caller's `velocity`, any f(x, t) -> v. The
loss takes `adv`, so rewards and group advantage are the caller's. So are process groups: the caller
counts `total` over micro-batches and ranks, and their gradients add up. (DDP and FSDP average over
ranks: multiply the loss by their number.) A micro-batch takes its own rows of all that has N:
replace(old, latents=old.latents[rows], means=old.means[rows], ...), and so of adv and weights.

Notation: t is flow time, 1 = noise, 0 = data, dt = t_next - t < 0; x = (1-t)*data + t*noise,
v = noise - data; B prompts, G samples of each, N = B*G in prompt-major order; K steps, W of them
noisy; J times of fresh noise; "..." are the latent's own dimensions, at least one; `_old` is the
policy that sampled, `_ref` the frozen one. Latents stay in fp32, or in float64 if the initial noise
is; `velocity` gets them so, and what it returns is widened.

Example, two prompts with two samples each, two noisy steps of eight:

>>> import torch
>>> from dataclasses import replace
>>> weight = torch.zeros(3, 3, requires_grad=True)
>>> def velocity(x, t):
...     return x @ weight
>>> noise, step_noise = torch.randn(4, 3), torch.randn(2, 4, 3)
>>> old = rollout(velocity, noise, time_grid(8), window=(0, 2), noise_level=0.7,
...               step_noise=step_noise)
>>> reward = old.data.sum(1).view(2, 2)
>>> adv = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
>>> loss, stats = flow_grpo_loss(replay(velocity, old), old, adv.flatten(), total=2 * 4,
...                              low=1e-3, high=1e-3)
>>> loss.backward()
>>> stats["ratio/mean"].item(), old.latents.shape, old.logp.shape
(1.0, torch.Size([4, 3, 3]), torch.Size([4, 2]))

The same samples without a noisy step, by a matching loss at three times:

>>> path = rollout(velocity, noise, time_grid(8), window=(0, 0), noise_level=0.0)
>>> drawn = renoise(path.data, stratified_times(3, seed=0, step=0), torch.randn(3, 4, 3))
>>> with torch.no_grad():
...     drawn = replace(drawn, v=velocities_at(velocity, drawn))
>>> v = velocities_at(velocity, drawn)
>>> loss, stats = matching_loss(v, drawn, adv.flatten(), form="nft", total=3 * 4)
>>> loss.backward()
>>> stats["rise"].item(), drawn.latents.shape
(0.0, torch.Size([4, 3, 3]))

With diffusers (SD3) the grid is scheduler.sigmas, after scheduler.set_timesteps(K), and the
prediction is noise - data: the velocity is
transformer(x.to(dtype), timestep=1000 * t.expand(len(x)), ..., return_dict=False)[0]. FLUX and
Qwen-Image multiply by 1000 themselves and take t, and their set_timesteps needs `mu`. To check a
velocity, draw in fp32 with window (0, 0): that must be what scheduler.step draws from equal noise.

The clip range depends on the number of entries of a latent, the noise and the learning rate, so
measure the ratio: take as many updates per batch as the run will, with a range that never acts
(low=1, high=1e9), and read stats["ratio/std"] of the last one. If ratios are normal, a range of
1, 1.5 or 2 of these std clips 16, 7 or 2 of 100 samples on each side.

`python flow_grpo.py` teaches a small flow a ring in the plane, draws it to one side by reward, and
saves a picture.
"""

import argparse
import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

FORMS = ("nft", "awm", "fpo")                    # of matching_loss
Velocity = Callable[[Tensor, Tensor], Tensor]    # f(x (N, ...), t 0-dim) -> v (N, ...)


def _wide(x: Tensor) -> Tensor:
    """Widen to fp32, or leave float64: a clip range of 1e-5 asks for the ratio's sixth digit."""
    return x if x.dtype == torch.float64 else x.float()


def _reduce(x: Tensor, density: str) -> Tensor:
    """Reduce the entries of a latent, (..., D) -> (...): to their sum for "sum", else their mean."""
    if density not in ("mean", "sum", "squared_error"):
        raise ValueError(f'density is "{density}", expected "mean", "sum" or "squared_error"')
    return x.sum(-1) if density == "sum" else x.mean(-1)


# ---- times and windows ----

def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Return flow times from 1 to 0, t' = shift*t / (1 + (shift-1)*t) of an even grid.

    -> (steps+1,) fp32. `steps` counts calls of the model; BAGEL's `num_timesteps` counts points, so
    its "50 timesteps" are 49 steps here. steps >= 1, shift > 0.
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float32)
    t = shift * t / (1 + (shift - 1) * t)
    t[0] = 1.0              # rounding may leave 1 - 2e-7, where sigma would be 2000 noise levels
    return t


def falling_times(times: Tensor) -> Tensor:
    """Check that times (K+1,) fall from at most 1 to exactly 0, and return them.

    A first time within 1e-5 of 1 becomes 1: a scheduler's rounding may miss it, and at 1 - 1e-6 the
    sigma of `transition` would be 1000 noise levels. Errors: ValueError for any other grid.
    """
    falls = (times.diff() < 0).all()                                             # false for a NaN
    if times.ndim != 1 or not falls or times[0] > 1 + 1e-5 or times[-1] != 0:
        raise ValueError(
            f"times are {str(times.tolist())[:200]}, expected a fall from at most 1, noise, to "
            "exactly 0, data; take scheduler.sigmas after set_timesteps")
    if times[0] > 1 - 1e-5:
        times = times.clone()
        times[0] = 1.0
    return times


def draw_window(size: int, low: int, high: int, *, seed: int, step: int) -> tuple[int, int]:
    """Draw a window (start, stop) of `size` steps uniformly in low..high [Flow-GRPO-Fast].

    A function of (seed, step) alone, so all ranks and samples share it, and the global generator
    stays as it is. UniGRPO's "size 3 in [0, 5]" is draw_window(3, 0, 5).
    Errors: ValueError when the window does not fit.
    Differs: the published code draws from the process's generator, which BAGEL's copy seeds anew
    with the rank at every call.
    """
    if not 0 <= size <= high - low:
        raise ValueError(f"a window of {size} steps does not fit between {low} and {high}")
    start = random.Random(f"{seed}/{step}").randint(low, high - size)
    return start, start + size


# ---- one step ----

def transition(
    x: Tensor, v: Tensor, t: Tensor | float, t_next: Tensor | float, *, noise_level: float,
    sampler: str = "sde",
) -> tuple[Tensor, Tensor]:
    """Return the Gaussian of one step: x, v (N, ...) -> mean (N, ...), std 0-dim.

    With a = noise_level and x_next ~ Normal(mean, std):
    "sde":   mean = x + (v + sigma^2/(2t) * noise_hat) dt, std = sigma * sqrt(-dt),
             sigma = a * sqrt(t / (1-t))  [Flow-GRPO]
    "dance": the same with sigma = a at every t  [DanceGRPO]
    "cps":   mean = (1-t_next) data_hat + sqrt(t_next^2 - std^2) noise_hat,
             std = t_next * sin(a * pi/2), a <= 2  [Flow-CPS]
    sigma^2/(2t) * noise_hat is -sigma^2/2 times the score and keeps the ODE's marginals as dt -> 0.
    "cps" keeps the coefficients of data and noise at any dt, but loses spread over very many steps.
    noise_level 0 is the ODE's Euler step, with std 0, for every sampler.
    Errors: ValueError for another sampler.
    Differs: std is the transition's; the published "sde" returns sigma, without sqrt(-dt).
    """
    x = _wide(x)
    v = _wide(v)
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    t_next = torch.as_tensor(t_next, dtype=x.dtype, device=x.device)
    dt = t_next - t
    noise_hat = x + (1 - t) * v                                                  # (N, ...)
    if sampler == "cps":
        data_hat = x - t * v                                                     # (N, ...)
        angle = noise_level * math.pi / 2
        std = t_next * math.sin(angle)
        kept = t_next * abs(math.cos(angle))     # sqrt(t_next^2 - std^2) without its cancellation
        mean = (1 - t_next) * data_hat + kept * noise_hat
        return mean, std
    if sampler == "sde":
        # At the pole t = 1 the published code takes t_next in 1-t, so the first std is a.
        pole = torch.where(t == 1, t_next, t)
        sigma = noise_level * torch.sqrt(t / (1 - pole))
    elif sampler == "dance":
        sigma = torch.full_like(t, noise_level)
    else:
        raise ValueError(f'sampler is "{sampler}", expected "sde", "dance" or "cps"')
    drift = v + sigma**2 / (2 * t) * noise_hat                                   # (N, ...)
    return x + drift * dt, sigma * torch.sqrt(-dt)


def gaussian_logp(
    x: Tensor, mean: Tensor, std: Tensor | float, *, density: str = "mean"
) -> Tensor:
    """Return the log-density of x under Normal(mean, std): x, mean (N, ...), std 0-dim -> (N,).

    `density` "sum" adds up a sample's entries: the density itself. "mean" averages them, which
    raises ratios to the power 1/D for D entries; the published clip ranges (1e-3 to 1e-6) presume
    it. "squared_error" is the mean of -(x - mean)^2, Flow-CPS's published score, no density.
    Errors: ValueError for another name, and when std is not positive: an ODE step has no density.
    Differs: AlphaGRPO drops the normaliser, which cancels in ratios.
    """
    x = _wide(x)
    mean = _wide(mean)
    std = torch.as_tensor(std, dtype=mean.dtype, device=mean.device)
    if not std > 0:
        raise ValueError(
            f"std is {std.item():g}, expected above 0: an ODE step has no density "
            "(noise_level 0, or the last step of cps)")
    logp = -((x - mean) ** 2)                                                    # (N, ...)
    if density != "squared_error":
        logp = logp / (2 * std**2)
        logp = logp - std.log() - 0.5 * math.log(2 * math.pi)
    return _reduce(logp.flatten(1), density)


def step_weights(
    times: Tensor, window: tuple[int, int], *, kind: str = "dt", noise_level: float = 1.0,
    sampler: str = "sde", over: tuple[int, int] | None = None,
) -> Tensor:
    """Return weights of the window's steps for the surrogate, (W,).

    "dt": 1/|dt| [GRPO-Guard]. RatioNorm leaves gradients proportional to |dt|, which these weights
    undo. Without RatioNorm the SDE's gradients grow as sqrt(|dt|), and these weights favour short
    steps.
    "flat": std / |d mean / dv|, Flash-GRPO's coefficient. A log-ratio has the gradient
    (d mean / dv) noise / std on the velocity, which gets one size at every step.
    The last step of "cps" has flat weight 0.
    `over` (start, stop) divides the weights by their mean over these steps, so that the size of the
    update stays as it was. Give the window; give the range that it is drawn from if it is one step.
    Errors: ValueError for another kind.
    """
    weights = []
    for t, t_next in zip(times[:-1], times[1:]):
        # The mean is linear in x and v.
        slope, std = transition(
            torch.zeros(()), torch.ones(()), t, t_next, noise_level=noise_level, sampler=sampler)
        each = dict(dt=1 / (t - t_next), flat=std / slope.abs())
        if kind not in each:
            raise ValueError(f'kind is "{kind}", expected "dt" or "flat"')
        weights.append(each[kind])
    weights = torch.stack(weights)                                               # (K,)
    chosen = weights[slice(*window)]
    return chosen if over is None else chosen / weights[slice(*over)].mean()


# ---- rollout and replay ----

def shared_noise(noise: Tensor, G: int) -> Tensor:
    """Give a prompt's G samples one initial noise: (B, ...) -> (B*G, ...).

    They then differ by the window's noise alone.
    """
    return noise.repeat_interleave(G, dim=0)


@dataclass(frozen=True)
class Trajectory:
    """N samples and what it takes to score them again, fp32, or float64 if the initial noise was."""

    times: Tensor                     # (K+1,) from at most 1 to 0
    window: tuple[int, int]           # (start, stop) of the W noisy steps
    sampler: str                      # "sde", "cps" or "dance", see transition
    noise_level: float                # as in transition
    latents: Tensor                   # (N, W+1, ...) into every noisy step and out of the last
    means: Tensor                     # (N, W, ...) under the policy that sampled
    std: Tensor                       # (W,) of the transitions
    logp: Tensor                      # (N, W) under the policy that sampled
    data: Tensor                      # (N, ...) final sample
    density: str = "mean"             # how logp was scored, see gaussian_logp

    @property
    def points(self) -> tuple[Tensor, Tensor]:
        """Where a replay needs velocities: latents (N, W, ...) and their times (W,).

        Errors: ValueError for an empty window.
        """
        start, stop = self.window
        if start == stop:
            raise ValueError(
                "samples drawn with an empty window have no noisy step to score; draw them with "
                "one, or renoise them")
        return self.latents[:, :-1], self.times[start:stop]


@dataclass(frozen=True)
class Replay:
    """A trajectory's noisy steps under other weights."""

    logp: Tensor                      # (N, W)
    mean: Tensor                      # (N, W, ...)
    v: Tensor                         # (N, W, ...)


@torch.no_grad()
def rollout(
    velocity: Velocity, noise: Tensor, times: Tensor, *, window: tuple[int, int],
    noise_level: float, sampler: str = "sde", step_noise: Tensor | None = None,
    density: str = "mean",
) -> Trajectory:
    """Sample from `noise` (N, ...) to data: noisy steps in the window, ODE steps elsewhere.

    times (K+1,) fall from at most 1 to 0; `velocity` is called once a step. `step_noise`
    (W, N, ...), standard normal, comes from the caller, whose seeds may derive from the sample's
    index. The empty window (0, 0) is pure ODE sampling and needs none.
    Errors: ValueError when times do not fall, the window leaves the grid, step_noise has another
    shape, or a step in the window has std 0; FloatingPointError when the noise, or the latents
    after a step, are not finite.
    """
    start, stop = window
    W = stop - start
    x = _wide(noise)                                                             # (N, ...)
    times = falling_times(times.to(x))                                           # (K+1,)
    K = len(times) - 1
    if not 0 <= start <= stop <= K:
        raise ValueError(f"window is {window}, expected 0 <= start <= stop <= K = {K}")
    if W and (step_noise is None or step_noise.shape != (W, *noise.shape)):
        raise ValueError(f"window {window} needs step_noise of shape {(W, *noise.shape)}")
    latents = x.unsqueeze(1).repeat_interleave(W + 1, dim=1)                     # (N, W+1, ...)
    means = torch.empty_like(latents[:, 1:])                                     # (N, W, ...)
    stds = x.new_empty(W)
    logp = x.new_empty(len(x), W)
    finite = [x.isfinite().all()]
    for i in range(K):
        t = times[i]
        t_next = times[i + 1]
        v = velocity(x, t)                                                       # (N, ...)
        noisy = start <= i < stop
        level = noise_level if noisy else 0.0
        mean, std = transition(x, v, t, t_next, noise_level=level, sampler=sampler)
        if noisy:
            w = i - start
            latents[:, w] = x
            means[:, w] = mean
            stds[w] = std
            x = mean + std * _wide(step_noise[w])
            latents[:, w + 1] = x
            logp[:, w] = gaussian_logp(x, mean, std, density=density)
        else:
            x = mean
        finite.append(x.isfinite().all())
    finite = torch.stack(finite).tolist()         # read once, since reading waits for a GPU
    if not all(finite):
        raise FloatingPointError(
            f"latents are not finite after {finite.index(False)} of {K} steps, "
            "expected finite noise, step_noise and velocities")
    return Trajectory(
        times, window, sampler, noise_level, latents, means, stds, logp, data=x, density=density)


def velocities_at(velocity: Velocity, drawn: "Trajectory | Renoised") -> Tensor:
    """Return the velocities at drawn.points, (N, W or J, ...), one call a time as in rollout."""
    latents, times = drawn.points
    out = []
    for x, t in zip(latents.unbind(1), times):
        # Contiguous as in the rollout: for another memory layout a kernel may round otherwise.
        out.append(velocity(x.contiguous(), t))
    return torch.stack(out, 1)


def replay(velocity: Velocity, trajectory: Trajectory) -> Replay:
    """Score the stored noisy steps under `velocity`, called once a step as in rollout.

    The weights that sampled give trajectory.logp again. Errors: see `replay_of`.
    """
    return replay_of(velocities_at(velocity, trajectory), trajectory)


def replay_of(v: Tensor, trajectory: Trajectory) -> Replay:
    """Score the stored noisy steps from the velocities v (N, W, ...) at trajectory.points.

    For a model that computes several steps in one call.
    Errors: ValueError when v is not of these samples and steps, or the window is empty.
    """
    latents, _ = trajectory.points                                               # (N, W, ...)
    logp = trajectory.logp                                                       # (N, W)
    if v.shape != latents.shape or logp.shape != latents.shape[:2]:
        raise ValueError(
            f"v is {tuple(v.shape)} and logp {tuple(logp.shape)}, expected the samples and steps "
            f"of the latents, {tuple(latents.shape)}")
    times = trajectory.times[trajectory.window[0]:]
    v = _wide(v)
    means = []
    logps = []
    for w, v_w in enumerate(v.unbind(1)):
        x = latents[:, w].contiguous()                                           # (N, ...)
        x_next = trajectory.latents[:, w + 1]
        mean, std = transition(
            x, v_w.contiguous(), times[w], times[w + 1],
            noise_level=trajectory.noise_level, sampler=trajectory.sampler)
        means.append(mean)
        logps.append(gaussian_logp(x_next, mean, std, density=trajectory.density))
    return Replay(torch.stack(logps, 1), torch.stack(means, 1), v)


# ---- drawn samples with fresh noise ----

@dataclass(frozen=True)
class Renoised:
    """N drawn samples with fresh noise at J times, where `matching_loss` compares velocities."""

    times: Tensor                     # (J,)
    latents: Tensor                   # (N, J, ...) (1-t) data + t noise
    target: Tensor                    # (N, J, ...) noise - data
    data: Tensor                      # (N, ...) final sample
    v: Tensor | None = None           # (N, J, ...) under the policy that sampled: its v_old

    @property
    def points(self) -> tuple[Tensor, Tensor]:
        """Where a replay needs velocities: latents (N, J, ...) and their times (J,)."""
        return self.latents, self.times


def stratified_times(J: int, shift: float = 1.0, *, seed: int, step: int) -> Tensor:
    """Draw J times, (J,) fp32, one uniformly in each of J equal parts of 0..1, the noisiest first.

    They are shifted as `time_grid` shifts, so that they are as dense as the steps of a rollout. A
    function of (seed, step) alone, as `draw_window` is.
    """
    generator = random.Random(f"{seed}/{step}")
    t = torch.tensor([(j + generator.random()) / J for j in reversed(range(J))])
    return shift * t / (1 + (shift - 1) * t)


def renoise(data: Tensor, times: Tensor, noise: Tensor) -> Renoised:
    """Put noise (J, N, ...), standard normal, onto samples `data` (N, ...) at the times (J,)."""
    data = _wide(data)
    noise = _wide(noise)
    times = times.to(data)
    latents = [(1 - t) * data + t * fresh for t, fresh in zip(times, noise)]
    target = (noise - data).transpose(0, 1)                                      # (N, J, ...)
    return Renoised(times, torch.stack(latents, 1), target, data)


# ---- ratio and penalties ----

LOG_RATIO_BOUND = 20.0     # nats: exp(20) is 4.9e8, beyond every published clip range


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """Return exp of a log-ratio (nats), elementwise; above 20 nats exp(20) with gradient 0.

    Without a bound exp is inf from 89 nats on in fp32, and inf makes the loss of a tied sample and
    the gradient of a clipped one NaN. Far below 0 exp falls to 0 by itself.
    """
    return log_ratio.clamp(max=LOG_RATIO_BOUND).exp()


def normalised_log_ratio(
    x_next: Tensor, mean: Tensor, mean_old: Tensor, std: Tensor, *, density: str = "mean"
) -> Tensor:
    """Return GRPO-Guard's RatioNorm of each sample and step [UniGRPO Eq. 5].

    x_next, mean, mean_old (N, W, ...), std (W,) -> (N, W):
    std * (log_ratio + |dmu|^2 / (2 std^2)), dmu = mean_old - mean, both terms reduced alike.
    On samples of the old policy log_ratio has expectation -|dmu|^2 / (2 std^2), so the upper clip
    seldom acts, and spread |dmu| / std. RatioNorm has expectation 0 and spread |dmu|, which still
    grows with |dt| (see `step_weights`). Inserting the true density leaves
    -dmu . (x_next - mean_old) / std, the same without a difference of log-densities.
    Differs: GRPO-Guard's script takes |dmu|^2 over the whole batch, by a reduction over an empty
    list of dimensions.
    """
    mean_old = _wide(mean_old).detach()
    shift = _wide(mean) - mean_old                                               # (N, W, ...)
    deviation = _wide(x_next) - mean_old
    product = (shift * deviation).flatten(2)                                     # (N, W, D)
    return _reduce(product / std.to(product)[:, None], density)


def transition_kl(
    mean: Tensor, mean_ref: Tensor, std: Tensor, *, density: str = "mean"
) -> Tensor:
    """Return the KL of Normal(mean, std) from Normal(mean_ref, std): (N, W, ...), (W,) -> (N, W).

    It is |mean - mean_ref|^2 / (2 std^2) for "sum"; "mean" divides that by the number of entries.
    For "sde" it is |dt|/2 * (sigma (1-t)/(2t) + 1/sigma)^2 * |v - v_ref|^2.
    Differs: Flow-GRPO's code divides by 2 sigma^2 without |dt|, which is this KL times |dt|.
    """
    shift = _wide(mean) - _wide(mean_ref)                                        # (N, W, ...)
    square = (shift**2).flatten(2)                                               # (N, W, D)
    variance = std.to(square) ** 2                                               # (W,)
    return _reduce(square / (2 * variance[:, None]), density)


def velocity_mse(v: Tensor, v_ref: Tensor) -> Tensor:
    """Return the mean of (v - v_ref)^2 over entries: (N, W, ...) -> (N, W) [UniGRPO Eq. 8].

    Differs: UniGRPO does not say how it reduces |v - v_ref|^2; a weight of 1.5e-5 suggests the sum.
    """
    gap = _wide(v) - _wide(v_ref)                                                # (N, W, ...)
    return (gap**2).flatten(2).mean(-1)


# ---- loss ----

def clipped_surrogate(
    ratio: Tensor, adv: Tensor, *, low: float, high: float, delta: float | None = None
) -> Tensor:
    """Return PPO's clipped objective as a loss: -min(ratio * adv, clip(ratio) * adv), elementwise.

    The clip is to 1 - low .. 1 + high, which may differ (DAPO, section 3.1). `delta`, above
    1 + high, caps the unclipped ratio and so bounds the loss of a token with negative advantage
    (two-sided clipping, INTELLECT-2, arXiv 2505.07291; TRL's `delta`). `adv` broadcasts against
    `ratio`, and the loss has its unit.
    """
    clipped = ratio.clamp(1 - low, 1 + high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -(ratio * adv).minimum(clipped * adv)


def check_loss(total: float | Tensor, adv: Tensor, v: Tensor, *others: Tensor | None) -> None:
    """ValueError for a total that is not positive, and for shapes that might broadcast in silence.

    adv is (N,). others, what v (N, ...) is compared with, have v's shape, or are None.
    """
    if not total > 0:
        raise ValueError(f"total is {total}, expected the positive global count")
    if adv.shape != v.shape[:1]:
        raise ValueError(f"adv is {tuple(adv.shape)}, expected (N,), one number per sample")
    for other in others:
        if other is not None and other.shape != v.shape:
            raise ValueError(
                f"shapes {tuple(v.shape)} and {tuple(other.shape)} are compared, expected the same "
                "samples and steps")


def flow_grpo_loss(
    replayed: Replay, trajectory: Trajectory, adv: Tensor, *, total: float | Tensor, low: float,
    high: float, ratio_norm: bool = False, weights: Tensor | None = None,
    reference: Replay | None = None, kl_beta: float = 0.0, mse_weight: float = 0.0,
) -> tuple[Tensor, dict]:
    """Return FlowGRPO's loss of a micro-batch and its diagnostics.

    The loss is the sum of clipped surrogates and penalties over samples and steps, divided by
    `total`, which is counted over the whole optimisation step, all micro-batches and ranks:
    samples x steps for the mean over steps (UniGRPO Eq. 6), samples for the sum over steps
    (AlphaGRPO). adv (N,) holds at all steps of its sample. For `low` and `high` see
    `clipped_surrogate`. `ratio_norm` puts `normalised_log_ratio` in place of the log-ratio.
    `weights` (W,) or (N, W) multiply the surrogate, see `step_weights`. `reference` holds the same
    steps under the frozen policy, for kl_beta * transition_kl, reduced as logp is, and mse_weight *
    velocity_mse; their means enter the stats of `flow_loss_stats` as "kl" and "velocity_mse".
    A ratio is at most exp(20), see `bounded_exp`: no log-ratio, -inf included, makes loss, gradient
    or stats infinite or NaN.
    Errors: ValueError when velocities are not of the same samples and steps, adv is not (N,), total
    is not positive, or a penalty lacks its reference.
    """
    if reference is None and max(kl_beta, mse_weight) > 0:
        raise ValueError("kl_beta or mse_weight needs reference, a replay of the frozen policy")
    v_ref = reference.v if reference else None
    check_loss(total, adv, replayed.v, trajectory.means, v_ref)
    x_next = trajectory.latents[:, 1:]                                           # (N, W, ...)
    means = trajectory.means
    std = trajectory.std
    density = trajectory.density
    adv = adv.detach()[:, None]                                                  # (N, 1)
    plain = replayed.logp - trajectory.logp.detach()                             # (N, W)
    log_ratio = plain
    if ratio_norm:
        log_ratio = normalised_log_ratio(x_next, replayed.mean, means, std, density=density)
    ratio = bounded_exp(log_ratio)                                               # (N, W)
    loss = clipped_surrogate(ratio, adv, low=low, high=high)                     # (N, W)
    if weights is not None:
        loss = loss * weights.to(loss)
    stats = flow_loss_stats(ratio, plain, adv, low=low, high=high)
    if reference is not None:
        kl = transition_kl(replayed.mean, reference.mean.detach(), std, density=density)
        mse = velocity_mse(replayed.v, v_ref.detach())
        loss = loss + kl_beta * kl + mse_weight * mse                            # (N, W)
        stats["kl"] = kl.detach().mean()
        stats["velocity_mse"] = mse.detach().mean()
    return loss.sum() / total, stats


def matching_loss(
    v: Tensor, drawn: Renoised, adv: Tensor, *, form: str, total: float | Tensor,
    trust: float = 1.0, relative: bool = False, clip: float = 0.05, v_old: Tensor | None = None,
    v_ref: Tensor | None = None, mse_weight: float = 0.0,
) -> tuple[Tensor, dict]:
    """Return the loss of a micro-batch that learns from fresh noise, and its diagnostics.

    For one update from the policy that sampled, its three forms are one loss, unless `relative`.
    Samples of the plain ODE get fresh noise, and the policy learns from the velocity to it as flow
    matching does, weighed by the advantage A (N,). v (N, J, ...) are the velocities at
    drawn.points, u = drawn.target, v_old those of the policy that sampled (drawn.v), or of a slowly
    following copy. Per sample and time, with means over entries, two of the forms are
        2 A <v_old - u, v - v_old> + c |v - v_old|^2
    "nft": c = `trust` > 0. With A = 2r - 1 and c = beta this is r |v+ - u|^2 + (1 - r) |v- - u|^2,
    divided by beta, without the terms free of v: DiffusionNFT's branches (arXiv 2509.16117) without
    their weights. `relative`, of this form alone, divides the two terms of each sample and time by
    |v_old - u|^2. Without it the gradient of a bad sample is as large as its error, and each step
    makes the error larger.
    "awm": c = A, which is A times the rise of the flow-matching error |v - u|^2 (AWM, 2509.25050).
    A bad sample has negative curvature: nothing bounds how far v flees, but a penalty.
    "fpo": PPO's clip, to 1 - clip .. 1 + clip, of the ratio exp(-rise), |rise| at most 3 (FPO,
    2507.21053).
    At v = v_old all have the gradient of A |v - u|^2. They part as v moves. `total` is counted over
    the whole optimisation step: samples x times. v_ref (N, J, ...) are the frozen policy's
    velocities, for mse_weight * velocity_mse.
    "rise" and "shift", the mean of |v - v_old|^2, enter the stats, and "velocity_mse".
    Errors: ValueError for another form, a penalty without v_ref, no v_old, and see `check_loss`.
    Differs: DiffusionNFT divides each branch by the mean absolute error of its data, clamps A / 5 to
    -1 .. 1, and samples by the following copy; AWM weighs times, and adds a penalty to a running
    average.
    """
    if v_ref is None and mse_weight > 0:
        raise ValueError("mse_weight needs v_ref, velocities of the frozen policy")
    if v_old is None:
        v_old = drawn.v
    if v_old is None:
        raise ValueError("matching_loss needs v_old, or drawn with the velocities v")
    check_loss(total, adv, v, drawn.target, v_old, v_ref)
    v_old = _wide(v_old).detach()                                                # (N, J, ...)
    adv = adv.detach()[:, None]                                                  # (N, 1)
    shift = _wide(v) - v_old                                                     # (N, J, ...)
    slope = 2 * (v_old - drawn.target) * shift
    slope = slope.flatten(2).mean(-1)                                            # (N, J)
    square = velocity_mse(v, v_old)                                              # (N, J)
    rise = slope + square                       # of the flow-matching error
    if form == "nft":
        loss = adv * slope + trust * square
        if relative:
            loss = loss / (velocity_mse(v_old, drawn.target) + 1e-5)
    elif form == "awm":
        loss = adv * rise
    elif form == "fpo":
        ratio = (-rise).clamp(-3, 3).exp()
        loss = clipped_surrogate(ratio, adv, low=clip, high=clip)
    else:
        raise ValueError(f'form is "{form}", expected "nft", "awm" or "fpo"')
    stats = {"rise": rise.detach().mean(), "shift": square.detach().mean()}
    if v_ref is not None:
        mse = velocity_mse(v, v_ref.detach())
        loss = loss + mse_weight * mse
        stats["velocity_mse"] = mse.detach().mean()
    return loss.sum() / total, stats


@torch.no_grad()
def flow_loss_stats(
    ratio: Tensor, log_ratio: Tensor, adv: Tensor, *, low: float, high: float
) -> dict[str, Tensor]:
    """Summarise the ratio over samples and steps, detached, under TRL's names if it has one.

    ratio and log_ratio, the plain one, (N, W); adv (N, 1).
    "clip_ratio/{low,high}_mean": fraction whose gradient the clip removes, on the side that adv
    favours; "ratio/{mean,std}", std with divisor N*W; "ratio/step_{mean,std}",
    "clip_ratio/step_mean" (W,): per step; "approx_kl": mean log_ratio^2 / 2, within 20 nats.
    """
    below = ratio < 1 - low                                                      # (N, W)
    below = (below & (adv < 0)).float()
    above = ratio > 1 + high
    above = (above & (adv > 0)).float()
    square = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).square()
    return {
        "clip_ratio/low_mean": below.mean(),
        "clip_ratio/high_mean": above.mean(),
        "clip_ratio/step_mean": (below + above).mean(0),
        "ratio/mean": ratio.mean(),
        "ratio/std": ratio.std(correction=0),
        "ratio/step_mean": ratio.mean(0),
        "ratio/step_std": ratio.std(0, correction=0),
        "approx_kl": square.mean() / 2,
    }


# ---- a toy: python flow_grpo.py ----

def in_plane(net: nn.Module) -> Velocity:
    """Make a velocity in the plane of a network of (x, t); t is 0-dim or (N, 1)."""
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return net(torch.cat([x, t.expand(len(x), 1)], 1))
    return velocity


def learn_ring(steps: int, N: int = 512) -> nn.Module:
    """Train a flow on a circle of radius 2 by flow matching (arXiv 2210.02747)."""
    net = nn.Sequential(
        nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    velocity = in_plane(net)
    for _ in range(steps):
        angle = 2 * math.pi * torch.rand(N, 1)
        centre = torch.cat([angle.cos(), angle.sin()], 1)                        # (N, 2)
        data = 2 * centre + 0.12 * torch.randn(N, 2)
        noise = torch.randn(N, 2)
        t = torch.rand(N, 1)
        x = (1 - t) * data + t * noise                                           # (N, 2)
        error = velocity(x, t) - (noise - data)
        loss = error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def improve(
    net: nn.Module, updates: int, form: str, B: int = 32, G: int = 16
) -> list[float]:
    """Train two passes per batch, and return the mean reward of each batch.

    `form` is "grpo" or one of matching_loss. The reward is 1 above the line y = -x, 0 below.
    FlowGRPO's clip is idle: its second pass has ratio/std 0.0015.
    """
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4)
    velocity = in_plane(net)
    times = time_grid(10)
    rewards = []
    for update in range(updates):
        if form == "grpo":
            window = draw_window(3, 0, 6, seed=0, step=update)
            noise = shared_noise(torch.randn(B, 2), G)                           # (N, 2)
            step_noise = torch.randn(3, B * G, 2)
            old = rollout(
                velocity, noise, times, window=window, noise_level=0.7, step_noise=step_noise)
            weights = step_weights(times, window, over=window)
        else:
            noise = torch.randn(B * G, 2)
            path = rollout(velocity, noise, times, window=(0, 0), noise_level=0.0)
            chosen = stratified_times(3, seed=0, step=update)
            old = renoise(path.data, chosen, torch.randn(3, B * G, 2))
            old = replace(old, v=velocities_at(velocity, old).detach())
        above = old.data.sum(1) > 0                                              # (N,)
        reward = above.float().view(B, G)
        adv = reward - reward.mean(1, keepdim=True)
        adv = adv / (reward.std(1, correction=0, keepdim=True) + 1e-4)           # (B, G)
        adv = adv.flatten()
        for _ in range(2):
            if form == "grpo":
                loss, _ = flow_grpo_loss(
                    replay(velocity, old), old, adv, total=3 * B * G, low=0.02, high=0.02,
                    ratio_norm=True, weights=weights)
            else:
                v = velocities_at(velocity, old)                                 # (N, 3, 2)
                loss, _ = matching_loss(v, old, adv, form=form, total=3 * B * G)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        mean = reward.mean().item()
        rewards.append(mean)
        if update % 20 == 0 or update == updates - 1:
            print(f"{form}, update {update:3d}  reward {mean:.3f}")
    return rewards


def save_picture(file: str, drawn: dict[str, Tensor]) -> None:
    """Plot the samples (N, 2) of every named policy."""
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(drawn), figsize=(13, 4.8), sharex=True, sharey=True)
    for ax, (name, data) in zip(axes, drawn.items()):
        won = data.sum(1) > 0                                                    # (N,)
        ax.scatter(*data.T, c=won, cmap="RdYlGn", vmin=0, vmax=1, s=7)
        ax.axline((0, 0), slope=-1, color="grey")
        ax.set_title(f"{name}: {won.float().mean():.0%} rewarded")
        ax.set_aspect(1)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Two losses draw a flow in the plane to one side.", allow_abbrev=False)
    parser.add_argument("--out", default="before_after.png", help="the picture")
    args = parser.parse_args()
    torch.manual_seed(0)
    noise = torch.randn(600, 2)
    frozen = learn_ring(1000)
    policies = {"before": frozen}
    for form in ("grpo", "nft"):
        policies[form] = copy.deepcopy(frozen)
        improve(policies[form], updates=80, form=form)
    drawn = {}
    for name, net in policies.items():
        path = rollout(in_plane(net), noise, time_grid(40), window=(0, 0), noise_level=0.0)
        drawn[name] = path.data                                                  # (N, 2)
    save_picture(args.out, drawn)


if __name__ == "__main__":
    main()
