"""Files of the ISP program for CIFAR-10 (Ganjdanesh et al. 2022): ResNet-56 or MobileNetV2, RBF and REAL-X selectors.

Keys: model, iter, and val, test of selectors and predictors. See `isp.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from pruning.importing.imported import Imported
from pruning.importing.isp import read_isp, state_names

NAME = "isp-cifar"
#: CIFAR-100 is the largest of the sets of small pictures.
_MOST_CLASSES = 100
_HEADS = ("fc.weight", "linear.weight", "classifier.weight", "classifier.1.weight", "embedding.weight")


def matches(content: Any) -> bool:
    """Whether a file's content looks like this kind: an ISP file of three stages, or of few classes."""
    names = state_names(content)
    staged = any(".layer1." in f".{name}" for name in names)
    if staged:
        return not any(".layer4." in f".{name}" for name in names)
    heads = [value for name, value in content["model"].items() if str(name).endswith(_HEADS)] if names else []
    return bool(heads) and all(
        isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] <= _MOST_CLASSES for value in heads
    )


def read(content: Any, source: Path, classifier: Path | None) -> Imported:
    """Make networks and a selector of it; see `import_checkpoint`."""
    return read_isp(content, source, classifier, name=NAME, small_images=True)
