"""GRPO for one policy that reads and writes text and images: act, reward, compare, improve, log, keep.

    torchrun train.py                                           # lvrpo on the toy world, minutes on a laptop
    torchrun train.py --recipe unigrpo --group_size 24 --out out/unigrpo
    torchrun --nproc_per_node=8 train.py --recipe unigrpo --policy BAGEL-7B-MoT --prompts prompts.jsonl
    python train.py recipes                                     # how the methods differ, as a table
    torchrun train.py --recipe pretrain                         # makes the toy's weights again

Plain `python train.py` is one process. Random numbers derive from the seed and their place (step, task, prompt, sample): a checkpoint
keeps no generator, and a resumed run is the uninterrupted one, bit for bit. Ranks share prompts, and groups where there are more ranks
than prompts; losses are divided by global counts, so that ranks and micro-batches change a gradient by rounding alone.

Legend: B prompts per step and task, G samples each, N = B*G prompt-major, L text positions, W noisy steps.
"""

import os

if __name__ == "__main__":                                      # before torch: threads that wait asleep leave a busy machine its cores
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sys
from contextlib import nullcontext
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import eval as evaluation
import flow_grpo
import rewards
from grpo import (anchored_advantage, group_advantage, grpo_loss, normalised, rectified,
    variance_share)
from policy import Policy, adapters_off
from recipes import SCALES, Config, check, parse, recipe_table, resolved
from referees.build import BUILD, Models, referee_bytes
from referees.questions import QUALITY, SEMANTIC
from referees.siglip import Learner
from sample import (Rollout, Text, chosen_texts, join, replay_gaps, replay_rollout, sample_plan,
    unguided)
from support.checkpoint import (freeze, gathered, load_policy, reset_adapters, save_adapters,
    save_policy, shard, trainable)
from support.memory import check_memory, room_to_gather
from support.plots import plot
from support.run import (Average, Log, Ranks, clip_gradients, load_checkpoint, precision,
    run_state, save_bad_step, save_checkpoint, setup, signals)
from support.terminal import one_line, say
from tasks import (TASKS, Batch, Source, counts, guidance_of, in_use, measured, micro_batches,
    rewards_of, samples_of, token_states)

# ---- what lives through a run ----


@dataclass
class Run:
    """What lives through a run."""

    cfg: Config
    ranks: Ranks
    policy: Policy
    frozen: Policy | None       # the reference in full training; None where adapters switch off
    optimizer: torch.optim.Optimizer
    average: Average
    source: Source
    rewards: dict[str, Callable]
    imitation: object           # of the control; else None
    log: Log
    learner: object = None      # Learner of a referee that learns
    start: int = 0              # first step
    shown: list = field(default_factory=list)                   # pictures and prompts for the learner, of this step
    work: list | None = None    # the last step's batches, rollouts and advantages
    silent: dict = field(default_factory=dict)                  # task -> steps in a row without a signal
    told: set = field(default_factory=set)                      # tasks of which that was said

    def tell_silence(self, task: str, tied: float) -> None:
        """Say once that a task had no signal for three steps; tied: the share of its groups whose rewards are all equal."""
        self.silent[task] = self.silent.get(task, 0) + 1 if tied == 1 else 0
        if self.silent[task] == 3 and task not in self.told and self.ranks.rank == 0:
            say(f"warning: --{task} learned nothing for three steps: all samples of each prompt get the same reward")
            self.told.add(task)


# ---- the six phases ----


