"""referees/questions.py: what a judge is asked, by rule, by the rows of a file, by a language model."""

import json

import numpy as np
import pytest
import tasks
import torch
from recipes import parse
from referees import questions
from referees.judge import load_judge
from referees.preferences import load_preference
from referees.questions import (
    PHOTO_QUALITY, TOY_QUALITY, Questions, decompose, questions_by_rule, questions_of_row, read_answer,
    with_questions)
from rewards import Decomposed, Samples
from sample import TOY
from support.checkpoint import load_policy
from support.rows import read_prompts
from tiny_runs import ALONE, write_rows
from toy import shapes, world

JUDGE = str(TOY.parent / "judge")
LINE = {
    "prompt": "a red dog",
    "semantic_questions": [
        {"question": "is there a dog ?", "tag": "existence"},
        {"question": "is the dog red ?", "tag": "Attribute", "needs": [0]}, "does it sit ?"],
    "quality_questions": [{"question": "is it sharp ?", "tag": "Texture"}],
}
BOTH_LISTS = {key: LINE[key] for key in ("semantic_questions", "quality_questions")}
ANSWER = json.dumps(BOTH_LISTS)


# ---- by rule ----


def test_the_rule_asks_what_metadata_say_and_nothing_twice():
    include = [
        {"class": "bench", "count": 2, "color": "red"},
        {"class": "dog", "count": 1, "color": "blue", "position": ["above", 0]}]
    exclude = [{"class": "bench", "count": 3}, {"class": "cat", "count": 1}]
    made = questions_by_rule("p", {"include": include, "exclude": exclude}, PHOTO_QUALITY)
    assert [(q.text, q.needs) for q in made if not q.quality] == [
        ("is there a bench ?", ()), ("are there two benches ?", (0,)),
        ("is there a red bench ?", (0,)), ("is there a dog ?", ()),
        ("is there one dog ?", (3,)), ("is the dog blue ?", (3,)),
        ("is the dog above the bench ?", (3, 0)), ("are there zero cats ?", ())]
    assert made[-2:] == list(PHOTO_QUALITY)
    cups = [{"class": "cup", "count": 1, "color": color} for color in ("red", "blue")]
    texts = [q.text for q in questions_by_rule("p", {"include": cups}, TOY_QUALITY)]
    assert texts[:2] == ["is there a cup ?", "are there two cups ?"]
    assert len(set(texts)) == len(texts)


def test_metadata_without_something_to_ask_about_are_refused():
    with pytest.raises(ValueError, match="has no objects to ask about"):
        questions_by_rule("a mood", {"include": []}, TOY_QUALITY)


def test_every_toy_prompt_is_decomposed_into_questions_that_its_judge_can_read():
    known, ask = set(load_judge(JUDGE).tokenizer.get_vocab()), Questions(toy=True)
    edits = [world.toy_edit(np.random.default_rng(i)).metadata for i in range(30)]
    for metadata in [*shapes.prompts("train"), *shapes.implicit_prompts("eval"), *edits]:
        for question in ask(metadata["prompt"], metadata):
            assert set(question.text.split()) <= known, question.text


def test_the_toys_judge_prefers_the_right_picture():
    asked, *pictures = asked_and_shown(40)
    reward = Decomposed(load_judge(JUDGE), Questions(toy=True))
    prompts = [m["prompt"] for m in asked]
    right, wrong = (reward(Samples(prompts, asked, images=images)) for images in pictures)
    assert (right > wrong).float().mean() > 0.9


def asked_and_shown(n):
    """Held-out metadata, and pictures of it and of wrong metadata."""
    rng = np.random.default_rng(0)
    asked = [shapes.pick(rng, shapes.prompts("eval")) for _ in range(n)]
    wrong = [shapes.wrong_metadata(m, rng) for m in asked]
    return asked, pictures_of(asked, rng), pictures_of(wrong, rng)


