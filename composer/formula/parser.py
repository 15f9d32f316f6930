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

A name is a word or in quotes. Stored formulas inside a formula are written out by `Expansion`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import loraweave.registry as registry
from loraweave.common.checks import is_whole
from loraweave.common.names import checked_name
from loraweave.common.options import check_options, options_of
from loraweave.composer.formula.nodes import (
    ENSEMBLE,
    Argument,
    Auto,
    Ensemble,
    Leaf,
    Listed,
    Mapped,
    Named,
    Root,
    Routed,
    Stored,
    Sum,
    Token,
    Value,
    as_argument,
    as_sum,
    ensemble_of,
    leaves,
    merge_of,
    misplaced,
    plain,
    replaced,
    rounded,
    sum_of,
    tokens,
)
from loraweave.composer.merge.method_call import MethodCall
from loraweave.errors import FormulaError, LoraweaveError, UnknownName
from loraweave.routers.tokens._saved import router_class, router_names

# adapters and stored compositions that a formula mentions, at most
MAX_ADAPTERS = 64
# the options of lw.merge, beside those that the method itself declares
MERGE_OPTIONS = ("rank", "seed")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "none": None, "None": None}
_DIGITS_OF_VERSION = 9


@dataclass(frozen=True)
class Placed:
    """An argument with its first token, and the factor before it; `written` says whether the text has a factor."""

    place: Token
    factor: Fraction
    argument: Argument
    written: bool


