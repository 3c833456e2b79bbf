"""Single files: LDM names of tensors <-> diffusers names, and the config that the tensors imply.

Both layouts describe the same network. CompVis' latent-diffusion (LDM), the layout of Stable Diffusion's single
files, counts the decoder's levels from the highest resolution and stores attention as 1x1 convolutions. diffusers
counts them from the lowest resolution and stores attention as linear layers. Otherwise only names differ.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from ..files import clipped, read_tensors, save_tensors, shown
from .config import decoder_block_out_channels

CONFIG_KEY = "kl_autoencoder.config"  # key in the metadata of single files written here

# Prefixes of the autoencoder's tensors: in a full diffusion checkpoint (LDM's, or of merging programs), or alone.
PREFIXES = ("first_stage_model.", "vae.", "")
# Prefixes of other tensors in a training checkpoint of an autoencoder.
NOT_THE_MODEL = ("loss.", "model_ema.", "discriminator.", "optimizer")

# Entries in the config.json of published models that do not follow from the shapes of their tensors.
FAMILIES = {
    "SD": {"latent_channels": 4, "scaling_factor": 0.18215, "shift_factor": None, "sample_size": 512},
    "SDXL": {"latent_channels": 4, "scaling_factor": 0.13025, "shift_factor": None, "sample_size": 1024},
    "SD3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024},
    "FLUX": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024},
}
# Part of a tensor's name -> the family of the diffusion model in a file. The first one that occurs counts.
FAMILY_MARKS = {
    "joint_blocks.": "SD3",
    "double_blocks.": "FLUX",
    "conditioner.embedders.": "SDXL",
    "model.diffusion_model.label_emb.": "",  # unknown: without a text encoder it may be SDXL or SD 2.1 unCLIP
    "model.diffusion_model.input_blocks.": "SD",
}
STRUCTURE = (  # keys of a config that follow from the tensors too
    *("block_out_channels", "layers_per_block", "in_channels", "out_channels", "latent_channels"),
    *("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"),
)
PLAYGROUND_SCALING = 0.5  # Playground v2.5: SDXL's network, latents normalised by edm_mean and edm_std

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MOST_LISTED = 150  # characters of names in an error message
NAMES = [  # (LDM, diffusers), each followed by .weight or .bias
    ("{side}.conv_in", "{side}.conv_in"),
    ("{side}.norm_out", "{side}.conv_norm_out"),
    ("{side}.conv_out", "{side}.conv_out"),
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
    ("encoder.down.{level}.block.{i}.{layer}", "encoder.down_blocks.{level}.resnets.{i}.{layer}"),
    ("encoder.down.{level}.block.{i}.nin_shortcut", "encoder.down_blocks.{level}.resnets.{i}.conv_shortcut"),
    ("encoder.down.{level}.downsample.conv", "encoder.down_blocks.{level}.downsamplers.0.conv"),
    ("decoder.up.{flipped}.block.{i}.{layer}", "decoder.up_blocks.{flipped}.resnets.{i}.{layer}"),
    ("decoder.up.{flipped}.block.{i}.nin_shortcut", "decoder.up_blocks.{flipped}.resnets.{i}.conv_shortcut"),
    ("decoder.up.{flipped}.upsample.conv", "decoder.up_blocks.{flipped}.upsamplers.0.conv"),
    ("{side}.mid.block_1.{layer}", "{side}.mid_block.resnets.0.{layer}"),
    ("{side}.mid.block_2.{layer}", "{side}.mid_block.resnets.1.{layer}"),
    *((f"{{side}}.mid.attn_1.{a}", f"{{side}}.mid_block.attentions.0.{b}") for a, b in ATTENTION.items()),
]
FIELDS = {
    "side": "encoder|decoder",
    "level": r"\d+",
    "flipped": r"\d+",  # a level that the two layouts count from opposite ends
    "i": r"\d+",
    "layer": "norm1|conv1|norm2|conv2",
}


def _pattern(template: str) -> re.Pattern:
    """Return the regular expression for names of a template in NAMES, with a group for each field."""
    named = re.sub(r"\\{(\w+)\\}", lambda field: f"(?P<{field[1]}>{FIELDS[field[1]]})", re.escape(template))
    return re.compile(named + r"\.(?P<leaf>weight|bias)")


TO_DIFFUSERS = [(_pattern(ldm), diffusers + ".{leaf}") for ldm, diffusers in NAMES]
TO_LDM = [(_pattern(diffusers), ldm + ".{leaf}") for ldm, diffusers in NAMES]
ATTENTION_WEIGHT = re.compile(r".*\.(mid\.attn_1|mid_block\.attentions\.0)\.(q|k|v|proj_out|to_.*)\.weight")


def ldm_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the autoencoder in `tensors` under the names of diffusers' AutoencoderKL; no value is changed.

    The autoencoder may be alone or in a full diffusion checkpoint (`first_stage_model.`, `vae.`). Names may be
    LDM's, diffusers' or diffusers' old ones of attention (`query`, `key`, `value`, `proj_attn`); attention weights
    may be linear layers (2D) or 1x1 convolutions (4D), and are returned 2D. Losses, discriminators and LDM's EMA
    copies are left out. Raises ValueError if there is no autoencoder, and for tensors that do not belong to one.
    """
    tensors = _find_autoencoder(tensors)
    if any(name.startswith(("encoder.mid_block.", "decoder.mid_block.")) for name in tensors):
        renamed = _renamed(_renamed(tensors, TO_LDM), TO_DIFFUSERS)  # there and back: the names are checked
    else:
        renamed = _renamed(tensors, TO_DIFFUSERS)
    for name, tensor in renamed.items():
        if ATTENTION_WEIGHT.fullmatch(name) and tensor.shape[2:].numel() == 1:
            renamed[name] = tensor.reshape(tensor.shape[:2])
    return renamed


