from __future__ import annotations

import itertools
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from daft_domainbed.embedded import datasets, domains, in_memory
from daft_domainbed.embedded.data import EMOJI_CLASSES, EMOJI_STYLES, is_unseen, load_emoji_styles
from daft_domainbed.errors import UsageError

AUGMENTED = {"data_augmentation": True}
PLAIN = {"data_augmentation": False}
IN_MEMORY = ["Debug28", "ColoredMNIST", "RotatedMNIST", "EmojiStyles", "EmojiStylesUnseen", "ColoredDigits"]
FOLDERS = {
    "VLCS": ("VLCS", "CLSV"),
    "PACS": ("PACS", "ACPS"),
    "OfficeHome": ("office_home", "ACPR"),
    "TerraIncognita": ("terra_incognita", ["L100", "L38", "L43", "L46"]),
    "DomainNet": ("domain_net", ["clip", "info", "paint", "quick", "real", "sketch"]),
}


def build(name: str, root: str | None = None, test_envs: tuple[int, ...] = (0,), **hparams: Any) -> Any:
    return datasets.get_dataset_class(name)(root, test_envs, {**AUGMENTED, **hparams})


# The contract.


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_class_attributes(name: str) -> None:
    kind = datasets.get_dataset_class(name)
    assert datasets.num_environments(name) == len(set(kind.ENVIRONMENTS))
    is_text, is_own = name == "DocRanking", name in ("EmojiStyles", "EmojiStylesUnseen", "ColoredDigits", "DocRanking")
    assert len(kind.INPUT_SHAPE) == (2 if is_text else 3)
    assert ((120 if is_text else 400, 0, True) if is_own else (5001, 8, False)) == (
        kind.N_STEPS,
        kind.N_WORKERS,
        kind.SMALL,
    )
    frequencies = dict.fromkeys(FOLDERS, 300) | {"DomainNet": 1000}
    assert frequencies.get(name, 100) == kind.CHECKPOINT_FREQ


@pytest.mark.parametrize("name", IN_MEMORY)
def test_domains_in_memory(name: str, mnist_root: str) -> None:
    dataset = build(name, mnist_root)
    assert len(dataset) == len(dataset.ENVIRONMENTS)
    assert dataset.input_shape == dataset.INPUT_SHAPE
    for env in dataset:
        x, y = env[len(env) - 1]
        assert (x.dtype, x.shape) == (torch.float32, dataset.input_shape)
        assert (y.dtype, y.shape) == (torch.int64, ())
        _, labels = env.raw(torch.arange(len(env)))
        assert labels.min() >= 0 and labels.max() < dataset.num_classes
        with pytest.raises(IndexError):
            env[len(env)]


@pytest.mark.parametrize("name", IN_MEMORY)
def test_a_batch_at_once_equals_its_samples_one_by_one(name: str, mnist_root: str) -> None:
    for env in build(name, mnist_root):
        indices = torch.randint(0, len(env), (33,))
        start = torch.get_rng_state()
        x, y = env.fetch(indices)
        end = torch.get_rng_state()
        torch.set_rng_state(start)
        samples = [env[i] for i in indices.tolist()]
        assert torch.equal(torch.get_rng_state(), end)
        assert torch.equal(torch.stack([sample[0] for sample in samples]), x)
        assert torch.equal(torch.stack([sample[1] for sample in samples]), y)


@pytest.mark.parametrize("name", IN_MEMORY)
def test_raw_is_what_is_served_without_augmentation(name: str, mnist_root: str) -> None:
    for env in build(name, mnist_root, **PLAIN):
        indices = torch.tensor([3, 0, 3])
        raw, raw_labels = env.raw(indices)
        x, y = env.fetch(indices)
        assert torch.equal(raw_labels, y)
        assert raw.dtype == (torch.uint8 if name.startswith("Emoji") else torch.float32)
        assert torch.equal(raw / 255 if raw.dtype == torch.uint8 else raw, x)


