"""GRPO for one policy that reads and writes text and images.

    torchrun train.py                             # lvrpo on the toy world, minutes on a laptop
    torchrun train.py --recipe unigrpo --group_size 24 --out out/unigrpo
    torchrun --nproc_per_node=8 train.py --recipe unigrpo --policy BAGEL-7B-MoT --prompts p.jsonl
    python train.py recipes                       # how the methods differ, as a table
    torchrun train.py --recipe pretrain           # makes the toy's weights again

A step acts, rewards, compares and improves; then the run logs and keeps. Plain `python train.py` is
one process. Random numbers derive from the seed and their place (step, task, prompt, sample): a
checkpoint keeps no generator, and a resumed run is the uninterrupted one. Ranks share prompts.
Losses are divided by global counts, so that ranks and micro-batches change a gradient by rounding
alone.

Legend: B prompts per step and task, G samples each, N = B*G prompt-major, n of them on this rank, L
text positions, M image tokens, F features, W noisy steps, J times of fresh noise.
"""

import os

if __name__ == "__main__":  # before torch: waiting threads sleep, and memory is not cut up
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import signal
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import eval as evaluation
import flow_grpo
import rewards
from grpo import group_advantage, grpo_loss, normalise_each, rectify, variance_share
from policy import Policy
from recipes import SCALES, Config, check, describe, parse, recipe_table
from referees.build import build_rewards, hub_commits, referee_bytes
from referees.siglip import Learner
from rewards import Samples
from sample import Picture, Rollout, Scored, join, replay_rollout, sample_plan
from support.checkpoint import (
    freeze, keep_gathered, load_policy, reset_adapters, save_adapters, save_policy, shard)
from support.lora import adapters_off
from support.memory import check_memory, room_to_gather
from support.run import (
    Average, Log, Ranks, Stop, clip_gradients, load_checkpoint, make_optimizer, precision,
    refuse_finished, run_state, save_checkpoint, setup, signals, stop_if_asked)
from support.terminal import one_line, say
from tasks import (
    Batch, Source, drop_tied, first_pictures, guidance_of, in_use, keep_first, micro_batches,
    rewards_of, samples_of, step_counts, token_states, truth_and_variety)

VELOCITY_GAP = 0.1  # that a matching loss allows in self_check, in place of its clip range
# --advantage -> scale and std of grpo.group_advantage, and the largest size.
ADVANTAGES = {
    "group": ("group", "population", None), "unbiased": ("group", "unbiased", None),
    "batch": ("batch", "population", 5.0), "none": ("none", "population", None)}
TEXT_HALF = 0.8  # weight of a pair's text half; the image half has 1 [CoRL: lambda]

# ---- what lives through a run, and through a step ----


@dataclass
class Run:
    """What lives through a run."""

    cfg: Config
    ranks: Ranks
    policy: Policy
    frozen: Policy | None  # the reference of full training; None if adapters switch off
    optimizer: torch.optim.Optimizer
    average: Average
    follower: Average | None  # the old policy of a matching loss, with --old_decay
    source: Source
    rewards: dict[str, rewards.Reward]
    imitation: object                           # more pretraining, for the control; else None
    log: Log
    learner: Learner | None                     # a SigLIP that learns from the policy's pictures
    start: int = 0                              # first step
    between: bool = False                       # whether a step has changed the weights in part
    parts: list = field(default_factory=list)   # of the last step
    caught: list[int] = field(default_factory=list)  # this rank's signals, by number


@dataclass
class Part:
    """One task's part in a step: what was sampled, what it earned, what it will teach."""

    batch: Batch
    rollout: Rollout
    samples: Samples
    rewards: dict[str, Tensor]                  # name -> (n,)
    stats: dict[str, float]                     # of this rank's samples
    earlier: dict[str, Tensor] | None = None    # rewards of the first round, with --credit gain
    kept: Tensor | None = None  # (n,) whether it keeps the picture before the last, with --stop
    advs: list[Tensor] = field(default_factory=list)    # (n,) of all rounds, or of each
    group_stats: dict[str, float] = field(default_factory=dict)         # of all ranks' groups
    skip: bool = False                          # whether the update passes it over

    @property
    def name(self) -> str:
        return self.batch.task.name

    @property
    def adv(self) -> Tensor:
        """The advantages of the last round, (n,)."""
        return self.advs[-1]


