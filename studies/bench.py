"""What it costs: what sharing, batching and caching save, and the memory of BAGEL's size.

    python -m studies.bench                     # the plain and the fast way, by turns
    python -m studies.bench memory              # GB on each GPU, computed

The plain ways are written out here. The tests take them as the oracles of the fast ones.
"""

import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import flow_grpo
from eval import SHIFT, SIZE
from grpo import token_logp
from policy import Context, Policy, PolicyConfig
from recipes import parse
from referees.build import referee_bytes
from sample import TOY, Draw, Read, Rollout, Text, replay_rollout, sample_plan
from studies.tables import markdown_table
from support.checkpoint import freeze, load_policy
from support.memory import memory, peak
from support.terminal import Arguments, one_line
from tasks import in_use
from toy import shapes

# ---- the plain ways ----


def plain_replay(policy: Policy, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log-probs of a think-then-draw rollout without sharing -> text (N, L), image (N, W).

    Prompt, thought and image are read again for every sample and every noisy step. The oracle of
    sample.replay_rollout: the same numbers and gradients, more seconds.
    """
    prompt, thought, drawn = rollout.segments
    tokens = prompt.tokens.repeat_interleave(rollout.G, 0)                              # (N, L)
    mask = prompt.mask.repeat_interleave(rollout.G, 0)
    flow, image = drawn.flow, []
    for w in range(flow.logp.shape[1]):
        _, context = policy.append_text(policy.empty(len(tokens)), tokens, mask)
        logits, context = policy.append_text(context, thought.tokens, thought.mask)
        x, x_next = flow.latents[:, w].contiguous(), flow.latents[:, w + 1]             # (N, M, F)
        t, t_next = flow.times[flow.window[0] + w:][:2]
        v = policy.velocity(context, x, t, drawn.size)
        mean, std = flow_grpo.transition(
            x, v, t, t_next, noise_level=flow.noise_level, sampler=flow.sampler)
        image.append(flow_grpo.gaussian_logp(x_next, mean, std))                        # (N,)
    text = token_logp(logits[:, :-1], thought.tokens[:, 1:])                            # (N, L-1)
    text = torch.where(thought.chosen[:, 1:], text, 0.0)
    return F.pad(text, (1, 0)), torch.stack(image, 1)


def plain_text(policy: Policy, context: Context, uniforms: Tensor) -> Tensor:
    """Sampled tokens (N, L) without a cache: all tokens so far are read again for each next one.

    The oracle of Policy.sample_text.
    """
    tokens = torch.full((len(uniforms), 1), policy.start, device=policy.device)
    for i in range(uniforms.shape[1]):
        logits, _ = policy.append_text(context, tokens)                         # (N, i+1, V)
        cumulative = logits[:, -1].float().softmax(-1).cumsum(-1)               # (N, V)
        chosen = (cumulative <= uniforms[:, i, None]).sum(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen.clamp(max=logits.shape[-1] - 1)], dim=1)
    return tokens[:, 1:]


# ---- what is compared: each a function (policy, plain) -> the work ----

PROMPTS = [metadata["prompt"] for metadata in shapes.prompts("eval")[:16]]
DRAW = Draw(SIZE, flow_grpo.time_grid(6, SHIFT), (0, 5), 0.8, "cps")


def replay_work(policy: Policy, plain: bool):
    """Forward and backward of 16 prompts, G = 8, with a thought of 64 tokens and 5 noisy steps."""
    index, G = list(range(len(PROMPTS))), 8
    rollout = sample_plan(policy, [Read(PROMPTS), DRAW], seed=0, step=0, prompts=index, G=G)
    words = torch.randint(8, policy.config.llm["vocab_size"], (len(PROMPTS) * G, 66),
                          generator=torch.Generator().manual_seed(0))
    words[:, 0], words[:, -1] = policy.start, policy.end
    mask = torch.ones_like(words, dtype=torch.bool)
    thought = Text(words, mask, mask.clone(), torch.zeros(words.shape))
    prompt, image = rollout.segments
    rollout = replace(rollout, segments=(prompt, thought, image))

    def work():
        policy.zero_grad()
        if plain:
            text, noisy = plain_replay(policy, rollout)
        else:
            first, second = replay_rollout(policy, rollout)
            text, noisy = first.logp, second.flow.logp
        (text.sum() + noisy.sum()).backward()
    return work


def group_work(policy: Policy, plain: bool):
    """Drawing 16 pictures of one prompt."""
    def work():
        for prompts, G in [([i], 1) for i in range(16)] if plain else [([0], 16)]:
            sample_plan(policy, [Read(PROMPTS[:1]), DRAW], seed=0, step=0, prompts=prompts, G=G)
    return work


def text_work(policy: Policy, plain: bool):
    """Sampling 64 tokens for each of 16 prompts."""
    with torch.no_grad():
        _, context = policy.append_text(policy.empty(len(PROMPTS)), *policy.encode_text(PROMPTS))
    uniforms = torch.rand(len(PROMPTS), 64, generator=torch.Generator().manual_seed(0))
    policy.end = -1                                             # no text ends early
    write = plain_text if plain else Policy.sample_text
    return torch.no_grad()(lambda: write(policy, context, uniforms))


BENCHES = {
    "replay, thought of 64 tokens read once for all 5 steps (16 prompts, G=8)": replay_work,
    "sampling a group of 16 at once": group_work,
    "64 tokens with a key-value cache": text_work,
}


def time_work(title: str, plain: bool, least: int = 5, enough: float = 5.0) -> tuple[float, float]:
    """Seconds of one way of one bench, and the MB that the work adds to this process.

    The least of at least `least` repeats and `enough` seconds, since a busy machine only adds.
    """
    work = BENCHES[title](load_policy(TOY), plain)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    times = []
    while len(times) < least or sum(times) < enough:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return min(times), (after - before) / 1024


def speed_table(rounds: int = 5) -> str:
    """Markdown: what each idea saves against the plain way, medians and the range over the rounds.

    Every measurement is a process of its own, the two ways by turns: a machine's pace drifts.
    """
    rows = []
    for title in BENCHES:
        turns = [True, False] * rounds
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            measured = list(pool.map(time_work, [title] * len(turns), turns))
        seconds, memory = np.array(measured).T                                  # (2*rounds,) each
        ratio = seconds[::2] / seconds[1::2]
        row = [title]
        row += [f"{np.median(seconds[way::2]):.3f}" for way in (0, 1)]
        row.append(f"{np.median(ratio):.1f}x ({ratio.min():.1f}-{ratio.max():.1f})")
        row += [f"+{np.median(memory[way::2]):.0f}" for way in (0, 1)]
        rows.append(row)
    head = ["what", "plain s", "ours s", "ratio (rounds)", "plain MB", "ours MB"]
    return "\n".join(markdown_table(head, rows))


# ---- BAGEL's size ----


def release_on_meta(tokenizer) -> Policy:
    """BAGEL-7B-MoT's sizes without memory, with the toy's tokenizer."""
    llm = dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, rope_theta=1e6, rms_norm_eps=1e-6)
    vit = dict(
        hidden_size=1152, intermediate_size=4304, num_attention_heads=16, patch_size=14,
        image_size=980, num_hidden_layers=27, num_channels=3, layer_norm_eps=1e-6)
    with torch.device("meta"):
        return Policy(PolicyConfig(llm, vit), tokenizer)


def memory_table() -> str:
    """Markdown: GB on each GPU by support.memory, for UniGRPO by what is trained, then for adapters
    under the other recipes that draw; 4 prompts on each GPU."""
    tokenizer, rows = load_policy(TOY).tokenizer, []

    def add(title: str, world: int, flags: str) -> None:
        cfg = parse(["--scale", "bagel", "--prompts", "-", *flags.split()])
        policy = release_on_meta(tokenizer)
        freeze(policy, cfg.experts, cfg.lora, cfg.checkpointing)
        need = memory(policy, cfg, world, in_use(cfg), referee_bytes(cfg))
        kept = sum(need.values()) - need["rollout"] - need["replay"]
        parts = [kept, need["rollout"], need["replay"], peak(need)]
        rows.append([title, f"{cfg.resolution}", f"{world}", *(f"{gb:.0f}" for gb in parts)])

    for title, flags in {"adapters, both experts": "--lora 64",
                         "generation expert": "--lora 0 --shard --lr_understanding 0",
                         "all weights": "--lora 0 --shard"}.items():
        for pixels in (512, 1024):
            for world in (1, 8):
                size = f"--recipe unigrpo --think {4 * world} --resolution {pixels}"
                add(title, world, f"{size} {flags}")
    add("adapters, `unigrpo_rounds`", 1, "--recipe unigrpo_rounds --rounds 4")
    add("adapters, `alphagrpo`", 1, "--recipe alphagrpo --think 4")
    add("adapters, `alphagrpo_reflect`", 1, "--recipe alphagrpo_reflect --reflect 4")
    head = ["trained", "pixels", "GPUs", "kept", "rollout", "replay", "peak"]
    return "\n".join(markdown_table(head, rows))


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.bench", description="Measure speed, compute memory.")
    ap.add_argument("what", nargs="?", default="speed", choices=["speed", "memory"])
    a = ap.parse_args(argv)
    with one_line("studies.bench"):
        print(memory_table() if a.what == "memory" else speed_table())


if __name__ == "__main__":
    main()
