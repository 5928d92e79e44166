"""When memory runs out: the same batch in smaller parts, with the same answers up to rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device, or the machine, has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # of torch's allocator on the CPU


def apply_in_parts(function: Callable[[Tensor], Tensor], x: Tensor, at_once: int | None) -> Tensor:
    """Apply a function to a batch, to so many rows of it at a time; to all where nothing bounds it.

    Where a gradient may be asked for, what a part has computed on the way is forgotten and computed again.
    """
    if at_once is None or len(x) <= at_once:
        return function(x)
    parts = x.split(at_once)
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(function, part, use_reentrant=False) for part in parts])
    return torch.cat([function(part) for part in parts])
