"""Pruned networks for other tools: ONNX, `torch.export`, and a state dict that needs nothing but torch.

Every file is read back, run on pictures and compared with the network before it is called finished. The batch size
stays free; the size of the pictures is fixed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from image_classification.checkpoint import save_atomically
from image_classification.config import ConfigError, check
from image_classification.models import capture_structure, main_and_auxiliary_logits, unwrap
from image_classification.models.structure import named_tensors, on_meta

FORMATS = ("onnx", "torch-export", "state-dict")
SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "state-dict": ".pt"}
TOLERANCE = 1e-4

LOADER = """\
import torch{imports}
saved = torch.load("{path}", weights_only=True)
model = {build}
for name, values in saved["attributes"].items():
    vars(model.get_submodule(name)).update(values)
for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
    tensor.data = saved["state_dict"].get(name, tensor.data)
"""
"""Builds the network from a `state-dict` file: the unpruned architecture first, then its widths and tensors."""


class ExportError(ValueError):
    """A network that a format cannot hold, or a file that computes something else."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """A finished file.

    Attributes:
        path: Where it is.
        format: One of `FORMATS`.
        difference: Largest absolute difference of a logit, file against network.
        num_images: Pictures that it was compared on.
        loader: Python that loads it.
    """

    path: Path
    format: str
    difference: float
    num_images: int
    loader: str


class _Logits(nn.Module):
    """A classifier whose only output is its logits, whatever else its forward pass returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return main_and_auxiliary_logits(self.network(images))[0]


def export_network(
    model: nn.Module, path: str | Path, format: str, images: Tensor, *, tolerance: float = TOLERANCE
) -> Exported:
    """Write a network in a format and make sure that the file computes the same.

    Args:
        model: Any classifier, pruned or not; it is not touched.
        path: The file.
        format: One of `FORMATS`.
        images: (N, 3, H, W) float, at least 3 pictures of the final size, that the file is compared on: all at once,
            and one by itself.
        tolerance: Largest difference of a logit.

    Raises:
        ConfigError: An unknown format, or a package that is not installed.
        ExportError: The format cannot hold the network, or the file computes something else.
    """
    check(format in FORMATS, f"--format {format}: choose from {', '.join(FORMATS)}")
    check(
        len(images) >= 3,
        f"{len(images)} pictures are too few to tell a free batch size from a fixed one: give 3",
    )
    path = Path(path)
    check(
        format != "torch-export" or path.suffix == ".pt2",
        f"--output {path}: torch.export reads files that end in .pt2 only",
    )
    network = copy.deepcopy(unwrap(model)).eval().cpu().float().requires_grad_(False)
    logits = _Logits(network.to(memory_format=torch.contiguous_format))
    images = images.cpu().float().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    write: dict[str, Callable[[_Logits, Path, Tensor], tuple[Callable[[Tensor], Tensor], str]]] = {
        "onnx": _write_onnx,
        "torch-export": _write_torch_export,
        "state-dict": _write_state_dict,
    }
    run, loader = write[format](logits, path, images)
    try:
        difference = _largest_difference(logits, run, images)
        if not difference <= tolerance:
            raise ExportError(
                f"the file's logits differ from the network's by {difference:.2g}, more than {tolerance:g}"
            )
    except (ExportError, RuntimeError) as error:
        path.unlink()
        raise ExportError(f"--format {format}: {_first_line(error)}; it was removed") from error
    return Exported(path, format, difference, len(images), loader)


@torch.no_grad()
def _largest_difference(network: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Over all pictures at once, and over the first by itself: a file with a fixed batch size fails one of them."""
    differences = []
    for batch in (images, images[:1]):
        expected, found = network(batch), run(batch)
        if found.shape != expected.shape:
            raise ExportError(
                f"the file returns logits of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
            )
        differences.append((expected - found).abs().max())
    return float(torch.stack(differences).max())  # NaN, which Python's max() would pass over, is no agreement


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Exporters print progress and warn about their own insides."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"--format onnx needs the package {name}: pip install 'lucidprune[export]'"
        ) from None


def _write_onnx(network: _Logits, path: Path, images: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
    runtime, _, _ = _package("onnxruntime"), _package("onnx"), _package("onnxscript")
    try:
        with _quietly():
            program = torch.onnx.export(
                network, (images[:2],), dynamo=True, input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: Dim("batch")},), verbose=False,
            )  # fmt: skip
            assert program is not None
            program.save(str(path), external_data=False)
    except (torch.onnx.OnnxExporterError, torch.export.UnsupportedOperatorException) as error:  # type: ignore[attr-defined]
        raise ExportError(f"--format onnx: {_first_line(error)}") from error
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])

    loader = (
        "import onnxruntime\n"
        f'session = onnxruntime.InferenceSession("{path}")\n'
        '(logits,) = session.run(["logits"], {"images": images})  # (N, 3, H, W) float32, normalised\n'
    )
    return run, loader


def _write_torch_export(
    network: _Logits, path: Path, images: Tensor
) -> tuple[Callable[[Tensor], Tensor], str]:
    try:
        with _quietly():
            program = torch.export.export(network, (images[:2],), dynamic_shapes=({0: Dim("batch")},))
            torch.export.save(program, path)
    except RuntimeError as error:
        raise ExportError(f"--format torch-export: {_first_line(error)}") from error
    loader = f'import torch\nmodel = torch.export.load("{path}").module()\nlogits = model(images)\n'
    return torch.export.load(path).module(), loader


def _write_state_dict(network: _Logits, path: Path, images: Tensor) -> tuple[Callable[[Tensor], Tensor], str]:
    model = network.network
    structure = capture_structure(model)
    attributes = {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        for name, values in structure.attributes.items()
    }
    saved = {
        "arch": structure.arch,
        "num_classes": structure.num_classes,
        "attributes": attributes,
        "state_dict": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }
    save_atomically(saved, path)
    imports, build = _architecture(model)
    code = LOADER.format(imports=imports, path=path, build=build)
    names: dict[str, Any] = {}
    exec(compile(code, "loader", "exec"), names)  # what is printed is what was tried
    return _Logits(names["model"].eval()), code


def _architecture(model: nn.Module) -> tuple[str, str]:
    """What to import and call for the unpruned architecture; torchvision's wherever it has the same network."""
    structure = capture_structure(model)
    arch, count, options = str(structure.arch), structure.num_classes, structure.options
    if not options and structure.image_size is None and not arch.startswith("timm/"):
        name = arch.removeprefix("torchvision/")
        if _same_in_torchvision(name, structure.fresh, count):
            return (
                ", torchvision",
                f'torchvision.models.get_model("{name}", weights=None, num_classes={count})',
            )
    given = {
        "num_classes": count,
        "model_config": structure.model_config,
        "image_size": structure.image_size,
        **options,
    }
    words = ", ".join(f"{key}={value!r}" for key, value in given.items() if value is not None)
    return (
        "\nfrom image_classification.models import create_model  # of LucidPrune: torchvision has no such network",
        f'create_model("{arch}", {words})',
    )


def _same_in_torchvision(name: str, fresh: Callable[[], nn.Module], num_classes: int | None) -> bool:
    """Whether torchvision builds a network with the same tensors under this name."""
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models(module=models):
        return False
    theirs = on_meta(lambda: models.get_model(name, weights=None, num_classes=num_classes))
    shapes = [{key: tensor.shape for key, tensor in named_tensors(net)} for net in (on_meta(fresh), theirs)]
    return shapes[0] == shapes[1]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
