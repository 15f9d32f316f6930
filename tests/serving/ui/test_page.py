"""The page in a real browser: every act, by pointer and by keyboard, wide and narrow, light and dark."""

from __future__ import annotations

import re

import pytest

from loraweave.errors import LoraweaveError

HOSTILE = "<img src=x onerror=alert(1)>"


def names_in(page):
    return page.locator("table.list .adapter").all_text_contents()


def no_sideways_scrolling(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_table_lists_the_hub_and_sorts(look, address, hub):
    page = look(address)
    page.wait_for_selector("table.list")
    assert sorted(names_in(page)) == sorted(record.name for record in hub.records())
    page.get_by_text("5 adapters.").wait_for()
    page.get_by_role("button", name="Rank").click()
    page.wait_for_selector("th.rank[aria-sort=descending]")
    ranks = [int(text) for text in page.locator("table.list td.rank").all_text_contents()]
    assert ranks == sorted(ranks, reverse=True)


def test_a_search_as_one_types_shows_what_speaks_for_each_hit(look, address, hub):
    page = look(address)
    page.get_by_role("searchbox").press_sequentially("capital of a country", delay=5)
    page.wait_for_selector("table.list .evidence")
    best = hub.search("capital of a country", k=1)[0]
    page.wait_for_function("name => document.querySelector('table.list .adapter')?.textContent === name", arg=best.name)
    assert page.locator("table.list .evidence").first.text_content() == best.evidence
    assert page.locator("table.list .meter").first.text_content() == f"{best.score:.2f}"
    # the address has it, so that Back comes to it again
    assert "q=capital" in page.url
    page.get_by_role("searchbox").fill("")
    page.get_by_text("5 adapters", exact=True).wait_for()


def test_names_and_texts_of_any_kind_are_only_text(look, address):
    page = look(f"{address}")
    page.get_by_role("link", name=HOSTILE).click()
    page.wait_for_selector("h1 bdi")
    assert page.locator("h1").text_content() == HOSTILE
    assert page.get_by_text("<b>bold</b>").first.is_visible()
    assert page.locator("main img, main b").count() == 0


def test_an_adapters_page_shows_all_that_is_known(look, address):
    page = look(f"{address}/#/adapter?name=inflected")
    page.wait_for_selector("table.heat")
    graph = page.locator("svg")
    assert sorted(graph.locator("a text").all_text_contents()) == ["past", "plural"]
    assert set(graph.locator(".weight").all_text_contents()) == {"0.75", "0.25"}
    page.wait_for_selector("ol.alike >> nth=1")
    graph.locator("a", has_text="plural").click()
    page.get_by_role("heading", name="plural", level=1).wait_for()
    versions = page.locator("section.card", has_text="Versions").locator("tbody tr")
    assert versions.count() == 2


def test_the_map_opens_an_adapter_by_pointer(look, address):
    page = look(address)
    page.get_by_text("5 adapters.").wait_for()
    canvas = page.locator("canvas")
    box = canvas.bounding_box()
    # the highest point lies on the upper edge of the plane
    for step in range(0, int(box["width"]), 6):
        page.mouse.move(box["x"] + step, box["y"] + 22)
        if page.locator(".tip").is_visible():
            break
    name = page.locator(".tip").text_content()
    page.mouse.click(box["x"] + step, box["y"] + 22)
    page.get_by_role("heading", name=name, level=1).wait_for()


def test_the_keyboard_alone_finds_opens_and_picks(look, address):
    page = look(address)
    page.get_by_text("5 adapters.").wait_for()
    pressed = page.keyboard.press
    pressed("Tab")
    assert page.evaluate("document.activeElement.id") == "skip"
    pressed("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    pressed("Tab")
    assert page.evaluate("document.activeElement.type") == "search"
    page.keyboard.type("past tense")
    page.wait_for_selector("table.list .evidence")
    while page.evaluate("document.activeElement.type") != "checkbox" or not page.evaluate(
        "document.activeElement.closest('table')"
    ):
        pressed("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    pressed("Space")
    assert page.locator("#picked").text_content() == "1"
    canvas = page.locator("canvas")
    canvas.focus()
    pressed("ArrowRight")
    page.wait_for_selector(".tip:visible")
    before = page.locator(".tip").text_content()
    pressed("ArrowLeft")
    page.wait_for_function("before => document.querySelector('.tip').textContent !== before", arg=before)
    name = page.locator(".tip").text_content().rpartition(" (")[0] or page.locator(".tip").text_content()
    pressed("Enter")
    page.get_by_role("heading", name=name, level=1).wait_for()


CONTRAST = """selector => {
    const part = (value) => (value <= 10.3 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    const luminance = ([red, green, blue]) => 0.2126 * part(red) + 0.7152 * part(green) + 0.0722 * part(blue);
    const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
    const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const colour = numbers(getComputedStyle(at).backgroundColor);
            if (colour.length < 4 || colour[3] === 1) return colour;
        }
        throw new Error("the page has no background");
    };
    const seen = [...document.querySelectorAll(selector)].filter(
        (each) => each.offsetParent && each.textContent.trim() && !each.matches(".unseen, .heat td"));
    return Math.min(...seen.map((each) => {
        const [one, other] = [luminance(numbers(getComputedStyle(each).color)), luminance(behind(each))];
        return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    }));
}"""


def contrast(page, selector):
    """The least contrast of the text of these elements with what is behind it: the ratio of WCAG 2."""
    return page.evaluate(CONTRAST, selector)


TEXT = "p, a, th, td, button, dt, dd, h1, h2, h3, span, li, label, select, code, pre, input"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_every_view_fits_and_can_be_read(look, address, scheme, width):
    for view in ("#/?q=plural", "#/adapter?name=inflected"):
        page = look(f"{address}/{view}", width=width, scheme=scheme)
        page.wait_for_selector("ol.alike >> nth=1" if "adapter" in view else ".evidence")
        assert no_sideways_scrolling(page), view
        assert contrast(page, TEXT) >= 4.5, view
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 25, 28)"
        assert dark == (scheme == "dark")


def test_every_control_has_a_name(look, address):
    for view in ("#/", "#/adapter?name=plural"):
        page = look(f"{address}/{view}")
        page.wait_for_load_state("networkidle")
        tree = page.locator("body").aria_snapshot()
        assert (
            re.findall(r"- (?:button|link|textbox|combobox|checkbox|slider|searchbox)(?: *\[.*\])?:?$", tree, re.MULTILINE)
            == []
        )


def test_an_error_is_shown_where_it_happens(look, address, hub, monkeypatch):
    page = look(f"{address}/#/adapter?name=nobody")
    assert "no adapter 'nobody'" in page.locator("[role=alert]").text_content()

    def fails(*given, **options):
        raise LoraweaveError("the embedder is on strike")

    monkeypatch.setattr(hub, "search", fails)
    page = look(address)
    page.wait_for_selector("table.list")
    page.get_by_role("searchbox").fill("plural")
    alert = page.locator(".results [role=alert]")
    alert.wait_for()
    assert alert.text_content() == "the embedder is on strike"
    monkeypatch.undo()
    page.get_by_role("searchbox").fill("plural ")
    page.wait_for_selector(".results .evidence")
