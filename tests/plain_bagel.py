"""BAGEL the plain way, from a folder's released keys: one sample, one full sequence, no cache, no batch, float64. The oracle of policy.py.

A sequence is a list of segments: ("text", ids), ("vit", pixels (3, H, W)), ("latents", x (M, F), t, (H, W)).
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


class Plain:
    """The tensors of a policy folder, float64, and the four marker ids (start, end, image start, image end)."""

    def __init__(self, folder, markers):
        read = lambda name: json.loads((Path(folder) / f"{name}_config.json").read_text())
        self.llm, self.vit, self.bagel, self.ae = (read(name) for name in ("llm", "vit", "bagel", "ae"))
        self.w = {k: v.double() for k, v in load_file(Path(folder) / "ema.safetensors").items()}
        self.markers = markers

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def rms_norm(self, x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.llm["rms_norm_eps"]) * self.w[f"{name}.weight"]

    def layer_norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], self.vit["layer_norm_eps"])

    def vit_tokens(self, pixels):
        """(3, H, W) in [-1, 1] -> (M, D)."""
        patch, heads, path = self.vit["patch_size"], self.vit["num_attention_heads"], "vit_model.vision_model."
        cells = [(i, j) for i in range(pixels.shape[1] // patch) for j in range(pixels.shape[2] // patch)]
        ids = torch.tensor([i * self.bagel["vit_max_num_patch_per_side"] + j for i, j in cells])
        patches = torch.stack([pixels[:, i * patch:(i + 1) * patch, j * patch:(j + 1) * patch].permute(1, 2, 0).flatten() for i, j in cells])
        x = self.linear(patches.double(), path + "embeddings.patch_embedding") + self.w[path + "embeddings.position_embedding.weight"][ids]
        for n in range(self.vit["num_hidden_layers"] - 1):
            layer = f"{path}encoder.layers.{n}."
            y = self.layer_norm(x, layer + "layer_norm1")
            q, k, v = (self.linear(y, f"{layer}self_attn.{m}_proj").unflatten(1, (heads, -1)).transpose(0, 1) for m in "qkv")
            y = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1) @ v
            x = x + self.linear(y.transpose(0, 1).flatten(1), layer + "self_attn.out_proj")
            y = F.gelu(self.linear(self.layer_norm(x, layer + "layer_norm2"), layer + "mlp.fc1"), approximate="tanh")
            x = x + self.linear(y, layer + "mlp.fc2")
        x = self.linear(self.layer_norm(x, path + "post_layernorm"), "connector.fc1")
        return self.linear(F.gelu(x, approximate="tanh"), "connector.fc2") + self.w["vit_pos_embed.pos_embed"][ids]

    def latent_tokens(self, x, t, size):
        """(M, F) at flow time t -> (M, D)."""
        stride = self.ae["downsample"] * self.bagel["latent_patch_size"]
        ids = torch.tensor([i * self.bagel["max_latent_size"] + j for i in range(size[0] // stride) for j in range(size[1] // stride)])
        angles = float(t) * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        time = self.linear(F.silu(self.linear(torch.cat([angles.cos(), angles.sin()]), "time_embedder.mlp.0")), "time_embedder.mlp.2")
        return self.linear(x.double(), "vae2llm") + time + self.w["latent_pos_embed.pos_embed"][ids]

    def run(self, segments):
        """Final states of the last segment, its markers dropped: (n, D)."""
        embed, (_, _, first, last) = self.w["language_model.model.embed_tokens.weight"], self.markers
        tokens, generation, position, segment, at = [], [], [], [], 0
        for s, (kind, *what) in enumerate(segments):
            if kind == "text":
                x, n = embed[torch.tensor(what[0])], len(what[0])
                position += range(at, at + n)
                at += n
                generation += [False] * n
            else:                                               # an image and its markers share one position
                x = self.vit_tokens(*what) if kind == "vit" else self.latent_tokens(*what)
                generation += [False, *[kind == "latents"] * len(x), False]
                x = torch.cat([embed[first][None], x, embed[last][None]])
                position += [at] * len(x)
                at += 1
            tokens.append(x)
            segment += [s] * len(x)
        x, gen, position, segment = torch.cat(tokens), torch.tensor(generation)[:, None], torch.tensor(position), torch.tensor(segment)
        text = torch.tensor([segments[s][0] == "text" for s in segment])[:, None]
        order = torch.arange(len(x))
        sees = (segment[None] < segment[:, None]) | (segment[None] == segment[:, None]) & (~text | (order[None] <= order[:, None]))
        H, KV = self.llm["num_attention_heads"], self.llm["num_key_value_heads"]
        d = self.llm["hidden_size"] // H
        angles = position[:, None] * self.llm["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        cos, sin = (torch.cat([z, z], -1)[:, None] for z in (angles.cos(), angles.sin()))
        rotate = lambda z: z * cos + torch.cat([-z[..., d // 2:], z[..., :d // 2]], -1) * sin
        heads = lambda z: z.unflatten(1, (-1, d))
        by_expert = lambda f: torch.where(gen, f("_moe_gen").flatten(1), f("").flatten(1))
        for n in range(self.llm["num_hidden_layers"]):
            layer = f"language_model.model.layers.{n}."
            at_, mlp = layer + "self_attn.", layer + "mlp"
            y = by_expert(lambda e: self.rms_norm(x, f"{layer}input_layernorm{e}"))
            q, k = (rotate(heads(by_expert(lambda e: self.rms_norm(heads(self.linear(y, f"{at_}{m}_proj{e}")), f"{at_}{m}_norm{e}"))))
                    for m in "qk")
            v = heads(by_expert(lambda e: self.linear(y, f"{at_}v_proj{e}")))
            k, v = (torch.stack([z[:, h // (H // KV)] for h in range(H)], 1) for z in (k, v))                  # (n, H, d)
            score = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(d)
            y = torch.einsum("hij,jhd->ihd", torch.softmax(score.masked_fill(~sees, -torch.inf), -1), v).flatten(1)
            x = x + by_expert(lambda e: self.linear(y, f"{at_}o_proj{e}"))
            y = by_expert(lambda e: self.rms_norm(x, f"{layer}post_attention_layernorm{e}"))
            x = x + by_expert(lambda e: self.linear(F.silu(self.linear(y, f"{mlp}{e}.gate_proj")) * self.linear(y, f"{mlp}{e}.up_proj"),
                                                    f"{mlp}{e}.down_proj"))
        x = by_expert(lambda e: self.rms_norm(x, f"language_model.model.norm{e}"))[segment == len(segments) - 1]
        return x if segments[-1][0] == "text" else x[1:-1]

    def logits(self, segments):
        """Of the last text segment, (L, V)."""
        return self.linear(self.run(segments), "language_model.lm_head")

    def velocity(self, segments, x, t, size):
        """Of noisy latents x (M, F) after `segments`, (M, F)."""
        return self.linear(self.run([*segments, ("latents", x, t, size)]), "llm2vae")

    def guided(self, full, no_text, no_image, x, t, size, g):
        """`velocity` under guidance g, in the order of the official loop."""
        v = self.velocity(full, x, t, size)
        if g.text_scale <= 1 or not g.interval[0] < torch.tensor(t) <= g.interval[1]:
            return v
        shorten = lambda z, **dim: z * (v.norm(**dim) / (z.norm(**dim) + 1e-8)).clamp(g.renorm_min, 1.0)
        channel = dict(dim=-1, keepdim=True)
        without = self.velocity(no_text, x, t, size)
        z = without + g.text_scale * (v - without)
        z = shorten(z, **channel) if g.renorm == "text_channel" else z
        if g.image_scale > 1:
            without = self.velocity(no_image, x, t, size)
            z = without + g.image_scale * (z - without)
        return shorten(z) if g.renorm == "global" else shorten(z, **channel) if g.renorm == "channel" else z
