"""Default losses: the loss contained in the outputs, or the cross-entropy of their logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from image_classification.config import SettingError
from image_classification.models.running import Outputs
from pruning.task.batch_targets import Targets, class_map, kind_of_shape, targets_of
from pruning.task.batches import Batch


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
    # 255 is the void class of PASCAL VOC and similar data sets.
    return F.cross_entropy(logits.float(), classes, ignore_index=255, reduction="none")


def _no_loss(targets: Targets, logits: Tensor | None = None) -> SettingError:
    given = f"targets of shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else "no class targets"
    shown = "" if logits is None else f" and outputs of shape {tuple(logits.shape)}"
    return SettingError(
        "loss",
        None,
        f"the batch has {given}{shown}, for which no loss is known: give loss=(outputs, batch) → loss",
    )
