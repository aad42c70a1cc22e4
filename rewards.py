"""Rewards and verifiers: what a finished sample is worth, one callable per idea, one float per sample.

Sources: LVRPO (arXiv 2603.27693) for the instruction, semantic, dense and knowledge rewards; CoRL (2505.17534) for accuracy and
format; AlphaGRPO (2605.12495) for the format before an image; GenEval (2310.11513) for the instruction rules.
LVRPO's method section and encoders are known from reviews only; "Differs" says what was chosen here.

A `Reward` is any callable Samples -> Tensor (N,): deterministic, finite, of a stated range. One that cannot be computed is an
error, never a low score. `load_*` reads a frozen model from a local folder or hub name, to be shared by the rewards that ask it.
Left out: CoRL's cycle and token-matching rewards, AlphaGRPO's decomposed questions, UniGRPO's preference model (not released),
training a referee together with the policy, advantages (they belong to the loss), and referees behind a network.

Notation: N samples flattened prompt-major, G samples per prompt, B = N/G groups, H x W pixels, P patches, D embedding width.

>>> samples = Samples(prompts=["how many circles ?"] * 2, metadata=[{}, {}], answers=["3", "3"],
...                   texts=["<think>one, two, three</think><answer>Three.</answer>", "4"])
>>> combine(score({"accuracy": answer_accuracy, "format": think_format}, samples), {"accuracy": 1.0, "format": 0.5})
tensor([1.5000, 0.0000])
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """What a reward may read, one entry per sample. A field that the task does not have is None."""

    prompts: list[str]
    metadata: list[dict]              # GenEval format: tag, include, exclude
    texts: list[str] | None = None    # what the policy wrote
    images: Tensor | None = None      # what it drew, (N, 3, H, W) in [0, 1]
    sources: Tensor | None = None     # the given image of a question or an edit, (N, 3, H, W) in [0, 1]
    answers: list[str] | None = None  # the right answer

    def __post_init__(self):
        for name, column in vars(self).items():
            if column is not None and len(column) != len(self.prompts):
                raise ValueError(f"Samples: {name} has {len(column)} entries for {len(self.prompts)} prompts")
        for name, x in (("images", self.images), ("sources", self.sources)):
            if x is not None and (x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point()):
                raise ValueError(f"Samples: {name} is {x.dtype} {tuple(x.shape)}, expected float (N, 3, H, W) in [0, 1]")

    def need(self, name: str):
        """The field of that name; ValueError where the task does not have it."""
        if getattr(self, name) is None:
            raise ValueError(f"samples have no {name}, which this reward reads")
        return getattr(self, name)


Reward = Callable[[Samples], Tensor]


class RewardError(RuntimeError):
    """A reward could not be computed; one line with its name and a prompt."""


@dataclass
class _Naming:
    """A context in which an error is raised again as one line that names the reward and a prompt."""

    name: str
    prompt: str

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception):
            what = " ".join(f"{kind.__name__}: {error}".split())
            raise RewardError(f"reward '{self.name}' failed on prompt {self.prompt!r}: {what}") from error


def score(rewards: dict[str, Reward], samples: Samples) -> dict[str, Tensor]:
    """Every reward on the batch: name -> (N,) fp32 on the CPU, finite.

    Errors: RewardError, one line with the reward's name and the first offending prompt (the batch's first where the reward
    itself raised), when a reward raises or returns anything but N finite floats.
    """
    scores, N = {}, len(samples.prompts)
    for name, reward in rewards.items():
        with _Naming(name, next(iter(samples.prompts), "")):
            value = reward(samples)
            if not isinstance(value, Tensor) or value.shape != (N,) or not value.is_floating_point():
                got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"it returned {got}, expected a float tensor ({N},)")
        scores[name] = value.detach().float().cpu()                            # (N,)
        for prompt, each in zip(samples.prompts, scores[name].tolist()):
            with _Naming(name, prompt):
                if not math.isfinite(each):
                    raise ValueError(f"it returned {each}")
    return scores


def _centred(components: dict[str, Tensor], G: int) -> dict[str, Tensor]:
    """Every component minus its group's mean, (B, G); exactly 0 in a tied group."""
    centred = {}
    for name, reward in components.items():
        if G < 2 or len(reward) % G:
            raise ValueError(f"G is {G} for {len(reward)} rewards of '{name}', expected a divisor of their number, at least 2")
        group = reward.view(-1, G)                                             # (B, G)
        tied = (group == group[:, :1]).all(1, keepdim=True)                    # (B, 1)
        centred[name] = (group - group.mean(1, keepdim=True)).masked_fill(tied, 0.0)
    return centred


