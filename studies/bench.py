"""What it costs: the speed ratios of sharing, batching and caching; seconds and memory at BAGEL's size.

    python -m studies.bench                                          # what sharing, batching and caching save, as ratios in one run
    python -m studies.bench memory                                   # GB per GPU that training BAGEL's sizes needs, computed
    python -m studies.bench rewards                                  # milliseconds per image of each reward; takes train.py's flags

The plain ways stand here beside the fast ones, as their oracles.
"""

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import torch

import flow_grpo
from eval import SHIFT, SIZE
from grpo import token_logp
from policy import Policy, PolicyConfig
from recipes import parse
from referees.build import BUILD, LOADS, Models, referee_bytes
from referees.questions import Questions
from rewards import REWARDS, Samples, score
from sample import TOY, Draw, Read, Text, replay_rollout, sample_plan
from support.checkpoint import freeze, load_policy
from support.memory import memory, peak
from support.terminal import Arguments, one_line, the_device
from tasks import TASKS, in_use
from toy.world import detect
from toy import shapes


# ---- ratios on the toy ----

def plain_replay(policy: Policy, r) -> list[torch.Tensor]:
    """Log-probs of a think-then-draw rollout without sharing: prompt, thought and image read again for every sample and every step.

    The oracle of sample.replay_rollout: the same numbers, the same gradients, more seconds. Returns [text (N, L), image (N, W)]."""
    prompt, thought, drawn = r.segments
    tokens, mask = (z.repeat_interleave(r.G, 0) for z in (prompt.tokens, prompt.mask))
    flow, start, images = drawn.flow, drawn.flow.window[0], []
    for w in range(flow.logp.shape[1]):
        _, context = policy.append_text(policy.empty(len(tokens)), tokens, mask)
        logits, context = policy.append_text(context, thought.tokens, thought.mask)
        v = policy.velocity(context, flow.latents[:, w].contiguous(), flow.times[start + w], drawn.size)
        mean, std = flow_grpo.transition(flow.latents[:, w], v, flow.times[start + w], flow.times[start + w + 1],
                                         noise_level=flow.noise_level, kind=flow.kind)
        images.append(flow_grpo.gaussian_logp(flow.latents[:, w + 1], mean, std))
    text = torch.where(thought.chosen[:, 1:], token_logp(logits[:, :-1], thought.tokens[:, 1:]), 0.0)
    return [torch.nn.functional.pad(text, (1, 0)), torch.stack(images, 1)]


def plain_text(policy: Policy, context, uniforms: torch.Tensor) -> torch.Tensor:
    """Sampled tokens (N, L) without a cache: all tokens so far are read again for each next one. Oracle of Policy.sample_text."""
    tokens = torch.full((len(uniforms), 1), policy.start, device=policy.device)
    for i in range(uniforms.shape[1]):
        logits, _ = policy.append_text(context, tokens)
        below = logits[:, -1].float().softmax(-1).cumsum(-1) <= uniforms[:, i, None]
        tokens = torch.cat([tokens, below.sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)], dim=1)
    return tokens[:, 1:]


def bench_case(name: str, policy: Policy):
    """The work of one variant as a function of no arguments."""
    G, W = 8, 5
    prompts = [m["prompt"] for m in shapes.prompts("eval")[:16]]
    draw = Draw(SIZE, flow_grpo.time_grid(6, SHIFT), (0, W), 0.8, "cps")
    if name.startswith("replay"):
        r = sample_plan(policy, [Read(prompts), draw], seed=0, step=0, prompts=list(range(16)), G=G)
        words = torch.randint(8, policy.config.llm["vocab_size"], (16 * G, 66), generator=torch.Generator().manual_seed(0))
        words[:, 0], words[:, -1] = policy.start, policy.end
        read = torch.ones_like(words, dtype=torch.bool)
        thought = Text(*(z.to(policy.device) for z in (words, read, read.clone(), torch.zeros(words.shape))))
        r = replace(r, segments=(r.segments[0], thought, r.segments[1]))

        def work():
            policy.zero_grad()
            out = plain_replay(policy, r) if name.endswith("plain") else \
                [s.logp if s.logp is not None else s.flow.logp for s in replay_rollout(policy, r)]
            sum(x.sum() for x in out).backward()
        return work
    if name.startswith("group"):
        plan = [Read(prompts[:1]), draw]
        if name.endswith("plain"):
            return lambda: [sample_plan(policy, plan, seed=0, step=0, prompts=[i], G=1) for i in range(16)]
        return lambda: sample_plan(policy, plan, seed=0, step=0, prompts=[0], G=16)
    with torch.no_grad():
        _, context = policy.append_text(policy.empty(16), *policy.encode_text(prompts))
    uniforms = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)).to(policy.device)

    def write():
        with torch.no_grad(), never_ends(policy):
            return plain_text(policy, context, uniforms) if name.endswith("plain") else policy.sample_text(context, uniforms)
    return write


