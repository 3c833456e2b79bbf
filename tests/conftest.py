"""Shared fixtures: what is beside the project (`../shared`) is used where it is there."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

# Before torch is imported anywhere: LPIPS backbones from beside the project, unless the user has some.
if "TORCH_HOME" not in os.environ and (SHARED / "torch_home").is_dir():
    os.environ["TORCH_HOME"] = str(SHARED / "torch_home")


def backbone_missing(net):
    import torch

    from kl_autoencoder.metrics import BACKBONES

    return not (Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[net]).is_file()


@pytest.fixture(params=["alex", "squeeze"])
def lpips_net(request):
    """A net whose backbone is on this machine; nothing is downloaded."""
    if backbone_missing(request.param):
        pytest.skip(f"the LPIPS backbone {request.param} is not in TORCH_HOME")
    return request.param