@pytest.mark.parametrize("name", ["ColoredMNIST", "RotatedMNIST", "EmojiStyles", "ColoredDigits"])
def test_images_in_memory_take_a_byte_a_pixel(name: str, mnist_root: str) -> None:
    assert {env.images.dtype for env in build(name, mnist_root)} == {torch.uint8}


@pytest.mark.parametrize("name", IN_MEMORY)
def test_seeded_says_whether_the_seed_makes_the_data(name: str, mnist_root: str) -> None:
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(build(name, mnist_root)[1].raw(torch.arange(16))[0])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2]) is not datasets.get_dataset_class(name).SEEDED


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("SVIRO", "--host upstream"),
        ("WILDSFMoW", "--host upstream"),
        ("SpawriousO2O_easy", "--host upstream"),
        ("PASC", "mean 'PACS'"),
        ("Debug", "unknown data set 'Debug'"),
        ("Dataset", "folder:PATH"),
    ],
)
def test_data_sets_that_are_not_here(name: str, answer: str) -> None:
    with pytest.raises(UsageError, match=answer):
        datasets.get_dataset_class(name)


# MNIST.


@pytest.mark.parametrize("name", ["ColoredMNIST", "RotatedMNIST"])
def test_mnist_is_never_downloaded(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data_dir"):
        build(name)
    with pytest.raises(UsageError) as error:
        build(name, str(tmp_path))
    assert str(tmp_path / "MNIST" / "raw") in str(error.value)
    assert "images-idx3" in str(error.value)
    assert "download=True" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_damaged_mnist_is_refused(mnist_root: str, tmp_path: Path) -> None:
    shutil.copytree(mnist_root, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UsageError, match="cannot read MNIST"):
        build("RotatedMNIST", str(tmp_path))


def test_rotated_mnist_deals_every_image_once_and_leaves_the_first_domain_upright(mnist_root: str) -> None:
    dataset = build("RotatedMNIST", mnist_root)
    assert [len(env) for env in dataset] == [30] * 6
    raw = Path(mnist_root, "MNIST", "raw")
    originals = {
        file.read_bytes()[16:][i * 784 : (i + 1) * 784]
        for file in raw.glob("*images*")
        for i in range(file.stat().st_size // 784)
    }
    upright = {image.numpy().tobytes() for image in dataset[0].images}
    assert len(upright) == 30
    assert upright < originals


def test_rotation_is_counter_clockwise() -> None:
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 13:15, 20:] = 255  # a hand at three o'clock
    rotated, _ = in_memory.RotatedMNIST.change(None, image, torch.zeros(1), 75)  # type: ignore[arg-type]
    rows, columns = rotated[0, 0].nonzero().float().mean(0) - 13.5
    assert torch.atan2(-rows, columns).rad2deg().item() == pytest.approx(75, abs=2)


def test_colored_digits_follow_the_rule_in_distribution() -> None:
    labels, colors, clean = [], [], []
    for seed in range(8):
        torch.manual_seed(seed)
        dataset = build("ColoredDigits")
        by_image = {image.numpy().tobytes(): digit for image, digit in zip(*dataset.read_digits(None), strict=True)}
        for env in dataset:
            channels = env.images.flatten(2).sum(2) > 0
            assert torch.equal(channels.sum(1), torch.ones(len(env)))
            colors.append(channels[:, 1])
            labels.append(env.labels.bool())
            digits = torch.stack([by_image[image.amax(0).numpy().tobytes()] for image in env.images])
            clean.append(digits < 5)
    wrong = torch.cat([a ^ b for a, b in zip(labels, clean, strict=True)]).float().mean().item()
    assert wrong == pytest.approx(0.25, abs=0.015)
    for i, share in enumerate([0.1, 0.2, 0.9]):
        misleading = torch.cat([a ^ b for a, b in zip(labels[i::3], colors[i::3], strict=True)]).float().mean().item()
        assert misleading == pytest.approx(share, abs=0.02)


def test_colored_digits_deal_all_1797() -> None:
    assert [len(env) for env in build("ColoredDigits")] == [599] * 3


def test_enlarge_is_bilinear() -> None:
    digits = torch.randint(0, 17, (50, 8, 8), dtype=torch.uint8)
    enlarged = in_memory.enlarge(digits)
    exact = F.interpolate(digits.double()[:, None] * 255 / 16, size=28, mode="bilinear")[:, 0]
    assert (enlarged - exact).abs().max() <= 0.5 + 1e-9
    assert torch.equal(in_memory.enlarge(torch.full((1, 8, 8), 8)), torch.full((1, 28, 28), 128, dtype=torch.uint8))
    assert in_memory.enlarge(torch.full((1, 8, 8), 16)).unique().tolist() == [255]


# Drawings.


def shift_and_flip_pixel_by_pixel(image: Tensor, flip: bool, down: int, right: int) -> Tensor:
    out = torch.full_like(image, 255)
    for row, column in itertools.product(range(image.shape[1]), range(image.shape[2])):
        if 0 <= row + down < image.shape[1] and 0 <= column + right < image.shape[2]:
            out[:, row + down, column + right] = image[:, row, column]
    return out.flip(2) if flip else out


@settings(max_examples=30)
@given(st.lists(st.tuples(*[st.floats(0, 1, exclude_max=True, width=32)] * 3), min_size=1, max_size=4))
def test_shift_and_flip_pixel_by_pixel(draws: list[tuple[float, float, float]]) -> None:
    images = torch.randint(0, 256, (len(draws), 3, 6, 7), dtype=torch.uint8)
    moved = domains.shift_and_flip(images, torch.tensor(draws))
    for image, result, (flip, vertical, horizontal) in zip(images, moved, draws, strict=True):
        down, right = (4 - int(np.float32(9) * np.float32(draw)) for draw in (vertical, horizontal))
        assert torch.equal(result, shift_and_flip_pixel_by_pixel(image, flip < 0.5, down, right))


def test_largest_draw_shifts_by_four() -> None:
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).expand(1, 3)
    moved = domains.shift_and_flip(image, largest)
    assert torch.equal(moved[..., :4, :4], image[..., 4:, 4:])


