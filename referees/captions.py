"""What a caption of countable things says, by rule: the tuples that SPICE makes by a parser."""

import functools
from rewards import NUMBERS


RELATIONS = ("above", "below", "left of", "right of")

COUNTED = {"a": "1", "an": "1", "the": "1", **NUMBERS, "1": "1", "2": "2", "3": "3", "4": "4"}

SMALLER = {"right of": "left of", "below": "above"}             # a relation and the one that says it with the two sides exchanged


def caption_tuples(caption: str, strict: bool = True) -> set[tuple]:
    """What a caption of countable things says, as SPICE takes it apart: (object,), (object, attribute or number), (object, relation,
    object). "two red circles above a square" gives {(circle,), (circle, red), (circle, 2), (square,), (square, above, circle) turned}.

    By rule: phrases of article or number, adjectives and a noun, joined by "and", commas or one of RELATIONS, perhaps behind "a photo of".
    "right of" and "below" are turned round. A second phrase of the same noun gets a place of its own. ValueError for other captions;
    strict=False, for what a captioner wrote: a phrase that no rule reads is one thing by its own name, and of several relations none holds.
    """
    words = caption.lower().replace(",", " and ").rstrip(" .").split()
    if words[2:3] == ["of"] and words[1] in ("photo", "picture", "drawing", "image"):
        words = words[3:]
    text = " ".join(words)
    links = [link for link in RELATIONS for _ in range(text.count(f" {link} "))]
    parts = text.split(f" {links[0]} ") if links else [text]
    if len(links) > 1 and strict:
        raise ValueError(f"the caption {caption!r} has several relations, which no rule reads; use --recaption_by jaccard or bertscore")
    if len(links) > 1:
        parts, links = [functools.reduce(lambda said, link: said.replace(f" {link} ", " and "), links, text)], []
    out, names = set(), []
    for part in parts:
        names.append([])
        for phrase in part.split(" and "):
            name, facts = _phrase(phrase.split(), caption, strict)
            while (name,) in out:
                name += "'"
            names[-1].append(name)
            out |= {(name,), *((name, fact) for fact in facts)}
    if links:
        a, b, link = names[0][-1], names[1][0], links[0]
        out.add((b, SMALLER[link], a) if link in SMALLER else (a, link, b))
    return out


def _phrase(words: list[str], caption: str, strict: bool) -> tuple[str, list[str]]:
    """The noun, in the singular, and the attributes of "two red circles"; one of a thing is no attribute."""
    if (len(words) < 2 or words[0] not in COUNTED) and not strict:
        return " ".join(words), []
    if len(words) < 2 or words[0] not in COUNTED:
        raise ValueError(f"the caption {caption!r} has phrases unlike 'two red circles', which no rule reads; use --recaption_by jaccard "
                         "or bertscore")
    number = COUNTED[words[0]]
    noun = words[-1] if number == "1" else words[-1].removesuffix("s")
    return noun, words[1:-1] + ([number] if number != "1" else [])


def tuple_f1(prompt: str, caption: str) -> float:
    """F1 of the caption_tuples of a prompt and a captioner's caption, in [0, 1]: SPICE without its parser and its synonyms. What no rule
    reads in the caption is one more thing that the prompt does not say; in the prompt it is an error."""
    first, second = caption_tuples(prompt), caption_tuples(caption, strict=False)
    return 2 * len(first & second) / (len(first) + len(second))
