"""How our methods, hyperparameters, backbones and data sets, and the user's own algorithms, get into a host."""

from __future__ import annotations

import functools
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from daft_domainbed.embedded import datasets
from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.host.contract import Host, describe_dataset
from daft_domainbed.hparams import Hparam
from daft_domainbed.methods import METHODS, PLAIN, Method, Slot, list_ours, load_class
from daft_domainbed.models.backbones import build_backbones, freeze_part
from daft_domainbed.models.frozen import fix_statistics
from daft_domainbed.models.ranker import build_head
from daft_domainbed.plugin.added import check_hparams, check_slots
from daft_domainbed.plugin.defaults import build_pairs, get_hparams, list_plain_pairs
from daft_domainbed.plugin.patching import without_pretrained_weights
from daft_domainbed.plugin.registry import REGISTRY, Pairs, Registration

OUR_DATASETS = ("EmojiStyles", "EmojiStylesUnseen", "ColoredDigits", "DocRanking")
_SOURCE = "daft_domainbed_source"  # what a script is called that is run for what it adds


def register(host: Host) -> None:
    """Add everything of ours to a host; doing so twice is harmless, and `unregister` takes it all back."""
    if host.name in REGISTRY.hosts:
        return
    registration = Registration(host, host.hparams_registry._hparams)
    REGISTRY.hosts[host.name] = registration
    for name in list_ours():
        _add_algorithm_to(registration, name)
    if host.name != "embedded":
        _add_datasets(registration)
    registration.patches.set(host.hparams_registry, "_hparams", _extend_hparams(host))
    registration.patches.set(host.networks, "Featurizer", _extend_featurizer(host))
    registration.patches.set(host.networks, "Classifier", functools.partial(build_head, host.networks.Classifier))


def unregister(host: Host) -> None:
    """Leave a host as it was before `register`; with the last host the user's own algorithms are forgotten."""
    if registration := REGISTRY.hosts.pop(host.name, None):
        registration.patches.take_back()
    list_plain_pairs.cache_clear()
    if not REGISTRY.hosts:
        for name in REGISTRY.added:
            del METHODS[name]
        REGISTRY.added.clear()
        REGISTRY.sources.clear()
        REGISTRY.user_hparams = {}
        import_source.cache_clear()


def add_algorithm(
    name: str,
    mixin: type,
    *,
    like: str = "ERM",
    hparams: Mapping[str, Hparam] | None = None,
    slots: Sequence[Slot] | None = None,
    is_plain: bool = False,
) -> None:
    """Add an algorithm of your own, a mixin over the host's ERM, to every host.

    Args:
        name: As given to `--algorithm`.
        mixin: Its `__init__` and `update` are an Algorithm's.
        like: The method whose hyperparameters and slots it has where none are given.
        hparams: Its own, by name; they begin with what they belong to.
        slots: The models that it learns from, each of which `take_teacher(prefix)` returns.
        is_plain: Whether its weights are those of plain ERM, with nothing of its own.

    Raises:
        UsageError: The name, a slot's or a hyperparameter's is taken, or there is no method `like` it.
    """
    if like not in METHODS:
        raise UsageError(f"add_algorithm: no method {like!r} to be like.{suggest(like, METHODS)}")
    if slots is not None and like != PLAIN:
        raise UsageError(f"add_algorithm: {name} has slots and is like {like}, which has its own: give one of the two")
    _check_name(name, mixin)
    inherited = get_hparams(like)
    own: Mapping[str, Hparam] = getattr(mixin, "HPARAMS", {}) if hparams is None else hparams
    slots = METHODS[like].slots if slots is None else tuple(slots)
    check_slots(name, slots)
    check_hparams(name, mixin, own, inherited, slots)
    METHODS[name] = Method(slots=tuple(slots), is_plain=is_plain, mixin=mixin, hparams={**inherited, **own})
    if name not in REGISTRY.added:
        REGISTRY.added.append(name)
    list_plain_pairs.cache_clear()
    if (source := _find_source(mixin.__module__)) and source not in REGISTRY.sources:
        REGISTRY.sources.append(source)
    for registration in REGISTRY.hosts.values():
        _add_algorithm_to(registration, name)


