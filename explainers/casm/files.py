"""What the verbs that judge CASMs share: where CASMs are, where results go."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from explainers.casm.model import Casm, casm_name, load_casm
from explainers.job import Network, check_writable
from image_classification.config import check, flag
from image_classification.data.build import ReadConfig
from image_classification.data.dataset import Dataset
from image_classification.models import identity_of


@dataclasses.dataclass(kw_only=True)
class FilesConfig:
    """Files"""

    casms_path: Path | None = flag(
        None, "--casms-path", metavar="DIR",
        help="folder of saliency mappings: checkpoint files, or run folders of train-casm",
    )  # fmt: skip
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
        """Make sure before hours are spent that results can be written.

        Raises:
            ConfigError: They cannot.
        """
        if self.log_path is not None:
            check_writable(self.log_path, "--log-path")
        if self.json is not None:
            check_writable(self.json.absolute().parent, "--json")


@dataclasses.dataclass(frozen=True)
class CasmNetwork(Network):
    """A loaded CASM; `model` is its classifier."""

    casm: Casm


def casm_networks(
    paths: Sequence[Path], data: ReadConfig, dataset: Dataset, device: torch.device
) -> list[CasmNetwork]:
    """All CASMs, checked against the data set.

    Raises:
        WeightsError: A file that holds none.
        ConfigError: One for another number of classes.
    """
    networks = []
    for path in paths:
        casm = load_casm(path, device=device)
        identity = identity_of(casm.classifier)
        classes = None if identity is None else identity.num_classes
        check(
            classes in (None, dataset.num_classes),
            f"--casms-path: {path} tells {classes} classes apart, but {data.data} has {dataset.num_classes}: give the "
            "data that it was trained on",
        )
        networks.append(CasmNetwork(casm_name(path), casm.classifier, casm))
    return networks


def write_results(files: FilesConfig, rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> None:
    """Results as files, where they are asked for: all rows, and each mapping's own."""
    if files.json is not None:
        _write(files.json, rows, config)
    if files.log_path is not None:
        for name in dict.fromkeys(row["casm"] for row in rows):
            _write(files.log_path / f"{name}.json", [row for row in rows if row["casm"] == name], config)


def _write(path: Path, rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> None:
    plain = [{key: _finite(value) for key, value in row.items()} for row in rows]
    text = json.dumps({"rows": plain, "config": config}, indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
