"""Command lines that were written for DeepLearningExamples and apex."""

from __future__ import annotations

import os

import pytest

from image_classification.cli import parse_config
from pruning.training.main_job import MainConfig

#: As their README has it, of the first generation and of the second.
FIRST = "--arch resnet50 -b 256 --lr 2.048 --fp16 --static-loss-scale 128 --local_rank 0 /data --epochs 90".split()
SECOND = (
    "/data --arch resnet50 --model-config fanin --epochs 90 --amp --gpu-affinity socket_unique_interleaved "
    "--interpolation bilinear --augmentation autoaugment --bn-momentum 0.01 --bn-epsilon 1e-3 --rmsprop-eps 1e-2 "
    "--optimizer rmsprop --raport-file r.json --gather-checkpoints 2 --early-stopping-patience 5"
).split()


def test_commands_of_both_generations_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "environ", {name: os.environ[name] for name in os.environ if name != "LOCAL_RANK"}
    )
    first = parse_config(MainConfig, FIRST)
    assert (first.precision.amp, first.precision.static_loss_scale) == (True, 128)
    assert os.environ["LOCAL_RANK"] == "0"  # where this process's device is read
    told = capsys.readouterr().err
    assert "--fp16 is read as --amp" in told
    assert told.count("defaults differ") == 1
    assert "cosine" in told
    assert "0.1 per 256" not in told  # they give one
    assert "loss scale" not in told.split("defaults")[1]
    second = parse_config(MainConfig, SECOND)
    assert second.distributed.gpu_affinity == "socket-unique"
    assert second.data.auto_augment == "autoaugment"
    assert (second.model.bn_momentum, second.model.bn_eps, second.optim.optimizer_eps) == (0.01, 1e-3, 1e-2)
    assert second.train.early_stopping_patience == 5


@pytest.mark.parametrize(
    ("words", "section", "field", "value"),
    [
        ("--opt-level O1", "precision", "amp", True),
        ("--opt-level=O0", "precision", "amp", False),
        ("--amp --loss-scale dynamic", "precision", "dynamic_loss_scale", True),
        ("--amp --loss-scale=128", "precision", "static_loss_scale", 128.0),
        ("--dali_cpu", "data", "data_backend", "dali-cpu"),
        ("--augmentation autoaugment", "data", "auto_augment", "autoaugment"),
        ("--augmentation none", "data", "augmentation", "none"),  # a flag of ours
        ("--channels-last", "precision", "memory_format", "nhwc"),
        ("--channels-last True", "precision", "memory_format", "nhwc"),
        ("--channels-last=False --amp", "precision", "memory_format", "nchw"),
        ("--conv_init fan_in", "model", "model_config", "fanin"),
        ("--conv_init fan_out", "model", "model_config", "classic"),
        ("--last_bn_0_init False -c classic", "model", "model_config", "classic"),
        (
            "--dropout 0.2 --survival_prob 0.8",
            "model",
            "arch_option",
            ["dropout=0.2", "stochastic_depth_prob=0.2"],
        ),
        (
            "--jit no --start-epoch 0 --trt False --quantized False --fused_se True",
            "precision",
            "compile",
            False,
        ),
        ("--data-backend syntetic", "data", "data_backend", "syntetic"),  # as they spelt it
        ("--sync_bn", "train", "sync_batchnorm", True),
        ("--tensorboard-dir logs", "log", "tensorboard", "logs"),
        ("--pretrained-from-file main.py", "model", "pretrained_weights", "main.py"),
    ],
)
def test_each_flag_is_read_as_ours(words: str, section: str, field: str, value: object) -> None:
    assert getattr(getattr(parse_config(MainConfig, words.split()), section), field) == value


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        ("--opt-level O2", "--amp"),
        ("--pretrained", "--pretrained-weights"),
        ("--interpolation bicubic", "bilinear"),
        ("--gpu-affinity single_single", "socket"),
        ("--topk 5", "top-5"),
        ("--trt", "export"),
        ("--trt True", "export"),
        ("--jit script", "--compile"),
        ("--conv_init he", "--model-config"),
        ("--last_bn_0_init True", "--model-config grp-"),
        ("--survival_prob many", "a number"),
        ("--start-epoch 5", "--resume"),
        ("--deterministic", "--seed"),
        ("--quantized True", "--amp"),
    ],
)
def test_what_cannot_be_had_names_what_can(
    words: str, instead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(MainConfig, words.split())
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert words.split()[0].replace("_", "-") in told
    assert instead in told


def test_our_own_commands_are_told_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    parse_config(MainConfig, ["--amp", "--gpu-affinity", "none", "--lr", "0.1"])
    assert not capsys.readouterr().err
