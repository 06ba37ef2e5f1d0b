"""The instruction set that ships: written for this project, with references that follow from rules or small tables.

`python -m assets.instructions.builtin_set` writes instructions.json beside it. Every choice is keyed by its kind of
task and its number, so that adding a kind or an item changes no other. A table taken in turn has a row for each.
"""

import json
from collections.abc import Callable, Iterator

from assets.instructions import builtin_words as words
from harness.run.files import ROOT
from harness.tokens.randomness import Permutation, stream_seed
from instruction.items import BUILTIN_SET

Made = tuple[str, str, str]
"""Instruction, input, reference."""
PER_KIND = 20


class Choices:
    """Draws for one item, each keyed by what it is for."""

    def __init__(self, kind: str, number: int) -> None:
        self._key = (kind, number)
        self._drawn = 0

    def number(self, low: int, high: int) -> int:
        """Return a whole number from `low` to `high`."""
        self._drawn += 1
        return low + stream_seed("instructions", *self._key, self._drawn) % (high - low + 1)

    def one(self, things: tuple[str, ...]) -> str:
        """Return one of several things."""
        return things[self.number(0, len(things) - 1)]

    def several(self, things: tuple[str, ...], count: int) -> list[str]:
        """Return `count` different things, in a mixed order."""
        self._drawn += 1
        order = Permutation(len(things), stream_seed("instructions", *self._key, self._drawn))
        return [things[order[place]] for place in range(count)]


Kind = Callable[[Choices, int], Made]
KINDS: dict[str, Kind] = {}


def kind(make: Kind) -> Kind:
    """Add a kind of task under its function's name."""
    KINDS[make.__name__] = make
    return make


def listed(things: list[str]) -> str:
    """Join names as a sentence does."""
    return f"{', '.join(things[:-1])} and {things[-1]}"


@kind
def addition(draw: Choices, number: int) -> Made:
    a, b = draw.number(2, 60), draw.number(2, 39)
    asked = draw.one(("Add these two numbers.", "What is the sum of these numbers?", "Work out the total."))
    return asked, f"{words.spelled(a)} and {words.spelled(b)}", f"{words.spelled(a + b)}".capitalize() + "."


@kind
def subtraction(draw: Choices, number: int) -> Made:
    thing, name = draw.one(words.OBJECTS), draw.one(words.NAMES)
    has = draw.number(12, 60)
    gives = draw.number(2, has - 2)
    story = f"{name} has {has} {thing} and gives {gives} of them away. How many {thing} are left?"
    return story, "", f"{name} has {has - gives} {words.counted(thing, has - gives)} left."


@kind
def multiplication(draw: Choices, number: int) -> Made:
    a, b, thing = draw.number(2, 9), draw.number(2, 12), draw.one(words.OBJECTS)
    box = draw.one(("box", "bag", "basket"))
    boxes = f"{box}es" if box == "box" else f"{box}s"
    story = f"There are {a} {boxes} with {b} {thing} in each {box}. How many {thing} are there altogether?"
    return story, "", f"There are {a * b} {thing} altogether."


@kind
def reversed_word(draw: Choices, number: int) -> Made:
    word = draw.one(words.NOUNS)
    asked = draw.one(
        ("Write this word backwards.", "Reverse the letters of the word.", "Spell the word from its end.")
    )
    return asked, word, word[::-1]


@kind
def alphabetical_order(draw: Choices, number: int) -> Made:
    chosen = draw.several(words.NOUNS, draw.number(3, 5))
    asked = draw.one(("Put these words in alphabetical order.", "Sort the words from A to Z."))
    return asked, ", ".join(chosen), ", ".join(sorted(chosen))


@kind
def number_order(draw: Choices, number: int) -> Made:
    numbers = [draw.number(1, 99) + 100 * place for place in range(draw.number(3, 5))]
    mixed = draw.several(tuple(map(str, numbers)), len(numbers))
    falls = draw.number(0, 1)
    asked = ("Sort these numbers from the smallest to the largest.", "List the numbers, the largest first.")[falls]
    return asked, ", ".join(mixed), ", ".join(sorted(mixed, key=int, reverse=bool(falls)))


