"""How much the calibration loss grows when channels go: a second-order estimate for any set of units, and the truth.

The estimate needs one forward and one backward pass for all candidates together. With mask m on the units, sample
loss ℓ_n and s_nu = ∂ℓ_n/∂m_u at m = 1, removing the set S changes the mean loss by about

    Δ(S) = −mean_n Σ_{u∈S} s_nu + ½ mean_n (Σ_{u∈S} s_nu)²

the first-order Taylor term (Molchanov et al. 2017, arXiv:1611.06440) and the empirical Fisher approximation of the
curvature (Theis et al. 2018, arXiv:1801.05787), which here includes the interaction of units removed together.
The truth is measured through gates, without a copy of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classification.distributed import Distributed
from image_classification.models import main_and_auxiliary_logits
from pruning.channel_graph import ChannelGraph, Keep
from pruning.criteria.base import GradientCriterion
from pruning.gates import Gates
from pruning.hooks import evaluation_mode
from pruning.scoring import score_groups

#: Calibration pictures and targets of this rank, on the network's device.
Batches = Sequence[tuple[Tensor, Tensor]]
SampleLoss = Callable[[Tensor, Tensor], Tensor]


def sample_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every sample, in float32.

    Args:
        logits: (N, L).
        targets: (N,) class indices or (N, L) probabilities.

    Returns:
        (N,).
    """
    targets = targets if targets.dim() == 1 else targets.float()
    return F.cross_entropy(logits.float(), targets, reduction="none")


def multi_label_sample_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy over the classes of every sample; `targets` (N, L) multi-hot. Returns (N,)."""
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
    return losses.mean(dim=1)


class LossChange:
    """Loss changes of candidate cuts on a fixed set of calibration batches.

    Args:
        model: The bare network; run in evaluation mode and left as it was.
        graph: Its channel graph.
        batches: This rank's calibration batches on the network's device; a rank may have none.
        loss: `(logits, targets) → (N,)` losses.
        distributed: Sums are reduced over ranks, so all ranks see the same numbers.
        autocast: Context factory of the forward passes.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        batches: Batches,
        *,
        loss: SampleLoss = sample_losses,
        distributed: Distributed | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model = model
        self.graph = graph
        self.batches = batches
        self.loss = loss
        self.distributed = distributed or Distributed()
        self.device = next(model.parameters()).device
        self.autocast = autocast
        self._gradients: Tensor | None = None
        self._loss: float | None = None

    def estimate(self, removed: Sequence[np.ndarray]) -> np.ndarray:
        """Estimated change of the mean loss for each set of units.

        Args:
            removed: Arrays of unit ids.

        Returns:
            (len(removed),) float64, equal on all ranks; NaN for sets with units that no layer's input shows (see
            `ChannelGraph.ungated`), whose derivatives are not to be had.
        """
        gradients = self._unit_gradients()
        sums = torch.zeros(len(removed), dtype=torch.float64, device=gradients.device)
        for number, units in enumerate(removed):
            total = gradients[:, torch.from_numpy(units).to(gradients.device)].sum(dim=1, dtype=torch.float64)
            sums[number] = (0.5 * total.square() - total).sum()
        reduced, count = self.distributed.all_reduce_sum(sums, torch.tensor(float(len(gradients))))
        found = (reduced.cpu() / count.cpu().clamp(min=1)).numpy()
        found[[bool(np.isin(units, self.graph.ungated).any()) for units in removed]] = np.nan
        return found

    def loss_as_it_is(self) -> float:
        """Mean calibration loss of the network as it is; NaN without data. Remembered."""
        if self._loss is None:
            self._loss = float(self.measure([{}])[0])
        return self._loss

    def _unit_gradients(self) -> Tensor:
        """(number of this rank's samples, num_units) float32: s_nu, made in one pass and remembered."""
        if self._gradients is None:
            memory = _GradientMemory(self.loss)
            score_groups(
                self.model,
                self.graph,
                self.batches,
                memory,
                distributed=self.distributed,
                autocast=self.autocast,
            )
            # A rank may be without data.
            empty = torch.zeros(0, self.graph.num_units, device=self.device)
            self._gradients = torch.cat(memory.seen) if memory.seen else empty
            total, count = self.distributed.all_reduce_sum(
                torch.stack([empty.new_zeros(()), *memory.losses]).sum(),
                torch.tensor(float(len(self._gradients))),
            )
            self._loss = float(total) / float(count)
        return self._gradients

    @torch.no_grad()
    def measure(self, candidates: Iterable[Keep]) -> np.ndarray:
        """Mean calibration loss with each candidate's cut gated away.

        Args:
            candidates: Group → positions that stay; an empty mapping is the network as it is.

        Returns:
            (number of candidates,) float64, equal on all ranks.
        """
        candidates = list(candidates)
        sums = torch.zeros(len(candidates) + 1, dtype=torch.float64, device=self.device)
        with evaluation_mode(self.model), Gates(self.model, self.graph) as gates:
            for number, keep in enumerate(candidates):
                gates.set_keep(keep)
                for images, targets in self.batches:
                    with self.autocast():
                        logits, _ = main_and_auxiliary_logits(self.model(images))
                    sums[number] += self.loss(logits, targets).double().sum()
        sums[-1] = sum(len(images) for images, _ in self.batches)
        (reduced,) = self.distributed.all_reduce_sum(sums)
        figures = reduced.cpu().numpy()
        return figures[:-1] / figures[-1] if figures[-1] else np.full(len(candidates), np.nan)


class _GradientMemory(GradientCriterion):
    """Keeps the derivative of every sample's loss by every unit's gate, instead of reducing it to a score."""

    announces_unscored = False  # units without a gate have no derivative, and `estimate` says so

    def __init__(self, sample_loss: SampleLoss) -> None:
        super().__init__()
        self.sample_loss = sample_loss
        self.seen: list[Tensor] = []
        self.losses: list[Tensor] = []

    def objectives(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """The sum of the batch's losses."""
        logits, _ = main_and_auxiliary_logits(model(images))
        total = self.sample_loss(logits, targets).sum()
        self.losses.append(total.detach())
        return (total,)

    def reduce(self, gate_gradients: Tensor) -> Tensor:
        """Remember (1, N, U) as (N, U); the score is of no use."""
        self.seen.append(gate_gradients[0])
        return gate_gradients.new_zeros(gate_gradients.shape[-1])
