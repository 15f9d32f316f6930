"""Tasks that rules make, for the in-context adapter: of words, lists, numbers, sentences and tables, some with labels.

None asks what a task of the pool or of the benchmarks asks. Two in five have no instruction, so that only the examples in
the prompt say what is wanted. The words and sentences are those of the pool's training rows.
"""

from __future__ import annotations

import calendar
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import NamedTuple

import loraweave as lw

ROWS, TRIES = 160, 5000
INSTRUCTED = 0.6
NAMES = ["Anna", "Bob", "Carl", "Dora", "Eric", "Fay", "Gus", "Hana", "Ivan", "June"]
NAMES += ["Karl", "Lena", "Max", "Nora", "Otto", "Pia", "Quinn", "Rosa", "Sam", "Tess"]
MONTHS = list(calendar.month_name)[1:]
PLACES = ("first", "second", "third", "fourth", "fifth", "sixth")
COUNTS = ("", "one", "two", "three", "four", "five", "six")
# of how many words which one is asked for
PICKS = ((3, 1), (4, 1), (4, 2), (5, 1), (5, 3), (6, 2), (6, 4))


class Rule(NamedTuple):
    """What is asked, and what makes an input and its answer."""

    instruction: str
    make: Callable[[], tuple[str, str]]
    labels: Sequence[str] | None = None


def tasks_by_rule(words: Sequence[str], sentences: Sequence[str], seed: int = 0) -> dict[str, lw.Task]:
    """ROWS examples of each rule, or as many different inputs as it has."""
    rng = Random(seed)
    found = {}
    for name, rule in rules(words, sentences, rng).items():
        rows: dict[str, str] = {}
        for _ in range(TRIES):
            if len(rows) == ROWS:
                break
            given, target = rule.make()
            rows.setdefault(given, target)
        instruction = rule.instruction if rng.random() < INSTRUCTED else ""
        found[name] = lw.Task(list(rows.items()), instruction=instruction, labels=rule.labels, demonstrations=True)
    return found


