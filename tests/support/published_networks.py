"""The networks of the five published systems as in their programs: names, shapes and forward passes.

Written for the tests from the description of the files and of the methods; the package does not use them. Batch norms
get distinguishable statistics and scales, so that a swapped tensor shows in the logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: SHA-256 of the sorted "name shape" lines of the published files' tensors.
PUBLISHED_DIGESTS: dict[str, str] = {
    "casm_resnet50": "a81ab450eff687d08e83512e55100f962312522980b5501ddf5a009955a26496",
    "di_resnet50": "93e0ebd3c670a87e26ffc595047bbdb7194ec8961499cca96ec7cd861d9be291",
    "isp_cifar_mobilenetv2_selector": "c7a27c6da77208e78051ea384f8858871904ff0fb790a6e1e17ad54adf28c336",
    "isp_cifar_resnet56_blackbox": "6e02ab52816ca9d2f771243df38bc0097b04b6c66de8a02a63835a8387410927",
    "isp_cifar_resnet56_selector_rbf": "93af4e243d1faf3f3b4c83f3348b5e97a90772c63e9b8b31c79e6d7ea6fd46ec",
    "isp_cifar_resnet56_selector_realx": "6355969284525111c9def141e6de3acf8847ef5be931b17409389f6dea81ba77",
    "isp_imagenet_mobilenetv2": "613d3223916bacd6df7224a66a4be5e51a1acee42afc0fa7b782378174d9892c",
    "isp_imagenet_resnet34": "6e7440a9bdce893cb8913fba0b593f6353e7ecf62c0e8acae1ac8732357d698c",
    "isp_imagenet_resnet50": "6d630992ab4428fe471436fcfe63129f1cd0439c9158612a0ab05aa6ec838887",
    "swa_vgg16_voc": "a7331b03b6c7be8fdfc894f345605a01887caaf94a60c330eb0851f594b37d8f",
    "swa_vgg16_voc_x8": "90d1e65ecd31f14e5e3ac599cd9d59142706662caa161996e7084d84393f3d5a",
}


def names_digest(state: Mapping[str, Tensor]) -> str:
    """Return a digest of the names and shapes of a state dict."""
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Set weights and statistics that differ from channel to channel; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.rand(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif tensor.dim() > 1:
                tensor.copy_((noise - 0.5) * (6 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(noise - 0.5 if "bias" in name or "mean" in name else 0.5 + noise)
    return model.eval()


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Create a convolution that keeps the size, without bias."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)


class Block(nn.Module):
    """Residual block, with 2 or 3 convolutions; `shortcut` names the projection, None averages and pads with zeros."""

    def __init__(
        self, width_in: int, planes: int, stride: int, bottleneck: bool, shortcut: str | None = "downsample"
    ):
        super().__init__()
        out = planes * 4 if bottleneck else planes
        self.bottleneck, self.stride, self.extra = bottleneck, stride, out - width_in
        self.conv1 = conv(width_in, planes, 1 if bottleneck else 3, 1 if bottleneck else stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv(planes, planes, 3, stride if bottleneck else 1)
        self.bn2 = nn.BatchNorm2d(planes)
        if bottleneck:
            self.conv3 = conv(planes, out, 1)
            self.bn3 = nn.BatchNorm2d(out)
        self.shortcut_name = shortcut if stride > 1 or out != width_in else None
        if self.shortcut_name:
            setattr(
                self,
                self.shortcut_name,
                nn.Sequential(nn.Conv2d(width_in, out, 1, stride, bias=False), nn.BatchNorm2d(out)),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.bottleneck:
            y = self.bn3(self.conv3(F.relu(y)))
        if self.shortcut_name:
            x = getattr(self, self.shortcut_name)(x)
        elif self.extra:
            x = F.avg_pool2d(x, 2)
            x = torch.cat([x, x.new_zeros(len(x), self.extra, *x.shape[2:])], 1)
        return F.relu(x + y)


class PhotoResNet(nn.Module):
    """ResNet for ImageNet; returns logits, or with `scales` also the maps that decoders read."""

    def __init__(
        self, depths: tuple[int, ...] = (3, 4, 6, 3), bottleneck: bool = True, num_classes: int | None = 1000
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        width = 64
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(Block(width, 64 << stage, stride, bottleneck))
                width = (64 << stage) * (4 if bottleneck else 1)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        if num_classes is not None:
            self.fc = nn.Linear(width, num_classes)

    def scales(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        maps = [x]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(stage(maps[-1]))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.scales(x)[-1].mean((2, 3)))


class SmallResNet(nn.Module):
    """ResNet-(6n+2) for 32×32 images."""

    def __init__(
        self, n: int = 9, shortcut: str | None = None, num_classes: int | None = 10, head: str = "fc"
    ):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16, 3), nn.BatchNorm2d(16)
        width = 16
        for stage in range(3):
            blocks = []
            for index in range(n):
                blocks.append(Block(width, 16 << stage, 2 if stage and not index else 1, False, shortcut))
                width = 16 << stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.head = head
        if num_classes is not None:
            setattr(self, head, nn.Linear(width, num_classes))

    def scales(self, x: Tensor) -> list[Tensor]:
        maps = [self.layer1(F.relu(self.bn1(self.conv1(x))))]
        maps.append(self.layer2(maps[-1]))
        maps.append(self.layer3(maps[-1]))
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.head)(self.scales(x)[-1].mean((2, 3)))


class Inverted(nn.Module):
    """Inverted residual in one list; position 3 was a gate."""

    def __init__(self, width_in: int, out: int, stride: int, expansion: int):
        super().__init__()
        hidden = width_in * expansion
        self.residual = stride == 1 and width_in == out
        depthwise = [conv(hidden, hidden, 3, stride, hidden), nn.BatchNorm2d(hidden), nn.ReLU6()]
        project = [conv(hidden, out, 1), nn.BatchNorm2d(out)]
        expand = [conv(width_in, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6(), nn.Identity()]
        self.conv = nn.Sequential(*(expand if expansion > 1 else []), *depthwise, *project)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class IspMobileNet(nn.Module):
    """MobileNetV2 for ImageNet with the ISP program's names."""

    def __init__(self, num_classes: int | None = 1000):
        super().__init__()
        stem = nn.Sequential(conv(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU6())
        blocks, width = [stem], 32
        plan = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2))
        for expansion, out, depth, stride in (*plan, (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)):
            for index in range(depth):
                blocks.append(Inverted(width, out, stride if not index else 1, expansion))
                width = out
        self.features = nn.Sequential(*blocks)
        self.conv = nn.Sequential(conv(320, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6())
        if num_classes is not None:
            self.classifier = nn.Linear(1280, num_classes)

    def scales(self, x: Tensor) -> list[Tensor]:
        maps = {}
        for index, block in enumerate(self.features):
            x = block(x)
            maps[index] = x
        return [maps[3], maps[6], maps[13], self.conv(x)]

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.scales(x)[-1].mean((2, 3)))


