"""The nodes of a formula: immutable values, built in one form only, and that form as text; and the tokens of a text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from loraweave.common.names import printable
from loraweave.errors import FormulaError, WeightingError

# the most characters of a formula, digits of one number in it, and brackets inside each other
MAX_CHARACTERS, MAX_DIGITS, MAX_DEPTH = 4096, 40, 8
# the characters of a long formula that an error shows on either side of the faulty token
AROUND = 60

# a hyphen, dot or slash inside a name belongs to it; a minus has a space before it
_WORD = r"[^\W\d](?:\w|[-./](?=\w))*"
# words that mean something else than an adapter of that name, which is then quoted
RESERVED = ("auto", "base", "true", "false", "none")
# the name that a formula has for the average of probabilities
ENSEMBLE = "ensemble"

_PIECE = re.compile(
    rf"""(?P<word>{_WORD})
    |(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    |(?P<mark>['"])(?P<quoted>(?:\\['"\\]|(?!(?P=mark))[^\\])*)
    |(?P<symbol>[-+*(),;=@\[\]{{}}])
    |\Z""",
    re.VERBOSE,
)


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
    """The sum of `terms`, (weight, term), positive weights first, then by the terms' texts; without any, the base model."""

    terms: tuple[tuple[float, Term], ...]

    def __str__(self) -> str:
        text = ""
        for weight, term in self.terms:
            sign = "-" if weight < 0 else "+" if text else ""
            factor = "" if abs(weight) == 1.0 else f"{number_text(abs(weight))}*"
            text += f" {sign} {factor}{term}" if text else f"{sign}{factor}{term}"
        return text or "base"


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
    """The average of the probabilities of members that answer apart, in proportion to `shares`, or equal if None."""

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


def sum_of(parts: Iterable[tuple[Fraction, Argument]]) -> Sum:
    """Return the weighted sum of (weight, term or sum): equal terms are added up exactly, terms of weight 0 left out.

    Raises WeightingError for a weight that no float holds.
    """
    total: dict[Term, Fraction] = {}
    for weight, part in parts:
        for factor, term in as_sum(part).terms:
            total[term] = total.get(term, Fraction(0)) + weight * exact(factor)
    weights = [(rounded(weight), term) for term, weight in total.items() if weight]
    return Sum(tuple(sorted(weights, key=lambda pair: (pair[0] < 0, str(pair[1])))))


def as_argument(whole: Sum) -> Argument:
    """Return a sum as an argument: its only term if that has weight 1, else the sum."""
    return whole.terms[0][1] if len(whole.terms) == 1 and whole.terms[0][0] == 1.0 else whole


def as_sum(argument: Argument) -> Sum:
    """Return an argument as a whole formula: itself if it is a sum, else a sum of one term."""
    return argument if isinstance(argument, Sum) else Sum(((1.0, argument),))


def merge_of(
    method: str, arguments: Sequence[Argument], weights: Sequence[float] | None, options: Iterable[tuple[str, Value]]
) -> Merge:
    """Return the merge with its arguments sorted by text, without those of weight 0; equal weights are left out (None)."""
    shares = [1 / len(arguments)] * len(arguments)
    pairs = sorted(zip(weights or shares, arguments, strict=True), key=lambda pair: (str(pair[1]), pair[0]))
    used = [(weight, argument) for weight, argument in pairs if weight]
    numbers = tuple(weight for weight, _ in used)
    equal = all(number == 1 / len(used) for number in numbers)
    return Merge(method, tuple(argument for _, argument in used), None if equal else numbers, tuple(sorted(options)))


def ensemble_of(members: Sequence[Argument], shares: Sequence[float] | None) -> Ensemble:
    """Return the ensemble with its members sorted by text; equal shares are left out (None)."""
    pairs = sorted(zip(shares or [1.0] * len(members), members, strict=True), key=lambda pair: (str(pair[1]), pair[0]))
    numbers = tuple(share for share, _ in pairs)
    return Ensemble(tuple(member for _, member in pairs), None if len(set(numbers)) == 1 else numbers)


def replaced(node: Argument, leaf: Callable[[Leaf], Argument]) -> Argument:
    """Return the node with each name x in it replaced by leaf(x). Raises WeightingError for a merge of the base model."""
    match node:
        case Merge(method, arguments, weights, options):
            inner = [replaced(argument, leaf) for argument in arguments]
            if any(argument == Sum(()) for argument in inner):
                raise WeightingError(f"{method!r} merges adapters, and one of its arguments is the base model")
            return merge_of(method, inner, weights, options)
        case Sum(terms):
            return as_argument(sum_of((exact(weight), replaced(term, leaf)) for weight, term in terms))
        case Content():
            return node
    return leaf(node)


def leaves(node: Root | Argument) -> list[Leaf]:
    """Return the adapters and stored compositions of a node, one for each mention."""
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
    """Return the exact fraction of the decimal number that a float's shortest text states."""
    return Fraction(repr(number))


def rounded(number: Fraction) -> float:
    """Return the float next to `number`. Raises WeightingError if it is too large or too small for one."""
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


def quoted(name: str) -> str:
    """Return a name as a formula writes it: bare if it is a word and not reserved, else in quotes."""
    if re.fullmatch(_WORD, name) and name not in RESERVED:
        return name
    return "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"


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


def _bracketed(argument: Argument) -> str:
    return f"({argument})" if isinstance(argument, Sum) else str(argument)


def _bare(argument: Argument) -> str:
    # a number before a single term would be the argument's weight
    return _bracketed(argument) if isinstance(argument, Sum) and len(argument.terms) == 1 else str(argument)


@dataclass(frozen=True)
class Token:
    """A token of a formula, text[start:end]. `kind` is "word", "quoted", "number", "end", or the symbol itself."""

    kind: str
    value: str
    start: int
    end: int


def tokens(text: str) -> list[Token]:
    """Return the tokens of a formula, "end" last. Raises FormulaError for text that is not a token, and above the limits."""
    pieces: list[Token] = []
    position = depth = 0
    while not pieces or pieces[-1].kind != "end":
        while text[position : position + 1].isspace():
            position += 1
        pieces.append(_piece(text, position))
        position = pieces[-1].end
    for token in pieces:
        depth += (token.kind in ("(", "[", "{")) - (token.kind in (")", "]", "}"))
        if depth > MAX_DEPTH:
            raise misplaced(
                f"brackets are more than {MAX_DEPTH} deep; merge a part of it, and add that to the hub", text, token
            )
    return pieces


def _piece(text: str, start: int) -> Token:
    """Return the token at index `start`. In quotes a backslash stands before a quote or another backslash."""
    piece = _PIECE.match(text, start)
    if piece is None:
        here = Token(text[start], text[start], start, start + 1)
        way_out = "write 0.5*(...) to divide" if here.value == "/" else "quote a name that has it, as in 'my adapter: v2'"
        raise misplaced(f"a formula has no {here.value!a} here; {way_out}", text, here)
    end, following = piece.end(), text[piece.end() : piece.end() + 1]
    if piece["mark"]:
        if not following:
            raise misplaced("this quote is not closed", text, Token(piece["mark"], piece["mark"], start, start + 1))
        if following == "\\":
            raise misplaced("in quotes a backslash is written twice", text, Token("\\", "\\", end, end + 1))
        return Token("quoted", re.sub(r"\\(.)", r"\1", piece["quoted"]), start, end + 1)
    token = Token(piece["symbol"] or piece.lastgroup or "end", piece[0], start, max(end, start + (not piece[0])))
    if token.kind == "word" and following == "-":
        raise misplaced(f"put a space before '-' to subtract from {token.value!r}, or quote the whole name", text, token)
    if token.kind == "number" and re.match(r"[\w.]", following):
        raise misplaced("this is not a number; a name that begins with a digit is quoted, as in '3rd'", text, token)
    if token.kind == "number" and end - start > MAX_DIGITS:
        raise misplaced(f"a number has at most {MAX_DIGITS} characters", text, token)
    return token


def misplaced(problem: str, text: str, place: Token | None) -> FormulaError:
    """Return an error that shows the problem, the text, and a caret under the token `place`; no caret if it is None."""
    if place is None:
        return FormulaError(f"{problem}\n  {printable(text)[: 2 * AROUND]}")
    start = max(0, place.start - AROUND)
    end = min(len(text), place.end + AROUND)
    before = ("... " if start else "") + printable(text[start : place.start])
    rest = printable(text[place.start : end]) + (" ..." if end < len(text) else "")
    marked = _width(printable(text[place.start : min(place.end, end)]))
    return FormulaError(f"{problem}\n  {before}{rest}\n  {' ' * _width(before)}^{'~' * (marked - 1)}")


def _width(text: str) -> int:
    """Return the number of terminal columns that a text takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(bool(unicodedata.combining(character)) for character in text)
