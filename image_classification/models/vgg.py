"""VGG-11 … 19 with batch norm (Simonyan & Zisserman 2014), in three layouts and four widths.

- `vgg16_bn`: ImageNet, parameter names of torchvision (`features.N`, `classifier.0/3/6`).
- `vgg16_bn_voc`: 7×7 map, dropout and one linear layer (`classifier.1`): the network of the attribution
  preservation experiments on Pascal VOC (seed paper: Park et al. 2020), whose files it reads.
- `vgg16_bn_cifar`: 32×32 images, global pooling and one linear layer.

The suffixes `_x2`, `_x4` and `_x8` divide all widths, for the students of distillation.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from image_classification.models.initialization import initialise
from image_classification.models.layers import Widths
from image_classification.models.registry import CIFAR, IMAGENET, ArchInfo, register

# Number of convolutions in each of the five stages; a 2×2 max-pool ends each.
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
PLANES = (64, 128, 256, 512, 512)
# Pixels and statistics of the VOC experiments of the attribution-preservation paper.
VOC = ArchInfo(227, 227, (0.4589, 0.4355, 0.4032), (0.2239, 0.2186, 0.2206), geometry="whole")
INFOS = {"imagenet": IMAGENET, "voc": VOC, "cifar": CIFAR}


def make_features(depth: int, divisor: int, widths: Widths) -> tuple[nn.Sequential, int]:
    """Build the convolutional part (convolution, batch norm, ReLU; a pool after each stage); return it and its
    width.
    """
    features = nn.Sequential()
    channels = 3
    for stage, planes in zip(STAGES[depth], PLANES, strict=True):
        for _ in range(stage):
            width = widths.free(f"features.{len(features)}", planes // divisor)
            features.append(nn.Conv2d(channels, width, 3, padding=1))
            features.append(nn.BatchNorm2d(width))
            features.append(nn.ReLU())
            channels = width
        features.append(nn.MaxPool2d(2, 2))
    return features, channels


def make_classifier(layout: str, channels: int, divisor: int, num_classes: int, widths: Widths) -> nn.Module:
    """Build the classifier of a layout, for `channels` feature maps."""
    if layout == "cifar":
        return nn.Linear(channels, num_classes)
    if layout == "voc":
        return nn.Sequential(nn.Dropout(0.5), nn.Linear(channels * 49, num_classes))
    hidden0 = widths.free("classifier.0", 4096 // divisor)
    hidden1 = widths.free("classifier.3", 4096 // divisor)
    return nn.Sequential(
        nn.Linear(channels * 49, hidden0),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(hidden0, hidden1),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(hidden1, num_classes),
    )


class VGG(nn.Module):
    """Plain stack of 3×3 convolutions. Any image size of at least 32 pixels."""

    def __init__(self, depth: int, layout: str, divisor: int, num_classes: int, widths: Widths) -> None:
        super().__init__()
        self.features, channels = make_features(depth, divisor, widths)
        self.avgpool = nn.AdaptiveAvgPool2d(1 if layout == "cifar" else 7)
        self.flatten = nn.Flatten()
        self.classifier = make_classifier(layout, channels, divisor, num_classes, widths)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (N, num_classes) for images (N, 3, H, W) float, normalised."""
        logits: Tensor = self.classifier(self.flatten(self.avgpool(self.features(images))))
        return logits


def build_vgg(
    depth: int,
    layout: str,
    divisor: int,
    *,
    num_classes: int,
    model_config: str | None,
    widths: Mapping[str, int] | None = None,
) -> VGG:
    """Build and initialise a VGG; arguments as in `create_model`."""
    chosen = Widths(widths)
    model = VGG(depth, layout, divisor, num_classes, chosen)
    chosen.check_all_used()
    initialise(model, model_config, linear_std=0.01)
    return model


for _depth in STAGES:
    for _layout, _info in INFOS.items():
        for _divisor in (1, 2, 4, 8):
            _name = f"vgg{_depth}_bn"
            _name += "" if _layout == "imagenet" else f"_{_layout}"
            _name += "" if _divisor == 1 else f"_x{_divisor}"
            register(_name, _info, min_image_size=32)(partial(build_vgg, _depth, _layout, _divisor))
