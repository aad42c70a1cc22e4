"""Rewards: what a finished sample is worth, one callable per idea, one float per sample.

LVRPO (arXiv 2603.27693) has the semantic, dense, knowledge and instruction rewards; CoRL
(2505.17534) accuracy, format, cycle consistency and token matching; AlphaGRPO (2605.12495)
decomposed questions and the format before an image. LVRPO's method section and encoders are known
from reviews only; "Differs" says what was chosen here.

A `Reward` is any callable Samples -> Tensor (N,): deterministic, finite, of a stated range. A
reward that cannot be computed is an error, never a low score. Rewards that ask a model are given
one of referees/, or any object with the methods that they call.
Left out: UniGRPO's own preference model (not released), reading of written words (OCR), advantages
(they belong to the loss), and models that answer over a network.

Notation: N samples, prompt-major; H x W pixels, P patches or image tokens, L text tokens, D
embedding width.

>>> samples = Samples(prompts=["how many circles ?"] * 2, metadata=[{}] * 2, answers=["3"] * 2,
...                   texts=["<think>one, two, three</think><answer>Three.</answer>", "4"],
...                   formats=["answer"] * 2)
>>> scores = score({"accuracy": answer_accuracy, "format": think_format}, samples)
>>> combine(scores, {"accuracy": 1.0, "format": 0.5})
tensor([1.5000, 0.0000])
"""

import math
import os
import re
import string
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """What a reward may read, one entry per sample. A field that the task does not have is None.

    Errors: ValueError for columns of unequal length, and for images that are not in [0, 1].
    """

    prompts: list[str]
    metadata: list[dict]                        # GenEval's format: tag, include, exclude
    texts: list[str] | None = None              # what the policy wrote
    images: Tensor | None = None                # what it drew, (N, 3, H, W) in [0, 1]
    sources: Tensor | None = None               # the given image of a question or an edit
    reals: Tensor | None = None                 # the real image of the prompt
    answers: list[str] | None = None            # the right answer
    options: list[list[str] | None] | None = None       # one of which is the answer
    formats: list[str] | None = None            # what each text must be: "thought" or "answer"
    earlier: Tensor | None = None               # what the policy drew in the round before

    def __post_init__(self):
        for name, column in vars(self).items():
            if column is not None and len(column) != len(self.prompts):
                raise ValueError(
                    f"Samples: {name} has {len(column)} entries for {len(self.prompts)} prompts")
        if self.images is not None and not 0 <= self.images.amin() <= self.images.amax() <= 1:
            raise ValueError("Samples: images hold a number that is not in [0, 1]")

    def need(self, name: str):
        """The field of that name; ValueError if the task does not have it."""
        if getattr(self, name) is None:
            raise ValueError(f"samples have no {name}, which this reward reads")
        return getattr(self, name)


Reward = Callable[[Samples], Tensor]


class RewardError(ValueError):
    """A reward could not be computed; one line with its name and a prompt."""


@torch.no_grad()
def score(rewards: dict[str, Reward], samples: Samples) -> dict[str, Tensor]:
    """Every reward on the batch: name -> (N,) fp32 on the CPU, finite.

    Errors: RewardError if a reward raises or returns anything but N finite floats. It names the
    reward and the first offending prompt, which is the batch's first if the reward itself raised.
    """
    scores = {}
    for name, reward in rewards.items():
        try:
            value = reward(samples)
        except (
            ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError,
            ValueError) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(place.filename)}:{place.lineno}"
            what = " ".join(f"{type(error).__name__}: {error} ({where})".split())
            raise _reward_error(name, samples.prompts[0], what) from error
        scores[name] = _checked_scores(name, value, samples.prompts)                # (N,)
    return scores


def _checked_scores(name: str, value, prompts: list[str]) -> Tensor:
    """What a reward returned, as fp32 on the CPU, if it is one finite float per prompt.

    Errors: RewardError.
    """
    if not isinstance(value, Tensor):
        raise _reward_error(name, prompts[0], f"it returned a {type(value).__name__}, no tensor")
    if value.shape != (len(prompts),) or not value.is_floating_point():
        what = f"it returned {value.dtype} {tuple(value.shape)}, not a float for each sample"
        raise _reward_error(name, prompts[0], what)
    value = value.float().cpu()
    for n, number in enumerate(value.tolist()):
        if not math.isfinite(number):
            raise _reward_error(name, prompts[n], f"it returned {number} for sample {n}")
    return value


