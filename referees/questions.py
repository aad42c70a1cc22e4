"""What a yes/no judge is asked about a picture, one fact each. [AlphaGRPO's decomposition]

A question is put so that "yes" is good. Questions come from GenEval's clauses by rule, or with the
rows of a file, to which a language model adds them once and offline:

    python -m referees.questions prompts.jsonl --llm Qwen/Qwen3-8B --out with_questions.jsonl

The file that this writes is given as --prompts. Its rows are those of prompts.jsonl, and each has
"semantic_questions": [{"question", "tag", "needs"}] and "quality_questions": [{"question", "tag"}].
"needs" are the places of earlier semantic questions without whose yes this one has no meaning: "is
the dog red ?" needs "is there a dog ?". "tag" is for statistics of one's own: no reward reads it.

Differs from AlphaGRPO's code: its files have no "needs" (they are read, as if nothing depended). It
asks one model to write, a second time to check and a third time to tag each question, and its
quality questions are a call of their own; here one answer holds all and is checked by rule.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from rewards import NUMBER_WORDS
from support.disk import fingerprint, write_text
from support.rows import Metadata, has_text, read_prompts
from support.terminal import Arguments, new_file, say, the_device


@dataclass(frozen=True)
class Question:
    """One thing that a judge is asked; without a yes to its `needs` it scores 0."""

    text: str
    quality: bool = False
    needs: tuple[int, ...] = ()


TOY_QUALITY = (
    Question("is the picture clean ?", True),
    Question("are the shapes whole ?", True))
PHOTO_QUALITY = (
    Question("Is the picture free of noise, smears and other artefacts?", True),
    Question("Does everything in the picture have its whole, natural form?", True))


def article(words: str) -> str:
    return f"an {words}" if words.lower().startswith(tuple("aeiou")) else f"a {words}"


def plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"


def questions_by_rule(
    prompt: str, metadata: Metadata, quality: tuple[Question, ...]
) -> list[Question]:
    """The questions of GenEval's clauses, then those of `quality`, none of them twice.

    An include clause is asked about existence, number, colour and relation; an exclude clause,
    unless its class is included, about there being none.
    Errors: ValueError without include clauses.
    """
    if not metadata.get("include"):
        raise ValueError(
            f"prompt {prompt[:60]!r} has no objects to ask about; give its questions with its row")
    asked = {}
    existence = []
    totals = Counter()

    def ask(text: str, *needs: int) -> int:
        """The place of a question, which is added if it is new."""
        asked.setdefault(text, Question(text, needs=needs))
        return list(asked).index(text)

    for clause in metadata["include"]:
        totals[clause["class"]] += clause["count"]
    for clause in metadata["include"]:
        name = clause["class"]
        count = totals[name]
        there = ask(f"is there {article(name)} ?")
        if count == 1:
            ask(f"is there one {name} ?", there)
        else:
            number = NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else count
            ask(f"are there {number} {plural(name)} ?", there)
        if color := clause.get("color"):
            colored = f"is there {article(f'{color} {name}')} ?"
            ask(f"is the {name} {color} ?" if count == 1 else colored, there)
        if "position" in clause:
            relation, target = clause["position"]
            other = metadata["include"][target]["class"]
            ask(f"is the {name} {relation} the {other} ?", there, existence[target])
        existence.append(there)
    for clause in metadata.get("exclude", []):
        if clause["class"] not in totals:
            ask(f"are there zero {plural(clause['class'])} ?")
    return [*asked.values(), *quality]


@dataclass
class Questions:
    """(prompt, metadata) -> the questions that its row brings, or else those of the rule.

    toy: which questions of quality the rule adds.
    """

    toy: bool

    def __call__(self, prompt: str, metadata: Metadata) -> list[Question]:
        if "questions" in metadata:
            return metadata["questions"]
        return questions_by_rule(prompt, metadata, TOY_QUALITY if self.toy else PHOTO_QUALITY)

    def check(self, rows: list[dict], text: str) -> None:
        """ValueError if rows of a file have no questions; text: the field that names a row."""
        bare = [
            row[text][:60] for row in rows if "questions" not in row and not row.get("include")]
        if bare:
            raise ValueError(
                f"--dvreward has no questions for {len(bare)} of {len(rows)} rows, such as "
                f"{bare[:5]}; add them with python -m referees.questions")


# ---- questions that rows bring ----

HALVES = ("semantic_questions", "quality_questions")


def with_questions(row: dict, path: str) -> dict:
    """A row of any file, with the questions that it brings read into "questions"."""
    row = dict(row)
    row.pop("questions", None)
    if row.keys() & HALVES:
        row["questions"] = questions_of_row(row, path)
    return row


def questions_of_row(row: dict, path: str) -> list[Question]:
    """The questions that a row brings. A plain string is read too, as AlphaGRPO's scorer does.

    Errors: ValueError, with the file and the prompt.
    """
    questions = []
    for half in HALVES:
        where = f"{path}: prompt {str(row.get('prompt', row.get('instruction')))[:60]!r}: {half}"
        if not isinstance(row.get(half), list) or not row[half]:
            raise ValueError(f"{where} must be a list of at least one question")
        for i, item in enumerate(row[half]):
            questions.append(read_question(item, i, half == "quality_questions", f"{where}[{i}]"))
    return questions


def read_question(item, place: int, quality: bool, where: str) -> Question:
    """One question of a file, at its place in its half. Errors: ValueError."""
    if isinstance(item, str):
        item = {"question": item}
    if not isinstance(item, dict) or not has_text(item, "question"):
        raise ValueError(f"{where} must have a text \"question\"")
    needs = item.get("needs") or []
    earlier = () if quality else range(place)
    if not isinstance(needs, list) or any(type(n) is not int or n not in earlier for n in needs):
        raise ValueError(f"{where}: \"needs\" must be places of earlier semantic questions")
    return Question(item["question"].strip(), quality, tuple(needs))


# ---- questions by a language model ----

Writer = Callable[[list[str], float], list[str]]  # (requests, temperature) -> answers
ASK = """Take the prompt of an image apart into yes/no questions that check the finished image.

