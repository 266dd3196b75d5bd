"""Translation of flags of NVIDIA's DeepLearningExamples (both generations of its ConvNets) and apex's ImageNet script.

Commands written for these programs run here: renamed flags are translated, flags without effect are dropped, and
unsupported ones are refused with the flag to use instead. This does not apply to recipes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence

from image_classification.config import ConfigError

#: Maps a flag's value ("" if it takes none) to LucidPrune's words.
Translation = Callable[[str], list[str]]


def _named(*words: str) -> Translation:
    """Return a translation to these words followed by the value."""
    return lambda value: [*words, *([value] if value else [])]


def _refused(old: str, instead: str) -> Translation:
    def refuse(value: str) -> list[str]:
        raise ConfigError(f"{old}{f' {value}' if value else ''}: {instead}")

    return refuse


def _opt_level(value: str) -> list[str]:
    if value not in ("O0", "O1"):
        raise ConfigError(
            f"--opt-level {value}: mixed precision is PyTorch's own now, which keeps weights in float32: use --amp"
        )
    return ["--amp"] if value == "O1" else []


def _local_rank(value: str) -> list[str]:
    os.environ.setdefault("LOCAL_RANK", value)  # older launchers passed it only by this flag
    return []


def _interpolation(value: str) -> list[str]:
    if value not in ("bilinear", "triangular"):
        raise ConfigError(
            f"--interpolation {value}: images are resized with the antialiased triangle filter (bilinear), the same on "
            "all backends: leave it out"
        )
    return []


def _augmentation(value: str) -> list[str]:
    """Translate a policy: theirs is applied on top of crop and flip, which LucidPrune's flag names instead."""
    return ["--auto-augment", value] if value == "autoaugment" else ["--augmentation", value]


def _loss_scale(value: str) -> list[str]:
    return ["--dynamic-loss-scale"] if value == "dynamic" else ["--static-loss-scale", value]


def _gpu_affinity(value: str) -> list[str]:
    ours = value if value in ("none", "socket", "socket-unique") else None
    if value.startswith("socket_unique"):
        ours = "socket-unique"
    if ours is None:
        raise ConfigError(
            f"--gpu-affinity {value}: one core is too few for a process that feeds a GPU: use socket or socket-unique"
        )
    return ["--gpu-affinity", ours]


def _jit(value: str) -> list[str]:
    if value != "no":
        raise ConfigError(f"--jit {value}: networks are compiled by torch.compile now: use --compile")
    return []


def _conv_init(value: str) -> list[str]:
    names = {"fan_in": "fanin", "fan_out": "classic"}
    if value not in names:
        raise ConfigError(f"--conv-init {value}: use --model-config fanin or classic")
    return ["--model-config", names[value]]


def _survival_prob(value: str) -> list[str]:
    """DeepLearningExamples gives the share of blocks kept, torchvision the share dropped."""
    try:
        dropped = 1 - float(value)
    except ValueError:
        raise ConfigError(f"--survival-prob {value}: give a number") from None
    return ["--arch-option", f"stochastic_depth_prob={dropped:.12g}"]


def _start_epoch(value: str) -> list[str]:
    if value != "0":
        raise ConfigError(f"--start-epoch {value}: a checkpoint says where it was: use --resume FILE")
    return []


def _only_false(old: str, instead: str) -> Translation:
    """Translate a boolean flag of which only False is supported."""
    return lambda value: [] if value.lower() == "false" else _refused(old, instead)(value)


