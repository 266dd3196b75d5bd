"""Layer-wise relevance propagation (Bach et al. 2015) by two composites of rules.

- `zplus`: z⁺ in every layer with weights, zᴮ in the first, batch norms passed; used for evaluation in the
  attribution-preservation paper (Park et al. 2020).
- `epsilon-plus-flat`: ε in linear layers, z⁺ in convolutions, flat in the first; batch norms merged into their
  layers (Kohlbrenner et al. 2020).

Relevance starts with the logit and is summed over colours. Biases get none, so the sum is conserved; units that are
active only because of their bias spread theirs evenly, or lose it as published (`as_published`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

from explainers.attribution import weight_rules
from explainers.attribution.method import Attribution, register_method
from explainers.attribution.propagate import PreparedPropagation, Rules, one_hot, seen_elements, total
from explainers.attribution.record import Record, Step
from image_classification.config import check_choice, flag

Composite = Literal["zplus", "epsilon-plus-flat"]


class _ZPlus(Rules):
    name = "LRP (zplus)"

    def __init__(self, spread: bool = True) -> None:
        self.spread = spread

    def weighted(self, step: Step, relevance: Tensor) -> Tensor:
        assert step.linear is not None
        value = step.inputs[0]
        if not value.past_weights:
            seen = seen_elements(value)
            return weight_rules.z_box(step.linear, value.tensor, relevance, seen, spread=self.spread)
        return weight_rules.z_plus(
            step.linear,
            value.tensor,
            relevance,
            nonnegative=value.nonnegative,
            seen=seen_elements(value),
            spread=self.spread,
        )


class _EpsilonPlusFlat(_ZPlus):
    name = "LRP (epsilon-plus-flat)"

    def weighted(self, step: Step, relevance: Tensor) -> Tensor:
        assert step.linear is not None
        value = step.inputs[0]
        if not value.past_weights:
            return weight_rules.flat(step.linear, value.tensor, relevance, seen_elements(value))
        if step.linear.settings is None:
            return weight_rules.epsilon(step.linear, value.tensor, relevance)
        return super().weighted(step, relevance)


#: Rules of each composite, and whether it merges batch norms into the layers before them.
_COMPOSITES: dict[Composite, tuple[type[_ZPlus], bool]] = {
    "zplus": (_ZPlus, False),
    "epsilon-plus-flat": (_EpsilonPlusFlat, True),
}


@register_method("lrp")
@dataclasses.dataclass(frozen=True)
class LRP:
    """Layer-wise relevance propagation.

    Attributes:
        composite: See the module docstring.
        as_published: Lose the relevance of units without positive contributions.
        merge_batch_norms: Merge batch norms into the layers before them; None to follow the composite.
    """

    name: ClassVar[str]
    composite: Composite = flag(
        "zplus",
        "--lrp-composite",
        setting="composite",
        help="lrp: rules of the layers; zplus as in the attribution-preservation paper",
    )
    as_published: bool = flag(
        False,
        "--lrp-as-published",
        setting="as_published",
        help="lrp: units that are active by their bias alone lose their relevance, as the published rule has it",
    )
    merge_batch_norms: bool | None = None

    def __post_init__(self) -> None:
        check_choice("composite", self.composite, get_args(Composite))

    def prepare(self, model: nn.Module, example: Tensor) -> PreparedPropagation:
        """See `Method.prepare`."""
        rules, merges = _COMPOSITES[self.composite]
        merge = merges if self.merge_batch_norms is None else self.merge_batch_norms
        return _Prepared(model, example, rules(spread=not self.as_published), merge=merge)


class _Prepared(PreparedPropagation):
    def explain(self, record: Record, steps: list[Step], targets: Tensor, logits: Tensor) -> Attribution:
        relevance = self.to_images(record, steps, one_hot(record, targets, logits))
        heatmap = relevance.sum(1).float()
        return Attribution(heatmap, True, logits.float(), total(relevance), record.logits.tensor)
