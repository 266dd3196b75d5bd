"""Default losses: the loss contained in the outputs, or the cross-entropy of their logits.

One logit per sample or position is the logit of a single class, and (N, L) targets whose shares do not add up to 1 are
of several classes at once: both have binary cross-entropy, where all targets are 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from image_classification.config import SettingError
from image_classification.models.running import Outputs
from pruning.task.batch_targets import Targets, class_map, kind_of_targets, targets_of
from pruning.task.batches import Batch

_IGNORED = -100  # PyTorch's class without a loss
_VOID = 255  # that of PASCAL VOC and similar data sets
_ROUNDING = 1e-3


def logits_of(outputs: Outputs) -> Tensor:
    """Return the main tensor of a network's outputs: the output itself, the first of several, `logits` or `out`.

    Raises:
        SettingError: There is no such tensor.
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


def held_loss(outputs: Outputs) -> Tensor | None:
    """Return the loss in a network's outputs, or the sum of several; None if there is none."""
    held = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(held, Tensor):
        return held
    if isinstance(outputs, Mapping) and outputs and all("loss" in str(name) for name in outputs):
        return torch.stack([part.mean() for part in outputs.values()]).sum()
    return None


def losses_by_default(outputs: Outputs, batch: Batch) -> Tensor:
    """Return the loss contained in the outputs, else the cross-entropy of their logits."""
    held = held_loss(outputs)
    if held is not None:
        return held
    targets = targets_of(batch)
    logits = logits_of(outputs).float()
    if isinstance(targets, Tensor) and _is_single(logits) and logits.numel() == targets.numel():
        if len(logits) != len(targets) or not _is_binary(targets):
            raise _no_loss(targets, logits)
        return _binary(logits.reshape(len(logits), -1), targets.reshape(len(logits), -1))
    kind = kind_of_targets(targets)
    if kind == "classes" and logits.dim() == 2 and len(logits) == len(targets):
        return _of_samples(logits, targets)
    classes = class_map(targets) if kind == "pixels" else None
    if classes is None or classes.shape != (len(logits), *logits.shape[2:]) or logits.shape[1] < 2:
        raise _no_loss(targets, None if kind is None else logits)
    return F.cross_entropy(logits, classes, ignore_index=_VOID, reduction="none")


def check_classes(outputs: Outputs, batch: Batch) -> None:
    """Refuse class numbers that the outputs of a classifier do not have; a GPU would stop at them for good.

    Raises:
        SettingError: There is such a number.
    """
    targets, logits = targets_of(batch), logits_of(outputs)
    if kind_of_targets(targets) != "classes" or targets.dim() != 1 or logits.dim() != 2 or _is_single(logits):
        return
    numbers = torch.where(targets == _IGNORED, torch.zeros_like(targets), targets)
    if not numbers.numel():
        return
    lowest, highest = torch.stack([numbers.min(), numbers.max()]).tolist()
    if not 0 <= lowest <= highest < logits.shape[1]:
        raise _no_loss(targets, logits, f" ({lowest} … {highest})")


def _of_samples(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the losses (N,) of logits (N, L) and classes (N,) or shares of classes (N, L)."""
    if targets.dim() == 1:
        return F.cross_entropy(logits, targets.long(), ignore_index=_IGNORED, reduction="none")
    if targets.shape != logits.shape:
        raise _no_loss(targets, logits)
    if bool((targets.sum(1) - 1).abs().max() < _ROUNDING):
        return F.cross_entropy(logits, targets.float(), reduction="none")
    if not _is_binary(targets):
        raise _no_loss(targets, logits)
    return _binary(logits, targets)


def _is_single(logits: Tensor) -> bool:
    """Whether there is one logit per sample, (N,) or (N, 1), or per position, (N, 1, …)."""
    return logits.dim() == 1 or logits.shape[1] == 1


def _is_binary(targets: Tensor) -> bool:
    return bool(((targets == 0) | (targets == 1)).all())


def _binary(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean binary cross-entropy (N,) of logits and targets of one shape, (N, L)."""
    return F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none").mean(1)


def _no_loss(targets: Targets, logits: Tensor | None = None, more: str = "") -> SettingError:
    given = f"targets of shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else "no class targets"
    shown = more if logits is None else f"{more} and outputs of shape {tuple(logits.shape)}"
    return SettingError(
        "loss",
        None,
        f"the batch has {given}{shown}, for which no loss is known: give loss=(outputs, batch) → loss",
    )
