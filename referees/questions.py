"""Questions of a prompt: what a yes/no judge is asked about a picture, one fact each, so that "yes" is good. [AlphaGRPO's decomposition]

By rule from GenEval's metadata (`by_rule`), from a file (`Questions`), or by a language model, once and offline:

    python -m referees.questions prompts.jsonl --llm Qwen/Qwen3-8B --out questions.jsonl

A line of such a file is {"prompt", "semantic_questions": [{"question", "tag", "needs"}], "quality_questions": [{"question", "tag"}]}.
"needs" are the places of earlier semantic questions without whose yes this one has no meaning: is the dog red ? needs is there a dog ?

Differs from AlphaGRPO's code: its files have no "needs" (they are read, as if nothing depended), it asks one model to write, a second time
to check and a third time to tag each question, and its quality questions are a call of their own; here one answer holds all and is
checked by rule.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from support.disk import write_atomic
from support.rows import parsed, read_json_lines, read_prompts
from support.terminal import Arguments, one_line, say, the_device

SEMANTIC = ("Style", "Environment", "Viewpoint", "Existence", "Count", "Attribute", "Action", "Spatial", "Text", "Negative")
QUALITY = ("Geometry", "Anatomy", "Texture", "Coherence", "Lighting", "Physics", "Legibility", "Aesthetics")
NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()


@dataclass(frozen=True)
class Question:
    """One thing that a judge is asked; `needs`: places of the questions of the same prompt without whose yes it scores 0."""

    text: str
    tag: str
    quality: bool = False
    needs: tuple[int, ...] = ()


# Of the quality of a toy picture, and of any other.
TOY_QUALITY = (Question("is the picture clean ?", "Texture", True), Question("are the shapes whole ?", "Geometry", True))
PHOTO_QUALITY = (Question("Is the picture free of noise, smears and other artefacts?", "Texture", True),
                 Question("Does everything in the picture have its whole, natural form?", "Geometry", True))


def article(words: str) -> str:
    return ("an " if words[:1].lower() in tuple("aeiou") else "a ") + words


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def by_rule(metadata: dict, quality: tuple[Question, ...]) -> list[Question]:
    """The questions of GenEval's include and exclude clauses: existence, number, colour and relation of each object, and that nothing is
    there that is excluded and not included; then those of `quality`. ValueError for metadata without include clauses."""
    if not metadata.get("include"):
        raise ValueError(f"prompt {metadata.get('prompt', '')[:60]!r} has no objects to ask about; give its questions by --dv")
    asked, existence, totals = [], [], {}

    def ask(text: str, tag: str, *needs: int) -> int:
        if text not in (texts := [question.text for question in asked]):
            asked.append(Question(text, tag, needs=needs))
            return len(texts)
        return texts.index(text)

    for clause in metadata["include"]:
        totals[clause["class"]] = totals.get(clause["class"], 0) + clause["count"]
    for clause in metadata["include"]:
        name, color, count = clause["class"], clause.get("color"), totals[clause["class"]]
        there = ask(f"is there {article(name)} ?", "Existence")
        existence.append(there)
        many = f"are there {NUMBER_WORDS[count] if count < len(NUMBER_WORDS) else count} {plural(name)} ?"
        ask(f"is there one {name} ?" if count == 1 else many, "Count", there)
        if color:
            ask(f"is the {name} {color} ?" if count == 1 else f"is there {article(f'{color} {name}')} ?", "Attribute", there)
        if "position" in clause:
            relation, target = clause["position"]
            other = metadata["include"][target]["class"]
            ask(f"is the {name} {relation} the {other} ?", "Spatial", there, existence[target])
    for clause in metadata.get("exclude", ()):
        if clause["class"] not in totals:
            ask(f"are there zero {plural(clause['class'])} ?", "Negative")
    return asked + list(quality)


class Questions:
    """The questions of a row, (prompt, metadata) -> list[Question]: those in its own metadata, those of a file of decompositions, or those
    of the rule; `toy` says which quality questions the rule adds."""

    def __init__(self, path: str, toy: bool):
        self.path, self.quality = path, TOY_QUALITY if toy else PHOTO_QUALITY
        self.of_file = {row["prompt"]: questions_of_row(row, path) for row in read_json_lines(path, ("prompt",))} if path else {}
        self.made: dict[str, list[Question]] = {}

    def __call__(self, prompt: str, metadata: dict) -> list[Question]:
        if "questions" in metadata:
            return metadata["questions"]
        for text in (prompt, metadata.get("instruction")):      # an edit is known by its caption or its instruction
            if text in self.of_file:
                return self.of_file[text]
        key = json.dumps([prompt, metadata.get("include"), metadata.get("exclude")])
        if key not in self.made:
            self.made[key] = by_rule({"prompt": prompt, **metadata}, self.quality)
        return self.made[key]

    def check(self, rows: list[dict], text: str = "prompt") -> None:
        """ValueError, with the first five, where rows of a file have no questions."""
        bare = []
        for row in rows:
            read = row.get("caption") or row[text]              # what the reward is given
            if not ({"questions", "include"} & {k for k, v in row.items() if v} or {read, row.get("instruction")} & self.of_file.keys()):
                bare.append(row[text])
                continue
            try:
                self(read, row)
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                what = f"{type(error).__name__}: {error}"
                raise ValueError(f"prompt {row[text][:60]!r}: its include or exclude is not GenEval's ({what})") from error
        if bare:
            raise ValueError(f"{self.path or '--dvreward'} has no questions for {len(bare)} of {len(rows)} prompts, such as "
                             f"{[each[:60] for each in bare[:5]]}; make them with python -m referees.questions, and give them by --dv")


def with_questions(row: dict, path: str) -> dict:
    """A row of any file; where it brings decomposed questions of its own, they are read into "questions", which means nothing else."""
    row = {k: v for k, v in row.items() if k != "questions"}
    return row | {"questions": questions_of_row(row, path)} if "semantic_questions" in row or "quality_questions" in row else row


def questions_of_row(row: dict, path: str) -> list[Question]:
    """The questions of a line of a file; plain strings in place of objects are read too, as AlphaGRPO's scorer does."""
    out, where = [], f"{path}: prompt {str(row.get('prompt', row.get('instruction')))[:60]!r}"
    for half, tags in (("semantic_questions", SEMANTIC), ("quality_questions", QUALITY)):
        listed, first = row.get(half), len(out)
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"{where}: {half} must be a list of at least one question")
        for i, each in enumerate(listed):
            each = {"question": each} if isinstance(each, str) else each
            text, tag = (each.get("question"), each.get("tag", tags[3])) if isinstance(each, dict) else (None, None)
            needs = (each.get("needs") or []) if isinstance(each, dict) else []
            tag = next((t for t in tags if isinstance(tag, str) and t.lower() == tag.lower()), None)
            if not isinstance(text, str) or not text.strip() or tag is None or any("\ud800" <= c <= "\udfff" for c in text):
                raise ValueError(f"{where}: {half}[{i}] must have a text \"question\" and a \"tag\" of {tags}")
            if not isinstance(needs, list) or first and needs or not all(type(n) is int and 0 <= n < i for n in needs):
                raise ValueError(f"{where}: {half}[{i}]: \"needs\" must be places of earlier semantic questions")
            out.append(Question(text.strip(), tag, bool(first), tuple(needs)))
    return out


