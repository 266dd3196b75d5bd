"""Learned gates as part of the training job: gates are trained, the network is rewritten, and the trainer fine-tunes
it.

    on_fit_start:  explanation of the original network, once per calibration image
                   gates are trained (`learner.py`), with checkpoints, figures and stop signals as in training
                   gates → widths that meet the budget (`widths.py`) → rewrite of network, optimizer and average
    then:          the trainer's loop

A run that is killed at any point and resumed ends with the same network: the learned gates are a function of the
network, the calibration images, the flags and the seed, and the checkpoint holds their progress.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from explainers.differentiable.remembered import OriginalExplanations
from image_classification.callbacks import TrainLoop
from image_classification.checkpoint import capture_rng, restore_rng
from image_classification.config import check
from image_classification.data.loader import Loader
from image_classification.interrupts import StopRequested, StopSignals
from image_classification.observe.figures import Figure, register_figures
from pruning.costs.budget import BudgetCourse
from pruning.costs.cost_model import CostModel
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.groups import Group
from pruning.engine.surgery import RewriteReport, prune_channels
from pruning.engine.tap_channels import staying_channels
from pruning.repair.rewrite_repair import RewriteRepair, settled
from pruning.rewrites.resuming import ResumedState, graph_of, shared_costs
from pruning.search.loss_change import LossChange
from pruning.task import Task, on_targets
from pruning.training.channel_pruning import ChannelPruning
from pruning.training.learned.learner import GateLearner, LearnerState
from pruning.training.learned.parametrisations import soft_gates
from pruning.training.learned.widths import GateCut, inner_groups, widths_of_gates
from pruning.training.pruning_config import PruningConfig
from pruning.training.repair_flags import RepairConfig

_JUDGED_BATCHES = 10  # for the recorded loss, and for the images of the repair
_FIXED = ("gates", "gate_groups")  # learned numbers of one form cannot continue as another
#: Values of flags by field name, as plain data.
Settings = dict[str, str | int | float | list[str]]
_NOT_GATED = "no gate: --gate-groups inner leaves the channels of residual sums alone"

register_figures("gates", {"matching": Figure(steers=True)})


class LearnedState(ResumedState):
    """State of learned pruning.

    Attributes:
        done: Whether the network is rewritten.
        settings: Everything that the widths depend on except network and images, by field name of `PruningConfig`.
        record: Record of the rewrite, once it is done.
        learner: State of the gates during learning.
        originals: The explanation's values in the original network.
    """

    done: bool
    settings: Settings
    record: dict[str, Any] | None
    learner: LearnerState | None
    originals: dict[str, Any]


class LearnedPruning(ChannelPruning):
    """Learns gates, rewrites the network and leaves the rest to the trainer; arguments as for `ChannelPruning`.

    Attributes:
        done: Whether the network is rewritten.
        record: Record of the rewrite, once it is done.
        learner: The gates during learning.
        originals: The explanation that the gates match.
        graph, costs, groups: The network's graph and costs, and the groups that have gates.
    """

    name = "learned_pruning"
    originals: OriginalExplanations
    graph: ChannelGraph
    costs: CostModel
    groups: list[Group]

    def __init__(
        self,
        config: PruningConfig,
        calibration: Loader,
        image_size: int,
        multi_label: bool = False,
        repair: RepairConfig | None = None,
    ) -> None:
        super().__init__(config, calibration, image_size, multi_label, repair)
        self.done = False
        self.record: dict[str, Any] | None = None
        self.learner: GateLearner | None = None

    # -- before training -----------------------------------------------------------------------------------

    def on_fit_start(self, trainer: TrainLoop) -> None:
        """Check everything, learn the gates, rewrite the network."""
        self.prepare(trainer)
        if self.done:
            trainer.logger.message(
                "the gates have been learned and the network is rewritten: training goes on"
            )
            return
        trainer.logger.message(self._announcement(trainer))
        if not self.originals.remembered:
            self.originals.remember(
                trainer.state.model, self.batches(), trainer.distributed, trainer.precision.autocast
            )
        cut = self.learn(trainer)
        self._rewrite(trainer, cut)
        trainer.save()

    def prepare(self, trainer: TrainLoop) -> None:
        """First part of `on_fit_start`: trace the network, open the explanation, and refuse impossible settings.

        Raises:
            ConfigError: The budget is out of reach, there are no channels for gates, or a flag was changed too late.
        """
        model = trainer.state.model
        state = cast("LearnedState | None", self.restored)
        if state is not None:
            self.done = state["done"]
            self.record = state["record"]
            self.check_settings(state.get("settings", {}))
        originals = self.originals_of(trainer, fresh=not self.done)
        assert originals is not None, "learned gates match an explanation"
        self.originals = originals
        example = self.example_images(trainer)
        self.graph = graph_of(model, example, self.config.constraints(), state)
        self.groups = self._gated()
        metrics = tuple(self.budget().shares)
        self.costs = shared_costs(
            self.graph, model, example, metrics, state, trainer.distributed, trainer.precision.autocast
        )
        if state is not None:
            originals.load_state_dict(state["originals"])
        if not self.done:
            BudgetCourse(self.budget(), self.costs, 1.0).check_reachable()
        self.check_groups(trainer, self.graph)

    def settings(self) -> Settings:
        """Return everything that the widths depend on except network and images, as plain data by field name."""
        config = self.config
        return {
            **dataclasses.asdict(config.gate_settings()),
            "gate_groups": config.gate_groups,
            "budget": config.budget_words(),
            "round_to": config.round_to,
            "min_width": config.min_width,
            "prune_limit": list(config.prune_limit),
        }

    def check_settings(self, before: Settings) -> None:
        """Refuse changed flags: all of them once the gates are learned, before that those that define the gates.

        Args:
            before: `settings()` of the run to resume; settings missing from it may have any value.

        Raises:
            ConfigError: There is such a flag; the message names the first.
        """
        late = "the gates were learned and the network was rewritten" if self.done else "the gates were made"
        for name, value in self.settings().items():
            now = _in_words(value)
            then = _in_words(before.get(name, value))
            check(
                then == now or not (self.done or name in _FIXED),
                f"--{name.replace('_', '-')} {now or 'left out'} comes too late: in the run to resume {late} with "
                f"{then or 'none'}; give that, or start over in another --workspace",
            )

    def _gated(self) -> list[Group]:
        """Return the groups that get gates; the others are declared not prunable."""
        if self.config.gate_groups == "inner":
            inner = {group.index for group in inner_groups(self.graph)}
            others = [group for group in self.graph.prunable if group.index not in inner]
            self.graph.freeze(others, _NOT_GATED)
        check(
            bool(self.graph.prunable),
            f"--gate-groups {self.config.gate_groups}: the network has no channels that could get gates; `python -m "
            "pruning groups` lists them, --gate-groups all takes those of residual sums too",
        )
        return self.graph.prunable

    def _announcement(self, trainer: TrainLoop) -> str:
        config = self.config
        num_gates = sum(group.width for group in self.groups)
        return (
            f"learning {num_gates} gates on {len(self.groups)} of {len(self.graph.groups)} channel groups to "
            f"{', '.join(config.budget_words())}: {config.gate_epochs} epochs of {len(self.calibration)} steps on "
            f"{self.calibration.num_samples} calibration images"
        )

    # -- learning ------------------------------------------------------------------------------------------

    def learn(self, trainer: TrainLoop) -> GateCut:
        """Second part of `on_fit_start`: learn the gates without changing any weight. Collective.

        Raises:
            StopRequested: A signal stopped learning.
        """
        self._rng = capture_rng()
        learner = self.learner = GateLearner(
            trainer.state.model,
            self.graph,
            self.groups,
            self.costs,
            self.budget(),
            self.originals,
            self.calibration,
            self.config.gate_settings(),
            seed=trainer.config.seed,
            loss=self.loss,
            distributed=trainer.distributed,
            autocast=trainer.precision.autocast,
            scaled=trainer.precision.amp_dtype is torch.float16,
        )
        if self.restored is not None and self.restored["learner"] is not None:
            learner.load_state_dict(self.restored["learner"])
        stop = StopSignals(trainer.distributed)
        with learner, stop:
            for step in learner.learn():
                self._after_step(trainer, learner, step, stop)
        if stop.received:  # too late for a step of the gates; the training loop handles it
            signal.raise_signal(signal.Signals[stop.received])
        logits = self._agreed(trainer, learner.logits())
        cut = widths_of_gates(self.graph, self.groups, self.costs, self.budget(), logits)
        trainer.distributed.check_agreement(
            "the learned widths", {str(index): kept.tolist() for index, kept in cut.keep.items()}
        )
        return cut

    def _agreed(self, trainer: TrainLoop, logits: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Return rank 0's logits on all ranks: GPUs may sum in another order, and a last bit may decide a width."""
        plain = {str(index): values.tolist() for index, values in logits.items()}
        shared = trainer.distributed.broadcast_object(plain)
        return {int(index): np.array(values) for index, values in shared.items()}

    def _after_step(self, trainer: TrainLoop, learner: GateLearner, step: int, stop: StopSignals) -> None:
        interval = trainer.checkpointer.config.checkpoint_interval
        end_of_epoch = step % learner.steps_per_epoch == 0
        if end_of_epoch:
            self._log_epoch(trainer, learner, step)
        stopping = stop.poll(step)
        if stopping or end_of_epoch or (interval and step % interval == 0):
            self._save(trainer)
        if stopping:
            trainer.checkpointer.finish()
            raise StopRequested(
                f"stopped by {stop.received or 'a signal to another rank'} after {step} of {learner.num_steps} steps "
                "of the gates",
                saved=trainer.checkpointer.config.checkpoints,
            )

    def _save(self, trainer: TrainLoop) -> None:
        """Save with the random state from before learning: reading images draws numbers, and a resumed run reads
        others.
        """
        inside = capture_rng()
        restore_rng(self._rng)
        trainer.save()
        restore_rng(inside)

    def _log_epoch(self, trainer: TrainLoop, learner: GateLearner, step: int) -> None:
        figures = learner.read()
        logits = learner.logits()
        # A NaN loss has NaN derivatives too, which reach the logits with the next step.
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

    def _rewrite(self, trainer: TrainLoop, cut: GateCut) -> None:
        state = trainer.state
        distributed = trainer.distributed
        autocast = trainer.precision.autocast
        few = list(itertools.islice(self.batches(), _JUDGED_BATCHES))
        task = Task(loss=on_targets(self.loss))
        judge = LossChange(
            state.model, self.graph, few, task=task, distributed=distributed, autocast=autocast
        )
        losses = judge.measure([{}, cut.keep]).tolist()
        trainer.release()
        averages = [] if state.ema is None else [state.ema.module]
        choice = self.repair.choice()
        mask = self.graph.keep_mask(cut.keep)
        settings = settled(choice, few, task, at_once=True, distributed=distributed)
        repair = RewriteRepair.of_cut(
            state.model, averages, self.graph, mask, settings, lenient=choice is None
        )
        staying = staying_channels(self.graph, mask, self.originals.taps)
        report = prune_channels(
            state.model,
            self.graph,
            cut.keep,
            optimizers=[state.optimizer],
            emas=[] if state.ema is None else [state.ema.module],
        )
        self.done, self.learner = True, None  # whatever fails from here on, the network is smaller
        self._note(cut, report, losses, math.nan)
        self.costs.refresh()
        self.originals.follow(staying)
        repaired = repair(few, task, judged=True, distributed=distributed)
        if repaired is not None:
            losses += judge.measure([{}]).tolist()
            trainer.logger.message(repaired.describe())
        moved = self.explanation_moved(trainer)
        self._note(cut, report, losses, moved)
        trainer.rebind()
        self._report(trainer, cut, report, losses, moved)

    def _note(self, cut: GateCut, report: RewriteReport, losses: list[float], moved: float) -> None:
        """Record the rewrite, as far as it came."""
        self.record = {
            "widths": {name: list(width) for name, width in report.widths.items()},
            "share": cut.share,
            "gates_share": cut.gates_share,
            "threshold": cut.threshold,
            "num_closed": cut.num_closed,
            "num_opened": cut.num_opened,
            "loss": losses,
            "explanation": moved,
        }

    def _report(
        self, trainer: TrainLoop, cut: GateCut, report: RewriteReport, losses: list[float], moved: float
    ) -> None:
        shown = ", ".join(f"{name} {before}→{after}" for name, (before, after) in report.widths.items())
        trainer.logger.message(cut.describe())
        trainer.logger.message(
            f"rewritten: {shown or 'nothing to remove'}; calibration loss "
            f"{' → '.join(f'{loss:.4f}' for loss in losses)}; "
            f"explanation moved by {moved:.4g}"
        )
        named = zip(("loss_before", "loss_after", "loss_repaired"), losses, strict=False)
        figures = {**dict(named), "explanation_after": moved}
        figures |= {f"{metric}_share": share for metric, share in cut.share.items()}
        self.log_rewrite(trainer, figures, self.groups, (0, 0), 0)

    # -- the rest of the run -------------------------------------------------------------------------------

    def cost_model(self) -> CostModel:
        """See `ChannelPruning`."""
        return self.costs

    def explanation_moved(self, trainer: TrainLoop) -> float:
        """See `ChannelPruning`; over all calibration images."""
        return self.originals.moved(
            trainer.state.model, self.batches(), trainer.distributed, trainer.precision.autocast
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the progress of the gates, or that they are done; the graph and the original explanations."""
        state = LearnedState(
            done=self.done,
            settings=self.settings(),
            record=self.record,
            learner=None if self.learner is None else self.learner.state_dict(),
            graph=self.graph.state_dict(),
            costs=self.costs.state_dict(),
            originals=self.originals.state_dict(),
        )
        return dict(state)


def _in_words(value: object) -> object:
    """Return a setting in the form used for comparison and messages: lists as words."""
    return " ".join(value) if isinstance(value, list) else value
