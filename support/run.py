"""What keeps a run alive: its ranks, its log, its checkpoint, the signals that stop it.

Nothing here knows a loss. A run is one process or torchrun's many. A signal, a full disk or a kill
may stop it at any moment, and `--resume` goes on from its last checkpoint as if nothing had
happened.
"""

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from support.checkpoint import (
    full_tensor, save_tensors, shard_like, trainable, trainable_by_expert)
from support.disk import fingerprint, one_line_error, write_text
from support.terminal import say, the_device

# ---- ranks ----


@dataclass(frozen=True)
class Ranks:
    """This process among its peers: one rank of one process, or of torchrun's many."""

    rank: int
    world: int
    device: torch.device

    def total(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def add(self, number: float) -> float:
        """Sum a number over ranks; each waits for all."""
        return self.total(torch.tensor(number, dtype=torch.float64, device=self.device)).item()

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate equal-sized x of all ranks in rank order, on this rank's device."""
        x = x.to(self.device)
        if self.world == 1:
            return x
        everyone = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(everyone, x.contiguous())
        return torch.cat(everyone)

    def share(self, count: int) -> range:
        """Which of `count` prompts are this rank's; `count` must divide over the ranks."""
        mine = count // self.world
        return range(self.rank * mine, (self.rank + 1) * mine)

    def add_gradients(self, optimizer, averaged: int) -> None:
        """Sum the gradients of all ranks, unless FSDP2 has done it.

        averaged: what the losses were multiplied by for FSDP2.
        """
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is None:              # so that every rank has the same list
                    p.grad = torch.zeros_like(p)
                if not isinstance(p, DTensor):
                    self.total(p.grad).div_(averaged)

    def mean_over_ranks(self, log: dict[str, list[float]]) -> dict[str, float]:
        """One number per name: `reduce_metric` over micro-batches and ranks."""
        mine = [reduce_metric(name, np.array(values)) for name, values in log.items()]
        row = torch.tensor([mine], dtype=torch.float64)
        everyone = self.gather(row)                                                 # (ranks, names)
        return {name: reduce_metric(name, everyone[:, i]).item() for i, name in enumerate(log)}


def reduce_metric(name: str, values):
    """The mean of an array or tensor; its extreme if the metric's name ends in min or max."""
    if name.endswith("min"):
        return values.min()
    if name.endswith("max"):
        return values.max()
    return values.mean()


def precision(cfg, device: torch.device):
    """A context of bf16 autocast, if asked for: of the policy's calls, not of the losses."""
    return torch.autocast(device.type, torch.bfloat16) if cfg.bf16 else nullcontext()


def make_optimizer(
    policy: nn.Module, rates: dict[str, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW with a rate per expert.

    It has its moments from the start, so that a checkpoint can be read in place.
    """
    groups = []
    for expert, params in trainable_by_expert(policy).items():
        whole = [p for p in params if not isinstance(p, DTensor)]
        cut = [p for p in params if isinstance(p, DTensor)]  # the two kinds do not mix in one group
        groups += [dict(params=some, lr=rates[expert]) for some in (whole, cut) if some]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=weight_decay)
    start_moments(optimizer)
    return optimizer


def start_moments(optimizer: torch.optim.AdamW) -> None:
    """Give AdamW its moments before its first step, so that a checkpoint can be read in place."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = dict(
                step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))


def clip_gradients(optimizer, most: float) -> Tensor:
    """Clip the common norm of all gradients to `most` and return what it was."""
    groups = [group["params"] for group in optimizer.param_groups]
    norms = [full_tensor(nn.utils.get_total_norm([p.grad for p in params])) for params in groups]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for params in groups:
        nn.utils.clip_grads_with_norm_(params, most, norm)
    return norm


def setup() -> Ranks:
    """Read torchrun's environment and join its process group: nccl on GPUs, else gloo."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = the_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(rank, world, device)


# ---- the log ----

# Settings that may differ between a run and its resumption without changing what is computed.
FREE = ("resume", "out", "steps", "eval_every", "save_every", "micro", "rollout_batch")
# Settings that name a file or folder, which is compared by its content if it lies here.
FILES = (
    "policy", "prompts", "questions", "edits", "siglip", "judge", "captioner", "pref_model",
    "detector")


class Log:
    """out/log.jsonl: one JSON object a line, of which the first says what ran. Only rank 0 writes.

    The file begins with the first finished step, so that a run that fails before it leaves nothing.
    A resumed run appends to it, and adds a row that names the settings in which it differs from the
    run before.
    """

    def __init__(self, out: Path, config: dict, active: bool, world: int):
        self.path = out / "log.jsonl"
        self.active = active
        self.evaluated = set()
        self.waiting = []
        self.owner = None
        paths = {name: Path(config[name]) for name in FILES if config.get(name)}
        files = {name: fingerprint(path) for name, path in paths.items() if path.exists()}
        versions = dict(
            python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
        self.head = dict(
            config=config, command=" ".join(sys.argv), commit=commit(), world=world,
            versions=versions, files=files)
        self.start = time.monotonic()
        if active:
            out.mkdir(parents=True, exist_ok=True)
            self.owner = Owner(out)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.owner:
            self.owner.close()

    def resume(self, step: int) -> None:
        """Go on in the file of the run that is resumed, without its rows from `step` on."""
        if not self.active:
            return
        head, rows = read_rows(self.path) if self.path.exists() else (None, [])
        kept = [
            row
            for row in rows
            if row["step"] < step or ("eval" in row and row["step"] == step)
        ]
        self.start -= max((row["seconds"] for row in kept), default=0.0)
        self.evaluated = {row["step"] for row in kept if "eval" in row}
        head = head or self.head
        changed = differences(head, self.head)
        self.write([head, *kept])
        if changed:
            named = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
            say(f"resumes with other settings: {named}")
            self(step=step, resumed=changed)

    def __call__(self, **record) -> None:
        """Add a row. Evaluations before the first step wait for it."""
        if not self.active:
            return
        row = dict(seconds=round(time.monotonic() - self.start, 2), **record)
        if "eval" in record:
            self.evaluated.add(record["step"])
            if not self.path.exists():
                self.waiting.append(row)
                return
        self.open()
        with self.path.open("a", encoding="utf-8") as file:
            print(json.dumps(row), file=file)

    def open(self) -> None:
        """Begin the file with the head and the rows that waited."""
        if self.active and not self.path.exists():
            self.write([self.head, *self.waiting])

    def write(self, rows: list[dict]) -> None:
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))


class Owner:
    """The lock by which a run owns its folder; it ends with the process.

    Errors: ValueError if another run holds it.
    """

    def __init__(self, out: Path):
        self.handle = None
        if sys.platform == "win32":             # has no such locks
            return
        import fcntl

        self.handle = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ValueError(
                f"--out {out} is in use by another run; give another folder, or wait") from error
        except OSError:                         # a network's file system without locks
            say(f"warning: {out} cannot be locked; make sure that no other run writes there")

    def close(self) -> None:
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    __del__ = close


NOT_WHOLE = "{} is not a whole checkpoint in safetensors, and pickled checkpoints are not read"
CHECKPOINTS = ("checkpoint.safetensors", "checkpoint", "checkpoint.old")


def refuse_finished(out: Path) -> None:
    """ValueError if a folder holds a run, which a run that begins anew would mix with its own."""
    if any((out / name).exists() for name in ("log.jsonl", *CHECKPOINTS)):
        raise ValueError(f"{out} holds a run; --resume goes on, another --out begins anew")


def differences(old: dict, new: dict) -> dict[str, list]:
    """name -> [old, new] of what differs in two heads of a log.

    Settings, commit, versions and the number of ranks.
    """
    a = flatten_head(old)
    b = flatten_head(new)
    return {
        name: [a.get(name), b.get(name)]
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    }


def flatten_head(head: dict) -> dict:
    """A log's head as one flat dictionary, without what may differ freely."""
    flat = dict(head.get("versions", {}), commit=head.get("commit"), world=head.get("world"))
    for name, value in head.get("config", {}).items():
        if isinstance(value, dict):
            flat |= value
        elif name not in FREE:
            flat[name] = value
    return flat | head.get("files", {})


def commit() -> str | None:
    """The commit of these files, with "+" if they differ from it; None without git."""
    command = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_rows(path: Path) -> tuple[dict | None, list[dict]]:
    """A log's head, or None if it is lost, and its other rows.

    Torn and blank lines, as a crash leaves them, are skipped.
    """
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and ("step" in row or "config" in row):
            rows.append(row)
    head = next((row for row in rows if "config" in row), None)
    return head, [row for row in rows if "config" not in row]


def read_log(path: Path) -> tuple[dict, list[dict]]:
    """A log's head and its other rows. Errors: ValueError for a file that is no log."""
    head, rows = read_rows(path)
    if head is None:
        raise ValueError(f"{path} is not a log of train.py: no line of it holds the config")
    return head, rows


@contextmanager
def signals():
    """A list to which SIGINT, SIGTERM, SIGQUIT and SIGHUP append their numbers.

    Each says so on the terminal; the old handlers come back afterwards. A SIGHUP that is ignored,
    as nohup does, stays ignored.
    """
    caught = []
    old = {}

    def catch(number, frame):                   # print is not for handlers
        os.write(2, b"stopping as soon as no weight moves; a checkpoint follows\n")
        caught.append(number)

    for name in ("SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is None:                      # Windows lacks two of them
            continue
        if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
            continue
        old[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Stop(Exception):
    """A signal asks the run to end, and no weight has moved since the last whole step."""


def stop_if_asked(run) -> None:
    """Raise Stop on all ranks if one of them caught a signal; all must call it equally often.

    run: a train.Run, of which this reads `ranks` and `caught`.
    """
    if run.ranks.add(len(run.caught)):
        raise Stop


# ---- the checkpoint ----


class Average:
    """Exponential moving average of the trainable weights, in fp32."""

    def __init__(self, policy: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in trainable(policy).items()}

    @torch.no_grad()
    def update(self, policy: nn.Module) -> None:
        for name, p in trainable(policy).items():
            self.weights[name].lerp_(p.float(), 1 - self.decay)

    @contextmanager
    def in_place_of(self, policy: nn.Module):
        """Put the average into the policy for a while."""
        own = {name: p.detach().clone() for name, p in trainable(policy).items()}
        policy.load_state_dict(self.weights, strict=False)
        try:
            yield
        finally:
            policy.load_state_dict(own, strict=False)


def run_state(run) -> dict[str, Tensor]:
    """The live tensors of a train.Run's checkpoint, but the step.

    Weights, their averages, AdamW's moments, a referee that learns.
    """
    out = run.learner.state() if run.learner else {}
    for name, p in trainable(run.policy).items():
        out[f"policy.{name}"] = p.detach()
        out[f"average.{name}"] = run.average.weights[name]
        if run.follower:
            out[f"follower.{name}"] = run.follower.weights[name]
        for key, value in run.optimizer.state[p].items():
            out[f"adamw.{key}.{name}"] = value
    return out


def save_checkpoint(
    out: Path, tensors: dict[str, Tensor], step: int, sharded: bool = False, rank: int = 0,
    writer: int = 0
) -> None:
    """Replace the checkpoint in `out`, whole or not at all.

    Ranks that hold equal weights leave it to the rank `writer`, which writes
    out/checkpoint.safetensors. All ranks of a sharded run write the folder out/checkpoint together,
    in safetensors, which any number of ranks can read.
    """
    tensors = tensors | {"step": torch.tensor(step)}
    single, folder, old = (out / name for name in CHECKPOINTS)
    scratch = out / "checkpoint.tmp"
    if not sharded:
        if rank == writer:
            # A file of its own: several ranks may fail together.
            part = out / f"checkpoint.{writer}.safetensors"
            save_tensors(tensors, part)
            os.replace(part, single)
            if folder.exists():
                folder.rename(scratch)  # in one step: half a folder must not look like a checkpoint
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return
    if rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
    dist.barrier()
    storage = dcp.HuggingFaceStorageWriter(str(scratch), save_distributed=True)
    with one_line_error(f"{scratch} could not be written"):
        dcp.save(tensors, storage_writer=storage)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)  # a kill before this line leaves the old one, which is found too
        shutil.rmtree(old, ignore_errors=True)
        single.unlink(missing_ok=True)
    dist.barrier()


def read_checkpoint(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors from a checkpoint of either kind, each rank of a sharded run its own part."""
    with one_line_error(NOT_WHOLE.format(path)):
        if path.is_dir():
            alone = not any(isinstance(value, DTensor) for value in tensors.values())
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=alone)
            return
        stored = load_file(path)                # mapped, not read
        for key, value in tensors.items():
            value.copy_(shard_like(stored[key].to(value.device), value))


def stored_kinds(path: Path) -> dict[str, tuple]:
    """Key -> (shape, dtype) of a checkpoint of either kind."""
    with one_line_error(NOT_WHOLE.format(path)):
        if path.is_dir():
            stored = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
            for key, value in stored.items():
                if sum(math.prod(chunk.sizes) for chunk in value.chunks) != math.prod(value.size):
                    raise ValueError(f"parts of {key} are missing")
            return {
                key: (tuple(value.size), value.properties.dtype) for key, value in stored.items()}
        return {key: (tuple(x.shape), x.dtype) for key, x in load_file(path).items()}


def load_checkpoint(out: Path, tensors: dict[str, Tensor]) -> int:
    """Put the newest checkpoint in `out` into a run's tensors and return its step.

    Keys, shapes and dtypes are checked before anything changes. Errors: FileNotFoundError without a
    checkpoint, ValueError for one of another run.
    """
    into = tensors | {"step": torch.tensor(0)}
    single, folder, old = (out / name for name in CHECKPOINTS)
    wanted = {key: (tuple(value.shape), value.dtype) for key, value in into.items()}
    steps = {}
    for path in (single, folder if folder.exists() else old):   # a kill may leave both
        if not path.exists():
            continue
        stored = stored_kinds(path)
        for key in sorted(wanted.keys() | stored.keys()):
            if stored.get(key) != wanted.get(key):
                raise ValueError(
                    f"{path}: {key} has shape {stored.get(key)}, the policy {wanted.get(key)}; "
                    "was it written with another --policy, --lora, --image_loss or rates?")
        read_checkpoint(path, {"step": into["step"]})
        steps[path] = int(into["step"])
    if not steps:
        raise FileNotFoundError(f"no checkpoint {single} to resume from")
    path = max(steps, key=steps.get)
    read_checkpoint(path, into)
    return steps[path]