def normalised(components: dict[str, Tensor], G: int, std: str = "population") -> dict[str, Tensor]:
    """Every component (N,) centred within its groups of G and divided by their std + 1e-4; exactly 0 in a tied group. std: "population"
    divides squares by n, "unbiased" by n - 1, as CoRL's code does.

    Their weighted sum is an advantage [CoRL's code, unify_advantage] in which weights mean what they say, where the advantage of the
    summed reward [LVRPO Eq. 3] follows the component that varies most (see variance_share). It amplifies a component that hardly
    varies. Errors: ValueError when G does not divide N or is below 2.
    """
    n = G - (std == "unbiased")
    spread = lambda each: (each.square().sum(1, keepdim=True) / n).sqrt()                     # noqa: E731
    return {name: (each / (spread(each) + 1e-4)).flatten() for name, each in _centred(components, G).items()}


def combine(components: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum of reward components, (N,) each -> (N,). Every component needs a weight; 0 = logged only. [LVRPO Eq. 3]

    Errors: ValueError when names and weights differ or there is none.
    """
    if components.keys() != weights.keys() or not components:
        raise ValueError(f"weights are given for {sorted(weights)}, components are {sorted(components)}: each needs one")
    return sum(weights[name] * reward for name, reward in components.items())


def variance_share(components: dict[str, Tensor], weights: dict[str, float], G: int) -> dict[str, float]:
    """Which component decides: cov(w_k r_k, sum) / var(sum) within groups; adds up to 1, negative = works against the sum.

    All are 0 when the sum does not vary within any group.
    """
    weighed = {name: weights[name] * each.double() for name, each in _centred(components, G).items()}  # (B, G) each
    total = sum(weighed.values())
    variance = total.square().sum().item()
    return {name: (part * total).sum().item() / variance if variance > 0 else 0.0 for name, part in weighed.items()}


NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}


def final_answer(text: str) -> str:
    """What a text answers: inside the first <answer>..</answer> behind the thought, else all that follows the last </think>."""
    text = text.rpartition("</think>")[2]
    inside, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    return inside if closed else text


def normalise_answer(text: str) -> str:
    """Lower case, single spaces, no surrounding punctuation, number words up to ten as digits; a sign or decimal point stays."""
    words = text.casefold().strip().lstrip("\"'`([{*_$ \t\n").rstrip("\"'`)]}*_$.,;:!? \t\n").split()
    return " ".join(NUMBERS.get(word, word) for word in words)


def answer_accuracy(samples: Samples) -> Tensor:
    """R_Acc: 1 if the final answer equals the right one after normalisation, else 0. (N,) in {0, 1} [CoRL]. A right answer may stand in
    <answer> tags of its own, as data sets for R1-like training have it.

    Gamed by guessing: the commonest answer earns its frequency. Only the first <answer> counts, so listing earns nothing.
    """
    pairs = zip(samples.need("texts"), samples.need("answers"))
    return torch.tensor([float(normalise_answer(final_answer(text)) == normalise_answer(final_answer(right))) for text, right in pairs])


def think_format(samples: Samples, *, answer: bool = True) -> Tensor:
    """R_Format: 1 if the text keeps the tags, else 0. (N,) in {0, 1}. Gamed by an empty thought: the tags alone earn it.

    answer=True: <think>..</think><answer>..</answer> and nothing else but spaces around the two blocks [CoRL].
    answer=False, a thought before an image: opens with <think>, closes it [AlphaGRPO]; an expanded prompt may follow [UniGRPO].

    Differs: each tag occurs once, where CoRL's pattern lets it occur again inside; AlphaGRPO wants </think> at the very end.
    """
    return torch.tensor([float(_keeps_tags(text.strip(), answer)) for text in samples.need("texts")])


def _keeps_tags(text: str, answer: bool) -> bool:
    tags = ("<think>", "</think>", "<answer>", "</answer>") if answer else ("<think>", "</think>")
    if any(text.count(tag) != 1 for tag in tags) or not text.startswith("<think>"):
        return False
    behind = text.partition("</think>")[2].strip()
    return not answer or (behind.startswith("<answer>") and behind.endswith("</answer>"))


COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")  # GenEval's order in a reason
RELATIONS = ("above", "below", "left of", "right of")


def relative_position(box_a, box_b, *, margin: float = 0.1) -> set[str]:
    """Where box A lies relative to box B, as a subset of RELATIONS; boxes (x1, y1, x2, y2) in pixels, y pointing down. [GenEval]

    The offset of the centres is shortened per axis by `margin` times the summed sizes, then divided by its unshortened length;
    a component beyond 0.5 is a relation.
    """
    offset, kept = [], []
    for low, high in ((0, 2), (1, 3)):
        apart = (box_a[low] + box_a[high] - box_b[low] - box_b[high]) / 2
        dead = margin * (abs(box_a[high] - box_a[low]) + abs(box_b[high] - box_b[low]))
        offset.append(apart)
        kept.append(math.copysign(max(abs(apart) - dead, 0.0), apart))
    if max(abs(part) for part in kept) < 1e-3:  # also where the centres coincide and the length is 0
        return set()
    dx, dy = (part / math.hypot(*offset) for part in kept)
    return {name for name, far in zip(RELATIONS, (-dy, dy, -dx, dx)) if far > 0.5}


def _include(clause: dict, found: dict, judged: list, margin: float) -> tuple[list, float, str]:
    """One include clause: the objects judged, the fraction of the required ones that is right, the reason of failure or ""."""
    name, required = clause["class"], clause["count"]
    top = found.get(name, [])[:required]  # only the best `count` are judged
    right = [True] * len(top)
    reason = f"expected {name}>={required}, found {len(top)}" if len(top) < required else ""
    if "color" in clause:
        color, seen = clause["color"], [thing.get("color") for thing in top]
        right = [c == color for c in seen]
        if not reason and not all(right):
            listed = [*COLORS, *sorted({c for c in seen if c is not None} - set(COLORS))]
            others = ", ".join(f"{seen.count(c)} {c}" for c in listed if c in seen)
            reason = f"expected {color} {name}>={required}, found {seen.count(color)} {color}; and {others}"
    if "position" in clause:
        relation, target = clause["position"]
        if relation not in RELATIONS or not 0 <= target < len(judged):
            raise ValueError(f"position {clause['position']} of {name}, expected one of {RELATIONS} and an earlier clause")
        targets, target_passes = judged[target]
        if not reason and not target_passes:
            reason = f"no target for {name} to be {relation}"
        for i, thing in enumerate(top):
            right[i] &= target_passes or bool(targets)
            for other in targets:
                holds = relative_position(thing["box"], other["box"], margin=margin)
                right[i] &= relation in holds
                if not reason and relation not in holds:
                    reason = f"expected {name} {relation} target, found {' and '.join(sorted(holds))} target"
    return top, sum(right) / required if required else 1.0, reason


def geneval_clauses(
    metadata: dict, detections: list[dict], *, threshold: float = 0.3, counting_threshold: float = 0.9, max_objects: int = 16,
    position_margin: float = 0.1,
) -> list[tuple[float, str]]:
    """(fraction satisfied in [0, 1], reason of failure or "") per include and exclude clause, in order; see geneval_check."""
    least = counting_threshold if metadata.get("tag") == "counting" else threshold
    found, results, judged = {}, [], []
    for thing in sorted(reversed(detections), key=lambda thing: -thing["score"]):  # equal scores: the later detection comes first
        if thing["score"] > least:
            found.setdefault(thing["class"], []).append(thing)
    found = {name: things[:max_objects] for name, things in found.items()}
    for clause in metadata.get("include", []):
        top, fraction, reason = _include(clause, found, judged, position_margin)
        results.append((fraction, reason))
        judged.append((top, not reason))
    for clause in metadata.get("exclude", []):
        name, limit, number = clause["class"], clause["count"], len(found.get(clause["class"], []))
        results.append((0.0, f"expected {name}<{limit}, found {number}") if number >= limit else (1.0, ""))
    return results


def geneval_check(metadata: dict, detections: list[dict], **settings) -> tuple[bool, str]:
    """GenEval's verdict on one image: (all clauses hold, reasons of failure joined by newlines). `settings`: geneval_clauses'.

    A detection is {"class", "box": [x1, y1, x2, y2], "score", "color"}, the colour only where a clause asks for one.
    Thresholds are strict; `max_objects` per class survive, best first; of an include clause the best `count` are judged for
    colour and position, every pair must be in the relation; more than `count` fails by `exclude` only. [GenEval, its code]

    Differs: two relations found at once are named in alphabetical order (the official order is arbitrary).
    """
    reasons = [reason for _, reason in geneval_clauses(metadata, detections, **settings) if reason]
    return not reasons, "\n".join(reasons)


@dataclass
class Instruction:
    """r_ins: do the objects of the drawn image keep the rules of the prompt's metadata? [LVRPO Sec. 3.2, Eq. 7]

    `detector(images (N, 3, H, W)) -> N lists of detections` as geneval_check reads them.
    All-of, {0, 1}: 1 if geneval_check passes. Graded, [0, 1]: the mean over clauses of the fraction satisfied, 1 only if all-of
    is 1; an include clause counts the right objects among the best `count`, an exclude clause is kept or broken.
    Gamed by whatever fools the detector; graded also by leaving objects out, since a blank image keeps every exclude clause.

    Differs: LVRPO's detector and how its rules combine are not confirmed; both ways are offered.
    """

    detector: Callable[[Tensor], list[list[dict]]]
    graded: bool = False

    def __call__(self, samples: Samples) -> Tensor:
        found = self.detector(samples.need("images"))
        if len(found) != len(samples.prompts):
            raise ValueError(f"the detector returned {len(found)} lists for {len(samples.prompts)} images")
        clauses = [geneval_clauses(*pair) for pair in zip(samples.metadata, found)]
        if self.graded:
            return torch.tensor([sum(part for part, _ in each) / len(each) if each else 1.0 for each in clauses])
        return torch.tensor([float(not any(reason for _, reason in each)) for each in clauses])


@functools.cache
def declare_torchvision_ops():
    """Let transformers and open_clip import where torchvision was built for another torch (a CUDA build beside a CPU torch).

    Its operators are missing then, and none is called here, so declaring their schemas is enough. The cache keeps the returned
    library alive. Does nothing where torchvision imports, or is not installed.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


@dataclass
class _Reading(contextlib.AbstractContextManager):
    """A context in which what the libraries raise at missing, damaged or other files is one line: an OSError where it was one, else a
    ValueError. tokenizers raises Exception itself, which an except clause could catch only together with all others."""
    path: str

    def __exit__(self, kind, error, trace):
        from huggingface_hub.errors import StrictDataclassError as Strict
        from safetensors import SafetensorError
        known = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, ImportError, SafetensorError, Strict)
        if kind is Exception or isinstance(error, known):
            what = f"{self.path} cannot be loaded, must be a folder or hub name with config, safetensors, tokenizer, preprocessor files: "
            raise (OSError if isinstance(error, OSError) else ValueError)(what + " ".join(str(error).split())[:300]) from error


