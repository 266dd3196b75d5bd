"""Every recipe in configs/ says what it is, and its command is understood word by word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.commands import ROOT
from support.miniatures import Miniatures, NamesOnly
from support.recipes import FIELDS, explainer_recipes, header, main_recipes, settings
from support.small_commands import small

from image_classification.models import arch_info

RECIPES = [*main_recipes(), *explainer_recipes()]
#: Published experiments: architecture, data, and the stages or forms that have a recipe.
EXPERIMENTS = {
    **{f"imagenet_{net}": ("pretrain", "prune", "finetune") for net in ("resnet34", "resnet101")},
    "imagenet_mobilenetv2": ("pretrain", "prune", "finetune", "isp"),
    "imagenet_resnet50": ("pretrain", "prune", "finetune", "isp"),
    "cifar10_resnet56": ("pretrain", "prune", "finetune", "isp_pretrain", "isp"),
    "cifar10_mobilenetv2": ("pretrain", "prune", "finetune", "isp_pretrain", "isp"),
    "voc_vgg16": ("teacher", "distill_x2", "distill_x4", "distill_x8", "structured", "unstructured"),
    "voc_vgg16_distill": ("cosine",),
    "voc_vgg16_structured": ("cosine",),
    "voc_vgg16_unstructured": ("cosine",),
    "explainers/imagenet_resnet50": ("predictor", "selector"),
    "explainers/cifar10_resnet56": ("predictor", "selector"),
    "explainers/imagenet_casm": ("f", "l", "fl", "l100", "l1000"),
}


@pytest.fixture(scope="module")
def miniatures(tmp_path_factory: pytest.TempPathFactory) -> Miniatures:
    return NamesOnly(tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header(path: Path) -> None:
    """What it is; paper; command; expected figures, and where they come from or that there are none."""
    fields = header(path)
    assert tuple(fields)[1 : 1 + len(FIELDS)] == FIELDS
    assert set(fields) <= {"Title", *FIELDS, "Note"}
    assert len(fields["Title"]) > 20
    assert re.search(r"\b(19|20)\d\d\b", fields["Paper"]) or fields["Paper"].startswith("none: the data")
    assert f"--config {path.relative_to(ROOT)}" in fields["Command"]
    expected, source = fields["Expected"], fields["Source"]
    assert re.search(r"\brun by us\b", source), "says whether anybody has run it"
    assert expected.startswith("no figure is known") == source.startswith("none"), (expected, source)
    assert expected.startswith("no figure is known") or re.search(r"\d\d\.\d %", expected)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_figures_of_our_own_are_recorded(path: Path) -> None:
    """A header that quotes the results quotes what stands there."""
    fields = header(path)
    place = re.match(r"(benchmarks/results/[\w./]+\.md), ([\w -]+); run by us", fields["Source"])
    assert ("not run by us" in fields["Source"]) == (place is None)
    if place is None:
        return
    text = (ROOT / place[1]).read_text(encoding="utf-8")
    sections = {part.splitlines()[0].split(" – ")[0]: part for part in text.split("\n## ")}
    for figure in re.findall(r"\d\d\.\d(?= %| and)", fields["Expected"]):
        assert figure in sections[place[2]], f"{figure} % is not in {place[1]}, {place[2]}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_command_is_understood(path: Path, miniatures: Miniatures, tmp_path: Path) -> None:
    """By the parser of the job that would run it, recipe and all."""
    configs = small(header(path)["Command"], miniatures, tmp_path).parse()
    assert configs.model.arch == settings(path)["arch"]
    assert arch_info(configs.model.arch).image_size >= 32


def test_every_published_experiment_has_one() -> None:
    names = {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in RECIPES}
    wanted = {f"{name}_{part}" for name, parts in EXPERIMENTS.items() for part in parts}
    assert wanted <= names
    assert len(names - wanted) >= 6
