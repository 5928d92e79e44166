from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import pytest

from daft_domainbed import cli
from daft_domainbed._version import __version__

ROOT = Path(__file__).parents[1]
DOCS = [path for pattern in ("*.md", "docs/**/*.md", "sweeps/**/*.md") for path in sorted(ROOT.glob(pattern))]

FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:src|href)=\"([^\"]+)\"|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def list_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+\s+(.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def find_broken_links(page: Path) -> list[str]:
    """Return a page's relative links that lead to no file, or to no heading of it."""
    text = page.read_text(encoding="utf-8")
    targets = (next(filter(None, groups)) for groups in LINK.findall(re.sub(r"`[^`\n]+`", "", FENCED.sub("", text))))
    broken = []
    for target in targets:
        if ELSEWHERE.match(target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / unquote(path) if path else page
        if not file.exists() or (
            anchor and file.suffix == ".md" and anchor not in list_anchors(file.read_text(encoding="utf-8"))
        ):
            broken.append(target)
    return broken


def list_commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each of our commands, and each make command, that a page shows in a shell block."""
    for language, block in FENCED.findall(page.read_text(encoding="utf-8")):
        if language not in ("sh", "bash", "console", "shell"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True) if re.match(r"(\$ )?[\w./]", line) else []
            if words and Path(words[0]).name in (cli.PROGRAM, "make"):
                yield words[: words.index(">")] if ">" in words else words


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert find_broken_links(page) == []


@pytest.mark.parametrize("page", DOCS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist_and_take_their_flags(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for words in list_commands(page):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), words
        elif words[1:2] not in (["--help"], ["--version"]) and "--help" not in words:
            script = import_module(f"daft_domainbed.scripts.{words[1]}")
            script.build_parser().parse_args([word for word in words[2:] if word != "--debug"])


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other page.md").write_text("# What it is: a `guide`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Start\n[a](other%20page.md) [b](other%20page.md#what-it-is-a-guide) [c](#start) ![d](lost.png 'title')\n"
        '[e](other%20page.md#lost) [f](https://example.org/x) [g](#lost) <img src="lost.svg"> `[h](lost.h)`\n'
        "```\n[i](lost.i)\n```\n[j]: lost.j\n"
    )
    assert find_broken_links(page) == ["lost.png", "other%20page.md#lost", "#lost", "lost.svg", "lost.j"]


def test_commands_of_a_page_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\n$ .venv/bin/daft-domainbed run --n_trials 3 \\\n    --seed 1  # slow\nmake demo\nls\n```\n"
        "```python\nmake test\n```\n"
    )
    assert list(list_commands(page)) == [
        [".venv/bin/daft-domainbed", "run", "--n_trials", "3", "--seed", "1"],
        ["make", "demo"],
    ]


def test_versions_agree() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## {__version__} - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
