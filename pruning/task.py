"""What a network is run on and judged by: how an example and a batch become calls, and outputs become a loss.

    task = Task(forward=lambda batch: model(batch["image"]), loss=lambda outputs, batch: mse(outputs, batch["depth"]))
    with task.running(model):
        losses = task.losses(task.outputs(model, batch), batch)       # (N,)

Without `forward` and `loss` a batch is (images, targets), a mapping of keyword arguments, or a tensor, and the loss is
the one that the network returns, or else the cross-entropy of its logits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from image_classification.config import SettingError, check_choice
from image_classification.models.modes import (
    evaluating,
    modes_restored,
    quieten,
    random_state_kept,
    uncompiled,
)
from image_classification.models.running import Args, Outputs

#: What calibration yields: (inputs, targets), a mapping, a tensor, or whatever `forward` takes.
Batch = Any
#: What a batch holds to judge outputs by; None where it holds nothing.
Targets = Any
#: A tensor (the only argument), a tuple (positional arguments), a mapping (keyword arguments), or a list of these.
Example = Tensor | Args | Mapping[str, object] | list[Any]
#: (batch) → outputs, or (network, batch) → outputs.
Forward = Callable[..., Outputs]
#: (outputs, batch) → loss of every sample, (N,), or one mean loss.
Loss = Callable[[Outputs, Batch], Tensor]
#: (logits, targets) → (N,).
SampleLoss = Callable[[Tensor, Tensor], Tensor]

Mode = Literal["eval", "train"]
MODES: tuple[Mode, ...] = get_args(Mode)

_TARGET_NAMES = ("labels", "label", "targets", "target", "mask")
#: Layers whose noise is left out in mode "train": torchvision's and timm's beside torch's own dropouts.
_NOISY = ("DropPath", "StochasticDepth", "DropBlock2d", "DropBlock3d")


@dataclasses.dataclass(frozen=True)
class Task:
    """How a network is run on calibration batches, and what its outputs are judged by.

    Attributes:
        forward: (batch) → outputs, for the network being pruned; or (network, batch) → outputs. By default a tensor
            is the network's only argument, a mapping its keyword arguments, and of a tuple or list the first item
            counts.
        loss: (outputs, batch) → one loss per sample, (N,) or (N, …), or a scalar: the mean over the batch. By default
            the loss that the outputs hold, or else cross-entropy with the batch's targets.
        mode: "eval", or "train" for networks that return their losses only while they train. Batch norms and
            dropouts are in evaluation mode either way.
    """

    forward: Forward | None = None
    loss: Loss | None = None
    mode: Mode = "eval"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)

    @property
    def runs_any_network(self) -> bool:
        """Whether a copy of the network can be run: `forward`, if there is one, takes the network."""
        return self.forward is None or _takes_network(self.forward)

    @contextlib.contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """The mode that batches are run in; modes, buffers and the random state are as before afterwards."""
        if self.mode == "eval":
            with uncompiled(), evaluating(model, keep_random_state=True):
                yield
            return
        buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        try:
            with uncompiled(), random_state_kept(model), modes_restored(model):
                _enter_training(model)
                yield
        finally:
            for buffer, values in buffers:
                buffer.data.copy_(values)

    def outputs(self, model: nn.Module, batch: Batch) -> Outputs:
        """Run a network on a batch.

        Raises:
            SettingError: Without `forward` the batch is not an input of the network.
        """
        if self.forward is not None:
            return self.forward(model, batch) if _takes_network(self.forward) else self.forward(batch)
        inputs = inputs_of(batch)
        if isinstance(inputs, Mapping):
            _check_keywords(model, inputs)
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)

    def check_outputs(self, model: nn.Module, arguments: Args) -> None:
        """Refuse a network whose outputs have no loss whatever the targets are.

        Nothing is known where `forward` or `loss` are the user's own, or where the network itself takes targets.

        Args:
            model: The network.
            arguments: Its positional arguments.

        Raises:
            SettingError: Saying what it returns.
        """
        own = self.forward is not None or self.loss is not None or self.mode != "eval"
        if own or _takes_targets(model):
            return
        with self.running(model), torch.no_grad():
            outputs = model(*arguments)
        if _held_loss(outputs) is None:
            logits_of(outputs)

    def divides(self, batch: Batch) -> bool:
        """Whether a batch may be cut into parts along the first dimension of its tensors.

        Of a mapping for a `forward` of the user's own nothing is known (boxes are listed over all images), and a list
        within a batch is one of samples.
        """
        if isinstance(batch, Mapping):
            leaves = list(batch.values()) if self.forward is None else []
        else:
            leaves = [batch] if isinstance(batch, Tensor) else list(batch)
        count = num_samples(batch)
        sizes = [len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves]
        return bool(sizes) and all(size == count for size in sizes)

    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Loss of every sample, (N,); a mean over the batch stands for each of them.

        Raises:
            SettingError: There is no loss for such outputs and targets, or it is neither scalar nor per sample.
        """
        if self.loss is None:
            found = _losses_by_default(outputs, batch)
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


