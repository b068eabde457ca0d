"""Words and wordings of the retrieval tasks. Training never sees those of ``HELD_OUT``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Split(StrEnum):
    """Which half of every list a task draws from."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True)
class Phrases:
    """What tasks are made of. ``{key}`` is "noun of owner", ``{value}`` what is to be found."""

    nouns: tuple[str, ...]
    owners: tuple[str, ...]
    words: tuple[str, ...]
    facts: tuple[str, ...]
    questions: tuple[str, ...]
    only: tuple[str, ...]  # behind a question: the answer is the value alone
    in_full: tuple[str, ...]  # behind a question: the answer is a sentence, as it is without
    several_facts: tuple[str, ...]
    several_questions: tuple[str, ...]
    assignments: tuple[str, ...]  # {name}, {value}
    copies: tuple[str, ...]  # {name}, {source}
    variable_questions: tuple[str, ...]  # {value}
    variable_names: tuple[str, ...]
    passage_marks: tuple[str, ...]  # {label}, {text}
    passage_questions: tuple[str, ...]  # {label}
    labels: tuple[str, ...]


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


_TRAIN = Phrases(
    nouns=_list(
        "access code, magic number, password, locker code, registration number, favourite number,"
        "vault combination, serial number, room number, telephone extension, security token,"
        "licence key, pass phrase, code name, lucky number, delivery code, reference number,"
        "meeting place, hiding place, call sign, account number, ticket number, signal word,"
        "member number, badge number, invoice number, inventory number, parcel number, PIN,"
        "watchword, catch phrase, opening line, door word, code sentence, order number,"
        "tracking code, batch number, flight number, session key, file name, part number,"
        "recovery code, radio frequency, case number, postal code, model name, docking code"
    ),
    owners=_list(
        "Paris, Berlin, Madrid, Rome, Vienna, Prague, Warsaw, Lisbon, Athens, Dublin, Oslo, Cairo,"
        "Nairobi, Lagos, Tunis, Delhi, Mumbai, Bangkok, Hanoi, Manila, Tokyo, Osaka, Seoul, Sydney,"
        "Perth, Auckland, Toronto, Montreal, Chicago, Boston, Denver, Seattle, Houston, Havana,"
        "Lima, Quito, Bogota, Santiago, Caracas, Istanbul, Ankara, Tehran, Baghdad, Damascus,"
        "Alice, Robert, Maria, Henry, Sophie, Daniel, Laura, Peter, Emma, Thomas, Julia, Edward,"
        "Helen, George, Nina, Oscar, Clara, Victor, Ruth, Walter, the blue house, the old mill,"
        "the red bicycle, the night train, the north tower, the garden gate, the grey cat,"
        "the small museum, the first ship, the green door, the research station, the bakery,"
        "the printing office, the wooden box, the second laboratory, the fishing boat, the school,"
        "the main server, the spare engine, the west bridge, the silver car, the town library,"
        "Nora, Felix, Agnes, Leon, Martha, Hugo, Iris, Conrad, Lyon, Turin, Krakow, Bergen,"
        "Kyoto, Dallas, Accra, Porto, the harbour office, the old theatre, the upper lock,"
        "the weather ship, the second gate, the winter camp, the coal depot, the post room"
    ),
    words=_list(
        "amber, falcon, river, candle, marble, copper, willow, thunder, saffron, lantern, meadow,"
        "pebble, crystal, harbour, violin, orchard, maple, comet, velvet, granite, sparrow, cinder,"
        "tulip, anchor, basil, cobalt, dragon, ember, feather, ginger, hazel, indigo, jasmine,"
        "kettle, lemon, mango, nectar, olive, pepper, quartz, raven, scarlet, timber, umbrella,"
        "walnut, yellow, zephyr, acorn, beacon, cactus, desert, eagle, forest, glacier, honey,"
        "island, jungle, koala, lizard, mirror, needle, ocean, panther, quill, ribbon, saddle,"
        "tiger, valley, wagon, canyon, button, barrel, castle, donkey, engine, fossil, goblet"
    ),
    facts=(
        "The {key} is now {value}.",
        "Remember that the {key} is {value}.",
        "One thing to keep in mind: the {key} is {value}.",
        "It was noted in the margin that the {key} is {value}.",
        "For the record, the {key} was set to {value}.",
        "According to the clerk, the {key} is {value}.",
        "Please note: {key} = {value}.",
        "{value} is the {key}.",
        "They chose {value} as the {key}.",
        "Nobody but the two of us knows that the {key} is {value}.",
        "The {key} has been changed to {value}.",
        "Since last week the {key} has been {value}.",
        "As the {key} they use {value}.",
        "The clerk wrote {value} next to the words: {key}.",
        "{key}: {value}.",
    ),
    questions=(
        "What's the {key}?",
        "Tell me the {key}.",
        "Could you give me the {key}?",
        "Which is the {key}, going by the text?",
        "The {key}, please.",
        "What does the text say the {key} is?",
        "What was the {key} that the text mentions?",
        "Which value is given for the {key}?",
        "Find the {key} in the text above.",
        "I forgot the {key}. What is it?",
        "The text above hides a fact. What is the {key}?",
        "Please look up the {key}.",
        "Somewhere in the text the {key} is stated. What is it?",
        "Do you remember the {key}?",
    ),
    only=(
        "Give the value alone.",
        "Reply with nothing but the value.",
        "Only the value, please.",
        "No other words than the value.",
    ),
    in_full=("Answer in a whole sentence.", "Use a full sentence.", "Say it in one sentence."),
    several_facts=(
        "One {key} is {value}.",
        "Another {key} that may be used is {value}.",
        "{value} is also a {key}.",
        "On the list of every {key} there is {value}.",
    ),
    several_questions=(
        "List every {key} in the text.",
        "Which values are given for the {key}?",
        "The text has more than one {key}. What are they?",
    ),
    assignments=(
        "Let {name} be {value}.",
        "The variable {name} holds {value}.",
        "Set {name} to {value}.",
    ),
    copies=(
        "Let {name} be the same as {source}.",
        "The variable {name} takes the value of {source}.",
        "Set {name} to whatever {source} holds.",
    ),
    variable_questions=(
        "Which variables hold {value}?",
        "List the variables whose value is {value}.",
        "What variables are equal to {value}, directly or through others?",
    ),
    variable_names=_list(
        "alpha, beta, gamma, delta, kappa, omega, x1, x2, x3, y1, y2, y3, z1, z2, z3, first, last,"
        "count, total, width, height, speed, level, price, left, right, upper, lower"
    ),
    passage_marks=(
        'Passage {label} begins: "{text}" Passage {label} ends.',
        "[{label}] {text} [/{label}]",
        "The note named {label} reads: {text}",
    ),
    passage_questions=(
        "Repeat passage {label} word for word.",
        "Copy what {label} says, exactly.",
        "Write out the text of {label} again.",
    ),
    labels=_list("A1, B2, C3, D4, E5, Kappa, Sigma, red, green, blue, north, south, one, two"),
)

