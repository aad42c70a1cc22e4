"""Evaluation: fixed held-out prompts and questions, ODE sampling, greedy text; plots of logs; the speed ratios.

    python eval.py --policy out/policy                       # a table by GenEval tag and question kind, with standard errors
    python eval.py plot out/log.jsonl control/log.jsonl      # curves of one or several runs
    python eval.py bench                                     # what sharing, batching and caching save, as ratios in one run
    python eval.py memory                                    # GB per GPU that training BAGEL's sizes needs, computed
    python eval.py bench --policy 7b                         # a policy of BAGEL's size: images, tokens, one update on this GPU

Truth is the exact detector of shapes.py through GenEval's checker; the recipes' reward "ins" is built on the same two, the others are
not. Standard errors are over prompts (their samples are not independent); the mean over tags weighs tags equally, as GenEval does; the
error of a change treats the two evaluations as independent. Every number comes from the seeds given here.
"""

import argparse
import contextlib
import json
import math
import re
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import flow_grpo
from toy import shapes
from grpo import token_logp
from policy import Guidance, Policy, PolicyConfig, read_json, write_atomic
from rewards import geneval_check
from sample import TOY, Arguments, Draw, Read, See, Text, Write, images_of, replay, rollout, scale_of, texts_of, to_bytes

KINDS = ("count", "color", "shape", "exists", "relation")
PROMPTS_PER_TAG, SAMPLES, THOUGHTS, QUESTIONS, ODE_STEPS, SHIFT, SIZE = 32, 8, 96, 1000, 10, 2.0, (32, 32)


def rendered(scenes: list[shapes.Scene]) -> torch.Tensor:
    """Scenes as the policy reads their pictures: (N, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(np.stack([shapes.render(s) for s in scenes])).permute(0, 3, 1, 2) / 127.5 - 1


def detector(images: torch.Tensor) -> list[list[dict]]:
    """The toy's exact detector on (N, 3, 32, 32) in [0, 1]."""
    return shapes.detect(to_bytes(images))


def truth(metadata: list[dict], detections: list[list[dict]]) -> np.ndarray:
    """1.0 where GenEval's checker passes, per sample (N,)."""
    return np.array([float(geneval_check(m, found)[0]) for m, found in zip(metadata, detections)])


