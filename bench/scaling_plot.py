"""How a prompt's time a token, a decode step and memory grow with the context, as a picture.

``python -m nsa_serve.bench.scaling_plot PICTURE.png LATENCY.json ...``; the records come from
``nsa-serve bench latency`` on one shape and device.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .report import console

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Scaling:
    """Points (context, value) by ascending context."""

    prefill_us: list[tuple[int, float]]  # a token
    prefill_floor_us: list[tuple[int, float]]
    decode_ms: list[tuple[int, float]]  # a step of one request
    decode_floor_ms: list[tuple[int, float]]
    peak_gb: list[tuple[int, float]]  # the device's memory in all, torch's high-water mark


def read_scaling(records: Sequence[dict[str, Any]]) -> Scaling:
    """What records of ``bench latency`` say of single requests; the first of a context counts.

    Raises ``ValueError`` where they hold no prompt or no decode of one request.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for record in records:
        for point in record.get("points", ()):
            if point["num_requests"] == 1:
                found.setdefault((point["what"], point["context_len"]), point)
    prompts = [point for (what, _), point in sorted(found.items()) if what == "ttft"]
    steps = [point for (what, _), point in sorted(found.items()) if what == "decode"]
    if not prompts or not steps:
        raise ValueError("no ttft or no decode of one request: are these records of bench latency?")

    def of(points: list[dict[str, Any]], name: str, unit: float = 0) -> list[tuple[int, float]]:
        """By context; where there is a ``unit``, a token's share in that part of a millisecond."""
        pairs = [(p["context_len"], p[name]["median"] if name == "ms" else p[name]) for p in points]
        return [(size, value / (unit * size) if unit else value) for size, value in pairs]

    return Scaling(
        prefill_us=of(prompts, "ms", 1e-3),
        prefill_floor_us=of(prompts, "floor_ms", 1e-3),
        decode_ms=of(steps, "ms"),
        decode_floor_ms=of(steps, "floor_ms"),
        peak_gb=[(size, peak / 1e9) for size, peak in of([*prompts, *steps], "peak_bytes")],
    )


def _length(tokens: float, _position: object = None) -> str:
    """A power of two as people write it: 64k, 1M."""
    return f"{tokens / 2**20:.0f}M" if tokens >= 2**20 else f"{tokens / 1024:.0f}k"


@app.command()
def draw(
    picture: Annotated[Path, typer.Argument(help="PNG to write.")],
    records: Annotated[
        list[Path], typer.Argument(help="JSON of bench latency.", exists=True, dir_okay=False)
    ],
) -> None:
    """Draw time a token of a prompt, a decode step, and memory, over context."""
    from matplotlib import pyplot

    try:
        scaling = read_scaling([json.loads(path.read_text()) for path in records])
    except (ValueError, KeyError) as error:
        raise typer.BadParameter(f"no records of bench latency: {error}") from None
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axes, title, measured, floor in (
        (left, "a prompt, µs a token", scaling.prefill_us, scaling.prefill_floor_us),
        (middle, "a decode step of one request, ms", scaling.decode_ms, scaling.decode_floor_ms),
        (right, "most memory taken, GB", sorted(scaling.peak_gb), []),
    ):
        axes.plot(*zip(*measured, strict=True), marker="o", label="measured")
        if floor:
            axes.plot(*zip(*floor, strict=True), ":k", label="floor")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(_length)
        axes.set_ylim(0, 1.1 * max(value for _, value in measured))
        axes.set_xlabel("context, tokens")
        axes.set_title(title)
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)
    console.print(f"saved {picture}")


if __name__ == "__main__":
    app()
