"""The two ways a command can end badly, and the nearest-name hint."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class UsageError(Exception):
    """Bad usage or bad input; nothing was lost. The command exits with status 2."""

    exit_status = 2


class RunError(Exception):
    """The work itself failed (a full disk, a non-finite loss, a failed job). The command exits with status 1."""

    exit_status = 1


def suggest(name: str, candidates: Iterable[str]) -> str:
    """Return a hint that names the candidate nearest to a mistyped name, or nothing.

    Example:
        >>> suggest("DATF", ["ERM", "KD", "DAFT"])
        " Did you mean 'DAFT'?"
        >>> suggest("xyz", ["ERM"])
        ''
    """
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""
