"""The evaluation judges the truth on held-out prompts, by the tag, with honest errors."""

import json
import math

import numpy as np
import pytest
import torch

import eval as evaluation
from toy import shapes
from checkpoint import load_policy
from eval import (draw_eval, evaluate, held_out_prompts, held_out_questions, markdown_row, mean_and_error, plot,
                  read_log, spaced, summary, truth)
from sample import TOY, to_bytes


def test_held_out_prompts_are_evaluation_prompts_of_every_tag():
    chosen = {m["prompt"] for m in held_out_prompts()}
    assert not chosen & {m["prompt"] for m in shapes.prompts("train")}
    assert {m["tag"] for m in held_out_prompts()} == set(shapes.TAGS)
    assert not any("held_out" in m for m in held_out_prompts()) and all("held_out" in m for m in held_out_prompts(pairs=True))
    assert not {m["prompt"] for m in held_out_prompts(pairs=True)} & {m["prompt"] for m in shapes.prompts("train")}


def test_held_out_questions_are_about_evaluation_scenes_and_cover_the_kinds():
    for pairs in (False, True):
        scenes, questions = held_out_questions(pairs)
        assert all(shapes.scene_split(s) == "eval" for s in scenes)
        assert all(any((o.color, o.shape) in shapes.HELD_OUT for o in s) == pairs for s in scenes)
        kinds = [q["kind"] for q in questions]
        assert {kinds.count(k) for k in evaluation.KINDS} == {len(questions) // len(evaluation.KINDS)}


def test_truth_is_one_on_scenes_that_satisfy_the_prompt_and_zero_on_wrong_ones():
    rng = np.random.default_rng(0)
    metadata = held_out_prompts()
    right = np.stack([shapes.render(shapes.sample_scene(m, rng, training=False)) for m in metadata])
    wrong = np.stack([shapes.render(shapes.sample_scene(shapes.wrong_metadata(m, rng), rng, training=False)) for m in metadata])
    assert truth(metadata, shapes.detect(right)).min() == 1.0 and truth(metadata, shapes.detect(wrong)).max() == 0.0


def test_pixels_survive_the_way_to_the_detector():
    image = shapes.render(shapes.random_scene(np.random.default_rng(1)))
    back = to_bytes(torch.from_numpy(image[None]).permute(0, 3, 1, 2) / 255)
    assert (back[0] == image).all()


def test_errors_are_standard_errors_of_the_mean():
    mean, error = mean_and_error([0.0, 1.0, 1.0, 0.0])
    assert mean == 0.5 and error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert math.isnan(mean_and_error([1.0])[1])


def test_a_perfect_painter_scores_one_and_its_samples_stay_with_their_prompts(monkeypatch):
    """evaluate() with drawing and answering replaced by ground truth: every truth is 1."""
    def draw(policy, metadata, think, seed, samples=evaluation.SAMPLES):
        rng = np.random.default_rng(seed)
        images = np.stack([shapes.render(shapes.sample_scene(m, rng, training=False)) for m in metadata for _ in range(samples)])
        return torch.from_numpy(images).permute(0, 3, 1, 2) / 255, [m["thought"] for m in metadata for _ in range(samples)] if think else None

    monkeypatch.setattr(evaluation, "draw_eval", draw)
    monkeypatch.setattr(evaluation, "answer_eval", lambda policy, scenes, questions: [q["answer"] for q in questions])
    table = evaluate(None)
    assert all(mean == 1.0 for name, (mean, _) in table.items() if name not in ("layout_entropy", "pairwise_distance"))
    assert table["draw"][1] == 0.0


def test_evaluation_is_repeatable_and_the_base_is_useful_but_imperfect():
    policy = load_policy(TOY)
    table = evaluate(policy)
    assert json.dumps(table) == json.dumps(evaluate(policy))
    assert 0.25 <= table["draw"][0] <= 0.6 and 0.6 <= table["ask"][0] <= 0.85


def test_logs_plot_and_sum_up_and_a_torn_line_is_dropped(tmp_path):
    row = {k: [0.5, 0.01] for k in ("draw", "think", "ask", "layout_entropy", "pairwise_distance", "draw/held_out", "ask/held_out")}
    row["layout_entropy"] = [2.0, None]
    lines = [json.dumps({"config": {"recipe": "lvrpo", "seed": 0}}), json.dumps({"step": 0, "seconds": 1.0, "eval": row}),
             json.dumps({"step": 9, "seconds": 61.0, "eval": row | {"draw": [0.75, 0.01]}}), '{"step": 10, "sec']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert len(read_log(tmp_path / "log.jsonl")[1]) == 2
    assert "+0.250 +- 0.014" in summary(tmp_path / "log.jsonl")
    plot([tmp_path / "log.jsonl"], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert markdown_row("x", {k: (m, float("nan") if e is None else e) for k, (m, e) in row.items()}).count("|") == 9


@pytest.mark.parametrize("content", ['{"a": 1}\n', "3\n", ""])
def test_a_file_that_is_no_log_is_refused(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match="first line must hold the config"):
        read_log(tmp_path / "x.jsonl")


def test_spaced_rows_go_from_the_first_to_the_last():
    assert spaced(list(range(10)), 4) == [0, 3, 6, 9] and spaced([1, 2], 4) == [1, 2]


def test_thoughts_are_evaluated_greedily():
    """Samples of a prompt differ by their noise alone."""
    metadata = [m for m in shapes.implicit_prompts("eval") if "held_out" not in m][:4]
    _, texts = draw_eval(load_policy(TOY), metadata, think=True, seed=0, samples=6)
    assert all(len(set(texts[i:i + 6])) == 1 for i in range(0, 24, 6))


def test_shares_are_of_prompts_and_the_mean_weighs_tags_equally(monkeypatch):
    """A painter that paints the first prompt of every tag alone, and the other prompts not at all."""
    first = {}

    def draw(policy, metadata, think, seed, samples=evaluation.SAMPLES):
        rng, rows = np.random.default_rng(seed), []
        for m in metadata:
            own = first.setdefault(m["tag"], m["prompt"]) == m["prompt"]
            for _ in range(samples):
                rows.append(shapes.render(shapes.sample_scene(m, rng, training=False) if own else []))
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 255, [""] * len(rows) if think else None

    monkeypatch.setattr(evaluation, "draw_eval", draw)
    monkeypatch.setattr(evaluation, "answer_eval", lambda policy, scenes, questions: [""] * len(questions))
    table, tags = evaluate(None), [m["tag"] for m in held_out_prompts()]
    assert len({tags.count(tag) for tag in shapes.TAGS}) > 1
    for tag in shapes.TAGS:
        assert table[f"draw/{tag}"] == pytest.approx(mean_and_error([1.0] + [0.0] * (tags.count(tag) - 1)))
    each = [table[f"draw/{tag}"] for tag in shapes.TAGS]
    assert table["draw"][0] == pytest.approx(sum(m for m, _ in each) / len(each))
    assert table["draw"][1] == pytest.approx(math.sqrt(sum(e * e for _, e in each)) / len(each))
