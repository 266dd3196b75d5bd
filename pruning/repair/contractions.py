"""Captures a network's contractions with its parameters as matrix products, while the network runs.

Every convolution (any rank, stride, dilation, grouping, transposed) and every matrix product is brought to one form:

    Y[g] = U[g] · W[g]        U (G, R, K) rows of input, W (G, K, M) weights, Y (G, R, M) outputs without a bias

A row is one output position of one image; K runs over the channels of the group and the taps of the kernel. Padding by
values other than zero happens before the operator, so the rows are what the layer actually read.

Operators are observed below autograd, so it does not matter which Python code called them. A weight is recognised
behind views (transposed, reshaped, expanded, sliced) by applying the same views to the indices of its elements:
`Contraction.positions` gives the element of the parameter at each entry of W. Weights computed from others (normalised,
standardised) have no such positions and are left alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from image_classification.models.running import Args, Kwargs, Outputs

aten = torch.ops.aten

#: Operators that only move elements; the element indices of a weight move in the same way.
_MOVES = {
    aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten._unsafe_view.default,
    aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.detach.default, aten.alias.default,
    aten.clone.default, aten.numpy_T.default, aten.mT.default,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A contraction with a parameter.

    Attributes:
        parameter: Its qualified name.
        bias: Name of the bias that the operator adds, if any.
        positions: (G, K, M) index of the element of the flattened parameter at each entry of W.
        rows: Returns U (G, R, K) for every `step`-th position along each dimension.
        outputs: Converts the operator's output to (G, R, M) for the same positions, including any bias that the
            operator adds.
        num_dims: Number of dimensions that positions lie along: a step keeps about 1 in `step ** num_dims`.
    """

    parameter: str
    bias: str | None
    positions: Tensor
    rows: Callable[[int], Tensor]
    outputs: Callable[[Tensor, int], Tensor]
    num_dims: int


#: Called with a contraction and its operator; returns the output with which the network continues.
Visit = Callable[[Contraction, Callable[[], Tensor]], Tensor]


