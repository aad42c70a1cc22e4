"""Rows of files: read as the file's ending says, refused by file and line, drawn in turn."""

import json

import pytest
import torch
from PIL import Image
from tiny_runs import write_rows

from support.rows import (
    choices_of_file, pool_by_tag, questions_of_file, read_prompts, read_questions)

RED = '{"prompt": "a red circle"}'


def write(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return str(path)


# ---- prompts ----


@pytest.mark.parametrize(
    "name, content, encoding",
    [
        ("p.jsonl", RED, "utf-8"), ("p.json", f"{RED}\r\n\r\n", "utf-8-sig"),
        ("p.txt", "a red circle\r\n", "utf-8-sig"), ("p", "  a red circle \n", "utf-8"),
        ("p.ndjson", f"\n{RED}\n", "utf-8")],
)
def test_prompts_are_read_as_their_files_ending_says(tmp_path, name, content, encoding):
    wanted = {"tag": "", "include": [], "prompt": "a red circle"}
    assert read_prompts(write(tmp_path / name, content, encoding)) == [wanted]


@pytest.mark.parametrize(
    "name, content, encoding, words",
    [
        ("p.txt", RED, "utf-8", "p.txt:1: JSON in a file that its ending calls plain text"),
        ("p", f"a circle\n[{RED}]", "utf-8", "p:2: JSON in a file"),
        ("p.txt", f"[\n {RED}\n]", "utf-8", "p.txt:1: JSON"),
        ("p.json", f"[{RED}, {RED}]", "utf-8", "p.json:1: must be one object"),
        ("p.jsonl", f"{RED}\n\n{{\n", "utf-8", "p.jsonl:3: not a JSON object"),
        ("p.jsonl", "[" * 100_000, "utf-8", "p.jsonl:1: not a JSON object"),
        ("p.csv", "prompt\na red circle", "utf-8", "its ending .csv must be .jsonl .* or .txt"),
        ("p.txt", "a red circle", "utf-16", "not UTF-8 text"),
        ("p.txt", "ein Stück", "latin-1", "not UTF-8 text"),
        ("p.jsonl", '{"prompt": "  "}', "utf-8", r"the text fields \['prompt'\]"),
        ("p.txt", "\n \n", "utf-8", "is empty"),
    ],
)
def test_a_file_that_is_not_what_it_seems_is_refused_in_one_line(
    tmp_path, name, content, encoding, words
):
    with pytest.raises(ValueError, match=words) as error:
        read_prompts(write(tmp_path / name, content, encoding))
    assert "\n" not in str(error.value)


def test_a_count_that_is_not_given_is_one(tmp_path):
    row = {
        "prompt": "a dog", "include": [{"class": "dog"}], "exclude": [{"class": "cat", "count": 2}]}
    (metadata,) = read_prompts(write(tmp_path / "p.jsonl", json.dumps(row)))
    assert metadata["include"] == [{"class": "dog", "count": 1}]
    assert metadata["exclude"] == [{"class": "cat", "count": 2}]


@pytest.mark.parametrize(
    "clause",
    [
        "dog", {"count": 1}, {"class": 3}, {"class": "dog", "count": 0},
        {"class": "dog", "count": "two"}, {"class": "dog", "position": ["near", 0]},
        {"class": "dog", "position": ["above"]}, {"class": "dog", "position": ["above", 1]},
        {"class": "dog", "position": ["above", -1]}, {"class": "dog", "color": ""},
        {"class": "dog", "colour": "red"}],
)
@pytest.mark.parametrize("name", ["include", "exclude"])
def test_clauses_of_another_form_are_refused(tmp_path, name, clause):
    row = {"prompt": "a dog", name: [{"class": "cat"}, clause]}
    with pytest.raises(ValueError, match="p.jsonl:1: every clause must have") as error:
        read_prompts(write(tmp_path / "p.jsonl", json.dumps(row)))
    assert "\n" not in str(error.value)


def test_what_is_null_is_not_there_and_colours_are_in_small_letters(tmp_path):
    content = (
        '{"prompt": "a dog", "tag": null, "caption": NaN, "exclude": null, "include": [{"class": '
        '"dog", "count": null, "color": "Red", "position": null}]}')
    (metadata,) = read_prompts(write(tmp_path / "p.jsonl", content))
    dog = {"class": "dog", "count": 1, "color": "red"}
    assert metadata == {"prompt": "a dog", "tag": "", "include": [dog]}


# ---- questions and edits ----


@pytest.mark.parametrize(
    "text", ["<image>\nwhat ?", "what ?\n<image>", "<|image_1|> <img>what ?", "[IMG] what ?"])
def test_the_place_of_the_image_is_no_part_of_a_question(tmp_path, text):
    (row,) = read_questions(write_rows(tmp_path / "q.jsonl", dict(question=text, answer="red")))
    assert row["question"] == "what ?"


@pytest.mark.parametrize("text", ["is <image 1> red ?", "<image>", "<video>\nwhat ?"])
def test_a_place_that_cannot_be_taken_out_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="q.jsonl:1: .* holds the place of an image"):
        read_questions(write_rows(tmp_path / "q.jsonl", dict(question=text, answer="red")))


