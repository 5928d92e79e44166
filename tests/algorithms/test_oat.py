from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from daft_domainbed.algorithms.at import perturb
from daft_domainbed.algorithms.oat import OAT, are_lambdas, draw_choices, mix_losses, parse_lambdas
from daft_domainbed.errors import UsageError
from tests.algorithms.by_hand import build, count_images, draw_minibatches, is_equal, make, train

FEW = {"at_steps": 2, "lr": 1e-2, "weight_decay": 1e-3}


def strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name the first set of batch norm as ERM's own, and leave the modulation out."""
    return {name.replace(".first.", "."): value for name, value in state.items() if ".film." not in name}


def freeze_modulation(algorithm: Any) -> None:
    for name, parameter in algorithm.named_parameters():
        if ".film." in name:
            parameter.requires_grad_(False)


# --- oracles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "other"), [(0, "ERM"), (1, "AT")])
def test_at_its_ends_it_is_erm_and_at_bit_for_bit(value: int, other: str) -> None:
    oat = make("OAT", oat_lambdas=str(value), oat_lambda=value, oat_dual_norm=False, **FEW)
    freeze_modulation(oat)
    twin = make(other, **(FEW if other == "AT" else {"lr": 1e-2, "weight_decay": 1e-3}))
    for step in range(3):
        assert train(oat, 1, first=step)[0]["loss"] == pytest.approx(train(twin, 1, first=step)[0]["loss"], rel=1e-6)
    state = strip(oat.network.state_dict())
    assert state.keys() == twin.network.state_dict().keys()
    for name, tensor in twin.network.state_dict().items():
        assert torch.equal(state[name], tensor), name
    x = draw_minibatches(9)[0][0]
    assert torch.equal(oat.eval().predict(x), twin.eval().predict(x))


def test_building_draws_what_erm_draws() -> None:
    states = []
    with torch.random.fork_rng(devices=[]):
        for name in ("ERM", "OAT"):
            torch.manual_seed(0)
            build(name)
            states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_step_is_the_formulas() -> None:
    oat = make("OAT", oat_lambdas="0, 0.25, 1", oat_lambda=1, **FEW)
    train(oat, 2)
    twin = copy.deepcopy(oat)
    x, y = (torch.cat(parts) for parts in zip(*draw_minibatches(2), strict=True))
    choices, order = draw_choices(len(x), twin.lambdas, twin.lambda_generator).sort(stable=True)
    x, y = x[order], y[order]
    lambdas = torch.tensor([0.0, 0.25, 1.0])[choices]
    n_zero, n_clean = int((choices == 0).sum()), int((choices < 2).sum())
    assert n_zero == 6 < n_clean < 18
    clean = F.cross_entropy(twin._predict(x[:n_clean], choices[:n_clean], n_zero), y[:n_clean], reduction="none")
    x_adv = twin._attack(x[n_zero:], y[n_zero:], choices[n_zero:])
    adversarial = F.cross_entropy(twin._predict(x_adv, choices[n_zero:], 0), y[n_zero:], reduction="none")
    terms = torch.zeros(18)
    terms[:n_clean] += (1 - lambdas[:n_clean]) * clean
    terms[n_zero:] += lambdas[n_zero:] * adversarial
    twin.optimizer.zero_grad()
    terms.mean().backward()
    twin.optimizer.step()

    (found,) = train(oat, 1, first=2)
    assert list(found) == ["loss", "clean_loss", "adversarial_loss"]
    assert found["loss"] == pytest.approx(terms.mean().item())
    assert found["clean_loss"] == pytest.approx(clean.mean().item())
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(oat.state_dict()[name], value, msg=name)


def test_a_step_computes_no_loss_of_weight_zero() -> None:
    oat = make("OAT", oat_lambdas="0, 1", oat_lambda=1, at_steps=4)
    assert count_images(oat) == 9 + 9 * (4 + 1)  # clean images at lambda 0; attacked ones at 1


# VITA-Group/Once-for-All-Adversarial-Training at 2615279, lines 174, 187 to 188 and 198 to 200 of OAT.py.
LOGITS = torch.tensor([[1.0, -0.5, 0.2], [0.3, 0.8, -1.0], [2.0, 0.1, 0.4], [-0.7, 0.6, 1.5], [0.0, 0.9, 0.3]])
LOGITS_ADV = torch.tensor([[0.1, 0.4, 0.9], [0.6, 1.2, -0.2], [-0.9, 0.5, 0.2]])
LABELS = torch.tensor([0, 2, 0, 1, 1])
LAMBDAS = torch.tensor([0.0, 0.0, 0.2, 0.4, 1.0])
LOSS = 1.02850282


