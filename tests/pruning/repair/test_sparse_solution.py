"""Layers solved with some weights held at zero, against NumPy's least squares column by column."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from pruning.repair.sparse_solution import descent, solve_on_support
from pruning.repair.sums import Evidence, Rows, Sums

GROUPS, NUM_ROWS, INPUTS, OUTPUTS = 2, 60, 9, 5
GENERATOR = torch.Generator().manual_seed(0)
CPU = torch.device("cpu")
SHAPE = (GROUPS, INPUTS, OUTPUTS)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


def evidence(kind: Literal["sums", "rows"]) -> Evidence:
    if kind == "sums":
        return Sums.zeros(*SHAPE, CPU)
    return Rows.empty(*SHAPE, CPU)


@pytest.mark.parametrize("kind", ["sums", "rows"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_enough_steps_are_least_squares_on_the_support(kind: Literal["sums", "rows"], has_bias: bool) -> None:
    inputs = random(GROUPS, NUM_ROWS, INPUTS) @ random(INPUTS, INPUTS) + 1
    outputs = random(GROUPS, NUM_ROWS, OUTPUTS) + inputs @ random(*SHAPE)
    support = torch.rand(SHAPE, generator=GENERATOR) > 0.4
    rows = evidence(kind)
    rows.add(inputs, outputs)
    *_, found = descent(rows.normal(has_bias), random(*SHAPE) * support, support, 4 * INPUTS)
    for group in range(GROUPS):
        for column in range(OUTPUTS):
            left = support[group, :, column].numpy()
            u, y = inputs[group].numpy(), outputs[group, :, column].numpy()
            if has_bias:
                u, y = u - u.mean(0), y - y.mean()
            wanted = np.zeros(INPUTS)
            wanted[left] = np.linalg.lstsq(u[:, left], y, rcond=None)[0]
            assert np.allclose(found[group, :, column].numpy(), wanted, atol=1e-7)


def test_held_out_rows_choose_how_far_to_go() -> None:
    """Nothing is solved for where that would fit noise only, and everything where the rows are exact."""
    present = random(*SHAPE)
    support = torch.rand(SHAPE, generator=GENERATOR) > 0.4
    inputs = [random(GROUPS, count, INPUTS) for count in (NUM_ROWS, NUM_ROWS)]
    exact = [one @ (present * support) for one in inputs]
    start = present * support + support * random(*SHAPE)
    fit, judge = evidence("sums"), evidence("sums")
    fit.add(inputs[0], exact[0])
    judge.add(inputs[1], exact[1])
    solution = solve_on_support(fit, judge, start, support, has_bias=False)
    assert torch.allclose(solution.weights, present * support, atol=1e-6)
    assert solution.figures[1] < 1e-10 < solution.figures[0]

    few, other = evidence("sums"), evidence("sums")
    few.add(inputs[0][:, :5], exact[0][:, :5] + 30 * random(GROUPS, 5, OUTPUTS))
    other.add(inputs[1], exact[1])
    solution = solve_on_support(few, other, present * support, support, has_bias=True)
    assert torch.equal(solution.weights, present * support)
    assert not solution.bias.any()