class SmallInverted(nn.Module):
    """Inverted residual of the CIFAR program: ReLU, always expanded, projected where the width changes."""

    def __init__(self, width_in: int, out: int, stride: int, expansion: int):
        super().__init__()
        hidden, self.stride = width_in * expansion, stride
        self.conv1, self.bn1 = conv(width_in, hidden, 1), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = conv(hidden, hidden, 3, stride, hidden), nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = conv(hidden, out, 1), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride == 1 and width_in != out:
            self.shortcut = nn.Sequential(conv(width_in, out, 1), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return y if self.stride > 1 else y + self.shortcut(x)


class SmallMobileNet(nn.Module):
    """MobileNetV2 of the CIFAR program: 32×32 images end in 8×8 maps."""

    def __init__(self, num_classes: int | None = 10):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 32, 3), nn.BatchNorm2d(32)
        blocks, width = [], 32
        plan = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 1), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2))
        for expansion, out, depth, stride in (*plan, (6, 320, 1, 1)):
            for index in range(depth):
                blocks.append(SmallInverted(width, out, 1 if index else stride, expansion))
                width = out
        self.layers = nn.Sequential(*blocks)
        self.conv2, self.bn2 = conv(320, 1280, 1), nn.BatchNorm2d(1280)
        if num_classes is not None:
            self.linear = nn.Linear(1280, num_classes)

    def scales(self, x: Tensor) -> list[Tensor]:
        maps = [F.relu(self.bn1(self.conv1(x)))]
        for block in self.layers:
            maps.append(block(maps[-1]))
        return [maps[6], maps[13], F.relu(self.bn2(self.conv2(maps[-1])))]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.scales(x)[-1].mean((2, 3)))


