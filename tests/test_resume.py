"""What a run keeps: a resumed run is the uninterrupted one, and no kill, signal or full disk loses
more than a step.
"""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny_runs import ALONE, checkpoint, flags_of, records, small

import eval as evaluation
import train
from recipes import parse
from support.checkpoint import load_policy, save_tensors
from support.run import Average, Ranks, load_checkpoint

ROOT = Path(train.__file__).parent
STUB = {"loss": 0.0, "grad_norm": 0.0}          # what a step logs that does nothing


@pytest.fixture
def run_folder(tiny, tmp_path):
    """A folder in which two steps of lvrpo lie, to go on from."""
    for name in ("log.jsonl", "checkpoint.safetensors"):
        shutil.copy(tiny("lvrpo").out / name, tmp_path)
    return tmp_path


def assert_equal(tensors, others):
    torch.testing.assert_close(tensors, others, rtol=0, atol=0)


def resume(out, *flags):
    train.train(parse(flags_of("lvrpo", out, "--resume", *flags)), ALONE)


# ---- the same run ----


@pytest.mark.parametrize("recipe", ["lvrpo", "lvrpo --image_loss awm", "unigrpo", "unifpo"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tiny, tmp_path, recipe):
    train.train(parse(flags_of(recipe, tmp_path, "--steps 1")), ALONE)
    train.train(parse(flags_of(recipe, tmp_path, "--resume")), ALONE)
    assert int(checkpoint(tmp_path)["step"]) == 2
    assert_equal(checkpoint(tiny(recipe).out), checkpoint(tmp_path))
    for row, other in zip(tiny(recipe).rows, records(tmp_path), strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}


def test_kill_9_loses_nothing_but_the_step_that_it_hits(tiny, tmp_path):
    flags = flags_of("lvrpo", tmp_path, "--steps 400 --save_every 1")
    process = subprocess.Popen(
        [sys.executable, "train.py", *flags], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "log.jsonl").exists() or len(records(tmp_path)) < 3:
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    done = int(checkpoint(tmp_path)["step"])
    assert done >= len(records(tmp_path)) - 1   # the last row may be ahead of it
    resume(tmp_path, "--steps", done + 1)
    rows = records(tmp_path)
    assert [row["step"] for row in rows] == list(range(done + 1))
    for row, other in zip(tiny("lvrpo").rows, rows):
        assert row["think/reward"] == pytest.approx(other["think/reward"], rel=1e-3)


def test_a_signal_ends_the_step_saves_and_stops(tmp_path, monkeypatch, capsys):
    def step_with_a_signal(run, step):
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return STUB

    monkeypatch.setattr(train, "one_step", step_with_a_signal)
    train.train(small(tmp_path, "--steps 9"), ALONE)
    assert int(checkpoint(tmp_path)["step"]) == 2
    assert [row["step"] for row in records(tmp_path)] == [0, 1]
    assert "stopped after 2 steps, checkpoint saved; go on with --resume" in capsys.readouterr().err
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("place", ["sample_plan", "piece_loss"])
def test_a_signal_inside_a_step_leaves_the_step_before_any_weight_moves(
    tiny, tmp_path, monkeypatch, place
):
    """In the second of two parts of a rollout, or of the micro-batches of an update."""
    calls, inner = [], getattr(train, place)

    def call_with_a_signal(*args, **kwargs):
        calls.append(place)
        signal.raise_signal(signal.SIGTERM)
        return inner(*args, **kwargs)

    train.train(parse(flags_of("lvrpo", tmp_path, "--steps 1")), ALONE)
    before = checkpoint(tmp_path)
    assert int(before["step"]) == 1
    monkeypatch.setattr(train, place, call_with_a_signal)
    flags = flags_of("lvrpo", tmp_path, "--resume --steps 3 --micro 4 --rollout_batch 4")
    assert train.train(parse(flags), ALONE) == 128 + signal.SIGTERM
    assert calls == [place]
    assert_equal(checkpoint(tmp_path), before)
    monkeypatch.undo()
    resume(tmp_path)
    assert_equal(checkpoint(tmp_path), checkpoint(tiny("lvrpo").out))


# ---- when, by whom and what is kept ----


def test_checkpoints_come_after_every_save_every_steps_and_at_the_end(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(train, "one_step", lambda run, step: STUB)
    monkeypatch.setattr(train, "keep", lambda run, step: saved.append(step))
    train.train(small(tmp_path, "--steps 5 --save_every 2"), ALONE)
    assert saved == [2, 4, 5]


@pytest.mark.parametrize("failing, kept", [(2, 2), (0, None)])
def test_a_failure_keeps_the_steps_before_it(tmp_path, monkeypatch, failing, kept):
    def step_or_fail(run, step):
        if step == failing:
            raise ValueError("the image is gone")
        return STUB

    monkeypatch.setattr(train, "one_step", step_or_fail)
    with pytest.raises(ValueError, match="the image is gone"):
        train.train(small(tmp_path, "--steps 5"), ALONE)
    if kept:
        assert int(checkpoint(tmp_path)["step"]) == kept
    else:
        assert not (tmp_path / "checkpoint.safetensors").exists()


def test_the_rank_that_fails_keeps_the_steps_before_it(tiny, tmp_path):
    """Ranks hold equal weights, and the others may hang."""
    run = tiny("lvrpo").run
    run = dataclasses.replace(
        run, ranks=Ranks(1, 2, ALONE.device), cfg=dataclasses.replace(run.cfg, out=str(tmp_path)))
    train.keep(run, 5)
    assert not list(tmp_path.iterdir())
    train.keep(run, 5, writer=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    assert int(checkpoint(tmp_path)["step"]) == 5


def test_the_average_moves_by_one_minus_its_decay_and_stands_in_for_a_while():
    policy = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(policy.weight, 1.0)
    average = Average(policy, 0.75)
    torch.nn.init.constant_(policy.weight, 5.0)
    average.update(policy)
    with average.in_place_of(policy):
        assert policy.weight.item() == 2.0      # 0.75 * 1 + 0.25 * 5
    assert policy.weight.item() == 5.0


def test_the_exported_policy_is_the_average(tiny):
    out = tiny("lvrpo").out
    saved, exported = checkpoint(out), load_policy(out / "policy").state_dict()
    averages = {k.removeprefix("average."): v for k, v in saved.items() if k.startswith("average.")}
    assert_equal(averages, {name: exported[name] for name in averages})
    assert any(not torch.equal(saved[f"policy.{name}"], averages[name]) for name in averages)


# ---- what is gone on from ----


@pytest.mark.parametrize("name", ["log.jsonl", "checkpoint.safetensors", "checkpoint"])
def test_a_folder_that_holds_a_run_is_refused_and_left_alone(run_folder, name):
    for path in list(run_folder.iterdir()):
        if path.name != name:
            path.unlink()
    if name == "checkpoint":
        (run_folder / name).mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in run_folder.iterdir()}
    with pytest.raises(ValueError, match="holds a run; --resume goes on, another --out begins anew"):
        train.begin(small(run_folder), ALONE)
    assert {path: path.is_file() and path.read_bytes() for path in run_folder.iterdir()} == before


def test_to_resume_needs_a_checkpoint_in_safetensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path, {})
    torch.save({"step": 1}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="pickled checkpoints are not read"):
        load_checkpoint(tmp_path, {})


@pytest.mark.parametrize("single, newest", [(1, 2), (3, 3)])
def test_the_newest_of_two_kinds_of_checkpoints_is_resumed(tmp_path, single, newest):
    """As a kill between two kinds of saves leaves them."""
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "checkpoint"))
    dcp.save({"a": torch.tensor(2.0), "step": torch.tensor(2)}, storage_writer=writer, no_dist=True)
    save_tensors(
        {"a": torch.tensor(float(single)), "step": torch.tensor(single)},
        tmp_path / "checkpoint.safetensors")
    tensors = {"a": torch.tensor(0.0)}
    assert load_checkpoint(tmp_path, tensors) == newest
    assert tensors["a"].item() == newest


