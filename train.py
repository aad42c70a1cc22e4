"""GRPO for one policy that reads and writes text and images: rollout, reward, advantage, update, log, keep.

    torchrun train.py                                           # lvrpo on the toy, from assets/toy, minutes on a laptop
    torchrun train.py --recipe unigrpo --group_size 16 --out out/unigrpo
    torchrun --nproc_per_node=8 train.py --recipe unigrpo --scale bagel --policy BAGEL-7B-MoT --prompts prompts.jsonl --ins 0 --sem 1
    torchrun train.py --recipe pretrain                         # makes everything in assets/toy again

Plain `python train.py` is one process. Every random number derives from (seed, step, prompt, sample), so there is no generator state to
keep: a checkpoint is the weights, their average, the optimiser and the step, and a resumed run is the uninterrupted one, bit for bit.

Legend: B prompts per step and task, G samples each, N = B*G prompt-major, L text positions, W noisy steps.
"""

import argparse
import contextlib
import copy
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import eval as evaluation
import flow_grpo
import rewards
import shapes
from grpo import group_advantage, grpo_loss
from policy import THINK_TO_DRAW, Policy, adapters_off, add_lora, save_tensors, write_atomic
from sample import Draw, Picture, Read, Rollout, See, Text, Write, images_of, read_picture, replay, rollout, select, texts_of

ASSETS = Path(__file__).parent / "assets" / "toy"

# One row a switch, one column a method. The paper's value where it is confirmed; (o) marks ours, where the paper's is not known.
METHODS = ("lvrpo", "unigrpo")
RECIPES = {
    "draw":            (24, 0),           # prompts per step drawn at once                                            (o), -
    "think":           (8, 32),           # prompts per step thought about, then drawn                                (o), 32
    "ask":             (16, 0),           # questions per step                                                        (o), -
    "sem":             (1.0, 0.0),        # weight of r_sem, SigLIP cosine [LVRPO Eq. 5]                              (o), -
    "ins":             (1.0, 1.0),        # weight of r_ins of an image, rules on detections [LVRPO Eq. 7]            (o), terminal reward (o)
    "accuracy":        (1.0, 1.0),        # weight of the right answer to a question: r_ins of a text                 (o), (o)
    "kn":              (1.0, 0.0),        # weight of r_kn, yes/no confidence of the judge                            (o), -
    "dense":           (0.0, 0.0),        # weight of r_dense, max over patches per key phrase [LVRPO Eq. 12]           (o), -
    "format":          (0.0, 0.0),        # weight of the think tags of a thought [AlphaGRPO]                         -, -
    "graded":          (True, True),      # r_ins as the fraction of rules kept, else all-of                          (o), (o)
    "text_clip":       (0.2, 0.2),        # token ratio clip                                                          (o), (o)
    "text_kl":         (0.02, 0.0),       # weight of k3 to the reference                                             (o), 0
    "image_weight":    (300.0, 1.0),      # of the image loss beside the text loss [UniGRPO Eq. 7: lambda]            (o), 1
    "image_clip":      (1e-3, 1e-3),      # ratio clip of a noisy step, log-density averaged over entries             (o), 1e-6 at 65,536 entries
    "image_kl":        (0.003, 0.0),      # weight of the transition KL to the reference                              (o), 0
    "velocity_mse":    (0.0, 5e-5),       # weight of |v - v_ref|^2 per entry                                         (o), 1.5e-5 (sum)
    "ratio_norm":      (False, True),     # RatioNorm [UniGRPO Eq. 5]                                                 -, yes
    "step_weights":    (True, True),      # 1/|dt| per noisy step, mean 1 [GRPO-Guard]                                (o), (o)
    "epochs":          (2, 2),            # updates per batch                                                         (o), 2
    "steps":           (150, 100),        # batches of rollouts on the toy                                            (o), (o)
}

