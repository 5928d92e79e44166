"""Measures of all chosen examples at once, which no mean over batches equals: calibration, detection, fidelity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from daft_domainbed.evaluation import confidence, fidelity
from daft_domainbed.evaluation.outside import Outside
from daft_domainbed.evaluation.pixel_model import PixelModel
from daft_domainbed.evaluation.subject import Subject

Chosen = Mapping[str, list[int]]


def measure_calibration(subject: Subject, chosen: Chosen) -> dict[str, Any]:
    """Return the calibration of a model over all environments, before and after temperature scaling.

    The temperature is fitted on the examples of training domains: nobody has labels of a held-out one.
    """
    answers = {env: _answer(subject, env, positions) for env, positions in chosen.items()}
    logits, labels = (torch.cat(parts) for parts in zip(*answers.values(), strict=True))
    sources = [answers[env] for i, env in enumerate(subject.environments) if i not in subject.held_out]
    temperature = confidence.fit_temperature(*(torch.cat(parts) for parts in zip(*sources, strict=True)))
    before, after = (confidence.measure_reliability(z, labels) for z in (logits, logits / temperature))
    return {
        "ece": _round(before.ece),
        "ece_scaled": _round(after.ece),
        "temperature": _round(temperature),
        "n_bins": confidence.N_BINS,
        "reliability": {"before": _to_plain(before), "after": _to_plain(after)},
    }


def measure_detection(subject: Subject, chosen: Chosen, outside: Outside, seed: int) -> list[dict[str, Any]]:
    """Return how well a model's scores tell its own images, of held-out domains, from others, as many of them."""
    own = [_answer(subject, env, chosen[env])[0] for i, env in enumerate(subject.environments) if i in subject.held_out]
    known = confidence.score(torch.cat(own))
    images = outside.load(subject, len(known["msp"]), seed)
    other = confidence.score(torch.cat([_predict(subject.model, pixels) for pixels in images]))
    return [
        {
            "set": outside.name,
            "score": name,
            "auroc": _round(confidence.measure_auroc(known[name], other[name])),
            "fpr95": _round(confidence.measure_fpr95(known[name], other[name])),
        }
        for name in known
    ]


def measure_fidelity(subject: Subject, chosen: Chosen, teacher: PixelModel) -> dict[str, float | None]:
    """Return how much of a teacher is in its student, over all environments."""
    pairs = [
        tuple(_show(model, subject.load(env, batch)[0]) for model in (subject.model, teacher))
        for env, positions in chosen.items()
        for batch in subject.list_batches(positions)
    ]
    (own, own_features), (its, its_features) = (_join(side) for side in zip(*pairs, strict=True))
    measured: dict[str, float | None] = {
        "agreement": 100 * fidelity.measure_agreement(own, its),
        "kl": _round(fidelity.measure_kl(own, its)),
        "cka": None,
        "cosine": None,
    }
    if own_features is not None and its_features is not None:
        measured["cka"] = _round(fidelity.measure_cka(own_features, its_features))
        measured["cosine"] = _round(fidelity.measure_cosine_correlation(own_features, its_features))
    return measured


def _answer(subject: Subject, env: str, positions: list[int]) -> tuple[Tensor, Tensor]:
    """Return logits and labels of some examples of an environment, on the CPU."""
    batches = [subject.load(env, batch) for batch in subject.list_batches(positions)]
    return torch.cat([_predict(subject.model, x) for x, _ in batches]), torch.cat([y.cpu() for _, y in batches])


def _predict(model: PixelModel, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixels).float().cpu()


def _show(model: PixelModel, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return logits and features."""
    with torch.no_grad():
        features = model.encode(pixels)
    return _predict(model, pixels), None if features is None else features.float().cpu()


def _join(side: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    logits, features = zip(*side, strict=True)
    return torch.cat(logits), None if features[0] is None else torch.cat(features)


def _to_plain(reliability: confidence.Reliability) -> dict[str, Any]:
    return {name: _round_all(values) for name, values in asdict(reliability).items()}


def _round_all(values: Iterable[float]) -> list[float | None]:
    return [_round(value) for value in values]


def _round(value: float) -> float | None:
    """Return six digits, which machines agree on, and null for what JSON has no number for."""
    return value if isinstance(value, int) else float(f"{value:.6g}") if math.isfinite(value) else None
