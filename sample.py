"""Rollouts: a trajectory is a list of segments, given or chosen, and acting and learning walk it with the same calls.

    question        See(pixels), Read(questions), Write(8)
    text to image   Read(prompts), Draw(size, times, ...)
    think, draw     Read(prompts), Write(24), Draw(size, times, ...)
    edit            See(pixels, source), Read(instructions), Draw(...)
    several rounds  Read(prompts), Draw(...), Read(instructions), Write(24), Draw(...)     what was drawn is read back clean

`sample_plan` walks a plan of these and keeps, for each chosen segment, what the update needs: tokens, mask and log-probs of text; the
latents around every noisy step, means and log-probs of an image. `replay_rollout` walks the kept segments under other weights. The given
prefix is read once per prompt and repeated for the group; what a sample wrote is read once for all steps of its image.

Legend: B prompts, G samples each, N = B*G prompt-major, L text positions, M latent tokens, F features, W noisy steps.

    python sample.py "a red circle and a blue square" --n 8                     # draws a grid into samples.png
    python sample.py "as many circles as a triangle has sides" --think          # writes a thought first
    python sample.py "a blue circle" --n 1 --out one.png && python sample.py "what color is the circle ?" --question one.png
    python sample.py "make the sky red" --edit photo.png --policy BAGEL-7B-MoT  # draws an image changed
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import flow_grpo
from grpo import token_logp
from policy import Guidance, Policy, guided_velocity
from support.checkpoint import load_policy
from support.pictures import fit_size, read_picture, save_grid
from support.terminal import Arguments, one_line, the_device, utf8

TOY = Path(__file__).parent / "toy" / "policy"
# The system prompts that BAGEL was trained with for thinking before an answer and before an image.
THINK_TO_ANSWER = ("You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
                   "The reasoning process is enclosed within <think> </think> tags, i.e. "
                   "<think> reasoning process here </think> answer here")
THINK_TO_DRAW = ("You should first think about the planning process in the mind and then generate the image. \n"
                 "The planning process is enclosed within <think> </think> tags, i.e. "
                 "<think> planning process here </think> image here")

# ---- the plan of a trajectory ----


@dataclass(frozen=True)
class Read:
    """Given text, one per prompt; behind a chosen segment too, for all samples of the prompt."""

    texts: list[str]


@dataclass(frozen=True)
class See:
    """A given image per prompt: ViT patches of `pixels`, and before them the clean latents of `source`, the same image at the
    autoencoder's size, if the answer is a changed image."""

    pixels: Tensor | list[Tensor]                               # (B, 3, H, W), or B of (3, H_i, W_i), in [-1, 1]
    source: Tensor | list[Tensor] | None = None                 # the same


@dataclass(frozen=True)
class Write:
    """Text that the policy chooses, at most `length` tokens; temperature 0 is greedy."""

    length: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Draw:
    """An image that the policy chooses: noisy steps inside the window, ODE elsewhere; an empty window is plain sampling."""

    size: tuple[int, int] | list[tuple[int, int]]               # (height, width) in pixels; one per prompt only with an empty window
    times: Tensor                                               # (K+1,) flow_grpo.time_grid
    window: tuple[int, int] = (0, 0)
    noise_level: float = 0.0
    kind: str = "sde"
    shared_noise: bool = False                                  # one initial noise per group
    density: str = "mean"                                       # reduction of the log-density over latent entries
    scaled: bool = True                                         # False: -(x - mean)^2 in its place, as Flow-CPS published it


# ---- what a trajectory keeps ----


@dataclass(frozen=True)
class Text:
    """A text segment with its markers. Given: B rows and logp None. Chosen: N rows; `chosen` marks the sampled tokens."""

    tokens: Tensor                                              # (B or N, L)
    mask: Tensor                                                # (B or N, L) False = padding
    chosen: Tensor | None = None                                # (N, L)
    logp: Tensor | None = None                                  # (N, L) 0 where not chosen
    temperature: float = 1.0