# ---- by a language model ----

ASK = """Take the prompt of an image apart into yes/no questions by which the finished image is checked.

Answer with one JSON object and nothing else:
{{"semantic_questions": [{{"question": "...", "tag": "...", "needs": [0]}}], "quality_questions": [{{"question": "...", "tag": "..."}}]}}

Semantic questions: one fact of the prompt each, only what must be there, nothing that the prompt does not say; "yes" means that the image
keeps it. "tag" is one of {semantic}. "needs" lists the places, counted from 0, of earlier semantic questions that must be true for this
one to have a meaning: ask first whether a thing is there, then of its number, attributes and place.
Quality questions: two to four about how well the image is made, each about one aspect, none that the prompt contradicts. "tag" is one of
{quality}.

Prompt: {prompt}"""


def decompose(path: str, write: Callable[[list[str], float], list[str]], model: str, out: str, batch: int = 8, tries: int = 5) -> list[str]:
    """Ask a language model for the questions of every prompt of a file and add them to `out`, a line each, as they come; returns the
    prompts that got none, each with the reason. What `out` has of the same prompt, model and instruction is not asked again.

    write(requests, temperature) -> answers. ValueError where no prompt at all gets questions.
    """
    prompts = list(dict.fromkeys(row["prompt"] for row in read_prompts(path)))
    hashed = {p: hashlib.sha256(json.dumps([p, model, ASK]).encode()).hexdigest()[:16] for p in prompts}
    done = finished(Path(out))
    open_prompts, reasons = [p for p in prompts if hashed[p] not in done], {}
    asked = len(open_prompts)
    with tqdm(total=asked, desc="decomposing") as bar, open(out, "a", encoding="utf-8") as file:
        for attempt in range(tries):
            left = []
            for i in range(0, len(open_prompts), batch):
                some = open_prompts[i:i + batch]
                requests = [ASK.format(semantic=", ".join(SEMANTIC), quality=", ".join(QUALITY), prompt=p) for p in some]
                for prompt, answer in zip(some, write(requests, 0.0 if attempt == 0 else 0.7)):
                    try:
                        row = {"prompt": prompt, "hash": hashed[prompt], **of_answer(prompt, answer)}
                    except ValueError as error:
                        reasons[prompt] = str(error)
                        left.append(prompt)
                        continue
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    bar.update()
            open_prompts = left
    if asked and len(open_prompts) == asked:
        raise ValueError(f"{model} gave no valid questions for any of {asked} prompts in {tries} tries each; the last reason: "
                         f"{reasons[open_prompts[-1]]}")
    return [f"{prompt}: {reasons[prompt]}" for prompt in open_prompts]


