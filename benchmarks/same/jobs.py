"""The jobs that `benchmarks/same_training.py` runs with the code of both commits: a table of plain data.

All are small: a ResNet-20 on 32 pixels of the embedded shapes, some twenty iterations. A job runs in its own folder and
refers to files by relative paths, so that no path of the machine gets into its output.
"""

from __future__ import annotations

import dataclasses

READING = "--data-backend pytorch --device cpu -b 16 --image-size 32"
DATA = "shapes:train=192,val=48,seed=5"
ONE_PROCESS = f"{DATA} {READING} -j 0 --print-freq 1 --seed 1"
MAIN = f"$tree/main.py {ONE_PROCESS} --workspace ."
EXPLAINERS = "python -m explainers"
EXPLAINED = f"{DATA} {READING} -j 0"
HELD_OUT = "--calibration-size 24 --evaluation-interval 6"
FROM_PLAIN = "--arch resnet20 --pretrained-weights ../plain/checkpoint.pth.tar"
SELECTOR = "--selector ../selector/model_best.pth.tar"
PLAIN = (
    "--arch resnet20 --epochs 2 --lr 0.05 --warmup 1 --use-ema 0.9 --mixup 0.2 --label-smoothing 0.1 "
    "--gather-checkpoints"
)
PRUNED = (
    "--arch resnet20 --epochs 2 --lr 0.05 --lr-schedule constant --use-ema 0.9 --iterative-pruning --pruning-step 3 "
    "--pruning-delta 0.1 --pruning-warmup 2 --budget macs=0.6 --budget params=0.8 --calibration-batches 3"
)
SALIENCY = (
    f"{FROM_PLAIN} --epochs 1 --lr 0.02 --iterative-pruning --pruning-step 3 --pruning-delta 0.1 --budget macs=0.7 "
    f"--pruning-search global --calibration-batches 2 {SELECTOR}"
)
LEARNED = (
    f"{FROM_PLAIN} --epochs 1 --lr 0.02 --pruning-method learned {SELECTOR} --gate-epochs 4 --gate-lr 0.3 "
    "--gate-groups all --calibration-size 96 --budget macs=0.6"
)
UNSTRUCTURED = "--arch resnet20 --epochs 2 --lr 0.02 --use-ema 0.9 --unstructured-pruning 0.2 --rounds 2"
TRAIN_SELECTOR = (
    f"{EXPLAINERS} train-selector {ONE_PROCESS} --workspace . {FROM_PLAIN} {HELD_OUT} --epochs 2 --lr 1e-3 "
    "--predictor ../predictor/model_best.pth.tar --decoder light"
)
TRAIN_CASM = (
    f"{EXPLAINERS} train-casm {ONE_PROCESS} {FROM_PLAIN} --casms-path . --reproduce L100 --smf 2 --pot 0.5 --epochs 2 "
    "--decoder-width 8"
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A job as data.

    Attributes:
        name: Name of the job and its folder.
        steps: What runs in the folder, one after the other. `python WORDS` is a process of this interpreter;
            `stop COUNT WORDS` is one that is sent SIGUSR1 when its report has COUNT lines of figures, and must end with
                code 75; `copy FROM` copies a folder's content. $tree is the commit's root, $here is benchmarks/same/.
        needs: Names of earlier jobs whose files the steps read.
        same_as: Name of a job that must end with the same files.
        compared: False if the files depend on the moment of a signal.
    """

    name: str
    steps: tuple[str, ...]
    needs: tuple[str, ...] = ()
    same_as: str | None = None
    compared: bool = True


#: Add a job by adding a row. Both commits get the same words: if a flag was renamed, use the old spelling as long as
#: both accept it, or leave the flag out.
JOBS = (
    Job("plain", (f"python {MAIN} {PLAIN}",)),
    Job("pruned", (f"python {MAIN} {PRUNED}",)),
    Job("stopped", (f"stop 3 {MAIN} {PRUNED} --checkpoint-interval 2",), compared=False),
    Job("resumed", ("copy ../stopped", f"python {MAIN} {PRUNED} --resume auto"), ("stopped",), "pruned"),
    Job(
        "two-ranks",
        (
            f"python $tree/multiproc.py --nproc_per_node 2 $tree/main.py {DATA} {READING} -j 1 --print-freq 1 --seed 1 "
            "--workspace . --arch resnet20 --epochs 1 --optimizer-batch-size 32 --use-ema 0.9 --iterative-pruning "
            "--pruning-step 2 --pruning-delta 0.1 --budget macs=0.8 --calibration-batches 2",
        ),
    ),
    Job(
        "one-shot",
        (
            f"python {MAIN} --arch mobilenet_v2 --amp --memory-format nhwc --optimizer rmsprop --epochs 1 --lr 0.001 "
            "--one-shot-pruning 0.3 --pruning-criterion taylor --calibration-batches 2 --round-to 8",
        ),
    ),
    Job("unstructured", (f"python {MAIN} {UNSTRUCTURED}",)),
    Job("unstructured-stopped", (f"python {MAIN} {UNSTRUCTURED} --run-epochs 1",)),
    Job(
        "unstructured-resumed",
        ("copy ../unstructured-stopped", f"python {MAIN} {UNSTRUCTURED} --resume auto"),
        ("unstructured-stopped",),
        "unstructured",
    ),
    Job(
        "predictor",
        (
            f"{EXPLAINERS} train-predictor {ONE_PROCESS} --workspace . {FROM_PLAIN} {HELD_OUT} --epochs 1 --lr 1e-3",
        ),
        ("plain",),
    ),
    Job("selector", (TRAIN_SELECTOR,), ("plain", "predictor")),
    Job("selector-stopped", (f"{TRAIN_SELECTOR} --run-epochs 1",), ("plain", "predictor")),
    Job(
        "selector-resumed",
        ("copy ../selector-stopped", f"{TRAIN_SELECTOR} --resume auto"),
        ("plain", "predictor", "selector-stopped"),
        "selector",
    ),
    Job("casm", (TRAIN_CASM,), ("plain",)),
    Job("casm-stopped", (f"{TRAIN_CASM} --run-epochs 1",), ("plain",)),
    Job(
        "casm-resumed",
        ("copy ../casm-stopped", f"{TRAIN_CASM} --resume auto"),
        ("plain", "casm-stopped"),
        "casm",
    ),
    Job("saliency", (f"python {MAIN} {SALIENCY} --pruning-criterion saliency",), ("plain", "selector")),
    Job(
        "discriminant+saliency",
        (f"python {MAIN} {SALIENCY} --pruning-criterion discriminant+saliency",),
        ("plain", "selector"),
    ),
    Job("learned", (f"python {MAIN} {LEARNED}",), ("plain", "selector")),
    Job(
        "learned-stopped",
        (f"stop 1 {MAIN} {LEARNED} --checkpoint-interval 2",),
        ("plain", "selector"),
        compared=False,
    ),
    Job(
        "learned-resumed",
        ("copy ../learned-stopped", f"python {MAIN} {LEARNED} --resume auto"),
        ("plain", "selector", "learned-stopped"),
        "learned",
    ),
    Job(
        "distilled",
        (
            f"python {MAIN} --arch resnet20 --epochs 1 --lr 0.02 --teacher ../plain/checkpoint.pth.tar --match swa "
            "--distill logit --stochastic --drop-percent 0.3",
        ),
        ("plain",),
    ),
    Job("own-loop", ("python $here/own_loop.py train",)),
    Job(
        "evaluated",
        (f"python {MAIN} --arch resnet20 --evaluate --pretrained-weights ../pruned/checkpoint.pth.tar",),
        ("pruned",),
    ),
    Job(
        "loaded",
        (
            "python $here/own_loop.py load ../plain/checkpoint.pth.tar ../pruned/checkpoint.pth.tar "
            "../pruned/model_best.pth.tar",
        ),
        ("plain", "pruned"),
    ),
    Job(
        "groups",
        (
            "python -m pruning groups mobilenet_v2 --round-to 8 --json mobilenet.json",
            "python -m pruning groups resnet20 --checkpoint ../pruned/checkpoint.pth.tar --json resnet.json",
        ),
        ("pruned",),
    ),
    Job(
        "score",
        (
            f"python -m pruning score ../pruned/checkpoint.pth.tar {DATA} --data-backend pytorch -b 16 --image-size 32 "
            "--criterion discriminant taylor fisher magnitude bn-scale --calibration-batches 2 --output .",
        ),
        ("pruned",),
    ),
    Job(
        "shrink",
        (
            "python $here/own_loop.py mask ../plain/checkpoint.pth.tar masked.pth.tar",
            "python -m pruning shrink masked.pth.tar shrunk.pth.tar --no-latency --json shrunk.json",
        ),
        ("plain",),
    ),
    Job(
        "export",
        ("python -m pruning export ../pruned/checkpoint.pth.tar --format state-dict --ema -o state.pth",),
        ("pruned",),
    ),
    Job(
        "compare-costs",
        (
            "python -m pruning compare ../plain/checkpoint.pth.tar ../pruned/checkpoint.pth.tar "
            f"--data {DATA} --image-size 32 --json costs.json",
        ),
        ("plain", "pruned"),
    ),
    Job(
        "attribute",
        (
            f"{EXPLAINERS} attribute {EXPLAINED} --checkpoint ../pruned/checkpoint.pth.tar --method gradcam "
            "--method lrp --method ebp --method rap --method ig --ig-steps 4 -n 8 --output maps",
        ),
        ("pruned",),
    ),
    Job(
        "localize",
        (
            f"{EXPLAINERS} localize {EXPLAINED} --checkpoint ../plain/checkpoint.pth.tar --method gradcam --method lrp "
            f"--method selector {SELECTOR} --metric point --metric auc --metric boxes --json figures.json",
        ),
        ("plain", "selector"),
    ),
    Job(
        "compare-maps",
        (
            f"{EXPLAINERS} compare ../plain/checkpoint.pth.tar ../pruned/checkpoint.pth.tar {EXPLAINED} "
            "--json moved.json",
        ),
        ("plain", "pruned"),
    ),
    Job(
        "evaluate-selector",
        (f"{EXPLAINERS} evaluate-selector {EXPLAINED} {SELECTOR} --json figures.json",),
        ("selector",),
    ),
    Job(
        "score-casm",
        (f"{EXPLAINERS} score-casm {EXPLAINED} --casms-path ../casm/L100 --json figures.json",),
        ("casm",),
    ),
)
