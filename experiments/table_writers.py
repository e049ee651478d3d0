"""Tables as people read them: in percent, mean ± interval, the best of each column marked, cut into blocks that fit.

The files for programs, CSV and Parquet, hold the plain numbers instead, with all digits.
"""

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from .store import write_atomic
from .table_text import MISSING, Block, blocks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment

__all__ = ["print_table", "to_csv", "to_latex", "to_markdown", "to_parquet", "write_table"]

_LATEX = str.maketrans(
    {char: f"\\{char}" for char in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}"}
    | {"±": r"$\pm$", "∞": r"$\infty$", MISSING: "--", "ε": r"$\varepsilon$"}
)


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table of `tables` as its ending says: .csv and .parquet (all digits), .md (GitHub) or .tex (booktabs).

    Raises:
        ValueError: another ending, or a folder that cannot be written.
    """
    writers: dict[str, Callable[[pd.DataFrame], str | bytes]] = {
        ".csv": to_csv,
        ".md": to_markdown,
        ".tex": to_latex,
        ".parquet": to_parquet,
    }
    if Path(path).suffix not in writers:
        raise ValueError(f"{path}: expected a table named {', '.join('*' + suffix for suffix in writers)}")
    content = writers[Path(path).suffix](table)
    write_atomic(path, content if isinstance(content, bytes) else content.encode())


def to_csv(table: pd.DataFrame) -> str:
    """Plain numbers with all digits; what is missing or undefined is an empty cell."""
    return table.to_csv(index=False, lineterminator="\n")


def to_parquet(table: pd.DataFrame) -> bytes:
    """Plain numbers with all digits; what is missing or undefined is null."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()


def to_markdown(table: pd.DataFrame) -> str:
    """GitHub tables, one a block, each under a bold title; the best of each column is bold."""
    from tabulate import tabulate

    parts = []
    for block in blocks(table, math.inf):
        rows = [[cell.shown("**{}**").replace("|", "\\|") for cell in row] for row in block.rows]
        text = tabulate(rows, block.headers, "github", disable_numparse=True, colalign=block.align)
        notes = "".join(f"\n{note}\n" for note in block.notes)
        parts.append(f"**{block.title}**\n\n{text}\n{notes}")
    return "\n".join(parts)


def to_latex(table: pd.DataFrame) -> str:
    """One `table` environment a block, the best of each column bold; needs the LaTeX package booktabs."""
    parts = []
    for block in blocks(table, math.inf):
        rows = [[cell.shown(r"\textbf{{{}}}", _latex) for cell in row] for row in block.rows]
        head, *body = (" & ".join(row) + r" \\" for row in [[_latex(header) for header in block.headers], *rows])
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(block.title)}}}",
            rf"\begin{{tabular}}{{{''.join(align[0] for align in block.align)}}}",
            *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
            r"\end{tabular}",
            *(rf"\par{{\footnotesize {_latex(note)}}}" for note in block.notes),
            r"\end{table}",
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def print_table(table: pd.DataFrame, console: "Console | None" = None, *, wide: bool = False) -> None:
    """Show the table in a terminal, in blocks as wide as it; 100 columns or more read well.

    Args:
        wide: also the results that the default leaves to the files, see `blocks`.
    """
    from rich.console import Console
    from rich.segment import Segments

    console = console or Console()
    for block in blocks(table, console.width, wide=wide):
        console.print(Segments(list(_segments(block))), soft_wrap=True)


def _segments(block: Block) -> Iterator["Segment"]:
    """A block as a terminal shows it; a rich Table of thousands of rows would take seconds."""
    from rich.segment import Segment
    from rich.style import Style

    broken = [header.split(" ") for header in block.headers]
    depth = max(map(len, broken))
    heads = zip(*([""] * (depth - len(words)) + words for words in broken), strict=True)
    rows = [[(word, "") for word in head] for head in heads]
    rows += [[(cell.shown(), cell.style) for cell in row] for row in block.rows]
    widths = [max(len(text) for text, _ in column) for column in zip(*rows, strict=True)]
    sides = [">" if align == "right" else "<" for align in block.align]
    yield Segment(f"{block.title}\n\n", Style(bold=True))
    for at, row in enumerate(rows):
        if at == depth:
            yield Segment(f" {'─' * (sum(widths) + 3 * len(widths) - 3)}\n")
        for (text, style), width, side in zip(row, widths, sides, strict=True):
            yield Segment(f" {text:{side}{width}}  ", Style.parse(style) if style else None)
        yield Segment("\n")
    for note in block.notes:
        yield Segment(f" {note}\n", Style(dim=True))
    yield Segment("\n")


def _latex(text: str) -> str:
    return text.translate(_LATEX)
