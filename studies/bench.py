"""The memory that training at BAGEL's size needs, computed.

    python -m studies.bench                     # GB on each GPU, in markdown
"""

import torch

from policy import Policy, PolicyConfig
from recipes import parse
from referees.build import referee_bytes
from sample import TOY
from studies.tables import markdown_table
from support.checkpoint import freeze, load_policy
from support.memory import memory, peak
from support.terminal import Arguments, one_line
from tasks import in_use


def release_on_meta(tokenizer) -> Policy:
    """BAGEL-7B-MoT's sizes without memory, with the toy's tokenizer."""
    llm = dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, rope_theta=1e6, rms_norm_eps=1e-6)
    vit = dict(
        hidden_size=1152, intermediate_size=4304, num_attention_heads=16, patch_size=14,
        image_size=980, num_hidden_layers=27, num_channels=3, layer_norm_eps=1e-6)
    with torch.device("meta"):
        return Policy(PolicyConfig(llm, vit), tokenizer)


def memory_table() -> str:
    """Markdown: GB on each GPU by support.memory, for UniGRPO by what is trained, then for adapters
    under the other recipes that draw; 4 prompts on each GPU."""
    tokenizer, rows = load_policy(TOY).tokenizer, []

    def add(title: str, world: int, flags: str) -> None:
        cfg = parse(["--scale", "bagel", "--prompts", "-", *flags.split()])
        policy = release_on_meta(tokenizer)
        freeze(policy, cfg.experts, cfg.lora, cfg.checkpointing)
        need = memory(policy, cfg, world, in_use(cfg), referee_bytes(cfg))
        kept = sum(need.values()) - need["rollout"] - need["replay"]
        parts = [kept, need["rollout"], need["replay"], peak(need)]
        rows.append([title, f"{cfg.resolution}", f"{world}", *(f"{gb:.0f}" for gb in parts)])

    for title, flags in {"adapters, both experts": "--lora 64",
                         "generation expert": "--lora 0 --shard --lr_understanding 0",
                         "all weights": "--lora 0 --shard"}.items():
        for pixels in (512, 1024):
            for world in (1, 8):
                size = f"--recipe unigrpo --think {4 * world} --resolution {pixels}"
                add(title, world, f"{size} {flags}")
    add("adapters, `unigrpo_rounds`", 1, "--recipe unigrpo_rounds --rounds 4")
    add("adapters, `alphagrpo`", 1, "--recipe alphagrpo --think 4")
    add("adapters, `alphagrpo_reflect`", 1, "--recipe alphagrpo_reflect --reflect 4")
    head = ["trained", "pixels", "GPUs", "kept", "rollout", "replay", "peak"]
    return "\n".join(markdown_table(head, rows))


def main(argv: list[str] | None = None) -> None:
    Arguments(prog="studies.bench", description="Compute memory.").parse_args(argv)
    with one_line("studies.bench"):
        print(memory_table())


if __name__ == "__main__":
    main()
