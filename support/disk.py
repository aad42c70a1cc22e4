"""Files whole or not at all, and errors of reading them in one line."""

import json
import os
import shutil
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException


@dataclass
class Refusing(AbstractContextManager):
    """Inside, an error of these kinds becomes a ValueError in one line, `what`: the error. So does a bare Exception, which tokenizers
    raises and which an except clause could catch only together with all others."""

    what: str
    kinds: tuple

    def __exit__(self, kind, error, trace):
        if kind is Exception or isinstance(error, self.kinds):
            first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error     # of the ranks'
            raise ValueError(f"{self.what}: {' '.join(str(first).split())[:300]}") from error


def read_json(path: Path, default: dict | None = None) -> dict:
    """The JSON object in a file; `default` where the file is missing and there is one. Errors: ValueError, FileNotFoundError."""
    if not path.exists():
        if default is None:
            raise FileNotFoundError(f"{path} is missing; every folder of a policy, or of adapters, has that file")
        return dict(default)
    with Refusing(f"{path} is not JSON", (ValueError, RecursionError)):
        content = json.loads(path.read_text(encoding="utf-8-sig"))          # some editors put a byte order mark first
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, must hold a JSON object")
    return content


@contextmanager
def replaced(path: Path):
    """Inside, a file to write; then it takes the place of `path`, whole or not at all, with the mode that the umask gives. It lies in a
    folder of a fixed name, so that the next save clears away what a kill leaves. Errors: OSError in one line."""
    scratch = path.with_name(f"{path.name}.tmp")
    file = scratch / path.name
    try:
        scratch.unlink() if scratch.is_file() else shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        file.touch()
        mode = file.stat().st_mode
        yield file
        file.chmod(mode)                                        # safetensors makes its files private
        os.replace(file, path)
    except (SafetensorError, OSError) as error:                 # a full disk may be either
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with replaced(path) as file:
        file.write_bytes(content)
