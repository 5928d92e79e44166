"""What is printed of a table, whatever the format: title, caption, numbers and footnotes."""

from __future__ import annotations

from typing import NamedTuple

from daft_domainbed.results.selection import SELECTION_WORDS
from daft_domainbed.results.tables import Row, Table
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
    numbers = {gap: str(i) for i, gap in enumerate(footnotes, 1)}
    best = table.find_best()
    lines = [Line(row, _write_entries(row, best, numbers)) for row in table.rows]
    words = SELECTION_WORDS[table.selection]
    over = "the in-split of the held-out domain" if table.dataset != "Averages" else "held-out domains, averaged"
    spread = f"mean ± standard error, n = {table.n_trials} trials" if table.n_trials > 1 else "one trial"
    caption = f"Accuracy in percent on {over}, {spread}. Chosen: {words.rule}."
    return Layout(
        table,
        f"{table.name}: {words.name}",
        table.caption or caption,
        lines,
        list(footnotes.values()),
        _list_sizes(table),
    )


def _list_sizes(table: Table) -> str:
    """Return how large students and their teachers are, those of one size together, as far as it was recorded."""
    found: dict[str, dict[str, None]] = {}
    for row in (row for row in table.rows if row.role == "student"):
        for run in (number.choice.run for cell in row.cells for number in cell.numbers):
            lots = {row.algorithm: run.first} | {
                f"{facts.get('algorithm')} teacher": facts for facts in run.teachers.values()
            }
            for label, facts in lots.items():
                if size := format_size(*read_size(facts)):
                    found.setdefault(size, {})[label] = None
    return "; ".join(f"{', '.join(labels)}: {size}" for size, labels in found.items())


def _write_footnotes(table: Table) -> dict[str, str]:
    """Write a footnote for each gap, in the order of the cells that have it."""
    places: dict[str, dict[str, list[str]]] = {}
    for row in table.rows:
        for cell in row.cells:
            if cell.gap:
                fewer = f" (n = {len(cell.values)})" if 0 < len(cell.values) < table.n_trials else ""
                places.setdefault(cell.gap, {}).setdefault(row.label, []).append(cell.env + fewer)
    return {
        gap: "; ".join(f"{label} on {', '.join(envs)}" for label, envs in where.items()) + f": {gap}."
        for gap, where in places.items()
    }


def _write_entries(row: Row, best: list[float | None], numbers: dict[str, str]) -> list[Entry]:
    triples = [(cell.mean, cell.stderr, numbers.get(cell.gap, "")) for cell in row.cells]
    triples.append((row.average, row.average_stderr, ""))
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
        f"{table.name}: {SELECTION_WORDS[table.selection].name} needs runs with every pair of domains held out; "
        "this sweep holds out single domains only, so there is no such table."
    )
