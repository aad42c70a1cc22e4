"""Rows of files: prompts, questions, pairs. What a file says is either honoured or refused, with the file, the line and what would be
right."""

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from tqdm import tqdm

from policy import Policy
from rewards import final_answer, normalise_answer, right_option
from support.pictures import open_picture, read_picture


RELATIONS = ("above", "below", "left of", "right of")


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


# ---- rows as tasks ask them ----

SOURCE_SIZE = (448, 448)                                        # of a file's image for rewards; judges squash to such a square anyway


@dataclass(frozen=True)
class Row:
    """One thing that is asked, wherever it comes from."""

    text: str                                                   # the prompt or the question
    metadata: dict                                              # GenEval format: tag, include, exclude
    pixels: Tensor | None = None                                # (3, H, W) the given image as the policy reads it
    source: Tensor | None = None                                # (3, H, W) the given image as rewards read it
    answer: str | None = None
    options: list[str] | None = None                            # of a multiple-choice question
    real: Tensor | None = None                                  # (3, H, W) the real image of a prompt, as rewards read it
    full: Tensor | None = None                                  # (3, H, W) in [-1, 1] the given image as the autoencoder reads it
    wanted: str = ""                                            # a caption of the edited image, which rewards read in place of the text

Pool = Callable[[tuple, int, range], list[Row]]                 # (random key, rows of the whole step, which of them) -> those rows


def prompt_row(metadata: dict) -> Row:
    return Row(metadata["prompt"], metadata)


def pick(rng: np.random.Generator, options):
    """One of the options, drawn alike."""
    return options[int(rng.integers(len(options)))]


def by_tag(prompts: list[dict]) -> Pool:
    """Tags drawn alike, however many prompts each has, then one prompt of the tag."""
    tagged: dict[str, list] = {}
    for m in prompts:
        tagged.setdefault(m.get("tag", ""), []).append(m)
    groups = list(tagged.values())

    def draw(key: tuple, count: int, mine: range) -> list[Row]:
        rng = np.random.default_rng(key)
        turns = rng.permutation(count * len(groups))[:count] % len(groups)
        rows = [prompt_row(pick(rng, groups[turn])) for turn in turns]
        return [rows[i] for i in mine]
    return draw


def prompts_of_file(rows: list[dict], policy: Policy) -> Pool:
    return by_tag(rows)


def edits_of_file(rows: list[dict], policy: Policy) -> Pool:
    """Edits, their images cut to the square in the middle, since one batch of noisy steps has one size."""
    def read(row: dict) -> Row:
        pixels, full = read_picture(row["image"], policy, square=True)
        return Row(row["instruction"], row, pixels, for_rewards(full), full=full, wanted=row.get("caption", ""))
    return of_file(rows, read)


def of_file(rows: list[dict], read: Callable[[dict], Row]) -> Pool:
    """Rows of a file, without repetition in a step where it has enough; images are read when they are drawn."""
    def draw(key: tuple, count: int, mine: range) -> list[Row]:
        drawn = np.random.default_rng(key).choice(len(rows), count, replace=len(rows) < count)
        return [read(rows[drawn[i]]) for i in mine]
    return draw


def for_rewards(pixels: Tensor) -> Tensor:
    return F.interpolate(pixels[None] * 0.5 + 0.5, SOURCE_SIZE, mode="bicubic", antialias=True)[0].clamp(0, 1)


def asked_of(row: dict, policy: Policy, options: bool) -> Row:
    """A row of a file of questions or pairs as a question, with its options where they are asked for and it has some."""
    pixels, _ = read_picture(row["image"], policy)
    listed = row.get("options") if options else None
    text = row["question"] if not listed else f"{row['question']} {lettered(listed)}"
    answer = row["answer"] if listed or not row.get("options") else row["options"][right_option(row["answer"], row["options"])]
    return Row(text, {"tag": row.get("kind", ""), "include": []}, pixels, for_rewards(pixels), answer, listed)


def captioned(row: dict, policy: Policy) -> Row:
    """A row of a file of pairs as a prompt with its real image."""
    return Row(row["caption"], {"tag": "", "include": [], **row}, real=for_rewards(read_picture(row["image"], policy)[0]))


def lettered(options: list[str]) -> str:
    """"(a) red (b) blue"."""
    return " ".join(f"({string.ascii_lowercase[i]}) {option}" for i, option in enumerate(options))


def check_rules(rows: list[dict], path: str, kind: str) -> None:
    """ValueError where r_ins has no rule to read."""
    if bare := [row[TEXT_OF[kind]] for row in rows if not row.get("include") and not row.get("exclude")]:
        raise ValueError(f"--ins reads GenEval's include and exclude, which {len(bare)} rows of {path} do not have, {bare[0][:60]!r} for "
                         "one; add them, or set --ins 0 and use --sem, --kn or --dvreward")
