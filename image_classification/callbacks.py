"""Callbacks: how other packages take part in training without the loop knowing them.

Where each event fires is written in the docstring of `trainer.Trainer`.
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
        epoch: Epoch under way, from 0.
        iteration: Optimizer steps finished since the start of training.
        best: Best validation figure of networks of the present size, None before their first validation: a rewrite
            starts over, since a smaller network does not compete with what it was cut from.
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
    """What a callback may use of the loop it takes part in; `trainer.Trainer` is the loop.

    Attributes:
        config: Length, accumulation, guard.
        state: Network, optimizer, schedule, average, iteration.
        precision: Autocast, scaling, memory format.
        distributed: This process among the ranks.
        logger: Console, report, TensorBoard.
        checkpointer: Where checkpoints go.
        train_loader: Micro-batches of this rank.
        steps_per_epoch: Optimizer steps of an epoch.
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
        """Wrap the network again, after it was rewritten. The search for the best checkpoint starts over."""

    @abc.abstractmethod
    def save(self, *, is_best: bool = False, end_of_epoch: bool = False) -> None:
        """Write a checkpoint. Collective."""


class Callback:
    """Base class: every event does nothing. Events run on all ranks, in the order the callbacks were given.

    A callback that rewrites the network (`state.model`, the optimizer, the average) calls `trainer.rebind()`
    afterwards, so that DDP and the compiled graph follow.
    """

    #: Key under which the state is stored in checkpoints; stateless callbacks leave it empty.
    name: str = ""

    def on_fit_start(self, trainer: TrainLoop) -> None:
        """Before the first epoch, after a checkpoint was restored."""

    def on_epoch_start(self, trainer: TrainLoop) -> None:
        """Before the first batch of an epoch (or the first after a resume in mid-epoch)."""

    def on_batch_start(self, trainer: TrainLoop, batch: Batch) -> None:
        """Before the forward pass of every (micro-)batch."""

    def on_backward_end(self, trainer: TrainLoop) -> None:
        """All gradients of an optimizer step are there (still multiplied by the loss scale)."""

    def on_step_end(self, trainer: TrainLoop) -> None:
        """After the optimizer's step; `state.iteration` counts it. No graph is alive: a place to rewrite."""

    def on_log(self, trainer: TrainLoop, figures: dict[str, float]) -> None:
        """At every logging step; entries added to `figures` are logged with the others."""

    def on_evaluate_end(self, trainer: TrainLoop, figures: dict[str, float]) -> None:
        """After a validation; `figures` are its results."""

    def on_epoch_end(self, trainer: TrainLoop) -> None:
        """After an epoch and its validation, before the epoch's checkpoint."""

    def on_fit_end(self, trainer: TrainLoop) -> None:
        """After the last epoch, not after an interruption."""

    def state_dict(self) -> Plain:
        """Plain data and tensors for the checkpoint."""
        return {}

    def load_state_dict(self, state: Plain) -> None:
        """Restore a state from `state_dict`."""
