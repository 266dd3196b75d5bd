"""Callbacks, through which other packages take part in training without the loop knowing them.

The docstring of `trainer.Trainer` shows where each event fires.
"""

from __future__ import annotations

import abc
import dataclasses

import torch
from torch import nn

from image_classification.checkpoint import Checkpointer
from image_classification.data.loader import Batch, Loader
from image_classification.distributed import Distributed
from image_classification.ema import Ema
from image_classification.observe.log import Logger
from image_classification.plain_data import Plain
from image_classification.precision import Precision
from image_classification.schedules import Schedule
from image_classification.train_config import TrainConfig


@dataclasses.dataclass
class TrainState:
    """Everything that changes while a network is trained.

    Attributes:
        model: The network itself, never wrapped by DDP or torch.compile.
        optimizer: Its optimizer.
        schedule: Learning rate as a function of the iteration.
        ema: Averaged network, or None.
        epoch: Current epoch, from 0.
        iteration: Number of optimizer steps since the start of training.
        best: Best validation figure of networks of the current size, None before their first validation. A rewrite
            resets it, since a smaller network does not compete with the larger one.
        best_epoch: Epoch of that figure, from 0.
        lr_factor: Multiplies the schedule (a callback's short re-warm-up, for instance).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    ema: Ema | None = None
    epoch: int = 0
    iteration: int = 0
    best: float | None = None
    best_epoch: int | None = None
    lr_factor: float = 1.0


class TrainLoop(abc.ABC):
    """The loop's interface for callbacks, implemented by `trainer.Trainer`.

    Attributes:
        config: Length, accumulation and NaN guard.
        state: Network, optimizer, schedule, average, iteration.
        precision: Autocast, scaling, memory format.
        distributed: This process's place among the ranks.
        logger: Console, report, TensorBoard.
        checkpointer: Writer of checkpoints.
        train_loader: Micro-batches of this rank.
        steps_per_epoch: Optimizer steps per epoch.
    """

    config: TrainConfig
    state: TrainState
    precision: Precision
    distributed: Distributed
    logger: Logger
    checkpointer: Checkpointer
    train_loader: Loader
    steps_per_epoch: int

    @abc.abstractmethod
    def release(self) -> None:
        """Drop DDP and compiled wrappers, before the network is rewritten. Collective."""

    @abc.abstractmethod
    def rebind(self) -> None:
        """Wrap the network again after it was rewritten. The search for the best checkpoint is reset."""

    @abc.abstractmethod
    def save(self, *, is_best: bool = False, end_of_epoch: bool = False) -> None:
        """Write a checkpoint. Collective."""


class Callback:
    """Base class: every event does nothing. Events run on all ranks, in the order the callbacks were given.

    A callback that rewrites the network (`state.model`, the optimizer, the average) calls `trainer.rebind()`
    afterwards, so that DDP and the compiled graph follow.
    """

    #: Key of the state in checkpoints; stateless callbacks leave it empty.
    name: str = ""

    def on_fit_start(self, trainer: TrainLoop) -> None:
        """Called before the first epoch, after a checkpoint was restored."""

    def on_epoch_start(self, trainer: TrainLoop) -> None:
        """Called before the first batch of an epoch (or the first batch after resuming in mid-epoch)."""

    def on_batch_start(self, trainer: TrainLoop, batch: Batch) -> None:
        """Called before the forward pass of every (micro-)batch."""

    def on_backward_end(self, trainer: TrainLoop) -> None:
        """Called when all gradients of an optimizer step exist (still multiplied by the loss scale)."""

    def on_step_end(self, trainer: TrainLoop) -> None:
        """Called after the optimizer's step, which `state.iteration` counts. No graph is alive: a place to rewrite."""

    def on_log(self, trainer: TrainLoop, figures: dict[str, float]) -> None:
        """Called at every logging step; entries added to `figures` are logged with the others."""

    def on_evaluate_end(self, trainer: TrainLoop, figures: dict[str, float]) -> None:
        """Called after a validation; `figures` are its results."""

    def on_epoch_end(self, trainer: TrainLoop) -> None:
        """Called after an epoch and its validation, before the epoch's checkpoint."""

    def on_fit_end(self, trainer: TrainLoop) -> None:
        """Called after the last epoch, not after an interruption."""

    def state_dict(self) -> Plain:
        """Return plain data and tensors for the checkpoint."""
        return {}

    def load_state_dict(self, state: Plain) -> None:
        """Restore a state from `state_dict`."""
