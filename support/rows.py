"""Rows of files: prompts, questions and edits, each honoured or refused by file and line."""

import json
import re
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from policy import Policy
from rewards import final_answer, normalise_answer, right_option
from support.disk import one_line_error
from support.pictures import open_picture, read_picture

RELATIONS = ("above", "below", "left of", "right of")


# One thing that a picture must show, or must not. [GenEval] "class" is a word of Python, hence the
# call.
Clause = TypedDict(
    "Clause",
    {
        "class": str,                           # what to look for, "dog"
        "count": int,                           # how many of it; 1 if a file does not say
        "color": NotRequired[str],
        "position": NotRequired[tuple[str, int]],       # its relation to the clause of that number
    },
)


class Metadata(TypedDict):
    """What a picture of a prompt must show, in the format of GenEval's files."""

    tag: str                                    # the kind of prompt, "counting"; "" if unknown
    include: list[Clause]
    exclude: NotRequired[list[Clause]]
    prompt: NotRequired[str]


# ---- reading files ----


def read_lines(path: str) -> list[tuple[int, str]]:
    """(number from 1, line) of the lines of a UTF-8 file that are not blank.

    A byte order mark is dropped. Errors: FileNotFoundError; ValueError for a file that is not UTF-8
    or has no such line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"file {path} does not exist")
    with one_line_error(f"file {path} is not UTF-8 text, save it as UTF-8"):
        text = Path(path).read_bytes().decode("utf-8-sig")
    lines = text.replace("\r\n", "\n").split("\n")              # splitlines would cut at U+2028 too
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"file {path} is empty; it must hold one entry a line")
    return numbered


def read_json_lines(path: str, needed: tuple[str, ...]) -> list[dict]:
    """JSON objects, one a line, with the needed text fields and with all of GenEval's fields.

    A field that is null is left out. Errors: ValueError, with file and line.
    """
    rows = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        with one_line_error(f"{where}: not a JSON object; each line must be one"):
            row = json.loads(line, object_hook=drop_null, parse_constant=lambda word: None)
        if not isinstance(row, dict) or not all(has_text(row, name) for name in needed):
            raise ValueError(f"{where}: must be one object with the text fields {list(needed)}")
        row = {"tag": "", "include": [], **row}
        with one_line_error(
            f"{where}: every clause must have a class, a count of at least 1, perhaps a color and "
            "a position to an earlier one"):
            check_clauses(row)
        for name in ("prompt", "question", "instruction", "caption"):
            if has_text(row, name):
                row[name] = without_image_place(row[name], where)
        rows.append(row)
    return rows


def drop_null(row: dict) -> dict:
    """An object without the fields that are null or NaN, as exporters write what is not there."""
    return {name: value for name, value in row.items() if value is not None}


def check_clauses(row: dict) -> None:
    """Check a row's tag and clauses, and fill in the count and the case of colours.

    Errors: ValueError for a clause of another form; of exclude only the class and count are read.
    """
    if not isinstance(row["tag"], str):
        raise ValueError(f"not the tag {row['tag']}")
    for half, fields in (("include", Clause.__annotations__), ("exclude", ("class", "count"))):
        for place, clause in enumerate(row.get(half, [])):
            count = clause.setdefault("count", 1)
            right = [
                type(count) is int and count >= 1, has_text(clause, "class"),
                set(clause) <= set(fields)]
            if "color" in clause:
                clause["color"] = clause["color"].strip().lower()
                right.append(has_text(clause, "color"))
            if "position" in clause:
                relation, other = clause["position"]
                right += [relation in RELATIONS, type(other) is int and 0 <= other < place]
            if not all(right):
                raise ValueError(f"not {clause}")


# The place of an image, as many programs' questions have it.
PLACE = r"(?:</?\|?(?:image|img|vision)[^<>]*>|\[IMG\])"


def without_image_place(text: str, where: str) -> str:
    """A text without the place of its image, which is read before the text anyway.

    Errors: ValueError for a place among the words, or of a video.
    """
    text = re.sub(rf"^\s*({PLACE}\s*)+|(\s*{PLACE})+\s*$", "", text, flags=re.IGNORECASE)
    if not text or re.search(rf"{PLACE}|<\|?video[^<>]*>", text, re.IGNORECASE):
        raise ValueError(
            f"{where}: {text[:60]!r} holds the place of an image; one image is read, before the "
            "text: word the row without")
    return text


def has_text(row: dict, name: str) -> bool:
    return isinstance(row.get(name), str) and bool(row[name].strip())


def read_prompts(path: str) -> list[Metadata]:
    """Prompts, from GenEval's JSON lines or plain text.

    The ending decides: .jsonl, .json and .ndjson, or .txt and none. A file whose content says
    otherwise is refused.
    """
    ending = Path(path).suffix.lower()
    if ending in (".jsonl", ".json", ".ndjson"):
        return read_json_lines(path, ("prompt",))
    if ending not in (".txt", ""):
        raise ValueError(
            f"file {path}: its ending {ending} must be .jsonl (JSON objects) or .txt (plain text)")
    prompts = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if is_json(line):
            raise ValueError(
                f"{where}: JSON in a file that its ending calls plain text; name it .jsonl")
        prompt = without_image_place(line.strip(), where)
        prompts.append(Metadata(tag="", include=[], prompt=prompt))
    return prompts


def is_json(line: str) -> bool:
    """Whether a line holds a JSON object or list, or opens one."""
    try:
        return isinstance(json.loads(line), dict | list)
    except ValueError:
        return line.strip() in ("{", "[")       # the first line of an indented file


def read_questions(path: str) -> list[dict]:
    """Rows with an image, a question, an answer, and perhaps options.

    The answer names an option by its letter or its text. A row that has a caption too can serve
    pairs. Image paths are relative to the file. Every image is decoded once, and every answer can
    be earned.
    """
    rows = read_json_lines(path, ("image", "question", "answer"))
    check_images(path, rows)
    for row in rows:
        row["answer"] = final_answer(row["answer"])             # R1-like data have it in tags
        with one_line_error(f"{path}: question {row['question'][:60]!r}"):
            check_answer(row)
    return rows


def check_answer(row: dict) -> None:
    """ValueError for an answer that no text can earn, or that names no option."""
    answer = row["answer"]
    options = row.get("options") or []
    tags = [tag for tag in ("<think>", "</think>", "<answer>", "</answer>") if tag in answer]
    if tags or not normalise_answer(answer):
        raise ValueError(
            f"the answer {answer[:60]!r} is empty or holds tags, so that no text can earn it")
    if not isinstance(options, list):
        raise ValueError("options must be a list of texts")
    if options:
        right_option(answer, options)


def check_images(path: str, rows: list[dict]) -> None:
    """Make the rows' image paths relative to the file, and decode every image once."""
    for row in rows:
        row["image"] = str(Path(path).parent / row["image"])
    for image in dict.fromkeys(row["image"] for row in rows):
        open_picture(image)


