"""The logger of a run: passes figures to the console, the JSON-lines report and TensorBoard, on rank 0 only.

The other ranks have the same object without outputs, so that the training loop need not check its rank. For keys and
units of the figures see `observe.figures`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn

from image_classification.config import check, flag
from image_classification.observe.console import Console, Detail, ProgressTask
from image_classification.observe.figures import FIGURES
from image_classification.observe.json_report import Report
from image_classification.observe.tensorboard import TensorBoard
from image_classification.observe.trackers import MlflowTracker, WandbTracker


@dataclasses.dataclass(kw_only=True)
class LogConfig:
    """What is shown and written."""

    raport_file: str = flag(
        "experiment_raport.json",
        "--raport-file",
        help="JSON-lines report, relative to --workspace; '' writes none.",
        metavar="FILE",
        may_be_empty=True,
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
    mlflow: str | None = flag(
        None,
        "--mlflow",
        help="Write the figures to MLflow as well: a tracking server, sqlite:///FILE, or a folder.",
        metavar="URI",
    )
    wandb: str | None = flag(
        None,
        "--wandb",
        help="Write the figures to Weights & Biases as well; WANDB_MODE=offline keeps them in the workspace.",
        metavar="PROJECT",
    )
    console: Literal["auto", "live", "plain"] = flag(
        "auto", "--console", help="Live display or plain lines; auto asks whether the output is a terminal."
    )
    quiet: bool = flag(
        False, "--quiet", "-q", help="Messages and the summary alone on the screen: no progress, no epochs."
    )
    verbose: bool = flag(
        False, "--verbose", help="Every figure of an epoch on the screen, not those that steer alone."
    )

    def __post_init__(self) -> None:
        check(
            not (self.quiet and self.verbose), "--quiet and --verbose contradict each other: give one of them"
        )
        check(self.print_freq >= 1, f"--print-freq {self.print_freq}: must be at least 1 iteration")

    @property
    def detail(self) -> Detail:
        """Level of detail on the screen."""
        if self.quiet:
            return "quiet"
        return "verbose" if self.verbose else "normal"


class Output(Protocol):
    """A destination of figures."""

    def log(
        self, step: Sequence[int] | str, data: Mapping[str, object], iteration: int | None = None
    ) -> None:
        """Write the figures of a step."""

    def flush(self) -> None:
        """Write buffered output."""

    def close(self) -> None:
        """Write buffered output and close."""


class Logger:
    """Passes every figure and message of a run to its outputs.

    Args:
        config: The flags.
        workspace: Folder that relative paths refer to.
        is_main: Whether this is rank 0; elsewhere nothing is shown or written.
        append: Continue an existing report, for a resumed run.

    Raises:
        ConfigError: An output cannot be opened. So a full or read-only disk is noticed before training.
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
            report = Report(workspace / config.raport_file, append=append)
            for key, figure in FIGURES.items():
                report.describe(key, figure)
            self._outputs.append(report)
        if config.tensorboard is not None:
            self._tensorboard = TensorBoard(workspace / config.tensorboard)
            self._outputs.append(self._tensorboard)
        if config.mlflow is not None:
            self._outputs.append(MlflowTracker(config.mlflow, workspace, append=append))
        if config.wandb is not None:
            self._outputs.append(WandbTracker(config.wandb, workspace, append=append))
        live = None if config.console == "auto" else config.console == "live"
        self._console = Console(config.print_freq, live=live, detail=config.detail)
        self._outputs.append(self._console)

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log_parameters(self, parameters: Mapping[str, object]) -> None:
        """Write the resolved configuration, as step "PARAMETER"."""
        for output in self._outputs:
            output.log("PARAMETER", parameters)

    def log(self, step: Sequence[int], data: Mapping[str, object], iteration: int | None = None) -> None:
        """Write figures.

        Args:
            step: (epoch, iteration within the epoch), (epoch,) for a whole epoch, () for the run.
            data: Key → value on the host. Figures on a device must be read beforehand, all at once.
            iteration: Number of optimizer steps of the run, TensorBoard's axis; None for the last one given.
        """
        for output in self._outputs:
            output.log(tuple(step), data, iteration)

    def scalars(
        self, prefix: str, values: Mapping[str, object], step: Sequence[int], iteration: int | None = None
    ) -> None:
        """Write figures with a prefix: `scalars("pruning", {"macs": 2.1e9}, step)` logs `pruning.macs`."""
        self.log(step, {f"{prefix}.{key}": value for key, value in values.items()}, iteration)

    def image(self, tag: str, shown: torch.Tensor | Path, iteration: int) -> None:
        """Show an image in TensorBoard: (3, H, W) or (1, H, W), uint8 or float in 0…1, or a file."""
        if self._tensorboard is None:
            return
        if isinstance(shown, Path):
            from torchvision.io import ImageReadMode, decode_image

            pixels = decode_image(str(shown), ImageReadMode.RGB)
        else:
            pixels = shown
        self._tensorboard.image(tag, pixels, iteration)

    def histogram(self, tag: str, values: torch.Tensor, iteration: int) -> None:
        """Show the distribution of a tensor in TensorBoard. Copies the tensor to the host."""
        if self._tensorboard is not None:
            self._tensorboard.histogram(tag, values, iteration)

    def graph(self, model: nn.Module, images: torch.Tensor) -> None:
        """Show the network's graph in TensorBoard; a network that cannot be traced causes a message, not an error."""
        if self._tensorboard is None:
            return
        try:
            self._tensorboard.graph(model, images)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:  # from tracing foreign code
            self.message(f"no graph in TensorBoard, tracing failed: {str(error).splitlines()[0]}")

    def message(self, text: str) -> None:
        """Print a line on rank 0, above the progress display."""
        if self._console is not None:
            self._console.message(text)

    @contextlib.contextmanager
    def progress(self, total: int, description: str) -> Iterator[ProgressTask | NoTask]:
        """Show the progress of a loop; call `update(fields, advance=1)` of the yielded object to advance it."""
        if self._console is None:
            yield NoTask()
            return
        with self._console.progress(total, description) as task:
            yield task

    def flush(self) -> None:
        """Write the outputs' buffered data."""
        for output in self._outputs:
            output.flush()

    def close(self) -> None:
        """Write buffered data and close the outputs; the logger is silent afterwards."""
        for output in self._outputs:
            output.close()
        self._outputs = []
        self._console = None
        self._tensorboard = None


class NoTask:
    """Progress on a rank that shows none."""

    def update(self, fields: Mapping[str, object] | None = None, advance: int = 1) -> None:
        """Do nothing."""
