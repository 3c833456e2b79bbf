"""Run under `accelerate launch`: the gradients of one step, written by the main process."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.test_trainer import small_config
from train.launch import start_all_cpu_processes
from train.trainer import Trainer


def main(photographs: str, folder: str, batch_size: str, with_lpips: str) -> None:
    perceptual = {"weight": 0.5 if with_lpips == "1" else 0.0, "net": "squeeze"}
    config = small_config(
        photographs,
        folder,
        data={"batch_size": int(batch_size)},
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
    trainer = Trainer(config)
    # the gradients are to stay
    trainer._update = lambda optimizer, parameters, terms, name: terms.update({name: torch.ones(())})
    trainer.train_step([next(iter(trainer._loader(0)))])
    if trainer.is_main:
        networks = {"autoencoder": trainer.unwrapped, "discriminator": trainer.discriminator}
        gradients = {
            f"{name}.{key.removeprefix('module.')}": parameter.grad.contiguous()
            for name, network in networks.items()
            for key, parameter in network.named_parameters()
        }
        ranks = trainer.accelerator.num_processes
        save_file(gradients, Path(folder) / f"gradients-of-{ranks}-ranks.safetensors")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    start_all_cpu_processes("tests.rank_gradients", sys.argv[1:])
    main(*sys.argv[1:])
