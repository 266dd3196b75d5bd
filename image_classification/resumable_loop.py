"""The checkpoint of a training: saved by the training loop, and restored to continue."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from image_classification.callbacks import Callback, TrainLoop
from image_classification.checkpoint import capture_rng, restore_rng
from image_classification.config import ConfigError, check
from image_classification.finite import learned_tensors, optimizer_tensors
from image_classification.metrics import TrainingSums
from image_classification.models.factory import class_names_of
from image_classification.models.fitting_weights import load_exactly
from image_classification.models.structure_capture import capture_structure
from image_classification.nan_guard import NanGuard
from image_classification.plain_data import Plain


def described_classifier(model: nn.Module) -> Plain:
    """Describe a network of `create_model` for a checkpoint, so that it can be rebuilt: `arch`, `structure`, class
    names.
    """
    structure = capture_structure(model).to_plain()
    names = class_names_of(model)
    return {
        "arch": structure["arch"],
        "structure": structure,
        "class_names": None if names is None else list(names),
    }


@contextlib.contextmanager
def taking_up(what: str) -> Iterator[None]:
    """While restoring a part of a checkpoint, turn an error without a message for users into a ValueError with one."""
    try:
        yield
    except ConfigError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if type(error) is ValueError and "`" in str(error):  # names the argument to change
            raise
        raise ValueError(
            f"{what} in the checkpoint cannot be restored ({type(error).__name__}: {error}): it was written by another "
            "version or altered; start from its weights with `pretrained_weights`"
        ) from error


def _check_optimizer_state(
    states: Mapping[int, Mapping[str, object]], parameters: Sequence[torch.Tensor]
) -> None:
    """Check that each optimizer state is a scalar or has its parameter's shape; PyTorch accepts anything."""
    for index, state in states.items():
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or not value.dim():
                continue
            known = index < len(parameters)
            if not known or value.shape != parameters[index].shape or not value.is_floating_point():
                expected = list(parameters[index].shape) if known else "no such parameter"
                raise ValueError(
                    f"the checkpoint's optimizer's {key} of parameter {index} has shape {list(value.shape)} and "
                    f"{value.dtype}; the parameter has {expected}"
                )


def _same_step(payload: Plain) -> str:
    """Return the setting that keeps the images per optimizer step as in the checkpoint, for any number of ranks."""
    num_images = payload["config"].get("optimizer_batch_size", -1)
    if num_images == -1:
        num_images = payload["loader"].get("global_batch")
    return "`batch_size`" if num_images is None else f"`optimizer_batch_size` {num_images}"


