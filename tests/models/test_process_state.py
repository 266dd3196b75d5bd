"""States of the process that are changed for a while, with blocks that overlap on several threads."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from image_classification.models.modes import attention_in_steps, exact_float32, uncompiled
from pruning.engine.proof.rehearsal import in_type
from pruning.engine.undisturbed import plain_kernels, undisturbed


def _compiled_calls() -> int:
    """Call a compiled function, and return how many graphs were compiled for it."""
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph

    torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(2))
    return len(graphs)


@pytest.mark.parametrize(
    ("block", "state"),
    [
        (attention_in_steps, torch.backends.mha.get_fastpath_enabled),
        (uncompiled, _compiled_calls),
        (exact_float32, lambda: torch.backends.cuda.matmul.fp32_precision),
        (plain_kernels, torch.backends.mha.get_fastpath_enabled),
        (lambda: undisturbed(nn.Linear(2, 2)), torch.backends.cuda.flash_sdp_enabled),
        (lambda: in_type(nn.Linear(2, 2), torch.float64), torch.get_default_dtype),
    ],
)
def test_overlapping_blocks_of_two_threads_leave_the_state_as_it_was(
    block: Callable[[], contextlib.AbstractContextManager[object]], state: Callable[[], object]
) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        before = state()
        inside, outlived = threading.Event(), threading.Event()

        def second() -> None:
            with block():
                inside.set()
                outlived.wait(60)
                changed.append(state())

        changed: list[object] = []
        thread = threading.Thread(target=second)
        with block():
            thread.start()
            inside.wait(60)
        outlived.set()
        thread.join()
        assert changed[0] != before, "the first block's end must not end the second one's"
        assert state() == before
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
