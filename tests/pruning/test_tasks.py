"""Any input, any output, any loss: examples and batches of every form, through `prune` and `Pruner`."""

from __future__ import annotations

import copy
import dataclasses
import logging
import types
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classification.config import ConfigError
from pruning import Pruner, PrunerSettings, prune
from pruning.criteria.discriminant import discriminant_scores
from pruning.task import Task


@dataclasses.dataclass(frozen=True, slots=True)
class SlottedBatch:
    shown: Tensor
    wanted: Tensor


class Body(nn.Module):
    """Two convolutions, shared by the networks below."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.norm(self.first(x)))))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class ByKeyword(nn.Module):
    """Its arguments have no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = Classifier()

    def forward(self, *, pixels: Tensor, flipped: bool = False, **rest: object) -> Tensor:
        logits: Tensor = self.classifier(pixels.flip(-1) if flipped else pixels)
        return logits


class Named(Classifier):
    """Takes its arguments by name and returns its own loss, as Hugging Face's networks do."""

    def forward(self, pixels: Tensor, scale: float = 1.0, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = super().forward(pixels * scale)
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = F.cross_entropy(logits, labels)
        return found


class TwoInputs(Classifier):
    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().forward(x) * weight


class Segmenter(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.body, self.head = Body(), nn.Conv2d(8, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class LossesWhileTraining(nn.Module):
    """A detector's way: losses in training, predictions in evaluation; a queue that every training pass moves."""

    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.head = Body(), nn.Dropout(0.5), nn.Conv2d(8, 4, 1)
        self.register_buffer("queue", torch.zeros(2))

    def forward(self, images: list[Tensor], targets: list[Tensor] | None = None) -> Any:
        maps = self.head(self.drop(self.body(torch.stack(images))))
        if not self.training:
            return [{"boxes": boxes} for boxes in maps.mean((2, 3))]
        assert targets is not None
        self.queue += 1
        return {"loss_box": (maps.mean((2, 3)) - torch.stack(targets)).square().mean()}


def images(count: int = 8, size: int = 12) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def classes(count: int = 8) -> Tensor:
    return torch.arange(count) % 4


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Classifier(), images(2)),
        (Classifier(), (images(2),)),
        (Classifier(), {"x": images(2)}),
        (Classifier(), [images(2), images(2, 20)]),
        (TwoInputs(), (images(2), torch.ones(2, 4))),
        (TwoInputs(), {"weight": torch.ones(2, 4), "x": images(2)}),
        (Named(), {"pixels": images(2)}),
        (Named(), {"pixels": images(2), "labels": classes(2)}),
        (ByKeyword(), {"pixels": images(2), "flipped": True}),
        (ByKeyword(), {"pixels": images(2), "anything": 3}),
    ],
)
def test_examples_of_every_form(model: nn.Module, example: Any) -> None:
    record = prune(model, example, budget={"macs": 0.5, "memory": 0.99})
    assert record.costs["macs"][1] <= 0.5 * record.costs["macs"][2]
    one = example[0] if isinstance(example, list) else example
    if isinstance(one, Mapping):
        model(**one)
    else:
        model(*(one if isinstance(one, tuple) else (one,)))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ([], r"example=\[\]"),
        (torch.zeros(0, 3, 8, 8), "example=0"),
        ("cat.jpg", "example='str'"),
        ({"image": torch.zeros(2, 3, 8, 8)}, "example='image': Classifier.forward.*forward="),
        ({"size": 3}, "example={'size': 3}"),
    ],
)
def test_what_is_no_example_is_refused(example: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune(Classifier(), example)


def test_a_loss_of_samples_and_their_mean_score_alike() -> None:
    """And as the plain classifier: the same network and data, said in several ways."""
    model, x, y = Classifier(), images(), classes()
    entropy = F.cross_entropy
    ways: list[tuple[Any, dict[str, Any]]] = [
        ((x, y), {}),
        (
            SlottedBatch(x, y),
            {
                "forward": lambda network, batch: network(batch.shown),
                "loss": lambda outputs, batch: entropy(outputs, batch.wanted, reduction="none"),
            },
        ),
        (
            types.SimpleNamespace(shown=x, wanted=y, name="held out"),
            {
                "forward": lambda network, batch: network(batch.shown),
                "loss": lambda outputs, batch: entropy(outputs, batch.wanted),
            },
        ),
        (
            {"image": x, "class": y},
            {
                "forward": lambda batch: model(batch["image"]),
                "loss": lambda outputs, batch: entropy(outputs, batch["class"], reduction="none"),
            },
        ),
        (
            {"x": x, "y": y},
            {
                "forward": lambda network, batch: network(batch["x"]),
                "loss": lambda outputs, batch: entropy(outputs, batch["y"]),
            },
        ),
    ]
    found = []
    for batch, how in ways:
        pruner = Pruner(model, x[:2], criterion="taylor", **how)
        found.append(pruner.score([batch]))
        rows = pruner.dry_run([batch])
        assert rows[-1]["costs"]["macs"] <= 0.5
    for scores in found[1:]:
        for index, values in scores.items():
            torch.testing.assert_close(values, found[0][index], rtol=1e-4, atol=1e-7)


def test_the_recorded_loss_is_the_users() -> None:
    model, x = Classifier(), images()
    goal = torch.randn(8, 4)

    def distance(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return (outputs - batch["goal"]).square()

    pruner = Pruner(
        model,
        x[:2],
        forward=lambda batch: model(batch["x"]),
        loss=distance,
        delta=1.0,
    )
    model.eval()
    expected = (model(x) - goal).square().mean().item()
    record = pruner.step([{"x": x, "goal": goal}])
    assert record.loss[0] == pytest.approx(expected, rel=1e-5)
    assert record.loss[1] == pytest.approx((model(x) - goal).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("batch", "model", "how", "name"),
    [
        ((images(), classes()), Classifier(), {}, "discriminant"),
        ((images(), torch.rand(8, 4)), Classifier(), {}, "discriminant"),
        ({"pixels": images(), "labels": classes()}, Named(), {}, "discriminant"),
        ((images(), torch.randint(3, (8, 12, 12))), Segmenter(), {}, "discriminant"),
        ((images(), torch.randint(2, (8, 1, 12, 12)).float()), Segmenter(2), {}, "discriminant"),
        ((images(), torch.randn(8, 4)), Classifier(), {"loss": lambda y, b: F.mse_loss(y, b[1])}, "taylor"),
        (
            (images(), torch.rand(8, 1, 12, 12)),
            Segmenter(1),
            {"loss": lambda y, b: F.l1_loss(y, b[1])},
            "taylor",
        ),
        (images(), Classifier(), {"loss": lambda y, b: y.square().mean()}, "taylor"),
        (images(), Classifier(), {}, "magnitude"),
        ((images(), torch.randn(8)), Classifier(), {}, "magnitude"),
    ],
)
def test_the_criterion_fits_what_is_given(
    batch: Any, model: nn.Module, how: dict[str, Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    inputs = (
        batch
        if isinstance(batch, Tensor)
        else next(iter(batch.values() if isinstance(batch, dict) else batch))
    )
    pruner = Pruner(copy.deepcopy(model), inputs[:2], delta=1.0, **how)
    record = pruner.step([batch])
    assert record.costs["macs"][1] <= 0.5 * record.costs["macs"][2]
    assert pruner.criterion is not None
    assert pruner.criterion.name == name
    assert f"criterion {name}" in caplog.text


def _one_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return Task().losses(logits, (torch.zeros(len(logits), 1), targets))


def test_default_losses_are_those_of_the_targets() -> None:
    """One logit, (N, 1) class numbers and multi-hot targets have losses of their own; other numbers have none."""
    logits, labels = torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 0, 2])
    entropy = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(_one_loss(logits, labels[:, None]), entropy)
    torch.testing.assert_close(_one_loss(logits, F.one_hot(labels, 3)), entropy)
    several = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1]]).float()
    by_class = F.binary_cross_entropy_with_logits(logits, several, reduction="none")
    torch.testing.assert_close(_one_loss(logits, several), by_class.mean(1))
    yes = labels == 2
    binary = F.binary_cross_entropy_with_logits(logits[:, 0], yes.float(), reduction="none")
    for single in (logits[:, 0], logits[:, :1]):
        for targets in (yes.long(), yes.float(), yes.float()[:, None]):
            torch.testing.assert_close(_one_loss(single, targets), binary)
    for targets in (torch.randn(6, 3), torch.rand(6, 3), torch.rand(6)):
        with pytest.raises(ConfigError, match="no loss is known"):
            _one_loss(logits, targets)
    with pytest.raises(ConfigError, match="no loss is known"):
        _one_loss(torch.randn(6, 1, 4, 4), torch.rand(6, 1, 4, 4))  # a depth, not a class


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"loss": nn.CrossEntropyLoss()}, r"loss='tuple': it is called with \(outputs, batch\)"),
        ({"loss": lambda outputs, batch: batch["class"]}, "loss='tuple': it is called with.*TypeError"),
        ({"loss": lambda outputs, batch: None}, "loss='NoneType': return a tensor"),
        ({"loss": lambda outputs, batch: outputs.mean().item()}, "loss='float': return a tensor"),
        (
            {"loss": lambda outputs, batch: outputs.mean().detach(), "criterion": "taylor"},
            "'taylor': .*do not detach the loss",
        ),
        ({"forward": lambda network, batch: network(batch.x)}, "forward='tuple': it is called with.*'x'"),
        ({"forward": lambda: None}, "forward='tuple': it is called with"),
        (
            {"criterion": "taylor", "batch": (images(), classes() + 1)},
            r"loss=None: .*\(1 … 4\) and outputs.*4\)",
        ),
        ({"batch": (images().numpy(), classes())}, "calibration='tuple': the network does not run.*forward="),
        ({"criterion": "discriminant", "batch": (images(), torch.randn(8, 4))}, "accepts class targets"),
        ({"repair": "lsq"}, "repair='lsq': choose from"),
        ({"budget": {"macs": "half"}}, "budget=.*give a share"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_remedy(how: dict[str, Any], message: str) -> None:
    options = {"batch": (images(), classes()), **how}
    with pytest.raises(ConfigError, match=message):
        prune(Classifier(), images(2), calibration=[options.pop("batch")], **options)


def test_dense_targets_by_the_discriminant() -> None:
    """Every position is a sample: with few of them, those of the whole batch, against the plain function."""
    model = Segmenter().eval()
    x, y = images(4, 8), torch.randint(3, (4, 8, 8), generator=torch.Generator().manual_seed(0))
    y[0, :2] = 255
    pruner = Pruner(model, x[:2], criterion="discriminant")
    found = pruner.score([(x, y)])[pruner.graph.group("body.first").index]
    with torch.no_grad():
        maps = torch.relu(model.body.norm(model.body.first(x)))
    vectors = maps.permute(0, 2, 3, 1).reshape(-1, 8)
    known = y.flatten() != 255
    expected = discriminant_scores(vectors[known], y.flatten()[known])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_criteria_say_which_targets_they_accept() -> None:
    pruner = Pruner(Classifier(), images(2), criterion="discriminant", search="global")
    with pytest.raises(ConfigError, match=r"criterion='discriminant'.*taylor"):
        pruner.step([images()])
    with pytest.raises(ConfigError, match=r"criterion='discriminant'.*torch\.float32 .*\(8,\)"):
        pruner.step([(images(), torch.randn(8))])
    pruner = Pruner(Classifier(), images(2), criterion="taylor", search="global")
    with pytest.raises(ConfigError, match=r"loss=None.*loss="):
        pruner.step([images()])


class Counting(Classifier):
    """Counts its passes, and remembers the last one, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("latest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.num_passes += 1
        self.latest = x.mean()
        return super().forward(x)


def test_calibration_leaves_no_trace_in_buffers() -> None:
    model = Counting().eval()
    pruner = Pruner(model, images(2), budget=0.7, delta=0.2)
    pruner.step([(images(), torch.arange(8) % 4)])
    assert int(model.num_passes) == 0
    assert float(model.latest) == 0


def test_a_network_that_only_trains_has_a_loss() -> None:
    """Losses of the training path, without dropout's noise; queues, statistics and modes are as before."""
    model = LossesWhileTraining()
    model.train()
    model.head.eval()
    x, goals = list(images()), list(torch.randn(8, 4))
    before = copy.deepcopy(model.state_dict())
    pruner = Pruner(
        model, (x[:2],), forward=lambda batch: model(*batch), delta=1.0, settings=PrunerSettings(mode="train")
    )
    batch = (x, goals)
    scores = pruner.score([batch])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.training
    assert not model.head.training
    assert pruner.criterion is not None
    assert pruner.criterion.name == "taylor"
    again = pruner.score([batch])
    assert all(torch.equal(scores[index], again[index]) for index in scores)
    record = pruner.step([batch])
    model.eval()
    maps = model.head(model.body(torch.stack(x))).mean((2, 3))
    assert record.loss[1] == pytest.approx((maps - torch.stack(goals)).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ((images(), classes()), r"calibration='\(images, targets\)'.*\[\(images, targets\)\]"),
        (images(), "calibration='Tensor'"),
        ({"x": images()}, "calibration='dict'"),
        ([3], "calibration='int'.*forward="),
        ([{"image": images()}], "Classifier.forward.*forward="),
    ],
)
def test_what_is_no_batch_is_refused(calibration: Any, message: str) -> None:
    model = Classifier()
    before = sum(p.numel() for p in model.parameters())
    with pytest.raises(ConfigError, match=message):
        prune(model, images(2), calibration=calibration)
    assert sum(p.numel() for p in model.parameters()) == before


