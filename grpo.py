"""Group relative policy optimisation (GRPO) of a text policy: advantage, ratio, clip, KL, averages.

Sources: GRPO is DeepSeekMath (arXiv 2402.03300, section 4.1). Dr. GRPO (2503.20783), DAPO
(2503.14476) and GSPO (2507.18071) are arguments of the same functions. The clip is PPO's
(1707.06347), the KL estimate is k3 (Schulman, "Approximating KL Divergence", 2020). Numbers agree
with the losses `grpo`, `bnpo`, `dr_grpo` and `dapo` of TRL 1.10.

Left out: sampling, optimiser, process groups and logging belong to the caller. The caller counts
`total` over the whole optimisation step. The loss of every micro-batch is divided by it, so the
gradients of micro-batches and ranks add up to the gradient of the whole batch, and nothing here
needs to know how that was split. (DDP and FSDP average over ranks: multiply the loss by their
number.) GRPO has no value network and no entropy bonus.

Notation: B prompts, G samples of each, N = B*G sequences in prompt-major order, L text positions,
V vocabulary. `mask` is true where the policy chose the token. Prompt and padding are false and may
hold anything, NaN included. `_old` is the policy that sampled, `_ref` the frozen one.

Example, two prompts with two samples each, one optimisation step in one micro-batch:

>>> import torch
>>> logits, tokens = torch.zeros(4, 3, 5, requires_grad=True), torch.tensor([[0, 1, 2]] * 4)
>>> mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0]])
>>> adv = group_advantage(torch.tensor([1.0, 0.0, 0.5, 0.5]), 2)
>>> logp = token_logp(logits, tokens)
>>> loss, stats = grpo_loss(logp, logp.detach(), adv, mask, total=mask.sum())
>>> loss.backward()
>>> [round(a, 3) for a in adv.tolist()], round(loss.item(), 3)
([1.0, -1.0, 0.0, 0.0], -0.125)

`python grpo.py` trains a table of logits on a toy string and prints the reward as it rises.
"""

import argparse

import torch
from torch import Tensor


# ---- advantage ----

DIVISORS = {"population": 0, "unbiased": 1}      # a std divides squares by n minus this


def split_groups(reward: Tensor, G: int) -> Tensor:
    """Split rewards into groups, (N,) -> (B, G), in fp32 at least.

    Errors: ValueError when G < 2, N is no positive multiple of G, or a reward is not finite.
    """
    N = reward.numel()
    if reward.ndim != 1 or G < 2 or N == 0 or N % G:
        raise ValueError(
            f"rewards of shape {tuple(reward.shape)} make no groups of G = {G}: "
            "expected (N,), N a multiple of G, and at least 2 samples to compare")
    bad = ~reward.isfinite()
    if bad.any():
        raise ValueError(f"reward {bad.nonzero().flatten().tolist()} is not finite")
    wide = reward.to(torch.promote_types(reward.dtype, torch.float32))
    return wide.view(-1, G)


def is_tied(groups: Tensor) -> Tensor:
    """Tell which groups hold one and the same reward G times, (B, G) -> (B, 1)."""
    first = groups[:, :1]                                                        # (B, 1)
    return (groups == first).all(1, keepdim=True)


def group_advantage(
    reward: Tensor, G: int, *, scale: str = "group", std: str = "population", eps: float = 1e-4,
    clamp: float | None = None,
) -> Tensor:
    """Compare every reward with the mean of its group, (N,) -> (N,), in fp32 at least.

    `scale` "group" divides by the group's std + eps (DeepSeekMath, section 4.1.2), "batch" by the
    std + eps of all raw rewards (arXiv 2508.08221; Flow-GRPO's global std), "none" by nothing
    (Dr. GRPO, section 3.2); then the advantage has the reward's unit, otherwise none.
    `std` "population" divides squares by n (Flow-GRPO, AlphaGRPO), "unbiased" by n - 1 (TRL, CoRL).
    `clamp` bounds the absolute value, last of all (Flow-GRPO uses 5).
    A group whose rewards are all equal carries no signal: it gets exactly 0 under every setting.
    Errors: ValueError for an unknown name, and see `split_groups`.

    Differs: TRL scores a sample that every reward function skipped as 0 and leaves it out of mean
    and std; here it is an error.
    """
    if std not in DIVISORS:
        raise ValueError(f'std is "{std}", expected "population" or "unbiased"')
    less = DIVISORS[std]
    r = split_groups(reward, G)                                                  # (B, G)
    adv = r - r.mean(1, keepdim=True)                                            # (B, G)
    if scale == "group":
        spread = r.std(1, keepdim=True, correction=less)                         # (B, 1)
        adv = adv / (spread + eps)
    elif scale == "batch":
        spread = r.std(correction=less)                                          # ()
        adv = adv / (spread + eps)
    elif scale != "none":
        raise ValueError(f'scale is "{scale}", expected "group", "batch" or "none"')
    # The mean of equal numbers may be off by rounding; a small std would make that of order 1.
    adv = adv.masked_fill(is_tied(r), 0)
    adv = adv.flatten()                                                          # (N,)
    if clamp is not None:
        adv = adv.clamp(-clamp, clamp)
    return adv


