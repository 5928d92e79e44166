"""DAFT for DomainBed: adversarially fine-tuned teachers, distilled into smaller students."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from daft_domainbed._version import __version__ as __version__

if TYPE_CHECKING:
    from daft_domainbed.export.model import load_model as load_model


def register(host: str = "upstream") -> None:
    """Add our methods, hyperparameters, backbones and data sets to a host; importing this package adds nothing.

    Args:
        host: "upstream", the user's DomainBed, or "embedded".

    Raises:
        UsageError: There is no DomainBed to be found; says what brings it.
    """
    from daft_domainbed import plugin
    from daft_domainbed.host import contract

    plugin.register(contract.find_host(host))


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for: no command line waits for it."""
    if name == "load_model":
        from daft_domainbed.export.model import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
