"""The questions asked of a batch of examples, each with an answer that fits into a line of the journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from daft_domainbed.evaluation import robustness, sanity, shift
from daft_domainbed.evaluation.autoattack import run_autoattack
from daft_domainbed.evaluation.robustness import CURVE_STEPS, Model, Threat
from daft_domainbed.evaluation.square import find_square_lost
from daft_domainbed.evaluation.suites import SQUARE_QUERIES, Suite
from daft_domainbed.functional.attacks import Norm

Ask = Callable[[Tensor, Tensor, Generator], Any]


@dataclass(frozen=True)
class Task:
    """A question asked of every batch.

    Attributes:
        name: In the journal.
        cost: Evaluations of the network for an example, about; a gradient counts as three.
        ask: Maps pixels, labels and a generator for whatever is random to an answer of plain types.
        held_out_only: Whether it is asked of held-out domains alone.
    """

    name: str
    cost: float
    ask: Ask
    held_out_only: bool = False


@dataclass(frozen=True)
class Radius:
    """A norm with the radii that are asked in it."""

    norm: Norm
    eps: float
    grid: Sequence[float]


def list_tasks(
    model: Model, suite: Suite, radii: Sequence[Radius], sources: Mapping[str, Model], has_box: bool
) -> list[Task]:
    """Return a suite's questions to a model, cheap ones first.

    Args:
        model: Maps pixels to logits.
        suite: What is asked.
        radii: By norm.
        sources: The other models whose adversarial examples are shown to this one, by name.
        has_box: Whether pixels lie between 0 and 1; corruptions and AutoAttack are defined there alone.
    """
    tasks = [Task("clean", 6, lambda x, y, _: _ask_clean(model, x, y))]
    if has_box and "corruptions" in suite.parts:
        tasks.append(Task("corruptions", 75, lambda x, y, generator: _ask_corruptions(model, x, y, generator), True))
    for radius in radii:
        tasks += _list_threat_tasks(model, suite, radius, sources, has_box)
    return tasks


def _list_threat_tasks(
    model: Model, suite: Suite, radius: Radius, sources: Mapping[str, Model], has_box: bool
) -> list[Task]:
    threat, eps, norm = Threat(radius.norm, has_box), radius.eps, radius.norm
    steps, restarts = suite.pgd_steps, suite.restarts

    def ask_grid(x: Tensor, y: Tensor, generator: Generator) -> Any:
        return robustness.find_lost_budgets(model, x, y, threat, grid=radius.grid, steps=CURVE_STEPS).tolist()

    def ask_pgd(x: Tensor, y: Tensor, generator: Generator) -> Any:
        first, stands = robustness.find_lost_restarts(
            model, x, y, threat, eps=eps, steps=steps, restarts=restarts, generator=generator
        )
        return {"first": first.tolist(), "stands": stands.int().tolist()}

    def ask_minimal(x: Tensor, y: Tensor, generator: Generator) -> Any:
        distances = robustness.find_minimal_distortions(model, x, y, threat, steps=CURVE_STEPS).tolist()
        return [None if distance == float("inf") else float(f"{distance:.6g}") for distance in distances]

    def ask_square(x: Tensor, y: Tensor, generator: Generator) -> Any:
        lost = find_square_lost(model, x, y, threat, eps=eps, queries=SQUARE_QUERIES, generator=generator)
        return (~lost).int().tolist()

    def ask_autoattack(x: Tensor, y: Tensor, generator: Generator) -> Any:
        stands, ran = run_autoattack(model, x, y, threat, eps=eps, seed=generator.initial_seed())
        return {"stands": stands.int().tolist(), "ran": ran}

    def make_transfer(source: Model) -> Ask:
        def ask_transfer(x: Tensor, y: Tensor, generator: Generator) -> Any:
            crafted = robustness.craft(source, x, y, threat, eps=eps, steps=CURVE_STEPS, generator=generator)
            stands = ~robustness.is_wrong(model, crafted, y) & ~robustness.is_wrong(model, x, y)
            return stands.int().tolist()

        return ask_transfer

    tasks = [
        Task(f"grid {norm}", 1.5 * CURVE_STEPS * len(radius.grid), ask_grid),
        Task(f"pgd {norm}", 3 * steps, ask_pgd),
    ]
    if "transfer" in suite.parts:
        tasks += [
            Task(f"transfer {norm} {name}", 3 * CURVE_STEPS, make_transfer(source)) for name, source in sources.items()
        ]
    if "square" in suite.parts:
        tasks.append(Task(f"square {norm}", SQUARE_QUERIES / 2, ask_square))
    if "minimal" in suite.parts:
        tasks.append(Task(f"minimal {norm}", 3 * CURVE_STEPS * 15, ask_minimal))
    if has_box and "autoattack" in suite.parts:
        tasks.append(Task(f"autoattack {norm}", 2000, ask_autoattack))
    return tasks


def _ask_clean(model: Model, x: Tensor, y: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        outputs = model(x)
    return {
        "labels": y.tolist(),
        "answers": outputs.argmax(1).tolist(),
        "is_random": sanity.is_random(model, x),
        "are_probabilities": sanity.are_probabilities(outputs),
        "n_zero_gradients": sanity.count_zero_gradients(model, x, y),
    }


def _ask_corruptions(model: Model, x: Tensor, y: Tensor, generator: Generator) -> dict[str, list[int]]:
    """Return how many examples are right under each corruption at each severity."""
    n_right = {}
    for name in shift.CORRUPTIONS:
        spoilt = (shift.corrupt(x, name, severity, generator) for severity in shift.SEVERITIES)
        n_right[name] = [int((~robustness.is_wrong(model, images, y)).sum()) for images in spoilt]
    return n_right
