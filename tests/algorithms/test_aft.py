from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.errors import UsageError
from daft_domainbed.functional import input_spec
from daft_domainbed.functional.attacks import run_pgd
from daft_domainbed.models.resnet8 import ResNet8

LR, WEIGHT_DECAY = 1e-2, 1e-3
OPTIMIZER = {"lr": LR, "weight_decay": WEIGHT_DECAY}
SEED = 5  # of the workbench's run; the attack's random starts are drawn with it


def clone_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_equal(module: nn.Module, state: dict[str, Tensor]) -> bool:
    found = module.state_dict()
    return found.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in found.items())


def load_plain(bench: Any) -> nn.Sequential:
    """Read the ERM teacher's checkpoint into layers that know nothing of the package's algorithms."""
    state = torch.load(bench.teachers["ERM"], weights_only=True)["model_dict"]
    network = nn.Sequential(ResNet8(3, 4), nn.Linear(16, bench.num_classes))
    network.load_state_dict({name[8:]: value for name, value in state.items() if name.startswith("network.")})
    return network


def blend(teacher_logits: Tensor, labels: Tensor, mix: float, temperature: float) -> Tensor:
    one_hot = torch.eye(teacher_logits.shape[1])[labels]
    return (1 - mix) * one_hot + mix * torch.softmax(teacher_logits.detach() / temperature, 1)