def rules(words: Sequence[str], sentences: Sequence[str], rng: Random) -> dict[str, Rule]:
    """All of them, which draw from `rng`."""
    return {
        **_of_lists(words, rng),
        **_of_numbers(rng),
        **_of_words(words, rng),
        **_of_sentences(sentences, rng),
        **_of_tables(words, rng),
        **_of_labels(words, rng),
    }


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def _of_lists(words: Sequence[str], rng: Random) -> dict[str, Rule]:
    def some(count: int) -> list[str]:
        return rng.sample(words, count)

    def until(right: Callable[[list[str]], bool], count: int = 4) -> list[str]:
        while not right(found := some(count)):
            pass
        return found

    def pick(count: int, place: int) -> Callable[[], tuple[str, str]]:
        def make() -> tuple[str, str]:
            items = some(count)
            return _listed(items), items[place]

        return make

    def longest() -> tuple[str, str]:
        items = until(lambda found: sorted(map(len, found))[-1] > sorted(map(len, found))[-2])
        return _listed(items), max(items, key=len)

    def shortest() -> tuple[str, str]:
        items = until(lambda found: sorted(map(len, found))[0] < sorted(map(len, found))[1])
        return _listed(items), min(items, key=len)

    def twice() -> tuple[str, str]:
        items = some(4)
        doubled = rng.choice(items)
        items.append(doubled)
        rng.shuffle(items)
        return _listed(items), doubled

    def once() -> tuple[str, str]:
        first, second, alone = some(3)
        items = [first, first, second, second, alone]
        rng.shuffle(items)
        return _listed(items), alone

    def after() -> tuple[str, str]:
        items, place = some(5), rng.randrange(4)
        return f"{_listed(items)} | {items[place]}", items[place + 1]

    def before() -> tuple[str, str]:
        items, place = some(5), rng.randrange(1, 5)
        return f"{_listed(items)} | {items[place]}", items[place - 1]

    def missing() -> tuple[str, str]:
        items, place = some(4), rng.randrange(4)
        rest = items[:place] + items[place + 1 :]
        rng.shuffle(rest)
        return f"{_listed(items)} | {_listed(rest)}", items[place]

    def changed(count: int, change: Callable[[list[str]], str]) -> Callable[[], tuple[str, str]]:
        def make() -> tuple[str, str]:
            items = some(count)
            return _listed(items), change(items)

        return make

    def counted() -> tuple[str, str]:
        count = rng.randint(2, 7)
        return _listed(some(count)), str(count)

    def with_letter(letters: str, has: Callable[[str, str], bool]) -> Callable[[], tuple[str, str]]:
        def make() -> tuple[str, str]:
            while True:
                items, letter = some(4), rng.choice(letters)
                right = [item for item in items if has(item, letter)]
                if len(right) == 1:
                    return f"{_listed(items)} | {letter}", right[0]

        return make

    def other(change: Callable[[str], str]) -> Callable[[], tuple[str, str]]:
        def make() -> tuple[str, str]:
            items, place = some(4), rng.randrange(4)
            items[place] = change(items[place])
            return _listed(items), items[place]

        return make

    picks = {
        f"{PLACES[place]}_of_{count}": Rule(
            f"Choose the {PLACES[place]} word of the list of {COUNTS[count]} words.", pick(count, place)
        )
        for count, place in PICKS
    }
    return {
        **picks,
        "longest_4": Rule("Choose the longest word.", longest),
        "shortest_4": Rule("Choose the shortest word.", shortest),
        "twice": Rule("Which word is there twice?", twice),
        "once": Rule("Which word is there only once?", once),
        "after": Rule("Which word follows the word after the bar?", after),
        "before": Rule("Which word comes before the word after the bar?", before),
        "missing": Rule("Which word of the first list is not in the second?", missing),
        "drop_first": Rule("Write the list without its first word.", changed(4, lambda items: _listed(items[1:]))),
        "drop_last": Rule("Write the list without its last word.", changed(4, lambda items: _listed(items[:-1]))),
        "reverse_3": Rule("Write the words in the opposite order.", changed(3, lambda items: _listed(items[::-1]))),
        "swap": Rule("Exchange the two words.", changed(2, lambda items: _listed(items[::-1]))),
        "ends_3": Rule("Write the first and the third word.", changed(3, lambda items: f"{items[0]} {items[2]}")),
        "hyphen": Rule("Join the words by hyphens.", changed(3, "-".join)),
        "count": Rule("How many words are there?", counted),
        "with_letter": Rule(
            "Which of the words has the letter after the bar?",
            with_letter("abcdefghiklmnoprstuvwy", lambda word, letter: letter in word),
        ),
        "ends_with": Rule("Which of the words ends with the letter after the bar?", with_letter("denrstyl", str.endswith)),
        "capital_one": Rule("Which word is in capital letters?", other(str.upper)),
        "number_among": Rule("Which of these is a number?", other(lambda _: str(rng.randint(1, 999)))),
        "name_among": Rule("Which of these is a name of a person?", other(lambda _: rng.choice(NAMES))),
    }