def test_an_answer_in_its_tags_is_taken_out_of_them(tmp_path):
    answers = ["<think> two </think><answer> 3 </answer>", "red"]
    rows = read_questions(
        write_rows(tmp_path / "q.jsonl", *(dict(question="what ?", answer=a) for a in answers)))
    assert [row["answer"] for row in rows] == [" 3 ", "red"]


@pytest.mark.parametrize(
    "row, words",
    [
        ({"answer": "?!"}, "no text can earn it"),
        ({"answer": "a </answer> b"}, "no text can earn it"),
        ({"answer": "<answer> <answer> 3 </answer>"}, "no text can earn it"),
        ({"answer": "green"}, "must be the letter"), ({"options": "ab"}, "options must be a list"),
        ({"options": ["a", 3]}, "question 'what"), ({"question": ""}, "the text fields"),
        ({"image": "cut.png"}, "cut.png cannot be read"),
        ({"image": "AAAA" * 9999}, "AAAA cannot be read"), ({"include": [{}]}, "every clause"),
        ({"image": "none.png"}, "none.png cannot be read")],
)
def test_a_question_that_nobody_could_answer_is_refused_when_it_is_read(tmp_path, row, words):
    good = dict(question="what ?", answer="b", options=["blue", "red"])
    path = write_rows(tmp_path / "q.jsonl", good, good | row)
    (tmp_path / "cut.png").write_bytes((tmp_path / "i.png").read_bytes()[:-20])
    with pytest.raises((ValueError, OSError), match=words) as error:
        read_questions(path)
    assert "\n" not in str(error.value)


def test_options_are_lettered_or_left_out(policy, tmp_path):
    path = write_rows(
        tmp_path / "q.jsonl",
        dict(question="what ?", answer="b", options=["blue", "red"], kind="color"))
    rows = read_questions(path)
    (choice,), (question,) = (
        pool(rows, policy)((0,), 1, range(1)) for pool in (choices_of_file, questions_of_file))
    assert (choice.text, choice.answer) == ("what ? (a) blue (b) red", "b")
    assert (question.text, question.answer, question.options) == ("what ?", "red", None)
    assert question.metadata["tag"] == "color"
    assert question.source.shape == (3, 448, 448)  # as large as the published judge reads


# ---- drawing ----


def test_every_tag_has_its_turn():
    pool = pool_by_tag(
        [{"prompt": f"{tag}{i}", "tag": tag} for tag, n in (("a", 1), ("b", 50)) for i in range(n)])
    rows = [row for step in range(100) for row in pool((0, step, 0), 4, range(4))]
    assert 0.4 < sum(row.metadata["tag"] == "a" for row in rows) / len(rows) < 0.6


def test_a_step_draws_no_row_twice_while_the_file_has_enough(policy, tmp_path):
    colors = ["red", "green", "blue", "white"]
    rows = read_questions(
        write_rows(tmp_path / "q.jsonl", *(dict(question=c, answer=c) for c in colors)))
    pool = questions_of_file(rows, policy)
    assert sorted(row.text for row in pool((0, 1), 4, range(4))) == sorted(colors)
    assert len(pool((0, 1), 9, range(9))) == 9


def test_a_picture_is_read_when_its_row_is_drawn(policy, tmp_path):
    rows = read_questions(write_rows(tmp_path / "q.jsonl", dict(question="what ?", answer="red")))
    pool = questions_of_file(rows, policy)
    Image.new("RGB", (40, 20), (0, 0, 255)).save(tmp_path / "i.png")
    (row,) = pool((0,), 1, range(1))
    assert torch.allclose(
        row.pixels, torch.tensor([-1.0, -1, 1])[:, None, None].expand_as(row.pixels), atol=1e-6)