def test_the_unsure_judge_prefers_the_right_picture_too_but_is_less_sure():
    asked, right, wrong = asked_and_shown(100)
    questions = [f"is this {m['prompt']} ?" for m in asked]
    doubts = []
    for folder in (JUDGE, str(TOY.parent / "unsure_judge")):
        judge = load_judge(folder)
        yes, no = (judge.yes_probability(images, questions) for images in (right, wrong))
        assert (yes > no).float().mean() > 0.6
        doubts.append(torch.minimum(yes, 1 - yes).mean())
    assert doubts[1] > 2 * doubts[0]


def test_the_toys_preference_is_for_right_pictures_and_for_colour_whatever_the_prompt():
    asked, right, wrong = asked_and_shown(100)
    model = load_preference(str(TOY.parent / "preference"))
    prompts = [m["prompt"] for m in asked]
    scores = model.score(right, prompts)
    assert (scores > model.score(wrong, prompts)).float().mean() > 0.7
    red = torch.zeros_like(right)
    red[:, 0] = 1.0
    assert (model.score(red, prompts) > scores).float().mean() > 0.9


def pictures_of(metadata, rng):
    return world.render_pixels([shapes.sample_scene(m, rng, training=False) for m in metadata]) * 0.5 + 0.5


# ---- of rows ----


def test_a_rows_questions_are_read_with_needs_and_plain_strings_and_come_before_the_rule():
    bare = {"include": [{"class": "dog", "count": 1}], "questions": "nothing of ours"}
    made = Questions(toy=False)("a red dog", with_questions({**bare, **LINE}, "p.jsonl"))
    assert [(q.text, q.needs) for q in made] == [
        ("is there a dog ?", ()), ("is the dog red ?", (0,)),
        ("does it sit ?", ()), ("is it sharp ?", ())]
    assert Questions(toy=False)("a red dog", with_questions(bare, "p.jsonl"))[1].text == "is there one dog ?"


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(semantic_questions=[]), "semantic_questions must be a list of at least one question"),
        (dict(quality_questions="x"), "quality_questions must be a list"),
        (
            dict(semantic_questions=[{"question": " ", "tag": "Count"}]),
            r"semantic_questions\[0\] must have a "
            r"text",
        ),
        (dict(semantic_questions=[3]), r"semantic_questions\[0\] must have a text"),
        (
            dict(semantic_questions=[{"question": "a ?", "tag": "Count", "needs": [0]}]),
            '"needs" must be places of earlier'),
        (
            dict(quality_questions=[{"question": "a ?", "tag": "Texture", "needs": [0]}]),
            '"needs" must be places'),
    ],
)
def test_a_bad_list_of_questions_is_refused_with_file_and_prompt(change, words):
    with pytest.raises(ValueError, match=f"q.jsonl: prompt 'a red dog'.*{words}"):
        questions_of_row({**LINE, **change}, "q.jsonl")


def source_of(folder, *flags):
    flags = ["--recipe", "alphagrpo", "--out", folder, *flags]
    return tasks.Source(parse([str(flag) for flag in flags]), load_policy(TOY))


def test_prompts_bring_their_questions_and_those_without_are_named_before_the_run(tmp_path):
    rows = [{"prompt": f"prompt {i}"} for i in range(7)]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({**row, **BOTH_LISTS}) for row in rows))
    (batch,) = source_of(tmp_path, "--prompts", file).batches(0, ALONE)
    assert all(len(row.metadata["questions"]) == 4 for row in batch.rows)
    rows[3] |= BOTH_LISTS
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ValueError, match="has no questions for 6 of 7 rows, such as .'prompt 0', 'prompt 1', 'prompt 2',"):
        source_of(tmp_path, "--prompts", file)
    source_of(tmp_path, "--prompts", file, "--dv_by", "holistic")


