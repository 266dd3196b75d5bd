"""Files of the ISP program for CIFAR-10 (Ganjdanesh et al. 2022): ResNet-56 or MobileNetV2, RBF and REAL-X selectors.

Keys: model, iter, and val, test of selectors and predictors. See `isp.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

from pruning.files.importing.imported import Imported
from pruning.files.importing.isp import read_isp, state_names

NAME = "isp-cifar"


def matches(content: object) -> bool:
    """Whether a file's content looks like this format: an ISP file of three stages, or of one list of layers."""
    names = [f".{name}" for name in state_names(content)]
    staged = any(".layer1." in name for name in names) and not any(".layer4." in name for name in names)
    return staged or any(re.search(r"\.layers\.\d+\.conv3\.", name) for name in names)


def read(content: object, source: Path, classifier: Path | None) -> Imported:
    """Build the networks and the selector; see `import_checkpoint`."""
    return read_isp(content, source, classifier, name=NAME, small_images=True)
