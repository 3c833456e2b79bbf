"""The configuration of the task `autoencoder`: the sections that it adds to those of every run."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from kl_autoencoder.models.folder import HUB_ID
from kl_autoencoder.models.publishing.hub_card import LICENSE

from ..data.config import DataConfig
from ..parts.bottlenecks import KLBottleneckConfig, belongs_to_the_model, bottleneck_options
from ..parts.views import IdentityConfig
from ..settings import LPIPSNet, Number, Recomputed, Text, Whole, choice, key, section
from .run import LARGE, STEPS, Config, TrainConfig, ValidationConfig

WIDEST, DEEPEST, LEVELS = 65536, 32, 10  # largest numbers of channels, ResNet blocks a level, and levels
Count = int | None
Widths = tuple[Annotated[Whole, Field(ge=1, le=WIDEST)], ...]
Means = tuple[Annotated[Number, Field(ge=-LARGE, le=LARGE)], ...]
Deviations = tuple[Annotated[Number, Field(gt=0, le=LARGE)], ...]
RELATIVE = "Autoencoder"  # this package's class, for models that diffusers has no class for
RELATIVE_KEYS = (
    *("network", "hidden_sizes", "classes", "bottleneck", "in_channels", "out_channels"),
    *("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "sample_size"),
    *("scaling_factor", "mid_block_add_attention"),
)
# `ModelConfig.__post_init__` does not refuse these options beside model.pretrained, or checks them on its own
BESIDE_PRETRAINED = (
    *("decoder_block_out_channels", "latent_channels", "network", "hidden_sizes", "classes", "bottleneck"),
)
# keys of `ModelConfig` that are arguments of no model class, or only of `Autoencoder`
OWN_KEYS = (
    *("pretrained", "subfolder", "kind", "start", "bottleneck", "network", "hidden_sizes", "classes"),
    "label_dropout",
)


@section
class ModelConfig:
    """A new network, by the keys of diffusers' class, or a pretrained one to continue from.

    A key that is not given has the default of that class, or the value of the pretrained model.
    """

    pretrained: str | None = key(
        None, "start from this folder, single file, hub id, or a model in the package, such as compact"
    )
    subfolder: str | None = key(None, "folder in `pretrained` that holds the autoencoder, such as vae")
    kind: Literal["AutoencoderKL", "AutoencoderKLFlux2"] = choice(
        "AutoencoderKL",
        "diffusers' class of a new network; the second normalises patches of latents by statistics that it keeps",
    )
    network: Literal["conv", "mlp"] = choice(
        "conv",
        "the convolutional network of that class, or fully connected layers, for images of one small size",
    )
    hidden_sizes: Widths = key((400,), "widths of an mlp's hidden layers; the decoder has them in reverse")
    classes: int = key(
        0,
        "number of classes of the images; the label modulates encoder and decoder (CVAE); 0: no labels",
        low=0,
        high=10**6,
    )
    label_dropout: float = key(0.0, "share of the training images whose label is left out", low=0, high=1)
    start: Literal["random", "enlargement"] = choice(
        "random",
        "initial weights of a new network: random, or such that it returns the image shrunk and enlarged again, "
        "which saves much of a short training",
    )
    bottleneck: Any = Field(
        KLBottleneckConfig(), description="what lies between encoder and decoder, by its kind"
    )
    in_channels: Count = key(None, "channels of the encoder's input images", low=1, high=WIDEST)
    out_channels: Count = key(None, "channels of the decoder's output images", low=1, high=WIDEST)
    down_block_types: tuple[Text, ...] | None = key(None, "a list of one DownEncoderBlock2D for each level")
    up_block_types: tuple[Text, ...] | None = key(None, "a list of one UpDecoderBlock2D for each level")
    block_out_channels: Widths | None = key(
        None, "channels of each level, the finest first; the downsampling factor f is 2^(levels - 1)"
    )
    decoder_block_out_channels: Widths | None = key(
        None,
        "channels of the decoder's levels, for AutoencoderKLFlux2; with model.pretrained they make a new decoder "
        "for its encoder",
    )
    layers_per_block: Count = key(
        None, "ResNet blocks in each level of the encoder; the decoder has one more", low=1, high=DEEPEST
    )
    act_fn: str | None = key(None, "the nonlinearity, silu")
    latent_channels: Count = key(
        None,
        "channels of the latents; with model.pretrained also more than it has, whose use is then learned, or "
        "fewer, which start as the principal components of its latents",
        low=1,
        high=WIDEST,
    )
    norm_num_groups: Count = key(None, "groups of each GroupNorm", low=1, high=WIDEST)
    sample_size: Count = key(None, "side in pixels of the images that the model is for", low=1, high=WIDEST)
    scaling_factor: float | None = key(
        None,
        "diffusion multiplies latents by this; training measures it anew at its end, unless a term fixes it",
        above=0,
        high=LARGE,
    )
    shift_factor: float | None = key(
        None, "diffusion subtracts this from latents before it scales them", low=-LARGE, high=LARGE
    )
    latents_mean: Means | None = key(None, "mean of each latent channel")
    latents_std: Deviations | None = key(None, "standard deviation of each latent channel")
    force_upcast: bool | None = key(None, "whether pipelines that run in float16 decode in float32")
    use_quant_conv: bool | None = key(None, "whether there is a 1x1 convolution after the encoder")
    use_post_quant_conv: bool | None = key(None, "whether there is a 1x1 convolution before the decoder")
    mid_block_add_attention: bool | None = key(
        None, "whether the middle blocks of encoder and decoder have attention"
    )

    @property
    def class_name(self) -> str:
        """The class of a new model: `kind`, or `Autoencoder` for models that diffusers has no class for."""
        is_relative = self.network == "mlp" or self.classes or belongs_to_the_model(self.bottleneck)
        return RELATIVE if is_relative else self.kind

    def options(self) -> dict[str, Any]:
        """The arguments for the class `class_name` that the configuration gives."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {name: value for name, value in given.items() if value is not None and name not in OWN_KEYS}
        if self.class_name == RELATIVE:
            given |= {name: getattr(self, name) for name in ("network", "hidden_sizes", "classes")}
            given["bottleneck"] = bottleneck_options(self.bottleneck)
        return given

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels or (1,))
        if not 1 <= levels <= LEVELS:
            raise ValueError(f"model.block_out_channels: {levels} levels; allowed: 1 to {LEVELS}")
        given = [name for name in self.options() if name not in BESIDE_PRETRAINED]
        given += ["kind"] if self.kind != "AutoencoderKL" else []
        given += ["bottleneck"] if belongs_to_the_model(self.bottleneck) else []
        given += [name for name in ("classes", "network") if getattr(self, name) not in (0, "conv")]
        if self.pretrained is not None and given:
            raise ValueError(
                f"model.{given[0]}: given beside model.pretrained; allowed: one of the two "
                "(a pretrained model brings its own configuration)"
            )
        if self.pretrained is None:
            self._check_kind()
            if self.label_dropout and not self.classes:
                raise ValueError(
                    f"model.label_dropout: {self.label_dropout} without model.classes; allowed there: 0"
                )
        if self.pretrained is not None and self.start != "random":
            raise ValueError(
                f"model.start: {self.start} beside model.pretrained; allowed: one of the two "
                "(a pretrained model starts from its own weights)"
            )

    def _check_kind(self) -> None:
        if self.class_name == RELATIVE:
            self._check_relative()
            return
        is_flux2 = self.kind == "AutoencoderKLFlux2"
        scaling = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
        others = scaling if is_flux2 else ("decoder_block_out_channels",)
        for name in others:
            if getattr(self, name) is not None:
                allowed = "AutoencoderKL" if is_flux2 else "AutoencoderKLFlux2"
                raise ValueError(f"model.{name}: no key of {self.kind}; allowed: with model.kind={allowed}")

    def _check_relative(self) -> None:
        """Refuse keys that an `Autoencoder` does not have."""
        odd = [name for name in self.options() if name not in RELATIVE_KEYS]
        odd += ["kind"] if self.kind != "AutoencoderKL" else []
        odd += ["start"] if self.start != "random" else []
        if odd:
            raise ValueError(
                f"model.{odd[0]}: no key of a model with network=mlp, classes or a bottleneck other than kl; "
                f"allowed there: {', '.join(RELATIVE_KEYS)}"
            )


