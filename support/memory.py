"""What a run needs on a GPU, before a weight is read."""

from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor
from policy import Policy
from support.pictures import fit_size
from support.run import Ranks


def memory(policy: Policy, cfg, world: int, tasks: dict, referees: float = 0) -> dict[str, float]:
    """What a run needs on each GPU, in GB (1e9 bytes), computed from counts of numbers; `policy` may be on the meta device.

    Kept all the time: weights (fp32 where trained, else as computed), gradients, AdamW's moments and the average (fp32), a frozen
    reference. In turn: a rollout (the text's keys and values twice, while they grow; one block's activations of an image step) and a
    replay of one micro-batch (every block's input where activations are checkpointed, else about twelve of its width; one block's
    activations, of all noisy steps at once; the logits and three fp32 copies); the mask of who sees whom; either holds two gathered
    blocks of a sharded policy. Images that are given or read back stand among the text's tokens, a question's at the ViT's full size.
    Referees count where their weights lie here already, and are on the policy's device. Not counted: activations of referees and of the
    autoencoder, what the allocator loses, and the whole weights that a sharded rollout keeps only where they fit.
    """
    c, byte, used = policy.config.llm, 2 if cfg.bf16 else 4, list(tasks.values())
    D, I, layers, V = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], c["vocab_size"]
    cut = world if cfg.shard and not policy.sharded else 1      # of a policy that is not cut yet, nearly everything will be
    held_here = lambda p: p.to_local().numel() if isinstance(p, DTensor) else p.numel() / cut
    held = sum(held_here(p) for p in policy.parameters())
    trained = sum(held_here(p) for p in policy.parameters() if p.requires_grad)
    two = 2 * byte * sum(p.numel() for p in policy.blocks[0].parameters()) if cfg.shard else 0
    drawn = [cfg.rows[name] * cfg.group_size // world for name in tasks]
    most = max(min(n, max(cfg.rollout_batch, cfg.group_size) if cfg.rollout_batch else n) for n in drawn)
    micro = max(min(n, cfg.micro or n) for n in drawn)
    M = (cfg.resolution // policy.config.stride) ** 2 + 2 if any(task.draws for task in used) else 0
    written = max(getattr(cfg, task.writes) if task.writes else 0 for task in used)
    system = 160 if cfg.system_prompt and any(task.draws and task.writes for task in used) else 0
    L = max(tokens_before(policy, cfg, task, M) for task in used) + system
    cache = 2 * layers * c["num_key_value_heads"] * policy.config.head_dim * byte                # bytes of a token's keys and values
    block = ((5 if cfg.lora else 3) * I + 8 * D) * byte                                          # bytes of a token inside a block
    mask = 3 * policy.config.queries_per_key * (L + M)                                           # bytes of a query: whom it sees
    rounds = 1 if cfg.segments else max(task.rounds for task in used)       # images and texts that one backward holds
    noisy = cfg.window * M * rounds                             # tokens of a sample's noisy steps, which a replay reads in one call
    inputs = layers * D * 4 * (1 if cfg.checkpointing else 12)
    words = rounds * written * V * (byte + 12)                  # bytes of a sample's logits
    out = {"weights": trained * 4 + (held - trained) * byte, "gradients": trained * 4, "AdamW": trained * 8, "average": trained * 4,
           "reference": held * byte if cfg.needs_reference and not cfg.lora else 0,
           "referees": referees,
           "rollout": most * (2 * L * cache + max(M, 1) * block + max(M, L) * mask) + two,
           "replay": micro * (3 * L * cache + (noisy + L) * inputs + max(noisy, L) * (block + mask) + words) + two}
    return {k: v / 1e9 for k, v in out.items()}


def tokens_before(policy: Policy, cfg, task, M: int) -> int:
    """Most tokens that a task's trajectory reads before its last segment, with 64 for what it is asked; M of a drawn image."""
    stride, (longest, shortest, step) = policy.config.vit["patch_size"], policy.config.vit_resize
    w, h = fit_size(cfg.resolution, cfg.resolution, longest, shortest, step)
    image = M + (w // stride) * (h // stride) + 2               # read back, or changed: latents and ViT patches
    given = image if task.sees else (longest // stride) ** 2 + 2 if "sources" in task.gives else 0
    return task.rounds * (64 + (getattr(cfg, task.writes) if task.writes else 0)) + (task.rounds - 1) * image + given


def peak(need: dict[str, float]) -> float:
    """GB at the worst moment: rollout and replay do not meet."""
    return sum(v for k, v in need.items() if k not in ("rollout", "replay")) + max(need["rollout"], need["replay"])


def check_memory(policy: Policy, cfg, ranks: Ranks, tasks: dict, referees: float) -> None:
    """ValueError before anything is read where the GPU cannot hold the run, with settings that it would hold."""
    has, need = torch.cuda.get_device_properties(ranks.device).total_memory / 1e9, memory(policy, cfg, ranks.world, tasks, referees)
    if peak(need) <= has:
        return
    changes = [dict(micro=1), dict(rollout_batch=cfg.group_size), dict(micro=1, rollout_batch=cfg.group_size),
               dict(think_tokens=64, micro=1)]
    fits = [c for c in changes if peak(memory(policy, replace(cfg, **c), ranks.world, tasks, referees)) <= has]
    otherwise = "--lora 64 (if all weights are trained), --shard on more GPUs, or a lower --resolution"
    hint = " ".join(f"--{k} {v}" for k, v in fits[0].items()) if fits else otherwise
    told = ", ".join(f"{k} {v:.1f}" for k, v in need.items() if v >= 0.05)
    raise ValueError(f"the run needs about {peak(need):.0f} GB on each GPU, which has {has:.0f}: {told}; try {hint}")


def room_to_gather(device: torch.device) -> float | None:
    """Bytes that a rollout may spend on keeping a sharded policy whole: half of what is free on the GPU, or held by PyTorch without
    use; None, any number, on a CPU."""
    if device.type != "cuda":
        return None
    return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / 2
