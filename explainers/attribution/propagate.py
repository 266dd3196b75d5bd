"""Propagation of relevance back through a recorded forward pass, step by step, by the rules of a method.

A method defines how relevance passes layers with weights (`Rules.weighted`) and batch norms. Everything else is the
same for all methods: sums, averages and maxima share relevance in proportion to each input's contribution,
rearrangements carry it along, activations and normalisations pass it unchanged, and a product of two signals gives it
to the signal, not to its gate.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from explainers.attribution.canonize import CanonicalNetwork, merge_batch_norms
from explainers.attribution.method import Attribution, check_request, target_logits
from explainers.attribution.record import Kind, Record, Step, UnsupportedOperatorError, Value
from explainers.attribution.weight_rules import divide, known_to_be_zero
from image_classification.models import exact_float32

Relevances = dict[Value, Tensor]


class Rules:
    """One method's rules for each kind of step. Methods override `weighted`, some also `batch_norm`."""

    name = "attribution"

    def weighted(self, step: Step, relevance: Tensor) -> Tensor:
        """Propagate through a convolution or a matrix product, from its output to its input."""
        raise NotImplementedError

    def batch_norm(self, step: Step, relevance: Tensor) -> Tensor:
        """Propagate through a batch norm that was not merged into the layer before it."""
        return relevance

    def __call__(self, step: Step, relevances: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the relevance of the step's inputs, given that of its outputs."""
        match step.kind:
            case Kind.WEIGHTED:
                return [self.weighted(step, relevances[0])]
            case Kind.BATCH_NORM:
                return [self.batch_norm(step, relevances[0])]
            case Kind.PASS:
                return [relevances[0]]
            case Kind.MOVE:
                return list(transposed(step, relevances))
            case Kind.SHARE:
                return list(shared(step, relevances))
            case Kind.GATE:
                return through_product(step, relevances[0])
        raise UnsupportedOperatorError(
            f"{self.name} has no rule for {step.describe()}; explain this network with Grad-CAM or integrated gradients"
        )


def propagate(
    record: Record, steps: Sequence[Step], start: Mapping[Value, Tensor], rules: Rules, until: Value
) -> Tensor:
    """Propagate relevance from some values back to another value.

    Args:
        record: The forward pass.
        steps: Its steps, possibly with batch norms merged.
        start: Relevance by value, each of the value's shape.
        rules: The rules of a method.
        until: Value to stop at: the images, or a bottleneck of the network.

    Returns:
        Relevance of `until`, zero if none reaches it.

    Raises:
        UnsupportedOperatorError: Relevance meets an operator that has no rule.
    """
    pending: Relevances = dict(start)
    arrived = pending.pop(until, None)
    if arrived is not None:
        return arrived
    for step in reversed(steps):
        if until in step.outputs:
            break
        found = [pending.pop(output, None) for output in step.outputs]
        if all(relevance is None for relevance in found):
            continue
        complete = [
            torch.zeros_like(output.tensor) if relevance is None else relevance
            for output, relevance in zip(step.outputs, found, strict=True)
        ]
        for value, relevance in zip(step.inputs, rules(step, complete), strict=True):
            if relevance is not None:
                pending[value] = pending[value] + relevance if value in pending else relevance
    return pending[until] if until in pending else torch.zeros_like(until.tensor)


def seen_elements(value: Value) -> Tensor | None:
    """Return 1 for a value's original elements and 0 for padded ones; None if nothing was padded."""
    step = value.step
    if step is None or step.name != "aten::constant_pad_nd":
        return None
    before = seen_elements(step.inputs[0])
    ones = torch.ones_like(step.inputs[0].tensor) if before is None else before
    padded: Tensor = torch.ops.aten.constant_pad_nd(ones, step.argument("pad"), 0)
    return padded


def transposed(step: Step, relevances: Sequence[Tensor]) -> list[Tensor]:
    """Apply the transposed derivative of a step to relevance: Jᵀ R, for each input."""
    with torch.enable_grad():
        leaves = [value.tensor.detach().requires_grad_() for value in step.inputs]
        outputs = step.compute(leaves)[: len(relevances)]
        grads = torch.autograd.grad(outputs, leaves, list(relevances), allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad.detach()
        for leaf, grad in zip(leaves, grads, strict=True)
    ]


def shared(step: Step, relevances: Sequence[Tensor]) -> list[Tensor]:
    """Share relevance in proportion to contributions: x ⊙ Jᵀ(R ⊘ z). For a maximum, the winner takes all.

    A result of 0 has no proportions, so its relevance is split as if its inputs were equal.
    """
    outputs = [output.tensor for output in step.outputs]
    ratios = [divide(relevance, output) for relevance, output in zip(relevances, outputs, strict=True)]
    result = [value.tensor * grad for value, grad in zip(step.inputs, transposed(step, ratios), strict=True)]
    rest = [relevance * (output == 0) for relevance, output in zip(relevances, outputs, strict=True)]
    if all(known_to_be_zero(part) for part in rest):
        return result
    of_ones = step.compute([torch.ones_like(value.tensor) for value in step.inputs])
    ratios = [divide(part, output) for part, output in zip(rest, of_ones, strict=False)]
    return [part + grad for part, grad in zip(result, transposed(step, ratios), strict=True)]


def through_product(step: Step, relevance: Tensor) -> list[Tensor | None]:
    """Give all relevance to the signal and none to the gate; half to each if neither is known to be a gate.

    The gate is the denominator of a quotient, the smaller (broadcast) factor, or the factor made by a bounded
    activation (sigmoid, softmax, …); Arras et al. 2017 call this "signal takes it all".
    """
    first, second = step.inputs
    gates = [_made_by_gate(first), _made_by_gate(second)]
    if step.name == "aten::div":
        gate = 1
    elif first.tensor.numel() != second.tensor.numel():
        gate = 0 if first.tensor.numel() < second.tensor.numel() else 1
    elif gates[0] != gates[1]:
        gate = gates.index(True)
    else:
        return [(relevance / 2).sum_to_size(value.tensor.shape) for value in step.inputs]
    result: list[Tensor | None] = [None, None]
    result[1 - gate] = relevance.sum_to_size(step.inputs[1 - gate].tensor.shape)
    return result


def _made_by_gate(value: Value) -> bool:
    """Whether a bounded activation made the value, possibly rescaled or rearranged since."""
    step = value.step
    while step is not None:
        if step.is_bounded:
            return True
        if step.kind not in (Kind.PASS, Kind.MOVE) or len(step.inputs) != 1 or step.is_activation:
            return False
        step = step.inputs[0].step
    return False


class PreparedPropagation(abc.ABC):
    """A rule-based method bound to a network. Methods override `explain`.

    Args:
        model: Network; it is copied.
        example: Images for an immediate trial run, so that a missing rule is reported at once.
        rules: The method's rules.
        merge: Merge batch norms into the layers before them.
    """

    def __init__(self, model: nn.Module, example: Tensor, rules: Rules, *, merge: bool) -> None:
        self.network = CanonicalNetwork(model)
        self.rules = rules
        self.merge = merge
        self(example[:1], torch.zeros(1, dtype=torch.int64, device=example.device))

    @torch.no_grad()
    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        """See `Prepared.__call__`."""
        check_request(images, targets)
        with exact_float32(), contextlib.closing(self.network.record(images)) as record:
            steps = merge_batch_norms(record) if self.merge else record.steps
            logits = target_logits(record.logits.tensor, targets)
            return self.explain(record, steps, targets.to(logits.device), logits)

    @abc.abstractmethod
    def explain(self, record: Record, steps: list[Step], targets: Tensor, logits: Tensor) -> Attribution:
        """Compute maps from a recorded pass; `logits` (B,) are those of the targets."""

    def to_images(self, record: Record, steps: list[Step], relevance: Tensor) -> Tensor:
        """Propagate relevance of the logits (B, L) back to the images."""
        return propagate(record, steps, {record.logits: relevance}, self.rules, record.images)


def one_hot(record: Record, targets: Tensor, amounts: Tensor) -> Tensor:
    """Return the relevance of the logits, (B, L): each image's amount (B,) at its target, nothing elsewhere."""
    return torch.zeros_like(record.logits.tensor).scatter_(1, targets[:, None], amounts[:, None])


def total(relevance: Tensor) -> Tensor:
    """Return the sum per image, (B,) float32."""
    return relevance.flatten(1).sum(1, dtype=torch.float64).float()