# ---- the six phases ----


def one_step(run: Run, step: int) -> dict[str, float]:
    """One step's phases 1 to 4; returns what phase 5 logs."""
    if run.imitation:
        return run.imitation.step(step, run.optimizer)
    run.parts = []
    for batch in run.source.batches(step, run.ranks):
        if batch.task.refines:
            batch = draw_first_pictures(run, batch)
        rollout = act(run, batch)                                                   # 1. act
        run.parts.append(reward(run, batch, rollout))                               # 2. reward
    compare(run.parts, run.cfg, run.ranks)                                          # 3. compare
    taught = [part for part in run.parts if not part.skip]
    checked = self_check(run, taught) if step == 0 else {}
    stats = improve(run, taught)                                                    # 4. improve
    referee = run.learner.learn_step(run.parts, run.ranks) if run.learner else {}
    return stats | step_stats(run) | checked | referee


def act(run: Run, batch: Batch) -> Rollout:
    """1. Sample G trajectories of every row, at most --rollout_batch at once.

    Of every sample the rollout keeps what the policy chose: tokens of texts (n, L), tokens of
    images (n, M) or their latents around noisy steps (n, W + 1, M, F), and the log-probs of all; or
    images with fresh noise at J times, (n, J, M, F). With --guidance_in sampling the update scores
    them without guidance, which is another policy than the one that drew [CoRL].
    """
    cfg = run.cfg
    policy = run.policy
    task = batch.task
    rollouts = []
    with precision(cfg, policy.device), keep_gathered(policy, room_to_gather(policy.device)):
        for rows, index in batch.parts(cfg.rollout_batch, cfg.group_size):
            stop_if_asked(run)
            rollouts.append(
                sample_plan(
                    policy, task.plan(rows, batch.choices), seed=cfg.seed, step=batch.step,
                    index=index, G=cfg.group_size, guidance=guidance_of(cfg, task.redraws))
            )
    rollout = join(rollouts)
    return replace(rollout, guidance=None) if cfg.guidance_in == "sampling" else rollout


def reward(run: Run, batch: Batch, rollout: Rollout) -> Part:
    """2. Score every sample by the task's rewards."""
    cfg = run.cfg
    task = batch.task
    scoring = rewards_in_use(run, batch)
    samples = samples_of(run.policy, task, batch.rows, rollout)         # of n
    earlier = None
    kept = None
    if cfg.credit == "gain" and task.rounds > 1:
        before = samples_of(run.policy, task, batch.rows, rollout, last=2)
        earlier = rewards.score(scoring, before)                        # name -> (n,)
    if cfg.stop and task.before:
        kept, samples = keep_first(samples, task, batch.choices.wording)
    scores = rewards.score(scoring, samples)                            # name -> (n,)
    stats = truth_and_variety(task, samples, run.source.detector, rollout.G)
    if texts := rollout.texts:
        lengths = [text.chosen.sum(1).float() for text in texts]                    # (n,) each
        stats["completions/mean_length"] = torch.stack(lengths).mean().item()
    if kept is not None:
        stats["self_kept"] = kept.float().mean().item()
    return Part(batch, rollout, samples, scores, stats, earlier, kept)


def compare(parts: list[Part], cfg: Config, ranks: Ranks) -> None:
    """3. Fill the advantages of every part.

    The i-th samples of a pair's two halves share one advantage: of the summed reward [--pair joint,
    CoRL's unify_reward], or the sum of both [--pair sum, its unify_advantage]. A part of
    refinements none of which is better than its first picture is skipped, unless --rectify is off
    [AlphaGRPO].
    """
    for part in parts:
        weights = {name: cfg.weights[name] for name in part.rewards}
        initial = part.batch.initial                                    # (n / G,), or None
        if initial is not None:
            initial = initial.repeat_interleave(cfg.group_size)                     # (n,)
        part.advs = []
        if part.earlier is not None:
            part.advs.append(advantages(part.earlier, weights, cfg, ranks)[0])
            initial = rewards.combine(part.earlier, weights)                        # (n,)
        adv, part.group_stats, improved = advantages(
            part.rewards, weights, cfg, ranks, initial, part.kept)
        part.advs.append(adv)
        part.skip = cfg.rectify != "off" and improved == 0
    halves = [part for part in parts if part.batch.task.pair]
    if len(halves) == 2 and cfg.pair != "none":
        share_advantage(halves, cfg, ranks)


