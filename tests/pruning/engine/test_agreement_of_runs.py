"""When two runs of a network agree: rounding is none, a wrong number is one, whatever it stands beside."""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.engine.proof.agreement_of_runs import TrialRun, difference

GENERATOR = torch.Generator().manual_seed(0)


def differ(expected: Tensor, found: Tensor) -> bool:
    return difference(TrialRun([], [expected]), TrialRun([], [found])) is not None


def test_a_logit_near_zero_is_as_exact_as_its_like() -> None:
    """A single image's logits hold one number a class, and some are near zero by chance."""
    logits = torch.randn(1, 400, generator=GENERATOR)
    logits[0, 7] = 1e-4
    rounded = logits + 1e-6 * torch.randn(1, 400, generator=GENERATOR)
    assert float(abs(rounded[0, 7] / logits[0, 7] - 1)) > 1e-4
    assert not differ(logits, rounded)
    wrong = logits.clone()
    wrong[0, 7] += 0.01
    assert differ(logits, wrong)


def test_a_wrong_score_beside_boxes_in_pixels_differs() -> None:
    for count in (1, 4, 100):
        found = torch.cat(
            [torch.rand(count, 4, generator=GENERATOR) * 500 + 100, torch.full((count, 1), 0.5)], 1
        )
        wrong = found.clone()
        wrong[:, 4] += 1e-3
        assert differ(found, wrong)


def test_a_wrong_score_of_one_image_beside_many_large_numbers_differs() -> None:
    """The smallest tenth of twelve numbers is one of the large ones, whose rounding the score does not have."""
    found = torch.cat([torch.rand(2, 11, generator=GENERATOR) * 1e4 + 1e3, torch.full((2, 1), 0.5)], 1)
    rounded = found * (1 + 1e-7)
    assert not differ(found, rounded)
    wrong = rounded.clone()
    wrong[:, 11] = 0.25
    assert differ(found, wrong)


def test_a_score_near_zero_beside_large_numbers_is_measured_by_itself() -> None:
    found = torch.cat([torch.rand(2, 11, generator=GENERATOR) * 1e4 + 1e3, torch.full((2, 1), 1e-3)], 1)
    wrong = found * (1 + 1e-6)
    wrong[:, 11] = 2e-3
    assert differ(found, wrong)
