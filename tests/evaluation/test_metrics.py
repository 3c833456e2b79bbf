"""PSNR and SSIM against scikit-image, MS-SSIM against its definition, LPIPS against the lpips package."""

import lpips
import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kl_autoencoder.evaluation.metrics import LPIPS, ms_ssim, psnr, ssim, to_8_bits


@pytest.fixture
def pair():
    """Two photographs and noisy copies, (2, 3, 96, 80)."""
    photos = np.stack([data.astronaut()[100:196, 180:260], data.coffee()[100:196, 200:280]])
    images = torch.from_numpy(photos).permute(0, 3, 1, 2) / 127.5 - 1
    return images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)), images


def test_psnr_and_ssim_equal_scikit_image(pair):
    for i, (a, b) in enumerate(zip(*(to_8_bits(x).permute(0, 2, 3, 1).numpy() for x in pair), strict=True)):
        assert psnr(*pair)[i].item() == pytest.approx(peak_signal_noise_ratio(b, a), abs=1e-9)
        channels = [
            structural_similarity(
                a[..., c],
                b[..., c],
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=255,
            )
            for c in range(3)
        ]
        assert ssim(*pair)[i].item() == pytest.approx(np.mean(channels), abs=1e-9)


def test_images_are_rounded_to_8_bits_first():
    flat = torch.zeros(1, 3, 16, 16)
    assert to_8_bits(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]
    assert psnr(flat + 1e-4, flat).isinf() and ssim(flat + 1e-4, flat) == 1


def test_ms_ssim_is_that_of_wang_2003():
    photo = torch.from_numpy(data.astronaut()[:178, 100:300].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    noisy = photo + 0.3 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(0))
    bell = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    channels = []
    for x, y in zip(*(to_8_bits(i)[0].double().numpy() for i in (noisy, photo)), strict=True):
        product = 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            mx, my, xx, yy, xy = (fftconvolve(a, window, "valid") for a in (x, y, x * x, y * y, x * y))
            contrast = (2 * (xy - mx * my) + 58.5225) / (xx - mx**2 + yy - my**2 + 58.5225)
            luminance = (2 * mx * my + 6.5025) / (mx**2 + my**2 + 6.5025) if scale == 4 else 1
            product *= np.mean(contrast * luminance) ** weight
            x, y = (_halved(a) for a in (x, y))
        channels.append(product)
    assert ms_ssim(noisy, photo).item() == pytest.approx(np.mean(channels), abs=1e-5)
    with pytest.raises(ValueError, match="160x200; allowed: 161x161"):
        ms_ssim(photo[:, :, :160], photo[:, :, :160])


def _halved(a):
    """Means of 2x2; an odd side begins with half of its first pixels, as zeros beside them make it."""
    padded = np.pad(a, [(n % 2, n % 2) for n in a.shape])
    padded = padded[: padded.shape[0] // 2 * 2, : padded.shape[1] // 2 * 2]
    return padded.reshape(padded.shape[0] // 2, 2, -1, 2).mean(axis=(1, 3))


def test_ssim_refuses_images_below_its_window():
    with pytest.raises(ValueError, match="8x8; allowed: 11x11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_lpips_equals_the_package(pair, lpips_net):
    ours, theirs = LPIPS(lpips_net), lpips.LPIPS(net=lpips_net, verbose=False)
    noisy, images = pair
    x, y = noisy.clone().requires_grad_(), noisy.clone().requires_grad_()
    distance, expected = ours(x, images), theirs(y, images).flatten()
    torch.testing.assert_close(distance, expected, rtol=1e-5, atol=1e-6)
    distance.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=1e-4 * y.grad.abs().max().item())
    assert all(p.grad is None for p in ours.parameters()) and not ours.train().training


def test_lpips_gradient_is_finite_on_flat_images(lpips_net):
    flat = torch.full((1, 3, 64, 64), -1.0, requires_grad=True)
    LPIPS(lpips_net)(flat, torch.zeros(1, 3, 64, 64)).sum().backward()
    assert flat.grad.isfinite().all() and flat.grad.abs().max() > 0


def test_a_missing_backbone_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(b"not weights")
    with pytest.raises(FileNotFoundError, match=r"LPIPS \(alex\): alexnet-owt-7be5be79.pth.*TORCH_HOME"):
        LPIPS("alex")
    with pytest.raises(ValueError, match="'vgg19'; allowed: vgg, alex, squeeze"):
        LPIPS("vgg19")


def test_lpips_on_bfloat16_features_has_nearly_the_value_and_a_noisy_gradient(lpips_net):
    generator = torch.Generator().manual_seed(0)
    a = torch.nn.functional.interpolate(torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1, scale_factor=8)
    b = a + 0.2 * torch.randn(a.shape, generator=generator)
    found = []
    for bf16 in (False, True):
        x = b.clone().requires_grad_()
        distances = LPIPS(lpips_net, bf16)(x, a)
        found.append((distances, *torch.autograd.grad(distances.sum(), x)))
    (exact, gradient), (near, noisy) = found
    assert near.dtype == noisy.dtype == torch.float32
    assert 0 < (near / exact - 1).abs().max() < 0.02
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), noisy.flatten(), 0).item()
    assert 0.8 < cosine < 0.99999
    assert noisy.norm().item() == pytest.approx(gradient.norm().item(), rel=0.1)
