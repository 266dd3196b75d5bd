"""TensorBoard: scalars, images, histograms and the network's graph, over the number of optimizer steps."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn

from image_classification.config import SettingError
from image_classification.extras import optional_import
from image_classification.models import evaluating
from image_classification.observe.figures import curves


class TensorBoard:
    """Writes event files for `tensorboard --logdir`. The package is imported only here, on demand.

    Args:
        directory: Folder of the event files; a resumed run adds a file and continues its curves.

    Raises:
        SettingError: TensorBoard is not installed, or the folder cannot be written to.
    """

    def __init__(self, directory: Path) -> None:
        with optional_import():
            from torch.utils.tensorboard import SummaryWriter
        try:
            self._writer = SummaryWriter(str(directory))
        except OSError as error:
            problem = f"cannot be written: {error.strerror}"
            raise SettingError("tensorboard", str(directory), problem) from error
        self._iteration = 0
        self._parameters: dict[str, int | float | str] = {}
        self._results: dict[str, float] = {}
        self._directory = directory
        self._failed = False

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Guard every use of the writer: a full disk loses the rest of the curves, but does not stop the training."""
        try:
            yield
        except OSError as error:
            self._failed = True
            warnings.warn(
                f"TensorBoard's files in {self._directory} are incomplete ({error.strerror or error}): nothing more is "
                "written there; training goes on",
                stacklevel=3,
            )

    def log(
        self, step: Sequence[int] | str, data: Mapping[str, object], iteration: int | None = None
    ) -> None:
        """Write the numbers of a step as scalars, `train.loss` under `train/loss`; parameters as text.

        Args:
            step: As in the report.
            data: Metric → value; values that are not finite numbers are left out.
            iteration: Number of optimizer steps so far, the horizontal axis; None for the last one given.
        """
        self._iteration = self._iteration if iteration is None else iteration
        if self._failed:
            return
        with self._writing():
            self._log(step, data)

    def _log(self, step: Sequence[int] | str, data: Mapping[str, object]) -> None:
        if isinstance(step, str):
            rows = "\n".join(f"| {key} | {value} |" for key, value in data.items())
            self._writer.add_text(step.lower(), f"| name | value |\n| --- | --- |\n{rows}", self._iteration)
            self._parameters |= {key: _comparable(value) for key, value in data.items()}
            return
        figures = curves(step, data)
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, self._iteration)
        if len(step) < 2:
            self._results |= figures

    def image(self, tag: str, pixels: torch.Tensor, iteration: int) -> None:
        """Write an image, (3, H, W) or (1, H, W), uint8 or float in 0…1."""
        if not self._failed:
            with self._writing():
                self._writer.add_image(tag, pixels.detach().cpu(), iteration)

    def histogram(self, tag: str, values: torch.Tensor, iteration: int) -> None:
        """Write the distribution of a tensor's finite values."""
        values = values.detach().float().flatten().cpu()
        if not self._failed:
            with self._writing():
                self._writer.add_histogram(tag, values[values.isfinite()], iteration)

    def graph(self, model: nn.Module, images: torch.Tensor) -> None:
        """Write the network's graph, traced in evaluation mode; model and random state are not affected.

        Raises:
            RuntimeError: The network cannot be traced.
        """
        if not self._failed:
            with self._writing(), evaluating(model, keep_random_state=True), torch.no_grad():
                self._writer.add_graph(model, images)

    def flush(self) -> None:
        """Write buffered data."""
        if not self._failed:
            with self._writing():
                self._writer.flush()

    def close(self) -> None:
        """Write buffered data and the run's row in the table of hyperparameters, and close the file."""
        if not self._failed:
            with self._writing():
                self._compare()
                self._writer.close()

    def _compare(self) -> None:
        """The settings beside the last figures of epochs and run, as TensorBoard's HParams page has them.

        SummaryWriter's own `add_hparams` writes them into a folder of their own, as if they were another run.
        """
        from torch.utils.tensorboard.summary import hparams
        from torch.utils.tensorboard.writer import FileWriter

        if self._parameters:
            events = cast("FileWriter", self._writer.file_writer)
            for summary in hparams(self._parameters, self._results):
                events.add_summary(summary)


def _comparable(value: object) -> int | float | str:
    """A setting as the table of hyperparameters takes it: numbers are compared as such, the rest as words."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
