"""The one seam to a host: find it, and add our algorithms, hyperparameters, backbones and data sets to it."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from daft_domainbed import backbones, hparams
from daft_domainbed.attacks import INPUT_SPECS, InputSpec
from daft_domainbed.checkpoints import to_plain
from daft_domainbed.errors import UsageError, suggest

OUR_DATASETS = ("EmojiStyles", "EmojiStylesUnseen", "ColoredDigits")
_OUR_BATCH_SIZE = 32
_SMALL_DATASET = "Debug28"  # stands in for "DomainBed's small images", a list that upstream keeps to itself


@dataclass(frozen=True)
class Host:
    """The modules of a package with DomainBed's contract."""

    name: str
    algorithms: ModuleType
    datasets: ModuleType
    networks: ModuleType
    hparams_registry: ModuleType
    misc: ModuleType


@functools.cache
def find_host(name: str = "embedded") -> Host:
    """Import a host.

    Args:
        name: "embedded", or "upstream": the clone at DOMAINBED_ROOT, or `domainbed` on the import path.

    Raises:
        UsageError: There is no such host, or upstream cannot be imported; says what brings it.
    """
    if name == "embedded":
        package = "daft_domainbed.embedded"
        parts = ("algorithms", "datasets", "networks", "hparams_registry", "misc")
    elif name == "upstream":
        package = "domainbed"
        parts = ("algorithms", "datasets", "networks", "hparams_registry", "lib.misc")
        _put_clone_on_path()
    else:
        raise UsageError(f"no host {name!r}: use embedded or upstream")
    try:
        return Host(name, *(importlib.import_module(f"{package}.{part}") for part in parts))
    except ImportError as error:
        if name == "embedded":
            raise
        raise UsageError(
            f"--host upstream: {error}; set DOMAINBED_ROOT to a clone of facebookresearch/DomainBed and run "
            f"'pip install wilds timm tqdm'"
        ) from error


def _put_clone_on_path() -> None:
    sys.dont_write_bytecode = True  # the clone stays byte for byte as it was
    root = os.environ.get("DOMAINBED_ROOT")
    if not root:
        return
    if not (Path(root) / "domainbed" / "algorithms.py").is_file():
        raise UsageError(f"DOMAINBED_ROOT is {root}, which is no clone of DomainBed: it has no domainbed/algorithms.py")
    if root not in sys.path:
        sys.path.insert(0, root)


def register(host: Host) -> None:
    """Add everything of ours to a host; doing so twice is harmless, and `unregister` takes it all back."""
    if host.name in _undo:
        return
    undo: list[Callable[[], None]] = [_ask_registry.cache_clear]
    _undo[host.name] = undo
    _ask_registry.cache_clear()

    from daft_domainbed.algorithms import MIXINS

    for name, mixin in (MIXINS | _added).items():
        _add_to_host(host, name, mixin)

    if host.name != "embedded":
        embedded = importlib.import_module("daft_domainbed.embedded.datasets")
        for name in OUR_DATASETS:
            _set(host.datasets, name, getattr(embedded, name), undo)
            _append(host.datasets.DATASETS, name, undo)
        find_class = host.datasets.get_dataset_class

        def get_dataset_class(name: str) -> type:
            return embedded.get_dataset_class(name) if name.startswith("folder:") else find_class(name)

        _set(host.datasets, "get_dataset_class", get_dataset_class, undo)

    _set(host.hparams_registry, "_hparams", _extend_hparams(host), undo)
    _set(host.networks, "Featurizer", _extend_featurizer(host), undo)


def unregister(host: Host) -> None:
    """Leave a host as it was before `register`."""
    for step in reversed(_undo.pop(host.name, [])):
        step()


def add_algorithm(name: str, mixin: type, *, like: str = "ERM") -> None:
    """Add an algorithm of your own, a mixin over the host's ERM, to every host.

    Args:
        name: As given to `--algorithm`.
        mixin: Its `__init__` and `update` are an Algorithm's.
        like: Whose hyperparameters and teacher it has: ERM (no teacher), KD, DAFT or AFT.
    """
    hparams.add_algorithm(name, like)
    _ask_registry.cache_clear()
    _added[name] = mixin
    if (source := _find_source(mixin.__module__)) and source not in _sources:
        _sources.append(source)
    for registered in _undo:
        _add_to_host(find_host(registered), name, mixin)