def finished(out: Path) -> set[str]:
    """The hashes that an earlier run finished; a line that a kill has cut is taken out of the file."""
    kept, hashes = [], set()
    lines = out.read_bytes().split(b"\n") if out.exists() else []
    for line in filter(None, lines):
        try:
            hashes.add(parsed(line.decode()).get("hash"))
        except (ValueError, AttributeError):
            continue
        kept.append(line + b"\n")
    if lines and b"".join(kept) != b"\n".join(lines):
        write_atomic(out, b"".join(kept))
    return hashes


def of_answer(prompt: str, answer: str) -> dict:
    """The two lists of questions in a model's answer, validated; ValueError, with what is wrong, where it is no such JSON."""
    try:
        found = parsed(answer[answer.index("{"):answer.rindex("}") + 1])
    except ValueError as error:
        raise ValueError(f"invalid JSON ({getattr(error, 'msg', error)})") from error
    asked = questions_of_row({**found, "prompt": prompt}, "the answer")
    return {"semantic_questions": [dict(question=q.text, tag=q.tag, needs=list(q.needs)) for q in asked if not q.quality],
            "quality_questions": [dict(question=q.text, tag=q.tag) for q in asked if q.quality]}


def load_writer(path: str, device, longest: int = 1024) -> Callable[[list[str], float], list[str]]:
    """decompose's `write` by a chat model of transformers (AutoModelForCausalLM and its chat template), such as Qwen/Qwen3-8B, from
    safetensors and without remote code. Errors: see referees.load_model; ValueError for a tokenizer without a chat template."""
    import torch

    from referees.load import load_language_model
    model, tokenizer = load_language_model(path, device=device)
    if not tokenizer.chat_template:
        raise ValueError(f"{path} has no chat template; take a model that was trained to follow instructions")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    torch.manual_seed(0)                                        # of the second and later tries

    @torch.no_grad()
    def write(requests: list[str], temperature: float) -> list[str]:
        chats = [tokenizer.apply_chat_template([{"role": "user", "content": r}], tokenize=False, add_generation_prompt=True,
                                               enable_thinking=False) for r in requests]
        ids = tokenizer(chats, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False).to(model.device)
        sampling = dict(do_sample=True, temperature=temperature) if temperature else dict(do_sample=False)
        tokens = model.generate(**ids, max_new_tokens=longest, pad_token_id=tokenizer.pad_token_id, **sampling)
        return tokenizer.batch_decode(tokens[:, ids.input_ids.shape[1]:], skip_special_tokens=True)
    return write


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="referees.questions", description="Questions of prompts by a language model, for --dv.", allow_abbrev=False)
    ap.add_argument("prompts", help="prompts: .jsonl or .txt, as train.py reads them")
    ap.add_argument("--llm", required=True, help="a chat model: a folder or hub name, such as Qwen/Qwen3-8B")
    ap.add_argument("--out", default="questions.jsonl", help="where questions are added; prompts that it has already are not asked again")
    a = ap.parse_args(argv)
    with one_line("referees.questions"):
        read_prompts(a.prompts)                                 # before a large model is loaded
        if not Path(a.out).resolve().parent.is_dir():
            raise FileNotFoundError(f"--out {a.out}: its folder does not exist")
        left = decompose(a.prompts, load_writer(a.llm, the_device()), a.llm, a.out)
        for each in left:
            say(f"left out: {each}")
        print(f"{a.out} holds the questions; {len(left)} prompts got none")


if __name__ == "__main__":
    main()