def rectify(reward: Tensor, initial: Tensor, G: int, how: str = "group") -> Tensor:
    """Replace the reward of a refinement that does not beat its initial reward, (N,) -> (N,).

    Such a false positive earns nothing by being the least bad of a failed group [AlphaGRPO].
    `how` "group" takes the group's least reward (the paper), "initial" the initial reward, (N,)
    (the paper's code), "off" changes nothing. With "initial" no failure gets a
    positive advantage, and a group in which all fail is tied. Both agree under the group's std
    if all that improve have one reward. Errors: ValueError for another name.
    """
    if how == "off":
        return reward
    groups = reward.view(-1, G)                                                  # (B, G)
    first = initial.to(reward).view(-1, G)                                       # (B, G)
    if how == "initial":
        floor = first                                                            # (B, G)
    elif how == "group":
        floor = groups.amin(1, keepdim=True)                                     # (B, 1)
    else:
        raise ValueError(f'how is "{how}", expected "group", "initial" or "off"')
    return torch.where(groups > first, groups, floor).flatten()


def centre(reward: Tensor, G: int) -> Tensor:
    """Subtract the group's mean, (N,) -> (B, G); a tied group gets exactly 0."""
    groups = split_groups(reward, G)                                             # (B, G)
    centred = groups - groups.mean(1, keepdim=True)
    return centred.masked_fill(is_tied(groups), 0.0)


def normalise_each(
    components: dict[str, Tensor], G: int, std: str = "population"
) -> dict[str, Tensor]:
    """Centre every component (N,) within its groups and divide it by their std + 1e-4.

    The weighted sum of the results is an advantage [TRL, normalize_then_sum] in which weights
    mean what they say; the advantage of the summed reward [LVRPO Eq. 3] follows the component that
    varies most, see `variance_share`. It amplifies a component that hardly varies. A tied group
    gets exactly 0. `std` "population" divides squares by n, "unbiased" by n - 1.
    Differs: TRL normalises the sum once more over the batch, see `group_advantage`'s "batch".
    Errors: see `split_groups`.
    """
    n = G - DIVISORS[std]
    out = {}
    for name, reward in components.items():
        centred = centre(reward, G)                                              # (B, G)
        square = centred.square().sum(1, keepdim=True)                           # (B, 1)
        spread = (square / n).sqrt()
        each = centred / (spread + 1e-4)
        out[name] = each.flatten()                                               # (N,)
    return out


def variance_share(
    components: dict[str, Tensor], weights: dict[str, float], G: int
) -> dict[str, float]:
    """Measure which component decides: cov(w_k r_k, sum) / var(sum) within groups.

    The shares add up to 1; a negative one works against the sum. All are 0 if the sum does not
    vary within any group.
    """
    parts = {}
    for name, reward in components.items():
        centred = centre(reward, G)                                              # (B, G)
        parts[name] = weights[name] * centred.double()
    total = sum(parts.values())                                                  # (B, G)
    variance = total.square().sum()
    shares = dict.fromkeys(parts, 0.0)
    if variance > 0:
        for name, part in parts.items():
            covariance = (part * total).sum()
            shares[name] = covariance.item() / variance.item()
    return shares


# ---- log-probability, ratio, KL ----

