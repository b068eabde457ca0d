"""What the server and the engine process say to each other: typed msgpack, no pickle.

Down go a configuration, once, and commands; up come how loading goes, one ``Ready`` or ``Fatal``,
and then one ``Report`` for each turn of the engine's loop in which something happened.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

import msgspec

from ..config import EngineConfig
from ..request import EngineRequest, RequestOutput
from ..stats import CacheMap, StatsSnapshot
from ..tokenizer import TokenizerSource


class Submit(msgspec.Struct, frozen=True, tag=True):
    """``sent`` is on the machine's monotonic clock: the engine may be in a long step meanwhile."""

    request: EngineRequest
    sent: float | None = None  # None: now


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answered by the engine's loop itself, with a report between two steps."""


class Survey(msgspec.Struct, frozen=True, tag=True):
    """Asks for a map of the cache, which comes with the report of the same turn."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End the process; what still runs is dropped."""


Command = Submit | Abort | Ping | Survey | Shutdown


class Unreadable(msgspec.Struct, frozen=True):
    """Stands for a command that could not be decoded; never sent."""

    request_id: str
    message: str


class Rejection(msgspec.Struct, frozen=True):
    """A request that was not accepted. ``kind`` names a class of errors.py."""

    request_id: str
    kind: str
    message: str
    param: str | None = None
    retry_after: int | None = None  # seconds


class EngineDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What runs in the engine, for those who can't look: the server, a person at a terminal."""

    model_name: str
    family: str
    attention: str  # nsa or dense
    trained_sparse: bool  # the checkpoint was trained with NSA's gates
    dtype: str
    device: str
    num_layers: int
    vocab_size: int  # rows of the model's output, at least the tokenizer's vocabulary
    max_model_len: int  # tokens of prompt and output together
    page_size: int  # tokens
    num_blocks: int  # pages of the cache
    token_budget: int  # tokens of one step
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    generation_config: dict[str, Any]  # the checkpoint's generation_config.json
    tokenizer: TokenizerSource | None  # None for random weights without one

    @property
    def cache_tokens(self) -> int:
        return self.num_blocks * self.page_size


class LoadProgress(msgspec.Struct, frozen=True, tag=True):
    """``done`` of ``total`` bytes of weights are read."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    engine: EngineDescription


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine ends. ``kind`` names a class of errors.py, ``message`` is one line."""

    kind: str
    message: str


class Report(msgspec.Struct, frozen=True, tag=True):
    """One turn of the loop: everything that it brought, and the counters after it."""

    stats: StatsSnapshot
    outputs: list[RequestOutput] = []
    rejections: list[Rejection] = []
    cache: CacheMap | None = None  # where a survey was asked for


Event = LoadProgress | Ready | Fatal | Report

encoder = msgspec.msgpack.Encoder()
config_decoder = msgspec.msgpack.Decoder(EngineConfig)
command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)

# The sockets' names in the folder that server and engine share.
COMMANDS, EVENTS = "commands", "events"
_LENGTH = struct.Struct("<Q")


def endpoint(folder: str, name: str) -> str:
    return f"ipc://{folder}/{name}"


def frame(payload: bytes) -> bytes:
    """``payload`` behind its length, for a pipe."""
    return _LENGTH.pack(len(payload)) + payload


def read_frame(stream: BinaryIO) -> bytes:
    """What ``frame`` was given. Raises ``EOFError`` where the pipe ends before."""
    head = stream.read(_LENGTH.size)
    payload = stream.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""
    if len(head) < _LENGTH.size or len(payload) < _LENGTH.unpack(head)[0]:
        raise EOFError("the server closed the pipe before it had sent the configuration")
    return payload
