"""Which files below a folder are images of which class: hidden folders and litter never count, links are followed."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from daft_domainbed.errors import UsageError

# What systems and tools leave behind, beside all that is hidden by a leading dot; in lower case.
_LITTER = {
    "__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information",
    "thumbs.db", "desktop.ini",
}  # fmt: skip
_SPLITS = {"train", "test", "val", "crossval", "full", "kfold", "splits"}  # what layers of parts are called


def is_litter(name: str) -> bool:
    """Return whether a file or folder is hidden, or left behind by a system.

    Example:
        >>> [is_litter(name) for name in (".ipynb_checkpoints", "__MACOSX", "._0.png", "Thumbs.db", "cat")]
        [True, True, True, True, False]
    """
    return name.startswith(".") or name.lower() in _LITTER


@dataclass
class Found:
    """What was found below a folder beside its images.

    Attributes:
        left_out: How many files were left out for their ending, by ending.
        beside: How many images lie beside the folders of classes or domains, where they belong to none.
        has_links: Whether any folder or file is a link.
    """

    left_out: Counter[str] = field(default_factory=Counter)
    beside: int = 0
    has_links: bool = False


def list_folders(path: str | Path, found: Found | None = None) -> list[str]:
    """Return the sorted names of the folders in a folder.

    Args:
        path: The folder.
        found: To which is added what else lies there.

    Raises:
        UsageError: A link in it leads nowhere.
    """
    found = Found() if found is None else found
    names = []
    for entry in _scan(path):
        found.has_links |= entry.is_symlink()
        if entry.is_dir():
            names.append(entry.name)
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            found.beside += 1
    return sorted(names)


def list_domains(path: Path, *, is_own: bool) -> list[str]:
    """Return the sorted names of the domains in a folder.

    Args:
        path: It should hold <domain>/<class>/<image>.
        is_own: Whether it is the user's own; a published set may have a class that is called as a layer of parts is.

    Raises:
        UsageError: There are fewer than two, they differ in their classes, or a folder is one of train, test, ...
    """
    if not path.is_dir():
        raise UsageError(f"no folder {path}: it should hold <domain>/<class>/<image>")
    domains = list_folders(path)
    classes = {domain: list_folders(path / domain) for domain in domains}
    for domain in domains:
        _refuse_split(path / domain)
        for name in classes[domain]:
            if is_own or not _holds_images(path / domain / name):
                _refuse_split(path / domain / name)
    if len(domains) < 2:
        raise UsageError(f"{path} has {len(domains)} domain folders (<domain>/<class>/<image>): at least 2 are needed")
    for domain in domains[1:]:
        if differing := sorted({*classes[domain]} ^ {*classes[domains[0]]}):
            raise UsageError(
                f"{path}: domains {domains[0]!r} and {domain!r} differ in the classes {_tell_apart(differing)}; "
                "every domain needs a folder for each class"
            )
    return domains


def _refuse_split(path: Path) -> None:
    if path.name.lower() in _SPLITS:
        raise UsageError(
            f"{path} is called as a part of a data set is, where a domain or a class should be: images belong into "
            "<domain>/<class>/<image>, so put the parts together, or call the folder otherwise"
        )


def _holds_images(path: Path) -> bool:
    return any(entry.is_file() for entry in _scan(path))


def _tell_apart(names: Sequence[str]) -> str:
    """Return names with commas between them; those that look alike are spelt out."""
    look_alike = len({unicodedata.normalize("NFC", name) for name in names}) < len(names)
    return ", ".join(map(ascii, names) if look_alike else names)


def walk_images(top: str | Path, found: Found, endings: Iterable[str] = IMG_EXTENSIONS) -> Iterator[str]:
    """Yield the paths of the image files below a folder, in torchvision's order: by folder, then by name.

    Args:
        top: The folder, whose own name does not matter.
        found: To which is added what else lies there.
        endings: Of the names of images, in lower case.

    Raises:
        UsageError: A folder contains itself through a link, a link leads nowhere, or an image is no file.
    """
    for folder, names in sorted(_walk(os.fspath(top), (os.path.realpath(top),), found, tuple(endings))):
        yield from (os.path.join(folder, name) for name in sorted(names))


def _walk(
    folder: str, above: tuple[str, ...], found: Found, endings: tuple[str, ...]
) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder with the names of its images; `above` are the real paths of those that it was reached by."""
    names: list[str] = []
    yield folder, names
    for entry in _scan(folder):
        found.has_links |= entry.is_symlink()
        if entry.is_dir():
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
            if entry.is_symlink() and any(f"{path}/".startswith(f"{real}/") for path in above):
                raise UsageError(f"{entry.path} is a link to {real}, which contains it: remove the link")
            yield from _walk(entry.path, (*above, real), found, endings)
        elif not entry.name.lower().endswith(endings):
            found.left_out[os.path.splitext(entry.name)[1].lower() or "no ending"] += 1
        elif entry.is_file():
            names.append(entry.name)
        else:
            raise UsageError(f"{entry.path} is called as an image is, and is no file: remove it")