#: Flags that take a value.
_WITH_VALUE: dict[str, Translation] = {
    "--opt-level": _opt_level,
    "--local-rank": _local_rank,
    "--interpolation": _interpolation,
    "--loss-scale": _loss_scale,
    "--gpu-affinity": _gpu_affinity,
    "--tensorboard-dir": _named("--tensorboard"),
    "--pretrained-from-file": _named("--pretrained-weights"),
    "--augmentation": _augmentation,
    "--keep-batchnorm-fp32": lambda value: [],  # autocast does
    "--fused-se": lambda value: [],
    "--jit": _jit,
    "--conv-init": _conv_init,
    "--dropout": lambda value: ["--arch-option", f"dropout={value}"],
    "--survival-prob": _survival_prob,
    "--start-epoch": _start_epoch,
    "--last-bn-0-init": _only_false("--last-bn-0-init", "use --model-config grp-fanin or grp-fanout"),
    "--quantized": _only_false("--quantized", "networks are trained in float32, or with --amp: leave it out"),
    "--topk": _refused("--topk", "top-1 and top-5 are always reported: leave it out"),
}
#: Flags without a value; some may be followed by True or False.
_ALONE: dict[str, Translation] = {
    "--fp16": _named("--amp"),
    "--sync-bn": _named("--sync-batchnorm"),
    "--dali-cpu": _named("--data-backend", "dali-cpu"),
    "--channels-last": lambda value: ["--memory-format", "nchw" if value.lower() == "false" else "nhwc"],
    "--pretrained": _refused(
        "--pretrained", "nothing is downloaded: give the file of the weights with --pretrained-weights"
    ),
    "--trt": _only_false(
        "--trt", "write the trained network with lucidprune export --format onnx, for TensorRT"
    ),
    "--deterministic": _refused(
        "--deterministic",
        "--seed fixes data, augmentation and starting weights; cuDNN's kernels are chosen by speed: leave it out",
    ),
}
#: Switches that DeepLearningExamples parses with `type=bool`, so that a word may follow.
_WORD_MAY_FOLLOW = ("--channels-last", "--trt")
_BOOLS = ("true", "false")
#: Defaults that differ: LucidPrune's flags, and the difference.
_DEFAULTS = (
    (("--lr-schedule",), "the learning rate falls by a cosine (theirs: step)"),
    (("--lr", "--learning-rate"), "the learning rate is 0.1 per 256 images of a step (theirs: 0.1)"),
    (
        ("--static-loss-scale", "--dynamic-loss-scale"),
        "the loss scale of fp16 is dynamic (theirs: constant, 1)",
    ),
)


def translated(words: Sequence[str], known: Collection[str]) -> tuple[list[str], list[str]]:
    """Return a command line in LucidPrune's words, and notes for its user.

    Args:
        words: The command line.
        known: Flags of the job; words of other jobs are left for the parser to refuse.

    Raises:
        ConfigError: A flag, or its value, has no equivalent; the message says what to use instead.
    """
    ours: list[str] = []
    changed: list[str] = []
    rest = list(words)
    while rest:
        if rest[0] == "--":
            break
        given, translation, value = _next(rest)
        del rest[: len(given)]
        made = given if translation is None else translation(value)
        if made and made[0] not in known:  # a flag of another job: the parser reports it
            made = given
        ours += made
        if made != given and not given[0].startswith("--local"):
            told = f"is read as {' '.join(made)}" if made else "has no effect here"
            changed.append(f"{' '.join(given)} {told}")
    return [*ours, *rest], [*changed, *(_differing(ours, known) if changed else [])]


def _next(words: Sequence[str]) -> tuple[list[str], Translation | None, str]:
    """Return the words consumed by the first flag of a command line, its translation if any, and its value."""
    flag, equals, value = words[0].partition("=")
    name = f"--{flag[2:].replace('_', '-')}" if flag.startswith("--") else flag
    if name in _WORD_MAY_FOLLOW and equals and value.lower() in _BOOLS:
        return [words[0]], _ALONE[name], value
    if name in _WORD_MAY_FOLLOW and not equals and len(words) > 1 and words[1].lower() in _BOOLS:
        return list(words[:2]), _ALONE[name], words[1]
    if name in _ALONE and not equals:
        return [words[0]], _ALONE[name], ""
    if name in _WITH_VALUE and equals:
        return [words[0]], _WITH_VALUE[name], value
    if name in _WITH_VALUE and len(words) > 1:
        return list(words[:2]), _WITH_VALUE[name], words[1]
    return [words[0]], None, ""


def _differing(words: Sequence[str], known: Collection[str]) -> list[str]:
    """Return one line about defaults that the command leaves open and that differ from the original program's."""
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    open_ones = [text for flags, text in _DEFAULTS if flags[0] in known and not given.intersection(flags)]
    if not open_ones:
        return []
    return [f"defaults differ from those of DeepLearningExamples: {'; '.join(open_ones)}"]
