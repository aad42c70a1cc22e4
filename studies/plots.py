"""Curves of one or several runs, from their logs.

    python -m studies.plots out/log.jsonl out/control/log.jsonl
"""

from pathlib import Path

from support.plots import plot
from support.terminal import Arguments, new_file, one_line
from tasks import TASKS


def main(argv: list[str] | None = None) -> None:
    ap = Arguments(prog="studies.plots", description="Curves of runs.")
    ap.add_argument("logs", nargs="+", type=Path, help="log.jsonl files")
    ap.add_argument("--out", type=new_file, default="curves.png", help="the picture")
    a = ap.parse_args(argv)
    with one_line("studies.plots"):
        plot(a.logs, a.out, {name: task.title for name, task in TASKS.items()})
        print(f"curves in {a.out}")


if __name__ == "__main__":
    main()
