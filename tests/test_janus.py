"""A policy that draws token by token: replay is rollout, no sample depends on its batch, what does
not fit is refused, and it trains.
"""

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_janus import write_janus
from tiny_runs import ALONE, assert_close, checkpoint, flags_of, moments, records, settings

import sample
import train
from janus import MARKERS, guide
from policy import Guidance
from recipes import check
from sample import Draw, Read, See, Write, join, replay_rollout, sample_plan, subset
from support.checkpoint import load_policy, save_adapters, save_policy
from support.disk import read_json
from support.lora import adapters, add_lora

HERE = Path(__file__).parent
SIZE = (32, 32)
DRAW = Draw(SIZE, temperature=0.8)
GUIDED = Guidance(3.0)
PROMPTS = ["a red circle", "a blue square above a red circle", "a triangle"]
LAYOUTS = ["question", "draw", "think, draw", "refinement", "rounds"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_janus(tmp_path_factory.mktemp("janus"))


@pytest.fixture(scope="module")
def frozen(folder):
    return load_policy(folder).requires_grad_(False)


@pytest.fixture
def policy(folder):
    return load_policy(folder)


def walk(policy, layout, rows=(0, 1, 2), **settings):
    pixels = torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    see = See(pixels[list(rows)])
    read = Read([PROMPTS[i] for i in rows])
    plan = {
        "question": [see, read, Write(5)], "draw": [read, DRAW],
        "think, draw": [read, Write(5, 0.9), DRAW], "refinement": [see, read, Write(4), DRAW],
        "rounds": [read, Write(4), DRAW, read, Write(3), DRAW]}[layout]
    settings = dict(seed=1, step=2, index=rows, G=2) | settings
    return sample_plan(policy, plan, **settings)


def logps(policy, rollout):
    return [scored.logp for scored in replay_rollout(policy, rollout)]


def gradients(policy, *rollouts):
    """Of the sum of all log-probs."""
    policy.zero_grad()
    for rollout in rollouts:
        sum(logp.sum() for logp in logps(policy, rollout)).backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def assert_near(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# ---- rollout and replay ----


@pytest.mark.parametrize("guidance", [None, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_replay_with_unchanged_weights_gives_the_log_probs_of_the_rollout(policy, layout, guidance):
    rollout = walk(policy, layout, guidance=guidance)
    for scored in replay_rollout(policy, rollout):
        assert scored.gaps.max() < 2e-5


@given(st.integers(0, 999), st.floats(0.5, 2), st.floats(1, 5), st.booleans())
def test_one_pass_scores_an_image_as_it_was_drawn(frozen, seed, temperature, scale, started):
    tokens, mask = frozen.encode_text(PROMPTS)
    _, context = frozen.append_text(frozen.empty(3), tokens, mask)
    _, without = frozen.append_text(frozen.empty(3), frozen.blank(tokens), mask)
    how = dict(temperature=temperature, started=started, without=without, scale=scale)
    uniforms = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed))
    drawn, logp = frozen.sample_image(context, uniforms, **how)
    assert_near(frozen.score_image(context, drawn, **how), logp, 1e-4)


@given(st.integers(0, 999), st.floats(-2, 5))
def test_guided_logits_lie_on_the_line_from_those_without_the_prompt_to_those_with_it(seed, scale):
    prompted, without = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([prompted, without])
    assert_near(guide(both, 0.0), without)
    assert_near(guide(both, 1.0), prompted)
    assert_near(guide(both, scale), scale * prompted + (1 - scale) * without)


def test_guidance_goes_without_all_texts_and_keeps_all_pictures(policy):
    """What the policy wrote is blank too."""
    rollout = walk(policy, "refinement", (1,), G=1, guidance=GUIDED)
    given, *texts, picture = rollout.segments
    contexts = []
    for read in (lambda tokens: tokens, policy.blank):
        context = policy.append_image(policy.empty(1), given.pixels)
        for text in texts:
            _, context = policy.append_text(context, read(text.tokens), text.mask)
        contexts.append(context)
    tokens = picture.drawn.data
    logp = policy.score_image(
        contexts[0], tokens, DRAW.temperature, started=True, without=contexts[1], scale=3.0)
    assert_near(logps(policy, rollout)[-1], logp)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_a_batch_are_walked_as_in_the_whole(policy, layout):
    """No sample depends on another; gradients of what a group shares add up."""
    whole = walk(policy, layout, guidance=GUIDED)
    joint = join([walk(policy, layout, rows, guidance=GUIDED) for rows in ((0, 1), (2,))])
    alone = walk(policy, layout, (1,), guidance=GUIDED, G=1, first_sample=1)
    one = subset(whole, [1], range(1, 2))
    for part, rows in ((joint, range(6)), (alone, [3]), (one, [3])):
        for ours, theirs in zip(replay_rollout(policy, part), logps(policy, whole), strict=True):
            width = min(ours.logp.shape[1], theirs.shape[1])
            assert_near(ours.logp[:, :width], theirs[rows, :width])
            assert ours.gaps.max() < 2e-5
    samples = (subset(whole, range(3), range(i, i + 1)) for i in range(2))
    assert_close(gradients(policy, *samples), gradients(policy, whole))


def test_the_gradient_of_a_guided_replay_is_that_of_finite_differences(policy):
    """Of all weights at once, along the gradient."""
    rollout = walk(policy.double(), "rounds", (0,), guidance=GUIDED)
    ends = []
    slope = gradients(policy, rollout)
    norm = torch.stack([x.norm() for x in slope.values()]).norm().item()
    for step in (1e-3, -2e-3):                  # logits are fp32, so that steps are large
        with torch.no_grad():
            for name, x in slope.items():
                policy.get_parameter(name).add_(x, alpha=step / norm)
            ends.append(sum(logp.sum().item() for logp in logps(policy, rollout)))
    assert norm == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-3)


def test_checkpointing_computes_layers_again_and_changes_no_gradient(policy, monkeypatch):
    rollout = walk(policy, "rounds", guidance=GUIDED)
    layer = policy._layer
    calls = []
    monkeypatch.setattr(policy, "_layer", lambda *args: calls.append(1) or layer(*args))
    plain = gradients(policy, rollout)
    once = len(calls)
    for block in policy.blocks:
        block.checkpointing = True
    assert_close(gradients(policy, rollout), plain, 1e-6)
    assert len(calls) == 3 * once


@torch.no_grad()
def test_a_context_stays_as_it_was_bit_for_bit_whoever_reads_it(policy):
    numbers = torch.rand(3, 16)
    _, context = policy.append_text(policy.empty(3), *policy.encode_text(PROMPTS))
    before = deepcopy(context)
    tokens, _ = policy.sample_image(context, numbers, without=context, scale=3.0)
    policy.sample_text(context, numbers)
    policy.score_image(context, tokens)
    policy.append_image(context, torch.rand(3, 3, *SIZE))
    for name, value in vars(before).items():
        torch.testing.assert_close(getattr(context, name), value, rtol=0, atol=0)


def test_guidance_of_scale_one_is_none(policy):
    plain, one = (
        walk(policy, "draw", guidance=guidance).segments[1].drawn.data
        for guidance in (None, Guidance(1.0)))
    assert torch.equal(one, plain)
    context = policy.empty(6)
    logp, same, guided = (
        policy.score_image(context, plain, **branches)
        for branches in ({}, dict(without=context), dict(without=context, scale=3.0)))
    assert_near(same, logp)
    assert (guided - logp).abs().max() > 0.1


@pytest.mark.parametrize("after, own", [("nothing", 3), ("image", 1), ("turn", 3)])
def test_a_marker_inside_a_text_is_spelled_or_dropped_and_ends_nothing(policy, after, own):
    for marker in (*MARKERS, *policy.tokenizer.all_special_tokens):
        (ids,) = policy.token_ids([f"a {marker} circle"], after=after)
        assert sum(i in policy.reserved for i in ids) == own, marker


# ---- what is refused ----


def refusal(function, *args, **kwargs):
    """The one line with which bad input ends."""
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        function(*args, **kwargs)
    said = str(error.value)
    assert "\n" not in said
    return said


@pytest.fixture
def copy(folder, tmp_path):
    """A folder that a test may change."""
    return shutil.copytree(folder, tmp_path / "p")


@pytest.mark.parametrize(
    "part, fields, said",
    [
        ("", dict(model_type="qwen2"), "llm_config.json is missing"),
        ("", dict(tie_word_embeddings=True), "tie_word_embeddings True is not implemented"),
        ("text_config", dict(vocab_size=99), "below the policy's vocab_size 99"),
        ("vision_config", dict(patch_size=4), "the config says (")],
)
def test_a_config_that_is_not_implemented_or_of_another_model_is_refused(copy, part, fields, said):
    config = read_json(copy / "config.json")
    (config[part] if part else config).update(fields)
    (copy / "config.json").write_text(json.dumps(config))
    assert said in refusal(load_policy, copy)


@pytest.mark.parametrize("name", ["generation_head.vision_head", "vqmodel.quantize.embedding"])
def test_a_codebook_and_a_head_of_different_sizes_are_refused(copy, name):
    file = copy / "model.safetensors"
    key = f"model.{name}.weight"
    save_file(load_file(file) | {key: torch.zeros(63, 32)}, file)
    assert f"{key} has shape (63, 32), the config says (64, " in refusal(load_policy, copy)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(copy, monkeypatch):
    file = copy / "model.safetensors"
    before = load_file(file)
    torch.save(before, copy / "pytorch_model.bin")
    file.unlink()
    said = refusal(load_policy, copy)
    assert "pickled weights are not read, convert them: python -c" in said
    monkeypatch.chdir(copy)
    exec(said.split('"')[1])
    torch.testing.assert_close(load_file(file), before, rtol=0, atol=0)


def test_pictures_of_another_side_are_refused(policy):
    said = "image of 16 x 32 pixels: this policy reads and draws 32 x 32 alone"
    for function in (policy.encode, policy.image_states):
        assert refusal(function, torch.zeros(1, 3, 16, 32)) == said
    plan = [Read(PROMPTS), Draw((16, 32))]
    assert refusal(sample_plan, policy, plan, seed=0, step=0, index=[0, 1, 2], G=1) == said


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--window 3", "--window 3 is of flow steps"),
        ("--step_weights dt", "--step_weights dt is of flow steps"),
        ("--recipe unifpo", "--recipe unifpo is of flow steps"),
        ("--image_loss nft", "--image_loss nft does not fit a policy of scale toy_janus"),
        ("--edit 2", "cannot edit; set --edit 0")],
)
def test_settings_of_flow_steps_and_edits_are_refused(folder, tmp_path, flags, said):
    ours = ["--policy", folder, "--out", tmp_path, flags]
    assert said in refusal(lambda: train.begin(settings(*ours), ALONE))


