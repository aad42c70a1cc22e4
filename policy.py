"""One mixture-of-transformers policy that reads and writes text and images, at any size.

The architecture is BAGEL's [arXiv:2505.14683; MoT, arXiv:2411.04996; Transfusion,
arXiv:2408.11039]: Qwen2 blocks with two experts (0 understands: text and ViT tokens; 1 generates:
autoencoder latents), separate weights, one joint attention. Text is causal; the tokens of an image
see one another and share one rotary position. All that was read lives in a `Context`. Acting and
learning call the same three methods, with or without gradients, so the policy that samples and the
policy that is scored are one function:

    context = policy.empty(N)
    logits, context = policy.append_text(context, tokens, mask)        # causal, understanding expert
    context = policy.append_image(context, pixels=..., latents=..., size=...)       # clean, t = 0
    v = policy.velocity(context, x, t, size)                           # noisy; the context stays

An image is drawn from noise (N, M, config.latent_features), M = H * W / config.stride**2, by small
steps x + v * (t_next - t) from t = 1 to 0, as flow_grpo.rollout takes them, and then decoded.

Differs: the marker tokens of an image come before its patches. They share its position and its full
attention, so the order inside an image block changes nothing, and every call is [understanding
tokens | generation tokens], one split. Image contexts use the posterior mean; the official encoder
samples. Left out: sequence packing (batches are ragged, masks carry that) and the flash-attention
kernel.

Legend: N samples, L text positions, M image tokens, F features of one token, S positions already in
the context, D width, Dv width of the ViT, H heads, d width of a head, V vocabulary. t is flow time,
1 = noise, 0 = data; x = (1-t)*data + t*noise; v = noise - data. Pixels are in [-1, 1].
"""

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

UNDERSTANDING, GENERATION = 0, 1
EXPERTS = ("understanding", "generation")
MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
# What the release keeps in its scripts instead of its folder.
RELEASE_BAGEL = dict(latent_patch_size=2, max_latent_size=64, vit_max_num_patch_per_side=70)
RELEASE_AE = dict(
    in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2, z_channels=16,
    downsample=8, scale_factor=0.3611, shift_factor=0.1159)


