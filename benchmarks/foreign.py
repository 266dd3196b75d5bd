"""Unprepared networks of other libraries: cut to half their MACs, exactly, saved and exported, with what stays frozen.

    python benchmarks/foreign.py                              # all, resumes where it stopped
    python benchmarks/foreign.py --only ultralytics monai/VNet
    python benchmarks/foreign.py --torch-pruning              # compared with Torch-Pruning, if it is installed

YOLO from yaml, segmentation_models_pytorch, torchvision's detectors, segmenters and video networks, image models of
transformers from small configurations, MONAI and pytorchcv: random weights, small inputs. Libraries that are not
installed are skipped with a message. Every network is examined in a separate process, on one thread, with limits on
time and memory. The table has a line per network; the JSON is written network by network.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import io
import json
import time
from collections import Counter
from typing import Any

import torch
from common.foreign_networks import FOREIGN
from common.measure import limit_process, peak_memory, resident_memory
from common.networks import uniform_cut
from common.peer_attempts import attempts
from common.report import BenchmarkParser, print_table, write_json
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode
from zoo import LARGEST_DIFFERENCE, LARGEST_SHARE, cell, examine_apart, groups_of, is_exact, is_halved

from image_classification.models.structure_build import build_from_structure
from image_classification.models.structure_capture import capture_structure
from pruning.costs.cost_model import CostModel
from pruning.engine.examples import output_tensors
from pruning.engine.gates import Gates
from pruning.engine.proof.rehearsal import condition
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups
from pruning.engine.undisturbed import undisturbed

COLUMNS = ("cpu_seconds", "memory", "prunable_percent", "macs_left", "difference", "loads", "onnx")

Row = dict[str, Any]
Rows = dict[str, Row]


def network(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return the network in evaluation mode, its weights spread out so that channels differ, and its arguments."""
    torch.manual_seed(0)
    model, given = FOREIGN[name]()
    condition(model, given)
    return model.eval(), given


