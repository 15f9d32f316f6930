"""The page over the shipped pool with the real model, from a search to a kept composition; docs/images has its pictures.

LORAWEAVE_PICTURES=docs/images writes them there; otherwise they go where the test's other files are.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import loraweave as lw

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
MAX_BYTES = 150_000


@pytest.fixture
def pool_hub(here):
    with lw.Hub("adapters") as hub:
        hub.add_many(sorted((ROOT / "examples" / "pool").iterdir()))
        mixed = lw.merge(
            [hub["plural"], hub["past_tense"], hub["uppercase"]], [0.5, 0.3, 0.2], name="inflect", progress=False
        )
        hub.add(mixed, description="Inflects a word.", anomalies="off")
        both = lw.merge([hub["inflect"], hub["antonym"]], [0.6, 0.4], name="inflected opposite", progress=False)
        hub.add(both, description="Inflects the opposite of a word.", examples=["hot", "walk", "friend"])
        yield hub


def test_a_task_that_no_adapter_was_trained_for_is_solved_on_the_page(look, page_served, pool_hub, tmp_path):
    pictures = ROOT / given if (given := os.environ.get("LORAWEAVE_PICTURES")) else tmp_path

    def picture(name, page):
        path = pictures / f"ui-{name}.png"
        page.evaluate("() => { scrollTo(0, 0); document.activeElement.blur(); }")
        page.screenshot(path=path, animations="disabled", caret="hide")
        assert path.stat().st_size < MAX_BYTES, name

    with page_served(pool_hub, lw.load_base) as address:
        page = look(address, width=1180, height=820)
        page.set_default_timeout(120_000)
        page.get_by_text("35 adapters.").wait_for()
        page.get_by_role("searchbox").fill("Negate the sentence")
        page.wait_for_function("() => document.querySelector('.list .adapter')?.textContent === 'negation'")
        page.get_by_text("of the 35 nearest").wait_for()
        page.wait_for_selector(".evidence:has-text('(')")
        for name in ("negation", "passive"):
            page.get_by_label(f"Pick {name} for the composer").check()
        picture("adapters", page)

        page.goto(f"{address}/#/adapter?name=inflected+opposite")
        page.wait_for_selector("ol.alike >> nth=1")
        page.wait_for_selector("table.heat")
        picture("adapter", page)

        page.goto(f"{address}/#/compose")
        page.get_by_label("Instruction").fill("Rewrite the sentence in the passive voice and negate it.")
        page.get_by_label("Input", exact=True).fill("The senator helped the doctor.")
        for name, weight in (("negation", "0.7"), ("passive", "0.8")):
            page.get_by_label(f"Exact weight of {name}").fill(weight)
            page.keyboard.press("Tab")
        page.wait_for_selector(".side:not([aria-busy])")
        base, composed = page.locator(".answer").all_text_contents()
        assert composed == "The doctor was not helped by the senator."
        assert base != composed
        page.wait_for_selector("table.heat")
        picture("compose", page)

        rows = [
            ("The lawyer saw the judge.", "The judge was not seen by the lawyer."),
            ("The tourists admired the artist.", "The artist was not admired by the tourists."),
        ]
        for number, (given, wanted) in enumerate(rows, start=1):
            page.get_by_label(f"Input {number}").fill(given)
            page.get_by_label(f"Output {number}").fill(wanted)
        page.get_by_role("button", name="Find weights").click()
        page.get_by_text("The sliders are where the search ended").wait_for()
        base_row = page.locator("tr", has=page.get_by_role("cell", name="base", exact=True))
        losses = [float(row.locator("td").nth(1).text_content()) for row in (base_row, page.locator("tr.chosen"))]
        assert losses[1] < losses[0]

        page.goto(f"{address}/#/route")
        page.get_by_role("button", name="Show the weights").click()
        page.frame_locator("iframe").locator(".token").first.wait_for()
        shares = page.locator(".shares .meter").all_text_contents()
        assert sum(int(re.match(r"\d+", share)[0]) for share in shares) in (99, 100, 101)
