"""The JSON-lines report of a run, with the keys and steps of NVIDIA's DeepLearningExamples.

One JSON object per line: `timestamp`, `datetime`, `elapsedtime`, `type` ("LOG" or "METADATA"), and `step` and
`data` or `metric` and `metadata`. DLLogger writes the same objects behind a `DLLL ` prefix, which
`read_report` accepts. The keys and their units: docs/report-keys.md.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from image_classification.config import SettingError
from image_classification.file_writing import unused_path, write_text
from image_classification.observe.figures import Figure
from image_classification.plain_data import Plain
from image_classification.small_files import parse_json

_PREFIX = "DLLL "
_LONGEST_LINE = 1 << 24


class Report:
    """Writes the report. Failing to open it stops the run at its start; a failing write later only warns.

    Args:
        path: The file; its folder is created if needed.
        append: Continue an existing file (a resumed run). Otherwise an existing file is kept under a numbered name.

    Raises:
        SettingError: The file cannot be opened for writing.
    """

    def __init__(self, path: Path, append: bool = False) -> None:
        self.path = path
        self._start = time.monotonic()
        self._failed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torn = False
            if path.is_file() and path.stat().st_size:
                if append:
                    torn = _is_torn(path)
                else:
                    path.rename(unused_path(path))
            self._file: TextIO = path.open("a+", encoding="utf-8")
        except OSError as error:
            problem = f"cannot be written ({error.strerror}): choose another file or `workspace`, or '' for no report"
            raise SettingError("raport_file", str(path), problem) from error
        if torn:  # the run was killed within a line: end it, so that the next line is intact
            self._write_text("\n")

    def describe(self, key: str, figure: Figure) -> None:
        """Write a figure's unit and format, if it has them, as `{"unit": …, "format": …}`."""
        metadata = {}
        if figure.unit is not None:
            metadata["unit"] = figure.unit
        if figure.format is not None:
            metadata["format"] = f":{figure.format}"
        if metadata:
            self._write({"type": "METADATA", "metric": key, "metadata": metadata})

    def log(
        self, step: Sequence[int] | str, data: Mapping[str, object], iteration: int | None = None
    ) -> None:
        """Write figures.

        Args:
            step: (epoch, iteration) within the epoch, (epoch,) for a whole epoch, () for the run, or
                "PARAMETER".
            data: Metric → value; NaN and infinities become null, since JSON has neither.
            iteration: Ignored: the report counts by `step`.
        """
        values = {key: _as_json(value) for key, value in data.items()}
        self._write({"type": "LOG", "step": step if isinstance(step, str) else list(step), "data": values})

    def flush(self) -> None:
        """Flush to the operating system. Every line already is."""

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError as error:
            self._warn(error)

    def _write(self, entry: dict[str, object]) -> None:
        now = datetime.datetime.now()
        head = {
            "timestamp": str(now.timestamp()),
            "datetime": str(now),
            "elapsedtime": str(time.monotonic() - self._start),
        }
        self._write_text(json.dumps(head | entry, allow_nan=False) + "\n")

    def _write_text(self, text: str) -> None:
        try:
            if os.fstat(self._file.fileno()).st_nlink == 0:
                self._write_again()
            # A failed write may have left part of a line, so start a new one.
            self._file.write("\n" + text if self._failed else text)
            self._file.flush()
        except OSError as error:
            self._warn(error)
        else:
            self._failed = False

    def _write_again(self) -> None:
        """Restore the content after the file was removed while open, possibly with its folder."""
        self._file.seek(0)
        held = self._file.read()
        write_text(self.path, held)
        self._file.close()
        self._file = self.path.open("a+", encoding="utf-8")
        warnings.warn(f"the report {self.path} was removed and is written again, whole", stacklevel=2)

    def _warn(self, error: OSError) -> None:
        if not self._failed:
            warnings.warn(
                f"the report {self.path} is incomplete: {error.strerror}; training goes on", stacklevel=2
            )
        self._failed = True


def read_report(path: Path) -> list[Plain]:
    """Read a report, LucidPrune's or DLLogger's; lines torn by a crash or a full disk are left out.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    entries = []
    with path.open(encoding="utf-8", errors="replace") as file:
        # Content without line ends is not a report, and may be endless.
        while 0 < len(line := file.readline(_LONGEST_LINE)) < _LONGEST_LINE:
            try:
                entry = parse_json(line.removeprefix(_PREFIX))
            except ValueError:
                continue
            if isinstance(entry, dict):
                entries.append(entry)
    return entries


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() != b"\n"


def _as_json(value: object) -> object:
    """Convert numbers of NumPy and PyTorch to plain JSON; None for values that JSON cannot represent."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
