"""LPIPS of random windows in random sizes, against the `lpips` package on windows cut and resized by hand."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from kl_autoencoder.evaluation.metrics import LPIPS
from tests.conftest import backbone_missing
from train.autoencoder.objective import Objective
from train.autoencoder.windows import draw_windows
from train.config import LossConfig, PerceptualConfig, build
from train.parts import Draws
from train.parts.draws import WINDOW_PLACE

needs_squeeze = pytest.mark.skipif(
    bool(backbone_missing("squeeze")), reason="the LPIPS backbone squeeze is not in TORCH_HOME"
)


def objective(**perceptual):
    config = build(LossConfig, {"perceptual": {"net": "squeeze"} | perceptual})
    return Objective(config, LPIPS("squeeze"), [], None)


def pair(height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 3, height, width, generator=generator).mul(2).sub(1).unbind()


def draws(samples, step=0):
    return Draws(seed=4, samples=torch.tensor(samples), device=torch.device("cpu"), step=step)


@needs_squeeze
@pytest.mark.parametrize(("side", "shift", "effective"), [(40, 4, 4), (40, None, 7), (20, 7, 3)])
def test_windows_at_random_places_are_compared(side, shift, effective):
    """With squeeze the shift is 7 unless it is set; images of 20 pixels leave 3 of it, as squeeze needs 17."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net="squeeze", verbose=False).eval()
    y, x = pair(side, side + 8)
    term = objective(shift=shift, scale=1)
    value, gradient = term.perceptual_gradient(y.clone().requires_grad_(), x, draws([5, 2, 9]))

    numbers = draws([5, 2, 9]).for_purpose(WINDOW_PLACE)
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


@needs_squeeze
def test_a_window_depends_on_the_samples_number_and_the_step_alone():
    """So the gradients of two ranks, or of two micro-batches, are those of one batch."""
    y, x = pair(40, 40)
    term = objective()
    _, together = term.perceptual_gradient(y.clone().requires_grad_(), x, draws([5, 2, 9], step=3))
    _, alone = term.perceptual_gradient(y[1:2].clone().requires_grad_(), x[1:2], draws([2], step=3))
    torch.testing.assert_close(3 * together[1:2], alone, rtol=1e-4, atol=1e-7)


@needs_squeeze
def test_without_random_numbers_whole_images_are_compared():
    y, x = pair(40, 40)
    shifted, _ = objective().perceptual_gradient(y.clone().requires_grad_(), x)
    whole, _ = objective(shift=0, scale=1).perceptual_gradient(
        y.clone().requires_grad_(), x, draws([5, 2, 9])
    )
    expected = LPIPS("squeeze")(y, x).mean()
    assert shifted == whole and whole.item() == pytest.approx(expected.item(), rel=1e-6)


def test_sizes_are_log_uniform_and_cost_no_more_than_whole_images():
    """LPIPS's input never has more pixels than the images, nor fewer than its network needs."""
    images, scales = torch.zeros(2, 3, 64, 96), []
    for step in range(300):
        windows = draw_windows(PerceptualConfig(net="alex", scale=4.0), images, draws([0, 1], step))
        free = torch.tensor([64, 96]) - torch.tensor(windows.sides)
        assert (windows.corners >= 0).all() and (windows.corners <= free).all()
        height, width = windows.cut(images).shape[2:]
        assert 31 <= height <= 57 and 31 <= width <= 89
        scales.append(width / windows.sides[1])
    logs = np.log(scales) / np.log(4)
    assert logs.max() > 0.95 and np.mean(logs > 0.5) == pytest.approx(0.25, abs=0.08)
    # the smaller side, less the shift, is shrunk to no less than what alex needs
    assert min(scales) == pytest.approx(31 / 57, rel=0.02)


def test_windows_are_resized_as_pillow_does():
    """Bicubic with antialiasing, in both directions, within rounding to 8 bits."""
    image = torch.from_numpy(np.random.default_rng(0).integers(60, 190, (3, 64, 64)).astype(np.float32))
    found = 0
    for step in range(12):
        windows = draw_windows(PerceptualConfig(net="squeeze"), image[None], draws([0], step))
        (row, column), cut = windows.corners[0].tolist(), windows.cut(image[None])[0]
        box = (column, row, column + windows.sides[1], row + windows.sides[0])
        part = Image.fromarray(image.byte().movedim(0, -1).numpy()).crop(box)
        wanted = np.asarray(part.resize(cut.shape[:0:-1], Image.Resampling.BICUBIC)).astype(np.float32)
        assert np.abs(cut.movedim(0, -1).numpy() - wanted).max() < 2
        found |= 1 if windows.resized > windows.sides else 2
    assert found == 3


def test_vgg_sees_whole_images_unless_it_is_told():
    images = torch.zeros(2, 3, 64, 64)
    windows = draw_windows(PerceptualConfig(), images, draws([0, 1]))
    assert windows.cut(images) is images