@dataclass(frozen=True)
class Picture:
    """An image segment. Given: pixels (and latents). Chosen: N rows of a flow trajectory, and pixels if it is read back."""

    size: tuple[int, int] | list[tuple[int, int]]               # of all, or of each; of the latents where there are some
    pixels: Tensor | list[Tensor] | None = None                 # (B or N, 3, H, W), or a list of (3, H_i, W_i), as the ViT reads them
    latents: Tensor | None = None                               # (B, M, F) clean
    flow: flow_grpo.Trajectory | None = None


@dataclass(frozen=True)
class Rollout:
    """B prompts with G samples each: the segments in order."""

    segments: tuple[Text | Picture, ...]
    B: int
    G: int
    guidance: Guidance | None = None

    @property
    def chosen(self) -> int:
        """How many segments the policy chose."""
        return sum(not is_given(s) for s in self.segments)


@dataclass(frozen=True)
class Scored:
    """A chosen segment under the weights of a replay: logp (N, L) of a text, or a flow_grpo.Replay of an image."""

    segment: Text | Picture
    logp: Tensor | None = None
    flow: flow_grpo.Replay | None = None


class Reader:
    """The contexts of one walk: everything, and, for guidance, what stands before the last given text (`no_text`) and the given texts
    without images (`no_image`) [BAGEL]."""

    def __init__(self, policy: Policy, N: int, guidance: Guidance | None):
        self.policy, self.guidance = policy, guidance
        self.full = self.no_text = self.no_image = policy.empty(N)

    def text(self, tokens: Tensor, mask: Tensor, chosen: bool = False, logits: bool = False) -> Tensor | None:
        """Read text. What the policy wrote enters the full context alone; given text leaves `no_text` at what stood before it."""
        if self.guidance and not chosen:
            self.no_text = self.full
            _, self.no_image = self.policy.append_text(self.no_image, tokens, mask, logits=False)
        out, self.full = self.policy.append_text(self.full, tokens, mask, logits=logits)
        return out

    def image(self, pixels: Tensor | None, latents: Tensor | None, size: tuple[int, int]) -> None:
        """Read a clean image; no_image goes without it."""
        self.full = self.policy.append_image(self.full, pixels=pixels, latents=latents, size=size)
        self.no_text = self.full

    def repeat(self, G: int) -> None:
        self.full = self.full.repeat(G)
        if self.guidance:
            self.no_text, self.no_image = self.no_text.repeat(G), self.no_image.repeat(G)

    def velocity(self, size: tuple[int, int]):
        """f(x, t) of the image that comes next, as flow_grpo takes it."""
        if self.guidance is None:
            return lambda x, t: self.policy.velocity(self.full, x, t, size)
        return lambda x, t: guided_velocity(self.policy, x, t, size, self.full, self.no_text, self.no_image, self.guidance)


def generators(seed: int, step: int, prompts: list[int], samples: range) -> list[torch.Generator]:
    """One CPU generator per sample from (seed, step, prompt index, sample index), prompt-major: ranks and batch splits change nothing."""
    keys = [(seed, step, p, g) for p in prompts for g in samples]
    words = [int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1) for key in keys]
    return [torch.Generator().manual_seed(word) for word in words]


def initial_noise(policy: Policy, sizes: list[tuple[int, int]], source: list[torch.Generator], W: int) -> Tensor:
    """Standard normal (1+W, N, M, F): where each sample starts and its W noisy steps, its own tokens alone, padded with zeros."""
    F, lengths = policy.config.latent_features, policy.latent_grid(sizes, len(sizes))[1].sum(1).tolist()
    each = [torch.randn(1 + W, M, F, generator=g).transpose(0, 1) for M, g in zip(lengths, source)]       # (M_i, 1+W, F)
    return torch.nn.utils.rnn.pad_sequence(each, batch_first=True).permute(2, 0, 1, 3).to(policy.device)


