"""Scores of all channel groups by one or several criteria, from one pass over the calibration batches.

    for batch:   forward without gradients        feature maps are summed in the hook and freed at once
                 forward, then K backward passes  derivatives by gates of ones where layers read their input
    at the end   sums of all ranks in one all-reduce; score of a unit = sum over its places

Modes, random state, batch-norm statistics and `.grad` of the network are restored. There is no host sync before the
end, except where a criterion looks at values (float32 discriminant scores, saliency).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

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
    WeightCriterion,
    WeightMember,
)
from pruning.criteria.feature_sums import Collector
from pruning.criteria.gate_derivatives import Gate, differentiate
from pruning.criteria.sites import Graph, Site, Sites
from pruning.criteria.taps import Tap, tapped
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.groups import Group
from pruning.task import Batch, Task, num_samples, pieces_of, targets_of, to_device
from pruning.task.explained import Autocast

log = logging.getLogger(__name__)

Scores = dict[int, Tensor]

_FLOAT16_SCALE = 128.0  # derivatives of one sample's loss underflow in float16 without


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning only once per process, since scores are computed many times in a run. `cache_clear` resets it."""
    log.warning(message)


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
        self.sites = Sites(graph, groups, self.device)
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
        sites = {kind: self.sites.showing(kind) for kind in {c.features for _, c in self.features}}
        read = self.sites.showing("post", fall_back=False) if self.gradients else []
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

    # -- feature maps --------------------------------------------------------------------------------------

    def _feature_pass(self, batch: Batch, sites: Mapping[Features, list[Site]]) -> None:
        """Run one forward pass for all criteria that read feature maps, and another for those that ask for one."""
        targets = targets_of(batch)
        count = num_samples(batch)
        for _, criterion in self.features:
            criterion.check_targets(targets)
        waiting = self.features
        while waiting:
            collectors = [
                Collector(number, criterion, targets, count, self.sums) for number, criterion in waiting
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
        self, number: int, criterion: GradientCriterion, batch: Batch, sites: list[Site]
    ) -> None:
        """Run one forward pass, and a backward pass per objective."""
        gates: list[tuple[Site, Tensor]] = []
        in_float16: list[bool] = []
        watched = self.sites.watched(criterion.watched())

        def install(site: Site, tensor: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # no derivative comes from here, though the units matter
                self.hidden[site.units] = 1
                return tensor
            gate = torch.ones(
                tensor.shape[0], tensor.shape[site.place.dim], device=tensor.device, requires_grad=True
            )
            gates.append((site, gate))
            in_float16.append(tensor.dtype == torch.float16)
            gated: Tensor = Gate.apply(tensor, gate, site.place.dim)
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
            derivatives, reached = differentiate(scaled, gates, num_samples(batch), self.graph.num_units + 1)
        self.sums[number] += criterion.reduce((derivatives / scale).double()).double()
        for site in reached:
            self.shown[number].index_add_(0, site.units, torch.ones_like(site.units, dtype=torch.float64))

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
            looked_at = "what it looks at; use discriminant, taylor or magnitude"
            if isinstance(criterion, GradientCriterion):
                looked_at = "a gradient of the loss: do not detach the loss, or use discriminant or magnitude"
            raise SettingError("criterion", criterion.name, f"no group of this network has {looked_at}")
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
