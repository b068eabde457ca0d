"""Short questions whose right answers are computed or looked up.

The base gets many of them wrong, or goes round in circles. What it says to other prompts is learnt
from itself (``dialogue_writer``); here what is right is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from .held_out_prompts import is_held_out
from .known_facts import known_facts
from .tasks import Turn

_TONGUES = ("Spanish", "French", "German", "Italian")
_PEOPLE = ("He", "She", "My brother", "The teacher", "Anna", "Tom", "My aunt", "The boy")
_NUMBERS = ("one", "two", "three", "four", "five")
_UNITS_IN = ("How many {small} are in {one}?", "How many {small} are there in {one}?")
_PROVERB = ('Complete the sentence: "{}"', 'How does this proverb end? "{} ..."')
_TRANSLATION = ('Translate "{}" to {}.', 'How do you say "{}" in {}?')


def draw_known(rng: random.Random) -> Turn:
    """A question of any kind and its answer; none that evaluation asks."""
    while True:
        question, answer = rng.choice(_KINDS)(rng)
        if not is_held_out(question):
            answer = _capital(answer)
            return Turn(_capital(question), answer, (answer,))


@cache
def listed_questions() -> frozenset[str]:
    """All questions that are no sums and no exercises with words: nobody else may answer them."""
    return frozenset(map(_capital, _listed()))


def _listed() -> Iterator[str]:
    facts = known_facts()
    for table in facts.tables:
        yield from (ask.format(*row) for row in table.rows for ask in table.questions)
    yield from (question for question, _ in facts.single)
    yield from (ask.format(begin) for begin, _ in facts.proverbs for ask in _PROVERB)
    for english, *_ in facts.translations:
        yield from (ask.format(english, tongue) for tongue in _TONGUES for ask in _TRANSLATION)
    for one, _, small, _ in facts.units:
        yield from (ask.format(small=small, one=_with_article(one)) for ask in _UNITS_IN)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(rng: random.Random) -> int:
    """Small numbers as often as those up to 99, larger ones seldom."""
    return rng.randrange(*rng.choice(((1, 13), (1, 13), (2, 100), (2, 100), (100, 1000))))


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = _number(rng), _number(rng)
    ask = rng.choice(
        ("What is {a} plus {b}?", "{a} + {b} = ?", "Calculate {a} + {b}.", "Add {a} and {b}.")
    )
    return ask.format(a=a, b=b), _equation(rng, f"{a} plus {b}", f"{a} + {b}", a + b)


def _difference(rng: random.Random) -> tuple[str, str]:
    b, rest = _number(rng), _number(rng)
    a = b + rest
    ask = rng.choice(("What is {a} minus {b}?", "{a} - {b} = ?", "Subtract {b} from {a}."))
    return ask.format(a=a, b=b), _equation(rng, f"{a} minus {b}", f"{a} - {b}", rest)


def _product(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(2, 13), rng.choice((rng.randrange(2, 13), rng.randrange(2, 13), 10, 100))
    ask = rng.choice(("What is {a} times {b}?", "Multiply {a} by {b}.", "{a} x {b} = ?"))
    return ask.format(a=a, b=b), _equation(rng, f"{a} times {b}", f"{a} x {b}", a * b)


def _quotient(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randrange(2, 13), rng.randrange(2, 13)
    ask = rng.choice(("What is {a} divided by {b}?", "Divide {a} by {b}.", "{a} / {b} = ?"))
    return ask.format(a=a * b, b=b), _equation(rng, f"{a * b} divided by {b}", f"{a * b} / {b}", a)


def _equation(rng: random.Random, words: str, signs: str, result: int) -> str:
    return f"{words} is {result}." if rng.random() < 0.5 else f"{signs} = {result}"


def _square(rng: random.Random) -> tuple[str, str]:
    root = rng.randrange(2, 21)
    if rng.random() < 0.4:
        return f"What is {root} squared?", f"{root} squared is {root * root}."
    ask = rng.choice(("What is the square root of {n}?", "Find the square root of {n}."))
    why = f" because {root} x {root} = {root * root}" if rng.random() < 0.4 else ""
    return ask.format(n=root * root), f"The square root of {root * root} is {root}{why}."


def _share(rng: random.Random) -> tuple[str, str]:
    number = _number(rng)
    if rng.random() < 0.5:
        return f"What is double {number}?", f"Double {number} is {2 * number}."
    return f"What is half of {2 * number}?", f"Half of {2 * number} is {number}."


def _compared(rng: random.Random) -> tuple[str, str]:
    a, b = sorted(rng.sample(range(2, 1000), 2))
    pair = [a, b] if rng.random() < 0.5 else [b, a]
    return f"Which is bigger, {pair[0]} or {pair[1]}?", f"{b} is bigger than {a}."


def _parity(rng: random.Random) -> tuple[str, str]:
    number = _number(rng)
    if number % 2:
        return f"Is {number} an even number?", f"No, {number} is an odd number."
    return f"Is {number} an even number?", f"Yes, {number} is an even number."


def _conversion(rng: random.Random) -> tuple[str, str]:
    one, many, small, each = rng.choice(known_facts().units)
    count = rng.choice((*range(2, 13), 15, 20, 25, 50, 100))
    large = f"{count} {many}"
    ask = rng.choice(("Convert {large} to {small}.", "How many {small} are {large}?"))
    how = f"1 {one} is {each} {small}, so " if rng.random() < 0.4 else ""
    return ask.format(large=large, small=small), f"{how}{large} are {count * each} {small}."


def _units_in(rng: random.Random) -> tuple[str, str]:
    one, _, small, each = rng.choice(known_facts().units)
    one = _with_article(one)
    return rng.choice(_UNITS_IN).format(small=small, one=one), f"{one} has {each} {small}."


def _with_article(unit: str) -> str:
    return f"{'an' if unit == 'hour' else 'a'} {unit}"


def _opposite(rng: random.Random) -> tuple[str, str]:
    pair = list(rng.choice(known_facts().opposites))
    rng.shuffle(pair)
    word, other = pair
    ask = rng.choice(
        (
            'What is the opposite of "{}"?',
            'Give an antonym of "{}".',
            'Give me the opposite of "{}".',
        )
    )
    return ask.format(word), f'The opposite of "{word}" is "{other}".'


def _synonym(rng: random.Random) -> tuple[str, str]:
    word, *others = rng.choice(known_facts().synonyms)
    if rng.random() < 0.3:
        return (
            f'Give me two synonyms for "{word}".',
            f'Two synonyms for "{word}" are "{others[0]}" and "{others[1]}".',
        )
    ask = rng.choice(('Give me a synonym for "{}".', 'What is another word for "{}"?'))
    return ask.format(word), f'A synonym for "{word}" is "{rng.choice(others)}".'


def _past_tense(rng: random.Random) -> tuple[str, str]:
    who = rng.choice(_PEOPLE)
    does, bare, did, rest = rng.choice(known_facts().deeds)
    past = f"{who} {did} {rest}."
    kind = rng.random()
    if kind < 0.2:
        return f'What is the past tense of "{bare}"?', f'The past tense of "{bare}" is "{did}".'
    ask = rng.choice(
        (
            'Rewrite this sentence in the past tense: "{}"',
            'Put this sentence into the past tense: "{}"',
            'Change to the past tense: "{}"',
        )
    )
    return ask.format(f"{who} {does} {rest}."), past


def _grammar(rng: random.Random) -> tuple[str, str]:
    who = rng.choice(_PEOPLE)
    does, bare, did, rest = rng.choice(known_facts().deeds)
    if rng.random() < 0.5:
        wrong, right = f"{who} {bare} {rest} every day.", f"{who} {does} {rest} every day."
    else:
        when = rng.choice(("yesterday", "last week", "last year"))
        wrong, right = f"{who} {bare} {rest} {when}.", f"{who} {did} {rest} {when}."
    ask = rng.choice(
        ('Correct the grammar: "{}"', 'Correct this sentence: "{}"', 'Fix the mistake: "{}"')
    )
    return ask.format(wrong), f'"{right}"' if rng.random() < 0.5 else right


def _members(rng: random.Random) -> tuple[str, str]:
    group, *members = rng.choice(known_facts().groups)
    count = rng.randrange(2, 1 + min(4, len(members)))
    chosen = rng.sample(members, count)
    ask = rng.choice(("Name {n} {g}.", "List {n} {g}.", "Give me {n} examples of {g}.")).format(
        n=_NUMBERS[count - 1], g=group
    )
    if rng.random() < 0.5:
        return ask, "\n".join(f"{at}. {_capital(one)}" for at, one in enumerate(chosen, 1))
    return ask, f"{_NUMBERS[count - 1]} {group} are {_joined(chosen)}."


def _joined(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + f" and {words[-1]}"


def _fact(rng: random.Random) -> tuple[str, str]:
    table = rng.choice(known_facts().tables)
    row = rng.choice(table.rows)
    return rng.choice(table.questions).format(*row), rng.choice(table.answers).format(*row)


def _proverb(rng: random.Random) -> tuple[str, str]:
    begin, end = rng.choice(known_facts().proverbs)
    return rng.choice(_PROVERB).format(begin), f"{begin} {end}."


def _translation(rng: random.Random) -> tuple[str, str]:
    english, *others = rng.choice(known_facts().translations)
    at = rng.randrange(len(_TONGUES))
    ask = rng.choice(_TRANSLATION)
    answer = rng.choice(('"{1}"', '"{0}" is "{1}" in {2}.'))
    return ask.format(english, _TONGUES[at]), answer.format(english, others[at], _TONGUES[at])


def _single(rng: random.Random) -> tuple[str, str]:
    question, answer = rng.choice(known_facts().single)
    return question, answer


# Facts and single questions are most of what there is to know, so they are drawn more often.
_KINDS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    *(_sum, _difference, _product, _quotient, _square, _share, _compared, _parity),
    *(_conversion, _units_in, _opposite, _synonym, _past_tense, _grammar, _members, _members),
    *(_fact, _fact, _fact, _fact, _fact, _proverb, _translation, _single, _single, _single),
)