@torch.no_grad()
def sample_plan(policy: Policy, plan: list, *, seed: int, step: int, prompts: list[int], G: int, first: int = 0,
            guidance: Guidance | None = None) -> Rollout:
    """Act: walk the plan for the prompts with the given indices (they seed the samples), G samples each, without gradients.

    first: number of the first sample within its group, for a rank that draws a part of it. A sample's random numbers are drawn in the
    order of its chosen segments. shared_noise takes the initial noise of sample 0. An image that is drawn before the plan's end is
    read back clean: its latents at t = 0, then its pixels through the ViT.
    """
    B, segments, repeated = len(prompts), [], False
    source, reader = generators(seed, step, prompts, range(first, first + G)), Reader(policy, B, guidance)
    lead = generators(seed, step, prompts, range(1))                          # sample 0 of each prompt, wherever it is drawn
    draw_uniforms = lambda length, held: torch.stack([torch.rand(length, generator=g) for g in held]).to(policy.device)
    for place, item in enumerate(plan):
        if not repeated and isinstance(item, (Write, Draw)):
            reader.repeat(G)
            repeated = True
        if isinstance(item, Read):
            segment = Text(*policy.encode_text([t for t in item.texts for _ in range(G if repeated else 1)]))
            reader.text(segment.tokens, segment.mask)
        elif isinstance(item, See):
            if repeated:
                raise ValueError("an image given behind a chosen segment is not supported; put it first")
            sized = item.pixels if item.source is None else item.source
            size = tuple(sized.shape[-2:]) if isinstance(sized, Tensor) else [tuple(p.shape[-2:]) for p in sized]
            segment = Picture(size, item.pixels, None if item.source is None else policy.encode(item.source))
            reader.image(segment.pixels, segment.latents, segment.size)
        elif isinstance(item, Write):
            segment = write(policy, reader, draw_uniforms(item.length, source), item.temperature)
            draw_uniforms(item.length, lead)
            if place + 1 < len(plan):
                reader.text(segment.tokens, segment.mask, chosen=True)
        else:
            W = item.window[1] - item.window[0]
            size = item.size if isinstance(item.size, tuple) else [s for s in item.size for _ in range(G)]
            if W and isinstance(size, list):
                raise ValueError("images of several sizes cannot share noisy steps, whose log-densities average over entries; "
                                 "draw them with an empty window")
            noise = initial_noise(policy, size if isinstance(size, list) else [size] * (B * G), source, W)
            shared = initial_noise(policy, [size] * B, lead, W)[0] if item.shared_noise else None
            segment = Picture(size, flow=flow_grpo.rollout(
                reader.velocity(size), noise[0] if shared is None else flow_grpo.shared_noise(shared, G), item.times.to(policy.device),
                window=item.window, noise_level=item.noise_level, kind=item.kind, step_noise=noise[1:], reduce=item.density,
                normaliser=item.scaled, scaled=item.scaled))
            if place + 1 < len(plan):
                segment = replace(segment, pixels=as_read(policy, decode(policy, segment)))
                reader.image(segment.pixels, segment.flow.data, size)
        segments.append(segment)
    return Rollout(tuple(segments), B, G, guidance)


def as_read(policy: Policy, images: list[Tensor] | Tensor) -> list[Tensor]:
    """Drawn images, nominally in [-1, 1], as the ViT reads them: clamped, resized by BAGEL's rule."""
    out = []
    for image in images:
        w, h = fit_size(image.shape[-1], image.shape[-2], *policy.config.vit_resize)
        image = image[None].clamp(-1, 1)
        out.append(image[0] if (h, w) == image.shape[-2:] else
                   torch.nn.functional.interpolate(image, (h, w), mode="bicubic", antialias=True).clamp(-1, 1)[0])
    return out


