"""Rollouts: a trajectory is a list of segments, given or chosen, and acting and learning walk it with the same calls.

    question        See(pixels), Read(questions), Write(8)
    text to image   Read(prompts), Draw(size, times, ...)
    think, draw     Read(prompts), Write(24), Draw(size, times, ...)
    edit            See(pixels, latents=True), Read(instructions), Draw(...)

`rollout` walks a plan of these and keeps, for each chosen segment, what the update needs: tokens, mask and log-probs of text; the
latents around every noisy step, means and log-probs of an image. `replay` walks the kept segments under other weights. The given
prefix is read once per prompt and repeated for the group; what a sample wrote is read once for all steps of its image.

Legend: B prompts, G samples each, N = B*G prompt-major, L text positions, M latent tokens, F features, W noisy steps.

    python sample.py "a red circle left of a blue square" --n 8                 # draws a grid into samples.png
    python sample.py "as many circles as a triangle has sides" --think          # writes a thought first
    python sample.py "how many circles ?" --question samples.png                # answers about an image
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import flow_grpo
from grpo import token_logp
from policy import THINK_TO_ANSWER, THINK_TO_DRAW, Guidance, Policy, fit_image, guided_velocity, to_tensor

TOY = Path(__file__).parent / "assets" / "toy" / "policy"


# ---- the plan of a trajectory ----


@dataclass(frozen=True)
class Read:
    """Given text, one per prompt."""

    texts: list[str]


@dataclass(frozen=True)
class See:
    """A given image per prompt: ViT patches, and clean latents before them if the answer is a changed image."""

    pixels: Tensor | list[Tensor]                               # (B, 3, H, W), or B of (3, H_i, W_i), in [-1, 1]
    latents: bool = False


@dataclass(frozen=True)
class Write:
    """Text that the policy chooses, at most `length` tokens; temperature 0 is greedy."""

    length: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Draw:
    """An image that the policy chooses: noisy steps inside the window, ODE elsewhere; an empty window is plain sampling."""

    size: tuple[int, int]                                       # (height, width) in pixels
    times: Tensor                                               # (K+1,) flow_grpo.time_grid
    window: tuple[int, int] = (0, 0)
    noise_level: float = 0.0
    kind: str = "sde"
    shared_noise: bool = False                                  # one initial noise per group


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
    """An image segment. Given: pixels (and latents). Chosen: N rows of a flow trajectory."""

    size: tuple[int, int] | list[tuple[int, int]]               # of all, or of each
    pixels: Tensor | list[Tensor] | None = None                 # (B, 3, H, W), or B of (3, H_i, W_i)
    latents: Tensor | None = None                               # (B, M, F) clean
    flow: flow_grpo.Trajectory | None = None


@dataclass(frozen=True)
class Rollout:
    """B prompts with G samples each: the segments in order."""

    segments: tuple[Text | Picture, ...]
    B: int
    G: int
    guidance: Guidance | None = None


@dataclass(frozen=True)
class Scored:
    """A chosen segment under the weights of a replay: logp (N, L) of a text, or a flow_grpo.Replay of an image."""

    segment: Text | Picture
    logp: Tensor | None = None
    flow: flow_grpo.Replay | None = None


class Reader:
    """The contexts of one walk: everything, and, for guidance, everything without text and without image [BAGEL]."""

    def __init__(self, policy: Policy, N: int, guidance: Guidance | None):
        self.policy, self.guidance = policy, guidance
        self.full = self.no_text = self.no_image = policy.empty(N)

    def text(self, tokens: Tensor, mask: Tensor, thought: bool = False, logits: bool = False) -> Tensor | None:
        """Read text. A thought enters the full context alone; other text is what `no_text` goes without."""
        if self.guidance and not thought:
            self.no_text = self.full
            _, self.no_image = self.policy.append_text(self.no_image, tokens, mask, logits=False)
        out, self.full = self.policy.append_text(self.full, tokens, mask, logits=logits)
        return out

    def image(self, pixels: Tensor | None, latents: Tensor | None, size: tuple[int, int]) -> None:
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


def generators(seed: int, step: int, prompts: list[int], G: int) -> list[torch.Generator]:
    """One CPU generator per sample from (seed, step, prompt index, sample index), prompt-major: ranks and batch splits change nothing."""
    keys = [(seed, step, p, g) for p in prompts for g in range(G)]
    words = [int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1) for key in keys]
    return [torch.Generator().manual_seed(word) for word in words]


@torch.no_grad()
def rollout(policy: Policy, plan: list, *, seed: int, step: int, prompts: list[int], G: int, guidance: Guidance | None = None) -> Rollout:
    """Act: walk the plan for the prompts with the given indices (they seed the samples), G samples each, without gradients.

    A sample's random numbers are drawn in the order of its chosen segments. shared_noise takes the initial noise of sample 0.
    """
    B, segments, repeated = len(prompts), [], False
    source, reader = generators(seed, step, prompts, G), Reader(policy, B, guidance)
    draw = lambda f, *shape: torch.stack([f(*shape, generator=g) for g in source]).to(policy.device)
    for item in plan:
        if isinstance(item, (Read, See)) and repeated:
            raise ValueError("a given segment behind a chosen one is not supported; put what is given first")
        if isinstance(item, Read):
            segment = Text(*policy.encode_text(item.texts))
            reader.text(segment.tokens, segment.mask)
        elif isinstance(item, See):
            pixels = item.pixels
            size = tuple(pixels.shape[-2:]) if isinstance(pixels, Tensor) else [tuple(p.shape[-2:]) for p in pixels]
            segment = Picture(size, pixels, policy.encode(pixels) if item.latents else None)
            reader.image(segment.pixels, segment.latents, segment.size)
        else:
            if not repeated:
                reader.repeat(G)
                repeated = True
            if isinstance(item, Write):
                segment = write(policy, reader, draw(torch.rand, item.length), item.temperature)
                reader.text(segment.tokens, segment.mask, thought=True)
            else:
                W, M = item.window[1] - item.window[0], policy.latent_grid(item.size, 1)[0].shape[1]
                noise = draw(torch.randn, 1 + W, M, policy.config.latent_features).transpose(0, 1)     # (1+W, N, M, F)
                start = flow_grpo.shared_noise(noise[0, ::G], G) if item.shared_noise else noise[0]
                segment = Picture(item.size, flow=flow_grpo.rollout(
                    reader.velocity(item.size), start, item.times.to(policy.device), window=item.window, noise_level=item.noise_level,
                    kind=item.kind, step_noise=noise[1:]))
        segments.append(segment)
    return Rollout(tuple(segments), B, G, guidance)


def write(policy: Policy, reader: Reader, uniforms: Tensor, temperature: float) -> Text:
    """Sample a text behind the full context and wrap it: <|im_start|> sampled tokens <|im_end|>, the end given where it was cut off."""
    tokens, mask, logp = policy.sample_text(reader.full, uniforms, temperature)                        # (N, L)
    one, none = tokens.new_ones(len(tokens), 1), logp.new_zeros(len(tokens), 1)
    ended = ((tokens == policy.end) & mask).any(1, keepdim=True)                                       # (N, 1)
    chosen = torch.cat([one * 0, mask, one * 0], dim=1).bool()                                         # (N, L+2)
    full = torch.cat([one * policy.start, torch.where(mask, tokens, policy.end), one * policy.end], dim=1)
    read = torch.cat([one.bool(), mask, ~ended], dim=1)
    return Text(full, read, chosen, torch.cat([none, logp, none], dim=1), temperature)


def replay(policy: Policy, r: Rollout) -> list[Scored]:
    """Learn: score the chosen segments of a rollout under `policy`, with gradients if they are on. Contexts are built inside the graph."""
    reader, repeated, out = Reader(policy, r.B, r.guidance), False, []
    for s in r.segments:
        given = s.chosen is None if isinstance(s, Text) else s.flow is None
        if not given and not repeated:
            reader.repeat(r.G)
            repeated = True
        if isinstance(s, Text):
            logits = reader.text(s.tokens, s.mask, thought=not given, logits=not given)
            if not given:
                logp = token_logp(logits[:, :-1], s.tokens[:, 1:], s.temperature or 1.0)               # (N, L-1)
                logp = torch.where(s.chosen[:, 1:], logp, 0.0)
                out.append(Scored(s, logp=torch.cat([logp.new_zeros(len(logp), 1), logp], dim=1)))
        elif given:
            reader.image(s.pixels, s.latents, s.size)
        else:
            out.append(Scored(s, flow=flow_grpo.replay(reader.velocity(s.size), s.flow)))
    return out


def select(r: Rollout, first: int, last: int) -> Rollout:
    """Prompts first..last-1 of a rollout: a micro-batch of whole groups."""
    def part(s):
        if isinstance(s, Text):
            rows = slice(first, last) if s.chosen is None else slice(first * r.G, last * r.G)
            return replace(s, tokens=s.tokens[rows], mask=s.mask[rows], chosen=None if s.chosen is None else s.chosen[rows],
                           logp=None if s.logp is None else s.logp[rows])
        if s.flow is not None:
            return replace(s, flow=flow_grpo.select(s.flow, slice(first * r.G, last * r.G)))
        return replace(s, pixels=s.pixels[first:last], latents=None if s.latents is None else s.latents[first:last],
                       size=s.size[first:last] if isinstance(s.size, list) else s.size)
    return replace(r, segments=tuple(map(part, r.segments)), B=last - first)


def texts_of(policy: Policy, r: Rollout) -> list[str] | None:
    """What the samples wrote last, (N,) strings without marker tokens, or None."""
    written = [s for s in r.segments if isinstance(s, Text) and s.chosen is not None]
    return policy.decode_text(written[-1].tokens, written[-1].chosen) if written else None


def images_of(policy: Policy, r: Rollout, batch: int = 256) -> Tensor | None:
    """What the samples drew last: (N, 3, H, W) fp32 in [0, 1], or None."""
    drawn = [s for s in r.segments if isinstance(s, Picture) and s.flow is not None]
    if not drawn:
        return None
    pixels = torch.cat([policy.decode(z, drawn[-1].size) for z in drawn[-1].flow.data.split(batch)])
    return (pixels * 0.5 + 0.5).clamp(0, 1)


def read_picture(path: str, policy: Policy) -> Tensor:
    """An image file as the policy's ViT reads it: (3, H, W) in [-1, 1], first brought to the autoencoder's size, as BAGEL does."""
    from PIL import Image, UnidentifiedImageError
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"image {path} does not exist") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error
    for rule in ("vae_resize", "vit_resize"):
        image = fit_image(image, *policy.config.bagel[rule])
    return to_tensor(image)


def save_grid(images: Tensor, path: str, columns: int, zoom: int = 1) -> None:
    """Write (N, 3, H, W) in [0, 1] as one PNG, row by row, with a thin gap."""
    from PIL import Image
    N, _, H, W = images.shape
    rows, gap = -(-N // columns), 2
    sheet = np.full((rows * (H * zoom + gap) - gap, columns * (W * zoom + gap) - gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()):
        y, x = (i // columns) * (H * zoom + gap), (i % columns) * (W * zoom + gap)
        sheet[y:y + H * zoom, x:x + W * zoom] = image.repeat(zoom, 0).repeat(zoom, 1)
    Image.fromarray(sheet).save(path)


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(description="Prompt in, PNG grid or answer out.", allow_abbrev=False)
    ap.add_argument("prompt", help="what to draw, or what to ask about --question")
    ap.add_argument("--policy", default=str(TOY), help="a policy folder: assets/toy/policy, out/policy, BAGEL-7B-MoT")
    ap.add_argument("--think", action="store_true", help="write a thought first")
    ap.add_argument("--question", metavar="IMAGE", help="answer the prompt about this image instead of drawing")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--n", type=int, default=8, help="samples")
    ap.add_argument("--steps", type=int, help="denoising steps (10 for the toy, 49 for BAGEL)")
    ap.add_argument("--temperature", type=float, default=0.0, help="of the text; 0 is greedy")
    ap.add_argument("--guidance", type=float, default=1.0, help="text guidance scale (BAGEL: 4); 1 is none")
    ap.add_argument("--out", default="samples.png")
    a = ap.parse_args(argv)
    try:
        print(run(a))
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")


def run(a: argparse.Namespace) -> str:
    """Carry out a parsed command line; returns what to print."""
    if a.n < 1 or a.steps is not None and a.steps < 1:
        raise ValueError(f"--n {a.n}, --steps {a.steps}: at least one sample and one step")
    policy = Policy.load(a.policy, device="cuda" if torch.cuda.is_available() else "cpu")
    toy = policy.config.llm["hidden_size"] < 512
    system = [] if toy or not a.think else [Read([THINK_TO_ANSWER if a.question else THINK_TO_DRAW])]
    length = 24 if toy else 1024
    settings = dict(seed=a.seed, step=0, prompts=[0], guidance=Guidance(a.guidance) if a.guidance > 1 else None)
    if a.question:
        plan = [*system, See(read_picture(a.question, policy)[None]), Read([a.prompt]), Write(length, a.temperature)]
        return "\n".join(texts_of(policy, rollout(policy, plan, G=a.n if a.temperature else 1, **settings)))
    size = 32 if toy else 1024
    draw = Draw((size, size), flow_grpo.time_grid(a.steps or (10 if toy else 49), 2.0 if toy else 3.0))
    plan = [*system, Read([a.prompt]), *([Write(length, a.temperature)] * a.think), draw]
    r = rollout(policy, plan, G=a.n, **settings)
    columns = min(a.n, 8)
    save_grid(images_of(policy, r), a.out, columns, zoom=4 if toy else 1)
    return "\n".join([*dict.fromkeys(texts_of(policy, r) or []), f"{a.n} images in {a.out}"])


if __name__ == "__main__":
    main()
