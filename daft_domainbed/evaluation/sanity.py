"""Signs that a number about robustness is not to be believed (Carlini et al., 2019, arXiv 1902.06705)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from daft_domainbed.evaluation.robustness import Model, cross_entropy

ZERO_GRADIENTS = 0.2  # share of examples without any gradient from which it is said
REMAINDER = 0.1  # of the examples a model may keep at the largest budget
BLACK_BOX = 0.01  # share of examples by which a black box has to be ahead,
FEWEST = 5  # and the number: each attack finds one or two that the other does not


@dataclass
class Signs:
    """What was seen of a model, over all its environments.

    Attributes:
        n: Number of examples.
        n_zero_gradients: Of how many the loss has no gradient at all.
        is_random: Whether the same images got different logits.
        are_probabilities: Whether every row of outputs was a distribution.
        kept: Share of examples that withstood the largest budget, by norm.
        white_box: Share of examples that withstood the strongest attack with gradients, by norm.
        black_box: Share that withstood the strongest without, by norm.
    """

    n: int = 0
    n_zero_gradients: int = 0
    is_random: bool = False
    are_probabilities: bool = False
    kept: dict[str, float] = field(default_factory=dict)
    white_box: dict[str, float] = field(default_factory=dict)
    black_box: dict[str, float] = field(default_factory=dict)


def count_zero_gradients(model: Model, x: Tensor, y: Tensor) -> int:
    """Return for how many examples the cross-entropy has the gradient zero in every pixel."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(cross_entropy(model(x), y) + 0 * x.sum(), x)
    return int((gradient.flatten(1) == 0).all(1).sum())


def is_random(model: Model, x: Tensor) -> bool:
    """Return whether a model answers the same images differently, by more than rounding."""
    with torch.no_grad():
        first, second = model(x), model(x)
    return not torch.allclose(first, second, rtol=1e-3, atol=1e-4)


def are_probabilities(outputs: Tensor) -> bool:
    """Return whether every row is a probability distribution, [N, K]; logits never are, all of them."""
    return bool((outputs >= 0).all() and ((outputs.sum(1) - 1).abs() < 1e-4).all())


def find_flags(signs: Signs) -> list[dict[str, str]]:
    """Return what is wrong, worst first: a name and a sentence each; nothing for an honest model."""
    flags = {}
    if signs.is_random:
        flags["randomness"] = "the same images get different logits: attacks have to average over the draws"
    if signs.are_probabilities:
        flags["probabilities"] = "outputs are probabilities, not logits: gradients of the loss vanish where it is sure"
    if signs.n_zero_gradients > ZERO_GRADIENTS * signs.n:
        flags["masked_gradients"] = (
            f"{signs.n_zero_gradients} of {signs.n} examples have no gradient: attacks that follow it find nothing"
        )
    for norm, share in signs.kept.items():
        if share > REMAINDER:
            flags[f"robust_at_any_budget_{norm}"] = (
                f"{100 * share:.1f} % are still right at the largest {norm} budget, at which nothing can be: masked "
                "gradients, or answers that do not depend on the image"
            )
    for norm, share in signs.black_box.items():
        if norm in signs.white_box and share < signs.white_box[norm] - max(BLACK_BOX, (FEWEST - 0.5) / signs.n):
            flags[f"black_box_beats_white_box_{norm}"] = (
                f"{100 * share:.1f} % withstand an attack by scores alone, {100 * signs.white_box[norm]:.1f} % one by "
                f"gradients ({norm}): the gradients are masked"
            )
    return [{"flag": name, "detail": detail} for name, detail in flags.items()]
