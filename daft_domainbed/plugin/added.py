"""Whether what a user adds can be an algorithm: its name, its slots, its hyperparameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.random import RandomState

from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.hparams import Hparam
from daft_domainbed.methods import METHODS, Slot, list_stages, load_class
from daft_domainbed.plugin.defaults import get_hparams, list_host_hparams
from daft_domainbed.plugin.shared_hparams import ENGINE, FOLDER, NETWORK, list_slot_hparams

_N_DRAWS = 20  # of each hyperparameter, to see whether they are legal


def check_slots(name: str, slots: Sequence[object]) -> None:
    """Refuse slots that no teacher can be in.

    Args:
        name: Of the algorithm that has them.
        slots: As the user gave them.

    Raises:
        UsageError: Names the slot.
    """
    for slot in slots:
        if not isinstance(slot, Slot):
            raise UsageError(f"add_algorithm: a slot of {name} is {slot!r}: write it as Slot('ERM', 'teacher')")
        if not slot.prefix.isidentifier():
            raise UsageError(f"add_algorithm: a slot of {name} is called {slot.prefix!r}: a name has letters and _")
        if slot.kind and slot.kind not in METHODS:
            hint = suggest(slot.kind, METHODS)
            raise UsageError(f"add_algorithm: no method {slot.kind!r} makes a model for {name}.{hint}")
        if slot.kind and name in list_stages(slot.kind):
            raise UsageError(f"add_algorithm: {name} would learn from itself: let another method make its models")
        reserved = _list_shared() | list_host_hparams()
        if clashes := sorted(reserved & list_slot_hparams(slot).keys()):
            raise UsageError(
                f"add_algorithm: the slot {slot.prefix!r} of {name} would have a hyperparameter {clashes[0]!r}, which "
                f"is taken: choose another prefix"
            )
    prefixes = [slot.prefix for slot in slots if isinstance(slot, Slot)]
    if twice := [prefix for prefix in prefixes if prefixes.count(prefix) > 1]:
        raise UsageError(f"add_algorithm: {name} has two slots called {twice[0]!r}: give each a prefix of its own")


def check_hparams(
    name: str, mixin: type, own: Mapping[str, object], inherited: Mapping[str, Hparam], slots: Sequence[Slot]
) -> None:
    """Refuse hyperparameters whose name is taken, or whose default or draws are none of their legal values.

    Args:
        name: Of the algorithm that has them.
        mixin: Its class; hyperparameters of a method that it is derived from are its own.
        own: As the user gave them.
        inherited: Those of the method that it is like, which it may give another default.
        slots: Of the algorithm.

    Raises:
        UsageError: Names the hyperparameter and the value.
    """
    others = [method for method in METHODS if METHODS[method].is_ours and method != name]
    parents = [method for method in others if issubclass(mixin, load_class(method))]
    kept = inherited.keys() | {key for method in parents for key in get_hparams(method)}
    taken = {key: f"{method}'s" for method in others for key in get_hparams(method)}
    shared = [_list_shared(), list_host_hparams(), *(list_slot_hparams(slot) for slot in slots)]
    taken |= {key: "taken" for names in shared for key in names}
    for key, hparam in own.items():
        if key in taken and key not in kept:
            raise UsageError(
                f"add_algorithm: the hyperparameter {key!r} of {name} is {taken[key]}: choose another name"
            )
        if not isinstance(hparam, Hparam):
            raise UsageError(
                f"add_algorithm: the hyperparameter {key!r} of {name} is {hparam!r}: write it as "
                f"Hparam({hparam!r}, check, 'what it means')"
            )
        _check_value(name, key, "default", hparam.default, hparam)
        for seed in range(_N_DRAWS if hparam.draw else 0):
            _check_value(name, key, "draw", hparam.draw(RandomState(seed)), hparam)  # type: ignore[misc]


def _list_shared() -> set[str]:
    return NETWORK.keys() | ENGINE.keys() | FOLDER.keys()


def _check_value(name: str, key: str, what: str, value: Any, hparam: Hparam) -> None:
    try:
        shown, hint = json.dumps(value), hparam.check(value)
    except (TypeError, ValueError) as error:
        shown, hint = repr(value), f"of a plain type ({error})"
    if hint:
        raise UsageError(f"add_algorithm: a {what} of {key!r} of {name} is {shown}: it must be {hint}")
