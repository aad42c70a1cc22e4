"""The toy world: pictures of coloured shapes, everything that can be said about them, and a detector that reads them back.

Images are 32x32 RGB, one to four shapes on a plain ground, each in its own quadrant of a 2x2 grid. Prompts are written in
GenEval's metadata format (arXiv:2310.11513) with its six tags, so that one checker serves toy detections and real ones. Beside
them: implicit prompts that need a thought, questions with exact answers, edits, reflections, and wrong supervision on purpose
(a base with systematic errors leaves room for reinforcement; label noise alone does not).

Left out: overlap, rotation, texture. Every object keeps to its quadrant, so a scene is read back exactly and a failed check is
the policy's fault. HELD_OUT pairs of (color, shape) occur in no training prompt, question, edit or scene.

Legend: a scene is a tuple of Objects; (row, col) names the quadrant, (0, 0) top left; images are uint8 (N, 32, 32, 3); "object
tuples" are (shape, color, row, col), of a scene by `discrete`, of detections by `read`. All sampling takes a np.random.Generator.

    metadata, rng = prompts("train")[0], np.random.default_rng(0)
    found = detect(render(sample_scene(metadata, rng)))[0]          # [{"class", "box", "score", "color"}, ...]
    satisfies(metadata, read(found))                                # True

`python toy/shapes.py --out shapes.png` prints the detector's accuracy and writes a sheet of examples.
"""
import argparse
import functools
import textwrap
import time
import zlib
from dataclasses import dataclass, replace
from itertools import combinations, permutations

import numpy as np

SIZE, GROUND = 32, 245                                           # pixels; grey level of the plain ground
COLORS = {"red": (225, 20, 30), "green": (20, 160, 60), "blue": (30, 70, 235), "yellow": (245, 220, 20), "purple": (150, 20, 190),
          "orange": (245, 130, 20)}
INK, EDGE = 225, 0.42                                            # a full pixel's drop below the ground; shape above EDGE of it
SHAPES = ("circle", "square", "triangle")
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))                         # (row, col) of the quadrants
HELD_OUT = (("purple", "circle"), ("green", "square"), ("orange", "triangle"))
COUNTS = ("zero", "one", "two", "three", "four")
RELATIONS = {"left of": (3, -1), "right of": (3, 1), "above": (2, -1), "below": (2, 1)}      # entry of an object tuple, sign
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PREFIXES = ("", "a photo of ", "a picture of ", "a drawing of ", "an image of ")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNT_FACTS = ((2, "a bicycle", "wheels"), (2, "a bird", "wings"), (2, "a face", "eyes"), (3, "a triangle", "sides"),
               (3, "a tricycle", "wheels"), (3, "a clover", "leaves"), (4, "a square", "corners"), (4, "a car", "wheels"),
               (4, "a dog", "legs"))
COLOR_FACTS = (("red", "blood"), ("red", "a cherry"), ("green", "grass"), ("green", "a leaf"), ("blue", "the sky"),
               ("blue", "the sea"), ("yellow", "the sun"), ("yellow", "a lemon"), ("purple", "a plum"), ("purple", "lavender"),
               ("orange", "a carrot"), ("orange", "a pumpkin"))
LETTERS = ("(a)", "(b)", "(c)", "(d)")                          # of options
CAPTION, THINK = "what is in the image ?", "think first"         # asks for a caption; behind a question: for tags, thought and answer
LOOK_AGAIN, FAILED = "look again", "this is wrong , look again"  # behind the prompt of a picture that is to be repaired
RIGHT = "it is as it should be"                                  # the diagnosis of a picture that needs no repair
VOCABULARY = tuple("""<think> </think> <answer> </answer> ? , a an the and of in as many is are it there should be has what how
    color shape object photo picture drawing image circle circles square squares triangle triangles red green blue yellow purple
    orange zero one two three four yes no not left right above below make remove add (a) (b) (c) (d) think first look again this wrong
    bicycle bird face tricycle clover car dog wheels wings eyes sides leaves corners legs
    blood cherry grass leaf sky sea sun lemon plum lavender carrot pumpkin""".split())


@dataclass(frozen=True)
class Object:
    """One shape, filling a box of half side `radius` around (8 + 16 col + dx, 8 + 16 row + dy), in pixels."""
    shape: str
    color: str
    row: int
    col: int
    dx: int = 0
    dy: int = 0
    radius: int = 5


Scene = tuple[Object, ...]
Rng = np.random.Generator


def depth(shape: str, x: np.ndarray, y: np.ndarray, r: float | np.ndarray) -> np.ndarray:
    """Signed distance to the edge of a shape of half side r, positive inside, at (x, y) from its centre; y points down."""
    if shape == "circle":
        return r - np.sqrt(x * x + y * y)
    if shape == "square":
        return r - np.maximum(abs(x), abs(y))
    return np.minimum((y + r - 2 * abs(x)) / np.sqrt(5), r - y)


