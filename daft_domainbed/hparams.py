"""The grammar of a hyperparameter: its default, its legal values, its random draw, its meaning; and `--hparams`."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from numpy.random import RandomState

from daft_domainbed.errors import UsageError, suggest

Check = Callable[[Any], str | None]  # returns what the value should have been, or None where it is fine


@dataclass(frozen=True)
class Draw:
    """A random draw, and how a table shows it."""

    text: str
    make: Callable[[RandomState], Any]

    def __call__(self, random: RandomState) -> Any:
        """Return a value that the generator decides on."""
        return self.make(random)


@dataclass(frozen=True)
class Hparam:
    """A hyperparameter.

    Attributes:
        default: A plain type.
        check: Its legal values.
        meaning: A phrase for the tables.
        draw: Its random draw; None keeps the default.
        is_optional: Whether it stands in a run's hyperparameters only where it was given. So is each that came after
            its method did: records, names of folders and of teachers stay what they were.
    """

    default: Any
    check: Check
    meaning: str
    draw: Draw | None = None
    is_optional: bool = False


# --- legal values ----------------------------------------------------------------------------------------------------


def one_of(*choices: Any) -> Check:
    """Accept these values alone."""
    return lambda value: None if value in choices else "one of " + ", ".join(json.dumps(c) for c in choices)


def number(low: float, high: float = sys.float_info.max, *, open_low: bool = False, integer: bool = False) -> Check:
    """Accept numbers of a range; with `open_low` its lower end is none of them."""
    kind = "an integer" if integer else "a number"
    bounds = f"{'above' if open_low else 'of at least'} {low:g}" + (f" and at most {high:g}" if high < 1e300 else "")

    def check(value: Any) -> str | None:
        is_number = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
        fits = is_number and low <= value <= high and not (open_low and value == low)
        return None if fits else f"{kind} {bounds}"

    return check


def or_word(word: str, check: Check) -> Check:
    """Accept a word beside what another check accepts."""
    return lambda value: None if value == word else (hint := check(value)) and f'"{word}" or {hint}'


def or_auto(check: Check) -> Check:
    """Accept "auto" beside what another check accepts."""
    return or_word("auto", check)


def one_or_more(check: Check) -> Check:
    """Accept what another check accepts, or a list of such values."""

    def check_all(value: Any) -> str | None:
        hints = [check(item) for item in value] if isinstance(value, list) and value else [check(value)]
        return next((f"{hint}, or a list of such" for hint in hints if hint), None)

    return check_all


def is_text(value: Any) -> str | None:
    """Accept any text but the empty one."""
    return None if isinstance(value, str) and value else "a text"


def is_bool(value: Any) -> str | None:
    """Accept true and false."""
    return None if isinstance(value, bool) else "true or false"


def is_frozen(value: Any) -> str | None:
    """Accept true, false, and "stages:N" for a stem and the first N stages."""
    is_prefix = isinstance(value, str) and re.fullmatch(r"stages:[1-9]\d?", value)
    return None if isinstance(value, bool) or is_prefix else 'true, false or a prefix such as "stages:3"'


def is_eps(value: Any) -> str | None:
    """Accept what `parse_eps` reads as a radius."""
    hint = 'a radius of at least 0: a number, a fraction such as "4/255", "auto" or "auto*1/2"'
    try:
        radius = parse_eps(value, auto=1.0) if isinstance(value, str | int | float) else -1.0
    except (ValueError, ZeroDivisionError, OverflowError):
        return hint
    return None if 0 <= radius < float("inf") and not isinstance(value, bool) else hint


def parse_eps(value: str | float, auto: float) -> float:
    """Turn a radius into a number: a number, a fraction such as "4/255", "auto", or "auto*1/2".

    Example:
        >>> parse_eps("auto*1/2", auto=0.5)
        0.25
        >>> parse_eps("8/255", auto=0.5) == 8 / 255
        True
    """
    if not isinstance(value, str):
        return float(value)
    name, star, factor = value.partition("*")
    if name.strip() == "auto":
        return auto * float(Fraction(factor.strip())) if star else auto
    return float(Fraction(value.strip()))


# --- random draws ----------------------------------------------------------------------------------------------------


def pick(*choices: Any) -> Draw:
    """Draw one of these values.

    Raises:
        UsageError: There are none.
    """
    if not choices:
        raise UsageError("pick() draws nothing: give the values to draw from")
    text = "{" + ", ".join(f"{c:g}" if isinstance(c, float) else str(c) for c in choices) + "}"
    return Draw(text, lambda random: choices[random.randint(len(choices))])


def uniform(low: float, high: float) -> Draw:
    """Draw a number uniformly from [low, high).

    Raises:
        UsageError: There is no such range.
    """
    if not -math.inf < low <= high < math.inf:
        raise UsageError(f"uniform({low:g}, {high:g}) draws nothing: give two finite numbers, the lower one first")
    return Draw(f"U[{low:g}, {high:g}]", lambda random: float(random.uniform(low, high)))


def log_uniform(low: float, high: float) -> Draw:
    """Draw a number whose logarithm is uniform.

    Raises:
        UsageError: There is no such range.
    """
    if not 0 < low <= high < math.inf:
        raise UsageError(f"log_uniform({low:g}, {high:g}) draws nothing: give two numbers above 0, the lower one first")
    return Draw(
        f"exp U[log {low:g}, log {high:g}]",
        lambda random: float(math.exp(random.uniform(math.log(low), math.log(high)))),
    )


# --- the user's own --------------------------------------------------------------------------------------------------

# What the host's own hyperparameters may be, beyond having the type of their default.
_HOST_CHECKS: dict[str, Check] = {
    "lr": number(0, open_low=True),
    "batch_size": number(1, integer=True),
    "weight_decay": number(0),
    "resnet_dropout": number(0, 1),
    "vit_dropout": number(0, 1),
}


def parse_json(text: str | None) -> dict[str, Any]:
    """Parse `--hparams`.

    Raises:
        UsageError: It is not a JSON object, or has a key twice.
    """
    if not text:
        return {}
    try:
        value = json.loads(text, object_pairs_hook=_take_pairs)
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"--hparams {text!r} is not JSON ({error}): write it as "
            f"""'{{"batch_size": 16, "backbone": "resnet18"}}'"""
        ) from error
    if not isinstance(value, dict):
        raise UsageError(
            f"--hparams {text!r} is a JSON {type(value).__name__}, not an object: write '{{\"name\": value}}'"
        )
    return value


def split_hparams(user: Mapping[str, Any], algorithm: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `--hparams` says to a run and its teachers alike, and what it says to the run of an algorithm alone.

    Example:
        >>> split_hparams({"batch_size": 16, "KD": {"lr": 0.01}, "ERM": {"lr": 0.1}}, "KD")
        ({'batch_size': 16}, {'lr': 0.01})
    """
    shared = {name: value for name, value in user.items() if not isinstance(value, dict)}
    own = user.get(algorithm)
    return shared, dict(own) if isinstance(own, dict) else {}


