"""Measurements behind `latency`: isolated layers on a grid of widths, and the whole network at a few widths.

The whole network gives the fixed part, the time per element of everything that is not a layer, and the scale of the
layers (caches are colder inside a network than for an isolated layer).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.cache import cache_key
from image_classification.models import inference
from image_classification.observe.environment import processor_name
from pruning.costs.activations import Activations, Kernel
from pruning.costs.counts import CountTable
from pruning.costs.kernels import KernelBench, grid_widths
from pruning.costs.latency import Latency, in_units_of
from pruning.costs.latency_table import (
    FEWEST_POINTS,
    FEWEST_REPEATS,
    FittedParts,
    Grid,
    LatencyError,
    LatencySettings,
    LatencyTable,
    TableCache,
)
from pruning.costs.product_costs import Products
from pruning.costs.timing import Stopwatch, interleaved_medians
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.examples import Example
from pruning.engine.surgery import prune_channels

logger = logging.getLogger(__name__)

_SHARES = (1.0, 0.75, 0.5)
_PRIOR_OF_SCALE = 0.05


def measure_latency(
    model: nn.Module,
    graph: ChannelGraph,
    example: Example,
    activations: Activations,
    settings: LatencySettings,
    announce: Callable[[str], None] | None = None,
) -> LatencyTable:
    """Measure the table for a network on this device, reusing cached measurements.

    Args:
        model, graph, example: The network, its graph, and its arguments at the size of interest.
        activations: Activations of the network at its current widths.
        settings: How to measure.
        announce: Called with lines of text on the progress of measuring; by default they are logged.
    """
    say = announce or logger.info
    batch_size = settings.batch_size or _batch_size(example)
    identity = _identity(model, example, batch_size)
    if settings.autocast is not None:
        identity["autocast"] = settings.autocast
    store = TableCache(settings, identity)
    step = graph.constraints.round_to
    layers = {kernel.name: _kernel_key(kernel, step) for kernel in activations.kernels}
    kernels = {layers[kernel.name]: kernel for kernel in activations.kernels}
    wanted = {key: kernel for key, kernel in kernels.items() if key not in store.grids}
    if wanted:
        store.add_grids(_measure_grids(model, wanted, identity, settings, step, say))
    grids = {key: store.grids[key] for key in sorted(kernels)}
    network = cache_key(
        sorted(layers.items()), [(e.factor, len(e.vectors)) for e in activations.traffic], grids
    )
    layers_alone = LatencyTable(identity, grids, layers, fixed=0.0, scale=1.0, per_element=0.0, anchors=())
    if network not in store.networks:
        store.add_network(network, _fit(model, graph, example, activations, layers_alone, settings, say))
    return dataclasses.replace(layers_alone, **store.networks[network])


def _identity(model: nn.Module, example: Example, batch_size: int) -> dict[str, Any]:
    parameter = next(iter(model.parameters()))
    device = parameter.device
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor_name(),
        "device_type": device.type,
        "torch": torch.__version__,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "memory_format": "channels_last" if _is_channels_last(model) else "contiguous",
        "threads": 0 if cuda else torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "batch_size": batch_size,
        "image_shape": list(example.tensors[0].shape[1:]),
    }


def _is_channels_last(model: nn.Module) -> bool:
    weights = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)


def _kernel_key(kernel: Kernel, step: int) -> str:
    """Return a name for a kernel's shape: layers with equal names cost the same at equal widths."""
    changes = [bool(units.size and units.max() >= 0) for units in (kernel.out_units, in_units_of(kernel))]
    return json.dumps(
        {**kernel.geometry, "rows": kernel.rows, "changes": changes, "step": step}, sort_keys=True
    )


