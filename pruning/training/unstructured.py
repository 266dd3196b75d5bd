"""Iterative magnitude pruning of single weights, in rounds with fine-tuning between them.

Han et al., "Learning both weights and connections for efficient neural networks" (NeurIPS 2015); in rounds, with
rewinding, Frankle & Carbin (ICLR 2019) and Renda et al. (ICLR 2020); as a compression that should preserve
explanations, Park et al. (NeurIPS 2020): 16 rounds of 20 % of the remaining weights. After round k

    sparsity = 1 − (1 − p)^k          of all weights of convolutions and linear layers (biases and norms stay)

Weights are chosen by `torch.nn.utils.prune.L1Unstructured`. A removed weight is held at zero without any wrapper: its
gradient is zeroed before every update and its momentum once, when it is removed, so no optimizer moves it. In every
checkpoint the network is an ordinary one, zeros included; the masks are in the callback's state.

Note:
    PyTorch's own masks (`weight_orig`, `weight_mask` and a hook) would change the names in every checkpoint and the
    wrappers of DDP and torch.compile; only its choice of weights is used here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from image_classification.callbacks import Callback, TrainLoop
from image_classification.config import check
from image_classification.data.loader import Loader
from image_classification.schedules import Schedule
from pruning.criteria.sample_losses import losses_of
from pruning.repair.repairing import Method as RepairMethod
from pruning.repair.repairing import plan_weight_repair
from pruning.repair.rewrite_repair import RewriteRepair, settled
from pruning.rewrites.pruner_settings import PrunerSettings
from pruning.task import Task, on_targets
from pruning.training.channel_pruning import calibration_batches
from pruning.training.magnitude_masks import mask_digests, next_masks, prunable_weights
from pruning.training.unstructured_config import UnstructuredConfig


class RepeatedSchedule(Schedule):
    """A schedule that restarts in every round.

    Args:
        schedule: Schedule of the whole training; its curve is compressed to one round.
        rounds: Number of rounds; the schedule's length must be a multiple of it.
    """

    def __init__(self, schedule: Schedule, rounds: int) -> None:
        epochs = schedule.total_steps // schedule.steps_per_epoch // rounds
        super().__init__(
            dataclasses.replace(schedule.config, lr=schedule.lr), schedule.steps_per_epoch, epochs
        )

    def lr_at(self, iteration: int) -> float:
        """See `Schedule.lr_at`."""
        return super().lr_at(iteration % self.total_steps)


class UnstructuredPruning(Callback):
    """Removes weights at the beginning of every round and holds them at zero.

    Args:
        config: The flags.
        calibration: Loader of the calibration split, whose images are used for repairs; None if there is none.
        multi_label: Whether the task's targets are multi-hot.
        repair: How each round is repaired; None for least squares if there are calibration images, unless weights are
            rewound.

    Attributes:
        masks: Weight's name → bool mask of the remaining weights; empty before the first round.
        completed: Number of rounds begun.
    """

    name = "unstructured"

    def __init__(
        self,
        config: UnstructuredConfig,
        calibration: Loader | None = None,
        multi_label: bool = False,
        repair: RepairMethod | None = None,
    ) -> None:
        self.config = config
        self._calibration = calibration
        self._multi_label = multi_label
        self._repair = "none" if config.rewind is not None else repair
        self.masks: dict[str, Tensor] = {}
        self.completed = 0
        self._epochs: int | None = None  # per round
        self._start: dict[str, Tensor] = {}
        self._held: list[tuple[nn.Parameter, Tensor]] = []

    # ------------------------------------------------------------------ schedule

    def on_fit_start(self, trainer: TrainLoop) -> None:
        """Fit the learning rate to the rounds, restore the masks of a resumed run, and log the plan."""
        config = self.config
        state = trainer.state
        assert config.unstructured_pruning is not None
        if self._epochs is not None:  # with another length, a round might begin late or not at all
            self._check_same("--epochs", trainer.config.epochs, self._epochs * config.rounds)
        self._epochs = trainer.config.epochs // config.rounds
        state.schedule = RepeatedSchedule(state.schedule, config.rounds)
        if self.completed:
            self._hold(trainer)
        final = 1 - (1 - config.unstructured_pruning) ** config.rounds
        trainer.logger.message(
            f"pruning single weights in {config.rounds} round(s) of {self._epochs} epoch(s), "
            f"{100 * config.unstructured_pruning:g} % of what is left in each, to {100 * final:.1f} % zeros; the "
            "learning rate and the best checkpoint start over in every round"
        )

    def on_epoch_start(self, trainer: TrainLoop) -> None:
        """Begin a round if one is due; keep the weights to rewind to."""
        state = trainer.state
        config = self.config
        at_boundary = state.iteration == state.epoch * trainer.steps_per_epoch
        if at_boundary and config.rewind == state.epoch == 0:
            self._keep_start(trainer)
        assert self._epochs is not None, "training has started"
        if at_boundary and state.epoch == self.completed * self._epochs:
            self._begin_round(trainer)

    def on_epoch_end(self, trainer: TrainLoop) -> None:
        """Keep the weights to rewind to, after the epochs set by `--rewind`."""
        if self.config.rewind is not None and trainer.state.epoch + 1 == self.config.rewind:
            self._keep_start(trainer)

    def _keep_start(self, trainer: TrainLoop) -> None:
        state = trainer.state.model.state_dict()
        self._start = {name: tensor.detach().clone() for name, tensor in state.items()}

    # ------------------------------------------------------------------ a round

    def _begin_round(self, trainer: TrainLoop) -> None:
        """Choose weights by their current magnitude, rewind if requested, set them to zero, and reset their momenta."""
        config = self.config
        state = trainer.state
        assert config.unstructured_pruning is not None
        weights = prunable_weights(state.model, self.config.unstructured_layers)
        check(
            bool(weights),
            "--unstructured-pruning: this network has no convolution and no linear layer to take weights from",
        )
        known = self.masks or {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
        self.completed += 1
        self.masks = next_masks(
            weights, known, config.unstructured_pruning, self.completed, config.unstructured_scope
        )
        trainer.distributed.check_agreement("the weights that stay", mask_digests(self.masks))
        if config.rewind is not None and self.completed > 1:
            state.model.load_state_dict(self._start)
            state.optimizer.state.clear()
            if state.ema is not None:
                state.ema.module.load_state_dict(self._start)
        self._hold(trainer)
        with self._repaired(trainer):
            self._zero(trainer)
        # Earlier checkpoints have fewer zeros, so the next round does not compete with them.
        state.best = state.best_epoch = None
        self._report(trainer)

    @contextlib.contextmanager
    def _repaired(self, trainer: TrainLoop) -> Iterator[None]:
        """Zero the weights of network and average inside the block; afterwards the other weights compensate."""
        state, distributed = trainer.state, trainer.distributed
        calibration = [] if self._calibration is None else calibration_batches(self._calibration)
        batches = list(itertools.islice(calibration, PrunerSettings.max_batches))
        task = Task(loss=on_targets(losses_of(self._multi_label)))
        settings = settled(self._repair, batches, task, at_once=False, distributed=distributed)
        averages = [] if state.ema is None else [state.ema.module]
        plan = functools.partial(plan_weight_repair, masks=self.masks, settings=settings)
        repair = RewriteRepair(state.model, averages, plan, settings.method, lenient=self._repair is None)
        yield
        report = repair(batches, task, judged=True, distributed=distributed)
        if report is not None:
            trainer.logger.message(report.describe())

    def _hold(self, trainer: TrainLoop) -> None:
        """Mask these weights' gradients from now on."""
        weights = prunable_weights(trainer.state.model, self.config.unstructured_layers)
        self.masks = {name: mask.to(weights[name].device) for name, mask in self.masks.items()}
        self._held = [(weights[name], mask) for name, mask in self.masks.items()]

    @torch.no_grad()
    def _zero(self, trainer: TrainLoop) -> None:
        """Zero the removed weights, also in the average, and their state in the optimizer."""
        for weight, mask in self._held:
            weight.mul_(mask)
            for value in trainer.state.optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.mul_(mask)
        if trainer.state.ema is not None:
            averaged = prunable_weights(trainer.state.ema.module, self.config.unstructured_layers)
            for name, mask in self.masks.items():
                averaged[name].mul_(mask)

    def on_backward_end(self, trainer: TrainLoop) -> None:
        """Hold weights at zero: with zero gradient and momentum they stay zero in every optimizer, weight decay
        included.
        """
        for weight, mask in self._held:
            if weight.grad is not None:
                weight.grad.mul_(mask)

    # ------------------------------------------------------------------ report and checkpoints

    def _left(self) -> list[int]:
        """Count the remaining weights of every layer."""
        counts = [mask.sum() for mask in self.masks.values()]
        left: list[int] = torch.stack(counts).tolist() if counts else []
        return left

    def _report(self, trainer: TrainLoop) -> None:
        state = trainer.state
        left_by_layer = self._left()
        left, total = sum(left_by_layer), sum(mask.numel() for mask in self.masks.values())
        sparsity = 1 - left / total
        trainer.logger.message(
            f"round {self.completed} of {self.config.rounds}: {100 * sparsity:.2f} % of {total:,} weights are "
            f"zero, {left:,} are left"
        )
        figures = {"round": float(self.completed), "sparsity": sparsity, "weights_left": float(left)}
        step = (state.epoch, 0)
        trainer.logger.scalars("unstructured", figures, step, state.iteration)
        layers = {
            name.removesuffix(".weight"): 1 - left / mask.numel()
            for (name, mask), left in zip(self.masks.items(), left_by_layer, strict=True)
        }
        trainer.logger.scalars("sparsity", layers, step, state.iteration)

    def on_log(self, trainer: TrainLoop, figures: dict[str, float]) -> None:
        """Add the sparsity, counted from the weights themselves."""
        zeros = torch.stack([(weight == 0).sum() for weight, _ in self._held]).sum()
        total = sum(weight.numel() for weight, _ in self._held)
        figures["unstructured.sparsity"] = int(zeros) / total

    def state_dict(self) -> dict[str, Any]:
        """Return rounds, masks, and the weights to rewind to."""
        return {
            "completed": self.completed,
            "rounds": self.config.rounds,
            "epochs": self._epochs,
            "share": self.config.unstructured_pruning,
            "masks": {name: mask.cpu() for name, mask in self.masks.items()},
            "start": dict(self._start),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; masks go to the network's device when training starts.

        Raises:
            ConfigError: The flags of the rounds differ from the checkpoint's.
        """
        self._check_same("--rounds", self.config.rounds, state["rounds"])
        self._check_same("--unstructured-pruning", self.config.unstructured_pruning, state["share"])
        self.completed, self._epochs = state["completed"], state.get("epochs")
        self.masks = dict(state["masks"])
        self._start = dict(state["start"])

    @staticmethod
    def _check_same(name: str, now: float | None, before: float | None) -> None:
        check(
            before == now,
            f"{name} {now}: the resumed run has {before}; give the same, or start over from its weights with "
            "--pretrained-weights",
        )
