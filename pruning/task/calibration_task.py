"""Running and evaluating a network: a batch becomes a call, and outputs become a loss.

    task = Task(forward=lambda batch: model(batch["image"]), loss=lambda outputs, batch: mse(outputs, batch["depth"]))
    with task.running(model):
        losses = task.losses(task.outputs(model, batch), batch)       # (N,)

Without `forward` and `loss` a batch is (images, targets), a mapping of keyword arguments, or a tensor, and the loss is
the one that the network returns, else the cross-entropy of its logits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from image_classification.config import SettingError, check_choice
from image_classification.models.modes import (
    attention_in_steps,
    buffers_kept,
    modes_restored,
    quieten,
    random_state_kept,
    uncompiled,
)
from image_classification.models.running import Args, Kwargs, Outputs
from pruning.task.batch_targets import TARGET_NAMES, targets_of
from pruning.task.batches import Batch, inputs_of, num_samples
from pruning.task.example_arguments import check_keywords
from pruning.task.known_losses import check_classes, held_loss, logits_of, losses_by_default

#: (batch) → outputs, or (network, batch) → outputs.
Forward = Callable[..., Outputs]
#: (outputs, batch) → loss of every sample, (N,), or a mean loss.
Loss = Callable[[Outputs, Batch], Tensor]
#: (logits, targets) → (N,).
SampleLoss = Callable[[Tensor, Tensor], Tensor]

Mode = Literal["eval", "train"]
MODES: tuple[Mode, ...] = get_args(Mode)

#: Layers whose noise is disabled in mode "train": torchvision's and timm's, in addition to torch's dropouts.
_NOISY = ("DropPath", "StochasticDepth", "DropBlock2d", "DropBlock3d")


@dataclasses.dataclass(frozen=True)
class Task:
    """The way to run a network on calibration batches and to evaluate its outputs.

    Attributes:
        forward: (batch) → outputs, for the network being pruned; or (network, batch) → outputs. By default a tensor is
            passed as the only argument, a mapping as keyword arguments, and of a tuple or list only the first item.
        loss: (outputs, batch) → one loss per sample, (N,) or (N, …), or a scalar: the mean over the batch. By default
            the loss contained in the outputs, else cross-entropy with the batch's targets.
        mode: "eval", or "train" for networks that return their losses only in training mode. Batch norms and
            dropouts are in evaluation mode either way.
    """

    forward: Forward | None = None
    loss: Loss | None = None
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)

    @property
    def runs_any_network(self) -> bool:
        """Whether a copy of the network can be run: `forward`, if given, takes the network as an argument."""
        return self.forward is None or _takes_network(self.forward)

    @contextlib.contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Set the mode for running batches; modes, buffers and the random state are restored afterwards."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(uncompiled())
            stack.enter_context(attention_in_steps())
            stack.enter_context(random_state_kept(model))
            stack.enter_context(buffers_kept(model))
            stack.enter_context(modes_restored(model))
            if self.mode == "eval":
                model.eval()
            else:
                _enter_training(model)
            yield

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run a network on a batch.

        Raises:
            SettingError: There is no `forward`, and the batch is not an input of the network.
        """
        if self.forward is not None:
            try:
                return self.forward(model, batch) if _takes_network(self.forward) else self.forward(batch)
            except Exception as error:
                error.add_note("`forward` is called with (batch), or with (network, batch) if it takes two")
                raise
        inputs = inputs_of(batch)
        if isinstance(inputs, Mapping):
            check_keywords(model, inputs)
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)

    def check_outputs(self, model: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Refuse a network whose outputs have no loss, whatever the targets are.

        This cannot be checked if the user supplies `forward` or `loss`, or if the network itself takes targets.

        Args:
            model: The network.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Raises:
            SettingError: The outputs have no loss; the message says what the network returns.
        """
        own = self.forward is not None or self.loss is not None or self.mode != "eval"
        if own or _takes_targets(model):
            return
        with self.running(model), torch.no_grad():
            outputs = model(*args, **kwargs)
        if held_loss(outputs) is None:
            logits_of(outputs)

    def check_targets(self, outputs: Outputs, batch: Batch) -> None:
        """Refuse class numbers for which the default loss has no logit.

        Raises:
            SettingError: There is such a number.
        """
        if self.loss is None and held_loss(outputs) is None:
            check_classes(outputs, batch)

    def divides(self, batch: Batch) -> bool:
        """Whether a batch may be split along the first dimension of its tensors.

        A mapping for a user's own `forward` may not (boxes may be listed over all images); a list within a batch is a
        list of samples.
        """
        if isinstance(batch, Mapping):
            leaves = list(batch.values()) if self.forward is None else []
        else:
            leaves = [batch] if isinstance(batch, Tensor) else _items(batch)
        count = num_samples(batch)
        sizes = [len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves]
        return bool(sizes) and all(size == count for size in sizes)

    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the loss of every sample, (N,); a mean over the batch is repeated for each sample.

        Raises:
            SettingError: There is no loss for such outputs and targets, or the loss is neither scalar nor per sample.
        """
        if self.loss is None:
            found = losses_by_default(outputs, batch)
        else:
            try:
                found = self.loss(outputs, batch)
            except Exception as error:
                error.add_note("`loss` is called with (outputs, batch)")
                raise
        count = num_samples(batch)
        if not isinstance(found, Tensor):
            raise SettingError(
                "loss", type(found).__name__, "return a tensor: one loss per sample, or their mean"
            )
        if found.dim() == 0 or found.numel() == 1:
            return found.reshape(1).expand(count)
        if found.shape[0] != count:
            raise SettingError(
                "loss",
                tuple(found.shape),
                f"return one loss per sample, of which the batch has {count}, or their mean",
            )
        return found.flatten(1).mean(1) if found.dim() > 1 else found


def _items(batch: Batch) -> list[object]:
    """Return the items of a batch; an object of the user's own has none that could be told apart."""
    return list(batch) if isinstance(batch, Iterable) else []


def on_targets(loss: SampleLoss) -> Loss:
    """Convert a loss of (logits, targets) to one of (outputs, batch)."""

    def of_batch(outputs: Outputs, batch: Batch) -> Tensor:
        return loss(logits_of(outputs), targets_of(batch))

    return of_batch


def _enter_training(model: nn.Module) -> None:
    """Enter training mode, with normalisation and dropout as in evaluation."""
    model.train()
    quieten(model.modules(), also=_NOISY)


def _takes_targets(model: nn.Module) -> bool:
    """Whether a network accepts targets, and may then return something else."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(
        parameter.name in TARGET_NAMES or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters
    )


def _takes_network(forward: Forward) -> bool:
    """Whether a function takes the network in addition to the batch."""
    try:
        parameters = inspect.signature(forward).parameters.values()
    except (TypeError, ValueError):
        return False
    wanted = [
        parameter
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return len(wanted) == 2
