"""An algorithm that does not keep to the contract of one is answered with what its author has to change."""

from __future__ import annotations

from typing import Any

import pytest

from daft_domainbed import plugin
from daft_domainbed.errors import UsageError
from daft_domainbed.methods import Slot


class AsksForMore:
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.share = self.hparams["more_share"]


class AsksLater:
    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        return {"loss": self.hparams["more_share"]}


class FailsByItself:
    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        return {"loss": {}[0]}  # type: ignore[index]


class ReturnsNothing:
    def update(self, minibatches: Any, unlabeled: Any = None) -> None:
        return None


@pytest.mark.parametrize("mixin", [AsksForMore, AsksLater])
def test_a_hyperparameter_that_nobody_defined_is_named(tiny: Any, mixin: type) -> None:
    plugin.add_algorithm("More", mixin)
    with pytest.raises(
        UsageError, match="More finds no 'more_share': if it is a hyperparameter, define it in its HPARAMS"
    ):
        tiny.train(algorithm="More")


def test_another_missing_key_is_no_hyperparameter(tiny: Any) -> None:
    plugin.add_algorithm("Fails", FailsByItself)
    with pytest.raises(KeyError):
        tiny.train(algorithm="Fails")


def test_an_update_without_a_record_is_named(tiny: Any) -> None:
    plugin.add_algorithm("Nothing", ReturnsNothing)
    with pytest.raises(UsageError, match="update of Nothing returns None: let it return a dict of floats, the loss"):
        tiny.train(algorithm="Nothing")


class TakesMistyped:
    def __init__(self, *args: Any) -> None:
        from daft_domainbed.teacher import take_teacher

        super().__init__(*args)
        self.teacher = take_teacher("clam")


def test_a_mistyped_slot_is_answered_with_the_nearest(tiny: Any) -> None:
    plugin.add_algorithm("Mistyped", TakesMistyped, slots=[Slot("ERM", "calm")])
    with pytest.raises(UsageError, match="Mistyped has no slot 'clam'. Did you mean 'calm'"):
        tiny.train(algorithm="Mistyped", hparams={"calm_backbone": "resnet8_w2"})


def test_a_bad_path_is_refused_before_another_teacher_is_trained(tiny: Any) -> None:
    plugin.add_algorithm("Two", TakesMistyped, slots=[Slot("ERM", "calm"), Slot("ERM", "named")])
    with pytest.raises(UsageError, match="nowhere"):
        tiny.train(algorithm="Two", hparams={"named": "nowhere/model.pkl"})
    assert not (tiny.root / "teachers").exists()
