"""Rules for propagating relevance through one layer with weights. None of them gives relevance to the bias.

A unit can be active through its bias alone, without any positive contribution. The published rules lose its relevance,
as `spread=False` does here. By default `spread_rest` spreads it evenly over the unit's inputs, so that sums are
conserved on every network (otherwise DenseNet-121 would keep 0.63 to 1 and MobileNetV2 0.14 to 0.57 of them, with
random weights). Without such units nothing changes.

Notation: x the layer's input, w its weights, R the relevance of its output, `∗` the layer, `wᵀ` its transpose, `w⁺ =
max(w, 0)`, `w⁻ = min(w, 0)`, `a ⊘ b` division with 0 where b = 0. `seen` is 1 for original elements of x and 0 for
elements padded by an operator before the layer; None means 1 everywhere. Padding gets no relevance.

References: Bach et al. 2015 (LRP); Montavon et al. 2017 (z⁺, zᴮ); Lapuschkin et al. 2019 (flat); Zhang et al. 2016
(excitation backprop, which is z⁺).
"""

from __future__ import annotations

import torch
from torch import Tensor

from explainers.attribution.linear_map import LinearMap

#: ε of the ε rule.
STABILISER = 1e-6


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return `numerator ⊘ denominator`."""
    zero = denominator == 0
    return (numerator / denominator.masked_fill(zero, 1)).masked_fill(zero, 0)


def known_to_be_zero(tensor: Tensor) -> bool:
    """Whether all elements are 0, checked only where that is free: on another device the check would make the host
    wait.
    """
    return tensor.device.type == "cpu" and not tensor.any()


def spread_rest(
    linear: LinearMap, result: Tensor, relevance: Tensor, total: Tensor, seen: Tensor | None
) -> Tensor:
    """Add to a rule's result the relevance of units whose `total` contributions are 0, evenly over their inputs."""
    rest = relevance * (total == 0)
    return result if known_to_be_zero(rest) else result + flat(linear, result, rest, seen)


def z_plus(
    linear: LinearMap,
    x: Tensor,
    relevance: Tensor,
    *,
    nonnegative: bool,
    seen: Tensor | None = None,
    spread: bool = True,
) -> Tensor:
    """Propagate by positive contributions: R_i = Σ_j (x_i w_ij)⁺ ⊘ Σ_k (x_k w_kj)⁺ · R_j.

    Args:
        linear: The layer.
        x: (B, …) its input.
        relevance: R, of the shape of its output.
        nonnegative: x has no negative elements; saves half of the work.
        seen: Of the shape of x, see above.
        spread: Keep the relevance of units without positive contributions, see above.
    """
    w_plus = linear.weight.clamp(min=0)
    if nonnegative:
        total = linear.apply(x, w_plus)
        result = x * linear.transpose(divide(relevance, total), w_plus, x)
    else:
        w_minus = linear.weight.clamp(max=0)
        x_plus, x_minus = x.clamp(min=0), x.clamp(max=0)
        total = linear.apply(x_plus, w_plus) + linear.apply(x_minus, w_minus)
        shares = divide(relevance, total)
        result = x_plus * linear.transpose(shares, w_plus, x) + x_minus * linear.transpose(shares, w_minus, x)
    return spread_rest(linear, result, relevance, total, seen) if spread else result


def z_box(
    linear: LinearMap, x: Tensor, relevance: Tensor, seen: Tensor | None = None, *, spread: bool = True
) -> Tensor:
    """Apply zᴮ, for the layer that reads the images: x relative to each image's lowest and highest value L and H.

    g = R ⊘ (w∗x − w⁺∗L − w⁻∗H);  x ⊙ wᵀg − L ⊙ w⁺ᵀg − H ⊙ w⁻ᵀg.
    """
    w_plus, w_minus = linear.weight.clamp(min=0), linear.weight.clamp(max=0)
    dims = tuple(range(1, x.dim()))
    low, high = x.amin(dims, keepdim=True).expand_as(x), x.amax(dims, keepdim=True).expand_as(x)
    if seen is not None:
        low, high = low * seen, high * seen
    total = linear.apply(x, linear.weight) - linear.apply(low, w_plus) - linear.apply(high, w_minus)
    g = divide(relevance, total)
    back_plus, back_minus = linear.transpose(g, w_plus, x), linear.transpose(g, w_minus, x)
    result = (x - low) * back_plus + (x - high) * back_minus
    return spread_rest(linear, result, relevance, total, seen) if spread else result


