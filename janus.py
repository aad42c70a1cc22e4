"""A policy that reads and writes text and reads and writes images as tokens: Janus-Pro at any size.

The architecture is Janus-Pro's [arXiv:2501.17811]: one causal Llama. It reads a picture as SigLIP
patches, and writes one as the M codes of a VQ autoencoder [LlamaGen, arXiv:2406.06525], each drawn
like a word from a head of its own. The weights and their modules are transformers'
JanusForConditionalGeneration; what is written out here is how contexts grow, how an image is drawn
and how it is scored. The methods are those of policy.Policy, so that one loop trains both; only an
image differs, which has tokens with log-probs instead of a velocity:

    context = policy.empty(N)
    logits, context = policy.append_text(context, tokens, mask)
    context = policy.append_image(context, pixels=...)
    tokens, logp = policy.sample_image(context, uniforms)              # the context stays
    logp = policy.score_image(context, tokens)                         # the same, in one pass

A user's turn is encoded up to <|Assistant|>. The colon after it opens what the policy writes: a
text is `:`, the words, end of sentence; an image is begin_of_image and its tokens, after a colon if
no text has opened the turn.

Guidance: logits = without + scale * (with - without), where `without` has read the same prompt as
padding, all but its first token [Janus-Pro's generation_inference.py].

Differs: rows are padded right and carry masks; the official code pads left. The likelihood of a
token is its probability where it was drawn; ULM-R1's released code takes the state that has read
the token already, which is another number. The embedding of padding, which guidance reads, is not
trained; in the official code it is. An image is always of the one size of the config.

Legend: N samples, L text positions, M tokens of an image, S positions in the context, D width, d
width of a head, V vocabulary, C codes. Pixels are in [-1, 1].
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from policy import (
    Context, Policy, PolicyConfig, append_keys, attention_after, check_finite, check_lengths,
    choose_token, declare_torchvision_ops, rotary, run_block)

MARKERS = ("<|User|>", "<|Assistant|>", "<begin_of_image>", "<end_of_image>")
# Sizes that the original folders name, and keep in their scripts [deepseek-ai/Janus].
VISION = {
    "siglip_large_patch16_384": dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, mlp_ratio=4.0,
        image_size=384, patch_size=16)}
VQ = {"VQ-16": dict(channel_multiplier=[1, 1, 2, 2, 4], latent_channels=256)}


@dataclass(frozen=True)
class JanusLayout:
    """What the loop asks about sizes; `release` is transformers' JanusConfig."""

    release: object

    @property
    def scale(self) -> str:
        """The column of a table of scales."""
        return "janus" if self.release.text_config.hidden_size >= 1024 else "toy_janus"

    @property
    def side(self) -> int:
        """Pixels per side of every picture, read or drawn."""
        return self.release.vision_config.image_size

    @property
    def image_tokens(self) -> int:
        """M, the tokens of a picture, read or drawn."""
        return (self.side // self.stride) ** 2

    @property
    def vit_resize(self) -> tuple[int, int, int]:
        """Longest side, shortest side and stride, in pixels, of an image that is read."""
        return self.side, self.side, self.side

    # For contexts and the estimate of memory, by the names of policy.PolicyConfig.
    head_dim = PolicyConfig.head_dim
    queries_per_key = PolicyConfig.queries_per_key

    @property
    def llm(self) -> dict:
        return self.release.text_config.to_dict()

    @property
    def vit(self) -> dict:
        return self.release.vision_config.to_dict()

    @property
    def stride(self) -> int:
        return self.release.vision_config.patch_size


@dataclass
class Past:
    """Keys and values of one layer, (N, heads, S, d) each, in place of transformers' cache.

    transformers' own cache is no function of its inputs: gradient checkpointing would drop it.
    """

    keys: Tensor
    values: Tensor
    length: int

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Append a layer's keys and values, and return all of them."""
        self.keys = append_keys(self.keys, keys.to(values.dtype), self.length)
        self.values = append_keys(self.values, values, self.length)
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]


def stack_contexts(first: Context, second: Context) -> Context:
    """Two contexts of equally many positions as one batch, the rows of `first` first."""
    def join(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y])

    return Context(
        tuple(map(join, first.keys, second.keys)), tuple(map(join, first.values, second.values)),
        join(first.valid, second.valid), join(first.position, second.position))