def read_edits(path: str) -> list[dict]:
    """Rows with an image and an instruction.

    They may have a caption of the edited image, GenEval's clauses, and questions for a judge.
    """
    rows = read_json_lines(path, ("image", "instruction"))
    check_images(path, rows)
    return rows


READERS = dict(prompts=read_prompts, questions=read_questions, edits=read_edits)


def check_rules(rows: list[dict], path: str, text: str) -> None:
    """ValueError for rows without clauses, which r_ins cannot judge; text: the field to quote."""
    bare = [row[text] for row in rows if not row.get("include") and not row.get("exclude")]
    if bare:
        raise ValueError(
            f"--ins reads GenEval's include and exclude, which {len(bare)} rows of {path} do not "
            f"have, such as {bare[0][:60]!r}; add them, or set --ins 0 and use --sem, --kn or "
            "--dvreward")


# ---- rows as tasks ask them ----

SOURCE_SIZE = (448, 448)                        # of a file's image for rewards, which squash it


@dataclass(frozen=True)
class Row:
    """One thing that is asked, whatever it comes from."""

    text: str                                   # the prompt or the question
    metadata: Metadata
    pixels: Tensor | None = None  # (3, H, W) the given image as the policy reads it
    source: Tensor | None = None  # (3, H, W) the given image as rewards read it
    answer: str | None = None
    options: list[str] | None = None            # of a multiple-choice question
    real: Tensor | None = None  # (3, H, W) the real image of a prompt, for rewards
    full: Tensor | None = None  # (3, H, W) the given image for the autoencoder
    wanted: str = ""                            # a caption of the edited image, for rewards


