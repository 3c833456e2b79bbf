"""The configuration of the task `autoencoder`: what it has beside the sections of every run."""

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

WIDEST, DEEPEST, LEVELS = 65536, 32, 10  # of networks: channels, ResNet blocks a level, levels
Count = int | None
Widths = tuple[Annotated[Whole, Field(ge=1, le=WIDEST)], ...]
Means = tuple[Annotated[Number, Field(ge=-LARGE, le=LARGE)], ...]
Deviations = tuple[Annotated[Number, Field(gt=0, le=LARGE)], ...]
RELATIVE = "Autoencoder"  # the class of what diffusers has none for
RELATIVE_KEYS = (
    *("network", "hidden_sizes", "classes", "bottleneck", "in_channels", "out_channels"),
    *("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "sample_size"),
    *("scaling_factor", "mid_block_add_attention"),
)
BESIDE_PRETRAINED = ("decoder_block_out_channels", "network", "hidden_sizes", "classes", "bottleneck")
# of the keys below those that are no argument of the model's class, or of an `Autoencoder` alone
OWN_KEYS = (
    *("pretrained", "subfolder", "kind", "start", "bottleneck", "network", "hidden_sizes", "classes"),
    "label_dropout",
)


@section
class ModelConfig:
    """A new network by the keys of diffusers' class, or a pretrained one to go on from.

    What is left out is that class's default, or what the pretrained model says.
    """

    pretrained: str | None = key(
        None, "start from this folder, single file, hub id, or compact, the model in the package"
    )
    subfolder: str | None = key(None, "where in `pretrained` the autoencoder is, such as vae")
    kind: Literal["AutoencoderKL", "AutoencoderKLFlux2"] = choice(
        "AutoencoderKL",
        "diffusers' class of a new network; the second normalises patches of latents by statistics of its own",
    )
    network: Literal["conv", "mlp"] = choice(
        "conv", "the network of that class, or fully connected layers, for images of one small size"
    )
    hidden_sizes: Widths = key((400,), "widths of an mlp's hidden layers; the decoder has them in reverse")
    classes: int = key(
        0,
        "classes of the images, whose label modulates both networks (CVAE); 0: no labels",
        low=0,
        high=10**6,
    )
    label_dropout: float = key(0.0, "share of the training images whose label is left out", low=0, high=1)
    start: Literal["random", "enlargement"] = choice(
        "random",
        "what a new network computes: random numbers, or the shrunk image enlarged again, which saves much of a "
        "short training",
    )
    bottleneck: Any = Field(
        KLBottleneckConfig(), description="what lies between encoder and decoder, by its kind"
    )
    in_channels: Count = key(None, "channels of the images that go in", low=1, high=WIDEST)
    out_channels: Count = key(None, "channels of the images that come out", low=1, high=WIDEST)
    down_block_types: tuple[Text, ...] | None = key(None, "one DownEncoderBlock2D a level")
    up_block_types: tuple[Text, ...] | None = key(None, "one UpDecoderBlock2D a level")
    block_out_channels: Widths | None = key(None, "width of each level; f = 2^(levels - 1)")
    decoder_block_out_channels: Widths | None = key(
        None,
        "widths of the decoder's levels, of AutoencoderKLFlux2; beside model.pretrained a new decoder for its "
        "encoder",
    )
    layers_per_block: Count = key(
        None, "ResNet blocks a level of the encoder; the decoder has one more", low=1, high=DEEPEST
    )
    act_fn: str | None = key(None, "the nonlinearity; silu")
    latent_channels: Count = key(None, "channels of the latents", low=1, high=WIDEST)
    norm_num_groups: Count = key(None, "groups of each GroupNorm", low=1, high=WIDEST)
    sample_size: Count = key(None, "side in pixels of the images that the model is for", low=1, high=WIDEST)
    scaling_factor: float | None = key(
        None,
        "what latents are multiplied by for diffusion; measured at the end of a training in any case",
        above=0,
        high=LARGE,
    )
    shift_factor: float | None = key(
        None, "what is subtracted from latents before they are scaled", low=-LARGE, high=LARGE
    )
    latents_mean: Means | None = key(None, "mean of each latent channel")
    latents_std: Deviations | None = key(None, "standard deviation of each latent channel")
    force_upcast: bool | None = key(None, "whether pipelines decode in float32 where they run in float16")
    use_quant_conv: bool | None = key(None, "a 1x1 convolution after the encoder")
    use_post_quant_conv: bool | None = key(None, "a 1x1 convolution before the decoder")
    mid_block_add_attention: bool | None = key(None, "attention in the middle of encoder and decoder")

    @property
    def class_name(self) -> str:
        """The class of a new model: `kind`, or `Autoencoder` for what diffusers has no class for."""
        is_relative = self.network == "mlp" or self.classes or belongs_to_the_model(self.bottleneck)
        return RELATIVE if is_relative else self.kind

    def options(self) -> dict[str, Any]:
        """The arguments of that class that were given."""
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
    bf16: bool = key(
        False,
        "compute its features in bfloat16, half their memory; values within 0.4 %, gradients noisy (cosine 0.8 to "
        "0.99 with those of float32)",
    )
    required: bool = key(
        True, "false: go on without the term, with a warning, where its weights cannot be had"
    )


@section
class KLConfig:
    """KL(q(z|x) || N(0, I)), summed over an image, beside the reconstruction summed over it."""

    weight: float = key(1e-6, "beta: multiplies the KL", low=0, high=LARGE)
    warmup_steps: int = key(0, "the weight rises from 0 over so many steps", low=0, high=STEPS)
    warmup: Literal["linear", "cosine"] = choice("linear", "how it rises")
    cycle_steps: int | None = key(
        None, "it falls to 0 again each so many steps (cyclical annealing, Fu et al. 2019)", low=1, high=STEPS
    )
    capacity: float | None = key(
        None,
        "nats an image: the weight multiplies |KL - capacity| instead (Burgess et al. 2018)",
        low=0,
        high=1e9,
    )
    capacity_steps: int = key(0, "the capacity rises from 0 over so many steps", low=0, high=STEPS)
    free_bits: float = key(0.0, "bits a latent value that each channel has for nothing", low=0, high=LARGE)


@section
class AdversarialConfig:
    """A patch discriminator against blur."""

    weight: float = key(0.0, "of the adversarial term; 0 is a run without a discriminator", low=0, high=LARGE)
    loss: Literal["hinge", "logistic"] = choice("hinge", "what the discriminator minimises")
    disc_start: int = key(50001, "the step from which the discriminator trains", low=0, high=STEPS)
    disc_warmup_steps: int = key(0, "so many steps later the autoencoder feels it", low=0, high=STEPS)
    ramp_steps: int = key(0, "and over so many steps its weight rises", low=0, high=STEPS)
    adaptive: bool = key(True, "multiply the weight by |grad nll| / |grad adversarial|, as VQGAN does")
    adaptive_max: float | None = key(
        None,
        "the most that it is multiplied by; null is latent diffusion's clamp, 1e4 over the values of a crop",
        above=0,
        high=1e4,
    )
    lecam_weight: float = key(0.0, "of the LeCam regularisation of the logits", low=0, high=LARGE)
    r1_weight: float = key(0.0, "of the R1 penalty on real images", low=0, high=LARGE)
    r1_every: int = key(16, "steps between two R1 penalties", low=1, high=STEPS)
    channels: int = key(64, "width of the discriminator's first layer", low=1, high=4096)
    layers: int = key(3, "stride-2 layers of the discriminator", low=1, high=10)
    learning_rate: float | None = key(
        None, "of the discriminator; null is the autoencoder's", above=0, high=100
    )
    pretrained: bool = key(
        False, "go on from the discriminator that the run of model.pretrained kept (export.training_state)"
    )


@section
class LatentAdversarialConfig:
    """The discriminator of latents, where model.bottleneck.kind is adversarial."""

    weight: float = key(
        1.0, "of the term that the encoder minimises, per pixel dimension", above=0, high=LARGE
    )
    hidden: int = key(256, "width of the discriminator's two hidden layers", low=1, high=WIDEST)
    learning_rate: float | None = key(
        None, "of the discriminator; null is the autoencoder's", above=0, high=100
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
        "deviation of normal noise on the images for the encoder; the targets stay clean (Vincent et al. 2008)",
        low=0,
        high=100,
    )
    view: Any = Field(
        IdentityConfig(), description="what happens to latents before they are decoded, by its kind"
    )
    terms: tuple[Any, ...] = Field((), description="further terms of the objective, each by its kind")


@section
class AutoencoderTrainConfig(TrainConfig):
    """How long, and how a step is computed."""

    gradient_checkpointing: Recomputed = choice(
        "norms", "computed again in the backward pass: nothing, norms and SiLUs (cheap), or whole blocks"
    )
    decoder_only: bool = key(False, "freeze the encoder: the latents stay those of a model that exists")


@section
class AutoencoderValidationConfig(ValidationConfig):
    """PSNR, SSIM and LPIPS of the held-out images."""

    lpips_net: LPIPSNet = choice("alex", "the network that LPIPS measures with")


@section
class ExportConfig:
    """The finished model."""

    training_state: bool = key(
        False, "keep the discriminator and its optimizer beside it, for another run to go on with"
    )
    push_to: str | None = key(
        None, "owner/name: publish it there on the hub, with its card, when the run ends"
    )
    license: str | None = key(None, "of what is published, in the hub's words: mit, apache-2.0, openrail ...")
    private: bool = key(False, "a repository that is made is private")
    dry_run: bool = key(False, "write what would be published to output_dir/published instead")

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
