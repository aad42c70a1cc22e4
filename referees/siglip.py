"""Embeddings of images and texts in one space (SigLIP, CLIP, open_clip), and a SigLIP that learns.

Notation: N images (N, 3, H, W) in [0, 1], P patches, D embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy import declare_torchvision_ops
from referees.load import (
    Viewer, freeze_model, in_batches, load_model, loading_errors, to_pixels)
from support.run import start_moments


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1, in fp32."""
    return F.normalize(x.float(), dim=-1)


class Encoder:
    """Embeddings of length 1 by a model's `image_features` and `text_features`."""

    @torch.no_grad()
    def embed(self, features: Callable, inputs) -> Tensor:
        """Embeddings (N, D) of a length-N tensor or list by one of the model's two functions."""
        return unit(in_batches(features, self.batch_size, inputs))

    def embed_images(self, images: Tensor) -> Tensor:
        return self.embed(self.image_features, images)                              # (N, D)

    def embed_texts(self, texts: list[str]) -> Tensor:
        return self.embed(self.text_features, texts)                                # (N, D)


class Siglip(Encoder, Viewer):
    """A SigLIP, or a SigLIP 2 of fixed resolution (transformers' SiglipModel).

    Embeddings of images and texts (N, D), and of patches (N, P, D), all of length 1.
    """

    def tokens(self, texts: list[str]) -> Tensor:
        """(N, length): lower case and padded to full length without a mask, as it was trained."""
        length = self.model.config.text_config.max_position_embeddings
        lower = [text.lower() for text in texts]
        ids = self.tokenizer(
            lower, padding="max_length", truncation=True, max_length=length).input_ids
        return torch.tensor(ids, device=self.model.device)

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokens(texts).tolist()

    def vision_outputs(self, images: Tensor):
        """The vision tower's last_hidden_state (N, P, D) and pooler_output (N, D)."""
        return self.model.vision_model(pixel_values=self.pixels(images))

    def image_features(self, images: Tensor) -> Tensor:
        return self.vision_outputs(images).pooler_output                            # (N, D)

    def text_features(self, texts: list[str]) -> Tensor:
        return self.model.text_model(input_ids=self.tokens(texts)).pooler_output

    def patch_features(self, images: Tensor) -> Tensor:
        """Each patch through the pooling head alone; attention over one token returns its value."""
        states = self.vision_outputs(images).last_hidden_state                      # (N, P, D)
        return self.model.vision_model.head(states.flatten(0, 1)[:, None]).view_as(states)

    def embed_patches(self, images: Tensor) -> Tensor:
        return self.embed(self.patch_features, images)                              # (N, P, D)


def load_siglip(path: str, *, device="cpu", batch_size: int = 128) -> Siglip:
    """A frozen Siglip, such as google/siglip2-so400m-patch14-384. Errors: see load_model."""
    return Siglip(*load_model("AutoModel", "siglip", path, device), batch_size)


def sigmoid_loss(model: nn.Module, images: Tensor, texts: Tensor, own: Tensor) -> Tensor:
    """SigLIP's loss of all pairs of images (N, D) and texts (T, D), summed. [arXiv:2303.15343]

    own: bool (N, T), whether a text is the image's own.
    """
    logits = images @ texts.T * model.logit_scale.exp() + model.logit_bias          # (N, T)
    return -F.logsigmoid(torch.where(own, logits, -logits)).sum()