@kind
def letter_count(draw: Choices, number: int) -> Made:
    word = draw.one(words.NOUNS)
    letter = draw.one(tuple(sorted(set(word))))
    found = word.count(letter)
    times = ("once", "twice")[found - 1] if found < 3 else f"{found} times"
    return (
        f"How often does the letter '{letter}' appear in the word?",
        word,
        f"The letter '{letter}' appears {times}.",
    )


@kind
def word_length(draw: Choices, number: int) -> Made:
    word = draw.one(words.NOUNS)
    return f"How many letters does the word '{word}' have?", "", f"The word '{word}' has {len(word)} letters."


@kind
def odd_or_even(draw: Choices, number: int) -> Made:
    value = draw.number(3, 999)
    asked = draw.one(("Say whether this number is odd or even.", "Is the number odd or even?"))
    return asked, str(value), f"{value} is {'odd' if value % 2 else 'even'}."


@kind
def larger_number(draw: Choices, number: int) -> Made:
    a, gap = draw.number(10, 500), draw.number(1, 90)
    pair = draw.several((str(a), str(a + gap)), 2)
    return f"Which number is larger, {pair[0]} or {pair[1]}?", "", f"{a + gap} is larger."


@kind
def unit_conversion(draw: Choices, number: int) -> Made:
    large, small, factor = draw.several(words.UNITS, 1)[0].split("/")
    count = draw.number(2, 12)
    asked = draw.one((f"Convert {count} {large} to {small}.", f"How many {small} are there in {count} {large}?"))
    return asked, "", f"{count} {large} are {count * int(factor):,} {small}."


@kind
def clock_time(draw: Choices, number: int) -> Made:
    hour, minute, later = draw.number(1, 22), 5 * draw.number(0, 11), 5 * draw.number(2, 11)
    total = hour * 60 + minute + later
    asked = f"A train leaves at {hour:02d}:{minute:02d} and arrives {later} minutes later. When does it arrive?"
    return asked, "", f"It arrives at {total // 60:02d}:{total % 60:02d}."


@kind
def weekday(draw: Choices, number: int) -> Made:
    start, days = draw.number(0, 6), draw.number(2, 12)
    asked = f"If today is {words.WEEKDAYS[start]}, what day is it in {days} days?"
    return asked, "", f"It is {words.WEEKDAYS[(start + days) % 7]}."


@kind
def capital_city(draw: Choices, number: int) -> Made:
    country, city = words.CAPITALS[number]
    if number % 3 == 2:
        return f"Which country has {city} as its capital?", "", f"{city} is the capital of {country}."
    asked = (f"What is the capital of {country}?", f"Name the capital city of {country}.")[number % 3]
    return asked, "", f"The capital of {country} is {city}."


@kind
def opposite(draw: Choices, number: int) -> Made:
    word, other = words.OPPOSITES[number]
    asked = (f"What is the opposite of '{word}'?", f"Give an antonym of the word '{word}'.")[number % 2]
    return asked, "", f"The opposite of '{word}' is '{other}'."


@kind
def plural(draw: Choices, number: int) -> Made:
    one, many = words.PLURALS[number]
    return "Give the plural of the noun.", one, many


@kind
def past_tense(draw: Choices, number: int) -> Made:
    verb, past, rest = words.PASTS[number]
    name = draw.one(words.NAMES)
    return "Rewrite the sentence in the past tense.", f"{name} {verb} {rest}.", f"{name} {past} {rest}."


@kind
def passive_voice(draw: Choices, number: int) -> Made:
    verb, participle, thing = words.PASSIVES[number]
    name = draw.one(words.NAMES)
    asked = ("Rewrite the sentence in the passive voice.", "Turn this active sentence into a passive one.")[
        number % 2
    ]
    return asked, f"{name} {verb} {thing}.", f"{thing.capitalize()} was {participle} by {name}."