def _frozen(model: torch.nn.Module, device, **faulty) -> torch.nn.Module:
    faulty["not_finite"] = [n for n, x in model.state_dict().items() if x.numel() and not torch.stack(x.aminmax()).isfinite().all()]
    if wrong := {what: sorted(map(str, keys))[:4] for what, keys in faulty.items() if keys}:
        raise ValueError(f"its weights are not those of its config: {wrong}")
    return model.to(device).eval().requires_grad_(False)


def _load(auto_class: str, model_type: str, path: str, device, dtype):
    """(frozen model, tokenizer, image processor) of a local folder or hub name, without remote code. Errors: OSError for missing files,
    ValueError for another kind of model and for weights that are damaged or not exactly the config's: transformers would draw some."""
    declare_torchvision_ops()
    import transformers
    transformers.utils.logging.disable_progress_bar()           # of the loading of weights, a bar per referee
    read = lambda auto: auto.from_pretrained(path, trust_remote_code=False)  # noqa: E731
    with _Reading(path):
        if (found := read(transformers.AutoConfig).model_type) != model_type:
            raise ValueError(f"it holds a {found} model, expected {model_type}")
        model, info = getattr(transformers, auto_class).from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
        return _frozen(model, device, **info), read(transformers.AutoTokenizer), read(transformers.AutoImageProcessor)


