"""GenEval's rules: do the objects that a detector finds in an image keep a prompt's metadata?

Source: GenEval (arXiv 2310.11513) and its code.

A detection is {"class", "box": [x1, y1, x2, y2], "score", "color"}; boxes are in pixels, y pointing
down, and there is a colour only if a clause asks for one.
"""

import numpy as np

from support.rows import RELATIONS, Metadata

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
MOST_OBJECTS = 16                               # of a class in one image
MARGIN = 0.1                                    # share of the summed sizes that an offset loses


def relative_position(box_a: list[float], box_b: list[float]) -> set[str]:
    """Where box A lies relative to box B, as a subset of RELATIONS. [GenEval]

    Along each axis the offset of the centres is shortened by a share of the summed sizes, then
    divided by the length of the unshortened offset. A component above 0.5 is a relation.
    """
    corners = np.reshape([box_a, box_b], (2, 2, 2))                     # box, corner, axis
    middle_a, middle_b = corners.mean(1)
    offset = middle_a - middle_b                                        # (2,)
    sizes = np.ptp(corners, 1).sum(0)
    shortened = np.sign(offset) * np.maximum(abs(offset) - MARGIN * sizes, 0)
    if abs(shortened).max() < 1e-3:             # the length may be 0
        return set()
    dx, dy = shortened / np.hypot(*offset)
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


def geneval_check(
    metadata: Metadata, detections: list[dict], **thresholds
) -> tuple[bool, list[float]]:
    """GenEval's verdict on one image: (all clauses hold, the fraction kept of each, in [0, 1]).

    thresholds: of best_by_class, strict. Of an include clause the best `count` things are judged
    for colour and position, and every pair must be in the relation; more than `count` things fail
    only an exclude clause. [GenEval, its code]
    """
    found = best_by_class(metadata, detections, **thresholds)
    fractions = []
    judged = []
    for clause in metadata.get("include", []):
        right = found.get(clause["class"], [])[:clause["count"]]
        judged.append(right)
        if "color" in clause:
            right = [thing for thing in right if thing["color"] == clause["color"]]
        if "position" in clause:
            relation, target = clause["position"]
            right = [thing for thing in right if stands(thing, relation, judged[target])]
        fractions.append(len(right) / clause["count"])
    for clause in metadata.get("exclude", []):
        things = found.get(clause["class"], [])
        fractions.append(1.0 if len(things) < clause["count"] else 0.0)
    return all(fraction == 1 for fraction in fractions), fractions


def stands(thing: dict, relation: str, targets: list[dict]) -> bool:
    """Whether a thing is in the relation to every target, and there is one."""
    for other in targets:
        if relation not in relative_position(thing["box"], other["box"]):
            return False
    return bool(targets)


def fraction_kept(metadata: Metadata, detections: list[dict], **thresholds) -> float:
    """The mean over clauses of the fraction that is kept, in [0, 1]; 1 without clauses."""
    _, fractions = geneval_check(metadata, detections, **thresholds)
    return sum(fractions) / len(fractions) if fractions else 1.0
