"""The codec's parts of training: the view that rounds, the term that counts bits, the task of the entropy model."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.codec import container
from kl_autoencoder.codec.codec import Codec, rounded
from kl_autoencoder.codec.context_model import ContextModel
from kl_autoencoder.codec.context_network import ContextNetwork
from kl_autoencoder.codec.prediction import encode_symbols
from kl_autoencoder.codec.steps import step_of
from kl_autoencoder.data.image_io import load_image
from kl_autoencoder.models.folder import ENTROPY_MODEL
from kl_autoencoder.models.packaged import COMPACT
from tests.conftest import ROOT
from tests.train.runs import make, small_config
from train.codec.task import in_steps
from train.config import load_config
from train.config.codec import EntropyNetworkConfig
from train.loop.trainer import Trainer
from train.parts import TERMS, VIEWS, Draws
from train.smoke import shrink
from train.tasks import task_maker

RECIPE = ROOT / "configs" / "codec_entropy.yaml"


@pytest.fixture(scope="module")
def recipe():
    return load_config(ROOT / "configs" / "codec.yaml")


def latents(*shape, seed=0):
    return 11.06 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draws(count):
    return Draws(0, torch.arange(count), torch.device("cpu"))


def test_noise_is_uniform_over_a_step_of_each_image(recipe):
    z = latents(6, 4, 50, 50)
    view = VIEWS.build(replace(recipe.loss.view, lowest=30, highest=70), recipe)
    noisy, images = view(z, z, draws(6))
    assert images is z
    errors = (noisy - z) / 11.06
    widths = errors.amax(dim=(1, 2, 3)) - errors.amin(dim=(1, 2, 3))
    assert (widths > step_of(70) * 0.99).all() and (widths < step_of(30) * 1.001).all()
    assert len({round(width, 3) for width in widths.tolist()}) == 6
    for error, width in zip(errors, widths, strict=True):
        assert error.std().item() == pytest.approx(width.item() / 12**0.5, rel=0.02)
        assert abs(error.mean().item()) < width.item() * 0.02
    again, _ = view(z, z, draws(6))
    assert torch.equal(again, noisy)


def test_rounding_is_the_codecs_and_its_gradient_passes(recipe):
    z = latents(2, 4, 8, 8).requires_grad_()
    view = VIEWS.build(replace(recipe.loss.view, how="straight_through", lowest=52, highest=52), recipe)
    changed, _ = view(z, z, draws(2))
    wanted = np.stack([rounded(one / 11.06, 52) for one in z.detach()]) * step_of(52) * 11.06
    np.testing.assert_allclose(changed.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)
    changed.square().sum().backward()
    torch.testing.assert_close(z.grad, 2 * changed.detach())


def test_the_rate_is_the_size_of_the_files(recipe):
    config = replace(recipe.loss.terms[0], qualities=(40,), start=None, width=8)
    term = TERMS.build(config, recipe)
    torch.manual_seed(0)
    network = term.learned(4)
    z = latents(2, 4, 40, 40).requires_grad_()
    images = torch.zeros(2, 3, 320, 320)
    bits = network(z)
    value = term.compute(bits, images)
    model = ContextModel(network.network)
    files = [encode_symbols(rounded(one / 11.06, 40), model, 40) for one in z.detach()]
    assert value.item() == pytest.approx(sum(8 * len(file) for file in files) / 2 / 320**2, rel=0.02)


def test_bits_count_in_proportion_to_a_power_of_the_step(recipe):
    z = latents(2, 4, 16, 16)
    config = replace(recipe.loss.terms[0], start="compact", step_power=0.0)

    def bits(**changed):
        return TERMS.build(replace(config, **changed), recipe).learned(4)(z)

    coarse, fine = bits(qualities=(24,)), bits(qualities=(56,))
    torch.testing.assert_close(bits(qualities=(24, 56), step_power=2.0), (4 * coarse + fine / 4) / 2)


def test_the_rate_has_a_gradient_that_shrinks_latents(recipe):
    term = TERMS.build(replace(recipe.loss.terms[0], start=None, width=8), recipe)
    torch.manual_seed(0)
    network, z = term.learned(4), latents(2, 4, 16, 16).requires_grad_()
    term.compute(network(z), torch.zeros(2, 3, 128, 128)).backward()
    assert (z.grad * z).sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.network.passes[7].parameters())
    with torch.no_grad():
        smaller = term.compute(network(z - 5e4 * z.grad), torch.zeros(2, 3, 128, 128))
        assert smaller < term.compute(network(z), torch.zeros(2, 3, 128, 128))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "loss.view={kind: rounding, lowest: 80}",
            "loss.view.lowest: 80.0; allowed: at most loss.view.highest",
        ),
        ("loss.view={kind: rounding, how: up}", "how"),
        ("loss.terms=[{kind: rate, qualities: []}]", "qualities"),
        ("loss.terms=[{kind: rate, weight: 0}]", "weight"),
    ],
)
def test_impossible_views_and_terms_are_refused(override, told):
    with pytest.raises(ValueError, match=told):
        load_config(ROOT / "configs" / "codec.yaml", [override])


def test_a_rate_of_other_steps_than_the_view_rounds_to_is_refused(recipe):
    with pytest.raises(ValueError, match="rate.deviation: 1.0; allowed: that of the view, 11.06"):
        TERMS.build(replace(recipe.loss.terms[0], deviation=1.0), recipe)


def test_models_without_a_scaling_factor_are_refused_with_the_rate(photographs, tmp_path):
    rate = {"view": {"kind": "rounding", "deviation": 2.0}, "terms": [{"kind": "rate", "deviation": 2.0}]}
    config = small_config(photographs, tmp_path, model={"kind": "AutoencoderKLFlux2"}, loss=rate)
    with pytest.raises(ValueError, match="loss.terms: rate with an AutoencoderKLFlux2; allowed"):
        make(config)


def test_a_start_without_an_entropy_model(recipe, tmp_path):
    with pytest.raises(
        ValueError, match="rate.start: 'compact' holds one of 4 channels; allowed: one of up to 3"
    ):
        TERMS.build(replace(recipe.loss.terms[0], start="compact"), recipe).learned(3)
    config = replace(recipe.loss.terms[0], start=str(tmp_path))
    with pytest.raises(
        ValueError, match="rate.start: .* holds no entropy model; allowed: one of up to 4, or null"
    ):
        TERMS.build(config, recipe).learned(4)


def test_an_entropy_model_of_fewer_channels_keeps_their_networks(recipe):
    config = replace(recipe.loss.terms[0], start="compact", five_passes=4)
    grown = TERMS.build(config, recipe).learned(6).network
    had, quality = ContextModel.beside(COMPACT).network, torch.tensor([40.0, 52.0])
    symbols = (torch.randn(2, 6, 16, 16, generator=torch.Generator().manual_seed(0)) * 2).round()
    with torch.no_grad():
        torch.testing.assert_close(grown(symbols, quality)[:, :20], had(symbols[:, :4], quality))
    assert grown.channels == 6 and all(parameter.requires_grad for parameter in grown.parameters())


def test_a_run_with_the_rate_exports_a_codec(tmp_path, photographs, monkeypatch):
    """Its entropy model and its scaling are those of the rate; the entropy model can be trained on."""
    monkeypatch.chdir(tmp_path)  # where the recipe's own folders are not
    more = [f"data.train={photographs}", "model.pretrained=compact", "train.mixed_precision=no"]
    config = shrink(load_config(ROOT / "configs" / "codec.yaml", more), tmp_path)
    config = replace(
        config,
        train=replace(config.train, steps=2),
        validation=replace(config.validation, every=0),
        export=replace(config.export, push_to="me/codec", dry_run=True),
    )
    trainer = Trainer(config, task_maker(config))
    trainer.fit()
    export = tmp_path / "export"
    vae, learned = KLAutoencoder.from_pretrained(export), ContextModel.beside(export)
    assert vae.config.scaling_factor == 1 / config.loss.terms[0].deviation
    checkpoint = json.loads((tmp_path / "checkpoints" / "step-000002" / "config.json").read_text())
    assert checkpoint["scaling_factor"] == vae.config.scaling_factor
    trained = trainer.task.model.learned["rate"].network
    assert learned.hash == ContextModel(copy.deepcopy(trained)).hash != ContextModel(ContextNetwork(4)).hash
    model = EntropyNetworkConfig(pretrained=str(export), start=str(export))
    config = replace(shrink(load_config(RECIPE), tmp_path / "entropy"), model=model)
    network = Trainer(config, task_maker(config)).task.network
    assert ContextModel(copy.deepcopy(network)).hash == learned.hash
    assert ContextModel.beside(tmp_path / "published").hash == learned.hash
    assert learned.middles and network.middles  # the recipe's view rounds to the middles of steps


def test_training_lowers_the_bits_and_what_it_exports_codes_images(tmp_path, photographs):
    """Of 60 small steps; the files are then as large as the training says."""
    config = shrink(load_config(RECIPE, [f"data.train={photographs}", "data.validation_images=8"]), tmp_path)
    config = replace(
        config,
        train=replace(config.train, steps=60),
        validation=replace(config.validation, every=0),
        data=replace(config.data, batch_size=4, num_workers=0),
    )
    trainer = Trainer(config, task_maker(config))
    summary = trainer.fit()
    for quality, before in summary["before"].items():
        assert summary["after"][quality] < 0.9 * before, quality
    export = tmp_path / "export"
    assert "| after training |" in (export / "README.md").read_text()
    codec = Codec(
        KLAutoencoder.from_pretrained("compact"), "compact", ContextModel.load(export / ENTROPY_MODEL)
    )
    photograph = load_image(sorted(photographs.iterdir())[0])
    scaled, size = codec.latents(photograph)
    header, [chunk] = container.unpack(codec.packed(scaled, size, 56))
    assert header.entropy_hash == codec.learned.hash and header.side == b""
    np.testing.assert_array_equal(codec.decoded(header, [chunk])[0], rounded(scaled, 56))
    quality = torch.tensor([56])
    bits = trainer.task.exported(in_steps(scaled[None], quality), quality.float()).sum().item()
    assert 8 * len(chunk) == pytest.approx(bits, abs=40)
