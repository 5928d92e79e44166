"""Algorithms of one's own with slots and hyperparameters of their own; and a method that is one file and one row."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from daft_domainbed import algorithms, plugin
from daft_domainbed.arguments import SweepArgs
from daft_domainbed.errors import UsageError
from daft_domainbed.functional.losses import kd_loss
from daft_domainbed.host import contract
from daft_domainbed.hparams import Hparam, number, uniform
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.methods import METHODS, Method, Slot, find_method, load_class
from daft_domainbed.plugin.defaults import get_default_hparams, list_owners
from daft_domainbed.plugin.registry import REGISTRY
from daft_domainbed.scripts import methods as methods_command
from daft_domainbed.teacher import load_teacher, take_teacher
from tests.conftest import read_records

SHARE = Hparam(0.5, number(0, 1), "share of the second teacher", uniform(0, 1))
PAIR = (Slot("ERM", "calm"), Slot("AFT", "robust"))
SMALL = {f"{slot.prefix}_backbone": "resnet8_w4" for slot in PAIR} | {"backbone": "resnet8_w2"}


class Pair:
    """Distils the mean of two teachers."""

    HPARAMS = {"pair_share": SHARE}

    def __init__(self, input_shape: Any, num_classes: int, num_domains: int, hparams: Any) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.teachers = [take_teacher(prefix) for prefix in ("calm", "robust")]

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
        share, logits = self.hparams["pair_share"], self.predict(x)
        losses = [kd_loss(logits, teacher(x), 4.0) for teacher in self.teachers]
        loss = F.cross_entropy(logits, y) + (1 - share) * losses[0] + share * losses[1]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}


class FeatureKD:
    """Distils features through a layer of its own."""

    def __init__(self, input_shape: Any, num_classes: int, num_domains: int, hparams: Any) -> None:
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.teacher = load_teacher("KD", hparams)  # as a file written for an earlier version calls it
        self.map = nn.Linear(self.featurizer.n_outputs, self.teacher.model.featurizer.n_outputs)
        self.optimizer.add_param_group({"params": self.map.parameters()})

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
        features = self.featurizer(x)
        with torch.no_grad():
            wanted = self.teacher.model.featurizer(x)
        loss = F.cross_entropy(self.classifier(features), y) + F.mse_loss(self.map(features), wanted)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}


class Sighted(FeatureKD):
    """Has a pretrained network for a teacher."""

    def __init__(self, *args: Any) -> None:
        super(FeatureKD, self).__init__(*args)
        self.teacher = take_teacher("sight")
        self.map = nn.Linear(self.featurizer.n_outputs, self.teacher.model.featurizer.n_outputs)


def test_two_teachers_have_prefixes_of_their_own(tiny: Any) -> None:
    plugin.add_algorithm("Pair", Pair, slots=PAIR, is_plain=True)
    own = {"calm_lr": 0.01, "calm_steps": 3, "robust_steps": 2, "pair_share": 0.25}

    folder = tiny.train(algorithm="Pair", hparams=SMALL | own)

    first = read_records(folder)[0]
    assert first["hparams"] | own == first["hparams"]
    assert set(first["teachers"]) == {"calm", "robust"} and "teacher" not in first
    calm, robust = first["teachers"]["calm"], first["teachers"]["robust"]
    assert (calm["algorithm"], calm["steps"]) == ("ERM", 3)
    assert (robust["algorithm"], robust["steps"], robust["teacher"]["algorithm"]) == ("AFT", 2, "ERM")
    made = {
        prefix: read_records((folder / facts["path"]).parent)[0]["hparams"]
        for prefix, facts in first["teachers"].items()
    }
    assert (made["calm"]["backbone"], made["calm"]["lr"]) == ("resnet8_w4", 0.01)
    assert made["robust"]["teacher_backbone"] == "resnet8_w4"  # the network of the model that AFT starts from


def test_runs_of_two_teachers_are_planned_as_their_slots_go(tiny: Any) -> None:
    plugin.add_algorithm("Pair", Pair, slots=PAIR)
    hparams = json.dumps(SMALL | {"batch_size": 8})
    sweep = SweepArgs(["Debug28"], ["Pair"], str(tiny.root), 1, n_hparams=1, single_test_envs=True, hparams=hparams)

    jobs = make_plan(sweep)

    assert [job.stage for job in jobs] == ["erm_teacher"] * 3 + ["aft_teacher"] * 3 + ["student"] * 3
    student = jobs[-1]
    calm, robust = (next(job for job in jobs if job.folder == folder) for folder in student.needs)
    assert (calm.args.algorithm, robust.args.algorithm) == ("ERM", "AFT")
    assert robust.needs == [calm.folder]  # described alike, the two ERM models are one


def test_a_pretrained_network_is_a_teacher_without_logits(tiny: Any) -> None:
    plugin.add_algorithm("Sighted", Sighted, slots=[Slot(None, "sight")])
    sight = {"sight_backbone": "resnet8_w2", "sight_weights": "none"}

    folder = tiny.train(algorithm="Sighted", hparams=sight)

    facts = read_records(folder)[0]["teachers"]["sight"]
    assert (facts["algorithm"], facts["backbone"], facts["weights"]) == (None, "resnet8_w2", "none")
    assert not (tiny.root / "teachers").exists()
    tiny.train("kd", {"teacher": str(folder / "model.pkl")}, algorithm="KD")  # rebuilt with that network


def test_a_pretrained_network_has_no_logits_to_give(tiny: Any) -> None:
    class Asks(Sighted):
        def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
            return {"loss": self.teacher(minibatches[0][0]).mean().item()}

    plugin.add_algorithm("Asks", Asks, slots=[Slot(None, "sight")])
    with pytest.raises(UsageError, match="the sight is a pretrained network without a head: name a checkpoint"):
        tiny.train(algorithm="Asks", hparams={"sight_backbone": "resnet8_w2"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slots": [Slot("ERM"), Slot("AFT")]}, "Pair has two slots called 'teacher'"),
        ({"slots": [Slot("EMR")]}, "no method 'EMR' makes a model for Pair.* Did you mean 'ERM'"),
        ({"hparams": {"backbone": SHARE}}, "the hyperparameter 'backbone' of Pair is taken"),
        ({"slots": PAIR, "hparams": {"calm_lr": SHARE}}, "the hyperparameter 'calm_lr' of Pair is taken"),
        ({"like": "KDD"}, "no method 'KDD' to be like.* Did you mean 'KD'"),
        ({"like": "KD", "slots": PAIR}, "Pair has slots and is like KD, which has its own"),
        ({"slots": ["ERM"]}, r"a slot of Pair is 'ERM': write it as Slot\('ERM', 'teacher'\)"),
        ({"slots": [Slot("ERM", "my teacher")]}, "a slot of Pair is called 'my teacher'"),
        ({"slots": [Slot("ERM", "lr")]}, "the slot 'lr' of Pair would have a hyperparameter 'lr', which is taken"),
        ({"hparams": {"aft_eps": SHARE}}, "the hyperparameter 'aft_eps' of Pair is AFT's: choose another name"),
        ({"hparams": {"pair_share": 0.5}}, r"'pair_share' of Pair is 0.5: write it as Hparam\(0.5, check, "),
        (
            {"hparams": {"pair_share": Hparam(2.0, number(0, 1), "share")}},
            "a default of 'pair_share' of Pair is 2.0: it must be a number of at least 0 and at most 1",
        ),
        (
            {"hparams": {"pair_share": Hparam(0.5, number(0, 1), "share", uniform(2, 3))}},
            "a draw of 'pair_share' of Pair is 2.*: it must be a number of at least 0 and at most 1",
        ),
        (
            {"hparams": {"pair_share": Hparam(torch.ones(1), lambda value: None, "share")}},
            "a default of 'pair_share' of Pair is tensor.*: it must be of a plain type",
        ),
    ],
)
def test_what_cannot_be_added_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    before = dict(METHODS)
    with pytest.raises(UsageError, match=message):
        plugin.add_algorithm("Pair", Pair, **given)
    assert before == METHODS


def test_one_derived_from_a_method_has_its_hyperparameters(tiny: Any) -> None:
    own = type("Own", (load_class("KD"),), {"HPARAMS": {"kd_weight": SHARE}})
    plugin.add_algorithm("Own", own, slots=[Slot("ERM")])
    assert METHODS["Own"].hparams == {"kd_weight": SHARE}


def test_two_modules_that_add_one_name_are_named(tiny: Any) -> None:
    plugin.add_algorithm("Pair", Pair, slots=PAIR)
    plugin.add_algorithm("Pair", Pair, slots=PAIR)  # the same one again, as a script that is run twice does
    other = type("Pair", (Pair,), {"__module__": "somewhere.else"})
    with pytest.raises(UsageError, match=f"somewhere.else and {__name__} both add 'Pair'"):
        plugin.add_algorithm("Pair", other, slots=PAIR)


def test_a_method_of_ours_keeps_its_name() -> None:
    with pytest.raises(UsageError, match="'KD' is one of our methods: choose another name"):
        plugin.add_algorithm("KD", Pair)


def test_unregistering_takes_everything_back(tiny: Any) -> None:
    host = contract.find_host()
    for registration in list(REGISTRY.hosts.values()):
        plugin.unregister(registration.host)
    rows, listed = dict(METHODS), list(host.algorithms.ALGORITHMS)
    plugin.register(host)
    plugin.add_algorithm("Pair", Pair, slots=PAIR)
    assert list_owners("pair_share") == ["Pair"] and plugin.list_sources() == [__name__]
    assert "pair_share" in get_default_hparams(host, "Pair", contract.describe_dataset(host, "Debug28", {}))

    plugin.unregister(host)

    assert (rows, listed) == (METHODS, host.algorithms.ALGORITHMS)
    assert not hasattr(host.algorithms, "Pair") and find_method("Pair") == Method(is_plain=False)
    assert (list_owners("pair_share"), plugin.list_sources()) == ([], [])
    assert (REGISTRY.hosts, REGISTRY.added) == ({}, [])
    plugin.add_algorithm("Pair", Pair, like="KD")  # another one of that name
    assert find_method("Pair").slots == METHODS["KD"].slots


def test_one_like_kd_is_no_plain_teacher_of_a_folder(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plugin.add_algorithm("FeatureKD", FeatureKD, like="KD")
    small = {"teacher_backbone": "resnet8_w4"}
    own = tiny.train("runs/own", small, algorithm="FeatureKD")
    with pytest.raises(UsageError, match="is a student of FeatureKD; name the file itself if it is to teach"):
        tiny.train("kd", {"teacher": str(own)}, algorithm="KD")
    plain = tiny.make_teacher(folder="runs/plain")

    folder = tiny.train("kd", {"teacher": str(tiny.root / "runs")}, algorithm="KD")

    assert read_records(folder)[0]["teacher"]["path"] == "../runs/plain/model.pkl"
    assert plain.is_file()


def test_one_like_kd_that_is_named_teaches_as_its_own_class(tiny: Any) -> None:
    plugin.add_algorithm("FeatureKD", FeatureKD, like="KD")
    own = tiny.train("own", {"teacher_backbone": "resnet8_w4"}, algorithm="FeatureKD") / "model.pkl"

    folder = tiny.train("kd", {"teacher": str(own)}, algorithm="KD")

    facts = read_records(folder)[0]["teacher"]
    assert (facts["algorithm"], facts["teacher"]["algorithm"]) == ("FeatureKD", "ERM")


def test_one_like_kd_whose_teacher_is_gone_says_so(tiny: Any) -> None:
    plugin.add_algorithm("FeatureKD", FeatureKD, like="KD")
    own = tiny.train("own", {"teacher_backbone": "resnet8_w4"}, algorithm="FeatureKD") / "model.pkl"
    (own.parent / "results.jsonl").unlink()
    with pytest.raises(UsageError, match=f"{own} needs its teacher to be built, and no record beside it says which"):
        tiny.train("kd", {"teacher": str(own)}, algorithm="KD")


DUO = '''
    """Throw-away."""

    import torch
    from torch.nn.functional import cross_entropy

    from daft_domainbed.functional.losses import kd_loss
    from daft_domainbed.hparams import Hparam, number, uniform
    from daft_domainbed.teachers.facts import take_teacher


    class Duo:
        SOURCE = "nobody, never"
        HPARAMS = {"duo_share": Hparam(0.5, number(0, 1), "share of the second teacher", uniform(0, 1))}

        def __init__(self, *args):
            super().__init__(*args)
            self.teachers = [take_teacher("first"), take_teacher("second")]

        def update(self, minibatches, unlabeled=None):
            x, y = (torch.cat(parts) for parts in zip(*minibatches))
            logits = self.predict(x)
            loss = cross_entropy(logits, y) + sum(kd_loss(logits, teacher(x), 4.0) for teacher in self.teachers)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            return {"loss": loss.item()}
'''


def test_a_method_with_two_teachers_is_one_file_and_one_row(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside its test and its page; and whatever lists, plans, trains, searches or explains a method knows of it."""
    plugin.unregister(contract.find_host())
    (tiny.root / "code").mkdir()
    (tiny.root / "code" / "duo.py").write_text(textwrap.dedent(DUO))
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(tiny.root / "code")])
    monkeypatch.setitem(METHODS, "Duo", Method("duo", (Slot("ERM", "first"), Slot("KD", "second"))))
    small = {f"{prefix}_backbone": "resnet8_w2" for prefix in ("first", "second", "teacher")}

    methods_command.main(["Duo", "--format", "json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown["source"] == "nobody, never"
    assert shown["slots"] == [{"prefix": "first", "kind": "ERM"}, {"prefix": "second", "kind": "KD"}]
    assert {"duo_share", "first_lr", "second_steps"} <= shown["hparams"].keys()

    folder = tiny.train(algorithm="Duo", hparams=small)
    assert read_records(folder)[0]["teachers"]["second"]["teacher"]["algorithm"] == "ERM"
    tiny.train("kd", {"teacher": str(folder / "model.pkl")}, algorithm="KD")
    with pytest.raises(UsageError, match="is a student of Duo"):
        tiny.train("other", {"teacher": str(folder)}, algorithm="KD")
    with pytest.raises(UsageError, match="no hyperparameter 'duo_share' of KD, ERM. It belongs to Duo"):
        tiny.train("third", {"duo_share": 0.5}, algorithm="KD")
    sweep = SweepArgs(["EmojiStyles"], ["Duo"], str(tiny.root), 1, n_hparams=1, single_test_envs=True)
    assert {job.stage for job in make_plan(sweep)} == {"erm_teacher", "kd_teacher", "student"}
