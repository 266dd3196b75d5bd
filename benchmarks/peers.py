"""Accuracy at a budget after the same short training: LucidPrune, Torch-Pruning, and a smaller network from scratch.

    python benchmarks/peers.py IMAGES --workspace DIR [--arch resnet20_b] [--budgets 0.5 0.35] [--epochs 3]

IMAGES holds class folders of small images in `train` and `test` (CIFAR-10 as files). A network is trained once (kept in
the workspace, as the decoded images are), and every method prunes it within the same further training: the same images
in the same order, the same steps and learning rates, cuts at the same steps. Only the network from scratch has the
first training's peak rate. Seeds change order and augmentation.

Every run has its own process and writes a file with top-1 on the test images after the last cut, after every epoch and
at the end, the share of the MACs (by LucidPrune's count for all methods), the seconds (processor time on a CPU, without
the tests in between), a GPU's energy, and how far the explanations of 256 test images are from those before pruning.
Finished runs are not repeated, so the script may be stopped at any time. Networks stay in the workspace, where
`peers_speed.py` measures them. `--results` adds the rows of an earlier results file to those of the workspace.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common.map_drift import drift
from common.measure import Clock, rerun
from common.peer_methods import FROM_SCRATCH, METHODS, Cuts, Joints, installed_methods, share_of_macs
from common.peer_tables import Row, print_rows, print_waits, run_name, runs_folder, summary, waits
from common.quick_network import QUICK, make_network
from common.report import BenchmarkParser, write_json
from common.short_training import ImagesInMemory, Schedule, ShortTraining, read_images, top1
from torch import nn

from image_classification.observe.monitor import Monitor

_EXPLAINED = 256
_LR = 0.1


def trained_network(arguments: argparse.Namespace, images: ImagesInMemory) -> nn.Module:
    """Return the network that all runs begin with, training it if needed."""
    torch.manual_seed(0)
    model = make_network(arguments.arch, images.train[0], images.num_classes).to(arguments.device)
    path = arguments.workspace / f"{arguments.arch.replace('/', '_')}.pt"
    if not path.is_file():
        schedule = Schedule(arguments.pretrain_epochs, arguments.pretrain_lr)
        ShortTraining(model, images, schedule, seed=0, bf16=arguments.bf16).run()
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True, map_location=arguments.device))
    return model


class Watched:
    """A method's hooks, with top-1 and the seconds so far after every cut and epoch.

    Attributes:
        after_cut: Top-1 after the last cut.
        last_cut: When that was, in epochs.
        epochs: Top-1 after every epoch.
        epoch_seconds: Seconds until then, without the tests.
        method_seconds: Seconds of the method's own work after steps.
    """

    def __init__(self, make: Callable[[], Joints], training: ShortTraining, clock: Clock) -> None:
        self._training, self._clock = training, clock
        self._begin = clock.now()
        self._size = _num_weights(training.model)
        self._per_epoch = training.num_steps / training.schedule.epochs
        self._testing = 0.0
        self._joints = make()
        self.after_cut: float | None = None
        self.last_cut = 0.0
        self.epochs: list[float] = []
        self.epoch_seconds: list[float] = []
        self.method_seconds = 0.0

    def after_backward(self) -> None:
        """See `Joints`."""
        self._joints.after_backward()

    def after_step(self, step: int) -> None:
        """See `Joints`."""
        begin = self._clock.now()
        self._joints.after_step(step)
        self.method_seconds += self._clock.now() - begin
        size = _num_weights(self._training.model)
        if size != self._size:
            self._size, self.after_cut = size, self._top1()
            self.last_cut = step / self._per_epoch
        if int(step / self._per_epoch) > len(self.epochs):
            self.epoch_seconds.append(self.seconds())
            self.epochs.append(self._top1())

    def seconds(self) -> float:
        """Return the seconds since the run began, without the tests."""
        return self._clock.now() - self._begin - self._testing

    def _top1(self) -> float:
        begin = self._clock.now()
        found = top1(self._training.model, self._training.images.val, bf16=self._training.bf16)
        self._testing += self._clock.now() - begin
        return found


def _num_weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def run_one(
    arguments: argparse.Namespace, images: ImagesInMemory, method: str, budget: float, seed: int
) -> Row:
    """Run one training, keep its network, and return its row."""
    original = trained_network(arguments, images)
    peak = arguments.pretrain_lr if method in FROM_SCRATCH else arguments.lr
    torch.manual_seed(seed)
    schedule = Schedule(arguments.epochs, peak)
    training = ShortTraining(copy.deepcopy(original), images, schedule, seed=seed + 100, bf16=arguments.bf16)
    with Monitor(arguments.device) as monitor:
        cuts = Cuts(arguments.cuts, arguments.pruning_share)
        clock = Clock(arguments.device, processor_time=True)
        watched = Watched(lambda: METHODS[method](training, budget, cuts), training, clock)
        training.run(after_backward=watched.after_backward, after_step=watched.after_step)
        # The whole run counts as one image.
        seconds, joules = watched.seconds(), monitor.read(1).get("train.joules_per_image")
    torch.save(training.model, place_of(arguments, method, budget, seed).with_suffix(".pt"))
    every = max(1, len(images.val[1]) // _EXPLAINED)  # images are sorted by class
    shown, labels = (part[::every][:_EXPLAINED] for part in images.val)
    return {
        "method": method,
        "arch": arguments.arch,
        "budget": budget,
        "epochs_trained": arguments.epochs,
        "lr": arguments.lr,
        "bf16": arguments.bf16,
        "seed": seed,
        "macs": share_of_macs(original, training.model, images.val[0][:2]),
        "top1_before": top1(original, images.val, bf16=arguments.bf16),
        "top1_after_cut": watched.after_cut,
        "last_cut": watched.last_cut,
        "top1_epochs": watched.epochs,
        "epoch_seconds": watched.epoch_seconds,
        "top1": top1(training.model, images.val, bf16=arguments.bf16),
        "method_seconds": watched.method_seconds,
        "seconds": seconds,
        "joules": joules,
        "explanations": drift(original.float(), training.model, shown, labels),
    }


def wanted_runs(arguments: argparse.Namespace) -> Iterator[tuple[str, float, int]]:
    """Yield all runs, seed by seed, so that a stopped benchmark leaves complete seeds."""
    for seed in arguments.seeds:
        for budget in arguments.budgets:
            for method in arguments.methods:
                yield method, budget, seed


def place_of(arguments: argparse.Namespace, method: str, budget: float, seed: int) -> Path:
    """Return the file of a run's row."""
    name = "".join(letter if letter.isalnum() else "_" for letter in method)
    folder = runs_folder(arguments.workspace, arguments.arch, arguments.epochs, arguments.lr)
    return folder / f"{name}-{budget:g}-{seed}.json"