# (random key, number of rows of the whole step, which of them) -> those rows
Pool = Callable[[tuple, int, range], list[Row]]


def prompt_row(metadata: Metadata) -> Row:
    return Row(metadata["prompt"], metadata)


def pool_by_tag(prompts: list[Metadata]) -> Pool:
    """Tags in turn, whatever number of prompts each has, and a random prompt of the tag."""
    by_tag = {}
    for metadata in prompts:
        by_tag.setdefault(metadata["tag"], []).append(metadata)
    groups = list(by_tag.values())

    def draw(key, count, mine):
        rng = np.random.default_rng(key)
        turns = rng.permutation(count * len(groups))[:count] % len(groups)
        places = [rng.integers(len(groups[turn])) for turn in turns]
        return [prompt_row(groups[turns[i]][places[i]]) for i in mine]

    return draw


def pool_of(rows: list[dict], policy: Policy, read: Callable[[dict, Policy], Row]) -> Pool:
    """Rows of a file, none twice in a step if it has enough; an image is read when it is drawn."""

    def draw(key, count, mine):
        chosen = np.random.default_rng(key).choice(len(rows), count, replace=len(rows) < count)
        return [read(rows[chosen[i]], policy) for i in mine]

    return draw


def prompts_of_file(rows: list[dict], policy: Policy) -> Pool:
    return pool_by_tag(rows)


def question_row(row: dict, policy: Policy) -> Row:
    """An open question; the answer to one that has options is the right option's text."""
    pixels, _ = read_picture(row["image"], policy)
    answer = row["answer"]
    options = row.get("options")
    metadata = Metadata(tag=row.get("kind", ""), include=[])
    if options:
        answer = options[right_option(answer, options)]
    return Row(row["question"], metadata, pixels, reward_pixels(pixels), answer)


def choice_row(row: dict, policy: Policy) -> Row:
    """A question with its options, if it has some."""
    options = row.get("options")
    if not options:
        return question_row(row, policy)
    text = f"{row['question']} {letter_options(options)}"
    return replace(question_row(row, policy), text=text, answer=row["answer"], options=options)


def caption_row(row: dict, policy: Policy) -> Row:
    """A caption as a prompt, with its real image."""
    pixels, _ = read_picture(row["image"], policy)
    return Row(row["caption"], row, real=reward_pixels(pixels))


def edit_row(row: dict, policy: Policy) -> Row:
    """An edit of the square in the middle of an image: noisy images of a batch have one size."""
    pixels, full = read_picture(row["image"], policy, square=True)
    wanted = row.get("caption", "")
    return Row(row["instruction"], row, pixels, reward_pixels(full), full=full, wanted=wanted)


questions_of_file = partial(pool_of, read=question_row)
choices_of_file = partial(pool_of, read=choice_row)
captions_of_file = partial(pool_of, read=caption_row)
edits_of_file = partial(pool_of, read=edit_row)


def reward_pixels(pixels: Tensor) -> Tensor:
    """(3, H, W) in [-1, 1] -> (3, *SOURCE_SIZE) in [0, 1]."""
    resized = F.interpolate(pixels[None] * 0.5 + 0.5, SOURCE_SIZE, mode="bicubic", antialias=True)
    return resized[0].clamp(0, 1)


def letter_options(options: list[str]) -> str:
    """["red", "blue"] -> "(a) red (b) blue"."""
    lettered = zip(string.ascii_lowercase, options)
    return " ".join(f"({letter}) {option}" for letter, option in lettered)
