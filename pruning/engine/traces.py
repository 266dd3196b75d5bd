"""A recorded pass: operators, values, and calls of modules.

Tensors are numbered values; an operator that works in place makes a new version of its tensor, so that each value is
written once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from image_classification.models.running import Args, Kwargs

_NEEDS_NO_ZERO = frozenset({"div", "log", "log2", "log10", "reciprocal", "rsqrt"})
#: Operators whose result jumps where their argument barely changes, beside those that give whole numbers or booleans.
JUMPS = frozenset(
    {"round", "floor", "ceil", "trunc", "fix", "frac", "sign", "sgn", "heaviside", "remainder", "fmod"}
)


@dataclasses.dataclass(frozen=True)
class Ref:
    """A tensor argument: the number of its value."""

    value: int


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Properties of a value beside its labels.

    Attributes:
        shape: Shape of the tensor.
        repeated: Dimensions of stride 0, along which it was expanded.
        name: Qualified name if it is a parameter, buffer or plain tensor of real or complex numbers or booleans.
        derived: It depends on the input images.
        dtype: Data type of the tensor.
    """

    shape: tuple[int, ...]
    repeated: frozenset[int]
    name: str | None = None
    derived: bool = False
    dtype: torch.dtype = torch.float32


@dataclasses.dataclass(frozen=True)
class ViewStep:
    """One operator of the chain that made a view of a tensor."""

    func: OpOverload
    args: Args
    kwargs: Kwargs


@dataclasses.dataclass(frozen=True)
class Operation:
    """One executed operator.

    Attributes:
        index: Position among all operators of the pass.
        func: The ATen overload.
        args, kwargs: Its arguments with tensors replaced by `Ref`.
        outputs: Values it made; None for outputs that are not tensors.
        module: Qualified name of the innermost module that was running.
        stack: Names of all modules that were running, outermost first.
        writes_to: For a write through a view: (value of the whole tensor before, the chain of views, value
            of the whole tensor after).
        replayed: A view that is recorded again, since its base was written to; the network did not run it.
        line: Line of the network's code that called it (see `code_lines.py`).
        written: Whole numbers that stand in that call.
    """

    index: int
    func: OpOverload
    args: Args
    kwargs: Kwargs
    outputs: tuple[int | None, ...]
    module: str
    stack: tuple[str, ...]
    writes_to: tuple[int, tuple[ViewStep, ...], int] | None = None
    replayed: bool = False
    line: str = ""
    written: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class TracedCall:
    """One call of a module: its tensor inputs and outputs, and which call of that module it was."""

    module: str
    call: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    is_leaf: bool


@dataclasses.dataclass
class Trace:
    """One forward pass: operators, values, module calls, and the values given and returned.

    `scaled` holds queries of attentions that scale by their width unasked, and the module where that happens; `steps`
    the PyTorch functions that the network's code called, as (module, function); `results` the tensors it returned;
    `written` the names of the parameters that it wrote into; `unsteady` says that it drew random numbers or computed in
    half precision, `own_gradients` that hooks or functions of the network's own take part in a backward pass.
    """

    operations: list[Operation]
    tensors: list[TensorInfo]
    calls: list[TracedCall]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    training: bool
    scaled: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    steps: frozenset[tuple[str, str]] = frozenset()
    results: list[Tensor] = dataclasses.field(default_factory=list, repr=False)
    written: frozenset[str] = frozenset()
    unsteady: bool = False
    own_gradients: bool = False
    _makers: dict[int, Operation] = dataclasses.field(default_factory=dict, repr=False)

    def maker(self, value: int) -> Operation | None:
        """Return the operator that produced a value; None for inputs and parameters."""
        if not self._makers:
            for operation in self.operations:
                self._makers.update((out, operation) for out in operation.outputs if out is not None)
        return self._makers.get(value)

    @property
    def divisors(self) -> frozenset[str]:
        """Return the names of the vectors that are divided by or whose logarithm is taken: they cannot be zero."""
        found: set[str] = set()
        for operation in self.operations:
            name = str(operation.func.overloadpacket).removeprefix("aten.").rstrip("_")
            if name in _NEEDS_NO_ZERO:
                found.update(self._vectors_behind(operation.args[-1]))
        return frozenset(found)

    def _vectors_behind(self, argument: object) -> Iterator[str]:
        """Yield the names of vectors that a value is, or was computed from element-wise without the images."""
        if not isinstance(argument, Ref) or self.tensors[argument.value].derived:
            return
        info = self.tensors[argument.value]
        maker = self.maker(argument.value)
        if info.name is not None and math.prod(info.shape) == max(info.shape, default=0):
            yield info.name
        elif maker is not None:
            for part in maker.args:
                same_size = isinstance(part, Ref) and math.prod(self.tensors[part.value].shape) == math.prod(
                    info.shape
                )
                if same_size:
                    yield from self._vectors_behind(part)

    @property
    def decides(self) -> bool:
        """Whether values of the images decide over something (an order, a mask, a path): rounding can tip that."""
        read = set(self.outputs)
        for operation in self.operations:
            read.update(ref.value for ref in _refs(operation))
        return any(self._decides(operation, read) for operation in self.operations)

    def _decides(self, operation: Operation, read: Collection[int]) -> bool:
        given = [self.tensors[ref.value] for ref in _refs(operation)]
        if not any(
            info.derived and (info.dtype.is_floating_point or info.dtype.is_complex) for info in given
        ):
            return False
        name = str(operation.func.overloadpacket).removeprefix("aten.").rstrip("_")
        made = [self.tensors[out] for out in operation.outputs if out is not None and out in read]
        whole = any(not (info.dtype.is_floating_point or info.dtype.is_complex) for info in made)
        return whole or name in JUMPS or operation.outputs == (None,)

    @property
    def used_names(self) -> set[str]:
        """Return the names of all parameters and buffers that took part."""
        return {info.name for info in self.tensors if info.name is not None}


def _refs(operation: Operation) -> list[Ref]:
    """Every tensor among an operator's arguments."""
    leaves = tree_leaves((operation.args, operation.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Ref)]
