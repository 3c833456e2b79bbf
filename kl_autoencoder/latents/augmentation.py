"""More images like those that there are: variants by posterior noise, between members of a class, drawn by class.

Each is a function of the model, the seed and its own name, and for `between` of the members of its class: it stays
the same when images of other classes are added.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.image_io import pad_to_multiple

# noise: z ~ q(z|x), the posterior. between: on the line to the latent of another member of the class (DeVries and
# Taylor 2017). drawn: z ~ p(z), decoded as the class, which needs a model with classes.
NEAR_OTHER = 0.5  # the share of the other image in a variant between two goes from 0 to this


class Variant(NamedTuple):
    """A picture to be made: number `number` of this kind for image `name`, a path such as cats/a.png."""

    kind: str
    name: str
    number: int


def class_of(name: str) -> str:
    """The class of an image: the folder that it lies in, as `data.labels: folders` has it; "" without one."""
    return PurePosixPath(name).parent.name


class Augmenter:
    """Makes variants with a model that has `encode(images).latent_dist` and `decode(z).sample`.

    read: from a name, and (height, width) or None for its own size, to an image (1, C, H, W) in [-1, 1]. names: of
    all images. A model with classes is told the class of each image: its number is the place of its folder's name
    among those of all in sorted order, as `data.labels: folders` numbers them. Raises ValueError for another number
    of classes than the model knows.
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
        """`each` variants of each kind for each image. Of a class with one member there is nothing `between`.

        Raises ValueError for `drawn` from a model without classes.
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
        """The picture, (1, C, H, W) in [-1, 1] on the CPU, of the size of its image.

        Raises ValueError for `noise` from a model whose encoder has none, and as `read`.
        """
        generator = torch.Generator().manual_seed(self._number(variant))
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
        """encode or decode, with the class where the model knows classes."""
        if not self.knows_classes:
            return method(x)
        return method(x, labels=torch.tensor([self.order.index(class_of(name))], device=x.device))

    def _number(self, variant: Variant) -> int:
        told = f"{self.seed}/{variant.kind}/{variant.name}/{variant.number}".encode()
        return int.from_bytes(hashlib.sha256(told).digest()[:7], "big")
