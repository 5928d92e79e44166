"""Which hyperparameters an algorithm has on a data set, with their defaults and random draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from daft_domainbed.embedded import hparams_registry
from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.host.contract import DatasetFacts, Host
from daft_domainbed.hparams import Hparam, check_names, check_values, split_hparams
from daft_domainbed.methods import METHODS, PLAIN, ask_for_slots, find_method, list_ours, list_slots, load_class
from daft_domainbed.models.weights import to_plain
from daft_domainbed.plugin.registry import REGISTRY, Pairs
from daft_domainbed.plugin.shared_hparams import ENGINE, FOLDER, NETWORK, list_slot_hparams

_HOST_SIDES = (28, 32)  # for which DomainBed has small networks
_SMALL_STUDENT, _SMALL_TEACHER, _RANKER = "resnet8_w8", "resnet8_w32", "ranker_w32"
_SMALL_DATASET = "Debug28"  # stands in for "DomainBed's small images", a list that upstream keeps to itself


def list_hparams(algorithm: str, user: Mapping[str, Any] | None = None) -> dict[str, Hparam]:
    """Return all hyperparameters of an algorithm that are not the host's, as for a folder of images.

    Args:
        algorithm: Any.
        user: What the user gave; what describes a slot that is asked for exists where it is.
    """
    method = find_method(algorithm)
    hparams = (NETWORK if method.has_own_architecture else {}) | ENGINE | FOLDER
    for slot in list_slots(algorithm, user):
        passed = list_hparams(slot.kind) if slot.kind and slot.passes else {}
        passed = {name: hparam for name, hparam in passed.items() if name.startswith(slot.passes)}
        if slot.asked_by:
            passed = {name: replace(hparam, is_optional=True) for name, hparam in passed.items() if name not in hparams}
        hparams = hparams | list_slot_hparams(slot) | passed
    return hparams | get_hparams(algorithm)


def get_hparams(algorithm: str) -> dict[str, Hparam]:
    """Return the hyperparameters that a method's own file, or its user, defines."""
    method = find_method(algorithm)
    if method.hparams is not None:
        return dict(method.hparams)
    return dict(load_class(algorithm).HPARAMS) if method.is_ours else {}


