"""An attack that sees scores alone: a random search over squares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from daft_domainbed.evaluation.robustness import Model, Threat, is_wrong
from daft_domainbed.functional.attacks import Norm, scale_to_norm


def find_square_lost(
    model: Model, x: Tensor, y: Tensor, threat: Threat, *, eps: float, queries: int, generator: torch.Generator
) -> Tensor:
    """Return which examples a random search over squares loses, [B], from scores alone.

    In Linf this is the Square Attack (Andriushchenko et al., 2020); in L2 a simpler proposal than theirs: a square of
    random sign is added, and the whole brought back to the sphere.
    """
    lost = is_wrong(model, x, y)
    index = (~lost).nonzero().flatten()
    x, y = x[index], y[index]
    delta = _confine(_draw_signs(x[:, :, :1, :], generator).expand_as(x), eps, threat.norm)
    margin = torch.full(y.shape, math.inf, device=y.device)
    for query in range(queries):
        if not len(index):
            break
        proposal = delta if query == 0 else _propose(delta, eps, threat.norm, query / queries, generator)
        perturbed = x + proposal
        if threat.has_box:
            perturbed = perturbed.clamp(0, 1)
        with torch.no_grad():
            new_margin = _get_margin(model(perturbed), y)
        better = new_margin < margin
        delta = torch.where(better.view(-1, 1, 1, 1), proposal, delta)
        margin = torch.where(better, new_margin, margin)
        lost[index[margin < 0]] = True
        left = margin >= 0
        index, x, y, delta, margin = index[left], x[left], y[left], delta[left], margin[left]
    return lost


def _get_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the own score less the best other, [B]; below 0 where another class wins."""
    others = logits.scatter(1, y[:, None], -math.inf).amax(1)
    return logits.gather(1, y[:, None]).squeeze(1) - others


def _draw_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (2.0 * torch.randint(0, 2, like.shape, generator=generator) - 1).to(like)


def _confine(delta: Tensor, eps: float, norm: Norm) -> Tensor:
    """Return the perturbation of norm eps in the same direction; in Linf that of the same signs."""
    return scale_to_norm(delta, norm) * eps


def _propose(delta: Tensor, eps: float, norm: Norm, progress: float, generator: torch.Generator) -> Tensor:
    """Change a square of each perturbation, the smaller the more of the search is over."""
    batch, _, height, width = delta.shape
    side = _find_side(height, width, progress)
    top = torch.randint(0, height - side + 1, (batch, 1, 1, 1), generator=generator).to(delta.device)
    left = torch.randint(0, width - side + 1, (batch, 1, 1, 1), generator=generator).to(delta.device)
    rows = torch.arange(height, device=delta.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=delta.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    signs = _draw_signs(delta[:, :, :1, :1], generator)
    if norm == "linf":
        return torch.where(inside, signs * eps, delta)
    return _confine(delta + inside * signs * (eps / (side * math.sqrt(delta.shape[1]))), eps, norm)


def _find_side(height: int, width: int, progress: float) -> int:
    """Return the square's side: 80 % of the image at first, halved at the paper's shares of the search."""
    halvings = sum(progress >= at for at in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8))
    return max(1, min(round(math.sqrt(0.8 / 2**halvings * height * width)), height - 1, width - 1))
