"""Interface for scoring your own architecture: two functions that take and return NumPy arrays.

`python -m explainers score-casm … --interface FILE.py` scores the masks that FILE.py computes from each file in
`--casms-path`. It defines

    def load_model(path: str) -> object
        # any object; it is passed to the other function unchanged

    def get_masks_and_check_predictions(images, targets, model) -> tuple[masks, rectangles, correct]
        # images:     (B, 3, S, S) float32, normalised unless --not-normalize is given, then in 0 … 1
        # targets:    (B,) int64
        # masks:      (B, S, S) in [0, 1], the continuous masks of the whole images
        # rectangles: (B, S, S) of 0 and 1: one block of ones each, the predicted location of the object
        # correct:    (B,) of 0 and 1: whether the model's classifier is right about the image

`CasmInterface` implements it for LucidPrune's CASMs and is the default.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from explainers.casm.model import Casm, load_casm
from explainers.measures.localization import Rectangle, object_rectangle
from image_classification.config import ConfigError, SettingError, check, check_setting

_FUNCTIONS = ("load_model", "get_masks_and_check_predictions")


class Interface(Protocol):
    """The two functions; any module that defines them qualifies."""

    def load_model(self, path: str) -> object:
        """Read a model."""

    def get_masks_and_check_predictions(
        self, images: NDArray[np.float32], targets: NDArray[np.int64], model: Any
    ) -> tuple[NDArray[np.floating], NDArray[np.generic], NDArray[np.generic]]:
        """Return masks, rectangles, and whether predictions are right."""
        ...


class CasmInterface:
    """The interface for LucidPrune's own CASMs.

    Args:
        device: Device to compute on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def load_model(self, path: str) -> Casm:
        """See `model.load_casm`."""
        return load_casm(path, device=self.device)

    @torch.inference_mode()
    def get_masks_and_check_predictions(
        self, images: NDArray[np.float32], targets: NDArray[np.int64], model: Casm
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.uint8]]:
        """See the module docstring."""
        logits, masks = model(torch.from_numpy(images).to(self.device))
        continuous = masks[:, 0].cpu().numpy()
        rectangles = np.zeros(continuous.shape, np.uint8)
        for image, mask in zip(rectangles, continuous, strict=True):
            object_rectangle(mask).of(image)[...] = 1
        return continuous, rectangles, (logits.argmax(1).cpu().numpy() == targets).astype(np.uint8)


def load_interface(path: Path) -> Interface:
    """Load the two functions that a Python file defines. The file is executed.

    Raises:
        ConfigError: The file does not exist, cannot be executed, or lacks a function.
    """
    check_setting(path.is_file(), "interface", str(path), "there is no such file")
    spec = importlib.util.spec_from_file_location("scored_architecture", path)
    if spec is None or spec.loader is None:
        raise SettingError("interface", str(path), "the name of a Python file must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look up their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        del sys.modules[spec.name]
        problem = f"it cannot be run: {type(error).__name__}: {error}"
        raise SettingError("interface", str(path), problem) from error
    missing = [name for name in _FUNCTIONS if not callable(getattr(module, name, None))]
    check_setting(not missing, "interface", str(path), f"it does not define {' and '.join(missing)}")
    return cast("Interface", module)


def checked_answer(
    answer: object, count: int, size: tuple[int, int], who: str
) -> tuple[NDArray[np.float64], list[Rectangle], NDArray[np.bool_]]:
    """Validate and convert the result of `get_masks_and_check_predictions`.

    Args:
        answer: Its result.
        count: Number of images.
        size: Height and width of the images.
        who: Name of the model, for messages.

    Returns:
        Masks (B, S, S), a rectangle per image (`EMPTY` if no pixel is 1), correct (B,).

    Raises:
        ConfigError: Wrong number of results, wrong shapes, NaN, values outside [0, 1].
    """
    if not isinstance(answer, (tuple, list)) or len(answer) != 3:
        raise ConfigError(f"{who}: get_masks_and_check_predictions must give masks, rectangles and correct")
    masks, blocks, correct = (np.asarray(part) for part in answer)
    for name, array, shape in (
        ("masks", masks, (count, *size)),
        ("rectangles", blocks, (count, *size)),
        ("correct", correct, (count,)),
    ):
        check(array.shape == shape, f"{who}: {name} have shape {array.shape}, not {shape}")
    masks = masks.astype(np.float64)
    sound = np.isfinite(masks).all() and masks.min(initial=0) >= 0 and masks.max(initial=0) <= 1
    check(bool(sound), f"{who}: masks must lie in [0, 1], without NaN")
    return masks, [_block(block) for block in blocks], correct.astype(bool)


def _block(block: NDArray[np.generic]) -> Rectangle:
    """Return the bounding box of the ones."""
    rows, columns = np.nonzero(block)
    if not len(rows):
        return Rectangle(0, 0, 0, 0)
    return Rectangle(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
