"""The command lines of all programs: errors in one line, output that nobody may read, the device.

A run must not die of its progress bar, and what a person can mend must not end in a traceback.
"""

import argparse
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm


def the_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Terminal:
    """A stream whose failed writes cost nothing: where the reader of a pipe, the terminal or the disk behind it is gone, all further
    output goes to the null device. A run must not die of its progress bar."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.tried(lambda: self.stream.write(text)) or len(text)

    def flush(self) -> None:
        self.tried(self.stream.flush)

    def tried(self, work):
        try:
            return work()
        except UnicodeEncodeError as error:                     # a terminal that is not UTF-8
            return self.stream.write(error.object.encode("ascii", "backslashreplace").decode())
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class Defaults(argparse.HelpFormatter):
    """Help that ends in the default, where there is one to tell."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, "", argparse.SUPPRESS) else f"{action.help} (default: %(default)s)"


class Arguments(argparse.ArgumentParser):
    """A command line whose errors are one line."""

    def __init__(self, **settings):
        super().__init__(formatter_class=Defaults, **settings)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}; see --help\n")

    def parse_args(self, argv=None):
        for word in sys.argv[1:] if argv is None else argv:
            try:
                utf8(word)
            except ValueError:
                self.error(f"{ascii(word)} is not UTF-8 text")
        return super().parse_args(argv)


def utf8(word: str) -> str:
    """A word of the command line as UTF-8, also where the locale is not and Python kept its bytes apart; ValueError for other bytes."""
    return word.encode("utf-8", "surrogateescape").decode("utf-8")


def say(text: str) -> None:
    """A line to the terminal, above the progress bar."""
    tqdm.write(text, file=sys.stderr)


@contextmanager
def one_line(program: str):
    """Inside, what a person can mend ends as one line, `program: what is wrong`, and exit status 1; Ctrl-C as 130."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")     # its warnings tell a user of ours nothing to do
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Terminal, streams)
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        end(program, "interrupted", 130)
    except torch.cuda.OutOfMemoryError as error:
        end(program, f"{first_line(error)}; try fewer samples at once")
    except (ValueError, OSError, FloatingPointError, MemoryError, RecursionError) as error:
        end(program, first_line(error))
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        end(program, "another rank stopped, and so does this one")
    finally:
        sys.stdout, sys.stderr = streams


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def end(program: str, why: str, status: int = 1) -> None:
    if status == 1 and not dist.is_initialized():
        sys.exit(f"{program}: {why}")
    sys.stderr.write(f"{program}: {why}\n")                     # in one piece, since ranks share the stream
    sys.stderr.flush()
    if dist.is_initialized():
        os._exit(status)                                        # leaving the group in order would wait for ranks that wait for this one
    sys.exit(status)
