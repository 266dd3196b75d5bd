"""The repair of a rewrite within a pruner: which method, of which networks.

An average of the weights is repaired by its own activations: its weights are others than the network's, and so is what
the cut takes from them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, MutableMapping, Sequence

import numpy as np
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from image_classification.config import SettingError
from image_classification.distributed import Distributed
from pruning.engine.channel_graph import ChannelGraph
from pruning.repair.repairing import Method, RepairPlan, RepairReport, RepairSettings, copied, plan_repair
from pruning.task import Batch, Task, num_samples

log = logging.getLogger(__name__)


def settled(
    repair: Method | RepairSettings | None,
    batches: Sequence[Batch],
    task: Task,
    *,
    at_once: bool,
    distributed: Distributed,
) -> RepairSettings:
    """How a rewrite is repaired; what is left open is least squares wherever it can be. Collective.

    Args:
        repair: A method, settings, or None to leave it open.
        batches: This rank's calibration batches.
        task: How the network is run on them.
        at_once: One rewrite meets the whole budget: then all layers behind the first cut are solved for. Else
            training goes on after each of many small ones, and only the layers that lost inputs are.
        distributed: The ranks.

    Raises:
        SettingError: A method was asked for, and there are no images for it, or only the network itself can be run.
    """
    if isinstance(repair, RepairSettings):
        settings = repair
    else:
        settings = RepairSettings(method=repair or "least-squares", scope="behind" if at_once else "cut")
    problem = _problem(batches, task, distributed) if settings.method != "none" else None
    if problem is None:
        return settings
    if repair is not None:
        raise SettingError("repair", settings.method, problem)
    if any(num_samples(batch) for batch in batches) and distributed.is_main:
        log.warning("rewrites are not repaired: %s", problem)
    return RepairSettings(method="none")


def _problem(batches: Sequence[Batch], task: Task, distributed: Distributed) -> str | None:
    """Why there can be no repair."""
    if distributed.sum_on_hosts(not any(num_samples(batch) for batch in batches)):
        on_ranks = " on some ranks" if distributed.is_distributed else ""
        return (
            f"it needs calibration images, and there are none{on_ranks}: give calibration batches, or 'none'"
        )
    if not task.runs_any_network:
        return (
            "it runs a copy of the network as it was, which forward=(batch) cannot: give forward=(network, batch), "
            "or 'none'"
        )
    return None


class RewriteRepair:
    """Made before a rewrite, from network and averages as they are; used after it.

    Args:
        model: The network.
        averages: Of the network: copies, or state dicts.
        plan: Remembers of one of them what its repair needs; None if there is nothing to repair.
        method: How to repair; an error names it.
        lenient: A network that cannot be copied, and images that cannot repair, are warned of, and the cut stays as it
            is; otherwise they are refused.
    """

    def __init__(
        self,
        model: nn.Module,
        averages: Sequence[nn.Module | MutableMapping[str, Tensor]],
        plan: Callable[[nn.Module], RepairPlan] | None,
        method: Method,
        *,
        lenient: bool,
    ) -> None:
        self._model = model
        self._method = method
        self._lenient = lenient
        self._plans: list[tuple[nn.Module | MutableMapping[str, Tensor], RepairPlan]] = []
        if plan is not None and method != "none":
            for network in (model, *averages):
                with self._tolerated():
                    self._plans.append((network, plan(self._as_module(network))))

    @classmethod
    def of_cut(
        cls,
        model: nn.Module,
        averages: Sequence[nn.Module | MutableMapping[str, Tensor]],
        graph: ChannelGraph,
        mask: np.ndarray,
        settings: RepairSettings,
        *,
        lenient: bool,
    ) -> RewriteRepair:
        """The repair of a cut of channels: `graph` is that before it shrinks, `mask` what stays."""
        plan = (
            None if mask.all() else functools.partial(plan_repair, graph=graph, mask=mask, settings=settings)
        )
        return cls(model, averages, plan, settings.method, lenient=lenient)

    def __call__(
        self, batches: Sequence[Batch], task: Task, *, judged: bool, distributed: Distributed
    ) -> RepairReport | None:
        """Repair network and averages; the report on the network, if it could be repaired. Collective."""
        report = None
        for network, plan in self._plans:
            with self._tolerated():
                module = self._as_module(network)
                found = plan.repair(module, batches, task=task, judged=judged, distributed=distributed)
                report = found if network is self._model else report
                if not isinstance(network, nn.Module):
                    for name, value in module.state_dict().items():
                        if name in network:
                            network[name].copy_(value)
        return report

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        """A network or images that cannot be repaired are warned of where nobody asked for a repair."""
        try:
            yield
        except SettingError as error:
            if not self._lenient:
                raise
            log.warning("a rewrite is not repaired: %s", error)

    def _as_module(self, network: nn.Module | MutableMapping[str, Tensor]) -> nn.Module:
        """A state dict in a copy of the network as it is now."""
        if isinstance(network, AveragedModel):
            return network.module
        if isinstance(network, nn.Module):
            return network
        module = copied(self._model, self._method)
        module.load_state_dict(dict(network), strict=False)
        return module
