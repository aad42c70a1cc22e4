"""What keeps a run alive: its ranks, what it is refused for, its memory, its log, its checkpoint.

Nothing here knows a loss. A run may be one process or torchrun's many, may be stopped by a signal, a full disk or a kill at any moment, and
goes on with --resume from its last checkpoint as if it had not been.
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
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from support.checkpoint import FLOATS, UNREADABLE, finite, placed, save_tensors, trainable, whole
from support.disk import Refusing, write_atomic
from support.terminal import say


# ---- ranks ----


@dataclass(frozen=True)
class Ranks:
    """This process among its peers: one rank of one process, or torchrun's."""

    rank: int
    world: int
    device: torch.device

    def total(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place; x itself where there is one."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate equal-sized x of all ranks in rank order."""
        if self.world == 1:
            return x
        everyone = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(everyone, x.contiguous())
        return torch.cat(everyone)

    def cuts(self, count: int) -> int:
        """Into how many pieces each group of `count` prompts is cut: 1 where the prompts divide over the ranks."""
        return self.world // math.gcd(count, self.world)

    def share(self, count: int, G: int) -> tuple[range, range]:
        """Which of `count` prompts, and which samples of each group of G, are this rank's."""
        cuts = self.cuts(count)
        deals, deal, cut = self.world // cuts, self.rank // cuts, self.rank % cuts
        return range(deal * count // deals, (deal + 1) * count // deals), range(cut * G // cuts, (cut + 1) * G // cuts)

    def groups(self, x: Tensor, count: int, G: int) -> Tensor:
        """x (n,) of the samples of each rank -> (count, G) of all."""
        cuts = self.cuts(count)
        deals = self.world // cuts
        return self.gather(x).view(deals, cuts, count // deals, G // cuts).transpose(1, 2).reshape(count, G)

    def own(self, x: Tensor) -> Tensor:
        """The inverse: x (count, G) of all samples -> (n,) of this rank's."""
        mine, samples = self.share(*x.shape)
        return x[mine.start:mine.stop, samples.start:samples.stop].flatten()

    def combined(self, log: dict[str, list[float]]) -> dict[str, float]:
        """One number per name: the mean over micro-batches and ranks, or the least and largest where the name says min or max."""
        def one(name: str, values):
            return values.min() if name.endswith("min") else values.max() if name.endswith("max") else values.mean()
        mine = torch.tensor([[one(k, np.array(v)) for k, v in log.items()]], dtype=torch.float64, device=self.device)
        everyone = self.gather(mine)                                                                           # (ranks, names)
        return {k: one(k, everyone[:, i]).item() for i, k in enumerate(log)}

    def add_gradients(self, optimizer, averaged: int) -> None:
        """Add the gradients of all ranks up where FSDP2 has not."""
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad      # so that every rank has the same list
            if not isinstance(p, DTensor):
                self.total(p.grad).div_(averaged)


def clip_gradients(optimizer, most: float) -> Tensor:
    """Clip the common norm of all gradients to `most` and return what it was."""
    groups = [g["params"] for g in optimizer.param_groups]
    norm = torch.linalg.vector_norm(torch.stack([whole(nn.utils.get_total_norm([p.grad for p in params])) for params in groups]))
    for params in groups:
        nn.utils.clip_grads_with_norm_(params, most, norm)
    return norm


def setup() -> Ranks:
    """Read torchrun's environment; nccl where there are GPUs, else gloo."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return Ranks(rank, world, device)


# ---- memory ----


def precision(cfg, device: torch.device):
    """bf16 autocast where it is asked for: of the policy's own calls, not of losses and rewards."""
    return torch.autocast(device.type, torch.bfloat16) if cfg.bf16 else nullcontext()


# ---- the log ----


# What may differ between a run and its resumption without changing what is computed.
FREE = ("resume", "out", "steps", "eval_every", "save_every", "micro", "rollout_batch", "referee_batch")


class Log:
    """out/log.jsonl, one JSON object a line; the first tells what ran. Only one rank writes, and only one run at a time owns the folder.

    A resumed run goes on in the same file and adds a row of what differs from the run that it resumes. A run that starts anew first moves
    an older run's log and checkpoint into out/previous (out/previous2, ...), not before its own first step is done.
    """

    def __init__(self, out: Path, config: dict, active: bool, world: int):
        self.path, self.active, self.evaluated, self.waiting, self.opened = out / "log.jsonl", active, set(), [], False
        self.head = dict(config=config, command=" ".join(sys.argv), commit=commit(), world=world,
                         versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__))
        self.begun, self.owned = time.monotonic(), None
        if active:
            out.mkdir(parents=True, exist_ok=True)
            self.owned = Owner(out)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.owned:
            self.owned.close()

    def resume(self, step: int) -> None:
        """Go on behind the rows of the steps before `step`; what cannot be read is dropped."""
        if not self.active:
            return
        head, rows = read_rows(self.path) if self.path.exists() else (None, [])
        kept = [r for r in rows if r.get("step", step) < step or "eval" in r and r["step"] == step]
        self.begun -= max([r["seconds"] for r in kept if isinstance(r.get("seconds"), (int, float))], default=0.0)
        self.evaluated = {r["step"] for r in kept if "eval" in r}
        changed = differences(head, self.head) if head else {}
        self.write([head or self.head, *kept])
        self.opened = True
        if changed:
            say("resumes with other settings: " + ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items()))
            self(step=step, resumed=changed)

    def __call__(self, **record) -> None:
        """Add a row. Rows before the first step's wait for it."""
        if not self.active:
            return
        if "eval" in record:
            self.evaluated.add(record["step"])
        row = dict(seconds=round(time.monotonic() - self.begun, 2), **record)
        if not self.opened and "eval" in record:
            self.waiting.append(row)
            return
        self.open()
        if not self.path.exists():                              # deleted while the run goes
            self.write([self.head])
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def open(self) -> None:
        """Put an older run aside and begin the file, with the rows that waited."""
        if self.active and not self.opened:
            set_aside(self.path.parent)
            self.write([self.head, *self.waiting])
            self.opened = True

    def write(self, rows: list[dict]) -> None:
        write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in rows).encode())


