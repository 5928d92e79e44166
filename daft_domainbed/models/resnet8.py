"""A small residual network for small images, of any width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        in_channels: Channels of the images.
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
