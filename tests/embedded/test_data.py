"""The embedded images: what datasets.md promises about them, checked against the files."""

from __future__ import annotations

import hashlib
import io
import json
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from daft_domainbed.embedded.data import (
    EMOJI_CLASSES,
    EMOJI_STYLES,
    EmojiSheet,
    is_unseen,
    load_digits,
    load_emoji_styles,
)

DRAWINGS = {
    "animal": 143,
    "building": 59,
    "clothing": 47,
    "face": 119,
    "food": 124,
    "object": 193,
    "plant": 29,
    "vehicle": 72,
}
ABSENT_FROM_CONTRAST = {"animal": 1, "face": 2, "food": 1, "object": 3, "plant": 1}
DATA = files("daft_domainbed.embedded.data")


@pytest.fixture(params=EMOJI_STYLES)
def sheet(request: pytest.FixtureRequest) -> EmojiSheet:
    return load_emoji_styles()[request.param]


def test_styles_come_in_a_fixed_order() -> None:
    assert list(load_emoji_styles()) == ["noto", "twemoji", "openmoji", "contrast"]


def test_classes_are_sorted() -> None:
    assert list(EMOJI_CLASSES) == sorted(DRAWINGS)


@pytest.mark.parametrize("style", EMOJI_STYLES)
def test_drawings_by_class(style: str) -> None:
    absent = ABSENT_FROM_CONTRAST if style == "contrast" else {}
    counts = np.bincount(load_emoji_styles()[style].labels, minlength=len(EMOJI_CLASSES))
    assert counts.tolist() == [DRAWINGS[name] - absent.get(name, 0) for name in EMOJI_CLASSES]


def test_there_are_3136_images() -> None:
    assert sum(len(sheet.images) for sheet in load_emoji_styles().values()) == 3136


def test_arrays_agree_and_have_the_promised_types(sheet: EmojiSheet) -> None:
    count = len(sheet.code_points)
    assert sheet.images.shape == (count, 3, 32, 32)
    assert sheet.images.dtype == np.uint8
    assert sheet.labels.shape == (count,)
    assert sheet.labels.dtype == np.int64
    assert len(set(sheet.code_points)) == count


