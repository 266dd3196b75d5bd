"""Defaults for criterion and search, depending on the content of the calibration batches.

no batches                                  magnitude, global classes of samples or of positions          discriminant
other targets, and a loss                   taylor neither                                     magnitude a loss is known
greedy, sensitivity for a single cut; else global
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from image_classification.config import SettingError
from image_classification.distributed import Distributed
from pruning.search.search import DEFAULT_SEARCH, ONE_SHOT_SEARCH
from pruning.task import TargetKind, Task, kind_of_targets, num_samples, targets_of, to_device
from pruning.task.explained import Autocast

_HOW_CALLED = {
    "calibration": "the network does not run on such a batch; give forward=, a function of the batch",
    "forward": "it is called with (batch), or with (network, batch) if it takes two, and raises",
    "loss": "it is called with (outputs, batch), the whole batch, and raises",
}


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The content of the calibration batches of all ranks.

    Attributes:
        batches: Whether there are any.
        targets: Kind of class targets, of samples or of positions; None if targets are not classes.
        problem: Why the outputs have no loss; None if they have one.
    """

    batches: bool
    targets: TargetKind | None
    problem: SettingError | None

    @property
    def judged(self) -> bool:
        """Whether a loss is known."""
        return self.batches and self.problem is None

    def criterion(self) -> tuple[str, str]:
        """Return the name of a suitable criterion, and why."""
        if not self.batches:
            return "magnitude", "there are no calibration batches"
        if self.targets is not None:
            of = "samples" if self.targets == "classes" else "positions"
            return "discriminant", f"the targets are classes of {of}"
        if self.judged:
            return "taylor", "the targets are not classes, but a loss is known"
        return "magnitude", "the batches have neither class targets nor a loss"

    def search(self, at_once: bool) -> str:
        """Return the name of a suitable search.

        Args:
            at_once: Whether a single rewrite meets the whole budget.
        """
        if not self.judged:
            return "global"
        return ONE_SHOT_SEARCH if at_once else DEFAULT_SEARCH


def look(
    task: Task,
    model: nn.Module,
    batches: Sequence[Any],
    distributed: Distributed | None = None,
    autocast: Autocast = nullcontext,
) -> Evidence:
    """Inspect the first batch, and run the network on it once. Collective.

    Args:
        task: How the network is run and evaluated.
        model: The network; not modified.
        batches: This rank's calibration batches; a rank may have none.
        distributed: The ranks, which agree on the result.
        autocast: Creates the context of the forward pass.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batch = next((batch for batch in batches if num_samples(batch)), None)
    problem = None
    kind: TargetKind | None = None
    if batch is not None:
        batch = to_device(batch, device)
        kind = kind_of_targets(targets_of(batch))
        problem = _problem(task, model, batch, autocast)
    flags = [batch is not None, kind == "classes", kind == "pixels", problem is not None]
    seen = torch.tensor(flags, dtype=torch.float64)
    (total,) = (distributed or Distributed()).all_reduce_sum(seen.to(device))
    any_batch, any_classes, any_pixels, any_problem = (total > 0).tolist()
    if any_problem and problem is None:
        problem = SettingError("loss", None, "another rank's outputs cannot be judged: give loss=")
    if any_classes or any_pixels:
        kind = "classes" if any_classes else "pixels"
    if task.loss is not None and problem is not None:
        raise problem
    return Evidence(any_batch, kind, problem)


def _problem(task: Task, model: nn.Module, batch: Any, autocast: Autocast) -> SettingError | None:
    """Return why the network's outputs on a batch have no loss; None if they have one.

    Raises:
        SettingError: The network, `forward` or `loss` raises an exception on this batch.
    """
    with task.running(model), torch.no_grad(), autocast():
        with _said_of("calibration" if task.forward is None else "forward", batch):
            outputs = task.outputs(model, batch)
        try:
            with _said_of("loss", batch):
                task.check_targets(outputs, batch)
                task.losses(outputs, batch)
        except SettingError as error:
            if error.__cause__ is not None:
                raise
            return error
    return None


@contextlib.contextmanager
def _said_of(setting: str, batch: Any) -> Iterator[None]:
    """Turn whatever a function of the user's, or a network, raises into an error that names the argument."""
    try:
        yield
    except (SettingError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise SettingError(setting, type(batch).__name__, f"{_HOW_CALLED[setting]}: {said}") from error