def decode(policy: Policy, drawn: Picture) -> list[Tensor]:
    """The images of a chosen segment, N of (3, H_i, W_i), nominally in [-1, 1]."""
    data = drawn.flow.data
    if isinstance(drawn.size, tuple):
        batch = max(1, min(256, 2**21 // (drawn.size[0] * drawn.size[1])))   # the decoder's widest layer holds 256 numbers a pixel
        return [image for z in data.split(batch) for image in policy.decode(z, drawn.size)]
    tokens = policy.latent_grid(drawn.size, len(data))[1].sum(1).tolist()
    return [policy.decode(z[None, :M], size)[0] for z, M, size in zip(data, tokens, drawn.size)]


def write(policy: Policy, reader: Reader, uniforms: Tensor, temperature: float) -> Text:
    """Sample a text behind the full context and wrap it: <|im_start|> sampled tokens <|im_end|>, the end given where it was cut off."""
    tokens, mask, logp = policy.sample_text(reader.full, uniforms, temperature)                        # (N, L)
    one, none = tokens.new_ones(len(tokens), 1), logp.new_zeros(len(tokens), 1)
    ended = ((tokens == policy.end) & mask).any(1, keepdim=True)                                       # (N, 1)
    chosen = torch.cat([one * 0, mask, one * 0], dim=1).bool()                                         # (N, L+2)
    full = torch.cat([one * policy.start, torch.where(mask, tokens, policy.end), one * policy.end], dim=1)
    read = torch.cat([one.bool(), mask, ~ended], dim=1)
    return Text(full, read, chosen, torch.cat([none, logp, none], dim=1), temperature)


def replay_rollout(policy: Policy, r: Rollout, only: int | None = None) -> list[Scored]:
    """Learn: score the chosen segments of a rollout under `policy`, with gradients if they are on. Contexts are built inside the graph.

    only: the number of the one chosen segment that is scored, from 0; those before it are read, those behind it passed over. The losses
    of all segments, each by itself, add up to the gradient of the whole, in the memory of one.
    """
    reader, repeated, out, number = Reader(policy, r.B, r.guidance), False, [], -1
    for s in r.segments:
        given = is_given(s)
        number += not given
        if only is not None and number > only:
            break
        scored = not given and only in (None, number)
        if not given and not repeated:
            reader.repeat(r.G)
            repeated = True
        if isinstance(s, Text):
            logits = reader.text(s.tokens, s.mask, chosen=not given, logits=scored)
            if scored:
                logp = token_logp(logits[:, :-1], s.tokens[:, 1:], s.temperature or 1.0)               # (N, L-1)
                logp = torch.where(s.chosen[:, 1:], logp, 0.0)
                out.append(Scored(s, logp=torch.cat([logp.new_zeros(len(logp), 1), logp], dim=1)))
        elif given:
            reader.image(s.pixels, s.latents, s.size)
        else:
            if s.flow.window[0] == s.flow.window[1]:
                raise ValueError("an image drawn with an empty window has no noisy step to score; draw it with a window")
            x, t = s.flow.latents[:, :-1], s.flow.times[slice(*s.flow.window)]                         # (N, W, M, F), (W,)
            if scored:
                v = reader.velocity(s.size)(x.flatten(0, 1), t.repeat(len(x)))  # all noisy steps in one call, behind one context
                out.append(Scored(s, flow=flow_grpo.replay_of(v.view_as(x), s.flow)))
            if s.pixels is not None:
                reader.image(s.pixels, s.flow.data, s.size)
    return out


def is_given(s: Text | Picture) -> bool:
    return s.chosen is None if isinstance(s, Text) else s.flow is None


def subset(r: Rollout, prompts: range, samples: range | None = None) -> Rollout:
    """Some prompts of a rollout, and of each some samples (None: all): a micro-batch."""
    samples = range(r.G) if samples is None else samples
    of_prompts = list(prompts)
    of_samples = [p * r.G + g for p in prompts for g in samples]

    def part(s, begun):
        rows = of_samples if begun else of_prompts

        def pick(x):
            if x is None or isinstance(x, tuple):               # one size is of all
                return x
            return [x[i] for i in rows] if isinstance(x, list) else x[rows]

        if isinstance(s, Text):
            return replace(s, tokens=pick(s.tokens), mask=pick(s.mask), chosen=pick(s.chosen), logp=pick(s.logp))
        flow = s.flow and flow_grpo.select(s.flow, torch.tensor(rows))
        return replace(s, size=pick(s.size), pixels=pick(s.pixels), latents=pick(s.latents), flow=flow)

    chosen = [not is_given(s) for s in r.segments]
    segments = tuple(part(s, any(chosen[:i + 1])) for i, s in enumerate(r.segments))
    return replace(r, segments=segments, B=len(of_prompts), G=len(samples))


def join(rollouts: list[Rollout]) -> Rollout:
    """Rollouts of the same plan for other prompts, behind one another; texts are padded to the longest."""
    def cat(rows):
        if rows[0] is None or isinstance(rows[0], tuple):       # one size of all
            return rows[0]
        if isinstance(rows[0], list):
            return [x for row in rows for x in row]
        longest = max(x.shape[1] for x in rows) if rows[0].ndim in (2, 3) else None
        if longest is not None:                                 # text: tokens, masks, log-probs; latents of given images
            rows = [torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, longest - x.shape[1])) for x in rows]
        return torch.cat(rows)

    def joined(same):
        across = lambda held, names: replace(held[0], **{k: cat([getattr(x, k) for x in held]) for k in names})
        if isinstance(same[0], Text):
            return across(same, ("tokens", "mask", "chosen", "logp"))
        flow = same[0].flow and across([s.flow for s in same], ("latents", "means", "logp", "data"))
        return replace(across(same, ("size", "pixels", "latents")), flow=flow)

    segments = tuple(joined(same) for same in zip(*(r.segments for r in rollouts)))
    return replace(rollouts[0], segments=segments, B=sum(r.B for r in rollouts))