def test_a_log_ahead_of_its_checkpoint_goes_back_to_it_and_its_clock_goes_on(
    run_folder, monkeypatch
):
    head, *rows = (run_folder / "log.jsonl").read_text().splitlines()
    rows = [json.loads(row) | {"seconds": 1000.0} for row in rows]
    rows += [
        dict(step=2, seconds=1002.0, eval={}), dict(step=2, seconds=1003.0, loss=0.0),
        dict(step=3, seconds=1004.0, eval={})]
    (run_folder / "log.jsonl").write_text("\n".join([head, *map(json.dumps, rows)]))
    monkeypatch.setattr(train, "one_step", lambda run, step: STUB)
    resume(run_folder, "--steps 3")
    rows = records(run_folder)
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert ["eval" in row for row in rows] == [False, False, True, False]
    assert rows[-1]["seconds"] >= 1002.0


def test_evaluations_come_when_they_are_due_and_no_resume_repeats_one(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "one_step", lambda run, step: STUB)
    monkeypatch.setattr(
        evaluation, "evaluate_rows", lambda policy: {"draw": [torch.ones(3).numpy()]})
    monkeypatch.setattr(evaluation, "preview", lambda *args: None)
    monkeypatch.setattr(evaluation, "picture_run", lambda *args: "")
    train.train(small(tmp_path, "--steps 2 --eval_every 2"), ALONE)
    train.train(small(tmp_path, "--steps 5 --eval_every 2 --resume"), ALONE)
    rows = records(tmp_path)
    assert [row["step"] for row in rows if "eval" in row] == [0, 2, 4, 5]
    assert [row["step"] for row in rows if "eval" not in row] == [0, 1, 2, 3, 4]
    assert rows[0]["eval"] == {"draw": [1.0, 0.0]}
