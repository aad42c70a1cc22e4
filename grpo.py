"""Group relative policy optimisation (GRPO) of a text policy: advantage, ratio, clip, KL, and how they are averaged.

Sources: GRPO, DeepSeekMath (arXiv 2402.03300, section 4.1); Dr. GRPO (2503.20783), DAPO (2503.14476) and GSPO (2507.18071) as
arguments of the same functions; PPO's clip (1707.06347); the k3 estimator (Schulman, "Approximating KL Divergence", 2020).
Numbers agree with the `grpo`, `bnpo`, `dr_grpo` and `dapo` losses of TRL 1.10.

Left out: sampling, optimiser, process groups and logging, which belong to the caller. The loss of a micro-batch is divided by a
`total` that the caller counts over the whole optimisation step, so gradients of micro-batches and ranks add up to the gradient of
the whole batch, and nothing here needs to know how it was split. GRPO has no value network and no entropy bonus.

Notation: B prompts, G samples of each, N = B*G sequences flattened prompt-major, L text positions, V vocabulary.
`mask` is true where the policy chose the token; prompt and padding are false and may hold anything, NaN included.
`_old` is the policy that sampled, `_ref` the frozen one.

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


def group_advantage(
    reward: Tensor, G: int, *, scale: str = "group", std: str = "population", eps: float = 1e-4, clamp: float | None = None
) -> Tensor:
    """Reward relative to the mean of its group, (N,) -> (N,), in fp32 at least; without unit unless `scale` is "none".

    `scale`: "group" divides by the group's std + eps (DeepSeekMath, section 4.1.2), "batch" by the std + eps of the raw rewards
    of the whole batch (arXiv 2508.08221; Flow-GRPO's global std), "none" does not divide (Dr. GRPO, section 3.2).
    `std`: "population" divides squares by n (Flow-GRPO, AlphaGRPO), "unbiased" by n - 1 (TRL, CoRL).
    `clamp`: bound on the absolute value, applied last (Flow-GRPO uses 5).
    A group whose rewards are all equal carries no signal and gets exactly 0 under every setting.
    Errors: ValueError when G < 2, N is no positive multiple of G, a reward is not finite, a name unknown, eps < 0 or clamp <= 0.

    Differs: TRL scores a sample that every reward function skipped as 0 and leaves it out of mean and std; here it is an error.
    """
    if G < 2:
        raise ValueError(f"group_advantage: G is {G}, but a group needs at least 2 samples to compare")
    if reward.ndim != 1 or len(reward) == 0 or len(reward) % G:
        raise ValueError(f"group_advantage: reward has shape {tuple(reward.shape)}, expected (N,) with N a multiple of G = {G}")
    if not reward.isfinite().all():
        raise ValueError(f"group_advantage: reward {(~reward.isfinite()).nonzero().flatten().tolist()} is not finite")
    if scale not in ("group", "batch", "none"):
        raise ValueError(f'group_advantage: scale is "{scale}", expected "group", "batch" or "none"')
    if std not in ("population", "unbiased"):
        raise ValueError(f'group_advantage: std is "{std}", expected "population" or "unbiased"')
    if eps < 0 or (clamp is not None and clamp <= 0):
        raise ValueError(f"group_advantage: eps is {eps} and clamp {clamp}, expected eps >= 0 and clamp > 0 or None")
    r = reward.to(torch.promote_types(reward.dtype, torch.float32)).view(-1, G)              # (B, G)
    adv = r - r.mean(1, keepdim=True)                                                        # (B, G)
    correction = 1 if std == "unbiased" else 0
    if scale == "group":
        adv = adv / (r.std(1, keepdim=True, correction=correction) + eps)
    elif scale == "batch":
        adv = adv / (r.std(correction=correction) + eps)
    # The mean of equal numbers can be off by rounding, and a small std would turn that into an advantage of order 1.
    tied = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)                                # (B, 1)
    adv = adv.masked_fill(tied, 0).flatten()                                                 # (N,)
    return adv if clamp is None else adv.clamp(-clamp, clamp)


def rectify(reward: Tensor, initial: Tensor, G: int, how: str = "group") -> Tensor:
    """False-positive rectification of the rewards of refinements, (N,) -> (N,): whoever does not improve on the initial reward, (N,),
    takes a floor, so that being the least bad of a failed group earns nothing. [AlphaGRPO]

    `how`: "group", the group's least reward (the paper, as told); "initial", the initial reward (its code). Then no one who fails gets a
    positive advantage, and a group in which all fail is tied. Both agree under the group's std where all who improve have one reward.
    "off" changes nothing. Errors: ValueError for another name.
    """
    if how not in ("off", "group", "initial"):
        raise ValueError(f'rectify: how is "{how}", expected "group", "initial" or "off"')
    groups, floor = reward.view(-1, G), initial.to(reward).view(-1, G)                       # (B, G)
    if how == "off":
        return reward
    lowest = floor if how == "initial" else groups.amin(1, keepdim=True).expand_as(groups)
    return torch.where(groups > floor, groups, lowest).flatten()


def _centred(components: dict[str, Tensor], G: int) -> dict[str, Tensor]:
    """Every component minus its group's mean, (B, G); exactly 0 in a tied group."""
    centred = {}
    for name, reward in components.items():
        if G < 2 or len(reward) % G:
            raise ValueError(f"G is {G} for {len(reward)} rewards of '{name}', expected a divisor of their number, at least 2")
        group = reward.view(-1, G)                                             # (B, G)
        tied = (group == group[:, :1]).all(1, keepdim=True)                    # (B, 1)
        centred[name] = (group - group.mean(1, keepdim=True)).masked_fill(tied, 0.0)
    return centred


def normalise_each(components: dict[str, Tensor], G: int, std: str = "population") -> dict[str, Tensor]:
    """Every component (N,) centred within its groups of G and divided by their std + 1e-4; exactly 0 in a tied group. std: "population"
    divides squares by n, "unbiased" by n - 1, as CoRL's code does.

    Their weighted sum is an advantage [CoRL's code, unify_advantage] in which weights mean what they say, where the advantage of the
    summed reward [LVRPO Eq. 3] follows the component that varies most (see variance_share). It amplifies a component that hardly
    varies. Errors: ValueError when G does not divide N or is below 2.
    """
    n = G - (std == "unbiased")
    spread = lambda each: (each.square().sum(1, keepdim=True) / n).sqrt()                     # noqa: E731
    return {name: (each / (spread(each) + 1e-4)).flatten() for name, each in _centred(components, G).items()}


def variance_share(components: dict[str, Tensor], weights: dict[str, float], G: int) -> dict[str, float]:
    """Which component decides: cov(w_k r_k, sum) / var(sum) within groups; adds up to 1, negative = works against the sum.

    All are 0 when the sum does not vary within any group.
    """
    weighed = {name: weights[name] * each.double() for name, each in _centred(components, G).items()}  # (B, G) each
    total = sum(weighed.values())
    variance = total.square().sum().item()
    return {name: (part * total).sum().item() / variance if variance > 0 else 0.0 for name, part in weighed.items()}


def token_logp(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability (nats, fp32 at least) of each token: logits (N, L, V), tokens (N, L) int64 -> (N, L).

    `logits[:, i]` is the prediction of `tokens[:, i]`. `temperature` must be the one the tokens were sampled with: otherwise the
    scored policy is not the acting one. Padding must hold some valid id.
    Errors: ValueError when temperature <= 0 or the shapes do not fit.
    """
    if not temperature > 0:
        raise ValueError(f"token_logp: temperature is {temperature}, expected a positive number (greedy decoding has no density)")
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(f"token_logp: logits {tuple(logits.shape)}, tokens {tuple(tokens.shape)}, expected (N, L, V) and (N, L)")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))                       # bf16 keeps 3 digits of a log-prob
    return (wide / temperature).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)    # (N, L)


LOG_RATIO_BOUND = 20.0                # nats: exp(20) is 4.9e8, beyond every published clip range and golden number


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio (nats), elementwise; above 20 nats it is exp(20) with gradient 0. Without a bound exp is inf from 89 nats on
    in fp32, and inf makes the loss of a tied sample and the gradient of a clipped one NaN. Below, exp falls to 0 by itself."""
    return log_ratio.clamp(max=LOG_RATIO_BOUND).exp()


def kl_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Elementwise k3 estimate (nats, >= 0) of KL(policy || reference): exp(d) - d - 1 with d = logp_ref - logp.

    Its expectation over tokens of the policy is the exact KL (DeepSeekMath, equation 4).
    Differs: d above 20 nats is taken as 20, with gradient 0, as in `bounded_exp`: at most exp(20) per token. Below -20 nats k3 is the
    line -d - 1, which is finite and pulls with gradient 1, so nothing bounds d there; it is inf only for a reference probability of 0.
    """
    d = (logp_ref - logp).clamp(max=LOG_RATIO_BOUND)
    return d.expm1() - d                    # exp(d) - 1 would lose the digits of a small d


def importance_ratio(logp: Tensor, logp_old: Tensor, mask: Tensor, *, level: str = "token") -> Tensor:
    """Probability ratio of the policy to the one that sampled; masked positions do not enter, whatever they hold.

    logp, logp_old, mask (N, L). `level`: "token" gives one ratio per token (N, L), 1 where masked; "sequence" gives the
    exponential of the mean log-ratio over the sequence's active tokens (N, 1) (GSPO, equation 7), 1 for a fully masked one.
    A ratio is at most exp(20), see `bounded_exp`. logp may be -inf where active: ratio 0, gradient 0. logp_old may not.
    Errors: ValueError when the level is unknown.
    """
    active = mask.bool()
    log_ratio = torch.where(active, logp - logp_old, 0)                                      # (N, L)
    if level == "token":
        return bounded_exp(log_ratio)
    if level == "sequence":
        return bounded_exp(log_ratio.sum(1, keepdim=True) / active.sum(1, keepdim=True).clamp(min=1))
    raise ValueError(f'importance_ratio: level is "{level}", expected "token" or "sequence"')


def clipped_surrogate(ratio: Tensor, adv: Tensor, *, low: float, high: float, delta: float | None = None) -> Tensor:
    """PPO's clipped objective as a loss, elementwise: -min(ratio * adv, clip(ratio, 1 - low, 1 + high) * adv).

    `low` and `high` may differ (DAPO, arXiv 2503.14476, section 3.1). `delta` caps the unclipped ratio from above and so bounds
    the loss of a token with negative advantage (two-sided clipping, INTELLECT-2, arXiv 2505.07291; TRL's `delta`).
    `adv` broadcasts against `ratio`. The loss is in units of `adv`.
    """
    clipped = ratio.clamp(1 - low, 1 + high)
    unclipped = ratio if delta is None else ratio.clamp(max=delta)
    return -(unclipped * adv).minimum(clipped * adv)


def average(x: Tensor, mask: Tensor, *, per: str = "sequence", total: float | Tensor) -> Tensor:
    """Reduce x, (N, L) or (N, 1), over the active tokens of mask (N, L) to a scalar; a fully masked sequence counts as 0.

    `per` names the unit that is averaged, `total` is how many of them the whole optimisation step has, over all micro-batches and
    ranks, so that the results of the parts add up to the result of the whole:
    "sequence": sum over sequences of the mean over their tokens, total = number of sequences (GRPO, DeepSeekMath equation 3);
    "token": sum over tokens, total = number of active tokens (DAPO, section 3.3; with a local count it is TRL's `bnpo`);
    "constant": sum over tokens, total = a number independent of the samples, as N * max_length (Dr. GRPO, section 3.2).
    The last two are the same sum. They differ in what `total` means.
    Errors: ValueError when the name is unknown or total is not positive.
    """
    if not total > 0:
        raise ValueError(f"average: total is {total}, expected the positive global count of what `per` names")
    active = mask.bool()
    x = torch.where(active, x, 0)                                                            # (N, L)
    if per == "sequence":
        return (x.sum(1) / active.sum(1).clamp(min=1)).sum() / total
    if per in ("token", "constant"):
        return x.sum() / total
    raise ValueError(f'average: per is "{per}", expected "sequence", "token" or "constant"')


def grpo_loss(
    logp: Tensor, logp_old: Tensor | None, adv: Tensor, mask: Tensor, *, total: float | Tensor, per: str = "token",
    level: str = "token", low: float = 0.2, high: float = 0.2, delta: float | None = None, logp_ref: Tensor | None = None,
    beta: float = 0.0, bias_correction_kl: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO loss of a micro-batch and its diagnostics: surrogate + beta * k3 (DeepSeekMath, equation 3), averaged by `average`.

    logp, logp_old, logp_ref, mask (N, L), adv (N,). Only logp carries gradient. `logp_old` None means the policy itself, at which
    the ratio is 1 with gradient: right for one update per batch. `level`: see `importance_ratio`; `low`, `high`, `delta`: see
    `clipped_surrogate`; `per`, `total`: see `average`. `bias_correction_kl` weighs k3 by the ratio: at token level
    the expectation over the old policy's tokens is then the KL and its gradient the KL's (DeepSeek-V3.2, arXiv 2512.02556,
    section 3.1; TRL's use_bias_correction_kl).
    The stats are those of `loss_stats`, and "kl", the mean k3 (weighed, if so asked) over active tokens, when logp_ref is given.
    Computed in fp32 at least. Loss, gradient and stats are finite for every logp from -inf and every finite logp_old and logp_ref, of
    whatever distance, since `bounded_exp` bounds each exponential. NaN gives NaN.
    Errors: ValueError when shapes do not fit, a name is unknown, total is not positive, a clip range or beta is negative,
    delta < 1, or beta > 0 without logp_ref; FloatingPointError when an active token is -inf under the old policy or the reference.

    Differs: the papers have "sequence" as the unit of GRPO; the default here is DAPO's "token", as in TRL.
    """
    if logp.ndim != 2:
        raise ValueError(f"grpo_loss: logp has shape {tuple(logp.shape)}, expected (N, L)")
    for name, x in (("logp_old", logp_old), ("logp_ref", logp_ref), ("mask", mask)):
        if x is not None and x.shape != logp.shape:
            raise ValueError(f"grpo_loss: {name} has shape {tuple(x.shape)}, expected {tuple(logp.shape)} as logp has")
    if adv.shape != logp.shape[:1]:
        raise ValueError(f"grpo_loss: adv has shape {tuple(adv.shape)}, expected ({len(logp)},), one number per sequence")
    if low < 0 or high < 0 or beta < 0:
        raise ValueError(f"grpo_loss: low {low}, high {high}, beta {beta}, expected none of them negative")
    if delta is not None and delta < 1:
        raise ValueError(f"grpo_loss: delta is {delta}, expected at least 1, and above 1 + high to leave the clip as it is")
    if beta > 0 and logp_ref is None:
        raise ValueError(f"grpo_loss: beta is {beta} without logp_ref, expected the reference's log-probs or beta 0")
    active = mask.bool()                                                                     # (N, L)
    # Padding is emptied before any arithmetic: NaN times a zero gradient would be NaN again.
    logp = torch.where(active, logp, 0).to(torch.promote_types(logp.dtype, torch.float32))   # (N, L)
    logp_old = (logp if logp_old is None else logp_old).detach()                             # its padding: see `importance_ratio`
    for name, x in (("old policy", logp_old), ("reference", logp_ref)):
        if x is not None and (x.isneginf() & active).any():
            raise FloatingPointError(f"grpo_loss: an active token has log-prob -inf under the {name}, expected one that it can sample")
    adv = adv.detach()[:, None]                                                              # (N, 1)
    ratio = importance_ratio(logp, logp_old, active, level=level)                            # (N, L) or (N, 1)
    loss = clipped_surrogate(ratio, adv, low=low, high=high, delta=delta)
    stats = loss_stats(ratio, logp - logp_old, adv, active, low=low, high=high)
    if logp_ref is not None:
        kl = kl_k3(logp, torch.where(active, logp_ref.detach(), 0))                          # (N, L)
        kl = kl * ratio if bias_correction_kl else kl
        stats["kl"] = average(kl.detach(), active, per="token", total=active.sum().clamp(min=1))
        loss = loss + beta * kl if beta > 0 else loss
    return average(loss, active, per=per, total=total), stats


@torch.no_grad()
def loss_stats(ratio: Tensor, log_ratio: Tensor, adv: Tensor, mask: Tensor, *, low: float, high: float) -> dict[str, Tensor]:
    """Diagnostics of the ratio over active tokens as detached scalars; the ones that TRL has bear TRL's names.

    ratio (N, L), or (N, 1) at sequence level, where the unit is the sequence instead of the token; log_ratio, mask (N, L);
    adv (N, 1). A ratio counts as clipped where the clip removes its gradient, that is on the side that adv favours.
    "clip_ratio/{low,high,region}_mean": clipped fraction below, above, either; "clip_ratio/low_min", "clip_ratio/high_max": the
    least and greatest fraction of one sequence; "ratio/{mean,min,max}"; "approx_kl": mean log_ratio^2 / 2 in nats, log_ratio
    within 20.
    Without an active token the means are 0, minima +inf and maxima -inf, which a minimum or maximum over micro-batches ignores.

    Differs: `delta` plays no part; in TRL a `delta` below 1 + high hides clipped ratios from the counts.
    """
    unit = mask.bool() if ratio.shape == mask.shape else torch.ones_like(ratio, dtype=torch.bool)
    below, above = (ratio < 1 - low) & (adv < 0), (ratio > 1 + high) & (adv > 0)             # (N, L) or (N, 1)

    def mean(x: Tensor, where: Tensor = unit) -> Tensor:
        return torch.where(where, x, 0.0).sum() / where.sum().clamp(min=1)

    def fraction(x: Tensor, fill: float) -> Tensor:                                          # of each sequence, (N,)
        return torch.where(unit.any(1), (x & unit).sum(1) / unit.sum(1).clamp(min=1), fill)

    return {
        "clip_ratio/low_mean": mean(below.float()),
        "clip_ratio/high_mean": mean(above.float()),
        "clip_ratio/region_mean": mean((below | above).float()),
        "clip_ratio/low_min": fraction(below, torch.inf).amin(),
        "clip_ratio/high_max": fraction(above, -torch.inf).amax(),
        "ratio/mean": mean(ratio),
        "ratio/min": torch.where(unit, ratio, torch.inf).amin(),
        "ratio/max": torch.where(unit, ratio, -torch.inf).amax(),
        "approx_kl": mean(log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).square() / 2, mask.bool()),
    }


def learn_string(target: str, steps: int, G: int = 64, epochs: int = 2, seed: int = 0) -> list[float]:
    """Mean reward (0 to 1) at each step of GRPO on a table of logits per position; the reward is the fraction of right letters.

    Prints six lines. With two epochs per batch the second one is off-policy, and the clip acts.
    """
    alphabet = "abcdefghijklmnopqrstuvwxyz "
    goal = torch.tensor([alphabet.index(c) for c in target])                                 # (L,)
    table = torch.zeros(len(target), len(alphabet), requires_grad=True)                      # (L, V)
    optimizer = torch.optim.Adam([table], lr=0.2)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(G, len(target), dtype=torch.bool)                                      # (N, L), one prompt: N = G
    rewards = []
    for step in range(steps):
        tokens = torch.multinomial(table.detach().softmax(-1), G, replacement=True, generator=generator).T  # (N, L)
        reward = (tokens == goal).float().mean(1)                                            # (N,)
        rewards.append(reward.mean().item())
        adv = group_advantage(reward, G)                                                     # (N,)
        logp_old = token_logp(table.detach().expand(G, -1, -1), tokens)                      # (N, L)
        for _ in range(epochs):
            logp = token_logp(table.expand(G, -1, -1), tokens)                               # (N, L)
            loss, stats = grpo_loss(logp, logp_old, adv, mask, total=mask.sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            text = "".join(alphabet[i] for i in table.argmax(-1).tolist())
            print(f"step {step:3d}  reward {rewards[-1]:.3f}  clipped {stats['clip_ratio/region_mean']:.3f}  argmax '{text}'")
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO teaches a table of logits a toy string.", allow_abbrev=False)
    parser.add_argument("--target", default="comparison within a group replaces a critic", help="lower-case letters and spaces")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--assert-reward", type=float, help="exit with an error when the last reward is below this")
    args = parser.parse_args()
    reward = learn_string(args.target, args.steps)[-1]
    if args.assert_reward is not None and reward < args.assert_reward:
        raise SystemExit(f"the last reward is {reward:.3f}, expected at least {args.assert_reward}")


if __name__ == "__main__":
    main()
