"""Losses and averages against float64 arithmetic written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from image_classification.config import ConfigError
from image_classification.ema import Ema
from image_classification.losses import LossConfig, MultiLabelLoss, SingleLabelLoss, build_loss


def test_single_label_loss_with_smoothing_against_float64() -> None:
    torch.manual_seed(0)
    logits, targets, epsilon = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 4, 2, 2, 3]), 0.1
    smoothed = torch.full((6, 5), epsilon / 5, dtype=torch.float64)
    smoothed[torch.arange(6), targets] += 1 - epsilon
    expected = -(smoothed * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()
    loss = SingleLabelLoss(epsilon)
    assert loss(logits, targets).item() == pytest.approx(expected.item(), rel=1e-12)
    one_hot = nn.functional.one_hot(targets, 5).double()
    assert loss(logits, one_hot).item() == pytest.approx(expected.item(), rel=1e-12)


def test_single_label_loss_is_float32_under_half_precision() -> None:
    logits = torch.tensor([[10.0, -10.0]], dtype=torch.bfloat16)
    assert SingleLabelLoss()(logits, torch.tensor([1])).dtype == torch.float32


def test_multi_label_loss_against_float64() -> None:
    torch.manual_seed(1)
    logits, targets = torch.randn(4, 3, dtype=torch.float64), torch.randint(0, 2, (4, 3)).double()
    for epsilon in (0.0, 0.2):
        soft = targets * (1 - epsilon) + epsilon / 2
        probability = torch.sigmoid(logits)
        expected = -(soft * probability.log() + (1 - soft) * (1 - probability).log()).mean()
        assert MultiLabelLoss(epsilon)(logits, targets).item() == pytest.approx(expected.item(), rel=1e-12)
    assert MultiLabelLoss()(logits, targets).item() == pytest.approx(
        nn.MultiLabelSoftMarginLoss()(logits, targets).item(), rel=1e-12
    )


def test_build_loss_follows_the_flags() -> None:
    assert isinstance(build_loss(LossConfig(multi_label=True)), MultiLabelLoss)
    assert build_loss(LossConfig(label_smoothing=0.3)).label_smoothing == 0.3
    with pytest.raises(ConfigError, match="--label-smoothing"):
        LossConfig(label_smoothing=1.0)


def test_ema_follows_weights_and_statistics() -> None:
    """With the warm-up of TensorFlow's average: the decay of update n is at most (1 + n) / (10 + n)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ema = Ema(model, decay=0.75)
    expected = {name: value.clone().double() for name, value in model.state_dict().items()}
    for n in range(40):
        decay = min(0.75, (1 + n) / (10 + n))
        model(torch.randn(2, 3, 8, 8))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(model)
        for name, value in model.state_dict().items():
            floating = value.is_floating_point()
            expected[name] = (
                decay * expected[name] + (1 - decay) * value.double() if floating else value.double()
            )
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert ema.num_updates == 40
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())


def test_ema_does_not_change_the_model() -> None:
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    Ema(model, decay=0.9).update(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.weight.requires_grad