def test_arrays_are_read_only(sheet: EmojiSheet) -> None:
    with pytest.raises(ValueError, match="read-only"):
        sheet.images[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        sheet.labels[0] = 0


def test_no_drawing_is_blank_and_pixels_span_the_range(sheet: EmojiSheet) -> None:
    assert (sheet.images.reshape(len(sheet.images), -1).std(axis=1) > 10).all()
    assert sheet.images.max() == 255
    assert sheet.images.min() < 16


def test_background_is_white(sheet: EmojiSheet) -> None:
    corners = sheet.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all(axis=1).mean() > 0.7


def test_tiles_lie_row_by_row_on_the_sheet() -> None:
    sheet = load_emoji_styles()["noto"]
    image = Image.open(io.BytesIO(DATA.joinpath("noto.webp").read_bytes()))
    for place in (0, 1, 31, 32, 785):
        left, top = 32 * (place % 32), 32 * (place // 32)
        tile = np.asarray(image.crop((left, top, left + 32, top + 32)))
        np.testing.assert_array_equal(sheet.images[place], tile.transpose(2, 0, 1))


def test_contrast_is_black_on_white_and_the_others_are_coloured() -> None:
    for style, sheet in load_emoji_styles().items():
        grey = (sheet.images == sheet.images[:, :1]).all()
        assert grey == (style == "contrast")
    dark_or_light = np.abs(load_emoji_styles()["contrast"].images.astype(int) - 127.5) > 63
    assert dark_or_light.mean() > 0.8


def test_a_code_point_has_one_class_in_every_style() -> None:
    by_style = [dict(zip(sheet.code_points, sheet.labels, strict=True)) for sheet in load_emoji_styles().values()]
    noto, twemoji, openmoji, contrast = by_style
    assert noto == twemoji == openmoji
    assert contrast.items() < noto.items()


@pytest.mark.parametrize(
    ("emoji", "name"),
    [
        ("🐧", "animal"),
        ("🏰", "building"),
        ("🧦", "clothing"),
        ("🤠", "face"),
        ("🍉", "food"),
        ("🔑", "object"),
        ("🌵", "plant"),
        ("🚀", "vehicle"),
    ],
)
def test_well_known_drawings_are_in_their_class(emoji: str, name: str) -> None:
    for sheet in load_emoji_styles().values():
        assert EMOJI_CLASSES[sheet.labels[sheet.code_points.index(f"{ord(emoji):X}")]] == name


@pytest.mark.parametrize(
    ("emoji", "colour"),
    [("🍅", "red"), ("🥒", "green"), ("🌐", "blue")],
)
def test_drawings_have_the_colour_of_what_they_show(emoji: str, colour: str) -> None:
    for style in ("noto", "twemoji", "openmoji"):
        sheet = load_emoji_styles()[style]
        drawing = sheet.images[sheet.code_points.index(f"{ord(emoji):X}")]
        assert ["red", "green", "blue"][int(drawing.mean(axis=(1, 2)).argmax())] == colour


def test_the_nearest_silhouette_in_another_style_is_often_the_sibling() -> None:
    """By chance it is one time in 778; a sheet shifted against its index would do no better."""
    styles = load_emoji_styles()
    common = styles["contrast"].code_points
    ink = {}
    for style in ("noto", "twemoji"):
        place = {code_point: i for i, code_point in enumerate(styles[style].code_points)}
        drawings = styles[style].images[[place[code_point] for code_point in common]]
        coverage = (255.0 - drawings.mean(axis=1)).reshape(len(common), -1)
        coverage -= coverage.mean(axis=1, keepdims=True)
        ink[style] = coverage / np.linalg.norm(coverage, axis=1, keepdims=True)
    nearest = (ink["noto"] @ ink["twemoji"].T).argmax(axis=1)
    assert (nearest == np.arange(len(common))).mean() > 0.1


def test_is_unseen_is_the_stated_hash() -> None:
    for code_point in load_emoji_styles()["noto"].code_points:
        digest = hashlib.sha256(code_point.lower().encode()).digest()
        assert is_unseen(code_point) == (int.from_bytes(digest, "big") % 100 < 30)


@pytest.mark.parametrize(
    ("code_point", "unseen"),
    [("1F427", True), ("1F3F0", True), ("1f408-200d-2b1b", True), ("1F349", False), ("1F636-200D-1F32B-FE0F", False)],
)
def test_the_split_never_moves(code_point: str, unseen: bool) -> None:
    assert is_unseen(code_point) == unseen


def test_unseen_share_is_near_30_percent_in_all_and_in_each_class() -> None:
    sheet = load_emoji_styles()["noto"]
    unseen = np.array([is_unseen(code_point) for code_point in sheet.code_points])
    assert unseen.sum() == 236
    assert unseen.mean() == pytest.approx(0.30, abs=0.005)
    for label in range(len(EMOJI_CLASSES)):
        assert 0.2 < unseen[sheet.labels == label].mean() < 0.4


def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    images, labels = load_digits()
    np.testing.assert_array_equal(images, original.images)
    np.testing.assert_array_equal(labels, original.target)


def test_digits_shapes_values_and_classes() -> None:
    images, labels = load_digits()
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 16)
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert not images.flags.writeable
    assert not labels.flags.writeable


def test_digits_first_image_is_upright() -> None:
    """The first digit of the UCI test set, a zero, as the UCI file lists it."""
    images, labels = load_digits()
    assert labels[0] == 0
    assert images[0, :2].tolist() == [[0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]]


def test_every_source_is_credited() -> None:
    credits = DATA.joinpath("LICENSES").read_text("utf-8")
    for phrase in (
        *(f"{style}.webp" for style in EMOJI_STYLES),
        "digits.png",
        "index.json",
        "Copyright 2013 Google, Inc.",
        "Twitter, Inc and other contributors",
        "All emojis designed by OpenMoji",
        "Copyright (c) Microsoft Corporation",
        "Alpaydin",
        "https://creativecommons.org/licenses/by/4.0/",
        "https://creativecommons.org/licenses/by-sa/4.0/",
        "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION",
        "Permission is hereby granted, free of charge",
    ):
        assert phrase in credits


def test_files_are_small_and_the_index_names_nothing_else() -> None:
    sizes = {file.name: len(file.read_bytes()) for file in DATA.iterdir() if file.name != "__pycache__"}
    assert max(sizes.values()) < 2**20
    assert sum(sizes.values()) < 3e6
    index = json.loads(DATA.joinpath("index.json").read_text("utf-8"))
    assert list(index["code_points"]) == list(EMOJI_CLASSES)
    assert list(index["absent"]) == list(EMOJI_STYLES)
