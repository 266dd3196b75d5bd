"""ResNet-20 … 110 for 32×32 pictures (He et al. 2015, section 4.2).

Three stages of 16, 32 and 64 channels. Shortcut "A" is the paper's: subsampled, zero-padded, without
parameters (`resnet56`); "B" is a 1×1 convolution with batch norm (`resnet56_b`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from image_classification.models.initialization import initialise
from image_classification.models.layers import Add, Widths, ZeroPadShortcut, residual_width
from image_classification.models.registry import CIFAR, ModelError, register
from image_classification.models.resnet import shortcut as projection

DEPTHS = (20, 32, 44, 56, 110)


class CifarBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut; `downsample` is None where the shape stays."""

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

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C', ⌈H/stride⌉, ⌈W/stride⌉)."""
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        kept = x if self.downsample is None else self.downsample(x)
        return self.relu2(self.add(branch, kept))


class CifarResNet(nn.Module):
    """3×3 stem, three stages of equal depth, global pooling, one linear layer. Any image size."""

    def __init__(self, blocks_per_stage: int, shortcut: str, num_classes: int, widths: Widths) -> None:
        super().__init__()
        if shortcut not in ("A", "B"):
            raise ModelError(
                f"shortcut={shortcut!r}: choose 'A' (zero-padded, no parameters) or 'B' (1×1 convolution)"
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

    def _block(self, name: str, planes: int, shortcut: str | None, widths: Widths) -> CifarBlock:
        in_channels, last = self._stream, f"{name}.conv2"
        downsample: nn.Module | None = None
        if shortcut == "A":
            out_channels = widths.free(last, max(planes, in_channels))
            if out_channels < in_channels:
                raise ModelError(
                    f"widths: {last!r} has {out_channels} channels, but its zero-padded shortcut brings "
                    f"{in_channels} from {self._stream_name!r}: give it at least as many"
                )
            downsample = ZeroPadShortcut(in_channels, out_channels, stride=2)
        else:
            tied_to = f"{name}.downsample.0" if shortcut == "B" else None
            out_channels = residual_width(widths, last, tied_to, planes, in_channels, self._stream_name)
            if shortcut == "B":
                downsample = projection(in_channels, out_channels, stride=2)
        if shortcut is not None:
            self._stream, self._stream_name = out_channels, last
        inner = widths.free(f"{name}.conv1", planes)
        return CifarBlock(in_channels, inner, out_channels, 1 if shortcut is None else 2, downsample)

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, H, W) float, normalised. Returns logits: (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.avgpool(x)))


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
    initialise(model, model_config, last_bns=[m.bn2 for m in model.modules() if isinstance(m, CifarBlock)])
    return model


for _depth in DEPTHS:
    register(f"resnet{_depth}", CIFAR, options=("shortcut",))(partial(build_cifar_resnet, _depth, "A"))
    register(f"resnet{_depth}_b", CIFAR, options=("shortcut",))(partial(build_cifar_resnet, _depth, "B"))
