"""The tables of docs/adaptation.md are what the committed records say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from daft_domainbed.adaptation.methods import METHODS
from tools import adaptation
from tools.archives import read_records


def test_page_is_what_the_records_say() -> None:
    page, records = adaptation.PAGE.read_text(encoding="utf-8"), read_records(adaptation.RECORDS)
    assert adaptation.fill_page(page, records) == page, "make pages"
    assert {*re.findall(r"<!-- table (\w+): python -m tools\.adaptation write -->", page)} == set(adaptation.TABLES)
    assert adaptation.fill_page(page.replace("| owttt |", "| other |"), records) == page
    streams = [record for record in records if record["kind"] == "streams"]
    assert all(len(record["findings"]) == 5 * len(METHODS) for record in streams)
    for kind in {record["settings"]["strong_ood"] for record in streams}:
        assert sum(record["settings"]["strong_ood"] == kind for record in streams) == 12  # algorithms, held-out styles
    assert {record["machine"]["commit"] for record in records}.isdisjoint({None, ""})


def make_record(right: list[int], strong_ood: str | None) -> dict[str, Any]:
    """One domain's streams, of which every method makes the same."""
    outside = {"rejected": 10, "n_strong": 20} if strong_ood else {"rejected": 0, "n_strong": 0}
    counts = [{"right": n, "answered": n + 2, "n_weak": 20, **outside} for n in right]
    findings = {f"{method} | {k}": found for method in METHODS for k, found in enumerate(counts)}
    return {"kind": "streams", "algorithm": "KD", "settings": {"strong_ood": strong_ood}, "findings": findings}


def test_a_number_is_a_mean_over_domains_and_its_error_is_over_orders() -> None:
    records = [make_record(right, strong_ood) for strong_ood in ("noise", None) for right in ([4, 8], [8, 10])]
    head, _, row, *rows = adaptation.make_accuracy_table(records, "noise").splitlines()
    assert head == "| model | method | right | ACC_S | ACC_N | ACC_H |"
    # Orders: means of 20 and 40, 40 and 50; harmonic means with 50.
    assert row == "| KD | source | 47.5 ± 7.5 | 37.5 ± 7.5 | 50.0 ± 0.0 | 41.9 ± 5.4 |"
    assert len(rows) == len(METHODS) - 1
    closed = adaptation.make_accuracy_table(records, None).splitlines()
    assert closed[2] == "| KD | source | 47.5 ± 7.5 | 37.5 ± 7.5 |"


def test_cost_is_a_median() -> None:
    costs = [{"kind": "cost", "method": method, "seconds": [1.0, 1.5, 9.0], "peak_mb": 512.4} for method in METHODS]
    assert adaptation.make_cost_table(costs).splitlines()[2] == "| source | 1.500 | 512 |"


def test_rates_are_means_over_models() -> None:
    def count(right: int) -> dict[str, int]:
        return {"right": right, "answered": right + 1, "n_weak": 10, "rejected": 5, "n_strong": 10}

    records = [
        {"kind": "rate", "rate": rate, "training": [count(9)] * 2, "held-out": [count(right), count(right + 2)]}
        for rate in adaptation.RATES
        for right in (2, 4)
    ]
    head, _, row, *rows = adaptation.make_rates_table(records).splitlines()
    assert head.startswith("| learning rate | training: right | training: ACC_S |")
    assert row == "| test | 100 | 90.0 | 50.0 | 64.3 | 50.0 | 40.0 | 50.0 | 43.0 |"  # of 20, 40, 40 and 60
    assert len(rows) == len(adaptation.RATES) - 1


def test_the_packages_digits_are_written_as_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = adaptation.load_digits()
    monkeypatch.setattr(adaptation, "load_digits", lambda: (images[:3], labels[:3]))
    folder = adaptation.write_digits(tmp_path / "digits")
    assert [path.name for path in sorted(folder.iterdir())] == ["0000.png", "0001.png", "0002.png"]
    with Image.open(folder / "0000.png") as image:
        assert image.size == (28, 28)
