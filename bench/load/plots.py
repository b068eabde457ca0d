"""Pictures of a load test, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import console
from .gauges import Gauges
from .metrics import Measured


def save_load_plots(path: Path, measured: Measured, gauges: Sequence[Gauges]) -> list[Path]:
    """``path``-ttft.png and -itl.png (cumulative distributions), and -timeline.png."""
    saved = [
        _save_cdf(path, "ttft", "time to first token", measured.samples("ttft")),
        _save_cdf(path, "itl", "inter-token latency", measured.samples("itl")),
        _save_timeline(path, measured, gauges),
    ]
    return [file for file in saved if file is not None]


def _save_cdf(path: Path, metric: str, title: str, seconds: Sequence[float]) -> Path | None:
    if not seconds:
        return None
    figure, axes = _axes(f"{title}, {len(seconds)} values", "ms", "share of values")
    ordered = sorted(1e3 * value for value in seconds)
    axes.ecdf(ordered)
    axes.set_xscale("log")
    for share in (0.5, 0.9, 0.99):
        axes.axhline(share, color="black", linewidth=0.6, linestyle=":")
    return _save(figure, path, metric)


def _save_timeline(path: Path, measured: Measured, gauges: Sequence[Gauges]) -> Path | None:
    """Requests under way as the client counts them, and as the server does where it tells."""
    events = [(o.sent, 1) for o in measured.completed]
    events += [(o.sent + o.latency, -1) for o in measured.completed]
    if not events:
        return None
    figure, axes = _axes("requests under way", "seconds", "requests")
    times, counts, running = [0.0], [0], 0
    for at, change in sorted(events):
        running += change
        times.append(at - measured.start)
        counts.append(running)
    axes.step(times, counts, where="post", label="sent and not ended (client)")
    if gauges:
        looks = [look.at - measured.start for look in gauges]
        axes.step(looks, [look.running for look in gauges], where="post", label="running (server)")
        axes.step(looks, [look.waiting for look in gauges], where="post", label="waiting (server)")
    axes.legend()
    return _save(figure, path, "timeline")


def save_sweep_plot(
    path: Path, steps: Sequence[Mapping[str, Any]], limits: Mapping[str, float]
) -> Path:
    """Throughput and tail latencies over offered load, limits dotted."""
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(3, 1, figsize=(7, 10), layout="constrained", sharex=True)
    ordered = sorted(steps, key=lambda step: float(step["request_rate"]))
    rates = [step["request_rate"] for step in ordered]
    panels = (
        ("output tokens/s", "output_throughput", ""),
        ("p99 TTFT, ms", "p99_ttft_ms", "ttft"),
        ("p99 TPOT, ms", "p99_tpot_ms", "tpot"),
    )
    for axes, (label, key, metric) in zip(rows, panels, strict=True):
        axes.plot(rates, [step[key] for step in ordered], marker="o")
        if metric in limits:
            axes.axhline(limits[metric], color="black", linestyle=":", label="limit")
            axes.legend()
        axes.set_ylabel(label)
        axes.grid(visible=True, alpha=0.3)
    rows[-1].set_xlabel("offered load, requests/s")
    return _save(figure, path, "sweep")


def _axes(title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(visible=True, which="both", alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path, name: str) -> Path:
    from matplotlib import pyplot

    file = path.with_name(f"{path.stem}-{name}.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    console.print(f"saved {file}")
    return file