def collect(arguments: argparse.Namespace) -> list[Row]:
    """Return the rows of all runs; missing ones are run, each in a separate process."""
    rows = []
    for method, budget, seed in wanted_runs(arguments):
        path = place_of(arguments, method, budget, seed)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            line = rerun("--one", method, str(budget), str(seed))
            path.write_text(line + "\n", encoding="utf-8")
            print(line, flush=True)
        rows.append(json.loads(path.read_text(encoding="utf-8")))
    known = [run_name(row) for row in rows]
    if arguments.results is not None:
        earlier = json.loads(arguments.results.read_text(encoding="utf-8"))["runs"]
        earlier = [{"lr": _LR} | row for row in earlier]  # older files do not say it
        rows += [row for row in earlier if run_name(row) not in known]
    return rows


def main() -> None:
    """Run what is missing, print the table and write the results."""
    parser = BenchmarkParser(__doc__, seeds=[0, 1, 2], threads=1)
    parser.add_argument(
        "images", type=Path, nargs="?", help="folder with train/ and test/ class folders; not for a quick run"
    )
    parser.add_argument(
        "--arch", default="resnet20_b", help=f"{QUICK}: seven wide layers, trained in minutes"
    )
    parser.add_argument("--workspace", type=Path, default=Path("runs/peers"))
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=installed_methods(),
        default=installed_methods(),
        metavar="METHOD",
        help="default: all whose libraries are installed",
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35, 0.25])
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--lr", type=float, default=_LR, help="peak of the further training")
    parser.add_argument("--pretrain-epochs", type=float, default=40)
    parser.add_argument("--pretrain-lr", type=float, default=0.6)
    parser.add_argument("--bf16", action="store_true", help="train and judge under autocast to bfloat16")
    parser.add_argument("--cuts", type=int, default=5, help="rewrites of the methods that cut step by step")
    parser.add_argument("--pruning-share", type=float, default=0.4, help="of the steps, until the last cut")
    parser.add_argument("--num-calibration", type=int, default=1024, help="training images held out")
    parser.add_argument("--results", type=Path, help="file of this benchmark whose rows are added")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse("peers_{arch}.json", quick=_QUICK)
    if arguments.images is None and not arguments.quick:
        parser.error("IMAGES is missing: a folder with train/ and test/ class folders")
    cache = arguments.workspace / "images.pt"
    images = read_images(arguments.images, cache, arguments.num_calibration).to(arguments.device)
    if arguments.one is not None:
        method, budget, seed = arguments.one
        print(json.dumps(run_one(arguments, images, method, float(budget), int(seed))))
        return
    trained_network(arguments, images)
    del images
    runs = collect(arguments)
    rows = summary(runs)
    waited = waits(rows, runs)
    print_rows(rows)
    print_waits(waited)
    write_json(arguments, len(arguments.seeds), {"rows": rows, "waits": waited, "runs": runs})


_QUICK: dict[str, object] = {
    "seeds": [0],
    "epochs": 2,
    "pretrain_epochs": 2,
    "budgets": [0.6],
    "cuts": 2,
    "num_calibration": 40,
    "methods": ["ours: discriminant", "Torch-Pruning: Taylor", "from scratch"],
}


if __name__ == "__main__":
    main()
