"""The GPU's paths without a GPU: torch's fake tensors have a device, a shape and a type, but no numbers.

A tensor made on the wrong device, a shape that does not fit or a type that changes on the way is an error, as it
would be on a GPU. Launchers that check their arguments replace Triton's kernels; test_executor.py tests the numbers
of those in Triton's interpreter.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.inference import dispatch, executor, triton_group_norm
from kl_autoencoder.inference.memory import DeviceMemory

LEVELS = {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1, "norm_num_groups": 8,
          "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip


class Launcher:
    """Stands for a Triton kernel: checks that its tensors are on the GPU and that no axis of the grid is 0."""

    def __init__(self):
        self.launches = 0

    def __getitem__(self, grid):
        assert len(grid) == 3 and all(programs > 0 for programs in grid)

        def launch(*arguments):
            self.launches += 1
            tensors = [a for a in arguments if isinstance(a, Tensor)]
            assert tensors and all(tensor.device.type == "cuda" for tensor in tensors)

        return launch


@pytest.fixture
def gpu(monkeypatch):
    """A mode in which "cuda" is there, and the launchers of the two kernels."""
    kernels = Launcher(), Launcher()
    for name, kernel in zip(("_measure", "_normalize"), kernels, strict=True):
        monkeypatch.setattr(triton_group_norm, name, kernel)
    monkeypatch.setattr(dispatch, "STREAMS", 1)  # threads have modes of their own, and streams need a driver
    # an arena tells tensors by their addresses, which these do not have
    monkeypatch.setattr(executor, "Arena", lambda pinned: DeviceMemory(torch.device("cpu")))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield kernels


def network(dtype: torch.dtype) -> KLAutoencoder:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return KLAutoencoder(**LEVELS).eval()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.skipif(triton_group_norm.triton is None, reason="no Triton here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "how", [{}, {"least_memory": True}, {"least_memory": True, "offload": True}], ids=str
)
def test_pieces_stay_on_the_gpu_and_fit(gpu, dtype, how):
    """Two images whose sides no strip height divides."""
    vae = network(dtype).requires_grad_(False)
    x = torch.empty(2, 3, 264, 136, device="cuda", dtype=dtype)
    moments = dispatch.infer_in_pieces(vae.encoder, x, rows=32, **how)
    assert (moments.shape, moments.dtype, moments.device.type) == ((2, 8, 33, 17), dtype, "cuda")
    y = dispatch.infer_in_pieces(vae.decoder, moments[:, :4], rows=32, **how)
    assert (y.shape, y.dtype, y.device.type) == (x.shape, dtype, "cuda")
    assert all(kernel.launches > 20 for kernel in gpu)


def test_shapes_can_be_asked_for_on_the_meta_device():
    """As with diffusers' class: nothing is computed, and a device without autocast is no error."""
    with torch.device("meta"):
        vae = KLAutoencoder(**LEVELS)
        latents = vae.encode(torch.empty(1, 3, 64, 72)).latent_dist.mode()
        assert vae.decode(latents).sample.shape == (1, 3, 64, 72) and latents.shape == (1, 4, 8, 9)
