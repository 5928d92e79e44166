import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from daft_domainbed.feature_memory import FeatureMemory


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


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=40), min_size=1, max_size=5))
def test_answers_as_the_encoder_does_and_asks_it_once_an_image(batches: list[list[int]]) -> None:
    memory, encoder = FeatureMemory(), Encoder()
    for values in batches:
        features = memory.recall(make_images(values), encoder)
        assert features.tolist() == [[4.0 * value] * 3 for value in values]
    assert len(encoder.seen) == len(set(encoder.seen)) == len({value for values in batches for value in values})


def test_is_bounded_and_forgets_the_oldest() -> None:
    memory, encoder = FeatureMemory(max_bytes=2 * 3 * 4), Encoder()  # two images' features of 3 floats
    memory.recall(make_images([1, 2, 3]), encoder)
    memory.recall(make_images([2, 3]), encoder)
    assert encoder.seen == [4.0, 8.0, 12.0]
    memory.recall(make_images([1]), encoder)
    assert encoder.seen == [4.0, 8.0, 12.0, 4.0]


def test_what_was_kept_before_does_not_change_a_bit() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5)).eval()
    images = torch.rand(40, 3, 8, 8)
    whole = FeatureMemory().recall(images, network)
    memory = FeatureMemory()
    memory.recall(images[5:9], network)
    memory.recall(images[20:37], network)
    assert torch.equal(memory.recall(images, network), whole)
