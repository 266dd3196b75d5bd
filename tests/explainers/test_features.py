"""Feature taps: found by structure in many families, the same after pruning, never overwritten, never left behind."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from explainers.differentiable.features import FeatureTaps, find_taps
from image_classification.config import SettingError
from image_classification.models import create_model

#: Architecture, image size, expected (channels, side) per scale, shallow to deep.
FAMILIES = [
    ("resnet20", 32, [(16, 32), (32, 16), (64, 8)]),
    ("resnet50", 64, [(64, 32), (256, 16), (512, 8), (1024, 4), (2048, 2)]),
    ("mobilenet_v2", 64, [(16, 32), (24, 16), (32, 8), (96, 4), (1280, 2)]),
    ("vgg11_bn_cifar", 32, [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)]),
    ("torchvision/resnet18", 64, [(64, 32), (64, 16), (128, 8), (256, 4), (512, 2)]),
    ("torchvision/densenet121", 64, [(64, 32), (256, 16), (512, 8), (1024, 4), (1024, 2)]),
    ("torchvision/efficientnet_b0", 64, [(16, 32), (24, 16), (40, 8), (112, 4), (1280, 2)]),
    ("torchvision/shufflenet_v2_x0_5", 64, [(24, 32), (24, 16), (48, 8), (96, 4), (1024, 2)]),
    ("torchvision/mobilenet_v3_small", 64, [(16, 32), (16, 16), (24, 8), (48, 4), (576, 2)]),
    ("torchvision/regnet_x_400mf", 64, [(32, 32), (32, 16), (64, 8), (160, 4), (400, 2)]),
    ("torchvision/convnext_tiny", 64, [(96, 16), (192, 8), (384, 4), (768, 2)]),
    ("torchvision/inception_v3", 112, [(64, 53), (192, 24), (288, 11), (768, 5), (2048, 2)]),
    ("torchvision/googlenet", 64, [(64, 32), (192, 16), (480, 8), (832, 4), (1024, 2)]),
    ("timm/ghostnet_100", 64, [(16, 32), (24, 16), (40, 8), (112, 4), (960, 2)]),
    ("timm/dla34", 64, [(16, 64), (32, 32), (64, 16), (128, 8), (256, 4), (512, 2)]),
    ("timm/cspresnet50", 64, None),
    ("timm/repvgg_a0", 64, [(48, 32), (48, 16), (96, 8), (192, 4), (1280, 2)]),
    ("timm/poolformer_s12", 64, [(64, 16), (128, 8), (320, 4), (512, 2)]),
    ("timm/nf_resnet50", 64, [(64, 32), (256, 16), (512, 8), (1024, 4), (2048, 2)]),
]


def build(arch: str, **options: object) -> nn.Module:
    if arch.startswith("timm/"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    return create_model(arch, num_classes=10, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("arch", "size", "expected"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_taps_are_the_last_maps_of_every_scale(
    arch: str, size: int, expected: list[tuple[int, int]] | None
) -> None:
    model = build(arch)
    model.train()
    taps = find_taps(model, torch.randn(2, 3, size, size))
    assert all(module.training for module in model.modules())
    with FeatureTaps(model.eval(), taps) as caught, torch.no_grad():
        model(torch.randn(1, 3, size, size))
        shapes = [(feature.shape[1], feature.shape[2]) for feature in caught.features]
    if expected is not None:
        assert shapes == expected
    sides = [side for _, side in shapes]
    assert len(sides) >= 4 or arch == "resnet20"
    assert all(large >= 1.5 * small for large, small in itertools.pairwise(sides))
    assert find_taps(model, torch.randn(1, 3, size, size), 2) == taps[-2:]


def test_pruned_networks_have_the_same_taps() -> None:
    images = torch.randn(1, 3, 32, 32)
    whole = build("resnet20")
    pruned = build("resnet20", widths={"layer1.0.conv1": 3, "layer2.1.conv1": 9, "layer3.0.conv1": 20})
    assert find_taps(whole, images) == find_taps(pruned, images)
    images = torch.randn(1, 3, 64, 64)
    whole = build("mobilenet_v2")
    widths = {"features.18.0": 700, "features.2.conv.0.0": 50}
    assert find_taps(whole, images) == find_taps(build("mobilenet_v2", widths=widths), images)


def test_images_that_are_too_small_are_refused() -> None:
    model = build("torchvision/resnet18")
    # A ConfigError, which nobody puts another flag's name in front of.
    with pytest.raises(SettingError, match=r"^image_size=32: .*`num_scales`"):
        find_taps(model, torch.randn(1, 3, 32, 32), 5)
    with pytest.raises(ValueError, match="image_size=2:"):
        find_taps(build("resnet20"), torch.randn(1, 3, 2, 2))


class InPlace(nn.Module):
    """A convolution whose output an in-place ReLU overwrites."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu_(self.conv1(images))
        return self.fc(torch.relu_(self.conv2(x)).mean((2, 3)))


