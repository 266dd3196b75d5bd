"""What the loop shows of itself: resources at logging steps, the first images and the graph in TensorBoard."""

from __future__ import annotations

from image_classification.callbacks import Callback, TrainLoop
from image_classification.data.loader import Batch
from image_classification.extras import optional_import
from image_classification.observe.monitor import Monitor

with optional_import():
    from torchvision.utils import make_grid


class ResourceMonitor(Callback):
    """Adds what the run takes from the machine (`monitor.Monitor`) to the figures of every logging step.

    Args:
        monitor: Samples this process and its GPU; closed with the run by its owner.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self._num_images = 0

    def on_epoch_start(self, trainer: TrainLoop) -> None:
        """Leave out what was between two epochs."""
        self.monitor.restart()
        self._num_images = 0

    def on_batch_start(self, trainer: TrainLoop, batch: Batch) -> None:
        """Count images, for the energy of one."""
        self._num_images += len(batch)

    def on_log(self, trainer: TrainLoop, figures: dict[str, float]) -> None:
        """Add the figures since the last logging step."""
        figures |= self.monitor.read(self._num_images)
        self._num_images = 0


class FirstBatch(Callback):
    """Shows the first images of a run, as the network gets them, and its graph in TensorBoard."""

    num_images = 16

    def __init__(self) -> None:
        self._shown = False

    def on_batch_start(self, trainer: TrainLoop, batch: Batch) -> None:
        """Once per run; a network that cannot be traced is a message."""
        if self._shown:
            return
        self._shown = True
        images = batch.images[: self.num_images].detach().float()
        # Normalised images back to 0 … 1, each by its own range: the constants belong to the data set.
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        grid = make_grid((images - low) / (high - low).clamp(min=1e-6), nrow=4)
        trainer.logger.image("train/first_batch", grid, trainer.state.iteration)
        trainer.logger.graph(trainer.state.model, batch.images[:1].detach())