def to_pixels(images: Tensor, size: tuple[int, int], mode: str, mean, std) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> (N, 3, *size) as a vision tower reads it: antialiased resize, no crop, then (x - mean) / std."""
    x = images.float()
    if x.shape[-2:] != tuple(size):
        x = F.interpolate(x, size=tuple(size), mode=mode, antialias=True, align_corners=False).clamp(0, 1)
    mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (mean, std))
    return (x - mean) / std


def processor_pixels(images: Tensor, model, processor) -> Tensor:
    """What transformers' image processor would hand to the model, without its detour through 8 bits."""
    size, mode = (processor.size["height"], processor.size["width"]), {2: "bilinear", 3: "bicubic"}[int(processor.resample)]
    return to_pixels(images.to(model.device), size, mode, processor.image_mean, processor.image_std).to(model.dtype)


def _batched(function, batch_size: int, *columns) -> Tensor:
    """`function` on slices of at most `batch_size` rows of all columns, joined again."""
    starts = range(0, len(columns[0]), batch_size)
    return torch.cat([function(*(column[i:i + batch_size] for column in columns)) for i in starts])


@dataclass
class Siglip:
    """A SigLIP or fixed-resolution SigLIP 2 (transformers' SiglipModel): unit-length embeddings of images and texts (N, D) and of
    patches (N, P, D); images are (N, 3, H, W) in [0, 1]."""

    model: torch.nn.Module
    tokenizer: Callable
    image_processor: Callable
    batch_size: int = 128

    def pixels(self, images: Tensor) -> Tensor:
        return processor_pixels(images, self.model, self.image_processor)                     # (N, 3, size, size)

    def tokens(self, texts: list[str]) -> Tensor:
        """(N, length): lower-cased and padded to the full length without a mask, as both generations were trained."""
        length = self.model.config.text_config.max_position_embeddings
        ids = self.tokenizer([text.lower() for text in texts], padding="max_length", truncation=True, max_length=length)
        return torch.tensor(ids.input_ids, device=self.model.device)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        vision = self.model.vision_model
        pooled = _batched(lambda x: vision(pixel_values=self.pixels(x)).pooler_output, self.batch_size, images)
        return F.normalize(pooled.float(), dim=-1)                                            # (N, D)

    @torch.no_grad()
    def embed_patches(self, images: Tensor) -> Tensor:
        """Each patch through the pooling head by itself: attention over a single token returns that token's value."""
        vision = self.model.vision_model

        def patches(x):
            states = vision(pixel_values=self.pixels(x)).last_hidden_state                    # (N, P, D)
            return vision.head(states.flatten(0, 1)[:, None]).view_as(states)                 # (N, P, D)

        return F.normalize(_batched(patches, self.batch_size, images).float(), dim=-1)        # (N, P, D)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        text = self.model.text_model
        pooled = _batched(lambda x: text(input_ids=self.tokens(x)).pooler_output, self.batch_size, texts)
        return F.normalize(pooled.float(), dim=-1)                                            # (N, D)


