"""Two ranks are one process, whole or sharded, at BAGEL's scale too; what they keep can be gone on
from by either.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import (
    ALONE, assert_close, checkpoint, flags_of, moments, records, settings, words, write_rows)

import train
from sample import TOY, Draw, Read, images_of, sample_plan
from support.checkpoint import load_policy, save_tensors

HERE = Path(__file__).parent
ROOT = HERE.parent
GOLDEN = HERE / "golden" / "bagel_tiny"
SHARDED = {
    "whole": "--lora 0 --draw 2 --think 2 --ask 2",
    "adapters": "--lora 4 --reflect 2 --rectify off --micro 3 --window 3 --window_high 5 "
    "--lr_understanding 0",
}
RECIPE = {"whole": "lvrpo", "adapters": "alphagrpo_reflect"}
PLAIN = ["lvrpo", "lvrpo --image_loss awm", "unifpo"]   # the matching losses: nft, awm, fpo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BAGEL as a release is laid out, with prompts and questions next to it."""
    path = tmp_path_factory.mktemp("release") / "p"
    shutil.copytree(GOLDEN, path, copy_function=shutil.copyfile)
    (path / "p.txt").write_text("a red cat\na blue dog on the box\nx\na tree\n")
    questions = [dict(question=text, answer="a") for text in ("what ?", "how many ?")]
    write_rows(path / "q.jsonl", *questions)
    return path


def large(folder, out, name, *more):
    """Flags of two steps with BAGEL's settings, shrunk to the folder."""
    files = ["--policy", folder, "--prompts", folder / "p.txt", "--questions", folder / "q.jsonl"]
    files += ["--siglip", TOY.parent / "siglip", "--judge", TOY.parent / "judge", "--out", out]
    sizes = "--resolution 16 --think_tokens 5 --answer_tokens 3 --denoise_steps 6"
    pace = "--group_size 4 --micro 8 --rollout_batch 4 --epochs 1 --steps 2"
    losses = "--sem 1 --dvreward 0 --image_weight 1 --image_clip 1e-2 --no-bf16"
    rates = "--lr_understanding 1e-5 --lr_generation 1e-5 --save_every 1 --eval_every 0"
    return words(
        "--scale bagel --recipe", RECIPE[name], *files, sizes, pace, losses, rates, SHARDED[name],
        *more)


@pytest.fixture(scope="module")
def out(folder, tmp_path_factory):
    """Every run by one process, out/one-NAME, and by two ranks of one torchrun, out/two-NAME, but
    for PLAIN, whose runs by one process are `tiny`, and by two out/lvrpo, out/awm, out/unifpo.
    """
    out = tmp_path_factory.mktemp("ranks")
    sharded = [
        large(folder, out / f"two-{name}", name, "--shard --eval_every 2") for name in SHARDED]
    plain = [flags_of(recipe, out / recipe.split()[-1]) for recipe in PLAIN]
    # One step by one process, then one by two ranks; one step by two ranks, for a test to go on
    # from.
    train.train(settings(*large(folder, out / "one-then-two", "whole", "--steps 1")), ALONE)
    cut = [
        large(folder, out / "one-then-two", "whole", "--shard --resume"),
        large(folder, out / "two-then-one", "whole", "--shard --steps 1")]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(HERE / "two_ranks.py"), json.dumps([*plain, *sharded, *cut]), str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in SHARDED:
        train.train(settings(*large(folder, out / f"one-{name}", name)), ALONE)
    return out


def assert_same_run(ours, theirs):
    """Up to rounding, which two steps of AdamW make larger where a gradient is small."""
    for row, other in zip(records(ours), records(theirs), strict=True):
        shared = [name for name in row if name.endswith("/reward") or name in ("loss", "grad_norm")]
        assert shared
        for name in shared:
            assert row[name] == pytest.approx(other[name], rel=2e-3, abs=2e-5), name
    assert int(checkpoint(ours)["step"]) == int(checkpoint(theirs)["step"]) == 2
    assert_close(moments(ours), moments(theirs), 1e-2)


@pytest.mark.parametrize("recipe", PLAIN)
def test_two_ranks_give_the_run_of_one(tiny, out, recipe):
    assert_same_run(out / recipe.split()[-1], tiny(recipe).out)


@pytest.mark.parametrize("name", SHARDED)
def test_two_sharded_ranks_give_the_run_of_one_whole_process(out, name):
    assert_same_run(out / f"two-{name}", out / f"one-{name}")


def test_sharded_ranks_go_on_from_a_whole_checkpoint(out):
    assert_same_run(out / "one-then-two", out / "one-whole")


def test_one_process_goes_on_from_a_sharded_checkpoint_that_holds_no_pickle(folder, out):
    run = out / "two-then-one"
    suffixes = {path.suffix for path in (run / "checkpoint").iterdir()}
    assert suffixes == {".safetensors"}
    train.train(settings(*large(folder, run, "whole", "--resume")), ALONE)
    assert_same_run(run, out / "one-whole")
    assert not (run / "checkpoint").exists()


def test_sharded_ranks_draw_a_preview_together(out):
    pictures = sorted(path.name for path in (out / "two-adapters" / "samples").iterdir())
    assert pictures == ["000000.png", "000002.png"]


def test_the_adapters_of_sharded_ranks_on_their_base_are_the_policy_that_they_export(folder, out):
    run = out / "two-adapters"
    adapted = load_policy(folder, adapter=run / "adapter")
    plan = [Read(["a red cat"]), Draw((16, 24), torch.linspace(1, 0, 4))]
    ours, theirs = (
        images_of(policy, sample_plan(policy, plan, seed=0, step=0, index=[0], G=2))
        for policy in (adapted, load_policy(run / "policy"))
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_adapters_of_one_expert_are_stored_as_peft_stores_them_and_leave_the_other(folder, out):
    run = out / "one-adapters"
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    layer = "base_model.model.language_model.model.layers.1."
    assert tensors[layer + "self_attn.q_proj_moe_gen.lora_A.weight"].shape == (4, 64)
    assert tensors[layer + "mlp_moe_gen.down_proj.lora_B.weight"].shape == (64, 4)
    assert len(tensors) == 2 * 7 * 2            # layers, matrices, A and B
    before, after = (load_file(path / "ema.safetensors") for path in (folder, run / "policy"))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) == 2 * 7
    assert all("_moe_gen" in key for key in changed)


def test_a_bf16_release_trains_fp32_masters_and_stays_bf16(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "half")
    path = tmp_path / "half" / "ema.safetensors"
    save_tensors({key: value.bfloat16() for key, value in load_file(path).items()}, path)
    flags = "--draw 0 --ask 0 --lr_understanding 0 --bf16 --steps 1"
    half = large(tmp_path / "half", tmp_path / "out", "whole", flags)
    train.train(settings(*half), ALONE)
    (row,) = records(tmp_path / "out")
    assert row["grad_norm"] > 0
    masters = {v.dtype for k, v in checkpoint(tmp_path / "out").items() if k.startswith("policy.")}
    assert masters == {torch.float32}
    exported = load_file(tmp_path / "out" / "policy" / "ema.safetensors")
    assert {value.dtype for value in exported.values()} == {torch.bfloat16}
