from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, RandomHorizontalFlip, ToTensor

from daft_domainbed.embedded.datasets import DrawingsDomain, InMemoryDomain, image_folder_class
from daft_domainbed.embedded.misc import SplitDataset
from daft_domainbed.errors import UsageError
from daft_domainbed.loaders import make_eval_stream, make_stream
from daft_domainbed.randomness import preserve_states, seed_everything


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with preserve_states():
        seed_everything(0)
        yield


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
