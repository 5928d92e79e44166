"""Build DocRanking's texts from the documentation of installed packages, byte for byte as committed.

    python -m tools.build_documents           write daft_domainbed/embedded/data/documents.json.xz
    python -m tools.build_documents --check   compare with what is committed instead of writing

Needs the versions that VERSIONS names. A pair is the summary line of a docstring and the text below it, without the
summary where it is repeated. Of each package the pairs whose names have the smallest hashes are taken.
LICENSES, beside the data, is written by hand: it credits every package that is read here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import lzma
import pkgutil
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from daft_domainbed.embedded.documents import N_CANDIDATES, N_WORDS, list_words

FILE = Path(__file__).resolve().parents[1] / "daft_domainbed" / "embedded" / "data" / "documents.json.xz"
VERSIONS = {"python": "3.11.7", "numpy": "2.4.6", "scipy": "1.17.1", "sklearn": "1.9.1"}
MOST_PAIRS = 520
FEWEST_WORDS = 16  # of a document
QUERY_WORDS = range(3, 17)
# Of the standard library: what opens windows or web pages, prints when it is imported, or is no library.
LEFT_OUT = {"antigravity", "ensurepip", "idlelib", "lib2to3", "test", "this", "tkinter", "turtle", "turtledemo"}
# Public modules that only the packages' own tests or builds use, or copies of other packages.
INNER = {"conftest", "distutils", "externals", "f2py", "setup", "testing", "tests"}
K1, B = 1.5, 0.75

Pair = dict[str, Any]


def list_modules(package: str) -> list[str]:
    """Return the names of a package's public modules."""
    if package == "python":
        roots = [name for name in sorted(sys.stdlib_module_names) if name[0] != "_" and name not in LEFT_OUT]
    else:
        roots = [package]
    return [name for root in roots for name in _walk(root)]


def _walk(name: str) -> Iterator[str]:
    module = _import(name)
    if module is None:
        return
    yield name
    for info in sorted(pkgutil.iter_modules(getattr(module, "__path__", [])), key=lambda info: info.name):
        if not info.name.startswith("_") and info.name not in INNER:
            yield from _walk(f"{name}.{info.name}")


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit):  # of another system, or in need of something that is not installed
        return None


def list_docstrings(package: str) -> Iterator[tuple[str, str]]:
    """Yield name and docstring of a package's modules, functions, classes and methods, none twice."""
    seen: set[int] = set()

    def is_new(item: Any) -> bool:
        found = id(item) not in seen
        seen.add(id(item))
        return found and isinstance(getattr(item, "__doc__", None), str)

    for module_name in list_modules(package):
        module = _import(module_name)
        yield from [(module_name, inspect.getdoc(module) or "")]
        for name, item in sorted(vars(module).items()):
            if name.startswith("_") or not _belongs(item, package, module_name) or not is_new(item):
                continue
            yield f"{module_name}.{name}", inspect.cleandoc(item.__doc__)
            for inner, value in sorted(vars(item).items()) if inspect.isclass(item) else ():
                function = getattr(value, "__func__", getattr(value, "fget", value))
                if not inner.startswith("_") and inspect.isroutine(function) and is_new(function):
                    yield f"{module_name}.{name}.{inner}", inspect.cleandoc(function.__doc__ or "")


def _belongs(item: Any, package: str, module: str) -> bool:
    if not (inspect.isclass(item) or inspect.isroutine(item) or type(item).__name__ == "ufunc"):
        return False
    home = str(getattr(item, "__module__", None) or module)
    return home.split(".")[0] == (module.split(".")[0] if package == "python" else package)


def make_pair(name: str, docstring: str) -> Pair | None:
    """Return the query and the text of a docstring, or None where it has no summary or hardly a text."""
    parts = docstring.split("\n\n")
    if "(" in parts[0].split(" ")[0]:  # the signature, as functions written in C show it
        parts = parts[1:]
    query, *rest = (" ".join(part.split()) for part in parts or [""])
    text = _shorten(" ".join(rest).replace(query, " ")) if query else ""
    if len(list_words(query)) not in QUERY_WORDS or len(list_words(text)) < FEWEST_WORDS:
        return None
    return {"name": name, "query": query, "text": text}


def _shorten(text: str) -> str:
    """Return the beginning of a text, as much as is read of it."""
    parts = text.split()
    enough = next((n for n in range(len(parts)) if len(list_words(" ".join(parts[:n]))) >= N_WORDS), len(parts))
    return " ".join(parts[:enough])


def list_pairs(package: str) -> list[Pair]:
    """Return a package's pairs, no query and no text twice, in the order of their names."""
    queries, texts, pairs = set(), set(), []
    for name, docstring in list_docstrings(package):
        pair = make_pair(name, docstring)
        if pair is None:
            continue
        query, text = (tuple(list_words(pair[part])[:N_WORDS]) for part in ("query", "text"))
        if query not in queries and text not in texts:
            queries.add(query)
            texts.add(text)
            pairs.append(pair)
    chosen = sorted(pairs, key=lambda pair: _hash(pair["name"]))[:MOST_PAIRS]
    return sorted(chosen, key=lambda pair: pair["name"])


def _hash(*words: Any) -> str:
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()


def add_candidates(pairs: list[Pair]) -> None:
    """Give each pair its list: its own document and those that BM25 finds best for its query, shuffled by a hash."""
    counts = [Counter(list_words(pair["text"])[:N_WORDS]) for pair in pairs]
    lengths = np.array([sum(count.values()) for count in counts])
    places: dict[str, list[int]] = {}
    for i, count in enumerate(counts):
        for word in count:
            places.setdefault(word, []).append(i)
    for i, pair in enumerate(pairs):
        scores = np.zeros(len(pairs))
        for word in list_words(pair["query"]):
            found = np.array(places.get(word, []), int)
            weight = np.log1p((len(pairs) - len(found) + 0.5) / (len(found) + 0.5))
            tf = np.array([counts[j][word] for j in found])
            scores[found] += weight * tf / (tf + K1 * (1 - B + B * lengths[found] / lengths.mean()))
        order = sorted(range(len(pairs)), key=lambda j: (-round(float(scores[j]), 9), _hash(pair["name"], j)))
        others = [j for j in order if j != i][: N_CANDIDATES - 1]
        pair["candidates"] = sorted([i, *others], key=lambda j: _hash(pair["name"], "list", j))


def build() -> str:
    """Return the content of the file: a line a pair."""
    packages = {}
    for package in VERSIONS:
        packages[package] = pairs = list_pairs(package)
        add_candidates(pairs)
        print(f"{package}: {len(pairs)} pairs", file=sys.stderr)
    lines = {
        package: ",\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)
        for package, pairs in packages.items()
    }
    content = ",\n".join(f'"{package}": [\n{text}\n]' for package, text in lines.items())
    return f'{{"versions": {json.dumps(VERSIONS)},\n"packages": {{\n{content}\n}}}}\n'


def check_versions() -> None:
    """Stop where another version of a package is installed."""
    found = {"python": platform.python_version()}
    found |= {name: importlib.import_module(name).__version__ for name in VERSIONS if name != "python"}
    if found != VERSIONS:
        sys.exit(f"build_documents: found {found}, and the file is made of {VERSIONS}")


def main() -> int:
    """Write the file, or with --check compare it. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Build DocRanking's texts.")
    parser.add_argument("--check", action="store_true", help="compare with the committed file, write nothing")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    check_versions()
    text = build()
    if not args.check:
        FILE.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    elif not FILE.is_file() or lzma.decompress(FILE.read_bytes()).decode() != text:
        print(f"build_documents: {FILE.name} is built otherwise than committed.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
