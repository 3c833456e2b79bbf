"""The published configurations of the AutoencoderKL family, as their config.json files have them."""


def _config(latent_channels=4, quant=True, **more):
    return dict(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=latent_channels,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **more,
    )


PUBLISHED = {
    "sd": _config(scaling_factor=0.18215, sample_size=512),
    "sdxl": _config(scaling_factor=0.13025, sample_size=1024),
    "sd3": _config(16, False, scaling_factor=1.5305, shift_factor=0.0609, sample_size=1024),
    "flux": _config(16, False, scaling_factor=0.3611, shift_factor=0.1159, sample_size=1024),
    "no-attention": _config(mid_block_add_attention=False),
}

# AutoencoderKLFlux2: FLUX.2's, and the same with the decoder of FLUX.2-small-decoder
PUBLISHED_FLUX2 = {
    "flux2": _config(32, sample_size=1024),
    "flux2-small": _config(32, sample_size=1024, decoder_block_out_channels=(96, 192, 384, 384)),
}


def reduced(config, widths=(32, 64, 96, 96)):
    """The same configuration with narrower levels.

    Eight groups: with one channel a group a convolution's bias in front of a norm has no effect, and comparing
    its gradient would compare rounding.
    """
    return {**config, "block_out_channels": widths, "norm_num_groups": 8}
