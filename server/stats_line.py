"""A line of statistics every few seconds, while there is something to tell."""

from __future__ import annotations

import asyncio
import logging

from ..errors import EngineDead
from ..stats import StatsSnapshot
from .ports import Engine

logger = logging.getLogger("nsa_serve")


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
    """Requests, throughput over the last ``seconds``, cache use, hit rate since the start."""
    prompt = (now.prompt_tokens - before.prompt_tokens) / seconds
    generated = (now.generation_tokens - before.generation_tokens) / seconds
    hits = 100 * now.prefix_hits / now.prefix_queries if now.prefix_queries else 0.0
    return (
        f"running {now.num_running}, waiting {now.num_waiting} · "
        f"prompt {prompt:.1f} tokens/s, generation {generated:.1f} tokens/s · "
        f"cache in use {100 * now.cache_usage:.1f}%, prefix hits {hits:.1f}%"
    )
