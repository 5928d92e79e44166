"""Standard streams that a command can rely on: open, and never at a loss for a character."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def mend_streams() -> None:
    """Put the null device in the place of standard streams that are closed, and have every character printed somehow.

    A supervisor may start a process without them: the next file that is opened would take their place, and whatever a
    library prints would go into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(number)
                continue  # somebody has it by now
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", errors="replace"))
    for stream in (sys.stdout, sys.stderr):
        is_lossless = (stream.encoding or "").lower() == "utf-8" and stream.errors == "surrogateescape"
        if not is_lossless and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
