"""Typical use of the library with only torch and NumPy, as a program run by tests/test_library_alone.py.

    python library_alone.py FOLDER

Writes into FOLDER, fails by an assertion, and prints the files of LucidPrune's modules that it has loaded, as JSON.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn

from image_classification.models import create_model
from pruning import Pruner, load_pruned, prune, save_pruned, shrink, trace_groups
from pruning.criteria import create_criterion, criterion_names

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % 4
CALIBRATION = [(IMAGES, TARGETS)]


class Net(nn.Module):
    """A stem, one residual block and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(24, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 4)

    def forward(self, images):
        features = self.stem(images)
        features = torch.relu(features + self.second(self.first(features)))
        return self.head(features.mean((2, 3)))


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def prune_at_once(model: nn.Module) -> None:
    """Prune by weights, by derivatives and by features; with budgets of several costs; with every search."""
    assert len(trace_groups(model, IMAGES).prunable) == 2
    for criterion, search in (("magnitude", "global"), ("taylor", "uniform"), ("discriminant", "greedy")):
        smaller = copy.deepcopy(model)
        budget = {"macs": 0.6, "params": 0.8, "memory": 0.9}
        record = prune(
            smaller, IMAGES, budget=budget, criterion=criterion, search=search, calibration=CALIBRATION
        )
        assert record.widths
        assert num_parameters(smaller) <= 0.8 * num_parameters(model)


def prune_at_intervals(model: nn.Module) -> None:
    """Prune in a user's own training loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = Pruner(model, IMAGES, criterion="magnitude", budget=0.5, delta=0.25, optimizer=optimizer, step=2)
    assert pruner.dry_run(CALIBRATION)
    iteration = 0
    while not pruner.done:
        iteration += 1
        loss = nn.functional.cross_entropy(model(IMAGES), TARGETS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss
        if pruner.due(iteration):
            pruner.step(CALIBRATION, iteration)
    assert pruner.completed == pruner.num_rewrites == 2
    assert "group" in pruner.explain("first.0")


def save_and_load(model: nn.Module, folder: Path) -> None:
    save_pruned(folder / "own.pth.tar", model, factory=Net)
    loaded = load_pruned(folder / "own.pth.tar", factory=Net)
    assert torch.equal(loaded.eval()(IMAGES), model.eval()(IMAGES))
    network = create_model("resnet20", num_classes=4)
    prune(network, IMAGES, budget=0.5)
    save_pruned(folder / "by-name.pth.tar", network)
    assert torch.equal(load_pruned(folder / "by-name.pth.tar").eval()(IMAGES), network.eval()(IMAGES))


def shrink_masked(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (
            model.first[0].weight,
            model.first[0].bias,
            model.first[1].weight,
            model.first[1].bias,
        ):
            tensor[:8] = 0
    assert shrink(model, IMAGES).num_parameters[1] < num_parameters(Net())


def main(folder: Path) -> None:
    torch.manual_seed(0)
    for name in set(criterion_names()) - {"saliency"}:  # saliency needs an explanation
        create_criterion(name)
    prune_at_once(Net())
    pruned = Net()
    prune_at_intervals(pruned)
    save_and_load(pruned, folder)
    shrink_masked(Net())
    own = ("image_classification", "explainers", "pruning")
    files = {name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] in own}
    print(json.dumps(files))


main(Path(sys.argv[1]))
