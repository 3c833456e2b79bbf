"""What the training loader delivers: images a second and core, and records read for each one used.

    python -m tests.benchmarks.loader SOURCE ... [--column image] [--resolution 256] [--batch-size 16] [--seconds 8]

A source is read by one worker process of one thread, as each rank has several, beside a trainer that does nothing;
the CPU seconds of both are counted. Parquet and tar files are read as a stream too. The last lines simulate who
reads which file under streaming, without processes and networks: 1024 files of 100 records, 1, 8 and 64 GPUs.
"""

import argparse
import os
import time
from itertools import islice

import psutil

os.environ |= {"OMP_NUM_THREADS": "1"}


def measure(config, seconds: float) -> str:
    from train.data.training_data import TrainingData

    started = time.perf_counter()
    data = TrainingData(config, 0)
    opened, images, size = time.perf_counter() - started, 0, 0
    batches = iter(data.loader())
    next(batches)
    first = time.perf_counter() - started
    begin, spent = time.perf_counter(), cpu_seconds()
    while time.perf_counter() - begin < seconds:
        batch = next(batches)["images"]
        images, size = images + len(batch), batch[0].numel()
    rate = images / (cpu_seconds() - spent)
    opening = f"opened in {opened:.2f} s, first batch at {first:.2f} s"
    return f"{rate:8.0f} images a CPU second, of {size / 1e6:.2f} M values; {opening}"


def cpu_seconds() -> float:
    """Those that this process and its workers have used: other programs on the machine change little of them."""
    processes = [psutil.Process(), *psutil.Process().children()]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


class Simulated:
    """A stream without contents that counts the records it is asked for."""

    def __init__(self, shards: int, records: int):
        self.num_shards, self.records, self.count = shards, records, 0

    def name(self, shard: int) -> str:
        return str(shard)

    def length(self, shard: int) -> None:
        return None

    def read(self, shard: int, start: int = 0):
        for n in range(start, self.records):
            self.count += 1
            yield {"bytes": b"", "path": f"{shard}/{n}"}


def read_for_each_used(
    ranks: int, workers: int, shards: int = 1024, records: int = 100, epochs: int = 2
) -> float:
    from train.data.samples import RandomCrops
    from train.data.sizes import Sizes, Steps
    from train.data.streams import Reader, StreamedImages

    stream, batch_size, used = Simulated(shards, records), 4, 0
    crops, sizes = RandomCrops((1.0, 1.0), False), Sizes([8], 0, Steps(1))
    batches = epochs * shards * records // (ranks * batch_size)
    for rank in range(ranks):
        reader = Reader(rank, ranks, workers=workers)
        images = StreamedImages(stream, crops, sizes, 0, batch_size, 1000, reader=reader)
        for worker in range(workers):
            for part in islice(images.draws(worker), batches):
                used += sum(bool(next(records)) for _, records in part)
    return stream.count / used


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="*")
    parser.add_argument("--column", default="image")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=8.0)
    options = parser.parse_args()

    from kl_autoencoder.data.locating import locate
    from train.data.config import DataConfig

    for source in options.source:
        kind = locate(source, "source").kind
        for streaming in (False, True) if kind in ("parquet", "webdataset") else (False,):
            config = DataConfig(
                source, source, options.column, resolution=options.resolution, batch_size=options.batch_size,
                num_workers=1, streaming=streaming, too_small="enlarge",
            )  # fmt: skip
            print(
                f"{kind + (', streamed' if streaming else ''):<22}{measure(config, options.seconds)}",
                flush=True,
            )
    for ranks, workers in ((1, 4), (8, 8), (64, 8)):
        print(
            f"{ranks:3} x {workers}  {read_for_each_used(ranks, workers):.3f} records read for each used",
            flush=True,
        )


if __name__ == "__main__":
    main()
