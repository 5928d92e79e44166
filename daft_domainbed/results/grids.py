"""Tables of texts, ready for print, and how each format writes them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NEEDS_PACKAGES = r"% Needs \usepackage{array,booktabs,graphicx}."

_MAY_BREAK = "\N{ZERO WIDTH SPACE}"
_LATEX = {
    _MAY_BREAK: r"\allowbreak{}",
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
    """Return LaTeX tables."""
    return "\n\n".join([NEEDS_PACKAGES, *(_write_latex_grid(grid, "r") for grid in grids)]) + "\n"


def to_wrapped_latex(grids: Iterable[Grid]) -> str:
    """Return LaTeX tables with rows for columns, whose cells break lines: of a few rows with a text in each cell."""
    turned = (Grid(grid.title, grid.caption, *_turn(grid)) for grid in grids)
    column = r">{\raggedright\arraybackslash}p{2.4cm}"
    return "\n\n".join([NEEDS_PACKAGES, *(_write_latex_grid(grid, column) for grid in turned)]) + "\n"


def _turn(grid: Grid) -> tuple[list[str], list[list[str]]]:
    head, *rows = ([_let_break(text) for text in column] for column in zip(grid.head, *grid.rows, strict=True))
    return head, rows


def _write_latex_grid(grid: Grid, column: str) -> str:
    head, *rows = (" & ".join(map(_write_latex_cell, row)) + r" \\" for row in (grid.head, *grid.rows))
    return write_latex_table(write_latex_text(grid.caption), f"l{column * (len(grid.head) - 1)}", head, rows)


def write_latex_table(caption: str, columns: str, head: str, rows: Iterable[str], below: Iterable[str] = ()) -> str:
    """Return a table of lines of LaTeX, made smaller where it is wider than the text, and what stands below it."""
    return "\n".join(
        [
            *(r"\begin{table}", r"\centering", rf"\caption{{{caption}}}"),
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            *(rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule"),
            *(r"\end{tabular}}", *below, r"\end{table}"),
        ]
    )


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


def write_latex_text(text: str) -> str:
    """Return a text in which nothing is a command, and in which lines may break inside names, paths and JSON."""
    return escape_latex(_let_break(text))


def _let_break(text: str) -> str:
    return re.sub(r"""(?<=[_/,])(?=[a-zA-Z"])""", _MAY_BREAK, text)


def _write_latex_cell(text: str) -> str:
    """Return a cell, the sign of a number as a minus and no hyphen."""
    return re.sub(r"(?<![\w.-])-(?=\d)", "$-$", escape_latex(text))
