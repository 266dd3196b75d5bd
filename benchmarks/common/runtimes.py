"""Running a network operator by operator, compiled, or as an ONNX file, and timing several networks in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from common.measure import Call, in_turns
from image_classification.models import inference
from pruning.costs.timing import Stopwatch
from pruning.files.exporting import export_network


def eager(model: nn.Module, images: Tensor) -> Call:
    """Prepare the network to run operator by operator."""
    return lambda: model(images)


def compiled(model: nn.Module, images: Tensor) -> Call:
    """Compile for this shape, with the weights as constants: batch norms merged, weights packed for the device."""
    run = torch.compile(model, dynamic=False, options={"freezing": True})
    return lambda: run(images)


def in_onnxruntime(model: nn.Module, images: Tensor) -> Call:
    """Prepare the file of `pruning export --format onnx` in ONNX Runtime, with as many threads as PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        export_network(model, file, "onnx", torch.randn(3, *images.shape[1:]))
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = images.numpy()
    return lambda: session.run(["logits"], {"images": inputs})


RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "eager": eager,
    "compile": compiled,
    "onnxruntime": in_onnxruntime,
}


def seconds_in(
    runtime: str, networks: Mapping[str, nn.Module], images: Tensor, repeats: int
) -> dict[str, list[float]]:
    """Return seconds per batch of every network in every round, measured in turns.

    Args:
        runtime: One of `RUNTIMES`.
        networks: Name → network; in evaluation mode while it is timed.
        images: (N, 3, H, W), the batch.
        repeats: Number of rounds.
    """
    torch.compiler.reset()  # otherwise versions for other batch sizes count towards the compiler's limit
    with inference(*networks.values()):
        calls = {name: RUNTIMES[runtime](network, images) for name, network in networks.items()}
        return in_turns(calls, Stopwatch(images.device).read, repeats, warm_up=2)
