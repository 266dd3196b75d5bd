"""A network of seven convolutions that learns small images within minutes, after K. Jordan's airbench (2024).

[94% on CIFAR-10 in 3.29 seconds on a single GPU](https://arxiv.org/abs/2404.00498): the first layer whitens patches of
2 × 2 pixels with fixed weights, the other layers begin as identities of their first inputs, and wide channels keep the
processor busy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from image_classification.models import create_model

QUICK = "quick"
"""Name of the architecture in benchmarks."""
_PATCHES = 5000
_WIDTHS = (64, 256, 256)
_TEMPERATURE = 9.0
"""Keeps the classes close in the first steps, when the learning rate is high."""


class Block(nn.Module):
    """Two 3 × 3 convolutions, with a pooling by two after the first.

    Args:
        inputs: Channels of the input.
        width: Channels of both convolutions.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.act = nn.GELU()
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight.data[: conv.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        """Compute features (N, width, H/2, W/2) of (N, inputs, H, W)."""
        x = self.act(self.norm1(self.pool(self.conv1(x))))
        return self.act(self.norm2(self.conv2(x)))


class QuickNetwork(nn.Module):
    """The network. Call `whiten` before training.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.whitening = nn.Conv2d(3, 24, 2)
        self.act = nn.GELU()
        inputs = (24, *_WIDTHS)
        self.blocks = nn.Sequential(*map(Block, inputs, _WIDTHS))
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(_WIDTHS[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (N, num_classes) of images (N, 3, H, W)."""
        x = self.blocks(self.act(self.whitening(images)))
        logits: Tensor = self.fc(self.flatten(self.pool(x))) / _TEMPERATURE
        return logits

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Set the first layer's weights to the patches' principal directions over their deviations, with both signs."""
        patches = nn.functional.unfold(images[:_PATCHES].float(), 2).transpose(1, 2).flatten(0, 1)
        variances, directions = torch.linalg.eigh(patches.T.cov().double())
        whitening = (directions / (variances + 5e-4).sqrt()).T.float().reshape(12, 3, 2, 2)
        self.whitening.weight.copy_(torch.cat([whitening, -whitening]))
        self.whitening.weight.requires_grad_(False)


def make_network(arch: str, images: Tensor, num_classes: int) -> nn.Module:
    """Create an untrained network: the quick one, or any of `create_model`.

    Args:
        arch: Its name.
        images: Normalised training images (N, 3, H, W).
        num_classes: Number of classes.
    """
    if arch != QUICK:
        return create_model(arch, num_classes=num_classes)
    model = QuickNetwork(num_classes)
    model.whiten(images)
    return model
