"""Every task on a device that is not the CPU: no tensor is left on the wrong one. See tests/pretend.py."""

import json

import pytest
import torch
from pretend import DEVICE, Literals, PretendDevice

import recipes
from studies import bench
import eval as evaluation
import flow_grpo
import sample
import tasks
import train
from policy import Guidance
from sample import (TOY, Draw, Read, See, Write, images_of, replay_rollout, sample_plan, subset,
    texts_of)
from support.checkpoint import load_policy
from support.run import Ranks, load_checkpoint, run_state

GOLDEN = evaluation.Path(__file__).parent / "golden" / "bagel_tiny"
THERE = Ranks(0, 1, DEVICE)
SMALL = ["--draw", "1", "--think", "1", "--ask", "1", "--edit", "0", "--group_size", "2", "--save_every", "1"]


@pytest.fixture(autouse=True)
def pretended():
    with PretendDevice(), Literals():
        yield


def test_tensors_of_two_devices_cannot_meet():
    with pytest.raises(RuntimeError, match="two devices meet"):
        torch.zeros(2, device=DEVICE) + torch.zeros(2)


def records(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]


@pytest.fixture
def few(monkeypatch):
    """A small evaluation."""
    for name, value in dict(PROMPTS_PER_TAG=3, THOUGHTS=4, QUESTIONS=10, EDITS=6).items():
        monkeypatch.setattr(tasks, name, value)
    monkeypatch.setattr(evaluation, "ODE_STEPS", 2)


@pytest.mark.parametrize("more", [
    ["--recipe", "corl", "--pair_image", "2", "--pair_text", "2", "--choose", "2", "--reason", "2", "--likeness_by", "psnr"],
    ["--recipe", "alphagrpo_reflect", "--reflect", "2", "--think", "1", "--edit", "1", "--initial", "2", "--guidance", "2",
     "--image_guidance", "1.5", "--draw", "0", "--ask", "0"],
    ["--recipe", "unigrpo_rounds", "--rounds", "1", "--draw", "0", "--ask", "0", "--think", "0", "--segments"],
    ["--recipe", "unigrpo", "--draw", "0", "--ask", "0", "--micro", "1", "--lora", "4", "--ratio_norm", "--checkpointing", "--std", "unbiased"],
    # A referee that learns; referees on a device of their own.
    ["--think", "0", "--ask", "0", "--edit", "0", "--train_referee", "1e-4", "--dense", "1", "--tifa", "1", "--ins_by", "flow_grpo"],
    ["--recipe", "corl", "--pair_image", "2", "--pair_text", "2", "--referee_device", "cpu", "--dvreward", "1", "--sem", "1", "--kn", "1"],
    # All weights against a frozen copy, and every switch.
    ["--dense", "1", "--format", "1", "--normalise", "each", "--rollout_batch", "2", "--density", "sum", "--kl_correction", "--adv_clamp", "5",
     "--text_average", "constant", "--text_ratio", "sequence", "--text_delta", "3", "--sampler", "sde", "--image_clip", "1"]])
def test_every_task_samples_scores_and_learns(tmp_path, more):
    run = train.begin(recipes.parse([*SMALL, *more, "--out", str(tmp_path)]), THERE)
    stats = train.one_step(run, 0)
    assert stats["grad_norm"] > 0 and {p.device for p in run.policy.parameters()} == {DEVICE}
    train.keep(run, 1)
    assert load_checkpoint(tmp_path, run_state(run.policy, run.average, run.optimizer, run.learner)) == 1


def test_a_run_evaluates_saves_resumes_and_exports(tmp_path, few):
    more = ["--draw", "0", "--ask", "0", "--kn", "0", "--sem", "0", "--out", str(tmp_path)]
    train.train(recipes.parse([*SMALL, *more, "--steps", "1", "--eval_every", "0"]), THERE)
    train.train(recipes.parse([*SMALL, *more, "--steps", "2", "--eval_every", "2", "--resume"]), THERE)
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [0, 1] and len([r for r in records(tmp_path) if "eval" in r]) == 2
    assert load_policy(tmp_path / "policy", device=DEVICE).embed.weight.device == DEVICE


def plans(policy):
    side, patch = policy.config.stride, policy.config.vit["patch_size"]
    pixels = [torch.rand(3, 2 * patch, 3 * patch) * 2 - 1, torch.rand(3, patch, 2 * patch) * 2 - 1]
    source = [torch.rand(3, 2 * side, 2 * side) * 2 - 1 for _ in range(2)]
    grid, size = flow_grpo.time_grid(4, 3.0), (2 * side, 2 * side)
    draw = lambda kind, shared=False: Draw(size, grid, (0, 2), 0.7, kind, shared)
    return {"edit": [See(pixels, source), Read(["make it red", "b"]), Write(5), draw("sde")],
            "rounds": [Read(["a", "b"]), draw("dance", True), Read(["c", "d"]), Write(4), draw("cps")],
            "question": [See(pixels), Read(["a", "b"]), Write(4)],
            "sizes": [Read(["a", "b"]), Draw([(side, 2 * side), (2 * side, side)], grid)]}


@pytest.mark.parametrize("guidance", [None, Guidance(4.0, 2.0, "text_channel", 0.0, (0.0, 1.0))])
@pytest.mark.parametrize("name", ["edit", "rounds", "question", "sizes"])
def test_every_layout_is_sampled_and_replayed(name, guidance):
    policy = load_policy(GOLDEN, device=DEVICE)
    r = sample_plan(policy, plans(policy)[name], seed=0, step=0, prompts=[0, 1], G=3, guidance=guidance)
    images, texts = images_of(policy, r), texts_of(policy, r)
    assert (images is None) == (name == "question") and (texts is None) == (name == "sizes")
    if name != "sizes":
        for scored in replay_rollout(policy, r) + replay_rollout(policy, subset(r, range(1), range(2))):
            assert (scored.logp if scored.flow is None else scored.flow.logp).device == DEVICE


def test_the_command_line_draws_thinks_edits_and_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "the_device", lambda: DEVICE)
    one = str(tmp_path / "one.png")
    sample.main(["a red circle", "--n", "1", "--out", one])
    sample.main(["a red circle", "--think", "--n", "2", "--guidance", "3", "--out", str(tmp_path / "two.png")])
    sample.main(["two squares", "--refine", "1", "--select", "judge", "--n", "1", "--steps", "2", "--out", str(tmp_path / "four.png")])
    sample.main(["make it red", "--edit", one, "--n", "1", "--out", str(tmp_path / "three.png")])
    sample.main(["what color is the circle ?", "--question", one])
    assert "1 images in" in capsys.readouterr().out


def test_the_benchmark_of_a_large_policy_runs():
    policy = load_policy(TOY, device=DEVICE).requires_grad_(False)
    assert len(bench.bench_release(policy, size=32, steps=2, batches=(1, 2), words=3, G=2).splitlines()) == 7 + 1
