from __future__ import annotations

import sys

import pytest

from loraweave.registry import lazy


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `lazy_fixture` with the modules `answers` and `broken`."""
    folder = tmp_path / "lazy_fixture"
    folder.mkdir()
    for name, text in {"__init__": "", "answers": "class Answer: pass\ndef ask(): return 3", "broken": "1 / 0"}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield "lazy_fixture"
    for name in [name for name in sys.modules if name.split(".")[0] == "lazy_fixture"]:
        del sys.modules[name]


def test_a_name_imports_its_module_when_it_is_asked_for_and_no_other(package):
    load = lazy("face", {f"{package}.answers": "Answer ask", f"{package}.broken": "never"})
    assert package not in sys.modules
    assert load("ask")() == 3
    assert load("Answer") is sys.modules[f"{package}.answers"].Answer
    assert f"{package}.broken" not in sys.modules
    with pytest.raises(ZeroDivisionError):
        load("never")


def test_a_module_of_a_package_is_a_name_too(package):
    assert lazy("face", {package: "answers"})("answers").ask() == 3


def test_another_name_is_an_attribute_error_of_the_package(package):
    with pytest.raises(AttributeError, match="module 'face' has no attribute 'answer'"):
        lazy("face", {f"{package}.answers": "Answer ask"})("answer")
