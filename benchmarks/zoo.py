"""Coverage of the structural engine: which networks are cut to half their MACs, exactly, and still work.

    python benchmarks/zoo.py                                  # all of benchmarks/zoo.txt, resumes where it stopped
    python benchmarks/zoo.py --only resnet50 densenet121      # some of them
    python benchmarks/zoo.py --torch-pruning                  # Torch-Pruning beside it, if it is installed
    python benchmarks/zoo.py --list benchmarks/zoo_beyond.txt --output benchmarks/results/zoo_beyond.json

For every network, in a process of its own with limits on time and memory: seconds of analysis, groups, share
of channels that can be pruned, the MACs that are left after uniform L1 pruning to half (PyTorch's own flop
counter ÷ 2), whether the cut network equals the full one with closed gates, trains a step with the same
optimizer, saves and loads, and passes torch.export. Rows are kept in a JSON file, one network at a time.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from image_classification.models.factory import create_model
from pruning.gates import Gates
from pruning.graph import ChannelGraph, trace_groups
from pruning.rehearsal import condition
from pruning.structure import load_pruned, save_pruned
from pruning.surgery import prune_channels
from pruning.tracing import undisturbed

COLUMNS = ("seconds", "groups", "prunable_percent", "macs_left", "difference", "trains", "loads", "exports")


def count_macs(model: nn.Module, images: Tensor) -> int:
    """MACs of one forward pass by PyTorch's flop counter (which trips over views of what requires a gradient)."""
    counter = FlopCounterMode(display=False)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with undisturbed(model):
        model.requires_grad_(False)
        with counter:
            model.eval()(images[:1])
    for parameter in learning:
        parameter.requires_grad_(True)
    return counter.get_total_flops() // 2


def keep_share(graph: ChannelGraph, model: nn.Module, share: float) -> dict[str, list[int]]:
    """The largest share of each group's units by the L1 norm of what produces them."""
    keep = {}
    for group in graph.prunable:
        scores = torch.zeros(group.width)
        for member in graph.members(group):
            if member.role != "out":
                continue
            weight = dict(model.named_parameters())[member.tensor].detach()
            norms = weight.abs().movedim(member.dim, 0).flatten(1).sum(1)
            inside = torch.from_numpy(member.positions >= 0)
            scores.index_add_(0, torch.from_numpy(member.positions)[inside], norms[inside])
        count = max(graph.min_width_of(group), round(group.width * share))
        keep[group.name] = sorted(scores.topk(count).indices.tolist())
    return keep


def macs_with(graph: ChannelGraph, keep: dict[str, list[int]]) -> float:
    """MACs by the graph's own arithmetic after keeping these units."""
    mask = graph.keep_mask(keep)
    total = 0.0
    for layer in graph.layers:
        if not layer.training_only:
            macs = layer.constant
            for axis in layer.axes:
                macs *= int((axis < 0).sum()) + int(mask[axis[axis >= 0]].sum())
            total += macs
    return total


