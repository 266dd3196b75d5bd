"""Localisation figures of attribution methods on a network: the loop over a split, counted as published.

A pair is (image, class with a pixel in its mask). Figures are means over the pairs that the network predicts (logit > 0
for several labels, the highest logit for one); the remaining pairs are only counted. A map with a NaN is skipped and
counted. Box figures (CASM's) are taken over all images, predicted or not, for the labelled class.

Sums are exact over ranks: each image is seen once, and sums and counts are added before they are divided.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explainers.attribution.method import Attribution, Prepared
from explainers.measures.behind import Behind
from explainers.measures.ground_truth import Annotated, annotated
from explainers.measures.localization import (
    as_saliency,
    box_figures,
    energy_inside,
    object_rectangle,
    pixel_auc,
    pointing_hit,
)
from explainers.measures.perturbation import (
    Predict,
    curve_area,
    deletion_curve,
    insertion_curve,
    saliency_metric,
)
from image_classification.data.loader import Batch
from image_classification.distributed import Distributed

Metric = Literal["point", "auc", "energy", "boxes", "saliency", "curves"]
METRICS: tuple[Metric, ...] = get_args(Metric)
POINT_TOLERANCE = 15

# The figures of each metric, in the order of columns.
FIGURES: dict[Metric, tuple[str, ...]] = {
    "point": ("point", f"point_{POINT_TOLERANCE}px"),
    "auc": ("auc",),
    "energy": ("energy",),
    "boxes": ("f1", "f1a", "le", "om"),
    "saliency": ("saliency",),
    "curves": ("deletion", "insertion"),
}
COUNTS = ("images", "pairs", "predicted", "nan_maps")


def figure_names(metrics: Collection[str]) -> list[str]:
    """Return the figures of some metrics, in the order of columns."""
    names: list[str] = []
    for metric, figures in FIGURES.items():
        if metric in metrics:
            names += figures
    return names


class Batches(Protocol):
    """The part of a loader's interface that the loop uses."""

    num_samples: int

    def __iter__(self) -> Iterator[Batch]: ...


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a method on a network.

    Attributes:
        network, method: Their names.
        figures: Mean by figure; NaN where nothing was counted.
        counted: Number of values behind each figure; less than `predicted` where some were undefined.
        counts: `images`, `pairs`, `predicted`, `nan_maps`.
        seconds: Time spent computing maps, on this rank.
    """

    network: str
    method: str
    figures: dict[str, float]
    counted: dict[str, int]
    counts: dict[str, int]
    seconds: float


class _Sums:
    """Sums and counts of a method's figures."""

    def __init__(self, metrics: Sequence[str]) -> None:
        self.names = figure_names(metrics)
        self.sums = dict.fromkeys(self.names, 0.0)
        self.counted = dict.fromkeys(self.names, 0)
        self.counts = dict.fromkeys(COUNTS, 0)
        self.seconds = 0.0

    def add(self, figure: str, value: float) -> None:
        """Add a value, unless it is undefined."""
        if not math.isnan(value):
            self.sums[figure] += value
            self.counted[figure] += 1

    def row(self, network: str, method: str, distributed: Distributed) -> Row:
        """Return the line of the table, over all ranks. Collective."""
        sums, counted, counts = distributed.all_reduce_sum(
            torch.tensor([self.sums[name] for name in self.names], dtype=torch.float64),
            torch.tensor([self.counted[name] for name in self.names], dtype=torch.int64),
            torch.tensor([self.counts[name] for name in COUNTS], dtype=torch.int64),
        )
        means = {}
        for name, total, count in zip(self.names, sums.tolist(), counted.tolist(), strict=True):
            means[name] = total / count if count else math.nan
        return Row(
            network,
            method,
            means,
            dict(zip(self.names, counted.tolist(), strict=True)),
            dict(zip(COUNTS, counts.tolist(), strict=True)),
            self.seconds,
        )


def localize(
    network: str,
    methods: Mapping[str, Prepared],
    predict: Predict,
    loader: Batches,
    *,
    metrics: Sequence[str],
    multi_label: bool,
    distributed: Distributed,
    max_pairs: int,
    advance: Callable[[int], None] = lambda _images: None,
) -> list[Row]:
    """Measure several methods on one network.

    Args:
        network: Its name, for the table.
        methods: Methods prepared for the network, by name.
        predict: The network in evaluation mode, without gradients.
        loader: Batches with masks or boxes.
        metrics: Some of `METRICS`.
        multi_label: Several classes may be present at once.
        distributed: Ranks to sum over. Collective.
        max_pairs: Number of pairs to explain at once.
        advance: Called with the number of images done.

    Returns:
        A row per method.
    """
    with Behind() as behind:
        judges = {
            name: _Judge(prepared, predict, metrics, multi_label, behind)
            for name, prepared in methods.items()
        }
        for batch in loader:
            if not len(batch):
                continue
            truths = list(annotated(batch))
            logits = predict(batch.images)
            for judge in judges.values():
                judge.add(batch, truths, logits, max_pairs)
            advance(len(batch))
    return [judge.sums.row(network, name, distributed) for name, judge in judges.items()]


@dataclasses.dataclass(frozen=True)
class _Pair:
    """An image of a batch and a class to explain."""

    truth: Annotated
    target: int
    predicted: bool
    has_mask: bool
    has_boxes: bool


