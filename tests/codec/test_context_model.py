"""The learned entropy model: exact whole numbers on any machine, computed only from what is decoded already."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.signal import correlate
from scipy.stats import logistic

from kl_autoencoder.codec import context_model, context_network
from kl_autoencoder.codec.context_model import ContextModel, exact_convolutions
from kl_autoencoder.codec.context_network import ContextNetwork, grid, logistic_bits
from kl_autoencoder.codec.prediction import decode_symbols, encode_symbols, expected
from kl_autoencoder.codec.steps import step_of, steps_to_deviations
from kl_autoencoder.codec.tables import REACH
from kl_autoencoder.models.folder import ENTROPY_MODEL
from tests.conftest import ROOT

GRIDS = ("0424", "4343", "2414", "4343")  # the first grid of each place, again and again in both directions


def network(channels=3, width=8, scale=6.0, seed=0, five_passes=1):
    """A network with weights of a few hundred units, so that sums have more digits than bfloat16 holds."""
    generator = torch.Generator().manual_seed(seed)
    made = ContextNetwork(channels, width, five_passes=five_passes)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * scale / parameter[0].numel() ** 0.5
            )
    return made


def drawn(shape, seed=0, deviation=3.0):
    return np.round(np.random.default_rng(seed).normal(0, deviation, shape)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return ContextModel(network())


def _correlated(planes, kernels):
    parts = [correlate(*pair, mode="same", method="direct") for pair in zip(planes, kernels, strict=True)]
    return np.sum(parts, axis=0)


def first_grids(height, width):
    return np.array([[int(GRIDS[row % 4][column % 4]) for column in range(width)] for row in range(height)])


def by_whole_numbers(model, number, symbols, quality):
    """The prediction computed independently, by scipy's correlation of int64."""
    five = model.network.five_passes
    channel, done = divmod(number, 5) if number < 5 * five else divmod(number - 3 * five, 2)
    finest_seen = done - 1 if channel < five else 3
    _, h, w = symbols.shape
    context = steps_to_deviations(symbols, quality, 5).clip(-255, 255)
    seen = list(context[:channel])
    if done:
        seen.append(np.where(first_grids(h, w) <= finest_seen, context[channel], 0))
    x = np.stack([*seen, np.full((h, w), 40 - quality)])
    whole = {
        name: value.numpy().astype(np.int64) for name, value in context_model.integers(model.network).items()
    }
    for layer in ("context", "hidden", "out"):
        weight, bias = whole[f"passes.{number}.{layer}.weight"], whole[f"passes.{number}.{layer}.bias"]
        sums = np.stack([_correlated(x, kernels) for kernels in weight]) + bias[:, None, None]
        x = ((sums + 64) >> 7).clip(0, 255)
    mean, scale = (sums[0] + 32) >> 6, (sums[1] + 64) >> 7
    scale = ((scale - (40 - quality) + 64 + 2) >> 2).clip(0, 35)
    return np.rint(mean / 64 / step_of(quality) * 16), scale


@pytest.mark.parametrize("quality", [1, 40, 73, 100])
def test_predictions_are_those_of_whole_numbers(model, quality):
    symbols = drawn((3, 9, 12))
    for at in model.passes(symbols.shape):
        mean, scale = by_whole_numbers(model, at.number, symbols, quality)
        found = model.predict(at, symbols, quality)
        np.testing.assert_array_equal(found.scales, scale)
        assert np.abs(found.means - mean).max() <= 1  # the step back is the inverse of a step to 1e-5


def test_every_place_is_coded_once_and_predicted_only_from_earlier_ones(model):
    symbols = drawn((3, 10, 11))
    coded = np.zeros(symbols.shape, int)
    for at in model.passes(symbols.shape):
        later = np.where(coded > 0, symbols, 99)
        for mine, other in zip(model.predict(at, symbols, 40), model.predict(at, later, 40), strict=True):
            np.testing.assert_array_equal(mine, other)
        coded[at.channel][at.mask] += 1
    assert (coded == 1).all()


