"""Derivatives by gates of ones at the units of channel groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pruning.criteria.sites import Site

# Products g·a are formed in blocks of samples, so that they need little memory.
_GATE_BLOCK_ELEMENTS = 1 << 22


class _GateContext(Protocol):
    """The context of `_Gate` for its backward pass: tensor, gate, and the dimension of the units."""

    saved_tensors: tuple[Tensor, Tensor]
    dim: int

    def save_for_backward(self, tensor: Tensor, gate: Tensor) -> None:
        """Save the tensor and the gate."""


def _real_product(tensor: Tensor, gradient: Tensor) -> Tensor:
    """Return the derivative with respect to a real factor on each element, float32."""
    if tensor.is_complex():
        return (tensor * gradient.conj()).real.float()
    return tensor.float() * gradient.float()


class Gate(torch.autograd.Function):
    """Multiply by a gate of ones without doing so: the tensor goes through, the gate gets its derivative Σ g·a.

    In a backward pass that is itself differentiated (a Grad-CAM map) the gate takes part as the factor that it is.
    """

    @staticmethod
    def forward(ctx: _GateContext, tensor: Tensor, gate: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(tensor, gate)
        ctx.dim = dim
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: _GateContext, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (tensor, gate), gradient = ctx.saved_tensors, gradients[0]
        others = [d for d in range(1, tensor.dim()) if d != ctx.dim]
        if torch.is_grad_enabled():
            product = _real_product(tensor, gradient)
            shape = [s if d in (0, ctx.dim) else 1 for d, s in enumerate(tensor.shape)]
            factor = gate.to(gradient.dtype).reshape(shape)
            return gradient * factor, product.sum(others) if others else product, None
        per_block = max(1, _GATE_BLOCK_ELEMENTS * len(tensor) // max(1, tensor.numel()))
        sums = []
        for a, g in zip(tensor.split(per_block), gradient.split(per_block), strict=True):
            product = _real_product(a, g)
            sums.append(product.sum(others) if others else product)
        return gradient, torch.cat(sums), None


def _per_sample(gradient: Tensor, count: int) -> Tensor:
    """Convert derivatives of rows, (R, C), to derivatives of samples, (N, C).

    Where rows are not a fixed number per sample (regions, anchors), each sample gets an equal share of their sum, which
    is exact for everything linear in the derivatives.
    """
    if len(gradient) % count == 0:
        found: Tensor = gradient.unflatten(0, (count, -1)).sum(1)
        return found
    return (gradient.sum(0, keepdim=True) / count).expand(count, -1)


def differentiate(
    objectives: Sequence[Tensor], gates: list[tuple[Site, Tensor]], count: int, width: int
) -> tuple[Tensor, list[Site]]:
    """Return the derivative of every objective of every sample by every unit's gate, (K, N, width) float32.

    Also returns the sites that the objectives depend on. The other sites say nothing about their units.
    """
    result = torch.zeros(len(objectives), count, width, device=gates[0][1].device)
    reached: dict[int, Site] = {}
    for k, objective in enumerate(objectives):
        if not objective.requires_grad:
            continue
        found = torch.autograd.grad(
            objective,
            [gate for _, gate in gates],
            retain_graph=k + 1 < len(objectives),
            allow_unused=True,
        )
        for (site, _), gradient in zip(gates, found, strict=True):
            if gradient is not None and len(gradient):
                result[k].index_add_(1, site.units, _per_sample(gradient, count))
                reached[id(site)] = site
    return result, list(reached.values())