Answer with one JSON object and nothing else:
{{"semantic_questions": [{{"question": "...", "tag": "...", "needs": [0]}}], \
"quality_questions": [{{"question": "...", "tag": "..."}}]}}

Semantic questions: one fact of the prompt each, only what must be there, nothing that the prompt
does not say; "yes" means that the image keeps it. "tag" is one of Style,
Environment, Viewpoint, Existence, Count, Attribute, Action, Spatial, Text, Negative. "needs" lists
the places, counted from 0, of earlier semantic questions that must be true for this one to have a
meaning: ask first whether a thing is there, then about its number, attributes and place.
Quality questions: two to four about how well the image is made, each about one aspect, none that
the prompt contradicts. "tag" is one of Geometry, Anatomy, Texture, Coherence, Lighting, Physics,
Legibility, Aesthetics.

Prompt: {prompt}"""


def decompose(
    path: str, write: Writer, model: str, out: Path, batch: int = 8, tries: int = 5
) -> list[str]:
    """Add the rows of a file of prompts to `out`, each with questions by a language model.

    A row that `out` already has, with the same model and instruction, is not asked again. Returns
    the prompts that got no questions, each with the reason.
    Errors: ValueError if no prompt at all gets questions.
    """
    rows = {}
    writer = fingerprint(Path(model)) if Path(model).is_dir() else model
    for row in read_prompts(path):
        key = json.dumps([row, writer, ASK], sort_keys=True)
        rows[hashlib.sha256(key.encode()).hexdigest()[:16]] = row
    done = finished_rows(out)
    waiting = {key: row for key, row in rows.items() if key not in done}
    reasons = {}                                # why the last try of each failed
    asked = len(waiting)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=asked, desc="decomposing") as bar, out.open("a", encoding="utf-8") as file:
        for attempt in range(tries):
            left = list(waiting.items())
            for i in range(0, len(left), batch):
                some = left[i:i + batch]
                requests = [ASK.format(prompt=row["prompt"]) for _, row in some]
                answers = write(requests, 0.7 if attempt else 0.0)
                for (key, row), answer in zip(some, answers):
                    try:
                        questions = read_answer(row["prompt"], answer)
                    except ValueError as error:
                        reasons[key] = error
                        continue
                    del waiting[key]
                    print(json.dumps({**row, **questions, "hash": key}), file=file, flush=True)
                    bar.update()
    failures = [f"{row['prompt']}: {reasons[key]}" for key, row in waiting.items()]
    if asked and len(failures) == asked:
        raise ValueError(
            f"{model} gave no valid questions for any of {asked} prompts in {tries} tries each; "
            f"the last reason: {failures[-1]}")
    return failures


def finished_rows(out: Path) -> set[str]:
    """The hashes of the rows that an earlier run wrote; a line that a kill has cut is removed."""
    text = out.read_text(encoding="utf-8") if out.exists() else ""
    if text and '"hash": "' not in text.partition("\n")[0]:
        raise ValueError(f"{out} holds what this program did not write; give another --out")
    whole = text[:text.rfind("\n") + 1]
    if whole != text:
        write_text(out, whole)
    return {json.loads(line).get("hash") for line in whole.splitlines()}


def read_answer(prompt: str, answer: str) -> dict:
    """The two lists of questions in a model's answer. Errors: ValueError with what is wrong."""
    answer = answer.rpartition("</think>")[2]
    try:
        found = json.loads(answer[answer.index("{"):answer.rindex("}") + 1])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid JSON ({error})") from error
    questions_of_row({**found, "prompt": prompt}, "the answer")
    return {half: found[half] for half in HALVES}