def test_emoji_styles_show_each_sheet_in_its_order() -> None:
    dataset = build("EmojiStyles", **PLAIN)
    sheets = load_emoji_styles()
    assert list(EMOJI_STYLES) == dataset.ENVIRONMENTS
    assert dataset.num_classes == len(EMOJI_CLASSES) == 8
    assert [len(env) for env in dataset] == [786, 786, 786, 778]
    for style, env in zip(dataset.ENVIRONMENTS, dataset, strict=True):
        assert np.array_equal(env.images.numpy(), sheets[style].images)
        assert np.array_equal(env.labels.numpy(), sheets[style].labels)


def test_emoji_styles_augment_training_domains_only() -> None:
    indices = torch.arange(100)
    for hparams, augmented in ((AUGMENTED, [False, True, False, True]), (PLAIN, [False] * 4)):
        for env, is_augmented in zip(build("EmojiStyles", test_envs=(0, 2), **hparams), augmented, strict=True):
            served = [env.fetch(indices)[0] for _ in range(2)]
            assert torch.equal(*served) is not is_augmented


def test_unseen_drawings_are_shown_in_test_domains_only() -> None:
    dataset = build("EmojiStylesUnseen", test_envs=(1, 3))
    for i, (style, env) in enumerate(zip(dataset.ENVIRONMENTS, dataset, strict=True)):
        sheet = load_emoji_styles()[style]
        shown = [j for j, code_point in enumerate(sheet.code_points) if is_unseen(code_point) == (i in (1, 3))]
        assert torch.equal(env.raw(torch.arange(len(env)))[0], torch.from_numpy(sheet.images[shown]))
    assert len(dataset[0]) + len(dataset[1]) == 786


# Image folders.


