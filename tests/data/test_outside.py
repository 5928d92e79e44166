from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from daft_domainbed.data.outside import OutsideStream, choose_source, is_source
from daft_domainbed.embedded.data import load_digits, load_emoji_styles
from daft_domainbed.errors import UsageError
from daft_domainbed.functional.input_spec import INPUT_SPECS

UNIT, IMAGENET = INPUT_SPECS["unit"], INPUT_SPECS["imagenet"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of one colour each, in folders whose names mean nothing, and a file that is none."""
    for i, color in enumerate(["red", "lime", "blue"]):
        path = tmp_path / "any" / f"{i}" / f"{i}.PNG"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), color).save(path)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.mark.parametrize("source", ["noise", "digits", "emoji"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (2, 28, 28), (3, 48, 40)])
def test_images_have_the_data_sets_shape_and_range(source: str, shape: tuple[int, ...]) -> None:
    images = OutsideStream(source, shape, UNIT, seed=0).draw(16)
    assert images.shape == (16, *shape)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.flatten(1).std(dim=1).min() > 0


def test_images_are_normalised_as_the_data_set_is() -> None:
    pixels = OutsideStream("emoji", (3, 32, 32), UNIT, seed=0).draw(4)
    normalised = OutsideStream("emoji", (3, 32, 32), IMAGENET, seed=0).draw(4)
    torch.testing.assert_close(normalised * IMAGENET.get_std(pixels) + IMAGENET.get_mean(pixels), pixels)


def test_emoji_are_the_packages_own() -> None:
    known = {image.tobytes() for sheet in load_emoji_styles().values() for image in sheet.images}
    drawn = (255 * OutsideStream("emoji", (3, 32, 32), UNIT, seed=1).draw(20)).round().byte().numpy()
    assert all(image.tobytes() in known for image in drawn)


def test_digits_are_ink_on_white_paper() -> None:
    drawn = OutsideStream("digits", (1, 8, 8), UNIT, seed=0).draw(5)
    known = {image.tobytes() for image in load_digits()[0]}
    assert all(np.round(16 - 16 * image).astype(np.uint8).tobytes() in known for image in drawn.numpy()[:, 0])
    assert drawn.mean() > 0.5


def test_a_folders_images_are_read_whatever_its_subfolders(folder: Path) -> None:
    images = OutsideStream(f"folder:{folder}", (3, 4, 4), UNIT, seed=0).draw(40)
    colors = {tuple(image[:, 0, 0].tolist()) for image in images}
    assert colors == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
    assert (images == images[:, :, :1, :1]).all()


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no image below"):
        OutsideStream(f"folder:{tmp_path}", (3, 4, 4), UNIT, seed=0)


@pytest.mark.parametrize("source", ["noise", "digits"])
def test_a_stream_goes_on_where_its_state_says(source: str) -> None:
    stream, twin = (OutsideStream(source, (3, 8, 8), UNIT, seed) for seed in (0, 1))
    before = torch.get_rng_state()
    first = stream.draw(4)
    twin.load_state_dict(stream.state_dict())
    second = stream.draw(4)
    assert torch.equal(twin.draw(4), second)
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_is_what_the_data_set_is_not() -> None:
    assert choose_source("auto", (3, 32, 32)) == choose_source("auto", (3, 224, 224)) == "digits"
    assert choose_source("auto", (1, 28, 28)) == "emoji"
    assert choose_source("noise", (1, 28, 28)) == "noise"


@pytest.mark.parametrize("value", ["auto", "noise", "digits", "emoji", "folder:x"])
def test_sources_are_accepted(value: str) -> None:
    assert is_source(value) is None


@pytest.mark.parametrize("value", ["folder:", "cifar", "", 3, None])
def test_other_sources_are_refused(value: object) -> None:
    assert "folder:PATH" in str(is_source(value))
