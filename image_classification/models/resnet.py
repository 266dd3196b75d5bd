"""ResNet-18 … 152 (He et al. 2015) and ResNeXt (Xie et al. 2017) for ImageNet.

Version 1.5: in a bottleneck block the 3×3 convolution carries the stride, as in torchvision and NVIDIA's
DeepLearningExamples. Parameter names are torchvision's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from image_classification.models.initialization import initialise
from image_classification.models.layers import Add, Widths, residual_width
from image_classification.models.registry import IMAGENET, register


@dataclasses.dataclass(frozen=True)
class ResNetSpec:
    """Sizes of one member of the family.

    `group_width` is the number of channels per group of the 3×3 convolutions in the first stage.
    """

    depths: tuple[int, int, int, int]
    bottleneck: bool
    groups: int = 1
    group_width: int = 64


SPECS = {
    "resnet18": ResNetSpec((2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNetSpec((3, 4, 6, 3), bottleneck=False),
    "resnet50": ResNetSpec((3, 4, 6, 3), bottleneck=True),
    "resnet101": ResNetSpec((3, 4, 23, 3), bottleneck=True),
    "resnet152": ResNetSpec((3, 8, 36, 3), bottleneck=True),
    "resnext50_32x4d": ResNetSpec((3, 4, 6, 3), bottleneck=True, groups=32, group_width=4),
    "resnext101_32x4d": ResNetSpec((3, 4, 23, 3), bottleneck=True, groups=32, group_width=4),
    "resnext101_32x8d": ResNetSpec((3, 4, 23, 3), bottleneck=True, groups=32, group_width=8),
}


def shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Build the 1×1 convolution and batch norm on the shortcut of a block that changes the shape."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut; `downsample` is None if the shape stays."""

    def __init__(
        self, in_channels: int, inner: int, out_channels: int, stride: int, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = downsample
        self.add = Add()
        self.relu2 = nn.ReLU()

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The batch norm before the sum."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', ⌈H/stride⌉, ⌈W/stride⌉)."""
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        kept = x if self.downsample is None else self.downsample(x)
        merged: Tensor = self.relu2(self.add(branch, kept))
        return merged


class Bottleneck(nn.Module):
    """1×1, (grouped, strided) 3×3 and 1×1 convolutions around a shortcut."""

    def __init__(
        self,
        in_channels: int,
        inner: tuple[int, int],
        out_channels: int,
        stride: int,
        groups: int,
        project: bool,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner[0], 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner[0])
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner[0], inner[1], 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner[1])
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner[1], out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride) if project else None
        self.add = Add()
        self.relu3 = nn.ReLU()

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        """The batch norm before the sum."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H/stride, W/stride)."""
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.relu2(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        kept = x if self.downsample is None else self.downsample(x)
        merged: Tensor = self.relu3(self.add(branch, kept))
        return merged


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, global pooling, one linear layer. Any image size."""

    def __init__(self, spec: ResNetSpec, num_classes: int, widths: Widths) -> None:
        super().__init__()
        self._stream, self._stream_name = widths.free("conv1", 64), "conv1"
        self.conv1 = nn.Conv2d(3, self._stream, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(self._stream)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(spec, 0, widths)
        self.layer2 = self._stage(spec, 1, widths)
        self.layer3 = self._stage(spec, 2, widths)
        self.layer4 = self._stage(spec, 3, widths)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(self._stream, num_classes)
        del self._stream, self._stream_name  # only the construction needs them

    def _stage(self, spec: ResNetSpec, stage: int, widths: Widths) -> nn.Sequential:
        blocks = nn.Sequential()
        for index in range(spec.depths[stage]):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(
                self._block(spec, f"layer{stage + 1}.{index}", 64 << stage, stride, index == 0, widths)
            )
        return blocks

    def _block(
        self, spec: ResNetSpec, name: str, planes: int, stride: int, first: bool, widths: Widths
    ) -> nn.Module:
        default = planes * (4 if spec.bottleneck else 1)
        project = first and (stride > 1 or spec.bottleneck)
        last = f"{name}.conv3" if spec.bottleneck else f"{name}.conv2"
        out_channels = residual_width(
            widths,
            last,
            f"{name}.downsample.0" if project else None,
            default,
            self._stream,
            self._stream_name,
        )
        in_channels, self._stream = self._stream, out_channels
        if project:
            self._stream_name = last
        if not spec.bottleneck:
            downsample = shortcut(in_channels, out_channels, stride) if project else None
            inner = widths.free(f"{name}.conv1", planes)
            return BasicBlock(in_channels, inner, out_channels, stride, downsample)
        inner = planes * spec.group_width * spec.groups // 64
        inner1 = widths.free(f"{name}.conv1", inner, spec.groups)
        inner2 = widths.free(f"{name}.conv2", inner, spec.groups)
        return Bottleneck(in_channels, (inner1, inner2), out_channels, stride, spec.groups, project)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (N, num_classes) for images (N, 3, H, W) float, normalised."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.flatten(self.avgpool(x)))
        return logits


def build_resnet(
    spec: ResNetSpec, *, num_classes: int, model_config: str | None, widths: Mapping[str, int] | None = None
) -> ResNet:
    """Build and initialise a ResNet; arguments as in `create_model`."""
    chosen = Widths(widths)
    model = ResNet(spec, num_classes, chosen)
    chosen.check_all_used()
    blocks = [module for module in model.modules() if isinstance(module, (BasicBlock, Bottleneck))]
    initialise(model, model_config, last_bns=[block.last_bn for block in blocks])
    return model


for _name, _spec in SPECS.items():
    register(_name, IMAGENET)(partial(build_resnet, _spec))
