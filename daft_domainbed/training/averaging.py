"""A run's averaged weights, read out beside the plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from daft_domainbed.data.streams import Stream
from daft_domainbed.runtime.randomness import preserve_states


class WeightAverage:
    """The mean of an algorithm's weights after every step from a given one on (Arpit et al., 2022, equation 1).

    Batch norm's statistics are averaged like weights. The algorithm trains as it would without.

    Args:
        start: The first step whose weights count.
        device: Where the algorithm computes.
    """

    def __init__(self, start: int, device: torch.device) -> None:
        self.start, self.device = start, device
        self.n_averaged = 0
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, algorithm: nn.Module, n_steps: int) -> None:
        """Take in the weights after `n_steps` steps."""
        if n_steps < self.start:
            return
        for name, value in algorithm.state_dict().items():
            if not self.n_averaged:
                self.tensors[name] = value.detach().clone()
            else:
                mean = self.tensors[name]
                mean.copy_(mean + (value - mean) / (self.n_averaged + 1))
        self.n_averaged += 1

    @contextmanager
    def standing_in(self, algorithm: nn.Module) -> Iterator[None]:
        """Have the algorithm compute with the averaged weights inside the block."""
        state = algorithm.state_dict()
        plain = {name: value.detach().clone() for name, value in state.items()}
        _copy(self.tensors, state)
        try:
            yield
        finally:
            _copy(plain, state)

    def read_out(
        self, algorithm: nn.Module, streams: Mapping[str, Stream], evaluate: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """Return what an evaluation says of the averaged weights, if there are any yet.

        Streams and random states are left as they were, so that what follows is as if nobody had asked.

        Args:
            algorithm: Whose weights they are.
            streams: What the evaluation reads.
            evaluate: Evaluates the algorithm.
        """
        if not self.n_averaged:
            return {}
        states = {name: stream.state_dict() for name, stream in streams.items()}
        with preserve_states(), self.standing_in(algorithm):
            accuracies = evaluate()
        for name, state in states.items():
            streams[name].load_state_dict(state)
        return accuracies

    def state_dict(self) -> dict[str, Any]:
        """Return what has to survive a restart."""
        return {"n_averaged": self.n_averaged, "tensors": self.tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved mean."""
        self.n_averaged = state["n_averaged"]
        self.tensors = {name: value.to(self.device) for name, value in state["tensors"].items()}


@torch.no_grad()
def _copy(tensors: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        state[name].copy_(value)
