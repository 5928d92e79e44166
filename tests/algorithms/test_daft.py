from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from daft_domainbed.arguments import TrainArgs
from daft_domainbed.errors import UsageError
from daft_domainbed.host import contract
from daft_domainbed.training.engine import train
from tests.conftest import get_defaults

both_students = pytest.mark.parametrize("algorithm", ["KD", "DAFT"])


def clone_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_equal(module: nn.Module, state: dict[str, Tensor]) -> bool:
    found = module.state_dict()
    return found.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in found.items())


# --- the update --------------------------------------------------------------------------------------------------


@both_students
@pytest.mark.parametrize(("weight", "temperature"), [(0.7, 4.0), (0.3, 1.0), (1.0, 10.0)])
def test_an_update_is_the_step_of_the_formula(bench: Any, algorithm: str, weight: float, temperature: float) -> None:
    student = bench.make(algorithm, kd_weight=weight, kd_temperature=temperature)
    plain = bench.make("ERM")
    assert is_equal(student, plain.state_dict())  # making or loading a teacher draws no number of the student's
    teacher = bench.make("ERM", backbone="resnet8_w4")
    teacher.load_state_dict(torch.load(bench.teachers["AFT" if algorithm == "DAFT" else "ERM"])["model_dict"])
    teacher.eval()
    for model in (student, student.teacher.model, plain, teacher):  # what rounding does differs from machine to machine
        model.double()
    for model in (student, plain):  # Adam's division by tiny gradients would magnify what is left of it
        model.optimizer = torch.optim.SGD(model.network.parameters(), lr=0.1)
    for step in range(3):
        minibatches = [(x.double(), y) for x, y in bench.draw_minibatches(step)]
        x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
        p = torch.softmax(teacher.network(x).detach() / temperature, 1)
        logits = plain.network(x)
        q = torch.softmax(logits / temperature, 1)
        task = -torch.softmax(logits, 1)[torch.arange(len(y)), y].log().mean()
        distillation = temperature**2 * (p * (p / q).log()).sum(1).mean()
        loss = (1 - weight) * task + weight * distillation
        plain.optimizer.zero_grad()
        loss.backward()
        plain.optimizer.step()
        expected = {"loss": loss.item(), "task_loss": task.item(), "kd_loss": distillation.item()}
        assert student.update(minibatches) == pytest.approx(expected, rel=1e-9)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, atol=1e-9, rtol=1e-9)


@both_students
def test_without_weight_it_is_erm_to_the_last_bit(bench: Any, algorithm: str) -> None:
    student, plain = bench.make(algorithm, kd_weight=0.0), bench.make("ERM")
    bench.train(student, 4)
    bench.train(plain, 4)
    assert is_equal(student, plain.state_dict())


@both_students
@pytest.mark.parametrize(("weight", "matters"), [(1.0, False), (0.9, True)])
def test_with_all_weight_labels_do_not_matter(bench: Any, algorithm: str, weight: float, matters: bool) -> None:
    students = [bench.make(algorithm, kd_weight=weight) for _ in range(2)]
    for step in range(4):
        minibatches = bench.draw_minibatches(step)
        permuted = [(x, y.roll(1)) for x, y in minibatches]
        students[0].update(minibatches)
        students[1].update(permuted)
    assert is_equal(students[0], students[1].state_dict()) != matters


def test_daft_and_kd_differ_in_their_teacher_alone(bench: Any) -> None:
    same_weights = bench.make("AFT")  # not yet fine-tuned
    daft = bench.make("DAFT", teacher=str(bench.save(same_weights, "AFT")))
    kd = bench.make("KD")
    assert bench.train(daft, 3) == bench.train(kd, 3)
    assert is_equal(daft, kd.state_dict())
    other = bench.make("DAFT")
    bench.train(other, 3)
    assert not is_equal(other, kd.state_dict())


