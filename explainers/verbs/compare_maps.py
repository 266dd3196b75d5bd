"""`python -m explainers compare ORIGINAL PRUNED DATA`: the effect of compression on predictions and explanations.

    python -m explainers compare teacher.pth.tar pruned.pth.tar shapes-multi --json moved.json --gallery moved.png

Reports prediction figures of both networks, point accuracy and AUC of each method if the data locates objects, and how
far the maps of the labelled classes moved (`explainers.measures.movement`). Sums are exact over ranks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from explainers.attribution.method import Prepared
from explainers.measures.evaluate import Metric, Row
from explainers.measures.movement import rank_correlation, structural_similarity
from explainers.measures.tables import show, without_nan
from explainers.plots import Panel, save_grid, to_image
from explainers.verbs.attribution_job import (
    ImageConfig,
    Network,
    NetworkConfig,
    WeightsConfig,
    check_writable,
    image_loader,
    input_preset,
    load_networks,
    open_split,
)
from explainers.verbs.ground_truth_checks import check_ground_truth, needed_annotations
from explainers.verbs.localize import localize_network
from explainers.verbs.method_flags import MethodConfig, method_config
from image_classification.config import check, flag, section
from image_classification.data.data_config import ReadConfig
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.loader import Batch
from image_classification.data.manifest import Manifest
from image_classification.data.progress import progress_bar
from image_classification.distributed import Distributed
from image_classification.figure_writing import check_figure
from image_classification.file_writing import write_text
from image_classification.joining import DistributedConfig, setup_distributed
from image_classification.metrics import ClassificationMetrics, Metrics, MultiLabelMetrics
from image_classification.resolved_config import to_plain
from image_classification.verbs import configured

METRICS: tuple[Metric, ...] = ("point", "auc")
SIMILARITIES = ("rank_correlation", "ssim")
GALLERY_ROWS = 8
#: The methods of Park et al. 2020.
PARK_METHODS = ("gradcam", "lrp", "ebp", "rap")


@dataclasses.dataclass(kw_only=True)
class PairConfig(WeightsConfig):
    """Which two networks."""

    original: str | None = flag(None, "original", metavar="ORIGINAL", help="checkpoint before compression")
    pruned: str | None = flag(None, "pruned", metavar="PRUNED", help="checkpoint after it")

    def __post_init__(self) -> None:
        for name, path in (("ORIGINAL", self.original), ("PRUNED", self.pruned)):
            check(path is not None, f"{name} is missing: python -m explainers compare ORIGINAL PRUNED DATA")
            check(Path(str(path)).is_file(), f"{name} {path}: there is no such file")

    def networks(self) -> NetworkConfig:
        """Return the networks as other verbs describe them."""
        return NetworkConfig(checkpoint=[str(self.original), str(self.pruned)], arch=self.arch, ema=self.ema)


@dataclasses.dataclass(kw_only=True)
class ResultConfig:
    """Where results go."""

    json: str | None = flag(None, "--json", metavar="FILE", help="also write the table as JSON")
    gallery: str | None = flag(
        None,
        "--gallery",
        metavar="FILE",
        help="also draw images with their maps before and after; the suffix says the format",
    )
    rows: int | None = flag(None, "--rows", parse=int, help=f"images in the gallery; default: {GALLERY_ROWS}")

    def __post_init__(self) -> None:
        check(
            self.rows is None or self.gallery is not None,
            "--rows has no effect without --gallery: add it, or leave --rows out",
        )
        check(self.rows is None or self.rows >= 1, f"--rows {self.rows}: give at least 1")
        if self.gallery is not None:
            check_figure(Path(self.gallery), "--gallery")
        for name, path in (("--json", self.json), ("--gallery", self.gallery)):
            check(path is None or not Path(path).is_dir(), f"{name} {path} is a folder: name a file in it")

    def check_outputs(self) -> None:
        """Check that results can be written, before anything is computed.

        Raises:
            ConfigError: They cannot be written.
        """
        for name, path in (("--json", self.json), ("--gallery", self.gallery)):
            if path is not None:
                check_writable(Path(path).absolute().parent, name)


@dataclasses.dataclass(frozen=True)
class Moved:
    """Movement of a method's maps.

    Attributes:
        means: Mean by name in `SIMILARITIES`; NaN if no pair has both maps.
        counted: Pairs behind each mean; less than `pairs` if a map is constant or not finite.
        pairs: Pairs of image and labelled class.
    """

    means: dict[str, float]
    counted: dict[str, int]
    pairs: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All results of the verb.

    Attributes:
        prediction: Per network (original, pruned), figures in percent.
        located: Per network, a row per method; empty without masks or boxes.
        moved: Movement by method.
    """

    prediction: tuple[dict[str, float], dict[str, float]]
    located: tuple[list[Row], list[Row]]
    moved: dict[str, Moved]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Configuration of `compare`."""

    pair: PairConfig = section(PairConfig)
    data: ReadConfig = section(ReadConfig)
    method: MethodConfig = section(method_config(), method=list(PARK_METHODS))
    images: ImageConfig = section(ImageConfig)
    results: ResultConfig = section(ResultConfig)
    distributed: DistributedConfig = section(DistributedConfig)


def run(configs: CompareConfig) -> int:
    """Run the verb; see the module docstring."""
    results = configs.results
    with setup_distributed(configs.distributed) as distributed:
        distributed.check_on_main(results.check_outputs)
        comparison = _compare(configs, distributed)
        if distributed.is_main:
            _print(comparison)
            if results.json is not None:
                text = json.dumps(as_json(comparison, to_plain(configs)), indent=2, allow_nan=False)
                write_text(Path(results.json), text + "\n")
    return 0


def _compare(configs: CompareConfig, distributed: Distributed) -> Comparison:
    data, images, results = configs.data, configs.images, configs.results
    dataset, manifest = open_split(data, images, distributed)
    original, pruned = load_networks(configs.pair.networks(), data, dataset, distributed.device)
    preset = input_preset(data, dataset, [original, pruned])
    methods = configs.method.methods()
    example = torch.zeros(1, 3, preset.image_size, preset.image_size, device=distributed.device)
    prepared = (original.prepare(methods, example), pruned.prepare(methods, example))
    located = _located(configs, distributed, dataset, manifest, preset, (original, pruned), prepared)
    num_panels = 0 if results.gallery is None else results.rows or GALLERY_ROWS
    judge = _Judge((original, pruned), prepared, dataset, preset, num_panels)
    share = math.ceil(len(manifest) / distributed.world_size)
    loader = image_loader(manifest, preset, data, images, distributed)
    with loader, progress_bar("comparing maps", share, distributed.is_main) as advance:
        for batch in loader:
            if len(batch):
                judge.add(batch, loader.batch_size)
                advance(len(batch))
    if results.gallery is not None and distributed.is_main:
        save_grid(Path(results.gallery), judge.panels, title=f"{original.name} → {pruned.name}")
    return Comparison(judge.prediction(distributed), located, judge.moved(distributed))


def _located(
    configs: CompareConfig,
    distributed: Distributed,
    dataset: Dataset,
    manifest: Manifest,
    preset: Preset,
    networks: tuple[Network, Network],
    prepared: tuple[dict[str, Prepared], dict[str, Prepared]],
) -> tuple[list[Row], list[Row]]:
    """Compute localisation figures of both networks on images whose objects are annotated; empty if there are none."""
    table = manifest.targets
    if table.mask_paths is not None:
        manifest = manifest.subset([index for index, path in enumerate(table.mask_paths) if path])
    if (table.mask_paths is None and table.boxes is None) or not len(manifest):
        if distributed.is_main:
            print(f"{configs.data.data} has neither masks nor boxes: no point accuracy, no AUC")
        return [], []
    with_masks, with_boxes = needed_annotations(manifest, METRICS)
    distributed.check_on_main(lambda: check_ground_truth(manifest, masks=with_masks, boxes=with_boxes))
    loader = image_loader(
        manifest,
        preset,
        configs.data,
        configs.images,
        distributed,
        with_masks=with_masks,
        with_boxes=with_boxes,
    )
    with loader:
        before, after = (
            localize_network(
                network,
                methods,
                loader,
                metrics=METRICS,
                multi_label=dataset.multi_label,
                distributed=distributed,
            )
            for network, methods in zip(networks, prepared, strict=True)
        )
    return before, after


class _Judge:
    """Collects predictions, similarities of maps and images for the gallery, batch by batch."""

    def __init__(
        self,
        networks: tuple[Network, Network],
        prepared: tuple[dict[str, Prepared], dict[str, Prepared]],
        dataset: Dataset,
        preset: Preset,
        num_panels: int,
    ) -> None:
        self.networks = networks
        self.prepared = prepared
        self.dataset = dataset
        self.preset = preset
        self.panels: list[list[Panel]] = []
        self._num_panels = num_panels
        self._metrics: list[Metrics] = [
            MultiLabelMetrics() if dataset.multi_label else ClassificationMetrics() for _ in networks
        ]
        self._sums = {name: np.zeros(len(SIMILARITIES)) for name in prepared[0]}
        self._counts = {name: np.zeros(len(SIMILARITIES), np.int64) for name in prepared[0]}
        self._num_pairs = 0

    def add(self, batch: Batch, max_pairs: int) -> None:
        """Judge a batch; the maps of `max_pairs` pairs are computed at once."""
        for network, metrics in zip(self.networks, self._metrics, strict=True):
            metrics.update(network.predict(batch.images).float(), batch.targets)
        for rows, targets in _pairs(batch.targets, max_pairs):
            self._num_pairs += len(rows)
            self._compare(batch.images[rows], targets)

    def _compare(self, images: Tensor, targets: Tensor) -> None:
        """Add the similarities of the maps of (B, 3, H, W) images for their classes (B,), method by method."""
        gallery = self._new_panels(images, targets)
        for name in self.prepared[0]:
            before, after = (methods[name](images, targets) for methods in self.prepared)
            maps = list(zip(before.map.cpu().numpy(), after.map.cpu().numpy(), strict=True))
            correlations = np.array([rank_correlation(first, second) for first, second in maps])
            similarities = structural_similarity(before.map, after.map, signed=before.signed).cpu().numpy()
            # (B, 2), in the order of SIMILARITIES; NaN if a map is constant or all zero.
            values = np.stack([correlations, similarities], axis=1)
            self._sums[name] += np.nansum(values, axis=0)
            self._counts[name] += np.isfinite(values).sum(axis=0)
            for row, (first, second), correlation in zip(gallery, maps, correlations, strict=False):
                row.append(Panel(f"{name} before", row[0].image, first, before.signed))
                title = f"{name} after\nρ {correlation:.2f}"
                row.append(Panel(title, row[0].image, second, after.signed))
        self.panels += gallery

    def _new_panels(self, images: Tensor, targets: Tensor) -> list[list[Panel]]:
        """Return the rows of the gallery that these images start."""
        room = max(self._num_panels - len(self.panels), 0)
        rows = []
        for image, target in zip(images[:room], targets[:room], strict=True):
            shown = to_image(image.float().cpu().numpy(), self.preset.mean, self.preset.std)
            rows.append([Panel(self.dataset.class_names[int(target)], shown)])
        return rows

    def prediction(self, distributed: Distributed) -> tuple[dict[str, float], dict[str, float]]:
        """Return figures of both networks over all ranks. Collective."""
        before, after = (metrics.compute(distributed) for metrics in self._metrics)
        return before, after

    def moved(self, distributed: Distributed) -> dict[str, Moved]:
        """Return means over all ranks. Collective."""
        names = list(self._sums)
        sums, counts, pairs = distributed.all_reduce_sum(
            torch.tensor(np.stack([self._sums[name] for name in names])),
            torch.tensor(np.stack([self._counts[name] for name in names])),
            torch.tensor(self._num_pairs),
        )
        found = {}
        for name, totals, numbers in zip(names, sums.tolist(), counts.tolist(), strict=True):
            means = {}
            for similarity, total, count in zip(SIMILARITIES, totals, numbers, strict=True):
                means[similarity] = total / count if count else math.nan
            found[name] = Moved(means, dict(zip(SIMILARITIES, numbers, strict=True)), int(pairs))
        return found


def _pairs(targets: Tensor, max_pairs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows and labelled classes of a batch, at most `max_pairs` at once."""
    if targets.dim() == 1:
        rows = torch.arange(len(targets), device=targets.device)
        classes = targets
    else:
        rows, classes = targets.gt(0.5).nonzero(as_tuple=True)
    if len(rows):
        yield from zip(rows.split(max_pairs), classes.split(max_pairs), strict=True)