_HELD_OUT = Phrases(
    nouns=_list("secret number, entry phrase, shelf mark, customs number, safe code"),
    owners=_list(
        "the archive, Geneva, Helsinki, Jakarta, Casablanca, Vancouver, Margaret, Sebastian,"
        "Florence, the lighthouse, the copper mine, the northern observatory, the ferry"
    ),
    words=_list(
        "walrus, turquoise, parsley, monsoon, trumpet, cathedral, blossom, gravel, pelican,"
        "sapphire, tornado, biscuit, compass, mustard, penguin, lagoon, magnet, pyramid"
    ),
    facts=(
        "The {key} is {value}.",
        "Let it be known that the {key} is {value}.",
        "It is written down here that the {key} is {value}.",
    ),
    questions=(
        "What is the {key}?",
        "Can you tell me what the {key} is?",
        "According to the text, what is the {key}?",
    ),
    only=("Answer with the value only.",),
    in_full=(),
    several_facts=("One of the values of the {key} is {value}.",),
    several_questions=("What are all the values of the {key} in the text?",),
    assignments=("VAR {name} = {value}.",),
    copies=("VAR {name} = VAR {source}.",),
    variable_questions=("Find all variables that are assigned the value {value}.",),
    variable_names=_list("AQB, CDX, EFT, GHW, JKL, MNP, RSV, UYZ, TRO, WIK"),
    passage_marks=("Here is excerpt {label}: {text} That was excerpt {label}.",),
    passage_questions=("Please quote excerpt {label} exactly.",),
    labels=_list("F6, G7, Omega, purple, west"),
)

PHRASES = {Split.TRAIN: _TRAIN, Split.HELD_OUT: _HELD_OUT}
