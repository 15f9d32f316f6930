"""The parts of a formula: immutable values, built in one form only, and that form as text; and the pieces of a text.

A piece is a word, a number, a quoted name or a symbol, with its place; an error shows the place.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from loraweave.common.names import printable
from loraweave.errors import FormulaError, WeightingError

# the most characters of a formula, digits of one number in it, and brackets inside each other
MAX_CHARACTERS, MAX_DIGITS, MAX_DEPTH = 4096, 40, 8

# the characters on either side of the place that an error shows of a long formula
AROUND = 60

# a hyphen, dot or slash inside a name belongs to it; a minus has a space before it
_WORD = re.compile(r"[^\W\d](?:\w|[-./](?=\w))*")
_NUMBER = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_SYMBOLS = "+-*(),;=@[]{}"
_OPENING, _CLOSING = "([{", ")]}"
# words that mean something else than an adapter of that name, which is then quoted
RESERVED = ("auto", "base", "true", "false", "none")
# the name that a formula has for the average of probabilities
ENSEMBLE = "ensemble"


@dataclass(frozen=True)
class Named:
    """An adapter by its name and, if `version` is set, as that version of it."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return quoted(self.name) + ("" if self.version is None else f"@{self.version}")

    @property
    def key(self) -> str:
        """The name of the adapter among experts: `name` or `name@version`."""
        return self.name if self.version is None else f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Stored:
    """A composition that a hub keeps, by its name."""

    name: str

    def __str__(self) -> str:
        return f"@{quoted(self.name)}"

    @property
    def key(self) -> str:
        """The name of the composition among experts: `@name`."""
        return f"@{self.name}"


@dataclass(frozen=True)
class Content:
    """An adapter by the hash of its content, whatever its name; for identities only."""

    hash: str

    def __str__(self) -> str:
        return f"#{self.hash}"


@dataclass(frozen=True)
class Sum:
    """The weighted sum of `terms`, (weight, term), positive ones first and by their texts; without any, the base model."""

    terms: tuple[tuple[float, Term], ...]

    def __str__(self) -> str:
        if not self.terms:
            return "base"
        (weight, first), *rest = self.terms
        parts = [("-" if weight < 0 else "") + _weighted(abs(weight), first)]
        parts += [f"{'-' if weight < 0 else '+'} {_weighted(abs(weight), term)}" for weight, term in rest]
        return " ".join(parts)


@dataclass(frozen=True)
class Merge:
    """A merge by a method with options. Without `weights` all arguments have equal shares, which sum to 1."""

    method: str
    arguments: tuple[Argument, ...]
    weights: tuple[float, ...] | None
    options: tuple[tuple[str, Value], ...]

    def __str__(self) -> str:
        if self.weights is None:
            parts = [_bare(argument) for argument in self.arguments]
        else:
            pairs = zip(self.weights, self.arguments, strict=True)
            parts = [f"{number_text(weight)}*{_bracketed(argument)}" for weight, argument in pairs]
        return _call(self.method, parts, self.options)


@dataclass(frozen=True)
class Routed:
    """A router over experts, with options."""

    router: str
    experts: tuple[Leaf, ...]
    options: tuple[tuple[str, Value], ...]

    def __str__(self) -> str:
        return _call(self.router, map(str, self.experts), self.options)


@dataclass(frozen=True)
class Ensemble:
    """The average of the probabilities of members that answer apart, in proportion to `shares`, or all alike."""

    members: tuple[Argument, ...]
    shares: tuple[float, ...] | None

    def __str__(self) -> str:
        return str(Merge(ENSEMBLE, self.members, self.shares, ()))


@dataclass(frozen=True)
class Auto:
    """The retrieval of adapters for each request."""

    def __str__(self) -> str:
        return "auto"


@dataclass(frozen=True)
class Listed:
    """The value of an option that is a list."""

    values: tuple[Value, ...]


@dataclass(frozen=True)
class Mapped:
    """The value of an option that is a mapping, in the order of its names."""

    items: tuple[tuple[str, Value], ...]


Leaf = Named | Stored
Term = Leaf | Content | Merge
Argument = Term | Sum
Root = Sum | Routed | Ensemble | Auto
Value = bool | int | float | str | None | Listed | Mapped


def sum_of(terms: Mapping[Term, Fraction]) -> Sum:
    """Return the sum of these terms, without those of weight 0. Raises WeightingError for a weight that no float holds."""
    weights = [(rounded(weight), term) for term, weight in terms.items() if weight]
    return Sum(tuple(sorted(weights, key=lambda pair: (pair[0] < 0, str(pair[1])))))


