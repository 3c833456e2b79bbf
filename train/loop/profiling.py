"""Profile what a step spends on data, autoencoder, LPIPS, discriminator, optimizer and communication."""

from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

PARTS = ("data", "autoencoder", "perceptual", "discriminator", "optimizer", "communication")
COMMUNICATION = ("nccl", "gloo", "all_reduce", "allreduce")
WARMUP, MEASURED = 3, 5


def profiler(folder: Path, say) -> profile:
    """Profile five steps after three of warm-up: writes `folder/trace.json`, for Perfetto, and prints a table."""
    folder.mkdir(parents=True, exist_ok=True)

    def finished(result: profile) -> None:
        result.export_chrome_trace(str(folder / "trace.json"))
        table = cost_table(result)
        (folder / "table.txt").write_text(table + "\n")
        say(table)

    activities = [a for a in (ProfilerActivity.CPU, ProfilerActivity.CUDA) if a in supported_activities()]
    return profile(
        activities=activities,
        schedule=schedule(wait=0, warmup=WARMUP, active=MEASURED, repeat=1),
        on_trace_ready=finished,
        acc_events=True,
    )


def cost_table(result: profile) -> str:
    """A table of milliseconds a step for each part: on the host, and on the device where there is one.

    The host's time of a part is the time between its start and its end; on a GPU that is what it takes to queue
    the work, and the device's column is what it takes to do it. Communication overlaps the autoencoder's
    backward pass and is counted in both.
    """
    rows = {part: [0.0, 0.0] for part in PARTS}
    for event in result.events() or []:
        part = event.name if event.name in PARTS else None
        if part is None and any(mark in event.name.lower() for mark in COMMUNICATION):
            part = "communication"
        if part is not None:
            on_host = event.device_type == DeviceType.CPU
            rows[part][0] += event.cpu_time_total if on_host else 0.0
            rows[part][1] += 0.0 if on_host else event.device_time_total
    lines = [f"{'part of a step':<16}{'host ms':>10}{'device ms':>11}"]
    for part, (host, device) in rows.items():
        lines.append(f"{part:<16}{host / 1e3 / MEASURED:>10.2f}{device / 1e3 / MEASURED:>11.2f}")
    return "\n".join(lines)
