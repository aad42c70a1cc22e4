"""The models that CoRL's cycle reward asks: a captioner, a text encoder, LPIPS."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from policy import declare_torchvision_ops
from referees.load import Viewer, in_batches, load_model
from rewards import token_f1

TEXT_ENCODER = "google-bert/bert-base-uncased"  # CoRL's, for BERTScore


class Captioner(Viewer):
    """An image captioner, BLIP: greedy captions of at most 50 tokens, as in CoRL's code."""

    @torch.no_grad()
    def captions(self, images: Tensor) -> list[str]:
        """One caption per image."""
        captions = []
        for part in images.split(self.batch_size):
            tokens = self.model.generate(
                pixel_values=self.pixels(part), do_sample=False, num_beams=1, max_new_tokens=50)
            captions += self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [caption.strip() for caption in captions]


def load_captioner(path: str, *, device="cpu", batch_size: int = 128) -> Captioner:
    """A frozen Captioner, such as Salesforce/blip-image-captioning-base. Errors: see load_model."""
    parts = load_model("AutoModelForImageTextToText", "blip", path, device)
    return Captioner(*parts, batch_size)


@dataclass
class TextEncoder:
    """A BERT: states of a text's words, and BERTScore."""

    model: nn.Module
    tokenizer: Callable
    batch_size: int

    @torch.no_grad()
    def states(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The last layer's states (N, L, D), and the mask (N, L) of what is no special token."""
        longest = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        given = self.tokenizer(
            texts, truncation=True, max_length=longest, padding=True, padding_side="right",
            return_attention_mask=True, return_special_tokens_mask=True,
            return_tensors="pt").to(self.model.device)

        def last_states(ids: Tensor, mask: Tensor) -> Tensor:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

        states = in_batches(last_states, self.batch_size, given.input_ids, given.attention_mask)
        return states, given.attention_mask.bool() & ~given.special_tokens_mask.bool()

    def similarity(self, prompts: list[str], captions: list[str]) -> Tensor:
        """BERTScore's F1 of each prompt and caption, without idf, clamped at 0: (N,) in [0, 1]."""
        return token_f1(*self.states(prompts), *self.states(captions)).clamp(0, 1)


def load_text_encoder(
    path: str = TEXT_ENCODER, *, device="cpu", batch_size: int = 128
) -> TextEncoder:
    """A frozen TextEncoder. Errors: see load_model."""
    model, tokenizer = load_model(
        "AutoModel", "bert", path, device, parts=("AutoTokenizer",), heads=("cls.",))
    return TextEncoder(model, tokenizer, batch_size)


def load_lpips(*, device="cpu") -> Callable:
    """LPIPS with the VGG trunk, (a, b) in [0, 1] -> (N,), by the package lpips.

    Errors: ValueError if the package, or torchvision's VGG-16, which it fetches once, is missing.
    """
    declare_torchvision_ops()
    try:
        import lpips

        model = lpips.LPIPS(net="vgg", verbose=False)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--likeness needs the package {error.name}: pip install lpips; "
            "or set --likeness 0") from error
    except OSError as error:
        raise ValueError(
            f"--likeness needs torchvision's VGG-16, which could not be fetched ({error}); "
            "put vgg16-397923af.pth into "
            f"{torch.hub.get_dir()}/checkpoints, or set --likeness 0") from error
    model = model.to(device).eval().requires_grad_(False)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return model(a.to(device), b.to(device), normalize=True).flatten()          # (N,)

    return distance