def as_json(comparison: Comparison, config: Mapping[str, object]) -> dict[str, object]:
    """Return the comparison as plain JSON: NaN becomes null."""
    rows = []
    for index, (method, moved) in enumerate(comparison.moved.items()):
        entry: dict[str, object] = {
            "method": method,
            "moved": without_nan(moved.means),
            "counted": moved.counted,
            "pairs": moved.pairs,
        }
        for name, located in zip(("original", "pruned"), comparison.located, strict=True):
            if located:
                row = located[index]
                entry[name] = {"figures": without_nan(row.figures), "counts": row.counts}
        rows.append(entry)
    original, pruned = (without_nan(figures) for figures in comparison.prediction)
    return {"prediction": {"original": original, "pruned": pruned}, "methods": rows, "config": config}


def _print(comparison: Comparison) -> None:
    """Print both tables to standard output."""
    prediction = Table(title="prediction")
    for column in ("", "original", "pruned"):
        prediction.add_column(column, justify="left" if not column else "right")
    before, after = comparison.prediction
    for name in before:
        prediction.add_row(f"{name} %", f"{before[name]:.2f}", f"{after[name]:.2f}")
    maps = Table(title="explanations: original → pruned")
    for column in ("method", "point %", "AUC", "predicted pairs", "rank correlation", "SSIM", "maps"):
        maps.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for index, (method, moved) in enumerate(comparison.moved.items()):
        rows = [located[index] for located in comparison.located if located]
        points = _arrow([100 * row.figures["point"] for row in rows], ".1f")
        aucs = _arrow([row.figures["auc"] for row in rows], ".3f")
        predicted = _arrow([float(row.counts["predicted"]) for row in rows], ",.0f")
        similarities = [_number(moved.means[name], ".3f") for name in SIMILARITIES]
        maps.add_row(method, points, aucs, predicted, *similarities, f"{moved.pairs:,}")
    for table in (prediction, maps):
        show(table)


def _arrow(values: Sequence[float], form: str) -> str:
    return " → ".join(_number(value, form) for value in values) or "–"


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)


VERB = configured(CompareConfig, run)
