"""Tables in markdown, as the studies print them and the docs hold them."""


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    lines = []
    for cells in [head, ["---"] * len(head), *rows]:
        row = " | ".join(cells)
        lines.append(f"| {row} |")
    return lines
