"""DocRanking's texts: what becomes of a docstring, and the committed lists made anew from the committed texts."""

from __future__ import annotations

import json
import lzma

import pytest

from daft_domainbed.embedded.documents import N_WORDS, list_words
from tools.build_documents import FILE, add_candidates, list_docstrings, make_pair

SUMMARY = "Return the convex hull of points"
BODY = (
    "Every corner lies on the boundary while interior members vanish whenever larger polygons surround smaller ones "
    "nearby, and collinear vertices between two corners count as interior members too."
)


def test_a_pair_is_the_summary_and_the_text_without_it() -> None:
    wanted = {"name": "a.b", "query": SUMMARY, "text": BODY}
    assert make_pair("a.b", f"{SUMMARY}\n\n{BODY}") == wanted
    assert make_pair("a.b", f"{SUMMARY}\n\n{SUMMARY} {BODY}") == wanted
    assert make_pair("a.b", f"hull(points, /)\n\n{SUMMARY}\n\n{BODY}") == wanted


@pytest.mark.parametrize("docstring", ["", SUMMARY, f"{SUMMARY}\n\nToo few words.", f"Hull\n\n{BODY}"])
def test_without_summary_or_text_there_is_no_pair(docstring: str) -> None:
    assert make_pair("a.b", docstring) is None


def test_no_more_of_a_text_is_kept_than_is_read() -> None:
    pair = make_pair("a.b", f"{SUMMARY}\n\n{BODY * 10}")
    assert pair is not None and len(list_words(pair["text"])) >= N_WORDS
    assert len(list_words(pair["text"].rsplit(" ", 1)[0])) < N_WORDS


def test_docstrings_are_of_public_things_alone() -> None:
    found = dict(list_docstrings("json"))
    assert found["json.JSONEncoder.default"].startswith("Implement this method in a subclass")
    assert "json" in found and not [name for name in found if "._" in name]


def test_committed_lists_are_made_of_the_committed_texts() -> None:
    pairs = json.loads(lzma.decompress(FILE.read_bytes()))["packages"]["sklearn"]
    again = [{key: pair[key] for key in ("name", "query", "text")} for pair in pairs]
    add_candidates(again)
    assert again == pairs
