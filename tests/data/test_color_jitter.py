"""Pixels against torchvision's own functions on Pillow images, bit for bit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from daft_domainbed.data import color_jitter
from daft_domainbed.data.color_jitter import BRIGHTNESS, CONTRAST, GRAYSCALE, HUE, SATURATION, Step, render

FINISH = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
VALUES = np.arange(256, dtype=np.uint8).repeat(3).reshape(256, 1, 3)
TABLE = FINISH(VALUES)[:, :, 0].contiguous().numpy()
CODE = {"compiled": color_jitter.load_compiled(), "torchvision": color_jitter._render_with_torchvision}

STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([BRIGHTNESS, CONTRAST, SATURATION]), st.floats(0, 3, width=32)),
        st.tuples(st.just(HUE), st.floats(-0.5, 0.5)),
        st.just((GRAYSCALE, 0.0)),
    ),
    max_size=6,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a process that has loaded nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    color_jitter.load_compiled.cache_clear()
    yield tmp_path / "daft_domainbed"
    color_jitter.load_compiled.cache_clear()


def render_with(code: str, image: Image.Image, steps: list[Step], is_mirrored: bool) -> torch.Tensor:
    out = np.empty((3, image.height, image.width), dtype=np.float32)
    if CODE[code] is None:
        pytest.skip("no C compiler here")
    CODE[code](image, steps, is_mirrored, TABLE, out)
    return torch.from_numpy(out)


def follow(image: Image.Image, steps: list[Step], is_mirrored: bool) -> torch.Tensor:
    """As upstream's transform does it: mirrored first."""
    if is_mirrored:
        image = functional.hflip(image)
    for kind, by in steps:
        if kind == GRAYSCALE:
            image = functional.rgb_to_grayscale(image, num_output_channels=3)
        else:
            adjust = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")[kind]
            image = getattr(functional, adjust)(image, by)
    return FINISH(image)


def make_image(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise, with a part of one colour and a part in black and white."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[: height // 4] = pixels[0, 0]
    pixels[height // 2 :, : width // 3] = pixels[height // 2 :, : width // 3, :1] // 128 * 255
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def test_there_is_compiled_code_where_there_is_a_compiler() -> None:
    assert (CODE["compiled"] is not None) == (shutil.which("cc") is not None)


@pytest.mark.parametrize("code", CODE)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(1, 40), STEPS, st.booleans())
def test_every_number_is_torchvisions(
    code: str, seed: int, width: int, height: int, steps: list[Step], is_mirrored: bool
) -> None:
    image = make_image(seed, width, height)
    assert torch.equal(render_with(code, image, steps, is_mirrored), follow(image, steps, is_mirrored))


@pytest.mark.parametrize("by", [0.0, 0.3, -0.17])
def test_hue_of_every_colour_is_pillows(by: float) -> None:
    colours = np.arange(2**24, dtype="<u4").view(np.uint8).reshape(4096, 4096, 4)[..., :3]
    for part in np.array_split(colours, 16):  # bounds the memory
        image = Image.fromarray(np.ascontiguousarray(part))
        ours = render_with("compiled", image, [(HUE, by)], False)
        turned = np.asarray(functional.adjust_hue(image, by))
        expected = np.stack([TABLE[channel].take(turned[..., channel]) for channel in range(3)])
        assert np.array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("kind", [BRIGHTNESS, CONTRAST, SATURATION])
def test_blending_by_every_kind_of_factor_is_pillows(kind: int) -> None:
    image = make_image(1, 97, 61)
    for by in (0.0, 1e-6, 0.5, 1.0, 1.0000001, 254.9, 1e6):
        assert torch.equal(render_with("compiled", image, [(kind, by)], False), follow(image, [(kind, by)], False))


def test_another_mode_of_three_channels_is_left_to_torchvision() -> None:
    image, steps = make_image(3, 20, 10, mode="YCbCr"), [(CONTRAST, 0.8), (BRIGHTNESS, 1.2)]
    out = np.empty((3, 10, 20), dtype=np.float32)
    render(image, steps, True, TABLE, out)
    assert torch.equal(torch.from_numpy(out), follow(image, steps, True))


def test_library_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if color_jitter.load_compiled() is None:
        pytest.skip("no C compiler here")
    (library,) = cache.iterdir()
    color_jitter.load_compiled.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert color_jitter.load_compiled() is not None
    assert list(cache.iterdir()) == [library]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "an 'unbalanced quote"])
def test_without_a_compiler_numbers_are_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("CC", compiler)
    assert color_jitter.load_compiled() is None
    image, steps = make_image(5, 30, 20), [(HUE, 0.1), (CONTRAST, 1.2)]
    out = np.empty((3, 20, 30), dtype=np.float32)
    render(image, steps, False, TABLE, out)
    assert torch.equal(torch.from_numpy(out), follow(image, steps, False))
    assert list(cache.glob("*")) == []


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_what_is_left_of_a_library_is_compiled_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert color_jitter.load_compiled() is not None
    (library,) = cache.iterdir()
    color_jitter.load_compiled.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "other"))
    other = cache.parent / "other" / cache.name / library.name
    other.parent.mkdir(parents=True)
    other.touch()
    assert color_jitter.load_compiled() is not None
    assert other.stat().st_size > 0


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
@pytest.mark.parametrize("is_folder", [True, False])
def test_a_library_that_others_could_have_written_is_not_loaded(cache: Path, is_folder: bool) -> None:
    assert color_jitter.load_compiled() is not None
    color_jitter.load_compiled.cache_clear()
    (library,) = cache.iterdir()
    (cache if is_folder else library).chmod(0o777)
    assert color_jitter.load_compiled() is None


def test_a_cache_folder_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.write_text("a file")
    assert color_jitter.load_compiled() is None


COMPILER = """#!{python}
import subprocess, sys
*flags, source, _, made = sys.argv[1:]
text = open(source).read()
assert {old!r} in text
with open({copy!r}, "w") as file:
    file.write(text.replace({old!r}, {new!r}))
sys.exit(subprocess.run(["cc", *flags, {copy!r}, "-o", made]).returncode)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
@pytest.mark.parametrize(
    ("old", "new"),
    [("0x8000", "0x7000"), ("/ 6.0 +", "/ 6.1 +"), ("from + by", "from + 1.001f * by"), ("? 255 :", "? 254 :")],
)
def test_code_with_other_numbers_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> None:
    compiler = cache.parent / "compiler"
    compiler.write_text(
        COMPILER.format(python=sys.executable, old=old, new=new, copy=str(cache.parent / "color_jitter.c"))
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert color_jitter.load_compiled() is None
    assert len(list(cache.iterdir())) == 1  # it was compiled
