"""Growth of the calibration loss when channels are removed: a second-order estimate for any set of units, and a
measurement.

The estimate needs one forward and one backward pass for all candidates together. With mask m on the units, sample loss
ℓ_n and s_nu = ∂ℓ_n/∂m_u at m = 1, removing the set S changes the mean loss by about

    Δ(S) = −mean_n Σ_{u∈S} s_nu + ½ mean_n (Σ_{u∈S} s_nu)²

the first-order Taylor term (Molchanov et al. 2017, arXiv:1611.06440) and the empirical Fisher approximation of the
curvature (Theis et al. 2018, arXiv:1801.05787), which here includes the interaction of units removed together. The
actual loss is measured through gates, without a copy of the network.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.distributed import Distributed
from image_classification.models.modes import random_state_kept
from image_classification.models.running import Outputs
from pruning.criteria.criterion import GradientCriterion
from pruning.criteria.scoring import score_groups
from pruning.engine.channel_graph import ChannelGraph, Keep
from pruning.engine.gates import Gates
from pruning.repair.local_repair import LocalRepair
from pruning.search.shared_passes import SharedPasses
from pruning.task import Task, num_samples, to_device

#: Calibration batches of this rank.
Batches = Sequence[Any]


class LossChange:
    """Loss changes of candidate cuts on a fixed set of calibration batches.

    Args:
        model: The bare network; run in the task's mode and not modified.
        graph: Its channel graph.
        batches: This rank's calibration batches; a rank may have none.
        task: How the network is run on a batch and evaluated; by default as a classifier.
        distributed: Sums are reduced over ranks, so all ranks see the same numbers.
        autocast: Context factory of the forward passes.
        repair: Repair to apply to candidates before they are measured.

    Attributes:
        shares: Whether passes share what candidates have in common. It turns itself off where that changes losses, as
            in a network that reads memory past PyTorch's operators.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        batches: Batches,
        *,
        task: Task | None = None,
        distributed: Distributed | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        repair: LocalRepair | None = None,
    ) -> None:
        self.model = model
        self.graph = graph
        self.device = next(model.parameters()).device
        self.batches = [to_device(batch, self.device) for batch in batches]
        self.task = task or Task()
        self.distributed = distributed or Distributed()
        self.autocast = autocast
        self.repair = repair
        self._gradients: Tensor | None = None
        self._unknown = graph.ungated
        self._loss: float | None = None
        self.shares = True

    def estimate(self, removed: Sequence[np.ndarray], closed: np.ndarray | None = None) -> np.ndarray:
        """Estimate the change of the mean loss for each set of units.

        Args:
            removed: Arrays of unit ids.
            closed: Units removed in each case; those without derivatives are ignored.

        Returns:
            (len(removed),) float64, equal on all ranks; NaN for sets with units that have no derivative: they appear in
                no layer's input (see `ChannelGraph.ungated`), or the loss does not depend on them.
        """
        gradients = self._unit_gradients()
        sums = torch.zeros(len(removed), dtype=torch.float64, device=gradients.device)
        gone = np.setdiff1d(np.zeros(0, dtype=np.int64) if closed is None else closed, self._unknown)
        for number, units in enumerate(removed):
            together = torch.from_numpy(np.concatenate([gone, units])).to(gradients.device)
            total = gradients[:, together].sum(dim=1, dtype=torch.float64)
            sums[number] = (0.5 * total.square() - total).sum()
        reduced, count = self.distributed.all_reduce_sum(sums, torch.tensor(float(len(gradients))))
        found = (reduced.cpu() / count.cpu().clamp(min=1)).numpy()
        found[[bool(np.isin(units, self._unknown).any()) for units in removed]] = np.nan
        return found

    def loss_as_it_is(self) -> float:
        """Return the mean calibration loss of the current network, cached; NaN without data."""
        if self._loss is None:
            self._loss = float(self.measure([{}])[0])
        return self._loss

    def _unit_gradients(self) -> Tensor:
        """Compute s_nu, (number of this rank's samples, num_units) float32, in one pass; cached."""
        if self._gradients is None:
            memory = _GradientMemory()
            scored = score_groups(
                self.model,
                self.graph,
                self.batches,
                memory,
                task=self.task,
                distributed=self.distributed,
                autocast=self.autocast,
            )
            unscored = [group.units for group in self.graph.prunable if group.index not in scored]
            self._unknown = np.concatenate([self.graph.ungated, *unscored])
            # A rank may have no data.
            empty = torch.zeros(0, self.graph.num_units, device=self.device)
            self._gradients = torch.cat(memory.seen) if memory.seen else empty
            total, count = self.distributed.all_reduce_sum(
                torch.stack([empty.new_zeros(()), *memory.totals]).sum(),
                torch.tensor(float(sum(num_samples(batch) for batch in self.batches))),
            )
            self._loss = float(total) / float(count)
        return self._gradients

    @torch.no_grad()
    def measure(self, candidates: Iterable[Keep], *, repaired: bool = True) -> np.ndarray:
        """Measure the mean calibration loss with each candidate's cut gated away.

        Args:
            candidates: Group → positions that stay; an empty mapping is the unchanged network.
            repaired: Use the weights of `repair`, if there is one.

        Returns:
            (number of candidates,) float64, equal on all ranks.
        """
        masks = [self.graph.keep_mask(keep) for keep in candidates]
        return self._measured(masks, self.repair if repaired else None)

    def _measured(self, masks: Sequence[np.ndarray], repair: LocalRepair | None) -> np.ndarray:
        if repair is not None:
            repair.prepare(masks)
        sums = torch.zeros(len(masks) + 2, dtype=torch.float64, device=self.device)
        with self.task.running(self.model), Gates(self.model, self.graph) as gates:
            shared = SharedPasses(self.model, gates, self.batches, masks, repair, enabled=self.shares)
            for number in shared.order:
                gates.set_mask(masks[number])
                with contextlib.ExitStack() as stack:
                    # Random sampling in the network is the same for every candidate.
                    stack.enter_context(random_state_kept(self.model))
                    if repair is not None:
                        stack.enter_context(repair.applied(masks[number]))
                    common = shared.common(masks[number])
                    sums[number] = self._total(shared, common)
                    if shared.enabled and number == shared.order[-1]:
                        sums[-2] = self._wrongly_shared(shared, common)
        sums[-1] = sum(num_samples(batch) for batch in self.batches)
        (reduced,) = self.distributed.all_reduce_sum(sums)
        figures = reduced.cpu().numpy()
        if figures[-2] and self.shares:
            self.shares = False
            return self._measured(masks, repair)
        return figures[:-2] / figures[-1] if figures[-1] else np.full(len(masks), np.nan)

    def _total(self, shared: SharedPasses, common: Collection[int]) -> Tensor:
        """Return the sum of this rank's losses, float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, batch in enumerate(self.batches):
            outputs = shared.run(number, functools.partial(self._outputs, batch), common)
            total += self.task.losses(outputs, batch).double().sum()
        return total

    def _wrongly_shared(self, shared: SharedPasses, common: Collection[int]) -> Tensor | float:
        """Run the first batch once with the shared beginning and once whole; return how many losses differ."""
        if not self.batches:
            return 0.0
        batch = self.batches[0]
        forward = functools.partial(self._outputs, batch)
        with random_state_kept(self.model):
            found = self.task.losses(shared.run(0, forward, common), batch)
        with random_state_kept(self.model):
            expected = self.task.losses(forward(), batch)
        return (~torch.isclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)).sum()

    def _outputs(self, batch: Any) -> Outputs:
        with self.autocast():
            return self.task.outputs(self.model, batch)


class _GradientMemory(GradientCriterion):
    """Stores the derivative of every sample's loss by every unit's gate, instead of reducing it to a score."""

    announces_unscored = False  # units without a gate have no derivative, which `estimate` reports

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.totals: list[Tensor] = []

    def objectives(self, model: nn.Module, batch: Any, task: Task) -> tuple[Tensor, ...]:
        """Return the sum of the batch's losses."""
        total = self.losses(model, batch, task).sum()
        self.totals.append(total.detach())
        return (total,)

    def reduce(self, gate_gradients: Tensor) -> Tensor:
        """Store (1, N, U) as (N, U); the returned score is unused."""
        self.seen.append(gate_gradients[0])
        return gate_gradients.new_zeros(gate_gradients.shape[-1])
