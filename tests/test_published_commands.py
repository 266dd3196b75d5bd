"""The commands of the iterative discriminant pruning repository (Kung & Hou 2020), as its README prints them.

Pretraining, iterative pruning, fine-tuning, evaluation: parsed word by word, then run one after the other on a small
ImageNet-like folder with two processes. Only sizes are changed (`support.commands.SHORT`) and the paths of files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.commands import run, shortened
from support.miniatures import write_imagenet

from image_classification.cli import parse_config
from image_classification.models import read_safely
from main import MainConfig

COMMON = """python ./multiproc.py --nproc_per_node 8 ./main.py /data/imagenet \
  --data-backend dali-cpu \
  --raport-file raport.json \
  -j8 -p 100 \
"""

PRETRAIN = (
    COMMON
    + """--lr 1.024 \
  --optimizer-batch-size 1024 \
  --warmup 5 \
  --arch resnet50 \
  -c fanin \
  --label-smoothing 0.1 \
  --lr-schedule cosine \
  --mom 0.875 \
  --wd 3.0517578125e-05 \
  -b 128 \
  --amp --static-loss-scale 128 \
  --epochs 120 \
  --mixup 0.2"""
)

PRUNE = (
    COMMON
    + """--lr 0.01024 \
  --optimizer-batch-size 1024 \
  --warmup 0 \
  --arch resnet50 \
  -c fanin \
  --label-smoothing 0.1 \
  --lr-schedule constant \
  --mom 0.875 \
  --wd 3.0517578125e-05 \
  -b 128 \
  --amp --static-loss-scale 128 \
  --epochs 50 \
  --mixup 0.2 \
  --pretrained-weights ./logs/pretrained.pth.tar \
  --gather-checkpoints \
  --iterative_pruning \
  --pruning_step 50 \
  --pruning_delta 5e-3"""
)

FINETUNE = (
    COMMON
    + """--lr 0.1024 \
  --optimizer-batch-size 1024 \
  --warmup 5 \
  --arch resnet50 \
  -c fanin \
  --label-smoothing 0.1 \
  --lr-schedule cosine \
  --mom 0.875 \
  --wd 3.0517578125e-05 \
  -b 128 \
  --amp --static-loss-scale 128 \
  --epochs 120 \
  --mixup 0.2 \
  --pretrained-weights ./zj_checkpoints/checkpoint-27.pth.tar"""
)

EVALUATE = """CUDA_VISIBLE_DEVICES=0 python ./main.py /data/imagenet \
    --data-backend dali-cpu \
    --arch resnet50 \
    --evaluate \
    --epochs 1 \
    --pretrained-weights resnet50_3GFLOPS.pth.tar \
    -b 100"""


@pytest.mark.parametrize("command", [PRETRAIN, PRUNE, FINETUNE, EVALUATE])
def test_every_word_is_understood(command: str) -> None:
    words = command.split()
    configs = parse_config(MainConfig, words[words.index("./main.py") + 1 :])
    assert configs.data.data == "/data/imagenet"
    assert configs.model.arch == "resnet50"
    if command is EVALUATE:
        assert configs.train.evaluate
        return
    assert configs.data.workers == 8
    assert configs.log.print_freq == 100
    assert configs.train.optimizer_batch_size == 1024
    assert configs.precision.static_loss_scale == 128
    assert configs.data.mixup == 0.2
    assert configs.checkpoint.gather_checkpoints == (-1 if command is PRUNE else 0)
    assert configs.pruning.iterative_pruning == (command is PRUNE)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes in `train/` and `val/`, JPEGs of varied size."""
    return write_imagenet(tmp_path_factory.mktemp("imagenet"), num_train=24)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_three_stages_and_the_evaluation_run(imagenet: Path, tmp_path: Path) -> None:
    stages = {name: tmp_path / name for name in ("pretrain", "prune", "finetune", "evaluate")}
    # The interval of 50 iterations is longer than the shortened run: the last flag wins.
    prune = PRUNE + " --pruning_step 1 --calibration-batches 1 --pruning_delta 0.25"
    files = {
        "/data/imagenet": str(imagenet),
        "./logs/pretrained.pth.tar": str(stages["pretrain"] / "checkpoint.pth.tar"),
        "./zj_checkpoints/checkpoint-27.pth.tar": str(stages["prune"] / "checkpoint-0.pth.tar"),
        "resnet50_3GFLOPS.pth.tar": str(stages["finetune"] / "checkpoint.pth.tar"),
    }
    for name, command in zip(stages, (PRETRAIN, prune, FINETUNE, EVALUATE), strict=True):
        result = run(shortened(command, files, stages[name]), cache=tmp_path / "cache", timeout=600)
        assert result.returncode == 0, f"{name}:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    pruned = read_safely(stages["prune"] / "checkpoint-0.pth.tar")
    tuned = read_safely(stages["finetune"] / "checkpoint.pth.tar")
    assert pruned["callbacks"]["pruning"]["completed"] == 2
    widths = {name: tuple(tensor.shape) for name, tensor in tuned["state_dict"].items()}
    assert widths == {name: tuple(tensor.shape) for name, tensor in pruned["state_dict"].items()}
    assert sum(tensor.numel() for tensor in tuned["state_dict"].values()) < 23_000_000
