"""Tables in markdown, as the studies print them and the docs hold them."""


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
