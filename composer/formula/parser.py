"""The reader of formulas, by recursive descent with one method for each rule.

    formula  = "auto" | router | ensemble | sum
    sum      = {sign} term {sign {sign} term}
    term     = {number "*"} (adapter | stored | merge | "base" | "(" sum ")")
    adapter  = name ["@" number]                                      a version of the hub's adapter
    stored   = "@" name                                               a composition that the hub keeps
    merge    = method "(" sum {"," sum} [";" options] ")"             a number before an argument is its weight
    router   = name "(" expert {"," expert} [";" options] ")"         an expert is an adapter or a stored one
    ensemble = "ensemble" "(" sum {"," sum} ")"                       a number before a member is its share
    options  = word "=" value {"," word "=" value}
    value    = [sign] number | word | quoted | "[" values "]" | "{" options "}"

A name is a word or in quotes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import TypeVar

import loraweave.registry as registry
from loraweave.common.checks import is_whole
from loraweave.common.names import checked_name
from loraweave.common.options import check_options, options_of
from loraweave.composer.formula.nodes import (
    ENSEMBLE,
    Argument,
    Auto,
    Ensemble,
    Listed,
    Mapped,
    Named,
    Root,
    Routed,
    Stored,
    Sum,
    Token,
    Value,
    added,
    as_argument,
    ensemble_of,
    leaves,
    merge_of,
    misplaced,
    plain,
    rounded,
    sum_of,
    tokens,
)
from loraweave.composer.merge.method_call import MethodCall
from loraweave.errors import FormulaError, LoraweaveError, UnknownName
from loraweave.routers.tokens._saved import router_class, router_names

# adapters and stored compositions that a formula mentions
MAX_ADAPTERS = 64
# the options of lw.merge, beside those that the method itself declares
MERGE_OPTIONS = ("rank", "seed")

_WORDS = {"true": True, "True": True, "false": False, "False": False, "none": None, "None": None}
_DIGITS_OF_VERSION = 9

T = TypeVar("T")


class Parser:
    """A reader of the pieces of one text; every method begins at the piece at hand and leaves what follows."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pieces = tokens(text)
        self.place = 0
        self.num_adapters = 0

    @property
    def piece(self) -> Token:
        return self.pieces[self.place]

    @property
    def following(self) -> Token:
        return self.pieces[min(self.place + 1, len(self.pieces) - 1)]

    def root(self) -> Root:
        """Read the whole text. Raises FormulaError, with the place, for anything that is no formula."""
        root: Root
        if self.piece.kind == "end":
            raise self.error("this formula is empty; 'base' is the base model")
        if self._is("auto") and self.following.kind == "end":
            self._take()
            root = Auto()
        elif self._begins_router():
            root = self._routed()
        elif self._is(ENSEMBLE) and self.following.kind == "(":
            root = self._ensemble()
        else:
            begin = self.piece
            factor, whole, _ = self._argument()
            with self._at(begin):
                root = sum_of(added([(factor, whole)]))
        if self.piece.kind != "end":
            raise self.error(f"here should be '+', '-' or the end; {self._unexpected()}")
        return root

    def error(self, problem: str, place: Token | None = None) -> FormulaError:
        """Return the error of a problem at a piece, by default the one at hand."""
        return misplaced(problem, self.text, self.piece if place is None else place)

    def _argument(self) -> tuple[Fraction, Argument, bool]:
        """Read a sum or a single term; return (factor, argument, whether the factor is written)."""
        begin = self.piece
        parts: list[tuple[Fraction, Argument, bool]] = [self._signed_term()]
        while self.piece.kind in ("+", "-"):
            parts.append(self._signed_term())
        if len(parts) == 1:
            return parts[0]
        with self._at(begin):
            return Fraction(1), as_argument(sum_of(added((factor, argument) for factor, argument, _ in parts))), False

    def _signed_term(self) -> tuple[Fraction, Argument, bool]:
        sign = 1
        while self.piece.kind in ("+", "-"):
            sign *= -1 if self._take().kind == "-" else 1
        factor, argument, written = self._term()
        return sign * factor, argument, written or sign < 0

    def _term(self) -> tuple[Fraction, Argument, bool]:
        factor, written = Fraction(1), False
        while self.piece.kind == "number":
            number = self._take()
            factor, written = factor * self._number(number), True
            if self.piece.kind != "*":
                problem = f"{number.value} is a weight, and '*' and an adapter follow one; a name that begins with a digit"
                raise self.error(f"{problem} is quoted", number)
            self._take()
        argument = self._atom()
        if self.piece.kind == "*":
            before = self.pieces[self.place - 1]
            if before.kind == "word" and "-" in before.value:
                raise self.error(f"{before.value!r} is one name; a difference has spaces around its '-'", before)
            raise self.error("a weight is a finite number and comes first, as in 0.5*a")
        return factor, argument, written

    def _atom(self) -> Argument:
        begin = self.piece
        if begin.kind == "(":
            self._take()
            factor, argument, _ = self._argument()
            self._close(")", begin)
            with self._at(begin):
                return as_argument(sum_of(added([(factor, argument)])))
        if begin.kind == "@":
            self._take()
            return Stored(self._name("the name of a stored composition"))
        if begin.kind == "word" and self.following.kind == "(":
            return self._merge()
        if self._is("base"):
            self._take()
            return Sum(())
        if self._is("auto"):
            raise self.error("'auto' retrieves for each request and stands alone; quote an adapter of that name: 'auto'")
        return self._adapter()

    def _adapter(self) -> Named:
        name = self._name("an adapter")
        if self.piece.kind != "@":
            return Named(name)
        self._take()
        number = self.piece
        if number.kind != "number" or not number.value.isdecimal() or not 0 < int(number.value) < 10**_DIGITS_OF_VERSION:
            raise self.error(f"a version of {name!r} is a whole number from 1, as in a@3")
        self._take()
        return Named(name, int(number.value))

    def _name(self, what: str) -> str:
        token = self.piece
        if token.kind not in ("word", "quoted"):
            raise self.error(f"here should be {what}; {self._unexpected()}")
        self.num_adapters += 1
        if self.num_adapters > MAX_ADAPTERS:
            raise self.error(f"a formula has at most {MAX_ADAPTERS} adapters; merge a part of it, and add that to the hub")
        with self._at(self._take()):
            return checked_name(token.value)

    def _merge(self) -> Argument:
        name = self._take()
        if name.value not in registry.names("methods"):
            raise self._unknown_call(name)
        open_bracket = self._take()
        placed = self._separated(self._placed_argument)
        options = self._options(open_bracket)
        self._check_merge(name, options)
        arguments = [argument for _, _, argument, _ in placed]
        weights = self._weights(placed)
        if name.value == "linear" and not options:
            shares = [Fraction(1, len(placed))] * len(placed)
            summed = [factor for _, factor, _, _ in placed] if weights else shares
            with self._at(name):
                return as_argument(sum_of(added(zip(summed, arguments, strict=True))))
        if weights is not None and not any(weights):
            raise self.error("all weights are 0, which leaves nothing to merge; 'base' is the base model", name)
        if empty := next((token for token, _, argument, _ in placed if argument == Sum(())), None):
            raise self.error(f"{name.value!r} merges adapters, and this is the base model; leave it out", empty)
        return merge_of(name.value, arguments, weights, [(option, value) for option, (_, value) in options.items()])

    def _placed_argument(self) -> tuple[Token, Fraction, Argument, bool]:
        return self.piece, *self._argument()

    def _weights(self, given: Sequence[tuple[Token, Fraction, Argument, bool]]) -> list[float] | None:
        """Return the weights of a merge's arguments, or None if none is written. Raises FormulaError if only some are."""
        if not any(written for *_, written in given):
            return None
        for place, _, argument, written in given:
            if not written:
                raise self.error(f"give every argument a weight, or none: 1*{argument} is one", place)
        weights = []
        for place, factor, _, _ in given:
            with self._at(place):
                weights.append(rounded(factor))
        return weights

    def _check_merge(self, name: Token, options: Mapping[str, tuple[Token, Value]]) -> None:
        call = MethodCall(name.value)
        if call.takes("statistics"):
            raise self.error(
                f"{name.value!r} weighs by data, which a formula does not have; merge by lw.merge(..., statistics=...) and "
                "add the result to the hub",
                name,
            )
        for option, (place, value) in options.items():
            if option in MERGE_OPTIONS:
                least = 1 if option == "rank" else 0
                if not is_whole(value, least):
                    raise self.error(f"{option}={plain(value)!r:.80} is no whole number of {least} or more", place)
                continue
            known = (*call.own_options, *MERGE_OPTIONS)
            if option not in known:
                hint = registry.nearest(option, known)
                raise self.error(f"method {name.value!r} has no option {option!r}{hint}; it has {', '.join(known)}", place)
            with self._at(place):
                MethodCall(name.value, {option: plain(value)})

    def _routed(self) -> Routed:
        name = self._take()
        made_of = router_class(name.value)
        if made_of.learned:
            raise self.error(
                f"router {name.value!r} is trained first; a trained one is kept by hub.save_composition and named by @", name
            )
        open_bracket = self._take()
        experts: list[Named | Stored] = []
        for place, _, expert, written in self._separated(self._placed_argument):
            if written or not isinstance(expert, Named | Stored):
                raise self.error(
                    f"{name.value!r} weighs its experts itself: an expert is an adapter without a weight", place
                )
            if expert in experts:
                raise self.error(f"expert {expert} is given twice", place)
            experts.append(expert)
        options = self._options(open_bracket)
        kinds = options_of(made_of, after=1)
        for option, (place, value) in options.items():
            with self._at(place):
                check_options(f"router {name.value!r}", {option: plain(value)}, kinds)
        if self.piece.kind != "end":
            raise self.error("a router weighs every token by itself and stands alone: nothing follows it")
        given_options = sorted((option, value) for option, (_, value) in options.items())
        return Routed(name.value, tuple(sorted(experts, key=str)), tuple(given_options))

    def _ensemble(self) -> Ensemble:
        name, open_bracket = self._take(), self._take()
        placed = self._separated(self._placed_argument)
        self._close(")", open_bracket)
        if self.piece.kind != "end":
            raise self.error("an ensemble averages what its members answer and stands alone: nothing follows it")
        shares = self._weights(placed)
        if shares is not None and not all(share > 0 for share in shares):
            raise self.error("the shares of an ensemble's members are above 0", name)
        if not any(leaves(member) for _, _, member, _ in placed):
            raise self.error("the members of this ensemble are the base model, and so is their average", name)
        return ensemble_of([member for _, _, member, _ in placed], shares)

    def _unknown_call(self, name: Token) -> FormulaError:
        if name.value == ENSEMBLE:
            return self.error("an ensemble stands alone: no number, sum or bracket around it", name)
        methods, routers = registry.names("methods"), registry.names("routers")
        if name.value in routers:
            alone = (
                f"router {name.value!r} weighs every token by itself and stands alone: no number, sum or bracket around it"
            )
            return self.error(_why_no_router(name.value) or alone, name)
        hint = registry.nearest(name.value, [*methods, *router_names()], "routers")
        return self.error(f"there is no method or router {name.value!r}{hint}; lw.names('methods') lists them", name)

    def _options(self, open_bracket: Token) -> dict[str, tuple[Token, Value]]:
        """Read the options and the closing bracket; return {option: (its place, its value)}."""
        options: dict[str, tuple[Token, Value]] = {}
        if self.piece.kind == ";":
            self._take()
            options = self._pairs(")")
        self._close(")", open_bracket)
        return options

    def _pairs(self, end: str) -> dict[str, tuple[Token, Value]]:
        pairs: dict[str, tuple[Token, Value]] = {}
        while self.piece.kind != end:
            place = self.piece
            if place.kind not in ("word", "quoted") or self.following.kind != "=":
                raise self.error("here should be an option, as in density=0.3")
            if place.value in pairs:
                raise self.error(f"{place.value!r} is given twice")
            self._take()
            self._take()
            pairs[place.value] = place, self._value()
            if self.piece.kind != ",":
                break
            self._take()
        return pairs

    def _value(self) -> Value:
        token = self.piece
        if token.kind in ("[", "{"):
            return self._collection(self._take())
        sign = 1
        while self.piece.kind in ("+", "-"):
            sign *= -1 if self._take().kind == "-" else 1
        if self.piece.kind == "number":
            number = sign * float(self._number(self._take()))
            return int(number) if number.is_integer() and abs(number) < 2**53 else number
        if self.piece is token and token.kind in ("word", "quoted"):
            self._take()
            return _WORDS[token.value] if token.kind == "word" and token.value in _WORDS else token.value
        raise self.error("here should be a value: a number, a word, a text in quotes, true, false, none, [..] or {name=..}")

    def _collection(self, begin: Token) -> Value:
        if begin.kind == "{":
            pairs = self._pairs("}")
            self._close("}", begin)
            return Mapped(tuple(sorted((name, value) for name, (_, value) in pairs.items())))
        values: list[Value] = []
        while self.piece.kind != "]":
            values.append(self._value())
            if self.piece.kind != ",":
                break
            self._take()
        self._close("]", begin)
        return Listed(tuple(values))

    def _separated(self, read: Callable[[], T]) -> list[T]:
        items = [read()]
        while self.piece.kind == ",":
            self._take()
            items.append(read())
        return items

    def _number(self, token: Token) -> Fraction:
        value = float(token.value)
        mantissa = token.value.lower().partition("e")[0]
        # only a number that a float holds is small enough for its fraction to be made
        if value in (float("inf"), 0.0) and (value or mantissa.strip("0.")):
            raise self.error("this number is beyond what a float holds; weights are finite numbers", token)
        return Fraction(token.value) if value else Fraction(0)

    def _begins_router(self) -> bool:
        called = self.piece.kind == "word" and self.following.kind == "("
        return called and self.piece.value in registry.names("routers") and not _why_no_router(self.piece.value)

    def _is(self, word: str) -> bool:
        return self.piece.kind == "word" and self.piece.value == word

    def _take(self) -> Token:
        token = self.piece
        self.place += token.kind != "end"
        return token

    def _close(self, bracket: str, begin: Token) -> None:
        if self.piece.kind == "end":
            raise self.error(f"this bracket is not closed by {bracket!r}", begin)
        if self.piece.kind != bracket:
            raise self.error(f"here should be {bracket!r} or ','; {self._unexpected()}")
        self._take()

    def _unexpected(self) -> str:
        if self.piece.kind == "end":
            return "the formula ends too early"
        return f"{self.piece.value!r} cannot stand here"

    @contextmanager
    def _at(self, place: Token) -> Iterator[None]:
        """Raise errors from inside the block with this place."""
        try:
            yield
        except FormulaError:
            raise
        except LoraweaveError as error:
            raise self.error(str(error), place) from error


def _why_no_router(name: str) -> str:
    """Return why an entry of the registry is no router, or "" if it is one."""
    try:
        router_class(name)
    except UnknownName as error:
        return str(error)
    return ""
