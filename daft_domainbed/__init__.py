"""DAFT for DomainBed: adversarially fine-tuned teachers, distilled into smaller students."""

from daft_domainbed._version import __version__ as __version__


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