class Owner:
    """Holds the lock by which a run owns its folder; it ends with the process, however that ends. ValueError where another run holds it."""

    def __init__(self, out: Path):
        self.held = None
        if sys.platform == "win32":                             # has no such locks
            return
        import fcntl
        self.held = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ValueError(f"--out {out} is in use by another run; give another folder, or wait for its end") from error
        except OSError:                                         # a network's file system without locks
            say(f"warning: {out} cannot be locked; see to it that no other run writes there")

    def close(self) -> None:
        if self.held is not None:
            os.close(self.held)
            self.held = None

    __del__ = close


def set_aside(out: Path) -> None:
    """Move the log and the checkpoints of an older run into a folder of their own, so that nothing of it is lost or resumed by mistake."""
    names = [n for n in ("log.jsonl", "checkpoint.safetensors", "checkpoint", "checkpoint.old") if (out / n).exists()]
    if names:
        number = next(i for i in range(1, 10**6) if not (out / f"previous{i if i > 1 else ''}").exists())
        folder = out / f"previous{number if number > 1 else ''}"
        folder.mkdir()
        for name in names:
            (out / name).rename(folder / name)
        say(f"the log and the checkpoint of the run before are in {folder}")


def differences(old: dict, new: dict) -> dict[str, list]:
    """name -> [old, new] of the settings, commit, versions and number of ranks in which two heads of a log differ."""
    def flat(head: dict) -> dict:
        config = head.get("config") or {}
        nested = {k: v for part in config.values() if isinstance(part, dict) for k, v in part.items()}
        plain = {k: v for k, v in config.items() if not isinstance(v, dict) and k not in FREE}
        return plain | nested | (head.get("versions") or {}) | {k: head.get(k) for k in ("commit", "world")}
    a, b = flat(old), flat(new)
    return {k: [a.get(k), b.get(k)] for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}


