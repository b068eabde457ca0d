"""Token ids of a text, and the text of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers.decoders import ByteLevel

from ..errors import CheckpointError, InvalidParameter
from .byte_level import byte_of_char
from .chat_template import ChatTemplate, Message
from .source import TokenizerSource


class Tokenizer:
    """A vocabulary with its chat template. Every method may be called from many threads at once."""

    def __init__(self, source: TokenizerSource) -> None:
        """Raises ``CheckpointError`` where the tokenizer.json can't be read."""
        self.source = source
        self._tokenizer = _load(source.tokenizer_json)
        self._chat_template = ChatTemplate(source.chat_templates, source.special_tokens)
        self._bytes: dict[int, bytes] = {}
        self.is_byte_level = isinstance(self._tokenizer.decoder, ByteLevel)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")

    @property
    def tool_template(self) -> str | None:
        """The chat template that shows tools; None where the model has none."""
        return self._chat_template.tool_template

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of ``text``. ``add_special`` adds the tokens that begin (or end) a text, where
        the model has such.

        Raises ``InvalidParameter`` for text that is not valid Unicode (lone surrogates).
        """
        return self.encode_batch([text], add_special=add_special)[0]

    def encode_batch(self, texts: Sequence[str], *, add_special: bool = True) -> list[list[int]]:
        """``encode`` of each text, on several cores. Other threads run meanwhile."""
        # Of the library's calls, this one lets go of the interpreter's lock and counts no offsets.
        encode = self._tokenizer.encode_batch_fast
        try:
            return [row.ids for row in encode(list(texts), add_special_tokens=add_special)]
        except (TypeError, UnicodeEncodeError):
            raise InvalidParameter("the text is not valid Unicode (a lone surrogate)") from None

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ``token_ids``; bytes that are no UTF-8 become U+FFFD.

        Raises ``InvalidParameter`` for an id outside the vocabulary's range.
        """
        for token_id in token_ids:
            if not 0 <= token_id < 1 << 32:
                raise InvalidParameter(f"{token_id} is not a token id")
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation. Raises ``TemplateError``."""
        return self._chat_template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Token ids of a conversation; ``options`` as for ``apply_chat_template``."""
        # Templates write the beginning-of-text token themselves.
        return self.encode(self.apply_chat_template(messages, **options), add_special=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, which may be part of a character.

        Special tokens give their name; ids that the vocabulary lacks give nothing.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """One token as text, with U+FFFD for what is no whole character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _find_bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self.is_byte_level:
            return _byte_level_bytes(piece)
        # SentencePiece's byte pieces and its visible space.
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()

    def _special_id(self, name: str) -> int | None:
        text = self.source.special_tokens.get(name)
        token_id: int | None = None if text is None else self._tokenizer.token_to_id(text)
        return token_id


def _byte_level_bytes(piece: str) -> bytes:
    """A piece of a byte-level vocabulary has one character per byte; an added token is itself."""
    table = byte_of_char()
    try:
        return bytes([table[char] for char in piece])
    except KeyError:
        return piece.encode()


def _load(tokenizer_json: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    # The library raises a bare Exception for whatever is wrong with the text.
    except Exception as error:
        raise CheckpointError(f"tokenizer.json can't be read: {error}") from error
    # Some checkpoints carry the settings of their training batches.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
