"""Each way to break an algorithm fails the check that is meant for it, and no other."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed import plugin
from daft_domainbed.algorithms.daft import KD
from daft_domainbed.errors import UsageError
from daft_domainbed.hparams import Hparam, number, uniform
from daft_domainbed.methods import METHODS, Slot
from daft_domainbed.teacher import take_teacher
from daft_domainbed.testing import AlgorithmContract
from daft_domainbed.testing.contract import TINY
from daft_domainbed.testing.workbench import Workbench

Minibatches = list[tuple[Tensor, Tensor]]
FRACTION = number(0, 1)


class Plain:
    """A method that adds nothing to ERM, so that a fault stands alone."""

    network: nn.Module
    training: bool


class TeacherAsModule(KD):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.teacher_network = self.teacher.model


class MovesPython(KD):
    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        random.random()
        return super().update(minibatches, unlabeled)


class MovesTorchInPredict(KD):
    def predict(self, x: Tensor) -> Tensor:
        return super().predict(x + 1e-3 * torch.randn_like(x))


class ForgetsItsCounter(Plain):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weights = (1 / (step + 1) for step in range(10**6))  # a generator's place cannot be saved

    def update(self, minibatches: Minibatches, unlabeled: Any = None) -> dict[str, float]:
        weight = next(self.weights)
        return super().update([(x * weight, y) for x, y in minibatches], unlabeled)


class ForgetsItsMode(Plain):
    """Batch norm stays in evaluation mode after the second update, as after an attack that forgets to go back."""

    def update(self, minibatches: Minibatches, unlabeled: Any = None) -> dict[str, float]:
        values: dict[str, float] = super().update(minibatches, unlabeled)
        self.network.eval()
        return values


class AsksTeacherInPredict(KD):
    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        self.is_trained = True
        return super().update(minibatches, unlabeled)

    def predict(self, x: Tensor) -> Tensor:
        logits = super().predict(x)
        return logits if self.training or not getattr(self, "is_trained", False) else logits + self.teacher(x)


class IsItsTeacher(KD):
    """Does not even train: no gradient comes through a teacher."""

    def predict(self, x: Tensor) -> Tensor:
        return self.teacher(x)


class AnswersWithTooManyClasses(Plain):
    def predict(self, x: Tensor) -> Tensor:
        return F.pad(super().predict(x), (0, 1), value=-1e9)


class DriftsInBatchNorm(KD):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for module in self.teacher.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()


class DrawsTooMuch(Plain):
    HPARAMS = {"dtm_weight": Hparam(0.5, FRACTION, "a weight", uniform(0.5, 2))}


class HasDefaultThatJsonChanges(Plain):
    HPARAMS = {"hdj_schedule": Hparam({0: 0.5}, lambda value: None, "a weight by step")}


class HasDefaultThatJsonRefuses(Plain):
    """Does not even train: no record can be written."""

    HPARAMS = {"hdr_kind": Hparam(torch.float32, lambda value: None, "a kind of number")}


class HasIllegalDefault(Plain):
    HPARAMS = {"hid_weight": Hparam(1.5, FRACTION, "a weight")}


class ResolvesTwice(Plain):
    HPARAMS = {"rt_weight": Hparam(0.5, FRACTION, "a weight")}

    @classmethod
    def resolve(cls, hparams: Mapping[str, Any]) -> dict[str, Any]:
        return {"rt_weight": hparams["rt_weight"] / 2}


class DrawsWhatCannotBe(Plain):
    HPARAMS = {"dwc_weight": Hparam(0.5, FRACTION, "a weight", uniform(0, 1))}

    @classmethod
    def resolve(cls, hparams: Mapping[str, Any]) -> dict[str, Any]:
        if hparams["dwc_weight"] > 0.6:
            raise UsageError("too much")
        return {}


class PutsLossLast(Plain):
    def update(self, minibatches: Minibatches, unlabeled: Any = None) -> dict[str, float]:
        values: dict[str, float] = super().update(minibatches, unlabeled)
        return {"task_loss": values["loss"], **values}


class GivesTensors(Plain):
    def update(self, minibatches: Minibatches, unlabeled: Any = None) -> dict[str, Any]:
        values: dict[str, float] = super().update(minibatches, unlabeled)
        return {name: torch.tensor(value) for name, value in values.items()}


class GivesALossOfEachImage(Plain):
    """Does not even train: the engine averages numbers."""

    def update(self, minibatches: Minibatches, unlabeled: Any = None) -> dict[str, Any]:
        return {"loss": [0.5, 0.5]}


class OverwritesTheRecord(Plain):
    def update(self, minibatches: Minibatches, unlabeled: Any = None) -> dict[str, float]:
        return super().update(minibatches, unlabeled) | {"env0_in_acc": 1.0}


class TakesTheHostsName(Plain):
    HPARAMS = {"lr": Hparam(0.1, number(0), "learning rate")}


class HoldsMoreThanErm(Plain):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(1))


class HoldsALayerOfItsOwn(Plain):
    """Draws other random numbers when it is built, since it holds more."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.map = nn.Linear(3, 3)


class DrawsWhenBuilt(Plain):
    def __init__(self, *args: Any) -> None:
        torch.rand(1)
        super().__init__(*args)


class CannotBeBuilt(KD):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        take_teacher("mentor")


class Diverges(Plain):
    def update(self, minibatches: Minibatches, unlabeled: Any = None) -> dict[str, float]:
        return {"loss": float("nan")}


