"""How a cut would do if it were repaired, without making it: weights that take up what closed units said.

Each layer that reads closed units gets, for a while, the weights of the least-squares solution with its inputs as they
are now:

    W_S* = W_S + (U_Sᵀ U_S + λ·I)⁻¹ U_Sᵀ U_R · W_R          S: what stays, R: what goes

The products UᵀU are collected once and serve every candidate. Layers further on are not solved for, as the real repair
does (`repair_wave.py`): this is what a search can afford for each candidate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.distributed import Distributed
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.tracing import named_tensors
from pruning.repair.elimination import DEFAULT_RIDGE
from pruning.repair.survey import Reader, survey
from pruning.repair.unit_inputs import UnitInputs, reading_units, unit_inputs
from pruning.task import Batch, Task, num_samples

_SOLUTIONS_KEPT = 2  # of each layer: with the units that are closed by now, and with those of a candidate


class LocalRepair:
    """Repairs of candidate cuts of a network that is not cut.

    Args:
        model: The network; its weights are as before outside of `applied`.
        graph: Its channel graph.
        batches: This rank's calibration batches, on the network's device.
        task: How the network is run on a batch.
        distributed: Sums are added up over ranks.
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
        self._inputs: dict[str, list[UnitInputs]] = {}
        self._solutions: dict[tuple[str, int], dict[bytes, Tensor | None]] = {}
        self._looked: set[str] = set()
        self._readers: dict[str, Reader] | None = None

    def prepare(self, masks: Iterable[np.ndarray]) -> None:
        """Collect what is not known yet of the layers that these cuts concern, in one pass. Collective.

        Args:
            masks: (num_units,) bool: what stays.
        """
        closed = [np.flatnonzero(~mask) for mask in masks]
        units = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *closed]))
        wanted = reading_units(self.graph, units) - self._looked
        if not wanted:
            return
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
            self._inputs.setdefault(one.parameter, []).append(one)
        if self._readers is None and self.batches:
            batch = self.batches[0]
            with self.task.running(self.model):
                self._readers = survey(
                    self.model, lambda: self.task.outputs(self.model, batch), num_samples(batch)
                )

    @contextlib.contextmanager
    def applied(self, mask: np.ndarray) -> Iterator[None]:
        """The weights that take up what closed units said; the present ones again afterwards.

        Args:
            mask: (num_units,) bool: what stays. Known to `prepare`.
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

    def _solution(self, name: str, number: int, one: UnitInputs, mask: np.ndarray) -> Tensor | None:
        """As `_solved`, with the latest solutions of a layer at hand.

        Candidates differ by what one group loses: the layers that read others are solved for already.
        """
        units = one.units.numpy()
        closed = (units >= 0) & ~mask[np.maximum(units, 0)]
        known = self._solutions.setdefault((name, number), {})
        key = closed.tobytes()
        if key in known:
            known[key] = known.pop(key)  # the latest one stands last
        else:
            while len(known) >= _SOLUTIONS_KEPT:
                del known[next(iter(known))]
            known[key] = _solved(one, closed, self.ridge)
        return known[key]

    def _put(
        self,
        tensors: dict[str, Tensor],
        saved: dict[str, Tensor],
        name: str,
        number: int,
        one: UnitInputs,
        weights: Tensor,
    ) -> None:
        """Write the weights of one group of a contraction, and the constant where it can be taken up."""
        parameter = tensors[name].data
        saved.setdefault(name, parameter.clone())
        flat = parameter.flatten().clone()
        flat[one.positions.to(parameter.device).flatten()] = weights.to(parameter.dtype).flatten()
        parameter.copy_(flat.view_as(parameter))
        reader = None if self._readers is None else self._readers.get(name)
        if reader is not None and reader.constant is not None:
            constant = ((one.weights - weights) * one.mean[:, None]).sum(0) * reader.constant.sign
            taker = tensors[reader.constant.tensor].data
            saved.setdefault(reader.constant.tensor, taker.clone())
            begin = number * len(constant)
            taker[begin : begin + len(constant)] += constant.to(taker.dtype)


def _solved(inputs: UnitInputs, closed: np.ndarray, ridge: float) -> Tensor | None:
    """(K, M) weights, zeros for closed inputs; None if none or all are closed, or there is no solution."""
    if not closed.any() or closed.all():
        return None
    device = inputs.gram.device
    gone, stays = (torch.from_numpy(part.nonzero()[0]).to(device) for part in (closed, ~closed))
    gram = inputs.gram[stays][:, stays]
    load = ridge * inputs.gram.diagonal().mean()
    across = inputs.gram[stays][:, gone] @ inputs.weights[gone]
    identity = torch.eye(len(stays), dtype=gram.dtype, device=device)
    factor, info = torch.linalg.cholesky_ex(gram + load * identity)
    if int(info):
        return None
    found = torch.zeros_like(inputs.weights)
    found[stays] = inputs.weights[stays] + torch.cholesky_solve(across, factor)
    return found
