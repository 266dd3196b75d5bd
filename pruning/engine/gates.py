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
        self._statistics: StatisticsOverKept | None = None
        self._inputs: dict[ModuleCall, tuple[int, Tensor]] = {}
        self._weights: dict[str, list[tuple[int, Tensor]]] = {}
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

    def _gated_inputs(self) -> dict[ModuleCall, tuple[int, Tensor]]:
        """Call of a consumer → the dimension of its input that is gated, and the gate of every position there."""
        groups = [group.index for group in self._groups]
        found = {}
        for place in self._graph.places:
            if place.kind == "input" and place.consumer:
                index = self._gate_indices(place.units, groups)
                if index is not None:
                    found[ModuleCall(place.module, place.call)] = (place.dim, index)
        return found

    def _gated_weights(self) -> dict[str, list[tuple[int, Tensor]]]:
        """Parameter → dimensions, with the gate of every slice, for channels that no layer's input shows."""
        indices = {group.index for group in self._groups}
        groups = [index for index in self._graph.groups_in(self._graph.ungated) if index in indices]
        parameters = {name for name, _ in self._model.named_parameters()}
        found: dict[str, list[tuple[int, Tensor]]] = {}
        for axis in self._graph.axes:
            index = self._gate_indices(axis.units, groups)
            if index is not None and axis.tensor in parameters:
                found.setdefault(axis.tensor, []).append((axis.dim, index))
        return found

    def _gate_indices(self, units: np.ndarray, groups: list[int]) -> Tensor | None:
        """Position in `values` of the gate of each unit, one past the end for units without; None if none has one."""
        valid = np.maximum(units, 0)
        inside = (units >= 0) & np.isin(self._graph.group_of_unit[valid], groups)
        if not inside.any():
            return None
        return torch.from_numpy(np.where(inside, units, self._graph.num_units)).to(self.values.device)

    # -- what happens in a forward pass --------------------------------------------------------------------

    @contextlib.contextmanager
    def _gated_pass(self) -> Iterator[None]:
        """A forward pass on gated parameters, with statistics over the open channels."""
        self._learning = self.values.requires_grad and torch.is_grad_enabled()
        parameters = dict(self._model.named_parameters()) if self._weights else {}
        gated: dict[str, Tensor] = {}
        for name, dims in self._weights.items():
            gated[name] = parameters[name]
            for dim, index in dims:
                gate = self._gate_of(index).to(gated[name].dtype)
                gated[name] = gated[name] * along_dim(gate, dim, gated[name].dim())
        with contextlib.ExitStack() as stack:
            stack.enter_context(checkpoints_passed_through())  # a gate must act on a block's only run
            if gated:
                stack.enter_context(_reparametrize_module(self._model, gated, tie_weights=True))
            if self._statistics is not None:
                self._statistics.restart()
                stack.enter_context(self._statistics)
            yield

    def _gate_of(self, index: Tensor) -> Tensor:
        values = self.values if self.values.dim() == 1 else self.values.mean(dim=0)
        return torch.nn.functional.pad(values, (0, 1), value=1.0)[index]

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
        dim, index = self._inputs[call]
        return with_first_argument(args, kwargs, lambda x: self._gated(x, dim, index))

    def _gated(self, x: Tensor, dim: int, index: Tensor) -> Tensor:
        values = torch.nn.functional.pad(self.values, (0, 1), value=1.0).index_select(-1, index).to(x.dtype)
        if values.dim() == 1:
            return x * along_dim(values, dim, x.dim())
        repeats = x.shape[0] // values.shape[0]  # windows and tokens folded into the batch, batch-major
        values = values.repeat_interleave(repeats, dim=0) if repeats > 1 else values
        shape = [1] * x.dim()
        shape[0], shape[dim] = x.shape[0], -1
        return x * values.reshape(shape)


def along_dim(vector: Tensor, dim: int, rank: int) -> Tensor:
    """A vector as a tensor of `rank` dimensions that extends along one of them."""
    shape = [1] * rank
    shape[dim] = -1
    return vector.reshape(shape)