def keep_half(graph: ChannelGraph, model: nn.Module) -> dict[str, list[int]]:
    """The uniform share that leaves half the MACs, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        if macs_with(graph, keep_share(graph, model, middle)) <= graph.macs / 2:
            low = middle
        else:
            high = middle
    return keep_share(graph, model, low)


def image_size_of(library: str, name: str) -> int:
    """224, or what the network insists on."""
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(name)
        if config is not None and (config.fixed_input_size or config.min_input_size):
            return int(config.input_size[-1])
    return 299 if name == "inception_v3" else 224  # its auxiliary head needs it


def examine(library: str, name: str) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    size = image_size_of(library, name)
    images = torch.randn(2, 3, size, size)
    model = create_model(f"{library}/{name}")
    condition(model, (images,))
    row: dict[str, Any] = {"image_size": size}
    start, cpu = time.perf_counter(), time.process_time()
    graph = trace_groups(model, images)
    row["seconds"] = round(time.perf_counter() - start, 2)
    row["cpu_seconds"] = round(time.process_time() - cpu, 2)
    channels = Counter({True: 0, False: 0})
    for group in graph.groups:
        if group.reason != "the network's output":
            channels[group.prunable] += group.width * group.channels_per_unit
    row["groups"] = len(graph.groups)
    row["prunable_groups"] = len(graph.prunable)
    row["prunable_percent"] = round(100 * channels[True] / max(1, channels.total()), 1)
    row["frozen"] = dict(Counter(reason for reason in graph.frozen.values()).most_common(8))
    row["notes"] = sum(bool(group.notes) for group in graph.groups)
    before = count_macs(model, images)
    row["macs"] = before
    row["macs_agree"] = abs(graph.macs - before) <= 1e-3 * before
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    train_step(model, images, optimizer)
    keep = keep_half(graph, model)
    model.eval()
    with torch.no_grad(), Gates(model, graph) as gates:
        gates.set_keep(keep)
        expected = model(images)
    prune_channels(model, graph, keep, optimizers=[optimizer])
    with torch.no_grad():
        found = model(images)
    row["difference"] = float((expected - found).abs().max() / expected.abs().max())
    row["absolute_difference"] = float((expected - found).abs().max())
    row["macs_left"] = round(count_macs(model, images) / before, 3)
    row["trains"] = trains(model, images, optimizer)
    row["loads"] = loads(model, images)
    row["exports"] = exports(model, images)
    return row


def train_step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> list[float]:
    """One step on random labels; the weights' norms before and after."""
    model.train()
    optimizer.zero_grad()
    output = model(images)
    parts = output if isinstance(output, tuple) else (output,)
    loss = sum(
        nn.functional.cross_entropy(part, torch.tensor([0, 1])) for part in parts if isinstance(part, Tensor)
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    optimizer.step()
    model.eval()
    return [float(parameter.detach().double().sum()) for parameter in model.parameters()]


def trains(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> bool | str:
    """Whether a step with the optimizer from before the rewrite moves the weights."""
    try:
        before = [float(parameter.detach().double().sum()) for parameter in model.parameters()]
        after = train_step(model, images, optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    return sum(a != b for a, b in zip(before, after, strict=True)) > len(before) // 3


def loads(model: nn.Module, images: Tensor) -> bool | str:
    """Whether the saved network comes back equal."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_pruned(Path(folder) / "pruned.pth.tar", model)
            loaded = load_pruned(Path(folder) / "pruned.pth.tar").eval()
        with torch.no_grad():
            return bool(torch.equal(loaded(images), model.eval()(images)))
    except (RuntimeError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {str(error)[:160]}"


def exports(model: nn.Module, images: Tensor) -> bool | str:
    """Whether torch.export takes it."""
    try:
        torch.export.export(model.eval(), (images,))
    except Exception as error:  # any failure of the exporter is a finding
        return f"{type(error).__name__}: {str(error)[:120]}"
    return True


def examine_torch_pruning(library: str, name: str) -> dict[str, Any]:
    """The same cut by Torch-Pruning, for comparison: uniform shares, raised until half the MACs are gone.

    The gated network to compare with is the original one whose layers give zeros in the channels that went; networks
    that normalise over channels have no such reference.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    size = image_size_of(library, name)
    images = torch.randn(2, 3, size, size)
    original = create_model(f"{library}/{name}").eval()
    condition(original, (images,))
    before = count_macs(original, images)
    for share in (0.3, 0.35, 0.4, 0.5, 0.6):
        model, reference = copy.deepcopy(original), copy.deepcopy(original)
        start = time.process_time()
        prune_with_torch_pruning(model, reference, images, share)
        seconds = time.process_time() - start
        left = count_macs(model, images) / before
        if left <= 0.505:
            break
    with torch.no_grad():
        difference, scale = (model(images) - reference(images)).abs().max(), reference(images).abs().max()
    model.train()
    logits = model(images)
    (logits[0] if isinstance(logits, tuple) else logits).sum().backward()
    comparable = not any(isinstance(module, nn.LayerNorm | nn.GroupNorm) for module in model.modules())
    return {
        "cpu_seconds": round(seconds, 2),
        "difference": float(difference / scale) if comparable else None,
        "macs_left": round(left, 3),
    }


def prune_with_torch_pruning(model: nn.Module, reference: nn.Module, images: Tensor, share: float) -> None:
    """Cut `model` and put zeros into the same places of `reference`, a copy of it."""
    import torch_pruning as tp

    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    pruner = tp.pruner.MagnitudePruner(
        model,
        images,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=share,
        ignored_layers=heads,
    )
    names = {module: name for name, module in model.named_modules()}
    present: dict[str, list[int]] = {}
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            module, function = dependency.target.module, dependency.handler.__name__
            if module not in names or not function.endswith("_out_channels"):
                continue  # what reads a channel that is zero may keep its weights
            silent = reference.get_submodule(names[module])
            own = [getattr(silent, "weight", None), getattr(silent, "bias", None)]
            tensors = [tensor for tensor in own if tensor is not None]
            if not tensors:
                continue
            left = present.setdefault(names[module], list(range(len(tensors[0]))))
            gone = [left[index] for index in indices]
            with torch.no_grad():
                for tensor in tensors:
                    tensor[gone] = 0
            present[names[module]] = [index for index in left if index not in set(gone)]
        group.prune()


def run_one(library: str, name: str, tool: str, options: argparse.Namespace) -> dict[str, Any]:
    """Examine a network in a process of its own."""
    command = [sys.executable, __file__, "--one", library, name, "--tool", tool]
    command += ["--memory-limit", str(options.memory_limit)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=options.time_limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"longer than {options.time_limit} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}


def zoo_list(path: Path) -> list[tuple[str, str]]:
    """(library, name) of every network in a list."""
    lines = (line.split("#")[0].split() for line in path.read_text().splitlines())
    return [(words[0], words[1]) for words in lines if words]


def is_good(row: dict[str, Any]) -> bool:
    """Cut to half, exact, and alive."""
    alive = all(row.get(key) is True for key in ("trains", "loads", "exports"))
    return alive and row["macs_left"] <= 0.505 and row["difference"] <= 1e-4


def print_table(rows: dict[str, Any]) -> None:
    """One line per network and the totals."""
    print(f"{'network':<42}" + "".join(f"{column:>18}" for column in COLUMNS))
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:<42}  {row['error'][:140]}")
        else:
            print(f"{name:<42}" + "".join(f"{_cell(row.get(column)):>18}" for column in COLUMNS))
    measured = [row for row in rows.values() if "error" not in row]
    halved = sum(row["macs_left"] <= 0.505 for row in measured)
    exact = sum(row["macs_left"] <= 0.505 and row["difference"] <= 1e-4 for row in measured)
    good = sum(is_good(row) for row in measured)
    slow = sum(row["cpu_seconds"] > 5 for row in measured)
    print(
        f"{len(rows)} networks: {halved} cut to half their MACs, {exact} of them exactly, {good} also train, load "
        f"and export; analysis took more than 5 CPU-seconds for {slow}"
    )


def print_comparison(rows: dict[str, Any]) -> None:
    """One line per network that Torch-Pruning was tried on, and the totals."""
    for name, row in rows.items():
        told = row.get("error", "")[:120] or (
            f"{row['cpu_seconds']:.1f} CPU-s, {row['macs_left']:.2f} left, difference {_cell(row['difference'])}"
        )
        print(f"{name:<42}  {told}")
    halved = [row for row in rows.values() if "error" not in row and row["macs_left"] <= 0.505]
    exact = sum(row["difference"] is not None and row["difference"] <= 1e-4 for row in halved)
    unjudged = sum(row["difference"] is None for row in halved)
    print(
        f"Torch-Pruning: {len(rows)} networks, {len(halved)} cut to half their MACs, {exact} of them exactly, "
        f"{unjudged} not comparable (they normalise over channels)"
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2g}" if value < 0.01 else f"{value:.4g}"
    return str(value)[:17]


def main() -> None:
    """Run or resume the sweep and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="names of networks")
    parser.add_argument("--list", type=Path, default=Path(__file__).with_name("zoo.txt"), help="networks")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/zoo.json", help="JSON with all rows"
    )
    parser.add_argument("--time-limit", type=float, default=300, help="seconds per network")
    parser.add_argument("--memory-limit", type=float, default=10, help="GiB per network")
    parser.add_argument("--torch-pruning", action="store_true", help="also run Torch-Pruning, if installed")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file already has")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--tool", default="ours", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        limit = int(options.memory_limit * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        print(json.dumps((examine if options.tool == "ours" else examine_torch_pruning)(*options.one)))
        return
    stored = json.loads(options.output.read_text()) if options.output.exists() else {}
    tools = ["ours", "torch-pruning"] if options.torch_pruning else ["ours"]
    for library, name in zoo_list(options.list):
        if options.only and name not in options.only:
            continue
        for tool in tools:
            rows = stored.setdefault(tool, {})
            if options.fresh or options.only or f"{library}/{name}" not in rows:
                rows[f"{library}/{name}"] = run_one(library, name, tool, options)
                stored["environment"] = {"torch": torch.__version__, "python": platform.python_version(),
                                         "machine": platform.machine(), "threads": 1}  # fmt: skip
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(stored, indent=1))
    print_table(stored.get("ours", {}))
    if options.torch_pruning:
        print_comparison(stored["torch-pruning"])


if __name__ == "__main__":
    main()
