"""Log-probabilities in OpenAI's two shapes (chat and completions) and in vLLM's for prompts."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ..request import TokenLogprob
from .ports import Tokenizer
from .replies import ChatLogprob, ChatLogprobs, CompletionLogprobs, PromptLogprob, TopLogprob

# JSON has no infinity; OpenAI writes this for a token that can't be.
LEAST_LOGPROB = -9999.0


def finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


class TokenTexts:
    """How single tokens are written: as text, or where they are no whole characters, as bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def raw(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id)

    def replaced(self, token_id: int) -> str:
        """Text with U+FFFD for bytes that are no whole character, as in chat logprobs."""
        return self.raw(token_id).decode("utf-8", "replace")

    def escaped(self, token_id: int) -> str:
        r"""Text, or ``bytes:\xe2\x80``, which keeps tokens apart, as in completions."""
        raw = self.raw(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(entries: Sequence[TokenLogprob], texts: TokenTexts, num_top: int) -> ChatLogprobs:
    """The shape of chat completions: each token with its bytes and its ``num_top`` alternatives."""
    return ChatLogprobs(content=[_chat_entry(entry, texts, num_top) for entry in entries])


def _chat_entry(entry: TokenLogprob, texts: TokenTexts, num_top: int) -> ChatLogprob:
    return ChatLogprob(
        token=texts.replaced(entry.token_id),
        logprob=finite(entry.logprob),
        bytes=list(texts.raw(entry.token_id)),
        top_logprobs=[
            TopLogprob(
                token=texts.replaced(token_id),
                logprob=finite(logprob),
                bytes=list(texts.raw(token_id)),
            )
            for token_id, logprob in entry.top[:num_top]
        ],
    )


class CompletionLogprobsWriter:
    """The shape of text completions for one choice, over as many chunks as it comes in.

    ``text_offset`` counts characters of the tokens before: a token in the middle of a character
    has the offset of that character.
    """

    def __init__(self, texts: TokenTexts, num_top: int) -> None:
        self._texts = texts
        self._num_top = num_top
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        return CompletionLogprobs(
            text_offset=[self._advance(entry.token_id) for entry in entries],
            token_logprobs=[finite(entry.logprob) for entry in entries],
            tokens=[self._texts.escaped(entry.token_id) for entry in entries],
            top_logprobs=[self._top(entry) for entry in entries],
        )

    def write_prompt(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprob | None]
    ) -> CompletionLogprobs:
        """The echoed prompt; its first token has no past and so no log-probability."""
        return CompletionLogprobs(
            text_offset=[self._advance(token_id) for token_id in token_ids],
            token_logprobs=[None if entry is None else finite(entry.logprob) for entry in entries],
            tokens=[self._texts.escaped(token_id) for token_id in token_ids],
            top_logprobs=[None if entry is None else self._top(entry) for entry in entries],
        )

    def _advance(self, token_id: int) -> int:
        before = self._offset
        self._offset += len(self._decoder.decode(self._texts.raw(token_id)))
        return before

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        top = {self._texts.escaped(i): finite(logprob) for i, logprob in entry.top[: self._num_top]}
        top.setdefault(self._texts.escaped(entry.token_id), finite(entry.logprob))
        return top


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Two stretches of one choice, one after the other."""
    return CompletionLogprobs(
        text_offset=first.text_offset + second.text_offset,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        tokens=first.tokens + second.tokens,
        top_logprobs=(first.top_logprobs or []) + (second.top_logprobs or []),
    )


def prompt_logprobs(
    entries: Sequence[TokenLogprob | None], texts: TokenTexts
) -> list[dict[str, PromptLogprob] | None]:
    """vLLM's form: for each prompt token the candidates by token id, its own among them."""
    return [None if entry is None else _prompt_entry(entry, texts) for entry in entries]


def _prompt_entry(entry: TokenLogprob, texts: TokenTexts) -> dict[str, PromptLogprob]:
    ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, 1)]
    own = (entry.token_id, entry.logprob, entry.rank)
    return {
        str(token_id): PromptLogprob(
            logprob=finite(logprob), rank=rank, decoded_token=texts.replaced(token_id)
        )
        for token_id, logprob, rank in (*ranked, own)
    }
