"""GenEval's rules: do the objects that a detector finds in an image keep a prompt's metadata?

Source: GenEval (arXiv 2310.11513) and its code.

A detection is {"class", "box": [x1, y1, x2, y2], "score", "color"}; boxes are in pixels, y pointing
down, and there is a colour only if a clause asks for one.
"""

import math

from support.rows import RELATIONS, Clause, Metadata

# In GenEval's order, which a reason of failure keeps.
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MOST_OBJECTS = 16                               # of a class in one image
MARGIN = 0.1                                    # share of the summed sizes that an offset loses


def relative_position(box_a: list[float], box_b: list[float]) -> set[str]:
    """Where box A lies relative to box B, as a subset of RELATIONS. [GenEval]

    Along each axis the offset of the centres is shortened by a share of the summed sizes, then
    divided by the length of the unshortened offset. A component above 0.5 is a relation.
    """
    offset, shortened = [], []
    for low, high in ((0, 2), (1, 3)):
        apart = (box_a[low] + box_a[high] - box_b[low] - box_b[high]) / 2
        sizes = abs(box_a[high] - box_a[low]) + abs(box_b[high] - box_b[low])
        offset.append(apart)
        shortened.append(math.copysign(max(abs(apart) - MARGIN * sizes, 0.0), apart))
    if max(map(abs, shortened)) < 1e-3:         # the length may be 0
        return set()
    dx, dy = (part / math.hypot(*offset) for part in shortened)
    components = zip(RELATIONS, (-dy, dy, -dx, dx))
    return {relation for relation, component in components if component > 0.5}


def best_by_class(
    metadata: Metadata, detections: list[dict], *, threshold: float = 0.3,
    counting_threshold: float = 0.9
) -> dict[str, list[dict]]:
    """The detections that count, by class, best first; of equals the later one is first."""
    least = counting_threshold if metadata.get("tag") == "counting" else threshold
    found = {}
    for thing in sorted(reversed(detections), key=lambda thing: -thing["score"]):
        if thing["score"] > least:
            found.setdefault(thing["class"], []).append(thing)
    return {name: things[:MOST_OBJECTS] for name, things in found.items()}


def geneval_clauses(
    metadata: Metadata, detections: list[dict], **thresholds
) -> list[tuple[float, str]]:
    """(fraction kept in [0, 1], reason of failure or "") of each clause, in order."""
    found = best_by_class(metadata, detections, **thresholds)
    results, judged = [], []
    for clause in metadata.get("include", []):
        things = found.get(clause["class"], [])
        things = things[:clause["count"]]       # only the best `count` are judged
        fraction, reason = _judge_include(clause, things, judged)
        results.append((fraction, reason))
        judged.append((things, not reason))
    for clause in metadata.get("exclude", []):
        name, limit, number = clause["class"], clause["count"], len(found.get(clause["class"], []))
        if number >= limit:
            results.append((0.0, f"expected {name}<{limit}, found {number}"))
        else:
            results.append((1.0, ""))
    return results


def _judge_include(
    clause: Clause, things: list[dict], judged: list[tuple[list, bool]]
) -> tuple[float, str]:
    """The fraction of an include clause's objects that are right, and why it fails or "".

    judged: the things of each earlier clause, and whether they passed.
    """
    name, required = clause["class"], clause["count"]
    right = [True] * len(things)
    reasons = []
    if len(things) < required:
        reasons.append(f"expected {name}>={required}, found {len(things)}")
    if "color" in clause:
        colors = [thing.get("color") for thing in things]
        right = [color == clause["color"] for color in colors]
        if not all(right):
            reasons.append(_wrong_colors(clause, colors))
    if "position" in clause:
        relation, target = clause["position"]
        targets, target_passed = judged[target]
        if not target_passed:
            reasons.append(f"no target for {name} to be {relation}")
        for i, thing in enumerate(things):
            if not targets and not target_passed:
                right[i] = False
            for other in targets:
                holds = relative_position(thing["box"], other["box"])
                if relation not in holds:
                    right[i] = False
                    places = " and ".join(sorted(holds))
                    reasons.append(f"expected {name} {relation} target, found {places} target")
    fraction = sum(right) / required if required else 1.0
    return fraction, next(iter(reasons), "")


def _wrong_colors(clause: Clause, colors: list[str | None]) -> str:
    color, name, required = clause["color"], clause["class"], clause["count"]
    counts = [f"{colors.count(other)} {other}" for other in COLORS if other in colors]
    found = f"{colors.count(color)} {color}; and {', '.join(counts)}"
    return f"expected {color} {name}>={required}, found {found}"


def geneval_check(metadata: Metadata, detections: list[dict], **thresholds) -> tuple[bool, str]:
    """GenEval's verdict on one image: (all clauses hold, reasons of failure joined by newlines).

    thresholds: of best_by_class, strict. Of an include clause the best `count` things are judged
    for colour and position, and every pair must be in the relation; more than `count` things fail
    only an exclude clause. [GenEval, its code]

    Differs: two relations found at once are named in alphabetical order (the official order is
    arbitrary).
    """
    clauses = geneval_clauses(metadata, detections, **thresholds)
    reasons = [reason for _, reason in clauses if reason]
    return not reasons, "\n".join(reasons)


def fraction_kept(metadata: Metadata, detections: list[dict], **thresholds) -> float:
    """The mean over clauses of the fraction that is kept, in [0, 1]; 1 without clauses."""
    fractions = [fraction for fraction, _ in geneval_clauses(metadata, detections, **thresholds)]
    return sum(fractions) / len(fractions) if fractions else 1.0
