"""Latency from a measured table: seconds per batch on this device, as a function of the widths.

    latency = fixed + scale · Σ_layers T_layer(out width, in width) + per_element · elements moved by the rest

Convolutions and linear layers are measured alone on a grid of widths, each distinct shape once, and interpolated
bilinearly; T is made monotone, since noise must not reward wider layers. Everything else (normalisation,
activations, pooling, additions, launching) is what the whole network takes beyond them: it has a fixed part and a
part in proportion to the elements read and written. Both, and the scale of the layers (in a network caches are
colder than alone), are fitted to measurements of the whole network at a few widths.

Tables are files in the cache, one per device, PyTorch version, precision, memory format, number of threads and
batch size. A table is plain data: rank 0 measures, the others get `to_plain()`.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.data.cache import atomic_path, cache_key, default_cache_dir, ensure_directory
from image_classification.environment import processor_name
from pruning.channel_graph import ChannelGraph
from pruning.costs.activations import Activations, Kernel
from pruning.costs.counts import CountTable, OnDevices
from pruning.costs.kernels import KernelBench, grid_widths
from pruning.costs.products import Products
from pruning.costs.timing import Stopwatch, inference, interleaved_medians
from pruning.surgery import prune_channels

logger = logging.getLogger(__name__)

_SHARES = (1.0, 0.75, 0.5)
_PRIOR_OF_SCALE = 0.05
_FEWEST_POINTS = 2
_FORMAT = 1


class LatencyError(ValueError):
    """A latency table that does not fit, or cannot be made."""


@dataclasses.dataclass(frozen=True)
class LatencySettings:
    """How to measure.

    Attributes:
        batch_size: Images per batch; None takes that of the example images.
        seconds: About how long measuring may take; the grid gets coarser and the repeats fewer to fit.
        points: Widths per dimension.
        repeats: Readings per entry, of which the median counts.
        cache_dir: Where tables are kept; None takes the cache directory.
        reuse: Take what the cache has; otherwise everything is measured again (and replaces it).
    """

    batch_size: int | None = None
    seconds: float = 60.0
    points: int = 4
    repeats: int = 7
    cache_dir: Path | None = None
    reuse: bool = True

    def __post_init__(self) -> None:
        if self.points < _FEWEST_POINTS or self.repeats < 3 or self.seconds <= 0:
            raise ValueError("latency table: give ≥ 2 points, ≥ 3 repeats and more than 0 seconds")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"latency table: batch size {self.batch_size} must be 1 or more")


@dataclasses.dataclass(frozen=True)
class Grid:
    """Seconds of one kernel at (out width, in width)."""

    out_widths: tuple[int, ...]
    in_widths: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class LatencyTable:
    """Everything that a prediction needs.

    Attributes:
        identity: Device, versions and settings it holds for.
        grids: Kernel shape → measured grid.
        layers: Name of a contraction in the network → kernel shape.
        fixed: Seconds that no width changes.
        scale: Seconds in the network per second measured alone.
        per_element: Seconds per element that the other operators move.
        anchors: (share of the widths, seconds measured, seconds predicted) of the whole network.
    """

    identity: Mapping[str, Any]
    grids: Mapping[str, Grid]
    layers: Mapping[str, str]
    fixed: float
    scale: float
    per_element: float
    anchors: tuple[tuple[float, float, float], ...]

    def to_plain(self) -> dict[str, Any]:
        """As JSON-able data."""
        plain = dataclasses.asdict(self)
        return {"format": _FORMAT, **json.loads(json.dumps(plain))}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> LatencyTable:
        """The table that `to_plain` described.

        Raises:
            LatencyError: It is no such description, or one of another version.
        """
        try:
            if plain["format"] != _FORMAT:
                raise LatencyError(f"latency table of format {plain['format']}; this version reads {_FORMAT}")
            return cls(
                identity=dict(plain["identity"]),
                grids={key: _grid_from(grid) for key, grid in plain["grids"].items()},
                layers=dict(plain["layers"]),
                fixed=float(plain["fixed"]),
                scale=float(plain["scale"]),
                per_element=float(plain["per_element"]),
                anchors=tuple((float(a), float(b), float(c)) for a, b, c in plain["anchors"]),
            )
        except (KeyError, TypeError) as error:
            raise LatencyError(f"not a latency table ({error!r}): measure it again") from error

    @property
    def digest(self) -> str:
        """Short name of the table's contents: equal on all ranks that predict alike."""
        return hashlib.sha256(json.dumps(self.to_plain(), sort_keys=True).encode()).hexdigest()[:16]


