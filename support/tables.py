"""Tables in markdown, as programs print them and the docs hold them."""


def markdown_table(head: list[str], rows: list[list]) -> str:
    """A table, without a line break at its end."""
    lines = []
    for cells in [head, ["---"] * len(head), *rows]:
        row = " | ".join(map(str, cells))
        lines.append(f"| {row} |")
    return "\n".join(lines)
