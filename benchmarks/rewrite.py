"""Cost of a rewrite: the decision compared with exhaustive evaluation, the surgery, and training while nothing is due.

    python benchmarks/rewrite.py DATA [--arch resnet50] [--rewrites 5] [--batches 10] [--pretrained-weights FILE]

decision   seconds of LucidPrune's search (estimate all candidates, measure a shortlist on a few batches) ÷ seconds of
the published method (measure every candidate on all calibration batches); and the quality of the choice: the share of
rewrites with the same winner, and the chosen candidate's exhaustive loss ÷ the best one's surgery    seconds to cut
network, momentum and average idle       images/s of training that checks in every step whether a rewrite is due ÷
without, in turns

DATA is a data set (ImageNet layout, an archive, shapes); calibration images come from its training split. Without
`--pretrained-weights` the network is random, with batch norm statistics of the images.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from common.measure import Clock, in_turns, ratios
from common.report import BenchmarkParser, write_json
from torch import Tensor, nn

from image_classification.data.build import build_loaders
from image_classification.data.data_config import DataConfig
from image_classification.data.layouts import open_dataset
from image_classification.ema import Ema
from image_classification.models import create_model, model_for_weights
from pruning.engine.constraints import Constraints
from pruning.engine.proof.rehearsal import condition
from pruning.engine.surgery import prune_channels
from pruning.pruner import Pruner
from pruning.rewrites.pruner_settings import PrunerSettings
from pruning.search import Candidate, GreedySearch, Situation
from pruning.search.loss_change import LossChange

#: Number of batches on which rewrites compare candidates.
JUDGE_BATCHES = PrunerSettings().judge_batches

Batches = list[tuple[Tensor, Tensor]]


def open_calibration(arguments: argparse.Namespace) -> tuple[Batches, int]:
    """Return the calibration batches and the number of classes."""
    dataset = open_dataset(arguments.data, require_val=False)
    config = DataConfig(
        data=arguments.data,
        batch_size=arguments.batch_size,
        image_size=arguments.image_size,
        calibration_size=arguments.batches * arguments.batch_size,
    )
    loaders = build_loaders(config, dataset, device=arguments.device)
    assert loaders.calibration is not None
    batches = [(batch.images, batch.targets) for batch in loaders.calibration]
    loaders.close()
    return batches, dataset.num_classes


def make_network(arguments: argparse.Namespace, batches: Batches, num_classes: int) -> nn.Module:
    """Create the network, on the device."""
    if arguments.pretrained_weights is not None:
        return model_for_weights(arguments.arch, arguments.pretrained_weights, device=arguments.device)
    model = create_model(arguments.arch, num_classes=num_classes).to(arguments.device)
    condition(model, (batches[0][0],))
    return model


def measure_decision(pruner: Pruner, batches: Batches, clock: Clock) -> dict[str, float]:
    """Measure one decision both ways on the current network, then rewrite with the exhaustive winner."""
    scores = {index: values.numpy() for index, values in pruner.score(batches).items()}
    targets = pruner.course.targets(pruner.completed + 1)

    def situation(judge_batches: int) -> Situation:
        judge = LossChange(pruner.model, pruner.graph, batches[:judge_batches])
        return Situation(pruner.graph, pruner.costs, scores, targets, judge)

    begin = clock.now()
    ours = GreedySearch().choose(situation(JUDGE_BATCHES))
    between = clock.now()
    # The estimates of the exhaustive search are not part of the published method, but take next to no time.
    exhaustive = GreedySearch(shortlist=0).choose(situation(len(batches)))
    end = clock.now()
    optimizers = pruner.optimizers
    averages = pruner.averages
    prune_channels(pruner.model, pruner.graph, exhaustive.keep, optimizers=optimizers, emas=averages)
    pruner.costs.refresh()
    surgery = clock.now() - end
    pruner.completed += 1
    chosen = None if not ours.keep else pruner.graph.groups[next(iter(ours.keep))].name
    return {
        **compared(chosen, exhaustive.candidates),
        "ours_s": between - begin,
        "exhaustive_s": end - between,
        "surgery_s": surgery,
    }


def compared(chosen: str | None, candidates: list[Candidate]) -> dict[str, float]:
    """Compare the choice with all candidates, whose losses were measured."""
    losses = {
        candidate.group: candidate.measured for candidate in candidates if candidate.measured is not None
    }
    best = min(losses, key=lambda group: losses[group])
    ratio = losses[chosen] / losses[best] if chosen in losses else math.nan
    return {"candidates": len(losses), "same_winner": float(chosen == best), "loss_ratio": ratio}


def measure_idle(
    model: nn.Module, batches: Batches, pruner: Pruner, repeats: int, clock: Clock
) -> list[float]:
    """Return images/s with the check `due` in every iteration ÷ without, pair by pair."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def train(ask: bool) -> float:
        begin = clock.now()
        for iteration, (images, targets) in enumerate(batches[:4]):
            loss = nn.functional.cross_entropy(model(images), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ask:
                assert not pruner.due(-iteration)
        return 1 / (clock.now() - begin)

    model.train()
    speeds = in_turns({"asking": True, "plain": False}, train, repeats)
    return ratios(speeds["asking"], speeds["plain"])


def optimizer_with_momentum(model: nn.Module, images: Tensor, targets: Tensor) -> torch.optim.Optimizer:
    """Return an optimizer after its first step, so that surgery has momentum to cut."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    nn.functional.cross_entropy(model(images), targets).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = BenchmarkParser(__doc__, repeats=5)
    parser.add_argument("data")
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--pretrained-weights", default=None)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=10, help="of calibration")
    parser.add_argument("--rewrites", type=int, default=5)
    parser.add_argument("--delta", type=float, default=5e-3)
    small = {"arch": "resnet20", "image_size": 32, "batches": 3, "rewrites": 1, "repeats": 1}
    return parser.parse("rewrite_{arch}.json", quick=small)


def main() -> None:
    """Measure, print and write JSON."""
    arguments = parse()
    clock = Clock(arguments.device)
    batches, num_classes = open_calibration(arguments)
    model = make_network(arguments, batches, num_classes)
    optimizer = optimizer_with_momentum(model, *batches[0])
    average = Ema(model, 0.999).module
    begin = clock.now()
    pruner = Pruner(
        model,
        batches[0][0][:2],
        optimizer=optimizer,
        ema=average,
        delta=arguments.delta,
        constraints=Constraints(min_width=0.1),
        settings=PrunerSettings(max_batches=arguments.batches),
    )
    analysis = clock.now() - begin
    rows = []
    for _ in range(arguments.rewrites):
        rows.append(measure_decision(pruner, batches, clock))
        print({name: round(value, 4) for name, value in rows[-1].items()}, flush=True)
    idle = measure_idle(model, batches, pruner, arguments.repeats, clock)
    decision = statistics.median(row["ours_s"] / row["exhaustive_s"] for row in rows)
    same = statistics.fmean(row["same_winner"] for row in rows)
    worst = max(row["loss_ratio"] for row in rows)
    surgery = statistics.median(row["surgery_s"] for row in rows)
    print(f"analysis           {analysis:.2f} s")
    print(f"decision ratio     {decision:.3f} (target ≤ 0.05)")
    print(f"same winner        {same:.2f}; worst loss ratio {worst:.4f} (target ≤ 1.01)")
    print(f"surgery            {surgery:.3f} s (target ≤ 1 s on 2 cores)")
    print(f"idle               {statistics.median(idle):.4f} (target ≥ 0.995)")
    content = {
        "analysis_s": analysis,
        "rewrites": rows,
        "decision_ratio_median": decision,
        "same_winner_share": same,
        "worst_loss_ratio": worst,
        "surgery_s_median": surgery,
        "idle_ratio_median": statistics.median(idle),
        "idle_ratios": idle,
    }
    write_json(arguments, arguments.rewrites, content)


if __name__ == "__main__":
    main()