def _measure_grids(
    model: nn.Module,
    wanted: Mapping[str, Kernel],
    identity: Mapping[str, Any],
    settings: LatencySettings,
    step: int,
    say: Callable[[str], None],
) -> dict[str, Grid]:
    parameter = next(iter(model.parameters()))
    channels_last = identity["memory_format"] == "channels_last"
    dtype = parameter.dtype if settings.autocast is None else getattr(torch, settings.autocast)
    bench = KernelBench(identity["batch_size"], parameter.device, dtype, channels_last)
    stopwatch = Stopwatch(parameter.device, many=True)
    kernels = list(wanted.values())
    with torch.no_grad():
        full = [(kernel, len(kernel.out_units), len(kernel.in_units)) for kernel in kernels]
        estimate = interleaved_medians(bench.prepare(full), stopwatch, FEWEST_REPEATS, settings.seconds)
        points = _points_that_fit(estimate, kernels, settings, step)
        axes = {key: _axes(kernel, points, step) for key, kernel in wanted.items()}
        entries = [(wanted[key], o, i) for key, (outs, ins) in axes.items() for o in outs for i in ins]
        say(
            f"latency table: measuring {len(entries)} kernels of {len(kernels)} shapes on {identity['device']}"
        )
        begin = time.perf_counter()
        calls = bench.prepare(entries)
        medians = interleaved_medians(calls, stopwatch, settings.repeats, settings.seconds)
        say(f"latency table: measured in {time.perf_counter() - begin:.1f} s")
    return _as_grids(axes, medians)


def _as_grids(axes: Mapping[str, tuple[list[int], list[int]]], medians: Sequence[float]) -> dict[str, Grid]:
    """Arrange the seconds of all entries, grid after grid and row by row, as a grid per kernel."""
    grids = {}
    start = 0
    for key, (outs, ins) in axes.items():
        rows = []
        for _ in outs:
            rows.append(tuple(medians[start : start + len(ins)]))
            start += len(ins)
        in_widths = tuple(width or 1 for width in ins)  # 0: the layer has no second width; counts as 1
        grids[key] = Grid(tuple(outs), in_widths, tuple(rows))
    return grids


def _axes(kernel: Kernel, points: int, step: int) -> tuple[list[int], list[int]]:
    """Return the widths to measure; those of grouped layers keep all groups equally wide."""
    groups = kernel.geometry.get("groups", 1)
    if kernel.in_units.size:
        out_widths = grid_widths(kernel.out_units, points, math.lcm(step, groups))
        return out_widths, grid_widths(kernel.in_units, points, step)
    per_group = kernel.geometry["weight"][0] // groups
    return grid_widths(kernel.out_units, points, math.lcm(step, per_group)), [0]


def _points_that_fit(
    estimate: Sequence[float], kernels: Sequence[Kernel], settings: LatencySettings, step: int
) -> int:
    """Return the largest number of points per dimension for which three rounds fit into the time."""
    for points in range(settings.points, FEWEST_POINTS, -1):
        total = 0.0
        for seconds, kernel in zip(estimate, kernels, strict=True):
            outs, ins = _axes(kernel, points, step)
            share = sum(outs) / outs[-1] * (sum(ins) / ins[-1] if ins[-1] else 1)
            total += seconds * share
        if 4 * total <= settings.seconds:
            return points
    return FEWEST_POINTS


def pruned_copy(model: nn.Module, graph: ChannelGraph, mask: np.ndarray) -> nn.Module:
    """Return a pruned copy of the network; the network and its graph are not modified.

    Raises:
        LatencyError: The network cannot be copied.
    """
    try:
        smaller = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise LatencyError(
            f"latency needs a copy of the network to measure it at other widths, and {type(model).__name__} cannot "
            f"be copied ({error}): use another cost, such as macs"
        ) from error
    smaller.requires_grad_(False)
    keep = {
        group.index: np.flatnonzero(mask[group.units])
        for group in graph.groups
        if not mask[group.units].all()
    }
    prune_channels(smaller, copy.deepcopy(graph), keep)
    return smaller


def measure_networks(
    models: Sequence[nn.Module],
    example: Example,
    settings: LatencySettings,
    seconds: float | None = None,
) -> list[float]:
    """Return median seconds per batch of whole networks, measured in turns.

    Args:
        models: Networks for the same input.
        example: Their arguments; the first dimension is repeated or cut to the batch size.
        settings: Batch size and repeats.
        seconds: Time to spend; by default half the settings'.
    """
    present, last = _batch_size(example), _is_channels_last(models[0])
    resized = functools.partial(_batch_of, present=present, batch_size=settings.batch_size or present)
    batch = example.map(lambda tensor: _last(resized(tensor)) if last else resized(tensor))
    device = next(iter(models[0].parameters())).device
    calls = [functools.partial(batch.run, model) for model in models]
    with inference(*models), _autocast(settings, device):
        budget = settings.seconds / 2 if seconds is None else seconds
        return interleaved_medians(calls, Stopwatch(device), max(5, settings.repeats), budget)


def _autocast(settings: LatencySettings, device: torch.device) -> AbstractContextManager[object]:
    if settings.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, settings.autocast))


