"""Candidates' passes that share their beginning give the figures of whole passes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from image_classification.models import create_model
from image_classification.models.running import Args, Kwargs, Outputs
from pruning.engine.operator_mode import OperatorMode
from pruning.engine.trace_groups import trace_groups
from pruning.repair.local_repair import LocalRepair
from pruning.search.loss_change import LossChange


class _Small(nn.Module):
    """Four layers and three groups; `between` follows the first layer."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8, 8))
        self.head = nn.Linear(8, 4)
        self.between = between

    def forward(self, images: Tensor) -> Tensor:
        features = self.between(self.conv1(images))
        features = self.conv2(features).relu_()
        features = features + self.conv3(features).relu_()
        return self.head(self.conv4(features).relu_().mean((2, 3)))


def _judges(
    model: nn.Module, size: int, *, repaired: bool
) -> tuple[LossChange, LossChange, list[dict[int, np.ndarray]]]:
    """Return a judge that shares beginnings, one that does not, and candidates."""
    torch.manual_seed(1)
    images, targets = torch.randn(12, 3, size, size), torch.randint(0, 4, (12,))
    batches = [(images[:8], targets[:8]), (images[8:], targets[8:])]
    graph = trace_groups(model, images[:2])
    judges = []
    for shares in (True, False):
        repair = LocalRepair(model, graph, batches) if repaired else None
        judges.append(LossChange(model, graph, batches, repair=repair))
        judges[-1].shares = shares
    cuts = [
        {group.index: np.arange(kept)} for kept in (1, 3) for group in graph.prunable if group.width > kept
    ]
    return judges[0], judges[1], cuts


class _Convolutions(OperatorMode):
    """Counts the convolutions that really run."""

    count = 0

    def operator(self, func: OpOverload, args: Args, kwargs: Kwargs) -> Outputs:
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **kwargs)


@pytest.mark.parametrize("repaired", [False, True], ids=["cut", "repaired"])
@pytest.mark.parametrize("arch", ["resnet20", "torchvision/mobilenet_v3_small", "torchvision/squeezenet1_1"])
def test_figures_are_those_of_whole_passes(arch: str, repaired: bool) -> None:
    torch.manual_seed(0)
    model = create_model(arch, num_classes=4).eval()
    sharing, whole, cuts = _judges(model, 32, repaired=repaired)
    cuts = cuts[::8]
    assert np.array_equal(sharing.measure(cuts), whole.measure(cuts))
    assert sharing.shares


def test_a_beginning_runs_once_and_channels_closed_in_all_candidates_belong_to_it() -> None:
    torch.manual_seed(0)
    model = _Small().eval()
    sharing, whole, _ = _judges(model, 8, repaired=True)
    cuts = {2: np.array([0, 1])}, {1: np.arange(5)}, {2: np.array([2, 3])}
    with_closed = [{0: np.arange(4)} | cut for cut in cuts]
    for judge in (sharing, whole):
        judge.measure(with_closed)  # collects the inputs that the repair needs
    with _Convolutions() as few:
        found = sharing.measure(with_closed)
    with _Convolutions() as many:
        expected = whole.measure(with_closed)
    assert np.array_equal(found, expected)
    # Both batches: all layers for the group of layers 2 and 3, the last two for the next candidate, none for the last
    # one, whose channels only the head reads. The first batch is then run whole once, to compare.
    assert (few.count, many.count) == (2 * (4 + 2 + 0) + 4, 2 * 3 * 4)


def _read(features: Tensor) -> Tensor:
    return features * (1.0 + abs(features.detach().sum().item() % 1))


def _listed(features: Tensor) -> Tensor:
    return features * torch.tensor(features.mean((0, 2, 3)).tolist())[:, None, None]


def _through_numpy(features: Tensor) -> Tensor:
    return torch.from_numpy(np.maximum(features.numpy(), 0))


def _noisy(features: Tensor) -> Tensor:
    return features + torch.rand_like(features)


def _caught(features: Tensor) -> Tensor:
    try:
        return features[:, :, :4].relu()
    except Exception:
        return features


@pytest.mark.parametrize("between", [_read, _listed, _noisy, _caught])
def test_values_that_the_code_reads_or_draws_stay_right(between: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    sharing, whole, cuts = _judges(_Small(between).eval(), 8, repaired=False)
    assert np.array_equal(sharing.measure(cuts), whole.measure(cuts))
    assert sharing.shares


class _Remembering(_Small):
    """Adds a mean of its features that every pass moves at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images + self.mean[:, None, None])
        self.mean += 1e-5
        return logits


def test_buffers_that_passes_write_into_are_read_anew() -> None:
    torch.manual_seed(0)
    sharing, whole, cuts = _judges(_Remembering().eval(), 8, repaired=False)
    assert np.array_equal(sharing.measure(cuts), whole.measure(cuts))


def test_a_network_whose_code_changes_from_pass_to_pass_is_run_whole() -> None:
    torch.manual_seed(0)
    calls = []

    def between(features: Tensor) -> Tensor:
        calls.append(None)
        return features.relu() if len(calls) % 2 else features.relu().mul(1.0)

    sharing, whole, cuts = _judges(_Small(between).eval(), 8, repaired=False)
    assert np.array_equal(sharing.measure(cuts), whole.measure(cuts))


def test_memory_written_past_operators_is_noticed() -> None:
    torch.manual_seed(0)

    def between(features: Tensor) -> Tensor:
        out = torch.empty_like(features)
        with torch._C.DisableTorchFunction():  # as an extension without registered operators reads and writes
            source, target = (
                np.ctypeslib.as_array(_pointer(tensor.data_ptr()), shape=(tensor.numel(),))
                for tensor in (features, out)
            )
            target[:] = np.maximum(np.nan_to_num(source), 0) + 1
        return out

    sharing, whole, cuts = _judges(_Small(between).eval(), 8, repaired=False)
    assert np.array_equal(sharing.measure(iter(cuts)), whole.measure(cuts))
    assert not sharing.shares


def _pointer(address: int) -> object:
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
