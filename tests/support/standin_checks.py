"""On a stand-in accelerator: nothing is mixed with the CPU, and reads by the host are known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.standin import StandIn

from image_classification.models import create_model


@pytest.fixture
def standin() -> Iterator[StandIn]:
    torch.manual_seed(0)
    with StandIn() as device:
        yield device


def test_the_stand_in_refuses_mixing_and_sees_reads(standin: StandIn) -> None:
    there = torch.randn(4, 3, device=standin.device)
    assert there.device.type == "standin"
    with pytest.raises(RuntimeError, match="one device"):
        there + torch.randn(4, 3)
    with standin.reads() as reads:
        there.sum().item()
        there.cpu()
        there[there > 0]
        there.mul(2).add_(1)
    assert [read.split(" at ")[0] for read in reads] == [
        "aten._local_scalar_dense.default",
        "aten._to_copy.default",
        "aten.index.Tensor",
    ]
    assert all("standin_checks.py" in read for read in reads)


def test_a_training_step_reads_nothing(standin: StandIn) -> None:
    model = create_model("resnet20", num_classes=10).to(standin.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, targets = torch.randn(4, 3, 16, 16, device=standin.device), torch.arange(4, device=standin.device)
    with standin.reads() as reads:
        for _ in range(2):
            torch.nn.functional.cross_entropy(model(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert reads == []
