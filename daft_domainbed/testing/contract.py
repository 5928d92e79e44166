"""Everything that the engine, the sweeps and the tables rely on in an algorithm, as a class of tests."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch

from daft_domainbed.errors import UsageError
from daft_domainbed.host.checkpoints import load_checkpoint
from daft_domainbed.methods import find_method, list_stages
from daft_domainbed.models.weights import hash_state
from daft_domainbed.plugin.defaults import (
    get_hparams,
    get_known_hparams,
    get_random_hparams,
    list_hparams,
    resolve_auto,
)
from daft_domainbed.plugin.registration import register
from daft_domainbed.plugin.registry import REGISTRY
from daft_domainbed.runtime.randomness import preserve_states
from daft_domainbed.testing.workbench import Workbench, list_random_states, stop_after

HOSTS = ("embedded", "upstream")
TINY = {"batch_size": 8, "backbone": "resnet8_w2"}  # seconds, not minutes
# What a record holds beside the values that `update` returns.
_RESERVED = {
    "step", "epoch", "step_time", "mem_gb", "seconds", "started", "hparams", "args", "teacher", "teachers", "machine",
    "environments",
}  # fmt: skip


class AlgorithmContract:
    """What an algorithm promises; a subclass with `algorithm = "Mine"` is a whole test.

    A fault fails the one check that names it: where an algorithm does not train, that check is
    `test_trains_and_records` unless another one says why, and what needs a trained one is skipped. The host in the
    clone at DOMAINBED_ROOT is tried, too, where there is one.

    Attributes:
        algorithm: Its name, added with `plugin.add_algorithm` before.
        dataset: On which it is tried.
        hparams: What makes it small and quick, beside the usual.
        steps: Updates of a run.
    """

    algorithm: ClassVar[str]
    dataset: ClassVar[str] = "Debug28"
    hparams: ClassVar[dict[str, Any]] = {}
    steps: ClassVar[int] = 4

    @pytest.fixture(scope="class", params=HOSTS)
    @classmethod
    def bench(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workbench:
        """The algorithm on a host, with data and teachers, made once for all checks."""
        if request.param == "upstream" and not os.environ.get("DOMAINBED_ROOT"):
            pytest.skip("needs a clone of DomainBed: set DOMAINBED_ROOT")
        folder = tmp_path_factory.mktemp(f"{cls.algorithm}_{request.param}")
        with preserve_states():
            return Workbench(folder, request.param, cls.algorithm, cls.dataset, TINY | cls.hparams, cls.steps)

    @pytest.fixture(autouse=True)
    def registered(self, bench: Workbench) -> None:
        """Whatever became of the host in other tests."""
        register(bench.run.host)

    def test_trains_and_records(self, bench: Workbench) -> None:
        """A run ends with finite losses, an accuracy for every split, and a checkpoint."""
        if bench.error is not None:
            self._skip_where_another_check_says_why(bench)
            raise bench.error
        records = bench.read_records(bench.whole)
        assert records[-1]["step"] == self.steps - 1, f"the last record is of step {records[-1]['step']}"
        names = [f"env{i}_{part}_acc" for i in range(len(bench.run.dataset.environments)) for part in ("in", "out")]
        assert all(0 <= record[name] <= 1 for record in records for name in names), "an accuracy is no fraction"

    def _skip_where_another_check_says_why(self, bench: Workbench) -> None:
        for check in (
            self.test_hyperparameters_are_legal_and_plain,
            self.test_names_are_its_own,
            self.test_update_returns_floats_with_the_loss_first,
            self.test_predicts_with_the_student_alone,
        ):
            try:
                check(bench)
            except AssertionError:
                pytest.skip(f"it does not train: see {check.__name__}")
            except pytest.skip.Exception:
                continue

    def test_update_returns_floats_with_the_loss_first(self, bench: Workbench) -> None:
        """DomainBed averages and prints what `update` returns, the loss first."""
        with bench.attempting():
            values = bench.build(anyway=True).update(bench.draw_minibatches(0))
        assert next(iter(values), None) == "loss", f"update() returns {list(values)}: loss has to come first"
        for name, value in values.items():
            assert type(value) is float, f"update() returns a {type(value).__name__} as {name}: give a float"
            is_free = name not in _RESERVED and not (name.startswith("env") and name.endswith("_acc"))
            assert is_free, f"update() returns {name!r}, which a record has for something else: choose another name"

    def test_predicts_with_the_student_alone(self, bench: Workbench) -> None:
        """`predict` gives logits, [B, K], that no teacher has a say in, after every number of updates."""
        with bench.attempting():
            algorithm = bench.build(anyway=True)
        for step in range(2):
            with bench.attempting():
                logits, without = bench.predict(algorithm, alone=False), bench.predict(algorithm, alone=True)
            wanted = (bench.run.hparams["batch_size"], bench.num_classes)
            assert logits.shape == wanted, f"predict() gives {tuple(logits.shape)}, not [B, K] = {wanted}"
            assert torch.equal(logits, without), f"predict() answers otherwise without teachers, after {step} updates"
            with bench.attempting():
                algorithm.update(bench.draw_minibatches(step))

    def test_teachers_stay_as_they_were(self, bench: Workbench) -> None:
        """Neither building, nor an update, nor `train()` changes a teacher's weights or statistics."""
        algorithm = bench.build()
        for step in range(2):
            algorithm.train()
            algorithm.update(bench.draw_minibatches(step))
            algorithm.eval()
        changed = bench.list_changed_teachers()
        assert not changed, f"weights or statistics of {changed[0]} have changed: a teacher is frozen, in eval mode"

    def test_state_dict_holds_no_teacher(self, bench: Workbench) -> None:
        """A checkpoint is the student's: a teacher in it would travel with every one."""
        held = bench.list_teacher_entries(bench.build())
        assert not held, f"{held[0]} of the state dict is a teacher's: hold the Teacher itself, which is no module"

    def test_random_states_stay_as_they_were(self, bench: Workbench) -> None:
        """Teaching, attacking and predicting draw from generators of their own: data stay those of plain ERM."""
        algorithm = bench.build()
        minibatches = bench.draw_minibatches(0)
        before = list_random_states()
        algorithm.update(minibatches)
        algorithm.eval()
        with torch.no_grad():
            algorithm.predict(minibatches[0][0])
        after = list_random_states()
        moved = [name for name in before if before[name] != after[name]]
        assert not moved, f"update() or predict() moves {moved[0]}'s global random state: use a torch.Generator"

    def test_building_draws_what_erm_draws(self, bench: Workbench) -> None:
        """Building a plain method draws the random numbers that building ERM draws, and no others."""
        if not find_method(self.algorithm).is_plain:
            pytest.skip("it holds more than ERM's weights")
        algorithm = bench.build()
        after = list_random_states()
        erm = bench.build_erm(algorithm.hparams)
        moved = [name for name, state in list_random_states().items() if state != after[name]]
        if algorithm.state_dict().keys() != erm.state_dict().keys():
            pytest.skip("it holds other weights than ERM: see test_weights_load_strictly")
        assert not moved, f"building draws other random numbers of {moved[0]} than ERM does: use a torch.Generator"

    def test_weights_load_strictly(self, bench: Workbench) -> None:
        """A plain method's weights load into the host's ERM; any other's into its own class, found by its name."""
        content = load_checkpoint(bench.whole / "model.pkl")
        if bench.list_teacher_entries(bench.build()):
            pytest.skip("it holds a teacher's weights: see test_state_dict_holds_no_teacher")
        model = bench.rebuild(content)
        bench.predict(model, alone=False)
        assert hash_state(model.state_dict()) == hash_state(content["model_dict"]), "the rebuilt model is another one"

    def test_goes_on_where_it_was(self, bench: Workbench) -> None:
        """A run that was interrupted between two checkpoints ends as one that was not, bit for bit."""
        whole = bench.whole
        broken = bench.train("broken", on_step=stop_after(self.steps // 2))
        assert not (broken / "done").exists()
        bench.train("broken")
        then, now = (bench.strip_times(bench.read_records(folder)) for folder in (whole, broken))
        hashes = [hash_state(load_checkpoint(folder / "model.pkl")["model_dict"]) for folder in (whole, broken)]
        assert (hashes[0], then) == (hashes[1], now), (
            "an interrupted run ends otherwise: something that updates change is no tensor, number, list, dict, "
            "torch.Generator or object with state_dict(), or two runs of the same seed differ in any case"
        )

    def test_hyperparameters_are_legal_and_plain(self, bench: Workbench) -> None:
        """Defaults and random draws are plain JSON, pass their own checks, and go together."""
        host, dataset = bench.run.host, bench.run.dataset
        self._check_values(get_known_hparams(host, self.algorithm, dataset), "default")
        for seed in range(1, 21):
            self._check_values(get_random_hparams(host, self.algorithm, dataset, seed), f"random draw of seed {seed}")

    def _check_values(self, values: Mapping[str, Any], kind: str) -> None:
        ours = list_hparams(self.algorithm)
        for name, value in values.items():
            assert _is_plain_json(value), f"the {kind} of {name} is {value!r}, which JSON does not keep"
            hint = ours[name].check(value) if name in ours else None
            assert not hint, f"the {kind} of {name} is {value!r}: it must be {hint}"
        try:
            resolved = resolve_auto(self.algorithm, values)
        except UsageError as error:
            raise AssertionError(f"the {kind} cannot be: {error}") from error
        assert resolve_auto(self.algorithm, resolved) == resolved, f"the {kind}, resolved, resolves to something else"

    def test_names_are_its_own(self, bench: Workbench) -> None:
        """No hyperparameter has the name of one of the host's; of its networks it may know better defaults."""
        hosts = REGISTRY.hosts[bench.run.host.name].own_hparams("ERM", self.dataset, 0)
        clashes = sorted(hosts.keys() & get_hparams(self.algorithm).keys())
        assert not clashes, f"the hyperparameter {clashes[0]} is one of the host: begin it with the method's name"
        stages = list_stages(self.algorithm)
        assert len({stage.lower() for stage in stages}) == len(stages), f"two of {', '.join(stages)} are one name"


def _is_plain_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False
