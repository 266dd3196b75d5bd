"""Communication between ranks, per optimizer step and per rewrite, and the resulting efficiency of many GPUs, on paper.

    python benchmarks/wire.py [--arch resnet50] [--images-per-second 2500] [--batch-size 256]

Sizes are measured: a rewrite runs in two processes, and rank 0 counts the bytes that it passes to collectives. The
efficiency is computed from them, from stated bandwidths and a stated speed of one GPU, for a ring in which each rank
sends and receives 2 (n − 1) / n of what is reduced: once with nothing of it hidden behind the backward pass, once with
all of it but the last bucket (25 MiB, DDP's default).
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections import Counter
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist
from common.networks import conditioned_network, smooth_images
from common.report import BenchmarkParser, print_table, write_json

from image_classification.joining import DistributedConfig, setup_distributed
from pruning.pruner import Pruner
from pruning.rewrites.pruner_settings import PrunerSettings

#: GPUs → bytes per second of the slowest link of their ring: NVLink within a node of 8, 200 Gbit/s between nodes.
BANDWIDTHS = {8: 400e9, 64: 25e9, 512: 25e9}
_LAST_BUCKET = 25 * 2**20


def counting(name: str, sent: Counter[str]) -> None:
    """Make a collective of torch.distributed record the bytes of the tensor passed to it."""
    real = getattr(dist, name)
    kind = name.removesuffix("_tensor")

    def counted(*arguments: Any, **settings: Any) -> Any:
        tensor = arguments[1] if name == "all_gather" else arguments[0]
        sent[kind] += tensor.numel() * tensor.element_size()
        return real(*arguments, **settings)

    setattr(dist, name, counted)


def rewrite(
    rank: int, arch: str, image_size: int, repair: str, port: int, counts: Queue[dict[str, int]]
) -> None:
    """Run one of two ranks: a rewrite of a tenth of the MACs, with half of the images; rank 0 reports what it sent."""
    torch.set_num_threads(1)
    group = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in group.items()})
    images = smooth_images(32, image_size)
    model = conditioned_network(arch, images[:8])
    mine, targets = images[16 * rank : 16 * rank + 16], torch.arange(16) % 4
    with setup_distributed(DistributedConfig(device="cpu")) as ranks:
        pruner = Pruner(
            model,
            images[:2],
            budget=0.5,
            delta=0.1,
            criterion="discriminant",
            search="greedy",
            repair=repair,
            settings=PrunerSettings(distributed=ranks),
        )
        sent = Counter[str]()
        for name in ("all_reduce", "broadcast", "all_gather"):
            counting(name, sent)
        pruner.step([(mine[i : i + 8], targets[i : i + 8]) for i in (0, 8)])
        if ranks.is_main:
            counts.put(dict(sent))


def rewrite_bytes(arch: str, image_size: int, repair: str) -> dict[str, int]:
    """Return kind of collective → bytes of the tensors that rank 0 passed to it during a rewrite."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    counts: Queue[dict[str, int]] = context.Queue()
    ranks = [
        context.Process(target=rewrite, args=(rank, arch, image_size, repair, port, counts))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    found = counts.get(timeout=900)
    for process in ranks:
        process.join()
    return found


def efficiencies(gradient_bytes: float, batch_size: int, images_per_second: float) -> list[dict[str, float]]:
    """Return a row per number of GPUs."""
    compute = batch_size / images_per_second
    rows = []
    for gpus, bandwidth in BANDWIDTHS.items():
        share = 2 * (gpus - 1) / gpus
        exposed = share * gradient_bytes / bandwidth
        hidden = share * min(_LAST_BUCKET, gradient_bytes) / bandwidth
        rows.append(
            {
                "gpus": gpus,
                "bandwidth": bandwidth,
                "milliseconds": 1000 * exposed,
                "efficiency_nothing_hidden": compute / (compute + exposed),
                "efficiency_last_bucket": compute / (compute + hidden),
            }
        )
    return rows


def main() -> None:
    """Count, compute, print and write JSON."""
    parser = BenchmarkParser(__doc__, threads=1, cpu_only=True)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument(
        "--image-size", type=int, default=64, help="of the rewrite that is counted; sizes stay"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="images per GPU and step")
    parser.add_argument("--images-per-second", type=float, default=2500, help="of one GPU")
    arguments = parser.parse("wire_{arch}.json", quick={"arch": "resnet20", "image_size": 32})
    torch.manual_seed(arguments.seed)
    model = conditioned_network(arguments.arch, smooth_images(2, arguments.image_size))
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    rewrites = {
        repair: rewrite_bytes(arguments.arch, arguments.image_size, repair)
        for repair in ("none", "least-squares")
    }
    rows = efficiencies(gradients, arguments.batch_size, arguments.images_per_second)
    print(f"gradients of a step: {gradients / 1e6:.1f} MB")
    for repair, sent in rewrites.items():
        told = ", ".join(f"{kind} {count / 1e6:.2f} MB" for kind, count in sorted(sent.items()))
        print(f"a rewrite with repair {repair}: {told}")
    print_table(
        ["GPUs", "GB/s", "ms", "nothing hidden", "all but the last bucket"],
        [
            [
                str(row["gpus"]),
                f"{row['bandwidth'] / 1e9:g}",
                f"{row['milliseconds']:.2f}",
                f"{row['efficiency_nothing_hidden']:.3f}",
                f"{row['efficiency_last_bucket']:.3f}",
            ]
            for row in rows
        ],
    )
    write_json(arguments, 1, {"gradient_bytes": gradients, "rewrite_bytes": rewrites, "efficiency": rows})


if __name__ == "__main__":
    main()