# What depends on size: the toy's values are ours, measured; BAGEL's are UniGRPO's Table 3 but for resolution and group.
SCALES = {
    "toy": dict(group_size=16, lr_understanding=2e-4, lr_generation=5e-4, denoise_steps=6, shift=2.0, noise_level=0.8, sampler="cps",
                window=3, window_low=0, window_high=3, shared_noise=True, resolution=32, think_tokens=24, answer_tokens=4,
                lora=0, system_prompt=False),
    "bagel": dict(group_size=24, lr_understanding=1e-6, lr_generation=3e-5, denoise_steps=25, shift=3.0, noise_level=0.8, sampler="sde",
                  window=3, window_low=0, window_high=5, shared_noise=False, resolution=512, think_tokens=256, answer_tokens=256,
                  lora=64, system_prompt=True, steps=1000),
}


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Counts of prompts are global: ranks share them."""

    recipe: str                 # a method of RECIPES, or pretrain, or control
    scale: str                  # a column of SCALES
    policy: str = str(ASSETS / "policy")
    prompts: str = ""           # JSONL with "prompt" (and GenEval's fields), or plain text; empty: the toy world
    questions: str = ""         # JSONL with "image" (path), "question", "answer"; empty: the toy world
    siglip: str = str(ASSETS / "siglip")
    judge: str = str(ASSETS / "judge")
    out: str = "out"
    resume: bool = False        # go on from the checkpoint in out
    seed: int = 0
    steps: int = 0              # optimisation steps = batches of rollouts
    eval_every: int = 50        # 0: only before and after
    save_every: int = 50
    micro: int = 0              # prompts per micro-batch and task; 0: all at once
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
    normalise: str = "sum"      # sum: the components are added, then normalised by group; each: the other way round
    advantage: str = "group"    # whose spread divides: group, batch, none
    text_clip: float = 0.0
    text_kl: float = 0.0
    image_weight: float = 1.0
    image_clip: float = 0.0
    image_kl: float = 0.0
    velocity_mse: float = 0.0
    ratio_norm: bool = False
    step_weights: bool = False
    epochs: int = 1
    temperature: float = 1.0    # of sampled text
    denoise_steps: int = 0      # K
    shift: float = 1.0
    noise_level: float = 0.0
    sampler: str = "sde"        # sde, cps, dance
    window: int = 0             # W noisy steps, somewhere in window_low..window_high
    window_low: int = 0
    window_high: int = 0
    shared_noise: bool = False  # one initial noise per group
    resolution: int = 0         # pixels per side
    think_tokens: int = 0
    answer_tokens: int = 0
    system_prompt: bool = False  # BAGEL's think prompt before the user's
    lora: int = 0               # rank on both experts; 0 trains all weights against a frozen copy
    lr_understanding: float = 0.0
    lr_generation: float = 0.0
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    ema: float = 0.95           # of the weights that are evaluated and exported


def parse(argv: list[str] | None = None) -> Config:
    """Command line -> Config: recipe column, then scale, then what was given. Unknown names are refused."""
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    ap.add_argument("--recipe", default="lvrpo", choices=[*METHODS, "control", "pretrain"])
    ap.add_argument("--scale", default="toy", choices=[*SCALES])
    for f in fields(Config)[2:]:
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        ap.add_argument(f"--{f.name}", **kind)
    given = {k: v for k, v in vars(ap.parse_args(argv)).items() if v is not None}
    if given["recipe"] == "pretrain":
        given.setdefault("out", str(ASSETS))
    column = METHODS.index(given["recipe"]) if given["recipe"] in METHODS else 0
    return Config(**({k: row[column] for k, row in RECIPES.items()} | SCALES[given["scale"]] | given))


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


def setup() -> Ranks:
    """Read torchrun's environment; nccl where there are GPUs, else gloo."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return Ranks(rank, world, device)


# ---- tasks: what is asked of the policy ----


@dataclass(frozen=True)
class Batch:
    """One task's prompts on this rank, and, after acting, their rollout. Lists have one entry per prompt."""

    task: str                   # draw | think | ask
    plan: list
    metadata: list[dict]
    prompts: list[str]
    index: list[int]            # of each prompt among the step's, over all ranks and tasks; seeds the samples
    sources: Tensor | None = None    # (B, 3, H, W) in [0, 1], the image of a question
    answers: list[str] | None = None


