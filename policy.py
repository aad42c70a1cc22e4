"""One mixture-of-transformers policy that reads and writes text and images, at any size.

The architecture is BAGEL's [arXiv:2505.14683; MoT, arXiv:2411.04996; Transfusion, arXiv:2408.11039]: Qwen2 blocks with two experts
(0 understands: text and ViT tokens; 1 generates: autoencoder latents), separate weights, one joint attention. Text is causal, an image
block sees itself fully and shares one rotary position. Everything that was read lives in a `Context`; acting and learning call the same
three methods, with or without gradients, so the policy that samples and the policy that is scored are one function:

    context = policy.empty(N)
    logits, context = policy.append_text(context, tokens, mask)            # causal, understanding expert
    context = policy.append_image(context, pixels=..., latents=...)        # clean image, t = 0
    v = policy.velocity(context, x, t, size)                               # noisy image; the context stays as it was

Differs: the marker tokens of an image come before its patches. They share its position and its full attention, so the order inside an
image block changes nothing, and every call is [understanding tokens | generation tokens], one split. Image contexts use the posterior
mean; the official encoder samples. Left out: sequence packing (batches are ragged, masks carry that) and the flash-attention kernel.

Legend: N samples, L text positions, M image tokens, F features of one token, S positions already in the context, D width, Dv width of
the ViT, H heads, V vocabulary. t is flow time, 1 = noise, 0 = data; x = (1-t)*data + t*noise; v = noise - data. Pixels are in [-1, 1].
"""

import contextlib
import functools
import math
import re
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

UNDERSTANDING, GENERATION = 0, 1
MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
# What the release keeps in its scripts instead of its folder.
RELEASE_BAGEL = dict(latent_patch_size=2, max_latent_size=64, vit_max_num_patch_per_side=70)
RELEASE_AE = dict(in_channels=3, out_ch=3, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2, z_channels=16, downsample=8,
                  scale_factor=0.3611, shift_factor=0.1159)