def added(parts: Iterable[tuple[Fraction, Argument]]) -> dict[Term, Fraction]:
    """Return the terms of a weighted sum of terms and sums, with equal ones added up; exact."""
    total: dict[Term, Fraction] = {}
    for weight, part in parts:
        for factor, term in as_sum(part).terms:
            total[term] = total.get(term, Fraction(0)) + weight * exact(factor)
    return {term: weight for term, weight in total.items() if weight}


def as_argument(found: Sum) -> Argument:
    """Return a sum as an argument: its only term where that has weight 1, else the sum."""
    return found.terms[0][1] if len(found.terms) == 1 and found.terms[0][0] == 1.0 else found


def as_sum(found: Argument) -> Sum:
    """Return an argument as a whole formula: a sum, of one term if it is not a sum."""
    return found if isinstance(found, Sum) else Sum(((1.0, found),))


def merge_of(
    method: str,
    arguments: Sequence[Argument],
    weights: Sequence[float] | None,
    options: Iterable[tuple[str, Value]],
) -> Merge:
    """Return the merge with its arguments in order, without those of weight 0, and without weights that are equal shares."""
    shares = [1 / len(arguments)] * len(arguments)
    pairs = sorted(zip(weights or shares, arguments, strict=True), key=lambda pair: (str(pair[1]), pair[0]))
    used = [(weight, argument) for weight, argument in pairs if weight]
    numbers = tuple(weight for weight, _ in used)
    equal = all(number == 1 / len(used) for number in numbers)
    return Merge(method, tuple(argument for _, argument in used), None if equal else numbers, tuple(sorted(options)))


def ensemble_of(members: Sequence[Argument], shares: Sequence[float] | None) -> Ensemble:
    """Return the ensemble with its members in order, and without shares that are equal."""
    pairs = sorted(zip(shares or [1.0] * len(members), members, strict=True), key=lambda pair: (str(pair[1]), pair[0]))
    numbers = tuple(share for share, _ in pairs)
    return Ensemble(tuple(member for _, member in pairs), None if len(set(numbers)) == 1 else numbers)


def replaced(node: Argument, leaf: Callable[[Leaf], Argument]) -> Argument:
    """Return the node with every leaf replaced by what `leaf` returns. Raises WeightingError for a merge of the base."""
    match node:
        case Merge(method, arguments, weights, options):
            inner = [replaced(argument, leaf) for argument in arguments]
            if any(argument == Sum(()) for argument in inner):
                raise WeightingError(f"{method!r} merges adapters, and one of its arguments is the base model")
            return merge_of(method, inner, weights, options)
        case Sum(terms):
            return as_argument(sum_of(added((exact(weight), replaced(term, leaf)) for weight, term in terms)))
        case Content():
            return node
    return leaf(node)


def leaves(node: Root | Argument) -> list[Leaf]:
    """Return the adapters and stored compositions that are written in a node, one for each mention."""
    match node:
        case Sum():
            return [leaf for _, term in node.terms for leaf in leaves(term)]
        case Merge():
            return [leaf for argument in node.arguments for leaf in leaves(argument)]
        case Routed():
            return list(node.experts)
        case Ensemble():
            return [leaf for member in node.members for leaf in leaves(member)]
        case Auto() | Content():
            return []
    return [node]


def exact(number: float) -> Fraction:
    """Return the number that the shortest text of a float says, as an exact fraction."""
    return Fraction(repr(number))


def rounded(number: Fraction) -> float:
    """Return the float next to a number. Raises WeightingError above or below what floats hold."""
    try:
        value = float(number)
    except OverflowError:
        value = 0.0
    if number and not value:
        raise WeightingError("this weight is beyond what a float holds; weights are finite numbers")
    return value


def number_text(number: float) -> str:
    """Return the shortest text that reads as the number."""
    return repr(number).removesuffix(".0")


def plain(value: Value) -> Any:
    """Return an option's value as a function takes it: a list as a tuple, a mapping as a dict."""
    match value:
        case Listed():
            return tuple(plain(element) for element in value.values)
        case Mapped():
            return {name: plain(element) for name, element in value.items}
    return value


def _value(value: Value) -> str:
    match value:
        case bool() | None:
            return str(value).lower()
        case int() | float():
            return number_text(value)
        case Listed():
            return f"[{', '.join(map(_value, value.values))}]"
        case Mapped():
            return "{" + ", ".join(f"{quoted(name)}={_value(element)}" for name, element in value.items) + "}"
    return quoted(value)


def _call(name: str, parts: Iterable[str], options: Sequence[tuple[str, Value]]) -> str:
    told = ", ".join(f"{option}={_value(value)}" for option, value in options)
    return f"{name}({', '.join(parts)}{'; ' if told else ''}{told})"


def _weighted(weight: float, term: Term) -> str:
    return str(term) if weight == 1.0 else f"{number_text(weight)}*{term}"