def on_targets(loss: SampleLoss) -> Loss:
    """A loss of (logits, targets) as one of (outputs, batch)."""

    def of_batch(outputs: Outputs, batch: Batch) -> Tensor:
        return loss(logits_of(outputs), targets_of(batch))

    return of_batch


# -- examples ----------------------------------------------------------------------------------------------


def check_example(example: object) -> None:
    """Refuse what cannot be an example.

    Raises:
        SettingError: Naming what was given and what to give.
    """
    several = example if isinstance(example, list) else [example]
    if not several:
        raise SettingError("example", [], "there is no example: give one or two samples of the final size")
    for one in several:
        if not isinstance(one, (Tensor, tuple, Mapping)):
            raise SettingError(
                "example",
                type(one).__name__,
                "give a tensor, a tuple of positional arguments, a mapping of keyword arguments, or a list of these",
            )
        tensors = [leaf for leaf in tree_leaves(_plain(one)) if isinstance(leaf, Tensor)]
        if not tensors:
            raise SettingError(
                "example", one, "it holds no tensor: give one or two samples of the final size"
            )
        if any(tensor.numel() == 0 for tensor in tensors):
            raise SettingError("example", 0, "there is no image: give one or two of the final size")


def first_arguments(model: nn.Module, example: Example) -> Args:
    """Positional arguments of the network for the (first) example, the one that costs are counted on.

    Raises:
        SettingError: The network does not take such keywords.
    """
    one = example[0] if isinstance(example, list) else example
    if isinstance(one, Mapping):
        return _by_position(model, one)
    return one if isinstance(one, tuple) else (one,)


def _by_position(model: nn.Module, keywords: Mapping[str, object]) -> Args:
    """Keyword arguments in the order of the network's parameters, defaults between them."""
    _check_keywords(model, keywords, setting="example")
    bound = inspect.signature(model.forward).bind_partial(**keywords)
    bound.apply_defaults()
    arguments: list[object] = []
    wanted = set(keywords)
    for name, parameter in bound.signature.parameters.items():
        if not wanted:
            break
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD or name not in bound.arguments:
            break
        arguments.append(bound.arguments[name])
        wanted.discard(name)
    if wanted:
        raise SettingError(
            "example",
            ", ".join(sorted(wanted)),
            f"{type(model).__name__}.forward does not take this by position: give a tuple, or wrap the network",
        )
    return tuple(arguments)


def _check_keywords(model: nn.Module, keywords: Mapping[str, object], setting: str = "forward") -> None:
    try:
        inspect.signature(model.forward).bind(**keywords)
    except TypeError as error:
        raise SettingError(
            setting,
            None if setting == "forward" else ", ".join(keywords),
            f"{type(model).__name__}.forward does not take a batch of {', '.join(map(str, keywords))} by name "
            f"({error}): give forward=, a function of the batch",
        ) from error


# -- batches -----------------------------------------------------------------------------------------------


