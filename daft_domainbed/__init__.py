"""DAFT for DomainBed: adversarially fine-tuned teachers, distilled into smaller students."""

__version__ = "0.1.0"


def register(host: str = "upstream") -> None:
    """Add AFT, KD, DAFT, our hyperparameters, backbones and data sets to a host; importing this package adds nothing.

    Args:
        host: "upstream", the user's DomainBed, or "embedded".

    Raises:
        UsageError: There is no DomainBed to be found; says what brings it.
    """
    from daft_domainbed import plugin

    plugin.register(plugin.find_host(host))
