"""Rewards and verifiers: what a finished sample is worth, one callable per idea, one float per sample.

Sources: LVRPO (arXiv 2603.27693) for the semantic, dense and knowledge rewards, its instruction reward is in geneval.py; CoRL (2505.17534)
for accuracy, format, cycle consistency and token matching; AlphaGRPO (2605.12495) for decomposed questions and the format before an image.
LVRPO's method section and encoders are known from reviews only; "Differs" says what was chosen here.

A `Reward` is any callable Samples -> Tensor (N,): deterministic, finite, of a stated range. One that cannot be computed is an
error, never a low score. Rewards that ask a model get it from referees.py, or any object with the methods that they call.
Left out: UniGRPO's own preference model (not released), reading of written words (OCR), which needs a package of its own, advantages
(they belong to the loss), and referees behind a network.

Notation: N samples flattened prompt-major, G samples per prompt, B = N/G groups, H x W pixels, P patches, D embedding width.

>>> samples = Samples(prompts=["how many circles ?"] * 2, metadata=[{}, {}], answers=["3", "3"], formats=["answer"] * 2,
...                   texts=["<think>one, two, three</think><answer>Three.</answer>", "4"])
>>> combine(score({"accuracy": answer_accuracy, "format": think_format}, samples), {"accuracy": 1.0, "format": 0.5})
tensor([1.5000, 0.0000])
"""

import difflib
import math
import os
import string
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

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
    reals: Tensor | None = None       # the real image of the prompt, (N, 3, H, W) in [0, 1]
    answers: list[str] | None = None  # the right answer
    options: list[list[str] | None] | None = None   # of a multiple-choice question, whose answer is a letter or one of them
    formats: list[str] | None = None  # the tags that each text was asked for: "thought" before an image, or "answer"
    earlier: Tensor | None = None     # what the policy drew in the round before, (N, 3, H, W) in [0, 1]

    def __post_init__(self):
        for name, column in vars(self).items():
            if column is not None and len(column) != len(self.prompts):
                raise ValueError(f"Samples: {name} has {len(column)} entries for {len(self.prompts)} prompts")
        for name, x in (("images", self.images), ("sources", self.sources), ("reals", self.reals), ("earlier", self.earlier)):
            if isinstance(x, list):
                raise ValueError(f"Samples: {name} have the sizes {sorted({tuple(each.shape[-2:]) for each in x})}, must all be of one")
            if x is not None and (x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point()):
                raise ValueError(f"Samples: {name} is {x.dtype} {tuple(x.shape)}, expected float (N, 3, H, W) in [0, 1]")

    def need(self, name: str):
        """The field of that name; ValueError where the task does not have it."""
        if getattr(self, name) is None:
            raise ValueError(f"samples have no {name}, which this reward reads")
        return getattr(self, name)


Reward = Callable[[Samples], Tensor]


class RewardError(ValueError):
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
            what, (*_, place) = " ".join(f"{kind.__name__}: {error}".split()), traceback.extract_tb(trace)
            what += f" ({os.path.basename(place.filename)}:{place.lineno})"
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
        for n, (prompt, each) in enumerate(zip(samples.prompts, scores[name].tolist())):
            with _Naming(name, prompt):
                if not math.isfinite(each):
                    raise ValueError(f"it returned {each} for sample {n}")
    return scores


