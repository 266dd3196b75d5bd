"""Integrated gradients: the folded copy says what the network says, points go in batches, signs and smoothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn.utils import prune, weight_norm

from explainers import IntegratedGradients
from explainers.attribution.integrated_gradients import folded_copy, show
from image_classification.config import SettingError
from image_classification.models import arch_info, create_model, remember_input
from tests.support.explained import make_images, randomise


def reference(model: nn.Module, images: Tensor, targets: Tensor, steps: int) -> Tensor:
    """(B, C, H, W) attributions, point by point on the network itself."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    integral = torch.zeros_like(images)
    for node, weight in zip(nodes, weights, strict=True):
        x = (images * (node + 1) / 2).requires_grad_()
        chosen = model(x).gather(1, targets[:, None]).sum()
        integral += weight / 2 * torch.autograd.grad(chosen, x)[0]
    return images * integral


def batch_norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("arch", "size"), [("resnet20", 32), ("mobilenet_v2_cifar", 32), ("timm/mobilenetv3_small_050", 64)]
)
def test_attributions_on_the_folded_copy_are_those_of_the_network(arch: str, size: int) -> None:
    # float64: rounding alone turns some ReLUs over, and gradients jump there
    torch.manual_seed(0)
    model = randomise(create_model(arch, num_classes=10), make_images(8, size)).double()
    images, targets = make_images(3, size, seed=4).double(), torch.tensor([1, 7, 2])
    prepared = IntegratedGradients(steps=7).prepare(model, torch.zeros_like(images))
    assert batch_norms(model) > 0
    assert batch_norms(prepared.model) == 0
    expected = reference(model, images, targets, 7)
    found = prepared(images, targets)
    torch.testing.assert_close(found.arrived, expected.sum((1, 2, 3)).float())
    assert (found.map - expected.sum(1)).abs().max() < 1e-6 * expected.sum(1).abs().max()


class Small(nn.Module):
    """A convolution, a batch norm and a head; what comes between them can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.passes = 0

    def features(self, images: Tensor) -> Tensor:
        return self.bn(self.conv(images))

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        return self.fc(self.features(images).relu().mean((2, 3)))


class TwoNames(Small):
    """The batch norm has two names, and the second one is called."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.bn

    def features(self, images: Tensor) -> Tensor:
        return self.again(self.conv(images))


class ThroughAView(Small):
    """Cannot be followed: a part is overwritten in place."""

    def features(self, images: Tensor) -> Tensor:
        x = self.bn(self.conv(images))
        x[:, :1] *= 2
        return x


def hooked() -> nn.Module:
    model = Small()
    model.bn.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return model


def masked() -> nn.Module:
    model = Small()
    prune.random_unstructured(model.conv, "weight", amount=0.5)
    return model


def normalised() -> nn.Module:
    model = Small()
    weight_norm(model.conv)
    model.conv.weight = model.conv.weight.detach()  # a tensor with history cannot be copied
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("build", [TwoNames, ThroughAView, hooked, masked, normalised])
def test_where_folding_would_be_wrong_the_plain_copy_serves(build) -> None:
    torch.manual_seed(0)
    model = build()
    if build is masked:
        model.conv.weight = model.conv.weight.detach()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    model.double().eval()
    images, targets = make_images(2, 8).double(), torch.tensor([0, 2])
    prepared = IntegratedGradients(steps=5).prepare(model, images)
    assert batch_norms(prepared.model) == 1
    expected = reference(model, images, targets, 5).sum(1)
    torch.testing.assert_close(prepared(images, targets).map, expected.detach().float())


def test_the_folded_copy_is_frozen_and_the_model_is_not_touched() -> None:
    model = Small().train()
    folded = folded_copy(model, make_images(1, 8))
    assert batch_norms(folded) == 0
    assert not folded.training
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert model.training
    assert model.passes == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("count", "passes"), [(1, 1), (2, 2), (5, 4), (16, 12), (20, 12)])
def test_small_batches_go_with_several_points_at_once(count: int, passes: int) -> None:
    model = Small().eval()
    prepared = IntegratedGradients(steps=12).prepare(model, make_images(1, 8))
    prepared.model.passes = 0
    prepared(make_images(count, 8), torch.zeros(count, dtype=torch.int64))
    assert prepared.model.passes == 1 + passes  # one for the logits and the baseline's


def test_no_images_give_no_maps() -> None:
    prepared = IntegratedGradients(steps=2).prepare(Small().eval(), make_images(1, 8))
    result = prepared(make_images(1, 8)[:0], torch.zeros(0, dtype=torch.int64))
    assert result.map.shape == (0, 8, 8)


@pytest.mark.parametrize("smooth", [0.0, 0.02, 0.06])
@pytest.mark.parametrize("sign", ["all", "positive", "absolute"])
def test_signs_and_smoothing(sign: str, smooth: float) -> None:
    values = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0))
    found, signed = show(values, sign, smooth)
    part = {"all": values, "positive": values.clamp(min=0), "absolute": values.abs()}[sign].numpy()
    sigma = smooth * 40
    expected = gaussian_filter(
        part, (0, sigma, sigma), mode="mirror", radius=[0, *[int(np.ceil(4 * sigma))] * 2]
    )
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert signed == (sign == "all")
    assert signed or (found >= 0).all()


def test_settings_change_the_map_and_not_the_account() -> None:
    torch.manual_seed(0)
    model, images, targets = Small().eval(), make_images(3, 12), torch.tensor([0, 1, 2])
    plain = IntegratedGradients(steps=4).prepare(model, images)(images, targets)
    for settings in ({"sign": "positive"}, {"sign": "absolute"}, {"smooth": 0.1}):
        other = IntegratedGradients(steps=4, **settings).prepare(model, images)(images, targets)
        assert not torch.allclose(other.map, plain.map)
        torch.testing.assert_close(other.arrived, plain.arrived)
        torch.testing.assert_close(other.started, plain.started)
    black = IntegratedGradients(steps=4, baseline=-1.0).prepare(model, images)(images, targets)
    assert not torch.allclose(black.started, plain.started)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="sign='negative'"):
        IntegratedGradients(sign="negative")
    for smooth in (-0.1, 0.2, float("nan")):
        with pytest.raises(ValueError, match=f"smooth={smooth}"):
            IntegratedGradients(smooth=smooth)


def test_a_network_without_a_list_of_logits_is_named() -> None:
    class Flat(Small):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)[:, 0]

    with pytest.raises(ValueError, match=r"\(1,\)"):
        IntegratedGradients(steps=2).prepare(Flat().eval(), make_images(1, 8))


def test_the_integral_can_start_from_black() -> None:
    model = create_model("resnet20", num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(SettingError, match="start"):
        IntegratedGradients(start="black").prepare(model, images)
    remember_input(model, arch_info("resnet20").network_input)
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in (arch_info("resnet20").mean, arch_info("resnet20").std)
    )
    black = (torch.zeros(2, 3, 32, 32) - mean) / std
    found = IntegratedGradients(start="black", steps=64).prepare(model, images)(images, torch.tensor([0, 1]))
    with torch.no_grad():
        difference = (model(images) - model(black))[[0, 1], [0, 1]]
    torch.testing.assert_close(found.started, difference, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.arrived, difference, rtol=0.1, atol=0.1)
