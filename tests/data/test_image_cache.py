"""Files of decoded images: Pillow's pixels, made once, and never trusted further than their checksums."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from daft_domainbed.data import image_cache
from daft_domainbed.data.image_cache import CachedImages, cache_images
from daft_domainbed.embedded.datasets import image_folder_class
from daft_domainbed.errors import UsageError
from daft_domainbed.runtime import locks, stopping
from tests.processes import WarmPopen

SIZES = [(7, 5), (40, 30), (1, 1), (30, 64)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A domain of two classes of pictures."""
    root, generator = tmp_path / "domain", np.random.default_rng(0)
    for label in "xy":
        (root / label).mkdir(parents=True)
        for i, (width, height) in enumerate(SIZES):
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i}.jpg")
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def open_domain(root: Path, folder: Path) -> tuple[ImageFolder, list[str]]:
    """Return a domain that reads from its cache, and what was said meanwhile."""
    domain, said = ImageFolder(str(root)), []
    cache_images([domain], folder, said.append)
    return domain, said


def get_file(folder: Path) -> Path:
    (file,) = folder.glob("*/images")
    return file


def assert_reads_right(domain: ImageFolder) -> None:
    for path, _ in domain.samples:
        ours, theirs = domain.loader(path), default_loader(path)
        assert (ours.mode, ours.size, ours.tobytes()) == (theirs.mode, theirs.size, theirs.tobytes())


def test_images_are_pillows_and_decoded_once(root: Path, folder: Path) -> None:
    domain, said = open_domain(root, folder)
    file = get_file(folder)
    assert said == [f"decoding the 8 images of {root} into {file}"]
    assert_reads_right(domain)
    assert [path.name for path in file.parent.iterdir()] == ["images"]

    other, said = open_domain(root, folder)
    assert said == []
    for picture in root.rglob("*.jpg"):  # which nobody reads now
        times = picture.stat()
        picture.write_bytes(b"\0" * times.st_size)
        os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    for path, _ in domain.samples:
        assert other.loader(path).tobytes() == domain.loader(path).tobytes()


