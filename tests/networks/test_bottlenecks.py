"""Bottlenecks: rules for all of them, known answers, and independent references."""

import math

import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch import FSQ

from kl_autoencoder.networks.bottlenecks import (
    BOTTLENECKS,
    Discrete,
    FiniteScalarQuantizer,
    GumbelSoftmax,
    KLBottleneck,
    PlainBottleneck,
    VectorQuantizer,
)
from kl_autoencoder.networks.bottlenecks.gumbel import gumbel
from kl_autoencoder.networks.bottlenecks.kmeans import kmeans

OPTIONS = {
    "kl": {},
    "none": {"sparsity": 0.5},
    "adversarial": {"prior": "mixture"},
    "vq": {"codes": 12},
    "fsq": {"levels": (5, 4, 3, 2)},
    "gumbel": {"codes": 12},
}
DIMENSIONS = 3 * 16 * 16


def made(kind, **options):
    torch.manual_seed(0)
    return BOTTLENECKS[kind](4, **{**OPTIONS[kind], **options})


def inputs(bottleneck, batch=3, side=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(batch, bottleneck.encoder_channels(4), side, side, generator=generator)
    noise = torch.randn(batch, *bottleneck.noise_shape((4, side, side)), generator=generator)
    return h, noise


@pytest.mark.parametrize("kind", BOTTLENECKS)
def test_an_image_is_coded_by_itself_and_has_a_gradient(kind):
    bottleneck = made(kind).eval()
    h, noise = inputs(bottleneck)
    code = bottleneck(h.requires_grad_(), noise, DIMENSIONS)
    assert code.z.shape == (3, 4, 4, 4)
    assert all(penalty.shape == (3,) and (penalty >= 0).all() for penalty in code.penalties.values())
    alone = bottleneck(h[1:2], noise[1:2], DIMENSIONS)
    torch.testing.assert_close(alone.z, code.z[1:2])
    for name, penalty in alone.penalties.items():
        torch.testing.assert_close(penalty, code.penalties[name][1:2])
    (gradient,) = torch.autograd.grad(code.z.square().sum(), h)
    assert gradient.isfinite().all() and (gradient != 0).any(dim=(1, 2, 3)).all()
    assert all(value.ndim == 0 for value in code.facts().values())


@pytest.mark.parametrize("kind", [kind for kind in BOTTLENECKS if isinstance(made(kind), Discrete)])
def test_codes_and_latents_stand_for_one_another(kind):
    bottleneck = made(kind)
    indices = torch.arange(bottleneck.codes).view(1, -1, 1)
    z = bottleneck.from_indices(indices)
    assert len(z[0].flatten(1).T.unique(dim=0)) == bottleneck.codes  # no two codes are one latent
    h, _ = inputs(bottleneck)
    found = bottleneck.indices(h)
    assert found.dtype == torch.int64 and found.min() >= 0 and found.max() < bottleneck.codes
    assert torch.equal(bottleneck.posterior(h).mode(), bottleneck.from_indices(found))
    if kind == "vq":  # a code's own vector is nearest to itself
        assert torch.equal(bottleneck.indices(z), indices)


def test_the_wrong_options_are_named():
    for kind, options, message in (
        ("fsq", {"levels": (5, 4)}, "levels: .* 4 whole numbers"),
        ("fsq", {"levels": (5, 4, 1, 3)}, "levels"),
        ("adversarial", {"prior": "cauchy"}, "prior: 'cauchy'; allowed: normal, mixture, swiss_roll"),
    ):
        with pytest.raises(ValueError, match=message):
            made(kind, **options)


# ------------------------------------------------------------------ fsq


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (3, 6, 4, 7)])
def test_fsq_is_the_published_one(levels):
    ours, theirs = FiniteScalarQuantizer(4, levels), FSQ(list(levels))
    h = 3 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    z, indices = theirs(h)
    code = ours(h, torch.empty(2, 0), DIMENSIONS)
    torch.testing.assert_close(code.z, z)
    assert torch.equal(ours.indices(h), indices.long())
    assert torch.equal(ours.from_indices(indices.long()), z)
    assert ours.codes == math.prod(levels) and math.prod(levels) > 0


