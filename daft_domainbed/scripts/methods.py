"""List the methods, or show one: its source, the models that it learns from, its hyperparameters.

Example:
    daft-domainbed methods
    daft-domainbed methods DAFT
    daft-domainbed methods KD --dataset PACS --format json
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from daft_domainbed.cli import ArgumentParser, run_command
from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.methods import METHODS, PLAIN, list_stages


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `methods`."""
    parser = ArgumentParser(prog="daft-domainbed methods", doc=__doc__)
    parser.add_argument("name", nargs="?", help="a method; all are listed without one")
    parser.add_argument("--dataset", default="EmojiStyles", help="whose defaults are shown; default: EmojiStyles")
    parser.add_argument("--format", choices=["text", "json"], default="text", help="default: text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of the methods, or one method."""
    args = build_parser().parse_args(argv)
    if args.name is not None and args.name not in METHODS:
        raise UsageError(f"no method {args.name!r}.{suggest(args.name, METHODS)} There are {', '.join(METHODS)}")
    names = [args.name] if args.name else list(METHODS)
    described = [describe(name, args.dataset) for name in names]
    if args.format == "json":
        print(json.dumps(described[0] if args.name else described, indent=1))
    elif args.name:
        print(_format_method(described[0], args.dataset))
    else:
        print(_format_list(described))
    return 0


def describe(name: str, dataset: str) -> dict[str, Any]:
    """Return a method's row of the table, with the hyperparameters that are not the host's own.

    Args:
        name: Of the method.
        dataset: On which the defaults depend.

    Raises:
        UsageError: There is no such data set.
    """
    from daft_domainbed.host.contract import describe_dataset, find_host
    from daft_domainbed.methods import ask_for_slots, load_class
    from daft_domainbed.plugin.defaults import get_known_hparams, list_hparams
    from daft_domainbed.plugin.registration import register

    host = find_host()
    register(host)
    method = METHODS[name]
    asked = ask_for_slots(name)
    defaults = get_known_hparams(host, name, describe_dataset(host, dataset, {}), asked)
    hparams = {key: hparam for key, hparam in list_hparams(name, asked).items() if key in defaults}
    return {
        "name": name,
        "source": getattr(load_class(name), "SOURCE", "") if method.is_ours else "the host's own (Vapnik, 1998)",
        "slots": [
            {"prefix": slot.prefix, "kind": slot.kind} | ({"asked_by": slot.asked_by} if slot.asked_by else {})
            for slot in method.slots
        ],
        "hparams": {
            key: {
                "default": defaults[key],
                "draw": hparam.draw.text if hparam.draw else None,
                "meaning": hparam.meaning,
            }
            for key, hparam in hparams.items()
        },
    }


def _format_list(described: Sequence[dict[str, Any]]) -> str:
    rows = [("method", "learns from", "source")]
    for method in described:
        rows.append((method["name"], ", ".join(map(_format_slot, method["slots"])) or "-", method["source"] or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {slots:<{widths[1]}}  {source}" for name, slots, source in rows)


def _format_slot(slot: dict[str, Any]) -> str:
    asked = f" with {slot['asked_by']}" if "asked_by" in slot else ""
    return f"{slot['prefix']}: {slot['kind'] or 'any pretrained network'}{asked}"


def _format_method(method: dict[str, Any], dataset: str) -> str:
    from daft_domainbed.plugin.defaults import get_hparams

    lines = [": ".join(filter(None, [method["name"], method["source"]]))]
    lines += [f"learns from {_format_slot(slot)}" for slot in method["slots"]]
    rows = [("hyperparameter", f"default on {dataset}", "random draw", "meaning")]
    for name, hparam in method["hparams"].items():
        rows.append((name, json.dumps(hparam["default"]), hparam["draw"] or "fixed", hparam["meaning"]))
    lines += _align(rows)
    host = "" if method["name"] == PLAIN else f", and as {PLAIN}"
    lines += [f"Beside these it has the host's own{host}: lr, batch_size, weight_decay ..."]
    for stage in list_stages(method["name"])[1:]:
        if get_hparams(stage).keys() - method["hparams"].keys():
            lines += [f"Its teachers take those of {stage} too, which 'daft-domainbed methods {stage}' lists."]
    return "\n".join(lines)


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose last column is folded to what the terminal has room for."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    indent = sum(widths) + 2 * len(widths)
    room = max(shutil.get_terminal_size((120, 0)).columns - indent, 24)
    lines = []
    for *cells, last in rows:
        start = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
        folded = textwrap.wrap(last, room, break_long_words=False) or [""]
        lines += [(start + folded[0]).rstrip(), *(" " * indent + line for line in folded[1:])]
    return lines


if __name__ == "__main__":
    sys.exit(run_command("methods"))
