"""Multiplicative gates on coupled channels, by hooks that cannot leak.

A gate multiplies what the consumers of a group read: every convolution or linear layer sees `m_c · x_c`. With
gates of 0 and 1 the network computes what it would compute without the closed channels (statistics over
channels included); derivatives with respect to the gates are channel scores; gates that learn choose widths.

    with Gates(model, graph) as gates:
        gates.set_keep({"layer1.0.conv1": [0, 2, 3]})
        logits = model(images)              # as if the other channels were gone
    # no hook is left

Channels that an operator outside of any layer reads (`einsum` with a parameter, a product in a `forward`) have
no layer's input to be gated at. Their slices of the network's parameters are multiplied instead, for the
length of a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning.channel_graph import ChannelGraph, GroupKey, Keep
from pruning.groups import Place
from pruning.statistics import StatisticsOverKept


class Gates:
    """Gates on groups of a network, as a context manager.

    Args:
        model: The network that the graph belongs to.
        graph: Its channel graph. Do not rewrite the network while gates are attached.
        groups: Which groups get gates; all prunable ones by default.
        per_sample: With a batch size N every sample has gates of its own, so that one backward pass gives
            derivatives per sample: `values` is (N, num_units).

    Attributes:
        values: (num_units,) or (N, num_units) float32 gates by unit id, 1 at first. Assign a tensor (a leaf
            that requires grad, or one computed from learned parameters) to use it from the next forward on.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        groups: Iterable[GroupKey] | None = None,
        per_sample: int | None = None,
    ) -> None:
        first = next(model.parameters())
        self._model, self._graph = model, graph
        self._groups = graph.prunable if groups is None else [graph.group(key) for key in groups]
        shape = (graph.num_units,) if per_sample is None else (per_sample, graph.num_units)
        self.values = torch.ones(shape, device=first.device)
        self._handles: list[Any] = []
        self._calls: dict[str, int] = {}
        self._statistics: StatisticsOverKept | None = None
        self._weights: list[tuple[nn.Module, str, int, Tensor]] = []
        self._originals: list[tuple[nn.Module, str, nn.Parameter]] = []

    def __getitem__(self, group: GroupKey) -> Tensor:
        """Gates of one group: (width,) or (N, width)."""
        units = torch.from_numpy(self._graph.group(group).units).to(self.values.device)
        return self.values.index_select(-1, units)

    def set_keep(self, keep: Keep) -> None:
        """Gates of 1 for the units that stay and 0 for the others; groups not mentioned are open.

        Raises:
            ValueError: As `ChannelGraph.keep_mask`.
        """
        self.set_mask(self._graph.keep_mask(keep))

    def set_mask(self, mask: np.ndarray) -> None:
        """As `set_keep`, from a boolean vector over unit ids."""
        values = torch.from_numpy(mask.astype(np.float32)).to(self.values.device)
        self.values = values.expand_as(self.values).clone()
        if self._graph.statistics:
            self._statistics = StatisticsOverKept(self._graph.statistics, mask)

    def reset(self) -> None:
        """Open all gates."""
        self.values = torch.ones_like(self.values, requires_grad=False)
        self._statistics = None

    def __enter__(self) -> Gates:
        modules = dict(self._model.named_modules())
        for name, places in self._places().items():
            handle = modules[name].register_forward_pre_hook(self._hook(name, places), with_kwargs=True)
            self._handles.append(handle)
        self._weights = self._gated_weights()
        self._handles.append(self._model.register_forward_pre_hook(self._start))
        self._handles.append(self._model.register_forward_hook(self._finish, always_call=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore_weights()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _gated_weights(self) -> list[tuple[nn.Module, str, int, Tensor]]:
        """(module, parameter, dimension, gate of every slice) for channels that no layer's input shows."""
        indices = {group.index for group in self._groups}
        groups = [i for i in self._graph.groups_in(self._graph.ungated) if i in indices]
        found = []
        parameters = dict(self._model.named_parameters())
        for axis in self._graph.axes:
            valid = np.maximum(axis.units, 0)
            inside = (axis.units >= 0) & np.isin(self._graph.group_of_unit[valid], groups)
            if inside.any() and axis.tensor in parameters:
                index = torch.from_numpy(np.where(inside, axis.units, self._graph.num_units))
                for alias in axis.aliases:
                    owner, _, name = alias.rpartition(".")
                    found.append(
                        (self._model.get_submodule(owner), name, axis.dim, index.to(self.values.device))
                    )
        return found

    def _replace_weights(self) -> None:
        for module, name, dim, index in self._weights:
            current = getattr(module, name)
            if isinstance(current, nn.Parameter):
                self._originals.append((module, name, current))
                del module._parameters[name]
            gate = self._gate_of(index).to(current.dtype)
            module.__dict__[name] = current * gate.reshape(
                [-1 if d == dim else 1 for d in range(current.dim())]
            )

    def _restore_weights(self) -> None:
        for module, name, parameter in self._originals:
            module.__dict__.pop(name, None)
            module._parameters[name] = parameter
        self._originals.clear()

    def _gate_of(self, index: Tensor) -> Tensor:
        values = self.values if self.values.dim() == 1 else self.values.mean(dim=0)
        return torch.nn.functional.pad(values, (0, 1), value=1.0)[index]

    def _places(self) -> dict[str, dict[int, tuple[Place, Tensor]]]:
        """Per consumer module and call: the place, and the gate of every position (num_units: none)."""
        gated = {group.index for group in self._groups}
        found: dict[str, dict[int, tuple[Place, Tensor]]] = {}
        for place in self._graph.places:
            if place.kind != "input" or not place.consumer:
                continue
            valid = np.maximum(place.units, 0)
            inside = (place.units >= 0) & np.isin(self._graph.group_of_unit[valid], list(gated))
            if inside.any():
                index = torch.from_numpy(np.where(inside, place.units, self._graph.num_units))
                found.setdefault(place.module, {})[place.call] = (place, index.to(self.values.device))
        return found

    def _hook(self, name: str, places: dict[int, tuple[Place, Tensor]]) -> Any:
        def multiply(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            if call not in places:
                return None
            place, index = places[call]
            if args:
                return (self._gated(args[0], place.dim, index), *args[1:]), kwargs
            first = next(iter(kwargs))  # as in `hooks.Taps`: what comes first is what the layer reads
            return args, {**kwargs, first: self._gated(kwargs[first], place.dim, index)}

        return multiply

    def _gated(self, x: Tensor, dim: int, index: Tensor) -> Tensor:
        values = torch.nn.functional.pad(self.values, (0, 1), value=1.0).index_select(-1, index).to(x.dtype)
        if values.dim() == 1:
            return x * values.reshape([-1 if d == dim else 1 for d in range(x.dim())])
        repeats = x.shape[0] // values.shape[0]  # windows and tokens folded into the batch, batch-major
        values = values.repeat_interleave(repeats, dim=0) if repeats > 1 else values
        return x * values.reshape([x.shape[0] if d == 0 else -1 if d == dim else 1 for d in range(x.dim())])

    def _start(self, module: nn.Module, args: Any) -> None:
        self._calls.clear()
        self._replace_weights()
        if self._statistics is not None:
            self._statistics.restart()
            self._statistics.__enter__()

    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        self._restore_weights()
        if self._statistics is not None:
            self._statistics.__exit__(None, None, None)
