"""The ranker: candidates by themselves, words by their hashes, and a host's head over lists."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from daft_domainbed.embedded.documents import load_package
from daft_domainbed.errors import UsageError
from daft_domainbed.models import ranker as ranker_file
from daft_domainbed.models.backbones import build_backbone
from daft_domainbed.models.ranker import ListHead, ListWidth, Ranker, build_head, find_ranker, moving_documents

SHAPE = (21, 40)


@pytest.fixture
def lists() -> Tensor:
    return load_package("numpy").fetch(torch.arange(6))[0]


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ranker: Any = build_backbone("ranker_w8", SHAPE)
        return nn.Sequential(ranker, build_head(make_linear, ranker.n_outputs, 20)).eval()


def make_linear(n_in: int, n_out: int, is_nonlinear: bool) -> nn.Module:
    return nn.Linear(n_in, n_out)


def test_scores_move_with_the_candidates(model: nn.Module, lists: Tensor) -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    moved = torch.cat([lists[:, :1], lists[:, 1:][:, order]], dim=1)
    torch.testing.assert_close(model(moved), model(lists)[:, order])


def test_a_score_depends_on_query_and_document_alone(model: nn.Module, lists: Tensor) -> None:
    other = lists.clone()
    other[:, 2:] = lists.flip(0)[:, 2:]
    torch.testing.assert_close(model(other)[:, 0], model(lists)[:, 0])
    assert not torch.allclose(model(other)[:, 1:], model(lists)[:, 1:])


def test_features_against_the_formula(lists: Tensor) -> None:
    torch.manual_seed(0)
    ranker = Ranker(SHAPE, 8).eval()
    nn.init.ones_(ranker.scales)
    features = ranker(lists).view(6, 20, 4)

    def encode(words: Tensor) -> Tensor:
        embedded = ranker.words.weight[[1 + int(word) % 8191 for word in words]]
        in_context = ranker.context((embedded + ranker.places[: len(words)]).unsqueeze(0))[0]
        share = 1 / (1 + torch.exp(-ranker.mix))
        unit = lambda v: v / v.norm(dim=1, keepdim=True)  # noqa: E731
        return unit(share * unit(embedded) + (1 - share) * unit(in_context))

    query, document = (row[row > 0] for row in (lists[2, 0], lists[2, 5]))
    weights = nn.functional.softplus(ranker.words.weight[1 + query % 8191] @ ranker.weigh.weight[0])
    cosines = encode(query) @ encode(document).T
    for k, centre in enumerate((0.4, 0.6, 0.8, 1.0)):
        counts = torch.exp(-((cosines - centre) ** 2) / (2 * 0.1**2)).sum(1)
        wanted = (weights * torch.log(1 + counts)).sum()
        torch.testing.assert_close(features[2, 4, k], wanted, rtol=1e-4, atol=1e-5)


def test_it_begins_by_equal_words(model: nn.Module) -> None:
    x = torch.zeros(1, 21, 40, dtype=torch.int64)
    x[0, :, :4] = torch.arange(1, 85).view(21, 4)
    x[0, 7, 2] = x[0, 0, 1]
    assert model(x).argmax() == 6


def test_documents_are_moved_inside_the_block_alone(model: nn.Module, lists: Tensor) -> None:
    before, ranker = model(lists), find_ranker(model)
    assert ranker is not None
    embedded = ranker.embed(lists[:, 1:])
    with moving_documents(model, -embedded):
        assert (model(lists) - before).abs().max() > 0.1
    with pytest.raises(ValueError), moving_documents(model, embedded):
        raise ValueError
    assert torch.equal(model(lists), before)
    assert find_ranker(nn.Linear(1, 1)) is None


def test_no_word_is_nothing(model: nn.Module, lists: Tensor) -> None:
    short = lists[:, :, :30]
    wide = torch.cat([short, torch.zeros_like(short[:, :, :10])], dim=2)
    torch.testing.assert_close(model(wide), model(short))
    assert not torch.allclose(model(lists), model(short))
    ranker = find_ranker(model)
    assert ranker is not None and not ranker.embed(torch.zeros(2, 2, dtype=torch.int64)).any()


def test_a_copy_knows_its_candidates_too(model: nn.Module, lists: Tensor) -> None:
    ranker: Any = copy.deepcopy(model)[0]
    assert (ranker.n_outputs, ranker.n_outputs.n_candidates) == (80, 20)
    assert torch.equal(copy.deepcopy(model)(lists), model(lists))


def test_every_candidate_has_one_head() -> None:
    width = ListWidth(5, 3)
    head = build_head(make_linear, width, 5)
    assert isinstance(head, ListHead) and width == 15
    features = torch.arange(30.0).view(2, 15)
    assert torch.equal(head(features), features.view(2, 5, 3).sum(2))
    assert isinstance(build_head(make_linear, 15, 5), nn.Linear)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("ranker_w32", (3, 32, 32), "'ranker_w32' takes lists of texts, and the data are images"),
        ("resnet8_w8", SHAPE, "'resnet8_w8' takes images, and the data are lists of texts"),
        ("resnet18", SHAPE, "takes images"),
        ("ranker_w7", SHAPE, "has a width of 7: it has to be a positive even number, as in 'ranker_w32'"),
        ("ranker_w0", SHAPE, "positive even number"),
    ],
)
def test_what_cannot_be_is_refused(name: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        build_backbone(name, shape, weights="none")


def test_the_query_is_read_as_far_as_it_can_be() -> None:
    assert ranker_file.QUERY_WORDS == 16
