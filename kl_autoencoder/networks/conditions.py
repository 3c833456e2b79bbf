"""Class conditions: an embedding of the label modulates the layers of a network (CVAE, Sohn et al. 2015)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolutional import Checkpointing, Decoder, Encoder, ResnetBlock, recomputed

EMBEDDING = 64  # width of a label's embedding


class ClassCondition(nn.Module):
    """A scale and a shift for each modulated layer, computed from the embedding of the label.

    x (1 + scale) + shift (FiLM, Perez et al. 2018; after norms, Dhariwal & Nichol 2021); scale and shift start at
    0.

    Args:
        classes: number of classes. Labels are 0 to classes - 1; the label `classes` stands for "no label". Label
            dropout trains it, and images without a label get it.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes
        self.embedding = nn.Embedding(classes + 1, EMBEDDING)
        self.projections = nn.ModuleList()

    def add(self, channels: int) -> None:
        """Add a modulated layer with this many channels; layers are numbered from 0 in the order they are added."""
        projection = nn.Linear(EMBEDDING, 2 * channels)
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
        self.projections.append(projection)

    def modulate(self, number: int, x: Tensor, labels: Tensor | None) -> Tensor:
        """Modulate x (B, C, ...) of layer `number` by labels (B,); None: no image has a label."""
        if labels is None:
            labels = torch.full((len(x),), self.classes, device=x.device)
        scale, shift = self.projections[number](self.embedding(labels)).chunk(2, dim=1)
        shape = (*scale.shape, *[1] * (x.ndim - 2))
        return x * (1 + scale.view(shape)) + shift.view(shape)


class _Conditional(Checkpointing):
    """The common part of the conditional encoder and decoder: the second norm of each ResNet block is modulated."""

    condition: ClassCondition

    def _add_condition(self, classes: int) -> None:
        self.condition = ClassCondition(classes)
        blocks = [module for module in self.modules() if isinstance(module, ResnetBlock)]
        for number, block in enumerate(blocks):
            block.modulation = number  # number of its layer in `condition`
            self.condition.add(block.norm2.num_channels)

    def _call(self, block: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
        if not isinstance(block, ResnetBlock):
            return block(x)
        if torch.is_grad_enabled():
            return recomputed(self._resnet, block, x, labels)
        return self._resnet(block, x, labels)

    def _resnet(self, block: ResnetBlock, x: Tensor, labels: Tensor | None) -> Tensor:
        h = block.conv1(F.silu(block.norm1(x)))
        h = self.condition.modulate(block.modulation, block.norm2(h), labels)
        return block.conv_shortcut(x) + block.conv2(F.silu(h))

    def _run(self, blocks: list[nn.Module], x: Tensor, labels: Tensor | None) -> Tensor:
        for stage in blocks:
            for block in stage.blocks():
                x = self._call(block, x, labels)
        return x


class ConditionalEncoder(_Conditional, Encoder):
    """`Encoder` with labels: (B, in_channels, H, W), (B,) -> (B, 2*latent_channels, H/f, W/f)."""

    def __init__(self, *shape, classes: int):
        super().__init__(*shape)
        self._add_condition(classes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self._run([*self.down_blocks, self.mid_block], self.conv_in(x), labels)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class ConditionalDecoder(_Conditional, Decoder):
    """`Decoder` with labels: (B, latent_channels, h, w), (B,) -> (B, out_channels, f*h, f*w)."""

    def __init__(self, *shape, classes: int):
        super().__init__(*shape)
        self._add_condition(classes)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.conv_out(self.features(z, labels))

    def features(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents -> the input of `conv_out`: (B, first width, f*h, f*w)."""
        x = self._run([self.mid_block, *self.up_blocks], self.conv_in(z), labels)
        return F.silu(self.conv_norm_out(x))