class Parser:
    """A recursive-descent parser of one text; each method starts at the current token and stops after the last it read."""

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
        """Read the whole text. Raises FormulaError, showing the token, for anything that is not a formula."""
        root: Root
        begin, called = self.piece, self.piece.value if self._is_call() else ""
        if begin.kind == "end":
            raise self._error("this formula is empty; 'base' is the base model")
        if begin.kind == "word" and begin.value == "auto" and self.following.kind == "end":
            self._take()
            root = Auto()
        elif called and called in registry.names("routers") and not _why_no_router(called):
            root = self._routed()
        elif called == ENSEMBLE:
            root = self._ensemble()
        else:
            root = self._sum([self._argument()])
        if self.piece.kind != "end":
            raise self._error(f"here should be '+', '-' or the end; {self._unexpected()}")
        return root

    def _argument(self) -> Placed:
        """Read a sum or a single term."""
        parts = [self._signed_term()]
        while self.piece.kind in ("+", "-"):
            parts.append(self._signed_term())
        if len(parts) == 1:
            return parts[0]
        return Placed(parts[0].place, Fraction(1), as_argument(self._sum(parts)), False)

    def _sum(self, parts: Sequence[Placed], place: Token | None = None) -> Sum:
        with self._at(place or parts[0].place):
            return sum_of((part.factor, part.argument) for part in parts)

    def _signed_term(self) -> Placed:
        begin, factor, written = self.piece, Fraction(1), False
        while self.piece.kind in ("+", "-"):
            factor *= -1 if self._take().kind == "-" else 1
        written = factor < 0
        while self.piece.kind == "number":
            number = self._take()
            factor, written = factor * self._number(number), True
            if not self._takes("*"):
                problem = f"{number.value} is a weight, and '*' and an adapter follow one; a name that begins with a digit"
                raise self._error(f"{problem} is quoted", number)
        argument = self._atom()
        if self.piece.kind == "*":
            before = self.pieces[self.place - 1]
            if before.kind == "word" and "-" in before.value:
                raise self._error(f"{before.value!r} is one name; a difference has spaces around its '-'", before)
            raise self._error("a weight is a finite number and comes first, as in 0.5*a")
        return Placed(begin, factor, argument, written)

    def _atom(self) -> Argument:
        begin = self.piece
        if self._takes("("):
            inner = self._argument()
            self._close(")", begin)
            return as_argument(self._sum([inner], begin))
        if self._takes("@"):
            return Stored(self._name("the name of a stored composition"))
        if self._is_call():
            return self._merge()
        if begin.kind == "word" and begin.value == "base":
            self._take()
            return Sum(())
        if begin.kind == "word" and begin.value == "auto":
            raise self._error("'auto' retrieves for each request and stands alone; quote an adapter of that name: 'auto'")
        name = self._name("an adapter")
        if not self._takes("@"):
            return Named(name)
        number = self.piece
        if number.kind != "number" or not number.value.isdecimal() or not 0 < int(number.value) < 10**_DIGITS_OF_VERSION:
            raise self._error(f"a version of {name!r} is a whole number from 1, as in a@3")
        self._take()
        return Named(name, int(number.value))

    def _name(self, what: str) -> str:
        token = self.piece
        if token.kind not in ("word", "quoted"):
            raise self._error(f"here should be {what}; {self._unexpected()}")
        self.num_adapters += 1
        if self.num_adapters > MAX_ADAPTERS:
            raise self._error(f"a formula has at most {MAX_ADAPTERS} adapters; merge a part of it, and add that to the hub")
        with self._at(self._take()):
            return checked_name(token.value)

    def _merge(self) -> Argument:
        name = self._take()
        if name.value not in registry.names("methods"):
            raise self._unknown_call(name)
        placed, options = self._call()
        self._check_merge(name, options)
        weights = self._weights(placed)
        if name.value == "linear" and not options:
            share = Fraction(1, len(placed))
            parts = [part if weights else Placed(part.place, share, part.argument, True) for part in placed]
            return as_argument(self._sum(parts, name))
        if weights is not None and not any(weights):
            raise self._error("all weights are 0, which leaves nothing to merge; 'base' is the base model", name)
        if empty := next((part.place for part in placed if part.argument == Sum(())), None):
            raise self._error(f"{name.value!r} merges adapters, and this is the base model; leave it out", empty)
        values = [(option, value) for option, (_, value) in options.items()]
        return merge_of(name.value, [part.argument for part in placed], weights, values)

    def _call(self, *, takes_options: bool = True) -> tuple[list[Placed], dict[str, tuple[Token, Value]]]:
        """Read the bracketed arguments after a name; return (arguments, {option: (its token, its value)})."""
        open_bracket = self._take()
        placed = [self._argument()]
        while self._takes(","):
            placed.append(self._argument())
        options: dict[str, tuple[Token, Value]] = {}
        if takes_options and self._takes(";"):
            options = self._pairs(")")
        self._close(")", open_bracket)
        return placed, options

    def _weights(self, placed: Sequence[Placed]) -> list[float] | None:
        """Return the weights of a merge's arguments, or None if none is written. Raises FormulaError if only some are."""
        if not any(part.written for part in placed):
            return None
        for part in placed:
            if not part.written:
                raise self._error(f"give every argument a weight, or none: 1*{part.argument} is one", part.place)
        weights = []
        for part in placed:
            with self._at(part.place):
                weights.append(rounded(part.factor))
        return weights

    def _check_merge(self, name: Token, options: Mapping[str, tuple[Token, Value]]) -> None:
        call = MethodCall(name.value)
        if "statistics" in call.parameters:
            raise self._error(
                f"{name.value!r} weighs by data, which a formula does not have; merge by lw.merge(..., statistics=...) and "
                "add the result to the hub",
                name,
            )
        for option, (place, value) in options.items():
            if option in MERGE_OPTIONS:
                least = 1 if option == "rank" else 0
                if not is_whole(value, least):
                    raise self._error(f"{option}={plain(value)!r:.80} is not a whole number of {least} or more", place)
                continue
            known = (*call.own_options, *MERGE_OPTIONS)
            if option not in known:
                hint = registry.nearest(option, known)
                raise self._error(f"method {name.value!r} has no option {option!r}{hint}; it has {', '.join(known)}", place)
            with self._at(place):
                MethodCall(name.value, {option: plain(value)})

    def _routed(self) -> Routed:
        name = self._take()
        made_of = router_class(name.value)
        if made_of.learned:
            raise self._error(
                f"router {name.value!r} is trained first; a trained one is kept by hub.save_composition and named by @", name
            )
        placed, options = self._call()
        experts: list[Named | Stored] = []
        for part in placed:
            expert = part.argument
            if part.written or not isinstance(expert, Named | Stored):
                raise self._error(
                    f"{name.value!r} weighs its experts itself: an expert is an adapter without a weight", part.place
                )
            if expert in experts:
                raise self._error(f"expert {expert} is given twice", part.place)
            experts.append(expert)
        kinds = options_of(made_of, after=1)
        for option, (place, value) in options.items():
            with self._at(place):
                check_options(f"router {name.value!r}", {option: plain(value)}, kinds)
        if self.piece.kind != "end":
            raise self._error("a router weighs every token by itself and stands alone: nothing follows it")
        values = sorted((option, value) for option, (_, value) in options.items())
        return Routed(name.value, tuple(sorted(experts, key=str)), tuple(values))

    def _ensemble(self) -> Ensemble:
        name = self._take()
        placed, _ = self._call(takes_options=False)
        if self.piece.kind != "end":
            raise self._error("an ensemble averages what its members answer and stands alone: nothing follows it")
        shares = self._weights(placed)
        if shares is not None and not all(share > 0 for share in shares):
            raise self._error("the shares of an ensemble's members are above 0", name)
        members = [part.argument for part in placed]
        if not any(map(leaves, members)):
            raise self._error("the members of this ensemble are the base model, and so is their average", name)
        return ensemble_of(members, shares)

    def _unknown_call(self, name: Token) -> FormulaError:
        if name.value == ENSEMBLE:
            return self._error("an ensemble stands alone: no number, sum or bracket around it", name)
        if name.value in registry.names("routers"):
            alone = f"router {name.value!r} weighs every token by itself and stands alone"
            return self._error(_why_no_router(name.value) or f"{alone}: no number, sum or bracket around it", name)
        hint = registry.nearest(name.value, [*registry.names("methods"), *router_names()], "routers")
        return self._error(f"there is no method or router {name.value!r}{hint}; lw.names('methods') lists them", name)

    def _pairs(self, end: str) -> dict[str, tuple[Token, Value]]:
        pairs: dict[str, tuple[Token, Value]] = {}
        while self.piece.kind != end:
            place = self.piece
            if place.kind not in ("word", "quoted") or self.following.kind != "=":
                raise self._error("here should be an option, as in density=0.3")
            if place.value in pairs:
                raise self._error(f"{place.value!r} is given twice")
            self._take()
            self._take()
            pairs[place.value] = place, self._value()
            if not self._takes(","):
                break
        return pairs

    def _value(self) -> Value:
        token = self.piece
        if self._takes("{"):
            pairs = self._pairs("}")
            self._close("}", token)
            return Mapped(tuple(sorted((name, value) for name, (_, value) in pairs.items())))
        if self._takes("["):
            values: list[Value] = []
            while self.piece.kind != "]":
                values.append(self._value())
                if not self._takes(","):
                    break
            self._close("]", token)
            return Listed(tuple(values))
        sign = 1
        while self.piece.kind in ("+", "-"):
            sign *= -1 if self._take().kind == "-" else 1
        if self.piece.kind == "number":
            number = sign * float(self._number(self._take()))
            return int(number) if number.is_integer() and abs(number) < 2**53 else number
        if self.piece is token and token.kind in ("word", "quoted"):
            self._take()
            return _WORDS[token.value] if token.kind == "word" and token.value in _WORDS else token.value
        raise self._error("here should be a value: a number, a word, a text in quotes, true, false, none, [..] or {name=..}")

    def _number(self, token: Token) -> Fraction:
        value = float(token.value)
        mantissa = token.value.lower().partition("e")[0]
        # only a number that a float holds is small enough for its fraction to be made
        if value in (float("inf"), 0.0) and (value or mantissa.strip("0.")):
            raise self._error("this number is beyond what a float holds; weights are finite numbers", token)
        return Fraction(token.value) if value else Fraction(0)

    def _is_call(self) -> bool:
        return self.piece.kind == "word" and self.following.kind == "("

    def _take(self) -> Token:
        token = self.piece
        self.place += token.kind != "end"
        return token

    def _takes(self, kind: str) -> bool:
        """Move past the current token if it is of this kind; return True if it was."""
        return self.piece.kind == kind and self._take() is not None

    def _close(self, bracket: str, begin: Token) -> None:
        if self.piece.kind == "end":
            raise self._error(f"this bracket is not closed by {bracket!r}", begin)
        if not self._takes(bracket):
            raise self._error(f"here should be {bracket!r} or ','; {self._unexpected()}")

    def _unexpected(self) -> str:
        return "the formula ends too early" if self.piece.kind == "end" else f"{self.piece.value!r} cannot stand here"

    def _error(self, problem: str, place: Token | None = None) -> FormulaError:
        """Return the error about a problem at a token, by default the current one."""
        return misplaced(problem, self.text, place or self.piece)

    @contextmanager
    def _at(self, place: Token) -> Iterator[None]:
        """Raise errors from inside the block as FormulaErrors that show the token `place`."""
        try:
            yield
        except FormulaError:
            raise
        except LoraweaveError as error:
            raise self._error(str(error), place) from error