def test_settings_of_image_tokens_are_refused_for_flow_steps():
    said = refusal(lambda: check(settings("--guidance_in sampling"), 1))
    assert said.startswith("--guidance_in sampling is of image tokens")
    assert "does not fit a policy of scale toy" in refusal(settings, "--image_loss token")
    said = refusal(sample.main, ["x", "--image_temperature", "0.5"])
    assert "draws by flow steps" in said


@pytest.mark.parametrize("flag", ["--steps", "--edit", "--image_guidance"])
def test_the_command_line_refuses_what_is_of_flow_steps(folder, flag):
    said = refusal(sample.main, ["x", "--policy", str(folder), flag, "2"])
    assert said.startswith(f"sample.py: {flag} 2")
    assert "draws token by token" in said


# ---- runs and adapters ----


def flags(folder, out, *more):
    return flags_of("corl", out, "--policy", folder, "--guidance 3", *more)


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    """Two steps of CoRL by one process."""
    out = tmp_path_factory.mktemp("one")
    train.train(settings(*flags(folder, out)), ALONE)
    return out


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    """The same by two ranks: two/whole, two/sharded."""
    out = tmp_path_factory.mktemp("two")
    lines = [flags(folder, out / "whole"), flags(folder, out / "sharded", "--shard")]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(HERE / "two_ranks.py"), json.dumps(lines), str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True,
        text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("name", ["whole", "sharded"])
