"""What LRP, excitation backprop and RAP have in common: a canonical copy, relevance sent back through it, a map."""

from __future__ import annotations

import abc
import contextlib

import torch
from torch import Tensor, nn

from explainers.base import Attribution, check_request, exact_products, target_logits
from explainers.canonize import CanonicalNetwork, merge_batch_norms
from explainers.propagate import Rules, propagate
from explainers.record import Record, Step


class PreparedPropagation(abc.ABC):
    """A rule-based method bound to a network. Methods override `explain`.

    Args:
        model: Network; it is copied.
        example: Pictures that the method is tried on at once, so that a missing rule is known from the start.
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
        with exact_products(images.device), contextlib.closing(self.network.record(images)) as record:
            steps = merge_batch_norms(record) if self.merge else record.steps
            logits = target_logits(record.logits.tensor, targets)
            return self.explain(record, steps, targets.to(logits.device), logits)

    @abc.abstractmethod
    def explain(self, record: Record, steps: list[Step], targets: Tensor, logits: Tensor) -> Attribution:
        """Maps from a recorded pass; `logits` (B,) are those of the targets."""

    def to_pictures(self, record: Record, steps: list[Step], relevance: Tensor) -> Tensor:
        """Send relevance of the logits (B, L) back to the pictures."""
        return propagate(record, steps, {record.logits: relevance}, self.rules, record.images)


def one_hot(record: Record, targets: Tensor, amounts: Tensor) -> Tensor:
    """(B, L) relevance of the logits: each picture's amount (B,) at its target, nothing elsewhere."""
    return torch.zeros_like(record.logits.tensor).scatter_(1, targets[:, None], amounts[:, None])


def total(relevance: Tensor) -> Tensor:
    """(B,) float32, the sum per picture."""
    return relevance.flatten(1).sum(1, dtype=torch.float64).float()
