"""Tables of texts, ready for print, and how each format writes them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NEEDS_BOOKTABS = r"% Needs \usepackage{booktabs}."

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "–": "--",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


class Grid(NamedTuple):
    """A table of texts: its title, what its numbers are, its columns, its rows; the first column names the rows."""

    title: str
    caption: str
    head: list[str]
    rows: list[list[str]]


def to_text(grids: Iterable[Grid]) -> str:
    """Return aligned columns, a paragraph a table."""
    blocks = []
    for grid in grids:
        widths = [max(map(len, column)) for column in zip(grid.head, *grid.rows, strict=True)]
        lines = (
            "   ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
            for row in (grid.head, *grid.rows)
        )
        blocks.append("\n".join([grid.caption, "", *lines, ""]))
    return "\n".join(blocks)


def to_markdown(grids: Iterable[Grid]) -> str:
    """Return Markdown tables."""
    blocks = []
    for grid in grids:
        rows = [grid.head, ["---"] + ["---:"] * (len(grid.head) - 1)]
        lines = [f"| {' | '.join(map(escape_markdown, row))} |" for row in rows[:1]]
        lines += [f"| {' | '.join(rows[1])} |"]
        lines += [f"| {' | '.join(map(escape_markdown, row))} |" for row in grid.rows]
        blocks.append("\n\n".join([escape_markdown(grid.caption), "\n".join(lines)]))
    return "\n\n".join(blocks) + "\n"


def to_latex(grids: Iterable[Grid]) -> str:
    r"""Return LaTeX tables for \usepackage{booktabs}."""
    blocks = [NEEDS_BOOKTABS]
    for grid in grids:
        rows = [" & ".join(map(_write_latex_cell, row)) + r" \\" for row in (grid.head, *grid.rows)]
        top = [r"\begin{table}", r"\centering", rf"\caption{{{escape_latex(grid.caption)}}}"]
        top += [rf"\begin{{tabular}}{{l{'r' * (len(grid.head) - 1)}}}", r"\toprule", rows[0], r"\midrule"]
        blocks.append("\n".join([*top, *rows[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}"]))
    return "\n\n".join(blocks) + "\n"


def to_csv(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return lines of values with commas between them."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return out.getvalue()


def escape_markdown(text: str) -> str:
    """Return a text in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", text)


def escape_latex(text: str) -> str:
    """Return a text in which nothing is a command."""
    return "".join(_LATEX.get(c, c) for c in text)


def _write_latex_cell(text: str) -> str:
    """Return a cell, the sign of a number as a minus and no hyphen."""
    return re.sub(r"(?<![\w.-])-(?=\d)", "$-$", escape_latex(text))
