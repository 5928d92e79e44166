from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from daft_domainbed.errors import UsageError
from daft_domainbed.functional.attacks import run_pgd
from daft_domainbed.functional.input_spec import INPUT_SPECS
from daft_domainbed.functional.out_distribution import measure_uniform_divergence
from daft_domainbed.training import resume
from tests.algorithms.by_hand import count_images, draw_minibatches, is_equal, make, train

FEW = {"ratio_steps": 2, "ratio_outside_steps": 3, "lr": 1e-2}


def test_radii_are_resolved() -> None:
    assert make("RATIO").hparams["ratio_eps"] == 0.5
    hparams = make("RATIO", ratio_eps="auto*1/2").hparams
    assert (hparams["ratio_eps"], hparams["ratio_outside_eps"], hparams["ratio_outside"]) == (0.25, 0.5, "digits")


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_a_step_is_the_formulas(weight: float) -> None:
    algorithm = make("RATIO", ratio_weight=weight, **FEW)
    train(algorithm, 2)
    twin = copy.deepcopy(algorithm)
    network = twin.network
    x, y = (torch.cat(parts) for parts in zip(*draw_minibatches(2), strict=True))
    z = twin.outside.draw(len(x))
    attack = {"norm": "l2", "spec": INPUT_SPECS["unit"]}
    network.eval()
    inside = run_pgd(lambda x: F.cross_entropy(network(x), y, reduction="sum"), x, eps=0.5, steps=2, **attack)
    outside = run_pgd(lambda z: measure_uniform_divergence(network(z)).sum(), z, eps=1.0, steps=3, **attack)
    network.train()
    logits = network(torch.cat([inside, outside]))
    parts = F.cross_entropy(logits[:18], y), measure_uniform_divergence(logits[18:]).mean()
    loss = 0.5 * parts[0] + 0.5 * weight * parts[1]
    twin.optimizer.zero_grad()
    loss.backward()
    twin.optimizer.step()

    (found,) = train(algorithm, 1, first=2)
    assert list(found)[0] == "loss"
    assert found["loss"] == pytest.approx(loss.item())
    assert (found["inside_loss"], found["outside_loss"]) == pytest.approx([part.item() for part in parts])
    assert found["inside_accuracy"] == (logits[:18].argmax(1) == y).float().mean()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(algorithm.network.state_dict()[name], value, msg=name)


def test_a_step_costs_two_attacks_and_one_pass_over_both() -> None:
    assert count_images(make("RATIO", ratio_steps=2, ratio_outside_steps=3)) == (2 + 3 + 2) * 18


def test_the_uniform_target_makes_it_unsure_where_labels_cannot() -> None:
    confidences = {}
    for weight in (0.0, 1.0):
        algorithm = make(
            "RATIO", ratio_weight=weight, ratio_outside="noise", ratio_steps=1, ratio_outside_steps=1, lr=2e-2
        )
        algorithm.classifier.weight.data.mul_(8)  # sure of everything
        confidences[weight] = [losses["outside_confidence"] for losses in train(algorithm, 20)]
    assert confidences[0.0][0] == confidences[1.0][0] > 0.3
    assert confidences[1.0][-1] < 0.25
    assert confidences[0.0][-1] > confidences[1.0][-1] + 0.1


def test_it_neither_moves_nor_needs_the_global_random_state() -> None:
    before = torch.get_rng_state()
    runs = []
    for global_seed in (0, 1):
        algorithm = make("RATIO", **FEW)
        torch.manual_seed(global_seed)
        runs.append(train(algorithm, 2))
    torch.set_rng_state(before)
    assert runs[0] == runs[1]


def test_its_weights_are_erms() -> None:
    assert make("RATIO").state_dict().keys() == make("ERM").state_dict().keys()


def test_all_that_changes_is_saved() -> None:
    assert resume.list_unsaved(make("RATIO")) == []


def test_it_can_be_copied_in_the_middle() -> None:
    algorithm = make("RATIO", **FEW)
    train(algorithm, 1)
    twin = copy.deepcopy(algorithm)
    assert train(algorithm, 2, first=1) == train(twin, 2, first=1)
    assert is_equal(algorithm, twin)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no image below"):
        make("RATIO", ratio_outside=f"folder:{tmp_path}")
