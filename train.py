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

import argparse
import os

if __name__ == "__main__":                                      # before torch: threads that wait asleep leave a busy machine its cores
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sys
import textwrap
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import eval as evaluation
import flow_grpo
import referees
import rewards
from checkpoint import gathered, load_policy, read_json, save_adapters, save_policy, trainable
from grpo import group_advantage, grpo_loss
from policy import Guidance, Policy, adapters_off
from run import (Average, Log, Ranks, Run, check, clip_gradients, load_checkpoint, precision, prepared_policy, room_to_gather, run_state,
                 save_bad_step, save_checkpoint, setup, signals)
from sample import Rollout, Text, chosen_texts, join, replay_gaps, replay_rollout, sample_plan, scale_of, unguided
from tasks import TASKS, Batch, Source, counts, measured, micro_batches, rewards_of, samples_of, token_states
from terminal import Arguments, one_line, say

TOY = Path(__file__).parent / "toy"


# What each method sets, at both scales or (toy=, bagel=) at one; the rest is the scale's or Config's default. Behind a value stands whose
# it is: "p" the paper's; "o" ours, where the paper's is not known; "d" ours, which departs from the paper's, named behind it.
RECIPES = {
    "lvrpo": dict(
        draw=(24, "o"), think=(8, "o"), ask=(16, "o"),
        sem=(1.0, "o"), accuracy=(1.0, "o"), kn=(1.0, "o"),
        text_beta=(0.02, "o"), image_beta=(0.003, "o"), image_weight=(300.0, "o"), step_weights=(True, "o"), epochs=(2, "o"),
        toy=dict(ins=(1.0, "o"))),
    "unigrpo": dict(
        think=(32, "p"), accuracy=(1.0, "o"),
        text_average=("sequence", "p"), mse_weight=(5e-5, "d: 1.5e-5, mean or sum"), ratio_norm=(True, "p"),
        step_weights=(True, "d: none in Eq. 6"), epochs=(2, "p"),
        # Nothing but the picture's truth holds the toy's thoughts, so the understanding expert learns four times slower than under lvrpo.
        toy=dict(ins=(1.0, "d: a preference model"), image_clip=(1e-3, "d: 1e-6, for more entries"), lr_understanding=(5e-5, "o"),
                 steps=(125, "o")),
        bagel=dict(sem=(1.0, "d: a preference model"))),
    # Stage 1 of CoRL, then its three refined policies, each from what stage 1 wrote (--policy out/corl/policy).
    "corl": dict(
        pair_image=(16, "p"), pair_text=(16, "p"), pair=("joint", "p"), pair_weight=(0.8, "p"),
        recaption=(1.0, "p"), likeness=(1.0, "p"), tim=(1.0, "p"), accuracy=(1.0, "p"), format=(1.0, "p"),
        group_size=(8, "p"), std=("unbiased", "p"), text_average=("sequence", "p"), image_weight=(300.0, "o"), step_weights=(True, "o"),
        # Without a penalty, as in the paper, the toy's pictures collapse at lvrpo's rate and number of steps.
        toy=dict(pair_image=(48, "d: 16"), pair_text=(48, "d: 16"), lr_generation=(2.5e-4, "o"), steps=(100, "o")),
        bagel=dict(lr_understanding=(4e-6, "p"), lr_generation=(4e-6, "p"))),
    "corl_t2i": dict(
        pair_image=(16, "p"), recaption=(1.0, "p"), likeness=(1.0, "p"), tim=(1.0, "p"),
        group_size=(16, "p"), std=("unbiased", "p"), image_beta=(0.003, "d: k3 0.02"), image_weight=(300.0, "o"), step_weights=(True, "o"),
        toy=dict(pair_image=(24, "d: 16"), lr_generation=(1.2e-4, "o"), steps=(75, "o")),
        bagel=dict(lr_understanding=(1e-6, "p"), lr_generation=(1e-6, "p"))),
    "corl_mc": dict(
        choose=(32, "p"), accuracy=(1.0, "p"), format=(1.0, "p"),
        group_size=(16, "p"), std=("unbiased", "p"), text_average=("sequence", "p"), text_beta=(0.02, "p"),
        toy=dict(lr_understanding=(1e-4, "o"), steps=(75, "o")),
        bagel=dict(lr_understanding=(1e-6, "p"))),
    "corl_oe": dict(
        reason=(32, "p"), accuracy=(1.0, "p"), format=(1.0, "p"),
        group_size=(16, "p"), std=("unbiased", "p"), text_average=("sequence", "p"), text_beta=(0.02, "p"),
        toy=dict(lr_understanding=(1e-4, "o"), steps=(75, "o")),
        bagel=dict(lr_understanding=(1e-6, "p"), open_answers=("graded", "p"))),
}

