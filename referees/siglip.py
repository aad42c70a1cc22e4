"""Embeddings of images and texts in one space: SigLIP, CLIP, open_clip; and a SigLIP that learns beside the policy.

Notation: N images (N, 3, H, W) in [0, 1], P patches, D embedding width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from policy import declare_torchvision_ops
from referees.load import (Reading, _batched, frozen, kind_of, load_model, processor_pixels,
    to_pixels)


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

    def seen(self, images: Tensor):
        """What the vision tower says of images: last_hidden_state (N, P, D) and pooler_output (N, D). Gradients flow."""
        return self.model.vision_model(pixel_values=self.pixels(images))

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(_batched(lambda x: self.seen(x).pooler_output, self.batch_size, images).float(), dim=-1)   # (N, D)

    @torch.no_grad()
    def embed_patches(self, images: Tensor) -> Tensor:
        """Each patch through the pooling head by itself: attention over a single token returns that token's value."""
        def patches(x):
            states = self.seen(x).last_hidden_state                                           # (N, P, D)
            return self.model.vision_model.head(states.flatten(0, 1)[:, None]).view_as(states)

        return F.normalize(_batched(patches, self.batch_size, images).float(), dim=-1)        # (N, P, D)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        text = self.model.text_model
        pooled = _batched(lambda x: text(input_ids=self.tokens(x)).pooler_output, self.batch_size, texts)
        return F.normalize(pooled.float(), dim=-1)                                            # (N, D)


@dataclass
class SiglipNaflex(Siglip):
    """A SigLIP 2 of variable resolution: an image is read at its own aspect, in as many patches as its image processor allows."""

    def seen(self, images: Tensor):
        given = self.image_processor(list(images.float()), do_rescale=False, return_tensors="pt").to(self.model.device, self.model.dtype)
        out = self.model.vision_model(**given)
        out.last_hidden_state = out.last_hidden_state[:, :given.spatial_shapes[0].prod()]     # all images are of one size: no padding
        return out


def load_siglip(path: str, *, device="cpu", dtype=torch.float32, batch_size: int = 128) -> Siglip:
    """A frozen SigLIP, such as google/siglip2-so400m-patch14-384, or of variable resolution, such as google/siglip2-so400m-patch16-naflex.
    Errors: see load_model."""
    naflex = kind_of(path) == "siglip2"
    return (SiglipNaflex if naflex else Siglip)(*load_model("AutoModel", ("siglip", "siglip2"), path, device, dtype), batch_size)


