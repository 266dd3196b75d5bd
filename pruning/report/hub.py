"""Networks on the Hugging Face Hub: the file, a model card, and the report if there is one."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from image_classification.config import ConfigError, SettingError, check, check_setting
from image_classification.extras import need
from image_classification.file_writing import copy_file, write_text
from image_classification.models import class_names_of, identity_of, input_of
from image_classification.plain_data import Plain
from pruning.files.saved_network import save_pruned
from pruning.report.networks import Network, cost_rows, costs_of, unpruned
from pruning.report.verdict import HEADLINES, headline_of, verdict
from pruning.report.wording import change

NETWORK_FILE = "network.pth.tar"
_MOST_NAMES = 20  # number of classes listed on the card


def check_repository(name: str) -> None:
    """Refuse a name that is not a valid Hub repository name.

    Raises:
        SettingError: The name is invalid; the message says why.
    """
    need("huggingface_hub")
    utils: Any = importlib.import_module("huggingface_hub.utils")
    try:
        utils.validate_repo_id(name)
    except utils.HFValidationError as error:
        raise SettingError("repository", name, str(error).split(": ")[0]) from error
    check_setting(name.count("/") == 1, "repository", name, "write OWNER/NAME")


def prepare(
    folder: Path,
    model: nn.Module,
    repository: str,
    *,
    image_size: int,
    license: str | None = None,
    report: tuple[Plain, Path] | None = None,
) -> list[str]:
    """Write everything to upload: the network alone, without its training state, and its card.

    Args:
        folder: Folder for the files; created if needed.
        model: The network.
        repository: OWNER/NAME.
        image_size: Side of its images, in pixels.
        license: License of the weights, such as apache-2.0.
        report: Content and page of `python -m pruning report`, whose figures go onto the card.

    Returns:
        Names of the files.

    Raises:
        ConfigError: The network has no name by which others could build it.
    """
    check(
        identity_of(model) is not None,
        "the network is a class of your own, which nobody who downloads it can build: upload an export instead "
        "(`python -m pruning export`)",
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_pruned(folder / NETWORK_FILE, model)
    write_text(folder / "README.md", card(model, repository, image_size, license, report and report[0]))
    if report is None:
        return [NETWORK_FILE, "README.md"]
    copy_file(report[1], folder / "report.html")
    return [NETWORK_FILE, "README.md", "report.html"]


def upload(folder: Path, repository: str, *, private: bool = False) -> str:
    """Create the repository if it does not exist, and commit a folder's files to it.

    Args:
        folder: From `prepare`.
        repository: OWNER/NAME.
        private: Visibility of a newly created repository.

    Returns:
        The repository's address.

    Raises:
        ConfigError: The Hub refuses the upload or cannot be reached.
    """
    need("huggingface_hub")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi(library_name="lucidprune")
    try:
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Network and card")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"the Hub did not accept it ({reason}): `hf auth login` or HF_TOKEN says who you are; nothing is lost, "
            "the same command does it again"
        ) from error
    return address


def card(
    model: nn.Module, repository: str, image_size: int, license: str | None, report: Plain | None
) -> str:
    """Return the card in Markdown, with the Hub's metadata at its head.

    Args:
        model: The network.
        repository: OWNER/NAME.
        image_size: Side of its images, in pixels.
        license: License of the weights.
        report: Content of the run's report.
    """
    from huggingface_hub import ModelCardData

    identity = identity_of(model)
    assert identity is not None, "checked before"
    head = ModelCardData(
        license=license,
        library_name="lucidprune",
        pipeline_tag="image-classification",
        tags=["pruning", "structured-pruning", identity.arch.replace("/", "-")],
        model_name=repository.rpartition("/")[2],
        eval_results=None if report is None else _results(report),
    )
    parts = [
        f"---\n{head.to_yaml()}\n---",
        f"# {repository.rpartition('/')[2]}",
        f"`{identity.arch}` with fewer channels, pruned by LucidPrune.",
        *([] if report is None else _figures(report)),
        "## Costs",
        _table(_costs(model, image_size), ("", "unpruned", "this network", "change")),
        "## Use",
        _snippet(repository),
        _images(model, image_size),
    ]
    return "\n\n".join(parts) + "\n"


def _results(report: Plain) -> list[Any] | None:
    """Return the last accuracy in the Hub's format for results."""
    from huggingface_hub import EvalResult

    key = headline_of(report["accuracy"])
    rows = [row for row in report["accuracy"] if key in row]
    if not rows:
        return None
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder",
            dataset_name=Path(str(report["config"].get("data") or "unnamed")).name,
            metric_type="accuracy" if key == "top1" else key,
            metric_name=HEADLINES[key],
            metric_value=round(rows[-1][key], 2),
        )
    ]


def _figures(report: Plain) -> list[str]:
    words = verdict(report)
    lines = [f"- **{name}**: {text}" for name, text in words["lines"]]
    return ["## Figures", words["lead"], "\n".join(lines), "More in [the report](report.html)."]


def _costs(model: nn.Module, image_size: int) -> list[tuple[str, str, str, str]]:
    """Return rows of the cost table: the network beside its unpruned architecture."""
    now = Network("pruned", model, None)
    before, after = unpruned(now), costs_of(model, image_size)
    assert before is not None, "it has a name"
    whole = costs_of(before.model, image_size)
    return [
        (
            title,
            f"{whole[key] / divisor:,.2f} {unit}",
            f"{after[key] / divisor:,.2f} {unit}",
            change(after[key], whole[key]),
        )
        for key, (title, unit, divisor) in cost_rows().items()
    ]


def _snippet(repository: str) -> str:
    return (
        "```python\nfrom huggingface_hub import hf_hub_download\nfrom pruning import load_pruned\n\n"
        f'model = load_pruned(hf_hub_download("{repository}", "{NETWORK_FILE}")).eval()\n```'
    )


def _images(model: nn.Module, image_size: int) -> str:
    """Describe the network's inputs and outputs."""
    wanted = input_of(model)
    names = class_names_of(model)
    text = f"It takes (N, 3, {image_size}, {image_size}) float images"
    if wanted is not None:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (wanted.mean, wanted.std))
        text += f": RGB in [0, 1], less the mean ({mean}), divided by ({std})"
    if names is not None:
        more = "" if len(names) <= _MOST_NAMES else f", … ({len(names)} in all)"
        text += f". Its classes: {', '.join(names[:_MOST_NAMES])}{more}"
    return f"{text}."


def _table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
