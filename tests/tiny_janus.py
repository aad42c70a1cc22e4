"""A tiny random Janus with the toy's tokenizer and pictures, as a policy folder."""

from pathlib import Path

import torch

from janus import Janus, build_model
from support.checkpoint import save_policy
from toy.pretrain_janus import build_config, build_tokenizer


def write_janus(folder: Path) -> Path:
    """64 codes, 2 layers, 32 wide, and no weight at its usual start."""
    tokenizer, generator = build_tokenizer(), torch.Generator().manual_seed(1)
    config = build_config(tokenizer)
    config.text_config.update(
        dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8))
    config.vision_config.update(dict(hidden_size=32, num_hidden_layers=1, projection_dim=32))
    config.vq_config.update(
        dict(num_embeddings=64, projection_dim=32, image_token_embed_dim=32))
    policy = Janus(build_model(config), tokenizer)
    for p in policy.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = noise / p[0].numel() ** 0.5 if p.ndim > 1 else p.data + 0.2 * noise
    save_policy(policy, folder)
    return folder
