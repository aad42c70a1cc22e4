"""The table of tasks: layouts, what samples hold, a step's rows and their shares, what is refused,
and how a reward, a task and a recipe are added."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import ALONE, settings, write_rows

import recipes
import referees.build
import rewards
import tasks
import train
from policy import Guidance
from recipes import RECIPES, check
from sample import THINK_TO_DRAW, Rollout, replay_rollout, sample_plan
from tasks import (
    TASKS, Source, choices_of, counts, draw_of, first_pictures, micro_batches, samples_of, truth_and_variety)

ADDING = (Path(train.__file__).parent / "docs" / "adding.md").read_text(encoding="utf-8")
NOTHING = "--draw 0 --think 0 --ask 0 --edit 0"
LAYOUTS = {
    "draw": "Read Draw", "think": "Read Write Draw", "ask": "See Read Write",
    "choose": "See Read Write", "reason": "See Read Write", "pair_image": "Read Draw",
    "pair_text": "See Read Write", "edit": "See Read Draw", "reflect": "See Read Write Draw",
    "rounds": "Read Write Draw Read Write Draw"}


def toy_rows(name, count=2):
    return TASKS[name].toy()((3, 0, 1), count, range(count))


def choices(scale="toy"):
    draws = [draw_of(settings("--window 2"), scale, place) for place in (0, -1)]
    return choices_of(settings("--window 2"), scale, *draws)


# ---- layouts ----


@pytest.mark.parametrize("name", TASKS)
def test_a_trajectory_is_laid_out_as_the_papers_have_it(name):
    plan = TASKS[name].plan(toy_rows(name), choices())
    assert " ".join(type(item).__name__ for item in plan) == LAYOUTS[name]


@pytest.mark.parametrize("name", TASKS)
def test_bagels_think_prompt_comes_first_where_a_thought_precedes_a_picture(name):
    plan = TASKS[name].plan(toy_rows(name), choices("bagel"))
    thinks = {"think", "reflect", "rounds"}
    assert (getattr(plan[0], "texts", None) == [THINK_TO_DRAW] * 2) == (name in thinks)


@pytest.mark.parametrize("name", TASKS)
def test_samples_hold_what_their_task_says_and_earn_a_truth_between_0_and_1(policy, name):
    task, rows, G = TASKS[name], toy_rows(name), 2
    if task.refines:
        rows, _ = first_pictures(policy, rows, choices(), seed=0, step=0, index=[0, 1], n=1)
    plan = task.plan(rows, choices())
    rollout = sample_plan(policy, plan, seed=0, step=0, index=[0, 1], G=G)
    samples = samples_of(policy, task, rows, rollout)
    assert {field for field in task.gives if getattr(samples, field) is None} == set()
    assert max(scored.gaps.max() for scored in replay_rollout(policy, rollout)) < 1e-4
    logged = truth_and_variety(task, samples, tasks.detect, G)
    assert 0 <= logged["truth"] <= 1
    assert ("layout_entropy" in logged) == task.draws


@pytest.mark.parametrize("name", ["ask", "edit"])
def test_samples_stand_next_to_their_own_prompt_source_and_answer(policy, name):
    """An edit is compared with a caption of the picture after it."""
    task, rows = TASKS[name], toy_rows(name)
    rollout = sample_plan(policy, task.plan(rows, choices()), seed=0, step=0, index=[0, 1], G=3)
    samples = samples_of(policy, task, rows, rollout)
    for i, row in enumerate(row for row in rows for _ in range(3)):
        assert samples.prompts[i] == (row.wanted or row.text)
        assert torch.equal(samples.sources[i], row.source)
        assert not row.answer or samples.answers[i] == row.answer


def test_without_a_detector_nothing_is_said_of_pictures(policy):
    samples = rewards.Samples(["a", "b"], [{}, {}], images=torch.zeros(2, 3, 32, 32))
    assert truth_and_variety(TASKS["draw"], samples, None, 2) == {}


def test_a_reward_scores_the_tasks_whose_samples_have_what_it_reads():
    assert tasks.rewards_of(TASKS["ask"]) == ["kn", "accuracy"]
    assert "likeness" not in tasks.rewards_of(TASKS["draw"])
    assert {"likeness", "tim", "recaption"} <= set(tasks.rewards_of(TASKS["pair_image"]))
    assert {"format", "accuracy"} <= set(tasks.rewards_of(TASKS["choose"]))


def test_only_what_changes_a_picture_is_guided_by_it():
    assert tasks.guidance_of(settings(), True).text_scale == 1
    cfg = settings("--guidance 3")
    assert tasks.guidance_of(cfg, False) == Guidance(3.0)
    assert tasks.guidance_of(cfg, True) == Guidance(3.0, 2.0, "text_channel", 0.0, (0.0, 1.0))


# ---- a step's rows ----


def batches_of(policy, *flags):
    source = Source(settings(NOTHING, "--ins 0", *flags), policy)
    return lambda step=0, ranks=ALONE: source.batches(step, ranks)


def test_every_step_and_every_seed_asks_anew(policy):
    flags = "--draw 8 --think 8 --ask 8 --seed"
    first_seed, other_seed = (batches_of(policy, flags, seed) for seed in (0, 1))
    for same_task in zip(first_seed(0), first_seed(1), other_seed(0)):
        shown = {tuple((row.text, row.answer) for row in batch.rows) for batch in same_task}
        assert len(shown) == 3


@pytest.mark.parametrize("is_file", [False, True], ids=["toy", "file"])
def test_ranks_share_the_rows_and_every_row_has_an_index_of_its_own(policy, tmp_path, is_file):
    flags = ["--draw 4 --think 4 --ask 4"]
    if is_file:
        rows = [dict(question=f"what is {i} ?", answer=i, options=list("0123")) for i in "0123"]
        flags = ["--ask 4 --choose 4 --questions", write_rows(tmp_path / "q.jsonl", *rows)]
    batches = batches_of(policy, *flags)
    whole, first, second = batches(), *(batches(0, replace(ALONE, rank=r, world=2)) for r in (0, 1))
    assert [i for batch in whole for i in batch.index] == list(range(4 * len(whole)))
    for batch, a, b in zip(whole, first, second):
        assert [row.text for row in a.rows + b.rows] == [row.text for row in batch.rows]
        assert a.index + b.index == batch.index


def test_noisy_steps_move_within_their_range_from_step_to_step(policy):
    batches = batches_of(policy, "--rounds 1 --window 2 --window_high 5 --image_loss grpo")
    drawn = [batches(step)[0].choices for step in range(20)]
    windows = {choice.draw.window for choice in drawn}
    assert windows == {(0, 2), (1, 3), (2, 4), (3, 5)}
    assert any(choice.draw.window != choice.again.window for choice in drawn)


def test_times_of_a_matching_loss_differ_from_step_to_step_and_from_round_to_round(policy):
    batches = batches_of(policy, "--rounds 1 --window 2 --image_loss nft")
    drawn = [batches(step)[0].choices for step in range(2)]
    times = [tuple(draw.match_times.tolist()) for choice in drawn for draw in (choice.draw, choice.again)]
    assert len(set(times)) == 4
    assert all(choice.draw.window == (0, 0) for choice in drawn)


def test_alternating_gives_one_task_a_step_in_turns(policy):
    batches = batches_of(policy, "--draw 2 --ask 2 --alternate")
    names = [[batch.task.name for batch in batches(step)] for step in range(3)]
    assert names == [["draw"], ["ask"], ["draw"]]


# ---- what an update is made of ----


def test_losses_are_averaged_over_tokens_or_texts_and_over_noisy_steps(policy):
    """Two prompts of three samples, each of two texts and two images of two noisy steps."""
    plan = TASKS["rounds"].plan(toy_rows("rounds"), choices())
    rollout = sample_plan(policy, plan, seed=0, step=0, index=[0, 1], G=3)
    tokens = sum(text.chosen.sum().item() for text in rollout.texts)
    assert counts(rollout, "token", 9).tolist() == [tokens, 6 * 2 * 2]
    assert counts(rollout, "sequence", 9).tolist() == [6 * 2, 24]
    assert counts(rollout, "constant", 9).tolist() == [6 * 2 * 9, 24]


@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 12))
def test_micro_batches_hold_every_sample_once_and_whole_groups_if_they_fit(B, G, size):
    parts = micro_batches(Rollout((), B, G), size)
    assert sorted(row for _, rows in parts for row in rows) == list(range(B * G))
    for part, rows in parts:
        assert len(rows) == part.B * part.G
        assert size == 0 or len(rows) <= size
        assert part.G == G or 0 < size < G


# ---- what cannot be used is refused before the run ----


def draw_prompts(policy, folder, text, *flags):
    (folder / "p.txt").write_text(text)
    return batches_of(policy, "--draw 2 --prompts", folder / "p.txt", *flags)


def test_words_that_the_policy_was_never_taught_are_said(policy, tmp_path, capsys):
    draw_prompts(policy, tmp_path, "a red circle\na dog on a skateboard\n")
    err = capsys.readouterr().err
    assert "1 of 2 rows" in err
    assert "the policy was never taught, such as 'a dog on a skateboard'" in err


@pytest.mark.parametrize("flags, words", [
    ("--ask 2", "--ask 2 needs --questions; or set --ask 0"),
    ("--ins 1", "--ins reads GenEval's include and exclude, which 1 rows of"),
    ("--dvreward 1", "questions")])
def test_prompts_that_a_run_cannot_use_are_refused(policy, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        draw_prompts(policy, tmp_path, "a red circle\n", flags)


def test_a_prompt_longer_than_the_context_is_refused(policy, tmp_path):
    with pytest.raises(ValueError, match="tokens"):
        draw_prompts(policy, tmp_path, "red " * 5000)


@pytest.mark.parametrize("flags, row, words", [
    ("--choose 2", {}, '--choose reads "options", which 1 rows of'),
    ("--pair_image 2", {}, '--pair_image reads "caption", which 1 rows of'),
    ("--pair_image 2 --recaption 1", {"caption": "dogs running"}, "dogs running"),
    ("--ask 2 --answer_tokens 8", {"answer": "red " * 9}, "has 9 tokens, and --answer")])
def test_questions_that_a_run_cannot_use_are_refused(policy, tmp_path, flags, row, words):
    row = {"question": "what color is it ?", "answer": "red"} | row
    path = write_rows(tmp_path / "q.jsonl", row)
    with pytest.raises(ValueError, match=words):
        batches_of(policy, flags, "--questions", path)


def test_captions_that_no_rule_reads_go_with_the_models_of_the_cycle(policy, tmp_path):
    row = {"question": "what color is it ?", "answer": "red", "caption": "dogs running"}
    flags = "--pair_image 1 --recaption 1 --captioner another --questions"
    (batch,) = batches_of(policy, flags, write_rows(tmp_path / "q.jsonl", row))()
    assert batch.rows[0].text == "dogs running"


# ---- adding, by the lines of docs/adding.md ----


def snippets(title):
    """The Python pieces that the page shows under a heading in bold."""
    section = re.search(rf"^\*\*{title}\*\*(.*?)(?=^\*\*|\Z)", ADDING, re.M | re.S)[1]
    return re.findall(r"```python\n(.*?)```", section, re.S)


@pytest.fixture
def tables():
    """The three tables may grow within a test."""
    kept = [(table, dict(table)) for table in (rewards.REWARDS, TASKS, RECIPES)]
    yield [set(entries) for _, entries in kept]
    for table, entries in kept:
        table.clear()
        table.update(entries)


def first_step(folder, *flags):
    cfg = settings(NOTHING, "--group_size 4", *flags, "--out", folder)
    check(cfg, 1)
    return train.one_step(train.begin(cfg, ALONE), 0)


def test_a_reward_is_added_by_a_function_its_entry_and_its_line(tmp_path, monkeypatch, tables):
    entry, line = snippets("A reward")
    module = dict(vars(rewards))
    exec(entry, module)
    (name,) = rewards.REWARDS.keys() - tables[0]
    for word in module.keys() - vars(rewards).keys():
        monkeypatch.setattr(rewards, word, module[word], raising=False)

    def build(cfg, *_, **__):
        built = {}
        exec(line, vars(referees.build) | dict(asked={name}, out=built))
        return built

    monkeypatch.setattr(train, "build_rewards", build)
    stats = first_step(tmp_path, f"--draw 2 --{name} 2")
    assert 0 <= stats[f"draw/rewards/{name}/mean"] <= 1
    assert f"draw/advantage_share/{name}" in stats


def test_a_task_is_added_by_its_entry(tmp_path, tables):
    (entry,) = snippets("A task")
    exec(entry, dict(vars(tasks)))
    (name,) = TASKS.keys() - tables[1]
    stats = first_step(tmp_path, f"--{name} 3 --accuracy 1 --kn 0")
    assert stats[f"{name}/truth"] == pytest.approx(stats[f"{name}/rewards/accuracy/mean"])
    assert f"{name}/text/ratio/mean" in stats


def test_a_recipe_is_added_as_one_dict(tables):
    (entry,) = snippets("A recipe")
    exec(entry, dict(vars(recipes)))
    (name,) = RECIPES.keys() - tables[2]
    cfg = settings("--recipe", name)
    assert (cfg.rows["ask"] > 0, cfg.text_clip_high) == (True, 0.28)
    assert name in recipes.recipe_table("toy")
