"""Every row of the table keeps the contract, on both hosts."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from daft_domainbed.methods import METHODS
from daft_domainbed.testing import AlgorithmContract

pytestmark = pytest.mark.usefixtures("few_lists")

# What a row needs beside what is small for all.
HPARAMS = {
    "ADT": {"adt_steps": 2, "adt_samples": 2},
    "CLIP": {"backbone": "open_clip/small"},
    "CaRot": {"teacher_backbone": "open_clip/small"},
}

for _name in METHODS:
    content = {"algorithm": _name, "hparams": HPARAMS.get(_name, {})}
    globals()[f"Test{_name}"] = type(f"Test{_name}", (AlgorithmContract,), content)


class TestPIATOnTexts(AlgorithmContract):
    """Lists of texts in the place of images; the natural ranker that static examples ask for, too."""

    algorithm, dataset = "PIAT", "DocRanking"
    hparams: ClassVar[dict[str, Any]] = {"backbone": "ranker_w4", "batch_size": 2, "piat_static": True}


@pytest.mark.slow
class TestPIATOnDrawings(AlgorithmContract):
    """The classification analogue, with examples made against a natural model."""

    algorithm, dataset = "PIAT", "EmojiStyles"
    hparams: ClassVar[dict[str, Any]] = {"piat_static": True, "piat_steps": 2, "n_views": 1}
