"""How well attribution methods find the object: all methods on one or several networks, beside the centre baseline.

    OMP_NUM_THREADS=1 python benchmarks/explanations.py --checkpoint runs/shapes/model_best.pth.tar [--casm-path FILE]

Per network and method, over a split with masks and boxes: pointing game (exact, and within 15 pixels), ROC-AUC, energy
inside, F1, F1a, LE, OM, as `python -m explainers localize` counts them; seconds of computing maps. Beside it the growth
of this process's memory from the first tenth of the pictures to the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from explainers.evaluate import FIGURES, Row, localize
from explainers.ground_truth import check_ground_truth
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
METHODS = ["centre", "gradcam", "lrp", "ebp", "rap", "ig"]
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


def measure(words: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """Rows of the table, and memory by network."""
    data = ReadConfig(
        data=words.data, workers=words.workers, batch_size=words.batch_size, data_backend=words.data_backend
    )
    pictures = PictureConfig(num_pictures=words.num_pictures)
    wanted = [*words.methods, *(["casm"] if words.casm_path else [])]
    steps = {"ig_steps": words.ig_steps} if "ig" in wanted else {}
    methods = MethodConfig(method=wanted, casm_path=words.casm_path, **steps).methods()
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


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--checkpoint", action="append", required=True, help="may be given several times")
    parser.add_argument("--casm-path", default=None, help="also judge a saliency mapping of train-casm")
    parser.add_argument("--methods", nargs="+", default=METHODS)
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
    report = {**as_json(rows, settings), "memory": memory, "num_runs": 1, "environment": environment}
    words.json.parent.mkdir(parents=True, exist_ok=True)
    words.json.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(f"written to {words.json}")


if __name__ == "__main__":
    main()
