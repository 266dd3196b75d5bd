"""Weights that a layer computes from other tensors: weight norms and spectral norms, either generation.

The divisor of such a layer depends on slices that a cut removes. After the cut, gains (weight norm) and vectors
(spectral norm) are set so that the weight in evaluation is the slice of the old weight:

    weight norm     w = g · v / ‖v‖      g becomes the norm of the kept part of w
    spectral norm   w = W / (uᵀ W v)     u, v become singular vectors of the kept part of W, v scaled to keep uᵀWv

In training mode a spectral norm makes the largest singular value 1 again, as is its purpose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from image_classification.models.module_tree import named_modules
from pruning.engine.slices import Cuts, sliced_like

_POWER_ITERATIONS = 15


@dataclasses.dataclass(frozen=True)
class SpectralNorm:
    """Qualified names of a spectral norm's tensors, and the dimension of the weight that makes the matrix's rows."""

    weight: str
    u: str
    v: str
    dim: int


def renormalised(
    model: nn.Module, tensors: Mapping[str, Tensor], cuts: Mapping[str, Cuts]
) -> dict[str, Tensor]:
    """Compute smaller gains and vectors so that the kept weights do not change.

    Args:
        model: The network whose layers compute their weights.
        tensors: The current values by qualified name; the model's own or those of an average.
        cuts: The indices that stay, by tensor.
    """
    found = weight_norm_gains(model, tensors, cuts)
    for norm in spectral_norms(model):
        if norm.weight not in cuts:
            continue
        weight, u, v = (tensors[name].detach() for name in (norm.weight, norm.u, norm.v))
        quotient = _quotient(weight, u, v, norm.dim)
        kept = sliced_like(weight, cuts[norm.weight])
        found[norm.u], found[norm.v] = singular_vectors(
            kept,
            sliced_like(u, cuts.get(norm.u, {})),
            sliced_like(v, cuts.get(norm.v, {})),
            norm.dim,
            quotient,
        )
    return found


def weight_norm_gains(
    model: nn.Module, tensors: Mapping[str, Tensor], cuts: Mapping[str, Cuts]
) -> dict[str, Tensor]:
    """Compute new gains for weight-normalised layers so that the kept weights do not change.

    w = g·v/‖v‖ has ‖w‖ = |g|. With fewer columns ‖v‖ shrinks, and g must become the norm of the kept part of w.
    """
    found = {}
    for g_name, v_name, dim in weight_norm_pairs(model):
        if v_name not in cuts:
            continue
        g, v = tensors[g_name].detach(), tensors[v_name].detach()
        over = tuple(d for d in range(v.dim()) if d != dim)
        shrunk = torch.linalg.vector_norm(sliced_like(v, cuts[v_name]), dim=over, keepdim=True)
        whole = torch.linalg.vector_norm(v, dim=over, keepdim=True)
        ratio = shrunk / sliced_like(whole, {d: i for d, i in cuts[v_name].items() if d == dim})
        kept_gains = sliced_like(g, cuts.get(g_name, {}))
        found[g_name] = kept_gains * ratio.reshape_as(kept_gains)
    return found


def weight_norm_pairs(model: nn.Module) -> list[tuple[str, str, int | None]]:
    """Return (gain, direction, dimension that is not normalised) of every weight normalisation, by qualified names."""
    pairs = []
    for name, module in named_modules(model):
        for gain, direction, dim in _weight_norms(module):
            prefix = f"{name}." if name else ""
            rank = module.get_parameter(direction).dim()
            pairs.append((prefix + gain, prefix + direction, None if dim in (None, -1) else dim % rank))
    return pairs


def computes_weights(model: nn.Module) -> bool:
    """Whether a network has weight norms or spectral norms."""
    return bool(weight_norm_pairs(model) or spectral_norms(model))


def spectral_norms(model: nn.Module) -> list[SpectralNorm]:
    """Return every spectral norm of a network."""
    found = []
    for name, module in named_modules(model):
        prefix = f"{name}." if name else ""
        for tensor, chain in parametrizations(module).items():
            for position, parametrization in enumerate(chain):
                if type(parametrization).__name__ == "_SpectralNorm" and hasattr(parametrization, "_u"):
                    own = f"{prefix}parametrizations.{tensor}"
                    vectors = (f"{own}.{position}._u", f"{own}.{position}._v")
                    found.append(SpectralNorm(f"{own}.original", *vectors, parametrization.dim))
        for hook in module._forward_pre_hooks.values():
            if type(hook).__name__ == "SpectralNorm" and hasattr(hook, "dim"):
                own = f"{prefix}{getattr(hook, 'name', 'weight')}"
                found.append(SpectralNorm(f"{own}_orig", f"{own}_u", f"{own}_v", hook.dim))
    return found


def singular_vectors(
    weight: Tensor, u: Tensor, v: Tensor, dim: int, quotient: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the leading singular vectors of a weight by power iteration from `u`.

    Args:
        weight: Of any shape; its matrix has the rows of `dim`.
        u: (rows,) initial vector.
        v: (columns,); its slices at zero columns stay zero.
        dim: See `weight`.
        quotient: The value of uᵀ W v; `v` is scaled for that. By default both vectors have length 1.
    """
    matrix = _matrix(weight, dim).to(u.dtype)
    length = torch.linalg.vector_norm(u)
    u = u / length if bool(length > 0) else torch.ones_like(u) / u.numel() ** 0.5
    for _ in range(_POWER_ITERATIONS):
        v = torch.nn.functional.normalize(matrix.mT @ u, dim=0, eps=1e-12)
        u = torch.nn.functional.normalize(matrix @ v, dim=0, eps=1e-12)
    now = u @ matrix @ v
    if quotient is not None and bool(now > 0):
        v = v * (quotient.to(v.dtype) / now)
    return u, v


