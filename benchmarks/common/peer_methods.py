"""Methods of reaching a budget within a short training: LucidPrune's, Torch-Pruning's, fasterai's, and a smaller
network from scratch.

All get the same network, images, steps and learning rates. Methods that cut several times cut at the same steps;
methods that prepare a cut by a penalty cut once, at the last of these steps.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import io
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from common.short_training import ShortTraining, make_optimizer
from pruning.engine.trace_groups import trace_groups
from pruning.pruner import Pruner, prune
from pruning.repair.repairing import Method
from pruning.search import GreedySearch

_CALIBRATION_BATCH = 128
_BISECTIONS = 9
_MOST = 0.95  # largest share of a layer removed by one cut of Torch-Pruning


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Schedule of a run's cuts: `number` times, evenly over the first `share` of its steps."""

    number: int = 5
    share: float = 0.4

    def steps(self, num_steps: int) -> list[int]:
        """Return the numbers of steps after which a cut follows."""
        every = max(1, round(num_steps * self.share / self.number))
        return [every * (place + 1) for place in range(self.number)]


class Joints(Protocol):
    """Hooks of a method into a training."""

    def after_backward(self) -> None:
        """Called between backward pass and optimizer step."""

    def after_step(self, step: int) -> None:
        """Called after this many steps."""


class Untouched:
    """No cut: the control with the same further training."""

    def after_backward(self) -> None:
        """See `Joints`."""

    def after_step(self, step: int) -> None:
        """See `Joints`."""


class Ours(Untouched):
    """`Pruner` in a custom loop.

    Args:
        training: The run.
        budget: Share of the metric.
        cuts: Schedule of the cuts.
        criterion: Criterion that scores channels.
        search: Search that chooses groups; `sensitivity` cuts once, at the first of the steps.
        instalments: Instalments of each cut of the greedy search; see `GreedySearch`.
        repair: Repair of every rewrite.
        distil: Also distil from the original network.
        metric: What the budget is a share of.
    """

    def __init__(
        self,
        training: ShortTraining,
        budget: float,
        cuts: Cuts,
        *,
        criterion: str = "discriminant",
        search: str = "greedy",
        instalments: int | None = None,
        repair: Method = "least-squares",
        distil: bool = False,
        metric: str = "macs",
    ) -> None:
        images, labels = training.images.calibration
        self._batches = list(
            zip(images.split(_CALIBRATION_BATCH), labels.split(_CALIBRATION_BATCH), strict=True)
        )
        if distil:
            training.teacher = copy.deepcopy(training.model).eval()
        at_once = search == "sensitivity"
        self._pruner = Pruner(
            training.model,
            images[:2],
            criterion=criterion,
            search=GreedySearch(instalments=instalments) if search == "greedy" else search,
            budget={metric: budget},
            repair=repair,
            optimizer=training.optimizer,
            step=cuts.steps(training.num_steps)[0],
            delta=1.0 if at_once else (1 - budget) / cuts.number + 1e-9,
        )

    def after_step(self, step: int) -> None:
        """See `Joints`."""
        if self._pruner.due(step):
            self._pruner.step(self._batches, step)