def advantages(
    components: dict[str, Tensor], weights: dict[str, float], cfg: Config, ranks: Ranks,
    initial: Tensor | None = None, kept: Tensor | None = None
) -> tuple[Tensor, dict[str, float], float | None]:
    """This rank's advantages (n,), statistics of all ranks' groups, and the share that improved.

    components, initial, kept: (n,). initial is the value of the picture that a sample changes; the
    share is None without it. What `kept` this picture is not rectified (grpo.rectify).
    """
    G = cfg.group_size
    each = cfg.normalise == "each"
    scale, std, clamp = ADVANTAGES[cfg.advantage]
    components = {name: ranks.gather(value) for name, value in components.items()}   # (N,) each
    summed = normalise_each(components, G, std) if each else components
    total = rewards.combine(components, weights)                        # (N,) as it is logged
    value = rewards.combine(summed, weights)                            # (N,) as it is compared
    improved = None
    groups = total.view(-1, G)                                                      # (B, G)
    tied = groups.amax(1) == groups.amin(1)                                         # (B,)
    stats = {
        "reward": total.mean().item(), "reward_std": groups.std(1, correction=0).mean().item(),
        "frac_reward_zero_std": tied.float().mean().item()}
    for name, component in components.items():
        stats[f"rewards/{name}/mean"] = component.mean().item()
    for name, share in variance_share(summed, weights, G).items():
        stats[f"advantage_share/{name}"] = share
    if initial is not None:
        initial = ranks.gather(initial)                                             # (N,)
        own = value
        value = rectify(value, initial, G, cfg.rectify)
        if kept is not None:
            value = torch.where(ranks.gather(kept), own, value)
        if cfg.credit == "gain":
            value = value - initial
        improved = (total > initial).float().mean().item()
        stats |= {"initial": initial.mean().item(), "improved": improved}
    if each and scale == "group":               # each reward is already divided by its own
        scale = "none"
    adv = group_advantage(value, G, scale=scale, std=std, clamp=clamp)              # (N,)
    mine = ranks.share(len(adv))
    return adv[mine.start:mine.stop], stats, improved


def share_advantage(halves: list[Part], cfg: Config, ranks: Ranks) -> None:
    """Give the two halves of a pair one advantage. [CoRL]"""
    scales = [TEXT_HALF if half.batch.task.pair == "text" else 1.0 for half in halves]
    if cfg.pair == "sum":
        shared = sum(scale * half.adv for scale, half in zip(scales, halves))
        for half in halves:
            half.advs = [shared]
        return
    components = {}
    weights = {}
    for scale, half in zip(scales, halves):
        for name, value in half.rewards.items():
            components[f"{half.name}.{name}"] = value
            weights[f"{half.name}.{name}"] = scale * cfg.weights[name]
    shared, stats, _ = advantages(components, weights, cfg, ranks)
    joint = {name: share for name, share in stats.items() if "share/" in name}
    for half in halves:
        own = {name: value for name, value in half.group_stats.items() if "share/" not in name}
        half.advs = [shared]
        half.group_stats = own | joint


def improve(run: Run, parts: list[Part]) -> dict[str, float]:
    """4. Take --epochs optimiser steps on the parts.

    Micro-batches and ranks add up, since each loss is divided by global counts. Returns the
    statistics of the last of the steps. Raises Stop, if it is asked to, before the first.
    """
    cfg = run.cfg
    ranks = run.ranks
    policy = run.policy
    text, image = ranks.total(step_counts(parts, cfg).to(ranks.device)).tolist()
    totals = dict(text=text, image=image)
    pieces = [piece for part in parts for piece in pieces_of(run, part, totals)]
    if not pieces:                              # momentum must not move the weights either
        return {"loss": 0.0, "grad_norm": 0.0}
    if run.follower:
        follow(run, pieces)
    averaged = ranks.world if policy.sharded else 1  # FSDP2 averages over ranks, our losses add up
    for epoch in range(cfg.epochs):
        run.optimizer.zero_grad()
        total = 0.0
        log = {}                                # name -> values of the micro-batches
        for piece in pieces:
            if epoch == 0:
                stop_if_asked(run)
            loss, stats = piece_loss(policy, piece, cfg)
            for name, value in stats.items():
                log.setdefault(f"{piece.task}/{name}", []).append(value)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the {piece.task} loss is {loss.item()}")
            if loss.requires_grad:              # a text alone cannot train the generation expert
                (averaged * loss).backward()
            total += loss.item()
        ranks.add_gradients(run.optimizer, averaged)
        norm = clip_gradients(run.optimizer, cfg.grad_clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm.item()}")
        run.between = True
        run.optimizer.step()
    return ranks.mean_over_ranks(log) | {"loss": ranks.add(total), "grad_norm": norm.item()}


