"""Weights that reproduce a layer's outputs from fewer inputs: ridge regression, checked on held-out images.

    W* = W + (UᵀU + λ·I)⁻¹ Uᵀ(Y − U·W)          U, Y centred where a bias can take up the means
    b* = mean(Y) − mean(U)·W*

W are the weights as the cut left them: with a large λ nothing changes, with a small one the fit is free. λ is relative
to the mean of UᵀU's diagonal, so it has no unit; it is chosen on the held-out images, then all images solve with it,
unless rounding makes that worse: inputs behind a layer norm add up to zero, and only the last bits of their UᵀU say
whether it has an inverse. Where a layer has more inputs than there are rows, every fit is exact on them; there λ alone
decides what is learned.

Everything stays on the device: the choice between the ridges is made by a tensor, and no number is read.

Source: He et al., "Channel pruning for accelerating very deep neural networks" (ICCV 2017) reconstruct a layer's output
by least squares. Note: they fit freely, layer by layer with the original inputs; here the inputs are those of the
rewritten network, and the ridge pulls towards the present weights instead of zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pruning.repair.sums import Evidence

#: Ridges that are tried, from a free fit to one that hardly changes anything.
RIDGES = (1e-9, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
#: Held-out error, as a share of Σ Y², that rounding makes of nothing: products are added up in float32.
_ROUNDING = 4e-7


@dataclasses.dataclass(frozen=True)
class Solution:
    """New weights of a layer, and what they are worth.

    Attributes:
        weights: (G, K, M) float64; the present ones where nothing is better.
        bias: (G, M) float64 to be added to the layer's outputs; zeros where nothing is better.
        figures: (3,) float64: held-out error as a share of the outputs' variance, before and after, and λ (0 where only
            the bias or nothing changes).
    """

    weights: Tensor
    bias: Tensor
    figures: Tensor


def solve(
    fit: Evidence,
    held_out: Evidence,
    present: Tensor,
    *,
    has_bias: bool,
    ridges: Sequence[float] = RIDGES,
) -> Solution:
    """The best weights for a layer.

    Args:
        fit: The images to fit.
        held_out: The images to judge by.
        present: (G, K, M) weights as the cut left them.
        has_bias: The layer can take up a change of its mean output.
        ridges: λ to choose from.

    Returns:
        A solution whose held-out error is below that of the present weights, or one that changes nothing.
    """
    present = present.double()
    constant = torch.zeros_like(present[:, 0])

    # Candidates: nothing, the bias alone, and one per ridge. The best of these is kept.
    errors = [held_out.error(present, constant), held_out.error(present, fit.best_bias(present))]
    fitted = present
    least = errors[0].new_tensor(float("inf"))
    for ridge in ridges:
        trial = fit.ridge(present, ridge, has_bias)
        errors.append(held_out.error(trial, fit.best_bias(trial) if has_bias else constant))
        fitted = torch.where(errors[-1] < least, trial, fitted)
        least = torch.fmin(errors[-1], least)
    error = torch.stack(errors)
    variance = held_out.variance()
    choice = chosen(error, held_out.power(), has_bias)
    strengths = torch.tensor([1.0, 1.0, *ridges], dtype=present.dtype, device=present.device)
    strength = picked(strengths, choice)
    whole = fit.joined(held_out)
    solved = _better(whole, whole.ridge(present, strength, has_bias), fitted, has_bias)
    solved = torch.where(choice >= 2, solved, present)
    bias = torch.where((choice >= 1) & has_bias, whole.best_bias(solved), constant)
    scale = variance.clamp(min=torch.finfo(variance.dtype).tiny)
    figures = [error[0] / scale, picked(error, choice) / scale, strength * (choice >= 2)]
    return Solution(solved, bias, torch.stack(figures))


def _better(evidence: Evidence, first: Tensor, second: Tensor, has_bias: bool) -> Tensor:
    """The first weights, or the second where they have the smaller error or the first are not finite."""

    def error(weights: Tensor) -> Tensor:
        bias = evidence.best_bias(weights) if has_bias else torch.zeros_like(weights[:, 0])
        return evidence.error(weights, bias)

    return torch.where(error(first) <= error(second), first, second)


def picked(values: Tensor, number: Tensor) -> Tensor:
    """`values[number]` of a scalar tensor, which would wait for the device to read the number."""
    return values.index_select(0, number[None])[0]


def chosen(errors: Tensor, power: Tensor, has_bias: bool) -> Tensor:
    """Number of the best candidate; 0 where the cut has changed nothing but roundings, or nothing is finite.

    Args:
        errors: (number of candidates,) held-out errors: of the present weights, of a change of the bias alone, and of
            the solutions. Those that are not finite become infinite, in place.
        power: Σ Y² of the held-out outputs.
        has_bias: The bias can change.
    """
    errors.nan_to_num_(float("inf"))
    if not has_bias:
        errors[1] = float("inf")
    untouched = ~(errors[0] > _ROUNDING * power) | ~(errors[0] < float("inf"))
    return errors.argmin() * ~untouched
