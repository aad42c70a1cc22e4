"""Rewards and verifiers: what a finished sample is worth, one callable per idea, one float per sample.

Sources: LVRPO (arXiv 2603.27693) for the instruction, semantic, dense and knowledge rewards; CoRL (2505.17534) for accuracy and
format; AlphaGRPO (2605.12495) for the format before an image; GenEval (2310.11513) for the instruction rules.
LVRPO's method section and encoders are known from reviews only; "Differs" says what was chosen here.

A `Reward` is any callable Samples -> Tensor (N,): deterministic, finite, of a stated range. One that cannot be computed is an
error, never a low score. Rewards that ask a model get it from referees.py, or any object with the methods that they call.
Left out: CoRL's cycle and token-matching rewards, AlphaGRPO's decomposed questions, UniGRPO's preference model (not released),
training a referee together with the policy, advantages (they belong to the loss), and referees behind a network.

Notation: N samples flattened prompt-major, G samples per prompt, B = N/G groups, H x W pixels, P patches, D embedding width.

>>> samples = Samples(prompts=["how many circles ?"] * 2, metadata=[{}, {}], answers=["3", "3"],
...                   texts=["<think>one, two, three</think><answer>Three.</answer>", "4"])
>>> combine(score({"accuracy": answer_accuracy, "format": think_format}, samples), {"accuracy": 1.0, "format": 0.5})
tensor([1.5000, 0.0000])
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
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


@dataclass
class Semantic:
    """r_sem: cosine of the frozen image and prompt embeddings, (N,) in [-1, 1]. [LVRPO Eq. 5]

    A published SigLIP varies by a few hundredths within a group, so that under a plain sum an all-or-nothing r_ins drowns it; a small
    one, trained on one kind of picture, may vary ten times as much and drown the rules (see variance_share).
    Gamed by texture: an image may match the prompt's words with wrong counts and places, or carry the words as writing.
    """

    encoder: object                                             # with embed_images, embed_texts: referees.Siglip or OpenClip

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

    encoder: object                                             # with embed_patches, embed_texts: referees.Siglip
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
class Knowledge:
    """r_kn: the judge's P(yes) / (P(yes) + P(no)), (N,) in [0, 1]. [LVRPO Sec. 3.2]

    A drawn image is asked `question` about its prompt. Where nothing was drawn, the source image is asked whether the written
    answer fits (`statement`); the judge sees the final answer, never the thought.
    Gamed by wording that the judge agrees with, by images at the edge of its training data, and by its yes-bias.

    Differs: LVRPO's equation and templates are not confirmed.
    """

    judge: object                                               # with yes_probability: referees.Judge
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


@dataclass(frozen=True)
class Entry:
    """A row of REWARDS: the help of the flag of its weight, the fields of Samples that it reads (one of these sets), how it is built."""

    help: str
    reads: tuple[tuple[str, ...], ...]
    build: Callable[..., Reward]                                # from referees.Models


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
