"""Multiplicative gates on coupled channels, by hooks that cannot leak.

A gate multiplies what the consumers of a group read: every convolution or linear layer sees `m_c · x_c`. With
gates of 0 and 1 the network computes what it would compute without the closed channels (statistics over
channels included); derivatives with respect to the gates are channel scores; gates that learn choose widths.

    with Gates(model, graph) as gates:
        gates.set_keep({"layer1.0.conv1": [0, 2, 3]})
        logits = model(images)              # as if the other channels were gone
    # no hook is left

Channels that an operator outside any layer reads (`einsum` with a parameter, a product in a `forward`) have
no layer's input to be gated at. Their slices of the network's parameters are multiplied instead: each forward pass
runs on gated tensors in the parameters' places, and the parameters are back, as the same objects in the same order,
when it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from image_classification.config import SettingError
from image_classification.models.checkpointing import checkpoints_passed_through
from image_classification.models.running import Args, Kwargs, ModuleCall, following, with_first_argument
from pruning.engine.channel_graph import ChannelGraph, GroupKey, Keep
from pruning.engine.kept_statistics import StatisticsOverKept


@dataclasses.dataclass(frozen=True)
class _Gate:
    """Gates along one dimension of a tensor.

    Attributes:
        dim: The dimension.
        positions: Place in `Gates.values` of the gate of each position, one past the end where there is none.
        index: The same on the gates' device.
    """

    dim: int
    positions: np.ndarray
    index: Tensor

    def open_under(self, mask: np.ndarray) -> np.ndarray:
        """Return which positions a mask of all units leaves open, bool."""
        opened: np.ndarray = np.append(mask, True)[self.positions]
        return opened


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
        self._model = model
        self._graph = graph
        self._groups = graph.prunable if groups is None else [graph.group(key) for key in groups]
        shape = (graph.num_units,) if per_sample is None else (per_sample, graph.num_units)
        self.values = torch.ones(shape, device=first.device)
        # The mask that was set last, with the values made of it and their version.
        self._mask: tuple[np.ndarray, Tensor, int] | None = None
        self._constants: dict[bytes, Tensor] = {}
        self._statistics: StatisticsOverKept | None = None
        self._inputs: dict[ModuleCall, _Gate] = {}
        self._weights: dict[str, list[_Gate]] = {}
        self._hooks = contextlib.ExitStack()
        self._learning = False

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
        """As `set_keep`, from a boolean vector over unit ids. Where all units stay, nothing is multiplied."""
        values = torch.from_numpy(mask.astype(np.float32)).to(self.values.device)
        self.values = values.expand_as(self.values).clone()
        self._mask = (mask, self.values, self.values._version)
        if self._graph.statistics:
            self._statistics = StatisticsOverKept(self._graph.statistics, mask)

    def factors(self, mask: np.ndarray) -> list[Tensor]:
        """Return the tensors that passes multiply by under a mask; equal factors are one tensor."""
        places = [*self._inputs.values(), *(gate for gates in self._weights.values() for gate in gates)]
        found = (self._constant(gate.open_under(mask)) for gate in places)
        return [factor for factor in found if factor is not None]

    def reset(self) -> None:
        """Open all gates."""
        self.values = torch.ones_like(self.values, requires_grad=False)
        self._statistics = None

    def __enter__(self) -> Gates:
        self._inputs = self._gated_inputs()
        self._weights = self._gated_weights()
        names = [call.name for call in self._inputs]
        self._hooks.enter_context(
            following(self._model, names, entering=self._gate_input, around=self._gated_pass)
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.close()

    # -- where the gates are -------------------------------------------------------------------------------

    def _gated_inputs(self) -> dict[ModuleCall, _Gate]:
        """Call of a consumer → the gates of its input."""
        groups = [group.index for group in self._groups]
        found = {}
        for place in self._graph.places:
            if place.kind == "input" and place.consumer:
                gate = self._gate_along(place.dim, place.units, groups)
                if gate is not None:
                    found[ModuleCall(place.module, place.call)] = gate
        return found

    def _gated_weights(self) -> dict[str, list[_Gate]]:
        """Parameter → gates of its slices, for channels that no layer's input shows."""
        indices = {group.index for group in self._groups}
        groups = [index for index in self._graph.groups_in(self._graph.ungated) if index in indices]
        parameters = {name for name, _ in self._model.named_parameters()}
        found: dict[str, list[_Gate]] = {}
        for axis in self._graph.axes:
            gate = self._gate_along(axis.dim, axis.units, groups)
            if gate is not None and axis.tensor in parameters:
                found.setdefault(axis.tensor, []).append(gate)
        return found

    def _gate_along(self, dim: int, units: np.ndarray, groups: list[int]) -> _Gate | None:
        """Gates of the units along a dimension; None if none of them has one."""
        valid = np.maximum(units, 0)
        inside = (units >= 0) & np.isin(self._graph.group_of_unit[valid], groups)
        if not inside.any():
            return None
        positions = np.where(inside, units, self._graph.num_units)
        return _Gate(dim, positions, torch.from_numpy(positions).to(self.values.device))

    # -- what happens in a forward pass --------------------------------------------------------------------

    @contextlib.contextmanager
    def _gated_pass(self) -> Iterator[None]:
        """A forward pass on gated parameters, with statistics over the open channels."""
        self._learning = self.values.requires_grad and torch.is_grad_enabled()
        parameters = dict(self._model.named_parameters()) if self._weights else {}
        gated: dict[str, Tensor] = {}
        for name, gates in self._weights.items():
            gated[name] = parameters[name]
            for gate in gates:
                factor = self._factor(gate, per_sample=False)
                if factor is not None:
                    factor = along_dim(factor.to(gated[name].dtype), gate.dim, gated[name].dim())
                    gated[name] = gated[name] * factor
        with contextlib.ExitStack() as stack:
            stack.enter_context(checkpoints_passed_through())  # a gate must act on a block's only run
            if gated:
                stack.enter_context(_reparametrize_module(self._model, gated, tie_weights=True))
            if self._statistics is not None:
                self._statistics.restart()
                stack.enter_context(self._statistics)
            yield

    def _factor(self, gate: _Gate, *, per_sample: bool) -> Tensor | None:
        """Return the gates of all positions, (positions,) or (N, positions); None if a mask leaves all of them open."""
        if self._mask is not None and not self.values.requires_grad:
            mask, made, version = self._mask
            if made is self.values and made._version == version:
                return self._constant(gate.open_under(mask))
        values = self.values if self.values.dim() == 1 or per_sample else self.values.mean(dim=0)
        return torch.nn.functional.pad(values, (0, 1), value=1.0).index_select(-1, gate.index)

    def _constant(self, opened: np.ndarray) -> Tensor | None:
        """Return gates of 0 and 1, the same tensor for the same gates; None if all are 1."""
        if opened.all():
            return None
        key = opened.tobytes()
        if key not in self._constants:
            self._constants[key] = torch.from_numpy(opened.astype(np.float32)).to(self.values.device)
        return self._constants[key]

    def _gate_input(
        self, call: ModuleCall, _module: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        if call not in self._inputs:
            return None
        if self._learning and not torch.is_grad_enabled():
            problem = (
                "this module runs where no gradient is recorded (`torch.no_grad` in a forward, or a checkpoint other "
                "than torch's), so gates of what it reads cannot learn: leave it alone"
            )
            raise SettingError("ignored", call.name, problem)
        gate = self._inputs[call]
        return with_first_argument(args, kwargs, lambda x: self._gated(x, gate))

    def _gated(self, x: Tensor, gate: _Gate) -> Tensor:
        values = self._factor(gate, per_sample=True)
        if values is None:
            return x
        values = values.to(x.dtype)
        if values.dim() == 1:
            return x * along_dim(values, gate.dim, x.dim())
        repeats = x.shape[0] // values.shape[0]  # windows and tokens folded into the batch, batch-major
        values = values.repeat_interleave(repeats, dim=0) if repeats > 1 else values
        shape = [1] * x.dim()
        shape[0], shape[gate.dim] = x.shape[0], -1
        return x * values.reshape(shape)


def along_dim(vector: Tensor, dim: int, rank: int) -> Tensor:
    """A vector as a tensor of `rank` dimensions that extends along one of them."""
    shape = [1] * rank
    shape[dim] = -1
    return vector.reshape(shape)
