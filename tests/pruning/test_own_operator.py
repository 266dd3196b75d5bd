"""Operators of other libraries: frozen by name until they are registered, then cut, explained and shrunk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from explainers.attribution.record import Kind, record_forward
from image_classification.config import ConfigError
from image_classification.models import operators as facts
from pruning import prune_channels, register_operator, shrink, trace_groups
from pruning.engine.gates import Gates
from pruning.engine.labeller import Labeller
from pruning.engine.labels import Value
from pruning.engine.operators import register
from pruning.engine.tracing import Operation


@torch.library.custom_op("lucidprune_tests::soften", mutates_args=())
def soften(x: Tensor) -> Tensor:
    """An activation."""
    return x.nan_to_num().relu() - 0.1 * x.nan_to_num().tanh()


@torch.library.custom_op("lucidprune_tests::centre", mutates_args=())
def centre(x: Tensor) -> Tensor:
    """Subtracts the mean over channels."""
    return x - x.mean(1, keepdim=True)


class Net(nn.Module):
    """Two convolutions with an operator between them."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a, self.b, self.fc, self.between = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 6, 3),
            nn.Linear(6, 4),
            between,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.between(self.a(x))).mean((2, 3)))


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((register, "OPERATORS"), (register, "_BY_NAME"), (facts, "_FACTS")):
        table = getattr(module, name)
        for key in [key for key in table if "lucidprune_tests" in str(key)]:
            del table[key]


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def check_cut(model: nn.Module) -> None:
    graph = trace_groups(model, images())
    keep = {"a": [1, 4, 6]}
    with torch.no_grad(), Gates(model, graph) as gates:
        gates.set_keep(keep)
        expected = model(images())
    prune_channels(model, graph, keep)
    torch.testing.assert_close(model(images()), expected)


def test_a_pointwise_operator_needs_no_rule() -> None:
    torch.manual_seed(0)
    model = Net(lambda x: soften(x)).eval()
    assert "lucidprune_tests.soften in the network itself" in trace_groups(model, images()).frozen["a"]
    register_operator(torch.ops.lucidprune_tests.soften, kind="pointwise", nonnegative=True)
    with torch.no_grad():
        (step,) = [s for s in record_forward(model, images()).steps if "soften" in s.name]
    assert step.kind is Kind.PASS
    check_cut(model)


def test_a_pointwise_operator_that_loses_nan_does_not_look_constant() -> None:
    """`soften` makes numbers of NaN; they must not be taken for constants."""
    torch.manual_seed(0)
    model = Net(lambda x: soften(x)).eval()
    register_operator(torch.ops.lucidprune_tests.soften.default, kind="pointwise")
    with torch.no_grad():
        model.a.weight[:2] = 0
        model.a.bias[:2] = 0
    report = shrink(model, images())
    assert report.widths == {"a": (8, 6)}


def centre_labels(run: Labeller, operation: Operation) -> Value:
    x = run.at(operation.args[0])
    for slot in x.slots:
        run.note_statistics(operation, slot)
    return x


def centre_kept(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kept: np.ndarray) -> Tensor:
    (x,) = args
    mask = torch.from_numpy(kept).to(x.dtype)
    return (x - (x * mask).sum(1, keepdim=True) / mask.sum()) * mask


def test_statistics_over_channels_are_taken_over_the_kept_ones() -> None:
    torch.manual_seed(0)
    model = Net(lambda x: centre(x)).eval()
    register_operator(
        torch.ops.lucidprune_tests.centre.default,
        label=centre_labels,
        kind="normalisation",
        statistics=centre_kept,
    )
    graph = trace_groups(model, images())
    assert "a" in {group.name for group in graph.prunable}
    assert any("statistics" in note for note in graph.group("a").notes)
    check_cut(model)


def test_what_cannot_be_registered_is_told() -> None:
    with pytest.raises(ConfigError, match="label"):
        register_operator(torch.ops.lucidprune_tests.centre.default, kind="normalisation")
    with pytest.raises(ConfigError, match="pointwise"):
        register_operator(torch.ops.lucidprune_tests.centre.default, label=centre_labels, kind="pointwize")
