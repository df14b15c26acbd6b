# SPDX-License-Identifier: Apache-2.0
"""The report page in a real, headless Chromium."""

from __future__ import annotations

import dataclasses
import re

import pytest
from synthetic_run import dump, make_item, make_run, results

from digseg_jax.report import build_report, write_gallery

sync_api = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")

IMAGES = 6


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "quickstart", IMAGES)
    return build_report(run).as_uri()


@pytest.fixture(params=[("light", 1200), ("dark", 400)], ids=["light-1200", "dark-400"])
def page(request, browser, address):
    """The open page; afterwards: no console message, no error, no request but the file itself."""
    scheme, width = request.param
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 900}, reduced_motion="reduce"
    )
    page = context.new_page()
    troubles, requests = [], []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda sent: requests.append(sent.url))
    page.goto(address)
    yield page
    context.close()
    assert troubles == []
    assert [url for url in requests if not url.startswith("data:")] == [address]


def slider(page, card=0):
    return page.locator(".card").nth(card).get_by_role("slider")


def value(page, card=0):
    return int(slider(page, card).get_attribute("aria-valuenow"))


def shares(page, card=0):
    """Where the handle is and where the right image begins, as shares of the stage's width."""
    return (
        page.locator(".card")
        .nth(card)
        .evaluate("""card => {
        const stage = card.querySelector('.stage').getBoundingClientRect();
        const handle = card.querySelector('.handle').getBoundingClientRect();
        const cut = getComputedStyle(card.querySelector('.layer')).clipPath;
        return [(handle.left + handle.width / 2 - stage.left) / stage.width,
                Number(cut.match(/([\\d.]+)%\\)$/)[1]) / 100];
    }""")
    )


def test_dragging_moves_the_line_and_the_cut(page):
    stage = page.locator(".card").first.locator(".stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], y, steps=5)
    assert value(page) == pytest.approx(80, abs=1)
    page.mouse.move(box["x"] - 50, y, steps=5)  # captured: past the edge is the edge
    page.mouse.up()
    assert value(page) == 0
    assert shares(page) == pytest.approx([0, 0], abs=0.01)
    page.mouse.move(box["x"] + 0.5 * box["width"], y)
    assert value(page) == 0, "a released slider must not follow the pointer"
    assert value(page, card=1) == 50


def test_arrow_keys_move_the_focused_slider(page):
    slider(page).focus()
    page.keyboard.press("ArrowRight")
    assert value(page) == 52
    assert shares(page) == pytest.approx([0.52, 0.52], abs=0.01)
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowLeft")
    assert value(page) == 40
    for key, expected in (("End", 100), ("ArrowUp", 100), ("PageDown", 90), ("Home", 0)):
        page.keyboard.press(key)
        assert value(page) == expected
    assert slider(page).get_attribute("aria-valuetext") == "0 % input, 100 % prediction"


def test_the_slider_is_reached_by_tab_and_shows_its_focus(page):
    page.locator("#sort").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "slider"
    style = "getComputedStyle(document.activeElement.querySelector('span')).outlineStyle"
    assert page.evaluate(style) == "solid"


def test_a_card_has_two_stops_of_the_tab_key_and_arrow_keys_reach_its_small_images(page):
    focused = "document.activeElement.dataset.what ?? document.activeElement.getAttribute('role')"
    slider(page).focus()
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "prediction"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == "truth"
    page.keyboard.press("Enter")
    assert page.locator(".card").first.locator(".tag.right").text_content() == "truth"
    page.keyboard.press("End")
    assert page.evaluate(focused).startswith("mask of")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "slider"
    assert page.locator(".card .thumb:not([tabindex='-1'])").count() == IMAGES
    assert page.locator(".chip:not([tabindex='-1'])").count() == 1


def test_the_filter_leaves_the_images_with_that_class(page):
    cards = page.locator(".card")
    sets = cards.evaluate_all("cards => cards.map(c => JSON.parse(c.dataset.classes))")
    name = next(n for s in sets for n in s if 0 < sum(n in other for other in sets) < IMAGES)
    wanted = [name in s for s in sets]
    chip = page.locator(f'.chip[data-class="{name}"]')
    chip.click()
    assert [cards.nth(i).is_visible() for i in range(IMAGES)] == wanted
    assert page.locator("#shown").inner_text() == f"{sum(wanted)} of {IMAGES} images"
    assert chip.get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="all", exact=True).click()
    assert page.locator(".card:visible").count() == IMAGES


def test_the_order_follows_the_scores(page):
    def scores():
        return page.locator(".card").evaluate_all("cards => cards.map(c => +c.dataset.miou)")

    drawn = scores()
    page.locator("#sort").select_option("given")
    given = scores()
    page.locator("#sort").select_option("worst")
    assert scores() == sorted(given)
    page.locator("#sort").select_option("best")
    assert scores() == sorted(given, reverse=True)
    page.locator("#sort").select_option("given")
    assert scores() == given
    page.locator("#sort").select_option("kind")
    assert scores() == drawn and page.locator(".card").first.get_attribute("data-kind") == "typical"