def _scan(path: str | Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        for entry in entries:
            if is_litter(entry.name):
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):
                raise UsageError(f"{entry.path} is a link to {os.readlink(entry.path)}, which is not there: mend it")
            yield entry


class ImageDomain(ImageFolder):
    """One domain: image files in <class>/, as torchvision's ImageFolder has them, but for hidden files and litter.

    Raises:
        UsageError: A class has no image.
    """

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the classes, and their numbers."""
        self.found = Found()
        classes = list_folders(directory, self.found)
        if not classes:
            raise UsageError(f"no data set in {directory}: it has no class folders (<domain>/<class>/<image>)")
        return classes, {name: i for i, name in enumerate(classes)}

    def make_dataset(  # static there
        self, directory: str | Path, class_to_idx: dict[str, int], **options: Any
    ) -> list[tuple[str, int]]:
        """Return the path and the class of every image."""
        samples = []
        for name, label in class_to_idx.items():
            found = Found()
            paths = list(walk_images(os.path.join(directory, name), found))
            if not paths:
                why = f"{_count(found.left_out)} were left out for their ending" if found.left_out else "it is empty"
                raise UsageError(
                    f"no data set in {directory}: the class {name!r} has no images ({why}; images end in "
                    f"{', '.join(IMG_EXTENSIONS)})"
                )
            samples += [(path, label) for path in paths]
            self.found.left_out += found.left_out
            self.found.has_links |= found.has_links
        return samples


def identify(domains: Iterable[Any]) -> str:
    """Return a hash of which files the domains of an image folder have: of relative names and sizes.

    No image is read, and the place where the folder lies does not count.

    Raises:
        OSError: A file has gone.
    """
    digest = hashlib.sha256()
    for domain in domains:
        start = len(os.path.dirname(domain.root))
        for path, _ in domain.samples:
            digest.update(f"{path[start:]} {os.stat(path).st_size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def list_notes(name: str, domains: Iterable[Any]) -> list[str]:
    """Return what a user should know of a folder of images: what was left out, and what is there twice.

    Args:
        name: Of the data set.
        domains: Its domains; those that are no folders of images have nothing to say.
    """
    folders = [domain for domain in domains if isinstance(domain, ImageDomain)]
    left_out = sum((domain.found.left_out for domain in folders), Counter[str]())
    beside = sum(domain.found.beside for domain in folders)
    notes = []
    if left_out:
        notes.append(
            f"{name}: left out for their ending: {_count(left_out)} (images end in {', '.join(IMG_EXTENSIONS)})"
        )
    if beside:
        notes.append(f"{name}: left out, since they lie beside the folders of classes: {beside} images")
    if any(domain.found.has_links for domain in folders):
        times = Counter(os.path.realpath(path) for domain in folders for path, _ in domain.samples)
        if twice := sum(count - 1 for count in times.values()):
            notes.append(f"{name}: {twice} images are reached a second time through links, and count each time")
    return notes


def _count(endings: Counter[str]) -> str:
    more = f" ({', '.join(f'{ending} {count}' for ending, count in endings.most_common(5))})"
    return f"{endings.total()} files{more}"