@pytest.mark.parametrize("name", FOLDERS)
def test_named_folder(name: str, make_folder: Callable[..., Path]) -> None:
    folder, domains = FOLDERS[name]
    root = str(make_folder(folder, {domain: ["b", "a"] for domain in domains}).parent)
    dataset = build(name, root)
    assert list(domains) == dataset.ENVIRONMENTS
    assert (len(dataset), dataset.num_classes, dataset.input_shape) == (len(domains), 2, (3, 224, 224))
    x, y = dataset[0][3]
    assert x.shape == dataset.input_shape
    assert y == 1
    assert Path(dataset[0].samples[3][0]) == Path(root, folder, domains[0], "b", "1.jpg")


def test_folder_pixels_are_imagenet_normalised(pacs_root: str) -> None:
    env = build("PACS", pacs_root)[0]
    Image.new("RGB", (10, 20), (255, 0, 51)).save(env.samples[0][0])
    expected = (torch.tensor([1, 0, 0.2]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(env[0][0], expected[:, None, None].expand(3, 224, 224))


def test_folders_augment_training_domains_only(pacs_root: str) -> None:
    for hparams, augmented in ((AUGMENTED, [False, True, True, True]), (PLAIN, [False] * 4)):
        for env, is_augmented in zip(build("PACS", pacs_root, **hparams), augmented, strict=True):
            assert torch.equal(env[0][0], env[0][0]) is not is_augmented


def test_named_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="PACS is read from files: say where with --data_dir"):
        build("PACS")
    with pytest.raises(UsageError, match=str(tmp_path / "PACS")):
        build("PACS", str(tmp_path))


def test_named_folder_with_a_domain_too_few(pacs_root: str) -> None:
    shutil.rmtree(Path(pacs_root, "PACS", "P"))
    with pytest.raises(UsageError, match="A, C, S: expected 4"):
        build("PACS", pacs_root)


def test_own_folder(make_folder: Callable[..., Path]) -> None:
    path = make_folder("own", {"sun": ["x", "y", "z"], "rain": ["z", "y", "x"], ".cache": []})
    kind = datasets.get_dataset_class(f"folder:{path}")
    assert kind.__name__ == f"folder:{path}"
    assert kind.ENVIRONMENTS == ["rain", "sun"]
    assert (kind.CHECKPOINT_FREQ, kind.N_WORKERS, kind.INPUT_SPEC, kind.SEEDED) == (300, 8, "imagenet", False)
    assert datasets.num_environments(f"folder:{path}") == 2
    dataset = kind(None, [0], AUGMENTED)
    assert (dataset.input_shape, dataset.num_classes) == ((3, 224, 224), 3)
    small = kind(None, [0], {**AUGMENTED, "input_size": 32})
    assert small.input_shape == (3, 32, 32)
    assert {env[0][0].shape for env in small} == {(3, 32, 32)}
    assert torch.equal(pickle.loads(pickle.dumps(small[0]))[0][0], small[0][0][0])


def test_own_folder_may_be_relative(make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_folder("own", {"a": ["x", "y"], "b": ["x", "y"]})
    monkeypatch.chdir(path.parent)
    kind = datasets.get_dataset_class("folder:own")
    monkeypatch.chdir("/")
    assert len(kind("elsewhere", [0], PLAIN)) == 2


@pytest.mark.parametrize(
    ("domains", "answer"),
    [
        ({}, "no folder"),
        ({"a": ["x"]}, "1 domain folders"),
        ({"a": ["x", "y"], "b": ["x", "z"]}, "'a' and 'b' differ in the classes y, z"),
        ({"a": ["x", "y"], "b": ["x", "y"], "c": ["y"]}, "'a' and 'c' differ in the classes x"),
    ],
)
def test_own_folder_that_is_no_data_set(
    domains: dict[str, list[str]], answer: str, make_folder: Callable[..., Path]
) -> None:
    with pytest.raises(UsageError, match=answer):
        datasets.image_folder_class(str(make_folder("own", domains)))


def test_own_folder_that_is_empty(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 domain folders"):
        datasets.image_folder_class(str(tmp_path))


@pytest.mark.parametrize("classes", [[], ["x"]])
def test_own_folder_without_images(classes: list[str], tmp_path: Path) -> None:
    for domain in "ab":
        Path(tmp_path, domain, *classes).mkdir(parents=True)
    with pytest.raises(UsageError, match=f"no data set in {tmp_path}/a: .* class"):
        datasets.image_folder_class(str(tmp_path))(None, [0], PLAIN)


def cut(path: str) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:-40])


def fill_with_text(path: str) -> None:
    Path(path).write_text("no image")


def empty(path: str) -> None:
    Path(path).write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, fill_with_text, empty, os.remove])
