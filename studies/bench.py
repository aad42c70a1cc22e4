"""The memory that training at BAGEL's size needs, computed; and what a GPU does, measured.

    python -m studies.bench                     # GB on each GPU, in markdown
    python -m studies.bench gpu                 # one GPU of 80 GB or more, some minutes
    python -m studies.bench gpu --small         # the same code on the toy, in seconds, on a CPU too
"""

import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

import train
from janus import Janus, build_model, convert_config
from policy import Policy, PolicyConfig
from recipes import Config, parse
from referees.build import referee_bytes
from sample import TOY
from support.checkpoint import freeze, load_policy, reset_adapters
from support.memory import memory, peak
from support.run import Ranks, precision
from support.tables import markdown_table
from support.terminal import Arguments, first_line, one_line, the_device
from tasks import in_use

# ---- memory, computed ----


def janus_on_meta() -> Janus:
    """Janus-Pro-1B's sizes without memory, with the toy's tokenizer."""
    text = dict(
        model_type="llama", hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16, vocab_size=102400, max_position_embeddings=16384)
    config = convert_config(dict(
        language_config=text, aligner_config=dict(params=dict(n_embed=2048)),
        vision_config=dict(params=dict(model_name="siglip_large_patch16_384")),
        gen_vision_config=dict(cls="VQ-16", params=dict(image_token_size=16384, n_embed=8))))
    tokenizer = load_policy(TOY.parent / "janus").tokenizer
    with torch.device("meta"):
        return Janus(build_model(config), tokenizer)


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
    """Markdown: GB on each GPU by support.memory.

    Of BAGEL for UniGRPO by what is trained, 4 prompts on each, then for adapters under three other
    recipes; then of Janus-Pro-1B."""
    runs = []
    for title, worlds, flags in (
            ("adapters, both experts", (1,), "--lora 64"),
            ("generation expert", (1, 8), "--lora 0 --shard --lr_understanding 0"),
            ("all weights", (1, 8), "--lora 0 --shard")):
        for pixels, world in product((512, 1024), worlds):
            size = f"--prompts - --recipe unigrpo --think {4 * world} --resolution {pixels}"
            runs.append((title, world, f"{size} {flags}"))
    runs += [
        ("adapters, `unigrpo_rounds`", 1, "--prompts - --recipe unigrpo_rounds --rounds 4"),
        ("adapters, `alphagrpo`", 1, "--prompts - --recipe alphagrpo --think 4"),
        ("adapters, `alphagrpo_reflect`", 1, "--prompts - --recipe alphagrpo_reflect --reflect 4"),
        ("Janus: adapters, `corl`", 1, "--questions - --recipe corl --lora 64 "
         "--pair_image 4 --pair_text 4 --micro 2 --rollout_batch 8"),
        ("Janus: language model, `corl`", 8, "--questions - --recipe corl --shard"),
        ("Janus: language model, `corl_t2i`", 8, "--questions - --recipe corl_t2i --shard")]
    tokenizer = load_policy(TOY).tokenizer
    rows = []
    for title, world, flags in runs:
        is_janus = title.startswith("Janus")
        cfg = parse(flags.split(), scale="janus" if is_janus else "bagel")
        policy = janus_on_meta() if is_janus else release_on_meta(tokenizer)
        freeze(policy, cfg.experts, cfg.lora, cfg.checkpointing)
        need = memory(policy, cfg, world, in_use(cfg), referee_bytes(cfg))
        kept = sum(need.values()) - need["rollout"] - need["replay"]
        parts = [kept, need["rollout"], need["replay"], peak(need)]
        rows.append([title, cfg.resolution, world, *(f"{gb:.0f}" for gb in parts)])
    head = ["trained", "pixels", "GPUs", "kept", "rollout", "replay", "peak"]
    return markdown_table(head, rows)


# ---- a GPU, measured: each part prints its rows of a table ----

FLAGS = dict(
    toy="--recipe unigrpo --think 1 --group_size 4 --micro 2 --lora 4 --resolution 32 --out {0}",
    bagel="--recipe unigrpo --think 1 --group_size 4 --micro 2 --pref 0 --ins 0 --format 1 "
    "--out {0} --prompts {0}/prompts.txt")


