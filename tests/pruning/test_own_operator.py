"""Operators of other libraries: frozen by name until they are registered, then cut, explained and shrunk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from explainers.attribution.record import Kind, record_forward
from image_classification.config import ConfigError
from pruning import prune_channels, register_operator, shrink, trace_groups
from pruning.engine.gates import Gates
from pruning.engine.labeller import Labeller
from pruning.engine.labels import Value
from pruning.engine.traces import Operation


def soften(x: Tensor) -> Tensor:
    """An activation, which makes numbers of NaN."""
    return x.nan_to_num().relu() - 0.1 * x.nan_to_num().tanh()


def centre(x: Tensor) -> Tensor:
    """Subtracts the mean over channels."""
    return x - x.mean(1, keepdim=True)


def operator_of(function: Any, request: pytest.FixtureRequest) -> Any:
    """The function as an operator of another library: for each test one that nobody has registered yet."""
    name = f"{function.__name__}_{request.node.name}"
    torch.library.custom_op(f"lucidprune_tests::{name}", function, mutates_args=())
    return getattr(torch.ops.lucidprune_tests, name)


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


def test_a_pointwise_operator_needs_no_rule(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    operator = operator_of(soften, request)
    model = Net(operator).eval()
    assert f"{operator} in the network itself" in trace_groups(model, images()).frozen["a"]
    register_operator(operator, kind="pointwise", nonnegative=True)
    with torch.no_grad():
        (step,) = [s for s in record_forward(model, images()).steps if "soften" in s.name]
    assert step.kind is Kind.PASS
    check_cut(model)


def test_a_pointwise_operator_that_loses_nan_does_not_look_constant(request: pytest.FixtureRequest) -> None:
    """`soften` makes numbers of NaN; they must not be taken for constants."""
    torch.manual_seed(0)
    operator = operator_of(soften, request)
    model = Net(operator).eval()
    register_operator(operator.default, kind="pointwise")
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


def test_statistics_over_channels_are_taken_over_the_kept_ones(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(0)
    operator = operator_of(centre, request)
    model = Net(operator).eval()
    register_operator(operator.default, label=centre_labels, kind="normalisation", statistics=centre_kept)
    graph = trace_groups(model, images())
    assert "a" in {group.name for group in graph.prunable}
    assert any("statistics" in note for note in graph.group("a").notes)
    check_cut(model)


def test_what_cannot_be_registered_is_told(request: pytest.FixtureRequest) -> None:
    operator = operator_of(centre, request).default
    with pytest.raises(ConfigError, match="label"):
        register_operator(operator, kind="normalisation")
    with pytest.raises(ConfigError, match="pointwise"):
        register_operator(operator, label=centre_labels, kind="pointwize")
