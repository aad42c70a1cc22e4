"""GenEval's rules: do the objects that a detector finds in an image keep a prompt's metadata? And r_ins, the reward that asks it.

Source: GenEval (arXiv 2310.11513) and its code. Torch alone is imported; this file can be copied alone.
"""

import math

from support.rows import RELATIONS

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")  # GenEval's order in a reason
def relative_position(box_a, box_b, *, margin: float = 0.1) -> set[str]:
    """Where box A lies relative to box B, as a subset of RELATIONS; boxes (x1, y1, x2, y2) in pixels, y pointing down. [GenEval]

    The offset of the centres is shortened per axis by `margin` times the summed sizes, then divided by its unshortened length;
    a component beyond 0.5 is a relation.
    """
    offset, kept = [], []
    for low, high in ((0, 2), (1, 3)):
        apart = (box_a[low] + box_a[high] - box_b[low] - box_b[high]) / 2
        dead = margin * (abs(box_a[high] - box_a[low]) + abs(box_b[high] - box_b[low]))
        offset.append(apart)
        kept.append(math.copysign(max(abs(apart) - dead, 0.0), apart))
    if max(abs(part) for part in kept) < 1e-3:  # also where the centres coincide and the length is 0
        return set()
    dx, dy = (part / math.hypot(*offset) for part in kept)
    return {name for name, far in zip(RELATIONS, (-dy, dy, -dx, dx)) if far > 0.5}


def _include(clause: dict, found: dict, judged: list, margin: float) -> tuple[list, float, str]:
    """One include clause: the objects judged, the fraction of the required ones that is right, the reason of failure or ""."""
    name, required = clause["class"], clause["count"]
    top = found.get(name, [])[:required]  # only the best `count` are judged
    right = [True] * len(top)
    reason = f"expected {name}>={required}, found {len(top)}" if len(top) < required else ""
    if "color" in clause:
        color, seen = clause["color"], [thing.get("color") for thing in top]
        right = [c == color for c in seen]
        if not reason and not all(right):
            listed = [*COLORS, *sorted({c for c in seen if c is not None} - set(COLORS))]
            others = ", ".join(f"{seen.count(c)} {c}" for c in listed if c in seen)
            reason = f"expected {color} {name}>={required}, found {seen.count(color)} {color}; and {others}"
    if "position" in clause:
        relation, target = clause["position"]
        if relation not in RELATIONS or not 0 <= target < len(judged):
            raise ValueError(f"position {clause['position']} of {name}, expected one of {RELATIONS} and an earlier clause")
        targets, target_passes = judged[target]
        if not reason and not target_passes:
            reason = f"no target for {name} to be {relation}"
        for i, thing in enumerate(top):
            right[i] &= target_passes or bool(targets)
            for other in targets:
                holds = relative_position(thing["box"], other["box"], margin=margin)
                right[i] &= relation in holds
                if not reason and relation not in holds:
                    reason = f"expected {name} {relation} target, found {' and '.join(sorted(holds))} target"
    return top, sum(right) / required if required else 1.0, reason


def ranked(metadata: dict, detections: list[dict], *, threshold: float = 0.3, counting_threshold: float = 0.9,
           max_objects: int = 16) -> dict[str, list[dict]]:
    """The detections that count, by class, best first."""
    least, found = counting_threshold if metadata.get("tag") == "counting" else threshold, {}
    for thing in sorted(reversed(detections), key=lambda thing: -thing["score"]):  # equal scores: the later detection comes first
        if thing["score"] > least:
            found.setdefault(thing["class"], []).append(thing)
    return {name: things[:max_objects] for name, things in found.items()}


def geneval_clauses(
    metadata: dict, detections: list[dict], *, threshold: float = 0.3, counting_threshold: float = 0.9, max_objects: int = 16,
    position_margin: float = 0.1,
) -> list[tuple[float, str]]:
    """(fraction satisfied in [0, 1], reason of failure or "") per include and exclude clause, in order; see geneval_check."""
    found = ranked(metadata, detections, threshold=threshold, counting_threshold=counting_threshold, max_objects=max_objects)
    results, judged = [], []
    for clause in metadata.get("include", []):
        top, fraction, reason = _include(clause, found, judged, position_margin)
        results.append((fraction, reason))
        judged.append((top, not reason))
    for clause in metadata.get("exclude", []):
        name, limit, number = clause["class"], clause["count"], len(found.get(clause["class"], []))
        results.append((0.0, f"expected {name}<{limit}, found {number}") if number >= limit else (1.0, ""))
    return results


def geneval_check(metadata: dict, detections: list[dict], **settings) -> tuple[bool, str]:
    """GenEval's verdict on one image: (all clauses hold, reasons of failure joined by newlines). `settings`: geneval_clauses'.

    A detection is {"class", "box": [x1, y1, x2, y2], "score", "color"}, the colour only where a clause asks for one.
    Thresholds are strict; `max_objects` per class survive, best first; of an include clause the best `count` are judged for
    colour and position, every pair must be in the relation; more than `count` fails by `exclude` only. [GenEval, its code]

    Differs: two relations found at once are named in alphabetical order (the official order is arbitrary).
    """
    reasons = [reason for _, reason in geneval_clauses(metadata, detections, **settings) if reason]
    return not reasons, "\n".join(reasons)


def flow_grpo_score(metadata: dict, detections: list[dict], **settings) -> float:
    """Flow-GRPO's training reward on the same rules, at most 1, negative where there are more than twice as many things as asked for.

    The mean over parts of the include clauses: the number, 1 - |asked - found| / asked; where the number is exact, the colour, 1 - |asked -
    of that colour| / asked, and the relation, 0 for a broken one, and a 1 beside it either way once there was a target, as its code
    appends both. Where the number is wrong, a colour or relation counts 0. Exclude clauses are not read. [Flow-GRPO, its code]
    """
    margin = settings.pop("position_margin", 0.1)
    found, parts, judged = ranked(metadata, detections, **settings), [], []
    for clause in metadata.get("include", []):
        things, asked, kept = found.get(clause["class"], []), clause["count"], True
        parts.append(1 - abs(asked - len(things)) / asked)
        if len(things) != asked:
            kept = False
            parts += [0.0] if "color" in clause or "position" in clause else []
        elif "color" in clause:
            right = sum(thing.get("color") == clause["color"] for thing in things)
            parts.append(1 - abs(asked - right) / asked)
            kept = right == asked
        if kept and "position" in clause:
            relation, target = clause["position"]
            targets = judged[target]
            holds = lambda a, b: relation in relative_position(a["box"], b["box"], margin=margin)  # noqa: E731
            if targets is not None and all(holds(a, b) for a in things for b in targets):
                parts.append(1.0)
            else:
                parts += [0.0] if targets is None else [0.0, 1.0]
                kept = False
        judged.append(things if kept else None)
    return sum(parts) / len(parts) if parts else 0.0


def all_of(metadata: dict, detections: list[dict], **settings) -> float:
    return float(geneval_check(metadata, detections, **settings)[0])


def graded(metadata: dict, detections: list[dict], **settings) -> float:
    """The mean over clauses of the fraction satisfied, in [0, 1]."""
    parts = [part for part, _ in geneval_clauses(metadata, detections, **settings)]
    return sum(parts) / len(parts) if parts else 1.0