def list_sources() -> list[str]:
    """Return where the added algorithms come from, module names and paths of scripts, for processes yet to start."""
    return list(_sources)


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
    path = getattr(loaded, "__file__", None)  # a notebook has none
    return os.path.abspath(path) if path else None


def _add_to_host(host: Host, name: str, mixin: type) -> None:
    algorithm = type(name, (mixin, host.algorithms.ERM), {"__doc__": mixin.__doc__, "__module__": mixin.__module__})
    _set(host.algorithms, name, algorithm, _undo[host.name])
    _append(host.algorithms.ALGORITHMS, name, _undo[host.name])


_undo: dict[str, list[Callable[[], None]]] = {}
_added: dict[str, type] = {}
_sources: list[str] = []
_SOURCE = "daft_domainbed_source"  # what a script is called that is run for what it adds


def _set(module: ModuleType, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    if hasattr(module, name):
        undo.append(functools.partial(setattr, module, name, getattr(module, name)))
    else:
        undo.append(functools.partial(delattr, module, name))
    setattr(module, name, value)


def _append(names: list[str], name: str, undo: list[Callable[[], None]]) -> None:
    if name not in names:
        names.append(name)
        undo.append(functools.partial(names.remove, name))


# A folder's hyperparameters depend on its `input_size`, which the host's registry is not told.
_assumed: list[Mapping[str, Any]] = []


@contextmanager
def assuming(user_hparams: Mapping[str, Any]) -> Iterator[None]:
    """Let the user's own hyperparameters be known while defaults and draws are made."""
    _assumed.append(user_hparams)
    try:
        yield
    finally:
        _assumed.pop()


def _extend_hparams(host: Host) -> Callable[[str, str, int], dict[str, tuple[Any, Any]]]:
    original = host.hparams_registry._hparams
    seed_hash = host.misc.seed_hash

    def _hparams(algorithm: str, dataset: str, random_seed: int) -> dict[str, tuple[Any, Any]]:
        def draw_random(name: str) -> np.random.RandomState:
            return np.random.RandomState(seed_hash(random_seed, name))

        shape = get_input_shape(host, dataset)
        is_small_folder = dataset.startswith("folder:") and shape is not None and hparams.is_small_folder(shape[-1])
        is_small = dataset in OUR_DATASETS or is_small_folder
        pairs: dict[str, tuple[Any, Any]] = original(algorithm, _SMALL_DATASET if is_small else dataset, random_seed)
        if dataset in OUR_DATASETS:  # upstream's largest draw, 512, would exceed a domain
            pairs["batch_size"] = (_OUR_BATCH_SIZE, int(2 ** draw_random("batch_size").uniform(3, 7)))
        return pairs | hparams.build_hparams(algorithm, dataset, shape, get_pixels(host, dataset), draw_random)

    return _hparams


def _extend_featurizer(host: Host) -> Callable[[tuple[int, ...], Mapping[str, Any]], Any]:
    original = host.networks.Featurizer

    def Featurizer(input_shape: tuple[int, ...], hparams: Mapping[str, Any]) -> Any:  # noqa: N802 - the host's name
        name = hparams.get("backbone", "default")
        if name != "default":
            side, pixels = hparams.get("backbone_input_size", "auto"), hparams.get("pixels", "imagenet")
            featurizer = backbones.build_backbone(
                name,
                input_shape,
                hparams.get("weights", "pretrained"),
                None if side == "auto" else side,
                INPUT_SPECS[pixels],
            )
        else:
            with _without_pretrained_weights() if hparams.get("weights") == "none" else nullcontext():
                # Any larger size does for the host's ResNet, though its own choice knows 224 alone.
                is_odd = len(input_shape) == 3 and input_shape[-1] > 32 and input_shape[-1] != 224
                featurizer = (host.networks.ResNet if is_odd else original)(input_shape, hparams)
        return backbones.freeze(featurizer) if hparams.get("backbone_frozen") else featurizer

    return Featurizer


@contextmanager
def _without_pretrained_weights() -> Iterator[None]:
    """Have the host's own ResNets built from random weights: it would download others, whatever comes after."""
    import torchvision

    models: list[tuple[Any, str, Callable[..., Any]]] = []
    for name in ("resnet18", "resnet50"):
        build = getattr(torchvision.models, name)
        models.append((torchvision.models, name, lambda build=build, **_: build()))
    with suppress(ImportError):
        import timm

        create = timm.create_model
        models.append((timm, "create_model", lambda name, **_: create(name)))
    before = [(module, name, getattr(module, name)) for module, name, _ in models]
    try:
        for module, name, build in models:
            setattr(module, name, build)
        yield
    finally:
        for module, name, build in before:
            setattr(module, name, build)


def get_input_shape(host: Host, dataset: str) -> tuple[int, ...] | None:
    """Return a data set's (C, H, W) as far as its name and the user's hyperparameters tell, or None."""
    if dataset.startswith("folder:"):
        side = (_assumed[-1] if _assumed else {}).get("input_size", hparams.TABLE["input_size"].default)
        return (3, side, side) if isinstance(side, int) else None
    dataset_class = getattr(host.datasets, dataset, None)
    shape = getattr(dataset_class, "INPUT_SHAPE", None)
    if shape is None and _has_ancestor(dataset_class, "MultipleEnvironmentMNIST"):
        shape = (1, 28, 28)
    return tuple(shape) if shape is not None else None


def get_default_hparams(host: Host, algorithm: str, dataset: str, user: Mapping[str, Any]) -> dict[str, Any]:
    """Return all hyperparameters of an algorithm, as plain types, before the user's are applied."""
    return dict(_ask_registry(host, algorithm, dataset, json.dumps(dict(user)), None))


def get_random_hparams(host: Host, algorithm: str, dataset: str, user: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return one random draw of an algorithm's hyperparameters, as plain types."""
    return dict(_ask_registry(host, algorithm, dataset, json.dumps(dict(user)), seed))


# A sweep asks the same for every held-out domain, and each answer seeds a dozen generators.
@functools.lru_cache(maxsize=10_000)
def _ask_registry(host: Host, algorithm: str, dataset: str, user: str, seed: int | None) -> dict[str, Any]:
    registry = host.hparams_registry
    with assuming(json.loads(user)):
        if seed is None:
            found: dict[str, Any] = to_plain(registry.default_hparams(algorithm, dataset))
        else:
            found = to_plain(registry.random_hparams(algorithm, dataset, seed))
    return found


def get_algorithm_class(host: Host, name: str) -> type:
    """Return an algorithm's class.

    Raises:
        UsageError: The host has none of that name; says the nearest, or which host has it.
    """
    if name in host.algorithms.ALGORITHMS:
        algorithm: type = host.algorithms.get_algorithm_class(name)
        return algorithm
    try:
        host.algorithms.get_algorithm_class(name)
    except UsageError:
        raise
    except NotImplementedError:
        pass
    hint = suggest(name, host.algorithms.ALGORITHMS)
    raise UsageError(f"no algorithm {name!r} in host {host.name}.{hint}")


def get_dataset_class(host: Host, name: str) -> Any:
    """Return a data set's class.

    Raises:
        UsageError: The host has none of that name; says the nearest.
    """
    if host.name == "embedded" or name in host.datasets.DATASETS or name.startswith("folder:"):
        return host.datasets.get_dataset_class(name)
    raise UsageError(f"no data set {name!r} in host {host.name}.{suggest(name, host.datasets.DATASETS)}")


def get_environments(host: Host, dataset: str) -> list[str]:
    """Return the names of a data set's environments."""
    return list(get_dataset_class(host, dataset).ENVIRONMENTS)


def get_pixels(host: Host, dataset: str) -> str:
    """Return which of INPUT_SPECS says how a data set normalises its images; upstream's are told by their ancestors."""
    if dataset.startswith("folder:"):
        return "imagenet"
    dataset_class = getattr(host.datasets, dataset, None)
    name: str | None = getattr(dataset_class, "INPUT_SPEC", None)
    if name is None:
        if _has_ancestor(dataset_class, "MultipleEnvironmentMNIST"):
            return "unit"
        return "none" if _has_ancestor(dataset_class, "Debug") else "imagenet"
    return name


def get_input_spec(host: Host, dataset: str) -> InputSpec:
    """Return how a data set normalises its images."""
    return INPUT_SPECS[get_pixels(host, dataset)]


def is_seeded(dataset_class: type) -> bool:
    """Return whether a data set's contents depend on the seed it is built under (MNIST-like and Debug sets' do)."""
    seeded = getattr(dataset_class, "SEEDED", None)
    files = ("MultipleEnvironmentImageFolder", "WILDSDataset", "SpawriousBenchmark")
    return bool(seeded) if seeded is not None else not any(_has_ancestor(dataset_class, name) for name in files)


def _has_ancestor(kind: type | None, name: str) -> bool:
    return kind is not None and any(ancestor.__name__ == name for ancestor in kind.__mro__)


def is_plain_folder(data: Any) -> bool:
    """Return whether a domain is an image folder whose images are the same whoever reads them, in whatever order."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import default_loader

    from daft_domainbed.embedded.datasets import read_image

    loader = getattr(data, "loader", None)
    is_known = getattr(loader, "func", loader) in (default_loader, read_image)  # the latter as a partial
    return type(data) is ImageFolder and data.target_transform is None and is_known


# --- an unmodified upstream module, run as it stands ----------------------------------------------------------------


def add_folder_dataset(host: Host, name: str) -> None:
    """Make a `folder:PATH` data set findable in every way that upstream's scripts look one up."""
    undo = _undo[host.name]
    dataset_class = host.datasets.get_dataset_class(name)
    _set(host.datasets, name, dataset_class, undo)
    _append(host.datasets.DATASETS, name, undo)


def watch_dataset(host: Host, name: str, built: Callable[[Any, Mapping[str, Any]], None]) -> None:
    """Have a callback told of each data set of a class when upstream's own loop has built it.

    Args:
        host: Registered.
        name: Of the data set's class.
        built: Given the data set and the hyperparameters that it was built with.
    """
    original = get_dataset_class(host, name)

    class Watched(original):  # type: ignore[misc, valid-type]
        __doc__ = original.__doc__

        def __init__(self, root: str | None, test_envs: list[int], hparams: Mapping[str, Any]) -> None:
            super().__init__(root, test_envs, hparams)
            built(self, hparams)

    Watched.__name__ = Watched.__qualname__ = original.__name__
    _set(host.datasets, name, Watched, _undo[host.name])


def get_launchers(host: Host) -> dict[str, Callable[[list[str]], Any]]:
    """Return the functions by which a host's own sweep launches commands, by name; the user may have added some."""
    if host.name == "embedded":
        return {}
    return dict(importlib.import_module("domainbed.command_launchers").REGISTRY)


def redirect_launchers(host: Host, command: str) -> None:
    """Have every launcher of upstream's sweep, the user's own too, start `command` where it started a python module."""
    launchers = importlib.import_module("domainbed.command_launchers")

    def redirect(launch: Callable[[list[str]], Any]) -> Callable[[list[str]], Any]:
        @functools.wraps(launch)
        def launch_redirected(commands: list[str]) -> Any:
            # The text behind the prefix stays as it is, with all its quoting.
            return launch([_PYTHON_MODULE.sub(lambda _: f"{command} ", text, count=1) for text in commands])

        return launch_redirected

    redirected = {name: redirect(launch) for name, launch in launchers.REGISTRY.items()}
    original = dict(launchers.REGISTRY)
    launchers.REGISTRY.update(redirected)
    _undo[host.name].append(functools.partial(launchers.REGISTRY.update, original))


_PYTHON_MODULE = re.compile(r"^python\s+-m\s+")