# ------------------------------------------------------------------ vq


def modes(number, per_mode, seed=0):
    """Latents (B, 2, 1, 1) around `number` centres on a circle, and the centres."""
    generator = torch.Generator().manual_seed(seed)
    angle = torch.arange(number) * 2 * math.pi / number
    centres = 4 * torch.stack((angle.cos(), angle.sin()), dim=1)
    points = centres.repeat(per_mode, 1) + 0.1 * torch.randn(number * per_mode, 2, generator=generator)
    return points[:, :, None, None], centres


def moved(bottleneck, h, steps, seed=3):
    """The bottleneck after so many steps of training on frozen latents."""
    bottleneck.train()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        noise = torch.randn(len(h), *bottleneck.noise_shape((2, 1, 1)), generator=generator)
        bottleneck(h, noise, 1)
        bottleneck.end_step(lambda x: x)
    return bottleneck


@pytest.mark.parametrize("start", ["near", "kmeans"])
def test_a_code_book_of_frozen_latents_converges_to_their_means(start):
    """Each code converges to the mean of a mode, the k-means solution, and all codes are in use."""
    h, centres = modes(7, 40)
    torch.manual_seed(0)
    bottleneck = VectorQuantizer(2, codes=7, decay=0.9)
    if start == "kmeans":
        bottleneck.start(h.flatten(1), seed=0)
    else:
        bottleneck.codebook.copy_(centres + torch.randn(7, 2))
    moved(bottleneck, h, 200)
    owner = bottleneck.indices(h).flatten()
    means = torch.stack([h.flatten(1)[owner == code].mean(dim=0) for code in range(7)])
    torch.testing.assert_close(bottleneck.codebook, means, rtol=0, atol=1e-4)
    facts = bottleneck(h, torch.zeros(len(h), 8), 1).facts()
    assert facts["codes/perplexity"].item() == pytest.approx(7, abs=1e-3)
    assert facts["codes/used"] == 1


def test_without_revival_dead_codes_stay_dead():
    h, _ = modes(7, 40)
    torch.manual_seed(0)
    bottleneck = VectorQuantizer(2, codes=7, decay=0.9, revive_below=0.0)
    bottleneck.codebook[1:] += 100  # but one far away from all latents
    bottleneck.sums[1:] += 100
    moved(bottleneck, h, 50)
    assert len(bottleneck.indices(h).unique()) == 1


def test_the_averages_are_those_of_van_den_oord():
    """Appendix A.1 of van den Oord et al. 2017, by hand; micro-batches and ranks together are one batch."""
    h, _ = modes(5, 6)
    torch.manual_seed(0)
    bottleneck = VectorQuantizer(2, codes=5, decay=0.8, revive_below=0.0).train()
    counts, sums = bottleneck.counts.clone(), bottleneck.sums.clone()
    one_hot = F.one_hot(torch.cdist(h.flatten(1), bottleneck.codebook).argmin(dim=1), 5).float()
    counts = 0.8 * counts + 0.2 * one_hot.sum(dim=0)
    sums = 0.8 * sums + 0.2 * one_hot.T @ h.flatten(1)
    noise = torch.zeros(len(h), 8)
    for part, of_part in zip(h.split(10), noise.split(10), strict=True):
        bottleneck(part, of_part, 1)
    bottleneck.end_step(lambda x: x)
    torch.testing.assert_close(bottleneck.codebook, sums / counts.unsqueeze(1))


def test_the_gradient_of_a_code_book_is_that_of_equation_3():
    bottleneck = made("vq", codebook="gradient", commitment=0.25)
    h, noise = inputs(bottleneck)
    h.requires_grad_()
    code = bottleneck(h, noise, DIMENSIONS)
    sum(penalty.sum() for penalty in code.penalties.values()).backward()
    chosen = bottleneck.codebook.detach()[bottleneck.indices(h)].movedim(-1, 1)
    apart = h.detach() - chosen
    torch.testing.assert_close(h.grad, 0.25 * 2 * apart / apart[0].numel())
    expected = torch.zeros_like(bottleneck.codebook).index_add_(
        0, bottleneck.indices(h).flatten(), (-2 * apart / apart[0].numel()).movedim(1, -1).flatten(0, 2)
    )
    torch.testing.assert_close(bottleneck.codebook.grad, expected)


