"""Survey of a network's contractions: their parameters, in order of execution, and what can absorb a constant.

One pass over a few images finds both. A constant that is added to a layer's outputs can go into its bias, or into the
running mean of a batch norm that is the only reader of those outputs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from image_classification.models.running import Args, Kwargs, Outputs
from pruning.engine.examples import tensors_in
from pruning.repair.contractions import Contraction, ContractionMode

aten = torch.ops.aten

#: Batch norms that use running statistics; the running mean is their fourth argument.
_NORMS = {
    getattr(aten, name).default
    for name in (
        "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
        "miopen_batch_norm", "batch_norm",
    )
    if hasattr(aten, name)
}  # fmt: skip
_ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}


@dataclasses.dataclass(frozen=True)
class Constant:
    """The tensor that absorbs a constant added to a layer's outputs.

    Attributes:
        tensor: A bias, or the running mean of the batch norm that is the layer's only reader.
        sign: Factor of the constant: −1 for a running mean.
    """

    tensor: str
    sign: float


@dataclasses.dataclass(frozen=True)
class Reader:
    """A parameter that a network multiplies by.

    Attributes:
        calls: Number of uses in a forward pass.
        num_inputs: K, the number of inputs of one output.
        rows_per_image: Number of rows per image in one call.
        constant: The tensor that absorbs a constant; None if nothing can.
    """

    calls: int
    num_inputs: int
    rows_per_image: float
    constant: Constant | None


def survey(model: nn.Module, forward: Callable[[], Outputs], num_images: int) -> dict[str, Reader]:
    """Find all contractions with a parameter, in order of their first call.

    Args:
        model: The network, in the mode to run it in.
        forward: Runs it on a batch.
        num_images: Number of images in that batch.
    """
    mode = _Survey(model, num_images)
    with torch.no_grad(), mode:
        result = forward()
    return mode.found(result)


def layers_behind(
    readers: dict[str, Reader], cut: Collection[str], narrowed: Collection[str]
) -> dict[str, Reader]:
    """Return the readers from the first that lost inputs on, in order of execution.

    Args:
        readers: All of them.
        cut: Parameters that lost inputs. What reads the removed channels may be none that can be solved for (a filter
            in a buffer, a weight that is computed).
        narrowed: Parameters that lost elements of any kind: in that case, the readers behind the first of these.
    """
    names = list(readers)
    first = next((number for number, name in enumerate(names) if name in cut), None)
    if first is None:
        producers = (number for number, name in enumerate(names) if name in narrowed)
        first = next(producers, len(names)) + 1
    return {name: readers[name] for name in names[first:]}


class _Survey(ContractionMode):
    """Observes which operators read the outputs of contractions."""

    def __init__(self, model: nn.Module, num_images: int) -> None:
        super().__init__(model, self._look)
        self._num_images = num_images
        self._buffers = {id(buffer): name for name, buffer in model.named_buffers()}
        self._readers: dict[str, Reader] = {}
        self._last: tuple[str, str | None] | None = None
        # Output of a contraction → its parameter; the output is kept alive, so that its id is not reused.
        self._made: dict[int, tuple[Tensor, str]] = {}
        self._uses: dict[str, list[Constant | None]] = {}
        self._takers: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Outputs:
        self._note(func, args, kwargs or {})
        self._last = None
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self._last is not None:
            name, bias = self._last
            self._made[id(result)] = (result, name)
            if bias is not None:
                self._uses.setdefault(name, []).append(Constant(bias, 1.0))
                self._takers[bias] += 1
        return result

    def _look(self, contraction: Contraction, compute: Callable[[], Tensor]) -> Tensor:
        output = compute()
        name = contraction.parameter
        num_rows = contraction.outputs(output, 1).shape[1]
        calls = self._readers[name].calls + 1 if name in self._readers else 1
        num_inputs = contraction.positions.shape[1]
        self._readers[name] = Reader(calls, num_inputs, num_rows / self._num_images, None)
        self._last = (name, contraction.bias)
        return output

    def _note(self, func: OpOverload, args: Args, kwargs: Kwargs) -> None:
        """Record an operator that reads outputs of contractions."""
        taker = self._taker(func, args, kwargs)
        if taker is not None:
            self._takers[taker.tensor] += 1
        for leaf in tree_leaves((args, kwargs)):
            made = self._made.get(id(leaf)) if isinstance(leaf, Tensor) else None
            if made is not None:
                self._uses.setdefault(made[1], []).append(taker)

    def _taker(self, func: OpOverload, args: Args, kwargs: Kwargs) -> Constant | None:
        """Return what absorbs a constant in this operator's input, or None."""
        if func in _NORMS and len(args) > 3:
            mean = self._buffers.get(id(args[3]))
            return None if mean is None else Constant(mean, -1.0)
        if func in _ADDITIONS and not kwargs and len(args) == 2:
            bias = self.name_of(args[1])
            return None if bias is None or args[1].dim() != 1 else Constant(bias, 1.0)
        return None

    def found(self, result: Outputs) -> dict[str, Reader]:
        """Return the readers with what absorbs their constants."""
        for leaf in tensors_in(result):
            made = self._made.get(id(leaf))
            if made is not None:
                self._uses.setdefault(made[1], []).append(None)
        return {
            name: dataclasses.replace(reader, constant=self._constant(name, reader))
            for name, reader in self._readers.items()
        }

    def _constant(self, name: str, reader: Reader) -> Constant | None:
        """Return what absorbs the constants of all calls of a layer, if it is one tensor that serves no other layer."""
        uses = self._uses.get(name, [])
        first = uses[0] if uses else None
        if first is None or self._takers[first.tensor] != reader.calls:
            return None
        own = [use for use in uses if use is not None and use.sign > 0]
        if own:  # the operator's own bias, or one added at once: readers of the sum read the constant too
            return own[0] if len({use.tensor for use in own}) == 1 and len(own) == reader.calls else None
        return first if uses == [first] * reader.calls else None
