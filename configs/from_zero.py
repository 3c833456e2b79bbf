# %% [markdown]
# # From zero to your own VAE
#
# Run it whole, or cell by cell in an editor that knows `# %%` (VS Code, PyCharm, Jupyter with jupytext):
#
#     pip install -e ".[all]"
#     python configs/from_zero.py                             # photographs of scikit-image; a few minutes
#     python configs/from_zero.py --photographs my/photos/    # your own, 20 or more
#
# Everything is written to runs/from_zero/. Nothing is downloaded but, once, the weights that LPIPS measures with.

# %%
import argparse
from pathlib import Path

import diffusers
import torch
from PIL import Image
from skimage import data as scikit_image

from kl_autoencoder import KLAutoencoder, load_image, save_image
from kl_autoencoder.cli import main as command
from kl_autoencoder.data.image_io import difference_image, image_grid
from kl_autoencoder.data.locating import SAMPLE_PHOTOGRAPHS
from kl_autoencoder.evaluation.metrics import psnr
from kl_autoencoder.latents.interpolation import interpolate
from kl_autoencoder.models.run_folder import read_metrics
from train.__main__ import main as train

parser = argparse.ArgumentParser(description="From zero to your own VAE.")
parser.add_argument("--photographs", default=SAMPLE_PHOTOGRAPHS, help="a folder (default: scikit-image's)")
parser.add_argument("--steps", type=int, default=350, help="of training (350)")
parser.add_argument("--size", type=int, default=256, help="pixels a side of what is looked at (256)")
parser.add_argument("--output", type=Path, default=Path("runs/from_zero"), help="(runs/from_zero)")
arguments = parser.parse_args([] if "get_ipython" in globals() else None)
RECIPE = Path(__file__).parent / "quickstart.yaml"
OUTPUT = arguments.output
OUTPUT.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## 1. What an autoencoder does
#
# `compact` is in the package. It encodes a photograph of 3 x 256 x 256 numbers to latents of 4 x 32 x 32, 48 times
# fewer, and decodes them again. Left the photograph, in the middle what came back, right four times the difference.

# %%
photographs = [
    load_image(Image.fromarray(image), arguments.size)
    for image in (scikit_image.astronaut(), scikit_image.coffee())
]


@torch.no_grad()
def reconstructed(vae, images):
    """Images (1, 3, H, W) in [-1, 1] through the latents and back."""
    return vae.decode(vae.encode(images).latent_dist.mode()).sample


def looked_at(vae, name):
    """Save photographs, reconstructions and differences side by side, and print their PSNR."""
    images = torch.cat(photographs)
    seen = torch.cat([reconstructed(vae, image) for image in photographs])
    grid = image_grid([images, seen, difference_image(images, seen)], ["photograph", name, "difference x4"])
    save_image(grid, OUTPUT / f"{name}.png")
    print(f"{OUTPUT / name}.png: PSNR {psnr(seen, images).mean():.2f} dB")


compact = KLAutoencoder.from_pretrained("compact").float().eval()
latents = compact.encode(photographs[0]).latent_dist.mean
print("photograph", tuple(photographs[0].shape), "-> latents", tuple(latents.shape))
looked_at(compact, "compact")

# %% [markdown]
# ## 2. Train one
#
# The recipe is `quickstart.yaml`, a small network that begins by shrinking and enlarging. Any key can be given as
# key=value; `python -m train --keys` explains each. Running this again continues where it stopped.

# %%
own = arguments.photographs != SAMPLE_PHOTOGRAPHS
held_out = ["data.validation=null", "data.validation_images=4"] if own else []  # of your own, four
code = train(
    [
        str(RECIPE), f"output_dir={OUTPUT / 'run'}", f"train.steps={arguments.steps}",
        f"data.train={arguments.photographs}", *held_out, f"data.validation_resolution={arguments.size}",
        f"optimizer.warmup_steps={min(50, arguments.steps)}",
    ]
)  # fmt: skip
if code:
    raise SystemExit(code)

# %% [markdown]
# ## 3. What came of it
#
# Each line of metrics.jsonl is a step. `loss` falls, and what the held-out photographs lose with it.

# %%
records = list(read_metrics(OUTPUT / "run" / "metrics.jsonl"))
losses = [record["train/loss"] for record in records if "train/loss" in record]
quality = [record["validation/psnr"] for record in records if "validation/psnr" in record]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; held-out PSNR {quality[0]:.2f} -> {quality[-1]:.2f} dB")
mine = KLAutoencoder.from_pretrained(OUTPUT / "run" / "export").eval()
looked_at(mine, "mine")

# %% [markdown]
# ## 4. Play with the latents
#
# A straight line from the latents of one photograph to those of another, decoded at each step.

# %%
with torch.no_grad():
    ends = [mine.encode(image).latent_dist.mode()[0] for image in photographs]
    strip = [mine.decode(z[None]).sample for z in interpolate(*ends, 5)]
save_image(image_grid(strip), OUTPUT / "between.png")
print(OUTPUT / "between.png")

# %% [markdown]
# ## 5. Use it where diffusers is used
#
# The export is an AutoencoderKL of diffusers, scaled so that its latents have deviation one, as a diffusion model
# wants them; this package need not be there.

# %%
theirs = diffusers.AutoencoderKL.from_pretrained(OUTPUT / "run" / "export").eval()
difference = (reconstructed(theirs, photographs[0]) - reconstructed(mine, photographs[0])).abs().max()
print(f"plain diffusers computes the same, within {difference:.1e}")

# %% [markdown]
# ## 6. Hand it on
#
# One file, graphs for other runtimes, or the hub; here the folder that `push` would publish, with its model card.

# %%
push = ["push", str(OUTPUT / "run"), "--to", "me/my-vae", "--dry-run", "--overwrite"]
if code := command([*push, "-o", str(OUTPUT / "published")]):
    raise SystemExit(code)
print(f"""
Go on:
  kl-autoencoder demo --model {OUTPUT / "run"} --model compact        a page in the browser
  kl-autoencoder evaluate --model {OUTPUT / "run"} --data FOLDER -o report
  python -m train configs/finetune_small.yaml data.train=FOLDER       a better start: compact, fitted to yours
  configs/README.md                                                   recipes of the sizes that people use""")
