"""In which order units can be done without, if least squares solves for the others' weights again after each.

For a layer that reads U with weights W, the sum of squares that no weights of the other inputs can make up for, when
the columns B of a unit go, is

    tr( W_Bᵀ [(H⁻¹)_BB]⁻¹ W_B )          H = UᵀU + λ·I

(for one column ‖w‖² / [H⁻¹]_jj). The unit with the smallest sum over all layers that read it, each relative to the
variance of its outputs, goes first; weights and inverse follow by a rank-|B| downdate, and so on.

Source: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon" (NIPS 1992), there for
single weights and the Hessian of the loss; here for the units that whole groups of layers read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pruning.repair.unit_inputs import UnitInputs

DEFAULT_RIDGE = 1e-2
#: Removals after which the inverse is brought up to date.
_BLOCK = 32


def elimination(
    inputs: Sequence[UnitInputs], units: Tensor, ridge: float = DEFAULT_RIDGE
) -> tuple[Tensor, Tensor]:
    """Order of elimination of a group's units, and what has been lost by then.

    Args:
        inputs: Of the layers; those that read none of the units do not count.
        units: (width,) ids.
        ridge: λ relative to the mean of UᵀU's diagonal.

    Returns:
        (width,) positions, the first to go first; (width,) float64: sum of squares lost when all up to there are
        gone, as a share of the outputs' variance, summed over layers. The last unit cannot go, and loses all.
    """
    place = {int(unit): position for position, unit in enumerate(units.tolist())}
    readers = [reader for reader in (_Reader.of(one, place, ridge) for one in inputs) if reader is not None]
    width = len(units)
    alive = torch.ones(width, dtype=torch.bool)
    order: list[int] = []
    lost: list[float] = []
    total = 0.0
    for _ in range(width - 1):
        damage = torch.zeros(width, dtype=torch.float64)
        for reader in readers:
            reader.add_damage(damage)
        damage[~alive] = float("inf")
        unit = int(damage.argmin())
        total += float(damage[unit])
        alive[unit] = False
        order.append(unit)
        lost.append(total)
        for reader in readers:
            reader.remove(unit)
    order.append(int(alive.nonzero()[0]))
    lost.append(total + len(readers))
    return torch.tensor(order), torch.tensor(lost, dtype=torch.float64)


class _Reader:
    """One layer's part of an elimination.

    The inverse is downdated in blocks: what the last removals take from it waits in two thin matrices, and only the
    entries that are asked for are made up to date. So nearly all work is products of matrices.

    Args:
        inputs: Of the layer.
        position: (K,) unit of every column as a position in the group; −1 for columns that always stay.
        width: Of the group.
        ridge: λ relative to the mean of UᵀU's diagonal.
    """

    def __init__(self, inputs: UnitInputs, position: Tensor, width: int, ridge: float) -> None:
        self._inverse = loaded_inverse(inputs.gram.cpu(), ridge)
        self._weights = inputs.weights.cpu().clone()
        self._scale = float(inputs.variance)
        self._pending: list[tuple[Tensor, Tensor]] = []  # (K, |B|) each: the inverse less Σ share · acrossᵀ
        # Columns of every unit, as (units, taps); units with fewer columns repeat none, they form classes of their own.
        self._columns = {unit: (position == unit).nonzero().flatten() for unit in range(width)}
        self._classes: list[tuple[Tensor, Tensor]] = []
        taps = torch.tensor([len(self._columns[unit]) for unit in range(width)])
        for count in taps.unique().tolist():
            units = (taps == count).nonzero().flatten()
            if count:
                self._classes.append((units, torch.stack([self._columns[unit] for unit in units.tolist()])))
        # The blocks [H⁻¹]_BB of every unit, always up to date.
        self._own = [self._inverse[blocks[:, :, None], blocks[:, None, :]] for _, blocks in self._classes]

    @classmethod
    def of(cls, inputs: UnitInputs, place: dict[int, int], ridge: float) -> _Reader | None:
        """None if the layer reads none of the units."""
        position = torch.tensor([place.get(unit, -1) for unit in inputs.units.tolist()])
        if not (position >= 0).any() or not float(inputs.variance) > 0:
            return None
        return cls(inputs, position, len(place), ridge)

    def add_damage(self, damage: Tensor) -> None:
        """Add what the loss of each unit alone would cost now; of those that have gone it is of no meaning."""
        for (units, blocks), own in zip(self._classes, self._own, strict=True):
            weights = self._weights[blocks]
            if blocks.shape[1] == 1:
                cost = weights.square().sum((1, 2)) / own[:, 0, 0]
            else:
                cost = (weights * torch.linalg.solve(own, weights)).sum((1, 2))
            damage[units] += cost / self._scale

    def remove(self, unit: int) -> None:
        """The others take up what they can of a unit."""
        block = self._columns[unit]
        if not len(block):
            return
        across = self._inverse[:, block]
        for share, other in self._pending:
            across = across - share @ other[block].mT
        share = torch.linalg.solve(across[block].mT, across.mT).mT  # (K, |B|): H⁻¹_:B [H⁻¹_BB]⁻¹
        self._weights -= share @ self._weights[block]
        self._weights[block] = 0
        for (units, blocks), own in zip(self._classes, self._own, strict=True):
            own -= share[blocks] @ across[blocks].mT
            own[units == unit] = torch.eye(own.shape[1], dtype=own.dtype)
        self._pending.append((share, across))
        if len(self._pending) == _BLOCK:
            shares, others = (torch.cat(parts, 1) for parts in zip(*self._pending, strict=True))
            self._inverse -= shares @ others.mT
            self._pending.clear()


def loaded_inverse(gram: Tensor, ridge: float) -> Tensor:
    """(UᵀU + λ·I)⁻¹; a λ that roundings swallow is raised.

    Args:
        gram: (K, K) UᵀU, finite.
        ridge: λ relative to the mean of its diagonal.
    """
    return loaded_inverses([gram], ridge)[0]


def loaded_inverses(grams: Sequence[Tensor], ridge: float) -> list[Tensor]:
    """`loaded_inverse` of several; the host waits for the device once for all of them, and again where one fails.

    Args:
        grams: (K, K) each, on one device.
        ridge: See `loaded_inverse`.
    """
    loads = [(ridge * gram.diagonal().mean()).clamp(min=torch.finfo(gram.dtype).tiny) for gram in grams]
    factors: list[Tensor] = [torch.empty(0)] * len(grams)
    waiting = list(range(len(grams)))
    while waiting:
        infos = []
        for index in waiting:
            identity = torch.eye(len(grams[index]), dtype=grams[index].dtype, device=grams[index].device)
            factors[index], info = torch.linalg.cholesky_ex(grams[index] + loads[index] * identity)
            infos.append(info)
        failed = torch.stack(infos).tolist()
        waiting = [index for index, code in zip(waiting, failed, strict=True) if code]
        for index in waiting:
            loads[index] = 10 * loads[index]
    return [torch.cholesky_inverse(factor) for factor in factors]
