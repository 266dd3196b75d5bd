"""MobileNetV2 (Sandler et al. 2018) for ImageNet and for 32×32 images. Parameter names are torchvision's.

The CIFAR variant keeps the channels and drops two strides (stem and second stage), so that 32×32 images end in a 4×4
map. The ISP program uses a different variant, `mobilenetv2_isp.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from image_classification.models.initialization import initialise
from image_classification.models.layers import Add, Widths
from image_classification.models.registry import CIFAR, IMAGENET, register

# Expansion, output channels, number of blocks, stride of the first block (table 2 of the paper).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def conv_bn_relu6(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Build a convolution without bias, batch norm and ReLU6."""
    padding = (kernel_size - 1) // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """1×1 expansion (unless `hidden` is None), 3×3 depthwise, 1×1 projection; `residual` adds the input."""

    def __init__(
        self, in_channels: int, hidden: int | None, out_channels: int, stride: int, residual: bool
    ) -> None:
        super().__init__()
        width = in_channels if hidden is None else hidden
        self.conv = nn.Sequential()
        if hidden is not None:
            self.conv.append(conv_bn_relu6(in_channels, hidden, 1))
        self.conv.append(conv_bn_relu6(width, width, 3, stride, groups=width))
        self.conv.append(nn.Conv2d(width, out_channels, 1, bias=False))
        self.conv.append(nn.BatchNorm2d(out_channels))
        self.add = Add() if residual else None

    @property
    def last_bn(self) -> nn.Module:
        """The batch norm before the sum."""
        return self.conv[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H/stride, W/stride)."""
        branch: Tensor = self.conv(x)
        return branch if self.add is None else self.add(branch, x)


class MobileNetV2(nn.Module):
    """Stem, 17 inverted residual blocks, 1×1 convolution, global pooling, dropout and a linear layer."""

    def __init__(self, small_images: bool, num_classes: int, widths: Widths) -> None:
        super().__init__()
        channels = widths.free("features.0.0", 32)
        stream_name = "features.0.0"
        self.features = nn.Sequential(conv_bn_relu6(3, channels, 3, 1 if small_images else 2))
        for stage, (expansion, planes, depth, first_stride) in enumerate(STAGES):
            for index in range(depth):
                name = f"features.{len(self.features)}.conv"
                stride = first_stride if index == 0 and not (small_images and stage == 1) else 1
                hidden = _hidden_width(name, expansion, planes_in(stage, index), widths)
                last = f"{name}.{1 if hidden is None else 2}"
                if hidden is None:
                    widths.tied(f"{name}.0.0", channels, stream_name)
                if index == 0:
                    out_channels = widths.free(last, planes)
                    stream_name = last
                else:
                    out_channels = widths.tied(last, channels, stream_name)
                self.features.append(InvertedResidual(channels, hidden, out_channels, stride, index > 0))
                channels = out_channels
        head = widths.free(f"features.{len(self.features)}.0", 1280)
        self.features.append(conv_bn_relu6(channels, head, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(head, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (N, num_classes) for images (N, 3, H, W) float, normalised."""
        logits: Tensor = self.classifier(self.flatten(self.avgpool(self.features(images))))
        return logits


def planes_in(stage: int, index: int) -> int:
    """Return the input channels of a block in the unpruned architecture, to which its expansion refers."""
    if index > 0:
        return STAGES[stage][1]
    return STAGES[stage - 1][1] if stage > 0 else 32


def _hidden_width(name: str, expansion: int, planes_in: int, widths: Widths) -> int | None:
    """Return the width between expansion and projection; None for a block without expansion."""
    if expansion == 1:
        return None
    hidden = widths.free(f"{name}.0.0", planes_in * expansion)
    return widths.tied(f"{name}.1.0", hidden, f"{name}.0.0")


def build_mobilenetv2(
    small_images: bool, *, num_classes: int, model_config: str | None, widths: Mapping[str, int] | None = None
) -> MobileNetV2:
    """Build and initialise a MobileNetV2; arguments as in `create_model`."""
    chosen = Widths(widths)
    model = MobileNetV2(small_images, num_classes, chosen)
    chosen.check_all_used()
    blocks = [m for m in model.modules() if isinstance(m, InvertedResidual) and m.add is not None]
    initialise(model, model_config, last_bns=[block.last_bn for block in blocks], linear_std=0.01)
    return model


register("mobilenet_v2", IMAGENET)(partial(build_mobilenetv2, False))
register("mobilenet_v2_cifar", CIFAR)(partial(build_mobilenetv2, True))
