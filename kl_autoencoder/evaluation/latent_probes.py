"""Change latents (noise, rounding, interpolation, flips, rotation, scaling), decode them and measure the result.

Studies use few images, because each image costs some dozen passes through the network. Images are (1, 3, H, W) in
[-1, 1] with sides that are multiples of 2f; latents (1, C, h, w) are the posterior's mode. E is the encoder, D the
decoder.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.autoencoder_kl import KLAutoencoder
from .metrics import LPIPS, MAX_PSNR, psnr

SIGMAS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)  # of noise, in standard deviations of the latents over all channels
SCALES = (0.25, 0.375, 0.5, 0.75)  # factors by which both latents and images are scaled
STEPS = 8  # on the path from one image to another
# what `Study.scales` returns, in this order
SCALE_MEASURES = ("psnr", "lpips", "psnr_encoded", "lpips_encoded")
LPIPS_SIDE = 32  # pixels; LPIPS is not measured on smaller images (AlexNet needs 31)
# for latents standardised to mean 0 and deviation 1 in each channel
HISTOGRAM_EDGES = np.linspace(-5.0, 5.0, 51)


def _resized(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False)


def _halved(x: Tensor) -> Tensor:
    return _resized(x, x.shape[-2] // 2, x.shape[-1] // 2)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip_horizontal": lambda x: x.flip(-1),
    "flip_vertical": lambda x: x.flip(-2),
    "rotate_90": lambda x: x.rot90(1, (-2, -1)),
    "downscale_2": _halved,
}


class Study:
    """The studies of one model.

    moments: statistics of its latents, from `LatentSums.summary`. lpips: None leaves out LPIPS and `path`. The
    noise of image i is drawn with `seed` + i.
    """

    def __init__(self, vae: KLAutoencoder, moments: dict[str, Any], lpips: LPIPS | None, seed: int):
        self.vae, self.lpips, self.seed = vae, lpips, seed
        self.spread = 1 / (moments["scaling_factor"] or 1.0)
        self.mean, self.std = np.array(moments["mean"]), np.array(moments["std"])

    @torch.inference_mode()
    def of_pair(self, pair: list[tuple[int, Tensor]]) -> dict[str, list]:
        """Run all studies on one or two images, given as (number, image): name of study -> list of results.

        The list has one entry per image; that of `path` has one for the pair, and none without a pair or LPIPS.
        """
        found = {name: [] for name in ("noise", "eight_bits", "equivariance", "scales", "histogram", "path")}
        ends = []
        for number, image in pair:
            image = image.to(self.vae.device)
            z = self._encode(image)
            decoded = self._decode(z)
            found["noise"].append(self.noise(number, image, z, decoded))
            found["eight_bits"].append(_capped(psnr(self._decode(rounded_to_8_bits(z)), image)))
            found["equivariance"].append(self.equivariance(image, z, decoded))
            found["scales"].append(self.scales(image, z))
            found["histogram"].append(self.histogram(z))
            ends.append((z, decoded))
        if len(ends) == 2 and self.lpips is not None:
            found["path"].append(self.path(*ends))
        return found

    def noise(
        self, number: int, image: Tensor, z: Tensor, decoded: Tensor
    ) -> list[tuple[float, float, float]]:
        """For each of `SIGMAS`, decode z + sigma e, with the same normal noise e for every sigma.

        Returns tuples of the PSNR against the image, the PSNR against the image decoded from z, and the LPIPS
        against the image. The second PSNR is there because the first hardly changes if reconstructions are poor
        anyway.
        """
        generator = torch.Generator().manual_seed(self.seed + number)
        e = torch.randn(z.shape, generator=generator).to(z.device) * self.spread
        noisy = [decoded, *(self._decode(z + sigma * e) for sigma in SIGMAS[1:])]
        return [
            (_capped(psnr(one, image)), _capped(psnr(one, decoded)), self._lpips(one, image)) for one in noisy
        ]

    def scales(self, image: Tensor, z: Tensor) -> list[tuple[float, float, float, float]]:
        """For each scaling T of `SCALES`: PSNR and LPIPS of D(T z), then of D(E(T x)), all against T x.

        These are the values of `SCALE_MEASURES`. They judge the equivariance that EQ-VAE trains for by decoded
        images, as the encoder's own latents of a small image may differ from scaled ones.
        """
        (height, width), results = z.shape[2:], []
        for scale in SCALES:
            h, w = max(1, round(scale * height)), max(1, round(scale * width))
            wanted = _resized(image, h * image.shape[2] // height, w * image.shape[3] // width).clamp(-1, 1)
            made = self._decode(_resized(z, h, w)), self._decode(self._encode(wanted))
            results.append(
                tuple(v for one in made for v in (_capped(psnr(one, wanted)), self._lpips(one, wanted)))
            )
        return results

    def path(self, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> list[float]:
        """Interpolate linearly between the latents of two images in `STEPS` equal steps.

        start, end: (latents, decoded image). Returns the LPIPS between the decoded images of each step, and last
        that between the two ends.
        """
        (a, first), (b, last) = start, end
        frames = [first, *(self._decode(a + (b - a) * k / STEPS) for k in range(1, STEPS)), last]
        pairs = [*pairwise(frames), (frames[0], frames[-1])]
        return [float(self.lpips(y, x)) for x, y in pairs]

    def equivariance(self, image: Tensor, z: Tensor, decoded: Tensor) -> list[tuple[float, float, float]]:
        """For each transform T of `TRANSFORMS`: (latent error, PSNR, LPIPS).

        The latent error is the root mean square of E(T x) - T E(x) in standard deviations of the latents. PSNR and
        LPIPS compare D(T z) with T D(z).
        """
        results = []
        for transform in TRANSFORMS.values():
            expected = transform(z)
            error = (self._encode(transform(image)) - expected).square().mean().sqrt() / self.spread
            turned, wanted = self._decode(expected), transform(decoded)
            results.append((float(error), _capped(psnr(turned, wanted)), self._lpips(turned, wanted)))
        return results

    def histogram(self, z: Tensor) -> np.ndarray:
        """Histogram over `HISTOGRAM_EDGES` of the latents, standardised channel by channel: counts (50,)."""
        values = z.transpose(0, 1).flatten(1).cpu().double().numpy()
        values = (values - self.mean[:, None]) / np.maximum(self.std, 1e-12)[:, None]
        return np.histogram(values, HISTOGRAM_EDGES)[0]

    def _lpips(self, made: Tensor, image: Tensor) -> float:
        """LPIPS of two images; NaN without the network or for images below `LPIPS_SIDE`."""
        if self.lpips is None or min(image.shape[2:]) < LPIPS_SIDE:
            return float("nan")
        return float(self.lpips(made, image))

    def _encode(self, image: Tensor) -> Tensor:
        return self.vae.encode(image.to(self.vae.dtype)).latent_dist.mode().float()

    def _decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z.to(self.vae.dtype)).sample.float().nan_to_num(-1.0).clamp(-1, 1)


def rounded_to_8_bits(z: Tensor) -> Tensor:
    """Round latents (B, C, h, w) to 256 levels between the smallest and the largest value of each channel."""
    low, high = z.amin(dim=(2, 3), keepdim=True), z.amax(dim=(2, 3), keepdim=True)
    step = ((high - low) / 255).clamp_min(1e-12)
    return low + ((z - low) / step).round() * step


def summary(found: list[dict[str, list]]) -> dict[str, Any]:
    """Average the results of `Study.of_pair` over all pairs, ready for JSON.

    found: in the order of the images, at least one.
    """
    together = {name: [entry for one in found for entry in one[name]] for name in found[0]}
    noise = np.array(together["noise"]).mean(axis=0)  # (sigmas, 3)
    scales = np.array(together["scales"]).mean(axis=0)  # (scales, 4)
    equivariance = np.array(together["equivariance"]).mean(axis=0)
    names = ("latent_error", "image_psnr", "image_lpips")
    result = {
        "images": len(together["noise"]),
        "noise": {
            "sigma": list(SIGMAS),
            "psnr": noise[:, 0].tolist(),
            "psnr_to_noiseless": [None, *noise[1:, 1].tolist()],
            "lpips": _listed(noise[:, 2]),
        },
        "scale": {"scale": list(SCALES)}
        | {name: _listed(scales[:, i]) for i, name in enumerate(SCALE_MEASURES)},
        "eight_bit_latents": {
            "psnr": float(np.mean(together["eight_bits"])),
            "psnr_unrounded": float(noise[0, 0]),
        },
        "equivariance": {
            transform: dict(zip(names, _listed(values), strict=True))
            for transform, values in zip(TRANSFORMS, equivariance, strict=True)
        },
        "histogram": {
            "edges": HISTOGRAM_EDGES.tolist(),
            "counts": np.sum(together["histogram"], axis=0).tolist(),
        },
        "path": None,
    }
    if together["path"]:
        paths = np.array(together["path"])
        steps, ends = paths[:, :-1], paths[:, -1]
        result["path"] = {
            "pairs": len(paths),
            "lpips_of_steps": steps.mean(axis=0).tolist(),
            "lpips_of_ends": float(ends.mean()),
            # a decoder with the same output for all latents has steps of 0
            "unevenness": float((steps.max(axis=1) / np.maximum(steps.mean(axis=1), 1e-12)).mean()),
        }
    return result


def _listed(values: np.ndarray) -> list[float | None]:
    """Convert to a list with None in place of NaN, which JSON lacks."""
    return [None if np.isnan(value) else float(value) for value in values]


def _capped(decibels: Tensor) -> float:
    return float(decibels.clamp(max=MAX_PSNR))
