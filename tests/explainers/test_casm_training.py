"""train-casm: what a step changes, what is saved, exact resume, several ranks, clear errors."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from explainers.__main__ import main as explainers_main
from explainers.casm import load_casm
from explainers.casm.casm_objective import decoder_loss
from explainers.casm.casm_trainer import CasmTrainer, epoch_length
from explainers.casm.decoder import enlarged
from explainers.casm.store import PastClassifiers
from explainers.casm.train import CasmJobConfig, completed, make_casm_trainer
from explainers.differentiable.features import FeatureTaps
from image_classification import job as jobs
from image_classification.cli import parse_config
from image_classification.distributed import Distributed
from image_classification.models import read_safely
from image_classification.observe.json_report import read_report
from tests.support.explained import save_network

pytestmark = pytest.mark.usefixtures("small_cache")
ROOT = Path(__file__).resolve().parents[2]
DATA = "shapes:train=48,val=20,seed=5"
COMMON = (
    "--arch resnet20 --image-size 32 --decoder-width 4 -b 8 --data-backend pytorch -j 0 --device cpu -p 1 "
    "--epochs 2 --pot 0.5 --lr 0.02"
).split()

ONE_STEP = ["--epochs", "1", "--prof", "1", "--training-only"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_network(tmp_path_factory.mktemp("classifier") / "classifier.pth.tar")


def train(words: list[str]) -> int:
    return explainers_main(["train-casm", *words])


def words(folder: Path, *more: str) -> list[str]:
    return [DATA, "--casms-path", str(folder), *COMMON, *more]


def trainer_of(folder: Path, *more: str) -> tuple[jobs.Job, CasmTrainer]:
    configs = completed(parse_config(CasmJobConfig, words(folder, *more)))
    job = jobs.prepare(configs, Distributed())
    return job, make_casm_trainer(job, jobs.make_model(job))


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by their place in it."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {place: t for key, inner in pairs for place, t in tensors(inner, f"{name}/{key}").items()}


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    differing = [name for name in one if not torch.equal(one[name], two[name])]
    assert not differing, differing[:5]
    for key in ("epoch", "iteration", "loader", "rng"):
        assert first[key] == second[key], key


def test_a_run_leaves_a_casm_and_its_record(tmp_path: Path) -> None:
    settings = ["--reproduce", "L100", "--smf", "2", "--num-past", "2", "--log-path", str(tmp_path / "logs")]
    assert train(words(tmp_path, *settings)) == 0
    casm = load_casm(tmp_path / "L100" / "checkpoint.pth.tar")
    assert casm.taps == ("relu", "layer1", "layer2", "layer3")
    payload = read_safely(tmp_path / "L100" / "checkpoint.pth.tar")
    assert payload["iteration"] == 6  # two epochs of half of six batches
    assert len(payload["casm_training"]["past"]["states"]) == 2
    entries = [
        e for e in read_report(tmp_path / "logs" / "L100" / "experiment_raport.json") if e["type"] == "LOG"
    ]
    steps = [entry["data"] for entry in entries if len(entry["step"]) == 2]
    assert len(steps) == 6
    for name in (
        "loss",
        "decoder_loss",
        "masked_top1",
        "confused",
        "mask_mean",
        "mask_std",
        "mask_entropy",
        "mask_tv",
        "lr_casm",
    ):
        assert all(f"train.{name}" in step for step in steps), name
    epochs = [entry["data"] for entry in entries if "val.masked_top1" in entry["data"]]
    assert len(epochs) == 2
    assert epochs[0]["val.samples"] == 20
    # the saved recipe is one
    again = parse_config(CasmJobConfig, ["--config", str(tmp_path / "L100" / "config.yaml")])
    assert again.casm.thinning.store_every == 2


def test_a_fixed_classifier_stays_as_it_is(tmp_path: Path, classifier: str) -> None:
    assert train(words(tmp_path, "--reproduce", "F", "--pretrained-weights", classifier)) == 0
    before, after = read_safely(classifier)["state_dict"], read_safely(tmp_path / "F" / "checkpoint.pth.tar")
    assert all(torch.equal(value, after["state_dict"][name]) for name, value in before.items())
    steps = [state["step"].item() for state in after["casm_training"]["optimizer"]["state"].values()]
    assert set(steps) == {6.0}


def test_who_is_trained_when_a_past_classifier_judges(tmp_path: Path) -> None:
    """f takes one step (clean) per batch if a past f judges, two if it judges itself."""
    for share, expected in (("0", 2), ("1", 1)):
        stored = ["--smf", "1"] if share == "1" else []
        job, trainer = trainer_of(tmp_path / share, "--reproduce", "L100", "--hp", share, *stored, *ONE_STEP)
        updates = []
        real = trainer.precision.step
        trainer.precision.step = lambda optimizer, *rest, real=real, updates=updates: (  # type: ignore[method-assign]
            updates.append(optimizer),
            real(optimizer, *rest),
        )[1]
        try:
            trainer.fit()
        finally:
            job.close()
        assert updates.count(trainer.state.optimizer) == expected
        assert updates.count(trainer.decoder_optimizer) == 1
        assert all(p.grad is None for p in trainer.casm.parameters())


def test_a_step_against_plain_autograd(tmp_path: Path) -> None:
    """Decoder and classifier after one step of preset L, written out slowly."""
    job, trainer = trainer_of(tmp_path, "--reproduce", "L", "--lambda-r", "3", "--clip-casm", "1e-3")
    try:
        casm = copy.deepcopy(trainer.casm).train()
        trainer.train_loader.set_epoch(0)
        batch = next(iter(trainer.train_loader))
        trainer.state.model.train()
        trainer.train_step(iter([batch]))
    finally:
        job.close()
    sgd = torch.optim.SGD(casm.classifier.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    adam = torch.optim.Adam(casm.decoder.parameters(), lr=1e-3, weight_decay=1e-4)
    with FeatureTaps(casm.classifier, casm.taps) as taps:
        clean = casm.classifier(batch.images)
        features = [feature.detach() for feature in taps.features]
    torch.nn.functional.cross_entropy(clean, batch.targets).backward()
    sgd.step()
    mask = enlarged(casm.decoder(features), (32, 32))
    masked = casm.classifier(batch.images * (1 - mask))
    loss = decoder_loss(clean, masked, batch.targets, mask, lambda_r=3.0, adversarial=False)
    for_decoder = torch.autograd.grad(loss, list(casm.decoder.parameters()), retain_graph=True)
    cross_entropy = torch.nn.functional.cross_entropy(masked, batch.targets)
    for_classifier = torch.autograd.grad(cross_entropy, list(casm.classifier.parameters()))
    for module, gradients in ((casm.decoder, for_decoder), (casm.classifier, for_classifier)):
        for parameter, gradient in zip(module.parameters(), gradients, strict=True):
            parameter.grad = gradient
    torch.nn.utils.clip_grad_norm_(casm.decoder.parameters(), 1e-3)
    sgd.step()
    adam.step()
    for name, value in casm.state_dict().items():
        torch.testing.assert_close(
            trainer.casm.state_dict()[name], value, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_an_epoch_shows_a_share_of_train() -> None:
    assert [epoch_length(100, share) for share in (0.2, 1.0, 0.001)] == [20, 100, 1]


def test_resume_is_exact_in_the_middle_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [
        "--reproduce",
        "L100",
        "--smf",
        "2",
        "--num-past",
        "2",
        "--checkpoint-interval",
        "2",
        "--training-only",
    ]
    assert train(words(tmp_path / "whole", *settings)) == 0
    real = PastClassifiers.wants

    def interrupted(self: PastClassifiers, iteration: int) -> bool:
        if iteration == 5:
            raise KeyboardInterrupt
        return real(self, iteration)

    monkeypatch.setattr(PastClassifiers, "wants", interrupted)
    assert train(words(tmp_path / "parts", *settings)) == 130
    monkeypatch.setattr(PastClassifiers, "wants", real)
    assert read_safely(tmp_path / "parts" / "L100" / "checkpoint.pth.tar")["iteration"] == 4
    assert train(words(tmp_path / "parts", *settings, "--resume", "auto")) == 0
    assert_same(
        *(read_safely(tmp_path / part / "L100" / "checkpoint.pth.tar") for part in ("whole", "parts"))
    )


@pytest.mark.parametrize("amp", [("--amp",), ("--amp", "--static-loss-scale", "128")])
def test_mixed_precision_trains(tmp_path: Path, amp: tuple[str, ...]) -> None:
    assert train(words(tmp_path, "--adversarial", "--training-only", "--tensorboard", *amp)) == 0
    payload = read_safely(tmp_path / "L-adversarial" / "checkpoint.pth.tar")
    assert all(tensor.isfinite().all() for tensor in tensors(payload["casm"]).values())
    assert list((tmp_path / "L-adversarial" / "tensorboard").iterdir())


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("preset", [("L100", "--smf", "2"), ("F",)])
def test_two_ranks_train_one_casm(
    tmp_path: Path, cache: Path, classifier: str, preset: tuple[str, ...]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    more = [
        "--reproduce",
        *preset,
        "--pretrained-weights",
        classifier,
        "--epochs",
        "1",
        "--pot",
        "1",
        "-b",
        "4",
    ]
    command = [sys.executable, "-m", "explainers", "train-casm", *words(tmp_path, *more)]
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = os.environ | place | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    assert [process.wait(240) for process in processes] == [0, 0]
    payload = read_safely(tmp_path / preset[0] / "checkpoint.pth.tar")
    assert payload["world_size"] == 2
    assert payload["iteration"] == 6
    start = read_safely(classifier)["state_dict"]["fc.weight"]
    assert torch.equal(payload["state_dict"]["fc.weight"], start) == (preset[0] == "F")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reproduce", "F"], "give it with --pretrained-weights"),
        (["--reproduce", "F", "--resume", "auto"], "give it with --pretrained-weights"),
        (["--compile"], "leave --compile out"),
        (["--reproduce", "L10"], "did you mean L100"),
        (["--mixup", "0.2"], "unrecognized argument '--mixup'"),
        (["--calibration-size", "5"], "unrecognized argument"),
        (["--name", "a/b"], "--name 'a/b' is a path"),
        (["--casms-path", "/proc/casms"], "--casms-path /proc/casms/L: cannot be written"),
        (["--resume", "nowhere.pth"], "--resume nowhere.pth: no such file"),
        (["shapes-multi:train=24,val=20"], "several labels"),
        (["-b", "64"], "--batch-size"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*words(tmp_path), *more]
    if more[0].startswith("shapes"):
        given = [*more, *words(tmp_path)[1:]]
    try:
        status = explainers_main(["train-casm", *given])
    except SystemExit as stopped:
        status = int(str(stopped.code))
    assert status in (1, 2)
    assert message in capsys.readouterr().err


def test_resume_refuses_what_is_another_run(
    tmp_path: Path, classifier: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(words(tmp_path, "--training-only", "--epochs", "1")) == 0
    path = str(tmp_path / "L" / "checkpoint.pth.tar")
    for more, message in (
        (["--lambda-r", "2"], "lambda_r was 14.0, is 2.0"),
        (["--decoder-width", "5"], "decoder has another shape"),
        (["--pot", "1"], "give the same data, --batch-size and --pot"),
    ):
        assert train(words(tmp_path, "--resume", path, *more)) == 2
        assert message in capsys.readouterr().err
    job, trainer = trainer_of(tmp_path, "--resume", path, "--epochs", "1", "--weight-decay", "0.25")
    job.close()
    decays = [group["weight_decay"] for group in trainer.decoder_optimizer.param_groups]
    assert decays == [group["weight_decay"] for group in trainer.state.optimizer.param_groups] == [0.25]
    assert trainer.decoder_optimizer.state_dict()["state"]