def spaced(rows: list, n: int) -> list:
    """n rows evenly spaced in the list; all where it has fewer."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, n).round().astype(int))]


def held_out_prompts(pairs: bool = False) -> list[dict]:
    """Evaluation prompts, none of which is trained on: at most PROMPTS_PER_TAG of every tag whose (colour, shape) pairs occur in training
    (3, 6, 9, 15, 32, 32), or, pairs=True, as many of all tags together that name a pair that training never shows.

    Another phrasing of the same meaning is trained on, but for three in ten of position and nearly half of color_attr (`shapes.prompts`)."""
    pool = [m for m in shapes.prompts("eval") if ("held_out" in m) == pairs]
    if pairs:
        return spaced(pool, PROMPTS_PER_TAG)
    return [m for tag in shapes.TAGS for m in spaced([m for m in pool if m["tag"] == tag], PROMPTS_PER_TAG)]


def held_out_questions(pairs: bool = False, seed: int = 7):
    """(scenes, questions): QUESTIONS scenes that training never asks about, one question each, kinds in turn; with pairs=True half as
    many, each with a (colour, shape) pair that training never shows."""
    rng, scenes, questions = np.random.default_rng(seed), [], []
    while len(questions) < QUESTIONS // (1 + pairs):
        kind, scene = KINDS[len(questions) % len(KINDS)], shapes.random_scene(rng, "eval")
        if any((o.color, o.shape) in shapes.HELD_OUT for o in scene) == pairs and kind in shapes.question_kinds(scene):
            scenes.append(scene)
            questions.append(shapes.make_question(scene, rng, kind, training=False))
    return scenes, questions


def mean_and_error(values) -> tuple[float, float]:
    values = np.asarray(values, dtype=float)
    return values.mean().item(), (values.std(ddof=1) / math.sqrt(len(values))).item() if len(values) > 1 else float("nan")


def draw_eval(policy: Policy, metadata: list[dict], think: bool, seed: int, samples: int = SAMPLES):
    """Samples of every prompt, prompt-major: (images (N, 3, H, W) in [0, 1], texts or None)."""
    plan = [Read([m["prompt"] for m in metadata])] + [Write(24, temperature=0.0)] * think
    plan.append(Draw(SIZE, flow_grpo.time_grid(ODE_STEPS, SHIFT)))
    r = rollout(policy, plan, seed=seed, step=0, prompts=list(range(len(metadata))), G=samples)
    return images_of(policy, r), texts_of(policy, r)


def answer_eval(policy: Policy, scenes, questions, batch: int = 500) -> list[str]:
    """Greedy answers to the questions about the rendered scenes."""
    out = []
    for i in range(0, len(scenes), batch):
        pixels = rendered(scenes[i:i + batch])
        plan = [See(pixels), Read([q["question"] for q in questions[i:i + batch]]), Write(4, temperature=0.0)]
        out += texts_of(policy, rollout(policy, plan, seed=0, step=0, prompts=list(range(len(pixels))), G=1))
    return out


def drawn_truth(policy: Policy, metadata: list[dict], seed: int):
    """(share of true samples per prompt (B,), images, detections) of prompts drawn at once."""
    images, _ = draw_eval(policy, metadata, think=False, seed=seed)
    found = detector(images)
    return truth([m for m in metadata for _ in range(SAMPLES)], found).reshape(-1, SAMPLES).mean(1), images, found


def evaluate(policy: Policy, seed: int = 1234) -> dict[str, tuple[float, float]]:
    """name -> (mean, standard error): draw/<tag>, draw, think, thought, ask/<kind>, ask, the variety of draw within groups, and draw and
    ask on pairs that training never shows (held_out)."""
    table, metadata = {}, held_out_prompts()
    right, images, found = drawn_truth(policy, metadata, seed)
    for tag in shapes.TAGS:
        table[f"draw/{tag}"] = mean_and_error([r for r, m in zip(right, metadata) if m["tag"] == tag])
    parts = [table[f"draw/{tag}"] for tag in shapes.TAGS]
    table["draw"] = (float(np.mean([m for m, _ in parts])), math.sqrt(sum(e * e for _, e in parts)) / len(parts))
    table["draw/held_out"] = mean_and_error(drawn_truth(policy, held_out_prompts(pairs=True), seed + 2)[0])
    table |= {name: (value, float("nan")) for name, value in shapes.diversity(to_bytes(images), found, SAMPLES).items()}
    implicit = spaced([m for m in shapes.implicit_prompts("eval") if "held_out" not in m], THOUGHTS)
    images, texts = draw_eval(policy, implicit, think=True, seed=seed + 1, samples=4)
    table["think"] = mean_and_error(truth([m for m in implicit for _ in range(4)], detector(images)).reshape(-1, 4).mean(1))
    table["thought"] = mean_and_error([float(t == m["thought"]) for t, m in zip(texts[::4], implicit)])
    scenes, questions = held_out_questions()
    right = [float(a.strip() == q["answer"]) for a, q in zip(answer_eval(policy, scenes, questions), questions)]
    for kind in KINDS:
        table[f"ask/{kind}"] = mean_and_error([r for r, q in zip(right, questions) if q["kind"] == kind])
    table["ask"] = mean_and_error(right)
    scenes, questions = held_out_questions(pairs=True)
    table["ask/held_out"] = mean_and_error([a.strip() == q["answer"] for a, q in zip(answer_eval(policy, scenes, questions), questions)])
    return table


def print_table(table: dict[str, tuple[float, float]]) -> str:
    """The table as text, one row a name."""
    return "\n".join(f"{name:<22} {mean:.3f}" + (f" +- {error:.3f}" if math.isfinite(error) else "") for name, (mean, error) in table.items())


def markdown_row(name: str, table: dict[str, tuple[float, float]]) -> str:
    cell = lambda k: f"{table[k][0]:.3f} ± {table[k][1]:.3f}" if math.isfinite(table[k][1]) else f"{table[k][0]:.2f}"
    columns = ("draw", "think", "ask", "draw/held_out", "ask/held_out", "layout_entropy", "pairwise_distance")
    return f"| {name} | " + " | ".join(map(cell, columns)) + " |"


# ---- pictures ----


def read_log(path: Path) -> tuple[dict, list[dict]]:
    """A log's first record and the others. A torn last line, as a crash leaves it, is dropped."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not rows or not all(isinstance(row, dict) for row in rows) or "config" not in rows[0]:
        raise ValueError(f"{path} is not a log of train.py: its first line must hold the config")
    return rows[0], rows[1:]


