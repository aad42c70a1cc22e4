"""Every task, layout and command on a device that is not the CPU: no tensor is left on the wrong
one. See pretend.py.
"""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pretend import DEVICE, Literals, PretendDevice
from tiny_runs import records, small

import eval as evaluation
import flow_grpo
import sample
import train
from policy import Guidance
from sample import Draw, Read, See, Write, images_of, replay_rollout, sample_plan, subset, texts_of
from support.checkpoint import load_policy
from support.run import Ranks, load_checkpoint, run_state
from tasks import TASKS
from toy import world

GOLDEN = Path(__file__).parent / "golden" / "bagel_tiny"
THERE = Ranks(0, 1, DEVICE)
SHORT = (
    "--group_size 2 --epochs 1 --think_tokens 3 --answer_tokens 2 --denoise_steps 2 --window 1 "
    ""
)
REWARDS = ["sem", "kn", "dense", "ins", "accuracy", "format", "dvreward", "likeness", "tim"]


@pytest.fixture(autouse=True)
def pretend_device():
    with PretendDevice(), Literals():
        yield


def test_tensors_of_two_devices_cannot_meet():
    with pytest.raises(RuntimeError, match="two devices meet"):
        torch.zeros(2, device=DEVICE) + torch.zeros(2)


@pytest.mark.parametrize(
    "tasks, rewards, flags",
    [
        # All weights against a frozen copy, a referee that learns.
        (TASKS, REWARDS, "--train_referee 1e-4 --rollout_batch 2"),
        # Adapters, guidance by text and by image, the other losses.
        (
            ["pair_image", "reflect"],
            ["sem", "recaption"],
            "--lora 2 --guidance 2 --checkpointing --image_loss ratio_norm --sampler sde --window_high 1 "
            "--text_ratio sequence --advantage unbiased",
        ),
    ],
)
def test_every_task_samples_scores_and_learns(tmp_path, tasks, rewards, flags):
    rows = [f"--{name} {int(name in tasks)}" for name in TASKS]
    rewards = [f"--{name} 1" for name in rewards]
    run = train.begin(small(tmp_path, *rows, *rewards, SHORT, flags), THERE)
    stats = train.one_step(run, 1)
    assert stats["grad_norm"] > 0
    assert {p.device for p in run.policy.parameters()} == {DEVICE}
    train.keep(run, 1)
    tensors = run_state(run)
    assert load_checkpoint(tmp_path, tensors) == 1


def test_a_run_is_evaluated_drawn_resumed_and_exported(tmp_path, monkeypatch):
    for name, value in dict(PROMPTS_PER_TAG=1, THOUGHTS=2, QUESTIONS=24, EDITS=12).items():
        monkeypatch.setattr(world, name, value)
    monkeypatch.setitem(sample.SAMPLING["toy"], "steps", 2)
    short = replace(evaluation.plain_choices("toy"), think=Write(3, 0.0), answer=Write(2, 0.0))
    monkeypatch.setattr(evaluation, "plain_choices", lambda scale: short)
    monkeypatch.setattr(evaluation, "evaluate_rows", functools.cache(evaluation.evaluate_rows))
    monkeypatch.setattr(evaluation, "picture_run", lambda *args: "")
    one = f"--draw 1 --think 0 --ask 0 --kn 0 --sem 0 {SHORT}"
    train.train(small(tmp_path, one, "--steps 1"), THERE)
    train.train(small(tmp_path, one, "--steps 2 --eval_every 2 --resume"), THERE)
    assert [row["step"] for row in records(tmp_path) if "loss" in row] == [0, 1]
    assert [row["step"] for row in records(tmp_path) if "eval" in row] == [1, 2]
    assert load_policy(tmp_path / "policy", device=DEVICE).embed.weight.device == DEVICE


def plan(policy):
    """Every kind of segment, given and chosen: images of two sizes, a text and a picture that are
    read back, and the two samplers."""
    side, patch = policy.config.stride, policy.config.vit["patch_size"]
    pixels = [torch.rand(3, 2 * patch, 3 * patch) * 2 - 1, torch.rand(3, patch, 2 * patch) * 2 - 1]
    source = [torch.rand(3, 2 * side, 2 * side) * 2 - 1 for _ in range(2)]
    grid, size = flow_grpo.time_grid(3, 3.0), (2 * side, 2 * side)
    first, last = (
        Draw(size, grid, (0, 2), 0.7, "sde"),
        Draw(size, grid, (0, 2), 0.7, "cps", shared_noise=True))
    return [
        See(pixels, source), Read(["make it red", "b"]), Write(3), first, Read(["c", "d"]),
        Write(2), last]


@pytest.mark.parametrize("guidance", [None, Guidance(4.0, 2.0, "text_channel", 0.0, (0.0, 1.0))])
def test_every_kind_of_segment_is_sampled_and_replayed(guidance):
    policy = load_policy(GOLDEN, device=DEVICE)
    rollout = sample_plan(
        policy, plan(policy), seed=0, step=0, index=[0, 1], G=2, guidance=guidance)
    assert images_of(policy, rollout).device == DEVICE
    assert len(texts_of(policy, rollout)) == 4
    for part in (rollout, subset(rollout, range(1), range(1))):
        for scored in replay_rollout(policy, part):
            logp = scored.logp if scored.flow is None else scored.flow.logp
            assert logp.device == DEVICE


def test_the_command_line_draws_thinks_edits_and_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "the_device", lambda: DEVICE)
    one, short = str(tmp_path / "one.png"), ["--n", "1", "--steps", "2"]
    sample.main(["a red circle", *short, "--out", one])
    sample.main(["a red circle", "--think", "--guidance", "3", *short, "--out", one])
    sample.main(["make it red", "--edit", one, *short, "--out", str(tmp_path / "two.png")])
    sample.main(["what color is the circle ?", "--question", one])
    assert (tmp_path / "two.png").exists()
    assert "images in" in capsys.readouterr().out
