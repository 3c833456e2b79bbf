"""A headless Chromium with its driver for the tests of pages, which are skipped where there is none."""

import base64
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run")


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser with an empty profile, which logs what its pages print and what they load."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("no Chromium with its driver on this machine")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def decode_png(encoded: str) -> np.ndarray:
    """A PNG in base64 -> its levels, (H, W, 3) of int."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")).astype(int)


def look(browser: Any, width: int, dark: bool = False) -> None:
    """Set the window's width in pixels, a phone below 500, and the colour scheme that pages are told."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def drag(page: Any, target: Any, start: tuple[float, float], by: tuple[float, float]) -> None:
    """Drag the mouse by `by` from the place `start` in `target`, both in shares of its size."""
    from selenium.webdriver import ActionChains

    width, height = target.size["width"], target.size["height"]
    mouse = ActionChains(page, duration=20)
    mouse.move_to_element_with_offset(target, (start[0] - 0.5) * width, (start[1] - 0.5) * height)
    mouse.click_and_hold().move_by_offset(by[0] * width, by[1] * height).release().perform()
