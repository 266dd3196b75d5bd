"""Scores of whole networks: the right places, sums over members, batches and ranks, and nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.ranks import RecordedRank
from torch import Tensor, nn

from pruning.criteria import FeatureCriterion, create_criterion, criterion_names, discriminant_scores
from pruning.criteria.scoring import score_groups, score_groups_by, warn_once
from pruning.criteria.taps import Tap, tapped
from pruning.engine.trace_groups import trace_groups

CLASSES = 5


class Residual(nn.Module):
    """A stem, one residual block with an in-place ReLU that is called twice, dropout and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.outer, self.outer_norm = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(images)))
        y = self.relu(self.inner_norm(self.inner(x)))
        y = self.outer_norm(self.outer(y))
        y += x
        y = self.relu(y)
        return self.fc(self.dropout(y.mean((2, 3))))


@pytest.fixture(autouse=True)
def forget_warnings() -> None:
    warn_once.cache_clear()


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        model(torch.randn(16, 3, 8, 8))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    return model


def make_batches(num_batches: int = 3, size: int = 8, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator),
            torch.randint(0, CLASSES, (size,), generator=generator),
        )
        for _ in range(num_batches)
    ]


def trace(model: nn.Module) -> Any:
    return trace_groups(model, torch.randn(2, 3, 8, 8))


def captured(model: nn.Module, module: str, kind: str, images: Tensor) -> Tensor:
    found: list[Tensor] = []
    with tapped(model, [Tap(module, kind, 0, lambda x: found.append(x.detach().clone()))]), torch.no_grad():
        model.eval()(images)
    return found[0]


def test_discriminant_sums_members_and_batches(network: nn.Module) -> None:
    graph, batches = trace(network), make_batches()
    pre, post = score_groups_by(
        network, graph, batches, [create_criterion("discriminant", features=f) for f in ("pre", "post")]
    )

    def expected(module: str, kind: str) -> Tensor:
        per_batch = [discriminant_scores(captured(network, module, kind, x), y) for x, y in batches]
        return torch.stack(per_batch).sum(0)

    stream, inner = graph.group("stem").index, graph.group("inner").index
    assert torch.allclose(pre[inner], expected("inner", "output"))
    assert torch.allclose(pre[stream], expected("stem", "output") + expected("outer", "output"))
    assert torch.allclose(post[inner], expected("outer", "input"))
    assert torch.allclose(post[stream], expected("inner", "input") + expected("fc", "input"))


def gate_derivatives(model: nn.Module, batch: tuple[Tensor, Tensor], group: str) -> Tensor:
    """∂ℓ_n/∂m_c by central differences in float64: the readers' weights of the group scaled, (N, width)."""
    readers = {"stem": ["inner", "fc"], "inner": ["outer"]}[group]
    wide = copy.deepcopy(model).double().eval()
    images, targets = batch[0].double(), batch[1]
    width = wide.get_submodule(readers[0]).weight.shape[1]

    def losses(unit: int, gate: float) -> Tensor:
        changed = copy.deepcopy(wide)
        for reader in readers:
            changed.get_submodule(reader).weight.data[:, unit] *= gate
        return F.cross_entropy(changed(images), targets, reduction="none")

    step = 1e-5
    with torch.no_grad():
        columns = [(losses(u, 1 + step) - losses(u, 1 - step)) / (2 * step) for u in range(width)]
    return torch.stack(columns, 1)


@pytest.mark.parametrize("group", ["stem", "inner"])
def test_gradient_criteria_against_differences(network: nn.Module, group: str) -> None:
    graph, batches = trace(network), make_batches(2)
    names = ["taylor", "fisher", "taylor-2019"]
    scores = score_groups_by(network, graph, batches, [create_criterion(name) for name in names])
    derivatives = [gate_derivatives(network, batch, group) for batch in batches]
    everything = torch.cat(derivatives)
    expected = {
        "taylor": everything.abs().mean(0),
        "fisher": everything.square().mean(0) / 2,
        "taylor-2019": torch.stack([d.mean(0) ** 2 for d in derivatives]).mean(0),
    }
    for name, found in zip(names, scores, strict=True):
        assert torch.allclose(found[graph.group(group).index], expected[name], rtol=1e-3, atol=1e-8), name


