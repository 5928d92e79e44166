"""How large networks are: parameters, and multiply-adds for one image, as runs recorded them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from daft_domainbed.results.values import as_dict


def read_size(facts: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return parameters and multiply-adds, from a first record or what it says of a teacher; None where unknown."""
    size = as_dict(facts.get("size"))
    values = (size.get(name) for name in ("parameters", "multiply_adds"))
    parameters, multiply_adds = (value if type(value) is int and value > 0 else None for value in values)
    return parameters, multiply_adds


def format_size(parameters: int | None, multiply_adds: int | None) -> str:
    """Return a network's size in words; nothing where it is not known.

    Example:
        >>> format_size(19_560, 1_430_000)
        '0.020 M parameters, 1.4 M multiply-adds'
    """
    parts = [f"{_in_millions(parameters)} parameters"] if parameters else []
    return ", ".join(parts + ([f"{_in_millions(multiply_adds)} multiply-adds"] if multiply_adds else []))


def _in_millions(count: int) -> str:
    millions = count / 1e6
    return f"{millions:.3f} M" if millions < 0.1 else f"{millions:.2f} M" if millions < 1 else f"{millions:,.1f} M"
