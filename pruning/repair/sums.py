"""Sufficient statistics of a least-squares problem, summed over batches and ranks.

There are two forms with the same interface. `Sums` keeps sums over rows U (R, K) and targets Y (R, M): n, ΣU, ΣY, ΣUᵀU,
ΣUᵀY, ΣY². They do not grow with the number of images. If a layer has more inputs than there are rows (the first linear
layer after a flattened map), UᵀU would be larger than the rows themselves, so `Rows` keeps the rows.

Products are computed in float32, a block of rows at a time (float64 if the rows are float64), and summed in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from image_classification.distributed import Distributed
from image_classification.models import exact_float32

#: Number of rows multiplied at a time before their products are added in float64.
_BLOCK = 8192
#: Width from which a Gram matrix is computed in so many block rows: 5/8 of the products.
_BLOCKS_FROM, _NUM_BLOCKS = 512, 4
#: Number of inputs from which on a layer may have fewer rows than inputs.
WIDE = 2048
#: Largest number of rows kept for a wide layer; more are thinned out evenly.
MOST_ROWS = 8192
#: Number of rows that suffice: this many per input of the layer, and at least this many in total.
ENOUGH_PER_INPUT = 64
ENOUGH = 1 << 16


@dataclasses.dataclass(frozen=True)
class NormalEquations:
    """UᵀU·W = UᵀY, with U and Y centred if a bias absorbs the means.

    Attributes:
        multiply: (G, K, M) D → UᵀU·D.
        right: (G, K, M) UᵀY.
        diagonal: (G, K) diagonal of UᵀU.
    """

    multiply: Callable[[Tensor], Tensor]
    right: Tensor
    diagonal: Tensor


class Evidence(Protocol):
    """A least-squares problem: Y ≈ U·W + b for each of G groups."""

    num_rows: Tensor

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add rows: inputs (G, R, K), outputs (G, R, M)."""

    def empty_like(self) -> Evidence:
        """Return the same form without rows."""

    def reduce(self, distributed: Distributed) -> None:
        """Sum over ranks. Collective."""

    def joined(self, other: Evidence) -> Evidence:
        """Return the evidence of both."""

    def power(self) -> Tensor:
        """Return Σ Y² over rows and outputs."""

    def variance(self) -> Tensor:
        """Return Σ (Y − mean(Y))² over rows and outputs."""

    def error(self, weights: Tensor, bias: Tensor) -> Tensor:
        """Return Σ (Y − U·W − b)² over rows and outputs, for weights (G, K, M) and a bias (G, M)."""

    def best_bias(self, weights: Tensor) -> Tensor:
        """Return the mean of Y − U·W, (G, M)."""

    def ridge(self, present: Tensor, ridges: Iterable[Tensor | float], has_bias: bool) -> Iterator[Tensor]:
        """Yield the solution of every ridge regression towards the current weights, (G, K, M); NaN if there is none."""

    def normal(self, has_bias: bool) -> NormalEquations:
        """Return the equations of the solution without a ridge."""


