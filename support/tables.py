"""Tables in markdown, as the studies print them and the docs hold them, and results as JSON."""

import json
from pathlib import Path

from support.disk import write_atomic


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A table, without a line break at its end."""
    lines = []
    for cells in [head, ["---"] * len(head), *rows]:
        row = " | ".join(cells)
        lines.append(f"| {row} |")
    return "\n".join(lines)


def write_json(path: Path, result: dict) -> None:
    write_atomic(path, json.dumps(result, indent=1).encode())
