"""The global random states of Python, NumPy and torch: seeded, captured, put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

States = dict[str, Any]


def capture_states(*, cuda: bool = True) -> States:
    """Return the global random states of Python, NumPy, torch and (unless told otherwise) CUDA, as plain types."""
    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    states: States = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if cuda and torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_states(states: States) -> None:
    """Put captured random states back in place."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def preserve_states(*, cuda: bool = True) -> Iterator[None]:
    """Leave all global random states as they were, whatever is drawn inside."""
    states = capture_states(cuda=cuda)
    try:
        yield
    finally:
        restore_states(states)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch as DomainBed's training script does."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