class Learner:
    """A SigLIP that learns during a run, from the policy's own pictures and prompts.

    The trainable referee of LVRPO's Fig. 4, which shows why a referee should be frozen. It learns
    by SigLIP's sigmoid loss. Gamed by design: any picture of a prompt is taught as right.
    """

    def __init__(self, encoder: Siglip, lr: float):
        if not isinstance(encoder, Siglip):
            raise ValueError(
                "--train_referee teaches a SigLIP of transformers, not an open_clip model")
        self.encoder = encoder
        encoder.model.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=lr, weight_decay=0.0)
        start_moments(self.optimizer)

    def learn_step(self, parts: list, ranks) -> dict[str, float]:
        """Learn from the pictures of a step's train.Parts; returns what is logged."""
        losses = []
        for part in parts:
            if part.samples.images is not None:
                losses.append(self.learn(part.samples.images, part.samples.prompts, ranks))
        return ranks.mean_over_ranks({"referee/loss": losses}) if losses else {}

    def learn(self, images: Tensor, prompts: list[str], ranks) -> float:
        """One step on SigLIP's mean loss, in parts of the encoder's batch size -> the loss before.

        Each image is compared with all distinct prompts, one of them its own. The ranks add up
        their gradients; each has its own pictures and prompts.
        """
        self.optimizer.zero_grad()
        distinct = list(dict.fromkeys(prompts))
        size = self.encoder.batch_size
        total = 0.0
        for i in range(0, len(prompts), size):
            texts = unit(self.encoder.text_features(distinct))                      # (prompts, D)
            pictures = unit(self.encoder.image_features(images[i:i + size]))        # (size, D)
            own = torch.tensor(                                                 # (size, prompts)
                [[prompt == other for other in distinct] for prompt in prompts[i:i + size]],
                device=texts.device)
            loss = sigmoid_loss(self.encoder.model, pictures, texts, own) / len(prompts)
            (loss / ranks.world).backward()
            total += loss.item()
        ranks.add_gradients(self.optimizer, 1)
        self.optimizer.step()
        return total

    def state(self) -> dict[str, Tensor]:
        """The live tensors of a checkpoint."""
        out = {}
        for name, p in self.encoder.model.named_parameters():
            out[f"referee.{name}"] = p.detach()
            for key, moment in self.optimizer.state[p].items():
                out[f"referee.adamw.{key}.{name}"] = moment
        return out


class Clip(Encoder, Viewer):
    """A CLIP of transformers: embeddings of images and texts, (N, D), of length 1.

    Differs: images are squashed to a square, not cropped.
    """

    def image_features(self, images: Tensor) -> Tensor:
        return self.model.get_image_features(self.pixels(images)).pooler_output

    def read_texts(self, texts: list[str], **how):
        """The tokenizer's ids and mask of texts, cut at the longest that the model reads."""
        longest = self.model.config.text_config.max_position_embeddings
        return self.tokenizer(texts, truncation=True, max_length=longest, **how)

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        return self.read_texts(texts).input_ids

    def text_features(self, texts: list[str]) -> Tensor:
        given = self.read_texts(texts, padding=True, return_tensors="pt").to(self.model.device)
        return self.model.get_text_features(**given).pooler_output


def load_clip(path: str, *, device="cpu", batch_size: int = 128) -> Clip:
    """A frozen Clip, such as openai/clip-vit-large-patch14. Errors: see load_model."""
    return Clip(*load_model("AutoModel", "clip", path, device), batch_size)


def is_open_clip(path: str) -> bool:
    return path.startswith("hf-hub:") or any(Path(path).glob("open_clip_*.safetensors"))


@dataclass
class OpenClip(Encoder):
    """An open_clip model: embeddings of images and texts, (N, D), of length 1.

    Differs: images are squashed to a square, not cropped.
    """

    model: nn.Module
    tokenizer: Callable
    batch_size: int

    def image_features(self, images: Tensor) -> Tensor:
        from open_clip.utils import to_2tuple

        cfg = self.model.visual.preprocess_cfg
        size = to_2tuple(cfg["size"])
        images = images.to(self.model.logit_scale.device)
        pixels = to_pixels(images, size, cfg["interpolation"], cfg["mean"], cfg["std"])
        return self.model.encode_image(pixels)

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts).tolist()

    def text_features(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts).to(self.model.logit_scale.device)
        return self.model.encode_text(tokens)


def load_open_clip(path: str, *, device="cpu", batch_size: int = 128) -> OpenClip:
    """A frozen OpenClip of a local folder, or of "hf-hub:owner/name".

    The folder holds open_clip_config.json and safetensors. The hub's pickle files, to which
    open_clip would fall back, are not fetched. Errors: see load_model.
    """
    declare_torchvision_ops()
    import open_clip

    with loading_errors(path):
        if path.startswith("hf-hub:"):
            from huggingface_hub import snapshot_download

            wanted = ["*.json", "*.txt", "*.safetensors", "*.model"]
            path = snapshot_download(path.removeprefix("hf-hub:"), allow_patterns=wanted)
        names = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
        if not any(Path(path, name).exists() for name in names):
            raise ValueError(f"it holds none of {names}")
        model = open_clip.create_model(f"local-dir:{path}", require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{path}")
        return OpenClip(freeze_model(model, device), tokenizer, batch_size)
