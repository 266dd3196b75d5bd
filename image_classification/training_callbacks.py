"""Callbacks for monitoring the loop: resources at logging steps, the first images and the graph in TensorBoard."""

from __future__ import annotations

from image_classification.callbacks import Callback, TrainLoop
from image_classification.data.loader import Batch
from image_classification.extras import optional_import
from image_classification.observe.monitor import Monitor

with optional_import():
    from torchvision.utils import make_grid


class ResourceMonitor(Callback):
    """Adds the run's use of resources (`monitor.Monitor`) to the figures of every logging step.

    Args:
        monitor: Samples this process and its GPU; its owner closes it at the end of the run.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self._num_images = 0

    def on_epoch_start(self, trainer: TrainLoop) -> None:
        """Leave out the time between two epochs."""
        self.monitor.restart()
        self._num_images = 0

    def on_batch_start(self, trainer: TrainLoop, batch: Batch) -> None:
        """Count images, for the energy per image."""
        self._num_images += len(batch)

    def on_log(self, trainer: TrainLoop, figures: dict[str, float]) -> None:
        """Add the figures since the last logging step."""
        figures |= self.monitor.read(self._num_images)
        self._num_images = 0


class FirstBatch(Callback):
    """Shows a run's first input images and the network's graph in TensorBoard."""

    num_images = 16

    def __init__(self) -> None:
        self._shown = False

    def on_batch_start(self, trainer: TrainLoop, batch: Batch) -> None:
        """Show both once per run; a network that cannot be traced causes a message."""
        if self._shown:
            return
        self._shown = True
        images = batch.images[: self.num_images].detach().float()
        # Map normalised images back to 0 … 1 by their own range, since the constants belong to the data set.
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        grid = make_grid((images - low) / (high - low).clamp(min=1e-6), nrow=4)
        trainer.logger.image("train/first_batch", grid, trainer.state.iteration)
        trainer.logger.graph(trainer.state.model, batch.images[:1].detach())
