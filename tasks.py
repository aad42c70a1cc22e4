"""What is asked of the policy: each task's layout, rewards and truth, and where its rows come from.

A task is one entry of TASKS: its plan (what a trajectory is made of), what its samples hold (which decides the rewards that can score
them), its exact truth, and how its rows are drawn from the toy world or from a file. The loop, the checks before a run, the memory
estimate, the evaluation and the plots walk the table; none of them knows a task by name. To add a task, add its entry here and give it a
number of rows a step in a recipe of recipes.py, or by its flag.

Legend: B rows of a task and step, G samples of each, N = B*G prompt-major. Pixels that the policy reads are in [-1, 1], images that
rewards read in [0, 1].
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import flow_grpo
from policy import Guidance, Policy
from referees.captions import caption_tuples
from referees.questions import Questions, with_questions
from rewards import REWARDS, Samples
from sample import (THINK_TO_DRAW, Draw, Picture, Read, Rollout, See, Write, as_read,
    chosen_texts, images_of, sample_plan, subset, texts_of)
from support.pictures import to_bytes
from support.rows import (READERS, TEXT_OF, Pool, Row, asked_of, by_tag, captioned, check_rules,
    edits_of_file, of_file, prompts_of_file)
from support.terminal import say
from toy.world import (KINDS, answer_truth, before, choice_question, detect, drawn_truth,
    edit_parts, edit_truth, held_out_choices, held_out_edits, held_out_prompts,
    held_out_questions, held_out_reasons, held_out_riddles, kept_tags, open_question,
    right_diagnoses, right_thoughts, toy_edit, toy_pair, toy_rows, variety)
from toy import shapes

# Behind an image that is to be refined, by scale. "failed" says of every picture that it failed, as AlphaGRPO's code does.
LOOK = {
    "toy": {"neutral": f"{{prompt}} , {shapes.LOOK_AGAIN}", "failed": f"{{prompt}} , {shapes.FAILED}"},
    "bagel": {
        "neutral": "The image above was made for this prompt: \"{prompt}\"\nCompare it with the prompt. Say what does not match and how to "
                   "change it, or that nothing needs to change. Then draw the image that the prompt asks for.",
        "failed": "The image above was made for this prompt: \"{prompt}\"\nThe attempt failed. Reflect on what went wrong, write an "
                  "instruction that corrects it, and draw the image again."},
}

FIRST_DRAWN = 10**6                                             # number of a first picture that is to be refined within its group
# ---- what a task is ----


@dataclass(frozen=True)
class Choices:
    """How the policy makes its choices: what it may write and how it draws."""

    think: Write
    answer: Write
    draw: Draw
    system_prompt: bool = False                                 # BAGEL's think prompt before the user's
    request: str = ""                                           # behind a question that asks for <think>..</think><answer>..</answer>
    again: Draw | None = None                                   # the second image of several rounds, with a window of its own
    look: str = LOOK["toy"]["neutral"]                          # the instruction behind an image that is to be refined


@dataclass(frozen=True)
class Task:
    """One entry of TASKS."""

    title: str                                                  # in plots and tables
    help: str                                                   # of its flag, the number of rows a step
    plan: Callable[[list[Row], Choices], list]                  # what a trajectory is made of
    gives: tuple[str, ...]                                      # the fields of rewards.Samples that its samples have
    truth: Callable[[Samples, list | None], Tensor | None]      # (N,) in [0, 1] from samples and detections; None where it is unknown
    toy: Callable[[], Pool]
    file: str                                                   # the Config field that names its file: prompts, questions, pairs, edits
    pool: Callable[[list[dict], Policy], Pool]                  # of the rows of that file
    writes: str = ""                                            # the Config field of the most tokens that it writes
    held_out: Callable[[bool], list[Row]] | None = None         # rows of the evaluation; True: of pairs that training never shows
    samples: int = 1                                            # of each row in an evaluation
    tags: tuple[str, ...] = ()                                  # that an evaluation tells apart
    mean_of_tags: bool = False                                  # its headline weighs tags alike, as GenEval does, else rows
    also: Callable[[list[Row], Samples, list, int], dict] | None = None     # beside its truth: name -> one per row, or a number
    form: str = ""                                              # the tags that its texts are asked for: "thought" or "answer"
    pair: str = ""                                              # "image" or "text": which half of a pair it is; halves share their rows
    parts: Callable[[Samples, list, Callable], dict] | None = None  # logged beside truth: samples, detections, detector -> name -> (N,)
    begin: Callable | None = None                               # what its rows need of the policy before they are asked; see first_drawn
    sees: bool = False                                          # whether what is drawn is an image changed
    rounds: int = 1                                             # how often it draws

    @property
    def draws(self) -> bool:
        return "images" in self.gives


def draw_plan(rows: list[Row], choices: Choices) -> list:
    return [Read([row.text for row in rows]), choices.draw]


def think_plan(rows: list[Row], choices: Choices) -> list:
    system = [Read([THINK_TO_DRAW] * len(rows))] if choices.system_prompt else []
    return [*system, Read([row.text for row in rows]), choices.think, choices.draw]


def ask_plan(rows: list[Row], choices: Choices) -> list:
    return [See([row.pixels for row in rows]), Read([row.text for row in rows]), choices.answer]


def reason_plan(rows: list[Row], choices: Choices) -> list:
    return [See([row.pixels for row in rows]), Read([f"{row.text} {choices.request}" for row in rows]), choices.think]


def edit_plan(rows: list[Row], choices: Choices) -> list:
    return [See([row.pixels for row in rows], [row.full for row in rows]), Read([row.text for row in rows]), choices.draw]


def reflect_plan(rows: list[Row], choices: Choices) -> list:
    system = [Read([THINK_TO_DRAW] * len(rows))] if choices.system_prompt else []
    return [*system, See([row.pixels for row in rows], [row.full for row in rows]),
            Read([choices.look.format(prompt=row.text) for row in rows]), choices.think, choices.draw]


def rounds_plan(rows: list[Row], choices: Choices) -> list:
    look = Read([choices.look.format(prompt=row.text) for row in rows])
    return [*think_plan(rows, choices), look, choices.think, choices.again or choices.draw]


@torch.no_grad()
def first_drawn(policy: Policy, rows: list[Row], choices: Choices, *, seed: int, step: int, index: list[int], n: int,
                value: Callable[[Samples], Tensor] | None = None, guidance=None) -> tuple[list[Row], Tensor | None]:
    """Rows with the picture that is to be refined, and its value (B,): of `n` that the policy draws of the prompt, by the ODE and without
    a thought, the one of least value [AlphaGRPO]; without `value` there must be one, and None comes back.

    The samples are numbered behind those of any group, so that they share no noise with the refinements."""
    draw = Draw(choices.draw.size, choices.draw.times)
    r = sample_plan(policy, draw_plan(rows, Choices(choices.think, choices.answer, draw)), seed=seed, step=step, prompts=index, G=n,
                    first=FIRST_DRAWN, guidance=guidance)
    samples = samples_of(policy, TASKS["draw"], rows, r)
    images, worst, least = samples.images, torch.arange(len(rows)) * n, None                                  # (B*n, 3, H, W)
    if value is not None:
        least, place = value(samples).view(-1, n).min(1)                                                       # (B,)
        worst = worst + place
    images = images[worst.to(images.device)] * 2 - 1
    seen = as_read(policy, images)
    return [replace(row, pixels=p, full=image, source=image * 0.5 + 0.5) for row, p, image in zip(rows, seen, images)], least


# ---- what an evaluation asks ----

# The order decides random keys: a new task goes to the end.
ASKED, REASONED = ("sources", "texts", "answers"), ("sources", "texts", "answers", "options", "formats")
TASKS = {
    "draw": Task("text to image", "prompts a step that are drawn at once", draw_plan, ("images",), drawn_truth,
                 lambda: by_tag(shapes.prompts("train")), "prompts", prompts_of_file, held_out=held_out_prompts, samples=8,
                 tags=shapes.TAGS, mean_of_tags=True, also=variety),
    "think": Task("think, then draw", "prompts a step that are thought about, then drawn", think_plan, ("texts", "images", "formats"),
                  drawn_truth, lambda: by_tag(shapes.implicit_prompts("train")), "prompts", prompts_of_file, "think_tokens",
                  held_out=held_out_riddles, samples=4, also=right_thoughts, form="thought"),
    "ask": Task("open questions", "questions a step", ask_plan, ASKED, answer_truth, lambda: toy_rows(open_question), "questions",
                lambda rows, policy: of_file(rows, lambda row: asked_of(row, policy, options=False)), "answer_tokens",
                held_out=held_out_questions, tags=KINDS),
    "choose": Task("multiple choice", "multiple-choice questions a step, answered with a thought, in tags", reason_plan, REASONED,
                   answer_truth, lambda: toy_rows(choice_question), "questions",
                   lambda rows, policy: of_file(rows, lambda row: asked_of(row, policy, options=True)), "think_tokens",
                   held_out=held_out_choices, tags=KINDS, also=kept_tags("choose/format"), form="answer"),
    "reason": Task("open questions with a thought", "open questions a step, answered with a thought, in tags", reason_plan, REASONED,
                   answer_truth, lambda: toy_rows(open_question), "questions",
                   lambda rows, policy: of_file(rows, lambda row: asked_of(row, policy, options=False)), "think_tokens",
                   held_out=held_out_reasons, tags=KINDS, also=kept_tags("reason/format"), form="answer"),
    "pair_image": Task("pairs, image half", "image halves of pairs a step: captions that are drawn", draw_plan, ("images", "reals"),
                       drawn_truth, lambda: toy_rows(lambda rng: toy_pair(rng)[0]), "pairs",
                       lambda rows, policy: of_file(rows, lambda row: captioned(row, policy)), pair="image"),
    "pair_text": Task("pairs, text half", "text halves of pairs a step: questions about the same rows' real images", reason_plan, REASONED,
                      answer_truth, lambda: toy_rows(lambda rng: toy_pair(rng)[1]), "pairs",
                      lambda rows, policy: of_file(rows, lambda row: asked_of(row, policy, options=True)), "think_tokens", form="answer",
                      pair="text"),
    "edit": Task("edits", "edits a step", edit_plan, ("images", "sources"), edit_truth, lambda: toy_rows(toy_edit), "edits", edits_of_file,
                 held_out=held_out_edits, samples=2, tags=("make", "remove", "add"), parts=edit_parts, sees=True),
    "reflect": Task("refinements", "prompts a step whose first picture is looked at and drawn again", reflect_plan, ("images",),
                    drawn_truth, lambda: by_tag(shapes.prompts("train")), "prompts", prompts_of_file, "think_tokens",
                    held_out=held_out_prompts, samples=4, tags=shapes.TAGS, also=right_diagnoses, parts=before("sources"),
                    begin=first_drawn, sees=True),
    "rounds": Task("two rounds", "prompts a step that are thought about, drawn, looked at and drawn again", rounds_plan,
                   ("texts", "images", "formats"), drawn_truth, lambda: by_tag(shapes.implicit_prompts("train")), "prompts",
                   prompts_of_file, "think_tokens", held_out=held_out_riddles, samples=4, form="thought", parts=before("earlier"),
                   rounds=2),
}


def rewards_of(name: str) -> list[str]:
    """The rewards that can score a task: those that read no more than its samples have."""
    return [reward for reward, entry in REWARDS.items() if any(set(fields) <= set(TASKS[name].gives) for fields in entry.reads)]


def in_use(cfg) -> list[str]:
    """The tasks of a run, in the table's order."""
    return [name for name in TASKS if cfg.rows[name]]