# ---- what the phases are made of ----


def draw_first_pictures(run: Run, batch: Batch) -> Batch:
    """Refinement tasks only: draw each prompt's first pictures, score them, and keep one of each:
    the least, or of the share --stop the best.
    """
    cfg = run.cfg
    scoring = rewards_in_use(run, batch)
    weights = {name: cfg.weights[name] for name in scoring}

    def value(samples: Samples) -> Tensor:
        with torch.autocast(run.policy.device.type, enabled=False):  # as the refinements are scored
            return rewards.combine(rewards.score(scoring, samples), weights)

    rows = []
    values = []
    policy = run.policy
    with precision(cfg, policy.device), keep_gathered(policy, room_to_gather(policy.device)):
        for part, index in batch.parts(cfg.rollout_batch, cfg.initial):
            stop_if_asked(run)
            drawn, least = first_pictures(
                policy, part, batch.choices, seed=cfg.seed, step=batch.step, index=index,
                n=cfg.initial, value=value, guidance=guidance_of(cfg, False), best=cfg.stop)
            rows += drawn
            values.append(least)
    return replace(batch, rows=rows, initial=torch.cat(values))


def rewards_in_use(run: Run, batch: Batch) -> dict[str, rewards.Reward]:
    """The run's rewards that can score a batch."""
    return {name: run.rewards[name] for name in rewards_of(batch.task) if name in run.rewards}


@dataclass(frozen=True)
class Piece:
    """A micro-batch of an update."""

    task: str
    rollout: Rollout
    adv: Tensor                                                         # (samples, segments)
    totals: dict[str, float]  # "text", "image": what step_counts gives on all ranks
    reference: list | None  # the frozen policy's replay, if a penalty compares with it
    # A segment's place -> log-probs of tokens (n, L or M), or velocities under the follower.
    old: dict[int, Tensor] = field(default_factory=dict)


def pieces_of(run: Run, part: Part, totals: dict[str, float]) -> list[Piece]:
    """The micro-batches of a part.

    The totals count all tasks and ranks, so that a picture weighs as much as any other, and so does
    a text.
    """
    cfg = run.cfg
    policy = run.policy
    adv = segment_advantages(part)                                      # (n, segments)
    whole = part.rollout
    pieces = []
    texts = bool(whole.texts)
    images = bool(whole.pictures)
    penalised = cfg.penalises(texts, images)
    if not penalised and not (images and cfg.image_loss == "nft"):  # its curvature acts on all
        whole, adv = drop_tied(whole, adv, run.ranks)
    for rollout, rows in micro_batches(whole, cfg.micro):
        reference = None
        if penalised:
            stop_if_asked(run)
            with (
                torch.no_grad(), precision(cfg, policy.device),
                reference_of(policy, run.frozen) as frozen):
                reference = replay_rollout(frozen, rollout)
        pieces.append(Piece(part.name, rollout, adv[rows], totals, reference))
    return pieces


def segment_advantages(part: Part) -> Tensor:
    """The advantage of every chosen segment, (n, segments): that of its round.

    It is 0 for the last picture of a sample that keeps the one before.
    """
    columns = []
    place = 0
    last = part.batch.task.rounds - 1
    for segment in part.rollout.segments:
        if segment.is_given:
            continue
        adv = part.advs[min(place, len(part.advs) - 1)]                 # (n,)
        if isinstance(segment, Picture):
            if part.kept is not None and place == last:
                adv = adv.masked_fill(part.kept, 0.0)
            place += 1
        columns.append(adv)
    return torch.stack(columns, 1)