@section
class PerceptualConfig:
    """LPIPS (Zhang et al. 2018)."""

    weight: float = key(1.0, "of LPIPS, beside the reconstruction per pixel dimension", low=0, high=LARGE)
    net: LPIPSNet = choice("vgg", "the network whose features are compared")
    shift: int | None = key(
        None,
        "compare windows that are smaller than the images by so many pixels, at a random place in each, as the "
        "autoencoder otherwise adapts to the strides of the network; null: 7 for squeeze and alex, 0 for vgg",
        low=0,
        high=64,
    )
    scale: float | None = key(
        None,
        "enlarge or shrink these windows at random, by at most this factor, all of a step alike; 1: as they are; "
        "null: 2 for squeeze and alex, 1 for vgg",
        low=1,
        high=4,
    )
    bf16: bool = key(
        False,
        "compute the features in bfloat16, in half the memory; values are within 0.4 % of float32, gradients noisy "
        "(cosine 0.8 to 0.99 with those of float32)",
    )
    required: bool = key(
        True,
        "true: an error if LPIPS's weights cannot be found; false: train without the term, with a warning",
    )


@section
class KLConfig:
    """KL(q(z|x) || N(0, I)); KL and reconstruction are both summed over an image, so `weight` is the usual beta."""

    weight: float = key(1e-6, "beta, which multiplies the KL", low=0, high=LARGE)
    warmup_steps: int = key(0, "the weight rises from 0 over so many steps", low=0, high=STEPS)
    warmup: Literal["linear", "cosine"] = choice("linear", "how the weight rises")
    cycle_steps: int | None = key(
        None,
        "the weight starts again from 0 every so many steps (cyclical annealing, Fu et al. 2019); null: once",
        low=1,
        high=STEPS,
    )
    capacity: float | None = key(
        None,
        "in nats an image; the weight then multiplies |KL - capacity| instead of the KL (Burgess et al. 2018)",
        low=0,
        high=1e9,
    )
    capacity_steps: int = key(0, "the capacity rises from 0 over so many steps", low=0, high=STEPS)
    free_bits: float = key(
        0.0, "each channel may use so many bits a latent value without penalty", low=0, high=LARGE
    )