def check_batches(calibration: object) -> None:
    """Refuse one batch, or something else, in place of an iterable of batches.

    Raises:
        SettingError: Naming what was given and what to give.
    """
    if isinstance(calibration, (Tensor, Mapping, nn.Module, str)) or not isinstance(calibration, Iterable):
        problem = "give an iterable of batches, such as a DataLoader or [(images, targets)]"
        raise SettingError("calibration", type(calibration).__name__, problem)
    if isinstance(calibration, (tuple, list)) and len(calibration) == 2:
        first, second = calibration
        if isinstance(first, Tensor) and isinstance(second, Tensor) and first.dim() != second.dim():
            raise SettingError(
                "calibration", "(images, targets)", "this is one batch: give an iterable, [(images, targets)]"
            )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with its tensors on a device; objects of other kinds are moved by their own `to`."""

    def move(leaf: object) -> object:
        if isinstance(leaf, Tensor):
            return leaf if leaf.device == device else leaf.to(device, non_blocking=True)
        if isinstance(leaf, Mapping):
            return {key: to_device(value, device) for key, value in leaf.items()}
        own = getattr(leaf, "to", None)
        if callable(own):
            return own(device)
        return leaf

    if isinstance(batch, (Tensor, Mapping, tuple, list)) or callable(getattr(batch, "to", None)):
        return tree_map(move, batch)
    return tree_map(move, tuple(batch)) if isinstance(batch, Iterable) else batch


def inputs_of(batch: Batch) -> Outputs:
    """What the network gets of a batch by default: all of a tensor or mapping, else the first item."""
    if isinstance(batch, (Tensor, Mapping)):
        return batch
    if isinstance(batch, (tuple, list)):
        return batch[0]
    if isinstance(batch, Iterable):
        return next(iter(batch))
    raise SettingError(
        "calibration",
        type(batch).__name__,
        "this is not a batch: yield (images, targets), a mapping or a tensor, or give forward=",
    )


def targets_of(batch: Batch) -> Outputs:
    """Targets of a batch: the second item, or the entry called labels, targets or alike; None where there are none."""
    if isinstance(batch, Mapping):
        return next((batch[name] for name in _TARGET_NAMES if name in batch), None)
    if isinstance(batch, Tensor):
        return None
    items = batch if isinstance(batch, Sequence) else tuple(batch)
    return items[1] if len(items) > 1 else None


def num_samples(batch: Batch) -> int:
    """How many samples a batch has: the first dimension of its first tensor, or the length of a list of samples."""
    inputs = inputs_of(batch)
    if isinstance(inputs, Mapping):
        counts = [_count(value) for value in inputs.values()]
        return next((count for count in counts if count is not None), 1)
    if isinstance(inputs, tuple):
        counts = [_count(value) for value in inputs]
        return next((count for count in counts if count is not None), 1)
    return _count(inputs) or (0 if isinstance(inputs, (Tensor, list)) and len(inputs) == 0 else 1)


def _count(value: object) -> int | None:
    if isinstance(value, Tensor):
        return value.shape[0] if value.dim() else None
    return len(value) if isinstance(value, (list, tuple)) else None


def pieces_of(batch: Batch, pieces: int) -> list[Batch]:
    """A batch in parts, where it is a tuple or list of tensors of equal length; otherwise the whole."""
    if pieces == 1 or not isinstance(batch, (tuple, list)):
        return [batch]
    if not all(isinstance(item, Tensor) and item.dim() and len(item) == len(batch[0]) for item in batch):
        return [batch]
    return list(zip(*(item.chunk(pieces) for item in batch), strict=True))


TargetKind = Literal["classes", "pixels"]


def kind_of_targets(targets: Targets) -> TargetKind | None:
    """What class targets are: of samples, (N,) whole numbers or (N, L) shares, or of positions; None: no classes."""
    if not isinstance(targets, Tensor) or targets.dim() == 0:
        return None
    whole = not targets.is_floating_point() and not targets.is_complex()
    if targets.dim() == 1:
        return "classes" if whole else None
    if targets.dim() == 2:
        shares = whole or bool(((targets >= 0) & (targets <= 1)).all())
        return "classes" if shares else None
    return "pixels" if class_map(targets) is not None else None


def class_map(targets: Tensor) -> Tensor | None:
    """Class indices of positions, (N, H, W) or of other dimensions; None where targets are not such a map.

    Args:
        targets: (N, …) or (N, 1, …) whole numbers of any type, or (N, L, …) one-hot or soft.
    """
    if targets.dim() < 3:
        return None
    if targets.dim() > 3 and targets.shape[1] == 1:
        targets = targets.squeeze(1)
    if not targets.is_floating_point():
        return targets.long()
    if targets.dim() > 3 and targets.shape[1] > 1:
        shares = bool(((targets >= 0) & (targets <= 1)).all()) and bool(
            (targets.sum(1) - 1).abs().max() < 1e-3
        )
        return targets.argmax(1) if shares else None
    return targets.long() if bool((targets == targets.round()).all()) else None


# -- outputs -----------------------------------------------------------------------------------------------


def logits_of(outputs: Outputs) -> Tensor:
    """The main tensor of what a network returns: itself, the first of several, `logits` or `out`.

    Raises:
        SettingError: There is none.
    """
    if isinstance(outputs, Tensor):
        return outputs
    candidates = [getattr(outputs, "logits", None)]
    if isinstance(outputs, Mapping):
        candidates += [outputs.get("logits"), outputs.get("out")]
    elif isinstance(outputs, (tuple, list)):
        candidates += outputs[:1]
    for candidate in candidates:
        if isinstance(candidate, Tensor):
            return candidate
    raise SettingError(
        "loss",
        None,
        f"the network returns {type(outputs).__name__} without logits: give loss=(outputs, batch) → loss",
    )


def _held_loss(outputs: Outputs) -> Tensor | None:
    """The loss that a network returns, or the sum of several; None where it returns none."""
    held = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(held, Tensor):
        return held
    if isinstance(outputs, Mapping) and outputs and all("loss" in str(name) for name in outputs):
        return torch.stack([part.mean() for part in outputs.values()]).sum()
    return None


def _losses_by_default(outputs: Outputs, batch: Batch) -> Tensor:
    """The loss that the outputs hold, or else the cross-entropy of their logits."""
    held = _held_loss(outputs)
    if held is not None:
        return held
    targets = targets_of(batch)
    kind = kind_of_shape(targets)
    if kind is None:
        raise _no_loss(targets)
    logits = logits_of(outputs)
    if kind == "classes":
        if logits.dim() != 2 or len(logits) != len(targets):
            raise _no_loss(targets, logits)
        return F.cross_entropy(
            logits.float(), targets.long() if targets.dim() == 1 else targets.float(), reduction="none"
        )
    classes = class_map(targets)
    if classes is None or classes.shape != (len(logits), *logits.shape[2:]) or logits.shape[1] < 2:
        raise _no_loss(targets, logits)
    # 255 is the void class of PASCAL VOC and the like.
    return F.cross_entropy(logits.float(), classes, ignore_index=255, reduction="none")


def kind_of_shape(targets: Targets) -> TargetKind | None:
    """As `kind_of_targets`, without a look at the values of (N, L)."""
    if isinstance(targets, Tensor) and targets.dim() == 2:
        return "classes"
    return kind_of_targets(targets)


def _no_loss(targets: Targets, logits: Tensor | None = None) -> SettingError:
    given = f"targets of shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else "no class targets"
    shown = "" if logits is None else f" and outputs of shape {tuple(logits.shape)}"
    return SettingError(
        "loss",
        None,
        f"the batch has {given}{shown}, for which no loss is known: give loss=(outputs, batch) → loss",
    )


# -- networks ----------------------------------------------------------------------------------------------


def _enter_training(model: nn.Module) -> None:
    """Training mode with normalisation and dropout as in evaluation."""
    model.train()
    quieten(model.modules(), also=_NOISY)


def _takes_targets(model: nn.Module) -> bool:
    """Whether a network can be given targets, and may return another thing then."""
    parameters = inspect.signature(model.forward).parameters.values()
    return any(
        parameter.name in _TARGET_NAMES or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters
    )


def _takes_network(forward: Forward) -> bool:
    """Whether a function wants the network beside the batch."""
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


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else value
