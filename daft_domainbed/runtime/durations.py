"""How a duration is written for people."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """Return a duration in the units that suit it.

    Example:
        >>> format_duration(3725.0), format_duration(75.2), format_duration(4.25)
        ('1 h 02 min', '1 min 15 s', '4.2 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
