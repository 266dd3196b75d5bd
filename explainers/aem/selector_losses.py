"""Losses of amortised explanation models (Ganjdanesh et al. 2022, equations 6 to 9).

predictor   min_q  KL( f(x) ‖ q(x·s) )
selector    min_g  KL( f(x) ‖ q(x·s) ) + λ1·mean((s + 5e-4)^α) + λ2·TV(s)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from explainers.aem.masks import at_least_float32

#: Keeps the derivative of s^α finite at s = 0.
AREA_OFFSET = 5e-4
#: Weight of the mask's values on the image's border in the total variation.
BORDER_WEIGHT = 0.3


def imitation_loss(teacher_logits: Tensor, student_logits: Tensor, *, multi_label: bool = False) -> Tensor:
    """KL( f ‖ q ) per image, in nats.

    Args:
        teacher_logits, student_logits: (N, L) of f and q.
        multi_label: Classes are independent yes-or-no questions; their divergences add.

    Returns:
        (N,) at least float32.
    """
    p, q = at_least_float32(teacher_logits), at_least_float32(student_logits)
    if not multi_label:
        log_p, log_q = p.log_softmax(1), q.log_softmax(1)
        return (log_p.exp() * (log_p - log_q)).sum(1)
    yes = torch.sigmoid(p) * (F.logsigmoid(p) - F.logsigmoid(q))
    no = torch.sigmoid(-p) * (F.logsigmoid(-p) - F.logsigmoid(-q))
    return (yes + no).sum(1)


def area_penalty(masks: Tensor, exponent: float) -> Tensor:
    """mean((s + 5e-4)^α): how much of the image a mask keeps; α < 1 prefers few large values to many small ones."""
    return (at_least_float32(masks) + AREA_OFFSET).pow(exponent).mean()


def total_variation(masks: Tensor) -> Tensor:
    """( Σ|Δ_u s|² + Σ|Δ_v s|² + 0.3·Σ_border s² ) / (2N) of masks (N, 1, H, W).

    The border is the sum over the four edges, so that a corner counts for both of its edges, as published.
    """
    s = at_least_float32(masks)
    across = (s[..., :, 1:] - s[..., :, :-1]).square().sum()
    down = (s[..., 1:, :] - s[..., :-1, :]).square().sum()
    edges = (s[..., 0, :], s[..., -1, :], s[..., :, 0], s[..., :, -1])
    border = torch.stack([edge.square().sum() for edge in edges]).sum()
    return (across + down + BORDER_WEIGHT * border) / (2 * len(s))