def epsilon(linear: LinearMap, x: Tensor, relevance: Tensor) -> Tensor:
    """Propagate by contributions, kept off zero by `STABILISER`: R_i = Σ_j x_i w_ij / (z_j + sign(z_j)·ε) · R_j."""
    z = linear.apply(x, linear.weight)
    stable = z + torch.where(z < 0, -STABILISER, STABILISER)
    return x * linear.transpose(relevance / stable, linear.weight, x)


def flat(linear: LinearMap, x: Tensor, relevance: Tensor, seen: Tensor | None = None) -> Tensor:
    """Spread relevance evenly over a unit's inputs, whatever their values.

    All channels of a group share the same receptive field, so one channel represents them.
    """
    ones = linear.of_ones()
    inputs = linear.sum_channels(torch.ones_like(x[:1]) if seen is None else seen)
    shares = divide(linear.sum_channels(relevance), ones.apply(inputs, ones.weight))
    result = linear.repeat_channels(ones.transpose(shares, ones.weight, linear.sum_channels(x)), x)
    return result if seen is None else result * seen


def relative(linear: LinearMap, x: Tensor, relevance: Tensor, *, nonnegative: bool) -> Tensor:
    """Relative attributing propagation (Nam et al. 2020), as published for x ≥ 0 and joined for signed inputs.

    m = [R ≠ 0]; P = m·(positive contributions), N = m·|negative contributions|; product: g⁺ = R ⊘ P, g⁻ = [N ≠ 0]·R ⊘
    (P+N);  convolution: g⁺ = R⁺ ⊘ P, g⁻ = R⁻ ⊘ N + [N ≠ 0]·R ⊘ (P+N); C = |contributions| weighted by g⁺ and g⁻, then
    shifted evenly so that every image keeps its sum.

    Args:
        linear: The layer.
        x: (B, …) its input.
        relevance: R, of the shape of its output.
        nonnegative: x has no negative elements; saves half of the work.

    Note:
        Convolutions separate the signs of R and products do not: an asymmetry of the published implementation. For
        inputs with negative elements that implementation applies the rule twice and doubles the sum; see
        `relative_published`.
    """
    w_plus, w_minus = linear.weight.clamp(min=0), linear.weight.clamp(max=0)
    x_plus = x if nonnegative else x.clamp(min=0)
    x_minus = None if nonnegative else x.clamp(max=0)
    # P and N: each unit's positive and negative contributions, where it has any relevance.
    positive, negative = linear.apply(x_plus, w_plus), linear.apply(x_plus, w_minus)
    if x_minus is not None:
        positive = positive + linear.apply(x_minus, w_minus)
        negative = negative + linear.apply(x_minus, w_plus)
    mask = relevance != 0
    positive, negative = positive * mask, negative.abs() * mask
    # g⁺ and g⁻: relevance per unit of positive and of negative contribution.
    g_minus = divide(relevance, positive + negative) * (negative != 0)
    if linear.settings is None:
        g_plus = divide(relevance, positive)
    else:
        g_plus = divide(relevance.clamp(min=0), positive)
        g_minus = g_minus + divide(relevance.clamp(max=0), negative)
    # C: back to the inputs, each contribution weighted by its magnitude.
    result = x_plus * (linear.transpose(g_plus, w_plus, x) - linear.transpose(g_minus, w_minus, x))
    if x_minus is not None:
        result = result + x_minus * (
            linear.transpose(g_plus, w_minus, x) - linear.transpose(g_minus, w_plus, x)
        )
    return shift_to_sum(result, relevance)


def relative_published(linear: LinearMap, x: Tensor, relevance: Tensor) -> Tensor:
    """Apply the rule to max(x, 0) and to |min(x, 0)| and add the results, as published for RAP."""
    first = relative(linear, x.clamp(min=0), relevance, nonnegative=True)
    second = relative(linear, -x.clamp(max=0), relevance, nonnegative=True)
    return first + second


def shift_to_sum(contributions: Tensor, relevance: Tensor) -> Tensor:
    """Shift each image's non-zero contributions evenly so that they sum to its relevance."""
    dims = tuple(range(1, contributions.dim()))
    reached = contributions != 0
    surplus = contributions.sum(dims, dtype=torch.float64) - relevance.flatten(1).sum(1, dtype=torch.float64)
    count = reached.sum(dims).clamp(min=1)
    shift = (surplus / count).to(contributions.dtype).view(-1, *[1] * len(dims))
    return contributions - shift * reached
