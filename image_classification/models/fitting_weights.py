"""Loads weights into a network: translates names, replaces or keeps heads, and names everything that does not fit."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from image_classification.models.factory import identity_of, unwrap
from image_classification.models.meta_device import on_meta
from image_classification.models.module_tree import tensors_by_all_names
from image_classification.models.registry import ModelError
from image_classification.models.weights import LoadedWeights
from image_classification.models.weights_reading import NEW_HEAD, WeightsError

M = TypeVar("M", bound=nn.Module)


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], path: Path, what: str = "network") -> None:
    """Call `load_state_dict` with strict checks; alone, it would silently turn integers or complex numbers into
    weights.

    Args:
        model: Network to load into.
        state: State dict with the same names, shapes and kinds of numbers.
        path: Origin of the tensors, for the message.
        what: Owner of the tensors, for the message.

    Raises:
        WeightsError: A tensor is missing, unexpected, or has another shape or kind.
    """
    for name, target in model.state_dict().items():
        value = state.get(name)
        if value is not None and isinstance(target, Tensor) and not _same_kind(value, target):
            raise WeightsError(f"{path}: its {what} holds {name!r} as {value.dtype}, not {target.dtype}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            f"{path}: its {what} contradicts itself: {' '.join(str(error).split())}"
        ) from error


def head_tensors(model: nn.Module) -> set[str]:
    """Return the names of the tensors of `model` that depend on the number of classes (classifier and auxiliary heads).

    Found by building the architecture for two numbers of classes and comparing shapes.

    Raises:
        ModelError: The network was not built by `create_model`.
    """
    identity = identity_of(model)
    if identity is None:
        raise ModelError(
            "`new_head` works for networks that create_model built; load yours with its own head instead"
        )
    other = dataclasses.replace(identity, num_classes=identity.num_classes + 1)
    pairs = zip(
        tensors_by_all_names(on_meta(identity.build)), tensors_by_all_names(on_meta(other.build)), strict=True
    )
    return {name for (name, tensor), (_, changed) in pairs if tensor.shape != changed.shape}


def apply_weights(
    model: nn.Module, weights: LoadedWeights | Mapping[str, Tensor], *, new_head: bool = False
) -> list[str]:
    """Copy weights into a network, in place. If any tensor does not fit, none is changed.

    Args:
        model: Network, bare or wrapped.
        weights: From `load_weights`, or a state dict.
        new_head: The classifier keeps its fresh weights; within it, names and shapes may differ.

    Returns:
        Names of the tensors that kept their fresh values.

    Raises:
        WeightsError: A tensor is missing, unexpected or has another shape; the message names the first such module.
    """
    model = unwrap(model)
    if isinstance(weights, Mapping):
        weights = LoadedWeights(dict(weights), Path("the given state dict"))
    targets = model.state_dict(keep_vars=True)
    per_class = head_tensors(model) if new_head else set()
    state = without_wrapper(weights.state, targets)
    if any(name not in targets for name in state):
        state = _translated(model, {name: value for name, value in state.items() if name not in per_class})
    given = dataclasses.replace(weights, state=state)
    head_parts = {name.partition(".")[0] for name in per_class}
    copies, fresh = [], []
    for name, target in targets.items():
        value = given.state.get(name)
        if name in per_class:
            fresh.append(name)
        elif value is not None and _fits(value, target):
            copies.append((target, value))
        elif name.partition(".")[0] in head_parts or _optional(name, value):
            fresh.append(name)
        else:
            raise WeightsError(_misfit(model, given, name, target, value), NEW_HEAD)
    for name in given.state:
        if name not in targets and name.partition(".")[0] not in head_parts:
            raise WeightsError(
                f"{given.path} has {name!r}, and the network has no such tensor in a module "
                f"{name.rpartition('.')[0]!r}{_arch_hint(model, given)}"
            )
    with torch.no_grad():
        for target, value in copies:
            target.copy_(value)
    return fresh


def _optional(name: str, value: Tensor | None) -> bool:
    """Whether a tensor may be missing: files from before PyTorch 0.4.1 lack the batch norms' counters."""
    return value is None and name.endswith("num_batches_tracked")


