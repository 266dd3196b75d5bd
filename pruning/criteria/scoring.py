"""Scores of all channel groups by one or several criteria, from one pass over the calibration batches.

    for batch:   forward without gradients        feature maps are summed in the hook and freed at once
                 forward, then K backward passes  derivatives by gates of ones where layers read their input
    at the end   sums of all ranks in one all-reduce; score of a unit = sum over its places

Modes, random state, batch-norm statistics and `.grad` of the network are restored. There is no host sync before the
end, except where a criterion looks at values (float32 discriminant scores, saliency).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from image_classification.config import SettingError
from image_classification.distributed import Distributed
from image_classification.models.checkpointing import checkpoints_passed_through
from pruning.criteria.combine import Combined
from pruning.criteria.criterion import (
    Criterion,
    FeatureCriterion,
    Features,
    GradientCriterion,
    GroupWeights,
    NetworkCriterion,
    Summary,
    WeightCriterion,
    WeightMember,
)
from pruning.criteria.taps import Tap, tapped
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.groups import Group, Member, Place
from pruning.engine.tap_channels import output_place
from pruning.task import Batch, Targets, Task, num_samples, pieces_of, targets_of, to_device
from pruning.task.explained import Autocast

log = logging.getLogger(__name__)

Scores = dict[int, Tensor]

# Products g·a are formed in blocks of samples, so that they need little memory.
_GATE_BLOCK_ELEMENTS = 1 << 22

_FLOAT16_SCALE = 128.0  # derivatives of one sample's loss underflow in float16 without


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning only once per process, since scores are computed many times in a run. `cache_clear` resets it."""
    log.warning(message)


class Graph(Protocol):
    """The part of `ChannelGraph` that scoring needs."""

    num_units: int
    places: list[Place]
    ungated: np.ndarray  # units that are also read outside modules, where no gate can be put

    @property
    def prunable(self) -> list[Group]:
        """The groups to score."""

    def members(self, group: Group) -> list[Member]:
        """Return the tensor slices of a group."""

    def places_of(self, group: Group, kind: str | None = None, consumer: bool | None = None) -> list[Place]:
        """Return the module inputs and outputs that carry a group's units."""


@dataclasses.dataclass(eq=False)
class _Site:
    """A tensor in the forward pass and the unit of each of its channels (the last index collects the rest)."""

    place: Place
    units: Tensor

    def channels_first(self, tensor: Tensor, num_samples: int) -> Tensor:
        """Return the tensor as (N, C, …), wherever its channels are; windows of a sample become positions."""
        if tensor.shape[0] == num_samples:
            return tensor.movedim(self.place.dim, 1)
        if tensor.shape[0] % num_samples or self.place.dim == 0:
            raise SettingError(
                "ignored",
                self.place.module,
                f"give this: the {self.place.kind} of the module has shape {tuple(tensor.shape)}, whose first "
                f"dimension is not the {num_samples} samples of the batch, so it cannot be scored",
            )
        windows: Tensor = tensor.unflatten(0, (num_samples, -1))
        return windows.movedim(self.place.dim + 1, 1)


def parts_of(criterion: Criterion) -> list[Criterion]:
    """Return the parts of a combined criterion, or the criterion itself."""
    return [criterion.first, criterion.second] if isinstance(criterion, Combined) else [criterion]


def looks_at_weights_only(criterion: Criterion) -> bool:
    """Whether a criterion scores without calibration batches."""
    return all(isinstance(part, WeightCriterion) for part in parts_of(criterion))


def needs_loss(criterion: Criterion) -> bool:
    """Whether a criterion differentiates the task's loss."""
    return any(
        isinstance(part, GradientCriterion)
        and type(part).gated_objectives is GradientCriterion.gated_objectives
        and part.loss is None
        for part in parts_of(criterion)
    )


def score_groups(
    model: nn.Module,
    graph: Graph,
    batches: Iterable[Batch],
    criterion: Criterion,
    *,
    task: Task | None = None,
    groups: Sequence[Group] | None = None,
    distributed: Distributed | None = None,
    autocast: Autocast | None = None,
) -> Scores:
    """Score the units of channel groups by one criterion; see `score_groups_by`."""
    scores = score_groups_by(
        model,
        graph,
        batches,
        parts_of(criterion),
        task=task,
        groups=groups,
        distributed=distributed,
        autocast=autocast,
    )
    return criterion.combine(*scores) if isinstance(criterion, Combined) else scores[0]