def commit() -> str | None:
    """The commit of these files, with "+" where they differ from it; None outside git or without it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_rows(path: Path) -> tuple[dict | None, list[dict]]:
    """A log's head, or None where it is lost, and its other rows; torn and blank lines, as a crash leaves them, are passed over."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and ("step" in row or "config" in row):
            rows.append(row)
    heads = [row for row in rows if "config" in row]
    return (heads[0] if heads else None), [row for row in rows if "config" not in row]


def read_log(path: Path) -> tuple[dict, list[dict]]:
    """A log's head and its other rows; ValueError for a file that is no log."""
    head, rows = read_rows(path)
    if head is None:
        raise ValueError(f"{path} is not a log of train.py: no line of it holds the config")
    return head, rows


@contextmanager
def signals():
    """A list that SIGINT, SIGTERM, SIGQUIT and SIGHUP append their names to while inside; the old handlers come back afterwards.
    A SIGHUP that is ignored, as nohup does, stays so."""
    caught, names = [], ["SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP"]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        names.remove("SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]        # Windows lacks two of them
    old = [signal.signal(n, lambda n, _: caught.append(signal.Signals(n).name)) for n in numbers]
    try:
        yield caught
    finally:
        for n, handler in zip(numbers, old):
            signal.signal(n, handler)


# ---- the checkpoint ----


class Average:
    """Exponential moving average of the trainable weights, fp32; `swapped` puts it into the policy for a while."""

    def __init__(self, policy: nn.Module, decay: float):
        self.decay, self.weights = decay, {n: p.detach().float().clone() for n, p in trainable(policy).items()}

    @torch.no_grad()
    def update(self, policy: nn.Module) -> None:
        for n, p in trainable(policy).items():
            self.weights[n].lerp_(p.float(), 1 - self.decay)

    @contextmanager
    def swapped(self, policy: nn.Module):
        own = {n: p.detach().clone() for n, p in trainable(policy).items()}
        policy.load_state_dict(self.weights, strict=False)
        try:
            yield policy
        finally:
            policy.load_state_dict(own, strict=False)


def run_state(policy: nn.Module, average: Average, optimizer, learner=None) -> dict[str, Tensor]:
    """The live tensors of a checkpoint but for the step: trainable weights, their average, AdamW's moments, a referee that learns."""
    out = learner.state() if learner else {}
    for n, p in trainable(policy).items():
        out |= {f"policy.{n}": p.detach(), f"average.{n}": average.weights[n]}
        out |= {f"adamw.{k}.{n}": v for k, v in optimizer.state[p].items()}
    return out


def save_checkpoint(out: Path, tensors: dict[str, Tensor], step: int, sharded: bool = False, rank: int = 0, writer: int = 0) -> None:
    """Replace out/checkpoint.safetensors atomically, from the rank `writer`, where ranks hold equal weights; of a sharded run the folder
    out/checkpoint, which all ranks write together (torch.distributed.checkpoint, in safetensors) and which any number of ranks reads."""
    tensors = tensors | {"step": torch.tensor(step)}
    single, folder, fresh, old = out / "checkpoint.safetensors", out / "checkpoint", out / "checkpoint.tmp", out / "checkpoint.old"
    if not sharded:
        if rank == writer:
            part = out / f"checkpoint.{writer}.safetensors"     # a file of its own, since several ranks may fail together
            save_tensors(tensors, part)
            os.replace(part, single)
            if folder.exists():
                folder.rename(fresh)                            # in one step, so that no half of a folder looks like a checkpoint
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return
    if rank == 0:
        shutil.rmtree(fresh, ignore_errors=True)
    dist.barrier()
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(fresh), save_distributed=True))
    except CheckpointException as error:                        # no Exception: it would pass every handler
        raise OSError(f"{fresh} could not be written: {next(iter(error.failures.values()))[0]}") from error
    dist.barrier()
    if rank == 0:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)                                    # a kill before this line leaves the old one, which is looked for too
        shutil.rmtree(old, ignore_errors=True)
        single.unlink(missing_ok=True)
    dist.barrier()


