"""GRPO for one policy that reads and writes text and images: rollout, reward, advantage, update, log, keep.

    torchrun train.py                                           # lvrpo on the toy, from toy, minutes on a laptop
    torchrun train.py --recipe unigrpo --group_size 16 --out out/unigrpo
    torchrun --nproc_per_node=8 train.py --recipe unigrpo --policy BAGEL-7B-MoT --prompts prompts.jsonl
    torchrun train.py --recipe pretrain                         # makes everything in toy again

Plain `python train.py` is one process. Every random number derives from (seed, step, prompt, sample), so there is no generator state to
keep: a checkpoint is the weights, their average, the optimiser and the step, and a resumed run is the uninterrupted one, bit for bit.
Ranks share prompts, and groups where there are more ranks than prompts; losses are divided by global counts, so neither the ranks nor
the micro-batches change a gradient.

Legend: B prompts per step and task, G samples each, N = B*G prompt-major, L text positions, W noisy steps.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import eval as evaluation
import flow_grpo
import rewards
from checkpoint import (Average, gathered, load_checkpoint, load_policy, read_json, reset_adapters, run_state, save_adapters, save_checkpoint,
                        save_policy, save_tensors, shard, trainable, whole, write_atomic)
from grpo import group_advantage, grpo_loss
from policy import GENERATION, THINK_TO_DRAW, UNDERSTANDING, Policy, adapters_off, add_lora
from sample import (Arguments, Draw, Picture, Read, Rollout, See, Text, Write, images_of, join, open_picture, read_picture, replay, rollout,
                    save_grid, scale_of, select, texts_of, to_bytes)
from toy import shapes

ASSETS = Path(__file__).parent / "toy"

# One row a switch, one column a method: the paper's value where it is confirmed. (o): ours, where the paper's is not known;
# (d): ours, which departs from the paper's, named beside it.
METHODS = ("lvrpo", "unigrpo")
RECIPES = {
    "draw":             (24, 0),                 # prompts per step drawn at once                                     (o), -
    "think":            (8, 32),                 # prompts per step thought about, then drawn                         (o), 32
    "ask":              (16, 0),                 # questions per step                                                 (o), -
    "sem":              (1.0, 0.0),              # weight of r_sem, SigLIP cosine [LVRPO Eq. 5]                       (o), -
    "ins":              (1.0, 1.0),              # weight of r_ins of an image, rules on detections [LVRPO Eq. 7]     (o), (d) a preference model
    "accuracy":         (1.0, 1.0),              # weight of the right answer to a question: r_ins of a text          (o), -
    "kn":               (1.0, 0.0),              # weight of r_kn, yes/no confidence of the judge                     (o), -
    "dense":            (0.0, 0.0),              # weight of r_dense, max over patches per key phrase [LVRPO Eq. 12]  (o), -
    "format":           (0.0, 0.0),              # weight of the think tags of a thought [AlphaGRPO]                  -, -
    "graded":           (True, True),            # r_ins as the fraction of rules kept, else all-of                   (o), -
    "text_average":     ("token", "sequence"),   # unit that the text loss averages: DAPO's, or UniGRPO's Eq. 2       (o), sequence
    "text_clip":        (0.2, 0.2),              # token ratio clip                                                   (o), (o)
    "text_beta":        (0.02, 0.0),             # weight of k3 to the reference                                      (o), 0
    "image_weight":     (300.0, 1.0),            # of the image loss, its penalties included [UniGRPO Eq. 7: lambda]  (o), 1
    "image_clip":       (1e-3, 1e-3),            # ratio clip of a noisy step, log-density averaged over entries      (o), (d) 1e-6, for more entries
    "image_beta":       (0.003, 0.0),            # weight of the transition KL to the reference                       (o), 0
    "mse_weight":       (0.0, 5e-5),             # weight of |v - v_ref|^2, averaged over entries                     (o), (d) 1.5e-5, mean or sum
    "ratio_norm":       (False, True),           # RatioNorm [UniGRPO Eq. 5]                                          (o), yes
    "step_weights":     (True, True),            # 1/|dt| per noisy step, mean 1 [GRPO-Guard, beside RatioNorm]       (o), (d) none in Eq. 6
    "epochs":           (2, 2),                  # updates per batch                                                  (o), 2
    "lr_understanding": (2e-4, 5e-5),            # on the toy; unigrpo holds thoughts by nothing else                 (o), (o)
    "steps":            (150, 125),              # batches of rollouts on the toy                                     (o), (o)
}

# What depends on size. The toy's values are ours, measured: CPS noise and one initial noise per group among them, where UniGRPO has the
# SDE. BAGEL's are UniGRPO's Table 3 but for the resolution (there 1024), the reward, mse_weight and step_weights; what lvrpo
# weighs was found on the toy.
SCALES = {
    "toy": dict(group_size=16, lr_generation=5e-4, denoise_steps=6, shift=2.0, noise_level=0.8, sampler="cps",
                window=3, window_low=0, window_high=3, shared_noise=True, resolution=32, think_tokens=24, answer_tokens=4,
                lora=0, system_prompt=False, referee_batch=512),
    "bagel": dict(group_size=24, lr_understanding=1e-6, lr_generation=3e-5, denoise_steps=25, shift=3.0, noise_level=0.8, sampler="sde",
                  window=3, window_low=0, window_high=5, shared_noise=False, resolution=512, think_tokens=256, answer_tokens=256,
                  image_clip=1e-6, lora=64, system_prompt=True, steps=1000, bf16=True, checkpointing=True, micro=4, rollout_batch=24,
                  referee_batch=16,
                  # The toy's detector is not for photographs, and its referees are not either.
                  ins=0.0, sem=1.0, siglip="google/siglip2-so400m-patch14-384", judge="google/paligemma2-3b-mix-448"),
}


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Counts of prompts are global: ranks share them.

    The control reads policy, out, resume, seed, steps, eval_every, save_every, what is trained and how it is kept (experts, lora, shard,
    bf16, checkpointing, learning rates, weight_decay, grad_clip, ema); the rest must be valid and does nothing.
    """

    recipe: str                 # a method of RECIPES, or pretrain, or control
    policy: str = str(ASSETS / "policy")
    prompts: str = ""           # JSONL with "prompt" (and GenEval's fields), or plain text; empty: the toy world
    questions: str = ""         # JSONL with "image" (path), "question", "answer"; empty: the toy world
    siglip: str = str(ASSETS / "siglip")    # a folder or hub name for transformers, or for open_clip ("hf-hub:owner/name")
    judge: str = str(ASSETS / "judge")
    out: str = "out"
    resume: bool = False        # go on from the checkpoint in out
    seed: int = 0
    steps: int = 0              # optimisation steps = batches of rollouts
    eval_every: int = 50        # 0: no evaluation, and so no curves.png and before_after.png
    save_every: int = 50
    micro: int = 0              # samples per micro-batch of an update, at least one; 0: all at once
    rollout_batch: int = 0      # samples drawn at once, in whole groups of a rank; 0: all
    referee_batch: int = 0      # samples that a referee scores at once
    group_size: int = 0         # G
    draw: int = 0
    think: int = 0
    ask: int = 0
    sem: float = 0.0
    ins: float = 0.0
    accuracy: float = 0.0
    kn: float = 0.0
    dense: float = 0.0
    format: float = 0.0
    graded: bool = True
    normalise: Literal["sum", "each"] = "sum"   # sum: components are added, then normalised; each: normalised by group, added, without --advantage
    advantage: Literal["group", "batch", "none"] = "group"      # whose spread divides
    text_average: Literal["token", "sequence"] = "token"    # token: the step's tokens weigh alike; sequence: its texts do
    text_clip: float = 0.0
    text_beta: float = 0.0
    image_weight: float = 1.0
    image_clip: float = 0.0
    image_beta: float = 0.0
    mse_weight: float = 0.0
    ratio_norm: bool = False
    step_weights: bool = False
    epochs: int = 1
    temperature: float = 1.0    # of sampled text
    denoise_steps: int = 0      # K
    shift: float = 1.0
    noise_level: float = 0.0
    sampler: Literal["sde", "cps", "dance"] = "sde"
    window: int = 0             # W noisy steps, somewhere in window_low..window_high
    window_low: int = 0
    window_high: int = 0
    shared_noise: bool = False  # one initial noise per group
    resolution: int = 0         # pixels per side
    think_tokens: int = 0
    answer_tokens: int = 0
    system_prompt: bool = False  # BAGEL's think prompt before the user's
    experts: Literal["both", "understanding", "generation"] = "both"    # what is trained
    lora: int = 0               # rank of adapters, whose absence is the reference; 0 trains all weights against a frozen copy
    shard: bool = False         # FSDP2: weights, gradients and optimiser cut over the ranks
    bf16: bool = False          # compute in bf16; what is trained stays fp32
    checkpointing: bool = False  # compute activations again in the backward pass, block by block
    lr_understanding: float = 0.0
    lr_generation: float = 0.0
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema: float = 0.95           # of the weights that are evaluated and exported


