"""The page in a real browser: every act, by pointer and by keyboard, wide and narrow, light and dark."""

from __future__ import annotations

import io
import json
import re
import shlex
import zipfile
from dataclasses import replace

import pytest
from server_clients import gate_before

import loraweave as lw
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
    page.get_by_text(best.evidence, exact=True).first.wait_for()
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
        (each) => each.offsetParent && each.textContent.trim() && !each.matches(".unseen, .heat td, .cosines td"));
    return Math.min(...seen.map((each) => {
        const [one, other] = [luminance(numbers(getComputedStyle(each).color)), luminance(behind(each))];
        return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    }));
}"""


def contrast(page, selector):
    """The least contrast of the text of these elements with what is behind it: the ratio of WCAG 2."""
    return page.evaluate(CONTRAST, selector)


TEXT = "p, a, th, td, button, dt, dd, h1, h2, h3, span, li, label, select, code, pre, input"


@pytest.fixture
def look_with(look):
    """look_with(address, names, ...): the page where these adapters are picked."""

    def open_page(address, names, **options):
        page = look(address, **options)
        page.evaluate("names => sessionStorage.setItem('loraweave.picks', JSON.stringify(names))", list(names))
        page.reload()
        return page

    return open_page


VIEWS = {
    "#/?q=plural": ".evidence:has-text('(')",
    "#/adapter?name=inflected": "ol.alike >> nth=1",
    "#/compose": "table.heat",
    "#/route": ".tray",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_every_view_fits_and_can_be_read(look_with, address, scheme, width):
    for view, there in VIEWS.items():
        page = look_with(f"{address}/{view}", ["plural", "past"], width=width, scheme=scheme)
        page.wait_for_selector(there)
        assert no_sideways_scrolling(page), view
        assert contrast(page, TEXT) >= 4.5, view
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 25, 28)"
        assert dark == (scheme == "dark")


def test_every_control_has_a_name(look_with, address):
    for view, there in VIEWS.items():
        page = look_with(f"{address}/{view}", ["plural", "past"])
        page.wait_for_selector(there)
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


def answers_of(page):
    """The answers of base and composition, once both are those of the weights that stand there."""
    page.wait_for_selector(".side:not([aria-busy])")
    return page.locator(".answer").all_text_contents()


def test_both_answers_follow_the_sliders(look_with, address, hub, tiny, tokenizer):
    page = look_with(f"{address}/#/compose", ["plural", "past"])
    page.get_by_label("Instruction").fill("")
    page.get_by_label("Input", exact=True).fill("abc")
    page.get_by_label("Tokens at most").fill("6")
    engine = lw.Composer(tiny, hub.pool(["plural", "past"]), tokenizer=tokenizer)

    def said(mixture):
        (text,) = engine.generate(["abc"], mixture=mixture, max_new_tokens=6, do_sample=False)
        return text.lstrip()

    slider = page.get_by_label("Weight of plural", exact=True)
    slider.focus()
    page.keyboard.press("End")
    page.get_by_text("0.5*past + 1.5*plural").wait_for()
    assert answers_of(page) == [said(None), said({"plural": 1.5, "past": 0.5})]
    page.keyboard.press("ArrowLeft")
    page.get_by_text("0.5*past + 1.49*plural").wait_for()
    page.get_by_role("button", name="All zero").click()
    page.get_by_text("Both say the same.").wait_for()


def test_a_slider_for_each_block(look_with, address):
    page = look_with(f"{address}/#/compose", ["plural", "past"])
    page.get_by_text("Blocks").first.click()
    page.get_by_label("Weight of plural in model.layers.1").fill("1.25")
    page.get_by_text("differs by block").wait_for()
    # of two blocks and the head, the mean
    expected = (0.5 + 1.25 + 0.5) / 3 if page.get_by_label("Weight of plural in lm_head").count() else (0.5 + 1.25) / 2
    assert float(page.get_by_label("Exact weight of plural").input_value()) == pytest.approx(expected, abs=1e-3)
    page.get_by_text("no formula has them").wait_for()
    assert page.locator(".copies button").all_text_contents() == ["Python"]
    page.get_by_role("button", name="Copy as Python").press("Enter")
    copied = page.locator("pre[aria-label='As Python']").text_content()
    assert "'model.layers.1': {'plural': 1.25}" in copied
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "past + plural by block (peft).zip"
    # it stays when the page is loaded again
    page.reload()
    page.get_by_text("differs by block").wait_for()
    page.get_by_role("button", name="Equal shares").click()
    page.get_by_text("0.5*past + 0.5*plural").wait_for()


def test_the_map_of_interference_is_read_by_keyboard(look_with, address):
    page = look_with(f"{address}/#/compose", ["plural", "past"])
    page.wait_for_selector("table.heat")
    page.locator("table.heat").focus()
    page.keyboard.press("ArrowRight")
    # what is no block's own stands first
    assert re.fullmatch(r"lm_head: signs conflict in \d+ % of the entries", page.locator(".told").text_content())
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert re.fullmatch(r"model\.layers\.0\.\S+: signs conflict in \d+ % .*", page.locator(".told").text_content())
    page.get_by_label("Show").select_option(label="norm of past")
    page.locator("table.heat").focus()
    page.keyboard.press("ArrowRight")
    assert re.search(": (norm [0-9.]+|not updated)$", page.locator(".told").text_content())


def fill_examples(page, rows):
    for number, (given, wanted) in enumerate(rows, start=1):
        page.get_by_label(f"Input {number}").fill(given)
        page.get_by_label(f"Output {number}").fill(wanted)


def test_weights_are_found_from_examples_and_the_sliders_go_there(look_with, address):
    page = look_with(f"{address}/#/compose", ["plural", "past"])
    page.get_by_role("button", name="Find weights").click()
    page.get_by_text("There is no example yet").wait_for()
    fill_examples(page, [("ab", "c"), ("bc", "d")])
    before = page.get_by_label("Exact weight of plural").input_value()
    page.get_by_role("button", name="Find weights").click()
    page.get_by_text("The sliders are where the search ended").wait_for()
    assert page.locator("tr.chosen").text_content().startswith("gradient")
    assert page.get_by_label("Exact weight of plural").input_value() != before


def test_a_search_is_stopped_and_the_weights_stay(look_with, address, tiny):
    page = look_with(f"{address}/#/compose", ["plural", "past"])
    answers_of(page)
    with gate_before(tiny) as gate:
        fill_examples(page, [("ab", "c"), ("bc", "d")])
        page.get_by_role("button", name="Find weights").click()
        assert gate.reached.wait(30)
        # the keyboard is where it can stop what goes on
        assert page.evaluate("document.activeElement.textContent") == "Stop"
        page.keyboard.press("Enter")
        page.get_by_text("Stopped; the weights are as they were.").wait_for()
    assert page.get_by_label("Exact weight of plural").input_value() == "0.5"
    page.get_by_role("button", name="All one").click()
    page.get_by_text("past + plural").wait_for()
    answers_of(page)


def test_two_columns_are_pasted_as_rows(look_with, address):
    page = look_with(f"{address}/#/compose", ["plural", "past"])
    page.get_by_label("Input 1").focus()
    page.evaluate(
        """() => {
            const clipboardData = new DataTransfer();
            clipboardData.setData("text", "cat\\tcats\\nbox\\tboxes");
            document.activeElement.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
        }"""
    )
    rows = [box.input_value() for box in page.locator("table.examples input").all()]
    assert rows[:2] == ["cat", "cats"]
    assert rows[-2:] == ["box", "boxes"]


def test_a_mixture_is_saved_and_downloaded(look_with, address, hub):
    page = look_with(f"{address}/#/compose", ["plural", "past"])
    page.get_by_label("Name in the hub").fill("from the page")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("@'from the page'").wait_for()
    assert hub.composition("from the page").formula == "0.5*past + 0.5*plural"
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "0.5 past + 0.5 plural (peft).zip"
    page.get_by_text("“0.5 past + 0.5 plural (peft).zip” is in your downloads.").wait_for()
    with zipfile.ZipFile(io.BytesIO(download.value.path().read_bytes())) as archive:
        assert json.loads(archive.read("adapter_config.json"))["peft_type"] == "LORA"
    page.get_by_label("Weight of past", exact=True).fill("1")
    page.get_by_role("button", name="Save").click()
    alert = page.locator("[role=alert]")
    alert.wait_for()
    assert "another composition" in alert.text_content()


# as high as what it shows, and as wide
FRAME_FITS = """() => {
    const frame = document.querySelector("iframe"), shown = frame.contentDocument.documentElement;
    return frame.clientHeight >= shown.scrollHeight && shown.scrollWidth <= frame.clientWidth;
}"""


def test_without_an_extension_that_shows_weights_the_view_says_so(look, address, monkeypatch):
    monkeypatch.setattr("loraweave.extensions.ui.workbench.brought", lambda part: {})
    page = look(f"{address}/#/route")
    page.get_by_text("No extension that is installed shows the weights of tokens").wait_for()
    assert page.locator("form").count() == 0


@pytest.mark.parametrize("width", [1280, 360])
def test_a_router_shows_which_adapter_counts_for_which_token(look_with, address, width):
    page = look_with(f"{address}/#/route", ["plural", "past", "capital"], width=width)
    page.get_by_label("Instruction").fill("")
    page.get_by_label("Text").fill("abc abd")
    page.get_by_role("button", name="Show the weights").click()
    page.wait_for_selector(".shares li >> nth=2")
    frame = page.frame_locator("iframe")
    frame.locator(".token").first.wait_for()
    pieces = page.locator(".piece").all_text_contents()
    assert frame.locator(".token bdi").all_text_contents()[-7 - len(pieces) :] == [*"abc abd", *pieces]
    frame.locator("#cells").focus()
    page.keyboard.press("ArrowRight")
    frame.get_by_text("Token 1").wait_for()
    page.wait_for_function(FRAME_FITS)
    assert no_sideways_scrolling(page)


def test_the_tokens_of_a_routed_answer_have_the_colour_of_the_adapter_that_counts_most(
    look_with, address, hub, tiny, tokenizer
):
    page = look_with(f"{address}/#/route", ["plural", "past"])
    # the first picked adapter's text is there to be tried
    assert page.get_by_label("Instruction").input_value() == "Write the plural of the noun."
    assert page.get_by_label("Text").input_value() == "cat"
    page.get_by_label("Instruction").fill("")
    page.get_by_label("Text").fill("abc abd")
    page.get_by_label("Tokens of its answer").fill("5")
    page.keyboard.press("Enter")
    page.wait_for_selector(".piece")
    engine = lw.Composer(tiny, hub.pool(["plural", "past"]), tokenizer=tokenizer)
    (said,) = engine.generate(["abc abd"], mixture=lw.router("arrow", engine.bound_pool), max_new_tokens=5, do_sample=False)
    pieces = page.locator(".piece")
    assert "".join(pieces.all_text_contents()) == said
    page.get_by_role("group", name="The answer, token by token").focus()
    swatches = {
        row.locator("bdi").text_content(): row.locator(".swatch").evaluate("each => getComputedStyle(each).backgroundColor")
        for row in page.locator(".shares li").all()
    }
    for number, piece in enumerate(pieces.all()):
        page.keyboard.press("ArrowRight")
        assert "here" in piece.get_attribute("class")
        token, strongest = re.fullmatch(
            r'(".*"): (\w+) \d+ %.*', page.locator(".card .told").text_content(), re.DOTALL
        ).groups()
        assert json.loads(token) == pieces.all_text_contents()[number]
        assert piece.evaluate("each => getComputedStyle(each).borderBottomColor") == swatches[strongest]
    page.keyboard.press("Escape")
    assert page.locator(".piece.here").count() == 0


def test_a_formula_is_copied_as_python_shell_and_curl(look_with, address, hub):
    page = look_with(f"{address}/#/compose", ["plural", "past"], permissions=["clipboard-read", "clipboard-write"])
    page.get_by_label("Exact weight of past").fill("0.123456")
    page.keyboard.press("Tab")
    # three digits are shown, and all of them copied
    page.get_by_text("0.123*past + 0.5*plural", exact=True).wait_for()
    page.wait_for_function("document.querySelector('[aria-label=\"Exact weight of past\"]').value === '0.123'")
    copied = {}
    for kind in ("Python", "shell", "formula", "curl"):
        page.get_by_role("button", name=f"Copy as {kind}").press("Enter")
        page.locator(".copies").get_by_text(f"Copied as {kind}.", exact=True).wait_for()
        copied[kind] = page.evaluate("navigator.clipboard.readText()")
        assert page.locator(f"pre[aria-label='As {kind}']").text_content() == copied[kind]
    assert copied["formula"] == "0.123456*past + 0.5*plural"
    assert all(copied["formula"] in text for text in copied.values())
    for view, formula in (("adapter?name=past", "past"), ("route", "arrow(past, plural)")):
        page.goto(f"{address}/#/{view}")
        if view == "route":
            page.get_by_role("button", name="Show the weights").click()
        page.get_by_role("button", name="Copy as formula").click()
        page.locator(".copies").get_by_text("Copied as formula.", exact=True).wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == formula


def test_without_a_clipboard_the_text_to_copy_is_selected(look, address):
    page = look(f"{address}/#/adapter?name=past")
    page.get_by_role("button", name="Copy as formula").wait_for()
    page.evaluate("() => { navigator.clipboard.writeText = async () => { throw new Error(); }; }")
    page.get_by_role("button", name="Copy as formula").click()
    page.locator(".copies").get_by_text("the text is selected").wait_for()
    assert page.evaluate("String(getSelection())") == "past"


# whether what has the focus is seen as a whole
UNCOVERED = """() => {
    const own = document.activeElement, box = own.getBoundingClientRect();
    return [box.top + 1, (box.top + box.bottom) / 2, box.bottom - 1].every(
        (top) => own.contains(document.elementFromPoint(box.left + box.width / 2, top)));
}"""


@pytest.mark.parametrize("width", [1280, 768, 360])
def test_no_heading_covers_the_example_that_is_edited(look_with, address, width):
    page = look_with(f"{address}/#/compose", ["plural", "past"], width=width, height=420)
    for _ in range(9):
        page.get_by_role("button", name="Add a row").click()
    boxes = page.locator("table.examples input")
    assert boxes.count() == 24
    boxes.last.click()
    for _ in range(23):
        page.keyboard.press("Shift+Tab")
        assert page.evaluate(UNCOVERED)
    # also where the row is scrolled to the top by hand
    for number in (2, 12):
        boxes.nth(number).focus()
        page.evaluate("scrollBy(0, document.activeElement.getBoundingClientRect().top - 2)")
        page.keyboard.type("x")
        assert page.evaluate(UNCOVERED)


@pytest.mark.parametrize("width", [1280, 800, 390])
def test_what_is_picked_is_seen_however_far_the_page_is_scrolled(look_with, long_words, width):
    page = look_with(long_words, [WORD[:200], "y"], width=width, height=420)
    page.wait_for_selector("table.list")
    page.evaluate("scrollTo(0, 10_000)")
    assert page.evaluate("scrollY") > 200
    tray = page.get_by_role("complementary", name="Picked adapters")
    box = tray.bounding_box()
    assert (0 <= box["y"] < 5, box["height"] < 60, no_sideways_scrolling(page)) == (True, True, True)
    # its end is there, however long the names are
    link = tray.get_by_role("link", name="Compose").bounding_box()
    assert box["x"] <= link["x"] < link["x"] + link["width"] <= box["x"] + box["width"]
    chip = tray.get_by_role("button", name="Put y back")
    chip.focus()
    assert page.evaluate(UNCOVERED)
    page.keyboard.press("Enter")
    tray.get_by_text("1 picked").wait_for()


def test_a_row_of_a_grid_has_its_name_beside_it(look_with, address):
    page = look_with(f"{address}/#/adapter?name=plural", ["plural", "past"])
    page.wait_for_selector("table.heat")
    rows = page.locator("table.heat tbody tr")
    assert rows.count() > 1
    for row in rows.all():
        heading, line = row.locator("th").bounding_box(), row.bounding_box()
        assert line["y"] - 1 <= heading["y"] < line["y"] + line["height"]


@pytest.mark.parametrize("picked", [[], ["plural", "past"]])
def test_no_heading_covers_what_the_keyboard_goes_to(look_with, address, picked):
    page = look_with(address, picked, height=240)
    page.get_by_text("5 adapters.").wait_for()
    links = page.locator("table.list tbody :is(a, input)")
    links.last.focus()
    for _ in range(links.count() - 1):
        page.keyboard.press("Shift+Tab")
        assert page.evaluate("document.activeElement.closest('tbody') !== null")
        assert page.evaluate(UNCOVERED)


def test_an_adapter_is_added_by_its_name_and_taken_out(look_with, address):
    page = look_with(f"{address}/#/compose", ["plural"])
    page.get_by_label("Add an adapter").fill("nobody")
    page.get_by_role("button", name="Add", exact=True).click()
    page.get_by_text("no adapter 'nobody'").wait_for()
    page.get_by_label("Add an adapter").fill("past")
    page.keyboard.press("Enter")
    page.get_by_label("Weight of past", exact=True).wait_for()
    page.get_by_role("button", name="Take past out").click()
    page.get_by_label("Weight of past", exact=True).wait_for(state="detached")
    page.get_by_role("button", name="Take plural out").click()
    page.get_by_text("No adapter is picked yet.").wait_for()


@pytest.mark.parametrize("width", [1280, 768, 360])
def test_every_view_of_an_empty_hub_says_how_to_fill_it(look, page_served, tmp_path, tiny, tokenizer, width):
    with lw.Hub(tmp_path / "my hub") as empty, page_served(empty, lambda: (tiny, tokenizer)) as address:
        place = shlex.quote(str(tmp_path / "my hub"))
        for view in ("#/", "#/compose", "#/route"):
            page = look(f"{address}/{view}", width=width)
            page.get_by_role("heading", name="This hub has no adapters yet").wait_for()
            commands = page.locator("main code").all_text_contents()
            assert commands == [f"loraweave hub {verb} FOLDER --hub {place}" for verb in ("add", "add-tree")]
            assert page.locator("main :is(canvas, form)").count() == 0
            assert no_sideways_scrolling(page)


# no place to break a line in
WORD = "x" * 900


@pytest.fixture(scope="module")
def long_words(tiny, make_adapter, tokenizer, tmp_path_factory, page_served):
    """The address of a page over a hub whose texts are words of hundreds of letters."""
    name = WORD[:200]
    with lw.Hub(tmp_path_factory.mktemp("page") / WORD[:200]) as opened:
        for number, each in enumerate((name, "y")):
            card = {"license": "Apache-2.0", "tags": [WORD[:60]], "note": WORD}
            made = make_adapter(tiny, each, seed=number)
            opened.add(replace(made, card=card), description=WORD, examples=[(WORD, WORD)])
        merged = lw.merge([opened[name], opened["y"]], [0.5, 0.5], name=f"z{name[1:]}", progress=False)
        opened.add(merged, description=WORD, anomalies="off")
        with page_served(opened, lambda: (tiny, tokenizer)) as address:
            yield address


LONG_VIEWS = {
    "#/": "table.list",
    f"#/?q={WORD}": ".evidence",
    f"#/adapter?name=z{WORD[:199]}": "ol.alike >> nth=1",
    f"#/adapter?name=nobody{WORD}": "[role=alert]",
    "#/compose": "table.heat",
    "#/route": ".tray",
}


@pytest.mark.parametrize("width", [1280, 768, 360])
def test_a_word_of_any_length_is_wrapped_in_every_view(look_with, long_words, width):
    for view, there in LONG_VIEWS.items():
        page = look_with(f"{long_words}/{view}", [WORD[:200], "y"], width=width)
        page.wait_for_selector(there)
        assert no_sideways_scrolling(page), view
    page.get_by_label("Text").fill(WORD[:100])
    page.get_by_role("button", name="Show the weights").click()
    page.frame_locator("iframe").locator(".token").first.wait_for()
    page.wait_for_function(FRAME_FITS)
    assert no_sideways_scrolling(page)