def fine_tune(
    bench: Any, n_steps: int, mix: float, temperature: float, perturb: Callable[..., Tensor] | None = None
) -> nn.Linear:
    """Fine-tune the teacher's head alone, in the simplest code there is; `perturb` may replace the features."""
    features, head = load_plain(bench).eval()
    erm_head = copy.deepcopy(head)
    optimizer = torch.optim.Adam(head.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    for step in range(n_steps):
        x, y = (torch.cat(parts) for parts in zip(*bench.draw_minibatches(step), strict=True))
        with torch.no_grad():
            z = features(x)
        q = blend(erm_head(z), y, mix, temperature)
        if perturb is not None:
            z = perturb(features, head, x, y, z)
        loss = -(q * head(z).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


# --- without a radius --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["pixels", "features"])
@pytest.mark.parametrize(("mix", "temperature"), [(0.0, 1.0), (0.5, 2.0), (1.0, 1.0)])
@pytest.mark.parametrize(("weight", "tolerance"), [(0.0, 0.0), (1.0, 0.0), (0.3, 1e-6)])
def test_without_radius_it_is_plain_fine_tuning_of_the_head(
    bench: Any, attack: str, mix: float, temperature: float, weight: float, tolerance: float
) -> None:
    aft = bench.make(
        "AFT",
        aft_eps=0,
        aft_attack=attack,
        aft_weight=weight,
        aft_target_mix=mix,
        aft_target_temperature=temperature,
        **OPTIMIZER,
    )
    bench.train(aft, 5)
    head = fine_tune(bench, 5, mix, temperature)
    for name, value in aft.classifier.state_dict().items():
        torch.testing.assert_close(value, head.state_dict()[name], atol=tolerance, rtol=0)
        assert not torch.equal(value, load_plain(bench)[1].state_dict()[name])


def test_images_that_come_again_are_encoded_once(bench: Any) -> None:
    heads = []
    for augmented in (True, False):
        aft = bench.make("AFT", aft_attack="features", data_augmentation=augmented, **OPTIMIZER)
        assert hasattr(aft.featurizer, "memory") != augmented
        bench.train(aft, 5)
        heads.append(aft.classifier.weight)
    torch.testing.assert_close(*heads)


@pytest.mark.parametrize("attack", ["pixels", "features"])
def test_without_weight_the_radius_does_not_matter(bench: Any, attack: str) -> None:
    aft = bench.make("AFT", aft_eps=1.0, aft_attack=attack, aft_weight=0.0, aft_target_mix=0.5, **OPTIMIZER)
    bench.train(aft, 3)
    assert torch.equal(aft.classifier.weight, fine_tune(bench, 3, 0.5, 1.0).weight)


def test_without_radius_the_whole_network_is_fine_tuned_plainly(bench: Any) -> None:
    aft = bench.make("AFT", aft_eps=0, aft_scope="all", aft_target_mix=0.5, **OPTIMIZER)
    bench.train(aft, 3)
    teacher, network = load_plain(bench).eval(), load_plain(bench).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    for step in range(3):
        x, y = (torch.cat(parts) for parts in zip(*bench.draw_minibatches(step), strict=True))
        loss = -(blend(teacher(x), y, 0.5, 1.0) * network(x).log_softmax(1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert is_equal(aft.network, network.state_dict())


# --- with a radius -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_pixels_are_attacked_through_the_backbone_against_the_label(bench: Any, norm: str, mix: float) -> None:
    eps = {"linf": 8 / 255, "l2": 0.5}[norm]
    aft = bench.make("AFT", aft_eps=eps, aft_norm=norm, aft_attack_steps=2, aft_target_mix=mix, **OPTIMIZER)
    bench.train(aft, 3)
    generator = torch.Generator().manual_seed(SEED)

    def perturb(features: nn.Module, head: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        def loss(x: Tensor) -> Tensor:
            return F.cross_entropy(head(features(x)), y, reduction="sum")

        worst = run_pgd(loss, x, eps=eps, norm=norm, steps=2, spec=input_spec.INPUT_SPECS["unit"], generator=generator)
        assert not torch.equal(worst, x)
        return features(worst).detach()

    torch.testing.assert_close(aft.classifier.weight, fine_tune(bench, 3, mix, 1.0, perturb).weight)


def test_features_are_attacked_within_a_share_of_their_mean_norm(bench: Any) -> None:
    aft = bench.make("AFT", aft_attack="features", aft_attack_steps=4, aft_eps=0.2, aft_target_mix=0.5, **OPTIMIZER)
    bench.train(aft, 3)
    generator = torch.Generator().manual_seed(SEED)

    def perturb(features: nn.Module, head: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        radius = 0.2 * z.square().sum(1).sqrt().mean()
        return run_pgd(
            lambda z: F.cross_entropy(head(z), y, reduction="sum"),
            z,
            eps=radius,
            norm="l2",
            steps=4,
            generator=generator,
        )

    torch.testing.assert_close(aft.classifier.weight, fine_tune(bench, 3, 0.5, 1.0, perturb).weight)


def test_all_images_of_a_domain_can_share_an_adversary(bench: Any) -> None:
    aft = bench.make("AFT", aft_attack="features", aft_adversary="domain", aft_eps=0.2, **OPTIMIZER)
    bench.train(aft, 3)
    generator = torch.Generator().manual_seed(SEED)

    def perturb(features: nn.Module, head: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        radius = 0.2 * z.square().sum(1).sqrt().mean()
        domains = list(zip(z.chunk(3), y.chunk(3), strict=True))  # minibatches of three domains are as large

        def add(deltas: Tensor) -> Tensor:
            losses = [
                F.cross_entropy(head(z + d), y, reduction="sum") for d, (z, y) in zip(deltas, domains, strict=True)
            ]
            return torch.stack(losses).sum()

        deltas = run_pgd(add, z.new_zeros(3, z.shape[1]), eps=radius, norm="l2", steps=10, generator=generator)
        assert 0 < deltas.norm(dim=1).max() <= radius * (1 + 1e-5)
        return torch.cat([z + d for d, (z, _) in zip(deltas, domains, strict=True)])

    torch.testing.assert_close(aft.classifier.weight, fine_tune(bench, 3, 0.5, 1.0, perturb).weight)


def test_the_bound_is_computed_from_the_head_and_the_features(bench: Any) -> None:
    aft = bench.make("AFT", aft_attack="features", aft_eps=0.1, aft_target_mix=0.5, aft_weight=0.5)
    x, y = (torch.cat(parts) for parts in zip(*bench.draw_minibatches(0), strict=True))
    with torch.no_grad():
        features, head = load_plain(bench).eval()
        z = features(x).double().numpy()
        logits, w = head(features(x)).double().numpy(), head.weight.double().numpy()
        q = blend(head(features(x)), y, 0.5, 1.0).double().numpy()
    radius = 0.1 * np.linalg.norm(z, axis=1).mean()
    clean = adversarial = 0.0
    for row, target in zip(logits, q, strict=True):
        for k in range(len(row)):
            raised = [row[j] + radius * np.linalg.norm(w[j] - w[k]) for j in range(len(row))]
            adversarial += target[k] * (np.log(np.exp(raised).sum()) - row[k]) / len(logits)
            clean += target[k] * (np.log(np.exp(row).sum()) - row[k]) / len(logits)
    losses = aft.update(bench.draw_minibatches(0))
    assert losses == pytest.approx(
        {"clean_loss": clean, "adversarial_loss": adversarial, "loss": (clean + adversarial) / 2}, rel=1e-5
    )


@pytest.mark.parametrize("attack", ["pixels", "features"])
@pytest.mark.parametrize("eps", ["auto*1/2", "auto*2"])
def test_a_perturbation_costs_more_than_none(bench: Any, attack: str, eps: str) -> None:
    for losses in bench.train(bench.make("AFT", aft_attack=attack, aft_eps=eps, aft_weight=0.5, aft_target_mix=0.0), 3):
        assert losses["adversarial_loss"] > losses["clean_loss"]
        assert losses["loss"] == pytest.approx((losses["adversarial_loss"] + losses["clean_loss"]) / 2)


VARIANTS = [
    {"aft_attack": attack, "aft_norm": norm, "aft_attack_steps": steps, "aft_scope": scope, "aft_target_mix": mix}
    for attack, norm, steps in (
        ("pixels", "linf", "auto"), ("pixels", "l2", 2), ("features", "auto", "auto"), ("features", "l2", 2),
    )
    for scope in ("head", "all")
    for mix in (0.0, 0.5)
]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
@pytest.mark.parametrize("dataset", ["EmojiStyles", "Debug28"])
def test_every_variant_trains_what_it_should_and_nothing_else(
    make_shared_workbench: Callable[[str], Any], dataset: str, variant: dict[str, Any]
) -> None:
    bench = make_shared_workbench(dataset)
    aft = bench.make("AFT", **variant)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    teacher, featurizer, head = map(clone_state, (aft.teacher.model, aft.featurizer, aft.classifier))
    assert is_equal(aft.network, clone_state(aft.teacher.model.network))  # it starts at its teacher
    for step in range(2):
        (losses,) = bench.train(aft, 1, first=step)
        assert losses.keys() == {"loss", "adversarial_loss"}  # of weight 1
        assert np.isfinite(list(losses.values())).all()
        bench.host.misc.accuracy(aft, [bench.draw_minibatches(9)[0]], None, "cpu")  # leaves train mode behind
        assert aft.training
    assert is_equal(aft.teacher.model, teacher)
    assert not any(module.training for module in aft.teacher.model.modules())
    assert not is_equal(aft.classifier, head)
    assert is_equal(aft.featurizer, featurizer) == (variant["aft_scope"] == "head")
    # Random starts are the attack's own affair.
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


def test_an_attack_leaves_batch_norm_alone(bench: Any) -> None:
    aft = bench.make("AFT", aft_scope="all", aft_attack_steps=5)
    before = int(aft.featurizer.bn.num_batches_tracked)
    bench.train(aft, 1)
    # One pass over the images and one over their perturbations, none for the five steps of the attack.
    assert int(aft.featurizer.bn.num_batches_tracked) == before + 2
    assert all(module.training for module in aft.featurizer.modules())


@pytest.mark.parametrize("scope", ["head", "all"])
def test_the_optimizer_holds_what_is_trained(bench: Any, scope: str) -> None:
    aft = bench.make("AFT", aft_scope=scope, **OPTIMIZER)
    (group,) = aft.optimizer.param_groups
    trained = {id(parameter) for parameter in group["params"]}
    assert trained == {id(p) for p in (aft.classifier if scope == "head" else aft.network).parameters()}
    assert (group["lr"], group["weight_decay"]) == (LR, WEIGHT_DECAY)


@pytest.mark.parametrize("scope", ["head", "all"])
def test_a_linear_probe_can_be_fine_tuned(bench: Any, scope: str) -> None:
    probe = bench.make("ERM", backbone="resnet8_w4", backbone_frozen=True)
    before = clone_state(probe.featurizer)
    bench.train(probe, 1)
    assert is_equal(probe.featurizer, before)
    aft = bench.make("AFT", teacher=str(bench.save(probe, "ERM")), aft_scope=scope)
    bench.train(aft, 1)
    assert is_equal(aft.featurizer, before) == (scope == "head")


# --- hyperparameters and checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ({}, ("linf", 4 / 255, 3)),
        ({"aft_norm": "l2"}, ("l2", 0.5, 3)),
        ({"aft_attack": "features"}, ("l2", 0.025, 0)),
        ({"aft_attack": "features", "aft_eps": "auto*2", "aft_attack_steps": 7}, ("l2", 0.05, 7)),
        ({"aft_eps": "8/255", "aft_attack_steps": 1}, ("linf", 8 / 255, 1)),
        ({"aft_norm": "l2", "aft_eps": "auto*1/4"}, ("l2", 0.125, 3)),
    ],
)
def test_every_auto_is_resolved_and_recorded(bench: Any, given: dict[str, Any], resolved: tuple[Any, ...]) -> None:
    hparams = bench.make("AFT", **given).hparams
    names = ("aft_norm", "aft_eps", "aft_attack_steps")
    assert tuple(hparams[name] for name in names) == pytest.approx(resolved)
    assert hparams["backbone"] == "resnet8_w4"


def test_it_takes_the_teachers_architecture_and_its_own_optimisation(bench: Any) -> None:
    theirs = {"backbone": "resnet8_w3", "nonlinear_classifier": True}
    teacher = bench.make("ERM", **theirs, lr=0.5, weight_decay=0.25, batch_size=7)
    aft = bench.make("AFT", teacher=str(bench.save(teacher, "ERM")), lr=0.01, batch_size=9)
    expected = theirs | {"lr": 0.01, "weight_decay": 0.0, "batch_size": 9}
    assert {name: aft.hparams[name] for name in expected} == expected
    bench.train(aft, 1)


@pytest.mark.parametrize("scope", ["head", "all"])
def test_its_checkpoint_is_an_erm_with_its_own_hyperparameters(bench: Any, scope: str) -> None:
    aft = bench.make("AFT", aft_scope=scope)
    bench.train(aft, 2)
    content = torch.load(bench.save(aft, "AFT"), weights_only=True)
    erm = bench.host.algorithms.ERM(bench.input_shape, bench.num_classes, bench.num_domains, content["model_hparams"])
    erm.load_state_dict(content["model_dict"], strict=True)
    x, _ = bench.draw_minibatches(0)[0]
    assert torch.equal(erm.eval().predict(x), aft.eval().predict(x))


def test_its_state_names_nothing_beyond_erms(bench: Any) -> None:
    erm = bench.make("ERM", backbone="resnet8_w4")
    assert list(bench.make("AFT").state_dict()) == list(erm.state_dict())


def test_it_can_be_copied_in_the_middle(bench: Any) -> None:
    aft = bench.make("AFT", **OPTIMIZER)
    bench.train(aft, 2)
    twin = copy.deepcopy(aft)
    assert bench.train(aft, 2, first=2) == bench.train(twin, 2, first=2)
    assert is_equal(twin, aft.state_dict())
    assert twin.classifier.weight is not aft.classifier.weight


# --- refusals ----------------------------------------------------------------------------------------------------


def test_a_bound_needs_a_linear_head(bench: Any) -> None:
    path = str(bench.save(bench.make("ERM", backbone="resnet8_w4", nonlinear_classifier=True), "ERM"))
    with pytest.raises(UsageError, match="nonlinear"):
        bench.make("AFT", teacher=path, aft_attack="features")
    (losses,) = bench.train(bench.make("AFT", teacher=path, aft_attack="features", aft_attack_steps=2), 1)
    assert np.isfinite(losses["loss"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"aft_attack": "features", "aft_norm": "linf"}, 'aft_norm is "linf"'),
        ({"aft_attack_steps": 0}, "aft_attack_steps is 0"),
        ({"aft_adversary": "domain"}, 'give "aft_attack": "features"'),
        ({"aft_adversary": "domain", "aft_attack": "features", "aft_attack_steps": 0}, "at least 1 step"),
    ],
)
def test_what_cannot_be_is_refused_before_a_teacher_is_made(bench: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench.make("AFT", teacher="auto", **given)  # the workbench fails where a teacher would be trained


def test_an_aft_teacher_is_refused(bench: Any) -> None:
    with pytest.raises(UsageError, match="'daft-domainbed train --algorithm ERM'"):
        bench.make("AFT", teacher=str(bench.teachers["AFT"]))
