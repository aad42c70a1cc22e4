"""A toy world of coloured shapes: pictures, what can be said about them, and an exact detector.

Images are 32x32 RGB: one to four shapes on a plain ground, each in its own quadrant of a 2x2 grid.
Prompts have GenEval's metadata format and its six tags (arXiv:2310.11513), so one checker serves
the toy's detections and real ones. There are also implicit prompts that need a thought, questions
with exact answers, edits, reflections, and wrong supervision on purpose: a base model with
systematic errors leaves room for reinforcement, label noise alone does not.

Left out: overlap, rotation, texture. Every object keeps to its quadrant, so a scene is read back
exactly and a failed check is the policy's fault. HELD_OUT pairs of (color, shape) occur in no
training prompt, question, edit or scene.

Legend: a scene is a tuple of Objects; (row, col) names the quadrant, (0, 0) top left; images are
uint8 (N, 32, 32, 3). Things are what a scene says (`discrete`) and what detections say (`read`).
All sampling takes a np.random.Generator.

    metadata, rng = prompts("train")[0], np.random.default_rng(0)
    picture = render(sample_scene(metadata, rng))
    found = detect(picture[None])[0]    # [{"class", "box", "score", "color"}]
    satisfies(metadata, read(found))    # True
"""
import functools
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations, product
from typing import NamedTuple

import numpy as np

SIZE = 32                                               # pixels of a side
GROUND = 245                                            # grey level of the plain ground
COLORS = {"red": (225, 20, 30), "green": (20, 160, 60), "blue": (30, 70, 235),
          "yellow": (245, 220, 20), "purple": (150, 20, 190), "orange": (245, 130, 20)}
