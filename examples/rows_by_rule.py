"""Further training rows for the task of the pool that a rule states, of inputs that no test row has.

Of the 400 rows of `number_words`, 24 have one or two digits: too few to learn that 39 is no "three hundred and ninety".
"""

from __future__ import annotations

from collections.abc import Iterable

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
Row = tuple[str, str]


def in_words(number: int) -> str:
    """The English words for a number from 0 to 999, as the task `number_words` writes them."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f"-{ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{ONES[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")


def with_all_numbers(rows: Iterable[Row], test: Iterable[str]) -> list[Row]:
    """The rows and, after them, those of all numbers below 1,000 that are neither among them nor in `test`."""
    rows = list(rows)
    known = {text for text, _ in rows} | set(test)
    return [*rows, *((str(number), in_words(number)) for number in range(1000) if str(number) not in known)]
