r"""adapter_config.json as every format reads it: a getter for each kind of value, which checks its type and range.

`resolve` reads PEFT's rank_pattern and alpha_pattern without letting an unknown regular expression run unbounded. PEFT
takes the first key, in the order of the file, for which re.match(r"(.*\.)?(key)$", layer) holds. Here a key without
quantifiers or groups, which cannot backtrack beyond the length of a name, is run in this process. Every other key is run
by a second Python process under a time limit, because the standard library's matcher cannot be interrupted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.formats._files import listing, present, read_json
from loraweave.registry import bringing, extensions

T = TypeVar("T")
CONFIG = "adapter_config.json"
MAX_TEXT = 4_096
MAX_NAMES = 1_000
MAX_COUNT = 2**31 - 1
# the extensions for the rarer forms of adapters; only errors name them
MORE_FORMATS = "adapter_types"
EXPERTS = ("fused_experts", "reads and writes experts in one parameter")


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of a stored adapter's config. Getters raise AdapterCorrupt, naming folder, field and value."""

    folder: Path
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> AdapterConfig:
        """Read the folder's config. Raises AdapterCorrupt if it is missing or damaged."""
        if not present(folder, CONFIG):
            raise AdapterCorrupt(f"{folder}: no {CONFIG}; the folder holds {listing(folder)}")
        return cls(folder, read_json(folder, CONFIG))

    def check_fields(self, known: Collection[str], refused: Mapping[str, str]) -> None:
        """Raise AdapterUnsupported, with the reason, for a field in `refused` or not in `known` that is not empty."""
        for name, value in self.fields.items():
            if name in known or value is None or value is False or value in ({}, [], ""):
                continue
            if name in refused:
                raise AdapterUnsupported(f"{self.folder}: {CONFIG} has {name}={shorten(value)}: {refused[name]}")
            raise AdapterUnsupported(
                f"{self.folder}: {CONFIG} has the unknown field {name}={shorten(value)}, which may change what the tensors "
                "mean; remove it if it does not, or save the adapter with a PEFT version that does not write it"
            )

    def number(self, name: str, default: float | None = None) -> float:
        return self._number(self.fields.get(name, default), name)

    def numbers(self, name: str) -> dict[str, float]:
        """Return the field, a JSON object {layer pattern: finite number}."""
        return {key: self._number(value, f"{name}[{key!r}]") for key, value in self.table(name).items()}

    def count(self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_COUNT) -> int:
        return self._count(self.fields.get(name, default), name, least, most)

    def counts(self, name: str, *, most: int = MAX_COUNT) -> dict[str, int]:
        """Return the field, a JSON object {layer pattern: whole number from 1 to `most`}."""
        return {key: self._count(value, f"{name}[{key!r}]", 1, most) for key, value in self.table(name).items()}

    def flag(self, name: str, default: bool = False) -> bool:
        return self._typed(name, self.fields.get(name, default), bool, "true or false")

    def text(self, name: str) -> str:
        """Return the text of the field, empty if the field is missing or null."""
        value = self.fields.get(name)
        return self._typed(name, "" if value is None else value, str, f"a text of up to {MAX_TEXT} characters")

    def names(self, name: str) -> tuple[str, ...]:
        """Return the module names that the field lists, each once; empty if the field is missing or null."""
        value = self._typed(name, self.fields.get(name) or [], list, "a list of module names")
        if len(value) > MAX_NAMES:
            raise AdapterCorrupt(f"{self.folder}: {name} lists {len(value)} names, above the limit of {MAX_NAMES}")
        if not all(type(module_name) is str and 0 < len(module_name) <= MAX_TEXT for module_name in value):
            raise AdapterCorrupt(f"{self.folder}: {name} is {shorten(value)}, not a list of module names")
        return tuple(dict.fromkeys(value))

    def whole_numbers(self, name: str, *, most: int) -> tuple[int, ...]:
        """Return the field's list of up to `most` whole numbers from 0; empty if the field is missing or null."""
        value = self._typed(name, self.fields.get(name) or [], list, "a list of whole numbers")
        if len(value) > most:
            raise AdapterCorrupt(f"{self.folder}: {name} lists {len(value)} numbers, above the limit of {most}")
        return tuple(self._count(number, f"{name}[{place}]", 0, MAX_COUNT) for place, number in enumerate(value))

    def table(self, name: str) -> Mapping[str, Any]:
        """Return the field, a JSON object {layer pattern: value}; empty if the field is missing, null or empty."""
        return self._typed(name, self.fields.get(name) or {}, dict, "an object of layer patterns")

    def matched(self, pattern: str, layer: str, default: str) -> float:
        """Return a layer's number by PEFT's rule: the first match in the field `pattern`, else the field `default`."""
        numbers, disputed = resolve_patterns(self.folder, pattern, self.numbers(pattern), [layer], self.number(default))
        if disputed:
            raise AdapterUnsupported(f"{self.folder}: {pattern} gives layer {layer!r} several values, {disputed[layer]}")
        return numbers[layer]

    def _typed(self, name: str, value: Any, kind: type[T], what: str) -> T:
        if not isinstance(value, kind) or (isinstance(value, str) and len(value) > MAX_TEXT):
            raise AdapterCorrupt(f"{self.folder}: {name} is {shorten(value)}, not {what}")
        return value

    def _number(self, value: Any, name: str) -> float:
        # compared, since math.isfinite fails for a whole number that no float can hold
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            raise AdapterCorrupt(f"{self.folder}: {name} is {shorten(value)}, not a finite number")
        return float(value)

    def _count(self, value: Any, name: str, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            raise AdapterCorrupt(f"{self.folder}: {name} is {shorten(value)}, not a whole number from {least} to {most}")
        return value


def config_fields(folder: Path) -> Mapping[str, Any]:
    """Return the fields of the folder's config, which tell its format; {} if the config is missing or damaged."""
    try:
        return read_json(folder, CONFIG) if present(folder, CONFIG) else {}
    except AdapterCorrupt:
        return {}


def resolve_patterns(
    folder: Path, name: str, patterns: Mapping[str, Number], layers: Iterable[str], default: Number
) -> tuple[dict[str, Number], dict[str, list[Number]]]:
    """Return `resolve(..)` for the field `name`. Raises AdapterUnsupported for a pattern that is invalid or too large."""
    try:
        return resolve(patterns, layers, default)
    except PatternError as error:
        raise AdapterUnsupported(f"{folder}: {name}: {error}; write layer names without regular expressions") from error


def extension_module(part: str, what: str, *missing: str) -> Any:
    """Return an extension's module `part`. Raises AdapterUnsupported with `what` and `missing_extension(*missing)`."""
    module = next(bringing(part), None)
    if module is None:
        raise AdapterUnsupported(f"{what}: nothing here reads or writes this form{missing_extension(*missing)}")
    return module


def missing_extension(name: str = MORE_FORMATS, does: str = "reads more") -> str:
    """Return the end of an error's text that names the extension to install, or "" if that is installed."""
    return "" if name in extensions() else f"; the extension {name!r}, which {does}, is not installed"


def words(text: str) -> frozenset[str]:
    """Split a text of names at its blanks into a set."""
    return frozenset(text.split())


def shorten(value: Any) -> str:
    """Return the value's repr for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


Number = TypeVar("Number", int, float)

MAX_PATTERN_LENGTH = 1_000
# compiling one takes a tenth of a millisecond; names of layers are compared as text first and hardly count
MAX_EXPRESSIONS = 10_000
MAX_COMPARISONS = 20_000_000
TIMEOUT_S = 5.0

_HELPER = """
import json, re, sys
keys, layers = json.load(sys.stdin)
rules = [(index, re.compile(rf"(.*\\.)?({key})$")) for index, key in keys]
json.dump([[index for index, rule in rules if rule.match(layer)] for layer in layers], sys.stdout)
"""


class PatternError(ValueError):
    """A pattern that is not a regular expression or cannot be run within the limits; the message says which."""


def resolve(
    patterns: Mapping[str, Number], layers: Iterable[str], default: Number
) -> tuple[dict[str, Number], dict[str, list[Number]]]:
    """Return each layer's value by PEFT's rule (the first matching pattern's, else `default`), and the disputed layers.

    A layer is disputed when patterns with different values match it: PEFT sorts the keys when it saves, so another order may
    have decided in training. The second result has all values of such a layer, the deciding one first. Raises PatternError
    for an invalid pattern and for one that exceeds the limits of length, number or time.
    """
    names = list(layers)
    keys = list(patterns)
    if len(keys) * len(names) > MAX_COMPARISONS:
        raise PatternError(f"{len(keys)} patterns for {len(names)} layers are too many to compare")
    for key in keys:
        if len(key) > MAX_PATTERN_LENGTH:
            raise PatternError(f"the pattern {key[:60]!r}... has {len(key)} characters, above {MAX_PATTERN_LENGTH}")
    num_expressions = sum(not _literal_tail(key) for key in keys)
    if num_expressions > MAX_EXPRESSIONS:
        raise PatternError(f"{num_expressions} of {len(keys)} patterns are regular expressions, above {MAX_EXPRESSIONS}")
    simple = [(index, key) for index, key in enumerate(keys) if not set(key) & set("*+?{(")]
    others = [(index, key) for index, key in enumerate(keys) if set(key) & set("*+?{(")]
    hits = _run_here(simple, names)
    if others:
        hits = [here + apart for here, apart in zip(hits, _run_apart(others, names), strict=True)]
    values = list(patterns.values())
    matched = {name: [values[index] for index in sorted(indices)] for name, indices in zip(names, hits, strict=True)}
    disputed = {name: matches for name, matches in matched.items() if len(set(matches)) > 1}
    return {name: matches[0] if matches else default for name, matches in matched.items()}, disputed


def _run_here(keys: list[tuple[int, str]], names: list[str]) -> list[list[int]]:
    """Return, for each name, the indices of the patterns that match it, run in this process."""
    tails = [(index, _literal_tail(key), key) for index, key in keys]
    # a plain layer name is a regular expression for certain, so it is compiled only for a name that ends like it
    rules = {key: _compile(key) for _, tail, key in tails if not tail}
    hits = []
    for name in names:
        indices = []
        for index, tail, key in tails:
            if not name.endswith(tail):
                continue
            if key not in rules:
                rules[key] = _compile(key)
            if rules[key].match(name):
                indices.append(index)
        hits.append(indices)
    return hits


def _compile(key: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            # a doubtful character class is left to the pattern's author
            warnings.simplefilter("ignore", FutureWarning)
            return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"the pattern {key[:60]!r} is not a regular expression ({error})") from error


def _literal_tail(key: str) -> str:
    """Return the letters that every match must end in, which rule out most patterns without running them; "" if unknown."""
    return "" if not re.fullmatch(r"\^?(?:\w|-|\.|\\[.\-])+", key) else re.split(r"[^\w]", key)[-1]


def _run_apart(keys: list[tuple[int, str]], names: list[str]) -> list[list[int]]:
    for _, key in keys:
        _compile(key)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _HELPER],
            input=json.dumps([keys, names]),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise PatternError(f"the patterns {[key[:60] for _, key in keys[:3]]} need more than {TIMEOUT_S} s") from error
    except (OSError, subprocess.CalledProcessError) as error:
        raise PatternError(f"the patterns {[key[:60] for _, key in keys[:3]]} could not be run ({error})") from error
    return [list(map(int, indices)) for indices in json.loads(done.stdout)]
