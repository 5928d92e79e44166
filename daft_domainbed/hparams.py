"""Our hyperparameters in one table: name, default, random draw, meaning; and what a user's value may be."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from daft_domainbed.errors import UsageError, suggest

DISTILLING = frozenset({"KD", "DAFT"})
TEACHER_KINDS = {"AFT": "ERM", "KD": "ERM", "DAFT": "AFT"}  # whose teacher, made by which algorithm
_SMALL_SIDES = (28, 32)
_LARGEST_SMALL_FOLDER = 64

Check = Callable[[Any], str | None]  # returns what the value should have been, or None where it is fine


@dataclass(frozen=True)
class Hparam:
    """One hyperparameter: the algorithms it belongs to, its default, its random draw and its legal values."""

    algorithms: frozenset[str] | None  # None: every algorithm that builds its network through the host's featurizer
    default: Any
    check: Check
    draw: Callable[[np.random.RandomState], Any] | None = None  # None: fixed


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


def _one_of(*choices: Any) -> Check:
    return lambda value: None if value in choices else "one of " + ", ".join(json.dumps(c) for c in choices)


def _number(low: float, high: float = sys.float_info.max, *, open_low: bool = False, integer: bool = False) -> Check:
    kind = "an integer" if integer else "a number"
    bounds = f"{'above' if open_low else 'of at least'} {low:g}" + (f" and at most {high:g}" if high < 1e300 else "")

    def check(value: Any) -> str | None:
        is_number = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
        fits = is_number and low <= value <= high and not (open_low and value == low)
        return None if fits else f"{kind} {bounds}"

    return check


def _or_auto(check: Check) -> Check:
    return lambda value: None if value == "auto" else (hint := check(value)) and f'"auto" or {hint}'


def _is_text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "a text"


def _is_bool(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _is_eps(value: Any) -> str | None:
    hint = 'a radius of at least 0: a number, a fraction such as "4/255", "auto" or "auto*1/2"'
    try:
        radius = parse_eps(value, auto=1.0) if isinstance(value, str | int | float) else -1.0
    except (ValueError, ZeroDivisionError, OverflowError):
        return hint
    return None if 0 <= radius < float("inf") and not isinstance(value, bool) else hint


def _pick(*choices: Any) -> Callable[[np.random.RandomState], Any]:
    return lambda random: choices[random.randint(len(choices))]


_TAUGHT = frozenset(TEACHER_KINDS)
_AFT = frozenset({"AFT", "DAFT"})

TABLE: dict[str, Hparam] = {
    "backbone": Hparam(None, "default", _is_text),
    "weights": Hparam(None, "pretrained", _is_text),
    "backbone_frozen": Hparam(None, False, _is_bool),
    "backbone_input_size": Hparam(None, "auto", _or_auto(_number(8, integer=True))),
    "pixels": Hparam(None, "imagenet", _one_of("imagenet", "unit", "none")),
    "teacher": Hparam(_TAUGHT, "auto", _is_text),
    "teacher_backbone": Hparam(_TAUGHT, "resnet50", _is_text),
    "teacher_weights": Hparam(_TAUGHT, "pretrained", _is_text),
    "teacher_frozen": Hparam(_TAUGHT, False, _is_bool),
    "teacher_input_size": Hparam(_TAUGHT, "auto", _or_auto(_number(8, integer=True))),
    "teacher_steps": Hparam(_TAUGHT, "auto", _or_auto(_number(1, integer=True))),
    "kd_weight": Hparam(DISTILLING, 0.9, _number(0, 1), lambda random: float(random.uniform(0.5, 1.0))),
    "kd_temperature": Hparam(DISTILLING, 4.0, _number(0, open_low=True), _pick(1.0, 2.0, 4.0, 5.0, 10.0)),
    "aft_scope": Hparam(_AFT, "head", _one_of("head", "all")),
    "aft_attack": Hparam(_AFT, "pixels", _one_of("pixels", "features")),
    "aft_norm": Hparam(_AFT, "auto", _one_of("auto", "linf", "l2")),
    "aft_eps": Hparam(_AFT, "auto", _is_eps, _pick(0.0, "auto*1/4", "auto*1/2", "auto", "auto*2")),
    "aft_attack_steps": Hparam(_AFT, "auto", _or_auto(_number(0, integer=True))),
    "aft_weight": Hparam(_AFT, 1.0, _number(0, 1), _pick(0.5, 1.0)),
    "aft_target_mix": Hparam(_AFT, 0.5, _number(0, 1), _pick(0.0, 0.5, 1.0)),
    "aft_target_temperature": Hparam(_AFT, 1.0, _number(0, open_low=True)),
    "aft_steps": Hparam(frozenset({"DAFT"}), "auto", _or_auto(_number(1, integer=True))),
    "sma_start": Hparam(frozenset({"SMA"}), 100, _number(0, integer=True)),
    "input_size": Hparam(None, 224, _number(8, integer=True)),
}

# What the host's own hyperparameters may be, beyond having the type of their default.
_HOST_CHECKS: dict[str, Check] = {
    "lr": _number(0, open_low=True),
    "batch_size": _number(1, integer=True),
    "weight_decay": _number(0),
    "resnet_dropout": _number(0, 1),
    "vit_dropout": _number(0, 1),
}


def build_hparams(
    algorithm: str,
    dataset: str,
    input_shape: tuple[int, ...] | None,
    pixels: str,
    draw_random: Callable[[str], np.random.RandomState],
) -> dict[str, tuple[Any, Any]]:
    """Return our (default, random draw) pairs for an algorithm on a data set.

    Args:
        algorithm: Name of any of the host's algorithms, or one of ours.
        dataset: Name, as given to `--dataset`.
        input_shape: (C, H, W) of the data set, or None where only the instance knows it.
        pixels: How the data set normalises its images, one of INPUT_SPECS.
        draw_random: Maps a hyperparameter's name to its random state, as the host seeds it.
    """
    side = input_shape[-1] if input_shape is not None else None
    is_small = side in _SMALL_SIDES or (dataset.startswith("folder:") and side is not None and is_small_folder(side))
    defaults = {name: hparam.default for name, hparam in TABLE.items() if _belongs(name, algorithm, dataset)}
    if "pixels" in defaults:
        defaults["pixels"] = pixels
    is_odd = is_small and side not in _SMALL_SIDES  # a size for which the host has no featurizer
    if (dataset.startswith("EmojiStyles") or is_odd) and "backbone" in defaults:
        defaults["backbone"] = "resnet8_w8"
    if is_small and "teacher_backbone" in defaults:
        defaults["teacher_backbone"] = "resnet8_w32"
    pairs = {}
    for name, default in defaults.items():
        draw = TABLE[name].draw
        pairs[name] = (default, draw(draw_random(name)) if draw else default)
    return pairs


def add_algorithm(name: str, like: str) -> None:
    """Give an algorithm the hyperparameters and the kind of teacher that another one has."""
    _like[name] = like
    if like in TEACHER_KINDS:
        TEACHER_KINDS[name] = TEACHER_KINDS[like]


_like: dict[str, str] = {}


def is_small_folder(side: int) -> bool:
    """Return whether a `folder:` data set of this side in pixels gets DomainBed's small-image defaults."""
    return side <= _LARGEST_SMALL_FOLDER