def _reward_error(name: str, prompt: str, what: str) -> RewardError:
    return RewardError(f"reward '{name}' failed on prompt {prompt[:200]!r}: {what}")


def combine(components: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum of rewards, (N,) each -> (N,). [LVRPO Eq. 3]

    Errors: ValueError if the names of rewards and weights differ, or there are none.
    """
    if components.keys() != weights.keys() or not components:
        raise ValueError(
            f"weights are given for {sorted(weights)}, components are "
            f"{sorted(components)}: each needs one")
    return sum(weights[name] * reward for name, reward in components.items())


# ---- written answers ----

NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty").split()
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)}
# How mathematical and other texts write an answer -> how it is compared.
SPELLINGS = (
    (r"\\[dt]?frac *{([^{}]*)} *{([^{}]*)}", r"\1/\2"), ("\u2044", "/"), ("[\u2212\u2013]", "-"),
    (r"\\(?:text|mathrm|mathbf) *{([^{}]*)}", r"\1"), (r"\\boxed *{([^{}]*)}", r"\1"),
    (r"\\[()\[\],;! ]", ""), (r"[ \\]*%", "%"), (r"(?<=\d),(?=\d{3}(?!\d))", ""))
NUMBER = r"(?<![\w.])[+-]?(?:\d+\.?\d*|\.\d+)(?![\w.])"


def final_answer(text: str) -> str:
    """The answer in a text: in its first <answer> after the thought, else all that follows it.

    What stands after "####" is the answer alone, as GSM8K writes it.
    """
    text = text.rpartition("</think>")[2]
    inside, closed, _ = text.partition("<answer>")[2].partition("</answer>")
    return (inside if closed else text).rpartition("####")[2]


def normalise_answer(text: str) -> str:
    """An answer without case, punctuation and extra spaces, its numbers in one spelling.

    Words up to twenty, 1,000, 3.0, +3 and \\boxed{3} become plain digits; a sign and a point stay.
    """
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    for spelling, plain in SPELLINGS:
        text = re.sub(spelling, plain, text)
    text = text.lstrip("\"'`([{*_$ \t\n").rstrip("\"'`)]}*_$.,;:!? \t\n")
    text = re.sub(NUMBER, _plain_number, text)
    return " ".join(NUMBERS.get(word, word) for word in text.split())


def _plain_number(found: re.Match) -> str:
    """"+03.50" -> "3.5"."""
    return format(Decimal(found[0]).normalize(), "f")


def right_option(answer: str, options: list[str]) -> int:
    """The place of the option that an answer names by its letter or its text.

    Errors: ValueError if it names none, or two.
    """
    answer = normalise_answer(answer)
    places = [i for i in range(len(options)) if answer in _names_of_option(i, options)]
    if len(places) != 1:
        raise ValueError(
            f"the answer {answer[:60]!r} is {len(places)} of the options {options}, "
            "must be the letter or the text of one")
    return places[0]


def _names_of_option(i: int, options: list[str]) -> set[str]:
    """All that names option i, normalised: its letter, its text, or both.

    Another option's letter never does.
    """
    letter = string.ascii_lowercase[i]
    text = normalise_answer(options[i])
    both = {f"{letter}{mark} {text}" for mark in ("", ")", ".", ":")}
    other_letters = set(string.ascii_lowercase[:len(options)]) - {letter}
    return ({letter, text} | both) - other_letters


def answer_accuracy(samples: Samples) -> Tensor:
    """R_Acc: is the final answer the right one? (N,) in {0, 1}. [CoRL]

    Multiple choice, if a sample has options: the right letter, as "(b)" or "b.", or the option's
    text, or both, and nothing else: a letter among other words earns nothing. Open questions: equal
    after normalisation. The right answer may be in <answer> tags, as in data for R1-like training.
    Gamed by guessing: the commonest answer earns its frequency. Only the first <answer> counts, so
    listing answers earns nothing.

    Differs: CoRL's code gives open answers a part for words in common; its paper does not.
    """
    texts = samples.need("texts")
    answers = samples.need("answers")
    options = samples.options or [None] * len(texts)
    scores = []
    for text, answer, choices in zip(texts, answers, options):
        written = normalise_answer(final_answer(text))
        answer = final_answer(answer)
        if choices:
            right = right_option(answer, choices)
            scores.append(float(written in _names_of_option(right, choices)))
        else:
            scores.append(float(written == normalise_answer(answer)))
    return torch.tensor(scores)


def think_format(samples: Samples) -> Tensor:
    """R_Format: does the text have the tags that it must have? (N,) in {0, 1}. [CoRL, AlphaGRPO]

    "answer": <think>..</think><answer>..</answer>, and around the two blocks only spaces [CoRL].
    "thought", before an image: it opens with <think> and closes it [AlphaGRPO]; an expanded prompt
    may follow [UniGRPO].
    Gamed by an empty thought.

    Errors: ValueError for another form.

    Differs: each tag occurs once, while CoRL's pattern lets it occur again inside; AlphaGRPO wants
    </think> at the very end.
    """
    scores = []
    for text, form in zip(samples.need("texts"), samples.need("formats")):
        if form not in ("thought", "answer"):
            raise ValueError(f'a format is "{form}", expected "thought" or "answer"')
        scores.append(float(_has_tags(text.strip(), form)))
    return torch.tensor(scores)


def _has_tags(text: str, form: str) -> bool:
    tags = ["<think>", "</think>"]
    if form == "answer":
        tags += ["<answer>", "</answer>"]
    if any(text.count(tag) != 1 for tag in tags) or not text.startswith("<think>"):
        return False
    after = text.partition("</think>")[2].strip()
    return form != "answer" or (after.startswith("<answer>") and after.endswith("</answer>"))


# ---- drawn images: LVRPO's rewards ----


@dataclass
class Semantic:
    """r_sem: cosine of the frozen embeddings of image and prompt, (N,) in [-1, 1]. [LVRPO Eq. 5]

    A published SigLIP varies by a few hundredths within a group, so that an all-or-nothing r_ins
    drowns it in a plain sum; a small one, trained on one kind of picture, may vary ten times as
    much and drown the rules (see grpo.variance_share).
    Gamed by texture: an image may match the prompt's words with wrong counts and places, or show
    the words in writing.
    """

    encoder: object  # embed_images (N, D), embed_texts (K, D), of length 1: referees.siglip's

    def __call__(self, samples: Samples) -> Tensor:
        images = samples.need("images")
        return prompt_cosine(self.encoder, images, samples.prompts).clamp(-1, 1)    # (N,)


def prompt_cosine(encoder, images: Tensor, prompts: list[str]) -> Tensor:
    """Cosine of each image (N, 3, H, W) and its prompt, (N,); equal prompts are embedded once.

    The encoder's embeddings must be of length 1.
    """
    distinct = list(dict.fromkeys(prompts))
    place = [distinct.index(prompt) for prompt in prompts]
    texts = encoder.embed_texts(distinct)[place]                                    # (N, D)
    return (encoder.embed_images(images) * texts).sum(-1)


@dataclass
class Instruction:
    """r_ins: does the drawn image keep the rules of its metadata? (N,) in [0, 1]. [LVRPO Eq. 7]

    detector(images (N, 3, H, W), metadata) -> N lists of detections. worth(metadata, detections) ->
    a number in [0, 1], such as referees.geneval.fraction_kept.
    Gamed by whatever fools the detector, and by leaving objects out: a blank image keeps every
    exclude clause.

    Differs: LVRPO's detector and how it combines its rules are not confirmed; here it is the mean
    over clauses.
    """

    detector: Callable[[Tensor, list[dict]], list[list[dict]]]
    worth: Callable[[dict, list[dict]], float]

    def __call__(self, samples: Samples) -> Tensor:
        found = self.detector(samples.need("images"), samples.metadata)
        worth = [self.worth(*row) for row in zip(samples.metadata, found)]
        return torch.tensor(worth, dtype=torch.float32)


SMALL_WORDS = {"", *"a an the of and or in on at to with is are photo image picture".split()}


def key_phrases(prompt: str, metadata: dict) -> list[str]:
    """The things that a prompt names: "red circle" per include clause, or its words of content."""
    phrases = []
    for clause in metadata.get("include", []):
        phrases.append(f"{clause.get('color', '')} {clause['class']}".strip())
    if not phrases:
        words = [word.strip(".,;:!?\"'") for word in prompt.lower().split()]
        phrases = [word for word in words if word not in SMALL_WORDS]
    return list(dict.fromkeys(phrases or [prompt]))


@dataclass
class Dense:
    """r_dense: the best cosine of a patch, mean over key phrases, (N,) in [-1, 1]. [LVRPO Eq. 12]

    Gamed by a bag of tiny matching patches: one patch per phrase is enough.

    Differs: what a patch embedding is, is not confirmed. Here each patch passes SigLIP's pooling
    head by itself, which brings it into the space shared with texts. Key phrases are `key_phrases`.
    """

    encoder: object  # embed_patches (N, P, D), embed_texts (K, D), of length 1: siglip.Siglip

    def __call__(self, samples: Samples) -> Tensor:
        phrases = [key_phrases(*row) for row in zip(samples.prompts, samples.metadata)]
        distinct = list(dict.fromkeys(phrase for row in phrases for phrase in row))
        patches = self.encoder.embed_patches(samples.need("images"))                # (N, P, D)
        cosine = patches @ self.encoder.embed_texts(distinct).T         # (N, P, phrases)
        best = cosine.amax(1)                                                       # (N, phrases)
        own = [[phrase in row for phrase in distinct] for row in phrases]
        own = torch.tensor(own, device=best.device)                                 # (N, phrases)
        return _masked_mean(best, own).clamp(-1, 1)                                 # (N,)


@dataclass
class Knowledge:
    """r_kn: the judge's P(yes) / (P(yes) + P(no)), (N,) in [0, 1]. [LVRPO Sec. 3.2]

    The judge is asked `question` about the drawn image and its prompt. If nothing was drawn, it is
    asked of the source image whether the written answer fits (`statement`); it sees the final
    answer, never the thought.
    Gamed by wording that the judge agrees with, by images at the edge of its training data, and by
    its yes-bias.

    Differs: LVRPO's equation and templates are not confirmed.
    """

    judge: object  # yes_probability(images, N questions) -> (N,): referees.judge.Judge
    question: str = "is this {prompt} ?"
    statement: str = "{prompt} is the answer {answer} ?"

    def __call__(self, samples: Samples) -> Tensor:
        if samples.images is not None:
            asked = [self.question.format(prompt=prompt) for prompt in samples.prompts]
            return self.judge.yes_probability(samples.images, asked)
        asked = []
        for prompt, text in zip(samples.prompts, samples.need("texts")):
            answer = final_answer(text).strip()
            asked.append(self.statement.format(prompt=prompt, answer=answer))
        return self.judge.yes_probability(samples.need("sources"), asked)


# ---- drawn images: decomposed questions, preference ----


def aggregate(semantic: list[float], quality: list[float], how: str = "geometric") -> float:
    """What a picture is worth, in [0, 1], by the answers to its questions. [AlphaGRPO]

    semantic, quality: the answers, in [0, 1], to the two halves.
    "geometric": sqrt(mean of the semantic answers * mean of the quality answers). "binary": the
    same of answers that are 1 above one half and else 0. ValueError if a half is empty, and for
    another `how`.
    """
    if not semantic or not quality:
        raise ValueError(
            f"{len(semantic)} semantic and {len(quality)} quality questions, "
            "needs at least one of each")
    if how == "binary":
        semantic = [float(answer > 0.5) for answer in semantic]
        quality = [float(answer > 0.5) for answer in quality]
    elif how != "geometric":
        raise ValueError(f'how is "{how}", expected "geometric" or "binary"')
    return math.sqrt(sum(semantic) / len(semantic) * (sum(quality) / len(quality)))


@dataclass
class Decomposed:
    """DVReward: yes/no questions to a judge, about one fact each, (N,) in [0, 1]. [AlphaGRPO]

    questions(prompt, metadata) -> questions with text, quality and needs: the places of earlier
    questions without whose yes it scores 0. how: see aggregate.
    Gamed by whatever the judge misreads and, as the mean of many easy questions, by leaving the one
    hard fact out.

    Differs: an attribute of an absent thing scores 0, while the reference asks all questions alike;
    an empty half is an error, not 1.
    """

    judge: object  # yes_probability(images, R questions, each one's image) -> (R,): the same
    questions: Callable[[str, dict], list]
    how: str = "geometric"

    def __call__(self, samples: Samples) -> Tensor:
        asked = [self.questions(*row) for row in zip(samples.prompts, samples.metadata)]
        texts = [question.text for questions in asked for question in questions]
        image = [n for n, questions in enumerate(asked) for _ in questions]  # that a text is about
        yes = iter(self.judge.yes_probability(samples.need("images"), texts, image).tolist())
        scores = []
        for questions in asked:
            answers = []
            semantic = []
            quality = []
            for question in questions:
                answer = next(yes)
                if any(answers[place] < 0.5 for place in question.needs):
                    answer = 0.0
                answers.append(answer)
                half = quality if question.quality else semantic
                half.append(answer)
            scores.append(aggregate(semantic, quality, self.how))
        return torch.tensor(scores)


@dataclass
class Preference:
    """A preference model's score of the drawn image and its prompt, (N,), unbounded.

    UniGRPO's terminal reward is of this kind; its own model is not released. Gamed by the look that
    the model's raters liked, whatever the prompt.
    """

    model: object  # with score(images, prompts): referees.preferences.ClipPreference

    def __call__(self, samples: Samples) -> Tensor:
        return self.model.score(samples.need("images"), samples.prompts)


# ---- drawn images: cycle consistency and token matching [CoRL] ----


def token_f1(a: Tensor, a_mask: Tensor, b: Tensor, b_mask: Tensor) -> Tensor:
    """BERTScore's F1, without idf, of token states (N, La, D) and (N, Lb, D): (N,) in [-1, 1]."""
    recall, precision = _best_matches(a, a_mask, b, b_mask)
    return 2 * recall * precision / (recall + precision).clamp(min=1e-6)


def _best_matches(a: Tensor, a_mask: Tensor, b: Tensor, b_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over tokens of a of the best cosine with one of b, and the reverse, (N,) each."""
    a = F.normalize(a.float(), dim=-1)
    b = F.normalize(b.float(), dim=-1)
    cosine = a @ b.transpose(1, 2)                                                  # (N, La, Lb)
    both = a_mask[:, :, None] & b_mask[:, None, :]
    cosine = cosine.masked_fill(~both, -1.0)
    return _masked_mean(cosine.amax(2), a_mask), _masked_mean(cosine.amax(1), b_mask)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


@dataclass
class Recaption:
    """r_cycle, text half: does a caption of the image say what its prompt says? (N,) in [0, 1].

    Four versions of the cycle reward are in print: SPICE + LPIPS (CoRL's paper), BERT-F1 + LPIPS
    (code of May 2025), (BERT-F1 + Jaccard)/2 + RMSE (code of June 2025), and the last with the
    policy as its own captioner. similarity is the paper's, SPICE's tuples by rule
    (referees.captions.tuple_f1), or for free captions BERT-F1 (token_f1). The image half is
    Likeness.
    Gamed by pictures that the captioner misreads.
    """

    captioner: object  # with captions(images): referees.captioner.Captioner
    similarity: Callable[[list[str], list[str]], Tensor]  # (prompts, captions) -> (N,) in [0, 1]

    def __call__(self, samples: Samples) -> Tensor:
        captions = self.captioner.captions(samples.need("images"))
        return self.similarity(samples.prompts, captions)


def structural_similarity(a: Tensor, b: Tensor, *, window: int = 11, sigma: float = 1.5) -> Tensor:
    """SSIM of images (N, 3, H, W) in [0, 1], (N,) in [-1, 1], with a Gaussian window.

    The mean is over all places where the window fits whole.
    """
    at = torch.arange(window, device=a.device) - (window - 1) / 2
    bell = torch.exp(-at.square() / (2 * sigma**2))
    kernel = torch.outer(bell, bell).div(bell.sum() ** 2).expand(3, 1, window, window)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=3)

    mean_a = blur(a)                                                                # (N, 3, H', W')
    mean_b = blur(b)
    var_a = blur(a * a) - mean_a**2
    var_b = blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1 = 0.01**2
    c2 = 0.03**2
    above = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    below = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return (above / below).mean((1, 2, 3))                                          # (N,)


@dataclass
class Likeness:
    """r_cycle, image half: is the drawn image like the row's real one? (N,) in [0, 1]. [CoRL]

    SSIM, clamped at 0; or, with a `distance` such as LPIPS, which the paper has, 1 - distance,
    clamped. The real image is resized to the drawn one's size.
    Gamed by blur and by a plain ground, which are near every picture. It also asks for places and
    colours that the prompt leaves free.

    Differs: CoRL's code of June 2025 takes the RMSE of pixels, which v3 of the paper finds worse.
    """

    distance: Callable[[Tensor, Tensor], Tensor] | None = None          # (a, b) in [0, 1] -> (N,)

    def __call__(self, samples: Samples) -> Tensor:
        drawn = samples.need("images").float()
        real = samples.need("reals").to(drawn.device).float()
        if real.shape != drawn.shape:
            real = F.interpolate(real, drawn.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
        if self.distance:
            return (1 - self.distance(drawn, real)).clamp(0, 1)
        return structural_similarity(drawn, real).clamp(0, 1)


@dataclass
class TokenMatch:
    """R_TIM: do image and prompt tokens match in the policy's own states? (N,) in [0, 1]. [CoRL]

    The mean of two means, over image tokens of the best cosine with a text token, and the reverse;
    then (1 + x) / 2, as v3 of the paper normalises it.
    states(images, prompts) -> image states (N, P, D) and mask (N, P), text states (N, L, D) and
    mask (N, L), after the final norm.
    Gamed if the states are those of the policy that learns: the prompt is read after the image, so
    text states that become image-like raise the reward with any picture. The frozen reference
    cannot be moved so.

    Differs: tokens are found by masks. CoRL's code takes fixed places, which are right for prompts
    of one length only, and counts the header of the assistant's turn as prompt.
    """

    states: Callable[[Tensor, list[str]], tuple[Tensor, Tensor, Tensor, Tensor]]

    def __call__(self, samples: Samples) -> Tensor:
        image, image_mask, text, text_mask = self.states(samples.need("images"), samples.prompts)
        of_image, of_text = _best_matches(image, image_mask, text, text_mask)
        return (1 + (of_image + of_text) / 2) / 2


# ---- the table of rewards ----


@dataclass(frozen=True)
class Entry:
    """The help of the flag that is its weight, and the fields that it reads, one of these sets."""

    help: str
    reads: tuple[tuple[str, ...], ...] = (("images",),)


# The sum of a task's rewards adds them in this order. To add a reward, write its function, its row
# here, and its line in referees/build.py.
REWARDS = {
    "sem": Entry("r_sem, SigLIP cosine of image and prompt [LVRPO Eq. 5]"),
    "kn": Entry("r_kn, yes/no confidence of the judge [LVRPO]",
                (("images",), ("sources", "texts"))),
    "dense": Entry("r_dense, max over patches per key phrase [LVRPO Eq. 12]"),
    "ins": Entry("r_ins, GenEval's rules on detections [LVRPO Eq. 7]"),
    "accuracy": Entry("the right answer to a question [CoRL]", (("texts", "answers"),)),
    "format": Entry("think tags before an image [AlphaGRPO], or think and answer tags [CoRL]",
                    (("texts", "formats"),)),
    "recaption": Entry("r_cycle, a caption of the image against the prompt [CoRL]"),
    "likeness": Entry("r_cycle, the image against the row's real one [CoRL]",
                      (("images", "reals"),)),
    "dvreward": Entry("DVReward, yes/no questions about one fact each [AlphaGRPO]"),
    "pref": Entry("a preference model's score [UniGRPO's terminal reward]"),
    "tim": Entry("R_TIM, image and prompt tokens in the policy's own states [CoRL]"),
}
