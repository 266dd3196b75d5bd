"""Preview of a repaired cut without making it: temporary weights that compensate for closed units.

Each layer that reads closed units temporarily gets the weights of the least-squares solution for its current inputs:

    W_S* = W_S + (U_Sᵀ U_S + λ·I)⁻¹ U_Sᵀ U_R · W_R          S: kept, R: removed

The products UᵀU are collected once and serve every candidate. With the inverse of H = UᵀU + λ·I the same weights are W
− H⁻¹_:R [H⁻¹_RR]⁻¹ W_R (Hassibi & Stork 1993, for several inputs at once), a system only as large as the removed part.
Unlike the real repair (`repair_wave.py`), later layers are not solved for: this is what a search can afford for each
candidate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.distributed import Distributed
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.named_tensors import named_tensors
from pruning.repair.elimination import DEFAULT_RIDGE, loaded_inverses
from pruning.repair.survey import Constant, Reader, survey
from pruning.repair.unit_inputs import UnitInputs, reading_units, unit_inputs
from pruning.task import Batch, Task, num_samples

_SOLUTIONS_KEPT = 2  # per layer: for the units closed so far, and for those of a candidate
#: Largest total size of products UᵀU inverted together, in bytes.
_INVERTED_AT_ONCE = 1 << 28


class LocalRepair:
    """Repairs of candidate cuts on the uncut network.

    Args:
        model: The network; its weights are unchanged outside `applied`.
        graph: Its channel graph.
        batches: This rank's calibration batches, on the network's device.
        task: How the network is run on a batch.
        distributed: Ranks to sum over.
        ridge: λ relative to the mean square of a layer's inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        batches: Sequence[Batch],
        *,
        task: Task | None = None,
        distributed: Distributed | None = None,
        ridge: float = DEFAULT_RIDGE,
    ) -> None:
        self.model = model
        self.graph = graph
        self.batches = batches
        self.task = task or Task()
        self.distributed = distributed or Distributed()
        self.ridge = ridge
        self._inputs: dict[str, list[_Layer]] = {}
        self._solutions: dict[tuple[str, int], dict[bytes, Tensor | None]] = {}
        self._looked: set[str] = set()
        self._readers: dict[str, Reader] | None = None

    def prepare(self, masks: Iterable[np.ndarray]) -> None:
        """Collect missing sums of the layers affected by these cuts, in one pass. Collective.

        Args:
            masks: (num_units,) bool: units to keep.
        """
        masks = list(masks)
        closed = [np.flatnonzero(~mask) for mask in masks]
        units = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *closed]))
        wanted = reading_units(self.graph, units) - self._looked
        if wanted:
            self._collect(wanted)
        layers = [one for groups in self._inputs.values() for one in groups]
        invert([one for one in layers if one.wants_several(masks)], self.ridge)

    def _collect(self, wanted: set[str]) -> None:
        """Collect the inputs of layers in one pass over the batches."""
        self._looked |= wanted
        for one in unit_inputs(
            self.model,
            self.graph,
            self.batches,
            wanted,
            task=self.task,
            distributed=self.distributed,
            strict=False,
        ):
            self._inputs.setdefault(one.parameter, []).append(_Layer(one, self.ridge))
        if self._readers is None and self.batches:
            batch = self.batches[0]
            with self.task.running(self.model):
                self._readers = survey(
                    self.model, lambda: self.task.outputs(self.model, batch), num_samples(batch)
                )

    def closings(self, mask: np.ndarray) -> dict[str, tuple[bytes, ...]]:
        """Return, for every parameter or buffer that `applied` may change, what determines its values under a cut.

        Args:
            mask: (num_units,) bool: units to keep; must have been passed to `prepare`.
        """
        found: dict[str, tuple[bytes, ...]] = {}
        for name, groups in self._inputs.items():
            closed = tuple(one.closed_by(mask).tobytes() for one in groups)
            constant = self._constant_of(name)
            for changed in (name,) if constant is None else (name, constant.tensor):
                found[changed] = (*found.get(changed, ()), *closed)
        return found

    def _constant_of(self, name: str) -> Constant | None:
        reader = None if self._readers is None else self._readers.get(name)
        return None if reader is None else reader.constant

    @contextlib.contextmanager
    def applied(self, mask: np.ndarray) -> Iterator[None]:
        """Use compensating weights for closed units inside the block, and restore the current weights afterwards.

        Args:
            mask: (num_units,) bool: units to keep; must have been passed to `prepare`.
        """
        tensors = named_tensors(self.model)
        saved: dict[str, Tensor] = {}
        try:
            for name, groups in self._inputs.items():
                for number, one in enumerate(groups):
                    weights = self._solution(name, number, one, mask)
                    if weights is not None:
                        self._put(tensors, saved, name, number, one, weights)
            yield
        finally:
            for name, values in saved.items():
                tensors[name].data.copy_(values)

    def _solution(self, name: str, number: int, one: _Layer, mask: np.ndarray) -> Tensor | None:
        """Like `_Layer.without`, with a cache of the latest solutions.

        Candidates differ by what a single group loses, so layers that read other groups are already solved.
        """
        closed = one.closed_by(mask)
        known = self._solutions.setdefault((name, number), {})
        key = closed.tobytes()
        if key in known:
            known[key] = known.pop(key)  # move to the end, as the most recent
        else:
            while len(known) >= _SOLUTIONS_KEPT:
                del known[next(iter(known))]
            known[key] = one.without(closed)
        return known[key]

    def _put(
        self,
        tensors: dict[str, Tensor],
        saved: dict[str, Tensor],
        name: str,
        number: int,
        one: _Layer,
        weights: Tensor,
    ) -> None:
        """Write the weights of one group of a contraction, and the constant if something can absorb it."""
        parameter = tensors[name].data
        saved.setdefault(name, parameter.clone())
        flat = parameter.flatten().clone()
        flat[one.positions.to(parameter.device).flatten()] = weights.to(parameter.dtype).flatten()
        parameter.copy_(flat.view_as(parameter))
        absorbing = self._constant_of(name)
        if absorbing is not None:
            constant = ((one.weights - weights) * one.mean[:, None]).sum(0) * absorbing.sign
            taker = tensors[absorbing.tensor].data
            saved.setdefault(absorbing.tensor, taker.clone())
            begin = number * len(constant)
            taker[begin : begin + len(constant)] += constant.to(taker.dtype)


