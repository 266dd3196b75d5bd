"""Every contraction is the matrix product that it is said to be: Y = U · W, with W found again in the parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pruning.repair.contractions import Contraction, ContractionMode


class Functional(nn.Module):
    """Weights that are used outside layers."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
    "conv2d": (nn.Conv2d(6, 8, 3, stride=2, padding=1, dilation=2), (2, 6, 9, 11)),
    "conv3d": (nn.Conv3d(4, 6, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 4, 3, 5, 4)),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3, bias=False), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6, padding=1), (2, 6, 5, 5)),
    "reflect": (nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "same": (nn.Conv2d(4, 5, 4, padding="same"), (2, 4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), (2, 6, 5, 4)),
    "transposed grouped": (nn.ConvTranspose2d(6, 4, (2, 3), stride=(2, 1), groups=2, dilation=(1, 2)), (2, 6, 3, 4)),
    "transposed 3d": (nn.ConvTranspose3d(3, 2, 2, stride=2, bias=False), (2, 3, 2, 3, 2)),
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear on tokens": (nn.Linear(6, 4, bias=False), (2, 3, 7, 6)),
    "F.linear": (Functional((5, 6), nn.functional.linear), (2, 6)),
    "x @ w": (Functional((6, 5), torch.matmul), (2, 3, 6)),
    "w @ x": (Functional((5, 6), lambda x, w: w @ x), (6, 4)),
    "einsum": (Functional((3, 6, 5), lambda x, w: torch.einsum("bgi,gio->bgo", x, w)), (4, 3, 6)),
    "w @ x, for each image": (Functional((5, 6), lambda x, w: w @ x), (3, 6, 4)),
    "w expanded": (Functional((5, 6), lambda x, w: w.expand(3, 5, 6) @ x), (3, 6, 4)),
    "heads, for each image": (Functional((2, 6, 5), torch.matmul), (4, 2, 3, 6)),
    "sliced": (Functional((9, 6), lambda x, w: nn.functional.linear(x, w[2:7])), (4, 6)),
    "1x1 by linear": (Functional((5, 6, 1, 1), lambda x, w: nn.functional.linear(x, w[:, :, 0, 0])), (4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_contraction_is_the_product_of_its_rows_and_weights(name: str, step: int) -> None:
    model, shape = NETWORKS[name]
    model = model.double()
    seen: list[tuple[Contraction, Tensor, Tensor]] = []

    def visit(contraction: Contraction, compute: Callable[[], Tensor]) -> Tensor:
        output = compute()
        seen.append((contraction, contraction.rows(step), contraction.outputs(output, step)))
        return output

    with torch.no_grad(), ContractionMode(model, visit):
        model(torch.randn(shape, dtype=torch.float64))
    assert len(seen) == 1
    contraction, rows, outputs = seen[0]
    parameters = dict(model.named_parameters())
    weights = parameters[contraction.parameter].detach().flatten()[contraction.positions]
    if contraction.bias is not None:
        outputs = outputs - parameters[contraction.bias].detach().reshape(outputs.shape[0], 1, -1)
    if name != "linear on tokens" and "bias" in parameters:
        assert contraction.bias == "bias"
    torch.testing.assert_close(rows @ weights, outputs)


def test_weights_that_are_expanded_have_one_solution() -> None:
    """Every image's rows are rows of the same weights."""
    seen: list[Contraction] = []
    model = Functional((2, 6, 5), torch.matmul)
    with torch.no_grad(), ContractionMode(model, lambda one, compute: (seen.append(one), compute())[1]):
        model(torch.randn(4, 2, 3, 6))
    assert seen[0].positions.shape == (2, 6, 5)
    assert seen[0].rows(1).shape == (2, 12, 6)


def test_weights_that_are_tied_are_not_shown() -> None:
    tied = Functional((6, 1, 3, 3), lambda x, w: nn.functional.conv2d(x, w.expand(6, 4, 3, 3)))
    with torch.no_grad(), ContractionMode(tied, lambda contraction, compute: pytest.fail("shown")):
        tied(torch.randn(2, 4, 5, 5))


def test_weights_made_of_others_are_not_shown() -> None:
    normalised = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    with torch.no_grad(), ContractionMode(normalised, lambda contraction, compute: pytest.fail("shown")):
        normalised(torch.randn(2, 4))
