"""How much memory a device has, and how long a cache it holds beside the model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import GIB
from ..errors import ConfigError
from ..memory.layout import KVLayout

_DEFAULT_CPU_CACHE = 4 * GIB
_CPU_CACHE_SHARE = 4  # or a quarter of the free memory, if that is less
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What the cache holds: blocks in all, and tokens of one request at most."""

    num_blocks: int
    max_model_len: int


def free_bytes(device: torch.device) -> int:
    """Memory that a new allocation may take on ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_free_ram(), _free_in_cgroup()]
    return min(limit for limit in limits if limit is not None)


def _free_ram() -> int:
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass  # no Linux: count what is not in use at all
    names = os.sysconf_names
    free = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES"
    return os.sysconf(free) * page


def _free_in_cgroup() -> int | None:
    """What a container's limit leaves; None where there is none."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        # Pages of files count as used, but make room when memory is asked for.
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return None if limit == "max" else int(limit) - used + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return None


def default_cpu_cache(free: int) -> int:
    """Cache bytes on a CPU with ``free`` bytes, unless the flag says otherwise."""
    return min(_DEFAULT_CPU_CACHE, free // _CPU_CACHE_SHARE)


def check_weights(weights: int, free: int, *, usable: int, flags: str) -> None:
    """Raise ``ConfigError`` where ``weights`` bytes don't fit into ``usable`` of ``free`` bytes."""
    if weights >= usable:
        raise ConfigError(
            f"the model's weights will take {shown(weights)}, and of {shown(free)} free memory "
            f"{shown(usable)} may be used: {flags}"
        )


def size_cache(
    num_bytes: int,
    layout: KVLayout,
    *,
    max_model_len: int,
    max_num_seqs: int,
    is_explicit: bool,
    flag: str = "--kv-cache-memory-bytes",
) -> CacheSize:
    """Blocks that fit into ``num_bytes``, no more than ``max_num_seqs`` requests can use.

    Where one request of ``max_model_len`` tokens doesn't fit, that length is refused if
    ``is_explicit``, else lowered to what fits. ``flag`` is the one that would make more room.
    """
    pages = layout.num_pages(max_model_len)
    num_blocks = min(max(num_bytes, 0) // layout.bytes_per_block, max_num_seqs * pages)
    if num_blocks >= pages:
        return CacheSize(num_blocks, max_model_len)
    if is_explicit or num_blocks == 0:
        raise ConfigError(
            f"one request of {max_model_len} tokens needs {shown(pages * layout.bytes_per_block)} "
            f"of cache, and {shown(max(num_bytes, 0))} are left for it, enough for "
            f"{num_blocks * layout.page} tokens: lower --max-model-len, or raise {flag}"
        )
    return CacheSize(num_blocks, num_blocks * layout.page)


def shown(num_bytes: int) -> str:
    """Bytes as a person reads them: 1.25 GiB, 80.0 MiB."""
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.2f} GiB"
    return f"{num_bytes / (1 << 20):.1f} MiB"