class _Layer:
    """One group of one contraction, and its solutions.

    A single solution is a system as large as the kept part. If several are requested, UᵀU + λ·I is inverted first, at
    the cost of three such systems, and each of them is only as large as the removed part.

    Args:
        inputs: The layer's inputs.
        ridge: λ relative to the mean square of the inputs.
    """

    def __init__(self, inputs: UnitInputs, ridge: float) -> None:
        self.positions = inputs.positions
        self.weights = inputs.weights
        self.mean = inputs.mean
        self.units = inputs.units.numpy()
        self.gram: Tensor | None = inputs.gram  # None once it is inverted
        self.inverse: Tensor | None = None
        self._ridge = ridge
        self._asked: set[bytes] = set()

    def closed_by(self, mask: np.ndarray) -> np.ndarray:
        """Return the inputs, (K,) bool, whose units a cut closes."""
        closed: np.ndarray = (self.units >= 0) & ~mask[np.maximum(self.units, 0)]
        return closed

    def wants_several(self, masks: Iterable[np.ndarray]) -> bool:
        """Whether these cuts and earlier ones need more than one solution while UᵀU is not inverted yet."""
        closed = [self.closed_by(mask) for mask in masks]
        self._asked |= {one.tobytes() for one in closed if one.any() and not one.all()}
        return self.inverse is None and len(self._asked) > 1

    def without(self, closed: np.ndarray) -> Tensor | None:
        """Return the weights (K, M), zero for closed inputs; None if no input or every input is closed.

        If there is no solution, they are the current weights; this is decided without a host sync.

        Args:
            closed: (K,) bool, inputs of units that are closed.
        """
        if not closed.any() or closed.all():
            return None
        gone, stays = (
            torch.from_numpy(part.nonzero()[0]).to(self.weights.device) for part in (closed, ~closed)
        )
        return self._directly(gone, stays) if self.inverse is None else self._by_inverse(gone)

    def _directly(self, gone: Tensor, stays: Tensor) -> Tensor:
        assert self.gram is not None, "it is there until there is an inverse"
        gram = self.gram[stays][:, stays]
        load = self._ridge * self.gram.diagonal().mean()
        across = self.gram[stays][:, gone] @ self.weights[gone]
        identity = torch.eye(len(stays), dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(gram + load * identity)
        found = torch.zeros_like(self.weights)
        found[stays] = self.weights[stays] + torch.cholesky_solve(across, factor)
        return torch.where(info == 0, found, self.weights)

    def _by_inverse(self, gone: Tensor) -> Tensor:
        assert self.inverse is not None
        across = self.inverse[:, gone]
        factor, info = torch.linalg.cholesky_ex(across[gone])
        found = self.weights - across @ torch.cholesky_solve(self.weights[gone], factor)
        found[gone] = 0
        return torch.where(info == 0, found, self.weights)


def invert(layers: Sequence[_Layer], ridge: float) -> None:
    """Replace products UᵀU by their inverses, as many at a time as memory allows.

    There is one host sync per batch of products, not per layer.
    """
    waiting = [(one, one.gram) for one in layers if one.gram is not None]
    while waiting:
        size, count = 0, 0
        for _, gram in waiting:
            size += gram.nbytes
            if count and size > _INVERTED_AT_ONCE:
                break
            count += 1
        inverses = loaded_inverses([gram for _, gram in waiting[:count]], ridge)
        for (one, _), inverse in zip(waiting[:count], inverses, strict=True):
            one.inverse, one.gram = inverse, None
        del waiting[:count]
