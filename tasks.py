"""The table of tasks: what is asked of the policy, and what its samples hold.

A task is one entry of TASKS: its layout (what a trajectory is made of), what its samples give
(which decides the rewards that can score them), its exact truth, and where its rows come from. The
loop, the checks before a run, the memory estimate, the evaluation and the plots walk the table;
none of them knows a task by name. To add a task, add its entry here and give it a number of rows a
step, in a recipe of recipes.py or by its flag.

Legend: B rows of a task and step, G samples of each, N = B*G prompt-major. Pixels that the policy
reads are in [-1, 1], images that rewards read in [0, 1].
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import flow_grpo
from policy import Guidance, Policy
from referees.captions import caption_tuples
from referees.questions import Questions, with_questions
from rewards import REWARDS, Samples
from sample import (
    SAMPLING, THINK_TO_DRAW, Draw, Read, Rollout, See, Write, images_of, plain_draw, sample_plan,
    subset, texts_of)
from support.pictures import to_bytes, vit_pixels
from support.rows import (
    READERS, Pool, Row, captions_of_file, check_rules, choices_of_file, edits_of_file, pool_by_tag,
    prompts_of_file, questions_of_file)
from support.terminal import say
from toy import shapes
from toy.world import (
    KINDS, answer_truth, choice_question, compare_with_first, detect, drawn_truth, edit_parts,
    edit_truth, held_out_choices, held_out_edits, held_out_prompts, held_out_questions,
    held_out_reasons, held_out_riddles, format_kept, open_question, right_diagnoses, right_thoughts,
    toy_edit, toy_pair, toy_rows, variety)

FIRST_PICTURES = 10**6  # number, within its group, of the first picture to refine


# ---- what a task is ----


@dataclass(frozen=True)
class Wording:
    """What the policy is told around a row's own text."""

    look: str  # the instruction after an image that is to be refined
    request: str  # after a question: answer it in <think> and <answer> tags
    stop: str                                   # what a diagnosis says that keeps the picture
    system_prompt: bool                         # whether BAGEL's think prompt comes first


WORDING = dict(
    toy=Wording(
        look=f"{{prompt}} , {shapes.LOOK_AGAIN}", request=shapes.THINK,
        stop=shapes.RIGHT, system_prompt=False),
    bagel=Wording(
        look="The image above was made for this prompt: \"{prompt}\"\nCompare it with the prompt. "
        "Say what does not match and how to change it, or that nothing needs to change. Then "
        "draw the image that the prompt asks for.",
        request="First reason inside <think> </think> tags, then give the final answer inside "
        "<answer> </answer> tags.",
        stop="nothing needs to change",
        system_prompt=True,
    ),
)
WORDING |= dict(toy_janus=WORDING["toy"], janus=replace(WORDING["bagel"], system_prompt=False))


@dataclass(frozen=True)
class Choices:
    """How the policy makes its choices: what it may write, how it draws, and what it is told."""

    think: Write
    answer: Write
    draw: Draw
    wording: Wording
    again: Draw | None = None  # the second image of two rounds, with its own window


