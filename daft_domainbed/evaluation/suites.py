"""What each suite asks, in which units, and what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from daft_domainbed.functional.attacks import Norm

NORMS: tuple[Norm, ...] = ("linf", "l2")


@dataclass(frozen=True)
class Suite:
    """How much is asked of a model.

    Attributes:
        n_examples: Of an environment, unless the user says.
        pgd_steps: Of PGD at the fixed radius.
        restarts: Of PGD at the fixed radius.
        parts: What else is asked, of `PARTS`.
    """

    n_examples: int
    pgd_steps: int
    restarts: int
    parts: tuple[str, ...] = ()


PARTS = ("minimal", "square", "transfer", "corruptions", "ood", "autoattack")
SUITES = {
    "quick": Suite(128, pgd_steps=50, restarts=3),
    "standard": Suite(256, pgd_steps=100, restarts=5, parts=PARTS[:-1]),
    "full": Suite(1000, pgd_steps=100, restarts=10, parts=PARTS),
}
SQUARE_QUERIES = 500
STRENGTHS = (1, 2, 5, 10, 20, 50, 100)  # numbers of PGD steps after which accuracy is told

# The last radius of each spans the whole box of an image, so that no model can be right there.
_GRIDS: dict[Norm, Sequence[float]] = {
    "linf": [k / 255 for k in (0, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 255)],
    "l2": [0, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 25, 50],
}
_EPS: dict[Norm, float] = {"linf": 4 / 255, "l2": 0.5}  # RobustBench's, for ImageNet and for CIFAR-10
_LARGE = 6  # times as far, in L2, is the same change a pixel at 224 as at 32 pixels, about


def get_grid(norm: Norm, is_small: bool) -> list[float]:
    """Return the radii of a curve, in pixel units, ascending from 0."""
    factor = 1 if is_small or norm == "linf" else _LARGE
    return [factor * eps for eps in _GRIDS[norm]]


def get_eps(norm: Norm, is_small: bool) -> float:
    """Return the radius at which single numbers are measured: 4/255; in L2 0.5, and 3 above 64 pixels."""
    return _EPS[norm] * (1 if is_small or norm == "linf" else _LARGE)