class _Judge:
    """Collects the figures of one method."""

    def __init__(
        self,
        prepared: Prepared,
        predict: Predict,
        metrics: Sequence[str],
        multi_label: bool,
        behind: Behind,
    ) -> None:
        self.prepared = prepared
        self.predict = predict
        self.behind = behind
        self.metrics = set(metrics)
        self.multi_label = multi_label
        self.sums = _Sums(metrics)

    def add(self, batch: Batch, truths: Sequence[Annotated], logits: Tensor, max_pairs: int) -> None:
        """Explain and judge the pairs of a batch."""
        pairs = self._pairs(truths, logits)
        self.sums.counts["images"] += len(truths)
        self.sums.counts["pairs"] += sum(pair.has_mask for pair in pairs)
        self.sums.counts["predicted"] += sum(pair.has_mask and pair.predicted for pair in pairs)
        wanted = [pair for pair in pairs if self._is_judged(pair)]
        for begin in range(0, len(wanted), max_pairs):
            self._judge(batch.images, wanted[begin : begin + max_pairs])

    def _pairs(self, truths: Sequence[Annotated], logits: Tensor) -> list[_Pair]:
        """Return all pairs; pairs for box figures are labelled classes with boxes."""
        positive = (logits > 0).cpu().numpy()
        top = logits.argmax(1).tolist()
        pairs = []
        for truth in truths:
            boxed = set(truth.boxes).intersection(truth.labels)
            for target in sorted(boxed.union(truth.masks)):
                highest = top[truth.row] == target
                predicted = bool(positive[truth.row, target]) if self.multi_label else highest
                pairs.append(_Pair(truth, target, predicted, target in truth.masks, target in boxed))
        return pairs

    def _is_judged(self, pair: _Pair) -> bool:
        return (pair.has_mask and pair.predicted) or (pair.has_boxes and "boxes" in self.metrics)

    def _judge(self, images: Tensor, pairs: Sequence[_Pair]) -> None:
        rows = torch.tensor([pair.truth.row for pair in pairs], device=images.device)
        targets = torch.tensor([pair.target for pair in pairs], device=images.device)
        chosen = images[rows]
        begin = time.perf_counter()
        result: Attribution = self.prepared(chosen, targets)
        maps = result.map.cpu().numpy()  # waits for the device
        self.sums.seconds += time.perf_counter() - begin
        sound = np.isfinite(maps).all(axis=(1, 2))
        self.sums.counts["nan_maps"] += int((~sound).sum())
        self.behind.do(functools.partial(self._against_truth, pairs, maps, sound))
        if self.metrics & {"saliency", "curves"}:
            kept = [i for i, pair in enumerate(pairs) if sound[i] and pair.predicted and pair.has_mask]
            if kept:
                self._against_network(chosen[kept], targets[kept], result.map[kept], maps[kept])

    def _against_truth(
        self, pairs: Sequence[_Pair], maps: NDArray[np.float32], sound: NDArray[np.bool_]
    ) -> None:
        """Add figures that compare maps with masks and boxes."""
        for pair, heatmap, fine in zip(pairs, maps, sound, strict=True):
            if fine and pair.predicted and pair.has_mask:
                self._against_mask(heatmap, pair.truth.masks[pair.target])
            if fine and pair.has_boxes and "boxes" in self.metrics:
                self._against_boxes(heatmap, pair)

    def _against_mask(self, heatmap: NDArray[np.float32], mask: NDArray[np.bool_]) -> None:
        if "point" in self.metrics:
            self.sums.add("point", pointing_hit(heatmap, mask))
            self.sums.add(f"point_{POINT_TOLERANCE}px", pointing_hit(heatmap, mask, POINT_TOLERANCE))
        if "auc" in self.metrics:
            self.sums.add("auc", pixel_auc(heatmap, mask))
        if "energy" in self.metrics:
            self.sums.add("energy", energy_inside(heatmap, mask))

    def _against_boxes(self, heatmap: NDArray[np.float32], pair: _Pair) -> None:
        figures = box_figures(as_saliency(heatmap), pair.truth.boxes[pair.target])
        self.sums.add("f1", figures.f1)
        self.sums.add("f1a", figures.f1_mean)
        self.sums.add("le", 1.0 - figures.located)
        self.sums.add("om", 1.0 - (figures.located and pair.predicted))

    def _against_network(
        self, images: Tensor, targets: Tensor, maps: Tensor, on_host: NDArray[np.float32]
    ) -> None:
        """Compute the metrics that run the network on modified images; they are read once all are queued."""
        asked: list[tuple[str, Tensor]] = []
        if "curves" in self.metrics:
            for name, curve in (("deletion", deletion_curve), ("insertion", insertion_curve)):
                asked.append((name, curve_area(curve(self.predict, images, targets, maps))))
        if "saliency" in self.metrics:
            rectangles = [object_rectangle(as_saliency(heatmap)) for heatmap in on_host]
            asked.append(("saliency", saliency_metric(self.predict, images, targets, rectangles)))
        values = torch.stack([found for _, found in asked]).tolist()
        for (name, _), row in zip(asked, values, strict=True):
            for value in row:
                self.sums.add(name, value)
