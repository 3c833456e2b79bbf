"""The demo page in a real Chromium: upload, drag, see the numbers change; and that nothing leaves the machine."""

import ipaddress
import json
import os
import re
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from PIL import Image
from skimage import data

from kl_autoencoder import KLAutoencoder
from kl_autoencoder.cli.main import main
from kl_autoencoder.models.packaged import COMPACT
from tests.chromium import decode_png, drag, look
from tests.processes import finish, start, wait_until

pytest.importorskip("gradio")
PATIENCE = 60  # seconds to wait for what should take about one


def serve(*arguments):
    """Run the command `demo`, and write LEAVES to the log for every connection to another machine."""
    sys.addaudithook(_write_what_leaves)
    tempfile.tempdir = None  # so that TMPDIR is read again
    return main(["demo", *arguments])


def _write_what_leaves(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if not _is_here(host):
        os.write(1, f"\nLEAVES {event} {host}\n".encode())


def _is_here(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in (None, "localhost")


def test_models_that_the_page_cannot_show_are_refused():
    from kl_autoencoder.demo import server

    gray = KLAutoencoder(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(ValueError, match="gray: allowed on the page: KL autoencoders of 3 channels"):
        server.serve({"gray": gray}, None)


@pytest.fixture(scope="module")
def served(two_models, tmp_path_factory):
    """(address, process, log) of a page with two models."""
    folder = tmp_path_factory.mktemp("demo")
    log = folder / "log"
    models = [f"--model={two_models / 'first'}", f"--model={COMPACT}"]
    process = start(log, serve, *models, "--port", "0", TMPDIR=str(folder))
    assert wait_until(lambda: log.exists() and "Ctrl-C" in log.read_text(), process), log.read_text()
    yield re.search(r"http://127\.0\.0\.1:\d+", log.read_text())[0], process, log
    if process.is_alive():
        process.kill()


@pytest.fixture(scope="module")
def page(browser, served):
    """The page, opened once for all tests, with its first reconstruction."""
    look(browser, 1200)
    browser.get_log("performance")  # what Chromium itself opened before
    browser.get(served[0])
    wait(lambda: figures(browser))
    return browser


def wait(condition):
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def figures(page, output="figures"):
    """The table: a list of texts a row."""
    rows = f"[...document.querySelectorAll('#{output} tbody tr')]"
    return page.execute_script(f"return {rows}.map(row => [...row.children].map(cell => cell.innerText))")


def upload(page, path):
    """Choose a file, as the file dialog does, in place of the photograph that is there."""
    from selenium.webdriver.common.by import By

    page.find_element(By.CSS_SELECTOR, "#photograph input[type=file]").send_keys(str(path))


def open_tab(page, name):
    from selenium.webdriver.common.by import By

    look(page, 1200)
    tab = next(tab for tab in page.find_elements(By.CSS_SELECTOR, "[role=tab]") if tab.text.strip() == name)
    page.execute_script("arguments[0].click()", tab)  # a message may still be fading in front of it


def stages(page, output="comparison"):
    """The visible stages of an output, scrolled to."""
    from selenium.webdriver.common.by import By

    found = [s for s in page.find_elements(By.CSS_SELECTOR, f"#{output} .stage") if s.is_displayed()]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", found[0])
    return found


def styles(page, found, name):
    script = "return arguments[0].map(s => s.style.getPropertyValue(arguments[1]))"
    return page.execute_script(script, found, name)


def levels_of(page, selector, stage):
    """The pixels of an image in a stage, as the browser has them."""
    script = """
    const image = arguments[0].querySelector(arguments[1]), canvas = document.createElement("canvas");
    if (!image.complete || !image.naturalWidth) return null;
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL("image/png");"""
    found = wait(lambda: page.execute_script(script, stage, selector))
    return decode_png(found.partition(",")[2])


def test_the_page_opens_with_a_reconstructed_example(page):
    rows = figures(page)
    assert [row[0].split("\n")[0].strip() for row in rows] == [
        "first", "compact", "JPEG", "WebP",
    ]  # fmt: skip
    assert float(rows[1][1]) > 25 > float(rows[0][1])  # PSNR of the example: trained, untrained
    assert [row[4] for row in rows[:2]] == ["16.4", "16.4"] and float(rows[2][4]) <= 16.4  # kB
    assert all(float(row[7]) > 1 for row in rows[:2])  # MB
    assert len(stages(page)) == 2


def test_dividers_and_zoom_are_synchronised(page):
    from selenium.webdriver.common.by import By

    found = stages(page)
    drag(page, found[0], (0.5, 0.5), (-0.25, 0))
    assert [float(s[:-1]) for s in styles(page, found, "--split")] == pytest.approx([25, 25], abs=1)
    page.find_elements(By.CSS_SELECTOR, "#comparison [data-zoom='1']")[1].click()
    assert styles(page, found, "--zoom") == ["2", "2"]
    assert len(set(styles(page, found, "--x"))) == 1 and styles(page, found, "--x") != ["0px", "0px"]
    page.find_elements(By.CSS_SELECTOR, "#comparison [data-zoom='-1']")[0].click()


def test_the_difference_is_signed_and_amplified(page):
    click(page, "#comparison input[value=difference]")
    set_range(page, "#comparison input[name=gain]", 8)
    stage = stages(page)[1]
    wait(lambda: "×8" in stage.text)
    found, original = levels_of(page, ".over", stage), levels_of(page, ".pane img", stage)
    click(page, "#comparison input[value=image]")
    wait(lambda: "×" not in stage.text)
    seen = levels_of(page, ".over", stage)
    expected = (127.5 + 8 * (seen - original) / 2).clip(0, 255)
    assert np.abs(found - expected).max() <= 0.5 and found.min() == 0 and found.max() == 255


def click(page, selector):
    page.execute_script("document.querySelector(arguments[0]).click()", selector)


def set_range(page, selector, value):
    script = """
    const input = document.querySelector(arguments[0]);
    input.value = arguments[1];
    for (const kind of ["input", "change", "pointerup"]) input.dispatchEvent(new Event(kind, { bubbles: true }));"""
    page.execute_script(script, selector, value)


def test_blinking_shows_one_and_the_other(page):
    click(page, "#comparison input[name=blink]")
    shown = "return document.querySelector('#comparison form').classList.contains('left-only')"
    for wanted in (True, False, True):
        wait(lambda wanted=wanted: page.execute_script(shown) == wanted)
    click(page, "#comparison input[name=blink]")
    wait(lambda: not page.execute_script(shown))


def test_a_codec_is_chosen(page):
    click(page, "#comparison input[name=method][value='3']")
    assert "WebP" in stages(page)[2].text
    click(page, "#comparison input[name=method][value='3']")
    assert len(stages(page)) == 2


def test_an_upload_changes_the_numbers(page, tmp_path):
    Image.fromarray(data.rocket()[100:228, 200:392]).save(tmp_path / "rakete <b>.png")
    before = figures(page)
    upload(page, tmp_path / "rakete <b>.png")
    rows = wait(lambda: figures(page) if figures(page) not in ([], before) else None)
    assert [row[4] for row in rows[:2]] == ["1.5", "1.5"] and rows[1][0].endswith("4 channels of 24x16")
    about = page.execute_script("return document.querySelector('#figures .fine').innerText")
    assert about.startswith("rakete") and "192x128 pixels" in about
    left = levels_of(page, ".pane img", stages(page)[0])
    assert (left == data.rocket()[100:228, 200:392]).all()


def test_a_file_that_is_no_photograph_is_reported_in_a_sentence(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    upload(page, tmp_path / "broken.png")
    script = "return [...document.querySelectorAll('.toast-body')].map(t => t.innerText).join()"
    said = wait(lambda: page.execute_script(script))
    assert "broken.png: not an image in a format that can be read" in said and str(tmp_path) not in said
    click(page, ".toast-close")
    Image.fromarray(data.coffee()[:128, :128]).save(tmp_path / "coffee.png")  # and the page goes on
    upload(page, tmp_path / "coffee.png")
    wait(lambda: "16x16" in figures(page)[0][0])


def pictures(page, output):
    script = f"return [...document.querySelectorAll('#{output} .pictures figcaption')].map(c => c.innerText)"
    return page.execute_script(script)


def test_every_other_tab_shows_its_pictures(page):
    open_tab(page, "Latents")
    assert wait(lambda: pictures(page, "latents")) == [
        "principal components",
        *(f"channel {i}" for i in range(4)),
    ]
    open_tab(page, "Noise")
    wait(lambda: page.execute_script("return document.querySelector('#noise .values')"))
    if find_spec("constriction"):
        open_tab(page, "File")
        wait(lambda: len(figures(page, "file-figures")) == 3)
    open_tab(page, "Between two")
    assert wait(lambda: pictures(page, "between")) == ["first", "50% of the way", "second"]
    open_tab(page, "Samples")
    assert wait(lambda: pictures(page, "samples")) == [f"sample {i}" for i in range(4)]
    open_tab(page, "Reconstruction")


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_nothing_is_wider_than_the_screen(page, dark):
    look(page, 390, dark)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390
    script = """
    const [of, on] = [arguments[0], document.body].map(element => getComputedStyle(element));
    return [of.color, on.backgroundColor];"""
    about = page.execute_script("return document.querySelector('#figures .fine')")
    wait(lambda: page.execute_script("return document.body.classList.contains('dark')") == dark)
    ink, paper = (
        np.mean([int(v) for v in re.findall(r"\d+", c)[:3]]) for c in page.execute_script(script, about)
    )
    assert (ink > 140 > 60 > paper) if dark else (ink < 120 < 230 < paper)


def ask(address, headers=(), body=None):
    """The status and headers of an answer."""
    request = urllib.request.Request(address, body, dict(headers))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=PATIENCE) as answer:
            return answer.status, answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


def test_other_hosts_and_too_large_uploads_are_refused(served):
    address = served[0]
    status, headers = ask(address)
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    assert ask(address, {"Host": "evil.example"})[0] == 400
    assert ask(f"{address}/pictures/none.png")[0] == 404
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + bytes(65 << 20) + b"\r\n--b--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    assert ask(f"{address}/gradio_api/upload", kind, body)[0] == 413


def test_nothing_leaves_the_machine(page, served):
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    elsewhere = {url for url in asked if urlsplit(url).scheme not in ("data", "blob", "chrome")}
    assert len(elsewhere) > 20 and {urlsplit(url).netloc for url in elsewhere} == {urlsplit(served[0]).netloc}
    assert "LEAVES" not in served[2].read_text()
    errors = [e for e in page.get_log("browser") if e["level"] == "SEVERE"]
    assert errors == []


def test_a_signal_ends_the_page_at_once_and_leaves_nothing(page, served, tmp_path):
    """In the middle of a computation; no process and no uploaded file is left."""
    _, process, log = served
    running = psutil.Process(process.pid)
    children, before = running.children(recursive=True), running.cpu_times().user
    Image.fromarray(np.tile(data.astronaut(), (2, 2, 1))).save(tmp_path / "large.png")
    upload(page, tmp_path / "large.png")
    wait(lambda: running.cpu_times().user > before + 0.3)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == [143]
    assert not any(child.is_running() for child in children)
    assert list(log.parent.iterdir()) == [log] and "Traceback" not in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_page_is_served_leaves_nothing(tmp_path, number):
    log = tmp_path / "log"
    process = start(log, serve, "--port", "0", TMPDIR=str(tmp_path))
    assert wait_until(lambda: list(tmp_path.glob("kl-autoencoder-demo-*")), process), log.read_text()
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number)
    assert finish(process) == [128 + number]
    assert not any(child.is_running() for child in children)
    assert list(tmp_path.iterdir()) == [log] and "Ctrl-C" not in log.read_text()
    assert "Traceback" not in log.read_text()