def score_groups_by(
    model: nn.Module,
    graph: Graph,
    batches: Iterable[Batch],
    criteria: Sequence[Criterion],
    *,
    task: Task | None = None,
    groups: Sequence[Group] | None = None,
    distributed: Distributed | None = None,
    autocast: Autocast | None = None,
) -> list[Scores]:
    """Score the units of channel groups by several criteria in one pass.

    Args:
        model: The bare network that `graph` describes, on any device, in any mode. Unchanged afterwards.
        graph: Its channel graph.
        batches: Batches of the task, such as pairs (images (N, 3, H, W), targets (N,) or (N, L)); this rank's share,
            which may be empty. Not read when all criteria look at weights only.
        criteria: What to score by.
        task: How the network is run on a batch and judged; by default it is a classifier.
        groups: The groups to score; all prunable ones by default.
        distributed: The ranks; sums are added over all of them. None: this process alone.
        autocast: Makes the context of the forward passes, `Precision.autocast` for instance.

    Returns:
        For every criterion: group index → (width,) float64 on the CPU, the same on all ranks. A group that the
        criterion cannot score is left out, with a warning: an auxiliary head that only trains, bn-scale without a
        batch norm, derivatives by gates of channels that are read outside any module.

    Raises:
        SettingError: No batch on any rank, or a criterion that fits no group.
        ValueError: Scores that are not finite.
    """
    groups = list(graph.prunable if groups is None else groups)
    task = task or Task()
    scorer = _Scorer(model, graph, groups, criteria, task, distributed or Distributed(), autocast)
    if scorer.networks:
        batches = [to_device(batch, scorer.device) for batch in batches]
        scorer.score_networks(batches)
    if scorer.needs_data:
        with task.running(model):
            scorer.run(batches)
    results = [scorer.result(number, criterion) for number, criterion in enumerate(criteria)]
    # What ranks compute of the same sums may differ in the last bit, and a search would then take other steps.
    scorer.distributed.broadcast_tensors([scores[index] for scores in results for index in sorted(scores)])
    return results


