"""INT8 quantisation of an ONNX file by ONNX Runtime's static quantisation, and a comparison with the original file.

Weights are quantised per output channel and activations per tensor, as pairs of QuantizeLinear and DequantizeLinear
(QDQ), which ONNX Runtime, TensorRT and OpenVINO read. Ranges of activations are the extremes over the calibration
images.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from image_classification.extras import need
from image_classification.file_writing import atomic_path

_SECONDS = 1.0  # timing budget per file and batch size
_LEAST_RUNS = 5


def quantise_onnx(source: Path, target: Path, images: Iterable[Tensor]) -> None:
    """Write an INT8 version of an exported network.

    Args:
        source: File written by `export_network`.
        target: The new file.
        images: Batches (N, 3, H, W), normalised, whose activations set the ranges.

    Raises:
        MissingPackageError: ONNX Runtime or onnx is not installed.
    """
    need("onnx", "onnxruntime")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder, atomic_path(target) as unfinished:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(str(source), str(prepared))
        quantization.quantize_static(
            str(prepared),
            str(unfinished),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
        )


@dataclasses.dataclass(frozen=True)
class ServedFigures:
    """Predictions and speed of an ONNX file on this machine's CPU.

    Attributes:
        num_bytes: Size of the file.
        predictions: (N,) class of each image.
        seconds: Batch size → seconds of each run.
    """

    num_bytes: int
    predictions: np.ndarray
    seconds: dict[int, list[float]]


def served(path: Path, images: Tensor, batch_sizes: Iterable[int]) -> ServedFigures:
    """Run a file in ONNX Runtime.

    Args:
        path: File written by `export_network` or `quantise_onnx`.
        images: (N, 3, H, W) normalised.
        batch_sizes: Batch sizes to time; those beyond N are left out.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(batch: np.ndarray) -> np.ndarray:
        logits: np.ndarray = session.run(["logits"], {"images": batch})[0]
        return logits

    pixels = images.numpy()
    predictions = np.concatenate(
        [run(part).argmax(1) for part in np.array_split(pixels, -(-len(pixels) // 32))]
    )
    seconds: dict[int, list[float]] = {}
    for size in batch_sizes:
        if size > len(pixels):
            continue
        run(pixels[:size])
        begin = time.perf_counter()
        taken: list[float] = []
        while len(taken) < _LEAST_RUNS or time.perf_counter() - begin < _SECONDS:
            start = time.perf_counter()
            run(pixels[:size])
            taken.append(time.perf_counter() - start)
        seconds[size] = taken
    return ServedFigures(path.stat().st_size, predictions, seconds)