def load_siglip(path: str, *, device="cpu", dtype=torch.float32, batch_size: int = 128) -> Siglip:
    """A frozen SigLIP, such as google/siglip2-so400m-patch14-384. NaFlex (variable resolution) is refused; errors: see _load."""
    return Siglip(*_load("AutoModel", "siglip", path, device, dtype), batch_size)


@dataclass
class OpenClip:
    """An open_clip model and its tokenizer: unit-length embeddings of images (N, 3, H, W) in [0, 1] and of texts, (N, D)."""

    model: torch.nn.Module
    tokenizer: Callable
    batch_size: int = 128

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        cfg, device = self.model.visual.preprocess_cfg, next(self.model.parameters()).device
        size = (cfg["size"],) * 2 if isinstance(cfg["size"], int) else cfg["size"]
        pixels = lambda x: to_pixels(x.to(device), size, cfg["interpolation"], cfg["mean"], cfg["std"])  # noqa: E731
        return _batched(lambda x: self.model.encode_image(pixels(x), normalize=True), self.batch_size, images)  # (N, D)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        device = next(self.model.parameters()).device
        return _batched(lambda x: self.model.encode_text(self.tokenizer(x).to(device), normalize=True), self.batch_size, texts)


def load_open_clip(path: str, *, device="cpu", batch_size: int = 128) -> OpenClip:
    """A frozen open_clip model from a local folder (open_clip_config.json and safetensors) or "hf-hub:owner/name", which is fetched without
    its pickle files, to which open_clip would fall back. Errors: see _load. Differs: images are squashed to a square, not cropped."""
    declare_torchvision_ops()
    import open_clip
    with _Reading(path):
        if path.startswith("hf-hub:"):
            from huggingface_hub import snapshot_download
            path = snapshot_download(path.removeprefix("hf-hub:"), allow_patterns=["*.json", "*.txt", "*.safetensors", "*.model"])
        if not any(Path(path, f"{stem}.safetensors").exists() for stem in ("open_clip_model", "open_clip_pytorch_model")):
            raise ValueError("it holds neither open_clip_model.safetensors nor open_clip_pytorch_model.safetensors")
        model = _frozen(open_clip.create_model(f"local-dir:{path}", require_pretrained=True), device)
        return OpenClip(model, open_clip.get_tokenizer(f"local-dir:{path}"), batch_size)


