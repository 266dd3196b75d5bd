"""Optimizers, who decays, and learning rates as pure functions of the iteration."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from image_classification.config import ConfigError
from image_classification.optim import (
    Lars,
    OptimConfig,
    PlainLars,
    RMSprop,
    build_optimizer,
    parameter_groups,
)
from image_classification.schedules import Schedule, ScheduleConfig


class Odd(nn.Module):
    """Normalisation under a name without 'bn', and a layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.downsample = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.norm = nn.GroupNorm(2, 4)
        self.gamma = nn.Parameter(torch.ones(4))
        self.bn_like_name = nn.Linear(4, 2)


def test_decay_is_decided_by_module_type() -> None:
    model = Odd()
    decayed, rest = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "conv.weight",
        "downsample.0.weight",
        "bn_like_name.weight",
    }
    assert decayed["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_bn_weight_decay_decays_everything() -> None:
    (group,) = parameter_groups(Odd(), 0.1, decay_all=True)
    assert len(group["params"]) == len(list(Odd().parameters()))


@pytest.mark.parametrize(
    ("config", "kind", "expected"),
    [
        (OptimConfig(momentum=0.8, nesterov=True), torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        (
            OptimConfig(optimizer="rmsprop", rmsprop_alpha=0.7),
            RMSprop,
            {"alpha": 0.7, "eps": 1e-3},
        ),
        (
            OptimConfig(optimizer="adamw", optimizer_eps=1e-5),
            torch.optim.AdamW,
            {"betas": (0.9, 0.999), "eps": 1e-5},
        ),
    ],
)
def test_every_optimizer_gets_its_settings(
    config: OptimConfig, kind: type, expected: dict[str, object]
) -> None:
    optimizer = build_optimizer(config, Odd(), lr=0.25)
    assert type(optimizer) is kind
    for key, value in expected.items():
        assert optimizer.param_groups[0][key] == value
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(("name", "kind"), [("apex-sgd", torch.optim.SGD), ("apex-adam", torch.optim.AdamW)])
def test_rules_of_apex_are_those_that_torch_has_taken_over(name: str, kind: type) -> None:
    model = Odd()
    optimizer = build_optimizer(OptimConfig(optimizer=name), model, lr=0.1)
    assert type(optimizer) is kind
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # apex's own takes no argument
    saved = optimizer.state_dict()
    again = build_optimizer(OptimConfig(optimizer=name), Odd(), lr=0.1)
    again.load_state_dict(saved)
    assert again.state_dict()["state"].keys() == saved["state"].keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, "--momentum"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"clip_grad_norm": 0.0}, "--clip-grad-norm"),
        ({"optimizer": "adamw", "nesterov": True}, "--nesterov"),
        ({"nesterov": True, "momentum": 0.0}, "--nesterov"),
        ({"rmsprop_alpha": 1.0}, "--rmsprop-alpha"),
        ({"optimizer_eps": 0.0}, "--optimizer-eps"),
    ],
)
def test_bad_optimizer_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**settings)


def schedule(name: str, epochs: int = 10, steps: int = 7, **settings: object) -> Schedule:
    return Schedule(ScheduleConfig(lr=0.8, lr_schedule=name, **settings), steps, epochs)


def test_warmup_is_linear_per_iteration_and_reaches_the_rate() -> None:
    course = schedule("constant", warmup=2)
    rates = [course.lr_at(i) for i in range(20)]
    assert rates[:14] == pytest.approx([0.8 * (i + 1) / 14 for i in range(14)])
    assert set(rates[14:]) == {0.8}


def test_curves_against_closed_forms() -> None:
    cosine = schedule("cosine", warmup=1, end_lr=0.1)
    linear = schedule("linear", end_lr=0.2)
    exponential = schedule("exponential", lr_exponential_factor=0.01)
    step = schedule("step", lr_step_epochs=[2.0, 4.0], lr_step_factor=0.5)
    for i in range(70):
        if i >= 7:
            expected = 0.1 + 0.7 * 0.5 * (1 + math.cos(math.pi * (i - 7) / 63))
            assert cosine.lr_at(i) == pytest.approx(expected)
        assert linear.lr_at(i) == pytest.approx(0.2 + 0.6 * (1 - i / 70))
        assert exponential.lr_at(i) == pytest.approx(0.8 * 0.01 ** (i / 70))
        assert step.lr_at(i) == pytest.approx(0.8 * 0.5 ** ((i >= 14) + (i >= 28)))