def test_what_is_caught_is_not_overwritten_and_the_network_computes_the_same() -> None:
    torch.manual_seed(0)
    model, images = InPlace(), torch.randn(2, 3, 8, 8)
    plain = model(images)
    with FeatureTaps(model, ("conv1", "conv2")) as caught:
        tapped = model(images)
        first, second = caught.features
    torch.testing.assert_close(tapped, plain)
    torch.testing.assert_close(first, model.conv1(images))
    assert first.min() < 0
    assert second.shape == (2, 6, 4, 4)


def test_gradients_flow_through_caught_maps() -> None:
    model, images = InPlace(), torch.randn(2, 3, 8, 8)
    with FeatureTaps(model, ("conv2",)) as caught:
        model(images)
        (feature,) = caught.features
    (gradient,) = torch.autograd.grad(feature.square().sum(), model.conv1.weight)
    assert gradient.abs().sum() > 0


def test_hooks_are_gone_after_an_exception() -> None:
    model = InPlace()
    with pytest.raises(RuntimeError), FeatureTaps(model, ("conv1",)):
        model(torch.randn(1, 5, 8, 8))
    assert not model.conv1._forward_hooks


def test_features_need_a_forward_pass() -> None:
    with FeatureTaps(InPlace(), ("conv1",)) as caught, pytest.raises(RuntimeError, match="run"):
        _ = caught.features


def test_removed_channels_come_back_as_zeros() -> None:
    torch.manual_seed(0)
    model, images = InPlace(), torch.randn(2, 3, 8, 8)
    kept = torch.tensor([3, 0])  # a rewrite may reorder channels
    narrow = InPlace()
    narrow.conv1 = nn.Conv2d(3, 2, 3, padding=1)
    narrow.conv2 = nn.Conv2d(2, 6, 3, stride=2, padding=1)
    with torch.no_grad():
        narrow.conv1.weight.copy_(model.conv1.weight[kept])
        narrow.conv1.bias.copy_(model.conv1.bias[kept])
    with FeatureTaps(narrow, ("conv1", "conv2"), {"conv1": kept}, {"conv1": 4, "conv2": 6}) as caught:
        narrow(images)
        first, second = caught.features
    expected = model.conv1(images).detach().clone()
    expected[:, [1, 2]] = 0
    torch.testing.assert_close(first, expected)
    assert second.shape[1] == 6


@pytest.mark.parametrize(
    ("kept", "widths", "message"),
    [
        ({"conv9": [0]}, {"conv9": 4}, "'conv9'"),
        ({"conv1": [0, 1]}, {}, "'conv1'.*widths"),
        ({"conv1": [0, 0]}, {"conv1": 4}, "'conv1'.*distinct"),
        ({"conv1": [0, 4]}, {"conv1": 4}, r"'conv1'.*\b4\b"),
    ],
)
def test_wrong_records_of_kept_channels_are_refused(
    kept: dict[str, list[int]], widths: dict[str, int], message: str
) -> None:
    positions = {name: torch.tensor(channels) for name, channels in kept.items()}
    with pytest.raises(ValueError, match=message):
        FeatureTaps(InPlace(), ("conv1",), positions, widths)


def test_kept_channels_of_another_network_are_refused() -> None:
    model = InPlace()
    with FeatureTaps(model, ("conv1",), {"conv1": torch.tensor([0, 1])}, {"conv1": 4}) as caught:
        model(torch.randn(1, 3, 8, 8))
        with pytest.raises(ValueError, match="4 channels"):
            _ = caught.features


def test_a_tap_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="'conv3'"):
        FeatureTaps(InPlace(), ("conv3",))
