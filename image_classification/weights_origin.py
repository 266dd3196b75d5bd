"""What a job's weights say before its data are opened: which of a file's are taken, and the names of their classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from image_classification.checkpoint_format import is_ours
from image_classification.data.class_names import difference
from image_classification.data.dataset import Dataset
from image_classification.models import ModelConfig, read_safely
from image_classification.models.weights import takes_average
from image_classification.plain_data import Plain


@dataclasses.dataclass
class WeightsOrigin:
    """Where a job's weights come from.

    Attributes:
        path: The file; None for fresh weights.
        class_names: What its classes are called; None where it does not say, or they do not matter.
        notes: What is to be said about it.
    """

    path: Path | None = None
    class_names: tuple[str, ...] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def name_classes(self, dataset: Dataset) -> Dataset:
        """The data set with labels by the class indices of the weights.

        Raises:
            ValueError: It has a class that they do not know.
        """
        if self.class_names is None:
            return dataset
        remedy = (
            "Give the data that it was trained on, or name the folders alike; --new-head with --pretrained-weights "
            "learns new classes, and --ignore-class-names goes by their order alone"
        )
        found = difference(dataset.class_names, self.class_names)
        dataset = dataset.in_classes(self.class_names, str(self.path), remedy)
        if found is not None:
            self.notes.append(f"classes of {self.path}: {found}")
        return dataset


def weights_origin(config: ModelConfig, resume_path: Path | None, resumed: Plain | None) -> WeightsOrigin:
    """What is known of the weights that a job starts from, before its data are opened.

    Raises:
        FileNotFoundError, WeightsError: `--pretrained-weights` cannot be read.
    """
    path, content = resume_path, resumed
    notes = []
    if resumed is None and config.pretrained_weights is not None:
        path = Path(config.pretrained_weights)
        content = read_safely(path)
        if is_ours(content) and content.get("ema") is not None:
            which = (
                "averaged weights (EMA)" if takes_average(content, config.pretrained_ema) else "last weights"
            )
            notes.append(f"starting from the {which} of {path}")
    names = content.get("class_names") if is_ours(content) else None
    if names is None or config.new_head or config.ignore_class_names:
        return WeightsOrigin(path, None, notes)
    return WeightsOrigin(path, tuple(names), notes)
