"""What was added to which host, in one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from daft_domainbed.host.contract import Host
from daft_domainbed.plugin.patching import Patches

Pairs = dict[str, tuple[Any, Any]]  # (default, random draw) of each hyperparameter


@dataclass
class Registration:
    """A host with everything of ours.

    Attributes:
        host: Its modules.
        own_hparams: Its registry's function as it was: (algorithm, data set, seed) -> pairs.
        patches: What was changed in it.
    """

    host: Host
    own_hparams: Callable[[str, str, int], Pairs]
    patches: Patches = field(default_factory=Patches)


@dataclass
class Registry:
    """Hosts, and what the user added to them.

    Attributes:
        hosts: Those that are registered, by name.
        added: Names of the user's own algorithms.
        sources: Where these come from: module names and paths of scripts, for processes yet to start.
        user_hparams: What the user gave a host's own scripts, whose registry is not told; a folder's side is in there.
    """

    hosts: dict[str, Registration] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    user_hparams: Mapping[str, Any] = field(default_factory=dict)


REGISTRY = Registry()