@contextlib.contextmanager
def never_ends(policy: Policy):
    """Let sampled texts run to their full length, so that every variant does the same work."""
    sample, end = policy.sample_text, policy.end

    def full_length(*inputs):
        policy.end = -1
        try:
            return sample(*inputs)
        finally:
            policy.end = end

    policy.sample_text = full_length
    try:
        yield
    finally:
        del policy.sample_text


def bench_variant(name: str, folder: str, least: int = 5, enough: float = 5.0) -> dict:
    """Least seconds of one variant after a warm-up, since a busy machine only adds, of at least `least` repeats and `enough` seconds; and
    the MB that the work adds to the process's peak (CUDA: the peak allocated on the device)."""
    device = the_device()
    work, resident = bench_case(name, load_policy(folder, device=device)), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    base = resident()
    work()
    runs = []
    while len(runs) < least or sum(seconds for seconds, _ in runs) < enough:
        runs.append(timed(device, work)[:2])
    peak = max(gb for _, gb in runs) * 1e9 / 2**20 if device.type == "cuda" else resident() - base
    return dict(seconds=min(seconds for seconds, _ in runs), work=peak)


BENCHES = {"replay": "replay, thought of 64 tokens read once for all 5 steps (16 prompts, G=8)",
           "group": "sampling a group of 16 at once", "text": "64 tokens with a key-value cache"}


