"""`python -m explainers localize`: localisation figures of methods on networks, as one table and as JSON.

    python -m explainers localize shapes --checkpoint before.pth.tar --checkpoint pruned.pth.tar \\
        --method gradcam --method lrp --metric point --metric auc --json figures.json
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from explainers.evaluate import FIGURES, METRICS, Row, localize
from explainers.ground_truth import check_ground_truth
from explainers.job import (
    MethodConfig,
    Network,
    NetworkConfig,
    PictureConfig,
    check_writable,
    open_networks,
    open_split,
    picture_loader,
)
from explainers.tables import formatted, show
from image_classification.cli import parse_config, to_plain
from image_classification.config import check, flag
from image_classification.data.build import ReadConfig
from image_classification.data.loader import PlannedLoader
from image_classification.data.manifest import Manifest
from image_classification.data.progress import progress_bar
from image_classification.distributed import Distributed, DistributedConfig, setup_distributed

_PERCENT = {"point", "point_15px", "energy", "le", "om"}


@dataclasses.dataclass(kw_only=True)
class FigureConfig:
    """Which figures."""

    metric: list[str] = flag(
        ["point", "auc", "energy"], "--metric", repeatable=True, choices=METRICS,
        help="point: pointing game, exact and within 15 pixels; auc: ROC-AUC over pixels; energy: share of the map "
        "inside the mask; boxes: F1, F1a, LE, OM; saliency: the saliency metric; curves: deletion and insertion",
    )  # fmt: skip
    json: str | None = flag(None, "--json", metavar="FILE", help="also write the table as JSON")

    def __post_init__(self) -> None:
        self.metric = list(dict.fromkeys(self.metric))
        check(bool(self.metric), "--metric: give at least one figure")


def main(argv: Sequence[str]) -> int:
    """Run the verb; see the module's text."""
    sections = {
        "network": NetworkConfig, "method": MethodConfig, "pictures": PictureConfig, "figures": FigureConfig,
        "data": ReadConfig, "distributed": DistributedConfig,
    }  # fmt: skip
    configs = parse_config(
        sections,
        argv,
        prog="python -m explainers localize",
        description="Localisation figures of attribution methods.",
    )
    figures: FigureConfig = configs["figures"]
    with setup_distributed(configs["distributed"]) as distributed:
        if figures.json is not None:
            folder = Path(figures.json).absolute().parent
            distributed.check_on_main(lambda: check_writable(folder, "--json"))
        rows = _localize(configs, distributed)
        if distributed.is_main:
            _print(rows, figures.metric)
            if figures.json is not None:
                text = json.dumps(as_json(rows, to_plain(configs)), indent=2, allow_nan=False)
                Path(figures.json).write_text(text + "\n", encoding="utf-8")
    return 0


def _localize(configs: dict, distributed: Distributed) -> list[Row]:
    """All rows: network by network, each with all methods."""
    data: ReadConfig = configs["data"]
    pictures: PictureConfig = configs["pictures"]
    metrics = configs["figures"].metric
    dataset, manifest = open_split(data, pictures, distributed)
    with_masks, with_boxes = needed_annotations(manifest, metrics)
    distributed.check_on_main(lambda: check_ground_truth(manifest, masks=with_masks, boxes=with_boxes))
    networks, preset, example = open_networks(configs["network"], data, dataset, distributed.device)
    methods = configs["method"].methods()
    for network in networks:  # every method on every network, before the first picture is read
        network.prepare(methods, example)
    rows: list[Row] = []
    loader = picture_loader(
        manifest, preset, data, pictures, distributed, with_masks=with_masks, with_boxes=with_boxes
    )
    with loader:
        for network in networks:
            prepared = network.prepare(methods, example)
            rows += _one_network(network, prepared, loader, metrics, dataset.multi_label, distributed)
    return rows


def _one_network(
    network: Network, prepared: dict, loader: PlannedLoader, metrics: list[str], multi_label: bool,
    distributed: Distributed,
) -> list[Row]:  # fmt: skip
    share = math.ceil(loader.num_samples / distributed.world_size)
    with progress_bar(network.name, share, distributed.is_main) as advance:
        return localize(
            network.name, prepared, network.predict, loader, metrics=metrics, multi_label=multi_label,
            distributed=distributed, max_pairs=loader.batch_size, advance=advance,
        )  # fmt: skip


def needed_annotations(manifest: Manifest, metrics: Sequence[str]) -> tuple[bool, bool]:
    """Whether batches need masks, and boxes. Figures against masks make do with boxes where there are no masks."""
    boxes = "boxes" in metrics
    masks = set(metrics) != {"boxes"}
    if masks and manifest.targets.mask_paths is None and manifest.targets.boxes is not None:
        return False, True
    return masks, boxes


def as_json(rows: Sequence[Row], config: dict) -> dict:
    """The table as plain JSON: NaN becomes null."""
    plain = []
    for row in rows:
        entry = dataclasses.asdict(row)
        entry["figures"] = {k: None if math.isnan(v) else v for k, v in row.figures.items()}
        plain.append(entry)
    return {"rows": plain, "config": config}


def _print(rows: Sequence[Row], metrics: Sequence[str]) -> None:
    """The table on standard output."""
    names = [figure for metric in METRICS if metric in metrics for figure in FIGURES[metric]]
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
