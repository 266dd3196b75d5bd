"""Pruning from outside the training job, only by public names: a hand-written loop, and files that it writes and reads.

    python benchmarks/same/own_loop.py train            prune in a loop, and at once; writes to the current folder
    python benchmarks/same/own_loop.py load FILE …      load networks; writes their tensors and outputs on noise
    python benchmarks/same/own_loop.py mask FILE OUT    zero a few channels of a ResNet, for `pruning shrink`

`benchmarks/same_training.py` runs it with the code of two commits. It prints nothing.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruning import Pruner, load_pruned, prune

SIZE, NUM_CLASSES = 16, 6


class Block(nn.Module):
    """Two convolutions and a shortcut, the second one depthwise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()
        )
        self.deep = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.narrow = nn.Sequential(nn.Conv2d(2 * width, width, 1), nn.BatchNorm2d(width))

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape."""
        return torch.relu(features + self.narrow(self.deep(self.wide(features))))


class Network(nn.Module):
    """A small classifier of a custom class."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), nn.MaxPool2d(2), Block(8))
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def noise(count: int, size: int, seed: int) -> Tensor:
    """Return noise (count, 3, size, size), the same every time."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batches(count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield noise images whose mean colours determine the class."""
    for number in range(count):
        images = noise(12, SIZE, seed + number)
        strongest = images.mean((2, 3)).abs().argmax(1)
        yield images, 2 * strongest + (images.mean((1, 2, 3)) > 0).long()


def trained(model: nn.Module, criterion: str, **settings: Any) -> tuple[Pruner, list[float]]:
    """Train and prune; return the pruner, and the loss of every iteration."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ema = copy.deepcopy(model)
    example = noise(2, SIZE, 0)
    pruner = Pruner(
        model,
        example,
        criterion=criterion,
        budget={"macs": 0.6},
        optimizer=optimizer,
        ema=ema,
        step=4,
        delta=0.1,
        **settings,
    )
    losses = []
    for iteration, (images, targets) in enumerate(batches(24, 100), start=1):
        loss = nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss
        for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
            average.data.lerp_(weight.data, 0.1)
        if pruner.due(iteration):
            pruner.step(batches(3, 500), iteration)
    state = {"optimizer": optimizer.state_dict(), "ema": ema.state_dict(), "pruner": pruner.state_dict()}
    torch.save(state, f"{criterion}-state.pth")
    return pruner, losses


def train() -> None:
    """Prune by two criteria in a loop, and at once."""
    losses: dict[str, list[float]] = {}
    for criterion, settings in {"discriminant": {}, "taylor": {"search": "global"}}.items():
        torch.manual_seed(0)
        pruner, losses[criterion] = trained(Network(), criterion, **settings)
        pruner.save(f"{criterion}.pth", factory=Network)
        write_behaviour(load_pruned(f"{criterion}.pth", factory=Network), Path(f"{criterion}-outputs.pth"))
    torch.save(losses, "losses.pth")
    torch.manual_seed(1)
    model = Network()
    prune(model, noise(2, SIZE, 0), budget={"macs": 0.5}, criterion="magnitude")
    write_behaviour(model, Path("at-once-outputs.pth"))


def write_behaviour(model: nn.Module, path: Path, size: int = SIZE) -> None:
    """Write a network's tensors and its logits on noise to a file."""
    model.eval()
    with torch.no_grad():
        outputs = model(noise(4, size, 7))
    torch.save({"tensors": model.state_dict(), "outputs": outputs}, path)


def load(files: list[Path]) -> None:
    """Load networks and write their tensors and outputs, numbered in the given order."""
    for number, path in enumerate(files):
        write_behaviour(load_pruned(path), Path(f"{number}-outputs.pth"), 32)


def mask(file: Path, out: Path) -> None:
    """Zero every third channel within the blocks of a ResNet."""
    checkpoint = torch.load(file, weights_only=True)
    for name, tensor in checkpoint["state_dict"].items():
        if name.endswith(("conv1.weight", "bn1.weight", "bn1.bias")) and name.startswith("layer"):
            tensor[:: math.ceil(len(tensor) / 5)] = 0
    # Other tensors have another digest; files of version 1 have none.
    checkpoint.pop("digest", None)
    torch.save({**checkpoint, "version": 1}, out)


def main() -> None:
    """Run the given subcommand."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "load", "mask"))
    parser.add_argument("files", nargs="*", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "train":
        train()
    elif arguments.what == "load":
        load(arguments.files)
    else:
        mask(*arguments.files)


if __name__ == "__main__":
    main()
