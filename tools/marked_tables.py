"""Tables between marks in a page, which the tool that a mark names makes anew."""

from __future__ import annotations

import re
from collections.abc import Callable


def list_tables(text: str, tool: str) -> list[str]:
    """Return the names of a tool's tables in a page; empty for one that has none."""
    return [mark[1] or "" for mark in _compile(tool).finditer(text)]


def fill_tables(text: str, tool: str, make: Callable[[str], str]) -> str:
    """Return a page with a tool's tables made anew.

    Args:
        text: Of the page; a table stands between `<!-- table NAME: python -m tools.TOOL write -->` and
            `<!-- end of table -->`.
        tool: Its module's name.
        make: Returns a table's lines by its name.
    """
    return _compile(tool).sub(lambda mark: f"{mark[0].splitlines()[0]}\n\n{make(mark[1] or '').rstrip()}\n\n", text)


def _compile(tool: str) -> re.Pattern[str]:
    start = rf"<!-- table(?: (\w+))?: python -m tools\.{tool} write -->\n"
    return re.compile(rf"{start}.*?(?=<!-- end of table -->)", re.DOTALL)
