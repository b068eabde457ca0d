"""Loss and throughput of a run over its tokens, as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_PANELS = (
    ("loss", ("loss", "text", "answer")),
    ("distillation and importance", ("teacher", "dialogue", "importance")),
    ("shares", ("answers_right", "caught")),
    ("tokens/s", ("tokens_per_second",)),
)


def plot_run(log: Path, out: Path) -> bool:
    """Draw ``log`` (log.jsonl of a run) to ``out``; False where matplotlib is not installed.

    Raises ``ConfigError`` where the log has no rows.
    """
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    if not rows:
        raise ConfigError(f"{log}: no rows to plot")
    try:
        import matplotlib  # an optional part: the extra "bench"
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    for axis, (title, names) in zip(axes.flat, _PANELS, strict=True):
        for name in names:
            _draw(axis, rows, name)
        axis.set_title(title)
        axis.set_xlabel("million tokens")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return True


def _draw(axis: Any, rows: list[dict[str, Any]], name: str) -> None:
    points = [(row["num_tokens"] / 1e6, row[name]) for row in rows if row.get(name) is not None]
    axis.plot([x for x, _ in points], [y for _, y in points], label=name)
