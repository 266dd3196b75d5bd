"""How well attribution methods find the object: all methods on one or several networks, beside the centre baseline.

    OMP_NUM_THREADS=1 python benchmarks/explanations.py --checkpoint runs/shapes/model_best.pth.tar [--casm-path FILE]

Per network and method, over a split with masks and boxes: pointing game (exact, and within 15 pixels), ROC-AUC, energy
inside, F1, F1a, LE, OM, as `python -m explainers localize` counts them; seconds of computing maps. Beside it the growth
of this process's memory from the first tenth of the pictures to the end.

`ig-positive` and `ig-absolute` are Integrated Gradients with `--ig-sign` and the smoothing of the pointing game,
`--ig-smooth 0.02`. The three are views of the same attributions, which are computed once: the first is charged with the
seconds. With `--update` rows of other methods and networks stay in the file; each row says which entry of `runs`
(settings, memory, environment) it is from.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from explainers.base import Attribution, Method, Prepared
from explainers.evaluate import FIGURES, Row, localize
from explainers.ground_truth import check_ground_truth
from explainers.integrated_gradients import IntegratedGradients, show
from explainers.job import (
    MethodConfig,
    NetworkConfig,
    PictureConfig,
    open_networks,
    open_split,
    picture_loader,
)
from explainers.localize import as_json
from explainers.tables import print_table
from image_classification.data.build import ReadConfig
from image_classification.data.progress import progress_bar
from image_classification.distributed import DistributedConfig, setup_distributed
from image_classification.environment import describe_environment
from image_classification.monitor import Monitor

RESULTS = Path(__file__).resolve().parent / "results"
VIEWS = {"ig": ("all", 0.0), "ig-positive": ("positive", 0.02), "ig-absolute": ("absolute", 0.02)}
METHODS = ["centre", "gradcam", "lrp", "ebp", "rap", *VIEWS]
METRICS = ["point", "auc", "energy", "boxes"]


class Memory:
    """Resident memory of this process while pictures go by.

    Args:
        total: Number of pictures.
        advance: Moves the progress bar.
    """

    def __init__(self, total: int, advance: Callable[[int], None]) -> None:
        self.total, self.done, self._advance = total, 0, advance
        self.mib: list[float] = []
        self._monitor = Monitor(torch.device("cpu"))

    def __call__(self, num_pictures: int) -> None:
        """So many more pictures are done; memory is read ten times in all."""
        self.done += num_pictures
        if self.done * 10 >= self.total * (len(self.mib) + 1):
            self.mib.append(1024 * self._monitor.read(0)["process.memory_gib"])
        self._advance(num_pictures)


class SharedMethod:
    """Prepared once for a network, asked once for a batch."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._prepared: tuple[nn.Module, Prepared] | None = None
        self._last: tuple[Tensor, Tensor, Attribution] | None = None

    def prepare(self, model: nn.Module, example: Tensor) -> Prepared:
        """See `Method.prepare`."""
        if self._prepared is None or self._prepared[0] is not model:
            self._prepared, self._last = (model, self._method.prepare(model, example)), None
        return self

    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        """See `Prepared.__call__`."""
        assert self._prepared is not None
        last = self._last
        if last is None or not torch.equal(last[0], images) or not torch.equal(last[1], targets):
            last = self._last = (images, targets, self._prepared[1](images, targets))
        return last[2]


@dataclasses.dataclass(frozen=True)
class View:
    """Integrated Gradients with a sign and a smoothing, from attributions that are shared; see `show`."""

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


def wanted_methods(words: argparse.Namespace) -> dict[str, Method]:
    """The methods of the table by name, in the order asked for."""
    wanted = [*words.methods, *(["casm"] if words.casm_path else [])]
    others = [name for name in wanted if name not in VIEWS]
    methods = MethodConfig(method=others, casm_path=words.casm_path).methods() if others else {}
    base = SharedMethod(IntegratedGradients(words.ig_steps))
    views = {name: View(base, sign, smooth) for name, (sign, smooth) in VIEWS.items()}
    return {name: (methods | views)[name] for name in wanted}


