"""Loading of weights: LucidPrune checkpoints, plain state dicts, torchvision's and DataParallel-prefixed ones.

`weights_reading` reads the files, `fitting_weights` puts their tensors into a network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from image_classification.checkpoint_format import is_ours
from image_classification.models.published_weights import weights_file
from image_classification.models.structure import Structure, StructureError
from image_classification.models.weights_reading import WeightsError, read_file
from image_classification.network_input import NetworkInput
from image_classification.plain_data import PlainValue
from image_classification.small_files import problem_of

_STATE_KEYS = ("state_dict", "model", "model_state_dict", "net")
_EMA_KEYS = ("ema", "ema_state_dict", "state_dict_ema", "model_ema")


@dataclasses.dataclass(frozen=True)
class LoadedWeights:
    """The content of a weights file.

    Attributes:
        state: Tensor by name, on the CPU, without wrapper prefixes.
        path: File that it was read from.
        arch: The architecture that the file names, if any.
        structure: Structure in LucidPrune checkpoints, with the widths of a pruned network.
        averaged: Whether these are the averaged weights.
        class_names: Names by class index, if the file has them.
    """

    state: dict[str, Tensor]
    path: Path
    arch: str | None = None
    structure: Structure | None = None
    averaged: bool = False
    class_names: tuple[str, ...] | None = None


def takes_average(content: object, ema: bool | None) -> bool:
    """Whether to load the averaged weights of a file.

    Args:
        content: Content of the file.
        ema: The request; None for the average if a LucidPrune checkpoint has one, since validation evaluated the
            average and selected the file by it.
    """
    if ema is not None:
        return ema
    return is_ours(content) and content.get("ema") is not None


def load_weights(path: str | Path, *, ema: bool | None = None) -> LoadedWeights:
    """Read a weights file of any of the usual kinds.

    Args:
        path: A LucidPrune checkpoint, a plain state dict, or a dict with one under `state_dict`, `model` or similar;
            prefixes of DataParallel, DDP (`module.`) and `torch.compile` (`_orig_mod.`) are removed.
        ema: Whether to load the averaged weights (exponential moving average) or the last ones; None: see
            `takes_average`.

    Raises:
        FileNotFoundError: The file does not exist.
        WeightsError: The file is damaged, foreign, holds code, or lacks the requested weights.
    """
    path = Path(path)
    content = read_safely(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict or a checkpoint")
    arch = content.get("arch")
    raw_structure = content.get("structure")
    structure = None
    if is_ours(content) and raw_structure is not None:
        structure = structure_in(content, path)
    averaged = takes_average(content, ema)
    state = _find_state(content, path, averaged)
    if structure is None or not state.keys() <= structure.shapes.keys():
        state = _clean_names(state)
    names = content.get("class_names") if is_ours(content) else None
    return LoadedWeights(
        state,
        path,
        arch if isinstance(arch, str) else None,
        structure,
        averaged,
        None if names is None else tuple(names),
    )


def structure_in(payload: Mapping[Any, Any], path: Path) -> Structure:
    """Return the structure of the network in a LucidPrune checkpoint.

    Raises:
        WeightsError: The file has no structure, or an inconsistent one.
    """
    try:
        return Structure.from_plain(payload.get("structure"))
    except StructureError as error:
        raise WeightsError(f"{path}: {error}") from error


def saved_input(path: str | Path) -> NetworkInput | None:
    """Return the images that a file's network was trained for; None if they are not recorded or the file is unreadable.

    Reads no tensors; errors in a file are reported when its weights are loaded.
    """
    try:
        file = weights_file(path)
        if problem_of(file) is not None:  # a pipe, for instance, that nothing would be written to
            return None
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return Structure.from_plain(content["structure"]).input if is_ours(content) else None
    except Exception:  # the unpickler meets arbitrary bytes here and may raise almost anything
        return None


def read_safely(path: str | Path) -> PlainValue:
    """Read a file written by `torch.save` (`weights_reading.read_file`), or weights published by a library.

    Args:
        path: A file, or a name such as `torchvision/resnet50:DEFAULT` (`published_weights`).

    Raises:
        FileNotFoundError: The file does not exist.
        WeightsError: As `read_file`, or the weights cannot be fetched.
    """
    return read_file(weights_file(path))


def _find_state(content: Mapping[object, object], path: Path, ema: bool) -> dict[str, Tensor]:
    """Find the state dict within a file's content."""
    state: PlainValue = None
    if ema:
        state = next((content[key] for key in _EMA_KEYS if isinstance(content.get(key), Mapping)), None)
        if state is None:
            raise WeightsError(f"{path} carries no averaged weights (EMA): leave `ema` out")
    if state is None:
        state = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise WeightsError(
                f"{path} holds no state dict: entry {str(name)[:80]!r} is not a plain tensor but "
                f"{type(value).__name__} (its entries: {', '.join(str(key)[:40] for key in list(state)[:8])}); "
                "files of the published programs are read by `python -m pruning import`"
            )
    if not state:
        raise WeightsError(f"{path} holds an empty state dict")
    return dict(state)


def _clean_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove wrapper prefixes from names: `_orig_mod.` anywhere, `module.` if all names begin with it."""
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while True:
        # Averaged models store their number of updates next to the network they wrap.
        names = [name for name in state if name != "n_averaged"]
        if not names or not all(name.startswith("module.") for name in names):
            return state
        state = {name.removeprefix("module."): state[name] for name in names}
