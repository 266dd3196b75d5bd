"""ResNet-20 … 110 for 32×32 images (He et al. 2015, section 4.2).

Three stages of 16, 32 and 64 channels. Shortcut "A" is the paper's: subsampled, zero-padded, without parameters
(`resnet56`); "B" is a 1×1 convolution with batch norm (`resnet56_b`). "pooled" is the shortcut of the ISP program
(Ganjdanesh et al. 2022; `resnet56_isp`), which averages 2 × 2 pixels and appends all zeros at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from image_classification.models.initialization import initialise
from image_classification.models.layers import PooledShortcut, Widths, ZeroPadShortcut, residual_width
from image_classification.models.registry import CIFAR, ModelError, register
from image_classification.models.resnet import BasicBlock
from image_classification.models.resnet import shortcut as projection

DEPTHS = (20, 32, 44, 56, 110)


class CifarResNet(nn.Module):
    """3×3 stem, three stages of equal depth, global pooling, one linear layer. Any image size."""

    def __init__(self, blocks_per_stage: int, shortcut: str, num_classes: int, widths: Widths) -> None:
        super().__init__()
        if shortcut not in ("A", "B", "pooled"):
            raise ModelError(
                f"shortcut={shortcut!r}: choose 'A' (subsampled, zero-padded), 'pooled' (averaged, zero-padded) or 'B' "
                "(1×1 convolution)"
            )
        self._stream, self._stream_name = widths.free("conv1", 16), "conv1"
        self.conv1 = nn.Conv2d(3, self._stream, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(self._stream)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(0, blocks_per_stage, shortcut, widths)
        self.layer2 = self._stage(1, blocks_per_stage, shortcut, widths)
        self.layer3 = self._stage(2, blocks_per_stage, shortcut, widths)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(self._stream, num_classes)
        del self._stream, self._stream_name  # only the construction needs them

    def _stage(self, stage: int, depth: int, shortcut: str, widths: Widths) -> nn.Sequential:
        blocks = nn.Sequential()
        for index in range(depth):
            changes = stage > 0 and index == 0
            name = f"layer{stage + 1}.{index}"
            blocks.append(self._block(name, 16 << stage, shortcut if changes else None, widths))
        return blocks

    def _block(self, name: str, planes: int, shortcut: str | None, widths: Widths) -> BasicBlock:
        in_channels = self._stream
        last = f"{name}.conv2"
        downsample: nn.Module | None = None
        if shortcut in ("A", "pooled"):
            out_channels = widths.free(last, max(planes, in_channels))
            if out_channels < in_channels:
                raise ModelError(
                    f"widths: {last!r} has {out_channels} channels, but its zero-padded shortcut brings "
                    f"{in_channels} from {self._stream_name!r}: give it at least as many"
                )
            if shortcut == "A":
                downsample = ZeroPadShortcut(in_channels, out_channels, stride=2)
            else:
                downsample = PooledShortcut(in_channels, out_channels)
        else:
            tied_to = f"{name}.downsample.0" if shortcut == "B" else None
            out_channels = residual_width(widths, last, tied_to, planes, in_channels, self._stream_name)
            if shortcut == "B":
                downsample = projection(in_channels, out_channels, stride=2)
        if shortcut is not None:
            self._stream = out_channels
            self._stream_name = last
        inner = widths.free(f"{name}.conv1", planes)
        return BasicBlock(in_channels, inner, out_channels, 1 if shortcut is None else 2, downsample)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (N, num_classes) for images (N, 3, H, W) float, normalised."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.flatten(self.avgpool(x)))
        return logits


def build_cifar_resnet(
    depth: int,
    default_shortcut: str,
    *,
    num_classes: int,
    model_config: str | None,
    widths: Mapping[str, int] | None = None,
    shortcut: str | None = None,
) -> CifarResNet:
    """Build and initialise a CIFAR ResNet of `depth` = 6n + 2 layers; see `create_model`."""
    chosen = Widths(widths)
    model = CifarResNet((depth - 2) // 6, shortcut or default_shortcut, num_classes, chosen)
    chosen.check_all_used()
    initialise(model, model_config, last_bns=[m.bn2 for m in model.modules() if isinstance(m, BasicBlock)])
    return model


for _depth in DEPTHS:
    for _ending, _shortcut in (("", "A"), ("_b", "B"), ("_isp", "pooled")):
        _register = register(f"resnet{_depth}{_ending}", CIFAR, options=("shortcut",))
        _register(partial(build_cifar_resnet, _depth, _shortcut))
