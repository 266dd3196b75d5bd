"""Export of pruned networks: ONNX, `torch.export`, and a state dict that needs only torch.

Every file is read back, run on images and compared with the network before it counts as finished. The batch size is
dynamic; the image size is fixed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import io
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim

from image_classification.checkpoint import naming_the_reason, save_atomically
from image_classification.config import SettingError, check, check_choice, check_setting
from image_classification.extras import need
from image_classification.file_writing import atomic_path
from image_classification.models import (
    arch_info,
    capture_structure,
    class_names_of,
    input_of,
    main_and_auxiliary_logits,
    unwrap,
)
from image_classification.models.external import import_library
from image_classification.models.meta_device import on_meta
from image_classification.models.module_tree import tensors_by_all_names
from image_classification.models.registry import ModelError
from image_classification.process_state import ProcessState

Format = Literal["onnx", "torch-export", "state-dict"]
FORMATS: tuple[Format, ...] = get_args(Format)
DEFAULT_FORMAT: Format = "onnx"
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2", "state-dict": ".pt"}
TOLERANCE = 1e-4
#: Key of the class names, a JSON list: metadata in ONNX, an extra file in torch.export, an entry in a state dict.
CLASS_NAMES = "class_names"
#: Key of all other metadata in torch.export (an extra file) and state dicts (an entry). ONNX stores it by name.
METADATA = "metadata"

LOADER = """\
import torch{imports}
saved = torch.load("{path}", weights_only=True)
model = {build}
for name, values in saved["attributes"].items():
    vars(model.get_submodule(name)).update(values)
for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
    tensor.data = saved["state_dict"].get(name, tensor.data)
"""
"""Code that builds the network from a `state-dict` file: the unpruned architecture first, then its widths and
tensors.
"""


class ExportError(ValueError):
    """A format cannot represent the network, or a file computes something else."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """A finished file.

    Attributes:
        path: Path of the file.
        format: One of `FORMATS`.
        difference: Largest absolute difference of a logit, file against network.
        num_images: Number of images used for the comparison.
        loader: Python code that loads it.
        metadata: Metadata of the network in the file; see `description`.
    """

    path: Path
    format: Format
    difference: float
    num_images: int
    loader: str
    metadata: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of an export.

    Attributes:
        tolerance: Largest difference of a logit.
        opset: Opset of ONNX; None for PyTorch's default.
        notes: Additional entries of the metadata, such as `license` and `command`.
    """

    tolerance: float = TOLERANCE
    opset: int | None = None
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)


class _Logits(nn.Module):
    """A classifier whose only output is its logits, whatever else its forward pass returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return main_and_auxiliary_logits(self.network(images))[0]


def export_network(
    model: nn.Module, path: str | Path, format: Format, images: Tensor, settings: ExportSettings | None = None
) -> Exported:
    """Write a network in a format and check that the file computes the same.

    Args:
        model: Any classifier, pruned or not; it is not modified.
        path: The file.
        format: One of `FORMATS`.
        images: (N, 3, H, W) float, at least 3 images of the final size for the comparison: all at once, and one alone.
        settings: Tolerance, opset, metadata.

    Raises:
        ConfigError: The format is unknown, an opset is given for a format other than ONNX, or a package is not
            installed.
        ExportError: The format cannot represent the network, or the file computes something else.
    """
    check_choice("format", format, FORMATS)
    check(
        len(images) >= 3,
        f"{len(images)} images are too few to tell a free batch size from a fixed one: give 3",
    )
    path, settings = Path(path), settings or ExportSettings()
    check_setting(
        settings.opset is None or format == "onnx", "opset", settings.opset, f"is for onnx, not {format}"
    )
    check(
        format != "torch-export" or path.suffix == ".pt2",
        f"{path}: torch.export reads files that end in .pt2 only",
    )
    network = copy.deepcopy(unwrap(model)).eval().cpu().float().requires_grad_(False)
    logits = _Logits(network.to(memory_format=torch.contiguous_format))
    images = images.cpu().float().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {**description(model), **settings.notes}
    with atomic_path(path) as unfinished:
        run, loader = WRITERS[format](logits, unfinished, images, metadata, settings.opset)
        try:
            difference = _largest_difference(logits, run, images)
            if not difference <= settings.tolerance:
                raise ExportError(
                    f"the file's logits differ from the network's by {difference:.2g}, more than "
                    f"{settings.tolerance:g}"
                )
        except (ExportError, RuntimeError) as error:
            raise ExportError(f"{format}: {_first_line(error)}; no file was written") from error
    loader = loader.replace(str(unfinished), str(path))
    return Exported(path, format, difference, len(images), loader, metadata)


def description(model: nn.Module) -> dict[str, str]:
    """Return the known metadata needed to serve the network, each entry one line of text or JSON.

    Returns:
        `class_names`, and for the images `image_size` and `resize` (pixels), `mean` and `std` (of RGB in [0, 1]) and
            `geometry`.
    """
    names = class_names_of(model)
    images = input_of(model)
    known = {CLASS_NAMES: json.dumps(names)} if names is not None else {}
    wanted = {} if images is None else images.to_plain()
    return known | {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in wanted.items()
    }


def openvino_difference(exported: Exported, model: nn.Module, images: Tensor) -> float | None:
    """Return the largest absolute logit difference between an ONNX file in OpenVINO and the network.

    Returns None if OpenVINO is not installed.

    Args:
        exported: The file.
        model: The network, in evaluation mode.
        images: (N, 3, H, W) float, normalised.
    """
    if importlib.util.find_spec("openvino") is None:
        return None
    openvino: Any = importlib.import_module("openvino")
    # A CPU may compute in bfloat16 by default.
    compiled = openvino.compile_model(str(exported.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return _largest_difference(
        _Logits(model), lambda batch: torch.from_numpy(compiled(batch.numpy())[0]), images
    )


@torch.no_grad()
def _largest_difference(network: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Compare all images at once and the first alone, so that a file with a fixed batch size fails."""
    differences = []
    for batch in (images, images[:1]):
        expected = network(batch)
        found = run(batch)
        if found.shape != expected.shape:
            raise ExportError(
                f"the file returns logits of shape {tuple(found.shape)}, not {tuple(expected.shape)}"
            )
        differences.append((expected - found).abs().max())
    return float(torch.stack(differences).max())  # NaN is a disagreement, but Python's max() would skip it


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        yield


