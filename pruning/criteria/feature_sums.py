"""Sums of one criterion's scores over the feature maps of one forward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pruning.criteria.criterion import FeatureCriterion, Summary
from pruning.criteria.sites import Site
from pruning.task import Targets


class Collector:
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
        self.sites: list[Site] = []
        self.summaries: list[Summary] = []
        self.num_bytes = 0
        self.seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def take(self, site: Site, tensor: Tensor) -> None:
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