def _take_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            values = " and ".join(json.dumps(value) for key, value in pairs if key == name)
            raise UsageError(f"--hparams has {name!r} {names.count(name)} times ({values}): give it once")
    return dict(pairs)


def check_names(
    user: Iterable[str], known: Iterable[str], algorithms: Iterable[str], list_owners: Callable[[str], list[str]]
) -> None:
    """Refuse a hyperparameter that none of the algorithms of a run knows.

    Args:
        user: The names that were given.
        known: Those that exist here.
        algorithms: Of the run, for the message.
        list_owners: Returns the methods that a name belongs to.

    Raises:
        UsageError: Names the method that it belongs to, or the nearest name.
    """
    known = set(known)
    for name in user:
        if name not in known:
            owners = list_owners(name)
            hint = f" It belongs to {' and '.join(owners)}" if owners else suggest(name, known)
            raise UsageError(f"no hyperparameter {name!r} of {', '.join(algorithms)}.{hint}")


def check_values(user: Mapping[str, Any], defaults: Mapping[str, Any], ours: Mapping[str, Hparam]) -> None:
    """Refuse values of a wrong type or out of range.

    Args:
        user: Names and values to check; those that `defaults` does not hold are left alone.
        defaults: All hyperparameters of an algorithm with their defaults.
        ours: Those of them that are not the host's.

    Raises:
        UsageError: Names the value and what it should have been.
    """
    for name, value in user.items():
        if name not in defaults:
            continue
        if name in ours:
            hint = ours[name].check(value)
        else:
            hint = _check_type(value, defaults[name]) or (_HOST_CHECKS[name](value) if name in _HOST_CHECKS else None)
        if hint:
            raise UsageError(f"hyperparameter {name} is {json.dumps(value)}: it must be {hint}")


def _check_type(value: Any, default: Any) -> str | None:
    kinds: list[tuple[type, type | tuple[type, ...], str]] = [
        (bool, bool, "true or false"),
        (int, int, "an integer"),
        (float, (int, float), "a number"),
        (str, str, "a text"),
    ]
    for kind, accepted, hint in kinds:
        if isinstance(default, kind):
            is_boolean = isinstance(value, bool)
            fits = isinstance(value, accepted) and (kind is bool or not is_boolean) and value == value
            return None if fits else hint
    return None