def parse(argv: list[str] | None = None) -> Config:
    """Command line -> Config: recipe column, then scale, then what was given. Unknown names are refused."""
    ap = Arguments(description=__doc__.split("\n")[0], allow_abbrev=False)
    ap.add_argument("--recipe", default="lvrpo", choices=[*METHODS, "control", "pretrain"])
    ap.add_argument("--scale", choices=[*SCALES], help="default: by the width of --policy")
    for f in fields(Config)[1:]:
        choices = get_args(f.type)                              # of a Literal
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(choices=choices) if choices else dict(type=f.type)
        ap.add_argument(f"--{f.name}", **kind)
    given = {k: v for k, v in vars(ap.parse_args(argv)).items() if v is not None}
    if given["recipe"] == "pretrain":
        given.setdefault("out", str(ASSETS))
    sizes = Path(given.get("policy", Config.policy)) / "llm_config.json"
    scale = given.pop("scale", None) or scale_of(read_json(sizes, {}).get("hidden_size", 0))
    if given.get("prompts") or given.get("questions"):          # a task without data is left out unless it is asked for
        for task in ("draw", "think", "ask"):
            if not given.get("questions" if task == "ask" else "prompts"):
                given.setdefault(task, 0)
    column = METHODS.index(given["recipe"]) if given["recipe"] in METHODS else 0
    return Config(**({k: row[column] for k, row in RECIPES.items()} | SCALES[scale] | given))


# ---- ranks ----


