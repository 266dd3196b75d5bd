"""Layer-wise relevance propagation (Bach et al. 2015) by two composites of rules.

- `zplus`: z⁺ in every layer with weights, zᴮ in the first, batch norms passed: what the attribution-preservation paper
  (Park et al. 2020) evaluates with.
- `epsilon-plus-flat`: ε in linear layers, z⁺ in convolutions, flat in the first; batch norms merged into their
  layers (Kohlbrenner et al. 2020).

Relevance starts with the logit and is summed over colours. Biases get none, so that the sum is kept.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor, nn

from explainers import weight_rules
from explainers.base import Attribution, register_method
from explainers.propagate import Rules, seen_elements
from explainers.propagation import PreparedPropagation, one_hot, total
from explainers.record import Record, Step

COMPOSITES = ("zplus", "epsilon-plus-flat")


class _ZPlus(Rules):
    name = "LRP (zplus)"

    def weighted(self, step: Step, relevance: Tensor) -> Tensor:
        assert step.linear is not None
        value = step.inputs[0]
        if not value.past_weights:
            return weight_rules.z_box(step.linear, value.tensor, relevance, seen_elements(value))
        return weight_rules.z_plus(
            step.linear, value.tensor, relevance, nonnegative=value.nonnegative, seen=seen_elements(value)
        )


class _EpsilonPlusFlat(Rules):
    name = "LRP (epsilon-plus-flat)"

    def weighted(self, step: Step, relevance: Tensor) -> Tensor:
        assert step.linear is not None
        value = step.inputs[0]
        if not value.past_weights:
            return weight_rules.flat(step.linear, value.tensor, relevance, seen_elements(value))
        if step.linear.settings is None:
            return weight_rules.epsilon(step.linear, value.tensor, relevance)
        return weight_rules.z_plus(
            step.linear, value.tensor, relevance, nonnegative=value.nonnegative, seen=seen_elements(value)
        )


@register_method("lrp")
@dataclasses.dataclass(frozen=True)
class LRP:
    """Layer-wise relevance propagation.

    Attributes:
        composite: `zplus` or `epsilon-plus-flat`.
        merge_batch_norms: Merge batch norms into the layers before them; None: as the composite has it.
    """

    name: ClassVar[str]
    composite: str = "zplus"
    merge_batch_norms: bool | None = None

    def __post_init__(self) -> None:
        if self.composite not in COMPOSITES:
            raise ValueError(f"composite={self.composite!r}: choose from {', '.join(COMPOSITES)}")

    def prepare(self, model: nn.Module, example: Tensor) -> PreparedPropagation:
        """See `Method.prepare`."""
        published = self.composite == "zplus"
        merge = not published if self.merge_batch_norms is None else self.merge_batch_norms
        return _Prepared(model, example, _ZPlus() if published else _EpsilonPlusFlat(), merge=merge)


class _Prepared(PreparedPropagation):
    def explain(self, record: Record, steps: list[Step], targets: Tensor, logits: Tensor) -> Attribution:
        relevance = self.to_pictures(record, steps, one_hot(record, targets, logits))
        heatmap = relevance.sum(1).float()
        return Attribution(heatmap, True, logits.float(), total(relevance), record.logits.tensor)