@pytest.mark.parametrize("n_clean", [4, 5])  # theirs computes a clean loss at lambda 1, and multiplies it with 0
def test_the_loss_is_the_authors(n_clean: int) -> None:
    clean = F.cross_entropy(LOGITS[:n_clean], LABELS[:n_clean], reduction="none")
    adversarial = F.cross_entropy(LOGITS_ADV, LABELS[2:], reduction="none")
    assert mix_losses(clean, adversarial, LAMBDAS).item() == pytest.approx(LOSS, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # of SciPy, by foolbox
def test_points_are_foolboxs_at_each_lambda() -> None:
    import foolbox

    oat = make("OAT", at_steps=4, lr=1e-2)
    train(oat, 3)
    oat.eval()
    x, y = draw_minibatches(5)[0]
    found = []
    for value in (0.0, 0.4):
        oat.set_lambda(value)
        start = torch.zeros_like(x)
        ours = perturb(lambda z: F.cross_entropy(oat.predict(z), y, reduction="sum"), x, start, oat.hparams)

        class Fixed(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return oat.predict(x)

        attack = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=4, random_start=False)
        model = foolbox.PyTorchModel(Fixed().eval(), bounds=(0, 1), device="cpu")
        theirs, _, _ = attack(model, x, y, epsilons=8 / 255)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        found.append(ours)
    assert not torch.equal(*found)


# --- lambda ----------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 200),
    st.sampled_from(["0, 0.1, 0.2, 0.3, 0.4, 1", "0, 1", "0.2, 1", "0", "1", "0.5"]),
    st.integers(0, 99),
)
def test_as_many_samples_have_lambda_0_as_the_authors_give_it(n: int, text: str, seed: int) -> None:
    lambdas = parse_lambdas(text)
    choices = draw_choices(n, lambdas, torch.Generator().manual_seed(seed))
    assert choices.shape == (n,)
    assert set(choices.tolist()) <= set(range(len(lambdas)))
    n_zero = int((torch.tensor(lambdas)[choices] == 0).sum())
    assert n_zero == (-(-n // len(lambdas)) if lambdas[0] == 0 else 0)


def test_every_lambda_and_every_place_in_the_batch_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_choices(12, [0.0, 0.5, 1.0], generator) for _ in range(400)])
    frequencies = torch.stack([(drawn == j).float().mean(dim=0) for j in range(3)])
    assert (frequencies - 1 / 3).abs().max() < 0.1  # in each place: no domain is always clean


def test_lambda_is_chosen_after_training() -> None:
    oat = make("OAT", **FEW)
    train(oat, 3)
    oat.eval()
    x = draw_minibatches(5)[0][0]
    answers = {}
    for value in parse_lambdas(oat.hparams["oat_lambdas"]):
        oat.set_lambda(value)
        answers[value] = oat.predict(x)
        assert oat.hparams["oat_lambda"] == value
    again = make("OAT", oat_lambda=0.4, **FEW)
    again.load_state_dict(oat.state_dict())
    assert torch.equal(again.eval().predict(x), answers[0.4])
    assert not torch.allclose(answers[0.0], answers[0.1])
    assert not torch.equal(answers[0.2], answers[0.4])
    with pytest.raises(UsageError, match=r"lambda 0\.5 is none .*0, 0\.1, 0\.2, 0\.3, 0\.4, 1"):
        oat.set_lambda(0.5)


def test_codes_are_orthonormal_and_stored_with_the_weights() -> None:
    oat = make("OAT", seed=1)
    codes = oat.state_dict()["codes"]
    torch.testing.assert_close(codes @ codes.T, torch.eye(6), atol=1e-6, rtol=0)
    assert torch.equal(make("OAT", seed=1).codes, codes)
    assert not torch.equal(make("OAT", seed=2).codes, codes)


def test_clean_images_alone_meet_the_first_batch_norm() -> None:
    oat = make("OAT", oat_lambdas="0.2, 1", at_steps=1)
    before = copy.deepcopy(oat.featurizer.bn.first)
    train(oat, 1)
    assert is_equal(oat.featurizer.bn.first, before)
    assert oat.featurizer.bn.second.num_batches_tracked == 2  # clean and attacked images


def test_it_neither_moves_nor_needs_the_global_random_state() -> None:
    runs = []
    with torch.random.fork_rng(devices=[]):
        for global_seed in (0, 1):
            oat = make("OAT", **FEW)
            torch.manual_seed(global_seed)
            before = torch.get_rng_state()
            runs.append(train(oat, 2))
            assert torch.equal(torch.get_rng_state(), before)
    assert runs[0] == runs[1]


def test_it_can_be_copied_in_the_middle() -> None:
    oat = make("OAT", **FEW)
    train(oat, 1)
    twin = copy.deepcopy(oat)
    assert train(oat, 2, first=1) == train(twin, 2, first=1)
    assert is_equal(oat, twin)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0, 1", "0.5", "1,0,0.25"])
def test_lists_of_lambdas_are_accepted(value: str) -> None:
    assert are_lambdas(value) is None


@pytest.mark.parametrize(
    "value", ["", "0, 2", "0, 0", "a", "0;1", "nan", 0.5, None, ", ".join(f"{i / 200}" for i in range(129))]
)
def test_other_lists_are_refused(value: object) -> None:
    assert are_lambdas(value) is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [({"oat_lambda": 0.5}, "add it to oat_lambdas"), ({"backbone_frozen": True}, "backbone_frozen is true")],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    hparams = {name: hparam.default for name, hparam in OAT.HPARAMS.items()}
    with pytest.raises(UsageError, match=message):
        OAT.resolve(hparams | given)
