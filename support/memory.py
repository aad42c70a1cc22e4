"""What a run needs on a GPU, computed before a weight is read."""

import torch

from policy import Policy
from support.pictures import fit_size
from support.run import Ranks


def memory(policy: Policy, cfg, world: int, tasks: list, referees: float = 0) -> dict[str, float]:
    """What a run needs on each GPU, in GB (1e9 bytes), by counting numbers.

    The policy may be on the meta device. Kept all the time are weights (fp32 if trained),
    gradients, AdamW's moments, the average and the follower, a frozen reference, and the referees,
    whose bytes are given. A rollout and the replay of one micro-batch need room in turn. A rollout
    holds the text's keys and values twice while they grow, and one block's activations of an image
    step. A replay holds every block's input (about twelve times as much without checkpointing), one
    block's activations of all noisy steps or image tokens at once, and the logits with three copies
    in fp32. Both hold two gathered blocks of a sharded policy. Left out are activations of referees
    and of the autoencoder, what the allocator loses, and the whole weights that a sharded rollout
    keeps only if they fit.
    """
    config = policy.config
    llm = config.llm
    width = llm["hidden_size"]
    layers = llm["num_hidden_layers"]
    byte = 2 if cfg.bf16 else 4
    cut = world if cfg.shard else 1             # nearly everything is cut over the ranks
    weights = sum(p.numel() for p in policy.parameters()) / cut         # numbers on one rank
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad) / cut
    gathered = 0
    if cfg.shard:
        gathered = 2 * byte * sum(p.numel() for p in policy.blocks[0].parameters())
    averages = 2 if cfg.old_decay else 1        # the follower is another one
    reference = 0
    if cfg.needs_reference and not cfg.lora:
        reference = weights * byte

    # Samples at once.
    samples = max(cfg.rows[task.name] for task in tasks) * cfg.group_size // world
    micro = min(samples, cfg.micro or samples)
    if cfg.rollout_batch:
        samples = min(samples, max(cfg.rollout_batch, cfg.group_size))

    # Tokens of a sample.
    image = 0
    if any(task.draws for task in tasks):
        image = (cfg.resolution // config.stride) ** 2 + 2
    context = max(tokens_before(policy, cfg, task, image) for task in tasks)
    if cfg.image_loss == "token":               # what is drawn is read too
        context += image
    rounds = max(task.rounds for task in tasks)                 # texts and images of one backward
    noisy = rounds * max(cfg.window, 1) * image         # of all noisy steps, which are one call
    written = rounds * max(task.longest_text(cfg) for task in tasks)

    # Bytes of a token.
    key = llm["num_key_value_heads"] * config.head_dim * byte
    cache = 2 * layers * key                    # keys and values
    inputs = layers * width * 4 * (1 if cfg.checkpointing else 12)
    block = ((5 if cfg.lora else 3) * llm["intermediate_size"] + 8 * width) * byte
    mask = 3 * config.queries_per_key * context                 # which tokens a token sees
    logits = llm["vocab_size"] * (byte + 12)

    rollout = 2 * context * cache + max(image, 1) * block
    replay = 3 * context * cache + (noisy + context) * inputs
    replay += max(noisy, context) * block + written * (mask + logits)
    if cfg.image_loss == "token":               # each has logits, and with guidance two contexts
        replay += noisy * config.release.vq_config.num_embeddings * (byte + 12)
        branches = 2 if cfg.guidance > 1 else 1
        rollout *= branches
        replay *= branches

    need = dict(
        weights=trained * 4 + (weights - trained) * byte, gradients=trained * 4, AdamW=trained * 8,
        average=trained * 4 * averages, reference=reference, referees=referees,
        rollout=samples * rollout + gathered, replay=micro * replay + gathered)
    return {name: size / 1e9 for name, size in need.items()}


def tokens_before(policy: Policy, cfg, task, drawn: int) -> int:
    """The most tokens that a trajectory reads before its last segment.

    drawn: tokens of a drawn image. A prompt or a question counts 64. An image that is given or read
    back stands among the text's tokens, a question's image at the ViT's full size.
    """
    config = policy.config
    patch = config.vit["patch_size"]
    longest, shortest, stride = config.vit_resize
    side, _ = fit_size(cfg.resolution, cfg.resolution, longest, shortest, stride)
    read_back = drawn + (side // patch) ** 2 + 2                # latents and ViT patches
    given = 0
    if task.redraws:
        given = read_back
    elif "sources" in task.gives:
        given = (longest // patch) ** 2 + 2
    system = 0
    if config.scale == "bagel" and task.draws and task.writes:
        system = 160                            # BAGEL's think prompt
    texts = task.rounds * (64 + task.longest_text(cfg))         # prompts of up to 64 tokens
    return system + texts + (task.rounds - 1) * read_back + given


def peak(need: dict[str, float]) -> float:
    """GB at the worst moment: rollout and replay never run at the same time."""
    return sum(need.values()) - min(need["rollout"], need["replay"])


def check_memory(policy: Policy, cfg, ranks: Ranks, tasks: list, referees: float) -> None:
    """ValueError, before anything is read, if the GPU cannot hold the run."""
    has = torch.cuda.get_device_properties(ranks.device).total_memory / 1e9
    need = memory(policy, cfg, ranks.world, tasks, referees)
    if peak(need) > has:
        sizes = ", ".join(f"{name} {size:.1f}" for name, size in need.items() if size >= 0.05)
        raise ValueError(
            f"the run needs about {peak(need):.0f} GB on each GPU, which has {has:.0f}: {sizes}; "
            f"try --micro 1, --rollout_batch {cfg.group_size}, --lora 64 (if all weights are "
            "trained), --shard on more GPUs, or a lower --resolution")


def room_to_gather(device: torch.device) -> float | None:
    """Bytes that a rollout may spend on keeping a sharded policy whole: half of the free ones.

    What PyTorch reserved without using it is free too. None, which is any number, on a CPU.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (free + unused) / 2
