"""Weights that reproduce a layer's outputs with some of them held at zero.

Every output of the layer has its own support (the remaining weights), so no single inverse serves all of them. Each
column w of W moves from the current weights towards

    min ‖y − U·w‖²        w zero outside its support

by conjugate gradients within the support, all columns at once. A few steps move only along the strongest directions of
the inputs, many fit freely: the number of steps, chosen on the held-out images, plays the role of the ridge for whole
channels.

Source: Hestenes & Stiefel, "Methods of conjugate gradients for solving linear systems" (1952), scaled by the diagonal;
stopping early as regularisation: Hanke, "Conjugate gradient type methods for ill-posed problems" (1995).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pruning.repair.solution import Solution, chosen, picked
from pruning.repair.sums import Evidence, NormalEquations

#: Numbers of steps to try.
STEPS = (1, 2, 4, 8, 16, 32, 64)


def solve_on_support(
    fit: Evidence,
    held_out: Evidence,
    present: Tensor,
    support: Tensor,
    *,
    has_bias: bool,
    steps: Sequence[int] = STEPS,
) -> Solution:
    """Find the best weights for a layer, zero outside the support.

    Args:
        fit: Sums over the images to fit.
        held_out: Sums over the held-out images.
        present: (G, K, M) weights, zero outside the support.
        support: (G, K, M) bool: the remaining weights.
        has_bias: The layer can absorb a change of its mean output.
        steps: Numbers of steps to choose from, ascending.

    Returns:
        A solution whose held-out error is below that of the current weights, or one that changes nothing. Its figures
            contain no ridge.
    """
    present = present.double()
    constant = torch.zeros_like(present[:, 0])

    # Candidates: no change, only the bias, and one solution per number of steps.
    errors = [held_out.error(present, constant), held_out.error(present, fit.best_bias(present))]
    for number, trial in enumerate(descent(fit.normal(has_bias), present, support, steps[-1]), start=1):
        if number in steps:
            errors.append(held_out.error(trial, fit.best_bias(trial) if has_bias else constant))
    error = torch.stack(errors)
    choice = chosen(error, held_out.power(), has_bias)

    # Repeat the same number of steps with all images; the choice is made on the device.
    whole = fit.joined(held_out)
    count = picked(torch.tensor([0, 0, *steps], device=choice.device), choice)
    solved = present
    for number, trial in enumerate(descent(whole.normal(has_bias), present, support, steps[-1]), start=1):
        solved = torch.where(count == number, trial, solved)
    bias = torch.where((choice >= 1) & has_bias, whole.best_bias(solved), constant)
    scale = held_out.variance().clamp(min=torch.finfo(error.dtype).tiny)
    figures = torch.stack([error[0] / scale, picked(error, choice) / scale, error.new_zeros(())])
    return Solution(solved, bias, figures)


def descent(equations: NormalEquations, present: Tensor, support: Tensor, steps: int) -> Iterator[Tensor]:
    """Yield the weights (G, K, M) after each step of conjugate gradients from the current ones."""
    inverse = _quotient(torch.ones_like(equations.diagonal), equations.diagonal)[:, :, None]
    weights = present
    slope = (equations.right - equations.multiply(present)) * support
    scaled = slope * inverse
    direction = scaled
    size = (slope * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        bent = equations.multiply(direction) * support
        length = _quotient(size, (direction * bent).sum(1, keepdim=True))
        weights = weights + length * direction
        slope = slope - length * bent
        scaled = slope * inverse
        following = (slope * scaled).sum(1, keepdim=True)
        direction, size = scaled + _quotient(following, size) * direction, following
        yield weights


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide, giving zero where the denominator is not positive: a converged column stays where it is."""
    positive = denominator > torch.finfo(denominator.dtype).tiny
    return torch.where(positive, numerator / denominator.where(positive, torch.ones_like(denominator)), 0.0)