def plot(paths: list[Path], out: Path) -> None:
    """Held-out truth with two standard errors, within-group variety, and the training reward, over minutes; one colour a run."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    panels = (("draw", "text to image"), ("think", "think, then draw"), ("ask", "questions"), ("layout_entropy", "layout entropy, bits"))
    figure, axes = plt.subplots(1, len(panels) + 1, figsize=(17, 3.4), layout="constrained")
    for n, path in enumerate(paths):
        head, rows = read_log(path)
        looks = [r for r in rows if "eval" in r]
        if not looks or any(key not in r["eval"] for r in looks for key, _ in panels):
            raise ValueError(f"{path} holds no evaluation to plot")
        minutes = [r["seconds"] / 60 for r in looks]
        name = f"{head['config']['recipe']}, seed {head['config']['seed']}"
        for axis, (key, title) in zip(axes, panels):
            mean, error = np.array([[np.nan if x is None else x for x in r["eval"][key]] for r in looks], dtype=float).T
            axis.plot(minutes, mean, marker="o", markersize=3, color=f"C{n}", label=name,
                      linestyle="--" if head["config"]["recipe"] == "control" else "-")
            if np.isfinite(error).all():
                axis.fill_between(minutes, mean - 2 * error, mean + 2 * error, color=f"C{n}", alpha=0.15, linewidth=0)
            axis.set(title=title, xlabel="minutes")
            axis.spines[["top", "right"]].set_visible(False)
        steps = [r for r in rows if "eval" not in r]
        keys = [k for k in (steps[0] if steps else {}) if re.fullmatch(r"\w+/reward", k)]
        if keys:
            reward = np.array([[r[k] for k in keys] for r in steps]).mean(1)
            axes[-1].plot([r["seconds"] / 60 for r in steps], reward / reward[:5].mean(), color=f"C{n}", linewidth=1)
    axes[-1].set(title="training reward, start = 1", xlabel="minutes")
    axes[-1].spines[["top", "right"]].set_visible(False)
    for axis in axes[:3]:
        axis.set_ylim(0, 1)
    axes[0].set_ylabel("held-out truth")
    axes[3].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def before_after(before: Policy, after: Policy, out: Path, per_prompt: int = 6, seed: int = 99) -> None:
    """The same held-out prompts and seeds drawn by two policies side by side; a green bar marks what the detector finds true."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plain = [spaced([m for m in held_out_prompts() if m["tag"] == tag], 3)[1] for tag in shapes.TAGS]
    implicit = spaced([m for m in shapes.implicit_prompts("eval") if "held_out" not in m], 4)[1:3]
    grids = []
    for policy in (before, after):
        drawn, _ = draw_eval(policy, plain, False, seed, per_prompt)
        thought, texts = draw_eval(policy, implicit, True, seed, per_prompt)
        images, metadata = torch.cat([drawn, thought]), [m for m in plain + implicit for _ in range(per_prompt)]
        grids.append((to_bytes(images), truth(metadata, detector(images)), texts[::per_prompt]))
    rows = len(plain) + len(implicit)
    figure, axes = plt.subplots(rows, 2 * per_prompt + 1, figsize=(11, 0.92 * rows), width_ratios=[1] * per_prompt + [0.35] + [1] * per_prompt)
    for axis in axes.flat:
        axis.set_axis_off()
    for side, (images, right, texts) in enumerate(grids):
        for i, (image, ok) in enumerate(zip(images, right)):
            row, column = divmod(i, per_prompt)
            axis = axes[row, column + side * (per_prompt + 1)]
            axis.imshow(image, interpolation="nearest")
            axis.plot([0, 31], [32.6, 32.6], color="tab:green" if ok else "tab:red", linewidth=3, clip_on=False)
        for row, m in enumerate(plain + implicit):
            title = m["prompt"] if row < len(plain) else f"{m['prompt']}   ->   {texts[row - len(plain)]}"
            axes[row, side * (per_prompt + 1)].set_title(title, fontsize=6.5, loc="left", pad=2.5)
        axes[0, side * (per_prompt + 1)].annotate(("before", "after")[side], (0, 1.5), xycoords="axes fraction", fontsize=11, weight="bold")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=0.93, wspace=0.06, hspace=0.42)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def summary(path: Path) -> str:
    """A run's first and last evaluation beside each other."""
    _, rows = read_log(path)
    looks = [r for r in rows if "eval" in r]
    if not looks:
        return f"{path} holds no evaluation"
    (first, last), minutes = (looks[0]["eval"], looks[-1]["eval"]), looks[-1]["seconds"] / 60
    lines = [f"held-out truth after {minutes:.1f} minutes    before     after    change"]
    for name in last:
        (a, ea), (b, eb) = first[name], last[name]
        error = "" if ea is None else f" +- {math.hypot(ea, eb):.3f}"
        lines.append(f"  {name:<26} {a:9.3f} {b:9.3f} {b - a:+9.3f}{error}")
    return "\n".join(lines)