def _quotient(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    """Return uᵀ W v, by which the layer divides its weight in evaluation."""
    return u @ _matrix(weight, dim).to(u.dtype) @ v


def _matrix(weight: Tensor, dim: int) -> Tensor:
    return weight.movedim(dim, 0).reshape(weight.shape[dim], -1)


def spectral_quotient(tensors: Mapping[str, Tensor], norm: SpectralNorm) -> Tensor:
    """Return the divisor of a spectral norm's weight in evaluation."""
    return _quotient(tensors[norm.weight].data, tensors[norm.u].data, tensors[norm.v].data, norm.dim)


def parametrised_originals(module: nn.Module) -> dict[str, str]:
    """Map each computed tensor of one module to the parameter of the same shape that it is computed from."""
    found = {}
    for tensor, chain in parametrizations(module).items():
        weight_normed = any(type(part).__name__ == "_WeightNorm" for part in chain)
        if weight_normed or hasattr(chain, "original"):
            found[tensor] = f"parametrizations.{tensor}.original" + ("1" if weight_normed else "")
    for hook in module._forward_pre_hooks.values():
        name = str(getattr(hook, "name", "weight"))
        if type(hook).__name__ in ("WeightNorm", "SpectralNorm") and hasattr(hook, "dim"):
            found[name] = name + ("_v" if type(hook).__name__ == "WeightNorm" else "_orig")
    return found


def parametrizations(module: nn.Module) -> Mapping[str, Any]:
    """Map each computed tensor of one module to the chain of parametrizations that computes it."""
    found: Any = module._modules.get("parametrizations")
    return found or {}


def _weight_norms(module: nn.Module) -> list[tuple[str, str, Any]]:
    """Return (gain, direction, dimension) of the weight normalisations of one module, old or new API."""
    found: list[tuple[str, str, Any]] = []
    for tensor, chain in parametrizations(module).items():
        for parametrization in chain:
            if type(parametrization).__name__ == "_WeightNorm":
                prefix = f"parametrizations.{tensor}.original"
                found.append((f"{prefix}0", f"{prefix}1", parametrization.dim))
    for hook in module._forward_pre_hooks.values():
        if type(hook).__name__ == "WeightNorm" and hasattr(hook, "dim"):
            name = str(getattr(hook, "name", "weight"))
            found.append((f"{name}_g", f"{name}_v", hook.dim))
    return found
