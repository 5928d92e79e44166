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


def is_name(value: object) -> TypeGuard[str]:
    """Whether a value is a name."""
    return isinstance(value, str) and value != ""


def show_name(name: str) -> str:
    r"""Return a name as tables show it: control characters, and bytes of file names that are no text, are spelt out.

    Example:
        >>> show_name("café")
        'café'
        >>> print(show_name("caf\udce9 au\nlait"))
        caf\xe9 au\nlait
    """
    return "".join(c if c.isprintable() else _spell_out(c) for c in name)


def _spell_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(character)[1:-1]
