"""Readers of a run's folder: what is there is read, and what cannot be read is as good as not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daft_domainbed.runtime.layout import (
    list_teachers,
    read_failure,
    read_first_record,
    read_last_record,
    read_records,
)

FIRST, LAST = {"step": 0, "args": {"seed": 1}}, {"step": 10, "loss": 0.5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results.jsonl").write_text(f"{json.dumps(FIRST)}\n{json.dumps(LAST)}\n")
    return tmp_path


def append(folder: Path, content: bytes) -> None:
    with (folder / "results.jsonl").open("ab") as file:
        file.write(content)


def test_first_last_and_all_records(folder: Path) -> None:
    assert (read_first_record(folder), read_last_record(folder), read_records(folder)) == (FIRST, LAST, [FIRST, LAST])


@pytest.mark.parametrize("name", ["a", "results.jsonl"])  # no folder, and no file in what is none
def test_there_are_no_records_without_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "results.jsonl").mkdir()
    for folder in (tmp_path, tmp_path / name):
        assert (read_first_record(folder), read_last_record(folder), read_records(folder)) == ({}, {}, [])


@pytest.mark.parametrize("end", [b'{"step": 20, "lo', b"\xff\x00\n", b"[1]\n", b"7", b'{"loss": 1}\n', b"[" * 100_000])
def test_the_last_record_is_the_last_whole_one_with_a_step(folder: Path, end: bytes) -> None:
    append(folder, end)
    assert read_last_record(folder) == LAST


def test_the_last_record_of_a_long_file_is_read_from_its_end(folder: Path) -> None:
    append(folder, b"\n" * 200_000 + b'{"step": 30}\n')
    assert read_last_record(folder) == {"step": 30}


def test_lines_that_are_no_records_are_left_out(folder: Path) -> None:
    append(folder, b'not JSON\n\n[1]\n{"step": 20}\n{"step":')
    assert read_records(folder) == [FIRST, LAST, {"step": 20}]
    (folder / "results.jsonl").write_text("[1]\n" + json.dumps(LAST))
    assert read_first_record(folder) == {}


JSON = st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.dictionaries(st.text(), inner))


@given(teacher=JSON, teachers=JSON)
def test_only_what_is_said_of_a_teacher_is_listed(teacher: object, teachers: object) -> None:
    found = list_teachers({"teacher": teacher, "teachers": teachers})
    assert all(isinstance(facts, dict) and facts for facts in found.values())
    if isinstance(teacher, dict) and teacher and not (isinstance(teachers, dict) and "teacher" in teachers):
        assert found["teacher"] == teacher


@pytest.mark.parametrize(
    ("text", "reason"), [("loss is nan\nmore", "loss is nan"), ("", "no reason given"), (None, "")]
)
def test_the_reason_of_a_failure_is_its_first_line(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "failed").write_text(text)
    assert read_failure(tmp_path) == reason