def test_apply_sets_every_group_with_factor() -> None:
    optimizer = build_optimizer(OptimConfig(), Odd(), lr=9.0)
    assert schedule("constant").apply(optimizer, 0, factor=0.5) == 0.4
    assert {group["lr"] for group in optimizer.param_groups} == {0.4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "--lr"),
        ({"warmup": -1.0}, "--warmup"),
        ({"end_lr": -0.9}, "--end-lr"),
        ({"lr_step_factor": 0.0}, "--lr-step-factor"),
        ({"lr_exponential_factor": 2.0}, "--lr-exponential-factor"),
    ],
)
def test_bad_schedules(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**{"lr": 0.8, **settings})


def test_default_rate_grows_with_the_step() -> None:
    assert Schedule(ScheduleConfig(), 10, 1, images_per_step=64).lr == pytest.approx(0.025)
    assert Schedule(ScheduleConfig(), 10, 1, images_per_step=1024).lr == pytest.approx(0.4)
    with pytest.raises(ConfigError, match="--end-lr"):
        Schedule(ScheduleConfig(end_lr=0.5), 10, 1, images_per_step=64)


def test_warmup_longer_than_training() -> None:
    with pytest.raises(ConfigError, match="--epochs 10"):
        schedule("cosine", warmup=10)


def test_lars_is_the_published_rule() -> None:
    """Two steps against the formula in float64; vectors and tensors of zeros take plain steps."""
    torch.manual_seed(0)
    layer, empty = nn.Linear(4, 3), nn.Parameter(torch.zeros(2, 2))
    groups = [
        {"params": [layer.weight], "weight_decay": 0.1},
        {"params": [layer.bias, empty], "weight_decay": 0.0},
    ]
    optimizer = Lars(groups, lr=0.5, momentum=0.9, trust=0.02)
    expected = [p.detach().double().clone() for p in (layer.weight, layer.bias, empty)]
    velocity = [torch.zeros_like(p) for p in expected]
    for _ in range(2):
        gradients = [torch.randn(p.shape) for p in expected]
        for index, (parameter, gradient) in enumerate(
            zip((layer.weight, layer.bias, empty), gradients, strict=True)
        ):
            parameter.grad = gradient.clone()
            weight, decay = expected[index], 0.1 if index == 0 else 0.0
            share = 1.0
            if weight.dim() > 1 and weight.norm() > 0:
                share = 0.02 * weight.norm() / (gradient.double().norm() + decay * weight.norm())
            velocity[index] = 0.9 * velocity[index] + 0.5 * share * (gradient.double() + decay * weight)
            expected[index] = weight - velocity[index]
        optimizer.step()
    for parameter, value in zip((layer.weight, layer.bias, empty), expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-5, atol=1e-7)


def test_lars_is_chosen_by_its_flag() -> None:
    optimizer = build_optimizer(OptimConfig(optimizer="lars", lars_trust=0.01), Odd(), 1.0)
    assert isinstance(optimizer, Lars)
    assert {group["trust"] for group in optimizer.param_groups} == {0.01}


def scaled_steps(optimizer: torch.optim.Optimizer, model: nn.Module, clip: bool) -> list[float]:
    """Five steps under a scaler, the first and the fourth of which overflow; the scale after each."""
    torch.manual_seed(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scales = []
    for number in range(5):
        loss = model(torch.randn(6, 4)).square().sum() * (float("inf") if number in (0, 3) else 1.0)
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (RMSprop, torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.9, "eps": 1e-3}),
        (Lars, PlainLars, {"lr": 0.1, "momentum": 0.9, "trust": 0.02}),
    ],
)
def test_overflowing_updates_are_left_out_without_asking(
    monkeypatch: pytest.MonkeyPatch, ours: Any, theirs: Any, settings: dict[str, Any], clip: bool
) -> None:
    """As PyTorch's scaler leaves them out, which asks the host in every step."""
    results = []
    for kind in (theirs, ours):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        optimizer = kind(model.parameters(), **settings)
        if kind is ours:
            asked = MagicMock(side_effect=AssertionError("the host was asked"))
            monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", asked)
        scales = scaled_steps(optimizer, model, clip)
        kept = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        results.append((scales, [*model.parameters(), *kept]))
    (scales, expected), (our_scales, found) = results
    assert our_scales == scales == [32.0, 32.0, 32.0, 16.0, 16.0]
    assert len(found) == len(expected) > 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0 if clip else 1e-6, atol=0 if clip else 1e-7)
