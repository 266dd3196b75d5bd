"""TensorBoard: scalars, images, histograms and the network's graph, over the number of optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from image_classification.config import ConfigError
from image_classification.models import evaluating


class TensorBoard:
    """Writes event files for `tensorboard --logdir`. The package is imported only here, when it is asked for.

    Args:
        directory: Where the event files go; a resumed run adds a file and continues its curves.

    Raises:
        ConfigError: TensorBoard is not installed, or the folder cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"--tensorboard needs the package: pip install tensorboard ({error})"
            ) from error
        try:
            self._writer = SummaryWriter(str(directory))
        except OSError as error:
            raise ConfigError(f"--tensorboard {directory} cannot be written: {error.strerror}") from error
        self._iteration = 0

    def metadata(self, metric: str, metadata: Mapping[str, Any]) -> None:
        """Nothing to do: TensorBoard has no place for units."""

    def log(self, step: Sequence[Any] | str, data: Mapping[str, Any], iteration: int | None = None) -> None:
        """Write the numbers of a step as scalars, `train.loss` under `train/loss`; parameters as text.

        Args:
            step: As in the report.
            data: Metric → value; what is not a finite number is left out.
            iteration: Number of optimizer steps so far, the horizontal axis; the last one given when None.
        """
        self._iteration = self._iteration if iteration is None else iteration
        if isinstance(step, str):
            rows = "\n".join(f"| {key} | {value} |" for key, value in data.items())
            self._writer.add_text(step.lower(), f"| name | value |\n| --- | --- |\n{rows}", self._iteration)
            return
        for key, value in data.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                # The figures of a whole epoch are curves of their own, not outliers of the per-iteration
                # ones.
                tag = key.replace(".", "/", 1) + (
                    "" if len(step) == 2 or not key.startswith("train.") else "_epoch"
                )
                self._writer.add_scalar(tag, value, self._iteration)

    def image(self, tag: str, picture: torch.Tensor, iteration: int) -> None:
        """Write a picture, (3, H, W) or (1, H, W), uint8 or float in 0…1."""
        self._writer.add_image(tag, picture.detach().cpu(), iteration)

    def histogram(self, tag: str, values: torch.Tensor, iteration: int) -> None:
        """Write the distribution of a tensor's finite values."""
        values = values.detach().float().flatten().cpu()
        self._writer.add_histogram(tag, values[values.isfinite()], iteration)

    def graph(self, model: nn.Module, images: torch.Tensor) -> None:
        """Write the network's graph, traced in evaluation mode; model and random state stay as they are.

        Raises:
            RuntimeError: The network cannot be traced.
        """
        devices = [images.device] if images.is_cuda else []
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
            self._writer.add_graph(model, images)

    def flush(self) -> None:
        """Write what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is buffered and close the file."""
        self._writer.close()