@kind
def definition(draw: Choices, number: int) -> Made:
    term, meaning = words.DEFINITIONS[number]
    asked = (f"What is {term}?", f"Explain in one sentence what {term} is.", f"Define the term: {term}.")[number % 3]
    return asked, "", f"{term[0].upper()}{term[1:]} is {meaning}."


@kind
def definition_to_word(draw: Choices, number: int) -> Made:
    term, meaning = words.RIDDLES[number]
    return "Which word fits this description?", f"{meaning[0].upper()}{meaning[1:]}.", term


@kind
def category(draw: Choices, number: int) -> Made:
    names = tuple(words.CATEGORIES)
    right = draw.one(names)
    thing = words.CATEGORIES[right][draw.number(0, len(words.CATEGORIES[right]) - 1)]
    choices = draw.several(tuple(name for name in names if name != right), 2)
    shown = draw.several((right, *choices), 3)
    return f"Classify the word as one of: {', '.join(shown)}.", thing, right.capitalize()


@kind
def odd_one_out(draw: Choices, number: int) -> Made:
    most, other = draw.several(tuple(words.CATEGORIES), 2)
    chosen = [*draw.several(words.CATEGORIES[most], 3), draw.one(words.CATEGORIES[other])]
    return "Which word does not belong with the others?", ", ".join(draw.several(tuple(chosen), 4)), chosen[-1]


@kind
def sentiment(draw: Choices, number: int) -> Made:
    good = bool(draw.number(0, 1))
    place, says = draw.one(words.PLACES), draw.one(words.PRAISE if good else words.COMPLAINTS)
    asked = draw.one(("Is this review positive or negative?", "Classify the sentiment as positive or negative."))
    return asked, f"We went to the {place} on {draw.one(words.WEEKDAYS)}. {says}", "Positive" if good else "Negative"


@kind
def extracted_fact(draw: Choices, number: int) -> Made:
    name, job, city, age = draw.one(words.NAMES), draw.one(words.JOBS), draw.one(words.CITIES), draw.number(21, 68)
    text = f"{name} is {age} years old and works as {words.with_article(job)} in {city}."
    asked, found = (
        (f"How old is {name}?", f"{name} is {age} years old."),
        (f"Where does {name} work?", f"{name} works in {city}."),
        (f"What is {name}'s job?", f"{name} works as {words.with_article(job)}."),
    )[draw.number(0, 2)]
    return asked, text, found


@kind
def extracted_list(draw: Choices, number: int) -> Made:
    name, day = draw.one(words.NAMES), draw.one(words.WEEKDAYS)
    bought = draw.several(words.CATEGORIES["fruit"] + words.CATEGORIES["vegetable"], draw.number(2, 4))
    text = f"On {day} {name} went to the market and bought {listed([words.with_article(x) for x in bought])}."
    return f"List what {name} bought, separated by commas.", text, ", ".join(bought)


@kind
def code_result(draw: Choices, number: int) -> Made:
    word, n = draw.one(words.NOUNS), draw.number(2, 9)
    shown, result = (
        (f'len("{word}")', len(word)),
        (f'"{word}".upper()', word.upper()),
        (f'"{word}"[0]', word[0]),
        (f"sum([{n}, {n + 2}, {n + 5}])", 3 * n + 7),
        (f"max({n + 4}, {n}, {n + 1})", n + 4),
        (f"list(range({n % 4 + 2}))", list(range(n % 4 + 2))),
    )[number % 6]
    return "What does this Python expression give?", shown, repr(result)


def items() -> Iterator[dict[str, str]]:
    """Yield all items in order, with their kind; a question that was made before is made no second time."""
    seen = set()
    for name, make in KINDS.items():
        for number in range(PER_KIND):
            instruction, given, output = make(Choices(name, number), number)
            if (instruction, given) not in seen:
                seen.add((instruction, given))
                yield {"kind": name, "instruction": instruction, "input": given, "output": output}


def text() -> str:
    """Return the file as it is written to disk: one item a line, so that a change can be read."""
    return "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False) for item in items()) + "\n]\n"


if __name__ == "__main__":
    (ROOT / BUILTIN_SET).write_text(text(), encoding="utf-8")
