"""What the parts of a run share: its configuration, its ranks, its folder, and one voice."""

import os
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DDPCommunicationHookType, broadcast_object_list
from tqdm import tqdm

from kl_autoencoder.distributed import ranks_on_cpus

from ..config import Config
from .launch import hold, refuse_plugins
from .schedules import LearningRate
from .trackers import check_trackers


class RunContext:
    """One rank of a run, before there is anything to train. Making one takes the run's folder.

    Raises ValueError for an accelerate plug-in or a precision that cannot be had, and for a folder that another
    run holds.
    """

    def __init__(self, config: Config):
        self.config, self.folder = config, Path(config.output_dir)
        cpu = ranks_on_cpus()
        refuse_plugins(os.environ)
        check_trackers(config.log.all_trackers)
        if config.train.mixed_precision == "fp16" and PartialState(cpu=cpu).device.type == "cpu":
            raise ValueError("train.mixed_precision: fp16 on a CPU; allowed there: no, bf16")
        hook = DDPCommunicationHookType.BF16 if config.train.bf16_gradients else DDPCommunicationHookType.NO
        self.accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=config.train.mixed_precision,
            gradient_accumulation_steps=config.train.gradient_accumulation,
            project_dir=self.folder,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook)],
        )
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.rank, self.ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.learning_rate = LearningRate(config, self.ranks)
        self._take_folder()

    @property
    def samples_per_step(self) -> int:
        """Over all ranks and micro-batches."""
        return self.learning_rate.samples_per_step

    def say(self, text: str) -> None:
        """Print a line, once and not on every rank, past the progress bar."""
        if self.is_main:
            tqdm.write(text)

    def on_main(self, work: Callable[[], None]) -> str | None:
        """Do it on the main rank while all wait; the message of an OSError, on every rank, or None."""
        problem = None
        if self.is_main:
            try:
                work()
            except OSError as error:
                problem = str(error)
        [problem] = broadcast_object_list([problem])
        return problem

    def _take_folder(self) -> None:
        if self.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = hold(self.folder, self.say)
            except OSError as error:
                raise ValueError(
                    f"output_dir: {self.folder} cannot be written to ({error.strerror})"
                ) from None
        self.accelerator.wait_for_everyone()