BROKEN: list[tuple[type, dict[str, Any], str, str]] = [
    (TeacherAsModule, {}, "state_dict_holds_no_teacher", "teacher_network.* of the state dict is a teacher's"),
    (TeacherAsModule, {"is_plain": True}, "state_dict_holds_no_teacher", "is a teacher's: hold the Teacher itself"),
    (MovesPython, {}, "random_states_stay_as_they_were", "moves Python's global random state: use a torch.Generator"),
    (MovesTorchInPredict, {}, "random_states_stay_as_they_were", "moves torch's"),
    (ForgetsItsCounter, {}, "goes_on_where_it_was", "an interrupted run ends otherwise"),
    (ForgetsItsMode, {}, "goes_on_where_it_was", "an interrupted run ends otherwise"),
    (
        AsksTeacherInPredict,
        {},
        "predicts_with_the_student_alone",
        "answers otherwise without teachers, after 1 updates",
    ),
    (IsItsTeacher, {}, "predicts_with_the_student_alone", "answers otherwise without teachers, after 0 updates"),
    (AnswersWithTooManyClasses, {}, "predicts_with_the_student_alone", r"gives \(8, 3\), not \[B, K\] = \(8, 2\)"),
    (DriftsInBatchNorm, {}, "teachers_stay_as_they_were", "statistics of teacher have changed"),
    (DrawsTooMuch, {}, "hyperparameters_are_legal_and_plain", "random draw of seed .* of dtm_weight is .* at most 1"),
    (HasDefaultThatJsonChanges, {}, "hyperparameters_are_legal_and_plain", r"is \{0: 0.5\}, which JSON does not keep"),
    (
        HasDefaultThatJsonRefuses,
        {},
        "hyperparameters_are_legal_and_plain",
        "is torch.float32, which JSON does not keep",
    ),
    (HasIllegalDefault, {}, "hyperparameters_are_legal_and_plain", "the default of hid_weight is 1.5: it must be"),
    (ResolvesTwice, {}, "hyperparameters_are_legal_and_plain", "resolves to something else"),
    (DrawsWhatCannotBe, {}, "hyperparameters_are_legal_and_plain", "random draw of seed .* cannot be: too much"),
    (PutsLossLast, {}, "update_returns_floats_with_the_loss_first", r"\['task_loss', 'loss'\]: loss has to come first"),
    (GivesTensors, {}, "update_returns_floats_with_the_loss_first", "returns a Tensor as loss: give a float"),
    (GivesALossOfEachImage, {}, "update_returns_floats_with_the_loss_first", "returns a list as loss: give a float"),
    (OverwritesTheRecord, {}, "update_returns_floats_with_the_loss_first", "'env0_in_acc', which a record has"),
    (TakesTheHostsName, {}, "names_are_its_own", "the hyperparameter lr is one of the host"),
    (HoldsMoreThanErm, {"is_plain": True}, "weights_load_strictly", "do not fit"),
    (HoldsALayerOfItsOwn, {"is_plain": True}, "weights_load_strictly", "do not fit"),
    (DrawsWhenBuilt, {"is_plain": True}, "building_draws_what_erm_draws", "other random numbers of torch than ERM"),
    (CannotBeBuilt, {}, "trains_and_records", "Broken has no slot 'mentor'.* [Dd]eclare it"),
    (Diverges, {}, "trains_and_records", "loss is nan"),
]


def run_contract(algorithm: str, folder: Path) -> dict[str, str]:
    """Return the message of each check that an algorithm fails on the embedded host, as `pytest` would run them."""
    kind = type("TestIt", (AlgorithmContract,), {"algorithm": algorithm})
    bench = Workbench(folder, "embedded", algorithm, kind.dataset, TINY, kind.steps)
    failures = {}
    for name, check in inspect.getmembers(kind(), inspect.ismethod):
        if name.startswith("test_"):
            try:
                check(bench)
            except pytest.skip.Exception:
                continue
            except Exception as error:
                failures[name.removeprefix("test_")] = str(error)
    return failures


@pytest.mark.parametrize(("mixin", "row", "check", "message"), BROKEN, ids=[kind.__name__ for kind, *_ in BROKEN])
def test_each_fault_is_found_by_its_own_check(
    tmp_path: Path, mixin: type, row: dict[str, Any], check: str, message: str
) -> None:
    slots = [Slot("ERM")] if issubclass(mixin, KD) else []
    plugin.add_algorithm("Broken", mixin, slots=slots, hparams={}, **row)
    # `add_algorithm` would refuse some of these hyperparameters: a row of the table itself can hold them.
    METHODS["Broken"] = replace(METHODS["Broken"], hparams=getattr(mixin, "HPARAMS", {}))

    failures = run_contract("Broken", tmp_path)

    assert list(failures) == [check], failures
    assert re.search(message, failures[check]), failures[check]


def test_every_check_has_a_fault_to_find() -> None:
    checks = {name.removeprefix("test_") for name in vars(AlgorithmContract) if name.startswith("test_")}
    assert {check for *_, check, _ in BROKEN} == checks


def test_a_whole_one_fails_none(tmp_path: Path) -> None:
    plugin.add_algorithm("Whole", KD, slots=[Slot("ERM")], is_plain=True)
    assert run_contract("Whole", tmp_path) == {}


def test_a_teacher_without_logits_is_no_fault(tmp_path: Path) -> None:
    class CopiesFeatures(Plain):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.sight = take_teacher("sight")

        def update(self, minibatches: Minibatches, unlabeled: Any = None) -> dict[str, float]:
            x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
            with torch.no_grad():
                wanted = self.sight.model.featurizer(x)
            loss = F.mse_loss(self.featurizer(x), wanted) + F.cross_entropy(self.predict(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            return {"loss": loss.item()}

    plugin.add_algorithm("CopiesFeatures", CopiesFeatures, slots=[Slot(None, "sight")])
    assert run_contract("CopiesFeatures", tmp_path) == {}
