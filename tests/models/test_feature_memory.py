import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from daft_domainbed.models import feature_memory
from daft_domainbed.models.feature_memory import FeatureMemory


class Encoder:
    """Sums each image, and remembers how many images it was given that were no padding."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, images: Tensor) -> Tensor:
        sums = images.flatten(1).sum(dim=1, keepdim=True)
        self.seen += sorted({value.item() for value in sums})
        return sums.expand(-1, 3).clone()


def make_images(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()


def make_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)).eval()


BATCHES = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=40, unique=True), min_size=1, max_size=5)


@given(BATCHES)
def test_answers_as_the_encoder_does_and_asks_it_once_an_image(batches: list[list[int]]) -> None:
    memory, encoder = FeatureMemory(), Encoder()
    for values in batches:
        features = memory.recall(make_images(values), encoder)
        assert features.tolist() == [[4.0 * value] * 3 for value in values]
    assert len(encoder.seen) == len(set(encoder.seen)) == len({value for values in batches for value in values})


def test_is_bounded_and_forgets_what_was_asked_for_longest_ago() -> None:
    memory, encoder = FeatureMemory(max_bytes=2 * (1024 + 3 * 4)), Encoder()  # two images' features of 3 floats
    memory.recall(make_images([1, 2, 3]), encoder)
    memory.recall(make_images([2, 3]), encoder)
    assert encoder.seen == [4.0, 8.0, 12.0]
    memory.recall(make_images([2]), encoder)
    memory.recall(make_images([1]), encoder)
    assert encoder.seen == [4.0, 8.0, 12.0, 4.0]
    memory.recall(make_images([2]), encoder)
    assert encoder.seen == [4.0, 8.0, 12.0, 4.0]
    memory.recall(make_images([3]), encoder)
    assert encoder.seen == [4.0, 8.0, 12.0, 4.0, 12.0]


def test_where_nothing_recurs_nothing_is_kept_until_something_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_memory, "_PATIENCE", 4)
    memory, encoder = FeatureMemory(), Encoder()
    memory.recall(make_images([1, 2]), encoder)
    memory.recall(make_images([3, 4]), encoder)  # one too many
    assert [kept is not None for kept in memory._kept.values()] == [True, True, False, False]
    memory.recall(make_images([3, 5]), encoder)  # 3 comes again
    assert encoder.seen == [4.0, 8.0, 12.0, 16.0, 12.0, 20.0]
    memory.recall(make_images([5, 3, 1]), encoder)
    assert encoder.seen == [4.0, 8.0, 12.0, 16.0, 12.0, 20.0]


@given(BATCHES)
def test_patience_changes_no_answer(batches: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_memory, "_PATIENCE", 5)
        memory, encoder = FeatureMemory(max_bytes=10 * (1024 + 3 * 4)), Encoder()
        for values in batches:
            features = memory.recall(make_images(values), encoder)
            assert features.tolist() == [[4.0 * value] * 3 for value in values]
            assert len(memory._kept) <= 10


def test_images_that_differ_in_one_number_are_told_apart() -> None:
    memory, encoder = FeatureMemory(), Encoder()
    image = torch.zeros(1, 3, 40, 40)
    other = image.clone()
    other[0, 2, 39, 38] = 1  # which is not in the sample
    for _ in range(2):
        assert memory.recall(image, encoder)[0, 0] == 0
        assert memory.recall(other, encoder)[0, 0] == 1


def test_images_of_one_batch_may_be_the_same() -> None:
    memory, encoder = FeatureMemory(), Encoder()
    for _ in range(2):
        assert memory.recall(make_images([7, 8, 7]), encoder)[:, 0].tolist() == [28, 32, 28]


def test_features_of_one_precision_are_not_those_of_another() -> None:
    memory, network, images = FeatureMemory(), make_network(), torch.rand(3, 3, 8, 8)
    full = memory.recall(images, network)
    with torch.autocast("cpu", torch.bfloat16):
        half = memory.recall(images, network)
        assert half.dtype == torch.bfloat16
        assert torch.equal(memory.recall(images, network), half)
    assert torch.equal(memory.recall(images, network), full)
    assert memory.recall(images.bfloat16(), network.bfloat16()).dtype == torch.bfloat16


def test_what_was_kept_before_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = make_network(), torch.rand(40, 3, 8, 8)
    whole = FeatureMemory().recall(images, network)
    memory = FeatureMemory()
    memory.recall(images[5:9], network)
    memory.recall(images[20:37], network)
    assert torch.equal(memory.recall(images, network), whole)
    monkeypatch.setattr(feature_memory, "_PATIENCE", 0)
    memory = FeatureMemory()
    for _ in range(3):
        assert torch.equal(memory.recall(images, network), whole)


@pytest.mark.gpu
def test_an_accelerator_encodes_every_image() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    memory, encoder = FeatureMemory(), Encoder()
    for _ in range(2):
        memory.recall(make_images([1, 2]).cuda(), encoder)
    assert len(encoder.seen) == 4


def test_other_devices_keep_nothing() -> None:
    memory = FeatureMemory()
    assert memory.recall(torch.empty(2, 3, device="meta"), lambda images: images).device.type == "meta"
    assert not memory._kept
