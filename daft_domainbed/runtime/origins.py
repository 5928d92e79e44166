"""Where a network's first weights come from, as far as anybody knows: what they have seen decides what results mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

UNKNOWN = "weights of unknown origin"
_NEVER_PRETRAINED = ("resnet8_w", "ranker_w", "open_clip/small")  # how the names of our own networks begin
_SMALLEST_HOST_RESNET = 33  # pixels: up to 32 the host's own networks start from nothing


def list_origins(
    hparams: Mapping[str, Any], input_shape: tuple[int, ...], names: Iterable[str] = ("weights",)
) -> dict[str, str]:
    """Return what networks start from, by the hyperparameter that says so; nothing of those that start from nothing.

    Args:
        hparams: Of a run.
        input_shape: (C, H, W) of an image.
        names: Of the hyperparameters that name weights.

    Example:
        >>> list_origins({"backbone": "resnet8_w8", "weights": "pretrained"}, (3, 32, 32))
        {}
        >>> list_origins({"backbone": "ranker_w32", "weights": "pretrained"}, (21, 40))
        {}
        >>> list_origins({"backbone": "open_clip/small", "weights": "pretrained"}, (3, 32, 32))
        {}
        >>> list_origins({"backbone": "timm/resnet10t", "weights": "pretrained"}, (3, 64, 64))
        {'weights': 'pretrained timm/resnet10t'}
        >>> list_origins({"backbone": "resnet18", "weights": "mine/net.pt"}, (3, 64, 64))
        {'weights': 'weights of unknown origin (net.pt)'}
    """
    origins = {}
    for name in names:
        if not _is_listed(hparams.get(name)):
            continue
        prefix = name.removesuffix("weights")
        backbones = _as_list(hparams.get(f"{prefix}backbone", "default"))
        files = _as_list(hparams[name]) * (len(backbones) if not isinstance(hparams[name], list) else 1)
        found = [_describe(str(b), str(w), hparams, input_shape) for b, w in zip(backbones, files, strict=False)]
        if text := ", ".join(dict.fromkeys(filter(None, found))):
            origins[name] = text
    return origins


def list_doubts(origins: Mapping[str, str]) -> list[str]:
    """Return a line for each origin that nobody has checked, or that somebody declared."""
    why = "; whether they have seen the held-out domains is not checked"
    doubtful = {name: text for name, text in origins.items() if not text.startswith("pretrained ")}
    return [f"{name}: {text}{why if UNKNOWN in text else ''}" for name, text in doubtful.items()]


def is_file(weights: Any) -> bool:
    """Return whether a hyperparameter names a file of weights."""
    return isinstance(weights, str) and weights not in ("pretrained", "none")


def name_unknown(weights: str) -> str:
    """Return what a file of weights is called in records and tables."""
    return f"{UNKNOWN} ({PurePath(weights).name})"


def _describe(backbone: str, weights: str, hparams: Mapping[str, Any], input_shape: tuple[int, ...]) -> str:
    if is_file(weights):
        return name_unknown(weights)
    if weights == "none" or backbone.startswith(_NEVER_PRETRAINED):
        return ""
    if backbone != "default":
        return f"pretrained {backbone}"
    if len(input_shape) < 3 or input_shape[-1] < _SMALLEST_HOST_RESNET:
        return ""
    network = "ViT" if hparams.get("vit") else "ResNet-18" if hparams.get("resnet18") else "ResNet-50"
    return f"pretrained {network} of the host"


def _is_listed(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