def begun(run: Run, batch: Batch) -> Batch:
    """A batch with what its rows need of the policy before they can be asked: the pictures that are to be refined, and their values."""
    task, cfg = TASKS[batch.task], run.cfg
    if task.begin is None:
        return batch
    scoring = {k: run.rewards[k] for k in rewards_of(batch.task) if k in run.rewards}
    weights = {k: cfg.weights[k] for k in scoring}

    def value(samples) -> Tensor:
        with torch.autocast(run.policy.device.type, enabled=False):         # as the refinements are scored
            return rewards.combine(rewards.score(scoring, samples), weights)

    size = max(1, cfg.rollout_batch // cfg.initial) if cfg.rollout_batch else len(batch.rows)
    with precision(cfg, run.policy.device), gathered(run.policy, room_to_gather(run.policy.device)):
        parts = [task.begin(run.policy, batch.rows[i:i + size], batch.choices, seed=cfg.seed, step=batch.step, n=cfg.initial,
                            index=batch.index[i:i + size], value=value, guidance=guidance_of(cfg, False))
                 for i in range(0, len(batch.rows), size)]
    return replace(batch, rows=[row for rows, _ in parts for row in rows], initial=torch.cat([values for _, values in parts]))


def act(policy: Policy, batch: Batch, cfg: Config) -> Rollout:
    """1. The batch's rollout, at most cfg.rollout_batch samples at once."""
    G, plan = len(batch.samples), TASKS[batch.task].plan
    size = max(1, cfg.rollout_batch // G) if cfg.rollout_batch else len(batch.rows)
    guidance = guidance_of(cfg, TASKS[batch.task].sees)
    with precision(cfg, policy.device), gathered(policy, room_to_gather(policy.device)):
        drawn = [sample_plan(policy, plan(batch.rows[i:i + size], batch.choices), seed=cfg.seed, step=batch.step,
                             prompts=batch.index[i:i + size], G=G, first=batch.samples.start, guidance=guidance)
                 for i in range(0, len(batch.rows), size)]
        return join([unguided(policy, r) for r in drawn] if guidance and cfg.guidance_in == "sampling" else drawn)


def reward_phase(policy: Policy, batch: Batch, r: Rollout, run: Run) -> tuple[dict[str, Tensor], dict[str, float]]:
    """2. Score a rollout -> (rewards name -> (N,), what is logged beside them)."""
    samples = samples_of(policy, TASKS[batch.task], batch.rows, r)
    scoring = {k: run.rewards[k] for k in rewards_of(batch.task) if k in run.rewards}
    scores = rewards.score(scoring, samples)
    seen = measured(batch.task, samples, run.source.detector, r.G, r.G == run.cfg.group_size)
    if run.learner and TASKS[batch.task].draws:
        run.shown.append((samples.images, samples.prompts))
    return scores, seen | {f"rewards/{k}/{tag}": v for k in scoring for tag, v in answers_by_tag(scoring[k], run.ranks).items()}


def taught(run: Run) -> dict[str, float]:
    """Let a referee that learns see the step's pictures."""
    shown, run.shown = run.shown, []
    add = lambda optimizer: run.ranks.add_gradients(optimizer, 1)
    losses = [run.learner.learn(*pictures, add, run.ranks.world) for pictures in shown]
    return run.ranks.combined({"referee/loss": losses}) if losses else {}


def answers_by_tag(reward, ranks: Ranks) -> dict[str, float]:
    """The mean answer of each kind of question that a decomposed reward asked, over all ranks."""
    by_tag = getattr(reward, "by_tag", {})
    sums = ranks.total(torch.tensor([by_tag.get(tag, (0.0, 0)) for tag in SEMANTIC + QUALITY], dtype=torch.float64, device=ranks.device))
    return {tag: total / count for tag, (total, count) in zip(SEMANTIC + QUALITY, sums.tolist()) if count}


def advantage_phase(acted: list[tuple], cfg: Config, ranks: Ranks) -> list[tuple[Tensor, dict]]:
    """3. (advantages (n,) of this rank's samples, statistics) of each batch, acted: (batch, rollout, rewards, ...). The i-th samples of a
    pair's two halves share one advantage: of the summed reward [CoRL's unify_reward], or the sum of both [its unify_advantage]."""
    weights = [{k: cfg.weights[k] for k in rewards_of_batch} for _, _, rewards_of_batch, *_ in acted]
    out = [compared(each[2], mine, cfg.rows[each[0].task], cfg, ranks, first_values(each[0])) for each, mine in zip(acted, weights)]
    halves = [i for i, each in enumerate(acted) if TASKS[each[0].task].pair]
    if len(halves) < 2 or cfg.pair == "none":
        return out
    scale = [cfg.pair_weight if TASKS[acted[i][0].task].pair == "text" else 1.0 for i in halves]
    if cfg.pair == "sum":
        shared, stats = sum(s * out[i][0] for i, s in zip(halves, scale)), {}
    else:
        named = lambda i, column: {f"{acted[i][0].task}.{k}": v for k, v in column.items()}
        both = {k: v for i in halves for k, v in named(i, acted[i][2]).items()}
        shared, stats = compared(both, {k: s * w for i, s in zip(halves, scale) for k, w in named(i, weights[i]).items()},
                                 cfg.rows[acted[halves[0]][0].task], cfg, ranks)
        out = [(adv, {k: v for k, v in own.items() if "share/" not in k} if i in halves else own) for i, (adv, own) in enumerate(out)]
    joint = {k: v for k, v in stats.items() if k.startswith("advantage_share/")}
    return [(shared, each[1] | joint) if i in halves else each for i, each in enumerate(out)]


def first_values(batch: Batch) -> Tensor | None:
    """(n,) what the picture was worth that each sample refines; None where a task begins with nothing."""
    return None if batch.initial is None else batch.initial.repeat_interleave(len(batch.samples))


def compared(components: dict[str, Tensor], weights: dict[str, float], count: int, cfg: Config, ranks: Ranks,
             initial: Tensor | None = None) -> tuple[Tensor, dict]:
    """Advantages (n,) of this rank's samples; the groups and their statistics are those of all ranks' `count` prompts. initial (n,): of
    refinements, see grpo.rectified; where none of all improves, every advantage is 0, and the update passes the task over [AlphaGRPO]."""
    G, each = cfg.group_size, cfg.normalise == "each"
    components = {k: ranks.groups(v.to(ranks.device), count, G).flatten() for k, v in components.items()}      # (N,) of all ranks
    summed = normalised(components, G, cfg.std) if each else components
    reward, valued, clamp = rewards.combine(components, weights), rewards.combine(summed, weights), cfg.adv_clamp or None      # (N,)
    if initial is not None:
        initial = ranks.groups(initial.to(ranks.device), count, G).flatten()                                   # (N,)
        valued = rectified(valued, initial, G, cfg.rectify)
    if initial is not None and cfg.baseline == "anchor":
        adv = anchored_advantage(valued, initial, G, clamp=clamp)                                              # (N,)
    else:
        adv = group_advantage(valued, G, scale="none" if each else cfg.advantage, std=cfg.std, clamp=clamp)    # (N,)
    groups = reward.view(-1, G)                                                                                # (B, G)
    stats = {"reward": reward.mean().item(), "reward_std": groups.std(1, correction=0).mean().item(),
             "frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean().item()}
    stats |= {f"rewards/{k}/mean": v.mean().item() for k, v in components.items()}
    stats |= {f"advantage_share/{k}": v for k, v in variance_share(summed, weights, G).items()}
    if initial is not None:
        stats |= {"initial": initial.mean().item(), "improved": (reward > initial).float().mean().item()}
        adv = adv * float(cfg.rectify == "off" or stats["improved"] > 0)
    return ranks.own(adv.view(count, G)), stats


def segment_loss(scored, reference, adv: Tensor, totals: dict, cfg: Config) -> tuple[Tensor, dict]:
    """4. Loss of one chosen segment, a scalar, and its stats, named text/... or image/...

    adv (N,); totals {"text", "image"}: what `counts` gives for the task's whole step, all ranks and micro-batches together, so that
    every task weighs alike whatever its number of prompts.
    """
    s = scored.segment
    if isinstance(s, Text):
        loss, stats = grpo_loss(
            scored.logp, s.logp, adv, s.chosen, total=totals["text"], per=cfg.text_average, level=cfg.text_ratio, low=cfg.text_clip,
            high=cfg.text_clip_high or cfg.text_clip, delta=cfg.text_delta or None, beta=cfg.text_beta,
            logp_ref=None if reference is None else reference.logp, bias_correction_kl=cfg.kl_correction)
        return cfg.text_weight * loss, as_numbers("text", stats)
    weights = flow_grpo.step_weights(s.flow.times, s.flow.window, normalise=True) if cfg.step_weights else None
    loss, stats = flow_grpo.flow_grpo_loss(
        scored.flow, s.flow, adv, total=totals["image"], low=cfg.image_clip, high=cfg.image_clip_high or cfg.image_clip,
        ratio_norm=cfg.ratio_norm, weights=weights, reference=None if reference is None else reference.flow, kl_beta=cfg.image_beta,
        mse_weight=cfg.mse_weight, mse_reduce=cfg.mse_reduce)
    return cfg.image_weight * loss, as_numbers("image", stats)


def as_numbers(kind: str, stats: dict[str, Tensor]) -> dict[str, float]:
    """A loss's statistics as they are logged: kind/name, and kind/name/0, kind/name/1, ... of what is known per noisy step."""
    out = {}
    for k, v in stats.items():
        out |= {f"{kind}/{k}/{i}": x for i, x in enumerate(v.tolist())} if v.ndim else {f"{kind}/{k}": v.item()}
    return out


def update_phase(policy: Policy, frozen: Policy | None, optimizer, work: list[tuple[Batch, Rollout, Tensor]], cfg: Config,
                 ranks: Ranks) -> dict:
    """4. cfg.epochs optimiser steps on the rollouts. Micro-batches and ranks add up: each loss is divided by global counts."""
    if not work:                                                # no refinement improved: momentum must not move the weights either
        return {"loss": 0.0, "grad_norm": 0.0}
    pieces = pieces_of(policy, frozen, work, cfg, ranks)
    averaged = ranks.world if policy.sharded else 1             # FSDP2 averages the shards' gradients over ranks; ours add up
    for _ in range(cfg.epochs):
        optimizer.zero_grad()
        value, log = 0.0, {}                                    # log: name -> values of the micro-batches
        for task, piece, adv, totals, reference in pieces:
            for only in range(piece.chosen) if cfg.segments else [None]:
                loss = 0.0
                with precision(cfg, policy.device):
                    scored_segments = replay_rollout(policy, piece, only)
                references = reference[only or 0:] if reference else [None] * len(scored_segments)
                for scored, ref in zip(scored_segments, references):
                    term, stats = segment_loss(scored, ref, adv, totals, cfg)
                    loss = loss + term
                    for k, v in stats.items():
                        log.setdefault(f"{task}/{k}", []).append(v)
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"the {task} loss is {loss.item()}")
                if loss.requires_grad:                          # a text by itself has no part in training the generation expert alone
                    (averaged * loss).backward()
                value += loss.item()
        ranks.add_gradients(optimizer, averaged)
        norm = clip_gradients(optimizer, cfg.grad_clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm.item()}")
        optimizer.step()
    value = ranks.total(torch.tensor(value, dtype=torch.float64, device=ranks.device))
    return ranks.combined(log) | {"loss": value.item(), "grad_norm": norm.item()}


def one_step(run: Run, step: int) -> dict:
    """Phases 1 to 4; returns what phase 5 logs."""
    if run.imitation:
        return run.imitation.step(step, run.optimizer)
    cfg, stats, acted, run.work = run.cfg, {}, [], []
    for batch in run.source.batches(step, run.ranks):
        batch = begun(run, batch)
        r = act(run.policy, batch, cfg)                                                                        # 1. act
        acted.append((batch, r, *reward_phase(run.policy, batch, r, run)))                                     # 2. reward
    for (batch, r, _, seen), (adv, group) in zip(acted, advantage_phase(acted, cfg, run.ranks)):               # 3. compare
        lengths = [s.chosen.sum(1).float() for s in chosen_texts(r)]                          # (N,) each
        seen |= {"completions/mean_length": torch.stack(lengths).mean().item()} if lengths else {}
        seen = run.ranks.combined({k: [v] for k, v in seen.items()})
        stats |= {f"{batch.task}/{k}": v for k, v in (seen | group).items()}
        run.tell_silence(batch.task, group["frac_reward_zero_std"])
        if group.get("improved") != 0 or cfg.rectify == "off":
            run.work.append((batch, r, adv))
    if step == 0:
        stats |= {f"self_check/{k}": v for k, v in self_check(run.policy, run.work, cfg).items()}
    stats |= update_phase(run.policy, run.frozen, run.optimizer, run.work, cfg, run.ranks)                        # 4. improve
    return stats | taught(run)


def train(cfg: Config, ranks: Ranks) -> None:
    """The run: the six phases until cfg.steps, or until a signal, which saves first."""
    run = begin(cfg, ranks)
    with signals() as caught, run.log:
        evaluation.evaluate_run(run, run.start)
        bar = tqdm(range(run.start, cfg.steps), initial=run.start, total=cfg.steps, disable=ranks.rank > 0, desc=cfg.recipe)
        for step in bar:
            done = step                                         # steps that the weights have seen
            try:
                stats = one_step(run, step)
                run.average.update(run.policy)
                done = step + 1
                run.log(step=step, **stats)                                                                    # 5. log
            except FloatingPointError as error:
                where = save_bad_step(Path(cfg.out), ranks.rank, run.policy, step, run.work)
                raise FloatingPointError(f"step {step}: {error}; stopped. {where}") from error
            except (ValueError, OSError, rewards.RewardError):
                if done > run.start and not run.policy.sharded:  # the weights are whole: those of the last finished step
                    keep(run, done, writer=ranks.rank)
                raise
            bar.set_postfix({k.split("/")[0]: f"{v:.3f}" for k, v in stats.items() if k.endswith("/reward") or k == "loss"})
            halt = bool(ranks.total(torch.tensor([len(caught)], device=ranks.device)).item())
            if halt or done == cfg.steps or cfg.save_every and done % cfg.save_every == 0:
                keep(run, done)                                                                                # 6. keep
            if halt:
                say(f"stopped after step {step}, checkpoint saved; go on with --resume")
                return
            if cfg.eval_every and (done % cfg.eval_every == 0 or done == cfg.steps):
                evaluation.evaluate_run(run, done)
        export(run)


# ---- what the phases are made of ----


def reference_of(policy: Policy, frozen: Policy | None):
    """A context of the frozen reference: the policy is its own where its adapters switch off."""
    return adapters_off(policy) if frozen is None else nullcontext(frozen)


def pieces_of(policy: Policy, frozen: Policy | None, work: list, cfg: Config, ranks: Ranks) -> list[tuple]:
    """The step's micro-batches: (task, rollout, advantages, global counts, the reference's replay or None)."""
    pieces = []
    for batch, r, adv in work:
        writes = TASKS[batch.task].writes
        most = getattr(cfg, writes) if writes else 0
        text, image = ranks.total(counts(r, cfg.text_average, most).to(ranks.device)).tolist()
        for piece, rows in micro_batches(r, cfg.micro):
            reference = None
            if cfg.penalised:
                with torch.no_grad(), precision(cfg, policy.device), reference_of(policy, frozen) as ref:
                    reference = replay_rollout(ref, piece)
            pieces.append((batch.task, piece, adv[rows], dict(text=text, image=image), reference))
    return pieces


def self_check(policy: Policy, work: list, cfg: Config) -> dict:
    """Before any update: the largest gap of log-probs between rollout and replay. Above the clip range it acts as noise; far above it the
    two paths are different functions, which is an error."""
    out = {}
    for batch, r, _ in work:
        guidance = guidance_of(cfg, TASKS[batch.task].sees)
        with precision(cfg, policy.device):
            if guidance and cfg.guidance_in == "sampling" and TASKS[batch.task].draws:
                guided = [gap for _, gap in replay_gaps(policy, replace(r, guidance=guidance))]
                out[f"{batch.task}/guidance"] = max(guided)
                say(f"warning: {batch.task} is drawn with guidance {cfg.guidance:g}, which the likelihood leaves out: log-probs differ by "
                    f"{max(guided):.2g}, and what is trained is not what draws")
            gaps = [gap for piece, _ in micro_batches(r, cfg.micro) for gap in replay_gaps(policy, piece)]
        for kind, gap in gaps:
            name, clip = f"{batch.task}/{kind}", cfg.text_clip if kind == "text" else cfg.image_clip
            out[name] = max(gap, out.get(name, 0.0))
            if gap > max(10 * clip, 0.05):
                raise ValueError(f"self-check: rollout and replay differ by {gap:.2g} in log-probs of {name}; they must be one function")
            if gap > clip:
                say(f"warning: {name} log-probs differ by {gap:.2g} before any update, beyond the clip range {clip:g}")
    return out


# ---- what keeps a run alive ----


def prepared_policy(cfg, ranks: Ranks, trained: bool = True) -> Policy:
    """The policy to train, or its frozen reference. Its memory is checked on the meta device, before a weight is read."""
    def prepare(policy: Policy) -> None:
        if trained:
            freeze(policy, cfg.experts, cfg.lora, cfg.checkpointing)
        else:
            policy.requires_grad_(False)
        if cfg.shard:
            shard(policy, torch.bfloat16 if cfg.bf16 else None)
        if trained and ranks.device.type == "cuda":
            check_memory(policy, cfg, ranks, {name: TASKS[name] for name in in_use(cfg)}, 0 if cfg.referee_device else referee_bytes(cfg))
    policy = load_policy(cfg.policy, device=ranks.device, dtype=torch.bfloat16 if cfg.bf16 else torch.float32, prepare=prepare)
    reset_adapters(policy, ranks.device, cfg.seed)
    return policy


def begin(cfg: Config, ranks: Ranks) -> Run:
    """Load everything a run needs; with --resume, its last checkpoint too."""
    check(cfg, ranks)
    log = Log(Path(cfg.out), asdict(cfg), ranks.rank == 0, ranks.world)
    policy = prepared_policy(cfg, ranks)
    source = Source(cfg, policy)
    frozen = prepared_policy(cfg, ranks, trained=False) if cfg.needs_reference and not cfg.lora else None
    rates, groups = dict(understanding=cfg.lr_understanding, generation=cfg.lr_generation), []
    for name, params in policy.trainable_by_expert().items():
        for cut in (False, True):                               # sharded and whole tensors do not mix in one group
            groups.append(dict(params=[p for p in params if isinstance(p, DTensor) == cut], lr=rates[name]))
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.99), weight_decay=cfg.weight_decay)
    for p in trainable(policy).values():
        optimizer.state[p] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    whose = (lambda: nullcontext(policy)) if cfg.tim_of == "policy" else (lambda: reference_of(policy, frozen))
    states = token_states(whose, lambda: precision(cfg, ranks.device), cfg.referee_batch)
    models, imitation = Models(cfg, ranks.device, source.detector, source.ruled, states, source.questions), None
    if cfg.recipe == "control":
        from toy.pretrain import Imitation
        imitation = Imitation(policy, cfg.seed, cfg.grad_clip)
    judges = {k: BUILD[k](models) for k, w in cfg.weights.items() if w and not imitation}
    learner = Learner(models.encoder, cfg.train_referee) if cfg.train_referee and not imitation else None
    run = Run(cfg, ranks, policy, frozen, optimizer, Average(policy, cfg.ema), source, judges, imitation, log, learner)
    if cfg.resume:
        run.start = load_checkpoint(Path(cfg.out), run_state(policy, run.average, optimizer, learner))
        log.resume(run.start)
    return run


