"""The columns of tables of methods: metric, label, digits, unit, and whether higher or lower is better."""

from typing import NamedTuple


class Column(NamedTuple):
    """A metric as tables show it."""

    key: str  # in metrics.json
    label: str
    better: str  # "up" if higher values are better, "down" if lower ones are, "" if neither
    digits: int
    unit: str = ""

    @property
    def arrow(self) -> str:
        return {"up": "↑", "down": "↓", "": ""}[self.better]

    def text(self, value: float | None) -> str:
        """The value as a table shows it; a dash for None."""
        return "–" if value is None else f"{value:,.{self.digits}f}"


COLUMNS = (
    Column("psnr", "PSNR", "up", 2, "dB"),
    Column("ssim", "SSIM", "up", 3),
    Column("ms_ssim", "MS-SSIM", "up", 3),
    Column("lpips", "LPIPS", "down", 3),
    Column("dists", "DISTS", "down", 3),
    Column("vif", "VIF", "up", 3),
    Column("rfid", "rFID", "down", 2),
    Column("squeezenet_frechet_distance", "SqueezeNet FD", "down", 0),
    Column("bits_per_pixel", "bits/pixel", "", 3),
    Column("kl_bits_per_pixel", "KL bits/pixel", "", 3),
)
