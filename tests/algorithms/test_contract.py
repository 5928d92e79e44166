"""Every row of the table keeps the contract, on both hosts."""

from __future__ import annotations

from daft_domainbed.methods import METHODS
from daft_domainbed.testing import AlgorithmContract

for _name in METHODS:
    globals()[f"Test{_name}"] = type(f"Test{_name}", (AlgorithmContract,), {"algorithm": _name})
