"""Attacks as questions: which examples does a model lose, at which budget, after how many steps?

Every function takes a model that maps pixels to logits, pixels [B, C, H, W] and labels [B]. Radii are in pixel units.
The protocol is ARES-Bench's (Liu et al., 2023, arXiv 2302.14301).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.functional.attacks import Norm, get_norms, run_pgd
from daft_domainbed.functional.input_spec import INPUT_SPECS, InputSpec

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Keeps = Literal["nearest", "strongest"] | None

CURVE_STEPS = 20


@dataclass(frozen=True)
class Threat:
    """What an adversary may do: a ball of some norm around the pixels and, for images, the box of values 0 to 1."""

    norm: Norm
    has_box: bool = True

    @property
    def spec(self) -> InputSpec:
        """How pixels are normalised: not at all."""
        return INPUT_SPECS["unit" if self.has_box else "none"]


def is_wrong(model: Model, x: Tensor, y: Tensor) -> Tensor:
    """Return which examples are misclassified, [B]."""
    with torch.no_grad():
        return model(x).argmax(1) != y


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the summed cross-entropy, the loss that PGD ascends unless told otherwise."""
    return F.cross_entropy(logits, y, reduction="sum")


class _Watch:
    """A loss for `run_pgd` that looks at each iterate: after how many steps was an example lost, and how near?

    Attributes:
        first: Steps before each example was first misclassified, [B]; -1 where it never was.
        distance: Norm of the smallest perturbation that did it, [B], infinite where none did; if `keeps` is "nearest".
        strongest: The iterates of the highest loss, the shape of x; if `keeps` is "strongest".
    """

    def __init__(self, model: Model, x: Tensor, y: Tensor, norm: Norm, loss: Loss, keeps: Keeps) -> None:
        self.model, self.x, self.y, self.norm, self.loss, self.keeps = model, x, y, norm, loss, keeps
        self.n_steps = 0
        self.first = torch.full_like(y, -1)
        self.distance = torch.full(y.shape, math.inf, device=y.device)
        self.strongest, self.highest = x, torch.full_like(self.distance, -math.inf)

    def __call__(self, iterate: Tensor) -> Tensor:
        logits = self.model(iterate)
        self._look(iterate.detach(), logits.detach())
        # A model that hides its gradient from autograd has the gradient zero; it is no reason to fail.
        return self.loss(logits, self.y) + 0 * iterate.sum()

    def finish(self, iterate: Tensor) -> None:
        """Look at the last iterate, of which `run_pgd` asks no loss."""
        with torch.no_grad():
            self._look(iterate, self.model(iterate))

    def _look(self, iterate: Tensor, logits: Tensor) -> None:
        wrong = logits.argmax(1) != self.y
        self.first = torch.where(wrong & (self.first < 0), self.n_steps, self.first)
        self.n_steps += 1
        if self.keeps == "nearest":
            norms = get_norms(iterate - self.x, self.norm).flatten()
            self.distance = torch.where(wrong, torch.minimum(self.distance, norms), self.distance)
        elif self.keeps == "strongest":
            losses = F.cross_entropy(logits, self.y, reduction="none")
            is_higher = losses > self.highest
            self.highest = torch.where(is_higher, losses, self.highest)
            self.strongest = torch.where(is_higher.view(-1, *[1] * (iterate.dim() - 1)), iterate, self.strongest)


def _attack(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    eps: float | Tensor,
    steps: int,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
    loss: Loss = cross_entropy,
    keeps: Keeps = None,
) -> _Watch:
    """Run PGD and return what was seen of its iterates."""
    watch = _Watch(model, x, y, threat.norm, loss, keeps)
    last = run_pgd(
        watch,
        x,
        eps=eps,
        norm=threat.norm,
        steps=steps,
        spec=threat.spec,
        step_size=step_size,
        generator=generator,
    )
    watch.finish(last)
    return watch


def find_lost_steps(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, eps: float, steps: int, generator: torch.Generator
) -> Tensor:
    """Return after how many steps of PGD from a random start each example is first misclassified, [B], -1 for never.

    One run tells the accuracy after every number of steps: the step size is eps / 4, as ARES-Bench's, whatever `steps`.
    """
    return _attack(model, x, y, threat, eps=eps, steps=steps, step_size=eps / 4, generator=generator).first


