"""The page at ``/`` and the one at ``/docs``, in a real browser, before a real server."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch

from bitfast.commands.classify import Classifier, Prediction
from bitfast.images.files import Candidate
from bitfast.serving.pages import load_page
from tests.cli.common import picture, save_model

from .server import RunningServer, serving

DRIVER, BROWSER = shutil.which("chromedriver"), shutil.which("chromium")
NEEDS_BROWSER = pytest.mark.skipif(
    DRIVER is None or BROWSER is None,
    reason="needs chromium and chromedriver in PATH (Debian: chromium, chromium-driver)",
)
FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --window-size=900,1200
"""
DEADLINE = 60.0
"""Seconds that the page has to show an answer, on a busy machine."""

HTML_LABEL = "<img src=x onerror=\"document.title='run'\"> cat"
LABELS = [HTML_LABEL, "dog with a long name", "Möwe"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("page") / "model<b>", id2label=dict(enumerate(LABELS))
    )


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with serving(model, tmp_path_factory.mktemp("log")) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(server: RunningServer, browser: Any) -> Any:
    browser.get(server.url + "/")
    browser.get_log("browser")
    return browser


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("first.png", "second.jpg", "third <b>.webp")]
    for path in paths:
        picture().save(path)
    return paths


# ---- what a person does and sees ----------------------------------------------------------------


def pick(page: Any, *paths: Path) -> None:
    page.find_element("id", "files").send_keys("\n".join(map(str, paths)))


def drop(page: Any, *paths: Path) -> None:
    """Drag files over the field from outside the browser, and let them go."""
    field = page.find_element("id", "drop").rect
    place = {"x": field["x"] + field["width"] / 2, "y": field["y"] + field["height"] / 2}
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, **place, "data": data})


PASTE = """
const canvas = document.createElement("canvas");
canvas.toBlob((blob) => {
  const clipboard = new DataTransfer();
  clipboard.items.add(new File([blob], "pasted.png", {type: "image/png"}));
  document.body.dispatchEvent(new ClipboardEvent("paste", {clipboardData: clipboard, bubbles: true}));
});
"""


def results(page: Any, count: int) -> list[Any]:
    """Return the results, newest first, when there are so many and none of them waits."""
    from selenium.webdriver.support.ui import WebDriverWait

    def finished(page: Any) -> list[Any]:
        found = page.find_elements("css selector", ".result:not([aria-busy])")
        return found if len(found) == count else []

    return WebDriverWait(page, DEADLINE).until(finished)


def shown(result: Any) -> tuple[str, list[tuple[str, str]]]:
    """Return the name and the (label, score) pairs of a result, as they can be read."""
    lines = result.find_elements("css selector", ".labels li")
    pairs = [
        tuple(line.find_element("class name", part).text for part in ("label", "score"))
        for line in lines
    ]
    return result.find_element("tag name", "h2").text, pairs  # type: ignore[return-value]


def expected(model: Path, path: Path) -> list[tuple[str, str]]:
    """Return what ``bitfast classify`` says of a file, written as the page does."""
    classifier = Classifier.load(str(model), torch.device("cpu"), "float32")
    [[outcome]] = classifier.classify_files([Candidate(str(path))], 1, top_k=5)
    return [(one.label, percent(one)) for one in outcome.predictions]


def percent(prediction: Prediction) -> str:
    return f"{100 * prediction.score:.1f} %"


def console(page: Any) -> list[str]:
    """Return what the browser complains of, but for answers that are errors, which it reports as well."""
    return [
        entry["message"]
        for entry in page.get_log("browser")
        if "the server responded with a status of 4" not in entry["message"]
    ]


# ---- the page -----------------------------------------------------------------------------------


@NEEDS_BROWSER
@pytest.mark.parametrize("give", [pick, drop])
def test_an_image_gets_the_labels_of_bitfast_classify_and_the_time_taken(
    page: Any, model: Path, images: list[Path], give: Any
) -> None:
    give(page, images[0])
    [result] = results(page, 1)
    assert shown(result) == (images[0].name, expected(model, images[0]))
    assert result.find_element("tag name", "img").get_property("naturalWidth") == 40
    assert re.match(r"[\d.]+ m?s there and back", result.find_element("class name", "time").text)
    assert images[0].name in page.find_element("css selector", "[role=status]").text
    assert console(page) == []


@NEEDS_BROWSER
def test_several_images_get_an_answer_each_and_one_that_is_broken_the_servers_words(
    page: Any, model: Path, images: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"this is text")
    drop(page, *images[:2], broken, images[2])
    newest_first = results(page, 4)
    answers = dict(shown(result) for result in newest_first)
    assert list(answers) == [images[2].name, broken.name, images[1].name, images[0].name]
    assert answers.pop(broken.name) == []
    assert answers == {path.name: expected(model, path) for path in images}
    said = newest_first[1].find_element("class name", "error").text
    assert "not an image" in said
    assert console(page) == []


@NEEDS_BROWSER
def test_an_image_can_be_pasted(page: Any) -> None:
    page.execute_script(PASTE)
    [result] = results(page, 1)
    name, pairs = shown(result)
    assert (name, len(pairs)) == ("pasted.png", len(LABELS))


@NEEDS_BROWSER
def test_what_the_server_says_is_text_and_never_html(page: Any, images: list[Path]) -> None:
    pick(page, images[2])
    [result] = results(page, 1)
    assert HTML_LABEL in dict(shown(result)[1])
    assert page.find_element("tag name", "h1").text == "model<b>"
    assert page.find_elements("css selector", "b, .labels img") == []
    assert page.title == "model<b> · bitfast"


@NEEDS_BROWSER
def test_the_page_is_used_by_keyboard(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    page.find_element("tag name", "body").send_keys(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("href").endswith("/docs")
    page.switch_to.active_element.send_keys(Keys.TAB)
    field = page.switch_to.active_element
    assert field.get_attribute("id") == "files"
    assert "Choose images" in field.accessible_name


@NEEDS_BROWSER
def test_the_page_is_as_wide_as_a_phone(page: Any, images: list[Path]) -> None:
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        pick(page, images[0])
        results(page, 1)
        assert page.execute_script("return document.documentElement.scrollWidth") == 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@NEEDS_BROWSER
def test_docs_lists_every_route_with_an_example(server: RunningServer, browser: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    with urlopen(server.url + "/openapi.json") as response:
        api = json.load(response)
    browser.get(server.url + "/docs")
    WebDriverWait(browser, DEADLINE).until(
        lambda page: page.find_elements("css selector", "#routes:not([aria-busy])")
    )
    headings = [heading.text for heading in browser.find_elements("css selector", "section h2")]
    routes = [f"{verb.upper()} {path}" for path, item in api["paths"].items() for verb in item]
    assert headings == routes
    assert {"POST /classify", "POST /embed"} <= set(headings)
    examples = browser.find_elements("css selector", "section pre")
    shown = " ".join(example.text for example in examples)
    assert f"curl '{server.url}/classify" in shown
    assert f"curl '{server.url}/v2/models/model%3Cb%3E/infer'" in shown
    assert console(browser) == []


# ---- without a browser --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["page.html", "docs.html"])
def test_a_page_may_run_nothing_but_what_it_holds(name: str) -> None:
    page = load_page(name, model='"><script>alert(1)</script>')
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert page.body.count(b"<script") == 1
    assert re.findall(rb"https?://", page.body) == []
