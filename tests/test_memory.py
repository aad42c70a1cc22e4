"""What a run of the release needs on each GPU: what is counted, and what is advised if it is too
much.
"""

from dataclasses import replace

import pytest
import torch
from tiny_runs import settings

from referees.build import referee_bytes
from sample import TOY
from studies.bench import release_on_meta
from support.checkpoint import freeze, load_policy
from support.memory import check_memory, memory, peak
from support.run import Ranks
from tasks import in_use

GPU = Ranks(0, 1, torch.device("cuda"))


@pytest.fixture(scope="module")
def toy():
    return load_policy(TOY)


def of_release(toy, flags):
    """The settings of a run of the release, and the release as that run would train it."""
    cfg = settings("--scale bagel --prompts p", flags)
    policy = release_on_meta(toy.tokenizer)
    freeze(policy, cfg.experts, cfg.lora, cfg.checkpointing)
    return policy, cfg


def need_of(policy, cfg, world=8):
    return memory(policy, cfg, world, in_use(cfg), referee_bytes(cfg))


def test_adapters_need_the_weights_once_and_little_else(toy):
    """The 7B: 29.2 GB of bf16 weights; gradients and moments of adapters of rank 64."""
    need = need_of(*of_release(toy, "--recipe unigrpo"))
    adapters = 2 * 28 * 64 * (2 * 3584 + 2 * (3584 + 512) + 2 * 3584 + 3 * (3584 + 18944))
    assert need["gradients"] == pytest.approx(adapters * 4 / 1e9)
    assert need["AdamW"] == pytest.approx(2 * need["gradients"])
    assert need["average"] == need["gradients"]
    assert need["weights"] == pytest.approx(14.691 * 2 + adapters * 4 / 1e9, rel=0.01)
    assert need["reference"] == 0
    assert peak(need) < 80


def test_all_weights_need_masters_moments_an_average_and_a_reference_which_sharding_cuts(toy):
    policy, cfg = of_release(toy, "--recipe unigrpo --lora 0")
    need = need_of(policy, cfg)
    assert need["reference"] > 29
    assert peak(need) > 250
    cut = need_of(policy, replace(cfg, shard=True))
    assert cut["AdamW"] == pytest.approx(need["AdamW"] / 8)


def test_a_noisy_step_costs_its_tokens_in_a_replay(toy):
    """28 inputs of blocks a token, and one block's activations, for each of four samples."""
    policy, cfg = of_release(toy, "--recipe unigrpo")
    fewer = need_of(policy, replace(cfg, window=1))             # two noisy steps less
    block = (5 * 18944 + 8 * 3584) * 2
    want = 4 * 2 * 1026 * (28 * 3584 * 4 + block) / 1e9
    assert need_of(policy, cfg)["replay"] - fewer["replay"] == pytest.approx(want)


def test_what_a_trajectory_reads_draws_and_asks_counts(toy):
    def need(flags):
        return need_of(toy, settings(flags), 1)

    once = need("--recipe unigrpo --think 16")
    twice = need("--recipe unigrpo_rounds --rounds 16")
    assert twice["replay"] > 1.5 * once["replay"]               # both pictures' noisy steps at once
    blind = need("--recipe alphagrpo --think 32")
    seeing = need("--recipe alphagrpo_reflect --reflect 32")
    assert seeing["rollout"] > blind["rollout"]
    assert once["referees"] == 0
    assert blind["referees"] > 0


def test_too_little_memory_is_refused_with_what_would_fit(toy, monkeypatch):
    gpu = type("Properties", (), {"total_memory": 60e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    few = "--recipe unigrpo --micro 24 --rollout_batch 200"
    for flags in (few, "--recipe unigrpo --lora 0"):
        policy, cfg = of_release(toy, flags)
        says = r"needs about \d+ GB on each GPU, which has 60: weights .*try .*--micro 1.*--lora 64"
        with pytest.raises(ValueError, match=says) as error:
            check_memory(policy, cfg, GPU, in_use(cfg), 0)
        assert "\n" not in str(error.value)
    policy, cfg = of_release(toy, "--recipe unigrpo --micro 1")
    check_memory(policy, cfg, GPU, in_use(cfg), 0)