@dataclass(frozen=True)
class Ranks:
    """This process among its peers: one rank of one process, or torchrun's."""

    rank: int
    world: int
    device: torch.device

    def total(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place; x itself where there is one."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate equal-sized x of all ranks in rank order."""
        if self.world == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def share(self, count: int) -> tuple[int, int]:
        """Into how many parts prompts are dealt, and into how many each group is; their product is the number of ranks."""
        parts = math.gcd(count, self.world)
        return parts, self.world // parts

    def groups(self, x: Tensor, count: int, G: int) -> Tensor:
        """x (n,) of the samples of each rank -> (count, G) of all."""
        parts, cuts = self.share(count)
        return self.gather(x).view(parts, cuts, count // parts, G // cuts).transpose(1, 2).reshape(count, G)

    def own(self, x: Tensor) -> Tensor:
        """The inverse: x (count, G) of all samples -> (n,) of this rank's."""
        count, G = x.shape
        parts, cuts = self.share(count)
        return x.view(parts, count // parts, cuts, G // cuts)[self.rank // cuts, :, self.rank % cuts].flatten()


def setup() -> Ranks:
    """Read torchrun's environment; nccl where there are GPUs, else gloo."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return Ranks(rank, world, device)


# ---- tasks: what is asked of the policy ----


@dataclass(frozen=True)
class Batch:
    """One task's prompts on this rank. Lists have one entry per prompt."""

    task: str                   # draw | think | ask
    step: int
    plan: list
    metadata: list[dict]
    prompts: list[str]
    index: list[int]            # of each prompt among the step's, over all ranks and tasks; seeds the samples
    samples: range              # of each group, on this rank
    sources: Tensor | None = None    # (B, 3, H, W) in [0, 1], the image of a question
    answers: list[str] | None = None


class Tasks:
    """Where prompts and questions come from: the toy world, or files."""

    def __init__(self, cfg: Config, policy: Policy):
        self.cfg, self.policy = cfg, policy
        self.toy = not (cfg.prompts or cfg.questions)
        if self.toy:
            self.pools = {"draw": shapes.prompts("train"), "think": shapes.implicit_prompts("train")}
        else:
            lines = read_prompts(cfg.prompts) if cfg.prompts else []
            self.pools = {"draw": lines, "think": lines}
            self.asked = read_questions(cfg.questions) if cfg.questions else []
        side, most = policy.config.stride, policy.config.stride * policy.config.bagel["max_latent_size"]
        fits = cfg.resolution == shapes.SIZE if self.toy else cfg.resolution % side == 0 and cfg.resolution <= most
        if (cfg.draw or cfg.think) and not fits:
            right = f"{shapes.SIZE}, the toy world" if self.toy else f"a multiple of {side} up to {most}"
            raise ValueError(f"--resolution {cfg.resolution}: must be {right}")
        if not self.toy and cfg.ins and (cfg.draw or cfg.think):
            raise ValueError("--ins on images needs the toy's detector; with --prompts set --ins 0 and use --sem or --kn")
        for task in ("draw", "think"):
            if getattr(cfg, task) and not self.pools[task]:
                raise ValueError(f"--{task} {getattr(cfg, task)} needs --prompts; or set --{task} 0")
            if not self.toy and self.pools[task]:
                policy.encode_text([m["prompt"] for m in self.pools[task]], room=cfg.think_tokens)             # too long a prompt is an error
        if cfg.ask and not self.toy and not self.asked:
            raise ValueError(f"--ask {cfg.ask} needs --questions; or set --ask 0")
        if cfg.ask and not self.toy:
            policy.encode_text([row["question"] for row in self.asked], room=cfg.answer_tokens)
            for path in dict.fromkeys(row["image"] for row in self.asked):
                open_picture(path, verify=True)                 # not in the middle of a run

    def choose(self, task: str, step: int) -> list[dict]:
        """The step's prompts of a task, from (seed, step) alone: tags in turn, then one of the tag."""
        rng = np.random.default_rng((self.cfg.seed, step, ("draw", "think").index(task)))
        by_tag: dict[str, list] = {}
        for m in self.pools[task]:
            by_tag.setdefault(m.get("tag", ""), []).append(m)
        tags = [tag for _ in range(getattr(self.cfg, task)) for tag in by_tag]
        return [shapes.pick(rng, by_tag[tag]) for tag in rng.permutation(tags)[:getattr(self.cfg, task)]]

    def batches(self, step: int, ranks: Ranks) -> list[Batch]:
        """This rank's share of the step's prompts, one Batch per task in use."""
        cfg, out, first = self.cfg, [], 0
        window = flow_grpo.draw_window(cfg.window, cfg.window_low, cfg.window_high, seed=cfg.seed, step=step)
        for task in ("draw", "think", "ask"):
            count = getattr(cfg, task)
            parts, cuts = ranks.share(count)
            part, cut, size = ranks.rank // cuts, ranks.rank % cuts, cfg.group_size // cuts
            mine, samples = range(part * count // parts, (part + 1) * count // parts), range(cut * size, (cut + 1) * size)
            index = [first + i for i in mine]
            first += count
            if task == "ask" and count:
                out.append(self.questions(step, list(mine), index, samples))
            elif count:
                metadata = [self.choose(task, step)[i] for i in mine]
                prompts = [m["prompt"] for m in metadata]
                out.append(Batch(task, step, self.plan(task, prompts, window), metadata, prompts, index, samples))
        return out

    def plan(self, task: str, prompts: list[str], window: tuple[int, int]) -> list:
        """What a trajectory of draw or think is made of."""
        cfg = self.cfg
        system = [Read([THINK_TO_DRAW] * len(prompts))] * (task == "think" and cfg.system_prompt)
        thought = [Write(cfg.think_tokens, cfg.temperature)] * (task == "think")
        return [*system, Read(prompts), *thought, Draw((cfg.resolution, cfg.resolution), flow_grpo.time_grid(cfg.denoise_steps, cfg.shift),
                                                       window, cfg.noise_level, cfg.sampler, cfg.shared_noise)]

    def questions(self, step: int, mine: list[int], index: list[int], samples: range) -> Batch:
        """The step's questions that `mine` counts off: scenes of the toy world drawn from (seed, step, question), or rows of the file."""
        if self.toy:
            drawn = []
            for i in mine:
                rng = np.random.default_rng((self.cfg.seed, step, 2, i))
                scene = shapes.random_scene(rng)
                drawn.append((scene, shapes.make_question(scene, rng)))
            pixels = evaluation.rendered([scene for scene, _ in drawn])
            sources, rows = pixels * 0.5 + 0.5, [q for _, q in drawn]
        else:
            rng = np.random.default_rng((self.cfg.seed, step, 2))
            rows = [self.asked[i] for i in rng.choice(len(self.asked), self.cfg.ask, replace=len(self.asked) < self.cfg.ask)[mine]]
            pixels = [read_picture(row["image"], self.policy)[0] for row in rows]
            # Of one size, since a judge squashes every image to its own square anyway.
            sources = torch.cat([F.interpolate(p[None] * 0.5 + 0.5, (448, 448), mode="bicubic", antialias=True) for p in pixels]).clamp(0, 1)
        texts = [row["question"] for row in rows]
        plan = [See(pixels), Read(texts), Write(self.cfg.answer_tokens, self.cfg.temperature)]
        metadata = [{"tag": row.get("kind", ""), "include": []} for row in rows]
        return Batch("ask", step, plan, metadata, texts, index, samples, sources, [row["answer"] for row in rows])


def read_lines(path: str) -> list[tuple[int, str]]:
    """(number from 1, line) of a UTF-8 file's lines that are not blank; ValueError where there are none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"file {path} does not exist")
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")             # str.splitlines would cut at U+2028 too
    except UnicodeDecodeError as error:
        raise ValueError(f"file {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not any(line.strip() for line in lines):
        raise ValueError(f"file {path} is empty; it must hold one entry a line")
    return [(i, line) for i, line in enumerate(lines, 1) if line.strip()]


def read_json_lines(path: str, needed: tuple[str, ...]) -> list[dict]:
    """JSON objects, one a line, each with the needed string fields; errors name file and line."""
    rows = []
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not a JSON object ({getattr(error, 'msg', error)}); each line must be one") from error
        if not isinstance(row, dict) or (missing := [k for k in needed if not isinstance(row.get(k), str)]):
            raise ValueError(f"{path}:{number}: must be an object with the text fields {list(needed)}"
                             + (f", lacks {missing}" if isinstance(row, dict) else ""))
        if any("\ud800" <= c <= "\udfff" for k in needed for c in row[k]):
            raise ValueError(f"{path}:{number}: holds half of a surrogate pair, which is no text")
        rows.append(row)
    return rows


def read_prompts(path: str) -> list[dict]:
    """Prompts as metadata: JSON lines of GenEval's format (a .jsonl file, or a first line that opens an object), or plain text."""
    if path.endswith(".jsonl") or any(line.lstrip().startswith("{") for _, line in read_lines(path)[:1]):
        rows = [{"tag": "", "include": [], **row} for row in read_json_lines(path, ("prompt",))]
        for row in rows:
            objects = row["include"] if isinstance(row["include"], list) else [None]
            if not isinstance(row["tag"], str) or not all(isinstance(c, dict) and "class" in c for c in objects):
                raise ValueError(f"{path}: prompt {row['prompt'][:60]!r}: tag must be text and include a list of objects with a class")
        return rows
    return [{"tag": "", "include": [], "prompt": line.strip()} for _, line in read_lines(path)]


def read_questions(path: str) -> list[dict]:
    """Rows image, question, answer; image paths are relative to the file."""
    rows = [{**row, "image": str(Path(path).parent / row["image"])} for row in read_json_lines(path, ("image", "question", "answer"))]
    if gone := [row["image"] for row in rows if not Path(row["image"]).is_file()]:
        raise FileNotFoundError(f"{path}: {len(gone)} images do not exist: {gone[:3]}")
    return rows


# ---- the six phases ----

TASK_REWARDS = {"draw": ("sem", "ins", "kn", "dense"), "think": ("sem", "ins", "kn", "dense", "format"), "ask": ("accuracy", "kn")}


def reward_weights(cfg: Config) -> dict[str, float]:
    """Name of a reward -> its weight; 0 leaves it out."""
    return dict(sem=cfg.sem, ins=cfg.ins, accuracy=cfg.accuracy, kn=cfg.kn, dense=cfg.dense, format=cfg.format)


def referees(cfg: Config, device) -> dict[str, rewards.Reward]:
    """The frozen reward models that this run's weights ask for."""
    out = {}
    if (cfg.sem or cfg.dense) and (cfg.draw or cfg.think):
        open_clip = cfg.siglip.startswith("hf-hub:") or any(Path(cfg.siglip).glob("open_clip_*.safetensors"))
        if open_clip and cfg.dense:
            raise ValueError(f"--dense reads patches, which open_clip's {cfg.siglip} does not give; use transformers' SigLIP, or --dense 0")
        load = rewards.load_open_clip if open_clip else rewards.load_siglip
        encoder = load(cfg.siglip, device=device, batch_size=cfg.referee_batch)
        out |= {"sem": rewards.Semantic(encoder)} if cfg.sem else {}
        out |= {"dense": rewards.Dense(encoder)} if cfg.dense else {}
    if cfg.kn:
        out["kn"] = rewards.Knowledge(rewards.load_judge(cfg.judge, device=device, batch_size=cfg.referee_batch))
    return out


def act(policy: Policy, batch: Batch, cfg: Config) -> Rollout:
    """The batch's rollout, at most cfg.rollout_batch samples at once."""
    G, parts = len(batch.samples), []
    size = max(1, cfg.rollout_batch // G) if cfg.rollout_batch else len(batch.index)
    with compute(cfg, policy.device), gathered(policy, spare(policy.device)):
        for i in range(0, len(batch.index), size):
            pick = lambda x: x if x is None else x[i:i + size]
            plan = [replace(s, texts=pick(s.texts)) if isinstance(s, Read) else See(pick(s.pixels), pick(s.source)) if isinstance(s, See) else s
                    for s in batch.plan]
            parts.append(rollout(policy, plan, seed=cfg.seed, step=batch.step, prompts=batch.index[i:i + size], G=G, first=batch.samples.start))
    return join(parts)


def compute(cfg: Config, device: torch.device):
    """bf16 autocast where it is asked for: of the policy's own calls, not of losses and rewards."""
    return torch.autocast(device.type, torch.bfloat16) if cfg.bf16 else contextlib.nullcontext()


def spare(device: torch.device) -> float | None:
    """Bytes that a rollout may spend on keeping a sharded policy whole: half of what is free on the GPU, or held by PyTorch without
    use; any number on a CPU."""
    if device.type != "cuda":
        return None
    return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / 2


def reward_phase(policy: Policy, batch: Batch, r: Rollout, judges: dict, cfg: Config, toy: bool) -> tuple[dict, dict]:
    """Score a rollout -> (components name -> (N,), what to log beside them)."""
    each = lambda rows: [row for row in rows for _ in range(r.G)]
    images = images_of(policy, r)
    samples = rewards.Samples(each(batch.prompts), each(batch.metadata), texts_of(policy, r), images,
                              None if batch.sources is None else batch.sources.repeat_interleave(r.G, 0).to(policy.device),
                              each(batch.answers) if batch.answers else None)
    look, table = {}, {k: judges[k] for k in TASK_REWARDS[batch.task] if k in judges}
    if batch.task == "ask":
        table["accuracy"] = rewards.answer_accuracy
    elif toy:
        found = evaluation.detector(images)
        table["ins"] = rewards.Instruction(lambda _: found, cfg.graded)
        look = {"truth": evaluation.truth(samples.metadata, found).mean().item()}
        if r.G == cfg.group_size:                               # a rank that draws a piece of each group cannot say how they vary
            look |= shapes.diversity(to_bytes(images), found, r.G)
    if cfg.format and batch.task == "think":
        table["format"] = lambda samples: rewards.think_format(samples, answer=False)
    components = rewards.score(table, samples)
    if batch.task == "ask":
        look = {"truth": components["accuracy"].mean().item()}
    return components, look


def advantage_phase(components: dict[str, Tensor], count: int, cfg: Config, ranks: Ranks) -> tuple[Tensor, dict]:
    """Advantages (n,) of this rank's samples; the groups and their statistics are those of all ranks' `count` prompts."""
    G, weights, each = cfg.group_size, {k: reward_weights(cfg)[k] for k in components}, cfg.normalise == "each"
    components = {k: ranks.groups(v.to(ranks.device), count, G).flatten() for k, v in components.items()}      # (N,) of all ranks
    parts = rewards.normalised(components, G) if each else components
    adv = group_advantage(rewards.combine(parts, weights), G, scale="none" if each else cfg.advantage)         # (N,)
    reward = rewards.combine(components, weights)                                                              # (N,)
    groups = reward.view(-1, G)                                                                                # (B, G)
    stats = {"reward": reward.mean().item(), "reward_std": groups.std(1, correction=0).mean().item(),
             "frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean().item()}
    stats |= {f"rewards/{k}/mean": v.mean().item() for k, v in components.items()}
    stats |= {f"advantage_share/{k}": v for k, v in rewards.variance_share(parts, weights, G).items()}
    return ranks.own(adv.view(count, G)), stats


def needs_reference(cfg: Config) -> bool:
    """Whether any penalty compares with the frozen policy."""
    return cfg.recipe != "control" and bool(cfg.text_beta or cfg.image_beta or cfg.mse_weight)


def reference_of(policy: Policy, frozen: Policy | None):
    """A context that gives the reference policy: a frozen copy, or the policy itself with its adapters off."""
    return adapters_off(policy) if frozen is None else contextlib.nullcontext(frozen)


def segment_loss(scored, reference, adv: Tensor, totals: dict, cfg: Config) -> tuple[Tensor, dict]:
    """Loss of one chosen segment, a scalar, and its stats, named text/... or image/...

    adv (N,); totals {"text", "image"}: what `counts` gives for the task's whole step, all ranks and micro-batches together, so that
    every task weighs alike whatever its number of prompts.
    """
    s = scored.segment
    if isinstance(s, Text):
        loss, stats = grpo_loss(scored.logp, s.logp, adv, s.chosen, total=totals["text"], per=cfg.text_average, low=cfg.text_clip,
                                high=cfg.text_clip, beta=cfg.text_beta, logp_ref=None if reference is None else reference.logp)
        return loss, {f"text/{k}": float(v) for k, v in stats.items()}
    weights = flow_grpo.step_weights(s.flow.times, s.flow.window, normalise=True) if cfg.step_weights else None
    loss, stats = flow_grpo.flow_grpo_loss(
        scored.flow, s.flow, adv, total=totals["image"], low=cfg.image_clip, high=cfg.image_clip, ratio_norm=cfg.ratio_norm,
        weights=weights, reference=None if reference is None else reference.flow, kl_beta=cfg.image_beta, mse_weight=cfg.mse_weight)
    return cfg.image_weight * loss, {f"image/{k}": float(v) for k, v in stats.items() if v.ndim == 0}


def counts(r: Rollout, per: str) -> Tensor:
    """(2,) of a rollout: sampled text tokens (per="token") or texts ("sequence"), and noisy image steps; what its losses are averaged over."""
    chosen = [s.chosen for s in r.segments if isinstance(s, Text) and s.chosen is not None]
    text = sum(int(c.sum()) if per == "token" else len(c) for c in chosen)
    image = sum(s.flow.logp.numel() for s in r.segments if isinstance(s, Picture) and s.flow is not None)
    return torch.tensor([text, image], dtype=torch.float64)


def micro_batches(r: Rollout, size: int) -> list[tuple[Rollout, list[int]]]:
    """Parts of a rollout and their rows: whole groups while `size` samples hold one, else pieces of a group; 0 is one part."""
    prompts, samples = (r.B, r.G) if not size else (size // r.G, r.G) if size >= r.G else (1, size)
    cuts = [(range(i, min(i + prompts, r.B)), range(g, min(g + samples, r.G))) for i in range(0, r.B, prompts) for g in range(0, r.G, samples)]
    return [(select(r, p, s), [i * r.G + g for i in p for g in s]) for p, s in cuts]


def update_phase(policy: Policy, frozen: Policy | None, optimizer, work: list[tuple[Batch, Rollout, Tensor]], cfg: Config,
                 ranks: Ranks) -> dict:
    """cfg.epochs optimiser steps on the rollouts. Micro-batches and ranks add up: each loss is divided by global counts."""
    parts, log = [], {}                                         # log: name -> values of the last epoch's micro-batches
    for batch, r, adv in work:
        text, image = ranks.total(counts(r, cfg.text_average).to(ranks.device)).tolist()
        for part, rows in micro_batches(r, cfg.micro):
            reference = itertools.repeat(None)
            if needs_reference(cfg):
                with torch.no_grad(), compute(cfg, policy.device), reference_of(policy, frozen) as ref:
                    reference = replay(ref, part)
            parts.append((batch.task, part, adv[rows], dict(text=text, image=image), reference))
    averaged = ranks.world if policy.sharded else 1             # FSDP2 averages the shards' gradients over ranks; ours add up
    for _ in range(cfg.epochs):
        optimizer.zero_grad()
        value, log = 0.0, {}
        for task, part, adv, totals, reference in parts:
            loss = 0.0
            with compute(cfg, policy.device):
                scored_segments = replay(policy, part)
            for scored, ref in zip(scored_segments, reference):
                piece, stats = segment_loss(scored, ref, adv, totals, cfg)
                loss = loss + piece
                for k, v in stats.items():
                    log.setdefault(f"{task}/{k}", []).append(v)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the {task} loss is {loss.item()}")
            (averaged * loss).backward()
            value += loss.item()
        norm = clip(optimizer, cfg.grad_clip, ranks, averaged)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm.item()}")
        optimizer.step()
    out = over_ranks(log, ranks)
    return out | {"loss": ranks.total(torch.tensor(value, dtype=torch.float64, device=ranks.device)).item(), "grad_norm": norm.item()}


def clip(optimizer, most: float, ranks: Ranks, averaged: int) -> Tensor:
    """Add the gradients of all ranks up where FSDP2 has not, clip their common norm to `most` and return what it was."""
    groups = [g["params"] for g in optimizer.param_groups]
    for p in (p for params in groups for p in params):          # zeros, so that every rank has the same list
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if not isinstance(p, DTensor):
            ranks.total(p.grad).div_(averaged)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in params])) for params in groups]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for params in groups:
        nn.utils.clip_grads_with_norm_(params, most, norm)
    return norm


def over_ranks(log: dict[str, list[float]], ranks: Ranks) -> dict[str, float]:
    """One number per name: the mean over micro-batches and ranks, or the least and largest where the name says min or max."""
    one = lambda k, v: v.min() if k.endswith("min") else v.max() if k.endswith("max") else v.mean()
    mine = torch.tensor([[one(k, np.array(v)) for k, v in log.items()]], dtype=torch.float64, device=ranks.device)
    everyone = ranks.gather(mine)                                                                              # (ranks, names)
    return {k: one(k, everyone[:, i]).item() for i, k in enumerate(log)}


@torch.no_grad()
def self_check(policy: Policy, work: list, cfg: Config) -> dict:
    """Before any update: max |logp_replay - logp_rollout| of text and image. Above the clip range it would act as noise; far above it
    the two paths are different functions."""
    out = {}
    for batch, r, _ in work:
        with compute(cfg, policy.device):
            scored_segments = [s for part, _ in micro_batches(r, cfg.micro) for s in replay(policy, part)]
        for scored in scored_segments:
            s, name = scored.segment, f"{batch.task}/{'text' if isinstance(scored.segment, Text) else 'image'}"
            gap = (scored.logp - s.logp if scored.logp is not None else scored.flow.logp - s.flow.logp).abs().max().item()
            clip = cfg.text_clip if scored.logp is not None else cfg.image_clip
            out[name] = max(gap, out.get(name, 0.0))
            if gap > max(10 * clip, 0.05):
                raise ValueError(f"self-check: replay and rollout log-probs of {name} differ by {gap:.2g} before any update; "
                                   "they must be one function")
            if gap > clip:
                tqdm.write(f"warning: {name} log-probs differ by {gap:.2g} before any update, beyond the clip range {clip:g}")
    return out


# ---- what is kept ----


def set_aside(out: Path) -> None:
    """Move the log and the checkpoints of an older run into a folder of their own, so that nothing of it is lost or resumed by mistake."""
    names = [n for n in ("log.jsonl", "checkpoint.safetensors", "checkpoint", "checkpoint.old") if (out / n).exists()]
    if names:
        folder = next(f for i in itertools.count(1) if not (f := out / f"previous{i if i > 1 else ''}").exists())
        folder.mkdir()
        for name in names:
            (out / name).rename(folder / name)


class Log:
    """out/log.jsonl, one JSON object a line; the first tells what ran. Only rank 0 writes. A resumed run goes on in the same file;
    a run that starts anew first moves an older run's log and checkpoint into out/previous (out/previous2, ...)."""

    def __init__(self, cfg: Config, ranks: Ranks, begun: int):
        self.path, self.active, self.started, self.evaluated = Path(cfg.out) / "log.jsonl", ranks.rank == 0, time.time(), set()
        if not self.active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if not cfg.resume:
            set_aside(self.path.parent)
        elif self.path.exists():
            head, rows = evaluation.read_log(self.path)
            kept = [head] + [r for r in rows if r["step"] < begun or "eval" in r and r["step"] == begun]
        self.started -= max([r.get("seconds", 0.0) for r in kept], default=0.0)
        self.evaluated = {r["step"] for r in kept if "eval" in r}
        head = dict(config=asdict(cfg), command=" ".join(sys.argv), commit=commit(), world=ranks.world,
                    versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))
        write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in kept or [head]).encode())

    def __call__(self, **record) -> None:
        if self.active:
            with self.path.open("a") as f:
                f.write(json.dumps(dict(seconds=round(time.time() - self.started, 2), **record)) + "\n")