def autocast_type(autocast: Callable[[], AbstractContextManager[object]], device: torch.device) -> str | None:
    """Return the dtype of a job's autocast context, for `LatencySettings`; None if autocast is off."""
    with autocast():
        if not torch.is_autocast_enabled(device.type):
            return None
        return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")


def _batch_size(example: Example) -> int:
    return int(example.tensors[0].shape[0])


def _batch_of(tensor: Tensor, present: int, batch_size: int) -> Tensor:
    if tensor.dim() == 0 or tensor.shape[0] != present:
        return tensor
    times = -(-batch_size // present)
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))[:batch_size]


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _fit(
    model: nn.Module,
    graph: ChannelGraph,
    example: Example,
    activations: Activations,
    bare: LatencyTable,
    settings: LatencySettings,
    say: Callable[[str], None],
) -> FittedParts:
    """Fit fixed part, scale and time per element to the whole network at a few widths.

    Args:
        model, graph, example, activations, settings, say: As for `measure_latency`.
        bare: The table of its isolated layers.
    """
    masks = [_first_share(graph, share) for share in _SHARES]
    networks = [model, *(pruned_copy(model, graph, mask) for mask in masks[1:])]
    measured = measure_networks(networks, example, settings)
    rows = CountTable()
    latency = Latency(bare, activations, rows)
    elements = Products((extent.factor, rows.rows(extent.vectors)) for extent in activations.traffic)
    rows.settle(graph)
    counts = rows.counts(torch.stack([rows.kept_per_class(mask) for mask in masks]))
    alone, moved = latency.evaluate(counts).numpy(), elements.evaluate(counts).numpy()
    fixed, scale, per_element = fit_parts(np.array(measured), alone, moved)
    predicted = fixed + scale * alone + per_element * moved
    say(
        f"latency table: the network takes {measured[0] * 1e3:.2f} ms per batch of {bare.identity['batch_size']}, "
        f"its layers alone {alone[0] * 1e3:.2f} ms"
    )
    anchors = tuple(zip(_SHARES, measured, predicted.tolist(), strict=True))
    return {"fixed": fixed, "scale": scale, "per_element": per_element, "anchors": anchors}


def _first_share(graph: ChannelGraph, share: float) -> np.ndarray:
    """Keep about this share of every group's units; odd numbers if widths are not rounded (as in the grids)."""
    mask = np.ones(graph.num_units, dtype=bool)
    for group in graph.prunable if share < 1 else ():
        widths = np.array(graph.allowed_widths(group))
        if graph.constraints.round_to == 1 and (widths % 2 == 1).any():
            widths = widths[widths % 2 == 1]
        mask[group.units[widths[np.abs(widths - share * group.width).argmin()] :]] = False
    return mask


def fit_parts(measured: np.ndarray, alone: np.ndarray, moved: np.ndarray) -> tuple[float, float, float]:
    """Fit non-negative (fixed, scale, per_element) with measured ≈ fixed + scale · alone + per_element · moved.

    Least squares of relative errors, with a weak pull of the scale towards 1: otherwise, three or fewer nearly
    collinear measurements could not separate the parts. All choices of non-zero parts are tried.

    Args:
        measured: (n,) seconds of the whole network.
        alone: (n,) seconds of its isolated layers.
        moved: (n,) elements that the other operators move.
    """
    # One equation per measurement, divided by the measured value, in units that give the three parts similar
    # magnitudes; and one more equation that pulls the scale towards 1.
    unit = max(float(moved.max(initial=0.0)), 1e-30) / float(measured.max())
    parts = np.stack([np.ones_like(measured) * measured.max(), alone, moved / unit], axis=1)
    matrix = np.vstack([parts / measured[:, None], [0.0, _PRIOR_OF_SCALE, 0.0]])
    target = np.append(np.ones_like(measured), _PRIOR_OF_SCALE)

    best = np.zeros(3)
    best_error = math.inf
    for size in range(1, 4):
        for active in itertools.combinations(range(3), size):
            solution = np.zeros(3)
            solution[list(active)] = np.linalg.lstsq(matrix[:, active], target, rcond=None)[0]
            error = float(((matrix @ solution - target) ** 2).sum())
            if solution.min() >= 0 and error < best_error - 1e-15:
                best, best_error = solution, error
    return float(best[0] * measured.max()), float(best[1]), float(best[2] / unit)
