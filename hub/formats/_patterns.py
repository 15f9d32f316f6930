"""PEFT's rank_pattern and alpha_pattern without letting an unknown regular expression run unbounded.

PEFT takes the first key, in the order of the file, for which re.match(r"(.*\\.)?(key)$", layer) holds. Here a key without
quantifiers or groups, which cannot backtrack beyond the length of a name, is run in this process. Every other key is run
by a second Python process under a time limit, because the standard library's matcher cannot be interrupted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import TypeVar

Number = TypeVar("Number", int, float)

MAX_PATTERN_LENGTH = 1_000
# compiling takes a tenth of a millisecond each; names of layers are compared as text first and hardly count
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
    """The value of each layer by PEFT's rule, that of the first matching pattern, else `default`; and the disputed layers.

    A layer is disputed when patterns with different values match it: PEFT sorts the keys when it saves, so the order that
    decided in training may be another one. The second result has all values of such a layer, the deciding one first.

    Raises PatternError for an invalid pattern and for one that exceeds the limits of length, number or time.
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
    matched = {name: [values[index] for index in sorted(found)] for name, found in zip(names, hits, strict=True)}
    disputed = {name: found for name, found in matched.items() if len(set(found)) > 1}
    return {name: found[0] if found else default for name, found in matched.items()}, disputed


def _run_here(keys: list[tuple[int, str]], names: list[str]) -> list[list[int]]:
    """For each name the indices of the keys that match."""
    tails = [(index, _literal_tail(key), key) for index, key in keys]
    # a plain layer name is a regular expression for certain, so it is compiled only for a name that ends like it
    rules = {key: _compile(key) for _, tail, key in tails if not tail}
    hits = []
    for name in names:
        found = []
        for index, tail, key in tails:
            if not name.endswith(tail):
                continue
            if key not in rules:
                rules[key] = _compile(key)
            if rules[key].match(name):
                found.append(index)
        hits.append(found)
    return hits


def _compile(key: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            # a doubtful character class is the pattern author's affair
            warnings.simplefilter("ignore", FutureWarning)
            return re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"the pattern {key[:60]!r} is not a regular expression ({error})") from error


def _literal_tail(key: str) -> str:
    """The letters that every match must end in, so that most keys are ruled out without running them."""
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
    return [list(map(int, found)) for found in json.loads(done.stdout)]
