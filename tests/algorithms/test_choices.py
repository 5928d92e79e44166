"""What a method finds out before it trains, a radius and a confidence, on the training domains alone."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.algorithms import daft
from daft_domainbed.algorithms.aft import RADII
from daft_domainbed.arguments import SweepArgs
from daft_domainbed.data.loaders import make_stream
from daft_domainbed.embedded.domains import DrawingsDomain
from daft_domainbed.errors import UsageError
from daft_domainbed.launch.plan import make_plan
from daft_domainbed.models.weights import load
from daft_domainbed.runtime import stopping
from daft_domainbed.runtime.randomness import seed_everything
from daft_domainbed.teachers.samples import draw_minibatches, read_in_splits
from daft_domainbed.testing.workbench import stop_after
from tests.algorithms.conftest import SEED, TEST_ENV

VALIDATED = {"aft_attack": "features", "aft_eps": "validated", "lr": 0.05, "batch_size": 8}


class Forbidden:
    """Splits of a held-out domain: whoever looks at them is caught."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a held-out domain was asked for its {name}")

    def __len__(self) -> int:
        raise AssertionError("a held-out domain was counted")


@pytest.fixture
def bench(make_shared_workbench: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    shared = make_shared_workbench("EmojiStyles")
    hidden = [(Forbidden(), Forbidden()) if i == TEST_ENV else pair for i, pair in enumerate(shared.splits)]
    monkeypatch.setattr(shared, "shown", hidden)
    return shared


def make_grid(aft: Any, bench: Any, steps: int, **hparams: Any) -> dict[float, float]:
    """Fine-tune a head for each radius, one after the other, from the formulas; return its loss on the out-splits."""
    pairs = [pair for i, pair in enumerate(bench.splits) if i != TEST_ENV]
    teacher = aft.teacher.model
    losses = {}
    for radius in RADII:
        head = copy.deepcopy(teacher.classifier).requires_grad_(True)
        optimizer = torch.optim.Adam(head.parameters(), lr=VALIDATED["lr"])
        seed_everything(SEED)
        weigh = bench.host.misc.make_weights_for_balanced_classes if hparams.get("class_balanced") else None
        streams = [make_stream(in_, VALIDATED["batch_size"], 0, weigh and weigh(in_)) for in_, _ in pairs]
        for step in range(steps):
            if hparams.get("lr_schedule") == "cosine":
                optimizer.param_groups[0]["lr"] = VALIDATED["lr"] * math.cos(math.pi * step / steps / 2) ** 2
            batches = [next(stream) for stream in streams]
            x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
            with torch.no_grad():
                z = teacher.featurizer(x)
                q = F.one_hot(y, bench.num_classes) / 2 + teacher.classifier(z).softmax(1) / 2
            eps = radius * z.norm(dim=1).mean()
            gap = torch.cdist(head.weight, head.weight, compute_mode="donot_use_mm_for_euclid_dist")
            raised = torch.stack([torch.logsumexp(head(z) + eps * gap[k], 1) for k in range(bench.num_classes)], 1)
            optimizer.zero_grad()
            (q * (raised - head(z))).sum(1).mean().backward()
            optimizer.step()
        with torch.no_grad():
            whole = [out.underlying_dataset.fetch(torch.tensor(out.keys)) for _, out in pairs]
            logits = [(head(teacher.featurizer(x)), y) for x, y in whole]
            losses[radius] = sum(F.cross_entropy(*pair).item() for pair in logits) / len(logits)
    return losses


class MovedSplit:
    """A split whose images are augmented."""

    def __init__(self, split: Any) -> None:
        self.keys, data = split.keys, split.underlying_dataset
        self.underlying_dataset = DrawingsDomain(data.images, data.labels, augment=True)

    def __len__(self) -> int:
        return len(self.keys)


class TestValidatedRadius:
    @pytest.mark.parametrize("hparams", [{}, {"lr_schedule": "cosine"}, {"class_balanced": True}])
    def test_it_is_that_of_a_grid_made_by_hand(self, bench: Any, hparams: dict[str, Any]) -> None:
        aft = bench.make("AFT", **VALIDATED | hparams)
        expected = make_grid(aft, bench, steps=10, **hparams)
        found = {float(radius): loss for radius, loss in aft.hparams["aft_eps_candidates"].items()}
        assert found == pytest.approx(expected, rel=1e-4)
        assert aft.hparams["aft_eps"] == min(expected, key=lambda radius: expected[radius])
        assert len({round(loss, 6) for loss in found.values()}) == len(RADII)

    def test_it_then_trains_as_if_it_had_been_named(self, bench: Any) -> None:
        aft = bench.make("AFT", **VALIDATED)
        named = bench.make("AFT", **VALIDATED | {"aft_eps": aft.hparams["aft_eps"]})
        assert bench.train(aft, 3) == bench.train(named, 3)
        assert all(torch.equal(value, named.state_dict()[name]) for name, value in aft.state_dict().items())

    def test_it_leaves_the_random_states(self, bench: Any) -> None:
        seed_everything(7)
        expected = torch.rand(3)
        seed_everything(7)
        bench.make("AFT", **VALIDATED)  # `make` forks torch's; NumPy's and Python's are the constructor's to leave
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("wrong", [{"aft_attack": "pixels"}, {"aft_scope": "all"}])
    def test_it_is_for_features_and_heads(self, bench: Any, wrong: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match='aft_eps is "validated"'):
            bench.make("AFT", **VALIDATED | wrong)

    def test_a_whole_run_records_it_and_goes_on(self, tiny: Any) -> None:
        hparams = {"aft_attack": "features", "aft_eps": "validated"}
        whole = tiny.train("a/student", hparams, algorithm="DAFT", steps=8)
        (aft,) = (whole.parent / "teachers").glob("AFT-*")
        recorded = json.loads((aft / "results.jsonl").read_text().splitlines()[0])["hparams"]
        assert recorded["aft_eps"] in RADII
        assert set(recorded["aft_eps_candidates"]) == set(map(str, RADII))
        alone = {**hparams, "teacher": str(next((whole.parent / "teachers").glob("ERM-*")))}
        first = tiny.train("b/aft", alone, algorithm="AFT")
        with pytest.raises(stopping.Stopped), stopping.listening():
            tiny.train("c/aft", alone, algorithm="AFT", on_step=stop_after(3))
        again = tiny.train("c/aft", alone, algorithm="AFT")
        one, other = (load(folder / "model.pkl") for folder in (first, again))
        assert one["model_hparams"]["aft_eps_candidates"] == other["model_hparams"]["aft_eps_candidates"]
        assert all(torch.equal(value, other["model_dict"][name]) for name, value in one["model_dict"].items())


def get_entropy(logits: Tensor, temperature: float) -> float:
    rows = (logits / temperature).softmax(1).tolist()
    return -sum(p * math.log(p) for row in rows for p in row if p > 0) / len(rows)


class TestMatchedConfidence:
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_it_hits_the_entropy(self, bench: Any, temperature: float) -> None:
        rival = str(bench.teachers["AFT"])
        kd = bench.make("KD", kd_match=True, aft_teacher=rival, kd_temperature=temperature, batch_size=8)
        aft = bench.make("DAFT").teacher
        images = torch.cat(
            [in_.underlying_dataset.fetch(torch.tensor(in_.keys))[0] for i, (in_, _) in enumerate(bench.splits) if i]
        )
        scale = kd.hparams["kd_match_scale"]
        assert scale == kd.match_scale != 1
        found, wanted = get_entropy(kd.teacher(images), scale * temperature), get_entropy(aft(images), temperature)
        assert found == pytest.approx(wanted, abs=1e-5)
        assert abs(get_entropy(kd.teacher(images), temperature) - wanted) > 1e-3  # there was something to match

    def test_what_no_scale_reaches_is_refused(self, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(daft, "find_matching_scale", lambda *_: 1e4)
        with pytest.raises(UsageError, match=r"no scale makes the ERM teacher as confident as the AFT teacher .*2\.0"):
            bench.make("KD", kd_match=True, aft_teacher=str(bench.teachers["AFT"]), batch_size=8)

    def test_the_student_learns_from_scaled_logits(self, bench: Any) -> None:
        kd = bench.make("KD", kd_match=True, aft_teacher=str(bench.teachers["AFT"]), kd_weight=1.0, batch_size=8)
        batches = bench.draw_minibatches(0)
        x = torch.cat([x for x, _ in batches])
        student, teacher = kd.predict(x), kd.teacher(x) / kd.match_scale
        tau = kd.hparams["kd_temperature"]
        log_p, log_q = (teacher / tau).log_softmax(1), (student / tau).log_softmax(1)
        expected = tau**2 * (log_p.exp() * (log_p - log_q)).sum(1).mean()
        assert kd.update(batches)["kd_loss"] == pytest.approx(expected.item(), rel=1e-5)

    def test_it_looks_at_the_views_that_are_trained_on(self, bench: Any) -> None:
        facts = bench.get_facts("KD", {"n_views": 1, "batch_size": 16})
        splits = [(MovedSplit(in_), out) if i != TEST_ENV else (in_, out) for i, (in_, out) in enumerate(bench.splits)]
        facts = replace(facts, splits=splits)
        looked_at = {row.numpy().tobytes() for x, _ in read_in_splits(facts) for row in x}
        trained_on = {row.numpy().tobytes() for batches in draw_minibatches(facts, 2) for x, _ in batches for row in x}
        assert trained_on < looked_at

    def test_without_it_nothing_is_asked_of_the_teacher_that_is_not_there(self, bench: Any) -> None:
        kd = bench.make("KD")
        assert kd.match_scale == 1
        assert "kd_match_scale" not in kd.hparams

    def test_a_whole_run_makes_dafts_own_teacher_and_goes_on(self, tiny: Any) -> None:
        hparams = {"kd_match": True, "aft_eps": 0.1, "aft_attack": "features"}
        whole = tiny.train("a/kd", hparams, algorithm="KD")
        daft = tiny.train("b/daft", {name: hparams[name] for name in ("aft_eps", "aft_attack")}, algorithm="DAFT")
        stores = [{path.name for path in (run.parent / "teachers").iterdir()} for run in (whole, daft)]
        assert stores[0] == stores[1]
        first = json.loads((whole / "results.jsonl").read_text().splitlines()[0])
        assert (first["teacher"]["algorithm"], first["teachers"]["aft_teacher"]["algorithm"]) == ("ERM", "AFT")
        with pytest.raises(stopping.Stopped), stopping.listening():
            tiny.train("a/broken", hparams, algorithm="KD", on_step=stop_after(3))
        broken = tiny.train("a/broken", hparams, algorithm="KD")
        one, other = (load(folder / "model.pkl") for folder in (whole, broken))
        assert one["model_hparams"]["kd_match_scale"] == other["model_hparams"]["kd_match_scale"] != 1
        assert all(torch.equal(value, other["model_dict"][name]) for name, value in one["model_dict"].items())

    def plan(self, folder: Path, hparams: dict[str, Any], *algorithms: str) -> dict[str, Any]:
        sweep = SweepArgs(["Debug28"], list(algorithms), str(folder), n_trials=1, n_hparams=1, single_test_envs=True)
        jobs = make_plan(replace(sweep, hparams=json.dumps(hparams)))
        return {job.folder: job for job in jobs if job.args.test_envs == [0]}

    def test_a_sweep_plans_the_second_teacher_only_where_it_is_asked_for(self, tmp_path: Path) -> None:
        given = {"aft_eps": 0.1, "batch_size": 8}
        plain = self.plan(tmp_path, given, "KD", "DAFT")
        kd_alone = self.plan(tmp_path, {"batch_size": 8}, "KD")
        (kd,) = [job for job in plain.values() if job.args.algorithm == "KD"]
        assert kd.folder in kd_alone  # DAFT's keys are none of its own
        assert len(kd.needs) == 1
        matched = self.plan(tmp_path, given | {"kd_match": True}, "KD", "DAFT")
        (kd,) = [job for job in matched.values() if job.args.algorithm == "KD"]
        (daft,) = [job for job in matched.values() if job.args.algorithm == "DAFT"]
        assert set(daft.needs) < set(kd.needs)
        assert {plain[need].stage for need in kd.needs} == {"erm_teacher", "aft_teacher"}
        assert daft.folder in plain
        with pytest.raises(UsageError, match="aft_eps"):
            self.plan(tmp_path, {"aft_eps": 0.1}, "KD")
