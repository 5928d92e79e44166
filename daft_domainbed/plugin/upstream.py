"""What an unmodified upstream module needs, run as it stands: data sets to be found, runs to be followed, launchers."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from daft_domainbed.host.contract import Host, get_dataset_class
from daft_domainbed.plugin.registry import REGISTRY

_PYTHON_MODULE = re.compile(r"^python\s+-m\s+")


def add_folder_dataset(host: Host, name: str) -> None:
    """Make a `folder:PATH` data set findable in every way that upstream's scripts look one up."""
    patches = REGISTRY.hosts[host.name].patches
    patches.set(host.datasets, name, host.datasets.get_dataset_class(name))
    patches.append(host.datasets.DATASETS, name)


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
    REGISTRY.hosts[host.name].patches.set(host.datasets, name, Watched)


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
    REGISTRY.hosts[host.name].patches.update(launchers.REGISTRY, redirected)