def _of_numbers(rng: Random) -> dict[str, Rule]:
    def of(low: int, high: int, answer: Callable[[int], object]) -> Callable[[], tuple[str, str]]:
        def make() -> tuple[str, str]:
            number = rng.randint(low, high)
            return str(number), str(answer(number))

        return make

    def several(count: int, between: str, answer: Callable[[list[int]], object]) -> Callable[[], tuple[str, str]]:
        def make() -> tuple[str, str]:
            numbers = rng.sample(range(100), count)
            return between.join(map(str, numbers)), str(answer(numbers))

        return make

    def num_digits() -> tuple[str, str]:
        number = str(rng.randint(1, 10 ** rng.randint(1, 6)))
        return number, str(len(number))

    def euros() -> tuple[str, str]:
        amount = rng.randint(1, 300)
        return f"{amount} euros", f"€{amount}.00"

    def percent() -> tuple[str, str]:
        number = rng.randint(10, 99)
        return f"0.{number:02d}", f"{number}%"

    def clock() -> tuple[str, str]:
        hour, minute = rng.randint(1, 11), rng.randint(0, 59)
        return f"{hour}:{minute:02d} pm", f"{hour + 12}:{minute:02d}"

    def date() -> tuple[str, str]:
        day, month = rng.randint(1, 28), rng.choice(MONTHS)
        return f"{day} {month}", f"{day}/{MONTHS.index(month) + 1}"

    def year() -> tuple[str, str]:
        day, found = rng.randint(1, 28), rng.randint(1900, 2030)
        return f"{day}/{rng.randint(1, 12)}/{found}", str(found)

    return {
        "double": Rule("Double the number.", of(1, 99, lambda number: 2 * number)),
        "ten_more": Rule("Add ten.", of(1, 200, lambda number: number + 10)),
        "one_more": Rule("Write the next number.", of(1, 500, lambda number: number + 1)),
        "hundred": Rule("Add a hundred.", of(1, 800, lambda number: number + 100)),
        "times_ten": Rule("Multiply by ten.", of(1, 99, lambda number: number * 10)),
        "tens": Rule("Write the digit of the tens.", of(10, 999, lambda number: str(number)[-2])),
        "last_digit": Rule("Write the last digit.", of(10, 999, lambda number: number % 10)),
        "digits_reversed": Rule("Reverse the digits.", of(10, 999, lambda number: str(number)[::-1])),
        "num_digits": Rule("How many digits are there?", num_digits),
        "larger": Rule("Write the larger number.", several(2, " ", max)),
        "smallest": Rule("Write the smallest number.", several(3, ", ", min)),
        "ascending": Rule("Sort the numbers.", several(3, ", ", lambda numbers: _listed(sorted(numbers)))),
        "euro": Rule("Write the amount.", euros),
        "percent": Rule("Write as a percentage.", percent),
        "clock": Rule("Write the time without am or pm.", clock),
        "date": Rule("Write the date with numbers.", date),
        "year": Rule("Which year is it?", year),
    }


def _of_one(texts: Sequence[str], rng: Random, asked: Mapping[str, tuple[str, Callable[[str], str]]]) -> dict[str, Rule]:
    def make(answer: Callable[[str], str]) -> Callable[[], tuple[str, str]]:
        def made() -> tuple[str, str]:
            text = rng.choice(texts)
            return text, answer(text)

        return made

    return {name: Rule(instruction, make(answer)) for name, (instruction, answer) in asked.items()}


def _of_words(words: Sequence[str], rng: Random) -> dict[str, Rule]:
    asked: dict[str, tuple[str, Callable[[str], str]]] = {
        "first_letter": ("Write the first letter.", lambda word: word[0]),
        "last_letter": ("Write the last letter.", lambda word: word[-1]),
        "third_letter": ("Write the third letter.", lambda word: word[2]),
        "first_two": ("Write the first two letters.", lambda word: word[:2]),
        "last_two": ("Write the last two letters.", lambda word: word[-2:]),
        "length": ("How many letters has the word?", lambda word: str(len(word))),
        "title": ("Begin the word with a capital letter.", str.capitalize),
        "again": ("Write the word twice.", lambda word: f"{word} {word}"),
        "brackets": ("Put the word in brackets.", lambda word: f"[{word}]"),
        "exclaim": ("Shout the word.", lambda word: f"{word.capitalize()}!"),
        "prefix": ("Write with the prefix.", lambda word: f"un{word}"),
        "ness": ("Add the suffix.", lambda word: f"{word}ness"),
        "first_capital_dot": ("Write the initial.", lambda word: f"{word[0].upper()}."),
        "no_first": ("Leave the first letter out.", lambda word: word[1:]),
        "no_last": ("Leave the last letter out.", lambda word: word[:-1]),
        "the": ("Add the article.", lambda word: f"the {word}"),
        "quoted": ("Quote the word.", lambda word: f'"{word}"'),
    }
    return _of_one(words, rng, asked)


def _of_sentences(sentences: Sequence[str], rng: Random) -> dict[str, Rule]:
    def words(sentence: str) -> list[str]:
        return sentence.rstrip(".").split()

    asked: dict[str, tuple[str, Callable[[str], str]]] = {
        "first_word": ("Write the first word of the sentence.", lambda text: words(text)[0]),
        "last_word": ("Write the last word of the sentence.", lambda text: words(text)[-1]),
        "second_word": ("Write the second word of the sentence.", lambda text: words(text)[1]),
        "num_words": ("How many words has the sentence?", lambda text: str(len(words(text)))),
        "no_stop": ("Write the sentence without its full stop.", lambda text: text.rstrip(".")),
        "asked": ("Make it a doubtful question.", lambda text: f"{text.rstrip('.')}?"),
        "lower": ("Write the sentence in small letters.", str.lower),
        "said": ("Report that it was said.", lambda text: f"She said: {text}"),
        "without_first": ("Leave the first word out.", lambda text: text.split(" ", 1)[1]),
        "last_two_words": ("Write the last two words.", lambda text: " ".join(words(text)[-2:])),
    }
    return _of_one(sentences, rng, asked)


