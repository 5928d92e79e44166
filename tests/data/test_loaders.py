from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import RandomSampler, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, RandomHorizontalFlip, ToTensor

from daft_domainbed.data import color_jitter, image_cache
from daft_domainbed.data.loaders import make_eval_stream, make_stream
from daft_domainbed.data.streams import Stream
from daft_domainbed.embedded.datasets import build_transform, image_folder_class
from daft_domainbed.embedded.domains import DrawingsDomain, InMemoryDomain
from daft_domainbed.embedded.misc import SplitDataset
from daft_domainbed.errors import UsageError
from daft_domainbed.runtime.randomness import capture_states, restore_states, seed_everything
from tests.upstream_loader import iterate


class Brightened(TensorDataset):
    """A user's own data set, which makes something else of its tensors."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + 1, y


class OneByOne:
    """Hides from the data path that a data set could make a batch at once."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def make_drawings() -> DrawingsDomain:
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    return DrawingsDomain(images, torch.randint(0, 4, (20,)), augment=True)


def make_tensors() -> TensorDataset:
    return TensorDataset(torch.randn(20, 2, 28, 28), torch.randint(0, 2, (20,)))


def make_brightened() -> TensorDataset:
    return Brightened(*make_tensors().tensors)


@pytest.mark.parametrize("make_data", [make_drawings, make_tensors, make_brightened])
@pytest.mark.parametrize("make", [lambda split: make_stream(split, 6, 0), lambda split: make_eval_stream(split, 0)])
def test_batches_made_at_once_equal_samples_made_one_by_one(
    make_data: Callable[[], Any], make: Callable[[Any], Iterator[Any]]
) -> None:
    data, keys = make_data(), list(range(19, 2, -1))
    batches = []
    for wrap in (lambda data: data, OneByOne):
        seed_everything(1)
        stream = make(SplitDataset(wrap(data), keys))
        batches.append([next(stream) for _ in range(4)])
    for (x, y), (other_x, other_y) in zip(*batches, strict=True):
        assert x.dtype == other_x.dtype
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


def test_evaluation_batches_hold_64_samples_of_the_split_alone() -> None:
    data = InMemoryDomain(torch.arange(200.0).view(200, 1, 1, 1), torch.arange(200))
    keys = list(range(50, 150))
    batches = [y for _, y in make_eval_stream(SplitDataset(data, keys), num_workers=2)]
    assert [len(y) for y in batches] == [64, 36]
    assert sorted(torch.cat(batches).tolist()) == keys


def test_only_what_may_draw_in_a_worker_has_its_states_kept() -> None:
    in_memory = make_stream(SplitDataset(make_tensors(), list(range(20))), 4, num_workers=2)
    on_disk = make_stream(SplitDataset(OneByOne(make_tensors()), list(range(20))), 4, num_workers=2)
    assert (in_memory.draws, on_disk.draws) == (False, True)


def write_folder(root: Path) -> Path:
    """Two domains of two classes; the one picture of domain b, class y, is cut short."""
    for domain in "ab":
        for label in "xy":
            folder = root / domain / label
            folder.mkdir(parents=True)
            Image.fromarray(np.full((40, 40, 3), 90, dtype=np.uint8)).save(folder / "1.jpg")
    broken = root / "b" / "y" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    return broken


def test_broken_image_is_named_whoever_reads_it(tmp_path: Path) -> None:
    broken = write_folder(tmp_path)
    ours = image_folder_class(str(tmp_path))(None, [], {"data_augmentation": True, "input_size": 32})
    theirs = ImageFolder(str(tmp_path / "b"), Compose([RandomHorizontalFlip(), ToTensor()]))  # as upstream reads
    for data in (ours[1], theirs):
        stream = make_eval_stream(SplitDataset(data, [1]), num_workers=2)
        with pytest.raises(UsageError) as error:
            next(stream)
        assert str(broken) in str(error.value)
        assert "\n" not in str(error.value)


def test_error_of_a_data_set_without_files_is_its_own() -> None:
    class Failing:
        def __getitem__(self, index: int) -> Any:
            raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        next(make_stream(SplitDataset(Failing(), [0]), 1, 0))


# --- image folders: batches are drawn for in order, and computed on other threads ------------------------------------


PALETTE_WARNING = "ignore:Palette images with Transparency:UserWarning"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 12 pictures of all sizes and of every mode and format that a folder may hold."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("RGB", "jpg", {}),
        ("L", "jpg", {}),
        ("CMYK", "jpg", {}),
        ("RGB", "jpeg", {"exif": exif, "quality": 50, "progressive": True}),
        ("P", "png", {"transparency": 3}),
        ("P", "png", {"transparency": bytes(range(256))}),
        ("RGBA", "png", {}),
        ("LA", "png", {}),
        ("1", "png", {}),
        ("L", "png", {"transparency": 7}),
        ("RGB", "webp", {}),
        ("RGB", "tif", {"exif": exif}),
    ]
    for label in "xy":
        (root / label).mkdir()
        for i, (mode, suffix, options) in enumerate(kinds):
            height, width = generator.integers(5, 90, 2)
            image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
            image.convert(mode).save(root / label / f"{i:02d}.{suffix}", **options)
    return root


def make_folder(root: Path, augment: bool = True) -> ImageFolder:
    return ImageFolder(str(root), build_transform(20, augment))


