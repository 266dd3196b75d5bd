"""Score-based pruning at intervals: when a rewrite is due, score, choose, rewrite and rebind.

Order of operations at an interval, after the optimizer's step and with no autograd graph alive:

    release DDP and compiled wrappers → score → choose → rewrite network, optimizer, average → rebind → log

Everything is a function of the network, the calibration split and the flags. So a run that is killed at any point, even
during a rewrite, and resumed from its last checkpoint repeats the same rewrites.
"""

from __future__ import annotations

from typing import Any, cast

from image_classification.callbacks import TrainLoop
from image_classification.config import told
from pruning.costs.cost_model import CostModel
from pruning.criteria.by_name import make_criterion
from pruning.pruner import Pruner
from pruning.rewrites.pruner_settings import PrunerSettings
from pruning.rewrites.resuming import PrunerState
from pruning.rewrites.rewrite_record import RewriteRecord
from pruning.task import on_targets
from pruning.training.channel_pruning import ChannelPruning
from pruning.training.widths_image import widths_image


class PruningCallback(ChannelPruning):
    """Prunes the network that a trainer trains by a criterion; arguments as for `ChannelPruning`."""

    name = "pruning"
    _pruner: Pruner | None = None

    @property
    def pruner(self) -> Pruner:
        """The pruner, created when training starts."""
        assert self._pruner is not None, "training has not started"
        return self._pruner

    def on_fit_start(self, trainer: TrainLoop) -> None:
        """Trace the network, set the budget's schedule, and log the plan."""
        self._pruner = self._make_pruner(trainer)
        self.check_groups(trainer, self.pruner.graph)
        trainer.logger.message(self._announcement(trainer))
        self._check_length(trainer)
        self.pruner.remember(self.batches())
        if self.config.one_shot_pruning is not None and not self.pruner.done:
            self._rewrite(trainer)

    def _make_pruner(self, trainer: TrainLoop) -> Pruner:
        config = self.config
        state = trainer.state
        originals = self.originals_of(trainer, fresh=self.restored is None)
        criterion = make_criterion(config.pruning_criterion, config.criterion_settings(), originals=originals)
        settings = PrunerSettings(
            start=config.pruning_start,
            max_batches=config.calibration_batches,
            judge_batches=config.judge_batches,
            distributed=trainer.distributed,
            autocast=trainer.precision.autocast,
            originals=originals,
        )
        return Pruner(
            state.model,
            self.example_images(trainer),
            criterion=criterion,
            budget=None if config.prune_rate else self.budget(),
            optimizer=state.optimizer,
            ema=None if state.ema is None else state.ema.module,
            step=config.interval(trainer.steps_per_epoch),
            delta=config.pruning_delta if config.iterative_pruning else 1.0,
            search=config.search(),
            constraints=config.constraints(),
            repair=self.repair.choice(),
            loss=on_targets(self.loss),
            settings=settings,
            state=cast("PrunerState | None", self.restored),
        )

    def _announcement(self, trainer: TrainLoop) -> str:
        """Describe what the budget needs, and when."""
        pruner, config = self.pruner, self.config
        shares = pruner.course.budget.shares
        budget = ", ".join(f"{metric}={share:.6g}" for metric, share in shares.items())
        if config.iterative_pruning and not config.budget:
            budget += " (default)"
        text = (
            f"pruning to {budget}: {pruner.num_rewrites - pruner.completed} of {pruner.num_rewrites} rewrites to go, "
            f"{len(pruner.graph.prunable)} of {len(pruner.graph.groups)} channel groups can be pruned, scores: "
            f"{config.pruning_criterion}"
        )
        due = pruner.iterations_to_come(trainer.state.iteration)
        if not config.iterative_pruning or not due:
            return text
        total = trainer.steps_per_epoch * trainer.config.epochs
        return (
            f"{text}; one every {pruner.interval} iterations, the last after iteration {due[-1]} of {total}"
        )

    def _check_length(self, trainer: TrainLoop) -> None:
        """Refuse a training that ends before its budget is met, except if `--prof` cuts epochs short to measure
        speed.
        """
        if not self.config.iterative_pruning or trainer.config.prof >= 0:
            return
        per_epoch = trainer.steps_per_epoch
        self.pruner.check_length(
            per_epoch * trainer.config.epochs,
            trainer.state.iteration,
            steps_per_epoch=per_epoch,
            doubt=lambda error: trainer.logger.message(f"the budget may not be met: {told(error)}"),
        )

    def on_step_end(self, trainer: TrainLoop) -> None:
        """Rewrite if due, and ramp the learning rate back up after a rewrite."""
        iteration = trainer.state.iteration
        if self.config.iterative_pruning and self.pruner.due(iteration):
            self._rewrite(trainer)
        trainer.state.lr_factor = self._recovery(iteration)

    def _recovery(self, iteration: int) -> float:
        """Return the learning-rate factor, which rises linearly to 1 over `--pruning-warmup` iterations after a
        rewrite.
        """
        if not self.config.pruning_warmup or not self.pruner.history:
            return 1.0
        since = iteration - self.pruner.history[-1].iteration
        return min(1.0, (since + 1) / self.config.pruning_warmup)

    def _rewrite(self, trainer: TrainLoop) -> None:
        trainer.release()
        record = self.pruner.step(self.batches(), trainer.state.iteration)
        trainer.rebind()
        self._log(trainer, record)

    def _log(self, trainer: TrainLoop, record: RewriteRecord) -> None:
        state = trainer.state
        logger = trainer.logger
        groups = self.pruner.graph.prunable
        iteration = state.iteration
        step = (state.epoch, iteration - state.epoch * trainer.steps_per_epoch)
        logger.message(record.describe())
        self.log_rewrite(trainer, _figures(record), groups, step, iteration)
        scores = self.pruner.latest_scores()
        medians = {group: float(values.median()) for group, values in scores.items()}
        logger.scalars("score", medians, step, iteration)
        for group, values in scores.items():
            logger.histogram(f"score/{group}", values, iteration)
        logger.image("pruning/widths", widths_image(groups), iteration)
        if record.candidates and record.candidates[0]["estimated"] is not None:
            best = {"best_estimate": record.candidates[0]["estimated"]}
            logger.scalars("pruning", best, step, iteration)

    def _shares(self) -> dict[str, float]:
        """Return the remaining share of each cost named by the budget."""
        return {metric: self.pruner.costs.share(metric) for metric in self.pruner.course.budget.shares}

    def on_log(self, trainer: TrainLoop, figures: dict[str, float]) -> None:
        """Add the progress towards the budget."""
        figures |= {f"pruning.{metric}_share": share for metric, share in self._shares().items()}

    def on_fit_end(self, trainer: TrainLoop) -> None:
        """Warn if the network did not reach the budget, since then no file of the run meets it."""
        super().on_fit_end(trainer)
        asked = self.pruner.course.budget.shares
        missed = [
            f"{metric} {share:.3g} of the original, not {asked[metric]:.3g}"
            for metric, share in self._shares().items()
            if share > asked[metric] * (1 + 1e-6)
        ]
        if missed:
            trainer.logger.message(
                f"the budget was not met: {', '.join(missed)}; train longer, raise --pruning-delta, or lower "
                "--pruning-step or --min-width"
            )

    def cost_model(self) -> CostModel:
        """See `ChannelPruning`."""
        return self.pruner.costs

    def explanation_moved(self, trainer: TrainLoop) -> float | None:
        """See `ChannelPruning`."""
        return self.pruner.explanation_moved(self.batches())

    def state_dict(self) -> dict[str, Any]:
        """Return the pruner's progress; empty before training starts."""
        return {} if self._pruner is None else dict(self._pruner.state_dict())


def _figures(record: RewriteRecord) -> dict[str, float]:
    """Return a rewrite's losses, costs, seconds and distances, by report key without the prefix."""
    figures = {"loss_before": record.loss[0], "loss_after": record.loss[1]}
    if len(record.loss) > 2:
        figures["loss_repaired"] = record.loss[2]
    for metric, (_, after, base) in record.costs.items():
        figures[metric] = after
        figures[f"{metric}_share"] = after / base
    for part, seconds in record.seconds.items():
        figures[f"seconds.{part}"] = seconds
    if record.explanation:
        figures["explanation_before"], figures["explanation_after"] = record.explanation
    return figures
