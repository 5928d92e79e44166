"""Which file is meant by a path, and what it says of its model: of a run, of a checkpoint, or of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.functional.input_spec import INPUT_SPECS, InputSpec
from daft_domainbed.host.checkpoints import load_checkpoint
from daft_domainbed.host.contract import Host, describe_dataset, find_host
from daft_domainbed.methods import PLAIN
from daft_domainbed.plugin.registration import register
from daft_domainbed.runtime.layout import BEST_CHECKPOINT_FILE, CHECKPOINT_FILE

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
WHICH = {"chosen": BEST_CHECKPOINT_FILE, "last": CHECKPOINT_FILE}


@dataclass(frozen=True)
class Source:
    """What is known of a model before it is built.

    Attributes:
        path: Of the file that its weights are in.
        content: Of the checkpoint.
        host: Whose parts it is built of, registered.
        pixels: Which of INPUT_SPECS its training images were normalised by.
    """

    path: Path
    content: Mapping[str, Any]
    host: Host
    pixels: str

    @property
    def spec(self) -> InputSpec:
        """How its training images were normalised."""
        return INPUT_SPECS[self.pixels]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of its training images."""
        return tuple(self.content["model_input_shape"])

    @property
    def class_names(self) -> list[str] | None:
        """Names in the order of the logits; None where the checkpoint does not know them."""
        names = self.content.get("class_names")
        named = list(map(str, names)) if isinstance(names, list) else []
        return named if len(set(named)) == self.content["model_num_classes"] else None


def read_source(path: Path, which: str = "chosen") -> Source:
    """Read what a path stands for.

    Args:
        path: A run's folder, a checkpoint, or an exported folder.
        which: Of a run's folder: "chosen" or "last".

    Raises:
        UsageError: There is no such checkpoint, or nothing that a model can be built of.
    """
    if which not in WHICH:
        raise UsageError(f"which is {which!r}.{suggest(which, WHICH)} It takes: {', '.join(WHICH)}")
    if (path / CONFIG_FILE).is_file():
        path, content = path / WEIGHTS_FILE, _read_exported(path)
    else:
        path = _find_checkpoint(path, which)
        content = load_checkpoint(path)
    if len(content["model_input_shape"]) != 3:
        raise UsageError(f"{path} takes no images: its input is {list(content['model_input_shape'])}")
    try:
        host = _find_its_host(content)
        return Source(path, content, host, _find_pixels(content, host))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _find_checkpoint(path: Path, which: str) -> Path:
    if not path.is_dir():
        return path
    file = path / WHICH[which]
    if file.is_file():
        return file
    others = [f'which="{name}" is its {other}' for name, other in WHICH.items() if (path / other).is_file()]
    hint = "; ".join(others) or "name the folder of a run that kept its models, or a checkpoint"
    raise UsageError(f"{path} has no {file.name}: {hint}")


def _read_exported(folder: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        content: dict[str, Any] = dict(json.loads((folder / CONFIG_FILE).read_text())["checkpoint"])
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            shared = file.metadata() or {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UsageError(f"{folder} is no folder that export wrote ({error}): export the model again") from error
    # Of two names of one tensor the file holds one.
    tensors |= {name: tensors[kept] for name, kept in shared.items() if kept in tensors}
    return content | {"model_dict": tensors}


def _find_its_host(content: Mapping[str, Any]) -> Host:
    """Return the host of a checkpoint; DomainBed's own do not name theirs, and ours builds what it can."""
    args = content["args"]
    host = find_host(args.get("host") or "embedded")
    register(host)
    if "host" not in args and args.get("algorithm", PLAIN) not in host.algorithms.ALGORITHMS:
        host = find_host("upstream")
        register(host)
    return host


def _find_pixels(content: Mapping[str, Any], host: Host) -> str:
    """Return how training images were normalised, if need be by the name of their data set; the data are not read."""
    pixels, dataset = content["model_hparams"].get("pixels"), str(content["args"].get("dataset"))
    if isinstance(pixels, str) and pixels in INPUT_SPECS:
        return pixels
    return "imagenet" if dataset.startswith("folder:") else describe_dataset(host, dataset, {}).pixels
