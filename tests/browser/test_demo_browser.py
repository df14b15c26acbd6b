# SPDX-License-Identifier: Apache-2.0
"""The demo in a real, headless Chromium."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
from PIL import Image
from served_demo import serve, tiny_segmenter

sync_api = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
WORDS = ["water", "forest", "snow and ice"]
LONG = 180_000  # milliseconds; a busy machine compiles slowly


@pytest.fixture(scope="module")
def gate():
    """The engine's steps pass while it is open."""
    found = threading.Event()
    found.set()
    return found


@pytest.fixture(scope="module")
def demo(folders, gate, tmp_path_factory):
    segmenter = tiny_segmenter(folders, tmp_path_factory.mktemp("demo") / "export")
    with serve(segmenter, gate) as found:
        yield found


@pytest.fixture(params=[("light", 1200), ("dark", 390)], ids=["light-1200", "dark-390"])
def page(request, browser, demo, gate):
    """The open page; afterwards: no console message, no error, no request to anywhere else."""
    scheme, width = request.param
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 900}, reduced_motion="reduce"
    )
    context.set_default_timeout(LONG)
    page = context.new_page()
    troubles, requests = [], []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda sent: requests.append(sent.url))
    page.goto(demo.url)
    yield page
    gate.set()
    context.close()
    assert troubles == []
    assert [url for url in requests if not url.startswith((demo.url, "data:"))] == []


def photo() -> dict:
    """An upload of 40 x 24 pixels."""
    data = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return {"name": "photo.png", "mimeType": "image/png", "buffer": data.getvalue()}


def ask(page, words=WORDS, members=2) -> None:
    """Uploads the photo, and sends the form by the keyboard."""
    page.locator("#file").set_input_files(photo())
    page.locator("#words").fill("\n".join(words))
    page.locator("#members").fill(str(members))
    page.locator("#go").focus()
    page.keyboard.press("Enter")


def finish(page) -> None:
    page.locator("#files").wait_for(state="visible")
    assert page.locator("#status").inner_text() == "Done."


def test_an_upload_gets_a_mask_for_each_word_and_files(page):
    ask(page)
    finish(page)
    assert page.locator("#chosen").inner_text() == "photo.png"
    assert page.locator("#thumbs .thumb").count() == 1 + len(WORDS)
    sizes = "all => all.map(i => [i.naturalWidth, i.naturalHeight])"
    page.locator("#thumbs img").last.evaluate("image => image.decode()")
    assert page.locator("#thumbs img").evaluate_all(sizes) == [[40, 24]] * (1 + len(WORDS))
    with page.expect_download() as download:
        page.get_by_role("link", name="COCO (JSON)").click()
    assert download.value.suggested_filename == "masks.coco.json"
    page.screenshot()


def test_a_word_shows_its_soft_mask_and_a_click_the_words_of_a_place(page):
    ask(page)
    finish(page)
    thumb = page.locator("#thumbs .thumb").nth(2)
    thumb.click()
    assert thumb.get_attribute("aria-pressed") == "true"
    assert "/mask/1.png" in page.locator(".layer img").get_attribute("src")

    before = page.get_by_role("slider", name="Share").get_attribute("aria-valuenow")
    stage = page.locator(".stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    page.mouse.click(box["x"] + 0.76 * box["width"], box["y"] + 0.27 * box["height"])
    page.locator("#pixel li").nth(2).wait_for()
    assert page.locator("#x").input_value() == "30" and page.locator("#y").input_value() == "6"
    names = page.locator("#pixel .name").all_inner_texts()
    values = [float(text) for text in page.locator("#pixel .value").all_inner_texts()]
    assert sorted(names) == sorted(WORDS) and values == sorted(values, reverse=True)
    assert page.get_by_role("slider", name="Share").get_attribute("aria-valuenow") == before


def test_the_slider_and_the_opacity_follow_pointer_and_keys(page):
    ask(page)
    finish(page)
    slider = page.get_by_role("slider", name="Share")
    slider.focus()
    page.keyboard.press("End")
    assert slider.get_attribute("aria-valuenow") == "100"
    stage = page.locator(".stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 5)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 5, steps=6)
    page.mouse.up()
    assert int(slider.get_attribute("aria-valuenow")) == pytest.approx(25, abs=1)
    page.locator("#opacity").focus()
    page.keyboard.press("Home")
    layer = "getComputedStyle(document.querySelector('.layer')).opacity"
    assert float(page.evaluate(layer)) == 0.0


def test_masks_appear_while_it_works_and_cancel_ends_it(page, gate):
    ask(page, members=60)
    page.locator("#thumbs img[src*=labels]").wait_for()
    gate.clear()
    assert "member" in page.locator("#status").inner_text()
    assert page.locator("#progress").is_visible() and page.locator("#go").is_disabled()
    page.locator("#cancel").click()
    gate.set()
    page.get_by_text("Canceled.", exact=True).wait_for()
    assert page.locator("#go").is_enabled() and page.locator("#files").is_hidden()


def test_what_is_wrong_is_told_beside_the_form(page):
    page.locator("#go").click()
    page.get_by_text("choose an image first").wait_for()
    assert page.locator("#status").get_attribute("class") == "note error"


def test_nothing_is_wider_than_the_page_and_every_control_has_a_name(page):
    ask(page)
    finish(page)
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    controls = "button, input, select, textarea, a"
    unnamed = page.locator(controls).evaluate_all("""all => all
        .filter(e => !(e.labels?.length || e.textContent.trim() || e.ariaLabel))
        .map(e => e.outerHTML)""")
    assert unnamed == []