def commit() -> str | None:
    """The commit of these files, with "+" where they differ from it; None outside git or without it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass
class Run:
    """What lives through a run."""

    cfg: Config
    ranks: Ranks
    policy: Policy
    frozen: Policy | None       # the reference in full training; None where adapters switch off
    optimizer: torch.optim.Optimizer
    average: Average
    tasks: Tasks
    judges: dict
    imitation: object           # of the control; else None
    start: int = 0              # first step
    log: Log | None = None
    work: list | None = None    # the last step's batches, rollouts and advantages


def faults(cfg: Config, ranks: Ranks):
    """(whether it is so, what is said of it), one by one: a fault may presume that those above it are not there."""
    yield cfg.group_size < 2, f"--group_size {cfg.group_size}: a group needs at least 2 samples to compare"
    yield (cfg.experts == "generation" and cfg.ask,
           f"--ask {cfg.ask} questions teach the understanding expert, which --experts generation freezes; set --ask 0")
    yield cfg.shard and "RANK" not in os.environ, "--shard cuts the policy over ranks; start with torchrun"
    yield (Path(cfg.policy).resolve() == (Path(cfg.out) / "policy").resolve(),
           f"--policy {cfg.policy} is where this run would write its own policy; give another --out")
    one = ("epochs", "referee_batch", "denoise_steps", "window", "think_tokens", "answer_tokens", "resolution")
    for f in fields(cfg):
        value, low = getattr(cfg, f.name), 1 if f.name in one else 0
        yield f.type is float and not math.isfinite(value), f"--{f.name} {value}: must be a finite number"
        yield f.name in ("temperature", "shift", "grad_clip", "noise_level") and value <= 0, f"--{f.name} {value}: must be above 0"
        number = f.type in (int, float) and f.name not in reward_weights(cfg)       # a reward of weight below 0 is a penalty
        yield number and value < low, f"--{f.name} {value}: must be at least {low}"
    yield (cfg.sampler == "cps" and cfg.noise_level >= 2,
           f"--noise_level {cfg.noise_level}: must be below 2 for cps, whose std is the sine of half a turn there")
    yield cfg.ema >= 1, f"--ema {cfg.ema}: must be below 1, which would never move"
    last = cfg.denoise_steps - (cfg.sampler == "cps")           # cps has no noise in its last step
    yield (not cfg.window_low + cfg.window <= cfg.window_high <= last,
           f"--window {cfg.window} in --window_low {cfg.window_low} to --window_high {cfg.window_high} does not fit in {last} noisy steps")
    for task, names in TASK_REWARDS.items():
        n, cuts = getattr(cfg, task), ranks.share(getattr(cfg, task))[1]
        less = n // ranks.world * ranks.world
        yield (cfg.recipe != "control" and n and not any(reward_weights(cfg)[k] for k in names),
               f"--{task} has no reward: give one of {', '.join('--' + k for k in names)} a weight")
        yield (n and cfg.group_size % cuts, f"--{task} {n} prompts do not divide over {ranks.world} ranks; {f'{less} or ' if less else ''}"
               f"{less + ranks.world} would, or a --group_size that is a multiple of {cuts}")
    yield not cfg.draw + cfg.think + cfg.ask, "nothing to learn from: --draw, --think and --ask are all 0"


def check(cfg: Config, ranks: Ranks) -> None:
    """Refuse what cannot work, before anything is loaded."""
    for wrong, why in faults(cfg, ranks):
        if wrong:
            raise ValueError(why)


EXPERTS = {"understanding": UNDERSTANDING, "generation": GENERATION}


def freeze(policy: Policy, cfg: Config) -> None:
    """Leave trainable what cfg trains: adapters or all weights, of one expert or both."""
    experts = [*EXPERTS] if cfg.experts == "both" else [cfg.experts]
    if cfg.lora:
        add_lora(policy, cfg.lora, 2.0 * cfg.lora, tuple(EXPERTS[e] for e in experts))
    for name, params in policy.parts().items():
        for p in params:
            p.requires_grad_(name in experts)
    for block in policy.blocks:
        block.checkpointing = cfg.checkpointing


def prepared_policy(cfg: Config, ranks: Ranks, trained: bool = True) -> Policy:
    """The policy to train, or its frozen reference. Its memory is checked on the meta device, before a weight is read."""
    def prepare(policy: Policy) -> None:
        if trained:
            freeze(policy, cfg)
        else:
            policy.requires_grad_(False)
        if cfg.shard:
            shard(policy, torch.bfloat16 if cfg.bf16 else None)
        if trained and ranks.device.type == "cuda":
            check_memory(policy, cfg, ranks)
    policy = load_policy(cfg.policy, device=ranks.device, dtype=torch.bfloat16 if cfg.bf16 else torch.float32, prepare=prepare)
    reset_adapters(policy, ranks.device, cfg.seed)
    return policy


def memory(policy: Policy, cfg: Config, world: int) -> dict[str, float]:
    """What a run needs on each GPU, in GB (1e9 bytes), computed from counts of numbers; `policy` may be on the meta device.

    Kept all the time: weights (fp32 where trained, else as computed), gradients, AdamW's moments and the average (fp32), a frozen
    reference. In turn: a rollout (the text's keys and values twice, while they grow; one block's activations of an image step) and a
    replay of one micro-batch (every block's input where activations are checkpointed, else about twelve of its width; one block's
    activations, of all noisy steps at once; the logits and three fp32 copies); the mask of who sees whom; either holds two gathered
    blocks of a sharded policy. Not counted: referees, the autoencoder's activations, what the allocator loses, and the whole weights
    that a sharded rollout keeps only where they fit.
    """
    c, byte = policy.config.llm, 2 if cfg.bf16 else 4
    D, I, layers, V = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], c["vocab_size"]
    cut = world if cfg.shard and not policy.sharded else 1      # of a policy that is not cut yet, nearly everything will be
    rows = lambda p: p.to_local().numel() if isinstance(p, DTensor) else p.numel() / cut
    held = sum(rows(p) for p in policy.parameters())
    trained = sum(rows(p) for p in policy.parameters() if p.requires_grad)
    two = 2 * byte * sum(p.numel() for p in policy.blocks[0].parameters()) if cfg.shard else 0
    counts = [(getattr(cfg, task) * cfg.group_size // world, task) for task in ("draw", "think", "ask")]
    most = max(min(n, max(cfg.rollout_batch, cfg.group_size) if cfg.rollout_batch else n) for n, _ in counts)
    micro = max(min(n, cfg.micro or n) for n, _ in counts)
    M = (cfg.resolution // policy.config.stride) ** 2 + 2 if cfg.draw or cfg.think else 0
    written = max(cfg.think_tokens * bool(cfg.think), cfg.answer_tokens * bool(cfg.ask))
    L = 64 + 160 * cfg.system_prompt * bool(cfg.think) + written
    cache = 2 * layers * c["num_key_value_heads"] * policy.config.head_dim * byte                # bytes of a token's keys and values
    block = ((5 if cfg.lora else 3) * I + 8 * D) * byte                                          # bytes of a token inside a block
    mask = 3 * policy.config.queries_per_key * (L + M)                                           # bytes of a query: whom it sees, also as a bias
    noisy = cfg.window * M                                      # tokens of a sample's noisy steps, which a replay reads in one call
    inputs = layers * D * 4 * (1 if cfg.checkpointing else 12)
    out = {"weights": trained * 4 + (held - trained) * byte, "gradients": trained * 4, "AdamW": trained * 8, "average": trained * 4,
           "reference": held * byte if needs_reference(cfg) and not cfg.lora else 0,
           "rollout": most * (2 * L * cache + max(M, 1) * block + max(M, L) * mask) + two,
           "replay": micro * (3 * L * cache + (noisy + L) * inputs + max(noisy, L) * (block + mask) + written * V * (byte + 12)) + two}
    return {k: v / 1e9 for k, v in out.items()}


def peak(need: dict[str, float]) -> float:
    """GB at the worst moment: rollout and replay do not meet."""
    return sum(v for k, v in need.items() if k not in ("rollout", "replay")) + max(need["rollout"], need["replay"])


def check_memory(policy: Policy, cfg: Config, ranks: Ranks) -> None:
    """ValueError before anything is read where the GPU cannot hold the run, with settings that it would hold."""
    has, need = torch.cuda.get_device_properties(ranks.device).total_memory / 1e9, memory(policy, cfg, ranks.world)
    if peak(need) <= has:
        return
    changes = [dict(micro=1), dict(rollout_batch=cfg.group_size), dict(micro=1, rollout_batch=cfg.group_size), dict(think_tokens=64, micro=1)]
    fits = [c for c in changes if peak(memory(policy, replace(cfg, **c), ranks.world)) <= has]
    otherwise = "--lora 64 (if all weights are trained), --shard on more GPUs, or a lower --resolution"
    hint = " ".join(f"--{k} {v}" for k, v in fits[0].items()) if fits else otherwise
    parts = ", ".join(f"{k} {v:.1f}" for k, v in need.items() if v >= 0.05)
    raise ValueError(f"the run needs about {peak(need):.0f} GB on each GPU, which has {has:.0f}: {parts}; try {hint}")


def begin(cfg: Config, ranks: Ranks) -> Run:
    """Load everything a run needs; with --resume, its last checkpoint too."""
    check(cfg, ranks)
    policy = prepared_policy(cfg, ranks)
    tasks = Tasks(cfg, policy)
    frozen = prepared_policy(cfg, ranks, trained=False) if needs_reference(cfg) and not cfg.lora else None
    rates, groups = dict(understanding=cfg.lr_understanding, generation=cfg.lr_generation), []
    for name, params in policy.parts().items():
        for cut in (False, True):                               # sharded and whole tensors do not mix in one group
            groups.append(dict(params=[p for p in params if isinstance(p, DTensor) == cut], lr=rates[name]))
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.99), weight_decay=cfg.weight_decay)
    for p in trainable(policy).values():
        optimizer.state[p] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    judges, imitation = {}, None
    if cfg.recipe == "control":
        from toy.pretrain import Imitation
        imitation = Imitation(policy, cfg.seed, cfg.grad_clip)
    else:
        judges = referees(cfg, ranks.device)
    run = Run(cfg, ranks, policy, frozen, optimizer, Average(policy, cfg.ema), tasks, judges, imitation)
    run.start = load_checkpoint(Path(cfg.out), run_state(policy, run.average, optimizer)) if cfg.resume else 0
    run.log = Log(cfg, ranks, run.start)
    return run


def one_step(run: Run, step: int) -> dict:
    """Phases 1 to 4; returns what phase 5 logs."""
    if run.imitation:
        return run.imitation.step(step, run.optimizer)
    cfg, stats, work = run.cfg, {}, []
    for batch in run.tasks.batches(step, run.ranks):
        r = act(run.policy, batch, cfg)                                                                        # 1. act
        components, look = reward_phase(run.policy, batch, r, run.judges, cfg, run.tasks.toy)                  # 2. reward
        adv, group = advantage_phase(components, getattr(cfg, batch.task), cfg, run.ranks)                     # 3. compare
        look |= {"completions/mean_length": s.chosen.sum(1).float().mean().item()
                 for s in r.segments if isinstance(s, Text) and s.chosen is not None}
        look = over_ranks({k: [v] for k, v in look.items()}, run.ranks)
        stats |= {f"{batch.task}/{k}": v for k, v in (look | group).items()}
        work.append((batch, r, adv))
    run.work = work
    if step == 0:
        stats |= {f"self_check/{k}": v for k, v in self_check(run.policy, work, cfg).items()}
    return stats | update_phase(run.policy, run.frozen, run.optimizer, work, cfg, run.ranks)                   # 4. improve


def look(run: Run, step: int) -> None:
    """The averaged weights on held-out prompts of the toy, logged; on prompts from a file, four of them drawn into out/samples."""
    cfg = run.cfg
    due = cfg.eval_every and run.ranks.rank == 0 and step not in run.log.evaluated
    if run.policy.sharded:                                      # then all ranks' forwards are needed
        due = run.ranks.total(torch.tensor(int(due), device=run.ranks.device)).item()
    if not due or not (run.tasks.toy or cfg.draw or cfg.think):
        return
    with run.average.swapped(run.policy), gathered(run.policy, spare(run.policy.device)), compute(cfg, run.policy.device):
        if run.tasks.toy:
            table = evaluation.evaluate(run.policy)
            run.log(step=step, eval={k: [round(x, 5) if np.isfinite(x) else None for x in v] for k, v in table.items()})
            return
        prompts = [m["prompt"] for m in run.tasks.pools["draw"][:4]]
        *reads, draw = run.tasks.plan("think" if cfg.think else "draw", prompts, window=(0, 0))
        plan = [*reads, replace(draw, shared_noise=False)]      # without noise on the way, equal starts would give equal pictures
        images = images_of(run.policy, rollout(run.policy, plan, seed=cfg.seed, step=0, prompts=list(range(len(prompts))), G=4))
    if run.ranks.rank == 0:
        path = Path(cfg.out) / "samples" / f"{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        save_grid(images, str(path), columns=4)


@contextlib.contextmanager
def signals():
    """A list that SIGINT and SIGTERM append their names to while inside; the old handlers come back afterwards."""
    seen, numbers = [], (signal.SIGINT, signal.SIGTERM)
    old = [signal.signal(n, lambda n, _: seen.append(signal.Signals(n).name)) for n in numbers]
    try:
        yield seen
    finally:
        for n, handler in zip(numbers, old):
            signal.signal(n, handler)


def train(cfg: Config, ranks: Ranks) -> None:
    """The run: the six phases until cfg.steps, or until a signal, which saves first."""
    run = begin(cfg, ranks)
    out = Path(cfg.out)
    look(run, run.start)
    with signals() as stop:
        bar = tqdm(range(run.start, cfg.steps), initial=run.start, total=cfg.steps, disable=ranks.rank > 0, desc=cfg.recipe)
        for step in bar:
            try:
                stats = one_step(run, step)
            except FloatingPointError as error:
                raise keep_bad_step(run, step, error) from error
            except (ValueError, OSError, rewards.RewardError):
                if step > run.start and not run.policy.sharded:  # raised before the update: the weights are those of the step before
                    keep(run, step, writer=ranks.rank)
                raise
            run.average.update(run.policy)
            run.log(step=step, **stats)                                                                        # 5. look
            bar.set_postfix({k.split("/")[0]: f"{v:.3f}" for k, v in stats.items() if k.endswith("/reward") or k == "loss"})
            done, halt = step + 1, bool(ranks.total(torch.tensor([len(stop)], device=ranks.device)).item())
            if halt or done == cfg.steps or cfg.save_every and done % cfg.save_every == 0:
                keep(run, done)                                                                                # 6. keep
            if halt:
                tqdm.write(f"stopped after step {step}, checkpoint saved; go on with --resume")
                return
            if cfg.eval_every and (done % cfg.eval_every == 0 or done == cfg.steps):
                look(run, done)
    if ranks.rank == 0 or run.policy.sharded:
        with run.average.swapped(run.policy), gathered(run.policy):
            if cfg.lora:
                save_adapters(run.policy, out / "adapter")
            save_policy(run.policy, out / "policy")
    if ranks.rank == 0 and run.tasks.toy and cfg.eval_every:
        evaluation.before_after(load_policy(cfg.policy, ranks.device), load_policy(out / "policy", ranks.device), out / "before_after.png")
        evaluation.plot([run.log.path], out / "curves.png")
        print(evaluation.summary(run.log.path))


def keep(run: Run, step: int, writer: int = 0) -> None:
    """Save the run's checkpoint; of equal ranks only `writer` writes."""
    save_checkpoint(Path(run.cfg.out), run_state(run.policy, run.average, run.optimizer), step, run.policy.sharded, run.ranks.rank, writer)


