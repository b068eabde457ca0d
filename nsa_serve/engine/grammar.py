"""From a grammar's text to the tokens that it allows next: compiling, bounded in time and size."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from ..errors import InvalidParameter
from ..request import GrammarKind, GrammarSpec
from ..tokenizer import Tokenizer
from .regex_size import expanded_size

MAX_GRAMMAR_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 64  # levels of JSON, of which a nested object takes two
MAX_PATTERN_SIZE = 250_000  # characters, repetitions written out; literals of more take seconds
MAX_COMPILED = 64  # grammars kept for the next request that asks for the same
# Of the compiling thread, so that a busy machine refuses nothing. A grammar that takes longer
# holds hundreds of megabytes, and its masks come as slowly.
COMPILE_CPU_SECONDS = 1.0
MAX_MESSAGE_CHARS = 400

# Models that have lost their way write white space for ever, which JSON allows.
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,20}"}
_LARK_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/')
# Building automata of large patterns ahead takes seconds; as they are needed takes milliseconds.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """A matcher at the start of its text, never moved, and the tokens allowed there."""

    matcher: LLMatcher
    mask: bytes


def check_grammar(spec: GrammarSpec) -> None:
    """What can be said of a grammar without compiling it. Raises ``InvalidParameter``."""
    num_bytes = len(spec.text.encode("utf-8", "replace"))
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidParameter(
            f"{spec.param} has {num_bytes} bytes; at most {MAX_GRAMMAR_BYTES}", param=spec.param
        )


class GrammarCompiler:
    """Compiles grammars for one vocabulary, and keeps the last ones. Any thread may call it.

    ``vocab_size`` V counts the model's logits. A mask is a bit for each of them, 1 where the token
    is allowed: ceil(V / 32) little-endian int32 words.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[GrammarKind, str], CompiledGrammar] = OrderedDict()

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """A matcher of one's own. Raises ``InvalidParameter`` for a grammar that can't be used."""
        key = spec.kind, spec.text
        with self._lock:
            known = self._compiled.get(key)
        if known is None:
            known = self._compile(spec)
        with self._lock:
            self._compiled[key] = known
            self._compiled.move_to_end(key)
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return CompiledGrammar(known.matcher.deep_copy(), known.mask)

    def mask_of(self, matcher: LLMatcher) -> bytes:
        """The tokens allowed next. Raises ``GrammarFailed`` where the matcher reached a limit."""
        mask = bytes(matcher.compute_bitmask())
        if matcher.is_error():
            raise GrammarFailed(one_line(matcher.get_error()))
        return mask[: 4 * -(-self._vocab_size // 32)]

    def _compile(self, spec: GrammarSpec) -> CompiledGrammar:
        vocabulary = self._shared_vocabulary()
        begin = time.thread_time()
        try:
            matcher = LLMatcher(vocabulary, _grammar(spec), log_level=0, limits=_LIMITS)
            if matcher.is_error():
                raise GrammarFailed(one_line(matcher.get_error()))
            mask = self.mask_of(matcher)
        except GrammarFailed as error:
            raise InvalidParameter(
                f"{spec.param} can't be used: {error}", param=spec.param
            ) from None
        if time.thread_time() - begin > COMPILE_CPU_SECONDS:
            raise InvalidParameter(
                f"{spec.param} is too complex: compiling it takes more than "
                f"{COMPILE_CPU_SECONDS:g} s",
                param=spec.param,
            )
        return CompiledGrammar(matcher, mask)

    def _shared_vocabulary(self) -> LLTokenizer:
        """Built when first needed: most servers see no grammar in their first second."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = LLTokenizer(
                    self._tokenizer.source.tokenizer_json,
                    n_vocab=self._vocab_size,
                    eos_token=self._eos_token_ids,
                )
            return self._vocabulary


class GrammarFailed(Exception):
    """A grammar is wrong, or reached a limit; one line says why."""


def _grammar(spec: GrammarSpec) -> str:
    """The grammar in the library's own form. Raises ``GrammarFailed``."""
    match spec.kind:
        case GrammarKind.JSON:
            return _schema(spec.text)
        case GrammarKind.REGEX:
            _check_sizes([spec.text])
            # As in JSON schemas and in Python's re.ASCII: a \d is no digit of another script.
            return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(spec.text, 'dws')}/")
        case GrammarKind.CHOICE:
            return LLMatcher.grammar_from_lark(_choice(spec.text))
        case GrammarKind.GRAMMAR:
            return LLMatcher.grammar_from_lark(_lark(spec.text))


def _schema(text: str) -> str:
    schema = _json(text)
    if not isinstance(schema, dict):
        raise GrammarFailed("a JSON schema must be an object")
    _check_depth(schema)
    _check_sizes(_patterns(schema))
    try:
        return LLMatcher.grammar_from_json_schema(text, defaults=_JSON_OPTIONS)
    except ValueError as error:  # options in the schema that mean nothing to the library
        raise GrammarFailed(one_line(str(error))) from None


def _check_sizes(patterns: Iterable[str]) -> None:
    for pattern in patterns:
        size = expanded_size(pattern)
        if size > MAX_PATTERN_SIZE:
            raise GrammarFailed(
                f"a pattern with its repetitions written out has {size} characters; "
                f"at most {MAX_PATTERN_SIZE}"
            )


def _patterns(node: object) -> Iterator[str]:
    """Every regular expression of a schema."""
    if isinstance(node, dict):
        if isinstance(node.get("pattern"), str):
            yield node["pattern"]
        yield from node.get("patternProperties", ())
    for child in _children(node):
        yield from _patterns(child)


def _check_depth(schema: object) -> None:
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise GrammarFailed(f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep")


def _children(node: object) -> list[object]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def _choice(text: str) -> str:
    choices = _json(text)
    if not isinstance(choices, list) or not choices:
        raise GrammarFailed("a choice is a list of at least one string")
    if not all(isinstance(choice, str) for choice in choices):
        raise GrammarFailed("every choice must be a string")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _lark(text: str) -> str:
    """Lark as it is; GBNF, which alone defines by ``::=``, translated."""
    _check_sizes(part[1:-1] for part in _LARK_QUOTED.findall(text) if part.startswith("/"))
    if "::=" not in text:
        return text
    try:
        return str(any_to_lark(text))
    # The library's parser raises whatever goes wrong inside it, RecursionError too.
    except Exception as error:
        raise GrammarFailed(f"the GBNF can't be read: {one_line(str(error))}") from None


def _json(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise GrammarFailed(f"it is no valid JSON: {one_line(str(error))}") from None


def one_line(message: str) -> str:
    """A message of the library on one line, bounded: it may echo the grammar."""
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 1] + "…"