def test_latents_that_are_not_finite_leave_the_code_book_alone():
    bottleneck = made("vq").train()
    before = bottleneck.codebook.clone()
    h, noise = inputs(bottleneck)
    h[0, 0, 0, 0] = math.nan
    bottleneck(h, noise, 1)
    bottleneck.end_step(lambda x: x)
    assert torch.equal(bottleneck.codebook, before)


def test_kmeans_finds_the_modes_and_does_with_few_vectors():
    h, centres = modes(4, 50)
    found, counts = kmeans(h.flatten(1), 4, seed=0)
    assert torch.cdist(found, centres).min(dim=0).values.max() < 0.1 and counts.sum() == 200
    assert sorted(counts.tolist()) == [50] * 4
    few, _ = kmeans(h.flatten(1)[:3], 8, seed=0)
    assert few.shape == (8, 2) and few.isfinite().all()


# ------------------------------------------------------------------ gumbel, kl, none


def test_gumbel_softmax_at_a_low_temperature_is_the_largest_logit_with_noise():
    bottleneck = made("gumbel", temperature=1e-4)
    h, noise = inputs(bottleneck)
    z = bottleneck(h, noise, DIMENSIONS).z
    chosen = (h + gumbel(noise)).argmax(dim=1)
    torch.testing.assert_close(z, bottleneck.from_indices(chosen))
    still = bottleneck(h, torch.full_like(noise, 0.3), DIMENSIONS).z  # the same noise for each code
    torch.testing.assert_close(still, bottleneck.from_indices(bottleneck.indices(h)))


def test_gumbel_noise_draws_codes_with_the_probabilities_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0])
    noise = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0))
    chosen = (logits + gumbel(noise)).argmax(dim=1)
    share = torch.bincount(chosen) / len(chosen)
    torch.testing.assert_close(share, logits.softmax(0), rtol=0, atol=4 * math.sqrt(0.25 / 200_000))


def test_the_kl_to_equally_likely_codes_is_that_of_torch():
    bottleneck = made("gumbel")
    h, noise = inputs(bottleneck)
    q = torch.distributions.Categorical(logits=h.movedim(1, -1))
    uniform = torch.distributions.Categorical(logits=torch.zeros_like(h).movedim(1, -1))
    kl = torch.distributions.kl_divergence(q, uniform).sum(dim=(1, 2)) / DIMENSIONS
    torch.testing.assert_close(bottleneck(h, noise, DIMENSIONS).penalties["kl"], kl)


def test_the_temperature_falls_geometrically():
    bottleneck = GumbelSoftmax(4, temperature=1.0, final_temperature=0.25, anneal_steps=10)
    found = []
    for step in (0, 5, 10, 50):
        bottleneck.begin_step(step)
        found.append(bottleneck.temperature)
    assert found == pytest.approx([1, 0.5, 0.25, 0.25])


def test_beta_1_is_the_vae():
    """The KL that the bottleneck returns is torch's, and weight 1 leaves it as it is, bit by bit."""
    from train.autoencoder.objective import weighted_kl
    from train.config import KLConfig

    bottleneck = KLBottleneck()
    h, noise = inputs(bottleneck)
    kl = bottleneck(h, noise, DIMENSIONS).penalties["kl"].mean()
    mean, logvar = h.double().chunk(2, dim=1)
    q = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1)).sum(dim=(1, 2, 3))
    assert kl.item() == pytest.approx(expected.mean().item() / DIMENSIONS, rel=1e-6)
    assert torch.equal(weighted_kl(KLConfig(weight=1.0), kl, 0, DIMENSIONS), kl)


def test_sparsity_is_the_mean_absolute_latent():
    h = torch.randn(2, 4, 3, 3)
    penalty = PlainBottleneck(4, sparsity=0.5)(h, torch.empty(2, 0), DIMENSIONS).penalties["sparsity"]
    torch.testing.assert_close(penalty, 0.5 * h.abs().mean(dim=(1, 2, 3)))
