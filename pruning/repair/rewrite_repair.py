"""The repair of a pruner's rewrite: choice of method, for the network and its averages.

An average of the weights is repaired by its own activations, since its weights differ from the network's and so does
the effect of the cut.
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
    """Return the settings of a rewrite's repair; by default least squares where possible. Collective.

    Args:
        repair: A method, settings, or None for the default.
        batches: This rank's calibration batches.
        task: How the network is run on them.
        at_once: A single rewrite meets the whole budget, so all layers from the first cut on are solved for. Otherwise
            training continues after each of many small rewrites, and only layers that lost inputs are solved for.
        distributed: The ranks.

    Raises:
        SettingError: A method was requested, but there are no images, or only the network itself can be run.
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
    """Return why no repair is possible, or None."""
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
    """The repair of a rewrite; created before the rewrite from network and averages, called after it.

    Args:
        model: The network.
        averages: Averages of the network: copies, or state dicts.
        plan: Records what a network's repair needs; None if there is nothing to repair.
        method: Method of repair, for messages.
        lenient: Warn about a network that cannot be copied or images that cannot be used, and leave the cut unrepaired;
            otherwise refuse them.
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
        """Create the repair of a cut of channels: `graph` is the graph before it shrinks, `mask` the units to keep."""
        plan = (
            None if mask.all() else functools.partial(plan_repair, graph=graph, mask=mask, settings=settings)
        )
        return cls(model, averages, plan, settings.method, lenient=lenient)

    def __call__(
        self, batches: Sequence[Batch], task: Task, *, judged: bool, distributed: Distributed
    ) -> RepairReport | None:
        """Repair network and averages; return the network's report, if it could be repaired. Collective."""
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
        """Turn errors of an unrequested repair into warnings."""
        try:
            yield
        except SettingError as error:
            if not self._lenient:
                raise
            log.warning("a rewrite is not repaired: %s", error)

    def _as_module(self, network: nn.Module | MutableMapping[str, Tensor]) -> nn.Module:
        """Load a state dict into a copy of the current network."""
        if isinstance(network, AveragedModel):
            return network.module
        if isinstance(network, nn.Module):
            return network
        module = copied(self._model, self._method)
        module.load_state_dict(dict(network), strict=False)
        return module
