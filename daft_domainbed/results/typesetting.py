"""What is printed of a table, whatever the format: title, caption, numbers and footnotes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from daft_domainbed.results.asked import SINGLE_SOURCE
from daft_domainbed.results.cells import Cell, Row, Table
from daft_domainbed.results.selection import SELECTION_WORDS
from daft_domainbed.runtime.sizes import format_size, read_size

NOTHING = "–"


class Entry(NamedTuple):
    """One number ready for print: mean, ± standard error, whether it is the best student's, number of its footnote."""

    value: str
    error: str
    is_best: bool
    footnote: str


class Line(NamedTuple):
    """A row ready for print: an entry for each held-out domain, then the average."""

    row: Row
    entries: list[Entry]


class Layout(NamedTuple):
    """A table ready for print: title, caption, lines, numbered footnotes, sizes of networks, all as plain text."""

    table: Table
    title: str
    caption: str
    lines: list[Line]
    footnotes: list[str]
    sizes: str


def lay_out(table: Table) -> Layout:
    """Write a table's numbers and number its footnotes."""
    footnotes = _write_footnotes(table)
    numbers = {remark: str(i) for i, remark in enumerate(footnotes, 1)}
    best = {row.source: table.find_best(row.source) for row in table.rows}
    means = [replace(row, source=_EVERY_OTHER) for row in table.average_sources()]
    lines = []
    for role in ("student", "teacher"):
        lines += [Line(row, _write_entries(row, best[row.source], numbers)) for row in table.rows if row.role == role]
        unmarked = [None] * (len(table.environments) + 1)
        lines += [Line(row, _write_entries(row, unmarked, numbers)) for row in means if row.role == role]
    words = SELECTION_WORDS[table.selection]
    caption = table.caption or f"{_say_what(table)} Chosen: {words.rule}."
    title = f"{table.name}: {words.name}"
    return Layout(table, title, caption, lines, list(footnotes.values()), _list_sizes(table))


_EVERY_OTHER = "every other domain, averaged"


def _say_what(table: Table) -> str:
    """Return what the numbers of a table are."""
    over = "the in-split of the held-out domain" if table.dataset != "Averages" else "held-out domains, averaged"
    spread = f"mean ± standard error, n = {table.n_trials} trials" if table.n_trials > 1 else "one trial"
    what = f"Accuracy in percent on {over}, {spread}."
    if table.kind == SINGLE_SOURCE:
        return f"{what} Trained on one domain alone, tested on every other."
    if table.dataset != "Averages" and {*table.held_out} != {*table.environments}:
        return f"{what} Average: over {', '.join(table.held_out)}, the domains held out."
    return what


def _list_remarks(cell: Cell) -> list[str]:
    together = [f"held out together with {cell.with_others}"] if cell.with_others and cell.values else []
    return ([cell.gap] if cell.gap else []) + together


def _list_row_remarks(row: Row) -> list[str]:
    """Return what is to be said of a whole row."""
    return [f"rests on {text}" for text in row.origins] + _list_commits(row)


def _list_commits(row: Row) -> list[str]:
    return [f"runs of several commits ({', '.join(c[:8] for c in row.commits)})"] if len(row.commits) > 1 else []


def _list_sizes(table: Table) -> str:
    """Return how large students and their teachers are, those of one size together, as far as it was recorded."""
    found: dict[str, dict[str, None]] = {}
    for row in (row for row in table.rows if row.role == "student"):
        for run in (number.choice.run for cell in row.cells for number in cell.numbers):
            lots = {row.name: run.first} | {
                f"{facts.get('algorithm')} teacher": facts for facts in run.teachers.values()
            }
            for label, facts in lots.items():
                if size := format_size(*read_size(facts)):
                    found.setdefault(size, {})[label] = None
    return "; ".join(f"{', '.join(labels)}: {size}" for size, labels in found.items())


def _write_footnotes(table: Table) -> dict[str, str]:
    """Write a footnote for each remark, in the order of the cells that have it; what is of a whole row comes last."""
    places: dict[str, dict[str, list[str]]] = {}
    for row in table.rows:
        for cell in row.cells:
            for remark in _list_remarks(cell):
                is_fewer = remark == cell.gap and 0 < len(cell.values) < table.n_trials
                fewer = f" (n = {len(cell.values)})" if is_fewer else ""
                places.setdefault(remark, {}).setdefault(row.label, []).append(cell.env + fewer)
    footnotes = {
        remark: "; ".join(f"{label} on {', '.join(envs)}" for label, envs in where.items()) + f": {remark}."
        for remark, where in places.items()
    }
    for row in table.rows:
        for remark in _list_row_remarks(row):
            labels = [other.label for other in table.rows if remark in _list_row_remarks(other)]
            footnotes.setdefault(remark, f"{', '.join(labels)}: {remark}.")
    return footnotes


def _write_entries(row: Row, best: Sequence[float | None], numbers: dict[str, str]) -> list[Entry]:
    def cite(remarks: list[str]) -> str:
        return ", ".join(numbers[remark] for remark in remarks)

    triples = [(cell.mean, cell.stderr, cite(_list_remarks(cell))) for cell in row.cells]
    triples.append((row.average, row.average_stderr, cite(_list_row_remarks(row))))
    return [
        Entry(
            NOTHING if value is None else f"{value:.1f}",
            "" if error is None else f"± {error:.1f}",
            row.role == "student" and value is not None and value == top,
            footnote,
        )
        for (value, error, footnote), top in zip(triples, best, strict=True)
    ]


def say_not_asked(table: Table) -> str:
    """Return why a selection that the sweep never asked for has no table."""
    return (
        f"{table.name}: {SELECTION_WORDS[table.selection].name} needs runs with every pair of domains held out, "
        "too; these were not asked for, so there is no such table."
    )
