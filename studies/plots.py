"""Curves of one or several runs, from their logs.

    python -m studies.plots out/log.jsonl out/control/log.jsonl
"""

from pathlib import Path

from support.plots import plot
from support.terminal import Arguments, new_file
from tasks import TASKS


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.plots", description="Curves of runs.")
    ap.add_argument("logs", nargs="+", type=Path, help="log.jsonl files")
    ap.add_argument("--out", type=new_file, default="curves.png", help="the picture")
    ap.run(run, argv)


def run(a) -> str:
    """Carry out a parsed command line; returns what to print."""
    plot(a.logs, a.out, {name: task.title for name, task in TASKS.items()})
    return f"curves in {a.out}"


if __name__ == "__main__":
    main()
