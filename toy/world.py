"""The toy world as tasks ask it: rows drawn from seeds, held-out rows, what is true of a sample.

Legend: B rows, G samples of each, N = B*G prompt-major. Pixels that the policy reads are in
[-1, 1], images that rewards read in [0, 1]. Detections are None of samples without pictures. Every
rng is a np.random.Generator.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from referees.geneval import geneval_check
from rewards import answer_accuracy, think_format
from support.pictures import texture, to_bytes
from support.rows import Metadata, Pool, Row, prompt_row
from toy import shapes

KINDS = ("count", "color", "shape", "exists", "relation")       # of questions
# Rows of an evaluation.
PROMPTS_PER_TAG = 32
THOUGHTS = 96
QUESTIONS = 1000
EDITS = 200
VALIDATION = 1000  # added to the seed of rows that are drawn, for the validation split


# ---- rows ----


def render_pixels(scenes: list[shapes.Scene]) -> Tensor:
    """Scenes as the policy reads their pictures: (N, 3, 32, 32) in [-1, 1]."""
    images = np.stack([shapes.render(scene) for scene in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1


def toy_rows(make: Callable) -> Pool:
    """Rows of the toy world, each by make(rng) from (key, number of the row) alone."""

    def draw(key, count, mine):
        return [make(np.random.default_rng((*key, i))) for i in mine]

    return draw


def question_row(scene: shapes.Scene, question: shapes.Question) -> Row:
    pixels = render_pixels([scene])[0]
    return Row(
        question.text, dict(tag=question.kind, include=[]), pixels, pixels * 0.5 + 0.5,
        question.answer, question.options)


def open_question(rng) -> Row:
    scene = shapes.random_scene(rng)
    return question_row(scene, shapes.make_question(scene, rng))


def choice_question(rng) -> Row:
    scene = shapes.random_scene(rng)
    return question_row(scene, shapes.make_choice(shapes.make_question(scene, rng), rng))


def edit_row(edit: shapes.Edit) -> Row:
    """An edit of shapes.make_edit.

    Its metadata also have what the pictures before and after it say, as source and target.
    """
    pixels = render_pixels([edit.source])[0]
    metadata = edit.metadata | dict(
        source=shapes.discrete(edit.source), target=shapes.discrete(edit.target))
    return Row(
        edit.instruction, metadata, pixels, pixels * 0.5 + 0.5, full=pixels,
        wanted=shapes.describe(edit.target))


def toy_edit(rng, split: str = "train") -> Row:
    while True:
        scene = shapes.random_scene(rng, split)
        if shapes.shows_held_out(scene):
            continue
        try:
            return edit_row(shapes.make_edit(scene, rng))
        except ValueError:                      # nothing in it can be named or added
            continue


def any_prompt(rng, by_tag: dict) -> Metadata:
    """A prompt of a random tag; all tags are equally likely."""
    return shapes.pick(rng, by_tag[shapes.pick(rng, by_tag)])


def toy_pair(rng) -> tuple[Row, Row]:
    """A prompt with a real picture of it, and a question about that picture, open or with options.
    """
    metadata = any_prompt(rng, shapes.prompts_by_tag("train"))
    scene = shapes.sample_scene(metadata, rng)
    while shapes.scene_split(scene) == "eval":  # whose questions the evaluation asks
        scene = shapes.sample_scene(metadata, rng)
    question = shapes.make_question(scene, rng)
    if rng.random() < 0.5:
        question = shapes.make_choice(question, rng)
    asked = question_row(scene, question)
    return Row(metadata["prompt"], metadata, real=asked.source), asked


# ---- held-out rows ----


def evenly_spaced(rows: list, n: int) -> list:
    """n rows evenly spaced in the list; all of them if it has fewer."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, n).round().astype(int))]


# Of each function the split is "test", which the reported numbers are of; "unseen", pairs of colour
# and shape that training never shows; or "validation", to tune on: prompts of training with noise
# of their own, and other scenes.


def prompts_of_split(prompts: Callable, split: str) -> list[Metadata]:
    """The prompts of training for validation, else those of the evaluation, unseen pairs or not."""
    pool = prompts("train" if split == "validation" else "eval")
    return [m for m in pool if ("held_out" in m) == (split == "unseen")]


def held_out_prompts(split: str) -> list[Row]:
    """Prompts of a split, at most PROMPTS_PER_TAG of every tag.

    The test has 3, 6, 9, 15, 32 and 32, none of them trained on. Training has another phrasing of
    the same meaning, but for three in ten of position and nearly half of color_attr. Unseen pairs
    count together."""
    pool = prompts_of_split(shapes.prompts, split)
    rows = []
    groups = [pool]
    if split != "unseen":
        groups = [[m for m in pool if m["tag"] == tag] for tag in shapes.TAGS]
    for group in groups:
        rows += map(prompt_row, evenly_spaced(group, PROMPTS_PER_TAG))
    return rows


