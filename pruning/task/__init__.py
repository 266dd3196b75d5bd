"""Running networks on examples and calibration batches, and evaluating their outputs."""

from pruning.task.batch_targets import (
    TargetKind,
    Targets,
    class_map,
    kind_of_targets,
    targets_of,
)
from pruning.task.batches import (
    Batch,
    check_batches,
    inputs_of,
    inputs_or_parts,
    num_samples,
    pieces_of,
    to_device,
)
from pruning.task.calibration_task import MODES, Forward, Loss, Mode, SampleLoss, Task, on_targets
from pruning.task.example_arguments import Example, check_example, first_call
from pruning.task.known_losses import logits_of

__all__ = [
    "MODES",
    "Batch",
    "Example",
    "Forward",
    "Loss",
    "Mode",
    "SampleLoss",
    "TargetKind",
    "Targets",
    "Task",
    "check_batches",
    "check_example",
    "class_map",
    "first_call",
    "inputs_of",
    "inputs_or_parts",
    "kind_of_targets",
    "logits_of",
    "num_samples",
    "on_targets",
    "pieces_of",
    "targets_of",
    "to_device",
]
