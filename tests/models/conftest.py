"""Helpers for the tests of networks: narrowing by hand, cost, and files."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def keep_outputs(layer: nn.Module, num_kept: int) -> None:
    """Leave the first `num_kept` outputs of a convolution, linear layer or batch norm, in place."""
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(layer, name, None)
        if tensor is not None:
            tensor.data = tensor.data[:num_kept].clone()
    for name in ("out_channels", "out_features", "num_features"):
        if hasattr(layer, name):
            setattr(layer, name, num_kept)


def keep_inputs(layer: nn.Module, num_kept: int) -> None:
    """Leave the first `num_kept` inputs of an ungrouped convolution or linear layer, in place."""
    layer.weight.data = layer.weight.data[:, :num_kept].clone()
    setattr(layer, "in_channels" if hasattr(layer, "in_channels") else "in_features", num_kept)


@pytest.fixture
def narrow() -> Callable[..., None]:
    """`narrow(num_kept, producers, consumers)`: cut the channels between layers, by hand."""

    def apply(num_kept: int, producers: list[nn.Module], consumers: list[nn.Module]) -> None:
        for layer in producers:
            keep_outputs(layer, num_kept)
        for layer in consumers:
            keep_inputs(layer, num_kept)

    return apply


@pytest.fixture
def measure() -> Callable[[nn.Module, int], tuple[int, int]]:
    """Number of parameters and of multiply-accumulates of a network on the meta device."""

    def cost(model: nn.Module, image_size: int) -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
        return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2

    return cost


@pytest.fixture
def randomise_bn() -> Callable[[nn.Module], nn.Module]:
    """Give every batch norm statistics and scales that matter."""

    def apply(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0.0, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.1)
        return model

    return apply