def chosen_texts(r: Rollout) -> list[Text]:
    return [s for s in r.segments if isinstance(s, Text) and s.chosen is not None]


@torch.no_grad()
def unguided(policy: Policy, r: Rollout) -> Rollout:
    """A rollout that was drawn with guidance, with the means and log-probs that the policy has without it."""
    r = replace(r, guidance=None)
    drawn = {id(s.segment): s.flow for s in replay_rollout(policy, r) if s.flow}
    renewed = lambda s: replace(s, flow=replace(s.flow, means=drawn[id(s)].mean, logp=drawn[id(s)].logp)) if id(s) in drawn else s
    return replace(r, segments=tuple(map(renewed, r.segments)))


@torch.no_grad()
def replay_gaps(policy: Policy, r: Rollout) -> list[tuple[str, float]]:
    """("text" or "image", largest |log-prob of a replay - log-prob of the rollout|) of each chosen segment."""
    gaps = []
    for scored in replay_rollout(policy, r):
        s = scored.segment
        kind, gap = ("image", scored.flow.logp - s.flow.logp) if scored.logp is None else ("text", scored.logp - s.logp)
        gaps.append((kind, gap.abs().max().item()))
    return gaps


def texts_of(policy: Policy, r: Rollout) -> list[str] | None:
    """What the samples wrote last, (N,) strings without marker tokens, or None."""
    written = [s for s in r.segments if isinstance(s, Text) and s.chosen is not None]
    return policy.decode_text(written[-1].tokens, written[-1].chosen) if written else None


