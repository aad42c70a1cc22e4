"""Yes/no judges: PaliGemma, and chat models that see.

Notation: N images (N, 3, H, W) in [0, 1], P patches, D width, V vocabulary, R questions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from referees.load import _batched, kind_of, load_model, processor_pixels


NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}

LEAST_MASS = 1e-3                                               # of yes and no together, on average


def spellings(tokenizer, word: str) -> list[int]:
    """The ids of a word's spellings that are one known token: as it is, capitalised, and both behind a space; each id once."""
    each = [tokenizer(said, add_special_tokens=False).input_ids for w in (word, word.capitalize()) for said in (w, f" {w}")]
    return list(dict.fromkeys(ids[0] for ids in each if len(ids) == 1 and ids[0] != tokenizer.unk_token_id))


def spelled(tokenizer, word: str) -> list[int]:
    """The spellings of a word, and of the digit of a number up to ten."""
    return list(dict.fromkeys(i for said in (word, NUMBERS.get(word, word)) for i in spellings(tokenizer, said)))


@dataclass
class Judge:
    """A yes/no judge: PaliGemma or PaliGemma 2, the open relatives of LVRPO's PaLI-3.

    A row is <image> * P, <bos>, question, newline, all of it prefix that sees itself fully; the next token answers. Rows are
    padded on the left, with positions counted from the first real token, so padding changes nothing.
    Every spelling of yes and no that is one known token counts: Yes, yes, and both behind a space.
    Errors: ValueError where the tokenizer has no such token, and where the model puts hardly any probability on them.
    """

    model: torch.nn.Module
    tokenizer: Callable
    image_processor: Callable
    batch_size: int = 128
    max_question: int = 96

    def __post_init__(self):
        self.answers = [spellings(self.tokenizer, word) for word in ("yes", "no")]
        if not all(self.answers):
            raise ValueError(f"the judge's tokenizer reads yes and no as the tokens {self.answers}, expected at least one known token each")

    def pixels(self, images: Tensor) -> Tensor:
        return processor_pixels(images, self.model, self.image_processor)                     # (N, 3, size, size)

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

    def features(self, images: Tensor) -> Tensor:
        """(N, P, D): images as the language model reads them."""
        return self.model.get_image_features(self.pixels(images)).pooler_output

    def next_logits(self, features: Tensor, questions: list[str]) -> Tensor:
        """(N, V): the logits of the first generated token. Gradients flow, so a judge can learn from them."""
        ids, mask = self.rows(questions)
        embedded = self.model.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter((ids == self.model.config.image_token_id)[..., None], features.to(embedded.dtype))
        out = self.model(inputs_embeds=embedded, attention_mask=mask, position_ids=mask.cumsum(1).clamp(min=1),
                         token_type_ids=torch.zeros_like(ids), use_cache=False, logits_to_keep=1)  # type 0 = prefix
        return out.logits[:, -1].float()                                                      # (N, V)

    def logits(self, features: Tensor, questions: list[str]) -> Tensor:
        """(N, 3): the log-sums over the spellings of "yes" and of "no", and over all tokens."""
        out = self.next_logits(features, questions)
        return torch.stack([out[:, ids].logsumexp(1) for ids in (*self.answers, slice(None))], dim=1)

    @torch.no_grad()
    def yes_probability(self, images: Tensor, questions: list[str], of: list[int] | None = None) -> Tensor:
        """P(yes) / (P(yes) + P(no)) of each question, (R,) in [0, 1]; of: which image each is about, None: in order, one each. Every image
        is encoded once, but by a ChatJudge. ValueError where the model hardly thinks of yes and no, so that their ratio is noise."""
        of = list(range(len(images))) if of is None else of
        seen = _batched(self.features, self.batch_size, images)                               # (N, P, D)
        questions = [self.worded(question, "yes") for question in questions]
        logits = _batched(lambda rows, asked: self.logits(seen[rows], asked), self.batch_size, of, questions)
        mass = (logits[:, :2].logsumexp(1) - logits[:, 2]).exp().mean().item()
        if mass < LEAST_MASS:
            raise ValueError(f"the judge puts {mass:.1e} of its probability on yes and no, expected most of it; a model that thinks before "
                             "it answers, or that was not trained for such questions, is no judge")
        return logits[:, :2].softmax(-1)[:, 0]                                                # (R,)

    @torch.no_grad()
    def answer_probability(self, images: Tensor, questions: list[str], answers: list[str], of: list[int]) -> Tensor:
        """The probability that the first token says the expected answer, (R,) in [0, 1]: of all spellings of the word, and of a number's
        digit. ValueError for an answer that no single token spells, and where the model hardly thinks of yes, no and the numbers."""
        known = {answer: spelled(self.tokenizer, answer.strip().lower()) for answer in dict.fromkeys(answers)}
        if unknown := [answer for answer, ids in known.items() if not ids]:
            raise ValueError(f"the judge's tokenizer has no token that says {unknown[0]!r}, expected a word or a number up to ten")

        words = [*known, "yes", "no", *NUMBERS]
        possible = sorted({i for word in words for i in spelled(self.tokenizer, word.strip().lower())})

        def said(rows, asked, wanted):
            chances = self.next_logits(seen[rows], asked).softmax(-1)                         # (n, V)
            wished = torch.stack([chance[known[answer]].sum() for chance, answer in zip(chances, wanted)])
            return torch.stack([wished, chances[:, possible].sum(1)], 1)

        seen = _batched(self.features, self.batch_size, images)
        asked = [self.worded(*each) for each in zip(questions, answers)]
        wished, mass = _batched(said, self.batch_size, of, asked, answers).unbind(1)          # (R,) each
        if mass.mean() < LEAST_MASS:
            raise ValueError(f"the judge puts {mass.mean().item():.1e} of its probability on yes, no and numbers, expected most of it")
        return wished.clamp(0, 1)

    def worded(self, question: str, answer: str) -> str:
        """The question as it is put where that answer is expected."""
        return question