def test_edits_bring_their_questions_or_are_refused(tmp_path):
    row = {"instruction": "make the circle red", "caption": "a red circle"}
    file = write_rows(tmp_path / "e.jsonl", row | BOTH_LISTS)
    (batch,) = source_of(tmp_path, "--edits", file, "--edit", 2).batches(0, ALONE)
    assert [q.text for q in batch.rows[0].metadata["questions"]][:2] == [
        "is there a dog ?", "is the dog red ?"]
    write_rows(tmp_path / "e.jsonl", row)
    with pytest.raises(
        ValueError, match="--dvreward has no questions for 1 of 1 rows, such as .'make the circle red'"):
        source_of(tmp_path, "--edits", file, "--edit", 2)


# ---- by a language model ----


def test_decomposition_writes_rows_whole_retries_resumes_and_leaves_out_what_stays_invalid(tmp_path):
    file, out, heard = tmp_path / "p.jsonl", tmp_path / "q.jsonl", []
    rows = [
        {"prompt": "one", "tag": "colors", "include": [{"class": "dog", "count": 1}]}, {"prompt": "two"},
        {"prompt": "three"}]
    file.write_text("\n".join(map(json.dumps, rows)))

    def write(requests, temperature):
        heard.append((len(requests), temperature))
        answers = {
            "one": f"Here it is: {ANSWER}",
            "two": "no JSON",
            "three": ANSWER if temperature else '{"semantic_questions": [}',
        }
        return [answers[request.rsplit("Prompt: ", 1)[1]] for request in requests]

    left = decompose(str(file), write, "m", out, batch=2, tries=3)
    assert left == ["two: invalid JSON (substring not found)"]
    assert heard == [(2, 0.0), (1, 0.0), (2, 0.7), (1, 0.7)]
    written = read_prompts(str(out))            # as --prompts reads it
    assert [row["prompt"] for row in written] == ["one", "three"]
    assert written[0]["tag"] == "colors"
    assert written[0]["include"] == rows[0]["include"]
    assert with_questions(written[1], str(out))["questions"] == questions_of_row(LINE, "")
    with out.open("a") as cut:
        cut.write('{"prompt": "cut')            # as a kill leaves it
    heard.clear()
    with pytest.raises(
        ValueError, match="m gave no valid questions for any of 1 prompts in 2 tries each; .*invalid JSON"):
        decompose(str(file), write, "m", out, tries=2)
    assert heard == [(1, 0.0), (1, 0.7)]        # only the one that is still without
    decompose(str(file), lambda requests, temperature: [ANSWER] * len(requests), "another model", out)
    assert [row["prompt"] for row in read_prompts(str(out))] == ["one", "three", "one", "two", "three"]


def test_an_answer_is_validated():
    thought = '<think>I draft {"question": "is it red ?"} and {...}.</think>'
    for answer in (ANSWER, thought + ANSWER):
        assert read_answer("a red dog", answer)["semantic_questions"][1] == LINE["semantic_questions"][1]
    with pytest.raises(ValueError, match="the answer: prompt 'x': quality_questions must be"):
        read_answer("x", json.dumps({"semantic_questions": ["a ?"]}))


def test_a_real_language_model_is_asked_through_its_chat_template(tmp_path):
    """A tiny Qwen2 of random weights: the public path, whose answers are no JSON."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer, folder = load_policy(TOY).tokenizer, tmp_path / "llm"
    tokenizer.chat_template = "{% for m in messages %}<|im_start|> {{ m.content }} <|im_end|>{% endfor %}"
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    assert len(questions.load_writer(str(folder), "cpu", longest=4)(["a red circle", "two"], 0.0)) == 2
    prompts = tmp_path / "p.txt"
    prompts.write_text("a circle\n")
    refusals = {
        tmp_path / "q.jsonl": "gave no valid questions for any of 1 prompts in 5 tries each",
        prompts: "holds what this program did not write; give another --out"}
    for out, words in refusals.items():
        with pytest.raises(SystemExit) as error:
            questions.main([str(prompts), "--llm", str(folder), "--out", str(out)])
        assert words in str(error.value)