@torch.no_grad()
def follow(run: Run, pieces: list[Piece]) -> None:
    """Fill in the velocities of the follower at the points of every drawn image."""
    with run.follower.in_place_of(run.policy), precision(run.cfg, run.policy.device):
        for piece in pieces:
            if not piece.rollout.pictures:
                continue
            for i, scored in enumerate(replay_rollout(run.policy, piece.rollout)):
                if scored.kind == "image":
                    piece.old[i] = scored.v


def piece_loss(policy: Policy, piece: Piece, cfg: Config) -> tuple[Tensor, dict[str, float]]:
    """The loss of a micro-batch, summed over its chosen segments, and its stats.

    The stats are those of its last text and of its last image.

    The old log-probs of its tokens are those of the first call, at which their ratios are exactly
    1: in bf16, decoding and replay round otherwise, which at some tokens is more than the clip
    range. Those of noisy steps are the rollout's; a matching loss has velocities, see `follow`.
    """
    with precision(cfg, policy.device):
        replay = replay_rollout(policy, piece.rollout)
    loss = 0.0
    log = {}
    for i, scored in enumerate(replay):
        reference = piece.reference[i] if piece.reference else Scored(scored.segment)
        adv = piece.adv[:, i]
        if scored.logp is not None:
            piece.old.setdefault(i, scored.logp.detach())
        one_loss = text_loss if scored.kind == "text" else image_loss
        term, stats = one_loss(scored, piece.old.get(i), reference, adv, piece.totals, cfg)
        loss = loss + term
        log |= stats
    return loss, log


def text_loss(
    scored: Scored, old: Tensor, reference: Scored, adv: Tensor, totals: dict, cfg: Config
) -> tuple[Tensor, dict[str, float]]:
    """The weighted GRPO loss of one written text; old (n, L), adv (n,).

    reference: the frozen policy's replay of the text, without numbers if no penalty asks for it.
    """
    loss, stats = grpo_loss(
        scored.logp, old, adv, scored.segment.chosen, total=totals["text"], per=cfg.text_average,
        level=cfg.text_ratio, low=cfg.text_clip, high=cfg.text_clip_high or cfg.text_clip,
        beta=cfg.text_beta, logp_ref=reference.logp)
    return cfg.text_weight * loss, as_numbers("text", stats)


def image_loss(
    scored: Scored, old: Tensor | None, reference: Scored, adv: Tensor, totals: dict, cfg: Config
) -> tuple[Tensor, dict[str, float]]:
    """The weighted loss of one drawn image; adv (n,).

    old: the follower's velocities, or log-probs (n, M) of image tokens. reference: as `text_loss`
    has it.
    """
    drawn = scored.segment.drawn
    if cfg.image_loss == "token":
        loss, stats = grpo_loss(
            scored.logp, old, adv, torch.ones_like(old), total=totals["image"], low=cfg.image_clip,
            high=cfg.image_clip, beta=cfg.image_beta, logp_ref=reference.logp)
    elif cfg.matches:
        loss, stats = flow_grpo.matching_loss(
            scored.v, drawn, adv, form=cfg.image_loss, total=totals["image"], clip=cfg.image_clip,
            v_old=old, v_ref=reference.v, relative=True, mse_weight=cfg.mse_weight)
    else:
        weights = None
        if cfg.step_weights != "none":
            over = drawn.window if cfg.window > 1 else (0, cfg.window_high)
            weights = flow_grpo.step_weights(                           # (W,)
                drawn.times, drawn.window, kind=cfg.step_weights, noise_level=cfg.noise_level,
                sampler=cfg.sampler, over=over)
        loss, stats = flow_grpo.flow_grpo_loss(
            scored.flow, drawn, adv, total=totals["image"], low=cfg.image_clip,
            high=cfg.image_clip, ratio_norm=cfg.image_loss == "ratio_norm", weights=weights,
            kl_beta=cfg.image_beta, mse_weight=cfg.mse_weight, reference=reference.flow)
    return cfg.image_weight * loss, as_numbers("image", stats)


def as_numbers(kind: str, stats: dict[str, Tensor]) -> dict[str, float]:
    """A loss's statistics as they are logged: kind/name, or kind/name/0, ... per noisy step."""
    out = {}
    for name, value in stats.items():
        for i, number in enumerate(value.flatten().tolist()):
            out[f"{kind}/{name}/{i}" if value.ndim else f"{kind}/{name}"] = number
    return out