def test_two_ranks_whole_or_sharded_give_the_run_of_one(one, two, name):
    for row, other in zip(records(two / name), records(one), strict=True):
        for key in ("grad_norm", "pair_image/reward"):
            assert row[key] == pytest.approx(other[key], rel=2e-3)
    assert_close(moments(two / name), moments(one), 1e-2)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(folder, one, tmp_path):
    for more in ("--steps 1", "--resume"):
        train.train(settings(*flags(folder, tmp_path, more)), ALONE)
    tensors = checkpoint(tmp_path)
    torch.testing.assert_close(tensors, checkpoint(one), rtol=0, atol=0)
    assert not any("vision_model" in name or "vqmodel" in name for name in tensors)
    assert all(row["grad_norm"] > 0 for row in records(tmp_path))


def test_adapters_on_their_base_are_the_policy_that_is_saved(policy, folder, tmp_path):
    rollout = walk(policy, "think, draw")
    for module in adapters(add_lora(policy, 2, 4.0)).values():
        torch.nn.init.normal_(module.B, std=0.1)
    save_adapters(policy, tmp_path / "a")
    targets = read_json(tmp_path / "a" / "adapter_config.json")["target_modules"]
    assert targets and all(t.startswith("model.") and "vision_model" not in t for t in targets)
    save_policy(policy, tmp_path / "p")
    thought, image = logps(policy, rollout)
    assert (image - rollout.segments[-1].drawn.logp).abs().max() > 0.01
    for other in (load_policy(folder, adapter=tmp_path / "a"), load_policy(tmp_path / "p")):
        assert_near(logps(other, rollout), [thought, image])
