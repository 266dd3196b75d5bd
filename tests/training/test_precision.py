"""AMP, loss scaling and memory format do what their flags say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from image_classification.config import ConfigError
from image_classification.precision import Precision, PrecisionConfig

CPU = torch.device("cpu")


def test_amp_on_cpu_is_bf16_and_says_so() -> None:
    precision = Precision(PrecisionConfig(amp=True), CPU)
    assert precision.amp_dtype is torch.bfloat16
    assert any("bf16" in note for note in precision.notes)
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype is torch.bfloat16
    with Precision(PrecisionConfig(), CPU).autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype is torch.float32


def test_explicit_type_wins() -> None:
    assert Precision(PrecisionConfig(amp=True, amp_dtype="fp16"), CPU).amp_dtype is torch.float16


def train_step(precision: Precision, gradient: float, clip: float | None = None) -> tuple[float, float]:
    """One SGD step (lr 1) on a weight of 1 with the given gradient; returns the weight and the loss scale."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision.backward((weight * gradient).sum())
    precision.step(optimizer, [weight], clip)
    return weight.item(), precision.scale


def test_static_scale_leaves_the_update_alone_and_never_moves() -> None:
    precision = Precision(PrecisionConfig(amp=True, static_loss_scale=128.0), CPU)
    assert train_step(precision, 0.25) == (0.75, 128.0)
    assert train_step(precision, float("inf")) == (1.0, 128.0)  # overflow: the step is left out


def test_dynamic_scale_backs_off_after_an_overflow() -> None:
    precision = Precision(PrecisionConfig(amp=True, dynamic_loss_scale=True), CPU)
    before = precision.scale
    weight, after = train_step(precision, float("inf"))
    assert weight == 1.0
    assert after == before / 2


def test_clipping_sees_unscaled_gradients() -> None:
    for config in (PrecisionConfig(), PrecisionConfig(amp=True, static_loss_scale=128.0)):
        weight, _ = train_step(Precision(config, CPU), 4.0, clip=0.5)
        assert weight == pytest.approx(0.5, abs=1e-4)


def test_scaler_state_round_trip() -> None:
    precision = Precision(PrecisionConfig(amp=True, dynamic_loss_scale=True), CPU)
    train_step(precision, float("inf"))
    other = Precision(PrecisionConfig(amp=True, dynamic_loss_scale=True), CPU)
    other.load_state_dict(precision.state_dict())
    assert other.scale == precision.scale


def test_memory_format_is_applied() -> None:
    model = Precision(PrecisionConfig(memory_format="nhwc"), CPU).place(nn.Conv2d(3, 8, 3))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)


def test_compile_flag_compiles() -> None:
    model = nn.Linear(2, 2)
    assert Precision(PrecisionConfig(), CPU).compiled(model) is model
    assert Precision(PrecisionConfig(compile=True), CPU).compiled(model) is not model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"static_loss_scale": 128.0}, "--amp"),
        ({"amp_dtype": "bf16"}, "--amp"),
        ({"amp": True, "static_loss_scale": 1.0, "dynamic_loss_scale": True}, "--dynamic-loss-scale"),
        ({"amp": True, "static_loss_scale": 0.0}, "--static-loss-scale"),
        ({"compile_mode": "max-autotune"}, "--compile"),
    ],
)
def test_bad_precision(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrecisionConfig(**settings)
