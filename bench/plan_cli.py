"""``nsa-serve plan``: which memory a load needs, before any card is bought or any model loaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..config import AttentionMode, DType, EngineConfig
from ..errors import ConfigError, NSAServeError
from ..runner.budget import shown
from ..server.flags import parse_bytes, refuse
from .engine_run import shape_folder
from .report import show_table
from .sizing import Sizing

# Sizes that cards are sold in.
_CARDS = ("24GiB", "48GiB", "80GiB", "139GiB", "178GiB")

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
    memory: Annotated[
        list[str] | None,
        typer.Option(help="Free memory of a card, such as 80GiB; repeat.", show_default=False),
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
    try:
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
        show(sizing, parse_tokens(context), streams, [parse_bytes(m) for m in memory or _CARDS])
    except NSAServeError as error:
        raise refuse(error) from None


def _model(model: str | None, shape: str | None) -> str | None:
    if model and shape:
        raise ConfigError(f"MODEL is {model} and --shape {shape}; give one")
    return str(shape_folder(shape)) if shape else model


def parse_tokens(text: str) -> int:
    """A number of tokens: 8192, 64k (times 1024)."""
    try:
        number = parse_bytes(text)
    except ConfigError:
        number = 0
    if number < 1:
        raise ConfigError(f"--context {text!r} is no number of tokens, such as 8192 or 64k")
    return number


def show(sizing: Sizing, context: int, streams: int, cards: list[int]) -> None:
    """Two tables: what the load takes, and what each card holds."""
    if context > sizing.model.max_position:
        raise ConfigError(
            f"--context {context} exceeds the model's {sizing.model.max_position} tokens"
        )
    show_table(f"{streams} × {context:,} tokens", ("", ""), _load_rows(sizing, context, streams))
    columns = ("free memory", "cache", "tokens", "longest context", "streams", "this load")
    needed = sizing.needed_bytes(context, streams)
    rows = [_card_row(sizing, free, context, fits=streams, needed=needed) for free in cards]
    show_table("on a card with", columns, rows)


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
    sizing: Sizing, free: int, context: int, *, fits: int, needed: int
) -> tuple[Any, ...]:
    size = sizing.cache_size(free)
    if size is None:
        return shown(free), "–", "–", "–", 0, "no"
    streams = sizing.streams_that_fit(free, context)
    device, host = sizing.held_bytes(free)
    held = f"{shown(device)} + {shown(host)} of the host" if host else shown(device)
    tokens = size.num_blocks * sizing.layout.page
    verdict = "yes" if streams >= fits else f"no: {shown(max(needed - free, 0))} more"
    return shown(free), held, f"{tokens:,}", f"{size.max_model_len:,}", streams, verdict