def reference_of(policy: Policy, frozen: Policy | None):
    """A context of the frozen reference: with adapters the policy itself, while they are off."""
    return adapters_off(policy) if frozen is None else nullcontext(frozen)


def self_check(run: Run, parts: list[Part]) -> dict[str, float]:
    """Mean and 0.99 quantile of |replay - rollout| before any update.

    Of log-probs, or of velocities if the loss is a matching loss.
    A gap beyond the clip range gives a warning. Errors: ValueError far beyond it: the two are then
    different functions, as only --guidance_in sampling means them to be.
    """
    cfg = run.cfg
    gaps = {}
    for part in parts:
        for rollout, _ in micro_batches(part.rollout, cfg.micro):
            with torch.no_grad(), precision(cfg, run.policy.device):
                scored_segments = replay_rollout(run.policy, rollout)
            for scored in scored_segments:
                gaps.setdefault(f"{part.name}/{scored.kind}", []).append(scored.gaps)
    out = {}
    for name, each in gaps.items():
        values = torch.cat(each)
        mean = values.mean().item()
        high = values.quantile(0.99).item()
        out |= {f"self_check/{name}/mean": mean, f"self_check/{name}/q99": high}
        gap = max(mean, high)
        clip = VELOCITY_GAP if cfg.matches else cfg.image_clip
        if name.endswith("text"):
            clip = cfg.text_clip
        unguided = cfg.guidance_in == "sampling" and cfg.guidance > 1 and name.endswith("image")
        if gap > max(10 * clip, 0.05) and not unguided:
            raise ValueError(
                f"self-check: rollout and replay differ by {gap:.2g} in {name}; they must be one "
                "function")
        if gap > clip:
            say(
                f"warning: {name} differs by {gap:.2g} before any update; expected at most "
                f"{clip:g}")
    return out


def step_stats(run: Run) -> dict[str, float]:
    """What is logged of a step's parts."""
    out = {}
    for part in run.parts:
        local = {name: [value] for name, value in part.stats.items()}
        stats = run.ranks.mean_over_ranks(local) | part.group_stats
        out |= {f"{part.name}/{name}": value for name, value in stats.items()}
    return out


# ---- the run ----


def train(cfg: Config, ranks: Ranks) -> int:
    """The six phases until --steps, or until a signal, which saves first; returns the exit status.

    It is 0, or 128 and the signal's number.
    """
    run = begin(cfg, ranks)
    with signals() as run.caught, run.log:
        evaluation.evaluate_run(run, run.start)
        steps = range(run.start, cfg.steps)
        bar = tqdm(
            steps, initial=run.start, total=cfg.steps, disable=ranks.rank > 0, desc=cfg.recipe)
        for step in bar:
            done = step                         # steps that the weights have seen
            try:
                stats = one_step(run, step)
                run.average.update(run.policy)
                if run.follower:
                    run.follower.update(run.policy)
                done = step + 1
                run.between = False
                run.log(step=step, **stats)                                         # 5. log
                bar.set_postfix(loss=f"{stats['loss']:.3f}")
                stop_if_asked(run)
            except Stop:
                keep(run, done)
                say(f"stopped after {done} steps, checkpoint saved; go on with --resume")
                ranks.add(0)                    # waits: torchrun ends all when the first leaves
                return 128 + (run.caught or [signal.SIGTERM])[0]
            except FloatingPointError as error:
                raise FloatingPointError(f"step {step}: {error}; stopped") from error
            except (ValueError, OSError, MemoryError, RuntimeError):
                if done > run.start and not run.between and not run.policy.sharded:
                    keep(run, done, writer=ranks.rank)
                raise
            if done == cfg.steps or due(done, cfg.save_every):
                keep(run, done)                                                     # 6. keep
            if done == cfg.steps or due(done, cfg.eval_every):
                evaluation.evaluate_run(run, done)
        export(run)
    return 128 + run.caught[0] if run.caught else 0