# ---- speed ----


def plain_replay(policy: Policy, r) -> list[torch.Tensor]:
    """Log-probs of a think-then-draw rollout without sharing: prompt, thought and image read again for every sample and every step.

    The oracle of sample.replay: the same numbers, the same gradients, more seconds. Returns [text (N, L), image (N, W)]."""
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
        r = rollout(policy, [Read(prompts), draw], seed=0, step=0, prompts=list(range(16)), G=G)
        words = torch.randint(8, policy.config.llm["vocab_size"], (16 * G, 66), generator=torch.Generator().manual_seed(0))
        words[:, 0], words[:, -1] = policy.start, policy.end
        read = torch.ones_like(words, dtype=torch.bool)
        thought = Text(*(z.to(policy.device) for z in (words, read, read.clone(), torch.zeros(words.shape))))
        r = replace(r, segments=(r.segments[0], thought, r.segments[1]))

        def work():
            policy.zero_grad()
            out = plain_replay(policy, r) if name.endswith("plain") else \
                [s.logp if s.logp is not None else s.flow.logp for s in replay(policy, r)]
            sum(x.sum() for x in out).backward()
        return work
    if name.startswith("group"):
        plan = [Read(prompts[:1]), draw]
        if name.endswith("plain"):
            return lambda: [rollout(policy, plan, seed=0, step=0, prompts=[i], G=1) for i in range(16)]
        return lambda: rollout(policy, plan, seed=0, step=0, prompts=[0], G=16)
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    work, resident = bench_case(name, Policy.load(folder, device=device)), lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
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
            command = [sys.executable, __file__, "bench", "--policy", folder, "--variant", f"{name}-{variant}"]
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


def release_on_meta(tokenizer) -> Policy:
    """BAGEL-7B-MoT's sizes without memory, with the toy's tokenizer."""
    llm = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064,
               rope_theta=1e6, rms_norm_eps=1e-6)
    vit = dict(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, patch_size=14, image_size=980, num_hidden_layers=27,
               num_channels=3, layer_norm_eps=1e-6)
    with torch.device("meta"):
        return Policy(PolicyConfig(llm, vit), tokenizer)


def random_release(device) -> Policy:
    """The release's sizes with random weights: 29 GB in bf16, for measuring only. ValueError without a GPU."""
    if device.type != "cuda":
        raise ValueError("--policy 7b measures 29 GB of weights on a GPU, and PyTorch finds none")
    release = release_on_meta(Policy.load(TOY).tokenizer).bfloat16().to_empty(device=device).requires_grad_(False).eval()
    with torch.no_grad():
        for name, p in release.named_parameters():
            p.fill_(1.0) if "norm" in name and name.endswith("weight") else p.normal_(std=0.02)
        for name in ("latent_positions", "vit_positions"):
            getattr(release, name).normal_(std=0.02)
    return release


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


