"""What CoRL's cycle reward asks: a captioner, a text encoder, LPIPS."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from policy import declare_torchvision_ops
from referees.load import _batched, load_model, processor_pixels


@dataclass
class Captioner:
    """An image captioner (BLIP): greedy captions of at most `longest` tokens, without a prefix, as CoRL's code asks it."""

    model: torch.nn.Module
    tokenizer: Callable
    image_processor: Callable
    batch_size: int = 128
    longest: int = 50

    def pixels(self, images: Tensor) -> Tensor:
        return processor_pixels(images, self.model, self.image_processor)                     # (N, 3, size, size)

    @torch.no_grad()
    def captions(self, images: Tensor) -> list[str]:
        """A caption per image."""
        written = []
        for part in images.split(self.batch_size):
            tokens = self.model.generate(pixel_values=self.pixels(part), do_sample=False, num_beams=1, max_new_tokens=self.longest)
            written += self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [caption.strip() for caption in written]


def load_captioner(path: str, *, device="cpu", dtype=torch.float32, batch_size: int = 128) -> Captioner:
    """A frozen Captioner, such as Salesforce/blip-image-captioning-base. Errors: see load_model."""
    return Captioner(*load_model("AutoModelForImageTextToText", ("blip",), path, device, dtype), batch_size)


@dataclass
class TextEncoder:
    """Token states of a BERT-like encoder, of the layer that is named: 0 the embeddings, -1 the last. Special tokens are left out."""

    model: torch.nn.Module
    tokenizer: Callable
    layer: int = -1
    batch_size: int = 128

    @torch.no_grad()
    def states(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(N, L, D) and the mask (N, L) of the words."""
        longest = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        ids = self.tokenizer(texts, padding=True, padding_side="right", truncation=True, max_length=longest, return_attention_mask=True,
                             return_special_tokens_mask=True, return_tensors="pt").to(self.model.device)
        run = lambda tokens, mask: self.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states[self.layer]
        states = _batched(run, self.batch_size, ids.input_ids, ids.attention_mask)
        return states, ids.attention_mask.bool() & ~ids.special_tokens_mask.bool()


def load_text_encoder(path: str, *, layer: int = -1, device="cpu", dtype=torch.float32, batch_size: int = 128) -> TextEncoder:
    """A frozen TextEncoder, such as google-bert/bert-base-uncased. Errors: see load_model; ValueError for a layer that it lacks."""
    model, tokenizer = load_model("AutoModel", ("bert", "mpnet", "roberta", "distilbert"), path, device, dtype, ("AutoTokenizer",))
    layers = model.config.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        raise ValueError(f"{path} has layers 0 (the embeddings) to {layers}, not {layer}")
    return TextEncoder(model, tokenizer, layer, batch_size)


def load_lpips(*, device="cpu") -> Callable:
    """LPIPS with the VGG trunk, (a, b) in [0, 1] -> (N,): the package lpips, and torchvision's VGG-16, which it fetches once. Errors:
    ValueError where either is missing."""
    declare_torchvision_ops()
    try:
        import lpips
        with contextlib.redirect_stdout(None):
            model = lpips.LPIPS(net="vgg", verbose=False)
    except ModuleNotFoundError as error:
        raise ValueError(f"--likeness_by lpips needs the package {error.name}: pip install lpips; or use --likeness_by ssim") from error
    except OSError as error:
        raise ValueError(f"--likeness_by lpips needs torchvision's VGG-16, which could not be fetched ({error}); put vgg16-397923af.pth "
                         f"into {torch.hub.get_dir()}/checkpoints, or use --likeness_by ssim") from error
    model = model.to(device).eval().requires_grad_(False)
    return lambda a, b: model(a.to(device), b.to(device), normalize=True).flatten()