@dataclass(frozen=True, kw_only=True)
class Task:
    """One entry of TASKS."""

    name: str                                   # of its flag, the number of rows a step
    title: str                                  # in plots and tables
    help: str                                   # of its flag
    plan: Callable[[list[Row], Choices], list]  # what a trajectory is made of
    gives: tuple[str, ...]  # the fields of rewards.Samples that its rewards may read
    truth: Callable[[Samples, list | None], Tensor]     # samples, detections -> (N,) in [0, 1]
    toy: Callable[[], Pool]                     # rows of the toy world
    file: str = "prompts"  # the setting that names its file: prompts, questions, edits
    reads: tuple[str, ...] = ("prompt",)        # fields that a file's row must have, its text first
    pool: Callable[[list[dict], Policy], Pool] = prompts_of_file    # rows of that file
    writes: str = ""                            # the setting that bounds the tokens that it writes
    form: str = ""  # the tags that its texts are asked for: "thought", "answer"
    pair: str = ""                              # "image" or "text": which half of a pair it is
    redraws: bool = False                       # whether it draws a given picture changed
    refines: bool = False                       # whether it refines a picture that is drawn first
    rounds: int = 1                             # how often it draws
    # Logged with truth: samples, detections -> name -> (N,).
    parts: Callable[[Samples, list], dict] | None = None
    # Rows of the evaluation, of a split: "test", "unseen" or "validation" (toy/world.py).
    held_out: Callable[[str], list[Row]] | None = None
    samples: int = 1                            # of each row in an evaluation
    tags: tuple[str, ...] = ()                  # that an evaluation tells apart
    mean_of_tags: bool = False  # whether its headline weighs tags alike, as GenEval does
    # Evaluated with truth: rows, samples, detections, G -> name -> one per row, or one number.
    also: Callable[[list[Row], Samples, list, int], dict] | None = None

    @property
    def text(self) -> str:
        """The field of a file's row that the policy reads."""
        return self.reads[0]

    @property
    def draws(self) -> bool:
        return "images" in self.gives

    def longest_text(self, cfg) -> int:
        """The most tokens of one of its texts; 0 if it writes none."""
        return getattr(cfg, self.writes) if self.writes else 0

    @property
    def before(self) -> str:
        """The field of rewards.Samples that holds the picture before the last, or nothing."""
        if self.refines:
            return "sources"
        return "earlier" if self.rounds > 1 else ""


# ---- layouts ----


def think_prompt(rows: list[Row], choices: Choices) -> list:
    """BAGEL's system prompt for drawing after a thought, at BAGEL's scale."""
    return [Read([THINK_TO_DRAW] * len(rows))] if choices.wording.system_prompt else []


def look_again(rows: list[Row], choices: Choices) -> Read:
    return Read([choices.wording.look.format(prompt=row.text) for row in rows])


def read_texts(rows: list[Row]) -> Read:
    return Read([row.text for row in rows])


def see_images(rows: list[Row]) -> See:
    """The image that is to be changed."""
    return See([row.pixels for row in rows], [row.full for row in rows])


def draw_plan(rows: list[Row], choices: Choices) -> list:
    return [read_texts(rows), choices.draw]


def think_plan(rows: list[Row], choices: Choices) -> list:
    return [*think_prompt(rows, choices), read_texts(rows), choices.think, choices.draw]


def ask_plan(rows: list[Row], choices: Choices) -> list:
    return [See([row.pixels for row in rows]), read_texts(rows), choices.answer]


def reason_plan(rows: list[Row], choices: Choices) -> list:
    texts = [f"{row.text} {choices.wording.request}" for row in rows]
    return [See([row.pixels for row in rows]), Read(texts), choices.think]


def edit_plan(rows: list[Row], choices: Choices) -> list:
    return [see_images(rows), read_texts(rows), choices.draw]


def reflect_plan(rows: list[Row], choices: Choices) -> list:
    return [
        *think_prompt(rows, choices), see_images(rows), look_again(rows, choices), choices.think,
        choices.draw]


def rounds_plan(rows: list[Row], choices: Choices) -> list:
    return [
        *think_plan(rows, choices), look_again(rows, choices), choices.think,
        choices.again or choices.draw]


