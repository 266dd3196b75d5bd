"""Which modules are running, and which call of each: also where modules raise, repeat and replace."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from image_classification.models.running import ModuleCall, Running, following


class Net(nn.Module):
    """A layer that is called twice, and a part that may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.caught = nn.Linear(3, 3)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(self.part(x))
        with contextlib.suppress(RuntimeError):
            x = self.caught(x)
        return self.last(input=x)


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_calls_are_counted_within_each_pass_of_the_network() -> None:
    model, left = Net(), list[str]()
    with following(model, leaving=lambda call, module, output: left.append(f"{call.name}:{call.number}")):
        model(torch.randn(1, 4))
        first = list(left)
        left.clear()
        model(torch.randn(1, 4))
    assert (
        left == first == ["part.0:0", "part.1:0", "part:0", "part.0:1", "part.1:1", "part:1", "last:0", ":0"]
    )
    assert num_hooks(model) == 0


def test_the_stack_holds_what_is_running() -> None:
    model, seen = Net(), dict[str, tuple[str, ...]]()

    def look(call: ModuleCall, _module: nn.Module, _args: object, _kwargs: object) -> None:
        seen[call.name] = running.names

    with following(model, entering=look) as running:
        model(torch.randn(1, 4))
        assert running.names == ()
        assert running.num_calls("part") == 2
    assert seen["part.1"] == ("", "part", "part.1")
    assert seen["last"] == ("", "last")


def test_arguments_and_outputs_can_be_replaced() -> None:
    model, images = Net(), torch.randn(1, 4)

    def zeros(
        call: ModuleCall, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> object:
        return args, {name: value * 0 for name, value in kwargs.items()}

    with following(model, ["last"], entering=zeros, leaving=lambda call, module, output: output + 1):
        assert torch.equal(model(images)[0], model.last.bias + 1)


@pytest.mark.parametrize("handling", [False, True], ids=["", "while another exception is handled"])
def test_the_module_that_raises_is_named(handling: bool) -> None:
    def run(running: Running) -> None:
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 3))
        assert running.failed == "part.0"
        assert running.names == ()
        model(torch.randn(1, 4))  # `caught` raises, and the network goes on
        assert running.failed is None

    model = Net()
    with following(model) as running:
        if not handling:
            run(running)
        else:
            try:
                raise KeyError
            except KeyError:
                run(running)
    assert num_hooks(model) == 0


def test_each_pass_runs_in_a_context_that_ends_with_it() -> None:
    model, events = Net(), list[str]()

    class Around:
        def __enter__(self) -> None:
            events.append("begins")

        def __exit__(self, *error: object) -> None:
            events.append("ends")

    with following(model, [], around=Around):
        model(torch.randn(1, 4))
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 3))
    assert events == ["begins", "ends"] * 2
    assert num_hooks(model) == 0


def test_a_module_that_does_not_exist_is_named() -> None:
    model = Net()
    with pytest.raises(ValueError, match="'gone'"), following(model, ["last", "gone"]):
        pass
    assert num_hooks(model) == 0
