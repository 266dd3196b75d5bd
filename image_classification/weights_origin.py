"""Origin of a job's weights, determined before its data are opened: the file, and the names of its classes."""

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
    """Origin of a job's weights.

    Attributes:
        path: The file; None for fresh weights.
        class_names: Names of its classes; None if not recorded or irrelevant.
        notes: Notes to log.
    """

    path: Path | None = None
    class_names: tuple[str, ...] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def name_classes(self, dataset: Dataset) -> Dataset:
        """Return the data set, labelled with the class indices of the weights.

        Raises:
            ValueError: The data set has a class that the weights do not have.
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
    """Determine the origin of a job's initial weights, before its data are opened.

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
