"""The tables of docs/robustness.md, from records: stored evaluations, and the cost of attacks beside plain torch.

    python -m tools.robustness pack student runs/EmojiStyles/*/evaluation/evaluation.json
    python -m tools.robustness pack teacher runs/EmojiStyles/teachers/*/evaluation/evaluation.json
    python -m tools.robustness time runs/EmojiStyles/*/model.pkl --n_examples 32
    python -m tools.robustness write

The first three add to the records, `write` makes the tables from them. A record has a `kind`: an evaluation has a
`role` and the `model`'s json, a ratio a `ratio`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from daft_domainbed.evaluation.robustness import Threat, find_lost_budgets, find_lost_restarts
from daft_domainbed.evaluation.subject import load_subject
from daft_domainbed.evaluation.suites import get_eps, get_grid
from daft_domainbed.functional.attacks import Norm
from daft_domainbed.results.robustness import format_radius, list_numbers
from daft_domainbed.runtime.machine import describe_machine
from tools.archives import add_records, read_records
from tools.marked_tables import fill_tables

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "sweeps" / "demo" / "robustness.jsonl.xz"
PAGE = ROOT / "docs" / "robustness.md"
STEPS, RESTARTS, ROUNDS = 20, 3, 3
SHOWN = [k / 255 for k in (0, 0.5, 1, 2, 4, 8, 16)]  # radii of the table of curves


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


def measure_ratio(path: Path, n: int) -> Iterator[dict[str, Any]]:
    """Yield, by norm, the processor seconds of our attacks and of plain ones, in turns on the same examples."""
    device = torch.device("cpu")
    torch.set_num_threads(1)
    subject = load_subject(path, "", device=device)
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
        facts = {"algorithm": subject.algorithm, "dataset": subject.dataset, "host": subject.host.name}
        found = {"norm": norm, "n": len(y), "rounds": ROUNDS, "seconds": seconds, "left": left}
        yield facts | found | {"machine": describe_machine(device, "fp32")}


# --- tables ------------------------------------------------------------------------------------------------------


def make_models_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a row a method: the columns of `collect_results --robustness`, seconds and memory, means over models."""
    rows = []
    for name, models in group_models(records).items():
        numbers: dict[str, list[float]] = defaultdict(list)
        for model in models:
            for column, number in list_numbers(model, find_held_out(model)):
                if number is not None:
                    numbers[column].append(number)
            numbers["seconds"].append(model["cost"]["seconds"])
            numbers["peak MB"].append(model["cost"]["peak_memory_mb"])
        means = {column: statistics.fmean(values) for column, values in numbers.items()}
        rows.append({"": name, "models": len(models)} | means)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return format_table(columns, [[row.get(column) for column in columns] for row in rows])


def make_curves_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a row a method: accuracy on held-out domains at some Linf radii, by minimal distortions."""
    rows = []
    for name, models in group_models(records).items():
        curves = [
            dict(zip(curve["eps"], curve["accuracy"], strict=True))
            for model in models
            for curve in model["curves"]
            if (curve["norm"], curve["attack"]) == ("linf", "minimal") and curve["env"] in find_held_out(model)
        ]
        rows.append([name, *(statistics.fmean(curve[eps] for curve in curves) for eps in SHOWN)])
    return format_table(["", *map(format_radius, SHOWN)], rows)


def make_ratios_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a row a model and norm: median processor seconds of ours and plain, their ratio, what is left."""
    rows = []
    for ratio in (record["ratio"] for record in records if record["kind"] == "ratio"):
        ours, plain = (statistics.median(ratio["seconds"][side]) for side in ("ours", "plain"))
        left = f"{ratio['left']['ours']}, {ratio['left']['plain']}"
        name = f"{ratio['algorithm']}, {ratio['dataset']}"
        rows.append([name, ratio["norm"], ratio["n"], f"{ours:.2f}", f"{plain:.2f}", f"{ours / plain:.3f}", left])
    return format_table(["model", "norm", "n", "ours, s", "plain, s", "ratio", "left"], rows)


def group_models(records: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the models of evaluations by the name of their row."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["kind"] == "evaluation":
            role = "" if record["role"] == "student" else f" ({record['role']})"
            groups[f"{record['model']['algorithm']}{role}"].append(record["model"])
    return groups


def find_held_out(model: Mapping[str, Any]) -> set[str]:
    """Return the names of the environments that were held out of a model's training."""
    return {model["environments"][i] for i in model["test_envs"]}


def format_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(map(_format, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _format(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) < 2 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


TABLES: dict[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "models": make_models_table,
    "curves": make_curves_table,
    "ratios": make_ratios_table,
}


def fill_page(text: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Return the page with its tables made anew."""
    return fill_tables(text, "robustness", lambda name: TABLES[name](records))


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="add evaluations to the records")
    pack.add_argument("role", help="student, teacher, or whatever the row is to say in brackets")
    pack.add_argument("paths", nargs="+", type=Path)
    ratio = commands.add_parser("time", help="measure ratios, and add them to the records")
    ratio.add_argument("paths", nargs="+", type=Path)
    ratio.add_argument("--n_examples", type=int, default=32)
    commands.add_parser("write", help="make the tables of the page anew")
    args = parser.parse_args()
    if args.command == "pack":
        models = [json.loads(path.read_text()) for path in args.paths]
        add_records([{"kind": "evaluation", "role": args.role, "model": model} for model in models], RECORDS)
    elif args.command == "time":
        for path in args.paths:
            add_records([{"kind": "ratio", "ratio": ratio} for ratio in measure_ratio(path, args.n_examples)], RECORDS)
    else:
        PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8"), read_records(RECORDS)), encoding="utf-8")


if __name__ == "__main__":
    main()