@section
class AdversarialConfig:
    """A patch discriminator against blur."""

    weight: float = key(0.0, "of the adversarial term; 0: no discriminator", low=0, high=LARGE)
    loss: Literal["hinge", "logistic"] = choice("hinge", "the loss that the discriminator minimises")
    disc_start: int = key(50001, "the step from which the discriminator trains", low=0, high=STEPS)
    disc_warmup_steps: int = key(
        0, "steps that the discriminator trains before the autoencoder gets its gradient", low=0, high=STEPS
    )
    ramp_steps: int = key(0, "steps over which the term's weight rises after that", low=0, high=STEPS)
    adaptive: bool = key(True, "multiply the weight by |grad nll| / |grad adversarial|, as VQGAN does")
    adaptive_max: float | None = key(
        None,
        "upper bound of that factor; null: latent diffusion's, 1e4 divided by the number of values of a crop",
        above=0,
        high=1e4,
    )
    lecam_weight: float = key(0.0, "of the LeCam regularisation of the logits", low=0, high=LARGE)
    r1_weight: float = key(0.0, "of the R1 penalty on real images", low=0, high=LARGE)
    r1_every: int = key(16, "steps between two R1 penalties", low=1, high=STEPS)
    channels: int = key(64, "channels of the discriminator's first layer", low=1, high=4096)
    layers: int = key(3, "stride-2 layers of the discriminator", low=1, high=10)
    learning_rate: float | None = key(
        None, "of the discriminator; null: that of the autoencoder", above=0, high=100
    )
    pretrained: bool = key(
        False,
        "continue from the discriminator beside model.pretrained, which export.training_state saved there",
    )


@section
class LatentAdversarialConfig:
    """The discriminator of latents; it is used if model.bottleneck.kind is adversarial."""

    weight: float = key(
        1.0, "of the term that the encoder minimises, per pixel dimension", above=0, high=LARGE
    )
    hidden: int = key(256, "width of the discriminator's two hidden layers", low=1, high=WIDEST)
    learning_rate: float | None = key(
        None, "of the discriminator; null: that of the autoencoder", above=0, high=100
    )