def export(run: Run) -> None:
    """Write the averaged policy, its adapters, and the pictures of a run that was evaluated."""
    cfg, out = run.cfg, Path(run.cfg.out)
    run.log.open()
    if run.ranks.rank == 0 or run.policy.sharded:
        with run.average.swapped(run.policy), gathered(run.policy):
            if cfg.lora:
                save_adapters(run.policy, out / "adapter")
            save_policy(run.policy, out / "policy")
    if run.ranks.rank == 0 and cfg.eval_every and run.log.evaluated:
        before, after = load_policy(cfg.policy, run.ranks.device), load_policy(out / "policy", run.ranks.device)
        evaluation.before_after(before, after, out / "before_after.png")
        plot([run.log.path], out / "curves.png", {name: task.title for name, task in TASKS.items()})
        print(evaluation.summary(run.log.path))
    if run.ranks.rank == 0:
        print(f"the policy is in {out / 'policy'}, its log in {run.log.path}")


def keep(run: Run, step: int, writer: int = 0) -> None:
    """6. Save the run's checkpoint; of equal ranks only `writer` writes."""
    save_checkpoint(Path(run.cfg.out), run_state(run.policy, run.average, run.optimizer, run.learner), step, run.policy.sharded,
                    run.ranks.rank, writer)


def main() -> None:
    with one_line("train.py"):
        if sys.argv[1:] == ["recipes"]:
            print("\n\n".join(f"{scale}:\n\n{recipe_table(scale)}" for scale in SCALES))
            return
        cfg, ranks = parse(), setup()
        if ranks.rank == 0:
            print(resolved(cfg))
        if cfg.recipe != "pretrain":
            train(cfg, ranks)
        elif ranks.world == 1:
            from toy import pretrain
            pretrain.main(Path(cfg.out))
        else:
            raise ValueError("--recipe pretrain runs in one process")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
