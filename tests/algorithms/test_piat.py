"""PIAT: its step against the formula, TRADES as its special case, static examples, and what cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.errors import UsageError
from daft_domainbed.functional.ranking import DIVERGENCES
from daft_domainbed.models.ranker import find_ranker, moving_documents
from daft_domainbed.plugin.defaults import resolve_auto
from daft_domainbed.teachers.facts import run_in_progress
from tests.conftest import get_defaults

RANKER = {"backbone": "ranker_w4"}


class Lists:
    """Builds PIAT on DocRanking inside a run whose held-out package is the first."""

    def __init__(self, bench: Any) -> None:
        from daft_domainbed.host import contract

        self.host, self.dataset = bench.host, contract.describe_dataset(bench.host, "DocRanking", {})
        data = self.dataset.dataset_class(None, [0], {})
        splits = [self.host.misc.split_dataset(env, 400, i) for i, env in enumerate(data)]
        facts = bench.get_facts("PIAT")
        args = replace(facts.args, dataset="DocRanking")
        self.facts = replace(
            facts, args=args, dataset=self.dataset, num_classes=20, input_shape=data.input_shape, splits=splits
        )

    def make(self, algorithm: str = "PIAT", natural: Any = None, **hparams: Any) -> Any:
        chosen = get_defaults(self.host, algorithm, "DocRanking") | RANKER | hparams
        teachers = {} if natural is None else {"natural": natural}
        facts = replace(self.facts, hparams=chosen, teachers=teachers)
        with torch.random.fork_rng(devices=[]), run_in_progress(facts):
            torch.manual_seed(0)
            kind = self.host.algorithms.get_algorithm_class(algorithm)
            return kind(self.facts.input_shape, 20, 3, chosen)

    def draw(self, seed: int, size: int = 2) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [
            split.underlying_dataset.fetch(torch.randint(len(split), (size,), generator=generator))
            for split, _ in self.facts.splits[1:]
        ]


@pytest.fixture
def texts(bench: Any) -> Lists:
    return Lists(bench)


class Natural:
    """A natural ranker that counts how often it is asked."""

    def __init__(self, model: Any) -> None:
        self.model, self.n_asked = model, 0
        model.network.register_forward_hook(lambda *_: setattr(self, "n_asked", self.n_asked + 1))

    def follow(self, x: Tensor) -> None:
        pass


def is_equal(module: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in module.state_dict().items())


def test_of_images_kl_is_trades_to_the_last_bit(bench: Any) -> None:
    piat, trades = bench.make("PIAT"), bench.make("AT", at_loss="trades")
    losses = [[values["loss"] for values in bench.train(model, 2)] for model in (piat, trades)]
    assert losses[0] == losses[1] and is_equal(piat, trades)


def test_without_weight_it_is_erm(bench: Any) -> None:
    piat, erm = bench.make("PIAT", piat_lambda=0, piat_steps=1), bench.make("ERM")
    bench.train(piat, 1)
    bench.train(erm, 1)
    for ours, theirs in zip(piat.classifier.parameters(), erm.classifier.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", [*DIVERGENCES, "adversarial"])
def test_an_update_is_the_step_of_the_formula(texts: Lists, form: str) -> None:
    piat = texts.make(piat_form=form, piat_attack="embedding", piat_steps=1, piat_lambda=0.5)
    plain = texts.make("ERM")
    assert is_equal(piat, plain)
    minibatches = texts.draw(0)
    x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
    ranker = find_ranker(plain)
    assert ranker is not None
    # One step of the ascent from the document itself goes 1.5 radii along the slope, back onto the ball.
    embedded = ranker.embed(x[:, 1:]).detach()
    moved = torch.zeros_like(embedded).requires_grad_()
    with moving_documents(plain, moved):
        (slope,) = torch.autograd.grad(plain.eval().predict(x).sum(), moved)
    slope = slope * (x[:, 1:] > 0).unsqueeze(3) * (torch.arange(20) != y[:, None])[:, :, None, None]
    size = slope.flatten(2).norm(dim=2).clamp_min(1e-30)[:, :, None, None]
    delta = 0.5 * embedded.flatten(2).norm(dim=2)[:, :, None, None] * slope / size
    natural = plain.train().predict(x)
    with moving_documents(plain, delta):
        scores = plain.predict(x)
    if form == "adversarial":
        wanted = F.cross_entropy(scores, y)
    else:
        wanted = F.cross_entropy(natural, y) + 0.5 * DIVERGENCES[form](natural, scores).mean()
    values = piat.update(minibatches)
    assert values["loss"] == pytest.approx(wanted.item(), rel=1e-4)
    plain.optimizer.zero_grad()
    wanted.backward()
    plain.optimizer.step()
    ours, theirs = (model.classifier.head.weight for model in (piat, plain))  # the bias moves all scores alike
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    for mine, yours in zip(piat.featurizer.parameters(), plain.featurizer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_static_examples_are_made_once_and_against_the_natural_ranker(texts: Lists) -> None:
    natural = Natural(texts.make("ERM"))
    piat = texts.make(natural=natural, piat_static=True)
    minibatches = texts.draw(0)
    x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
    attacked, moved = piat._attack(x, y)
    assert moved is None and (attacked != x).any()
    n_asked = natural.n_asked
    piat.update(minibatches)  # another ranker now, the same examples
    assert torch.equal(piat._attack(x, y)[0], attacked)
    assert natural.n_asked == n_asked > 0
    again = texts.make(natural=natural, piat_static=True)
    assert torch.equal(again._attack(x[:3], y[:3])[0], attacked[:3])  # whatever else is in the batch


def test_static_examples_of_images_are_made_once_too(bench: Any) -> None:
    natural = Natural(bench.make("ERM"))
    model = natural.model
    piat = bench.make("PIAT")
    piat.natural = natural
    x, y = (torch.cat(parts) for parts in zip(*bench.draw_minibatches(0), strict=True))
    attacked, _ = piat._attack(x, y)
    clean, moved = (model.eval().predict(images).softmax(1) for images in (x, attacked))
    assert (clean - moved).abs().amax(1).min() > 0 and (attacked - x).abs().max() <= 8 / 255 + 1e-6
    n_asked = natural.n_asked
    bench.train(piat, 1)  # another network now, the same examples
    assert torch.equal(piat._attack(x, y)[0], attacked)
    assert natural.n_asked == n_asked > 0
    again = bench.make("PIAT")
    again.natural = natural
    assert torch.equal(again._attack(x[:3], y[:3])[0], attacked[:3])  # whatever else is in the batch


def test_synonyms_come_from_source_domains_alone(texts: Lists) -> None:
    piat = texts.make()
    sources = torch.cat([in_.underlying_dataset.documents for in_, _ in texts.facts.splits[1:]]).unique()
    assert torch.isin(piat.synonyms.words, sources).all()
    held_out = texts.facts.splits[0][0].underlying_dataset.documents.unique()
    assert not torch.isin(piat.synonyms.words, held_out[~torch.isin(held_out, sources)]).any()


@pytest.mark.parametrize(
    ("dataset", "hparams", "message"),
    [
        ("EmojiStyles", {"piat_attack": "words"}, "piat_attack is words: images need pixels"),
        ("DocRanking", {"piat_attack": "pixels"}, "piat_attack is pixels: texts need embedding or words"),
        ("DocRanking", {"piat_attack": "embedding", "piat_static": True}, "use words"),
    ],
)
def test_what_cannot_be_is_refused(bench: Any, dataset: str, hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve_auto("PIAT", get_defaults(bench.host, "PIAT", dataset) | hparams)


def test_defaults_depend_on_the_input(bench: Any) -> None:
    found = {
        name: resolve_auto("PIAT", get_defaults(bench.host, "PIAT", name)) for name in ("EmojiStyles", "DocRanking")
    }
    keys = ("piat_attack", "piat_eps", "piat_steps")
    assert [found["EmojiStyles"][key] for key in keys] == ["pixels", 8 / 255, 10]
    assert [found["DocRanking"][key] for key in keys] == ["words", 0.5, 2]


@pytest.mark.parametrize(
    ("form", "of_images", "of_texts"), [("kl", 6, 1), ("pairwise", 6 / 28, 1 / 190), ("listmle", 6 / 8, 1 / 20)]
)
def test_the_weight_is_of_a_pair_or_a_place(
    bench: Any, texts: Lists, form: str, of_images: float, of_texts: float
) -> None:
    assert bench.num_classes == 8
    assert bench.make("PIAT", piat_form=form).hparams["piat_lambda"] == pytest.approx(of_images)
    assert texts.make(piat_form=form).hparams["piat_lambda"] == pytest.approx(of_texts)


def test_the_natural_model_is_asked_for_by_static_examples_alone() -> None:
    from daft_domainbed.methods import list_stages

    assert list_stages("PIAT") == ["PIAT"]
    assert list_stages("PIAT", {"piat_static": True}) == ["PIAT", "ERM"]
