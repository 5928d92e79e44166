"""Methods mixed over the embedded host's ERM without a run around them, and batches of drawings for them."""

from __future__ import annotations

import copy
import functools
import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from daft_domainbed.embedded import algorithms, datasets, hparams_registry, networks
from daft_domainbed.models.resnet8 import ResNet8

Minibatches = list[tuple[Tensor, Tensor]]
N_CLASSES, N_DOMAINS = 8, 3
SHAPE = (3, 32, 32)


def list_defaults(kind: type) -> dict[str, Any]:
    """Return the defaults of a method's hyperparameters and of those that it takes over."""
    return {
        name: hparam.default for part in reversed(kind.__mro__) for name, hparam in getattr(part, "HPARAMS", {}).items()
    }


def make(name: str, seed: int = 0, **hparams: Any) -> Any:
    """Build a method, or ERM, from the same random state each time, and leave the global one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(name, **hparams)


def build(name: str, **hparams: Any) -> Any:
    """Build a method, or ERM, with a tiny network."""
    full = hparams_registry.default_hparams("ERM", "Debug28") | {"backbone": "resnet8_w2", "pixels": "unit"}
    kind = algorithms.ERM
    if name != "ERM":
        mixin = getattr(importlib.import_module(f"daft_domainbed.algorithms.{name.lower()}"), name)
        full |= list_defaults(mixin)
        kind = type(name, (mixin, algorithms.ERM), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "Featurizer", build_featurizer)
        return kind(SHAPE, N_CLASSES, N_DOMAINS, full | hparams)


def build_featurizer(input_shape: tuple[int, ...], hparams: dict[str, Any]) -> nn.Module:
    """Build a ResNet8 of the width that the hyperparameter `backbone` says."""
    return ResNet8(input_shape[0], int(hparams["backbone"].removeprefix("resnet8_w")))


@functools.cache
def load_drawings() -> datasets.EmojiStyles:
    """Return the embedded drawings, not augmented."""
    return datasets.EmojiStyles(None, [], {"data_augmentation": False})


def draw_minibatches(seed: int, size: int = 6) -> Minibatches:
    """Return a minibatch of drawings of each of three styles, the same each time."""
    data = load_drawings()
    generator = torch.Generator().manual_seed(seed)
    return [env.fetch(torch.randint(len(env), (size,), generator=generator)) for env in data.datasets[:N_DOMAINS]]


def train(algorithm: Any, n_steps: int, first: int = 0) -> list[dict[str, float]]:
    """Take steps on minibatches that depend on the step alone."""
    return [algorithm.update(draw_minibatches(step)) for step in range(first, first + n_steps)]


def make_teacher(algorithm: Any) -> Any:
    """Return what `take_teacher` returns of a slot, as far as methods use it."""
    model = copy.deepcopy(algorithm).eval().requires_grad_(False)
    return SimpleNamespace(
        model=model,
        get_architecture=lambda: {"backbone": "resnet8_w2", "pixels": "unit"},
        copy_weights_to=lambda network, *_: network.load_state_dict(model.network.state_dict()),
    )


def is_equal(module: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules have the same parameters and buffers, bit for bit."""
    mine, others = module.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in mine.items())


def count_images(algorithm: Any, seed: int = 0) -> int:
    """Return how many images go through the network in one step."""
    counts: list[int] = []
    handle = algorithm.network.register_forward_hook(lambda module, inputs, output: counts.append(len(inputs[0])))
    train(algorithm, 1, first=seed)
    handle.remove()
    return sum(counts)
