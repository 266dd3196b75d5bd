"""Weights that reproduce a layer's outputs from fewer inputs: ridge regression, checked on held-out images.

    W* = W + (UᵀU + λ·I)⁻¹ Uᵀ(Y − U·W)          U, Y centred if a bias can absorb the means
    b* = mean(Y) − mean(U)·W*

W are the weights as the cut left them: with a large λ nothing changes, with a small one the fit is free. λ is relative
to the mean of UᵀU's diagonal, so it has no unit; it is chosen on the held-out images, then the system is solved again
for all images, unless rounding makes that worse: inputs after a layer norm add up to zero, and only the last bits of
their UᵀU decide whether it is invertible. If a layer has more inputs than there are rows, every fit is exact on them,
and λ alone determines what is learned.

Everything stays on the device: the ridge is chosen by a tensor, without a host sync.

Source: He et al., "Channel pruning for accelerating very deep neural networks" (ICCV 2017) reconstruct a layer's output
by least squares. Note: they fit freely, layer by layer with the original inputs; here the inputs are those of the
rewritten network, and the ridge pulls towards the current weights instead of zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from pruning.repair.sums import Evidence

#: Ridges to try, from a free fit to one that hardly changes anything.
RIDGES = (1e-9, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
#: Held-out error, as a share of Σ Y², that rounding alone can produce: products are summed in float32.
_ROUNDING = 4e-7


@dataclasses.dataclass(frozen=True)
class Solution:
    """New weights of a layer, with their errors.

    Attributes:
        weights: (G, K, M) float64; the current ones if nothing is better.
        bias: (G, M) float64 to be added to the layer's outputs; zeros if nothing is better.
        figures: (3,) float64: held-out error as a share of the outputs' variance, before and after, and λ (0 if only
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
    """Find the best weights for a layer.

    Args:
        fit: Sums over the images to fit.
        held_out: Sums over the held-out images.
        present: (G, K, M) weights after the cut.
        has_bias: The layer can absorb a change of its mean output.
        ridges: λ to choose from.

    Returns:
        A solution whose held-out error is below that of the current weights, or one that changes nothing.
    """
    present = present.double()
    constant = torch.zeros_like(present[:, 0])

    # Candidates: no change, only the bias, and one solution per ridge. The best of these is kept. A layer may have more
    # weights than all others together: no more than three solutions of its size exist at any time.
    errors = [held_out.error(present, constant), held_out.error(present, fit.best_bias(present))]
    fitted = present.clone()
    least = errors[0].new_tensor(float("inf"))
    for trial in fit.ridge(present, ridges, has_bias):
        errors.append(held_out.error(trial, fit.best_bias(trial) if has_bias else constant))
        torch.where(errors[-1] < least, trial, fitted, out=fitted)
        least = torch.fmin(errors[-1], least)
        del trial
    error = torch.stack(errors)
    variance = held_out.variance()
    choice = chosen(error, held_out.power(), has_bias)
    strengths = torch.tensor([1.0, 1.0, *ridges], dtype=present.dtype, device=present.device)
    strength = picked(strengths, choice)
    whole = fit.joined(held_out)
    (solved,) = whole.ridge(present, [strength], has_bias)
    torch.where(_is_better(whole, solved, fitted, has_bias), solved, fitted, out=solved)
    torch.where(choice >= 2, solved, present, out=solved)
    bias = torch.where((choice >= 1) & has_bias, whole.best_bias(solved), constant)
    scale = variance.clamp(min=torch.finfo(variance.dtype).tiny)
    figures = [error[0] / scale, picked(error, choice) / scale, strength * (choice >= 2)]
    return Solution(solved, bias, torch.stack(figures))


def _is_better(evidence: Evidence, first: Tensor, second: Tensor, has_bias: bool) -> Tensor:
    """Whether the first weights have no larger error than the second, and are finite."""

    def error(weights: Tensor) -> Tensor:
        bias = evidence.best_bias(weights) if has_bias else torch.zeros_like(weights[:, 0])
        return evidence.error(weights, bias)

    return error(first) <= error(second)


def picked(values: Tensor, number: Tensor) -> Tensor:
    """Return `values[number]` for a scalar tensor, which indexing would sync with the host to read."""
    return values.index_select(0, number[None])[0]


def chosen(errors: Tensor, power: Tensor, has_bias: bool) -> Tensor:
    """Return the index of the best candidate; 0 if the cut changed only rounding, or no error is finite.

    Args:
        errors: (number of candidates,) held-out errors: of the current weights, of a change of the bias alone, and of
            the solutions. Non-finite errors become infinite, in place.
        power: Σ Y² of the held-out outputs.
        has_bias: The bias can change.
    """
    errors.nan_to_num_(float("inf"))
    if not has_bias:
        errors[1] = float("inf")
    untouched = ~(errors[0] > _ROUNDING * power) | ~(errors[0] < float("inf"))
    return errors.argmin() * ~untouched
