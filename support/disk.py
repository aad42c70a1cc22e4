"""Files that are written whole or not at all, and reading errors that fit in one line."""

import hashlib
import json
import os
import shutil
import struct
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL.Image import DecompressionBombError
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

# What json, safetensors, tokenizers, transformers, PIL and torch raise at missing or damaged files.
LIBRARY_ERRORS = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
    ImportError, SyntaxError, struct.error, SafetensorError, StrictDataclassError,
    CheckpointException, DecompressionBombError)
PART = 2**16                                    # bytes of a file that a fingerprint reads at once


class one_line_error(AbstractContextManager):
    """A context in which an error that a library raises at a file becomes one line, `what: error`.

    It becomes an OSError if it was one, else a ValueError; `what` names the file or folder. A bare
    Exception is caught too, because tokenizers raises it, and no except clause could catch it
    alone. What `out_of_memory` names passes: the file is not to blame.
    """

    def __init__(self, what: str):
        self.what = what

    def __exit__(self, kind, error, trace):
        expected = kind is Exception or isinstance(error, LIBRARY_ERRORS)
        if not expected or out_of_memory(error):
            return
        if isinstance(error, CheckpointException):              # it holds the errors of all ranks
            error = next(iter(error.failures.values()))[0]
        reason = " ".join(str(error).split())[:300]
        if not isinstance(error, (OSError, ValueError)):        # a KeyError's text is the key alone
            reason = f"{type(error).__name__}: {reason}"
        found = OSError if isinstance(error, OSError) else ValueError
        raise found(f"{self.what}: {reason}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; on a CPU it is a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return "out of memory" in text or "alloc" in text


def fingerprint(path: Path) -> str:
    """A name for the content of a file, or of the weights and configs in a folder.

    Of a file of many gigabytes 256 parts are read, which weights that were trained do not share.
    """
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("[!.]*.safetensors")) + sorted(path.glob("[!.]*.json"))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''} {size} ".encode())
        with file.open("rb") as content:
            for start in range(0, size, max(PART, size // 256)):
                content.seek(start)
                digest.update(content.read(PART))
    return digest.hexdigest()[:16]


def read_json(path: Path, default: dict | None = None) -> dict:
    """The JSON object in a file, or `default` if the file is missing.

    Errors: FileNotFoundError if it is missing and there is no default; ValueError if it holds
    anything else.
    """
    if not path.exists():
        if default is None:
            raise FileNotFoundError(
                f"{path} is missing; every folder of a policy, or of adapters, has that file")
        return dict(default)
    with one_line_error(f"{path} is not JSON"):
        content = json.loads(path.read_text(encoding="utf-8-sig"))      # -sig: a byte order mark
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, must hold a JSON object")
    return content


@contextmanager
def replacing(path: Path):
    """Yield a scratch file to write, which then replaces `path`, with the mode of the umask.

    The scratch file lies in a folder of a fixed name, so that the next save clears away what a kill
    leaves. Errors: OSError in one line.
    """
    scratch = path.with_name(f"{path.name}.tmp")
    file = scratch / path.name
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        file.touch()
        mode = file.stat().st_mode
        yield file
        file.chmod(mode)                        # safetensors makes its files private
        os.replace(file, path)
    except (SafetensorError, OSError) as error:                 # a full disk may raise either
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as file:
        file.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, text.encode())


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1))
