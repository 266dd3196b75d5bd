"""What trains along with a network, and what a network is wrapped in: cut with it, or refused before anything is."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from image_classification.config import ConfigError
from image_classification.ema import Ema
from pruning import Constraints, Pruner, prune
from pruning.search import RateSearch

X, Y = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
BATCHES = [(X, Y)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


class SAM(Optimizer):
    """Sharpness-aware minimisation around an optimizer, as its reference code has it (Foret et al. 2021)."""

    def __init__(self, parameters: Any, base: type[Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def first_step(self) -> None:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        with torch.no_grad():
            for p in held:
                self.state[p]["old_p"] = p.detach().clone()
                p.add_(p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12)))

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "old_p" in self.state[p]:
                    p.data.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()


class Lookahead(Optimizer):
    """k steps forward, one step back (Zhang et al. 2019); `apart` keeps the slow weights outside the state."""

    def __init__(self, base: Optimizer, apart: bool = False) -> None:
        self.base, self.apart = base, apart
        super().__init__(base.param_groups, {})
        self.slow = [[p.detach().clone() for p in g["params"]] for g in base.param_groups] if apart else []
        for group in base.param_groups if not apart else ():
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()

    def step(self, closure: Any = None) -> None:
        self.base.step()
        for p, state in self.state.items():
            state["slow"].lerp_(p.detach(), 0.5)
            p.data.copy_(state["slow"])


class TwoOptimizers:
    """Not an optimizer itself, but holds two."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = [
            torch.optim.SGD(model[:2].parameters(), 0.1, momentum=0.9),
            torch.optim.AdamW(model[2:].parameters()),
        ]

    def step(self) -> None:
        for part in self.parts:
            part.step()


def train(model: nn.Module, optimizer: Any, num_steps: int = 2) -> None:
    for _ in range(num_steps):
        F.cross_entropy(model(X), Y).backward()
        if isinstance(optimizer, SAM):
            optimizer.first_step()
            model.zero_grad()
            F.cross_entropy(model(X), Y).backward()
        for one in optimizer if isinstance(optimizer, list) else [optimizer]:
            one.step()
        model.zero_grad()


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "sam": lambda model: SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9),
    "lookahead": lambda model: Lookahead(sgd(model)),
    "two": TwoOptimizers,
    "list": lambda model: TwoOptimizers(model).parts,
}


@pytest.mark.parametrize("name", sorted(WRAPPED))
def test_wrapped_optimizers_are_cut_with_what_is_in_them(name: str) -> None:
    """Removed channels are dead, so the smaller network has to train as the whole one does."""
    model = network()
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias, model[2].weight, model[2].bias):
            tensor[6:] = 0
        model[2].weight[:, 6:] = 0
        model[6].weight[:, 6:] = 0
    whole = copy.deepcopy(model)
    optimizer, other = WRAPPED[name](model), WRAPPED[name](whole)
    pruner = Pruner(model, X[:2], criterion="magnitude", search="uniform", budget={"params": 0.5}, delta=0.3,
                    optimizer=optimizer, constraints=Constraints(min_width=6))  # fmt: skip
    if name == "list":
        optimizer, other = list(optimizer), list(other)
    while not pruner.done:
        train(model, optimizer)
        train(whole, other)
        pruner.step([])
    train(model, optimizer)
    train(whole, other)
    assert model[0].out_channels == model[2].out_channels == 8
    torch.testing.assert_close(model(X), whole(X))


def test_tensors_outside_of_the_state_are_refused() -> None:
    model = network()
    with pytest.raises(ConfigError, match=r"optimizer='Lookahead'.*'slow'"):
        Pruner(model, X[:2], optimizer=Lookahead(sgd(model), apart=True))


class SlowWeights:
    """A wrapper that is no optimizer, with weights of its own."""

    def __init__(self, inner: Optimizer, slow: Any) -> None:
        self.inner, self.slow = inner, slow


