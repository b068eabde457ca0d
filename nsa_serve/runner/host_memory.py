"""What the flags ask of the host's memory and disk: checked, reserved early, opened.

Page-locking runs while the weights are read, so it is begun before them. Each function gives None
where its flag asks for nothing, and raises ``ConfigError`` for what can't be had.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import EngineConfig
from ..errors import ConfigError
from ..memory.host_pool import PinnedMemory
from ..memory.layout import KVLayout
from ..memory.page_store import SEGMENT_BYTES, PageStore
from ..models.checkpoint import Checkpoint
from ..models.config import ModelConfig
from ..models.identity import model_identity
from ..models.loader import parameter_shapes
from ..models.weight_stream import StreamPlan, WeightStream
from .budget import free_bytes, shown
from .tier_sizes import transfer_pages

_CPU = torch.device("cpu")


def plan_stream(
    config: EngineConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype
) -> StreamPlan | None:
    """The layers that ``--cpu-offload-bytes`` keeps in host memory."""
    asked = config.source.cpu_offload_bytes
    if not asked:
        return None
    if device.type != "cuda":
        raise ConfigError(
            "--cpu-offload-bytes needs a GPU: on a CPU all weights lie in host memory"
        )
    return StreamPlan.of(parameter_shapes(model), model.num_layers, dtype, asked)


def reserve_weights(plan: StreamPlan | None) -> PinnedMemory | None:
    """Begin to page-lock what ``plan`` keeps in host memory."""
    if plan is None:
        return None
    return _reserve(plan.host_bytes, "--cpu-offload-bytes", unit=plan.layer_bytes)


def build_stream(
    plan: StreamPlan | None, memory: PinnedMemory | None, device: torch.device
) -> WeightStream | None:
    """What copies the planned layers to ``device``, once ``memory`` is page-locked."""
    if plan is None or memory is None:
        return None
    host = memory.wait()
    if host.numel() < plan.host_bytes:
        raise ConfigError(
            f"--cpu-offload-bytes: the system page-locks only {shown(host.numel())} of "
            f"{shown(plan.host_bytes)}: raise the limit of locked memory (ulimit -l)"
        )
    return WeightStream(plan, host.view(plan.dtype), device)


def reserve_pages(
    config: EngineConfig, model: ModelConfig, layout: KVLayout, device: torch.device
) -> PinnedMemory | None:
    """Check ``--kv-host-memory-bytes``, and for a GPU begin to page-lock them; else None."""
    asked = config.cache.kv_host_memory_bytes
    if not asked:
        return None
    if model.nsa is None:
        raise ConfigError(
            "--kv-host-memory-bytes needs Native Sparse Attention: dense attention reads the "
            "whole cache for every token; use --attention nsa, or leave the flag out"
        )
    flag = "--kv-host-memory-bytes"
    if device.type != "cuda":
        _check_free(asked, flag)
        return None
    return _reserve(asked, flag, unit=transfer_pages(layout) * layout.bytes_per_slot)


def open_store(
    config: EngineConfig,
    checkpoint: Checkpoint,
    model: ModelConfig,
    layout: KVLayout,
    device: torch.device,
) -> PageStore | None:
    """The files of ``--kv-disk-dir`` that hold pages of this very model."""
    cache, source = config.cache, config.source
    if cache.kv_disk_dir is None:
        return None
    page_bytes = layout.bytes_per_block
    least = 2 * (SEGMENT_BYTES + page_bytes)
    if cache.kv_disk_bytes < least:
        raise ConfigError(
            f"--kv-disk-dir of {cache.kv_disk_bytes} bytes holds too few files: give it at "
            f"least {shown(least)}"
        )
    # K/V of the same tokens differ in their last bits where they are computed otherwise.
    way = device.type, config.graph.deterministic
    seed = source.seed if source.random_weights else None
    key = model_identity(checkpoint, model, layout, way, seed)
    try:
        return PageStore(Path(cache.kv_disk_dir).expanduser(), key, page_bytes, cache.kv_disk_bytes)
    except OSError as error:
        raise ConfigError(f"--kv-disk-dir {cache.kv_disk_dir}: {error}") from None


def _reserve(num_bytes: int, flag: str, *, unit: int) -> PinnedMemory:
    _check_free(num_bytes, flag)
    try:
        return PinnedMemory(num_bytes, flag=flag, unit=unit)
    except OSError as error:
        raise ConfigError(f"{flag} of {shown(num_bytes)} is refused: {error}") from None


def _check_free(num_bytes: int, flag: str) -> None:
    free = free_bytes(_CPU)
    if num_bytes >= free:
        raise ConfigError(
            f"{flag} takes {num_bytes} bytes ({shown(num_bytes)}), which exceeds the host's free "
            f"memory of {shown(free)}: lower that flag"
        )
