"""The toy world as tasks ask it: rows drawn from seeds, held-out rows, and what is true of a sample.

Legend: B rows, G samples of each, N = B*G prompt-major. Pixels that the policy reads are in [-1, 1], images that rewards read in [0, 1].
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from toy import shapes
from referees.geneval import geneval_check
from rewards import Samples, answer_accuracy, think_format
from support.pictures import texture, to_bytes
from support.rows import Pool, Row, prompt_row


def question_row(scene: shapes.Scene, question: shapes.Question) -> Row:
    pixels = render_pixels([scene])[0]
    return Row(question.text, {"tag": question.kind, "include": []}, pixels, pixels * 0.5 + 0.5, question.answer,
               question.options)


def toy_rows(make: Callable[[np.random.Generator], Row]) -> Pool:
    """Rows of the toy world, each made from (key, number of the row) by itself."""
    def draw(key: tuple, count: int, mine: range) -> list[Row]:
        return [make(np.random.default_rng((*key, i))) for i in mine]
    return draw


def open_question(rng: np.random.Generator) -> Row:
    scene = shapes.random_scene(rng)
    return question_row(scene, shapes.make_question(scene, rng))


def choice_question(rng: np.random.Generator) -> Row:
    scene = shapes.random_scene(rng)
    return question_row(scene, shapes.make_choice(shapes.make_question(scene, rng), rng))


def edit_row(scene: shapes.Scene, edit: shapes.Edit) -> Row:
    """An edit of shapes.make_edit; its tag is the verb: make, remove or add."""
    pixels = render_pixels([scene])[0]
    both = {"source": shapes.discrete(scene), "target": shapes.discrete(edit.target)}
    return Row(edit.instruction, edit.metadata | both | {"tag": edit.instruction.split()[0]}, pixels, pixels * 0.5 + 0.5,
               full=pixels, wanted=shapes.describe(edit.target))


def toy_edit(rng: np.random.Generator, split: str = "train") -> Row:
    while True:
        scene = shapes.random_scene(rng, split)
        if any((o.color, o.shape) in shapes.HELD_OUT for o in scene):
            continue
        try:
            return edit_row(scene, shapes.make_edit(scene, rng))
        except ValueError:                                      # nothing in it can be named or added
            continue


@functools.cache
def train_prompts() -> dict[str, list[dict]]:
    return {tag: [m for m in shapes.prompts("train") if m["tag"] == tag] for tag in shapes.TAGS}


def toy_pair(rng: np.random.Generator) -> tuple[Row, Row]:
    """A prompt with a real picture of it, tags alike, and a question about that picture, open or with options."""
    metadata = shapes.pick(rng, train_prompts()[shapes.pick(rng, shapes.TAGS)])
    scene = shapes.sample_scene(metadata, rng)
    question = shapes.make_question(scene, rng)
    asked = question_row(scene, shapes.make_choice(question, rng) if rng.random() < 0.5 else question)
    return Row(metadata["prompt"], metadata, real=asked.source), asked


def render_pixels(scenes: list[shapes.Scene]) -> Tensor:
    """Scenes as the policy reads their pictures: (N, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(np.stack([shapes.render(s) for s in scenes])).permute(0, 3, 1, 2) / 127.5 - 1


def drawn_truth(samples: Samples, found: list | None) -> Tensor | None:
    """1 where GenEval's checker passes what the detector found; unknown without a detector."""
    if found is None:
        return None
    return torch.tensor([float(geneval_check(m, each)[0]) for m, each in zip(samples.metadata, found)])


def edit_parts(samples: Samples, found: list, detector) -> dict[str, Tensor]:
    both = [shapes.judge_edit(m["source"], m["target"], shapes.read(each)) for m, each in zip(samples.metadata, found)]
    return {"changed": torch.tensor([float(changed) for changed, _ in both]), "kept": torch.tensor([float(kept) for _, kept in both])}


def edit_truth(samples: Samples, found: list | None) -> Tensor | None:
    """1 where the asked change is there and everything else is as it was."""
    if found is None:
        return None
    parts = edit_parts(samples, found, None)
    return parts["changed"] * parts["kept"]


def compare_with_first(images: str):
    """What was true of the picture that was refined, and what the refinement made of it."""
    def parts(samples: Samples, found: list, detector) -> dict[str, Tensor]:
        first, last = drawn_truth(samples, detector(getattr(samples, images))), drawn_truth(samples, found)
        return {"initial": first, "repaired": (1 - first) * last, "spoiled": first * (1 - last)}
    return parts


def right_diagnoses(rows: list[Row], samples: Samples, found: list, G: int) -> dict:
    """Whether the diagnosis names the first thing that is wrong with the picture, or that nothing is."""
    seen = [shapes.read(each) for each in detect(samples.sources)]
    said = [f"<think> {shapes.critique(m, objects)} </think> {shapes.explicit(m)}" for m, objects in zip(samples.metadata, seen)]
    return {"diagnosis": [float(np.mean([a == b for a, b in zip(samples.texts[i:i + G], said[i:i + G])])) for i in range(0, len(said), G)]}


def answer_truth(samples: Samples, found: list | None) -> Tensor:
    return answer_accuracy(samples)


def variety(rows: list[Row], samples: Samples, found: list, G: int) -> dict:
    look = {f"draw/{k}": v.view(-1, G).mean(1).tolist() for k, v in texture(samples.images).items()}           # (prompts,) each
    return shapes.diversity(to_bytes(samples.images), found, G) | look


def right_thoughts(rows: list[Row], samples: Samples, found: list, G: int) -> dict:
    return {"thought": [float(text == row.metadata["thought"]) for text, row in zip(samples.texts[::G], rows)]}


def format_kept(name: str):
    return lambda rows, samples, found, G: {name: think_format(samples)[::G].tolist()}

PROMPTS_PER_TAG, THOUGHTS, QUESTIONS, EDITS = 32, 96, 1000, 200

KINDS = ("count", "color", "shape", "exists", "relation")


def evenly_spaced(rows: list, n: int) -> list:
    """n rows evenly evenly_spaced in the list; all where it has fewer."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, n).round().astype(int))]


def held_out_prompts(pairs: bool = False) -> list[Row]:
    """Evaluation prompts, none of which is trained on: at most PROMPTS_PER_TAG of every tag whose (colour, shape) pairs occur in training
    (3, 6, 9, 15, 32, 32), or, pairs=True, as many of all tags together that name a pair that training never shows.

    Training has another phrasing of the same meaning, but for three in ten of position and nearly half of color_attr."""
    pool = [m for m in shapes.prompts("eval") if ("held_out" in m) == pairs]
    chosen = evenly_spaced(pool, PROMPTS_PER_TAG) if pairs else \
        [m for tag in shapes.TAGS for m in evenly_spaced([m for m in pool if m["tag"] == tag], PROMPTS_PER_TAG)]
    return list(map(prompt_row, chosen))


def held_out_riddles(pairs: bool = False) -> list[Row]:
    """Implicit prompts of the evaluation; there are none of pairs that training never shows."""
    if pairs:
        return []
    return list(map(prompt_row, evenly_spaced([m for m in shapes.implicit_prompts("eval") if "held_out" not in m], THOUGHTS)))


def held_out_questions(pairs: bool = False, seed: int = 7, choice: bool = False) -> list[Row]:
    """QUESTIONS scenes that training never asks about, one question each, kinds in turn; with pairs=True half as many, each with a
    (colour, shape) pair that training never shows. choice: half as many of either, with lettered options."""
    rng, rows = np.random.default_rng(seed), []
    while len(rows) < QUESTIONS // (1 + pairs) // (1 + choice):
        kind, scene = KINDS[len(rows) % len(KINDS)], shapes.random_scene(rng, "eval")
        if any((o.color, o.shape) in shapes.HELD_OUT for o in scene) == pairs and kind in shapes.question_kinds(scene):
            question = shapes.make_question(scene, rng, kind, training=False)
            rows.append(question_row(scene, shapes.make_choice(question, rng) if choice else question))
    return rows


def held_out_choices(pairs: bool = False) -> list[Row]:
    return [] if pairs else held_out_questions(seed=8, choice=True)


def held_out_reasons(pairs: bool = False) -> list[Row]:
    return [] if pairs else held_out_questions(seed=9)[:QUESTIONS // 2]


def held_out_edits(pairs: bool = False, seed: int = 10) -> list[Row]:
    """EDITS scenes that training never shows, one edit each."""
    rng = np.random.default_rng(seed)
    return [] if pairs else [toy_edit(rng, "eval") for _ in range(EDITS)]


def detect(images: Tensor) -> list[list[dict]]:
    """The toy's exact detector on (N, 3, 32, 32) in [0, 1]."""
    return shapes.detect(to_bytes(images))