def _grid_from(plain: Mapping[str, Any]) -> Grid:
    rows = tuple(tuple(float(value) for value in row) for row in plain["seconds"])
    return Grid(tuple(plain["out_widths"]), tuple(plain["in_widths"]), rows)


# -- predicting --------------------------------------------------------------------------------------------


class Latency:
    """Seconds per batch from a table; a `Metric`.

    Raises:
        LatencyError: The table was made for another network.
    """

    def __init__(self, table: LatencyTable, activations: Activations, rows: CountTable) -> None:
        missing = [kernel.name for kernel in activations.kernels if kernel.name not in table.layers]
        if missing:
            raise LatencyError(
                f"the latency table does not know layer {missing[0].rpartition(':')[0]!r}: it was made for another "
                "network. Measure it again"
            )
        layers = [
            _Layer(table.grids[table.layers[k.name]], rows.row(k.out_units), rows.row(_in_units(k)))
            for k in activations.kernels
        ]
        terms = [
            (table.per_element * extent.factor, rows.rows(extent.vectors)) for extent in activations.traffic
        ]
        self._sum = _Sum(layers, Products(terms), table.fixed, table.scale)

    def evaluate(self, counts: Tensor) -> Tensor:
        """See `Metric`."""
        return self._sum.evaluate(counts)

    def part(self, rows: Tensor) -> _Sum:
        """See `Metric`."""
        return self._sum.part(rows)


def _in_units(kernel: Kernel) -> np.ndarray:
    """Layers that lose whole groups have no second dimension: it counts as 1."""
    return kernel.in_units if kernel.in_units.size else np.array([-1])


@dataclasses.dataclass(frozen=True)
class _Layer:
    grid: Grid
    out_row: int
    in_row: int


class _Sum:
    """fixed + scale · Σ interpolated layers + the rest."""

    def __init__(self, layers: list[_Layer], rest: Products, fixed: float, scale: float) -> None:
        self._layers, self._rest, self._fixed, self._scale = layers, rest, fixed, scale
        depth = 2 + max((max(len(x.grid.out_widths), len(x.grid.in_widths)) for x in layers), default=0)
        grids = [_padded(layer.grid, depth) for layer in layers]
        self._constants = OnDevices(
            out_rows=torch.tensor([layer.out_row for layer in layers], dtype=torch.int64),
            in_rows=torch.tensor([layer.in_row for layer in layers], dtype=torch.int64),
            out_widths=torch.stack([g[0] for g in grids]) if grids else torch.zeros(0, depth),
            in_widths=torch.stack([g[1] for g in grids]) if grids else torch.zeros(0, depth),
            seconds=torch.stack([g[2] for g in grids]).reshape(-1) if grids else torch.zeros(0),
        )
        self._depth = depth

    def evaluate(self, counts: Tensor) -> Tensor:
        """See `Metric`."""
        return self._fixed + self._scale * self.layers(counts).sum(-1) + self._rest.evaluate(counts)

    def part(self, rows: Tensor) -> _Sum:
        """See `Metric`."""
        touched = rows.tolist()
        layers = [layer for layer in self._layers if touched[layer.out_row] or touched[layer.in_row]]
        return _Sum(layers, self._rest.part(rows), 0.0, self._scale)

    def layers(self, counts: Tensor) -> Tensor:
        """Seconds of each layer alone, (..., layers), bilinear in its two widths."""
        c = self._constants.at(counts.device)
        i, u = _locate(counts[..., c["out_rows"]], c["out_widths"])
        j, v = _locate(counts[..., c["in_rows"]], c["in_widths"])
        corner = torch.arange(len(self._layers), device=counts.device) * self._depth**2 + i * self._depth + j
        table = c["seconds"]
        low = table[corner] * (1 - v) + table[corner + 1] * v
        high = table[corner + self._depth] * (1 - v) + table[corner + self._depth + 1] * v
        return (low * (1 - u) + high * u).clamp_min(0)


