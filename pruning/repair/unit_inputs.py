"""Input statistics of every contraction that reads units: the products of its inputs.

One pass over calibration batches yields, per contraction, the means and the centred UᵀU of its rows, and the unit of
each column (a 3 × 3 kernel has nine columns per unit). With the current weights, this tells how well the other units
can replace some of them (`elimination.py`), and with which weights (`local_repair.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.config import SettingError, check_setting
from image_classification.distributed import Distributed
from image_classification.models.modes import exact_float32
from pruning.engine.channel_graph import ChannelGraph
from pruning.repair.contractions import Contraction, ContractionMode
from pruning.repair.sums import WIDE, Sums, step_for
from pruning.task import Batch, Task, num_samples

#: Largest number of columns of a contraction for which products are kept; wider ones are left as the cut leaves them.
WIDEST = 4 * WIDE


@dataclasses.dataclass(frozen=True)
class UnitInputs:
    """Input statistics of one group of one contraction.

    Attributes:
        parameter: Name of the weights.
        positions: (K, M) elements of the flattened parameter.
        units: (K,) unit of every column; −1 for columns without a unit.
        gram: (K, K) float64 mean of centred UᵀU over rows.
        mean: (K,) float64.
        weights: (K, M) float64, the current weights.
        variance: Variance of the outputs, summed over all outputs of all groups of the contraction.
    """

    parameter: str
    positions: Tensor
    units: Tensor
    gram: Tensor
    mean: Tensor
    weights: Tensor
    variance: Tensor


def reading_units(graph: ChannelGraph, units: np.ndarray | None = None) -> set[str]:
    """Return the parameters that read some of these units; by default of those that may be removed."""
    if units is None:
        units = np.concatenate([np.zeros(0, dtype=np.int64), *(group.units for group in graph.prunable)])
    found: set[str] = set()
    for axis in graph.axes:
        if axis.role == "in" and np.isin(axis.units, units).any():
            found.add(axis.tensor)
    return found


@torch.no_grad()
def unit_inputs(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Sequence[Batch],
    parameters: Collection[str],
    *,
    task: Task | None = None,
    distributed: Distributed | None = None,
    strict: bool = True,
) -> list[UnitInputs]:
    """Collect the inputs of some contractions in one pass over the batches. Collective.

    Args:
        model: The network; run in evaluation mode and not modified.
        graph: Its channel graph.
        batches: This rank's calibration batches on the network's device.
        parameters: Names of the parameters whose contractions are collected.
        task: How the network is run on a batch.
        distributed: Ranks to sum over.
        strict: Refuse inputs that are not finite; otherwise their contraction is left out, and so are all contractions
            if a rank has no images.

    Raises:
        SettingError: Inputs are not finite, or a rank has no images and so does not know what to sum.
    """
    distributed = distributed or Distributed()
    without = distributed.sum_on_hosts(not any(num_samples(batch) for batch in batches))
    if without and not strict:
        return []
    if without:
        on_ranks = f" on {without} of {distributed.world_size} ranks" if distributed.is_distributed else ""
        raise SettingError(
            "calibration",
            None,
            f"what layers read is collected on every rank, and there are no images{on_ranks}: give each some",
        )
    read = _rows_read(model, batches, parameters, task or Task(), distributed.world_size)
    tensors = dict(model.named_parameters())
    names = sorted(read)
    for name in names:
        read[name][1].reduce(distributed)
    all_finite = [read[name][1].gram.isfinite().all() for name in names]
    found: list[UnitInputs] = []
    for name, finite in zip(names, torch.stack(all_finite).tolist() if names else [], strict=True):
        contraction, sums = read[name]
        if not finite and not strict:
            continue
        check_setting(
            finite,
            "calibration",
            None,
            f"what {name} reads of the calibration images is not finite: the network has diverged, or they hold NaN",
        )
        found += _of_contraction(graph, contraction, sums, tensors[name].detach())
    return found


def _rows_read(
    model: nn.Module, batches: Sequence[Batch], parameters: Collection[str], task: Task, world_size: int
) -> dict[str, tuple[Contraction, Sums]]:
    """Return parameter → its contraction, and the sums over the rows it reads in this rank's batches."""
    read: dict[str, tuple[Contraction, Sums]] = {}

    def visit(contraction: Contraction, compute: Callable[[], Tensor]) -> Tensor:
        output = compute()
        groups, inputs, _ = contraction.positions.shape
        if inputs <= WIDEST:
            num_rows = contraction.outputs(output, 1).shape[1] * len(batches) * world_size
            rows = contraction.rows(step_for(num_rows, inputs, contraction.num_dims))
            if contraction.parameter not in read:
                read[contraction.parameter] = contraction, Sums.zeros(groups, inputs, 0, rows.device)
            read[contraction.parameter][1].add(rows, rows[..., :0])
        return output

    with task.running(model), exact_float32():
        numbers: dict[str, Tensor] = {}
        for batch in filter(num_samples, batches):
            with ContractionMode(model, visit, parameters, numbers):
                task.outputs(model, batch)
    return read


def _of_contraction(
    graph: ChannelGraph, contraction: Contraction, sums: Sums, weight: Tensor
) -> list[UnitInputs]:
    """Return one entry per group of the contraction."""
    name = contraction.parameter
    positions = contraction.positions
    units = _units_of_elements(graph, name, weight)[positions[:, :, 0].long()]
    gram = sums.centred()[0] / sums.num_rows
    mean = sums.inputs / sums.num_rows
    weights = weight.flatten()[positions.to(weight.device)].double()
    variance = (weights * (gram @ weights)).sum()
    return [
        UnitInputs(name, positions[g], units[g], gram[g], mean[g], weights[g], variance)
        for g in range(len(positions))
    ]


def _units_of_elements(graph: ChannelGraph, name: str, weight: Tensor) -> Tensor:
    """Return the unit read by every element of a weight, (numel,); −1 for none."""
    found = torch.full(weight.shape, -1)
    for axis in graph.axes:
        if axis.role == "in" and name in axis.aliases:
            shape = [1] * weight.dim()
            shape[axis.dim] = -1
            units = torch.from_numpy(axis.units).reshape(shape).expand(weight.shape)
            found = torch.where(units >= 0, units, found)
    return found.flatten()