def test_tensors_in_a_wrapper_are_refused() -> None:
    model = network()
    slow = [[parameter.detach().clone() for parameter in model.parameters()]]
    with pytest.raises(ConfigError, match=r"optimizer='SlowWeights'.*'slow'"):
        Pruner(model, X[:2], optimizer=SlowWeights(sgd(model), slow))
    Pruner(model, X[:2], optimizer=SlowWeights(sgd(model), list(model.parameters())))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda model: sgd(network()), "optimizer='SGD'.*parameters"),
        (lambda model: [sgd(model), sgd(network())], "optimizer='SGD'.*parameters"),
        (lambda model: "sgd", r"optimizer='str'.*torch\.optim\.Optimizer"),
        (lambda model: torch.optim.LBFGS(model.parameters()), "optimizer='LBFGS'"),
    ],
)
def test_other_optimizers_are_refused_at_once(given: Any, message: str) -> None:
    model = network()
    with pytest.raises(ConfigError, match=message):
        Pruner(model, X[:2], optimizer=given(model))


def test_a_forgotten_optimizer_is_named_before_its_network_is_cut() -> None:
    model = network()
    first, second = TwoOptimizers(model).parts
    pruner = Pruner(model, X[:2], optimizer=first, budget=0.5, delta=0.25)
    train(model, [first, second])
    with pytest.raises(ConfigError, match=r"optimizer=\['SGD'\]: AdamW\b"):
        pruner.step(BATCHES)
    assert model[0].out_channels == model[2].out_channels == 12
    pruner = Pruner(model, X[:2], optimizer=[first, second], budget=0.5, delta=0.25)
    train(model, [first, second])
    pruner.step(BATCHES)
    train(model, [first, second])


def test_an_optimizer_without_state_may_be_left_out() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Pruner(model, X[:2], budget=0.5, delta=0.25)
    while not pruner.done:
        train(model, optimizer)
        pruner.step(BATCHES)
    train(model, optimizer)


def test_gradients_that_no_optimizer_takes_are_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    F.cross_entropy(model(X), Y).backward()
    prune(model, X[:2])
    assert "'0.weight' has a gradient, but is in no optimizer" in caplog.text


def test_a_loss_that_is_still_held_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    loss = F.cross_entropy(model(X), Y)
    prune(model, X[:2], optimizer=sgd(model))
    assert "still refers to '0.weight': drop the loss" in caplog.text
    caplog.clear()
    del loss
    prune(model, X[:2], budget=0.6)
    assert "drop the loss" not in caplog.text


class Holder:
    """An average in a plain object, as timm's first `ModelEma` is."""

    def __init__(self, model: nn.Module) -> None:
        self.ema = copy.deepcopy(model)