@dataclass
class ChatJudge(Judge):
    """A yes/no judge that is a chat model: Qwen2.5-VL, Qwen3-VL, InternVL, SmolVLM (whose processor needs the package
    num2words) and others whose processor has a chat template.

    A row is the user's turn, the image and then the question, and the head of the assistant's; the next token answers, nothing is
    generated. `image_processor` is the whole processor. Rows are padded on the left. A question cannot smuggle in the tokenizer's own
    markers. Pixels stay floats, where the published path goes through 8 bits and back.
    Errors: ValueError for a model that is made to think first, whose next token is not its answer; and Judge's.
    """

    def __post_init__(self):
        super().__post_init__()
        self.tokenizer.padding_side = "left"
        if self.row("").rstrip().endswith("<think>"):
            raise ValueError("the judge is made to think before it answers, so that its next token is no answer; use its Instruct variant")

    def worded(self, question: str, answer: str) -> str:
        return f"{question} {'Answer yes or no.' if answer.strip().lower() in ('yes', 'no') else 'Answer in one word.'}"

    def row(self, question: str) -> str:
        """The text of a row, with the place of the image."""
        for marker in self.tokenizer.all_special_tokens:
            question = question.replace(marker, " ")
        said = [{"type": "image"}, {"type": "text", "text": " ".join(question.split())}]
        return self.image_processor.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True, tokenize=False)

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W): the images themselves, since these models do not share how they are encoded."""
        return images

    def next_logits(self, features: Tensor, questions: list[str]) -> Tensor:
        """(N, V): the logits of the first generated token."""
        given = self.image_processor(images=[[image] for image in features.float()], text=[self.row(question) for question in questions],
                                     padding=True, do_rescale=False, return_tensors="pt").to(self.model.device, self.model.dtype)
        return self.model(**given, use_cache=False, logits_to_keep=1).logits[:, -1].float()   # (N, V)


def load_judge(path: str, *, device="cpu", dtype=torch.float32, batch_size: int = 128) -> Judge:
    """A frozen judge: google/paligemma2-3b-mix-448, or a ChatJudge such as Qwen/Qwen2.5-VL-7B-Instruct. Errors: see load_model."""
    if kind_of(path) == "paligemma":
        return Judge(*load_model("AutoModelForImageTextToText", ("paligemma",), path, device, dtype), batch_size)
    model, processor = load_model("AutoModelForImageTextToText", (), path, device, dtype, ("AutoProcessor",))
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{path} has no chat template, which a judge is asked by; use google/paligemma2-3b-mix-448 or a chat model")
    return ChatJudge(model, processor.tokenizer, processor, batch_size)
