"""What a host is: its modules, its algorithms, its data sets, and what a data set's class tells of itself."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.random import RandomState

from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.functional.input_spec import INPUT_SPECS, InputSpec

DEFAULT_INPUT_SIZE = 224  # of a folder's images, in pixels
_LARGEST_SMALL_FOLDER = 64

# What is peculiar to some of DomainBed's own algorithms.
USING_NUMPY = ("RSC",)  # hands gradients to it, and it has no bfloat16
USING_BACKWARD_HOOKS = ("Fishr",)  # takes its gradients, sample by sample, inside backward, where a loss is scaled


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


@dataclass(frozen=True)
class DatasetFacts:
    """What a data set's class tells before any data are read.

    Attributes:
        name: As given to `--dataset`.
        dataset_class: The host's.
        environments: Names of its domains.
        input_shape: (C, H, W), of lists of texts (rows, words), or None where only the instance knows it.
        pixels: Which of INPUT_SPECS says how it normalises its images.
        is_seeded: Whether its contents depend on the seed that it is built under.
        is_small: Whether it gets the hyperparameters that DomainBed gives to small images.
        hparams: Defaults of its own, each with a random draw or None.
    """

    name: str
    dataset_class: Any
    environments: tuple[str, ...]
    input_shape: tuple[int, ...] | None
    pixels: str
    is_seeded: bool
    is_small: bool
    hparams: tuple[tuple[str, Any, Callable[[RandomState], Any] | None], ...]

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of the user's own images."""
        return self.name.startswith("folder:")

    @property
    def has_texts(self) -> bool:
        """Whether its samples are hashes of words, not images."""
        return self.pixels == "tokens"

    @property
    def side(self) -> int | None:
        """Width of an image in pixels."""
        return self.input_shape[-1] if self.input_shape else None

    @property
    def input_spec(self) -> InputSpec:
        """How it normalises its images."""
        return INPUT_SPECS[self.pixels]


def describe_dataset(host: Host, name: str, user_hparams: Mapping[str, Any], path: str | None = None) -> DatasetFacts:
    """Return what is known of a data set without reading it.

    Classes of ours say it themselves; upstream's are told by their ancestors.

    Args:
        host: Registered.
        name: As given to `--dataset`.
        user_hparams: What the user gave; a folder's images have the side that `input_size` says.
        path: Where a folder lies; None is where its name says.

    Raises:
        UsageError: The host has no such data set.
    """
    is_folder = name.startswith("folder:")
    dataset_class = get_dataset_class(host, f"folder:{path}" if is_folder and path else name)
    shape: tuple[int, ...] | None = getattr(dataset_class, "INPUT_SHAPE", None)
    if is_folder:
        side = user_hparams.get("input_size", DEFAULT_INPUT_SIZE)
        shape = (3, side, side) if isinstance(side, int) else None
    elif shape is None and _has_ancestor(dataset_class, "MultipleEnvironmentMNIST"):
        shape = (1, 28, 28)
    is_small_folder = is_folder and shape is not None and shape[-1] <= _LARGEST_SMALL_FOLDER
    own: Mapping[str, Any] = getattr(dataset_class, "HPARAMS", {})
    return DatasetFacts(
        name=name,
        dataset_class=dataset_class,
        environments=tuple(dataset_class.ENVIRONMENTS),
        input_shape=tuple(shape) if shape is not None else None,
        pixels=_find_pixels(dataset_class),
        is_seeded=_is_seeded(dataset_class),
        is_small=getattr(dataset_class, "SMALL", False) or is_small_folder,
        hparams=tuple((key, *pair) for key, pair in own.items()),
    )


def _find_pixels(dataset_class: type) -> str:
    if (name := getattr(dataset_class, "INPUT_SPEC", None)) is not None:
        return str(name)
    if _has_ancestor(dataset_class, "MultipleEnvironmentMNIST"):
        return "unit"
    return "none" if _has_ancestor(dataset_class, "Debug") else "imagenet"


def _is_seeded(dataset_class: type) -> bool:
    """Return whether a class deals out its data by the seed, as MNIST-like and Debug sets do."""
    seeded = getattr(dataset_class, "SEEDED", None)
    files = ("MultipleEnvironmentImageFolder", "WILDSDataset", "SpawriousBenchmark")
    return bool(seeded) if seeded is not None else not any(_has_ancestor(dataset_class, name) for name in files)


def _has_ancestor(kind: type, name: str) -> bool:
    return any(ancestor.__name__ == name for ancestor in kind.__mro__)


def is_plain_folder(data: Any) -> bool:
    """Return whether a domain is an image folder whose images are the same whoever reads them, in whatever order."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import default_loader

    from daft_domainbed.embedded.datasets import read_image, read_published
    from daft_domainbed.embedded.image_folder import ImageDomain

    loader = getattr(data, "loader", None)
    is_known = getattr(loader, "func", loader) in (default_loader, read_image, read_published)
    return type(data) in (ImageFolder, ImageDomain) and data.target_transform is None and is_known
