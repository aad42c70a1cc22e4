"""The command lines of all programs: errors in one line, output that nobody may read."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.disk import out_of_memory


def the_device(rank: int = 0) -> torch.device:
    """The GPU of that number, or the CPU without one.

    cuDNN's attention is off: with a mask its backward pass gives NaN at some lengths (keys % 128 ==
    64), and it builds a plan for every number of keys.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", rank)


class Terminal:
    """A stream whose failed writes cost nothing, because a run must not die of its progress bar.

    Once a write fails (a closed pipe, a terminal that is gone, a full disk), all output goes to the
    null device. Characters that the terminal does not know are written with backslashes.
    """

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except OSError:
            self.silence()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.silence()

    def silence(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class Defaults(argparse.HelpFormatter):
    """Help that ends in the default, if there is one."""

    def _get_help_string(self, action):
        silent = action.default in (None, False, "", argparse.SUPPRESS)
        return action.help if silent else f"{action.help} (default: %(default)s)"


class Arguments(argparse.ArgumentParser):
    """A command line whose errors are one line, and whose flags are written in full."""

    def __init__(self, **settings):
        super().__init__(formatter_class=Defaults, allow_abbrev=False, **settings)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see --help\n")

    def run(self, work: Callable, argv: list[str] | None) -> None:
        """Parse a command line, and print what `work` makes of it, or in one line why it cannot."""
        a = self.parse_args(argv)
        with one_line(self.prog):
            print(work(a))


def number(
    kind: type, least: float | None = None, above: float | None = None
) -> Callable[[str], float]:
    """A type for argparse: numbers of a kind within bounds."""

    def parse_number(word: str) -> float:
        value = kind(word)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{word}: must be a finite number")
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"{word}: must be at least {least}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{word}: must be above {above}")
        return value

    parse_number.__name__ = kind.__name__       # argparse names it for what is no number at all
    return parse_number


def plain_text(word: str) -> str:
    """A type for argparse: a word that is text in the terminal's encoding."""
    word.encode()                               # a ValueError for bytes that are no text
    return word


def new_file(word: str) -> Path:
    """A type for argparse: a file to write, refused before any work is done for it."""
    path = Path(word)
    above = next(folder for folder in path.resolve().parents if folder.exists())
    if path.is_dir() or not above.is_dir():
        raise argparse.ArgumentTypeError(f"{word}: is a folder, or lies below a file")
    return path


def say(text: str) -> None:
    """A line to the terminal, above the progress bar."""
    tqdm.write(text, file=sys.stderr)


@contextmanager
def one_line(program: str):
    """A context in which an error that a person can mend is one line, `program: what is wrong`.

    The exit status is then 1, for Ctrl-C 130.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")    # its warnings ask for nothing here
    with redirect_stdout(Terminal(sys.stdout)), redirect_stderr(Terminal(sys.stderr)):
        try:
            yield
            sys.stdout.flush()
        except KeyboardInterrupt:
            end(program, "interrupted", 130)
        except (ValueError, OSError, FloatingPointError, RecursionError) as error:
            end(program, first_line(error))
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                end(program, f"{first_line(error)}; the memory is full, try fewer samples at once")
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            end(program, "another rank stopped, and so does this one")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def end(program: str, why: str, status: int = 1) -> None:
    """Leave with one line; several ranks leave at once, because an orderly end would wait."""
    if status == 1 and not dist.is_initialized():
        sys.exit(f"{program}: {why}")
    sys.stderr.write(f"{program}: {why}\n")     # in one piece: ranks share the stream
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(status)
    sys.exit(status)