def outputs(model: nn.Module, given: tuple[Any, ...]) -> list[Tensor]:
    """Return every floating-point tensor that the network outputs in evaluation mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        return [tensor for tensor in output_tensors(model.eval()(*given)) if tensor.is_floating_point()]


def count_macs(model: nn.Module, given: tuple[Any, ...]) -> int:
    """Return the MACs of a forward pass by PyTorch's flop counter."""
    model = copy.deepcopy(model).requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with undisturbed(model), counter:
        model.eval()(*given)
    return int(counter.get_total_flops() // 2)


def difference(expected: list[Tensor], found: list[Tensor]) -> float | None:
    """Return the largest relative difference of two lists of outputs; None if their shapes differ."""
    errors = [0.0]
    for left, right in zip(expected, found, strict=True):
        if left.shape != right.shape:
            return None
        if left.numel():
            errors.append(float((left - right).abs().max() / left.abs().max().clamp(min=1e-12)))
    return max(errors)


def examine(name: str) -> Row:
    """Examine a network and return its row of the table."""
    empty = resident_memory()
    model, given = network(name)
    with peak_memory() as usual:
        outputs(model, given)
    start = time.process_time()
    with peak_memory() as analysis:
        graph = trace_groups(model, given)
    seconds = time.process_time() - start
    fresh = copy.deepcopy(model)
    before = count_macs(model, given)
    row: Row = {
        "cpu_seconds": round(seconds, 2),
        "memory": round((analysis[0] - empty) / max(1, usual[0] - empty), 2),
        **groups_of(graph),
        "macs": before,
    }
    keep = uniform_cut(model, graph, CostModel(graph, model, given))
    with Gates(model, graph) as gates:
        gates.set_keep(keep)
        expected = outputs(model, given)
    whole, whole_graph = copy.deepcopy((model, graph))
    prune_channels(model, graph, keep)
    row["difference"] = difference(expected, outputs(model, given))
    if row["difference"] is None or row["difference"] > LARGEST_DIFFERENCE:
        # A detector sorts its finds by scores: rounding swaps those that are nearly equal.
        with Gates(whole, whole_graph) as gates:
            gates.set_keep(keep)
            expected = exact_outputs(whole, given)
        row["difference"] = difference(expected, exact_outputs(model, given))
        row["in_double_precision"] = True
    row["macs_left"] = round(count_macs(model, given) / before, 3)
    row["loads"] = loads(model, fresh, given)
    row["onnx"] = exports(model, given)
    if row["onnx"] is not True and exports(fresh, given) is not True:
        row["onnx"] = "nor the whole network"
    return row


def exact_outputs(model: nn.Module, given: tuple[Any, ...]) -> list[Tensor]:
    """Return the outputs in double precision."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = outputs(model.double(), tree_map(as_double, given))
    model.float().load_state_dict(weights)
    return found


def as_double(leaf: object) -> object:
    """Return a tensor of real numbers in double precision, and anything else as it is."""
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def loads(model: nn.Module, fresh: nn.Module, given: tuple[Any, ...]) -> bool | str:
    """Whether structure and weights, as plain data, restore the same network."""
    try:
        structure = capture_structure(model, factory=lambda: copy.deepcopy(fresh))
        loaded = build_from_structure(structure, factory=lambda: copy.deepcopy(fresh))
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        return difference(outputs(model, given), outputs(loaded, given)) == 0
    except (RuntimeError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {str(error)[:160]}"


def exports(model: nn.Module, given: tuple[Any, ...]) -> bool | str:
    """Whether PyTorch can export the network to ONNX."""
    try:
        torch.onnx.export(model.eval(), given, io.BytesIO(), dynamo=True, verbose=False)
    except Exception as error:  # any failure of the exporter is a finding
        return f"{type(error).__name__}: {str(error)[:120]}"
    return True


def examine_torch_pruning(name: str) -> Row:
    """Examine Torch-Pruning in the same way: whether half the MACs are removed and the network still runs, predictions
    shaped as before.

    It is told which layers make the outputs, as its users have to do, and more (`common/peer_attempts.py`);
    LucidPrune finds that by itself.
    """
    original, given = network(name)
    before = count_macs(original, given)
    shapes = [tensor.shape for tensor in outputs(original, given)]
    graph = trace_groups(copy.deepcopy(original), given, verify=False)
    heads = [group.name.partition("#")[0] for group in graph.groups if group.reason == "the network's output"]
    heads = [head for head in dict.fromkeys(heads) if head in dict(original.named_modules())]
    rows = []
    told: list[str] = []
    for attempt in attempts(original, heads, output_tensors):
        for share in (0.3, 0.4, 0.5, 0.6, 0.7):
            start = time.process_time()
            try:
                model = attempt.cut(original, given, share)
                seconds = time.process_time() - start
                same = has_shapes(model, given, shapes)
            except RuntimeError as error:
                told.append(str(error))
                break
            left = round(count_macs(model, given) / before, 3)
            rows.append({"cpu_seconds": round(seconds, 2), "macs_left": left, "same_shapes": same})
            if left <= LARGEST_SHARE:
                return rows[-1]
    if not rows:
        raise RuntimeError(told[0])
    return min(rows, key=lambda row: float(row["macs_left"]))


def has_shapes(model: nn.Module, given: tuple[Any, ...], shapes: list[torch.Size]) -> bool:
    """Whether a cut network outputs tensors of these shapes.

    Raises:
        RuntimeError: It does not run, or the first tensor, its predictions, has another shape.
    """
    try:
        found = [tensor.shape for tensor in outputs(model, given)]
    except Exception as error:  # any failure is a result
        problem = f"after its cut the network raises {type(error).__name__}: {error}"
    else:
        if found[0] == shapes[0]:
            return found == shapes
        problem = f"after its cut the predictions have the shape {found[0]} instead of {shapes[0]}"
    raise RuntimeError(" ".join(problem.split()))


def wanted(only: list[str] | None) -> list[str]:
    """Return the names of the requested networks whose libraries are installed."""
    missing = {name.partition("/")[0] for name in FOREIGN}
    missing = {library for library in missing if importlib.util.find_spec(library) is None}
    if missing:
        print(f"not installed, and left out: {', '.join(sorted(missing))}")
    chosen = [name for name in FOREIGN if not only or name in only or name.partition("/")[0] in only]
    return [name for name in chosen if name.partition("/")[0] not in missing]


def print_rows(rows: Rows) -> None:
    """Print one line per network and the totals."""
    measured = {name: row for name, row in rows.items() if "error" not in row}
    table = [[name, *(cell(row.get(column)) for column in COLUMNS)] for name, row in measured.items()]
    print_table(["network", *COLUMNS], table)
    for name, row in rows.items():
        if "error" in row:
            print(f"{name}  {row['error'][:140]}")
    counts = Counter[str]()
    for row in measured.values():
        counts.update(key for key in ("loads", "onnx") if row[key] is True)
    halved, exact = (sum(map(test, rows.values())) for test in (is_halved, is_exact))
    print(
        f"{len(rows)} networks: {halved} cut to half their MACs, {exact} of them exactly; of the {len(measured)} "
        f"that were cut {counts['loads']} load again and {counts['onnx']} export to ONNX"
    )


def print_comparison(rows: Rows) -> None:
    """Print Torch-Pruning's results and the totals."""
    for name, row in rows.items():
        told = row.get("error", "")[:120] or f"{row['macs_left']:.2f} left, same shapes: {row['same_shapes']}"
        print(f"{name:<48}  {told}")
    halved = [row for row in rows.values() if is_halved(row)]
    whole = sum(row["same_shapes"] for row in halved)
    print(
        f"Torch-Pruning: {len(rows)} networks, {len(halved)} cut to half, {whole} of them with outputs as before"
    )


def versions(names: list[str]) -> dict[str, str]:
    """Return the versions of the networks' libraries."""
    libraries = sorted({name.partition("/")[0] for name in names})
    return {library: importlib.metadata.version(library) for library in (*libraries, "torch")}


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, threads=1, cpu_only=True)
    parser.add_argument("--only", nargs="*", help="libraries, or networks as library/name")
    parser.add_argument("--time-limit", type=float, default=300, help="CPU-seconds per network")
    parser.add_argument("--memory-limit", type=float, default=10, help="GiB per network")
    parser.add_argument("--torch-pruning", action="store_true", help="also run Torch-Pruning, if installed")
    parser.add_argument("--fresh", action="store_true", help="measure again what the file already has")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--tool", default="ours", help=argparse.SUPPRESS)
    return parser.parse("foreign.json", quick={"only": ["torchvision/lraspp_mobilenet_v3_large"]})


def main() -> None:
    """Run or resume the sweep and print the table."""
    arguments = parse()
    if arguments.one:
        limit_process(arguments.memory_limit, arguments.time_limit)
        examiner = examine if arguments.tool == "ours" else examine_torch_pruning
        print(json.dumps(examiner(arguments.one)))
        return
    tools = ["ours", "torch-pruning"] if arguments.torch_pruning else ["ours"]
    rows: dict[str, Rows] = {tool: {} for tool in ("ours", "torch-pruning")}
    if arguments.output.exists():
        stored = json.loads(arguments.output.read_text(encoding="utf-8"))
        rows |= {tool: stored[tool] for tool in rows if tool in stored}
    names = wanted(arguments.only)
    for name in names:
        for tool in tools:
            if arguments.fresh or name not in rows[tool]:
                rows[tool][name] = examine_apart((name,), tool, arguments)
                results = {tool: found for tool, found in rows.items() if found}
                write_json(arguments, 1, {**results, "versions": versions(names)})
    print_rows(rows["ours"])
    if arguments.torch_pruning:
        print_comparison(rows["torch-pruning"])


if __name__ == "__main__":
    main()