@pytest.mark.parametrize("i", [0, 1])
def test_broken_image_is_named(damage: Callable[[str], None], i: int, pacs_root: str) -> None:
    own = datasets.image_folder_class(str(Path(pacs_root, "PACS")))(None, [0], PLAIN)
    path = own[0].samples[i][0]
    published = build("PACS", pacs_root, **PLAIN)
    damage(path)
    with pytest.raises(UsageError, match=f"image {path}"):
        own[0][i]
    if damage is cut:
        assert published[0][i][0].shape == (3, 224, 224)
    else:
        with pytest.raises(UsageError, match=f"image {path}"):
            published[0][i]


# Equality with upstream.


def test_names_left_to_upstream_are_upstreams(upstream: SimpleNamespace) -> None:
    own = {"EmojiStyles", "EmojiStylesUnseen", "ColoredDigits"}
    assert {*datasets.DATASETS, *datasets.UPSTREAM_DATASETS} - own == set(upstream.datasets.DATASETS) - own


@pytest.mark.parametrize("name", ["Debug28", "Debug224", "RotatedMNIST", "ColoredMNIST", *FOLDERS])
def test_class_attributes_equal_upstream(upstream: SimpleNamespace, name: str) -> None:
    ours, theirs = (host.get_dataset_class(name) for host in (datasets, upstream.datasets))
    for attribute in ("ENVIRONMENTS", "N_STEPS", "CHECKPOINT_FREQ", "N_WORKERS"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)


@pytest.mark.parametrize("name", ["Debug28", "Debug224", "RotatedMNIST", "ColoredMNIST"])
def test_data_in_memory_equal_upstream(
    upstream: SimpleNamespace, name: str, mnist_root: str, assert_equal_samples: Callable[..., None]
) -> None:
    built, states = [], []
    for host in (datasets, upstream.datasets):
        torch.manual_seed(11)
        built.append(host.get_dataset_class(name)(mnist_root, [0], AUGMENTED))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert_equal_samples(*built)
    for ours, theirs in zip(*built, strict=True):
        x, y = ours.raw(torch.arange(len(ours)))
        assert torch.equal(x, theirs.tensors[0])
        assert torch.equal(y, theirs.tensors[1])
        assert (x.dtype, y.dtype) == (theirs.tensors[0].dtype, theirs.tensors[1].dtype)


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("hparams", [AUGMENTED, PLAIN])
def test_image_folders_equal_upstream(
    upstream: SimpleNamespace,
    name: str,
    hparams: dict[str, Any],
    make_folder: Callable[..., Path],
    assert_equal_samples: Callable[..., None],
) -> None:
    folder, domains = FOLDERS[name]
    root = str(make_folder(folder, {domain: ["dog", "horse"] for domain in domains}).parent)
    built = [host.get_dataset_class(name)(root, [1], hparams) for host in (datasets, upstream.datasets)]
    python_state = random.getstate()
    assert_equal_samples(*built)
    assert random.getstate() == python_state
    for ours, theirs in zip(*built, strict=True):
        assert [(Path(path), y) for path, y in ours.samples] == [(Path(path), y) for path, y in theirs.samples]


def test_truncated_images_equal_upstream(upstream: SimpleNamespace, pacs_root: str) -> None:
    built = [host.PACS(pacs_root, [0], PLAIN) for host in (datasets, upstream.datasets)]
    cut(built[0][0].samples[1][0])
    assert torch.equal(built[0][0][1][0], built[1][0][1][0])