def held_out_riddles(split: str) -> list[Row]:
    """Implicit prompts; there are none of unseen pairs."""
    if split == "unseen":
        return []
    pool = prompts_of_split(shapes.implicit_prompts, split)
    return list(map(prompt_row, evenly_spaced(pool, THOUGHTS)))


def held_out_questions(split: str, seed: int = 7, choice: bool = False) -> list[Row]:
    """QUESTIONS scenes that training never asks about, one question each, kinds in turn.

    Half as many of unseen pairs, and, choice=True, of questions with lettered options."""
    unseen = split == "unseen"
    rows = []
    if split == "validation":
        seed += VALIDATION
    rng = np.random.default_rng(seed)
    wanted = QUESTIONS // 2 if unseen or choice else QUESTIONS
    while len(rows) < wanted:
        kind = KINDS[len(rows) % len(KINDS)]
        scene = shapes.random_scene(rng, "eval")
        if shapes.shows_held_out(scene) == unseen and kind in shapes.question_kinds(scene):
            question = shapes.make_question(scene, rng, kind, training=False)
            if choice:
                question = shapes.make_choice(question, rng)
            rows.append(question_row(scene, question))
    return rows


def held_out_choices(split: str) -> list[Row]:
    return [] if split == "unseen" else held_out_questions(split, seed=8, choice=True)


def held_out_reasons(split: str) -> list[Row]:
    return [] if split == "unseen" else held_out_questions(split, seed=9)[:QUESTIONS // 2]


def held_out_edits(split: str) -> list[Row]:
    """EDITS scenes that training never shows, one edit each."""
    rng = np.random.default_rng(10 + VALIDATION if split == "validation" else 10)
    return [] if split == "unseen" else [toy_edit(rng, "eval") for _ in range(EDITS)]


# ---- truths ----

# As tasks.Task has them: truth(samples, detections) -> (N,), 1 if a sample is right; parts(samples,
# detections) -> {name: (N,)}; also(rows, samples, detections, G) -> {name: (B,) or one
# number}.


def detect(images: Tensor) -> list[list[dict]]:
    """The toy's exact detector on (N, 3, 32, 32) in [0, 1]."""
    return shapes.detect(to_bytes(images))


def drawn_truth(samples, detections) -> Tensor:
    """1 if GenEval's checker passes what the detector found."""
    passed = [geneval_check(m, found)[0] for m, found in zip(samples.metadata, detections)]
    return torch.tensor(passed, dtype=torch.float)


def edit_parts(samples, detections) -> dict[str, Tensor]:
    """Whether the asked change is there, and whether everything else is as it was."""
    verdicts = []
    for m, found in zip(samples.metadata, detections):
        verdicts.append(shapes.judge_edit(m["source"], m["target"], shapes.read(found)))
    changed, kept = torch.tensor(verdicts, dtype=torch.float).unbind(1)
    return dict(changed=changed, kept=kept)


def edit_truth(samples, detections) -> Tensor:
    """1 if the asked change is there and everything else is as it was."""
    parts = edit_parts(samples, detections)
    return parts["changed"] * parts["kept"]


def answer_truth(samples, detections) -> Tensor:
    return answer_accuracy(samples)


def compare_with_first(images: str):
    """Parts of a refinement: what was true of the first picture, and what became of it.

    images: the field of Samples that has the first pictures."""

    def parts(samples, detections) -> dict[str, Tensor]:
        first = drawn_truth(samples, detect(getattr(samples, images)))
        last = drawn_truth(samples, detections)
        return dict(initial=first, repaired=(1 - first) * last, spoiled=first * (1 - last))

    return parts


def right_diagnoses(rows, samples, detections, G) -> dict:
    """Whether the diagnosis names the first thing that is wrong, or that nothing is."""
    right = []
    for text, m, found in zip(samples.texts, samples.metadata, detect(samples.sources)):
        diagnosis = shapes.critique(m, shapes.read(found))
        right.append(text == f"<think> {diagnosis} </think> {shapes.explicit(m)}")
    return {"diagnosis": np.reshape(right, (-1, G)).mean(1).tolist()}


def right_thoughts(rows, samples, detections, G) -> dict:
    thoughts = zip(samples.texts[::G], rows)
    return {"thought": [text == row.metadata["thought"] for text, row in thoughts]}


def format_kept(name: str):
    def also(rows, samples, detections, G) -> dict:
        return {name: think_format(samples)[::G]}

    return also


def variety(rows, samples, detections, G) -> dict:
    values = shapes.diversity(to_bytes(samples.images), detections, G)
    for name, value in texture(samples.images).items():
        values[f"draw/{name}"] = value.view(-1, G).mean(1).tolist()                 # (B,)
    return values