def find_lost_restarts(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    eps: float,
    steps: int,
    restarts: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Attack with PGD from several random starts, each aimed at those that are left.

    Returns:
        Steps of the first run before each example was lost, [B], as `find_lost_steps`, 0 for those that are wrong as
        they are; and which examples withstood every run, [B].
    """
    first = find_lost_steps(model, x, y, threat, eps=eps, steps=steps, generator=generator)
    first = torch.where(is_wrong(model, x, y), 0, first)
    stands = first < 0
    for _ in range(restarts - 1):
        if not stands.any():
            break
        again = find_lost_steps(model, x[stands], y[stands], threat, eps=eps, steps=steps, generator=generator)
        stands[stands.clone()] = again < 0
    return first, stands


def find_lost_budgets(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, grid: Sequence[float], steps: int = CURVE_STEPS
) -> Tensor:
    """Return the index of the smallest radius of a grid at which PGD succeeds, [B]; len(grid) where it never does.

    Radii ascend; what is lost at one counts as lost at all larger ones, which is the running minimum of the curve.
    PGD starts at the example itself, with steps of 1.5 eps / steps.
    """
    index = torch.full_like(y, len(grid))
    for k, eps in enumerate(grid):
        left = index == len(grid)
        if not left.any():
            break
        if eps == 0:
            lost = is_wrong(model, x[left], y[left])
        else:
            lost = _attack(model, x[left], y[left], threat, eps=eps, steps=steps).first >= 0
        index[left] = torch.where(lost, k, len(grid))
    return index


def craft(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, eps: float, steps: int, generator: torch.Generator
) -> Tensor:
    """Return PGD's iterates of the highest loss, the shape of x, to be shown to another model."""
    watch = _attack(
        model, x, y, threat, eps=eps, steps=steps, step_size=eps / 4, generator=generator, keeps="strongest"
    )
    return watch.strongest


# --- minimal distortions -----------------------------------------------------------------------------------------


def find_minimal_distortions(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    steps: int = CURVE_STEPS,
    doublings: int = 8,
    bisections: int = 10,
) -> Tensor:
    """Find each example's smallest successful perturbation: ARES-Bench's doubling of the budget, then bisection.

    The first budget is the distance to the nearest boundary of the linearised model, so that for a linear model the
    answer is exact (to a thousandth). Each budget is tried towards that boundary's class, then with the cross-entropy.

    Returns:
        Norms, [B]: 0 where the example is misclassified as it is, infinite where nothing succeeded.
    """
    distance = torch.full(y.shape, math.inf, device=y.device)
    wrong = is_wrong(model, x, y)
    distance[wrong] = 0.0
    right = (~wrong).nonzero().flatten()
    if not len(right):
        return distance
    x, y = x[right], y[right]
    rival, estimate = find_nearest_rival(model, x, y, threat.norm)
    largest = _find_largest(x, threat)
    budget = (1.001 * estimate).clamp(largest * 1e-4, largest)
    low, high = torch.zeros_like(budget), torch.full_like(budget, math.inf)
    for k in range(doublings + bisections):
        # Beyond the doublings, what has not succeeded at any budget is given up.
        is_open = high.isinf() & (low < largest) & (k < doublings)
        tried = (is_open | (high - low > 1e-3 * high)).nonzero().flatten()
        if not len(tried):
            break
        found = _search_at(model, x[tried], y[tried], rival[tried], threat, budget[tried], steps)
        high[tried] = torch.minimum(high[tried], found)
        low[tried] = torch.where(found.isinf(), budget[tried], low[tried])
        budget = torch.where(high.isinf(), (2 * budget).clamp_max(largest), (low + high) / 2)
    distance[right] = high
    return distance


def _find_largest(x: Tensor, threat: Threat) -> float:
    """Return the radius beyond which nothing can be asked: that of the whole box, or of standard noise."""
    return 1.0 if threat.norm == "linf" else math.sqrt(x[0].numel())


def _search_at(model: Model, x: Tensor, y: Tensor, rival: Tensor, threat: Threat, budget: Tensor, steps: int) -> Tensor:
    """Return the norms of perturbations within the budgets that succeeded, [B]; infinite where none did."""
    eps = budget.view(-1, *[1] * (x.dim() - 1))

    def approach(logits: Tensor, _: Tensor) -> Tensor:
        return (logits.gather(1, rival[:, None]) - logits.gather(1, y[:, None])).sum()

    found = _attack(model, x, y, threat, eps=eps, steps=steps, loss=approach, keeps="nearest").distance
    left = found.isinf().nonzero().flatten()
    if len(left):
        found[left] = _attack(model, x[left], y[left], threat, eps=eps[left], steps=steps, keeps="nearest").distance
    return found


def find_nearest_rival(model: Model, x: Tensor, y: Tensor, norm: Norm, candidates: int = 9) -> tuple[Tensor, Tensor]:
    """Find the class whose boundary is nearest where the model is linear (DeepFool, Moosavi-Dezfooli et al., 2016).

    Args:
        model: Maps pixels to logits.
        x: Pixels, [B, C, H, W].
        y: Labels, [B].
        norm: In which distance is measured.
        candidates: The classes of the highest scores are compared, at most as many.

    Returns:
        Classes, [B], and distances (z_y - z_j) / |grad z_y - grad z_j| in the dual norm, [B]; infinite where no score
        depends on the pixels.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(x) + 0 * x.sum()
        own = logits.gather(1, y[:, None])
        others = logits.detach().scatter(1, y[:, None], -math.inf)
        ranked = others.topk(min(candidates, logits.shape[1] - 1)).indices
        distances = []
        for j in range(ranked.shape[1]):
            gap = own - logits.gather(1, ranked[:, j : j + 1])
            (gradient,) = torch.autograd.grad(gap.sum(), x, retain_graph=True)
            flat = gradient.flatten(1)
            dual = flat.abs().sum(1) if norm == "linf" else torch.linalg.vector_norm(flat, dim=1)
            distances.append(torch.where(dual > 0, gap.detach().squeeze(1) / dual, math.inf))
    best = torch.stack(distances, 1).min(1)
    return ranked.gather(1, best.indices[:, None]).squeeze(1), best.values
