"""States that a block changes and restores: PyTorch's fused attention, buffers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from image_classification.models.modes import attention_in_steps, buffers_kept

is_fast = torch.backends.mha.get_fastpath_enabled


@pytest.mark.parametrize("before", [True, False])
def test_fused_attention_is_as_before_after_nested_blocks(before: bool) -> None:
    assert is_fast()
    torch.backends.mha.set_fastpath_enabled(before)
    try:
        with pytest.raises(KeyError), attention_in_steps():
            with attention_in_steps():
                assert not is_fast()
            assert not is_fast()
            raise KeyError
        assert is_fast() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_blocks_of_two_generators_end_in_any_order() -> None:
    """The first to end must not turn it on for the second, nor the second leave it off for the process."""

    def block() -> Iterator[None]:
        with attention_in_steps():
            yield

    one, two = block(), block()
    next(one)
    next(two)
    one.close()
    assert not is_fast()
    two.close()
    assert is_fast()


class Queue(nn.Module):
    """Writes into one buffer, puts another in place, fills a third, and leaves one that nothing can write to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(4))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", None)
        self.register_buffer("ones", torch.ones(1).expand(3))

    def forward(self, x: Tensor) -> Tensor:
        self.rows[int(self.at) % 4] = x.mean()
        self.at = self.at + 1
        self.mean = x.mean()
        return x * self.ones


def test_buffers_are_the_same_objects_with_the_same_values() -> None:
    model = Queue()
    rows, at = model.rows, model.at
    with pytest.raises(KeyError), buffers_kept(model):
        model(torch.ones(3))
        raise KeyError
    assert model.rows is rows
    assert model.at is at
    assert model.mean is None
    assert torch.equal(rows, torch.zeros(4))
    assert int(at) == 0
