"""From findings to figures: the json of one model, which nothing but its journal decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from daft_domainbed.evaluation import sanity
from daft_domainbed.evaluation.shift import CORRUPTIONS
from daft_domainbed.evaluation.suites import PARTS, SQUARE_QUERIES, STRENGTHS, Suite
from daft_domainbed.evaluation.tasks import CURVE_STEPS, Radius


@dataclass(frozen=True)
class Protocol:
    """What was asked of a model, apart from the model.

    Attributes:
        suite: Its name.
        n_examples: Of an environment at most; 0 is all.
        seed: Of all draws.
        radii: By norm.
        asked: The suite.
        left_out: What cannot be asked of this model, with the reason after a colon.
    """

    suite: str
    n_examples: int
    seed: int
    radii: Sequence[Radius]
    asked: Suite
    left_out: Sequence[str] = field(default_factory=list)


def name_finding(task: str, env: str, batch: int) -> str:
    """Return the name of a task's finding on a batch, as the journal has it."""
    return f"{task} | {env} | {batch}"


class Findings:
    """The findings of a journal, put together environment by environment."""

    def __init__(self, findings: Mapping[str, Any], environments: Sequence[str]) -> None:
        self.findings, self.environments = findings, environments

    def list_batches(self, task: str, env: str) -> list[Any]:
        """Return a task's findings on an environment, batch by batch; none where it was not asked."""
        found: list[Any] = []
        while (name := name_finding(task, env, len(found))) in self.findings:
            found.append(self.findings[name])
        return found

    def join(self, task: str, env: str, key: str | None = None) -> list[Any]:
        """Return a task's values for all examples of an environment."""
        batches = self.list_batches(task, env)
        return [value for batch in batches for value in (batch if key is None else batch[key])]

    def list_tasks(self, start: str) -> list[str]:
        """Return the names of the tasks that begin with a word, in the order in which they were asked."""
        names = (name.split(" | ")[0] for name in self.findings if " | " in name)
        return list(dict.fromkeys(name for name in names if name.startswith(start)))

    def get_whole(self, name: str) -> Any:
        """Return a finding on all examples at once, or None."""
        return self.findings.get(name)


