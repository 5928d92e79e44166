from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from daft_domainbed.data.left_out import find_places, leave_out, list_classes
from daft_domainbed.embedded.datasets import get_dataset_class
from daft_domainbed.errors import UsageError

EMOJI = ["animal", "building", "clothing", "face", "food", "object", "plant", "vehicle"]


def build(name: str) -> Any:
    return get_dataset_class(name)(None, [0], {"data_augmentation": True, "input_size": 16})


class Tensors(list[TensorDataset]):
    """As DomainBed's own MNIST sets: tensors, and no names."""

    num_classes = 3


def build_tensors() -> Tensors:
    return Tensors([TensorDataset(torch.arange(6.0), torch.tensor([0, 1, 2, 2, 1, 0])) for _ in range(2)])


def test_classes_have_names_or_numbers(image_folder: Path) -> None:
    assert list_classes(build("EmojiStyles")) == EMOJI
    assert list_classes(build(f"folder:{image_folder}")) == ["x", "y"]
    assert list_classes(build_tensors()) == ["0", "1", "2"]


def test_drawings_of_a_class_are_gone_and_labels_close_the_gap() -> None:
    whole, left = build("EmojiStyles"), build("EmojiStyles")
    leave_out(left, ["building", "plant"])
    assert left.num_classes == 6
    assert list_classes(left) == [name for name in EMOJI if name not in ("building", "plant")]
    for before, after in zip(whole, left, strict=True):
        kept = ~torch.isin(before.labels, torch.tensor([1, 6]))
        assert torch.equal(before.images[kept], after.images)
        names = [EMOJI[label] for label in before.labels[kept].tolist()]
        assert names == [list_classes(left)[label] for label in after.labels.tolist()]
    assert list_classes(whole) == EMOJI  # the class itself is as it was


def test_files_of_a_class_are_gone(tmp_path: Path, image_folder: Path) -> None:
    for env in "abc":
        (image_folder / env / "y").rename(image_folder / env / "z")
        (image_folder / env / "y").mkdir()
        first = sorted((image_folder / env / "x").iterdir())[0]
        first.rename(image_folder / env / "y" / first.name)
    left = build(f"folder:{image_folder}")
    leave_out(left, ["x"])
    for env in left:
        assert env.classes == ["y", "z"]
        assert {Path(path).parent.name: label for path, label in env.samples} == {"y": 0, "z": 1}
        assert env.targets == [label for _, label in env.samples]
        assert [env[i][1] for i in range(len(env))] == env.targets


def test_tensors_of_a_class_are_gone() -> None:
    left = build_tensors()
    leave_out(left, ["1"])
    assert left.num_classes == 2
    assert [tensor.tolist() for tensor in left[0].tensors] == [[0, 2, 3, 5], [0, 1, 1, 0]]


@pytest.mark.parametrize(
    ("names", "said"),
    [(["animals"], "Did you mean 'animal'"), (EMOJI[1:], "two are needed"), (["9"], "They are animal")],
)
def test_what_cannot_be_left_out_is_refused(names: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        leave_out(build("EmojiStyles"), names)


def test_labels_that_nothing_tells_are_refused() -> None:
    with pytest.raises(UsageError, match="SimpleNamespace"):
        find_places(SimpleNamespace(), [0])
