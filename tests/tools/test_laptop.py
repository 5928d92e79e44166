"""The laptop's page is what its records say."""

from __future__ import annotations

import json

from tools import laptop


def test_page_is_what_the_records_say() -> None:
    page = laptop.PAGE.read_text(encoding="utf-8")
    assert laptop.fill_page(page) == page, "make pages"
    assert laptop.fill_page(page.replace("| KD, averaged |", "| KD, average |")) == page


def test_times_add_up() -> None:
    entry = {
        "job": "ERM student",
        "steps": 150,
        "processor_seconds": 20.4,
        "cache_bytes": 5_000_000,
        "load": 1.0,
        "commit": "a",
    }
    table = laptop.show_times([entry, entry | {"job": "KD student", "cache_bytes": 7_000_000}])
    assert "| ERM student | 150 | 20 | 5 |" in table
    assert "| KD student | 150 | 20 | 2 |" in table
    assert "| all, in this order |  | 41 | 7 |" in table


def test_a_step_is_told_with_its_rounds() -> None:
    row = {
        "ratio": 1.05,
        "goal": "<= 1.1 x bare",
        "n": 2,
        "values": {"ours": [2.0, 2.2], "bare": [2.0, 2.0]},
        "load": 0.5,
    }
    said = laptop.show_step(json.loads(json.dumps({"rows": [row], "machine": {"threads": 1, "commit": "b"}})))
    assert "takes 1.05 times" in said and "single rounds 1.00 to 1.10" in said
