"""What pictures show, read back from matplotlib's objects: cells, dots, bars and lines."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from scipy.stats import norm
from sklearn.decomposition import PCA

from kl_autoencoder.evaluation.pictures import grids, plots, style
from kl_autoencoder.evaluation.pictures.plots import RatePoint


def paint(z):
    """Images of 3x2 pixels in one colour: red z_0 / 4, green z_1 / 4, blue 0."""
    colours = torch.cat((z[:, :2, :1, :1] / 4, torch.zeros(len(z), 1, 1, 1)), 1)
    return colours.expand(-1, -1, 3, 2)


def cells(figure, rows, columns):
    """The colour of each cell, (rows, columns, 3), and the tick labels of both axes."""
    (ax,) = figure.axes
    sheet = np.asarray(ax.images[0].get_array())
    assert sheet.shape == (rows * 4 - 1, columns * 3 - 1, 3)  # a pixel between cells
    assert (sheet[3::4] == 1).all() and (sheet[:, 2::3] == 1).all()
    at = {label.get_text(): place for label, place in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)}
    return sheet[1::4, ::3] * 2 - 1, at


def test_the_manifold_is_at_equal_steps_of_the_normal_distribution():
    colours, at = cells(grids.manifold(paint, side=8), 8, 8)
    places = norm.ppf((np.arange(8) + 0.5) / 8)
    np.testing.assert_allclose(colours[0, :, 0], places / 4, atol=1e-6)  # z_0 to the right
    np.testing.assert_allclose(colours[:, 0, 1], places[::-1] / 4, atol=1e-6)  # z_1 upwards
    assert at[f"{places[-1]:+.1f}"] == 1 and at[f"{places[0]:+.1f}"] == 7 * 4 + 1


def test_a_traversal_moves_one_latent():
    rates = torch.tensor([0.2, 0.0, 1.5])
    order = grids.most_informative(rates[:, None, None])
    assert order == [2, 0, 1] and grids.most_informative(rates[:, None, None], 1) == [2]
    figure = grids.traversals(
        paint, torch.ones(3, 1, 1), order, torch.tensor([1.0, 0, 0]), torch.tensor([0.5, 1, 1]), rates
    )
    colours, at = cells(figure, 3, 7)
    moves = np.linspace(-3, 3, 7)
    np.testing.assert_allclose(colours[0, :, :2], 0.25, atol=1e-6)  # the third latent paints nothing
    np.testing.assert_allclose(colours[1, :, 0], (1 + 0.5 * moves) / 4, atol=1e-6)
    np.testing.assert_allclose(colours[1, :, 1], 0.25, atol=1e-6)
    np.testing.assert_allclose(colours[2, :, 1], moves / 4, atol=1e-6)
    assert at == {"$z_{2}$  1.50 nats": 1, "$z_{0}$  0.20 nats": 5, "$z_{1}$  0.00 nats": 9}


def test_a_channel_of_several_positions_moves_around_the_image():
    seen = []

    def decode(z):
        seen.append(z)
        return paint(z)

    start = torch.arange(8.0).view(2, 2, 2)
    grids.traversals(decode, start, [1], torch.zeros(2), torch.tensor([1.0, 2.0]), steps=3)
    assert torch.equal(seen[0][:, 0], start[0].expand(3, 2, 2))
    assert torch.equal(seen[0][:, 1], torch.stack((start[1] - 6, start[1], start[1] + 6)))


def test_images_that_cannot_be_shown():
    with pytest.raises(ValueError, match="images of 4 channels; allowed in pictures: 1"):
        grids.manifold(lambda z: torch.zeros(len(z), 4, 2, 2), side=2)


def dots(ax):
    return {tuple(c.get_facecolor()[0][:3]): np.asarray(c.get_offsets()) for c in ax.collections}


def test_two_latents_are_shown_as_they_are_in_the_colours_of_their_classes():
    latents = np.random.default_rng(0).normal(size=(30, 2))
    labels = np.arange(30) % 3
    (ax,) = (figure := plots.latents_by_class(latents, labels, ["ape", "bee", "cat"])).axes
    for number, name in enumerate(("ape", "bee", "cat")):
        found = dots(ax)[to_rgb(style.CLASSES[number])]
        np.testing.assert_array_equal(found, latents[labels == number])
        assert figure.legends[0].texts[number].get_text() == name
    (ax,) = plots.latents_by_class(latents, None).axes
    np.testing.assert_array_equal(dots(ax)[to_rgb(style.ACCENT)], latents)


def test_more_latents_by_their_principal_components_and_by_tsne():
    """Two groups far apart stay apart."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    latents = generator.normal(size=(40, 5)) + 20 * labels[:, None]
    by_pca, by_tsne = plots.latents_by_class(latents, labels).axes
    wanted = PCA(2, random_state=0).fit_transform(latents)
    both = dots(by_pca)
    found = np.concatenate([both[to_rgb(style.CLASSES[number])] for number in (0, 1)])
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    a, b = (dots(by_tsne)[to_rgb(style.CLASSES[number])] for number in (0, 1))
    between = np.linalg.norm(a.mean(0) - b.mean(0))
    assert between > 3 * max(a.std(), b.std())