class _Scorer:
    """Sums of one pass."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        groups: list[Group],
        criteria: Sequence[Criterion],
        task: Task,
        distributed: Distributed,
        autocast: Autocast | None,
    ) -> None:
        self.model = model
        self.graph = graph
        self.groups = groups
        self.criteria = criteria
        self.task = task
        self.distributed = distributed
        self.autocast = autocast or contextlib.nullcontext
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.features = [(n, c) for n, c in enumerate(criteria) if isinstance(c, FeatureCriterion)]
        self.gradients = [(n, c) for n, c in enumerate(criteria) if isinstance(c, GradientCriterion)]
        self.networks = [(n, c) for n, c in enumerate(criteria) if isinstance(c, NetworkCriterion)]
        self.of_network: dict[int, Scores] = {}
        self.needs_data = bool(self.features or self.gradients)
        width = graph.num_units + 1
        # One row per criterion: the sum for every unit. A second one counts the tensors that showed the unit.
        self.sums = torch.zeros(len(criteria), width, dtype=torch.float64, device=self.device)
        self.shown = torch.zeros(len(criteria), width, dtype=torch.float64, device=self.device)
        # Units that are read where no gradient is recorded: in a frozen part, or a checkpoint of the user's own.
        self.hidden = torch.zeros(width, dtype=torch.float64, device=self.device)
        self.counts = torch.zeros(2, dtype=torch.float64, device=self.device)

    # -- the pass ------------------------------------------------------------------------------------------

    def run(self, batches: Iterable[Batch]) -> None:
        """Take all batches of this rank, then add up the ranks."""
        sites = {kind: self._sites(kind) for kind in {c.features for _, c in self.features}}
        read = self._sites("post", fall_back=False) if self.gradients else []
        for batch in batches:
            count = num_samples(batch)
            if count == 0:
                continue
            batch = to_device(batch, self.device)
            if self.features:
                self._feature_pass(batch, sites)
            for number, criterion in self.gradients:
                for piece in pieces_of(batch, criterion.pieces):
                    self._gradient_pass(number, criterion, piece, read)
            counted = torch.tensor([1.0, count], dtype=torch.float64)
            self.counts += counted.to(self.device, non_blocking=True)
        self.sums, self.shown, self.hidden, self.counts = self.distributed.all_reduce_sum(
            self.sums, self.shown, self.hidden, self.counts
        )
        if not self.counts[0]:
            raise SettingError(
                "calibration_size",
                0,
                "there is no calibration batch to score channels with: give more images",
            )

    def score_networks(self, batches: Sequence[Batch]) -> None:
        """Run the criteria that make passes of their own over the batches."""
        assert isinstance(self.graph, ChannelGraph), "only a whole graph says what reads which units"
        for number, criterion in self.networks:
            self.of_network[number] = criterion.score_network(
                self.model, self.graph, self.groups, batches, self.task, self.distributed
            )

    def _sites(self, kind: str, fall_back: bool = True) -> list[_Site]:
        """Return the tensors that carry the groups' units, each once, with all groups of a tensor together."""
        places: dict[int, Place] = {}
        for group in self.groups:
            chosen = self._producers(group) if kind == "pre" else self._consumers(group)
            if not chosen and fall_back:
                chosen = self._consumers(group) or self.graph.places_of(group, kind="output")[:1]
            places.update((id(place), place) for place in chosen)
        return [self._site(place) for place in places.values()]

    def _site(self, place: Place) -> _Site:
        """Return a place with the units of the groups that are scored."""
        wanted = (
            np.concatenate([group.units for group in self.groups]) if self.groups else np.empty(0, np.int64)
        )
        units = np.where(np.isin(place.units, wanted), place.units, self.graph.num_units)
        return _Site(place, torch.from_numpy(units.astype(np.int64)).to(self.device))

    def _producers(self, group: Group) -> list[Place]:
        """Return the outputs of the layers that produce the group's units."""
        makers = {
            alias.rpartition(".")[0]
            for m in self.graph.members(group)
            if m.role == "out"
            for alias in m.aliases
        }
        return [place for place in self.graph.places_of(group, kind="output") if place.module in makers]

    def _consumers(self, group: Group) -> list[Place]:
        """Return the inputs of the layers that read the group's units."""
        return self.graph.places_of(group, kind="input", consumer=True)

    # -- feature maps --------------------------------------------------------------------------------------

    def _feature_pass(self, batch: Batch, sites: Mapping[Features, list[_Site]]) -> None:
        """Run one forward pass for all criteria that read feature maps, and another for those that ask for one."""
        targets = targets_of(batch)
        count = num_samples(batch)
        for _, criterion in self.features:
            criterion.check_targets(targets)
        waiting = self.features
        while waiting:
            collectors = [
                _Collector(number, criterion, targets, count, self.sums) for number, criterion in waiting
            ]
            taps = [
                Tap(
                    site.place.module,
                    site.place.kind,
                    site.place.call,
                    functools.partial(collector.take, site),
                )
                for collector in collectors
                for site in sites[collector.criterion.features]
            ]
            with tapped(self.model, taps), torch.no_grad():
                with self.autocast():
                    self.task.outputs(self.model, batch)
                for collector in collectors:
                    collector.flush()
            repeated = [collector.criterion.must_repeat() for collector in collectors]
            waiting = [pair for pair, again in zip(waiting, repeated, strict=True) if again]
            for collector, again in zip(collectors, repeated, strict=True):
                if not again:
                    self.sums[collector.number] += collector.sums
                    self.shown[collector.number] += collector.shown

    # -- derivatives by gates ------------------------------------------------------------------------------

    def _gradient_pass(
        self, number: int, criterion: GradientCriterion, batch: Batch, sites: list[_Site]
    ) -> None:
        """Run one forward pass, and a backward pass per objective."""
        gates: list[tuple[_Site, Tensor]] = []
        in_float16: list[bool] = []
        watched = self._watched(criterion.watched())

        def install(site: _Site, tensor: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # no derivative comes from here, though the units matter
                self.hidden[site.units] = 1
                return tensor
            gate = torch.ones(
                tensor.shape[0], tensor.shape[site.place.dim], device=tensor.device, requires_grad=True
            )
            gates.append((site, gate))
            in_float16.append(tensor.dtype == torch.float16)
            gated: Tensor = _Gate.apply(tensor, gate, site.place.dim)
            return gated

        taps = [
            Tap(site.place.module, site.place.kind, site.place.call, functools.partial(install, site))
            for site in sites
        ]
        with checkpoints_passed_through(), tapped(self.model, taps), torch.enable_grad():
            with self.autocast():
                objectives = criterion.gated_objectives(
                    self.model,
                    batch,
                    self.task,
                    lambda name, tensor: install(watched[name], tensor) if name in watched else tensor,
                )
            if not gates:
                return
            scale = _FLOAT16_SCALE if any(in_float16) else 1.0
            scaled = [objective * scale for objective in objectives]
            derivatives, reached = self._differentiate(scaled, gates, num_samples(batch))
        self.sums[number] += criterion.reduce((derivatives / scale).double()).double()
        for site in reached:
            self.shown[number].index_add_(0, site.units, torch.ones_like(site.units, dtype=torch.float64))

    def _watched(self, modules: Iterable[str]) -> dict[str, _Site]:
        """Return the outputs of modules that carry units of the groups, by module."""
        sites = {}
        for module in modules:
            place = output_place(self.graph, module)
            if place is not None:
                sites[module] = self._site(place)
        return sites

    def _differentiate(
        self, objectives: Sequence[Tensor], gates: list[tuple[_Site, Tensor]], count: int
    ) -> tuple[Tensor, list[_Site]]:
        """(K, N, units + 1) float32: derivative of every objective of every sample by every unit's gate.

        Also returns the sites that the objectives depend on. The other sites say nothing about their units.
        """
        result = torch.zeros(len(objectives), count, self.graph.num_units + 1, device=self.device)
        reached: dict[int, _Site] = {}
        for k, objective in enumerate(objectives):
            if not objective.requires_grad:
                continue
            found = torch.autograd.grad(
                objective,
                [gate for _, gate in gates],
                retain_graph=k + 1 < len(objectives),
                allow_unused=True,
            )
            for (site, _), gradient in zip(gates, found, strict=True):
                if gradient is not None and len(gradient):
                    result[k].index_add_(1, site.units, _per_sample(gradient, count))
                    reached[id(site)] = site
        return result, list(reached.values())

    # -- results -------------------------------------------------------------------------------------------

    def result(self, number: int, criterion: Criterion) -> Scores:
        """Return the scores of one criterion by group index, on the CPU."""
        if isinstance(criterion, WeightCriterion):
            found = [criterion.score_group(self._weights(group)) for group in self.groups]
        elif isinstance(criterion, NetworkCriterion):
            found = [self.of_network[number].get(group.index) for group in self.groups]
        else:
            found = self._averaged(number, criterion)
        unscored = [group.name for group, scores in zip(self.groups, found, strict=True) if scores is None]
        if self.groups and len(unscored) == len(self.groups) and criterion.announces_unscored:
            raise SettingError(
                "criterion",
                criterion.name,
                "no group of this network has what it looks at; use discriminant, taylor or magnitude",
            )
        if unscored and criterion.announces_unscored and self.distributed.is_main:
            warn_once(f"criterion {criterion.name} cannot score {', '.join(unscored)}: left as they are")
        messages = criterion.warnings()  # asking empties them, so every rank asks
        for message in messages if self.distributed.is_main else ():
            warn_once(message)
        scored = [
            (group, scores.detach().double())
            for group, scores in zip(self.groups, found, strict=True)
            if scores is not None
        ]
        for group, scores in scored:
            if scores.shape != (group.width,):
                raise ValueError(
                    f"criterion {criterion.name!r} gave scores of shape {tuple(scores.shape)} for the {group.width} "
                    f"units of group {group.name!r}"
                )
        # one copy for all groups: a GPU is waited for once
        together = torch.cat([scores for _, scores in scored]).cpu() if scored else torch.zeros(0)
        parts = together.split([group.width for group, _ in scored])
        return {
            group.index: self._finite(part.clone(), criterion, group)
            for (group, _), part in zip(scored, parts, strict=True)
        }

    def _averaged(self, number: int, criterion: Criterion) -> list[Tensor | None]:
        """Return the scores from the sums, on the CPU; None for a group that the pass showed partly or not at all."""
        num_batches, num_samples = self.counts.tolist()
        divisor = {"none": 1.0, "batches": num_batches, "samples": num_samples}[criterion.average]
        values, shown = (self.sums[number] / divisor).cpu(), self.shown[number].cpu()
        if isinstance(criterion, GradientCriterion):
            shown[torch.from_numpy(self.graph.ungated)] = 0
            shown[self.hidden.cpu() > 0] = 0
        units = [torch.from_numpy(group.units) for group in self.groups]
        return [values[u] if (shown[u] > 0).all() else None for u in units]

    def _weights(self, group: Group) -> GroupWeights:
        modules, parameters = dict(self.model.named_modules()), dict(self.model.named_parameters())
        members = tuple(
            WeightMember(
                m.tensor,
                modules[m.tensor.rpartition(".")[0]],
                parameters[m.tensor].detach(),
                m.dim,
                m.role,
                torch.from_numpy(m.positions),
            )
            for m in self.graph.members(group)
            if m.tensor in parameters
        )
        return GroupWeights(group.name, group.width, members)

    @staticmethod
    def _finite(scores: Tensor, criterion: Criterion, group: Group) -> Tensor:
        if not torch.isfinite(scores).all():
            raise ValueError(
                f"criterion {criterion.name!r}: scores of group {group.name!r} are not finite; its weights or "
                "feature maps hold NaN or infinity (a diverged network?)"
            )
        return scores


def _per_sample(gradient: Tensor, count: int) -> Tensor:
    """Convert derivatives of rows, (R, C), to derivatives of samples, (N, C).

    Where rows are not a fixed number per sample (regions, anchors), each sample gets an equal share of their sum, which
    is exact for everything linear in the derivatives.
    """
    if len(gradient) % count == 0:
        found: Tensor = gradient.unflatten(0, (count, -1)).sum(1)
        return found
    return (gradient.sum(0, keepdim=True) / count).expand(count, -1)


class _Collector:
    """The scores that one criterion computes in one forward pass."""

    def __init__(
        self, number: int, criterion: FeatureCriterion, targets: Targets, num_samples: int, sums: Tensor
    ) -> None:
        self.number = number
        self.criterion = criterion
        self.targets = targets
        self.num_samples = num_samples
        self.sums = torch.zeros_like(sums[number])
        self.shown = torch.zeros_like(self.sums)
        self.sites: list[_Site] = []
        self.summaries: list[Summary] = []
        self.num_bytes = 0
        self.seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def take(self, site: _Site, tensor: Tensor) -> None:
        """Process a tensor. A tensor that several layers read counts once."""
        if self.seen.get(tensor) == tensor._version:
            return
        self.seen[tensor] = tensor._version
        with torch.autocast(tensor.device.type, enabled=False):
            maps = site.channels_first(tensor.detach(), self.num_samples)
            summary = self.criterion.summarise(maps, self.targets)
        self.sites.append(site)
        self.summaries.append(summary)
        self.num_bytes += summary.nbytes
        if self.num_bytes > self.criterion.pending_bytes:
            self.flush()

    def flush(self) -> None:
        """Add the scores of the summaries to the sums."""
        with torch.autocast(self.sums.device.type, enabled=False):
            found = self.criterion.finish(self.summaries, self.targets)
        for site, scores in zip(self.sites, found, strict=True):
            self.sums.index_add_(0, site.units, scores.double())
            self.shown.index_add_(0, site.units, torch.ones_like(scores, dtype=torch.float64))
        self.sites = []
        self.summaries = []
        self.num_bytes = 0


class _GateContext(Protocol):
    """The context of `_Gate` for its backward pass: tensor, gate, and the dimension of the units."""

    saved_tensors: tuple[Tensor, Tensor]
    dim: int

    def save_for_backward(self, tensor: Tensor, gate: Tensor) -> None:
        """Save the tensor and the gate."""


def _real_product(tensor: Tensor, gradient: Tensor) -> Tensor:
    """Return the derivative with respect to a real factor on each element, float32."""
    if tensor.is_complex():
        return (tensor * gradient.conj()).real.float()
    return tensor.float() * gradient.float()


class _Gate(torch.autograd.Function):
    """Multiply by a gate of ones without doing so: the tensor goes through, the gate gets its derivative Σ g·a.

    In a backward pass that is itself differentiated (a Grad-CAM map) the gate takes part as the factor that it is.
    """

    @staticmethod
    def forward(ctx: _GateContext, tensor: Tensor, gate: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(tensor, gate)
        ctx.dim = dim
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: _GateContext, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (tensor, gate), gradient = ctx.saved_tensors, gradients[0]
        others = [d for d in range(1, tensor.dim()) if d != ctx.dim]
        if torch.is_grad_enabled():
            product = _real_product(tensor, gradient)
            shape = [s if d in (0, ctx.dim) else 1 for d, s in enumerate(tensor.shape)]
            factor = gate.to(gradient.dtype).reshape(shape)
            return gradient * factor, product.sum(others) if others else product, None
        per_block = max(1, _GATE_BLOCK_ELEMENTS * len(tensor) // max(1, tensor.numel()))
        sums = []
        for a, g in zip(tensor.split(per_block), gradient.split(per_block), strict=True):
            product = _real_product(a, g)
            sums.append(product.sum(others) if others else product)
        return gradient, torch.cat(sums), None
