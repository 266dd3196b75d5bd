"""Learned gates as a part of the training job: gates learn, the network is rewritten, and the trainer fine-tunes it.

    on_fit_start:  explanation of the original network, once per calibration picture
                   gates learn (`learner.py`), with checkpoints, figures and stop signals as in training
                   gates → widths that meet the budget (`widths.py`) → rewrite of network, optimizer and average
    then:          the trainer's loop

Killed in any of this and resumed, a run ends with the same network: what gates learn is a function of the network, the
calibration pictures, the flags and the seed, and the checkpoint holds how far they are.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from image_classification.callbacks import Callback
from image_classification.checkpoint import capture_rng, restore_rng
from image_classification.config import check
from image_classification.data.loader import Loader
from image_classification.interrupts import StopRequested, StopSignals
from image_classification.trainer import Trainer
from pruning.budget import Budget, BudgetCourse
from pruning.config import PruningConfig
from pruning.explanations import build_originals
from pruning.groups import Group
from pruning.learned.gates import soft_gates
from pruning.learned.learner import GateLearner
from pruning.learned.widths import GateCut, inner_groups, widths_of_gates
from pruning.loss_change import LossChange, multi_label_sample_losses, sample_losses
from pruning.resuming import graph_of, shared_costs
from pruning.surgery import RewriteReport, prune_channels
from pruning.tap_channels import staying_channels

_JUDGED_BATCHES = 10  # the calibration loss is for the record; it decides nothing
_FIXED = ("gates", "gate_groups")  # learned numbers of one form cannot go on as another
_NOT_GATED = "no gate: --gate-groups inner leaves the channels of residual sums alone"


class LearnedPruning(Callback):
    """Learns gates, rewrites the network and leaves the rest to the trainer.

    Args:
        config: The flags.
        calibration: Loader of the calibration split.
        image_size: Side of the pictures, at which costs are counted.
        multi_label: The task's targets are multi-hot.
    """

    name = "learned_pruning"

    def __init__(
        self, config: PruningConfig, calibration: Loader, image_size: int, multi_label: bool = False
    ) -> None:
        self.config, self.calibration, self.image_size = config, calibration, image_size
        self.loss = multi_label_sample_losses if multi_label else sample_losses
        self.done = False
        self.record: dict[str, Any] | None = None
        self._restored: dict[str, Any] | None = None
        self._learner: GateLearner | None = None

    # -- before training -----------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer) -> None:
        """Check everything, learn, rewrite."""
        self._prepare(trainer)
        if self.done:
            trainer.logger.message(
                "the gates have been learned and the network is rewritten: training goes on"
            )
            return
        trainer.logger.message(self._announcement(trainer))
        if not self.originals.remembered:
            self.originals.remember(
                trainer.state.model, self._batches(), trainer.distributed, trainer.precision.autocast
            )
        cut = self._learn(trainer)
        self._rewrite(trainer, cut)
        trainer.save()

    def _prepare(self, trainer: Trainer) -> None:
        config, model, state = self.config, trainer.state.model, self._restored
        self.done = state is not None and state["done"]
        self.record = None if state is None else state["record"]
        if state is not None:
            self._check_settings(state.get("settings", {}))
        originals = build_originals(
            config,
            model,
            image_size=self.image_size,
            num_classes=trainer.train_loader.num_classes,
            fresh=not self.done,
        )
        assert originals is not None, "learned gates match an explanation"
        self.originals = originals
        # A generator of its own: training must not notice that pruning is attached.
        example = torch.randn(
            2, 3, self.image_size, self.image_size, generator=torch.Generator().manual_seed(0)
        )
        example = example.to(device=trainer.distributed.device, memory_format=trainer.precision.memory_format)
        self.graph = graph_of(model, example, config.constraints(), state)
        self.groups = self._gated()
        self.budget = Budget.parse(config.budget_words())
        self.costs = shared_costs(
            self.graph, model, example, tuple(self.budget.shares), state, trainer.distributed
        )
        if state is not None:
            originals.load_state_dict(state["originals"])
        if not self.done:
            BudgetCourse(self.budget, self.costs, 1.0).check_reachable()
        trainer.distributed.check_agreement(
            "the channel groups", [str(row) for row in self.graph.signature()]
        )

    def _settings(self) -> dict[str, Any]:
        """What the widths depend on beside network and pictures, as plain data by name of the flag."""
        config = self.config
        return {
            **config.gate_settings(), "budget": config.budget_words(), "round_to": config.round_to,
            "min_width": config.min_width, "prune_limit": list(config.prune_limit),
        }  # fmt: skip

    def _check_settings(self, before: Mapping[str, Any]) -> None:
        """Refuse flags that come too late: once the gates are learned all, before that what the gates are."""
        late = "the gates were learned and the network was rewritten" if self.done else "the gates were made"
        for name, value in self._settings().items():
            then, now = (
                " ".join(each) if isinstance(each, list) else each
                for each in (before.get(name, value), value)
            )
            check(
                then == now or not (self.done or name in _FIXED),
                f"--{name.replace('_', '-')} {now or 'left out'} comes too late: in the run to resume {late} with "
                f"{then or 'none'}; give that, or start anew in another --workspace",
            )

    def _gated(self) -> list[Group]:
        """The groups that get gates; others are declared not prunable."""
        if self.config.gate_groups == "inner":
            inner = {group.index for group in inner_groups(self.graph)}
            self.graph.freeze([g for g in self.graph.prunable if g.index not in inner], _NOT_GATED)
        check(
            bool(self.graph.prunable),
            f"--gate-groups {self.config.gate_groups}: the network has no channels that could get gates; `python -m "
            "pruning groups` lists them, --gate-groups all takes those of residual sums too",
        )
        return self.graph.prunable

    def _announcement(self, trainer: Trainer) -> str:
        config = self.config
        num_gates = sum(group.width for group in self.groups)
        return (
            f"learning {num_gates} gates on {len(self.groups)} of {len(self.graph.groups)} channel groups to "
            f"{', '.join(config.budget_words())}: {config.gate_epochs} epochs of {len(self.calibration)} steps on "
            f"{self.calibration.num_samples} calibration pictures"
        )

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.calibration:
            if len(batch):
                yield batch.images, batch.targets

    # -- learning ------------------------------------------------------------------------------------------

    def _learn(self, trainer: Trainer) -> GateCut:
        self._rng = capture_rng()
        learner = self._learner = GateLearner(
            trainer.state.model, self.graph, self.groups, self.costs, self.budget, self.originals, self.calibration,
            self.config, seed=trainer.config.seed, loss=self.loss, distributed=trainer.distributed,
            autocast=trainer.precision.autocast, scaled=trainer.precision.amp_dtype is torch.float16,
        )  # fmt: skip
        if self._restored is not None and self._restored["learner"] is not None:
            learner.load_state_dict(self._restored["learner"])
        stop = StopSignals(trainer.distributed)
        with learner, stop:
            for step in learner.learn():
                self._after_step(trainer, learner, step, stop)
        if stop.received:  # too late for a step of the gates: the training loop gets to know
            signal.raise_signal(signal.Signals[stop.received])
        cut = widths_of_gates(
            self.graph, self.groups, self.costs, self.budget, self._agreed(trainer, learner.logits())
        )
        trainer.distributed.check_agreement(
            "the learned widths", {str(index): kept.tolist() for index, kept in cut.keep.items()}
        )
        return cut

    def _agreed(self, trainer: Trainer, logits: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Rank 0's logits, for all ranks: a GPU may add up in another order, and a last bit may decide a width."""
        plain = {str(index): values.tolist() for index, values in logits.items()}
        shared = trainer.distributed.broadcast_object(plain)
        return {int(index): np.array(values) for index, values in shared.items()}

    def _after_step(self, trainer: Trainer, learner: GateLearner, step: int, stop: StopSignals) -> None:
        interval = trainer.checkpointer.config.checkpoint_interval
        end_of_epoch = step % learner.steps_per_epoch == 0
        if end_of_epoch:
            self._log_epoch(trainer, learner, step)
        stopping = stop.poll(step)
        if stopping or end_of_epoch or (interval and step % interval == 0):
            self._save(trainer)
        if stopping:
            raise StopRequested(
                f"stopped by {stop.received or 'a signal to another rank'} after {step} of {learner.num_steps} steps "
                "of the gates"
            )

    def _save(self, trainer: Trainer) -> None:
        """Save with the random state of before learning: reading pictures draws numbers, a resumed run reads others."""
        inside = capture_rng()
        restore_rng(self._rng)
        trainer.save()
        restore_rng(inside)

    def _log_epoch(self, trainer: Trainer, learner: GateLearner, step: int) -> None:
        figures, logits = learner.read(), learner.logits()
        # Derivatives of a loss that is not a number are none either, and reach the logits with the next step.
        check(
            all(np.isfinite(values).all() for values in logits.values()),
            "the gates are not numbers any more: lower --gate-lr, or leave --amp-dtype fp16 out",
        )
        logger = trainer.logger
        logger.scalars("gates", figures, (step // learner.steps_per_epoch - 1,), step)
        for group in self.groups:
            gates = soft_gates(torch.from_numpy(logits[group.index]), self.config.gate_temperature)
            logger.histogram(f"gates/{group.name}", gates, step)

    # -- rewriting -----------------------------------------------------------------------------------------

    def _rewrite(self, trainer: Trainer, cut: GateCut) -> None:
        state, distributed, autocast = trainer.state, trainer.distributed, trainer.precision.autocast
        few = list(itertools.islice(self._batches(), _JUDGED_BATCHES))
        judge = LossChange(
            state.model, self.graph, few, loss=self.loss, distributed=distributed, autocast=autocast
        )
        losses = judge.measure([{}, cut.keep]).tolist()
        trainer.release()
        staying = staying_channels(self.graph, self.graph.keep_mask(cut.keep), self.originals.present.taps)
        report = prune_channels(
            state.model,
            self.graph,
            cut.keep,
            optimizers=[state.optimizer],
            emas=[] if state.ema is None else [state.ema.module],
        )
        self.costs.refresh()
        self.originals.follow(staying)
        moved = self.originals.moved(state.model, self._batches(), distributed, autocast)
        self.done = True
        self._learner = None
        trainer.rebind()
        self._report(trainer, cut, report, losses, moved)

    def _report(
        self, trainer: Trainer, cut: GateCut, report: RewriteReport, losses: list[float], moved: float
    ) -> None:
        widths = {name: list(width) for name, width in report.widths.items()}
        self.record = {
            "widths": widths, "share": cut.share, "gates_share": cut.gates_share, "threshold": cut.threshold,
            "num_closed": cut.num_closed, "num_opened": cut.num_opened, "loss": losses, "explanation": moved,
        }  # fmt: skip
        shown = ", ".join(f"{name} {before}→{after}" for name, (before, after) in widths.items())
        logger = trainer.logger
        logger.message(cut.describe())
        logger.message(
            f"rewritten: {shown or 'nothing to remove'}; calibration loss {losses[0]:.4f} → {losses[1]:.4f}; "
            f"explanation moved by {moved:.4g}"
        )
        figures: dict[str, float] = {
            "loss_before": losses[0],
            "loss_after": losses[1],
            "explanation_after": moved,
        }
        figures |= {f"{metric}_share": share for metric, share in cut.share.items()}
        logger.scalars("pruning", figures, (0, 0), 0)
        logger.scalars("width", {group.name: group.width for group in self.groups}, (0, 0), 0)

    # -- the rest of the run -------------------------------------------------------------------------------

    def on_fit_end(self, trainer: Trainer) -> None:
        """Say how far the explanation is from the original network's in the end."""
        moved = self.originals.moved(
            trainer.state.model, self._batches(), trainer.distributed, trainer.precision.autocast
        )
        trainer.logger.message(
            f"explanation of the final network: moved by {moved:.4g} (mean squared distance)"
        )
        trainer.logger.log((), {"pruning.explanation": moved})

    def state_dict(self) -> dict[str, Any]:
        """How far the gates are, or that they are done; the graph and the original explanations."""
        return {
            "done": self.done,
            "settings": self._settings(),
            "record": self.record,
            "learner": None if self._learner is None else self._learner.state_dict(),
            "graph": self.graph.state_dict(),
            "costs": self.costs.state_dict(),
            "originals": self.originals.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remembered until the network is traced."""
        self._restored = dict(state)