def bench(folder: str, rounds: int = 5) -> str:
    """Markdown rows: what each idea saves against doing it plainly. Every variant runs in a process of its own, the two by turns, because
    a machine's pace drifts; medians over the rounds, and the smallest and largest ratio of a round."""
    rows = ["| what | plain s | ours s | ratio (rounds) | plain MB | ours MB |", "|---|---|---|---|---|---|"]
    for name, title in BENCHES.items():
        both = {"plain": [], "shared": []}
        for variant in list(both) * rounds:
            command = [sys.executable, __file__, "--policy", folder, "--variant", f"{name}-{variant}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"variant {name}-{variant}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
            both[variant].append(json.loads(done.stdout.splitlines()[-1]))
        plain, ours = ({key: np.array([run[key] for run in runs]) for key in ("seconds", "work")} for runs in both.values())
        ratios = plain["seconds"] / ours["seconds"]
        rows.append(f"| {title} | {np.median(plain['seconds']):.3f} | {np.median(ours['seconds']):.3f} | "
                    f"{np.median(ratios):.1f}x ({ratios.min():.1f}-{ratios.max():.1f}) | +{np.median(plain['work']):.0f} | "
                    f"+{np.median(ours['work']):.0f} |")
    return "\n".join(rows)


def timed(device, work) -> tuple[float, float, object]:
    """(seconds, peak GB on the GPU, result) of work()."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    sync()
    begun = time.perf_counter()
    result = work()
    sync()
    return time.perf_counter() - begun, torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan"), result


# ---- BAGEL's size ----

def release_on_meta(tokenizer) -> Policy:
    """BAGEL-7B-MoT's sizes without memory, with the toy's tokenizer."""
    llm = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
               vocab_size=152064,               rope_theta=1e6, rms_norm_eps=1e-6)
    vit = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, patch_size=14, image_size=980, num_hidden_layers=27,
               num_channels=3, layer_norm_eps=1e-6)
    with torch.device("meta"):
        return Policy(PolicyConfig(llm, vit), tokenizer)


def memory_table() -> str:
    """Markdown rows: what `run.memory` computes on the release's sizes, GB on each GPU: UniGRPO by what is trained, then adapters under
    the other recipes that draw. 4 prompts on each GPU."""
    tokenizer = load_policy(TOY).tokenizer
    rows = ["| trained | pixels | GPUs | kept | rollout | replay | peak |", "|---|---|---|---|---|---|---|"]

    def row(name: str, pixels: int, world: int, flags: list[str]) -> str:
        cfg = parse(["--scale", "bagel", "--prompts", "-", "--resolution", str(pixels), *flags])
        policy = release_on_meta(tokenizer)
        freeze(policy, cfg.experts, cfg.lora, cfg.checkpointing)
        need = memory(policy, cfg, world, {name: TASKS[name] for name in in_use(cfg)}, referee_bytes(cfg))
        kept = sum(v for k, v in need.items() if k not in ("rollout", "replay"))
        told = [f"{gb:.0f}" for gb in (kept, need["rollout"], need["replay"], peak(need))]
        return f"| {name} | {pixels} | {world} | {' | '.join(told)} |"

    for name, flags in (("adapters, both experts", ["--lora", "64"]),
                        ("generation expert", ["--lora", "0", "--experts", "generation", "--shard"]),
                        ("all weights", ["--lora", "0", "--shard"])):
        for pixels in (512, 1024):
            for world in (1, 8):
                rows.append(row(name, pixels, world, ["--recipe", "unigrpo", "--think", str(4 * world), *flags]))
    for recipe, task in (("unigrpo_rounds", "rounds"), ("alphagrpo", "think"), ("alphagrpo_reflect", "reflect")):
        rows.append(row(f"adapters, `{recipe}`", 512, 1, ["--recipe", recipe, f"--{task}", "4"]))
    return "\n".join(rows)


def bench_rewards(flags: list[str], images: int = 32) -> str:
    """Markdown: seconds to load and milliseconds per image of each reward of drawn images that train.py's flags give a weight (on the toy,
    without flags, all that it can ask), on random pictures; least of three calls. Rewards that share a model load it once."""
    toy = ["--likeness", "1", "--recaption", "1", "--dvreward", "1", "--tifa", "1", "--dense", "1", "--pair_image", "1"]
    cfg, device = parse(flags or toy), the_device()
    exact = None if cfg.detector else detect                    # the toy's; BAGEL's scale has one by name
    first, second = ("circle", "square") if exact else ("cat", "dog")
    named = {"tag": "two_object", "include": [{"class": first, "count": 1, "color": "red"}, {"class": second, "count": 1}]}
    pictures = torch.rand(images, 3, cfg.resolution, cfg.resolution, generator=torch.Generator().manual_seed(0)).to(device)
    samples = Samples([f"a red {first} and a {second}"] * images, [named] * images, images=pictures, reals=pictures)
    models = Models(cfg, device, exact, [named], questions=Questions(cfg.dv, True))
    rows = ["| reward | model | seconds to load | ms per image |", "|---|---|---|---|"]
    for name, weight in cfg.weights.items():
        entry = REWARDS[name]
        if not weight or not any(set(read) <= {"images", "reals"} for read in entry.reads) or name == "tim":  # tim asks the policy
            continue
        start = time.perf_counter()
        reward = BUILD[name](models)
        score({name: reward}, samples)
        load, each = time.perf_counter() - start, []
        for _ in range(3):
            start = time.perf_counter()
            score({name: reward}, samples)              # to the CPU, so that what was started has ended
            each.append(time.perf_counter() - start)
        asked = [] if exact and name == "ins" else LOADS.get(name, "").split()
        model = ", ".join(str(getattr(cfg, key)).removeprefix(f"{TOY.parents[1]}/") for key in asked)
        rows.append(f"| `{name}` | {model or '-'} | {load:.2f} | {min(each) / images * 1000:.2f} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.bench", description="Measure speed and memory; rewards take train.py's flags.", allow_abbrev=False)
    ap.add_argument("what", nargs="?", default="speed", choices=["speed", "memory", "rewards"])
    ap.add_argument("--policy", default=str(TOY), help="a policy folder")
    ap.add_argument("--variant", help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["rewards"]:
        with one_line("studies.bench"):
            print(bench_rewards(argv[1:]))
        return
    a = ap.parse_args(argv)
    with one_line("studies.bench"):
        if a.what == "memory":
            print(memory_table())
        elif a.variant:
            print(json.dumps(bench_variant(a.variant, a.policy)))
        else:
            print(bench(a.policy))


if __name__ == "__main__":
    main()
