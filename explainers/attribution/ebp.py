"""Excitation backprop (Zhang et al. 2016): the probability that a top-down walk along exciting weights ends somewhere.

P_i = x_i Σ_j w⁺_ij P_j ⊘ Σ_k w⁺_kj x_k, started with 1 at the target. A maximum passes to its winner, an average in
proportion, activations pass unchanged, biases get nothing, and batch norms are merged into their layers. As in the
attribution-preservation paper (Park et al. 2020) the walk ends, by default, at the activation before the last pool, and
the map is max(Σ_c P, 0) there, resized.

The contrastive form also starts from "not the target" (the last layer's weights for it negated) and takes the
difference at the input of the last layer before going on.

Inputs with negative elements (normalised images, networks without ReLU) take part through negative weights:
contributions count by their own sign, and a unit without any gives its probability evenly to what it sees.
`as_published` takes the formula as it stands whatever the signs, loses the probability of such units, and lets batch
norms pass it on unchanged.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explainers.attribution import weight_rules
from explainers.attribution.method import Attribution, register_method
from explainers.attribution.propagate import (
    PreparedPropagation,
    Rules,
    one_hot,
    propagate,
    seen_elements,
    total,
)
from explainers.attribution.record import Record, Step, UnsupportedOperatorError, Value
from image_classification.config import check_choice, flag

Stop = Literal["last-pool", "input"]


class _Excitation(Rules):
    name = "excitation backprop"

    def __init__(self, as_published: bool) -> None:
        self.as_published = as_published

    def weighted(self, step: Step, relevance: Tensor) -> Tensor:
        assert step.linear is not None
        value = step.inputs[0]
        return weight_rules.z_plus(
            step.linear,
            value.tensor,
            relevance,
            nonnegative=value.nonnegative or self.as_published,
            seen=seen_elements(value),
            spread=not self.as_published,
        )


@register_method("ebp")
@dataclasses.dataclass(frozen=True)
class EBP:
    """Excitation backprop.

    Attributes:
        contrastive: Subtract the walk that starts from everything but the target.
        stop: `last-pool`: at the activation before the last pool (at the images, in a network without one);
            `input`: at the images.
        as_published: See the module docstring.
    """

    name: ClassVar[str]
    contrastive: bool = flag(
        False,
        "--ebp-contrastive",
        setting="contrastive",
        help="ebp: subtract the walk from everything that is not the class",
    )
    stop: Stop = flag(
        "last-pool",
        "--ebp-stop",
        setting="stop",
        help="ebp: where the walk ends; last-pool as published",
    )
    as_published: bool = flag(
        False,
        "--ebp-as-published",
        setting="as_published",
        help="ebp: the rule for inputs without negative elements serves all, and batch norms pass probability on "
        "instead of being merged into their layers",
    )

    def __post_init__(self) -> None:
        check_choice("stop", self.stop, get_args(Stop))

    def prepare(self, model: nn.Module, example: Tensor) -> PreparedPropagation:
        """See `Method.prepare`."""
        return _Prepared(model, example, self)


class _Prepared(PreparedPropagation):
    def __init__(self, model: nn.Module, example: Tensor, method: EBP) -> None:
        self.method = method
        super().__init__(model, example, _Excitation(method.as_published), merge=not method.as_published)

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
        """Return the value where the walk starts and its probability there; in the contrastive form, a difference of
        two walks.
        """
        ones = torch.ones(len(targets), device=targets.device, dtype=record.logits.tensor.dtype)
        relevance = one_hot(record, targets, ones)
        if not self.method.contrastive:
            return {record.logits: relevance}, ones.float()
        last = record.logits.step
        if last is None or last.linear is None:
            raise UnsupportedOperatorError(
                "contrastive excitation backprop starts in a linear layer, but the logits come from "
                f"{last.describe() if last else 'the images'}: leave `contrastive` out"
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
    """Return the value read by the last pool, among the pools that shrink the map and that every path goes through.

    Returns the images if there is no such pool.
    """
    bottlenecks = set(record.bottlenecks())
    for step in reversed(record.steps):
        value = step.inputs[0]
        if step.is_pool and value in bottlenecks and value.tensor.dim() == 4 and _shrinks(step):
            return value
    return record.images


def _shrinks(step: Step) -> bool:
    """Whether a step's result has fewer elements, image by image, in the same channels."""
    before, after = step.inputs[0].tensor, step.outputs[0].tensor
    return after.numel() < before.numel() and after.shape[:2] == before.shape[:2]
