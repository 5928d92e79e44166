"""Calibrated robust fine-tuning: a step by hand, and the teacher that follows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from daft_domainbed.training import resume

pytest.importorskip("open_clip")


@pytest.fixture
def start(bench: Any) -> dict[str, str]:
    """A small CLIP model to start from, made once for all tests."""
    if "CLIP" not in bench.teachers:
        clip = bench.make("CLIP", seed=3, backbone="open_clip/small")
        bench.train(clip, 2)
        clip.eval().predict(bench.draw_minibatches(0)[0][0])
        bench.teachers["CLIP"] = bench.save(clip, "CLIP")
    return {"teacher": str(bench.teachers["CLIP"])}


def test_it_starts_as_the_clip_model(bench: Any, start: dict[str, str]) -> None:
    carot = bench.make("CaRot", **start)
    clip = bench.make("ERM", backbone="open_clip/small")
    clip.load_state_dict(torch.load(start["teacher"])["model_dict"])
    x, _ = bench.draw_minibatches(1)[0]
    torch.testing.assert_close(carot.eval().predict(x), clip.eval().predict(x))
    assert carot.hparams["backbone"] == "open_clip/small"
    assert carot.hparams["carot_period"] == 1  # 2 % of ten steps
    assert carot.hparams["carot_positives"] == "class"


@pytest.mark.parametrize("positives", ["class", "own"])
def test_updates_are_the_steps_of_the_formula(bench: Any, start: dict[str, str], positives: str) -> None:
    carot = bench.make("CaRot", carot_positives=positives, carot_period=2, **start)
    plain = copy.deepcopy(carot.featurizer.network.clip)
    average = copy.deepcopy(plain).eval()
    for module in (carot.featurizer, plain):
        module.train()
    carot.optimizer = torch.optim.SGD(carot.network.parameters(), lr=0.01)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    for step in range(3):
        minibatches = bench.draw_minibatches(step, size=4)
        x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
        generator = torch.Generator()
        generator.set_state(carot.generator.get_state())
        tokens = carot.prompts[y, torch.randint(4, (12,), generator=generator)]

        def compare(model: Any, x: Any = x, tokens: Any = tokens) -> Any:
            return model.logit_scale.exp() * model.encode_image(2 * x - 1, True) @ model.encode_text(tokens, True).T

        logits = compare(plain)
        same = (y[:, None] == y).float() if positives == "class" else torch.eye(12)
        targets = same / same.sum(1, keepdim=True)
        w_v, w_t = plain.visual.attnpool.c_proj.weight.T, plain.text_projection
        losses = {
            "contrastive_loss": (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2,
            "rho_loss": (w_v @ w_t.T).square().sum().sqrt(),
            "oc_loss": (w_v.T @ w_v - torch.eye(64)).square().sum().sqrt(),
        }
        weights = {"contrastive_loss": 1.0, "rho_loss": 0.05, "oc_loss": 0.2, "sd_loss": 1.5}
        if step > 0:
            with torch.no_grad():
                wanted = compare(average)
            pairs = ((wanted, logits), (wanted.T, logits.T))
            losses["sd_loss"] = sum(-(a.softmax(1) * b.log_softmax(1)).sum(1).mean() for a, b in pairs)
        loss = sum(weights[name] * value for name, value in losses.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 2 == 0:
            momentum = min(0.9, 0.05 + 0.85 * step / 2)  # a fifth of the ten steps
            for slow, fast in zip(average.state_dict().values(), plain.state_dict().values(), strict=True):
                slow.copy_(momentum * slow + (1 - momentum) * fast if slow.is_floating_point() else fast)
        expected = {"loss": loss.item()} | {name: value.item() for name, value in losses.items()}
        assert carot.update(minibatches) == pytest.approx(expected, rel=1e-3)
    averaged = carot.average.featurizer.network.clip
    for ours, theirs in ((carot.featurizer.network.clip, plain), (averaged, average)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_step_costs_a_pass_of_the_student_and_of_the_average(bench: Any, start: dict[str, str]) -> None:
    carot, counts = bench.make("CaRot", **start), []
    for name, featurizer in (("student", carot.featurizer), ("average", carot.average.featurizer)):
        for part in (featurizer, featurizer.network.clip.transformer):
            part.register_forward_hook(lambda *_, name=name: counts.append(name))
    for step in range(2):
        carot.update(bench.draw_minibatches(step, size=2))
    # An image and a text tower each; in the first step the average is the student.
    assert sorted(counts) == ["average"] * 2 + ["student"] * 4


def test_all_that_changes_is_saved(bench: Any, start: dict[str, str]) -> None:
    assert resume.list_unsaved(bench.make("CaRot", **start)) == []


def test_without_its_weights_it_is_flyp(bench: Any, start: dict[str, str]) -> None:
    carot = bench.make("CaRot", carot_oc=0.0, carot_sd=0.0, carot_rho=0.0, **start)
    for step in range(2):
        values = carot.update(bench.draw_minibatches(step, size=2))
        assert values["loss"] == values["contrastive_loss"]
        assert "sd_loss" not in values


def test_the_constraint_raises_the_smallest_singular_value(bench: Any, start: dict[str, str]) -> None:
    carot = bench.make("CaRot", carot_oc=5.0, carot_sd=0.0, carot_rho=0.0, lr=1e-2, **start)
    before = torch.linalg.svdvals(carot.towers.get_image_projection().detach()).min()
    for step in range(3):
        carot.update(bench.draw_minibatches(step, size=2))
    assert torch.linalg.svdvals(carot.towers.get_image_projection().detach()).min() > before + 0.01


def test_the_average_is_no_part_of_the_student(bench: Any, start: dict[str, str]) -> None:
    carot, plain = bench.make("CaRot", **start), bench.make("ERM", backbone="open_clip/small")
    carot.update(bench.draw_minibatches(0, size=2))
    plain.load_state_dict(carot.state_dict(), strict=True)
    (group,) = carot.optimizer.param_groups
    averaged = {id(parameter) for parameter in carot.average.featurizer.parameters()}
    assert not averaged & {id(parameter) for parameter in group["params"]}
    assert not carot.average.featurizer.training
