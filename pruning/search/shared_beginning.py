"""Forward passes that share their beginning, for candidates that differ only from some layer on.

The operators before the first one that reads something a candidate has changed compute the same for all candidates, so
they run once. A pass records its operators up to that point, and the tensors still in use there. The next pass runs the
network's Python code again, but takes the recorded results for these operators instead of running them: copies of the
tensors that were still in use, and uninitialised memory for all others, which nothing reads. If a pass turns out to
compute something else than the recorded beginning, it is run again from the start.

Code that reads or writes memory past PyTorch's operators (extensions without registered operators) is not seen here:
whoever shares beginnings compares one pass with a whole one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.weak import TensorWeakRef

from image_classification.models.running import Args, Kwargs, Outputs
from pruning.engine.operator_mode import OperatorMode

_LIBRARIES = ("aten", "prims", "torchvision")  # whose operators do what their signatures say
_READING = {
    *(torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__),
    torch.Tensor.data_ptr,
}
"""What reads values without an operator."""


class _DepartedError(Exception):
    """A pass computes something else than the recorded beginning."""


@dataclasses.dataclass(frozen=True)
class _Layout:
    """A strided tensor without its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        return cls(
            tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()), tensor.dtype, tensor.device
        )

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """Return the tensor on a storage."""
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)

    def placeholder(self) -> Tensor:
        """Return a tensor of this form without values."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


@dataclasses.dataclass(frozen=True)
class _Result:
    """A tensor that a step returned: number of the step, and which of its results."""

    step: int
    place: int


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A tensor that no step returned, by the address of its storage; `version` counts what is written into it."""

    address: int
    version: int
    layout: _Layout


@dataclasses.dataclass(frozen=True)
class _Same:
    """A result that is one of the arguments, modified in place."""

    argument: int


@dataclasses.dataclass(frozen=True)
class _Step:
    """An operator of the beginning: what it was called with, and what it returned, tensors described."""

    func: OpOverload
    arguments: tuple[object, ...]
    form: TreeSpec
    results: tuple[object, ...]
    result_form: TreeSpec