class World:
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
        if not self.toy and cfg.ins and (cfg.draw or cfg.think):
            raise ValueError("--ins on images needs the toy's detector; with --prompts set --ins 0 and use --sem or --kn")
        for task in ("draw", "think"):
            if getattr(cfg, task) and not self.pools[task]:
                raise ValueError(f"--{task} {getattr(cfg, task)} needs --prompts; or set --{task} 0")
            if not self.toy and self.pools[task]:
                policy.encode_text([m["prompt"] for m in self.pools[task]], room=cfg.think_tokens)             # too long a prompt is an error
        if cfg.ask and not self.toy and not self.asked:
            raise ValueError(f"--ask {cfg.ask} needs --questions; or set --ask 0")

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
        draw = Draw((cfg.resolution, cfg.resolution), flow_grpo.time_grid(cfg.denoise_steps, cfg.shift), window, cfg.noise_level,
                    cfg.sampler, cfg.shared_noise)
        for task in ("draw", "think", "ask"):
            count = getattr(cfg, task)
            mine = range(ranks.rank * count // ranks.world, (ranks.rank + 1) * count // ranks.world)
            index = [first + i for i in mine]
            first += count
            if task == "ask" and count:
                out.append(self.questions(step, list(mine), index))
            elif count:
                metadata = [self.choose(task, step)[i] for i in mine]
                prompts = [m["prompt"] for m in metadata]
                system = [Read([THINK_TO_DRAW] * len(prompts))] * (task == "think" and cfg.system_prompt)
                thought = [Write(cfg.think_tokens, cfg.temperature)] * (task == "think")
                out.append(Batch(task, [*system, Read(prompts), *thought, draw], metadata, prompts, index))
        return out

    def questions(self, step: int, mine: list[int], index: list[int]) -> Batch:
        if self.toy:
            drawn = []
            for i in mine:
                rng = np.random.default_rng((self.cfg.seed, step, 2, i))
                scene = shapes.random_scene(rng)
                drawn.append((shapes.render(scene), shapes.make_question(scene, rng)))
            pixels = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2) / 127.5 - 1
            sources, rows = pixels * 0.5 + 0.5, [q for _, q in drawn]
        else:
            rng = np.random.default_rng((self.cfg.seed, step, 2))
            rows = [self.asked[i] for i in rng.choice(len(self.asked), self.cfg.ask, replace=len(self.asked) < self.cfg.ask)[mine]]
            pixels = [read_picture(row["image"], self.policy) for row in rows]
            sources = torch.cat([F.interpolate(p[None] * 0.5 + 0.5, (224, 224), mode="bicubic", antialias=True) for p in pixels]).clamp(0, 1)
        texts = [row["question"] for row in rows]
        plan = [See(pixels), Read(texts), Write(self.cfg.answer_tokens, self.cfg.temperature)]
        metadata = [{"tag": row.get("kind", ""), "include": []} for row in rows]
        return Batch("ask", plan, metadata, texts, index, sources, [row["answer"] for row in rows])


def read_lines(path: str) -> list[tuple[int, str]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"file {path} does not exist")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"file {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return [(i, line) for i, line in enumerate(lines, 1) if line.strip()]


def read_json_lines(path: str, needed: tuple[str, ...]) -> list[dict]:
    """JSON objects, one a line, each with the needed string fields; errors name file and line."""
    rows = []
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a JSON object ({error.msg}); each line must be one") from error
        if not isinstance(row, dict) or (missing := [k for k in needed if not isinstance(row.get(k), str)]):
            raise ValueError(f"{path}:{number}: must be an object with the text fields {list(needed)}"
                             + (f", lacks {missing}" if isinstance(row, dict) else ""))
        rows.append(row)
    return rows


def read_prompts(path: str) -> list[dict]:
    """Prompts as metadata: a .jsonl file of GenEval's format, or plain text, one prompt a line."""
    if path.endswith(".jsonl"):
        rows = [{"tag": "", "include": [], **row} for row in read_json_lines(path, ("prompt",))]
        for row in rows:
            if not isinstance(row["tag"], str) or not isinstance(row["include"], list) or not all(isinstance(c, dict) and "class" in c for c in row["include"]):
                raise ValueError(f"{path}: prompt {row['prompt'][:60]!r}: tag must be text and include a list of objects with a class")
        return rows
    return [{"tag": "", "include": [], "prompt": line.strip()} for _, line in read_lines(path)]


def read_questions(path: str) -> list[dict]:
    """Rows image, question, answer; image paths are relative to the file."""
    rows = read_json_lines(path, ("image", "question", "answer"))
    return [{**row, "image": str(Path(path).parent / row["image"])} for row in rows]