@both_students
def test_an_update_draws_no_random_number(bench: Any, algorithm: str) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    bench.train(bench.make(algorithm), 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


# --- the teacher -------------------------------------------------------------------------------------------------


@both_students
def test_the_teacher_never_changes(bench: Any, algorithm: str) -> None:
    student = bench.make(algorithm)
    teacher, start = clone_state(student.teacher.model), clone_state(student)
    for step in range(3):
        bench.train(student, 1, first=step)
        bench.host.misc.accuracy(student, [bench.draw_minibatches(9)[0]], None, "cpu")
        assert student.training  # the host's evaluation calls train() on the whole algorithm
        assert not any(module.training for module in student.teacher.model.modules())
    assert is_equal(student.teacher.model, teacher)
    assert all(p.grad is None and not p.requires_grad for p in student.teacher.model.parameters())
    # A student's batch norm, by contrast, has moved.
    assert not torch.equal(student.featurizer.bn.running_mean, start["featurizer.bn.running_mean"])


@both_students
def test_modes_reach_the_student_alone(bench: Any, algorithm: str) -> None:
    student = bench.make(algorithm)
    for mode in (False, True, False, True):
        student.train(mode)
        assert {module.training for module in student.modules()} == {mode}
        assert {module.training for module in student.teacher.model.modules()} == {False}
    x, _ = bench.draw_minibatches(0)[0]
    answer = student.teacher(x)
    student.teacher.model.train()  # nor would anyone who found the teacher set it to training
    assert torch.equal(student.teacher(x), answer)
    assert not any(module.training for module in student.teacher.model.network.modules())


@both_students
def test_the_student_holds_nothing_of_its_teacher(bench: Any, algorithm: str) -> None:
    student = bench.make(algorithm)
    bench.train(student, 1)
    theirs = {value.data_ptr() for value in student.teacher.model.state_dict().values()}
    assert not theirs & {value.data_ptr() for value in student.state_dict().values()}
    erm = bench.host.algorithms.ERM(bench.input_shape, bench.num_classes, bench.num_domains, student.hparams)
    assert list(erm.state_dict()) == list(student.state_dict())
    erm.load_state_dict(student.state_dict(), strict=True)
    x, _ = bench.draw_minibatches(0)[0]
    assert torch.equal(erm.eval().predict(x), student.eval().predict(x))
    (group,) = student.optimizer.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in student.network.parameters()}
    assert not any(module is student.teacher.model for module in student.modules())


@both_students
def test_predictions_are_the_students_at_every_step(bench: Any, algorithm: str) -> None:
    student = bench.make(algorithm)
    x, _ = bench.draw_minibatches(0)[0]
    for step in range(3):
        student.eval()
        assert torch.equal(student.predict(x), student.classifier(student.featurizer(x)))
        assert not torch.equal(student.predict(x), student.teacher(x))
        student.train()
        bench.train(student, 1, first=step)


@both_students
def test_the_teacher_answers_as_its_checkpoint_does(bench: Any, algorithm: str) -> None:
    student = bench.make(algorithm)
    kind = "AFT" if algorithm == "DAFT" else "ERM"
    model = bench.make("ERM", backbone="resnet8_w4")
    model.load_state_dict(torch.load(bench.teachers[kind])["model_dict"])
    x, _ = bench.draw_minibatches(0)[0]
    assert torch.equal(student.teacher(x), model.eval().predict(x))
    assert student.teacher.path == bench.teachers[kind]


def test_a_linear_probe_can_teach(bench: Any) -> None:
    probe = bench.make("ERM", backbone="resnet8_w4", backbone_frozen=True)
    student = bench.make("KD", teacher=str(bench.save(probe, "ERM")))
    x, _ = bench.draw_minibatches(0)[0]
    assert torch.equal(student.teacher(x), probe.eval().predict(x))
    bench.train(student, 1)


@both_students
def test_a_copy_goes_on_alike(bench: Any, algorithm: str) -> None:
    student = bench.make(algorithm)
    bench.train(student, 2)
    twin = copy.deepcopy(student)
    assert bench.train(student, 2, first=2) == bench.train(twin, 2, first=2)
    assert is_equal(twin, student.state_dict())
    assert not any(module.training for module in twin.teacher.model.modules())