def _bracketed(argument: Argument) -> str:
    return f"({argument})" if isinstance(argument, Sum) else str(argument)


def _bare(argument: Argument) -> str:
    # a number before a single term would be the argument's weight
    return _bracketed(argument) if isinstance(argument, Sum) and len(argument.terms) == 1 else str(argument)


@dataclass(frozen=True)
class Token:
    """A piece of a formula. `kind` is "word", "quoted", "number", "end", or for a symbol the symbol itself."""

    kind: str
    value: str
    start: int
    end: int


def tokens(text: str) -> list[Token]:
    """Return the pieces of a formula, "end" last. Raises FormulaError for text that has none, and above the limits."""
    pieces = list(_pieces(text))
    depth = 0
    for token in pieces:
        depth += (token.kind in _OPENING) - (token.kind in _CLOSING)
        if depth > MAX_DEPTH:
            raise misplaced(
                f"brackets are more than {MAX_DEPTH} deep; merge a part of it, and add that to the hub", text, token
            )
    return pieces


def normal(text: Any) -> str:
    """Return a formula's text in Unicode form NFC, as names are. Raises FormulaError for other types and above the limit."""
    if not isinstance(text, str):
        raise FormulaError(f"a formula is text such as '0.7*a + 0.3*b', not {type(text).__name__} {text!r:.60}")
    if len(text) > MAX_CHARACTERS:
        raise FormulaError(f"a formula has at most {MAX_CHARACTERS} characters, not {len(text)}: {text[:AROUND]!a} ...")
    return unicodedata.normalize("NFC", text)


def quoted(name: str) -> str:
    """Return a name as a formula writes it: bare if it is a word and not reserved, else in quotes."""
    if _WORD.fullmatch(name) and name not in RESERVED:
        return name
    return "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"


def misplaced(problem: str, text: str, place: Token | None) -> FormulaError:
    """Return the error of a problem at a place of a formula: the problem, the text, and a caret under the place."""
    if place is None:
        return FormulaError(f"{problem}\n  {printable(text)[: 2 * AROUND]}")
    start = max(0, place.start - AROUND)
    end = min(len(text), place.end + AROUND)
    before = ("... " if start else "") + printable(text[start : place.start])
    rest = printable(text[place.start : end]) + (" ..." if end < len(text) else "")
    marked = _width(printable(text[place.start : min(place.end, end)]))
    return FormulaError(f"{problem}\n  {before}{rest}\n  {' ' * _width(before)}^{'~' * (marked - 1)}")


def _pieces(text: str) -> Iterator[Token]:
    position = 0
    while True:
        while position < len(text) and text[position].isspace():
            position += 1
        if position == len(text):
            yield Token("end", "", position, position + 1)
            return
        token = _piece(text, position)
        yield token
        position = token.end


def _piece(text: str, start: int) -> Token:
    character = text[start]
    if character in "'\"":
        return _quoted(text, start)
    if match := _WORD.match(text, start):
        word = Token("word", match[0], start, match.end())
        if text[word.end : word.end + 1] == "-":
            raise misplaced(f"put a space before '-' to subtract from {word.value!r}, or quote the whole name", text, word)
        return word
    if match := _NUMBER.match(text, start):
        number = Token("number", match[0], start, match.end())
        if re.match(r"[\w.]", text[number.end : number.end + 1]):
            raise misplaced("this is no number; a name that begins with a digit is quoted, as in '3rd'", text, number)
        if number.end - start > MAX_DIGITS:
            raise misplaced(f"a number has at most {MAX_DIGITS} characters", text, number)
        return number
    here = Token(character, character, start, start + 1)
    if character in _SYMBOLS:
        return here
    way_out = "write 0.5*(...) to divide" if character == "/" else "quote a name that has it, as in 'my adapter: v2'"
    raise misplaced(f"a formula has no {character!a} here; {way_out}", text, here)


def _quoted(text: str, start: int) -> Token:
    """Read a name between quotes, in which a backslash stands before a quote or another backslash."""
    mark, position = text[start], start + 1
    value: list[str] = []
    while position < len(text):
        character = text[position]
        if character == mark:
            return Token("quoted", "".join(value), start, position + 1)
        if character == "\\":
            character = text[position + 1 : position + 2]
            if character not in ("\\", "'", '"'):
                place = Token("\\", "\\", position, position + 1)
                raise misplaced("in quotes a backslash is written twice", text, place)
            position += 1
        value.append(character)
        position += 1
    raise misplaced("this quote is not closed", text, Token(mark, mark, start, start + 1))


def _width(text: str) -> int:
    """Return the number of columns of a terminal that a text takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(bool(unicodedata.combining(character)) for character in text)
