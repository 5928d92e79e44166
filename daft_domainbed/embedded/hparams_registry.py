"""Hyperparameters: a default and a random draw for each, as DomainBed's ERM has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.random import RandomState

from daft_domainbed.embedded import misc

SMALL_IMAGES = ["Debug28", "RotatedMNIST", "ColoredMNIST"]

FIXED = {
    "data_augmentation": True,
    "resnet18": False,
    "resnet50_augmix": True,
    "dinov2": False,
    "vit": False,
    "vit_attn_tune": False,
    "freeze_bn": False,
    "lars": False,
    "linear_steps": 500,
    "class_balanced": False,
    "nonlinear_classifier": False,
}


def _hparams(algorithm: str, dataset: str, random_seed: int) -> dict[str, tuple[Any, Any]]:
    """Return {name: (default, random draw)}; each name draws from a generator of its own, so names never interact."""
    hparams = {name: (value, value) for name, value in FIXED.items()}

    def define(name: str, default: Any, draw: Callable[[RandomState], Any]) -> None:
        hparams[name] = (default, draw(RandomState(misc.seed_hash(random_seed, name))))

    define("resnet_dropout", 0.0, lambda r: float(r.choice([0.0, 0.1, 0.5])))
    define("vit_dropout", 0.0, lambda r: float(r.choice([0.0, 0.1, 0.5])))
    if dataset in SMALL_IMAGES:
        define("lr", 1e-3, lambda r: 10 ** r.uniform(-4.5, -2.5))
        define("weight_decay", 0.0, lambda r: 0.0)
        define("batch_size", 64, lambda r: int(2 ** r.uniform(3, 9)))
    else:
        largest = 5 if dataset == "DomainNet" else 5.5
        define("lr", 5e-5, lambda r: 10 ** r.uniform(-5, -3.5))
        define("weight_decay", 0.0, lambda r: 10 ** r.uniform(-6, -2))
        define("batch_size", 32, lambda r: int(2 ** r.uniform(3, largest)))
    return hparams


def default_hparams(algorithm: str, dataset: str) -> dict[str, Any]:
    """Return the default hyperparameters of an algorithm on a data set."""
    return {name: default for name, (default, _) in _hparams(algorithm, dataset, 0).items()}


def random_hparams(algorithm: str, dataset: str, seed: int) -> dict[str, Any]:
    """Return the hyperparameters that `seed` draws for an algorithm on a data set."""
    return {name: draw for name, (_, draw) in _hparams(algorithm, dataset, seed).items()}
