"""Localisation of objects by attribution methods, on one or several networks, compared with the centre of the image.

    OMP_NUM_THREADS=1 python benchmarks/explanations.py --checkpoint runs/shapes/model_best.pth.tar [--casm-path FILE]

Per network and method, over a split with masks and boxes: pointing game (exact, and within 15 pixels), ROC-AUC, energy
inside, F1, F1a, LE and OM, counted as by `python -m explainers localize`, and the seconds that the maps took. Below the
table, the growth of this process's memory from the first tenth of the images to the end is printed.

`ig-positive` and `ig-absolute` are Integrated Gradients with `--ig-sign` and with the smoothing of the pointing game,
`--ig-smooth 0.02`. They show the same attributions as `ig`, which are computed once and whose time is counted for `ig`.
With `--update` the rows of other methods and networks stay in the file; every row names the entry of `runs` (settings,
memory, environment) it is from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from common.report import BenchmarkParser, write_json
from torch import Tensor, nn

from explainers.attribution.integrated_gradients import IntegratedGradients, show
from explainers.attribution.method import Attribution, Method, Prepared, create_method
from explainers.measures.evaluate import FIGURES, Row, localize
from explainers.measures.tables import print_table
from explainers.verbs.attribution_job import (
    ImageConfig,
    NetworkConfig,
    image_loader,
    open_networks,
    open_split,
)
from explainers.verbs.ground_truth_checks import check_ground_truth
from explainers.verbs.localize import as_json
from image_classification.data.data_config import ReadConfig
from image_classification.data.progress import progress_bar
from image_classification.joining import DistributedConfig, setup_distributed
from image_classification.observe.environment import describe_environment
from image_classification.observe.monitor import Monitor

VIEWS = {"ig": ("all", 0.0), "ig-positive": ("positive", 0.02), "ig-absolute": ("absolute", 0.02)}
METHODS = ["centre", "gradcam", "lrp", "ebp", "rap", *VIEWS]
METRICS = ["point", "auc", "energy", "boxes"]
SHARES = {"point", "point_15px", "energy", "le", "om"}

MemoryFigures = dict[str, dict[str, float | list[float]]]


class Memory:
    """Records the resident memory of this process while images are processed.

    Args:
        total: Number of images.
        advance: Moves the progress bar.
    """

    def __init__(self, total: int, advance: Callable[[int], None]) -> None:
        self.total, self.done, self._advance = total, 0, advance
        self.mib: list[float] = []
        self._monitor = Monitor(torch.device("cpu"))

    def __call__(self, num_images: int) -> None:
        """Count more images; memory is read ten times in total."""
        self.done += num_images
        if self.done * 10 >= self.total * (len(self.mib) + 1):
            self.mib.append(1024 * self._monitor.read(0)["process.memory_gib"])
        self._advance(num_images)


class SharedMethod:
    """A method that is prepared once per network and called once per batch, however many views share it."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._prepared: tuple[nn.Module, Prepared] | None = None
        self._last: tuple[Tensor, Tensor, Attribution] | None = None

    def prepare(self, model: nn.Module, example: Tensor) -> Prepared:
        """See `Method.prepare`."""
        if self._prepared is None or self._prepared[0] is not model:
            self._prepared = (model, self._method.prepare(model, example))
            self._last = None
        return self

    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        """See `Prepared.__call__`."""
        assert self._prepared is not None
        last = self._last
        if last is None or not torch.equal(last[0], images) or not torch.equal(last[1], targets):
            last = (images, targets, self._prepared[1](images, targets))
            self._last = last
        return last[2]


@dataclasses.dataclass(frozen=True)
class View:
    """Integrated Gradients with a sign and a smoothing, from shared attributions; see `show`."""

    name: ClassVar[str] = "ig"
    base: SharedMethod
    sign: str
    smooth: float

    def prepare(self, model: nn.Module, example: Tensor) -> Prepared:
        """See `Method.prepare`."""
        self.base.prepare(model, example)
        return self

    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        """See `Prepared.__call__`."""
        plain = self.base(images, targets)
        heatmap, signed = show(plain.map, self.sign, self.smooth)
        return dataclasses.replace(plain, map=heatmap, signed=signed)