def images_of(policy: Policy, r: Rollout, last: int = 1) -> Tensor | list[Tensor] | None:
    """What the samples drew last, or (last=2) before that: (N, 3, H, W) fp32 in [0, 1], a list of (3, H_i, W_i) where sizes differ, or
    None."""
    drawn = [s for s in r.segments if isinstance(s, Picture) and s.flow is not None]
    if len(drawn) < last:
        return None
    images = [(image * 0.5 + 0.5).clamp(0, 1) for image in decode(policy, drawn[-last])]
    return torch.stack(images) if isinstance(drawn[-last].size, tuple) else images


# ---- refinement ----


@dataclass(frozen=True)
class Round:
    """What one round drew for N prompts, and what was kept of it and of the rounds before."""

    drawn: Tensor                                               # (N, 3, H, W) in [0, 1]
    worth: Tensor                                               # (N,) value of what was drawn
    kept: Tensor                                                # (N, 3, H, W) in [0, 1]
    value: Tensor                                               # (N,) of what was kept
    texts: list[str] | None                                     # what was written before it was drawn: thoughts, then diagnoses


def refine(policy: Policy, prompts: list[str], rounds: int, select: str, value: Callable[[Tensor], Tensor], first: list, again: list, *,
           look: str, seed: int, guidance: tuple[Guidance | None, Guidance | None] = (None, None), system: bool = False) -> list[Round]:
    """Draw, then look at what was kept and draw again, `rounds` times -> rounds + 1 Rounds. [AlphaGRPO, self-reflective refinement]

    select: "always", the new picture takes the old one's place (AlphaGRPO's code); "judge", only where its value is higher; "oracle", only
    where the old one's value is below 1, which asks the truth (the switch of AlphaGRPO's released evaluation).
    value: images (N, 3, H, W) in [0, 1] -> (N,). first, again: what follows the prompt, and the instruction `look`, in the plan.
    system: BAGEL's think prompt before what writes a thought.
    """
    told = lambda what: [Read([THINK_TO_DRAW] * len(prompts))] if system and any(isinstance(part, Write) for part in what) else []
    walk = lambda plan, step, with_: sample_plan(policy, plan, seed=seed, step=step, prompts=list(range(len(prompts))), G=1, guidance=with_)
    r = walk([*told(first), Read(prompts), *first], 0, guidance[0])
    drawn = images_of(policy, r)
    worth = value(drawn)
    out = [Round(drawn, worth, drawn, worth, texts_of(policy, r))]
    for step in range(1, rounds + 1):
        held = out[-1]
        seen = See(as_read(policy, held.kept * 2 - 1), held.kept * 2 - 1)
        r = walk([*told(again), seen, Read([look.format(prompt=prompt) for prompt in prompts]), *again], step, guidance[1])
        drawn = images_of(policy, r)
        new = value(drawn)
        better = {"always": torch.ones_like(new, dtype=torch.bool), "judge": new > held.value, "oracle": held.value < 1}[select]
        kept = torch.where(better.to(drawn.device)[:, None, None, None], drawn, held.kept)
        out.append(Round(drawn, new, kept, torch.where(better, new, held.value), texts_of(policy, r)))
    return out


# ---- the command line ----