INK = 225                                               # a full pixel's drop below the ground
EDGE = 0.42                                             # more ink than this is shape
SHAPES = ("circle", "square", "triangle")
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))                # (row, col) of the quadrants
HELD_OUT = (("purple", "circle"), ("green", "square"), ("orange", "triangle"))
SPLITS = ("train", "eval")
COUNTS = ("zero", "one", "two", "three", "four")
RELATIONS = {"left of": ("col", -1), "right of": ("col", 1),
             "above": ("row", -1), "below": ("row", 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PREFIXES = ("", "a photo of ", "a picture of ", "a drawing of ", "an image of ")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
FACTS = ("a bicycle has two wheels", "a bird has two wings", "a face has two eyes",
         "a triangle has three sides", "a tricycle has three wheels", "a clover has three leaves",
         "a square has four corners", "a car has four wheels", "a dog has four legs",
         "blood is red", "a cherry is red", "grass is green", "a leaf is green", "the sky is blue",
         "the sea is blue", "the sun is yellow", "a lemon is yellow", "a plum is purple",
         "lavender is purple", "a carrot is orange", "a pumpkin is orange")
LETTERS = ("(a)", "(b)", "(c)", "(d)")                  # of options
CAPTION = "what is in the image ?"      # asks for a caption
THINK = "think first"                   # after a question: asks for tags, thought and answer
LOOK_AGAIN = "look again"               # after a picture and its prompt: asks for a reflection
RIGHT = "it is as it should be"         # the diagnosis of a picture that needs no repair
# The base's embeddings follow this order; "this" and "wrong" occur only in its pretraining.
VOCABULARY = tuple("""
    <think> </think> <answer> </answer> ? , a an the and of in as many is are it there should be has
    what how color shape object photo picture drawing image circle circles square squares triangle
    triangles red green blue yellow purple orange zero one two three four yes no not left right
    above below make remove add (a) (b) (c) (d) think first look again this wrong bicycle bird face
    tricycle clover car dog wheels wings eyes sides leaves corners legs blood cherry grass leaf sky
    sea sun lemon plum lavender carrot pumpkin""".split())


class Object(NamedTuple):
    """One shape of a scene; it fills a box of half side `radius` around (x, y), in pixels."""
    shape: str
    color: str
    row: int
    col: int
    dx: int = 0
    dy: int = 0
    radius: int = 5

    @property
    def x(self) -> int:
        return 8 + 16 * self.col + self.dx

    @property
    def y(self) -> int:
        return 8 + 16 * self.row + self.dy


class Thing(NamedTuple):
    """An object as words describe it and as detections are read: without jitter and size."""
    shape: str
    color: str
    row: int
    col: int


class Question(NamedTuple):
    """A question about a scene; `about` has the words that tell it from others of its kind."""
    kind: str
    text: str
    answer: str
    about: tuple[str, ...]
    options: list[str] | None = None


class Edit(NamedTuple):
    """An instruction, the scene before and after it, metadata that only the target satisfies."""
    instruction: str
    source: tuple[Object, ...]
    target: tuple[Object, ...]
    metadata: dict


Scene = tuple[Object, ...]
Things = tuple[Thing, ...]


# ---- pictures ----


def depth(shape: str, x, y, r):
    """Signed distance to a shape's edge, positive inside, at (x, y) from its centre; y points down.

    r is half the side of the box that the shape fills. x, y and r are numbers or arrays."""
    if shape == "circle":
        return r - np.sqrt(x * x + y * y)
    if shape == "square":
        return r - np.maximum(abs(x), abs(y))
    return np.minimum((y + r - 2 * abs(x)) / np.sqrt(5), r - y)


def render(scene: Scene) -> np.ndarray:
    """The uint8 (32, 32, 3) picture of a scene, edges smoothed by 2x2 supersampling."""
    grid = (np.arange(2 * SIZE) + 0.5) / 2                          # (64,)
    image = np.full((SIZE, SIZE, 3), float(GROUND))
    for o in scene:
        inside = depth(o.shape, grid - o.x, grid[:, None] - o.y, o.radius) >= 0
        cover = inside.reshape(SIZE, 2, SIZE, 2).mean((1, 3))[..., None]  # (32, 32, 1)
        image += cover * (np.array(COLORS[o.color]) - image)
    return np.rint(image).astype(np.uint8)


def damage(scene: Scene, rng, what: str) -> np.ndarray:
    """The picture of a scene, spoiled.

    what: "ground" lays a haze or specks over it, "shape" a bar of bare ground across one object."""
    image = render(scene)
    if what == "shape":
        o = pick(rng, scene)
        wide = rng.integers(3, 5)
        centre = (o.y, o.x)
        axis = rng.integers(2)
        box = [slice(c - o.radius - 1, c + o.radius + 1) for c in centre]
        start = centre[axis] - wide // 2
        box[axis] = slice(start, start + wide)
        image[tuple(box)] = GROUND
    elif rng.random() < 0.5:
        image[(image == GROUND).all(-1)] = rng.integers(110, 215, 3)
    else:
        for y, x in rng.integers(1, SIZE - 2, (rng.integers(8, 16), 2)):
            image[y:y + 2, x:x + 2] = rng.integers(0, 200, 3)
    return image


def degrade(images: np.ndarray, rng, blur: float = 0.2, noise: float = 8.0) -> np.ndarray:
    """What a small autoencoder does to images (N, 32, 32, 3): a little blur and noise.

    Taps (blur, 1 - 2 blur, blur) along both axes, then gaussian noise in grey levels."""
    out = np.asarray(images, dtype=float)
    for _ in range(2):                                              # along columns, then rows
        wide = np.pad(out, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="edge")
        out = (1 - 2 * blur) * out + blur * (wide[:, :-2] + wide[:, 2:])
        out = out.swapaxes(1, 2)
    out = out + noise * rng.standard_normal(out.shape)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8, order="C")


# ---- what a scene says, and whether it is what metadata asks for ----


def discrete(scene: Scene) -> Things:
    """What a scene says: its sorted Things."""
    return tuple(sorted(Thing(o.shape, o.color, o.row, o.col) for o in scene))


def in_relation(a: Thing, b: Thing, relation: str) -> bool:
    """Whether a stands in `relation` to b, by quadrant; on a diagonal two relations hold."""
    axis, sign = RELATIONS[relation]
    return sign * (getattr(a, axis) - getattr(b, axis)) > 0


def satisfies(metadata: dict, things: Things) -> bool:
    """Whether things meet include (at least `count`, with colour and position) and exclude (fewer).

    Differs: GenEval judges the best `count` boxes, and position by their offsets; this judges all
    things, and position by quadrant."""
    groups = []
    for wanted in metadata["include"]:
        group = [t for t in things if t.shape == wanted["class"]]
        if "color" in wanted:
            group = [t for t in group if t.color == wanted["color"]]
        if "position" in wanted:
            relation, target = wanted["position"]
            anchors = groups[target]
            group = [t for t in group if any(in_relation(t, other, relation) for other in anchors)]
        groups.append(group)
        if len(group) < wanted["count"]:
            return False
    unwanted = metadata.get("exclude", ())
    return all(count_of(things, clause["class"]) < clause["count"] for clause in unwanted)


def count_of(things: Sequence[Thing], shape: str) -> int:
    return sum(t.shape == shape for t in things)


def wanted_count(include: list[dict], shape: str) -> int:
    return sum(clause["count"] for clause in include if clause["class"] == shape)


def shows_held_out(scene: Scene) -> bool:
    return any((o.color, o.shape) in HELD_OUT for o in scene)


def unique(scene: Scene, attribute: str) -> list[Object]:
    """The objects whose shape (or color) no other object of the scene has."""
    values = [getattr(o, attribute) for o in scene]
    return [o for o in scene if values.count(getattr(o, attribute)) == 1]


def empty_cells(scene) -> list:
    """The (row, col) of the quadrants without an object."""
    taken = [(o.row, o.col) for o in scene]
    return [cell for cell in CELLS if cell not in taken]


# ---- prompts ----


def article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def name_group(shape: str, count: int, color: str) -> str:
    """"three circles", "an orange circle", "a circle": only a single one is given its colour."""
    return article(f"{color} {shape}".strip()) if count == 1 else f"{COUNTS[count]} {shape}s"


def explicit(metadata: dict) -> str:
    """The prompt that the include clauses spell, without a prefix.

    GenEval lists the anchor first: "a A left of a B" is [B, A]."""
    include = metadata["include"]
    words = [name_group(c["class"], c["count"], c.get("color", "")) for c in include]
    if "position" not in include[-1]:
        return " and ".join(words)
    relation, _ = include[-1]["position"]
    return f"{words[1]} {relation} {words[0]}"


def new_clause(shape: str, **more) -> dict:
    return {"class": shape, "count": 1, **more}


def build(tag: str, include: list[dict], prefix: str = "") -> dict:
    """Metadata in GenEval's format; HELD_OUT pairs get the key "held_out".

    Differs: every prompt excludes more objects of any shape than it names, not only counting
    prompts: if extra objects are free, a policy soon fills its pictures with them."""
    more = [new_clause(shape, count=wanted_count(include, shape) + 1) for shape in SHAPES]
    metadata = dict(tag=tag, include=[dict(clause) for clause in include], exclude=more)
    metadata["prompt"] = prefix + explicit(metadata)
    if any((clause.get("color"), clause["class"]) in HELD_OUT for clause in include):
        metadata["held_out"] = True
    return metadata


def check_split(split: str) -> None:
    """ValueError for a name that is not in SPLITS."""
    if split not in SPLITS:
        raise ValueError(f'split is "{split}", expected "train" or "eval"')


def compositions() -> Iterator:
    """(tag, ways) of every meaning.

    `ways`, to be walked once, are the include clauses of each order of saying it."""
    pairs = list(combinations(SHAPES, 2))
    for shape in SHAPES:
        yield "single_object", [[new_clause(shape)]]
    for a, b in pairs:
        yield "two_object", permutations([new_clause(a), new_clause(b)])
    for shape, count in product(SHAPES, (2, 3, 4)):
        yield "counting", [[new_clause(shape, count=count)]]
    for shape, color in product(SHAPES, COLORS):
        yield "colors", [[new_clause(shape, color=color)]]
    for a, b in pairs:
        for relation, opposite in OPPOSITE.items():
            yield "position", [[new_clause(b), new_clause(a, position=[relation, 0])],
                               [new_clause(a), new_clause(b, position=[opposite, 0])]]
    for a, b in pairs:
        for color, other in permutations(COLORS, 2):
            both = new_clause(a, color=color), new_clause(b, color=other)
            yield "color_attr", permutations(both)


def prompts(split: str) -> list[dict]:
    """List of metadata of "train" or "eval"; no prompt string is in both.

    Eval has every prompt that names a HELD_OUT pair, every phrasing of one in seven compositions of
    position and color_attr, and one of the five phrasings (PREFIXES) of everything else, whose four
    other phrasings are in train."""
    check_split(split)
    wanted = split == "eval"
    number = 0
    out = []
    for meaning, (tag, ways) in enumerate(compositions()):
        new_meaning = tag in ("position", "color_attr") and meaning % 7 == 3
        for way in ways:
            for k, prefix in enumerate(PREFIXES):
                metadata = build(tag, way, prefix)
                new_phrasing = (number + k) % len(PREFIXES) == 0
                if (new_meaning or new_phrasing or "held_out" in metadata) == wanted:
                    out.append(metadata)
            number += 1
    return out


@functools.cache
def prompts_by_tag(*splits: str) -> dict[str, list[dict]]:
    """tag -> prompts of these splits."""
    by_tag = {tag: [] for tag in TAGS}
    for split in splits:
        for metadata in prompts(split):
            by_tag[metadata["tag"]].append(metadata)
    return by_tag


@functools.cache
def captions_by_text() -> dict[str, dict]:
    """The toy's prompts by their explicit words."""
    return {explicit(metadata): metadata for split in SPLITS for metadata in prompts(split)}


def implicit_prompts(split: str) -> list[dict]:
    """Prompts that need knowledge ("as many circles as a triangle has sides").

    They have the key "thought". Each fact meets two shapes in train and the third in eval; HELD_OUT
    pairs go to eval. The thought is "<think> a triangle has three sides </think> three circles": it
    ends in the explicit prompt."""
    check_split(split)
    wanted = split == "eval"
    out = []
    for i, fact in enumerate(FACTS):
        owner, verb, rest = re.split(" (has|is) ", fact)
        value, *parts = rest.split()
        for j, shape in enumerate(SHAPES):
            if verb == "has":
                metadata = build("counting", [new_clause(shape, count=COUNTS.index(value))])
                riddle = f"as many {shape}s as {owner} has {parts[0]}"
            else:
                metadata = build("colors", [new_clause(shape, color=value)])
                riddle = f"a {shape} in the color of {owner}"
            if ((i + i // 3 + j) % 3 == 0 or "held_out" in metadata) == wanted:
                metadata["thought"] = f"<think> {fact} </think> {metadata['prompt']}"
                out += [metadata | {"prompt": prefix + riddle} for prefix in PREFIXES]
    return out


def wrong_metadata(metadata: dict, rng) -> dict:
    """Metadata of the same tag and prefix that contradicts one attribute.

    That is a shape, a count, a colour, or a relation, which becomes its opposite. Never makes a
    HELD_OUT pair. An implicit prompt yields an explicit one."""
    tag = metadata["tag"]
    include = [dict(clause) for clause in metadata["include"]]
    clause = include[-1] if tag == "position" else pick(rng, include)
    if tag == "position":
        relation, target = clause["position"]
        clause["position"] = [OPPOSITE[relation], target]
    elif tag == "counting":
        clause["count"] = pick(rng, [n for n in (2, 3, 4) if n != clause["count"]])
    elif "color" in clause:
        clause["color"] = free_color(rng, clause["class"], but=[c["color"] for c in include])
    else:
        named = [c["class"] for c in include]
        clause["class"] = pick(rng, [s for s in SHAPES if s not in named])
    prefix, _, _ = metadata["prompt"].rpartition(explicit(metadata))    # "" of an implicit prompt
    return build(tag, include, prefix)


def wrong_thought(metadata: dict, rng) -> str:
    """The thought of an implicit prompt with another count or colour, followed to its prompt."""
    wrong = wrong_metadata(metadata, rng)
    clauses = [clause for m in (metadata, wrong) for clause in m["include"]]
    old, new = [clause.get("color", COUNTS[clause["count"]]) for clause in clauses]
    fact, _ = metadata["thought"].split(" </think> ")
    return f"{fact.replace(old, new)} </think> {wrong['prompt']}"


# ---- scenes ----


def pick(rng, options):
    """One of the options, all equally likely."""
    options = list(options)
    return options[rng.integers(len(options))]


def place(rng, shape: str, color: str, row: int, col: int) -> Object:
    """An Object with radius 4..6 and jitter up to 2 pixels.

    It stays at least one pixel away from its quadrant's edge."""
    radius = int(rng.integers(4, 7))
    reach = min(2, 7 - radius)
    dx, dy = rng.integers(-reach, reach + 1, size=2).tolist()
    return Object(shape, color, row, col, dx, dy, radius)


def free_color(rng, shape: str, but=(), training: bool = True) -> str:
    """A colour for the shape, none of `but`; with training none that would make a HELD_OUT pair."""
    barred = HELD_OUT if training else ()
    return pick(rng, [c for c in COLORS if c not in but and (c, shape) not in barred])


def fits(metadata: dict, scene: Scene) -> bool:
    """satisfies, and a named relation holds along the larger offset of the two centres.

    GenEval's rule on boxes then agrees on diagonals too."""
    if not satisfies(metadata, discrete(scene)):
        return False
    if metadata["tag"] != "position":
        return True
    a, b = scene
    offset = dict(row=abs(a.y - b.y), col=abs(a.x - b.x))
    relation, _ = metadata["include"][1]["position"]
    axis, _ = RELATIONS[relation]
    return offset[axis] == max(offset.values())


def sample_scene(metadata: dict, rng, training: bool = True) -> Scene:
    """A scene of exactly the objects that `metadata` includes; what it does not name is free.

    training: free colours never make a HELD_OUT pair."""
    wanted = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    while True:
        scene = ()
        for clause, cell in zip(wanted, rng.permutation(4)):
            shape = clause["class"]
            color = clause.get("color") or free_color(rng, shape, training=training)
            scene += (place(rng, shape, color, *CELLS[cell]),)
        if fits(metadata, scene):
            return scene


def scene_split(scene: Scene) -> str:
    """The split of a scene: "eval" with a HELD_OUT pair and for one in five of the others.

    The CRC-32 of what the scene says decides."""
    words = repr(tuple(map(tuple, discrete(scene))))
    return "eval" if shows_held_out(scene) or zlib.crc32(words.encode()) % 5 == 0 else "train"


def random_scene(rng, split: str = "train") -> Scene:
    """A scene of 1 to 4 objects of any shape and colour; the splits share no discrete content."""
    check_split(split)
    while True:
        cells = rng.permutation(4)[:rng.integers(1, 5)]
        scene = tuple(
            place(rng, pick(rng, SHAPES), pick(rng, COLORS), *CELLS[cell]) for cell in cells)
        if scene_split(scene) == split:
            return scene


# ---- questions and captions ----


def question_kinds(scene: Scene) -> list[str]:
    """The kinds of question that a scene answers.

    color and shape need a unique object, relation needs two."""
    shapes = unique(scene, "shape")
    colors = unique(scene, "color")
    needs = dict(count=scene, color=shapes, shape=colors, exists=scene, relation=shapes[1:])
    return [kind for kind, objects in needs.items() if objects]


def make_question(scene: Scene, rng, kind: str = "", training: bool = True) -> Question:
    """A question about a scene; without a kind, one of those that the scene answers.

    exists and relation are yes half of the time. training: no question names a HELD_OUT pair that
    the scene lacks."""
    kind = kind or pick(rng, question_kinds(scene))
    shapes = unique(scene, "shape")
    answer = pick(rng, ("yes", "no"))
    if kind == "count":
        shape = pick(rng, SHAPES)
        return Question(kind, f"how many {shape}s ?", COUNTS[count_of(scene, shape)], (shape,))
    if kind == "color":
        o = pick(rng, shapes)
        return Question(kind, f"what color is the {o.shape} ?", o.color, (o.shape,))
    if kind == "shape":
        o = pick(rng, unique(scene, "color"))
        forms = f"what shape is {o.color} ?", f"what is the shape of the {o.color} object ?"
        return Question(kind, pick(rng, forms), o.shape, (o.color,))
    if kind == "exists":
        pairs = [(o.color, o.shape) for o in scene]
        pair = pick(rng, sorted(set(pairs)) if answer == "yes" else near_misses(pairs, training))
        return Question(kind, f"is there {article(' '.join(pair))} ?", answer, pair)
    a, b = [shapes[i] for i in rng.permutation(len(shapes))[:2]]
    relation = pick(rng, [r for r in RELATIONS if in_relation(a, b, r) == (answer == "yes")])
    about = (a.shape, relation, b.shape)
    return Question(kind, f"is the {a.shape} {relation} the {b.shape} ?", answer, about)


def near_misses(pairs: list, training: bool) -> list:
    """Absent (color, shape) pairs that share a word with a present one, so both words count."""
    words = set(sum(pairs, ()))
    barred = [*pairs, *(HELD_OUT if training else ())]
    absent = [pair for pair in product(COLORS, SHAPES) if pair not in barred]
    return [pair for pair in absent if words & set(pair)]


def answers_of(kind: str) -> tuple[str, ...]:
    """Every answer that a kind of question can have."""
    return dict(count=COUNTS, color=tuple(COLORS), shape=SHAPES).get(kind, ("yes", "no"))


def other_answers(question: Question) -> list[str]:
    """The answers of its kind but the right one."""
    return [answer for answer in answers_of(question.kind) if answer != question.answer]


def wrong_answer(question: Question) -> str:
    """The systematic wrong answer.

    One more (four becomes zero), the next colour or shape, the other of yes and no."""
    options = answers_of(question.kind)
    return options[(options.index(question.answer) + 1) % len(options)]


def make_choice(question: Question, rng) -> Question:
    """The question with lettered options, "(a) red (b) blue ..."; its answer is a letter.

    The options are the right answer and up to three others of its kind, shuffled."""
    few = rng.permutation(other_answers(question))[:len(LETTERS) - 1]
    options = rng.permutation([question.answer, *few]).tolist()
    lettered = [f"{letter} {option}" for letter, option in zip(LETTERS, options)]
    return question._replace(text=" ".join([question.text, *lettered]), options=options,
                             answer=LETTERS[options.index(question.answer)])


def there_are(count: str, shape: str) -> str:
    return f"there is one {shape}" if count == "one" else f"there are {count} {shape}s"


def statement(question: Question, answer: str) -> str:
    """What a question of make_question and an answer to it say as a sentence.

    "there are three circles", "the circle is not above the square"."""
    about = " ".join(question.about)
    if question.kind == "count":
        return there_are(answer, about)
    if question.kind == "color":
        return f"the {about} is {answer}"
    if question.kind == "shape":
        return f"the {answer} is {about}"
    if question.kind == "exists":
        return f"there is {article(about)}" if answer == "yes" else f"there is no {about}"
    a, relation, b = question.about
    return f"the {a} is {'' if answer == 'yes' else 'not '}{relation} the {b}"


def describe(scene: Scene) -> str:
    """A caption of everything in a scene: the number of each shape, or the colour of a single one.

    Two single objects stand in the relation along the larger offset of their centres: "a red circle
    above a blue square"."""
    include = clauses_of(scene)
    if len(scene) == len(include) == 2:
        a, b = sorted(scene)                                    # by shape, as the clauses are
        if abs(a.x - b.x) >= abs(a.y - b.y):
            relation = "left of" if a.x < b.x else "right of"
        else:
            relation = "above" if a.y < b.y else "below"
        first, second = include
        include = [second, first | {"position": [relation, 0]}]
    return explicit({"include": include})


# ---- edits and reflections ----


def make_edit(scene: Scene, rng) -> Edit:
    """An edit of one object: another colour ("make the circle red"), removed or added.

    The verb is the metadata's tag. A named shape is unique; no HELD_OUT pair is made. ValueError if
    nothing can be named or added."""
    edits = {}
    for o in unique(scene, "shape"):
        others = tuple(p for p in scene if p != o)
        color = free_color(rng, o.shape, but=[o.color])
        edits[f"make the {o.shape} {color}"] = (*others, o._replace(color=color))
        if others:
            edits[f"remove the {o.shape}"] = others
    free = empty_cells(scene)
    if free:
        shape = pick(rng, SHAPES)
        new = place(rng, shape, free_color(rng, shape), *pick(rng, free))
        edits[f"add {article(f'{new.color} {shape}')}"] = (*scene, new)
    if not edits:
        raise ValueError("make_edit: four objects and no unique shape; draw another scene")
    verb = pick(rng, sorted({instruction.split()[0] for instruction in edits}))
    instruction = pick(rng, [instruction for instruction in edits if instruction.startswith(verb)])
    metadata = build(verb, clauses_of(edits[instruction])) | {"prompt": instruction}
    return Edit(instruction, scene, edits[instruction], metadata)


def clauses_of(scene: Scene) -> list[dict]:
    """The exact count of each shape of a scene, and its colour if all have the same."""
    include = []
    for shape in SHAPES:
        colors = [o.color for o in scene if o.shape == shape]
        if colors:
            include.append(new_clause(shape, count=len(colors)))
        if len(set(colors)) == 1:
            include[-1]["color"] = colors[0]
    return include


def judge_edit(source: Things, target: Things, things: Things) -> tuple[bool, bool]:
    """(whether the change is there, whether all else is as it was and nothing came along).

    source and target are what the scenes of make_edit say, things what the edited picture says.
    An added object may stand in any free quadrant."""
    before = set(source)
    after = set(target)
    now = set(things)
    gone = before - after
    come = after - before
    others = before & after
    rest = list(things)
    for thing in others & now:
        rest.remove(thing)
    known = 4 if gone else 2                    # with another colour the quadrant is given too
    made = []
    for new in come:
        made = [t for t in rest if t[:known] == new[:known]]
    stray = set(rest) - set(made) - gone
    kept = others <= now and not stray and len(made) <= 1
    if come:
        return bool(made) and not gone & now, kept
    (old,) = gone                               # removed: no other object had this shape
    return count_of(things, old.shape) == 0, kept


def critique(metadata: dict, things: Things) -> str:
    """The first thing wrong with a picture in words: a number, then a colour, then the relation."""
    include = metadata["include"]
    for shape in SHAPES:
        count = count_of(things, shape)
        wanted = wanted_count(include, shape)
        if count != wanted:
            return f"{there_are(COUNTS[count], shape)} , there should be {COUNTS[wanted]}"
    for clause in include:
        shape = clause["class"]
        colors = [t.color for t in things if t.shape == shape]
        if "color" in clause and colors.count(clause["color"]) < clause["count"]:
            return f"the {shape} is {colors[0]} , it should be {clause['color']}"
        if "position" in clause and not satisfies(metadata, things):
            relation, target = clause["position"]
            return f"the {shape} should be {relation} the {include[target]['class']}"
    return RIGHT


def repair(metadata: dict, scene: Scene, rng) -> Scene:
    """The named objects and nothing else, keeping what it can.

    A surplus object changes its shape before a new one is added; then as few as possible move."""
    needed = [clause["class"] for clause in metadata["include"] for _ in range(clause["count"])]
    kept = []
    spare = []
    for o in scene:
        if o.shape in needed:
            needed.remove(o.shape)
            kept.append(o)
        else:
            spare.append(o)
    for shape in needed:
        color = free_color(rng, shape)
        if spare:
            o = spare.pop(0)._replace(shape=shape)
        else:
            o = place(rng, shape, color, *pick(rng, empty_cells(kept)))
        if shows_held_out([o]):
            o = o._replace(color=color)
        kept.append(o)
    colors = {c["class"]: c["color"] for c in metadata["include"] if "color" in c}
    kept = [o._replace(color=colors.get(o.shape, o.color)) for o in kept]
    fitting = []
    for cells in permutations(CELLS, len(kept)):
        moved = tuple(o._replace(row=row, col=col) for o, (row, col) in zip(kept, cells))
        if fits(metadata, moved):
            fitting.append(moved)
    return min(fitting, key=lambda moved: sum(a != b for a, b in zip(kept, moved)))


def make_reflection(metadata: dict, scene: Scene, rng) -> tuple[str, Scene]:
    """("<think> what is wrong </think> the explicit prompt", the scene repaired).

    A scene that satisfies its metadata stays as it is."""
    things = discrete(scene)
    target = scene if satisfies(metadata, things) else repair(metadata, scene, rng)
    return f"<think> {critique(metadata, things)} </think> {explicit(metadata)}", target


# ---- the detector ----


def components(mask):
    """Connected components (4 neighbours) of each image of a bool (N, H, W) mask.

    Returns a label per True pixel, in np.nonzero order. Every pixel takes the largest number among
    its neighbours until nothing changes."""
    padded = np.pad(mask, ((0, 0), (0, 1), (0, 1)))     # the False border keeps rolls from wrapping
    number = padded * np.arange(1, padded.size + 1).reshape(padded.shape)
    before = 0
    while (number != before).any():
        before = number
        for axis in (1, 2):
            for step in (1, -1):
                number = np.maximum(number, np.roll(number, step, axis)) * padded
    return np.unique(number[padded], return_inverse=True)[1]


def overlap(shape: str, x, y, area, owner):
    """IoU of each component with the smooth-edged shape of its area and centroid.

    x, y, owner are arrays over pixels: the offset from the centroid, and the component; area is one
    over components."""
    unit_area = {"circle": np.pi, "square": 4.0, "triangle": 2.0}[shape]
    r = np.sqrt(area / unit_area)[owner]
    below = r / 3 if shape == "triangle" else 0         # a triangle's centroid is below its centre
    cover = np.clip(0.5 + depth(shape, x, y + below, r), 0, 1)
    hit = np.bincount(owner, cover)
    return hit / (2 * area - hit)


def detect(images: np.ndarray) -> list[list[dict]]:
    """Per image a list of {"class", "box" [x1, y1, x2, y2], "score", "color"}, best first.

    images: uint8 (N, 32, 32, 3). Ink is a pixel's largest drop below the ground: every
    palette colour has one channel near zero, so ink is the covered fraction whatever the colour,
    blurred or not. A component's shape is the best of three templates, its colour the nearest
    palette direction. The score in (0, 1] multiplies how well and how clearly shape and colour
    agree, how full the ink and how clean the image's ground is, and whether the size is possible:
    junk loses on several at once, and what scores 0 is left out."""
    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(
            f"detect: images are {images.dtype} {images.shape}, must be uint8 (N, 32, 32, 3)")

    drop = (np.int16(GROUND) - images).astype(np.float32) / INK     # (N, 32, 32, 3)
    ink = drop.max(-1)                                              # (N, 32, 32)
    mask = ink > EDGE
    bare = np.maximum((~mask).sum((1, 2)), 1)                       # (N,) pixels of the ground
    haze = np.where(mask, 0, ink).sum((1, 2)) / bare                # (N,) their mean ink

    n, y, x = np.nonzero(mask)                                      # (P,) pixels of shapes
    owner = components(mask)                                        # (P,) their component
    ink = ink[mask]                                                 # (P,)
    drop = drop[mask]                                               # (P, 3)
    area = np.bincount(owner)                                       # (D,) pixels of components
    image = np.zeros(len(area), int)
    image[owner] = n                                                # (D,) the image that has it

    def mean(value):                                                # (P,) -> (D,)
        return np.bincount(owner, value) / area

    right = x - mean(x)[owner]
    down = y - mean(y)[owner]
    fit = np.stack([overlap(shape, right, down, area, owner) for shape in SHAPES])  # (3, D)
    palette = (GROUND - np.array(list(COLORS.values()))) / INK      # (6, 3)
    hue = drop / ink[:, None]
    miss = np.sqrt([mean(((hue - color) ** 2).sum(1)) for color in palette])  # (6, D)
    best = np.sort(fit, 0)[::-1]
    near = np.sort(miss, 0)
    shapes = fit.argmax(0)                                          # (D,) places in SHAPES
    colors = miss.argmin(0)                                         # (D,) places in COLORS
    tip = 0.1 * (shapes == SHAPES.index("triangle"))                # what pixels cost a triangle
    score = 1.0
    for value, none, full in (                  # a value scores 0 up to `none`, 1 from `full` on
            (best[0] + tip, 0.73, 0.86), (best[0] - best[1], 0.0, 0.07), (near[0], 0.35, 0.2),
            (near[1] - near[0], 0.0, 0.12), (mean(ink), 0.55, 0.72), (area, 15, 25),
            (area, 220, 170), (mean(haze[n]), 0.25, 0.15)):
        score = score * np.clip((value - none) / (full - none), 0.0, 1.0)   # (D,)

    box = np.full((len(area), 4), SIZE)                             # right and bottom as negatives
    np.minimum.at(box, owner, np.stack([x, y, -1 - x, -1 - y], 1))
    box *= [1, 1, -1, -1]                                           # (D, 4)
    found = [[] for _ in images]
    names = list(COLORS)
    for d in np.argsort(-score, kind="stable")[:(score > 0).sum()]:
        found[image[d]].append({"class": SHAPES[shapes[d]], "box": box[d].tolist(),
                                "score": float(score[d]), "color": names[colors[d]]})
    return found


def read(detections: list[dict], threshold: float = 0.3) -> Things:
    """Detections of one image as sorted Things: those above the threshold, by the box's centre."""
    things = []
    for found in detections:
        if found["score"] > threshold:
            left, top, right, bottom = found["box"]
            row = int(top + bottom >= SIZE)
            col = int(left + right >= SIZE)
            things.append(Thing(found["class"], found["color"], row, col))
    return tuple(sorted(things))


def layout(detections: list[dict]) -> int:
    """Bitmask of the occupied quadrants: bit 2 row + col."""
    return sum({1 << 2 * thing.row + thing.col for thing in read(detections)})


def diversity(images: np.ndarray, detections: list[list[dict]], G: int) -> dict[str, float]:
    """Variety within groups of G images of one prompt, prompt-major, averaged over groups.

    layout_entropy in bits, at most log2 G; pairwise_distance, the RMS difference of two images in
    [0, 1]."""
    entropies = []
    distances = []
    for i in range(0, len(images), G):
        layouts = [layout(found) for found in detections[i:i + G]]
        share = np.unique(layouts, return_counts=True)[1] / G       # of each layout that occurs
        entropies.append((share * np.log2(1 / share)).sum())
        for a, b in combinations(images[i:i + G] / 255.0, 2):
            distances.append(np.sqrt(((a - b) ** 2).mean()))
    return dict(
        layout_entropy=float(np.mean(entropies)), pairwise_distance=float(np.mean(distances)))
