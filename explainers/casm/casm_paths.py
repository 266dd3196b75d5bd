"""Paths shared by the verbs that evaluate CASMs: where CASM files are found and where results are written."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from explainers.casm.model import Casm, load_casm
from explainers.measures.tables import Cell
from explainers.verbs.attribution_job import Network, check_writable
from image_classification.config import check, flag
from image_classification.data.data_config import ReadConfig
from image_classification.data.dataset import Dataset
from image_classification.file_writing import write_text
from image_classification.models import identity_of

#: File endings accepted for weights.
CHECKPOINT_ENDINGS = (".pth.tar", ".pth", ".pt", ".chk")


@dataclasses.dataclass(kw_only=True)
class FilesConfig:
    """Files"""

    casms_path: Path = flag(
        None,
        "--casms-path",
        metavar="DIR",
        help="folder of saliency mappings: checkpoint files, or run folders of train-casm",
    )
    log_path: Path | None = flag(
        None, "--log-path", metavar="DIR", help="with --save-to-file: folder of a results file per mapping"
    )
    save_to_file: bool = flag(
        False, "--save-to-file", help="write each mapping's results as a JSON file into --log-path"
    )
    json: Path | None = flag(None, "--json", metavar="FILE", help="also write the whole table as JSON")

    def __post_init__(self) -> None:
        check(
            self.casms_path is not None, "--casms-path is missing: give the folder of the saliency mappings"
        )
        check(
            self.save_to_file == (self.log_path is not None),
            "--log-path DIR and --save-to-file belong together: give both or neither",
        )

    def check_outputs(self) -> None:
        """Check that results can be written, before anything is computed.

        Raises:
            ConfigError: They cannot be written.
        """
        if self.log_path is not None:
            check_writable(self.log_path, "--log-path")
        if self.json is not None:
            check_writable(self.json.absolute().parent, "--json")


def find_casms(folder: Path) -> list[Path]:
    """Find CASM files in a folder: checkpoint files in it and in its direct subfolders, as training runs leave them.

    Raises:
        FileNotFoundError: The folder does not exist or holds no such file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--casms-path {folder}: there is no such folder")
    here = [path for path in folder.iterdir() if path.name.endswith(CHECKPOINT_ENDINGS)]
    below = [path for path in folder.glob("*/checkpoint.pth.tar") if path.is_file()]
    found = sorted(path for path in [*here, *below] if path.is_file() and not path.name.startswith("."))
    if not found:
        raise FileNotFoundError(
            f"--casms-path {folder}: no checkpoint in it, nor a folder with checkpoint.pth.tar; train one with "
            "`python -m explainers train-casm`"
        )
    return found


def casm_name(path: Path) -> str:
    """Name of a CASM in tables: that of its run's folder, or of its file."""
    return path.parent.name if path.name == "checkpoint.pth.tar" else path.name


@dataclasses.dataclass(frozen=True)
class CasmNetwork(Network):
    """A loaded CASM; `model` is its classifier."""

    casm: Casm


def casm_networks(
    paths: Sequence[Path], data: ReadConfig, dataset: Dataset, device: torch.device
) -> list[CasmNetwork]:
    """Load all CASMs and check them against the data set.

    Raises:
        WeightsError: A file holds no CASM.
        ConfigError: A CASM has another number of classes.
    """
    networks = []
    for path in paths:
        casm = load_casm(path, device=device)
        identity = identity_of(casm.classifier)
        classes = None if identity is None else identity.num_classes
        check(
            classes in (None, dataset.num_classes),
            f"--casms-path: {path} has {classes} classes, but {data.data} has {dataset.num_classes}: give the "
            "data that it was trained on",
        )
        networks.append(CasmNetwork(casm_name(path), casm.classifier, casm))
    return networks


def write_results(
    files: FilesConfig, rows: Sequence[Mapping[str, Cell]], config: Mapping[str, object]
) -> None:
    """Write the requested result files: all rows together, and one file per mapping."""
    if files.json is not None:
        _write(files.json, rows, config)
    if files.log_path is not None:
        for name in dict.fromkeys(row["casm"] for row in rows):
            _write(files.log_path / f"{name}.json", [row for row in rows if row["casm"] == name], config)


def _write(path: Path, rows: Sequence[Mapping[str, Cell]], config: Mapping[str, object]) -> None:
    plain = [_finite_cells(row) for row in rows]
    text = json.dumps({"rows": plain, "config": config}, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def _finite_cells(row: Mapping[str, Cell]) -> dict[str, Cell | None]:
    """Return a row for JSON, with null for figures that are not finite."""
    cells: dict[str, Cell | None] = {}
    for name, value in row.items():
        undefined = isinstance(value, float) and not math.isfinite(value)
        cells[name] = None if undefined else value
    return cells
