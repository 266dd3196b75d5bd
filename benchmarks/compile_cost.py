"""The cost of `--compile` at every rewrite, and the number of steps after which it pays off.

    python benchmarks/compile_cost.py [--arch resnet18] [--rewrites 2] [--batch-size 8] [--image-size 64]

A network trains on random images. Between rewrites (uniform, by magnitude) its step is timed eagerly, then compiled:
the first compiled step includes the compilation, the later ones show the gain. Cost ÷ gain is the best number of steps
for `--compile-after`: a network is then compiled at a loss of at most the time already lost without compilation.
Seconds are CPU seconds on a CPU, those of the compiler processes included, and wall-clock seconds on a GPU.
"""

from __future__ import annotations

import os

# Before PyTorch is imported: each compilation is as the first one, and its compilers are children of this process.
os.environ |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import statistics
import time
from collections.abc import Callable

import torch
from common.measure import spread
from common.report import BenchmarkParser, print_table, write_json
from torch import nn

from image_classification.models import create_model
from pruning import Pruner


def seconds(device: torch.device, call: Callable[[], None]) -> float:
    """What a call takes."""
    if device.type == "cpu":
        begin = time.process_time() + sum(os.times()[2:4])  # the children's
        call()
        return time.process_time() + sum(os.times()[2:4]) - begin
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def step_of(
    model: nn.Module, forward: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor
) -> None:
    """Run a training step."""
    nn.functional.cross_entropy(
        forward(batch), torch.zeros(len(batch), dtype=torch.int64, device=batch.device)
    ).backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Measure, print and write JSON."""
    parser = BenchmarkParser(__doc__, repeats=10, threads=1)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--rewrites", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    small = {"arch": "resnet20", "rewrites": 1, "repeats": 2, "backend": "eager", "image_size": 32}
    arguments = parser.parse("compile_cost_{arch}_{device}.json", quick=small)
    device = torch.device(arguments.device)
    model = create_model(arguments.arch, num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size, device=device)
    pruner = Pruner(
        model, images[:2], budget=0.3, delta=0.3, criterion="magnitude", search="uniform", optimizer=optimizer
    )
    rows = []
    for number in range(arguments.rewrites + 1):
        if number:
            torch.compiler.reset()
            pruner.step([])

        def eager() -> None:
            step_of(model, model, optimizer, images)

        eager()
        as_it_is = [seconds(device, eager) for _ in range(arguments.repeats)]
        compiled = torch.compile(model, backend=arguments.backend)

        def fast() -> None:
            step_of(model, compiled, optimizer, images)  # noqa: B023 (called before the next one is made)

        first = seconds(device, fast)
        then = [seconds(device, fast) for _ in range(arguments.repeats)]
        gain = statistics.median(as_it_is) - statistics.median(then)
        rows.append(
            {
                "rewrites": number,
                "step_seconds": spread(as_it_is),
                "compiled_step_seconds": spread(then),
                "compile_seconds": first - statistics.median(then),
                "steps_to_pay": (first - statistics.median(then)) / gain if gain > 0 else None,
            }
        )
    table = [
        [
            str(row["rewrites"]),
            f"{1000 * row['step_seconds']['median']:.1f}",
            f"{1000 * row['compiled_step_seconds']['median']:.1f}",
            f"{row['compile_seconds']:.1f}",
            "never" if row["steps_to_pay"] is None else f"{row['steps_to_pay']:.0f}",
        ]
        for row in rows
    ]
    print_table(["rewrites", "step ms", "compiled ms", "compilation s", "paid after steps"], table)
    write_json(arguments, arguments.repeats, {"rows": rows})


if __name__ == "__main__":
    main()
