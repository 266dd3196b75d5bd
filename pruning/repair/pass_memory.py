"""Memory held by a forward pass, counted while it runs, on any device."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from image_classification.models.running import Args, Kwargs, Outputs


@dataclasses.dataclass
class _Made:
    """A piece of memory allocated by an operator.

    Attributes:
        num_bytes: Its size.
        born, last: Index of the operator that allocated it, and of the last one that read it.
    """

    num_bytes: int
    born: int
    last: int


class PassMemory(TorchDispatchMode):
    """Counts the memory of operators' outputs.

    Memory held elsewhere (weights, inputs) does not count, nor do views. A piece lives from the operator that allocates
    it to the last one that reads it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[_Made] = []
        self._present: dict[int, _Made] = {}
        self._clock = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Outputs:
        self._clock += 1
        read = {_memory(leaf) for leaf in _dense((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for key in read & self._present.keys():
            self._present[key].last = self._clock
        for leaf in _dense(result):
            if _memory(leaf) not in read:
                piece = _Made(leaf.untyped_storage().nbytes(), self._clock, self._clock)
                self._made.append(piece)
                self._present[_memory(leaf)] = piece
        return result

    @property
    def total(self) -> int:
        """Total bytes allocated by operators: about what a pass with gradients keeps."""
        return sum(piece.num_bytes for piece in self._made)

    @property
    def peak(self) -> int:
        """Largest number of bytes alive at once: what a pass without gradients needs."""
        changes = [0] * (self._clock + 2)
        for piece in self._made:
            changes[piece.born] += piece.num_bytes
            changes[piece.last + 1] -= piece.num_bytes
        most = now = 0
        for change in changes:
            now += change
            most = max(most, now)
        return most


def _dense(values: Outputs) -> list[Tensor]:
    leaves = tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.layout is torch.strided]


def _memory(tensor: Tensor) -> int:
    """Identify the memory of a tensor, shared with its views. Freed memory may be reused by another tensor."""
    return tensor.untyped_storage().data_ptr()
