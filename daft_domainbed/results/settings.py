"""How runs of one algorithm differ in what they were given, and in their networks: what differs is a row of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from daft_domainbed.arguments import MOVABLE, TrainArgs, get_defaults
from daft_domainbed.methods import find_method
from daft_domainbed.results.values import as_dict, as_list, show_name

NOT_GIVEN = "not given"
Setting = tuple[tuple[str, str], ...]  # names and values, ascending

# Which run of its setting it is, where it lies, and what is kept of it: no setting.
_NO_SETTING = {
    *MOVABLE, "dataset", "algorithm", "test_envs", "seed", "trial_seed", "hparams_seed", "data_seed", "hparams",
    "skip_model_save", "save_model_every_checkpoint",
}  # fmt: skip
_NETWORK = ("backbone", "weights", "input_size", "resnet18", "vit", "dinov2")  # ends of names


def read_given(args: Mapping[str, Any], chosen: Mapping[str, Any] | None = None) -> Setting:
    """Return what was given to a run: arguments, and the text of its hyperparameters.

    Args:
        args: Of the run; those that its time did not know have their defaults.
        chosen: What `sweep rerun` chose for its sweep, which counts as a draw does.
    """
    algorithm = str(args.get("algorithm"))
    defaults = get_defaults(TrainArgs)
    given = {name: args.get(name, defaults[name]) for name in defaults if name not in _NO_SETTING}
    given["host"] = args.get("host", "DomainBed's own loop")  # whose records name none
    hparams = _parse(args.get("hparams"))
    own = as_dict(hparams.pop(algorithm, None))
    slots = {slot.prefix for slot in find_method(algorithm).slots}
    if chosen:
        settings = [as_dict(setting) for setting in as_list(chosen.get("settings"))]
        values = [as_dict(one.get("hparams")) for one in settings if one.get("algorithm") == algorithm]
        own = {name: value for name, value in own.items() if not any(one.get(name, own) == value for one in values)}
        given["chosen"] = f"by rerun, {chosen.get('choose')} {_digest(settings)}"
    given |= {f"hparams {name}": _shorten(name, value, slots) for name, value in hparams.items()}
    # What is the student's alone is another setting where there are teachers, which the same name would reach, too.
    given |= {f"hparams {algorithm}.{name}" if slots else f"hparams {name}": value for name, value in own.items()}
    return _freeze(given)


def _digest(settings: list[dict[str, Any]]) -> str:
    """Return what tells apart values that were chosen, whatever the place and the trial that they come from."""
    names = ("dataset", "algorithm", "test_env", "hparams")
    text = json.dumps([[one.get(name) for name in names] for one in settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]


def is_given(setting: Setting, given: Setting) -> bool:
    """Return whether a run's setting begins with what was given, before the networks that followed from it."""
    return setting[: len(given)] == given


def name_row(algorithm: str, setting: str | None) -> str:
    """Return what a row is called: its algorithm, with what tells its rows apart.

    Example:
        >>> name_row("KD", "lr 0.1"), name_row("KD", None)
        ('KD (lr 0.1)', 'KD')
    """
    return f"{algorithm} ({setting})" if setting else algorithm


def read_networks(hparams: Mapping[str, Any], teachers: Mapping[str, Any]) -> Setting:
    """Return what networks a run has: its own, and those of its teachers, as far as they are recorded.

    Args:
        hparams: All of its hyperparameters.
        teachers: What it recorded about its teachers, by slot.
    """
    names = [name for name in hparams if name.endswith(_NETWORK) or name in _NETWORK]
    networks = {name: _shorten(name, hparams[name], set()) for name in names}
    for slot, facts in teachers.items():
        if hparams.get(slot, "auto") != "auto":  # else its own hyperparameters say which network that has
            networks |= {f"{slot} {name}": value for name, value in as_dict(facts.get("network")).items()}
    return _freeze(networks)


def describe_settings(settings: Iterable[Setting]) -> dict[Setting, str | None]:
    """Return in what each setting differs from the others, in words; None where there is one alone.

    Example:
        >>> describe_settings([(("lr", "0.1"), ("steps", "3")), (("lr", "0.1"), ("steps", "5"))])
        {(('lr', '0.1'), ('steps', '3')): 'steps 3', (('lr', '0.1'), ('steps', '5')): 'steps 5'}
    """
    known = list(dict.fromkeys(settings))
    names = list(dict.fromkeys(name for setting in known for name, _ in setting))
    differing = [name for name in names if len({dict(setting).get(name) for setting in known}) > 1]
    # What was given says it already where the networks that follow from it differ, too.
    given = {name.removeprefix("hparams ") for name in differing if name.startswith("hparams ")}
    shown = [name for name in differing if name not in given]
    if len(known) == 1:
        return {known[0]: None}
    texts: dict[Setting, str | None] = {
        setting: ", ".join(f"{name.removeprefix('hparams ')} {dict(setting).get(name, NOT_GIVEN)}" for name in shown)
        for setting in known
    }
    if len({*texts.values()}) < len(known):
        texts = {s: ", ".join(f"{name} {dict(s).get(name, NOT_GIVEN)}" for name in differing) for s in known}
    return texts


def _parse(hparams: Any) -> dict[str, Any]:
    try:
        return dict(as_dict(json.loads(hparams))) if isinstance(hparams, str) else dict(as_dict(hparams))
    except (ValueError, RecursionError):
        return {"text": hparams}


def _shorten(name: str, value: Any, slots: set[str]) -> Any:
    """Return a value without the place of a file: of weights the name, of a teacher only that it was named."""
    if isinstance(value, str) and name in slots and value != "auto":
        return "named"
    if isinstance(value, str) and name.endswith("weights"):
        return PurePath(value).name
    return value


def _freeze(values: Mapping[str, Any]) -> Setting:
    return tuple(
        sorted(
            (show_name(name), value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str))
            for name, value in ((name, NOT_GIVEN if value is None else value) for name, value in values.items())
        )
    )
