"""Gates multiply what consumers read, are differentiable, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pruning.engine.gates import Gates
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups


class Net(nn.Module):
    """Two convolutions and a classifier; the second convolution's output is read after flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = (
            nn.Conv2d(3, 5, 3, padding=1),
            nn.Conv2d(5, 4, 3, padding=1),
            nn.Linear(4 * 16, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).relu()).sigmoid().flatten(1))


IMAGES = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1)).double()


def by_hand(model: Net, gate_a: Tensor, gate_b: Tensor) -> Tensor:
    x = model.a(IMAGES).relu() * gate_a.reshape(-1, 5, 1, 1)
    return model.fc((model.b(x).sigmoid() * gate_b.reshape(-1, 4, 1, 1)).flatten(1))


def test_values_and_derivatives() -> None:
    model = Net().double()
    graph = trace_groups(model, IMAGES)
    gates_a, gates_b = (torch.rand(n, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    expected = torch.autograd.grad(by_hand(model, gates_a, gates_b).square().sum(), [gates_a, gates_b])
    with Gates(model, graph) as gates:
        values = torch.ones(graph.num_units, dtype=torch.float64)
        values[torch.from_numpy(graph.group("a").units)] = gates_a.detach()
        values[torch.from_numpy(graph.group("b").units)] = gates_b.detach()
        gates.values = values.requires_grad_()
        (found,) = torch.autograd.grad(model(IMAGES).square().sum(), [gates.values])
    torch.testing.assert_close(found[torch.from_numpy(graph.group("a").units)], expected[0])
    torch.testing.assert_close(found[torch.from_numpy(graph.group("b").units)], expected[1])


def test_per_sample_derivatives() -> None:
    model = Net().double()
    graph = trace_groups(model, IMAGES)
    with Gates(model, graph, per_sample=3) as gates:
        gates.values = gates.values.double().requires_grad_()
        (found,) = torch.autograd.grad(model(IMAGES).square().sum(), [gates.values])
    for sample in range(3):
        with Gates(model, graph) as gates:
            gates.values = gates.values.double().requires_grad_()
            (one,) = torch.autograd.grad(model(IMAGES[sample : sample + 1]).square().sum(), [gates.values])
        torch.testing.assert_close(found[sample], one)


def test_closed_gates_keep_reset_and_selection() -> None:
    model = Net().double()
    graph = trace_groups(model, IMAGES)
    whole = model(IMAGES)
    with Gates(model, graph, groups=["a"]) as gates:
        assert torch.equal(model(IMAGES), whole)
        gates.set_keep({"a": [1, 4]})
        assert gates["a"].tolist() == [0, 1, 0, 0, 1]
        torch.testing.assert_close(model(IMAGES), by_hand(model, gates["a"].double(), torch.ones(4).double()))
        gates.reset()
        assert torch.equal(model(IMAGES), whole)


def test_no_hook_leaks() -> None:
    model = Net().double()
    graph = trace_groups(model, IMAGES)
    with pytest.raises(RuntimeError), Gates(model, graph) as gates:
        gates.set_keep({"a": [0]})
        model(IMAGES[:, :2])  # raises inside the network
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert len(list(model.parameters())) == 6


def test_parameters_keep_their_identity_and_order() -> None:
    """Also those that an operator outside any layer reads, and also after an exception in the forward pass."""
    torch.manual_seed(0)

    class Mixed(nn.Module):
        """A product with a parameter, which is known by two names, between two convolutions."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
            self.mix = nn.Parameter(torch.randn(6, 5))
            self.back = nn.Parameter(torch.randn(5, 6))
            self.same = self.back
            self.fail = False
            self.seen: list[list[str]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append([name for name, _ in self.named_parameters()])
            x = torch.einsum("nchw,cd->ndhw", self.a(x), self.mix)
            x = self.b(torch.einsum("ndhw,dc->nchw", x, self.same))
            if self.fail:
                raise RuntimeError("on purpose")
            return x.mean((2, 3))

    model, images = Mixed().eval(), torch.randn(2, 3, 4, 4)
    graph = trace_groups(model, images)
    assert graph.ungated.size
    before = list(model.named_parameters())
    model.seen.clear()

    def unchanged() -> bool:
        now = list(model.named_parameters())
        return [(name, id(p)) for name, p in now] == [(name, id(p)) for name, p in before]

    keep = {group: range(1) for group in graph.prunable}
    with Gates(model, graph) as gates:
        gates.set_keep(keep)
        closed = model(images)
        assert unchanged()
        model.fail = True
        with pytest.raises(RuntimeError, match="on purpose"):
            model(images)
        assert unchanged()
    assert unchanged()
    assert model.seen == [[name for name, _ in before]] * 2
    model.fail = False
    prune_channels(model, graph, keep)
    torch.testing.assert_close(model(images), closed)