_SILENCE = ProcessState(_silence)


def _quietly() -> contextlib.AbstractContextManager[None]:
    """Silence exporters' progress output and warnings about their internals."""
    return _SILENCE.changed()


Written = tuple[Callable[[Tensor], Tensor], str]


def _write_onnx(
    network: _Logits, path: Path, images: Tensor, metadata: Mapping[str, str], opset: int | None
) -> Written:
    need("onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    try:
        with _quietly():
            program = torch.onnx.export(
                network,
                (images[:2],),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: Dim("batch")},),
                opset_version=opset,
                verbose=False,
            )
            assert program is not None
            program.model.metadata_props.update(metadata)
            program.save(str(path), external_data=False)
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(f"onnx: {_first_line(error)}") from error
    written = program.model.opset_imports[""]
    if opset not in (None, written):
        raise SettingError("opset", opset, f"PyTorch writes this network in {written} only")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])

    loader = (
        "import onnxruntime\n"
        f'session = onnxruntime.InferenceSession("{path}")\n'
        '(logits,) = session.run(["logits"], {"images": images})  # (N, 3, H, W) float32, normalised\n'
    )
    return run, loader


def _write_torch_export(
    network: _Logits, path: Path, images: Tensor, metadata: Mapping[str, str], opset: int | None
) -> Written:
    try:
        with _quietly():
            program = torch.export.export(network, (images[:2],), dynamic_shapes=({0: Dim("batch")},))
            extra = {f"{METADATA}.json": json.dumps(metadata)}
            if CLASS_NAMES in metadata:
                extra[f"{CLASS_NAMES}.json"] = metadata[CLASS_NAMES]
            with path.open("wb") as file, naming_the_reason(file) as writer:
                torch.export.save(program, writer, extra_files=extra)
    except RuntimeError as error:
        raise ExportError(f"torch-export: {_first_line(error)}") from error
    loader = f'import torch\nmodel = torch.export.load("{path}").module()\nlogits = model(images)\n'
    return torch.export.load(path).module(), loader


def _write_state_dict(
    network: _Logits, path: Path, images: Tensor, metadata: Mapping[str, str], opset: int | None
) -> Written:
    model = network.network
    structure = capture_structure(model)
    attributes = {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        for name, values in structure.attributes.items()
    }
    saved = {
        "arch": structure.arch,
        "num_classes": structure.num_classes,
        CLASS_NAMES: list(class_names_of(model) or []) or None,
        METADATA: dict(metadata),
        "attributes": attributes,
        "state_dict": {name: tensor.clone() for name, tensor in model.state_dict().items()},
    }
    save_atomically(saved, path)
    imports, build = _architecture(model)
    code = LOADER.format(imports=imports, path=path, build=build)
    names: dict[str, Any] = {}
    exec(compile(code, "loader", "exec"), names)  # the printed code is the code that was run
    return _Logits(names["model"].eval()), code


#: Format → function that writes the file and returns its inference function and the Python code that loads it.
WRITERS: dict[Format, Callable[[_Logits, Path, Tensor, Mapping[str, str], int | None], Written]] = {
    "onnx": _write_onnx,
    "torch-export": _write_torch_export,
    "state-dict": _write_state_dict,
}


def _architecture(model: nn.Module) -> tuple[str, str]:
    """Return the import and the call for the unpruned architecture; torchvision's if it has the same network."""
    structure = capture_structure(model)
    arch = str(structure.arch)
    count = structure.num_classes
    options = structure.options
    any_size = structure.image_size is None or not arch_info(arch).fixed_size
    if not options and any_size and not arch.startswith("timm/"):
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
        "\nfrom image_classification.models import create_model  # of LucidPrune: torchvision alone does not build it",
        f'create_model("{arch}", {words})',
    )


def _same_in_torchvision(name: str, fresh: Callable[[], nn.Module], num_classes: int | None) -> bool:
    """Whether torchvision builds a network with the same tensors under this name."""
    try:
        models = import_library("torchvision")
    except ModelError:  # torchvision is not installed, so LucidPrune's name is used
        return False
    if name not in models.list_models(module=models):
        return False
    theirs = on_meta(lambda: models.get_model(name, weights=None, num_classes=num_classes))
    shapes = [
        {key: tensor.shape for key, tensor in tensors_by_all_names(net)} for net in (on_meta(fresh), theirs)
    ]
    return shapes[0] == shapes[1]


def _first_line(error: Exception) -> str:
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))  # PyTorch's exporter colours its messages
    lines = text.strip().splitlines()
    return lines[0] if lines else type(error).__name__
