"""One page about one adaptation, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from daft_domainbed.adaptation.record import name_stream
from daft_domainbed.evaluation.card import make_table
from daft_domainbed.evaluation.journal import Journal


def format_card(record: Mapping[str, Any], settings: Mapping[str, Any], journal: Journal) -> str:
    """Return the card of an adaptation: a row a method, and what the figures rest on."""
    counts = sorted({row["n_trials"] for row in record["rows"]})
    orders = (
        "one order" if counts == [1] else f"{' to '.join(map(str, counts))} orders, with the standard error over them"
    )
    strong = f"{settings['n_strong']} of {record['strong_ood']}" if settings["n_strong"] else "none"
    rows = []
    for row in record["rows"]:
        seconds = fmean(journal.seconds[name_stream(row["method"], trial)] for trial in range(row["n_trials"]))
        numbers = [_format(row, kind) for kind in ("acc_s", "acc_n", "acc_h")]
        rows.append([row["method"], *numbers, row["n_trials"], f"{seconds:.1f}"])
    found = [
        (row["method"], journal.findings[name_stream(row["method"], trial)]["notice"])
        for row in record["rows"]
        for trial in range(row["n_trials"])
    ]
    notices = [f"- {method}: {notice}." for method, notice in dict.fromkeys(found) if notice]
    lines = [
        f"# {record['checkpoint']} on a stream of environment {record['test_env']}",
        "",
        f"{settings['n_weak']} images of the held-out domain, outside images: {strong}. Batches of "
        f"{record['batch_size']}, {orders}. Source statistics are of training domains' in-splits, by "
        f"{settings['source_labels']} labels.",
        "",
        *make_table(["method", "ACC_S", "ACC_N", "ACC_H", "orders", "seconds a stream"], rows),
        "In percent. ACC_S: images of known classes that are answered rightly, a rejected one counting as wrong; "
        "ACC_N: outside images that are rejected; ACC_H: their harmonic mean.",
        "",
    ]
    return "\n".join(lines + ([*notices, ""] if notices else []))


def _format(row: Mapping[str, Any], kind: str) -> str:
    if row[kind] is None:
        return "-"
    stderr = row["stderr"] and row["stderr"][kind]
    return f"{row[kind]:.1f}" + ("" if stderr is None else f" ± {stderr:.1f}")
