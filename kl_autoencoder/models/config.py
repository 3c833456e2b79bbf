"""Check the configs of autoencoders: the type and range of each key, and the size of the network.

A config.json may come from anywhere and is not trusted: only its values are checked, no network is built.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..files import shown

MOST_CHANNELS, MOST_LEVELS, MOST_LAYERS, LARGEST_IMAGE = 65536, 16, 100, 2**20
MOST_PARAMETERS = 10**10  # Stable Diffusion's network has 0.084e9
LARGEST_SCALE = 1e8


def _whole(value: Any, most: int = MOST_CHANNELS) -> bool:
    """Whether a value is a whole number from 1 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _number(value: Any, above: float = -LARGEST_SCALE) -> bool:
    """Whether a value is a number between the limits; NaN is not, since comparisons with it are false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and above < value < LARGEST_SCALE


def is_size(value: Any) -> bool:
    """Whether a value is the [height, width] of an image, in pixels."""
    return _several(value, lambda side: _whole(side, LARGEST_IMAGE), 2) and len(value) == 2


def is_patch(value: Any) -> bool:
    """Whether a value is the [height, width] of a patch of latents, up to 64 each."""
    return _several(value, lambda side: _whole(side, 64), 2) and len(value) == 2


def _several(value: Any, check: Callable[[Any], bool], most: int) -> bool:
    """Whether a value is a list or tuple of 1 to `most` entries that all pass `check`."""
    return isinstance(value, (list, tuple)) and 1 <= len(value) <= most and all(map(check, value))


Rule = tuple[Callable[[Any], bool], str]  # check of a value, and what is allowed in words
CHANNELS: Rule = (_whole, f"a whole number from 1 to {MOST_CHANNELS}")
SWITCH: Rule = (lambda value: isinstance(value, bool), "true or false")
KINDS: Rule = (
    lambda value: _several(value, lambda kind: isinstance(kind, str), MOST_LEVELS),
    "a list of names",
)
SCALING: dict[str, Rule] = {
    "scaling_factor": (lambda value: _number(value, 0), f"a number above 0 and below {LARGEST_SCALE:g}"),
    "shift_factor": (lambda value: value is None or _number(value), "null or a number"),
    "latents_mean": (
        lambda value: value is None or _several(value, _number, MOST_CHANNELS),
        "null or a list of numbers",
    ),
    "latents_std": (
        lambda value: value is None or _several(value, lambda std: _number(std, 0), MOST_CHANNELS),
        "null or a list of numbers above 0",
    ),
}
RULES: dict[str, Rule] = {
    **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "norm_num_groups"), CHANNELS),
    "layers_per_block": (
        lambda value: _whole(value, MOST_LAYERS),
        f"a whole number from 1 to {MOST_LAYERS}",
    ),
    "block_out_channels": (
        lambda value: _several(value, _whole, MOST_LEVELS),
        f"1 to {MOST_LEVELS} whole numbers from 1 to {MOST_CHANNELS}",
    ),
    **dict.fromkeys(("down_block_types", "up_block_types"), KINDS),
    "act_fn": (lambda value: value in ("silu", "swish"), "'silu'"),
    "sample_size": (
        lambda value: (
            _whole(value, LARGEST_IMAGE) or _several(value, lambda side: _whole(side, LARGEST_IMAGE), 2)
        ),
        f"a whole number from 1 to {LARGEST_IMAGE}, or two",
    ),
    **SCALING,
    **dict.fromkeys(
        ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"), SWITCH
    ),
}


WIDTHS: Rule = RULES["block_out_channels"]
# Of an AutoencoderKLFlux2, which has no scaling in its config: it normalises latents by statistics, its own
# tensors.
FLUX2_RULES: dict[str, Rule] = {
    **{key: rule for key, rule in RULES.items() if key not in (*SCALING, "force_upcast")},
    "decoder_block_out_channels": (lambda value: value is None or WIDTHS[0](value), f"null or {WIDTHS[1]}"),
    "batch_norm_eps": (lambda value: _number(value, 0), f"a number above 0 and below {LARGEST_SCALE:g}"),
    "batch_norm_momentum": (lambda value: _number(value, 0) and value <= 1, "a number above 0, at most 1"),
    "patch_size": (is_patch, "two whole numbers from 1 to 64"),
}


# Of an `Autoencoder`.
FAMILY_RULES: dict[str, Rule] = {
    "network": (lambda value: value in ("conv", "mlp"), "'conv' or 'mlp'"),
    "bottleneck": (lambda value: isinstance(value, Mapping) and len(value) <= 16, "{'kind': ..., options}"),
    "sample_size": (lambda value: _whole(value, LARGEST_IMAGE), f"a whole number from 1 to {LARGEST_IMAGE}"),
    "hidden_sizes": (
        lambda value: value in ((), []) or WIDTHS[0](value),
        f"at most {MOST_LEVELS} whole numbers from 1 to {MOST_CHANNELS}",
    ),
    "classes": (lambda value: value == 0 or _whole(value, 10**6), "a whole number from 0 to 1000000"),
    "scaling_factor": SCALING["scaling_factor"],
    **{
        key: RULES[key]
        for key in (
            "in_channels",
            "out_channels",
            "latent_channels",
            "block_out_channels",
            "layers_per_block",
        )
    },
    **{key: RULES[key] for key in ("norm_num_groups", "mid_block_add_attention")},
}


def decoder_block_out_channels(config: Mapping[str, Any]) -> Sequence[int]:
    """Return the widths of the decoder's levels: the encoder's unless the config has others."""
    return config.get("decoder_block_out_channels") or config["block_out_channels"]


def check_config(config: Mapping[str, Any], rules: Mapping[str, Rule] = RULES) -> None:
    """Check a whole config. Raises ValueError naming the key, its value and what is allowed."""
    check_rules(config, rules)
    widths, groups, channels = (
        config[key] for key in ("block_out_channels", "norm_num_groups", "latent_channels")
    )
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if set(config[key]) != {kind} or len(config[key]) not in (1, len(widths)):
            allowed = f"({kind!r},) or {kind!r} {len(widths)} times"
            raise ValueError(f"{key}: {shown(tuple(config[key]))}; allowed: {allowed}")
    for key in ("block_out_channels", "decoder_block_out_channels"):
        given = config.get(key) or widths
        if any(width % groups for width in given):
            raise ValueError(
                f"{key}: {shown(tuple(given))}; allowed: multiples of norm_num_groups ({groups})"
            )
        if len(given) != len(widths):
            raise ValueError(f"{key}: {len(given)} levels; allowed: {len(widths)}, as block_out_channels has")
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None and len(config[key]) != channels:
            raise ValueError(f"{key}: {len(config[key])} values; allowed: {channels}, one a channel")
    if (parameters := count_parameters(config)) > MOST_PARAMETERS:
        raise ValueError(
            f"block_out_channels, layers_per_block: {shown(tuple(widths))}, {config['layers_per_block']}: "
            f"{parameters:.2g} parameters; allowed: up to {MOST_PARAMETERS:.0e}"
        )


def check_rules(config: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Check each value by itself. Raises ValueError naming the key, its value and what is allowed."""
    for key, (fits, allowed) in rules.items():
        if not fits(config[key]):
            raise ValueError(f"{key}: {shown(config[key])}; allowed: {allowed}")