class ContractionMode(TorchDispatchMode):
    """Calls `visit` for contractions with a network's parameters while the network runs.

    Args:
        model: The network.
        visit: Runs the operator and returns its output (or a replacement).
        parameters: Names of the parameters whose contractions are visited; by default all.
        numbers: Parameter → indices of its elements, in its shape. Filled on demand and shared by all passes of a
            network, since they take as much memory as its weights.
    """

    def __init__(
        self,
        model: nn.Module,
        visit: Visit,
        parameters: Collection[str] | None = None,
        numbers: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._visit = visit
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._shown = frozenset(self._names.values() if parameters is None else parameters)
        self._numbers = {} if numbers is None else numbers
        # A moved tensor is kept with its positions, so that its id is not reused.
        self._moved: dict[int, tuple[Tensor, str, Tensor]] = {}
        self._expanded: set[int] = set()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> Outputs:
        kwargs = kwargs or {}
        if func in _MOVES:
            return self._follow(func, args, kwargs)
        build = _FORMS.get(func)
        if build is None:
            return func(*args, **kwargs)
        contraction = build(self, args, kwargs)
        if contraction is None:
            return func(*args, **kwargs)
        return self._visit(contraction, lambda: func(*args, **kwargs))

    def _follow(self, func: OpOverload, args: Args, kwargs: Kwargs) -> Outputs:
        result = func(*args, **kwargs)
        known = self.find(args[0])
        if known is not None:
            name, positions = known
            moved = func(positions, *args[1:], **kwargs)
            self._moved[id(result)] = (result, name, moved)
            if id(args[0]) in self._expanded or moved.numel() > positions.numel():
                self._expanded.add(id(result))
        return result

    def repeats(self, tensor: Tensor) -> bool:
        """Whether some elements of the parameter may occur more than once in an operand."""
        return id(tensor) in self._expanded

    def find(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Return the visited parameter behind an operand and the index of each element; None for anything else."""
        name = self.name_of(tensor)
        if name in self._shown:
            if name not in self._numbers:
                self._numbers[name] = torch.arange(tensor.numel(), dtype=torch.int32).view(tensor.shape)
            return name, self._numbers[name]
        moved = self._moved.get(id(tensor))
        return None if moved is None else (moved[1], moved[2])

    def name_of(self, tensor: object) -> str | None:
        """Return the name of the parameter that an operand is, without any view in between."""
        return self._names.get(id(tensor)) if isinstance(tensor, Tensor) else None


# ----------------------------------------------------------------------------------------------- matrix products


def _product(mode: ContractionMode, args: Args, kwargs: Kwargs) -> Contraction | None:
    """mm, bmm: (R, K) × (K, M) with the weights on either side."""
    left, right = args[:2]
    return _matrices(mode, left, right, None)


def _product_with_term(mode: ContractionMode, args: Args, kwargs: Kwargs) -> Contraction | None:
    """addmm, baddbmm: the added term is a bias if it is a parameter."""
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1:
        return None
    term, left, right = args[:3]
    bias = mode.name_of(term)
    if bias is None or term.dim() != 1:
        return None
    return _matrices(mode, left, right, bias)


def _matrices(mode: ContractionMode, left: Tensor, right: Tensor, bias: str | None) -> Contraction | None:
    on_right, on_left = mode.find(right), mode.find(left)
    if (on_right is None) == (on_left is None):
        return None  # no weights, or only weights
    known = on_right or on_left
    assert known is not None
    name, positions = known
    transposed = on_right is None
    weights, rows = (left, right) if transposed else (right, left)
    positions = _oriented(positions, transposed)
    groups = len(positions)
    if mode.repeats(weights):
        groups = _num_unlike(positions)
        positions = positions[:groups]
        if not _distinct(positions):
            return None
    return Contraction(
        name,
        bias,
        positions,
        lambda step: _folded(_oriented(rows, transposed), groups)[:, ::step],
        lambda y, step: _folded(_oriented(y, transposed), groups)[:, ::step],
        1,
    )


def _oriented(matrix: Tensor, transposed: bool) -> Tensor:
    """Return a batch of matrices, transposed if the weights are on the left."""
    batched = matrix if matrix.dim() == 3 else matrix[None]
    return batched.transpose(1, 2) if transposed else batched


def _num_unlike(positions: Tensor) -> int:
    """Return the number of distinct groups if the others repeat them in the same order, as in expanded weights."""
    first = len(positions[:, 0, 0].unique())
    if len(positions) % first:
        return len(positions)
    again = positions.reshape(-1, first, *positions.shape[1:])
    return first if bool((again == positions[:first]).all()) else len(positions)


def _distinct(positions: Tensor) -> bool:
    """Whether every element of the parameter occurs at most once; otherwise entries cannot be solved for
    independently.
    """
    return len(positions.unique()) == positions.numel()


def _folded(matrices: Tensor, groups: int) -> Tensor:
    """Reshape (N · G, R, K) to (G, N · R, K): repetitions of a group count as more rows."""
    if len(matrices) == groups:
        return matrices
    return matrices.reshape(-1, groups, *matrices.shape[1:]).transpose(0, 1).flatten(1, 2)


# -------------------------------------------------------------------------------------------------- convolutions


def _convolution(mode: ContractionMode, args: Args, kwargs: Kwargs) -> Contraction | None:
    """aten.convolution: input, weight, bias, stride, padding, dilation, transposed, output padding, groups."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    known = mode.find(weight)
    if known is None or (mode.repeats(weight) and not _distinct(known[1])):
        return None
    name, positions = known
    bias_name = mode.name_of(bias)
    if bias is not None and bias_name is None:
        return None
    rank = weight.dim() - 2
    stride, padding, dilation, output_padding = (
        _each(values, rank) for values in (stride, padding, dilation, output_padding)
    )
    kernel = tuple(weight.shape[2:])

    def rows(step: int) -> Tensor:
        if transposed:
            stuffed = _stuffed(x, kernel, stride, padding, dilation, output_padding)
            return unfolded(stuffed, kernel, (1,) * rank, (0,) * rank, dilation, groups, step)
        return unfolded(x, kernel, stride, padding, dilation, groups, step)

    def outputs(y: Tensor, step: int) -> Tensor:
        y = y[(slice(None), slice(None), *(slice(None, None, step),) * rank)]
        return y.reshape(y.shape[0], groups, y.shape[1] // groups, -1).permute(1, 0, 3, 2).flatten(1, 2)

    table = _transposed_table(positions, groups) if transposed else _table(positions, groups)
    return Contraction(name, bias_name, table, rows, outputs, rank)


def _each(values: Sequence[int], rank: int) -> tuple[int, ...]:
    return tuple(values) * rank if len(values) == 1 else tuple(values)


def _table(positions: Tensor, groups: int) -> Tensor:
    """Reshape (O, I/G, k…) to (G, I/G · k, O/G)."""
    return positions.reshape(groups, positions.shape[0] // groups, -1).transpose(1, 2)


def _transposed_table(positions: Tensor, groups: int) -> Tensor:
    """Reshape (I, O/G, k…) to (G, I/G · k, O/G), with kernels flipped to match the zero-stuffed input."""
    flipped = positions.flip(tuple(range(2, positions.dim())))
    by_group = flipped.reshape(groups, positions.shape[0] // groups, positions.shape[1], -1)
    return by_group.permute(0, 1, 3, 2).flatten(1, 2)


def _stuffed(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
) -> Tensor:
    """Insert zeros between and around the positions of a transposed convolution's input, for a plain convolution."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *sizes)
    stuffed[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = x
    borders: list[int] = []
    for taps, pad, spread, more in zip(kernel, padding, dilation, output_padding, strict=True):
        reach = spread * (taps - 1) - pad
        borders = [reach, reach + more, *borders]  # F.pad counts from the last dimension
    return F.pad(stuffed, borders)


def unfolded(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    step: int = 1,
) -> Tensor:
    """Return what a convolution reads at every `step`-th position: (N, C, …) → (G, N · positions, C/G · taps)."""
    rank = len(kernel)
    if any(padding):
        x = F.pad(x, [pad for pad in reversed(padding) for _ in range(2)])
    for dim, (taps, apart, spread) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(dim, spread * (taps - 1) + 1, apart * step)[..., ::spread]
    # (N, C, positions…, taps…) → (G, N, positions…, C/G, taps…)
    num, channels = x.shape[:2]
    x = x.reshape(num, groups, channels // groups, *x.shape[2:])
    order = (1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
    positions = math.prod(x.shape[3 : 3 + rank])
    return x.permute(order).reshape(groups, num * positions, -1)


_FORMS: dict[OpOverload, Callable[[ContractionMode, Args, Kwargs], Contraction | None]] = {
    aten.convolution.default: _convolution,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _product_with_term,
}