def token_logp(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each token in nats: (N, L, V), (N, L) int64 -> (N, L).

    `logits[:, i]` is the prediction of `tokens[:, i]`. `temperature` must be the one that the
    tokens were sampled with, otherwise the scored policy is not the acting one; so sample without
    top_k and top_p, and sample and score without dropout. Padding must hold some valid id, not
    -100. Computed in fp32 at least: bf16 keeps 3 digits of a log-probability.
    Errors: ValueError when temperature <= 0 or the shapes do not fit.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected above 0: greedy text has no density")
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and tokens {tuple(tokens.shape)} do not fit, "
            "expected (N, L, V) and (N, L)")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))           # (N, L, V)
    logp = (wide / temperature).log_softmax(-1)                                  # (N, L, V)
    index = tokens.unsqueeze(-1)                                                 # (N, L, 1)
    return logp.gather(-1, index).squeeze(-1)                                    # (N, L)


LOG_RATIO_BOUND = 20.0     # nats: exp(20) is 4.9e8, beyond every published clip range


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """Return exp of a log-ratio (nats), elementwise; above 20 nats exp(20) with gradient 0.

    Without a bound exp is inf from 89 nats on in fp32, and inf makes the loss of a tied sample and
    the gradient of a clipped one NaN. Far below 0 exp falls to 0 by itself.
    """
    return log_ratio.clamp(max=LOG_RATIO_BOUND).exp()


