"""Base of the callbacks for other libraries' loops: a pruner that starts, and resumes, with the training."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import torch
from torch import nn

from image_classification.config import SettingError
from image_classification.models import Structure, StructureError, capture_structure
from image_classification.models.structure_build import fit_structure
from pruning.files.skeleton import skeleton_of
from pruning.pruner import Pruner
from pruning.rewrites.resuming import PrunerState
from pruning.task import Example


class LoopState(TypedDict):
    """Pruning state in a checkpoint of the loop: plain data.

    Attributes:
        structure: Structure of the network.
        pruner: Progress of the pruner.
    """

    structure: dict[str, Any]
    pruner: PrunerState


class LoopPruning:
    """The pruner of a loop.

    Args:
        example: See `Pruner`.
        calibration: Yields batches for every rewrite, from the start each time: training data held out from training.
        settings: Further arguments of `Pruner`: `budget`, `step`, `delta`, `criterion`, `forward`, `loss`, ….

    Attributes:
        pruner: The pruner; None before the training has begun.
    """

    def __init__(self, example: Example, calibration: Iterable[Any], **settings: Any) -> None:
        self.pruner: Pruner | None = None
        self._example = example
        self._calibration = calibration
        self._settings = settings
        self._fresh: nn.Module | None = None
        self._state: PrunerState | None = None

    def remember(self, network: nn.Module) -> None:
        """Keep the network as it is before the first rewrite, as the reference for its structure."""
        if self._fresh is None:
            self._fresh = skeleton_of(network)

    def restore(self, network: nn.Module, state: LoopState) -> None:
        """Cut an unpruned network down to a checkpoint's structure, before its weights are loaded.

        Raises:
            SettingError: The network is already smaller, or is another network; it is not modified.
        """
        self.remember(network)
        try:
            fit_structure(network, Structure.from_plain(state["structure"]))
        except StructureError as error:
            raise SettingError(
                "network",
                type(network).__name__,
                f"it does not hold what the checkpoint has ({error}); a network that has been pruned further since "
                "cannot grow again: give a new one, as its class builds it",
            ) from error
        self._state = state["pruner"]

    def begin(self, network: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Create the pruner, or continue with a restored one, once the optimizers exist."""
        self.remember(network)
        state, self._state = self._state, None
        self.pruner = Pruner(
            network, self._example, optimizer=list(optimizers), state=state, **self._settings
        )

    def rewrite_if_due(self, iteration: int) -> bool:
        """Rewrite if this iteration ends an interval. The loss of the iteration must have been freed.

        Returns:
            Whether the network has been rewritten.
        """
        if not self.due(iteration):
            return False
        assert self.pruner is not None
        self.pruner.step(self._calibration, iteration)
        return True

    def due(self, iteration: int) -> bool:
        """Whether a rewrite is due after this iteration."""
        return self.pruner is not None and self.pruner.due(iteration)

    def state(self) -> LoopState:
        """Return the state for a checkpoint."""
        assert self.pruner is not None
        assert self._fresh is not None
        factory = functools.partial(skeleton_of, self._fresh)
        structure = capture_structure(self.pruner.model, factory=factory)
        return {"structure": structure.to_plain(), "pruner": self.pruner.state_dict()}
