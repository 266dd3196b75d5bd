"""Pause of a training for a checkpoint, written in the background or while training waits.

    python benchmarks/checkpoint_pause.py [--arch resnet50] [--repeats 5] [--workspace DIR]

The state is that of a run with SGD with momentum and averaged weights. `--workspace` chooses the disk.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from common.measure import spread
from common.report import BenchmarkParser, print_table, write_json

from image_classification.checkpoint import CheckpointConfig, Checkpointer
from image_classification.distributed import Distributed
from image_classification.models import create_model


def pauses(
    state: dict[str, object], folder: Path, beside: bool, repeats: int
) -> tuple[list[float], list[float]]:
    """Return the seconds for which each save blocks its caller, and until it is on disk."""
    config = CheckpointConfig(workspace=folder, checkpoint_beside=beside)
    checkpointer = Checkpointer(config, Distributed(), print)
    waited, written = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        checkpointer.save(state)
        waited.append(time.perf_counter() - begin)
        checkpointer.finish()
        written.append(time.perf_counter() - begin)
    return waited, written


def main() -> None:
    """Measure both ways, print and write JSON."""
    parser = BenchmarkParser(__doc__, repeats=5, threads=1)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--workspace", type=Path, default=None, help="default: a temporary folder")
    arguments = parser.parse("checkpoint_pause_{arch}.json", quick={"arch": "resnet20", "repeats": 2})
    model = create_model(arguments.arch).to(arguments.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state: dict[str, object] = {
        "state_dict": model.state_dict(),
        "ema": create_model(arguments.arch).to(arguments.device).state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 1,
    }
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.workspace or Path(temporary)
        for name, beside in (("beside", True), ("waiting", False)):
            waited, written = pauses(state, folder / name, beside, arguments.repeats)
            rows[name] = {"pause_seconds": spread(waited), "written_seconds": spread(written)}
        size = (folder / "beside" / "checkpoint.pth.tar").stat().st_size
    table = [
        [name, f"{row['pause_seconds']['median']:.3f}", f"{row['written_seconds']['median']:.3f}"]
        for name, row in rows.items()
    ]
    print(f"{size / 1e6:.0f} MB")
    print_table(["checkpoint", "pause s", "on disk after s"], table)
    write_json(arguments, arguments.repeats, {"bytes": size, **rows})


if __name__ == "__main__":
    main()
