"""report.html in a browser: headless Chromium without a network, light and dark, wide and narrow."""

import re

import numpy as np
import pytest

from tests.chromium import decode_png, drag, look
from tests.evaluated import SIZE


@pytest.fixture
def page(browser, report):
    """The report, opened anew, offline, 1200 pixels wide."""
    browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    look(browser, 1200)
    browser.get((report / "report.html").as_uri())
    return browser


def stage(page, number=0):
    from selenium.webdriver.common.by import By

    found = page.find_elements(By.CSS_SELECTOR, ".stage")[number]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    return found


def split(page, number=0):
    style = "document.querySelectorAll('.stage')[arguments[0]].style"
    return page.execute_script(f"return parseFloat({style}.getPropertyValue('--split'))", number)


def pixels(element):
    return decode_png(element.screenshot_as_base64)


def shown(page, number=0):
    """The levels of (original, reconstruction) in a stage."""
    images = []
    for selector in (".pane img", ".over"):
        script = "return document.querySelectorAll('.stage')[arguments[0]].querySelector(arguments[1]).src"
        source = page.execute_script(script, number, selector)
        images.append(decode_png(source.partition(",")[2]))
    return images


def test_the_divider_is_dragged(page):
    target = stage(page)
    assert split(page) == 50
    drag(page, target, (0.5, 0.5), (-0.25, 0))
    assert split(page) == pytest.approx(25, abs=1)
    drag(page, target, (0.25, 0.5), (0.5, 0.2))
    assert split(page) == pytest.approx(75, abs=1)
    drag(page, target, (0.75, 0.5), (0.6, 0))
    assert split(page) == 100 and split(page, 1) == 50  # of this picture alone


def one_to_one(page):
    """The first stage, a pixel of the images on a pixel of the screen."""
    page.execute_script(
        "document.querySelector('.stage').style.cssText += 'position: fixed; z-index: 9; left: 0; top: 0;"
        f"margin: 0; width: {SIZE}px; border-radius: 0'"
    )
    return stage(page)


def test_left_is_the_original_and_right_the_reconstruction(page):
    target = one_to_one(page)
    drag(page, target, (0.5, 0.5), (-0.2, 0))
    seen = pixels(target)
    original, other = shown(page)
    rows, place = slice(32, SIZE), round(SIZE * split(page) / 100)  # without the labels
    left, right = slice(0, place - 24), slice(place + 24, SIZE)  # and the divider
    assert np.abs(seen - original)[rows, left].max() <= 1 and np.abs(seen - other)[rows, left].mean() > 3
    assert np.abs(seen - other)[rows, right].max() <= 1 and np.abs(seen - original)[rows, right].mean() > 3


def test_the_error_is_four_times_the_difference(page):
    target = one_to_one(page)
    page.execute_script("document.querySelector('input[value=error]').click()")
    drag(page, target, (0.5, 0.5), (-0.5, 0))
    original, other = shown(page)
    expected = (4 * np.abs(original - other)).clip(0, 255)
    assert np.abs(pixels(target) - expected)[32:, 24:].max() <= 4 and expected.mean() > 10


def test_another_model_is_chosen(page):
    before = shown(page)[1]
    page.execute_script("document.querySelectorAll('input[name=choice]')[9].click()")
    assert (shown(page)[1] != before).any()
    assert page.execute_script("return document.querySelector('.tag-right').textContent") == "WebP"


def test_the_keyboard_moves_the_divider_and_zooms(page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    divider = page.find_element(By.CSS_SELECTOR, "[role=slider]")
    divider.send_keys(Keys.ARROW_LEFT * 5)
    assert split(page) == pytest.approx(40) and divider.get_attribute("aria-valuenow") == "40"
    divider.send_keys(Keys.HOME)
    assert split(page) == 0
    divider.send_keys(Keys.END + Keys.ARROW_RIGHT)
    assert split(page) == 100
    divider.send_keys("++")
    assert transforms(page)[0] == 4
    divider.send_keys("0")
    assert transforms(page) == (1, 0, 0)


def transforms(page):
    """(scale, x, y) of the images in the first stage, the same for all of them."""
    images = "[...document.querySelector('.stage').querySelectorAll('img')]"
    found = page.execute_script(f"return {images}.map(i => getComputedStyle(i).transform)")
    assert len(found) == 3 and len(set(found)) == 1
    a, b, c, d, x, y = (float(value) for value in re.findall(r"[-\d.]+", found[0]))
    assert (a, b, c) == (d, 0, 0)
    return a, x, y


def test_both_images_are_zoomed_and_moved_together(page):
    from selenium.webdriver.common.by import By

    target = stage(page)
    page.find_element(By.CSS_SELECTOR, "[data-zoom='1']").click()
    width = target.size["width"]
    assert transforms(page) == pytest.approx((2, -width / 2, -width / 2), abs=1)
    drag(page, target, (0.2, 0.3), (0.1, 0.1))
    assert transforms(page) == pytest.approx((2, -0.4 * width, -0.4 * width), abs=2)
    assert split(page) == 50


def touch(page, kind, *points):
    points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
    page.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def test_touch_drags_the_divider_and_pinches_to_zoom(page):
    look(page, 390)
    target = stage(page)
    box = page.execute_script("return arguments[0].getBoundingClientRect().toJSON()", target)
    y, x = box["y"] + box["height"] / 2, box["x"]
    touch(page, "touchStart", (x + box["width"] / 2, y))
    touch(page, "touchMove", (x + 0.4 * box["width"], y))
    touch(page, "touchMove", (x + 0.3 * box["width"], y))
    touch(page, "touchEnd")
    assert split(page) == pytest.approx(30, abs=1)
    touch(page, "touchStart", (x + 100, y), (x + 200, y))
    touch(page, "touchMove", (x + 50, y), (x + 250, y))
    touch(page, "touchEnd")
    assert transforms(page)[0] == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_nothing_is_wider_than_the_screen(page, dark):
    look(page, 390, dark)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    colours = page.execute_script(
        "let s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    )
    ink, paper = (np.mean([int(v) for v in re.findall(r"\d+", colour)[:3]]) for colour in colours)
    assert (ink > 200 > 60 > paper) if dark else (ink < 60 < 200 < paper)
    drawn = page.execute_script("return getComputedStyle(document.querySelector('.plot svg text')).fill")
    assert abs(np.mean([int(v) for v in re.findall(r"\d+", drawn)]) - paper) > 80


def test_the_page_loads_nothing_from_elsewhere(page, report):
    html = (report / "report.html").read_text()
    sources = re.findall(r"<(?:img|script|link|iframe|source|image)\b[^>]*?(?:src|href)=\"([^\"]*)", html)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "@import" not in html and "url(" not in re.sub(r"url\(#", "", html)
    assert page.get_log("browser") == []
    assert len(re.findall(r"<svg", html)) >= 8 and "NaN" not in html.partition("application/json")[0]
