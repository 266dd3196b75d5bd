"""Pruning in a Lightning training.

    pruning = LightningPruning(images[:2], calibration_loader, budget=0.5, step=200, delta=0.05)
    Trainer(callbacks=[pruning, …]).fit(module, data, ckpt_path="last")

A Lightning checkpoint then holds the network's structure and the pruner's progress, so `ckpt_path=` of `fit`,
`validate` and `test` accepts checkpoints of a pruned network, with the module as its class builds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from image_classification.extras import optional_import
from pruning.pruner import Pruner
from pruning.task import Example
from pruning.training.loops.loop_pruning import LoopPruning

with optional_import():
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy


class LightningPruning(Callback):
    """Prunes a LightningModule, or a part of it, at intervals of optimizer steps.

    Args:
        example: See `Pruner`; the network's arguments.
        calibration: Yields batches for every rewrite, from the start each time: training data held out from training.
        network: Name of the part of the module to prune; the module itself by default.
        settings: Further arguments of `Pruner`.
    """

    def __init__(
        self, example: Example, calibration: Iterable[Any], *, network: str = "", **settings: Any
    ) -> None:
        self._network = network
        self._pruning = LoopPruning(example, calibration, **settings)

    @property
    def pruner(self) -> Pruner | None:
        """The pruner; None before `fit`."""
        return self._pruning.pruner

    def _part(self, module: LightningModule) -> nn.Module:
        part: nn.Module = module.get_submodule(self._network)
        return part

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hook into the loading of weights, which needs the pruned network."""
        self._pruning.remember(self._part(pl_module))
        load: Callable[[dict[str, Any]], None] = pl_module.on_load_checkpoint

        def restore_and_load(checkpoint: dict[str, Any]) -> None:
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state:
                self._pruning.restore(self._part(pl_module), state)
            load(checkpoint)

        pl_module.on_load_checkpoint = restore_and_load  # type: ignore[method-assign]  # of this module alone

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the module's own hook."""
        del pl_module.on_load_checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the pruner, now that the optimizers exist."""
        self._pruning.begin(self._part(pl_module), trainer.optimizers)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Rewrite at the end of an interval."""
        if not self._pruning.due(trainer.global_step):
            return
        if isinstance(outputs, dict):
            outputs.clear()  # the loss, with everything it references
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy):
            strategy.model = pl_module  # drops the wrapper
        self._pruning.rewrite_if_due(trainer.global_step)
        if isinstance(strategy, DDPStrategy):
            strategy.configure_ddp()

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning writes into a checkpoint."""
        return {} if self._pruning.pruner is None else dict(self._pruning.state())
