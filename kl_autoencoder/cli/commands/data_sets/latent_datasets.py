"""encode-dataset, set-scaling: data sets of latents for diffusion training, and the scaling of their model."""

import argparse
import json
import os
import warnings
from pathlib import Path

from ....data.locating import locate
from ....distributed import rank_of
from ....files import replacing
from ....models.folder import CONFIG, read_json
from ...parser import IMAGES, MODEL, Command, Parser, add_computation, positive
from ...paths import check_model, model_folder, model_path, refuse_existing

PIPELINES = ["sd", "sdxl", "sd3", "flux"]
NOTABLE_MEAN = 0.1  # a larger mean of scaled latents, in deviations, causes a warning


def encode_dataset_arguments(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL)
    add_computation(parser)
    parser.add_argument(
        "--data", required=True, metavar="SOURCE", help="a folder, parquet or webdataset files, a hub id"
    )
    parser.add_argument(
        "--size", type=positive, required=True, metavar="N", help="of the crops, N x N pixels"
    )
    parser.add_argument(
        "--crop", choices=["centre", "random", "buckets"], default="centre",
        help="which part; buckets: sizes of about N x N pixels by aspect ratio, as SDXL's (centre)",
    )  # fmt: skip
    parser.add_argument(
        "--content", choices=["moments", "sample", "mode", "codes"], default="moments",
        help="mean and logvar of the posterior, a draw from it, its mode, or a discrete model's codes (moments)",
    )  # fmt: skip
    parser.add_argument(
        "--store", dest="stored_as", choices=["float16", "bfloat16", "float32"],
        help="store in this type (float16; codes are int32)",
    )  # fmt: skip
    parser.add_argument("--flip", action="store_true", help="the mirrored photographs' latents too")
    parser.add_argument("--keep", nargs="+", default=[], metavar="COLUMN", help="columns to take along")
    parser.add_argument(
        "--image-column", default="image", metavar="COLUMN", help="with the photographs (image)"
    )
    parser.add_argument("--split", default="train", help="of a hub or saved data set (train)")
    parser.add_argument("--seed", type=int, default=0, help="of random crops and samples (0)")
    parser.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="photographs at once (16)"
    )
    parser.add_argument(
        "--shard-rows", type=positive, default=512, metavar="N", help="photographs a shard (512)"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read, a rank (2)")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="a folder of its own")


def check_encode_dataset(arguments: argparse.Namespace) -> None:
    check_model(arguments.model)
    locate(arguments.data, "--data")
    refuse_existing([Path(arguments.output) / "manifest.json"], [], overwrite=True)  # it may be continued


def encode_dataset(arguments: argparse.Namespace) -> None:
    """Encode a source of photographs as a data set of latents, on any number of ranks, or continue one."""
    import torch

    from ....data.image_dataset import DATA
    from ....data.sources import open_source
    from ....latents.encode_dataset import binding, encode
    from ....latents.shard_encoder import EncodeSettings
    from ....latents.shards import ShardFolder
    from ...loading import load_model, move_model

    rank, ranks, local_rank = rank_of(os.environ)
    arguments.stored_as = arguments.stored_as or ("int32" if arguments.content == "codes" else "float16")
    names = ("size", "crop", "content", "stored_as", "dtype", "flip", "seed", "batch_size", "shard_rows")
    settings = EncodeSettings(**{key: getattr(arguments, key) for key in names}, keep=tuple(arguments.keep))
    column = arguments.image_column
    photographs = open_source(
        arguments.data, DATA, column, arguments.split, keep=settings.keep, in_order=True
    )
    vae = load_model(arguments.model, "cpu", None)
    if settings.content == "codes" and not getattr(vae, "is_discrete", False):
        raise ValueError(
            f"--content: codes, but {arguments.model} has none; allowed: moments, sample, mode, or a model with a "
            "discrete bottleneck (vq, fsq, gumbel)"
        )
    bound = binding(vae, photographs, column, settings)
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    move_model(vae, arguments.device or devices[local_rank % len(devices)], settings.dtype)
    made_from = {"model": arguments.model, "source": arguments.data, "scaling": vae.scaling}
    with ShardFolder(Path(arguments.output), len(photographs), settings.shard_rows) as shards:
        shards.bind(bound, {"made_from": made_from})
        done = encode(
            vae, photographs, column, shards, settings, rank, ranks, arguments.workers, progress=rank == 0
        )
    if done:  # the last of the ranks
        _print_summary(arguments.output, done)


def _print_summary(output: str, manifest: dict) -> None:
    from ....models import scaling

    skipped, found = manifest["skipped"], manifest["statistics"]
    photographs, rows = manifest["source"]["rows"], manifest["rows"]
    print(f"{output}: {photographs} photographs, {rows} rows of {manifest['settings']['content']}")
    listed = " (skipped.csv)" if any(skipped.values()) else ""
    print(f"{'skipped':16}{skipped['too small']} too small, {skipped['unreadable']} unreadable{listed}")
    for key, value in found.items():
        print(f"{key:16}{scaling.rounded(value)}")


def set_scaling_arguments(parser: Parser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="the folder of the model that encoded, or its training run"
    )
    parser.add_argument(
        "--from", dest="latents", required=True, metavar="OUT", help="what encode-dataset wrote"
    )
    parser.add_argument(
        "--for", dest="pipeline", choices=PIPELINES,
        help="write what this kind of pipeline reads: the scaling factor (sd), also means of channels with "
        "--per-channel (sdxl), the scaling factor and the shift (sd3, flux)",
    )  # fmt: skip
    parser.add_argument(
        "--per-channel", action="store_true", help="a mean and a std for each channel, instead of one for all"
    )


def check_set_scaling(arguments: argparse.Namespace) -> None:
    source = model_path(arguments.model)
    if not Path(arguments.model).is_dir():
        check_model(arguments.model)
        raise ValueError(
            f"{arguments.model}: not a model folder of yours, whose config could be changed; "
            f"kl-autoencoder export {arguments.model} -o FOLDER makes one"
        )
    if arguments.per_channel and arguments.pipeline not in (None, "sdxl"):
        raise ValueError(
            f"--per-channel: {arguments.pipeline} pipelines read no means of channels; allowed: --for sdxl"
        )
    model_folder(source)
    if not Path(arguments.latents).is_dir():
        raise FileNotFoundError(
            f"{arguments.latents}: no such folder; --from takes what encode-dataset wrote"
        )


def set_scaling(arguments: argparse.Namespace) -> None:
    """Write the statistics of a data set of latents, as scaling, into the config of the model that encoded it."""
    from ....latents.encode_dataset import weights_hash
    from ....latents.shards import read_manifest
    from ....models import scaling
    from ...loading import load_model

    config = model_folder(Path(arguments.model)) / CONFIG
    manifest = read_manifest(arguments.latents)
    vae = load_model(str(config.parent), "cpu", None)
    if weights_hash(vae) != manifest["model"]["weights_sha256"]:
        raise ValueError(
            f"{arguments.latents}: was made by a model with other weights than {arguments.model}"
        )
    if "patch_size" in vae.scaling:
        raise ValueError(
            f"{arguments.model}: is normalised by its own tensors (bn), which the training measured, and not by "
            "keys of its config"
        )
    set_to = scaling.from_statistics(manifest["statistics"], arguments.pipeline, arguments.per_channel)
    content = read_json(config) | set_to
    with replacing(config) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    print(f"{config}: {scaling.described(set_to)}")
    _warn_of_scaling(arguments.pipeline, set_to, manifest["statistics"], vae.config.latent_channels)


def _warn_of_scaling(pipeline: str | None, set_to: dict, found: dict, channels: int) -> None:
    """Warn of pipelines of diffusers that would decode latents with this scaling wrongly."""
    from ....models import scaling

    reads = scaling.pipelines_of(set_to)
    if pipeline is None:
        others = [kind for kind in scaling.READ_BY if kind not in reads]
        warnings.warn(
            f"{' and '.join(reads)} pipelines read this, {' and '.join(others)} pipelines do not and would "
            "decode such latents wrongly; --for sets what one of them reads"
        )
        return
    published, mean = scaling.READ_BY[pipeline][1], found["shift_factor"] * found["scaling_factor"]
    if channels != published:
        warnings.warn(f"latents of {channels} channels; published {pipeline} models have {published}")
    if set_to["shift_factor"] is None and set_to["latents_mean"] is None and abs(mean) > NOTABLE_MEAN:
        warnings.warn(
            f"{pipeline} pipelines read no shift_factor: the scaled latents keep a mean of {mean:.2g} deviations"
        )


COMMANDS = {
    "encode-dataset": Command(
        "a data set to latents for diffusion training",
        encode_dataset_arguments,
        check_encode_dataset,
        encode_dataset,
        description="Encodes a source of photographs into shards of parquet. Running the same command again "
        "continues, also on another number of ranks (accelerate launch, torchrun, srun, or by hand).",
        epilog=IMAGES,
        on_ranks=True,
    ),
    "set-scaling": Command(
        "the statistics of encode-dataset into the model's config",
        set_scaling_arguments,
        check_set_scaling,
        set_scaling,
    ),
}
