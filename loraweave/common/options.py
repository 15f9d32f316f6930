"""Options of the entries of registries (methods, searches, routers, recipes): their declaration, and the check of values.

The parameters and annotations of an entry's function or class declare its options. Errors, near misses and the tables of the
command line follow from them alone, for other packages' entries, too.
"""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from loraweave.common.checks import is_number
from loraweave.errors import LoraweaveError, UnknownName, WeightingError
from loraweave.registry import nearest

WORDS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    type(None): "None",
    Mapping: "a mapping of names to values",
}


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of an option's numbers, as in `Annotated[float, Range(above=0, most=1)]`. A missing bound is infinite."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Return True if a number is within all bounds."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = {"of at least": self.least, "above": self.above, "of at most": self.most, "below": self.below}
        words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        return words.replace(" and of ", " and ")


Count = Annotated[int, Range(least=1)]
Whole = Annotated[int, Range(least=0)]
Seed = Whole
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, most=1)]
# a probability below 1
Rate = Annotated[float, Range(least=0, below=1)]
# a part of a whole, above 0
Share = Annotated[float, Range(above=0, most=1)]


def options_of(thing: Callable[..., Any], *, after: int = 0, beside: Collection[str] = ()) -> dict[str, Any]:
    """Return {parameter: annotation} of a function or class, without the first `after` parameters and those in `beside`.

    Where an annotation is missing it is Any; all are Any if one of them names an import for type checkers alone.
    """
    parameters = list(inspect.signature(thing).parameters.values())[after:]
    named = [
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    try:
        # the fields of a dataclass may come from several modules, in which their annotations are read
        made = inspect.isclass(thing) and not dataclasses.is_dataclass(thing)
        kinds = typing.get_type_hints(thing.__init__ if made else thing, include_extras=True)  # type: ignore[misc]
    except NameError:
        kinds = {}
    return {name: kinds.get(name, Any) for name in named if name not in beside}


def require_known(
    whose: str,
    given: Iterable[str],
    known: Collection[str],
    *,
    noun: str = "option",
    error: type[LoraweaveError] = WeightingError,
) -> None:
    """Raise `error` if a name in `given` is not in `known`, with the nearest name and all of them.

    `whose` and `noun` name the owner and what is named: "method 'ties' has no option 'x'".
    """
    for name in given:
        if name not in known:
            has = ", ".join(known) or f"no {noun}s"
            raise error(f"{whose} has no {noun} {name!r}{nearest(str(name), known)}; it has {has}")


def check_options(
    whose: str,
    given: Mapping[str, Any],
    kinds: Mapping[str, Any],
    *,
    noun: str = "option",
    error: type[LoraweaveError] = WeightingError,
) -> None:
    """Raise `error` unless each option in `given` {name: value} is in `kinds` {name: annotation} and fits its annotation.

    `whose` and `noun` begin the message, as in `require_known`. If `error` is WeightingError, a text outside a Literal
    raises its subclass UnknownWord.
    """
    require_known(whose, given, kinds, noun=noun, error=error)
    for name, value in given.items():
        if not fits(value, kinds[name]):
            unknown = isinstance(value, str) and error is WeightingError and get_origin(kinds[name]) is Literal
            error_class = UnknownWord if unknown else error
            raise error_class(f"{whose} got {name}={value!r:.80}; it takes {described(kinds[name], value)}")


class UnknownWord(UnknownName, WeightingError):
    """A text that is not among the texts that an option accepts."""


class Declared:
    """A base class that checks keyword options against their annotations before `__init__` runs."""

    # the noun for instances in error messages, and the error for a value that does not fit its annotation
    noun: ClassVar[str]
    error: ClassVar[type[LoraweaveError]] = WeightingError

    def __new__(cls, *given: Any, **options: Any) -> Self:
        cls.check(options)
        return super().__new__(cls)

    @classmethod
    def check(cls, options: Mapping[str, Any]) -> None:
        """Raise `error` for a value that does not fit its annotation; Python itself refuses an unknown name."""
        kinds = options_of(cls)
        known = {name: value for name, value in options.items() if name in kinds}
        check_options(f"{cls.noun} {cls.registered_name()!r}", known, kinds, error=cls.error)

    @classmethod
    def registered_name(cls) -> str:
        """Return the class's name in its registry, which is the name of its file."""
        return cls.__module__.rpartition(".")[2]


def fits(value: object, kind: Any) -> bool:
    """Return True if a value fits an annotation, its `Range` included.

    Numbers must be finite; True and False are not numbers. Any value fits an annotation that this function does not know.
    """
    origin = get_origin(kind)
    if origin is Annotated:
        plain, *rules = get_args(kind)
        return fits(value, plain) and all(rule.holds(value) for rule in rules)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, alternative) for alternative in get_args(kind))
    if origin is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in get_args(kind))
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(element, get_args(kind)[0]) for element in value)
    if kind is int or kind is float:
        return is_number(value) and (kind is float or isinstance(value, int))
    plain = origin or kind
    return isinstance(value, plain) if plain in WORDS else True


def described(kind: Any, value: object = None) -> str:
    """Describe the values that fit an annotation, in words; for a Literal, add the allowed text nearest to `value`."""
    origin = get_origin(kind)
    if origin is Annotated:
        plain, *rules = get_args(kind)
        return " ".join([described(plain), *map(str, rules)])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(alternative, value) for alternative in get_args(kind))
    if origin is Literal:
        hint = nearest(value, get_args(kind)) if isinstance(value, str) else ""
        return "one of " + ", ".join(repr(allowed) for allowed in get_args(kind)) + hint
    if origin is tuple:
        return f"a list, each of which is {described(get_args(kind)[0])}"
    return WORDS.get(origin or kind, str(kind))