def kl_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Estimate KL(policy || reference) per token in nats: exp(d) - d - 1, d = logp_ref - logp.

    This is k3: never negative, and its expectation over tokens of the policy is the exact KL
    (DeepSeekMath, equation 4).
    Differs: d above 20 nats is taken as 20, with gradient 0, as in `bounded_exp`. Below -20 nats
    k3 is the line -d - 1 of gradient 1, which needs no bound.
    """
    d = (logp_ref - logp).clamp(max=LOG_RATIO_BOUND)
    return d.expm1() - d                    # exp(d) - 1 would lose the digits of a small d


def importance_ratio(
    logp: Tensor, logp_old: Tensor, mask: Tensor, *, level: str = "token"
) -> Tensor:
    """Return the probability ratio of the policy to the one that sampled.

    logp, logp_old, mask (N, L); masked positions do not enter, whatever they hold. `level` "token"
    gives a ratio per token (N, L), 1 where masked. "sequence" gives the exponential of the mean
    log-ratio over the sequence's active tokens (N, 1) (GSPO, equation 7), 1 for a fully masked one.
    A ratio is at most exp(20), see `bounded_exp`. logp may be -inf: ratio 0, gradient 0.
    Errors: ValueError for another level.
    """
    active = mask.bool()
    log_ratio = torch.where(active, logp - logp_old, 0)                          # (N, L)
    if level == "token":
        return bounded_exp(log_ratio)
    if level == "sequence":
        length = active.sum(1, keepdim=True).clamp(min=1)                        # (N, 1)
        return bounded_exp(log_ratio.sum(1, keepdim=True) / length)
    raise ValueError(f'level is "{level}", expected "token" or "sequence"')


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


def average(
    x: Tensor, mask: Tensor, *, per: str = "sequence", total: float | Tensor
) -> Tensor:
    """Average x, (N, L) or (N, 1), over the active tokens of mask (N, L) -> scalar.

    `per` names the unit that is averaged. `total` is how many of them the whole optimisation step
    has, over all micro-batches and ranks, so that the results of the parts add up to the whole:
    "sequence": the sum over sequences of the mean over their tokens (0 for a fully masked one),
    total = number of sequences (GRPO, DeepSeekMath equation 3);
    "token": the sum over tokens, total = number of active tokens (DAPO, section 3.3; with the count
    of the micro-batch it is TRL's `bnpo`);
    "constant": the same sum, total = a number independent of the samples, as N * max_length
    (Dr. GRPO, section 3.2).
    Errors: ValueError for another name, or when total is not positive.
    """
    if not total > 0:
        raise ValueError(f"total is {total}, expected the positive global count of what `per` names")
    active = mask.bool()
    x = torch.where(active, x, 0)                                                # (N, L)
    if per == "sequence":
        length = active.sum(1).clamp(min=1)                                      # (N,)
        x = x.sum(1) / length                                                    # (N,)
    elif per not in ("token", "constant"):
        raise ValueError(f'per is "{per}", expected "sequence", "token" or "constant"')
    return x.sum() / total


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average x over the true positions of mask -> scalar, 0 if there are none."""
    x = torch.where(mask, x, 0)
    return x.sum() / mask.sum().clamp(min=1)


def grpo_loss(
    logp: Tensor, logp_old: Tensor | None, adv: Tensor, mask: Tensor, *, total: float | Tensor,
    per: str = "token", level: str = "token", low: float = 0.2, high: float = 0.2,
    delta: float | None = None, logp_ref: Tensor | None = None, beta: float = 0.0,
    bias_correction_kl: bool = False,
) -> tuple[Tensor, dict]:
    """Return the GRPO loss of a micro-batch and its diagnostics: surrogate + beta * k3, averaged.

    logp, logp_old, logp_ref, mask (N, L), adv (N,) (DeepSeekMath, equation 3). Only logp carries
    gradient. `logp_old` None means the policy itself, at which the ratio is 1 with gradient: right
    for one update per batch. For `level` see `importance_ratio`, for `low`, `high` and `delta`
    `clipped_surrogate`, for `per` and `total` `average`. `bias_correction_kl` weighs k3 by the
    ratio: at token level its expectation over the old policy's tokens is then the KL, and its
    gradient the KL's (DeepSeek-V3.2, arXiv 2512.02556, section 3.1; TRL's use_bias_correction_kl).
    The stats are those of `loss_stats`, and with logp_ref "kl", the mean k3 over active tokens.
    Computed in fp32 at least. Loss, gradient and stats are finite for every logp from -inf on and
    every finite logp_old and logp_ref. NaN gives NaN.
    Errors: ValueError when shapes do not fit, a name is unknown, total is not positive, or beta > 0
    lacks logp_ref; FloatingPointError when an active token has log-probability -inf under the old
    policy or the reference.

    Differs: the papers average over sequences; the default here is DAPO's "token", as in TRL.
    """
    shapes = [x.shape for x in (logp, logp_old, logp_ref, mask) if x is not None]
    if logp.ndim != 2 or len(set(shapes)) > 1 or adv.shape != logp.shape[:1]:
        raise ValueError(
            f"log-probs and mask have shapes {[*map(tuple, shapes)]}, adv {tuple(adv.shape)}; "
            "expected (N, L) for all of them, and (N,)")
    if beta > 0 and logp_ref is None:
        raise ValueError(f"beta is {beta} without logp_ref, expected the reference's log-probs")
    active = mask.bool()                                                         # (N, L)
    # Padding is emptied before any arithmetic: NaN times a zero gradient would be NaN again.
    logp = torch.where(active, logp, 0)                                          # (N, L)
    logp = logp.to(torch.promote_types(logp.dtype, torch.float32))
    logp_old = logp.detach() if logp_old is None else logp_old.detach()
    for other in (logp_old, logp_ref):
        if other is not None and (other.isneginf() & active).any():
            raise FloatingPointError(
                "an active token has log-prob -inf under the old policy or the reference, "
                "expected one that it can sample")
    adv = adv.detach()[:, None]                                                  # (N, 1)
    ratio = importance_ratio(logp, logp_old, active, level=level)                # (N, L) or (N, 1)
    loss = clipped_surrogate(ratio, adv, low=low, high=high, delta=delta)
    stats = loss_stats(ratio, logp - logp_old, adv, active, low=low, high=high)
    if logp_ref is not None:
        logp_ref = torch.where(active, logp_ref.detach(), 0)                     # (N, L)
        kl = kl_k3(logp, logp_ref)                                               # (N, L)
        if bias_correction_kl:
            kl = kl * ratio
        stats["kl"] = masked_mean(kl.detach(), active)
        if beta > 0:
            loss = loss + beta * kl
    return average(loss, active, per=per, total=total), stats


@torch.no_grad()
def loss_stats(
    ratio: Tensor, log_ratio: Tensor, adv: Tensor, mask: Tensor, *, low: float, high: float
) -> dict[str, Tensor]:
    """Summarise the ratio over active tokens as detached scalars, under TRL's names.

    ratio (N, L), or (N, 1) at sequence level, where the unit is the sequence instead of the token;
    log_ratio, mask (N, L); adv (N, 1). A ratio counts as clipped if the clip removes its gradient,
    that is on the side that adv favours.
    "clip_ratio/{low,high,region}_mean": fraction clipped below, above, either;
    "clip_ratio/low_min", "clip_ratio/high_max": least and greatest fraction of one sequence;
    "ratio/{mean,min,max}"; "approx_kl": mean log_ratio^2 / 2 in nats, log_ratio within 20.
    Without an active token means are 0, minima +inf and maxima -inf, which a minimum or maximum
    over micro-batches ignores. To combine their means, weigh them by their units.

    Differs: `delta` plays no part; in TRL a `delta` below 1 + high hides clipped ratios.
    """
    active = mask.bool()                                                         # (N, L)
    unit = active
    if ratio.shape != mask.shape:
        unit = torch.ones_like(ratio, dtype=torch.bool)                          # (N, 1)
    below = ratio < 1 - low
    below = below & (adv < 0) & unit                                             # (N, L) or (N, 1)
    above = ratio > 1 + high
    above = above & (adv > 0) & unit
    length = unit.sum(1)                                                         # (N,)
    low_fraction = below.sum(1) / length                                         # NaN without a unit
    high_fraction = above.sum(1) / length
    square = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).square()         # (N, L)
    return {
        "clip_ratio/low_mean": masked_mean(below, unit),
        "clip_ratio/high_mean": masked_mean(above, unit),
        "clip_ratio/region_mean": masked_mean(below | above, unit),
        "clip_ratio/low_min": low_fraction.nan_to_num(torch.inf).amin(),
        "clip_ratio/high_max": high_fraction.nan_to_num(-torch.inf).amax(),
        "ratio/mean": masked_mean(ratio, unit),
        "ratio/min": ratio.where(unit, torch.inf).amin(),
        "ratio/max": ratio.where(unit, -torch.inf).amax(),
        "approx_kl": masked_mean(square / 2, active),
    }


