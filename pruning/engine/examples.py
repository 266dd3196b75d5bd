"""Inputs and outputs of a network: arguments of any form, and every tensor in the outputs."""

from __future__ import annotations

import dataclasses
import enum
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import SUPPORTED_NODES, tree_leaves, tree_map

from image_classification.config import SettingError
from image_classification.models.running import Args, Kwargs, Outputs
from pruning import task

#: One or several, see there.
Examples = task.Example

_MOST_IMAGES = 2
_PLAIN = (type(None), bool, int, float, complex, str, bytes, slice, range, type, enum.Enum, np.generic)
_CONTAINERS = (Mapping, tuple, list, deque, AbstractSet)
_PLAIN_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator)


class OutputError(ValueError):
    """An output that may hold tensors in a place that cannot be searched."""


@dataclasses.dataclass(frozen=True)
class Example:
    """Arguments of one call of a network."""

    args: Args = ()
    kwargs: Kwargs = dataclasses.field(default_factory=dict)

    def run(self, model: nn.Module) -> Outputs:
        """Call the network."""
        return model(*self.args, **self.kwargs)

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        """Return the same arguments with `change` applied to every tensor."""

        def changed(leaf: object) -> object:
            return change(leaf) if isinstance(leaf, Tensor) else leaf

        args, kwargs = tree_map(changed, (self.args, self.kwargs))
        return Example(args, kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """Return every tensor among the arguments."""
        leaves = tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def few(self) -> Example:
        """Return the first two images of the batch, which is the first dimension of the first tensor.

        Tensors of another length, and those inside lists, are left alone.
        """
        tensors = [leaf for leaf in (*self.args, *self.kwargs.values()) if isinstance(leaf, Tensor)]
        if not tensors or tensors[0].dim() < 2:
            return self
        batch = tensors[0].shape[0]

        def first(value: object) -> object:
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
                return value[:_MOST_IMAGES]
            return value

        kwargs = {name: first(value) for name, value in self.kwargs.items()}
        return Example(tuple(first(value) for value in self.args), kwargs)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One run of a network: an example in training or evaluation mode.

    Attributes:
        example: Its input.
        training: Whether it takes the training paths (see `undisturbed.set_trace_mode`).
        trace: Number of the recorded pass that this pass is, or repeats operator by operator.
        steps: (module, function) of every PyTorch function that the network's code called.
        called: Names of the called modules.
        written: Names of the parameters that it writes into.
        divisors: Names of the vectors that cannot be zero (see `traces.Trace.divisors`).
        unsteady: It draws random numbers or computes in half precision (see `steady.py`).
        own_gradients: The network has a say in its gradients (see `own_gradients.py`).
        decides: Values of the images decide over something (see `traces.Trace.decides`).
    """

    example: Example
    training: bool
    trace: int
    steps: frozenset[tuple[str, str]]
    called: frozenset[str]
    written: frozenset[str] = frozenset()
    divisors: frozenset[str] = frozenset()
    unsteady: bool = True
    own_gradients: bool = False
    decides: bool = True


def as_examples(given: Examples, setting: str = "example") -> list[Example]:
    """Convert the user's example to a list of `Example`.

    Args:
        given: A tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of these.
        setting: Name of the argument, for messages.

    Raises:
        SettingError: `given` is none of these, or empty.
    """
    found = []
    for one in given if isinstance(given, list) else [given]:
        if isinstance(one, Tensor):
            example = Example((one,))
        elif isinstance(one, tuple):
            example = Example(one)
        elif isinstance(one, Mapping):
            example = Example((), dict(one))
        else:
            problem = "give a tensor, a tuple of positional arguments, a dict of keyword arguments, or a list of such"
            raise SettingError(setting, type(one).__name__, problem)
        if any(tensor.numel() == 0 for tensor in example.tensors[:1]):
            raise SettingError(setting, 0, "there is no image: give one or two of the final size")
        found.append(example)
    if not found:
        raise SettingError(setting, given, "the list is empty: give at least one example")
    return found


#: What an output holds beside tensors.
PlainValue = bool | int | float | complex | str | bytes


def output_tensors(result: object) -> list[Tensor]:
    """Return every tensor in a network's output, within containers, dataclasses and other objects.

    Raises:
        OutputError: Some part is neither a tensor, nor a plain value, nor an object that can be searched.
    """
    return [leaf for _, leaf in _walk(result, "output", set()) if isinstance(leaf, Tensor)]


def output_values(result: object) -> list[tuple[str, PlainValue]]:
    """Return every number and text in a network's output, with its path: what it made of tensors by `tolist`, say."""
    return [(path, leaf) for path, leaf in _walk(result, "output", set()) if isinstance(leaf, PlainValue)]


def tensors_in(tree: object) -> list[Tensor]:
    """Return every tensor in a module's input or output, as `output_tensors`, but skip unsearchable parts."""
    return [leaf for _, leaf in _walk(tree, "", set(), strict=False) if isinstance(leaf, Tensor)]


def _walk(value: object, path: str, seen: set[int], strict: bool = True) -> Iterator[tuple[str, object]]:
    """Yield (path, leaf) for every tensor and plain value within a value, each object once."""
    if isinstance(value, Tensor):
        if strict and value.layout != torch.strided:
            raise OutputError(
                f"the network returns a sparse tensor ({path}), in which channels cannot be followed: return it dense"
            )
        yield path, value
        for name, part in ({} if _is_wrapper(value) else vars(value)).items():
            yield from _walk(part, f"{path}.{name}", seen, strict=False)
        return
    if isinstance(value, (*_PLAIN, *_PLAIN_OF_TORCH)):
        yield path, value.item() if isinstance(value, np.generic) else value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    parts = _parts(value)
    if parts is None:
        if strict:
            raise OutputError(
                f"the network returns a {type(value).__qualname__} ({path}), in which channels cannot be followed: "
                "return tensors, in containers, dataclasses or plain objects"
            )
        return
    for name, part in parts:
        yield from _walk(part, f"{path}{name}", seen, strict)
    if isinstance(value, _CONTAINERS):  # of a class of one's own may have attributes too
        for name, part in _attributes(value).items():
            yield from _walk(part, f"{path}.{name}", seen, strict=False)


def _is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor's class implements operators itself (a sharded or quantised tensor): what it wraps is no output
    of its own.
    """
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _parts(value: object) -> list[tuple[str, object]] | None:
    """Return the parts of a value, each with its path; None if they cannot be determined."""
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if type(value) in SUPPORTED_NODES:
        children, _ = SUPPORTED_NODES[type(value)].flatten_fn(value)
        return [(f"[{position}]", part) for position, part in enumerate(children)]
    if isinstance(value, _CONTAINERS):
        return [(f"[{position}]", part) for position, part in enumerate(value)]
    if callable(value) or isinstance(value, (Iterator, np.ndarray)):
        return None
    attributes = _attributes(value)
    looked_into = hasattr(value, "__dict__") or attributes
    return [(f".{name}", part) for name, part in attributes.items()] if looked_into else None


def _attributes(value: object) -> dict[str, object]:
    """Return the attributes that an object holds, in its `__dict__` and its slots."""
    attributes = dict(vars(value)) if hasattr(value, "__dict__") else {}
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__") and hasattr(value, slot):
                attributes[slot] = getattr(value, slot)
    return attributes
