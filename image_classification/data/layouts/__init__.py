"""Layouts of data sets on disk, and `open_dataset`, which recognises them.

| `data` | layout |
|---|---|
| `train/` and `val/` (or `validation/`, `valid/`, `test/`) in a directory | class folders: ImageNet, CIFAR images |
| `data_batch_1`… or `train`, `test`, `meta`, or their `.bin`, in a directory | CIFAR-10/100 as published |
| `VOCdevkit/`, `VOC2012/` | Pascal VOC: multi-label, boxes, masks |
| `.tar`, `.tar.gz`, `.tar.xz`, `.tar.bz2`, `.zip` | any of these, unpacked once into the cache |
| `shapes`, `shapes-multi` | generated images with exact masks and boxes |

Each file here registers its layout with `register_layout`. Custom layouts are registered the same way, from a module
that the program imports (`--plugin MODULE`); see docs/howto/own-layout.md.
"""

from __future__ import annotations

from pathlib import Path

from image_classification.cache import default_cache_dir
from image_classification.config import SettingError
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.layouts import archives, folders
from image_classification.data.layouts.layout import Layout, OpenOptions, layouts, register_layout
from image_classification.data.shapes.generated import is_shapes, open_shapes

__all__ = ["Dataset", "Layout", "OpenOptions", "Preset", "layouts", "open_dataset", "register_layout"]


def open_dataset(
    data: str,
    *,
    multi_label: bool = False,
    cache_dir: Path | None = None,
    progress: bool = True,
    require_val: bool = True,
    rescan: bool = False,
    difficult: bool = False,
) -> Dataset:
    """Open a data set by its directory, archive or name.

    Args:
        data: See the table above; `shapes` may carry its size, `shapes:train=600,val=100,seed=1`.
        multi_label: Convert class indices to multi-hot rows; for `shapes` the same as `shapes-multi`. Inherently
            multi-label sets (VOC, `shapes-multi`) are always multi-label.
        cache_dir: Directory for unpacked archives, generated images and header scans; `default_cache_dir()` if None.
        progress: Show progress bars for long operations.
        require_val: Whether a missing validation split is an error; without it (jobs that only read train) the
            split is then empty.
        rescan: Check every file for changes. Otherwise directories' modification times decide where to look, which
            misses a file overwritten in place.
        difficult: Whether objects that VOC marks as difficult count like others.

    Raises:
        SettingError: `difficult` is given for a set without such marks.
        FileNotFoundError: The file or directory does not exist, or a listed file is missing.
        ValueError: The layout is unknown or incomplete; the message says what was found and what is expected.
    """
    cache = default_cache_dir() if cache_dir is None else cache_dir
    if difficult and is_shapes(data):
        raise _no_difficult(data)
    if is_shapes(data):
        return open_shapes(data, multi_label=multi_label, cache_dir=cache, progress=progress)
    try:
        root = Path(data).expanduser()
    except RuntimeError as error:  # ~nosuchuser
        raise FileNotFoundError(f"the data set {data!r} does not exist: {error}") from error
    if not root.exists():
        raise FileNotFoundError(f"the data set {data!r} does not exist; {_known()}")
    name = root.name.split(".")[0] if root.is_file() else root.resolve().name
    options = OpenOptions(
        name=name,
        cache_dir=cache,
        progress=progress,
        require_val=require_val,
        rescan=rescan,
        difficult=difficult,
    )
    dataset = _open_path(root, options)
    return dataset.as_multi_label() if multi_label else dataset


def _open_path(root: Path, options: OpenOptions) -> Dataset:
    """Open a file or directory by the first layout that recognises it; archives are unpacked."""
    layout = _layout_of(root)
    if layout is not None:
        return _opened(layout, root, options)
    if root.is_file():
        return _open_path(archives.unpack(root, options.cache_dir, progress=options.progress), options)
    # Archives often contain a single top-level directory.
    inner = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if len(inner) == 1:
        layout = _layout_of(inner[0])
        if layout is not None:
            return _opened(layout, inner[0], options)
    found = folders.hint(root) or f"{root} holds no data set that is known here"
    raise ValueError(f"{found}; {_known()}")


def _opened(layout: Layout, root: Path, options: OpenOptions) -> Dataset:
    if options.difficult and layout.name != "voc":
        raise _no_difficult(str(root))
    return layout.open(root, options)


def _no_difficult(data: str) -> SettingError:
    return SettingError(
        "difficult", True, f"{data} marks no objects as difficult, only VOC does: leave it out"
    )


def _layout_of(path: Path) -> Layout | None:
    return next((layout for layout in layouts() if layout.recognise(path)), None)


def _known() -> str:
    """List the known layouts, for messages."""
    described = ", ".join(layout.description for layout in reversed(layouts()))
    return (
        f"known layouts: {described}, a .tar or .zip archive of one of these, or the generated `shapes` and "
        "`shapes-multi`"
    )
