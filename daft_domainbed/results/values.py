"""What a value that somebody else's JSON holds can be taken for."""

from __future__ import annotations

from typing import Any, TypeGuard


def as_dict(value: object) -> dict[str, Any]:
    """Return a dict as it is and anything else as an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    """Return a list as it is and anything else as an empty one."""
    return value if isinstance(value, list) else []


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e308 < value < 1e308


def is_printable(value: object) -> TypeGuard[str]:
    """Whether a value is a name that a table can show: without control characters and lone surrogates."""
    return isinstance(value, str) and value != "" and value.isprintable()
