"""Which autoencoders of diffusers `optimize` serves: found by looking at all, and written on models/README.md.

    python -m tests.models.test_optimized_classes

prints the section of that page.
"""

import importlib
import inspect
import pkgutil
import re

import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKLTemporalDecoder,
    ConsistencyDecoderVAE,
    VQModel,
)
from diffusers.models import autoencoders
from diffusers.models.autoencoders import vae
from diffusers.models.modeling_utils import ModelMixin

from kl_autoencoder import optimize, restore
from tests.conftest import ROOT
from tests.models.test_autoencoder_kl import images

PAGE = ROOT / "kl_autoencoder" / "models" / "README.md"
NETWORKS = {"Encoder": "encoder", "Decoder": "decoder", "MaskConditionDecoder": "decoder"}
# networks of their own -> why they are not served
WHY_NOT = {
    "3-D convolutions over frames, also where images are videos of one frame": "Conv3d",
    "1-D convolutions of sound": "Conv1d",
    "another network, without the blocks of these two": "",
}
REMARKS = {
    "AsymmetricAutoencoderKL": ", the decoder where it gets no mask",
    "AutoencoderKLTemporalDecoder": ", its decoder is 3-D",
    "ConsistencyDecoderVAE": ", its decoder is a diffusion model",
    "VQModel": ", the decoder unless its norms are spatial (Kandinsky 2)",
}


def classes():
    """(autoencoder of diffusers, the module that defines it)."""
    for found in pkgutil.iter_modules(autoencoders.__path__):
        module = importlib.import_module(f"{autoencoders.__name__}.{found.name}")
        for cls in vars(module).values():
            ours = inspect.isclass(cls) and cls.__module__ == module.__name__
            if ours and issubclass(cls, ModelMixin):
                yield cls, module


def made_of(cls):
    """The modules of diffusers' `vae.py` that an autoencoder makes in its __init__: "encoder", "decoder"."""
    init = inspect.unwrap(cls.__init__)
    made = (init.__globals__.get(name) for name in init.__code__.co_names)
    shared = (vae.Encoder, vae.Decoder, vae.MaskConditionDecoder)
    return [NETWORKS[m.__name__] for m in made if inspect.isclass(m) and m in shared]


def section():
    served, others = [], {reason: [] for reason in WHY_NOT}
    for cls, module in classes():
        if made := made_of(cls):
            served.append(f"- `{cls.__name__}`: {' and '.join(made)}{REMARKS.get(cls.__name__, '')}")
        else:
            source = inspect.getsource(module)
            reason = next(reason for reason, kind in WHY_NOT.items() if kind in source)
            others[reason].append(f"`{cls.__name__}`")
    lines = [f"- {reason}: {', '.join(sorted(names))}" for reason, names in others.items()]
    return "\n".join([*sorted(served), "", "Not served:", "", *lines])


def words(text):
    return re.sub(r"\s+", " ", text).strip()


def test_the_page_lists_every_autoencoder_of_diffusers():
    assert words(section()) in words(PAGE.read_text(encoding="utf-8"))


NARROW = {"block_out_channels": (32, 32), "norm_num_groups": 8}
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
ASYMMETRIC = {
    "down_block_out_channels": (32, 32), "layers_per_down_block": 1, "up_block_out_channels": (32, 64),
    "layers_per_up_block": 2, "latent_channels": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "networks"),
    [
        (lambda: VQModel(**NARROW, **LEVELS), 2),
        (lambda: VQModel(**NARROW | {"norm_num_groups": 32}, **LEVELS, norm_type="spatial"), 1),
        (lambda: AsymmetricAutoencoderKL(**LEVELS, **ASYMMETRIC), 2),
    ],
    ids=["VQModel", "VQModel, spatial", "AsymmetricAutoencoderKL"],
)
def test_other_autoencoders_give_the_same_in_pieces(make, networks, nothing_is_small, pieces):
    torch.manual_seed(0)
    model, x = make().eval(), images()
    with torch.no_grad():
        expected = model(x).sample
        torch.testing.assert_close(optimize(model)(x).sample, expected, rtol=0, atol=5e-5)
        assert len(pieces) == networks
        if isinstance(model, AsymmetricAutoencoderKL):
            image, mask = images(64, 64), torch.ones(2, 1, 64, 64)
            mask[:, :, 20:] = 0
            z = torch.randn(2, 4, 32, 32)
            inpainted = model.decode(z, image=image, mask=mask).sample
            assert len(pieces) == networks
            torch.testing.assert_close(restore(model).decode(z, image=image, mask=mask).sample, inpainted)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",), block_out_channels=(32,)
        ),
        lambda: ConsistencyDecoderVAE(
            encoder_block_out_channels=(32,) * 4,
            encoder_down_block_types=("DownEncoderBlock2D",) * 4,
            decoder_block_out_channels=(32,) * 4,
            decoder_layers_per_block=1,
        ),
    ],
    ids=["temporal", "consistency"],
)
def test_the_encoder_alone_is_executed_in_pieces(make, nothing_is_small, pieces):
    torch.manual_seed(0)
    model, x = make().eval(), images()
    with torch.no_grad():
        expected = model.encode(x).latent_dist.mode()
        torch.testing.assert_close(optimize(model).encode(x).latent_dist.mode(), expected, rtol=0, atol=5e-5)
    assert len(pieces) == 1


if __name__ == "__main__":
    print(section())