@dataclass(frozen=True)
class PolicyConfig:
    """The four JSON files of a policy folder, kept as they are so that saving writes them back unchanged."""

    llm: dict                                                   # Qwen2 sizes: hidden_size, num_hidden_layers, ...
    vit: dict                                                   # SigLIP sizes; one layer fewer than it lists is used
    bagel: dict = field(default_factory=lambda: dict(RELEASE_BAGEL))
    ae: dict = field(default_factory=lambda: dict(RELEASE_AE))

    @property
    def head_dim(self) -> int:
        return self.llm["hidden_size"] // self.llm["num_attention_heads"]

    # Published files leave out what equals their class's default, and newer ones keep rope_theta in rope_parameters.
    @property
    def rms_eps(self) -> float:
        return self.llm.get("rms_norm_eps", 1e-6)

    @property
    def rope_theta(self) -> float:
        theta = self.llm.get("rope_theta")
        return (self.llm.get("rope_parameters") or {}).get("rope_theta", 10000.0) if theta is None else theta

    @property
    def scale(self) -> str:
        """The column of a scale table for a policy of this width: everything from 1024 on is BAGEL's."""
        if not isinstance(self.llm["hidden_size"], int):
            raise ValueError(f"hidden_size {self.llm['hidden_size']!r} in llm_config.json: must be a whole number")
        return "bagel" if self.llm["hidden_size"] >= 1024 else "toy"

    @property
    def queries_per_key(self) -> int:
        """H / kv heads."""
        return self.llm["num_attention_heads"] // self.llm["num_key_value_heads"]

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
        """Longest side, shortest side, stride in pixels of an image on its way to the autoencoder; 1024, 512, 16 in the release."""
        longest = self.bagel["max_latent_size"] * self.stride
        return tuple(self.bagel.get("vae_resize", (longest, max(1, longest // 2), self.stride)))

    @property
    def vit_resize(self) -> tuple[int, int, int]:
        """The same on the way to the ViT; 980, 224, 14 in the release."""
        patch = self.vit["patch_size"]
        longest = self.bagel["vit_max_num_patch_per_side"] * patch
        return tuple(self.bagel.get("vit_resize", (longest, min(16 * patch, longest), patch)))


@dataclass(frozen=True)
class Context:
    """Keys and values of all that was read, padding included (`valid` says which positions count)."""

    keys: tuple[Tensor, ...]                                    # layers x (N, kv heads, S, head_dim)
    values: tuple[Tensor, ...]                                  # layers x (N, kv heads, S, head_dim)
    valid: Tensor                                               # (N, S) bool
    position: Tensor                                            # (N,) rotary position of the next token

    def repeat(self, G: int) -> "Context":
        """Every row G times, prompt-major: a prompt is read once for its whole group."""
        each = lambda x: x.repeat_interleave(G, dim=0)
        return Context(tuple(map(each, self.keys)), tuple(map(each, self.values)), each(self.valid), each(self.position))


# ---- pieces ----

class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm; statistics in fp32, cast back before the weight as Qwen2 does (visible in bf16)."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, rotate-half form. x (N, H, L, d); cos, sin (N, 1, L, d)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def rotary(position: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin tables of positions (N, L) -> two (N, 1, L, dim), computed in fp32."""
    rate = theta ** (-torch.arange(0, dim, 2, device=position.device, dtype=torch.float32) / dim)   # (dim/2,)
    angle = position[:, None, :, None].float() * rate.repeat(2)                                    # (N, 1, L, dim)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def sincos_table(side: int, width: int) -> Tensor:
    """Frozen 2-D position table (side*side, width): first half of the features encodes the column, second the row; [sin | cos]."""
    rate = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))                 # (width/4,)
    angle = torch.arange(side, dtype=torch.float64)[:, None] * rate                                # (side, width/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                                            # (side, width/2)
    return torch.cat([line[None].expand(side, side, -1), line[:, None].expand(side, side, -1)], dim=-1).flatten(0, 1).float()


class TimeEmbedder(nn.Module):
    """Flow time to width: [cos | sin] of t in [0, 1] (not times 1000) at 128 rates, then two linear layers with SiLU."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:                                                        # (N,) -> (N, D)
        rate = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angle = t.float()[:, None] * rate                                                          # (N, 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))


class Expert(nn.Module):
    """The weights of one modality in one block: norms, projections, query and key norms, gated MLP."""

    def __init__(self, c: PolicyConfig):
        super().__init__()
        D, I, d, eps = c.llm["hidden_size"], c.llm["intermediate_size"], c.head_dim, c.rms_eps
        kv = c.llm["num_key_value_heads"] * d
        self.norm_in, self.norm_out = RMSNorm(D, eps), RMSNorm(D, eps)
        self.q, self.k, self.v, self.o = nn.Linear(D, D), nn.Linear(D, kv), nn.Linear(D, kv), nn.Linear(D, D, bias=False)
        self.q_norm, self.k_norm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.gate, self.up, self.down = nn.Linear(D, I, bias=False), nn.Linear(D, I, bias=False), nn.Linear(I, D, bias=False)
        self.head_dim = d

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.norm_in(x)                                                                        # (N, L, D)
        q, k, v = (rearrange(f(x), "n l (h d) -> n h l d", d=self.head_dim) for f in (self.q, self.k, self.v))
        return self.q_norm(q), self.k_norm(k), v                                                   # (N, H or kv, L, d)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.o(attended)                                                                   # (N, L, D)
        y = self.norm_out(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))                                    # (N, L, D)


def append_keys(past: Tensor, own: Tensor, length: int) -> Tensor:
    """Keys (or values) own (N*R, kv, L, d) behind past (N, kv, S, d), every row of it shared by R rows -> (N*R, kv, S+L = length, d).
    Where past has room for them behind its S, they are written there, and the result is past itself."""
    if past.shape[2] >= length:
        past[:, :, length - own.shape[2]:length] = own
        return past
    own = own.unflatten(0, (len(past), -1))                                                        # (N, R, kv, L, d)
    return torch.cat([past[:, None].expand(-1, own.shape[1], -1, -1, -1), own], dim=3).flatten(0, 1)


class Block(nn.Module):
    """Two experts, one attention [MoT Sec. 3]. `streams` holds the tokens of each expert, or None where a call has none."""

    def __init__(self, c: PolicyConfig):
        super().__init__()
        self.experts, self.checkpointing = nn.ModuleList([Expert(c), Expert(c)]), False

    def forward(self, *inputs):
        """(streams, past_k, past_v, cos, sin, allowed) -> (streams, keys, values); checkpointing computes it again in the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self._forward(*inputs)

    def _forward(self, streams, past_k, past_v, cos, sin, allowed):
        active = [(e, x) for e, x in zip(self.experts, streams) if x is not None]
        q, k, v = (torch.cat(z, dim=2) for z in zip(*[e.project(x) for e, x in active]))           # (N, H or kv, L, d)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        length = allowed.shape[-1]                                                                 # S+L
        keys, values = append_keys(past_k, k, length), append_keys(past_v, v, length)                        # (N, kv, S+L or more, d)
        # The heads that share keys are more queries to them: no key is copied for them, and every kernel that takes a mask can be used.
        q = rearrange(q, "n (h r) l d -> n h (r l) d", h=v.shape[1])                               # (N, kv, H/kv*L, d)
        a = F.scaled_dot_product_attention(q, keys[:, :, :length], values[:, :, :length], attn_mask=allowed)
        a = rearrange(a, "n h (r l) d -> n l (h r d)", l=v.shape[2]).split([x.shape[1] for _, x in active], dim=1)
        done = iter([e.finish(x, a_e) for (e, x), a_e in zip(active, a)])
        return [None if x is None else next(done) for x in streams], keys, values


class VitBlock(nn.Module):
    """One SigLIP encoder block; attribute names are the released key names."""

    def __init__(self, width: int, hidden: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.self_attn = nn.ModuleDict({n: nn.Linear(width, width) for n in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:                                       # (N, M, Dv)
        y, a = self.layer_norm1(x), self.self_attn
        q, k, v = (rearrange(a[n](y), "n m (h d) -> n h m d", h=self.heads) for n in ("q_proj", "k_proj", "v_proj"))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)                             # (N, H, M, d)
        x = x + a["out_proj"](rearrange(y, "n h m d -> n m (h d)"))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh"))


class Vit(nn.Module):
    """SigLIP encoder over flattened patches of any grid: patch features (p_h, p_w, channel), learned position by id."""

    def __init__(self, c: PolicyConfig):
        super().__init__()
        v, Dv, eps = c.vit, c.vit["hidden_size"], c.vit.get("layer_norm_eps", 1e-6)
        self.embeddings = nn.ModuleDict({
            "patch_embedding": nn.Linear(v["patch_size"] ** 2 * v.get("num_channels", 3), Dv),
            "position_embedding": nn.Embedding((v["image_size"] // v["patch_size"]) ** 2, Dv)})
        blocks = [VitBlock(Dv, v["intermediate_size"], v["num_attention_heads"], eps) for _ in range(v["num_hidden_layers"] - 1)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.post_layernorm = nn.LayerNorm(Dv, eps)

    def forward(self, patches: Tensor, ids: Tensor, mask: Tensor) -> Tensor:                       # (N, M, F) -> (N, M, Dv)
        x = self.embeddings["patch_embedding"](patches)
        x = x + self.embeddings["position_embedding"](ids).to(x.dtype)                             # (N, M, Dv)
        allowed = own_attention(mask, causal=False)                                                # (N, 1, M, M)
        for block in self.encoder["layers"]:
            x = block(x, allowed)
        return self.post_layernorm(x)


# ---- masks and grids ----

def own_attention(mask: Tensor, causal: bool) -> Tensor:
    """Who sees whom inside one appended segment. mask (N, L) bool -> (N, 1, L, L) bool; rows are queries.

        text "a b c"        image of 3 tokens        text with one padded position
        1 0 0               1 1 1                    1 0 0
        1 1 0               1 1 1                    1 1 0
        1 1 1               1 1 1                    . . 1   (a padded query sees itself, so that no row is empty)
    """
    L = mask.shape[1]
    order = torch.ones(L, L, dtype=torch.bool, device=mask.device).tril(0 if causal else L)        # (L, L)
    return mask[:, None, None, :] & order | torch.eye(L, dtype=torch.bool, device=mask.device)


def patchify(images: Tensor, patch: int) -> Tensor:
    """(N, C, h, w) -> (N, M, F): row-major patches, features ordered (p_h, p_w, C)."""
    return rearrange(images, "n c (h p) (w q) -> n (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: Tensor, patch: int, rows: int) -> Tensor:
    """(N, M, F) -> (N, C, h, w), the inverse of `patchify` for a grid with `rows` rows of patches."""
    return rearrange(tokens, "n (h w) (p q c) -> n c (h p) (w q)", p=patch, q=patch, h=rows)


def grid_ids(sizes: list[tuple[int, int]], stride: int, side: int) -> tuple[Tensor, Tensor]:
    """Position ids row*side+col and the mask of images of the given (height, width) -> (N, M) long, (N, M) bool, padded right."""
    grids = []
    for h, w in sizes:
        if h % stride or w % stride or max(h, w) > side * stride or min(h, w) < stride:
            raise ValueError(f"image of {h} x {w} pixels: each side must be a multiple of {stride} up to {side * stride}")
        grids.append((torch.arange(h // stride)[:, None] * side + torch.arange(w // stride)).flatten())
    ids = nn.utils.rnn.pad_sequence(grids, batch_first=True)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([len(g) for g in grids])[:, None]


# ---- the policy ----

class Policy(nn.Module):
    """BAGEL at the sizes of `config`; `tokenizer` must know the four marker tokens. The autoencoder is frozen."""

    def __init__(self, config: PolicyConfig, tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        known = tokenizer.get_vocab()
        if missing := [m for m in MARKERS if m not in known]:
            raise ValueError(f"tokenizer lacks the special tokens {missing}; BAGEL needs {list(MARKERS)}")
        self.start, self.end, self.image_start, self.image_end = (known[m] for m in MARKERS)
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.reserved = {known[m] for m in MARKERS} | added - {tokenizer.unk_token_id}             # of no text; unknown words are
        D, V, Dv = config.llm["hidden_size"], config.llm["vocab_size"], config.vit["hidden_size"]
        if max(known.values()) >= V:
            raise ValueError(f"tokenizer counts to {max(known.values())}, the policy's vocab_size is {V}; they are not of one checkpoint")
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.llm["num_hidden_layers"])])
        self.norms = nn.ModuleList([RMSNorm(D, config.rms_eps) for _ in range(2)])
        self.head = nn.Linear(D, V, bias=False)
        self.time_embedder = TimeEmbedder(D)
        self.latent_in, self.latent_out = nn.Linear(config.latent_features, D), nn.Linear(D, config.latent_features)
        self.vit = Vit(config)
        self.connector = nn.ModuleDict({"fc1": nn.Linear(Dv, D), "fc2": nn.Linear(D, D)})
        self.register_buffer("latent_positions", sincos_table(config.bagel["max_latent_size"], D))
        self.register_buffer("vit_positions", sincos_table(config.bagel["vit_max_num_patch_per_side"], D))
        self.autoencoder = build_autoencoder(config.ae)
        self.sharded, self.gathered_bytes, self.stored = False, 0, None     # set by `shard`, twice; dtype of the file that was loaded

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def empty(self, N: int) -> Context:
        """The context of N samples that have read nothing."""
        c, kind = self.config, self.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.embed.weight.dtype
        none = torch.zeros(N, c.llm["num_key_value_heads"], 0, c.head_dim, dtype=dtype, device=self.device)
        held = (none,) * c.llm["num_hidden_layers"]
        return Context(held, held, none.new_zeros(N, 0, dtype=torch.bool), none.new_zeros(N, dtype=torch.long))

    def check_text(self, texts: list[str], room: int = 0) -> None:
        """The errors of `encode_text`, without its tensors."""
        for _ in self._token_ids(texts, room):
            pass

    def encode_text(self, texts: list[str], room: int = 0) -> tuple[Tensor, Tensor]:
        """Each text between <|im_start|> and <|im_end|> -> tokens (N, L) and mask (N, L), padded right. A marker inside a text is spelled
        like any other word, or dropped, so that no text ends itself; the official code takes it for a marker. ValueError for a text
        that leaves less than `room` positions of the context (max_position_embeddings)."""
        ids = [torch.tensor(row) for row in self._token_ids(texts, room)]
        tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.end)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(i) for i in ids])[:, None]
        return tokens.to(self.device), mask.to(self.device)

    def _token_ids(self, texts: list[str], room: int):
        """The ids of one text after the other, markers included."""
        if not texts:
            raise ValueError("encode_text got no text; give at least one")
        limit = self.config.llm.get("max_position_embeddings", 32768) - room
        for i in range(0, len(texts), 256):                     # far faster than one by one
            some = texts[i:i + 256]
            for text, ids in zip(some, self.tokenizer(some, add_special_tokens=False, split_special_tokens=True).input_ids):
                ids = [i for i in ids if i not in self.reserved]    # left by a vocabulary that cannot spell a marker
                if len(ids) + 2 > limit:
                    raise ValueError(f"text of {len(ids) + 2} tokens is longer than the context, which has room for {limit}: {text[:60]!r}")
                yield [self.start, *ids, self.end]

    def decode_text(self, tokens: Tensor, mask: Tensor) -> list[str]:
        """The words of tokens (N, L) under the mask (N, L), marker tokens dropped."""
        markers = {self.start, self.end}
        return [self.tokenizer.decode([i for i in row[m].tolist() if i not in markers]) for row, m in zip(tokens.cpu(), mask.cpu())]

    def _read(self, context: Context, streams: list, position: Tensor, mask: Tensor, causal: bool, keep=True) -> tuple[list, Context]:
        """Run the blocks over [understanding tokens | generation tokens] behind a context; both outputs normed by expert. Returns them
        and the longer context, or, where its new keys are not kept, the context as it was, each row of which may serve several.
        position: (rows of the context, L)."""
        (N, L), rows = mask.shape, len(context.valid)
        if N != rows and (keep or N % rows):
            raise ValueError(f"{N} rows behind {rows} contexts; give " + ("one each" if keep else "each context as many as the others"))
        valid, position = (z.repeat_interleave(N // rows, dim=0) for z in (context.valid, position))          # (N, S), (N, L)
        seen = valid[:, None, None, :].expand(N, 1, L, valid.shape[1])
        allowed = torch.cat([seen, own_attention(mask, causal)], dim=-1).repeat(1, 1, self.config.queries_per_key, 1)
        cos, sin = rotary(position, self.config.head_dim, self.config.rope_theta, next(x.dtype for x in streams if x is not None))
        keys, values = [], []
        for block, k, v in zip(self.blocks, context.keys, context.values):
            streams, k, v = block(streams, k, v, cos, sin, allowed)
            if keep:
                keys.append(k), values.append(v)
        out = [None if x is None else norm(x) for norm, x in zip(self.norms, streams)]
        return out, context if not keep else replace(context, keys=tuple(keys), values=tuple(values), valid=torch.cat([valid, mask], dim=1))

    def append_text(self, context: Context, tokens: Tensor, mask: Tensor | None = None, logits: bool = True, states: bool = False):
        """Read text causally with the understanding expert. tokens (N, L) ids including <|im_start|> and <|im_end|>; mask (N, L) bool,
        False = padding (right). Returns (logits (N, L, V), the longer context); logits=False: None, without the vocabulary product;
        states=True: in their place the last hidden states (N, L, D), after the final norm."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        position = context.position[:, None] + (mask.cumsum(1) - 1).clamp(min=0)                   # (N, L)
        (x, _), longer = self._read(context, [self.embed(tokens), None], position, mask, causal=True)
        return x if states else self.head(x) if logits else None, replace(longer, position=context.position + mask.sum(1))

    def image_states(self, pixels) -> tuple[Tensor, Tensor, Context]:
        """Read images as append_image does -> (last hidden states of patches (N, M, D), after the final norm; mask (N, M); context)."""
        x, mask = self.embed_pixels(pixels)
        (states, _), context = self._image_block(self.empty(len(x)), x, mask, UNDERSTANDING)
        return states[:, 2:], mask, context

    def _image_block(self, context: Context, patches: Tensor, mask: Tensor, expert: int, keep: bool = True) -> tuple[list, Context]:
        """One image block: both markers through the understanding expert, patches (N, M, D) through `expert`; one position."""
        N, M, _ = patches.shape
        ids = torch.tensor([self.image_start, self.image_end], device=patches.device).expand(N, 2)
        markers = self.embed(ids).to(patches.dtype)                                                # (N, 2, D)
        streams = [markers, patches] if expert == GENERATION else [torch.cat([markers, patches], dim=1), None]
        mask = torch.cat([mask.new_ones(N, 2), mask], dim=1)                                       # (N, 2+M)
        out, longer = self._read(context, streams, context.position[:, None].expand(-1, 2 + M), mask, causal=False, keep=keep)
        return out, replace(longer, position=context.position + 1) if keep else context

    def _embed_latents(self, x: Tensor, t: Tensor, size) -> tuple[Tensor, Tensor]:
        ids, mask = self.latent_grid(size, len(x))
        if x.shape[1] != ids.shape[1]:
            raise ValueError(f"latents have {x.shape[1]} tokens, but size {size} makes {ids.shape[1]}")
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))                # (N,)
        x = self.latent_in(x.to(self.latent_in.weight.dtype))                                      # (N, M, D)
        return x + self.time_embedder(t)[:, None] + self.latent_positions[ids], mask

    def append_image(self, context: Context, pixels=None, latents: Tensor | None = None, size=None) -> Context:
        """Read a clean image: `latents` (N, M, F) at t = 0 by the generation expert, then ViT patches of `pixels` by the understanding
        expert; either may be left out. size: (height, width) in pixels of the latents, for all, or one pair per sample.
        pixels: (N, 3, H, W), or a list of (3, H_i, W_i), in [-1, 1]."""
        if pixels is None and latents is None:
            raise ValueError("append_image got neither pixels nor latents; give at least one")
        if latents is not None and size is None:
            raise ValueError("append_image got latents without size; give their (height, width) in pixels")
        if latents is not None:
            M = self.latent_grid(size, len(latents))[0].shape[1]    # padding beyond the largest of these sizes is dropped
            x, mask = self._embed_latents(latents[:, :M], torch.zeros(()), size)
            _, context = self._image_block(context, x, mask, GENERATION)
        if pixels is not None:
            x, mask = self.embed_pixels(pixels)
            _, context = self._image_block(context, x, mask, UNDERSTANDING)
        return context

    def velocity(self, context: Context, x: Tensor, t, size) -> Tensor:
        """Velocity noise - data of noisy latents x (N, M, F) at flow time t (scalar or (N,)) -> (N, M, F) fp32. The context stays.
        size: (height, width) in pixels for all, or one pair per row of x. Each row of the context serves as many rows of x as fall to
        it, in order: all W noisy steps of N images are one call, x (N, W, M, F).flatten(0, 1), t (W,).repeat(N)."""
        tokens, mask = self._embed_latents(x, t, size)
        (_, out), _ = self._image_block(context, tokens, mask, GENERATION, keep=False)
        return self.latent_out(out).float()

    def embed_pixels(self, pixels) -> tuple[Tensor, Tensor]:
        """ViT tokens in the policy's width, positions added: (N, M, D) and their mask (N, M)."""
        patch, side = self.config.vit["patch_size"], self.config.bagel["vit_max_num_patch_per_side"]
        images, table = list(pixels) if isinstance(pixels, Tensor) else pixels, (self.config.vit["image_size"] // patch) ** 2
        ids, mask = grid_ids([tuple(i.shape[-2:]) for i in images], patch, side)
        if ids.max() >= table:
            raise ValueError(f"an image reaches patch {ids.max()} of a grid of {side} a side, the ViT has {table} positions")
        ids, mask = ids.to(self.device), mask.to(self.device)
        weight = self.connector["fc1"].weight
        patches = nn.utils.rnn.pad_sequence([patchify(i[None].to(weight), patch)[0] for i in images], batch_first=True)
        x = self.vit(patches, ids, mask)                                                           # (N, M, Dv)
        x = self.connector["fc2"](F.gelu(self.connector["fc1"](x), approximate="tanh"))            # (N, M, D)
        return x + self.vit_positions[ids], mask

    def latent_grid(self, size, N: int) -> tuple[Tensor, Tensor]:
        """Position ids and mask (N, M) of latent tokens for one (height, width), or for a list of N of them."""
        sizes = [tuple(size)] if isinstance(size[0], int) else [tuple(s) for s in size]
        ids, mask = grid_ids(sizes, self.config.stride, self.config.bagel["max_latent_size"])
        return ids.to(self.device).expand(N, -1), mask.to(self.device).expand(N, -1)

    @torch.no_grad()
    def encode(self, pixels) -> Tensor:
        """Pixels (N, 3, H, W), or a list of (3, H_i, W_i), in [-1, 1] -> clean latent tokens (N, M, F), padded right, fp32:
        scale * (posterior mean - shift)."""
        if isinstance(pixels, list):
            return nn.utils.rnn.pad_sequence([self.encode(p[None])[0] for p in pixels], batch_first=True)
        if pixels.shape[-2] % self.config.stride or pixels.shape[-1] % self.config.stride:
            raise ValueError(f"image of {pixels.shape[2]} x {pixels.shape[3]} pixels: each side must be a multiple of {self.config.stride}")
        mean = self.autoencoder.encode(pixels.to(self.device, self.autoencoder.dtype)).latent_dist.mean
        z = self.config.ae["scale_factor"] * (mean.float() - self.config.ae["shift_factor"])       # (N, z, h, w)
        if not z.isfinite().all():
            raise FloatingPointError("the autoencoder made latents that are not finite; the image, its weights or precision are at fault")
        return patchify(z, self.config.bagel["latent_patch_size"])

    @torch.no_grad()
    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Latent tokens (N, M, F) of one size (height, width) -> pixels (N, 3, H, W), nominally in [-1, 1], not clamped."""
        z = unpatchify(latents, self.config.bagel["latent_patch_size"], size[0] // self.config.stride)
        z = z / self.config.ae["scale_factor"] + self.config.ae["shift_factor"]
        pixels = self.autoencoder.decode(z.to(self.autoencoder.dtype)).sample.float()
        if not pixels.isfinite().all():
            raise FloatingPointError("the autoencoder drew pixels that are not finite; the latents, its weights or precision are at fault")
        return pixels

    @torch.no_grad()
    def sample_text(self, context: Context, uniforms: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Write text after <|im_start|> until <|im_end|> or for L tokens -> tokens, mask (through the end token) and log-probs under the
        distribution that was sampled (greedy: temperature 1), each (N, L' <= L). FloatingPointError for logits that are not finite.
        uniforms (N, L) in [0, 1): one number per token, so that a sample does not depend on its batch; a token is the inverse of the
        cumulative distribution at it. temperature 0 is greedy."""
        if not (L := uniforms.shape[1]):
            raise ValueError("sample_text got no column of uniforms; give one per token that may be written")
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}, must be 0 (greedy) or above")
        room = lambda past: F.pad(past, (0, 0, 0, L))           # a copy that nobody else holds: every token is written into it, none copied
        context = replace(context, keys=tuple(map(room, context.keys)), values=tuple(map(room, context.values)))
        token, alive = (torch.full((len(uniforms), 1), x, device=self.device) for x in (self.start, True))
        written = []
        for i in range(L):
            logits, context = self.append_text(context, token, alive)
            logp = torch.log_softmax(logits[:, -1].float() / (temperature or 1.0), dim=-1)         # (N, V)
            if temperature:
                cumulative = logp.double().exp().cumsum(-1)     # fp32 would end off 1 by 1e-5 at BAGEL's vocabulary
                below = cumulative <= uniforms[:, i, None] * cumulative[:, -1:]                    # (N, V)
                token = below.sum(-1, keepdim=True).clamp(max=logp.shape[1] - 1)                   # (N, 1)
            else:
                token = logp.argmax(-1, keepdim=True)
            written.append((torch.where(alive, token, self.end), alive, torch.where(alive, logp.gather(1, token), 0.0)))
            alive = alive & (token != self.end)
            going = alive.any().int()
            if self.sharded:                                    # ranks that gather parameters from one another stop together
                dist.all_reduce(going, dist.ReduceOp.MAX)
            if not going:
                break
        tokens, mask, logp = (torch.cat(z, dim=1) for z in zip(*written))                          # (N, L')
        if len(bad := (~logp.isfinite()).any(0).nonzero()):     # NaN among the logits makes every log-prob NaN
            raise FloatingPointError(f"text logits are not finite at token {bad[0, 0]}; the policy's weights or its precision are at fault")
        return tokens, mask, logp

    def trainable_by_expert(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters by expert: 'understanding', 'generation' (latent and time layers included)."""
        groups = {"understanding": [], "generation": []}
        for name, p in self.named_parameters():
            if p.requires_grad:
                groups["generation" if re.search(r"experts\.1\.|norms\.1\.|^latent_|^time_embedder", name) else "understanding"].append(p)
        return groups


# ---- guidance ----

@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance as BAGEL applies it; text_scale 1 is no guidance at all (image guidance included)."""

    text_scale: float = 4.0
    image_scale: float = 1.0
    renorm: str = "global"                                      # global | channel | text_channel
    renorm_min: float = 0.0
    interval: tuple[float, float] = (0.4, 1.0)                  # active while low < t <= high, t after the shift


def guided_velocity(policy: Policy, x: Tensor, t, size, full: Context, no_text: Context, no_image: Context, guidance: Guidance) -> Tensor:
    """The velocity of `full`, pushed away from what the contexts without text and without image say -> (N, M, F). t is one time for
    all or one per row; each row is guided if its own is in the interval.
    Differs: the official 'global' renorm takes one norm over the whole tensor, right for one image per call; here it is per sample."""
    if guidance.renorm not in ("global", "channel", "text_channel"):
        raise ValueError(f"renorm {guidance.renorm!r} is unknown; choose global, channel or text_channel")
    v = policy.velocity(full, x, t, size)
    at = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))  # in fp32, where 0.4 of a time grid is not above 0.4
    active = (guidance.interval[0] < at) & (at <= guidance.interval[1])                            # (N,)
    if guidance.text_scale <= 1 or not active.any():
        return v
    mask = policy.latent_grid(size, len(x))[1][..., None]                                          # (N, M, 1)
    dims = (1, 2) if guidance.renorm == "global" else (2,)

    def renormed(w: Tensor) -> Tensor:
        # Never longer than the unguided velocity, so that large scales do not over-expose.
        norm = lambda z: (z * mask).square().sum(dims, keepdim=True).sqrt()
        return w * (norm(v) / (norm(w) + 1e-8)).clamp(guidance.renorm_min, 1.0)

    without = policy.velocity(no_text, x, t, size)
    guided = without + guidance.text_scale * (v - without)
    if guidance.renorm == "text_channel":
        guided = renormed(guided)
    if guidance.image_scale > 1:
        without = policy.velocity(no_image, x, t, size)
        guided = without + guidance.image_scale * (guided - without)
    return torch.where(active[:, None, None], guided if guidance.renorm == "text_channel" else renormed(guided), v)


# ---- low-rank adapters ----

class LoRA(nn.Module):
    """base(x) + alpha/rank * x A^T B^T [arXiv:2106.09685]; the base is frozen, A and B are fp32 masters, B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.rank, self.alpha, self.enabled = base.requires_grad_(False), rank, alpha, True
        like = dict(dtype=torch.float32, device=base.weight.device)
        self.A = nn.Parameter(torch.randn(rank, base.in_features, **like) / rank)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.A.dtype)
        return y + (self.alpha / self.rank * (x @ self.A.T @ self.B.T)).to(y.dtype)


def add_lora(policy: Policy, rank: int, alpha: float, experts: tuple[int, ...] = (UNDERSTANDING, GENERATION)) -> Policy:
    """Freeze the policy and put adapters on q, k, v, o and the MLP of the named experts, in place; returns the policy."""
    policy.requires_grad_(False)
    for block in policy.blocks:
        for e in experts:
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                setattr(block.experts[e], name, LoRA(getattr(block.experts[e], name), rank, alpha))
    return policy


def adapters(policy: Policy) -> dict[str, LoRA]:
    """Name -> adapter."""
    return {n: m for n, m in policy.named_modules() if isinstance(m, LoRA)}


@contextlib.contextmanager
def adapters_off(policy: Policy):
    """Inside this block the policy is its own frozen reference."""
    held = adapters(policy).values()
    for m in held:
        m.enabled = False
    try:
        yield policy
    finally:
        for m in held:
            m.enabled = True


def build_autoencoder(ae: dict):
    """diffusers' AutoencoderKL at the sizes of ae_config.json (`norm_groups`, 32 in the release, may be given)."""
    declare_torchvision_ops()
    from diffusers import AutoencoderKL
    widths = tuple(ae["ch"] * m for m in ae["ch_mult"])
    return AutoencoderKL(
        in_channels=ae["in_channels"], out_channels=ae["out_ch"], latent_channels=ae["z_channels"], block_out_channels=widths,
        layers_per_block=ae["num_res_blocks"], norm_num_groups=ae.get("norm_groups", 32), use_quant_conv=False, use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths))


@functools.cache
def declare_torchvision_ops():
    """Let transformers and diffusers import where torchvision was built for another torch (a CUDA build beside a CPU torch).
    Such a torchvision fails at import because its operators are not there; declaring their schemas is enough, since none is called.
    The cache keeps the returned library alive. Does nothing where torchvision imports, or is not installed."""
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
