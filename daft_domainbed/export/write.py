"""A model as files for others: safetensors with its configuration, ONNX, torch.export, and a card."""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from daft_domainbed._version import __version__
from daft_domainbed.arguments import name_dataset
from daft_domainbed.errors import DISK_FULL, RunError, UsageError
from daft_domainbed.export.card import format_card
from daft_domainbed.export.model import Model, build_model
from daft_domainbed.export.source import CONFIG_FILE, WEIGHTS_FILE, Source, read_source
from daft_domainbed.runtime.randomness import preserve_states

ONNX_FILE, PROGRAM_FILE, CARD_FILE = "model.onnx", "model.pt2", "README.md"
_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_LARGEST_DIFFERENCE = 1e-3  # of logits that another engine computes; its sums have another order
# Of the arguments those that say what the model is, and none that says where it lay.
_ARGS = ("algorithm", "dataset", "test_envs", "trial_seed", "seed", "hparams_seed", "steps", "task", "holdout_fraction",
         "uda_holdout_fraction", "leave_out_classes", "host", "precision", "data_seed")  # fmt: skip


@dataclass
class Exported:
    """What came of an export.

    Attributes:
        checks: By file, the largest difference of logits from the model's own.
        left_out: By file, why it is not there.
    """

    checks: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def export_model(path: Path, folder: Path, which: str = "chosen") -> Exported:
    """Write a model into a folder, with every file checked against the model itself.

    Args:
        path: A run's folder, or a checkpoint.
        folder: A new one, or an empty one, or that of an earlier export.
        which: Of a run's folder: "chosen" or "last".

    Raises:
        UsageError: There is no such model, or the folder holds something else.
        RunError: A file could not be made, or does not answer as the model does; the others are there.
    """
    source = read_source(path, which)
    model = build_model(source)
    _make_folder(folder)
    with preserve_states():
        pixels = torch.rand(3, *model.input_shape, generator=torch.Generator().manual_seed(0))
    exported, failures = Exported(), []
    _write_weights(model.algorithm.state_dict(), folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(_describe(source), indent=1, sort_keys=True) + "\n")
    try:
        exported.checks[WEIGHTS_FILE] = _check(build_model(read_source(folder)), model, pixels)
    except UsageError as error:  # a method of the user's that is built of its teachers
        exported.checks[WEIGHTS_FILE] = float("nan")
        failures.append(f"{WEIGHTS_FILE} cannot be built again without the teachers of the run ({error})")
    writers: dict[str, Callable[[Model, Path], Callable[[Tensor], Tensor]]] = {PROGRAM_FILE: _write_program}
    if missing := [name for name in _ONNX_PACKAGES if find_spec(name) is None]:
        exported.left_out[ONNX_FILE] = f"it needs {' and '.join(missing)}: pip install 'daft-domainbed[export]'"
        (folder / ONNX_FILE).unlink(missing_ok=True)
    else:
        writers[ONNX_FILE] = _write_onnx
    for name, write in writers.items():
        try:
            exported.checks[name] = _check(write(model, folder / name), model, pixels)
        except RunError as error:
            (folder / name).unlink(missing_ok=True)
            failures.append(f"{name}: {error}")
    # A class may be called by bytes that are no text, and the locale may know no umlaut.
    (folder / CARD_FILE).write_bytes(format_card(source, exported.checks).encode(errors="backslashreplace"))
    if failures:
        raise RunError(f"{folder}: {'; '.join(failures)}")
    return exported


def _make_folder(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / CONFIG_FILE).is_file():
        raise UsageError(f"{folder} holds files that no export wrote: name a new folder")


def _write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    """Write each tensor once; further names of it go into the metadata, as safetensors' own `save_model` has it."""
    kept: dict[tuple[int, tuple[int, ...]], str] = {}
    shared = {}
    for name, tensor in state.items():
        first = kept.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name) if tensor.numel() else name
        if first != name:
            shared[name] = first
    save_file({name: state[name].contiguous() for name in state if name not in shared}, path, metadata=shared)


def _describe(source: Source) -> dict[str, Any]:
    """Return the configuration: what another program has to know, and what builds the model again."""
    content, spec = source.content, source.spec
    args = {name: content["args"][name] for name in _ARGS if name in content["args"]}
    args |= {"dataset": name_dataset(str(args.get("dataset"))), "host": source.host.name}
    checkpoint = {name: value for name, value in content.items() if name not in ("model_dict", "provenance")}
    return {
        "schema": 1,
        "daft_domainbed": __version__,
        "class_names": source.class_names,
        "input_shape": list(source.input_shape),
        "input": "pixels from 0 to 1, [batch, channels, height, width], not normalised",
        "output": "logits, [batch, classes]",
        "normalised_inside": {"mean": list(spec.mean), "std": list(spec.std)},
        "checkpoint": checkpoint
        | {"args": args, "model_hparams": content["model_hparams"] | {"pixels": source.pixels}},
    }


def _check(answer: Callable[[Tensor], Tensor], model: Model, pixels: Tensor) -> float:
    """Return the largest difference of logits, of three images and of one.

    Raises:
        RunError: It is no matter of rounding.
    """
    largest = 0.0
    with torch.no_grad():
        for images in (pixels, pixels[:1]):
            own, other = model(images), answer(images)
            scale = max(1.0, float(own.abs().max()))
            largest = max(largest, float((own - other).abs().max()))
            if not largest <= _LARGEST_DIFFERENCE * scale:
                raise RunError(f"its logits differ from the model's by {largest:.3g}")
    return largest


def _make_program(model: Model) -> Any:
    """Return the model as `torch.export` sees it, for any number of images."""
    example = torch.rand(2, *model.input_shape, generator=torch.Generator().manual_seed(0))
    try:
        with preserve_states():
            return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # whatever an algorithm does that cannot be traced
        raise RunError(f"torch.export cannot trace this algorithm ({_one_line(error)})") from error


def _write_program(model: Model, path: Path) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on weights that have two names
        torch.export.save(_make_program(model), path)
    loaded: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return loaded


def _write_onnx(model: Model, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    program = _make_program(model)
    try:
        torch.onnx.export(
            program,
            f=path,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["pixels"],
            output_names=["logits"],
        )
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # the converter's and the runtime's own, of every kind
        if isinstance(error, OSError) and error.errno in DISK_FULL | {errno.EACCES}:
            raise
        raise RunError(f"it cannot be converted ({_one_line(error)})") from error
    return lambda pixels: torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