def diffusers_to_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an AutoencoderKL's tensors under LDM names, attention weights as 1x1 convolutions (4D).

    Raises the errors of `ldm_to_diffusers`.
    """
    renamed = _renamed(ldm_to_diffusers(tensors), TO_LDM)
    for name, tensor in renamed.items():
        if ATTENTION_WEIGHT.fullmatch(name):
            renamed[name] = tensor.reshape(*tensor.shape, 1, 1)
    return renamed


def config_from_tensors(tensors: Mapping[str, Tensor]) -> dict:
    """Return the AutoencoderKL config that follows from names and shapes of diffusers-named tensors.

    The number of GroupNorm groups does not show in the tensors. It is taken to be 32, as in all published models,
    or if 32 does not divide every width, the largest smaller number that does. Raises ValueError naming a tensor
    that is missing or does not have four dimensions.
    """

    def shape(name: str) -> torch.Size:
        if name not in tensors:
            raise ValueError(f"no tensor {name}, an AutoencoderKL has one")
        if tensors[name].ndim != 4:
            raise ValueError(f"{name}: {tuple(tensors[name].shape)}; allowed: (out, in, height, width)")
        return tensors[name].shape

    levels = _count(tensors, r"encoder\.down_blocks\.(\d+)\.")
    widths = [shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(max(levels, 1))]
    decoder = [
        shape(f"decoder.up_blocks.{i}.resnets.0.conv1.weight")[0] for i in reversed(range(len(widths)))
    ]
    common = math.gcd(*widths, *decoder)
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        **({"decoder_block_out_channels": decoder} if decoder != widths else {}),
        "layers_per_block": _count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "act_fn": "silu",
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "norm_num_groups": max(n for n in range(1, 33) if common % n == 0),
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in tensors,
        "force_upcast": True,
    }


def compare_with_tensors(config: Mapping, tensors: Mapping[str, Tensor]) -> None:
    """Compare the config's keys about the network with the shapes of the tensors, without building a network.

    Raises ValueError naming a key that differs. If tensors are missing, does nothing: `check_state` names them.
    """
    try:
        told = config_from_tensors(tensors)
    except ValueError:
        return
    sides = [{**c, "decoder_block_out_channels": decoder_block_out_channels(c)} for c in (config, told)]
    for key in (*STRUCTURE, "decoder_block_out_channels"):
        said, found = (tuple(c[key]) if isinstance(c[key], (list, tuple)) else c[key] for c in sides)
        if said != found:
            raise ValueError(
                f"{key}: {shown(said)} in the config; the tensors are of a model with {shown(found)}"
            )


def scaling_from_checkpoint(tensors: Mapping[str, Tensor], config: dict) -> dict | None:
    """Return the config entries of an autoencoder that follow from the rest of its checkpoint; None if none do.

    tensors: all tensors of the file. config: the autoencoder's, from its tensors. `scale_factor` is stored if LDM
    measured it; otherwise the family of the diffusion model gives scaling_factor, shift_factor and sample_size.
    """
    marks = (family for mark, family in FAMILY_MARKS.items() if any(mark in name for name in tensors))
    family = FAMILIES.get(next(marks, ""), {})
    if len(config["block_out_channels"]) != 4 or family.get("latent_channels") != config["latent_channels"]:
        family = {}
    if "edm_mean" in tensors and "edm_std" in tensors:
        mean, std = (tensors[name].flatten().tolist() for name in ("edm_mean", "edm_std"))
        family = {**family, "latents_mean": mean, "latents_std": std, "scaling_factor": PLAYGROUND_SCALING}
    elif "scale_factor" in tensors:
        family = {"sample_size": 256, **family, "scaling_factor": float(tensors["scale_factor"])}
    return family or None


def family_of(config: Mapping) -> str:
    """Return the name of the published model with this network and scaling, or in words that it is a custom one."""
    if "patch_size" in config:
        return "FLUX.2" if config["latent_channels"] == 32 and _is_kl_f8(config) else "custom (as FLUX.2's)"
    published = [
        name
        for name, family in FAMILIES.items()
        if family["latent_channels"] == config["latent_channels"] and _is_kl_f8(config)
    ]
    for name in published:
        told = ("scaling_factor", "shift_factor")
        if all(config.get(key) == FAMILIES[name][key] for key in told) and not config.get("latents_mean"):
            return name
    return f"custom (the network of {' and '.join(published)}, its own scaling)" if published else "custom"


def load_single_file(path: str | os.PathLike, **given) -> tuple[dict, dict[str, Tensor]]:
    """Read a single file (.safetensors, .ckpt ...) -> AutoencoderKL config and diffusers-named tensors.

    The config comes from the metadata of a file written here, else from the shapes of the tensors and from the
    diffusion model in the file; `given` entries override both. If the scaling of the latents is unknown, that of
    the first published family with as many latent channels (or SD's) is assumed, with a warning. Raises ValueError
    naming the file and what was expected.
    """
    everything, metadata = read_tensors(path)
    try:
        tensors = ldm_to_diffusers(everything)
        if CONFIG_KEY in metadata:
            return {**_config_in(metadata), **given}, tensors
        config = config_from_tensors(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    scaling = scaling_from_checkpoint(everything, config)
    if scaling is None:
        scaling = _assumed_scaling(config, path, quiet="scaling_factor" in given)
    return {**config, **scaling, **given}, tensors


def save_single_file(path: str | os.PathLike, tensors: Mapping[str, Tensor], config: Mapping) -> None:
    """Write diffusers-named `tensors` as one .safetensors in LDM layout, with `config` in its metadata.

    diffusers' `from_single_file` reads it too. Raises the errors of `diffusers_to_ldm` and `save_tensors`.
    """
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    save_tensors(path, diffusers_to_ldm(tensors), {CONFIG_KEY: json.dumps(public, sort_keys=True)})


def check_state(expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], source: object) -> None:
    """Compare `tensors` with the names and shapes of a model.

    Raises ValueError naming `source` and what differs.
    """
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    missing = [name for name in expected if name not in tensors]
    refuse(source, missing, [name for name in tensors if name not in expected], wrong)


def refuse(
    source: object,
    missing: Collection[str] = (),
    unexpected: Collection[str] = (),
    wrong: Collection[str] = (),
) -> None:
    """Raise ValueError naming `source` and the given tensors; do nothing if no tensor is given."""
    groups = {"missing": missing, "unexpected": unexpected, "wrongly shaped": wrong}
    groups = {kind: names for kind, names in groups.items() if names}
    if groups:
        each = MOST_LISTED // len(groups)
        faults = "; ".join(f"{kind}: {_listed(names, each)}" for kind, names in groups.items())
        raise ValueError(f"{source}: the tensors do not fit the config; {faults}")


def _listed(names: Iterable[str], most: int = MOST_LISTED) -> str:
    """Return the first of the names, in at most `most` characters, and the number of the others."""
    names = list(names)
    listed = clipped(names[0], most) if names else ""
    count = min(1, len(names))
    while count < min(len(names), 6) and len(listed) + len(names[count]) + 2 <= most:
        listed += f", {names[count]}"
        count += 1
    return listed + (f" and {len(names) - count} more" if count < len(names) else "")


def modern_name(name: str) -> str:
    """Return a tensor's name with diffusers' old names of attention layers replaced by the present ones."""
    return re.sub(
        r"(\.mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.",
        lambda match: f"{match[1]}.{OLD_ATTENTION[match[2]]}.",
        name,
    )


def _find_autoencoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the autoencoder in a checkpoint, without prefix. Raises ValueError if there is none."""
    for prefix in PREFIXES:
        if any(f"{prefix}{side}.conv_in.weight" in tensors for side in ("encoder", "decoder")):
            found = {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}
            return {name: tensor for name, tensor in found.items() if not name.startswith(NOT_THE_MODEL)}
    raise ValueError(
        "expected an AutoencoderKL (encoder.conv_in.weight ..., alone or under first_stage_model. or vae.), "
        f"found {_listed(tensors, 60) or 'nothing'}"
    )


def _renamed(tensors: Mapping[str, Tensor], rules: list[tuple[re.Pattern, str]]) -> dict[str, Tensor]:
    """Rename all tensors. Raises ValueError for names that no rule matches, and for two that become the same."""
    last = _count(tensors, r"decoder\.(?:up|up_blocks)\.(\d+)\.") - 1
    renamed, sources, strangers = {}, {}, []
    for name, tensor in tensors.items():
        new = _rename(name, rules, last)
        if new is None:
            strangers.append(name)
        elif new in renamed:
            raise ValueError(
                f"two tensors for one place: {clipped(sources[new], 80)} and {clipped(name, 80)}"
            )
        else:
            renamed[new], sources[new] = tensor, name
    if strangers:
        raise ValueError(f"tensors that an AutoencoderKL has no place for: {_listed(strangers)}")
    return renamed


def _rename(name: str, rules: list[tuple[re.Pattern, str]], last_level: int) -> str | None:
    """Return the new name by the first rule that matches; None if none does."""
    name = modern_name(name)
    for pattern, template in rules:
        if match := pattern.fullmatch(name):
            fields = match.groupdict()
            if "flipped" in fields:
                fields["flipped"] = last_level - int(fields["flipped"])
            return template.format(**fields)
    return None


def _count(names: Iterable[str], pattern: str) -> int:
    """Return one more than the largest number that `pattern` finds in the names; 0 if it finds none."""
    return max((int(match[1]) for match in map(re.compile(pattern).match, names) if match), default=-1) + 1


def _is_kl_f8(config: Mapping) -> bool:
    """Whether this is the network of Stable Diffusion and FLUX, whatever its latent channels."""
    # Published models with 4 latent channels, and FLUX.2, have the 1x1 convolutions; those with 16 do not.
    has_quant_convs = config["latent_channels"] in (4, 32)
    return (
        tuple(config["block_out_channels"]) == (128, 256, 512, 512)
        and (config["in_channels"], config["out_channels"], config["layers_per_block"]) == (3, 3, 2)
        and config["mid_block_add_attention"]
        and config["use_quant_conv"] == config["use_post_quant_conv"] == has_quant_convs
    )


def _config_in(metadata: Mapping[str, str]) -> dict:
    try:
        config = json.loads(metadata[CONFIG_KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the config in its metadata is not JSON ({clipped(str(error), 80)})") from error
    if not isinstance(config, dict):
        raise ValueError(f"the config in its metadata must be a JSON object, not {shown(config)}")
    return config


def _assumed_scaling(config: dict, path: object, quiet: bool) -> dict:
    likely = [name for name, f in FAMILIES.items() if f["latent_channels"] == config["latent_channels"]]
    assumed = FAMILIES[likely[0] if likely else "SD"]
    published = ", ".join(
        f"{name} {FAMILIES[name]['scaling_factor']} / {FAMILIES[name]['shift_factor']}" for name in likely
    )
    if not quiet:
        warnings.warn(
            f"{path} does not tell how its latents are scaled; scaling_factor={assumed['scaling_factor']}, "
            f"shift_factor={assumed['shift_factor']} is assumed (published for {config['latent_channels']} "
            f"channels: {published or 'none'}); give scaling_factor=..., shift_factor=... to from_single_file "
            "to set it",
            stacklevel=4,
        )
    return {key: value for key, value in assumed.items() if key != "latent_channels"}