class Remembered:
    """Size of what several beginnings remember together, in bytes, of at most `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes = 0


class SharedBeginning:
    """The beginning that passes over one batch have in common.

    Args:
        remembered: Bounds the memory, with other beginnings; without room, passes run whole.
    """

    def __init__(self, remembered: Remembered) -> None:
        self._remembered = remembered
        self._own_bytes = 0
        self.steps: list[_Step] = []
        self.kept: dict[_Result, tuple[_Layout, int]] = {}
        self.storages: list[torch.UntypedStorage] = []

    def run(self, forward: Callable[[], Outputs], common: Collection[int]) -> Outputs:
        """Run a pass, or only what follows the recorded beginning; record where its own beginning goes on.

        Args:
            forward: Runs the network on the batch, without gradients.
            common: Addresses of the storages that hold the same for all candidates: parameters, buffers, the batch.
                The first operator that reads any other tensor ends the beginning.

        Raises:
            Exception: Any exception raised by the network.
        """
        replayed = len(self.steps) > 0
        passing = _Passing(self, common)
        try:
            with _Reading(passing), passing:
                outputs = forward()
        except Exception:
            if not replayed:
                raise
        else:
            if not passing.departed:
                return outputs
        self.forget()
        return self.run(forward, common)

    def remember(self, steps: list[_Step], alive: Mapping[_Result, Tensor]) -> None:
        """Keep a beginning, with copies of the tensors in use at its end."""
        self.forget()
        sources: dict[int, torch.UntypedStorage] = {}
        for tensor in alive.values():
            storage = tensor.untyped_storage()
            sources.setdefault(storage.data_ptr(), storage)
        size = sum(storage.nbytes() for storage in sources.values())
        if self._remembered.bytes + size > self._remembered.most:
            return
        self._own_bytes = size
        self._remembered.bytes += size
        self.steps = steps
        self.storages = [storage.clone() for storage in sources.values()]
        number = {address: place for place, address in enumerate(sources)}
        self.kept = {
            result: (_Layout.of(tensor), number[tensor.untyped_storage().data_ptr()])
            for result, tensor in alive.items()
        }

    def forget(self) -> None:
        """Drop the recorded beginning."""
        self._remembered.bytes -= self._own_bytes
        self._own_bytes = 0
        self.steps, self.kept, self.storages = [], {}, []


class _Passing(OperatorMode):
    """One pass: replays the recorded beginning, records how it goes on, and then stays out of the way."""

    def __init__(self, beginning: SharedBeginning, common: Collection[int]) -> None:
        super().__init__()
        self.departed = False
        self._beginning = beginning
        self._common = common
        self._recorded = beginning.steps
        self._steps: list[_Step] = []
        self._results: dict[int, tuple[TensorWeakRef, _Result]] = {}  # by id of the tensor
        self._copies: dict[int, torch.UntypedStorage] = {}
        self._over = False

    def operator(self, func: OpOverload, args: Args, kwargs: Kwargs) -> Outputs:
        """See `OperatorMode`."""
        if self._over:
            return func(*args, **kwargs)
        flat, form = tree_flatten((args, kwargs))
        described = self._described(func, flat)
        if self._replaying:
            step = self._recorded[len(self._steps)]
            if described is None or (func, described, form) != (step.func, step.arguments, step.form):
                self._depart()
            self._steps.append(step)
            return self._replayed(step, len(self._steps) - 1, flat)
        self._copies.clear()
        if described is None:
            self._end()
            return func(*args, **kwargs)
        outputs = func(*args, **kwargs)
        self._record(func, described, form, flat, outputs)
        return outputs

    @property
    def _replaying(self) -> bool:
        return len(self._steps) < len(self._recorded)

    def _depart(self) -> NoReturn:
        self.departed = True  # in case the network's code catches the exception
        raise _DepartedError

    def read(self) -> None:
        """Called when values are read without an operator: the beginning ends before that."""
        if not self._over:
            if self._replaying:
                self._depart()
            self._end()

    def _described(self, func: OpOverload, flat: Sequence[Any]) -> tuple[object, ...] | None:
        """Describe the arguments of an operator; None if it may not belong to the beginning."""
        random = torch.Tag.nondeterministic_seeded in func.tags
        if func.namespace not in _LIBRARIES or random or _writes_statistics(func, flat):
            return None
        described: list[object] = []
        for value in flat:
            one = self._tensor(value) if isinstance(value, Tensor) else value
            if one is None and value is not None:
                return None
            described.append(one)
        if func._schema.is_mutable and any(isinstance(one, _Leaf) for one in described):
            return None
        return tuple(described)

    def _tensor(self, tensor: Tensor) -> object:
        """Describe a tensor; None if its content is not known."""
        if not _plain(tensor):
            return None
        known = self._results.get(id(tensor))
        if known is not None and known[0]() is tensor:
            result = known[1]
            if not self._replaying and self._is_placeholder(result):
                self._depart()
            return result
        address = tensor.untyped_storage().data_ptr()
        if address not in self._common or tensor.is_inference():
            return None
        return _Leaf(address, tensor._version, _Layout.of(tensor))

    def _replayed(self, step: _Step, number: int, flat: Sequence[Any]) -> Outputs:
        values: list[Any] = []
        for place, one in enumerate(step.results):
            if isinstance(one, _Same):
                values.append(flat[one.argument])
            elif isinstance(one, _Layout):
                result = _Result(number, place)
                values.append(self._known(result, self._restored(result, one)))
            else:
                values.append(one)
        return tree_unflatten(values, step.result_form)

    def _is_placeholder(self, result: _Result) -> bool:
        return result.step < len(self._recorded) and result not in self._beginning.kept

    def _restored(self, result: _Result, layout: _Layout) -> Tensor:
        """Return a copy of a tensor still in use at the end of the beginning, or a placeholder of any other."""
        if result not in self._beginning.kept:
            return layout.placeholder()
        at_the_end, number = self._beginning.kept[result]
        if number not in self._copies:  # the rest of the network may write into it
            self._copies[number] = self._beginning.storages[number].clone()
        return at_the_end.on(self._copies[number])

    def _record(
        self,
        func: OpOverload,
        arguments: tuple[object, ...],
        form: TreeSpec,
        flat: Sequence[Any],
        outputs: Outputs,
    ) -> None:
        values, result_form = tree_flatten(outputs)
        if not all(_plain(value) for value in values if isinstance(value, Tensor)):
            self._end()
            return
        places = {id(value): place for place, value in enumerate(flat) if isinstance(value, Tensor)}
        results: list[object] = []
        for place, value in enumerate(values):
            if not isinstance(value, Tensor):
                results.append(value)
            elif id(value) in places:
                results.append(_Same(places[id(value)]))
            else:
                results.append(_Layout.of(value))
                self._known(_Result(len(self._steps), place), value)
        self._steps.append(_Step(func, arguments, form, tuple(results), result_form))

    def _known(self, result: _Result, tensor: Tensor) -> Tensor:
        self._results[id(tensor)] = (TensorWeakRef(tensor), result)
        return tensor

    def _end(self) -> None:
        """Keep what is still in use: the next operator is the first that may compute something else."""
        self._over = True
        if self._recorded and len(self._steps) == len(self._recorded):
            return
        alive = {}
        for reference, result in self._results.values():
            tensor = reference()
            if tensor is not None and not self._is_placeholder(result):
                alive[result] = tensor
        self._results.clear()
        self._beginning.remember(self._steps, alive)


class _Reading(TorchFunctionMode):
    """Tells a pass when values are read without an operator."""

    def __init__(self, passing: _Passing) -> None:
        super().__init__()
        self._passing = passing

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        """See the class."""
        if func in _READING:
            self._passing.read()
        return func(*args, **(kwargs or {}))


def _plain(tensor: Tensor) -> bool:
    ordinary = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return ordinary and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)


def _writes_statistics(func: OpOverload, flat: Sequence[Any]) -> bool:
    """Whether an operator may update a batch norm's running statistics, which not every signature says."""
    return "batch_norm" in func.name() and any(value is True for value in flat) and None not in flat[3:5]
