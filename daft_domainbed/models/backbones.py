"""Networks by name: our small ResNets and rankers, torchvision's and timm's models, as featurizers of a host."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daft_domainbed.errors import UsageError
from daft_domainbed.functional.input_spec import INPUT_SPECS, InputSpec
from daft_domainbed.models.feature_memory import FeatureMemory
from daft_domainbed.models.frozen import Frost, freeze, freeze_prefix, remember
from daft_domainbed.models.open_clip import build_open_clip
from daft_domainbed.models.pretrained import build_timm, build_torchvision
from daft_domainbed.models.ranker import Ranker
from daft_domainbed.models.resnet8 import ResNet8
from daft_domainbed.models.weights import check_values, load_weights

IMAGENET = INPUT_SPECS["imagenet"]
_OURS = re.compile(r"(resnet8|ranker)_w(\d+)")


def build_backbone(
    name: str,
    input_shape: Sequence[int],
    weights: str = "pretrained",
    side: int | None = None,
    input_spec: InputSpec = IMAGENET,
) -> nn.Module:
    """Build a featurizer by name, with its number of features as `n_outputs`.

    One of open_clip resizes its input to the size that it knows, whatever the others do.

    Args:
        name: `resnet8_w<N>`, `ranker_w<N>`, a torchvision model, `timm/<name>`, or `open_clip/<name>`.
        input_shape: (C, H, W), or of lists of texts (rows, words).
        weights: "pretrained", "none", or a file of the backbone's state dict; ours have only the latter two.
        side: Pixels to which a torchvision or timm backbone resizes its input; None leaves it.
        input_spec: How the data set normalised its images; such a backbone normalises them anew in its own way.

    Raises:
        UsageError: Unknown name, weights that cannot be had or do not fit, or an input the network cannot take.
    """
    match = _OURS.fullmatch(name)
    is_ranker = match is not None and match[1] == "ranker"
    if is_ranker != (len(input_shape) == 2):
        wanted, found = ("lists of texts", "images") if is_ranker else ("images", "lists of texts")
        raise UsageError(f"backbone {name!r} takes {wanted}, and the data are {found}: choose another")
    if match:
        network = _build_ours(name, is_ranker, int(match[2]), input_shape)
        return network if weights in ("pretrained", "none") else _load_into(network, Path(weights), name)
    if input_shape[0] != 3:
        raise UsageError(f"backbone {name!r} takes 3 channels, the data have {input_shape[0]}: use resnet8_w<N>")
    if name.startswith("open_clip/"):
        towers = build_open_clip(name.removeprefix("open_clip/"), weights)
        side = towers.side if side is None else side
        return HeadlessBackbone(towers, side, input_spec, _get_network_spec(towers), input_shape, name)
    network = build_timm(name, weights) if name.startswith("timm/") else build_torchvision(name, weights)
    if weights not in ("pretrained", "none"):
        _load_into(network, Path(weights), name)
    return HeadlessBackbone(network, side, input_spec, _get_network_spec(network), input_shape, name)


def _build_ours(name: str, is_ranker: bool, width: int, input_shape: Sequence[int]) -> nn.Module:
    if width == 0 or (is_ranker and width % 2):
        example, rule = ("ranker_w32", "a positive even number") if is_ranker else ("resnet8_w8", "at least 1")
        raise UsageError(f"backbone {name!r} has a width of {width}: it has to be {rule}, as in {example!r}")
    return Ranker(input_shape, width) if is_ranker else ResNet8(input_shape[0], width)


def build_backbones(
    names: str | Sequence[str],
    input_shape: Sequence[int],
    weights: str | Sequence[str],
    sides: int | str | Sequence[int | str],
    input_spec: InputSpec,
) -> nn.Module:
    """Build a featurizer of one network, or of several side by side.

    Args:
        names: One, or a list.
        input_shape: (C, H, W).
        weights: As for `build_backbone`; one for all networks, or one each.
        sides: The same of their side; "auto" leaves the image as it is.
        input_spec: How the data set normalised its images.

    Raises:
        UsageError: As `build_backbone`, or another number of weights or sides than of networks.
    """
    listed = [names] if isinstance(names, str) else list(names)
    parts = [
        build_backbone(name, input_shape, own_weights, None if isinstance(side, str) else side, input_spec)
        for name, own_weights, side in zip(
            listed, _give_each(weights, listed, "weights"), _give_each(sides, listed, "input sizes"), strict=True
        )
    ]
    return parts[0] if isinstance(names, str) else ConcatenatedBackbone(parts)


def _give_each(value: Any, names: Sequence[str], what: str) -> list[Any]:
    values = value if isinstance(value, list) else [value] * len(names)
    if len(values) != len(names):
        raise UsageError(f"{len(values)} {what} for {len(names)} backbones ({', '.join(names)}): give one, or one each")
    return values


def freeze_backbone(backbone: nn.Module, *, remembers: bool = False) -> nn.Module:
    """Freeze a backbone in place; one of torchvision or timm, which is expensive, remembers its features.

    Args:
        backbone: Any.
        remembers: Whether the others do so too.
    """
    if isinstance(backbone, ConcatenatedBackbone):
        for part in backbone.parts:
            freeze_backbone(part, remembers=remembers)
    elif remembers or isinstance(backbone, HeadlessBackbone):
        return remember(backbone, FeatureMemory())
    return freeze(backbone)


def freeze_for_probe(algorithm: Any) -> Frost:
    """Freeze an algorithm's backbone while its head alone is trained (Kumar et al., 2022, arXiv 2202.10054).

    Raises:
        UsageError: It has no featurizer.
    """
    featurizer = getattr(algorithm, "featurizer", None)
    if not isinstance(featurizer, nn.Module):
        kind = type(algorithm).__name__
        raise UsageError(f"hyperparameter probe_steps: {kind} has no featurizer that could be frozen meanwhile")
    return Frost(featurizer, freeze_backbone)


def freeze_part(backbone: nn.Module, part: bool | str, input_shape: Sequence[int]) -> nn.Module:
    """Freeze as much of a backbone as a hyperparameter says, in place.

    Args:
        backbone: Any.
        part: False, true, or "stages:N": the stem and the first N stages, whose activations it remembers.
        input_shape: (C, H, W) of an image.

    Raises:
        UsageError: It has fewer stages, or none.
    """
    if not isinstance(part, str):
        return freeze_backbone(backbone) if part else backbone
    if isinstance(backbone, ConcatenatedBackbone):
        for inner in backbone.parts:
            freeze_part(inner, part, input_shape)
        return backbone
    if any(isinstance(module, nn.Conv2d) and module.groups > 1 for module in backbone.modules()):
        backbone.to(memory_format=torch.channels_last)  # a third faster on a CPU; plain convolutions are slower so
    return freeze_prefix(backbone, int(part.removeprefix("stages:")), input_shape)


class HeadlessBackbone(nn.Module):
    """A model of torchvision or timm without its head, given images of the size and normalisation that it knows.

    Args:
        network: Maps images to features.
        side: Pixels to which images are resized first; None leaves them.
        data_spec: How the data set normalised its images.
        network_spec: How the images were normalised that the network's weights were trained on.
        input_shape: The data set's, (C, H, W).
        name: The backbone's, for messages.
    """

    rebuilt = ("data_spec", "network_spec")  # nothing that a resumed run would miss

    def __init__(
        self,
        network: nn.Module,
        side: int | None,
        data_spec: InputSpec,
        network_spec: InputSpec,
        input_shape: Sequence[int],
        name: str,
    ) -> None:
        super().__init__()
        self.network, self.side = network, side
        self.data_spec, self.network_spec = data_spec, network_spec
        shape = input_shape if side is None else (input_shape[0], side, side)
        self.n_outputs = _count_features(network, shape, name)

    def _get_name(self) -> str:
        return "_Headless"  # as the class was once called: the repr is in the names of files in a feature cache

    def extra_repr(self) -> str:
        """Return what the repr says beside the layers; the words are as old as the files that are named by it."""
        return f"side={self.side}, theirs={self.data_spec}, ours={self.network_spec}"

    def forward(self, x: Tensor) -> Tensor:
        """Encode images, [B, C, H, W], as the data set normalised them, into features, [B, D]."""
        return self.network(self.prepare(x)).flatten(1)

    def prepare(self, x: Tensor) -> Tensor:
        """Return images of the size and normalisation that the network knows."""
        if self.side is not None and x.shape[-1] != self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        if self.data_spec.has_box and self.data_spec != self.network_spec:
            scale, shift = self.data_spec.get_std(x), self.data_spec.get_mean(x)
            x = (x * scale + shift - self.network_spec.get_mean(x)) / self.network_spec.get_std(x)
        return x


class ConcatenatedBackbone(nn.Module):
    """Several backbones side by side, each with its own input size and normalisation; their features are one vector.

    Args:
        parts: Map images to features, [B, D_i].
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.n_outputs = sum(part.n_outputs for part in parts)  # type: ignore[misc]  # ours all have it

    def forward(self, x: Tensor) -> Tensor:
        """Encode images, [B, C, H, W], into the features of all parts, [B, sum of D_i]."""
        return torch.cat([part(x) for part in self.parts], dim=1)


def _get_network_spec(network: nn.Module) -> InputSpec:
    """Return the normalisation that a network's pretrained weights expect; torchvision's are all ImageNet's."""
    config = getattr(network, "pretrained_cfg", None) or {}
    return InputSpec(tuple(config["mean"]), tuple(config["std"])) if "mean" in config else IMAGENET


def _count_features(network: nn.Module, input_shape: Sequence[int], name: str) -> int:
    """Return how many features one image has: no attribute tells, and it can depend on the image's size."""
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
    check_values(head, wanted, path)
    try:
        network.load_state_dict(head, strict=False)
    except RuntimeError as error:
        raise UsageError(f"{path} does not fit backbone {name!r}: {' '.join(str(error).split())[:160]}") from error
    return network
