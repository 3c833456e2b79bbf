"""In each of several ranks: the gradients of one step, written by the main process."""

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.train.runs import small_config
from train.autoencoder.task import AutoencoderTask
from train.loop.trainer import Trainer


def write_gradients(
    photographs: Path, folder: Path, widths: list[int], batch_size: int, with_lpips: bool
) -> None:
    perceptual = {"weight": 0.5 if with_lpips else 0.0, "net": "squeeze"}
    config = small_config(
        photographs,
        folder,
        model={"block_out_channels": widths},
        data={"batch_size": batch_size},
        loss={
            "reconstruction": "gaussian",
            "perceptual": perceptual,
            "kl": {"weight": 0.1},
            "adversarial": {
                "weight": 0.5,
                "disc_start": 0,
                "channels": 4,
                "lecam_weight": 0.1,
                "r1_weight": 0.1,
            },
        },
    )
    trainer = Trainer(config, AutoencoderTask)
    # the gradients are to stay
    for player in trainer.task.players:
        player.update = partial(dict, {player.gradient_norm: torch.ones(())})
    trainer.train_step([next(iter(trainer.loader))])
    if trainer.is_main:
        networks = {"autoencoder": trainer.task.model, "discriminator": trainer.task.adversary.player.network}
        gradients = {
            f"{name}.{key.removeprefix('module.')}": parameter.grad.contiguous()
            for name, network in networks.items()
            for key, parameter in network.named_parameters()
        }
        ranks = trainer.accelerator.num_processes
        save_file(gradients, folder / f"gradients-of-{ranks}-ranks.safetensors")
    trainer.accelerator.end_training()