def _translated(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate names in older files to the network's current ones.

    Classes whose inner names have changed translate old names themselves while a state dict is loaded (the MLPs of
    torchvision's vision transformers); loading into a copy on the meta device reveals the result. DenseNet's old names
    (`norm.1`) are otherwise translated only by torchvision's download function.
    """
    state = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name): tensor
        for name, tensor in state.items()
    }
    no_memory: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        no_memory[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    probe = copy.deepcopy(model, no_memory)
    try:
        outcome = probe.load_state_dict(state, strict=False, assign=True)
        rest = outcome.unexpected_keys
    except (RuntimeError, ValueError):  # other shapes: the later comparison reports them
        rest = list(probe.state_dict())
    taken = {name: tensor for name, tensor in probe.state_dict().items() if not tensor.is_meta}
    return {**{name: state[name] for name in rest if name in state}, **taken}


def _fits(value: Tensor, target: Tensor) -> bool:
    return value.shape == target.shape and _same_kind(value, target)


def _same_kind(value: Tensor, target: Tensor) -> bool:
    """Whether two tensors have the same kind of numbers: real numbers of any precision are one kind."""
    return value.dtype == target.dtype or (value.is_floating_point() and target.is_floating_point())


def without_wrapper(state: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove a common first name component that the network lacks (`model.` of a wrapping class)."""
    first_parts = {name.partition(".")[0] for name in state}
    if len(first_parts) != 1 or first_parts & {name.partition(".")[0] for name in targets}:
        return dict(state)
    return {name.partition(".")[2]: tensor for name, tensor in state.items()}


def _misfit(model: nn.Module, given: LoadedWeights, name: str, target: Tensor, value: Tensor | None) -> str:
    """Explain why the weights do not fit, starting with the module, and what to do."""
    module = f"{given.path} does not fit the network at module {name.rpartition('.')[0]!r}"
    if value is None:
        return f"{module}: it has no {name!r}{_arch_hint(model, given)}"
    if not _same_kind(value, target):
        return f"{module}: {name!r} is {value.dtype} there and {target.dtype} in the network"
    shapes = f"{module}: {name!r} has shape {list(value.shape)} there and {list(target.shape)} in the network"
    per_class = identity_of(model) is not None and name in head_tensors(model)
    if per_class and not _other_arch(model, given) and value.dim() == target.dim():
        return (
            f"{shapes}: other classes. Give `num_classes` {value.shape[0]} to keep its classifier"
            f"{NEW_HEAD['new_head']}"
        )
    return f"{shapes}: a network of other widths{_arch_hint(model, given)}"


def _other_arch(model: nn.Module, given: LoadedWeights) -> bool:
    """Whether the file names another architecture; library prefixes do not count."""
    identity = identity_of(model)
    if given.arch is None or identity is None:
        return False
    return given.arch.rpartition("/")[2] != identity.arch.rpartition("/")[2]


def _arch_hint(model: nn.Module, given: LoadedWeights) -> str:
    if _other_arch(model, given):
        return f". The file says that it holds {given.arch}: give `arch` {given.arch}"
    if given.structure is not None:
        return ". The file describes a pruned network: build it by model_for_weights"
    return ". Give the `arch` that the weights were trained with"


def build_exactly(build: Callable[[], M], state: Mapping[str, Tensor], path: Path, what: str) -> M:
    """Build a module whose sizes a file gives, and load its tensors; see `load_exactly`.

    The shapes are compared before the module allocates any memory, since a file may give any sizes.

    Args:
        build: Builds the module.
        state, path, what: As for `load_exactly`.

    Raises:
        WeightsError: It cannot be built, or the tensors are not of its shapes.
    """
    given = {name: list(tensor.shape) for name, tensor in state.items()}
    try:
        with torch.device("meta"):
            shapes = {name: list(tensor.shape) for name, tensor in build().state_dict().items()}
        odd = next((name for name in {**shapes, **given} if shapes.get(name) != given.get(name)), None)
        if odd is not None:
            raise ValueError(f"its sizes give {odd!r} shape {shapes.get(odd)}, its tensors {given.get(odd)}")
        module = build()
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{path}: its {what} contradicts itself: {reason}") from error
    load_exactly(module, state, path, what)
    return module