class OnlineAndAverage(nn.Module):
    """Both networks as submodules, as in ema-pytorch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.online_model = model
        self.ema_model = copy.deepcopy(model)


@pytest.mark.parametrize(
    ("wrap", "average"),
    [
        (copy.deepcopy, lambda given: given),
        (AveragedModel, lambda given: given.module),
        (lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.9)), lambda given: given.module),
        (lambda model: Ema(model, 0.9), lambda given: given.module),
        (Holder, lambda given: given.ema),
        (OnlineAndAverage, lambda given: given.ema_model),
    ],
)
def test_averages_are_found_in_what_holds_them(wrap: Any, average: Any) -> None:
    model = network()
    given = wrap(model)
    with torch.no_grad():
        for parameter in average(given).parameters():
            parameter.mul_(0.5)
    pruner = Pruner(model, X[:2], ema=given, criterion="magnitude", delta=1.0)
    pruner.step([])
    for mine, other in zip(model.parameters(), average(given).parameters(), strict=True):
        torch.testing.assert_close(other, mine * 0.5)


def test_averages_of_another_network_are_refused() -> None:
    model = network()
    with pytest.raises(ConfigError, match=r"ema='Linear'.*'0\.weight'"):
        Pruner(model, X[:2], ema=nn.Linear(3, 4))
    wider = copy.deepcopy(model)
    wider[0] = nn.Conv2d(3, 24, 3)
    with pytest.raises(ConfigError, match=r"ema='AveragedModel'.*'0\.weight'.*\(24, 3, 3, 3\)"):
        Pruner(model, X[:2], ema=AveragedModel(wider))
    with pytest.raises(ConfigError, match="ema='ShadowList'"):
        Pruner(model, X[:2], ema=type("ShadowList", (), {"shadow": list(model.parameters())})())


# -- wrapped networks --------------------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: nn.parallel.DistributedDataParallel(model), "DistributedDataParallel.*model.module"),
        (lambda model: dist.fsdp.fully_shard(model), "FSDPSequential"),
        (
            lambda model: dist.fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu")),
            "FullyShardedDataParallel",
        ),
    ],
)
@pytest.mark.usefixtures("process_group")
def test_networks_of_several_processes_are_refused(wrap: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^model=.*{message}"):
        prune(wrap(network()), X[:2])


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: torch.jit.trace(model, X), "TopLevelTracedModule.*ScriptModule"),
        (lambda model: torch.jit.script(model), "RecursiveScriptModule.*ScriptModule"),
        (lambda model: nn.Sequential(torch.jit.script(model[:4]), *model[4:]), "Sequential, module '0'"),
        (lambda model: torch.compile(model), "OptimizedModule.*model.module"),
        (lambda model: nn.DataParallel(model), "DataParallel.*model.module"),
        (lambda model: model.forward, "torch.nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrapped_networks_are_refused(wrap: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^model=.*{message}"):
        prune(wrap(network()), X[:2])


def prepared(model: nn.Module) -> nn.Module:
    """With fake quantisers, as quantisation-aware training has it."""
    quantization = pytest.importorskip("torch.ao.quantization")
    model.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")
    return quantization.prepare_qat(model)


def quantised(model: nn.Module) -> nn.Module:
    """With integer weights in its linear layers."""
    quantization = pytest.importorskip("torch.ao.quantization")
    return quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("quantise", [prepared, quantised])
@pytest.mark.filterwarnings("ignore")
def test_quantised_networks_are_refused(quantise: Any) -> None:
    with pytest.raises(ConfigError, match="quantised"):
        prune(quantise(network()), X[:2])


def compiled_in_place(model: nn.Module, backend: str) -> nn.Module:
    model.compile(backend=backend)
    return model


def compiled_in_part(model: nn.Module, backend: str) -> nn.Module:
    model[2].compile(backend=backend)
    return model


@pytest.mark.parametrize("how", [compiled_in_place, torch.compile, compiled_in_part])
def test_a_network_that_was_compiled_before_trains_on(how: Any) -> None:
    """Scores, widths and training are those of the plain network, before and after every rewrite."""
    torch._dynamo.reset()
    plain, model = network(), network()
    running = how(model, backend="eager")
    trained = []
    for bare, run in ((plain, plain), (model, running)):
        optimizer = sgd(bare)
        pruner = Pruner(bare, X[:2], optimizer=optimizer, budget=0.5, delta=0.25)
        train(run, optimizer)
        while not pruner.done:
            pruner.step(BATCHES)
            train(run, optimizer)
        trained.append([group.width for group in pruner.graph.groups])
    assert trained[0] == trained[1]
    torch.testing.assert_close(running(X), plain(X))


# -- pairs, budgets, intervals -----------------------------------------------------------------------------


class Momentum(nn.Module):
    """A query network and its slow copy. `apart` cuts them independently: only one has a neighbour to please."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = network()[:5], network()[:5]
        self.key.requires_grad_(False)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.query(x), self.key(x)], 1).flatten(1))


