"""Pruning in a Hugging Face `Trainer`.

    pruning = TrainerPruning(example, calibration, budget=0.5, step=200, delta=0.05)
    trainer = Trainer(model, arguments, train_dataset=…, callbacks=[pruning])
    trainer.train()

To resume from a checkpoint of a pruned network, cut the network down before the trainer loads it:

    pruning.restore(model, "out/checkpoint-400")
    trainer.train(resume_from_checkpoint="out/checkpoint-400")
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from torch import nn

from image_classification.checkpoint import save_atomically
from image_classification.config import SettingError
from image_classification.extras import optional_import
from image_classification.models.weights import read_safely
from pruning.pruner import Pruner
from pruning.task import Example
from pruning.training.loops.loop_pruning import LoopPruning, LoopState

with optional_import():
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    from transformers.training_args import ParallelMode

_FILE = "pruning.pt"


class TrainerPruning(TrainerCallback):
    """Rewrites the trainer's network at intervals of its steps.

    Args:
        example: See `Pruner`, such as `{"pixel_values": images}`.
        calibration: Yields batches for every rewrite, from the start each time: training data held out from training.
        settings: Further arguments of `Pruner`.
    """

    def __init__(self, example: Example, calibration: Iterable[Any], **settings: Any) -> None:
        self._pruning = LoopPruning(example, calibration, **settings)

    @property
    def pruner(self) -> Pruner | None:
        """The pruner; None before `train`."""
        return self._pruning.pruner

    def restore(self, model: nn.Module, checkpoint: str | Path) -> None:
        """Cut an unpruned network down to the structure of a checkpoint of the trainer; `train` loads the weights.

        Args:
            model: The network as it was before pruning.
            checkpoint: A folder `checkpoint-…` that was written with this callback present.

        Raises:
            SettingError: The checkpoint holds no pruning state.
        """
        path = Path(checkpoint) / _FILE
        if not path.is_file():
            raise SettingError(
                "checkpoint", checkpoint, f"there is no {_FILE}: nothing was pruned when it was written"
            )
        self._pruning.restore(model, cast(LoopState, read_safely(path)))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Create the pruner, now that the optimizer exists.

        Raises:
            SettingError: Several processes train: the trainer offers no way to rewrap its network.
        """
        if args.parallel_mode not in (ParallelMode.NOT_PARALLEL, ParallelMode.NOT_DISTRIBUTED):
            raise SettingError(
                "args",
                args.parallel_mode.value,
                "the network must be wrapped again after a rewrite, and the Trainer has no place for that: train in "
                "one process, in a loop of your own with accelerate, or with Lightning",
            )
        self._pruning.begin(kwargs["model"], [kwargs["optimizer"]])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Rewrite at the end of an interval."""
        self._pruning.rewrite_if_due(state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add structure and progress to the trainer's checkpoint."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_atomically(dict(self._pruning.state()), folder / _FILE)
