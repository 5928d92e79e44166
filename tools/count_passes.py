"""Count the forward and backward passes that a step of each related method makes, beside those that it needs.

    python -m tools.count_passes

Prints a Markdown table. A pass is one of a whole batch through a backbone, in updates with each method's defaults on
Debug28 and a tiny network; where lambda is drawn, the mean over batches. Backward passes are those that reach the
backbone's output, whether for its weights or for the image.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from daft_domainbed.testing.workbench import Workbench

MOST = 1.1  # times what is needed
SHOWN = ("at_loss", "faal_awp", "oat_lambdas", "adt_family")  # of a case's hyperparameters
TINY = {"backbone": "resnet8_w2", "batch_size": 4}
SMALL_TOWERS = {"backbone": "open_clip/small", "teacher_backbone": "open_clip/small", "batch_size": 2}


@dataclass(frozen=True)
class Case:
    """A method with some of its hyperparameters, and what a step of it needs.

    Attributes:
        forward: Passes of a batch through the student.
        backward: The same, back.
        others: Forward passes through teachers.
    """

    name: str
    forward: float
    backward: float
    others: float = 0
    hparams: Mapping[str, Any] = field(default_factory=dict)


# Ascent steps of an attack, and the passes of the losses; OAT at 2 values spares the attack of half of a batch.
CASES = (
    Case("AT", 10 + 1, 10 + 1),
    Case("AT", 1 + 10 + 2, 10 + 2, hparams={"at_loss": "trades"}),
    Case("TinTeM", 1, 1, 1, {"teacher_backbone": "resnet8_w2", "teacher_weights": "none", "teacher_input_size": 32}),
    Case("BMTARD", 10 + 2, 10 + 2, 2),
    Case("CLIP", 1, 1, hparams=SMALL_TOWERS),
    Case("CaRot", 1, 1, 1, SMALL_TOWERS),
    Case("FAAL", 10 + 1, 10 + 1),
    Case("FAAL", 10 + 2, 10 + 2, hparams={"faal_awp": 0.005}),
    Case("OAT", 0.5 + 0.5 * (10 + 1), 0.5 + 0.5 * (10 + 1), hparams={"oat_lambdas": "0, 1", "oat_lambda": 1}),
    Case("RATIO", 10 + 10 + 2, 10 + 10 + 2),
    Case("ADT", 7 * 5 + 1, 7 * 5 + 1),
    Case("ADT", 2 + 1, 2 + 1, hparams={"adt_family": "amortised", "adt_width": 2}),
    Case("ADT", 2 + 1, 2 + 1, hparams={"adt_family": "implicit", "adt_width": 2}),
    Case("PIAT", 1 + 10 + 2, 10 + 2),
)


def count_passes(algorithm: Any, others: Sequence[nn.Module], minibatches: Sequence[tuple[Tensor, Tensor]]) -> Counter:
    """Return how many images go "forward" and "backward" through an algorithm's backbone, and through "others".

    Args:
        algorithm: Takes one step.
        others: Backbones of its teachers.
        minibatches: Of the step, after another one, in which averages are still what they average.
    """
    algorithm.update(minibatches)
    counts: Counter[str] = Counter()

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
            counts[name] += len(output)
            if name == "forward" and output.requires_grad:
                output.register_hook(lambda gradient: counts.update(backward=len(gradient)))

        return look

    handles = [module.register_forward_hook(watch("others")) for module in others]
    handles.append(algorithm.featurizer.register_forward_hook(watch("forward")))
    algorithm.update(minibatches)
    for handle in handles:
        handle.remove()
    return counts


def measure(case: Case, folder: Path) -> dict[str, float]:
    """Return the passes of a step, in batches."""
    with torch.random.fork_rng(devices=[]):
        bench = Workbench(folder, "embedded", case.name, "Debug28", {**TINY, **case.hparams}, steps=2)
        algorithm = bench.build()
        teachers = [] if case.name in ("FAAL", "CaRot") else bench.teachers.values()  # which these start from
        others = [teacher.model.featurizer for teacher in teachers]
        if hasattr(algorithm, "average"):
            others.append(algorithm.average.featurizer)
        minibatches = bench.draw_minibatches(0)
        counts = count_passes(algorithm, others, minibatches)
    size = sum(len(y) for _, y in minibatches)
    return {name: counts[name] / size for name in ("forward", "backward", "others")}


def make_table(cases: Sequence[Case] = CASES) -> str:
    """Return a Markdown table, a row a case."""
    lines = ["| method | | forward, needed | backward, needed | teachers, needed |", "|---|---|---:|---:|---:|"]
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(case, Path(folder))
        told = ", ".join(f"`{name}` {case.hparams[name]}" for name in SHOWN if name in case.hparams)
        pairs = (("forward", case.forward), ("backward", case.backward), ("others", case.others))
        cells = [f"{found[name]:g}, {needed:g}" for name, needed in pairs]
        lines.append(f"| {' | '.join([case.name, told, *cells])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(make_table())
    sys.exit(0)
