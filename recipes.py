"""What each method sets: RECIPES, a table with a column per method; the scales; every setting with its help; and the command line.

`python train.py recipes` prints the table. A run's settings come from Config's defaults, the scale, the recipe and its part for the scale,
and the flags, of which the later wins.
"""

import argparse
import math
import os
import textwrap
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch

import rewards
from policy import PolicyConfig
from rewards import REWARDS
from support.disk import read_json
from support.run import Ranks
from support.terminal import Arguments
from tasks import TASKS, in_use, rewards_of

WORLD = Path(__file__).parent / "toy"


# What each method sets, at both scales or (toy=, bagel=) at one; the rest is the scale's or Config's default. Behind a value stands whose
# it is: "p" the paper's; "o" ours, where the paper's is not known; "d" ours, which departs from the paper's, named behind it.
RECIPES = {
    "lvrpo": dict(
        draw=(24, "o"), think=(8, "o"), ask=(16, "o"), edit=(8, "o"),
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
        bagel=dict(pref=(1.0, "d: its own is not released"))),
    "unigrpo_rounds": dict(
        rounds=(16, "o"), accuracy=(1.0, "o"),
        text_average=("sequence", "p"), mse_weight=(2e-4, "d: 1.5e-5, mean or sum"), ratio_norm=(True, "p"),
        step_weights=(True, "d: none in Eq. 6"), epochs=(2, "p"),
        # One reward for two images is a noisier signal: at unigrpo's rate and penalty the toy drifts and forgets.
        toy=dict(ins=(1.0, "d: a preference model"), image_clip=(1e-3, "d: 1e-6, for more entries"), lr_understanding=(5e-5, "o"),
                 lr_generation=(2e-4, "o")),
        bagel=dict(pref=(1.0, "d: its own is not released"), segments=(True, "o"))),
    "alphagrpo": dict(
        think=(32, "p"), dvreward=(1.0, "p"), format=(1.0, "p"),
        advantage=("batch", "p"), adv_clamp=(5.0, "p"), text_ratio=("sequence", "p"), text_average=("sequence", "p"), text_clip=(0.2, "p"),
        text_clip_high=(0.28, "p"),
        toy=dict(image_weight=(300.0, "o"), step_weights=(True, "d: none"), lr_generation=(3e-4, "o")),
        bagel=dict(group_size=(14, "p"), lr_understanding=(5e-5, "p"), lr_generation=(5e-5, "p"), lora=(32, "p"), guidance=(4.0, "p"),
                   denoise_steps=(16, "p"), noise_level=(0.7, "p"), window=(10, "p"), window_high=(11, "p"), image_clip=(1e-5, "p"),
                   think_tokens=(1024, "p"), weight_decay=(1e-4, "p"))),
    "alphagrpo_reflect": dict(
        reflect=(32, "p"), dvreward=(1.0, "p"),
        advantage=("batch", "p"), adv_clamp=(5.0, "p"), text_ratio=("sequence", "p"), text_average=("sequence", "p"), text_clip=(0.2, "p"),
        text_clip_high=(0.28, "p"), rectify=("group", "p"), text_weight=(0.2, "p"),
        # Without a penalty the toy forgets to leave the rest of a picture as it is.
        toy=dict(image_weight=(300.0, "o"), image_beta=(0.003, "d: 0"), step_weights=(True, "d: none"), lr_generation=(2e-4, "o"),
                 steps=(75, "o")),
        bagel=dict(group_size=(14, "p"), lr_understanding=(5e-5, "p"), lr_generation=(5e-5, "p"), lora=(32, "p"), guidance=(4.0, "p"),
                   image_guidance=(2.0, "p"), denoise_steps=(40, "p"), noise_level=(0.7, "p"), window=(5, "p"), window_high=(15, "p"),
                   image_clip=(1e-5, "p"), think_tokens=(1024, "p"), weight_decay=(1e-4, "p"))),
    # Stage 1 of CoRL, then its three refined policies, each from what stage 1 wrote (--policy out/corl/policy).
    "corl": dict(
        pair_image=(16, "p"), pair_text=(16, "p"), pair=("joint", "p"), pair_weight=(0.8, "p"),
        recaption=(1.0, "p"), likeness=(1.0, "p"), tim=(1.0, "p"), accuracy=(1.0, "p"), format=(1.0, "p"),
        group_size=(8, "p"), std=("unbiased", "p"), text_average=("sequence", "p"), image_weight=(300.0, "o"), step_weights=(True, "o"),
        # Without a penalty, as in the paper, the toy's pictures collapse at lvrpo's rate and number of steps.
        toy=dict(pair_image=(48, "d: 16"), pair_text=(48, "d: 16"), lr_generation=(2.5e-4, "o")),
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
    "toy": dict(group_size=16, steps=100, lr_understanding=2e-4, lr_generation=5e-4, image_clip=1e-3, denoise_steps=6, shift=2.0,
                noise_level=0.8, sampler="cps", window=3, window_low=0, window_high=3, shared_noise=True, resolution=32,
                think_tokens=24, answer_tokens=4, referee_batch=512, request="think first"),
    "bagel": dict(group_size=24, lr_understanding=1e-6, lr_generation=3e-5, denoise_steps=25, shift=3.0, noise_level=0.8, sampler="sde",
                  window=3, window_low=0, window_high=5, resolution=512, think_tokens=256, answer_tokens=256, image_clip=1e-6, lora=64,
                  system_prompt=True, steps=1000, bf16=True, checkpointing=True, micro=4, rollout_batch=24, referee_batch=16,
                  referee_bf16=True, pref_model="yuvalkirstain/PickScore_v1",
                  request="First reason inside <think> </think> tags, then give the final answer inside <answer> </answer> tags.",
                  # The toy's referees are not for photographs, nor its rule for free captions.
                  siglip="google/siglip2-so400m-patch14-384", judge="google/paligemma2-3b-mix-448",
                  captioner="Salesforce/blip-image-captioning-base", recaption_by="bertscore",
                  detector="facebook/mask2former-swin-small-coco-instance"),
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
    policy: str = option(str(WORLD / "policy"), "the policy folder to start from")
    prompts: str = option("", "prompts: .jsonl with \"prompt\" (and GenEval's fields), or .txt; without any file: the toy world")
    questions: str = option("", "questions: .jsonl with \"image\" (a path), \"question\", \"answer\"")
    pairs: str = option("", "pairs: .jsonl with \"image\", \"caption\", \"question\", \"answer\", perhaps \"options\"")
    siglip: str = option(str(WORLD / "siglip"), "SigLIP of r_sem, r_dense: a folder or hub name for transformers, or open_clip (hf-hub:...)")
    edits: str = option("", "edits: .jsonl with \"image\", \"instruction\", perhaps \"caption\", GenEval's fields, questions")
    dv: str = option("", "questions of prompts for --dvreward: .jsonl of python -m referees.questions; else by rule from GenEval's fields")
    judge: str = option(str(WORLD / "judge"), "yes/no judge of r_kn and DVReward: a folder or hub name")
    captioner: str = option(str(WORLD / "captioner"), "BLIP captioner of --recaption: a folder or hub name")
    pref_model: str = option("", "preference model of --pref: a folder or hub name")
    pref_by: Literal["pickscore", "hpsv2", "hpsv3", "unified"] = option("pickscore", "how --pref_model is read")
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
    referee_device: str = option("", "device of reward models, such as cuda:1; default: the policy's")
    referee_bf16: bool = option(False, "reward models compute in bf16")
    train_referee: float = option(
        0.0, "AdamW's rate for a SigLIP that learns beside the policy, from its pictures and prompts; 0: frozen [LVRPO Fig. 4]")
    tifa_by: Literal["arithmetic", "geometric"] = option("arithmetic", "mean of a prompt's answers in --tifa")
    ins_by: Literal["graded", "all", "flow_grpo"] = option("graded", "r_ins is the fraction of rules kept, all or nothing, or Flow-GRPO's")
    detector: str = option("", "detector of r_ins in pictures of files: a Mask2Former, Grounding DINO or OWLv2, a folder or hub name")
    colors: str = option("openai/clip-vit-large-patch14", "CLIP that names their colours: a folder or hub name")
    open_answers: Literal["binary", "graded"] = option("binary", "accuracy of open answers: all or nothing, or shared words [CoRL's code]")
    recaption_by: Literal["tuples", "jaccard", "bertscore"] = option("tuples", "how a caption is held against the prompt")
    likeness_by: Literal["ssim", "psnr", "mse", "lpips"] = option("ssim", "how a drawn image is held against the real one")
    tim_of: Literal["reference", "policy"] = option("reference", "whose states --tim compares; those of the moving policy can be gamed")
    dv_by: Literal["geometric", "arithmetic", "pooled", "binary", "holistic"] = option(
        "geometric", "how DVReward adds answers up; holistic: one question about the whole prompt")
    instruction: Literal["neutral", "failed"] = option(
        "neutral", "what stands behind an image that is to be refined; failed: that it failed, whatever it is [AlphaGRPO's code]")
    initial: int = option(1, "first images per prompt of --reflect, of which the lowest in reward is refined", least=1)
    rectify: Literal["off", "group", "initial"] = option(
        "off", "what a refinement earns that does not improve: its reward, the group's least, the first image's [AlphaGRPO's code]")
    baseline: Literal["mean", "anchor"] = option(
        "mean", "what a refinement is compared with: the group's mean, or the better of it and the first image's reward, "
                "over the group's own spread whatever --advantage says [AlphaGRPO's code]")
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
    text_weight: float = option(
        1.0, "of the text loss beside the mean over image steps [AlphaGRPO adds these up, and weighs a text by their number: the same]")
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
    image_guidance: float = option(1.0, "scale of image guidance in drawing an image changed; needs --guidance", least=1)
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
    segments: bool = option(False, "replay and go backward segment by segment: slower, in the memory of one segment")
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
    out = {k: v for k, v in column.items() if k not in SCALES} | column.get(scale, {})
    known = {*TASKS, *rewards.REWARDS, *(f.name for f in fields(Config)[3:])}
    for k, v in out.items():
        if k not in known:
            raise ValueError(f"recipe {recipe} sets {k}, which is no task, reward or setting")
        if not (isinstance(v, tuple) and len(v) == 2):
            raise ValueError(f"recipe {recipe}: {k}={v!r} must be a pair of value and source, such as (0.5, \"o\")")
    return out


def parse(argv: list[str] | None = None) -> Config:
    """Command line -> Config. Later wins: Config's default, the scale, the recipe, the flag. Unknown names are refused."""
    ap = Arguments(description="GRPO for one policy that reads and writes text and images.", usage="%(prog)s [--FLAG VALUE ...]",
                   allow_abbrev=False)
    ap.add_argument("--recipe", default="lvrpo", choices=[*RECIPES, "control", "pretrain"],
                    help="a method; or control, more pretraining; or pretrain, which makes the toy's weights")
    ap.add_argument("--scale", choices=[*SCALES], help="settings that depend on size; default: by the width of --policy")
    flags = ["recipe", "scale", *TASKS, *rewards.REWARDS, *(f.name for f in fields(Config)[3:])]
    if twice := [name for name in flags if flags.count(name) > 1]:
        raise ValueError(f"--{twice[0]} is the name of two things; tasks, rewards and settings share one command line")
    for name, task in TASKS.items():
        ap.add_argument(f"--{name}", type=int, help=task.help.replace("%", "%%"))
    for name, entry in rewards.REWARDS.items():
        ap.add_argument(f"--{name}", type=float, help=f"weight of {entry.help.replace('%', '%%')}")
    for f in fields(Config)[3:]:
        choices = get_args(f.type)                              # of a Literal
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(choices=choices) if choices else dict(type=f.type)
        ap.add_argument(f"--{f.name}", help=f.metadata["help"], **kind)
    given = {k: v for k, v in vars(ap.parse_args(argv)).items() if v is not None}
    if given["recipe"] == "pretrain":
        given.setdefault("out", str(WORLD))
    sizes = Path(given.get("policy", Config.policy)) / "llm_config.json"
    scale = given.pop("scale", None) or PolicyConfig(read_json(sizes, {"hidden_size": 0}), {}).scale
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


def recipe_table(scale: str) -> str:
    """The recipes side by side at a scale, as README.md (toy) and docs/bagel.md show them: a row per switch that several of them set, and
    one of what each sets alone."""
    settings = {recipe: settings_of(recipe, scale) for recipe in RECIPES}
    order = [*TASKS, *rewards.REWARDS, *(f.name for f in fields(Config))]
    names = sorted({k for held in settings.values() for k in held}, key=order.index)
    alone = {k for k in names if sum(k in held for held in settings.values()) == 1}

    def cell(recipe: str, key: str) -> str:
        return "{} ({})".format(*settings[recipe][key]) if key in settings[recipe] else "-"

    own = [", ".join(f"`{k}` {cell(recipe, k)}" for k in names if k in alone and k in settings[recipe]) or "-" for recipe in RECIPES]
    rows = [[f"`{k}`", *(cell(recipe, k) for recipe in RECIPES)] for k in names if k not in alone]
    lines = [["switch", *RECIPES], ["---"] * (1 + len(RECIPES)), *rows, ["alone", *own]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- what cannot work ----


def refusals(cfg, ranks: Ranks):
    """(whether it is so, what is said of it), one by one: a refusal may presume that those above it are not so."""
    for f in fields(cfg):
        value, least, above = getattr(cfg, f.name), f.metadata.get("least"), f.metadata.get("above")
        yield f.type is float and not math.isfinite(value), f"--{f.name} {value}: must be a finite number"
        yield f.type in (int, float) and least is not None and value < least, f"--{f.name} {value}: must be at least {least}"
        yield above is not None and value <= above, f"--{f.name} {value}: must be above {above}"
        choices = get_args(f.type) if get_origin(f.type) is Literal else ()
        yield choices and value not in choices, f"--{f.name} {value}: must be one of {', '.join(map(str, choices))}"
    used = in_use(cfg)
    yield cfg.group_size < 2, f"--group_size {cfg.group_size}: a group needs at least 2 samples to compare"
    yield not used, f"nothing to learn from: {', '.join('--' + name for name in TASKS)} are all 0; give one rows and its file"
    for name, n in cfg.rows.items():
        cuts, less = ranks.cuts(n), n // ranks.world * ranks.world
        yield n < 0, f"--{name} {n}: must be at least 0"
        yield (n and not any(cfg.weights[k] for k in rewards_of(name)) and cfg.recipe != "control",
               f"--{name} has no reward: give one of {', '.join('--' + k for k in rewards_of(name)) or 'the rewards that read its samples'}"
               " a weight")
        yield (n and cfg.group_size % cuts, f"--{name} {n} prompts do not divide over {ranks.world} ranks; {f'{less} or ' if less else ''}"
               f"{less + ranks.world} would, or a --group_size that is a multiple of {cuts}")
        yield (n and cfg.experts == "generation" and not TASKS[name].draws,
               f"--{name} {n} rows teach the understanding expert, which --experts generation freezes; set --{name} 0")
    for k, w in cfg.weights.items():
        yield not math.isfinite(w), f"--{k} {w}: must be a finite number"
        reads = " or ".join(" and ".join(names) for names in REWARDS[k].reads)
        yield (w and not any(k in rewards_of(name) for name in used),
               f"--{k} {w} would score nothing: it reads {reads}, which no sample of {', '.join(used)} has")
    begun = [name for name in used if TASKS[name].begin]
    yield ((cfg.rectify != "off" or cfg.baseline != "mean") and not begun,
           f"--rectify {cfg.rectify} --baseline {cfg.baseline} are of refinements, and no task of this run refines; see --reflect")
    yield (bool(begun) and cfg.normalise == "each",
           f"--normalise each compares no refinement with its first image; set --{', --'.join(begun)} 0")
    yield cfg.initial > 1 and not begun, f"--initial {cfg.initial} is of first pictures that are refined; see --reflect"
    looks = begun or any(TASKS[name].rounds > 1 for name in used)
    yield cfg.instruction != "neutral" and not looks, f"--instruction {cfg.instruction} is of tasks that look at a picture; see --reflect"
    asks = cfg.weights["dvreward"] or cfg.weights["tifa"]
    yield bool(cfg.dv) and not asks, f"--dv {cfg.dv} is of --dvreward and --tifa, of which none has a weight"
    yield cfg.image_guidance > 1 and cfg.guidance <= 1, f"--image_guidance {cfg.image_guidance:g} acts under --guidance above 1 alone"
    yield (cfg.train_referee and not (cfg.weights["sem"] or cfg.weights["dense"]),
           f"--train_referee {cfg.train_referee} teaches the SigLIP, which no reward of this run asks; give --sem a weight")
    yield unknown_device(cfg.referee_device), f"--referee_device {cfg.referee_device}: no such device here; use cpu or cuda:N"
    yield cfg.train_referee and cfg.shard, "--train_referee keeps the SigLIP whole on every rank and does not go with --shard"
    yield cfg.train_referee and cfg.referee_bf16, "--train_referee trains in fp32; give --no-referee_bf16"
    halves = [name for name in used if TASKS[name].pair]
    yield (len({cfg.rows[name] for name in halves}) > 1,
           " and ".join(f"--{name} {cfg.rows[name]}" for name in halves) + " are halves of the same rows; give both one number, or one 0")
    yield (cfg.guidance_in == "sampling" and cfg.ratio_norm,
           "--ratio_norm compares means with those of the policy that drew; it does not go with --guidance_in sampling")
    yield cfg.shard and "RANK" not in os.environ, "--shard cuts the policy over ranks; start with torchrun"
    own = (Path(cfg.out) / "policy").resolve()
    yield Path(cfg.policy).resolve() == own, f"--policy {cfg.policy} is where this run would write its own policy; give another --out"
    yield cfg.sampler == "cps" and cfg.noise_level >= 2, f"--noise_level {cfg.noise_level}: must be below 2 for cps, else std is 0"
    yield cfg.ema >= 1, f"--ema {cfg.ema}: must be below 1, which would never move"
    yield (cfg.normalise == "each" and cfg.advantage != "group",
           f"--advantage {cfg.advantage} has no effect where --normalise each divides each reward by its group's std; leave one out")
    last = cfg.denoise_steps - (cfg.sampler == "cps")           # cps has no noise in its last step
    yield (not cfg.window_low + cfg.window <= cfg.window_high <= last,
           f"--window {cfg.window} in --window_low {cfg.window_low} to --window_high {cfg.window_high} does not fit in {last} noisy steps")


def unknown_device(name: str) -> bool:
    """Whether a device is named that is not here."""
    kind, _, number = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    return bool(name) and not (kind in ("cpu", "cuda") and (not number or number.isdigit()) and int(number or 0) < count)


def check(cfg, ranks: Ranks) -> None:
    """ValueError, in one line, for what cannot work, before anything is loaded."""
    for wrong, why in refusals(cfg, ranks):
        if wrong:
            raise ValueError(why)