# ---- one step's rows ----


@dataclass(frozen=True)
class Batch:
    """One task's rows on this rank."""

    task: str
    step: int
    rows: list[Row]
    choices: Choices
    index: list[int]                                            # of each row among the step's, over all ranks and tasks; seeds the samples
    samples: range                                              # of each group, on this rank
    initial: Tensor | None = None                               # (B,) value of the picture that each row is to refine


def choices_of(cfg, look: str, window: tuple[int, int], second: tuple[int, int] | None = None) -> Choices:
    """A training run's choices, with the step's windows of noisy steps: of an image, and of the second of two rounds."""
    draw = Draw((cfg.resolution, cfg.resolution), flow_grpo.time_grid(cfg.denoise_steps, cfg.shift), window, cfg.noise_level, cfg.sampler,
                cfg.shared_noise, cfg.density, cfg.scaled)
    think, answer = (Write(most, cfg.temperature) for most in (cfg.think_tokens, cfg.answer_tokens))
    return Choices(think, answer, draw, cfg.system_prompt, cfg.request, replace(draw, window=second or window), look)


def guidance_of(cfg, sees: bool) -> Guidance | None:
    """Guidance as AlphaGRPO sets it: of a drawing from text, or, where the policy sees the image that it changes, of an edit."""
    if cfg.guidance <= 1:
        return None
    return Guidance(cfg.guidance, cfg.image_guidance, "text_channel", 0.0, (0.0, 1.0)) if sees else Guidance(cfg.guidance)


