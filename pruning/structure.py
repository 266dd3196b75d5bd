"""Pruned networks as files: architecture by name, widths as plain data, tensors. No pickled modules.

The structure itself (what differs from the architecture as its name builds it) belongs to
`image_classification.models.structure`, so that a pruned network loads without this package. Attributes that
differ are whole numbers: `out_channels`, `groups`, `normalized_shape`, and the hidden widths that the engine
proved.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from image_classification.checkpoint import FORMAT, VERSION, save_atomically
from image_classification.models import read_safely
from image_classification.models.factory import unwrap
from image_classification.models.structure import Structure, build_from_structure, capture_structure


def pruned_state(
    model: nn.Module, *, factory: Callable[[], nn.Module] | None = None, **extra: Any
) -> dict[str, Any]:
    """What `save_pruned` writes: plain data and tensors only.

    Args:
        model: The network, bare or wrapped.
        factory: Builds the unpruned network, for a class of the user's own.
        extra: Further entries of plain data or tensors.
    """
    structure = capture_structure(model, factory=factory)
    saved = unwrap(model).state_dict()
    tensors = OrderedDict((name, tensor.detach().cpu()) for name, tensor in saved.items())
    tensors._metadata = getattr(saved, "_metadata", None)  # type: ignore[attr-defined]  # versions of modules
    return {
        **extra,
        "format": FORMAT,
        "version": VERSION,
        "arch": structure.arch,
        "structure": structure.to_plain(),
        "state_dict": tensors,
    }


def save_pruned(
    path: str | Path, model: nn.Module, *, factory: Callable[[], nn.Module] | None = None, **extra: Any
) -> None:
    """Write a pruned network to a file, at once or not at all.

    Args:
        path: The file.
        model, factory, extra: As `pruned_state`.

    Raises:
        StructureError: The network cannot be rebuilt from its architecture's name.
    """
    save_atomically(pruned_state(model, factory=factory, **extra), Path(path))


def load_pruned(
    path: str | Path,
    factory: Callable[[], nn.Module] | None = None,
    *,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Rebuild a pruned network from a file.

    Args:
        path: Written by `save_pruned`, or any checkpoint of ours.
        factory: Builds the unpruned network, for a class of the user's own.
        device: Where the network goes; the CPU by default.

    Returns:
        The network with its weights, in training mode as any new network.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no pruned network, or one that does not fit the architecture.
    """
    path = Path(path)
    state = read_safely(path)
    if not isinstance(state, Mapping) or state.get("format") != FORMAT or "structure" not in state:
        raise ValueError(f"{path}: holds no network of ours (no entry 'structure')")
    structure = Structure.from_plain(state["structure"])
    model = build_from_structure(structure, factory=factory, device=device)
    model.load_state_dict(state["state_dict"])
    return model
