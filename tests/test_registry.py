from __future__ import annotations

import difflib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from loraweave import registry
from loraweave.errors import UnknownName


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A registry folder "things" made of files: folder("ties", "def ties(): ...")."""
    package = tmp_path / "registry_fixture"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.FOLDERS, "things", ("registry_fixture",))

    def add(name, text):
        (package / f"{name}.py").write_text(text)

    yield add
    for name in [name for name in sys.modules if name.split(".")[0] == "registry_fixture"]:
        del sys.modules[name]


@pytest.mark.parametrize("folder_name", registry.registries())
def test_every_registered_name_resolves_to_a_documented_thing_of_its_own_file(folder_name):
    modules = registry.modules(folder_name)
    things = {name: registry.get(folder_name, name) for name in registry.names(folder_name)}
    assert [name for name, thing in things.items() if not callable(thing)] == []
    assert [name for name, thing in things.items() if not thing.__doc__] == []
    assert {name: thing.__module__ for name, thing in things.items()} == {name: modules[name] for name in things}


@pytest.mark.parametrize("folder_name", ["methods", "kernels", "routers", "embedders", "keys", "indexes", "formats"])
def test_every_folder_has_an_entry(folder_name):
    assert registry.names(folder_name)


def test_names_are_sorted_and_leave_out_private_files_and_packages(folder, tmp_path):
    for name in ("zeta", "alpha", "_helper"):
        folder(name, "")
    (tmp_path / "registry_fixture" / "inner").mkdir()
    (tmp_path / "registry_fixture" / "inner" / "__init__.py").write_text("")
    assert registry.names("things") == ["alpha", "zeta"]


def test_listing_names_imports_none_of_the_files(folder):
    folder("broken", "raise RuntimeError('imported')")
    assert registry.names("things") == ["broken"]


def test_one_that_was_got_before_is_got_without_listing_the_folder(folder, monkeypatch):
    folder("plain", "def plain(): return 3")
    assert registry.get("things", "plain")() == 3
    monkeypatch.setattr(registry, "modules", None)
    assert registry.get("things", "plain")() == 3


def test_one_that_another_thread_is_importing_is_waited_for(folder, monkeypatch):
    begun, free = threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "begun_and_free", (begun, free), raising=False)
    folder("slow", "import sys\nbegun, free = sys.begun_and_free\nbegun.set()\nassert free.wait(60)\ndef slow(): return 3")
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(registry.get, "things", "slow")
        assert begun.wait(60)
        second = threads.submit(registry.get, "things", "slow")
        wait([second], timeout=0.2)
        free.set()
        assert first.result() is second.result()


def test_getting_one_imports_no_other(folder):
    folder("broken", "raise RuntimeError('imported')")
    folder("plain", "def plain(): return 3")
    assert registry.get("things", "plain")() == 3


def test_a_class_is_found_in_camel_case(folder):
    folder("two_words", "class TwoWords: pass")
    assert registry.get("things", "two_words").__name__ == "TwoWords"


def test_a_function_comes_before_a_class_of_that_name(folder):
    folder("both", "class Both: pass\ndef both(): pass")
    assert registry.get("things", "both").__name__ == "both"


def test_a_misspelled_name_is_answered_with_the_nearest_and_all():
    with pytest.raises(UnknownName, match="no method 'liner', did you mean 'linear'"):
        registry.get("methods", "liner")


def test_a_name_like_no_other_is_answered_with_all_names_alone():
    assert not difflib.get_close_matches("qqqq", registry.names("methods"), n=1)
    with pytest.raises(UnknownName, match=r"no method 'qqqq'; there are .*linear"):
        registry.get("methods", "qqqq")


@pytest.mark.parametrize(
    ("name", "way_out"), [("mass", "make 'arrow' or 'spectr'"), ("hilora", "make 'similarity' or 'logistic'")]
)
def test_a_withdrawn_name_is_answered_with_the_reason_and_the_way_out(name, way_out):
    assert name not in registry.names("routers")
    with pytest.raises(UnknownName, match=rf"no router '{name}': it was withdrawn, since .*{way_out}.*docs/tried.md"):
        registry.get("routers", name)


@pytest.mark.parametrize("name", ["_contents", "__init__", "../hub", "peft.Peft", "", "combined"])
def test_only_listed_names_are_ever_imported(name):
    for folder_name in ("formats", "routers"):
        with pytest.raises(UnknownName):
            registry.get(folder_name, name)


def test_a_file_without_the_thing_it_is_named_after_is_named(folder):
    folder("empty", "")
    with pytest.raises(UnknownName, match=r"registry_fixture\.empty defines neither 'empty' nor 'Empty'"):
        registry.get("things", "empty")


def test_an_unknown_folder_is_answered_with_the_nearest():
    with pytest.raises(UnknownName, match=r"no registry 'router', did you mean 'routers'.*methods"):
        registry.names("router")


def test_an_unknown_name_is_a_lookup_error():
    with pytest.raises(LookupError):
        registry.get("methods", "nope")


def traits_in(folder_name):
    return set().union(*(registry.traits_of(registry.get(folder_name, name)) for name in registry.names(folder_name)))


@pytest.mark.parametrize("folder_name", registry.registries())
def test_the_traits_of_a_registry_are_the_declared_ones_with_a_meaning(folder_name):
    words = registry.TRAITS.get(folder_name, {})
    assert traits_in(folder_name) == set(words)
    assert all(words.values())


def test_a_trait_that_is_not_declared_is_answered_with_the_nearest():
    with pytest.raises(UnknownName, match="no trait 'lossi', did you mean 'lossy'"):
        registry.traits("lossi")