def split_folder(data: Any) -> SplitDataset:
    return SplitDataset(data, [*range(23, 1, -1)])


def make_loader(split: SplitDataset, batch_size: int, training: bool, num_workers: int) -> Iterator[Any]:
    """As DomainBed makes its own, with worker processes."""
    return iterate(split, RandomSampler(split, replacement=training), batch_size, num_workers, drop_last=training)


def take(streams: list[Any], rounds: int) -> list[Tensor]:
    """Draw from several streams in turns, images and labels."""
    return [tensor for _ in range(rounds) for stream in streams for tensor in next(stream)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        assert our.dtype == their.dtype
        assert torch.equal(our, their), f"tensor {i}"


@pytest.mark.filterwarnings(PALETTE_WARNING)
@pytest.mark.parametrize("code", ["compiled", "torchvision"])
@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("augment", [True, False])
def test_folders_batches_are_those_of_worker_processes(
    code: str, is_cached: bool, augment: bool, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if code == "torchvision":
        monkeypatch.setattr(color_jitter, "load_compiled", lambda: None)
    data = make_folder(pictures, augment)
    if is_cached:
        image_cache.cache_images([data], tmp_path, print)
    ours, theirs = split_folder(data), split_folder(make_folder(pictures, augment))
    seed_everything(3)
    loaders = [make_loader(theirs, 5, True, 2), make_loader(theirs, 64, False, 2)]
    expected, expected_next = take(loaders, 7), torch.rand(3)
    seed_everything(3)
    assert_same(take([make_stream(ours, 5, 2), make_eval_stream(ours, 2)], 7), expected)
    assert torch.equal(torch.rand(3), expected_next)


def make_plain(states: Any) -> Any:
    """Turn tensors in nested states into lists, which compare."""
    return tree_map(lambda value: value.tolist() if isinstance(value, Tensor) else value, states)


@pytest.mark.filterwarnings(PALETTE_WARNING)
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_folders_stream_is_the_plain_one_and_its_state_at_every_batch(num_workers: int, pictures: Path) -> None:
    runs = []
    for wrap in (lambda data: data, OneByOne):
        seed_everything(num_workers)
        split = split_folder(wrap(make_folder(pictures)))
        streams = [make_stream(split, 4, num_workers), make_eval_stream(split, num_workers)]
        batches, states = [], []
        for _ in range(9):
            batches += take(streams, 1)
            states.append(make_plain([stream.state_dict() for stream in streams] + [capture_states()]))
        runs.append((batches, states))
        assert (type(streams[0]) is Stream) == (wrap is OneByOne)
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


@pytest.mark.filterwarnings(PALETTE_WARNING)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_folders_saved_stream_goes_on_bit_for_bit(num_workers: int, pictures: Path) -> None:
    split = split_folder(make_folder(pictures))
    stream = make_stream(split, 4, num_workers)
    take([stream], 5)
    file = io.BytesIO()
    torch.save({"stream": stream.state_dict(), "random": capture_states()}, file)
    expected = take([stream], 6)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for other in (make_stream(split, 4, num_workers), stream):  # a fresh one, and one that has gone further
        other.load_state_dict(saved["stream"])
        restore_states(saved["random"])
        assert_same(take([other], 6), expected)


@pytest.mark.filterwarnings(PALETTE_WARNING)
def test_folders_passes_are_the_plain_ones(pictures: Path) -> None:
    passes = []
    for wrap in (lambda data: data, OneByOne):
        seed_everything(1)
        stream = make_eval_stream(split_folder(wrap(make_folder(pictures))), num_workers=2)
        stream.batches_a_pass = 3  # as of a larger split
        passes.append([tensor for _ in range(3) for batch in stream for tensor in batch])
    assert_same(*passes)


@pytest.mark.filterwarnings(PALETTE_WARNING)
@pytest.mark.parametrize("threads", [1, 3])
def test_number_of_threads_changes_no_bit(threads: int, pictures: Path) -> None:
    before, batches = torch.get_num_threads(), []
    try:
        for count in (2, threads):
            torch.set_num_threads(count)
            seed_everything(1)
            batches.append(take([make_stream(split_folder(make_folder(pictures)), 7, 2)], 5))
    finally:
        torch.set_num_threads(before)
    assert_same(*batches)


def test_image_that_changes_its_size_under_a_run_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    data = make_folder(tmp_path / "a")
    stream = make_stream(SplitDataset(data, [0]), 1, num_workers=1)
    take([stream], 2)
    Image.new("RGB", (30, 50)).save(tmp_path / "new.jpg")
    (tmp_path / "new.jpg").replace(tmp_path / "a" / "x" / "1.jpg")  # which a thread may be about to read
    with pytest.raises(UsageError, match="1.jpg has changed since the run began"):
        take([stream], 3)


def test_folder_that_serves_something_of_its_own_is_read_as_it_is(pictures: Path) -> None:
    class Own(ImageFolder):
        pass

    transform = build_transform(20, augment=True)
    for data in (
        Own(str(pictures), transform),
        ImageFolder(str(pictures), transform, target_transform=lambda label: label + 1),
        ImageFolder(str(pictures), Compose([RandomHorizontalFlip(), ToTensor()])),
        ImageFolder(str(pictures)),
        ImageFolder(str(pictures), transform, loader=lambda path: Image.open(path).convert("L").convert("RGB")),
    ):
        assert type(make_stream(split_folder(data), 4, 2)) is Stream
