from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from daft_domainbed.evaluation import robustness
from daft_domainbed.evaluation.autoattack import list_autoattacks, run_autoattack
from daft_domainbed.evaluation.robustness import Threat
from daft_domainbed.evaluation.square import find_square_lost
from daft_domainbed.functional.attacks import Norm, get_norms

both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])
few_examples = settings(max_examples=15)
EPS: dict[str, float] = {"linf": 0.05, "l2": 0.5}
GRID: dict[str, list[float]] = {"linf": [0, 0.01, 0.03, 0.1, 0.5], "l2": [0, 0.1, 0.3, 1.0, 3.0]}


def seed_generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_pixels(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 6, 6, generator=seed_generator(seed))


def draw_network(seed: int = 0, classes: int = 5) -> nn.Module:
    """A random network that answers with every class: on centred pixels, without biases."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16, bias=False), nn.Tanh()]
        network = nn.Sequential(nn.BatchNorm2d(3, affine=False), *layers, nn.Linear(16, classes, bias=False))
    network[0].running_mean.fill_(0.5)
    network[0].running_var.fill_(1 / 12)
    return network.eval().requires_grad_(False)


def draw_labelled(network: Callable[[Tensor], Tensor], n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images with the network's own answers as labels, one in eight of them wrong."""
    x = draw_pixels(n, seed)
    logits = network(x)
    y = logits.argmax(1)
    y[::8] = logits[::8].argmin(1)
    return x, y