def wanted_methods(arguments: argparse.Namespace) -> dict[str, Method]:
    """Return the methods of the table by name, in the order requested."""
    wanted = [*arguments.methods]
    if arguments.casm_path:
        wanted.append("casm")
    found: dict[str, Method] = {}
    others = [name for name in wanted if name not in VIEWS]
    for name in others:
        settings = {"path": arguments.casm_path} if name == "casm" else {}
        found[name] = create_method(name, **settings)
    base = SharedMethod(IntegratedGradients(arguments.ig_steps))
    for name, (sign, smooth) in VIEWS.items():
        found[name] = View(base, sign, smooth)
    return {name: found[name] for name in wanted}


def measure(arguments: argparse.Namespace) -> tuple[list[Row], MemoryFigures]:
    """Return the rows of the table, and memory by network."""
    data = ReadConfig(
        data=arguments.data,
        workers=arguments.workers,
        batch_size=arguments.batch_size,
        data_backend=arguments.data_backend,
    )
    images = ImageConfig(num_images=arguments.num_images)
    methods = wanted_methods(arguments)
    rows: list[Row] = []
    memory: MemoryFigures = {}
    with setup_distributed(DistributedConfig(device=arguments.device.type)) as distributed:
        dataset, manifest = open_split(data, images, distributed)
        check_ground_truth(manifest, masks=True, boxes=True)
        networks, preset, example = open_networks(
            NetworkConfig(checkpoint=arguments.checkpoint), data, dataset, distributed.device
        )
        loader = image_loader(manifest, preset, data, images, distributed, with_masks=True, with_boxes=True)
        with loader:
            for network in networks:
                prepared = network.prepare(methods, example)
                with progress_bar(network.name, len(manifest)) as advance:
                    watch = Memory(len(manifest), advance)
                    rows += localize(
                        network.name,
                        prepared,
                        network.predict,
                        loader,
                        metrics=METRICS,
                        multi_label=dataset.multi_label,
                        distributed=distributed,
                        max_pairs=loader.batch_size,
                        advance=watch,
                    )
                memory[network.name] = {"mib": watch.mib, "growth_mib": watch.mib[-1] - watch.mib[0]}
    return rows, memory


def updated(
    path: Path, rows: list[dict[str, Any]], run: dict[str, object], *, keep: bool
) -> dict[str, object]:
    """Merge rows with those of earlier runs.

    Args:
        path: The results file.
        rows: Rows measured in this run.
        run: Settings, memory and environment of this run.
        keep: Keep the file's rows that were not measured again, and their runs.
    """
    before: dict[str, Any] = {"rows": [], "runs": []}
    if keep and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
    measured = {(row["network"], row["method"]) for row in rows}
    kept = [row for row in before["rows"] if (row["network"], row["method"]) not in measured]
    # Runs without remaining rows are dropped, so the numbers of the others shift.
    used = sorted({row["run"] for row in kept})
    all_rows = [{**row, "run": used.index(row["run"])} for row in kept]
    all_rows += [{**row, "run": len(used)} for row in rows]
    return {"rows": all_rows, "runs": [*(before["runs"][number] for number in used), run]}


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__)
    parser.add_argument("data", nargs="?", default="shapes")
    parser.add_argument("--checkpoint", action="append", required=True, help="may be given several times")
    parser.add_argument("--casm-path", default=None, help="also judge a saliency mapping of train-casm")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--update", action="store_true", help="keep the other rows of the file")
    parser.add_argument("--ig-steps", type=int, default=16)
    parser.add_argument("--num-images", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--data-backend", default="auto")
    small = {"data": "shapes:train=160,val=24", "methods": ["centre", "gradcam", "ig", "ig-positive"]}
    return parser.parse("explanations_shapes.json", quick={**small, "ig_steps": 2, "batch_size": 8})


def main() -> None:
    """Measure, print and write JSON."""
    arguments = parse()
    rows, memory = measure(arguments)
    figures = [figure for metric in METRICS for figure in FIGURES[metric]]
    table = [
        {"network": row.network, "method": row.method, **row.figures, "seconds": row.seconds} for row in rows
    ]
    print_table("explanations", table, ("network", "method"), (*figures, "seconds"), SHARES)
    for name, found in memory.items():
        print(f"{name}: memory grew by {found['growth_mib']:.1f} MiB after the first tenth")
    names = ("data", "ig_steps", "batch_size", "num_images", "device")
    plain = as_json(rows, {name: getattr(arguments, name) for name in names})
    environment = describe_environment(arguments.device)
    run = {"config": plain["config"], "memory": memory, "environment": environment}
    content = updated(arguments.output, plain["rows"], run, keep=arguments.update)
    write_json(arguments, 1, content)


if __name__ == "__main__":
    main()
