"""Arithmetic in fewer bits: autocast for any algorithm, and loss scaling where fp16 needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from daft_domainbed.errors import UsageError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Runs updates and evaluations in a precision; algorithms call `loss.backward()` and `optimizer.step()` as ever.

    Args:
        name: fp32, bf16 or fp16.
        device: Where the arithmetic happens; fp16 needs CUDA.
        algorithm: Its optimizers learn to skip steps whose scaled gradients overflowed (fp16 only).
    """

    def __init__(self, name: str, device: torch.device, algorithm: torch.nn.Module) -> None:
        self.device, self.dtype = device, PRECISIONS[name]
        self.scaler = _LossScaler() if name == "fp16" else None
        if self.scaler is not None:
            for optimizer in find_optimizers(algorithm).values():
                self.scaler.attach(optimizer)

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


def check_precision(name: str, device: torch.device) -> None:
    """Refuse fp16 where nothing computes it.

    Raises:
        UsageError: fp16 on anything but CUDA.
    """
    if name == "fp16" and device.type != "cuda":
        raise UsageError(f"--precision fp16 runs on CUDA only, and the device is {device}: use bf16 or fp32")


def find_optimizers(algorithm: torch.nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Return an algorithm's optimizers by attribute name."""
    return {name: value for name, value in vars(algorithm).items() if isinstance(value, torch.optim.Optimizer)}


class _LossScaler(TorchFunctionMode):
    """Dynamic loss scaling (Micikevicius et al., 2018) for algorithms that know nothing of it.

    While active, every `Tensor.backward` is of the scaled loss; an attached optimizer unscales its gradients, skips
    the step where they overflowed, and the scale follows.
    """

    growth_interval = 2000

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.good_steps = 2.0**16, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.backward:
            args = (args[0] * self.scale, *args[1:])
        return func(*args, **(kwargs or {}))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        step = optimizer.step

        def step_unscaled(*args: Any, **kwargs: Any) -> Any:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, 1 / self.scale)
            if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
                self.scale, self.good_steps = self.scale / 2, 0
                return None
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.scale, self.good_steps = self.scale * 2, 0
            return step(*args, **kwargs)

        optimizer.step = step_unscaled  # type: ignore[method-assign]
