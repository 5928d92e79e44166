"""Arithmetic in fewer bits: autocast for any algorithm, and loss scaling where fp16 needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from daft_domainbed.errors import UsageError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_SMALL_SIDE = 32
_NUMPYS = ("RSC",)  # hands gradients to NumPy, which has no bfloat16
_UNSCALABLE = ("Fishr",)  # takes its gradients, sample by sample, from hooks inside backward


class Precision:
    """Runs updates and evaluations in a precision; algorithms differentiate and step as ever.

    Args:
        name: fp32, bf16 or fp16.
        device: Where the arithmetic happens.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device, self.dtype = device, PRECISIONS[name]
        self.scaler = _LossScaler() if name == "fp16" else None

    def prepare(self, model: torch.nn.Module, input_shape: Sequence[int]) -> None:
        """Lay weights out as convolutions in fewer bits are fastest; in fp32, where numbers are the host's, not at all.

        Args:
            model: Its convolutions' weights are laid out anew, in place.
            input_shape: (C, H, W); small images gain nothing.
        """
        if self.dtype is not None and input_shape[-1] > _SMALL_SIDE:
            for parameter in model.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Compute in this precision inside the block."""
        if self.dtype is None:
            yield
            return
        with torch.autocast(self.device.type, self.dtype), self.scaler or contextlib.nullcontext():
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return what has to survive a restart."""
        return {} if self.scaler is None else {"scale": self.scaler.scale, "good_steps": self.scaler.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a saved state."""
        if self.scaler is not None and state:
            self.scaler.scale, self.scaler.good_steps = state["scale"], state["good_steps"]


def check_precision(name: str, device: torch.device, algorithm: str = "ERM") -> None:
    """Refuse a precision where nothing computes it, or where it would compute something else.

    Raises:
        UsageError: fp16 on anything but CUDA, or for an algorithm whose gradients would be the scaled loss's; bf16 for
            one that computes with NumPy.
    """
    if name == "bf16" and algorithm in _NUMPYS:
        raise UsageError(f"--precision bf16: {algorithm} computes with NumPy, which has no bfloat16: use fp32")
    if name != "fp16":
        return
    if device.type != "cuda":
        raise UsageError(f"--precision fp16 runs on CUDA only, and the device is {device}: use bf16 or fp32")
    if algorithm in _UNSCALABLE:
        raise UsageError(
            f"--precision fp16 scales the loss, and {algorithm} would take the scale for a part of each sample's "
            f"gradient: use bf16 or fp32"
        )


def find_drawback(name: str, device: torch.device) -> str | None:
    """Return what makes a precision a bad choice on this machine, in one line, or None."""
    if name == "bf16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "--precision bf16: this CPU has no instructions for it, which can cost twenty times the time of fp32"
    return None


class _LossScaler(TorchFunctionMode):
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
        """Add to each leaf's `grad`."""
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
        """Return the outputs' own gradients; an infinite loss has what it has."""
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
