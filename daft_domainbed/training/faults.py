"""What the author of an algorithm is told where it does not keep to the contract of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from daft_domainbed.errors import UsageError
from daft_domainbed.methods import find_method


@contextmanager
def explain_missing_hparams(algorithm: str, hparams: Mapping[str, Any]) -> Iterator[None]:
    """Say what to do where an algorithm of the user's asks for a hyperparameter that nobody defined.

    Raises:
        UsageError: Names it.
    """
    try:
        yield
    except KeyError as error:
        name = error.args[0] if error.args else None
        if find_method(algorithm).mixin is None or not isinstance(name, str) or name in hparams:
            raise
        raise UsageError(
            f"{algorithm} finds no {name!r}: if it is a hyperparameter, define it in its HPARAMS"
        ) from error


def check_update(algorithm: str, values: object) -> None:
    """Refuse what `update` returns where a record cannot be made of it.

    Raises:
        UsageError: It is no mapping with a loss.

    Example:
        >>> check_update("Mine", {"loss": 0.5})
        >>> check_update("Mine", None)
        Traceback (most recent call last):
        daft_domainbed.errors.UsageError: update of Mine returns None: let it return a dict of floats, the loss first
    """
    if not isinstance(values, Mapping) or not values:
        raise UsageError(f"update of {algorithm} returns {values!r}: let it return a dict of floats, the loss first")