# What depends on size. The toy's values are ours, measured. BAGEL's are UniGRPO's Table 3 where it has them, but for the resolution.
SCALES = {
    "toy": dict(group_size=16, steps=150, lr_understanding=2e-4, lr_generation=5e-4, image_clip=1e-3, denoise_steps=6, shift=2.0,
                noise_level=0.8, sampler="cps", window=3, window_low=0, window_high=3, shared_noise=True, resolution=32,
                think_tokens=24, answer_tokens=4, referee_batch=512, request="think first"),
    "bagel": dict(group_size=24, lr_understanding=1e-6, lr_generation=3e-5, denoise_steps=25, shift=3.0, noise_level=0.8, sampler="sde",
                  window=3, window_low=0, window_high=5, resolution=512, think_tokens=256, answer_tokens=256, image_clip=1e-6, lora=64,
                  system_prompt=True, steps=1000, bf16=True, checkpointing=True, micro=4, rollout_batch=24, referee_batch=16,
                  request="First reason inside <think> </think> tags, then give the final answer inside <answer> </answer> tags.",
                  # The toy's referees are not for photographs, nor its rule for free captions.
                  siglip="google/siglip2-so400m-patch14-384", judge="google/paligemma2-3b-mix-448",
                  captioner="Salesforce/blip-image-captioning-base", recaption_by="bertscore"),
}


