"""The hook into the trainer: when a rewrite is due, score, choose, rewrite and bind anew.

Flow of one interval, after the optimizer's step and with no graph alive:

    release DDP and compiled wrappers → score → choose → rewrite network, optimizer, average → rebind → log

Everything is a function of the network, the calibration split and the flags, so a run that is killed at any point,
also in the middle of this, and resumed from its last checkpoint does the same rewrites again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from image_classification.callbacks import Callback
from image_classification.data.loader import Loader
from image_classification.trainer import Trainer
from pruning.budget import Budget
from pruning.config import PruningConfig
from pruning.explanations import build_originals
from pruning.loss_change import multi_label_sample_losses, sample_losses
from pruning.named_criteria import make_criterion
from pruning.plots import widths_picture
from pruning.pruner import Pruner
from pruning.record import RewriteRecord


class PruningCallback(Callback):
    """Prunes the network that a trainer trains.

    Args:
        config: The flags.
        calibration: Loader of the calibration split; its reading never moves the training cursor.
        image_size: Side of the pictures, at which costs are counted.
        multi_label: The task's targets are multi-hot.
    """

    name = "pruning"

    def __init__(
        self, config: PruningConfig, calibration: Loader, image_size: int, multi_label: bool = False
    ) -> None:
        self.config = config
        self.calibration = calibration
        self.image_size = image_size
        self.multi_label = multi_label
        self.pruner: Pruner | None = None
        self._restored: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Trace the network, lay out the course of the budget, and say what is going to happen."""
        config = self.config
        self.pruner = self._make_pruner(trainer)
        trainer.distributed.check_agreement(
            "the channel groups", [str(row) for row in self.pruner.graph.signature()]
        )
        trainer.logger.message(self._announcement(trainer))
        self.pruner.remember(self._batches())
        if config.one_shot_pruning is not None and not self.pruner.done:
            self._rewrite(trainer)

    def _make_pruner(self, trainer: Trainer) -> Pruner:
        config, state = self.config, trainer.state
        device = trainer.distributed.device
        originals = build_originals(
            config,
            state.model,
            image_size=self.image_size,
            num_classes=trainer.train_loader.num_classes,
            fresh=self._restored is None,
        )
        # A generator of its own: training must not notice that pruning is attached.
        example = torch.randn(
            2, 3, self.image_size, self.image_size, generator=torch.Generator().manual_seed(0)
        )
        example = example.to(device=device, memory_format=trainer.precision.memory_format)
        loss = multi_label_sample_losses if self.multi_label else sample_losses
        return Pruner(
            state.model,
            example,
            criterion=make_criterion(
                config.pruning_criterion,
                config.score_features,
                config.di_ridge,
                config.di_precision,
                originals,
                config,
                loss,
            ),
            budget=None if config.prune_rate else Budget.parse(config.budget_words()),
            optimizer=state.optimizer,
            ema=None if state.ema is None else state.ema.module,
            step=config.pruning_step,
            delta=config.pruning_delta if config.iterative_pruning else 1.0,
            start=config.pruning_start,
            search=config.search(),
            constraints=config.constraints(),
            loss=loss,
            distributed=trainer.distributed,
            autocast=trainer.precision.autocast,
            max_batches=config.calibration_batches,
            judge_batches=config.judge_batches,
            originals=originals,
            state=self._restored,
        )

    def _announcement(self, trainer: Trainer) -> str:
        """What the budget needs, and whether the training is long enough for it."""
        pruner, config = self.pruner, self.config
        assert pruner is not None
        graph = pruner.graph
        what = ", ".join(f"{metric}={share:.6g}" for metric, share in pruner.course.budget.shares.items()) + (
            "" if config.budget or not config.iterative_pruning else " (default)"
        )
        text = (
            f"pruning to {what}: {pruner.num_rewrites - pruner.completed} of {pruner.num_rewrites} rewrites to go, "
            f"{len(graph.prunable)} of {len(graph.groups)} channel groups can be pruned, scores: "
            f"{config.pruning_criterion}"
        )
        if config.iterative_pruning and not pruner.done:
            last = config.pruning_start + pruner.num_rewrites * config.pruning_step
            total = trainer.steps_per_epoch * trainer.config.epochs
            text += (
                f"; one every {config.pruning_step} iterations, the last after iteration {last} of {total}"
            )
            if last > total:
                text += (
                    " — the training is too short for the budget: raise --epochs or --pruning-delta, "
                    "or lower --pruning-step"
                )
        return text

    def on_step_end(self, trainer: Trainer) -> None:
        """Rewrite if it is time, and bring the learning rate back after a rewrite."""
        pruner, state = self.pruner, trainer.state
        assert pruner is not None
        if self.config.iterative_pruning and pruner.due(state.iteration):
            self._rewrite(trainer)
        state.lr_factor = self._recovery(state.iteration)

    def _recovery(self, iteration: int) -> float:
        """Factor on the learning rate: rises linearly to 1 over `--pruning-warmup` iterations after a rewrite."""
        assert self.pruner is not None
        if not self.config.pruning_warmup or not self.pruner.history:
            return 1.0
        since = iteration - self.pruner.history[-1].iteration
        return min(1.0, (since + 1) / self.config.pruning_warmup)

    def _rewrite(self, trainer: Trainer) -> None:
        pruner = self.pruner
        assert pruner is not None
        trainer.release()
        record = pruner.step(self._batches(), trainer.state.iteration)
        trainer.rebind()
        self._log(trainer, record)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.calibration:
            if len(batch):
                yield batch.images, batch.targets

    def _log(self, trainer: Trainer, record: RewriteRecord) -> None:
        pruner, state = self.pruner, trainer.state
        assert pruner is not None
        logger, iteration = trainer.logger, state.iteration
        logger.message(record.describe())
        step = (state.epoch, iteration - state.epoch * trainer.steps_per_epoch)
        figures: dict[str, float] = {"loss_before": record.loss[0], "loss_after": record.loss[1]}
        figures |= {metric: after for metric, (_, after, _) in record.costs.items()}
        figures |= {f"{metric}_share": after / base for metric, (_, after, base) in record.costs.items()}
        figures |= {f"seconds.{part}": seconds for part, seconds in record.seconds.items()}
        figures |= dict(zip(("explanation_before", "explanation_after"), record.explanation, strict=False))
        logger.scalars("pruning", figures, step, iteration)
        logger.scalars("width", {group.name: group.width for group in pruner.graph.prunable}, step, iteration)
        scores = pruner.latest_scores()
        logger.scalars(
            "score", {group: float(values.median()) for group, values in scores.items()}, step, iteration
        )
        for group, values in scores.items():
            logger.histogram(f"score/{group}", values, iteration)
        logger.image("pruning/widths", widths_picture(pruner.graph.prunable), iteration)
        for candidate in (c for c in record.candidates[:1] if c["estimated"] is not None):
            logger.scalars("pruning", {"best_estimate": candidate["estimated"]}, step, iteration)

    def on_log(self, trainer: Trainer, figures: dict[str, float]) -> None:
        """Show how far the budget is."""
        assert self.pruner is not None
        for metric in self.pruner.course.budget.shares:
            figures[f"pruning.{metric}_share"] = self.pruner.costs.current(
                metric
            ) / self.pruner.costs.baseline(metric)

    def on_fit_end(self, trainer: Trainer) -> None:
        """Say how far the explanation is from the original network's in the end."""
        assert self.pruner is not None
        moved = self.pruner.explanation_moved(self._batches())
        if moved is not None:
            trainer.logger.message(
                f"explanation of the final network: moved by {moved:.4g} (mean squared distance)"
            )
            trainer.logger.log((), {"pruning.explanation": moved})

    def state_dict(self) -> dict[str, Any]:
        """Progress of the pruner."""
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remembered until the network is traced."""
        self._restored = state or None
