"""Bit-for-bit comparison of the files of two runs of a job: reports, checkpoints, JSON, arrays."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Names of keys whose values may differ (shell patterns), and why. They are ignored at any depth of any file.
IGNORED = {
    "*_ips": "speed",
    "*.data_time": "time", "*.compute_time": "time", "*compute_latency*": "time", "*seconds*": "time",
    "time": "time", "timestamp": "time", "datetime": "time", "elapsedtime": "time", "date": "time",
    "process.*": "host: processor and memory", "gpu.*": "host: accelerator", "*joules*": "energy",
    "config": "the flags, whose names may change", "command": "the flags", "invocation*": "the flags",
    "num_bytes": "size of a file that holds flags", "environment": "host", "provenance": "host and commit",
    "numpy": "state of NumPy's global generator, which jobs neither seed nor use",
    "python": "state of Python's global generator, likewise",
}  # fmt: skip


@dataclasses.dataclass
class Comparison:
    """Numbers of compared items, and their differences.

    Attributes:
        steps: Number of logging steps of reports.
        tensors: Number of tensors and arrays.
        numbers: Number of plain numbers.
        differences: One sentence each, in the order of the training.
    """

    steps: int = 0
    tensors: int = 0
    numbers: int = 0
    differences: list[str] = dataclasses.field(default_factory=list)

    def compare(self, place: str, base: Any, head: Any) -> None:
        """Compare plain data and tensors with any nesting; `place` names them in sentences."""
        if isinstance(base, Mapping) and isinstance(head, Mapping):
            self._compare_mappings(place, base, head)
        elif isinstance(base, (list, tuple)) and isinstance(head, (list, tuple)):
            self._compare_sequences(place, base, head)
        elif isinstance(base, (Tensor, np.ndarray)) and isinstance(head, (Tensor, np.ndarray)):
            self.tensors += 1
            self._note(place, tensor_difference(torch.as_tensor(base), torch.as_tensor(head)))
        else:
            self.numbers += isinstance(base, (int, float))
            if not same_value(base, head):
                self._note(place, f"{shortened(base)} became {shortened(head)}")

    def _compare_mappings(self, place: str, base: Mapping[Any, Any], head: Mapping[Any, Any]) -> None:
        for key in [*base, *(key for key in head if key not in base)]:
            inner = f"{place} {key}" if place.endswith(":") else f"{place}.{key}"
            if ignored(key):
                continue
            if key not in head:
                self._note(inner, "is missing from HEAD")
            elif key not in base:
                self._note(inner, "is missing from BASE")
            else:
                self.compare(inner, base[key], head[key])

    def _compare_sequences(self, place: str, base: Sequence[Any], head: Sequence[Any]) -> None:
        if len(base) != len(head):
            self._note(place, f"{len(base)} entries became {len(head)}")
        for number, (one, other) in enumerate(zip(base, head, strict=False)):
            self.compare(f"{place}[{number}]", one, other)

    def _note(self, place: str, difference: str | None) -> None:
        if difference is not None:
            self.differences.append(f"{place} {difference}")


def ignored(key: Any) -> bool:
    """Whether values of a key may differ."""
    return any(fnmatch.fnmatchcase(str(key), pattern) for pattern in IGNORED)


def same_value(base: Any, head: Any) -> bool:
    """Whether two plain values are the same, of the same type and to the last bit."""
    if isinstance(base, float) and isinstance(head, float):
        return struct.pack("d", base) == struct.pack("d", head)
    return type(base) is type(head) and base == head


def shortened(value: Any) -> str:
    """Format a value as text of at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def tensor_difference(base: Tensor, head: Tensor) -> str | None:
    """Describe how a tensor differs; None if shape, type and every bit are the same."""
    shapes = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (base, head)]
    if shapes[0] != shapes[1]:
        return f"{shapes[0]} became {shapes[1]}"
    if not base.numel():
        return None
    bits = [
        torch.empty(base.numel(), dtype=base.dtype).copy_(t.reshape(-1)).view(torch.uint8)
        for t in (base, head)
    ]
    different = (bits[0] != bits[1]).reshape(base.numel(), -1).any(1)
    count = int(different.sum())
    if not count:
        return None
    flat = int(different.nonzero()[0])
    index = [int(number) for number in np.unravel_index(flat, tuple(base.shape))]
    values = [tensor.reshape(-1)[flat].item() for tensor in (base, head)]
    largest = (base.double() - head.double()).abs().max().item()
    return (
        f"{count} of {base.numel()} values differ by at most {largest:.3g}, the first at {index}: {values[0]!r} became "
        f"{values[1]!r}"
    )


def read_figures(path: Path) -> dict[str, dict[str, list[Any]]]:
    """Read a JSON-lines report: "[epoch, iteration]" → key → the values logged there, in order; no flags, no units."""
    figures: dict[str, dict[str, list[Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line.removeprefix("DLLL "))
        if entry["type"] == "LOG" and entry["step"] != "PARAMETER":
            step = figures.setdefault(str(entry["step"]), {})
            for key, value in entry["data"].items():
                step.setdefault(key, []).append(value)
    return figures


def read_file(path: Path) -> Any:
    """Read a file as plain data, tensors and arrays."""
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    return torch.load(path, map_location="cpu", weights_only=True)


def is_report(path: Path) -> bool:
    """Whether a file is a JSON-lines report of a training."""
    return path.suffix == ".json" and "raport" in path.name


def result_files(folder: Path) -> list[str]:
    """Return the files of a job to compare, relative to its folder: reports first, since they show when differences
    began.
    """
    kinds = (".json", ".tar", ".pth", ".npy")
    paths = [p for p in folder.rglob("*") if p.suffix in kinds and p.is_file() and not p.name.startswith(".")]
    return [str(path.relative_to(folder)) for path in sorted(paths, key=lambda p: (not is_report(p), p))]


def compare_folders(base: Path, head: Path) -> Comparison:
    """Compare the files of a job in two folders."""
    comparison = Comparison()
    names, others = result_files(base), result_files(head)
    for name in names:
        if name not in others:
            comparison.differences.append(f"{name} is missing from HEAD")
            continue
        read = read_figures if is_report(base / name) else read_file
        contents = [read(folder / name) for folder in (base, head)]
        comparison.steps += len(contents[0]) if read is read_figures else 0
        comparison.compare(f"{name}:", *contents)
    comparison.differences += [f"{name} is missing from BASE" for name in others if name not in names]
    return comparison