def option(default, help: str, least: float | None = None, above: float | None = None):
    """A field of Config: its default, what --help says of it, and the range of a number (0 and up where nothing is said)."""
    return field(default=default, metadata=dict(help=help, least=0 if least is None and above is None else least, above=above))


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; `python train.py --help` explains each field. Numbers of rows are global: ranks share them. The control
    (more pretraining) reads what is trained and how it is kept; the rest must be valid and does nothing."""

    recipe: str
    rows: dict[str, int] = field(default_factory=dict)          # task -> rows a step, a flag each
    weights: dict[str, float] = field(default_factory=dict)     # reward -> weight, a flag each
    policy: str = option(str(TOY / "policy"), "the policy folder to start from")
    prompts: str = option("", "prompts: .jsonl with \"prompt\" (and GenEval's fields), or .txt; without any file: the toy world")
    questions: str = option("", "questions: .jsonl with \"image\" (a path), \"question\", \"answer\"")
    pairs: str = option("", "pairs: .jsonl with \"image\", \"caption\", \"question\", \"answer\", perhaps \"options\"")
    siglip: str = option(str(TOY / "siglip"), "SigLIP of r_sem, r_dense: a folder or hub name for transformers, or open_clip (hf-hub:...)")
    judge: str = option(str(TOY / "judge"), "yes/no judge of r_kn: a folder or hub name")
    captioner: str = option(str(TOY / "captioner"), "BLIP captioner of --recaption: a folder or hub name")
    text_encoder: str = option("google-bert/bert-base-uncased", "encoder of --recaption_by bertscore: a folder or hub name")
    text_layer: int = option(-1, "its layer: 0 the embeddings, -1 the last", least=-1)
    out: str = option("out", "folder of log, checkpoint, pictures and trained policy")
    resume: bool = option(False, "go on from the checkpoint in --out")
    seed: int = option(0, "of everything random")
    steps: int = option(0, "optimisation steps, each on one batch of rollouts")
    eval_every: int = option(50, "steps between evaluations; 0: none, and no pictures")
    save_every: int = option(50, "steps between checkpoints; 0: at the end alone")
    group_size: int = option(0, "G, samples per prompt")
    micro: int = option(0, "samples per micro-batch of an update; 0: all at once")
    rollout_batch: int = option(0, "samples drawn at once, in whole groups; 0: all")
    referee_batch: int = option(0, "samples that a reward model scores at once", least=1)
    graded: bool = option(True, "r_ins is the fraction of rules kept, else all or nothing")
    open_answers: Literal["binary", "graded"] = option("binary", "accuracy of open answers: all or nothing, or shared words [CoRL's code]")
    recaption_by: Literal["tuples", "jaccard", "bertscore"] = option("tuples", "how a caption is held against the prompt")
    likeness_by: Literal["ssim", "psnr", "mse", "lpips"] = option("ssim", "how a drawn image is held against the real one")
    tim_of: Literal["reference", "policy"] = option("reference", "whose states --tim compares; those of the moving policy can be gamed")
    pair: Literal["joint", "sum", "none"] = option(
        "none", "what the halves of a pair share where both are in the step: the advantage of the summed reward, the sum of both, nothing")
    pair_weight: float = option(1.0, "of a pair's text half beside its image half [CoRL: lambda]")
    alternate: bool = option(False, "one task a step, in turns")
    normalise: Literal["sum", "each"] = option("sum", "add rewards, then normalise [LVRPO]; or each by itself, then add [CoRL's code]")
    advantage: Literal["group", "batch", "none"] = option("group", "whose std divides the centred reward: GRPO's, AlphaGRPO's, Dr. GRPO's")
    std: Literal["population", "unbiased"] = option("population", "divisor n (Flow-GRPO, AlphaGRPO) or n - 1 (TRL, CoRL)")
    adv_clamp: float = option(0.0, "bound of the advantage's size (AlphaGRPO: 5); 0: none")
    text_average: Literal["token", "sequence", "constant"] = option(
        "token", "what counts alike in the text loss: the step's tokens (DAPO), its texts (GRPO), tokens over N * longest (Dr. GRPO)")
    text_ratio: Literal["token", "sequence"] = option("token", "one importance ratio per token, or per text (GSPO)")
    text_clip: float = option(0.2, "clip range of the text ratio, below 1")
    text_clip_high: float = option(0.0, "clip range above 1 (DAPO: 0.28); 0: as --text_clip")
    text_delta: float = option(0.0, "cap of the unclipped text ratio (two-sided clipping); 0: none")
    text_beta: float = option(0.0, "weight of the k3 estimate of the KL to the reference, text")
    kl_correction: bool = option(False, "weigh k3 by the ratio (DeepSeek-V3.2)")
    image_weight: float = option(1.0, "of the image loss, its penalties included [UniGRPO Eq. 7: lambda]")
    image_clip: float = option(0.0, "clip range of a noisy step's ratio, below 1")
    image_clip_high: float = option(0.0, "clip range above 1; 0: as --image_clip")
    image_beta: float = option(0.0, "weight of the transition KL to the reference")
    mse_weight: float = option(0.0, "weight of |v - v_ref|^2 [UniGRPO Eq. 8]")
    mse_reduce: Literal["mean", "sum"] = option("mean", "how |v - v_ref|^2 is reduced over latent entries")
    density: Literal["mean", "sum"] = option("mean", "reduces a step's log-density over latent entries; clip ranges presume the mean")
    scaled: bool = option(True, "log-density with its variance and normaliser; else -(x - mean)^2, the score that Flow-CPS published")
    ratio_norm: bool = option(False, "RatioNorm [GRPO-Guard, UniGRPO Eq. 5]")
    step_weights: bool = option(False, "weigh noisy steps by 1/|dt| [GRPO-Guard]")
    epochs: int = option(1, "optimiser steps per batch", least=1)
    temperature: float = option(1.0, "of sampled text", above=0)
    guidance: float = option(1.0, "scale of text guidance in drawing; 1: none", least=1)
    guidance_in: Literal["both", "sampling"] = option(
        "both", "where guidance acts: in sampling and likelihood, or in sampling alone [CoRL's code], whose two policies then differ")
    denoise_steps: int = option(0, "K, calls of the velocity per image", least=1)
    shift: float = option(1.0, "of the time grid", above=0)
    noise_level: float = option(0.0, "of the noisy steps", above=0)
    sampler: Literal["sde", "cps", "dance"] = option("sde", "noise of Flow-GRPO, Flow-CPS or DanceGRPO")
    window: int = option(0, "W, noisy steps per image, in one run somewhere in window_low..window_high", least=1)
    window_low: int = option(0, "first step that may be noisy")
    window_high: int = option(0, "step before which the noise ends")
    shared_noise: bool = option(False, "one initial noise per group")
    resolution: int = option(0, "pixels per side", least=1)
    think_tokens: int = option(0, "most tokens of a thought", least=1)
    answer_tokens: int = option(0, "most tokens of an answer", least=1)
    system_prompt: bool = option(False, "BAGEL's think prompt before the user's")
    request: str = option("", "words behind a question that is to be answered in tags")
    experts: Literal["both", "understanding", "generation"] = option("both", "what is trained")
    lora: int = option(0, "rank of adapters, without which the policy is its own reference; 0: all weights, against a frozen copy")
    shard: bool = option(False, "FSDP2: weights, gradients and optimiser cut over the ranks")
    bf16: bool = option(False, "compute in bf16; what is trained stays fp32")
    checkpointing: bool = option(False, "compute activations again in the backward pass, block by block")
    lr_understanding: float = option(0.0, "AdamW's rate for the understanding expert")
    lr_generation: float = option(0.0, "AdamW's rate for the generation expert")
    weight_decay: float = option(0.0, "AdamW's")
    grad_clip: float = option(1.0, "most norm of the gradient", above=0)
    ema: float = option(0.95, "decay of the average of weights that is evaluated and exported")

    @property
    def penalised(self) -> bool:
        """Whether any penalty compares with the frozen policy."""
        return self.recipe != "control" and bool(self.text_beta or self.image_beta or self.mse_weight)

    @property
    def needs_reference(self) -> bool:
        return self.penalised or bool(self.weights.get("tim")) and self.tim_of == "reference"


def settings_of(recipe: str, scale: str) -> dict[str, tuple]:
    """What a recipe sets at a scale, (value, whose); its part for the scale wins."""
    column = RECIPES.get(recipe, RECIPES["lvrpo"])              # the control trains what the default recipe trains
    return {k: v for k, v in column.items() if k not in SCALES} | column.get(scale, {})


def parse(argv: list[str] | None = None) -> Config:
    """Command line -> Config. Later wins: Config's default, the scale, the recipe, the flag. Unknown names are refused."""
    ap = Arguments(description=__doc__.split("\n")[0], usage="%(prog)s [--FLAG VALUE ...]", allow_abbrev=False)
    ap.add_argument("--recipe", default="lvrpo", choices=[*RECIPES, "control", "pretrain"],
                    help="a method; or control, more pretraining; or pretrain, which makes the toy's weights")
    ap.add_argument("--scale", choices=[*SCALES], help="settings that depend on size; default: by the width of --policy")
    for name, task in TASKS.items():
        ap.add_argument(f"--{name}", type=int, help=task.help)
    for name, entry in rewards.REWARDS.items():
        ap.add_argument(f"--{name}", type=float, help=f"weight of {entry.help}")
    for f in fields(Config)[3:]:
        choices = get_args(f.type)                              # of a Literal
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(choices=choices) if choices else dict(type=f.type)
        ap.add_argument(f"--{f.name}", help=f.metadata["help"], **kind)
    given = {k: v for k, v in vars(ap.parse_args(argv)).items() if v is not None}
    if given["recipe"] == "pretrain":
        given.setdefault("out", str(TOY))
    sizes = Path(given.get("policy", Config.policy)) / "llm_config.json"
    scale = given.pop("scale", None) or scale_of(read_json(sizes, {}).get("hidden_size", 0))
    files = any(given.get(task.file) for task in TASKS.values())       # then a task without data is left out unless it is asked for
    without = {name: 0 for name, task in TASKS.items() if files and not given.get(task.file)}
    chosen = SCALES[scale] | {k: value for k, (value, _) in settings_of(given["recipe"], scale).items()} | without | given
    rows = {name: chosen.pop(name, 0) for name in TASKS}
    scoring = {reward for name in TASKS if rows[name] for reward in rewards_of(name)}
    weights = {name: chosen.pop(name, 0.0) if name in scoring or name in given else 0.0 for name in rewards.REWARDS}
    return Config(rows=rows, weights=weights, **{k: v for k, v in chosen.items() if k not in weights})


