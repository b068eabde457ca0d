"""Values of the retrieval tasks: what facts state and answers must copy to the last sign."""

from __future__ import annotations

import random
from collections.abc import Callable

from .phrases import Phrases, Split

Draw = Callable[[random.Random, Phrases], str]

_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
# Digits are tokens of their own: where few of them alternate, what comes next is told by the place
# in the number alone, and not by the digit before.
_FEW_DIGITS = 0.4


def draw_value(rng: random.Random, phrases: Phrases, split: Split) -> str:
    """A value of any form that ``split`` has."""
    return rng.choice(VALUES[split])(rng, phrases)


def look_alike(rng: random.Random, phrases: Phrases, value: str, draw: Draw) -> str:
    """Another value of the form of ``value``, which ``draw`` drew: numbers begin as it does."""
    while True:
        other = _altered(rng, value) if any(map(str.isdigit, value)) else draw(rng, phrases)
        if other != value:
            return other


def _altered(rng: random.Random, value: str) -> str:
    """``value`` with other digits from some place on."""
    kept = rng.randrange(1 + max(at for at, sign in enumerate(value) if sign.isdigit()))
    signs = (str(rng.randrange(10)) if sign.isdigit() else sign for sign in value[kept:])
    return value[:kept] + "".join(signs)


def _number(rng: random.Random, phrases: Phrases) -> str:
    digits = rng.choice((4, 5, 6, 7, 7, 7, 8))
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _long_number(rng: random.Random, phrases: Phrases) -> str:
    """4 to 12 digits, in some numbers few different ones."""
    count = rng.choice((4, 5, 6, 7, 7, 7, 8, 9, 10, 11, 12))
    known = "0123456789"
    if rng.random() < _FEW_DIGITS:
        known = "".join(rng.sample(known, rng.randrange(2, 5)))
    first = rng.choice(known.replace("0", ""))
    return first + "".join(rng.choices(known, k=count - 1))


def _hexadecimal(rng: random.Random, phrases: Phrases) -> str:
    return "".join(rng.choices("0123456789abcdef", k=rng.choice((6, 8, 8, 10, 12, 16))))


def _code(rng: random.Random, phrases: Phrases) -> str:
    """Two letters or two to five digits, two to four times, as in KX-4821-QB."""
    return "-".join(_group(rng) for _ in range(rng.randrange(2, 5)))


def _group(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return "".join(rng.choices(_LETTERS, k=2))
    return "".join(rng.choices("0123456789", k=rng.randrange(2, 6)))


def _word(rng: random.Random, phrases: Phrases) -> str:
    return rng.choice(phrases.words)


def _two_words(rng: random.Random, phrases: Phrases) -> str:
    return "-".join(rng.sample(phrases.words, 2))


def _phrase(rng: random.Random, phrases: Phrases) -> str:
    return rng.choice((" ", "-")).join(rng.sample(phrases.words, rng.randrange(2, 5)))


def _name(rng: random.Random, phrases: Phrases) -> str:
    return rng.choice([owner for owner in phrases.owners if not owner.startswith("the ")])


def _uuid(rng: random.Random, phrases: Phrases) -> str:
    digits = f"{rng.getrandbits(128):032x}"
    if rng.random() < 0.5:
        return digits[:8]
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


# Numbers most often: they can be guessed from nothing else. What evaluation draws stays as it was
# when its first results were recorded, so that later ones can be compared with them.
VALUES: dict[Split, tuple[Draw, ...]] = {
    Split.TRAIN: (
        *(_long_number, _long_number, _long_number, _long_number, _long_number),
        *(_hexadecimal, _code, _code, _word, _phrase, _phrase, _name, _uuid),
    ),
    Split.HELD_OUT: (*(_number, _number, _number, _number), *(_word, _two_words, _name, _uuid)),
}