@pytest.mark.parametrize("name", sorted({*criterion_names()} - {"mean-activation", "saliency"}))
def test_network_is_left_as_it_was(network: nn.Module, name: str) -> None:
    graph = trace(network)
    network.train()
    network.inner_norm.eval()
    for number, parameter in enumerate(network.parameters()):
        parameter.grad = torch.full_like(parameter, float(number))
    network.stem.weight.requires_grad_(False)
    before = copy.deepcopy({**network.state_dict()})
    modes = [module.training for module in network.modules()]
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    generator = torch.get_rng_state()
    scores = score_groups(network, graph, make_batches(), create_criterion(name))
    assert sorted(scores) == sorted(group.index for group in graph.prunable)
    assert all(
        s.dtype == torch.float64 and s.device.type == "cpu" and (s >= 0).all() for s in scores.values()
    )
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(p.grad, g) for p, g in zip(network.parameters(), gradients, strict=True))
    assert not network.stem.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)
    assert num_hooks(network) == 0


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("share", [1, 0])
@pytest.mark.parametrize("name", ["discriminant", "taylor", "fisher", "hrank", "taylor-2019"])
def test_two_ranks_equal_one(network: nn.Module, name: str, share: int) -> None:
    graph, batches = trace(network), make_batches(3)
    together = score_groups(network, graph, batches, create_criterion(name))
    other = RecordedRank()
    score_groups(network, graph, batches[share:], create_criterion(name), distributed=other)
    first = RecordedRank(others=tuple(other.sent))
    ranks = score_groups(network, graph, batches[:share], create_criterion(name), distributed=first)
    for index, scores in together.items():
        assert torch.allclose(ranks[index], scores, rtol=1e-12)


def test_scores_are_those_of_rank_0_to_the_last_bit(network: nn.Module) -> None:
    """Ranks that sum up alike may still compute another last bit, and then search in other steps, and hang."""
    graph, batches, criteria = (
        trace(network),
        make_batches(1),
        [create_criterion("magnitude"), create_criterion("taylor")],
    )
    here = score_groups_by(network, graph, batches, criteria)

    class Follower(RecordedRank):
        def broadcast_tensors(self, tensors: Sequence[Tensor], source: int = 0) -> None:
            for tensor in tensors:
                tensor.mul_(1 + 1e-15)

    ranks = score_groups_by(network, graph, batches, criteria, distributed=Follower())
    for mine, theirs in zip(here, ranks, strict=True):
        for index, scores in mine.items():
            assert torch.equal(theirs[index], scores * (1 + 1e-15))


def test_no_batch_at_all_is_an_error(network: nn.Module) -> None:
    graph = trace(network)
    empty = [(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.long))]
    for batches in ([], empty):
        with pytest.raises(ValueError, match="calibration"):
            score_groups(network, graph, batches, create_criterion("discriminant"))
    scores = score_groups(network, graph, [], create_criterion("magnitude"))
    assert len(scores) == len(graph.prunable)


