"""Excitation backprop (Zhang et al. 2016): the probability that a top-down walk along exciting weights ends somewhere.

P_i = x_i Σ_j w⁺_ij P_j ⊘ Σ_k w⁺_kj x_k, started with 1 at the target. Maximum: the winner; average: in proportion;
activations pass; no bias; batch norms merged into their layers. As in the attribution-preservation paper (Park et al.
2020) the walk ends, by default, at the activation before the last pool, and the map is max(Σ_c P, 0) there, resized.

The contrastive form also starts from "not the target" (the last layer's weights for it negated) and takes the
difference at the input of the last layer, then goes on.

Inputs with negative elements (of networks without ReLU) take part through negative weights: contributions count by
their own sign.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explainers import weight_rules
from explainers.base import Attribution, register_method
from explainers.propagate import Rules, propagate, seen_elements
from explainers.propagation import PreparedPropagation, one_hot, total
from explainers.record import Record, Step, UnsupportedOperatorError, Value

STOPS = ("last-pool", "input")


class _Excitation(Rules):
    name = "excitation backprop"

    def weighted(self, step: Step, relevance: Tensor) -> Tensor:
        assert step.linear is not None
        value = step.inputs[0]
        return weight_rules.z_plus(
            step.linear, value.tensor, relevance, nonnegative=value.nonnegative, seen=seen_elements(value)
        )


@register_method("ebp")
@dataclasses.dataclass(frozen=True)
class EBP:
    """Excitation backprop.

    Attributes:
        contrastive: Subtract the walk that starts from all that is not the target.
        stop: `last-pool`: at the activation before the last pool (at the pictures, in a network without one);
            `input`: at the pictures.
    """

    name: ClassVar[str]
    contrastive: bool = False
    stop: str = "last-pool"

    def __post_init__(self) -> None:
        if self.stop not in STOPS:
            raise ValueError(f"stop={self.stop!r}: choose from {', '.join(STOPS)}")

    def prepare(self, model: nn.Module, example: Tensor) -> PreparedPropagation:
        """See `Method.prepare`."""
        return _Prepared(model, example, self)


class _Prepared(PreparedPropagation):
    def __init__(self, model: nn.Module, example: Tensor, method: EBP) -> None:
        self.method = method
        super().__init__(model, example, _Excitation(), merge=True)

    def explain(self, record: Record, steps: list[Step], targets: Tensor, logits: Tensor) -> Attribution:
        stop = before_last_pool(record) if self.method.stop == "last-pool" else record.images
        start, amount = self._start(record, targets)
        relevance = propagate(record, steps, start, self.rules, stop)
        heatmap = relevance.sum(1, keepdim=True).clamp(min=0)
        size = record.images.tensor.shape[2:]
        if heatmap.shape[2:] != size:
            heatmap = F.interpolate(heatmap, size=size, mode="bilinear", align_corners=False)
        return Attribution(heatmap[:, 0].float(), False, amount, total(relevance), record.logits.tensor)

    def _start(self, record: Record, targets: Tensor) -> tuple[dict[Value, Tensor], Tensor]:
        """Where the walk starts, and its probability there; the difference of two walks in the contrastive form."""
        ones = torch.ones(len(targets), device=targets.device, dtype=record.logits.tensor.dtype)
        relevance = one_hot(record, targets, ones)
        if not self.method.contrastive:
            return {record.logits: relevance}, ones.float()
        last = record.logits.step
        if last is None or last.linear is None:
            raise UnsupportedOperatorError(
                "contrastive excitation backprop starts in a linear layer, but the logits come from "
                f"{last.describe() if last else 'the pictures'}: leave `contrastive` out"
            )
        value = last.inputs[0]
        negated = dataclasses.replace(last.linear, weight=-last.linear.weight)
        walks = [
            weight_rules.z_plus(linear, value.tensor, relevance, nonnegative=value.nonnegative)
            for linear in (last.linear, negated)
        ]
        difference = walks[0] - walks[1]
        return {value: difference}, total(difference)


def before_last_pool(record: Record) -> Value:
    """The value that the last pool reads: of those pools that everything goes through and that shrink the map.

    The pictures, if there is none.
    """
    bottlenecks = set(record.bottlenecks())
    for step in reversed(record.steps):
        value = step.inputs[0]
        if step.is_pool and value in bottlenecks and value.tensor.dim() == 4 and _shrinks(step):
            return value
    return record.images


def _shrinks(step: Step) -> bool:
    """Whether a step's result has fewer elements, picture by picture, in the same channels."""
    before, after = step.inputs[0].tensor, step.outputs[0].tensor
    return after.numel() < before.numel() and after.shape[:2] == before.shape[:2]
