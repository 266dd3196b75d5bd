"""Networks and images for the tests of attribution methods."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from image_classification.models import capture_structure, create_model


def make_images(count: int, size: int, seed: int = 0) -> Tensor:
    """Return smooth random images, normalised; pure noise would look the same to every layer."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, max(size // 4, 1), max(size // 4, 1), generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return smooth + 0.2 * fine


def randomise(model: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """Randomise scales and shifts of all batch norms, with statistics taken from images; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.2, generator=generator)
    model.train()
    with torch.no_grad():
        model(images)
    return model.eval()


def save_network(path: Path, arch: str = "resnet20", num_classes: int = 12, **options: object) -> str:
    """Write a network with random weights as a checkpoint and return its path."""
    torch.manual_seed(1)
    model = create_model(arch, num_classes=num_classes, **options)  # type: ignore[arg-type]
    content = {
        "format": "lucidprune",
        "version": 1,
        "arch": arch,
        "structure": capture_structure(model).to_plain(),
        "state_dict": model.state_dict(),
    }
    torch.save(content, path)
    return str(path)


class Tiny(nn.Module):
    """Three convolutions, a max pool, a batch norm, a residual sum and two linear layers; small enough for matrices.

    It has typical pitfalls of attribution: in-place ReLU, one ReLU module in two places, a functional sum.
    """

    def __init__(self, *, batch_norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(4, 5, 1)
        self.fc1 = nn.Linear(5 * 9, 6)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.relu(self.conv2(x) + x)
        x = nn.functional.relu(self.conv3(self.pool(x)))
        x = nn.functional.relu(self.fc1(x.flatten(1)), inplace=True)
        return self.fc2(x)
