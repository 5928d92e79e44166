"""The picture in docs/architecture.md is how the code is; and rules that keep it a house of rooms."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from daft_domainbed.methods import METHODS, PLAIN

ROOT = Path(__file__).parents[1]
PACKAGE = "daft_domainbed"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
MOST_LINES = 350
# What the picture would allow, and a reader should not have to expect.
STRICT = {
    "functional": set(),
    "algorithms": {"data", "errors", "functional", "hparams", "models", "runtime", "teachers"},
}


def list_imports(module: str) -> set[str]:
    """Return the modules of the package that a module imports: lazily and for the type checker, too."""
    names = []
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names += [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    found = {name if name in FILES else name.rpartition(".")[0] for name in names if name.startswith(PACKAGE)}
    assert found <= FILES.keys(), f"{module} imports {found - FILES.keys()}"
    return found - {module}


def name_room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def read_picture() -> dict[str, set[str]]:
    """Return the arrows of the picture, by the room that they begin at."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"```mermaid\n(.*?)```", page, re.DOTALL)
    assert block
    arrows = [line.split("-->") for line in block[1].splitlines() if "-->" in line]
    return {a.strip(): {b.strip() for b in targets.split("&")} for a, targets in arrows}


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    return {module: list_imports(module) for module in FILES}


@pytest.fixture(scope="module")
def arrows(imports: dict[str, set[str]]) -> set[tuple[str, str]]:
    """From room to room."""
    return {
        (name_room(a), name_room(b)) for a, targets in imports.items() for b in targets if name_room(a) != name_room(b)
    }


def reach(start: str, arrows: dict[str, set[str]]) -> set[str]:
    """Return all that arrows lead to."""
    return arrows.get(start, set()).union(*(reach(below, arrows) for below in arrows.get(start, set())))


def test_imports_run_as_the_picture_says(arrows: set[tuple[str, str]]) -> None:
    picture = read_picture()
    assert list(TopologicalSorter(picture).static_order())  # an arrow up would close a circle
    assert set(picture).union(*picture.values()) == {name_room(module) for module in FILES}
    assert {(a, b) for a, b in arrows if b not in reach(a, picture)} == set(), "imported, and not in the picture"
    assert {(a, b) for a in picture for b in picture[a]} <= arrows, "in the picture, and not imported"


def test_no_module_imports_itself_round_a_corner(imports: dict[str, set[str]]) -> None:
    assert list(TopologicalSorter(imports).static_order())


@pytest.mark.parametrize("room", STRICT)
def test_some_rooms_import_less(room: str, arrows: set[tuple[str, str]]) -> None:
    assert {b for a, b in arrows if a == room} <= STRICT[room]


def test_tables_of_results_and_of_methods_need_no_torch(imports: dict[str, set[str]]) -> None:
    needed = {module for module in FILES if name_room(module) in ("results", "methods", "hparams", "arguments")}
    needed = needed.union(*(reach(module, imports) for module in needed))
    assert not [module for module in needed if re.search(r"^\s*(import|from) torch", FILES[module].read_text(), re.M)]


def test_root_is_small() -> None:
    assert len(list((ROOT / PACKAGE).glob("*.py"))) <= 8


def test_no_file_is_long() -> None:
    assert not {module for module, path in FILES.items() if len(path.read_text().splitlines()) > MOST_LINES}


def list_strings(path: Path) -> Iterator[str]:
    """Yield the strings of a file's code, without docstrings."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_methods_are_known_by_their_rows_alone() -> None:
    name = re.compile(rf"\b({'|'.join(METHODS.keys() - {PLAIN})})\b")
    knowing = {
        module
        for module, path in FILES.items()
        if name_room(module) not in ("algorithms", "methods", "benchmark") and any(map(name.search, list_strings(path)))
    }
    assert not knowing