def measure(words: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the table, and memory by network."""
    data = ReadConfig(
        data=words.data, workers=words.workers, batch_size=words.batch_size, data_backend=words.data_backend
    )
    pictures = PictureConfig(num_pictures=words.num_pictures)
    methods = wanted_methods(words)
    rows: list[Row] = []
    memory: dict[str, Any] = {}
    with setup_distributed(DistributedConfig(device=words.device)) as distributed:
        dataset, manifest = open_split(data, pictures, distributed)
        check_ground_truth(manifest, masks=True, boxes=True)
        networks, preset, example = open_networks(
            NetworkConfig(checkpoint=words.checkpoint), data, dataset, distributed.device
        )
        loader = picture_loader(
            manifest, preset, data, pictures, distributed, with_masks=True, with_boxes=True
        )
        with loader:
            for network in networks:
                prepared = network.prepare(methods, example)
                with progress_bar(network.name, len(manifest)) as advance:
                    watch = Memory(len(manifest), advance)
                    rows += localize(
                        network.name, prepared, network.predict, loader, metrics=METRICS,
                        multi_label=dataset.multi_label, distributed=distributed, max_pairs=loader.batch_size,
                        advance=watch,
                    )  # fmt: skip
                memory[network.name] = {"mib": watch.mib, "growth_mib": watch.mib[-1] - watch.mib[0]}
    return rows, memory


def updated(path: Path, rows: list[dict[str, Any]], run: dict[str, Any], *, keep: bool) -> dict[str, Any]:
    """The report: these rows, and with `keep` those of the file that were not measured again, with their runs."""
    before = (
        json.loads(path.read_text(encoding="utf-8")) if keep and path.is_file() else {"rows": [], "runs": []}
    )
    measured = {(row["network"], row["method"]) for row in rows}
    kept = [row for row in before["rows"] if (row["network"], row["method"]) not in measured]
    used = sorted({row["run"] for row in kept})
    kept = [{**row, "run": used.index(row["run"])} for row in kept]
    report = [*kept, *({**row, "run": len(used)} for row in rows)]
    return {"rows": report, "num_runs": 1, "runs": [*(before["runs"][index] for index in used), run]}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--checkpoint", action="append", required=True, help="may be given several times")
    parser.add_argument("--casm-path", default=None, help="also judge a saliency mapping of train-casm")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--update", action="store_true", help="keep the other rows of the file")
    parser.add_argument("--ig-steps", type=int, default=16)
    parser.add_argument("--num-pictures", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--data-backend", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=RESULTS / "explanations_shapes.json")
    words = parser.parse_args()
    rows, memory = measure(words)
    figures = [figure for metric in METRICS for figure in FIGURES[metric]]
    table = [
        {"network": row.network, "method": row.method, **row.figures, "seconds": row.seconds} for row in rows
    ]
    print_table(
        "explanations", table, ("network", "method"), (*figures, "seconds"),
        {"point", "point_15px", "energy", "le", "om"},
    )  # fmt: skip
    for name, figures_of_memory in memory.items():
        print(f"{name}: memory grew by {figures_of_memory['growth_mib']:.1f} MiB after the first tenth")
    settings = {
        "data": words.data, "ig_steps": words.ig_steps, "batch_size": words.batch_size,
        "num_pictures": words.num_pictures, "device": words.device,
    }  # fmt: skip
    environment = describe_environment(torch.device(words.device))
    plain = as_json(rows, settings)
    run = {"config": plain["config"], "memory": memory, "environment": environment}
    report = updated(words.json, plain["rows"], run, keep=words.update)
    words.json.parent.mkdir(parents=True, exist_ok=True)
    words.json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"written to {words.json}")


if __name__ == "__main__":
    main()