def test_noise_without_a_box_is_distilled_too(noise_bench: Any) -> None:
    for algorithm in ("KD", "DAFT"):
        assert np.isfinite([losses["loss"] for losses in noise_bench.train(noise_bench.make(algorithm), 2)]).all()


# --- refusals ----------------------------------------------------------------------------------------------------


def test_daft_refuses_a_plain_teacher(bench: Any) -> None:
    with pytest.raises(UsageError, match="'daft-domainbed train --algorithm AFT'") as caught:
        bench.make("DAFT", teacher=str(bench.teachers["ERM"]))
    assert "checkpoint of ERM" in str(caught.value)
    assert "--algorithm KD" in str(caught.value)


def test_kd_refuses_an_adversarially_fine_tuned_teacher(bench: Any) -> None:
    with pytest.raises(UsageError, match="'daft-domainbed train --algorithm ERM'") as caught:
        bench.make("KD", teacher=str(bench.teachers["AFT"]))
    assert "checkpoint of AFT" in str(caught.value)
    assert "--algorithm DAFT" in str(caught.value)


@pytest.mark.parametrize("algorithm", ["KD", "DAFT", "AFT"])
def test_nothing_is_taught_outside_a_run(bench: Any, algorithm: str) -> None:
    hparams = get_defaults(bench.host, algorithm, bench.dataset, {})
    kind = contract.get_algorithm_class(bench.host, algorithm)
    with pytest.raises(UsageError, match="'teacher' cannot be checked.*daft-domainbed train"):
        kind(bench.input_shape, bench.num_classes, bench.num_domains, hparams)


# --- through the train loop --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, so that all runs share their teachers."""
    return tmp_path_factory.mktemp("runs")


def run_training(
    folder: Path, algorithm: str, dataset: str = "Debug28", **hparams: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Train with the engine; return weights and records."""
    name = "-".join([dataset, algorithm, *map(str, hparams.values())])
    small = {"batch_size": 8} | ({"backbone": "resnet8_w2"} if algorithm != "AFT" else {})
    if algorithm != "ERM":
        small |= {"teacher_backbone": "resnet8_w3", "teacher_steps": 4}
    out = train(
        TrainArgs(
            dataset=dataset,
            algorithm=algorithm,
            hparams=json.dumps(small | hparams),
            steps=5,
            checkpoint_freq=5,
            test_envs=[2],
            seed=3,
            output_dir=str(folder / name),
            device="cpu",
        ),
        quiet=True,
    )
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return torch.load(out / "model.pkl", weights_only=True)["model_dict"], records


@both_students
def test_without_weight_a_whole_run_is_erms(runs_folder: Path, algorithm: str) -> None:
    # The drawings are shifted and mirrored by the global generator, which a teacher must not move.
    erm, erm_records = run_training(runs_folder, "ERM", "EmojiStyles")
    student, records = run_training(runs_folder, algorithm, "EmojiStyles", kd_weight=0)
    assert student.keys() == erm.keys()
    assert all(torch.equal(value, student[name]) for name, value in erm.items())
    assert [record["step"] for record in records] == [0, 4]
    for ours, theirs in zip(records, erm_records, strict=True):
        names = [name for name in theirs if name.endswith("_acc")]
        assert len(names) == 8
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
        assert ours["loss"] == theirs["loss"] == ours["task_loss"]


def test_a_whole_run_records_what_auto_became(runs_folder: Path) -> None:
    _, records = run_training(runs_folder, "AFT", aft_attack="features")
    recorded = {name: value for name, value in records[-1]["hparams"].items() if name.startswith("aft_")}
    assert (recorded["aft_eps"], recorded["aft_norm"], recorded["aft_attack_steps"]) == (0.025, "l2", 0)
    assert records[0]["teacher"]["algorithm"] == "ERM"


def test_a_probes_student_trains_through_the_loop(runs_folder: Path) -> None:
    _, records = run_training(runs_folder, "DAFT", teacher_frozen=True, aft_attack="features", aft_steps=2)
    assert records[0]["teacher"]["algorithm"] == "AFT"
    assert records[0]["teacher"]["teacher"]["algorithm"] == "ERM"