def due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def begin(cfg: Config, ranks: Ranks) -> Run:
    """Load everything that a run needs; with --resume, its last checkpoint too."""
    check(cfg, ranks.world)
    if not cfg.resume:
        refuse_finished(Path(cfg.out))
    log = Log(Path(cfg.out), asdict(cfg), ranks.rank == 0, ranks.world)
    policy = prepare_policy(cfg, ranks)
    source = Source(cfg, policy)
    if cfg.guidance > 1 and source.scale == "toy":
        say(
            "warning: toy/policy was never trained without a prompt, which guidance compares with")
    frozen = None
    if cfg.needs_reference and not cfg.lora:
        frozen = prepare_policy(cfg, ranks, trained=False)
    rates = dict(understanding=cfg.lr_understanding, generation=cfg.lr_generation)
    optimizer = make_optimizer(policy, rates, cfg.weight_decay)
    imitation = None
    scoring = {}
    learner = None
    if cfg.recipe == "control":
        from toy.pretrain import Imitation

        imitation = Imitation(policy, cfg.seed, cfg.grad_clip)
    else:
        states = token_states(
            lambda: reference_of(policy, frozen), lambda: precision(cfg, ranks.device),
            cfg.rollout_batch or 512)
        scoring = build_rewards(
            cfg, ranks.device, detector=source.detector, rows=source.drawn_rows, states=states,
            questions=source.questions, texts=source.texts_for)
        log.head["files"] |= hub_commits(cfg)
        if cfg.train_referee:
            learner = Learner(scoring.get("sem", scoring.get("dense")).encoder, cfg.train_referee)
    average = Average(policy, cfg.ema)
    follower = Average(policy, cfg.old_decay) if cfg.old_decay else None
    run = Run(
        cfg, ranks, policy, frozen, optimizer, average, follower, source, scoring, imitation, log,
        learner)
    if cfg.resume:
        run.start = load_checkpoint(Path(cfg.out), run_state(run))
        log.resume(run.start)
    return run


def prepare_policy(cfg: Config, ranks: Ranks, trained: bool = True) -> Policy:
    """The policy to train, or its frozen reference.

    The memory of a run is checked before a weight is read.
    """

    def prepare(policy: Policy) -> None:        # it is on the meta device
        if trained:
            freeze(policy, cfg.experts, cfg.lora, cfg.checkpointing)
        else:
            policy.requires_grad_(False)
        if cfg.shard:
            shard(policy, torch.bfloat16 if cfg.bf16 else None)
        if trained and ranks.device.type == "cuda":
            check_memory(policy, cfg, ranks, in_use(cfg), referee_bytes(cfg))

    dtype = torch.bfloat16 if cfg.bf16 else torch.float32
    policy = load_policy(cfg.policy, device=ranks.device, dtype=dtype, prepare=prepare)
    reset_adapters(policy, cfg.seed)
    return policy


def keep(run: Run, step: int, writer: int = 0) -> None:
    """6. Save the run's checkpoint; of equal ranks only `writer` writes."""
    save_checkpoint(
        Path(run.cfg.out), run_state(run), step, run.policy.sharded, run.ranks.rank, writer)


def export(run: Run) -> None:
    """Write the averaged policy, its adapters, and the pictures of a run that was evaluated."""
    cfg = run.cfg
    out = Path(cfg.out)
    run.log.open()
    if run.ranks.rank == 0 or run.policy.sharded:
        with run.average.in_place_of(run.policy), keep_gathered(run.policy):
            if cfg.lora:
                save_adapters(run.policy, out / "adapter")
            save_policy(run.policy, out / "policy")
    if run.ranks.rank > 0:
        return
    if cfg.eval_every and run.log.evaluated:
        print(evaluation.picture_run(run.log.path, cfg.policy, run.ranks.device))
    print(f"the policy is in {out / 'policy'}, its log in {run.log.path}")


def main() -> None:
    status = 0
    with one_line("train.py"):
        if sys.argv[1:] == ["recipes"]:
            for scale in SCALES:
                print(f"{scale}:\n\n{recipe_table(scale)}\n")
            return
        cfg = parse()
        ranks = setup()
        if ranks.rank == 0:
            print(describe(cfg))
        if cfg.recipe == "pretrain":
            from toy import pretrain, pretrain_janus

            pretrain.main(Path(cfg.out))
            pretrain_janus.main(Path(cfg.out))
        else:
            status = train(cfg, ranks)
    if dist.is_initialized():
        dist.destroy_process_group()
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
