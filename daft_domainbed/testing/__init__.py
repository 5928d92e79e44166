"""The contract suite: what every method of this package passes, and a method of your own should."""

from daft_domainbed.testing.contract import AlgorithmContract

__all__ = ["AlgorithmContract"]