def _belongs(name: str, algorithm: str, dataset: str) -> bool:
    if name == "input_size":
        return dataset.startswith("folder:")
    algorithms = TABLE[name].algorithms
    algorithm = _like.get(algorithm, algorithm)
    # An adversarially fine-tuned model has its teacher's architecture, so AFT has no backbone of its own to choose.
    return algorithm != "AFT" if algorithms is None else algorithm in algorithms


def parse_json(text: str | None) -> dict[str, Any]:
    """Parse `--hparams`.

    Raises:
        UsageError: It is not a JSON object.
    """
    if not text:
        return {}
    try:
        value = json.loads(text)
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


def check_names(user: Iterable[str], known: Iterable[str], algorithms: Iterable[str]) -> None:
    """Refuse a hyperparameter that none of the algorithms of a run knows.

    Raises:
        UsageError: Names the nearest one.
    """
    known = set(known)
    for name in user:
        if name not in known:
            owners = sorted(TABLE[name].algorithms or ()) if name in TABLE else []
            hint = f" It belongs to {' and '.join(owners)}" if owners else suggest(name, known)
            raise UsageError(f"no hyperparameter {name!r} of {', '.join(algorithms)}.{hint}")


def check_values(user: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse values of a wrong type or out of range.

    Args:
        user: Names and values to check; those that `defaults` does not hold are left alone.
        defaults: All hyperparameters of an algorithm with their defaults.

    Raises:
        UsageError: Names the value and what it should have been.
    """
    for name, value in user.items():
        if name not in defaults:
            continue
        if name in TABLE:
            hint = TABLE[name].check(value)
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
            is_bool = isinstance(value, bool)
            fits = isinstance(value, accepted) and (kind is bool or not is_bool) and value == value
            return None if fits else hint
    return None