def count_parameters(config: Mapping[str, Any]) -> int:
    """Return the number of parameters of a config's network, without building it."""
    widths, layers, z = (config[key] for key in ("block_out_channels", "layers_per_block", "latent_channels"))
    out, attention = decoder_block_out_channels(config), config["mid_block_add_attention"]
    encoder = _conv(config["in_channels"], widths[0]) + _middle(widths[-1], attention)
    encoder += 2 * widths[-1] + _conv(widths[-1], 2 * z)
    decoder = (
        _conv(z, out[-1]) + _middle(out[-1], attention) + 2 * out[0] + _conv(out[0], config["out_channels"])
    )
    for before, width in zip((widths[0], *widths), widths, strict=False):
        encoder += _resnet(before, width) + (layers - 1) * _resnet(width, width)
    for before, width in zip((out[-1], *reversed(out)), reversed(out), strict=False):
        decoder += _resnet(before, width) + layers * _resnet(width, width)
    resampling = sum(_conv(width, width) for width in widths[:-1]) + sum(_conv(w, w) for w in out[1:])
    quant = (2 * z) ** 2 + 2 * z if config["use_quant_conv"] else 0
    post_quant = z**2 + z if config["use_post_quant_conv"] else 0
    return encoder + decoder + resampling + quant + post_quant


def _conv(a: int, b: int) -> int:
    return 9 * a * b + b


def _middle(width: int, attention: bool) -> int:
    return 2 * _resnet(width, width) + (2 * width + 4 * (width**2 + width) if attention else 0)


def _resnet(a: int, b: int) -> int:
    shortcut = 0 if a == b else a * b + b
    return 2 * a + _conv(a, b) + 2 * b + _conv(b, b) + shortcut
