"""The evaluation: held-out rows, their truth by the tag, honest errors, changes row by row; and the
logs that hold it.
"""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
from eval import mean_and_error, paired_change, sample_task, summary, table_of
from rewards import Samples
from sample import SAMPLING, TOY
from support.checkpoint import load_policy
from support.plots import by_settings, curve, plot
from support.rows import Row
from support.run import read_log
from tasks import TASKS
from toy import shapes, world

# ---- held-out rows ----


def test_held_out_prompts_are_evaluation_prompts_of_every_tag():
    known, unseen = world.held_out_prompts("test"), world.held_out_prompts("unseen")
    training = {metadata["prompt"] for metadata in shapes.prompts("train")}
    assert not {row.text for row in known + unseen} & training
    assert {row.metadata["tag"] for row in known} == set(shapes.TAGS)
    assert not any("held_out" in row.metadata for row in known)
    assert all("held_out" in row.metadata for row in unseen)


@pytest.mark.parametrize("pairs", [False, True])
def test_held_out_questions_are_about_evaluation_scenes_and_cover_the_kinds(monkeypatch, pairs):
    scenes, ask = [], world.question_row
    monkeypatch.setattr(world, "QUESTIONS", 100)
    monkeypatch.setattr(world, "question_row", lambda *asked: scenes.append(asked[0]) or ask(*asked))
    kinds = [row.metadata["tag"] for row in world.held_out_questions("unseen" if pairs else "test")]
    assert {shapes.scene_split(scene) for scene in scenes} == {"eval"}
    assert {shapes.shows_held_out(scene) for scene in scenes} == {pairs}
    assert {kinds.count(kind) for kind in world.KINDS} == {len(kinds) // len(world.KINDS)}


def test_spaced_rows_go_from_the_first_to_the_last():
    assert world.evenly_spaced(list(range(10)), 4) == [0, 3, 6, 9]
    assert world.evenly_spaced([1, 2], 4) == [1, 2]


# ---- truth ----


def paint(scenes):
    """(N, 3, 32, 32) in [0, 1]."""
    return world.render_pixels(scenes) * 0.5 + 0.5


def sample_by_hand(scene_of):
    """In place of `sample_task`: right answers and thoughts, and pictures of scene_of(metadata)."""

    def sample(policy, task, rows, seed, G, guidance=1.0):
        rows, texts = [row for row in rows for _ in range(G)], []
        images = paint([scene_of(row.metadata) for row in rows]) if task.draws else None
        for row in rows:
            right = row.answer or row.metadata.get("thought")
            right = right or f"<think> {shapes.RIGHT} </think> {shapes.explicit(row.metadata)}"
            if task.form == "answer":
                right = f"<think> so </think> <answer> {right} </answer>"
            texts.append(right)
        return Samples(
            [row.text for row in rows], [row.metadata for row in rows], texts, images,
            sources=images, earlier=images, answers=[row.answer for row in rows],
            options=[row.options for row in rows], formats=[task.form] * len(rows))

    return sample


@pytest.fixture
def small(monkeypatch):
    """Few held-out rows."""
    for name, value in dict(PROMPTS_PER_TAG=3, THOUGHTS=4, QUESTIONS=20, EDITS=12).items():
        monkeypatch.setattr(world, name, value)


def test_a_perfect_painter_scores_one_and_its_samples_stay_with_their_prompts(monkeypatch, small):
    rng = np.random.default_rng(0)

    def scene_of(metadata):
        if "target" in metadata:
            return [shapes.Object(*thing) for thing in metadata["target"]]
        return shapes.sample_scene(metadata, rng, training=False)

    monkeypatch.setattr(evaluation, "sample_task", sample_by_hand(scene_of))
    monkeypatch.setattr(evaluation, "captions_truth", lambda policy, seed: np.ones(3))
    knows_all = SimpleNamespace(reads_latents=True)
    table = table_of(evaluation.evaluate_rows(knows_all))
    assert {name for name, task in TASKS.items() if task.held_out} <= table.keys()
    others = ("layout_entropy", "distance", "repaired", "spoiled", "kept", "saturation", "roughness")
    assert {mean for name, (mean, _) in table.items() if not name.endswith(others)} == {1.0}
    assert table["reflect/repaired"][0] == table["rounds/spoiled"][0] == 0.0
    assert table["draw"][1] == 0.0


def test_shares_are_of_rows_and_the_mean_weighs_tags_equally(monkeypatch):
    rows = [Row("", {"tag": tag}) for tag in ["few"] * 2 + ["many"] * 4]
    right = torch.tensor([1, 0, 1, 0, 0, 0]).repeat_interleave(2)                   # two samples each
    task = replace(
        TASKS["ask"], truth=lambda samples, found: right, tags=("few", "many"), mean_of_tags=True,
        held_out=lambda split: rows if split == "test" else [])
    monkeypatch.setattr(evaluation, "sample_task", lambda *_: None)
    table = table_of(evaluation.evaluate_task(None, task, 0, 1.0, 2))
    assert table["ask/few"] == pytest.approx((1 / 2, 1 / 2))
    assert table["ask/many"] == pytest.approx((1 / 4, 1 / 4))
    assert table["ask"] == pytest.approx((3 / 8, math.hypot(1 / 2, 1 / 4) / 2))


@pytest.mark.parametrize(
    "name, low, high", [("draw", 0.2, 0.55), ("ask", 0.55, 0.9), ("choose", 0.5, 0.9)]
)
def test_the_base_is_useful_but_imperfect(monkeypatch, name, low, high):
    monkeypatch.setattr(world, "QUESTIONS", 200)
    table = table_of(evaluation.evaluate_task(load_policy(TOY), TASKS[name], 0, 1.0, 2))
    assert low <= table[name][0] <= high


def test_thoughts_are_evaluated_greedily():
    """Samples of a prompt differ by their noise alone."""
    texts = sample_task(
        load_policy(TOY), TASKS["think"], world.held_out_riddles("test")[:4], seed=0, G=6).texts
    assert all(len(set(texts[i:i + 6])) == 1 for i in range(0, 24, 6))


# ---- tables ----


def test_errors_are_standard_errors_of_the_mean():
    assert mean_and_error([0.0, 1.0, 1.0, 0.0]) == pytest.approx((0.5, math.sqrt(1 / 3) / 2))
    assert math.isnan(mean_and_error([1.0])[1])


def test_a_change_is_paired_by_row_so_that_hard_prompts_cancel():
    easy, hard = np.array([0.9, 0.8, 1.0]), np.array([0.1, 0.0, 0.2])
    before = {"draw": [easy, hard], "layout_entropy": [np.array([2.0])]}
    after = {"draw": [easy - 0.1, hard + 0.3], "layout_entropy": [np.array([1.5])]}
    change = paired_change(before, after)
    assert change["draw"] == pytest.approx((0.1, 0.0), abs=1e-9)
    assert change["layout_entropy"] == pytest.approx((-0.5, math.nan), nan_ok=True)


def test_a_policy_does_not_change_against_itself(monkeypatch, small, tmp_path, capsys):
    monkeypatch.setitem(SAMPLING["toy"], "steps", 2)
    out = tmp_path / "e.json"
    evaluation.main(["--against", str(TOY), "--samples", "2", "--out", str(out)])
    held = json.loads(out.read_text())
    assert (held["guidance"], held["samples"], held["split"]) == (1.0, 2, "test")
    assert held["against"] == str(TOY)
    assert held["change"].keys() == held["table"].keys()
    assert {moved for moved, _ in held["change"].values()} == {0.0}
    assert "before     after    change" in capsys.readouterr().out


# ---- logs ----

HEAD = {"config": {"recipe": "lvrpo", "seed": 0}}
TITLES = {name: task.title for name, task in TASKS.items()}
EVAL = {"draw": [0.5, 0.01], "ask": [0.5, 0.01], "layout_entropy": [2.0, None]}


def write_log(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_logs_plot_and_sum_up_with_torn_lines_and_other_keys(tmp_path):
    """As a crash leaves them, and a run that was resumed with other tasks."""
    first = {"step": 0, "seconds": 1.0, "eval": EVAL}
    steps = [{"step": 0, "seconds": 9.0, "draw/reward": 1.0}, {"step": 1, "seconds": 9.0, "ask/reward": 1.0}]
    last = {"step": 9, "seconds": 61.0, "eval": {"draw": [0.75, 0.01], "think": [0.1, 0.1]}}
    torn = ['{"step": 1, "sec', "", "null", "\x00\x00"]
    log = write_log(tmp_path / "log.jsonl", HEAD, first, *torn, *steps, last, torn[0])
    assert [row["step"] for row in read_log(log)[1]] == [0, 0, 1, 9]
    assert "+0.250 +- 0.014" in summary(log)
    plot([log, write_log(tmp_path / "other.jsonl", HEAD, last)], tmp_path / "curves.png", TITLES)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("content", ['{"a": 1}\n', "3\n", ""])
def test_a_file_that_is_no_log_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="no line of it holds the config"):
        read_log(write_log(tmp_path / "x.jsonl", content))


def test_runs_that_differ_in_the_seed_alone_are_one_curve_with_the_error_over_seeds():
    def run(seed, kn, *truths):
        head = {"config": {"recipe": "lvrpo", "seed": seed, "out": str(seed), "kn": kn}}
        rows = []
        for step, truth in enumerate(truths):
            rows.append({"step": step, "seconds": 60.0 * step, "eval": {"draw": [truth, 0.01]}})
        return head, rows

    runs = [run(0, 1, 0.25, 0.5), run(1, 1, 0.25, 0.75, 0.9), run(0, 0, 0.25, 0.3)]
    (_, one), (_, other) = runs[:2]
    assert by_settings(runs) == [runs[:2], runs[2:]]
    assert curve([one], "draw").T.tolist() == [[0, 0.25, 0.01], [1, 0.5, 0.01]]
    assert curve([one, other], "draw").T.tolist() == [[0, 0.25, 0.0], [1, 0.625, 0.125]]


def test_a_log_without_evaluations_is_not_plotted(tmp_path):
    log = write_log(tmp_path / "x.jsonl", HEAD, {"step": 0, "seconds": 1.0})
    with pytest.raises(ValueError, match="holds no evaluation to plot"):
        plot([log], tmp_path / "curves.png", TITLES)
