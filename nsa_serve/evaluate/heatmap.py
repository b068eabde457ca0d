"""A picture of a grid of needles."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError


def check_plots() -> None:
    """Raise ``ConfigError`` where the library that draws is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("the heat map needs matplotlib: pip install 'nsa-serve[eval]'")


def save_heatmap(
    path: Path,
    title: str,
    contexts: Sequence[int],
    depths: Sequence[float],
    found: Mapping[tuple[int, float], float],
) -> None:
    """Save a PNG: contexts from left to right, depths downwards, the share found in each cell."""
    # matplotlib is an optional part.
    from matplotlib import pyplot

    rows = [[found[context, depth] for context in contexts] for depth in depths]
    size = (1.6 + 0.9 * len(contexts), 1.6 + 0.36 * len(depths))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(rows, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(contexts)), [shown(context) for context in contexts])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("depth of the needle")
    axes.set_title(title, fontsize="medium", wrap=True)
    for y, row in enumerate(rows):
        for x, share in enumerate(row):
            axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize="small")
    figure.colorbar(image, label="share of needles found")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def shown(context: int) -> str:
    """A context as people write it: 64k, or the number itself."""
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)