def test_expected_values_are_those_of_a_logistic_distribution_over_the_step():
    symbols, means = np.array([0, 0, 2, -3, 9]), np.array([0, 7, 5, -40, 16])
    scales = np.array([4, 16, 14, 20, 12])
    found = expected(symbols, means, scales)
    for symbol, mean, scale, one in zip(symbols, means, scales, found, strict=True):
        drawn_from = logistic(mean / 16, 2.0 ** (scale / 4 - 4))
        wanted = drawn_from.expect(lb=symbol - 0.5, ub=symbol + 0.5, conditional=True)
        assert one == pytest.approx(wanted, abs=3e-3)
    assert found[0] == 0 and 0 < found[1] < 7 / 16


def test_a_model_for_the_middles_of_steps_decodes_to_them_also_from_its_file(tmp_path):
    made, symbols = network(), drawn((3, 12, 12), deviation=3)
    made.middles = True
    ContextModel(made).save(tmp_path / "model.safetensors")
    model = ContextModel.load(tmp_path / "model.safetensors")
    _, latents = decode_symbols(encode_symbols(symbols, model, 40), symbols.shape, model, 40)
    np.testing.assert_array_equal(latents, symbols)


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 1, 9), (3, 32, 17)])
def test_decoding_is_the_inverse(model, shape):
    symbols = drawn(shape, deviation=20)
    for quality in (10, 60, 100):
        found, latents = decode_symbols(encode_symbols(symbols, model, quality), shape, model, quality)
        assert np.array_equal(found, symbols)
        assert np.abs(latents - symbols).max() < 0.5


def test_bytes_are_within_two_percent_of_the_cross_entropy():
    """The cross-entropy is what training minimises, computed in floats from a logistic distribution."""
    made = network(scale=0.3)
    symbols = drawn((3, 60, 60), deviation=1.5)
    bits = made.bits(torch.from_numpy(symbols)[None].float(), torch.tensor([40.0])).sum().item()
    found = 8 * len(encode_symbols(symbols, ContextModel(made), 40))
    assert bits * 0.98 < found < bits * 1.02


def test_bits_are_those_of_a_logistic_distribution_and_have_a_gradient_far_from_the_mean():
    difference, scale = torch.tensor([0.0, 0.3, -7.0, 30.0]), torch.tensor([0.1, 1.0, 0.7, 2.0])
    away, spread = difference.abs().double().numpy(), scale.double().numpy()
    wanted = -np.log2(logistic.cdf((0.5 - away) / spread) - logistic.cdf((-0.5 - away) / spread))
    np.testing.assert_allclose(logistic_bits(difference, scale), wanted, rtol=1e-4)
    far = torch.tensor([500.0], requires_grad=True)
    logistic_bits(far, torch.tensor([0.1])).sum().backward()
    assert far.grad.item() == pytest.approx(10 / np.log(2), rel=1e-3)


