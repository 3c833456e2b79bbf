"""The columns of tables of methods: which metric, its name, digits, unit, and which way is better."""

from typing import NamedTuple


class Column(NamedTuple):
    """A metric as the tables show it; `better` says whether higher (up) or lower (down) values are."""

    key: str
    label: str
    better: str  # up, down, or nothing
    digits: int
    unit: str = ""

    @property
    def arrow(self) -> str:
        return {"up": "↑", "down": "↓", "": ""}[self.better]

    def text(self, value: float | None) -> str:
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
