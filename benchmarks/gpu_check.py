"""Does this installation work on this GPU, and how fast? One command, parts of a minute or two, in the order of use.

    make gpu-check            or            python benchmarks/gpu_check.py [--only tests waits …] [--output FILE]

tests        tests/gpu: the CPU's pixels, no waits within a step, rewrites, pruning in a custom loop
alike        the same training on CPU and GPU: losses of 20 steps, and the channels that rewrites take away
waits        how often the host waits for the device in a training step and in a rewrite
throughput   images/s of training ResNet-50: synthetic in fp32, tf32, fp16, bf16, compiled; from real JPEGs with DATA
scoring      discriminant scores ÷ a forward pass
pruned       speed-up of half the MACs ÷ the MACs saved, batch 1, 32, 256

What has run is in the JSON file; the same command goes on with what is missing (`--again` starts over). Each part is a
process of its own and is ended after `--part-seconds`. No network is needed. Where no package index can be reached,
bring what the report calls missing: `pip install --target carried pytest hypothesis rich` elsewhere, and
PYTHONPATH=carried there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT
from common.report import RESULTS, head

from image_classification.observe.environment import describe_environment

#: Module → what is missing without it.
WANTED = {
    "pytest": "tests/gpu",
    "rich": "training jobs",
    "nvidia.dali": "the backend dali-gpu",
    "pynvml": "utilisation, power and energy",
    "timm": "networks of timm",
    "torch_tensorrt": "TensorRT's speed",
}
BENCHMARKS = ROOT / "benchmarks"
EXIT_NO_GPU = 3
DEVICES = ("cpu", "cuda")


def commands(arguments: argparse.Namespace, folder: Path) -> dict[str, list[list[str]]]:
    """Return part → its commands without the interpreter; `{json}` stands for the file of a command's figures."""
    python = [sys.executable]
    throughput = [
        *python,
        "-m",
        "image_classification",
        "throughput",
        "--device",
        "cuda",
        "--iterations",
        "60",
    ]
    throughput += ["--batch-size", "256", "--json", "{json}"]
    precisions = ["--precision", "fp32", "tf32", "amp", "bf16"]
    speeds = [[*throughput, *precisions], [*throughput, "--precision", "bf16", "--compile"]]
    if arguments.data is not None:
        backends = ["dali-gpu", "dali-cpu"] if installed("nvidia.dali") else ["pytorch"]
        speeds.append([*throughput, arguments.data, "--precision", "bf16", "--backends", *backends])
    script = [*python, str(BENCHMARKS / "gpu_check.py"), "--json", "{json}", "--part"]
    scoring = [*python, str(BENCHMARKS / "di_scoring.py"), "--device", "cuda", "--output", "{json}"]
    pruned = [
        *python,
        str(BENCHMARKS / "pruned_speed.py"),
        "--device",
        "cuda",
        "--channels-last",
        "--output",
        "{json}",
    ]
    pruned += ["--batch-sizes", "1", "32", "256", "--dtype", "bfloat16", "--repeats", "7"]
    return {
        "tests": [[*python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]],
        "alike": [[*script, "alike"]],
        "waits": [[*script, "waits"]],
        "throughput": speeds,
        "scoring": [scoring],
        "pruned": [pruned, [*pruned, "--runtime", "compile"]],
    }


def installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def run_part(name: str, words: list[list[str]], seconds: float, folder: Path) -> dict[str, Any]:
    """Run a part's commands and return their figures, or why there are none."""
    begin, results = time.monotonic(), []
    for number, command in enumerate(words):
        figures = folder / f"{name}-{number}.json"
        left = seconds - (time.monotonic() - begin)
        filled = [word.replace("{json}", str(figures)) for word in command]
        try:
            done = subprocess.run(
                filled, cwd=ROOT, capture_output=True, text=True, timeout=max(left, 1), check=False
            )
            code, said = done.returncode, done.stdout + done.stderr
        except subprocess.TimeoutExpired as stop:
            code, said = -1, f"{(stop.stdout or b'').decode()}\nended after {seconds:.0f} s"
        results.append(
            {
                "command": " ".join(["python", *command[1:]]).replace(str(ROOT) + "/", ""),
                "exit_code": code,
                "said": said.splitlines()[-25:],
                "figures": json.loads(figures.read_text()) if figures.is_file() else None,
            }
        )
    good = all(result["exit_code"] == 0 for result in results)
    return {"good": good, "seconds": time.monotonic() - begin, "results": results}