class Source:
    """The rows of a run's tasks, of the toy world or of files, each checked before the run begins."""

    def __init__(self, cfg, policy: Policy):
        self.cfg, files = cfg, {task.file: getattr(cfg, task.file) for task in TASKS.values()}
        toy = not any(files.values())
        # Truth and r_ins of one batch share one detection.
        self.detector = functools.lru_cache(maxsize=1)(detect) if toy else None
        self.evaluated = toy                                    # whether there are held-out rows with a known truth
        self.look = LOOK[policy.config.scale][cfg.instruction]
        self.questions = Questions(cfg.dv, toy)
        if any(TASKS[name].draws for name in in_use(cfg)):
            check_resolution(cfg.resolution, toy, policy)
        self.pools = {}
        read = functools.cache(lambda kind: [with_questions(row, files[kind]) for row in READERS[kind](files[kind])])
        for name in in_use(cfg):
            task = TASKS[name]
            if not toy and not files[task.file]:
                raise ValueError(f"--{name} {cfg.rows[name]} needs --{task.file}; or set --{name} 0")
            if not toy:
                check_rows(read(task.file), task, cfg, policy)
                if task.draws and cfg.weights["dvreward"] and cfg.dv_by != "holistic":
                    self.questions.check(read(task.file), TEXT_OF[task.file])
                if name == "choose" and (bare := [row["question"] for row in read(task.file) if not row.get("options")]):
                    raise ValueError(f"--choose needs options in every row of {files[task.file]}; {bare[0][:60]!r} has none")
                if task.draws and cfg.weights["ins"]:
                    check_rules(read(task.file), files[task.file], task.file)
            self.pools[name] = task.toy() if toy else task.pool(read(task.file), policy)

        # What r_ins will be asked about, so that its detector can be checked.
        self.ruled = [row for name in in_use(cfg) if TASKS[name].draws and not toy for row in read(TASKS[name].file)]

    def batches(self, step: int, ranks) -> list[Batch]:
        """This rank's share of the step's rows, one Batch per task in use."""
        cfg, out, first = self.cfg, [], 0
        windows = [flow_grpo.draw_window(cfg.window, cfg.window_low, cfg.window_high, seed=cfg.seed, step=s) for s in (step, -1 - step)]
        choices = choices_of(cfg, self.look, *windows)
        used = in_use(cfg)
        for name in [used[step % len(used)]] if cfg.alternate else used:
            mine, samples = ranks.share(cfg.rows[name], cfg.group_size)
            place = next(i for i, (other, task) in enumerate(TASKS.items()) if other == name or task.pair and TASKS[name].pair)
            rows = self.pools[name]((cfg.seed, step, place), cfg.rows[name], mine)
            out.append(Batch(name, step, rows, choices, [first + i for i in mine], samples))
            first += cfg.rows[name]
        return out


