"""Runs of train.py that are small enough for a test, and how to read what they leave."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors.torch import load_file

import train
from recipes import Config, parse, settings_of
from support.run import Ranks
from tasks import TASKS

ALONE = Ranks(0, 1, torch.device("cpu"))
SHORT = "--group_size 4 --eval_every 0 --save_every 0"


def words(*flags) -> list[str]:
    """A command line of texts, which may hold several words, and of numbers and paths, which do
    not.
    """
    line = []
    for flag in flags:
        line += flag.split() if isinstance(flag, str) else [str(flag)]
    return line


def settings(*flags) -> Config:
    """Of a command line, which may name the scale of a policy that is not there: --scale bagel."""
    given, scale = words(*flags), ""
    if "--scale" in given:
        place = given.index("--scale")
        scale = given[place + 1]
        given = given[:place] + given[place + 2:]
    return parse(given, scale)


def small(out, *flags) -> Config:
    """lvrpo's settings with two rows of three tasks; later flags win."""
    return settings("--draw 2 --think 2 --ask 2 --edit 0", SHORT, "--out", Path(out), *flags)


def flags_of(recipe: str, out, *more) -> list[str]:
    """Two steps of a recipe, which flags may follow, on two rows of each of its tasks."""
    name, *_ = recipe.split()
    rows = [f"--{task} 2" for task in settings_of(name, "toy") if task in TASKS]
    return words("--recipe", recipe, *rows, SHORT, "--steps 2 --out", Path(out), *more)


def write_rows(path, *rows) -> str:
    """JSON lines about i.png, a red picture that lies next to them."""
    Image.new("RGB", (40, 20), (200, 0, 0)).save(path.parent / "i.png")
    path.write_text("\n".join(json.dumps({"image": "i.png"} | row) for row in rows))
    return str(path)


@dataclass
class Finished:
    """A run that has ended: its folder, its log's rows of steps, and its train.Run, whose parts are
    those of the last step."""

    out: Path
    rows: list[dict]
    run: train.Run


def run_to_end(cfg: Config) -> Finished:
    """train.train, and the Run that it made."""
    runs, begin = [], train.begin

    def begin_and_remember(cfg, ranks):
        runs.append(begin(cfg, ranks))
        return runs[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "begin", begin_and_remember)
        train.train(cfg, ALONE)
    return Finished(Path(cfg.out), records(cfg.out), runs[0])


def run_recipe(recipe: str, out) -> Finished:
    return run_to_end(parse(flags_of(recipe, out)))


def records(out) -> list[dict]:
    """The rows of a log after its head, without those that name what differs in a resumed run."""
    lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    return [row for row in rows if "resumed" not in row]


def checkpoint(out) -> dict[str, torch.Tensor]:
    """The tensors of a run's checkpoint, whole, whether one file or a folder holds them."""
    single = Path(out) / "checkpoint.safetensors"
    if single.exists():
        return load_file(single)
    reader = dcp.HuggingFaceStorageReader(str(Path(out) / "checkpoint"))
    stored = reader.read_metadata().state_dict_metadata
    tensors = {key: torch.zeros(value.size) for key, value in stored.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def gradients(out, *flags) -> dict[str, torch.Tensor]:
    """The gradients of the first step, not clipped."""
    run = train.begin(small(out, "--grad_clip 1e9 --epochs 1", *flags), ALONE)
    train.one_step(run, 0)
    run.log.owner.close()
    named = run.policy.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


def assert_close(ours: dict, theirs: dict, most: float = 1e-4) -> None:
    """Every tensor is the other's, up to rounding: relative to its norm, and to the largest
    one's.
    """
    assert ours.keys() == theirs.keys()
    largest = max(value.norm() for value in theirs.values())
    assert largest > 0
    for name, value in theirs.items():
        gap = (ours[name] - value).norm()
        assert gap <= most * value.norm() + 1e-5 * largest, name


def moments(out) -> dict[str, torch.Tensor]:
    """AdamW's running means of the gradients, from a checkpoint."""
    return {k: v for k, v in checkpoint(out).items() if k.startswith("adamw.exp_avg.")}
