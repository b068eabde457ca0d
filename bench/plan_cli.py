"""``nsa-serve plan``: which memory a load needs, before any card is bought or any model loaded."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from ..config import AttentionMode, DType, EngineConfig
from ..errors import ConfigError
from ..runner.budget import shown
from ..server.flags import parse_bytes
from .cards import Card, card_named
from .engine_run import shape_folder
from .latency import decode_floor
from .measure import Ceilings
from .report import show_table
from .sizing import Sizing

# Where none are asked for: of each size that cards are sold in one, and sizes of host memory.
_CARDS = ("RTX-4090", "L40S", "H100-80GB", "H200", "B200")
_HOSTS = ("8GiB", "16GiB", "32GiB", "64GiB", "128GiB")

app = typer.Typer(add_completion=False)


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(help="A model as for serve; or a shape.", show_default=False)
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="A shape that ships (8b, 135m) or a folder.")
    ] = None,
    context: Annotated[str, typer.Option(help="Tokens of a request, such as 64k.")] = "8k",
    streams: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    card: Annotated[
        list[str] | None,
        typer.Option(help="A card's name, such as H200 or L40S; repeat.", show_default=False),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(help="Free memory, such as 80GiB, of any other; repeat.", show_default=False),
    ] = None,
    attention: Annotated[AttentionMode, typer.Option(help="As for serve.")] = AttentionMode.AUTO,
    dtype: Annotated[DType, typer.Option(help="As for serve.")] = DType.AUTO,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    gpu_memory_utilization: Annotated[float, typer.Option(help="As for serve.")] = 0.9,
    kv_host_memory_bytes: Annotated[str, typer.Option(help="As for serve.")] = "0",
    cpu_offload_bytes: Annotated[str, typer.Option(help="As for serve.")] = "0",
    max_num_seqs: Annotated[int, typer.Option(help="As for serve.")] = 256,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="As for serve.")] = None,
) -> None:
    """Bytes of weights, cache and steps, and what fits on cards of several sizes."""
    config = EngineConfig.from_flags(
        model=_model(model, shape), random_weights=shape is not None, attention=attention,
        dtype=dtype, gpu_memory_utilization=gpu_memory_utilization,
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
        kv_host_memory_bytes=parse_bytes(kv_host_memory_bytes),
        cpu_offload_bytes=parse_bytes(cpu_offload_bytes),
    )  # fmt: skip
    if device not in ("cuda", "cpu"):
        raise ConfigError(f"--device is cuda or cpu, not {device}")
    sizing = Sizing.of(config, device)
    cards = _cards(device, card or [], memory or [])
    show(sizing, parse_tokens(context), streams, cards)


def _model(model: str | None, shape: str | None) -> str | None:
    if model and shape:
        raise ConfigError(f"MODEL is {model} and --shape {shape}; give one")
    return str(shape_folder(shape)) if shape else model


def _cards(device: str, names: list[str], sizes: list[str]) -> list[Card]:
    """Those that were asked for, or the usual ones of the device."""
    if device == "cpu" and names:
        raise ConfigError(f"--card {names[0]} has no use with --device cpu; give --memory")
    if not (names or sizes):
        names, sizes = ([], list(_HOSTS)) if device == "cpu" else (list(_CARDS), [])
    return [*map(card_named, names), *(Card("", parse_bytes(size)) for size in sizes)]


def parse_tokens(text: str) -> int:
    """A number of tokens: 8192, 64k (times 1024)."""
    try:
        number = parse_bytes(text)
    except ConfigError:
        number = 0
    if number < 1:
        raise ConfigError(f"--context {text!r} is no number of tokens, such as 8192 or 64k")
    return number


def show(sizing: Sizing, context: int, streams: int, cards: list[Card]) -> None:
    """Two tables: what the load takes, and what each card holds."""
    if context > sizing.model.max_position:
        raise ConfigError(
            f"--context {context} exceeds the model's {sizing.model.max_position} tokens"
        )
    show_table(f"{streams} × {context:,} tokens", ("", ""), _load_rows(sizing, context, streams))
    columns = ("on", "cache", "tokens", "longest context", "streams", "this load")
    needed = sizing.needed_bytes(context, streams)
    rows = [_card_row(sizing, card, context, fits=streams, needed=needed) for card in cards]
    show_table("what fits", columns, rows)


def _load_rows(sizing: Sizing, context: int, streams: int) -> list[tuple[str, str]]:
    stream = sizing.stream_bytes(context)
    share = f", of which {sizing.utilization:.0%} is used" if sizing.device == "cuda" else ""
    return [
        ("weights", shown(sizing.resident_bytes)),
        *_weight_rows(sizing),
        ("cache of a token: keys and values", f"{sizing.raw_bytes_per_token:,.0f} B"),
        ("cache of a token: compressed entries", f"{sizing.compressed_bytes_per_token:,.0f} B"),
        (f"cache of a stream of {context:,}", shown(stream)),
        (f"cache of {streams} streams", shown(streams * stream)),
        (f"a step of {sizing.max_tokens:,} tokens, about", shown(sizing.step_bytes)),
        (f"free memory needed{share}", shown(sizing.needed_bytes(context, streams))),
    ]


def _weight_rows(sizing: Sizing) -> list[tuple[str, str]]:
    rows = []
    if sizing.four_bit_bytes:
        rows.append(("of them in 4 bits, beside bf16", shown(sizing.four_bit_bytes)))
    if sizing.offloaded is not None:
        count, num_bytes = len(sizing.offloaded.layers), sizing.offloaded.host_bytes
        rows.append((f"{count} layers streamed from host memory", shown(num_bytes)))
    return rows


def _card_row(
    sizing: Sizing, card: Card, context: int, *, fits: int, needed: int
) -> tuple[Any, ...]:
    free = card.memory
    label = f"{card.name} {shown(free)}".lstrip()
    size = sizing.cache_size(free)
    if size is None:
        return label, "–", "–", "–", 0, "no"
    streams = sizing.streams_that_fit(free, context)
    device, host = sizing.held_bytes(free)
    held = f"{shown(device)} + {shown(host)} of the host" if host else shown(device)
    tokens = size.num_blocks * sizing.layout.page
    verdict = f"no: {shown(max(needed - free, 0))} more"
    if streams >= fits:
        verdict = f"yes{_least_step(sizing, card, context, fits)}"
    return label, held, f"{tokens:,}", f"{size.max_model_len:,}", streams, verdict


def _least_step(sizing: Sizing, card: Card, context: int, streams: int) -> str:
    """The time in which the card could read what a decode step of the load must read."""
    if card.bandwidth is None:
        return ""
    ceilings = Ceilings(card.bandwidth, math.inf)
    floor = decode_floor(sizing.model, sizing.weight_bytes, streams, context, ceilings)
    return f", a step ≥ {floor:.3g} ms"