# ---- a toy: python grpo.py ----

def learn_string(target: str, steps: int, G: int = 64, epochs: int = 2, seed: int = 0) -> None:
    """Train a table of logits per position, and print the mean reward (0 to 1) as it rises.

    The reward is the fraction of right letters. With two epochs per batch the second one is
    off-policy, and the clip acts.
    """
    alphabet = "abcdefghijklmnopqrstuvwxyz "
    goal = torch.tensor([alphabet.index(c) for c in target])                     # (L,)
    table = torch.zeros(len(target), len(alphabet), requires_grad=True)          # (L, V)
    optimizer = torch.optim.Adam([table], lr=0.2)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(G, len(target), dtype=torch.bool)                          # (N, L): one prompt
    for step in range(steps):
        odds = table.detach().softmax(-1)                                        # (L, V)
        drawn = torch.multinomial(odds, G, replacement=True, generator=generator)
        tokens = drawn.T                                                         # (N, L)
        right = tokens == goal                                                   # (N, L)
        reward = right.float().mean(1)                                           # (N,)
        adv = group_advantage(reward, G)                                         # (N,)
        logits = table.detach().expand(G, -1, -1)                                # (N, L, V)
        logp_old = token_logp(logits, tokens)                                    # (N, L)
        for _ in range(epochs):
            logits = table.expand(G, -1, -1)
            logp = token_logp(logits, tokens)                                    # (N, L)
            loss, stats = grpo_loss(logp, logp_old, adv, mask, total=mask.sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % 5 == 0 or step == steps - 1:
            text = "".join(alphabet[i] for i in table.argmax(-1))
            mean = reward.mean()
            clipped = stats["clip_ratio/region_mean"]
            print(f"step {step:3d}  reward {mean:.3f}  clipped {clipped:.3f}  argmax '{text}'")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="GRPO teaches a table of logits a toy string.", allow_abbrev=False)
    parser.add_argument(
        "--target", default="comparison within a group replaces a critic",
        help="lower-case letters and spaces")
    learn_string(parser.parse_args().target, steps=25)


if __name__ == "__main__":
    main()