def resolved(cfg: Config) -> str:
    """What a run does, in a few lines: every setting that is not Config's default."""
    plain = {f.name: f.default for f in fields(Config)}
    flat = {**cfg.rows, **cfg.weights, **{k: v for k, v in asdict(cfg).items() if not isinstance(v, dict) and k != "recipe"}}
    told = [f"{k}={v}" for k, v in flat.items() if v != plain.get(k, 0)]
    return textwrap.fill(f"{cfg.recipe}: {' '.join(told)}", 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def recipe_table() -> str:
    """The recipes side by side, as README.md shows them: a row per switch that any of them sets. Behind a slash: at BAGEL's scale."""
    def cell(recipe: str, key: str) -> str:
        both = [settings_of(recipe, scale).get(key) for scale in SCALES]
        told = ["-" if s is None else f"{s[0]} ({s[1]})" for s in both]
        return " / ".join(dict.fromkeys(told))
    names = dict.fromkeys(k for recipe in RECIPES for scale in SCALES for k in settings_of(recipe, scale))
    order = [*TASKS, *rewards.REWARDS, *(f.name for f in fields(Config))]
    rows = [[f"`{k}`", *(cell(recipe, k) for recipe in RECIPES)] for k in sorted(names, key=order.index)]
    lines = [["switch", *RECIPES], ["---"] * (1 + len(RECIPES)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- the six phases ----


def act(policy: Policy, batch: Batch, cfg: Config) -> Rollout:
    """1. The batch's rollout, at most cfg.rollout_batch samples at once."""
    G, plan = len(batch.samples), TASKS[batch.task].plan
    size = max(1, cfg.rollout_batch // G) if cfg.rollout_batch else len(batch.rows)
    guidance = guidance_of(cfg)
    with precision(cfg, policy.device), gathered(policy, room_to_gather(policy.device)):
        drawn = [sample_plan(policy, plan(batch.rows[i:i + size], batch.choices), seed=cfg.seed, step=batch.step,
                             prompts=batch.index[i:i + size], G=G, first=batch.samples.start, guidance=guidance)
                 for i in range(0, len(batch.rows), size)]
        return join([unguided(policy, r) for r in drawn] if guidance and cfg.guidance_in == "sampling" else drawn)


def reward_phase(policy: Policy, batch: Batch, r: Rollout, run: Run) -> tuple[dict[str, Tensor], dict[str, float]]:
    """2. Score a rollout -> (rewards name -> (N,), what is logged beside them)."""
    samples = samples_of(policy, TASKS[batch.task], batch.rows, r)
    scoring = {k: run.rewards[k] for k in rewards_of(batch.task) if k in run.rewards}
    return rewards.score(scoring, samples), measured(batch.task, samples, run.source.detector, r.G, r.G == run.cfg.group_size)


def advantage_phase(acted: list[tuple], cfg: Config, ranks: Ranks) -> list[tuple[Tensor, dict]]:
    """3. (advantages (n,) of this rank's samples, statistics) of each batch, acted: (batch, rollout, rewards, ...). The i-th samples of a
    pair's two halves share one advantage: of the summed reward [CoRL's unify_reward], or the sum of both [its unify_advantage]."""
    weights = [{k: cfg.weights[k] for k in rewards_of_batch} for _, _, rewards_of_batch, *_ in acted]
    out = [compared(each[2], mine, cfg.rows[each[0].task], cfg, ranks) for each, mine in zip(acted, weights)]
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


def compared(components: dict[str, Tensor], weights: dict[str, float], count: int, cfg: Config, ranks: Ranks) -> tuple[Tensor, dict]:
    """Advantages (n,) of this rank's samples; the groups and their statistics are those of all ranks' `count` prompts."""
    G, each = cfg.group_size, cfg.normalise == "each"
    components = {k: ranks.groups(v.to(ranks.device), count, G).flatten() for k, v in components.items()}      # (N,) of all ranks
    summed = rewards.normalised(components, G, cfg.std) if each else components
    adv = group_advantage(rewards.combine(summed, weights), G, scale="none" if each else cfg.advantage, std=cfg.std,
                          clamp=cfg.adv_clamp or None)                                                         # (N,)
    reward = rewards.combine(components, weights)                                                              # (N,)
    groups = reward.view(-1, G)                                                                                # (B, G)
    stats = {"reward": reward.mean().item(), "reward_std": groups.std(1, correction=0).mean().item(),
             "frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean().item()}
    stats |= {f"rewards/{k}/mean": v.mean().item() for k, v in components.items()}
    stats |= {f"advantage_share/{k}": v for k, v in rewards.variance_share(summed, weights, G).items()}
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
        return loss, {f"text/{k}": float(v) for k, v in stats.items()}
    weights = flow_grpo.step_weights(s.flow.times, s.flow.window, normalise=True) if cfg.step_weights else None
    loss, stats = flow_grpo.flow_grpo_loss(
        scored.flow, s.flow, adv, total=totals["image"], low=cfg.image_clip, high=cfg.image_clip_high or cfg.image_clip,
        ratio_norm=cfg.ratio_norm, weights=weights, reference=None if reference is None else reference.flow, kl_beta=cfg.image_beta,
        mse_weight=cfg.mse_weight, mse_reduce=cfg.mse_reduce)
    return cfg.image_weight * loss, {f"image/{k}": float(v) for k, v in stats.items() if v.ndim == 0}


def update_phase(policy: Policy, frozen: Policy | None, optimizer, work: list[tuple[Batch, Rollout, Tensor]], cfg: Config,
                 ranks: Ranks) -> dict:
    """4. cfg.epochs optimiser steps on the rollouts. Micro-batches and ranks add up: each loss is divided by global counts."""
    pieces = pieces_of(policy, frozen, work, cfg, ranks)
    averaged = ranks.world if policy.sharded else 1             # FSDP2 averages the shards' gradients over ranks; ours add up
    for _ in range(cfg.epochs):
        optimizer.zero_grad()
        value, log = 0.0, {}                                    # log: name -> values of the micro-batches
        for task, piece, adv, totals, reference in pieces:
            loss = 0.0
            with precision(cfg, policy.device):
                scored_segments = replay_rollout(policy, piece)
            for scored, ref in zip(scored_segments, reference or [None] * len(scored_segments)):
                term, stats = segment_loss(scored, ref, adv, totals, cfg)
                loss = loss + term
                for k, v in stats.items():
                    log.setdefault(f"{task}/{k}", []).append(v)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the {task} loss is {loss.item()}")
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
        r = act(run.policy, batch, cfg)                                                                        # 1. act
        acted.append((batch, r, *reward_phase(run.policy, batch, r, run)))                                     # 2. reward
    for (batch, r, _, seen), (adv, group) in zip(acted, advantage_phase(acted, cfg, run.ranks)):               # 3. compare
        seen |= {"completions/mean_length": s.chosen.sum(1).float().mean().item() for s in chosen_texts(r)}
        seen = run.ranks.combined({k: [v] for k, v in seen.items()})
        stats |= {f"{batch.task}/{k}": v for k, v in (seen | group).items()}
        run.tell_silence(batch.task, group["frac_reward_zero_std"])
        run.work.append((batch, r, adv))
    if step == 0:
        stats |= {f"self_check/{k}": v for k, v in self_check(run.policy, run.work, cfg).items()}
    return stats | update_phase(run.policy, run.frozen, run.optimizer, run.work, cfg, run.ranks)                  # 4. improve


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


def guidance_of(cfg: Config) -> Guidance | None:
    return Guidance(text_scale=cfg.guidance) if cfg.guidance > 1 else None


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
    out, guidance = {}, guidance_of(cfg)
    for batch, r, _ in work:
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
    models, imitation = referees.Models(cfg, ranks.device, source.detector, states), None
    if cfg.recipe == "control":
        from toy.pretrain import Imitation
        imitation = Imitation(policy, cfg.seed, cfg.grad_clip)
    judges = {k: rewards.REWARDS[k].build(models) for k, w in cfg.weights.items() if w and not imitation}
    run = Run(cfg, ranks, policy, frozen, optimizer, Average(policy, cfg.ema), source, judges, imitation, log)
    if cfg.resume:
        run.start = load_checkpoint(Path(cfg.out), run_state(policy, run.average, optimizer))
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
        evaluation.plot([run.log.path], out / "curves.png")
        print(evaluation.summary(run.log.path))


def keep(run: Run, step: int, writer: int = 0) -> None:
    """6. Save the run's checkpoint; of equal ranks only `writer` writes."""
    save_checkpoint(Path(run.cfg.out), run_state(run.policy, run.average, run.optimizer), step, run.policy.sharded, run.ranks.rank, writer)


def main() -> None:
    with one_line("train.py"):
        if sys.argv[1:] == ["recipes"]:
            print(recipe_table())
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
