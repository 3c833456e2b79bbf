"""What the config of an AutoencoderKL may say: the type and range of each key, and how large the network is.

A config.json is a stranger's file. Everything here looks at numbers alone; no network is built.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ..files import shown

MOST_CHANNELS, MOST_LEVELS, MOST_LAYERS, LARGEST_IMAGE = 65536, 16, 100, 2**20
MOST_PARAMETERS = 10**10  # Stable Diffusion's network has 0.084e9
LARGEST_SCALE = 1e8


def _whole(value: Any, most: int = MOST_CHANNELS) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _number(value: Any, above: float = -LARGEST_SCALE) -> bool:
    """A finite number; comparisons with NaN are false, and whole numbers of any length can be compared."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and above < value < LARGEST_SCALE


def is_size(value: Any) -> bool:
    """Whether a value is an image's [height, width]."""
    return _several(value, lambda side: _whole(side, LARGEST_IMAGE), 2) and len(value) == 2


def _several(value: Any, check: Callable[[Any], bool], most: int) -> bool:
    return isinstance(value, (list, tuple)) and 1 <= len(value) <= most and all(map(check, value))


Rule = tuple[Callable[[Any], bool], str]  # what holds for a value, and the same in words
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


def check_config(config: Mapping[str, Any]) -> None:
    """Hold a whole config to what a network can have; ValueError naming the key, its value and what is allowed."""
    check_rules(config, RULES)
    widths, groups, channels = (
        config[key] for key in ("block_out_channels", "norm_num_groups", "latent_channels")
    )
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if set(config[key]) != {kind} or len(config[key]) not in (1, len(widths)):
            allowed = f"({kind!r},) or {kind!r} {len(widths)} times"
            raise ValueError(f"{key}: {shown(tuple(config[key]))}; allowed: {allowed}")
    if any(width % groups for width in widths):
        raise ValueError(
            f"block_out_channels: {shown(tuple(widths))}; allowed: multiples of norm_num_groups ({groups})"
        )
    for key in ("latents_mean", "latents_std"):
        if config[key] is not None and len(config[key]) != channels:
            raise ValueError(f"{key}: {len(config[key])} values; allowed: {channels}, one a channel")
    if (parameters := count_parameters(config)) > MOST_PARAMETERS:
        raise ValueError(
            f"block_out_channels, layers_per_block: {shown(tuple(widths))}, {config['layers_per_block']}: "
            f"{parameters:.2g} parameters; allowed: up to {MOST_PARAMETERS:.0e}"
        )


def check_rules(config: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Hold each value to its rule, by itself."""
    for key, (fits, allowed) in rules.items():
        if not fits(config[key]):
            raise ValueError(f"{key}: {shown(config[key])}; allowed: {allowed}")


def count_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of the network that a config describes, from its numbers alone."""
    widths, layers, z = (config[key] for key in ("block_out_channels", "layers_per_block", "latent_channels"))
    first, last = widths[0], widths[-1]
    middle = 2 * _resnet(last, last)
    if config["mid_block_add_attention"]:
        middle += 2 * last + 4 * (last**2 + last)
    encoder = _conv(config["in_channels"], first) + middle + 2 * last + _conv(last, 2 * z)
    decoder = _conv(z, last) + middle + 2 * first + _conv(first, config["out_channels"])
    for before, width in zip((first, *widths), widths, strict=False):
        encoder += _resnet(before, width) + (layers - 1) * _resnet(width, width)
    for before, width in zip((last, *reversed(widths)), reversed(widths), strict=False):
        decoder += _resnet(before, width) + layers * _resnet(width, width)
    resampling = sum(_conv(width, width) for width in widths[:-1]) + sum(_conv(w, w) for w in widths[1:])
    quant = (2 * z) ** 2 + 2 * z if config["use_quant_conv"] else 0
    post_quant = z**2 + z if config["use_post_quant_conv"] else 0
    return encoder + decoder + resampling + quant + post_quant


def _conv(a: int, b: int) -> int:
    return 9 * a * b + b


def _resnet(a: int, b: int) -> int:
    shortcut = 0 if a == b else a * b + b
    return 2 * a + _conv(a, b) + 2 * b + _conv(b, b) + shortcut
