"""Distillation from a clean and a robust teacher: a step by hand, and the two balances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from daft_domainbed.errors import UsageError


@pytest.fixture
def teachers(bench: Any) -> dict[str, str]:
    """A clean and a robust teacher, made once for all tests."""
    if "AT" not in bench.teachers:
        at = bench.make("AT", seed=2, at_steps=2, lr=1e-2)
        bench.train(at, 5)
        bench.teachers["AT"] = bench.save(at, "AT")
    return {"clean_teacher": str(bench.teachers["ERM"]), "robust_teacher": str(bench.teachers["AT"])}


def test_an_update_is_the_step_of_the_formula(bench: Any, teachers: dict[str, str]) -> None:
    student = bench.make("BMTARD", at_steps=2, bmtard_temperature_rate=0.5, bmtard_weight_rate=0.5, **teachers)
    plain = bench.make("ERM")
    for model in (student, plain):
        model.optimizer = torch.optim.SGD(model.network.parameters(), lr=0.1)
    temperatures, weights, first = [1.0, 1.0], [0.5, 0.5], None
    for step in range(3):
        minibatches = bench.draw_minibatches(step)
        x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
        generator = torch.Generator()
        generator.set_state(student.start_generator.get_state())
        start = 0.001 * torch.randn(x.shape, generator=generator)
        plain.eval()
        x_adv = (x + start).clamp(0, 1)
        for _ in range(2):
            x_adv = x_adv.detach().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(plain.network(x_adv), y), x_adv)
            x_adv = torch.clamp(torch.clamp(x_adv + 2 / 255 * slope.sign(), x - 8 / 255, x + 8 / 255), 0, 1).detach()
        plain.train()
        attacked, clean = plain.network(x_adv), plain.network(x)
        p = [
            torch.softmax(student.robust_teacher(x_adv) / temperatures[0], 1),
            torch.softmax(student.clean_teacher(x) / temperatures[1], 1),
        ]
        losses = [(q * (q.log() - z.log_softmax(1))).sum(1).mean() for q, z in zip(p, (attacked, clean), strict=True)]
        entropies = [-(q * q.log()).sum(1).mean().item() for q in p]
        direction = 1 if entropies[0] > entropies[1] else -1
        temperatures = [
            min(max(t - d * 0.5, 1), 10) for t, d in zip(temperatures, (direction, -direction), strict=True)
        ]
        first = first or [loss.item() for loss in losses]
        ratios = [loss.item() / start for loss, start in zip(losses, first, strict=True)]
        weights = [0.5 * w + 0.5 * r / sum(ratios) for w, r in zip(weights, ratios, strict=True)]
        loss = weights[0] * losses[0] + weights[1] * losses[1]
        plain.optimizer.zero_grad()
        loss.backward()
        plain.optimizer.step()
        expected = {
            "loss": loss.item(),
            "robust_loss": losses[0].item(),
            "clean_loss": losses[1].item(),
            "robust_weight": weights[0],
            "robust_temperature": temperatures[0],
            "clean_temperature": temperatures[1],
            "robust_entropy": entropies[0],
            "clean_entropy": entropies[1],
        }
        assert student.update(minibatches) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, atol=1e-4, rtol=1e-3)


def test_a_step_costs_its_attack_two_passes_and_one_of_each_teacher(bench: Any, teachers: dict[str, str]) -> None:
    student = bench.make("BMTARD", at_steps=2, **teachers)
    counts = {"student": 0, "clean": 0, "robust": 0}
    models = {"student": student, "clean": student.clean_teacher.model, "robust": student.robust_teacher.model}
    for name, model in models.items():
        model.network.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    bench.train(student, 1)
    assert counts == {"student": 2 + 2, "clean": 1, "robust": 1}


def test_a_teacher_can_teach_alone(bench: Any, teachers: dict[str, str]) -> None:
    alone = {"bmtard_weight_rate": 0.0, "bmtard_temperature_rate": 0.0}
    for weight, name in ((1.0, "robust_loss"), (0.0, "clean_loss")):
        student = bench.make("BMTARD", at_steps=1, bmtard_weight=weight, **alone, **teachers)
        for values in bench.train(student, 2):
            assert values["loss"] == pytest.approx(values[name], rel=1e-6)
            assert values["clean_temperature"] == values["robust_temperature"] == 1


def test_labels_serve_the_attack_alone(bench: Any, teachers: dict[str, str]) -> None:
    students = [bench.make("BMTARD", at_eps=0, **teachers) for _ in range(2)]
    minibatches = bench.draw_minibatches(0)
    students[0].update(minibatches)
    students[1].update([(x, y.roll(1)) for x, y in minibatches])
    for first, second in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert torch.equal(first, second)


def test_temperatures_cross_their_range_in_half_of_the_run(bench: Any, teachers: dict[str, str]) -> None:
    student = bench.make("BMTARD", **teachers)
    assert student.hparams["bmtard_temperature_rate"] == pytest.approx(9 / 5)  # the workbench's run has 10 steps


def test_entropies_meet(bench: Any, teachers: dict[str, str]) -> None:
    student = bench.make("BMTARD", at_eps=0, bmtard_temperature_rate=0.1, **teachers)
    student.robust_teacher.model.classifier.weight.mul_(6)  # sharper by far
    minibatches = bench.draw_minibatches(0)
    read = [student.update(minibatches) for _ in range(20)]
    gaps = [values["clean_entropy"] - values["robust_entropy"] for values in read]
    assert gaps[0] > 0.1
    assert abs(gaps[-1]) < 0.2 * gaps[0]
    assert read[-1]["robust_temperature"] > 1.5 > read[-1]["clean_temperature"]


def test_a_clean_teacher_is_no_robust_one(bench: Any, teachers: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="checkpoint of ERM"):
        bench.make("BMTARD", **(teachers | {"robust_teacher": teachers["clean_teacher"]}))