def ceilings(device, dtype) -> tuple[float, float]:
    """Measured best of five: (products of square matrices in FLOP/s, copies of memory in bytes/s, read and written)."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = min(timed(device, lambda: a @ b)[0] for _ in range(6))
    big = torch.empty(side * side * 4, device=device, dtype=dtype)
    copy = min(timed(device, lambda: big.clone())[0] for _ in range(6))
    return 2 * side**3 / product, 2 * big.numel() * big.element_size() / copy


def bench_release(policy: Policy, *, size: int = 512, steps: int = 49, batches: tuple[int, ...] = (1, 4, 16), words: int = 256, G: int = 8) -> str:
    """Markdown rows of a large policy: text to image by batch (the batch of one is the official order), one UniGRPO update with adapters,
    text decoding. FLOP of a replay: 2 per weight and token forward, 2 backward (adapters need no gradient of the frozen weights), and the
    attention's; recomputation is not counted as useful."""
    import train
    device, c = policy.device, policy.config.llm
    rows, prompt = ["| what | seconds | rate | peak GB |", "|---|---|---|---|"], "a red circle left of a blue square"
    flops, bandwidth = ceilings(device, policy.embed.weight.dtype)
    rows.append(f"| ceilings | | {flops / 1e12:.1f} TFLOP/s of products, {bandwidth / 1e9:.0f} GB/s of copies | |")
    times, guidance, alone = flow_grpo.time_grid(steps, 3.0), Guidance(4.0), None
    plan = [Read([prompt]), Draw((size, size), times)]
    rollout(policy, [Read([prompt]), Draw((size, size), times[[0, -1]])], seed=0, step=0, prompts=[0], G=1)              # warm-up
    for n in batches:
        seconds, peak, _ = timed(device, lambda: images_of(policy, rollout(policy, plan, seed=0, step=0, prompts=[0], G=n, guidance=guidance)))
        alone = alone or seconds / n
        rows.append(f"| text to image, {size} px, {steps} steps, guidance 4, batch {n} | {seconds:.2f} | {60 * n / seconds:.1f} images/min, "
                    f"{alone * n / seconds:.2f}x one by one | {peak:.1f} |")
    with torch.no_grad(), never_ends(policy):
        _, context = policy.append_text(policy.empty(16), *policy.encode_text([prompt] * 16))
        uniforms = torch.rand(16, words, generator=torch.Generator().manual_seed(0)).to(device)
        policy.sample_text(context, uniforms[:, :4])
        seconds, peak, _ = timed(device, lambda: policy.sample_text(context, uniforms))
    expert = lambda e: sum(p.numel() for block in policy.blocks for p in block.experts[e].parameters())
    read = (expert(0) + policy.head.weight.numel()) * policy.head.weight.element_size()
    rows.append(f"| text, batch 16, {words} tokens | {seconds:.2f} | {16 * words / seconds:.0f} tokens/s, weights read at "
                f"{read * words / seconds / bandwidth:.0%} of the copies' rate | {peak:.1f} |")
    cfg = train.parse(["--recipe", "unigrpo", "--scale", "bagel", "--think", "1", "--ask", "0", "--group_size", str(G), "--think_tokens", str(words),
                       "--resolution", str(size), "--micro", str(G), "--epochs", "1", "--no-system_prompt", "--prompts", "-"])
    understanding, generation, head = expert(0), expert(1), policy.head.weight.numel()
    train.freeze(policy, cfg)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-6)
    draw = Draw((size, size), flow_grpo.time_grid(cfg.denoise_steps, cfg.shift), (0, cfg.window), cfg.noise_level, cfg.sampler)
    batch = train.Batch("think", 0, [Read([prompt]), Write(words), draw], [{}], [prompt], [0], range(G))
    with never_ends(policy):
        seconds, peak, r = timed(device, lambda: train.act(policy, batch, cfg))
    rows.append(f"| UniGRPO, G={G}: rollout of {words} tokens and {cfg.denoise_steps} steps | {seconds:.2f} | | {peak:.1f} |")
    adv, ranks = torch.linspace(-1, 1, G, device=device), train.Ranks(0, 1, device)
    for i in range(2):                                          # the first warms up
        seconds, peak, _ = timed(device, lambda: train.update_phase(policy, None, optimizer, [(batch, r, adv)], cfg, ranks))
    step, _, _ = timed(device, optimizer.step)
    L, M = r.segments[0].tokens.shape[1] + words + 2, policy.latent_grid((size, size), 1)[0].shape[1]
    attention = 4 * c["num_hidden_layers"] * c["hidden_size"] * (L * L / 2 + cfg.window * M * (L + M))
    forward = 2 * (understanding * L + head * words + generation * cfg.window * M) + attention
    useful = G * forward * (2 + 1)                              # forward, backward, and the reference's forward
    rows.append(f"| UniGRPO, G={G}: replay, backward, reference, optimiser ({step:.2f} s of it) | {seconds:.2f} | "
                f"{useful / seconds / flops:.0%} of the products' ceiling | {peak:.1f} |")
    return "\n".join(rows)


