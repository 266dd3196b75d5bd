"""`python -m explainers localize`: localisation figures of methods on networks, as one table and as JSON.

    python -m explainers localize shapes --checkpoint before.pth.tar --checkpoint pruned.pth.tar \\
        --method gradcam --method lrp --metric point --metric auc --json figures.json
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from explainers.attribution.method import Method, Prepared, create_method
from explainers.measures.evaluate import FIGURES, POINT_TOLERANCE, Metric, Row, figure_names, localize
from explainers.measures.tables import formatted, show, without_nan
from explainers.verbs.attribution_job import (
    ImagesJob,
    Network,
    NetworkConfig,
    check_writable,
    image_loader,
    open_networks,
    open_split,
)
from explainers.verbs.ground_truth_checks import check_ground_truth, needed_annotations
from explainers.verbs.method_flags import MethodConfig, method_config
from image_classification.config import check, flag, section
from image_classification.data.loader import PlannedLoader
from image_classification.data.progress import progress_bar
from image_classification.distributed import Distributed
from image_classification.file_writing import write_text
from image_classification.joining import setup_distributed
from image_classification.resolved_config import to_plain
from image_classification.verbs import configured

_DEFAULT_METRICS: tuple[Metric, ...] = ("point", "auc", "energy")
#: The published methods, by the published rules.
_PUBLISHED_METHODS: dict[str, dict[str, object]] = {
    "gradcam": {},
    "lrp": {"as_published": True},
    "ebp": {},
    "rap": {"as_published": True},
}
_TOGETHER: tuple[Metric, ...] = ("point", "auc")
_PERCENT = {*FIGURES["point"], "energy", "le", "om"}


@dataclasses.dataclass(kw_only=True)
class FigureConfig:
    """Which figures."""

    metric: list[Metric] = flag(
        list(_DEFAULT_METRICS),
        "--metric",
        repeatable=True,
        help="point and auc (which come together): pointing game, exact and within "
        f"{POINT_TOLERANCE} pixels, and ROC-AUC over pixels; energy: share of the map inside the mask; boxes: F1, F1a, "
        "LE, OM; saliency: the saliency metric; curves: deletion and insertion",
    )
    published: bool = flag(
        False,
        "--published",
        help="the whole protocol of the attribution-preservation program: gradcam, lrp, ebp and rap by its rules, "
        "point accuracy and AUC; in place of --method and --metric",
    )
    json: str | None = flag(None, "--json", metavar="FILE", help="also write the table as JSON")

    def __post_init__(self) -> None:
        if self.published:
            check(self.metric == list(_DEFAULT_METRICS), "--published says which figures: leave --metric out")
            self.metric = list(_TOGETHER)
        self.metric = list(dict.fromkeys(self.metric))
        check(bool(self.metric), "--metric: give at least one figure")
        # As published: both come from the same map and belong together.
        if {"point", "auc"} & set(self.metric):
            self.metric = [*self.metric, *(name for name in _TOGETHER if name not in self.metric)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalizeConfig(ImagesJob):
    """Configuration of `localize`."""

    network: NetworkConfig = section(NetworkConfig)
    method: MethodConfig = section(method_config())
    figures: FigureConfig = section(FigureConfig)

    def __post_init__(self) -> None:
        check(
            not self.figures.published or self.method == type(self.method)(),
            "--published says which methods: leave --method and its flags out",
        )

    def methods(self) -> dict[str, Method]:
        """Return the methods by name."""
        if not self.figures.published:
            return self.method.methods()
        return {name: create_method(name, **settings) for name, settings in _PUBLISHED_METHODS.items()}


def run(configs: LocalizeConfig) -> int:
    """Run the verb; see the module docstring."""
    figures = configs.figures
    with setup_distributed(configs.distributed) as distributed:
        if figures.json is not None:
            folder = Path(figures.json).absolute().parent
            distributed.check_on_main(lambda: check_writable(folder, "--json"))
        rows = _localize(configs, distributed)
        if distributed.is_main:
            _print(rows, figures.metric)
            if figures.json is not None:
                text = json.dumps(as_json(rows, to_plain(configs)), indent=2, allow_nan=False)
                write_text(Path(figures.json), text + "\n")
    return 0


def _localize(configs: LocalizeConfig, distributed: Distributed) -> list[Row]:
    """Return all rows: network by network, each with all methods."""
    data = configs.data
    images = configs.images
    metrics = configs.figures.metric
    dataset, manifest = open_split(data, images, distributed, masked=set(metrics) != {"boxes"})
    with_masks, with_boxes = needed_annotations(manifest, metrics)
    distributed.check_on_main(lambda: check_ground_truth(manifest, masks=with_masks, boxes=with_boxes))
    networks, preset, example = open_networks(configs.network, data, dataset, distributed.device)
    methods = configs.methods()
    for network in networks:  # prepare every method on every network before the first image is read
        network.prepare(methods, example)
    rows: list[Row] = []
    loader = image_loader(
        manifest, preset, data, images, distributed, with_masks=with_masks, with_boxes=with_boxes
    )
    with loader:
        for network in networks:
            prepared = network.prepare(methods, example)
            rows += localize_network(
                network,
                prepared,
                loader,
                metrics=metrics,
                multi_label=dataset.multi_label,
                distributed=distributed,
            )
    return rows


def localize_network(
    network: Network,
    methods: Mapping[str, Prepared],
    loader: PlannedLoader,
    *,
    metrics: Sequence[Metric],
    multi_label: bool,
    distributed: Distributed,
) -> list[Row]:
    """Measure methods on one network, with a progress bar; see `localize`. Collective."""
    share = math.ceil(loader.num_samples / distributed.world_size)
    with progress_bar(f"locating: {network.name}", share, distributed.is_main) as advance:
        return localize(
            network.name,
            methods,
            network.predict,
            loader,
            metrics=metrics,
            multi_label=multi_label,
            distributed=distributed,
            max_pairs=loader.batch_size,
            advance=advance,
        )


def as_json(rows: Sequence[Row], config: Mapping[str, object]) -> dict[str, object]:
    """Return the table as plain JSON: NaN becomes null."""
    plain = [dataclasses.asdict(row) | {"figures": without_nan(row.figures)} for row in rows]
    return {"rows": plain, "config": config}


def _print(rows: Sequence[Row], metrics: Sequence[str]) -> None:
    """Print the table to standard output."""
    names = figure_names(metrics)
    table = Table(title="localisation")
    for column in ("network", "method"):
        table.add_column(column, no_wrap=True)
    for name in names:
        unit = "\n%" if name in _PERCENT else ""
        table.add_column(f"{name.replace('_', ' ')}{unit}", justify="right", no_wrap=True)
    for column in ("predicted\npairs", "NaN\nmaps", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        values = [formatted(row.figures[name], name in _PERCENT) for name in names]
        predicted = f"{row.counts['predicted']:,} of {row.counts['pairs']:,}"
        table.add_row(
            row.network, row.method, *values, predicted, f"{row.counts['nan_maps']}", f"{row.seconds:.1f}"
        )
    show(table)


VERB = configured(LocalizeConfig, run)
