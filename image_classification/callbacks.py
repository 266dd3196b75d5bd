"""Callbacks: how other packages take part in training without the loop knowing them.

Where each event fires is written in the docstring of `trainer.Trainer`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchvision.utils import make_grid

from image_classification.ema import Ema
from image_classification.monitor import Monitor
from image_classification.schedules import Schedule

if TYPE_CHECKING:
    from image_classification.data.loader import Batch
    from image_classification.trainer import Trainer


@dataclasses.dataclass
class TrainState:
    """Everything that changes while a network is trained.

    Attributes:
        model: The network itself, never wrapped by DDP or torch.compile.
        optimizer: Its optimizer.
        schedule: Learning rate as a function of the iteration.
        ema: Averaged network, or None.
        epoch: Epoch under way, from 0.
        iteration: Optimizer steps finished since the start of training.
        best: Best validation figure so far, None before the first validation.
        lr_factor: Multiplies the schedule (a callback's short re-warm-up, for instance).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    ema: Ema | None = None
    epoch: int = 0
    iteration: int = 0
    best: float | None = None
    lr_factor: float = 1.0


class Callback:
    """Base class: every event does nothing. Events run on all ranks, in the order the callbacks were given.

    A callback that rewrites the network (`state.model`, the optimizer, the average) calls `trainer.rebind()`
    afterwards, so that DDP and the compiled graph follow.
    """

    #: Key under which the state is stored in checkpoints; stateless callbacks leave it empty.
    name: str = ""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before the first epoch, after a checkpoint was restored."""

    def on_epoch_start(self, trainer: Trainer) -> None:
        """Before the first batch of an epoch (or the first after a resume in mid-epoch)."""

    def on_batch_start(self, trainer: Trainer, batch: Batch) -> None:
        """Before the forward pass of every (micro-)batch."""

    def on_backward_end(self, trainer: Trainer) -> None:
        """All gradients of an optimizer step are there (still multiplied by the loss scale)."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After the optimizer's step; `state.iteration` counts it. No graph is alive: a place to rewrite."""

    def on_log(self, trainer: Trainer, figures: dict[str, float]) -> None:
        """At every logging step; entries added to `figures` are logged with the others."""

    def on_evaluate_end(self, trainer: Trainer, figures: dict[str, float]) -> None:
        """After a validation; `figures` are its results."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """After an epoch and its validation, before the epoch's checkpoint."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """After the last epoch, not after an interruption."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state of `state_dict`."""


class ResourceMonitor(Callback):
    """Adds what the run takes from the machine (`monitor.Monitor`) to the figures of every logging step.

    Args:
        monitor: Samples this process and its GPU; closed with the run by its owner.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self._num_images = 0

    def on_batch_start(self, trainer: Trainer, batch: Batch) -> None:
        """Count pictures, for the energy of one."""
        self._num_images += len(batch)

    def on_log(self, trainer: Trainer, figures: dict[str, float]) -> None:
        """Add the figures since the last logging step."""
        figures |= self.monitor.read(self._num_images)
        self._num_images = 0


class FirstBatch(Callback):
    """Shows the first pictures of a run, as the network gets them, and its graph in TensorBoard."""

    num_pictures = 16

    def __init__(self) -> None:
        self._shown = False

    def on_batch_start(self, trainer: Trainer, batch: Batch) -> None:
        """Once per run; a network that cannot be traced is a message."""
        if self._shown:
            return
        self._shown = True
        pictures = batch.images[: self.num_pictures].detach().float()
        # Normalised pictures back to 0 … 1, each by its own range: the constants belong to the data set.
        low, high = pictures.amin((1, 2, 3), keepdim=True), pictures.amax((1, 2, 3), keepdim=True)
        grid = make_grid((pictures - low) / (high - low).clamp(min=1e-6), nrow=4)
        trainer.logger.image("train/first_batch", grid, trainer.state.iteration)
        trainer.logger.graph(trainer.state.model, batch.images[:1].detach())