def load_writer(path: str, device, longest: int = 1024) -> Writer:
    """decompose's `write` by a chat model of transformers, such as Qwen/Qwen3-8B.

    Errors: see referees.load.load_model; ValueError for a tokenizer without a chat template.
    """
    import torch

    from referees.load import load_model

    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    model, tokenizer = load_model(
        "AutoModelForCausalLM", "", path, device, dtype, ("AutoTokenizer",))
    if not tokenizer.chat_template:
        raise ValueError(
            f"{path} has no chat template; take a model that was trained to follow instructions")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    torch.manual_seed(0)                        # of the second and later tries

    @torch.no_grad()
    def write(requests, temperature):
        chats = tokenizer.apply_chat_template(
            [[dict(role="user", content=request)] for request in requests], tokenize=False,
            add_generation_prompt=True, enable_thinking=False)
        given = tokenizer(
            chats, return_tensors="pt", padding=True, padding_side="left",
            add_special_tokens=False).to(model.device)
        tokens = model.generate(
            **given, max_new_tokens=longest, pad_token_id=tokenizer.pad_token_id,
            do_sample=temperature > 0, temperature=temperature or 1.0,
            repetition_penalty=1.0)             # a model's own penalty spoils JSON
        return tokenizer.batch_decode(
            tokens[:, given.input_ids.shape[1]:], skip_special_tokens=True)

    return write


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(
        prog="referees.questions",
        description="Add questions by a language model to prompts, for --dvreward.")
    ap.add_argument("prompts", help="prompts: .jsonl or .txt, as train.py reads them")
    ap.add_argument(
        "--llm", required=True, help="a chat model: a folder or hub name, such as Qwen/Qwen3-8B")
    ap.add_argument(
        "--out", type=new_file, default="with_questions.jsonl",
        help="where the rows are added with their questions; rows that it has are not asked again")
    ap.run(run, argv)


def run(a) -> str:
    """Carry out a parsed command line; returns what to print."""
    read_prompts(a.prompts)                     # before a large model is loaded
    left = decompose(a.prompts, load_writer(a.llm, the_device()), a.llm, a.out)
    for prompt in left:
        say(f"left out: {prompt}")
    return f"{a.out} holds the prompts with their questions; {len(left)} got none"


if __name__ == "__main__":
    main()
