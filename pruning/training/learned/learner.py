"""Learning gates (Ganjdanesh et al., "Interpretations steered network pruning via amortized inferred saliency maps",
ECCV 2022): the explanation must not move while the cost goes down to the budget.

    min_θ   λ_s·E[mean_k (φ_k(x; v) − φ_k(x; 1))²] + w_C·E[CE(f(x; v), y)] + w_R·Σ_cost log(max(cost(v)/cost(1), p)/p)

v are the gates of `parametrisations.py` on the coupled channel groups of the engine. All weights are frozen (evaluation
mode, statistics fixed); φ(x; 1) is computed once. Images are a part of the training set that no weight was trained on.

One step on several ranks: every rank differentiates the loss of its own images by the gates, these derivatives are
summed over the ranks, and all ranks take the same step on the same parameters. Noise is a function of seed and step.

Departures from the published code: the cost is the true one of coupled groups for any metric (its resource term for
ResNets counts one convolution of each block against the whole network and starts at zero); images come in the
calibration split's fixed, shuffled order; nothing is selected on the test set, the final gates are used. The right size
of w_R relative to the matching loss depends on selector and network; if it is too small, all gates stay open.
`resource_growth` raises it epoch by epoch, as in a penalty method, for as long as the gates are above the budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NotRequired, Self, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from explainers.differentiable.gated_features import gated_features
from explainers.differentiable.remembered import OriginalExplanations
from image_classification.data.loader import Batch, Loader
from image_classification.distributed import Distributed
from image_classification.models import evaluating, main_and_auxiliary_logits
from pruning.costs.budget import Budget
from pruning.costs.cost_model import CostModel
from pruning.criteria.sample_losses import sample_losses
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.gates import Gates
from pruning.engine.groups import Group
from pruning.engine.tap_channels import output_place
from pruning.task import SampleLoss
from pruning.task.explained import Autocast
from pruning.training.learned.gate_settings import GateSettings
from pruning.training.learned.parametrisations import build_gates, draw_noise, harden, soft_gates

_FLOAT16_SCALE = 128.0  # otherwise derivatives of an image's loss underflow in float16
FIGURES = ("matching", "task")


class LearnerState(TypedDict):
    """State of learning: number of steps taken, the gates' parameters and optimizer, and sums of losses not yet
    read.
    """

    step: int
    growth: NotRequired[float]
    parametrisation: dict[str, Tensor]
    optimizer: dict[str, Any]
    sums: Tensor


@dataclasses.dataclass(frozen=True)
class _Known:
    """Precomputed values of a batch of calibration images: φ(x; 1) and the class it explains."""

    sample_ids: Tensor
    classes: Tensor
    original: Tensor


class GateLearner:
    """Trains gates; as a context manager it attaches them and keeps the network in evaluation mode.

    Args:
        model: The bare network; not modified.
        graph: Its channel graph.
        groups: The groups that get gates.
        costs, budget: Cost of any gates, and the budget to meet.
        originals: φ, with its values for all calibration images.
        calibration: Loader of the calibration images: the same ones in the same order in every epoch.
        settings: Settings of learning.
        seed: Seed of noise and initial values.
        loss: Per-sample task loss.
        distributed: The ranks.
        autocast: Creates the context of forward passes.
        scaled: Whether forward passes compute in float16.

    Attributes:
        step: Number of steps taken so far.
        growth: Current factor on the weight of the resource loss.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        groups: Sequence[Group],
        costs: CostModel,
        budget: Budget,
        originals: OriginalExplanations,
        calibration: Loader,
        settings: GateSettings,
        *,
        seed: int = 0,
        loss: SampleLoss = sample_losses,
        distributed: Distributed | None = None,
        autocast: Autocast = nullcontext,
        scaled: bool = False,
    ) -> None:
        self.model = model
        self.graph = graph
        self.groups = list(groups)
        self.costs = costs
        self.budget = budget
        self.originals = originals
        self.calibration = calibration
        self.settings = settings
        self.seed = seed
        self.loss = loss
        self.autocast = autocast
        self.distributed = distributed or Distributed()
        self.scale = _FLOAT16_SCALE if scaled else 1.0
        self.device = next(model.parameters()).device
        self.units = torch.from_numpy(np.concatenate([group.units for group in groups])).to(self.device)
        self.parametrisation = build_gates(
            settings.gates, [group.width for group in groups], seed, settings.gate_init
        )
        self.parametrisation.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.parametrisation.parameters(), lr=settings.gate_lr, weight_decay=settings.gate_weight_decay
        )
        self.step = 0
        self.growth = 1.0
        self._sums = torch.zeros(len(FIGURES) + 1, dtype=torch.float64, device=self.device)
        self._known: list[_Known] = []
        self._tap_units = self._units_at_taps()
        self._stack = ExitStack()

    def _units_at_taps(self) -> dict[str, Tensor]:
        """Return the unit of every channel that the explanation reads, by tap; num_units for channels without a
        unit.
        """
        found = {}
        for tap in self.originals.taps:
            place = output_place(self.graph, tap)
            if place is not None:
                units = np.where(place.units >= 0, place.units, self.graph.num_units)
                found[tap] = torch.from_numpy(units.astype(np.int64)).to(self.device)
        return found

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model, keep_random_state=True))
            self._gates = stack.enter_context(Gates(self.model, self.graph, self.groups))
            stack.enter_context(gated_features(self._gate_tap))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _gate_tap(self, tap: str, feature: Tensor) -> Tensor:
        if tap not in self._tap_units:
            return feature
        values = nn.functional.pad(self._gates.values, (0, 1), value=1.0)[self._tap_units[tap]]
        return feature * values.to(feature.dtype).reshape(1, -1, 1, 1)

    # -- learning ------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in one pass over the calibration images."""
        return len(self.calibration)

    @property
    def num_steps(self) -> int:
        """Number of steps in all passes."""
        return self.settings.gate_epochs * self.steps_per_epoch

    def learn(self) -> Iterator[int]:
        """Take the remaining steps; yields the number of steps taken after each. Collective."""
        while self.step < self.num_steps:
            done = self.step % self.steps_per_epoch
            for index, batch in enumerate(self.calibration):
                if index >= done:
                    self.take_step(batch, index)
                    self.step += 1
                    if self.step % self.steps_per_epoch == 0:
                        self._raise_price()
                    yield self.step

    @torch.no_grad()
    def _raise_price(self) -> None:
        """At the end of an epoch, raise the weight of the resource loss if the gates are above the budget."""
        if self.resource_loss(self._judged()) > 0:
            self.growth *= self.settings.resource_growth

    def take_step(self, batch: Batch, index: int) -> None:
        """Take one step of the gates on this rank's `index`-th batch of calibration images. Collective."""
        noise = draw_noise(self.settings.gate_noise, len(self.units), self.seed, self.step).to(self.device)
        soft = soft_gates(self._logits(), self.settings.gate_temperature, noise)
        hard = harden(soft)
        seen = (hard if self.settings.gate_sampling == "hard" else soft).detach().requires_grad_()
        derivative, sums = self._differentiate(seen, batch, index)
        derivative, sums = self.distributed.all_reduce_sum(derivative, sums)
        self._sums += sums
        derivative = (derivative / (self.scale * sums[-1])).to(soft.dtype)
        resource = self._price * self.resource_loss(self._everywhere(hard))
        self.optimizer.zero_grad(set_to_none=True)
        # Straight-through: derivatives with respect to hard gates are applied to the soft ones.
        torch.autograd.backward([soft, resource], [derivative, torch.ones_like(resource)])
        self.optimizer.step()

    def _differentiate(self, seen: Tensor, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        """Return the derivative of this rank's summed losses by the gates, and the sums: matching, task, images."""
        num_images = len(batch)
        sums = torch.zeros(len(FIGURES) + 1, dtype=torch.float64, device=self.device)
        if not num_images:
            return torch.zeros_like(seen), sums
        known = self._knowledge(batch, index)
        self._gates.values = self._everywhere(seen)
        with torch.enable_grad():
            matching, task = self._losses(batch.images, batch.targets, known)
            total = self.settings.matching_weight * matching + self.settings.gate_task_weight * task
            (derivative,) = torch.autograd.grad(total * self.scale, seen)
        sums[:] = torch.stack(
            [matching.detach().double(), task.detach().double(), sums.new_tensor(num_images)]
        )
        return derivative, sums

    def _losses(self, images: Tensor, targets: Tensor, known: _Known) -> tuple[Tensor, Tensor]:
        """Return matching and task loss, each summed over the images; the task loss is 0 if it has no weight."""
        with self.autocast():
            if not self.settings.matching_weight:
                logits, _ = main_and_auxiliary_logits(self.model(images))
                return logits.new_zeros(()).float(), self.loss(logits, targets).sum()
            logits_seen: list[Any] = []  # the network runs once, within `present`; its output is needed too
            handle = self.model.register_forward_hook(lambda module, args, output: logits_seen.append(output))
            try:
                phi = self.originals.present(self.model, images, known.classes).float()
            finally:
                handle.remove()
            matching = (phi - known.original).square().mean(1).sum()
            if not self.settings.gate_task_weight:
                return matching, matching.new_zeros(())
            logits, _ = main_and_auxiliary_logits(logits_seen[-1])
            return matching, self.loss(logits, targets).sum()

    def _knowledge(self, batch: Batch, index: int) -> _Known:
        """Return the precomputed values of the `index`-th batch, looked up in the first epoch and cached afterwards."""
        while len(self._known) <= index:
            self._known.append(_Known(torch.zeros(0), torch.zeros(0), torch.zeros(0)))
        known = self._known[index]
        if not torch.equal(known.sample_ids, batch.sample_ids):
            classes, original = self.originals.lookup(batch.images)
            known = self._known[index] = _Known(batch.sample_ids, classes, original)
        return known

    def resource_loss(self, values: Tensor) -> Tensor:
        """Compute Σ log(max(cost/baseline, p)/p) over the budgets; 0 if all are met.

        Args:
            values: (num_units,) gates by unit id; differentiable.

        Returns:
            Scalar float64.
        """
        total = values.new_zeros((), dtype=torch.float64)
        for metric, share in self.budget.shares.items():
            cost = self.costs.cost(metric, values) / self.costs.baseline(metric)
            total = total + torch.log(cost.clamp_min(share) / share)
        return total

    @property
    def _price(self) -> float:
        """Return the current w_R."""
        return self.settings.resource_weight * self.growth

    def _judged(self) -> Tensor:
        """Return the gates used for the budget, over all units: open or closed, without noise."""
        return self._everywhere((self._logits() >= 0).float())

    def _everywhere(self, gates: Tensor) -> Tensor:
        """Expand the gates of the gated groups to a vector over all units, 1 elsewhere."""
        ones = torch.ones(self.graph.num_units, dtype=gates.dtype, device=gates.device)
        return ones.index_copy(0, self.units, gates)

    def _logits(self) -> Tensor:
        theta: Tensor = self.parametrisation()
        return theta + self.settings.gate_base

    # -- reading the gates --------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self) -> dict[int, np.ndarray]:
        """Return group index → (width,) logits θ + base, without noise."""
        values = self._logits().double().cpu().numpy()
        borders = np.cumsum([group.width for group in self.groups])[:-1]
        return {group.index: part for group, part in zip(self.groups, np.split(values, borders), strict=True)}

    def read(self) -> dict[str, float]:
        """Return figures since the last call: mean losses, and the cost of the open gates without noise."""
        totals, self._sums = self._sums.cpu(), torch.zeros_like(self._sums)
        figures = {name: float(totals[i] / totals[-1]) for i, name in enumerate(FIGURES)}
        if not self.settings.gate_task_weight:
            del figures["task"]
        with torch.no_grad():
            values = self._judged()
        figures["resource"] = float(self.resource_loss(values))
        figures["resource_weight"] = self._price
        for metric in self.budget.shares:
            cost = float(self.costs.cost(metric, values))
            figures[f"{metric}_share"] = cost / self.costs.baseline(metric)
        return figures

    # -- checkpoints ---------------------------------------------------------------------------------------

    def state_dict(self) -> LearnerState:
        """Return parameters, optimizer and progress, as plain data and tensors."""
        return {
            "step": self.step,
            "growth": self.growth,
            "parametrisation": dict(self.parametrisation.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "sums": self._sums,
        }

    def load_state_dict(self, state: LearnerState) -> None:
        """Continue from a state. Learning rate and decay come from this run's settings, not from the state."""
        self.step = state["step"]
        self.growth = state.get("growth", 1.0)
        self.parametrisation.load_state_dict(state["parametrisation"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self._sums = state["sums"].to(self.device)
