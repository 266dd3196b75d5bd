"""The rewrite keeps objects, formats, gradients, optimizer state and averages, and undoes itself on errors."""

from __future__ import annotations

import copy
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pruning.engine.cutting import RewriteError
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import Constraints, trace_groups


class Net(nn.Module):
    """Residual network with batch norm and a depthwise layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.dw, self.conv3 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = x + self.conv3(self.dw(self.bn2(self.conv2(x)).relu()))
        return self.fc(x.mean((2, 3)))


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
KEEP = {"conv1": [0, 2, 3, 5, 7], "conv2": [1, 2, 3, 8, 9, 10, 11]}


def fresh() -> Net:
    torch.manual_seed(0)
    return Net()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in model.modules()],
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()},
        "attributes": {n: dict(vars(m)) for n, m in model.named_modules()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["modes"] == after["modes"]
    for key in ("state", "grads"):
        assert before[key].keys() == after[key].keys()
        for name, tensor in before[key].items():
            other = after[key][name]
            assert (tensor is None) == (other is None)
            assert tensor is None or torch.equal(tensor, other), name
    for name, attributes in before["attributes"].items():
        numbers = {k: v for k, v in attributes.items() if isinstance(v, (int, tuple))}
        assert numbers == {k: after["attributes"][name][k] for k in numbers}


def test_tracing_disturbs_nothing() -> None:
    model = fresh().train()
    model.bn2.eval()
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    before, random_state = snapshot(model), torch.get_rng_state()
    identities = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    trace_groups(model, IMAGES)
    assert_same(before, snapshot(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert identities == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_objects_formats_and_marks_are_kept() -> None:
    model = fresh().to(memory_format=torch.channels_last)
    model.conv2.weight.requires_grad_(False)
    model.conv1.weight.mark = "kept"
    calls: list[int] = []
    model.conv2.register_forward_hook(lambda *_: calls.append(1))
    gradient_shapes: list[tuple[int, ...]] = []
    model.conv3.weight.register_hook(lambda grad: gradient_shapes.append(tuple(grad.shape)))
    identities = {name: id(p) for name, p in model.named_parameters()}
    modules = {name: id(m) for name, m in model.named_modules()}
    graph = trace_groups(model, IMAGES)
    prune_channels(model, graph, KEEP)
    calls.clear()  # cuts are tried before they are made
    gradient_shapes.clear()
    assert identities == {name: id(p) for name, p in model.named_parameters()}
    assert modules == {name: id(m) for name, m in model.named_modules()}
    assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.conv2.weight.is_contiguous()
    assert model.conv3.weight.stride() == (7, 1, 7, 7)  # 1×1 kernels keep the strides of channels-last
    assert not model.conv2.weight.requires_grad
    assert model.conv1.weight.requires_grad
    assert model.conv1.weight.mark == "kept"
    assert (model.conv2.in_channels, model.conv2.out_channels, model.dw.groups, model.bn2.num_features) == (
        5,
        7,
        7,
        7,
    )
    assert model.fc.in_features == 5
    model.train()(IMAGES).sum().backward()
    assert calls == [1]
    assert gradient_shapes == [(5, 7, 1, 1)]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
        lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
        lambda p: torch.optim.Adam(p, 0.01, fused=True),
        lambda p: torch.optim.NAdam(p, 0.01),
        lambda p: torch.optim.Adafactor(p, 0.01),
    ],
    ids=["sgd", "foreach", "rmsprop", "adamw", "fused", "nadam", "adafactor"],
)
def test_dead_channels_leave_without_a_trace_in_training(make: Any) -> None:
    """Removing channels whose slices are zero and get no gradient changes neither losses nor optimizer state."""
    model = fresh().eval()
    dead = [i for i in range(12) if i not in KEEP["conv2"]]
    with torch.no_grad():
        for tensor in (
            model.conv2.weight,
            model.conv2.bias,
            model.bn2.weight,
            model.bn2.bias,
            model.bn2.running_mean,
            model.dw.weight,
            model.dw.bias,
        ):
            tensor[dead] = 0
        model.conv3.weight[:, dead] = 0
    optimizer = make(model.parameters())
    step(model, optimizer)
    reference, reference_optimizer = copy.deepcopy((model, optimizer))
    graph = trace_groups(model, IMAGES)
    report = prune_channels(model, graph, {"conv2": KEEP["conv2"]}, optimizers=[optimizer])
    assert report.widths == {"conv2": (12, 7)}
    assert not report.dropped_states
    adafactor = isinstance(
        optimizer, torch.optim.Adafactor
    )  # its factors are means over the removed slices too
    for _ in range(0 if adafactor else 3):
        step(model, optimizer)
        step(reference, reference_optimizer)
        torch.testing.assert_close(model(IMAGES), reference(IMAGES), rtol=1e-4, atol=1e-6)
    for parameter in model.parameters():
        for value in optimizer.state[parameter].values():
            if isinstance(value, Tensor) and value.dim() == parameter.dim() and not adafactor:
                assert value.shape == parameter.shape
    step(model, optimizer)


def test_state_of_unknown_form_starts_anew() -> None:
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer)
    optimizer.state[model.conv2.weight]["preconditioner"] = torch.eye(5)
    graph = trace_groups(model, IMAGES)
    report = prune_channels(model, graph, KEEP, optimizers=[optimizer])
    assert report.dropped_states == ("conv2.weight",)
    assert not optimizer.state[model.conv2.weight]
    step(model, optimizer)


def test_state_within_containers_is_cut_too() -> None:
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    weight = model.conv2.weight
    moments = {
        "first": torch.randn_like(weight),
        "rows": [torch.randn(12, 1, 1, 1), 3],
        "step": torch.ones(1),
    }
    optimizer.state[weight] = {"moments": moments, "name": "conv2"}
    optimizer.state[model.fc.weight] = {"seen": [7]}
    prune_channels(model, trace_groups(model, IMAGES), KEEP, optimizers=[optimizer])
    found = optimizer.state[weight]["moments"]
    assert torch.equal(found["first"], moments["first"][KEEP["conv2"]][:, KEEP["conv1"]])
    assert torch.equal(found["rows"][0], moments["rows"][0][KEEP["conv2"]])
    assert (found["rows"][1], found["step"].shape, optimizer.state[weight]["name"]) == (3, (1,), "conv2")
    assert optimizer.state[model.fc.weight] == {"seen": [7]}


@pytest.mark.parametrize("state", [[torch.eye(12)], {"rows": torch.zeros(5)}, types.SimpleNamespace(rows=1)])
def test_containers_of_unknown_form_start_anew(state: Any) -> None:
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer)
    optimizer.state[model.conv2.weight]["preconditioner"] = state
    report = prune_channels(model, trace_groups(model, IMAGES), KEEP, optimizers=[optimizer])
    assert report.dropped_states == ("conv2.weight",)
    step(model, optimizer)


def test_gradients_follow() -> None:
    model = fresh()
    F.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2, 3])).backward()
    expected = model.conv2.weight.grad[KEEP["conv2"]][:, KEEP["conv1"]]
    prune_channels(model, trace_groups(model, IMAGES), KEEP)
    assert torch.equal(model.conv2.weight.grad, expected)


def test_averages_follow() -> None:
    model = fresh()
    averaged, copied = AveragedModel(model), copy.deepcopy(model)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for tensor in (*averaged.parameters(), *copied.parameters()):
            tensor.mul_(0.5)
    graph = trace_groups(model, IMAGES)
    prune_channels(model, graph, KEEP, emas=[averaged, copied, plain])
    assert torch.equal(averaged.module.conv2.weight, model.conv2.weight * 0.5)
    assert torch.equal(plain["conv2.weight"], model.conv2.weight)
    averaged.update_parameters(model)
    averaged.eval()(IMAGES)
    copied.eval()(IMAGES)


def test_errors_leave_everything_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer)
    graph = trace_groups(model, IMAGES)
    before, signature = snapshot(model), graph.signature()
    with pytest.raises(ValueError, match="'nowhere'"):
        prune_channels(model, graph, {"nowhere": [0]})
    with pytest.raises(ValueError, match=r"'conv1': 0 of 8\b"):
        prune_channels(model, graph, {"conv1": []})
    with pytest.raises(ValueError, match=r"'conv1': keep indices.*0…7"):
        prune_channels(model, graph, {"conv1": [0, 99]})
    with pytest.raises(ValueError, match=r"'fc'.*output"):
        prune_channels(model, graph, {"fc": [0]})
    smaller = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RewriteError, match=r"'conv1\.weight'.*trace"):
        prune_channels(model, graph, KEEP, emas=[smaller])

    calls: list[str] = []

    def fail(owner: Any, name: str, value: Any) -> None:
        calls.append(name)
        if len(calls) == 3:
            raise MemoryError("in the middle")
        setattr(owner, name, value)

    monkeypatch.setattr("pruning.engine.cutting.setattr", fail, raising=False)
    with pytest.raises(MemoryError):
        prune_channels(model, graph, KEEP, optimizers=[optimizer])
    monkeypatch.undo()
    assert_same(before, snapshot(model))
    assert graph.signature() == signature
    assert optimizer.state[model.conv2.weight]["momentum_buffer"].shape == model.conv2.weight.shape
    step(model, optimizer)


def test_every_dtype_and_frozen_backbone() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = fresh().to(dtype).requires_grad_(False).eval()
        graph = trace_groups(model, IMAGES.to(dtype))
        prune_channels(model, graph, KEEP)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(IMAGES.to(dtype)).shape == (4, 4)


def test_constraints() -> None:
    model = fresh()
    constraints = Constraints(round_to=4, min_width=2, ignored=("conv3",), limits={"conv2": 0.5})
    graph = trace_groups(model, IMAGES, constraints=constraints)
    assert "ignored" in graph.frozen["conv1"]  # conv3 adds to it
    assert graph.allowed_widths("conv2") == [8, 12]
    with pytest.raises(ValueError, match=r"'conv2': 5 of 12\b.*\b6\b"):
        prune_channels(model, graph, {"conv2": range(5)})
    with pytest.raises(ValueError, match="ignored='nowhere'"):
        trace_groups(model, IMAGES, constraints=Constraints(ignored=("nowhere",)))
    with pytest.raises(ValueError, match="round_to=0"):
        Constraints(round_to=0)


def test_repeated_rewrites_down_to_one() -> None:
    model = fresh().eval()
    graph = trace_groups(model, IMAGES)
    generator = np.random.default_rng(0)
    while any(group.width > 1 for group in graph.prunable):
        for group in graph.prunable:
            if group.width > 1:
                prune_channels(model, graph, {group: np.sort(generator.permutation(group.width)[1:])})
        assert model(IMAGES).shape == (4, 4)
    assert graph.macs == pytest.approx(64 * (27 + 9 + 9 + 1) + 4)


@pytest.mark.parametrize("value", [0.0, 1e20, float("nan")])
def test_groups_do_not_depend_on_the_weights(value: float) -> None:
    expected = trace_groups(fresh(), IMAGES).signature()
    model = fresh()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value if tensor.is_floating_point() else 1)
    assert trace_groups(model, IMAGES).signature() == expected


def test_model_without_parameters() -> None:
    with pytest.raises(ValueError, match="model='ReLU'"):
        trace_groups(nn.ReLU(), IMAGES)


def test_a_loop_may_hold_on_to_its_loss() -> None:
    """The graph of the last loss is still alive when the network changes; the next one expects the new shapes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    images = torch.randn(2, 3, 8, 8)
    graph = trace_groups(model, images)
    loss = model(images).sum()
    loss.backward()
    prune_channels(model, graph, {"0": [0, 2, 5]})
    model(images).sum().backward()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.shape == (3, 3, 3, 3)
    assert model[2].weight.grad is not None
    assert model[2].weight.grad.shape == (4, 3, 3, 3)
    assert loss.grad_fn is not None