def samples_of(policy: Policy, task: Task, rows: list[Row], r: Rollout) -> Samples:
    """What rewards read of a rollout of these rows."""
    each = [row for row in rows for _ in range(r.G)]
    given = lambda name: [getattr(row, name) for row in each] if getattr(rows[0], name) is not None else None
    images = lambda name: None if getattr(rows[0], name) is None else torch.stack(given(name)).to(policy.device)
    return Samples([row.wanted or row.text for row in each], [row.metadata for row in each], texts_of(policy, r), images_of(policy, r),
                   images("source"), images("real"), given("answer"), [row.options for row in each],
                   [task.form] * len(each) if task.form else None, images_of(policy, r, last=2))


def token_states(whose: Callable, precision: Callable, size: int):
    """rewards.TokenMatch's `states`, `size` samples at once; whose() is a context that gives the policy, precision() that of its calls."""
    @torch.no_grad()
    def states(images: Tensor, prompts: list[str]):
        with whose() as policy, precision():
            pixels = as_read(policy, images * 2 - 1)
            tokens, mask = policy.encode_text(prompts)
            parts = []
            for i in range(0, len(prompts), size):
                image, seen, context = policy.image_states(pixels[i:i + size])
                text, _ = policy.append_text(context, tokens[i:i + size], mask[i:i + size], states=True)
                parts.append((image, seen, text))
        image, seen, text = (torch.cat(part) for part in zip(*parts))
        return image, seen, text, mask & (tokens != policy.start) & (tokens != policy.end)
    return states


