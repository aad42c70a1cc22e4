"""The evaluation judges the truth on held-out rows, by the tag, with honest errors; logs survive what happens to files."""

import json
import math

import numpy as np
import pytest
import torch

from eval import summary
from toy import world
from studies import reward_truth
import sample
from support import plots
import eval as evaluation
import tasks
from eval import answered, evaluate, markdown_row, mean_and_error
from rewards import Samples
from sample import TOY
from support.checkpoint import load_policy
from support.pictures import to_bytes
from support.plots import plot
from support.run import read_log
from tasks import TASKS
from toy.world import drawn_truth, held_out_prompts, held_out_questions, held_out_riddles, spaced
from toy import shapes


def test_held_out_prompts_are_evaluation_prompts_of_every_tag():
    chosen, training = held_out_prompts(), {m["prompt"] for m in shapes.prompts("train")}
    assert not {row.text for row in chosen} & training
    assert {row.metadata["tag"] for row in chosen} == set(shapes.TAGS)
    assert not any("held_out" in row.metadata for row in chosen) and all("held_out" in row.metadata for row in held_out_prompts(pairs=True))
    assert not {row.text for row in held_out_prompts(pairs=True)} & training


def test_held_out_questions_are_about_evaluation_scenes_and_cover_the_kinds(monkeypatch):
    asked = []
    monkeypatch.setattr(tasks, "question_row", lambda scene, question: asked.append((scene, question)))
    for pairs in (False, True):
        asked.clear()
        held_out_questions(pairs)
        assert all(shapes.scene_split(s) == "eval" for s, _ in asked)
        assert all(any((o.color, o.shape) in shapes.HELD_OUT for o in s) == pairs for s, _ in asked)
        kinds = [q["kind"] for _, q in asked]
        assert {kinds.count(k) for k in world.KINDS} == {len(asked) // len(world.KINDS)}


def painted(rows, scene_of, G=1):
    """Samples of pictures that are painted by hand."""
    images = np.stack([shapes.render(scene_of(row.metadata)) for row in rows for _ in range(G)])
    each = [row for row in rows for _ in range(G)]
    return Samples([row.text for row in each], [row.metadata for row in each], images=torch.from_numpy(images).permute(0, 3, 1, 2) / 255)


def test_truth_is_one_on_scenes_that_satisfy_the_prompt_and_zero_on_wrong_ones():
    rng, rows = np.random.default_rng(0), held_out_prompts()
    right = painted(rows, lambda m: shapes.sample_scene(m, rng, training=False))
    wrong = painted(rows, lambda m: shapes.sample_scene(shapes.wrong_metadata(m, rng), rng, training=False))
    assert drawn_truth(right, world.detect(right.images)).min() == 1.0 and drawn_truth(wrong, world.detect(wrong.images)).max() == 0.0
    assert drawn_truth(right, None) is None


def test_pixels_survive_the_way_to_the_detector():
    image = shapes.render(shapes.random_scene(np.random.default_rng(1)))
    back = to_bytes(torch.from_numpy(image[None]).permute(0, 3, 1, 2) / 255)
    assert (back[0] == image).all()


def test_errors_are_standard_errors_of_the_mean():
    mean, error = mean_and_error([0.0, 1.0, 1.0, 0.0])
    assert mean == 0.5 and error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert math.isnan(mean_and_error([1.0])[1])


def by_hand(scene_of):
    """In place of `answered`: right answers and thoughts, and pictures of scene_of(metadata)."""
    def answer(policy, task, rows, seed, samples=None, guidance=1.0):
        G = samples or task.samples
        each = [row for row in rows for _ in range(G)]
        images = painted(rows, scene_of, G).images if task.draws else None
        form = "<think> so </think> <answer> {} </answer>" if task.form == "answer" else "{}"
        right = lambda m: m.get("thought") or f"<think> {shapes.RIGHT} </think> {shapes.explicit(m)}"  # noqa: E731
        texts = [form.format(row.answer or right(row.metadata)) for row in each] if task.writes else None
        return Samples([row.text for row in each], [row.metadata for row in each], texts, images,
                       answers=[row.answer for row in each] if rows[0].answer else None, options=[row.options for row in each],
                       formats=[task.form] * len(each) if task.form else None, sources=images, earlier=images)
    return answer


def test_a_perfect_painter_scores_one_and_its_samples_stay_with_their_prompts(monkeypatch):
    """evaluate() with drawing and answering replaced by ground truth: every truth is 1."""
    rng = np.random.default_rng(0)
    edited = lambda m: [shapes.Object(*o) for o in m["target"]]  # noqa: E731
    scene_of = lambda m: edited(m) if "target" in m else shapes.sample_scene(m, rng, training=False)  # noqa: E731
    monkeypatch.setattr(evaluation, "answered", by_hand(scene_of))
    monkeypatch.setattr(evaluation, "captions_truth", lambda policy, seed: np.ones(3))
    table = evaluate(None)
    others = ("layout_entropy", "distance", "repaired", "spoiled", "saturation", "roughness")
    assert all(mean == 1.0 for name, (mean, _) in table.items() if not name.endswith(others))
    assert table["reflect/repaired"][0] == table["rounds/spoiled"][0] == 0.0
    assert table["draw"][1] == 0.0 and {name for name, task in TASKS.items() if task.held_out} <= table.keys()


def test_the_base_is_useful_but_imperfect():
    table = evaluate(load_policy(TOY))
    for name, low, high in (("draw", 0.25, 0.5), ("draw/position", 0.24, 0.6), ("ask", 0.6, 0.85), ("captions", 0.6, 0.95), ("reason", 0.6, 0.85), ("choose", 0.5, 0.85),
                            ("choose/format", 0.3, 0.8), ("reason/format", 0.3, 0.8)):
        assert low <= table[name][0] <= high, name


def test_every_reward_of_pictures_is_held_against_the_truth(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tasks, "PROMPTS_PER_TAG", 2)
    monkeypatch.setattr(evaluation, "ODE_STEPS", 3)
    evaluation.main(["rewards", "--out", str(tmp_path / "r.json")])
    table = json.loads((tmp_path / "r.json").read_text())["tables"]["base"]
    assert set(table) == {"sem", "kn", "dense", "ins", "recaption", "likeness", "dvreward", "tifa", "tim"}
    assert all(-1 <= row["in_group"] <= 1 and -1 <= row["overall"] <= 1 and row["ms"] > 0 for row in table.values())
    assert table["ins"]["overall"] > 0.5 and sum(row["share"] for row in table.values()) == pytest.approx(1)
    assert (tmp_path / "r.png").stat().st_size > 10_000 and "| `tifa` |" in capsys.readouterr().out


def test_correlation_is_pearsons_and_unknown_of_what_does_not_vary():
    a = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    assert reward_truth.correlation(a, 3 * a - 1) == pytest.approx(1) and math.isnan(reward_truth.correlation(a, torch.ones(4)))
    assert reward_truth.correlation(a, torch.tensor([1.0, 0, 1, 0]).double()) == pytest.approx(np.corrcoef(a, [1, 0, 1, 0])[0, 1])


def test_genevals_folders_are_drawn_judged_and_gone_on_with(tmp_path, capsys, monkeypatch):
    rows = shapes.prompts("eval")[:3]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["geneval", "--metadata", str(tmp_path / "m.jsonl"), "--samples", "2", "--steps", "2", "--out", str(tmp_path / "g")]
    evaluation.main(flags)
    first = capsys.readouterr().out
    assert "GenEval rules, detector the exact one of the toy" in first and "overall" in first
    assert json.loads((tmp_path / "g" / "00002" / "metadata.jsonl").read_text())["prompt"] == rows[2]["prompt"]
    results = [json.loads(line) for line in (tmp_path / "g" / "results.jsonl").read_text().splitlines()]
    assert [each["filename"] for each in results[:3]] == ["00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png"]
    kept = (tmp_path / "g" / "00001" / "samples" / "0001.png").read_bytes()
    (tmp_path / "g" / "00001" / "samples" / "0001.png").unlink()
    drawn, real = [], sample.sample_plan
    monkeypatch.setattr(evaluation, "sample_plan", lambda *a, **k: drawn.append(k["prompts"]) or real(*a, **k))
    evaluation.main(flags)
    assert drawn == [[1]] and (tmp_path / "g" / "00001" / "samples" / "0001.png").read_bytes() == kept
    assert capsys.readouterr().out == first
    for more, said in ((["--seed", "7"], "holds pictures of seed 1234, not 7; give another --out"), (["--samples", "0"], "--samples 0")):
        with pytest.raises(SystemExit) as error:
            evaluation.main([*flags, *more])
        assert said in str(error.value)
    (tmp_path / "m.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(SystemExit, match="holds pictures of prompts"):
        evaluation.main(flags)
    (tmp_path / "p.txt").write_text("a red circle")
    with pytest.raises(SystemExit, match="--ins reads GenEval's include and exclude, which 1 rows of .*p.txt do not have"):
        evaluation.main(["geneval", "--metadata", str(tmp_path / "p.txt")])
    with pytest.raises(SystemExit) as error:
        evaluation.main(["geneval"])
    assert "geneval needs --metadata" in str(error.value)


def test_an_evaluation_is_repeatable(monkeypatch):
    for name, value in dict(PROMPTS_PER_TAG=4, THOUGHTS=6, QUESTIONS=50).items():
        monkeypatch.setattr(tasks, name, value)
    policy = load_policy(TOY)
    assert json.dumps(evaluate(policy)) == json.dumps(evaluate(policy))


def test_shares_are_of_prompts_and_the_mean_weighs_tags_equally(monkeypatch):
    """A painter that paints the first prompt of every tag alone, and the other prompts not at all."""
    rng, first = np.random.default_rng(0), {}

    def scene_of(m):
        own = first.setdefault(m["tag"], m["prompt"]) == m["prompt"]
        return shapes.sample_scene(m, rng, training=False) if own else []

    monkeypatch.setattr(evaluation, "answered", by_hand(scene_of))
    monkeypatch.setattr(evaluation, "captions_truth", lambda policy, seed: np.ones(3))
    table, tags = evaluate(None), [row.metadata["tag"] for row in held_out_prompts()]
    assert len({tags.count(tag) for tag in shapes.TAGS}) > 1
    for tag in shapes.TAGS:
        assert table[f"draw/{tag}"] == pytest.approx(mean_and_error([1.0] + [0.0] * (tags.count(tag) - 1)))
    each = [table[f"draw/{tag}"] for tag in shapes.TAGS]
    assert table["draw"][0] == pytest.approx(sum(m for m, _ in each) / len(each))
    assert table["draw"][1] == pytest.approx(math.sqrt(sum(e * e for _, e in each)) / len(each))


def test_a_change_is_paired_by_row_so_that_hard_prompts_cancel():
    easy, hard = np.array([0.9, 0.8, 1.0]), np.array([0.1, 0.0, 0.2])
    before = {"draw": [easy, hard], "layout_entropy": [np.array([2.0])]}
    after = {"draw": [easy - 0.1, hard + 0.3], "layout_entropy": [np.array([1.5])]}
    change = evaluation.paired_change(before, after)
    assert change["draw"] == pytest.approx((0.1, 0.0), abs=1e-9)
    assert change["layout_entropy"][0] == -0.5 and math.isnan(change["layout_entropy"][1])
    change = evaluation.paired_change({"ask": [np.array([0.0, 1.0, 1.0])]}, {"ask": [np.array([1.0, 1.0, 0.0])]})
    assert change["ask"] == pytest.approx(mean_and_error([1.0, 0.0, -1.0]))


def test_a_policy_does_not_change_against_itself(monkeypatch, tmp_path, capsys):
    for name, value in dict(PROMPTS_PER_TAG=2, THOUGHTS=3, QUESTIONS=10, EDITS=12).items():
        monkeypatch.setattr(tasks, name, value)
    monkeypatch.setattr(evaluation, "ODE_STEPS", 2)
    out = tmp_path / "e.json"
    evaluation.main(["--against", str(TOY), "--samples", "2", "--out", str(out)])
    held = json.loads(out.read_text())
    assert held["against"] == str(TOY) and held["samples"] == 2 and held["change"].keys() == held["table"].keys()
    assert {k for k, (moved, _) in held["change"].items() if moved != 0} == set()
    assert "before     after    change" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--samples 0: must be at least 1"):
        evaluation.main(["--samples", "0"])


def test_spaced_rows_go_from_the_first_to_the_last():
    assert spaced(list(range(10)), 4) == [0, 3, 6, 9] and spaced([1, 2], 4) == [1, 2]


def test_thoughts_are_evaluated_greedily():
    """Samples of a prompt differ by their noise alone."""
    texts = answered(load_policy(TOY), TASKS["think"], held_out_riddles()[:4], seed=0, samples=6).texts
    assert all(len(set(texts[i:i + 6])) == 1 for i in range(0, 24, 6))


# ---- logs and plots ----

ROW = {k: [0.5, 0.01] for k in ("draw", "think", "ask", "draw/held_out", "ask/held_out")} | {"layout_entropy": [2.0, None], "pairwise_distance": [0.3, None]}
HEAD = {"config": {"recipe": "lvrpo", "seed": 0}}


def write_log(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_logs_plot_and_sum_up_and_torn_lines_are_passed_over(tmp_path):
    log = write_log(tmp_path / "log.jsonl", HEAD, {"step": 0, "seconds": 1.0, "eval": ROW}, '{"step": 1, "sec', "", "null", "\x00\x00",
                    {"step": 9, "seconds": 61.0, "eval": ROW | {"draw": [0.75, 0.01]}}, '{"step": 10, "sec')
    assert [r["step"] for r in read_log(log)[1]] == [0, 9]
    assert "+0.250 +- 0.014" in summary(log)
    plot([log], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert markdown_row("x", {k: (m, float("nan") if e is None else e) for k, (m, e) in ROW.items()}).count("|") == 9


def test_rows_of_a_log_need_not_hold_the_same_keys(tmp_path):
    """As a run leaves them that was resumed with other tasks; what is missing is a gap."""
    rows = [{"step": 0, "seconds": 1.0, "draw/reward": 1.0, "ask/reward": 1.0}, {"step": 1, "seconds": 2.0, "draw/reward": 1.0},
            {"step": 2, "seconds": 2.5, "resumed": {"seed": [0, 1]}}, {"step": 2, "seconds": 3.0, "think/reward": 0.5, "loss": 0.0}]
    looks = [{"step": 0, "seconds": 0.0, "eval": ROW}, {"step": 3, "seconds": 4.0, "eval": {"draw": [0.6, 0.1]}}]
    log = write_log(tmp_path / "a.jsonl", HEAD, looks[0], *rows, looks[1])
    plot([log, write_log(tmp_path / "b.jsonl", HEAD, looks[1])], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists() and "draw" in summary(log)
    at, reward = plots.rewards_over(rows)
    assert at == [1 / 60, 2 / 60, 3 / 60] and list(reward) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("content", ['{"a": 1}\n', "3\n", ""])
def test_a_file_that_is_no_log_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match="no line of it holds the config"):
        read_log(write_log(tmp_path / "x.jsonl", content))


def test_a_log_without_evaluations_is_not_plotted(tmp_path):
    with pytest.raises(ValueError, match="holds no evaluation to plot"):
        plot([write_log(tmp_path / "x.jsonl", HEAD, {"step": 0, "seconds": 1.0})], tmp_path / "curves.png")