def combine(components: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum of reward components, (N,) each -> (N,). Every component needs a weight; 0 = logged only. [LVRPO Eq. 3]

    Errors: ValueError when names and weights differ or there is none.
    """
    if components.keys() != weights.keys() or not components:
        raise ValueError(f"weights are given for {sorted(weights)}, components are {sorted(components)}: each needs one")
    return sum(weights[name] * reward for name, reward in components.items())


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


def right_option(answer: str, options: list[str]) -> int:
    """The place of the right option, which the answer names by letter or text. ValueError where it names none, or two."""
    held = [i for i in range(len(options)) if normalise_answer(answer) in _says_option(i, options)]
    if len(held) != 1:
        raise ValueError(f"the answer {answer[:60]!r} is {len(held)} of the options {options}, must be the letter or the text of one")
    return held[0]


def _says_option(i: int, options: list[str]) -> set[str]:
    """All that says option i, normalised: its letter, its text, or both. A text that is another option's letter counts as the letter."""
    letter, text = string.ascii_lowercase[i], normalise_answer(options[i])
    letters = set(string.ascii_lowercase[:len(options)]) - {letter}
    return {letter, text, *(f"{letter}{mark} {text}" for mark in ("", ")", ".", ":"))} - letters


def answer_accuracy(samples: Samples, *, graded: bool = False) -> Tensor:
    """R_Acc: is the final answer the right one? (N,) in [0, 1] [CoRL]. A right answer may stand in <answer> tags of its own, as data
    sets for R1-like training have it.

    Multiple choice, where a sample has options, {0, 1}: the right letter, "(b)" or "b.", or the right option's text, or both, and nothing
    else, so that a letter inside other words earns nothing. Open, {0, 1}: equal after normalisation. Open and graded: soft_jaccard of the
    two, as CoRL's code has it; its paper has all or nothing.
    Gamed by guessing: the commonest answer earns its frequency. Only the first <answer> counts, so listing earns nothing; graded, listing
    earns the share of right words.
    """
    texts, answers, scores = samples.need("texts"), samples.need("answers"), []
    for text, right, options in zip(texts, answers, samples.options or [None] * len(texts)):
        said, right = normalise_answer(final_answer(text)), final_answer(right)
        if options:
            scores.append(float(said in _says_option(right_option(right, options), options)))
        elif graded:
            scores.append(soft_jaccard(said, normalise_answer(right)))
        else:
            scores.append(float(said == normalise_answer(right)))
    return torch.tensor(scores)


def soft_jaccard(a: str, b: str) -> float:
    """Jaccard of the word sets of two texts, in [0, 1], with near words counted in part. [CoRL's code]

    Equal words count 1; each other word of a takes the free word of b that is most like it by difflib's ratio, if at least 0.8, and counts
    that ratio. The union is |A| + |B| minus that sum. Two empty texts are alike.
    Differs: ties are broken by the words' order in the alphabet, which the authors leave to Python's sets.
    """
    first, second = set(a.lower().split()), set(b.lower().split())
    shared = first & second
    common, free = float(len(shared)), sorted(second - shared)
    for word in sorted(first - shared):
        likeness = [difflib.SequenceMatcher(None, word, other).ratio() for other in free]
        if likeness and max(likeness) >= 0.8:
            common += max(likeness)
            free.pop(likeness.index(max(likeness)))
    union = len(first) + len(second) - common
    return common / union if union else 1.0


def think_format(samples: Samples) -> Tensor:
    """R_Format: 1 if the text keeps the tags that it was asked for, else 0. (N,) in {0, 1}. Gamed by an empty thought: the tags earn it.

    "answer": <think>..</think><answer>..</answer> and nothing else but spaces around the two blocks [CoRL].
    "thought", before an image: opens with <think>, closes it [AlphaGRPO]; an expanded prompt may follow [UniGRPO].

    Differs: each tag occurs once, where CoRL's pattern lets it occur again inside; AlphaGRPO wants </think> at the very end.
    """
    pairs = zip(samples.need("texts"), samples.need("formats"))
    return torch.tensor([float(_keeps_tags(text.strip(), asked == "answer")) for text, asked in pairs])


def _keeps_tags(text: str, answer: bool) -> bool:
    tags = ("<think>", "</think>", "<answer>", "</answer>") if answer else ("<think>", "</think>")
    if any(text.count(tag) != 1 for tag in tags) or not text.startswith("<think>"):
        return False
    behind = text.partition("</think>")[2].strip()
    return not answer or (behind.startswith("<answer>") and behind.endswith("</answer>"))


@dataclass
class Semantic:
    """r_sem: cosine of the frozen image and prompt embeddings, (N,) in [-1, 1]. [LVRPO Eq. 5]

    A published SigLIP varies by a few hundredths within a group, so that under a plain sum an all-or-nothing r_ins drowns it; a small
    one, trained on one kind of picture, may vary ten times as much and drown the rules (see grpo.variance_share).
    Gamed by texture: an image may match the prompt's words with wrong counts and places, or carry the words as writing.
    """

    encoder: object                                             # with embed_images, embed_texts: referees.Siglip or OpenClip

    def __call__(self, samples: Samples) -> Tensor:
        distinct = list(dict.fromkeys(samples.prompts))                                       # once per prompt, not per sample
        rows = [distinct.index(prompt) for prompt in samples.prompts]
        images = self.encoder.embed_images(samples.need("images"))                            # (N, D)
        return (images * self.encoder.embed_texts(distinct)[rows]).sum(-1).clamp(-1, 1)       # (N,)


@dataclass
class Instruction:
    """r_ins: do the objects of the drawn image keep the rules of the prompt's metadata? [LVRPO Sec. 3.2, Eq. 7]

    detector(images (N, 3, H, W), metadata) -> N lists of detections; worth(metadata, detections) -> a number in [0, 1], such as
    referees.geneval.graded, the mean over clauses of the fraction satisfied.
    Gamed by whatever fools the detector; graded also by leaving objects out, since a blank image keeps every exclude clause.

    Differs: LVRPO's detector and how its rules combine are not confirmed; several ways are offered.
    """

    detector: Callable[[Tensor, list[dict]], list[list[dict]]]
    worth: Callable[[dict, list[dict]], float]

    def __call__(self, samples) -> Tensor:
        found = self.detector(samples.need("images"), samples.metadata)
        if len(found) != len(samples.prompts):
            raise ValueError(f"the detector returned {len(found)} lists for {len(samples.prompts)} images")
        return torch.tensor([self.worth(*row) for row in zip(samples.metadata, found)])


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


def aggregate(answers: list[float], questions: list, how: str = "geometric") -> float:
    """What a picture is worth from the judge's answers in [0, 1] to its questions, in [0, 1]. [AlphaGRPO]

    "geometric": sqrt(mean of the semantic answers * mean of the quality answers), "arithmetic": half of each, "pooled": the mean of all,
    "binary": geometric of answers that are 1 above one half and else 0. ValueError where a half is empty.
    """
    if how == "binary":
        answers = [float(answer > 0.5) for answer in answers]
    halves = [[a for a, q in zip(answers, questions) if q.quality == quality] for quality in (False, True)]
    if not all(halves):
        raise ValueError(f"{len(halves[0])} semantic and {len(halves[1])} quality questions, needs at least one of each")
    if how == "pooled":
        return sum(answers) / len(answers)
    semantic, quality = (sum(half) / len(half) for half in halves)
    return (semantic + quality) / 2 if how == "arithmetic" else math.sqrt(semantic * quality)


@dataclass
class Decomposed:
    """DVReward: the judge's answers to single yes/no questions about the drawn image, (N,) in [0, 1]; see aggregate. [AlphaGRPO]

    questions(prompt, metadata) -> questions with text, tag, quality and needs: places of earlier ones without whose yes they score 0.
    how="holistic" asks the one question of Knowledge instead, AlphaGRPO's contrast. `by_tag` holds, after a call, the sum and number of
    the answers by tag.
    Gamed by whatever the judge misreads, and, as the mean of many easy questions, by leaving the one hard fact out.

    Differs: an attribute of an absent thing scores 0, where the reference asks all questions alike; an empty half is an error, not 1.
    """

    judge: object                                               # with yes_probability: referees.Judge
    questions: Callable[[str, dict], list]
    how: str = "geometric"
    by_tag: dict = field(default_factory=dict)

    def __call__(self, samples: Samples) -> Tensor:
        images, self.by_tag = samples.need("images"), {}
        if self.how == "holistic":
            return Knowledge(self.judge)(samples)
        asked = [self.questions(*row) for row in zip(samples.prompts, samples.metadata)]
        of = [n for n, each in enumerate(asked) for _ in each]
        said = iter(self.judge.yes_probability(images, [q.text for each in asked for q in each], of).tolist())
        scores = []
        for each in asked:
            answers = [next(said) for _ in each]
            for i, q in enumerate(each):                        # in their order, so that a need that fell takes its own with it
                if any(answers[n] < 0.5 for n in q.needs):
                    answers[i] = 0.0
            scores.append(aggregate(answers, each, self.how))
            for q, answer in zip(each, answers):
                total, count = self.by_tag.get(q.tag, (0.0, 0))
                self.by_tag[q.tag] = (total + answer, count + 1)
        return torch.tensor(scores)


@dataclass
class SoftTifa:
    """Soft-TIFA: the judge's probability of the expected answer to each atom of the prompt, (N,) in [0, 1]. [GenEval 2, arXiv 2512.16853]

    The atoms are the rows [question, answer] of the prompt's `vqa_list`, as GenEval 2's file has them, where the answer is yes or, of
    a count, a number; else the semantic `questions` of Decomposed, which expect a yes. The first token must say it: as word or digit, in
    any case, of the whole vocabulary. how: "arithmetic" mean over atoms, or "geometric", which one missing atom brings to 0.
    Gamed as Decomposed; by the yes-bias of a judge, since a no-question is never asked.

    Differs: the published judge reads the 20 likeliest tokens alone.
    """

    judge: object                                               # with answer_probability: referees.Judge
    questions: Callable[[str, dict], list]
    how: str = "arithmetic"

    def __call__(self, samples: Samples) -> Tensor:
        atoms = [self.atoms(*row) for row in zip(samples.prompts, samples.metadata)]
        of = [n for n, each in enumerate(atoms) for _ in each]
        asked, wanted = ([atom[part] for each in atoms for atom in each] for part in (0, 1))
        said = self.judge.answer_probability(samples.need("images"), asked, wanted, of).float().cpu().split([len(each) for each in atoms])
        mean = (lambda x: x.mean()) if self.how == "arithmetic" else (lambda x: x.clamp(min=1e-12).log().mean().exp())
        return torch.stack([mean(each) for each in said])

    def atoms(self, prompt: str, metadata: dict) -> list[tuple[str, str]]:
        """(question, expected answer) of each atom; ValueError where there is none."""
        listed = [(question, str(answer)) for question, answer in metadata.get("vqa_list", [])]
        listed = listed or [(q.text, "yes") for q in self.questions(prompt, metadata) if not q.quality]
        if not listed:
            raise ValueError("it has no atoms: neither a vqa_list nor questions")
        return listed


@dataclass
class Preference:
    """What a preference model says of the drawn image and its prompt, (N,), unbounded. UniGRPO's terminal reward is of this kind; its own
    model is not released. Gamed by the look that the model's raters liked, whatever the prompt."""

    model: object                                               # with score(images, prompts): preferences.load_preference

    def __call__(self, samples: Samples) -> Tensor:
        return self.model.score(samples.need("images"), samples.prompts)


# ---- cycle consistency and token matching [CoRL] ----

def token_f1(a: Tensor, a_mask: Tensor, b: Tensor, b_mask: Tensor) -> Tensor:
    """BERTScore's F1 of token states (N, La, D) and (N, Lb, D) under their masks: (N,) in [-1, 1]. Greedy maxima of the cosine, no idf."""
    recall, precision = _best_matches(a, a_mask, b, b_mask)
    return 2 * recall * precision / (recall + precision).clamp(min=1e-6)


def _best_matches(a: Tensor, a_mask: Tensor, b: Tensor, b_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(mean over tokens of a of the largest cosine with a token of b, the same of b with a), (N,) each."""
    cosine = F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).transpose(1, 2)  # (N, La, Lb)
    hidden = ~(a_mask[:, :, None] & b_mask[:, None, :])
    cosine = cosine.masked_fill(hidden, -1.0)
    mean = lambda best, mask: (best * mask).sum(1) / mask.sum(1).clamp(min=1)
    return mean(cosine.amax(2), a_mask), mean(cosine.amax(1), b_mask)


@dataclass
class Recaption:
    """r_cycle, the text half: does a caption of the drawn image say what the prompt says? (N,) in [0, 1]. [CoRL]

    how: "tuples", the F1 of objects, attributes and relations that CoRL's paper takes from SPICE, here by rule (caption_tuples);
    "jaccard", soft_jaccard, a part of CoRL's code of June 2025; "bertscore", the F1 of token states that its code of May 2025 takes.
    Four versions of the cycle reward are in print: SPICE + LPIPS (paper), BERT-F1 + LPIPS, (BERT-F1 + Jaccard)/2 + RMSE, and the last
    with the policy as its own captioner. Ours is the paper's, tuples by rule, beside Likeness with SSIM.
    Gamed by pictures that the captioner misreads; jaccard also by any picture whose caption shares the small words.
    """

    captioner: object                                           # with captions(images): referees.captioner.Captioner
    score: Callable[[list[str], list[str]], Tensor]             # (prompts, captions) -> (N,) in [0, 1]

    def __call__(self, samples: Samples) -> Tensor:
        return self.score(samples.prompts, self.captioner.captions(samples.need("images")))


def structural_similarity(a: Tensor, b: Tensor, *, window: int = 11, sigma: float = 1.5) -> Tensor:
    """SSIM of images (N, 3, H, W) in [0, 1], (N,) in [-1, 1]: Gaussian window, mean over channels and the places where it fits whole."""
    at = torch.arange(window, device=a.device) - (window - 1) / 2
    bell = torch.exp(-at.square() / (2 * sigma**2))
    kernel = torch.outer(bell, bell).div(bell.sum() ** 2).expand(3, 1, window, window)
    blur = lambda x: F.conv2d(x, kernel, groups=3)
    mean_a, mean_b = blur(a), blur(b)                                                         # (N, 3, H', W')
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance, c1, c2 = blur(a * b) - mean_a * mean_b, 0.01**2, 0.03**2
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return alike.mean((1, 2, 3))                                                              # (N,)


@dataclass
class Likeness:
    """r_cycle, the image half: is the drawn image like the row's real one? (N,) in [0, 1]. [CoRL]

    how: "ssim", clamped at 0; "mse", 1 - mean squared error; "psnr", in dB, divided by 50 and clamped; "lpips", 1 - LPIPS, clamped (the
    paper's; v3 of the paper finds SSIM and LPIPS better than the pixel-wise two). The real image is resized to the drawn one's size.
    Gamed by blur and by a plain ground, which are near every picture; it also asks for places and colours that the prompt leaves free.
    """

    how: str = "ssim"
    distance: Callable | None = None                            # of "lpips": (a, b) in [0, 1] -> (N,)

    def __call__(self, samples: Samples) -> Tensor:
        drawn, real = samples.need("images").float(), samples.need("reals").to(samples.images.device).float()
        if real.shape != drawn.shape:
            real = F.interpolate(real, drawn.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
        if self.how == "ssim":
            return structural_similarity(drawn, real).clamp(0, 1)
        if self.how == "lpips":
            return (1 - self.distance(drawn, real)).clamp(0, 1)
        error = (drawn - real).square().mean((1, 2, 3))                                       # (N,)
        return 1 - error if self.how == "mse" else (-10 * error.clamp(min=1e-12).log10() / 50).clamp(0, 1)


@dataclass
class TokenMatch:
    """R_TIM: how well the drawn image's tokens and the caption's match in the policy's own last hidden states. (N,) in [0, 1]. [CoRL]

    1/2 (mean over image tokens of the best cosine with a text token + the reverse), then (1 + x) / 2, as v3 of the paper normalises it.
    `states`: images, prompts -> image states (N, P, D), mask (N, P), text states (N, L, D), mask (N, L), after the final norm.
    Gamed where the states are those of the policy that learns: the caption is read behind the image, so text states that become
    image-like raise it with any picture. The frozen reference cannot be moved so.

    Differs: tokens are found by masks; CoRL's code takes fixed places, right for prompts of one length only, and counts the header of
    the assistant's turn as caption.
    """

    states: Callable

    def __call__(self, samples: Samples) -> Tensor:
        image, image_mask, text, text_mask = self.states(samples.need("images"), samples.prompts)
        return (1 + sum(_best_matches(image, image_mask, text, text_mask)) / 2) / 2


# ---- the table of rewards ----


@dataclass(frozen=True)
class Entry:
    """A row of REWARDS: the help of the flag of its weight, and the fields of Samples that it reads (one of these sets)."""

    help: str
    reads: tuple[tuple[str, ...], ...]


# The sum of a task's rewards adds them in this order. To add a reward, write its function, its row, and its line in
# referees/build.py.
REWARDS = {
    "sem": Entry("r_sem, SigLIP cosine of image and prompt [LVRPO Eq. 5]", (("images",),)),
    "kn": Entry("r_kn, yes/no confidence of the judge [LVRPO]", (("images",), ("sources", "texts"))),
    "dense": Entry("r_dense, max over patches per key phrase [LVRPO Eq. 12]", (("images",),)),
    "ins": Entry("r_ins, GenEval's rules on detections [LVRPO Eq. 7]", (("images",),)),
    "accuracy": Entry("the right answer to a question [CoRL]", (("texts", "answers"),)),
    "format": Entry("think tags of a thought before an image [AlphaGRPO], think and answer tags of an answer [CoRL]",
                    (("texts", "formats"),)),
    "recaption": Entry("r_cycle, text half: a caption of the image against the prompt [CoRL]", (("images",),)),
    "likeness": Entry("r_cycle, image half: the image against the row's real one [CoRL]", (("images", "reals"),)),
    "dvreward": Entry("DVReward, yes/no questions about the image, one fact each [AlphaGRPO]", (("images",),)),
    "tifa": Entry("Soft-TIFA, the judge's probability of the expected answer to each atom [GenEval 2]", (("images",),)),
    "pref": Entry("a preference model's score of image and prompt [UniGRPO's terminal reward]", (("images",),)),
    "tim": Entry("R_TIM, token matching of image and prompt in the policy's own states [CoRL]", (("images",),)),
}
