"""The page in a real Chromium: every method draws, shows what it did, and keeps a history."""

from __future__ import annotations

import serve_libraries  # noqa: F401  # isort: skip

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_server import Running, running

from fastgen.serve.settings import ServeSettings

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian's package chromium)")


@pytest.fixture(scope="module")
def served(micro_z: Path, micro_janus: Path, micro_dc: Path) -> Iterator[Running]:
    models = tuple(str(folder) for folder in (micro_z, micro_janus, micro_dc))
    with running(ServeSettings(models=models, device="cpu", verifier="shapes-verifier")) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(served: Running, browser: Any) -> Iterator[Any]:
    """The page, loaded; fails where it logs an error or asks another server for anything."""
    found = browser.new_page(viewport={"width": 1280, "height": 900})
    wrong: list[str] = []
    # A refusal is an answer; a browser notes it as a resource that failed.
    logged = lambda message: message.type == "error" and "status of 400" not in message.text  # noqa: E731
    found.on("console", lambda message: wrong.append(message.text) if logged(message) else None)
    found.on("pageerror", lambda error: wrong.append(str(error)))
    own = (served.url, "data:", "blob:")
    found.on("request", lambda asked: None if asked.url.startswith(own) else wrong.append(asked.url))
    found.goto(served.url)
    found.wait_for_selector("#model option", state="attached")
    yield found
    assert not wrong
    found.close()


def _draw(page: Any, model: int, method: str, **fields: str) -> None:
    page.select_option("#model", index=model)
    page.select_option("#method", method)
    for name, value in fields.items():
        page.fill(f"#f-{name}", value)
    page.click("#draw")
    sync_api.expect(page.locator("#status")).to_have_text("Done", timeout=120_000)


@pytest.mark.parametrize(
    ("model", "method", "fields", "shown"),
    [
        (0, "search", {"max_nfe": "40", "steps": "4"}, "svg.tree image"),
        (1, "speculative", {"tree": "jacobi-4"}, "#inside canvas"),
        (2, "dc", {"steps": "4"}, "#inside img"),
    ],
)
def test_a_method_draws_next_to_the_stock_picture_and_shows_its_statistics(
    page: Any, model: int, method: str, fields: dict[str, str], shown: str
) -> None:
    _draw(page, model, method, **fields)
    pictures = page.locator("#pair img")
    assert pictures.count() == 2
    for picture in pictures.all():
        assert picture.evaluate("image => image.naturalWidth") > 0
    for caption in page.locator("#pair figcaption").all_text_contents():
        assert any(word in caption for word in ("exact", "lossy", "same distribution")), caption
    assert page.locator(shown).count() >= 1
    if folder := os.environ.get("FASTGEN_TEST_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/page-{method}.png", full_page=True)


def test_the_tree_of_a_search_grows_with_previews_while_it_draws(page: Any) -> None:
    page.evaluate(
        """() => {
            window.sizes = [];
            new MutationObserver(() => window.sizes.push(document.querySelectorAll("svg.tree image").length))
                .observe(document.getElementById("inside"), {childList: true});
        }"""
    )
    _draw(page, 0, "search", max_nfe="40", steps="4")
    sizes = [size for size in page.evaluate("() => window.sizes") if size]
    assert sizes == sorted(sizes) and len(set(sizes)) > 2
    shown = page.locator("#inside figcaption").text_content() or ""
    nodes = page.locator("svg.tree image, svg.tree circle").count()
    assert f" {nodes} evaluations" in shown


def test_downloads_are_the_picture_and_its_settings(page: Any, tmp_path: Path) -> None:
    _draw(page, 0, "base", seed="5", steps="2")
    with page.expect_download() as picture:
        page.click("#pair a >> nth=0")
    with page.expect_download() as record:
        page.click("#pair a >> nth=1")
    assert picture.value.suggested_filename == "base-5.png"
    assert Path(picture.value.path()).read_bytes().startswith(b"\x89PNG")
    assert json.loads(Path(record.value.path()).read_text())["seed"] == 5


def test_the_history_of_a_session_is_shown_again(page: Any) -> None:
    for seed in ("1", "2"):
        _draw(page, 0, "base", seed=seed, steps="2")
    first = page.locator("#history button").last
    assert page.locator("#history button").count() == 2
    first.click()
    assert "base-1.png" in (page.locator("#pair a").first.get_attribute("download") or "")


def test_a_wrong_value_is_an_alert_and_the_next_picture_still_comes(page: Any) -> None:
    page.fill("#prompt", "   ")
    page.click("#draw")
    sync_api.expect(page.locator("#error")).to_contain_text("prompt", timeout=60_000)
    page.fill("#prompt", "a star")
    _draw(page, 0, "base", steps="1")
    assert page.locator("#error").text_content() == ""


def test_drawing_stops_when_the_user_says_so(page: Any, served: Running) -> None:
    page.select_option("#model", index=0)
    page.select_option("#method", "base")
    page.fill("#f-steps", "200")
    before = served.count("fastgen_pictures_total", model=next(iter(served.catalogue.models)), method="base")
    # In the page itself: the small model would be done before a click from here arrived.
    page.evaluate(
        """() => new MutationObserver(() => document.getElementById("stop").click())
            .observe(document.getElementById("left"), {childList: true})"""
    )
    page.click("#draw")
    sync_api.expect(page.locator("#status")).to_have_text("Stopped", timeout=60_000)
    assert served.count("fastgen_pictures_total", model=next(iter(served.catalogue.models)), method="base") == before


def test_everything_has_a_label_and_the_keyboard_draws(page: Any) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, select, textarea, button, img, progress')]
            .filter((each) => !(each.labels?.length || each.getAttribute('aria-label') || each.textContent.trim()
                || each.hasAttribute('alt') || each.closest('label')))
            .map((each) => each.outerHTML)"""
    )
    assert unnamed == []
    page.fill("#f-steps", "1")
    page.focus("#prompt")
    page.keyboard.press("Control+Enter")
    sync_api.expect(page.locator("#status")).to_have_text("Done", timeout=60_000)
    assert page.locator("[role=status][aria-live=polite]").count() == 1 and page.locator("[role=alert]").count() == 1