def test_a_momentum_pair_is_cut_alike_or_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    model = Momentum()
    pruner = Pruner(model, X[:2], delta=1.0)
    mentioned = "'query' and 'key' have the same parameters" in caplog.text
    pruner.step(BATCHES)
    same = all(
        a.shape == b.shape for a, b in zip(model.query.parameters(), model.key.parameters(), strict=True)
    )
    alike = same and all(
        torch.equal(a, b) for a, b in zip(model.query.parameters(), model.key.parameters(), strict=True)
    )
    assert mentioned or alike


class Parted(nn.Module):
    """Its middle convolution has no batch norm: bn-scale has nothing to say of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 64, 3)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.wide(torch.relu(self.norm(self.first(x))))).mean((2, 3)))


@pytest.mark.parametrize("search", ["global", "uniform", "greedy"])
def test_a_budget_that_the_scored_groups_cannot_meet_is_refused(search: str) -> None:
    model = Parted()
    with pytest.raises(ConfigError, match=r"budget='params=0\.1'.*\bwide\b"):
        prune(model, X[:2], criterion="bn-scale", budget={"params": 0.1}, calibration=BATCHES, search=search)
    assert model.first.out_channels == 8
    with pytest.raises(ConfigError, match=r"budget='params=0\.1'.*\bwide\b"):
        Pruner(model, X[:2], criterion="bn-scale", budget={"params": 0.1}, delta=0.1, search=search)


class Named(nn.Module):
    """Returns a mapping; by another class it is said that it takes targets too."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = Parted()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"probabilities": self.parts(x).softmax(1)}


class TakesLabels(Named):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = super().forward(x)
        return outputs if labels is None else outputs | {"loss": outputs["probabilities"].mean()}


@pytest.mark.parametrize(
    "given",
    [{"criterion": "taylor"}, {"criterion": "fisher"}, {"search": "greedy"}, {"search": "sensitivity"}],
)
def test_outputs_without_a_loss_are_refused_at_once(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"loss=None.*\bdict\b"):
        Pruner(Named(), X[:2], **given)
    Pruner(Named(), X[:2], loss=lambda outputs, batch: outputs["probabilities"].mean(), **given)
    Pruner(TakesLabels(), X[:2], **given)
    Pruner(Named(), X[:2], criterion="magnitude", search="global")


def test_a_layer_that_pays_for_all_is_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    def mentioned(**given: Any) -> bool:
        caplog.clear()
        Pruner(Parted(), X[:2], criterion="magnitude", budget={"params": 0.4}, **given).step(BATCHES)
        return any("`delta`" in record.message for record in caplog.records)

    assert mentioned(search="greedy", delta=0.6)
    assert not mentioned(search="greedy", delta=0.1)
    assert not mentioned(search="global", delta=0.6)


def test_a_missed_budget_is_never_done(caplog: pytest.LogCaptureFixture) -> None:
    class Lazy:
        def choose(self, situation: Any) -> Any:
            from pruning.search import Decision

            group = situation.groups[0]
            situation.mask = situation.without(situation.lowest(group, situation.widths_below(group)[-1]))
            return Decision(situation.keep(situation.mask))

    model = network()
    with pytest.raises(ConfigError, match=r"budget='macs=0\.3'.* 0\.9\d+ "):
        prune(model, X[:2], search=Lazy(), budget=0.3)
    assert (model[0].out_channels, model[2].out_channels) == (12, 12)
    pruner = Pruner(model, X[:2], criterion="magnitude", search=Lazy(), budget=0.3, delta=0.35)
    pruner.step([])
    assert not pruner.missed
    pruner.step([])
    assert pruner.missed["macs"] > 0.3
    assert not pruner.done
    assert not pruner.due(1000)
    assert "the search leaves" in caplog.text
    with pytest.raises(ConfigError, match=r"budget='macs=0\.3'.* 0\.8\d+ "):
        pruner.step([])


