"""Changes to the modules of a host that can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import Any


class Patches:
    """Everything that was changed in one host."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def set(self, module: ModuleType | type, name: str, value: Any) -> None:
        """Give an attribute of a module or a class another value, or add it."""
        if hasattr(module, name):
            self._undo.append(partial(setattr, module, name, getattr(module, name)))
        else:
            self._undo.append(partial(delattr, module, name))
        setattr(module, name, value)

    def append(self, names: list[str], name: str) -> None:
        """Add a name to a list that lacks it."""
        if name not in names:
            names.append(name)
            self._undo.append(partial(names.remove, name))

    def update(self, entries: dict[str, Any], changed: dict[str, Any]) -> None:
        """Replace entries of a dictionary."""
        self._undo.append(partial(entries.update, {name: entries[name] for name in changed}))
        entries.update(changed)

    def take_back(self) -> None:
        """Leave the host as it was."""
        while self._undo:
            self._undo.pop()()


@contextmanager
def without_pretrained_weights() -> Iterator[None]:
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
