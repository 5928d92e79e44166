"""The page of the whole way is what its record says, and the tool walks what it is given."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tools import whole_way
from tools.whole_way import STEPS, Step


def test_page_is_what_the_record_says() -> None:
    assert whole_way.PAGE.read_text(encoding="utf-8") == whole_way.show_page(whole_way.read_record()), "make pages"


def test_record_is_of_the_commands_of_today() -> None:
    """A step's commands are those that the tool would run, and nothing in the record says where it ran."""
    _, *walked = whole_way.read_record()
    assert [line["title"] for line in walked] == [step.title for step in STEPS]
    for line, step in zip(walked, STEPS, strict=True):
        assert re.fullmatch(re.escape(step.commands).replace("RUN", r"runs/paper/\w+"), line["commands"])
    assert not re.search(r"(?<![\w.}])/(root|home|tmp|work|usr)/", whole_way.RECORD.read_text(encoding="utf-8"))


def test_data_are_four_domains_of_three_classes(tmp_path: Path) -> None:
    whole_way.draw_data(tmp_path)
    places = {path.parent.relative_to(tmp_path / "shapes").as_posix() for path in tmp_path.glob("shapes/*/*/*.png")}
    assert places == {f"{ground}/{shape}" for ground in whole_way.GROUNDS for shape in whole_way.SHAPES}
    with Image.open(tmp_path / "new" / "disc.png") as image:
        assert image.size == (40, 40)


def test_walks_and_writes_what_was_said(tmp_path: Path) -> None:
    steps = [Step("One", "", "echo a > a.txt; pwd"), Step("Two", "", "cat a.txt; echo b >&2")]
    whole_way.walk(tmp_path / "new", steps, tmp_path / "record.jsonl")
    first, one, two = map(json.loads, (tmp_path / "record.jsonl").read_text().splitlines())
    assert first["machine"]["torch"] and one["title"] == "One" and two["output"] == ["a", "b"]
    page = whole_way.show_page([first, one, two])
    assert (
        "| in all | " in page
        and "## 2. Two\n\n```sh\ncat a.txt; echo b >&2\n```" in page
        and "```text\na\nb\n```" in page
    )
    with pytest.raises(subprocess.CalledProcessError):
        whole_way.walk(tmp_path / "other", [Step("One", "", "false; true")], tmp_path / "record.jsonl")


def test_long_output_is_shortened() -> None:
    lines = [str(i) for i in range(25)]
    assert whole_way.shorten(lines) == [*lines[:9], "... 7 lines ...", *lines[16:]]
    assert whole_way.shorten(lines[:24]) == lines[:24]


def test_places_are_hidden(tmp_path: Path) -> None:
    said = f"{tmp_path}/runs/a {whole_way.ROOT}/tools/b.py"
    assert whole_way.hide_places(said, tmp_path) == "runs/a tools/b.py"