def _locate(widths: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Interval of each width, (..., layers), and where in it (0 … 1; less than 0 below the grid)."""
    inner = grid[:, 1:-1]
    index = (widths.detach().unsqueeze(-1) >= inner).sum(-1)
    layer = torch.arange(grid.shape[0], device=grid.device)
    low, high = grid[layer, index], grid[layer, index + 1]
    return index, (widths - low) / (high - low)


def _padded(grid: Grid, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """The grid at a common size, monotone: beyond its last width it stays level."""
    seconds = monotone(np.array(grid.seconds, dtype=np.float64))
    fill = [(0, depth - size) for size in seconds.shape]
    widths = []
    for axis, (_, more) in zip((grid.out_widths, grid.in_widths), fill, strict=True):
        widths.append(torch.tensor([*axis, *range(axis[-1] + 1, axis[-1] + 1 + more)], dtype=torch.float64))
    return widths[0], widths[1], torch.from_numpy(np.pad(seconds, fill, mode="edge"))


def monotone(seconds: np.ndarray) -> np.ndarray:
    """The mean of the smallest table above and the largest table below that never fall along any axis."""
    above, below = seconds, seconds
    for axis in range(seconds.ndim):
        above = np.maximum.accumulate(above, axis=axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis=axis), axis)
    return (above + below) / 2


# -- measuring ---------------------------------------------------------------------------------------------


def measure_latency(
    model: nn.Module,
    graph: ChannelGraph,
    images: tuple[Any, ...],
    activations: Activations,
    settings: LatencySettings,
    announce: Callable[[str], None] | None = None,
) -> LatencyTable:
    """Make the table for a network on this device, from the cache as far as that has it.

    Args:
        model, graph, images: The network, its graph, and its positional arguments at the size that counts.
        activations: Of the network at its present widths.
        settings: How to measure.
        announce: Gets a line of text as measuring goes on; by default the log does.
    """
    say = announce or logger.info
    batch_size = settings.batch_size or int(images[0].shape[0])
    identity = _identity(model, images, batch_size)
    store = _Store(settings, identity)
    step = graph.constraints.round_to
    layers = {k.name: _kernel_key(k, step) for k in activations.kernels}
    kernels = {layers[k.name]: k for k in activations.kernels}
    wanted = {key: kernel for key, kernel in kernels.items() if key not in store.grids}
    if wanted:
        store.add_grids(_measure_grids(model, wanted, identity, settings, step, say))
    grids = {key: store.grids[key] for key in sorted(kernels)}
    network = cache_key(
        sorted(layers.items()), [(e.factor, len(e.vectors)) for e in activations.traffic], grids
    )
    if network not in store.networks:
        bare = LatencyTable(identity, grids, layers, 0.0, 1.0, 0.0, ())
        store.add_network(network, _fit(model, graph, images, activations, bare, settings, say))
    return dataclasses.replace(
        LatencyTable(identity, grids, layers, 0.0, 1.0, 0.0, ()), **store.networks[network]
    )


def _identity(model: nn.Module, images: tuple[Any, ...], batch_size: int) -> dict[str, Any]:
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
        "image_shape": list(images[0].shape[1:]),
    }


def _is_channels_last(model: nn.Module) -> bool:
    weights = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)


def _kernel_key(kernel: Kernel, step: int) -> str:
    """Name of a shape: layers with equal names cost the same at equal widths."""
    changes = [bool(units.size and units.max() >= 0) for units in (kernel.out_units, _in_units(kernel))]
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
    bench = KernelBench(
        identity["batch_size"],
        parameter.device,
        parameter.dtype,
        identity["memory_format"] == "channels_last",
    )
    stopwatch = Stopwatch(parameter.device, many=True)
    kernels = list(wanted.values())
    with torch.no_grad():
        full = [(k, len(k.out_units), len(k.in_units)) for k in kernels]
        estimate = interleaved_medians(bench.prepare(full), stopwatch, 3, settings.seconds)
        points = _points_that_fit(estimate, kernels, settings, step)
        axes = {key: _axes(kernel, points, step) for key, kernel in wanted.items()}
        entries = [(wanted[key], o, i) for key, (outs, ins) in axes.items() for o in outs for i in ins]
        say(
            f"latency table: measuring {len(entries)} kernels of {len(kernels)} shapes on {identity['device']}"
        )
        begin = time.perf_counter()
        medians = iter(
            interleaved_medians(bench.prepare(entries), stopwatch, settings.repeats, settings.seconds)
        )
        say(f"latency table: measured in {time.perf_counter() - begin:.1f} s")
    return {
        key: Grid(
            tuple(outs), tuple(i or 1 for i in ins), tuple(tuple(next(medians) for _ in ins) for _ in outs)
        )
        for key, (outs, ins) in axes.items()
    }


def _axes(kernel: Kernel, points: int, step: int) -> tuple[list[int], list[int]]:
    """Widths to measure; those of grouped layers stay such that all groups are equally wide."""
    groups = kernel.geometry.get("groups", 1)
    if kernel.in_units.size:
        out_widths = grid_widths(kernel.out_units, points, math.lcm(step, groups))
        return out_widths, grid_widths(kernel.in_units, points, step)
    per_group = kernel.geometry["weight"][0] // groups
    return grid_widths(kernel.out_units, points, math.lcm(step, per_group)), [0]


def _points_that_fit(
    estimate: Sequence[float], kernels: Sequence[Kernel], settings: LatencySettings, step: int
) -> int:
    """The most points per dimension at which three rounds fit into the time."""
    for points in range(settings.points, _FEWEST_POINTS, -1):
        total = 0.0
        for seconds, kernel in zip(estimate, kernels, strict=True):
            outs, ins = _axes(kernel, points, step)
            share = sum(outs) / outs[-1] * (sum(ins) / ins[-1] if ins[-1] else 1)
            total += seconds * share
        if 4 * total <= settings.seconds:
            return points
    return _FEWEST_POINTS


# -- the whole network -------------------------------------------------------------------------------------


def pruned_copy(model: nn.Module, graph: ChannelGraph, mask: np.ndarray) -> nn.Module:
    """A copy of the network, really smaller; the network and its graph stay as they are.

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
    images: tuple[Any, ...],
    settings: LatencySettings,
    seconds: float | None = None,
) -> list[float]:
    """Median seconds per batch of whole networks, taking turns.

    Args:
        models: Networks for the same input.
        images: Positional arguments; the first dimension is repeated or cut to the batch size.
        settings: Batch size and repeats.
        seconds: Time to spend; by default half the settings'.
    """
    batch_size = settings.batch_size or int(images[0].shape[0])
    arguments = tuple(_batch_of(a, images[0].shape[0], batch_size) for a in images)
    if _is_channels_last(models[0]):
        arguments = tuple(
            a.contiguous(memory_format=torch.channels_last) if isinstance(a, Tensor) and a.dim() == 4 else a
            for a in arguments
        )
    device = next(iter(models[0].parameters())).device
    calls = [lambda model=model: model(*arguments) for model in models]
    with inference(*models):
        budget = settings.seconds / 2 if seconds is None else seconds
        return interleaved_medians(calls, Stopwatch(device), max(5, settings.repeats), budget)