def keep_bad_step(run: Run, step: int, error: Exception) -> FloatingPointError:
    """Save the weights and the batch of a step whose loss or gradient is not finite, one file per rank."""
    path = Path(run.cfg.out) / f"bad_step_{run.ranks.rank}.safetensors"
    good = Path(run.cfg.out) / ("checkpoint" if run.policy.sharded else "checkpoint.safetensors")
    tensors = {f"policy.{n}": p.to_local() if isinstance(p, DTensor) else p for n, p in trainable(run.policy).items()} | {"step": torch.tensor(step)}
    for batch, r, adv in run.work or []:
        tensors[f"{batch.task}.adv"] = adv
        for i, s in enumerate(r.segments):
            held = vars(s) | (vars(s.flow) if getattr(s, "flow", None) else {})
            tensors |= {f"{batch.task}.{i}.{k}": v.clone() for k, v in held.items() if isinstance(v, Tensor)}
    save_tensors(tensors, path)
    return FloatingPointError(f"step {step}: {error}; stopped. Last good checkpoint: {good if good.exists() else 'none yet'}. "
                              f"The weights and the batch of this step are in {path}")


def stop(why: str) -> None:
    """One line, and the process ends with 1."""
    sys.stderr.write(f"train.py: {why}\n")                      # in one piece, since ranks share the stream
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(1)                                             # leaving the group in order would wait for ranks that wait for this one
    sys.exit(1)


def main() -> None:
    try:
        cfg, ranks = parse(), setup()
        if cfg.recipe == "pretrain":
            from toy import pretrain
            if ranks.world > 1:
                raise ValueError("--recipe pretrain runs in one process")
            pretrain.main(Path(cfg.out))
        else:
            train(cfg, ranks)
    except (ValueError, OSError, FloatingPointError, rewards.RewardError, torch.cuda.OutOfMemoryError) as error:
        stop(str(error).splitlines()[0] + "; try a lower --micro or --rollout_batch" * isinstance(error, torch.cuda.OutOfMemoryError))
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        stop("another rank stopped, and so does this one")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
