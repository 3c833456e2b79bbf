"""The perceptual term with `loss.perceptual.shift`, against the `lpips` package on windows cut by hand."""

import warnings

import pytest
import torch

from kl_autoencoder.evaluation.metrics import LPIPS
from tests.conftest import backbone_missing
from train.autoencoder.objective import Objective
from train.config import LossConfig, build
from train.parts import Draws
from train.parts.draws import PERCEPTUAL_SHIFT

pytestmark = pytest.mark.skipif(
    bool(backbone_missing("squeeze")), reason="the LPIPS backbone squeeze is not in TORCH_HOME"
)


def objective(shift):
    config = build(LossConfig, {"perceptual": {"net": "squeeze", "shift": shift}})
    return Objective(config, LPIPS("squeeze"), [], None)


def pair(height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 3, height, width, generator=generator).mul(2).sub(1).unbind()


def draws(samples):
    return Draws(seed=4, samples=torch.tensor(samples), device=torch.device("cpu"))


@pytest.mark.parametrize(("side", "shift", "effective"), [(40, 4, 4), (40, None, 7), (20, 7, 3)])
def test_windows_at_random_places_are_compared(side, shift, effective):
    """With squeeze the shift is 7 unless it is set; images of 20 pixels leave 3 of it, as squeeze needs 17."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net="squeeze", verbose=False).eval()
    y, x = pair(side, side + 8)
    value, gradient = objective(shift).perceptual_gradient(y.clone().requires_grad_(), x, draws([5, 2, 9]))

    numbers = draws([5, 2, 9]).for_purpose(PERCEPTUAL_SHIFT)
    rows, columns = numbers.whole(0, effective), numbers.whole(0, effective)
    assert len({*rows, *columns}) > 1
    whole = y.clone().requires_grad_()
    distances = []
    for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
        at = (slice(i, i + 1), slice(None), slice(row, row + side - effective),
              slice(column, column + side + 8 - effective))  # fmt: skip
        distances.append(reference(whole[at], x[at]))
    expected = torch.stack(distances).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, whole)[0], rtol=1e-3, atol=1e-7)


def test_a_window_depends_on_the_samples_number_alone():
    """So the gradients of two ranks, or of two micro-batches, are those of one batch."""
    y, x = pair(40, 40)
    term = objective(7)
    _, together = term.perceptual_gradient(y.clone().requires_grad_(), x, draws([5, 2, 9]))
    _, alone = term.perceptual_gradient(y[1:2].clone().requires_grad_(), x[1:2], draws([2]))
    torch.testing.assert_close(3 * together[1:2], alone, rtol=1e-4, atol=1e-7)


def test_without_a_shift_whole_images_are_compared():
    y, x = pair(40, 40)
    shifted, _ = objective(7).perceptual_gradient(y.clone().requires_grad_(), x)
    whole, _ = objective(0).perceptual_gradient(y.clone().requires_grad_(), x, draws([5, 2, 9]))
    expected = LPIPS("squeeze")(y, x).mean()
    assert shifted == whole and whole.item() == pytest.approx(expected.item(), rel=1e-6)
