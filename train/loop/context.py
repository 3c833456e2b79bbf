"""`RunContext`: what all parts of a run share: configuration, ranks, device, folder, printing on one rank."""

import os
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import DDPCommunicationHookType, broadcast_object_list
from tqdm import tqdm

from kl_autoencoder.distributed import ranks_on_cpus

from ..config import Config
from .launch import lock_folder, refuse_plugins
from .schedules import LearningRate
from .trackers import check_trackers


class RunContext:
    """One rank of a run, created before data and networks; creating it locks the run's folder.

    rank, ranks: the number of this rank, from 0, and how many there are. learning_rate: step -> rate. Raises
    ValueError for an accelerate plug-in or tracker that is not supported, for fp16 on a CPU, and for a folder that
    cannot be written to or that another run has locked.
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
        self._lock_folder()

    @property
    def samples_per_step(self) -> int:
        """Samples that an optimizer step consumes, over all ranks and micro-batches."""
        return self.learning_rate.samples_per_step

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on the main rank only."""
        if self.is_main:
            tqdm.write(text)

    def on_main(self, work: Callable[[], None]) -> str | None:
        """Call `work` on the main rank while the others wait; all return the message of its OSError, or None."""
        problem = None
        if self.is_main:
            try:
                work()
            except OSError as error:
                problem = str(error)
        [problem] = broadcast_object_list([problem])
        return problem

    def _lock_folder(self) -> None:
        if self.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock = lock_folder(self.folder, self.say)
            except OSError as error:
                raise ValueError(
                    f"output_dir: {self.folder} cannot be written to ({error.strerror})"
                ) from None
        self.accelerator.wait_for_everyone()