def test_more_images_than_are_in_memory_at_once(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert_reads_right(open_domain(root, folder)[0])


def test_folders_of_any_host_are_cached_and_nothing_else(root: Path, folder: Path) -> None:
    shutil.copytree(root, root.with_name("other"))
    (root.parent / "set").mkdir()
    for name in ("domain", "other"):
        (root.parent / name).rename(root.parent / "set" / name)
    data = image_folder_class(str(root.parent / "set"))(None, [], {"data_augmentation": True})
    memory = object()
    cache_images([*data, memory], folder, print)
    assert {path.parent.name[:-17] for path in folder.glob("*/images")} == {"domain", "other"}
    for domain in data:
        assert isinstance(domain.loader, CachedImages)
        assert_reads_right(domain)
    before = domain.loader
    cache_images(data, folder, print)
    assert domain.loader is before


def change_pixels(root: Path) -> None:
    Image.new("RGB", SIZES[0]).save(root / "x" / "0.jpg")


def change_time(root: Path) -> None:
    os.utime(root / "x" / "0.jpg", (1, 1))


def add(root: Path) -> None:
    Image.new("RGB", (3, 3)).save(root / "y" / "9.jpg")


def rename(root: Path) -> None:
    (root / "x" / "0.jpg").rename(root / "x" / "00.jpg")


@pytest.mark.parametrize("change", [change_pixels, change_time, add, rename])
def test_changed_folder_has_a_file_of_its_own(change: Any, root: Path, folder: Path) -> None:
    open_domain(root, folder)
    change(root)
    domain, said = open_domain(root, folder)
    assert len(said) == 1
    assert len(list(folder.glob("*/images"))) == 2
    assert_reads_right(domain)


def test_another_decoder_has_a_file_of_its_own(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_domain(root, folder)
    monkeypatch.setattr(image_cache.PIL, "__version__", "0.1")
    assert len(open_domain(root, folder)[1]) == 1


def test_moved_folder_keeps_its_file(root: Path, folder: Path) -> None:
    open_domain(root, folder)
    elsewhere = root.parent / "elsewhere" / "domain"
    elsewhere.parent.mkdir()
    root.rename(elsewhere)
    domain, said = open_domain(elsewhere, folder)
    assert said == []
    assert_reads_right(domain)


@pytest.mark.parametrize("kept", [0, 1, 39, 40, 100, 136, -1])
def test_file_cut_short_is_made_anew(kept: int, root: Path, folder: Path) -> None:
    open_domain(root, folder)
    file = get_file(folder)
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    domain, said = open_domain(root, folder)
    assert len(said) == 1
    assert file.read_bytes() == content
    assert_reads_right(domain)


@pytest.mark.parametrize("place", [0, 8, 40, 135])
def test_file_with_a_damaged_table_is_made_anew(place: int, root: Path, folder: Path) -> None:
    open_domain(root, folder)
    file = get_file(folder)
    damage(file, place)
    domain, said = open_domain(root, folder)
    assert len(said) == 1
    assert_reads_right(domain)


def damage(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_damaged_image_is_read_from_its_own_file(root: Path, folder: Path) -> None:
    open_domain(root, folder)
    file = get_file(folder)
    damage(file, 136 + 7 * 5 * 3 + 1000)  # in the second image
    domain, said = open_domain(root, folder)
    assert said == []
    for _ in range(2):  # but reported once
        assert_reads_right(domain)
    second = root / "x" / "1.jpg"
    assert said == [f"{file} is damaged, at {second} at least: delete it, the next run makes it anew"]


def test_broken_image_is_named_and_leaves_nothing(root: Path, folder: Path) -> None:
    broken = root / "y" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(UsageError, match=rf"^broken image {broken} .*: mend or remove it$"):
        open_domain(root, folder)
    assert [path for path in folder.rglob("*") if path.is_file()] == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_full_disk_leaves_nothing_half_made(root: Path, folder: Path) -> None:
    open_domain(root, folder)
    file = get_file(folder)
    file.unlink()
    (file.parent / ".images.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        open_domain(root, folder)
    assert caught.value.errno == errno.ENOSPC
    assert list(file.parent.iterdir()) == []
    assert_reads_right(open_domain(root, folder)[0])


def test_what_a_killed_process_left_does_not_matter(root: Path, folder: Path) -> None:
    open_domain(root, folder)
    file = get_file(folder)
    file.rename(file.parent / ".images.tmp")
    (file.parent / locks.LOCK_FILE).write_text("{}")  # of a process long dead
    os.utime(file.parent / locks.LOCK_FILE, (1, 1))
    domain, said = open_domain(root, folder)
    assert len(said) == 1
    assert_reads_right(domain)
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("path", ["/dev/null/cache", "file"])
def test_folder_that_cannot_be_made_is_named(path: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / path
    with pytest.raises(UsageError, match=rf"^--image_cache {folder} cannot be used \(.*\): choose another$"):
        open_domain(root, folder)


# Waits until the other one is ready, too, then makes the cache, and leaves what was said and read.
MAKER = """
import json, sys, time
from pathlib import Path
from tests.data.test_image_cache import open_domain
root, folder, place, name = Path({root!r}), Path({folder!r}), Path({place!r}), {name!r}
(place / f"{{name}}.ready").touch()
while len(list(place.glob("*.ready"))) < 2:
    time.sleep(0.001)
domain, said = open_domain(root, folder)
pixels = [domain.loader(path).tobytes().hex() for path, _ in domain.samples]
(place / f"{{name}}.json").write_text(json.dumps([said, pixels]))
"""


def test_two_processes_make_it_once(
    root: Path, folder: Path, tmp_path: Path, start_script: Callable[[str], WarmPopen]
) -> None:
    places = {"root": str(root), "folder": str(folder), "place": str(tmp_path)}
    processes = [start_script(MAKER.format(**places, name=name)) for name in ("a", "b")]
    assert [process.wait(120) for process in processes] == [0, 0]
    (said, pixels), (others, same) = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("a", "b"))
    assert len([text for text in said + others if text.startswith("decoding")]) == 1
    assert pixels == same == [default_loader(path).tobytes().hex() for path, _ in ImageFolder(str(root)).samples]


def test_process_that_waits_can_be_stopped(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_domain(root, folder)
    get_file(folder).unlink()
    (place,) = folder.iterdir()
    monkeypatch.setattr(stopping, "_requested", 15)
    with locks.claim(place), pytest.raises(stopping.Stopped, match="waiting for another process"):
        open_domain(root, folder)