@dataclass
class Semantic:
    """r_sem: cosine of the frozen image and prompt embeddings, (N,) in [-1, 1]. [LVRPO Eq. 5]

    A published SigLIP varies by a few hundredths within a group, so that under a plain sum an all-or-nothing r_ins drowns it; a small
    one, trained on one kind of picture, may vary ten times as much and drown the rules (see variance_share).
    Gamed by texture: an image may match the prompt's words with wrong counts and places, or carry the words as writing.
    """

    encoder: Siglip | OpenClip

    def __call__(self, samples: Samples) -> Tensor:
        distinct = list(dict.fromkeys(samples.prompts))                                       # once per prompt, not per sample
        rows = [distinct.index(prompt) for prompt in samples.prompts]
        images = self.encoder.embed_images(samples.need("images"))                            # (N, D)
        return (images * self.encoder.embed_texts(distinct)[rows]).sum(-1).clamp(-1, 1)       # (N,)


def key_phrases(prompt: str, metadata: dict) -> list[str]:
    """The things a prompt names: "red circle" per include clause, or without clauses the prompt's content words."""
    clauses = metadata.get("include", [])
    phrases = [f"{clause.get('color', '')} {clause['class']}".strip() for clause in clauses]
    small = {"", "a", "an", "the", "of", "and", "or", "in", "on", "at", "to", "with", "is", "are", "photo", "image", "picture"}
    words = [word.strip(".,;:!?\"'") for word in prompt.lower().split()]
    return list(dict.fromkeys(phrases or [word for word in words if word not in small] or [prompt]))