@torch.no_grad()
def first_pictures(
    policy: Policy, rows: list[Row], choices: Choices, *, seed: int, step: int, index: list[int],
    n: int, value: Callable[[Samples], Tensor] | None = None, guidance: Guidance | None = None,
    best: float = 0.0
) -> tuple[list[Row], Tensor | None]:
    """Rows with the picture that is to be refined, and its value (B,). [AlphaGRPO]

    The policy draws n pictures of each prompt, by the ODE and without a thought; the one of least
    value is refined, or of most value for a share `best` of the prompts. Without `value` n must be
    1, and None comes back. The samples' numbers start beyond those of any group, so that they share
    no noise with the refinements.
    """
    plain = replace(choices, draw=Draw(choices.draw.size, choices.draw.times))
    rollout = sample_plan(
        policy, draw_plan(rows, plain), seed=seed, step=step, index=index, G=n,
        first_sample=FIRST_PICTURES, guidance=guidance)
    samples = samples_of(policy, TASKS["draw"], rows, rollout)
    chosen = torch.arange(len(rows)) * n                                            # (B,)
    worth = None
    if value is not None:
        values = value(samples).view(-1, n)                                         # (B, n)
        # The prompts of which the best is refined, evenly spaced among all.
        takes_best = torch.tensor([int((i + 1) * best) > int(i * best) for i in index])     # (B,)
        place = torch.where(takes_best.to(values.device), values.argmax(1), values.argmin(1))
        worth = values.gather(1, place[:, None])[:, 0]
        chosen = chosen + place.to(chosen)
    images = samples.images[chosen.to(samples.images.device)] * 2 - 1               # (B, 3, H, W)
    drawn = []
    for row, pixels, image in zip(rows, vit_pixels(policy, images), images):
        drawn.append(replace(row, pixels=pixels, full=image, source=image * 0.5 + 0.5))
    return drawn, worth


def toy_prompts() -> Pool:
    return pool_by_tag(shapes.prompts("train"))


def toy_riddles() -> Pool:
    return pool_by_tag(shapes.implicit_prompts("train"))


# ---- the table ----

ASKED = ("sources", "texts", "answers")
REASONED = (*ASKED, "options", "formats")


# The order decides random keys: a task that is added goes to the end.
TABLE = (
    Task(
        name="draw", title="text to image", help="prompts a step that are drawn at once",
        plan=draw_plan, gives=("images",), truth=drawn_truth, toy=toy_prompts,
        held_out=held_out_prompts, samples=8, tags=shapes.TAGS, mean_of_tags=True, also=variety),
    Task(
        name="think", title="think, then draw",
        help="prompts a step that are thought about, then drawn", plan=think_plan,
        gives=("texts", "images", "formats"), truth=drawn_truth, writes="think_tokens",
        form="thought", toy=toy_riddles, held_out=held_out_riddles, samples=4,
        also=right_thoughts),
    Task(
        name="ask", title="open questions", help="questions a step", plan=ask_plan, gives=ASKED,
        truth=answer_truth, writes="answer_tokens", toy=lambda: toy_rows(open_question),
        file="questions", reads=("question",), pool=questions_of_file, held_out=held_out_questions,
        tags=KINDS),
    Task(
        name="choose", title="multiple choice",
        help="multiple-choice questions a step, answered with a thought, in tags", plan=reason_plan,
        gives=REASONED, truth=answer_truth, writes="think_tokens", form="answer",
        toy=lambda: toy_rows(choice_question), file="questions", reads=("question", "options"),
        pool=choices_of_file, held_out=held_out_choices, tags=KINDS,
        also=format_kept("choose/format")),
    Task(
        name="reason", title="open questions with a thought",
        help="open questions a step, answered with a thought, in tags", plan=reason_plan,
        gives=REASONED, truth=answer_truth, writes="think_tokens", form="answer",
        toy=lambda: toy_rows(open_question), file="questions", reads=("question",),
        pool=questions_of_file, held_out=held_out_reasons, tags=KINDS,
        also=format_kept("reason/format")),
    Task(
        name="pair_image", title="pairs, image half",
        help="image halves of pairs a step: captions that are drawn", plan=draw_plan,
        gives=("images", "reals"), truth=drawn_truth, pair="image",
        toy=lambda: toy_rows(lambda rng: toy_pair(rng)[0]), file="questions", reads=("caption",),
        pool=captions_of_file),
    Task(
        name="pair_text", title="pairs, text half",
        help="text halves of pairs a step: questions about the same rows' real images",
        plan=reason_plan, gives=REASONED, truth=answer_truth, writes="think_tokens", form="answer",
        pair="text", toy=lambda: toy_rows(lambda rng: toy_pair(rng)[1]), file="questions",
        reads=("question",), pool=choices_of_file),
    Task(
        name="edit", title="edits", help="edits a step", plan=edit_plan,
        gives=("images", "sources"), truth=edit_truth, parts=edit_parts, redraws=True,
        toy=lambda: toy_rows(toy_edit), file="edits", reads=("instruction",), pool=edits_of_file,
        held_out=held_out_edits, samples=2, tags=("make", "remove", "add")),
    Task(
        name="reflect", title="refinements",
        help="prompts a step whose first picture is looked at and drawn again", plan=reflect_plan,
        gives=("images",), truth=drawn_truth, writes="think_tokens", redraws=True, refines=True,
        toy=toy_prompts, held_out=held_out_prompts, samples=4, tags=shapes.TAGS,
        also=right_diagnoses, parts=compare_with_first("sources")),
    Task(
        name="rounds", title="two rounds",
        help="prompts a step that are thought about, drawn, looked at and drawn again",
        plan=rounds_plan, gives=("texts", "images", "formats"), truth=drawn_truth,
        writes="think_tokens", form="thought", toy=toy_riddles, held_out=held_out_riddles,
        samples=4, parts=compare_with_first("earlier"), rounds=2),
)
TASKS = {task.name: task for task in TABLE}


