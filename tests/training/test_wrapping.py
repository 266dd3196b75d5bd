"""What DDP sends and assumes, in a process group of one."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from image_classification.wrapping import in_ddp

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def accumulated(model: nn.Module, wrapped: DistributedDataParallel) -> list[Tensor]:
    """Gradients of steps of two micro-batches, which meet other ranks in the last one."""
    found = []
    for step in range(2):
        for index in range(2):
            with contextlib.nullcontext() if index else wrapped.no_sync():
                wrapped(torch.full((2, 3), 1.0 + step + index)).square().sum().backward()
        found.append(model.get_parameter("0.weight").grad)
        model.zero_grad(set_to_none=True)
    return [gradient.clone() for gradient in found if gradient is not None]


def test_gradients_can_be_accumulated_from_the_first_step() -> None:
    """Why there is no `static_graph`, under which PyTorch fails in the first backward pass that sends nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    alone, static = copy.deepcopy(model), copy.deepcopy(model)
    for step, gradient in enumerate(accumulated(model, in_ddp(model, CPU))):
        alone.zero_grad(set_to_none=True)
        for index in range(2):
            alone(torch.full((2, 3), 1.0 + step + index)).square().sum().backward()
        torch.testing.assert_close(gradient, alone.get_parameter("0.weight").grad)
    with pytest.raises(RuntimeError, match="INTERNAL ASSERT FAILED"):
        accumulated(static, DistributedDataParallel(static, static_graph=True))


def test_statistics_of_batch_norms_are_not_sent_before_every_pass() -> None:
    with_norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert not in_ddp(with_norm, CPU).will_sync_module_buffers()
    with_norm.register_buffer("scale", torch.ones(2))  # which a forward pass may read
    assert in_ddp(with_norm, CPU).will_sync_module_buffers()