class Woven(nn.Module):
    """Convolutions whose weights are put together from parameters of other forms."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(3, 16, 3, 3))
        self.halves = nn.ParameterList(nn.Parameter(torch.randn(16, 16, 3, 3)) for _ in range(2))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.conv2d(x, self.turned.transpose(0, 1)))
        x = torch.relu(F.conv2d(x, torch.cat(list(self.halves))))
        return self.head(x.mean((2, 3)))


def test_magnitude_scores_weights_that_are_computed_from_parameters() -> None:
    torch.manual_seed(0)
    record = prune(Woven(), X[:2], criterion="magnitude", budget=0.3)
    assert record.costs["macs"][1] <= 0.3 * record.costs["macs"][2]


def test_a_late_pruner_keeps_its_intervals() -> None:
    """One that starts after its first intervals rewrites at once, then an interval apart; so says the forecast."""
    pruner = Pruner(network(), X[:2], criterion="magnitude", budget=0.5, delta=0.1, step=10)
    done = []
    for iteration in range(95, 140):
        if pruner.due(iteration):
            pruner.step(BATCHES, iteration)
            done.append(iteration)
            if len(done) == 1:
                ahead = [row["iteration"] for row in pruner.dry_run(BATCHES)]
    assert done == [95, 105, 115, 125, 135]
    assert ahead == done[1:]


@pytest.mark.parametrize(
    ("share", "width", "least"), [(0.07, 100, 7), (0.1, 30, 3), (0.29, 100, 29), (0.3, 10, 3)]
)
def test_a_share_of_a_width_is_not_rounded_up_by_the_computer(share: float, width: int, least: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, 4, 1))
    pruner = Pruner(model, X[:2], constraints=Constraints(min_width=share))
    assert pruner.graph.min_width_of("0") == least


def test_no_hooks_on_optimizers_stay_behind() -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    before = len(hooks)
    model = network()
    pruner = Pruner(model, X[:2])
    assert len(hooks) == before + 1
    del pruner
    assert len(hooks) == before


def test_what_is_said_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pruner = Pruner(network(), X[:2], budget=0.6, delta=0.2)
    while not pruner.done:
        pruner.step(BATCHES)
    assert caplog.text.count("pruning by criterion discriminant") == 1


class DecidesByWidth(nn.Module):
    """Right at every width but 7."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = self.second(x * 0.5 if x.shape[1] == 7 else x)
        return self.head(torch.relu(x).mean((2, 3)))


def test_a_width_at_which_the_network_decides_otherwise_is_not_taken(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model = DecidesByWidth()
    search = RateSearch({"first": 9 / 16, "second": 0.5})
    record = Pruner(model, X[:2], criterion="magnitude", search=search, budget=None, delta=1.0).step([])
    assert record.widths == {"first": [16, 8], "second": [16, 8]}
    assert "first keeps 8 instead of 7" in caplog.text


class KeepsAVector(nn.Module):
    """Makes a vector of the first width that it sees, and keeps it: that width stays from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)
        self.vector: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if self.vector is None:
            self.vector = torch.full((x.shape[1], 1, 1), 2.0)
        return self.head(torch.relu(self.second(x * self.vector)).mean((2, 3)))


def test_a_group_that_cannot_be_cut_any_more_stays_whole(caplog: pytest.LogCaptureFixture) -> None:
    model = KeepsAVector()
    search = RateSearch({"first": 0.5, "second": 0.5})
    pruner = Pruner(model, X[:2], criterion="magnitude", search=search, budget=None, delta=1.0)
    model(X)
    record = pruner.step([])
    assert record.widths == {"second": [16, 8]}
    assert list(record.scores) == ["second"]
    assert "first keeps 16 instead of 8" in caplog.text


def test_a_rewrite_within_autocast() -> None:
    """Autocast keeps casts of weights for the length of its block; the network goes on with its new ones there."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten()
    )
    model.append(nn.LazyLinear(4))
    model(X)
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(model(X), Y).backward()
        record = Pruner(model, X[:2], criterion="taylor", delta=1.0).step([(X, Y)])
        found = model.eval()(X)
    assert record.widths
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(X), found)
