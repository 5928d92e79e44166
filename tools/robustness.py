"""The cost of `evaluate`'s attacks beside the same in plain torch, and the tables of docs/robustness.md.

python -m tools.robustness time runs/daft/model.pkl          the ratio of processor times
python -m tools.robustness table runs/judged/*/evaluation.json    Markdown, from stored evaluations
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.evaluation.robustness import Threat, find_lost_budgets, find_lost_restarts
from daft_domainbed.evaluation.subject import load_subject
from daft_domainbed.evaluation.suites import get_eps, get_grid
from daft_domainbed.functional.attacks import Norm
from daft_domainbed.results.robustness import list_numbers

STEPS, RESTARTS, ROUNDS = 20, 3, 5


def run_plain(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, norm: Norm, eps: float, step_size: float, delta: Tensor
) -> Tensor:
    """Return which examples a textbook PGD loses, [B], at any iterate."""
    lost = torch.zeros_like(y, dtype=torch.bool)
    for _ in range(STEPS):
        delta.requires_grad_()
        logits = model(x + delta)
        lost |= logits.argmax(1) != y
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), delta)
        with torch.no_grad():
            if norm == "linf":
                delta = (delta + step_size * gradient.sign()).clamp(-eps, eps)
            else:
                sizes = gradient.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
                delta = delta + step_size * gradient / sizes
                sizes = delta.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
                delta = delta * (eps / sizes).clamp_max(1)
            delta = (x + delta).clamp(0, 1) - x
    with torch.no_grad():
        return lost | (model(x + delta).argmax(1) != y)


def attack_plainly(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, norm: Norm) -> int:
    """Do what `attack_ours` does; return how many examples are left."""
    left = torch.arange(len(y))
    for eps in get_grid(norm, True)[1:]:
        lost = run_plain(model, x[left], y[left], norm, eps, 1.5 * eps / STEPS, torch.zeros_like(x[left]))
        left = left[~lost]
        if not len(left):
            break
    left, eps = torch.arange(len(y)), get_eps(norm, True)
    for _ in range(RESTARTS):
        start = (2 * torch.rand_like(x[left]) - 1) * eps
        if norm == "l2":
            start = start / start.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * eps
        left = left[~run_plain(model, x[left], y[left], norm, eps, eps / 4, start)]
    return len(left)


def attack_ours(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, norm: Norm) -> int:
    """Ask the quick suite's two questions; return how many examples are left by the second."""
    generator = torch.Generator().manual_seed(0)
    find_lost_budgets(model, x, y, Threat(norm), grid=get_grid(norm, True)[1:], steps=STEPS)
    _, stands = find_lost_restarts(
        model, x, y, Threat(norm), eps=get_eps(norm, True), steps=STEPS, restarts=RESTARTS, generator=generator
    )
    return int(stands.sum())


def measure_ratio(path: Path, n: int) -> None:
    """Print the processor time of our attacks over that of plain ones, in turns on the same examples."""
    subject = load_subject(path, "", device=torch.device("cpu"))
    env = subject.environments[subject.held_out[0]]
    x, y = subject.load(env, subject.choose(n, 0)[env])
    norms: tuple[Norm, ...] = ("linf", "l2")
    for norm in norms:
        seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        left = {}
        for _ in range(ROUNDS):
            for name, attack in (("ours", attack_ours), ("plain", attack_plainly)):
                started = time.process_time()
                left[name] = attack(subject.model, x, y, norm)
                seconds[name].append(time.process_time() - started)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        print(
            f"{norm}: ours {medians['ours']:.2f} s, plain {medians['plain']:.2f} s, ratio "
            f"{medians['ours'] / medians['plain']:.3f}; left {left['ours']} and {left['plain']} of {len(y)}"
        )


def format_table(models: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table, a row a model: the columns of `collect_results --robustness`, time and memory."""
    rows = []
    for model in models:
        held_out = {model["environments"][i] for i in model["test_envs"]}
        numbers = dict(list_numbers(model, held_out))
        cost = {"seconds": model["cost"]["seconds"], "peak MB": model["cost"]["peak_memory_mb"]}
        rows.append({"model": model["algorithm"], "suite": model["suite"]} | numbers | cost)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        values = (row.get(name) for name in columns)
        lines.append(f"| {' | '.join(f'{v:.3g}' if isinstance(v, float) else str(v or '-') for v in values)} |")
    return "\n".join(lines)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["time", "table"])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--n_examples", type=int, default=64)
    args = parser.parse_args()
    if args.command == "time":
        for path in args.paths:
            measure_ratio(path, args.n_examples)
    else:
        print(format_table([json.loads(path.read_text()) for path in args.paths]))


if __name__ == "__main__":
    main()