def render(scene: Scene) -> np.ndarray:
    """The uint8 (32, 32, 3) picture of a scene, edges smoothed by 2x2 supersampling."""
    grid, image = (np.arange(2 * SIZE) + 0.5) / 2, np.full((SIZE, SIZE, 3), float(GROUND))
    for o in scene:
        distance = depth(o.shape, grid[None, :] - 8 - 16 * o.col - o.dx, grid[:, None] - 8 - 16 * o.row - o.dy, o.radius)
        cover = (distance >= 0).reshape(SIZE, 2, SIZE, 2).mean((1, 3))[..., None]               # (32, 32, 1)
        image += cover * (np.array(COLORS[o.color]) - image)
    return np.rint(image).astype(np.uint8)


def damaged(scene: Scene, rng: Rng, what: str) -> np.ndarray:
    """The picture of a scene, spoiled: what="ground" lays a haze or specks over it, "shape" a bar of bare ground across one object."""
    image = render(scene)
    if what == "shape":
        o, wide = pick(rng, scene), int(rng.integers(3, 5))
        centre = (8 + 16 * o.row + o.dy, 8 + 16 * o.col + o.dx)
        box = [slice(c - o.radius - 1, c + o.radius + 1) for c in centre]
        axis = int(rng.integers(2))
        box[axis] = slice(centre[axis] - wide // 2, centre[axis] - wide // 2 + wide)
        image[tuple(box)] = GROUND
    elif rng.random() < 0.5:
        tint = rng.integers(110, 215, 3)
        bare = (image == GROUND).all(-1, keepdims=True)
        image = np.where(bare, tint, image).astype(np.uint8)
    else:
        for y, x in rng.integers(1, SIZE - 2, (int(rng.integers(8, 16)), 2)):
            image[y:y + 2, x:x + 2] = rng.integers(0, 200, 3)
    return image


def discrete(scene: Scene) -> tuple[tuple, ...]:
    """What a scene says: sorted (shape, color, row, col), without jitter and size."""
    return tuple(sorted((o.shape, o.color, o.row, o.col) for o in scene))


def related(a: tuple, b: tuple, relation: str) -> bool:
    """Whether object tuple a stands in `relation` to b, by quadrant; diagonal neighbours stand in two relations."""
    axis, sign = RELATIONS[relation]
    return sign * (a[axis] - b[axis]) > 0


def satisfies(metadata: dict, objects: tuple[tuple, ...]) -> bool:
    """Whether object tuples meet include (at least `count`, with colour and position) and exclude (fewer than `count`).

    Differs: GenEval judges the best `count` boxes, position by their offsets; this judges all objects, position by quadrant."""
    groups = []
    for clause in metadata["include"]:
        relation, target = clause.get("position", (None, None))
        groups.append([o for o in objects if o[0] == clause["class"] and o[1] == clause.get("color", o[1])
                       and (relation is None or any(related(o, t, relation) for t in groups[target]))])
    return (all(len(group) >= clause["count"] for group, clause in zip(groups, metadata["include"]))
            and all(sum(o[0] == clause["class"] for o in objects) < clause["count"] for clause in metadata.get("exclude", ())))


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def explicit(metadata: dict) -> str:
    """The prompt, without prefix, that the include clauses spell. GenEval lists the anchor first: "a A left of a B" is [B, A]."""
    said = [f"{COUNTS[c['count']]} {c['class']}s" if c["count"] > 1 else article(f"{c.get('color', '')} {c['class']}".strip())
            for c in metadata["include"]]
    relation = metadata["include"][-1].get("position")
    return f"{said[1]} {relation[0]} {said[0]}" if relation else " and ".join(said)


def is_eval(split: str) -> bool:
    if split not in ("train", "eval"):
        raise ValueError(f"split is {split!r}, must be 'train' or 'eval'")
    return split == "eval"


def build(tag: str, include: list[dict], prefix: str = "") -> dict:
    """Metadata in GenEval's format; HELD_OUT pairs get the key "held_out".

    Differs: every prompt excludes more objects of any shape than it names, not only counting prompts: where extra objects are free,
    a policy soon fills its pictures with them."""
    metadata = {"tag": tag, "include": [dict(clause) for clause in include]}
    metadata["exclude"] = [{"class": s, "count": 1 + sum(c["count"] for c in include if c["class"] == s)} for s in SHAPES]
    metadata["prompt"] = prefix + explicit(metadata)
    if any((clause.get("color"), clause["class"]) in HELD_OUT for clause in include):
        metadata["held_out"] = True
    return metadata


def compositions() -> list[tuple[str, list]]:
    """All (tag, ways): one entry per meaning; `ways` lists the include clauses of each order in which it can be said."""
    one = {shape: {"class": shape, "count": 1} for shape in SHAPES}
    pairs = list(combinations(SHAPES, 2))
    out = [("single_object", [[one[s]]]) for s in SHAPES]
    out += [("two_object", [[one[a], one[b]], [one[b], one[a]]]) for a, b in pairs]
    out += [("counting", [[{"class": s, "count": n}]]) for s in SHAPES for n in (2, 3, 4)]
    out += [("colors", [[{**one[s], "color": c}]]) for s in SHAPES for c in COLORS]
    out += [("position", [[one[b], {**one[a], "position": [r, 0]}], [one[a], {**one[b], "position": [OPPOSITE[r], 0]}]])
            for a, b in pairs for r in RELATIONS]
    colored = [({**one[a], "color": c}, {**one[b], "color": d}) for a, b in pairs for c, d in permutations(COLORS, 2)]
    return out + [("color_attr", [[first, second], [second, first]]) for first, second in colored]


def prompts(split: str) -> list[dict]:
    """List of metadata of "train" or "eval"; no prompt string is in both.

    Eval holds every prompt that names a HELD_OUT pair, every phrasing of one in seven compositions of position and color_attr,
    and one of the five phrasings (PREFIXES) of everything else, whose four other phrasings are in train."""
    wanted, ways = is_eval(split), [(i, tag, way) for i, (tag, ways) in enumerate(compositions()) for way in ways]
    out = [(build(tag, way, prefix), (tag in ("position", "color_attr") and i % 7 == 3) or (j + k) % len(PREFIXES) == 0)
           for j, (i, tag, way) in enumerate(ways) for k, prefix in enumerate(PREFIXES)]
    return [metadata for metadata, unseen in out if (unseen or "held_out" in metadata) == wanted]


def implicit_prompts(split: str) -> list[dict]:
    """Prompts that need knowledge ("as many circles as a triangle has sides"), with keys "implicit" and "thought".

    Each fact meets two shapes in train and the third in eval; HELD_OUT pairs go to eval. The thought is
    "<think> a triangle has three sides </think> three circles": after the tag stands the explicit prompt."""
    facts = [("counting", {"count": n}, f"as many {{}}s as {owner} has {parts}", f"{owner} has {COUNTS[n]} {parts}")
             for n, owner, parts in COUNT_FACTS]
    facts += [("colors", {"count": 1, "color": color}, f"a {{}} in the color of {thing}", f"{thing} is {color}")
              for color, thing in COLOR_FACTS]
    wanted, out = is_eval(split), []
    for i, (tag, clause, riddle, fact) in enumerate(facts):
        for j, shape in enumerate(SHAPES):
            metadata = build(tag, [{"class": shape, **clause}])
            if ((i + i // 3 + j) % 3 == 0 or "held_out" in metadata) == wanted:
                out += [{**build(tag, metadata["include"]), "prompt": prefix + riddle.format(shape), "implicit": True,
                         "thought": f"<think> {fact} </think> {metadata['prompt']}"} for prefix in PREFIXES]
    return out


def pick(rng: Rng, options):
    """One of the options, all equally likely."""
    options = list(options)
    return options[int(rng.integers(len(options)))]


def place(rng: Rng, shape: str, color: str, row: int, col: int) -> Object:
    """An Object with radius 4..6 and jitter up to 2 pixels, never less than one pixel from its quadrant's edge."""
    radius = int(rng.integers(4, 7))
    reach = min(2, 7 - radius)
    return Object(shape, color, row, col, *(int(v) for v in rng.integers(-reach, reach + 1, size=2)), radius)


def free_color(rng: Rng, shape: str, training: bool, but=()) -> str:
    """A colour for the shape, none of `but`; with training none that would make a HELD_OUT pair."""
    return pick(rng, [c for c in COLORS if c not in but and not (training and (c, shape) in HELD_OUT)])


def fits(metadata: dict, scene: Scene) -> bool:
    """satisfies, and a named relation holds along the larger centre offset: GenEval's box rule then agrees on diagonals too."""
    if not satisfies(metadata, discrete(scene)):
        return False
    centre = {o.shape: (None, None, 16 * o.row + o.dy, 16 * o.col + o.dx) for o in scene}
    for clause in metadata["include"]:
        relation, target = clause.get("position", (None, None))
        if relation:
            away = [abs(a - b) for a, b in zip(centre[clause["class"]][2:], centre[metadata["include"][target]["class"]][2:])]
            if away[RELATIONS[relation][0] - 2] < max(away):
                return False
    return True


def sample_scene(metadata: dict, rng: Rng, training: bool = True) -> Scene:
    """A scene of exactly the objects that `metadata` includes; what is not named (colours, quadrants, sizes) is free.

    training: free colours never make a HELD_OUT pair."""
    wanted = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    while True:
        scene = tuple(place(rng, c["class"], c.get("color") or free_color(rng, c["class"], training), *CELLS[cell])
                      for c, cell in zip(wanted, rng.permutation(4)))
        if fits(metadata, scene):
            return scene


def scene_split(scene: Scene) -> str:
    """"eval" for scenes with a HELD_OUT pair and for one in five of the others (CRC-32 of the discrete content), else "train"."""
    held = any((o.color, o.shape) in HELD_OUT for o in scene)
    return "eval" if held or zlib.crc32(repr(discrete(scene)).encode()) % 5 == 0 else "train"


def random_scene(rng: Rng, split: str = "train") -> Scene:
    """A scene of 1 to 4 objects of any shape and colour, for questions and edits; the splits share no discrete content."""
    wanted = is_eval(split)
    while True:
        cells = rng.permutation(4)[:int(rng.integers(1, 5))]
        scene = tuple(place(rng, pick(rng, SHAPES), pick(rng, COLORS), *CELLS[cell]) for cell in cells)
        if (scene_split(scene) == "eval") == wanted:
            return scene


def unique(scene: Scene, attribute: str) -> list[Object]:
    """The objects whose shape (or color) no other object of the scene has."""
    values = [getattr(o, attribute) for o in scene]
    return [o for o in scene if values.count(getattr(o, attribute)) == 1]


def question_kinds(scene: Scene) -> list[str]:
    """The kinds of question that this scene answers: color and shape need a unique object, relation needs two."""
    shapes, colors = unique(scene, "shape"), unique(scene, "color")
    able = {"color": len(shapes) > 0, "shape": len(colors) > 0, "relation": len(shapes) > 1}
    return [kind for kind in ("count", "color", "shape", "exists", "relation") if able.get(kind, True)]


def make_question(scene: Scene, rng: Rng, kind: str | None = None, training: bool = True) -> dict:
    """dict(kind, question, answer); kind None draws one that the scene answers. exists and relation are yes half of the time.

    training: no question names a HELD_OUT pair that the scene lacks. Raises ValueError where the scene cannot answer the kind."""
    kind = kind or pick(rng, question_kinds(scene))
    if kind not in question_kinds(scene):
        raise ValueError(f"make_question: kind {kind!r} cannot be asked of this scene, must be one of {question_kinds(scene)}")
    shapes, answer = unique(scene, "shape"), pick(rng, ("yes", "no"))
    if kind == "count":
        shape = pick(rng, SHAPES)
        question, answer = f"how many {shape}s ?", COUNTS[sum(o.shape == shape for o in scene)]
    elif kind == "color":
        o = pick(rng, shapes)
        question, answer = f"what color is the {o.shape} ?", o.color
    elif kind == "shape":
        o = pick(rng, unique(scene, "color"))
        question, answer = pick(rng, (f"what shape is {o.color} ?", f"what is the shape of the {o.color} object ?")), o.shape
    elif kind == "exists":
        there = sorted({(o.color, o.shape) for o in scene})
        near = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in there and not (training and (c, s) in HELD_OUT)
                and any(c == o.color or s == o.shape for o in scene)]      # half right, so that both words are needed
        question = f"is there {article(' '.join(pick(rng, there if answer == 'yes' else near)))} ?"
    else:
        a, b = (discrete([shapes[i]])[0] for i in rng.permutation(len(shapes))[:2])
        relation = pick(rng, [r for r in RELATIONS if related(a, b, r) == (answer == "yes")])
        question = f"is the {a[0]} {relation} the {b[0]} ?"
    return {"kind": kind, "question": question, "answer": answer}


def answers_of(kind: str) -> tuple[str, ...]:
    """Every answer that a kind of question can have."""
    return {"count": COUNTS, "color": tuple(COLORS), "shape": SHAPES}.get(kind, ("yes", "no"))


def wrong_answer(question: dict) -> str:
    """The systematic wrong answer: one more (four becomes zero), the next colour or shape, the other of yes and no."""
    options = answers_of(question["kind"])
    return options[(options.index(question["answer"]) + 1) % len(options)]


def make_choice(question: dict, rng: Rng) -> dict:
    """A question of make_question with lettered options: dict(kind, question, answer, options).

    The question ends in "(a) red (b) blue ...", options are those words in that order: the right answer and up to three others of its
    kind, shuffled; the answer is its letter."""
    others = [each for each in answers_of(question["kind"]) if each != question["answer"]]
    options = [question["answer"], *(others[i] for i in rng.permutation(len(others))[:len(LETTERS) - 1])]
    options = [options[i] for i in rng.permutation(len(options))]
    listed = " ".join(f"{letter} {option}" for letter, option in zip(LETTERS, options))
    return {"kind": question["kind"], "question": f"{question['question']} {listed}",
            "answer": LETTERS[options.index(question["answer"])], "options": options}


def stated(question: dict, answer: str) -> str:
    """What a question of make_question and an answer say as a sentence: "there are three circles", "the circle is not above the square"."""
    words = question["question"].removesuffix(" ?").split()
    if question["kind"] == "count":
        return f"there is one {words[2][:-1]}" if answer == "one" else f"there are {answer} {words[2]}"
    if question["kind"] == "color":
        return f"the {words[-1]} is {answer}"
    if question["kind"] == "shape":
        return f"the {answer} is {next(word for word in words if word in COLORS)}"
    if question["kind"] == "exists":
        return f"there is {article(' '.join(words[-2:])) if answer == 'yes' else 'no ' + ' '.join(words[-2:])}"
    return " ".join([*words[1:3], "is", *([] if answer == "yes" else ["not"]), *words[3:]])


def describe(scene: Scene) -> str:
    """A caption of everything in a scene: per shape its number, or the colour of a single one; two single objects stand in the relation
    along the larger offset of their centres: "a red circle above a blue square"."""
    groups = [group for shape in SHAPES if (group := [o for o in scene if o.shape == shape])]
    said = [article(f"{g[0].color} {g[0].shape}") if len(g) == 1 else f"{COUNTS[len(g)]} {g[0].shape}s" for g in groups]
    if len(scene) != 2 or len(groups) != 2:
        return " and ".join(said)
    (a,), (b,) = groups
    right, down = 16 * (a.col - b.col) + a.dx - b.dx, 16 * (a.row - b.row) + a.dy - b.dy
    sideways = "left of" if right < 0 else "right of"
    return f"{said[0]} {sideways if abs(right) >= abs(down) else 'above' if down < 0 else 'below'} {said[1]}"


@functools.cache
def spelled() -> dict[str, dict]:
    """The toy's prompts by their explicit words."""
    return {explicit(m): m for split in ("train", "eval") for m in prompts(split)}


def wrong_metadata(metadata: dict, rng: Rng) -> dict:
    """Metadata of the same tag and prefix with one attribute contradicted: shape, count, colour, or the relation's opposite.

    Never makes a HELD_OUT pair. An implicit prompt yields an explicit one."""
    tag, include = metadata["tag"], [dict(clause) for clause in metadata["include"]]
    clause = include[-1] if tag == "position" else pick(rng, include)
    if tag == "position":
        clause["position"] = [OPPOSITE[clause["position"][0]], clause["position"][1]]
    elif tag == "counting":
        clause["count"] = pick(rng, [n for n in (2, 3, 4) if n != clause["count"]])
    elif tag in ("single_object", "two_object"):
        clause["class"] = pick(rng, [s for s in SHAPES if s not in [c["class"] for c in include]])
    else:
        clause["color"] = free_color(rng, clause["class"], True, but=[c["color"] for c in include])
    return build(tag, include, "" if "implicit" in metadata else metadata["prompt"].removesuffix(explicit(metadata)))


def wrong_thought(metadata: dict, rng: Rng) -> str:
    """The thought of an implicit prompt with another count or colour, carried through to its explicit prompt."""
    wrong = wrong_metadata(metadata, rng)
    old, new = (m["include"][0].get("color", COUNTS[m["include"][0]["count"]]) for m in (metadata, wrong))
    fact = metadata["thought"].split(" </think> ")[0]
    return " ".join(new if word == old else word for word in fact.split()) + f" </think> {wrong['prompt']}"


def make_edit(scene: Scene, rng: Rng, training: bool = True) -> dict:
    """dict(instruction, source, target, metadata): one object of another colour ("make the circle red"), removed or added.

    metadata: the target's exact counts, and its colours where a class has one, in GenEval's format with tag "edit"; the source
    fails it. A named shape is unique. training: makes no HELD_OUT pair. ValueError where nothing can be named or added."""
    edits, free = {}, [cell for cell in CELLS if cell not in [(o.row, o.col) for o in scene]]
    for o in unique(scene, "shape"):
        others, color = tuple(p for p in scene if p != o), free_color(rng, o.shape, training, but=[o.color])
        edits[f"make the {o.shape} {color}"] = others + (replace(o, color=color),)
        edits.update({f"remove the {o.shape}": others} if others else {})
    if free:
        shape = pick(rng, SHAPES)
        new = place(rng, shape, free_color(rng, shape, training), *pick(rng, free))
        edits[f"add {article(f'{new.color} {shape}')}"] = scene + (new,)
    if not edits:
        raise ValueError("make_edit: four objects and no shape unique, nothing can be named or added; draw another scene")
    verb = pick(rng, sorted({instruction.split()[0] for instruction in edits}))
    instruction = pick(rng, [instruction for instruction in edits if instruction.startswith(verb)])
    target = edits[instruction]
    colors = {s: [o.color for o in target if o.shape == s] for s in SHAPES}
    include = [{"class": s, "count": len(c), **({"color": c[0]} if len(set(c)) == 1 else {})} for s, c in colors.items() if c]
    exclude = [{"class": s, "count": len(c) + 1} for s, c in colors.items()]
    return {"instruction": instruction, "source": scene, "target": target,
            "metadata": {"tag": "edit", "include": include, "exclude": exclude, "prompt": instruction}}


def edited(source: tuple[tuple, ...], target: tuple[tuple, ...], objects: tuple[tuple, ...]) -> tuple[bool, bool]:
    """(whether the asked change is there, whether everything else is as it was and nothing came beside it) in the object tuples of a
    picture; source and target are those of make_edit. An added object may stand in any free quadrant."""
    gone, come, others = (set(part) for part in (set(source) - set(target), set(target) - set(source), set(source) & set(target)))
    fresh = list(objects)
    kept = others <= set(objects)
    for o in others & set(objects):
        fresh.remove(o)
    if not come:                                                # removed: the shape was named because no other object had it
        (old,) = gone
        changed = all(o[0] != old[0] for o in objects)
        return changed, kept and all(o == old for o in fresh)
    (new,) = come
    made = [o for o in fresh if (o == new if gone else o[:2] == new[:2])]
    stray = [o for o in fresh if o not in made[:1] and o not in gone]
    return bool(made) and not gone & set(objects), kept and not stray and len(made) <= 1


def critique(metadata: dict, objects: tuple[tuple, ...]) -> str:
    """The first thing wrong with object tuples, in words: a number, then a colour, then the relation."""
    wanted = {s: sum(clause["count"] for clause in metadata["include"] if clause["class"] == s) for s in SHAPES}
    for shape, count in wanted.items():
        n = sum(o[0] == shape for o in objects)
        if n != count:
            be, plural = ("is", "") if n == 1 else ("are", "s")
            return f"there {be} {COUNTS[n]} {shape}{plural} , there should be {COUNTS[count]}"
    for clause in metadata["include"]:
        group = [o for o in objects if o[0] == clause["class"]]
        if sum(o[1] == clause.get("color", o[1]) for o in group) < clause["count"]:
            return f"the {clause['class']} is {group[0][1]} , it should be {clause['color']}"
        if "position" in clause and not satisfies(metadata, objects):
            return f"the {clause['class']} should be {clause['position'][0]} the {metadata['include'][clause['position'][1]]['class']}"
    return RIGHT


def repair(metadata: dict, scene: Scene, rng: Rng) -> Scene:
    """The named objects and nothing else, keeping what it can: a surplus object changes shape before a new one is added."""
    needed, kept, spare = [clause["class"] for clause in metadata["include"] for _ in range(clause["count"])], [], []
    for o in scene:
        if o.shape in needed:
            needed.remove(o.shape)
            kept.append(o)
        else:
            spare.append(o)
    for shape in needed:
        cells = [cell for cell in CELLS if cell not in [(o.row, o.col) for o in kept]]
        color = free_color(rng, shape, True)
        o = replace(spare.pop(0), shape=shape) if spare else place(rng, shape, color, *pick(rng, cells))
        kept.append(replace(o, color=color) if (o.color, shape) in HELD_OUT else o)
    colors = {clause["class"]: clause["color"] for clause in metadata["include"] if "color" in clause}
    kept = [replace(o, color=colors.get(o.shape, o.color)) for o in kept]
    homes = sorted(permutations(CELLS, len(kept)), key=lambda home: sum((o.row, o.col) != cell for o, cell in zip(kept, home)))
    moves = (tuple(replace(o, row=row, col=col) for o, (row, col) in zip(kept, home)) for home in homes)
    return next(moved for moved in moves if fits(metadata, moved))                              # fewest moves first


def make_reflection(metadata: dict, scene: Scene, rng: Rng) -> dict:
    """dict(text, source, target, metadata): text is "<think> what is wrong </think> the explicit prompt", target the repaired
    scene; a scene that satisfies its metadata is its own target."""
    objects = discrete(scene)
    target = scene if satisfies(metadata, objects) else repair(metadata, scene, rng)
    text = f"<think> {critique(metadata, objects)} </think> {explicit(metadata)}"
    return {"text": text, "source": scene, "target": target, "metadata": metadata}


def components(mask: np.ndarray) -> np.ndarray:
    """Connected components (4 neighbours) of each image of a bool (N, H, W) mask: a label per True pixel, in np.nonzero order.

    Runs of a row take their largest label, runs of a column too, until nothing changes; compact blobs need two or three turns."""
    padded = np.pad(mask, ((0, 0), (0, 1), (0, 1)))                                             # a False border ends every run
    turned = padded.transpose(0, 2, 1)
    number = np.cumsum(padded).reshape(padded.shape) - 1
    label, before = np.arange(mask.sum()), None
    lines = [(order, np.flatnonzero(np.diff(np.flatnonzero(part), prepend=-2) != 1))            # pixel order, run starts
             for order, part in ((label.copy(), padded), (number.transpose(0, 2, 1)[turned], turned))]
    while before is None or (label != before).any():
        before = label.copy()
        for order, starts in lines:
            label[order] = np.repeat(np.maximum.reduceat(label[order], starts), np.diff(starts, append=len(label)))
    return (np.cumsum(label == np.arange(len(label))) - 1)[label]


def ramp(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 up to low, 1 from high on, linear between; falling where low > high."""
    return np.clip((value - low) / (high - low), 0.0, 1.0)


def overlap(shape: str, x: np.ndarray, y: np.ndarray, area: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """IoU of each component with the smooth-edged shape of its area and centroid; x, y are pixel offsets from the centroid."""
    r = np.sqrt(area / {"circle": np.pi, "square": 4.0, "triangle": 2.0}[shape])[owner]
    cover = np.clip(0.5 + depth(shape, x, y + r / 3 if shape == "triangle" else y, r), 0, 1)
    hit = np.bincount(owner, cover, minlength=len(area))
    return hit / (2 * area - hit)


def detect(images: np.ndarray, min_area: int = 12) -> list[list[dict]]:
    """Per image a list of {"class", "box" [x1, y1, x2, y2], "score", "color"}, best first; images uint8 (N, 32, 32, 3), or one.

    Ink is a pixel's largest drop below the ground: every palette colour has one channel near zero, so ink is the covered fraction
    whatever the colour, blurred or not. A component's shape is the best of three templates, its colour the nearest palette
    direction. The score in [0, 1] multiplies how well and how clearly shape and colour agree, how full the ink and how clean the
    image's ground is, and whether the size is possible: junk loses on several at once."""
    images = np.asarray(images)
    images = images[None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"detect: images are {images.dtype} {images.shape}, must be uint8 (N, 32, 32, 3)")
    drop = (np.int16(GROUND) - images).astype(np.float32) / INK                                 # (N, 32, 32, 3)
    ink = drop.max(-1)                                                                          # (N, 32, 32)
    mask = ink > EDGE
    haze = np.where(mask, 0, ink).sum((1, 2)) / np.maximum((~mask).sum((1, 2)), 1)              # (N,) mean ink of the ground
    n, y, x = np.nonzero(mask)                                                                  # (P,) pixels of shapes
    owner = components(mask)                                                                    # (P,) their component
    big = np.bincount(owner, minlength=1) >= min_area
    keep = big[owner]
    n, y, x, owner = n[keep], y[keep], x[keep], (np.cumsum(big) - 1)[owner[keep]]
    area, ink, drop = np.bincount(owner, minlength=int(big.sum())), ink[n, y, x], drop[n, y, x]
    mean = lambda value: np.bincount(owner, value, minlength=len(area)) / area                  # (P,) -> (D,) detections
    cx, cy = mean(x), mean(y)
    fit = np.stack([overlap(shape, x - cx[owner], y - cy[owner], area, owner) for shape in SHAPES])             # (3, D)
    palette = (GROUND - np.array(list(COLORS.values()))) / INK
    miss = np.sqrt([mean(((drop / ink[:, None] - color) ** 2).sum(1)) for color in palette])                    # (6, D)
    best, near = np.sort(fit, 0)[::-1], np.sort(miss, 0)
    tip = 0.1 * (fit.argmax(0) == SHAPES.index("triangle"))                                     # what pixels cost a triangle
    score = (ramp(best[0] + tip, 0.73, 0.86) * ramp(best[0] - best[1], 0.0, 0.07) * ramp(near[0], 0.35, 0.2)
             * ramp(near[1] - near[0], 0.0, 0.12) * ramp(mean(ink), 0.55, 0.72) * ramp(area, 15, 25) * ramp(area, 220, 170)
             * ramp(mean(haze[n]), 0.25, 0.15))
    box = np.tile([SIZE, SIZE, 0, 0], (len(area), 1))                                           # (D, 4)
    for column, (extreme, value) in enumerate([(np.minimum, x), (np.minimum, y), (np.maximum, x + 1), (np.maximum, y + 1)]):
        extreme.at(box[:, column], owner, value)
    image = np.zeros(len(area), int)
    image[owner] = n
    found, names = [[] for _ in images], list(COLORS)
    for d in np.argsort(-score, kind="stable"):
        found[image[d]].append({"class": SHAPES[fit[:, d].argmax()], "box": box[d].tolist(), "score": float(score[d]),
                                "color": names[miss[:, d].argmin()]})
    return found


def read(detections: list[dict], threshold: float = 0.3) -> tuple[tuple, ...]:
    """Detections of one image as sorted object tuples: those above the threshold, in the quadrant of the box's centre."""
    return tuple(sorted((d["class"], d["color"], int(d["box"][1] + d["box"][3] >= SIZE), int(d["box"][0] + d["box"][2] >= SIZE))
                        for d in detections if d["score"] > threshold))


def layout(detections: list[dict]) -> int:
    """Bitmask of the occupied quadrants: bit 2 row + col."""
    return sum({1 << 2 * row + col for _, _, row, col in read(detections)})


def diversity(images: np.ndarray, detections: list[list[dict]], G: int) -> dict[str, float]:
    """Variety within groups of G images of one prompt, prompt-major: dict(layout_entropy in bits, at most log2 G;
    pairwise_distance, the RMS difference of two images in [0, 1]), averaged over groups."""
    if G < 2 or len(images) % G or len(images) != len(detections):
        raise ValueError(f"diversity: {len(images)} images, {len(detections)} detections, must be equal, a multiple of G={G}>1")
    layouts = np.array([layout(found) for found in detections]).reshape(-1, G)                  # (B, G)
    share = np.stack([(layouts == bits).mean(1) for bits in range(16)])                         # (16, B)
    flat = np.asarray(images).reshape(-1, G, SIZE * SIZE * 3) / 255.0                           # (B, G, P)
    apart = [np.sqrt(((flat[:, i] - flat[:, j]) ** 2).mean(-1)) for i, j in combinations(range(G), 2)]
    return {"layout_entropy": float(-(share * np.log2(np.where(share > 0, share, 1))).sum(0).mean()) + 0.0,
            "pairwise_distance": float(np.mean(apart))}


def degrade(images: np.ndarray, rng: Rng, blur: float = 0.2, noise: float = 8.0) -> np.ndarray:
    """What a small autoencoder does: taps (blur, 1 - 2 blur, blur) along both axes, then gaussian noise in grey levels."""
    out = np.asarray(images, dtype=np.float64)
    for axis in (1, 2):
        wide = np.pad(out, [(int(a == axis),) * 2 for a in range(4)], mode="edge")
        out = (1 - 2 * blur) * out + blur * (np.take(wide, range(SIZE), axis) + np.take(wide, range(2, SIZE + 2), axis))
    return np.clip(np.rint(out + noise * rng.standard_normal(out.shape)), 0, 255).astype(np.uint8)


def report(rng: Rng, per_tag: int = 2000, batch: int = 500) -> None:
    """Print, per tag, how often detections equal the scene (those above 0.3; above 0.9; the same on degraded pictures), and how
    often degraded pictures pass another prompt of the tag that their scene fails."""
    print(f"{'tag':14s} {'exact':>7s} {'at 0.9':>7s} {'worn':>7s} {'at 0.9':>7s} {'false accepts':>14s}")
    spent = 0.0
    for tag in TAGS:
        options = [m for split in ("train", "eval") for m in prompts(split) if m["tag"] == tag]
        right, wrong = [], []
        for _ in range(per_tag // batch):
            scenes = [sample_scene(pick(rng, options), rng, training=False) for _ in range(batch)]
            images, start = np.stack([render(scene) for scene in scenes]), time.perf_counter()
            found = detect(images)
            spent += time.perf_counter() - start
            for scene, clean, worn in zip(scenes, found, detect(degrade(images, rng))):
                right.append([read(each, threshold) == discrete(scene) for each in (clean, worn) for threshold in (0.3, 0.9)])
                other = pick(rng, options)
                wrong += [] if satisfies(other, discrete(scene)) else [satisfies(other, read(worn))]
        print(f"{tag:14s} " + " ".join(f"{share:7.4f}" for share in np.mean(right, 0)) + f" {np.mean(wrong):14.4f}")
    print(f"{1e3 * spent / (len(TAGS) * (per_tag // batch) * batch):.2f} ms per image in batches of {batch}")


def sheet(path: str, rng: Rng, columns: int = 6, scale: int = 5) -> None:
    """Write a PNG of examples: prompts of every tag, implicit prompts, questions; edits and reflections as source and target."""
    from PIL import Image, ImageDraw
    cells = []                                                   # (scenes side by side, caption)
    for tag in TAGS * 2:
        metadata = pick(rng, [m for m in prompts("train") if m["tag"] == tag])
        wrong, scene = wrong_metadata(metadata, rng), sample_scene(metadata, rng)
        reflection = make_reflection(metadata, sample_scene(wrong, rng), rng)
        cells += [((scene,), f"{tag}: {metadata['prompt']}"), ((reflection["source"], reflection["target"]), reflection["text"])]
    for metadata in implicit_prompts("train")[::33]:
        cells.append(((sample_scene(metadata, rng),), f"{metadata['prompt']}: {metadata['thought']}"))
    for _ in range(6):
        asked, edit = make_question(scene := random_scene(rng), rng), make_edit(random_scene(rng), rng)
        cells += [((scene,), f"{asked['question']} {asked['answer']} (wrong: {wrong_answer(asked)})"),
                  ((edit["source"], edit["target"]), edit["instruction"])]
    cells.sort(key=lambda cell: len(cell[0]))
    gap, width, height = 10, 2 * SIZE * scale + 30, SIZE * scale + 64
    page = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), "white")
    draw = ImageDraw.Draw(page)
    for i, (scenes, caption) in enumerate(cells):
        left, top = gap + i % columns * width, gap + i // columns * height
        for k, scene in enumerate(scenes):
            picture = Image.fromarray(render(scene)).resize((SIZE * scale,) * 2, Image.Resampling.NEAREST)
            page.paste(picture, (left + k * (SIZE * scale + gap), top))
        draw.multiline_text((left, top + SIZE * scale + 3), "\n".join(textwrap.wrap(caption, 50)), fill="black")
    page.save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="shapes.png", help="where the sheet of examples is written")
    report(np.random.default_rng(0))
    sheet(parser.parse_args().out, np.random.default_rng(1))
