"""The loop: the same run whatever the micro-batch, the ranks and the interruptions; bad input in one line; a reward that rises."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from referees import siglip
from support import checkpoint
from grpo import group_advantage, grpo_loss
from recipes import Config, check, parse
from referees.build import Models
from sample import Text, replay_rollout, sample_plan
from support.checkpoint import load_policy
from support.run import Average, Ranks, signals
from support import rows as files
import flow_grpo
import grpo
import rewards
import tasks
from toy import shapes
import train

ROOT = Path(train.__file__).parent
GENEVAL = ROOT.parent / "shared" / "data" / "geneval" / "evaluation_metadata.jsonl"
ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = ["--draw", "2", "--think", "2", "--ask", "2", "--edit", "0", "--group_size", "4", "--eval_every", "0", "--save_every", "0"]


def small(out, *more):
    return parse([*SMALL, "--out", str(out), *map(str, more)])


def checkpoint(out):
    return load_file(Path(out) / "checkpoint.safetensors")


def records(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


# ---- one run, however it is cut ----


@pytest.mark.parametrize("recipe", ["lvrpo", "unigrpo"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, recipe):
    train.train(small(tmp_path / "whole", "--recipe", recipe, "--steps", 4), ALONE)
    train.train(small(tmp_path / "cut", "--recipe", recipe, "--steps", 2), ALONE)
    train.train(small(tmp_path / "cut", "--recipe", recipe, "--steps", 4, "--resume"), ALONE)
    whole, cut = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
    assert whole.keys() == cut.keys() and int(whole["step"]) == 4
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    strip = lambda rows: [{k: v for k, v in r.items() if k not in ("seconds", "config", "command")} for r in rows]
    assert strip(records(tmp_path / "whole"))[1:] == strip(records(tmp_path / "cut"))[1:]


def gradients(tmp_path, *more):
    """The gradients of step 0, before the clip."""
    run = train.begin(small(tmp_path, "--grad_clip", 1e9, "--lr_understanding", 0, "--lr_generation", 0, *more), ALONE)
    train.one_step(run, 0)
    return {n: p.grad for n, p in checkpoint.trainable(run.policy).items() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_leave_the_gradient_equal(tmp_path, size):
    """Of single samples, of pieces of a group, of whole groups."""
    whole, parts = gradients(tmp_path), gradients(tmp_path, "--micro", size)
    assert whole.keys() == parts.keys()
    for n in whole:
        assert (whole[n] - parts[n]).norm() <= 1e-4 * whole[n].norm() + 1e-6, n


def test_two_ranks_give_the_run_of_one(tmp_path):
    more = [*SMALL, "--steps", "2", "--advantage", "batch", "--out"]
    train.train(parse([*more, str(tmp_path / "1")]), ALONE)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", *more, str(tmp_path / "2")],
                   cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    one, two = checkpoint(tmp_path / "1"), checkpoint(tmp_path / "2")
    assert one.keys() <= two.keys()
    for n in one:
        if n.startswith("adamw.exp_avg."):                      # a running mean of the gradients
            assert (one[n] - two[n]).norm() <= 1e-3 * one[n].norm() + 1e-6, n
    for a, b in zip(records(tmp_path / "1")[1:], records(tmp_path / "2")[1:]):
        for k in ("draw/reward", "think/reward", "ask/reward", "grad_norm", "loss", "draw/layout_entropy"):
            assert a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-5), k


def test_a_run_leaves_the_reference_and_the_referees_alone(tmp_path):
    run = train.begin(small(tmp_path), ALONE)
    frozen = [p.clone() for p in run.frozen.parameters()]
    judge = [p.clone() for p in run.rewards["kn"].judge.model.parameters()]
    train.one_step(run, 0)
    assert all(torch.equal(a, b) for a, b in zip(frozen, run.frozen.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(judge, run.rewards["kn"].judge.model.parameters()))
    assert not torch.equal(run.policy.blocks[0].experts[1].q.weight, run.frozen.blocks[0].experts[1].q.weight)


def test_adapters_train_against_the_policy_without_them(tmp_path):
    train.train(small(tmp_path, "--lora", 4, "--epochs", 1, "--steps", 2, "--lr_generation", 1e-2), ALONE)
    log, noisy = records(tmp_path), [f"draw/image/ratio/step_std/{n}" for n in range(3)]
    assert all(log[2][k] > 0 for k in noisy) and "draw/image/ratio/step_std/3" not in log[2]
    assert log[1]["draw/image/velocity_mse"] == 0 and log[2]["draw/image/velocity_mse"] > 0
    assert all(".A" in k or ".B" in k for k in checkpoint(tmp_path) if k.startswith("policy."))
    assert load_policy(tmp_path / "policy").embed.weight.shape == load_policy(parse([]).policy).embed.weight.shape


def test_rollout_and_replay_agree_before_the_first_update(tmp_path):
    train.train(small(tmp_path, "--steps", 1), ALONE)
    gaps = {k: v for k, v in records(tmp_path)[1].items() if k.startswith("self_check/")}
    assert set(gaps) == {"self_check/draw/image", "self_check/think/text", "self_check/think/image", "self_check/ask/text"}
    assert max(gaps.values()) <= 1e-4


def test_self_check_stops_a_run_whose_paths_differ(tmp_path, monkeypatch):
    run = train.begin(small(tmp_path), ALONE)

    def shifted(*args, **kwargs):
        r = sample_plan(*args, **kwargs)
        change = lambda s: dataclasses.replace(s, logp=s.logp + 3.0) if getattr(s, "logp", None) is not None else s
        return dataclasses.replace(r, segments=tuple(map(change, r.segments)))

    monkeypatch.setattr(train, "sample_plan", shifted)
    with pytest.raises(ValueError, match="must be one function"):
        train.one_step(run, 0)


# ---- what is kept ----


def test_a_signal_saves_and_the_run_goes_on_from_there(tmp_path):
    command = [sys.executable, "train.py", *SMALL, "--steps", "400", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (tmp_path / "log.jsonl").exists() or len(records(tmp_path)) < 3:
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    step = int(checkpoint(tmp_path)["step"])
    train.train(small(tmp_path, "--steps", step + 1, "--resume"), ALONE)
    assert [r["step"] for r in records(tmp_path)[1:]] == list(range(step + 1))


def test_kill_in_the_middle_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    code = ("import torch, pathlib, sys; from checkpoint import save_tensors\n"
            "path, i = pathlib.Path(sys.argv[1]), 0\n"
            "while True:\n    save_tensors({'a': torch.full((4_000_000,), float(i))}, path); i += 1; print(i, flush=True)\n")
    path = tmp_path / "checkpoint.safetensors"
    for wait in (0.0, 0.017):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while int(process.stdout.readline()) < 2:
            pass
        time.sleep(wait)
        process.kill()
        process.wait()
        a = load_file(path)["a"]
        assert (a == a[0]).all()


def test_a_full_disk_at_save_keeps_the_old_checkpoint_and_is_said(tmp_path, monkeypatch):
    train.train(small(tmp_path, "--steps", 1), ALONE)
    old = (tmp_path / "checkpoint.safetensors").read_bytes()

    def full(tensors, target, metadata=None):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train.train(small(tmp_path, "--steps", 2, "--resume"), ALONE)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == old


@pytest.mark.parametrize("change, names", [(lambda t: t.pop("policy.head.weight"), "policy.head.weight"),
                                           (lambda t: t.update(strange=torch.zeros(1)), "strange")])
def test_a_checkpoint_with_missing_or_extra_keys_names_them(tmp_path, change, names):
    train.train(small(tmp_path, "--steps", 1), ALONE)
    tensors = checkpoint(tmp_path)
    change(tensors)
    save_file(tensors, tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match=names):
        train.train(small(tmp_path, "--steps", 2, "--resume"), ALONE)


def test_a_pickled_checkpoint_is_refused(tmp_path):
    tmp_path.joinpath("checkpoint.safetensors").write_bytes(b"")
    torch.save({"step": 1}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="pickled checkpoints are not read"):
        train.train(small(tmp_path, "--steps", 2, "--resume"), ALONE)


def test_a_non_finite_loss_stops_with_the_step_and_keeps_the_batch(tmp_path, monkeypatch):
    train.train(small(tmp_path, "--steps", 1), ALONE)
    old = (tmp_path / "checkpoint.safetensors").read_bytes()
    monkeypatch.setattr(train, "grpo_loss", lambda logp, *a, **k: (logp.sum() * float("nan"), {}))
    with pytest.raises(FloatingPointError, match="step 1.*think loss is nan.*checkpoint.safetensors"):
        train.train(small(tmp_path, "--steps", 3, "--resume"), ALONE)
    bad = load_file(tmp_path / "bad_step_0.safetensors")
    assert int(bad["step"]) == 1 and "think.1.tokens" in bad and "draw.1.latents" in bad and "draw.adv" in bad
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == old


# ---- input ----


def test_every_field_of_the_config_is_read():
    source = "".join((ROOT / f"{name}.py").read_text() for name in ("train", "run", "tasks", "eval", "rewards", "models"))
    for f in dataclasses.fields(Config):
        if f.name in {task.file for task in tasks.TASKS.values()}:
            continue                                            # read by the task's own name for it
        assert re.search(rf"\bcfg\.{f.name}\b", source), f.name


def test_a_recipe_is_its_column_with_the_scale_and_what_was_given():
    cfg = parse(["--recipe", "unigrpo", "--scale", "bagel", "--group_size", "16", "--no-ratio_norm"])
    assert (cfg.text_beta, cfg.epochs, cfg.lr_understanding, cfg.lr_generation) == (0.0, 2, 1e-6, 3e-5)
    assert (cfg.group_size, cfg.ratio_norm, cfg.denoise_steps) == (16, False, 25)
    assert (cfg.text_average, cfg.image_clip, parse(["--recipe", "unigrpo"]).image_clip) == ("sequence", 1e-6, 1e-3)


@pytest.mark.parametrize("argv, words", [
    (["--learning_rate", "1"], "unrecognized arguments: --learning_rate"), (["--recipe", "ppo"], "invalid choice: 'ppo'"),
    (["--policy", "nowhere"], "policy folder nowhere does not exist"), (["--group_size", "1"], "at least 2 samples"),
    (["--prompts", "nowhere.jsonl", "--ins", "0"], "file nowhere.jsonl does not exist")])
def test_bad_input_ends_in_one_clear_line(tmp_path, argv, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *argv, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        train.main()
    told = left.value.code if isinstance(left.value.code, str) else capsys.readouterr().err.strip()
    assert told.startswith("train.py: ") and words in told and "\n" not in told


@pytest.mark.parametrize("name", ["advantage", "normalise", "text_average", "sampler", "experts"])
def test_a_choice_that_is_none_of_the_known_is_refused(name, capsys):
    with pytest.raises(SystemExit):
        parse([f"--{name}", "foo"])
    err = capsys.readouterr().err
    assert f"argument --{name}: invalid choice: 'foo'" in err and err.count("\n") == 1


@pytest.mark.parametrize("more, words", [
    (("--grad_clip", "nan"), "--grad_clip nan: must be a finite number"), (("--sem", "inf"), "--sem inf"),
    (("--grad_clip", "0"), "--grad_clip 0.0: must be above 0"), (("--shift", "-1"), "--shift -1.0: must be above 0"),
    (("--seed", "-1"), "--seed -1: must be at least 0"), (("--image_weight", "-300"), "--image_weight"),
    (("--ema", "5"), "--ema 5.0: must be below 1"), (("--noise_level", "0"), "--noise_level 0.0: must be above 0"),
    (("--noise_level", "2"), "--noise_level 2.0: must be below 2 for cps"), (("--referee_batch", "0"), "--referee_batch 0: must be at least 1"),
    (("--window_low", "-1"), "--window_low -1: must be at least 0"), (("--resolution", "16"), "--resolution 16: must be 32")])
def test_a_setting_that_cannot_work_is_refused_before_the_old_log_is_touched(tmp_path, more, words):
    (tmp_path / "log.jsonl").write_text("of another run")
    with pytest.raises(ValueError, match=words):
        train.begin(small(tmp_path, *more), ALONE)
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]


def test_the_image_text_referee_is_read_by_transformers_or_by_open_clip(tmp_path, monkeypatch):
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    asked = []
    for name in ("load_siglip", "load_open_clip", "load_judge"):
        monkeypatch.setattr(referees, name, lambda path, *, device, batch_size, dtype=None, name=name: asked.append((name, path, batch_size)))
    for path in (str(tmp_path), "hf-hub:timm/ViT-B-16-SigLIP2", "google/siglip2-so400m-patch14-384"):
        models = Models(small(tmp_path, "--siglip", path, "--judge", "j", "--referee_batch", 3), "cpu")
        models.encoder, models.judge, models.encoder            # the second time it is there
    judge = ("load_judge", "j", 3)
    assert asked == [("load_open_clip", str(tmp_path), 3), judge, ("load_open_clip", "hf-hub:timm/ViT-B-16-SigLIP2", 3), judge,
                     ("load_siglip", "google/siglip2-so400m-patch14-384", 3), judge]
    monkeypatch.setattr(referees, "load_open_clip", lambda path, **settings: siglip.OpenClip(None, None))
    with pytest.raises(ValueError, match="--dense reads patches"):
        rewards.REWARDS["dense"].build(Models(small(tmp_path, "--siglip", tmp_path, "--dense", 1), "cpu"))


def test_a_run_does_not_write_over_the_policy_that_it_starts_from(tmp_path):
    with pytest.raises(ValueError, match="give another --out"):
        check(small(tmp_path, "--policy", tmp_path / "sub" / ".." / "policy"), ALONE)


def test_a_batch_that_ranks_cannot_share_says_what_would_be(tmp_path):
    with pytest.raises(ValueError, match="--draw 3 prompts do not divide over 2 ranks; 2 or 4 would, or a --group_size that is a multiple of 2"):
        check(small(tmp_path, "--draw", 3, "--group_size", 5), Ranks(0, 2, torch.device("cpu")))


@pytest.mark.parametrize("text, words", [
    ('{"prompt": "a"}\n{"prompt": \n', r"p.jsonl:2: not a JSON object"), ('{"prompt": "a"}\n\n{"text": "b"}\n', r"p.jsonl:3: .*lacks \['prompt'\]"),
    ('["a"]\n', r"p.jsonl:1: must be an object"), ('{"prompt": "\\ud800 red"}\n', r"p.jsonl:1: holds half of a surrogate"),
    ("[" * 200000, r"p.jsonl:1: not a JSON object"), ("\n \n", r"p.jsonl is empty")])
def test_a_bad_prompts_file_names_file_and_line(tmp_path, text, words):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(ValueError, match=words):
        train.begin(small(tmp_path, "--prompts", tmp_path / "p.jsonl", "--ask", 0), ALONE)


def test_prompts_are_told_by_what_the_file_holds(tmp_path):
    (tmp_path / "p.json").write_text('\n{"prompt": "a red\u2028circle", "tag": "colors"}\n')
    (tmp_path / "p.txt").write_text("a red\u2028circle\r\n\na square")
    assert files.read_prompts(str(tmp_path / "p.json")) == [{"tag": "colors", "include": [], "prompt": "a red\u2028circle"}]
    assert [m["prompt"] for m in files.read_prompts(str(tmp_path / "p.txt"))] == ["a red\u2028circle", "a square"]


def test_samples_of_a_prompt_from_a_file_differ(tmp_path, monkeypatch):
    grids = []
    monkeypatch.setattr(train.evaluation, "save_grid", lambda images, path, columns: grids.append(images))
    (tmp_path / "p.txt").write_text("a red circle")
    train.train(small(tmp_path, "--prompts", tmp_path / "p.txt", "--steps", 0, "--ins", 0, "--think", 0, "--ask", 0, "--eval_every", 1), ALONE)
    assert len(grids[0]) == 16 and len(grids[0].flatten(1).unique(dim=0)) == 16


def test_questions_are_checked_before_the_run(tmp_path):
    from PIL import Image
    Image.new("RGB", (16, 16)).save(tmp_path / "i.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "i.png").read_bytes()[:40])
    row = dict(image="i.png", question="what ?", answer="a")
    for last, words in ((row | {"image": "cut.png"}, "cut.png cannot be read"), (row | {"question": "what " * 200}, "longer than the context")):
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, [row] * 8 + [last])))
        with pytest.raises(ValueError, match=words):
            train.begin(small(tmp_path, "--questions", tmp_path / "q.jsonl", "--draw", 0, "--think", 0), ALONE)


def test_prompts_and_questions_from_files_train(tmp_path):
    from PIL import Image
    Image.new("RGBA", (40, 20), (200, 0, 0, 90)).save(tmp_path / "i.png")
    (tmp_path / "p.txt").write_text("a red circle\n\na blue square\n")
    (tmp_path / "q.jsonl").write_text(json.dumps(dict(image="i.png", question="how many circles ?", answer="zero")) + "\n")
    train.train(small(tmp_path / "draw", "--prompts", tmp_path / "p.txt", "--ask", 0, "--ins", 0, "--steps", 1), ALONE)
    assert "draw/rewards/sem/mean" in records(tmp_path / "draw")[1]
    train.train(small(tmp_path / "ask", "--questions", tmp_path / "q.jsonl", "--draw", 0, "--think", 0, "--steps", 1), ALONE)
    assert "ask/rewards/accuracy/mean" in records(tmp_path / "ask")[1]
    cfg = small(tmp_path / "ask", "--questions", tmp_path / "q.jsonl", "--draw", 0, "--think", 0)
    (batch,) = tasks.Source(cfg, load_policy(cfg.policy)).batches(0, ALONE)
    assert [row.source.shape for row in batch.rows] == [(3, 448, 448)] * 2      # as large as the published judge reads


@pytest.mark.skipif(not GENEVAL.exists(), reason="GenEval's metadata is not part of the repository")
def test_genevals_metadata_are_prompts():
    rows = files.read_prompts(str(GENEVAL))
    assert len(rows) == 553 and {r["tag"] for r in rows} == set(shapes.TAGS)


def test_a_prompt_longer_than_the_context_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("red " * 500)
    with pytest.raises(ValueError, match="longer than the context"):
        train.begin(small(tmp_path, "--prompts", tmp_path / "p.txt", "--ask", 0, "--ins", 0), ALONE)


@pytest.mark.parametrize("more, words", [
    (["--micro", -1], "--micro -1: must be at least 0"), (["--epochs", 0], "--epochs 0"), (["--temperature", 0], "above 0"),
    (["--window_high", 6], "does not fit in 5 noisy steps"), (["--sem", 0, "--ins", 0, "--kn", 0], "--draw has no reward"),
    (["--draw", 0, "--think", 0, "--ask", 0, "--edit", 0], "nothing to learn from")])
def test_settings_that_cannot_work_are_refused_before_loading(tmp_path, more, words):
    with pytest.raises(ValueError, match=words):
        check(small(tmp_path, *more), ALONE)


def test_a_torn_log_resumes_and_keeps_its_evaluations(tmp_path, monkeypatch):
    monkeypatch.setattr(train.evaluation, "evaluate", lambda policy: {"draw": (0.5, 0.1)})
    more = ["--eval_every", "2"]
    monkeypatch.setattr(train.evaluation, "before_after", lambda *a: None)
    monkeypatch.setattr(train.evaluation, "plot", lambda *a: None)
    train.train(small(tmp_path, "--steps", 2, *more), ALONE)
    with (tmp_path / "log.jsonl").open("a") as f:
        f.write('{"step": 2, "sec')
    train.train(small(tmp_path, "--steps", 4, "--resume", *more), ALONE)
    assert [r["step"] for r in records(tmp_path)[1:] if "eval" in r] == [0, 2, 4]
    assert [r["step"] for r in records(tmp_path)[1:] if "eval" not in r] == [0, 1, 2, 3]


def test_a_failure_in_mid_run_keeps_the_steps_before_it(tmp_path, monkeypatch):
    whole, calls = train.one_step, []

    def breaks(run, step):
        calls.append(step)
        if step == 2:
            raise ValueError("the image is gone")
        return whole(run, step)

    monkeypatch.setattr(train, "one_step", breaks)
    with pytest.raises(ValueError, match="the image is gone"):
        train.train(small(tmp_path, "--steps", 5), ALONE)
    assert int(checkpoint(tmp_path)["step"]) == 2 and calls == [0, 1, 2]


@pytest.mark.parametrize("bad, words", [
    (lambda s: torch.full((len(s.prompts),), float("nan")), "reward 'sem' failed on prompt '.+nan"),
    (lambda s: torch.zeros(3, 2), "reward 'sem' failed on prompt '.+expected a float tensor"),
    (lambda s: 1 / 0, r"reward 'sem' failed on prompt '.+ZeroDivisionError.+\(test_train.py:\d+\)")])
def test_a_broken_reward_stops_the_run_with_its_name_and_the_prompt(tmp_path, bad, words):
    run = train.begin(small(tmp_path), ALONE)
    run.rewards["sem"] = bad
    with pytest.raises(RuntimeError, match=words) as error:
        train.one_step(run, 0)
    assert "\n" not in str(error.value)


# ---- it learns ----


def test_the_reward_of_a_short_run_rises(tmp_path, monkeypatch):
    """Twenty steps on prompts of one tag, whose difficulty varies little from step to step: reward and truth rise far beyond their noise,
    and variety stays."""
    every = shapes.prompts
    monkeypatch.setattr(shapes, "prompts", lambda split: [m for m in every(split) if m["tag"] == "colors"])
    train.train(parse(["--draw", "8", "--think", "0", "--ask", "0", "--edit", "0", "--sem", "0", "--kn", "0", "--image_beta", "0", "--steps", "20",
                       "--eval_every", "0", "--out", str(tmp_path)]), ALONE)
    rows = records(tmp_path)[1:]
    for key, least in (("draw/reward", 0.03), ("draw/truth", 0.1)):
        value = torch.tensor([r[key] for r in rows])
        first, last = value[:6], value[-6:]
        assert last.mean() - first.mean() > max(least, 3 * (first.var() / 6 + last.var() / 6).sqrt()), key
    assert rows[-1]["draw/layout_entropy"] > 0.8 * rows[0]["draw/layout_entropy"]


# ---- what is asked ----


def texts(batch):
    return [row.text for row in batch.rows]


def world(tmp_path, *more):
    """Source.batches of a small configuration, by task."""
    cfg = small(tmp_path, *more)
    here = tasks.Source(cfg, load_policy(cfg.policy))
    return lambda step=0, ranks=ALONE: {b.task: b for b in here.batches(step, ranks)}


def test_every_step_and_every_seed_asks_anew(tmp_path):
    more = "--draw", 8, "--think", 8, "--ask", 8
    runs = [world(tmp_path, *more, "--seed", seed)(step) for seed, step in ((0, 0), (0, 1), (1, 0))]
    for task in ("draw", "think"):
        assert len({tuple(texts(r[task])) for r in runs}) == 3
    assert len({sum(row.source.sum().item() for row in r["ask"].rows) for r in runs}) == 3


def test_tags_are_asked_equally_often_however_many_prompts_they_have(tmp_path):
    batches = world(tmp_path, "--draw", 24)
    tags = [row.metadata["tag"] for step in range(40) for row in batches(step)["draw"].rows]
    assert set(tags) == set(shapes.TAGS)
    assert all(0.8 / 6 < tags.count(tag) / len(tags) < 1.2 / 6 for tag in shapes.TAGS)


@pytest.mark.parametrize("files", [False, True])
def test_ranks_share_the_steps_prompts_and_each_prompt_has_an_index_of_its_own(tmp_path, files):
    from PIL import Image
    more = ["--draw", 4, "--think", 4, "--ask", 4]
    if files:
        for i in range(6):
            Image.new("RGB", (32, 32), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows = [json.dumps(dict(image=f"{i}.png", question=f"what is {i} ?", answer=str(i))) for i in range(6)]
        (tmp_path / "q.jsonl").write_text("\n".join(rows))
        more = ["--draw", 0, "--think", 0, "--ask", 4, "--questions", tmp_path / "q.jsonl"]
    batches = world(tmp_path, *more)
    whole, halves = batches(), [batches(0, Ranks(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    indices = [i for b in whole.values() for i in b.index]
    assert indices == list(range(4 * len(whole)))
    for task, b in whole.items():
        assert [p for half in halves for p in texts(half[task])] == texts(b)
        assert [i for half in halves for i in half[task].index] == b.index
    assert all(torch.equal(a.source, b.source) for a, b in zip([row for half in halves for row in half["ask"].rows], whole["ask"].rows))


def test_every_task_writes_at_the_temperature_of_the_run(tmp_path):
    for batch in world(tmp_path, "--temperature", 0.7)().values():
        assert (batch.choices.think.temperature, batch.choices.answer.temperature) == (0.7, 0.7)


# ---- one update ----


def test_rewards_see_each_sample_beside_its_own_prompt_source_and_answer(tmp_path):
    run, seen = train.begin(small(tmp_path, "--draw", 0, "--think", 0), ALONE), []
    judge = run.rewards["kn"]
    run.rewards["kn"] = lambda samples: seen.append(samples) or judge(samples)
    train.one_step(run, 0)
    (batch, _, _), (samples,) = run.work[0], seen
    for i in range(8):
        assert samples.prompts[i] == batch.rows[i // 4].text and samples.answers[i] == batch.rows[i // 4].answer
        assert torch.equal(samples.sources[i], batch.rows[i // 4].source)


def test_components_are_added_then_normalised_or_normalised_then_added(tmp_path):
    parts, weights = {"sem": torch.tensor([0.0, 0.1, 0.2, 0.3] * 2), "ins": torch.tensor([0.0, 1, 1, 0, 1, 1, 1, 1])}, {"sem": 1.0, "ins": 2.0}
    for how in ("sum", "each"):
        cfg = small(tmp_path, "--normalise", how, "--sem", 1, "--ins", 2)
        adv, stats = train.compared(parts, weights, 2, cfg, ALONE)
        want = rewards.combine(grpo.normalised(parts, 4), weights) if how == "each" else group_advantage(rewards.combine(parts, weights), 4)
        torch.testing.assert_close(adv, want)
        assert stats["reward"] == pytest.approx(0.15 + 2 * 0.75)
        assert (stats["advantage_share/sem"] < 0.1) == (how == "sum")


def test_losses_are_averaged_over_sampled_tokens_and_noisy_steps(tmp_path):
    run = train.begin(small(tmp_path), ALONE)
    train.one_step(run, 0)
    for batch, r, _ in run.work:
        text, image = tasks.counts(r, "token", 9).tolist()
        chosen = [s.chosen for s in r.segments if isinstance(s, Text) and s.chosen is not None]
        assert text == (0 if batch.task == "draw" else chosen[0].sum().item())
        assert tasks.counts(r, "sequence", 9).tolist() == [0 if batch.task == "draw" else 8, image]
        assert image == (0 if batch.task == "ask" else 8 * run.cfg.window)


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_micro_batches_that_do_not_divide_the_prompts_leave_the_gradient_equal(tmp_path, unit):
    more = "--draw", 3, "--think", 3, "--ask", 3, "--text_average", unit
    whole, parts = gradients(tmp_path, *more), gradients(tmp_path, *more, "--micro", 8)
    for n in whole:
        assert (whole[n] - parts[n]).norm() <= 1e-4 * whole[n].norm() + 1e-6, n


@pytest.mark.parametrize("more", [["--ratio_norm", "--no-step_weights", "--text_average", "sequence"],
                                  ["--no-ratio_norm", "--step_weights", "--text_average", "token"]])
def test_a_segment_is_weighed_clipped_and_held_to_the_reference_as_the_config_says(tmp_path, more):
    run = train.begin(small(tmp_path, "--text_clip", 0.01, "--image_clip", 1e-4, "--text_beta", 0.3, "--image_beta", 0.5, "--mse_weight", 0.7,
                            "--image_weight", 20, "--window_high", 4, *more), ALONE)
    train.one_step(run, 0)
    cfg, totals, adv = run.cfg, dict(text=50.0, image=30.0), torch.linspace(-1, 1, 8)
    for batch, r, _ in run.work:
        with torch.no_grad():
            pairs = list(zip(replay_rollout(run.policy, r), replay_rollout(run.frozen, r)))
        for scored, ref in pairs:
            s, loss = scored.segment, train.segment_loss(scored, ref, adv, totals, cfg)[0]
            if isinstance(s, Text):
                plain, _ = grpo_loss(scored.logp, s.logp, adv, s.chosen, total=50.0, per=cfg.text_average, low=0.01, high=0.01, beta=0.3,
                                     logp_ref=ref.logp)
            else:
                weights = flow_grpo.step_weights(s.flow.times, s.flow.window, normalise=True) if cfg.step_weights else None
                plain = 20 * flow_grpo.flow_grpo_loss(scored.flow, s.flow, adv, total=30.0, low=1e-4, high=1e-4, ratio_norm=cfg.ratio_norm,
                                                      weights=weights, reference=ref.flow, kl_beta=0.5, mse_weight=0.7)[0]
            assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_the_reference_of_full_training_is_the_policy_at_the_start(tmp_path):
    train.train(small(tmp_path, "--epochs", 1, "--steps", 2), ALONE)
    first, second = (r["draw/image/velocity_mse"] for r in records(tmp_path)[1:])
    assert first < 1e-10 < 1e-8 < second


def test_every_epoch_is_one_step_of_the_optimiser(tmp_path):
    train.train(small(tmp_path, "--steps", 2, "--epochs", 3), ALONE)
    assert {int(v) for k, v in checkpoint(tmp_path).items() if k.startswith("adamw.step.")} == {6}


def test_an_epoch_starts_from_no_gradient(tmp_path):
    """At learning rate 0 every epoch has the same gradient."""
    one, three = gradients(tmp_path, "--epochs", 1), gradients(tmp_path, "--epochs", 3)
    for n in one:
        assert (one[n] - three[n]).norm() <= 1e-5 * one[n].norm() + 1e-7, n


def test_the_gradient_is_clipped_to_the_norm_of_the_config(tmp_path):
    clipped = gradients(tmp_path, "--grad_clip", 1e-3)
    assert torch.stack([g.norm() for g in clipped.values()]).norm().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("moves, rates", [("understanding", (1e-3, 0)), ("generation", (0, 1e-3))])
def test_each_expert_has_its_own_learning_rate(tmp_path, moves, rates):
    run = train.begin(small(tmp_path, "--lr_understanding", rates[0], "--lr_generation", rates[1]), ALONE)
    before = {k: [p.detach().clone() for p in group] for k, group in run.policy.trainable_by_expert().items()}
    train.one_step(run, 0)
    for k, group in run.policy.trainable_by_expert().items():
        assert any(not torch.equal(a, b) for a, b in zip(before[k], group)) == (k == moves)


def test_the_control_imitates_with_the_optimiser_and_the_clip_of_the_run(tmp_path, monkeypatch):
    from toy import pretrain
    corpus = pretrain.Corpus
    monkeypatch.setattr(pretrain, "Corpus", lambda policy, seed: corpus(policy, seed, pictures=96, thoughts=64, scenes=64, edits=96))
    run = train.begin(small(tmp_path, "--recipe", "control", "--grad_clip", 1e-3), ALONE)
    stats = train.one_step(run, 0)
    grads = torch.stack([p.grad.norm() for p in checkpoint.trainable(run.policy).values() if p.grad is not None])
    assert run.frozen is None and stats["loss"] > 0 and grads.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_log_entries_of_micro_batches_are_means_but_for_min_and_max():
    assert ALONE.combined({"a/mean": [1.0, 2.0, 6.0], "a/min": [2.0, 1.0, 3.0], "a/max": [2.0, 3.0, 1.0]}) == \
        {"a/mean": 3.0, "a/min": 1.0, "a/max": 3.0}


def test_the_seed_of_a_run_decides_its_adapters(tmp_path):
    weights = [run.policy.blocks[0].experts[0].q.A.detach().clone() for run in
               (train.begin(small(tmp_path / str(i), "--lora", 2, "--seed", seed), ALONE) for i, seed in enumerate((0, 0, 1)))]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# ---- the average, the checkpoint, the log ----


def test_the_average_moves_by_one_minus_its_decay_and_steps_in_for_a_while():
    policy = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(policy.weight, 1.0)
    average = Average(policy, 0.75)
    torch.nn.init.constant_(policy.weight, 5.0)
    average.update(policy)
    with average.swapped(policy):
        assert policy.weight.item() == 2.0                      # 0.75 * 1 + 0.25 * 5
    assert policy.weight.item() == 5.0


def test_the_exported_policy_is_the_average(tmp_path):
    train.train(small(tmp_path, "--steps", 2), ALONE)
    saved, exported = checkpoint(tmp_path), load_policy(tmp_path / "policy").state_dict()
    averages = {k.removeprefix("average."): v for k, v in saved.items() if k.startswith("average.")}
    assert averages and all(torch.equal(exported[n], v) for n, v in averages.items())
    assert any(not torch.equal(saved[f"policy.{n}"], v) for n, v in averages.items())


def test_a_checkpoint_of_another_adapter_rank_is_refused_with_both_shapes(tmp_path):
    train.train(small(tmp_path, "--steps", 1, "--lora", 2), ALONE)
    with pytest.raises(ValueError, match=r"has shape \(.*\), the policy \("):
        train.begin(small(tmp_path, "--steps", 2, "--lora", 4, "--resume"), ALONE)


def test_a_log_ahead_of_its_checkpoint_goes_back_to_it_and_its_clock_goes_on(tmp_path):
    train.train(small(tmp_path, "--steps", 2), ALONE)
    rows = [dict(r, seconds=1000.0 + r["step"]) for r in records(tmp_path)[1:]]
    ahead = [dict(step=2, seconds=1002.0, eval={}), dict(step=2, seconds=1003.0), dict(step=3, seconds=1004.0, eval={})]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [records(tmp_path)[0], *rows, *ahead])))
    train.train(small(tmp_path, "--steps", 3, "--resume"), ALONE)
    assert [(r["step"], "eval" in r) for r in records(tmp_path)[1:]] == [(0, False), (1, False), (2, True), (2, False)]
    assert records(tmp_path)[-1]["seconds"] >= 1002.0


def test_a_run_that_starts_anew_keeps_the_old_log_and_checkpoint(tmp_path):
    train.train(small(tmp_path, "--steps", 1), ALONE)
    old = (tmp_path / "log.jsonl").read_text()
    train.train(small(tmp_path, "--steps", 1, "--seed", 1), ALONE)
    assert (tmp_path / "previous" / "log.jsonl").read_text() == old and records(tmp_path)[0]["config"]["seed"] == 1
    assert load_file(tmp_path / "previous" / "checkpoint.safetensors")["step"] == 1
    train.train(small(tmp_path, "--steps", 0), ALONE)
    assert (tmp_path / "previous2" / "log.jsonl").exists() and not (tmp_path / "checkpoint.safetensors").exists()


def test_the_rank_that_fails_keeps_the_steps_before_it(tmp_path, monkeypatch):
    run = train.begin(small(tmp_path), ALONE)
    run.ranks = Ranks(1, 2, torch.device("cpu"))
    train.keep(run, 5)
    assert not (tmp_path / "checkpoint.safetensors").exists()
    train.keep(run, 5, writer=1)
    assert [p.name for p in tmp_path.glob("checkpoint*")] == ["checkpoint.safetensors"] and int(checkpoint(tmp_path)["step"]) == 5


def test_checkpoints_come_after_every_save_every_steps_and_at_the_end(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(train, "keep", lambda run, step: saved.append(step))
    train.train(small(tmp_path, "--steps", 5, "--save_every", 2), ALONE)
    assert saved == [2, 4, 5]


def test_a_failure_in_the_first_step_leaves_no_checkpoint(tmp_path, monkeypatch):
    def breaks(run, step):
        raise ValueError("the image is gone")

    monkeypatch.setattr(train, "one_step", breaks)
    with pytest.raises(ValueError, match="the image is gone"):
        train.train(small(tmp_path, "--steps", 1), ALONE)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_both_signals_are_noted_and_the_old_handlers_come_back():
    numbers = signal.SIGINT, signal.SIGTERM
    old = [signal.getsignal(n) for n in numbers]
    with signals() as seen:
        for n in numbers:
            signal.raise_signal(n)
    assert seen == ["SIGINT", "SIGTERM"] and [signal.getsignal(n) for n in numbers] == old


def test_every_rank_keeps_its_own_bad_step(tmp_path):
    run = train.begin(small(tmp_path), ALONE)
    for rank in (0, 1):
        run.save_bad_step(tmp_path, rank, run.policy, 3, None)
    assert sorted(p.name for p in tmp_path.glob("bad_step_*")) == ["bad_step_0.safetensors", "bad_step_1.safetensors"]
