"""What a caption of countable things says, taken apart by rule instead of by SPICE's parser."""

import re

import torch
from torch import Tensor

from rewards import NUMBERS
from support.rows import RELATIONS

COUNTED = {"a": "1", "an": "1", "the": "1", "1": "1", "2": "2", "3": "3", "4": "4", **NUMBERS}
TURNED = {"right of": "left of", "below": "above"}  # the same relation, its two sides exchanged


def caption_tuples(caption: str, strict: bool = True) -> set[tuple]:
    """The objects, attributes, numbers and relations that a caption of countable things states.

    "two red circles above a square" gives the tuples (circle,), (circle, red), (circle, 2),
    (square,) and (circle, above, square). A phrase is an article or a number, adjectives and a
    noun. Phrases are joined by "and", commas or one of RELATIONS, perhaps after "a photo of".
    "right of" and "below" are turned round. A second phrase of a noun is another object.
    Errors: ValueError for any other caption. With strict=False, for what a captioner wrote, a
    phrase that no rule reads is one object by its own name, and of several relations none counts.
    """
    words = caption.lower().replace(",", " and ").rstrip(" .").split()
    if words[2:3] == ["of"] and words[1] in ("photo", "picture", "drawing", "image"):
        words = words[3:]
    text = " ".join(words)
    parts = re.split(f" ({'|'.join(RELATIONS)}) ", text)
    relations = parts[1::2]
    if strict and len(relations) > 1:
        raise ValueError(
            f"the caption {caption!r} has several relations, which no rule reads; use "
            "another --captioner")
    out = set()
    names_of = []                               # a list for each side
    for side in parts[::2]:
        names = []
        for phrase in side.split(" and "):
            name, attributes = _read_phrase(phrase, caption, strict)
            while (name,) in out:
                name += "'"
            names.append(name)
            out.add((name,))
            out |= {(name, attribute) for attribute in attributes}
        names_of.append(names)
    if len(relations) == 1:
        first = names_of[0][-1]
        second = names_of[1][0]
        relation = relations[0]
        if relation in TURNED:
            first, second, relation = second, first, TURNED[relation]
        out.add((first, relation, second))
    return out


def _read_phrase(phrase: str, caption: str, strict: bool) -> tuple[str, list[str]]:
    """The noun of "two red circles", in the singular, and its attributes; "one" is none."""
    words = phrase.split()
    if len(words) < 2 or words[0] not in COUNTED:
        if strict:
            raise ValueError(
                f"the caption {caption!r} has phrases unlike 'two red circles', which no rule "
                "reads; use another --captioner")
        return " ".join(words), []
    number, *adjectives, noun = words
    if COUNTED[number] == "1":
        return noun, adjectives
    return noun.removesuffix("s"), [*adjectives, COUNTED[number]]


def tuple_f1(prompt: str, caption: str) -> float:
    """F1 of the tuples of a prompt and a captioner's caption, in [0, 1]: SPICE by rule.

    What no rule reads in the caption is one more thing that the prompt does not say. ValueError if
    no rule reads the prompt.
    """
    first = caption_tuples(prompt)
    second = caption_tuples(caption, strict=False)
    return 2 * len(first & second) / (len(first) + len(second))


def tuple_similarity(prompts: list[str], captions: list[str]) -> Tensor:
    """tuple_f1 of each prompt and caption, (N,)."""
    return torch.tensor([tuple_f1(*pair) for pair in zip(prompts, captions)])
