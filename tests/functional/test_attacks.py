from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from daft_domainbed.functional.attacks import Norm, draw_start, get_norms, project, run_pgd, scale_to_norm
from daft_domainbed.functional.input_spec import INPUT_SPECS, InputSpec

few_examples = settings(max_examples=40)

NORMS: list[Norm] = ["linf", "l2"]
seeds = st.integers(0, 2**32 - 1)
all_specs = pytest.mark.parametrize("spec", INPUT_SPECS.values(), ids=INPUT_SPECS)
both_norms = pytest.mark.parametrize("norm", NORMS)

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def seed_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_pixels(seed: int, n: int = 3) -> Tensor:
    """Images, double precision; a third of their pixels are black, a third white, so that the box matters."""
    return (3 * torch.rand(n, 3, 4, 4, dtype=torch.float64, generator=seed_generator(seed)) - 1).clamp(0, 1)


def normalise(pixels: Tensor, spec: InputSpec) -> Tensor:
    mean, std = (torch.tensor(value, dtype=pixels.dtype).view(1, -1, 1, 1) for value in (spec.mean, spec.std))
    return (pixels - mean) / std


def draw_network(seed: int, outputs: int = 4) -> nn.Module:
    """Smooth, so that gradients differ from zero and from each other everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, outputs)).double()


def sum_loss(network: nn.Module, labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.cross_entropy(network(x), labels, reduction="sum")


# --- specs, norms, projections -----------------------------------------------------------------------------------


def test_specs_know_imagenets_normalisation() -> None:
    x = torch.rand(2, 3, 4, 4)
    spec = INPUT_SPECS["imagenet"]
    assert torch.equal(spec.get_std(x), IMAGENET_STD)
    black, white = spec.get_box(x)
    torch.testing.assert_close(black, -IMAGENET_MEAN / IMAGENET_STD)
    torch.testing.assert_close(white, (1 - IMAGENET_MEAN) / IMAGENET_STD)


def test_the_box_of_unit_images_is_the_unit_interval_for_any_channels() -> None:
    for channels in (1, 2, 3):
        black, white = INPUT_SPECS["unit"].get_box(torch.rand(2, channels, 4, 4))
        assert (black, white) == (0, 1)


def test_noise_has_no_box() -> None:
    assert INPUT_SPECS["none"].get_box(torch.rand(2, 3, 4, 4)) is None


@both_norms
def test_norms_are_each_samples_own(norm: Norm) -> None:
    delta = torch.tensor([[[3.0, -4.0]], [[0.0, 1.0]]])
    expected = {"linf": [4.0, 1.0], "l2": [5.0, 1.0]}[norm]
    assert get_norms(delta, norm).tolist() == [[[value]] for value in expected]


def test_ascent_directions() -> None:
    gradient = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    assert scale_to_norm(gradient, "linf").tolist() == [[1, -1], [0, 0]]
    torch.testing.assert_close(scale_to_norm(gradient, "l2"), torch.tensor([[0.6, -0.8], [0.0, 0.0]]))


@few_examples
@given(st.floats(-35, 35))
def test_ascent_direction_does_not_depend_on_the_gradients_size(exponent: float) -> None:
    # Down to where single precision's squares vanish: a confident sample is attacked as fast as any other.
    gradient = torch.tensor([[3.0, -4.0]]) * 10.0**exponent
    torch.testing.assert_close(scale_to_norm(gradient, "l2"), torch.tensor([[0.6, -0.8]]))


@both_norms
@few_examples
@given(seed=seeds, eps=st.floats(0.1, 10))
def test_projection_is_the_nearest_point_of_the_ball(norm: Norm, seed: int, eps: float) -> None:
    delta = 3 * torch.randn(4, 5, dtype=torch.float64, generator=seed_generator(seed))
    nearest = project(delta, eps, norm)
    assert (get_norms(nearest, norm) <= eps * (1 + 1e-12)).all()
    # Of a convex set: no point of the ball lies on delta's side of the plane through the projection.
    others = draw_start(delta, eps, norm, seed_generator(seed + 1))
    assert (((delta - nearest) * (others - nearest)).sum(dim=1) <= 1e-9).all()
    inside = delta * (eps / get_norms(delta, norm)) * 0.99
    assert torch.equal(project(inside, eps, norm), inside)


# --- random starts -----------------------------------------------------------------------------------------------


@both_norms
def test_random_starts_are_uniform_in_the_ball(norm: Norm) -> None:
    n, size, eps = 4000, 3, 0.5
    start = draw_start(torch.zeros(n, 1, 1, size), eps, norm, seed_generator(0)).view(n, size) / eps
    assert start.mean(dim=0).abs().max() < 0.05
    if norm == "linf":
        uniform = (start + 1) / 2
    else:
        # Uniform in a ball of 3 dimensions: radius cubed is uniform, and (Archimedes) so is each direction's entry.
        radius = start.norm(dim=1, keepdim=True)
        uniform = torch.cat([radius**size, (start / radius + 1) / 2], dim=1)
    assert uniform.min() >= 0
    assert uniform.max() <= 1 + 1e-6
    deciles = torch.quantile(uniform, torch.linspace(0.1, 0.9, 9), dim=0)
    assert (deciles - torch.linspace(0.1, 0.9, 9).view(-1, 1)).abs().max() < 0.04


@both_norms
def test_random_starts_move_their_own_generator_alone(norm: Norm) -> None:
    generator = seed_generator(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    x = draw_pixels(0)
    first, second = (draw_start(x, 0.1, norm, generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, draw_start(x, 0.1, norm, seed_generator(0)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


# --- PGD ---------------------------------------------------------------------------------------------------------


@all_specs
@both_norms
@few_examples
@given(seed=seeds, eps=st.floats(0.001, 2), steps=st.integers(0, 4), starts_random=st.booleans())
def test_pgd_stays_inside_ball_and_box(
    spec: InputSpec, norm: Norm, seed: int, eps: float, steps: int, starts_random: bool
) -> None:
    pixels = draw_pixels(seed)
    x = normalise(pixels, spec)
    loss = sum_loss(draw_network(seed % 97), torch.tensor([0, 1, 2]))
    generator = seed_generator(seed) if starts_random else None
    x_adv = run_pgd(loss, x, eps=eps, norm=norm, steps=steps, spec=spec, generator=generator)
    assert not x_adv.requires_grad
    moved = x_adv * torch.tensor(spec.std, dtype=x.dtype).view(1, -1, 1, 1)
    moved = moved + torch.tensor(spec.mean, dtype=x.dtype).view(1, -1, 1, 1)
    assert (get_norms(moved - pixels, norm) <= eps + 1e-12).all()
    if spec.has_box:
        assert moved.min() >= -1e-12
        assert moved.max() <= 1 + 1e-12
    elif steps:
        assert moved.min() < 0  # the attack does move what it may move
    if steps == 0 and not starts_random:
        assert torch.equal(x_adv, x)


@both_norms
def test_single_precision_stays_inside_too(norm: Norm) -> None:
    spec, pixels = INPUT_SPECS["imagenet"], draw_pixels(0).float()
    # As torchvision's Normalize writes it, whose rounding the box has to share.
    x = pixels.clone().sub_(IMAGENET_MEAN).div_(IMAGENET_STD)
    black, white = spec.get_box(x)
    assert (x >= black).all()
    assert (x <= white).all()
    loss = sum_loss(draw_network(0).float(), torch.tensor([0, 1, 2]))
    x_adv = run_pgd(loss, x, eps=8 / 255, norm=norm, steps=3, spec=spec, generator=seed_generator(0))
    assert (x_adv >= black).all()
    assert (x_adv <= white).all()
    assert (get_norms((x_adv - x) * IMAGENET_STD, norm) <= 8 / 255 + 1e-6).all()


@all_specs
@both_norms
def test_radius_zero_returns_the_very_input(spec: InputSpec, norm: Norm) -> None:
    x = normalise(draw_pixels(0).float(), spec)
    loss = sum_loss(draw_network(0).float(), torch.tensor([0, 1, 2]))
    x_adv = run_pgd(loss, x, eps=torch.tensor(0.0), norm=norm, steps=3, spec=spec, generator=seed_generator(0))
    assert torch.equal(x_adv, x)

    def refuse(x: Tensor) -> Tensor:
        raise AssertionError("there is nothing to search")

    for eps in (0, 0.0):
        x_adv = run_pgd(refuse, x, eps=eps, norm=norm, steps=3, spec=spec, generator=seed_generator(0))
        assert torch.equal(x_adv, x)


@both_norms
def test_a_samples_perturbation_does_not_depend_on_its_batch(norm: Norm) -> None:
    x, labels, network = draw_pixels(0), torch.tensor([0, 1, 2]), draw_network(0)
    x[1] *= 1e-3  # a faint image, whose gradient a norm over the batch would drown
    attack = {"eps": 0.3, "norm": norm, "steps": 4, "spec": INPUT_SPECS["unit"]}
    together = run_pgd(sum_loss(network, labels), x, **attack)
    for i in range(3):
        alone = run_pgd(sum_loss(network, labels[i : i + 1]), x[i : i + 1], **attack)
        torch.testing.assert_close(together[i : i + 1], alone)


@both_norms
def test_steps_accumulate(norm: Norm) -> None:
    weight = torch.randn(12, dtype=torch.float64, generator=seed_generator(0))
    x = torch.zeros(2, 12, dtype=torch.float64)
    dual = weight.abs().sum() if norm == "linf" else weight.norm()  # what a step of norm 1 gains on a linear loss
    for steps in range(1, 8):
        x_adv = run_pgd(lambda z: (z @ weight).sum(), x, eps=1.0, norm=norm, steps=steps, step_size=0.2)
        expected = min(0.2 * steps, 1.0) * dual  # k steps go k times as far, as far as the ball reaches
        torch.testing.assert_close(x_adv @ weight, expected.repeat(2))


@both_norms
def test_default_step_size_reaches_the_ball_but_not_in_one_of_several_steps(norm: Norm) -> None:
    weight = torch.ones(4, dtype=torch.float64)
    x = torch.zeros(1, 4, dtype=torch.float64)
    visited: list[Tensor] = []

    def loss(z: Tensor) -> Tensor:
        visited.append(z.detach())
        return (z @ weight).sum()

    last = run_pgd(loss, x, eps=0.4, norm=norm, steps=3)
    sizes = [get_norms(z, norm).item() for z in [*visited, last]]
    assert sizes == pytest.approx([0, 0.2, 0.4, 0.4])  # 1.5 eps / steps each


@both_norms
def test_steps_from_a_random_start_go_uphill(norm: Norm) -> None:
    x, network = draw_pixels(1), draw_network(1)
    loss = sum_loss(network, torch.tensor([0, 1, 2]))
    losses = [
        loss(run_pgd(loss, x, eps=0.5, norm=norm, steps=n, step_size=0.1, generator=seed_generator(3))).item()
        for n in range(5)
    ]
    assert losses == sorted(losses)
    assert losses[-1] > losses[0]


@both_norms
@pytest.mark.parametrize("starts_random", [False, True])
def test_radius_is_in_pixels_whatever_the_normalisation(norm: Norm, starts_random: bool) -> None:
    pixels, spec, labels, network = draw_pixels(0), INPUT_SPECS["imagenet"], torch.tensor([0, 1, 2]), draw_network(0)
    attack = {"eps": 0.2, "norm": norm, "steps": 4}

    def attack_with(loss: Callable[[Tensor], Tensor], x: Tensor, spec: InputSpec) -> Tensor:
        generator = seed_generator(0) if starts_random else None
        return run_pgd(loss, x, spec=spec, generator=generator, **attack)

    outside = attack_with(sum_loss(network, labels), normalise(pixels, spec), spec)
    inside = attack_with(lambda p: sum_loss(network, labels)(normalise(p, spec)), pixels, INPUT_SPECS["unit"])
    torch.testing.assert_close(outside, normalise(inside, spec))
    assert get_norms(inside - pixels, norm).max() > 0.19


@both_norms
def test_no_gradient_of_a_weight_is_ever_computed(norm: Norm) -> None:
    network = draw_network(0)

    def refuse(gradient: Tensor) -> None:
        raise AssertionError("a weight's gradient was computed")

    for parameter in network.parameters():
        assert parameter.requires_grad
        parameter.register_hook(refuse)
    x = draw_pixels(0)
    with torch.no_grad():  # the caller's mode does not matter
        x_adv = run_pgd(sum_loss(network, torch.tensor([0, 1, 2])), x, eps=0.1, norm=norm, steps=2)
    assert not torch.equal(x_adv, x)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not x.requires_grad


def test_pgd_moves_no_global_generator() -> None:
    before = torch.get_rng_state()
    loss = sum_loss(draw_network(0), torch.tensor([0, 1, 2]))
    run_pgd(loss, draw_pixels(0), eps=0.1, norm="l2", steps=2, generator=seed_generator(0))
    assert torch.equal(torch.get_rng_state(), before)


@both_norms
def test_features_need_no_spec_and_take_a_tensor_as_radius(norm: Norm) -> None:
    features = torch.randn(3, 5, generator=seed_generator(0))
    head = nn.Linear(5, 4)
    loss = sum_loss(head, torch.tensor([0, 1, 2]))
    for eps in (0.3, torch.tensor(0.3)):
        found = run_pgd(loss, features, eps=eps, norm=norm, steps=5)
        torch.testing.assert_close(get_norms(found - features, norm), torch.full((3, 1), 0.3))


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # of SciPy, by foolbox
@both_norms
@pytest.mark.parametrize("name", INPUT_SPECS)
def test_points_are_foolboxs(norm: Norm, name: str) -> None:
    import foolbox

    spec, network, labels = INPUT_SPECS[name], draw_network(0).float().eval(), torch.tensor([0, 1, 2])
    pixels = draw_pixels(5).float()
    eps, steps, step_size = {"linf": (0.1, 5, 0.03), "l2": (0.8, 5, 0.3)}[norm]
    ours = run_pgd(
        sum_loss(network, labels),
        normalise(pixels, spec),
        eps=eps,
        norm=norm,
        steps=steps,
        spec=spec,
        step_size=step_size,
    )

    preprocessing = {"mean": list(spec.mean), "std": list(spec.std), "axis": -3} if name == "imagenet" else None
    bounds = (0, 1) if spec.has_box else (-100, 100)
    model = foolbox.PyTorchModel(network, bounds=bounds, preprocessing=preprocessing, device="cpu")
    kind = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[norm]
    attack = kind(abs_stepsize=step_size, steps=steps, random_start=False)
    theirs, _, _ = attack(model, pixels, labels, epsilons=eps)
    torch.testing.assert_close(ours, normalise(theirs, spec), atol=1e-5, rtol=0)
    assert get_norms(theirs - pixels, norm).max() > eps / 2
