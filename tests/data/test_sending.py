"""What goes to a GPU is pinned first; nothing else is."""

from __future__ import annotations

from unittest.mock import MagicMock

import pytest
import torch

from image_classification.data.sending import sent

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_on_the_cpu_it_is_the_tensor_itself():
    tensor = torch.arange(3)
    assert sent(tensor, CPU) is tensor


@pytest.mark.parametrize(
    ("lies_on", "pinned", "pins"), [(CPU, False, True), (CPU, True, False), (GPU, False, False)]
)
def test_what_is_pinned(lies_on: torch.device, pinned: bool, pins: bool) -> None:
    tensor = MagicMock()
    tensor.device, tensor.is_pinned.return_value = lies_on, pinned
    sent(tensor, GPU)
    assert tensor.pin_memory.called == pins
    copied = tensor.pin_memory.return_value if pins else tensor
    copied.to.assert_called_once_with(GPU, non_blocking=True)
