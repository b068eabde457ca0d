"""Incremental decoding: whole characters only, and in the end exactly the decoded text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models

from nsa_serve.config import ModelSource
from nsa_serve.models.checkpoint import resolve
from nsa_serve.tokenizer import Tokenizer, TokenizerSource, detokenizer, read_source
from nsa_serve.tokenizer.detokenizer import ByteDetokenizer, WindowDetokenizer

WORDS = [
    "Hello",
    "東京",
    "👩‍👩‍👧‍👦",
    "한국어",
    " é",
    "e\u0301",
    "🇫🇷",
    "\n\n",
    "a\u200db",
    "ﷺ",
    "\U0001f3f4",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(read_source(resolve(ModelSource())))


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """A vocabulary of Llama 2's kind: visible spaces, byte pieces, a space stripped in front."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581Hello", "\u2581world", "\u2581", "s", ",", "\u2581the"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["</s>"])
    return Tokenizer(TokenizerSource(tokenizer_json=tokenizer.to_str(), special_tokens={}))


def pieces(
    tokenizer: Tokenizer, ids: list[int], prompt: tuple[int, ...] = (), skip_special: bool = True
) -> list[str]:
    """The text after each token, and what the flush adds."""
    decoder = detokenizer(tokenizer, prompt, skip_special=skip_special)
    return [*(decoder.feed([i]) for i in ids), decoder.flush()]


@pytest.mark.parametrize("word", WORDS)
def test_no_piece_holds_part_of_a_character(tokenizer: Tokenizer, word: str) -> None:
    ids = tokenizer.encode(f"x{word}y{word}")
    got = pieces(tokenizer, ids)
    assert "".join(got) == f"x{word}y{word}"
    assert not any("\ufffd" in piece for piece in got)
    assert got[-1] == ""


@given(ids=st.lists(st.integers(0, 49151), max_size=40), skip=st.booleans())
def test_pieces_of_any_tokens_add_up_to_the_decoded_text(
    tokenizer: Tokenizer, ids: list[int], skip: bool
) -> None:
    whole = tokenizer.decode(ids, skip_special=skip)
    assert "".join(pieces(tokenizer, ids, skip_special=skip)) == whole


@given(ids=st.lists(st.integers(17, 400), max_size=40))
def test_bytes_that_are_no_text_become_as_many_marks_as_when_decoded_whole(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_an_unfinished_character_is_flushed_as_a_mark(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("👩")[:-1]
    got = pieces(tokenizer, ids)
    assert got[:-1] == [""] * len(ids)
    assert set(got[-1]) == {"\ufffd"}


def test_the_vocabulary_decides_how_it_is_decoded(
    tokenizer: Tokenizer, sentencepiece: Tokenizer
) -> None:
    assert isinstance(detokenizer(tokenizer, [], skip_special=True), ByteDetokenizer)
    assert isinstance(detokenizer(sentencepiece, [], skip_special=True), WindowDetokenizer)


def piece_ids(tokenizer: Tokenizer, *names: str) -> list[int]:
    vocab = json.loads(tokenizer.source.tokenizer_json)["model"]["vocab"]
    return [vocab[name] for name in names]


def test_sentencepiece_keeps_the_space_after_a_prompt(sentencepiece: Tokenizer) -> None:
    hello, world = piece_ids(sentencepiece, "\u2581Hello", "\u2581world")
    assert pieces(sentencepiece, [world], prompt=(hello,)) == [" world", ""]
    assert pieces(sentencepiece, [hello, world]) == ["Hello", " world", ""]


@given(
    text=st.lists(
        st.sampled_from(["\u2581Hello", "\u2581the", "\u2581", "s", ",", "é", "東", "👩"]),
        max_size=20,
    )
)
def test_sentencepiece_text_adds_up_too(sentencepiece: Tokenizer, text: list[str]) -> None:
    vocab = json.loads(sentencepiece.source.tokenizer_json)["model"]["vocab"]
    ids: list[int] = []
    for piece in text:
        known = vocab.get(piece)
        ids += [known] if known else [vocab[f"<0x{byte:02X}>"] for byte in piece.encode()]
    got = pieces(sentencepiece, ids)
    assert "".join(got) == sentencepiece.decode(ids)
    assert not any("\ufffd" in piece for piece in got)


def test_endless_bad_bytes_and_skipped_tokens_keep_the_window_short(
    sentencepiece: Tokenizer,
) -> None:
    bad, end = piece_ids(sentencepiece, "<0xFF>", "</s>")
    decoder = WindowDetokenizer(sentencepiece, [], skip_special=True)
    text = "".join(decoder.feed([token]) for token in [bad] * 300 + [end] * 300)
    assert len(decoder._window) < 32
    assert text + decoder.flush() == "\ufffd" * 300


def test_token_bytes_of_sentencepiece_are_its_spaces_and_bytes(sentencepiece: Tokenizer) -> None:
    hello, byte = piece_ids(sentencepiece, "\u2581Hello", "<0xE2>")
    assert sentencepiece.token_bytes(hello) == b" Hello"
    assert sentencepiece.token_bytes(byte) == b"\xe2"
