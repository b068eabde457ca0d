"""Tokenizers: from GGUF metadata and from tokenizer.json, against independent encoders."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from nsa_serve.config import ModelSource
from nsa_serve.errors import CheckpointError, ConfigError, InvalidParameter
from nsa_serve.models.checkpoint import Checkpoint, resolve
from nsa_serve.tokenizer import Tokenizer, TokenizerSource, read_source
from nsa_serve.tokenizer.byte_level import byte_of_char

GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "Hello, world! It's 12345 o'clock.",
    "  two  spaces\n\n\ttabs and   trailing   ",
    "naïve café — “quotes” … 東京タワー 한국어 עברית",
    "def f(x):\n    return x ** 2  # 👩‍👩‍👧 family\r\n",
    "3.14159 ½ ² ٣ 1,000,000",
    "",
]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return resolve(ModelSource())


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer(read_source(checkpoint))


class OracleBPE:
    """Byte-level BPE as its paper says: merge the best-ranked pair of a word until none is left."""

    def __init__(self, tokens: list[str], merges: list[str]) -> None:
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(line.split(" ")): i for i, line in enumerate(merges)}
        self.char = {byte: char for char, byte in byte_of_char().items()}

    def word(self, word: str) -> list[int]:
        parts = [self.char[byte] for byte in word.encode()]
        while len(parts) > 1:
            pairs = [self.ranks.get(pair, 1 << 30) for pair in itertools.pairwise(parts)]
            best = min(pairs)
            if best == 1 << 30:
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        # Bytes that the vocabulary lacks are lost; SmolLM2's lacks a few.
        return [self.ids[part] for part in parts if part in self.ids]

    def encode_smollm(self, text: str) -> list[int]:
        ids = []
        for piece in regex.split(r"(\p{N})", text):
            for word in regex.findall(GPT2_WORDS, piece):
                ids += self.word(word)
        return ids


@pytest.fixture(scope="module")
def oracle(checkpoint: Checkpoint) -> OracleBPE:
    found = checkpoint.metadata
    return OracleBPE(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.merges"])


@pytest.mark.parametrize("text", TEXTS)
def test_gguf_tokenizer_equals_an_independent_bpe(
    tokenizer: Tokenizer, oracle: OracleBPE, text: str
) -> None:
    assert tokenizer.encode(text) == oracle.encode_smollm(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


# Old characters only: libraries differ in the Unicode version they know.
CHARACTERS = st.one_of(
    st.characters(max_codepoint=0xFF),
    st.characters(min_codepoint=0x391, max_codepoint=0x3A1),
    st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5),
    st.characters(min_codepoint=0x1F600, max_codepoint=0x1F64F),
    st.sampled_from("\u200d\u2028\u3000\u0301\u0664½…’"),
)


@settings(max_examples=60, deadline=None)
@given(text=st.text(CHARACTERS, max_size=40))
def test_any_text_is_encoded_like_the_oracle_and_comes_back(
    tokenizer: Tokenizer, oracle: OracleBPE, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert ids == oracle.encode_smollm(text)
    if all(oracle.char[byte] in oracle.ids for byte in text.encode()):
        assert tokenizer.decode(ids, skip_special=False) == text


def test_special_tokens_are_found_in_text_and_skipped_in_decoding(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert ids[0] == 1
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == "user\nHi"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>user\nHi<|im_end|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.vocab_size == 49152
    assert {0, 1, 2} <= tokenizer.special_ids


def test_bytes_of_tokens_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    text = TEXTS[2] + TEXTS[3]
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == text
    assert tokenizer.token_bytes(1) == b"<|im_start|>"
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.token_text(tokenizer.encode("👩")[0]) == "\ufffd"


def test_a_source_that_travelled_over_a_wire_gives_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    wire = msgspec.msgpack.encode(tokenizer.source)
    again = Tokenizer(msgspec.msgpack.decode(wire, type=TokenizerSource))
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)
    assert again.source.chat_templates == tokenizer.source.chat_templates


def test_encoding_from_many_threads_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    texts = [f"{text} {i}" for i in range(20) for text in TEXTS]
    expected = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == expected


def test_texts_encoded_together_have_the_ids_that_each_has_alone(tokenizer: Tokenizer) -> None:
    for add_special in (True, False):
        alone = [tokenizer.encode(text, add_special=add_special) for text in TEXTS]
        assert tokenizer.encode_batch(TEXTS, add_special=add_special) == alone
    with pytest.raises(InvalidParameter, match="surrogate"):
        tokenizer.encode_batch(["fine", "a\ud800b"])


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer: Tokenizer) -> None:
    text = "".join(f"{i} men and {i % 7} horses. " for i in range(20_000))

    def encode() -> float:
        start = time.perf_counter()
        tokenizer.encode(text)
        return time.perf_counter() - start

    with ThreadPoolExecutor(1) as pool:
        last, longest = time.perf_counter(), 0.0
        encoding = pool.submit(encode)
        while not encoding.done():
            now = time.perf_counter()
            last, longest = now, max(longest, now - last)
        longest = max(longest, time.perf_counter() - last)
    assert longest < 0.7 * encoding.result()


def test_lone_surrogates_and_impossible_ids_are_the_clients_fault(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidParameter, match="surrogate"):
        tokenizer.encode("a\ud800b")
    for bad in (-1, 1 << 40):
        with pytest.raises(InvalidParameter, match=str(bad)):
            tokenizer.decode([1, bad])


TINY = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": [
        *byte_of_char(),
        "he",
        "hel",
        "llo",
        "hello",
        "<s>",
        "</s>",
        "<tool>",
    ],
    "tokenizer.ggml.token_type": [1] * 260 + [3, 3, 4],
    "tokenizer.ggml.merges": ["h e", "he l"],
    "tokenizer.ggml.bos_token_id": 260,
    "tokenizer.ggml.eos_token_id": 261,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "default text",
    "tokenizer.chat_template.tool_use": "tool text",
}


def tiny(**changes: object) -> Checkpoint:
    metadata = {**TINY, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    found = resolve(ModelSource())
    return replace(found, metadata={k: v for k, v in metadata.items() if v is not None})


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    tokens: list[str] = TINY["tokenizer.ggml.tokens"]  # type: ignore[assignment]
    return [tokens.index(piece) for piece in pieces]


def test_llama3_takes_a_word_that_is_a_token_whole_and_begins_with_bos() -> None:
    tokenizer = Tokenizer(read_source(tiny()))
    assert tokenizer.encode("hello") == ids_of(tokenizer, "<s>", "hello")
    assert tokenizer.encode("hellos", add_special=False) == ids_of(tokenizer, "hel", *"los")
    assert tokenizer.source.chat_templates == {"default": "default text", "tool_use": "tool text"}


def test_bos_and_eos_are_both_added_where_the_metadata_asks_for_them() -> None:
    tokenizer = Tokenizer(read_source(tiny(add_eos_token=True)))
    assert tokenizer.encode("he") == ids_of(tokenizer, "<s>", "he", "</s>")


def test_user_defined_tokens_are_found_in_text_but_are_not_special() -> None:
    tokenizer = Tokenizer(read_source(tiny()))
    ids = tokenizer.encode("he<tool>", add_special=False)
    assert ids == ids_of(tokenizer, "he", "<tool>")
    assert tokenizer.decode(ids) == "he<tool>"


def test_qwen2_composes_characters_and_splits_digits() -> None:
    tokenizer = Tokenizer(read_source(tiny(pre="qwen2", add_bos_token=None)))
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"
    assert tokenizer.encode("hello") == ids_of(tokenizer, "hel", *"lo")


@pytest.mark.parametrize("text", TEXTS)
def test_llama3_words_are_cut_like_its_published_pattern(text: str) -> None:
    tokens = [*byte_of_char()]
    words = regex.findall(LLAMA3_WORDS, text)
    char = {byte: c for c, byte in byte_of_char().items()}
    # Every word that the pattern cuts is made a token, so the ids say where the cuts were.
    whole = list(dict.fromkeys("".join(char[b] for b in word.encode()) for word in words))
    vocabulary = tokens + [piece for piece in whole if piece not in tokens]
    checkpoint = tiny(
        tokens=vocabulary, token_type=[], merges=[], bos_token_id=None, eos_token_id=None
    )
    tokenizer = Tokenizer(read_source(checkpoint))
    got = [tokenizer.token_bytes(i).decode() for i in tokenizer.encode(text)]
    assert got == words


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model 'llama'"),
        ({"pre": "poro-chat"}, "tokenizer.ggml.pre 'poro-chat'"),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["he"]}, "tokenizer.ggml.merges holds 'he'"),
    ],
)
def test_a_gguf_tokenizer_that_is_not_supported_is_refused_by_its_key(
    changes: dict[str, object], key: str
) -> None:
    with pytest.raises(CheckpointError, match=regex.escape(key)):
        read_source(tiny(**changes))


def folder_checkpoint(folder: Path) -> Checkpoint:
    return replace(resolve(ModelSource()), tokenizer_path=folder)


def write_folder(folder: Path, config: dict[str, object]) -> None:
    tokenizer = HFTokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(byte_of_char())}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_folder_gives_its_tokenizer_special_tokens_and_template(tmp_path: Path) -> None:
    write_folder(
        tmp_path, {"bos_token": {"content": "<s>"}, "eos_token": "<s>", "chat_template": "old"}
    )
    tokenizer = Tokenizer(read_source(folder_checkpoint(tmp_path)))
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 256
    assert tokenizer.decode(tokenizer.encode("longer than four")) == "longer than four"
    assert tokenizer.source.chat_templates == {"default": "old"}


def test_template_files_outrank_the_config_and_the_flag_outranks_all(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "old"}, {"name": "rag", "template": "r"}]
    write_folder(tmp_path, {"chat_template": named})
    (tmp_path / "chat_template.jinja").write_text("new")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    checkpoint = folder_checkpoint(tmp_path)
    assert read_source(checkpoint).chat_templates == {
        "default": "new",
        "rag": "r",
        "tool_use": "tools",
    }
    given_file = tmp_path / "given.jinja"
    given_file.write_text("mine")
    assert read_source(checkpoint, str(given_file)).chat_templates == {"default": "mine"}


def test_missing_and_damaged_tokenizer_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        read_source(folder_checkpoint(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="can't be read"):
        Tokenizer(read_source(folder_checkpoint(tmp_path)))
    with pytest.raises(ConfigError, match="--chat-template"):
        read_source(resolve(ModelSource()), str(tmp_path / "nowhere.jinja"))
