"""MobileNetV2 for 32×32 images as in the ISP program (Ganjdanesh et al. 2022), with its parameter names.

It differs from `mobilenet_v2_cifar` in the size of the final map (8×8 for 32×32 images: stem and the first three stages
keep the size), in ReLU instead of ReLU6, in an expansion of factor 1 in the first block, and in a projected shortcut
(1×1 convolution and batch norm) wherever the size stays and the width changes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from image_classification.models.initialization import initialise
from image_classification.models.layers import Add, Widths, residual_width
from image_classification.models.mobilenetv2 import STAGES, planes_in
from image_classification.models.registry import CIFAR, register
from image_classification.models.resnet import shortcut as projection

#: Stages of `STAGES` whose first block halves the size.
_HALVING = (3, 5)


class IspInvertedResidual(nn.Module):
    """1×1 expansion, 3×3 depthwise, 1×1 projection; a block that keeps the size adds its input."""

    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, stride: int, shortcut: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut
        self.add = Add() if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H/stride, W/stride)."""
        branch: Tensor = self.relu1(self.bn1(self.conv1(x)))
        branch = self.relu2(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        if self.add is None:
            return branch
        merged: Tensor = self.add(branch, x if self.shortcut is None else self.shortcut(x))
        return merged


class IspMobileNetV2(nn.Module):
    """Stem, 17 inverted residual blocks, 1×1 convolution, global pooling, a linear layer. Any image size."""

    def __init__(self, num_classes: int, widths: Widths) -> None:
        super().__init__()
        self._stream, self._stream_name = widths.free("conv1", 32), "conv1"
        self.conv1 = nn.Conv2d(3, self._stream, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(self._stream)
        self.relu1 = nn.ReLU()
        self.layers = nn.Sequential()
        for stage, (_, _, depth, _) in enumerate(STAGES):
            for index in range(depth):
                self.layers.append(self._block(stage, index, widths))
        head = widths.free("conv2", 1280)
        self.conv2 = nn.Conv2d(self._stream, head, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(head)
        self.relu2 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(head, num_classes)
        del self._stream, self._stream_name  # only the construction needs them

    def _block(self, stage: int, index: int, widths: Widths) -> IspInvertedResidual:
        expansion, planes = STAGES[stage][:2]
        name = f"layers.{len(self.layers)}"
        before = planes_in(stage, index)
        stride = 2 if index == 0 and stage in _HALVING else 1
        hidden = widths.free(f"{name}.conv1", expansion * before)
        widths.tied(f"{name}.conv2", hidden, f"{name}.conv1")
        in_channels = self._stream
        last = f"{name}.conv3"
        project = stride == 1 and before != planes
        if stride == 2:
            out_channels = widths.free(last, planes)
        else:
            tied_to = f"{name}.shortcut.0" if project else None
            out_channels = residual_width(widths, last, tied_to, planes, in_channels, self._stream_name)
        if project or stride == 2:
            self._stream_name = last
        self._stream = out_channels
        shortcut = projection(in_channels, out_channels, 1) if project else None
        return IspInvertedResidual(in_channels, hidden, out_channels, stride, shortcut)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (N, num_classes) for images (N, 3, H, W) float, normalised."""
        x = self.layers(self.relu1(self.bn1(self.conv1(images))))
        x = self.relu2(self.bn2(self.conv2(x)))
        logits: Tensor = self.linear(self.flatten(self.avgpool(x)))
        return logits


@register("mobilenet_v2_cifar_isp", CIFAR)
def build_isp_mobilenetv2(
    *, num_classes: int, model_config: str | None, widths: Mapping[str, int] | None = None
) -> IspMobileNetV2:
    """Build and initialise the network; arguments as in `create_model`."""
    chosen = Widths(widths)
    model = IspMobileNetV2(num_classes, chosen)
    chosen.check_all_used()
    blocks = [m for m in model.modules() if isinstance(m, IspInvertedResidual) and m.add is not None]
    initialise(model, model_config, last_bns=[block.bn3 for block in blocks], linear_std=0.01)
    return model
