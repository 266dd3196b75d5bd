"""One logger for a run: hands figures to the console, the JSON-lines report and TensorBoard, on rank 0 only.

The other ranks have the same object without outputs, so that the training loop asks nobody for its rank. The
keys are those of the field (`train.loss`, `val.top1`, …): `METRICS` has their units, docs/report-keys.md says
what they mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from image_classification.config import check, flag
from image_classification.console import Console, ProgressTask
from image_classification.report import Report
from image_classification.tensorboard import TensorBoard

METRICS: dict[str, tuple[str | None, str]] = {
    "train.loss": (None, ".5f"),
    "train.top1": ("%", ".2f"),
    "train.task_loss": (None, ".5f"),
    "train.distill_loss": (None, ".5f"),
    "train.match_loss": (None, ".6f"),
    "train.kl": (None, ".4f"),
    "train.area": (None, ".4f"),
    "train.tv": (None, ".2f"),
    "held_out.kl": (None, ".4f"),
    "held_out.agreement": ("%", ".2f"),
    "held_out.area": ("%", ".2f"),
    "held_out.samples": (None, ".0f"),
    "val.kl": (None, ".4f"),
    "val.agreement": ("%", ".2f"),
    "val.area": ("%", ".2f"),
    "train.decoder_loss": (None, ".4f"),
    "train.lr_casm": (None, ".5g"),
    "train.confused": ("%", ".1f"),
    "train.masked_top1": ("%", ".2f"),
    "train.mask_mean": (None, ".3f"),
    "train.mask_std": (None, ".3f"),
    "train.mask_entropy": ("nats", ".3f"),
    "train.mask_tv": (None, ".4f"),
    "val.masked_top1": ("%", ".2f"),
    "val.masked_entropy": ("nats", ".3f"),
    "val.mask_mean": (None, ".3f"),
    "val.mask_std": (None, ".3f"),
    "val.mask_entropy": ("nats", ".3f"),
    "val.mask_tv": (None, ".4f"),
    "train.lr": (None, ".5g"),
    "train.grad_scale": (None, ".1f"),
    "train.compute_ips": ("img/s", ".2f"),
    "train.total_ips": ("img/s", ".2f"),
    "train.data_time": ("s", ".5f"),
    "train.compute_time": ("s", ".5f"),
    "train.epoch_seconds": ("s", ".1f"),
    "train.skipped_updates": (None, ".0f"),
    "train.substituted_samples": (None, ".0f"),
    "train.joules_per_image": ("J", ".4f"),
    "gpu.util": ("%", ".1f"),
    "gpu.memory_gib": ("GiB", ".2f"),
    "gpu.power_w": ("W", ".1f"),
    "gpu.temperature_c": ("°C", ".1f"),
    "process.cpu_cores": ("cores", ".2f"),
    "process.memory_gib": ("GiB", ".2f"),
}
"""Key → (unit, format). A change here changes the report: docs/report-keys.md lists the same keys."""

VALIDATION_METRICS: dict[str, tuple[str | None, str]] = {
    "loss": (None, ".5f"),
    "top1": ("%", ".2f"),
    "top5": ("%", ".2f"),
    "map": ("%", ".2f"),
    "f1": ("%", ".2f"),
    "f1_macro": ("%", ".2f"),
    "samples": (None, ".0f"),
    "compute_ips": ("img/s", ".2f"),
    "total_ips": ("img/s", ".2f"),
    "data_time": ("s", ".5f"),
    "compute_latency": ("s", ".5f"),
    "compute_latency_at50": ("s", ".5f"),
    "compute_latency_at95": ("s", ".5f"),
    "compute_latency_at99": ("s", ".5f"),
    "compute_latency_at100": ("s", ".5f"),
}
"""The same under each validation prefix: `val`, and `val_ema` for the averaged weights."""


@dataclasses.dataclass(kw_only=True)
class LogConfig:
    """What is shown and written."""

    raport_file: str = flag(
        "experiment_raport.json",
        "--raport-file",
        help="JSON-lines report, relative to --workspace; '' writes none.",
        metavar="FILE",
    )
    print_freq: int = flag(
        10,
        "--print-freq",
        "-p",
        help="Iterations between two readings of the figures (each waits for the GPU once).",
    )
    tensorboard: str | None = flag(
        None,
        "--tensorboard",
        help="Write TensorBoard files, to DIR or to 'tensorboard', relative to --workspace.",
        nargs="?",
        const="tensorboard",
        metavar="DIR",
    )
    console: str = flag(
        "auto",
        "--console",
        help="Live display or plain lines; auto asks whether the output is a terminal.",
        choices=("auto", "live", "plain"),
    )

    def __post_init__(self) -> None:
        check(self.print_freq >= 1, f"--print-freq {self.print_freq}: must be at least 1 iteration")


class Output(Protocol):
    """A place where figures go."""

    def metadata(self, metric: str, metadata: Mapping[str, Any]) -> None:
        """Describe a metric."""

    def log(self, step: Sequence[Any] | str, data: Mapping[str, Any], iteration: int | None = None) -> None:
        """Take the figures of a step."""

    def flush(self) -> None:
        """Write what is buffered."""

    def close(self) -> None:
        """Write what is buffered and let go."""


class Logger:
    """Hands every figure and message of a run to its outputs.

    Args:
        config: What is shown and written.
        workspace: Folder that relative paths start from.
        is_main: Whether this is rank 0; elsewhere nothing is shown or written.
        append: Go on with an existing report, for a resumed run.

    Raises:
        ConfigError: An output cannot be opened. This is where a full or read-only disk is noticed, before
            training.
    """

    def __init__(
        self, config: LogConfig, workspace: Path, *, is_main: bool = True, append: bool = False
    ) -> None:
        self._console: Console | None = None
        self._tensorboard: TensorBoard | None = None
        self._outputs: list[Output] = []
        if not is_main:
            return
        if config.raport_file:
            self._outputs.append(Report(workspace / config.raport_file, append=append))
        if config.tensorboard is not None:
            self._tensorboard = TensorBoard(workspace / config.tensorboard)
            self._outputs.append(self._tensorboard)
        live = None if config.console == "auto" else config.console == "live"
        self._console = Console(config.print_freq, live=live)
        self._outputs.append(self._console)
        validation = {
            f"{prefix}.{key}": entry
            for prefix in ("val", "val_ema")
            for key, entry in VALIDATION_METRICS.items()
        }
        for key, (unit, pattern) in (METRICS | validation).items():
            self.log_metadata(key, unit, pattern)

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log_metadata(self, key: str, unit: str | None = None, format: str | None = None) -> None:
        """Describe a metric that is not in `METRICS`: its unit and its Python format (".2f")."""
        metadata = {"unit": unit, "format": None if format is None else f":{format}"}
        for output in self._outputs:
            output.metadata(key, {name: value for name, value in metadata.items() if value is not None})

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Write the resolved configuration, as step "PARAMETER"."""
        for output in self._outputs:
            output.log("PARAMETER", parameters)

    def log(self, step: Sequence[int], data: Mapping[str, Any], iteration: int | None = None) -> None:
        """Write figures.

        Args:
            step: (epoch, iteration within the epoch), (epoch,) for a whole epoch, () for the run.
            data: Key → value on the host. Figures that live on a device are read before, all together.
            iteration: Number of optimizer steps of the run, TensorBoard's axis; the last one given when None.
        """
        for output in self._outputs:
            output.log(tuple(step), data, iteration)

    def scalars(
        self, prefix: str, values: Mapping[str, Any], step: Sequence[int], iteration: int | None = None
    ) -> None:
        """Write figures with a prefix: `scalars("pruning", {"macs": 2.1e9}, step)` logs `pruning.macs`."""
        self.log(step, {f"{prefix}.{key}": value for key, value in values.items()}, iteration)

    def image(self, tag: str, picture: torch.Tensor | Path, iteration: int) -> None:
        """Show a picture in TensorBoard: (3, H, W) or (1, H, W), uint8 or float in 0…1, or a file."""
        if self._tensorboard is None:
            return
        if isinstance(picture, Path):
            from torchvision.io import ImageReadMode, decode_image

            pixels = decode_image(str(picture), ImageReadMode.RGB)
        else:
            pixels = picture
        self._tensorboard.image(tag, pixels, iteration)

    def histogram(self, tag: str, values: torch.Tensor, iteration: int) -> None:
        """Show the distribution of a tensor in TensorBoard. Copies the tensor to the host."""
        if self._tensorboard is not None:
            self._tensorboard.histogram(tag, values, iteration)

    def graph(self, model: nn.Module, images: torch.Tensor) -> None:
        """Show the network's graph in TensorBoard; one that cannot be traced is a message, not an error."""
        if self._tensorboard is None:
            return
        try:
            self._tensorboard.graph(model, images)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:  # what tracing foreign code raises
            self.message(f"no graph in TensorBoard, tracing failed: {str(error).splitlines()[0]}")

    def message(self, text: str) -> None:
        """Print a line on rank 0, above the progress display."""
        if self._console is not None:
            self._console.message(text)

    @contextlib.contextmanager
    def progress(self, total: int, description: str) -> Iterator[ProgressTask | SilentTask]:
        """Show the progress of a loop; `update(fields, advance=1)` of what this yields moves it on."""
        if self._console is None:
            yield SilentTask()
            return
        with self._console.progress(total, description) as task:
            yield task

    def flush(self) -> None:
        """Write what the outputs have buffered."""
        for output in self._outputs:
            output.flush()

    def close(self) -> None:
        """Write what is buffered and close the outputs; the logger is silent afterwards."""
        for output in self._outputs:
            output.close()
        self._outputs, self._console, self._tensorboard = [], None, None


class SilentTask:
    """The progress of a rank that shows none."""

    def update(self, fields: Mapping[str, Any] | None = None, advance: int = 1) -> None:
        """Do nothing."""
