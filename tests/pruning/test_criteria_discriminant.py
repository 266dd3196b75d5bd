"""Discriminant scores against the definition, differentiated in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from pruning.criteria import Discriminant, discriminant_scores
from pruning.criteria.discriminant import scores_of_layers, summarise_layer, target_products

RIDGE = 0.1


def definition(features: Tensor, labels: Tensor, ridge: float = RIDGE) -> Tensor:
    """|∂R/∂m_c| of R(m) = tr(Ȳᵀ K(m)⁻¹ Ȳ) at m = 1 by autograd in float64; features (N, C, …), labels (N, L)."""
    maps = features.double().reshape(features.shape[0], features.shape[1], -1)
    centred = labels.double() - labels.double().mean(0)
    mask = torch.ones(maps.shape[1], dtype=torch.float64, requires_grad=True)
    rows = ((maps - maps.mean(0)) * mask[None, :, None]).flatten(1)
    kernel = rows @ rows.T + ridge * torch.eye(len(rows), dtype=torch.float64)
    residual = torch.trace(centred.T @ torch.linalg.inv(kernel) @ centred)
    return torch.autograd.grad(residual, mask)[0].abs()


def relative_error(scores: Tensor, reference: Tensor) -> float:
    return ((scores - reference).abs() / reference).max().item()


def indices(num_samples: int, num_classes: int = 10, seed: int = 0) -> Tensor:
    return torch.randint(0, num_classes, (num_samples,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 4), (7, 5, 3, 3), (32, 16, 9, 9), (64, 8, 14, 14), (40, 6), (33, 4, 11)]
)
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-9)])
def test_random_feature_maps(shape: tuple[int, ...], precision: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(len(shape))
    features, targets = torch.randn(shape), torch.arange(shape[0]) % 5
    reference = definition(features, F.one_hot(targets, 5))
    assert relative_error(discriminant_scores(features, targets, precision=precision), reference) < tolerance


@pytest.mark.parametrize("num_samples", [32, 64])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_large_means_after_relu(num_samples: int, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    features = torch.randn(num_samples, 32, 28, 28).relu() * 20 + 50 * torch.rand(1, 32, 1, 1)
    targets = indices(num_samples)
    rows = (features - features.mean(0)).flatten(1).double()
    assert torch.linalg.cond(rows @ rows.T + RIDGE * torch.eye(num_samples)) > 1e7
    reference = definition(features, F.one_hot(targets))
    assert relative_error(discriminant_scores(features, targets, precision=precision), reference) < 1e-5


def test_near_duplicates_in_float64() -> None:
    torch.manual_seed(0)
    half = torch.randn(16, 16, 14, 14) * 10
    features = torch.cat([half, half + 1e-3 * torch.randn_like(half)])
    targets = indices(32)
    rows = (features - features.mean(0)).flatten(1).double()
    kernel = rows @ rows.T + RIDGE * torch.eye(32)
    assert (
        torch.linalg.eigvalsh(kernel)[-1] / torch.linalg.eigvalsh(kernel)[1] > 1e6
    )  # ill within the centred space
    assert (
        relative_error(discriminant_scores(features, targets), definition(features, F.one_hot(targets)))
        < 1e-5
    )


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_feature_maps_of_networks(arch: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(arch, weights=None)
    images = sum(
        F.interpolate(torch.randn(32, 3, s, s) * 8 / s, size=64, mode="bilinear") for s in (4, 8, 16, 32)
    )
    with torch.no_grad():
        model(images)  # a step of batch-norm statistics
    model.eval()
    targets = indices(32, 1000)
    labels = F.one_hot(targets, 1000)[:, targets.unique()]
    errors = {}

    def compare(name: str, output: Tensor) -> None:
        with torch.enable_grad():
            reference = definition(output.detach(), labels)
        errors[name] = relative_error(discriminant_scores(output, targets), reference)

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: compare(name, output))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.ReLU)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    assert len(errors) > 20
    assert max(errors.values()) < 1e-5


def test_layouts_strides_and_types_agree() -> None:
    torch.manual_seed(0)
    features, targets = torch.randn(9, 6, 5, 5) + 3, indices(9, 3)
    scores = discriminant_scores(features, targets)
    assert torch.allclose(
        discriminant_scores(features.to(memory_format=torch.channels_last), targets), scores
    )
    tokens = features.flatten(2).mT
    assert torch.allclose(discriminant_scores(tokens, targets, layout="channels_last"), scores)
    half = features.bfloat16()
    reference = definition(half.float(), F.one_hot(targets))
    assert relative_error(discriminant_scores(half, targets), reference) < 1e-9


@pytest.mark.parametrize("kind", ["soft", "multi-hot"])
def test_target_vectors(kind: str) -> None:
    torch.manual_seed(0)
    features = torch.randn(12, 5, 4, 4)
    labels = torch.rand(12, 30).softmax(1) if kind == "soft" else (torch.rand(12, 30) > 0.7).float()
    assert relative_error(discriminant_scores(features, labels), definition(features, labels)) < 1e-6


def test_one_hot_vectors_equal_indices() -> None:
    features, targets = torch.randn(8, 4, 3, 3), torch.tensor([0, 1, 1, 2, 7, 7, 7, 0])
    vectors = discriminant_scores(features, F.one_hot(targets, 1000).float())
    assert torch.allclose(discriminant_scores(features, targets), vectors)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    features, targets = torch.randn(8, 37, 6, 6), indices(8)
    whole = discriminant_scores(features, targets)
    monkeypatch.setattr("pruning.criteria.discriminant.CPU_BLOCK_BYTES", 8 * 8 * 36 * 5)
    assert torch.allclose(discriminant_scores(features, targets), whole)


def test_constant_channels_and_single_images_score_nothing() -> None:
    features = torch.randn(6, 3, 4, 4)
    features[:, 1] = 1234.5
    scores = discriminant_scores(features, indices(6, 2))
    assert scores[1] == 0
    assert (scores[[0, 2]] > 0).all()
    assert discriminant_scores(features[:1], torch.tensor([3])).tolist() == [0, 0, 0]


def test_layers_of_one_batch_are_solved_together() -> None:
    torch.manual_seed(0)
    targets = indices(10, 4)
    maps = [torch.randn(10, 3, 6, 6), torch.randn(10, 8), torch.randn(10, 5, 2, 2)]
    together, _ = scores_of_layers([summarise_layer(m) for m in maps], target_products(targets, 10), RIDGE)
    for scores, features in zip(together, maps, strict=True):
        assert torch.allclose(scores, discriminant_scores(features, targets), rtol=1e-5)


def test_condition_triggers_the_second_pass() -> None:
    torch.manual_seed(0)
    good, targets = torch.randn(16, 8, 7, 7), indices(16, 4)
    half = torch.randn(8, 8, 7, 7)
    bad = torch.cat([half, half + 1e-4])
    criterion = Discriminant(precision="float32")
    criterion.score(good, targets)
    assert not criterion.must_repeat()
    assert criterion.warnings() == []
    criterion.score(bad, targets)
    assert not criterion.must_repeat()  # float32 was asked for by name
    assert "precision=" in criterion.warnings()[0]
    assert criterion.warnings() == []


def test_auto_precision_repeats_where_float64_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pruning.criteria.discriminant.has_fast_float64", lambda device: False)
    torch.manual_seed(0)
    half, targets = torch.randn(8, 8, 7, 7), indices(16, 4)
    bad = torch.cat([half, half + 1e-3 * torch.randn_like(half)])
    criterion = Discriminant()
    criterion.score(bad, targets)
    assert criterion.must_repeat()
    second = criterion.score(bad, targets)
    assert relative_error(second, definition(bad, F.one_hot(targets))) < 1e-6
    assert not criterion.must_repeat()
    assert criterion.summarise(bad, targets).left.dtype == torch.float32


def test_refusals_name_argument_and_value() -> None:
    features, targets = torch.randn(4, 2, 3, 3), torch.arange(4)
    with pytest.raises(ValueError, match="ridge=0"):
        discriminant_scores(features, targets, ridge=0)
    with pytest.raises(ValueError, match="layout='nchw'"):
        discriminant_scores(features, targets, layout="nchw")
    with pytest.raises(ValueError, match="4 images"):
        discriminant_scores(features, targets[:3])
    with pytest.raises(ValueError, match="precision='half'"):
        Discriminant(precision="half")
    with pytest.raises(ValueError, match="features='middle'"):
        Discriminant(features="middle")
