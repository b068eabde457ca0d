"""One device's part of the engine: the model, its cache and the runner, from the configuration."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ..config import EngineConfig
from ..errors import ConfigError
from ..memory.device_pool import DevicePool
from ..memory.disk_tier import DiskTier
from ..memory.host_pool import HostPool
from ..memory.layout import KVLayout
from ..memory.tier import HostTier
from ..models.checkpoint import Checkpoint, resolve
from ..models.config import ModelConfig, with_attention, with_context
from ..models.decoder import Decoder
from ..models.families import model_config
from ..models.linear import choose_dtype
from ..models.loader import Progress, load_decoder, num_weight_bytes
from ..schedule.plan import StepPlan
from .budget import CacheSize, check_weights, default_cpu_cache, free_bytes, shown, size_cache
from .host_memory import build_stream, open_store, plan_stream, reserve_pages, reserve_weights
from .model_runner import ModelRunner, PendingStep
from .profile import measure_peak
from .tier_sizes import TierSize, size_tiers

logger = logging.getLogger(__name__)

_TOKEN_BUDGET = {"cpu": 2048, "cuda": 8192}
_TOO_BIG = {
    "cpu": "use --dtype bfloat16 or a smaller model",
    "cuda": "raise --gpu-memory-utilization, or use --dtype bfloat16 or a smaller model",
}


class Worker:
    """Loads the model, sizes the cache and runs plans.

    Raises ``ConfigError`` or ``CheckpointError``, before any weight is read where it can be known.
    """

    def __init__(self, config: EngineConfig, progress: Progress | None = None) -> None:
        self.config = config
        self.device = choose_device(config.device)
        self.checkpoint = resolve(config.source)
        self.model_config = served_model(self.checkpoint, config)
        self.dtype = choose_dtype(config.source.dtype, self.device)
        self.layout = KVLayout.of(self.model_config, self.dtype)
        self.token_budget = token_budget(config, self.device)
        self._free_at_start = free_bytes(self.device)
        self.num_weight_bytes = num_weight_bytes(self.model_config, self.dtype)
        self.stream_plan = plan_stream(config, self.model_config, self.device, self.dtype)
        self._check_fit()
        self._offloaded = reserve_weights(self.stream_plan)
        self._pinned = reserve_pages(config, self.model_config, self.layout, self.device)
        self.model = self._load(progress)
        self.tiers: TierSize | None = None
        self.disk: DiskTier | None = None
        size = self._size_cache()
        self.max_model_len, self.num_blocks = size.max_model_len, size.num_blocks
        self.pool, self.tier = self._build_pools()
        self.num_cache_bytes = self.pool.num_bytes
        self.disk = self._open_disk()
        self._runner = self._build_runner(self.pool, self.max_model_len, tier=self.tier)

    @property
    def page(self) -> int:
        """Tokens of a block."""
        return self.layout.page

    @property
    def vocab_size(self) -> int:
        return self.model_config.vocab_size

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def device_name(self) -> str:
        """The device as a person knows it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type

    @property
    def num_device_bytes(self) -> int:
        """Bytes of the weights on the device, buffers of those that are streamed among them."""
        saved = 0 if self.stream_plan is None else self.stream_plan.saved_bytes
        return self.num_weight_bytes - saved

    @property
    def num_cache_tokens(self) -> int:
        return self.num_blocks * self.page

    def launch(self, plan: StepPlan) -> PendingStep:
        """Queue a step; its ``result()`` waits for it."""
        return self._runner.launch(plan)

    def close(self) -> None:
        """Write what waits for the disk."""
        if self.disk is not None:
            self.disk.close()

    def describe(self) -> str:
        """One line: device, type, bytes of the weights, size of the cache."""
        cache = shown(self.num_cache_bytes)
        if self.tiers is not None:
            host = self.tiers.num_host * self.layout.bytes_per_slot
            cache = f"{cache} and {shown(host)} of the host's memory"
        weights = shown(self.num_device_bytes)
        if self.stream_plan is not None:
            weights = f"{weights} and {shown(self.stream_plan.host_bytes)} streamed"
        return (
            f"{self.dtype_name} on {self.device_name}, weights {weights}, "
            f"cache {self.num_cache_tokens:,} tokens ({cache}), context {self.max_model_len:,}"
        )

    @property
    def _usable(self) -> int:
        """Bytes of the free memory at start that model, steps and cache may take together."""
        if self.device.type == "cuda":
            return int(self._free_at_start * self.config.cache.gpu_memory_utilization)
        return self._free_at_start

    def _check_fit(self) -> None:
        """Refuse what can't fit, before the weights are loaded."""
        asked = self.config.cache.kv_cache_memory_bytes or 0
        flags = _TOO_BIG[self.device.type]
        weights, free, usable = self.num_device_bytes, self._free_at_start, self._usable
        check_weights(weights, free, usable=usable, flags=flags)
        if weights + asked >= free:
            raise ConfigError(
                f"weights of {shown(weights)} and --kv-cache-memory-bytes {asked} "
                f"({shown(asked)}) exceed the free memory of {shown(free)}: lower that flag"
            )

    def _build_pools(self) -> tuple[DevicePool, HostTier | None]:
        tiers = self.tiers
        if tiers is None:
            return DevicePool(self.layout, self.num_blocks, self.num_blocks, self.device), None
        # A CPU reads both tiers through one address range; a GPU reads the host's in place.
        behind = 0 if self._pinned else tiers.num_host
        pool = DevicePool(
            self.layout, tiers.num_slots, self.num_blocks, self.device, num_host=behind
        )
        raw = pool.behind
        if self._pinned is not None:
            num_bytes = tiers.num_host * self.layout.bytes_per_slot
            raw = self._pinned.wait()[:num_bytes].view(self.dtype)
        host = HostPool(self.layout, raw)
        ahead, nsa = self.config.cache.kv_runners_up, self.model_config.nsa
        num_ranked = nsa.shape.num_selected + ahead if nsa and ahead else 0
        return pool, HostTier(
            pool, host, slab=tiers.slab, num_hot=tiers.num_hot, num_ranked=num_ranked
        )

    def _open_disk(self) -> DiskTier | None:
        store = open_store(
            self.config, self.checkpoint, self.model_config, self.layout, self.device
        )
        return None if store is None else DiskTier(store, self.pool, self.tier)

    def _load(self, progress: Progress | None) -> Decoder:
        source = self.config.source
        return load_decoder(
            self.checkpoint,
            self.model_config,
            device=self.device,
            dtype=self.dtype,
            seed=source.seed if source.random_weights else None,
            progress=progress,
            deterministic=self.config.graph.deterministic,
            stream=build_stream(self.stream_plan, self._offloaded, self.device),
        )

    def _size_cache(self) -> CacheSize:
        length = self.model_config.max_position
        on_cuda = self.device.type == "cuda"
        is_given = self.config.cache.kv_cache_memory_bytes is not None
        flag = "--kv-cache-memory-bytes" if is_given or not on_cuda else "--gpu-memory-utilization"
        num_bytes = self._measured_cache_bytes(length) if on_cuda else self._cpu_cache_bytes()
        num_bytes = self._size_tiers(num_bytes)
        size = size_cache(
            num_bytes,
            self.layout,
            max_model_len=length,
            max_num_seqs=self.config.schedule.max_num_seqs,
            is_explicit=self.config.source.max_model_len is not None,
            flag=flag,
        )
        if size.max_model_len < length:
            logger.warning(
                "the context is %d tokens, not the checkpoint's %d: the cache of %s holds no more; "
                "raise %s",
                size.max_model_len,
                length,
                shown(num_bytes),
                flag,
            )
        return replace(size, num_blocks=self.tiers.num_blocks) if self.tiers else size

    def _size_tiers(self, num_bytes: int) -> int:
        """Bytes of a cache as long as both tiers together; ``num_bytes`` if there is but one."""
        asked = self.config.cache.kv_host_memory_bytes
        nsa = self.model_config.nsa
        if not asked or nsa is None:
            return num_bytes
        self.tiers = size_tiers(
            num_bytes,
            self._pinned.wait().numel() if self._pinned else asked,
            self.layout,
            nsa.shape,
            max_num_seqs=self.config.schedule.max_num_seqs,
            token_budget=self.token_budget,
        )
        return self.tiers.num_blocks * self.layout.bytes_per_block

    def _cpu_cache_bytes(self) -> int:
        asked = self.config.cache.kv_cache_memory_bytes
        return asked or default_cpu_cache(free_bytes(self.device))

    def _measured_cache_bytes(self, max_model_len: int) -> int:
        """What weights and the heaviest step leave of the usable memory, or what the flag says."""
        peak = measure_peak(
            lambda pool: self._build_runner(pool, max_model_len, use_graphs=False),
            self.layout,
            max_rows=self.config.schedule.max_num_seqs,
            max_tokens=self.token_budget,
            max_model_len=max_model_len,
            device=self.device,
        )
        torch.cuda.empty_cache()
        # Weights, and what the driver and its libraries took meanwhile.
        taken = self._free_at_start - free_bytes(self.device)
        asked = self.config.cache.kv_cache_memory_bytes
        if asked is None:
            return self._usable - taken - peak
        if asked > self._free_at_start - taken - peak:
            raise ConfigError(
                f"--kv-cache-memory-bytes {asked} exceeds the free {shown(self._free_at_start)} "
                f"less {shown(taken)} for weights and {shown(peak)} for steps: lower that flag"
            )
        return asked

    def _build_runner(
        self,
        pool: DevicePool,
        max_model_len: int,
        *,
        use_graphs: bool = True,
        tier: HostTier | None = None,
    ) -> ModelRunner:
        graph = self.config.graph
        # The kernels that treat all tokens alike gather whole contexts, for which a graph would
        # have to hold room at the longest one.
        eager = graph.enforce_eager or graph.deterministic or self.device.type != "cuda"
        return ModelRunner(
            self.model,
            pool,
            vocab_size=self.model_config.vocab_size,
            eos_token_ids=self.model_config.eos_token_ids,
            max_rows=self.config.schedule.max_num_seqs,
            max_tokens=self.token_budget,
            max_model_len=max_model_len,
            use_graphs=use_graphs and not eager,
            uniform=graph.deterministic,
            tier=tier,
            stream=self.model.stream,
            disk=self.disk,
        )


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` is CUDA where there is one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("--device cuda, but torch finds no CUDA device here: use --device cpu")
    on_cuda = name == "cuda" or (name == "auto" and available)
    return torch.device("cuda", 0) if on_cuda else torch.device("cpu")


def served_model(checkpoint: Checkpoint, config: EngineConfig) -> ModelConfig:
    """What the checkpoint is, as ``--attention`` and ``--max-model-len`` serve it."""
    model = with_attention(model_config(checkpoint), config.source.attention)
    return with_context(model, config.source.max_model_len)


def token_budget(config: EngineConfig, device: torch.device) -> int:
    """Tokens of a step: the flag's, else by device, and at least one for each request."""
    asked = config.schedule.max_num_batched_tokens
    return asked or max(_TOKEN_BUDGET[device.type], config.schedule.max_num_seqs)
