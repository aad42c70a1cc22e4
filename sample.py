"""Rollout and replay of a trajectory, a list of segments that both walk with the same calls.

    question        See(pixels), Read(questions), Write(8)
    text to image   Read(prompts), Draw(size, times, ...)
    think, draw     Read(prompts), Write(24), Draw(size, times, ...)
    edit            See(pixels, source), Read(instructions), Draw(...)
    refinement      See(pixels), Read(instructions), Write(24), Draw(...)
    two rounds      Read(prompts), Write(24), Draw(...), Read(instructions), Write(24), Draw(...)

`sample_plan` walks a plan of these. It keeps what the update needs of each segment that the policy
chose: tokens, mask and log-probs of a text; latents around every noisy step, means and log-probs of
an image, or the image with fresh noise at J times, or tokens and log-probs of an image that is
written token by token (janus.py). `replay_rollout` walks the kept segments again,
under other weights and with gradients. A prompt is read once and repeated for its group; what a
sample wrote is read once for all noisy steps of its image.

Legend: B prompts, G samples each, N = B*G prompt-major, L text positions, M image tokens, F
features, W noisy steps, J times of fresh noise.

    python sample.py "a red circle and a blue square" --n 8            # a grid in samples.png
    python sample.py "as many circles as a triangle has sides" --think # writes a thought first
    python sample.py "what color is the circle ?" --question one.png   # answers
    python sample.py "make the sky red" --edit photo.png --policy BAGEL-7B-MoT
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import flow_grpo
from grpo import token_logp
from policy import Guidance, Policy, guided_velocity
from support.checkpoint import load_policy
from support.pictures import read_picture, save_grid, vit_pixels
from support.terminal import Arguments, number, plain_text, the_device

TOY = Path(__file__).parent / "toy" / "policy"
# The system prompts with which BAGEL was trained to think before an answer and before an image.
THINK_TO_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user "
    "with the answer. \nThe reasoning process is enclosed within <think> </think> tags, i.e. "
    "<think> reasoning process here </think> answer here")
THINK_TO_DRAW = (
    "You should first think about the planning process in the mind and then generate the image. "
    "\nThe planning process is enclosed within <think> </think> tags, i.e. <think> planning "
    "process here </think> image here")
Size = tuple[int, int]                                                  # (height, width) in pixels


# ---- the plan of a trajectory ----


@dataclass(frozen=True)
class Read:
    """A given text per prompt; after a chosen segment all samples of the prompt read it."""

    texts: list[str]


@dataclass(frozen=True)
class See:
    """A given image per prompt, read as ViT patches of `pixels`. It stands before what is chosen.

    If the answer is this image changed, `source` is the same image at the autoencoder's size, whose
    clean latents are read first.
    """

    pixels: Tensor | list[Tensor]  # (B, 3, H, W), or B of (3, H_i, W_i), in [-1, 1]
    source: Tensor | list[Tensor] | None = None                 # the same


@dataclass(frozen=True)
class Write:
    """Text that the policy chooses, at most `length` tokens; temperature 0 is greedy."""

    length: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Draw:
    """An image that the policy chooses.

    With times, noisy steps inside the window and ODE steps elsewhere; without, token by token at a
    temperature.
    """

    size: Size
    times: Tensor | None = None                                         # (K+1,) flow_grpo.time_grid
    window: tuple[int, int] = (0, 0)            # empty: plain sampling
    noise_level: float = 0.0
    sampler: str = "sde"                        # see flow_grpo.transition
    shared_noise: bool = False                  # one initial noise per group
    match_times: Tensor | None = None           # (J,) at which a matching loss reads it
    keeps_v: bool = False                       # whether it keeps its velocities at these times
    temperature: float = 1.0                    # of image tokens; 0 is greedy


# ---- what a trajectory keeps ----


@dataclass(frozen=True)
class Text:
    """A text segment with its markers: B rows if it was given, N rows if it was chosen."""

    tokens: Tensor                                                                  # (B or N, L)
    mask: Tensor  # (B or N, L) False = padding
    chosen: Tensor | None = None  # (N, L) True where sampled; None: the text was given
    logp: Tensor | None = None                                          # (N, L) 0 where not sampled
    temperature: float = 1.0

    @property
    def is_given(self) -> bool:
        return self.chosen is None


@dataclass(frozen=True)
class ImageTokens:
    """An image that was drawn token by token."""

    data: Tensor                                                                    # (N, M)
    logp: Tensor                                                                    # (N, M)
    temperature: float


@dataclass(frozen=True)
class Picture:
    """An image segment: B rows if it was given, N rows of what was drawn if it was chosen."""

    size: Size | list[Size]  # of the latents if there are some, else of the pixels
    # As the ViT reads them; of a chosen one if it is read back.
    pixels: Tensor | list[Tensor] | None = None
    latents: Tensor | None = None                                       # (B, M, F) clean
    # None if the image was given.
    drawn: flow_grpo.Trajectory | flow_grpo.Renoised | ImageTokens | None = None

    @property
    def is_given(self) -> bool:
        return self.drawn is None

    @property
    def steps(self) -> int:
        """How many noisy steps, times or tokens were drawn of it, over all samples."""
        if isinstance(self.drawn, ImageTokens):
            return self.drawn.data.numel()
        latents, times = self.drawn.points                              # (N, W or J, M, F), (W,)
        return len(latents) * len(times)


@dataclass(frozen=True)
class Rollout:
    """B prompts with G samples each: the segments in order."""

    segments: tuple[Text | Picture, ...]
    B: int
    G: int
    guidance: Guidance | None = None

    @property
    def texts(self) -> list[Text]:
        """The texts that the policy wrote, in order."""
        return [x for x in self.segments if isinstance(x, Text) and not x.is_given]

    @property
    def pictures(self) -> list[Picture]:
        """The images that the policy drew, in order."""
        return [x for x in self.segments if isinstance(x, Picture) and not x.is_given]


@dataclass(frozen=True)
class Scored:
    """A chosen segment under the weights of a replay.

    It has the log-probs of a text's or an image's tokens, or the velocities at an image's points.
    """

    segment: Text | Picture
    logp: Tensor | None = None                                          # (N, L) or (N, M)
    v: Tensor | None = None                                             # (N, W or J, M, F)

    @property
    def kind(self) -> str:
        return "text" if isinstance(self.segment, Text) else "image"

    @property
    def flow(self) -> flow_grpo.Replay | None:
        """The noisy steps of an image."""
        return None if self.v is None else flow_grpo.replay_of(self.v, self.segment.drawn)

    @property
    def gaps(self) -> Tensor:
        """|replay - rollout| of what was chosen: of log-probs, or of velocities in the mean."""
        if self.kind == "text":
            return (self.logp - self.segment.logp)[self.segment.chosen].abs()
        drawn = self.segment.drawn
        if isinstance(drawn, ImageTokens):
            return (self.logp - drawn.logp).flatten().abs()
        if isinstance(drawn, flow_grpo.Renoised):
            return (self.v - drawn.v).abs().flatten(2).mean(-1).flatten()
        return (self.flow.logp - drawn.logp).flatten().abs()


class Reader:
    """The contexts of one walk: everything and, for guidance, two others.

    no_text: what was read before the last given text [BAGEL], or everything with blanks in place of
    the texts [Janus]; no_image: the given texts without the images [BAGEL].
    """

    def __init__(self, policy: Policy, B: int, guidance: Guidance | None):
        self.policy = policy
        self.guidance = guidance if guidance and guidance.text_scale > 1 else None
        self.repeats = 1
        self.started = False
        self.full = self.no_text = self.no_image = policy.empty(B)

    def text(
        self, tokens: Tensor, mask: Tensor, chosen: bool = False, logits: bool = False
    ) -> Tensor | None:
        """Read text -> its logits (N, L, V) if they are asked for.

        What the policy wrote enters the full context alone.
        """
        self.started = chosen
        if self.guidance and self.policy.reads_blanks:
            blank = self.policy.blank(tokens)
            _, self.no_text = self.policy.append_text(self.no_text, blank, mask, logits=False)
        elif self.guidance and not chosen:
            self.no_text = self.full
            _, self.no_image = self.policy.append_text(self.no_image, tokens, mask, logits=False)
        out, self.full = self.policy.append_text(self.full, tokens, mask, logits=logits)
        return out

    def image(self, pixels: Tensor | None, latents: Tensor | None, size: Size) -> None:
        """Read a clean image."""
        clean = dict(pixels=pixels, latents=latents, size=size)
        self.full = self.policy.append_image(self.full, **clean)
        if self.guidance and self.policy.reads_blanks:
            self.no_text = self.policy.append_image(self.no_text, **clean)
        else:
            self.no_text = self.full

    def repeat(self, G: int) -> None:
        """Repeat every row for the G samples of its prompt; later calls do nothing.

        It is called before every chosen segment.
        """
        if self.repeats == G:
            return
        self.repeats = G
        self.full = self.full.repeat(G)
        if self.guidance:
            self.no_text = self.no_text.repeat(G)
            self.no_image = self.no_image.repeat(G)

    def velocity(self, size: Size) -> Callable[[Tensor, Tensor], Tensor]:
        """f(x, t) of the image that comes next, as flow_grpo takes it."""

        def without_guidance(x, t):
            return self.policy.velocity(self.full, x, t, size)

        def with_guidance(x, t):
            return guided_velocity(
                self.policy, x, t, size, self.full, self.no_text, self.no_image, self.guidance)

        return with_guidance if self.guidance else without_guidance

    def branches(self) -> dict:
        """The keyword arguments with which the policy samples and scores image tokens."""
        out = dict(started=self.started)
        if self.guidance:
            out |= dict(without=self.no_text, scale=self.guidance.text_scale)
        return out


# ---- acting ----


def sample_generators(
    seed: int, step: int, index: list[int], samples: range
) -> list[torch.Generator]:
    """One CPU generator per sample, prompt-major, from (seed, step, prompt index, sample index).

    So neither ranks nor the split of a batch change what is drawn.
    """
    generators = []
    for prompt in index:
        for sample in samples:
            word = np.random.SeedSequence((seed, step, prompt, sample)).generate_state(
                1, np.uint64)[0]
            generators.append(torch.Generator().manual_seed(int(word >> 1)))
    return generators


def initial_noise(policy: Policy, size: Size, generators: list[torch.Generator], W: int) -> Tensor:
    """Standard normal (1+W, N, M, F): where each sample starts, and its W noisy steps."""
    features = policy.config.latent_features
    _, mask = policy.latent_grid(size, 1)                                           # (1, M)
    M = mask.shape[1]
    noise = [torch.randn(1 + W, M, features, generator=generator) for generator in generators]
    return torch.stack(noise, 1).to(policy.device)


@torch.no_grad()
def sample_plan(
    policy: Policy, plan: list, *, seed: int, step: int, index: list[int], G: int,
    first_sample: int = 0, guidance: Guidance | None = None
) -> Rollout:
    """Act: walk the plan for the prompts with the given indices, G samples each.

    Indices seed the samples, and so does first_sample, the number of a group's first one. A
    sample's random numbers are drawn in the order of its chosen segments. An image that is drawn
    before the plan's end is read back clean: its latents at t = 0, then its pixels through the ViT.
    """
    generators = sample_generators(seed, step, index, range(first_sample, first_sample + G))
    reader = Reader(policy, len(index), guidance)
    segments = []
    for place, item in enumerate(plan):
        last = place + 1 == len(plan)
        if isinstance(item, Write | Draw):
            reader.repeat(G)
        if isinstance(item, Read):
            texts = [text for text in item.texts for _ in range(reader.repeats)]
            segment = Text(*policy.encode_text(texts, after=what_came(segments)))
            reader.text(segment.tokens, segment.mask)
        elif isinstance(item, See):
            segment = see(policy, item)
            reader.image(segment.pixels, segment.latents, segment.size)
        elif isinstance(item, Write):
            segment = write(policy, item, reader, generators)
            if not last:
                reader.text(segment.tokens, segment.mask, chosen=True)
        else:
            segment = draw(policy, item, reader, generators)
            if not last:
                segment = replace(
                    segment, pixels=vit_pixels(policy, decode_images(policy, segment)))
                reader.image(segment.pixels, segment.drawn.data, segment.size)
        segments.append(segment)
    return Rollout(tuple(segments), len(index), G, guidance)


def what_came(segments: list[Text | Picture]) -> str:
    """What a given text follows: "nothing", an "image" of the same turn, or another "turn"."""
    if not segments:
        return "nothing"
    last = segments[-1]
    return "image" if isinstance(last, Picture) and last.is_given else "turn"


def see(policy: Policy, item: See) -> Picture:
    """The segment of a given image."""
    sized = item.pixels if item.source is None else item.source
    size = [tuple(image.shape[-2:]) for image in sized]
    reads = item.source is not None and policy.reads_latents
    return Picture(size, item.pixels, policy.encode(item.source) if reads else None)


def write(policy: Policy, item: Write, reader: Reader, generators: list[torch.Generator]) -> Text:
    """Sample a text and wrap it: <|im_start|> sampled tokens <|im_end|>.

    If it was cut off, its end is given.
    """
    uniforms = torch.stack(
        [torch.rand(item.length, generator=generator) for generator in generators])
    tokens, mask, logp = policy.sample_text(
        reader.full, uniforms.to(policy.device), item.temperature)                  # (N, L) each
    ended = ((tokens == policy.end) & mask).any(1, keepdim=True)                    # (N, 1)
    tokens = torch.where(mask, tokens, policy.end)
    tokens = F.pad(F.pad(tokens, (1, 0), value=policy.start), (0, 1), value=policy.end)
    read = torch.cat([F.pad(mask, (1, 0), value=True), ~ended], dim=1)
    return Text(tokens, read, F.pad(mask, (1, 1)), F.pad(logp, (1, 1)), item.temperature)


def draw(policy: Policy, item: Draw, reader: Reader, generators: list[torch.Generator]) -> Picture:
    """Draw an image and keep its tokens, its trajectory, or the image with fresh noise.

    The fresh noise is one for a group.
    """
    if item.times is None:
        policy.check_size(item.size)
        M = policy.config.image_tokens
        uniforms = torch.stack([torch.rand(M, generator=generator) for generator in generators])
        tokens, logp = policy.sample_image(                                         # (N, M) each
            reader.full, uniforms.to(policy.device), item.temperature, **reader.branches())
        return Picture(item.size, drawn=ImageTokens(tokens, logp, item.temperature))
    count = item.window[1] - item.window[0] if item.match_times is None else len(item.match_times)
    noise = initial_noise(policy, item.size, generators, count)         # (1 + W or J, N, M, F)
    start = noise[0]                                                                # (N, M, F)
    if item.shared_noise:
        start = flow_grpo.shared_noise(start[::reader.repeats], reader.repeats)
    velocity = reader.velocity(item.size)
    flow = flow_grpo.rollout(
        velocity, start, item.times.to(policy.device), window=item.window,
        noise_level=item.noise_level, sampler=item.sampler, step_noise=noise[1:])
    if item.match_times is not None:
        # A group shares its noise: its advantages add up to 0, so that the noise nearly cancels.
        fresh = noise[1:, ::reader.repeats].repeat_interleave(reader.repeats, 1)    # (J, N, M, F)
        flow = flow_grpo.renoise(flow.data, item.match_times, fresh)
        if item.keeps_v:
            flow = replace(flow, v=flow_grpo.velocities_at(velocity, flow))
    return Picture(item.size, drawn=flow)


def decode_images(policy: Policy, picture: Picture) -> Tensor:
    """The images of a chosen segment, (N, 3, H, W), nominally in [-1, 1]."""
    pixels = picture.size[0] * picture.size[1]
    batch = max(1, min(256, 2**21 // pixels))   # a decoder's widest layer has 256 numbers a pixel
    images = [policy.decode(part, picture.size) for part in picture.drawn.data.split(batch)]
    return torch.cat(images)


# ---- learning ----


def replay_rollout(policy: Policy, rollout: Rollout) -> list[Scored]:
    """Learn: score the chosen segments of a rollout under `policy`, with gradients if they are on.

    Contexts are built inside the graph. All noisy steps of an image are one call, after one
    context.
    """
    reader = Reader(policy, rollout.B, rollout.guidance)
    out = []
    for segment in rollout.segments:
        if not segment.is_given:
            reader.repeat(rollout.G)
        if isinstance(segment, Text):
            chosen = not segment.is_given
            logits = reader.text(
                segment.tokens, segment.mask, chosen=chosen, logits=chosen)         # (N, L, V)
            if chosen:
                logp = token_logp(
                    logits[:, :-1], segment.tokens[:, 1:], segment.temperature or 1.0)    # (N, L-1)
                logp = torch.where(segment.chosen[:, 1:], logp, 0.0)
                out.append(Scored(segment, logp=F.pad(logp, (1, 0))))
        elif segment.is_given:
            reader.image(segment.pixels, segment.latents, segment.size)
        elif isinstance(segment.drawn, ImageTokens):
            tokens = segment.drawn.data
            temperature = segment.drawn.temperature
            logp = policy.score_image(                                              # (N, M)
                reader.full, tokens, temperature, **reader.branches())
            out.append(Scored(segment, logp=logp))
        else:
            x, t = segment.drawn.points                                 # (N, W, M, F), (W,)
            v = reader.velocity(segment.size)(x.flatten(0, 1), t.repeat(len(x)))    # (N*W, M, F)
            out.append(Scored(segment, v=v.view_as(x)))
        if isinstance(segment, Picture) and not segment.is_given and segment.pixels is not None:
            reader.image(segment.pixels, segment.drawn.data, segment.size)
    return out


# ---- parts of rollouts ----


# The fields that hold a row per prompt or sample.
ROWS = {
    Text: ("tokens", "mask", "chosen", "logp"),
    Picture: ("size", "pixels", "latents", "drawn"),
    ImageTokens: ("data", "logp"),
    flow_grpo.Trajectory: ("latents", "means", "logp", "data"),
    flow_grpo.Renoised: ("latents", "target", "data", "v"),
}


def map_rows(function: Callable, *records):
    """The first record, with its fields of rows as `function` makes them from those of all records.

    What is None, and one size for all, stays.
    """
    changed = {}
    for name in ROWS[type(records[0])]:
        columns = [getattr(record, name) for record in records]
        if type(columns[0]) in ROWS:
            changed[name] = map_rows(function, *columns)
        elif isinstance(columns[0], Tensor | list):
            changed[name] = function(*columns)
    return replace(records[0], **changed)


def subset(rollout: Rollout, prompts: Sequence[int], samples: range | None = None) -> Rollout:
    """Some prompts of a rollout, and some samples of each (None: all): a micro-batch."""
    samples = range(rollout.G) if samples is None else samples
    rows = list(prompts)
    segments = []
    for segment in rollout.segments:
        if not segment.is_given:                # from the first chosen segment on there are N rows
            rows = [prompt * rollout.G + sample for prompt in prompts for sample in samples]
        segments.append(map_rows(functools.partial(pick_rows, rows), segment))
    return replace(rollout, segments=tuple(segments), B=len(prompts), G=len(samples))


def pick_rows(rows: list[int], column: Tensor | list) -> Tensor | list:
    return [column[i] for i in rows] if isinstance(column, list) else column[rows]


def join(rollouts: list[Rollout]) -> Rollout:
    """One rollout of several that follow the same plan for other prompts.

    Texts are padded to the longest.
    """
    together = zip(*(rollout.segments for rollout in rollouts))
    segments = tuple(map_rows(join_rows, *same) for same in together)
    return replace(rollouts[0], segments=segments, B=sum(rollout.B for rollout in rollouts))


def join_rows(*columns: Tensor | list) -> Tensor | list:
    """All rows in one; tensors (n_i, L_i, ...) are padded with zeros along dimension 1."""
    if isinstance(columns[0], list):
        return sum(columns, [])
    longest = max(x.shape[1] for x in columns)
    unpadded = (0, 0) * (columns[0].ndim - 2)
    return torch.cat([F.pad(x, (*unpadded, 0, longest - x.shape[1])) for x in columns])


def texts_of(policy: Policy, rollout: Rollout, last: int = 1) -> list[str] | None:
    """What the samples wrote last, or (last=2) before that: N strings without markers, or None."""
    if len(rollout.texts) < last:
        return None
    text = rollout.texts[-last]
    return policy.decode_text(text.tokens, text.chosen)


def images_of(policy: Policy, rollout: Rollout, last: int = 1) -> Tensor | None:
    """What the samples drew last, or (last=2) before that: (N, 3, H, W) fp32 in [0, 1], or None."""
    if len(rollout.pictures) < last:
        return None
    return (decode_images(policy, rollout.pictures[-last]) * 0.5 + 0.5).clamp(0, 1)


# ---- refinement ----


@dataclass(frozen=True)
class Round:
    """What one round of refinement drew for N prompts, and what is kept after it."""

    drawn: Tensor                                                       # (N, 3, H, W) in [0, 1]
    worth: Tensor  # (N,) value of what was drawn
    kept: Tensor                                                        # (N, 3, H, W) in [0, 1]
    value: Tensor                                                       # (N,) value of what is kept
    texts: list[str] | None                     # what was written before it was drawn


def refine(
    policy: Policy, prompts: list[str], rounds: int, select: str, value: Callable[[Tensor], Tensor],
    write: Write, draw: Draw, *, look: str, seed: int, stop: str,
    guidance: tuple[Guidance | None, Guidance | None] = (None, None), system: bool = False
) -> list[Round]:
    """Draw, then look at what is kept and draw again, `rounds` times -> rounds + 1 Rounds.
    [AlphaGRPO]

    select: which picture is kept. "always": the new one (AlphaGRPO's code); "judge": the new one if
    its value is higher; "oracle": the new one if the old one's value is below 1, which asks the
    truth (AlphaGRPO's released evaluation); "self": the new one, unless the text before it says
    `stop` [R3]. value: images (N, 3, H, W) in [0, 1] -> (N,). look: the instruction, after which
    the policy writes and draws. system: whether BAGEL's think prompt comes before it.
    """
    N = len(prompts)
    start = [Read([THINK_TO_DRAW] * N)] if system else []
    looks = Read([look.format(prompt=prompt) for prompt in prompts])

    def walk(plan: list, step: int, guide: Guidance | None):
        rollout = sample_plan(
            policy, plan, seed=seed, step=step, index=range(N), G=1, guidance=guide)
        drawn = images_of(policy, rollout)
        return drawn, value(drawn), texts_of(policy, rollout)

    drawn, worth, texts = walk([Read(prompts), draw], 0, guidance[0])
    out = [Round(drawn, worth, drawn, worth, texts)]
    for step in range(1, rounds + 1):
        kept = out[-1].kept
        best = out[-1].value
        source = kept * 2 - 1
        seen = See(vit_pixels(policy, source), source)
        drawn, worth, texts = walk([*start, seen, looks, write, draw], step, guidance[1])
        said = torch.tensor([stop in text.lower() for text in texts]).to(worth.device)
        better = {
            "always": worth == worth, "judge": worth > best, "oracle": best < 1, "self": ~said
        }[select]
        kept = torch.where(better.to(drawn.device)[:, None, None, None], drawn, kept)
        out.append(Round(drawn, worth, kept, torch.where(better, worth, best), texts))
    return out


# ---- the command line ----

# What a person's samples take from the policy's scale. BAGEL's values are the official
# inferencer's, whose 50 points are 49 steps. Janus-Pro's are its demo's; it draws token by token.
# guidance: of a picture from text; edit: of an edit.
SAMPLING = {
    "toy": dict(
        size=32, steps=10, shift=2.0, tokens=24, system_prompt=False, zoom=4,
        guidance=Guidance(1.0), edit=Guidance(1.0), judge=str(TOY.parent / "judge")),
    "janus": dict(
        size=384, steps=None, shift=None, tokens=512, system_prompt=False, zoom=1,
        guidance=Guidance(5.0), edit=Guidance(5.0), judge="google/paligemma2-3b-mix-448"),
    "bagel": dict(
        size=1024, steps=49, shift=3.0, tokens=1024, system_prompt=True, zoom=1,
        guidance=Guidance(4.0), edit=Guidance(4.0, 2.0, "text_channel", 0.0, (0.0, 1.0)),
        judge="google/paligemma2-3b-mix-448"),
}
SAMPLING["toy_janus"] = SAMPLING["toy"] | dict(steps=None, shift=None)


def plain_draw(scale: str, size: Size, steps: int | None = None) -> Draw:
    """An image without noisy steps, in `steps` or as many as the scale takes; or its tokens.

    Errors: ValueError for steps of image tokens.
    """
    table = SAMPLING[scale]
    if table["steps"] is None:
        if steps:
            raise ValueError(f"--steps {steps}: this policy draws token by token; leave it out")
        return Draw(size)
    return Draw(size, flow_grpo.time_grid(steps or table["steps"], table["shift"]))


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="sample.py", description="Prompt in, PNG grid or answer out.")
    ap.add_argument(
        "prompt", type=plain_text,
        help="what to draw, what to ask about --question, or how to change --edit")
    ap.add_argument(
        "--policy", default=str(TOY), help="a policy folder: toy/policy, out/policy, BAGEL-7B-MoT"
    )
    ap.add_argument(
        "--adapter", default="", help="a folder of adapters to put on, such as out/adapter"
    )
    ap.add_argument("--think", action="store_true", help="write a thought first")
    given = ap.add_mutually_exclusive_group()
    given.add_argument(
        "--question", metavar="IMAGE", help="answer the prompt about this image instead of drawing"
    )
    given.add_argument("--edit", metavar="IMAGE", help="draw this image changed as the prompt says")
    ap.add_argument("--seed", type=number(int, least=0), default=0, help="seed of noise and texts")
    ap.add_argument("--n", type=number(int, least=1), default=8, help="samples")
    ap.add_argument(
        "--size", type=number(int, least=1),
        help="pixels per side; an edit keeps the image's (32 for the toy, 1024 for BAGEL, 384 for "
        "Janus)")
    ap.add_argument(
        "--steps", type=number(int, least=1), help="denoising steps (10 for the toy, 49 for BAGEL)"
    )
    ap.add_argument(
        "--temperature", type=number(float, least=0), default=0.0,
        help="temperature of the text; 0 is greedy")
    ap.add_argument(
        "--image_temperature", type=number(float, least=0),
        help="temperature of image tokens (1), of Janus; 0 is greedy")
    ap.add_argument(
        "--guidance", type=number(float, least=0),
        help="text guidance scale (1 for the toy, 4 for BAGEL, 5 for Janus); 1 is none")
    ap.add_argument(
        "--image_guidance", type=number(float, least=0),
        help="image guidance scale of an edit (1 for the toy, 2 for BAGEL)")
    ap.add_argument("--out", default="samples.png", help="the image that is written")
    ap.run(run, argv)


def check_kind(args: argparse.Namespace, policy: Policy) -> None:
    """ValueError for what means nothing to this kind of policy."""
    foreign = ("edit", "image_guidance")
    way = "token by token"
    if policy.reads_latents:
        foreign = ("image_temperature",)
        way = "by flow steps"
    for name in foreign:
        value = getattr(args, name)
        if value is not None:
            raise ValueError(f"--{name} {value}: {args.policy} draws {way}; leave it out")


def run(args: argparse.Namespace) -> str:
    """Carry out a parsed command line; returns what to print."""
    out = Path(args.out)
    if not args.question and (not out.parent.is_dir() or out.suffix.lower() != ".png"):
        raise ValueError(f"--out {out}: must be a .png file in a folder that exists")
    policy = load_policy(args.policy, device=the_device(), adapter=args.adapter)
    scale = SAMPLING[policy.config.scale]
    prompt = Read([args.prompt])
    check_kind(args, policy)
    write = Write(scale["tokens"], args.temperature)
    plan = []
    if args.think and scale["system_prompt"]:
        plan.append(Read([THINK_TO_ANSWER if args.question else THINK_TO_DRAW]))
    if args.question:
        pixels, _ = read_picture(args.question, policy)
        plan += [See(pixels[None]), prompt, write]
        G = args.n if args.temperature else 1
        rollout = sample_plan(policy, plan, seed=args.seed, step=0, index=[0], G=G)
        return "\n".join(texts_of(policy, rollout))
    size = (args.size or scale["size"],) * 2
    guidance = scale["edit" if args.edit else "guidance"]
    asked = dict(text_scale=args.guidance, image_scale=args.image_guidance)
    given = {name: value for name, value in asked.items() if value is not None}
    guidance = replace(guidance, **given)
    if args.edit:
        pixels, source = read_picture(args.edit, policy)
        plan.append(See(pixels[None], source[None]))
        size = tuple(source.shape[-2:])
    plan.append(prompt)
    if args.think:
        plan.append(write)
    draw = plain_draw(policy.config.scale, size, args.steps)
    if args.image_temperature is not None:
        draw = replace(draw, temperature=args.image_temperature)
    plan.append(draw)
    rollout = sample_plan(
        policy, plan, seed=args.seed, step=0, index=[0], G=args.n, guidance=guidance)
    save_grid(images_of(policy, rollout), out, columns=min(args.n, 8), zoom=scale["zoom"])
    texts = dict.fromkeys(texts_of(policy, rollout) or [])
    return "\n".join([*texts, f"{args.n} images in {args.out}"])


if __name__ == "__main__":
    main()