@section
class LossConfig:
    """The terms of the objective."""

    reconstruction: Literal["l1", "l2", "gaussian", "laplace", "bernoulli"] = choice(
        "l1", "the likelihood; gaussian and laplace learn their scale"
    )
    perceptual: PerceptualConfig = PerceptualConfig()
    kl: KLConfig = KLConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    latent_adversarial: LatentAdversarialConfig = LatentAdversarialConfig()
    denoising: float = key(
        0.0,
        "standard deviation of normal noise on the encoder's input; the targets stay clean (Vincent et al. 2008)",
        low=0,
        high=100,
    )
    view: Any = Field(
        IdentityConfig(),
        description="how latents are changed in training before they are decoded, by its kind",
    )
    terms: tuple[Any, ...] = Field((), description="further terms of the objective, each by its kind")


@section
class AutoencoderTrainConfig(TrainConfig):
    """How long, and how a step is computed."""

    gradient_checkpointing: Recomputed = choice(
        "norms",
        "recompute in the backward pass, to save memory: nothing, norms and SiLUs (cheap), or whole blocks",
    )
    decoder_only: bool = key(False, "freeze the encoder, so that latents stay those of the pretrained model")


@section
class AutoencoderValidationConfig(ValidationConfig):
    """PSNR, SSIM and LPIPS of the held-out images."""

    lpips_net: LPIPSNet = choice("alex", "the network that LPIPS measures with")


@section
class ExportConfig:
    """What is written and published at the end of a run."""

    training_state: bool = key(
        False, "save the discriminator and its optimizer beside the model, for another run to continue from"
    )
    push_to: str | None = key(
        None, "owner/name: publish the model there on the hub, with its card, when the run ends"
    )
    license: str | None = key(
        None, "of the published model, as the hub names it: mit, apache-2.0, openrail ..."
    )
    private: bool = key(False, "if the repository has to be created, make it private")
    dry_run: bool = key(False, "do not publish, but write what would be published to output_dir/published")

    def __post_init__(self) -> None:
        if self.push_to is not None and not HUB_ID.fullmatch(self.push_to):
            raise ValueError(f"export.push_to: {self.push_to!r}; allowed: owner/name")
        if self.license is not None and not LICENSE.fullmatch(self.license):
            raise ValueError(f"export.license: {self.license!r}; allowed: an identifier, such as apache-2.0")
        if self.push_to is None and (self.license or self.private or self.dry_run):
            raise ValueError("export.license, private, dry_run: allowed with export.push_to: owner/name")


@section
class AutoencoderConfig(Config):
    """A run that trains an autoencoder."""

    task: Literal["autoencoder"] = choice("autoencoder", "what is trained")
    data: DataConfig = Field()
    train: AutoencoderTrainConfig = AutoencoderTrainConfig()
    validation: AutoencoderValidationConfig = AutoencoderValidationConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    export: ExportConfig = ExportConfig()

    def __post_init__(self) -> None:
        adversarial, steps = self.loss.adversarial, self.train.steps
        felt = adversarial.disc_start + adversarial.disc_warmup_steps
        if adversarial.weight and felt >= steps:
            raise ValueError(
                f"loss.adversarial.disc_start: {adversarial.disc_start} (felt from step {felt} on) in a run of "
                f"{steps} steps; allowed: below train.steps, or loss.adversarial.weight=0"
            )
        if adversarial.weight and self.model.network == "mlp":
            raise ValueError(
                f"loss.adversarial.weight: {adversarial.weight} with model.network=mlp; allowed there: 0 (patches "
                "are judged, and the adaptive weight is that of a convolution)"
            )
        if self.train.decoder_only and self.model.pretrained and self.model.latent_channels is not None:
            raise ValueError(
                f"model.latent_channels: {self.model.latent_channels} beside model.pretrained with "
                "train.decoder_only; allowed: where the encoder is trained, too"
            )
        if self.export.training_state and not adversarial.weight:
            raise ValueError(
                "export.training_state: true in a run without a discriminator; allowed: with "
                "loss.adversarial.weight above 0"
            )
        if adversarial.pretrained and not (adversarial.weight and self.model.pretrained):
            raise ValueError(
                "loss.adversarial.pretrained: true; allowed: with loss.adversarial.weight above 0 and "
                "model.pretrained, the exported model that the discriminator belongs to"
            )
