"""Teachers, by the name that algorithms of users import them from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from daft_domainbed.teachers.facts import take_teacher
from daft_domainbed.teachers.teacher import Teacher

__all__ = ["Teacher", "load_teacher", "take_teacher"]


def load_teacher(algorithm: str, hparams: Mapping[str, Any]) -> Teacher:
    """Return the teacher of the slot `teacher`; what `take_teacher()` was called when it also trained it.

    Args:
        algorithm: Without effect: the row of the run's algorithm says which teacher it is.
        hparams: Without effect.
    """
    return take_teacher()
