"""Files of the ISP program for ImageNet (Ganjdanesh et al. 2022): ResNet-34, ResNet-50 or MobileNetV2.

Keys: model, val, test, iter. The black box has torchvision's names, predictor and encoder the program's own; see
`isp.py`.
"""

from __future__ import annotations

from pathlib import Path

from pruning.files.importing.imported import Imported
from pruning.files.importing.isp import read_isp, state_names

NAME = "isp-imagenet"


def matches(content: object) -> bool:
    """Whether a file's content looks like this format: an ISP file of an ImageNet network."""
    names = state_names(content)
    return any(".layer4." in f".{name}" or ".features." in f".{name}" for name in names)


def read(content: object, source: Path, classifier: Path | None) -> Imported:
    """Build the networks and the selector; see `import_checkpoint`."""
    return read_isp(content, source, classifier, name=NAME, small_images=False)
