"""The words, numbers and quoted names of a formula, each with its place in the text; and errors that show the place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loraweave.common.names import printable
from loraweave.errors import FormulaError

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