def _check_name(name: str, mixin: type) -> None:
    if name in METHODS and name not in REGISTRY.added:
        raise UsageError(f"add_algorithm: {name!r} is one of our methods: choose another name")
    added = METHODS[name].mixin if name in METHODS else None
    modules = {kind.__module__ for kind in (added, mixin) if kind} - {"__main__", _SOURCE}
    if len(modules) > 1:
        raise UsageError(f"add_algorithm: {' and '.join(sorted(modules))} both add {name!r}: rename one of the two")


def list_sources() -> list[str]:
    """Return where the added algorithms come from, module names and paths of scripts, for processes yet to start."""
    return list(REGISTRY.sources)


def list_unimportable(names: Iterable[str]) -> list[str]:
    """Return which of some algorithms other processes could not add: those of a notebook, `python -c` or a pipe."""
    modules = {name: METHODS[name].mixin.__module__ for name in names if name in REGISTRY.added}
    return [name for name, module in modules.items() if module != _SOURCE and _find_source(module) is None]


@functools.cache
def import_source(source: str) -> None:
    """Import a module, or run a script as far as its `if __name__ == "__main__"`, for the algorithms that it adds."""
    if source.endswith(".py"):
        runpy.run_path(source, run_name=_SOURCE)
    else:
        importlib.import_module(source)


def _find_source(module: str) -> str | None:
    loaded = sys.modules.get(module)
    if loaded is None or module != "__main__":
        return None if module == _SOURCE else module
    if loaded.__spec__ is not None:  # python -m
        return loaded.__spec__.name
    path = getattr(loaded, "__file__", None)  # a notebook has none, standard input one that is no file
    return os.path.abspath(path) if path and os.path.isfile(path) else None


def _add_algorithm_to(registration: Registration, name: str) -> None:
    mixin, algorithms = load_class(name), registration.host.algorithms
    content = {"__doc__": mixin.__doc__, "__module__": mixin.__module__}
    registration.patches.set(algorithms, name, type(name, (mixin, algorithms.ERM), content))
    registration.patches.append(algorithms.ALGORITHMS, name)


def _add_datasets(registration: Registration) -> None:
    theirs, patches = registration.host.datasets, registration.patches
    for name in OUR_DATASETS:
        patches.set(theirs, name, datasets.get_dataset_class(name))
        patches.append(theirs.DATASETS, name)
    find_class = theirs.get_dataset_class

    def get_dataset_class(name: str) -> type:
        return datasets.get_dataset_class(name) if name.startswith("folder:") else find_class(name)

    patches.set(theirs, "get_dataset_class", get_dataset_class)
    patches.set(theirs.MultipleEnvironmentImageFolder, "__init__", _read_folders)


def _read_folders(self: Any, root: str, test_envs: list[int], augment: bool, hparams: Mapping[str, Any]) -> None:
    """Build one of upstream's sets of image folders as ours are: without litter, with one list of classes."""
    read = datasets.read_published
    self.datasets = datasets.read_domains(Path(root), self.ENVIRONMENTS, test_envs, augment, 224, read)
    self.input_shape = (3, 224, 224)
    self.num_classes = len(self.datasets[-1].classes)


def _extend_hparams(host: Host) -> Callable[[str, str, int], Pairs]:
    def _hparams(algorithm: str, dataset: str, random_seed: int) -> Pairs:
        return build_pairs(host, algorithm, describe_dataset(host, dataset, REGISTRY.user_hparams), random_seed)

    return _hparams


def _extend_featurizer(host: Host) -> Callable[[tuple[int, ...], Mapping[str, Any]], Any]:
    original = host.networks.Featurizer

    def Featurizer(input_shape: tuple[int, ...], hparams: Mapping[str, Any]) -> Any:  # noqa: N802 - the host's name
        name = hparams.get("backbone", "default")
        if name != "default":
            featurizer = build_backbones(
                name,
                input_shape,
                hparams.get("weights", "pretrained"),
                hparams.get("backbone_input_size", "auto"),
                INPUT_SPECS[hparams.get("pixels", "imagenet")],
            )
        else:
            with without_pretrained_weights() if hparams.get("weights") == "none" else nullcontext():
                # Any larger size does for the host's ResNet, though its own choice knows 224 alone.
                is_odd = len(input_shape) == 3 and input_shape[-1] > 32 and input_shape[-1] != 224
                featurizer = (host.networks.ResNet if is_odd else original)(input_shape, hparams)
        if hparams.get("freeze_bn") and name != "default":  # the host's own ResNet sees to it itself
            fix_statistics(featurizer)
        return freeze_part(featurizer, hparams.get("backbone_frozen", False), input_shape)

    return Featurizer
