"""Base of both methods of channel pruning in a training job: calibration images, explanation, budget, figures, state.

`scored.PruningCallback` rewrites at intervals by a criterion, `learned.learned_pruning.LearnedPruning` once, by gates.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from explainers.differentiable.remembered import OriginalExplanations
from image_classification.callbacks import Callback, TrainLoop
from image_classification.data.loader import Loader
from image_classification.observe.figures import Figure, register_figures
from pruning.costs.budget import Budget
from pruning.costs.cost_model import CostModel
from pruning.costs.cost_registry import cost_named, cost_names
from pruning.criteria.sample_losses import losses_of
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.groups import Group
from pruning.training.explanations import build_originals
from pruning.training.pruning_config import PruningConfig
from pruning.training.repair_flags import RepairConfig


def calibration_batches(calibration: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and targets of this rank's calibration batches."""
    for batch in calibration:
        if len(batch):
            yield batch.images, batch.targets


class ChannelPruning(Callback, abc.ABC):
    """Base of the callbacks that prune the network's channels.

    Args:
        config: The flags.
        calibration: Loader of the calibration split; reading it never moves the training cursor.
        image_size: Side of the images, for which costs are counted.
        multi_label: Whether the task's targets are multi-hot.
        repair: How rewrites are repaired.

    Attributes:
        loss: Per-sample loss of the task.
        restored: State of the resumed run, kept until the network is traced; None for a fresh start.
    """

    def __init__(
        self,
        config: PruningConfig,
        calibration: Loader,
        image_size: int,
        multi_label: bool = False,
        repair: RepairConfig | None = None,
    ) -> None:
        self.config = config
        self.repair = repair or RepairConfig()
        self.calibration = calibration
        self.image_size = image_size
        self.loss = losses_of(multi_label)
        self.restored: dict[str, Any] | None = None
        shares = {f"{name}_share": Figure(steers=True) for name in cost_names()}
        register_figures(("gates", "pruning"), shares)
        counted = [name for name in cost_names() if cost_named(name).divisor >= 1]
        whole = {f"{name}_{when}": Figure(",.0f") for name in counted for when in ("before", "after")}
        register_figures("pruning", whole)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the state until the network is traced."""
        self.restored = dict(state) or None

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and targets of this rank's calibration batches."""
        yield from calibration_batches(self.calibration)

    def example_images(self, trainer: TrainLoop) -> Tensor:
        """Return noise (2, 3, S, S) on the network's device and in its memory format, the same every time."""
        # A separate generator, so that attaching pruning does not affect training.
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, 3, self.image_size, self.image_size, generator=generator)
        return images.to(device=trainer.distributed.device, memory_format=trainer.precision.memory_format)

    def originals_of(self, trainer: TrainLoop, *, fresh: bool) -> OriginalExplanations | None:
        """Build the explanation to follow, still without its values in the original network.

        Args:
            trainer: The loop.
            fresh: Whether the network is still the original one.
        """
        return build_originals(
            self.config,
            trainer.state.model,
            image_size=self.image_size,
            num_classes=trainer.train_loader.num_classes,
            fresh=fresh,
        )

    def budget(self) -> Budget:
        """Return the budget set by the flags."""
        return Budget.parse(self.config.budget_words())

    @staticmethod
    def check_groups(trainer: TrainLoop, graph: ChannelGraph) -> None:
        """Check that all ranks traced the same groups. Collective."""
        signature = [str(row) for row in graph.signature()]
        trainer.distributed.check_agreement("the channel groups", signature)

    @staticmethod
    def log_rewrite(
        trainer: TrainLoop,
        figures: dict[str, float],
        groups: Sequence[Group],
        step: tuple[int, int],
        iteration: int,
    ) -> None:
        """Log the result of a rewrite.

        Args:
            trainer: The loop.
            figures: Losses and shares, without the prefix `pruning.`.
            groups: The groups whose widths are logged.
            step: Epoch, and step within it.
            iteration: Iteration of the whole training.
        """
        trainer.logger.scalars("pruning", figures, step, iteration)
        widths = {group.name: group.width for group in groups}
        trainer.logger.scalars("width", widths, step, iteration)

    @abc.abstractmethod
    def explanation_moved(self, trainer: TrainLoop) -> float | None:
        """Return the mean squared distance of the explanation from the original network's; None if none is followed."""

    @abc.abstractmethod
    def cost_model(self) -> CostModel:
        """What the network costs."""

    def on_fit_end(self, trainer: TrainLoop) -> None:
        """Log the costs before and after, and how far the final network's explanation is from the original's."""
        costs = self.cost_model()
        before = {f"pruning.{metric}_before": costs.baseline(metric) for metric in costs.metrics}
        after = {f"pruning.{metric}_after": costs.current(metric) for metric in costs.metrics}
        trainer.logger.log((), before | after)
        moved = self.explanation_moved(trainer)
        if moved is None:
            return
        trainer.logger.message(
            f"explanation of the final network: moved by {moved:.4g} (mean squared distance)"
        )
        trainer.logger.log((), {"pruning.explanation": moved})
