"""Every row of the table keeps the contract, on both hosts."""

from __future__ import annotations

from daft_domainbed.methods import METHODS
from daft_domainbed.testing import AlgorithmContract

# What a row needs beside what is small for all.
HPARAMS = {"CLIP": {"backbone": "open_clip/small"}, "CaRot": {"teacher_backbone": "open_clip/small"}}

for _name in METHODS:
    content = {"algorithm": _name, "hparams": HPARAMS.get(_name, {})}
    globals()[f"Test{_name}"] = type(f"Test{_name}", (AlgorithmContract,), content)