class VocVgg(nn.Module):
    """VGG-16-BN with dropout and one linear layer on a 7×7 map."""

    def __init__(self, widths: tuple[int, ...], num_classes: int = 20):
        super().__init__()
        layers: list[nn.Module] = []
        width_in, position = 3, iter(widths)
        for count in (2, 2, 3, 3, 3):
            for _ in range(count):
                width = next(position)
                layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(True)]
                width_in = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(width_in * 49, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


VGG16 = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


class SaliencyDecoder(nn.Module):
    """CASM's decoder."""

    def __init__(self, stages: tuple[int, ...] = (256, 512, 1024, 2048), base: int = 64):
        super().__init__()
        for index, channels in enumerate(stages, 1):
            reduce = nn.Sequential(nn.Conv2d(channels, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
            setattr(self, f"conv1x1_{index}", reduce)
        self.final = nn.Sequential(nn.Conv2d(base + 64 * len(stages), 1, 3, padding=1), nn.Sigmoid())

    def forward(self, maps: list[Tensor]) -> Tensor:
        base = maps[0]
        reduced = [getattr(self, f"conv1x1_{index}")(stage) for index, stage in enumerate(maps[1:], 1)]
        large = [F.interpolate(r, size=base.shape[2:], mode="bilinear", align_corners=False) for r in reduced]
        return F.interpolate(self.final(torch.cat([base, *large], 1)), scale_factor=4.0, mode="nearest")


class FollowUp(nn.Module):
    """Basic residual block of the selector's decoder."""

    def __init__(self, width_in: int, out: int):
        super().__init__()
        self.conv1, self.bn1 = conv(width_in, out, 3), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv(out, out, 3), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(conv(width_in, out, 1), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class UpLayer(nn.Module):
    """Sub-pixel up-sampling, concatenation, residual block."""

    def __init__(self, deep: int, shallow: int):
        super().__init__()
        expand = nn.Sequential(conv(deep, 4 * shallow, 3), nn.BatchNorm2d(4 * shallow), nn.ReLU())
        self.upsampler = nn.Sequential(expand, nn.PixelShuffle(2), nn.ReLU())
        self.follow_up = FollowUp(2 * shallow, shallow)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        return self.follow_up(torch.cat([self.upsampler(x), side], 1))


class IspSelector(nn.Module):
    """Encoder under `encoder_name`, decoder, class embedding, head of 3 numbers or of 2 maps."""

    def __init__(
        self, encoder_name: str, encoder: nn.Module, widths: tuple[int, ...], classes: int, kernel: int
    ):
        super().__init__()
        self.encoder_name = encoder_name
        setattr(self, encoder_name, encoder)
        self.deepest = len(widths)
        for level in range(len(widths), 1, -1):
            setattr(self, f"uplayer{level}", UpLayer(widths[level - 1], widths[level - 2]))
        self.embedding = nn.Embedding(classes, widths[-1])
        if kernel > 1:
            self.saliency_chans = nn.Conv2d(widths[0], 3, kernel)
        else:
            self.saliency_chans = nn.Conv2d(widths[0], 2, 1, bias=False)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        maps = getattr(self, self.encoder_name).scales(images)[-self.deepest :]
        x = maps[-1]
        gate = torch.sigmoid(torch.einsum("nchw,nc->nhw", x, self.embedding(classes)))
        x = x * gate[:, None]
        for level in range(self.deepest, 1, -1):
            x = getattr(self, f"uplayer{level}")(x, maps[level - 2])
        return self.saliency_chans(x)


ENCODER_WIDTHS = {
    "resnet56": (16, 32, 64),
    "resnet34": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
    "mobilenet_v2": (24, 32, 96, 1280),
    "mobilenet_v2_cifar": (32, 96, 1280),
}


def network(name: str, num_classes: int | None) -> nn.Module:
    """Create an ISP program's classifier (or encoder, without classes) by LucidPrune's name."""
    if name == "resnet56":
        return SmallResNet(num_classes=num_classes)
    if name.startswith("mobilenet"):
        return (SmallMobileNet if name.endswith("cifar") else IspMobileNet)(num_classes)
    return PhotoResNet(bottleneck=name == "resnet50", num_classes=num_classes)


def selector(name: str, encoder_name: str, num_classes: int, kernel: int) -> IspSelector:
    """Create an ISP program's selector; a kernel of 1 makes it REAL-X."""
    return IspSelector(encoder_name, network(name, None), ENCODER_WIDTHS[name], num_classes, kernel)


def prefixed(**parts: nn.Module) -> dict[str, Tensor]:
    """Merge state dicts under prefixes; `__` in a keyword stands for a dot."""
    return {
        f"{prefix.replace('__', '.')}.{name}": tensor
        for prefix, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def published(kind: str) -> dict[str, Tensor]:
    """Return the state dict of a published kind, matching PUBLISHED_DIGESTS."""
    if kind == "di_resnet50":
        return prefixed(module=PhotoResNet())
    if kind == "casm_resnet50":
        return prefixed(state_dict_classifier=PhotoResNet(), state_dict_decoder=SaliencyDecoder())
    if kind.startswith("swa"):
        return prefixed(module=VocVgg(tuple(width // (8 if kind.endswith("x8") else 1) for width in VGG16)))
    if kind == "isp_cifar_mobilenetv2_selector":
        name = "mobilenet_v2_cifar"
        parts = selector(name, "resnet", 10, 32), network(name, 10)
        return prefixed(selector=parts[0], bb_model__model=parts[1])
    if kind == "isp_cifar_resnet56_blackbox":
        return prefixed(model=network("resnet56", 10))
    if kind == "isp_cifar_resnet56_selector_realx":
        return prefixed(selector=selector("resnet56", "resnet", 10, 1))
    if kind == "isp_cifar_resnet56_selector_rbf":
        return prefixed(
            selector=selector("resnet56", "resnet", 10, 32),
            bb_model__model=network("resnet56", 10),
            predictor__resnet=network("resnet56", 10),
        )
    name = {"mobilenetv2": "mobilenet_v2"}.get(kind.rpartition("_")[2], kind.rpartition("_")[2])
    return prefixed(selector=selector(name, "encoder", 1000, 56), predictor__model=network(name, 1000))
