"""Featurizers by input size, and the classifier on top.

The order in which layers are made is part of the contract: with one seed, DomainBed and this host draw one network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from daft_domainbed.errors import UsageError


class FeaturizerModule(nn.Module):
    """A network without head: inputs [B, ...] to features [B, n_outputs]."""

    n_outputs: int


class MLP(FeaturizerModule):
    """`mlp_depth` linear layers for inputs without an image's shape."""

    def __init__(self, n_inputs: int, n_outputs: int, hparams: dict[str, Any]) -> None:
        super().__init__()
        width = hparams["mlp_width"]
        self.input = nn.Linear(n_inputs, width)
        self.dropout = nn.Dropout(hparams["mlp_dropout"])
        self.hiddens = nn.ModuleList(nn.Linear(width, width) for _ in range(hparams["mlp_depth"] - 2))
        self.output = nn.Linear(width, n_outputs)
        self.n_outputs = n_outputs

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        for layer in (self.input, *self.hiddens):
            x = F.relu(self.dropout(layer(x)))
        return self.output(x)


class MNIST_CNN(FeaturizerModule):
    """Four convolutions with group norm, for 28 x 28 images."""

    n_outputs = 128

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(128, 128, 3, padding=1)
        self.conv4 = nn.Conv2d(128, 128, 3, padding=1)
        self.bn0 = nn.GroupNorm(8, 64)
        self.bn1 = nn.GroupNorm(8, 128)
        self.bn2 = nn.GroupNorm(8, 128)
        self.bn3 = nn.GroupNorm(8, 128)
        self.avgpool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        convolutions = (self.conv1, self.conv2, self.conv3, self.conv4)
        norms = (self.bn0, self.bn1, self.bn2, self.bn3)
        for convolution, norm in zip(convolutions, norms, strict=True):
            x = norm(F.relu(convolution(x)))
        return self.avgpool(x).flatten(1)


class WideBlock(nn.Module):
    """A pre-activation residual block of two 3 x 3 convolutions with biases; the second one strides."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(n_in)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, stride=stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_in != n_out:
            self.shortcut.append(nn.Conv2d(n_in, n_out, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)


class Wide_ResNet(FeaturizerModule):
    """WRN-16-2 (Zagoruyko & Komodakis, 2016) without head, for 32 x 32 images."""

    n_outputs = 128

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], 16, 3, padding=1)
        self.layer1 = nn.Sequential(WideBlock(16, 32, 1), WideBlock(32, 32, 1))
        self.layer2 = nn.Sequential(WideBlock(32, 64, 2), WideBlock(64, 64, 1))
        self.layer3 = nn.Sequential(WideBlock(64, 128, 2), WideBlock(128, 128, 1))
        self.bn1 = nn.BatchNorm2d(128, momentum=0.9)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return F.avg_pool2d(F.relu(self.bn1(out)), 8).flatten(1)


class ResNet(FeaturizerModule):
    """ImageNet-pretrained ResNet (He et al., 2016) without head, for 224 x 224 images.

    `resnet50_augmix` decides before `resnet18`, as in DomainBed. `freeze_bn` keeps batch norm in eval mode for ever.

    Raises:
        UsageError: timm is missing, or the weights can be neither found nor downloaded.
    """

    def __init__(self, input_shape: tuple[int, ...], hparams: dict[str, Any]) -> None:
        super().__init__()
        name = "resnet18" if hparams["resnet18"] else "resnet50"
        build = getattr(torchvision.models, name)
        if hparams["resnet50_augmix"]:
            build()  # DomainBed makes both networks: the random state must move as far
            self.network = build_augmix_resnet50()
        else:
            weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
            self.network = load_pretrained(lambda: build(weights=weights), weights.url)
        self.n_outputs = self.network.fc.in_features
        self.network.fc = nn.Identity()
        channels = input_shape[0]
        if channels != 3:
            rgb = self.network.conv1.weight.data
            self.network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
            self.network.conv1.weight.data.copy_(rgb[:, [i % 3 for i in range(channels)]])
        self.freezes_bn = hparams["freeze_bn"]
        self.dropout = nn.Dropout(hparams["resnet_dropout"])
        self.train()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.dropout(self.network(x))

    def train(self, mode: bool = True) -> ResNet:
        """Set the mode of all layers but frozen batch norm."""
        super().train(mode)
        if self.freezes_bn:
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


def build_augmix_resnet50() -> Any:
    """Build timm's ResNet-50 trained with AugMix; a file in torch's checkpoint folder is preferred to a download."""
    try:
        import timm
    except ImportError:
        hint = "`pip install timm`, or set the hyperparameter to false for torchvision's weights"
        raise UsageError(f"hyperparameter resnet50_augmix needs timm: {hint}") from None
    name = "resnet50.ram_in1k"
    url = str(timm.models.get_pretrained_cfg_value(name, "url"))
    file = locate_checkpoint(url)
    overlay = {"file": str(file)} if file.exists() else {}
    return load_pretrained(lambda: timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay), url)


def locate_checkpoint(url: str) -> Path:
    """Return where torch keeps a downloaded file: `$TORCH_HOME/hub/checkpoints/<name>`."""
    return Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])


def load_pretrained(build: Callable[[], Any], url: str) -> Any:
    """Return `build()`, a network whose weights come from `url`.

    Raises:
        UsageError: they cannot be had; it names the file and where to put it.
    """
    try:
        return build()
    except Exception as error:  # each download library has errors of its own
        file = locate_checkpoint(url)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"cannot load pretrained weights ({reason}): put {file.name} from {url} into {file.parent} "
            "(TORCH_HOME moves that folder)"
        ) from error


def Featurizer(input_shape: tuple[int, ...], hparams: dict[str, Any]) -> FeaturizerModule:
    """Return the featurizer that DomainBed chooses for an input of (channels, height, width), or (features,).

    Raises:
        UsageError: it has none for this input, or only upstream has it.
    """
    size = tuple(input_shape[1:])
    if not size:
        return MLP(input_shape[0], hparams["mlp_width"], hparams)
    if size == (28, 28):
        return MNIST_CNN(input_shape)
    if size == (32, 32):
        return Wide_ResNet(input_shape)
    if size != (224, 224):
        raise UsageError(
            f"no default network for input {tuple(input_shape)}: 28, 32 and 224 pixels have one; name a backbone"
        )
    if hparams["vit"]:
        raise UsageError("hyperparameters vit and dinov2 are not in the embedded host: use `--host upstream`")
    return ResNet(input_shape, hparams)


def Classifier(in_features: int, out_features: int, is_nonlinear: bool = False) -> nn.Module:
    """Return a linear head, or three layers that halve the features twice."""
    if not is_nonlinear:
        return nn.Linear(in_features, out_features)
    half, quarter = in_features // 2, in_features // 4
    return nn.Sequential(
        nn.Linear(in_features, half), nn.ReLU(), nn.Linear(half, quarter), nn.ReLU(), nn.Linear(quarter, out_features)
    )