def measured(name: str, samples: Samples, detector, G: int, whole_groups: bool) -> dict[str, float]:
    """What is logged of a task's samples beside their rewards: truth, and variety within groups, where they can be known."""
    task, found = TASKS[name], None
    if detector is not None and task.draws:
        found = detector(samples.images)
    right = task.truth(samples, found)
    out = {} if right is None else {"truth": right.double().mean().item()}
    if found is not None and task.parts:
        out |= {k: v.double().mean().item() for k, v in task.parts(samples, found, detector).items()}
    if found is not None and whole_groups:                      # a rank that draws a piece of each group cannot say how they vary
        out |= shapes.diversity(to_bytes(samples.images), found, G)
    return out


# ---- what an update is made of ----


def counts(r: Rollout, per: str, most: int) -> Tensor:
    """(2,) of a rollout, what its losses are averaged over: sampled text tokens (per="token"), texts ("sequence") or texts times `most`
    tokens ("constant"); and noisy image steps."""
    of_text = {"token": lambda chosen: int(chosen.sum()), "sequence": len, "constant": lambda chosen: len(chosen) * most}[per]
    image = sum(s.flow.logp.numel() for s in r.segments if isinstance(s, Picture) and s.flow is not None)
    return torch.tensor([sum(of_text(s.chosen) for s in chosen_texts(r)), image], dtype=torch.float64)


def micro_batches(r: Rollout, size: int) -> list[tuple[Rollout, list[int]]]:
    """Cuts of a rollout and their rows: whole groups while `size` samples hold one, else pieces of a group; 0 is one cut."""
    prompts, samples = (r.B, r.G) if not size else (size // r.G, r.G) if size >= r.G else (1, size)
    cuts = [(range(i, min(i + prompts, r.B)), range(g, min(g + samples, r.G)))
            for i in range(0, r.B, prompts) for g in range(0, r.G, samples)]
    return [(subset(r, p, s), [i * r.G + g for i in p for g in s]) for p, s in cuts]


# ---- what files must hold ----


def check_resolution(resolution: int, toy: bool, policy: Policy) -> None:
    side, most = policy.config.stride, policy.config.stride * policy.config.bagel["max_latent_size"]
    if toy and resolution != shapes.SIZE:
        raise ValueError(f"--resolution {resolution}: must be {shapes.SIZE}, the toy world")
    if resolution % side or resolution > most:
        raise ValueError(f"--resolution {resolution}: must be a multiple of {side} up to {most}")


def check_rows(rows: list[dict], task: Task, cfg, policy: Policy) -> None:
    """ValueError for a text that leaves no room for what is written, or an answer longer than what may be written."""
    room = getattr(cfg, task.writes) if task.writes else 0
    texts = [row["question" if task.pair == "text" else TEXT_OF[task.file]] for row in rows]
    policy.check_text(texts, room)
    unknown = policy.tokenizer.unk_token_id                     # BAGEL's tokenizer spells every word
    if unknown is not None and (strange := [t for t in texts if unknown in policy.tokenizer(t, add_special_tokens=False).input_ids]):
        say(f"warning: {len(strange)} of {len(texts)} {task.file} hold words that the policy was never taught, such as {strange[0][:60]!r}")
    if task.file == "edits":
        compared = [k for k in ("sem", "kn", "dense", "recaption", "tim") if cfg.weights[k]]
        if compared and (bare := [row["instruction"] for row in rows if not str(row.get("caption") or "").strip()]):
            raise ValueError(f"--{compared[0]} compares an edited image with a caption of it, and {bare[0][:60]!r} in {cfg.edits} has no "
                             "\"caption\"; add it, or use --dvreward or --ins alone")
        texts = [row.get("caption", "") for row in rows]
    if task.draws and cfg.weights["recaption"] and cfg.recaption_by == "tuples":
        for text in texts:
            caption_tuples(text)
    for answer in dict.fromkeys(row["answer"] for row in rows if "answer" in row):
        length = len(policy.tokenizer(answer, add_special_tokens=False).input_ids)
        if task.writes and length > room:
            raise ValueError(f"the answer {answer[:60]!r} has {length} tokens, and --{task.writes} lets {room} be written")
