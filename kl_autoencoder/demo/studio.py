"""`Studio`: one method for each tab of the page, which takes a visitor's choices and returns HTML.

It is independent of Gradio. Mistakes of the visitor raise ValueError or OSError with one sentence.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from torch import Tensor

from ..codec.public import codec_of
from ..evaluation.metrics import LPIPS, psnr
from ..latents import interpolation
from ..models.autoencoder_kl import ExactAutoencoder
from ..networks.distributions import DiagonalGaussian
from . import latent_edits, latent_pictures, photographs, reconstruction, rendering
from .photographs import Photograph
from .picture_files import PictureFiles
from .reconstruction import Outcome
from .rendering import Choice

EDITED_SIDE = 512  # longest side in pixels, where photographs keep their aspect ratio
SQUARE = 256  # pixels a side of photographs that must be of one size, and of samples
SAMPLES = 4
KEPT = 32  # posteriors in the cache, those used last
NO_PHOTOGRAPH = "choose a photograph first"


class Studio:
    """The work behind the page.

    models: name -> model. lpips: None leaves LPIPS out. files: where pictures for the page are written. In all
    methods `path`, `a` and `b` are files of photographs or None, and without them most methods return empty HTML.
    Methods must not be called at the same time, because a model is prepared for the size of each photograph.
    """

    def __init__(self, models: Mapping[str, ExactAutoencoder], lpips: LPIPS | None, files: PictureFiles):
        self.models, self.lpips, self.files = dict(models), lpips, files
        self._codec = lru_cache(maxsize=None)(lambda model: codec_of(self.models[model]))
        self._posterior = lru_cache(maxsize=KEPT)(self._encoded)

    def reconstruct(self, path: str | None, longest: int | None) -> tuple[str, str]:
        """Reconstruct the photograph by every model, JPEG and WebP: the comparison and the table of metrics.

        longest: longest side in pixels, None for every pixel.
        """
        if not path:
            return "", ""
        photograph = photographs.read_photograph(path, longest)
        outcomes = list(reconstruction.compare(self.models, photograph.images, self.lpips))
        return self._rendered(photograph, outcomes, rendering.OF_LATENTS)

    def latents(self, path: str | None, model: str) -> str:
        """Show the principal components of the latents as one colour picture, and each channel in gray."""
        if not path:
            return ""
        z = self._posterior(path, model, EDITED_SIDE).mode()
        components, share = latent_pictures.principal_components(z)
        shown = [("principal components", latent_pictures.component_picture(components))]
        channels = latent_pictures.channel_pictures(z).split(1)
        shown += [(f"channel {i}", channel) for i, channel in enumerate(channels)]
        shares = ", ".join(f"{100 * s:.0f} %" for s in share.tolist())
        _, count, height, width = z.shape
        text = (
            f"{count} channels of {width}x{height} numbers. In each channel gray is its mean. Red, green and blue "
            "are the directions in which the latents differ most from place to place, "
            f"with {shares} of their variance."
        )
        return rendering.pictures(shown, self._address, text, pixels=True)

    def compress(self, path: str | None, model: str, quality: int) -> tuple[str, str]:
        """Compress the photograph by the codec, and by JPEG and WebP to equal size: comparison and table."""
        if not path:
            return "", ""
        photograph = photographs.read_photograph(path, EDITED_SIDE)
        outcomes = list(
            reconstruction.compress(model, self._codec(model), photograph.images, int(quality), self.lpips)
        )
        return self._rendered(photograph, outcomes, rendering.OF_FILES)

    def noise(self, path: str | None, model: str, level: float, seed: int) -> str:
        """Compare images decoded from latents with and without noise of `level` deviations of each channel."""
        if not path:
            return ""
        vae, size = self.models[model], photographs.read_photograph(path, EDITED_SIDE).size
        z = self._posterior(path, model, EDITED_SIDE).mode()
        clean, changed = latent_edits.decode(vae, z, size), latent_edits.noisy(z, level, seed)
        changed = latent_edits.decode(vae, changed, size)
        values = [f"PSNR {psnr(changed, clean).clamp(max=99.99).item():.2f} dB"]
        choice = Choice("with noise", f"{level:g} deviations of each channel", changed, values)
        return rendering.comparison("no noise", clean, [choice], self._address)

    def between(self, a: str | None, b: str | None, model: str, place: float, spherical: bool) -> str:
        """Show the reconstructions of two photographs, and the image decoded at `place`, 0 to 1, between them."""
        if not a or not b:
            return ""
        vae, size = self.models[model], photographs.read_photograph(a, EDITED_SIDE).size
        first = self._posterior(a, model, EDITED_SIDE).mode()
        second = latent_edits.encode(vae, photographs.read_cropped(b, size)).mode()
        mixed = latent_edits.between(first, second, place, spherical)
        images = [latent_edits.decode(vae, z, size) for z in (first, mixed, second)]
        captions = ("first", f"{place:.0%} of the way", "second")
        return rendering.pictures(list(zip(captions, images, strict=True)), self._address)

    def attribute(
        self, path: str | None, plus: Sequence[str], minus: Sequence[str], model: str, strength: float
    ) -> str:
        """Change the photograph along the attribute that photographs in `plus` have and those in `minus` lack."""
        if not path:
            raise ValueError(NO_PHOTOGRAPH)
        if not plus or not minus:
            raise ValueError(
                "add photographs with the attribute and photographs without it, one of each at least"
            )
        vae, z = self.models[model], self._posterior(path, model, -SQUARE).mode()
        sets = ([self._posterior(photo, model, -SQUARE) for photo in paths] for paths in (plus, minus))
        direction = latent_edits.attribute(*sets)
        before, after = (latent_edits.decode(vae, w) for w in (z, z + strength * direction))
        choice = Choice(f"strength {strength:+g}", f"{len(plus)} with, {len(minus)} without", after)
        return rendering.comparison("strength 0", before, [choice], self._address)

    def samples(self, path: str | None, model: str, fitted: bool, seed: int) -> str:
        """Decode draws from N(0, I) or, if `fitted`, from a Gaussian fitted to the photograph's channels."""
        vae = self.models[model]
        side = SQUARE // vae.downsampling
        gaussian = interpolation.standard_normal(vae.config.latent_channels, side, side)
        text = (
            "Drawn from N(0, I), to which the KL term pulls latents: where it was weak, these are no images."
        )
        if fitted:
            if not path:
                raise ValueError(NO_PHOTOGRAPH)
            gaussian = interpolation.fitted([self._posterior(path, model, -SQUARE)], "channel")
            text = (
                "Drawn from a Gaussian with the mean and variance that each channel has in the photograph: its "
                "colours, and nothing of where they are. What gives samples a shape is a diffusion model."
            )
        images = latent_edits.decode(vae, latent_edits.draws(gaussian, SAMPLES, seed)).split(1)
        shown = [(f"sample {seed + i}", image) for i, image in enumerate(images)]
        return rendering.pictures(shown, self._address, text)

    def _rendered(self, photograph: Photograph, outcomes: Sequence[Outcome], about: str) -> tuple[str, str]:
        return (
            rendering.reconstructions(photograph, outcomes, self._address),
            rendering.table(photograph, outcomes, about),
        )

    def _encoded(self, path: str, model: str, side: int) -> DiagonalGaussian:
        """The posterior of a photograph scaled down to longest side `side`; for -side, of its centre square."""
        if side < 0:
            images = photographs.read_square(path, -side)
        else:
            images = photographs.read_photograph(path, side).images
        return latent_edits.encode(self.models[model], images)

    def _address(self, images: Tensor) -> str:
        return f"pictures/{self.files.add(images)}"
