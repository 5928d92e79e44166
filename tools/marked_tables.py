"""Tables between marks in a page, which the tool that a mark names makes anew."""

from __future__ import annotations

import re
from collections.abc import Callable


def fill_tables(text: str, tool: str, make: Callable[[str], str]) -> str:
    """Return a page with a tool's tables made anew.

    Args:
        text: Of the page; a table stands between `<!-- table NAME: python -m tools.TOOL write -->` and
            `<!-- end of table -->`.
        tool: Its module's name.
        make: Returns a table's lines by its name, which is empty where the mark has none.
    """
    start = rf"(<!-- table(?: (\w+))?: python -m tools\.{tool} write -->\n)"
    marks = re.compile(rf"{start}.*?(?=<!-- end of table -->)", re.DOTALL)
    return marks.sub(lambda mark: f"{mark[1]}\n{make(mark[2] or '').rstrip()}\n\n", text)