def evidence_for(groups: int, inputs: int, outputs: int, num_rows: int, device: torch.device) -> Evidence:
    """Return the smaller form for a layer of this size with about this many rows over all ranks."""
    if inputs > WIDE and min(num_rows, MOST_ROWS) < inputs:
        return Rows.empty(groups, inputs, outputs, device, thinned=-(-num_rows // MOST_ROWS))
    return Sums.zeros(groups, inputs, outputs, device)


def step_for(num_rows: float, inputs: int, num_dims: int) -> int:
    """Return the step between the used positions of a layer's output, an odd number: neighbours are nearly redundant.

    Args:
        num_rows: Number of positions of all images.
        inputs: K.
        num_dims: Number of dimensions that positions lie along.
    """
    enough = max(ENOUGH, ENOUGH_PER_INPUT * inputs)
    step = int((max(num_rows, 1.0) / enough) ** (1 / num_dims))
    return max(1, step - 1 + step % 2)


@dataclasses.dataclass
class Sums:
    """Sums over rows, for each of G groups.

    Attributes:
        num_rows: n.
        inputs: (G, K) ΣU.
        outputs: (G, M) ΣY.
        gram: (G, K, K) ΣUᵀU.
        cross: (G, K, M) ΣUᵀY.
        squares: (G, M) ΣY².
    """

    num_rows: Tensor
    inputs: Tensor
    outputs: Tensor
    gram: Tensor
    cross: Tensor
    squares: Tensor

    @classmethod
    def zeros(cls, groups: int, inputs: int, outputs: int, device: torch.device) -> Sums:
        """Create empty sums."""

        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            zero(),
            zero(groups, inputs),
            zero(groups, outputs),
            zero(groups, inputs, inputs),
            zero(groups, inputs, outputs),
            zero(groups, outputs),
        )

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """See `Evidence`."""
        with exact_float32():
            for u, y in zip(inputs.split(_BLOCK, 1), outputs.split(_BLOCK, 1), strict=True):
                u, y = _wide(u), _wide(y)
                self.gram += _gram(u).double()
                self.cross += (u.mT @ y).double()
                self.inputs += u.sum(1, dtype=torch.float64)
                self.outputs += y.sum(1, dtype=torch.float64)
                self.squares += y.double().square().sum(1)
        self.num_rows += inputs.shape[1]

    def empty_like(self) -> Sums:
        """See `Evidence`."""
        return Sums(*(torch.zeros_like(part) for part in self.parts()))

    def parts(self) -> list[Tensor]:
        """Return the tensors."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def reduce(self, distributed: Distributed) -> None:
        """See `Evidence`."""
        if distributed.is_distributed:
            for mine, total in zip(self.parts(), distributed.all_reduce_sum(*self.parts()), strict=True):
                mine.copy_(total)

    def joined(self, other: Evidence) -> Sums:
        """See `Evidence`."""
        assert isinstance(other, Sums)
        return Sums(*(one + two for one, two in zip(self.parts(), other.parts(), strict=True)))

    def centred(self) -> tuple[Tensor, Tensor]:
        """Return the centred Gram matrix (G, K, K) and cross products (G, K, M)."""
        mean = self.inputs / self.num_rows
        gram = self.gram - mean[:, :, None] * self.inputs[:, None, :]
        return gram, self.cross - mean[:, :, None] * self.outputs[:, None, :]

    def power(self) -> Tensor:
        """See `Evidence`."""
        return self.squares.sum()

    def variance(self) -> Tensor:
        """See `Evidence`."""
        return (self.squares - self.outputs.square() / self.num_rows).sum()

    def error(self, weights: Tensor, bias: Tensor) -> Tensor:
        """See `Evidence`."""
        fitted = self.gram @ weights
        quadratic = (weights * (fitted - 2 * self.cross)).sum()
        straight = (bias * (2 * (weights * self.inputs[:, :, None]).sum(1) - 2 * self.outputs)).sum()
        return self.squares.sum() + quadratic + straight + self.num_rows * bias.square().sum()

    def best_bias(self, weights: Tensor) -> Tensor:
        """See `Evidence`."""
        return (self.outputs - (weights * self.inputs[:, :, None]).sum(1)) / self.num_rows

    def ridge(self, present: Tensor, ridges: Iterable[Tensor | float], has_bias: bool) -> Iterator[Tensor]:
        """See `Evidence`: W + (UᵀU + λ·I)⁻¹ Uᵀ(Y − U·W)."""
        gram, cross = self.centred() if has_bias else (self.gram, self.cross)
        right = cross - gram @ present
        unit = gram.diagonal(dim1=1, dim2=2).mean(1)
        for ridge in ridges:
            yield _solved(gram, ridge * unit, right).add_(present)

    def normal(self, has_bias: bool) -> NormalEquations:
        """See `Evidence`."""
        gram, cross = self.centred() if has_bias else (self.gram, self.cross)
        return NormalEquations(gram.matmul, cross, gram.diagonal(dim1=1, dim2=2))


@dataclasses.dataclass
class Rows:
    """The rows themselves, for each of G groups.

    Attributes:
        num_rows: n.
        inputs: (G, R, K) U.
        outputs: (G, R, M) Y.
        thinned: One in this many rows is kept.
    """

    num_rows: Tensor
    inputs: Tensor
    outputs: Tensor
    thinned: int = 1

    @classmethod
    def empty(cls, groups: int, inputs: int, outputs: int, device: torch.device, thinned: int = 1) -> Rows:
        """Create an empty set of rows."""
        return cls(
            torch.zeros((), dtype=torch.float64, device=device),
            torch.zeros(groups, 0, inputs, device=device),
            torch.zeros(groups, 0, outputs, device=device),
            thinned,
        )

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """See `Evidence`."""
        inputs, outputs = inputs[:, :: self.thinned], outputs[:, :: self.thinned]
        self.inputs = torch.cat([self.inputs.to(inputs.dtype), inputs], 1)
        self.outputs = torch.cat([self.outputs.to(outputs.dtype), outputs], 1)
        self.num_rows += inputs.shape[1]

    def empty_like(self) -> Rows:
        """See `Evidence`."""
        return Rows(torch.zeros_like(self.num_rows), self.inputs[:, :0], self.outputs[:, :0], self.thinned)

    def reduce(self, distributed: Distributed) -> None:
        """See `Evidence`."""
        if distributed.is_distributed:
            self.inputs = distributed.gather_rows(self.inputs.transpose(0, 1).contiguous()).transpose(0, 1)
            self.outputs = distributed.gather_rows(self.outputs.transpose(0, 1).contiguous()).transpose(0, 1)
            self.num_rows.fill_(self.inputs.shape[1])

    def joined(self, other: Evidence) -> Rows:
        """See `Evidence`."""
        assert isinstance(other, Rows)
        return Rows(
            self.num_rows + other.num_rows,
            torch.cat([self.inputs, other.inputs], 1),
            torch.cat([self.outputs, other.outputs], 1),
            self.thinned,
        )

    def power(self) -> Tensor:
        """See `Evidence`."""
        return self.outputs.double().square().sum()

    def variance(self) -> Tensor:
        """See `Evidence`."""
        outputs = self.outputs.double()
        return (outputs - outputs.mean(1, keepdim=True)).square().sum()

    def error(self, weights: Tensor, bias: Tensor) -> Tensor:
        """See `Evidence`."""
        return (self._residual(weights) - bias[:, None]).square().sum()

    def best_bias(self, weights: Tensor) -> Tensor:
        """See `Evidence`."""
        return self._residual(weights).mean(1)

    def ridge(self, present: Tensor, ridges: Iterable[Tensor | float], has_bias: bool) -> Iterator[Tensor]:
        """See `Evidence`. The same solution through the kernel of the rows: W + Uᵀ(UUᵀ + λ·I)⁻¹(Y − U·W)."""
        inputs = self.inputs
        residual = self._residual(present)
        if has_bias:
            inputs = inputs - inputs.mean(1, keepdim=True)
            residual = residual - residual.mean(1, keepdim=True)
        with exact_float32():
            kernel = (inputs @ inputs.mT).double()
        unit = kernel.diagonal(dim1=1, dim2=2).sum(1) / inputs.shape[2]
        for ridge in ridges:
            shares = _solved(kernel, ridge * unit, residual).to(inputs.dtype)
            with exact_float32():
                change = inputs.mT @ shares
            yield change.double().add_(present)

    def normal(self, has_bias: bool) -> NormalEquations:
        """See `Evidence`."""
        inputs, outputs = self.inputs.double(), self.outputs.double()
        if has_bias:
            inputs = inputs - inputs.mean(1, keepdim=True)
            outputs = outputs - outputs.mean(1, keepdim=True)
        return NormalEquations(
            lambda weights: inputs.mT @ (inputs @ weights), inputs.mT @ outputs, inputs.square().sum(1)
        )

    def _residual(self, weights: Tensor) -> Tensor:
        """Return Y − U·W, (G, R, M)."""
        with exact_float32():
            return self.outputs.double() - (self.inputs @ weights.to(self.inputs.dtype)).double()


def _solved(matrix: Tensor, load: Tensor, right: Tensor) -> Tensor:
    """Return (matrix + load·I)⁻¹ right for each group; NaN if the matrix is not positive definite."""
    loaded = matrix + load[:, None, None] * torch.eye(
        matrix.shape[1], dtype=matrix.dtype, device=matrix.device
    )
    factor, info = torch.linalg.cholesky_ex(loaded)
    solved = torch.cholesky_solve(right, factor)
    return solved.masked_fill_((info != 0)[:, None, None], float("nan"))


def _gram(rows: Tensor) -> Tensor:
    """Return UᵀU, (G, K, K), of rows (G, R, K). Of a wide one, blocks below the diagonal are copied from above it."""
    wide = rows.shape[2]
    if wide < _BLOCKS_FROM:
        return rows.mT @ rows
    gram = rows.new_empty(rows.shape[0], wide, wide)
    step = -(-wide // _NUM_BLOCKS)
    for start in range(0, wide, step):
        stop = min(start + step, wide)
        gram[:, start:stop, start:] = rows[:, :, start:stop].mT @ rows[:, :, start:]
        gram[:, stop:, start:stop] = gram[:, start:stop, stop:].mT
    return gram


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()