def _of_tables(words: Sequence[str], rng: Random) -> dict[str, Rule]:
    def numbers() -> tuple[str, str]:
        table = {name: rng.randint(1, 99) for name in rng.sample(NAMES, 3)}
        asked = rng.choice(list(table))
        return f"{_listed([f'{name}={number}' for name, number in table.items()])} | {asked}", str(table[asked])

    def drawn() -> tuple[str, str, str]:
        names = rng.sample(NAMES, 3)
        table = dict(zip(names, rng.sample(words, 3), strict=True))
        asked = rng.choice(names)
        return "; ".join(f"{name}: {word}" for name, word in table.items()), asked, table[asked]

    def word() -> tuple[str, str]:
        table, name, found = drawn()
        return f"{table} | {name}", found

    def name() -> tuple[str, str]:
        table, found, word = drawn()
        return f"{table} | {word}", found

    def last_first() -> tuple[str, str]:
        first, last = rng.sample(NAMES, 2)
        return f"{first} {last}", f"{last}, {first}"

    def initials() -> tuple[str, str]:
        first, last = rng.sample(NAMES, 2)
        return f"{first} {last}", f"{first[0]}.{last[0]}."

    return {
        "lookup_num": Rule("Write the number of the name after the bar.", numbers),
        "lookup_word": Rule("Write the word that belongs to the name after the bar.", word),
        "lookup_name": Rule("Whose is the word after the bar?", name),
        "full_name": Rule("Write the last name first.", last_first),
        "initials": Rule("Write the initials.", initials),
    }


def _of_labels(words: Sequence[str], rng: Random) -> dict[str, Rule]:
    def rule(instruction: str, no: str, yes: str, right: Callable[[str], bool], make: Callable[[], str]) -> Rule:
        def balanced() -> tuple[str, str]:
            wanted = rng.random() < 0.5
            while right(given := make()) is not wanted:
                pass
            return given, yes if wanted else no

        return Rule(instruction, balanced, sorted((no, yes)))

    def word() -> str:
        return rng.choice(words)

    def number() -> str:
        return str(rng.randint(1, 99))

    def pair() -> str:
        first, second = rng.sample(words, 2)
        return rng.choice([f"{first}, {first}", f"{first}, {second}"])

    def mixed() -> str:
        return _listed(rng.sample([*rng.sample(NAMES, 2), *rng.sample(words, 2)], 3))

    told_apart = [word for word in words if len(word) in (3, 4, 7, 8, 9)]
    return {
        "has_e": rule("Is there an e in the word?", "no", "yes", lambda text: "e" in text, word),
        "vowel_first": rule(
            "Does the word begin with a vowel?", "consonant", "vowel", lambda text: text[0] in "aeiou", word
        ),
        "long": rule(
            "Is the word long or short?", "short", "long", lambda text: len(text) > 6, lambda: rng.choice(told_apart)
        ),
        "big": rule("Is the number large?", "small", "large", lambda text: int(text) >= 50, number),
        "odd": rule("Is the number odd or even?", "even", "odd", lambda text: int(text) % 2 == 1, number),
        "foo": rule("Is it foo or bar?", "foo", "bar", str.isdigit, lambda: rng.choice([word(), number()])),
        "order": rule(
            "Are the numbers in order?",
            "No",
            "Yes",
            lambda text: int(text.split()[0]) < int(text.split()[1]),
            lambda: " ".join(map(str, rng.sample(range(100), 2))),
        ),
        "same": rule("Are the two words the same?", "different", "same", lambda text: len(set(text.split(", "))) == 1, pair),
        "person": rule("Does it begin with a name?", "X", "Y", lambda text: text.split(", ")[0] in NAMES, mixed),
        "three": rule(
            "Are there three words?",
            "B",
            "A",
            lambda text: text.count(",") == 2,
            lambda: _listed(rng.sample(words, rng.choice([2, 3, 3, 4]))),
        ),
    }