def read_checkpoint(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors, of a sharded one this rank's part, from a checkpoint of either kind. A folder's are filled before they are checked."""
    with Refusing(f"{path} is not a whole checkpoint in safetensors, and pickled checkpoints are not read", UNREADABLE):
        if path.is_dir():
            alone = not any(isinstance(v, DTensor) for v in tensors.values())
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=alone)
            bad = [k for k, v in tensors.items() if not finite(v.to_local() if isinstance(v, DTensor) else v)]
        else:
            with safe_open(path, framework="pt") as file:
                bad = [k for k in tensors if not finite(file.get_tensor(k))]
                for key, value in tensors.items() if not bad else ():
                    value.copy_(placed(file.get_tensor(key).to(value.device), value))
    if bad:
        raise ValueError(f"{path}: {bad[0]} holds numbers that are not finite; no run can go on from them")


def stored_kinds(path: Path) -> dict[str, tuple]:
    """Key -> (shape, dtype) of a checkpoint of either kind."""
    with Refusing(f"{path} is not a whole checkpoint in safetensors, and pickled checkpoints are not read", UNREADABLE):
        if path.is_dir():
            held = dcp.HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
            if holes := [k for k, v in held.items() if sum(math.prod(c.sizes) for c in v.chunks) != math.prod(v.size)]:
                raise ValueError(f"parts of {holes[0]} are missing")
            return {k: (tuple(v.size), v.properties.dtype) for k, v in held.items()}
        with safe_open(path, framework="pt") as file:
            held = {k: file.get_slice(k) for k in file.keys()}
            return {k: (tuple(v.get_shape()), (FLOATS | {"I64": torch.int64}).get(v.get_dtype())) for k, v in held.items()}


def load_checkpoint(out: Path, tensors: dict[str, Tensor]) -> int:
    """Put the checkpoint in `out` into a run's tensors and return its step. Keys, shapes and dtypes are checked before anything changes."""
    into = tensors | {"step": torch.tensor(0)}
    single, folder, old = out / "checkpoint.safetensors", out / "checkpoint", out / "checkpoint.old"
    there = [p for p in (single, folder if folder.exists() else old) if p.exists()]         # a kill may leave one of each kind
    if not there:
        raise FileNotFoundError(f"no checkpoint {single} to resume from")
    want, steps = {k: (tuple(v.shape), v.dtype) for k, v in into.items()}, {}
    for path in there:
        has = stored_kinds(path)
        missing, extra = sorted(want.keys() - has.keys()), sorted(has.keys() - want.keys())
        if missing or extra:
            raise ValueError(f"{path}: {len(missing)} keys missing {missing[:6]}, {len(extra)} keys extra {extra[:6]}; "
                             "was it written with another --policy, --lora or --experts?")
        if wrong := [k for k in want if has[k] != want[k]]:
            raise ValueError(f"{path}: {wrong[0]} has shape {has[wrong[0]]}, the policy {want[wrong[0]]}")
        read_checkpoint(path, {"step": into["step"]})
        steps[path] = int(into["step"])
    path = max(steps, key=steps.get)
    if steps[path] < 0:
        raise ValueError(f"{path}: step is {steps[path]}, must be 0 or above")
    read_checkpoint(path, into)
    return steps[path]


def save_bad_step(out: Path, rank: int, policy: nn.Module, step: int, work: list | None) -> str:
    """Save the weights and the batches of a step whose loss or gradient is not finite, one file per rank; returns what to say of it.
    work: (batch, rollout, advantages) of each task."""
    path = out / f"bad_step_{rank}.safetensors"
    tensors = {f"policy.{n}": p.to_local() if isinstance(p, DTensor) else p for n, p in trainable(policy).items()}
    tensors |= {"step": torch.tensor(step)}
    for batch, r, adv in work or []:
        tensors[f"{batch.task}.adv"] = adv
        for i, s in enumerate(r.segments):
            held = vars(s) | (vars(s.flow) if getattr(s, "flow", None) else {})
            tensors |= {f"{batch.task}.{i}.{k}": v.clone() for k, v in held.items() if isinstance(v, Tensor)}
    save_tensors(tensors, path)
    good = [p for p in (out / "checkpoint.safetensors", out / "checkpoint") if p.exists()]
    return f"Last good checkpoint: {good[0] if good else 'none yet'}. The weights and the batch of this step are in {path}"