def resolve_auto(algorithm: str, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyperparameters with every "auto" replaced by the value that the method gives it.

    Raises:
        UsageError: They do not go together.
    """
    resolve = getattr(load_class(algorithm), "resolve", None) if find_method(algorithm).is_ours else None
    return {**hparams, **(resolve(hparams) if resolve else {})}


def list_host_hparams() -> set[str]:
    """Return the names of the hyperparameters that DomainBed gives to each of its algorithms."""
    registration = REGISTRY.hosts.get("embedded")
    own = registration.own_hparams if registration else hparams_registry._hparams
    return set(own(PLAIN, _SMALL_DATASET, 0))


def list_owners(name: str) -> list[str]:
    """Return our methods that have a hyperparameter, where not all of them have, and what else it takes.

    Example:
        >>> list_owners("natural_steps"), list_owners("kd_match")
        (['PIAT with piat_static'], ['KD'])
    """
    owners = []
    for algorithm in sorted(list_ours()) if name not in NETWORK | ENGINE | FOLDER else ():
        if name in list_hparams(algorithm):
            owners.append(algorithm)
        else:
            asking = ask_for_slots(algorithm)
            owners += [f"{algorithm} with {key}" for key in asking if name in list_hparams(algorithm, {key: True})]
    return owners


def get_default_hparams(host: Host, algorithm: str, dataset: DatasetFacts) -> dict[str, Any]:
    """Return all hyperparameters of an algorithm on a data set, as plain types, before the user's are applied."""
    return {name: default for name, (default, _) in list_plain_pairs(host, algorithm, dataset, 0).items()}


def get_known_hparams(
    host: Host, algorithm: str, dataset: DatasetFacts, user: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the default of each hyperparameter that may be given, of those too that stand nowhere unless they are.

    Args:
        host: Registered.
        algorithm: Any of the host's, or of ours.
        dataset: On which it is trained.
        user: What is given; some hyperparameters exist where another one asks for what they describe.
    """
    ours = _list_for(algorithm, dataset, user)
    optional = {name: hparam.default for name, hparam in ours.items() if hparam.is_optional}
    return get_default_hparams(host, algorithm, dataset) | optional


def get_random_hparams(host: Host, algorithm: str, dataset: DatasetFacts, seed: int) -> dict[str, Any]:
    """Return one random draw of an algorithm's hyperparameters, as plain types."""
    return {name: drawn for name, (_, drawn) in list_plain_pairs(host, algorithm, dataset, seed).items()}


# A sweep asks the same for every held-out domain, and each answer seeds a dozen generators.
@lru_cache(maxsize=10_000)
def list_plain_pairs(host: Host, algorithm: str, dataset: DatasetFacts, random_seed: int) -> Pairs:
    """Return what `build_pairs` does, of plain types."""
    pairs = build_pairs(host, algorithm, dataset, random_seed)
    return {name: (to_plain(default), to_plain(drawn)) for name, (default, drawn) in pairs.items()}


def build_pairs(host: Host, algorithm: str, dataset: DatasetFacts, random_seed: int) -> Pairs:
    """Return the (default, random draw) of each hyperparameter, the host's own as its registry gives them.

    Args:
        host: Registered.
        algorithm: Any of the host's, or of ours.
        dataset: On which it is trained.
        random_seed: From which each name draws, with a generator of its own.
    """

    def start(name: str) -> np.random.RandomState:
        return np.random.RandomState(host.misc.seed_hash(random_seed, name))

    name = _SMALL_DATASET if dataset.is_small else dataset.name
    pairs = dict(REGISTRY.hosts[host.name].own_hparams(algorithm, name, random_seed))
    ours = {name: hparam for name, hparam in _list_for(algorithm, dataset).items() if not hparam.is_optional}
    own = get_hparams(algorithm)  # what a method says of its networks counts on every data set
    defaults = {name: hparam.default for name, hparam in ours.items()}
    defaults |= {name: value for name, value in _adapt_defaults(algorithm, dataset).items() if name not in own}
    for name, hparam in ours.items():
        pairs[name] = (defaults[name], hparam.draw(start(name)) if hparam.draw else defaults[name])
    for name, default, draw in dataset.hparams:
        if name in pairs and name not in own:
            pairs[name] = (default, draw(start(name)) if draw else default)
    return pairs


def _list_for(algorithm: str, dataset: DatasetFacts, user: Mapping[str, Any] | None = None) -> dict[str, Hparam]:
    ours = list_hparams(algorithm, user)
    return {name: hparam for name, hparam in ours.items() if dataset.is_folder or name not in FOLDER}


def _adapt_defaults(algorithm: str, dataset: DatasetFacts) -> dict[str, Any]:
    """Return the defaults that depend on the images."""
    method, side = find_method(algorithm), dataset.side
    adapted: dict[str, Any] = {}
    if method.has_own_architecture:
        adapted["pixels"] = dataset.pixels
        if dataset.is_folder and dataset.is_small:
            adapted["backbone"] = _SMALL_STUDENT
    if dataset.has_texts or side in _HOST_SIDES or (dataset.is_folder and dataset.is_small):
        network = _RANKER if dataset.has_texts else _SMALL_TEACHER
        adapted |= {f"{slot.prefix}_backbone": network for slot in method.slots}
    return adapted


def check_input(algorithms: Iterable[str], dataset: DatasetFacts) -> None:
    """Refuse methods of ours that are made for images, on lists of texts.

    Raises:
        UsageError: Names the method, and those that take texts.
    """
    takers = [name for name, method in METHODS.items() if method.takes_texts]
    for name in algorithms:
        if dataset.has_texts and find_method(name).file and name not in takers:
            raise UsageError(f"{name} takes images, and {dataset.name} has texts: choose {', '.join(takers)}")


def had_first_network(dataset: str, user: Mapping[str, Any]) -> bool:
    """Return whether a student had the host's own network by default before it was to be the smaller one.

    Args:
        dataset: As given to `--dataset`; it is not looked at.
        user: What the user gave.
    """
    is_folder = dataset.startswith("folder:") and user.get("input_size") in _HOST_SIDES
    return "backbone" not in user and (is_folder or dataset == "ColoredDigits")


def refuse_engine_hparams(user: Mapping[str, Any]) -> None:
    """Refuse what upstream's own loop would take in silence.

    Raises:
        UsageError: Names the hyperparameter.
    """
    if owners := [name for name, value in user.items() if isinstance(value, dict)]:
        raise UsageError(f"--hparams has values for {owners[0]} alone, which DomainBed's own loop does not know")
    if names := sorted(ENGINE.keys() & set(user)):
        raise UsageError(
            f"hyperparameter {names[0]} is of this package's loop, not of DomainBed's own: leave it out, or train with "
            f"'daft-domainbed train --host upstream'"
        )


def check_own_hparams(
    host: Host, user: Mapping[str, Any], algorithms: Iterable[str], dataset: DatasetFacts, *, where: str
) -> None:
    """Refuse values for one algorithm alone that it does not have, or that are for an algorithm that is not there.

    Args:
        host: Registered.
        user: What was given in `--hparams`.
        algorithms: Those that may have values of their own.
        dataset: On which they are trained.
        where: The algorithms are, for the message.

    Raises:
        UsageError: Names the algorithm or the hyperparameter.
    """
    algorithms = list(algorithms)
    for name in [name for name, value in user.items() if isinstance(value, dict)]:
        if name not in algorithms:
            raise UsageError(
                f"--hparams has values for {name!r}, and there is no such algorithm {where}.{suggest(name, algorithms)}"
            )
        _, own = split_hparams(user, name)
        if of_data := sorted(own.keys() & FOLDER.keys()):
            raise UsageError(f"hyperparameter {of_data[0]} is the data set's: give it beside {name!r}, not in it")
        check_user_hparams(host, own, [name], dataset, asked=[name])


def check_user_hparams(
    host: Host, user: Mapping[str, Any], algorithms: Iterable[str], dataset: DatasetFacts, *, asked: Iterable[str]
) -> None:
    """Refuse names that no algorithm of a run or sweep knows, and impossible values.

    Args:
        host: Registered.
        user: What was given in `--hparams`.
        algorithms: Those that may take them, teachers' included.
        dataset: On which they are trained.
        asked: The algorithms that the user named, for the message.

    Raises:
        UsageError: Names the hyperparameter, and the nearest or what it must be.
    """
    defaults = {name: get_known_hparams(host, name, dataset, user) for name in algorithms}
    check_names(user, {key for known in defaults.values() for key in known}, asked, list_owners)
    for name, known in defaults.items():
        check_values(user, known, list_hparams(name, user))