class Linear:
    """Scores w_k . x + b_k, for which every distance has a closed form."""

    def __init__(self, classes: int = 4, seed: int = 0) -> None:
        self.weight = torch.randn(classes, 108, generator=seed_generator(seed))
        self.bias = -self.weight @ torch.full((108,), 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias

    def measure(self, x: Tensor, y: Tensor, norm: Norm) -> Tensor:
        """min over j of (z_y - z_j) / |w_y - w_j| in the dual norm."""
        logits, distances = self(x), []
        for j in range(len(self.weight)):
            gap = logits.gather(1, y[:, None]).squeeze(1) - logits[:, j]
            size = (self.weight[y] - self.weight[j]).norm(p=1 if norm == "linf" else 2, dim=1)
            distances.append(torch.where(y == j, math.inf, gap / size))
        return torch.stack(distances).amin(0).clamp_min(0)


# --- minimal distortions -----------------------------------------------------------------------------------------


@both_norms
@few_examples
@given(seed=st.integers(0, 1000), classes=st.integers(2, 6))
def test_minimal_distortions_of_a_linear_model_are_the_closed_form(norm: Norm, seed: int, classes: int) -> None:
    model = Linear(classes, seed)
    x, y = draw_labelled(model, 12, seed)
    found = robustness.find_minimal_distortions(model, x, y, Threat(norm, has_box=False), steps=5)
    torch.testing.assert_close(found, model.measure(x, y, norm), rtol=2e-3, atol=0)


def test_the_box_takes_its_share_of_a_distortion() -> None:
    # Of two pixels only one has room left: the other one alone has to close the gap of 0.3.
    model = Linear(2)
    model.weight, model.bias = torch.zeros(2, 108), torch.zeros(2)
    model.weight[0, :2], model.bias[0] = -1.0, 0.8
    x = torch.zeros(1, 3, 6, 6)
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0.5, 0.0
    y = torch.tensor([0])
    free = robustness.find_minimal_distortions(model, x, y, Threat("linf", has_box=False))
    x[0, 0, 0, 0] = 1.0
    model.bias[0] = 1.3
    boxed = robustness.find_minimal_distortions(model, x, y, Threat("linf"))
    assert free.item() == pytest.approx(0.15, rel=2e-3)
    assert boxed.item() == pytest.approx(0.3, rel=2e-3)


@both_norms
def test_minimal_distortions_are_attained_and_below_other_attacks(norm: Norm) -> None:
    network = draw_network()
    x, y = draw_labelled(network, 24)
    threat = Threat(norm)
    distance = robustness.find_minimal_distortions(network, x, y, threat)
    wrong = robustness.is_wrong(network, x, y)
    assert (distance[wrong] == 0).all()
    assert (distance[~wrong] > 0).all()
    index = robustness.find_lost_budgets(network, x, y, threat, grid=GRID[norm])
    grid = torch.tensor([*GRID[norm], math.inf])
    assert (distance <= grid[index] * 1.001).all()  # a fixed grid cannot lose what the minimum holds


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # of SciPy, by foolbox
@both_norms
def test_minimal_distortions_are_no_larger_than_foolboxs(norm: Norm) -> None:
    import foolbox

    network = draw_network(1)
    x, y = draw_labelled(network, 32)
    ours = robustness.find_minimal_distortions(network, x, y, Threat(norm))
    kind = {"linf": foolbox.attacks.LInfFMNAttack, "l2": foolbox.attacks.L2FMNAttack}[norm]
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    theirs, _, success = kind(steps=200)(model, x, y, epsilons=None)
    assert success.all()
    distance = get_norms(theirs - x, norm).flatten()
    assert ours.median() <= distance.median() * 1.02
    assert (ours <= distance * 1.1 + 1e-4).all()


# --- PGD ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")
@both_norms
def test_accuracy_on_the_grid_is_foolboxs(norm: Norm) -> None:
    import foolbox

    network = draw_network()
    x, y = draw_labelled(network, 256)
    grid = GRID[norm]
    index = robustness.find_lost_budgets(network, x, y, Threat(norm), grid=grid)
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    attack = kind(rel_stepsize=1.5 / 20, steps=20, random_start=False)
    _, _, success = attack(model, x, y, epsilons=grid[1:])
    for k in range(1, len(grid)):
        theirs = (~success[:k]).all(0)  # the running minimum, example by example
        assert abs((index > k).sum() - theirs.sum()) <= 1
    assert 20 < (index > 2).sum() < 220  # the radii are neither harmless nor hopeless


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")
@both_norms
def test_accuracy_after_steps_from_random_starts_is_foolboxs(norm: Norm) -> None:
    import foolbox

    network, eps = draw_network(), EPS[norm] / 2
    x, y = draw_labelled(network, 256)
    first = robustness.find_lost_steps(network, x, y, Threat(norm), eps=eps, steps=20, generator=seed_generator())
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    torch.manual_seed(0)
    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    _, _, success = kind(abs_stepsize=eps / 4, steps=20, random_start=True)(model, x, y, epsilons=eps)
    assert abs((first < 0).sum().item() - (~success).sum().item()) <= 1


@both_norms
def test_more_steps_and_restarts_lose_no_less(norm: Norm) -> None:
    network = draw_network()
    x, y = draw_labelled(network, 32)
    options = {"eps": EPS[norm] / 2, "steps": 4}
    once = robustness.find_lost_steps(network, x, y, Threat(norm), generator=seed_generator(), **options)
    first, stands = robustness.find_lost_restarts(
        network, x, y, Threat(norm), restarts=3, generator=seed_generator(), **options
    )
    assert torch.equal(first, once)
    assert not stands[first >= 0].any()
    assert (first[robustness.is_wrong(network, x, y)] <= 4).all()


def test_a_model_without_gradient_withstands_and_does_not_fail() -> None:
    network = draw_network()
    x, y = draw_labelled(network, 8)
    wrong = robustness.is_wrong(network, x, y)

    def hidden(x: Tensor) -> Tensor:
        with torch.no_grad():
            return network(x)

    index = robustness.find_lost_budgets(hidden, x, y, Threat("linf"), grid=[0, 0.1])
    assert torch.equal(index == 0, wrong)
    assert (index[~wrong] == 2).all()
    assert robustness.find_minimal_distortions(hidden, x, y, Threat("linf"))[~wrong].isinf().all()


def test_attacks_move_no_global_generator() -> None:
    network = draw_network()
    x, y = draw_labelled(network, 8)
    before = torch.get_rng_state()
    threat = Threat("linf")
    robustness.find_lost_restarts(network, x, y, threat, eps=0.01, steps=2, restarts=2, generator=seed_generator())
    find_square_lost(network, x, y, threat, eps=0.01, queries=5, generator=seed_generator())
    assert torch.equal(torch.get_rng_state(), before)


# --- score-based and transferred ---------------------------------------------------------------------------------


@both_norms
def test_random_search_nears_the_closed_form_from_above(norm: Norm) -> None:
    model = Linear()
    x, y = draw_labelled(model, 64)
    distance = model.measure(x, y, norm)
    eps = distance.median().item()
    threat = Threat(norm, has_box=False)
    lost = find_square_lost(model, x, y, threat, eps=2 * eps, queries=1000, generator=seed_generator())
    assert not lost[distance > 2 * eps].any()  # nothing can
    assert lost[distance < eps / 2].float().mean() > 0.9


@both_norms
def test_random_search_stays_inside_ball_and_box(norm: Norm) -> None:
    seen: list[Tensor] = []
    network = draw_network()
    x, y = draw_labelled(network, 8)
    n_right = (~robustness.is_wrong(network, x, y)).sum()

    def watch(z: Tensor) -> Tensor:
        seen.append(z)
        return network(z)

    find_square_lost(watch, x, y, Threat(norm), eps=1e-3, queries=9, generator=seed_generator())
    left = x[~robustness.is_wrong(network, x, y)]
    for z in seen[1:]:
        assert z.min() >= 0
        assert z.max() <= 1
        if len(z) == n_right:
            assert (get_norms(z - left, norm) <= 1e-3 * (1 + 1e-3)).all()


@both_norms
def test_crafted_examples_have_the_highest_loss_seen(norm: Norm) -> None:
    network = draw_network()
    x, y = draw_labelled(network, 8)
    options = {"eps": EPS[norm], "steps": 6}
    crafted = robustness.craft(network, x, y, Threat(norm), generator=seed_generator(), **options)
    assert (get_norms(crafted - x, norm) <= EPS[norm] * (1 + 1e-5)).all()
    assert robustness.cross_entropy(network(crafted), y) > robustness.cross_entropy(network(x), y)
    assert (~robustness.is_wrong(network, crafted, y)).sum() <= 1


# --- AutoAttack --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 4, 7])
def test_autoattack_runs_with_any_number_of_classes(classes: int) -> None:
    pytest.importorskip("pyautoattack")
    network = draw_network(2, classes)
    x, y = draw_labelled(network, 3)
    before = torch.get_rng_state()
    # Smaller than any distance, so that every attack has something left to do.
    stands, ran = run_autoattack(network, x, y, Threat("linf"), eps=1e-4, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert ran == list_autoattacks(classes)
    assert torch.equal(stands, ~robustness.is_wrong(network, x, y))
    _, ran = run_autoattack(network, x, y, Threat("linf"), eps=0.9, seed=0)
    assert ran[0] == "apgd-ce"
    assert len(ran) < len(list_autoattacks(classes))  # nothing was left for the others


def test_below_four_classes_no_targeted_attack_is_claimed() -> None:
    assert list_autoattacks(3) == ["apgd-ce", "fab", "square"]
    assert "apgd-t" in list_autoattacks(4)