class ResumableLoop(TrainLoop):
    """The part of the loop that saves and restores; `trainer.Trainer` is the loop.

    Attributes:
        sums: Metric sums of the window and of the epoch.
        guard: Detects values that are not finite.
        callbacks: Callbacks of the loop; named ones have a state.
        saved_config: Resolved configuration, stored in checkpoints.
        describe: Returns `arch` and `structure` of a network; called again after every rewrite.
    """

    sums: TrainingSums
    guard: NanGuard
    callbacks: list[Callback]
    saved_config: Plain
    describe: Callable[[nn.Module], Plain]
    _description: Plain | None

    def learned(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors that training changes, by name: weights, statistics, averages, optimizer state."""
        yield from learned_tensors(self.state.model)
        if self.state.ema is not None:
            yield from learned_tensors(self.state.ema.module, "the average of ")
        yield from optimizer_tensors(self.state.optimizer)

    def _check_finite(self) -> None:
        """Raise `NonFiniteLossError` if the network, or its average, is poisoned; collective."""
        self.guard.check_weights(self.learned(), self.state.iteration)

    def save(self, *, is_best: bool = False, end_of_epoch: bool = False) -> None:
        """Write a checkpoint; collective. A poisoned network is refused (`NonFiniteLossError`)."""
        if not self.checkpointer.config.checkpoints:
            return
        self.guard.check()
        self._check_finite()
        rng = self.distributed.gather_objects(capture_rng())
        (sums,) = self.distributed.all_reduce_sum(torch.stack([self.sums.window, self.sums.epoch]))
        if self.distributed.is_main:
            payload = {**self._payload(), "rng": rng, "training_sums": sums.cpu()}
            self.checkpointer.save(payload, is_best=is_best, end_of_epoch=end_of_epoch)

    def _payload(self) -> Plain:
        state = self.state
        if self._description is None:
            self._description = self.describe(state.model)
        return {
            **self._description,
            "state_dict": state.model.state_dict(),
            "ema": None if state.ema is None else state.ema.module.state_dict(),
            "ema_updates": None if state.ema is None else state.ema.num_updates,
            "optimizer": state.optimizer.state_dict(),
            "scaler": self.precision.state_dict(),
            "epoch": state.epoch,
            "iteration": state.iteration,
            "best_prec1": state.best,
            "best_epoch": state.best_epoch,
            "lr_factor": state.lr_factor,
            "num_skipped": self.guard.num_skipped,
            "loader": self.train_loader.state_dict(),
            "callbacks": {
                callback.name: callback.state_dict() for callback in self.callbacks if callback.name
            },
            "world_size": self.distributed.world_size,
            "steps_per_epoch": self.steps_per_epoch,
            "config": self.saved_config,
        }

    def restore(self, payload: Plain) -> None:
        """Continue from a checkpoint. The network must already have the checkpoint's structure.

        The random states of all ranks are restored if the number of ranks is the same. Otherwise the data continue
        exactly, but dropout draws new numbers, and a message says so.

        Raises:
            ValueError: Steps per epoch differ, so that the iteration would be another position in the data; or see
                `Loader.load_state_dict`.
        """
        state = self.state
        check(
            payload["steps_per_epoch"] == self.steps_per_epoch,
            f"`resume`: the checkpoint counts {payload['steps_per_epoch']} iterations per epoch, now there would be "
            f"{self.steps_per_epoch}: give the same data, {_same_step(payload)} and settings of pruning "
            "(which sets images aside), or start from its weights with `pretrained_weights`",
        )
        source = Path("the checkpoint")
        load_exactly(state.model, payload["state_dict"], source)
        self._restore_optimizer(payload["optimizer"])
        if state.ema is not None:
            # A run that starts averaging only now begins with the resumed weights.
            load_exactly(state.ema.module, payload["ema"] or payload["state_dict"], source, "average")
            state.ema.num_updates = payload["ema_updates"] or 0
        with taking_up("the loss scale"):
            self.precision.load_state_dict(payload["scaler"])
        state.epoch, state.iteration = payload["epoch"], payload["iteration"]
        state.best, state.best_epoch = payload["best_prec1"], payload["best_epoch"]
        state.lr_factor = payload["lr_factor"]
        self.guard.num_skipped = payload["num_skipped"]
        if self.distributed.is_main:  # the stored sums are over all ranks; reductions must add them only once
            self.sums.window, self.sums.epoch = payload["training_sums"].to(self.distributed.device).unbind()
        with taking_up("the position in the data"):
            self.train_loader.load_state_dict(payload["loader"])
        for callback in self.callbacks:
            if callback.name in payload["callbacks"]:
                with taking_up(f"the state of {callback.name!r}"):
                    callback.load_state_dict(payload["callbacks"][callback.name])
        if payload["world_size"] == self.distributed.world_size:
            with taking_up("the random states"):
                restore_rng(payload["rng"][self.distributed.rank])
        else:
            self.logger.message(
                f"the checkpoint was written by {payload['world_size']} process(es), now there are "
                f"{self.distributed.world_size}: the data continue exactly, dropout draws new numbers"
            )

    def _restore_optimizer(self, saved: Plain) -> None:
        """Restore momenta, and the learning rate of the last step, which matters if no further step follows.

        Settings (momentum, decay) stay those of this run's flags, not the checkpoint's.
        """
        optimizer = self.state.optimizer
        groups = optimizer.state_dict()["param_groups"]
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        expected = [len(group["params"]) for group in groups]
        check(
            sizes == expected,
            f"`resume`: the checkpoint's optimizer has groups of {sizes} parameters, now there would be {expected}: "
            "give the same `bn_weight_decay` and `weight_decay`",
        )
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        _check_optimizer_state(saved["state"], parameters)
        for group, before in zip(groups, saved["param_groups"], strict=True):
            group["lr"] = before["lr"]
        optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