def _batch_of(argument: Any, present: int, batch_size: int) -> Any:
    if not isinstance(argument, Tensor) or argument.dim() == 0 or argument.shape[0] != present:
        return argument
    times = -(-batch_size // present)
    return argument.repeat(times, *[1] * (argument.dim() - 1))[:batch_size]


def _fit(
    model: nn.Module,
    graph: ChannelGraph,
    images: tuple[Any, ...],
    activations: Activations,
    bare: LatencyTable,
    settings: LatencySettings,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Fixed part, scale and price per element from the whole network at a few widths."""
    masks = [_first_share(graph, share) for share in _SHARES]
    networks = [model, *(pruned_copy(model, graph, mask) for mask in masks[1:])]
    measured = measure_networks(networks, images, settings)
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
    """Every group keeps about this share of its units; odd numbers where widths are not rounded (as in the grids)."""
    mask = np.ones(graph.num_units, dtype=bool)
    for group in graph.prunable if share < 1 else ():
        widths = np.array(graph.allowed_widths(group))
        if graph.constraints.round_to == 1 and (widths % 2 == 1).any():
            widths = widths[widths % 2 == 1]
        mask[group.units[widths[np.abs(widths - share * group.width).argmin()] :]] = False
    return mask


def fit_parts(measured: np.ndarray, alone: np.ndarray, moved: np.ndarray) -> tuple[float, float, float]:
    """Non-negative (fixed, scale, per_element) with measured ≈ fixed + scale · alone + per_element · moved.

    Least squares of relative errors, with a weak pull of the scale towards 1: with three or fewer measurements that
    nearly lie on a line the parts could not be told apart otherwise. All sets of parts that are not zero are tried.

    Args:
        measured: (n,) seconds of the whole network.
        alone: (n,) seconds of its layers alone.
        moved: (n,) elements that the other operators move.
    """
    unit = max(float(moved.max(initial=0.0)), 1e-30) / float(measured.max())
    columns = (
        np.stack([np.ones_like(measured) * measured.max(), alone, moved / unit], axis=1) / measured[:, None]
    )
    matrix = np.vstack([columns, [0.0, _PRIOR_OF_SCALE, 0.0]])
    target = np.append(np.ones_like(measured), _PRIOR_OF_SCALE)
    best, best_error = np.zeros(3), math.inf
    for size in range(1, 4):
        for active in itertools.combinations(range(3), size):
            solution = np.zeros(3)
            solution[list(active)] = np.linalg.lstsq(matrix[:, active], target, rcond=None)[0]
            error = float(((matrix @ solution - target) ** 2).sum())
            if solution.min() >= 0 and error < best_error - 1e-15:
                best, best_error = solution, error
    return float(best[0] * measured.max()), float(best[1]), float(best[2] / unit)


# -- the cache ---------------------------------------------------------------------------------------------


class _Store:
    """What was measured on this device before: one JSON file per identity."""

    def __init__(self, settings: LatencySettings, identity: Mapping[str, Any]) -> None:
        directory = (settings.cache_dir or default_cache_dir()) / "latency"
        ensure_directory(directory)
        self._path = directory / f"{cache_key(sorted(identity.items()))}.json"
        self._identity = identity
        self.grids: dict[str, Grid] = {}
        self.networks: dict[str, dict[str, Any]] = {}
        if settings.reuse and self._path.is_file():
            self._load()

    def _load(self) -> None:
        try:
            plain = json.loads(self._path.read_text())
            if plain["format"] == _FORMAT:
                self.grids = {key: _grid_from(grid) for key, grid in plain["grids"].items()}
                self.networks = {key: _parts_from(parts) for key, parts in plain["networks"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            logger.warning("latency table %s cannot be read (%r): measuring again", self._path, error)
            self.grids, self.networks = {}, {}

    def add_grids(self, grids: Mapping[str, Grid]) -> None:
        self.grids.update(grids)
        self._save()

    def add_network(self, key: str, parts: dict[str, Any]) -> None:
        self.networks[key] = parts
        self._save()

    def _save(self) -> None:
        plain = {
            "format": _FORMAT,
            "identity": dict(self._identity),
            "grids": {key: dataclasses.asdict(grid) for key, grid in sorted(self.grids.items())},
            "networks": self.networks,
        }
        with atomic_path(self._path) as unfinished:
            unfinished.write_text(json.dumps(plain, indent=1))


def _parts_from(plain: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: float(plain[key]) for key in ("fixed", "scale", "per_element")}
    return {**numbers, "anchors": tuple(tuple(float(x) for x in anchor) for anchor in plain["anchors"])}
