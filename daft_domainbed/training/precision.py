"""Arithmetic in fewer bits: autocast for any algorithm, and loss scaling where fp16 needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from daft_domainbed.errors import UsageError
from daft_domainbed.host.contract import USING_BACKWARD_HOOKS, USING_NUMPY
from daft_domainbed.models.frozen import compute_frozen_in
from daft_domainbed.training.loss_scaler import LossScaler

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "frozen_bf16": None}
_SMALL_SIDE = 32


class Precision:
    """The precision that updates and evaluations compute in, whatever the algorithm.

    Args:
        name: fp32, bf16, fp16, or frozen_bf16: what is frozen and remembered in bf16, all else in fp32.
        device: Where the arithmetic happens.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.device, self.dtype = device, PRECISIONS[name]
        self.frozen_dtype = torch.bfloat16 if name == "frozen_bf16" else None
        self.scaler = LossScaler() if name == "fp16" else None

    def prepare(self, model: torch.nn.Module, input_shape: Sequence[int]) -> None:
        """Lay weights out so that convolutions in fewer bits are fastest; in fp32 they stay, so that numbers do too.

        What is frozen gets the precision of its own here.

        Args:
            model: Its convolutions' weights are laid out anew, in place.
            input_shape: (C, H, W); small images gain nothing.
        """
        if self.frozen_dtype is not None:
            compute_frozen_in(model, self.frozen_dtype)
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
    if name == "bf16" and algorithm in USING_NUMPY:
        raise UsageError(f"--precision bf16: {algorithm} computes with NumPy, which has no bfloat16: use fp32")
    if name != "fp16":
        return
    if device.type != "cuda":
        raise UsageError(f"--precision fp16 runs on CUDA only, and the device is {device}: use bf16 or fp32")
    if algorithm in USING_BACKWARD_HOOKS:
        raise UsageError(
            f"--precision fp16 scales the loss, and {algorithm} would take the scale for a part of each sample's "
            f"gradient: use bf16 or fp32"
        )


def find_drawback(name: str, device: torch.device) -> str | None:
    """Return what makes a precision a bad choice on this machine, in one line, or None."""
    if "bf16" in name and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return f"--precision {name}: this CPU has no instructions for it, which can cost twenty times the time of fp32"
    return None
