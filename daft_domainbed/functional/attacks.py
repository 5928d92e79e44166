"""Perturbations of pixels and of features, with radii that mean the same whatever the input's normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from daft_domainbed.functional.input_spec import InputSpec

Norm = Literal["linf", "l2"]


def scale_to_norm(delta: Tensor, norm: Norm) -> Tensor:
    """Return the steepest-ascent direction of a gradient: unit norm a sample, zero where the gradient is zero."""
    if norm == "linf":
        return delta.sign()
    tiny = torch.finfo(delta.dtype).tiny
    # The squares of a confident sample's gradient would underflow, so its largest entry becomes 1 first.
    delta = delta / get_norms(delta, "linf").clamp_min(tiny)
    return delta / get_norms(delta, "l2").clamp_min(tiny)


def get_norms(delta: Tensor, norm: Norm) -> Tensor:
    """Return each sample's norm, [B, 1, ...], never the whole batch's."""
    flat = delta.flatten(1)
    norms = flat.abs().amax(dim=1) if norm == "linf" else torch.linalg.vector_norm(flat, dim=1)
    return norms.view(-1, *[1] * (delta.dim() - 1))


def project(delta: Tensor, eps: float | Tensor, norm: Norm) -> Tensor:
    """Project each sample's perturbation onto the ball of radius eps.

    Example:
        >>> project(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), eps=1.0, norm="l2")
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    if norm == "linf":
        return delta.clamp(-eps, eps)  # type: ignore[arg-type]  # an overload for each type of eps
    norms = get_norms(delta, "l2")
    return torch.where(norms > eps, delta * (eps / norms.clamp_min(torch.finfo(delta.dtype).tiny)), delta)


def draw_start(like: Tensor, eps: float | Tensor, norm: Norm, generator: torch.Generator) -> Tensor:
    """Draw a uniform starting point in the ball, from a generator of the attack's own, on the CPU.

    Drawing on the CPU keeps the attack the same on every device; the global generators are never touched.
    """
    if norm == "linf":
        unit = torch.rand(like.shape, generator=generator) * 2 - 1
    else:
        unit = scale_to_norm(torch.randn(like.shape, generator=generator), "l2")
        size = like[0].numel()
        radius = torch.rand((len(like), *[1] * (like.dim() - 1)), generator=generator) ** (1 / size)
        unit = unit * radius
    return unit.to(like) * eps


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Keep a network in evaluation mode: what an attack tries is no data, and must not move batch norm's statistics."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def run_pgd(
    loss: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm,
    steps: int,
    spec: InputSpec | None = None,
    step_size: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Projected gradient ascent inside the ball and the pixel box (Madry et al., 2018).

    The gradient is taken with respect to the input alone: no gradient of any weight is computed.

    Args:
        loss: Maps inputs [B, ...] to a loss that is a *sum* over samples, so that samples do not influence each other.
        x: Inputs as the network takes them (normalised images [B, C, H, W]), or features [B, D].
        eps: Radius, in [0, 1] pixel units (or in the features' own, without a spec).
        norm: Of the ball, each sample's own.
        steps: Number of ascent steps; 0 returns the start.
        spec: How the input was normalised; None for features, which have no box.
        step_size: In the unit of eps; 1.5 eps / steps where None.
        generator: Draws a start that is uniform in the ball; None starts at x.
        start: A perturbation to begin with instead, the shape of x, in the unit of eps.

    Returns:
        Perturbed inputs, the shape of x, without gradient. With eps = 0 they are x itself.
    """
    if not torch.is_tensor(eps) and eps == 0:
        return x.detach()
    std = spec.get_std(x) if spec is not None else torch.ones((), dtype=x.dtype, device=x.device)
    box = spec.get_box(x) if spec is not None else None
    step_size = 1.5 * eps / max(steps, 1) if step_size is None else step_size
    x = x.detach()

    def move_inside(delta: Tensor) -> Tensor:
        """Map a perturbation in pixel units to an input inside ball and box."""
        perturbed = x + project(delta, eps, norm) / std
        # The box holds x, so clamping only ever shortens a perturbation.
        return perturbed if box is None else torch.minimum(torch.maximum(perturbed, box[0]), box[1])

    if start is None:
        start = torch.zeros_like(x) if generator is None else draw_start(x, eps, norm, generator)
    x_adv = move_inside(start)
    for _ in range(steps):
        x_adv.requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(x_adv), x_adv)
        # d loss / d pixel = d loss / d input / std: the direction, too, has to be the pixels'.
        ascent = scale_to_norm(gradient / std, norm) * step_size
        x_adv = move_inside((x_adv.detach() - x) * std + ascent)
    return x_adv.detach()
