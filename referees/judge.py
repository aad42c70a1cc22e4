"""Yes/no judges: PaliGemma, and chat models that see.

Notation: N images (N, 3, H, W) in [0, 1], P patches, D width, V vocabulary, R questions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from referees.load import Viewer, in_batches, kind_of, load_model

LEAST_MASS = 1e-3                               # of yes and no together, on average


def spellings(tokenizer, word: str) -> list[int]:
    """The ids of a word's spellings that are one token: word, Word, and both after a space."""
    words = [word, f" {word}", word.capitalize(), f" {word.capitalize()}"]
    rows = tokenizer(words, add_special_tokens=False).input_ids
    single = dict.fromkeys(row[0] for row in rows if len(row) == 1)
    return [token for token in single if token != tokenizer.unk_token_id]


@dataclass
class Judge(Viewer):
    """A yes/no judge: PaliGemma or PaliGemma 2, the open relatives of LVRPO's PaLI-3.

    A row is <image> * P, <bos>, question, newline, all of it prefix that sees itself fully; the
    next token answers. Rows are padded on the left, with positions counted from the first real
    token, so that padding changes nothing. Every spelling of yes and no that is one known token
    counts.
    Errors: ValueError if the tokenizer has no such token, or the model puts hardly any probability
    on them.
    """

    max_question = 96
    request = ""                                # what follows a question

    def __post_init__(self):
        self.answers = [spellings(self.tokenizer, word) for word in ("yes", "no")]
        if not all(self.answers):
            raise ValueError(
                f"the judge's tokenizer reads yes and no as the tokens {self.answers}, expected "
                "at least one known token each")

    def text_ids(self, questions: list[str]) -> list[list[int]]:
        """The tokens of questions, at most `max_question`, and no image tokens of their own."""
        image = self.model.config.image_token_id
        texts = [" ".join(question.split()) for question in questions]
        rows = self.tokenizer(texts, add_special_tokens=False).input_ids
        return [[i for i in ids if i != image][:self.max_question] for ids in rows]

    def rows(self, questions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (R, L) each."""
        vision = self.model.config.vision_config
        image = self.model.config.image_token_id
        patches = (vision.image_size // vision.patch_size) ** 2
        head = [image] * patches + [self.tokenizer.bos_token_id]
        newline = self.tokenizer("\n", add_special_tokens=False).input_ids
        rows = [head + ids + newline for ids in self.text_ids(questions)]
        given = self.tokenizer.pad(
            {"input_ids": rows}, padding_side="left", return_attention_mask=True,
            return_tensors="pt", verbose=False).to(self.model.device)
        return given.input_ids, given.attention_mask

    def features(self, images: Tensor) -> Tensor:
        """(N, P, D): images as the language model reads them."""
        return self.model.get_image_features(self.pixels(images)).pooler_output

    def next_logits(self, features: Tensor, questions: list[str]) -> Tensor:
        """(R, V): the logits of the first generated token. Gradients flow, to train a judge."""
        ids, mask = self.rows(questions)
        is_image = (ids == self.model.config.image_token_id)[..., None]
        embedded = self.model.get_input_embeddings()(ids)
        embedded = embedded.masked_scatter(is_image, features.to(embedded.dtype))
        out = self.model(
            inputs_embeds=embedded, attention_mask=mask,
            position_ids=mask.cumsum(1).clamp(min=1),
            token_type_ids=torch.zeros_like(ids),               # type 0 is prefix
            use_cache=False, logits_to_keep=1)
        return out.logits[:, -1].float()                                            # (R, V)

    def logits(self, features: Tensor, questions: list[str]) -> Tensor:
        """(R, 3): the log-sums over the spellings of yes, over those of no, and over all tokens."""
        out = self.next_logits(features, questions)
        yes, no = self.answers
        return torch.stack([out[:, ids].logsumexp(1) for ids in (yes, no, slice(None))], dim=1)

    @torch.no_grad()
    def yes_probability(
        self, images: Tensor, questions: list[str], about: list[int] | None = None
    ) -> Tensor:
        """P(yes) / (P(yes) + P(no)) of each question, (R,) in [0, 1].

        about: the image of each question; None: the r-th question is about the r-th image. Every
        image is encoded once, except by a ChatJudge.
        Errors: ValueError if the model hardly thinks of yes and no, so that their ratio is noise.
        """
        if about is None:
            about = list(range(len(images)))
        features = in_batches(self.features, self.batch_size, images)               # (N, P, D)

        def logits_of(about: list[int], questions: list[str]) -> Tensor:
            return self.logits(features[about], questions)

        worded = [question + self.request for question in questions]
        logits = in_batches(logits_of, self.batch_size, about, worded)              # (R, 3)
        answers = logits[:, :2]
        mass = (answers.logsumexp(1) - logits[:, 2]).exp().mean().item()
        if mass < LEAST_MASS:
            raise ValueError(
                f"the judge puts {mass:.1e} of its probability on yes and no, expected most of "
                "it; a model that thinks before it answers, or that was not trained for such "
                "questions, is no judge")
        return answers.softmax(-1)[:, 0]                                            # (R,)


class ChatJudge(Judge):
    """A yes/no judge that is a chat model: Qwen2.5-VL, Qwen3-VL, InternVL and others.

    A row is the user's turn, the image and then the question, and the head of the assistant's turn;
    the next token answers, nothing is generated. Rows are padded on the left. `image_processor` is
    the whole processor. A question cannot bring the tokenizer's own markers. Pixels stay floats,
    while the published path goes through 8 bits and back.
    Errors: Judge's, and ValueError for a model that is made to think first.
    """

    max_question = 2**20                        # it reads what its context holds
    request = " Answer yes or no."

    def __post_init__(self):
        super().__post_init__()
        self.tokenizer.padding_side = "left"
        if self.row("").rstrip().endswith("<think>"):
            raise ValueError(
                "the judge is made to think before it answers, so that its next token is no "
                "answer; use its Instruct variant")

    def row(self, question: str) -> str:
        """The text of a row, with the place of the image."""
        for marker in self.tokenizer.all_special_tokens:
            question = question.replace(marker, " ")
        content = [dict(type="image"), dict(type="text", text=" ".join(question.split()))]
        turns = [dict(role="user", content=content)]
        return self.image_processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False)

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W): the images themselves; each of these models encodes them in its own way."""
        return images

    def next_logits(self, features: Tensor, questions: list[str]) -> Tensor:
        """(R, V): the logits of the first generated token."""
        images = [[image] for image in features.float()]
        rows = [self.row(question) for question in questions]
        given = self.image_processor(
            images=images, text=rows, padding=True, do_rescale=False,
            return_tensors="pt").to(self.model.device, self.model.dtype)
        return self.model(**given, use_cache=False, logits_to_keep=1).logits[:, -1].float()


def load_judge(path: str, *, device="cpu", dtype=torch.float32, batch_size: int = 128) -> Judge:
    """A frozen Judge, google/paligemma2-3b-mix-448, or ChatJudge, Qwen/Qwen2.5-VL-7B-Instruct.

    Errors: see load_model; ValueError for a chat model without a chat template.
    """
    if kind_of(path) == "paligemma":
        return Judge(
            *load_model("AutoModelForImageTextToText", "", path, device, dtype), batch_size)
    model, processor = load_model(
        "AutoModelForImageTextToText", "", path, device, dtype, ("AutoProcessor",))
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"{path} has no chat template, by which a judge is asked; use "
            "google/paligemma2-3b-mix-448 or a chat model")
    return ChatJudge(model, processor.tokenizer, processor, batch_size)
