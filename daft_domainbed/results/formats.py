"""Tables as text, Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from daft_domainbed.results.cells import Number, Row, Table, get_run
from daft_domainbed.results.grids import (
    NEEDS_PACKAGES,
    escape_latex,
    escape_markdown,
    to_csv,
    write_latex_table,
    write_latex_text,
)
from daft_domainbed.results.missing import Missing
from daft_domainbed.results.tables import Results, average_datasets, read_hparams
from daft_domainbed.results.typesetting import Layout, lay_out, say_not_asked

WIDTH = 100  # of text, in columns


def to_json(results: Results) -> dict[str, Any]:
    """Return the tables as plain data (schema 1): accuracies in percent, null where nothing can be said."""
    return {
        "schema": 1,
        "tables": [
            {
                "dataset": table.dataset,
                "selection": table.selection,
                "environments": table.environments,
                "kind": table.kind,
                "held_out": list(table.held_out),
                "rows": [_row_to_json(row) for row in table.rows],
                **_average_to_json(table),
            }
            for table in results.tables
        ],
        "missing": [_missing_to_json(missing) for missing in results.sweep.missing],
    }


def _missing_to_json(missing: Missing) -> dict[str, Any]:
    planned, key = missing.planned, missing.planned.key
    teacher = f"teacher {PurePosixPath(planned.folder).name}: " if planned.is_teacher else ""
    return {
        "dataset": key.dataset,
        "algorithm": key.algorithm,
        "test_envs": list(key.test_envs),
        "trial_seed": key.trial_seed,
        "hparams_seed": key.hparams_seed,
        "reason": teacher + missing.reason,
    }


def _average_to_json(table: Table) -> dict[str, Any]:
    """Return means over sources, of single sources only: they stand in no row."""
    rows = [
        {
            **row.describe(),
            "cells": [{"env": cell.env, "mean": cell.mean, "n": len(cell.values)} for cell in row.cells],
            "average": row.average,
        }
        for row in table.average_sources()
    ]
    return {"target_average": rows} if rows else {}


def _row_to_json(row: Row) -> dict[str, Any]:
    cells = [
        {
            "env": cell.env,
            "mean": cell.mean,
            "stderr": cell.stderr,
            "n": len(cell.values),
            "chosen": [_number_to_json(number) for number in cell.numbers],
        }
        for cell in row.cells
    ]
    return {
        **row.describe(),
        "cells": cells,
        "average": row.average,
        "average_stderr": row.average_stderr,
    }


def _number_to_json(number: Number) -> dict[str, Any]:
    run = get_run(number)
    return {
        "trial_seed": number.choice.run.key.trial_seed,
        "hparams_seed": number.choice.run.key.hparams_seed,
        "step": number.teacher.last_step if number.teacher else number.choice.step,
        "hparams": read_hparams(run) if run else None,
    }


def _summarise_missing(results: Results) -> list[str]:
    plan = results.sweep.plan
    if not plan or not results.sweep.missing:
        return []
    return [f"Not done, so counted nowhere: {len(results.sweep.missing)} of {len(plan.runs)} planned jobs."]


def format_text(results: Results) -> str:
    """Return aligned columns for a terminal."""
    blocks, not_asked = [], []
    has_best, sizes = False, ""
    printed: tuple[str, list[str]] | None = None
    for table in [*results.tables, *average_datasets(results)]:
        if not table.is_asked:
            not_asked.append(say_not_asked(table))
            continue
        layout = lay_out(table)
        has_best |= any(entry.is_best for line in layout.lines for entry in line.entries)
        blocks.append("\n".join([layout.title, *textwrap.wrap(layout.caption, WIDTH), "", *_align(layout)]))
        if layout.sizes and layout.sizes != sizes:
            sizes = layout.sizes
            blocks.append(textwrap.fill(f"Networks: {sizes}.", WIDTH, subsequent_indent="  "))
        if printed == (table.dataset, layout.footnotes):
            blocks.append("Footnotes as above.")
        elif layout.footnotes:
            numbered = [f"[{i}] {note}" for i, note in enumerate(layout.footnotes, 1)]
            blocks.append("\n".join(textwrap.fill(note, WIDTH, subsequent_indent="    ") for note in numbered))
            printed = (table.dataset, layout.footnotes)
    notes = ["* best student of its column"] if has_best else []
    notes += _summarise_missing(results) + not_asked
    blocks.append("\n".join(line for note in notes for line in textwrap.wrap(note, WIDTH, subsequent_indent="  ")))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _align(layout: Layout) -> list[str]:
    headers = [*layout.table.environments, "average"]
    columns = list(zip(*(line.entries for line in layout.lines), strict=True))
    texts: list[list[str]] = [[] for _ in layout.lines]
    widths = []
    for header, column in zip(headers, columns, strict=True):
        mean_width = max(len(value) for value, _, _, _ in column)
        for text, (value, error, best, number) in zip(texts, column, strict=True):
            body = f"{value:>{mean_width}} {error}".rstrip()
            text.append(body + ("*" if best else "") + (f" [{number}]" if number else ""))
        widths.append(max(len(header), *(len(text[-1]) for text in texts)))
    first = max(len(line.row.name + line.row.origin) for line in layout.lines)
    rows = [_join_columns("", first, headers, widths)]
    rule = "-" * (first + sum(widths) + 3 * len(widths))
    role = "student"
    for line, text in zip(layout.lines, texts, strict=True):
        if line.row.role != role:
            role = line.row.role
            rows += [rule, "teachers"]
        rows.append(_join_columns(line.row.name + line.row.origin, first, text, widths))
    return rows


def _join_columns(label: str, first: int, texts: list[str], widths: list[int]) -> str:
    padded = (f"{text:{width}}" for text, width in zip(texts, widths, strict=True))
    return "   ".join([f"{label:{first}}", *padded]).rstrip()


def format_markdown(results: Results) -> str:
    """Return tables in Markdown, the best student bold."""
    blocks, not_asked = [], []
    for table in [*results.tables, *average_datasets(results)]:
        if not table.is_asked:
            not_asked.append(escape_markdown(say_not_asked(table)))
            continue
        layout = lay_out(table)
        headers = ["", *map(escape_markdown, table.environments), "average"]
        rows = [headers, ["---"] + ["---:"] * (len(headers) - 1)]
        for line in layout.lines:
            cells = []
            for value, error, best, number in line.entries:
                text = f"{value} {error}".strip()
                cells.append((f"**{text}**" if best else text) + (f" <sup>{number}</sup>" if number else ""))
            rows.append([escape_markdown(line.row.label), *cells])
        lines = [f"| {' | '.join(row)} |" for row in rows]
        footnotes = [f"{i}. {escape_markdown(note)}" for i, note in enumerate(layout.footnotes, 1)]
        title, caption = escape_markdown(layout.title), escape_markdown(layout.caption)
        sizes = f"Networks: {escape_markdown(layout.sizes)}." if layout.sizes else ""
        blocks += [f"### {title}", caption, "\n".join(lines), "\n".join(footnotes), sizes]
    return "\n\n".join(block for block in [*blocks, *_summarise_missing(results), *not_asked] if block) + "\n"


def format_latex(results: Results) -> str:
    """Return LaTeX tables, the best student bold."""
    blocks = [NEEDS_PACKAGES]
    not_asked = []
    for table in [*results.tables, *average_datasets(results)]:
        if not table.is_asked:
            not_asked.append("% " + say_not_asked(table))
            continue
        layout = lay_out(table)
        columns = "c" * (len(table.environments) + 1)
        headers = " & ".join(["Algorithm", *map(escape_latex, table.environments), "Average"])
        rows = []
        for i, line in enumerate(layout.lines):
            if i and line.row.role != layout.lines[i - 1].row.role:
                rows.append(r"\midrule")
            cells = [escape_latex(line.row.label)]
            for value, error, best, number in line.entries:
                text = escape_latex(f"{value} {error}".strip())
                cells.append((rf"\textbf{{{text}}}" if best else text) + (rf"$^{{{number}}}$" if number else ""))
            rows.append(" & ".join(cells) + r" \\")
        caption = write_latex_text(table.caption or f"{layout.title}. {layout.caption}")
        footnotes = [
            rf"\par\footnotesize $^{{{i}}}$ {write_latex_text(note)}" for i, note in enumerate(layout.footnotes, 1)
        ]
        footnotes += [rf"\par\footnotesize Networks: {write_latex_text(layout.sizes)}."] if layout.sizes else []
        blocks.append(write_latex_table(caption, f"l{columns}", headers + r" \\", rows, footnotes))
    return "\n\n".join([*blocks, *("% " + line for line in _summarise_missing(results)), *not_asked]) + "\n"


def format_csv(results: Results) -> str:
    """Return a line a cell, the average of a row as environment "average"; `missing` says what a cell lacks."""
    rows: list[list[object]] = []
    for table in results.tables:
        for row in table.rows if table.is_asked else ():
            start = [table.dataset, table.selection, row.role, row.algorithm]
            end = [row.setting, row.source, "; ".join(row.origins)]
            for cell in row.asked:
                rows.append([*start, cell.env, cell.mean, cell.stderr, len(cell.values), cell.gap, *end])
            n = None if row.average_stderr is None else len(row.list_trials())
            rows.append([*start, "average", row.average, row.average_stderr, n, None, *end])
    head = ["dataset", "selection", "role", "algorithm", "env", "mean", "stderr", "n", "missing"]
    return to_csv([*head, "setting", "source", "origins"], rows)


def format_json(results: Results) -> str:
    """Return schema 1 as indented JSON."""
    return json.dumps(to_json(results), indent=2) + "\n"


FORMATS: dict[str, Callable[[Results], str]] = {
    "text": format_text,
    "markdown": format_markdown,
    "latex": format_latex,
    "csv": format_csv,
    "json": format_json,
}
