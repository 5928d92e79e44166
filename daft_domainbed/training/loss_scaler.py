"""Loss scaling that an algorithm need not know of: gradients that fp16 would round to zero keep their bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class LossScaler(TorchFunctionMode):
    """Dynamic loss scaling (Micikevicius et al., 2018) for algorithms that know nothing of it.

    While active, `Tensor.backward` and `torch.autograd.grad` differentiate the scaled loss and answer with the loss's
    own gradients, so that whatever an algorithm does with them is right. Where one has overflowed the scale is halved
    and the loss differentiated again: no step is skipped.
    """

    growth_interval = 2000
    smallest = 2.0**-16

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.good_steps = 2.0**16, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            return self._backward(*args, **kwargs)
        if func is torch.autograd.grad:
            return self._grad(*args, **kwargs)
        return func(*args, **kwargs)

    def _backward(
        self, loss: Tensor, gradient: Tensor | None = None, retain_graph: bool | None = None, **options: Any
    ) -> None:
        """Add the loss's own gradients to each leaf's `grad`."""
        leaves = [leaf for leaf in options.get("inputs") or _find_leaves(loss) if leaf.is_leaf]
        before = [leaf.grad for leaf in leaves]

        def differentiate() -> list[Tensor | None]:
            for leaf in leaves:
                leaf.grad = None
            (loss * self.scale).backward(gradient, retain_graph=True, **options)
            return [leaf.grad for leaf in leaves]

        for leaf, old, new in zip(leaves, before, self._differentiate(differentiate, [loss]), strict=True):
            leaf.grad = new if old is None else old if new is None else old.add_(new)

    def _grad(self, outputs: Tensor | Sequence[Tensor], *args: Any, **options: Any) -> tuple[Tensor | None, ...]:
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        options |= {"retain_graph": True}
        return tuple(
            self._differentiate(
                lambda: list(torch.autograd.grad([output * self.scale for output in outputs], *args, **options)),
                outputs,
            )
        )

    def _differentiate(
        self, differentiate: Callable[[], list[Tensor | None]], outputs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return the outputs' own gradients; those of a loss that is infinite itself are returned as they are."""
        while True:
            gradients = [None if gradient is None else gradient / self.scale for gradient in differentiate()]
            if all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients):
                self.good_steps += 1
                if self.good_steps == self.growth_interval:
                    self.scale, self.good_steps = self.scale * 2, 0
                return gradients
            if self.scale <= self.smallest or not all(bool(output.isfinite().all()) for output in outputs):
                return gradients
            self.scale, self.good_steps = self.scale / 2, 0


def _find_leaves(loss: Tensor) -> list[Tensor]:
    """Return the tensors that `loss.backward()` would give gradients to."""
    leaves: list[Tensor] = []
    nodes: list[Any] = [loss.grad_fn]
    seen = {None}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                leaves.append(node.variable)
            nodes += [following for following, _ in node.next_functions]
    return leaves