class TorchPruning(Untouched):
    """Torch-Pruning in the same loop: the same costs at the same steps, with a new optimizer after each cut.

    Args:
        training: The run.
        budget: Share of the MACs, as Torch-Pruning counts them.
        cuts: Schedule of the cuts.
        importance: `l2`, `group`, `bn`, or `taylor`, whose gradients are those of the calibration images; or
            `large_final`, which is fasterai's pruner with its usual criterion, built on Torch-Pruning's.
        layers: Whether layers are cut by the same share (`uniform`), compared with all others (`global`), or with
            layers of the same shape (`isomorphic`).
        penalty: Train towards the cut: `bn` (a penalty on scales), `growing` (a growing penalty on the channels to
            remove).
        once: Cut at the first of the steps only (a penalty: at the last one).
    """

    def __init__(
        self,
        training: ShortTraining,
        budget: float,
        cuts: Cuts,
        *,
        importance: str,
        layers: str = "global",
        penalty: str = "none",
        once: bool = False,
    ) -> None:
        import torch_pruning

        self._tp: Any = torch_pruning
        self._training, self._importance = training, importance
        self._example = training.images.calibration[0][:1]
        self._where = {"global_pruning": layers != "uniform", "isomorphic": layers == "isomorphic"}
        steps = cuts.steps(training.num_steps)
        moments = steps[:1] if once else steps
        if penalty != "none":
            moments = steps[-1:]
        whole = self._cost(training.model)
        self._targets = {
            step: whole * (1 - (1 - budget) * (place + 1) / len(moments))
            for place, step in enumerate(moments)
        }
        self._penalty = self._make_penalty(penalty)
        self._last, self._grow_every = steps[-1], max(1, steps[-1] // 20)

    def _make_penalty(self, penalty: str) -> Any:
        kinds = {"bn": self._tp.pruner.BNScalePruner, "growing": self._tp.pruner.GrowingRegPruner}
        if penalty == "none":
            return None
        return self._pruner(kinds[penalty], self._training.model, 0.5, reg=1e-4)

    def _pruner(self, kind: Any, model: nn.Module, ratio: float, **more: float) -> Any:
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        ignored = [head, *(module for module in model.modules() if _frozen(module))]  # Taylor needs gradients
        if self._importance == "large_final":
            return _fasterai_pruner(model, self._example, ratio, ignored)
        kinds: Mapping[str, Callable[[], Any]] = {
            "l2": lambda: self._tp.importance.MagnitudeImportance(2),
            "group": lambda: self._tp.importance.GroupMagnitudeImportance(2),
            "bn": lambda: self._tp.importance.BNScaleImportance(),
            "taylor": lambda: self._tp.importance.GroupTaylorImportance(),
        }
        return kind(
            model,
            self._example,
            importance=kinds[self._importance](),
            pruning_ratio=ratio,
            max_pruning_ratio=_MOST,
            ignored_layers=ignored,
            **self._where,
            **more,
        )

    def _cost(self, model: nn.Module) -> float:
        return float(self._tp.utils.count_ops_and_params(model, self._example)[0])

    def after_backward(self) -> None:
        """See `Joints`: adds the penalty's gradient."""
        if self._penalty is not None:
            self._penalty.regularize(self._training.model)

    def after_step(self, step: int) -> None:
        """See `Joints`."""
        if (
            self._penalty is not None
            and step % self._grow_every == 0
            and hasattr(self._penalty, "update_reg")
        ):
            self._penalty.update_reg()
        if step in self._targets:
            training = self._training
            training.model = self._cut_to(self._targets[step])
            training.optimizer = make_optimizer(training.model)
            if step == self._last:
                self._penalty = None

    def _cut_to(self, target: float) -> nn.Module:
        """Return the network, cut by the smallest ratio that meets a cost."""
        source = self._training.model.eval()
        source.zero_grad()
        gradients: list[Any] = []
        if self._importance == "taylor":
            images, labels = self._training.images.calibration
            for shown, targets in zip(
                images.split(_CALIBRATION_BATCH), labels.split(_CALIBRATION_BATCH), strict=True
            ):
                (nn.functional.cross_entropy(source(shown), targets) * len(shown)).backward()
            gradients = [parameter.grad for parameter in source.parameters()]
        low, high, best = 0.0, 1.0, source
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            trial = copy.deepcopy(source)
            for parameter, gradient in zip(trial.parameters(), gradients, strict=False):
                parameter.grad = None if gradient is None else gradient.clone()
            self._pruner(self._tp.pruner.BasePruner, trial, middle).step()
            if self._cost(trial) > target:
                low = middle
            else:
                high, best = middle, trial
        if best is source:
            raise RuntimeError(f"Torch-Pruning does not reach {target:.3g} MACs with {self._importance}")
        best.zero_grad(set_to_none=True)
        return best


def _frozen(module: nn.Module) -> bool:
    """Whether a layer's weight is not trained."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and not weight.requires_grad


def _fasterai_pruner(model: nn.Module, example: torch.Tensor, ratio: float, ignored: list[nn.Module]) -> Any:
    """Return the pruner that fasterai's `Pruner` drives, over all layers together."""
    with contextlib.redirect_stdout(io.StringIO()):  # it reports the layers it ignores
        from fasterai.core.criteria import large_final
        from fasterai.prune.pruner import Pruner as FasteraiPruner

        pruner = FasteraiPruner(
            model, ratio, "global", large_final, example_inputs=example, ignored_layers=ignored
        )
    return pruner.pruner


class FromScratch(Untouched):
    """A network with all widths reduced by the same share to the same MACs, and new weights, but for frozen ones.

    Args:
        training: The run.
        budget: Share of the MACs.
        cuts: Unused.
    """

    def __init__(self, training: ShortTraining, budget: float, cuts: Cuts) -> None:
        del cuts
        model = training.model
        example = training.images.calibration[0][:2]
        prune(model, example, budget=budget, criterion="random", search="uniform", repair="none")
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and not _frozen(module):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
                module.reset_parameters()
        training.optimizer = make_optimizer(model)


Maker = Callable[[ShortTraining, float, Cuts], Joints]


def _ours(**settings: Any) -> Maker:
    return lambda training, budget, cuts: Ours(training, budget, cuts, **settings)


def _theirs(**settings: Any) -> Maker:
    return lambda training, budget, cuts: TorchPruning(training, budget, cuts, **settings)


#: Name of a row → constructor of the method. Methods with another peak rate (from scratch) are in `FROM_SCRATCH`.
METHODS: dict[str, Maker] = {
    "not pruned": lambda *_: Untouched(),
    "ours: discriminant": _ours(),
    "ours: discriminant, one group a cut": _ours(instalments=1),
    "ours: discriminant, no repair": _ours(repair="none"),
    "ours: taylor": _ours(criterion="taylor"),
    "ours: taylor, no repair": _ours(criterion="taylor", repair="none"),
    "ours: reconstruction": _ours(criterion="reconstruction"),
    "ours: discriminant+reconstruction": _ours(criterion="discriminant+reconstruction"),
    "ours: sensitivity at once": _ours(criterion="reconstruction", search="sensitivity"),
    "ours: sensitivity at once, by latency": _ours(
        criterion="reconstruction", search="sensitivity", metric="latency"
    ),
    "ours: sensitivity at once, no repair": _ours(
        criterion="reconstruction", search="sensitivity", repair="none"
    ),
    "ours: discriminant, distilled": _ours(distil=True),
    "ours: sensitivity at once, distilled": _ours(
        criterion="reconstruction", search="sensitivity", distil=True
    ),
    "Torch-Pruning: L2, uniform": _theirs(importance="l2", layers="uniform", once=True),
    "Torch-Pruning: group norm": _theirs(importance="group"),
    "Torch-Pruning: Taylor": _theirs(importance="taylor"),
    "Torch-Pruning: Taylor at once": _theirs(importance="taylor", once=True),
    "Torch-Pruning: Taylor, isomorphic": _theirs(importance="taylor", layers="isomorphic"),
    "Torch-Pruning: BN scale": _theirs(importance="bn", penalty="bn"),
    "Torch-Pruning: growing regularisation": _theirs(importance="group", penalty="growing"),
    "fasterai: large_final": _theirs(importance="large_final"),
    "from scratch": FromScratch,
}
FROM_SCRATCH = ("from scratch",)


def installed_methods() -> list[str]:
    """Return the methods whose libraries are installed."""
    packages = {"Torch-Pruning": "torch_pruning", "fasterai": "fasterai"}
    missing = [name for name, package in packages.items() if importlib.util.find_spec(package) is None]
    return [method for method in METHODS if method.partition(":")[0] not in missing]


def share_of_macs(model: nn.Module, small: nn.Module, example: torch.Tensor) -> float:
    """Return the MACs of a cut network over those of the original, counted in the same way for every method."""
    return trace_groups(small, example).macs / trace_groups(model, example).macs