def test_bars_of_codes_fall():
    (ax,) = plots.code_usage([1, 0, 5, 2], perplexity=2.6).axes
    assert [bar.get_height() for bar in ax.patches] == [5 / 8, 2 / 8, 1 / 8, 0]
    assert ax.get_title(loc="left") == "3 of 4 codes in use, perplexity 2.6"
    assert ax.lines[0].get_ydata()[0] == 1 / 4


def test_rate_against_distortion():
    points = [RatePoint(8, 10, 0.5), RatePoint(0.001, 30, 8), RatePoint(0, 30, 4), RatePoint(4, 12, 1)]
    (ax,) = plots.rate_distortion(points).axes
    assert ax.lines[0].get_xdata().tolist() == [0, 0.001, 4, 8]
    assert ax.lines[0].get_ydata().tolist() == [30, 30, 12, 10]
    line = ax.lines[1]  # of ELBO -16, that of beta = 1
    assert np.allclose(line.get_xdata() + line.get_ydata(), 16)
    assert [t.get_text() for t in ax.texts] == [f"$\\beta$ = {b}" for b in ("4, 8", "1", "0.5")]


def test_the_elbo_over_training():
    records = [
        {"step": 10, "train/reconstruction": 2.0, "train/kl": 0.5},
        {"step": 10, "validation/psnr": 9.0},
        {"step": 20, "train/reconstruction": 1.0, "train/kl": 0.75},
    ]
    above, below = plots.elbo_over_training(records).axes
    assert [line.get_ydata().tolist() for line in above.lines] == [[2.5, 1.75], [2.0, 1.0]]
    assert below.lines[0].get_xydata().tolist() == [[10, 0.5], [20, 0.75]]
    with pytest.raises(ValueError, match="no line with train/reconstruction and train/kl"):
        plots.elbo_over_training(records[1:2])


def test_pictures_are_written_whole(tmp_path):
    figure = plots.code_usage([1, 2], 1.9)
    style.save(figure, tmp_path / "codes.png")
    with Image.open(tmp_path / "codes.png") as image:
        assert image.size[0] > 900 and image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
    first = (tmp_path / "codes.png").read_bytes()
    style.save(plots.code_usage([1, 2], 1.9), tmp_path / "codes.png")
    assert (tmp_path / "codes.png").read_bytes() == first
    with pytest.raises(FileNotFoundError, match="the folder .* is missing"):
        style.save(figure, tmp_path / "absent" / "codes.png")


def test_equal_latents_are_drawn():
    """scikit-learn's tree of points ends the process where many are equal."""
    latents = np.repeat(np.random.default_rng(0).normal(size=(4, 8)), 80, axis=0)
    figure = plots.latents_by_class(latents, [0] * len(latents))
    assert len(figure.axes) == 2