@dataclass(frozen=True)
class PolicyConfig:
    """The four JSON files of a policy folder, kept as they are so that saving changes nothing.

    llm is Qwen2's: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
    num_key_value_heads, vocab_size. vit is SigLIP's, of whose layers the last is not used:
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, patch_size, and
    image_size = patch_size * bagel's vit_max_num_patch_per_side. An ae whose ch is no multiple of
    32 needs `norm_groups`.
    """

    llm: dict
    vit: dict
    bagel: dict = field(default_factory=lambda: dict(RELEASE_BAGEL))
    ae: dict = field(default_factory=lambda: dict(RELEASE_AE))

    @property
    def scale(self) -> str:
        """The column of a table of scales: "bagel" for widths from 1024 on, "toy" below."""
        return "bagel" if self.llm["hidden_size"] >= 1024 else "toy"

    @property
    def head_dim(self) -> int:
        """d, the width of one head."""
        return self.llm["hidden_size"] // self.llm["num_attention_heads"]

    @property
    def queries_per_key(self) -> int:
        """The number of query heads that share a key head."""
        return self.llm["num_attention_heads"] // self.llm["num_key_value_heads"]

    @property
    def rms_eps(self) -> float:
        """Epsilon of the norms; a published file may leave it out."""
        return self.llm.get("rms_norm_eps", 1e-6)

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding; newer files keep it in rope_parameters."""
        newer = self.llm.get("rope_parameters") or {}
        return self.llm.get("rope_theta") or newer.get("rope_theta", 10000.0)

    @property
    def latent_features(self) -> int:
        """F of one latent token: a patch of the autoencoder's latent."""
        return self.ae["z_channels"] * self.bagel["latent_patch_size"] ** 2

    @property
    def stride(self) -> int:
        """Pixels per latent token and side."""
        return self.ae["downsample"] * self.bagel["latent_patch_size"]

    @property
    def vae_resize(self) -> tuple[int, int, int]:
        """Longest side, shortest side and stride, in pixels, of an image for the autoencoder.

        1024, 512, 16 in the release.
        """
        longest = self.bagel["max_latent_size"] * self.stride
        default = (longest, max(1, longest // 2), self.stride)
        return tuple(self.bagel.get("vae_resize", default))

    @property
    def vit_resize(self) -> tuple[int, int, int]:
        """The same for the ViT; 980, 224, 14 in the release."""
        patch = self.vit["patch_size"]
        longest = self.bagel["vit_max_num_patch_per_side"] * patch
        default = (longest, min(16 * patch, longest), patch)
        return tuple(self.bagel.get("vit_resize", default))


@dataclass(frozen=True)
class Context:
    """Keys and values of all that was read, padding included; `valid` says which positions count."""

    keys: tuple[Tensor, ...]                          # layers x (N, kv heads, S, d)
    values: tuple[Tensor, ...]                        # layers x (N, kv heads, S, d)
    valid: Tensor                                     # (N, S) bool
    position: Tensor                                  # (N,) rotary position of the next token

    def map_cache(self, function: Callable[[Tensor], Tensor]) -> "Context":
        """Apply a function to the keys and values of every layer."""
        keys = map(function, self.keys)
        values = map(function, self.values)
        return replace(self, keys=tuple(keys), values=tuple(values))

    def repeat(self, G: int) -> "Context":
        """Repeat every row G times, prompt-major: a prompt is read once for its whole group."""
        def each(x: Tensor) -> Tensor:
            return x.repeat_interleave(G, dim=0)

        repeated = self.map_cache(each)
        return replace(repeated, valid=each(self.valid), position=each(self.position))

    def with_room(self, L: int) -> "Context":
        """Copy the cache and preallocate L positions, which `append_keys` then fills in place.

        For one line of calls: two on one context, velocity included, write to the same places.
        """
        return self.map_cache(lambda x: F.pad(x, (0, 0, 0, L)))


# ---- pieces ----

class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm in fp32, cast back before the weight as Qwen2 does (visible in bf16)."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return self.weight * y.to(x.dtype)


def split_heads(x: Tensor, d: int) -> Tensor:
    """(N, L, H*d) -> (N, H, L, d)."""
    return rearrange(x, "n l (h d) -> n h l d", d=d)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding, rotate-half form: x (N, H, L, d); cos, sin (N, 1, L, d)."""
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return x * cos + turned * sin


def rotary(position: Tensor, d: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cos and sin tables of positions (N, L), two (N, 1, L, d), computed in fp32."""
    even = torch.arange(0, d, 2, device=position.device, dtype=torch.float32)    # (d/2,)
    rate = theta ** (-even / d)
    angle = position[:, None, :, None].float() * rate.repeat(2)                  # (N, 1, L, d)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def sincos_table(side: int, width: int) -> Tensor:
    """Return the frozen 2-D position table (side*side, width).

    The first half of the features encodes the column, the second the row, each as [sin | cos].
    """
    exponent = torch.arange(width // 4, dtype=torch.float64) / (width / 4)       # (width/4,)
    rate = 10000 ** -exponent
    angle = torch.arange(side, dtype=torch.float64)[:, None] * rate              # (side, width/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                          # (side, width/2)
    column = line.repeat(side, 1)                                                # (side*side, ...)
    row = line.repeat_interleave(side, dim=0)
    return torch.cat([column, row], dim=1).float()


class TimeEmbedder(nn.Module):
    """Map flow time to the width: [cos | sin] of t in [0, 1] (not times 1000), then an MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:                                      # (N,) -> (N, D)
        index = torch.arange(128, device=t.device, dtype=torch.float32)
        rate = torch.exp(-math.log(10000) * index / 128)
        angle = t.float()[:, None] * rate                                        # (N, 128)
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)                     # (N, 256)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class Expert(nn.Module):
    """The weights of one modality in one block: norms, projections, gated MLP."""

    def __init__(self, c: PolicyConfig):
        super().__init__()
        D = c.llm["hidden_size"]
        hidden = c.llm["intermediate_size"]
        eps = c.rms_eps
        self.d = c.head_dim
        kv = c.llm["num_key_value_heads"] * self.d
        self.norm_in = RMSNorm(D, eps)
        self.norm_out = RMSNorm(D, eps)
        self.q = nn.Linear(D, D)
        self.k = nn.Linear(D, kv)
        self.v = nn.Linear(D, kv)
        self.o = nn.Linear(D, D, bias=False)
        self.q_norm = RMSNorm(self.d, eps)
        self.k_norm = RMSNorm(self.d, eps)
        self.gate = nn.Linear(D, hidden, bias=False)
        self.up = nn.Linear(D, hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values: (N, L, D) -> (N, H or kv heads, L, d) each."""
        x = self.norm_in(x)
        q = split_heads(self.q(x), self.d)
        k = split_heads(self.k(x), self.d)
        v = split_heads(self.v(x), self.d)
        return self.q_norm(q), self.k_norm(k), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add what was attended to, then the MLP: (N, L, D), (N, L, D) -> (N, L, D)."""
        x = x + self.o(attended)
        y = self.norm_out(x)
        y = F.silu(self.gate(y)) * self.up(y)                                    # (N, L, hidden)
        return x + self.down(y)


def append_keys(past: Tensor, new: Tensor, length: int) -> Tensor:
    """Append to the cache: in place if it was preallocated, else by concatenation.

    past (N, kv, S, d) and keys (or values) new (N*R, kv, L, d) -> (N*R, kv, S+L = length, d), each
    row of past being shared by R rows; a preallocated past is returned whole.
    """
    S = length - new.shape[2]
    if past.shape[2] >= length:
        past[:, :, S:length] = new
        return past
    past = past[:, :, :S]                             # without the room that is too small
    new = new.unflatten(0, (len(past), -1))                                      # (N, R, kv, L, d)
    past = past[:, None].expand(-1, new.shape[1], -1, -1, -1)                    # (N, R, kv, S, d)
    return torch.cat([past, new], dim=3).flatten(0, 1)


def run_block(function: Callable, checkpointing: bool, *inputs):
    """Call a function; with `checkpointing` the backward pass calls it again and stores less."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)


class Block(nn.Module):
    """Two experts, one attention [MoT Sec. 3]; `streams` maps an expert to its tokens (N, L, D)."""

    def __init__(self, c: PolicyConfig):
        super().__init__()
        self.experts = nn.ModuleList([Expert(c), Expert(c)])
        self.checkpointing = False

    def forward(self, *inputs):
        """(streams, past keys, past values, cos, sin, allowed) -> (streams, keys, values)."""
        return run_block(self._forward, self.checkpointing, *inputs)

    def _forward(self, streams, past_keys, past_values, cos, sin, allowed):
        projected = [self.experts[e].project(x) for e, x in streams.items()]
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*projected))         # (N, H or kv, L, d)
        q = rotate(q, cos, sin).to(v.dtype)
        k = rotate(k, cos, sin).to(v.dtype)
        length = allowed.shape[-1]                                               # S+L
        keys = append_keys(past_keys, k, length)                                 # (N, kv, S+L.., d)
        values = append_keys(past_values, v, length)
        # The heads that share keys are more queries to them: no key is copied for them, and every
        # kernel that takes a mask can be used.
        q = rearrange(q, "n (h r) l d -> n h (r l) d", h=v.shape[1])             # (N, kv, H/kv*L, d)
        a = F.scaled_dot_product_attention(
            q, keys[:, :, :length], values[:, :, :length], attn_mask=allowed)
        a = rearrange(a, "n h (r l) d -> n l (h r d)", l=v.shape[2])             # (N, L, D)
        parts = a.split([x.shape[1] for x in streams.values()], dim=1)
        out = {}
        for (e, x), attended in zip(streams.items(), parts):
            out[e] = self.experts[e].finish(x, attended)
        return out, keys, values


class VitBlock(nn.Module):
    """One SigLIP encoder block; attribute names are the released key names."""

    def __init__(self, width: int, hidden: int, heads: int, eps: float):
        super().__init__()
        self.d = width // heads
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:                     # (N, M, Dv)
        y = self.layer_norm1(x)
        q = split_heads(self.self_attn["q_proj"](y), self.d)                     # (N, H, M, d)
        k = split_heads(self.self_attn["k_proj"](y), self.d)
        v = split_heads(self.self_attn["v_proj"](y), self.d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)           # (N, H, M, d)
        y = rearrange(y, "n h m d -> n m (h d)")
        x = x + self.self_attn["out_proj"](y)
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](F.gelu(y, approximate="tanh"))