def test_predictions_do_not_depend_on_batches_autocast_or_onednn():
    made = network(channels=2, width=16)
    context = torch.from_numpy(drawn((5, 2, 21, 30), deviation=60)).float()
    quality = torch.tensor([1.0, 30, 40, 80, 100])

    def predictions(slices):
        with torch.inference_mode(), exact_convolutions():
            parts = [torch.stack(made.predict(3, context[s], quality[s])) for s in slices]
        return torch.cat(parts, dim=1)

    whole = predictions([slice(5)])
    wanted = torch.stack(made.double().predict(3, context.double(), quality.double()))
    made.float()
    assert torch.equal(whole.double(), wanted)
    assert torch.equal(whole, predictions([slice(i, i + 1) for i in range(5)]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole, predictions([slice(3), slice(3, 5)]))
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(whole, predictions([slice(2), slice(2, 5)]))


def test_sums_that_would_not_be_exact_are_refused():
    with pytest.raises(ValueError, match=r"passes.*: sums up to .*; allowed: below 8,388,608"):
        ContextModel(network(scale=5000.0))


def test_a_file_is_read_as_it_was_written(model, tmp_path):
    path = tmp_path / ENTROPY_MODEL
    model.save(path)
    found = ContextModel.load(path)
    assert found.hash == model.hash and found.channels == 3 and found.network.five_passes == 1
    symbols = drawn((3, 20, 20))
    assert encode_symbols(symbols, found, 50) == encode_symbols(symbols, model, 50)
    assert ContextModel.beside(tmp_path).hash == model.hash and ContextModel.beside(tmp_path / "none") is None


def test_files_that_hold_no_entropy_model_are_refused(model, tmp_path):
    path = tmp_path / "a.safetensors"
    model.save(path)
    tensors = load_file(path)
    untold = {context_model.KEY: context_model.VERSION}
    about = {**untold, context_model.FIVE_KEY: "1"}
    wrong = {
        "not an entropy model of version 1": (tensors, {}),
        "not the tensors of an": (tensors, untold),  # which means no channel in five passes
        "-9 channels, 9 of them in five passes": (tensors, {**about, context_model.FIVE_KEY: "9"}),
        "not whole numbers": ({name: t.float() for name, t in tensors.items()}, about),
        "not the tensors of an entropy model": (
            {**tensors, "passes.1.hidden.weight": torch.ones(2, 2, dtype=torch.int32)},
            about,
        ),
        "sums up to": ({name: t * 1000 for name, t in tensors.items()}, about),
    }
    for told, (content, metadata) in wrong.items():
        save_file({name: t.contiguous() for name, t in content.items()}, path, metadata)
        with pytest.raises(ValueError, match=told) as error:
            ContextModel.load(path)
        assert str(error.value).startswith(str(path))
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged, truncated or not a safetensors file"):
        ContextModel.load(path)


def test_grids_are_those_that_are_drawn():
    assert all(" ".join(row + row[0]) in context_network.__doc__ for row in GRIDS)
    for number in range(5):
        assert np.array_equal(grid(number, 7, 9).numpy(), first_grids(7, 9) <= number)
    assert context_network.SIDE == 5 and REACH == 48


@pytest.mark.parametrize(("five_passes", "passes"), [(0, 6), (1, 9), (3, 15)])
def test_the_first_channels_are_coded_in_five_passes(five_passes, passes):
    model, shape = ContextModel(network(five_passes=five_passes)), (3, 9, 13)
    orders = list(model.passes(shape))
    assert len(orders) == passes
    for channel in range(3):
        masks = [at.mask for at in orders if at.channel == channel]
        if channel < five_passes:
            assert all(np.array_equal(mask, first_grids(9, 13) == i) for i, mask in enumerate(masks))
        else:
            assert np.array_equal(masks[0], first_grids(9, 13) < 4) and np.array_equal(masks[1], ~masks[0])


def test_a_model_of_more_passes_starts_from_the_networks_of_one_with_fewer():
    two, five = network(channels=3, five_passes=0), ContextNetwork(4, 8, five_passes=1)
    five.start_from(two)
    symbols, quality = torch.from_numpy(drawn((2, 4, 12, 12))).float(), torch.tensor([30.0, 60.0])
    with torch.no_grad():
        before, after = two(symbols[:, :3], quality), five(symbols, quality)
    assert torch.equal(before[:, 1:], after[:, 4:9])  # the second half of channel 0, all of channels 1 and 2
    top = torch.from_numpy(first_grids(12, 12) == 0)
    assert torch.equal(before[:, 0] * top, after[:, 0])


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"OMP_NUM_THREADS": "1"}, []),
        ({"OMP_NUM_THREADS": "2"}, []),
        ({"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}, []),
        ({"OMP_NUM_THREADS": "2"}, ["mkldnn-off", "bfloat16"]),
    ],
)
def test_the_golden_file_is_read_and_written_alike_by_other_processes(settings, arguments):
    """No bit depends on threads, on kernels of older processors, on torch's own convolutions or half precision."""
    command = [sys.executable, "-m", "tests.codec.golden", *arguments]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **settings}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["the", "same", settings["OMP_NUM_THREADS"]], done.stderr
