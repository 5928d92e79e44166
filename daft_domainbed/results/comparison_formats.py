"""Comparisons as text, Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from daft_domainbed.results.comparison import FEWEST_TRIALS, Comparison
from daft_domainbed.results.grids import Grid, to_csv, to_latex, to_markdown
from daft_domainbed.results.selection import SELECTION_WORDS
from daft_domainbed.results.statistics import MOST_EXACT, N_FLIPS
from daft_domainbed.results.typesetting import NOTHING


def list_families(comparisons: Sequence[Comparison]) -> Iterator[list[Comparison]]:
    """Yield the comparisons of each data set."""
    for dataset in dict.fromkeys(entry.dataset for entry in comparisons):
        yield [entry for entry in comparisons if entry.dataset == dataset]


def format_comparisons(comparisons: Sequence[Comparison]) -> str:
    """Return comparisons as text, a paragraph a data set."""
    lines: list[str] = []
    for family in list_families(comparisons):
        lines += [_write_title(family), *(f"  {_format(entry)}" for entry in family)]
        lines += [f"  {note}" for note in _list_notes(family)] + [""]
    return "\n".join(lines)


def _write_title(family: Sequence[Comparison]) -> str:
    words = SELECTION_WORDS[family[0].selection]
    return f"{family[0].dataset}: {words.name}, gains in points, paired by trial"


def _list_notes(family: Sequence[Comparison]) -> list[str]:
    """Return what p-values and intervals are."""
    notes = []
    if n_tested := sum(entry.p is not None for entry in family):
        corrected = f", Holm's correction over {n_tested} comparisons" if n_tested > 1 else ""
        is_exact = all(entry.n <= MOST_EXACT for entry in family)
        flips = "exact sign flips" if is_exact else f"{N_FLIPS:,} random sign flips"
        notes.append(f"p: two-sided, {flips}{corrected}")
    if any(entry.interval for entry in family):
        notes.append("95 % interval: bootstrap over trials, 10,000 draws")
    return notes + list(dict.fromkeys(origin for entry in family for origin in entry.origins))


def _format(entry: Comparison) -> str:
    name = f"{entry.first} - {entry.second}"
    if entry.gain is None:
        return f"{name}: no trial in which both have every held-out domain"
    by_env = ", ".join(f"{env} {gain:+.1f}" for env, gain in entry.gains.items() if gain is not None)
    if entry.p is None or entry.p_adjusted is None:
        return f"{name}: {entry.gain:+.1f}, one trial, which says nothing of its spread ({by_env})"
    few = f", too few for an interval ({FEWEST_TRIALS} or more)"
    interval = f" [{entry.interval[0]:+.1f}, {entry.interval[1]:+.1f}]" if entry.interval else ""
    adjusted = f", corrected {_format_p(entry.p_adjusted)}" if entry.p_adjusted != entry.p else ""
    return (
        f"{name}: {entry.gain:+.1f}{interval}, p {_format_p(entry.p)}{adjusted}, n = {entry.n} trials"
        f"{'' if entry.interval else few} ({by_env})"
    )


def _format_p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.0005 else f"{p:.1e}"


def lay_out_comparisons(comparisons: Sequence[Comparison]) -> list[Grid]:
    """Return a table a data set: gain, interval, p-values, n, and the gain on each held-out domain."""
    grids = []
    for family in list_families(comparisons):
        envs = list(family[0].gains)
        head = ["", "gain", "95 % interval", "p", "p, corrected", "n", *envs]
        few = f"no interval below {FEWEST_TRIALS} trials"
        notes = [*_list_notes(family), *([few] if any(entry.interval is None for entry in family) else [])]
        caption = f"{_write_title(family)}. {'; '.join(notes)}."
        grids.append(Grid(family[0].dataset, caption, head, [_list_cells(entry) for entry in family]))
    return grids


def _list_cells(entry: Comparison) -> list[str]:
    interval = NOTHING if entry.interval is None else f"[{entry.interval[0]:+.1f}, {entry.interval[1]:+.1f}]"
    p_values = (NOTHING if p is None else _format_p(p) for p in (entry.p, entry.p_adjusted))
    gains = (NOTHING if gain is None else f"{round(gain, 1) + 0:+.1f}" for gain in (entry.gain, *entry.gains.values()))
    gain, *by_env = gains
    return [f"{entry.first} - {entry.second}", gain, interval, *p_values, str(entry.n), *by_env]


def _to_csv(comparisons: Sequence[Comparison]) -> str:
    """Return a line a comparison and held-out domain, the average as environment "average", which has the test."""
    rows: list[list[object]] = []
    for entry in comparisons:
        start = [entry.dataset, entry.selection, entry.first, entry.second]
        low, high = entry.interval or (None, None)
        origins = "; ".join(entry.origins)
        rows.append([*start, "average", entry.gain, low, high, entry.p, entry.p_adjusted, entry.n, origins])
        rows += [[*start, env, gain, None, None, None, None, entry.n, origins] for env, gain in entry.gains.items()]
    head = ["dataset", "selection", "first", "second", "env", "gain", "low", "high", "p", "p_adjusted", "n", "origins"]
    return to_csv(head, rows)


FORMATS: dict[str, Callable[[Sequence[Comparison]], str]] = {
    "text": format_comparisons,
    "markdown": lambda comparisons: to_markdown(lay_out_comparisons(comparisons)),
    "latex": lambda comparisons: to_latex(lay_out_comparisons(comparisons)),
    "csv": _to_csv,
    "json": lambda comparisons: json.dumps([asdict(entry) for entry in comparisons], indent=1) + "\n",
}
