"""The tables of the documentation that follow from the code, written into their pages.

Example:
    python -m tools.pages write
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from daft_domainbed.host.contract import Host, describe_dataset, find_host
from daft_domainbed.hparams import Hparam
from daft_domainbed.methods import METHODS, ask_for_slots
from daft_domainbed.plugin.defaults import get_known_hparams, list_hparams
from daft_domainbed.plugin.registration import register
from tools.marked_tables import fill_tables

PAGE = Path(__file__).parents[1] / "docs" / "hyperparameters.md"
SMALL, LARGE = "EmojiStyles", "PACS"  # whose defaults the table shows: 32 and 224 pixels


def make_table(host: Host) -> str:
    """Return a Markdown table of all hyperparameters that are not the host's own.

    Args:
        host: Registered.
    """
    hparams: dict[str, Hparam] = {}
    owners: dict[str, dict[str, str]] = {}  # the methods by name, each with what has to be set beside it
    asking = [(method, "") for method in METHODS] + [(m, key) for m in METHODS for key in ask_for_slots(m)]
    for method, key in asking:
        for name, hparam in list_hparams(method, {key: True}).items():
            hparams.setdefault(name, hparam)
            owners.setdefault(name, {}).setdefault(method, key)
    rows = [("name", "of", "default", "random draw", "meaning"), ("---",) * 5]
    for name, hparam in sorted(hparams.items(), key=lambda item: -len(owners[item[0]])):  # the most common first
        default = _show_default(name, hparam, next(iter(owners[name])), host)
        draw = f"`{hparam.draw.text}`" if hparam.draw else "fixed"
        rows.append((f"`{name}`", _show_owners(owners[name]), default, draw, hparam.meaning))
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |\n" for row in rows)


def _show_owners(owners: Mapping[str, str]) -> str:
    others = [method for method in METHODS if method not in owners]
    if len(others) >= len(owners):
        ordered = [method for method in METHODS if method in owners]
        return " ".join(f"{method} ({owners[method]})" if owners[method] else method for method in ordered)
    return f"all but {' '.join(others)}" if others else "all"


def _show_default(name: str, hparam: Hparam, method: str, host: Host) -> str:
    """Return a default; two where it depends on the images."""
    small, large = (
        _show(get_known_hparams(host, method, describe_dataset(host, dataset, {})).get(name, hparam.default))
        for dataset in (SMALL, LARGE)
    )
    return small if small == large else f"{SMALL}: {small}, {LARGE}: {large}"


def _show(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) else json.dumps(value)


def fill_page(text: str) -> str:
    """Return the page of hyperparameters with its table made anew."""
    host = find_host()
    register(host)
    return fill_tables(text, "pages", lambda _: make_table(host))


def main(argv: Sequence[str] | None = None) -> int:
    """Write all tables anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["write"])
    parser.parse_args(argv)
    PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
