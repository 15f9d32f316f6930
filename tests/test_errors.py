from __future__ import annotations

import inspect
import re

import pytest
from properties import Properties

from loraweave import errors
from loraweave.errors import LoraweaveError

CLASSES = {name: found for name, found in vars(errors).items() if inspect.isclass(found) and issubclass(found, Exception)}
CLASSES = {name: found for name, found in CLASSES.items() if not issubclass(found, Warning)}
# ├── Name (BuiltIn, ...)   what it means
DRAWN = re.compile(r"^(?P<indent>[│├└─ ]*)(?P<name>[A-Z]\w+)(?: \((?P<builtins>[\w, ]+)\))?")


def drawn_tree():
    """{name: (parent, built-ins)} as the module's docstring draws them; a level is four characters wide."""
    tree, path = {}, []
    for line in errors.__doc__.split("\n\n")[1].splitlines():
        found = DRAWN.match(line)
        depth = len(found["indent"]) // 4
        path[depth:] = [found["name"]]
        builtins = set((found["builtins"] or "").replace(" ", "").split(",")) - {""}
        tree[found["name"]] = (path[depth - 1] if depth else None, builtins)
    return tree


TREE = drawn_tree()
LEAVES = sorted(set(TREE) - {parent for parent, _ in TREE.values()})
PROPERTIES = Properties(sorted(CLASSES))


@pytest.mark.parametrize("name", PROPERTIES.entries)
def test_a_class_keeps_all_properties(name, request):
    PROPERTIES.walk(request, name)


def builtin_bases(cls):
    return {base.__name__ for base in cls.__bases__ if base.__module__ == "builtins"}


def test_the_drawn_tree_names_every_class_and_no_other():
    assert set(TREE) == set(CLASSES)


@PROPERTIES.add(of=sorted(set(TREE) & set(CLASSES) - {"LoraweaveError"}))
def a_class_has_the_parent_and_the_built_ins_that_the_tree_draws(name):
    parent, builtins = TREE[name]
    assert CLASSES[name].__bases__[0] is CLASSES[parent]
    assert builtin_bases(CLASSES[name]) == builtins


@PROPERTIES.add(of=sorted(set(LEAVES) & set(CLASSES)))
def a_leaf_is_also_a_built_in_that_a_caller_would_guess(name):
    bases = {base for base in CLASSES[name].__mro__ if base.__module__ == "builtins"}
    assert bases - {BaseException, Exception, object}


@PROPERTIES.add()
def the_text_of_an_error_is_its_message(name):
    message = "no adapter 'x' in the hub"
    assert str(CLASSES[name](message)) == message


def test_an_error_without_a_message_has_an_empty_text():
    assert str(LoraweaveError()) == ""


@PROPERTIES.add()
def every_error_is_caught_as_a_loraweave_error_and_survives_pickling(name):
    import pickle

    again = pickle.loads(pickle.dumps(CLASSES[name]("what was asked")))
    assert isinstance(again, LoraweaveError)
    assert (type(again), str(again)) == (CLASSES[name], "what was asked")


@PROPERTIES.add()
def every_class_has_a_docstring_of_one_sentence(name):
    assert re.fullmatch(r"[A-Z][^\n]+\.", CLASSES[name].__doc__)