def _why_no_router(name: str) -> str:
    """Return why the registry's entry `name` is not a router, or "" if it is one."""
    try:
        router_class(name)
    except UnknownName as error:
        return str(error)
    return ""


class Expansion:
    """A replacement of stored formulas by their content: `read(stored)` returns a formula's root, or None to keep `stored`.

    Each formula is read once. Raises FormulaError for formulas that contain each other, for a router or `auto` inside
    another formula, and above the limit of adapters.
    """

    def __init__(self, read: Callable[[Stored], Root | None]) -> None:
        self._read = read
        self._known: dict[str, Root | None] = {}
        self._inside: list[str] = []

    def of(self, root: Root) -> Root:
        """Return the root with stored formulas written out, and without stored compositions that are the base alone."""
        match root:
            case Auto():
                return root
            case Routed(router, written, options):
                experts: list[Leaf] = []
                for leaf in written:
                    expert = self._leaf(leaf)
                    if not isinstance(expert, Leaf):
                        raise FormulaError(
                            f"{leaf} is {expert}, and an expert of {router!r} is one adapter; add its merge to the hub"
                        )
                    experts.append(expert)
                if len(set(experts)) < len(experts):
                    raise FormulaError(f"{root} has an expert twice when its stored formulas are written out")
                return Routed(router, tuple(sorted(experts, key=str)), options)
            case Sum(terms=((1.0, Stored() as only),)):
                return self._stored(only) or root
            case Ensemble(members, shares):
                whole: Root = ensemble_of([replaced(member, self._leaf) for member in members], shares)
            case Sum():
                whole = as_sum(replaced(root, self._leaf))
        if (count := len(leaves(whole))) > MAX_ADAPTERS:
            raise FormulaError(f"{root} has {count} adapters when its stored formulas are written out, above {MAX_ADAPTERS}")
        return whole

    def _leaf(self, leaf: Leaf) -> Argument:
        root = self._stored(leaf) if isinstance(leaf, Stored) else None
        if root is None:
            return leaf
        if not isinstance(root, Sum):
            raise FormulaError(f"{leaf} is {root}, which stands alone: it cannot be part of a formula")
        return as_argument(root)

    def _stored(self, leaf: Stored) -> Root | None:
        """Return the root of a stored formula, written out; None for a composition that is not a formula."""
        if leaf.name in self._inside:
            circle = " -> ".join(f"@{name}" for name in [*self._inside, leaf.name])
            raise FormulaError(f"stored formulas name each other in a circle: {circle}; save one of them again")
        if leaf.name not in self._known:
            root = self._read(leaf)
            self._inside.append(leaf.name)
            self._known[leaf.name] = None if root is None else self.of(root)
            self._inside.pop()
        return self._known[leaf.name]