class Learner:
    """A SigLIP that learns beside the policy, from the policy's own pictures and prompts by SigLIP's sigmoid loss: the trainable referee
    of LVRPO's Fig. 4, there to show why a referee should be frozen. Gamed by design: any picture of a prompt is taught as right."""

    def __init__(self, encoder: Siglip, lr: float):
        if not isinstance(encoder, Siglip):
            raise ValueError("--train_referee teaches a SigLIP of transformers, not an open_clip model")
        self.encoder = encoder
        encoder.model.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=lr, weight_decay=0.0)
        for p in encoder.model.parameters():                    # so that a checkpoint can be read in place
            self.optimizer.state[p] = dict(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))

    def loss(self, images: Tensor, prompts: list[str], distinct: list[str]) -> Tensor:
        """The sum over images of SigLIP's loss against all distinct prompts, one of which is its own."""
        model = self.encoder.model
        texts = model.text_model(input_ids=self.encoder.tokens(distinct)).pooler_output                            # (prompts, D)
        cosine = F.normalize(self.encoder.seen(images).pooler_output.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
        mine = torch.tensor([[2.0 * (prompt == other) - 1 for other in distinct] for prompt in prompts], device=cosine.device)
        return -F.logsigmoid(mine * (cosine * model.logit_scale.exp() + model.logit_bias)).sum()                   # (N, prompts) summed

    def learn(self, images: Tensor, prompts: list[str], add: Callable, world: int) -> float:
        """One step on the mean loss, in parts of the encoder's batch size; add(optimizer) adds the gradients of all `world` ranks up, each
        of which compares with its own prompts. Returns the loss before it."""
        self.optimizer.zero_grad()
        distinct, size, total = list(dict.fromkeys(prompts)), self.encoder.batch_size, 0.0
        for i in range(0, len(prompts), size):
            loss = self.loss(images[i:i + size], prompts[i:i + size], distinct) / len(prompts)
            (loss / world).backward()
            total += loss.item()
        add(self.optimizer)
        self.optimizer.step()
        return total

    def state(self) -> dict[str, Tensor]:
        """The live tensors of a checkpoint."""
        out = {}
        for name, p in self.encoder.model.named_parameters():
            out |= {f"referee.{name}": p.detach()} | {f"referee.adamw.{k}.{name}": v for k, v in self.optimizer.state[p].items()}
        return out


@dataclass
class Clip:
    """A CLIP of transformers: unit-length embeddings of images (N, 3, H, W) in [0, 1] and of texts, (N, D). Images are squashed to a
    square, not cropped."""

    model: torch.nn.Module
    tokenizer: Callable
    image_processor: Callable
    batch_size: int = 128

    @property
    def size(self) -> int:
        return self.model.config.vision_config.image_size

    def pixels(self, images: Tensor) -> Tensor:
        mode = {2: "bilinear", 3: "bicubic"}[int(self.image_processor.resample)]
        mean, std = self.image_processor.image_mean, self.image_processor.image_std
        return to_pixels(images.to(self.model.device), (self.size, self.size), mode, mean, std).to(self.model.dtype)

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        model = self.model
        run = lambda x: model.visual_projection(model.vision_model(pixel_values=self.pixels(x)).pooler_output)  # noqa: E731
        return F.normalize(_batched(run, self.batch_size, images).float(), dim=-1)            # (N, D)

    @torch.no_grad()
    def embed_texts(self, texts: list[str]) -> Tensor:
        model, longest = self.model, self.model.config.text_config.max_position_embeddings
        given = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(model.device)
        run = lambda ids, mask: model.text_projection(model.text_model(input_ids=ids, attention_mask=mask).pooler_output)  # noqa: E731
        return F.normalize(_batched(run, self.batch_size, given.input_ids, given.attention_mask).float(), dim=-1)  # (N, D)


def load_clip(path: str, *, device="cpu", dtype=torch.float32, batch_size: int = 128):
    """A frozen Clip, such as openai/clip-vit-large-patch14, or an OpenClip where the folder or hub name is one. Errors: see load_model."""
    if is_open_clip(path):
        return load_open_clip(path, device=device, batch_size=batch_size)
    return Clip(*load_model("AutoModel", ("clip",), path, device, dtype), batch_size)


def is_open_clip(path: str) -> bool:
    return path.startswith("hf-hub:") or any(Path(path).glob("open_clip_*.safetensors"))


@dataclass
class OpenClip:
    """An open_clip model and its tokenizer: unit-length embeddings of images (N, 3, H, W) in [0, 1] and of texts, (N, D)."""

    model: torch.nn.Module
    tokenizer: Callable
    batch_size: int = 128

    @property
    def size(self) -> int:
        size = self.model.visual.preprocess_cfg["size"]
        return size if isinstance(size, int) else size[0]

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
    its pickle files, to which open_clip would fall back. Errors: see load_model. Differs: images are squashed to a square, not cropped."""
    declare_torchvision_ops()
    import open_clip
    with Reading(path):
        if path.startswith("hf-hub:"):
            from huggingface_hub import snapshot_download
            path = snapshot_download(path.removeprefix("hf-hub:"), allow_patterns=["*.json", "*.txt", "*.safetensors", "*.model"])
        if not any(Path(path, f"{stem}.safetensors").exists() for stem in ("open_clip_model", "open_clip_pytorch_model")):
            raise ValueError("it holds neither open_clip_model.safetensors nor open_clip_pytorch_model.safetensors")
        model = frozen(open_clip.create_model(f"local-dir:{path}", require_pretrained=True), device)
        return OpenClip(model, open_clip.get_tokenizer(f"local-dir:{path}"), batch_size)