def memory_table() -> str:
    """Markdown rows: what `train.memory` computes for UniGRPO on the release's sizes, GB on each GPU."""
    import train
    tokenizer, rows = Policy.load(TOY).tokenizer, ["| trained | pixels | GPUs | kept | rollout | replay | peak |", "|---|---|---|---|---|---|---|"]
    for name, flags in (("adapters, both experts", ["--lora", "64"]), ("generation expert", ["--lora", "0", "--experts", "generation", "--shard"]),
                        ("all weights", ["--lora", "0", "--shard"])):
        for pixels in (512, 1024):
            for world in (1, 8):
                cfg = train.parse(["--recipe", "unigrpo", "--scale", "bagel", "--prompts", "-", "--resolution", str(pixels),
                                   "--think", str(4 * world), *flags])
                policy = release_on_meta(tokenizer)
                train.freeze(policy, cfg)
                need = train.memory(policy, cfg, world)
                kept = sum(v for k, v in need.items() if k not in ("rollout", "replay"))
                rows.append(f"| {name} | {pixels} | {world} | {kept:.0f} | {need['rollout']:.0f} | {need['replay']:.0f} | {train.peak(need):.0f} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(description="Evaluate a policy on the toy; plot logs; measure speed.", allow_abbrev=False)
    ap.add_argument("what", nargs="?", default="table", choices=["table", "plot", "bench", "memory"])
    ap.add_argument("logs", nargs="*", type=Path, help="log.jsonl files to plot")
    ap.add_argument("--policy", default=str(TOY), help='a policy folder; for bench also "7b", the release\'s sizes with random weights')
    ap.add_argument("--adapter", default="", help="a folder of adapters to put on")
    ap.add_argument("--seed", type=int, default=1234)
    ap.add_argument("--out", type=Path, help="where to write: eval.json, or curves.png")
    ap.add_argument("--variant", help=argparse.SUPPRESS)
    a = ap.parse_args(argv)
    try:
        if a.what == "plot":
            if not a.logs:
                raise ValueError("plot needs at least one log.jsonl")
            plot(a.logs, a.out or Path("curves.png"))
            print(f"curves in {a.out or 'curves.png'}")
        elif a.what == "memory":
            print(memory_table())
        elif a.what == "bench":
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            if a.variant:
                print(json.dumps(bench_variant(a.variant, a.policy)))
            elif a.policy == "7b":
                print(bench_release(random_release(device)))
            elif scale_of(read_json(Path(a.policy) / "llm_config.json").get("hidden_size", 0)) == "bagel":
                print(bench_release(Policy.load(a.policy, device=device).requires_grad_(False)))
            else:
                print(bench(a.policy))
        else:
            policy = Policy.load(a.policy, device="cuda" if torch.cuda.is_available() else "cpu", adapter=a.adapter)
            if scale_of(policy.config.llm["hidden_size"]) != "toy":
                raise ValueError("the table is of the toy world; a large policy is measured by its own benchmarks on images that sample.py draws")
            table = evaluate(policy, a.seed)
            out = a.out or Path("eval.json")
            print(f"{print_table(table)}\n\n{markdown_row(a.policy, table)}\n", flush=True)
            write_atomic(out, json.dumps({"policy": a.policy, "seed": a.seed, "table": table}, indent=1).replace("NaN", "null").encode())
            print(f"written to {out}")
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
