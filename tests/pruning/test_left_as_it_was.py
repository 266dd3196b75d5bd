"""What scoring, judging and rewriting leave behind: modes, caches, hooks, the order of parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from pruning import Pruner, PrunerSettings, trace_groups

X, Y = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4


class LowRank(nn.Module):
    """A convolution with a low-rank update that is merged into the weight to evaluate, as LoRA's code does."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 1)
        self.conv.weight.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, before))
        self.up = nn.Parameter(torch.randn(after, 2) / 4)
        self.merged = False

    def train(self, mode: bool = True) -> LowRank:
        super().train(mode)
        if mode == self.merged:
            update = (self.up @ self.down)[:, :, None, None]
            self.conv.weight.data += -update if mode else update
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        if self.merged:
            return out
        return out + torch.einsum("or,rc,nchw->nohw", self.up, self.down, x)


class CachedBias(nn.Module):
    """Keeps what it looked up while it evaluates, in a plain attribute, as attention layers do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(width))
        self.cached: Tensor | None = None

    def train(self, mode: bool = True) -> CachedBias:
        super().train(mode)
        self.cached = None
        return self

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table.tanh() if self.cached is None else self.cached
        if not self.training:
            self.cached = bias
        return x + bias[:, None, None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.low_rank, self.bias = LowRank(8, 12), CachedBias(12)
        self.mix = nn.Parameter(torch.randn(12, 12) / 3)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bias(self.low_rank(torch.relu(self.norm(self.stem(x)))))
        x = torch.einsum("oc,nchw->nohw", self.mix, torch.relu(x))
        return self.head(torch.relu(x).mean((2, 3)))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    network = Net()
    network.train()
    network.norm.eval()  # frozen statistics, as fine-tuning has them
    return network


def settings_of(network: nn.Module) -> dict[str, Any]:
    """All that should be as before: modes, merging, hooks, names in order."""
    modules = dict(network.named_modules())
    return {
        "training": {name: module.training for name, module in modules.items()},
        "merged": {name: module.merged for name, module in modules.items() if hasattr(module, "merged")},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in modules.items()
        },
        "parameters": [(name, id(parameter)) for name, parameter in network.named_parameters()],
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
    }


@pytest.mark.parametrize("criterion", ["discriminant", "taylor", "magnitude"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_network_comes_back_as_its_train_would_leave_it(model: Net, criterion: str, mode: Any) -> None:
    model.low_rank.register_forward_hook(lambda module, args, output: None)
    before, weights = settings_of(model), copy.deepcopy(model.state_dict())
    pruner = Pruner(
        model,
        X[:2],
        criterion=criterion,
        search="global",
        budget=0.6,
        delta=0.2,
        settings=PrunerSettings(mode=mode),
    )
    pruner.score([(X, Y)])
    pruner.dry_run([(X, Y)])
    assert settings_of(model) == before
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name])
    pruner.step([(X, Y)])
    assert settings_of(model) == before


def test_a_network_trains_on_after_a_rewrite(model: Net) -> None:
    """The low-rank layer is not merged any more, the cached bias is not the one of before."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    pruner = Pruner(model, X[:2], optimizer=optimizer, budget=0.5, delta=0.25)
    while not pruner.done:
        model.eval()
        with torch.no_grad():
            model(X)
        pruner.step([(X, Y)])
        model.train()
        before = model.low_rank.up.detach().clone()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(model.low_rank.up, before)
        model.norm.eval()
        with torch.no_grad():
            training = model(X)
            model.eval()
            torch.testing.assert_close(model(X), training, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", ["discriminant", "taylor"])
def test_averages_follow_by_name(model: Net, criterion: str) -> None:
    """An average that mixes by position, after judgements and rewrites, against one that is mixed by name."""
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
    pruner = Pruner(model, X[:2], criterion=criterion, ema=averaged, budget=0.5, delta=0.25)
    model.requires_grad_(True)
    while not pruner.done:
        pruner.step([(X, Y)])
        expected = {name: value.detach().clone() for name, value in averaged.module.named_parameters()}
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.add_(0.1 * torch.randn_like(value))
                expected[name] = 0.5 * expected[name] + 0.5 * value
        averaged.update_parameters(model)
        if pruner.completed == 1:  # the first update of torch's average copies
            expected = {name: value.detach() for name, value in model.named_parameters()}
        for name, value in averaged.module.named_parameters():
            torch.testing.assert_close(value, expected[name])


class Watched(nn.Module):
    """Hooks itself when it first runs, as transformers' networks do to collect their hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)])
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        self._found = found
        if not hasattr(self, "_hooked"):
            for block in self.blocks:
                block.register_forward_hook(lambda _, args, out: self._found.append(out))
            self._hooked = True
        for block in self.blocks:
            x = block(x).relu()
        self._found = []
        return self.fc(torch.cat([self.norm(y).mean((2, 3)) for y in found], 1))


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_network_that_hooks_itself_is_hooked_once(ran_before: bool) -> None:
    model = Watched().eval()
    if ran_before:
        model(X)
    graph = trace_groups(model, X)
    assert set(graph.frozen) == {"fc"}, graph.frozen
    assert [len(block._forward_hooks) for block in model.blocks] == [ran_before] * 2
    assert model(X).shape == (8, 4)
