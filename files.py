"""Rows of files: prompts, questions, pairs. What a file says is either honoured or refused, with the file, the line and what would be
right."""

import json
from pathlib import Path

from tqdm import tqdm

from geneval import RELATIONS
from pictures import open_picture
from rewards import final_answer, normalise_answer, right_option


def read_lines(path: str) -> list[tuple[int, str]]:
    """(number from 1, line) of a UTF-8 file's lines that are not blank, without a byte order mark; ValueError where there are none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"file {path} does not exist")
    raw = Path(path).read_bytes()
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw:
        raise ValueError(f"file {path} is UTF-16 or binary, must be UTF-8 text; save it as UTF-8")
    try:
        lines = raw.decode("utf-8-sig").replace("\r\n", "\n").split("\n")      # str.splitlines would cut at U+2028 too
    except UnicodeDecodeError as error:
        raise ValueError(f"file {path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    if not any(line.strip() for line in lines):
        raise ValueError(f"file {path} is empty; it must hold one entry a line")
    return [(i, line) for i, line in enumerate(lines, 1) if line.strip()]


def parsed(line: str):
    """The JSON value of a line; ValueError where it is none."""
    try:
        return json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_json_lines(path: str, needed: tuple[str, ...]) -> list[dict]:
    """JSON objects, one a line, each with the needed text fields, none of them empty; errors name file and line."""
    rows = []
    for number, line in read_lines(path):
        try:
            row = parsed(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a JSON object ({getattr(error, 'msg', error)}); each line must be one") from error
        if not isinstance(row, dict) or (missing := [k for k in needed if not isinstance(row.get(k), str) or not row[k].strip()]):
            raise ValueError(f"{path}:{number}: must be an object with the text fields {list(needed)}"
                             + (f", lacks {missing}" if isinstance(row, dict) else ", one a line"))
        if any("\ud800" <= c <= "\udfff" for k in needed for c in row[k]):
            raise ValueError(f"{path}:{number}: holds half of a surrogate pair, which is no text")
        rows.append(row)
    return rows


def read_prompts(path: str) -> list[dict]:
    """Prompts as metadata: JSON lines of GenEval's format in a .jsonl (or .json) file, else plain text in a .txt file or one without an
    ending. The name decides; a file whose content says otherwise is refused."""
    ending = Path(path).suffix.lower()
    if ending in (".jsonl", ".json", ".ndjson"):
        rows = [{"tag": "", "include": [], **row} for row in read_json_lines(path, ("prompt",))]
        for row in rows:
            check_objects(path, row, row["prompt"])
        return rows
    if ending not in (".txt", ""):
        raise ValueError(f"file {path}: its ending {ending} says neither .jsonl (JSON objects) nor .txt (plain text); rename it")
    lines = read_lines(path)
    for number, line in lines:
        if line.lstrip()[0] in "{[" and is_json(line):
            raise ValueError(f"{path}:{number}: JSON in a file that its name calls plain text; name it .jsonl, one object a line")
    return [{"tag": "", "include": [], "prompt": line.strip()} for _, line in lines]


def check_objects(path: str, row: dict, text: str) -> None:
    """ValueError where GenEval's fields of a row are not lists of objects with a class, perhaps a count and a relation to another."""
    both = [row["include"], row.get("exclude", [])]
    objects = [clause for clauses in both for clause in (clauses if isinstance(clauses, list) else [None])]
    counted = lambda n: type(n) is int and n >= 1
    whole = lambda c: isinstance(c, dict) and isinstance(c.get("class"), str) and counted(c.get("count", 1))
    related = lambda c: isinstance(c, list) and len(c) == 2 and c[0] in RELATIONS and type(c[1]) is int
    if not isinstance(row["tag"], str) or not all(whole(c) and ("position" not in c or related(c["position"])) for c in objects):
        raise ValueError(f"{path}: prompt {text[:60]!r}: tag must be text, include and exclude lists of objects with a class, a count "
                         "of at least 1 and perhaps a position, such as [\"left of\", 0]")
    for clause in objects:                                      # a thing is one thing where nothing is said
        clause.setdefault("count", 1)


def is_json(line: str) -> bool:
    try:
        return isinstance(parsed(line), dict | list)
    except ValueError:
        return line.strip() in ("{", "[")                       # the first line of an indented file


TAGS_OF_ANSWERS = ("<think>", "</think>", "<answer>", "</answer>")


def read_questions(path: str, needed: tuple[str, ...] = ("image", "question", "answer")) -> list[dict]:
    """Rows image, question, answer, perhaps options, one of which the answer names by its letter or text; image paths are relative to the
    file. Every image is decoded once and every answer can be earned."""
    rows = [{**row, "image": str(Path(path).parent / row["image"])} for row in read_json_lines(path, needed)]
    check_images(path, rows)
    for row in rows:
        where, row["answer"] = f"{path}: question {row['question'][:60]!r}", final_answer(row["answer"])    # R1-like data have it in tags
        if not normalise_answer(row["answer"]) or any(tag in row["answer"] for tag in TAGS_OF_ANSWERS):
            raise ValueError(f"{where}: the answer {row['answer'][:60]!r} is empty or holds tags, so that no text can earn it")
        if options := row.get("options"):
            if not isinstance(options, list) or len(options) > 26 or not all(isinstance(o, str) and normalise_answer(o) for o in options):
                raise ValueError(f"{where}: options must be a list of at most 26 texts")
            try:
                right_option(row["answer"], options)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    return rows


def check_images(path: str, rows: list[dict]) -> None:
    """Every image exists and can be decoded."""
    if gone := [row["image"] for row in rows if not Path(row["image"]).is_file()]:
        raise FileNotFoundError(f"{path}: {len(gone)} images do not exist: {gone[:3]}")
    images = list(dict.fromkeys(row["image"] for row in rows))
    for image in tqdm(images, desc="checking images", disable=len(images) < 1000):
        open_picture(image, verify=True)


def read_pairs(path: str) -> list[dict]:
    """Rows image, caption, question, answer, perhaps options."""
    return read_questions(path, ("image", "caption", "question", "answer"))


def read_edits(path: str) -> list[dict]:
    """Rows image, instruction, perhaps caption (of the edited image), GenEval's include and exclude, and questions of questions.py."""
    rows = [{"tag": "", "include": [], **row, "image": str(Path(path).parent / row["image"])}
            for row in read_json_lines(path, ("image", "instruction"))]
    check_images(path, rows)
    for row in rows:
        check_objects(path, row, row["instruction"])
    return rows


READERS = {"prompts": read_prompts, "questions": read_questions, "pairs": read_pairs, "edits": read_edits}
# The field of each kind of file that the policy reads as text.
TEXT_OF = {"prompts": "prompt", "questions": "question", "pairs": "caption", "edits": "instruction"}
