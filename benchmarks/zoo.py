"""Coverage of the structural engine: which networks are cut to half their MACs, exactly, and still work.

    python benchmarks/zoo.py                                  # all of benchmarks/zoo.txt, resumes where it stopped
    python benchmarks/zoo.py --only resnet50 densenet121      # some of them
    python benchmarks/zoo.py --torch-pruning                  # compared with Torch-Pruning, if it is installed
    python benchmarks/zoo.py --repair                         # effect of a repair after a cut to three quarters
    python benchmarks/zoo.py --list benchmarks/zoo_beyond.txt --output benchmarks/results/zoo_beyond.json

Every network is examined in a separate process, on one thread, with limits on time and memory: seconds of analysis,
groups, share of channels that can be pruned, the MACs left after uniform L1 pruning to half (by PyTorch's own flop
counter ÷ 2), whether the cut network equals the full one with closed gates, trains a step with the same optimizer,
saves and loads, and passes torch.export. The table has a line per network; the JSON is written network by network.

`--repair` cuts to three quarters of the MACs and gives the mean squared change of the logits ÷ their variance on images
used for neither fitting nor selection: after the cut, and after the repair from 16 images.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from common.measure import limit_process
from common.networks import conditioned_network, smooth_images, uniform_cut
from common.report import BenchmarkParser, print_table, write_json
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pruning.costs.cost_model import CostModel
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.gates import Gates
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups
from pruning.engine.undisturbed import undisturbed
from pruning.files.saved_network import load_pruned, save_pruned
from pruning.repair.repairing import plan_repair

COLUMNS = ("seconds", "groups", "prunable_percent", "macs_left", "difference", "trains", "loads", "exports")
LARGEST_SHARE, LARGEST_DIFFERENCE, MAX_SECONDS = 0.505, 1e-4, 5

Row = dict[str, Any]
Rows = dict[str, Row]


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Return the MACs of one forward pass by PyTorch's flop counter (which fails for views of tensors that need
    gradients).
    """
    counter = FlopCounterMode(display=False)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with undisturbed(model):
        model.requires_grad_(False)
        with counter:
            model.eval()(images[:1])
    for parameter in learning:
        parameter.requires_grad_(True)
    return int(counter.get_total_flops() // 2)


def image_size_of(library: str, name: str) -> int:
    """Return 224, or the size that the network requires."""
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(name)
        if config is not None and (config.fixed_input_size or config.min_input_size):
            return int(config.input_size[-1])
    return 299 if name == "inception_v3" else 224  # its auxiliary head needs it


def network_and_images(library: str, name: str) -> tuple[nn.Module, Tensor]:
    """Create a network of a library with random weights, and two images of its size."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    size = image_size_of(library, name)
    images = torch.randn(2, 3, size, size)
    return conditioned_network(f"{library}/{name}", images), images


def examine(library: str, name: str) -> Row:
    """Examine a network and return its row of the table."""
    model, images = network_and_images(library, name)
    start, cpu = time.perf_counter(), time.process_time()
    graph = trace_groups(model, images)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    before = count_macs(model, images)
    row: Row = {
        "image_size": images.shape[-1],
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        **groups_of(graph),
        "macs": before,
        "macs_agree": abs(graph.macs - before) <= 1e-3 * before,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    train_step(model, images, optimizer)
    row |= cut_to_half(model, graph, images, optimizer)
    row["macs_left"] = round(count_macs(model, images) / before, 3)
    row["trains"] = trains(model, images, optimizer)
    row["loads"] = loads(model, images)
    row["exports"] = exports(model, images)
    return row


def groups_of(graph: ChannelGraph) -> Row:
    """Return the number of groups, the share of channels that can be pruned, and why the others cannot."""
    channels = Counter({True: 0, False: 0})
    for group in graph.groups:
        if group.reason != "the network's output":
            channels[group.prunable] += group.width * group.channels_per_unit
    return {
        "groups": len(graph.groups),
        "prunable_groups": len(graph.prunable),
        "prunable_percent": round(100 * channels[True] / max(1, channels.total()), 1),
        "frozen": dict(Counter(graph.frozen.values()).most_common(8)),
        "notes": sum(bool(group.notes) for group in graph.groups),
    }


def cut_to_half(
    model: nn.Module, graph: ChannelGraph, images: Tensor, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """Cut the network; return the largest difference from the full one with closed gates, relative and absolute."""
    keep = uniform_cut(model, graph, CostModel(graph, model, images))
    model.eval()
    with torch.no_grad(), Gates(model, graph) as gates:
        gates.set_keep(keep)
        expected = model(images)
    prune_channels(model, graph, keep, optimizers=[optimizer])
    with torch.no_grad():
        difference = (expected - model(images)).abs().max()
    return {
        "difference": float(difference / expected.abs().max()),
        "absolute_difference": float(difference),
    }


def train_step(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> list[float]:
    """Run one step on arbitrary labels, for every output of the network; return the sums of all parameters after it."""
    model.train()
    optimizer.zero_grad()
    output = model(images)
    parts = output if isinstance(output, tuple) else (output,)
    targets = torch.tensor([0, 1])
    losses = [nn.functional.cross_entropy(part, targets) for part in parts if isinstance(part, Tensor)]
    torch.stack(losses).sum().backward()
    optimizer.step()
    model.eval()
    return parameter_sums(model)


def parameter_sums(model: nn.Module) -> list[float]:
    """Return a number per parameter, which changes when the parameter does."""
    return [float(parameter.detach().double().sum()) for parameter in model.parameters()]


def trains(model: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> bool | str:
    """Whether a step with the optimizer from before the rewrite moves the weights."""
    try:
        before = parameter_sums(model)
        after = train_step(model, images, optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    return sum(a != b for a, b in zip(before, after, strict=True)) > len(before) // 3


def loads(model: nn.Module, images: Tensor) -> bool | str:
    """Whether the saved network loads and is equal."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_pruned(Path(folder) / "pruned.pth.tar", model)
            loaded = load_pruned(Path(folder) / "pruned.pth.tar").eval()
        with torch.no_grad():
            return bool(torch.equal(loaded(images), model.eval()(images)))
    except (RuntimeError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {str(error)[:160]}"


def exports(model: nn.Module, images: Tensor) -> bool | str:
    """Whether torch.export accepts the network."""
    try:
        torch.export.export(model.eval(), (images,))
    except Exception as error:  # any failure of the exporter is a finding
        return f"{type(error).__name__}: {str(error)[:120]}"
    return True


def examine_torch_pruning(library: str, name: str) -> Row:
    """Make the same cut with Torch-Pruning, for comparison: uniform shares, raised until half the MACs are removed.

    The gated network to compare with is the original one, whose layers output zeros in the removed channels; networks
    that normalise over channels have no such reference.
    """
    original, images = network_and_images(library, name)
    before = count_macs(original, images)
    for share in (0.3, 0.35, 0.4, 0.5, 0.6):
        model, reference = copy.deepcopy(original), copy.deepcopy(original)
        start = time.process_time()
        prune_with_torch_pruning(model, reference, images, share)
        seconds = time.process_time() - start
        left = count_macs(model, images) / before
        if left <= LARGEST_SHARE:
            break
    with torch.no_grad():
        expected = reference(images)
        difference = (model(images) - expected).abs().max() / expected.abs().max()
    model.train()
    logits = model(images)
    (logits[0] if isinstance(logits, tuple) else logits).sum().backward()
    comparable = not any(isinstance(module, nn.LayerNorm | nn.GroupNorm) for module in model.modules())
    return {
        "cpu_seconds": round(seconds, 2),
        "difference": float(difference) if comparable else None,
        "macs_left": round(left, 3),
    }


def examine_repair(library: str, name: str) -> Row:
    """Return how far the logits are from the original's after a cut, and after its repair."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    size = image_size_of(library, name)
    images = smooth_images(48, size)
    fitted, judging = images[:16], images[16:]
    model = conditioned_network(f"{library}/{name}", images[:4])
    original = copy.deepcopy(model)
    graph = trace_groups(model, images[:2])
    keep = uniform_cut(model, graph, CostModel(graph, model, images[:2]), share=0.75)
    plan = plan_repair(model, graph, graph.keep_mask(keep))
    prune_channels(model, graph, keep)

    @torch.no_grad()
    def errors() -> Tensor:
        """Return the error of every image's logits."""
        expected, found = (
            torch.cat([network.eval()(shown) for shown in judging.split(8)]) for network in (original, model)
        )
        return (found - expected).square().mean(1) / expected.var()

    cut = errors()
    report = plan.repair(model, list(fitted.split(8)))
    repaired = errors()
    return {
        "cut": float(cut.mean()),
        "repaired": float(repaired.mean()),
        "images_nearer": float((repaired < cut).double().mean()),
        "held_out": report.distance,
        "layers": len(report.layers),
        "statistics": report.statistics,
        "problem": report.problem,
        "seconds": round(report.seconds, 1),
    }


def print_repairs(rows: Rows) -> None:
    """Print one line per network, and how many came closer."""
    found = {name: row for name, row in rows.items() if "error" not in row}
    columns = ("cut", "repaired", "images_nearer", "layers", "statistics", "seconds")
    print_table(
        ["network", *columns],
        [[name, *(cell(row.get(column)) for column in columns)] for name, row in found.items()],
    )
    for name, row in rows.items():
        if "error" in row or row["problem"]:
            print(f"{name}  {row.get('error') or row['problem']}")
    nearer = sum(row["repaired"] < row["cut"] for row in found.values())
    worse = sum(row["held_out"][1] > row["held_out"][0] for row in found.values())
    print(
        f"{len(rows)} networks: {nearer} nearer to the original after the repair; {worse} judged worse and kept"
    )


def prune_with_torch_pruning(model: nn.Module, reference: nn.Module, images: Tensor, share: float) -> None:
    """Cut `model`, and put zeros into the same positions of `reference`, a copy of it."""
    import torch_pruning as tp

    pruner = tp.pruner.MagnitudePruner(
        model,
        images,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=share,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000],
    )
    names = {module: name for name, module in model.named_modules()}
    # Module name → original positions of its remaining channels.
    present: dict[str, list[int]] = {}
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            module, function = dependency.target.module, dependency.handler.__name__
            # Weights that read a zero channel may be kept.
            if module in names and function.endswith("_out_channels"):
                silence(reference.get_submodule(names[module]), names[module], indices, present)
        group.prune()


def silence(layer: nn.Module, name: str, indices: list[int], present: dict[str, list[int]]) -> None:
    """Zero the channels of a layer that its cut counterpart loses at these positions among its remaining ones."""
    own = [getattr(layer, "weight", None), getattr(layer, "bias", None)]
    tensors = [tensor for tensor in own if tensor is not None]
    if not tensors:
        return
    left = present.setdefault(name, list(range(len(tensors[0]))))
    gone = {left[index] for index in indices}
    with torch.no_grad():
        for tensor in tensors:
            tensor[sorted(gone)] = 0
    present[name] = [index for index in left if index not in gone]


def examine_apart(named: Sequence[str], tool: str, arguments: argparse.Namespace) -> Row:
    """Examine a network, given by the words of `--one`, in a separate process of this program."""
    command = [sys.executable, sys.argv[0], "--one", *named, "--tool", tool, "--threads", "1"]
    command += ["--memory-limit", str(arguments.memory_limit), "--time-limit", str(arguments.time_limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGXCPU:
        return {"error": f"longer than {arguments.time_limit:g} CPU-seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]}


def listed(arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield (library, name) of every requested network."""
    for line in arguments.list.read_text(encoding="utf-8").splitlines():
        words = line.partition("#")[0].split()
        if words and (not arguments.only or words[1] in arguments.only):
            yield words[0], words[1]


def is_halved(row: Row) -> bool:
    """Whether half of the MACs are removed."""
    return "error" not in row and bool(row["macs_left"] <= LARGEST_SHARE)


def is_exact(row: Row) -> bool:
    """Whether the network was cut to half without changing what it computes."""
    return is_halved(row) and row["difference"] is not None and row["difference"] <= LARGEST_DIFFERENCE


def is_good(row: Row) -> bool:
    """Whether the network was cut to half, exactly, and still works."""
    return is_exact(row) and all(row.get(key) is True for key in ("trains", "loads", "exports"))


def cell(value: object) -> str:
    """Format a value for the table."""
    if isinstance(value, float):
        return f"{value:.2g}" if value < 0.01 else f"{value:.4g}"
    return str(value)[:17]


def print_rows(rows: Rows) -> None:
    """Print one line per network and the totals."""
    measured = {name: row for name, row in rows.items() if "error" not in row}
    table = [[name, *(cell(row.get(column)) for column in COLUMNS)] for name, row in measured.items()]
    print_table(["network", *COLUMNS], table)
    for name, row in rows.items():
        if "error" in row:
            print(f"{name}  {row['error'][:140]}")
    halved, exact, good = (sum(map(test, rows.values())) for test in (is_halved, is_exact, is_good))
    slow = sum(row["cpu_seconds"] > MAX_SECONDS for row in measured.values())
    print(
        f"{len(rows)} networks: {halved} cut to half their MACs, {exact} of them exactly, {good} also train, load "
        f"and export; analysis took more than {MAX_SECONDS} CPU-seconds for {slow}"
    )


def print_comparison(rows: Rows) -> None:
    """Print one line per network that Torch-Pruning was tried on, and the totals."""
    for name, row in rows.items():
        told = row.get("error", "")[:120] or (
            f"{row['cpu_seconds']:.1f} CPU-s, {row['macs_left']:.2f} left, difference {cell(row['difference'])}"
        )
        print(f"{name:<42}  {told}")
    halved = [row for row in rows.values() if is_halved(row)]
    unjudged = sum(row["difference"] is None for row in halved)
    print(
        f"Torch-Pruning: {len(rows)} networks, {len(halved)} cut to half their MACs, "
        f"{sum(map(is_exact, halved))} of them exactly, {unjudged} not comparable (they normalise over channels)"
    )


#: Ways to examine a network.
TOOLS = {"ours": examine, "torch-pruning": examine_torch_pruning, "repair": examine_repair}


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, threads=1, cpu_only=True)
    parser.add_argument("--only", nargs="*", help="names of networks")
    parser.add_argument("--list", type=Path, default=ROOT / "benchmarks" / "zoo.txt", help="networks")
    parser.add_argument("--time-limit", type=float, default=300, help="CPU-seconds per network")
    parser.add_argument("--memory-limit", type=float, default=10, help="GiB per network")
    parser.add_argument("--torch-pruning", action="store_true", help="also run Torch-Pruning, if installed")
    parser.add_argument("--repair", action="store_true", help="instead: what a repair makes of a cut")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file already has")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--tool", default="ours", help=argparse.SUPPRESS)
    return parser.parse("zoo.json", quick={"only": ["resnet18"]})


def main() -> None:
    """Run or resume the sweep and print the table."""
    arguments = parse()
    if arguments.one:
        limit_process(arguments.memory_limit, arguments.time_limit)
        print(json.dumps(TOOLS[arguments.tool](*arguments.one)))
        return
    tools = ["repair"] if arguments.repair else ["ours"]
    if arguments.torch_pruning and not arguments.repair:
        tools.append("torch-pruning")
    rows: dict[str, Rows] = {tool: {} for tool in TOOLS}
    if arguments.output.exists():
        stored = json.loads(arguments.output.read_text(encoding="utf-8"))
        rows |= {tool: stored[tool] for tool in rows if tool in stored}
    for library, name in listed(arguments):
        for tool in tools:
            if arguments.fresh or arguments.only or f"{library}/{name}" not in rows[tool]:
                rows[tool][f"{library}/{name}"] = examine_apart((library, name), tool, arguments)
                write_json(arguments, 1, {tool: found for tool, found in rows.items() if found})
    if arguments.repair:
        print_repairs(rows["repair"])
        return
    print_rows(rows["ours"])
    if arguments.torch_pruning:
        print_comparison(rows["torch-pruning"])


if __name__ == "__main__":
    main()