def build_record(
    facts: Mapping[str, Any], protocol: Protocol, findings: Findings, held_out: Sequence[str], cost: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the json of one model.

    Args:
        facts: Its first entries: checkpoint, algorithm, dataset, test_envs.
        protocol: What was asked.
        findings: Of the journal.
        held_out: Names of the environments that were held out of training.
        cost: What it took; the one entry that depends on when and where it ran.
    """
    envs = findings.environments
    right = {env: _list_right(findings, env) for env in envs}
    attacks = [
        row for env in envs for radius in protocol.radii for row in _list_attacks(protocol, findings, env, radius)
    ]
    asked = {*protocol.asked.parts, *(["ood"] if findings.get_whole("ood") else [])}  # --ood asks beyond the suite
    return {
        **facts,
        "environments": list(envs),
        "n_examples": protocol.n_examples,
        "seed": protocol.seed,
        "suite": protocol.suite,
        "clean": {env: to_percent(right[env]) for env in envs},
        "worst_class": {env: _find_worst_class(findings, env, right[env]) for env in envs},
        "curves": [c for env in envs for radius in protocol.radii for c in _list_curves(findings, env, radius)],
        "attacks": attacks,
        "corruptions": _sum_corruptions(findings, held_out),
        "calibration": findings.get_whole("calibration"),
        "ood": findings.get_whole("ood"),
        "fidelity": findings.get_whole("fidelity"),
        "flags": sanity.find_flags(_gather_signs(protocol, findings)),
        "skipped": [part for part in PARTS if part not in asked] + list(protocol.left_out),
        "cost": dict(cost),
    }


def to_percent(values: Sequence[Any]) -> float:
    """Return the percentage of true values.

    Example:
        >>> to_percent([1, 0, 1, 1])
        75.0
    """
    return 100 * sum(map(bool, values)) / len(values)


def _list_right(findings: Findings, env: str) -> list[bool]:
    labels, answers = (findings.join("clean", env, key) for key in ("labels", "answers"))
    return [label == answer for label, answer in zip(labels, answers, strict=True)]


def _find_worst_class(findings: Findings, env: str, right: Sequence[bool]) -> float:
    """Return the lowest accuracy of a class that is shown, in percent."""
    by_class: dict[int, list[bool]] = {}
    for label, is_right in zip(findings.join("clean", env, "labels"), right, strict=True):
        by_class.setdefault(label, []).append(is_right)
    return min(map(to_percent, by_class.values()))


def _list_curves(findings: Findings, env: str, radius: Radius) -> Iterable[dict[str, Any]]:
    grid = list(radius.grid)
    lost_at = findings.join(f"grid {radius.norm}", env)
    yield _make_curve(env, radius, "pgd", [to_percent([index > k for index in lost_at]) for k in range(len(grid))])
    if distances := findings.join(f"minimal {radius.norm}", env):
        withstood = [[d is None or d > eps for d in distances] for eps in grid]
        yield _make_curve(env, radius, "minimal", [to_percent(values) for values in withstood])


def _make_curve(env: str, radius: Radius, attack: str, accuracy: list[float]) -> dict[str, Any]:
    return {"env": env, "norm": radius.norm, "attack": attack, "eps": list(radius.grid), "accuracy": accuracy}


def _list_attacks(protocol: Protocol, findings: Findings, env: str, radius: Radius) -> Iterable[dict[str, Any]]:
    """Yield the rows of attacks at the fixed radius."""
    norm, suite = radius.norm, protocol.asked

    def make_row(name: str, stands: Sequence[Any], steps: int, restarts: int, ran: list[str]) -> dict[str, Any]:
        row = {"env": env, "name": name, "norm": norm, "eps": radius.eps, "steps": steps, "restarts": restarts}
        return row | {"accuracy": to_percent(stands), "ran": ran}

    first = findings.join(f"pgd {norm}", env, "first")
    for steps in (steps for steps in STRENGTHS if steps <= suite.pgd_steps):
        yield make_row(f"pgd-{steps}", [not 0 <= at <= steps for at in first], steps, 1, ["pgd"])
    stands = findings.join(f"pgd {norm}", env, "stands")
    yield make_row(f"pgd-{suite.pgd_steps}x{suite.restarts}", stands, suite.pgd_steps, suite.restarts, ["pgd"])
    for task in findings.list_tasks(f"transfer {norm} "):
        source = task.removeprefix(f"transfer {norm} ")
        yield make_row(f"transfer from {source}", findings.join(task, env), CURVE_STEPS, 1, ["pgd"])
    if stands := findings.join(f"square {norm}", env):
        yield make_row("square", stands, SQUARE_QUERIES, 1, ["square"])
    if batches := findings.list_batches(f"autoattack {norm}", env):
        ran = list(dict.fromkeys(name for batch in batches for name in batch["ran"]))
        yield make_row("autoattack", findings.join(f"autoattack {norm}", env, "stands"), 100, 1, ran)


def _sum_corruptions(findings: Findings, held_out: Sequence[str]) -> dict[str, Any] | None:
    """Return accuracy under each corruption, at each severity, over all examples of held-out domains."""
    batches = [batch for env in held_out for batch in findings.list_batches("corruptions", env)]
    if not batches:
        return None
    n = sum(len(findings.join("clean", env, "labels")) for env in held_out)
    by_name = {
        name: [100 * sum(column) / n for column in zip(*(batch[name] for batch in batches), strict=True)]
        for name in CORRUPTIONS
    }
    return {"mean": fmean(value for values in by_name.values() for value in values), "by_name": by_name}


def _gather_signs(protocol: Protocol, findings: Findings) -> sanity.Signs:
    batches = [batch for env in findings.environments for batch in findings.list_batches("clean", env)]
    signs = sanity.Signs(
        n=sum(len(batch["labels"]) for batch in batches),
        n_zero_gradients=sum(batch["n_zero_gradients"] for batch in batches),
        is_random=any(batch["is_random"] for batch in batches),
        are_probabilities=all(batch["are_probabilities"] for batch in batches),
    )

    def average(task: str, key: str | None = None, above: int = 0) -> float:
        values = [value > above for env in findings.environments for value in findings.join(task, env, key)]
        return sum(values) / len(values) if values else math.nan

    for radius in protocol.radii:
        norm = radius.norm
        signs.kept[norm] = average(f"grid {norm}", above=len(radius.grid) - 1)
        signs.white_box[norm] = average(f"pgd {norm}", "stands")
        signs.black_box[norm] = average(f"square {norm}")
    return signs
