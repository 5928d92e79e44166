"""Odd folders of images: taken right, or refused by name; never with silent wrong labels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from daft_domainbed import plugin
from daft_domainbed.embedded import datasets
from daft_domainbed.embedded.image_folder import Found, list_notes, walk_images
from daft_domainbed.embedded.pixels import convert_to_rgb
from daft_domainbed.errors import UsageError
from daft_domainbed.host import contract

PLAIN = {"data_augmentation": False, "input_size": 8}


@pytest.fixture
def birds(make_folder: Callable[..., Path]) -> Path:
    """Two pictures of each class in each of three domains."""
    return make_folder("birds", {domain: ["cat", "dog"] for domain in "abc"})


def read(path: Path) -> Any:
    """Build a data set, and read every image of it."""
    dataset = datasets.get_dataset_class(f"folder:{path}")(None, [0], PLAIN)
    for env in dataset:
        for i in range(len(env)):
            assert env[i][1] == env.classes.index(Path(env.samples[i][0]).relative_to(env.root).parts[0])
    return dataset


def describe(dataset: Any) -> tuple[list[str], list[list[str]], list[int]]:
    return (
        [Path(env.root).name for env in dataset.datasets],
        [env.classes for env in dataset.datasets],
        [len(env) for env in dataset.datasets],
    )


def put(folder: Path, name: str = "0.png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / name)


LITTER = [
    ".ipynb_checkpoints",
    "__MACOSX",
    ".git",
    ".Trash-1000",
    "@eaDir",
    "lost+found",
    "$RECYCLE.BIN",
    "__pycache__",
]


@pytest.mark.parametrize("litter", LITTER)
@pytest.mark.parametrize("where", ["", "a", "a/cat", "c", "c/dog"])
def test_litter_is_no_domain_no_class_and_no_sample(birds: Path, litter: str, where: str) -> None:
    whole = describe(read(birds))
    put(birds / where / litter)
    put(birds / where / litter / "cat")
    for name in ("._0.png", ".hidden.jpg"):
        (birds / where / name).write_bytes(b"no image")
    (birds / where / "Thumbs.db").write_bytes(b"")
    assert describe(read(birds)) == whole
    assert list_notes("birds", read(birds)) == []


def test_upstreams_sets_of_image_folders_have_no_litter_either(
    upstream: SimpleNamespace, make_folder: Callable[..., Path]
) -> None:
    pacs = make_folder("PACS", {domain: ["dog", "horse"] for domain in "ACPS"})
    host = contract.find_host("upstream")
    original = upstream.datasets.MultipleEnvironmentImageFolder.__init__
    plugin.register(host)
    try:
        kind = contract.get_dataset_class(host, "PACS")
        whole = kind(str(pacs.parent), [0], PLAIN)
        put(pacs / ".ipynb_checkpoints")
        put(pacs / "P" / "__MACOSX")
        put(pacs / "C" / "dog", "._0.png")
        dataset = kind(str(pacs.parent), [0], PLAIN)
        assert describe(dataset) == describe(whole)
        assert all(contract.is_plain_folder(env) for env in dataset)
        deep = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)
        Image.fromarray(deep).save(dataset[0].samples[0][0])
        assert len(np.unique(np.asarray(dataset[0].loader(dataset[0].samples[0][0])))) == 256
        put(pacs / "C" / "mule")
        with pytest.raises(UsageError, match="domains 'A' and 'C' differ in the classes mule"):
            kind(str(pacs.parent), [0], PLAIN)
    finally:
        plugin.unregister(host)
    assert upstream.datasets.MultipleEnvironmentImageFolder.__init__ is original


# What makes a folder no data set, and what the line says.
Change = Callable[[Path], object]
REFUSED: dict[str, tuple[Change, str]] = {
    "a class too many": (lambda root: put(root / "b/eel"), "domains 'a' and 'b' differ in the classes eel"),
    "a class too few": (lambda root: shutil.rmtree(root / "c/dog"), "domains 'a' and 'c' differ in the classes dog"),
    "an empty class": (lambda root: [path.unlink() for path in (root / "b/dog").iterdir()], "'dog' has no images"),
    "a class of other files": (
        lambda root: [path.rename(path.with_suffix(".gif")) for path in (root / "b/dog").iterdir()],
        r"'dog' has no images \(2 files \(\.gif 2\) were left out for their ending",
    ),
    "other case": (lambda root: (root / "c/dog").rename(root / "c/Dog"), "differ in the classes Dog, dog"),
    "other Unicode": (
        lambda root: ((root / "a/dog").rename(root / "a/caf\u00e9"), (root / "b/dog").rename(root / "b/cafe\u0301")),
        r"differ in the classes 'cafe\\u0301', 'caf\\xe9'",
    ),
    "a link that leads up": (
        lambda root: os.symlink("..", root / "a/cat/up"),
        "a/cat/up is a link to .*which contains",
    ),
    "a link to itself": (lambda root: os.symlink(".", root / "a/cat/same"), "a/cat/same is a link"),
    "links in a circle": (
        lambda root: (os.symlink("../../b/cat", root / "a/cat/x"), os.symlink("../../a/cat", root / "b/cat/y")),
        "is a link to .*which contains it",
    ),
    "a broken link to an image": (lambda root: os.symlink("gone.png", root / "a/cat/z.png"), "z.png is a link to gone"),
    "a broken link to a class": (lambda root: os.symlink("gone", root / "a/eel"), "eel is a link to gone"),
    "a broken link to a domain": (lambda root: os.symlink("gone", root / "d"), "d is a link to gone"),
    "a pipe": (lambda root: os.mkfifo(root / "a/cat/pipe.png"), "pipe.png is called as an image is, and is no file"),
    "an empty image": (lambda root: (root / "a/cat/0.png").write_bytes(b""), "cannot read the image .*a/cat/0.png"),
    "no image": (lambda root: (root / "a/cat/0.png").write_text("text"), "cannot read the image .*a/cat/0.png"),
    "a truncated image": (
        lambda root: (root / "a/cat/1.jpg").write_bytes((root / "a/cat/1.jpg").read_bytes()[:-99]),
        "cannot read the image .*1.jpg: .*truncated",
    ),
    "too many pixels": (
        lambda root: Image.new("1", (20_000, 20_000)).save(root / "a/cat/0.png"),
        "cannot read the image .*0.png: .*400000000 pixels",
    ),
    "no numbers": (
        lambda root: Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(root / "a/cat/0.tif"),
        "cannot read the image .*0.tif: it holds values that are no numbers",
    ),
    "splits as domains": (lambda root: (root / "a").rename(root / "Train"), "Train is called as a part"),
    "splits as classes": (
        lambda root: [(root / domain / "dog").rename(root / domain / "test") for domain in "abc"],
        "a/test is called as a part",
    ),
    "VLCS as it is downloaded": (
        lambda root: [shutil.move(root / d, root / "x" / part / d) for d in "ab" for part in ("full",)],
        "x/full is called as a part",
    ),
    "PACS with its lists": (lambda root: put(root / "splits"), "splits is called as a part"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_is_no_data_set_is_refused_by_name(birds: Path, change: str) -> None:
    apply, says = REFUSED[change]
    apply(birds)
    with pytest.raises(UsageError, match=says) as refusal:
        read(birds)
    assert str(birds) in str(refusal.value)


TAKEN: dict[str, tuple[Change, list[int], list[str]]] = {
    "a domain through a link": (
        lambda root: ((root / "a").rename(root.parent / "real"), os.symlink("../real", root / "a")),
        [4, 4, 4],
        [],
    ),
    "a file twice": (
        lambda root: os.symlink("0.png", root / "a/cat/copy.png"),
        [5, 4, 4],
        ["birds: 1 images are reached a second time through links, and count each time"],
    ),
    "folders in classes": (lambda root: put(root / "a/cat/deep/down"), [5, 4, 4], []),
    "other files": (
        lambda root: [(root / "a/cat" / name).write_text("") for name in ("x.txt", "y.TXT", "z")],
        [4, 4, 4],
        ["birds: left out for their ending: 3 files (.txt 2, no ending 1)"],
    ),
    "images beside classes": (
        lambda root: put(root / "a"),
        [4, 4, 4],
        ["birds: left out, since they lie beside the folders of classes: 1 images"],
    ),
    "bytes that are no text": (
        lambda root: os.rename(os.fsencode(root / "a/cat/0.png"), os.fsencode(root) + b"/a/cat/caf\xe9.png"),
        [4, 4, 4],
        [],
    ),
}


@pytest.mark.parametrize("change", TAKEN)
def test_what_is_a_data_set_is_taken_with_a_note(birds: Path, change: str) -> None:
    apply, lengths, notes = TAKEN[change]
    apply(birds)
    dataset = read(birds)
    assert describe(dataset)[1:] == ([["cat", "dog"]] * 3, lengths)
    assert [note.partition(" (images end")[0] for note in list_notes("birds", dataset)] == notes


def test_a_published_set_may_have_a_class_of_trains(make_folder: Callable[..., Path]) -> None:
    pacs = make_folder("PACS", {domain: ["dog", "train"] for domain in "ACPS"})
    assert describe(datasets.PACS(str(pacs.parent), [0], PLAIN))[1] == [["dog", "train"]] * 4
    shutil.move(pacs / "A" / "train", pacs / "A" / "x")
    put(pacs / "A" / "train" / "dog")
    with pytest.raises(UsageError, match="A/train is called as a part"):
        datasets.PACS(str(pacs.parent), [0], PLAIN)


def test_images_come_in_torchvisions_order(birds: Path) -> None:
    for name in ("b/2.png", "b c/3.png", "b/d/1.png", "A/9.png", "b-/0.png"):
        put((birds / "a/cat" / name).parent, Path(name).name)
    from torchvision.datasets import ImageFolder

    assert read(birds)[0].samples == ImageFolder(str(birds / "a")).samples


def test_images_of_other_endings_are_found_where_they_are_asked_for(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "0.gif")
    assert list(walk_images(tmp_path, Found(), [".gif"])) == [str(tmp_path / "0.gif")]


# --- pixels ----------------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 4096).reshape(64, 64)
DEEP: dict[str, tuple[np.ndarray, str]] = {
    "16 bits": ((65535 * RAMP).astype(np.uint16), "png"),
    "16 bits, most significant byte first": ((65535 * RAMP).astype(">u2"), "tif"),
    "12 bits of 16": ((4095 * RAMP).astype(np.uint16), "png"),
    "8 bits of 16": ((255 * RAMP).astype(np.uint16), "png"),
    "32 bits": ((65535 * RAMP).astype(np.int32), "tif"),
    "32 bits, all of them": ((2**31 - 1) * RAMP, "tif"),
    "negative": (2000 * RAMP - 1000, "tif"),
    "floats to 1": (RAMP.astype(np.float32), "tif"),
    "floats to 255": ((255 * RAMP).astype(np.float32), "tif"),
    "floats below 0": ((RAMP - 0.5).astype(np.float32), "tif"),
    "a 16-bit map": ((65535 * RAMP).astype(np.uint16), "pgm"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_images_keep_their_gray_levels(kind: str, tmp_path: Path) -> None:
    """Each is the same ramp, which comes out as the 8-bit one."""
    values, ending = DEEP[kind]
    values = values.astype(np.int32) if values.dtype == np.float64 else values
    path = tmp_path / f"x.{ending}"
    if ending == "pgm":  # which the oldest Pillow that is taken reads, and does not write
        path.write_bytes(b"P5 64 64 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    image = datasets.read_image(str(path), allow_truncated=False)
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    assert (pixels[..., 0] == pixels[..., 2]).all()
    assert np.abs(pixels[..., 0] - 255 * RAMP).max() <= 1


@pytest.mark.parametrize("value", [0, 300, -7])
def test_a_deep_image_of_one_value_is_gray(value: int) -> None:
    pixels = np.asarray(convert_to_rgb(Image.fromarray(np.full((3, 3), value, np.int32))))
    assert pixels[0, 0].tolist() == [round(255 * value / 4095) if value > 0 else 0] * 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "YCbCr"])
def test_images_of_8_bits_are_pillows(mode: str) -> None:
    image = Image.fromarray((255 * RAMP).astype(np.uint8)).convert(mode)
    assert convert_to_rgb(image).tobytes() == image.convert("RGB").tobytes()