def training(device: str, workspace: Path) -> Any:
    """Create a small training job with two rewrites on synthetic images that are the same on every device."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.training import MemoryLoader, Recorder, build_trainer, toy_data

    from image_classification.distributed import Distributed
    from pruning.training.pruning_config import PruningConfig
    from pruning.training.scored import PruningCallback

    config = PruningConfig(
        iterative_pruning=True, pruning_step=8, pruning_delta=0.2, budget=["macs=0.6"], calibration_batches=2
    )
    place = torch.device(device)
    images, targets = (tensor.to(place) for tensor in toy_data(40))
    pruning = PruningCallback(config, MemoryLoader(images, targets, 4, False), image_size=8)
    recorder = Recorder()
    job = build_trainer(
        workspace=workspace,
        distributed=Distributed(device=place),
        callbacks=(pruning, recorder),
        data=(images, targets),
        epochs=2,
        training_only=True,
    )
    job.print_freq = 1
    return job, pruning, recorder


def alike(folder: Path) -> dict[str, Any]:
    """Run the same job on both devices; compare the losses, and whether the same channels were removed."""
    seen = []
    for number, device in enumerate(DEVICES):
        job, pruning, recorder = training(device, folder / str(number))
        job.fit()
        seen.append((recorder.losses, [record.widths for record in pruning.pruner.history]))
    (cpu_losses, cpu_widths), (gpu_losses, gpu_widths) = seen
    distances = [abs(a - b) / abs(a) for a, b in zip(cpu_losses, gpu_losses, strict=True)]
    return {
        "largest relative difference of the losses before the first rewrite": max(distances[:8]),
        "largest relative difference of the losses": max(distances),
        "same widths after every rewrite": cpu_widths == gpu_widths,
        "losses": {"cpu": cpu_losses, "cuda": gpu_losses},
    }


def waits(folder: Path) -> dict[str, Any]:
    """Count waits for the device, by CUDA's sync debug mode, per training step without and with a rewrite."""
    import warnings

    job, pruning, _ = training("cuda", folder / "waits")
    job.print_freq = 10**6
    counts: list[int] = []
    batches = iter(job.train_loader)
    job._emit("on_fit_start")
    for _ in range(9):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            job.train_step(batches)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(len(caught))
    return {
        "per plain step": counts[3:7],
        "of the step with a rewrite": counts[7],
        "rewrites": len(pruning.pruner.history),
    }


PARTS = {"alike": alike, "waits": waits}


def no_gpu() -> str | None:
    """Return why nothing can be checked here; None if there is a GPU."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda
    why = (
        f"this torch ({torch.__version__}) is built without CUDA"
        if built is None
        else "no driver or no device answers"
    )
    return f"no GPU: {why}. `nvidia-smi` says whether the driver sees one; install a torch for CUDA, and run this again"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data", nargs="?", help="real JPEGs in ImageNet layout, for the loading backends")
    parser.add_argument(
        "--only", nargs="+", choices=("tests", "alike", "waits", "throughput", "scoring", "pruned")
    )
    parser.add_argument("--again", action="store_true", help="run what has run before, too")
    parser.add_argument("--part-seconds", type=float, default=150.0)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_check.json")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the missing parts, show and save the results."""
    arguments = parse()
    problem = no_gpu()
    if problem is not None:
        print(f"gpu-check: {problem}", file=sys.stderr)
        return EXIT_NO_GPU
    folder = arguments.output.parent / "gpu_check_parts"
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.part is not None:
        arguments.json.write_text(json.dumps(PARTS[arguments.part](folder), indent=1))
        return 0
    arguments.device = torch.device("cuda")
    missing = {module: what for module, what in WANTED.items() if not installed(module)}
    report: dict[str, Any] = {**head(arguments, 1), "environment": describe_environment(arguments.device)}
    known = (
        json.loads(arguments.output.read_text()) if arguments.output.is_file() and not arguments.again else {}
    )
    report |= {"missing": missing, "parts": known.get("parts", {})}
    for module, what in missing.items():
        print(f"missing: {module} ({what})", flush=True)
    for name, words in commands(arguments, folder).items():
        wanted = arguments.only is None or name in arguments.only
        if wanted and (arguments.only or not report["parts"].get(name, {}).get("good")):
            report["parts"][name] = run_part(name, words, arguments.part_seconds, folder)
            arguments.output.write_text(json.dumps(report, indent=1, default=str) + "\n")
            show(name, report["parts"][name])
    good = all(part["good"] for part in report["parts"].values())
    print(f"{'all parts ran' if good else 'not all parts ran'}; written to {arguments.output}")
    return 0 if good else 1


def show(name: str, part: dict[str, Any]) -> None:
    """Print a part: whether it ran, and the end of its commands' output."""
    print(f"== {name}: {'ran' if part['good'] else 'FAILED'} in {part['seconds']:.0f} s", flush=True)
    for result in part["results"]:
        lines = result["said"] if result["said"] else [json.dumps(result["figures"])[:500]]
        print("\n".join(f"   {line}" for line in lines[-12:]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