class Vit(nn.Module):
    """SigLIP encoder of patches (p_h, p_w, channel) on any grid, positions learned by id."""

    def __init__(self, c: PolicyConfig):
        super().__init__()
        v = c.vit
        Dv = v["hidden_size"]
        eps = v.get("layer_norm_eps", 1e-6)
        features = v["patch_size"] ** 2 * v.get("num_channels", 3)
        positions = (v["image_size"] // v["patch_size"]) ** 2
        self.embeddings = nn.ModuleDict({
            "patch_embedding": nn.Linear(features, Dv),
            "position_embedding": nn.Embedding(positions, Dv)})
        layers = nn.ModuleList()
        for _ in range(v["num_hidden_layers"] - 1):
            layers.append(VitBlock(Dv, v["intermediate_size"], v["num_attention_heads"], eps))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(Dv, eps)

    def forward(self, patches: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode patches (N, M, F) at ids (N, M) -> (N, M, Dv)."""
        x = self.embeddings["patch_embedding"](patches)
        x = x + self.embeddings["position_embedding"](ids).to(x.dtype)           # (N, M, Dv)
        allowed = own_attention(mask, causal=False)                              # (N, 1, 1, M)
        for block in self.encoder["layers"]:
            x = block(x, allowed)
        return self.post_layernorm(x)


# ---- masks and grids ----

def own_attention(mask: Tensor, causal: bool) -> Tensor:
    """Return who sees whom inside one appended segment of mask (N, L), rows query.

    (N, 1, L, L) for text; (N, 1, 1, L) for an image, whose tokens all see the same.

        text "a b c"        text with one padded position               image of 3 tokens
        1 0 0               1 0 0                                       1 1 1
        1 1 0               1 1 0
        1 1 1               1 1 1   (padding sees itself: no row is empty)
    """
    columns = mask[:, None, None, :]
    if not causal:
        return columns
    L = mask.shape[1]
    before = mask.new_ones(L, L).tril()                                          # (L, L)
    itself = torch.eye(L, dtype=torch.bool, device=mask.device)
    return (columns & before) | itself


def attention_after(valid: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """Return who sees whom if a segment of mask (N, L) comes after a context `valid` (N, S).

    (N, 1, L or 1, S+L): all of the context, and `own_attention`.
    """
    own = own_attention(mask, causal)                                            # (N, 1, L or 1, L)
    before = valid[:, None, None, :].expand(-1, -1, own.shape[2], -1)
    return torch.cat([before, own], dim=-1)


def patchify(images: Tensor, patch: int) -> Tensor:
    """(N, C, h, w) -> (N, M, F): row-major patches, features ordered (p_h, p_w, C)."""
    return rearrange(images, "n c (h p) (w q) -> n (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: Tensor, patch: int, rows: int) -> Tensor:
    """(N, M, F) -> (N, C, h, w), the inverse of `patchify` for a grid with `rows` rows."""
    return rearrange(tokens, "n (h w) (p q c) -> n c (h p) (w q)", p=patch, q=patch, h=rows)


def pad_right(rows: list[Tensor], value: int = 0) -> tuple[Tensor, Tensor]:
    """Stack rows (L_i, ...) into (N, L, ...), filled up with `value`, and their mask (N, L)."""
    padded = pad_sequence(rows, batch_first=True, padding_value=value)
    length = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(padded.shape[1]) < length[:, None]


def check_lengths(texts: list[str], rows: list[list[int]], limit: int) -> None:
    """ValueError for a text whose row of ids is longer than the limit."""
    for text, row in zip(texts, rows):
        if len(row) > limit:
            raise ValueError(
                f"text of {len(row)} tokens is longer than the context, which has room for "
                f"{limit}: {text[:60]!r}")


def check_finite(x: Tensor, what: str) -> None:
    """Raise FloatingPointError if what the autoencoder made is not finite."""
    if not x.isfinite().all():
        raise FloatingPointError(
            f"the autoencoder made {what} that are not finite; what it was given, its weights or "
            "its precision are at fault")


def grid_ids(sizes: list[tuple[int, int]], stride: int, side: int) -> tuple[Tensor, Tensor]:
    """Return position ids row*side + column, (N, M), of images of (height, width), and their mask.

    Errors: ValueError for a side that is no multiple of stride, or of more than `side` strides.
    """
    grids = []
    for height, width in sizes:
        if height % stride or width % stride or max(height, width) > side * stride:
            raise ValueError(
                f"image of {height} x {width} pixels: each side must be a multiple of {stride} "
                f"up to {side * stride}")
        row = torch.arange(height // stride) * side
        column = torch.arange(width // stride)
        grids.append((row[:, None] + column).flatten())
    return pad_right(grids)


# ---- the policy ----

class Policy(nn.Module):
    """BAGEL at the sizes of `config`; `tokenizer` must know the four marker tokens.

    The autoencoder is frozen. Errors: ValueError for a tokenizer that does not fit.
    """

    stem = "ema"                                      # of its file of weights
    reads_latents = True                              # of a picture, so that it can edit
    reads_blanks = False                              # in place of a prompt, for guidance

    def __init__(self, config: PolicyConfig, tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        D = config.llm["hidden_size"]
        V = config.llm["vocab_size"]
        Dv = config.vit["hidden_size"]
        known = tokenizer.get_vocab()
        last = max(known.values())
        markers = [known.get(marker) for marker in MARKERS]
        if None in markers or last >= V:
            raise ValueError(
                f"tokenizer needs the special tokens {MARKERS} and ids below the policy's "
                f"vocab_size {V}, its last is {last}; they are not of one checkpoint")
        self.start, self.end, self.image_start, self.image_end = markers
        self.frame = {self.start, self.end}           # of a text, no words of it
        # Ids that no text may hold; a word that the tokenizer does not know may become unk_token.
        added = tokenizer.added_tokens_decoder.items()
        self.reserved = {i for i, token in added if token.special}
        self.reserved.discard(tokenizer.unk_token_id)
        self.reserved.update(markers)
        self.embed = nn.Embedding(V, D)
        layers = range(config.llm["num_hidden_layers"])
        self.blocks = nn.ModuleList([Block(config) for _ in layers])
        self.norms = nn.ModuleList([RMSNorm(D, config.rms_eps) for _ in range(2)])
        self.head = nn.Linear(D, V, bias=False)
        self.time_embedder = TimeEmbedder(D)
        self.latent_in = nn.Linear(config.latent_features, D)
        self.latent_out = nn.Linear(D, config.latent_features)
        self.vit = Vit(config)
        self.connector = nn.ModuleDict({"fc1": nn.Linear(Dv, D), "fc2": nn.Linear(D, D)})
        latent_side = config.bagel["max_latent_size"]
        vit_side = config.bagel["vit_max_num_patch_per_side"]
        self.register_buffer("latent_positions", sincos_table(latent_side, D))
        self.register_buffer("vit_positions", sincos_table(vit_side, D))
        self.autoencoder = build_autoencoder(config.ae).requires_grad_(False)
        # Set by support/checkpoint.py: split over ranks, bytes if gathered, dtype of the file.
        self.sharded = False
        self.gathered_bytes = 0
        self.stored = None

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def parts(self) -> list[nn.Module]:
        """What is cut over ranks; the rest is small."""
        return [*self.blocks, *self.vit.encoder["layers"], self.embed, self.head]

    def linear_layers(self, expert: str) -> list[tuple[nn.Module, str]]:
        """Return (parent, name) of the linear layers of one of EXPERTS that may get adapters."""
        names = ("q", "k", "v", "o", "gate", "up", "down")
        parents = [block.experts[EXPERTS.index(expert)] for block in self.blocks]
        return [(parent, name) for parent in parents for name in names]

    @staticmethod
    def expert_of(name: str) -> str:
        """Return the expert of a parameter; generation has the latent and time layers too."""
        generates = re.search(r"experts\.1\.|norms\.1\.|^latent_|^time_embedder", name)
        return EXPERTS[bool(generates)]

    # -- text --

    def _spell(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts. A marker inside a text is spelled like any other word, or dropped."""
        encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        return [[i for i in ids if i not in self.reserved] for ids in encoded.input_ids]

    def token_ids(self, texts: list[str], room: int = 0) -> list[list[int]]:
        """Return the ids of each text between <|im_start|> and <|im_end|>.

        No text ends itself, see `_spell`. Errors: ValueError for a text that leaves less than
        `room` positions of the context (max_position_embeddings). Differs: the official code takes
        a marker inside a text for a marker.
        """
        rows = [[self.start, *ids, self.end] for ids in self._spell(texts)]
        limit = self.config.llm.get("max_position_embeddings", 32768) - room
        check_lengths(texts, rows, limit)
        return rows

    def encode_text(self, texts: list[str], after: str = "nothing") -> tuple[Tensor, Tensor]:
        """Return the tokens (N, L) of `token_ids`, padded right, and their mask (N, L).

        after: what was read before, "nothing", an "image" or a "turn"; here all texts are alike.
        """
        return self._batch(self.token_ids(texts))

    def _batch(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        tokens, mask = pad_right([torch.tensor(ids) for ids in rows], value=self.end)
        return tokens.to(self.device), mask.to(self.device)

    encode_written = encode_text                      # of texts that the policy is taught to write

    def decode_text(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """Return the words of tokens (N, L) under the mask (N, L), without start and end."""
        rows = []
        for row, chosen in zip(tokens.cpu(), mask.cpu()):
            rows.append([i for i in row[chosen].tolist() if i not in self.frame])
        return self.tokenizer.batch_decode(rows)

    # -- reading --

    def empty(self, N: int) -> Context:
        """Return the context of N samples that have read nothing."""
        device = self.device
        dtype = self.embed.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        kv = self.config.llm["num_key_value_heads"]
        nothing = torch.zeros(N, kv, 0, self.config.head_dim, dtype=dtype, device=device)
        cache = (nothing,) * len(self.blocks)
        valid = nothing.new_zeros(N, 0, dtype=torch.bool)
        position = nothing.new_zeros(N, dtype=torch.long)
        return Context(cache, cache, valid, position)

    def _read(
        self, context: Context, streams: dict[int, Tensor], position: Tensor, mask: Tensor,
        causal: bool, advance: Tensor | int | None,
    ) -> tuple[dict[int, Tensor], Context]:
        """Run the blocks over [understanding tokens | generation tokens] after a context.

        streams: tokens (N, L_e, D) by expert; position (rows of the context, L); mask (N, L).
        Returns the streams after the final norm, and the longer context, `advance` positions on.
        For None it is the context as it was, each row of which may serve several of the streams.
        """
        R = len(mask) // len(context.valid)
        valid = context.valid.repeat_interleave(R, dim=0)                        # (N, S)
        position = position.repeat_interleave(R, dim=0)                          # (N, L)
        allowed = attention_after(valid, mask, causal)                           # (.., L or 1, S+L)
        if allowed.shape[2] > 1:                      # one row serves all queries of a key head
            allowed = allowed.repeat(1, 1, self.config.queries_per_key, 1)
        dtype = streams[UNDERSTANDING].dtype
        cos, sin = rotary(position, self.config.head_dim, self.config.rope_theta, dtype)
        keys = []
        values = []
        for block, past_keys, past_values in zip(self.blocks, context.keys, context.values):
            streams, k, v = block(streams, past_keys, past_values, cos, sin, allowed)
            if advance is not None:
                keys.append(k)
                values.append(v)
        out = {e: self.norms[e](x) for e, x in streams.items()}
        if advance is not None:
            valid = torch.cat([valid, mask], dim=1)                              # (N, S+L)
            context = Context(tuple(keys), tuple(values), valid, context.position + advance)
        return out, context

    def append_text(
        self, context: Context, tokens: Tensor, mask: Tensor | None = None, logits: bool = True
    ) -> tuple[Tensor, Context]:
        """Read text causally with the understanding expert -> logits (N, L, V), longer context.

        tokens (N, L) include <|im_start|> and <|im_end|>; mask (N, L), False = padding (right).
        logits=False returns the last hidden states (N, L, D) instead, after the final norm,
        without the vocabulary product.
        """
        if mask is None:
            mask = torch.ones_like(tokens)
        mask = mask.bool()
        index = (mask.cumsum(1) - 1).clamp(min=0)                                # (N, L)
        streams = {UNDERSTANDING: self.embed(tokens)}
        position = context.position[:, None] + index                             # (N, L)
        read = mask.sum(1)                                                       # (N,)
        streams, longer = self._read(context, streams, position, mask, causal=True, advance=read)
        out = streams[UNDERSTANDING]                                             # (N, L, D)
        if logits:
            out = self.head(out)                                                 # (N, L, V)
        return out, longer

    def append_image(
        self, context: Context, pixels=None, latents: Tensor | None = None, size=None
    ) -> Context:
        """Read a clean image: its latents with the generation expert, then its pixels with the ViT.

        latents (N, M, F) are read at t = 0; size is their (height, width) in pixels, for all, or
        one pair per sample. pixels (N, 3, H, W), or a list of (3, H_i, W_i), in [-1, 1]. Either may
        be left out. Errors: see `grid_ids`.
        """
        if latents is not None:
            x, mask = self._embed_latents(latents, torch.zeros(()), size)
            _, context = self._image_block(context, x, mask, GENERATION)
        if pixels is not None:
            x, mask = self.embed_pixels(pixels)
            _, context = self._image_block(context, x, mask, UNDERSTANDING)
        return context

    def image_states(self, pixels) -> tuple[Tensor, Tensor, Context]:
        """Read pixels as `append_image` does and return what the patches became.

        -> last hidden states (N, M, D), after the final norm; their mask (N, M); the context.
        """
        x, mask = self.embed_pixels(pixels)
        states, context = self._image_block(self.empty(len(x)), x, mask, UNDERSTANDING)
        return states, mask, context

    def velocity(self, context: Context, x: Tensor, t, size) -> Tensor:
        """Return the velocity noise - data of noisy latents x (N, M, F) at t -> (N, M, F) fp32.

        t: flow time, scalar or (N,). size: (height, width) in pixels for all, or one pair per row
        of x. The context stays as it was. Each of its rows serves as many rows of x as fall to it,
        in order: all W noisy steps of N images are one call, x (N, W, M, F).flatten(0, 1),
        t (W,).repeat(N).
        """
        tokens, mask = self._embed_latents(x, t, size)
        states, _ = self._image_block(context, tokens, mask, GENERATION, advance=None)
        return self.latent_out(states).float()

    def _image_block(
        self, context: Context, patches: Tensor, mask: Tensor, expert: int, advance: int | None = 1
    ) -> tuple[Tensor, Context]:
        """Read one image: its two markers with the understanding expert, patches with `expert`.

        patches (N, M, D), mask (N, M) -> their last hidden states (N, M, D), context. All of them
        share one position.
        """
        N, M, _ = patches.shape
        ids = torch.tensor([self.image_start, self.image_end], device=patches.device)
        markers = self.embed(ids.expand(N, 2)).to(patches.dtype)                 # (N, 2, D)
        if expert == GENERATION:
            streams = {UNDERSTANDING: markers, GENERATION: patches}
        else:
            streams = {UNDERSTANDING: torch.cat([markers, patches], dim=1)}      # (N, 2+M, D)
        mask = torch.cat([mask.new_ones(N, 2), mask], dim=1)                     # (N, 2+M)
        position = context.position[:, None].expand(-1, 2 + M)
        streams, longer = self._read(
            context, streams, position, mask, causal=False, advance=advance)
        return streams[expert][:, -M:], longer

    # -- images --

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError for a drawn image's (height, width) that the grid does not have."""
        self.latent_grid(size, 1)

    def embed_pixels(self, pixels) -> tuple[Tensor, Tensor]:
        """Return ViT tokens in the policy's width, positions added: (N, M, D), and mask (N, M)."""
        patch = self.config.vit["patch_size"]
        side = self.config.bagel["vit_max_num_patch_per_side"]
        ids, mask = self._grid([image.shape[-2:] for image in pixels], patch, side)
        weight = self.connector["fc1"].weight
        rows = [patchify(image[None].to(weight), patch)[0] for image in pixels]
        patches, _ = pad_right(rows)                                             # (N, M, F)
        x = self.vit(patches, ids, mask)                                         # (N, M, Dv)
        x = F.gelu(self.connector["fc1"](x), approximate="tanh")
        x = self.connector["fc2"](x)                                             # (N, M, D)
        return x + self.vit_positions[ids], mask

    def _embed_latents(self, x: Tensor, t: Tensor, size) -> tuple[Tensor, Tensor]:
        """Return latent tokens in the policy's width, time and position added, and their mask."""
        ids, mask = self.latent_grid(size, len(x))
        x = x[:, :ids.shape[1]]                       # drops padding beyond the largest size
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
        time = self.time_embedder(t)                                             # (N, D)
        x = self.latent_in(x.to(self.latent_in.weight.dtype))                    # (N, M, D)
        return x + time[:, None] + self.latent_positions[ids], mask

    def latent_grid(self, size, N: int) -> tuple[Tensor, Tensor]:
        """Return position ids and mask (N, M) of latents of one (height, width), or a list of N."""
        sizes = [size] if isinstance(size[0], int) else size
        side = self.config.bagel["max_latent_size"]
        ids, mask = self._grid(sizes, self.config.stride, side)
        return ids.expand(N, -1), mask.expand(N, -1)

    def _grid(self, sizes: list, stride: int, side: int) -> tuple[Tensor, Tensor]:
        ids, mask = grid_ids(sizes, stride, side)
        return ids.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def encode(self, pixels) -> Tensor:
        """Return clean latent tokens (N, M, F), fp32: scale * (posterior mean - shift).

        pixels (N, 3, H, W), or a list of (3, H_i, W_i), in [-1, 1]; then tokens are padded right.
        Each side must be a multiple of the stride. Autocast is off inside, as in `decode`.
        Errors: see `check_finite`.
        """
        if isinstance(pixels, list):
            latents = [self.encode(image[None])[0] for image in pixels]
            return pad_right(latents)[0]
        ae = self.config.ae
        pixels = pixels.to(self.device, self.autoencoder.dtype)
        with torch.autocast(self.device.type, enabled=False):
            posterior = self.autoencoder.encode(pixels).latent_dist              # (N, z, h, w)
        z = ae["scale_factor"] * (posterior.mean.float() - ae["shift_factor"])
        check_finite(z, "latents")
        return patchify(z, self.config.bagel["latent_patch_size"])

    @torch.no_grad()
    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the pixels (N, 3, H, W) of latents (N, M, F) of one size (height, width).

        Nominally in [-1, 1], not clamped. Errors: see `check_finite`.
        """
        ae = self.config.ae
        patch = self.config.bagel["latent_patch_size"]
        z = unpatchify(latents, patch, size[0] // self.config.stride)            # (N, z, h, w)
        z = z / ae["scale_factor"] + ae["shift_factor"]
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.autoencoder.decode(z.to(self.autoencoder.dtype)).sample.float()
        check_finite(pixels, "pixels")
        return pixels

    # -- writing --

    @torch.no_grad()
    def sample_text(
        self, context: Context, uniforms: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write text after <|im_start|> until <|im_end|> or for L tokens.

        uniforms (N, L) in [0, 1): one number per token, so that a sample does not depend on its
        batch. temperature 0 is greedy. -> tokens, mask (through the end token) and log-probs under
        the distribution that was sampled (greedy: temperature 1), each (N, L' <= L). The tokens do
        not have the one that starts them, self.start, and the context has not read them: to score
        them, or to read on, append_text takes self.start and then the tokens.
        Errors: FloatingPointError for logits that are not finite.
        """
        N, L = uniforms.shape
        context = context.with_room(L)
        token = torch.full((N, 1), self.start, device=self.device)
        alive = torch.ones(N, 1, dtype=torch.bool, device=self.device)
        written = []
        for i in range(L):
            logits, context = self.append_text(context, token, alive)
            token, logp = choose_token(logits[:, -1].float(), uniforms[:, i], temperature)
            logp = torch.where(alive, logp, 0.0)                                 # (N, 1)
            token = torch.where(alive, token, self.end)                          # (N, 1)
            written.append((token, alive, logp))
            alive = alive & (token != self.end)
            going = alive.any().int()
            if self.sharded:              # ranks that gather one another's parameters stop together
                dist.all_reduce(going, dist.ReduceOp.MAX)
            if not going:
                break
        tokens, mask, logp = (torch.cat(parts, dim=1) for parts in zip(*written))
        bad = (~logp.isfinite()).any(0).nonzero()     # a NaN makes every log-prob of its token NaN
        if len(bad):
            raise FloatingPointError(
                f"text logits are not finite at token {bad[0, 0]}; the policy's weights or its "
                "precision are at fault")
        return tokens, mask, logp


def choose_token(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample a token of each row, or take the likeliest at temperature 0.

    logits (N, V), uniforms (N,) -> ids and log-probs (N, 1); those of temperature 0 are of 1.
    """
    logp = (logits / (temperature or 1.0)).log_softmax(-1)                       # (N, V)
    if temperature:
        token = invert_cumulative(logp, uniforms)
    else:
        token = logp.argmax(-1, keepdim=True)
    return token, logp.gather(1, token)


def invert_cumulative(logp: Tensor, uniforms: Tensor) -> Tensor:
    """Sample by inverting the cumulative distribution: logp (N, V), uniforms (N,) -> (N, 1) ids."""
    cumulative = logp.double().exp().cumsum(-1)       # fp32 would end off 1 by 1e-5 at V = 150,000
    threshold = uniforms[:, None] * cumulative[:, -1:]                           # (N, 1)
    below = (cumulative <= threshold).sum(-1, keepdim=True)
    return below.clamp(max=logp.shape[1] - 1)


# ---- guidance ----

@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance as BAGEL applies it.

    text_scale 1 is no guidance at all, image guidance included.
    """

    text_scale: float = 4.0
    image_scale: float = 1.0
    renorm: str = "global"                            # global | channel | text_channel
    renorm_min: float = 0.0
    interval: tuple[float, float] = (0.4, 1.0)        # active while low < t <= high, t shifted


def guided_velocity(
    policy: Policy, x: Tensor, t, size, full: Context, no_text: Context, no_image: Context,
    guidance: Guidance,
) -> Tensor:
    """Return the velocity of `full`, pushed away from the contexts without text and without image.

    -> (N, M, F). t is one time for all or one per row; each row is guided if its own is in the
    interval.
    Differs: the official "global" renorm takes one norm over the whole tensor, right for one image
    per call; here it is per sample.
    """
    g = guidance
    v = policy.velocity(full, x, t, size)
    low, high = g.interval
    t = torch.as_tensor(t, dtype=torch.float32, device=x.device)    # in fp32 0.4 is not above 0.4
    active = ((low < t) & (t <= high)).expand(len(x))                            # (N,)
    if g.text_scale <= 1 or not active.any():
        return v
    mask = policy.latent_grid(size, len(x))[1][..., None]                        # (N, M, 1)
    dims = (1, 2) if g.renorm == "global" else (2,)

    def length(w: Tensor) -> Tensor:
        return (w * mask).square().sum(dims, keepdim=True).sqrt()

    def rescale(w: Tensor) -> Tensor:
        # Never longer than the unguided velocity, so that large scales do not over-expose.
        factor = length(v) / (length(w) + 1e-8)
        return w * factor.clamp(g.renorm_min, 1.0)

    without = policy.velocity(no_text, x, t, size)
    guided = without + g.text_scale * (v - without)
    if g.renorm == "text_channel":
        guided = rescale(guided)
    if g.image_scale > 1:
        without = policy.velocity(no_image, x, t, size)
        guided = without + g.image_scale * (guided - without)
    if g.renorm != "text_channel":
        guided = rescale(guided)
    return torch.where(active[:, None, None], guided, v)


# ---- libraries ----

def build_autoencoder(ae: dict):
    """Build diffusers' AutoencoderKL at the sizes of ae_config.json.

    `norm_groups`, 32 in the release, may be given.
    """
    declare_torchvision_ops()
    from diffusers import AutoencoderKL
    widths = tuple(ae["ch"] * m for m in ae["ch_mult"])
    depth = len(widths)
    return AutoencoderKL(
        in_channels=ae["in_channels"], out_channels=ae["out_ch"], latent_channels=ae["z_channels"],
        block_out_channels=widths, layers_per_block=ae["num_res_blocks"],
        norm_num_groups=ae.get("norm_groups", 32), use_quant_conv=False, use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth)


@functools.cache
def declare_torchvision_ops():
    """Let transformers and diffusers import despite a torchvision built for another torch.

    Such a torchvision (a CUDA build with a CPU torch) fails at import because its operators are
    missing. Declaring their schemas is enough, since none is called. The cache keeps the returned
    library alive. Does nothing if torchvision imports, or is not installed.
    """
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
