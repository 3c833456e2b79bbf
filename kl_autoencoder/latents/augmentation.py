"""Make variants of images: by posterior noise, between two members of a class, or drawn from the prior by class.

A variant depends only on the model, the seed, its kind, its image and its number, and for `between` on the members
of its class. It stays the same when images of other classes are added.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.image_io import pad_to_multiple

# Kinds. noise: z ~ q(z|x). between: a point on the line to the latents of another member of the class (DeVries and
# Taylor 2017). drawn: z ~ p(z), decoded with the class as label, which needs a conditional model.
NEAR_OTHER = 0.5  # `between` mixes in the other image with a random weight from 0 to this


class Variant(NamedTuple):
    """A variant to be made: the `number`-th of this kind for the image `name`, a path such as cats/a.png."""

    kind: str
    name: str
    number: int


def class_of(name: str) -> str:
    """The class of an image: the name of its folder, as with `data.labels: folders`; "" if it has none."""
    return PurePosixPath(name).parent.name


class Augmenter:
    """Makes variants with a model that has `encode(images).latent_dist` and `decode(z).sample`.

    read: function of a name and a size, (height, width) or None for the image's own, that returns the image
    (1, C, H, W) in [-1, 1]. names: of all images. strength: factor of the posterior's deviation in `noise`.

    A conditional model is given the class number of each image: the position of its folder's name among all of them
    in sorted order, as with `data.labels: folders`. Raises ValueError if their number differs from the model's.
    """

    def __init__(
        self,
        vae: Any,
        read: Callable[[str, tuple[int, int] | None], Tensor],
        names: Sequence[str],
        seed: int = 0,
        strength: float = 1.0,
    ):
        self.vae, self.read, self.seed, self.strength = vae, read, seed, strength
        self.members: dict[str, list[str]] = {}
        for name in names:
            self.members.setdefault(class_of(name), []).append(name)
        self.order = sorted(self.members)
        classes = getattr(vae.config, "classes", None)
        self.knows_classes = bool(classes)
        if classes and len(self.order) != classes:
            raise ValueError(f"{len(self.order)} class folders; allowed: {classes}, which the model knows")

    def plan(self, kinds: Sequence[str], each: int) -> list[Variant]:
        """List the variants to make: `each` of each kind for each image, no `between` in a class with one member.

        kinds: noise, between or drawn. Raises ValueError for `drawn` with a model that is not conditional.
        """
        if "drawn" in kinds and not self.knows_classes:
            raise ValueError("drawn: the model knows no classes; allowed: noise, between")
        return [
            Variant(kind, name, number)
            for group in self.order
            for name in self.members[group]
            for kind in kinds
            if kind != "between" or len(self.members[group]) > 1
            for number in range(each)
        ]

    @torch.inference_mode()
    def make(self, variant: Variant) -> Tensor:
        """Make a variant: (1, C, H, W), float32 on the CPU, of the size of its image and about in [-1, 1].

        Raises ValueError for `noise` if the model has no posterior, and the errors of `read`.
        """
        generator = torch.Generator().manual_seed(self._seed_of(variant))
        image = self.read(variant.name, None)
        height, width = image.shape[2:]
        ways = {"noise": self._noise, "between": self._between, "drawn": self._drawn}
        z = ways[variant.kind](variant.name, image, generator)
        return self._call(self.vae.decode, z, variant.name).sample.float().cpu()[:, :, :height, :width]

    def _noise(self, name: str, image: Tensor, generator: torch.Generator) -> Tensor:
        posterior = self._posterior(image, name)
        if not hasattr(posterior, "std"):
            raise ValueError("noise: the model's encoder has no posterior; allowed: between")
        draw = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        return posterior.mean + self.strength * posterior.std * draw

    def _between(self, name: str, image: Tensor, generator: torch.Generator) -> Tensor:
        others = [other for other in self.members[class_of(name)] if other != name]
        other = others[int(torch.randint(len(others), (), generator=generator))]
        share = NEAR_OTHER * float(torch.rand((), generator=generator))
        images = image, self.read(other, tuple(image.shape[2:]))
        a, b = (self._posterior(one, name).mode() for one in images)
        return torch.lerp(a, b, share)

    def _drawn(self, name: str, image: Tensor, generator: torch.Generator) -> Tensor:
        shape = self._posterior(image, name).mode().shape
        return torch.randn(shape, generator=generator).to(self.vae.device, self.vae.dtype)

    def _posterior(self, image: Tensor, name: str) -> Any:
        padded = pad_to_multiple(image, self.vae.size_multiple).to(self.vae.device, self.vae.dtype)
        return self._call(self.vae.encode, padded, name).latent_dist

    def _call(self, method: Callable, x: Tensor, name: str) -> Any:
        """Call `encode` or `decode`, with the class of the image `name` if the model is conditional."""
        if not self.knows_classes:
            return method(x)
        return method(x, labels=torch.tensor([self.order.index(class_of(name))], device=x.device))

    def _seed_of(self, variant: Variant) -> int:
        told = f"{self.seed}/{variant.kind}/{variant.name}/{variant.number}".encode()
        return int.from_bytes(hashlib.sha256(told).digest()[:7], "big")