def rewards_of(task: Task) -> list[str]:
    """The rewards that can score a task: those that read no more than it gives."""
    names = []
    for name, entry in REWARDS.items():
        if any(set(fields) <= set(task.gives) for fields in entry.reads):
            names.append(name)
    return names


def in_use(cfg) -> list[Task]:
    """The tasks of a run, in the table's order."""
    return [task for task in TASKS.values() if cfg.rows[task.name]]


def random_place(task: Task) -> int:
    """The task's number in the random key of its rows.

    The halves of a pair share one, and so their rows.
    """
    for place, other in enumerate(TASKS.values()):
        if other is task or (other.pair and task.pair):
            return place


# ---- one step's rows ----


@dataclass(frozen=True)
class Batch:
    """One task's rows on this rank."""

    task: Task
    step: int
    rows: list[Row]
    choices: Choices
    index: list[int]  # of each row among the step's, over ranks and tasks: seeds
    initial: Tensor | None = None  # (B,) value of the picture that each row refines

    def parts(self, samples: int, each: int) -> Iterator[tuple[list[Row], list[int]]]:
        """Rows and indices of at most `samples` samples at `each` a row; 0: of all at once."""
        count = max(1, samples // each) if samples else len(self.rows)
        for i in range(0, len(self.rows), count):
            yield self.rows[i:i + count], self.index[i:i + count]


def draw_of(cfg, scale: str, place: int) -> Draw:
    """How a training run draws.

    Token by token, with a window of noisy steps, or by the ODE with times at which a matching loss
    reads the picture. place: a step s, or -1 - s for the second of two rounds.
    """
    plain = plain_draw(scale, (cfg.resolution, cfg.resolution), cfg.denoise_steps)
    if cfg.image_loss == "token":
        return plain
    if cfg.matches:
        shift = SAMPLING[scale]["shift"]
        chosen = flow_grpo.stratified_times(cfg.window, shift, seed=cfg.seed, step=place)
        keeps_v = not cfg.old_decay or place in (0, -1)         # v_old, or for the self-check
        return replace(plain, match_times=chosen, keeps_v=keeps_v)
    window = flow_grpo.draw_window(cfg.window, 0, cfg.window_high, seed=cfg.seed, step=place)
    return replace(
        plain, window=window, noise_level=cfg.noise_level, sampler=cfg.sampler,
        shared_noise=cfg.shared_noise)


def choices_of(cfg, scale: str, draw: Draw, again: Draw | None = None) -> Choices:
    """A training run's choices; again: how the second of two rounds is drawn."""
    think = Write(cfg.think_tokens)
    answer = Write(cfg.answer_tokens)
    return Choices(think, answer, draw, WORDING[scale], again=again)


def guidance_of(cfg, redraws: bool) -> Guidance:
    """Guidance as AlphaGRPO sets it: of a drawing from text, or of an image that is changed."""
    if redraws:
        return replace(SAMPLING["bagel"]["edit"], text_scale=cfg.guidance)
    return Guidance(cfg.guidance)


class Source:
    """The rows of a run's tasks, of the toy world or of files, checked before the run begins."""

    def __init__(self, cfg, policy: Policy):
        self.cfg = cfg
        self.tasks = in_use(cfg)
        files = {name: getattr(cfg, name) for name in READERS}
        self.toy = not any(files.values())      # then truth is known, and there are held-out rows
        # Truth and r_ins of one batch share one detection.
        self.detector = functools.lru_cache(maxsize=1)(detect) if self.toy else None
        self.scale = policy.config.scale
        self.questions = Questions(self.toy)
        self.pools = {}
        self.drawn_rows = []                    # what r_ins will judge
        self.texts = {}                         # task -> what rewards will read of its file's rows
        if any(task.draws for task in self.tasks):
            policy.check_size((cfg.resolution, cfg.resolution))
        for task in self.tasks:
            if task.file == "edits" and not policy.reads_latents:
                raise ValueError(
                    f"--{task.name} {cfg.rows[task.name]}: this policy reads no latents of a "
                    f"picture, so that it cannot edit; set --{task.name} 0")
        if self.toy:
            if cfg.resolution != shapes.SIZE:
                raise ValueError(
                    f"--resolution {cfg.resolution}: must be {shapes.SIZE}, the toy world")
            self.pools = {task.name: task.toy() for task in self.tasks}
            return
        read = {}                               # setting -> rows of its file
        for task in self.tasks:
            path = files[task.file]
            if not path:
                flag = f"--{task.name}"
                raise ValueError(
                    f"{flag} {cfg.rows[task.name]} needs --{task.file}; or set {flag} 0")
            if task.file not in read:
                read[task.file] = [with_questions(row, path) for row in READERS[task.file](path)]
            rows = read[task.file]
            check_rows(rows, path, task, cfg, policy)
            name = "caption" if task.file == "edits" else task.text
            self.texts[task.name] = [row.get(name) or row[task.text] for row in rows]
            if task.draws:
                self.drawn_rows += rows
                if cfg.weights["dvreward"] and cfg.dv_by != "holistic":
                    self.questions.check(rows, task.text)
            self.pools[task.name] = task.pool(rows, policy)

    def texts_for(self, reward: str) -> list[str]:
        """What a reward will read of the files' rows."""
        texts = [some for name, some in self.texts.items() if reward in rewards_of(TASKS[name])]
        return sum(texts, [])

    def batches(self, step: int, ranks) -> list[Batch]:
        """This rank's share of the step's rows, one Batch per task in use."""
        cfg = self.cfg
        out = []
        first = 0
        draws = [draw_of(cfg, self.scale, place) for place in (step, -1 - step)]
        choices = choices_of(cfg, self.scale, *draws)
        tasks = [self.tasks[step % len(self.tasks)]] if cfg.alternate else self.tasks
        for task in tasks:
            count = cfg.rows[task.name]
            mine = ranks.share(count)
            rows = self.pools[task.name]((cfg.seed, step, random_place(task)), count, mine)
            out.append(Batch(task, step, rows, choices, [first + i for i in mine]))
            first += count
        return out


def samples_of(
    policy: Policy, task: Task, rows: list[Row], rollout: Rollout, last: int = 1
) -> Samples:
    """What rewards read of a rollout of these rows; last=2: of the first of its two rounds."""
    repeated = [row for row in rows for _ in range(rollout.G)]

    def images(name: str) -> Tensor | None:
        if getattr(rows[0], name) is None:
            return None
        return torch.stack([getattr(row, name) for row in repeated]).to(policy.device)

    return Samples(
        prompts=[row.wanted or row.text for row in repeated],
        metadata=[row.metadata for row in repeated], texts=texts_of(policy, rollout, last),
        images=images_of(policy, rollout, last), sources=images("source"), reals=images("real"),
        answers=None if rows[0].answer is None else [row.answer for row in repeated],
        options=[row.options for row in repeated],
        formats=[task.form] * len(repeated) if task.form else None,
        earlier=images_of(policy, rollout, last + 1))


def keep_first(samples: Samples, task: Task, wording: Wording) -> tuple[Tensor, Samples]:
    """Let samples that say that nothing needs to change keep the picture before the last. [R3]

    -> which do, (N,), and all samples, of which these have that picture in place of the last.

    Differs: under --credit gain R3 counts a right picture that is kept as a gain of 1, here it is 0.
    """
    kept = torch.tensor([wording.stop in text.lower() for text in samples.texts])   # (N,)
    kept = kept.to(samples.images.device)
    first = getattr(samples, task.before)
    images = torch.where(kept[:, None, None, None], first, samples.images)
    return kept, replace(samples, images=images)


def token_states(reference: Callable, precision: Callable, size: int) -> Callable:
    """rewards.TokenMatch's `states`, `size` samples at once.

    reference() and precision() are contexts: of the frozen reference, which the first gives, and of
    its calls.
    """

    @torch.no_grad()
    def states(images: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with reference() as policy, precision():
            pixels = vit_pixels(policy, images * 2 - 1)
            tokens, mask = policy.encode_text(prompts, after="image")               # (N, L)
            parts = []
            for i in range(0, len(prompts), size):
                part = slice(i, i + size)
                image, image_mask, context = policy.image_states(pixels[part])
                text, _ = policy.append_text(context, tokens[part], mask[part], logits=False)
                parts.append((image, image_mask, text))
        image, image_mask, text = (torch.cat(column) for column in zip(*parts))
        words = mask & ~torch.isin(tokens, torch.tensor([*policy.reserved]).to(tokens))
        return image, image_mask, text, words

    return states


def truth_and_variety(task: Task, samples: Samples, detector, G: int) -> dict[str, float]:
    """What is logged of a task's samples besides rewards: truth, and variety within groups.

    Without a detector nothing is known of pictures.
    """
    if not task.draws:
        return {"truth": task.truth(samples, None).double().mean().item()}
    if detector is None:
        return {}
    found = detector(samples.images)
    values = {"truth": task.truth(samples, found)}
    if task.parts:
        values |= task.parts(samples, found)
    means = {name: value.double().mean().item() for name, value in values.items()}
    return means | shapes.diversity(to_bytes(samples.images), found, G)


# ---- what an update is made of ----


def counts(rollout: Rollout, per: str, most: int) -> Tensor:
    """What a rollout's losses are averaged over, (2,): units of text, and of images.

    per: "token" counts sampled tokens, "sequence" texts, "constant" texts times `most` tokens. Of
    images noisy steps count, times of fresh noise, or tokens.
    """
    texts = 0
    for text in rollout.texts:
        texts += {
            "token": int(text.chosen.sum()), "sequence": len(text.chosen),
            "constant": len(text.chosen) * most}[per]
    images = sum(picture.steps for picture in rollout.pictures)
    return torch.tensor([texts, images], dtype=torch.float64)


def step_counts(parts: list, cfg) -> Tensor:
    """`counts` of all train.Parts of a step on this rank, (2,)."""
    total = torch.zeros(2, dtype=torch.float64)
    for part in parts:
        most = part.batch.task.longest_text(cfg)
        total += counts(part.rollout, cfg.text_average, most)
    return total


def micro_batches(rollout: Rollout, size: int) -> list[tuple[Rollout, list[int]]]:
    """Parts of a rollout, of at most `size` samples (0: one part), with their rows.

    Whole groups if `size` samples hold one, else parts of a group.
    """
    B = rollout.B
    G = rollout.G
    prompts = max(B, 1)                         # in a part
    samples = G                                 # of each of them
    if size:
        prompts = max(1, size // G)
        samples = min(size, G)
    parts = []
    for i in range(0, B, prompts):
        for g in range(0, G, samples):
            some = range(i, min(i + prompts, B))
            of_each = range(g, min(g + samples, G))
            rows = [p * G + s for p in some for s in of_each]
            parts.append((subset(rollout, some, of_each), rows))
    return parts


def drop_tied(rollout: Rollout, adv: Tensor, ranks) -> tuple[Rollout, Tensor]:
    """A rollout and its advantages (n, segments) without the groups that have no signal.

    Their gradient is 0 if no penalty acts. Ranks keep equally many groups, so that they make
    equally many calls.
    """
    G = rollout.G
    has = (adv != 0).view(rollout.B, -1).any(1)                         # (B,)
    most = int(ranks.gather(has.sum()[None]).max())
    order = has.logical_not().to(torch.uint8).argsort(stable=True)      # those with a signal first
    prompts = sorted(order[:most].tolist())
    rows = [prompt * G + sample for prompt in prompts for sample in range(G)]
    return subset(rollout, prompts), adv[rows]


# ---- what files must hold ----


def check_rows(rows: list[dict], path: str, task: Task, cfg, policy: Policy) -> None:
    """ValueError for rows of a file that a task cannot use or a reward cannot score.

    A warning for words that the policy was never taught.
    """
    for field in task.reads:
        if bare := [row for row in rows if not row.get(field)]:
            raise ValueError(
                f"--{task.name} reads \"{field}\", which {len(bare)} rows of {path} do not have; "
                f"add it, or set --{task.name} 0")
    room = task.longest_text(cfg)
    texts = [row[task.text] for row in rows]
    tokenized = policy.token_ids(texts, room)
    unknown = policy.tokenizer.unk_token_id     # BAGEL's tokenizer has none: it spells every word
    strange = [text for text, ids in zip(texts, tokenized) if unknown in ids]
    if strange:
        say(
            f"warning: {len(strange)} of {len(rows)} rows of {path} hold words that the policy "
            f"was never taught, such as {strange[0][:60]!r}")
    if task.draws:
        check_drawn(rows, path, task, cfg)
    for answer in dict.fromkeys(row["answer"] for row in rows if task.writes and "answer" in row):
        length = len(policy.tokenizer(answer, add_special_tokens=False).input_ids)
        if length > room:
            raise ValueError(
                f"the answer {answer[:60]!r} has {length} tokens, and --{task.writes} allows "
                f"{room}")


def check_drawn(rows: list[dict], path: str, task: Task, cfg) -> None:
    """ValueError if a reward of drawn images cannot read a row."""
    if cfg.weights["ins"]:
        check_rules(rows, path, task.text)
    text = task.text
    if task.file == "edits":                    # rewards read a caption of the edited image
        text = "caption"
        reading = [name for name in ("sem", "kn", "dense", "recaption", "tim") if cfg.weights[name]]
        bare = [row[task.text] for row in rows if not row.get("caption")]
        if reading and bare:
            raise ValueError(
                f"--{reading[0]} compares an edited image with a caption of it, and "
                f"{bare[0][:60]!r} in {path} has no \"caption\"; add it, or use --dvreward or "
                "--ins alone")
    if cfg.weights["recaption"] and cfg.cycles_by_rule:
        for row in rows:
            caption_tuples(row.get(text, ""))