@dataclass
class Dense:
    """r_dense: 1/|K| sum over key phrases k of max over patches p of cos(patch p, phrase k), (N,) in [-1, 1]. [LVRPO Eq. 12]

    Gamed: one patch per phrase satisfies the paper's reduce="max", so a bag of tiny matching patches does; "mean" asks the whole
    image and is gamed by filling it with one thing.

    Differs: what a patch embedding is, is not confirmed. Here a patch passes SigLIP's pooling head alone, which brings it into
    the space shared with texts. Key phrases are `key_phrases`.
    """

    encoder: Siglip
    reduce: str = "max"

    def __call__(self, samples: Samples) -> Tensor:
        if self.reduce not in ("max", "mean"):
            raise ValueError(f'reduce is {self.reduce!r}, expected "max" or "mean"')
        phrases = [key_phrases(prompt, metadata) for prompt, metadata in zip(samples.prompts, samples.metadata)]
        distinct = list(dict.fromkeys(phrase for each in phrases for phrase in each))
        patches = self.encoder.embed_patches(samples.need("images"))                          # (N, P, D)
        cosine = patches @ self.encoder.embed_texts(distinct).T                               # (N, P, phrases)
        cosine = cosine.amax(1) if self.reduce == "max" else cosine.mean(1)                   # (N, phrases)
        mine = torch.tensor([[phrase in each for phrase in distinct] for each in phrases], device=cosine.device)
        return ((cosine * mine).sum(1) / mine.sum(1)).clamp(-1, 1)                            # (N,)