# ---- the six phases ----

TASK_REWARDS = {"draw": ("sem", "ins", "kn", "dense"), "think": ("sem", "ins", "kn", "dense", "format"), "ask": ("accuracy", "kn")}


def reward_weights(cfg: Config) -> dict[str, float]:
    return dict(sem=cfg.sem, ins=cfg.ins, accuracy=cfg.accuracy, kn=cfg.kn, dense=cfg.dense, format=cfg.format)


def referees(cfg: Config, device) -> dict[str, rewards.Reward]:
    """The frozen reward models that this run's weights ask for."""
    out = {}
    if (cfg.sem or cfg.dense) and (cfg.draw or cfg.think):
        encoder = rewards.load_siglip(cfg.siglip, device=device, batch_size=512)
        out |= {"sem": rewards.Semantic(encoder)} if cfg.sem else {}
        out |= {"dense": rewards.Dense(encoder)} if cfg.dense else {}
    if cfg.kn:
        out["kn"] = rewards.Knowledge(rewards.load_judge(cfg.judge, device=device, batch_size=512))
    return out


def reward_phase(policy: Policy, batch: Batch, r: Rollout, judges: dict, cfg: Config, toy: bool) -> tuple[Tensor, dict, dict]:
    """Score a rollout -> (summed reward (N,), components name -> (N,), what to log beside them)."""
    each = lambda rows: [row for row in rows for _ in range(r.G)]
    images = images_of(policy, r)
    samples = rewards.Samples(each(batch.prompts), each(batch.metadata), texts_of(policy, r), images,
                              None if batch.sources is None else batch.sources.repeat_interleave(r.G, 0).to(policy.device),
                              each(batch.answers) if batch.answers else None)
    look, table = {}, {}
    if batch.task == "ask":
        table["accuracy"] = rewards.answer_accuracy
        table |= {k: judges[k] for k in ("kn",) if k in judges}
    else:
        table |= judges
        if cfg.format and batch.task == "think":
            table["format"] = lambda samples: rewards.think_format(samples, answer=False)
        if toy:
            found = evaluation.detector(images)
            table["ins"] = rewards.Instruction(lambda _: found, cfg.graded)
            look = {"truth": evaluation.truth(samples.metadata, found).mean().item(),
                    **shapes.diversity(evaluation.to_bytes(images), found, r.G)}
    components = rewards.score(table, samples)
    weights = {k: reward_weights(cfg)[k] for k in components}
    total = rewards.combine(components, weights, normalise=cfg.normalise, G=r.G)
    if batch.task == "ask":
        look = {"truth": components["accuracy"].mean().item()}
    look |= {f"advantage_share/{k}": v for k, v in rewards.variance_share(components, weights, r.G).items()}
    return total, components, look


