"""Networks with checkpointed blocks score, judge and learn as those without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from image_classification.config import ConfigError
from pruning import Pruner, trace_groups
from pruning.criteria import Taylor
from pruning.criteria.scoring import score_groups
from pruning.engine.gates import Gates


class OwnCheckpoint(torch.autograd.Function):
    """A reentrant checkpoint of a library's own."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.block, ctx.parameters = block, parameters
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            out = ctx.block(x)
        found = torch.autograd.grad(out, (x, *ctx.parameters), gradients[0])
        return None, *found


class Blocks(nn.Module):
    """A stem, two blocks and a head; `how` runs a block."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 1))
            for _ in range(2)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + self.how(block, x)
        return self.head(torch.relu(x).mean((2, 3)))


def plainly(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)


def not_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


def in_segments(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint_sequential(block, 2, x, use_reentrant=True)


def by_its_own(block: nn.Module, x: Tensor) -> Tensor:
    return OwnCheckpoint.apply(block, x, *block.parameters())


X, Y = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


def pair(how: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Blocks, Blocks]:
    torch.manual_seed(0)
    plain = Blocks(plainly)
    other = copy.deepcopy(plain)
    other.how = how
    return plain, other


@pytest.mark.parametrize("how", [reentrant, not_reentrant, in_segments])
def test_scores_estimates_and_rewrites_are_those_of_the_plain_network(how: Any) -> None:
    plain, other = pair(how)
    found = []
    for model in (plain, other):
        model.eval()  # a reentrant checkpoint updates batch-norm statistics twice
        pruner = Pruner(model, X[:2], criterion="taylor", budget=0.6, delta=0.2)
        records = []
        while not pruner.done:
            records.append(pruner.step([(X, Y)]))
            F.cross_entropy(model(X), Y).backward()
            model.zero_grad()
        found.append(records)
    for one, two in zip(*found, strict=True):
        assert one.widths == two.widths
        assert one.loss == pytest.approx(two.loss, rel=1e-5)
        estimates = [[row["estimated"] for row in record.candidates] for record in (one, two)]
        assert estimates[0] == pytest.approx(estimates[1], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("how", [reentrant, not_reentrant, in_segments])
def test_gates_learn_as_in_the_plain_network(how: Any) -> None:
    gradients = []
    for model in pair(how):
        graph = trace_groups(model, X[:2])
        with Gates(model, graph) as gates:
            gates.values = torch.linspace(0.2, 1.0, graph.num_units).requires_grad_()
            F.cross_entropy(model(X), Y).backward()
            gradients.append((gates.values.grad, model.blocks[0][0].weight.grad))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_gates_that_cannot_learn_are_refused() -> None:
    """They would only feel the price of being open."""
    _, model = pair(by_its_own)
    graph = trace_groups(model, X[:2])
    with Gates(model, graph) as gates:
        gates.values = torch.ones(graph.num_units, requires_grad=True)
        with pytest.raises(ConfigError, match=r"ignored='blocks\.0\.0'"):
            model(X)
        with torch.no_grad():
            model(X)


def test_units_without_a_derivative_are_not_scored_as_zero(caplog: pytest.LogCaptureFixture) -> None:
    """What a checkpoint of a library's own hides stays as it is under derivatives, and is measured by the search."""
    _, model = pair(by_its_own)
    model.how = lambda block, x: by_its_own(block, x) if block is model.blocks[0] else block(x)
    graph = trace_groups(model, X[:2])
    scores = score_groups(model, graph, [(X, Y)], Taylor())
    assert {graph.groups[index].name for index in scores} == {"blocks.1.0"}
    assert "cannot score stem, blocks.0.0" in caplog.text
    pruner = Pruner(model, X[:2], criterion="discriminant", budget=0.6, delta=0.05)
    record = pruner.step([(X, Y)])
    rows = {row["group"]: row for row in record.candidates}
    assert rows["blocks.0.0"]["estimated"] is None
    assert rows["blocks.0.0"]["measured"] is not None


class TwoHeads(nn.Module):
    """The embedding has no part in the loss; features that both heads read have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.head, self.embedding = nn.Linear(8, 4), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        return self.head(x.mean((2, 3))), self.embedding(self.mid(x).mean((2, 3)))


def test_what_the_loss_does_not_see_is_left_alone() -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    graph = trace_groups(model, X[:2])
    scores = score_groups(model, graph, [(X, Y)], Taylor())
    assert graph.group("stem").index in scores
    assert graph.group("mid").index not in scores
