"""Properties of all entries of a registry: one case for an entry tries those that apply to it and names each that fails.

    PROPERTIES = Properties(registry.names("methods"))

    @PROPERTIES.given
    def method(name):
        return Method(name)

    @PROPERTIES.add(of=PAIRS, rank=[2, 0])
    def updates_of_zero_give_zero(method, rank): ...

    @pytest.mark.parametrize("name", PROPERTIES.entries)
    def test_a_method_keeps_its_properties(name, request):
        PROPERTIES.walk(request, name)

A property takes by name: `name`, the entry; its parameters; what is `given`, made anew for each property, as are `tmp_path`
and `monkeypatch`; and what is passed to `walk`, which all share. Random generators are seeded before each, and filters of
warnings end with it.

Try one property of one entry alone like this; its error is raised as it is, for `--pdb`:

    pytest tests/conformance/test_methods.py -k ties --property "zero give zero"
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pytest


class Properties:
    def __init__(self, entries: Collection[str]) -> None:
        self.entries = tuple(entries)
        self._properties: list[tuple[Callable[..., None], tuple[str, ...], dict[str, Any]]] = []
        self._makers: dict[str, Callable[..., Any]] = {"tmp_path": _folder, "monkeypatch": _patch}

    def given(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Make what properties take by the name of `make`; like a fixture of pytest, it may yield and then clean up."""
        self._makers[make.__name__] = make
        return make

    def add(self, *, of: Collection[str] | None = None, **parameters: Collection[Any]) -> Callable[[Any], Any]:
        """Add a property of the entries `of`, of all by default, for every combination of the parameters' values."""
        entries = self.entries if of is None else tuple(of)
        choices = [dict(zip(parameters, values, strict=True)) for values in product(*parameters.values())]
        if not entries or not choices or not set(entries) <= set(self.entries):
            raise ValueError(f"a property of {entries} with {parameters}; the entries are {self.entries}")

        def added(function: Any) -> Any:
            self._properties += [(function, entries, choice) for choice in choices]
            return function

        return added

    def of(self, entry: str) -> Iterator[tuple[str, Callable[..., None], dict[str, Any]]]:
        """Yield each property of the entry: its sentence, its function and the values of its parameters."""
        for function, entries, choice in self._properties:
            if entry in entries:
                shown = ", ".join(f"{key}={value!r}" for key, value in choice.items())
                yield function.__name__.replace("_", " ") + (f" [{shown}]" if shown else ""), function, choice

    def walk(self, request: pytest.FixtureRequest, entry: str, **shared: Any) -> None:
        """Try every property of the entry, then fail with all their errors, or skip if no property was left."""
        __tracebackhide__ = True
        wanted = request.config.getoption("--property").replace("_", " ")
        shared |= {"name": entry, "folder_of_the_case": request.getfixturevalue("tmp_path")}
        walked, failed, skipped = 0, [], []
        for sentence, function, choice in self.of(entry):
            if wanted not in sentence.replace("_", " "):
                continue
            walked += 1
            request.getfixturevalue("seeded")()
            try:
                with warnings.catch_warnings(), ExitStack() as stack:
                    self._call(function, {**shared, **choice}, stack)
            except pytest.skip.Exception as error:
                skipped.append((entry, sentence, str(error)))
            except (Exception, pytest.fail.Exception) as error:
                if wanted:
                    raise
                trace = pytest.ExceptionInfo.from_exception(error).getrepr(style="short")
                failed.append(f"----- {sentence} -----\n{trace}")
                # the clock of a case rings once, and the next property may never end
                if "pytest-timeout" in str(error):
                    break
        request.node.user_properties.append(("properties", (walked, skipped)))
        if failed:
            head = f"{entry}: {len(failed)} of {walked} properties fail; try one alone with --property"
            pytest.fail("\n\n".join([head, *failed]), pytrace=False)
        if len(skipped) == walked:
            pytest.skip("; ".join(sorted({reason for *_, reason in skipped})) or f"no property has {wanted!r} in its name")

    def _call(self, function: Callable[..., Any], values: dict[str, Any], stack: ExitStack) -> Any:
        """Call `function` with those of `values` that it takes, after making those that are absent."""
        __tracebackhide__ = True
        arguments = {}
        for name in inspect.signature(function).parameters:
            if name not in values:
                values[name] = self._call(self._makers[name], values, stack)
            arguments[name] = values[name]
        result = function(**arguments)
        if not inspect.isgenerator(result):
            return result
        stack.callback(next, result, None)
        return next(result)


def _folder(folder_of_the_case: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder_of_the_case))


def _patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch
