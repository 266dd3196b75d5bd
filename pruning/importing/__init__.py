"""Published checkpoints as networks, selectors and saliency mappings of ours.

    imported = import_checkpoint("resnet50_3GFLOPS.pth.tar")
    imported.save("resnet50.pth.tar")

One file per published format; `FORMATS` lists them in the order in which they are tried.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from image_classification.models import WeightsError
from pruning.importing import casm, di, isp_cifar, isp_imagenet, swa
from pruning.importing.imported import Imported
from pruning.importing.parts import state_of
from pruning.importing.reading import read_published

__all__ = ["FORMATS", "Imported", "import_checkpoint", "read_published"]

FORMATS: dict[str, ModuleType] = {module.NAME: module for module in (casm, isp_cifar, isp_imagenet, swa, di)}


def import_checkpoint(
    path: str | Path,
    format_name: str | None = None,
    *,
    trust_pickle: bool = False,
    classifier: str | Path | None = None,
) -> Imported:
    """Read a published file.

    Args:
        path: The file.
        format_name: One of `FORMATS`; None guesses from the names in the file.
        trust_pickle: See `read_published`.
        classifier: A checkpoint of ours with the classifier of a selector, for files that lack it.

    Returns:
        What it holds; nothing is written yet.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: It cannot be read, is of no known kind, or is not complete; what is wrong is named.
    """
    path = Path(path)
    content = read_published(path, trust_pickle=trust_pickle)
    if format_name is None:
        format_name = next((name for name, module in FORMATS.items() if module.matches(content)), None)
    if format_name is None:
        names = list(state_of(content, path).tensors)
        raise WeightsError(
            f"{path}: cannot tell which program wrote it (it has {', '.join(map(repr, names[:3]))}, …): give --format, "
            f"one of {', '.join(FORMATS)}"
        )
    if format_name not in FORMATS:
        raise WeightsError(f"--format {format_name}: choose from {', '.join(FORMATS)}")
    if classifier is not None and FORMATS[format_name] not in (isp_cifar, isp_imagenet):
        raise WeightsError(
            f"--classifier has no effect: files of {format_name} hold their classifier, leave it out"
        )
    return FORMATS[format_name].read(content, path, None if classifier is None else Path(classifier))
