"""BAGEL the plain way, from a folder's released keys: one sample, one sequence, no cache, no batch, float64.

The oracle of policy.py. A sequence is a list of segments: ("text", ids), ("vit", pixels (3, H, W)),
("latents", x (M, F), t, (H, W)).
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


def cells(rows, columns, side):
    """The ids of a grid's cells in a table of `side` columns, row by row."""
    return torch.tensor([i * side + j for i in range(rows) for j in range(columns)])


class Plain:
    """The tensors of a policy folder, float64, and the ids of start, end, image start and image end."""

    def __init__(self, folder, markers):
        configs = [Path(folder) / f"{name}_config.json" for name in ("llm", "vit", "bagel", "ae")]
        self.llm, self.vit, self.bagel, self.ae = (json.loads(config.read_text()) for config in configs)
        self.w = {key: value.double() for key, value in load_file(Path(folder) / "ema.safetensors").items()}
        self.markers = markers

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def rms_norm(self, x, name):
        scale = torch.sqrt((x * x).mean(-1, keepdim=True) + self.llm["rms_norm_eps"])
        return x / scale * self.w[f"{name}.weight"]

    def layer_norm(self, x, name):
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.vit["layer_norm_eps"])

    def mlp(self, x, first, second):
        return self.linear(F.gelu(self.linear(x, first), approximate="tanh"), second)

    def vit_tokens(self, pixels):
        """(3, H, W) in [-1, 1] -> (M, D)."""
        p, heads, path = self.vit["patch_size"], self.vit["num_attention_heads"], "vit_model.vision_model."
        rows, columns = pixels.shape[1] // p, pixels.shape[2] // p
        ids = cells(rows, columns, self.bagel["vit_max_num_patch_per_side"])
        patches = []
        for i in range(rows):
            for j in range(columns):
                patch = pixels[:, i * p:(i + 1) * p, j * p:(j + 1) * p]
                patches.append(patch.permute(1, 2, 0).flatten())
        x = self.linear(torch.stack(patches).double(), path + "embeddings.patch_embedding")
        x = x + self.w[path + "embeddings.position_embedding.weight"][ids]
        for n in range(self.vit["num_hidden_layers"] - 1):
            layer = f"{path}encoder.layers.{n}."
            y = self.layer_norm(x, layer + "layer_norm1")
            projected = [self.linear(y, f"{layer}self_attn.{m}_proj") for m in "qkv"]
            q, k, v = (z.unflatten(1, (heads, -1)).transpose(0, 1) for z in projected)        # (H, M, d)
            y = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1) @ v
            x = x + self.linear(y.transpose(0, 1).flatten(1), layer + "self_attn.out_proj")
            y = self.layer_norm(x, layer + "layer_norm2")
            x = x + self.mlp(y, layer + "mlp.fc1", layer + "mlp.fc2")
        x = self.mlp(self.layer_norm(x, path + "post_layernorm"), "connector.fc1", "connector.fc2")
        return x + self.w["vit_pos_embed.pos_embed"][ids]

    def latent_tokens(self, x, t, size):
        """(M, F) at flow time t -> (M, D)."""
        stride = self.ae["downsample"] * self.bagel["latent_patch_size"]
        ids = cells(size[0] // stride, size[1] // stride, self.bagel["max_latent_size"])
        angles = float(t) * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
        time = self.linear(torch.cat([angles.cos(), angles.sin()]), "time_embedder.mlp.0")
        time = self.linear(F.silu(time), "time_embedder.mlp.2")
        return self.linear(x.double(), "vae2llm") + time + self.w["latent_pos_embed.pos_embed"][ids]

    def embed(self, segments):
        """All tokens of a sequence (n, D), and the expert, rotary position, segment and kind of each."""
        table, (_, _, first, last) = self.w["language_model.model.embed_tokens.weight"], self.markers
        tokens, rows, at = [], [], 0
        for number, (kind, *what) in enumerate(segments):
            if kind == "text":
                x = table[torch.tensor(what[0])]
                rows += [(False, at + i, number, True) for i in range(len(x))]
                at += len(x)
            else:                                               # an image and its markers share one position
                x = self.vit_tokens(*what) if kind == "vit" else self.latent_tokens(*what)
                marker = (False, at, number, False)
                rows += [marker, *[(kind == "latents", at, number, False)] * len(x), marker]
                x = torch.cat([table[first][None], x, table[last][None]])
                at += 1
            tokens.append(x)
        return torch.cat(tokens), *(torch.tensor(column) for column in zip(*rows))

    def run(self, segments):
        """Final states of the last segment, its markers dropped: (n, D)."""
        x, generates, position, segment, text = self.embed(segments)
        order = torch.arange(len(x))
        same, earlier = segment[None] == segment[:, None], segment[None] < segment[:, None]
        sees = earlier | same & (~text[:, None] | (order[None] <= order[:, None]))
        H, KV = self.llm["num_attention_heads"], self.llm["num_key_value_heads"]
        d = self.llm["hidden_size"] // H
        rates = self.llm["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        angles = (position[:, None] * rates).repeat(1, 2)[:, None]                            # (n, 1, d)

        def rotate(z):                                          # (n, heads, d)
            turned = torch.cat([-z[..., d // 2:], z[..., :d // 2]], -1)
            return z * angles.cos() + turned * angles.sin()

        def by_expert(function):
            """function(suffix of its keys) for the expert of each token, entries flattened."""
            return torch.where(generates[:, None], function("_moe_gen").flatten(1), function("").flatten(1))

        for n in range(self.llm["num_hidden_layers"]):
            layer = f"language_model.model.layers.{n}."

            def project(m):
                flat = by_expert(lambda e: self.linear(y, f"{layer}self_attn.{m}_proj{e}"))
                return flat.unflatten(1, (-1, d))

            def norm_heads(z, m):
                z = by_expert(lambda e: self.rms_norm(z, f"{layer}self_attn.{m}_norm{e}"))
                return rotate(z.unflatten(1, (-1, d)))

            y = by_expert(lambda e: self.rms_norm(x, f"{layer}input_layernorm{e}"))
            q, k, v = norm_heads(project("q"), "q"), norm_heads(project("k"), "k"), project("v")
            k, v = (z.repeat_interleave(H // KV, dim=1) for z in (k, v))                      # (n, H, d)
            score = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(d)
            score = torch.softmax(score.masked_fill(~sees, -torch.inf), -1)
            y = torch.einsum("hij,jhd->ihd", score, v).flatten(1)
            x = x + by_expert(lambda e: self.linear(y, f"{layer}self_attn.o_proj{e}"))
            y = by_expert(lambda e: self.rms_norm(x, f"{layer}post_attention_layernorm{e}"))
            gate = by_expert(lambda e: self.linear(y, f"{layer}mlp{e}.gate_proj"))
            y = F.silu(gate) * by_expert(lambda e: self.linear(y, f"{layer}mlp{e}.up_proj"))
            x = x + by_expert(lambda e: self.linear(y, f"{layer}mlp{e}.down_proj"))
        x = by_expert(lambda e: self.rms_norm(x, f"language_model.model.norm{e}"))
        x = x[segment == len(segments) - 1]
        return x if segments[-1][0] == "text" else x[1:-1]

    def logits(self, segments):
        """Of the last text segment, (L, V)."""
        return self.linear(self.run(segments), "language_model.lm_head")

    def velocity(self, segments, x, t, size):
        """Of noisy latents x (M, F) after `segments`, (M, F)."""
        return self.linear(self.run([*segments, ("latents", x, t, size)]), "llm2vae")