# What depends on size when a person samples; BAGEL's are the official inferencer's: 50 points are 49 steps. Guidance of a text-to-image
# call and of an edit.
SAMPLING = {
    "toy": dict(size=32, steps=10, shift=2.0, tokens=24, system_prompt=False, zoom=4, guidance=Guidance(1.0), edit=Guidance(1.0),
                judge=str(TOY.parent / "judge")),
    "bagel": dict(size=1024, steps=49, shift=3.0, tokens=1024, system_prompt=True, zoom=1, guidance=Guidance(4.0),
                  edit=Guidance(4.0, 2.0, "text_channel", 0.0, (0.0, 1.0)), judge="google/paligemma2-3b-mix-448"),
}


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(description="Prompt in, PNG grid or answer out.", allow_abbrev=False)
    ap.add_argument("prompt", help="what to draw, what to ask about --question, or how to change --edit")
    ap.add_argument("--policy", default=str(TOY), help="a policy folder: toy/policy, out/policy, BAGEL-7B-MoT")
    ap.add_argument("--adapter", default="", help="a folder of adapters to put on, such as out/adapter")
    ap.add_argument("--think", action="store_true", help="write a thought first")
    ap.add_argument("--question", metavar="IMAGE", help="answer the prompt about this image instead of drawing")
    ap.add_argument("--edit", metavar="IMAGE", help="draw this image changed as the prompt says")
    ap.add_argument("--seed", type=int, default=0, help="of noise and texts")
    ap.add_argument("--n", type=int, default=8, help="samples")
    ap.add_argument("--size", type=int, help="pixels per side (32 for the toy, 1024 for BAGEL; an edit keeps the image's size)")
    ap.add_argument("--steps", type=int, help="denoising steps (10 for the toy, 49 for BAGEL)")
    ap.add_argument("--temperature", type=float, default=0.0, help="of the text; 0 is greedy")
    ap.add_argument("--guidance", type=float, help="text guidance scale (1 for the toy, 4 for BAGEL); 1 is none")
    ap.add_argument("--image_guidance", type=float, help="image guidance scale of an edit (1 for the toy, 2 for BAGEL)")
    ap.add_argument("--renorm", choices=["global", "channel", "text_channel"], help="how guided velocities are kept short")
    ap.add_argument("--out", default="samples.png", help="the image that is written")
    a = ap.parse_args(argv)
    with one_line("sample.py"):
        print(run(a))


def run(a: argparse.Namespace) -> str:
    """Carry out a parsed command line; returns what to print."""
    for name, low in dict(n=1, steps=1, size=1, seed=0, temperature=0.0, guidance=0.0, image_guidance=0.0).items():
        if (value := getattr(a, name)) is not None and not (math.isfinite(value) and value >= low):
            raise ValueError(f"--{name} {value}: must be a finite number of at least {low:g}")
    if not a.question and (not Path(a.out).parent.is_dir() or Path(a.out).suffix.lower() != ".png"):
        raise ValueError(f"--out {a.out}: must be a .png file in a folder that exists")
    if a.question and a.edit:
        raise ValueError("--question answers and --edit draws; give one of them")
    policy, prompt = load_policy(a.policy, device=the_device(), adapter=a.adapter), utf8(a.prompt)
    scale = SAMPLING[policy.config.scale]
    system = [Read([THINK_TO_ANSWER if a.question else THINK_TO_DRAW])] if scale["system_prompt"] and a.think else []
    write = Write(scale["tokens"], a.temperature)
    if a.question:
        pixels, _ = read_picture(a.question, policy)
        plan = [*system, See(pixels[None]), Read([prompt]), write]
        return "\n".join(texts_of(policy, sample_plan(policy, plan, seed=a.seed, step=0, prompts=[0], G=a.n if a.temperature else 1)))
    guidance, size, seen = scale["edit" if a.edit else "guidance"], (a.size or scale["size"],) * 2, []
    asked = dict(text_scale=a.guidance, image_scale=a.image_guidance, renorm=a.renorm)
    guidance = replace(guidance, **{k: v for k, v in asked.items() if v is not None})
    if a.edit:
        pixels, source = read_picture(a.edit, policy)
        seen, size = [See(pixels[None], source[None])], tuple(source.shape[-2:])
    thought = [write] if a.think else []
    plan = [*system, *seen, Read([prompt]), *thought, Draw(size, flow_grpo.time_grid(a.steps or scale["steps"], scale["shift"]))]
    r = sample_plan(policy, plan, seed=a.seed, step=0, prompts=[0], G=a.n, guidance=guidance if guidance.text_scale > 1 else None)
    save_grid(images_of(policy, r), a.out, columns=min(a.n, 8), zoom=scale["zoom"])
    return "\n".join([*dict.fromkeys(texts_of(policy, r) or []), f"{a.n} images in {a.out}"])


if __name__ == "__main__":
    main()
