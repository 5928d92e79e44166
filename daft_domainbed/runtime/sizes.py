"""How large networks are, in words: parameters, and multiply-adds for one image, as runs record them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def read_size(facts: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return parameters and multiply-adds, from a first record or what it says of a teacher; None where unknown."""
    size = found if isinstance(found := facts.get("size"), dict) else {}
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


def compare_sizes(algorithm: str, student: Mapping[str, int], teacher: Mapping[str, int]) -> str:
    """Return a warning where a student is not smaller than its teacher; nothing where it is, or where nobody knows.

    Example:
        >>> compare_sizes("KD", {"parameters": 690_000}, {"parameters": 310_000})
        'the student of KD is not the smaller one: 0.69 M parameters, its teacher 0.31 M (hyperparameter backbone)'
        >>> compare_sizes("KD", {"parameters": 20_000}, {"parameters": 310_000})
        ''
    """
    own, other = student.get("parameters"), teacher.get("parameters")
    if not own or not other or own < other:
        return ""
    return (
        f"the student of {algorithm} is not the smaller one: {_in_millions(own)} parameters, its teacher "
        f"{_in_millions(other)} (hyperparameter backbone)"
    )
