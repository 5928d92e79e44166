"""How a file of weights is written so that a crash loses nothing, and read so that it can do no harm."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from daft_domainbed.errors import UsageError
from daft_domainbed.runtime.files import writing_atomically

_MULTIARRAY = import_module("numpy._core.multiarray" if hasattr(np, "_core") else "numpy.core.multiarray")
# Upstream's random hyperparameters are NumPy scalars; these are all that a checkpoint may hold beside plain types.
_NUMPY_SCALARS = [
    np.dtype,
    _MULTIARRAY.scalar,
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")},
]
if hasattr(np, "_core"):  # the same function under the name that NumPy 1.x wrote into its pickles
    _NUMPY_SCALARS.append((_MULTIARRAY.scalar, "numpy.core.multiarray.scalar"))


def save(content: Mapping[str, Any], path: Path) -> None:
    """Save tensors and plain types with `torch.save`, in one indivisible step."""
    with writing_atomically(path) as file:
        try:
            torch.save(dict(content), file)
        except RuntimeError as error:  # torch's zip writer hides the disk's own error behind this one
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: Path, allowed: Sequence[type] = ()) -> dict[str, Any]:
    """Load a file that `torch.save` wrote, without ever running code from it.

    The archive's checksums are verified first: torch itself does not, so a flipped bit would load as other weights.
    Torch is then given what was verified, and nothing else: it reads some damaged archives in its own way.

    Args:
        path: The file.
        allowed: Classes whose instances it may hold beside tensors and data.

    Raises:
        UsageError: The file is missing, truncated, damaged, not a checkpoint, or holds anything but tensors and data.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a checkpoint in it, such as {path / 'model_best.pkl'}")
    if not path.is_file():
        raise UsageError(f"no checkpoint at {path}: check the path")
    verified = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(verified, "w") as copy:
            for entry in archive.infolist():
                if entry.filename in copy.namelist():
                    raise zipfile.BadZipFile(f"{entry.filename!r} is in it twice")
                copy.writestr(entry.filename, archive.read(entry))
    except Exception as error:  # zipfile lets decompressors and parsers speak for themselves
        raise UsageError(
            f"{path} is not a whole checkpoint ({_one_line(error)}): it was truncated or damaged, or written before "
            f"PyTorch 1.6; copy or make it again"
        ) from error
    verified.seek(0)
    return _unpickle(verified, path, allowed)


def _unpickle(file: BinaryIO, path: Path, allowed: Sequence[type]) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([*_NUMPY_SCALARS, *allowed]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that it then refuses, or reads well
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL ([^\s,]+)", str(error))
        what = _one_line(ValueError(kind[1])) if kind else _one_line(error)
        raise UsageError(
            f"{path} was refused: it holds something other than tensors and plain data, which could run code "
            f"({what}); there is no fallback to full unpickling"
        ) from error
    except Exception as error:  # whatever else a hostile archive provokes in torch's reader
        raise UsageError(f"{path} cannot be read as a checkpoint ({_one_line(error)}): make it again") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}, not a checkpoint: name a model.pkl")
    return content


def load_weights(path: Path) -> dict[str, Tensor]:
    """Load a plain state dict of a backbone from a `.safetensors` or a torch file."""
    content = load_nested(path)
    weights = content.get("state_dict", content)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UsageError(f"{path} holds more than a state dict: save the backbone's state_dict() alone")
    return dict(weights)


def load_nested(path: Path) -> dict[str, Any]:
    """Load a dictionary that holds tensors somewhere, from a `.safetensors` or a torch file of whatever age.

    It may hold the arguments of whoever saved it as a Namespace, which is data alone; timm's scripts do that.

    Raises:
        UsageError: As `load`.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise UsageError(f"no weights at {path}: check the path")
        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise UsageError(f"{path} is not a whole safetensors file ({_one_line(error)})") from error
    if path.is_file() and not zipfile.is_zipfile(path):  # of before PyTorch 1.6, as published weights often are
        with path.open("rb") as file:
            return _unpickle(file, path, [Namespace])
    return load(path, [Namespace])


def find_non_finite(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds values that are no numbers, or None."""
    return next((name for name, value in state.items() if not torch.isfinite(value.double()).all()), None)


def check_values(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Refuse weights that could not stand where they should: no plain floats, or no numbers.

    Args:
        found: Weights by name.
        wanted: Those of the network; what is no float there may be anything.
        path: Of the file.

    Raises:
        UsageError: Names the first.
    """
    floats = {name: found[name] for name, value in wanted.items() if value.is_floating_point() and name in found}
    for name, value in floats.items():
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            kind = "meta" if value.is_meta else f"{value.layout} {value.dtype}".replace("torch.", "")
            raise UsageError(f"{path}: {name} is a {kind} tensor, not one of plain floats: save such weights")
    if bad := find_non_finite(floats):
        raise UsageError(f"{path}: {bad} holds values that are no numbers: its training diverged, train it again")


def hash_state(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names, types, shapes and bytes of a state dict, whatever device or layout it has."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def to_plain(value: Any) -> Any:
    """Turn NumPy scalars and tuples, at any depth, into plain types that JSON and a safe load accept.

    Example:
        >>> to_plain({"lr": np.float64(0.5), "n": np.int64(3)})
        {'lr': 0.5, 'n': 3}
    """
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _one_line(error: BaseException) -> str:
    text = "".join(c for c in " ".join(str(error).split()) if c.isprintable()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
