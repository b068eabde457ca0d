"""Throughput with the host tier against the share of blocks found on the device, as a picture.

``python -m nsa_serve.bench.tier_plot RATES.jsonl PICTURE.png``; the lines come from
``nsa_serve.bench.tiered_engine rates``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .report import console

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class Rate:
    """Decode steps in which a share of the looked-up blocks was on the device."""

    hit_rate: float
    streams: int
    step_ms: float
    missed_mb: float  # of a step
    link_ms: float  # what the link takes for them

    @property
    def link_gb_s(self) -> float:
        return self.missed_mb / self.link_ms if self.link_ms else math.inf

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * self.streams / self.step_ms


def read_rates(lines: str) -> list[Rate]:
    """The measured rates of a JSONL record, by hit rate; its other lines are passed over.

    Raises ``ValueError`` where it holds none.
    """
    records = [json.loads(line) for line in lines.splitlines() if line.strip()]
    rates = [
        Rate(r["hit_rate"], r["streams"], r["step_ms"]["median"], r["missed_mb"], r["link_ms"])
        for r in records
        if "hit_rate" in r
    ]
    if not rates:
        raise ValueError("no line has a hit_rate: is this a record of tiered_engine rates?")
    return sorted(rates, key=lambda rate: rate.hit_rate)


def resident_ms(rates: list[Rate]) -> float:
    """A step without what the link takes, from the rate that read the least."""
    least = max(rates, key=lambda rate: rate.hit_rate)
    return least.step_ms - least.link_ms


def floor_tokens_per_s(rate: Rate, resident: float) -> float:
    """Tokens/s if a step took as long as a resident one and the link's bytes, not overlapped."""
    return 1e3 * rate.streams / (resident + rate.link_ms)


@app.command()
def draw(
    record: Annotated[
        Path, typer.Argument(help="JSONL of tiered_engine rates.", exists=True, dir_okay=False)
    ],
    picture: Annotated[Path, typer.Argument(help="PNG to write.")],
) -> None:
    """Draw throughput over hit rate, with the link's floor."""
    from matplotlib import pyplot

    rates = read_rates(record.read_text())
    resident = resident_ms(rates)
    hits = [100 * rate.hit_rate for rate in rates]
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    axes.plot(hits, [rate.tokens_per_s for rate in rates], marker="o", label="measured")
    floor = [floor_tokens_per_s(rate, resident) for rate in rates]
    link = f"{rates[0].link_gb_s:.0f} GB/s"
    axes.plot(hits, floor, ":k", label=f"resident step + missed bytes / {link}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("blocks found on the device, %")
    axes.set_ylabel("tokens/s")
    axes.set_title(f"{rates[0].streams} streams with the host tier")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    console.print(f"saved {picture}")


if __name__ == "__main__":
    app()
