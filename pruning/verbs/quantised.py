"""INT8 files of `export --int8`, and their comparison with the float files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from explainers.measures.tables import show
from image_classification.file_writing import write_text
from image_classification.observe.environment import describe_environment
from image_classification.plain_data import Plain
from pruning.files.exporting import export_network
from pruning.files.quantising import ServedFigures, quantise_onnx, served
from pruning.report.measure import EvaluationImages

BATCH_SIZES = (1, 32)
_CHUNK = 32


def quantise_and_compare(
    networks: Mapping[str, nn.Module],
    path: Path,
    images: EvaluationImages,
    num_calibration: int,
    num_judged: int,
) -> Path:
    """Write the INT8 file, compare it with the float file, and print and write the comparison as JSON.

    Args:
        networks: Name → network; the first is that of `path`, the others are only compared.
        path: The existing float file.
        images: Training images set the ranges of activations, validation images are used for the comparison.
        num_calibration, num_judged: Number of each.

    Returns:
        The INT8 file.
    """
    calibration, _ = _read(images, num_calibration, training=True)
    pixels, targets = _read(images, num_judged, training=False)
    target = path.with_suffix(".int8.onnx")
    figures: dict[str, ServedFigures] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, network) in enumerate(networks.items()):
            source, small = (path, target) if not number else (Path(folder, "f.onnx"), Path(folder, "q.onnx"))
            if number:
                export_network(network, source, "onnx", pixels[:4])
            quantise_onnx(source, small, calibration.split(_CHUNK))
            figures[name] = served(source, pixels, BATCH_SIZES)
            figures[f"{name}, INT8"] = served(small, pixels, BATCH_SIZES)
    rows = _rows(figures, targets)
    _print(rows, len(pixels), len(calibration))
    report = {"calibration_images": len(calibration), "judged_images": len(pixels), "rows": rows}
    report["environment"] = describe_environment()
    write_text(target.with_suffix(".json"), json.dumps(report, indent=2) + "\n")
    return target


def _read(images: EvaluationImages, count: int, *, training: bool) -> tuple[Tensor, Tensor]:
    """Return (N, 3, H, W) normalised images on the CPU, and their targets."""
    found: list[tuple[Tensor, Tensor]] = []
    with images.loader(count, training=training) as loader:
        for batch in loader:
            found.append((batch.images.float().cpu(), batch.targets.cpu()))
    return torch.cat([one for one, _ in found])[:count], torch.cat([two for _, two in found])[:count]


def _rows(figures: Mapping[str, ServedFigures], targets: Tensor) -> list[Plain]:
    rows: list[Plain] = []
    first = next(iter(figures.values())).predictions
    for name, found in figures.items():
        row: Plain = {"network": name, "bytes": found.num_bytes}
        if targets.dim() == 1:
            row["top1"] = 100 * float((found.predictions == targets.numpy()).mean())
        row["agreement"] = 100 * float((found.predictions == first).mean())
        row["milliseconds"] = {size: _spread(seconds) for size, seconds in found.seconds.items()}
        rows.append(row)
    return rows


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the number of measurements and their percentiles in milliseconds."""
    percentiles = {f"p{part}": 1000 * float(np.percentile(seconds, part)) for part in (10, 50, 90)}
    return {"n": len(seconds), **percentiles}


def _print(rows: list[Plain], num_judged: int, num_calibration: int) -> None:
    table = Table(title=f"{num_judged} validation images; ranges from {num_calibration} training images")
    table.add_column("network", no_wrap=True)
    sizes = list(rows[0]["milliseconds"])
    for name in (
        "MiB",
        "top-1 %",
        "same class %",
        *(f"ms at batch {size}: median (10–90 %)" for size in sizes),
    ):
        table.add_column(name, justify="right")
    for row in rows:
        times = [row["milliseconds"][size] for size in sizes]
        table.add_row(
            row["network"],
            f"{row['bytes'] / 2**20:.2f}",
            f"{row['top1']:.1f}" if "top1" in row else "–",
            f"{row['agreement']:.1f}",
            *(f"{time['p50']:.2f} ({time['p10']:.2f}–{time['p90']:.2f}, n = {time['n']})" for time in times),
        )
    show(table)
