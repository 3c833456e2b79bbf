"""Profile how long a step takes for data, autoencoder, LPIPS, discriminator, optimizer and communication."""

from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

PARTS = ("data", "autoencoder", "perceptual", "discriminator", "optimizer", "communication")
COMMUNICATION = ("nccl", "gloo", "all_reduce", "allreduce")  # an event with one of these in its name
WARMUP, MEASURED = 3, 5  # steps


def profiler(folder: Path, say) -> profile:
    """A torch profiler of five steps, after three of warm-up; call its `step()` after each step.

    At the end it writes `folder/trace.json` (for Perfetto) and `folder/table.txt`, and calls `say` with the table.
    """
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
    """A table of milliseconds a step for each part of a step: on the host, and on the device (0 on a CPU).

    "host ms" is the time from the start of a part to its end on the host: on a CPU the time to compute it, with a
    GPU the time to queue its work; "device ms" is the time that the GPU takes for it. Communication overlaps the
    autoencoder's backward pass and is counted in both.
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