def advantage_phase(reward: Tensor, cfg: Config, ranks: Ranks) -> tuple[Tensor, dict]:
    """Advantages of this rank's samples; statistics span all ranks."""
    everyone = ranks.gather(reward.to(ranks.device))
    adv = group_advantage(everyone, cfg.group_size, scale=cfg.advantage)
    groups = everyone.view(-1, cfg.group_size)                  # (B of all ranks, G)
    stats = {"reward": everyone.mean().item(), "reward_std": groups.std(1, correction=0).mean().item(),
             "frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean().item()}
    return adv[ranks.rank * len(reward):][:len(reward)], stats


@contextlib.contextmanager
def reference_of(policy: Policy, frozen: Policy | None):
    """The reference policy: a frozen copy, or the policy itself with its adapters off."""
    if frozen is not None:
        yield frozen
    else:
        with adapters_off(policy):
            yield policy


def segment_loss(scored, reference, adv: Tensor, totals: dict, cfg: Config) -> tuple[Tensor, dict]:
    """Loss of one chosen segment, normalised by the step's global counts; stats are named text/... or image/..."""
    s = scored.segment
    if isinstance(s, Text):
        loss, stats = grpo_loss(scored.logp, s.logp, adv, s.chosen, total=totals["text"], low=cfg.text_clip, high=cfg.text_clip,
                                beta=cfg.text_kl, logp_ref=None if reference is None else reference.logp)
        return loss, {f"text/{k}": float(v) for k, v in stats.items()}
    weights = flow_grpo.step_weights(s.flow.times, s.flow.window, normalise=True) if cfg.step_weights else None
    loss, stats = flow_grpo.flow_grpo_loss(
        scored.flow, s.flow, adv, total=totals["image"], low=cfg.image_clip, high=cfg.image_clip, ratio_norm=cfg.ratio_norm,
        weights=weights, reference=None if reference is None else reference.flow, kl_beta=cfg.image_kl, mse_weight=cfg.velocity_mse)
    return cfg.image_weight * loss, {f"image/{k}": float(v) for k, v in stats.items() if v.ndim == 0}


def counts(r: Rollout) -> Tensor:
    """(2,) sampled text tokens and noisy image steps of a rollout: what its losses are averaged over."""
    text = sum(int(s.chosen.sum()) for s in r.segments if isinstance(s, Text) and s.chosen is not None)
    image = sum(s.flow.logp.numel() for s in r.segments if isinstance(s, Picture) and s.flow is not None)
    return torch.tensor([text, image], dtype=torch.float64)


def update_phase(policy: Policy, frozen: Policy | None, optimizer, work: list[tuple[Batch, Rollout, Tensor]], cfg: Config,
                 ranks: Ranks) -> dict:
    """cfg.epochs optimiser steps on the rollouts. Micro-batches and ranks add up: each loss is divided by global counts."""
    parts, log = [], {}                                         # log: name -> values of the last epoch's micro-batches
    for batch, r, adv in work:
        text, image = ranks.total(counts(r).to(ranks.device)).tolist()
        size = cfg.micro or r.B
        for i in range(0, r.B, size):
            part = select(r, i, min(i + size, r.B))
            reference = [None] * 2
            if cfg.text_kl or cfg.image_kl or cfg.velocity_mse:
                with torch.no_grad(), reference_of(policy, frozen) as ref:
                    reference = replay(ref, part)
            parts.append((batch.task, part, adv[i * r.G:(i + part.B) * r.G], dict(text=text, image=image), reference))
    for _ in range(cfg.epochs):
        optimizer.zero_grad()
        value, log = 0.0, {}
        for task, part, adv, totals, reference in parts:
            loss = 0.0
            for scored, ref in zip(replay(policy, part), reference):
                piece, stats = segment_loss(scored, ref, adv, totals, cfg)
                loss = loss + piece
                for k, v in stats.items():
                    log.setdefault(f"{task}/{k}", []).append(v)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the {task} loss is {loss.item()}")
            loss.backward()
            value += loss.item()
        trained = [p for g in optimizer.param_groups for p in g["params"]]
        for p in trained:                                       # zeros, so that every rank has the same list
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            ranks.total(p.grad)
        norm = nn.utils.clip_grad_norm_(trained, cfg.grad_clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm.item()}")
        optimizer.step()
    out = over_ranks(log, ranks)
    return out | {"loss": ranks.total(torch.tensor(value, dtype=torch.float64, device=ranks.device)).item(), "grad_norm": norm.item()}


def over_ranks(log: dict[str, list[float]], ranks: Ranks) -> dict[str, float]:
    """One number per name: the mean over micro-batches and ranks, or the least and largest where the name says min or max."""
    row = {k: min(v) if k.endswith("min") else max(v) if k.endswith("max") else float(np.mean(v)) for k, v in log.items()}
    everyone = ranks.gather(torch.tensor([list(row.values())], dtype=torch.float64, device=ranks.device))      # (ranks, names)
    pick = lambda k, column: column.min() if k.endswith("min") else column.max() if k.endswith("max") else column.mean()
    return {k: pick(k, everyone[:, i]).item() for i, k in enumerate(row)}


@torch.no_grad()
def self_check(policy: Policy, work: list, cfg: Config) -> dict:
    """Before any update: max |logp_replay - logp_rollout| of text and image. Above the clip range it would act as noise; far above it
    the two paths are different functions."""
    out = {}
    for batch, r, _ in work:
        for scored in replay(policy, r):
            s, name = scored.segment, f"{batch.task}/{'text' if isinstance(scored.segment, Text) else 'image'}"
            gap = (scored.logp - s.logp if scored.logp is not None else scored.flow.logp - s.flow.logp).abs().max().item()
            clip = cfg.text_clip if scored.logp is not None else cfg.image_clip
            out[name] = gap
            if gap > max(10 * clip, 0.05):
                raise ValueError(f"self-check: replay and rollout log-probs of {name} differ by {gap:.2g} before any update; "
                                   "they must be one function")
            if gap > clip:
                tqdm.write(f"warning: {name} log-probs differ by {gap:.2g} before any update, beyond the clip range {clip:g}")
    return out


# ---- what is kept ----


class Average:
    """Exponential moving average of the trainable weights, fp32; `swapped` puts it into the policy for a while."""

    def __init__(self, policy: nn.Module, decay: float):
        self.decay = decay
        self.weights = {n: p.detach().float().clone() for n, p in policy.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, policy: nn.Module) -> None:
        for n, p in policy.named_parameters():
            if n in self.weights:
                self.weights[n].lerp_(p.detach().float(), 1 - self.decay)

    @contextlib.contextmanager
    def swapped(self, policy: nn.Module):
        own = {n: p.detach().clone() for n, p in policy.named_parameters() if n in self.weights}
        self._put(policy, self.weights)
        try:
            yield policy
        finally:
            self._put(policy, own)

    @torch.no_grad()
    def _put(self, policy: nn.Module, weights: dict) -> None:
        for n, p in policy.named_parameters():
            if n in weights:
                p.copy_(weights[n])


def trainable(policy: Policy) -> dict[str, nn.Parameter]:
    return {n: p for n, p in policy.named_parameters() if p.requires_grad}


def save_checkpoint(path: Path, run: "Run", step: int) -> None:
    """Trainable weights, their average, AdamW's moments and the step in one safetensors file, replaced atomically."""
    tensors = {"step": torch.tensor(step)}
    for n, p in trainable(run.policy).items():
        state = run.optimizer.state.get(p, {})
        tensors |= {f"policy.{n}": p, f"average.{n}": run.average.weights[n]} | {f"adamw.{k}.{n}": v for k, v in state.items()}
    save_tensors(tensors, path)


def load_checkpoint(path: Path, policy: Policy, average: Average, optimizer) -> int:
    """Put a checkpoint into the run's objects and return its step. All keys and shapes are checked before anything changes."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path} to resume from")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); pickled checkpoints are not read") from error
    params = trainable(policy)
    adamw = ("step", "exp_avg", "exp_avg_sq")
    want = {"step"} | {f"{kind}.{n}" for n in params for kind in ("policy", "average")}
    want |= {f"adamw.{k}.{n}" for n in params for k in adamw if f"adamw.step.{n}" in tensors}
    missing, extra = sorted(want - tensors.keys()), sorted(tensors.keys() - want)
    if missing or extra:
        raise ValueError(f"{path}: {len(missing)} keys missing {missing[:6]}, {len(extra)} keys extra {extra[:6]}; "
                         "was it written with another --policy or --lora?")
    for key, value in tensors.items():
        n = re.sub(r"^(policy|average|adamw\.exp_avg(_sq)?)\.", "", key)
        if n in params and value.shape != params[n].shape:
            raise ValueError(f"{path}: {key} has shape {tuple(value.shape)}, the policy {tuple(params[n].shape)}")
    with torch.no_grad():
        for n, p in params.items():
            p.copy_(tensors[f"policy.{n}"])
            average.weights[n].copy_(tensors[f"average.{n}"])
            if f"adamw.step.{n}" in tensors:
                optimizer.state[p] = {k: tensors[f"adamw.{k}.{n}"].to("cpu" if k == "step" else p.device) for k in adamw}
    return int(tensors["step"])


class Log:
    """out/log.jsonl, one JSON object a line; the first tells what ran. Only rank 0 writes. A resumed run goes on in the same file,
    a run that starts anew keeps the old file as log.previous.jsonl."""

    def __init__(self, cfg: Config, ranks: Ranks, begun: int):
        self.path, self.active, self.started, self.evaluated = Path(cfg.out) / "log.jsonl", ranks.rank == 0, time.time(), set()
        if not self.active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if self.path.exists() and not begun:
            os.replace(self.path, self.path.with_name("log.previous.jsonl"))
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
    def git(*words):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
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
    world: World
    judges: dict
    imitation: object           # of the control; else None
    log: Log
    start: int                  # first step
    work: list | None = None    # the last step's batches, rollouts and advantages


def check(cfg: Config, ranks: Ranks) -> None:
    """Refuse what cannot work, before anything is loaded."""
    if cfg.group_size < 2:
        raise ValueError(f"--group_size {cfg.group_size}: a group needs at least 2 samples to compare")
    least = dict(draw=0, think=0, ask=0, micro=0, steps=0, eval_every=0, save_every=0, lora=0, epochs=1, denoise_steps=1, window=1,
                 window_low=0, think_tokens=1, answer_tokens=1, resolution=1)
    for name, low in least.items():
        if getattr(cfg, name) < low:
            raise ValueError(f"--{name} {getattr(cfg, name)}: must be at least {low}")
    if cfg.temperature <= 0:
        raise ValueError(f"--temperature {cfg.temperature}: sampling needs a temperature above 0")
    last = cfg.denoise_steps - (cfg.sampler == "cps")           # cps has no noise in its last step
    if not cfg.window_low + cfg.window <= cfg.window_high <= last:
        raise ValueError(f"--window {cfg.window} in --window_low {cfg.window_low} to --window_high {cfg.window_high} does not fit in "
                         f"{last} noisy steps")
    for task, names in TASK_REWARDS.items():
        if cfg.recipe != "control" and getattr(cfg, task) and not any(reward_weights(cfg)[k] for k in names):
            raise ValueError(f"--{task} has no reward: give one of {', '.join('--' + k for k in names)} a weight")
    for task in ("draw", "think", "ask"):
        n, less = getattr(cfg, task), getattr(cfg, task) // ranks.world * ranks.world
        if n % ranks.world:
            raise ValueError(f"--{task} {n} prompts do not divide over {ranks.world} ranks; {less or ''}{' or ' if less else ''}"
                             f"{less + ranks.world} would")
    if not cfg.draw + cfg.think + cfg.ask:
        raise ValueError("nothing to learn from: --draw, --think and --ask are all 0")


def begin(cfg: Config, ranks: Ranks) -> Run:
    """Load everything a run needs; with --resume, its last checkpoint too."""
    check(cfg, ranks)
    policy = Policy.load(cfg.policy, device=ranks.device)
    world = World(cfg, policy)
    if cfg.lora:
        torch.manual_seed(cfg.seed)                             # the adapters' initial A is the one draw outside a Generator
        frozen = None
        add_lora(policy, cfg.lora, 2.0 * cfg.lora)
    else:
        frozen = copy.deepcopy(policy.float()).requires_grad_(False)
    groups = [dict(params=params, lr=lr) for params, lr in zip(policy.parts().values(), (cfg.lr_understanding, cfg.lr_generation)) if params]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=cfg.weight_decay)
    average = Average(policy, cfg.ema)
    start = load_checkpoint(Path(cfg.out) / "checkpoint.safetensors", policy, average, optimizer) if cfg.resume else 0
    judges, imitation = {}, None
    if cfg.recipe == "control":
        from assets.pretrain import Imitation
        imitation = Imitation(policy, cfg.seed)
    else:
        judges = referees(cfg, ranks.device)
    return Run(cfg, ranks, policy, frozen, optimizer, average, world, judges, imitation, Log(cfg, ranks, start), start)


def one_step(run: Run, step: int) -> dict:
    """Phases 1 to 4; returns what phase 5 logs."""
    if run.imitation:
        return run.imitation.step(step, run.optimizer)
    cfg, stats, work = run.cfg, {}, []
    for batch in run.world.batches(step, run.ranks):
        r = rollout(run.policy, batch.plan, seed=cfg.seed, step=step, prompts=batch.index, G=cfg.group_size)   # 1. act
        reward, components, look = reward_phase(run.policy, batch, r, run.judges, cfg, run.world.toy)          # 2. reward
        adv, group = advantage_phase(reward, cfg, run.ranks)                                                   # 3. compare
        look |= {f"rewards/{k}/mean": v.mean().item() for k, v in components.items()}
        look |= {"completions/mean_length": s.chosen.sum(1).float().mean().item()
                 for s in r.segments if isinstance(s, Text) and s.chosen is not None}
        mine = torch.tensor(list(look.values()), dtype=torch.float64, device=run.ranks.device)
        look = dict(zip(look, (run.ranks.total(mine) / run.ranks.world).tolist()))
        stats |= {f"{batch.task}/{k}": v for k, v in (look | group).items()}
        work.append((batch, r, adv))
    run.work = work
    if step == 0:
        stats |= {f"self_check/{k}": v for k, v in self_check(run.policy, work, cfg).items()}
    return stats | update_phase(run.policy, run.frozen, run.optimizer, work, cfg, run.ranks)                   # 4. improve


def look(run: Run, step: int) -> None:
    """Evaluate the averaged weights on held-out prompts and log it (toy only)."""
    if run.world.toy and run.cfg.eval_every and run.ranks.rank == 0 and step not in run.log.evaluated:
        with run.average.swapped(run.policy):
            table = evaluation.evaluate(run.policy)
        run.log(step=step, eval={k: [round(x, 5) if np.isfinite(x) else None for x in v] for k, v in table.items()})


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
    out, before = Path(cfg.out), copy.deepcopy(run.policy) if run.world.toy and ranks.rank == 0 else None
    look(run, run.start)
    with signals() as stop:
        bar = tqdm(range(run.start, cfg.steps), initial=run.start, total=cfg.steps, disable=ranks.rank > 0, desc=cfg.recipe)
        for step in bar:
            try:
                stats = one_step(run, step)
            except FloatingPointError as error:
                raise keep_bad_step(run, step, error) from error
            except (ValueError, OSError, rewards.RewardError):
                if ranks.rank == 0 and step > run.start:        # raised before the update: the weights are those of the step before
                    save_checkpoint(out / "checkpoint.safetensors", run, step)
                raise
            run.average.update(run.policy)
            run.log(step=step, **stats)                                                                        # 5. look
            bar.set_postfix({k.split("/")[0]: f"{v:.3f}" for k, v in stats.items() if k.endswith("/reward") or k == "loss"})
            done, halt = step + 1, bool(ranks.total(torch.tensor([len(stop)], device=ranks.device)).item())
            if ranks.rank == 0 and (halt or done == cfg.steps or cfg.save_every and done % cfg.save_every == 0):
                save_checkpoint(out / "checkpoint.safetensors", run, done)                                     # 6. keep
            if halt:
                tqdm.write(f"stopped after step {step}, checkpoint saved; go on with --resume")
                return
            if cfg.eval_every and (done % cfg.eval_every == 0 or done == cfg.steps):
                look(run, done)
    if ranks.rank == 0:
        with run.average.swapped(run.policy):
            run.policy.save(out / "policy")
            if run.world.toy and cfg.eval_every:
                if run.start:
                    before = Policy.load(cfg.policy, device=ranks.device)
                evaluation.before_after(before, run.policy, out / "before_after.png")
        if run.world.toy and cfg.eval_every:
            evaluation.plot([run.log.path], out / "curves.png")
            print(evaluation.summary(run.log.path))


def keep_bad_step(run: Run, step: int, error: Exception) -> FloatingPointError:
    """Save the weights and the batch of a step whose loss or gradient is not finite, one file per rank."""
    path, good = Path(run.cfg.out) / f"bad_step_{run.ranks.rank}.safetensors", Path(run.cfg.out) / "checkpoint.safetensors"
    tensors = {f"policy.{n}": p for n, p in trainable(run.policy).items()} | {"step": torch.tensor(step)}
    for batch, r, adv in run.work or []:
        tensors[f"{batch.task}.adv"] = adv
        for i, s in enumerate(r.segments):
            held = vars(s) | (vars(s.flow) if getattr(s, "flow", None) else {})
            tensors |= {f"{batch.task}.{i}.{k}": v.clone() for k, v in held.items() if isinstance(v, Tensor)}
    save_tensors(tensors, path)
    return FloatingPointError(f"step {step}: {error}; stopped. Last good checkpoint: {good if good.exists() else 'none yet'}. "
                              f"The weights and the batch of this step are in {path}")


def main() -> None:
    cfg, ranks = parse(), setup()
    try:
        if cfg.recipe == "pretrain":
            from assets import pretrain
            if ranks.world > 1:
                raise ValueError("--recipe pretrain runs in one process")
            pretrain.main(Path(cfg.out))
        else:
            train(cfg, ranks)
    except (ValueError, OSError, FloatingPointError, rewards.RewardError) as error:
        sys.exit(f"train.py: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
