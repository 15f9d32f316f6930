"""The page over a small hub, and a browser that looks at it: the system's chromium, which playwright drives."""

from __future__ import annotations

import importlib.util
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
from server_clients import answering
from store_servers import absent

import loraweave as lw
from loraweave.extensions.ui.app import make_ui_server

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def running_page(hub, load):
    """The address of the page, whose server ends with the block."""
    with answering(make_ui_server(hub, load, port=0, log_level="critical")) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def browser():
    """One for the tests of a file: playwright's loop must not run under tests of other files."""
    if importlib.util.find_spec("playwright") is None:
        absent("playwright is not installed: pip install 'loraweave[test]'")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        absent("no chromium is installed (Debian: chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # no sandbox of its own: in containers, and for root, it has none to use
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def look(browser):
    """look(address, width=..., scheme=...): the page in a tab. Its errors, and questions to others, fail the test."""
    contexts, wrong = [], []

    def open_page(address, *, width=1280, height=900, scheme="light", permissions=()):
        viewport = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, color_scheme=scheme, permissions=list(permissions))
        contexts.append(context)
        context.set_default_timeout(120_000)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        own = address.split("#")[0]
        page.on("request", lambda sent: sent.url.startswith((own, "data:")) or wrong.append(sent.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


TEXTS = {
    "plural": ("Write the plural of the noun.", [("cat", "cats"), ("box", "boxes"), ("child", "children")]),
    "past": ("Write the past tense of the verb.", [("walk", "walked"), ("go", "went")]),
    "capital": ("Name the capital of the country.", [("France", "Paris"), ("Japan", "Tokyo")]),
}


@pytest.fixture(scope="module")
def tiny(make_model):
    return make_model("llama")


@pytest.fixture(scope="module")
def hub(tiny, make_adapters, make_adapter, tmp_path_factory):
    """Three adapters with texts, one of them in two versions, a merge, one with a hostile name, and one in quarantine."""
    with lw.Hub(tmp_path_factory.mktemp("page") / "hub") as opened:
        for adapter, (name, (description, examples)) in zip(make_adapters(tiny, "llama"), TEXTS.items(), strict=True):
            card = {"license": "MIT" if name == "past" else "Apache-2.0"}
            opened.add(replace(adapter, name=name, card=card), description=description, examples=examples)
        newer = make_adapter(tiny, "plural", rank=2, seed=7, targets=("q_proj", "v_proj", "down_proj"))
        opened.add(newer, replace=True)
        merged = lw.merge([opened["plural"], opened["past"]], [0.75, 0.25], name="inflected", progress=False)
        opened.add(merged, description="Inflects a word.")
        opened.add(make_adapter(tiny, HOSTILE, seed=8), description="<b>bold</b>")
        opened.add(make_adapter(tiny, "held", seed=9), description="Nobody should use it.")
        opened.quarantine("held")
        yield opened


HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="session")
def page_served():
    """The address of a page over another hub: `with page_served(hub, load) as address`."""
    return running_page


@pytest.fixture(scope="module")
def address(hub, tiny, tokenizer):
    with running_page(hub, lambda: (tiny, tokenizer)) as found:
        yield found
