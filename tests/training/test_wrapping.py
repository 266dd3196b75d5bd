"""What DDP sends and assumes, in a process group of one."""

from __future__ import annotations

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


class Changing(nn.Module):
    """Uses its weights once, or twice, as attribution matching does every few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.twice = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.layer(x) if self.twice else x


def gradients(bare: Changing, called: nn.Module, steps: list[bool]) -> list[Tensor]:
    found = []
    for step, twice in enumerate(steps):
        bare.twice = twice
        called(torch.full((2, 3), 1.0 + step)).square().sum().backward()
        assert bare.layer.weight.grad is not None
        found.append(bare.layer.weight.grad.clone())
        bare.zero_grad(set_to_none=True)
    return found


def test_every_step_may_use_a_weight_as_often_as_it_likes() -> None:
    """Why there is no `static_graph`: it wants all steps to be as the first one."""
    steps = [False, True, False, True]
    torch.manual_seed(0)
    alone = Changing()
    wrapped, static = copy.deepcopy(alone), copy.deepcopy(alone)
    expected = gradients(alone, alone, steps)
    for one, other in zip(gradients(wrapped, in_ddp(wrapped, CPU), steps), expected, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises((RuntimeError, AssertionError)):
        got = gradients(static, DistributedDataParallel(static, static_graph=True), steps)
        torch.testing.assert_close(torch.stack(got), torch.stack(expected))


def test_statistics_of_batch_norms_are_not_sent_before_every_pass() -> None:
    with_norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert not in_ddp(with_norm, CPU).will_sync_module_buffers()
    with_norm.register_buffer("scale", torch.ones(2))  # which a forward pass may read
    assert in_ddp(with_norm, CPU).will_sync_module_buffers()