@pytest.mark.parametrize("name", ["discriminant", "taylor"])
def test_hooks_go_when_the_forward_raises(network: nn.Module, name: str) -> None:
    graph = trace(network)
    network.train()
    wrong = [(torch.randn(4, 2, 8, 8), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(RuntimeError):
        score_groups(network, graph, make_batches(1) + wrong, create_criterion(name))
    assert num_hooks(network) == 0
    assert all(module.training for module in network.modules())


def test_hooks_go_when_a_criterion_raises(network: nn.Module) -> None:
    class Broken(FeatureCriterion):
        name = "broken"

        def score(self, features: Tensor, targets: Tensor) -> Tensor:
            raise ArithmeticError("on purpose")

    graph = trace(network)
    with pytest.raises(ArithmeticError):
        score_groups(network, graph, make_batches(1), Broken())
    assert num_hooks(network) == 0


def test_taps_tell_calls_apart_and_replace(network: nn.Module) -> None:
    seen: list[tuple[int, ...]] = []
    taps = [Tap("relu", "output", 1, lambda x: seen.append(tuple(x.shape)))]
    taps += [Tap("fc", "input", 0, lambda x: x * 0), Tap("fc", "output", 0, lambda x: x + 1)]
    with tapped(network.eval(), taps), torch.no_grad():
        logits = network(torch.randn(2, 3, 8, 8))
    assert seen == [(2, 6, 8, 8)]
    assert torch.allclose(logits, network.fc.bias + 1)
    with (
        pytest.raises(ValueError, match="'gone'"),
        tapped(network, [Tap("gone", "input", 0, lambda x: x)]),
    ):
        pass
    assert num_hooks(network) == 0


def test_bf16_autocast_and_channels_last(network: nn.Module) -> None:
    graph, batches = trace(network), make_batches()
    names = ["discriminant", "taylor", "fisher", "hrank"]
    plain = score_groups_by(network, graph, batches, [create_criterion(n) for n in names])
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    turned = [(x.to(memory_format=torch.channels_last), y) for x, y in batches]
    for name, a, b in zip(
        names, plain, score_groups_by(last, graph, turned, [create_criterion(n) for n in names]), strict=True
    ):
        for index in a:
            assert torch.allclose(a[index], b[index], rtol=1e-3, atol=1e-9), name
    half = score_groups_by(
        network,
        graph,
        batches,
        [create_criterion(n) for n in names[:3]],
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )
    for name, a, b in zip(names[:3], plain[:3], half, strict=True):
        for index in a:
            assert torch.corrcoef(torch.stack([a[index], b[index]]))[0, 1] > 0.95, name


def test_a_second_pass_replaces_the_first(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, (batch, *_) = trace(network), make_batches(1)
    twice = [(torch.cat([batch[0], batch[0] + 1e-4 * torch.randn_like(batch[0])]), batch[1].repeat(2))]
    exact = score_groups(network, graph, twice, create_criterion("discriminant", precision="float64"))
    monkeypatch.setattr("pruning.criteria.discriminant.has_fast_float64", lambda device: False)
    repeated = score_groups(network, graph, twice, create_criterion("discriminant"))
    for index, scores in exact.items():
        assert torch.allclose(repeated[index], scores, rtol=1e-9)


def test_small_memory_limit_changes_nothing(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, batches = trace(network), make_batches()
    whole = score_groups(network, graph, batches, create_criterion("discriminant"))
    criterion = create_criterion("discriminant")
    monkeypatch.setattr(type(criterion), "pending_bytes", 0)
    for index, scores in score_groups(network, graph, batches, criterion).items():
        assert torch.allclose(whole[index], scores)


def test_flattened_features_and_missing_evidence(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 7),
        nn.ReLU(),
        nn.Linear(7, 5),
    )
    graph, (batch,) = trace(model), make_batches(1)
    scores = score_groups(model, graph, [batch], create_criterion("discriminant"))
    flat = captured(model, "4", "input", batch[0])
    expected = discriminant_scores(flat, batch[1]).view(4, 64).sum(1)
    assert torch.allclose(scores[graph.group("0").index], expected)
    scaled = score_groups(model, graph, [], create_criterion("bn-scale"))
    assert list(scaled) == [graph.group("0").index]
    score_groups(model, graph, [], create_criterion("bn-scale"))
    assert caplog.text.count("cannot score 4:") == 1
    with pytest.raises(ValueError, match="criterion='bn-scale'"):
        score_groups(model, graph, [], create_criterion("bn-scale"), groups=[graph.group("4")])


def test_scores_that_are_not_finite_are_refused(network: nn.Module) -> None:
    graph = trace(network)
    network.stem.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"'taylor'.*'stem'"):
        score_groups(network, graph, make_batches(1), create_criterion("taylor"))


def test_tokens_of_a_transformer() -> None:
    torch.manual_seed(0)

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.up, self.down = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 12), nn.Linear(12, 8)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.patch(images).flatten(2).transpose(1, 2)
            tokens = tokens + self.down(F.gelu(self.up(tokens)))
            return self.head(tokens.mean(1))

    model = Mixer()
    graph, (batch,) = trace(model), make_batches(1)
    scores = score_groups(model, graph, [batch], create_criterion("discriminant"))
    tokens = captured(model, "down", "input", batch[0])
    expected = discriminant_scores(tokens, batch[1], layout="channels_last")
    assert torch.allclose(scores[graph.group("up").index], expected)


def test_channels_read_outside_of_modules_have_no_exact_gate(caplog: pytest.LogCaptureFixture) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            x = F.relu(F.conv2d(F.relu(self.first(images)), self.second.weight, self.second.bias))
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Functional()
    graph, batches = trace(model), make_batches(1)
    first = graph.group("first")
    if not first.prunable:
        pytest.skip("the engine leaves such channels alone altogether")
    taylor, discriminant = score_groups_by(
        model, graph, batches, [create_criterion("taylor"), create_criterion("discriminant")]
    )
    assert first.index not in taylor
    assert "cannot score first" in caplog.text
    assert torch.allclose(
        discriminant[first.index],
        discriminant_scores(captured(model, "first", "output", batches[0][0]), batches[0][1]),
    )