def test_a_loss_of_another_shape_is_refused() -> None:
    def three(outputs: Tensor, batch: Any) -> Tensor:
        return torch.stack([outputs.mean()] * 3)

    with pytest.raises(ConfigError, match=r"loss=\(3,\): .*\b8\b"):
        prune(Classifier(), images(2), calibration=[(images(), classes())], criterion="taylor", loss=three)


@pytest.mark.parametrize(
    ("batch", "forward", "divides"),
    [
        (images(), None, True),
        ((images(), classes()), None, True),
        ({"pixels": images(), "labels": classes()}, None, True),
        (
            {"image": images(2), "boxes": torch.rand(2, 4)},
            lambda network, batch: network(batch["image"]),
            False,
        ),
        ((list(images(3)), list(torch.rand(3, 1, 4))), None, False),
        (((images(), images()), classes()), None, False),
        ((images(), torch.rand(5, 6)), None, False),
    ],
)
def test_batches_are_cut_where_that_is_known_to_be_right(batch: Any, forward: Any, divides: bool) -> None:
    assert Task(forward).divides(batch) is divides


def test_a_single_cut_reads_as_many_batches_as_it_is_told() -> None:
    read = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(20):
            read.append(number)
            yield images(), classes()

    prune(Classifier(), images(2), calibration=batches(), settings=PrunerSettings(max_batches=3))
    assert read == [0, 1, 2]
