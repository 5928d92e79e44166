"""Transforms in two halves against torchvision's in one: the same numbers, and the same random states after them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision import transforms

from daft_domainbed.data.augmentation import split_transform
from daft_domainbed.embedded.datasets import build_transform

FINISH = [transforms.ToTensor(), transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])]
FRACTIONS = st.floats(0, 1)


@st.composite
def images(draw: st.DrawFn) -> Image.Image:
    width, height = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@st.composite
def augmentations(draw: st.DrawFn) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                draw(st.one_of(st.integers(1, 40), st.tuples(st.integers(1, 40), st.integers(1, 40)))),
                scale=sorted(draw(st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)))),
                ratio=sorted(draw(st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)))),
                interpolation=draw(st.sampled_from([transforms.InterpolationMode.BILINEAR, Image.Resampling.BICUBIC])),
            ),
            transforms.RandomHorizontalFlip(draw(FRACTIONS)),
            transforms.ColorJitter(draw(FRACTIONS), draw(FRACTIONS), draw(FRACTIONS), draw(st.floats(0, 0.5))),
            transforms.RandomGrayscale(draw(FRACTIONS)),
            *FINISH,
        ]
    )


def apply_in_halves(transform: transforms.Compose, image: Image.Image) -> Tensor:
    halves = split_transform(transform)
    assert halves is not None
    drawn = halves.draw(image.height, image.width) if halves.draws else None
    out = torch.full((3, halves.height, halves.width), torch.nan)
    state = torch.get_rng_state()
    halves.apply(image, drawn, out.numpy())
    assert torch.equal(torch.get_rng_state(), state)
    return out


def compare(transform: transforms.Compose, image: Image.Image, seed: int) -> None:
    torch.manual_seed(seed)
    expected, state = transform(image), torch.get_rng_state()
    torch.manual_seed(seed)
    assert torch.equal(apply_in_halves(transform, image), expected)
    assert torch.equal(torch.get_rng_state(), state)


@given(augmentations(), images(), st.integers(0, 2**31))
def test_augmentation_is_torchvisions(transform: transforms.Compose, image: Image.Image, seed: int) -> None:
    compare(transform, image, seed)


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), images())
def test_resizing_is_torchvisions_and_draws_nothing(size: tuple[int, int], image: Image.Image) -> None:
    compare(transforms.Compose([transforms.Resize(size), *FINISH]), image, seed=0)


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("size", [(227, 227), (500, 333), (150, 640), (224, 224)])
def test_domainbeds_own_transforms(augment: bool, size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    for seed in range(4):
        image = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
        compare(build_transform(224, augment), image, seed)


def test_jitter_that_leaves_something_alone_draws_less() -> None:
    parts = build_transform(16, augment=True).transforms
    parts[2] = transforms.ColorJitter(brightness=0.2, hue=0.1)
    compare(transforms.Compose(parts), Image.new("RGB", (20, 20), (9, 99, 199)), seed=1)


class Brighter(transforms.ColorJitter):
    """Somebody's own, which may do anything."""


AUGMENTED, PLAIN = (build_transform(16, augment).transforms for augment in (True, False))


@pytest.mark.parametrize(
    "transform",
    [
        None,
        transforms.ToTensor(),
        transforms.Compose([transforms.Resize(16), *FINISH]),  # the other side follows from the image
        transforms.Compose([*AUGMENTED[:2], Brighter(0.3), *AUGMENTED[3:]]),
        transforms.Compose([AUGMENTED[0], AUGMENTED[2], AUGMENTED[1], *AUGMENTED[3:]]),
        transforms.Compose([*PLAIN[:2], transforms.Normalize([0.5], [0.5])]),
        transforms.Compose([transforms.Resize((16, 16)), *AUGMENTED]),
        transforms.Compose(AUGMENTED[:-1]),
        torch.nn.Sequential(*AUGMENTED[:4]),
    ],
)
def test_any_other_transform_is_left_whole(transform: Any) -> None:
    assert split_transform(transform) is None


def test_numbers_in_another_precision_are_left_to_torchvision() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert split_transform(build_transform(16, augment=True)) is None
    finally:
        torch.set_default_dtype(torch.float32)