def guide(logits: Tensor, scale: float) -> Tensor:
    """Guided logits (N, ..., C) of the logits with and without the prompt, (2N, ..., C)."""
    given, without = logits.chunk(2)
    return without + scale * (given - without)


class Janus(nn.Module):
    """Janus-Pro as a policy; `model` is transformers' JanusForConditionalGeneration.

    The vision encoder, its aligner and the VQ autoencoder are frozen. Errors: ValueError for a
    config that is not implemented and for a tokenizer that does not fit.
    """

    stem = "model"                                    # of its file of weights
    reads_latents = False                             # so it cannot edit: it sees patches alone
    reads_blanks = True                               # in place of a prompt, for guidance
    device = Policy.device
    empty = Policy.empty
    sample_text = Policy.sample_text
    _spell = Policy._spell
    _batch = Policy._batch

    def __init__(self, model, tokenizer):
        super().__init__()
        check_config(model.config)
        self.config = JanusLayout(model.config)
        self.model = model
        self.tokenizer = tokenizer
        known = tokenizer.get_vocab()
        V = model.config.text_config.vocab_size
        markers = [known.get(marker) for marker in MARKERS]
        named = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        if None in (*markers, *named) or max(known.values()) >= V:
            raise ValueError(
                f"tokenizer needs bos, eos and pad, the special tokens {MARKERS} and ids below the "
                f"policy's vocab_size {V}; they are not of one checkpoint")
        self.user, self.assistant, self.image_start, self.image_end = markers
        self.bos, self.end, self.pad = named
        self.frame = {self.end}
        self.embed.padding_idx = self.pad             # has no gradient, as in transformers
        added = tokenizer.added_tokens_decoder.items()
        self.reserved = {i for i, token in added if token.special} - {tokenizer.unk_token_id}
        (self.start,) = self._spell([":"])[0]
        self.opening = [self.bos, self.user, *self._spell([": "])[0]]    # of a turn with a picture
        self.core.vision_model.requires_grad_(False)
        self.core.aligner.requires_grad_(False)
        self.core.vqmodel.requires_grad_(False)
        # transformers renamed the argument.
        arguments = inspect.signature(self.blocks[0].forward).parameters
        self.cache = "cache" if "cache" in arguments else "past_key_values"
        for layer in self.blocks:
            layer.checkpointing = False
            layer.register_forward_hook(self._with_past, with_kwargs=True)
        # Set by support/checkpoint.py: split over ranks, bytes if gathered, dtype of the file.
        self.sharded = False
        self.gathered_bytes = 0
        self.stored = None

    # -- the modules --

    @property
    def core(self):
        """transformers' JanusModel: everything but the language head."""
        return self.model.model

    @property
    def blocks(self) -> nn.ModuleList:
        return self.core.language_model.layers

    @property
    def embed(self) -> nn.Embedding:
        return self.core.language_model.embed_tokens

    @property
    def parts(self) -> list[nn.Module]:
        """What is cut over ranks; the rest is small."""
        vision = self.core.vision_model.encoder.layers
        return [*self.blocks, *vision, self.embed, self.model.lm_head]

    def linear_layers(self, expert: str) -> list[tuple[nn.Module, str]]:
        """(parent, name) of the linear layers of an expert that may get adapters."""
        if expert == "generation":
            head = self.core.generation_head
            return [(head, "proj_out"), (head, "vision_head")]
        found = []
        for layer in self.blocks:
            found += [(layer.self_attn, f"{name}_proj") for name in "qkvo"]
            found += [(layer.mlp, f"{name}_proj") for name in ("gate", "up", "down")]
        return found

    @staticmethod
    def expert_of(name: str) -> str:
        """The expert of a parameter: what makes image tokens is "generation"."""
        return "generation" if "generation_" in name else "understanding"

    # -- text --

    def token_ids(
        self, texts: list[str], room: int = 0, after: str = "nothing"
    ) -> list[list[int]]:
        """The ids of each user's turn, up to <|Assistant|>.

        after: what was read before, "nothing", an "image" of this turn, or a "turn". Errors:
        ValueError for a text that leaves less than `room` positions of the context.
        """
        limit = self.config.release.text_config.max_position_embeddings - room
        head = {"nothing": [self.bos, self.user], "image": [], "turn": [self.end, self.user]}[after]
        separator = "\n" if after == "image" else ": "
        spelled = self._spell([f"{separator}{text.strip()}\n\n" for text in texts])
        rows = [[*head, *ids, self.assistant] for ids in spelled]
        check_lengths(texts, rows, limit)
        return rows

    def encode_text(self, texts: list[str], after: str = "nothing") -> tuple[Tensor, Tensor]:
        """The tokens (N, L) of `token_ids`, padded right, and their mask (N, L)."""
        return self._batch(self.token_ids(texts, after=after))

    def encode_written(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The same of texts that the policy is taught to write: colon, words, end of sentence."""
        spelled = self._spell([f": {text.strip()}" for text in texts])
        return self._batch([[*ids, self.end] for ids in spelled])

    def decode_text(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """The words of tokens (N, L) under the mask (N, L), without the end."""
        return [text.strip() for text in Policy.decode_text(self, tokens, mask)]

    def blank(self, tokens: Tensor) -> Tensor:
        """What the context without the prompt reads in place of tokens: padding, but for bos."""
        return torch.where(tokens == self.bos, tokens, self.pad)

    # -- reading --

    def _read(
        self, context: Context, x: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Context]:
        """Run the language model over x (N, L, D), of mask (N, L), after a context.

        -> states after the final norm (N, L, D), and the longer context.
        """
        if mask is None:
            mask = x.new_ones(x.shape[:2])
        mask = mask.bool()
        text = self.config.release.text_config
        index = (mask.cumsum(1) - 1).clamp(min=0)                                # (N, L)
        position = context.position[:, None] + index
        allowed = attention_after(context.valid, mask, causal=True)              # (N, 1, L, S+L)
        theta = text.rope_parameters["rope_theta"]
        cos, sin = rotary(position, self.config.head_dim, theta, x.dtype)        # (N, 1, L, d)
        angles = cos[:, 0], sin[:, 0]
        keys = []
        values = []
        for layer, past_keys, past_values in zip(self.blocks, context.keys, context.values):
            x, k, v = run_block(
                self._layer, layer.checkpointing, layer, x, past_keys, past_values, angles, allowed)
            keys.append(k)
            values.append(v)
        valid = torch.cat([context.valid, mask], dim=1)                          # (N, S+L)
        longer = Context(tuple(keys), tuple(values), valid, context.position + mask.sum(1))
        return self.core.language_model.norm(x), longer

    def _layer(self, layer, x, keys, values, angles, allowed):
        past = {self.cache: Past(keys, values, allowed.shape[-1])}
        return layer(x, attention_mask=allowed, position_embeddings=angles, **past)

    def _with_past(self, layer, args, kwargs, x):
        """Let a layer return its keys and values too: FSDP2 gathers weights for what it returns."""
        past = kwargs.get(self.cache)
        return (x, past.keys, past.values) if isinstance(past, Past) else x

    def append_text(
        self, context: Context, tokens: Tensor, mask: Tensor | None = None, logits: bool = True
    ) -> tuple[Tensor, Context]:
        """Read text -> logits (N, L, V), longer context.

        tokens (N, L); mask (N, L), False = padding (right). logits=False returns the last hidden
        states (N, L, D) instead, after the final norm.
        """
        out, longer = self._read(context, self.embed(tokens), mask)
        if logits:
            out = self.model.lm_head(out)                                        # (N, L, V)
        return out, longer

    def append_image(
        self, context: Context, pixels=None, latents: Tensor | None = None, size=None
    ) -> Context:
        """Read pixels (N, 3, H, W), or a list of (3, H, W), as patches between their two markers.

        On an empty context they open the user's turn. Latents and size are of policy.Policy and
        not read here.
        """
        return self._image_block(context, pixels)[1]

    def image_states(self, pixels) -> tuple[Tensor, Tensor, Context]:
        """Read pixels as `append_image` does and return what the patches became.

        -> last hidden states (N, M, D), after the final norm; their mask (N, M); the context.
        """
        states, context = self._image_block(self.empty(len(pixels)), pixels)
        M = self.config.image_tokens
        return states[:, -M - 1:-1], context.valid[:, -M - 1:-1], context

    def _image_block(self, context: Context, pixels) -> tuple[Tensor, Context]:
        if isinstance(pixels, list):
            pixels = torch.stack(pixels)
        patches = self.embed_pixels(pixels)                                      # (N, M, D)
        opening = [] if context.valid.shape[1] else self.opening

        def embed(ids: list[int]) -> Tensor:
            ids = torch.tensor(ids, device=self.device)
            return self.embed(ids.expand(len(patches), -1)).to(patches.dtype)

        x = torch.cat(
            [embed([*opening, self.image_start]), patches, embed([self.image_end])], dim=1)
        return self._read(context, x)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Patches of pixels (N, 3, H, W) in the policy's width, (N, M, D)."""
        self.check_size(tuple(pixels.shape[-2:]))
        pixels = pixels.to(self.device, self.core.aligner.fc1.weight.dtype)
        seen = self.core.vision_model(pixels).last_hidden_state                  # (N, M, Dv)
        return self.core.aligner(seen)

    # -- drawing --

    def sample_image(
        self, context: Context, uniforms: Tensor, temperature: float = 1.0, *,
        started: bool = False, without: Context | None = None, scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Draw the tokens of an image -> tokens and log-probs, (N, M) each.

        uniforms (N, M) in [0, 1): one number per token. temperature 0 is greedy; then log-probs are
        those of temperature 1. started: whether a written text has opened the turn. without: the
        context that read blanks, for guidance by `scale`, which does nothing without it. Errors:
        FloatingPointError for logits that are not finite.
        """
        M = uniforms.shape[1]
        context, x = self._begin(context, started, without)
        context = context.with_room(x.shape[1] + M)
        written = []
        for i in range(M):
            states, context = self._read(context, x)
            logits = self._image_logits(states[:, -1:], without, scale)[:, 0]    # (N, C)
            token, logp = choose_token(logits, uniforms[:, i], temperature)      # (N, 1) each
            written.append((token, logp))
            x = self._embed_codes(token, without)
        tokens, logp = (torch.cat(parts, dim=1) for parts in zip(*written))
        if not logp.isfinite().all():
            raise FloatingPointError(
                "image logits are not finite; the policy's weights or its precision are at fault")
        return tokens, logp

    def score_image(
        self, context: Context, tokens: Tensor, temperature: float = 1.0, *,
        started: bool = False, without: Context | None = None, scale: float = 1.0,
    ) -> Tensor:
        """Log-probs (N, M) of the tokens of an image, as `sample_image` drew them, in one pass."""
        M = tokens.shape[1]
        context, x = self._begin(context, started, without)
        x = torch.cat([x, self._embed_codes(tokens[:, :-1], without)], dim=1)
        states, _ = self._read(context, x)
        logits = self._image_logits(states[:, -M:], without, scale)              # (N, M, C)
        logp = (logits / (temperature or 1.0)).log_softmax(-1)
        return logp.gather(2, tokens[..., None])[..., 0]

    def _begin(
        self, context: Context, started: bool, without: Context | None
    ) -> tuple[Context, Tensor]:
        """The contexts with and without the prompt as one batch, and what comes before a token."""
        lead = [self.image_start] if started else [self.start, self.image_start]
        lead = torch.tensor(lead, device=self.device).expand(len(context.valid), -1)
        if without is None:
            return context, self.embed(lead)
        blank = torch.where(lead == self.image_start, lead, self.pad)
        return stack_contexts(context, without), self.embed(torch.cat([lead, blank]))

    def _embed_codes(self, tokens: Tensor, without: Context | None) -> Tensor:
        """What the language model reads of image tokens (N, L) -> (N or 2N, L, D)."""
        x = self.core.generation_aligner(self.core.generation_embeddings(tokens))
        return x if without is None else torch.cat([x, x])

    def _image_logits(self, states: Tensor, without: Context | None, scale: float) -> Tensor:
        """Logits of image tokens (N, L, C), fp32, from states (N or 2N, L, D)."""
        logits = self.core.generation_head(states).float()
        return logits if without is None else guide(logits, scale)

    # -- images --

    def check_size(self, size: tuple[int, int]) -> None:
        """ValueError for a picture of another size than the config's."""
        side = self.config.side
        if size != (side, side):
            raise ValueError(
                f"image of {size[0]} x {size[1]} pixels: this policy reads and draws {side} x "
                f"{side} alone")

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """The image tokens (N, M) of pixels (N, 3, H, W): of each patch the code of least angle.

        Differs: transformers' `vqmodel.encode` compares lengths too, and gives other tokens.
        """
        vq = self.core.vqmodel
        self.check_size(tuple(pixels.shape[-2:]))
        with torch.autocast(self.device.type, enabled=False):
            pixels = pixels.to(self.device, vq.quant_conv.weight.dtype)
            z = vq.quant_conv(vq.encoder(pixels)).float()                        # (N, 8, h, w)
        check_finite(z, "latents")
        z = F.normalize(rearrange(z, "n c h w -> n (h w) c"), dim=-1)
        codes = F.normalize(vq.quantize.embedding.weight.float(), dim=-1)        # (C, 8)
        return (z @ codes.T).argmax(-1)

    @torch.no_grad()
    def decode(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """The pixels (N, 3, H, W) of image tokens (N, M), nominally in [-1, 1], not clamped."""
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.core.vqmodel.decode(tokens).float()
        check_finite(pixels, "pixels")
        return pixels


# ---- configs and the original layout ----


def check_config(config) -> None:
    """ValueError for a config that would change what is computed and is not implemented."""
    text = config.text_config
    rope = text.rope_parameters or {}
    only = dict(
        model_type=(text.model_type, "llama"), hidden_act=(text.hidden_act, "silu"),
        rope_type=(rope.get("rope_type"), "default"),
        head_dim=(text.head_dim, text.hidden_size // text.num_attention_heads),
        tie_word_embeddings=(config.tie_word_embeddings, False))
    for name, (value, implemented) in only.items():
        if value != implemented:
            raise ValueError(f"{name} {value!r} is not implemented, only {implemented!r}")


def build_model(config):
    """transformers' model of a JanusConfig, with random weights (or none, on the meta device)."""
    declare_torchvision_ops()
    from transformers import JanusForConditionalGeneration

    return JanusForConditionalGeneration._from_config(config, attn_implementation="sdpa")


def convert_config(original: dict):
    """transformers' JanusConfig of an original config.json (model_type multi_modality)."""
    declare_torchvision_ops()
    from transformers import JanusConfig

    tower = original["vision_config"]["params"]["model_name"]
    vq = original["gen_vision_config"]
    if tower not in VISION or vq["cls"] not in VQ:
        raise ValueError(f"vision encoder {tower} with {vq['cls']} is not known")
    width = original["aligner_config"]["params"]["n_embed"]
    vision = VISION[tower]
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2
    config = JanusConfig(
        text_config=original["language_config"],
        vision_config=vision | dict(projection_dim=width, num_image_tokens=tokens),
        vq_config=VQ[vq["cls"]] | dict(
            num_embeddings=vq["params"]["image_token_size"], embed_dim=vq["params"]["n_embed"],
            projection_dim=width, image_token_embed_dim=width))
    config.tie_word_embeddings = False
    return config


# The original keys -> transformers', in this order.
ORIGINAL_NAMES = (
    (r"^language_model\.lm_head", "lm_head"), (r"^language_model\.model", "model.language_model"),
    (r"^vision_model\.vision_tower\.blocks", "model.vision_model.encoder.layers"),
    (r"^vision_model\.vision_tower\.norm", "model.vision_model.post_layernorm"),
    (r"^vision_model\.vision_tower\.patch_embed\.proj",
     "model.vision_model.embeddings.patch_embedding"),
    (r"^vision_model\.vision_tower\.pos_embed",
     "model.vision_model.embeddings.position_embedding.weight"),
    (r"attn\.proj\.", "self_attn.projection_layer."),
    (r"layers\.(\d+)\.norm(\d)", r"layers.\1.layer_norm\2"),
    (r"^aligner\.layers\.0", "model.aligner.fc1"),
    (r"^aligner\.layers\.2", "model.aligner.hidden_layers.0"),
    (r"^gen_aligner\.layers\.0", "model.generation_aligner.fc1"),
    (r"^gen_aligner\.layers\.2", "model.generation_aligner.hidden_layers.0"),
    (r"^gen_embed", "model.generation_embeddings"),
    (r"^gen_head\.output_mlp_projector", "model.generation_head.proj_out"),
    (r"^gen_head\.vision_head", "model.generation_head.vision_head"),
    (r"^gen_vision_model", "model.vqmodel"), (r"decoder\.conv_blocks", "decoder.up"),
    (r"encoder\.conv_blocks", "encoder.down"), (r"(up|down)\.(\d+)\.res", r"\1.\2.block"),
    (r"mid\.0", "mid.block_1"), (r"mid\.1", "mid.attn_1"), (r"mid\.2", "mid.block_2"))
