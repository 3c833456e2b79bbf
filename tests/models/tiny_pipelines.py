"""Pipelines of every family around tiny random parts, made from scratch; prompts are given as embeddings."""

import inspect

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image

from tests.models.test_autoencoder_kl import unet
from tests.published import PUBLISHED, reduced

WIDTH = 32  # of all embeddings
# FLUX.2's small decoder: narrower than its encoder
FLUX2 = {"decoder_block_out_channels": (24, 48, 72, 72), "latent_channels": 32, "norm_num_groups": 8}


def sd():
    return {"unet": unet()}


def sdxl():
    # 6 numbers of sizes and crops, each embedded in 8
    shape = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": WIDTH + 6 * 8}
    return {"unet": unet(addition_embed_type="text_time", **shape)}


def sd3():
    shape = {"sample_size": 8, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4}
    conditions = {"joint_attention_dim": WIDTH, "caption_projection_dim": 32, "pooled_projection_dim": WIDTH}
    return {"transformer": SD3Transformer2DModel(**shape, **conditions)}


def flux():
    shape = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    conditions = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH, "axes_dims_rope": (4, 4, 8)}
    return {"transformer": FluxTransformer2DModel(**shape, **conditions)}


def flux2():
    shape = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    conditions = {"joint_attention_dim": WIDTH, "axes_dims_rope": (4, 4, 4, 4)}
    return {"transformer": Flux2Transformer2DModel(**shape, **conditions)}


PHOTOGRAPH = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
MASK = Image.fromarray(np.tri(64, dtype=np.uint8) * 255)
CHANGED = {"image": PHOTOGRAPH, "strength": 1.0}
# family -> (pipeline, its own parts, the published shape of its autoencoder, what it is called with)
FAMILIES = {
    "sd": (StableDiffusionPipeline, sd, "sd", {}),
    "sdxl": (StableDiffusionXLPipeline, sdxl, "sdxl", {}),
    "sd3": (StableDiffusion3Pipeline, sd3, "sd3", {}),
    "flux": (FluxPipeline, flux, "flux", {}),
    "flux2": (Flux2Pipeline, flux2, "flux2", {"image": PHOTOGRAPH}),
    "img2img": (StableDiffusionImg2ImgPipeline, sd, "sd", CHANGED),
    "inpaint": (StableDiffusionInpaintPipeline, sd, "sd", CHANGED | {"mask_image": MASK}),
}


def tiny_vae(shape, **more):
    """diffusers' autoencoder with narrow levels and random weights, in evaluation mode; `more` of its keys."""
    torch.manual_seed(0)
    if shape != "flux2":
        return AutoencoderKL(**reduced(PUBLISHED[shape]) | more).eval()
    vae = AutoencoderKLFlux2(block_out_channels=(32, 64, 96, 96), **FLUX2 | more).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae


def tiny_pipeline(family):
    cls, parts, shape, _ = FAMILIES[family]
    torch.manual_seed(0)
    flow = FlowMatchEulerDiscreteScheduler()
    scheduler = (
        flow if "3" in family or "flux" in family else DDIMScheduler(clip_sample=False, steps_offset=1)
    )
    vae = tiny_vae(shape)
    torch.manual_seed(1)
    given = {name: part.eval() for name, part in parts().items()} | {"vae": vae, "scheduler": scheduler}
    wanted = inspect.signature(cls.__init__).parameters
    absent = {name: None for name in wanted if name != "self" and name not in given}
    if "requires_safety_checker" in absent:
        absent["requires_safety_checker"] = False
    pipe = cls(**absent | given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_pipeline(pipe, family, dtype=torch.float32):
    """The pipeline's images, (1, 3, 64, 64) in [0, 1], on the CPU."""
    generator = torch.Generator().manual_seed(3)
    prompt, pooled = torch.randn(1, 7, WIDTH, generator=generator), torch.randn(1, WIDTH, generator=generator)
    takes = inspect.signature(type(pipe).__call__).parameters
    given = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    if "unet" in pipe.components or family == "sd3":
        given |= {f"negative_{name}": torch.zeros_like(embedding) for name, embedding in given.items()}
    given = {name: embedding.to(dtype) for name, embedding in given.items() if name in takes}
    more = dict(FAMILIES[family][3])
    if "image" not in more or family == "flux2":
        more |= {"height": 64, "width": 64}
    steps = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(4), "output_type": "pt"}
    return pipe(**given, **more, **steps).images.float().cpu()
