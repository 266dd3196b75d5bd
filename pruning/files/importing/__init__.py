"""Import of published checkpoints as LucidPrune networks, selectors and saliency mappings.

    imported = import_checkpoint("resnet50_3GFLOPS.pth.tar")
    imported.save("resnet50.pth.tar")

There is one file per published format; `FORMATS` lists them in the order in which they are tried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from image_classification.config import check_choice, check_setting
from image_classification.models import WeightsError
from pruning.files.importing import casm, di, isp_cifar, isp_imagenet, swa
from pruning.files.importing.imported import Imported
from pruning.files.importing.published_part import state_of
from pruning.files.importing.reading import read_published

__all__ = ["FORMATS", "Imported", "import_checkpoint", "read_published"]


class PublishedFormat(Protocol):
    """The interface of a format's module."""

    NAME: str

    def matches(self, content: object) -> bool:
        """Whether a file's content looks like this format."""
        ...

    def read(self, content: object, source: Path, classifier: Path | None) -> Imported:
        """Build the networks; see `import_checkpoint`."""
        ...


_MODULES: tuple[PublishedFormat, ...] = (casm, isp_cifar, isp_imagenet, swa, di)
FORMATS = {module.NAME: module for module in _MODULES}


def import_checkpoint(
    path: str | Path,
    format: str | None = None,
    *,
    trust_pickle: bool = False,
    classifier: str | Path | None = None,
) -> Imported:
    """Read a published file.

    Args:
        path: The file.
        format: One of `FORMATS`; None guesses from the names in the file.
        trust_pickle: See `read_published`.
        classifier: A LucidPrune checkpoint with the classifier of a selector, for files that lack it.

    Returns:
        The imported contents; nothing is written yet.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: The file cannot be read, is of no known kind, or is incomplete; the message says which.
        SettingError: There is no such format, or the file has no use for `classifier`.
    """
    path = Path(path)
    content = read_published(path, trust_pickle=trust_pickle)
    if format is None:
        format = next((name for name, module in FORMATS.items() if module.matches(content)), None)
    if format is None:
        names = list(state_of(content, path).tensors)
        raise WeightsError(
            f"{path}: cannot tell which program wrote it (it has {', '.join(map(repr, names[:3]))}, …): give its "
            f"format, one of {', '.join(FORMATS)}"
        )
    check_choice("format", format, FORMATS)
    check_setting(
        classifier is None or FORMATS[format] in (isp_cifar, isp_imagenet),
        "classifier",
        classifier,
        f"has no effect: files of {format} hold their classifier, leave it out",
    )
    return FORMATS[format].read(content, path, None if classifier is None else Path(classifier))