def test_the_opacity_shows_the_input_below(page):
    page.locator("#opacity").fill("40")
    layer = page.locator(".card .layer").first
    assert float(layer.evaluate("e => getComputedStyle(e).opacity")) == pytest.approx(0.4)


def test_of_many_classes_the_search_leaves_those_of_the_name(browser, tmp_path):
    names = [f"{'tree' if i == 7 else 'thing'} {i}" for i in range(150)]
    dump(tmp_path / "eval" / "results.json", results(per_class=dict.fromkeys(names, 0.5)))
    item = dataclasses.replace(make_item(0, 32), queries=tuple(names[:8]))
    write_gallery(tmp_path / "eval" / "gallery", [item], names)
    page = browser.new_page()
    page.goto(build_report(tmp_path).as_uri())
    chips, stops = page.locator(".chip:visible"), page.locator(".chip:visible:not([tabindex='-1'])")
    assert chips.count() == 151
    page.locator(".toolbar .find").fill("Tree")
    assert chips.all_inner_texts() == ["all", "tree 7"] and stops.count() == 1
    page.locator("#classes .find").fill("thing 14")
    assert page.locator("#classes .bars li:visible").count() == 11
    page.locator(".toolbar .find").fill("")
    assert chips.count() == 151 and stops.count() == 1
    page.close()


def test_every_card_can_be_compared_with_the_truth(page):
    page.get_by_label("truth", exact=True).check(force=True)
    for i in range(IMAGES):
        card = page.locator(".card").nth(i)
        assert card.locator(".layer img").get_attribute("alt").startswith("truth")
        assert card.locator(".tag.right").text_content() == "truth"


def test_a_query_mask_can_be_put_on_the_right(page):
    card = page.locator(".card").first
    thumb = card.locator(".masks .thumb").nth(2)
    thumb.click()
    assert thumb.get_attribute("aria-pressed") == "true"
    assert card.locator('.thumb[aria-pressed="true"]').count() == 1
    shown, chosen = card.locator(".layer img"), thumb.locator("img")
    assert shown.get_attribute("src") == chosen.get_attribute("src")
    assert "shrub and grass" in slider(page).get_attribute("aria-valuetext")


def test_pointing_at_a_place_tells_its_true_and_its_predicted_class(page):
    card = page.locator(".card").first
    stage = card.locator(".stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    names = page.locator(".chip[data-class]").evaluate_all("all => all.map(c => c.dataset.class)")
    for x, y in ((0.2, 0.3), (0.7, 0.8)):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        text = card.locator(".under").inner_text()
        found = re.fullmatch(r"truth: (.+) · prediction: (.+)", text)
        assert found and found[1] in names and found[2] in names
    page.mouse.move(box["x"] + 0.92 * box["width"], box["y"] + 6)  # the unlabeled corner
    assert card.locator(".under").inner_text().startswith("truth: not labeled")
    page.mouse.move(0, 0)
    assert card.locator(".under").inner_text() == ""


def test_t_puts_the_truth_on_the_right_and_takes_it_away_again(page):
    slider(page).focus()
    tag = page.locator(".card").first.locator(".tag.right")
    page.keyboard.press("t")
    assert tag.text_content() == "truth"
    page.keyboard.press("t")
    assert tag.text_content() == "prediction"


def test_the_papers_tables_are_there_and_marked_as_the_papers(page):
    table = page.locator("#suites table").first
    assert "the paper's figure" in table.inner_text() and "43.2 (L/14)" in table.inner_text()
    assert "oracle\tmIoU" in table.inner_text()
    bars = page.locator("#suites details").first
    bars.locator("summary").focus()
    page.keyboard.press("Enter")
    assert bars.locator("li").first.is_visible()


def test_images_load_and_labels_are_crisp(page):
    loaded = page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert loaded
    rendering = "e => getComputedStyle(e).imageRendering"
    assert page.locator(".layer img").first.evaluate(rendering) == "pixelated"
    assert page.locator("img.photo").first.evaluate(rendering) == "auto"


def test_the_curve_tells_the_value_under_the_pointer(page):
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    plot.hover()
    assert re.match(r"step [\d,]+ · ", page.locator(".readout").first.inner_text())
    assert plot.locator(".probe circle").is_visible()


def test_nothing_is_wider_than_the_window(page):
    page.locator("details").evaluate_all("all => all.forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_scheme_is_followed(page):
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    level = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert level < 60 if dark else level > 200


def test_text_stands_out_from_its_ground(page):
    """WCAG contrast of the text colors: 4.5 at least."""
    ratio = page.evaluate("""() => {
        const probe = document.body.appendChild(document.createElement('i'));
        const light = (name) => {
            probe.style.color = `var(${name})`;
            const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map((v) => {
                const c = v / 255;
                return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        return Math.min(...['--ink', '--soft', '--accent'].flatMap((text) =>
            ['--paper', '--card'].map((ground) => contrast(light(text), light(ground)))));
    }""")
    assert ratio >= 4.5
