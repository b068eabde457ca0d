"""Text to token ids and back: vocabularies, chat templates, incremental decoding."""

from .chat_template import ChatTemplate
from .detokenizer import Detokenizer, detokenizer
from .source import TokenizerSource, read_source
from .tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Detokenizer",
    "Tokenizer",
    "TokenizerSource",
    "detokenizer",
    "read_source",
]