def begin(scale: str, out: Path, device: torch.device) -> train.Run:
    """A run of the toy, or of random weights of the release's sizes, with adapters."""
    (out / "prompts.txt").write_text("a red circle and a blue square", encoding="utf-8")
    cfg = parse([flag.format(out) for flag in FLAGS[scale].split()], scale)
    prepare = train.prepare_policy if scale == "toy" else random_release
    with mock.patch.object(train, "prepare_policy", prepare):
        return train.begin(cfg, Ranks(0, 1, device))


def random_release(cfg: Config, ranks: Ranks) -> Policy:
    policy = release_on_meta(load_policy(TOY).tokenizer).bfloat16()
    policy.autoencoder.float()
    freeze(policy, cfg.experts, cfg.lora, cfg.checkpointing)
    policy.to_empty(device=ranks.device)
    for x in policy.state_dict().values():
        x.normal_(std=0.02)
    reset_adapters(policy)
    return policy


def clock(what: str, function: Callable, *args):
    """Call a function twice, since the first call may build something; print seconds and peak."""
    cuda = torch.cuda.is_available()
    for call in ("first", "again"):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        out = function(*args)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak_gb = torch.cuda.max_memory_allocated() / 1e9
        print(f"| {what}, {call} | {seconds:.3f} s, {peak_gb:.1f} GB |", flush=True)
    return out


def parity(run: train.Run) -> None:
    """A step of the toy on the CPU and on the device, from the same random numbers."""
    for device in (torch.device("cpu"), run.ranks.device):
        with TemporaryDirectory() as out:
            stats = train.one_step(begin("toy", Path(out), device), 0)
        for name in ("loss", "grad_norm"):
            print(f"| the toy's {name}, {device.type} | {stats[name]:.6f} |")


def acting(run: train.Run) -> None:
    """Read a prompt, write a thought, and denoise a step, by the size of the batch."""
    policy = run.policy
    device = run.ranks.device
    size = (run.cfg.resolution,) * 2
    W = run.cfg.think_tokens
    for N in (1, 4, 8, 24, 96):
        tokens = torch.full((N, W), 9, device=device)
        uniforms = torch.rand(N, W, device=device)
        x = policy.encode(torch.zeros(N, 3, *size))
        with torch.no_grad(), precision(run.cfg, device):
            _, context = clock(
                f"read {N} x {W} tokens", policy.append_text, policy.empty(N), tokens)
            clock(f"write {N} x {W} tokens", policy.sample_text, context, uniforms)
            clock(f"denoise {N} images", policy.velocity, context, x, 0.7, size)


def step(run: train.Run) -> None:
    """The phases of a step, and the peak that support.memory computes for the worst."""
    (batch,) = run.source.batches(0, run.ranks)
    rollout = clock("act", train.act, run, batch)
    parts = [clock("reward", train.reward, run, batch, rollout)]
    train.compare(parts, run.cfg, run.ranks)
    clock("self-check", train.self_check, run, parts)
    clock("improve", train.improve, run, parts)
    need = memory(run.policy, run.cfg, 1, in_use(run.cfg))
    print(f"| improve, computed | {peak(need):.1f} GB |")


PARTS = parity, acting, step


def measure_gpu(small: bool) -> bool:
    """Print the table; False if a part failed."""
    if the_device().type == "cpu" and not small:
        raise ValueError("no GPU here; --small tries the same code on the toy")
    fine = True
    with TemporaryDirectory() as out:
        run = begin("toy" if small else "bagel", Path(out), the_device())
        print(f"| {run.ranks.device.type}, torch {torch.__version__} | measured |\n| --- | --- |")
        for part in PARTS:
            try:
                part(run)
            except (RuntimeError, ValueError, OSError, ArithmeticError) as error:
                fine = False
                print(f"| {part.__name__} | failed: {first_line(error)} |")
    return fine


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.bench", description="Compute memory, or measure a GPU.")
    ap.add_argument("what", nargs="?", choices=["memory", "gpu"], default="memory")
    ap.add_argument("--small", action="store_true", help="gpu: the toy, on any machine")
    a = ap.parse_args(argv)
    with one_line("studies.bench"):
        if a.what == "memory":
            print(memory_table())
        elif not measure_gpu(a.small):
            sys.exit(1)


if __name__ == "__main__":
    main()
