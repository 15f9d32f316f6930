"""adapter_config.json as every format reads it: one getter for each kind of value, which checks its type and range."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.formats._files import listing, present, read_json
from loraweave.hub.formats._patterns import Number, PatternError, resolve

T = TypeVar("T")
CONFIG = "adapter_config.json"
MAX_TEXT = 4_096
MAX_NAMES = 1_000
MAX_COUNT = 2**31 - 1


@dataclass(frozen=True)
class Config:
    """The fields of a stored adapter's config. Getters raise AdapterCorrupt, naming folder, field and value."""

    folder: Path
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> Config:
        """Reads the folder's config. Raises AdapterCorrupt if it is missing or damaged."""
        if not present(folder, CONFIG):
            raise AdapterCorrupt(f"{folder}: no {CONFIG}; the folder holds {listing(folder)}")
        return cls(folder, read_json(folder, CONFIG))

    def check_fields(self, known: Collection[str], refused: Mapping[str, str]) -> None:
        """Raises AdapterUnsupported for a field that says something and is refused, with the reason, or is not known."""
        for name, value in self.fields.items():
            if name in known or not says_something(value):
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
        """The numbers of a table of layer patterns."""
        return {key: self._number(value, f"{name}[{key!r}]") for key, value in self.table(name).items()}

    def count(self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_COUNT) -> int:
        return self._count(self.fields.get(name, default), name, least, most)

    def counts(self, name: str, *, most: int = MAX_COUNT) -> dict[str, int]:
        """The whole numbers, from 1 to `most`, of a table of layer patterns."""
        return {key: self._count(value, f"{name}[{key!r}]", 1, most) for key, value in self.table(name).items()}

    def flag(self, name: str, default: bool = False) -> bool:
        return self._typed(name, self.fields.get(name, default), bool, "true or false")

    def choice(self, name: str, options: Iterable[Any], default: Any = None) -> Any:
        """Raises AdapterUnsupported for any other value than one of the options."""
        value = self.fields.get(name, default)
        known = list(options)
        if not any(type(value) is type(option) and value == option for option in known):
            raise AdapterUnsupported(f"{self.folder}: {name} is {shorten(value)}; known are {', '.join(map(repr, known))}")
        return value

    def text(self, name: str) -> str:
        """The text, empty where the field is missing or null."""
        value = self.fields.get(name)
        return self._typed(name, "" if value is None else value, str, f"a text of up to {MAX_TEXT} characters")

    def names(self, name: str) -> tuple[str, ...]:
        """A list of module names, each once; empty where the field is missing or null."""
        value = self._typed(name, self.fields.get(name) or [], list, "a list of module names")
        if len(value) > MAX_NAMES:
            raise AdapterCorrupt(f"{self.folder}: {name} lists {len(value)} names, above the limit of {MAX_NAMES}")
        if not all(type(each) is str and 0 < len(each) <= MAX_TEXT for each in value):
            raise AdapterCorrupt(f"{self.folder}: {name} is {shorten(value)}, not a list of module names")
        return tuple(dict.fromkeys(value))

    def whole_numbers(self, name: str, *, most: int) -> tuple[int, ...]:
        """A list of up to `most` whole numbers from 0; empty where the field is missing or null."""
        value = self._typed(name, self.fields.get(name) or [], list, "a list of whole numbers")
        if len(value) > most:
            raise AdapterCorrupt(f"{self.folder}: {name} lists {len(value)} numbers, above the limit of {most}")
        return tuple(self._count(each, f"{name}[{place}]", 0, MAX_COUNT) for place, each in enumerate(value))

    def table(self, name: str) -> Mapping[str, Any]:
        """An object from layer patterns to values; empty where the field is missing, null or empty."""
        return self._typed(name, self.fields.get(name) or {}, dict, "an object of layer patterns")

    def matched(self, pattern: str, layer: str, default: str) -> float:
        """The number that the patterns in field `pattern` give a layer by PEFT's rule, else that of field `default`."""
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
    """The fields of the folder's config to tell its format by; none where the config is missing or damaged."""
    try:
        return read_json(folder, CONFIG) if present(folder, CONFIG) else {}
    except AdapterCorrupt:
        return {}


def resolve_patterns(
    folder: Path, name: str, patterns: Mapping[str, Number], layers: Iterable[str], default: Number
) -> tuple[dict[str, Number], dict[str, list[Number]]]:
    """`resolve` for the field `name`. Raises AdapterUnsupported for a pattern that cannot be run within the limits."""
    try:
        return resolve(patterns, layers, default)
    except PatternError as error:
        raise AdapterUnsupported(f"{folder}: {name}: {error}; write layer names without regular expressions") from error


def says_something(value: Any) -> bool:
    """Whether a field's value is anything but null, false or empty."""
    return value is not None and value is not False and value not in ({}, [], "")


def words(text: str) -> frozenset[str]:
    """The words of a text, as a table of names that takes a few lines."""
    return frozenset(text.split())


def shorten(value: Any) -> str:
    """The value as messages show it: up to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