@dataclass
class Judge:
    """A yes/no judge: PaliGemma or PaliGemma 2, the open relatives of LVRPO's PaLI-3.

    A row is <image> * P, <bos>, question, newline, all of it prefix that sees itself fully; the next token answers. Rows are
    padded on the left, with positions counted from the first real token, so padding changes nothing.
    Errors: ValueError unless the tokenizer has "yes" and "no" as one known token each.
    """

    model: torch.nn.Module
    tokenizer: Callable
    image_processor: Callable
    batch_size: int = 128
    max_question: int = 96

    def __post_init__(self):
        ids = [self.tokenizer(word, add_special_tokens=False).input_ids for word in ("yes", "no")]
        if any(len(each) != 1 or each[0] == self.tokenizer.unk_token_id for each in ids):
            raise ValueError(f"the judge's tokenizer reads yes and no as {ids}, expected one known token each")
        self.answers = [each[0] for each in ids]

    def rows(self, questions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (N, L) each. A question is cut at `max_question` tokens and cannot smuggle in image tokens."""
        config, device = self.model.config, self.model.device
        vision, image, pad = config.vision_config, config.image_token_id, self.tokenizer.pad_token_id
        head = [image] * (vision.image_size // vision.patch_size) ** 2 + [self.tokenizer.bos_token_id]
        texts = ["\n"] + [" ".join(question.split()) for question in questions]
        newline, *asked = self.tokenizer(texts, add_special_tokens=False).input_ids
        rows = [head + [i for i in ids if i != image][:self.max_question] + newline for ids in asked]
        gaps = [max(map(len, rows)) - len(row) for row in rows]
        ids = torch.tensor([[pad] * gap + row for gap, row in zip(gaps, rows)], device=device)
        mask = torch.tensor([[0] * gap + [1] * len(row) for gap, row in zip(gaps, rows)], device=device)
        return ids, mask

    def logits(self, images: Tensor, questions: list[str]) -> Tensor:
        """(N, 2): the logits of "yes" and "no" as the first generated token. Gradients flow, so a judge can learn from them."""
        ids, mask = self.rows(questions)
        pixels = processor_pixels(images, self.model, self.image_processor)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=mask.cumsum(1).clamp(min=1), pixel_values=pixels,
                         token_type_ids=torch.zeros_like(ids), use_cache=False, logits_to_keep=1)  # type 0 = prefix
        return out.logits[:, -1, self.answers].float()                                        # (N, 2)

    @torch.no_grad()
    def yes_probability(self, images: Tensor, questions: list[str]) -> Tensor:
        """P(yes) / (P(yes) + P(no)) per image and question, (N,) in [0, 1]."""
        return _batched(self.logits, self.batch_size, images, questions).softmax(-1)[:, 0]    # (N,)


def load_judge(path: str, *, device="cpu", dtype=torch.float32, batch_size: int = 128) -> Judge:
    """A frozen Judge, such as google/paligemma2-3b-mix-448. Errors: see _load."""
    return Judge(*_load("AutoModelForImageTextToText", "paligemma", path, device, dtype), batch_size)


@dataclass
class Knowledge:
    """r_kn: the judge's P(yes) / (P(yes) + P(no)), (N,) in [0, 1]. [LVRPO Sec. 3.2]

    A drawn image is asked `question` about its prompt. Where nothing was drawn, the source image is asked whether the written
    answer fits (`statement`); the judge sees the final answer, never the thought.
    Gamed by wording that the judge agrees with, by images at the edge of its training data, and by its yes-bias.

    Differs: LVRPO's equation and templates are not confirmed.
    """

    judge: Judge
    question: str = "is this {prompt} ?"
    statement: str = "{prompt} is the answer {answer} ?"

    def __call__(self, samples: Samples) -> Tensor:
        if samples.images is not None:
            asked = [self.question.format(prompt=prompt) for prompt in samples.prompts]
            return self.judge.yes_probability(samples.images, asked)
        pairs = zip(samples.prompts, samples.need("texts"))
        asked = [self.statement.format(prompt=prompt, answer=final_answer(text).strip()) for prompt, text in pairs]
        return self.judge.yes_probability(samples.need("sources"), asked)


# ---- the table of rewards ----


class Models:
    """What rewards are built from: the settings of a run and the models that rewards share, each loaded when it is first asked for. cfg
    has siglip, judge (folders or hub names), referee_batch and graded; detector: images -> detections, or None."""

    def __init__(self, cfg, device, detector=None):
        self.cfg, self.device, self.found_by = cfg, device, detector

    @functools.cached_property
    def encoder(self) -> Siglip | OpenClip:
        path = self.cfg.siglip
        open_clip = path.startswith("hf-hub:") or any(Path(path).glob("open_clip_*.safetensors"))
        return (load_open_clip if open_clip else load_siglip)(path, device=self.device, batch_size=self.cfg.referee_batch)

    @functools.cached_property
    def judge(self) -> Judge:
        return load_judge(self.cfg.judge, device=self.device, batch_size=self.cfg.referee_batch)

    @property
    def detector(self) -> Callable:
        if self.found_by is None:
            raise ValueError("--ins reads detections, and nothing detects objects in images of files; set --ins 0 and use --sem or --kn")
        return self.found_by

    @property
    def patches(self) -> Siglip:
        if isinstance(self.encoder, OpenClip):
            raise ValueError(f"--dense reads patches, which open_clip's {self.cfg.siglip} does not give; use transformers' or --dense 0")
        return self.encoder


@dataclass(frozen=True)
class Entry:
    """A row of REWARDS: the help of the flag of its weight, the fields of Samples that it reads (one of these sets), how it is built."""

    help: str
    reads: tuple[tuple[str, ...], ...]
    build: Callable[[Models], Reward]


# The sum of a task's rewards adds them in this order. To add a reward, write its function and its row.
REWARDS = {
    "sem": Entry("r_sem, SigLIP cosine of image and prompt [LVRPO Eq. 5]", (("images",),), lambda m: Semantic(m.encoder)),
    "kn": Entry("r_kn, yes/no confidence of the judge [LVRPO]", (("images",), ("sources", "texts")), lambda m: Knowledge(m.judge)),
    "dense": Entry("r_dense, max over patches per key phrase [LVRPO Eq. 12]", (("images",),), lambda m: Dense(m.patches)),
    "ins": Entry("r_ins, GenEval's rules on detections [LVRPO Eq. 7]", (("images",),), lambda m: Instruction(m.detector, m.cfg.graded)),
    "accuracy": Entry("the right answer to a question [CoRL]", (("texts", "answers"),), lambda m: answer_accuracy),
    "format": Entry("think tags of a thought before an image [AlphaGRPO]", (("texts", "images"),),
                    lambda m: functools.partial(think_format, answer=False)),
}
