"""A line of statistics every few seconds, while there is something to tell."""

from __future__ import annotations

import asyncio
import logging
import re

from ..errors import EngineDead
from ..stats import StatsSnapshot
from .ports import Engine

logger = logging.getLogger("nsa_serve")

_ZERO = re.compile(r" 0(\.0)?\b(?!\.)")


async def log_stats(engine: Engine, interval: float) -> None:
    """Log a line each ``interval`` seconds in which the engine was busy. Runs until cancelled."""
    loop = asyncio.get_running_loop()
    before, since = await engine.stats(), loop.time()
    while True:
        await asyncio.sleep(interval)
        try:
            now = await engine.stats()
        except EngineDead:
            return
        if is_busy(before, now):
            logger.info(stats_line(before, now, loop.time() - since))
        before, since = now, loop.time()


def is_busy(before: StatsSnapshot, now: StatsSnapshot) -> bool:
    return now.num_steps > before.num_steps or now.num_running + now.num_waiting > 0


def stats_line(before: StatsSnapshot, now: StatsSnapshot, seconds: float) -> str:
    """Requests, prompts under way, throughput over ``seconds``, cache use, hits since the start.

    What is 0 is left out.
    """
    prompt = (now.prompt_tokens - before.prompt_tokens) / seconds
    generated = (now.generation_tokens - before.generation_tokens) / seconds
    hits = 100 * now.prefix_hits / now.prefix_queries if now.prefix_queries else 0.0
    groups = (
        (f"running {now.num_running}", f"waiting {now.num_waiting}"),
        (
            f"prompt tokens waiting {now.num_queued_tokens:,}",
            f"left in prefill {now.num_prefill_tokens:,}",
            f"oldest {100 * now.oldest_prefill:.0f}% done",
        ),
        (f"prompt {prompt:.1f} tokens/s", f"generation {generated:.1f} tokens/s"),
        (f"cache in use {100 * now.cache_usage:.1f}%", f"prefix hits {hits:.1f}%"),
    )
    told = (", ".join(part for part in group if not _ZERO.search(part)) for group in groups)
    return " · ".join(filter(None, told)) or groups[0][0]
