"""The order in which units can be removed if least squares refits the weights of the others after each removal.

For a layer that reads U with weights W, the sum of squares that no weights of the other inputs can compensate when the
columns B of a unit are removed is

    tr( W_Bᵀ [(H⁻¹)_BB]⁻¹ W_B )          H = UᵀU + λ·I

(for one column ‖w‖² / [H⁻¹]_jj). The unit with the smallest sum over all layers that read it, each relative to the
variance of its outputs, is removed first; weights and inverse are updated by a rank-|B| downdate, and so on.

Source: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon" (NIPS 1992), which
treats single weights and the Hessian of the loss; here it is applied to units read by whole groups of layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pruning.repair.unit_inputs import UnitInputs

DEFAULT_RIDGE = 1e-2
#: Number of removals after which inverse and weights are updated in full.
_BLOCK = 32


def elimination(
    inputs: Sequence[UnitInputs], units: Tensor, ridge: float = DEFAULT_RIDGE
) -> tuple[Tensor, Tensor]:
    """Return the order of elimination of a group's units, and the accumulated loss at each.

    Args:
        inputs: Inputs of the layers; layers that read none of the units are ignored.
        units: (width,) ids.
        ridge: λ relative to the mean of UᵀU's diagonal.

    Returns:
        (width,) positions, in order of removal; and (width,) float64, the sum of squares lost once all units up to this
            one are removed, as a share of the outputs' variance, summed over layers. The last unit cannot be removed
            and counts as losing everything.
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

    Inverse and weights are downdated in blocks: the effect of the latest removals is kept in thin matrices, and only
    requested entries are brought up to date. So nearly all work is matrix products. What a unit's removal costs needs
    its blocks [H⁻¹]_BB and W_B·W_Bᵀ alone, which always are up to date.

    Args:
        inputs: Inputs of the layer.
        position: (K,) unit of every column as a position in the group; −1 for columns that always stay.
        width: Width of the group.
        ridge: λ relative to the mean of UᵀU's diagonal.
    """

    def __init__(self, inputs: UnitInputs, position: Tensor, width: int, ridge: float) -> None:
        self._inverse = loaded_inverse(inputs.gram.cpu(), ridge)
        self._weights = inputs.weights.cpu().clone()
        self._scale = float(inputs.variance)
        # Columns of every unit, as (units, taps). Units with different numbers of columns form classes of their own.
        self._columns = {unit: (position == unit).nonzero().flatten() for unit in range(width)}
        self._classes: list[tuple[Tensor, Tensor]] = []
        taps = torch.tensor([len(self._columns[unit]) for unit in range(width)])
        for count in taps.unique().tolist():
            units = (taps == count).nonzero().flatten()
            if count:
                self._classes.append((units, torch.stack([self._columns[unit] for unit in units.tolist()])))
        self._own = [self._inverse[blocks[:, :, None], blocks[:, None, :]] for _, blocks in self._classes]
        self._squares = self._squares_of_weights()
        # With these, the current inverse is the stored one − shares · acrossᵀ, and the current weights are the stored
        # ones − shares · removed.
        room = _BLOCK * int(taps.max())
        self._shares, self._across = self._inverse.new_zeros(2, len(position), room).unbind()
        self._removed = self._weights.new_zeros(room, self._weights.shape[1])
        self._pending, self._waiting = 0, 0

    @classmethod
    def of(cls, inputs: UnitInputs, place: dict[int, int], ridge: float) -> _Reader | None:
        """Build a layer's part; None if the layer reads none of the units."""
        position = torch.tensor([place.get(unit, -1) for unit in inputs.units.tolist()])
        if not (position >= 0).any() or not float(inputs.variance) > 0:
            return None
        return cls(inputs, position, len(place), ridge)

    def add_damage(self, damage: Tensor) -> None:
        """Add the cost of removing each unit alone now; entries of removed units are meaningless."""
        for (units, blocks), own, squares in zip(self._classes, self._own, self._squares, strict=True):
            single = blocks.shape[1] == 1
            ratio = squares / own if single else torch.linalg.solve(own, squares)
            damage[units] += ratio.diagonal(dim1=1, dim2=2).sum(1) / self._scale

    def remove(self, unit: int) -> None:
        """Remove a unit, compensating by the others as far as possible."""
        block = self._columns[unit]
        if not len(block):
            return
        shares, removed = self._shares[:, : self._pending], self._removed[: self._pending]
        across = self._inverse[:, block] - shares @ self._across[block, : self._pending].mT
        weights = self._weights[block] - shares[block] @ removed
        products = self._weights @ weights.mT - shares @ (removed @ weights.mT)  # W · W_Bᵀ
        share = torch.linalg.solve(across[block].mT, across.mT).mT  # (K, |B|): H⁻¹_:B [H⁻¹_BB]⁻¹
        between = products[block]
        for (units, blocks), own, squares in zip(self._classes, self._own, self._squares, strict=True):
            part = share[blocks]
            own -= part @ across[blocks].mT
            own[units == unit] = torch.eye(own.shape[1], dtype=own.dtype)
            mixed = part @ products[blocks].mT
            squares += part @ between @ part.mT - mixed - mixed.mT
        end = self._pending + len(block)
        self._shares[:, self._pending : end], self._across[:, self._pending : end] = share, across
        self._removed[self._pending : end] = weights
        self._pending, self._waiting = end, self._waiting + 1
        if self._waiting == _BLOCK:
            self._update()

    def _update(self) -> None:
        """Bring inverse and weights up to date."""
        shares = self._shares[:, : self._pending]
        self._inverse -= shares @ self._across[:, : self._pending].mT
        self._weights -= shares @ self._removed[: self._pending]
        self._squares = self._squares_of_weights()  # sheds the rounding of the updates
        self._pending, self._waiting = 0, 0

    def _squares_of_weights(self) -> list[Tensor]:
        """Return W_B·W_Bᵀ of every unit, by class, (units, taps, taps)."""
        return [self._weights[blocks] @ self._weights[blocks].mT for _, blocks in self._classes]


def loaded_inverse(gram: Tensor, ridge: float) -> Tensor:
    """Compute (UᵀU + λ·I)⁻¹, raising a λ that is lost to rounding.

    Args:
        gram: (K, K) UᵀU, finite.
        ridge: λ relative to the mean of its diagonal.
    """
    return loaded_inverses([gram], ridge)[0]


def loaded_inverses(grams: Sequence[Tensor], ridge: float) -> list[Tensor]:
    """Compute `loaded_inverse` of several products with one host sync, and one more per retry.

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
